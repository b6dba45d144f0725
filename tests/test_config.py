"""The schema refuses what cannot work, all of it at once, before anything is loaded."""

import dataclasses
import typing
from pathlib import Path

import pytest
from composer.core import Time

from vlm_composer.config import TrainConfig
from vlm_composer.config.loader import ConfigError
from vlm_composer.config.run import RunSettings
from vlm_composer.config.section import constraint_of, keys_of
from vlm_composer.config.times import TimeRule

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
        (
            "callbacks.warnings.gap_after=2",
            "callbacks.warnings.gap_after: 2.0 is not between 0 and 1",
        ),
        ("seed=true", "seed: expected a whole number, got True"),
    ],
)
def test_values_and_combinations_that_cannot_work_are_refused(tiny_yaml, override, message):
    assert any(message in error for error in errors_of(tiny_yaml(), override))


def sections(schema=RunSettings, path=""):
    """Each dataclass of the schema, with its dotted key."""
    yield path, schema
    for name, hint in typing.get_type_hints(schema).items():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                yield from sections(part, f"{path}{name}.")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("device_eval_batch_size=0", "device_eval_batch_size: 0 is less than 1"),
        ("callbacks.warnings.gap_after=.nan", "gap_after: nan is not between 0 and 1"),
        (
            "device_train_microbatch_size=[]",
            "device_train_microbatch_size: expected a whole number or 'auto', got []",
        ),
        ("optimizer.betas=[0.9]", "optimizer.betas: expected a list of 2 values, got [0.9]"),
        ("optimizer.betas=[x,0.9]", "optimizer.betas[0]: expected a number, got 'x'"),
    ],
)
def test_a_value_is_refused_and_named_in_words(tiny_yaml, override, message):
    """A union is described in words, and a 0 or NaN does not slip through."""
    found = errors_of(tiny_yaml(), override)
    assert len(found) == 1
    assert message in found[0]


def test_values_of_another_type_do_not_hide_values_out_of_range(tiny_yaml):
    found = errors_of(tiny_yaml(), "seed=x", "save_interval=5", "connector.resampler.depth=0")
    assert found == [
        "seed: expected a whole number, got 'x'",
        "connector.resampler.depth: 0 is less than 1",
        "save_interval: expected a time such as 1ep, 500ba or 1h30m, got 5",
    ]


def test_values_out_of_range_do_not_hide_combinations(tiny_yaml):
    found = errors_of(tiny_yaml(), "optimizer.lr=0", "autoresume=true", "scheduler.t_warmup=9ba")
    assert [error.split(":")[0] for error in found] == [
        "optimizer.lr",
        "scheduler.t_warmup",
        "autoresume",
    ]


TIMED = {"callbacks": {"speed_report": {}, "step_times": {}}}
TIMES = {
    "max_duration": {"ep", "ba", "sp", "tok"},
    "scheduler.t_warmup": {"ep", "ba", "sp", "tok", "dur"},
    "eval_interval": {"ep", "ba", "sp", "tok", "dur", "sec"},
    "save_interval": {"ep", "ba", "sp", "tok", "dur", "sec"},
    "console_log_interval": {"ep", "ba"},
    "callbacks.speed_report.interval": {"ep", "ba", "sp", "tok", "dur", "sec"},
    "callbacks.step_times.interval": {"ep", "ba", "sp", "tok", "dur", "sec"},
}


def test_every_key_that_holds_a_time_is_marked():
    marked = {}
    for path, section in sections():
        hints = keys_of(section)
        for field in dataclasses.fields(section):
            rule = constraint_of(hints[field.name])
            if isinstance(rule, TimeRule):
                marked[path + field.name] = set(rule.units)
            is_marked = isinstance(rule, TimeRule)
            assert is_marked == is_time(field.default) or field.name == "max_duration", field.name
    assert marked == TIMES


def is_time(default):
    try:
        return isinstance(default, str) and bool(Time.from_timestring(default))
    except ValueError:
        return False


@pytest.mark.parametrize("key", TIMES)
@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("0.5ep", "is not a whole number"),
        ("1.5ba", "is not a whole number"),
        ("0.1sec", "is not a whole number"),
        ("ep", "is not a time"),
        ("soon", "is not a time"),
        ("5epochs", "is not a time"),
        ("90m", "is not a time"),  # Composer's clock ends at 59m
        ("infep", "is not a time"),
        ("nanba", "is not a time"),
        ("1e400ba", "is not a time"),
        ("1e30ba", "is more than 9223372036854775807ba"),
        ("'5'", "has no unit"),  # which Composer takes for 50 seconds
        ("1h5", "has no unit"),
        ("3iter", "is not in ep, ba"),
        ("-1ba", "than 0"),
        ("''", "has no unit"),
    ],
)
def test_a_time_that_cannot_work_is_refused(tiny_yaml, key, text, fault):
    (error,) = errors_of(tiny_yaml(**TIMED), f"{key}={text}")
    text = text.strip("'")
    assert error.startswith(f"{key}: {text!r} "), error
    assert fault in error
    assert "; give a time such as " in error


