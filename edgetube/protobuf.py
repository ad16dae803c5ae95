"""Protobuf's wire format in plain Python: reads messages as fields by number, and encodes fields."""

from __future__ import annotations

from collections import defaultdict
from typing import TypeAlias

Fields: TypeAlias = "dict[int, list[int | memoryview]]"


def parse(data: int | memoryview) -> Fields:
    """The fields of a message: number -> values, integers or undecoded bytes. Nothing is copied.

    Raises:
        ValueError: not a message.
    """
    data = message(data)
    found: Fields = defaultdict(list)
    position, end = 0, len(data)
    while position < end:
        key, position = varint(data, position)
        wire, number = key & 7, key >> 3
        if wire == 0:
            value, position = varint(data, position)
            found[number].append(value)
            continue
        if wire == 2:
            size, position = varint(data, position)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if position + size > end:
            raise ValueError("a message that is cut off")
        found[number].append(data[position : position + size])
        position += size
    return dict(found)


def varint(data: memoryview, position: int) -> tuple[int, int]:
    """The varint at `position`, and its end."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def message(value: int | memoryview) -> memoryview:
    """The bytes of a length-delimited field.

    Raises:
        ValueError: the field is a number.
    """
    if isinstance(value, int):
        raise ValueError("a number where a message was expected")
    return value


def text(value: int | memoryview) -> str:
    """The text of a string field.

    Raises:
        ValueError: the field is a number, or not UTF-8.
    """
    return str(message(value), "utf-8")


def field(number: int, content: bytes) -> bytes:
    """Encode a length-delimited field."""
    return head(number, len(content)) + content


def head(number: int, size: int) -> bytes:
    """Encode what precedes the content of a length-delimited field, `size` bytes."""
    return _varint(number << 3 | 2) + _varint(size)


def text_field(number: int, value: str) -> bytes:
    """Encode a string field."""
    return field(number, value.encode())


def number(number: int, value: int) -> bytes:
    """Encode a field with a non-negative integer."""
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    parts = []
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
