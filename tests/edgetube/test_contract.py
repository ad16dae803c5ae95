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
        ({"crop": "random"}, "input crop is 'random'; this version knows center, center-floor"),
        ({"filter": "lanczos"}, "input filter is 'lanczos'; this version knows bilinear, bicubic"),
        ({"sampling": "random"}, "input sampling is 'random'; this version knows uniform, stride, segments"),
        ({"resize_size": 15}, "the crop of 16 x 16 is larger than a frame with a short side of 15"),
        ({"resize_size": 20, "width": 24}, "the crop of 16 x 24 is larger than a frame with a short side of 20"),
        ({"resize_size": (16, 15), "resize": "stretch"}, "the crop of 16 x 16 is larger than 16 x 15"),
        ({"resize_size": (20, 20)}, r"resize_size is \(20, 20\); expected an integer, 1 to 65536"),
        ({"resize_size": 20, "resize": "stretch"}, r"resize_size \(height, width\) is 20; expected a list"),
        ({"resize_size": (20, 20, 20), "resize": "stretch"}, "has 3 entries; expected 2"),
        ({"resize_size": (20, 20.5), "resize": "stretch"}, "resize_size is 20.5; expected an integer"),
        ({"resize_size": 0}, "resize_size is 0"),
        ({"sampling": "stride"}, "input stride is None; sampling stride takes a stride"),
        ({"sampling": "stride", "stride": 0}, "stride is 0; expected an integer, 1 to 65536"),
        ({"sampling": "stride", "stride": 2.0}, "stride is 2.0; expected an integer"),
        ({"stride": 2}, "input stride is 2; sampling uniform takes no stride"),
        ({"sampling": "segments", "stride": 2}, "sampling segments takes no stride"),
        ({"sampling": "stride", "stride": 2, "fps": 10.0}, "input fps is 10.0; sampling stride knows no rate"),
        ({"sampling": "segments", "fps": 10.0}, "input fps is 10.0; sampling segments knows no rate"),
        ({"color": "BGR"}, "input color is 'BGR'; this version knows RGB"),
    ],
)
def test_an_input_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        replace(SMALL, **change)


def test_zero_frames_are_not_taken_for_the_contract_s_own() -> None:
    with pytest.raises(SpecError, match="frames is 0; expected an integer, 1 to 65536"):
        SMALL.with_clip(frames=0)


@st.composite
def contracts(draw: st.DrawFn) -> InputContract:
    rule: Any = draw(st.sampled_from(["short-side", "stretch"]))
    height, width = draw(st.integers(1, 512)), draw(st.integers(1, 512))
    larger: Any = st.integers(max(height, width), 600), st.tuples(st.integers(height, 600), st.integers(width, 600))
    sampling: Any = draw(st.sampled_from(["uniform", "stride", "segments"]))
    return InputContract(
        draw(st.integers(1, 64)),
        height,
        width,
        fps=draw(st.none() | st.floats(0.1, 120)) if sampling == "uniform" else None,
        mean=draw(st.tuples(*[st.floats(-2, 2)] * 3)),
        std=draw(st.tuples(*[st.floats(0.01, 1)] * 3)),
        resize=rule,
        resize_size=draw(st.none() | larger[rule == "stretch"]),
        filter=draw(st.sampled_from(["bilinear", "bicubic"])),
        crop=draw(st.sampled_from(["center", "center-floor"])),
        sampling=sampling,
        stride=draw(st.integers(1, 64)) if sampling == "stride" else None,
    )


@given(contracts())
def test_a_round_trip_through_json_gives_an_equal_contract(contract: Any) -> None:
    found = InputContract.from_json(json.loads(json.dumps(contract.to_json())))
    assert found == contract
    assert found.to_json() == contract.to_json()
    assert hash(found) == hash(contract)


def test_json_is_that_of_older_versions_where_nothing_newer_is_said() -> None:
    """Bundles and caches hold digests of it."""
    assert json.dumps(InputContract(8, 64, 80, fps=15.0).to_json()) == (
        '{"frames": 8, "height": 64, "width": 80, "fps": 15.0, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], '
        '"resize": "short-side", "crop": "center", "sampling": "uniform", "layout": "THWC", "dtype": "uint8", '
        '"color": "RGB"}'
    )
    newer = replace(SMALL, resize_size=20, filter="bicubic", sampling="stride", stride=4).to_json()
    assert {key: value for key, value in newer.items() if key not in SMALL.to_json()} == {
        "resize_size": 20,
        "filter": "bicubic",
        "stride": 4,
    }


@given(contracts(), st.integers(1, 600), st.integers(1, 600))
def test_another_clip_has_the_same_part_of_the_frame(contract: Any, height: Any, width: Any) -> None:
    found = contract.with_clip(size=(height, width))
    assert replace(found, height=1, width=1, resize_size=None) == replace(contract, height=1, width=1, resize_size=None)
    before, after = contract.resize_size, found.resize_size
    if contract.resize == "stretch" and before is not None:
        after = after or (height, width)
        assert after == (before[0] * height // contract.height, before[1] * width // contract.width)
    elif before is not None:
        after = after or height
        assert after == before * max(height, width) // max(contract.height, contract.width)
    else:
        assert after is None


def test_a_size_that_is_that_of_the_crop_says_nothing() -> None:
    assert replace(SMALL, resize_size=16) == SMALL
    assert replace(SMALL, resize="stretch", resize_size=[16, 16]).resize_size is None  # type: ignore[arg-type]
    assert replace(SMALL, width=20, resize_size=20).resize_size == 20  # the long side is the crop's only in None


@pytest.mark.parametrize(
    ("contract", "rate"),
    [
        (replace(SMALL, fps=10.0), 10.0),
        (SMALL, 30.0),
        (replace(SMALL, sampling="stride", stride=4), 7.5),
    ],
)
def test_the_rate_of_a_clip(contract: InputContract, rate: float) -> None:
    assert contract.rate(30.0) == rate


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
