"""`verify` on real data sets, whole and damaged: every fault is told, with its shard and sample."""

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streaming import MDSWriter

from convert import ConversionError
from convert.mds import HASHES
from convert.shard_check import MAX_FAULTS
from convert.verify import Verification, main, verify_data_set
from vlm_composer.data.schema import MDS_COLUMNS

SMALL = {"eval_ratio": 0.2, "size_limit": 1 << 12}  # bytes: three samples to a shard


@pytest.fixture
def written(pairs: Any) -> Any:
    """A data set of 24 train and 6 eval samples in small shards."""
    pairs.add(30)
    pairs.convert(**SMALL)
    return pairs


def faults_of(place: Any, workers: int = 1) -> list[str]:
    lines: list[str] = []
    found = verify_data_set(place, workers=workers, on_fault=lines.append, show_progress=False)
    assert found.faults == len(lines)
    return lines


def shard_paths(out: Path, side: str = "train") -> list[Path]:
    return sorted((out / side).glob("*.mds"))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Changes what a JSON file says."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def rewrite(
    pairs: Any,
    side: str,
    change: Callable[[list[dict[str, Any]]], Any],
    hashes: list[str] = HASHES,
) -> None:
    """Writes a side's samples again, some of them changed, as another tool might: all agrees."""
    samples = pairs.read(side)
    change(samples)
    shutil.rmtree(pairs.out / side)
    with MDSWriter(
        columns=MDS_COLUMNS, out=str(pairs.out / side), hashes=hashes, size_limit=1 << 12
    ) as writer:
        for sample in samples:
            writer.write(sample)

    def recount(summary: dict[str, Any]) -> None:
        summary[side] = len(samples)
        summary["shards"][side] = len(shard_paths(pairs.out, side))
        summary["bytes"] = sum(path.stat().st_size for path in pairs.out.rglob("*.mds"))

    edit(pairs.out / "summary.json", recount)


def test_all_is_well(written: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(written.out), "--workers", "1"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"24 train and 6 eval samples in 10 shards of {written.out} (")
    assert said.out.endswith("MB): all well\n")
    assert "30/30" in said.err


def test_a_side_that_was_not_written(pairs: Any) -> None:
    pairs.add(4)
    pairs.convert(eval_ratio=0)
    assert faults_of(pairs.out) == []


def test_a_flipped_byte_is_found_and_so_is_the_image_it_broke(written: Any) -> None:
    path = shard_paths(written.out)[2]
    data = bytearray(path.read_bytes())
    start = data.index(b"\xff\xd8\xff")  # where a JPEG begins
    data[start] ^= 0xFF
    path.write_bytes(data)
    hashes, image = faults_of(written.out)
    assert hashes == f"train/{path.name}: its xxh64 differs from the index"
    assert image.startswith(f"train/{path.name}, sample 0 (id '")
    assert "): not_an_image: " in image


def test_a_data_set_of_before_has_a_sha1_as_well(written: Any) -> None:
    rewrite(written, "train", lambda samples: None, ["sha1", "xxh64"])
    assert faults_of(written.out) == []
    path = shard_paths(written.out)[0]
    data = bytearray(path.read_bytes())
    data[data.index(b"Describe")] ^= 0x20
    path.write_bytes(data)
    assert faults_of(written.out) == [
        f"train/{path.name}: its xxh64 and its sha1 differ from the index"
    ]


def test_faults_in_several_shards_are_all_told(written: Any) -> None:
    truncated, missing, empty = shard_paths(written.out)[:3]
    size, other = truncated.stat().st_size, empty.stat().st_size
    os.truncate(truncated, size - 1)
    missing.unlink()
    empty.write_bytes(b"")
    lines = faults_of(written.out)
    assert lines == [
        f"train/{missing.name}: missing, with its 3 samples",
        f"train/{truncated.name}: {size - 1} bytes, and the index says {size}: its 3 samples were "
        "not read",
        f"train/{empty.name}: 0 bytes, and the index says {other}: its 3 samples were not read",
    ]


def test_samples_that_training_could_not_use(written: Any) -> None:
    changed: list[str] = []

    def spoil(samples: list[dict[str, Any]]) -> None:
        samples[0]["image"] = b"GIF89a, or so it says"
        samples[1]["image"] = samples[1]["image"][:-400]
        samples[3]["prompt"] = "no picture"
        samples[4]["prompt"] = "<image><image>"
        samples[5]["answer"] = " \n"
        samples[6]["answer"] = "<image>"
        samples[6]["id"] = "\x1b[31m"  # what a terminal would obey
        changed.extend(repr(samples[index]["id"]) for index in (0, 1, 3, 4, 5, 6))

    rewrite(written, "train", spoil)
    lines = faults_of(written.out)
    whats = (
        "not_an_image: ",
        "broken_image: ",
        "its prompt has 0 × <image>, not one",
        "its prompt has 2 × <image>, not one",
        "its answer is empty",
        "its answer holds <image>",
    )
    assert len(lines) == len(whats)
    for line, sample_id, what in zip(lines, changed, whats, strict=True):
        assert line.startswith("train/shard.0000")
        assert f" (id {sample_id}): {what}" in line
        assert line.isprintable()


