"""A sample or a loader that fails ends a run in one line, and the run resumes where it was."""

import io
import multiprocessing
import re
import threading
import time

import pytest
import torch
from PIL import Image
from streaming import MDSWriter

from checkpoints import newest
from runs import run
from test_train import launch
from vlm_composer import train
from vlm_composer.data.schema import MDS_COLUMNS

LONG = "<image>\n" + "very " * 20 + "long?"


def write_shards(folder, changes, count=40, **columns):
    """Write shards as others would, without statistics; `changes` of samples by number."""
    picture = io.BytesIO()
    Image.new("RGB", (20, 16), (230, 30, 30)).save(picture, "PNG")
    with MDSWriter(out=str(folder), columns=MDS_COLUMNS | columns, hashes=["xxh64"]) as writer:
        for number in range(count):
            sample = {"id": f"s{number}", "image": picture.getvalue(), "prompt": "<image>\nWhat?"}
            writer.write(sample | {"answer": "red"[: 1 + number % 3]} | changes.get(number, {}))
    return folder


@pytest.fixture
def saving_yaml(tiny_yaml, tmp_path):
    """A yaml over shards with changed samples, read in order, that saves after every batch."""

    def write(changes, workers=2, **settings):
        shards = write_shards(tmp_path / "shards", changes)
        loader = {"dataset": {"local": str(shards)}, "num_workers": workers}
        saving = {"save_folder": "{run_folder}/checkpoints", "save_interval": "1ba"}
        settings |= {"train_loader": loader, "eval_loader": None, "autoresume": True}
        return tiny_yaml(**saving, **{"max_duration": "1ep"} | settings)

    return write


def failure(capsys):
    """The one line that a failed run ends with."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("error on rank")]
    return line


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"prompt": LONG},
            "sample s29: the prompt is 111 tokens with its image and max_seq_len is 64: no token "
            "is left for the answer; raise max_seq_len",
        ),
        (
            {"prompt": "<image>\n<image>"},
            "sample s29: a prompt has one <image>, this one has 2: '<image>\\n<image>'",
        ),
        ({"image": b"no picture"}, "sample s29: 10 bytes that are not a readable image: "),
    ],
    ids=["long prompt", "two images", "broken image"],
)
def test_a_sample_that_cannot_be_used_is_named(saving_yaml, capsys, workers, change, line):
    assert train.main([str(saving_yaml({29: change}, workers))]) == 1
    assert failure(capsys).startswith(f"error on rank 0: {line}")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_record_that_cannot_be_taken_apart_is_named(saving_yaml, capsys, tmp_path, workers):
    path = saving_yaml({})
    shard = tmp_path / "shards" / "shard.00000.mds"
    data = shard.read_bytes()
    place = data.index(b"s29")
    shard.write_bytes(data[:place] + b"\xff" + data[place + 1 :])
    items = ["train_loader.dataset.validate_hash=null", f"train_loader.num_workers={workers}"]
    assert train.main([str(path), *items]) == 1
    line = failure(capsys)
    start = f"error on rank 0: sample 29: {shard} holds a sample that cannot be decoded: "
    assert line.startswith(start)
    assert "utf-8" in line
    assert line.endswith("; convert the data set again")


def when_saved(yaml, action):
    """Do something once a run has saved a checkpoint."""
    folder = yaml.parent / "run" / "checkpoints"

    def wait():
        while not list(folder.glob("ep*")):
            time.sleep(0.01)
        action()

    threading.Thread(target=wait, daemon=True).start()


def test_a_worker_that_is_killed_ends_the_run_in_one_line(saving_yaml, capsys):
    path = saving_yaml({}, max_duration="500ep")
    when_saved(path, lambda: multiprocessing.active_children()[0].kill())
    assert train.main([str(path)]) == 1
    line = failure(capsys)
    # By SIGCHLD, or, while it hands over a batch, by the connection.
    assert re.match(
        r"error on rank 0: (DataLoader worker \(pid.*killed by signal: Killed\.|a loader.s worker "
        r"has died \(.*\)\.) See whether the machine ran out of memory",
        line,
    )


def test_a_shard_that_is_deleted_ends_the_run_in_one_line(saving_yaml, capsys, tmp_path):
    path = saving_yaml({}, max_duration="500ep")
    when_saved(path, (tmp_path / "shards" / "shard.00000.mds").unlink)
    assert train.main([str(path)]) == 1
    assert "shard.00000.mds" in failure(capsys)


def test_a_longer_max_seq_len_resumes_as_if_it_had_been_there_from_the_start(
    saving_yaml, tiny_config, capsys
):
    path = saving_yaml({29: {"prompt": LONG}})
    assert train.main([str(path)]) == 1
    config = train.TrainConfig.read(path, ["max_seq_len=200"])
    assert newest(config).document["timestamp"]["batch"] in (2, 3), "the batch before it"
    _, resumed, watch = run(config)
    assert [name for ids in watch.ids for name in ids][-8:] == [f"s{n}" for n in range(32, 40)]
    whole = train.TrainConfig.read(path, ["max_seq_len=200", f"run_folder={path.parent}/whole"])
    _, expected, _ = run(whole)
    assert all(map(torch.equal, resumed.connector.parameters(), expected.connector.parameters()))


@pytest.mark.slow
def test_it_ends_every_rank_of_a_launch(saving_yaml):
    path = saving_yaml({29: {"prompt": LONG}}, max_seq_len=64)
    done = launch(path, ranks=2)
    assert done.returncode != 0
    said = done.stderr + done.stdout
    assert "sample s29: the prompt is 111 tokens with its image and max_seq_len is 64" in said
    assert "Traceback" not in said
    again = launch(path, "max_seq_len=200", ranks=2)
    assert again.returncode == 0, again.stderr
    assert "Resuming with another setting: max_seq_len: 64 became 200" in again.stderr