@pytest.mark.parametrize("key", TIMES)
@pytest.mark.parametrize("unit", ["ep", "ba", "sp", "tok", "dur", "sec"])
def test_each_key_takes_its_units_and_no_others(tiny_yaml, key, unit):
    path = tiny_yaml(**TIMED, max_duration=f"9{unit}" if unit in TIMES["max_duration"] else "9ba")
    warmup = f"scheduler.t_warmup=0{unit if unit in TIMES['max_duration'] else 'dur'}"
    item = f"{key}=1{unit}"
    if unit in TIMES[key]:
        TrainConfig.read(path, [warmup, item])
    else:
        (error,) = errors_of(path, warmup, item)
        assert error.startswith(f"{key}: '1{unit}' is not in ")


@pytest.mark.parametrize("key", TIMES)
def test_a_bare_number_is_no_time(tiny_yaml, key):
    (error,) = errors_of(tiny_yaml(**TIMED), f"{key}=10")
    assert error.startswith(f"{key}: expected a time such as ")
    assert error.endswith(", got 10")


@pytest.mark.parametrize("text", ["0ep", "0dur", "1.01dur", "nandur", "-0.1dur"])
def test_an_interval_is_some_of_the_run(tiny_yaml, text):
    (error,) = errors_of(tiny_yaml(), f"eval_interval={text}")
    assert error.startswith(f"eval_interval: {text!r} is ")


@pytest.mark.parametrize("text", ["1 ep", "1EP", "1e1ba", "1.0ba", "1_000ba", "1ep"])
def test_what_composer_reads_as_a_time_is_one(tiny_yaml, text):
    config = TrainConfig.read(tiny_yaml(max_duration=text, scheduler={"t_warmup": "0.1dur"}))
    assert config.max_duration == text


@pytest.mark.parametrize(
    ("length", "warmup", "fault"),
    [
        ("20sp", "1ba", "'1ba' is not in the unit of max_duration: '20sp'; give it in sp or dur"),
        ("20sp", "0ep", "'0ep' is not in the unit of max_duration: '20sp'; give it in sp or dur"),
        ("9tok", "1sp", "'1sp' is not in the unit of max_duration: '9tok'; give it in tok or dur"),
        ("1ep", "9tok", "'9tok' is not in the unit of max_duration: '1ep'; give it in ep or dur"),
        ("4ba", "5ba", "'5ba' is longer than max_duration: '4ba'; give that or less"),
        ("1ep", "2ep", "'2ep' is longer than max_duration: '1ep'; give that or less"),
        ("4ba", "2dur", "'2dur' is more than 1dur; give a time such as 100ba or 0.03dur"),
    ],
)
def test_a_warm_up_that_does_not_fit_the_run_is_refused(tiny_yaml, length, warmup, fault):
    found = errors_of(tiny_yaml(), f"max_duration={length}", f"scheduler.t_warmup={warmup}")
    assert found == [f"scheduler.t_warmup: {fault}"]


def test_times_are_refused_with_all_other_mistakes(tiny_yaml):
    found = errors_of(tiny_yaml(), "max_duration=0.5ep", "eval_interval=h", "max_seq_len=5")
    assert [error.split(":")[0] for error in found] == [
        "max_duration",
        "eval_interval",
        "max_seq_len",
    ]


LLAVA = {"local": "/llava", "proportion": 0.7}
EMOJI = {"local": "/emoji", "proportion": 0.3}


def stream_errors(tiny_yaml, streams, *overrides, side="train", dataset=None):
    section = {"streams": streams, "dataset": dataset or {}}
    return errors_of(tiny_yaml(**{f"{side}_loader": section}), *overrides)


def test_streams_take_the_place_of_one_data_set(tiny_yaml):
    streams = {"llava": LLAVA, "emoji": EMOJI | {"remote": "s3://b/emoji"}}
    loader = TrainConfig.read(
        tiny_yaml(train_loader={"streams": streams}), ["train_loader.streams.emoji.proportion=2"]
    ).train_loader
    assert list(loader.sources) == ["streams.emoji", "streams.llava"]
    emoji, llava = loader.sources.values()
    assert (emoji.place, emoji.weight) == ("s3://b/emoji", {"proportion": 2.0})
    assert (llava.place, llava.weight) == ("/llava", {"proportion": 0.7})
    (alone,) = TrainConfig.read(tiny_yaml()).train_loader.sources.items()
    assert alone[0] == "dataset"
    assert alone[1].local.endswith("train")
    assert alone[1].weight == {}


