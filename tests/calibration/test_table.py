"""The table as a document: what is written is what is read, and another vendor's cache text is exact."""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetube.calibration.table import (
    FLOAT32_SCALES,
    INTEGERS,
    ActivationScheme,
    CalibrationTable,
    IntegerFormat,
    LinearPlan,
    Range,
    ScaleType,
    shortest_float32,
    stored_scales,
)
from edgetube.errors import InputError, SpecError

FLOATS = st.floats(0, 1e6, width=32)


@pytest.fixture
def table() -> CalibrationTable:
    ranges = {"blocks.0.norm1": Range(-1.5, 2.0, "mse"), "blocks.0.mlp.act": Range(-0.17, 3.25, "percentile 99.99")}
    linears = (
        LinearPlan(
            "blocks.0.attn.qkv", "blocks.0.norm1", "blocks.0.attn.qkv.weight", (0.1, 1 / 3), "int8", "none; mse"
        ),
        LinearPlan("head", "pool", "head.weight", (), "float", "0.1% of the work"),
    )
    scales = tuple(shortest_float32(s) for s in linears[0].weight_scales)
    linears = (LinearPlan(**{**linears[0].__dict__, "weight_scales": scales}), linears[1])
    return CalibrationTable("a" * 64, {"sha256": "b" * 64, "count": 3}, "uint8", ranges, linears, {"numpy": "2"})


def test_a_saved_table_is_the_same_table(table: CalibrationTable, tmp_path: Path) -> None:
    path = table.save(tmp_path / "calibration.json")
    assert CalibrationTable.load(path) == table
    assert list(tmp_path.iterdir()) == [path]


def test_a_range_may_have_integers_of_its_own(table: CalibrationTable, tmp_path: Path) -> None:
    """Older files state none, and the table's scheme is meant."""
    name, found = next(iter(table.ranges.items()))
    wide = replace(table, ranges={**table.ranges, name: replace(found, scheme="uint16")})
    text = wide.save(tmp_path / "calibration.json").read_text()
    assert text.count('"scheme": "uint16"}') == text.count('"scheme"') == 1
    assert CalibrationTable.load(tmp_path / "calibration.json") == wide
    assert all("scheme" not in stated for stated in table.to_json()["ranges"].values())


def test_the_text_by_hand(tmp_path: Path) -> None:
    """One line for each tensor and each list of scales; floats are the shortest ones of float32."""
    ranges = {"norm": Range(-1.5, float(np.float32(0.1)), "mse"), "pool": Range(0.0, 2.0, "entropy")}
    scales = (float(np.float32(0.1)), 0.25)
    plan = LinearPlan("fc", "norm", "fc.weight", scales, "int8", "none; mse")
    table = CalibrationTable("abc", {"sha256": "d", "count": 2}, "int8", ranges, (plan,), {"numpy": "2"})
    assert table.save(tmp_path / "t.json").read_text().splitlines() == [
        "{",
        ' "schema": 1,',
        ' "model": "abc",',
        ' "clips": {"sha256": "d", "count": 2},',
        ' "activations": "int8",',
        ' "versions": {"numpy": "2"},',
        ' "ranges": {',
        '  "norm": {"low": -1.5, "high": 0.1, "method": "mse"},',
        '  "pool": {"low": 0.0, "high": 2.0, "method": "entropy"}',
        " },",
        ' "linears": [',
        "  {",
        '   "name": "fc",',
        '   "activation": "norm",',
        '   "weight": "fc.weight",',
        '   "weight_scales": [0.1, 0.25],',
        '   "precision": "int8",',
        '   "reason": "none; mse"',
        "  }",
        " ]",
        "}",
    ]


