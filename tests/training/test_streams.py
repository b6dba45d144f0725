"""Runs over several data sets: what an epoch is, and going on in the middle of one."""

import json

import pytest
import torch
from composer.utils import dist
from test_checkpoints import Crash

from checkpoints import HOLD, folder_of
from convert.feature_pass import make_features
from mixtures import SHARES, counted, mixed
from runs import run, start
from vlm_composer import train
from vlm_composer.training.checkpoint_file import CheckpointError


@pytest.fixture
def mixed_config(tiny_config, two_sets):
    """A configuration that trains on `two_sets`; `loader` holds arguments for `mixed`."""

    def make(weights=SHARES, loader=None, **changes):
        section = mixed(two_sets, weights, **{"shuffle": True} | (loader or {}))
        return tiny_config(train_loader=section, **changes)

    return make


def test_an_epoch_is_what_the_streams_make_it(mixed_config, capsys):
    weights = {"emoji": {"choose": 8}, "llava": {"repeat": 0.4}}
    report = {"speed_report": {"warmup_batches": 0}}
    trainer, _, watch = run(mixed_config(weights, max_duration="2ep", callbacks=report))
    assert trainer.state.timestamp.epoch == 2
    assert [len(ids) for ids in watch.ids] == [8] * 6
    epochs = [[one for ids in watch.ids[i : i + 3] for one in ids] for i in (0, 3)]
    assert [counted(ids) for ids in epochs] == [{"emoji": 8, "llava": 16}] * 2
    assert set(epochs[0]) != set(epochs[1]), "other samples in the second"
    said = capsys.readouterr().err
    assert "an epoch of 24 samples takes 8 of streams.emoji (20, each 0.4 times), 16 of" in said
    assert "one epoch of 24 samples takes" in said


def test_streams_that_are_not_shuffled_are_warned_of(mixed_config, capsys):
    start(mixed_config(loader={"shuffle": False}))
    said = capsys.readouterr().err
    assert "WARNING train_loader.dataset.shuffle: false, so that the streams are read one" in said


@pytest.mark.parametrize("saved", [3, 7])
def test_a_resumed_run_ends_like_an_uninterrupted_one(mixed_config, tmp_path, saved):
    """Epochs of seven batches, of which each draws its samples anew: one is resumed within the
    first, the other at its end."""
    loader = {"workers": 2, "caches": tmp_path / "caches"}
    settings = {"max_duration": "9ba", "loader": loader}
    changes = {"save_folder": str(tmp_path / "saved"), "save_interval": f"{saved}ba"}
    _, expected, watch = run(mixed_config(**settings))
    trainer, _, first = start(mixed_config(**settings, **changes))
    trainer.state.callbacks.append(Crash(saved + 1))
    with pytest.raises(Crash.Now):
        trainer.fit()
    trainer.close()
    trainer, resumed, second = start(mixed_config(**settings, **changes, autoresume=True))
    assert trainer.state.timestamp.batch == saved
    trainer.fit()
    trainer.close()
    assert first.ids[:saved] + second.ids == watch.ids
    assert first.losses[:saved] + second.losses == watch.losses
    assert all(map(torch.equal, resumed.connector.parameters(), expected.connector.parameters()))


def test_other_streams_and_weights_are_refused(mixed_config, two_sets):
    config = mixed_config(**HOLD)
    run(config)
    path = {"load_path": str(folder_of(config))}

    def refusal(weights, **loader):
        with pytest.raises(CheckpointError, match="is of a run over other data: ") as raised:
            start(mixed_config(weights, loader, **path))
        return str(raised.value)

    assert "streams.emoji.proportion: 0.75 became 0.5" in refusal(
        {"emoji": {"proportion": 0.5}, "llava": {"proportion": 0.25}}
    )
    assert "epoch_size: None became 48" in refusal(SHARES, epoch_size=48)
    for key, before, now in (
        ("sampling_method", "balanced", "fixed"),
        ("sampling_granularity", 1, 2),
    ):
        changed = rf"inside an epoch, .*dataset\.{key}: {before} became {now}\."
        with pytest.raises(CheckpointError, match=changed):
            start(mixed_config(loader={key: now}, **path))
    assert "streams.llava.samples: 40 became None" in refusal({"emoji": {}})
    said = refusal(SHARES, side="eval", epoch_size=48)
    assert "streams.emoji.samples: 20 became 2" in said
    assert "streams.emoji.index_xxh64: " in said
    trainer, _, _ = start(mixed_config(**path, load_weights_only=True, weights={"emoji": {}}))
    assert trainer.state.timestamp.batch == 0


