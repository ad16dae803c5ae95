"""Views of a source: several clips of one video, whose answers an evaluation averages.

A view is an option of evaluation, not of a model: the input contract says what one clip is, and a view says which clip
of a source, and which crop of its frames, takes the place of the one in the middle. `docs/preprocessing.md` has the
rules, and `docs/parity.md` says what is averaged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from edgetube.errors import InputError

Side = Literal["start", "middle", "end"]
"""Where a crop lies along the side of the frame where it leaves more room; along the other one it is in the middle."""

SIDES: dict[int, tuple[Side, ...]] = {1: ("middle",), 3: ("start", "middle", "end")}
"""The crops of a number of spatial views."""

MOST_TEMPORAL = 100
"""Largest number of temporal views: far beyond any evaluation, a guard against a slip of the keyboard."""


@dataclass(frozen=True)
class View:
    """One view of a source.

    Attributes:
        index, count: temporal view number `index`, from 0, of `count`; a single one is the clip of the contract.
        side: of the crop.
    """

    index: int = 0
    count: int = 1
    side: Side = "middle"


MIDDLE = View()
"""The clip of the contract, in the middle of a source."""


@dataclass(frozen=True)
class Views:
    """How many views each clip of an evaluation has.

    Attributes:
        temporal: clips, spread evenly over the source; 1 is the clip of the contract.
        spatial: crops of each of them, 1 or 3.
    """

    temporal: int = 1
    spatial: int = 1

    def __post_init__(self) -> None:
        if self.spatial not in SIDES:
            raise InputError(f"views are {self}, with {self.spatial} spatial crops; expected 1 or 3 of them")
        if not 1 <= self.temporal <= MOST_TEMPORAL:
            raise InputError(f"views are {self}, with {self.temporal} temporal views; expected 1 to {MOST_TEMPORAL}")

    @classmethod
    def parse(cls, text: str) -> Views:
        """The views that are written as temporal x spatial, like 5x3.

        Raises:
            InputError: written in another way, or a number that there cannot be.
        """
        found = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text)
        if found is None:
            raise InputError(f"views are {text!r:.60}; expected temporal x spatial views like 5x3")
        return cls(int(found[1]), int(found[2]))

    @property
    def count(self) -> int:
        """Views of one clip."""
        return self.temporal * self.spatial

    def __iter__(self) -> Iterator[tuple[View, ...]]:
        """For each temporal view the views that are its crops."""
        for index in range(self.temporal):
            yield tuple(View(index, self.temporal, side) for side in SIDES[self.spatial])

    def __str__(self) -> str:
        return f"{self.temporal}x{self.spatial}"


SINGLE = Views()
"""One view, the clip of the contract."""
