"""Equalisations against their formulas, and the choice among them against quantising by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgetube.calibration import equalize
from edgetube.calibration.equalize import ChannelRanges, Equalization, Half, Halves
from edgetube.calibration.table import ActivationScheme, Range

Array = npt.NDArray[np.float32]
ALPHAS = (0.15, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85)


@pytest.fixture
def weight(rng: np.random.Generator) -> Array:
    return rng.standard_normal((12, 5)).astype(np.float32)


@pytest.fixture
def rows(rng: np.random.Generator) -> Array:
    """Channels of different sizes that do not lie around zero."""
    return (rng.standard_normal((400, 12)) * np.geomspace(0.1, 20, 12) + np.linspace(-3, 9, 12)).astype(np.float32)


def half(rows: Array) -> Half:
    return Half(ChannelRanges(rows.min(axis=0), rows.max(axis=0)), rows)


def halves(rows: Array) -> Halves:
    return half(rows[::2]), half(rows[1::2])


def quantised(x: npt.NDArray[Any], low: float, high: float, activations: ActivationScheme) -> npt.NDArray[np.float64]:
    """By the definition of QuantizeLinear and DequantizeLinear, in float64."""
    if activations == "int8":
        scale = max(-low, high) / 127
        return np.asarray(np.clip(np.rint(x / scale), -128, 127) * scale)
    scale = (high - low) / 255
    zero = round(-low / scale)
    return np.asarray((np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale)


def error_of(option: Equalization, known: Array, rows: Array, weight: Array, activations: ActivationScheme) -> float:
    """Relative output error of x' @ W' with both in 8 bits; the best of three ranges that `known` has."""

    def moved(x: Array) -> npt.NDArray[np.float64]:
        return (x.astype(np.float64) - option.shift) / option.scale

    matrix = weight * option.scale[:, None]
    steps = np.abs(matrix).max(axis=0) / 127
    matrix8 = np.rint(matrix / steps) * steps
    exact = rows.astype(np.float64) @ weight
    errors = []
    for share in (0.0, 1e-4, 1e-3):
        low, high = np.quantile(moved(known), [share / 2, 1 - share / 2])
        fake = quantised(moved(rows), min(low, 0.0), max(high, 0.0), activations)
        errors.append(np.square(fake @ matrix8 - moved(rows) @ matrix).sum() / np.square(exact).sum())
    return float(min(errors))


class TestFormulas:
    def test_a_linear_computes_the_same_behind_an_equalisation(self, rng: np.random.Generator, weight: Array) -> None:
        rows = rng.standard_normal((7, 12)).astype(np.float32)
        bias = rng.standard_normal(5).astype(np.float32)
        scale, shift = (rng.uniform(0.5, 2, 12).astype(np.float32) for _ in range(2))
        option = Equalization("x", scale, shift)
        found = option.apply(rows) @ option.weight(weight) + option.bias(weight, bias)
        np.testing.assert_allclose(found, rows @ weight + bias, atol=1e-5)

    def test_by_hand(self) -> None:
        option = Equalization("x", np.array([2, 4], np.float32), np.array([1, -3], np.float32))
        np.testing.assert_array_equal(option.apply(np.array([[5, 1], [1, -3]], np.float32)), [[2, 1], [0, 0]])
        np.testing.assert_array_equal(option.weight(np.array([[1, 2], [3, 4]], np.float32)), [[2, 4], [12, 16]])
        # b' = b + shift W: 10 + 1 * 1 - 3 * 3 and 20 + 1 * 2 - 3 * 4
        np.testing.assert_array_equal(
            option.bias(np.array([[1, 2], [3, 4]], np.float32), np.array([10, 20], np.float32)), [2, 10]
        )

    def test_the_bias_is_summed_in_float64(self) -> None:
        option = Equalization("x", np.ones(3, np.float32), np.array([1, 1, 1], np.float32))
        weight = np.array([[2.0**25], [1.0], [-(2.0**25)]], np.float32)
        assert option.bias(weight, np.array([0], np.float32)) == [1]

    def test_none_changes_nothing(self, weight: Array, rows: Array) -> None:
        plain = Equalization("none", np.array([7] * 12, np.float32), np.array([9] * 12, np.float32))
        assert plain.identity
        assert plain.apply(rows) is rows
        assert plain.weight(weight) is weight
        assert plain.bias(weight, weight[0]) is weight[0] or np.array_equal(plain.bias(weight, weight[0]), weight[0])
        assert not Equalization("shift", plain.scale, plain.shift).identity

    def test_channels_of_parts(self) -> None:
        one, other = (
            ChannelRanges(np.array([-3, 1], np.float32), np.array([2, 5], np.float32)),
            ChannelRanges(np.array([-1, 0], np.float32), np.array([4, 2], np.float32)),
        )
        both = ChannelRanges.of([one, other])
        np.testing.assert_array_equal(both.low, [-3, 0])
        np.testing.assert_array_equal(both.high, [4, 5])
        np.testing.assert_array_equal(both.largest, [4, 5])
        np.testing.assert_array_equal(ChannelRanges.of([one]).largest, [3, 5])


class TestCandidates:
    """SmoothQuant: s = max|x| ** a / max|w| ** (1 - a); behind a shift, x is measured from its middle."""

    @pytest.mark.parametrize("shifts", [True, False])
    def test_names_in_their_order(self, rows: Array, weight: Array, shifts: bool) -> None:
        names = [option.name for option in equalize.candidates(half(rows).channels, weight, shifts)]
        expected = ["none", *(f"smooth {a}" for a in ALPHAS), "smooth 1.0"]
        if shifts:
            expected += ["shift", *(f"shift + smooth {a}" for a in ALPHAS), "repq"]
        assert names == expected

    def test_scales_and_shifts(self, rows: Array, weight: Array) -> None:
        low, high = rows.min(axis=0).astype(np.float64), rows.max(axis=0).astype(np.float64)
        columns = np.abs(weight).max(axis=1).astype(np.float64)
        for option in equalize.candidates(half(rows).channels, weight):
            if option.name == "none":
                continue
            shifted = option.name in ("shift", "repq") or option.name.startswith("shift + ")
            np.testing.assert_allclose(option.shift, (low + high) / 2 if shifted else np.zeros(12), rtol=1e-5)
            largest = (high - low) / 2 if shifted else np.maximum(np.abs(low), np.abs(high))
            if option.name == "shift":
                expected = np.ones(12)
            elif option.name in ("repq", "smooth 1.0"):
                expected = largest
            else:
                alpha = float(option.name.split()[-1])
                expected = largest**alpha / columns ** (1 - alpha)
            expected = expected / np.prod(expected) ** (1 / 12)
            np.testing.assert_allclose(option.scale, expected, rtol=1e-4)

    def test_dead_channels_keep_scales_within_bounds(self, weight: Array) -> None:
        """A channel that is always zero, and one that no output reads."""
        rows = np.tile(np.array([0.0, 1.0, 1e6, *[1.0] * 9], np.float32), (3, 1))
        weight[1] = 0
        for option in equalize.candidates(half(rows).channels, weight):
            assert np.isfinite(option.scale).all()
            assert option.scale.min() >= np.float32(1e-3)
            assert option.scale.max() <= np.float32(1e3)
        scales = {o.name: o.scale for o in equalize.candidates(half(rows).channels, weight)}
        assert scales["smooth 1.0"][0] == np.float32(1e-3)
        assert scales["smooth 1.0"][2] == np.float32(1e3)
        assert scales["smooth 0.15"][1] == np.float32(1e3)


class TestChoice:
    @pytest.mark.parametrize("activations", ["int8", "uint8"])
    def test_errors_are_those_of_quantising_by_hand(
        self, rows: Array, weight: Array, activations: ActivationScheme
    ) -> None:
        """Each candidate is made from one half and judged on the other, both ways."""
        one, other = parts = halves(rows)
        found = equalize._cross_validated(parts, weight, activations, shifts=True)
        sides = [list(equalize.candidates(side.channels, weight)) for side in parts]
        for option, first, second in zip(found, *sides, strict=True):
            by_hand = (
                error_of(first, one.rows, other.rows, weight, activations)
                + error_of(second, other.rows, one.rows, weight, activations)
            ) / 2
            # A shift to the middle puts zero between two integers: either may be the zero point.
            assert option.error == pytest.approx(by_hand, rel=0.02 if activations == "int8" else 0.1)
        whole = list(equalize.candidates(half(rows).channels, weight))
        for option, expected in zip(found, whole, strict=True):
            np.testing.assert_array_equal(option.scale, expected.scale)
            np.testing.assert_array_equal(option.shift, expected.shift)

    def options(self, *errors: float) -> list[Equalization]:
        ones = np.ones(12, np.float32)
        names = ("none", "smooth 0.5", "shift")
        return [Equalization(n, ones * 3, ones, error) for n, error in zip(names, errors, strict=True)]

    @pytest.mark.parametrize(
        ("errors", "name"),
        [
            ((1.0, 0.96, 0.99), "smooth 0.5"),
            ((1.0, 0.98, 0.96), "shift"),
            ((1.0, 0.975, 0.98), "none"),
            ((1.0, 2.0, 3.0), "none"),
        ],
    )
    def test_it_has_to_be_worth_it(
        self, rows: Array, weight: Array, monkeypatch: pytest.MonkeyPatch, errors: tuple[float, ...], name: str
    ) -> None:
        """At least 3 % less error than without."""
        monkeypatch.setattr(equalize, "_cross_validated", lambda *_, **__: self.options(*errors))
        assert equalize.choose(halves(rows), weight, "uint8").name == name

    @pytest.mark.parametrize(("errors", "name"), [((1.0, 0.4), "smooth 0.5"), ((1.0, 0.6), "none")])
    def test_an_operator_has_to_halve_the_error(
        self, rows: Array, weight: Array, monkeypatch: pytest.MonkeyPatch, errors: tuple[float, float], name: str
    ) -> None:
        monkeypatch.setattr(equalize, "_cross_validated", lambda *_, **__: self.options(*errors, np.inf)[:2])
        found = equalize.choose_behind_gelu(halves(rows), weight, "uint8")
        assert found.name == name
        if name != "none":
            gain = np.float16(1 / 3)
            np.testing.assert_array_equal(found.scale, np.float32(1) / np.float32(gain))

    def test_a_range_of_rows(self, rng: np.random.Generator) -> None:
        none = Equalization("none", np.ones(12, np.float32), np.zeros(12, np.float32))
        x = rng.standard_normal((50, 12)).astype(np.float32) + 2
        whole, *clipped = equalize._clipped_ranges(none, half(x))
        assert (whole.low, whole.high) == (min(0.0, float(x.min())), float(x.max()))
        for found, share in zip(clipped, equalize.QUANTILES[1:], strict=True):
            low, high = np.quantile(x, [share / 2, 1 - share / 2])
            assert (found.low, found.high) == (min(0.0, low), high)
        for found, other in zip(equalize._clipped_ranges(none, half(-x)), [whole, *clipped], strict=True):
            assert (found.low, found.high) == pytest.approx((-other.high, max(0.0, -other.low)))
        assert [found.low for found in equalize._clipped_ranges(none, half(np.abs(x) + 1))] == [0.0] * 3
        many = rng.standard_normal((20_000, 12)).astype(np.float32)
        many[1, 1], many[1, 2] = 9.0, -9.0  # where a sample does not look
        whole, *clipped = equalize._clipped_ranges(none, half(many))
        assert (whole.low, whole.high) == (-9.0, 9.0)
        drawn = many.reshape(-1)[:: many.size // 100_003]
        assert clipped[-1].high == np.quantile(drawn, 1 - equalize.QUANTILES[-1] / 2)

    def test_a_range_of_equalised_rows(self, rng: np.random.Generator) -> None:
        """It is that of the rows when they are equalised, whose channels are told apart among the values drawn."""
        scale, shift = (rng.uniform(0.5, 2, 12).astype(np.float32) for _ in range(2))
        option, rows = Equalization("x", scale, shift), rng.standard_normal((20_000, 12)).astype(np.float32)
        moved = (rows - shift) / scale
        whole, *clipped = equalize._clipped_ranges(option, half(rows))
        assert (whole.low, whole.high) == (moved.min(), moved.max())
        drawn = moved.reshape(-1)[:: moved.size // 100_003]
        for found, share in zip(clipped, equalize.QUANTILES[1:], strict=True):
            assert (found.low, found.high) == tuple(np.quantile(drawn, [share / 2, 1 - share / 2]))

    def test_many_rows_are_screened(self, rng: np.random.Generator, weight: Array) -> None:
        """The best of few rows are compared on all, and no equalisation always is; the winner is that of all rows."""
        rows = (rng.standard_normal((2400, 12)) * np.geomspace(0.1, 20, 12) + np.linspace(-3, 9, 12)).astype(np.float32)
        parts = halves(rows)
        found = equalize._cross_validated(parts, weight, "uint8", shifts=True)
        assert len(found) == 1 + equalize.FINALISTS
        assert found[0].identity
        sides = [list(equalize.candidates(side.channels, weight)) for side in parts]
        by_hand = {
            first.name: (
                error_of(first, parts[0].rows, parts[1].rows, weight, "uint8")
                + error_of(second, parts[1].rows, parts[0].rows, weight, "uint8")
            )
            / 2
            for first, second in zip(*sides, strict=True)
        }
        for option in found:
            assert option.error == pytest.approx(by_hand[option.name], rel=0.1)
        assert min(option.error for option in found) == pytest.approx(min(by_hand.values()), rel=0.1)


class TestCentre:
    """For int8, which has no zero point: the best uint8 range gives scale and centre."""

    def test_by_hand(self, rng: np.random.Generator, weight: Array) -> None:
        """Values from -0.25 to 4 and a step of 1 / 60: zero is the integer 15, the middle 113 steps above it."""
        rows = rng.uniform(-0.25, 4, (500, 12)).astype(np.float32)
        rows[0, 0], rows[1, 0] = -0.25, 4.0
        plain = Equalization("none", np.ones(12, np.float32), np.zeros(12, np.float32))
        found = equalize._add_centre(plain, rows, weight, "float32")
        assert found.name == "centre"
        assert found.range is not None
        step = found.range.symmetric
        assert step == pytest.approx(4.25 / 255, rel=0.02)
        assert found.shift[0] == np.float16((128 - round(0.25 / step)) * step)
        np.testing.assert_array_equal(found.shift, found.shift[0])
        assert (found.range.low, found.range.high) == (-127 * step, pytest.approx(127 * step))
        fake = quantised(rows - found.shift, -127 * step, 127 * step, "int8")
        matrix8 = np.rint(weight / (s := np.abs(weight).max(axis=0) / 127)) * s
        exact = rows.astype(np.float64) @ weight
        by_hand = np.square((fake + found.shift) @ matrix8 - exact).sum() / np.square(exact).sum()
        assert found.error == pytest.approx(by_hand, rel=0.15)

    def test_behind_a_gain_the_shift_is_one_constant_after_it(self, rng: np.random.Generator, weight: Array) -> None:
        scale = rng.uniform(0.5, 2, 12).astype(np.float32)
        rows = (rng.uniform(0, 4, (500, 12)) * scale).astype(np.float32)
        scaled = Equalization("smooth 0.5", scale, np.zeros(12, np.float32))
        found = equalize._add_centre(scaled, rows, weight, "float32")
        assert found.name == "smooth 0.5 + centre"
        np.testing.assert_array_equal(found.scale, scale)
        np.testing.assert_allclose(found.shift / scale, found.shift[0] / scale[0], rtol=1e-6)
        np.testing.assert_allclose(found.apply(rows), rows / scale - found.shift / scale, atol=1e-5)

    def test_around_zero_there_is_none(self, rng: np.random.Generator, weight: Array) -> None:
        part = rng.standard_normal((300, 12)).astype(np.float32)
        plain = Equalization("none", np.ones(12, np.float32), np.zeros(12, np.float32))
        rows = np.concatenate([part, -part])
        assert equalize._add_centre(plain, rows, weight, "float32") is plain

    def test_its_scale_is_one_that_the_target_stores(self, rng: np.random.Generator, weight: Array) -> None:
        rows = rng.uniform(-0.2, 3, (500, 12)).astype(np.float32)
        plain = Equalization("none", np.ones(12, np.float32), np.zeros(12, np.float32))
        found = equalize._add_centre(plain, rows, weight, "float16").range
        assert isinstance(found, Range)
        assert found.symmetric == pytest.approx(float(np.float16(found.symmetric)), rel=1e-6)
