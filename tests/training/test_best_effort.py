"""What only describes a run does not end it: every file, W&B and the data's summary.json."""

import json
import subprocess
import uuid

import pytest
from composer.utils import dist

from convert import convert_llava
from runs import run, start
from tiny import write_pairs
from vlm_composer.local_files import RunLines
from vlm_composer.storage import open_store

DESCRIBES = {
    "loggers": {"jsonl": {}},
    "callbacks": {
        "captions": {"num_images": 2, "max_new_tokens": 2},
        # Says `data_wait` after the first step, so that warnings.jsonl has to be written.
        "step_times": {"warmup_batches": 0, "interval": "1ba"},
        "warnings": {"max_data_wait": 0.0, "cooldown": 1},
    },
}
FILES = ["run.json", "metrics.jsonl", "warnings.jsonl", "captions"]


def warnings_in(text):
    """What was said not to work, without the reasons."""
    lines = [line.partition("WARNING Could not ")[2] for line in text.splitlines()]
    return [line.partition(" (")[0] for line in lines if line]


def block(folder, name):
    """Put a folder where a file should be, and a file where a folder should be."""
    folder.mkdir(parents=True, exist_ok=True)
    if name == "captions":
        (folder / name).touch()
    else:
        (folder / name).mkdir()


def test_files_that_cannot_be_written(tiny_config, tmp_path, capsys):
    for name in FILES:
        block(tmp_path / "run", name)
    saving = {"save_folder": str(tmp_path / "saved"), "save_interval": "2ba", "autoresume": True}
    config = tiny_config(**DESCRIBES, **saving)
    trainer, _, _ = run(config)
    assert trainer.state.timestamp.batch == 4
    said = warnings_in(capsys.readouterr().err)
    for name in ("metrics.jsonl", "warnings.jsonl"):
        assert said.count(f"write {tmp_path}/run/{name}") == 1, "once, however often it fails"
    assert f"write {tmp_path}/run/run.json" in said
    assert f"write pictures to {tmp_path}/run/captions" in said
    assert f"write captions to {tmp_path}/run/captions" in said
    # What the checkpoint says of these files is taken up as well as can be.
    trainer, _, _ = run(tiny_config(**DESCRIBES, **saving, max_duration="6ba"))
    assert trainer.state.timestamp.batch == 6
    assert f"read {tmp_path}/run/run.json" in warnings_in(capsys.readouterr().err)


@pytest.mark.world_size(2)
def test_two_ranks_continue_together(tiny_config, shared_path):
    if dist.get_global_rank() == 0:
        for name in FILES:
            block(shared_path / "run", name)
    dist.barrier()
    trainer, _, _ = run(tiny_config(**DESCRIBES, device_train_microbatch_size=2))
    assert trainer.state.timestamp.batch == 4


def test_a_full_disk_leaves_whole_lines(tiny_disk):
    lines = RunLines(tiny_disk / "metrics.jsonl")
    lines.add({"batch": 0})
    subprocess.run(["dd", "if=/dev/zero", f"of={tiny_disk}/other", "bs=1k"], capture_output=True)
    for batch in range(1, 2000):
        lines.add({"batch": batch, "text": "x" * 50})
    written = [json.loads(line)["batch"] for line in lines.path.open()]
    assert written == list(range(len(written)))
    assert len(written) < 2000
    (tiny_disk / "other").unlink()
    lines.add({"batch": 2000})
    assert json.loads(lines.path.read_text().splitlines()[-1]) == {"batch": 2000}


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"started": "x", "resumed_at": [], "legs": [{"batch": 0}]}',
        '{"started": "x", "resumed_at": [], "legs": [{"batch": 0, "start": "", "last_batch": 1, '
        f'"seconds": 1{"0" * 400}}}]}}',
        "[" * 100_000,
    ],
    ids=["list", "leg", "long", "deep"],
)
def test_an_earlier_run_json_that_is_damaged(tiny_config, tmp_path, text, capsys):
    saving = {"save_folder": "{run_folder}/checkpoints", "save_interval": "2ba"}
    run(tiny_config(max_duration="2ba", **saving))
    (tmp_path / "run" / "run.json").write_text(text)
    run(tiny_config(load_path="{run_folder}/checkpoints"))
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["resumed_at"], len(facts["legs"])) == ([2], 1)
    assert warnings_in(capsys.readouterr().err) == [f"read {tmp_path}/run/run.json"]