class TestFromJson:
    """Each thing that is wrong is named, one at a time."""

    def with_plan(self, table: CalibrationTable, **changed: Any) -> dict[str, Any]:
        data = table.to_json()
        return data | {"linears": [data["linears"][0] | changed, data["linears"][1]]}

    @pytest.mark.parametrize("schema", [2, 7, 2**31])
    def test_another_schema(self, table: CalibrationTable, schema: int) -> None:
        with pytest.raises(InputError, match=f"^calibration table schema {schema}; this edgetube reads 1$"):
            CalibrationTable.from_json({"schema": schema, "what": "is of the future"})

    @pytest.mark.parametrize("schema", [0, -1, 2**31 + 1, "1", True, None])
    def test_no_schema(self, table: CalibrationTable, schema: Any) -> None:
        with pytest.raises(InputError, match=r"^not a calibration table \(schema is .*\); calibrate again$"):
            CalibrationTable.from_json(table.to_json() | {"schema": schema})

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"model": 3}, "model is 3"),
            ({"clips": []}, "clips is "),
            ({"activations": "int4"}, "activations is 'int4'; expected one of int8, uint8"),
            ({"versions": {"numpy": 2}}, r"versions\.numpy is 2"),
            ({"ranges": {"x": {"low": 0, "high": 1}}}, r"ranges\.x lacks the field method"),
            ({"ranges": {"x": {"low": 0, "high": 4e38, "method": "m"}}}, r"ranges\.x\.high is 4e\+38"),
            ({"ranges": {"x": {"low": -4e38, "high": 0, "method": "m"}}}, r"ranges\.x\.low is -4e\+38"),
            ({"ranges": {"x": {"low": 0, "high": 1, "method": 5}}}, r"ranges\.x\.method is 5"),
            ({"ranges": {"x": {"low": 0, "high": 1, "method": "m", "more": 1}}}, r"ranges\.x has no field more"),
            (
                {"ranges": {"x": {"low": 0, "high": 1, "method": "m", "scheme": "int4"}}},
                r"ranges\.x\.scheme is 'int4'; expected one of int8, uint8, uint16",
            ),
            ({"linears": {}}, "linears is "),
            ({"more": 1}, "it has no field more"),
        ],
    )
    def test_a_field(self, table: CalibrationTable, changed: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=rf"^not a calibration table \({message}"):
            CalibrationTable.from_json(table.to_json() | changed)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"name": 1}, r"\.name is 1"),
            ({"weight": None}, r"\.weight is None"),
            ({"weight_scales": 0.5}, r"\.weight_scales is 0.5; expected a list"),
            ({"weight_scales": [0.5, -0.5]}, r"\.weight_scales is -0.5; expected a finite number, 0 to 3"),
            ({"weight_scales": [4e38]}, r"\.weight_scales is 4e\+38"),
            ({"precision": "int4"}, r"\.precision is 'int4'; expected one of int8, float"),
            ({"reason": 1}, r"\.reason is 1"),
            ({"more": 1}, " has no field more"),
        ],
    )
    def test_a_linear(self, table: CalibrationTable, changed: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=rf"^not a calibration table \(linears\[0\]{message}"):
            CalibrationTable.from_json(self.with_plan(table, **changed))

    def test_what_float32_holds_is_read(self, table: CalibrationTable) -> None:
        largest = float(np.finfo(np.float32).max)
        data = self.with_plan(table, weight_scales=[0.0, largest])
        found = CalibrationTable.from_json(data | {"ranges": {"x": {"low": -largest, "high": largest, "method": "m"}}})
        assert found.linears[0].weight_scales == (0.0, largest)
        assert found.ranges == {"x": Range(-largest, largest, "m")}

    def test_a_reason_may_be_missing(self, table: CalibrationTable) -> None:
        data = table.to_json()
        del data["linears"][0]["reason"]
        assert CalibrationTable.from_json(data).linears[0].reason == ""


def test_the_ends_of_the_integers() -> None:
    schemes = get_args(ActivationScheme)
    assert {scheme: (np.iinfo(scheme).min, np.iinfo(scheme).max) for scheme in schemes} == INTEGERS


def test_a_target_that_says_nothing_changes_nothing() -> None:
    assert IntegerFormat() == IntegerFormat(dtype="float32", pixels=1.0, safe_pairs=False) == FLOAT32_SCALES


def test_only_int8_is_quantised(table: CalibrationTable) -> None:
    assert table.quantised == table.linears[:1]


def test_it_is_diffable_one_line_a_tensor(table: CalibrationTable, tmp_path: Path) -> None:
    lines = table.save(tmp_path / "t.json").read_text().splitlines()
    (line,) = (line for line in lines if "blocks.0.mlp.act" in line)
    assert "3.25" in line
    assert "percentile 99.99" in line


