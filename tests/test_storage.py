"""The same promises of a folder, a real S3 server, and emulators of Google's and Azure's."""

import os
import subprocess
import sys
import threading
import time
import uuid

import pytest
from botocore.exceptions import ClientError

from store_server import BUCKETS, SERVERS
from vlm_composer.outages import (
    MissingFileError,
    StoreError,
    TooLargeError,
    is_permanent,
    ride_out,
)
from vlm_composer.storage import open_store

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def server_of(request):
    return request.getfixturevalue(SERVERS[request.param])


def new_bucket(server):
    return server.make_bucket(f"storage-{uuid.uuid4().hex}")


@pytest.fixture(params=BUCKETS)
def server(request):
    """The server behind a bucket, running again when the test ends."""
    server = server_of(request)
    yield server
    server.start()


@pytest.fixture(params=["folder", *BUCKETS])
def place(request, tmp_path):
    """The URL of an empty folder or bucket."""
    return str(tmp_path / "store") if request.param == "folder" else new_bucket(server_of(request))


@pytest.fixture
def local(tmp_path):
    """Writes a local file."""

    def write(data):
        path = tmp_path / f"{uuid.uuid4().hex}.bin"
        path.write_bytes(data)
        return path

    return write


def content(store, name, tmp_path):
    store.get(name, tmp_path / "got")
    return (tmp_path / "got").read_bytes()


@pytest.mark.parametrize("prefix", ["", "/runs/one", "/runs/one/"])
def test_files_come_back_as_they_were(place, prefix, local, tmp_path):
    store, files = open_store(place + prefix), {"b": b"", "a/x.bin": b"1" * 70_000, "a/y/z": b"2"}
    assert store.names() == []
    assert store.first() is None
    for name, data in files.items():
        store.put(local(data), name)
    assert store.first() in files
    assert store.names() == ["a/x.bin", "a/y/z", "b"]
    assert store.names("a/") == ["a/x.bin", "a/y/z"]
    assert store.names("a/x") == ["a/x.bin"]
    assert store.sizes("a/") == {"a/x.bin": 70_000, "a/y/z": 1}
    assert {name: content(store, name, tmp_path) for name in files} == files
    below = f"{prefix.strip('/')}/".lstrip("/")
    assert open_store(place).names() == [below + name for name in ("a/x.bin", "a/y/z", "b")]


@pytest.mark.parametrize("prefix", ["", "/below/it"])
def test_parts_of_files_are_read(place, prefix, local):
    store = open_store(place + prefix)
    store.put(local(b"0123456789"), "a/ten")
    store.put(local(b""), "empty")

    def read(*arguments):
        # As the product reads: fake-gcs-server resets a connection after a range beyond the end.
        return ride_out(lambda: store.read(*arguments), "read", 60)

    assert read("a/ten", 100) == b"0123456789"
    assert read("a/ten", 4) == b"0123"
    assert read("a/ten", 4, 3) == b"3456"
    assert read("a/ten", 4, 8) == b"89"
    assert read("a/ten", 4, 10) == read("a/ten", 0, 3) == read("empty", 4) == b""
    for name in ("absent", "a", "a/ten/more"):
        with pytest.raises(MissingFileError, match=f"holds no {name}: there is no such"):
            read(name, 4)


def test_no_more_is_written_than_a_file_may_have(place, local, tmp_path):
    store, got = open_store(place), tmp_path / "got"
    store.put(local(b"1" * (20 << 20)), "large")  # which boto3 fetches in parts
    store.put(local(b""), "empty")
    for limit in (0, 1, 1 << 20, (20 << 20) - 1):
        with pytest.raises(TooLargeError, match=rf"/large has more than the {limit} bytes that"):
            ride_out(lambda limit=limit: store.get("large", got, limit), "fetch large", 60)
        assert not got.exists()
    store.get("large", got, 20 << 20)
    assert got.read_bytes() == b"1" * (20 << 20)
    store.get("empty", got, 0)
    assert got.read_bytes() == b""


def test_a_put_replaces(place, local, tmp_path):
    store = open_store(place)
    for data in (b"long ago", b"now"):
        store.put(local(data), "name")
    assert content(store, "name", tmp_path) == b"now"
    assert store.names() == ["name"]


def test_a_neighbour_whose_name_starts_the_same_is_not_listed(place, local):
    open_store(f"{place}/run-10").put(local(b"1"), "name")
    assert open_store(f"{place}/run-1").names() == []


def test_deleting_twice_is_no_error(place, local):
    store = open_store(place)
    for name in ("a", "b"):
        store.put(local(b"1"), name)
    for _ in range(2):
        store.delete("a")
        assert store.names() == ["b"]


def test_a_missing_object_is_not_waited_for(place, local, tmp_path):
    store = open_store(place)
    store.put(local(b"1"), "there")
    attempts = []

    def get():
        attempts.append(1)
        store.get("absent", tmp_path / "got")

    with pytest.raises(StoreError, match=r"could not fetch absent: (there is no such|check the)"):
        ride_out(get, "fetch absent", 60)
    assert len(attempts) == 1


USES = {
    "put": lambda store, file: store.put(file, "name"),
    "get": lambda store, file: store.get("name", file),
    "read": lambda store, file: store.read("name", 4),
    "names": lambda store, file: store.names(),
}


def refused(use, store, file, match):
    """Check that an error is clear, and known to be one that time does not mend."""
    started = time.monotonic()
    with pytest.raises(StoreError, match=match) as caught:
        ride_out(lambda: USES[use](store, file), f"{use} it", 60)
    assert time.monotonic() - started < 10
    assert is_permanent(caught.value.__cause__)


