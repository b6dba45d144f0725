"""Captions at each evaluation: the same images, what `caption_images` says of each alone, as files
and as a W&B table."""

import json
import os
import re
import subprocess
import sys
import unicodedata

import pytest
import torch
from composer.utils import dist, reproducibility
from PIL import Image

from convert import convert_llava
from convert.feature_pass import make_features
from runs import metrics_of, run, start
from vlm_composer.assembly import assemble_model, assemble_template
from vlm_composer.data.opening import open_dataset
from vlm_composer.evaluation.captioning import caption_images
from vlm_composer.evaluation.captions_log import picture_names
from vlm_composer.loaders import assemble_encoder


@pytest.fixture
def pairs_of(tmp_path):
    """Makes a data set whose samples have given ids; returns its folder."""

    def make(ids):
        images = tmp_path / "images"
        images.mkdir()
        items = []
        for number, name in enumerate(ids):
            Image.new("RGB", (40, 30), (9 * number, 0, 0)).save(images / f"{number}.png")
            turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "red"}]
            items.append({"id": name, "image": f"{number}.png", "conversations": turns})
        (tmp_path / "pairs.json").write_text(json.dumps(items))
        out = tmp_path / "mds"
        convert_llava(tmp_path / "pairs.json", images, out, eval_ratio=0, show_progress=False)
        return out / "train"

    return make


LOGGED = {"captions": {"num_images": 3, "max_new_tokens": 6}}
HYBRID = {"parallelism": "hybrid", "fsdp_config": {"data_parallel_shard_degree": 1}}


def expected(config):
    """What an untrained connector says, an image at a time."""
    template = assemble_template(config)
    reproducibility.seed_all(config.seed)
    vlm = assemble_model(config, "cpu", template.image_token_id).eval()
    encoder = assemble_encoder(config, template)
    captions = open_dataset(config.eval_loader, batch_size=1, store_timeout=0)
    lines = []
    for index in (0, 2, 4):
        record = captions[index]
        image = encoder.image(record)
        (text,) = caption_images(vlm, template, image[None], record["prompt"], max_new_tokens=6)
        lines.append((record["id"], record["answer"], text))
    return lines


def logged(folder, batch):
    lines = (folder / "captions" / f"ba{batch}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_same_images_are_captioned_at_each_evaluation(tiny_config, tmp_path):
    config = tiny_config(callbacks=LOGGED, max_duration="4ba", eval_interval="2ba")
    trainer, _, _ = start(config)
    trainer.eval()
    trainer.fit()
    trainer.close()
    lines = logged(tmp_path / "run", 0)
    found = [(line["id"], line["truth"], line["caption"]) for line in lines]
    assert found == expected(config)
    for batch in (2, 4):
        assert [line["id"] for line in logged(tmp_path / "run", batch)] == [x[0] for x in found]
    for line in lines:
        assert line["image"] == f"images/{line['id']}.jpg"
        with Image.open(tmp_path / "run" / "captions" / line["image"]) as picture:
            assert picture.size != (32, 32)  # in its own shape
    assert len(metrics_of(trainer)["captions/seconds"]) == 3


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    "changes", [{}, {"parallelism": "shard"}, HYBRID], ids=["replicate", "shard", "hybrid"]
)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_two_ranks_say_what_one_says(tiny_config, shared_path, changes, batch_size):
    config = tiny_config(
        callbacks=LOGGED,
        device_train_microbatch_size=2,
        device_eval_batch_size=batch_size,
        **changes,
    )
    trainer, _, _ = start(config)
    trainer.eval()
    trainer.close()
    lines = logged(shared_path / "run", 0)
    found = [(line["id"], line["truth"], line["caption"]) for line in lines]
    assert found == expected(config)


@pytest.mark.world_size(2)
def test_ranks_that_share_weights_wait_for_the_longer_caption(tiny_config, monkeypatch):
    config = tiny_config(parallelism="shard", device_train_microbatch_size=2)
    trainer, sharded, _ = start(config)
    template = assemble_template(config)
    tokenizer = template.tokenizer
    ids = []
    monkeypatch.setattr(tokenizer, "batch_decode", lambda x, **_: ids.append(x) or [""] * len(x))
    reproducibility.seed_all(config.seed)
    alone = assemble_model(config, "cpu", template.image_token_id).eval()
    with torch.no_grad():
        for model in (alone, sharded):  # so that images differ
            model.connector.projector.fc2.weight.mul_(20)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    trainer.eval()

    def generate(model, images, **options):
        caption_images(model, template, images, "<image>\nWhat?", max_new_tokens=8, **options)
        return ids.pop().tolist()

    first, second = generate(alone, images)
    early = next(token for token in first[:5] if token not in second)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(early)
    expected = generate(alone, images)[dist.get_global_rank()]
    mine = images[dist.get_global_rank()][None]
    found = generate(sharded.eval(), mine, in_step=True)[0]
    lengths = dist.all_gather_object(len(found))
    assert lengths[0] < lengths[1] == 8
    assert found == expected[: len(found)]
    trainer.close()


