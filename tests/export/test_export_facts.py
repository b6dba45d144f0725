"""What an export says of its run: every data set, the commonest prompt, and what is not known."""

import ast
import dataclasses
import json
import math
import shutil
import typing
from pathlib import Path

import pytest

from exports import read_card, train_and_export
from mixtures import mixed
from tiny import tiny_qwen3, tiny_siglip
from vlm_composer import report
from vlm_composer.config import TrainConfig
from vlm_composer.config.changes import _FREE
from vlm_composer.config.data import LoaderConfig, StreamConfig
from vlm_composer.export.exporting import export_checkpoint
from vlm_composer.export.facts import COPIED, DEFAULT_PROMPT, commonest_prompt
from vlm_composer.training.metrics_file import read_metrics
from vlm_composer.training.run_facts import Facts


@pytest.fixture(scope="module")
def streams(two_sets, tmp_path_factory):
    """A run over two data sets, of a copy whose files a test may change."""
    folder = tmp_path_factory.mktemp("streams")
    data = shutil.copytree(two_sets, folder / "data")
    section = mixed(data, {"emoji": {"repeat": 2}, "llava": {}})
    return data, train_and_export(folder, two_sets / "emoji", tiny_siglip, tiny_qwen3,
                                  train_loader=section)  # fmt: skip


def facts_of(folder):
    return json.loads((folder / "vlm_composer.json").read_bytes())


def test_a_card_names_every_data_set_and_asks_their_commonest_prompt(streams, tmp_path):
    data, exported = streams
    places = [str(data / name / "train") for name in ("emoji", "llava")]
    assert facts_of(exported.folder)["run"]["data"]["names"] == places
    # Made by hand: 40 of emoji, twice, against 50 of llava.
    for name, prompt, samples in (("emoji", "<image>\nWho?", 40), ("llava", "<image>\nWhat?", 50)):
        quality = json.loads((data / name / "quality.json").read_bytes())
        quality["prompts"] = [{"prompt": prompt, "samples": samples}]
        (data / name / "quality.json").write_text(json.dumps(quality))
    out = export_checkpoint(exported.checkpoints, tmp_path / "out")
    assert facts_of(out)["default_prompt"] == "<image>\nWho?"
    card = read_card(out)
    assert all(place in card for place in places)
    assert "asks '<image>\\nWho?': the commonest of the training data" in card


def test_what_is_not_known_of_the_prompts_is_said(streams, tmp_path, caplog):
    data, exported = streams
    (data / "llava" / "quality.json").unlink()
    out = export_checkpoint(exported.checkpoints, tmp_path / "out")
    why = f"{data}/llava/train has no quality.json of its conversion on this machine"
    assert facts_of(out)["default_prompt"] == DEFAULT_PROMPT
    assert f"asks {DEFAULT_PROMPT!r}: a default, for {why}" in read_card(out)
    (record,) = [one for one in caplog.records if "Default prompt" in one.message]
    assert record.levelname == "WARNING"
    assert why in record.message


def loader_of(folder, weights, prompts):
    """Data sets with a quality.json each."""
    sections = {}
    for name, weight in weights.items():
        (folder / name / "train").mkdir(parents=True)
        quality = {"samples": sum(prompts[name].values())}
        quality["prompts"] = [{"prompt": p, "samples": n} for p, n in prompts[name].items()]
        (folder / name / "quality.json").write_text(json.dumps(quality))
        sections[name] = StreamConfig(str(folder / name / "train"), **weight)
    return LoaderConfig(streams=sections)


A, B = "<image>\nA", "B <image>"


@pytest.mark.parametrize(
    ("weights", "commonest"),
    [
        ({"one": {}, "two": {}}, B),  # 30 × A; 40 × B
        ({"one": {"repeat": 2.0}, "two": {}}, A),  # 60; 40
        ({"one": {"choose": 50}, "two": {"choose": 49}}, A),
        ({"one": {"proportion": 0.4}, "two": {"proportion": 0.6}}, B),
    ],
)
def test_prompts_are_weighted_as_an_epoch_takes_them(tmp_path, weights, commonest):
    loader = loader_of(tmp_path, weights, {"one": {A: 30}, "two": {B: 40}})
    assert commonest_prompt(loader)[0] == commonest


def test_features_have_the_prompts_of_their_images(tmp_path):
    loader_of(tmp_path, {"images": {}}, {"images": {A: 3}})
    (tmp_path / "features" / "train").mkdir(parents=True)
    made_of = {"sources": {"train": {"from": str(tmp_path / "images" / "train")}}}
    (tmp_path / "features" / "summary.json").write_text(json.dumps(made_of))
    source = StreamConfig(str(tmp_path / "features" / "train"))
    assert commonest_prompt(LoaderConfig(streams={"one": source}))[0] == A


