"""WebDataset tars: samples by their keys, compressed or not, and whatever is missing from them."""

import gzip
import io
import json
import re
import sys
import tarfile
import tracemalloc
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from convert import ConversionError, convert_pairs
from convert.__main__ import main
from convert.errors import Reason
from convert.sources import LlavaJson, WebDataset
from source_items import (
    LIMIT,
    add_to_tar,
    check_pieces_are_independent,
    contents_of,
    items_of,
    outcome,
    outcomes_of,
    pieces_of,
    tar_of,
)


def members_of(pairs: Any, items: list[Any]) -> dict[str, bytes]:
    """The items as samples, each with its image and its JSON."""
    files = {}
    for item in items:
        key = item["image"].removesuffix(".jpg")
        files[f"{key}.jpg"] = (pairs.images / item["image"]).read_bytes()
        files[f"{key}.json"] = json.dumps(item).encode()
    return files


@pytest.mark.parametrize(("end", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("tgz", "w:bz2")])
def test_the_same_items_as_from_json(pairs: Any, end: str, mode: str) -> None:
    pairs.add(600)
    folder = pairs.folder / "shards"
    folder.mkdir()
    for number, items in enumerate((pairs.items[:290], pairs.items[290:])):
        tar_of(members_of(pairs, items), folder / f"{number:05}.{end}", mode)
    source = WebDataset(str(folder), LIMIT)
    from_json = LlavaJson(pairs.write_json(), pairs.images, LIMIT)
    assert contents_of(source) == contents_of(from_json)
    assert [piece.count for piece in pieces_of(source)] == [256, 34, 256, 54]
    assert all(json.loads(json.dumps(piece.where)) == piece.where for piece in pieces_of(source))
    check_pieces_are_independent(source)
    for pattern in (f"*.{end}", "{00000..00001}." + end, f"0000?.{end}"):
        assert pieces_of(WebDataset(f"{folder}/{pattern}", LIMIT)) == pieces_of(source)
    with pytest.raises(ConversionError, match=rf"00002\.{end}: no such file"):
        WebDataset(f"{folder}/{{00000..00002}}.{end}", LIMIT).files()
    source.close()


LLAVA = {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "llava"}]}


@pytest.mark.parametrize(
    ("ends", "prompt", "answer"),
    [
        ({"txt": b"a cat\n"}, "<image>", "a cat"),
        ({"caption": "日本 ".encode()}, "<image>", "日本"),
        ({"json": b'{"caption": "a dog", "url": "x"}'}, "<image>", "a dog"),
        ({"json": json.dumps(LLAVA).encode()}, "?\n<image>", "llava"),
        ({"json": json.dumps(LLAVA).encode(), "txt": b"a cat"}, "?\n<image>", "llava"),
        ({"json": b'{"caption": "a dog"}', "txt": b"a cat"}, "<image>", "a cat"),
        ({"json": b"{", "txt": b"a cat"}, "<image>", "a cat"),
        ({"cls": b"7", "TXT": b"a cat"}, "<image>", "a cat"),
    ],
)
def test_where_the_text_comes_from(
    pairs: Any, ends: dict[str, bytes], prompt: str, answer: str
) -> None:
    image = (pairs.images / pairs.add()["image"]).read_bytes()
    files = {f"./a.b/0001.{end}": data for end, data in ends.items()} | {"./a.b/0001.JPG": image}
    (item,) = items_of(WebDataset(str(tar_of(files, pairs.folder / "it.tar")), LIMIT))
    assert outcome(item) == {"id": "a.b/0001", "image": image, "prompt": prompt, "answer": answer}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_samples_that_are_bad(pairs: Any, mode: str) -> None:
    image = (pairs.images / pairs.add()["image"]).read_bytes()
    samples: dict[str, tuple[dict[str, bytes], Any]] = {
        "good": ({"jpg": image, "txt": b"it"}, None),
        "imageless": ({"txt": b"it"}, Reason.MISSING_IMAGE),
        "textless": ({"jpg": image}, Reason.NO_CONVERSATION),
        "json-without": ({"jpg": image, "json": b'{"url": 1}'}, Reason.NO_CONVERSATION),
        "no-json": ({"jpg": image, "json": b"{"}, Reason.NOT_JSON),
        "deep-json": ({"jpg": image, "json": b"[" * 100_000}, Reason.NOT_JSON),
        "list-json": ({"jpg": image, "json": b"[]"}, Reason.NOT_AN_OBJECT),
        "null-caption": ({"jpg": image, "json": b'{"caption": null}'}, Reason.NO_CONVERSATION),
        "number": ({"jpg": image, "json": b'{"caption": 1}'}, Reason.BAD_TURN),
        "latin": ({"jpg": image, "txt": b"\xfc"}, Reason.NOT_UNICODE),
        "blank": ({"jpg": image, "txt": b" \n"}, Reason.EMPTY_ANSWER),
        "two": ({"jpg": image, "png": image, "txt": b"it"}, Reason.AMBIGUOUS_KEY),
        "large": ({"jpg": bytes(LIMIT + 1), "txt": b"it"}, Reason.TOO_LARGE),
        "broken": ({"jpg": image[:300], "txt": b"it"}, Reason.BROKEN_IMAGE),
        "parts": ({"left.jpg": image, "txt": b"it"}, None),
    }
    files = {f"{k}.{end}": data for k, (ends, _) in samples.items() for end, data in ends.items()}
    files |= {"README": b"", ".hidden.jpg": image, "__meta__": b"", "dir/._good.txt": b"it"}
    path = tar_of(files, pairs.folder / "it.tar", mode)
    expected = [reason for _, reason in samples.values()]
    expected.insert(expected.index(Reason.AMBIGUOUS_KEY), Reason.AMBIGUOUS_KEY)  # of each image
    found = outcomes_of(WebDataset(str(path), LIMIT))
    assert [one if isinstance(one, str) else None for one in found[:-1]] == expected
    assert found[-1] == Reason.NO_CONVERSATION  # README: no sample, but not lost without a word