@pytest.mark.parametrize("use", USES)
def test_a_missing_bucket(server, use, local):
    scheme = new_bucket(server).partition("://")[0]
    refused(use, open_store(f"{scheme}://no-such-bucket/x"), local(b"1"), "no such bucket or obj")


@pytest.mark.s3
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("variables", "url", "match"),
    [
        ({"AWS_ACCESS_KEY_ID": "another"}, "s3://bucket", "it was refused; check the credentials"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "s3://bucket", "it was refused; check the cred"),
        (dict.fromkeys(KEYS), "s3://bucket", "no credentials were found; set them"),
        ({}, "s3://My Bucket", 'Invalid bucket name "My Bucket"'),
    ],
)
def test_what_s3_refuses(s3_server, use, variables, url, match, local, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    refused(use, open_store(url), local(b"1"), match)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("ftp://host/x", "give a folder, or a URL that starts with one of s3://, gs://, azure://"),
        ("file:///tmp/x", "give a folder, or a URL that starts with one of"),
        ("s3:///prefix", "give s3://bucket/prefix"),
        ("gs://bucket/a?b", r"give gs://bucket/prefix, without \? or #"),
        ("azure://container/a#b", r"give azure://bucket/prefix, without \? or #"),
        ("azure://container/a", "set AZURE_ACCOUNT_NAME and AZURE_ACCOUNT_ACCESS_KEY"),
        ("gs://bucket/a", "could not reach gs://bucket/a: no credentials were found"),
    ],
)
def test_what_cannot_be_opened(url, problem, monkeypatch, tmp_path):
    for kind in ("AZURE_ACCOUNT", "STORAGE_EMULATOR", "GOOGLE_APPLICATION"):
        for name in [name for name in os.environ if name.startswith(kind)]:
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # else Google's client looks for its own machines
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StoreError, match=problem):
        open_store(url)


@pytest.mark.parametrize(
    ("status", "code", "permanent"),
    [
        *[(400, "ExpiredToken", True), (403, "AccessDenied", True), (404, "NoSuchKey", True)],
        *[(400, "RequestTimeout", False), (408, "", False), (429, "", False)],
        *[(500, "InternalError", False), (503, "SlowDown", False)],
    ],
)
def test_what_time_mends(status, code, permanent):
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    assert is_permanent(ClientError(answer, "GetObject")) == permanent


def test_what_the_readme_says_of_hmac_keys_sends_no_checksum_in_a_trailer(local, monkeypatch):
    monkeypatch.setenv("S3_ENDPOINT_URL", "https://storage.googleapis.com")
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")  # boto3#4400
    for name in KEYS:
        monkeypatch.setenv(name, "key")
    store, sent = open_store("s3://bucket/prefix"), []

    def intercept(request, **_):
        sent.append(request)
        raise ConnectionError("not sent")

    store._client.meta.events.register("before-send.s3.PutObject", intercept)
    with pytest.raises(ConnectionError, match="not sent"):
        store.put(local(b"1"), "name")
    (request,) = sent
    assert request.url == "https://storage.googleapis.com/bucket/prefix/name"
    assert not [name for name in request.headers if "checksum" in name or "Trailer" in name]


@pytest.mark.parametrize("use", USES)
def test_a_server_that_comes_back_is_waited_for(server, use, local, caplog):
    store = open_store(new_bucket(server))
    store.put(local(b"here"), "name")
    file, revival, failures = local(b"here"), threading.Thread(target=server.start), []

    def attempt():
        try:
            return USES[use](store, file)
        except Exception as error:
            failures.append(error)
            if len(failures) == 1:
                revival.start()
            raise

    server.kill()
    with caplog.at_level("WARNING"):
        found = ride_out(attempt, "use it", 60)
    revival.join()
    assert failures
    assert "trying again for 60 s" in caplog.text
    assert found == {"names": ["name"], "read": b"here"}.get(use)
    assert file.read_bytes() == b"here"


@pytest.mark.parametrize("seconds", [0, 1])
def test_a_server_that_stays_away_is_given_up(server, seconds):
    store, attempts = open_store(new_bucket(server)), []
    server.kill()

    def names():
        attempts.append(1)
        return store.names()

    started = time.monotonic()
    match = "the store was away for 1 s .*start the run again" if seconds else "check the bucket's"
    with pytest.raises(StoreError, match=f"could not list it: {match}"):
        ride_out(names, "list it", seconds)
    assert seconds <= time.monotonic() - started < seconds + 5
    assert (len(attempts) == 1) == (seconds == 0)


ENDING = """
import threading
from concurrent.futures import ThreadPoolExecutor
from vlm_composer.outages import ride_out
failed = threading.Event()
def fail():
    failed.set()
    raise ConnectionError("away")
future = ThreadPoolExecutor().submit(ride_out, fail, "fetch it", 600)
future.add_done_callback(lambda future: print(future.exception()))
failed.wait()
"""


def test_a_process_that_ends_waits_for_no_store():
    code = [sys.executable, "-c", ENDING]
    done = subprocess.run(code, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "could not fetch it: the process is ending\n"


def test_a_full_disk_is_not_waited_for(place, local, tiny_disk):
    store = open_store(place)
    store.put(local(b"1" * 100_000), "name")
    refused("get", store, tiny_disk / "got", "the local disk is full; free some space")


def test_a_folder_on_a_full_disk_keeps_what_it_had(local, tiny_disk):
    store = open_store(tiny_disk)
    store.put(local(b"before"), "name")
    refused("put", store, local(b"1" * 100_000), "the local disk is full; free some space")
    assert store.names() == ["name"]
    assert (tiny_disk / "name").read_bytes() == b"before"
