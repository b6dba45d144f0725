"""`train.py … --preflight`: every check, and no run."""

from __future__ import annotations

from collections.abc import Sequence

from composer.utils import dist

from vlm_composer.config import TrainConfig
from vlm_composer.config.loader import ConfigError
from vlm_composer.planning.choose import choose_parallelism
from vlm_composer.preflight.checks import Report, check_here, check_run
from vlm_composer.preflight.finding import Finding, Findings
from vlm_composer.preflight.ranks import Placement, check_ranks, count_gpus
from vlm_composer.preflight.report import describe, has_failed
from vlm_composer.training.contact import join_ranks
from vlm_composer.training.hardware import choose_device

FLAG = "--preflight"


def preflight(yaml: str, overrides: Sequence[str]) -> int:
    """Run and print every check; train nothing, change nothing.

    Args:
        yaml: The training yaml.
        overrides: `key=value` items.

    Returns:
        The exit code: 1 on the first rank of a node where a check failed, else 0. The launcher ends
        all ranks as soon as one of them fails, also one that is still printing.
    """
    leads_node = dist.get_local_rank() == 0
    try:
        config = TrainConfig.read(yaml, overrides)
    except ConfigError as error:  # without a yaml there is nothing to check the rest by
        if leads_node:
            print(describe({"yaml": [Finding("failure", str(error))]}))
        return 1 if leads_node else 0
    report: Report = {"yaml": [Finding("ok", yaml)]}
    device, no_device, undecided = "cpu", Findings(), Findings()
    with no_device.failing():
        device = choose_device(config.device)
    ranks = check_ranks(Placement.of_this_rank(), count_gpus(device))
    if not no_device and not has_failed({"ranks": ranks}):
        with ranks.failing():
            join_ranks(device, config.dist_timeout)
    if no_device or has_failed({"ranks": ranks}):
        # The ranks do not meet: each node's first one looks by itself.
        if not leads_node:
            return 0
        report |= check_here(config, device, starting=False)
        report["ranks"] = list(ranks)
        if no_device:
            report["device"] = list(no_device)
        print(describe(report))
        return 1
    with undecided.failing():
        config = choose_parallelism(config, device)
    report |= check_run(config, device, starting=False)
    if undecided:
        report["parallelism"] = list(undecided)
    if dist.get_global_rank() == 0:
        print(describe(report))
    return 1 if leads_node and has_failed(report) else 0
