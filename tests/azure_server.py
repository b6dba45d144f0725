"""An Azure Blob Storage server for tests marked `s3`: Microsoft's Azurite, from npm.

It is fetched once and answers on a free port of 127.0.0.1.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from store_server import StoreServer
from vlm_composer.demo.downloads import build_once

VERSION = "3.35.0"
PUBLISHED = "2026-09-01"
"""Newer versions of what it depends on are not installed."""


class AzureServer(StoreServer):
    """A StoreServer that speaks Azure Blob Storage."""

    killed_by = signal.SIGTERM
    """At SIGKILL it loses what it was given in the last five seconds."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._azurite = fetch_azurite()
        self.env = {
            "AZURE_ACCOUNT_NAME": "devstoreaccount1",  # Azurite's own, as its key is
            "AZURE_ACCOUNT_ACCESS_KEY": "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErC"
            "z4I6tq/K1SZFPTOtr/KBHBeksoGMGw==",
            "AZURE_STORAGE_SERVICE_ENDPOINT": f"{self.url}/devstoreaccount1",
        }

    def _command(self) -> list[str | Path]:
        return [
            *("node", self._azurite, "--silent", "--disableTelemetry", "--skipApiVersionCheck"),
            *("--location", self._folder / "blobs"),
            *("--blobHost", self._host, "--blobPort", str(self._port)),
        ]

    def make_bucket(self, name: str) -> str:
        """Makes a container.

        Returns:
            Its URL, azure://`name`.
        """
        self.client().create_container(name)
        return f"azure://{name}"

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """The names of a container's blobs that start with `prefix`, sorted."""
        container = self.client().get_container_client(bucket)
        return sorted(blob.name for blob in container.list_blobs(name_starts_with=prefix))

    def client(self) -> Any:
        """Azure's client, of this server."""
        from azure.storage.blob import BlobServiceClient

        account, key, endpoint = self.env.values()
        return BlobServiceClient(endpoint, {"account_name": account, "account_key": key})


@pytest.fixture(scope="session")
def azure_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AzureServer]:
    """A running `AzureServer`, whose `env` is set for the rest of the session.

    One server serves the session, so make containers with names of your own, and `start` what you
    `kill`.
    """
    server = AzureServer(tmp_path_factory.mktemp("azure"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            patch.setenv(name, value)
        server.start()
        try:
            yield server
        finally:
            server.kill()


def fetch_azurite() -> Path:
    """Install Azurite with npm, once, and return its script."""
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(
            "The tests of azure:// need npm: install Node.js (Debian: `apt-get install npm`)."
        )

    def build(partial: Path) -> None:
        quiet = ["--no-audit", "--no-fund", "--loglevel=error"]
        wanted = ["--ignore-scripts", f"--before={PUBLISHED}", f"azurite@{VERSION}"]
        subprocess.run([npm, "install", "--prefix", partial, *quiet, *wanted], check=True)

    folder = Path(__file__).parent.parent / ".pytest_cache" / "d"
    target = build_once(folder / f"azurite-{VERSION}", build)
    return target / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
