"""One LLaVA item → one record, or the reason why not."""

import reprlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unicodedata import category

from convert.errors import Reason, Rejected
from convert.images import check_image
from convert.sources.source import Item
from vlm_composer.data.schema import IMAGE_PLACEHOLDER, Record

_quote = reprlib.Repr()  # repr() of what a source holds could be of any length and depth
_quote.maxstring = _quote.maxother = 100

_UNSEEN = ("Cc", "Cf", "Zs", "Zl", "Zp")
_INVISIBLE = (
    (0x034F, 0x034F),  # combining grapheme joiner
    (0x115F, 0x1160),  # Hangul fillers
    (0x17B4, 0x17B5),  # Khmer inherent vowels
    (0x180B, 0x180F),  # Mongolian variation selectors
    (0x2065, 0x2065),
    (0x2800, 0x2800),  # blank Braille pattern
    (0x3164, 0x3164),  # Hangul filler
    (0xFE00, 0xFE0F),  # variation selectors
    (0xFFA0, 0xFFA0),  # halfwidth Hangul filler
    (0xFFF0, 0xFFF8),
    (0xE0000, 0xE0FFF),  # tags, variation selectors
)
"""Characters of other categories that show nothing by themselves: the rest of Unicode's
Default_Ignorable_Code_Point (DerivedCoreProperties), and the blank Braille pattern."""


def read_record(item: Item) -> tuple[Record, tuple[int, int]]:
    """Checks an item and its image, and makes a record of them.

    Example:
        >>> fields = {"id": "004539375", "image": "00453/004539375.jpg", "conversations": [
        ...     {"from": "human", "value": "Render a clear summary of the photo."},
        ...     {"from": "gpt", "value": "select luxury furniture 3 - inch gel memory foam"}]}
        >>> record, (width, height) = read_record(Item(0, fields, image=jpeg_bytes))
        >>> record["prompt"]
        'Render a clear summary of the photo.\\n<image>'

    Args:
        item: What a source found. Its fields can be any JSON value. An integer id becomes a string.

    Returns:
        The record, and its image's (width, height) in pixels.

    Raises:
        Rejected: If anything is missing, of a wrong type, ambiguous, or does not decode.
    """
    record = read_fields(item)
    return record, check_image(record["image"])


def read_fields(item: Item) -> Record:
    """`read_record` without a look at the image itself: what an item says, at little cost."""
    fields = item.fields
    if isinstance(fields, Rejected):
        raise fields
    if not isinstance(fields, dict):
        raise Rejected(Reason.NOT_AN_OBJECT, f"a {type(fields).__name__}, not an object")
    sample_id = without_mark(_sample_id(fields))
    prompt, answer = _prompt_and_answer(fields.get("conversations"))
    for field, text in (("id", sample_id), ("prompt", prompt), ("answer", answer)):
        _check_unicode(field, text)

    path = fields.get("image")
    if not isinstance(path, str) or not path:
        raise Rejected(Reason.BAD_IMAGE_FIELD, f"image is {_quote.repr(path)}, not a path")
    if isinstance(item.image, Rejected):
        raise item.image
    return Record(id=sample_id, image=item.image, prompt=prompt, answer=answer)


def _sample_id(fields: dict[str, object]) -> str:
    sample_id = fields.get("id")
    if isinstance(sample_id, bool) or not isinstance(sample_id, str | int):
        raise Rejected(Reason.BAD_ID, f"id is {_quote.repr(sample_id)}, not a string or an integer")
    return str(sample_id)


