"""One browser for the session, with one tab."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import Page, fetch_chromium, open_browser


@pytest.fixture(scope="session")
def page(request: pytest.FixtureRequest) -> Iterator[Page]:
    """A tab of headless Chromium, which is downloaded once a checkout, beside pytest's cache."""
    folder = request.config.rootpath / ".pytest_cache" / "d" / "browser"
    with open_browser(fetch_chromium(Path(folder))) as tab:
        yield tab
