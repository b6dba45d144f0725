"""`train.py … --preflight`: every check, and no run."""

from __future__ import annotations

from collections.abc import Sequence

from composer.utils import dist, get_device

from vlm_composer.config import TrainConfig
from vlm_composer.config.loader import ConfigError
from vlm_composer.preflight.checks import Report, check_here, check_run
from vlm_composer.preflight.finding import Finding, Findings
from vlm_composer.preflight.ranks import check_ranks
from vlm_composer.preflight.report import describe, has_failed
from vlm_composer.training.hardware import choose_device

FLAG = "--preflight"


def preflight(yaml: str, overrides: Sequence[str]) -> int:
    """Run and print every check; train nothing, change nothing.

    Args:
        yaml: The training yaml.
        overrides: `key=value` items.

    Returns:
        The exit code, on every rank: 0, or 1 where a check failed.
    """
    report = _report(yaml, overrides)
    if dist.get_global_rank() == 0:
        print(describe(report))
    return 1 if has_failed(report) else 0


def _report(yaml: str, overrides: Sequence[str]) -> Report:
    try:
        config = TrainConfig.read(yaml, overrides)
    except ConfigError as error:  # without a yaml there is nothing to check the rest by
        return {"yaml": [Finding("failure", str(error))]}
    report: Report = {"yaml": [Finding("ok", yaml)]}
    device, wrong = "cpu", Findings()
    with wrong.failing():
        device = choose_device(config.device)
    ranks = {"ranks": list(check_ranks(device))}
    if wrong or has_failed(ranks):  # the ranks might wait for each other for ever
        alone = check_here(config, device, starting=False) if dist.get_global_rank() == 0 else ranks
        return report | alone | ({"device": list(wrong)} if wrong else {})
    dist.initialize_dist(get_device(device), timeout=config.dist_timeout)
    return report | check_run(config, device, starting=False)
