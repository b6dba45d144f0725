"""Tiny real towers, a tiny tokenizer and a tiny data set; one process or the launcher's ranks."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from composer.utils import dist, get_device
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from azure_server import azure_server  # noqa: F401
from browser import page  # noqa: F401
from convert import convert_llava
from exports import llama_export, qwen_export  # noqa: F401
from gcs_server import gcs_server  # noqa: F401
from mixtures import two_sets  # noqa: F401
from s3_server import s3_server  # noqa: F401
from shared_memory import released_shared_memory
from tiny import save_tower, tiny_dinov2, tiny_llama, tiny_qwen3, tiny_siglip, write_pairs
from tiny_disk import tiny_disk  # noqa: F401
from vlm_composer.config import TrainConfig

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that are meant for as many ranks as there are; files with slow ones first, so
    that none of several processes is left alone with them at the end."""

    def wanted(item: pytest.Item) -> bool:
        marker = item.get_closest_marker("world_size")
        return (marker.args[0] if marker else 1) == WORLD_SIZE

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items[:] = sorted(filter(wanted, items), key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def ranks() -> None:
    """Join the other ranks before any streaming object asks for them."""
    if WORLD_SIZE > 1:
        dist.initialize_dist(get_device("cpu"), timeout=120)


@pytest.fixture(autouse=True)
def determinism() -> Iterator[None]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    """Undo what `train.py` does to the project's logger, which would hide its lines from caplog."""
    logger = logging.getLogger("vlm_composer")
    before = (list(logger.handlers), logger.propagate, logger.level)
    yield
    logger.handlers, logger.propagate = before[0], before[1]
    logger.setLevel(before[2])


@pytest.fixture(autouse=True)
def release_shared_memory() -> Iterator[None]:
    """Free a test's shared memory when it ends."""
    with released_shared_memory():
        yield


@pytest.fixture(autouse=True)
def restore_rotary(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compile_blocks` replaces the rotary embedding of an architecture, for other tests too."""
    for module in (modeling_llama, modeling_qwen3):
        monkeypatch.setattr(module, "apply_rotary_pos_emb", module.apply_rotary_pos_emb)


def rank_zeros(path: Path) -> Path:
    """Rank 0's path, on every rank, once rank 0 has got here."""
    paths = [str(path)]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(paths, src=0)
    return Path(paths[0])


@pytest.fixture
def shared_path(tmp_path: Path) -> Path:
    """A folder that all ranks see."""
    return rank_zeros(tmp_path)


@pytest.fixture(scope="session")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `siglip`, `dinov2`, `qwen3` and `llama`, each saved with its weights."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("towers")
    builders = {
        "siglip": tiny_siglip,
        "dinov2": tiny_dinov2,
        "qwen3": tiny_qwen3,
        "llama": tiny_llama,
    }
    for name, build in builders.items():
        save_tower(build(), folder / name)
    return rank_zeros(folder)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train` (40 samples) and `eval` (7), converted from coloured squares."""
    folder = tmp_path_factory.mktemp("data")
    json_path, images = write_pairs(folder, 47)
    convert_llava(json_path, images, folder / "mds", eval_ratio=0.15, show_progress=False)
    return rank_zeros(folder / "mds")


@pytest.fixture
def tiny_yaml(towers: Path, shards: Path, tmp_path: Path, shared_path: Path) -> Callable[..., Path]:
    """Writes a yaml that trains the tiny towers in a second; keyword arguments replace its keys."""

    def write(**changes: Any) -> Path:
        settings: dict[str, Any] = {
            "run_name": "tiny",
            "run_folder": str(shared_path / "run"),
            "vision_tower": {"name": str(towers / "siglip"), "dtype": "fp32"},
            "language_model": {"name": str(towers / "qwen3"), "dtype": "fp32"},
            "connector": {
                "resampler": {"num_latents": 4, "depth": 2, "num_heads": 2, "head_dim": 16},
                "projector": {"mlp_ratio": 2},
            },
            "max_seq_len": 64,
            "train_loader": {
                "dataset": {"local": str(shards / "train"), "shuffle": True},
                "num_workers": 0,
            },
            "eval_loader": {"dataset": {"local": str(shards / "eval")}, "num_workers": 0},
            "global_train_batch_size": 8,
            "device_train_microbatch_size": 4,
            "max_duration": "4ba",
            "eval_interval": "1ep",
            "device": "cpu",
            "precision": "fp32",
            "optimizer": {"lr": 1e-3},
            "scheduler": {"t_warmup": "1ba"},
            "progress_bar": False,
            "log_to_console": False,
            "deterministic_mode": True,
            "compile_blocks": False,
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(settings | changes))
        return path

    return write


@pytest.fixture
def tiny_config(tiny_yaml: Callable[..., Path]) -> Callable[..., TrainConfig]:
    """Reads what `tiny_yaml` writes."""
    return lambda **changes: TrainConfig.read(tiny_yaml(**changes))
