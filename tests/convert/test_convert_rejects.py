"""Every way in which an item can be bad, by a really bad item; and what becomes of the run."""

import json
import os
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from convert import ConversionError
from convert.errors import Reason, Rejected
from convert.record import read_record
from convert.sources import Item, LlavaJson
from convert.sources.image_stores import ImageFolder
from source_items import items_of

SIZE_LIMIT = 1 << 16
HUMAN = {"from": "human", "value": "What is it?"}
GPT = {"from": "gpt", "value": "A gradient."}


def turns(*values: Any) -> dict[str, Any]:
    return {"conversations": list(values)}


def image(name: Any) -> dict[str, Any]:
    return {"image": name}


# What replaces fields of a good item → the reason it is rejected for.
BAD_FIELDS: dict[str, tuple[dict[str, Any], Reason]] = {
    "null id": ({"id": None}, Reason.BAD_ID),
    "boolean id": ({"id": True}, Reason.BAD_ID),
    "fractional id": ({"id": 1.5}, Reason.BAD_ID),
    "list for an id": ({"id": ["1"]}, Reason.BAD_ID),
    "half a surrogate pair in the id": ({"id": "\ud800"}, Reason.NOT_UNICODE),
    "no conversation": ({"conversations": None}, Reason.NO_CONVERSATION),
    "empty conversation": (turns(), Reason.NO_CONVERSATION),
    "text for a conversation": ({"conversations": "hello"}, Reason.NO_CONVERSATION),
    "very deep conversation": (turns(json.loads("[" * 200 + "]" * 200)), Reason.BAD_TURN),
    "text for a turn": (turns(HUMAN, "A gradient."), Reason.BAD_TURN),
    "number for a question": (turns({"from": "human", "value": 1}, GPT), Reason.BAD_TURN),
    "no value in an answer": (turns(HUMAN, {"from": "gpt"}), Reason.BAD_TURN),
    "no human turn": (turns({"from": "system", "value": "Be kind."}, GPT), Reason.NO_HUMAN_TURN),
    "no gpt turn": (turns(HUMAN, HUMAN), Reason.NO_GPT_TURN),
    "no answer of its own": (turns(GPT, HUMAN), Reason.NO_ROUND),
    "<image> in a later turn": (
        turns(HUMAN, GPT, {"from": "human", "value": "<image>"}),
        Reason.PLACEHOLDER_ELSEWHERE,
    ),
    "empty answer": (turns(HUMAN, {"from": "gpt", "value": ""}), Reason.EMPTY_ANSWER),
    "blank answer": (turns(HUMAN, {"from": "gpt", "value": " \n\t"}), Reason.EMPTY_ANSWER),
    "half a surrogate pair in the prompt": (
        turns({"from": "human", "value": "\udc00"}, GPT),
        Reason.NOT_UNICODE,
    ),
    "half a surrogate pair in the answer": (
        turns(HUMAN, {"from": "gpt", "value": "an emoji: \ud83d"}),
        Reason.NOT_UNICODE,
    ),
    "two <image>": (
        turns({"from": "human", "value": "<image>\n<image>"}, GPT),
        Reason.SEVERAL_PLACEHOLDERS,
    ),
    "<image> in the answer": (
        turns(HUMAN, {"from": "gpt", "value": "It is <image>."}),
        Reason.PLACEHOLDER_IN_ANSWER,
    ),
    "no image": (image(None), Reason.BAD_IMAGE_FIELD),
    "empty image path": (image(""), Reason.BAD_IMAGE_FIELD),
    "list of images": (image(["a.jpg", "b.jpg"]), Reason.BAD_IMAGE_FIELD),
    "missing file": (image("00000/nothing.jpg"), Reason.MISSING_IMAGE),
    "file for a folder": (image("text.jpg/a.jpg"), Reason.MISSING_IMAGE),
    "dangling symlink": (image("dangling.jpg"), Reason.MISSING_IMAGE),
    "../": (image("../secret.jpg"), Reason.OUTSIDE_IMAGES_ROOT),
    "../ to nothing": (image("../nothing.jpg"), Reason.OUTSIDE_IMAGES_ROOT),
    "../ from below": (image("00000/../../secret.jpg"), Reason.OUTSIDE_IMAGES_ROOT),
    "folder beside the root": (image("../images_2/secret.jpg"), Reason.OUTSIDE_IMAGES_ROOT),
    "absolute path": (image("/etc/passwd"), Reason.OUTSIDE_IMAGES_ROOT),
    "symlink to the outside": (image("link.jpg"), Reason.OUTSIDE_IMAGES_ROOT),
    "linked folder": (image("linked/secret.jpg"), Reason.OUTSIDE_IMAGES_ROOT),
    "symlink to itself": (image("loop.jpg"), Reason.UNREADABLE_IMAGE),
    "folder": (image("00000"), Reason.UNREADABLE_IMAGE),
    "pipe": (image("pipe.jpg"), Reason.UNREADABLE_IMAGE),
    "null byte in the path": (image("a\0.jpg"), Reason.UNREADABLE_IMAGE),
    "half a surrogate pair in the path": (image("\ud800.jpg"), Reason.UNREADABLE_IMAGE),
    "very long path": (image("a" * 5000), Reason.UNREADABLE_IMAGE),
    "text": (image("text.jpg"), Reason.NOT_AN_IMAGE),
    "truncated": (image("truncated.jpg"), Reason.BROKEN_IMAGE),
    "bomb": (image("bomb.png"), Reason.BAD_DIMENSIONS),
    "floats": (image("floats.tif"), Reason.UNKNOWN_GREY_RANGE),
    "file larger than a shard": (image("large.jpg"), Reason.TOO_LARGE),
}  # fmt: skip

