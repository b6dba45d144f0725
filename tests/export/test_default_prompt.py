"""The prompt that an export asks is taken from one small file, and nothing else is followed."""

import json
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
from streaming import MDSWriter

from exports import read_card
from hostile_json import VALUES, leaves, replaced
from vlm_composer.config.data import LoaderConfig
from vlm_composer.config.loader import build
from vlm_composer.export import __main__ as command
from vlm_composer.export import facts
from vlm_composer.export.loading import load_processor

PROMPT = "<image>\nWhat is it?"


def settings_of(*places, **more):
    streams = {f"s{number}": {"local": str(place)} for number, place in enumerate(places)}
    if len(places) == 1:
        return {"train_loader": {"dataset": {"local": str(places[0]), **more}}}
    return {"train_loader": {"streams": streams}}


def commonest_prompt(settings):
    loader = build(LoaderConfig, settings["train_loader"], "", [])
    return facts.commonest_prompt(loader)[0]


@pytest.fixture
def quality(tmp_path):
    """Writes a quality.json; its data set's `train` is beside it."""
    path = tmp_path / "data" / "quality.json"
    path.parent.mkdir()

    def write(*prompts, **more):
        counted = [{"prompt": prompt, "samples": 9 - n} for n, prompt in enumerate(prompts)]
        path.write_text(json.dumps({"prompts": counted, **more}))
        return settings_of(path.parent / "train")

    return write


def test_the_commonest_of_a_conversion(quality, shards, tmp_path):
    assert commonest_prompt(quality(PROMPT, "other <image>")) == PROMPT
    data = tmp_path / "data"
    assert commonest_prompt(settings_of(data / "emoji" / "train")) == PROMPT
    assert commonest_prompt(settings_of(tmp_path / "no/train", data / "train")) is None
    assert commonest_prompt(settings_of("/tmp/cache", remote=str(data / "train"))) == PROMPT
    counted = json.loads((shards / "quality.json").read_text())["prompts"]
    assert commonest_prompt(settings_of(shards / "train")) == counted[0]["prompt"]


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_data_set_is_not_opened(tmp_path):
    """Its prompts are pickles."""
    run = tmp_path / "it ran"
    columns = {"answer": "str", "id": "str", "image": "bytes", "prompt": "pkl"}
    record = {"answer": "a", "id": "i", "image": b"i", "prompt": Attack(run)}
    with MDSWriter(out=str(tmp_path / "data/train"), columns=columns) as writer:
        writer.write(record)
    assert commonest_prompt(settings_of(tmp_path / "data" / "train")) is None
    assert not run.exists()


def test_nothing_is_asked_of_a_store_and_nothing_else_is_opened(tmp_path):
    opened = []

    def watch(event, arguments):
        if event in ("open", "os.listdir", "os.scandir", "socket.connect", "socket.getaddrinfo"):
            opened.append((event, arguments[0]))

    sys.addaudithook(lambda *found: watch(*found) if threading.current_thread() is here else None)
    here = threading.current_thread()
    for place in ("s3://bucket/data/train", "gs://b/x", "http://127.0.0.1:9/x", "file:///etc"):
        assert commonest_prompt(settings_of("/nowhere/train", remote=place)) is None
        assert commonest_prompt(settings_of(place)) is None
    assert commonest_prompt(settings_of(tmp_path / "data" / "train")) is None
    here = None
    names = {os.fspath(name) for event, name in opened}
    assert {event for event, _ in opened} <= {"open"}
    small = ("quality.json", "summary.json")
    mine = {name for name in names if name.startswith(str(tmp_path))}
    assert mine == {str(tmp_path / folder / name) for folder in ("data", "") for name in small}
    assert {Path(name).name for name in names} == {*small}


BAD = (
    "no image",
    "<image><image>",
    "",
    "<image>" + "x" * 200,
    None,
    3,
    ["<image>"],
    "<image>\ud800",
)


@pytest.mark.parametrize("prompt", BAD, ids=range(len(BAD)))
def test_a_prompt_that_cannot_be_asked(quality, prompt):
    assert commonest_prompt(quality(prompt, PROMPT)) is None


def test_a_file_that_anybody_wrote(quality, tmp_path):
    settings = quality(PROMPT, samples=3)
    path = tmp_path / "data" / "quality.json"
    document = json.loads(path.read_text())
    for place in leaves(document):
        for new in VALUES:
            path.write_text(json.dumps(replaced(document, place, new)))
            assert commonest_prompt(settings) in (PROMPT, None)
    for data in (b"", b"\xff", b"[" * 9999, b" " * ((1 << 26) + 1)):
        path.write_bytes(data)
        assert commonest_prompt(settings) is None
    path.unlink()
    for make in (lambda: os.mkfifo(path), path.mkdir, lambda: path.symlink_to("/dev/zero")):
        make()
        assert commonest_prompt(settings) is None  # and is not waited for
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_prompt_that_is_given(qwen_export, tmp_path, capsys):
    arguments = [qwen_export.checkpoints, "--out", str(tmp_path / "out"), "--prompt"]
    assert command.main([*arguments, "no image"]) == 1
    assert "the prompt 'no image' has 0 × <image>; give it one" in capsys.readouterr().err
    assert command.main([*arguments, PROMPT]) == 0
    assert load_processor(tmp_path / "out").default_prompt == PROMPT
    assert f"asks {PROMPT!r}: as given to the export" in read_card(tmp_path / "out")
