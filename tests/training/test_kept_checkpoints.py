"""Nothing whole is deleted, and nothing but a whole checkpoint decides what is."""

import os
import shutil
import uuid

import pytest
from safetensors.torch import save_file
from torch import ones

from checkpoints import HOLD, folder_of, newest
from runs import run, when_logged
from vlm_composer.outages import StoreError
from vlm_composer.storage import open_store
from vlm_composer.training.checkpoint_folder import (
    ABANDONED_SECONDS,
    CheckpointFolder,
    checkpoint_name,
    checkpoints_among,
)


@pytest.fixture(scope="module")
def whole_bytes():
    """A real checkpoint, once `whole` has made it."""
    return []


@pytest.fixture
def whole(whole_bytes, tiny_config, tmp_path):
    """The path of a real checkpoint."""
    if not whole_bytes:
        config = tiny_config(**HOLD, run_folder=str(tmp_path / "first"))
        run(config)
        whole_bytes.append(newest(config).path.read_bytes())
    path = tmp_path / "whole.safetensors"
    path.write_bytes(whole_bytes[0])
    return path


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def place(request, tmp_path):
    """The URL of an empty folder or bucket."""
    if request.param == "folder":
        return str(tmp_path / "saved")
    return request.getfixturevalue("s3_server").make_bucket(f"kept-{uuid.uuid4().hex}")


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-len(data) // 3] ^= 1
    path.write_bytes(data)


def of_a_stranger(path):
    save_file({"a": ones(1)}, path)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("ep"))


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, of_a_stranger])
def test_a_damaged_higher_checkpoint_costs_no_other(tiny_config, damage):
    run(tiny_config(**HOLD))
    damage(folder_of(tiny_config(**HOLD)) / "ep0-ba4.safetensors")
    below = tiny_config(
        **HOLD | {"save_interval": "1ba"},
        autoresume=True,
        max_duration="3ba",
        save_num_checkpoints_to_keep=1,
    )
    trainer, _, _ = run(below)
    assert trainer.state.timestamp.batch == 3
    assert names_in(folder_of(below)) == ["ep0-ba3.safetensors", "ep0-ba4.safetensors"]
    assert newest(below).path.name == "ep0-ba3.safetensors"


def saved(place, whole, tmp_path, batches, **options):
    """A folder of checkpoints to which a process has added those of `batches`."""
    folder = CheckpointFolder(place, tmp_path / "scratch", **options)
    for batch in batches:
        add(folder, whole, batch)
    return folder


def add(folder, whole, batch):
    """Add a checkpoint; returns the batches of what is there then, the newest first."""
    name = checkpoint_name(0, batch)
    path = folder.scratch_path(name)
    shutil.copy(whole, path)
    folder.add(path, name)
    return batches_of(folder)


def batches_of(folder):
    return [int(name.partition("-ba")[2].partition(".")[0]) for name in folder.names()]


def test_what_is_not_known_to_be_whole_is_not_counted(place, whole, tmp_path):
    earlier = saved(place, whole, tmp_path, [1, 2, 3, 4])
    folder = CheckpointFolder(place, tmp_path / "scratch", keep=2)
    assert add(folder, whole, 5) == [5, 4, 3, 2, 1], "none of the others was read"
    assert add(folder, whole, 6) == [6, 5]
    assert add(folder, whole, 7) == [7, 6]
    assert batches_of(earlier) == [7, 6]


def test_what_was_resumed_from_is_counted(place, whole, tmp_path):
    saved(place, whole, tmp_path, [1, 2, 3])
    cut = tmp_path / "cut"
    cut.write_bytes(whole.read_bytes()[:1000])
    open_store(place).put(cut, checkpoint_name(0, 9))
    folder = CheckpointFolder(place, tmp_path / "scratch", keep=2)
    found = folder.newest()
    assert found.path.read_bytes() == whole.read_bytes()
    folder.done_with(found)
    assert add(folder, whole, 4) == [9, 4, 3]
    assert add(folder, whole, 5) == [9, 5, 4]


def test_one_alone_is_the_one_just_saved(place, whole, tmp_path):
    saved(place, whole, tmp_path, [1, 2, 8])
    folder = CheckpointFolder(place, tmp_path / "scratch", keep=1)
    assert add(folder, whole, 3) == [8, 3]


def test_names_are_ascii_digits():
    foreign = [
        "ep0-ba٤.safetensors",
        "ep०-ba1.safetensors",
        "ep0-ba04.safetensors",
        "ep00-ba4.safetensors",
        f"ep0-ba{'9' * 400}.safetensors",
        "ep0-ba-4.safetensors",
        "ep0-ba4.safetensors\n",
        "below/ep0-ba4.safetensors",
        "ep0-ba4xsafetensors",
    ]
    ours = ["ep1-ba10.safetensors", "ep0-ba10.safetensors", "ep0-ba9.safetensors"]
    assert checkpoints_among(foreign + ours[::-1]) == ours


