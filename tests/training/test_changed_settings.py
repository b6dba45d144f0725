"""A resumed run with other settings: within an epoch its order stays, between epochs it may change.

43 samples in small shards make 5 batches of 8, with 3 samples left over.
"""

from dataclasses import fields

import pytest
from composer.core import Callback

from convert import convert_llava
from runs import run, start
from tiny import write_pairs
from vlm_composer.config import TrainConfig
from vlm_composer.training.checkpoint_file import CheckpointError, CheckpointFile, write_checkpoint
from vlm_composer.training.guards import ShortEpochError

INSIDE, LAST_BATCH, BETWEEN = "ep0-ba3", "ep0-ba5", "ep1-ba5"
ORDER = [
    ("global_train_batch_size", 12),
    ("num_canonical_nodes", 3),
    ("shuffle", False),
    ("shuffle_algo", "py1s"),
    ("shuffle_block_size", 4),
    ("shuffle_seed", 5),
]


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    json_path, images = write_pairs(folder, 50)
    settings = {"eval_ratio": 0.14, "size_limit": 1500, "show_progress": False}
    assert convert_llava(json_path, images, folder / "mds", **settings).shards["train"] > 5
    return folder / "mds" / "train"


@pytest.fixture
def config_of(tiny_config, small_shards, tmp_path):
    """A configuration with changed settings of the run, the loader or the data set."""

    def make(name, **changes):
        dataset = {"local": str(small_shards), "shuffle": True}
        loader = {"dataset": dataset, "num_workers": 0}
        settings = {"max_duration": "2ep", "eval_loader": None, "max_seq_len": 64}
        for key, value in changes.items():
            if key in ("drop_last", "num_workers", "prefetch_factor"):
                loader[key] = value
            elif key in {field.name for field in fields(TrainConfig)}:
                settings[key] = value
            else:
                dataset[key] = value
        folder = str(tmp_path / name)
        return tiny_config(run_folder=folder, save_folder=folder, train_loader=loader, **settings)

    return make


_saved = {}


@pytest.fixture
def saved(config_of, tmp_path_factory):
    """Checkpoints of an undisturbed run by name, and what it read."""
    if not _saved:
        for every in ("1ba", "1ep"):
            config = config_of(every, save_interval=every)
            config.save_folder = str(tmp_path_factory.mktemp("saved"))
            _, _, _saved["watch"] = run(config)
            _saved[every] = config.save_folder
    places = {INSIDE: "1ba", LAST_BATCH: "1ba", BETWEEN: "1ep"}
    paths = {name: f"{_saved[every]}/{name}.safetensors" for name, every in places.items()}
    return paths, _saved["watch"]


@pytest.mark.parametrize("name", [INSIDE, LAST_BATCH, BETWEEN])
def test_a_run_resumes_exactly_from_anywhere(config_of, saved, name):
    paths, whole = saved
    _, _, watch = run(config_of("resumed", load_path=paths[name]))
    done = int(name.partition("-ba")[2])
    assert watch.ids == whole.ids[done:]
    assert watch.losses == whole.losses[done:]


@pytest.mark.parametrize(("key", "value"), ORDER)
def test_the_order_of_an_epoch_does_not_change_within_it(config_of, saved, capsys, key, value):
    before = {"global_train_batch_size": 8, "shuffle": True, "shuffle_seed": 17}
    before |= {"num_canonical_nodes": 1, "shuffle_algo": "py1e", "shuffle_block_size": None}
    section = "" if key == "global_train_batch_size" else "train_loader.dataset."
    message = (
        "{} is inside an epoch, at sample 24 of 43, where these cannot change: "
        f"{section}{key}: {before[key]} became {value}. Set them back until the epoch ends, or "
        "start from its weights alone (load_path with load_weights_only: true)"
    )
    path = saved[0][INSIDE]
    with pytest.raises(CheckpointError) as raised:
        start(config_of("loaded", load_path=path, **{key: value}))
    assert str(raised.value) == message.format(path)
    assert " parameters, " not in capsys.readouterr().err, "the towers were not loaded"
    start(config_of("loaded", load_path=path))
    assert " parameters, " in capsys.readouterr().err


