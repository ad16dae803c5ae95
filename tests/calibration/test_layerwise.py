"""The calibrator on a model of one block: what it folds, chooses and corrects, against the graph run as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper

from edgetube import export
from edgetube.arrays import RowArray
from edgetube.calibration import graphs, layerwise, numeric
from edgetube.calibration.clips import Clips
from edgetube.calibration.equalize import Equalization
from edgetube.calibration.graphs import Linear, Stage
from edgetube.calibration.layerwise import ActivationStats, CalibrationState, LayerwiseCalibrator, StaleStateError
from edgetube.calibration.table import ActivationScheme, IntegerFormat, Range
from edgetube.errors import SpecError
from edgetube.roles import FoldSite, GraphRoles
from tests.calibration.models import noise, outputs, traced
from tests.export.models import trace

SEEN, OTHERS = noise(12, 1, "a", 200), noise(3, 2, "b")
QKV, PROJ, FC1, FC2 = (f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))
BLOCK, HEAD, TUBE = (QKV, PROJ, FC1, FC2), "classifiers.x", "tubes.0"

Make = Callable[..., LayerwiseCalibrator]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes a calibrator of the model of one block, prepared for the scheme, on 12 clips."""

    def calibrator(
        activations: ActivationScheme = "int8",
        model: onnx.ModelProto | None = None,
        roles: GraphRoles | None = None,
        **options: Any,
    ) -> LayerwiseCalibrator:
        roles = roles or traced().roles
        prepared = graphs.insert_equalization_sites(traced().model if model is None else model, roles, activations)
        clips = options.pop("clips", SEEN)
        return LayerwiseCalibrator(prepared, roles, clips, export.evaluator(), activations, tmp_path, **options)

    return calibrator


def calibrated(calibrator: LayerwiseCalibrator) -> CalibrationState:
    state = CalibrationState()
    calibrator.calibrate(state)
    return state


def named(calibrator: LayerwiseCalibrator) -> dict[str, Linear]:
    return {linear.name: linear for linear in calibrator.linears}


def seen(model: onnx.ModelProto, tensor: str, frames: Any = SEEN.frames) -> npt.NDArray[np.float64]:
    """All rows of a tensor on clips: (clips, tokens, K)."""
    found = outputs(graphs.extract_subgraph(model, [tensor]), frames).astype(np.float64)
    return found.reshape(len(frames), -1, found.shape[-1])