def _prompt_and_answer(turns: object) -> tuple[str, str]:
    """Return the first round: the first human turn that a gpt turn directly follows, and that one.

    As in LLaVA, a leading gpt turn is not answered by anything. What stands after the round is not
    looked at, but for a placeholder that the round lacks.
    """
    if not isinstance(turns, list) or not turns:
        raise Rejected(
            Reason.NO_CONVERSATION, f"conversations is {_quote.repr(turns)}, not a list of turns"
        )
    place = _first_round(turns)
    prompt, answer = (without_mark(turn["value"]) for turn in turns[place : place + 2])
    if shows_nothing(answer):
        raise Rejected(
            Reason.EMPTY_ANSWER, f"the first answer is {answer[:100]!a}, which shows nothing"
        )
    if IMAGE_PLACEHOLDER in answer:
        raise Rejected(
            Reason.PLACEHOLDER_IN_ANSWER, f"{IMAGE_PLACEHOLDER} in {_quote.repr(answer)}"
        )
    placeholders = prompt.count(IMAGE_PLACEHOLDER)
    if placeholders > 1:
        raise Rejected(
            Reason.SEVERAL_PLACEHOLDERS, f"{placeholders} × {IMAGE_PLACEHOLDER} for one image"
        )
    if placeholders == 0:
        for number, turn in enumerate(turns):
            if isinstance(turn, dict) and IMAGE_PLACEHOLDER in str(turn.get("value")):
                raise Rejected(
                    Reason.PLACEHOLDER_ELSEWHERE,
                    f"{IMAGE_PLACEHOLDER} stands in turn {number}, and the first round is turns "
                    f"{place} and {place + 1}",
                )
        on_new_line = not prompt or prompt.endswith("\n")
        prompt += IMAGE_PLACEHOLDER if on_new_line else f"\n{IMAGE_PLACEHOLDER}"
    return prompt, answer


def _first_round(turns: list[Any]) -> int:
    """Return the place of the first human turn that a gpt turn directly follows.

    Each turn up to these two must have a speaker and a text.
    """
    speakers: list[str] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise Rejected(Reason.BAD_TURN, f"a turn is {_quote.repr(turn)}, not an object")
        speaker, value = turn.get("from"), turn.get("value")
        if not isinstance(speaker, str):
            raise Rejected(
                Reason.BAD_TURN, f"turn {number} is from {_quote.repr(speaker)}, not a speaker"
            )
        if not isinstance(value, str):
            shown = f"the {speaker[:100]} turn's value is {_quote.repr(value)}"
            raise Rejected(Reason.BAD_TURN, shown)
        speakers.append(speaker)
        if speakers[-2:] == ["human", "gpt"]:
            return number - 1
    shown = _quote.repr(speakers)
    for speaker, missing in (("human", Reason.NO_HUMAN_TURN), ("gpt", Reason.NO_GPT_TURN)):
        if speaker not in speakers:
            raise Rejected(missing, f"none of {len(turns)} turns is from {speaker!r}: {shown}")
    raise Rejected(
        Reason.NO_ROUND, f"no human turn is directly followed by a gpt turn: turns are from {shown}"
    )


@dataclass(frozen=True)
class Turns:
    """Turns of an item that a record was made of."""

    rounds: int
    """Human turns that a gpt turn directly follows; the record has the first."""

    dropped: int
    """Turns that are not in the record."""


def count_turns(item: Item) -> Turns:
    """Count the turns of an item that `read_fields` takes."""
    assert isinstance(item.fields, dict)
    turns = item.fields["conversations"]
    speakers = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    return Turns(list(pairwise(speakers)).count(("human", "gpt")), len(turns) - 2)


def without_mark(text: str) -> str:
    """Return a text without the byte-order marks that it begins with."""
    return text.lstrip("\ufeff")


def shows_nothing(text: str) -> bool:
    """Tell whether a text has no character that can be seen: white space, byte-order marks,
    zero-width and control characters, fillers."""
    return all(
        category(c) in _UNSEEN or any(first <= ord(c) <= last for first, last in _INVISIBLE)
        for c in text
    )


def _check_unicode(field: str, text: str) -> None:
    # JSON can spell half a surrogate pair ("\ud83d"), which no UTF-8 file can hold.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Rejected(Reason.NOT_UNICODE, f"{field}: {error}") from error