@given(low=FLOATS, high=FLOATS)
def test_scales_are_those_of_the_textbook(low: Any, high: Any) -> None:
    found = Range(-low, high, "x")
    assert found.symmetric == pytest.approx(max(low, high) / 127, rel=1e-6) or max(low, high) < 1e-30
    scale, zero = found.asymmetric
    assert 0 <= zero <= 255
    if low + high > 1e-30:
        assert scale == pytest.approx((low + high) / 255, rel=1e-6)
        for value in (-low, 0.0, high):  # ends and zero come back within half a step
            q = np.clip(np.rint(value / scale) + zero, 0, 255)
            assert abs((q - zero) * scale - value) <= 0.51 * scale
    assert (0 - 0) * scale == 0


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero"),
    [
        (0.0, 2.55, 0.01, 0),
        (-2.55, 0.0, 0.01, 255),
        (-1.0, 1.55, 0.01, 100),
        (-1.004, 1.546, 0.01, 100),
        (0.0, 0.0, 1.0, 0),
    ],
)
def test_zero_points_by_hand(low: float, high: float, scale: float, zero: int) -> None:
    found = Range(low, high, "x")
    assert found.asymmetric[0] == pytest.approx(scale, rel=1e-6)
    assert found.asymmetric[1] == zero
    assert found.parameters("uint8") == found.asymmetric
    assert found.parameters("int8") == (found.symmetric, 0)


@pytest.mark.parametrize(
    ("low", "high"), [(0.5, 1), (-1, -0.5), (float("nan"), 1), (-1, float("inf")), (-float("inf"), 1)]
)
def test_impossible_ranges_are_refused(low: float, high: float) -> None:
    with pytest.raises(InputError, match="expected finite numbers around zero"):
        Range(low, high, "x")


def test_the_cache_text_by_hand() -> None:
    """Scales that are powers of two have a float32 that can be written down: sign, exponent + 127, no fraction."""
    ranges = {"input": Range(-127.0, 1.0, "x"), "blocks.0": Range(-3.0, 127 * 2.0**-7, "x")}
    table = CalibrationTable("m", {}, "int8", ranges | {"third": Range(-0.25, 127 * 3 * 2.0**-6, "x")}, ())
    assert table.to_cache("8503") == (
        "TRT-8503-EntropyCalibration2\n"
        "input: 3f800000\n"  # 1 = 0 01111111 000...
        "blocks.0: 3cc18306\n"  # 3 / 127, rounded to the nearest float32
        "third: 3d400000\n"  # 3 / 64 = 1.5 * 2 ** -5 = 0 01111010 100...
    )


def test_a_cache_of_the_documentation_is_read() -> None:
    found = CalibrationTable.from_cache("TRT-8503-EntropyCalibration2\ndata: 3c010a14\nblocks.0: a: 3f800000\n")
    assert found["data"].symmetric == struct.unpack(">f", bytes.fromhex("3c010a14"))[0]
    assert found["blocks.0: a"] == Range(-127.0, 127.0, "cache")


