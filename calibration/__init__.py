"""Calibration: from a float graph and clips to a graph that integers can compute, and a table that says how.

`calibrate` is the one entrance. It reaches a runtime through the function that it is given and imports none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgetube.calibration import graphs, search
from edgetube.calibration.cache import Cache, opened
from edgetube.calibration.clips import Clips
from edgetube.calibration.graphs import Array, OpenGraph
from edgetube.calibration.layerwise import CalibrationState, LayerwiseCalibrator, StaleStateError
from edgetube.calibration.numeric import GramMatrix, Moments
from edgetube.calibration.observers import Histogram, least_squares
from edgetube.calibration.search import Found, Judge
from edgetube.calibration.table import (
    FLOAT32_SCALES,
    Activations,
    CalibrationTable,
    IntegerFormat,
    LinearPlan,
    Range,
    ScaleType,
    digits,
)
from edgetube.errors import InputError
from edgetube.progress import Progress, silent, track
from edgetube.video import Frames

__all__ = ["Calibrated", "calibrate", "input_moments", "observe"]

RECIPE = 7
"""Counts the changes of what calibration does: results of another one are not used again."""

OBSERVED_CLIPS = 32
"""Clips that ranges of single tensors come from: they settle long before output errors do."""


HELD_OUT_CLIPS = 16
"""Clips, of those that judge, on which the errors of single linears are reported."""


@dataclass(frozen=True)
class Calibrated:
    """A calibrated graph.

    Attributes:
        values: the initializers that calibration changed by name: folded, rounded to int8, bias-corrected.
        table: for the graph with those values, prepared for the table's scheme.
        judge: the clips that accuracy was judged on, and the float graph's answers to them.
        report: what was found, plain JSON, for the manifest.
    """

    values: Mapping[str, Array]
    table: CalibrationTable
    judge: Judge
    report: Mapping[str, Any]


def calibrate(
    model: onnx.ModelProto,
    statistics: Clips,
    judged: Clips,
    open_graph: OpenGraph,
    *,
    activations: Activations,
    workspace: Path,
    form: IntegerFormat = FLOAT32_SCALES,
    max_drop: float | None = None,
    cache: Path | None = None,
    versions: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> Calibrated:
    """Calibrate a canonical graph.

    Args:
        model: float32 graph with batch 1, frames uint8 (1, T, H, W, 3) -> logits.
        statistics: clips that ranges, equalisations and biases come from.
        judged: clips that the accuracy budget is held against.
        open_graph: opens any graph for running.
        activations, form: the scheme of the runtime that the table is for, and how it stores integers.
        workspace: folder for what does not stay in memory.
        max_drop: points of top-1 (or of agreement, without labels) that may be lost; None for the default.
        cache: folder of an earlier calibration, finished or not; used only if made from exactly the same things.
        versions: of the tools, for the table and the cache.

    Raises:
        ParityError: the budget cannot be met.
        InputError: the clips make the model give NaN or infinite numbers.
    """
    reference = search.answers(model, judged, open_graph, "float answers", progress)
    if bad := [name for name, row in zip(judged.names, reference, strict=True) if not np.isfinite(row).all()]:
        raise InputError(
            f"the model gives NaN or infinite logits on {len(bad)} of {len(judged)} clips, {bad[0]} among them; check "
            "weights and clips"
        )
    judge = Judge(judged, reference, max_drop)
    key = _key(model, statistics, judge, activations, form, versions or {})
    model = graphs.insert_equalization_sites(model, activations)
    with opened(cache or workspace / "cache", key, progress) as kept:
        if (finished := kept.result()) is not None:
            values, table, report = finished
            return Calibrated(values, table, judge, {**report, "notes": _notes(statistics, judge), "cached": True})
        held_out = _held_out(statistics, judged)
        calibrator = LayerwiseCalibrator(
            model, statistics, open_graph, activations, workspace, progress, held_out, form
        )
        state = _choose(calibrator, kept)
        found = search.search(calibrator, state, judge)
        values = calibrator.changed_initializers(state, found.quantised)
        notes = [*_notes(statistics, judge), *([kept.note] if kept.note else [])]
        report = _report(calibrator, state, found) | {"notes": notes}
        table = CalibrationTable(
            model=graphs.digest(graphs.replace_initializers(model, values)),
            clips={"name": statistics.name, "count": len(statistics), "sha256": statistics.sha256},
            activations=activations,
            ranges={
                linear.activation: state.choices[linear.name].range
                for linear in calibrator.linears
                if linear.name in found.quantised
            },
            linears=tuple(_plan(linear, state, found) for linear in calibrator.linears),
            versions=dict(versions or {}),
        )
        kept.save_result(values, table, report)
    return Calibrated(values, table, judge, report)


def _choose(calibrator: LayerwiseCalibrator, kept: Cache) -> CalibrationState:
    """Every linear's choice; stages that were kept are not chosen again, unless they do not fit the model."""
    state = kept.state()
    if not calibrator.matches_model(state):
        state = CalibrationState()
    try:
        calibrator.calibrate(state, lambda: kept.save_state(state))
    except StaleStateError:
        state = CalibrationState()
        calibrator.calibrate(state, lambda: kept.save_state(state))
    return state


