"""Builds LLaVA data sets out of real images, good and bad, and converts them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from convert import Summary, convert_llava, convert_pairs
from convert.sources import LlavaJson


def jpeg(number: int = 0, width: int = 32, height: int = 24) -> bytes:
    """A JPEG whose colours depend on `number`, and whose bytes no other number has."""
    image = Image.radial_gradient("L").resize((width, height))
    colours = ((number * 37) % 256, (number * 101) % 256, (number * 197) % 256)
    image = Image.merge("RGB", [image.point(lambda v, c=c: (v + c) % 256) for c in colours])
    buffer = BytesIO()
    image.save(buffer, "JPEG", comment=str(number))
    return buffer.getvalue()


@dataclass
class Pairs:
    """A LLaVA data set under construction.

    `items` is what its JSON will hold. `out` is a folder to convert it to.
    """

    folder: Path
    items: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.json_path = self.folder / "pairs.json"
        self.images = self.folder / "images"
        self.images.mkdir()
        self.out = self.folder / "out"

    def add(self, count: int = 1, **fields: Any) -> dict[str, Any]:
        """Adds good items, each with an image of its own, except for what `fields` replaces.

        Returns:
            The last item.
        """
        for number in range(len(self.items), len(self.items) + count):
            name = f"{number // 1000:05}/{number:09}.jpg"
            self.write_image(name, jpeg(number))
            item = {
                "id": f"{number:09}",
                "image": name,
                "conversations": [
                    {"from": "human", "value": f"Describe picture {number}.\n<image>"},
                    {"from": "gpt", "value": f"picture number {number}"},
                ],
            }
            self.items.append(item | fields)
        return self.items[-1]

    def write_image(self, name: str, data: bytes) -> None:
        """Writes a file under the images root."""
        path = self.images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def write_json(self) -> Path:
        """Writes the items. Lone surrogates become escapes, as they are in the wild.

        A file that holds them already is left as it is: a conversion goes on with no other.
        """
        text = json.dumps(self.items)
        if not self.json_path.exists() or self.json_path.read_text() != text:
            self.json_path.write_text(text)
        return self.json_path

    def convert(self, out: str | Path | None = None, **settings: Any) -> Summary:
        """Writes the JSON and converts it, to `self.out` unless told otherwise."""
        settings = {"show_progress": False, **settings}
        return convert_llava(self.write_json(), self.images, out or self.out, **settings)

    def rejects(self) -> list[dict[str, Any]]:
        """The lines of `self.out`/rejects.jsonl."""
        return [json.loads(line) for line in (self.out / "rejects.jsonl").read_text().splitlines()]

    def read(self, side: str, remote: str | None = None) -> list[dict[str, Any]]:
        """All samples of a side, in their order, through a real StreamingDataset.

        Args:
            side: "train" or "eval".
            remote: The URL that was converted to, where it was not `self.out`.
        """
        from streaming import StreamingDataset

        dataset = StreamingDataset(
            local=str((self.folder / "cache" if remote else self.out) / side),
            remote=f"{remote}/{side}" if remote else None,
            validate_hash="xxh64" if remote else None,
            shuffle=False,
            batch_size=1,
        )
        return [dataset[index] for index in range(len(dataset))]

    def ids(self, side: str, remote: str | None = None) -> list[str]:
        """The ids of a side's samples, in their order."""
        return [sample["id"] for sample in self.read(side, remote)]

    def files(self) -> list[str]:
        """Everything in `self.out`, sorted."""
        return sorted(
            path.relative_to(self.out).as_posix() for path in self.out.rglob("*") if path.is_file()
        )


@pytest.fixture(scope="session")
def pairs_in() -> Callable[[Path], Pairs]:
    """Begins a data set in a folder."""
    return Pairs


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    """An empty data set under construction."""
    return Pairs(tmp_path)


@pytest.fixture
def put_in_bucket() -> Callable[[Path, str], None]:
    """Copies all files below a folder to a URL."""
    from vlm_composer.storage import open_store

    def put(folder: Path, url: str) -> None:
        store = open_store(url)
        for path in folder.rglob("*"):
            if path.is_file():
                store.put(path, path.relative_to(folder).as_posix())

    return put


@pytest.fixture
def two_sources(pairs: Pairs) -> Pairs:
    """A data set of two sources, `first` and `second`, of 16 and 24 samples in small shards."""
    pairs.add(40)
    sources = []
    for name, items in (("first", pairs.items[:16]), ("second", pairs.items[16:])):
        path = pairs.folder / f"{name}.json"
        path.write_text(json.dumps(items))
        sources.append(LlavaJson(path, pairs.images, 1 << 12, name))
    convert_pairs(sources, pairs.out, eval_ratio=0.25, size_limit=1 << 12, show_progress=False)
    return pairs
