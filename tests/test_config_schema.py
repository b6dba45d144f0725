"""The schema itself: copies, settings that a checkpoint records, reference, imports, defaults."""

import ast
import copy
import dataclasses
import graphlib
import inspect
import json
import pickle
import typing
from pathlib import Path

import pytest

import vlm_composer.config
from vlm_composer.config import TrainConfig
from vlm_composer.config.loader import build
from vlm_composer.config.model import ProjectorConfig, ResamplerConfig
from vlm_composer.config.reference import documentation_of, render
from vlm_composer.config.reports import (
    CaptionLogConfig,
    EvidenceConfig,
    LiveWarningsConfig,
    SpeedReportConfig,
    StepTimesConfig,
)
from vlm_composer.config.run import RunSettings
from vlm_composer.config.section import bare, keys_of
from vlm_composer.evaluation.captions_log import CaptionLog
from vlm_composer.evaluation.evidence import Evidence
from vlm_composer.evaluation.warnings import LiveWarnings
from vlm_composer.models.projector import MLPProjector
from vlm_composer.models.resampler import PerceiverResampler
from vlm_composer.training.speed_report import SpeedReport
from vlm_composer.training.step_times import StepTimes

CONFIG = Path(vlm_composer.config.__file__).parent
REFERENCE = Path(__file__).parent.parent / "docs" / "config.md"
ROOM = "vlm_composer.config."


def test_the_schema_checks_what_code_builds_too(tiny_config):
    config = tiny_config()
    with pytest.raises(ValueError, match="0 is less than 1"):
        dataclasses.replace(config, global_train_batch_size=0)
    copies = dataclasses.replace(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))
    for same in copies:
        assert same == config
        assert same.recorded() == config.recorded()


def test_settings_that_a_checkpoint_records_are_read_by_their_types(tiny_yaml, monkeypatch):
    """What came from the environment is recorded as its text, which is no time."""
    monkeypatch.setenv("LENGTH", "2ep")
    config = TrainConfig.read(tiny_yaml(), ["max_duration=${oc.env:LENGTH}"])
    recorded = json.loads(json.dumps(config.recorded()))
    errors = []
    settings = build(TrainConfig, recorded, "", errors)
    assert errors == []
    assert settings.max_duration == "${oc.env:LENGTH}"
    assert build(TrainConfig, recorded | {"seed": "x"}, "", errors) is None
    assert errors == ["seed: expected a whole number, got 'x'"]


def sections_of(schema):
    """A section and all below it."""
    yield schema
    for hint in keys_of(schema).values():
        for part in (bare(hint), *map(bare, typing.get_args(bare(hint)))):
            if dataclasses.is_dataclass(part):
                yield from sections_of(part)


def test_the_reference_is_current_and_complete():
    """`python -m vlm_composer.config.reference > docs/config.md` writes it."""
    page = REFERENCE.read_text()
    assert page == render()
    for section in sections_of(RunSettings):
        documented = documentation_of(section)
        for key in keys_of(section):
            assert documented.get(key, "").endswith("."), (section, key)
            assert f"| `{key}` | " in page


def test_the_modules_of_the_schema_have_no_import_cycle():
    """An import within a function counts as well."""
    imports = {}
    for path in CONFIG.glob("[!_]*.py"):
        found = ast.walk(ast.parse(path.read_text()))
        modules = [node.module or "" for node in found if isinstance(node, ast.ImportFrom)]
        imports[path.stem] = {name.split(".")[-1] for name in modules if name.startswith(ROOM)}
    assert imports["checks"] >= {"run", "times"}
    list(graphlib.TopologicalSorter(imports).static_order())  # raises at a cycle


@pytest.mark.parametrize(
    ("section", "part"),
    [
        (ResamplerConfig, PerceiverResampler),
        (ProjectorConfig, MLPProjector),
        (EvidenceConfig, Evidence),
        (CaptionLogConfig, CaptionLog),
        (LiveWarningsConfig, LiveWarnings),
        (StepTimesConfig, StepTimes),
        (SpeedReportConfig, SpeedReport),
    ],
)
def test_a_default_is_written_in_the_schema_alone(section, part):
    parameters = inspect.signature(part).parameters
    shared = parameters.keys() & {field.name for field in dataclasses.fields(section)}
    assert shared
    assert [
        name for name in shared if parameters[name].default is not inspect.Parameter.empty
    ] == []