def test_a_sample_that_is_none(written: Any) -> None:
    """Whoever wrote the hashes as well can be found out by reading alone."""
    path = shard_paths(written.out)[0]
    data = bytearray(path.read_bytes())
    second = int.from_bytes(data[8:12], "little")
    data[second : second + 4] = b"\xff" * 4  # the first field's length
    path.write_bytes(data)
    lines = faults_of(written.out)
    assert lines[0].endswith("its xxh64 differs from the index")
    assert lines[1].startswith(f"train/{path.name}, sample 1: it cannot be decoded: ")
    data[8:12] = b"\xff" * 4
    path.write_bytes(data)
    assert faults_of(written.out)[1] == (
        f"train/{path.name}: its table of samples is out of order: its 3 samples were not read"
    )
    data[0] = 9
    path.write_bytes(data)
    assert "it says that it holds 9 samples, and the index says 3" in faults_of(written.out)[1]


def test_images_on_both_sides(written: Any) -> None:
    held_out = written.read("eval")

    def leak(samples: list[dict[str, Any]]) -> None:
        samples[7]["image"] = held_out[4]["image"]
        samples[20]["image"] = held_out[0]["image"]

    rewrite(written, "train", leak)
    names = [path.name for path in shard_paths(written.out, "eval")]
    lines = faults_of(written.out)
    assert [line.split(": ", 1)[1] for line in lines] == [
        f"its image is held out as well: eval/{names[1]}, sample 1",
        f"its image is held out as well: eval/{names[0]}, sample 0",
    ]
    assert lines[0].startswith("train/shard.00002.mds, sample 1: ")


def test_numbers_that_disagree(written: Any) -> None:
    def wrong(summary: dict[str, Any]) -> None:
        summary.update(train=25, bytes=1, rejected=2)

    edit(written.out / "summary.json", wrong)
    train, size, rejected = faults_of(written.out)
    assert train == "summary.json: train is 25, and the index files say 24"
    assert size.startswith("summary.json: bytes is 1, and the index files say ")
    assert rejected == ("summary.json: 2 rejected and 0 duplicates, and rejects.jsonl has 0 lines")


HOSTILE = (-1, 10**13, 10**400, 1.5, None, "24", "\x1b[31m\ud800", [], {}, {"\x1b[31m": 10**13})


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_summary_that_anybody_wrote(written: Any, number: int) -> None:
    before = (written.out / "summary.json").read_text()
    for key in ("train", "shards", "sources", "rejected"):
        summary = json.loads(before) | {key: HOSTILE[number]}
        (written.out / "summary.json").write_text(json.dumps(summary))
        lines = faults_of(written.out)
        harmless = key == "sources" and not isinstance(HOSTILE[number], dict)
        assert harmless or HOSTILE[number] == {} or lines
        assert all(line.startswith("summary.json: ") and line.isprintable() for line in lines)


def test_files_that_are_missing_or_stray(written: Any) -> None:
    (written.out / "summary.json").unlink()
    (written.out / "eval" / "index.json").write_text("{")
    (written.out / "train" / "shard.77777.mds").write_bytes(b"?")
    (written.out / ".convert").mkdir()
    (written.out / ".convert" / "plan.json").write_text("{}")
    index, summary, stray, journal = faults_of(written.out)
    assert index.startswith("eval/index.json: it is not JSON (")
    assert summary == "summary.json: missing: the conversion did not finish"
    assert stray == "train/shard.77777.mds: stray: the index does not name it"
    assert journal.startswith(".convert/: the conversion did not finish")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda entry: entry["raw_data"]["hashes"].pop("xxh64"), "it has no xxh64"),
        (lambda entry: entry.update(column_encodings=["pkl"] * 4), "the encoding 'pkl' is not"),
        (
            lambda entry: entry.update(
                compression="zstd", zip_data={**entry["raw_data"], "basename": "other.zstd"}
            ),
            "it is compressed (zstd)",
        ),
        (lambda entry: entry.update(samples="3"), "samples is '3', not a number"),
        (lambda entry: entry.pop("raw_data"), "raw_data is None, not an object"),
    ],
)
def test_an_index_that_no_conversion_writes(written: Any, change: Any, problem: str) -> None:
    edit(written.out / "train" / "index.json", lambda index: change(index["shards"][1]) and None)
    assert any(
        line.startswith("train/index.json: shard 1: ") and problem in line
        for line in faults_of(written.out)
    )


