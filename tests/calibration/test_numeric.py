"""Fake quantisation against the ONNX reference implementation, scales against brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgetube import datasets
from edgetube.calibration import equalize, numeric
from edgetube.calibration.table import ActivationScheme, Range
from edgetube.contract import InputContract


@pytest.mark.parametrize("activations", ["int8", "uint8"])
def test_activations_are_what_onnx_says(activations: ActivationScheme, rng: np.random.Generator) -> None:
    x = (rng.standard_normal((50, 8)) * 3).astype(np.float32)
    found = Range(-2.5, 4.0, "x")
    scale, zero = (found.symmetric, 0) if activations == "int8" else found.asymmetric
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])]
    nodes += [helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, x.shape)],
        [
            numpy_helper.from_array(np.float32(scale), "s"),
            numpy_helper.from_array(np.array(zero, np.dtype(activations)), "z"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_allclose(
        numeric.fake_quantize_activations(x, found, activations), np.asarray(expected, np.float32), atol=1e-6
    )


def test_full_scales_clip_nothing(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((30, 5)).astype(np.float32)
    q = numeric.quantize_weights(weight, numeric.absmax_scales(weight))
    assert q.dtype == np.int8
    np.testing.assert_array_equal(np.abs(q).max(axis=0), 127)
    assert (
        np.abs(numeric.fake_quantize_weights(weight, numeric.absmax_scales(weight)) - weight).max()
        <= np.abs(weight).max() / 253
    )


def test_a_column_of_zeros_stays_zero() -> None:
    weight = np.zeros((4, 2), np.float32)
    scales = numeric.mse_scales(weight, np.ones(4, np.float32))
    np.testing.assert_array_equal(numeric.quantize_weights(weight, scales), 0)


def test_clipping_is_chosen_by_the_error_at_the_output(rng: np.random.Generator) -> None:
    weight = (rng.standard_t(2, (400, 6)) * 0.1).astype(np.float32)
    power = rng.uniform(0.1, 4, 400).astype(np.float32)

    def cost(scales: npt.NDArray[np.float32]) -> Any:
        return (power[:, None] * np.square(numeric.fake_quantize_weights(weight, scales) - weight)).sum(axis=0)

    best = numeric.mse_scales(weight, power)
    full = numeric.absmax_scales(weight)
    tried = np.stack([cost((full * np.float32(s)).astype(np.float32)) for s in numeric.CLIP_RATIOS])
    np.testing.assert_allclose(cost(best), tried.min(axis=0), rtol=1e-5)
    assert (cost(best) <= cost(full)).all()


def second_moments(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    return np.asarray(np.einsum("ri,rj->ij", rows, rows, dtype=np.float64))


def test_the_gram_matrix_is_of_all_rows_whatever_the_pieces(rng: np.random.Generator) -> None:
    """In float64: what is shown first is not lost in what comes later."""
    rows = (rng.standard_normal((5000, 6)) * [1, 1e-3, 30, 1, 1, 0] + [0, 0, 0, 5, -5, 0]).astype(np.float32)
    gram = numeric.GramAccumulator(6)
    for piece in np.array_split(rows, 700):
        gram.add(piece)
    exact = second_moments(rows)
    assert gram.rows == 5000
    np.testing.assert_allclose(gram.total, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max() ** 0.5)
    np.testing.assert_allclose(gram.power, np.square(rows, dtype=np.float64).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(gram.moments.mean, rows.mean(axis=0, dtype=np.float64), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gram.moments.second, exact / 5000, rtol=1e-5, atol=1e-5)
    assert gram.total.dtype == np.float64


class TestRounding:
    """GPTQ against what it is: each row rounded, its error solved for by the rows that are left."""

    @pytest.fixture
    def rows(self, rng: np.random.Generator) -> npt.NDArray[np.float32]:
        """Channels that know of one another, as in a real encoder."""
        mixed = rng.standard_normal((600, 20)) @ rng.standard_normal((20, 40)) * np.geomspace(5, 0.1, 40)
        return (mixed + 0.05 * rng.standard_normal((600, 40))).astype(np.float32)

    @pytest.fixture
    def weight(self, rng: np.random.Generator) -> npt.NDArray[np.float32]:
        return rng.standard_normal((40, 6)).astype(np.float32)

    def test_against_least_squares_row_by_row(
        self, rows: npt.NDArray[np.float32], weight: npt.NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The rows that are left move to where the damped output error is least, whatever the size of a block."""
        scales = numeric.absmax_scales(weight) * np.float32(8)
        moments = rows.T.astype(np.float64) @ rows
        moments += np.eye(40) * numeric.DAMPING * moments.diagonal().mean()
        order = np.argsort(-moments.diagonal(), kind="stable")
        moments = moments[np.ix_(order, order)]
        left, expected = weight[order].astype(np.float64), np.empty((40, 6))
        for i in range(40):
            expected[i] = np.clip(np.rint(left[i] / scales), -127, 127)
            error = left[i] - expected[i] * scales
            rest = np.linalg.solve(moments[i + 1 :, i + 1 :], moments[i + 1 :, i])
            left[i + 1 :] += np.outer(rest, error)
        for block in (1, 7, 128):
            monkeypatch.setattr(numeric, "BLOCK_SIZE", block)
            np.testing.assert_array_equal(numeric.gptq_quantize(weight, scales, second_moments(rows))[order], expected)

    def test_errors_cancel_at_the_output(self, rows: npt.NDArray[np.float32], weight: npt.NDArray[np.float32]) -> None:
        scales = numeric.mse_scales(weight, np.square(rows).mean(axis=0))
        nearest = numeric.fake_quantize_weights(weight, scales)
        ours = (numeric.gptq_quantize(weight, scales, second_moments(rows)) * scales).astype(np.float32)
        other = rows[::-1][:300] @ weight  # of rows alike
        errors = [numeric.output_error(other, rows[::-1][:300], w) for w in (ours, nearest)]
        assert errors[0] < 0.3 * errors[1]

    def test_channels_that_are_never_used(self, rows: npt.NDArray[np.float32], weight: npt.NDArray[np.float32]) -> None:
        np.testing.assert_array_equal(
            numeric.gptq_quantize(weight, numeric.absmax_scales(weight), np.zeros((len(weight), len(weight)))),
            numeric.quantize_weights(weight, numeric.absmax_scales(weight)),
        )
        rows[:, 7] = 0
        moments = second_moments(rows)
        assert np.abs(numeric.gptq_quantize(weight, numeric.absmax_scales(weight), moments)).max() <= 127

    def test_rounding_to_the_nearest_gives_the_integers_back(
        self, rows: npt.NDArray[np.float32], weight: npt.NDArray[np.float32]
    ) -> None:
        scales = numeric.absmax_scales(weight)
        integers = numeric.gptq_quantize(weight, scales, second_moments(rows))
        values = np.asarray(integers * scales, np.float32)
        np.testing.assert_array_equal(numeric.quantize_weights(values, scales), integers)