def observe(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    clips: Clips,
    open_graph: OpenGraph,
    activations: Activations,
    progress: Progress = silent,
    scales: ScaleType = "float32",
) -> dict[str, Range]:
    """Ranges of any tensors of a graph with batch 1: those with the least squared error on the clips.

    A softmax is between 0 and 1, whatever the clips.
    """
    known = {out for node in model.graph.node if node.op_type == "Softmax" for out in node.output}
    seen = {name: Histogram() for name in tensors if name not in known}
    call = open_graph(graphs.extract_subgraph(model, list(seen)))
    (frames,) = (value.name for value in model.graph.input)
    for index in track(range(min(len(clips), OBSERVED_CLIPS)), "observe", OBSERVED_CLIPS, progress):
        for histogram, values in zip(seen.values(), call({frames: clips.frames[index][None]}), strict=True):
            histogram.add(values)
    found = {name: least_squares(histogram, activations) for name, histogram in seen.items()}
    found = {name: found.get(name, Range(0.0, 1.0, "softmax")).stored(activations, scales) for name in tensors}
    return {name: Range(digits(r.low), digits(r.high), r.method) for name, r in found.items()}


def input_moments(model: onnx.ModelProto, clips: Sequence[Frames], open_graph: OpenGraph) -> dict[str, Moments]:
    """The moments over clips (T, H, W, 3) and tokens of what each linear with a bias reads, by its weight.

    Raises:
        InputError: what one reads is NaN or infinite.
    """
    linears = [linear for linear in graphs.linears(model) if linear.bias is not None]
    read = list(dict.fromkeys(linear.activation for linear in linears))
    call, (frames,) = open_graph(graphs.extract_subgraph(model, read)), model.graph.input
    batch = frames.type.tensor_type.shape.dim[0].dim_value
    found: dict[str, GramMatrix] = {}
    for clip in clips:
        for name, values in zip(read, call({frames.name: np.stack([clip] * batch)}), strict=True):
            rows = np.asarray(values, np.float32).reshape(-1, values.shape[-1])
            if not np.isfinite(rows).all():
                raise InputError(f"the model gives NaN or infinite values in {name}; check its weights")
            found.setdefault(name, GramMatrix(rows.shape[1])).add(rows)
    moments = {name: gram.moments for name, gram in found.items()}
    return {linear.weight: moments[linear.activation] for linear in linears}


def _held_out(statistics: Clips, judged: Clips) -> list[Frames]:
    """Some of the judging clips that are not among the statistics clips, spread evenly."""
    known = set(statistics.names)
    others = [index for index, name in enumerate(judged.names) if name not in known]
    step = max(1, len(others) // HELD_OUT_CLIPS)
    return [judged.frames[index] for index in others[::step][:HELD_OUT_CLIPS]]


def _notes(statistics: Clips, judge: Judge) -> list[str]:
    """What a person should know of the clips."""
    notes, judged = list(statistics.notes), judge.clips
    if shared := len(set(statistics.names) & set(judged.names)):
        notes.append(
            f"{shared} of {len(judged)} clips judged the accuracy that they were calibrated on: other clips may lose "
            "more; give --calib more clips"
        )
    return [*notes, judge.note] if judge.note else notes


def _key(
    model: onnx.ModelProto,
    clips: Clips,
    judge: Judge,
    activations: Activations,
    form: IntegerFormat,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """What a calibration depends on; the names are those that a person is told when one differs."""
    return {
        "the model": graphs.digest(model),
        "the clips or their preprocessing": clips.sha256,
        "the scheme": [activations, form.dtype, form.pixels, form.safe_pairs],
        "the recipe": RECIPE,
        "the tools": dict(sorted(versions.items())),
        "judged clips": judge.clips.sha256,
        "max_drop": judge.max_drop,
    }


def _plan(linear: graphs.Linear, state: CalibrationState, found: Found) -> LinearPlan:
    choice = state.choices[linear.name]
    if linear.name not in found.quantised:
        return LinearPlan(
            linear.name, linear.activation, linear.weight, (), "float", found.reasons.get(linear.name, "")
        )
    reason = f"{choice.equalisation}; {choice.range.method}; output error {choice.error:.1e}"
    scales = tuple(digits(scale) for scale in choice.scales)
    return LinearPlan(linear.name, linear.activation, linear.weight, scales, "int8", reason)


def _report(calibrator: LayerwiseCalibrator, state: CalibrationState, found: Found) -> dict[str, Any]:
    return {
        "activations": calibrator.activations,
        "clips": {"name": calibrator.clips.name, "count": len(calibrator.clips), "sha256": calibrator.clips.sha256},
        "judged": found.verdict.to_json(),
        "linear_macs": sum(graphs.macs(calibrator.model).values()),
        "linears": {
            name: {
                "precision": "int8" if name in found.quantised else "float",
                "equalisation": choice.equalisation,
                "observer": choice.range.method,
                "error": choice.error,
                "held_out_error": calibrator.held_out_errors.get(name),
                "plain_error": choice.plain_error,
            }
            for name, choice in state.choices.items()
        },
        "fallbacks": dict(sorted(found.reasons.items())),
        "ranking": dict(sorted(found.ranking.items(), key=lambda item: -item[1])),
    }
