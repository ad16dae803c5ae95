"""The whole calibration on a small graph with outliers: equal in float, better in int8, the same in any order."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper

from edgetube import export, metrics
from edgetube.calibration import Calibrated, calibrate, graphs, numeric, observe, search
from edgetube.calibration.cache import Cache
from edgetube.calibration.clips import Clips, collect
from edgetube.calibration.equalize import Equalization
from edgetube.calibration.layerwise import CalibrationState, LayerwiseCalibrator
from edgetube.calibration.table import ActivationScheme, IntegerFormat
from edgetube.datasets import ClipSet, built_in_calibration
from edgetube.errors import ParityError
from edgetube.export.canonical import Graph
from edgetube.export.float16 import PIXEL_SCALE, convert_to_fp16
from edgetube.export.quantize import apply, qdq
from edgetube.model.checkpoints import Checkpoint
from tests.calibration.models import noise, traced

SCHEMES: tuple[ActivationScheme, ...] = ("int8", "uint8")
NOISE = noise(12, 1, "a"), noise(6, 2, "b")


def test_single_tensors_are_observed_on_clips_of_the_whole_set() -> None:
    """Clips are in the order of their names: the first ones are of one scene."""
    clips, model = noise(40, 1, "a"), traced().model
    seen: list[npt.NDArray[Any]] = []

    def open_graph(_: onnx.ModelProto) -> graphs.Evaluate:
        return lambda feeds: seen.extend(feeds.values()) or [np.ones(3, np.float32)]

    observe(model, [model.graph.output[0].name], clips, open_graph, "uint8", most=4)
    assert len(seen) == 4
    for frames, index in zip(seen, (0, 13, 26, 39), strict=True):
        np.testing.assert_array_equal(frames[0], clips.frames[index])


@pytest.fixture(scope="module")
def calibrated(
    hard_graph: Graph, clips: tuple[Clips, Clips], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Calibrated]:
    """Both schemes, with any loss allowed."""
    return {
        scheme: calibrate(
            hard_graph.model,
            hard_graph.roles,
            *clips,
            export.evaluator(),
            activations=scheme,
            workspace=tmp_path_factory.mktemp(scheme),
            max_drop=100.0,
        )
        for scheme in SCHEMES
    }


@pytest.fixture
def calibrator(hard_graph: Graph, clips: tuple[Clips, Clips], tmp_path: Path) -> LayerwiseCalibrator:
    return LayerwiseCalibrator(hard_graph.model, hard_graph.roles, clips[0], export.evaluator(), "int8", tmp_path)


@pytest.fixture(scope="module")
def chosen(
    hard_graph: Graph, clips: tuple[Clips, Clips], tmp_path_factory: pytest.TempPathFactory
) -> tuple[LayerwiseCalibrator, CalibrationState]:
    """A calibrator and what it chose; shared, so nobody may write in the state."""
    folder, state = tmp_path_factory.mktemp("chosen"), CalibrationState()
    calibrator = LayerwiseCalibrator(hard_graph.model, hard_graph.roles, clips[0], export.evaluator(), "int8", folder)
    calibrator.calibrate(state)
    return calibrator, state


def test_folding_does_not_change_the_float_graph(
    chosen: tuple[LayerwiseCalibrator, CalibrationState],
    clips: tuple[Clips, Clips],
    answer: Callable[..., npt.NDArray[np.float32]],
) -> None:
    calibrator, state = chosen
    assert {c.equalisation for c in state.choices.values()} != {"none"}
    assert any("norm" in name for name in state.values)
    folded = graphs.replace_initializers(calibrator.model, state.values)
    np.testing.assert_allclose(answer(folded, clips[1]), answer(calibrator.model, clips[1]), atol=2e-4)


def test_errors_of_tubes_cancel_on_other_clips(calibrator: LayerwiseCalibrator, clips: tuple[Clips, Clips]) -> None:
    """Neighbouring pixels are alike: what one weight is rounded up by, the next one is rounded down by."""
    calibrator.stages = calibrator.stages[:1]
    state = CalibrationState()
    calibrator.calibrate(state)
    tubes = [
        linear for linear in calibrator.linears if linear.name.startswith("tubes") and linear.name in state.choices
    ]
    call = export.evaluator()(
        graphs.extract_subgraph(
            graphs.extract_stage(calibrator.model, calibrator.stages[0]), [t.activation for t in tubes]
        )
    )
    seen = [call({calibrator.input: frames[None]}) for frames in clips[1].frames]
    assert tubes
    for tube, pixels in zip(tubes, zip(*seen, strict=True), strict=True):
        weight, rows = (
            calibrator.initializers[tube.weight],
            np.concatenate(pixels).reshape(-1, len(calibrator.initializers[tube.weight])),
        )
        scales = state.choices[tube.name].scales
        nearest = numeric.fake_quantize_weights(weight, scales)
        first, second = (
            np.square(rows @ (w - weight)).mean() for w in (calibrator.dequantized_weight(tube, state), nearest)
        )
        assert first < second / 4


def test_a_nearly_dead_channel_has_a_scale_that_float16_holds(
    hard_graph: Graph, clips: tuple[Clips, Clips], answer: Callable[..., Any], tmp_path: Path
) -> None:
    """From the calibration to the graph in half precision: no scale is changed, let alone to zero."""
    known: Mapping[str, Any] = graphs.initializers(hard_graph.model)
    weight = np.array(known["blocks.1.mlp.fc1.weight"])
    weight[:, 5] *= 1e-7 / np.abs(weight[:, 5]).max()
    weight[:, 6] *= 1e-5 / np.abs(weight[:, 6]).max()
    model = graphs.replace_initializers(hard_graph.model, {"blocks.1.mlp.fc1.weight": weight})
    options: dict[str, Any] = {"activations": "int8", "workspace": tmp_path, "max_drop": 100.0}
    found = calibrate(
        model, hard_graph.roles, *clips, export.evaluator(), form=IntegerFormat("float16", PIXEL_SCALE), **options
    )
    equalised, table = apply(found, replace(hard_graph, model=model))
    typed = convert_to_fp16(qdq(equalised.model, table))
    written = {tensor.name: numpy_helper.to_array(tensor) for tensor in typed.graph.initializer}
    for plan in table.quantised:
        unit = PIXEL_SCALE if plan.name.startswith("tubes") else 1
        expected = np.array(plan.weight_scales, np.float32) * np.float32(unit)
        np.testing.assert_array_equal(written[f"{plan.weight}.scale"].astype(np.float32), expected)
        assert expected.min() >= 2.0**-14
        by = float(written[f"{plan.activation}.scale"])
        assert by == pytest.approx(table.ranges[plan.activation].symmetric / unit, rel=1e-6)
    exact = answer(model, clips[1])
    assert metrics.sqnr(exact, answer(typed, clips[1])) > 30


def test_held_out_clips_are_those_that_only_judge(tmp_path: Path) -> None:
    for judged, known in ((NOISE[1], True), (NOISE[0], False)):
        options: dict[str, Any] = {"activations": "uint8", "workspace": tmp_path, "max_drop": 100.0}
        report = calibrate(traced().model, traced().roles, NOISE[0], judged, export.evaluator(), **options).report
        errors = {name: linear["held_out_error"] for name, linear in report["linears"].items()}
        assert [error is not None for error in errors.values()] == [known] * len(errors)


class TestEqualizationSites:
    """Behind a GELU: a gain for each channel, and for int8 the zero point that it lacks."""

    @pytest.fixture
    def prepared(self, hard_graph: Graph) -> onnx.ModelProto:
        return graphs.insert_equalization_sites(hard_graph.model, hard_graph.roles, "int8")

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_a_site_that_is_not_used_leaves_nothing(self, hard_graph: Graph, scheme: ActivationScheme) -> None:
        prepared = graphs.insert_equalization_sites(hard_graph.model, hard_graph.roles, scheme)
        onnx.checker.check_model(prepared)
        assert [site.centre is not None for site in graphs.equalization_sites(prepared).values()] == [
            scheme == "int8"
        ] * 2
        assert graphs.digest(graphs.remove_identity_sites(prepared)) == graphs.digest(hard_graph.model)

    @pytest.mark.parametrize(("gain", "centre"), [(2.0, 0.0), (1.0, -3.0), (2.0, -3.0)])
    def test_what_is_used_stays(
        self,
        prepared: onnx.ModelProto,
        clips: tuple[Clips, Clips],
        answer: Callable[..., npt.NDArray[np.float32]],
        gain: float,
        centre: float,
    ) -> None:
        values: dict[Any, Any] = {}
        for site in graphs.equalization_sites(prepared).values():
            values |= {site.gain: np.full(96, gain), site.centre: np.full(1, centre)}
        full = graphs.replace_initializers(prepared, values)
        less = graphs.remove_identity_sites(full)
        assert len(full.graph.node) - len(less.graph.node) == 2 * ((gain == 1.0) + (centre == 0.0))
        onnx.checker.check_model(less)
        np.testing.assert_array_equal(answer(less, clips[1]), answer(full, clips[1]))

    def test_the_float_graph_stays_what_it_was(
        self,
        prepared: onnx.ModelProto,
        hard_graph: Graph,
        clips: tuple[Clips, Clips],
        answer: Callable[..., npt.NDArray[np.float32]],
        tmp_path: Path,
    ) -> None:
        calibrator = LayerwiseCalibrator(prepared, hard_graph.roles, clips[0], export.evaluator(), "int8", tmp_path)
        state = CalibrationState()
        calibrator.calibrate(state)
        assert {c.equalisation for name, c in state.choices.items() if name.endswith("fc2")} == {"centre"}
        folded = graphs.replace_initializers(prepared, state.values)
        np.testing.assert_allclose(answer(folded, clips[1]), answer(hard_graph.model, clips[1]), atol=2e-4)

    def test_int8_is_then_as_exact_as_uint8(
        self,
        calibrated: dict[str, Calibrated],
        hard_graph: Graph,
        clips: tuple[Clips, Clips],
        answer: Callable[..., npt.NDArray[np.float32]],
    ) -> None:
        exact = answer(hard_graph.model, clips[1])
        ratios = {}
        for scheme, found in calibrated.items():
            equalised, table = apply(found, hard_graph)
            ratios[scheme] = metrics.sqnr(exact, answer(qdq(equalised.model, table), clips[1]))
        assert ratios["int8"] > ratios["uint8"] - 1.5  # dB

    def test_the_artifact_reads_the_shifted_tensor(self, calibrated: dict[str, Calibrated], hard_graph: Graph) -> None:
        _, table = apply(calibrated["int8"], hard_graph)
        read = {plan.name: plan.activation for plan in table.linears}
        assert read["blocks.0.mlp.fc2"] == "blocks.0.mlp.act.centred"
        assert "blocks.0.mlp.act" not in table.ranges


def test_a_folding_that_changes_the_graph_is_left_out(
    calibrator: LayerwiseCalibrator,
    clips: tuple[Clips, Clips],
    answer: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such a stage is calibrated as it was given, and says so; the other stages are equalised."""
    bias = Equalization.bias
    off = {"blocks.1.attn.qkv", "blocks.1.mlp.fc1"}
    wrong = [calibrator.initializers[f"{name}.weight"].shape for name in off]

    def shifted(self: Equalization, weight: Any, old: Any) -> Any:
        return bias(self, weight, old) + (0.1 if stage[-1] == "blocks.1" and weight.shape in wrong else 0)

    stage: list[str] = []
    choose_stage = LayerwiseCalibrator._calibrate_stage

    def noted(self: LayerwiseCalibrator, which: graphs.Stage, *rest: Any) -> Any:
        stage.append(which.name)
        return choose_stage(self, which, *rest)

    monkeypatch.setattr(LayerwiseCalibrator, "_calibrate_stage", noted)
    monkeypatch.setattr(Equalization, "bias", shifted)
    state = CalibrationState()
    calibrator.calibrate(state)
    chosen = {name: choice.equalisation for name, choice in state.choices.items()}
    for name, equalisation in chosen.items():
        assert equalisation.startswith("none: folding it changed blocks.1 by ") == name.startswith("blocks.1.")
    assert any(name.startswith("blocks.0.") for name in state.values)
    assert not any(name.startswith("blocks.1.") for name in state.values)
    folded = graphs.replace_initializers(calibrator.model, state.values)
    np.testing.assert_allclose(answer(folded, clips[1]), answer(calibrator.model, clips[1]), atol=2e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_much_better_than_min_max(
    calibrated: dict[str, Calibrated],
    hard_graph: Graph,
    clips: tuple[Clips, Clips],
    answer: Callable[..., npt.NDArray[np.float32]],
    scheme: ActivationScheme,
) -> None:
    exact = answer(hard_graph.model, clips[1])
    found = calibrated[scheme]
    equalised, table = apply(found, hard_graph)
    ours = metrics.sqnr(exact, answer(qdq(equalised.model, table), clips[1]))
    assert ours > 35
    assert ours > plain_sqnr(hard_graph.model, table, clips, answer, exact, scheme) + 4


def plain_sqnr(
    model: Any,
    table: Any,
    clips: tuple[Clips, Clips],
    answer: Callable[..., npt.NDArray[np.float32]],
    exact: Any,
    scheme: Any,
) -> Any:
    """Min-max ranges and unclipped weights on the same linears, nothing folded: what a careless export does."""
    from edgetube.calibration import numeric
    from edgetube.calibration.table import Range

    known: Mapping[str, Any] = graphs.initializers(model)
    linears = [linear for linear in graphs.linears(model) if linear.name in {p.name for p in table.quantised}]
    call = export.evaluator()(graphs.extract_subgraph(model, [linear.activation for linear in linears]))
    seen = [call({"frames": np.asarray(frames)[None]}) for frames in clips[0].frames]
    ranges = {
        linear.activation: Range(
            min(0.0, min(float(s[i].min()) for s in seen)), max(0.0, max(float(s[i].max()) for s in seen)), "x"
        )
        for i, linear in enumerate(linears)
    }
    weights = {
        n.weight: numeric.fake_quantize_weights(known[n.weight], numeric.absmax_scales(known[n.weight]))
        for n in linears
    }
    fake = graphs.replace_initializers(model, weights)
    fake = graphs.quantize_activations(fake, ranges, [linear.node for linear in linears], scheme)
    return metrics.sqnr(exact, answer(fake, clips[1]))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_artifact_computes_what_was_simulated(
    calibrated: dict[str, Calibrated],
    hard_graph: Graph,
    clips: tuple[Clips, Clips],
    answer: Callable[..., npt.NDArray[np.float32]],
    scheme: ActivationScheme,
) -> None:
    """Int8 weights behind DequantizeLinear give what the search saw with rounded float weights."""
    equalised, table = apply(calibrated[scheme], hard_graph)
    written = answer(qdq(equalised.model, table), clips[1])
    assert calibrated[scheme].report["judged"]["sqnr"] == pytest.approx(
        metrics.sqnr(answer(hard_graph.model, clips[1]), written), abs=0.5
    )


def test_the_order_of_the_clips_does_not_matter(hard_graph: Graph, hard_checkpoint: Checkpoint, tmp_path: Path) -> None:
    c = hard_checkpoint
    source = built_in_calibration(12, c.labels)
    tables = []
    for index, items in enumerate((source.items, source.items[::-1])):
        folder = tmp_path / str(index)
        folder.mkdir()
        seen = collect(ClipSet("x", items), c.contract, c.labels, folder)
        separate = LayerwiseCalibrator(hard_graph.model, hard_graph.roles, seen, export.evaluator(), "uint8", folder)
        state = CalibrationState()
        separate.calibrate(state)
        tables.append(state)
    assert {n: ch.range for n, ch in tables[0].choices.items()} == {n: ch.range for n, ch in tables[1].choices.items()}
    for name, value in tables[0].values.items():
        np.testing.assert_array_equal(value, tables[1].values[name])


def test_what_is_quantised_and_what_is_not(calibrated: dict[str, Calibrated]) -> None:
    table = calibrated["int8"].table
    kinds = {plan.name.rpartition(".")[2] for plan in table.quantised}
    assert {"qkv", "proj", "fc1", "fc2"} <= kinds
    assert not any("norm" in plan.name or "pool" in plan.name for plan in table.linears)
    assert len({plan.activation for plan in table.quantised}) == len(table.ranges)


def test_a_budget_that_cannot_hold_fails_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = search.Verdict(18, True, 0.5, 1.0, 0.5, 3.0, 50.0, 5.56)
    monkeypatch.setattr(search, "_evaluate", lambda *_: search.Judged(verdict, np.zeros((0, 9), np.float32)))
    with pytest.raises(ParityError, match=r"INT8 loses 50\.00 points of top-1 on 18 clips, 5\.56 allowed with the"):
        calibrate(traced().model, traced().roles, *NOISE, export.evaluator(), activations="int8", workspace=tmp_path)


def test_the_worst_linears_fall_back_until_the_budget_holds(
    chosen: tuple[LayerwiseCalibrator, CalibrationState],
    clips: tuple[Clips, Clips],
    answer: Callable[..., npt.NDArray[np.float32]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calibrator, state = chosen
    budget = search.AccuracyBudget(clips[1], answer(calibrator.model, clips[1]), None)
    sensitive = {"blocks.0.attn.qkv", "blocks.1.mlp.fc2"}
    holds = search.Verdict(18, True, 1.0, 1.0, 1.0, 40.0, 0.0, 5.56)
    fails = search.Verdict(18, True, 0.5, 1.0, 0.5, 3.0, 50.0, 5.56)

    def evaluate(w: object, s: object, j: object, q: frozenset[str], *_: object, **__: object) -> search.Judged:
        return search.Judged(fails if q & sensitive else holds, np.zeros((0, 9), np.float32))

    monkeypatch.setattr(search, "_evaluate", evaluate)
    ranking = {linear.name: 0.1 for linear in calibrator.linears} | dict.fromkeys(sensitive, 0.9)
    monkeypatch.setattr(search, "rank", lambda *_: ranking)
    found = search.search(calibrator, state, budget)
    assert not found.quantised & sensitive
    assert {name for name, reason in found.reasons.items() if reason.startswith("fell back")} == sensitive


def test_the_ranking_finds_the_linear_that_hurts(
    chosen: tuple[LayerwiseCalibrator, CalibrationState],
    clips: tuple[Clips, Clips],
    answer: Callable[..., npt.NDArray[np.float32]],
) -> None:
    calibrator, state = chosen
    state = replace(state, choices=dict(state.choices), biases={})
    hurt = "blocks.1.mlp.fc1"
    choice = state.choices[hurt]
    state.choices[hurt] = type(choice)(
        type(choice.range)(choice.range.low / 50, choice.range.high / 50, "bad"), choice.scales, "none", 1, 1, {}
    )
    budget = search.AccuracyBudget(clips[1], answer(calibrator.model, clips[1]), None)
    ranking = search.rank(calibrator, state, budget, frozenset(linear.name for linear in calibrator.linears))
    assert max(ranking, key=lambda name: ranking[name]) == hurt


class TestCache:
    """Of the model of one block."""

    def run(self, folder: Path, tmp_path: Path, clips: tuple[Clips, Clips] = NOISE, **changed: Any) -> Any:
        stages = []
        options: dict[str, Any] = {"activations": "uint8", "max_drop": 100.0, "versions": {"numpy": "1"}} | changed
        found = calibrate(
            traced().model,
            traced().roles,
            *clips,
            export.evaluator(),
            workspace=tmp_path,
            cache=folder,
            progress=lambda stage, *_: stages.append(stage),
            **options,
        )
        return found, set(stages)

    def test_the_same_things_are_not_calibrated_twice(self, tmp_path: Path) -> None:
        first, stages = self.run(tmp_path / "c", tmp_path)
        assert "calibrate" in stages
        second, stages = self.run(tmp_path / "c", tmp_path)
        assert "calibrate" not in stages
        assert second.table == first.table
        assert second.report["cached"] is True
        for name, value in first.values.items():
            np.testing.assert_array_equal(second.values[name], value)

    @pytest.mark.parametrize(
        ("changed", "named"),
        [({"versions": {"numpy": "2"}}, "the tools"), ({"activations": "int8"}, "the scheme")],
    )
    def test_a_difference_is_named_and_nothing_is_reused(
        self, tmp_path: Path, changed: dict[str, Any], named: str
    ) -> None:
        self.run(tmp_path / "c", tmp_path)
        found, stages = self.run(tmp_path / "c", tmp_path, **changed)
        assert "calibrate" in stages
        assert f"calibrated again: {named} changed since the last calibration" in found.report["notes"]

    def test_other_clips_are_other_clips(self, tmp_path: Path) -> None:
        self.run(tmp_path / "c", tmp_path)
        found, _ = self.run(tmp_path / "c", tmp_path, NOISE[::-1])
        (note,) = found.report["notes"]
        assert "the clips or their preprocessing" in note

    def test_it_goes_on_where_it_was_interrupted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        done, stop = [], LayerwiseCalibrator._calibrate_stage

        def interrupted(self: Any, stage: Any, *rest: Any) -> Any:
            if stage.name == "blocks.0" and "blocks.0" not in done:
                done.append(stage.name)
                raise KeyboardInterrupt
            done.append(stage.name)
            return stop(self, stage, *rest)

        monkeypatch.setattr(LayerwiseCalibrator, "_calibrate_stage", interrupted)
        with pytest.raises(KeyboardInterrupt):
            self.run(tmp_path / "c", tmp_path)
        resumed, _ = self.run(tmp_path / "c", tmp_path)
        assert done.count("tokenizer") == 1
        straight, _ = self.run(tmp_path / "other", tmp_path)
        assert resumed.table.linears == straight.table.linears
        assert resumed.table.ranges == straight.table.ranges

    def test_kept_stages_that_compute_something_else_are_chosen_again(self, tmp_path: Path) -> None:
        """As when halves of two calibrations lie in one folder: mended, and nobody is blamed."""
        straight, _ = self.run(tmp_path / "c", tmp_path)
        (tmp_path / "c" / "result.safetensors").unlink()
        kept = Cache(tmp_path / "c", json.loads((tmp_path / "c" / "key.json").read_text()))
        state = kept.state()
        norm = "blocks.0.norm1.weight"
        state.values[norm] = np.float32(1.5) * state.values.get(norm, graphs.initializers(traced().model)[norm])
        kept.save_state(state)
        again, _ = self.run(tmp_path / "c", tmp_path)
        assert again.table == straight.table
        for name, value in straight.values.items():
            np.testing.assert_array_equal(again.values[name], value)

    def test_kept_stages_of_other_shapes_are_chosen_again(self, tmp_path: Path) -> None:
        straight, _ = self.run(tmp_path / "c", tmp_path)
        key = json.loads((tmp_path / "c" / "key.json").read_text())
        (tmp_path / "c" / "result.safetensors").unlink()
        kept = Cache(tmp_path / "c", key)
        state = kept.state()
        state.integers["blocks.0.mlp.fc1.weight"] = np.zeros((3, 3), np.int8)
        kept.save_state(state)
        again, _ = self.run(tmp_path / "c", tmp_path)
        assert again.table == straight.table


def test_clips_that_judge_what_they_made_are_a_stated_warning(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "activations": "uint8",
        "workspace": tmp_path,
        "max_drop": 100.0,
        "cache": tmp_path / "cache",
    }
    for _ in range(2):  # the second one is read from the cache
        found = calibrate(traced().model, traced().roles, NOISE[0], NOISE[0], export.evaluator(), **options)
        (note,) = found.report["notes"]
        assert note.startswith("12 of 12 clips judged the accuracy that they were calibrated on")
