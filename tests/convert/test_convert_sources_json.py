"""LLaVA JSON and JSON Lines, in pieces: every item once, at any size, whatever is wrong with it."""

import io
import json
import time
import tracemalloc
import uuid
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import ConversionError
from convert.errors import Reason, Rejected
from convert.sources import LlavaJson, json_list
from convert.sources.json_lines import MAX_LINE_BYTES, decode_line, lines
from convert.sources.json_list import decode_items, item_spans
from source_items import LIMIT, check_pieces_are_independent, items_of, outcomes_of, pieces_of
from store_server import SERVERS

steady = settings(deadline=None, derandomize=True, database=None, max_examples=60)
ITEMS = [
    {"id": "ü" * (n % 5), "image": "a.jpg", "n": n, "x": [None, 1.5e3, "\ud800", "]},{["]}
    for n in range(1000)
]
FORMS = {
    "one line": json.dumps(ITEMS).encode(),
    "indented": json.dumps(ITEMS, indent=2).encode(),
    "raw": json.dumps(ITEMS, ensure_ascii=False).encode(errors="surrogatepass"),
    "BOM and space": b"\xef\xbb\xbf \r\n" + json.dumps(ITEMS).encode() + b"\n\t ",
    "CRLF": json.dumps(ITEMS, indent=1).replace("\n", "\r\n").encode(),
}
LINES = {
    "lines": "\n".join(map(json.dumps, ITEMS)).encode(),
    "BOM, blank lines, CRLF": b"\xef\xbb\xbf\n" + "\r\n \r\n".join(map(json.dumps, ITEMS)).encode(),
    "the last ends too": "".join(json.dumps(item) + "\n" for item in ITEMS).encode(),
}


