"""Which turns become prompt and answer, what is counted of the others, and what counts as text."""

import codecs
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import inspect, verify
from convert.conversion import convert_pairs
from convert.errors import MAX_DETAIL, Reason, Rejected
from convert.record import count_turns, read_fields, shows_nothing
from convert.sources import Item, LlavaJson, Parquet, Source, WebDataset
from convert.sources.image_stores import ImageFolder
from convert.summary import Summary
from source_items import LIMIT, items_of, outcome, outcomes_of, tar_of

steady = settings(deadline=None, derandomize=True, database=None)
SHORT = {"h": "human", "g": "gpt", "s": "system", "u": "user"}


def talk(*turns: str) -> dict[str, Any]:
    """An item of turns such as `h:What?`."""
    pairs = [turn.partition(":") for turn in turns]
    values = [{"from": SHORT[speaker], "value": text} for speaker, _, text in pairs]
    return {"id": "1", "image": "1.jpg", "conversations": values}


def record_of(fields: Any) -> tuple[str, str] | Reason:
    try:
        record = read_fields(Item(0, fields, b""))
    except Rejected as rejected:
        return rejected.reason
    return record["prompt"], record["answer"]


@pytest.mark.parametrize(
    ("turns", "expected", "rounds", "dropped"),
    [
        (["h:What?", "g:a kite"], ("What?\n<image>", "a kite"), 1, 0),
        (
            ["g:Hello! How may I help you today?", "h:<image>\nWhat is shown?", "g:a red kite"],
            ("<image>\nWhat is shown?", "a red kite"), 1, 1,
        ),
        (["h:A", "h:B", "g:four"], ("B\n<image>", "four"), 1, 1),
        (["h:A", "s:x", "g:no", "h:B", "g:yes"], ("B\n<image>", "yes"), 1, 3),
        (["s:Be kind.", "h:A <image>", "g:a", "h:B", "g:b"], ("A <image>", "a"), 2, 3),
        (["h:A", "g:a", "g:again", "h:B", "g:b", "h:C"], ("A\n<image>", "a"), 2, 4),
        (["h:<image> A", "g:a", "h:<image> B", "g:b"], ("<image> A", "a"), 2, 2),
        (["h:", "g:a"], ("<image>", "a"), 1, 0),
    ],
)  # fmt: skip
def test_a_prompt_has_its_own_answer(
    turns: list[str], expected: tuple[str, str], rounds: int, dropped: int
) -> None:
    fields = talk(*turns)
    assert record_of(fields) == expected
    counted = count_turns(Item(0, fields, b""))
    assert (counted.rounds, counted.dropped) == (rounds, dropped)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (["g:a", "h:B"], Reason.NO_ROUND),
        (["h:A", "s:x", "g:a"], Reason.NO_ROUND),
        (["u:A", "g:a"], Reason.NO_HUMAN_TURN),
        (["h:A", "u:a"], Reason.NO_GPT_TURN),
        (["h:A", "g:a", "h:<image> B", "g:b"], Reason.PLACEHOLDER_ELSEWHERE),
        (["h:<image> A", "h:B", "g:b"], Reason.PLACEHOLDER_ELSEWHERE),
        (["s:<image>", "h:B", "g:b"], Reason.PLACEHOLDER_ELSEWHERE),
        (["h:A", "g: \u200b", "h:B", "g:b"], Reason.EMPTY_ANSWER),
    ],
)
def test_turns_that_make_no_pair_are_rejected(turns: list[str], reason: Reason) -> None:
    assert record_of(talk(*turns)) == reason


def test_a_reject_says_who_speaks_and_where_the_placeholder_is() -> None:
    for turns, said in (
        (["u:A", "u:B"], "none of 2 turns is from 'human': ['user', 'user']"),
        (["g:a", "h:B"], "no human turn is directly followed by a gpt turn: turns are from"),
        (["h:A", "g:a", "h:<image>"], "<image> stands in turn 2, and the first round is turns 0"),
    ):
        with pytest.raises(Rejected, match=said.replace("[", r"\[")):
            read_fields(Item(0, talk(*turns), b""))


