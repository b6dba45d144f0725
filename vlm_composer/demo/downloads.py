"""Fetch a named package at an exact version, with pip or npm, and unpack it, once.

The clients are the user's own, so their mirrors, proxies and credentials apply.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import math
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlm_composer.locks import Lock

logger = logging.getLogger(__name__)


class DownloadError(RuntimeError):
    """A package could not be fetched, or what came is not what was pinned."""


@dataclass(frozen=True)
class Package:
    """One archive on a package registry: which, how large, and what it must hash to."""

    name: str
    version: str
    sha256: str  # of the wheel or the tarball, in hex
    megabytes: int  # to download; only shown to the user


def fetch_wheel(package: Package, folder: Path) -> Path:
    """Download a wheel from PyPI with pip and unpack it; nothing is installed.

    Args:
        package: the wheel to fetch, without its dependencies.
        folder: the parent of the unpacked package.

    Returns:
        `folder/<name>-<version>`, complete; at once when it was fetched before.

    Raises:
        DownloadError: pip is missing or fails, or the wheel's sha256 is not the pinned one.
    """

    def build(partial: Path) -> None:
        if importlib.util.find_spec("pip") is None:
            raise DownloadError(
                f"pip is not in this environment ({sys.executable}) and is needed to download "
                f"{package.name} {package.version}: run `{sys.executable} -m ensurepip`."
            )
        options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
        pip_download = [sys.executable, "-m", "pip", "download", *options, "--dest", str(partial)]
        _run("pip", [*pip_download, f"{package.name}=={package.version}"], package)
        wheel = _checked(partial, "*.whl", package)
        unpack_wheel(wheel, partial)
        wheel.unlink()

    return build_once(folder / f"{package.name}-{package.version}", build)


def fetch_npm(package: Package, folder: Path) -> Path:
    """Download a package's tarball with `npm pack` and unpack it; none of its scripts is run.

    Args:
        package: the npm package to fetch, without its dependencies.
        folder: the parent of the unpacked package.

    Returns:
        `folder/<name>-<version>`, complete; at once when it was fetched before.
        npm puts a package's files into a folder `package` in there.

    Raises:
        DownloadError: npm is missing or fails, or the tarball's sha256 is not the pinned one.
    """

    def build(partial: Path) -> None:
        npm = shutil.which("npm")
        if npm is None:
            raise DownloadError(
                f"npm is not on the PATH and is needed to download {package.name} "
                f"{package.version}: install Node.js (Debian, Ubuntu: `apt-get install npm`)."
            )
        # At npm's own log level it lists each of the package's thousands of files.
        npm_pack = [npm, "pack", "--ignore-scripts", "--loglevel=error"]
        _run("npm", [*npm_pack, f"{package.name}@{package.version}"], package, cwd=partial)
        tarball = _checked(partial, "*.tgz", package)
        unpack_tarball(tarball, partial)
        tarball.unlink()

    return build_once(folder / f"{package.name}-{package.version}", build)


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Fill a folder in full or not at all.

    `build` works on an empty `<target>.partial`, which gets its name only once `build` returns:
    that `target` exists is the mark that it is whole. A build that fails is removed, one that was
    killed is removed and done again by the next call, and a second process waits for the first.

    Args:
        target: the folder to make.
        build: fills the empty folder that it is given.

    Returns:
        `target`; at once when it exists.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    with Lock(target.with_name(f"{target.name}.lock"), math.inf):
        if target.is_dir():  # by the process that we waited for
            return target
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            build(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        partial.rename(target)
    return target


def unpack_wheel(archive: Path, folder: Path) -> None:
    """Unzip a wheel.

    Args:
        archive: the wheel.
        folder: where its files go.

    Raises:
        DownloadError: a member's path leads out of `folder`; nothing is unpacked then.
    """
    with zipfile.ZipFile(archive) as wheel:
        for name in wheel.namelist():
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                raise DownloadError(f"{archive.name} holds the unsafe path {name!r}; not unpacked.")
        wheel.extractall(folder)


def unpack_tarball(archive: Path, folder: Path) -> None:
    """Unpack a tarball.

    Args:
        archive: the tarball.
        folder: where its files go.

    Raises:
        DownloadError: a member leads out of `folder` or is neither file, folder nor inner link.
    """
    with tarfile.open(archive) as tarball:
        try:
            tarball.extractall(folder, filter="data")
        except tarfile.FilterError as error:
            raise DownloadError(f"{archive.name} holds an unsafe member: {error}") from error


def _run(client: str, command: list[str], package: Package, cwd: Path | None = None) -> None:
    wanted = f"{package.name} {package.version} ({package.megabytes} MB)"
    logger.info("Downloading %s with %s", wanted, client)
    status = subprocess.run(command, cwd=cwd).returncode
    if status != 0:
        raise DownloadError(
            f"{client} could not download {wanted}: it exited with {status} and says why above. "
            f"Check the network, and the index or proxy in `{client} config list`; then run this "
            f"again. What was fetched before is kept."
        )


def _checked(folder: Path, pattern: str, package: Package) -> Path:
    (archive,) = folder.glob(pattern)
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise DownloadError(
            f"{archive.name} has sha256 {found}, not the pinned {package.sha256}; it was deleted. "
            f"Run this again; if it stays so, your package index serves another file than the "
            f"one that this version of the demo was written for."
        )
    return archive
