"""Features as their user makes them: what is told, what is written, what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convert import ConversionError, convert_llava
from convert import features as cli
from convert.feature_pass import make_features
from convert.writer import ShardWriter
from mixtures import SHARES, mixed
from tiny import write_pairs
from vlm_composer import train
from vlm_composer.assembly import assemble_vision_tower, vision_settings
from vlm_composer.data.encoder import Patches
from vlm_composer.data.images import decode_image
from vlm_composer.data.opening import open_dataset

SAMPLE = 16 * 48 * 4
"""Bytes of the tiny tower's patches of one image, in fp32."""
STAGE1 = Path(__file__).parents[2] / "yamls" / "stage1.yaml"


@pytest.fixture
def make(tiny_config, tmp_path):
    """Makes features of the tiny data in `tmp_path`/features."""

    def run(out=tmp_path / "features", config=None, **options):
        return make_features(config or tiny_config(), out, show_progress=False, **options)

    return run


def read(config, loader, folder=None):
    """The records of a data set of the yaml, or of one in `folder`, as they are stored."""
    section = getattr(config, loader)
    if folder is not None:
        section.dataset.local = str(folder)
    captions = open_dataset(section, batch_size=1, store_timeout=0)
    return captions, [captions[index] for index in range(captions.num_samples)]


def test_every_sample_keeps_its_place_and_its_text(make, tiny_config, tmp_path):
    summary = make(size_limit=10 * SAMPLE)
    assert (summary.train, summary.eval) == (40, 7)
    assert summary.shards["train"] > 3
    config = tiny_config()
    tower, seen = assemble_vision_tower(config, "cpu"), vision_settings(config)
    for loader, side in (("train_loader", "train"), ("eval_loader", "eval")):
        images, records = read(tiny_config(), loader)
        features, stored = read(tiny_config(), loader, tmp_path / "features" / side)
        (described,) = features.features.values()
        assert described.shuffle_units == [shard.samples for shard in images.shards]
        for record, found in zip(records, stored, strict=True):
            assert {k: found[k] for k in ("id", "prompt", "answer")} == {
                k: record[k] for k in ("id", "prompt", "answer")
            }
            pixels = decode_image(record["image"], seen.image_size, seen.resample)
            (patches,) = Patches(described)([found])["patches"]
            torch.testing.assert_close(patches, tower(pixels[None])[0], rtol=1e-5, atol=1e-6)


def test_the_shards_are_convert_s(make, tmp_path):
    summary = make(dtype="bf16")
    out = tmp_path / "features"
    files = {path.relative_to(out).as_posix() for path in out.rglob("*.*")}
    names = ("features.json", "index.json", "shard.00000.mds")
    assert files == {"summary.json"} | {f"{s}/{n}" for s in ("train", "eval") for n in names}
    index = json.loads((out / "train/index.json").read_text())
    (shard,) = index["shards"]
    assert set(shard["raw_data"]["hashes"]) == {"xxh64"}
    assert "ndarray:uint16:16,48" in shard["column_encodings"]
    assert summary.bytes == pytest.approx(47 * SAMPLE / 2, rel=0.1)
    written = json.loads((out / "summary.json").read_text())
    assert written["sources"]["eval"]["samples"] == 7
    assert written["settings"]["vision_tower"]["layer"] == -1


