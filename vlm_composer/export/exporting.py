"""From a checkpoint to a Hugging Face folder."""

from __future__ import annotations

import inspect
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from vlm_composer.assembly import (
    assemble_model,
    assemble_template,
    language_config,
    vision_settings,
    vision_warnings,
)
from vlm_composer.config import TrainConfig
from vlm_composer.data.features import VisionSettings
from vlm_composer.data.schema import IMAGE_PLACEHOLDER
from vlm_composer.data.template import Template, check_token_ids
from vlm_composer.export.code_files import auto_map, code_files
from vlm_composer.export.described import (
    DTYPES,
    ExportDtype,
    configuration_of,
    model_config,
    name_of,
    read_run,
)
from vlm_composer.export.facts import DEFAULT_PROMPT, commonest_prompt, run_facts, trained_on
from vlm_composer.export.model_card import model_card
from vlm_composer.export.remote_code.configuration_vlm_composer import VLMComposerConfig
from vlm_composer.export.remote_code.image_processing_vlm_composer import (
    VLMComposerImageProcessor,
)
from vlm_composer.export.remote_code.modeling_vlm_composer import (
    VLMComposerForConditionalGeneration,
)
from vlm_composer.export.remote_code.processing_vlm_composer import VLMComposerProcessor
from vlm_composer.models.tower_check import check_language_model
from vlm_composer.training.checkpoint_file import (
    CheckpointError,
    CheckpointFile,
    hash_tensor,
    load_connector,
)
from vlm_composer.training.checkpoint_folder import open_named
from vlm_composer.training.exported_connector import FACTS_FILE, FORMAT, WEIGHTS_FILE
from vlm_composer.training.towers_identity import Identity, check_towers, hash_weights

log = logging.getLogger(__name__)


