"""Which columns of a Parquet file are the image, the text and the id."""

from __future__ import annotations

from typing import Any

from convert.errors import ConversionError

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
TEXT_COLUMNS = ("conversations", "caption", "text", "txt")
ID_COLUMNS = ("id", "key", "__key__")


def find_columns(schema: Any, file: str) -> tuple[str, str, str | None]:
    """The columns of the image, the text and the id.

    Raises:
        ConversionError: If there are none of the first two, or of a type that they cannot have.
    """
    types = {name: schema.field(name).type for name in dict.fromkeys(schema.names)}
    held = ", ".join(f"{name}: {type_}" for name, type_ in types.items())[:1000]
    image = next((name for name in IMAGE_COLUMNS if name in types), None)
    text = next((name for name in TEXT_COLUMNS if name in types), None)
    for found, names in ((image, IMAGE_COLUMNS), (text, TEXT_COLUMNS)):
        if found is None or schema.names.count(found) > 1:
            raise ConversionError(
                f"{file} holds the columns {held}: there must be one of {', '.join(names)}"
            )
    assert image is not None
    assert text is not None
    if not _can_be_image(types[image]):
        raise ConversionError(
            f"{file}: the column {image} is {types[image]}: an image is bytes, a path, or a struct "
            "of bytes and path"
        )
    if not (_is_conversation if text == "conversations" else _is_text)(types[text]):
        kind = "a list of structs of from and value" if text == "conversations" else "text"
        raise ConversionError(f"{file}: the column {text} is {types[text]}, not {kind}")
    return image, text, next((name for name in ID_COLUMNS if name in types), None)


def _can_be_image(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        names = {kind.field(number).name for number in range(kind.num_fields)}
        return bool(names & {"bytes", "path"})
    return _is_bytes(kind) or _is_text(kind)


def _is_conversation(kind: Any) -> bool:
    from pyarrow import types

    if not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
        return False
    turn = kind.value_type
    return types.is_struct(turn) and {"from", "value"} <= {
        turn.field(number).name for number in range(turn.num_fields)
    }


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_bytes(kind: Any) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
