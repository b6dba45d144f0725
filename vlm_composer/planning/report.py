"""The plan of a run on GPUs as tables to read."""

from __future__ import annotations

from typing import Any

NOT_RUN = "computed, not run on a GPU"

_PARTS = {
    "towers": "towers",
    "gathered_units": "gathered units",
    "connector": "connector",
    "gradients": "gradients",
    "gradient_buckets": "gradient buckets",
    "adamw_moments": "AdamW moments",
    "activations": "activations",
    "total": "total",
}


def describe_gpus(planned: dict[str, Any]) -> list[str]:
    """Format what `plan` says of GPUs, line by line."""
    gpus, device = planned["gpus"], planned["device"]
    memory = planned["memory_bytes"]
    head = f"  {'':<18}" + "".join(f"{kind:>10}" for kind in memory)
    lines = [f"Memory of a rank, GiB ({NOT_RUN})", head]
    for part, text in _PARTS.items():
        sizes = "".join(f"{size[part] / 2**30:>10.2f}" for size in memory.values())
        lines.append(f"  {text:<18}{sizes}")
    kept = planned["activation_bytes"]["kept"] / 2**30
    lines += [
        f"  activations of {planned['microbatch']} samples: measured on fake tensors by forward "
        f"and backward, peak; {kept:.2f} between them.",
        "  An upper bound: eager blocks, prompts in the rows, nothing recomputed.",
        f"Parallelism on {gpus} × {device['name']}",
        f"  {planned['recommended'] or 'none fits'}: {planned['reason']}.",
        f"A step and an epoch on {gpus} × {device['name']} at {planned['mfu']:.0%} MFU ({NOT_RUN})",
        head,
    ]
    speeds = list(planned["speed"].values())
    sent = [speed["communication"] for speed in speeds]
    for text, values in (
        ("received, GB", [c["bytes"] / 1e9 for c in sent]),
        ("over nodes, GB", [c["bytes_between_nodes"] / 1e9 for c in sent]),
        ("on links, s", [c["seconds"] for c in sent]),
        ("step, s", [s["seconds_per_step"] for s in speeds]),
        ("samples/s", [s["samples_per_second"] for s in speeds]),
        ("epoch, h", [s["hours_per_epoch"] for s in speeds]),
        ("images/s a GPU", [s["images_per_second_per_gpu"] for s in speeds]),
        ("images/s a node", [s["images_per_second_per_node"] for s in speeds]),
    ):
        lines.append(f"  {text:<18}" + "".join(f"{value:>10.4g}" for value in values))
    lines.append(
        f"  links of {device['intra_node'] / 1e9:.0f} GB/s within a node and "
        f"{device['inter_node'] / 1e9:.4g} between nodes, a GPU, by the vendor"
    )
    lines.append(
        f"  an epoch of {planned['epoch_samples']:,} samples ({planned['epoch_samples_from']})"
    )
    if planned["cache_bytes"] is None:
        lines.append("Cache of shards\n  unknown: their index is not on this machine")
    else:
        lines.append(f"Cache of shards\n  {planned['cache_bytes'] / 1e9:.2f} GB a node")
    lines.append(f"  as features: {planned['features_bytes'] / 1e9:.0f} GB a node")
    lines += _describe_scaling(planned)
    return lines


def _describe_scaling(planned: dict[str, Any]) -> list[str]:
    lines = [
        f"On N × {planned['device']['name']} ({NOT_RUN})",
        f"  {'GPUs':>5} {'parallelism':<12}{'batch':>6}{'micro':>6}{'GiB':>7}{'samples/s':>11}"
        f"{'hours':>8}  limited by",
    ]
    for row in planned["scaling"]:
        start = f"  {row['gpus']:>5} {row['parallelism'] or 'none fits':<12}"
        start += f"{row['global_batch']:>6}{row['microbatch']:>6}"
        if row["parallelism"] is None:
            lines.append(start)
            continue
        lines.append(
            f"{start}{row['memory'] / 2**30:>7.1f}{row['samples_per_second']:>11,.0f}"
            f"{row['hours_per_epoch']:>8.3f}  {row['limited_by']}"
        )
    batch = planned["global_batch"]
    if any(row["global_batch"] != batch for row in planned["scaling"]):
        lines.append(
            f"  The yaml's batch is {batch}; where it does not divide, the next that does."
        )
    return lines