BAD_ITEMS = [None, True, 1, 1.5, "text", ["id", "image"]]


@pytest.fixture
def bad_files(pairs: Any) -> Any:
    """The data set, with a good pair and the files that `BAD_FIELDS` names."""
    good = (pairs.images / pairs.add()["image"]).read_bytes()
    for outside in (pairs.folder, pairs.folder / "images_2"):
        outside.mkdir(exist_ok=True)
        (outside / "secret.jpg").write_bytes(good)
    pairs.write_image("text.jpg", b"404 Not Found")
    pairs.write_image("truncated.jpg", good[: len(good) // 2])
    pairs.write_image("large.jpg", good + bytes(SIZE_LIMIT))
    Image.new("1", (9000, 9000)).save(pairs.images / "bomb.png")
    Image.new("F", (9, 9), 255.0).save(pairs.images / "floats.tif")
    (pairs.images / "link.jpg").symlink_to(pairs.folder / "secret.jpg")
    (pairs.images / "linked").symlink_to(pairs.folder / "images_2")
    (pairs.images / "dangling.jpg").symlink_to("nothing.jpg")
    (pairs.images / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(pairs.images / "pipe.jpg")
    return pairs


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_rejected_for_its_reason(bad_files: Any, name: str) -> None:
    fields, reason = BAD_FIELDS[name]
    item = bad_files.items[0] | fields
    with pytest.raises(Rejected) as rejected:
        read_record(found(bad_files, item))
    assert rejected.value.reason is reason
    assert rejected.value.detail


def found(pairs: Any, fields: Any) -> Item:
    """What a source finds where its JSON holds one item."""
    pairs.items = [fields]
    (item,) = items_of(LlavaJson(pairs.write_json(), pairs.images, SIZE_LIMIT))
    return item


def test_every_item_ends_somewhere_and_the_numbers_add_up(bad_files: Any) -> None:
    good = bad_files.items[0]
    bad = [*BAD_ITEMS, {}, *(good | fields for fields, _ in BAD_FIELDS.values())]
    too_long = good | turns(HUMAN, {"from": "gpt", "value": "long " * (SIZE_LIMIT // 5)})
    bad_files.items += [*bad, too_long]
    first_good = len(bad_files.items)
    bad_files.add(50)

    summary = bad_files.convert(eval_ratio=0.5, max_reject_ratio=1, size_limit=SIZE_LIMIT)
    rejects = bad_files.rejects()

    assert summary.source_items == summary.samples_in == len(bad_files.items)
    assert summary.samples_in == summary.train + summary.eval + summary.rejected
    assert summary.rejected == len(rejects) == len(bad) + 1
    assert [line["index"] for line in rejects] == list(range(1, first_good))
    not_here = {Reason.NOT_JSON, Reason.AMBIGUOUS_KEY, Reason.DUPLICATE}
    assert {line["reason"] for line in rejects} == {*Reason} - not_here
    assert summary.rejected_by_reason == Counter(line["reason"] for line in rejects)
    for line in rejects:
        assert set(line) == {"index", "id", "image", "reason", "detail"}
        assert len(line["detail"]) <= 500
    ids = bad_files.ids("train") + bad_files.ids("eval")
    assert sorted(ids) == ["000000000", *(f"{n:09}" for n in range(first_good, first_good + 50))]


@pytest.mark.parametrize(
    ("value", "prompt"),
    [
        ("<image>\nWhat is it?", "<image>\nWhat is it?"),
        ("What is it?\n<image>", "What is it?\n<image>"),
        ("What is <image>?", "What is <image>?"),
        ("What is it?", "What is it?\n<image>"),
        ("What is it?\n", "What is it?\n<image>"),
        ("", "<image>"),
    ],
)
def test_the_placeholder_is_appended_where_it_is_missing(
    pairs: Any, value: str, prompt: str
) -> None:
    item = pairs.add(conversations=[{"from": "human", "value": value}, GPT])
    record, _ = read_record(found(pairs, item))
    assert record["prompt"] == prompt


def test_the_first_turn_of_each_is_taken(pairs: Any) -> None:
    item = pairs.add(
        id=7,
        conversations=[
            {"from": "system", "value": "Be kind."},
            HUMAN,
            GPT,
            {"from": "human", "value": "What else?"},
            {"from": "gpt", "value": ""},
        ],
    )
    record, size = read_record(found(pairs, item))
    assert record["id"] == "7"
    assert record["prompt"] == "What is it?\n<image>"
    assert record["answer"] == "A gradient."
    assert record["image"] == (pairs.images / item["image"]).read_bytes()
    assert size == (32, 24)


def test_links_and_dots_that_stay_inside_are_followed(pairs: Any) -> None:
    name = pairs.add()["image"]
    (pairs.images / "link.jpg").symlink_to(name)
    images = ImageFolder(str(pairs.images), SIZE_LIMIT)
    assert images.read("link.jpg") == images.read(f"00000/../{name}")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(["id", "image", "conversations"])
turn_like = st.dictionaries(st.sampled_from(["from", "value"]), json_values | st.just("human"))


@settings(deadline=None, derandomize=True, database=None)
@given(item=json_values | st.dictionaries(keys, json_values | st.lists(turn_like, max_size=3)))
def test_any_json_is_rejected_not_crashed_on(item: object) -> None:
    with pytest.raises(Rejected):
        read_record(Item(0, item, Rejected(Reason.MISSING_IMAGE, "none")))


def test_too_many_rejects_fail_the_run(pairs: Any) -> None:
    pairs.add(98)
    pairs.add(2, image="nothing.jpg")
    with pytest.raises(ConversionError) as failure:
        pairs.convert(max_reject_ratio=0.01, size_limit=1 << 14)
    for part in ("2 of 100", "2 missing_image", "0.02", "0.01", "rejects.jsonl", "--max-reject"):
        assert part in str(failure.value)
    assert pairs.files() == ["rejects.jsonl"]
    assert [line["index"] for line in pairs.rejects()] == [98, 99]

    pairs.convert(max_reject_ratio=0.02)  # nothing in the way, and no --overwrite needed
    assert len(pairs.ids("train")) + len(pairs.ids("eval")) == 98


def test_a_side_without_samples_fails_the_run(pairs: Any) -> None:
    pairs.add(3, image="nothing.jpg")
    with pytest.raises(ConversionError, match="all samples of train were rejected"):
        pairs.convert(max_reject_ratio=1)
    assert pairs.files() == ["rejects.jsonl"]


def test_rejects_move_no_other_item_across(pairs: Any) -> None:
    pairs.add(40)
    pairs.convert(eval_ratio=0.25)
    whole = {side: pairs.ids(side) for side in ("train", "eval")}
    for number in range(0, 40, 7):
        pairs.items[number]["image"] = "nothing.jpg"
    bad = {f"{number:09}" for number in range(0, 40, 7)}
    pairs.convert(eval_ratio=0.25, max_reject_ratio=0.5, overwrite=True)
    for side, ids in whole.items():
        assert pairs.ids(side) == [sample_id for sample_id in ids if sample_id not in bad]