def test_members_that_are_no_files(pairs: Any) -> None:
    path = pairs.folder / "it.tar"
    with tarfile.open(path, "w") as tar:
        add_to_tar(tar, "folder.with.dots", type=tarfile.DIRTYPE)
        add_to_tar(tar, "a.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add_to_tar(tar, "a.txt", b"it")
        add_to_tar(tar, "../b.jpg", type=tarfile.LNKTYPE, linkname="a.jpg")
    assert outcomes_of(WebDataset(str(path), LIMIT)) == [
        Reason.UNREADABLE_IMAGE,
        Reason.NO_CONVERSATION,
    ]


def test_members_of_a_key_that_are_apart_are_no_sample(pairs: Any) -> None:
    image = (pairs.images / pairs.add()["image"]).read_bytes()
    files = {"a.jpg": image, "b.jpg": image, "a.txt": b"it", "b.txt": b"it"}
    assert outcomes_of(WebDataset(str(tar_of(files, pairs.folder / "it.tar")), LIMIT)) == [
        *(Reason.NO_CONVERSATION, Reason.NO_CONVERSATION),
        *(Reason.MISSING_IMAGE, Reason.MISSING_IMAGE),
    ]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_cut_short_or_damaged(pairs: Any, mode: str) -> None:
    pairs.add(100)
    path = tar_of(members_of(pairs, pairs.items), pairs.folder / "it.tar", mode)
    whole = path.read_bytes()
    middle = len(whole) // 2 // 512 * 512
    for data in (
        *(b"", b"no tar", whole[:300], whole[: middle + 100]),
        whole[:middle] + b"\x81" * 2048 + whole[middle + 2048 :],
    ):
        path.write_bytes(data)
        with pytest.raises(ConversionError, match=r"it\.tar is not a whole tar \(at byte"):
            items_of(WebDataset(str(path), LIMIT))


def test_compressed_by_zstd(pairs: Any) -> None:
    (pairs.folder / "it.tar").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    with pytest.raises(ConversionError, match="unpack it with unzstd first"):
        pieces_of(WebDataset(str(pairs.folder / "it.tar"), LIMIT))


def test_a_tar_that_changes_is_noticed(pairs: Any) -> None:
    pairs.add(20)
    path = tar_of(members_of(pairs, pairs.items), pairs.folder / "it.tar")
    source = WebDataset(str(path), LIMIT)
    before = source.fingerprint()
    (piece,) = pieces_of(source)
    tar_of(members_of(pairs, pairs.items[:9]), path)
    assert source.fingerprint() != before
    with pytest.raises(ConversionError, match="ends before sample 9"):
        list(source.read(piece, [True] * 20))
    source.close()


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@settings(deadline=None, derandomize=True, database=None, max_examples=40)
@given(
    damage=st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 255)), min_size=1, max_size=4)
)
def test_damage_is_refused_or_rejected_and_never_crashes(
    mode: str, small: dict[str, bytes], damage: list[tuple[int, int]], tmp_path_factory: Any
) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / "damaged.tar"
    tar_of(small, path, mode)
    data = bytearray(path.read_bytes())
    for place, value in damage:
        data[place % len(data)] = value
    path.write_bytes(data)
    with suppress(ConversionError):
        outcomes_of(WebDataset(str(path), LIMIT))