def llava_rule(speakers: str) -> tuple[int, int] | None:
    """LLaVA's: a conversation begins with its first human turn that is answered."""
    for place in range(len(speakers) - 1):
        if speakers[place : place + 2] == "hg":
            return place, place + 1
    return None


@steady
@given(st.text("hgsu", min_size=1, max_size=7))
def test_any_order_of_speakers(speakers: str) -> None:
    turns = [f"{speaker}:{number}" for number, speaker in enumerate(speakers)]
    found, expected = record_of(talk(*turns)), llava_rule(speakers)
    if expected is None:
        assert found in (Reason.NO_ROUND, Reason.NO_HUMAN_TURN, Reason.NO_GPT_TURN)
    else:
        assert found == (f"{expected[0]}\n<image>", str(expected[1]))


@pytest.mark.parametrize("workers", [1, 2])
def test_dropped_turns_are_counted(
    pairs: Any, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    pairs.add(40)
    for item in pairs.items[:7]:
        item["conversations"] += [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "x"}]
    pairs.items[7]["conversations"].insert(0, {"from": "gpt", "value": "Hello!"})
    summary = pairs.convert(show_progress=True, workers=workers, eval_ratio=0.25)
    assert (summary.several_rounds, summary.dropped_turns) == (7, 15)
    quality = json.loads((pairs.out / "quality.json").read_text())
    counts = {"several_rounds": 7, "with_dropped_turns": 8, "dropped_turns": 15}
    assert quality["turns"] == counts
    said = capsys.readouterr().err
    assert "7 of 40 samples have more than one round; only the first is used" in said
    assert "1 of 40 samples have turns that belong to no round" in said
    assert inspect.main([str(pairs.out), "--out", str(pairs.folder / "page")]) == 0
    assert "more than one round (only the first is used)" in capsys.readouterr().out


