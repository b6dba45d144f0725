"""Files in a folder or a bucket: list, upload, download, delete.

The one place that knows the stores' SDKs. Credentials and endpoints are those that streaming and
Composer use: boto3's chain with `S3_ENDPOINT_URL`; Google's default credentials;
`AZURE_ACCOUNT_NAME` with `AZURE_ACCOUNT_ACCESS_KEY`. The SDKs' own retries are off:
`outages.ride_out` waits for an unavailable store, for a time that its caller states.

Nothing heavy is imported here, so that conversion needs no model code.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlparse

from vlm_composer.local_files import move_durably, partial_path
from vlm_composer.outages import MissingFileError, StoreError, TooLargeError, advice

SCHEMES = ("s3", "gs", "azure")
CONNECT_SECONDS = 10
"""How long a store may take to answer a connection."""
READ_SECONDS = 60
"""How long it may be silent in the middle of a transfer."""
_COPY_BYTES = 1 << 20


class Store(ABC):
    """A place for files, named by their path relative to it, with `/`.

    A file appears under its name whole or not at all.

    Args:
        url: As its user wrote it.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    @abstractmethod
    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Name and bytes of all files whose names start with `prefix`."""

    def names(self, prefix: str = "") -> list[str]:
        """Names of all files that start with `prefix`, sorted."""
        return sorted(self.sizes(prefix))

    def first(self, wanted: Callable[[str], bool] = bool) -> str | None:
        """Return the name of a file that is wanted, or None; of a bucket mostly in one request."""
        return next(filter(wanted, self.sizes()), None)

    @abstractmethod
    def put(self, path: str | Path, name: str) -> None:
        """Copy a local file into the store."""

    def get(self, name: str, path: str | Path, limit: int | None = None) -> None:
        """Copy a file of the store to a local path, which must not be read before this returns.

        Args:
            name: The file.
            path: Where it goes.
            limit: Bytes that it has at most; None copies it whatever its size.

        Raises:
            TooLargeError: It has more; not more than `limit` bytes were written.
        """
        try:
            with _Limited(FileIO(path, "wb"), limit, f"{self.url}/{name}") as file:
                self._download(name, file)
        except BaseException:
            Path(path).unlink(missing_ok=True)
            raise

    @abstractmethod
    def _download(self, name: str, to: BinaryIO) -> None:
        """Write a file of the store to a local one."""

    @abstractmethod
    def read(self, name: str, count: int, start: int = 0) -> bytes:
        """Return a file's bytes from `start` on: `count` of them, or fewer where it ends.

        Raises:
            MissingFileError: There is no such file.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""

    def abort_uploads(self, wanted: Callable[[str], bool], age: float) -> int:
        """Abort uploads of large files that a killed process left unfinished.

        S3 keeps their parts, and charges for them, until somebody aborts them. A folder has none;
        Google and Azure delete theirs after a week.

        Args:
            wanted: Whether a name is one to abort.
            age: Seconds since an upload began, under which it may still go on and is left alone.

        Returns:
            How many were aborted.
        """
        del wanted, age
        return 0

    @contextmanager
    def named(self, action: str) -> Iterator[None]:
        """Turn the errors of an SDK into a `StoreError` that names the store and says what to do.

        Args:
            action: What was tried, for example "list".
        """
        try:
            yield
        except StoreError:
            raise
        except Exception as error:  # each SDK raises classes of its own
            raise StoreError(f"could not {action} {self.url}: {advice(error)}") from error


class _Limited(BufferedWriter):
    """A file that takes no byte beyond `limit`, wherever it is written to."""

    def __init__(self, raw: FileIO, limit: int | None, what: str) -> None:
        super().__init__(raw)
        self._limit, self._what = limit, what

    def write(self, data: Any) -> int:
        if self._limit is not None and self.tell() + len(data) > self._limit:
            raise TooLargeError(
                f"{self._what} has more than the {self._limit} bytes that it should have"
            )
        return super().write(data)


