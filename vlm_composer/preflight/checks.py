"""The checks of a run, in the order that they are told, and the ranks that they are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from composer.utils import dist

from vlm_composer.assembly import vision_settings
from vlm_composer.config import TrainConfig
from vlm_composer.data.leftovers import look_at_caches
from vlm_composer.loaders import caches_of, claim_data
from vlm_composer.preflight.disk import check_disk, check_shared_memory
from vlm_composer.preflight.finding import Finding, Findings
from vlm_composer.preflight.hardware import check_device, check_memory
from vlm_composer.preflight.prompts import check_prompts
from vlm_composer.preflight.ranks import Placement, check_batch, check_ranks, count_gpus
from vlm_composer.preflight.shards import Shards, Side, check_side, check_sides, read_shards
from vlm_composer.preflight.stores import check_load_path, check_save_folder
from vlm_composer.preflight.towers import (
    check_language_model,
    check_tokenizer,
    check_vision_tower,
)
from vlm_composer.training.ownership import check_ownership, take_ownership

Report = dict[str, list[Finding]]
"""What each check found, by its name, in the order of the report."""


def check_run(config: TrainConfig, device: str, *, starting: bool) -> Report:
    """Run the checks: rank 0 looks at where checkpoints go, a node's first rank at the rest.

    All ranks must call this, after they have met.

    Args:
        config: The run.
        device: "cpu" or "gpu".
        starting: The run starts: its folders and caches are locked and what killed runs hold of
            the caches is freed; an unavailable store is waited for, unless the run cannot start
            anyway; memory is not estimated, which would take seconds. Otherwise nothing is changed
            and nothing waited for.

    Returns:
        The same on every rank.
    """
    here = check_here(config, device, starting=starting) if dist.get_local_rank() == 0 else {}
    nodes = [report for report in dist.all_gather_object(here) if report]
    return _merged(nodes)


def check_here(config: TrainConfig, device: str, *, starting: bool) -> Report:
    """Run the checks that this rank is for, and ask no other; arguments as for `check_run`."""
    placement = Placement.of_this_rank()
    leads = placement.rank == 0
    towers = [
        check_vision_tower(config, reads_weights=leads),
        check_language_model(config, reads_weights=leads),
    ]
    # What is reckoned with a tower's configuration is left out where there is none to be had.
    known = all(finding.level == "ok" for found in towers for finding in found[-1:])
    report: dict[str, Findings] = {
        "ranks": check_ranks(placement, count_gpus(device)),
        "batch": check_batch(config, placement),
        "device": check_device(config, device),
        "vision tower": towers[0],
        "language model": towers[1],
        "tokenizer": check_tokenizer(config),
    }

    def patience() -> float:
        return config.store_timeout if starting and not _has_failed(report) else 0

    report["shards"], sides = _check_data(config, patience(), known=known)
    if report["tokenizer"] and not report["tokenizer"].has_failed:
        report["prompts"] = check_prompts(config)
    report["save folder"] = check_save_folder(config, patience()) if leads else Findings()
    report["load path"] = check_load_path(config, patience()) if leads else Findings()
    saves = leads and not report["save folder"].has_failed
    report["disk"] = check_disk(config, sides, checkpoints=saves and known)
    report["shared memory"] = check_shared_memory(config, sides) if known else Findings()
    if known and not starting:
        report["memory"] = check_memory(config, device)
    # A run that ends here takes nothing.
    starting = starting and not _has_failed(report)
    report["leftovers"] = _check_leftovers(config, take=starting)
    if leads:
        report["run folder"] = _check_ownership(config, take=starting)
    return {name: list(found) for name, found in report.items() if found}


def _check_data(
    config: TrainConfig, seconds: float, *, known: bool
) -> tuple[Findings, Mapping[str, Side]]:
    found = Findings()
    sides: dict[str, dict[str, Shards]] = {side: {} for side in config.loaders}
    for side, loader in config.loaders.items():
        for key, source in loader.sources.items():
            with found.failing():
                sides[side][key] = read_shards(source, 0 if found.has_failed else seconds)
        with found.failing():
            vision = vision_settings(config) if known else None
            left = 0 if found.has_failed else seconds
            found += check_side(config, side, sides[side], vision, left)
    if all(sides.values()) and "eval" in sides:
        found += check_sides(sides["train"], sides["eval"])
    return found, sides


def _has_failed(report: Mapping[str, Findings]) -> bool:
    return any(found.has_failed for found in report.values())


def _check_leftovers(config: TrainConfig, *, take: bool) -> Findings:
    found, caches = Findings(), caches_of(config)
    if not caches:
        return found
    with found.failing():
        left = look_at_caches(caches) if not take else []
        if take:
            claim_data(config)
        for text in left:
            found.warn(text, "the next run that is started frees them")
        if not left:
            found.ok(f"no other run uses {', '.join(caches)}")
    return found


def _check_ownership(config: TrainConfig, *, take: bool) -> Findings:
    found = Findings()
    with found.failing():
        (take_ownership if take else check_ownership)(config)
    return found


def _merged(nodes: Sequence[Report]) -> Report:
    """One report of those of all nodes; what is not found on all of them names its node."""
    merged: Report = {}
    for name in dict.fromkeys(name for report in nodes for name in report):
        asked = [number for number, report in enumerate(nodes) if name in report]
        findings = dict.fromkeys(f for number in asked for f in nodes[number][name])
        merged[name] = []
        for finding in findings:
            on = [number for number in asked if finding in nodes[number][name]]
            where = "" if on == asked else f"node {', '.join(map(str, on))}: "
            merged[name].append(Finding(finding.level, where + finding.text, finding.advice))
    return merged
