"""Chooses the linears that run in int8: all of them within the accuracy budget, else all but the most sensitive."""

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
"""Default budgets in percentage points: loss of top-1 accuracy with labels, else disagreement with the float graph."""

MIN_LAYER_SHARE = 0.005
"""Linears outside the blocks are quantised from this share of all multiply-accumulates or of all weights."""

MIN_INT8_SHARE = 0.5
"""Least share of the linears' multiply-accumulates in int8; with more fallbacks the export fails."""

RANKING_CLIPS = 16


@dataclass(frozen=True)
class Verdict:
    """Accuracy of the quantised graph against the float graph, and the budget.

    Attributes:
        clips: how many; with `labelled`, the loss is one of top-1 accuracy, else of agreement.
        top1, top1_float: accuracy, None without labels.
        agreement: share of clips with the same answer.
        sqnr: of the logits, dB.
        loss, budget: in points; the default budget is at least one clip.
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
    def within_budget(self) -> bool:
        return self.loss <= self.budget + 1e-9

    def __str__(self) -> str:
        what = "points of top-1" if self.labelled else "% of the answers"
        return f"{self.loss:.2f} {what} on {self.clips} clips, {self.budget:.2f} allowed"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class AccuracyBudget:
    """The judging clips, the float graph's logits for them, and the accuracy that may be lost.

    Attributes:
        logits: (N, classes) of the float graph.
        max_drop: points that may be lost, exactly; None for the default, which is at least one clip.
    """

    clips: Clips
    logits: Array
    max_drop: float | None

    @property
    def note(self) -> str:
        """A note for the user when the budget is finer than one clip; else empty."""
        if self.max_drop is None or self.max_drop * len(self.clips) >= 100:
            return ""
        need = f"at least {math.ceil(100 / self.max_drop)} clips" if self.max_drop else "no number of clips"
        return (
            f"a budget of {self.max_drop:g} points can be decided by {need}; {len(self.clips)} judged, one of which is "
            f"{100 / len(self.clips):.2g} points, so none may be lost: give --calib more clips"
        )

    @property
    def labelled(self) -> bool:
        """Whether all clips have labels, so that the loss is one of top-1 accuracy."""
        return bool((self.clips.labels >= 0).all())

    @property
    def points(self) -> float:
        """The points that may be lost on all clips."""
        if self.max_drop is not None:
            return self.max_drop
        return max(MAX_DROP if self.labelled else MAX_DISAGREEMENT, 100 / len(self.clips))

    def verdict(self, logits: Array) -> Verdict:
        """The verdict on other logits (n, classes) for the same clips, or for the first n of them."""
        count, labelled = len(logits), self.labelled
        truth, exact = self.clips.labels[:count], self.logits[:count]
        agreement = metrics.agreement(exact, logits)
        top1 = metrics.top_k(logits, truth) if labelled else None
        top1_float = metrics.top_k(exact, truth) if labelled else None
        loss = 1 - agreement if top1 is None or top1_float is None else top1_float - top1
        return Verdict(
            count, labelled, top1, top1_float, agreement, metrics.sqnr(exact, logits), 100 * loss, self.points
        )

    def exceeded(self, logits: Array) -> bool:
        """Whether the first n answers (n, classes) have lost the budget already, whatever the other clips give.

        The other clips can at best agree; with labels they can at best be right where the float graph is wrong. So no
        verdict changes by stopping here (a curtailed test).
        """
        found, left = self.verdict(logits), len(self.clips) - len(logits)
        lost = found.loss * len(logits) / 100
        if self.labelled and left:
            lost -= left * (1 - metrics.top_k(self.logits[-left:], self.clips.labels[-left:]))
        return 100 * lost / len(self.clips) > self.points + 1e-9


@dataclass(frozen=True)
class SearchResult:
    """The linears to quantise, why the others stay float, the sensitivity ranking, and the verdict on the result."""

    quantised: frozenset[str]
    reasons: Mapping[str, str]
    ranking: Mapping[str, float]
    verdict: Verdict


def compute_logits(
    model: onnx.ModelProto, clips: Clips, open_graph: OpenGraph, stage: str, progress: Progress = silent
) -> Array:
    """Logits (N, classes) of a graph with batch 1."""
    call, name = open_graph(model), model.graph.input[0].name
    rows = track(clips.frames, stage, len(clips), progress)
    return np.concatenate([call({name: frames[None]})[0] for frames in rows])


def judge(
    model: onnx.ModelProto, budget: AccuracyBudget, open_graph: OpenGraph, progress: Progress = silent
) -> Verdict:
    """The verdict on a graph with batch 1. It ends with the clip at which the budget is exceeded for certain."""
    call, name = open_graph(model), model.graph.input[0].name
    found = np.empty_like(budget.logits)
    for index, frames in enumerate(track(budget.clips.frames, "judge accuracy", len(budget.clips), progress)):
        found[index] = call({name: frames[None]})[0][0]
        if budget.exceeded(found[: index + 1]):
            return budget.verdict(found[: index + 1])
    return budget.verdict(found)


def search(calibrator: LayerwiseCalibrator, state: CalibrationState, budget: AccuracyBudget) -> SearchResult:
    """Quantise as many linears as the budget allows; the corrected biases of the result are left in `state`.

    Raises:
        ParityError: the budget does not hold even with half of the work in floating point.
    """
    work, sizes = graphs.macs(calibrator.model), graphs.weight_counts(calibrator.model)
    of_work, of_weights = sum(work.values()), sum(sizes.values())
    reasons = {
        name: f"{work[name] / of_work:.1%} of the work, {sizes[name] / of_weights:.1%} of the weights"
        for name in (linear.name for linear in calibrator.linears if linear.name not in calibrator.roles.linears)
        if max(work[name] / of_work, sizes[name] / of_weights) < MIN_LAYER_SHARE
    }
    admitted = frozenset(work) - frozenset(reasons)
    verdict = _evaluate(calibrator, state, budget, admitted)
    if verdict.within_budget:
        return SearchResult(admitted, reasons, {}, verdict)
    ranking = rank(calibrator, state, budget, admitted)
    worst = sorted(ranking, key=lambda name: -ranking[name])
    most = _max_fallbacks(worst, work, (1 - MIN_INT8_SHARE) * sum(work[name] for name in admitted))
    low, high, best = 1, most, (0, verdict, dict(state.biases))
    while low <= high:
        middle = (low + high) // 2
        verdict = _evaluate(calibrator, state, budget, admitted - frozenset(worst[:middle]))
        if verdict.within_budget:
            best, high = (middle, verdict, dict(state.biases)), middle - 1
        else:
            low = middle + 1
    count, verdict, state.biases = best
    if not count:
        raise ParityError(
            f"INT8 loses {verdict} with the {most} most sensitive of {len(admitted)} linears in floating point; "
            "nothing was written: allow more with --max-drop, give more --calib clips, or use a float target"
        )
    fallen = frozenset(worst[:count])
    reasons |= {name: f"fell back: alone it moves the logits by {ranking[name]:.1%}" for name in fallen}
    return SearchResult(admitted - fallen, reasons, ranking, verdict)


def _max_fallbacks(worst: list[str], work: Mapping[str, int], allowance: float) -> int:
    """How many of `worst`, in order, may fall back within an allowance of multiply-accumulates."""
    spent = np.cumsum([work[name] for name in worst])
    return int(np.searchsorted(spent, allowance, side="right"))


def _evaluate(
    calibrator: LayerwiseCalibrator, state: CalibrationState, budget: AccuracyBudget, quantised: frozenset[str]
) -> Verdict:
    calibrator.correct_biases(state, quantised)
    model = calibrator.fake_quantized(state, quantised)
    return judge(model, budget, calibrator.open, calibrator.progress)


def rank(
    calibrator: LayerwiseCalibrator, state: CalibrationState, budget: AccuracyBudget, names: frozenset[str]
) -> dict[str, float]:
    """Sensitivity of each linear: relative root mean square error of the logits with that one quantised."""
    some = range(0, len(budget.clips), max(1, len(budget.clips) // RANKING_CLIPS))[:RANKING_CLIPS]
    state.biases.clear()
    clips, exact = [budget.clips.frames[i] for i in some], budget.logits[list(some)]
    found = calibrator.one_by_one(state, names, clips)
    shown = track(found, "rank linears", len(names), calibrator.progress)
    return {name: 10 ** (-metrics.sqnr(exact, logits) / 20) for name, logits in shown}
