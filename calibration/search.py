"""Which linears may compute in int8: all of them while the accuracy budget holds, else all but the worst."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edgetube import metrics
from edgetube.calibration import graphs
from edgetube.calibration.clips import Clips
from edgetube.calibration.graphs import OpenGraph
from edgetube.calibration.layerwise import CalibrationState, LayerwiseCalibrator
from edgetube.errors import ParityError
from edgetube.progress import Progress, silent, track

Array = npt.NDArray[np.float32]

MAX_DROP, MAX_DISAGREEMENT = 0.5, 1.0
"""Budgets in points: of top-1 accuracy where the clips have labels, else of clips with another answer."""

WORTH = 0.005
"""Share of the work or of the weights from which a linear outside of the blocks is quantised."""

LEAST = 0.5
"""Share of the linears' work that must be left in int8 for the artifact to be called that."""

RANKING_CLIPS = 16


@dataclass(frozen=True)
class Verdict:
    """How the quantised answers compare with the float ones, and whether that is good enough.

    Attributes:
        clips: how many; `labelled` says whether the loss is one of accuracy or of agreement.
        top1, top1_float: accuracy, None without labels.
        agreement: share of clips with the same answer.
        sqnr: of the logits, dB.
        loss, budget: in points; a budget that nobody gave is never less than one clip.
    """

    clips: int
    labelled: bool
    top1: float | None
    top1_float: float | None
    agreement: float
    sqnr: float
    loss: float
    budget: float

    @property
    def holds(self) -> bool:
        return self.loss <= self.budget + 1e-9

    def __str__(self) -> str:
        what = "points of top-1" if self.labelled else "% of the answers"
        return f"{self.loss:.2f} {what} on {self.clips} clips, {self.budget:.2f} allowed"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Judge:
    """Clips with the float graph's answers.

    Attributes:
        logits: (N, classes) of the float graph.
        max_drop: points that may be lost, held as they are given; None for the default, which is one clip where one
            clip is more than that.
    """

    clips: Clips
    logits: Array
    max_drop: float | None

    @property
    def note(self) -> str:
        """What a person should know when a budget is finer than what so many clips can tell; else empty."""
        if self.max_drop is None or self.max_drop * len(self.clips) >= 100:
            return ""
        need = f"at least {math.ceil(100 / self.max_drop)} clips" if self.max_drop else "no number of clips"
        return (
            f"a budget of {self.max_drop:g} points can be decided by {need}; {len(self.clips)} judged, one of which is "
            f"{100 / len(self.clips):.2g} points, so none may be lost: give --calib more clips"
        )

    def verdict(self, logits: Array) -> Verdict:
        """Judge other answers (N, classes) to the same clips."""
        truth, count = self.clips.labels, len(self.clips)
        labelled = bool((truth >= 0).all())
        agreement = metrics.agreement(self.logits, logits)
        top1 = metrics.top_k(logits, truth) if labelled else None
        top1_float = metrics.top_k(self.logits, truth) if labelled else None
        loss = 1 - agreement if top1 is None or top1_float is None else top1_float - top1
        budget = self.max_drop
        if budget is None:
            budget = max(MAX_DROP if labelled else MAX_DISAGREEMENT, 100 / count)
        sqnr = metrics.sqnr(self.logits, logits)
        return Verdict(count, labelled, top1, top1_float, agreement, sqnr, 100 * loss, budget)


@dataclass(frozen=True)
class Found:
    """The linears to quantise, why the others are not, and the verdict on the result."""

    quantised: frozenset[str]
    reasons: Mapping[str, str]
    ranking: Mapping[str, float]
    verdict: Verdict


def answers(
    model: onnx.ModelProto, clips: Clips, open_graph: OpenGraph, stage: str, progress: Progress = silent
) -> Array:
    """Logits (N, classes) of a graph with batch 1."""
    call, name = open_graph(model), model.graph.input[0].name
    rows = track(clips.frames, stage, len(clips), progress)
    return np.concatenate([call({name: frames[None]})[0] for frames in rows])


def search(calibrator: LayerwiseCalibrator, state: CalibrationState, judge: Judge) -> Found:
    """Quantise as much as the budget allows; leaves the corrected biases of the result in `state`.

    Raises:
        ParityError: the budget does not hold even with half of the work in floating point.
    """
    work, sizes = graphs.macs(calibrator.model), graphs.weight_counts(calibrator.model)
    of_work, of_weights = sum(work.values()), sum(sizes.values())
    reasons = {
        name: f"{work[name] / of_work:.1%} of the work, {sizes[name] / of_weights:.1%} of the weights"
        for name in (linear.name for linear in calibrator.linears if not linear.in_block)
        if max(work[name] / of_work, sizes[name] / of_weights) < WORTH
    }
    admitted = frozenset(work) - frozenset(reasons)
    verdict = _try(calibrator, state, judge, admitted)
    if verdict.holds:
        return Found(admitted, reasons, {}, verdict)
    ranking = rank(calibrator, state, judge, admitted)
    worst = sorted(ranking, key=lambda name: -ranking[name])
    most = _affordable(worst, work, (1 - LEAST) * sum(work[name] for name in admitted))
    low, high, best = 1, most, (0, verdict)
    while low <= high:
        middle = (low + high) // 2
        verdict = _try(calibrator, state, judge, admitted - frozenset(worst[:middle]))
        if verdict.holds:
            best, high = (middle, verdict), middle - 1
        else:
            low = middle + 1
    count, verdict = best
    if not count:
        raise ParityError(
            f"INT8 loses {verdict} with the {most} most sensitive of {len(admitted)} linears in floating point; "
            "nothing was written: allow more with --max-drop, give more --calib clips, or use a float target"
        )
    fallen = frozenset(worst[:count])
    _try(calibrator, state, judge, admitted - fallen)
    reasons |= {name: f"fell back: alone it moves the logits by {ranking[name]:.1%}" for name in fallen}
    return Found(admitted - fallen, reasons, ranking, verdict)


def _affordable(worst: list[str], work: Mapping[str, int], budget: float) -> int:
    """How many of the worst may fall back within a budget of work."""
    spent = np.cumsum([work[name] for name in worst])
    return int(np.searchsorted(spent, budget, side="right"))


def _try(calibrator: LayerwiseCalibrator, state: CalibrationState, judge: Judge, quantised: frozenset[str]) -> Verdict:
    calibrator.correct_biases(state, quantised)
    model = calibrator.fake_quantized(state, quantised)
    return judge.verdict(answers(model, judge.clips, calibrator.open, "judge accuracy", calibrator.progress))


def rank(
    calibrator: LayerwiseCalibrator, state: CalibrationState, judge: Judge, names: frozenset[str]
) -> dict[str, float]:
    """How far each linear, quantised alone, moves the logits: relative root mean square error."""
    some = range(0, len(judge.clips), max(1, len(judge.clips) // RANKING_CLIPS))[:RANKING_CLIPS]
    state.biases.clear()
    moved = {}
    for name in track(sorted(names), "rank linears", len(names), calibrator.progress):
        call = calibrator.open(calibrator.fake_quantized(state, frozenset([name])))
        logits = np.concatenate([call({calibrator.input: judge.clips.frames[i][None]})[0] for i in some])
        moved[name] = 10 ** (-metrics.sqnr(judge.logits[list(some)], logits) / 20)
    return moved