@pytest.mark.parametrize("side", ["train", "eval"])
def test_data_sets_are_named_in_one_way(tiny_yaml, side):
    key = f"{side}_loader"
    both = {"local": "/one", "remote": "s3://b/one"}
    found = stream_errors(tiny_yaml, {"llava": {"local": "/llava"}}, side=side, dataset=both)
    assert found == [
        f"{key}.dataset.{name}: {both[name]}, and {key}.streams with llava; give one of the two"
        for name in ("local", "remote")
    ]
    (found,) = stream_errors(tiny_yaml, None, side=side)
    assert found.startswith(f"{key}.dataset.local: missing; give it, or {key}.streams")
    (found,) = stream_errors(tiny_yaml, {}, side=side)
    assert found.startswith(f"{key}.streams: has no stream")
    (found,) = stream_errors(tiny_yaml, {"llava": None}, side=side)
    assert found == f"{key}.streams.llava.local: missing"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["streams.emoji.proportion=-0.3"], "streams.emoji.proportion: -0.3 is not a positive"),
        (["streams.emoji.proportion=0"], "streams.emoji.proportion: 0.0 is not a positive"),
        (["streams.emoji.proportion=.inf"], "streams.emoji.proportion: inf is not a positive"),
        (["streams.emoji.repeat=2"], "streams.emoji: proportion 0.3 and repeat 2.0; give one"),
        (
            ["streams.emoji.proportion=null", "streams.emoji.repeat=2"],
            "train_loader: proportion 0.7 for streams.llava, and repeat 2.0 for streams.emoji; "
            "give every stream a proportion, or none",
        ),
        (
            ["streams.emoji.proportion=null"],
            "proportion 0.7 for streams.llava, and none for streams.emoji; give every",
        ),
        (
            [
                *("streams.emoji.proportion=null", "streams.llava.proportion=null"),
                "streams.emoji.choose=5",
            ],
            "dataset.epoch_size: 100, and choose 5 for streams.emoji, which says it too",
        ),
        (["dataset.epoch_size=0"], "dataset.epoch_size: 0 is less than 1"),
        (["dataset.sampling_granularity=0"], "dataset.sampling_granularity: 0 is less than 1"),
        (["dataset.sampling_method=random"], "'random' is not one of 'balanced', 'fixed'"),
        (
            ["dataset.cache_limit=1gb"],
            "dataset.cache_limit: 1gb, but train_loader.streams.emoji has no remote: streaming "
            "would delete the shards of /emoji",
        ),
        (["streams.emoji.local=/llava/"], "streams.llava.local are both /llava/; give each"),
        (
            ["streams.emoji.remote=/llava", "streams.llava.remote=s3://b/llava"],
            "streams.llava.local: /llava is a cache, and train_loader.streams.emoji.remote is",
        ),
        (["streams.emoji.weight=1"], "streams.emoji.weight: unknown key"),
    ],
)
def test_streams_that_cannot_be_mixed_are_refused(tiny_yaml, overrides, message):
    streams = {"llava": LLAVA, "emoji": EMOJI}
    overrides = [f"train_loader.{override}" for override in overrides]
    found = stream_errors(tiny_yaml, streams, *overrides, dataset={"epoch_size": 100})
    assert any(message in error for error in found), found


def test_what_an_epoch_takes_of_one_data_set(tiny_yaml):
    path = tiny_yaml()
    config = TrainConfig.read(path, ["train_loader.dataset.epoch_size=10"])
    assert config.train_loader.dataset.epoch_size == 10
    (found,) = errors_of(path, "train_loader.dataset.sampling_method=fixed")
    assert found.startswith("train_loader.dataset.sampling_method: fixed has no effect where an")


def test_an_evaluation_takes_every_sample_once(tiny_yaml):
    found = stream_errors(
        *(tiny_yaml, {"llava": LLAVA, "emoji": EMOJI}),
        side="eval",
        dataset={"epoch_size": 5},
    )
    once = "but every evaluation sample counts once; remove it"
    assert found == [
        f"eval_loader.streams.emoji.proportion: 0.3, {once}",
        f"eval_loader.streams.llava.proportion: 0.7, {once}",
        f"eval_loader.dataset.epoch_size: 5, {once}",
    ]


def test_a_cache_is_of_one_data_set(tiny_yaml, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    sections = {
        "train_loader": {"streams": {"a": {"local": str(tmp_path), "remote": "s3://b/a"}}},
        "eval_loader": {"dataset": {"local": str(tmp_path / "link")}},
    }
    (found,) = errors_of(tiny_yaml(**sections))
    assert found == (
        f"train_loader.streams.a.local and eval_loader.dataset.local are both {tmp_path}; give "
        "each its own"
    )


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
