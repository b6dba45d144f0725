"""One LLaVA item → one record, or the reason why not."""

import reprlib
from typing import Any

from convert.errors import Reason, Rejected
from convert.images import check_image
from convert.sources.source import Item
from vlm_composer.data.schema import IMAGE_PLACEHOLDER, Record

_quote = reprlib.Repr()  # repr() of what a source holds could be of any length and depth
_quote.maxstring = _quote.maxother = 100


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
    sample_id = _sample_id(fields)
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
    if not isinstance(turns, list) or not turns:
        raise Rejected(
            Reason.NO_CONVERSATION, f"conversations is {_quote.repr(turns)}, not a list of turns"
        )
    prompt = _first_turn(turns, "human", Reason.NO_HUMAN_TURN)
    answer = _first_turn(turns, "gpt", Reason.NO_GPT_TURN)

    if not answer.strip():
        raise Rejected(Reason.EMPTY_ANSWER, f"the first gpt turn is {_quote.repr(answer)}")
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
        on_new_line = not prompt or prompt.endswith("\n")
        prompt += IMAGE_PLACEHOLDER if on_new_line else f"\n{IMAGE_PLACEHOLDER}"
    return prompt, answer


def _first_turn(turns: list[Any], speaker: str, missing: Reason) -> str:
    for turn in turns:
        if not isinstance(turn, dict):
            raise Rejected(Reason.BAD_TURN, f"a turn is {_quote.repr(turn)}, not an object")
        if turn.get("from") == speaker:
            value = turn.get("value")
            if not isinstance(value, str):
                raise Rejected(
                    Reason.BAD_TURN, f"the {speaker} turn's value is {_quote.repr(value)}"
                )
            return value
    raise Rejected(missing, f"none of {len(turns)} turns is from {speaker!r}")


def _check_unicode(field: str, text: str) -> None:
    # JSON can spell half a surrogate pair ("\ud83d"), which no UTF-8 file can hold.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Rejected(Reason.NOT_UNICODE, f"{field}: {error}") from error
