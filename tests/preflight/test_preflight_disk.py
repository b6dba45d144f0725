"""Free space is compared with what a run writes: caches, checkpoints, batches in shared memory."""

import subprocess

import pytest

from mixtures import SHARES, mixed
from vlm_composer.preflight import disk
from vlm_composer.preflight.disk import check_disk, check_shared_memory
from vlm_composer.preflight.shards import read_shards

CHECKPOINT = 475_008
"""Bytes of weights and moments of the tiny connector."""


def cached(shards, folder, **changes):
    dataset = {"remote": str(shards / "train"), "local": str(folder)} | changes
    return {"dataset": dataset, "num_workers": 0}


def look(config):
    sources = config.train_loader.sources
    sides = {"train": {key: read_shards(source, 0) for key, source in sources.items()}}
    return check_disk(config, sides, checkpoints=True)


def test_a_disk_without_room_for_the_cache(tiny_config, shards, tiny_disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,size=4k", tiny_disk], check=True)
    (found,) = look(tiny_config(train_loader=cached(shards, tiny_disk / "a" / "b")))
    assert found.level == "failure"
    assert f"4.1 kB free at {tiny_disk}; the cache of train in {tiny_disk}/a/b: " in found.text
    assert "free some space" in found.advice
    (found,) = look(tiny_config(train_loader=cached(shards, tmp_path / "cache")))
    assert found.level == "ok"


def test_what_is_cached_needs_no_room_again(tiny_config, shards, tiny_disk):
    for path in (shards / "train").glob("*.mds"):
        (tiny_disk / path.name).write_bytes(path.read_bytes())
    (tiny_disk / "filler").write_bytes(bytes(disk.shutil.disk_usage(tiny_disk).free))
    (found,) = look(tiny_config(train_loader=cached(shards, tiny_disk)))
    assert found.level == "ok"
    assert f"the cache of train in {tiny_disk}: 0 bytes" in found.text
    next(tiny_disk.glob("*.mds")).write_bytes(b"torn")
    (found,) = look(tiny_config(train_loader=cached(shards, tiny_disk, cache_limit="1gb")))
    assert found.level == "failure"


def test_the_caches_of_streams_are_added_up(tiny_config, two_sets, tiny_disk, tmp_path):
    train = mixed(two_sets, SHARES, caches=tiny_disk)
    (found,) = look(tiny_config(train_loader=train))
    size = sum(path.stat().st_size for path in two_sets.glob("*/train/*.mds"))
    caches = f"{tiny_disk}/emoji, {tiny_disk}/llava"
    assert f"the cache of train in {caches}: {size / 1000:.1f} kB" in found.text
    (found,) = look(
        tiny_config(train_loader=mixed(two_sets, SHARES, caches=tiny_disk, cache_limit="9kb"))
    )
    assert f"the cache of train in {caches}: 9.2 kB" in found.text, "together"
    assert size > 9 << 10
    # One on another disk is compared with that.
    train["streams"]["llava"]["local"] = str(tmp_path / "llava")
    assert len(look(tiny_config(train_loader=train))) == 2


@pytest.mark.parametrize("limit", [100, "1kb"])
def test_a_cache_limit_that_streaming_would_refuse(tiny_config, shards, tmp_path, limit):
    found = look(tiny_config(train_loader=cached(shards, tmp_path, cache_limit=limit)))
    assert found[0].level == "failure"
    assert "bytes are less than four of the largest shard (" in found[0].text


@pytest.mark.parametrize(
    ("size", "changes", "level", "number"),
    [
        ("400k", {}, "failure", "4 checkpoints"),
        ("1m", {}, "warning", "4 checkpoints"),
        ("1m", {"save_num_checkpoints_to_keep": 1}, "ok", "2 checkpoints"),
        ("1m", {"save_interval": "2ba"}, "ok", "2 checkpoints"),
        ("1m", {"save_interval": "1ep", "max_duration": "1ep"}, "ok", "1 checkpoint "),
        ("2m", {"save_interval": "0.25dur"}, "ok", "4 checkpoints"),
        ("2m", {"save_interval": "8sp"}, "ok", "4 checkpoints"),
    ],
)
def test_room_for_the_checkpoints_that_are_kept(
    tiny_config, tiny_disk, size, changes, level, number
):
    subprocess.run(["mount", "-o", f"remount,size={size}", tiny_disk], check=True)
    config = tiny_config(**{"save_folder": str(tiny_disk), "save_interval": "1ba"} | changes)
    (found,) = look(config)
    assert found.level == level, found
    assert number in found.text
    assert f"of 475.0 kB in {tiny_disk}" in found.text


def test_checkpoints_of_an_epoch_that_streams_make(tiny_config, two_sets, tmp_path):
    train = mixed(two_sets, SHARES, epoch_size=16)
    settings = {"save_interval": "1ba", "max_duration": "1ep", "save_folder": str(tmp_path)}
    (found,) = look(tiny_config(train_loader=train, **settings))
    assert "2 checkpoints of 475.0 kB" in found.text


def test_checkpoints_that_are_there_take_no_room_again(tiny_config, tiny_disk):
    subprocess.run(["mount", "-o", "remount,size=2m", tiny_disk], check=True)
    for batch in (1, 2):
        (tiny_disk / f"ep0-ba{batch}.safetensors").write_bytes(bytes(CHECKPOINT))
    changes = {"save_folder": str(tiny_disk), "save_interval": "1ba", "autoresume": True}
    (found,) = look(tiny_config(**changes))
    assert found.level == "ok"
    (tiny_disk / "of another").write_bytes(bytes(500_000))
    (found,) = look(tiny_config(**changes))
    assert found.level == "warning"


def test_shared_memory_for_the_batches_of_workers(tiny_config, tiny_disk, shards, monkeypatch):
    loader = {"dataset": {"local": str(shards / "train")}, "num_workers": 2}
    (found,) = check_shared_memory(tiny_config(train_loader=loader), {})
    assert found.level == "ok"
    monkeypatch.setattr(disk, "SHARED_MEMORY", tiny_disk)  # 65.5 kB; a batch is 24.6 kB
    (found,) = check_shared_memory(tiny_config(train_loader=loader), {})
    assert found.level == "warning"
    assert "workers hold 147.5 kB (6 batches of 24.6 kB)" in found.text
    assert "--shm-size" in found.advice
    (found,) = check_shared_memory(tiny_config(train_loader=loader, global_train_batch_size=32), {})
    assert found.level == "failure"
    assert not check_shared_memory(tiny_config(), {}), "without workers none is used"
