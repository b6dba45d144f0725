"""A card of a checkpoint that somebody else made: each of its texts may be hostile."""

from types import SimpleNamespace

import pytest
import yaml
from markdown_it import MarkdownIt

from hostile_json import leaves, replaced
from vlm_composer.export.model_card import model_card

HOSTILE = {
    "<script>alert(1)</script>": "<script>alert(1)</script>",
    "![x](http://evil.example/x) | `y` ``z`` \\": "![x](http://evil.example/x) | `y` ``z`` \\",
    "x\n---\nlicense: mit\n# y\r\n| z |\n\u202e\x1b[31m": (
        "x⏎---⏎license: mit⏎# y\\r⏎| z |⏎\\u202e\\x1b[31m"
    ),
    "- *x* _y_ **z** ~~w~~ &lt; : #": "- *x* _y_ **z** ~~w~~ &lt; : #",
}
"""Texts, and how a reader sees them."""


def benign() -> dict:
    hashes = {"weights_hash": "abc", "dtype": "bfloat16"}
    return {
        "checkpoint": "ep0-ba4.safetensors",
        "towers": {"vision_tower": hashes, "language_model": hashes},
        "config": {
            "vision_tower": {"name": "google/siglip", "revision": "main"},
            "language_model": {"name": "Qwen/Qwen3", "revision": "main"},
        },
        "connector": {"parameters": 1234, "resampler": {"num_latents": 64}},
        "with_towers": False,
        "default_prompt": "<image>\nWho?",
        "default_prompt_is": "as given to the export",
        "run": {
            "run_name": "tiny",
            "batches": 4,
            "global_train_batch_size": 8,
            "max_duration": "1ep",
            "optimizer": {"lr": "x"},
            "scheduler": {"name": "x"},
            "precision": "fp32",
            "seed": "x",
            "data": {"names": ["x"], "samples": "x"},
            "metrics": {"loss": 1.5},
            "versions": {"torch": "2.7.0+cpu"},
        },
    }


def read(facts: dict) -> tuple[dict, list, str]:
    """The head of a card, its structure without texts, and its texts."""
    config = SimpleNamespace(towers=facts["config"])
    vision = SimpleNamespace(image_size=384, image_decoder="torchvision")
    card = model_card(facts, config, vision)
    assert all(line.isprintable() for line in card.split("\n"))
    _, head, body = card.split("---\n", 2)
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body)
    inline = [child for token in tokens for child in token.children or ()]
    kinds = [(t.type, t.tag, t.level) for t in tokens]
    kinds += [(t.type, t.tag, t.attrs) for t in inline if t.type not in ("text", "softbreak")]
    return yaml.safe_load(head), kinds, "\n".join(t.content for t in inline)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_value_changes_the_structure(text):
    facts = benign()
    head, structure, _ = read(facts)
    tried = 0
    for place in leaves(facts):
        value = facts
        for part in place:
            value = value[part]
        if isinstance(value, str):
            hostile_head, found, shown = read(replaced(facts, place, text))
            assert found == structure, place
            assert hostile_head.keys() == head.keys(), place
            names = [facts["config"][part]["name"] for part in facts["config"]]
            if place[0] == "config" and place[-1] == "name":
                names[[*facts["config"]].index(place[1])] = text
            assert hostile_head["base_model"] == names
            prompt = place == ("default_prompt",)
            assert (repr(text) if prompt else HOSTILE[text]) in shown, place
            tried += 1
    assert tried == 20