@pytest.fixture(scope="module")
def small() -> dict[str, bytes]:
    return {f"{n}.{end}": bytes([n]) * 700 for n in range(4) for end in ("jpg", "txt", "json")}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_is_not_held_in_memory(pairs: Any, mode: str) -> None:
    path = pairs.folder / "it.tar"
    with tarfile.open(path, mode) as tar:
        for number in range(5000):
            tar.members.clear()
            add_to_tar(tar, f"{number:09}.jpg", bytes([number % 256]) * 8000)
    source = WebDataset(str(path), LIMIT)
    tracemalloc.start()
    pieces = pieces_of(source)
    assert sum(piece.count for piece in pieces) == 5000
    for piece in pieces[:2]:
        assert sum(1 for _ in source.read(piece, [True] * piece.count)) == 256
    assert tracemalloc.get_traced_memory()[1] < 6e6  # of 40
    tracemalloc.stop()
    source.close()


@pytest.mark.s3
@pytest.mark.parametrize(
    ("server", "mode"), [("s3_server", "w"), ("gcs_server", "w:gz"), ("azure_server", "w:gz")]
)
def test_tars_in_a_bucket(
    pairs: Any, server: str, mode: str, request: Any, put_in_bucket: Any
) -> None:
    pairs.add(40)
    folder = pairs.folder / "shards"
    folder.mkdir()
    for number in range(2):
        items = pairs.items[number * 20 :][:20]
        tar_of(members_of(pairs, items), folder / f"{number:05}.tar", mode)
    url = request.getfixturevalue(server).make_bucket(f"tars-{uuid.uuid4().hex}")
    put_in_bucket(folder, f"{url}/shards")
    expected = outcomes_of(WebDataset(str(folder), LIMIT))
    source = WebDataset(f"{url}/shards/{{00000..00001}}.tar", LIMIT)
    assert outcomes_of(source) == expected
    assert WebDataset(url, LIMIT).files() == source.files()
    check_pieces_are_independent(source)
    source.close()


def rows_of(members: list[tuple[str, bytes]], path: Path, mode: str = "w") -> Path:
    """A tar of these members in this order, of which several may have one name."""
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members:
            add_to_tar(archive, name, data)
    return path