@pytest.mark.parametrize(
    ("quality", "why"),
    [
        ("{", "cannot be read"),
        ('{"prompts": []}', "cannot be read"),
        (json.dumps({"samples": 1, "prompts": [{"prompt": "<image>" + "x" * 193, "samples": 1}]}),
         "the commonest prompt is cut"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_told(tmp_path, quality, why):
    loader = loader_of(tmp_path, {"one": {}}, {"one": {A: 1}})
    (tmp_path / "one" / "quality.json").write_text(quality)
    prompt, reason = commonest_prompt(loader)
    assert prompt is None
    assert why in reason


def test_sets_of_one_conversion_are_not_weighted_by_guess(tmp_path):
    quality = {"samples": 3, "prompts": [{"prompt": A, "samples": 3}]}
    (tmp_path / "quality.json").write_text(json.dumps(quality))
    sections = {name: StreamConfig(str(tmp_path / name / "train")) for name in ("one", "two")}
    assert commonest_prompt(LoaderConfig(streams=sections))[0] == A
    sections["one"].repeat = 3.0
    prompt, why = commonest_prompt(LoaderConfig(streams=sections))
    assert prompt is None
    assert "streams.one and streams.two are of one conversion" in why


def keys_of(schema, prefix=""):
    """Dotted keys of a dataclass, those of its sections too."""
    for name, hint in typing.get_type_hints(schema).items():
        yield prefix + name
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                yield from keys_of(part, f"{prefix}{name}.")


def test_readers_of_settings_name_keys_that_the_schema_has():
    """`run.json` and checkpoints hold settings as plain dictionaries."""
    known = set(keys_of(TrainConfig))
    read = set(COPIED)
    facts = set()
    for path in Path(report.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "fact":
                names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
                facts |= set(names[:1])
                read |= {".".join(names[1:])} if names[:1] == ["config"] else set()
    assert len(read) > len(COPIED)
    assert read <= known
    assert facts <= {field.name for field in dataclasses.fields(Facts)}
    for start in _FREE:
        assert any(key.startswith(start) for key in known), start


def metrics_file(exported):
    return Path(exported.config.folder("{run_folder}/metrics.jsonl"))


def exported_metrics(checkpoint, out, **options):
    return facts_of(export_checkpoint(str(checkpoint), out, **options))["run"]["metrics"]


LOSS = "training loss of the last batch"


def test_metrics_are_read_beside_the_checkpoint_alone(qwen_export, tmp_path, caplog):
    """A checkpoint's settings may name any file; a yaml is the user's own word."""
    assert LOSS in exported_metrics(qwen_export.checkpoints, tmp_path / "beside")
    moved = tmp_path / "elsewhere" / "checkpoints"
    shutil.copytree(qwen_export.checkpoints, moved)
    assert exported_metrics(moved, tmp_path / "moved") == {}
    (said,) = [one.message for one in caplog.records if "is not beside it" in one.message]
    assert f"{metrics_file(qwen_export)} that {moved}" in said
    assert "\n" not in said
    yaml = qwen_export.folder.parent / "run.yaml"
    assert LOSS in exported_metrics(moved, tmp_path / "named", yaml=yaml)


def test_a_link_beside_a_checkpoint_does_not_lead_out(qwen_export, tmp_path, caplog):
    path = metrics_file(qwen_export)
    kept = shutil.move(path, tmp_path / "secret.jsonl")
    try:
        path.symlink_to(kept)
        assert exported_metrics(qwen_export.checkpoints, tmp_path / "out") == {}
        assert "is not beside it" in caplog.text
    finally:
        path.unlink()
        shutil.move(kept, path)


FOREIGN = (
    b'{"batch": 4, "loss/train/total": 9', b"[]", b"3", b"{}", b"\xff\xfe", b'{"batch": "x"}',
    b'{"batch": -1, "loss/train/total": 9}', b'{"batch": true, "loss/train/total": 9}',
    b'{"batch": 4, "loss/train/total": ' + b"9" * 400 + b"}", b"[" * 100_000,
    b'{"batch": ' + b"9" * 5000 + b"}", b'{"batch": 4, "a\\ud800": 3}',
    b'{"batch": 4, "loss/train/total": "9"}', b'{"batch": 4, "loss/train/total": [9]}',
)  # fmt: skip


def test_lines_that_no_run_writes_are_left_out(qwen_export, tmp_path, caplog):
    """The last one is half written where the run still goes on or was killed."""
    path = metrics_file(qwen_export)
    whole = path.read_bytes()
    before = exported_metrics(qwen_export.checkpoints, tmp_path / "before")
    try:
        path.write_bytes(whole + b"\n".join([b"", *FOREIGN[::-1]]))
        caplog.clear()
        assert exported_metrics(qwen_export.checkpoints, tmp_path / "out") == before
        assert f"{path}: {len(FOREIGN) - 2} lines are not metrics" in caplog.text
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("line", FOREIGN, ids=range(len(FOREIGN)))
def test_a_foreign_line_alone_is_left_out(tmp_path, line):
    good = json.dumps({"batch": 3, "loss/train/total": math.nan, "a": 1})
    (tmp_path / "metrics.jsonl").write_bytes(good.encode() + b"\n" + line)
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics.keys() == {"loss/train/total", "a"}
    assert metrics["a"] == [(3, 1)]
    assert len(metrics["loss/train/total"]) == 1
