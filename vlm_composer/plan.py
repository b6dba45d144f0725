"""What a yaml asks for, without weights: `python -m vlm_composer.plan YAML [key=value …] [--json]`.

Builds the model on torch's meta device and prints the parameters of each part, the size of a
checkpoint, the operations of a training sample, and what N GPUs of a kind would take: memory of a
rank by part, communication, time of an epoch, and which `parallelism` to choose. Works offline for
the towers whose configurations ship with the project. Nothing of it was run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from vlm_composer.assembly import assemble_model, unloaded
from vlm_composer.config import TrainConfig
from vlm_composer.config.loader import ConfigError
from vlm_composer.models.flops import training_flops
from vlm_composer.plain_text import say
from vlm_composer.planning.activations import ANSWER_TOKENS, PROMPT_TOKENS
from vlm_composer.planning.devices import DEVICES, find_device
from vlm_composer.planning.estimate import Cluster
from vlm_composer.planning.on_gpus import microbatch_size, plan_on_gpus
from vlm_composer.planning.report import describe_gpus
from vlm_composer.planning.scaling import check_batch
from vlm_composer.training.freezing import count_parameters, parts

CHECKPOINT_BYTES_PER_PARAMETER = 12
"""fp32 weight and AdamW's two moments of a trained parameter; frozen ones are not saved."""


def plan(
    config: TrainConfig,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    answer_tokens: int = ANSWER_TOKENS,
    gpus: int | None = None,
    gpus_per_node: int = 8,
    device: str = "h100",
    mfu: float = 0.45,
) -> dict[str, Any]:
    """Describe a run without loading or drawing a weight.

    Args:
        config: The run; towers are planned from their configurations, whatever `pretrained` says.
        prompt_tokens: Text tokens of a sample before its answer.
        answer_tokens: Answer tokens of a sample, end-of-text included.
        gpus: Ranks (N); None leaves out all that depends on GPUs.
        gpus_per_node: Of them in a node.
        device: One of `planning.devices.DEVICES`.
        mfu: Share of the device's peak that is assumed to be reached.

    Returns:
        `parameters` by part with `connector`, `trainable` and `frozen` sums, `trained` (which
        parts), `checkpoint_bytes`, `tokens_per_sample`, `training_flops_per_sample` by part with
        `total`; with `gpus`, also what `plan_on_gpus` returns.

    Raises:
        ValueError: The device is unknown, or the global batch does not divide over the GPUs and
            their micro-batches.
    """
    config = unloaded(config)
    for tower in (config.vision_tower, config.language_model):
        # Every GPU of the table multiplies bf16 in hardware; this machine may not.
        tower.dtype = "bf16" if tower.dtype == "auto" else tower.dtype
    cluster = None
    if gpus is not None:
        cluster = Cluster(find_device(device), gpus, gpus_per_node, mfu)
        check_batch(config.global_train_batch_size, gpus, microbatch_size(config, gpus))
    with torch.device("meta"):
        model = assemble_model(config, device="gpu")
    by_part = {name: count_parameters(module) for name, module in parts(model).items()}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens = prompt_tokens + config.connector.resampler.num_latents + answer_tokens
    flops = training_flops(model, [tokens], answer_tokens)
    planned = {
        "parameters": {
            **by_part,
            "connector": by_part["resampler"] + by_part["projector"],
            "trainable": trainable,
            "frozen": count_parameters(model) - trainable,
        },
        "trained": [
            n for n, m in parts(model).items() if any(p.requires_grad for p in m.parameters())
        ],
        "checkpoint_bytes": CHECKPOINT_BYTES_PER_PARAMETER * trainable,
        "tokens_per_sample": {
            "prompt": prompt_tokens,
            "image": config.connector.resampler.num_latents,
            "answer": answer_tokens,
        },
        "training_flops_per_sample": {**asdict(flops), "total": flops.total},
    }
    if cluster is not None:
        planned |= plan_on_gpus(config, model, flops, cluster, (prompt_tokens, answer_tokens))
    return planned


def describe(planned: dict[str, Any]) -> str:
    """Format what `plan` returns as tables."""
    counts = planned["parameters"]
    lines = ["Parameters"]
    for name in [n for n in counts if n not in ("connector", "trainable", "frozen")]:
        state = "trained" if name in planned["trained"] else "frozen"
        lines.append(f"  {name:<14}{counts[name]:>16,}  {state}")
    for name in ("connector", "trainable", "frozen"):
        lines.append(f"  {name:<14}{counts[name]:>16,}")
    lines.append(
        f"Checkpoint\n  {planned['checkpoint_bytes'] / 1e9:.2f} GB "
        f"({CHECKPOINT_BYTES_PER_PARAMETER} bytes a trained parameter)"
    )
    tokens = planned["tokens_per_sample"]
    lines.append(
        f"Training FLOPs a sample ({tokens['prompt']} prompt + {tokens['image']} image + "
        f"{tokens['answer']} answer tokens, assumed)"
    )
    for name, flops in planned["training_flops_per_sample"].items():
        lines.append(f"  {name:<14}{flops / 1e12:>16.3f}  TFLOP")
    return "\n".join(lines + (describe_gpus(planned) if "gpus" in planned else []))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vlm_composer.plan")
    add_arguments(parser)
    return run(parser.parse_intermixed_args(arguments))  # overrides may stand behind options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and its arguments to a parser."""
    parser.description = __doc__
    parser.add_argument("yaml", help="a training yaml, for example yamls/stage1.yaml")
    parser.add_argument("overrides", nargs="*", default=[], help="key=value, as for train.py")
    parser.add_argument(
        "--prompt-tokens", type=int, default=PROMPT_TOKENS, help="text tokens before the answer"
    )
    parser.add_argument(
        "--answer-tokens", type=int, default=ANSWER_TOKENS, help="answer tokens with end-of-text"
    )
    parser.add_argument("--gpus", type=int, default=1, help="ranks (default 1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="of them in a node (8)")
    parser.add_argument("--device", default="h100", help=f"{', '.join(DEVICES)} (h100)")
    parser.add_argument("--mfu", type=float, default=0.45, help="share of the peak assumed (0.45)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print the plan as `add_arguments` describes; return 1 where there is none."""
    try:
        config = TrainConfig.read(options.yaml, options.overrides)
        planned = plan(
            config,
            prompt_tokens=options.prompt_tokens,
            answer_tokens=options.answer_tokens,
            gpus=options.gpus,
            gpus_per_node=options.gpus_per_node,
            device=options.device,
            mfu=options.mfu,
        )
    except (ConfigError, ValueError, OSError) as error:
        say(error)
        return 1
    print(json.dumps(planned, indent=2) if options.json else describe(planned))
    return 0


if __name__ == "__main__":
    sys.exit(main())