def export_checkpoint(
    checkpoint: str,
    out: str | Path,
    *,
    yaml: str | Path | None = None,
    with_towers: bool = False,
    dtype: ExportDtype = "trained",
    prompt: str | None = None,
) -> Path:
    """Write a folder that transformers loads.

    Args:
        checkpoint: A checkpoint, or a folder or URL for the newest in it.
        out: The folder; it must be empty or not exist. It appears whole or not at all.
        yaml: The run's, in place of the settings that the checkpoint has.
        with_towers: Write the towers' weights too; otherwise the folder names the towers.
        dtype: Of the weights. "trained": the connector's fp32, and the towers' as they were.
        prompt: What the export asks by default, with one <image>; None for the commonest of the
            training data where its quality.json is at hand.

    Returns:
        The folder.

    Raises:
        CheckpointError: The checkpoint is damaged, or of another connector or other towers than
            those that are found.
        ValueError: The folder is not empty, or the towers cannot be exported.
        OSError: Something cannot be read or written.
    """
    if prompt is not None and prompt.count(IMAGE_PLACEHOLDER) != 1:
        raise ValueError(
            f"the prompt {prompt!r} has {prompt.count(IMAGE_PLACEHOLDER)} × {IMAGE_PLACEHOLDER}; "
            "give it one"
        )
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder, opened = open_named(checkpoint, Path(scratch))
            if not {"settings", "towers"} <= opened.document.keys() or "connector" in (
                opened.document
            ):
                raise CheckpointError(f"{opened.url} is not a checkpoint of a training run")
            log.info("Exporting %s.", name_of(opened.document))
            _write(opened, partial, yaml, with_towers, dtype, prompt)
            folder.done_with(opened)
        partial.chmod(0o755)
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def _write(
    checkpoint: CheckpointFile,
    out: Path,
    yaml: str | Path | None,
    with_towers: bool,
    dtype: ExportDtype,
    prompt: str | None,
) -> None:
    document = checkpoint.document
    identity: Identity = document["towers"]
    config = read_run(checkpoint, yaml)
    template = assemble_template(config)
    _check_towers(config, template)
    # Without weights: their names, shapes and configurations are looked at.
    model = assemble_model(config, "cpu", template.image_token_id, empty_towers=True)
    load_connector(model, checkpoint)
    here = {
        "vision_tower": configuration_of(config.vision_tower, model.vision_tower.model),
        "language_model": configuration_of(config.language_model, model.language_model.model),
    }
    check_towers(identity, here, checkpoint.path, ("config_hash",))

    hf_config = model_config(config, model, identity, dtype)
    commonest, why = commonest_prompt(trained_on(document, config))
    default_prompt = prompt or commonest or DEFAULT_PROMPT
    if prompt:
        why = "as given to the export"
    elif commonest is None:
        why = f"a default, for {why}; --prompt gives another"
    log.log(
        logging.INFO if prompt or commonest else logging.WARNING,
        "Default prompt: %r, %s.", default_prompt, why,
    )  # fmt: skip
    _write_processor(config, template, default_prompt, out)
    language_model = model.language_model.model
    eos = template.tokenizer.eos_token_id
    pad = template.tokenizer.pad_token_id
    GenerationConfig(
        do_sample=False,
        max_new_tokens=64,
        bos_token_id=template.tokenizer.bos_token_id,
        eos_token_id=eos,
        pad_token_id=eos if pad is None else pad,
        suppress_tokens=[model.image_token_id],  # as in training's captions
        # Mamba's cache is of another kind, which transformers gives to its own models alone.
        use_cache="past_key_values" in inspect.signature(language_model.forward).parameters,
    ).save_pretrained(out)
    for name, text in code_files().items():
        (out / name).write_text(text, encoding="utf-8")

    connector = {f"connector.{n}": p for n, p in model.connector.state_dict().items()}
    connector = {
        name: tensor.to(DTYPES.get(dtype, tensor.dtype)).contiguous()
        for name, tensor in connector.items()
    }
    save_file(connector, out / WEIGHTS_FILE, {"format": "pt"})
    hf_config.save_pretrained(out)
    if with_towers:
        _write_everything(out, hf_config, connector, identity, checkpoint.path, dtype)
    facts = {
        "format": FORMAT,
        "checkpoint": name_of(document),
        "towers": identity,
        "connector": {
            **asdict(config.connector),
            "dtype": str(next(iter(connector.values())).dtype).removeprefix("torch."),
            "parameters": sum(tensor.numel() for tensor in connector.values()),
            "hashes": {name: hash_tensor(tensor) for name, tensor in connector.items()},
        },
        "with_towers": with_towers,
        "default_prompt": default_prompt,
        "prompt_is_the_commonest": default_prompt == commonest,
        "default_prompt_is": why,
        "run": run_facts(checkpoint, config, is_users=yaml is not None),
    }
    (out / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(
        model_card(facts, hf_config, vision_settings(config)), encoding="utf-8"
    )


def _check_towers(config: TrainConfig, template: Template) -> None:
    """Refuse another model's tokenizer, and warn of what is assumed of images."""
    tower = config.language_model
    rows = check_language_model(tower.name, language_config(config))
    name = tower.tokenizer or tower.name
    check_token_ids(template.tokenizer, rows, name=name, language_model=tower.name)
    for warning in vision_warnings(config):
        log.warning("%s; %s.", *warning)


def _write_processor(config: TrainConfig, template: Template, prompt: str, out: Path) -> None:
    vision: VisionSettings = vision_settings(config)
    image_processor = VLMComposerImageProcessor(
        size={"height": vision.image_size, "width": vision.image_size},
        image_mean=list(vision.image_mean),
        image_std=list(vision.image_std),
        resample=vision.resample,
        auto_map=auto_map("AutoImageProcessor", "AutoProcessor"),
    )
    tokenizer = template.tokenizer
    tokenizer.padding_side = "left"
    processor = VLMComposerProcessor(
        image_processor,
        tokenizer,
        num_image_tokens=template.num_image_tokens,
        add_bos=config.add_bos,
        max_seq_len=template.max_seq_len,
        default_prompt=prompt,
    )
    processor.auto_map = auto_map("AutoProcessor")
    processor.save_pretrained(out)


def _write_everything(
    out: Path,
    hf_config: VLMComposerConfig,
    connector: Mapping[str, torch.Tensor],
    identity: Identity,
    path: Path,
    dtype: ExportDtype,
) -> None:
    """Replace the connector alone by the whole model, once its towers are those of the run."""
    dtypes = {part: getattr(torch, found["dtype"]) for part, found in identity.items()}
    widest = torch.float32 if torch.float32 in dtypes.values() else torch.bfloat16
    model = VLMComposerForConditionalGeneration.from_pretrained(out, torch_dtype=widest)
    assert hf_config.towers is not None
    for part, trained in dtypes.items():
        tower = getattr(model, part)
        found = {
            **identity[part],
            "name": hf_config.towers[part]["name"],
            "revision": hf_config.towers[part]["revision"],
            "weights_hash": hash_weights(tower, prefix="model.", dtype=trained),
        }
        check_towers({part: identity[part]}, {part: found}, path)
        tower.to(DTYPES.get(dtype, trained))
    model.load_state_dict(connector, strict=False, assign=True)
    (out / WEIGHTS_FILE).unlink()
    model.save_pretrained(out)
    written = VLMComposerConfig.from_pretrained(out)
    written.torch_dtype = hf_config.torch_dtype  # transformers takes that of the first parameter
    written.save_pretrained(out)
