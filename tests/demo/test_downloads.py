"""Downloads by the real pip and npm, from an index made here: no network."""

import base64
import hashlib
import http.server
import importlib.util
import io
import json
import multiprocessing
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vlm_composer.demo.downloads import (
    DownloadError,
    Package,
    build_once,
    fetch_npm,
    fetch_wheel,
    unpack_tarball,
    unpack_wheel,
)


def wheel_bytes(members: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        for name, text in members.items():
            wheel.writestr(name, text)
    return buffer.getvalue()


def tarball_bytes(members: dict[str, str], link: tuple[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tarball:
        for name, text in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tarball.addfile(member, io.BytesIO(text.encode()))
        if link:
            member = tarfile.TarInfo(link[0])
            member.type, member.linkname = tarfile.SYMTYPE, link[1]
            tarball.addfile(member)
    return buffer.getvalue()


WHEEL = wheel_bytes(
    {
        "toy_weights/weights.txt": "1 2 3",
        "toy_weights-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: toy-weights\n"
        "Version: 1.0\nRequires-Dist: a-package-that-is-nowhere\n",
        "toy_weights-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\n"
        "Root-Is-Purelib: true\nTag: py3-none-any\n",
        "toy_weights-1.0.dist-info/RECORD": "",
    }
)
TARBALL = tarball_bytes(
    {
        "package/package.json": json.dumps({"name": "toy-images", "version": "1.0.0"}),
        "package/images/cat.txt": "a cat",
    }
)
TOY_WHEEL = Package("toy-weights", "1.0", hashlib.sha256(WHEEL).hexdigest(), 0)
TOY_NPM = Package("toy-images", "1.0.0", hashlib.sha256(TARBALL).hexdigest(), 0)


@pytest.fixture
def wheel_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is all that pip may look at."""
    index = tmp_path / "index"
    index.mkdir()
    (index / "toy_weights-1.0-py3-none-any.whl").write_bytes(WHEEL)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


@pytest.fixture
def npm_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A registry that npm asks instead of its own; gives the paths that were asked for."""
    asked: list[str] = []

    class Registry(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            digest = base64.b64encode(hashlib.sha512(TARBALL).digest()).decode()
            dist = {
                "tarball": f"http://127.0.0.1:{server.server_port}/toy-images.tgz",
                "integrity": f"sha512-{digest}",
            }
            version = {"name": "toy-images", "version": "1.0.0", "dist": dist}
            packument = {"name": "toy-images", "versions": {"1.0.0": version}, "dist-tags": {}}
            found = {
                "/toy-images": json.dumps(packument).encode(),
                "/toy-images.tgz": TARBALL,
            }.get(self.path)
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write(found or b"{}")

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm-cache"))
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("npm_config_noproxy", "127.0.0.1")
    yield asked
    server.shutdown()
    server.server_close()


def test_wheel_is_unpacked_and_fetched_once(wheel_index: Path, tmp_path: Path) -> None:
    target = fetch_wheel(TOY_WHEEL, tmp_path / "downloads")
    assert target == tmp_path / "downloads/toy-weights-1.0"
    assert (target / "toy_weights/weights.txt").read_text() == "1 2 3"
    assert not list(target.glob("*.whl")), "the wheel itself takes its space twice"

    (wheel_index / "toy_weights-1.0-py3-none-any.whl").unlink()
    assert fetch_wheel(TOY_WHEEL, tmp_path / "downloads") == target


def test_npm_package_is_unpacked_and_fetched_once(npm_registry: list[str], tmp_path: Path) -> None:
    target = fetch_npm(TOY_NPM, tmp_path / "downloads")
    assert target == tmp_path / "downloads/toy-images-1.0.0"
    assert (target / "package/images/cat.txt").read_text() == "a cat"
    assert not list(target.glob("*.tgz"))

    assert "/toy-images.tgz" in npm_registry
    npm_registry.clear()
    assert fetch_npm(TOY_NPM, tmp_path / "downloads") == target
    assert npm_registry == []


@pytest.mark.parametrize(
    ("fetch", "toy"), [(fetch_wheel, TOY_WHEEL), (fetch_npm, TOY_NPM)], ids=["wheel", "npm"]
)
@pytest.mark.usefixtures("wheel_index", "npm_registry")
def test_another_sha256_is_refused_and_leaves_nothing(
    fetch: Callable[[Package, Path], Path], toy: Package, tmp_path: Path
) -> None:
    pinned = Package(toy.name, toy.version, "0" * 64, 0)
    with pytest.raises(DownloadError, match=f"sha256 {toy.sha256}, not the pinned {'0' * 64}"):
        fetch(pinned, tmp_path / "downloads")
    assert list((tmp_path / "downloads").iterdir()) == []
    fetch(toy, tmp_path / "downloads")


@pytest.mark.usefixtures("wheel_index", "npm_registry")
def test_a_version_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"pip could not download toy-weights 2.0 .* network"):
        fetch_wheel(Package("toy-weights", "2.0", "", 0), tmp_path / "downloads")
    with pytest.raises(DownloadError, match=r"npm could not download toy-images 2.0.0 .* network"):
        fetch_npm(Package("toy-images", "2.0.0", "", 0), tmp_path / "downloads")
    assert list((tmp_path / "downloads").iterdir()) == []


def test_no_registry_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")  # the discard port: refused
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm-cache"))
    monkeypatch.setenv("npm_config_noproxy", "127.0.0.1")
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    with pytest.raises(DownloadError, match="Check the network"):
        fetch_npm(TOY_NPM, tmp_path)


def test_missing_clients_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match=r"install Node\.js"):
        fetch_npm(TOY_NPM, tmp_path)
    with pytest.raises(DownloadError, match="-m ensurepip"):
        fetch_wheel(TOY_WHEEL, tmp_path)


@pytest.mark.parametrize("name", ["../outside.txt", "/tmp/outside.txt", "inner/../../outside.txt"])
def test_hostile_paths_are_not_unpacked(name: str, tmp_path: Path) -> None:
    archive, folder = tmp_path / "archive", tmp_path / "folder"
    folder.mkdir()
    archive.write_bytes(wheel_bytes({"good.txt": "", name: "bad"}))
    with pytest.raises(DownloadError, match="unsafe path"):
        unpack_wheel(archive, folder)
    archive.write_bytes(tarball_bytes({name: "bad"}))
    # Of an absolute path tarfile drops the leading slash, which is safe too.
    if name.startswith("/"):
        unpack_tarball(archive, folder)
        assert (folder / "tmp/outside.txt").is_file()
    else:
        with pytest.raises(DownloadError, match="unsafe member"):
            unpack_tarball(archive, folder)
    assert not (tmp_path / "outside.txt").exists()
    assert not Path("/tmp/outside.txt").exists()


def test_hostile_links_are_not_unpacked(tmp_path: Path) -> None:
    archive, folder = tmp_path / "archive", tmp_path / "folder"
    folder.mkdir()
    archive.write_bytes(tarball_bytes({}, link=("passwd", "../../../../etc/passwd")))
    with pytest.raises(DownloadError, match="unsafe member"):
        unpack_tarball(archive, folder)
    assert not (folder / "passwd").is_symlink()


def test_failed_build_leaves_nothing_and_is_done_again(tmp_path: Path) -> None:
    def fail(partial: Path) -> None:
        (partial / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "part", fail)
    assert list(tmp_path.iterdir()) == []

    build_once(tmp_path / "part", lambda partial: (partial / "whole").touch())
    build_once(tmp_path / "part", fail)  # is not run
    assert [path.name for path in (tmp_path / "part").iterdir()] == ["whole"]


def _build_slowly(folder: Path, seconds: float, runs: Path) -> None:
    def build(partial: Path) -> None:
        (partial / f"{seconds}").touch()
        with runs.open("a") as file:
            file.write("started\n")
        time.sleep(seconds)

    build_once(folder / "part", build)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.01)


def test_killed_build_is_done_again(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    process = multiprocessing.get_context("spawn").Process(
        target=_build_slowly, args=(tmp_path, 600, runs)
    )
    process.start()
    _wait_for(runs)
    process.kill()
    process.join()
    assert (tmp_path / "part.partial").is_dir()
    assert not (tmp_path / "part").exists()

    build_once(tmp_path / "part", lambda partial: (partial / "whole").touch())
    assert [path.name for path in (tmp_path / "part").iterdir()] == ["whole"]
    assert not (tmp_path / "part.partial").exists()


def test_second_process_waits_for_the_first(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    process = multiprocessing.get_context("spawn").Process(
        target=_build_slowly, args=(tmp_path, 1, runs)
    )
    process.start()
    _wait_for(runs)
    _build_slowly(tmp_path, 0, runs)
    assert [path.name for path in (tmp_path / "part").iterdir()] == ["1"]
    assert runs.read_text() == "started\n"
    process.join()
    assert process.exitcode == 0
