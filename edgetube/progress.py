"""Progress callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

Progress = Callable[[str, int, int], None]
"""Called as progress(stage, done, total); total is 0 while it is unknown."""


def silent(stage: str, done: int, total: int) -> None:
    """Does nothing; the default `progress`."""


def track(items: Iterable[T], stage: str, total: int, progress: Progress) -> Iterator[T]:
    """Yield `items`, reporting before the first and after each."""
    progress(stage, 0, total)
    for done, item in enumerate(items, start=1):
        yield item
        progress(stage, done, total)