def unreadable(path):
    path.symlink_to("/proc/self/mem")  # a file that cannot be mapped, to root neither


def to_itself(path):
    path.symlink_to(path.name)


def to_nothing(path):
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [unreadable, to_itself, to_nothing, os.mkfifo, os.mkdir])
def test_what_cannot_be_read_is_passed_over(whole, tmp_path, make):
    folder = saved(str(tmp_path / "saved"), whole, tmp_path, [1])
    make(tmp_path / "saved" / checkpoint_name(0, 2))
    found = folder.newest()
    assert found is not None
    assert found.path.name == checkpoint_name(0, 1)


def test_a_run_does_not_start_over_what_it_cannot_read(tmp_path, caplog):
    (tmp_path / "saved").mkdir()
    unreadable(tmp_path / "saved" / checkpoint_name(0, 2))
    with pytest.raises(OSError, match=rf"could not read {tmp_path}/saved/ep0-ba2.safetensors \("):
        CheckpointFolder(str(tmp_path / "saved"), tmp_path).newest()
    assert "Passing over the checkpoint ep0-ba2.safetensors: could not read" in caplog.text


FOLDER = "vlm_composer.training.checkpoint_folder"


@pytest.mark.s3
def test_one_that_is_gone_is_passed_over_and_an_outage_is_not(s3_server, whole, tmp_path):
    place = s3_server.make_bucket(f"gone-{uuid.uuid4().hex}")
    folder = saved(place, whole, tmp_path, [1, 2])

    def delete():
        open_store(place).delete(checkpoint_name(0, 2))

    with when_logged(FOLDER, "Downloading ep0-ba2", delete) as deleted:
        found = folder.newest()
    assert deleted
    assert found.url == f"{place}/ep0-ba1.safetensors"
    folder.done_with(found)
    add(folder, whole, 2)
    try:
        with (
            when_logged(FOLDER, "Downloading ep0-ba2", s3_server.kill) as killed,
            pytest.raises(StoreError, match=r"could not download s3://\S+/ep0-ba2.safetensors: "),
        ):
            folder.newest()
    finally:
        s3_server.start()
    assert killed


@pytest.mark.s3
def test_a_full_disk_is_no_damage(s3_server, whole, tmp_path, tiny_disk):
    place = s3_server.make_bucket(f"full-{uuid.uuid4().hex}")
    saved(place, whole, tmp_path, [1, 2])
    (tiny_disk / "of another").write_bytes(bytes(shutil.disk_usage(tiny_disk).free - 10_000))
    with pytest.raises(StoreError, match=r"ep0-ba2.safetensors: the local disk is full"):
        CheckpointFolder(place, tiny_disk).newest()


def test_a_pointer_that_cannot_be_written_ends_no_run(tiny_config, capsys):
    config = tiny_config(**HOLD)
    (folder_of(config) / "latest").mkdir(parents=True)
    trainer, _, _ = run(config)
    assert trainer.state.timestamp.batch == 4
    assert names_in(folder_of(config)) == ["ep0-ba2.safetensors", "ep0-ba4.safetensors"]
    assert f"WARNING Could not write {folder_of(config)}/latest (" in capsys.readouterr().err
    assert list(folder_of(config).glob(".*")) == []


@pytest.mark.s3
def test_unfinished_uploads_of_killed_runs_are_aborted(s3_server, tiny_config, capsys):
    bucket = s3_server.make_bucket(f"uploads-{uuid.uuid4().hex}")
    name, client = bucket.partition("://")[2], s3_server.client()

    def begin(key):
        upload = client.create_multipart_upload(Bucket=name, Key=key)["UploadId"]
        client.upload_part(
            Bucket=name, Key=key, UploadId=upload, PartNumber=1, Body=bytes(5_300_000)
        )

    def pending():
        found = client.list_multipart_uploads(Bucket=name).get("Uploads", [])
        return sorted(upload["Key"] for upload in found)

    others = ["run-2/ep0-ba2.safetensors", "run/below/ep0-ba2.safetensors", "run/data.zip"]
    for key in ("run/ep0-ba2.safetensors", *others):
        begin(key)
    s3_server.make_uploads_older(ABANDONED_SECONDS + 60)
    begin("run/ep0-ba4.safetensors")  # as a living process might
    run(tiny_config(save_folder=f"{bucket}/run", max_duration="1ba"))
    assert pending() == sorted([*others, "run/ep0-ba4.safetensors"])
    assert (
        f"Aborted 1 unfinished uploads of killed runs to {bucket}/run." in capsys.readouterr().err
    )
