"""Several data sets in one loader: an epoch takes of each what the yaml says, checked as one is."""

from collections import Counter
from dataclasses import replace

import pytest
from streaming.base.batching import generate_work
from streaming.base.world import World

from mixtures import SHARES, SIZES, counted, mixed
from remote_shards import read
from vlm_composer.config.data import LoaderConfig
from vlm_composer.config.loader import build
from vlm_composer.data.mixing import Part, describe_mix, mix_of
from vlm_composer.data.opening import open_dataset
from vlm_composer.data.stream import CorruptShardError


@pytest.fixture
def section(two_sets):
    """Makes the section of a yaml; arguments as for `mixed`."""

    def make(weights=None, **options):
        errors = []
        weights = weights or {"emoji": {}, "llava": {}}
        loader = build(LoaderConfig, mixed(two_sets, weights, **options), "", errors)
        assert not errors
        return loader

    return make


def open_loader(loader):
    return open_dataset(loader, batch_size=4, store_timeout=0)


def epoch_of(captions):
    return [sample["id"] for sample in captions]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    ("weights", "dataset", "expected"),
    [
        ({}, {}, {"emoji": 20, "llava": 40}),
        ({}, {"epoch_size": 30}, {"emoji": 10, "llava": 20}),
        (SHARES, {}, {"emoji": 45, "llava": 15}),
        (SHARES, {"epoch_size": 20}, {"emoji": 15, "llava": 5}),
        (SHARES, {"epoch_size": 100, "sampling_granularity": 4}, {"emoji": 75, "llava": 25}),
        ({"emoji": {"repeat": 2.5}, "llava": {}}, {}, {"emoji": 50, "llava": 40}),
        ({"emoji": {"choose": 7}, "llava": {"repeat": 0.5}}, {}, {"emoji": 7, "llava": 20}),
    ],
)
def test_an_epoch_takes_what_the_yaml_says(section, weights, dataset, expected, shuffle):
    loader = section(weights, shuffle=shuffle, **dataset)
    captions = open_loader(loader)
    ids = epoch_of(captions)
    assert counted(ids) == expected
    assert len(ids) == captions.epoch_size == sum(expected.values())
    # Each sample as often as any other of its set, or once more.
    for name, taken in expected.items():
        times = Counter(one for one in ids if one[0] == name[0])
        assert len(times) == min(taken, SIZES[name])
        assert set(times.values()) <= {taken // SIZES[name], -(-taken // SIZES[name])}
    parts = {f"streams.{name}": Part(taken, SIZES[name]) for name, taken in expected.items()}
    assert captions.mix == parts
    assert mix_of(loader, {key: part.there for key, part in parts.items()}) == parts


@pytest.mark.parametrize("method", ["balanced", "fixed"])
def test_a_part_is_drawn_anew_in_every_epoch_or_once(section, method):
    captions = open_loader(section(SHARES, shuffle=True, sampling_method=method))
    first, second = epoch_of(captions), epoch_of(captions)
    assert first != second
    assert (sorted(first) == sorted(second)) == (method == "fixed")
    assert counted(first) == counted(second)


def test_the_order_of_the_yaml_changes_nothing(section):
    one = section(SHARES, shuffle=True)
    other = replace(one, streams=dict(reversed(one.streams.items())))
    assert list(other.streams) == ["llava", "emoji"]
    first, second = open_loader(one), open_loader(other)
    assert epoch_of(first) == epoch_of(second)
    assert first.fingerprint == second.fingerprint


def test_streams_are_mixed_all_over_an_epoch(section):
    ids = epoch_of(open_loader(section(SHARES, shuffle=True)))
    for start in range(0, 60, 20):
        assert 10 <= counted(ids[start : start + 20])["emoji"] <= 19


@pytest.mark.parametrize("seen", [0, 24])
def test_global_batches_do_not_depend_on_the_ranks(section, seen):
    captions = open_loader(section(SHARES, shuffle=True))

    def batches(nodes, ranks, workers):
        world = World(nodes, ranks, workers, 0)
        captions.batch_size = 12 // (nodes * ranks)
        captions.num_canonical_nodes, captions.shuffle_block_size = 1, 1 << 18
        captions.initial_physical_nodes = 1 if seen else None
        work = generate_work("random", captions, world, 1, seen)
        # node, rank, worker, batch, sample → step, samples; workers take turns
        steps = work.transpose(3, 2, 0, 1, 4).reshape(-1, 12)
        return [sorted(step.tolist()) for step in steps if (step >= 0).all()]

    expected = batches(1, 1, 1)
    assert len(expected) == (60 - seen) // 12
    assert batches(1, 2, 1) == batches(1, 4, 1) == batches(2, 2, 1) == expected
    assert batches(1, 2, 2) == expected


def test_the_fingerprint_tells_streams_and_weights_apart(section, two_sets):
    def fingerprint(weights, **dataset):
        return open_loader(section(weights, **dataset)).fingerprint

    shares = fingerprint(SHARES)
    assert shares.keys() == {"streams.emoji", "streams.llava"}
    assert shares["streams.emoji"].keys() == {"samples", "index_xxh64", "proportion"}
    others = [
        fingerprint({}),
        fingerprint(SHARES, epoch_size=59),
        fingerprint(SHARES | {"emoji": {"proportion": 0.7}}),
        fingerprint({"emoji": {"repeat": 2}, "llava": {}}),
        fingerprint({"emoji": {"choose": 40}, "llava": {}}),
    ]
    assert all(shares != other for other in others)
    assert fingerprint(SHARES, epoch_size=60) == shares
    # A set alone is what it always was, whatever it is called.
    alone = fingerprint({"llava": {}})
    assert alone == {"samples": 40, "index_xxh64": shares["streams.llava"]["index_xxh64"]}
    plain = LoaderConfig()
    plain.dataset.local = str(two_sets / "llava" / "train")
    assert open_loader(plain).fingerprint == alone


@pytest.mark.parametrize("workers", [0, 2])
def test_every_stream_is_checked_and_has_its_own_cache(section, two_sets, tmp_path, workers):
    loader = section(caches=tmp_path)
    expected = read(open_loader(section()), workers)
    assert len(expected) == 60
    assert read(open_loader(loader), workers).keys() == expected.keys()
    for name in SIZES:
        names = {path.name for path in (two_sets / name / "train").iterdir()}
        assert {path.name for path in (tmp_path / name).iterdir()} == names
    shard = sorted((tmp_path / "llava").glob("*.mds"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"x")
    assert read(open_loader(loader), workers).keys() == expected.keys()
    assert shard.read_bytes() == whole, "it was fetched again"
    for stream in loader.streams.values():
        stream.local, stream.remote = str(tmp_path / stream.local), None
    shard.write_bytes(whole[:-1] + b"x")
    with pytest.raises(CorruptShardError, match=f"{shard} is corrupt"):
        read(open_loader(loader), workers)


def test_a_cache_limit_holds_for_all_streams_together(section, two_sets, tmp_path):
    places = [two_sets / name / "train" for name in SIZES]
    index = sum((place / "index.json").stat().st_size for place in places)
    limit = index + 5 * max(p.stat().st_size for place in places for p in place.glob("*.mds"))
    loader = section(caches=tmp_path, cache_limit=limit, predownload=4)
    assert len(read(open_loader(loader))) == 60
    kept = list(tmp_path.glob("*/*.mds"))
    assert index + sum(path.stat().st_size for path in kept) <= limit
    assert len(kept) < sum(len(list(place.glob("*.mds"))) for place in places)
    assert read(open_loader(section())), "what was downloaded from is whole"


def test_a_stream_that_is_not_there_is_named(section, tmp_path):
    loader = section()
    loader.streams["llava"].local = str(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} holds no MDS shards"):
        open_loader(loader)


def test_what_an_epoch_takes_is_told():
    mix = {"streams.emoji": Part(4500, 2000), "streams.llava": Part(1500, 4000)}
    assert describe_mix(mix) == (
        "an epoch of 6,000 samples takes 4,500 of streams.emoji (2,000, each 2.25 times), "
        "1,500 of streams.llava (4,000, each 0.375 times)"
    )
