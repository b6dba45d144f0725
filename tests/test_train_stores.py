"""A store that cannot be used is told in one line, before a tower is loaded."""

import time
import uuid

import pytest

from convert import convert_llava
from runs import when_logged
from tiny import write_pairs
from vlm_composer import train
from vlm_composer.storage import open_store


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
        said = attempt("save_folder=s3://bucket/run", "store_timeout=0")
        assert "could not write to s3://bucket/run: check the bucket's name, the endpoint" in said


@pytest.mark.s3
class TestAzure:
    def test_what_it_refuses(self, azure_server, attempt, monkeypatch):
        said = attempt("save_folder=azure://train-nowhere/run")
        assert "could not write to azure://train-nowhere/run: there is no such bucket" in said
        url = azure_server.make_bucket("train-azure")
        with monkeypatch.context() as patch:
            patch.setenv("AZURE_ACCOUNT_ACCESS_KEY", "d3Jvbmc=")
            said = attempt(f"save_folder={url}/run")
        assert "it was refused; check the credentials and their permissions" in said
        monkeypatch.setenv("AZURE_STORAGE_SERVICE_ENDPOINT", "http://127.0.0.1:9/account")
        said = attempt(f"save_folder={url}/run", "store_timeout=0")
        assert f"could not write to {url}/run: check the bucket's name, the endpoint" in said

    def test_shards_and_checkpoints(self, azure_server, tiny_yaml, tmp_path, capsys):
        """A data set is converted into it, trained on from there, and its run resumed there."""
        url = azure_server.make_bucket(f"train-{uuid.uuid4().hex}")
        convert_llava(*write_pairs(tmp_path, 40), f"{url}/data", show_progress=False)
        loader = {"num_workers": 0, "dataset": {"remote": f"{url}/data/train"}}
        loader["dataset"]["local"] = str(tmp_path / "cache")
        path = tiny_yaml(max_duration="2ba", eval_loader=None, train_loader=loader)
        command = [str(path), f"save_folder={url}/run", "save_interval=2ba"]
        assert train.main([*command, "--preflight"]) == 0
        said = capsys.readouterr().out
        assert f"{url}/run: written, read, deleted; no checkpoint yet" in said
        assert train.main(command) == 0
        assert train.main([*command, "autoresume=true", "max_duration=4ba"]) == 0
        assert "Resuming after batch 2" in capsys.readouterr().err
        names = {f"ep0-ba{batch}.safetensors" for batch in (2, 4)}
        assert names <= set(open_store(f"{url}/run").names())


@pytest.fixture
def server(request):
    """The server that a test names, or S3; it runs again in the end."""
    server = request.getfixturevalue(getattr(request, "param", "s3_server"))
    yield server
    server.start()


@pytest.mark.s3
class TestOutagesAtTheStart:
    """A store that comes back is waited for, wherever the start meets it."""

    @pytest.fixture
    def command(self, server, tiny_yaml):
        """The command of a run whose checkpoints go to a bucket."""
        self.bucket = server.make_bucket(f"outage-{uuid.uuid4().hex}")
        path = tiny_yaml(max_duration="2ba", save_interval="2ba", eval_loader=None)
        return [str(path), "store_timeout=60", f"save_folder={self.bucket}/run"]

    def waits(self, server, command, text, capsys):
        with when_logged("vlm_composer.outages", "trying again for 60 s", server.start) as waited:
            assert train.main(command) == 0
        assert waited[0].startswith(f"Could not {text} ")
        return capsys.readouterr().err

    @pytest.mark.parametrize("server", ["s3_server", "azure_server"], indirect=True)
    def test_from_the_first_request_on(self, server, command, capsys):
        run = f"{self.bucket}/run"
        server.kill()
        self.waits(server, command, f"write to {run}", capsys)
        server.kill()
        again = [*command, "autoresume=true", "max_duration=3ba"]
        said = self.waits(server, again, f"write to {run}", capsys)
        assert "Resuming after batch 2" in said
        server.kill()
        load = [*command, "save_folder=null", f"load_path={run}", "max_duration=4ba"]
        assert "Resuming after batch 3" in self.waits(server, load, f"list {run}", capsys)

    @pytest.mark.parametrize("key", ["save_folder", "load_path"])
    def test_after_the_preflight(self, server, command, capsys, key):
        assert train.main(command) == 0
        command += ["autoresume=true", "max_duration=3ba"]
        if key == "load_path":
            command += ["autoresume=false", "save_folder=null", f"load_path={self.bucket}/run"]
        with when_logged("vlm_composer.preflight.report", "Preflight: ", server.kill) as killed:
            said = self.waits(server, command, f"list {self.bucket}/run", capsys)
        assert killed
        assert "Resuming after batch 2" in said

    def test_no_longer_than_it_may_take(self, server, command, capsys):
        """Once: what is asked of the store after that is not waited for as well."""
        server.kill()
        command += ["store_timeout=1", f"load_path={self.bucket}/earlier"]
        assert train.main(command) == 1
        said = capsys.readouterr().err
        assert said.count("trying again for 1 s") == 1
        assert f"could not write to {self.bucket}/run: the store was away for 1 s (" in said
        assert f"could not list {self.bucket}/earlier: check the bucket's name" in said

    def test_a_preflight_waits_for_nothing(self, server, command, capsys):
        server.kill()
        assert train.main([*command, f"load_path={self.bucket}/earlier", "--preflight"]) == 1
        said = capsys.readouterr()
        assert "trying again" not in said.err
        assert f"could not write to {self.bucket}/run: check the bucket's name" in said.out
        assert f"could not list {self.bucket}/earlier: check the bucket's name" in said.out


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