def test_summaries_and_qualities_of_earlier_conversions_are_read(
    pairs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs.add(8)
    pairs.convert()
    for name in ("summary.json", "quality.json"):
        value = json.loads((pairs.out / name).read_text())
        for key in ("several_rounds", "dropped_turns", "turns"):
            value.pop(key, None)
        (pairs.out / name).write_text(json.dumps(value))
    assert Summary.from_json((pairs.out / "summary.json").read_text()).several_rounds is None
    assert verify.main([str(pairs.out)]) == 0
    assert inspect.main([str(pairs.out), "--out", str(pairs.folder / "page")]) == 0
    assert "more than one round" not in capsys.readouterr().out


NOTHING = [
    *("", " \n\t", "\ufeff", "\u200b\ufeff", "\u200e\u200f\u202e", "\u3164", "\u2800 "),
    *("\ufe0f", "\x00\x1b", "\u00ad", "\u034f", "\U000e0100", "\u2028"),
]
WOMEN, PERSIAN = "👩\u200d👩\u200d👧", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
SOMETHING = ["a", ".", WOMEN, PERSIAN, "❤\ufe0f", "\u202eabc", "猫", "\ue000"]


@pytest.mark.parametrize("text", NOTHING, ids=ascii)
def test_texts_that_show_nothing(text: str) -> None:
    assert shows_nothing(text)


def sources_of(pairs: Any, folder: Path, text: str, before: bytes) -> dict[str, Source]:
    """One source of each kind whose only answer is `text`; files of text start with `before`."""
    image = (pairs.images / pairs.items[0]["image"]).read_bytes()
    item = {**pairs.items[0], "conversations": [
        {"from": "human", "value": "?"}, {"from": "gpt", "value": text}]}  # fmt: skip
    plain, encoded = json.dumps(item).encode(), text.encode()
    (folder / "list.json").write_bytes(before + b"[" + plain + b"]")
    (folder / "lines.jsonl").write_bytes(before + plain + b"\n")
    for end, data in (("txt", encoded), ("caption", encoded), ("text", encoded), ("json", plain)):
        tar_of({"1.jpg": image, f"1.{end}": before + data}, folder / f"{end}.tar")
    caption = json.dumps({"caption": text}).encode()
    tar_of({"1.jpg": image, "1.json": before + caption}, folder / "captions.tar")
    pq.write_table(pa.table({"image": [image], "text": [text]}), folder / "text.parquet")
    turns = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    conversations = pa.array([item["conversations"]], turns)
    pq.write_table(
        pa.table({"image": [image], "conversations": conversations}), folder / "turns.parquet"
    )
    tars = {path.name: WebDataset(str(path), LIMIT) for path in folder.glob("*.tar")}
    rows = {path.name: Parquet(str(path), LIMIT) for path in folder.glob("*.parquet")}
    listed = {n: LlavaJson(folder / n, pairs.images, LIMIT) for n in ("list.json", "lines.jsonl")}
    return {**listed, **tars, **rows}


@pytest.mark.parametrize("before", [b"", codecs.BOM_UTF8], ids=["plain", "mark"])
@pytest.mark.parametrize("text", [*SOMETHING, "\ufeffa cat", *NOTHING], ids=ascii)
def test_every_source_takes_text_by_one_rule(
    pairs: Any, tmp_path: Path, text: str, before: bytes
) -> None:
    pairs.add()
    sources = sources_of(pairs, tmp_path, text, before)
    assert len(sources) == 9
    expected = Reason.EMPTY_ANSWER if text in NOTHING else text.removeprefix("\ufeff")
    for name, source in sources.items():
        (found,) = outcomes_of(source)
        answer = found["answer"] if isinstance(found, dict) else found
        assert answer == expected, name


def test_a_mark_in_ids_and_prompts_is_removed() -> None:
    fields = talk("h:\ufeffWhat?", "g:a") | {"id": "\ufeff7"}
    record = read_fields(Item(0, fields, b""))
    assert (record["id"], record["prompt"]) == ("7", "What?\n<image>")


@pytest.mark.parametrize("marked", [True, False], ids=["mark", "no mark"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_other_encodings_are_named(pairs: Any, tmp_path: Path, encoding: str, marked: bool) -> None:
    pairs.add()
    data = ("\ufeff" * marked + json.dumps(pairs.items)).encode(encoding)
    (tmp_path / "pairs.json").write_bytes(data)
    name = encoding[:6].upper()
    with pytest.raises(ValueError, match=f"is a text of {name}: save it as UTF-8"):
        outcomes_of(LlavaJson(tmp_path / "pairs.json", pairs.images, LIMIT))
    image = (pairs.images / pairs.items[0]["image"]).read_bytes()
    for end, reason in (("txt", Reason.NOT_UNICODE), ("json", Reason.NOT_JSON)):
        path = tar_of({"1.jpg": image, f"1.{end}": data}, tmp_path / f"{end}.tar")
        (item,) = items_of(WebDataset(str(path), LIMIT))
        found, detail = outcome(item)
        assert (found, f"a text of {name}: save it as UTF-8" in detail) == (reason, True)


def test_rows_whose_id_is_null_are_taken(pairs: Any, tmp_path: Path) -> None:
    pairs.add(3)
    images = [(pairs.images / item["image"]).read_bytes() for item in pairs.items]
    rows = {"image": images, "text": ["a", "b", "c"]}
    pq.write_table(pa.table(rows | {"id": ["x", None, "z"]}), tmp_path / "some.parquet")
    pq.write_table(pa.table(rows | {"id": pa.nulls(3)}), tmp_path / "null.parquet")
    pq.write_table(pa.table(rows), tmp_path / "none.parquet")
    ids = {
        name: [found["id"] for found in outcomes_of(Parquet(str(tmp_path / name), LIMIT))]
        for name in ("some.parquet", "null.parquet", "none.parquet")
    }
    assert ids == {
        "some.parquet": ["x", "some-00000001", "z"],
        "null.parquet": [f"null-{n:08}" for n in range(3)],
        "none.parquet": [f"none-{n:08}" for n in range(3)],
    }


DEFAULT_IGNORABLE = [
    *("00AD", "034F", "061C", "115F-1160", "17B4-17B5", "180B-180F", "200B-200F", "202A-202E"),
    *("2060-206F", "3164", "FE00-FE0F", "FEFF", "FFA0", "FFF0-FFF8", "1BCA0-1BCA3"),
    *("1D173-1D17A", "E0000-E0FFF"),
]
"""Default_Ignorable_Code_Point of Unicode 15's DerivedCoreProperties.txt."""


def test_default_ignorable_characters_show_nothing() -> None:
    ends = [span.split("-") for span in DEFAULT_IGNORABLE]
    found = [
        c
        for first, *_, last in (e * 2 for e in ends)
        for c in range(int(first, 16), int(last, 16) + 1)
    ]
    assert len(found) == 4174
    assert [f"{c:04X}" for c in found if not shows_nothing(chr(c))] == []
    assert shows_nothing("\ufe0f\U000e0100\u180b")
    assert not shows_nothing("\u17b4a")


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(
    "wrong",
    [
        {"value": "x"},
        {"from": None, "value": "x"},
        {"from": 7, "value": "x"},
        {"from": "system"},
        {"from": "human", "value": None},
        {"from": "gpt", "value": ["x"]},
        {},
        "x",
        None,
    ],
    ids=repr,
)
def test_a_malformed_turn_before_or_in_the_pair_rejects(wrong: Any, place: int) -> None:
    turns = talk("s:be short", "h:What?", "g:a cat")["conversations"]
    turns[place] = wrong
    reason, _ = outcome(Item(0, talk() | {"conversations": turns}, b""))
    assert reason == Reason.BAD_TURN


def test_a_malformed_turn_after_the_pair_does_not_matter() -> None:
    turns = [*talk("h:What?", "g:a cat")["conversations"], {"from": None}]
    assert read_fields(Item(0, talk() | {"conversations": turns}, b""))["answer"] == "a cat"


def test_the_text_of_a_reject_shows_both_ends() -> None:
    rejected = Rejected(Reason.BAD_ID, "begins" + "x" * 10**6 + "ends")
    assert len(rejected.detail) == MAX_DETAIL
    assert rejected.detail.startswith("begins")
    assert rejected.detail.endswith("ends")
    assert len(str(rejected)) < MAX_DETAIL + 50


def test_an_image_in_place_of_its_path_is_not_looked_up(
    pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs.add(1)
    long = "/9j/" * 1_250
    pairs.items = [{**pairs.items[0], "image": long}]

    def looked_up(self: object, name: str) -> bytes:
        raise AssertionError("a name of 5,000 characters was looked up")

    monkeypatch.setattr(ImageFolder, "read", looked_up)
    rows = {"image": [{"bytes": None, "path": long}], "text": ["a"]}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    for source in (
        LlavaJson(pairs.write_json(), pairs.images, LIMIT),
        Parquet(str(tmp_path / "rows.parquet"), LIMIT, images=str(pairs.images)),
    ):
        ((reason, detail),) = map(outcome, items_of(source))
        assert reason == Reason.UNREADABLE_IMAGE
        assert "has 5,000 characters, and a path at most 4,096" in detail


def test_no_value_makes_a_line_of_rejects_long(pairs: Any) -> None:
    pairs.add(9)
    long = "/9j/" * 100_000
    pairs.items += [
        {"id": "base64", "image": long, "conversations": pairs.items[0]["conversations"]},
        {"id": long, "image": 0, "conversations": [long]},
        {"id": "x", "image": {"bytes": long}, "conversations": pairs.items[0]["conversations"]},
        {"id": 10**3000, "image": "y", "conversations": long},
        talk(f"g:{long}", f"h:{long}"),
        talk(f"h:{long}<image><image>", "g:a"),
        talk("h:a", f"g:{long}<image>"),
        [long],
    ]
    source = LlavaJson(pairs.write_json(), pairs.images, LIMIT)
    convert_pairs([source], pairs.out, eval_ratio=0, max_reject_ratio=1, show_progress=False)
    lines = (pairs.out / "rejects.jsonl").read_text().splitlines()
    assert len(lines) == 8
    assert max(map(len, lines)) < 1200
    assert json.loads(lines[0])["image"] == long[:200] + "… (400000 characters)"
