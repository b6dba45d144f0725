"""The README.md of an export: what the run's checkpoint says, and nothing that it does not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_composer.data.features import VisionSettings
from vlm_composer.rendering import load_templates, markdown

_TEMPLATES = load_templates(Path(__file__).parent, markdown)


def model_card(facts: Mapping[str, Any], config: Any, vision: VisionSettings) -> str:
    """Return the card.

    Args:
        facts: What `vlm_composer.json` says.
        config: The model's configuration.
        vision: How the vision tower saw its images.

    Returns:
        Markdown, in which every value from the checkpoint is escaped.
    """
    # A folder's name means nothing elsewhere, and may tell more than is wanted.
    names = [config.towers[part]["name"] for part in facts["towers"]]
    data = {key: value for key, value in facts["run"]["data"].items() if key != "names"}
    return _TEMPLATES.get_template("model_card.md.jinja").render(
        facts=facts,
        run=facts["run"],
        towers=config.towers,
        hub_ids=[name for name in names if not Path(name).is_absolute()],
        default_prompt=repr(facts["default_prompt"]),
        data=data,
        vision=vision,
        pairs=_pairs,
    )


def _pairs(entries: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in entries.items())