def test_pixels_are_like_those_of_real_clips(rng: np.random.Generator) -> None:
    """Rounded for no clip in particular, the errors of a kernel cancel on the built-in ones."""
    (clip,) = datasets.built_in(1, ()).clips(InputContract(8, 64, 64, fps=10.0))
    pieces = clip.frames.reshape(2, 4, 8, 8, 8, 8, 3).transpose(0, 2, 4, 1, 6, 3, 5)  # (..., T, C, H, W)
    rows = pieces.reshape(-1, 4 * 3 * 8 * 8).astype(np.float32)
    weight = rng.standard_normal((rows.shape[1], 5)).astype(np.float32)
    scales = numeric.absmax_scales(weight)
    exact, nearest = rows @ weight, numeric.fake_quantize_weights(weight, scales)
    ours = np.float32(numeric.gptq_quantize(weight, scales, numeric.pixel_moments(4, 8, 8)) * scales)
    errors = [numeric.output_error(exact, rows, w) for w in (ours, nearest)]
    assert errors[0] < errors[1] / 10


def test_moments_of_pixels_by_hand() -> None:
    near, mixed = numeric.PIXEL_CORRELATION, numeric.COLOUR_CORRELATION
    found = numeric.pixel_moments(2, 1, 2, colours=2)  # (T, C, H, W): 8 pixels
    assert found.shape == (8, 8)
    np.testing.assert_allclose(found.diagonal(), 2)
    assert found[0, 1] == pytest.approx(1 + near)  # the next column
    assert found[0, 2] == pytest.approx(1 + mixed)  # the other colour
    assert found[0, 4] == pytest.approx(1 + near)  # the next frame
    assert found[0, 7] == pytest.approx(1 + near * mixed * near)
    np.testing.assert_array_equal(found, found.T)


