"""WebDataset tars: samples by their keys, compressed or not, and whatever is missing from them."""

import json
import tarfile
import tracemalloc
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import ConversionError
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
        "two": ({"jpg": image, "png": image, "txt": b"it"}, Reason.BAD_IMAGE_FIELD),
        "large": ({"jpg": bytes(LIMIT + 1), "txt": b"it"}, Reason.TOO_LARGE),
        "broken": ({"jpg": image[:300], "txt": b"it"}, Reason.BROKEN_IMAGE),
        "parts": ({"left.jpg": image, "txt": b"it"}, None),
    }
    files = {f"{k}.{end}": data for k, (ends, _) in samples.items() for end, data in ends.items()}
    files |= {"README": b"", ".hidden.jpg": image, "__meta__": b"", "dir/._good.txt": b"it"}
    path = tar_of(files, pairs.folder / "it.tar", mode)
    expected = [reason for _, reason in samples.values()]
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
@pytest.mark.parametrize(("server", "mode"), [("s3_server", "w"), ("gcs_server", "w:gz")])
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
