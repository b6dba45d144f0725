"""The demo's real parts, prepared once a session; their packages are downloaded once a checkout."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def demo_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder in which nothing is prepared yet, on packages kept in pytest's cache."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "downloads").symlink_to(request.config.cache.mkdir("demo-downloads"))
    return folder
