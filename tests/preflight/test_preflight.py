"""`--preflight` as users type it, and what a run does at its start."""

import fcntl
import os

import pytest

from mixtures import SHARES, mixed
from test_train import launch
from vlm_composer import train
from vlm_composer.data.leftovers import _lock_path
from vlm_composer.preflight.checks import _merged, check_run
from vlm_composer.preflight.finding import Finding
from vlm_composer.preflight.report import PreflightError


@pytest.fixture
def cached(shards, shared_path):
    """A section that reads the training shards through a cache."""
    dataset = {"remote": str(shards / "train"), "local": str(shared_path / "cache")}
    return {"dataset": dataset, "num_workers": 0}


@pytest.mark.slow
def test_two_ranks_through_the_launcher(tiny_yaml, tmp_path):
    path = tiny_yaml(device_train_microbatch_size=2, save_folder="{run_folder}/checkpoints")
    before = sorted(tmp_path.rglob("*"))
    done = launch(
        *(path, "load_path=/nothing", "eval_loader.dataset.local=/nowhere", "--preflight"),
        *("vision_tower.layer=9", "seed=3"),
        ranks=2,
    )
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert "✓ ranks           2 ranks on 1 node" in lines
    assert "✓ batch           8 a step = 2 ranks × 2 passes × 2" in lines
    for text in ("nothing at /nothing", "/nowhere holds no MDS shards", "hidden states -4 to 3"):
        assert text in done.stdout
    assert "Preflight: 10 checks, 3 failures" in lines
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"


@pytest.mark.slow
def test_a_wrong_world_ends_at_once(tiny_yaml):
    wrong = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0"}
    done = launch(tiny_yaml(), "--preflight", python=True, **wrong, NODE_RANK="0")
    assert done.returncode == 1
    assert "4 ranks (WORLD_SIZE) are not a number of whole nodes of 3" in done.stdout
    assert "✓ shards" in done.stdout, "the rest is checked all the same"


def test_nothing_is_wrong_and_nothing_left_behind(tiny_yaml, cached, tmp_path, capsys):
    path = tiny_yaml(train_loader=cached, save_folder="{run_folder}/checkpoints")
    before = sorted(tmp_path.rglob("*"))
    assert train.main(["--preflight", str(path), "seed=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("✓", "Preflight: ")) for line in lines), lines
    assert lines[-1] == "Preflight: 12 checks"
    assert sorted(tmp_path.rglob("*")) == before


def test_mistakes_of_the_yaml_are_the_report(tiny_yaml, capsys):
    assert train.main([str(tiny_yaml()), "--preflight", "max_durations=3ep", "seed=x"]) == 1
    said = capsys.readouterr().out
    assert "✗ yaml" in said
    assert "max_durations: unknown key; did you mean 'max_duration'?" in said
    assert "seed: expected a whole number" in said
    assert said.endswith("Preflight: 1 check, 1 failure\n")


def test_a_gpu_that_is_not_there(tiny_yaml, capsys):
    assert train.main([str(tiny_yaml()), "device=gpu", "--preflight"]) == 1
    said = capsys.readouterr().out
    assert "✗ device          device: gpu, but torch sees no CUDA device" in said
    assert "✓ shards" in said


def test_a_run_says_what_it_found_in_a_line(tiny_yaml, capsys):
    assert train.main([str(tiny_yaml(device_train_microbatch_size=3))]) == 0
    said = capsys.readouterr().err
    assert "INFO Preflight: 8 checks, 2 warnings." in said
    assert "WARNING Preflight, batch: device_train_microbatch_size: 3 does not divide" in said


def test_a_run_ends_with_everything_that_keeps_it_from_starting(tiny_yaml, capsys):
    overrides = ["save_folder=/proc/nothing", "vision_tower.layer=9"]
    assert train.main([str(tiny_yaml()), *overrides]) == 1
    said = capsys.readouterr().err
    assert "error on rank 0: 2 things to mend before the run:\n  - vision tower: layer 9" in said
    assert "\n  - save folder: could not write to /proc/nothing" in said


def test_a_cache_in_use_is_told_and_only_a_run_takes_one(tiny_config, cached):
    config = tiny_config(train_loader=cached)
    lock_path = _lock_path(os.path.abspath(cached["dataset"]["local"]))
    report = check_run(config, "cpu", starting=False)
    assert [f.level for f in report["leftovers"]] == ["ok"]
    assert not lock_path.exists()
    with lock_path.open("w+") as lock:
        lock.write("process 4711 on node1")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        report = check_run(config, "cpu", starting=False)
    (found,) = report["leftovers"]
    assert found.level == "failure"
    assert "is in use by process 4711 on node1; end that run or give this one a cache" in found.text
    lock_path.unlink()


def test_the_cache_of_every_stream_is_taken(tiny_config, two_sets, tmp_path):
    config = tiny_config(train_loader=mixed(two_sets, SHARES, caches=tmp_path))
    folders = [str(tmp_path / name) for name in ("emoji", "llava")]
    (found,) = check_run(config, "cpu", starting=False)["leftovers"]
    assert found.text == f"no other run uses {', '.join(folders)}"
    lock_path = _lock_path(folders[1])
    with lock_path.open("w+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (found,) = check_run(config, "cpu", starting=False)["leftovers"]
    assert found.level == "failure"
    assert f"{folders[1]} is in use by" in found.text
    lock_path.unlink()


def test_what_one_node_finds_names_it():
    ok, full = Finding("ok", "10 GB free"), Finding("failure", "1 GB free", "free some")
    merged = _merged([{"save": [ok], "disk": [ok]}, {"disk": [ok]}, {"disk": [full]}])
    assert merged["save"] == [ok]
    assert merged["disk"] == [
        Finding("ok", "node 0, 1: 10 GB free"),
        Finding("failure", "node 2: 1 GB free", "free some"),
    ]


@pytest.mark.world_size(2)
def test_every_rank_hears_the_same(tiny_config, cached, shared_path):
    config = tiny_config(
        train_loader=cached, save_folder="/proc/nothing", device_train_microbatch_size=2
    )
    report = check_run(config, "cpu", starting=True)
    assert [f.level for f in report["save folder"]] == ["failure"]
    with pytest.raises(PreflightError, match="save folder: could not write to /proc/nothing"):
        train.prepare(config)
