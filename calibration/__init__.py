"""INT8 calibration: from a float graph and clips to an equalised graph and its calibration table.

`calibrate` is the entry point. It imports no runtime: graphs run through the function that it is given.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgetube.calibration import graphs, search
from edgetube.calibration.cache import Cache, open_cache
from edgetube.calibration.clips import Clips
from edgetube.calibration.graphs import Array, OpenGraph
from edgetube.calibration.layerwise import CalibrationState, LayerwiseCalibrator, StaleStateError
from edgetube.calibration.observers import Histogram, least_squares
from edgetube.calibration.search import AccuracyBudget, SearchResult
from edgetube.calibration.side_by_side import in_order
from edgetube.calibration.table import (
    FLOAT32_SCALES,
    ActivationScheme,
    CalibrationTable,
    IntegerFormat,
    LinearPlan,
    Range,
    ScaleType,
    shortest_float32,
)
from edgetube.errors import InputError
from edgetube.progress import Progress, silent, track
from edgetube.roles import GraphRoles
from edgetube.video import Frames

__all__ = ["Calibrated", "calibrate", "observe"]

ALGORITHM_VERSION = 11
"""Version of the algorithm; bump it to invalidate cached results."""

OBSERVED_CLIPS = 32
"""Most clips for the ranges of single tensors, which converge with few clips."""

HELD_OUT_CLIPS = 16
"""Judging clips on which the errors of single linears are reported."""


@dataclass(frozen=True)
class Calibrated:
    """A calibrated graph.

    Attributes:
        values: the initializers that calibration changed by name: folded, rounded to int8, bias-corrected.
        table: for the graph with those values, prepared for the table's scheme.
        budget: the judging clips and the float graph's logits for them.
        report: for the manifest, plain JSON.
    """

    values: Mapping[str, Array]
    table: CalibrationTable
    budget: AccuracyBudget
    report: Mapping[str, Any]


def calibrate(
    model: onnx.ModelProto,
    roles: GraphRoles,
    calibration_clips: Clips,
    judging_clips: Clips,
    open_graph: OpenGraph,
    *,
    activations: ActivationScheme,
    workspace: Path,
    form: IntegerFormat = FLOAT32_SCALES,
    max_drop: float | None = None,
    cache: Path | None = None,
    versions: Mapping[str, str] | None = None,
    float_logits: Array | None = None,
    progress: Progress = silent,
) -> Calibrated:
    """Calibrate a canonical graph.

    Args:
        model: float32 graph with batch 1, frames uint8 (1, T, H, W, 3) -> logits.
        roles: of the graph.
        calibration_clips: for ranges, equalisations, weights and biases.
        judging_clips: for the accuracy budget.
        open_graph: opens any graph for running.
        activations, form: the activation scheme of the target runtime, and how it stores integers.
        workspace: folder for arrays that are kept on disk.
        max_drop: points of top-1 (or of agreement, without labels) that may be lost; None for the default.
        cache: folder of an earlier calibration, finished or not; used only where its key is the same.
        versions: of the tools, for the table and the cache.
        float_logits: those of `model` on the judging clips (N, classes), where they are known.

    Raises:
        ParityError: the budget cannot be met.
        InputError: a logit is NaN or infinite on these clips.
        SpecError: the graph has not what its roles name.
    """
    reference = float_logits
    if reference is None:
        reference = search.compute_logits(model, judging_clips, open_graph, "float answers", progress)
    if bad := [name for name, row in zip(judging_clips.names, reference, strict=True) if not np.isfinite(row).all()]:
        raise InputError(
            f"the model gives NaN or infinite logits on {len(bad)} of {len(judging_clips)} clips, {bad[0]} among "
            "them; check weights and clips"
        )
    budget = AccuracyBudget(judging_clips, reference, max_drop)
    key = _key(model, roles, calibration_clips, budget, activations, form, versions or {})
    model = graphs.insert_equalization_sites(model, roles, activations)
    with open_cache(cache or workspace / "cache", key, progress) as kept:
        if (finished := kept.result()) is not None:
            values, table, report = finished
            return Calibrated(
                values, table, budget, {**report, "notes": _notes(calibration_clips, budget), "cached": True}
            )
        held_out = _held_out(calibration_clips, judging_clips)
        calibrator = LayerwiseCalibrator(
            model, roles, calibration_clips, open_graph, activations, workspace, progress, held_out, form
        )
        state = _choose(calibrator, kept)
        found = search.search(calibrator, state, budget)
        values = calibrator.changed_initializers(state, found.quantised)
        notes = [*_notes(calibration_clips, budget), *([kept.note] if kept.note else [])]
        report = _report(calibrator, state, found) | {"notes": notes}
        table = CalibrationTable(
            model=graphs.digest(graphs.replace_initializers(model, values)),
            clips={"name": calibration_clips.name, "count": len(calibration_clips), "sha256": calibration_clips.sha256},
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
    return Calibrated(values, table, budget, report)


def _choose(calibrator: LayerwiseCalibrator, kept: Cache) -> CalibrationState:
    """Calibrate every linear; cached stages are not calibrated again, unless they do not match the model."""
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
    activations: ActivationScheme,
    progress: Progress = silent,
    scales: ScaleType = "float32",
    most: int = OBSERVED_CLIPS,
) -> dict[str, Range]:
    """Ranges of any tensors of a graph with batch 1, by least squared error on `most` of the clips, evenly spaced.

    The range of a softmax is always 0 to 1.
    """
    known = {out for node in model.graph.node if node.op_type == "Softmax" for out in node.output}
    seen = {name: Histogram() for name in tensors if name not in known}
    call = open_graph(graphs.extract_subgraph(model, list(seen)))
    (frames,) = (value.name for value in model.graph.input)
    chosen = np.linspace(0, len(clips) - 1, min(len(clips), most)).astype(int)

    def run(index: int) -> list[Histogram]:
        return [Histogram.of(values) for values in call({frames: clips.frames[index][None]})]

    for parts in track(in_order(run, chosen.tolist()), "observe", len(chosen), progress):
        for histogram, part in zip(seen.values(), parts, strict=True):
            histogram.merge(part)
    found = {name: least_squares(histogram, activations) for name, histogram in seen.items()}
    found = {name: found.get(name, Range(0.0, 1.0, "softmax")).stored(activations, scales) for name in tensors}
    return {name: replace(r, low=shortest_float32(r.low), high=shortest_float32(r.high)) for name, r in found.items()}


def _held_out(calibration_clips: Clips, judging_clips: Clips) -> list[Frames]:
    """Judging clips that are not among the calibration clips, spread evenly."""
    known = set(calibration_clips.names)
    others = [index for index, name in enumerate(judging_clips.names) if name not in known]
    step = max(1, len(others) // HELD_OUT_CLIPS)
    return [judging_clips.frames[index] for index in others[::step][:HELD_OUT_CLIPS]]


def _notes(calibration_clips: Clips, budget: AccuracyBudget) -> list[str]:
    """Notes for the user about the clips."""
    notes, judging_clips = list(calibration_clips.notes), budget.clips
    if shared := len(set(calibration_clips.names) & set(judging_clips.names)):
        notes.append(
            f"{shared} of {len(judging_clips)} clips judged the accuracy that they were calibrated on: other clips "
            "may lose more; give --calib more clips"
        )
    return [*notes, budget.note] if budget.note else notes


def _key(
    model: onnx.ModelProto,
    roles: GraphRoles,
    clips: Clips,
    budget: AccuracyBudget,
    activations: ActivationScheme,
    form: IntegerFormat,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """The cache key; its names are shown to the user when a part differs."""
    return {
        "the model": graphs.digest(model),
        "the roles of its tensors": hashlib.sha256(json.dumps(asdict(roles)).encode()).hexdigest(),
        "the clips or their preprocessing": clips.sha256,
        "the scheme": [activations, form.dtype, form.pixels, form.safe_pairs],
        "the recipe": ALGORITHM_VERSION,
        "the tools": dict(sorted(versions.items())),
        "judged clips": budget.clips.sha256,
        "max_drop": budget.max_drop,
    }


def _plan(linear: graphs.Linear, state: CalibrationState, found: SearchResult) -> LinearPlan:
    choice = state.choices[linear.name]
    if linear.name not in found.quantised:
        return LinearPlan(
            linear.name, linear.activation, linear.weight, (), "float", found.reasons.get(linear.name, "")
        )
    reason = f"{choice.equalisation}; {choice.range.method}; output error {choice.error:.1e}"
    scales = tuple(shortest_float32(scale) for scale in choice.scales)
    return LinearPlan(linear.name, linear.activation, linear.weight, scales, "int8", reason)


def _report(calibrator: LayerwiseCalibrator, state: CalibrationState, found: SearchResult) -> dict[str, Any]:
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