def test_the_cache_keeps_every_scale(table: CalibrationTable) -> None:
    back = CalibrationTable.from_cache(table.to_cache())
    assert {name: r.symmetric for name, r in back.items()} == {n: r.symmetric for n, r in table.ranges.items()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins with ''"),
        ("hello\nx: 3c010a14", "begins with 'hello'"),
        ("hello" * 10, f"begins with '{('hello' * 10)[:40]}'; expected TRT"),
        ("TRT-1-EntropyCalibration2\nx: 3c01", "line 2 of the calibration cache is 'x: 3c01'; expected"),
        ("TRT-1-EntropyCalibration2\nx: 3c010a14\n: 3c010a14", "line 3 of the calibration cache is ': 3c010a14'"),
        ("TRT-1-EntropyCalibration2\n" + "x" * 70, f"line 2 of the calibration cache is '{'x' * 60}'"),
        ("TRT-1-EntropyCalibration2\nx: 7f800000", r"line 2 of the calibration cache: a range is \[-inf, inf\]"),
        ("TRT-1-EntropyCalibration2\nx: bf800000", r"line 2 of the calibration cache: a range is \[127\.0, -127\.0\]"),
    ],
)
def test_other_texts_are_no_cache(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CalibrationTable.from_cache(text)


def test_a_table_of_another_model_is_refused(table: CalibrationTable) -> None:
    table.check("a" * 64)
    with pytest.raises(InputError, match="for the graph aaaaaaaaaaaa, this graph is cccccccccccc"):
        table.check("c" * 64)


def test_no_table_is_an_error_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(InputError, match="not a calibration table"):
        CalibrationTable.load(tmp_path / "x.json")
    with pytest.raises(InputError, match=r"none\.json"):
        CalibrationTable.load(tmp_path / "none.json")


DTYPES = ("float16", "float32")
LARGEST = {"float16": 65504.0, "float32": float(np.finfo(np.float32).max)}
SMALLEST = {"float16": 2.0**-14, "float32": 2.0**-126}
EPSILON = {"float16": 2.0**-11, "float32": 2.0**-24}


class TestStoredScales:
    """The one rule for scales: what the runtime will hold, before anything is rounded by it."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @given(exponent=st.floats(-150, 15.99))
    def test_a_scale_is_a_normal_number_of_the_type(self, dtype: ScaleType, exponent: float) -> None:
        scale = 2.0**exponent
        (found,) = stored_scales(np.array([scale]), dtype)
        assert found == np.dtype(dtype).type(found)  # it exists in the type
        assert SMALLEST[dtype] <= found <= LARGEST[dtype]
        if scale >= SMALLEST[dtype]:
            assert found == pytest.approx(scale, rel=1.001 * EPSILON[dtype])
        else:
            assert found == SMALLEST[dtype]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_ends(self, dtype: ScaleType) -> None:
        given_scales = np.array([0.0, SMALLEST[dtype], SMALLEST[dtype] * 0.6, 1e-44, LARGEST[dtype]])
        expected = [1.0, SMALLEST[dtype], SMALLEST[dtype], SMALLEST[dtype], LARGEST[dtype]]
        np.testing.assert_array_equal(stored_scales(given_scales, dtype), np.array(expected, np.float32))

    @pytest.mark.parametrize("scale", [65520.0, 1e9, np.inf, np.nan])
    def test_what_is_too_large_is_named(self, scale: float) -> None:
        with pytest.raises(
            SpecError, match=rf"^fc1 needs a scale of {re.escape(f'{scale:.3g}')}; float16 ends at 65504:"
        ):
            stored_scales(np.array([1.0, scale]), "float16", "fc1")

    @given(
        low=st.floats(0, 1e4, width=32),
        high=st.floats(0, 1e4, width=32),
        activations=st.sampled_from(["int8", "uint8"]),
        unit=st.sampled_from([1.0, 256.0]),
    )
    def test_a_range_has_a_scale_that_exists(
        self, low: float, high: float, activations: ActivationScheme, unit: float
    ) -> None:
        found = Range(-low, high, "mse")
        stored = found.stored(activations, "float16", unit)

        def scale(of: Range) -> float:
            return (of.symmetric if activations == "int8" else of.asymmetric[0]) / unit

        assert scale(stored) == pytest.approx(float(np.float16(scale(stored))), rel=1e-6)
        assert scale(stored) >= SMALLEST["float16"] * (1 - 1e-6)
        if scale(found) >= SMALLEST["float16"]:
            assert scale(stored) == pytest.approx(scale(found), rel=1e-3)
            assert stored.low == pytest.approx(-low, rel=1e-3)
            assert stored.high == pytest.approx(high, rel=1e-3)
        assert stored.method == "mse"

    @given(low=st.floats(0, 1e6, width=32), high=st.floats(0, 1e6, width=32))
    def test_in_float32_nothing_changes(self, low: float, high: float) -> None:
        found = Range(-low, high, "x")
        if max(low, high) > 1e-30:
            assert found.stored("int8", "float32") == found.stored("uint8", "float32") == found

    @pytest.mark.parametrize("activations", ["int8", "uint8"])
    def test_a_range_smaller_than_any_float32_scale(self, activations: ActivationScheme) -> None:
        stored = Range(0.0, 1e-38, "x").stored(activations, "float16")
        scale = stored.symmetric if activations == "int8" else stored.asymmetric[0]
        assert scale == pytest.approx(SMALLEST["float16"])

    def test_a_range_of_pixels_by_hand(self) -> None:
        stored = Range(0.0, 255.0, "min-max").stored("int8", "float16", 256.0)
        assert stored.symmetric == 256 * float(np.float16(255 / 127 / 256))
        assert np.rint(255 / stored.symmetric) == 127
