"""Training from features is training from their images, without the vision tower."""

import json

import pytest
import torch
from composer.utils import dist, reproducibility

from convert import convert_llava
from convert.feature_pass import make_features
from hostile_json import VALUES, leaves, replaced
from runs import last, run
from tiny import save_tower, tiny_siglip, write_pairs
from vlm_composer import train
from vlm_composer.assembly import assemble_model, assemble_template, vision_settings
from vlm_composer.data.features import Features, FeaturesError, VisionSettings
from vlm_composer.data.opening import open_dataset
from vlm_composer.evaluation.captioning import caption_images
from vlm_composer.loaders import assemble_encoder
from vlm_composer.mds.index import Index, ShardEntry, ShardFile
from vlm_composer.models.composer_model import ComposerVLM
from vlm_composer.models.vision_tower import VisionTower
from vlm_composer.training.towers_identity import check_features


@pytest.fixture
def many_shards(tmp_path, shared_path):
    """Images in many small shards, so that their order depends on where one ends."""
    json_path, images = write_pairs(tmp_path / "pairs", 47)
    convert_llava(
        json_path, images, tmp_path / "mds", eval_ratio=0.15, size_limit=1500, show_progress=False
    )
    dist.barrier()
    return shared_path / "mds"


@pytest.fixture
def configs(tiny_config, many_shards, tmp_path, shared_path):
    """Configurations of a run from images, and of one from their features of a dtype."""

    def pair(dtype=None, **changes):
        changes = {"max_duration": "2ep", **changes}
        images, features = tiny_config(**changes), tiny_config(**changes)
        for config, folder in ((images, many_shards), (features, shared_path / "features")):
            config.train_loader.dataset.local = str(folder / "train")
            config.eval_loader.dataset.local = str(folder / "eval")
            config.eval_loader.mismatched_images = True
        out = tmp_path / "features"
        make_features(images, out, dtype=dtype, size_limit=40_000, show_progress=False)
        dist.barrier()
        return images, features

    return pair


@pytest.fixture
def idle_tower(monkeypatch):
    """A vision tower that must not be run."""

    def stop():
        def forward(self, pixels):
            raise AssertionError("the vision tower was run")

        monkeypatch.setattr(VisionTower, "forward", forward)

    return stop


METRICS = ("metrics/eval/LanguageCrossEntropy", "metrics/eval_mismatched/LanguageCrossEntropy")


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-6), ("fp16", 1e-4), ("bf16", 1e-3)])
def test_a_run_from_features_is_the_run_from_images(configs, idle_tower, dtype, tolerance):
    images, features = configs(dtype)
    expected_trainer, _, expected = run(images)
    idle_tower()
    trainer, _, found = run(features)
    assert found.ids == expected.ids  # shuffled as the images are, shard by shard
    assert len(found.losses) == 10
    assert found.losses == pytest.approx(expected.losses, rel=tolerance)
    for name in METRICS:
        assert last(trainer, name) == pytest.approx(last(expected_trainer, name), rel=tolerance)
    assert last(trainer, METRICS[0]) != last(trainer, METRICS[1])
    assert "pixel_values" not in found.batches[0]
    assert found.batches[0]["patches"].shape == (8, 16, 48)


def gradients_of(model, batch):
    model.zero_grad()
    loss = model.loss(model(batch), batch)
    loss.backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return loss.detach(), flat


@pytest.mark.parametrize(
    ("tower", "dtype", "tolerance"),
    [("fp32", "fp32", 0), ("bf16", "bf16", 0), ("fp32", "fp16", 1e-3), ("fp32", "bf16", 1e-2)],
)
def test_loss_and_gradients_of_a_step(tiny_config, tower, dtype, tolerance):
    config = tiny_config()
    config.vision_tower.dtype = tower
    template = assemble_template(config)
    reproducibility.seed_all(3)
    vlm = assemble_model(config, "cpu", template.image_token_id)
    encoder = assemble_encoder(config, template)
    captions = open_dataset(config.train_loader, batch_size=4, store_timeout=0)
    batch = encoder([captions[index] for index in range(4)])
    model = ComposerVLM(vlm)
    loss, gradients = gradients_of(model, batch)

    settings = vision_settings(config)
    features = Features({}, settings, dtype, num_patches=16, hidden_size=48, shuffle_units=[40])
    stored = features.encode(vlm.vision_tower(batch.pop("pixel_values")))
    records = [{"id": "x", "patches": row} for row in stored]
    batch |= encoder.reading(features).images(records)
    found_loss, found = gradients_of(model, batch)
    if tolerance == 0:
        assert torch.equal(found_loss, loss)
        assert torch.equal(found, gradients)
    assert float((found_loss - loss).abs()) <= tolerance * float(loss)
    assert float((found - gradients).norm()) <= tolerance * float(gradients.norm())
    assert tolerance == 0 or not torch.equal(found, gradients)


def test_a_tower_that_is_not_run_costs_nothing(configs):
    images, features = configs(max_duration="1ba")
    (_, _, from_images), (trainer, _, from_features) = run(images), run(features)
    model = trainer.state.model
    difference = model.flops_per_batch(from_images.batches[0]) - model.flops_per_batch(
        from_features.batches[0]
    )
    patch_weights, layer_weights = 48 * 3 * 8 * 8, 4 * 48 * 48 + 2 * 48 * 96
    once = 2 * 16 * (patch_weights + 3 * layer_weights) + 3 * 4 * 16**2 * 48
    assert difference == 8 * once


