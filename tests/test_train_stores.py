"""A store that cannot be used is told in one line, before a tower is loaded."""

import time

import pytest

from vlm_composer import train


@pytest.fixture
def attempt(tiny_yaml, capsys):
    """Runs `train.py` with overrides that cannot work; returns what it says."""

    def run(*overrides, **changes):
        started = time.monotonic()
        assert train.main([str(tiny_yaml(**changes)), *overrides]) == 1
        assert time.monotonic() - started < 30
        error = capsys.readouterr().err
        assert "resampler  trained" not in error, "the towers were loaded"
        return error[error.index("error on rank") :]

    return run


@pytest.mark.s3
class TestS3:
    def test_a_bucket_for_checkpoints_that_is_not_there(self, s3_server, attempt):
        said = attempt("save_folder=s3://train-nowhere/run")
        assert "could not write to s3://train-nowhere/run" in said
        assert "no such bucket or object" in said

    def test_a_bucket_for_checkpoints_with_a_wrong_key(self, s3_server, attempt, monkeypatch):
        bucket = s3_server.make_bucket("train-key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        said = attempt(f"save_folder={bucket}/run")
        assert "it was refused; check the credentials and their permissions" in said

    def test_shards_that_are_not_there(self, s3_server, attempt, shards, tmp_path):
        bucket = s3_server.make_bucket("train-shards")
        cache = {"remote": f"{bucket}/mds/train", "local": str(tmp_path / "cache")}
        said = attempt(train_loader={"dataset": cache, "num_workers": 0})
        assert f"could not download {bucket}/mds/train/index.json" in said
        assert "no such bucket or object" in said

    def test_a_server_that_does_not_answer(self, s3_server, attempt, monkeypatch):
        monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
        said = attempt("save_folder=s3://bucket/run")
        assert "could not write to s3://bucket/run: check the bucket's name, the endpoint" in said


def test_a_place_that_is_no_store(attempt):
    assert "starts with one of s3://, gs://, azure://" in attempt("save_folder=ftp://host/run")
    said = attempt("save_folder=/proc/nothing/run")
    assert "error on rank 0:" in said
    assert "/proc/nothing" in said


def test_a_cache_that_the_disk_has_no_room_for(attempt, shards, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    cache = {"remote": str(shards / "train"), "local": str(tmp_path / "cache")}
    said = attempt(train_loader={"dataset": cache, "num_workers": 0})
    assert "disk: 10 bytes free at" in said
    assert f"the cache of train in {tmp_path / 'cache'}: " in said


@pytest.mark.world_size(2)
def test_every_rank_hears_what_one_of_them_found(attempt, shared_path):
    missing = {"remote": str(shared_path / "nowhere"), "local": str(shared_path / "cache")}
    said = attempt(
        train_loader={"dataset": missing, "num_workers": 0}, device_train_microbatch_size=2
    )
    assert f"could not download {shared_path}/nowhere/index.json" in said
