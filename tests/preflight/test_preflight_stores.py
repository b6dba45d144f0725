"""Where checkpoints go is written to, read and deleted from, and left as it was."""

import subprocess
import uuid

import pytest

from store_server import BUCKETS, SERVERS
from vlm_composer.outages import StoreError
from vlm_composer.preflight.stores import check_load_path, check_save_folder, check_writable
from vlm_composer.storage import open_store


def new_bucket(request):
    server = request.getfixturevalue(SERVERS[request.param])
    return server.make_bucket(f"preflight-{uuid.uuid4().hex}")


@pytest.fixture(params=["folder", *BUCKETS])
def place(request, tmp_path):
    """The URL of an empty folder or bucket."""
    return str(tmp_path / "store") if request.param == "folder" else new_bucket(request)


@pytest.fixture(params=BUCKETS)
def bucket(request):
    return new_bucket(request)


def test_looking_leaves_nothing_behind(place, tiny_config, tmp_path):
    (found,) = check_save_folder(tiny_config(save_folder=f"{place}/a/b"), 0)
    assert found.level == "ok"
    assert str(found) == f"{place}/a/b: written, read, deleted; no checkpoint yet"
    assert open_store(place).names() == []
    assert not (tmp_path / "store").exists()


def test_a_folder_that_was_there_stays(tmp_path):
    check_writable(open_store(tmp_path), 0)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tiny_disk, tmp_path):
    (tmp_path / "file").touch()
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    for url in (tmp_path / "file" / "below", tiny_disk / "below"):
        with pytest.raises(StoreError, match=f"could not write to {url}: check the path and its"):
            check_writable(open_store(url), 0)


def test_a_bucket_that_is_not_there(bucket):
    scheme = bucket.partition("://")[0]
    with pytest.raises(StoreError, match=f"could not write to {scheme}://no-such-bucket: there is"):
        check_writable(open_store(f"{scheme}://no-such-bucket"), 0)


@pytest.mark.s3
def test_a_key_that_is_refused(s3_server, tiny_config, monkeypatch):
    bucket = s3_server.make_bucket("preflight-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    (found,) = check_save_folder(tiny_config(save_folder=bucket), 0)
    assert found.level == "failure"
    assert "it was refused; check the credentials and their permissions" in found.text


def put_checkpoint(place, tmp_path):
    (tmp_path / "checkpoint").write_bytes(b"1")
    for batch in (2, 10):
        open_store(place).put(tmp_path / "checkpoint", f"ep0-ba{batch}.safetensors")


@pytest.mark.parametrize(
    ("changes", "level", "text"),
    [
        ({}, "failure", "already holds 2 checkpoints, the newest is ep0-ba10.safetensors; set"),
        ({"autoresume": True}, "ok", "goes on from ep0-ba10.safetensors"),
        ({"save_overwrite": True}, "warning", "save_overwrite deletes them all"),
    ],
)
def test_checkpoints_of_another_run(place, tiny_config, tmp_path, changes, level, text):
    put_checkpoint(place, tmp_path)
    (found,) = check_save_folder(tiny_config(save_folder=place, **changes), 0)
    assert found.level == level
    assert text in found.text
    assert len(open_store(place).names()) == 2


def test_a_run_that_keeps_nothing_is_told_so(tiny_config):
    (found,) = check_save_folder(tiny_config(), 0)
    assert found.level == "warning"
    assert "no checkpoint is written; set save_folder" in str(found)


def test_a_checkpoint_to_start_from(place, tiny_config, tmp_path):
    put_checkpoint(place, tmp_path)
    for path in (place, f"{place}/ep0-ba10.safetensors"):
        (found,) = check_load_path(tiny_config(load_path=path), 0)
        assert found.level == "ok", found
        assert found.text == f"starts from ep0-ba10.safetensors of {place}"
    for path in (f"{place}/ep0-ba3.safetensors", f"{place}/below"):
        (found,) = check_load_path(tiny_config(load_path=path), 0)
        assert found.level == "failure"
        assert path in found.text
        assert "check the path" in found.text
