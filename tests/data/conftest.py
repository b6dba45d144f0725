"""Shards in a folder, in a bucket and in a cache."""

import shutil

import pytest

from remote_shards import SAMPLES, Remote, open_captions, read, write_shards
from vlm_composer.storage import S3Store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven shards and their index."""
    return write_shards(tmp_path_factory.mktemp("stream"), SAMPLES)


@pytest.fixture
def remote(s3_server, folder):
    yield Remote(s3_server, folder)
    s3_server.start()


@pytest.fixture
def cache(tmp_path, folder):
    """A cache that an earlier run filled."""
    return shutil.copytree(folder, tmp_path / "cache")


@pytest.fixture
def gets(monkeypatch, tmp_path):
    """Names of the objects that were asked for, by this process and its loaders' workers.

    `before` and `failed` are called with the name around each download.
    """

    class Gets:
        path = tmp_path / "gets"
        before = failed = staticmethod(lambda name: None)

        def __call__(self):
            return self.path.read_text().split()

    gets, get = Gets(), S3Store.get
    gets.path.touch()

    def counted(self, name, path, limit=None):
        with gets.path.open("a") as log:
            log.write(f"{name}\n")
        gets.before(name)
        try:
            get(self, name, path, limit)
        except Exception:
            gets.failed(name)
            raise

    monkeypatch.setattr(S3Store, "get", counted)
    return gets


@pytest.fixture
def expected(folder):
    """The samples, read where they were written."""
    samples = read(open_captions(folder, streaming={"shuffle": False}))
    assert len(samples) == SAMPLES
    return samples
