"""An index that should not be followed is refused, in one line, by whatever reads one."""

import ast
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
from streaming import MDSWriter

from convert.inspect import main as inspect
from convert.verify import main as verify
from hostile_json import CASES, DAMAGED, encoded, entry, raw, shard, written, zipped
from remote_shards import SAMPLES, open_captions, read
from vlm_composer import train
from vlm_composer.config.data import StreamConfig
from vlm_composer.mds.index import DamagedIndexError, IndexFaultError, parse_index
from vlm_composer.mds.reader import read_folder
from vlm_composer.planning.on_gpus import _epoch
from vlm_composer.preflight.shards import read_shards


def refused(named, error):
    text = str(error)
    assert text.isprintable()
    assert len(text) < 500
    # A number beyond int64 and half a pair of surrogates are no JSON to begin with.
    assert named in text or "it is not JSON (" in text


@pytest.mark.parametrize("number", range(len(CASES)))
def test_every_value_is_checked(folder, number):
    named, change = CASES[number]
    with pytest.raises(IndexFaultError) as error:
        parse_index(written(change, folder))
    refused(named, error.value)


@pytest.mark.parametrize("data", DAMAGED, ids=range(len(DAMAGED)))
def test_what_is_no_index_at_all(data):
    with pytest.raises(DamagedIndexError, match=r"^it (is|has) "):
        parse_index(data)


def test_what_writers_write_is_read(folder):
    index = parse_index((folder / "index.json").read_bytes())
    assert index.samples == SAMPLES
    assert len(index.shards) == 7
    assert index.shards[3].stored.basename == "shard.00000.00003.mds"
    more = parse_index(written(entry(samples=9), folder))
    assert more.shards[1].samples == 9
    assert parse_index(written(zipped(), folder)).shards[1].stored.basename.endswith(".zstd")


READERS = {}


def reader(function):
    """A way in which a data set's folder is read; it returns what was said."""
    READERS[function.__name__.removeprefix("by_")] = function
    return function


def raised(function):
    with pytest.raises((ValueError, OSError)) as error:
        function()
    return str(error.value)


@reader
def by_training(place, tiny_yaml, capsys, **_):
    assert train.main([str(tiny_yaml()), f"train_loader.dataset.local={place}/train"]) == 1
    return capsys.readouterr().err.splitlines()[-1]


@reader
def by_training_from_a_folder_elsewhere(place, tiny_yaml, tmp_path, capsys, **_):
    dataset = f"train_loader.dataset.remote={place}/train"
    local = f"train_loader.dataset.local={tmp_path}/elsewhere"
    assert train.main([str(tiny_yaml()), dataset, local]) == 1
    return capsys.readouterr().err.splitlines()[-1]


@reader
def by_preflight(place, **_):
    return raised(lambda: read_shards(StreamConfig(local=f"{place}/train"), 0))


@reader
def by_the_plan(place, tiny_config, **_):
    config = tiny_config()
    config.train_loader.dataset.local = f"{place}/train"
    return raised(lambda: _epoch(config))


@reader
def by_the_reader_of_a_folder(place, **_):
    return raised(lambda: list(read_folder(Path(place, "train"))))


@reader
def by_inspect(place, tmp_path, capsys, **_):
    assert inspect([str(place), "--out", str(tmp_path / "look")]) == 1
    return capsys.readouterr().err.splitlines()[-1]


@reader
def by_verify(place, capsys, **_):
    assert verify([str(place), "--workers", "1"]) == 1
    return capsys.readouterr().out.splitlines()[0]


