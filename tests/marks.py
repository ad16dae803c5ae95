"""Which values of a parameter run every time, and which with the slow tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import pytest

T = TypeVar("T")


def but(values: Iterable[T], mark: pytest.MarkDecorator, *first: T) -> list[T | object]:
    """The values, of which all but `first` are marked."""
    return [value if value in first else pytest.param(value, marks=mark) for value in values]
