"""The README.md of an export: what the run's checkpoint says, and nothing that it does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm_composer.data.features import VisionSettings

ENGINES = (
    "transformers runs this model through the code in this folder (`trust_remote_code=True`). No "
    "inference engine was tried. vLLM, SGLang, TGI, TensorRT-LLM, llama.cpp and Ollama have no "
    "code for this architecture, a perceiver resampler followed by an MLP between two towers of "
    "choice; the resamplers that some of them know, such as MiniCPM-V's, have another layout. "
    "vLLM also has a backend for models of transformers that follow rules of its own: this one was "
    "not written to them."
)
"""Which engines do not know a resampler; the project's README says the same."""


def model_card(facts: Mapping[str, Any], config: Any, vision: VisionSettings) -> str:
    """Write the card.

    Args:
        facts: What `vlm_composer.json` says.
        config: The model's configuration.
        vision: How the vision tower saw its images.

    Returns:
        Markdown.
    """
    return "\n".join(_lines(facts, config, vision)) + "\n"


def _lines(facts: Mapping[str, Any], config: Any, vision: VisionSettings) -> Iterator[str]:
    run, towers, connector = facts["run"], facts["towers"], facts["connector"]
    yield from ("---", "library_name: transformers", "pipeline_tag: image-text-to-text")
    # A folder's name means nothing elsewhere, and may tell more than is wanted.
    named = [config.towers[part]["name"] for part in towers]
    if hub_ids := [name for name in named if not Path(name).is_absolute()]:
        yield from ("base_model:", *(f"  - {name}" for name in hub_ids))
    yield from ("tags:", "  - vlm_composer", "---", "")
    yield f"# {run['run_name']}"
    yield ""
    yield (
        "A connector (perceiver resampler and MLP) between a frozen vision tower and a frozen "
        f"language model, trained with vlm_composer: checkpoint `{facts['checkpoint']}`. It "
        "describes images in the way of its training captions; it was not trained to follow "
        "instructions."
    )
    yield from ("", "| part | what | revision | dtype in training | weights (xxh3-128) |")
    yield "| --- | --- | --- | --- | --- |"
    for part, found in towers.items():
        at = config.towers[part]
        yield (
            f"| {part} | `{at['name']}` | {at['revision'] or 'not recorded'} | {found['dtype']} | "
            f"`{found['weights_hash']}` |"
        )
    yield (
        f"| connector | {connector['parameters']:,} parameters, "
        f"{connector['resampler']['num_latents']} tokens an image | | float32 | in "
        "`vlm_composer.json` |"
    )
    yield ""
    if facts["with_towers"]:
        yield "The weights of all three parts are in this folder."
    else:
        yield (
            "This folder holds the weights of the connector only; the towers are loaded from where "
            "the table says. If they are elsewhere, say so: "
            "`from_pretrained(DIR, vision_tower=…, language_model=…)`. They are not compared with "
            "the hashes when they are loaded."
        )
    yield from ("", "## Use", "", *_USE, "")
    source = facts["default_prompt_is"]
    yield f"Without a text the processor asks {facts['default_prompt']!r}: {source}."
    yield (
        f"Images are scaled to {vision.image_size} × {vision.image_size} by PIL, whole and without "
        "keeping their aspect ratio; what is transparent becomes white."
        + (
            " In training torchvision scaled them, which differs by up to 2 of 255 grey levels."
            if vision.image_decoder == "torchvision"
            else ""
        )
    )
    yield from ("", ENGINES, "", "## Run", "", "| | |", "| --- | --- |")
    batch_size = run["global_train_batch_size"]
    yield f"| optimizer steps | {run['batches']:,}, of {batch_size} samples each |"
    yield f"| planned length | {run['max_duration']} |"
    yield f"| optimizer | {_pairs(run['optimizer'])} |"
    yield f"| schedule | {_pairs(run['scheduler'])} |"
    yield f"| precision, seed | {run['precision']}, {run['seed']} |"
    data = run["data"]
    rest = {key: value for key, value in data.items() if key != "names"}
    yield f"| data | {', '.join(f'`{name}`' for name in data['names'])}; {_pairs(rest)} |"
    for words, value in run["metrics"].items():
        yield f"| {words} | {value:.4f} |"
    if not run["metrics"]:
        yield "| losses | not known: the run's metrics were not at hand when this was written |"
    yield f"| versions | {_pairs(run['versions'])} |"
    yield from ("", "## Licence", "")
    yield (
        "Not stated: nobody has said yet under which licence this connector is published. Write it "
        "here before you publish it. The towers and "
        "the data have their own."
    )


def _pairs(entries: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in entries.items())


_USE = """\
```python
from PIL import Image
from transformers import AutoModelForVision2Seq, AutoProcessor

model = AutoModelForVision2Seq.from_pretrained(
    "DIR", trust_remote_code=True, torch_dtype="auto")
processor = AutoProcessor.from_pretrained("DIR", trust_remote_code=True)
batch = processor(images=[Image.open("picture.jpg")]).to(model.device)
print(processor.captions_of(model.generate(**batch), batch))
```""".splitlines()