HOSTILE = {
    "a name above": ("basename", raw(basename="../victim.mds")),
    "an absolute name": ("basename", lambda index: raw(basename="{outside}")(index)),
    "a compressed name above": ("basename", zipped(basename="../victim.mds")),
    "an encoding that runs": ("'pkl'", encoded("pkl")),
    "too many samples": ("samples", entry(samples=10**13)),
    "too long a number": ("it is not JSON", entry(samples=10**400)),
    "half a pair": ("it is not JSON", raw(basename="\ud800")),
    "a wrong type": ("shards", lambda index: index | {"shards": {}}),
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("name", READERS)
def test_every_reader_refuses_it(folder, tiny_yaml, tiny_config, tmp_path, capsys, name, what):
    named, change = HOSTILE[what]
    place = tmp_path / "data"
    shutil.copytree(folder.parent, place)
    outside = tmp_path / "victim.mds"
    outside.write_text("precious")
    text = written(change, folder).replace(b"{outside}", str(outside).encode())
    (place / "train" / "index.json").write_bytes(text)
    given = {"tiny_yaml": tiny_yaml, "tiny_config": tiny_config, "tmp_path": tmp_path}
    said = READERS[name](place=place, capsys=capsys, **given)
    assert "index.json" in said
    assert named in said
    assert said.isprintable()
    assert outside.read_text() == "precious"


@pytest.mark.s3
@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("filled", [False, True])
def test_a_bucket_that_names_a_file_elsewhere(remote, folder, tmp_path, absolute, limited, filled):
    """The first shard is said to be a file outside of the cache."""
    cache, outside = tmp_path / "cache", tmp_path / "victim"
    outside.write_bytes(b"precious")
    name = str(outside) if absolute else os.path.relpath(outside, cache)
    first = folder / "shard.00000.00000.mds"
    index = written(shard(lambda e: e["raw_data"].update(basename=name), 0), folder)
    remote.put("index.json", index)
    if absolute:  # a bucket's key may be anything; this server tidies up others
        remote.put(name.lstrip("/"), first.read_bytes())
    if filled:  # an earlier run left it in the cache
        cache.mkdir()
        (cache / "index.json").write_bytes(index)
    options = {"cache_limit": 12_000, "predownload": 4} if limited else {}
    with pytest.raises(IndexFaultError, match=f"{remote.url}/index.json: shard 0: raw_data.base"):
        read(open_captions(cache, remote, check_at_start=limited, streaming=options))
    assert outside.read_bytes() == b"precious"
    if filled:
        with pytest.raises(IndexFaultError, match=r"index\.json: shard 0: raw_data\.basename is"):
            read(open_captions(cache))
    assert outside.read_bytes() == b"precious"


class Attack:
    """What a pickle runs."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", READERS)
def test_no_pickle_runs(tiny_yaml, tiny_config, tmp_path, capsys, name):
    columns = {"answer": "str", "id": "str", "image": "bytes", "prompt": "pkl"}
    run = tmp_path / "it ran"
    record = {"id": "0", "image": b"0", "prompt": Attack(run), "answer": "0"}
    with MDSWriter(out=str(tmp_path / "data/train"), columns=columns, hashes=["xxh64"]) as writer:
        for _ in range(20):
            writer.write(record)
    given = {"tiny_yaml": tiny_yaml, "tiny_config": tiny_config, "tmp_path": tmp_path}
    said = READERS[name](place=tmp_path / "data", capsys=capsys, **given)
    assert "column 'prompt': the encoding 'pkl' is not read, only str, bytes and ndarray" in said
    assert not run.exists()
    pickle.loads(pickle.dumps(Attack(run)))
    assert run.exists()


ROOT = Path(__file__).parents[2]
SOURCES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
    for top in ("vlm_composer", "convert")
    for path in (ROOT / top).rglob("*.py")
}

READS_NOTHING = ("constant", "hashing", "shared", "util", "world")
"""Parts of streaming.base that open no data set."""
STREAMING = {
    "convert/mds.py": {"get_mds_encoded_size", "mds_encode"},  # to write
    "vlm_composer/mds/reader.py": {"FileInfo", "MDSReader"},
    "vlm_composer/data/stream.py": {"FileInfo", "Reader", "Stream"},
    "vlm_composer/data/dataset.py": {"StreamingDataset", "_Iterator", "_ShardState"},
    "vlm_composer/data/shared_names.py": {"streaming.base.dataset"},  # whose names it replaces
    "vlm_composer/loaders.py": {"StreamingDataLoader"},
    "vlm_composer/training/checkpoint_state.py": {"streaming"},  # its version
}
"""What is taken of streaming that could: by the one reader, the one stream and the one data set."""


def of_streaming(tree):
    """What a file imports of streaming: modules and names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, alias.name) for alias in node.names)


def test_streaming_reads_nothing_elsewhere():
    found = {}
    for path, tree in SOURCES.items():
        for module, name in of_streaming(tree):
            top, *below = module.split(".")
            if top == "streaming" and not set(below[1:2]) & {*READS_NOTHING}:
                found.setdefault(path, set()).add(name)
    assert found == STREAMING


def test_an_index_is_parsed_in_one_place():
    """Who needs its name takes it from mds/index.py, and nobody else looks up a shard's file."""
    for path, tree in SOURCES.items():
        texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        named = [text for text in texts if isinstance(text, str) and " " not in text]
        indexes = [text for text in named if re.search(r"(^|/)index\.json$", text)]
        assert path == "vlm_composer/mds/index.py" or not indexes, path
        looked_up = [
            ast.unparse(node)
            for node in ast.walk(tree)
            if isinstance(node, ast.Subscript | ast.Call)
            and re.search(r"(\[|\.get\()['\"](basename|raw_data|zip_data)['\"]", ast.unparse(node))
        ]
        assert path in PARSERS or not looked_up, (path, looked_up)


PARSERS = (
    "vlm_composer/mds/index.py",
    "convert/tasks.py",  # names that are compared with what was listed
    "convert/writer.py",  # of what it has just written
)


def test_files_are_named_by_checked_entries():
    """`.basename` is asked of what mds/index.py made, where paths are built."""
    used = {
        path
        for path, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == "basename"
        and not (isinstance(node.value, ast.Attribute) and node.value.attr == "path")
    }
    assert used == {
        *("convert/written.py", "vlm_composer/mds/index.py", "vlm_composer/mds/reader.py"),
        *("vlm_composer/data/stream.py", "vlm_composer/data/dataset.py"),
        "vlm_composer/preflight/shards.py",
    }