class FolderStore(Store):
    """A local folder, made where it is missing."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.folder = Path(url)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        sizes = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            with suppress(FileNotFoundError):  # a file may go meanwhile
                if name.startswith(prefix) and path.is_file():  # no pipe, no link to itself
                    sizes[name] = path.stat().st_size
        return sizes

    def put(self, path: str | Path, name: str) -> None:
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_path(target)
        try:
            shutil.copyfile(path, partial)
            move_durably(partial, target)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def _download(self, name: str, to: BinaryIO) -> None:
        with open(self.folder / name, "rb") as file:
            shutil.copyfileobj(file, to, _COPY_BYTES)

    def read(self, name: str, count: int, start: int = 0) -> bytes:
        try:
            with open(self.folder / name, "rb") as file:
                file.seek(start)
                return file.read(count)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise _missing(self, name) from error

    def delete(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)


class _Bucket(Store):
    """What the buckets have in common: `bucket` and the `prefix` of the keys."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        parts = urlparse(url)
        self.bucket = parts.netloc
        self.prefix = f"{parts.path.strip('/')}/".lstrip("/")
        with self.named("reach"):
            self._connect()

    @abstractmethod
    def _connect(self) -> None:
        """Make the SDK's client."""

    @abstractmethod
    def _objects(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Key and bytes of the bucket's objects whose keys start with `prefix`."""

    def sizes(self, prefix: str = "") -> dict[str, int]:
        return dict(self._files(prefix))

    def first(self, wanted: Callable[[str], bool] = bool) -> str | None:
        return next((name for name, _ in self._files() if wanted(name)), None)

    def _files(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        for key, size in self._objects(self.prefix + prefix):
            if not key.endswith("/"):  # what consoles and file systems of buckets keep for a folder
                yield key.removeprefix(self.prefix), size


class S3Store(_Bucket):
    """A prefix of an S3 bucket."""

    def _connect(self) -> None:
        from boto3.session import Session
        from botocore.config import Config

        config = Config(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            retries={"mode": "standard", "total_max_attempts": 1},
        )
        endpoint = os.environ.get("S3_ENDPOINT_URL")
        self._client = Session().client("s3", endpoint_url=endpoint, config=config)

    def _objects(self, prefix: str) -> Iterator[tuple[str, int]]:
        pages = self._client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self.bucket, Prefix=prefix):
            yield from ((item["Key"], item["Size"]) for item in page.get("Contents", []))

    def put(self, path: str | Path, name: str) -> None:
        from boto3.exceptions import S3UploadFailedError

        try:  # a multipart upload becomes an object when its last part is there
            self._client.upload_file(str(path), self.bucket, self.prefix + name)
        except S3UploadFailedError as error:  # it hides the store's answer
            raise (error.__context__ or error) from None

    def _download(self, name: str, to: BinaryIO) -> None:
        self._client.download_fileobj(self.bucket, self.prefix + name, to)

    def read(self, name: str, count: int, start: int = 0) -> bytes:
        from botocore.exceptions import ClientError

        if count == 0:
            return b""
        span = f"bytes={start}-{start + count - 1}"
        try:
            found = self._client.get_object(Bucket=self.bucket, Key=self.prefix + name, Range=span)
            return found["Body"].read()
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code")
            if code == "InvalidRange":  # nothing is that far, or the file is empty
                return b""
            if code == "NoSuchKey":
                raise _missing(self, name) from error
            raise

    def delete(self, name: str) -> None:
        self._client.delete_object(Bucket=self.bucket, Key=self.prefix + name)

    def abort_uploads(self, wanted: Callable[[str], bool], age: float) -> int:
        latest = datetime.now(UTC) - timedelta(seconds=age)
        pages = self._client.get_paginator("list_multipart_uploads")
        old = [
            {"Key": upload["Key"], "UploadId": upload["UploadId"]}
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix)
            for upload in page.get("Uploads", [])
            if upload["Initiated"] < latest and wanted(upload["Key"].removeprefix(self.prefix))
        ]
        for upload in old:
            self._client.abort_multipart_upload(Bucket=self.bucket, **upload)
        return len(old)