def test_a_shard_full_of_faults_is_told_in_brief(pairs: Any) -> None:
    pairs.add(MAX_FAULTS + 20)
    pairs.convert(eval_ratio=0)

    def empty(samples: list[dict[str, Any]]) -> None:
        for sample in samples:
            sample["answer"] = ""

    samples = pairs.read("train")
    empty(samples)
    shutil.rmtree(pairs.out / "train")
    with MDSWriter(columns=MDS_COLUMNS, out=str(pairs.out / "train"), hashes=HASHES) as writer:
        for sample in samples:
            writer.write(sample)
    lines: list[str] = []
    found = verify_data_set(pairs.out, workers=1, on_fault=lines.append, show_progress=False)
    in_shard = [line for line in lines if line.startswith("train/")]
    assert in_shard[-1] == "train/shard.00000.mds: 20 faults more"
    assert len(in_shard) == MAX_FAULTS + 1
    assert found.faults == MAX_FAULTS + 20 + (len(lines) - len(in_shard))


def test_several_sources(two_sources: Any) -> None:
    out = two_sources.out
    assert faults_of(out) == []
    edit(out / "summary.json", lambda summary: summary["sources"]["second"].update(eval=99))
    assert faults_of(out)[0].startswith("summary.json: sources.second.eval is 99, and the index ")
    shutil.rmtree(out / "second" / "eval")
    shutil.copytree(out / "first" / "train", out / "second" / "eval")
    lines = faults_of(out)
    samples = json.loads((out / "summary.json").read_text())["sources"]["first"]["train"]
    assert sum(": its image is held out as well: second/eval/" in line for line in lines) == samples


def test_processes_side_by_side_find_the_same(written: Any) -> None:
    for path in shard_paths(written.out)[1:4]:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"?")
    assert sorted(faults_of(written.out, workers=2)) == sorted(faults_of(written.out)) != []


def test_what_is_no_data_set(
    tmp_path: Path, written: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    features = tmp_path / "features"
    shutil.copytree(written.out, features)
    (features / "train" / "features.json").write_text("{}")
    for place, problem in (
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path / "empty", "holds no data set"),
        (written.out / "train", "give the folder above it"),
        (features, "holds features, and no images"),
        ("s3:///prefix", "give s3://bucket/prefix"),
    ):
        assert main([str(place)]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("convert verify: ")
        assert problem in said
    assert main([str(written.out), "--workers", "0"]) == 2
    with pytest.raises(ConversionError, match="holds no data set"):
        verify_data_set(tmp_path / "empty")


@pytest.mark.s3
def test_a_bucket(pairs: Any, s3_server: Any, tmp_path: Path, monkeypatch: Any) -> None:
    url = s3_server.make_bucket(f"verify-{uuid.uuid4().hex}") + "/prefix"
    pairs.add(20)
    pairs.convert(url, **SMALL)
    staging = tmp_path / "staging"
    staging.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(staging))
    assert faults_of(url) == []
    client, bucket = s3_server.client(), url.split("/")[2]
    shards = [key for key in s3_server.keys(bucket) if key.endswith(".mds")]
    client.put_object(Bucket=bucket, Key=shards[-1], Body=b"not a shard")
    client.delete_object(Bucket=bucket, Key=shards[0])
    missing, small = faults_of(url)
    assert f"prefix/{missing}" == f"{shards[0]}: missing, with its 3 samples"
    assert f"prefix/{small}".startswith(f"{shards[-1]}: 11 bytes, and the index says ")
    assert list(staging.iterdir()) == []  # nothing is left behind


def test_the_command(written: Any) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "convert", "verify", str(written.out), "--workers", "2"]
    path = shard_paths(written.out, "eval")[1]
    path.write_bytes(path.read_bytes()[::-1])
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.splitlines()[0].startswith(f"eval/{path.name}: its xxh64 differs ")
    assert done.stdout.endswith("2 faults\n")
    assert "Traceback" not in done.stderr


def test_counts(written: Any) -> None:
    size = sum(path.stat().st_size for path in written.out.rglob("*.mds"))
    found = verify_data_set(written.out, workers=1, show_progress=False)
    assert found == Verification({"train": 24, "eval": 6}, {"train": 8, "eval": 2}, size, 0)