def test_names_of_pictures_that_no_disk_takes(tiny_config, tmp_path):
    json_path, images = write_pairs(tmp_path / "pairs", 8, prefix="画" * 120)
    convert_llava(json_path, images, tmp_path / "mds", eval_ratio=0.25, show_progress=False)
    config = tiny_config(**DESCRIBES, max_duration="1ba")
    config.eval_loader.dataset.local = str(tmp_path / "mds" / "eval")
    run(config)
    lines = (tmp_path / "run" / "captions" / "ba1.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        assert (tmp_path / "run" / "captions" / json.loads(line)["image"]).is_file()


@pytest.fixture
def data_in_bucket(s3_server, tiny_config, shards, tmp_path):
    """Configures a run whose shards lie in a bucket; `summary` is put beside them."""

    def configure(summary=None):
        bucket = s3_server.make_bucket(f"data-{uuid.uuid4().hex}")
        store = open_store(f"{bucket}/data/train")
        for path in (shards / "train").iterdir():
            store.put(path, path.name)
        if summary is not None:
            (tmp_path / "summary").write_bytes(summary)
            open_store(f"{bucket}/data").put(tmp_path / "summary", "summary.json")
        config = tiny_config(max_duration="1ba", eval_loader=None)
        dataset = config.train_loader.dataset
        dataset.remote, dataset.local = f"{bucket}/data/train", str(tmp_path / "cache")
        return config

    return configure


@pytest.mark.s3
@pytest.mark.parametrize(
    ("summary", "expected", "warned"),
    [
        (None, None, False),
        (b'{"train": 40}', {"train": 40}, False),
        (b'{"train"', None, True),
        (b"\xff\xfe", None, True),
        (b"1" * 10_000_001, None, True),
    ],
    ids=["none", "whole", "cut", "binary", "large"],
)
def test_a_summary_in_a_bucket(data_in_bucket, tmp_path, summary, expected, warned, capsys):
    run(data_in_bucket(summary))
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["data"]["summary"] == expected
    said = warnings_in(capsys.readouterr().err)
    assert [line.startswith("read summary.json of the data in s3://") for line in said] == (
        [True] * warned
    )


@pytest.mark.s3
@pytest.mark.parametrize("refused", [False, True], ids=["outage", "403"])
def test_a_store_that_fails_when_the_summary_is_read(
    s3_server, data_in_bucket, tmp_path, monkeypatch, capsys, refused
):
    trainer, _, watch = start(data_in_bucket(b'{"train": 40}'))
    dataset = trainer.state.train_dataloader.dataset
    for shard in range(len(dataset.shards)):  # what is trained on is in the cache
        dataset.prepare_shard(shard)
    if refused:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    else:
        s3_server.kill()
    try:
        trainer.fit()
    finally:
        s3_server.start()
    trainer.close()
    assert watch.losses
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["data"]["summary"] is None
    said = warnings_in(capsys.readouterr().err)
    assert len(said) == 2, "above the shards, and one folder higher"
    assert all(line.startswith("read summary.json of the data in s3://") for line in said)


def test_a_run_that_wandb_refuses(tiny_config, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    trainer, _, _ = run(tiny_config(loggers={"wandb": {"project": "a/b"}}))
    assert trainer.state.timestamp.batch == 4
    assert warnings_in(capsys.readouterr().err) == ["log to W&B"]