class GoogleStore(_Bucket):
    """A prefix of a Google bucket, with Google's default credentials."""

    def _connect(self) -> None:
        from google.cloud.storage import Client

        self._once: dict[str, Any] = {"timeout": (CONNECT_SECONDS, READ_SECONDS), "retry": None}
        self._bucket = Client().bucket(self.bucket)

    def _objects(self, prefix: str) -> Iterator[tuple[str, int]]:
        blobs = self._bucket.client.list_blobs(self._bucket, prefix=prefix, **self._once)
        yield from ((blob.name, blob.size) for blob in blobs)

    def put(self, path: str | Path, name: str) -> None:
        self._bucket.blob(self.prefix + name).upload_from_filename(str(path), **self._once)

    def _download(self, name: str, to: BinaryIO) -> None:
        self._bucket.blob(self.prefix + name).download_to_file(to, **self._once)

    def read(self, name: str, count: int, start: int = 0) -> bytes:
        from google.api_core.exceptions import NotFound, RequestRangeNotSatisfiable

        if count == 0:
            return b""
        blob = self._bucket.blob(self.prefix + name)
        try:
            return blob.download_as_bytes(start=start, end=start + count - 1, **self._once)
        except RequestRangeNotSatisfiable:  # nothing is that far, or the file is empty
            return b""
        except NotFound as error:  # or the bucket is: its answer does not tell
            raise _missing(self, name) from error

    def delete(self, name: str) -> None:
        from google.api_core.exceptions import NotFound

        with suppress(NotFound):
            self._bucket.blob(self.prefix + name).delete(**self._once)


class AzureStore(_Bucket):
    """A prefix of an Azure container: `azure://container/prefix`."""

    def _connect(self) -> None:
        from azure.storage.blob import BlobServiceClient

        account = os.environ.get("AZURE_ACCOUNT_NAME")
        key = os.environ.get("AZURE_ACCOUNT_ACCESS_KEY")
        if not account or not key:
            raise StoreError(
                f"{self.url}: set AZURE_ACCOUNT_NAME and AZURE_ACCOUNT_ACCESS_KEY in the "
                "environment"
            )
        endpoint = os.environ.get("AZURE_STORAGE_SERVICE_ENDPOINT")  # as of Azure's `az`
        service = BlobServiceClient(
            endpoint or f"https://{account}.blob.core.windows.net",
            credential={"account_name": account, "account_key": key},
            retry_total=0,
            connection_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
        )
        self._container = service.get_container_client(self.bucket)

    def _objects(self, prefix: str) -> Iterator[tuple[str, int]]:
        blobs = self._container.list_blobs(name_starts_with=prefix)
        yield from ((blob.name, blob.size) for blob in blobs)

    def put(self, path: str | Path, name: str) -> None:
        with open(path, "rb") as file:
            self._container.upload_blob(self.prefix + name, file, overwrite=True)

    def _download(self, name: str, to: BinaryIO) -> None:
        self._container.download_blob(self.prefix + name).readinto(to)

    def read(self, name: str, count: int, start: int = 0) -> bytes:
        from azure.core.exceptions import HttpResponseError

        if count == 0:
            return b""
        try:
            return self._container.download_blob(self.prefix + name, start, count).readall()
        except HttpResponseError as error:
            if error.status_code == 416:  # nothing is that far, or the file is empty
                return b""
            if getattr(error, "error_code", None) == "BlobNotFound":
                raise _missing(self, name) from error
            raise

    def delete(self, name: str) -> None:
        from azure.core.exceptions import ResourceNotFoundError

        with suppress(ResourceNotFoundError):
            self._container.delete_blob(self.prefix + name)


def open_store(url: str | Path) -> Store:
    """Open a folder or a bucket; nothing is asked of it yet.

    Args:
        url: A folder, or s3://bucket/prefix, gs://bucket/prefix, azure://container/prefix.

    Raises:
        StoreError: The URL is malformed or no credentials are found.
    """
    url = os.fspath(url)
    if "://" not in url:
        return FolderStore(url)
    parts = urlparse(url)
    if parts.scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise StoreError(f"{url}: give a folder, or a URL that starts with one of {known}")
    if not parts.netloc or parts.query or parts.fragment:
        raise StoreError(f"{url}: give {parts.scheme}://bucket/prefix, without ? or #")
    if parts.scheme == "s3":
        return S3Store(url)
    return AzureStore(url) if parts.scheme == "azure" else GoogleStore(url)


def _missing(store: Store, name: str) -> MissingFileError:
    return MissingFileError(f"{store.url} holds no {name}: there is no such bucket or object")