def test_no_sample_is_lost_to_dots_in_names(
    pairs: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert_main(command: list[str]) -> int:
        monkeypatch.setattr(sys, "argv", ["convert", *command])
        return main()

    pairs.add(500)
    images = [(pairs.images / item["image"]).read_bytes() for item in pairs.items]
    names = [f"{n:04}" if n < 300 else f"take.{n:04}" for n in range(500)]
    files = {}
    for name, image in zip(names, images, strict=True):
        files |= {f"{name}.jpg": image, f"{name}.txt": b"x"}
    path = tar_of(files, pairs.folder / "dots.tar")
    command = ["--webdataset", str(path), "--out", str(pairs.out), "--workers", "1"]
    assert convert_main(command) == 1
    said = capsys.readouterr().err
    assert re.search(r"([0-9]+) of 500 samples were rejected \(\1 ambiguous_key\)", said)
    assert convert_main([*command, "--max-reject-ratio", "0.4", "--eval-ratio", "0"]) == 0
    lines = pairs.rejects()
    assert len(lines) == 200
    for line in lines:
        assert "several images have the key 'take'" in line["detail"]
        assert "a key ends at the first dot of a file's name" in line["detail"]
        assert "rename the files without dots" in line["detail"]
    assert "'take.0300.jpg'" in lines[0]["detail"]
    summary = json.loads((pairs.out / "summary.json").read_text())
    assert (summary["samples_in"], summary["train"], summary["rejected"]) == (500, 300, 200)


@pytest.mark.parametrize(("mode", "end"), [("w", "tar"), ("w:gz", "tar.gz")])
def test_a_key_of_very_many_images_is_cut_into_pieces(pairs: Any, mode: str, end: str) -> None:
    image = (pairs.images / pairs.add()["image"]).read_bytes()
    members = [("0.jpg", image), ("0.txt", b"x")]
    for number in range(600):
        members += [(f"take.{number:04}.jpg", image), (f"take.{number:04}.txt", b"x")]
    members += [("z.jpg", image), ("z.txt", b"x")]
    source = WebDataset(str(rows_of(members, pairs.folder / f"it.{end}", mode)), LIMIT)
    assert [piece.count for piece in pieces_of(source)] == [256, 256, 90]
    found = outcomes_of(source)
    assert [found[0]["id"], found[-1]["id"]] == ["0", "z"]
    assert found[1:-1] == [Reason.AMBIGUOUS_KEY] * 600
    check_pieces_are_independent(source)
    source.close()


def test_equal_keys_are_counted_wherever_they_stand(pairs: Any) -> None:
    image = (pairs.images / pairs.add()["image"]).read_bytes()
    twice = [("0.jpg", image), ("0.txt", b"a"), ("0.jpg", image), ("0.txt", b"b")]
    apart = [("0.jpg", image), ("1.jpg", image), ("0.txt", b"a"), ("1.txt", b"b")]
    texts = [("0.jpg", image), ("0.txt", b"a"), ("0.txt", b"b"), ("1.jpg", image), ("1.txt", b"c")]
    dotted = [("a.v2.jpg", image), ("a.v2.txt", b"a")]
    for members, expected, said in (
        (twice, [Reason.AMBIGUOUS_KEY] * 2, "give each sample a key of its own"),
        (apart, [Reason.NO_CONVERSATION] * 2 + [Reason.MISSING_IMAGE] * 2, "tar --sort=name"),
        (texts, [Reason.AMBIGUOUS_KEY, None], "the key '0' has two members '0.txt'"),
        (dotted, [Reason.NO_CONVERSATION], "'a', which ends at the first dot"),
    ):
        path = rows_of(members, pairs.folder / "it.tar")
        found = [outcome(item) for item in items_of(WebDataset(str(path), LIMIT))]
        reasons = [one[0] if isinstance(one, tuple) else None for one in found]
        assert reasons == expected
        assert all(said in one[1] for one in found if isinstance(one, tuple)) or said in found[0][1]


def small_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def group_by_keys(names: list[str]) -> list[list[str]] | None:
    """The webdataset library's rule: None where it raises for two members of one name."""
    groups: list[list[str]] = []
    last = None
    for name in names:
        key = name.partition(".")[0]
        if key != last:
            groups.append([])
        last = key
        if name in groups[-1]:
            return None
        groups[-1].append(name)
    return groups


@settings(deadline=None, derandomize=True, database=None, max_examples=150)
@given(
    st.lists(
        st.tuples(*map(st.sampled_from, ("ab", ("", ".x", ".y"), ("jpg", "png", "txt")))),
        min_size=1, max_size=9,
    )
)  # fmt: skip
def test_every_image_is_a_sample_or_a_reject(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[str, str, str]]
) -> None:
    image = small_png()
    names = [f"{key}{dot}.{end}" for key, dot, end in drawn]
    folder = tmp_path_factory.mktemp("tar")
    members = [(name, b"text" if name.endswith("txt") else image) for name in names]
    source = WebDataset(str(rows_of(members, folder / "it.tar")), LIMIT)
    found = outcomes_of(source)
    images = sum(not name.endswith("txt") for name in names)
    assert len(found) >= images, "each image is an item"
    groups = group_by_keys(names)
    for number, (item, one) in enumerate(zip(items_of(source), found, strict=True)):
        if isinstance(one, dict):
            assert one["answer"] == "text"
            assert item.fields["id"] in "ab", number
    if groups is not None:  # what the library takes as a pair is a sample here, and nothing else is
        whole = [
            group for group in groups
            if sum(not n.endswith("txt") for n in group) == 1 and f"{group[0][0]}.txt" in group
        ]  # fmt: skip
        assert sum(isinstance(one, dict) for one in found) == len(whole)


@pytest.mark.parametrize("end", ["tar", "tar.gz"])
def test_tars_that_were_put_one_behind_the_other_are_one(pairs: Any, end: str) -> None:
    pairs.add(6)
    parts = []
    for number, items in enumerate((pairs.items[:2], pairs.items[2:3], pairs.items[3:])):
        path = tar_of(members_of(pairs, items), pairs.folder / f"{number}.tar")
        parts.append(path.read_bytes())
    data = b"".join(parts)
    joined = pairs.folder / f"joined.{end}"
    joined.write_bytes(gzip.compress(data) if end == "tar.gz" else data)
    source = WebDataset(str(joined), LIMIT)
    assert [one["id"] for one in outcomes_of(source)] == [item["id"] for item in pairs.items]
    check_pieces_are_independent(source)
    source.close()


def test_the_reject_limit_shows_one_of_the_rejects(pairs: Any) -> None:
    image = (pairs.images / pairs.add()["image"]).read_bytes()
    members = [(f"take.{n}.{e}", d) for n in range(9) for e, d in (("jpg", image), ("txt", b"x"))]
    source = WebDataset(str(rows_of(members, pairs.folder / "it.tar")), LIMIT)
    with pytest.raises(ConversionError, match=r"One of them: 'take\.0\.jpg': several images have"):
        convert_pairs([source], pairs.out, show_progress=False)
