"""Loggers: the program's own log lines, and where metrics go."""

from __future__ import annotations

import logging
import netrc
import os
from dataclasses import asdict
from urllib.parse import urlsplit

from composer.loggers import LoggerDestination
from composer.utils import dist

from vlm_composer.config import TrainConfig
from vlm_composer.config.reports import WandBConfig
from vlm_composer.evaluation.warnings import LiveWarnings
from vlm_composer.outages import best_effort
from vlm_composer.plain_text import PlainFormatter
from vlm_composer.training.metrics_file import MetricsFile
from vlm_composer.training.wandb_logging import DispensableWandB

log = logging.getLogger(__name__)


def log_to_stderr() -> None:
    """Show the project's own log lines, on rank 0; warnings on every rank."""
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("vlm_composer")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if dist.get_global_rank() == 0 else logging.WARNING)


def build_loggers(config: TrainConfig) -> list[LoggerDestination]:
    """Make what the yaml asks for of that which takes in every metric."""
    loggers: list[LoggerDestination] = []
    if config.loggers.jsonl is not None:
        loggers.append(MetricsFile(config.folder(config.loggers.jsonl.path)))
    if config.loggers.wandb is not None:
        loggers.append(_wandb(config.loggers.wandb, config))
    if (limits := config.callbacks.warnings) is not None:
        loggers.append(LiveWarnings(config.folder("{run_folder}/warnings.jsonl"), **asdict(limits)))
    return loggers


def _wandb(wandb: WandBConfig, config: TrainConfig) -> DispensableWandB:
    """W&B, offline where there is no key: a run must not stop to ask for one."""
    offline = os.environ.get("WANDB_MODE") == "offline" or not _has_wandb_key()
    if offline:
        os.environ["WANDB_MODE"] = "offline"
        log.warning(
            "W&B: no API key was found (WANDB_API_KEY or ~/.netrc), the run is logged offline; "
            "send it later with `wandb sync`."
        )
    folder = config.folder("{run_folder}")
    if dist.get_global_rank() == 0:
        with best_effort(f"make {folder} for W&B"):
            os.makedirs(folder, exist_ok=True)
    # wandb 0.18 asks its server before it writes a table with pictures, offline as well, and goes
    # on asking for minutes where there is no network.
    settings = {"allow_offline_artifacts": False} if offline else {}
    options = {"dir": folder, "settings": settings}
    return DispensableWandB(name=config.run_name, init_kwargs=options, **asdict(wandb))


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "//api.wandb.ai")).hostname
    try:
        return netrc.netrc().authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