def test_a_resumed_run_refuses_it_too(config_of):
    config = config_of("run", save_interval="3ba", autoresume=True)
    config.max_duration = "3ba"
    run(config)
    again = config_of("run", autoresume=True, global_train_batch_size=4)
    message = r"ep0-ba3.* is inside an epoch, .*: global_train_batch_size: 8 became 4\. Set"
    with pytest.raises(CheckpointError, match=message):
        start(again)
    again.global_train_batch_size = 8
    trainer, _, _ = start(again)
    assert trainer.state.timestamp.batch == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_workers", 2),
        ("num_workers", 3),
        ("predownload", 3),
        ("cache_limit", None),
        ("validate_hash", None),
        ("device_train_microbatch_size", 2),
        ("max_seq_len", 200),
        ("image_decoder", "pil"),
    ],
)
def test_what_does_not_order_an_epoch_changes_within_it(config_of, saved, key, value):
    paths, whole = saved
    _, _, watch = run(config_of("resumed", load_path=paths[INSIDE], **{key: value}))
    assert watch.ids == whole.ids[3:]
    if key != "image_decoder":
        assert watch.losses == pytest.approx(whole.losses[3:], rel=1e-5)


def test_the_left_over_samples_are_read_where_they_are_wanted_now(config_of, saved):
    paths, _ = saved
    _, _, whole = run(config_of("all", drop_last=False))
    for name, done in ((INSIDE, 3), (LAST_BATCH, 5)):
        _, _, watch = run(config_of(f"after {name}", load_path=paths[name], drop_last=False))
        assert watch.ids == whole.ids[done:]
        assert [len(ids) for ids in watch.ids[-6:]] == [8, 8, 8, 8, 8, 3]


@pytest.mark.parametrize("name", [LAST_BATCH, BETWEEN])
@pytest.mark.parametrize(("key", "value"), ORDER)
def test_the_next_epoch_has_the_order_that_is_asked_for_now(config_of, saved, name, key, value):
    if key not in _saved:
        _saved[key] = run(config_of("whole", **{key: value}))[2].ids
    whole = _saved[key]
    _, _, watch = run(config_of("resumed", load_path=saved[0][name], **{key: value}))
    assert watch.ids == whole[len(whole) // 2 :]
    assert watch.ids[0] != saved[1].ids[5], "the order is another one"


def test_batches_that_the_left_over_samples_would_fill_are_within_the_epoch(config_of, saved):
    config = config_of("run", load_path=saved[0][LAST_BATCH], global_train_batch_size=2)
    with pytest.raises(CheckpointError, match="inside an epoch, at sample 40 of 43"):
        start(config)
    run(config_of("again", load_path=saved[0][BETWEEN], global_train_batch_size=2))


class LoseTheRest(Callback):
    """Ends the data in the first batch, as a stock StreamingDataset does without its store."""

    def batch_start(self, state, logger):
        state.train_dataloader.dataset._event.set()


def test_a_batch_lost_after_batches_of_another_size_is_missed(config_of, saved, tmp_path):
    """Two batches, of 8 and of 16, are as many as an epoch has of 16, and fewer samples."""
    checkpoint = CheckpointFile(saved[0][INSIDE].replace("ba3", "ba1"))
    document = checkpoint.document
    document["settings"]["global_train_batch_size"] = 16  # so that it is not refused
    path = tmp_path / "altered.safetensors"
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names}
    write_checkpoint(path, tensors, document)
    config = config_of("run", load_path=str(path), global_train_batch_size=16)
    run(config)  # 8 + 2 × 16 of 43 samples
    config.save_folder = None
    trainer, _, watch = start(config)
    trainer.state.callbacks.append(LoseTheRest())
    message = "epoch 0 ended after 2 of 2 batches and 24 of 40 samples; resume"
    with pytest.raises(ShortEpochError, match=message):
        trainer.fit()
    assert len(watch.losses) == 1