def test_a_run_from_features_resumes_exactly(configs, tmp_path):
    _, features = configs(save_folder=str(tmp_path / "saved"), save_interval="3ba")
    _, _, whole = run(features)
    features.save_folder = None
    features.load_path = str(tmp_path / "saved" / "ep0-ba3.safetensors")
    _, _, rest = run(features)
    assert rest.ids == whole.ids[3:]
    assert rest.losses == whole.losses[3:]


def test_images_can_be_evaluated_beside_features(configs, many_shards):
    images, features = configs()
    expected, _, _ = run(images)
    features.eval_loader.dataset.local = str(many_shards / "eval")
    trainer, _, _ = run(features)
    for name in METRICS:
        assert last(trainer, name) == pytest.approx(last(expected, name), rel=1e-6)


def test_captions_of_features_are_those_of_images(configs):
    images, features = configs(max_duration="1ba")
    _, vlm, from_features = run(features)
    template = assemble_template(images)
    _, _, from_images = run(images)
    captions = [
        caption_images(vlm, template, given, "<image>\nColour?", max_new_tokens=5)
        for given in (from_images.batches[0]["pixel_values"], from_features.batches[0]["patches"])
    ]
    assert captions[0] == captions[1]


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("vision_tower.layer=-2", "layer -1, this run has -2"),
        ("vision_tower.image_size=48", "image_size 32, this run has 48"),
        ("image_decoder=pil", "image_decoder torchvision, this run has pil"),
        ("vision_tower.dtype=bf16", "dtype float32 ({siglip}), this run has bfloat16 ({siglip})"),
        ("vision_tower.name={dinov2}", "image_size 32, this run has 42"),
    ],
)
def test_features_of_another_tower_are_refused(
    configs, tiny_yaml, towers, capsys, override, difference
):
    _, features = configs()
    names = {name: towers / name for name in ("siglip", "dinov2")}
    local = f"train_loader.dataset.local={features.train_loader.dataset.local}"
    assert train.main([str(tiny_yaml()), local, override.format(**names)]) == 1
    assert difference.format(**names) in capsys.readouterr().err


def test_other_weights_of_the_same_shape_are_refused(configs, tiny_yaml, tmp_path, capsys):
    _, features = configs()
    torch.manual_seed(7)
    other = save_tower(tiny_siglip(), tmp_path / "other")
    evaluated = f"eval_loader.dataset.local={features.eval_loader.dataset.local}"
    theirs = Features.read(tmp_path / "features/eval/features.json").vision_tower["weights_hash"]
    assert train.main([str(tiny_yaml()), evaluated, f"vision_tower.name={other}"]) == 1
    error = capsys.readouterr().err
    assert f"features are of another vision_tower: weights_hash {theirs}" in error
    assert f"({other})" in error


def test_every_value_of_a_description_may_be_hostile(tmp_path):
    """It is refused, or it is what another tower could have; nothing else happens."""
    settings = VisionSettings(-2, 64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 3, "pil")
    tower = dict.fromkeys(("name", "revision", "dtype", "config_hash", "weights_hash"), "x")
    features = Features(tower, settings, "fp16", 16, 48, shuffle_units=[3, 4])
    file = ShardFile("shard.00000.mds", 1 << 20, {})
    index = Index(features.columns, (ShardEntry(7, file, None, None),))
    path = tmp_path / "features.json"
    document = json.loads(features.to_json())
    accepted, said = [], []
    for place in leaves(document):
        for new in VALUES:
            path.write_text(json.dumps(replaced(document, place, new)))
            try:
                found = Features.read(path)
                found.check_index(index, "here")
                found.check_settings(settings, "here")
                check_features([found], {"vision_tower": tower})
            except FeaturesError as error:
                said.append(str(error))
            else:
                accepted.append(place)
    assert {place[0] for place in accepted} <= {"vision_tower"}, "of which names are not compared"
    assert all(text.isprintable() and len(text) < 700 for text in said)
    path.write_bytes(b" " * ((1 << 26) + 1))
    with pytest.raises(FeaturesError, match="it has more than the 67108864 bytes that are read"):
        Features.read(path)
    path.write_text(features.to_json())
    assert Features.read(path) == features


@pytest.mark.parametrize("text", ["{}", "[]", '{"dtype": "bf16"}'])
def test_shards_of_patches_without_their_description(configs, tiny_yaml, tmp_path, capsys, text):
    _, features = configs()
    path = tmp_path / "features/train/features.json"
    path.write_text(text)
    local = f"train_loader.dataset.local={features.train_loader.dataset.local}"
    assert train.main([str(tiny_yaml()), local]) == 1
    assert f"{path} does not describe features" in capsys.readouterr().err
    path.unlink()
    assert train.main([str(tiny_yaml()), local]) == 1
    assert str(path) in capsys.readouterr().err


@pytest.mark.world_size(2)
@pytest.mark.parametrize("parallelism", ["replicate", "shard"])
def test_ranks_train_from_features_as_from_images(configs, idle_tower, parallelism):
    images, features = configs(parallelism=parallelism, device_train_microbatch_size=2)
    _, _, expected = run(images)
    dist.barrier()
    idle_tower()
    _, _, found = run(features)
    assert found.ids == expected.ids
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
