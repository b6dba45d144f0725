"""The schema refuses what cannot work, all of it at once, before anything is loaded."""

from pathlib import Path

import pytest

from vlm_composer.config import TrainConfig
from vlm_composer.config.loader import ConfigError

YAMLS = sorted(Path(__file__).parent.parent.glob("yamls/*.yaml"))


def errors_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        TrainConfig.read(path, overrides)
    return raised.value.errors


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_every_yaml_of_the_project_is_valid(path):
    TrainConfig.read(path)


def test_the_project_has_its_three_yamls():
    assert [p.stem for p in YAMLS] == ["demo", "stage1", "stage1_trial"]


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_every_key_of_a_yaml_is_explained_where_it_stands(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        key, _, value = line.partition(":")
        if not key.strip() or key.lstrip().startswith("#") or not value:
            continue
        if value.strip() and not value.strip().startswith("#"):
            assert "#" in value, f"{path.name}:{number}: {line.strip()} has no comment"


def test_overrides_replace_values(tiny_yaml):
    config = TrainConfig.read(tiny_yaml(), ["optimizer.lr=0.5", "max_duration=2ep"])
    assert config.optimizer.lr == 0.5
    assert config.max_duration == "2ep"


def test_an_empty_section_means_its_defaults(tiny_yaml):
    config = TrainConfig.read(tiny_yaml(callbacks={"speed_monitor": None, "lr_monitor": {}}))
    assert config.callbacks.lr_monitor is not None


def test_all_mistakes_are_reported_at_once(tiny_yaml):
    path = tiny_yaml(max_durations="1ep", seed="seven", optimizer={"name": "adamv", "lr": "fast"})
    errors = errors_of(path, "global_train_batch_size=[1]")
    assert "max_durations: unknown key; did you mean 'max_duration'?" in errors
    assert "seed: expected a whole number, got 'seven'" in errors
    assert "optimizer.name: 'adamv' is not one of 'adamw'" in errors
    assert "optimizer.lr: expected a number, got 'fast'" in errors
    assert any(
        error.startswith("global_train_batch_size: expected a whole number") for error in errors
    )


def test_a_missing_key_is_named(tmp_path):
    (tmp_path / "x.yaml").write_text("vision_tower: {}\n")
    errors = errors_of(tmp_path / "x.yaml")
    assert "vision_tower.name: missing" in errors
    assert "max_duration: missing" in errors


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("global_train_batch_size=0", "global_train_batch_size: 0 is less than 1"),
        ("device_train_microbatch_size=0", "device_train_microbatch_size: 0 is less than 1"),
        ("device_train_microbatch_size=auto", "auto works on a GPU only"),
        ("max_duration=soon", "max_duration: 'soon' is not a time"),
        ("max_duration=0ba", "max_duration: '0ba' is not greater than 0"),
        ("max_duration=0.5dur", "max_duration: '0.5dur' is not in ep, ba, sp, tok"),
        ("max_seq_len=5", "max_seq_len: 5 is less than 6"),
        ("optimizer.lr=0", "optimizer.lr: 0.0 is not a positive number"),
        ("optimizer.lr=.nan", "optimizer.lr: nan is not a positive number"),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas: [0.9, 1.0] are not both in [0, 1)"),
        ("scheduler.alpha_f=2", "scheduler.alpha_f: 2.0 is not between 0 and 1"),
        ("fsdp_config.verbose=true", "fsdp_config: has no effect with parallelism: replicate"),
        (
            "fsdp_config.data_parallel_shard_degree=2",
            "data_parallel_shard_degree: has no effect with parallelism: replicate",
        ),
        ("autoresume=true", "autoresume: needs a save_folder"),
        ("load_weights_only=true", "load_weights_only: has no effect without load_path"),
        ("eval_loader.drop_last=true", "eval_loader.drop_last: must be false"),
        ("vision_tower.config_overrides.hidden_size=8", "cannot change the shape of pretrained"),
        ("train_loader.num_workers=-1", "train_loader.num_workers: -1 is less than 0"),
        ("connector.resampler.num_latents=0", "connector.resampler.num_latents: 0 is less than 1"),
        ("precision=fp16", "precision: 'fp16' is not one of 'fp32', 'amp_bf16', 'auto'"),
        ("callbacks.evidence.num_samples=1", "callbacks.evidence.num_samples: 1 is less than 2"),
        ("callbacks.captions.num_images=0", "callbacks.captions.num_images: 0 is less than 1"),
        ("callbacks.warnings.gap_after=2", "callbacks.warnings.gap_after: 2.0 is more than 1"),
        ("seed=true", "seed: expected a whole number, got True"),
    ],
)
def test_values_and_combinations_that_cannot_work_are_refused(tiny_yaml, override, message):
    assert any(message in error for error in errors_of(tiny_yaml(), override))


@pytest.mark.parametrize("callback", ["evidence", "captions"])
def test_what_looks_at_the_evaluation_set_needs_one(tiny_yaml, callback):
    errors = errors_of(tiny_yaml(eval_loader=None, callbacks={callback: {}}))
    assert errors == [f"callbacks.{callback}: needs an eval_loader"]


def test_a_batch_that_does_not_divide_by_the_ranks_is_refused(tiny_yaml, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert any("8 does not divide by the 3 ranks; use 6" in e for e in errors_of(tiny_yaml()))


@pytest.mark.parametrize("item", ["--seed=1", "seed", "=1"])
def test_an_override_that_is_no_override_is_refused(tiny_yaml, item):
    assert errors_of(tiny_yaml(), item) == [f"override {item!r} is not of the form key=value"]


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "a: ${nowhere}\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    assert len(errors_of(tmp_path / "x.yaml")) >= 1


def test_a_missing_file_is_refused(tmp_path):
    assert errors_of(tmp_path / "none.yaml") == ["the file does not exist"]