def test_the_command_tells_what_it_takes_and_when_it_pays(tiny_yaml, tmp_path):
    command = [sys.executable, "-m", "convert.features", tiny_yaml(), "--out", tmp_path / "out"]
    done = subprocess.run(
        [*command, "max_duration=3ep", "--dtype", "fp16", "--dry-run"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for part in (
        "16 patches × 48, fp16",
        "40 train + 7 eval",
        "72.2 kB, 1.5 kB a sample; the image shards have",
        "free",
        "of the",
        "features pay from the second epoch on",
        "for every 100 TFLOP/s",
        "trains 3 epochs: saves",
    ):
        assert part in done.stdout, part
    assert not (tmp_path / "out").exists()


def test_one_epoch_of_the_full_recipe_is_not_worth_it(shards, tmp_path, capsys):
    data = [f"{x}_loader.dataset.remote={shards}/{x}" for x in ("train", "eval")]
    cache = f"variables.cache={tmp_path}/cache"
    arguments = [str(STAGE1), "--out", str(tmp_path / "out"), "--dry-run", "device=cpu"]
    assert cli.main([*arguments, *data, cache]) == 0
    said = capsys.readouterr().out
    assert "729 patches × 1152, bf16" in said
    assert "1.68 MB a sample" in said
    assert "vision tower  0.666 of the 3.48 TFLOP" in said
    assert "trains 1 epoch: NOT worth it" in said


def test_a_disk_that_is_too_small(tiny_disk, tiny_yaml, capsys):
    assert cli.main([str(tiny_yaml()), "--out", str(tiny_disk / "features")]) == 1
    error = capsys.readouterr().err
    assert "has 65.5 kB free and the features take 144.4 kB" in error
    assert not list(tiny_disk.iterdir())


@pytest.fixture
def interrupt(monkeypatch):
    """Interrupts the pass after some samples."""
    write = ShardWriter.write

    def interrupted(self, record):
        if self.num_samples == 30:
            raise KeyboardInterrupt
        write(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", interrupted)
        yield patch


def test_what_was_interrupted_is_no_data_set(interrupt, make, tiny_yaml, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        make(size_limit=10 * SAMPLE)
    interrupt.undo()
    out = tmp_path / "features"
    assert list(out.glob("train/*.mds"))
    assert train.main([str(tiny_yaml()), f"train_loader.dataset.local={out}/train"]) == 1
    assert "holds no MDS shards (no index.json)" in capsys.readouterr().err
    with pytest.raises(ConversionError, match="already holds"):
        make()
    assert make(overwrite=True).train == 40


def test_features_are_refused_and_overwritten_whole(make, tmp_path):
    make(size_limit=10 * SAMPLE)
    with pytest.raises(ConversionError, match=r"already holds \d+ files .* --overwrite"):
        make()
    make(dtype="bf16", overwrite=True)
    assert len(list(tmp_path.glob("features/train/*.mds"))) == 1
    assert '"bf16"' in (tmp_path / "features/train/features.json").read_text()


def test_the_command_says_that_it_was_interrupted(interrupt, tiny_yaml, tmp_path, capsys):
    assert cli.main([str(tiny_yaml()), "--out", str(tmp_path / "out")]) == 130
    assert f"interrupted: {tmp_path}/out is not complete" in capsys.readouterr().err


def test_what_is_read_is_never_overwritten(make, shards, tiny_config, tmp_path):
    with pytest.raises(ConversionError, match="where the images of train are read"):
        make(out=shards, overwrite=True)
    config = tiny_config()
    config.train_loader.dataset.local = str(tmp_path / "out" / "train")
    config.train_loader.dataset.remote = str(shards / "train")
    with pytest.raises(ConversionError, match="where the images of train are read"):
        make(out=f"{tmp_path}/out/", config=config)


def test_features_are_not_made_of_features(make, tiny_config, tmp_path):
    make()
    config = tiny_config()
    config.train_loader.dataset.local = str(tmp_path / "features" / "train")
    with pytest.raises(ConversionError, match="holds features already"):
        make(out=tmp_path / "again", config=config)


def test_a_shard_holds_a_sample(make):
    with pytest.raises(ConversionError, match="sample s1: too_large"):
        make(size_limit=SAMPLE)


def test_patches_that_the_dtype_cannot_hold(make, monkeypatch):
    from vlm_composer.models.vision_tower import VisionTower

    forward = VisionTower.forward
    monkeypatch.setattr(VisionTower, "forward", lambda self, pixels: forward(self, pixels) * 1e6)
    with pytest.raises(ConversionError, match=r"samples s\d+, .* are not finite in fp16"):
        make(dtype="fp16")


def test_an_image_set_in_a_folder_elsewhere(make, tiny_config, tmp_path):
    """Images behind `remote`, read by workers, without an evaluation set."""
    json_path, images = write_pairs(tmp_path / "pairs", 30)
    convert_llava(
        json_path, images, tmp_path / "mds", eval_ratio=0, size_limit=2048, show_progress=False
    )
    config = tiny_config(eval_loader=None)
    dataset = config.train_loader.dataset
    dataset.remote, dataset.local = str(tmp_path / "mds/train"), str(tmp_path / "cache")
    config.train_loader.num_workers = 2
    summary = make(config=config, batch_size=3)
    assert (summary.train, summary.eval) == (30, 0)
    config.train_loader.dataset.remote = None
    _, records = read(config, "train_loader", tmp_path / "features/train")
    assert [record["id"] for record in records] == [f"s{index}" for index in range(30)]


@pytest.mark.s3
def test_a_bucket(make, tiny_yaml, s3_server, tmp_path):
    """Written to a bucket and trained from it; `features.json` comes with the shards."""
    url = s3_server.make_bucket(f"features-{os.getpid()}") + "/tiny"
    make(out=url, size_limit=10 * SAMPLE)
    keys = s3_server.keys(f"features-{os.getpid()}")
    assert {"tiny/summary.json", "tiny/train/features.json", "tiny/eval/index.json"} < set(keys)
    overrides = [
        f"{x}_loader.dataset.{key}={value}"
        for x in ("train", "eval")
        for key, value in (("remote", f"{url}/{x}"), ("local", tmp_path / "cache" / x))
    ]
    assert train.main([str(tiny_yaml()), *overrides]) == 0
    assert (tmp_path / "cache/train/features.json").is_file()


def test_streams_are_written_one_at_a_time(make, tiny_config, two_sets, tmp_path):
    config = tiny_config(train_loader=mixed(two_sets, SHARES))
    with pytest.raises(ConversionError, match=r"streams: emoji, llava, but .*streams=null"):
        make(config=config)
    assert not (tmp_path / "features").exists()
