"""Run folders as a run leaves them, with the names that its callbacks log."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from PIL import Image

from tiny import COLOURS

BATCHES = 640
EVALUATIONS = {0: 0.01, 320: 0.12, 640: 0.55}
"""The grounding gap at each."""
STEP = {
    "data_wait": 0.01,
    "vision": 0.05,
    "connector": 0.02,
    "llm_forward": 0.1,
    "head_and_loss": 0.04,
    "backward": 0.2,
    "optimizer": 0.01,
    "other": 0.03,
}


def metric_lines(batches: int = BATCHES, gaps: dict[int, float] = EVALUATIONS) -> list[dict]:
    """Lines of metrics.jsonl in the order of a run."""
    lines: list[dict[str, Any]] = []
    for batch in range(batches + 1):
        if batch < batches:
            loss = 4 + 5 * math.exp(-batch / 80) + 0.3 * math.sin(batch)
            lines.append({"batch": batch, "loss/train/total": loss, "time/batch": batch})
            lines.append({"batch": batch, "gradients/norm": 1 + 0.5 * math.cos(batch)})
        if batch:
            lines.append({"batch": batch, "lr-AdamW/group0": 1e-3 * (1 - batch / batches)})
        if batch > 10:
            lines.append({"batch": batch, "throughput/samples_per_sec": 9 + math.sin(batch / 9)})
        if batch % 200 == 0 and batch:
            share = {"time/data_wait_share": 0.01 / sum(STEP.values())}
            lines.append({"batch": batch, **{f"time/{k}": v for k, v in STEP.items()}} | share)
            lines.append({"batch": batch, "speed/samples_per_second": 8.7})
        if batch in gaps:
            lines += evaluation_lines(batch, gaps[batch])
    return lines


def evaluation_lines(batch: int, gap: float) -> list[dict]:
    right = 9.2 - 5 * batch / BATCHES
    evidence = {
        "loss_right": right,
        "loss_wrong": right + gap,
        "loss_blank": right + 0.8 * gap,
        "perplexity_right": math.exp(right),
        "perplexity_wrong": math.exp(right + gap),
        "perplexity_blank": math.exp(right + 0.8 * gap),
        "gap_wrong": gap,
        "gap_blank": 0.8 * gap,
        "retrieval_accuracy": min(0.25 + gap, 1),
        "retrieval_chance": 0.25,
        "output_norm_ratio": 1.5,
        "output_spread": 0.4,
        "latent_spread": 1.0,
        "seconds": 6.5,
    }
    return [
        {"batch": batch, "metrics/eval/LanguageCrossEntropy": right},
        {"batch": batch, "metrics/eval_mismatched/LanguageCrossEntropy": right + gap},
        {"batch": batch} | {f"evidence/{name}": value for name, value in evidence.items()},
    ]


FACTS: dict[str, Any] = {
    "run_name": "emoji",
    "command": ["vlm_composer/train.py", "yamls/demo.yaml", "seed=17"],
    "config": {
        "run_name": "emoji",
        "max_duration": "640ba",
        "deterministic_mode": False,
        "optimizer": {"lr": 0.001, "betas": [0.9, 0.95]},
        "train_loader": {"dataset": {"local": "demo/mds/train", "remote": None}},
        "callbacks": {"evidence": {"num_samples": 32}, "warnings": {"min_gap": 0.05}},
    },
    "seeds": {"seed": 17, "shuffle_seed": 18},
    "versions": {"python": "3.11.9", "torch": "2.7.0"},
    "commit": "0123456789abcdef",
    "hardware": {"device": "A CPU of tests", "ranks": 2, "memory_bytes": 25769803776},
    "towers": {"vision_tower": {"name": "siglip", "weights_hash": "feedbeef"}},
    "parameters": {
        "vision_tower": {"parameters": 22056576, "trained": False, "dtype": "bfloat16"},
        "connector": {"parameters": 9123456, "trained": True, "dtype": "float32"},
    },
    "data": {
        "train": {"samples": 1806, "index_xxh64": "cafe01", "kind": "images", "place": "demo/mds"},
        "eval": {"samples": 100, "index_xxh64": "cafe02", "kind": "images", "place": "demo/mds"},
        "summary": {"samples_in": 1906, "rejected_by_reason": {"too small": 3}},
    },
    "started": "2026-11-24T08:00:00+00:00",
    "ended": "2026-11-24T08:05:00+00:00",
    "wall_seconds": 300.5,
    "batches": 640,
    "samples": 2560,
    "resumed_at": [451],
    "legs": [{"batch": 0, "start": "2026-11-24T08:00:00+00:00", "seconds": 9.0, "last_batch": 451}],
}

WARNING = {"batch": 400, "name": "loss_spike", "message": "the loss is 9, its median 4. Look at it"}


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_captions(folder: Path, rows: list[tuple[str, str]], batches: list[int]) -> None:
    """Captions of (id, truth) rows, with pictures, as `CaptionLog` writes them."""
    images = folder / "captions" / "images"
    images.mkdir(parents=True)
    colours = list(COLOURS.values())
    for index in range(len(rows)):
        Image.new("RGB", (32, 24), colours[index % len(colours)]).save(images / f"{index}.jpg")
    for batch in batches:
        write_lines(
            folder / "captions" / f"ba{batch}.jsonl",
            [
                {
                    "id": name,
                    "image": f"images/{index}.jpg",
                    "truth": truth,
                    "caption": truth if batch == BATCHES and index == 0 else f"said at {batch}",
                }
                for index, (name, truth) in enumerate(rows)
            ],
        )


def whole_run(folder: Path) -> Path:
    """A finished run that learned to see, with every file."""
    folder.mkdir(parents=True)
    write_lines(folder / "metrics.jsonl", metric_lines())
    (folder / "run.json").write_text(json.dumps(FACTS))
    write_lines(folder / "warnings.jsonl", [WARNING])
    rows = [("1f63c", "cat with wry smile"), ("a/b", "<b>bold</b> & “red”"), ("c", "قطة تبتسم")]
    write_captions(folder, rows, list(EVALUATIONS))
    return folder