def gelu(x: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    return (x / (1 + np.exp(-1.702 * x))).astype(np.float32)


def halves(*parts: npt.NDArray[np.float32]) -> tuple[equalize.Half, equalize.Half]:
    first, second = (equalize.Half(equalize.ChannelRanges(rows.min(axis=0), rows.max(axis=0)), rows) for rows in parts)
    return first, second


def equalised(rows: npt.NDArray[np.float32], weight: npt.NDArray[np.float32], activations: Any) -> Any:
    return equalize.choose_behind_gelu(halves(rows[::2], rows[1::2]), weight, activations)


def test_an_equalisation_has_to_hold_for_clips_that_it_was_not_made_from(rng: np.random.Generator) -> None:
    """Every token of a clip alike: a shift to the middle of what was seen leaves a range that the next clip breaks."""
    weight = rng.standard_normal((12, 5)).astype(np.float32)
    scenes = 3 + rng.standard_normal((6, 12))
    tokens = [np.float32(s + 1e-3 * rng.standard_normal((50, 12))) for s in scenes]
    one, other = np.concatenate(tokens[:3]), np.concatenate(tokens[3:])
    seen = np.concatenate([one, other])
    assert equalize.choose(halves(seen, seen), weight, "uint8").shift.any()
    assert not equalize.choose(halves(one, other), weight, "uint8").shift.any()


class TestBehindGelu:
    @pytest.fixture
    def weight(self, rng: np.random.Generator) -> npt.NDArray[np.float32]:
        return rng.standard_normal((12, 5)).astype(np.float32)

    def test_a_centre_is_the_zero_point_that_int8_lacks(
        self, rng: np.random.Generator, weight: npt.NDArray[np.float32]
    ) -> None:
        rows = gelu(rng.standard_normal((500, 12)) * 3)
        found = equalised(rows, weight, "int8")
        assert found.name == "centre"
        assert found.range is not None
        shift, scale = found.shift[0], found.range.symmetric
        assert shift == np.float16(shift)
        assert shift / scale == pytest.approx(round(shift / scale), abs=0.1)  # zero stays an integer
        shifted = numeric.fake_quantize_activations(rows - shift, found.range, "int8") + shift
        plain = numeric.fake_quantize_activations(rows, Range(float(rows.min()), float(rows.max()), "min-max"), "int8")
        assert np.square(shifted - rows).mean() < 0.4 * np.square(plain - rows).mean()
        assert equalised(rows, weight, "uint8").identity

    @pytest.mark.parametrize("activations", ["int8", "uint8"])
    def test_a_channel_that_is_far_larger_is_scaled(
        self, rng: np.random.Generator, weight: npt.NDArray[np.float32], activations: ActivationScheme
    ) -> None:
        rows = gelu(rng.standard_normal((500, 12)))
        rows[:, 3] *= 60
        weight[3] /= 60
        found = equalised(rows, weight, activations)
        assert found.name.startswith("smooth")
        assert found.name.endswith("centre") == (activations == "int8")
        assert found.scale[3] > 5 * np.delete(found.scale, 3).max()
        np.testing.assert_allclose(1 / found.scale, np.float16(1 / found.scale), rtol=1e-6)
        np.testing.assert_allclose(
            found.apply(rows) @ found.weight(weight) + found.shift @ weight, rows @ weight, rtol=1e-4, atol=1e-4
        )

    def test_what_lies_around_zero_stays_as_it_is(
        self, rng: np.random.Generator, weight: npt.NDArray[np.float32]
    ) -> None:
        half = rng.standard_normal((500, 12)).astype(np.float32)
        assert equalised(np.concatenate([half, -half]), weight, "int8").identity


class TestSafePairs:
    """Weights whose products with any two uint8 fit in 16 bits, pair by pair, against every pair of extremes."""

    @staticmethod
    def worst_sums(integers: npt.NDArray[np.int8]) -> npt.NDArray[np.int64]:
        """The least and the largest sum of each pair's products with 0 and 255."""
        wide = np.concatenate([integers, np.zeros((len(integers) % 2, *integers.shape[1:]), np.int8)]).astype(np.int64)
        corners = [a * wide[::2] + b * wide[1::2] for a in (0, 255) for b in (0, 255)]
        return np.stack([np.min(corners, axis=0), np.max(corners, axis=0)])

    @given(
        data=st.data(), channels=st.integers(1, 9), outputs=st.integers(1, 3), kind=st.sampled_from(["normal", "alike"])
    )
    def test_no_pair_saturates_whatever_the_weights(
        self, data: st.DataObject, channels: int, outputs: int, kind: str
    ) -> None:
        numbers = st.floats(-1e3, 1e3, width=32)
        weight = data.draw(arrays(np.float32, (channels, outputs), elements=numbers))
        rows = np.random.default_rng(0).standard_normal((50, channels)).astype(np.float32)
        if kind == "alike":  # channels that take up one another's errors
            rows = np.float32(rows[:, :1] + 0.01 * rows)
        scales = numeric.mse_scales(weight, np.square(rows).mean(axis=0), safe_pairs=True)
        scales = np.float32(scales * data.draw(st.sampled_from([0.05, 0.5, 1.0])))  # more clipped than any search would
        gram = second_moments(rows)
        for moments in (gram, np.zeros_like(gram)):
            integers = numeric.gptq_quantize(weight, scales, moments, safe_pairs=True)
            low, high = self.worst_sums(integers)
            assert low.min() >= -(2**15)
            assert high.max() <= 2**15 - 1
            assert np.abs(integers.astype(int)).max() <= 127
            assert numeric.overflowing_pairs(integers) == 0

    @given(arrays(np.int8, st.tuples(st.integers(1, 6), st.integers(1, 3)), elements=st.integers(-127, 127)))
    def test_pairs_that_overflow_are_counted(self, integers: npt.NDArray[np.int8]) -> None:
        low, high = self.worst_sums(integers)
        expected = ((low < -(2**15)) | (high > 2**15 - 1)).sum()
        assert numeric.overflowing_pairs(integers) == expected

    @pytest.mark.parametrize(
        ("steps", "nearest"),
        [
            ((100, 20), (100, 20)),  # fits
            ((100, -100), (100, -100)),  # products of two signs never overflow
            ((100, 60), (84, 44)),  # 32 too much, taken from both alike
            ((-100, -60), (-84, -44)),
            ((127, 127), (64, 64)),
            ((200, 20), (127, 1)),  # one of them is at the end of int8 anyway
        ],
    )
    def test_what_is_too_much_is_taken_from_both(self, steps: tuple[int, int], nearest: tuple[int, int]) -> None:
        weight = np.array(steps, np.float32)[:, None]
        one = np.ones(1, np.float32)
        assert numeric.gptq_quantize(weight, one, np.zeros((2, 2)), safe_pairs=True)[:, 0].tolist() == list(nearest)
        assert numeric.fake_quantize_weights(weight, one, safe_pairs=True)[:, 0].tolist() == list(nearest)

    def test_full_scales_clip_nothing(self, rng: np.random.Generator) -> None:
        weight = rng.standard_normal((31, 5)).astype(np.float32)
        scales = numeric.absmax_scales(weight, safe_pairs=True)
        assert (scales >= numeric.absmax_scales(weight)).all()
        error = np.abs(numeric.fake_quantize_weights(weight, scales, safe_pairs=True) - weight)
        assert (error <= 1.001 * scales).all()  # half a step of rounding, and half where a pair is full
        steps = weight / scales
        pairs = np.abs(steps[:-1:2] + steps[1::2])[np.sign(steps[:-1:2]) == np.sign(steps[1::2])]
        assert max(pairs.max(initial=0) / 128, np.abs(steps).max() / 127) == pytest.approx(1, rel=0.2)

    def test_it_costs_less_than_a_bit(self, rng: np.random.Generator) -> None:
        """Where seven bits would give four times the error."""
        mixed = rng.standard_normal((2000, 64)) @ rng.standard_normal((64, 96)) * np.geomspace(3, 0.3, 96)
        rows, weight = mixed.astype(np.float32), rng.standard_normal((96, 32)).astype(np.float32)
        gram, power = second_moments(rows), np.square(rows).mean(axis=0)

        def error(safe: bool) -> float:
            scales = numeric.mse_scales(weight, power, safe)
            rounded = np.float32(numeric.gptq_quantize(weight, scales, gram, safe) * scales)
            return numeric.output_error(rows @ weight, rows, rounded)

        assert error(True) < 2 * error(False)