def test_features_are_captioned_without_pictures(tiny_config, shared_path):
    images, features = tiny_config(callbacks=LOGGED), tiny_config(callbacks=LOGGED)
    make_features(images, shared_path / "features", show_progress=False)
    features.eval_loader.dataset.local = str(shared_path / "features" / "eval")
    trainer, _, _ = start(features)
    trainer.eval()
    trainer.close()
    lines = logged(shared_path / "run", 0)
    assert [(x["id"], x["truth"], x["caption"]) for x in lines] == expected(images)
    assert {line["image"] for line in lines} == {None}


RUN = """
import sys
from vlm_composer.config import TrainConfig
from vlm_composer.train import prepare
trainer = prepare(TrainConfig.read(sys.argv[1]))
trainer.eval()
trainer.fit()
trainer.close()
"""


def test_wandb_gets_a_table_with_the_pictures(tiny_yaml, tmp_path):
    # A process of its own: what W&B has begun in it cannot be undone.
    path = tiny_yaml(loggers={"wandb": {"project": "tests"}}, callbacks=LOGGED, max_duration="1ba")
    done = subprocess.run(
        [sys.executable, "-c", RUN, path],
        env=os.environ
        | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        | {"WANDB_DATA_DIR": str(tmp_path / "wandb")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (media,) = (tmp_path / "run" / "wandb").glob("offline-run-*/files/media")
    tables = [json.loads(file.read_text()) for file in sorted(media.rglob("*.table.json"))]
    assert len(tables) == 2
    for table in tables:
        assert table["columns"] == ["id", "image", "truth", "caption"]
        assert len(table["data"]) == 3
    for row, line in zip(tables[0]["data"], logged(tmp_path / "run", 0), strict=True):
        assert row == [line["id"], "Image", line["truth"], line["caption"]]
        # W&B keeps the pictures of a table in an artifact, which it stages for `wandb sync`.
        picture = (tmp_path / "run" / "captions" / line["image"]).read_bytes()
        staged = (file for file in (tmp_path / "wandb").rglob("staging/*") if file.is_file())
        assert any(file.read_bytes() == picture for file in staged)


def test_names_of_pictures_are_plain_and_differ():
    names = picture_names(["a/../b", "7", "7", "", "ü x", "n" * 300])
    assert names == ["a_.._b.jpg", "7.jpg", "7-2.jpg", "_.jpg", "ü_x.jpg", "n" * 100 + ".jpg"]


@pytest.mark.parametrize(
    "ids",
    [
        ["a", "a-2", "a"],
        ["a", "a-1", "a", "a-3", "a"],
        ["A", "a", "ß", "SS"],
        ["caf\u00e9", "cafe\u0301"],
        ["猫" * 100, "猫" * 100 + "2", "x" + "猫" * 99, "🐈" * 99, "é" * 300],
        ["", ".", "..", "/", "\0", "\n", "\ud83d", "con", "~", "-"],
    ],
)
def test_any_ids_give_names_that_every_file_system_tells_apart(ids, tmp_path):
    names = picture_names(ids)
    assert len(names) == len(ids)
    compared = {unicodedata.normalize("NFD", name).lower() for name in names}
    assert len(compared) == len(ids)
    for name in names:
        assert re.fullmatch(r"[^/\0]+\.jpg", name)
        assert not name.startswith(".")
        assert len(name.encode()) <= 255
        (tmp_path / name).touch()
    assert len(list(tmp_path.iterdir())) == len(ids)
    assert picture_names(ids) == names


def test_an_evaluation_of_long_ids_in_any_script_is_captioned(tiny_config, tmp_path, pairs_of):
    pairs = pairs_of(["猫" * 100, "猫" * 100 + "!", "a"])
    loader = {"dataset": {"local": str(pairs)}, "num_workers": 0}
    trainer, _, _ = start(tiny_config(eval_loader=loader, callbacks=LOGGED))
    trainer.eval()
    trainer.close()
    lines = logged(tmp_path / "run", 0)
    assert len({line["image"] for line in lines}) == 3
    assert all((tmp_path / "run" / "captions" / line["image"]).is_file() for line in lines)


def test_a_run_without_an_evaluation_set_captions_nothing(tiny_config, tmp_path):
    run(tiny_config(eval_loader=None, max_duration="1ba"))
    assert not (tmp_path / "run" / "captions").exists()