@pytest.mark.world_size(2)
def test_two_ranks_train_on_the_samples_of_one(mixed_config, tmp_path, shared_path):
    """The global batches are those that streaming makes for one rank, in both legs of a run."""
    from streaming.base.batching import generate_work
    from streaming.base.world import World

    settings = {"device_train_microbatch_size": 4, "max_duration": "7ba"}
    saved = {"save_folder": str(shared_path / "saved"), "save_interval": "3ba"}
    trainer, _, watch = start(mixed_config(**settings, **saved))
    captions = trainer.state.train_dataloader.dataset
    trainer.fit()
    trainer.close()
    captions.batch_size = 8
    work = generate_work("random", captions, World(1, 1, 1, 0), 0, 0).reshape(-1, 8)
    expected = [[captions[int(one)]["id"] for one in step] for step in work[:7]]
    assert [sorted(ids) for ids in watch.ids] == [sorted(ids) for ids in expected]
    dist.barrier()
    path = str(shared_path / "saved" / "ep0-ba3.safetensors")
    _, _, rest = run(mixed_config(**settings, load_path=path))
    assert rest.ids == watch.ids[3:]
    assert rest.losses == watch.losses[3:]


@pytest.fixture
def features(mixed_config, tiny_config, two_sets, tmp_path):
    """Features of both sets, in a folder like `two_sets`."""

    def write(**dtypes):
        for name in SHARES:
            config = tiny_config()
            config.train_loader.dataset.local = str(two_sets / name / "train")
            config.eval_loader = None
            out = tmp_path / "features" / name
            dtype = dtypes.get(name, "fp32")
            make_features(config, out, dtype=dtype, size_limit=20_000, show_progress=False)
        return tmp_path / "features"

    return write


def test_a_run_from_features_is_the_run_from_images(mixed_config, features):
    written = features()
    settings = {"max_duration": "2ep", "eval_loader": None}
    _, _, expected = run(mixed_config(**settings))
    config = mixed_config(**settings)
    for name, stream in config.train_loader.streams.items():
        stream.local = str(written / name / "train")
    _, _, found = run(config)
    assert found.ids == expected.ids, "drawn and shuffled as the images are"
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert "patches" in found.batches[0]


def test_streams_of_two_kinds_are_refused(tiny_yaml, mixed_config, features, two_sets, capsys):
    written = features(emoji="fp16")
    emoji, llava = (written / name / "train" for name in ("emoji", "llava"))
    images = two_sets / "llava" / "train"

    def refusal(other):
        streams = {"a": {"local": str(emoji)}, "b": {"local": str(other)}}
        path = tiny_yaml(train_loader={"streams": streams, "num_workers": 0})
        assert train.main([str(path)]) == 1
        return capsys.readouterr().err

    said = refusal(images)
    assert f"{emoji} holds features and {images} holds images; the streams of a loader" in said
    said = refusal(llava)
    assert f"{emoji} and {llava} hold features of two kinds: dtype fp16 and fp32; write" in said


def test_features_of_other_shards_are_refused(tiny_config, features):
    folder = features() / "emoji" / "train"
    described = json.loads((folder / "features.json").read_text())
    described["shuffle_units"][0] += 1
    (folder / "features.json").write_text(json.dumps(described))
    loader = {"streams": {"emoji": {"local": str(folder)}}, "num_workers": 0}
    with pytest.raises(
        ValueError, match=r"emoji/train: features.json tells of 21 samples, .* hold 20;"
    ):
        start(tiny_config(train_loader=loader))
