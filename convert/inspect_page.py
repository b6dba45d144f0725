"""A data set on one page that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from convert.overview import FoundSample, Overview, Table

_TEXT = 2000
"""Characters of a text on the page, at most."""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load: what is in the page. Captions are escaped; this is the second lock."""

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.45 system-ui, sans-serif; }
body { max-width: 80rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
.tables { display: grid; gap: 0 2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; padding: .75rem; border: 1px solid #8886; border-radius: .5rem; break-inside: avoid; }
figure img { display: block; margin: 0 auto .5rem; max-width: 100%; max-height: 20rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .25rem 0; }
.small { font-size: .8rem; opacity: .75; overflow-wrap: anywhere; margin: .25rem 0; }
table { border-collapse: collapse; width: 100%; break-inside: avoid; }
caption { text-align: left; font-weight: 600; padding-top: .75rem; }
td, th { padding: .1rem .4rem .1rem 0; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.bar { width: 35%; }
.bar div { height: .8rem; margin-top: .35rem; background: #3b82f6; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
@media print { body { max-width: none; padding: 0; } .grid { grid-template-columns: repeat(3, 1fr); } }
""".strip()  # noqa: E501 (a rule a line)


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


def render_page(overview: Overview, pictures: Sequence[Picture]) -> str:
    """The page's HTML."""
    return "\n".join(_page(overview, pictures)) + "\n"


def _page(overview: Overview, pictures: Sequence[Picture]) -> Iterator[str]:
    title = _text(overview.place)
    yield "<!DOCTYPE html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{title}</title><style>{_STYLE}</style></head><body>"
    yield f"<h1>{title}</h1>"
    yield "<table><thead><tr><th>side</th>"
    yield "".join(f'<th class="number">{name}</th>' for name in ("samples", "shards", "MB"))
    yield "</tr></thead><tbody>"
    for count in overview.counts:
        numbers = f"{count.samples:,}", f"{count.shards:,}", f"{count.bytes / 1e6:,.1f}"
        cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
        yield f"<tr><td>{_text(count.folder.path)}</td>{cells}</tr>"
    yield "</tbody></table>"
    yield f'<h2>{len(pictures)} random samples</h2><div class="grid">'
    for picture in pictures:
        yield _figure(picture)
    yield "</div>"
    yield f'<h2>Numbers</h2><p class="small">Of {_text(overview.basis)}.</p>'
    yield '<div class="tables">'
    for table in overview.tables:
        yield from _table(table)
    yield "</div><h2>How it was made</h2><table><tbody>"
    for name, value in overview.facts:
        yield f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>"
    yield "</tbody></table></body></html>"


def _figure(picture: Picture) -> str:
    record = picture.sample.record
    return (
        f'<figure><img alt="" src="{_data_uri(picture.image)}"><figcaption>'
        f'<p class="text" dir="auto">{_text(record["answer"])}</p>'
        f'<p class="small text" dir="auto">{_text(record["prompt"])}</p>'
        f'<p class="small"><bdi>{_text(record["id"])}</bdi> · {_text(picture.place)} · '
        f"{_text(picture.described)}</p>"
        "</figcaption></figure>"
    )


def _table(table: Table) -> Iterator[str]:
    most = max((count for _, count in table.rows), default=0) or 1
    yield f"<table><caption>{_text(table.title)}</caption><tbody>"
    for label, count in table.rows:
        bar = f'<div style="width:{100 * count / most:.1f}%"></div>'
        yield (
            f'<tr><td dir="auto">{_text(label)}</td><td class="number">{count:,}</td>'
            f'<td class="bar">{bar}</td></tr>'
        )
    yield "</tbody></table>"


def _text(text: str) -> str:
    return escape(text if len(text) <= _TEXT else text[:_TEXT] + "…")


def _data_uri(image: Image.Image) -> str:
    # Of a file that somebody published, nothing but the pixels is in the page.
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
