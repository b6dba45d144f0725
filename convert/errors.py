"""What can be wrong with a run (`ConversionError`) and with one item of it (`Rejected`)."""

from enum import StrEnum


class ConversionError(ValueError):
    """The run cannot go on, for a reason that its caller can mend. The message says how."""


class NoDataSet(ConversionError):
    """The run came to its end, and that is no data set: of what it wrote only the list of rejects
    is worth keeping."""


class Reason(StrEnum):
    """Why an item is rejected: the field `reason` of a line in rejects.jsonl."""

    NOT_JSON = "not_json"
    NOT_AN_OBJECT = "not_an_object"
    BAD_ID = "bad_id"
    BAD_IMAGE_FIELD = "bad_image_field"
    NO_CONVERSATION = "no_conversation"
    BAD_TURN = "bad_turn"
    NO_HUMAN_TURN = "no_human_turn"
    NO_GPT_TURN = "no_gpt_turn"
    NO_ROUND = "no_round"
    EMPTY_ANSWER = "empty_answer"
    SEVERAL_PLACEHOLDERS = "several_placeholders"
    PLACEHOLDER_ELSEWHERE = "placeholder_elsewhere"
    PLACEHOLDER_IN_ANSWER = "placeholder_in_answer"
    NOT_UNICODE = "not_unicode"
    AMBIGUOUS_KEY = "ambiguous_key"
    MISSING_IMAGE = "missing_image"
    OUTSIDE_IMAGES_ROOT = "outside_images_root"
    UNREADABLE_IMAGE = "unreadable_image"
    NOT_AN_IMAGE = "not_an_image"
    BROKEN_IMAGE = "broken_image"
    BAD_DIMENSIONS = "bad_dimensions"
    UNKNOWN_GREY_RANGE = "unknown_grey_range"
    TOO_LARGE = "too_large"
    DUPLICATE = "duplicate"
    """Left out on request, for which it is in rejects.jsonl; it is none of the rejects."""


MAX_DETAIL = 500
"""Characters of what is said of a reject, whatever values of the source it quotes."""


class Rejected(Exception):
    """One item cannot become a sample. The run goes on without it.

    Args:
        reason: The class of the fault, counted in summary.json.
        detail: What was found, for whoever has to fix the source. Of one longer than `MAX_DETAIL`
            characters the middle is left out.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        if len(detail) > MAX_DETAIL:
            end = MAX_DETAIL // 3
            detail = f"{detail[: MAX_DETAIL - end - 1]}…{detail[-end:]}"
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[Reason, str]]:
        return type(self), (self.reason, self.detail)  # else it could not come from a process
