"""What features of a data set take and when they pay, told before they are made."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from composer.core import Time, TimeUnit

from convert.errors import ConversionError
from convert.split import Side
from vlm_composer.config import TrainConfig
from vlm_composer.data.dataset import StreamingCaptions
from vlm_composer.data.features import Features
from vlm_composer.plan import plan


@dataclass(frozen=True)
class FeaturePlan:
    """Size and use of the features of a yaml's data."""

    tower: str
    layer: int
    features: Features
    """Of the training side."""
    samples: dict[Side, int]
    image_bytes: int
    """Of the image shards of all sides."""
    vision_flops: float
    """Operations of the vision tower on one image."""
    step_flops: float
    """Operations of a training step, vision tower included, on one sample."""
    tokens: dict[str, int]
    """Of a sample, as assumed for `step_flops`: prompt, image, answer."""
    epochs: float | None
    """That the yaml trains for; None where it counts tokens."""

    @property
    def num_samples(self) -> int:
        """Of all sides."""
        return sum(self.samples.values())

    @property
    def feature_bytes(self) -> int:
        """Of the patches of all sides; ids and text add next to nothing."""
        return self.num_samples * self.features.sample_bytes

    def describe(self) -> str:
        """Format the plan for a terminal."""
        features, per_image = self.features, self.image_bytes / self.num_samples
        share = self.vision_flops / self.step_flops
        sides = " + ".join(f"{count:,} {side}" for side, count in self.samples.items())
        tokens = " + ".join(f"{count} {kind}" for kind, count in self.tokens.items())
        # What a device that does 1e14 useful operations a second eats, without the vision tower.
        rate = 1e14 / (self.step_flops - self.vision_flops) * features.sample_bytes
        vision, step = self.vision_flops / 1e12, self.step_flops / 1e12
        return "\n".join(
            (
                f"Features of {self.tower}, layer {self.layer}: {features.num_patches} patches × "
                f"{features.hidden_size}, {features.dtype}",
                f"  samples       {sides}",
                f"  size          {_size(self.feature_bytes)}, {_size(features.sample_bytes)} a "
                f"sample; the image shards have {_size(self.image_bytes)}, {_size(per_image)} a "
                "sample",
                f"Break-even ({tokens} tokens a sample, assumed)",
                f"  vision tower  {vision:.3g} of the {step:.3g} TFLOP of a training step and "
                f"sample: {share:.1%}",
                "  this pass     costs one epoch's work of the vision tower: features pay from the "
                "second epoch on, or the second connector",
                f"  reading       {_size(features.sample_bytes)} a sample in place of "
                f"{_size(per_image)}: {_size(rate)}/s for every 100 TFLOP/s that training computes",
                f"  this yaml     {self._verdict(share)}",
            )
        )

    def _verdict(self, share: float) -> str:
        if self.epochs is None:
            return "counts tokens: worth it from the second epoch on"
        trains = f"trains {self.epochs:.3g} epoch{'' if self.epochs == 1 else 's'}"
        if self.epochs <= 1:
            return f"{trains}: NOT worth it, unless other runs read the same features"
        saved = share * (self.epochs - 1) / self.epochs
        return f"{trains}: saves {saved:.1%} of the FLOPs, if the storage keeps up"


def plan_features(
    config: TrainConfig, features: Features, sides: dict[Side, StreamingCaptions]
) -> FeaturePlan:
    """Work out what the features of a yaml's data take.

    Args:
        config: The training yaml.
        features: What will be written for the training side.
        sides: The image sets.
    """
    planned = plan(config)
    flops = planned["training_flops_per_sample"]
    return FeaturePlan(
        tower=config.vision_tower.name,
        layer=features.settings.layer,
        features=features,
        samples={side: captions.num_samples for side, captions in sides.items()},
        image_bytes=sum(s.get_raw_size() for c in sides.values() for s in c.shards),
        vision_flops=flops["vision_tower"],
        step_flops=flops["total"],
        tokens=planned["tokens_per_sample"],
        epochs=_epochs(config, sides["train"]),
    )


def check_space(needed: int, out: str, overwrite: bool) -> None:
    """Refuse a local destination that has no room; of a bucket nothing is known.

    Args:
        needed: Bytes that will be written.
        out: A folder, which need not exist, or a URL.
        overwrite: A data set that the folder holds will be deleted first.

    Raises:
        ConversionError: The disk has less free than that.
    """
    if "://" in out:
        return
    folder = Path(out).absolute()
    held = sum(p.stat().st_size for p in folder.glob("*/*.mds")) if overwrite else 0
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free + held
    print(f"  free          {_size(free)} in {out}{', once it is overwritten' if held else ''}")
    if free < needed:
        raise ConversionError(
            f"{out} has {_size(free)} free and the features take {_size(needed)}: free some, give "
            "a smaller --dtype, or write them to another place"
        )


def _epochs(config: TrainConfig, train: StreamingCaptions) -> float | None:
    """How often training reads every sample of a set, on average."""
    duration = Time.from_timestring(config.max_duration)
    if duration.unit == TimeUnit.TOKEN:
        return None
    samples_a_unit = {
        TimeUnit.EPOCH: train.epoch_size,
        TimeUnit.BATCH: config.global_train_batch_size,
        TimeUnit.SAMPLE: 1,
    }[TimeUnit(duration.unit)]
    return duration.value * samples_a_unit / train.num_samples


def _size(num_bytes: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.2f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"
