"""How views are written, and in which order they come; where they lie is in the tests of preprocessing and resizing."""

from __future__ import annotations

from typing import Any

import pytest

from edgetube.errors import InputError
from edgetube.views import MIDDLE, SINGLE, View, Views


def test_temporal_then_spatial() -> None:
    views = Views.parse("5x3")
    assert views == Views(temporal=5, spatial=3)
    assert (views.count, str(views)) == (15, "5x3")
    assert list(Views(2, 3)) == [
        (View(0, 2, "start"), View(0, 2, "middle"), View(0, 2, "end")),
        (View(1, 2, "start"), View(1, 2, "middle"), View(1, 2, "end")),
    ]


def test_one_view_is_the_clip_of_the_contract() -> None:
    assert Views.parse("1x1") == Views() == SINGLE
    assert list(SINGLE) == [(MIDDLE,)]
    assert [view.side for (view,) in Views(4, 1)] == ["middle"] * 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5", "views are '5'; expected temporal x spatial views like 5x3"),
        ("", "views are ''; expected"),
        ("5x3x2", "views are '5x3x2'; expected"),
        ("-1x3", "views are '-1x3'; expected"),
        (" 5x3", "views are ' 5x3'; expected"),
        ("5x3\n", "expected temporal x spatial"),
        ("٣x3", "expected temporal x spatial"),
        ("9" * 5000 + "x3", "expected temporal x spatial"),
        ("5x2", "views are 5x2, with 2 spatial crops; expected 1 or 3 of them"),
        ("5x0", "with 0 spatial crops; expected 1 or 3"),
        ("0x3", "views are 0x3, with 0 temporal views; expected 1 to 100"),
        ("101x3", "with 101 temporal views; expected 1 to 100"),
    ],
)
def test_other_texts_are_refused(text: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        Views.parse(text)
    assert len(str(refused.value)) < 150
