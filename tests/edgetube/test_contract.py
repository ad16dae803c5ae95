"""The input contract: its refusals, and JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetube.contract import InputContract
from edgetube.errors import SpecError

SMALL = InputContract(4, 16, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 0}, "frames is 0; expected an integer"),
        ({"width": True}, "width is True; expected an integer"),
        ({"height": 16.0}, "height is 16.0; expected an integer"),
        ({"frames": 1 << 11, "height": 1 << 10, "width": 1 << 10}, "up to 1073741824 voxels"),
        ({"fps": 0.0}, "fps is 0.0; expected a finite number, 0.001 to 100000"),
        ({"fps": math.inf}, "fps is inf"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"mean": (0.5,)}, "mean has 1 entries; expected 3"),
        ({"mean": (0.5, math.nan, 0.5)}, "mean is nan; expected a finite number"),
        ({"mean": ("0.5", 0.5, 0.5)}, "mean is '0.5'; expected a finite number"),
        ({"std": (1.0, 0.0, 1.0)}, "std is 0.0; expected a finite number, 1e-06"),
        ({"resize": "letterbox"}, "input resize is 'letterbox'; this version knows short-side, stretch"),
        ({"crop": "random"}, "input crop is 'random'"),
        ({"color": "BGR"}, "input color is 'BGR'; this version knows RGB"),
    ],
)
def test_an_input_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        replace(SMALL, **change)


def test_zero_frames_are_not_taken_for_the_contract_s_own() -> None:
    with pytest.raises(SpecError, match="frames is 0; expected an integer, 1 to 65536"):
        SMALL.with_clip(frames=0)


@given(
    st.builds(
        InputContract,
        frames=st.integers(1, 64),
        height=st.integers(1, 512),
        width=st.integers(1, 512),
        fps=st.none() | st.floats(0.1, 120),
        mean=st.tuples(*[st.floats(0, 1)] * 3),
        std=st.tuples(*[st.floats(0.01, 1)] * 3),
        resize=st.sampled_from(["short-side", "stretch"]),
    )
)
def test_a_round_trip_through_json_gives_an_equal_contract(contract: Any) -> None:
    assert InputContract.from_json(json.loads(json.dumps(contract.to_json()))) == contract


def test_a_missing_field_and_what_is_no_object_are_refused() -> None:
    with pytest.raises(SpecError, match="InputContract lacks the field frames"):
        InputContract.from_json({key: item for key, item in SMALL.to_json().items() if key != "frames"})
    with pytest.raises(SpecError, match="InputContract is 3; expected an object"):
        InputContract.from_json(3)  # type: ignore[arg-type]


def test_optional_fields_may_be_left_out() -> None:
    assert InputContract.from_json({"frames": 4, "height": 16, "width": 16}) == SMALL


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(SpecError, match="InputContract has no field dropout; it has "):
        InputContract.from_json(SMALL.to_json() | {"dropout": 0.1})


def test_the_same_preprocessing_for_another_clip() -> None:
    contract = InputContract(8, 64, 80, fps=15.0, mean=(0.1, 0.2, 0.3))
    assert contract.with_clip(frames=16, size=(32, 48)) == replace(contract, frames=16, height=32, width=48)
    assert contract.with_clip() == contract
