"""The code that an exported folder carries: copies of this project's own modules.

A copy differs from its source in where it imports from: transformers wants all files in one folder,
importing each other relatively.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ENTRIES = ("configuration", "modeling", "image_processing", "processing")
"""Modules that transformers asks for; what they import of this project comes along."""
_IMPORT = re.compile(r"^from (vlm_composer(?:\.\w+)*)\.(\w+) import", re.MULTILINE)


def code_files() -> dict[str, str]:
    """File name → contents of all code that an export carries."""
    package = "vlm_composer.export.remote_code"
    waiting = [f"{package}.{entry}_vlm_composer" for entry in ENTRIES]
    sources: dict[str, str] = {}
    while waiting:
        module = waiting.pop()
        if module in sources:
            continue
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        sources[module] = Path(spec.origin).read_text(encoding="utf-8")
        waiting += [f"{parent}.{name}" for parent, name in _IMPORT.findall(sources[module])]
    names = [module.rpartition(".")[2] for module in sources]
    assert len(set(names)) == len(names), f"two modules of one name: {sorted(names)}"
    files = {}
    for module, source in sources.items():
        text = _IMPORT.sub(r"from .\2 import", source)
        assert not re.search(r"^\s*(from|import) vlm_composer", text, re.MULTILINE), module
        files[f"{module.rpartition('.')[2]}.py"] = text
    return files


def auto_map(*kinds: str) -> dict[str, str]:
    """transformers' `auto_map` entries for some of its Auto classes."""
    classes = {
        "AutoConfig": "configuration_vlm_composer.VLMComposerConfig",
        "AutoModelForVision2Seq": "modeling_vlm_composer.VLMComposerForConditionalGeneration",
        "AutoModelForImageTextToText": "modeling_vlm_composer.VLMComposerForConditionalGeneration",
        "AutoImageProcessor": "image_processing_vlm_composer.VLMComposerImageProcessor",
        "AutoProcessor": "processing_vlm_composer.VLMComposerProcessor",
    }
    return {kind: classes[kind] for kind in kinds}