@pytest.mark.parametrize("name", [*FORMS, *LINES])
def test_every_item_in_pieces_of_256(pairs: Any, name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(json_list, "_CHUNK_BYTES", 777)  # so that every item is cut somewhere
    path = pairs.folder / ("pairs.jsonl" if name in LINES else "pairs.json")
    path.write_bytes((FORMS | LINES)[name])
    source = LlavaJson(path, pairs.images, LIMIT)
    assert [item.fields for item in items_of(source)] == ITEMS
    assert [piece.count for piece in pieces_of(source)] == [256, 256, 256, 232]
    assert all(json.loads(json.dumps(piece.where)) == piece.where for piece in pieces_of(source))
    check_pieces_are_independent(source)


@steady
@given(st.data())
def test_any_list_is_found_as_json_finds_it(data: Any) -> None:
    text = data.draw(json_texts)
    chunk = data.draw(st.integers(1, 40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_list, "_CHUNK_BYTES", chunk)
        check_spans(text.encode())


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
json_texts = st.builds(json.dumps, st.lists(values, max_size=6), indent=st.sampled_from([None, 9]))


def check_spans(text: bytes) -> None:
    """The same verdict as the standard library's on the whole text, and the same items."""
    try:
        expected = json.loads(text.decode())
    except (ValueError, RecursionError):
        expected = None
    if not isinstance(expected, list) or not expected:
        with pytest.raises(ConversionError):
            list(item_spans(io.BytesIO(text), "it"))
        return
    spans = list(item_spans(io.BytesIO(text), "it"))
    found = [next(decode_items(text[start:end])) for start, end in spans]
    assert repr(found) == repr(expected) == repr([*decode_items(text[spans[0][0] : spans[-1][1]])])


@steady
@given(text=json_texts, cut=st.integers(0, 500), put=st.binary(max_size=3), chunk=st.integers(1, 9))
def test_damaged_lists_are_refused_as_json_refuses_them(
    text: str, cut: int, put: bytes, chunk: int
) -> None:
    data = text.encode()
    place = cut % (len(data) + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_list, "_CHUNK_BYTES", chunk)
        check_spans(data[:place] + put)
        check_spans(data[:place] + put + data[place + 1 :])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "(Expecting value at byte 0)"),
        (b"\xef\xbb\xbf [1, 2", "(Expecting ',' delimiter at byte 9)"),
        ('["ü", {]'.encode(), "(Expecting property name enclosed in double quotes at byte 8)"),
        (b'["' + b"a" * 3_000_000, "(Unterminated string starting at byte 1)"),
        (b"[1] [2]", "(Extra data at byte 4)"),
        (b"[1,]", "(Expecting value at byte 3)"),
        (b"[" + b" " * 2_000_000 + b'"\xff"]', "(invalid start byte at byte 2000002)"),
        (b"[0" + b',"ok"' * 500_000 + b"\n,}]", "(Expecting value at byte 2500004)"),
        (b"[" + b"[" * 100_000, "maximum recursion depth exceeded"),
        (b"[" + b"9" * 5000 + b"]", "Exceeds the limit"),
        (b'{"a": [' + b"1," * 1_000_000, "holds a dict, not a list of items"),
        (b"[]", "holds an empty list: there is nothing to convert"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_where_a_list_is_wrong(pairs: Any, text: bytes, problem: str) -> None:
    pairs.json_path.write_bytes(text)
    with pytest.raises(ConversionError) as failure:
        pieces_of(LlavaJson(pairs.json_path, pairs.images, LIMIT))
    assert problem in str(failure.value)
    assert str(failure.value).startswith(str(pairs.json_path))


def test_a_fault_at_the_start_of_a_large_list_costs_no_memory() -> None:
    text = b'[{"a" 1},' + b'"",' * 7_000_000 + b'""]'
    tracemalloc.start()
    with pytest.raises(ConversionError, match="Expecting ':' delimiter at byte 6"):
        list(item_spans(io.BytesIO(text), "it"))
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()


def test_a_list_is_not_held_in_memory(pairs: Any) -> None:
    with pairs.json_path.open("w") as file:
        file.write("[")
        for number in range(800):
            file.write(json.dumps({"id": number, "text": "x" * 60_000}) + ",")
        file.write("0]")
    source = LlavaJson(pairs.json_path, pairs.images, LIMIT)
    tracemalloc.start()
    pieces = pieces_of(source)  # a piece ends before it has 16 MB, too
    assert sum(piece.count for piece in pieces) == 801
    assert max(piece.where["end"] - piece.where["start"] for piece in pieces) <= 1 << 24
    assert tracemalloc.get_traced_memory()[1] < 12e6
    tracemalloc.stop()


def test_one_large_item_takes_time_in_proportion(pairs: Any) -> None:
    def seconds(numbers: int) -> float:
        text = b"[[" + b"1," * numbers + b"1]]"
        started = time.process_time()
        assert len(list(item_spans(io.BytesIO(text), "it"))) == 1
        return time.process_time() - started

    small = min(seconds(1_000_000) for _ in range(3))
    large = min(seconds(8_000_000) for _ in range(2))
    assert large < 30 * small  # 8 times it; 64 were it quadratic


def test_an_item_as_deep_as_the_planner_takes_is_read_under_a_taller_stack(pairs: Any) -> None:
    depth = 900
    pairs.json_path.write_text("[" * depth + "]" * depth)
    source = LlavaJson(pairs.json_path, pairs.images, LIMIT)
    (piece,) = pieces_of(source)

    def below(frames: int) -> Any:
        return below(frames - 1) if frames else list(source.read(piece, [True]))

    (item,) = below(200)
    assert repr(item.fields)[:5] == "[[[[["


def test_a_list_that_changes_is_noticed(pairs: Any) -> None:
    pairs.add(3)
    source = LlavaJson(pairs.write_json(), pairs.images, LIMIT)
    before = source.fingerprint()
    (piece,) = pieces_of(source)
    pairs.items[0]["id"] = "another"
    pairs.items.pop()
    pairs.write_json()
    source.close()
    assert source.fingerprint() != before
    with pytest.raises(ConversionError, match="is not what it was when this conversion began"):
        list(source.read(piece, [True] * 3))


def test_a_bad_line_costs_itself(pairs: Any) -> None:
    pairs.add(3)
    good = [json.dumps(item).encode() for item in pairs.items]
    bad = [b"{", b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b'{"id": "a"} x', b"\x00", b"\xe2\x80"]
    long = b'"' + b"a" * (2 * MAX_LINE_BYTES) + b'"'
    path = pairs.folder / "pairs.jsonl"
    path.write_bytes(b"\n".join([good[0], *bad, good[1], long, good[2], b"{}"]))
    outcomes = outcomes_of(LlavaJson(path, pairs.images, LIMIT))
    assert outcomes[1:8] == [Reason.NOT_JSON] * len(bad)
    assert [outcomes[n]["id"] for n in (0, 8, 10)] == ["000000000", "000000001", "000000002"]
    assert outcomes[9] == Reason.TOO_LARGE
    assert outcomes[11] == Reason.BAD_ID
    assert len(outcomes) == 12


@steady
@given(
    data=st.binary(max_size=200)
    | st.lists(st.sampled_from([b"{}", b"\n", b"[", b" "])).map(b"".join)
)
def test_any_bytes_are_lines(data: bytes) -> None:
    whole = list(lines(io.BytesIO(data)))
    assert len(whole) == sum(
        bool(line.strip()) for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    )
    for number, (start, _, line) in enumerate(whole):
        assert list(lines(io.BytesIO(data), start)) == whole[number:]
        with suppress(AttributeError):
            assert decode_line(line).reason is Reason.NOT_JSON  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl"])
def test_nothing_to_convert(pairs: Any, name: str) -> None:
    (pairs.folder / name).write_text(" \n" if name.endswith("l") else "[ ]")
    with pytest.raises(ConversionError, match="there is nothing to convert"):
        pieces_of(LlavaJson(pairs.folder / name, pairs.images, LIMIT))


def test_what_is_not_there(pairs: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"pairs\.json"):
        LlavaJson(pairs.json_path, pairs.images, LIMIT).files()
    pairs.add(1)
    for images in (pairs.folder / "absent", pairs.write_json()):
        with pytest.raises(ConversionError, match=f"{images}: no such folder"):
            LlavaJson(pairs.json_path, images, LIMIT).files()


@pytest.mark.s3
@pytest.mark.parametrize("server", SERVERS.values())
@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl"])
def test_items_and_images_in_a_bucket(
    pairs: Any, server: str, name: str, request: Any, put_in_bucket: Any
) -> None:
    pairs.add(20)
    pairs.add(1, image="absent.jpg")
    pairs.add(1, image="../secret.jpg")
    pairs.add(1, image="a" * 2000)
    pairs.add(1, image="large.jpg")
    pairs.add(1, image=None)
    pairs.write_image("large.jpg", bytes(LIMIT + 1))
    pairs.write_image("empty.jpg", b"")
    pairs.add(1, image="empty.jpg")
    pairs.add(1, image="./" + pairs.items[0]["image"])
    path = pairs.folder / name
    text = "\n".join(map(json.dumps, pairs.items)) if name[-1] == "l" else json.dumps(pairs.items)
    path.write_text(text)
    url = request.getfixturevalue(server).make_bucket(f"json-{uuid.uuid4().hex}")
    put_in_bucket(pairs.folder, f"{url}/below")
    source = LlavaJson(f"{url}/below/{name}", f"{url}/below/images", LIMIT)
    expected = outcomes_of(LlavaJson(path, pairs.images, LIMIT))
    assert outcomes_of(source) == expected
    assert [one for one in expected if isinstance(one, Rejected | str)] == [
        *(Reason.MISSING_IMAGE, Reason.OUTSIDE_IMAGES_ROOT, Reason.UNREADABLE_IMAGE),
        *(Reason.TOO_LARGE, Reason.BAD_IMAGE_FIELD, Reason.NOT_AN_IMAGE),
    ]
    assert source.fingerprint()["bytes"] == len(text)
    source.close()
    for missing, problem in (
        ((f"{url}/below/absent.json", pairs.images), "there is no such object"),
        ((path, f"{url}/nowhere"), "no object's name starts like this"),
        ((path, f"{url}-absent/images"), "no such bucket or object"),
        ((f"{url}-absent/pairs.json", pairs.images), "no such bucket or object"),
    ):
        with pytest.raises(ConversionError, match=problem):
            LlavaJson(*missing, LIMIT).files()
