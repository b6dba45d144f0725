"""A data set on one page that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from convert.overview import FoundSample, Overview
from vlm_composer.rendering import load_templates

_PAGE = load_templates(Path(__file__).parent).get_template("inspect_page.html.jinja")


@dataclass(frozen=True)
class Picture:
    """A sample as it is shown."""

    sample: FoundSample
    image: Image.Image
    """Upright RGB, scaled down."""

    size: tuple[int, int]
    """Of the file's image in pixels."""

    fault: str | None = None
    """Why the image is none of the file's."""

    @property
    def place(self) -> str:
        """Where it is from."""
        return f"{self.sample.shard.name}, sample {self.sample.number}"

    @property
    def described(self) -> str:
        """What the image is."""
        if self.fault:
            return self.fault
        size = len(self.sample.record["image"]) / 1000
        return f"{self.size[0]} x {self.size[1]} pixels, {size:.1f} kB"

    @property
    def uri(self) -> str:
        """The pixels alone: whatever else is in a file that somebody published stays out."""
        buffer = io.BytesIO()
        self.image.save(buffer, "JPEG", quality=85)
        return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def render_page(overview: Overview, pictures: Sequence[Picture]) -> str:
    """Return the page's HTML."""
    return _PAGE.render(overview=overview, pictures=pictures)