def quantised(x: npt.NDArray[Any], low: float, high: float, activations: ActivationScheme) -> npt.NDArray[np.float64]:
    """By the definition of QuantizeLinear and DequantizeLinear, in float64."""
    if activations == "int8":
        scale = max(-low, high) / 127
        return np.asarray(np.clip(np.rint(x / scale), -128, 127) * scale)
    scale = (high - low) / 255
    zero = round(-low / scale)
    return np.asarray((np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale)


def relative(found: npt.NDArray[Any], exact: npt.NDArray[Any]) -> float:
    return float(np.square(found - exact).sum() / np.square(exact).sum())


@pytest.mark.parametrize(("count", "step"), [(1, 1), (32, 1), (63, 1), (64, 2), (70, 2), (100, 3)])
def test_biases_are_corrected_on_at_most_32_clips_spread_evenly(make: Make, count: int, step: int) -> None:
    assert list(make(clips=noise(count, 1, "a")).correction) == [i * step for i in range(min(count, 32))]


class TestFolding:
    """Every producer is given an equalisation at random; the graph computes the same, and the linears read it."""

    @pytest.fixture
    def given(self, monkeypatch: pytest.MonkeyPatch) -> list[Equalization]:
        """The equalisations that are chosen, in order: with a shift of its own for each channel, or of all behind a
        GELU."""
        found: list[Equalization] = []

        def choose(halves: Any, weight: npt.NDArray[Any], *_: Any, one: bool = False) -> Equalization:
            random = np.random.default_rng(len(found))
            scale = np.float32(2) ** random.integers(-3, 4, len(weight)).astype(np.float32)
            shift = (np.full(len(weight), 0.75) * scale if one else random.normal(size=len(weight))).astype(np.float32)
            found.append(Equalization("given", scale, shift))
            return found[-1]

        monkeypatch.setattr("edgetube.processes.cores", lambda: 1)  # else several are chosen at once
        monkeypatch.setattr("edgetube.calibration.equalize.choose", choose)
        monkeypatch.setattr("edgetube.calibration.equalize.choose_behind_gelu", lambda *given: choose(*given, one=True))
        return found

    def test_into_every_producer(self, make: Make, given: list[Equalization]) -> None:
        calibrator = make()
        state = calibrated(calibrator)
        assert {name for name, choice in state.choices.items() if choice.equalisation == "given"} == {*BLOCK}
        assert [state.choices[name].equalisation for name in (TUBE, HEAD)] == ["none", "none"]
        folded = graphs.replace_initializers(calibrator.model, state.values)
        for name, chosen in zip(BLOCK, given, strict=True):
            tensor = named(calibrator)[name].activation
            expected = (seen(calibrator.model, tensor) - chosen.shift) / chosen.scale
            np.testing.assert_allclose(seen(folded, tensor), expected, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(outputs(folded, SEEN.frames), outputs(traced().model, SEEN.frames), atol=1e-4)

    def test_without_a_centre_a_gelu_is_only_scaled(
        self, make: Make, given: list[Equalization], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calibrator, scale = make("uint8"), np.geomspace(0.5, 2, 64).astype(np.float32)
        alone = Equalization("alone", scale, np.zeros(64, np.float32))
        monkeypatch.setattr("edgetube.calibration.equalize.choose_behind_gelu", lambda *_: alone)
        state = calibrated(calibrator)
        tensor = named(calibrator)[FC2].activation
        folded = graphs.replace_initializers(calibrator.model, state.values)
        np.testing.assert_allclose(seen(folded, tensor), seen(calibrator.model, tensor) / scale, atol=2e-5)
        np.testing.assert_allclose(outputs(folded, SEEN.frames), outputs(traced().model, SEEN.frames), atol=1e-4)

    def test_a_linear_without_a_fold_site_is_left_alone(self, make: Make, given: list[Equalization]) -> None:
        roles = traced().roles
        others = tuple(site for site in roles.fold_sites if site.linear != QKV)
        state = calibrated(make(roles=replace(roles, fold_sites=others)))
        assert state.choices[QKV].equalisation == "none"
        assert state.choices[FC1].equalisation == "given"

    def test_a_gelu_without_operators_behind_it_is_left_alone(
        self, make: Make, given: list[Equalization], tmp_path: Path
    ) -> None:
        graph = traced()
        bare = LayerwiseCalibrator(graph.model, graph.roles, SEEN, export.evaluator(), "int8", tmp_path)
        state = calibrated(bare)
        assert {name for name, choice in state.choices.items() if choice.equalisation == "given"} == {QKV, PROJ, FC1}
        folded = graphs.replace_initializers(graph.model, state.values)
        np.testing.assert_allclose(outputs(folded, SEEN.frames), outputs(graph.model, SEEN.frames), atol=1e-4)

    def test_a_graph_without_its_fold_sites_is_refused(self, make: Make) -> None:
        calibrator, roles = make(), replace(traced().roles, fold_sites=(FoldSite("pool", FC1, "norm"),))
        with pytest.raises(SpecError, match=r"pool is not a LayerNorm that .*fc1 alone reads"):
            LayerwiseCalibrator(calibrator.model, roles, SEEN, export.evaluator(), "int8", calibrator.workspace)

    def test_a_linear_without_a_bias_has_nowhere_to_put_a_shift(self, make: Make, given: list[Equalization]) -> None:
        calibrator = make()
        stats = ActivationStats("blocks.0.norm1", 1)
        stats.add(0, np.ones((1, 8, 16), np.float32))
        state = CalibrationState()
        bare, own = replace(named(calibrator)[QKV], bias=None), named(calibrator)[QKV]
        found = calibrator._choose_equalization(bare, stats, state)
        assert (found.name, found.identity) == ("none", True)
        np.testing.assert_array_equal(found.scale, np.ones(16))
        np.testing.assert_array_equal(found.shift, np.zeros(16))
        calibrator._fold(bare, found, state)
        assert (state.values, given) == ({}, [])
        calibrator._fold(own, calibrator._choose_equalization(own, stats, state), state)
        assert {*state.values} == {f"{QKV}.weight", f"{QKV}.bias", "blocks.0.norm1.weight", "blocks.0.norm1.bias"}

    def test_linear_algebra_has_one_thread_in_each_thread_of_ours(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And has what it had before afterwards."""
        from threadpoolctl import threadpool_info, threadpool_limits

        def blas() -> set[int]:
            return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

        seen: list[set[int]] = []
        quantize = LayerwiseCalibrator._quantize

        def watched(self: LayerwiseCalibrator, *given: Any, **more: Any) -> Any:
            seen.append(blas())
            return quantize(self, *given, **more)

        monkeypatch.setattr(LayerwiseCalibrator, "_quantize", watched)
        with threadpool_limits(2, "blas"):
            before = blas()
            if before != {2}:
                pytest.skip(f"the linear algebra here does not take two threads: {before}")
            calibrated(make())
            assert blas() == before
        assert seen
        assert all(found == {1} for found in seen)

    def test_a_folding_that_changes_the_graph_says_by_how_much(
        self, make: Make, given: list[Equalization], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calibrator = make()
        shifted = Equalization.bias
        monkeypatch.setattr(Equalization, "bias", lambda self, weight, bias: shifted(self, weight, bias) + 100)
        state = calibrated(calibrator)
        (reason,) = {state.choices[name].equalisation for name in BLOCK}
        assert reason.startswith("none: folding it changed blocks.0 by ")
        assert state.choices[HEAD].equalisation == "none"
        assert state.values == {}


class TestRelativeChange:
    def change(self, make: Make, before: dict[str, Any], after: dict[str, Any]) -> float:
        arrays: list[dict[str, RowArray]] = [
            {name: np.array(value, np.float32) for name, value in given.items()} for given in (before, after)
        ]
        return make()._relative_change(Stage("x", (), (), tuple(before)), *arrays)

    def test_by_hand(self, make: Make) -> None:
        """Of each tensor the largest difference by the largest value; of all tensors the largest."""
        before = {"a": [[4.0, -8.0], [2.0, 0.0]], "b": [[1.0, 1.0], [1.0, 0.5]]}
        assert self.change(make, before, before) == 0
        assert self.change(make, before, before | {"a": [[4.0, -7.0], [0.0, 0.0]]}) == 2 / 8
        assert self.change(make, before, {"a": [[5.0, -8.0], [2.0, 0.0]], "b": [[1.0, 1.0], [1.0, 0.0]]}) == 0.5
        assert self.change(make, {}, {}) == 0

    def test_of_the_clips_that_were_there_before(self, make: Make) -> None:
        assert self.change(make, {"a": [[4.0, 2.0]]}, {"a": [[4.0, 1.0], [9.0, 9.0]]}) == 0.25

    def test_of_zeros(self, make: Make) -> None:
        assert self.change(make, {"a": [[0.0]]}, {"a": [[3.0]]}) == pytest.approx(3e6)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_what_is_not_finite_is_infinitely_far(self, make: Make, bad: float) -> None:
        before = {"a": [[1.0]], "b": [[1.0]]}
        assert self.change(make, before, before | {"a": [[bad]]}) == np.inf


class TestChoice:
    @pytest.mark.parametrize("activations", ["int8", "uint8"])
    def test_errors_are_those_of_the_product(self, make: Make, activations: ActivationScheme) -> None:
        """On the clips that were seen, on others, and as it would be without any calibration."""
        calibrator = make(activations, held_out=list(OTHERS.frames))
        state = calibrated(calibrator)
        folded = graphs.replace_initializers(calibrator.model, state.values)
        values = graphs.initializers(folded)
        for name, linear in named(calibrator).items():
            choice, integers = state.choices[name], state.integers[linear.weight]
            assert choice.error == min(choice.errors.values()) == choice.errors[choice.range.method]
            weight = np.asarray(values[linear.weight], np.float64)
            for frames, found in ((SEEN.frames, choice.error), (OTHERS.frames, calibrator.held_out_errors[name])):
                rows = seen(folded, linear.activation, frames)
                fake = quantised(rows, choice.range.low, choice.range.high, activations)
                assert found == pytest.approx(relative(fake @ (integers * choice.scales), rows @ weight), rel=0.02)
            rows = seen(calibrator.model, linear.activation)
            weight = calibrator.initializers[linear.weight].astype(np.float64)
            scales = np.abs(weight).max(axis=0) / 127
            low, high = (0, 255) if name == TUBE else (min(rows.min(), 0), max(rows.max(), 0))
            fake = quantised(rows, low, high, activations) @ (np.rint(weight / scales) * scales)
            assert choice.plain_error == pytest.approx(relative(fake, rows @ weight), rel=0.02), name

    @pytest.mark.parametrize(("low", "high"), [(0.25, 0.5), (-0.75, -0.25), (-0.5, 0.25)])
    def test_the_plain_range_holds_zero(self, make: Make, low: float, high: float) -> None:
        calibrator = make("uint8")
        linear = named(calibrator)[QKV]
        rows = np.random.default_rng(0).uniform(low, high, (100, 16)).astype(np.float32)
        stats = ActivationStats(linear.activation, 1)
        stats.add(0, rows)
        weight = calibrator.initializers[linear.weight].astype(np.float64)
        scales = np.abs(weight).max(axis=0) / 127
        fake = quantised(rows, min(rows.min(), 0), max(rows.max(), 0), "uint8") @ (np.rint(weight / scales) * scales)
        assert calibrator._plain_error(linear, stats) == pytest.approx(relative(fake, rows @ weight), rel=1e-3)

    def test_pixels_have_their_own_range_and_nothing_else_has(self, make: Make) -> None:
        """The brightest pixel of the clips is 200."""
        state = calibrated(make())
        assert state.choices[TUBE].range == Range(0.0, 255.0, "min-max")
        assert {*state.choices[TUBE].errors} == {"min-max"}
        assert all(len(state.choices[name].errors) > 1 for name in (*BLOCK, HEAD))

    def test_the_roles_say_what_reads_pixels(self, make: Make) -> None:
        state = calibrated(make(roles=replace(traced().roles, pixels=())))
        assert state.choices[TUBE].range.high == pytest.approx(200, abs=2)

    def test_scales_are_numbers_of_the_type_in_the_unit_of_the_target(self, make: Make) -> None:
        calibrator = make(form=IntegerFormat("float16", 256.0))
        state = calibrated(calibrator)
        for name, choice in state.choices.items():
            unit = np.float32(256 if name == TUBE else 1)
            stored = choice.scales * unit
            np.testing.assert_array_equal(stored.astype(np.float16).astype(np.float32), stored, err_msg=name)
            by = choice.range.symmetric / unit
            assert by == pytest.approx(float(np.float16(by)), rel=1e-6)
            weight = np.abs(graphs.initializers(calibrator.model)[named(calibrator)[name].weight]).max()
            assert 0.1 * weight / 127 < choice.scales.max() < 10 * weight / 127

    def test_a_nearly_dead_column_has_the_smallest_scale(self, make: Make) -> None:
        """That is a normal number of the type, in the unit of the target."""
        weights = {f"{name}.weight": np.array(make().initializers[f"{name}.weight"]) for name in (TUBE, FC1, HEAD)}
        for weight in weights.values():
            weight[:, 1] *= 1e-7
        model = graphs.replace_initializers(traced().model, weights)
        choices = calibrated(make(model=model, form=IntegerFormat("float16", 256.0))).choices
        smallest = [float(choices[name].scales.min()) for name in (TUBE, FC1, HEAD)]
        assert smallest == [2.0**-22, 2.0**-14, 2.0**-14]

    def test_weights_of_pairs_are_limited_only_where_the_target_needs_it(self, make: Make) -> None:
        overflows = {}
        for safe in (False, True):
            state = calibrated(make(form=IntegerFormat(safe_pairs=safe)))
            overflows[safe] = sum(numeric.overflowing_pairs(found) for found in state.integers.values())
        assert overflows[False] > 0
        assert overflows[True] == 0

    def test_rounded_by_all_rows(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        """However few of them are sampled."""
        monkeypatch.setattr(layerwise, "ROWS", (16, 16))
        monkeypatch.setattr(layerwise, "ROW_VALUES", 1)
        calibrator = make()
        state = calibrated(calibrator)
        folded = graphs.replace_initializers(calibrator.model, state.values)
        for name, linear in named(calibrator).items():
            rows = seen(folded, linear.activation).reshape(-1, len(calibrator.initializers[linear.weight]))
            weight = np.asarray(graphs.initializers(folded)[linear.weight], np.float32)
            scales = numeric.mse_scales(weight, np.float32(np.square(rows).mean(axis=0)))
            np.testing.assert_allclose(state.choices[name].scales, scales, rtol=1e-6)
            expected = numeric.gptq_quantize(weight, scales, rows.T @ rows)
            assert (state.integers[linear.weight] != expected).mean() < 0.005  # ties between float32 and float64
            if name in (QKV, FC2):
                few = numeric.gptq_quantize(weight, scales, rows[:16].T @ rows[:16])
                assert (state.integers[linear.weight] != few).mean() > 0.02


class TestStages:
    def test_each_is_reported_and_kept_when_it_is_done(self, make: Make) -> None:
        steps: list[tuple[str, int, int]] = []
        calibrator = make(progress=lambda *step: steps.append(step))
        state, kept = CalibrationState(), list[set[str]]()
        calibrator.calibrate(state, lambda: kept.append({*state.choices}))
        assert kept == [{TUBE}, {TUBE, *BLOCK}, {TUBE, *BLOCK, HEAD}]
        assert steps == [("calibrate", done, 3) for done in range(4)]
        steps.clear()
        calibrator.correct_biases(state, frozenset(BLOCK))
        assert steps == [("correct biases", done, 3) for done in range(4)]

    def test_what_is_done_is_not_done_again(self, make: Make) -> None:
        straight = calibrated(make())
        half = CalibrationState()
        for field in ("choices", "means"):
            getattr(half, field).update({n: v for n, v in getattr(straight, field).items() if n != HEAD})
        half.integers.update({n: v for n, v in straight.integers.items() if n != f"{HEAD}.weight"})
        half.values.update(straight.values)
        kept = dict(half.choices)
        done: list[int] = []
        calibrator = make()
        calibrator.calibrate(half, lambda: done.append(1))
        assert done == [1]
        assert all(half.choices[name] is choice for name, choice in kept.items())
        assert half.choices[HEAD].range == straight.choices[HEAD].range
        np.testing.assert_array_equal(half.integers[f"{HEAD}.weight"], straight.integers[f"{HEAD}.weight"])
        np.testing.assert_allclose(half.means[HEAD], straight.means[HEAD])
        calibrator.calibrate(half, lambda: done.append(2))
        assert done == [1]

    @pytest.mark.parametrize(("factor", "stale"), [(1.5, True), (1 + 1e-6, False)])
    def test_kept_values_that_compute_something_else_are_stale(self, make: Make, factor: float, stale: bool) -> None:
        calibrator = make()
        state = calibrated(calibrator)
        state.values["blocks.0.norm1.weight"] = calibrator.initializers["blocks.0.norm1.weight"] * np.float32(factor)
        if stale:
            with pytest.raises(StaleStateError, match=r"^blocks\.0$"):
                calibrator.calibrate(state)
        else:
            calibrator.calibrate(state)

    def test_nothing_is_measured_on_other_clips_when_there_are_none(self, make: Make) -> None:
        calibrator = make()
        calibrated(calibrator)
        assert calibrator.held_out_errors == {}

    def test_means_are_those_of_the_correction_clips(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(layerwise, "CORRECTION_CLIPS", 4)
        calibrator = make()
        state = calibrated(calibrator)
        folded = graphs.replace_initializers(calibrator.model, state.values)
        for name, linear in named(calibrator).items():
            mean = seen(folded, linear.activation)[[0, 3, 6, 9]].mean(axis=(0, 1))
            np.testing.assert_allclose(state.means[name], mean, rtol=1e-4, atol=1e-5)

    def test_a_tensor_is_kept_until_its_last_reader(self, make: Make) -> None:
        """Here the classifier reads the tokens too."""
        model = onnx.ModelProto()
        model.CopyFrom(traced().model)
        nodes = model.graph.node
        at = next(
            i
            for i, node in enumerate(nodes)
            if node.op_type == "LayerNormalization" and "norm" in node.name and not node.name.startswith("blocks")
        )
        nodes[at].input[0] = "skip"
        nodes.insert(at, helper.make_node("Add", ["blocks.0", "tubes"], ["skip"], name="skip"))
        calibrator = make(model=model)
        tokenizer, block, classifier = calibrator.stages
        assert {*classifier.inputs} == {"blocks.0", "tubes"}
        streams = {"frames": SEEN.frames}
        for stage, kept in ((tokenizer, {"tubes"}), (block, {"tubes", "blocks.0"}), (classifier, {"logits"})):
            streams = calibrator._run(stage, {}, streams, range(12), {})
            assert {*streams} == kept
            assert all(len(array) == 12 for array in streams.values())
        np.testing.assert_allclose(np.concatenate(list(streams["logits"])), outputs(model, SEEN.frames), atol=1e-6)
        state = calibrated(calibrator)
        calibrator.correct_biases(state, frozenset(BLOCK))
        mean = seen(graphs.replace_initializers(calibrator.model, state.values), "pool").mean(axis=(0, 1))
        np.testing.assert_allclose(state.means[HEAD], mean, rtol=1e-4, atol=1e-5)

    def test_frames_that_are_sequences_of_their_own_are_kept_all(self, tmp_path: Path) -> None:
        """The tensors of an image model over video have an entry for each frame, not for each clip."""
        graph = trace("gated-mlp")
        shape = (graph.spec.frames, *graph.spec.size, 3)
        frames = np.random.default_rng(0).integers(0, 256, (2, *shape), np.uint8)
        clips = Clips("noise", frames, np.full(2, -1), ("a", "b"), "")
        calibrator = LayerwiseCalibrator(graph.model, graph.roles, clips, export.evaluator(), "uint8", tmp_path)
        streams: dict[str, RowArray] = {"frames": frames}
        for stage in calibrator.stages:
            streams = calibrator._run(stage, {}, streams, range(2), {})
        np.testing.assert_allclose(np.concatenate(list(streams["logits"])), outputs(graph.model, frames), atol=1e-5)


class TestCorrectBiases:
    @pytest.mark.parametrize("names", [BLOCK, (TUBE, FC1), (QKV, HEAD)])
    def test_the_mean_output_is_that_of_the_float_graph(
        self, make: Make, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of each linear in its turn, on the correction clips; a tube has no bias of its own."""
        monkeypatch.setattr(layerwise, "CORRECTION_CLIPS", 4)
        frames = [SEEN.frames[i] for i in (0, 3, 6, 9)]
        calibrator = make()
        state = calibrated(calibrator)
        state.biases["left over"] = np.zeros(1, np.float32)
        chosen = frozenset(names)
        uncorrected = calibrator.fake_quantized(replace(state, biases={}), chosen)
        calibrator.correct_biases(state, chosen)
        known = named(calibrator)
        assert {*state.biases} == {known[name].bias for name in chosen if name != TUBE}
        folded = graphs.replace_initializers(calibrator.model, state.values)
        corrected = calibrator.fake_quantized(state, chosen)
        for name in chosen - {TUBE}:
            add = next(n.output[0] for n in folded.graph.node if known[name].bias in n.input)
            exact, found, before = (
                seen(model, add, frames).mean(axis=(0, 1)) for model in (folded, corrected, uncorrected)
            )
            np.testing.assert_allclose(found, exact, atol=2e-6 * np.abs(exact).max() + 2e-6, err_msg=name)
            assert np.abs(before - exact).max() > 20 * np.abs(found - exact).max()

    @pytest.mark.parametrize("kept", [1 << 30, 0])
    def test_it_begins_where_other_linears_are_quantised(
        self, make: Make, monkeypatch: pytest.MonkeyPatch, kept: int
    ) -> None:
        """And gives the biases of one that begins with the first stage; as it does where nothing may be kept."""
        monkeypatch.setattr(layerwise, "KEPT_BYTES", kept)
        steps: list[tuple[str, int, int]] = []
        calibrator = make(progress=lambda *step: steps.append(step))
        state = calibrated(calibrator)
        everything = frozenset({TUBE, *BLOCK, HEAD})
        for quantised, left in (
            (everything, 3),
            (everything - {HEAD}, 1),
            (everything - {FC2}, 2),
            (everything - {TUBE}, 3),
            (everything - {TUBE, QKV}, 2),
        ):
            steps.clear()
            calibrator.correct_biases(state, quantised)
            run = left if kept else 3
            assert steps[-1] == ("correct biases", run, run)
            fresh = replace(state, biases={})
            make().correct_biases(fresh, quantised)
            assert state.biases.keys() == fresh.biases.keys()
            for name, bias in fresh.biases.items():
                np.testing.assert_array_equal(state.biases[name], bias)
        steps.clear()
        calibrator.correct_biases(replace(state), quantised)
        assert steps[-1] == ("correct biases", 3, 3)

    def test_what_changes_in_the_graph(self, make: Make) -> None:
        """Folded values, dequantised weights of what is quantised, and corrected biases, which come last."""
        calibrator = make()
        state = calibrated(calibrator)
        chosen = frozenset({FC1, FC2})
        calibrator.correct_biases(state, chosen)
        found = calibrator.changed_initializers(state, chosen)
        assert {*found} == {*state.values, f"{FC1}.weight", f"{FC1}.bias", f"{FC2}.weight", f"{FC2}.bias"}
        for name in (FC1, FC2):
            dequantised = state.integers[f"{name}.weight"] * state.choices[name].scales
            assert found[f"{name}.weight"].dtype == np.float32
            np.testing.assert_array_equal(found[f"{name}.weight"], dequantised)
            np.testing.assert_array_equal(found[f"{name}.bias"], state.biases[f"{name}.bias"])
        assert f"{FC2}.weight" in state.values
        fake = graphs.initializers(calibrator.fake_quantized(state, chosen))
        for name, value in found.items():
            np.testing.assert_array_equal(fake[name], value)
        reads = {node.name: node.input[0] for node in calibrator.fake_quantized(state, chosen).graph.node}
        for name, linear in named(calibrator).items():
            assert reads[linear.node] == linear.activation + (".dequantized" if name in chosen else "")


class TestMatchesModel:
    def test_what_was_calibrated_does_and_so_does_nothing(self, make: Make) -> None:
        calibrator = make()
        assert calibrator.matches_model(calibrated(calibrator))
        assert calibrator.matches_model(CalibrationState())

    def test_what_is_damaged_does_not(self, make: Make) -> None:
        calibrator = make()
        for number, damaged in enumerate(damages(calibrated(calibrator))):
            assert not calibrator.matches_model(damaged), number


def damages(state: CalibrationState) -> Iterator[CalibrationState]:
    """What may be wrong with kept stages, one thing at a time."""
    bias = f"{FC1}.bias"
    for field, name, value in (
        ("values", bias, np.zeros(3, np.float32)),
        ("values", bias, np.full(64, np.nan, np.float32)),
        ("values", "of another model", np.zeros(64, np.float32)),
        ("integers", f"{FC1}.weight", np.zeros((64, 16), np.int8)),
        ("integers", f"{FC1}.weight", np.zeros((16, 64), np.int16)),
        ("integers", "of another model", np.zeros((16, 64), np.int8)),
        ("means", FC1, np.zeros(64, np.float32)),
        ("means", FC1, np.full(16, np.inf, np.float32)),
        ("means", "of another model", np.zeros(16, np.float32)),
        ("choices", FC1, replace(state.choices[FC1], scales=np.zeros(16, np.float32))),
        ("choices", FC1, replace(state.choices[FC1], scales=np.full(64, np.nan, np.float32))),
        ("choices", "of another model", state.choices[FC1]),
    ):
        yield replace(state, **{field: {**getattr(state, field), name: value}})
    for field in ("integers", "means", "choices"):
        yield replace(state, **{field: {k: v for k, v in getattr(state, field).items() if not k.startswith(FC1)}})
    yield replace(
        state,
        choices={**state.choices, "of another model": state.choices[FC1]},
        means={**state.means, "of another model": state.means[FC1]},
    )
