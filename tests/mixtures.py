"""Two data sets of coloured squares, and the sections of a yaml that mix them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from composer.utils import dist

from convert import convert_llava
from tiny import write_pairs

SIZES = {"emoji": 20, "llava": 40}
"""Training samples of each; their ids are e0, e1, … and l0, l1, …."""
SHARES = {"emoji": {"proportion": 0.75}, "llava": {"proportion": 0.25}}
"""45 and 15 of 60: the smaller set more than twice, a part of the larger one."""


@pytest.fixture(scope="session")
def two_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `emoji` and `llava`, each with `train` and `eval` (2 and 5) in small shards."""
    folder = tmp_path_factory.mktemp("two_sets")
    for name, count in SIZES.items():
        json_path, images = write_pairs(folder / "pairs" / name, round(count * 1.1), name[0])
        convert_llava(
            *(json_path, images, folder / name),
            eval_ratio=1 - 1 / 1.1,
            size_limit=1500,
            show_progress=False,
        )
    folders = [folder]
    dist.broadcast_object_list(folders, src=0)
    return folders[0]


def mixed(
    folder: Path,
    weights: dict[str, dict[str, float]],
    side: str = "train",
    *,
    caches: Path | None = None,
    workers: int = 0,
    **dataset: Any,
) -> dict[str, Any]:
    """A loader's section over `two_sets`, read where they are or through caches."""
    streams: dict[str, dict[str, Any]] = {}
    for name, weight in weights.items():
        place = str(folder / name / side)
        streams[name] = {"local": place, **weight}
        if caches is not None:
            streams[name] |= {"remote": place, "local": str(caches / name)}
    return {"streams": streams, "dataset": dataset, "num_workers": workers}


def counted(ids: list[str]) -> dict[str, int]:
    """Samples of each set."""
    return {name: sum(one.startswith(name[0]) for one in ids) for name in SIZES}
