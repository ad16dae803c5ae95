"""Chooses the linears that run in int8: all of them within the accuracy budget, else all but the most sensitive."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edgetube import metrics
from edgetube.calibration import graphs
from edgetube.calibration.clips import Clips
from edgetube.calibration.graphs import OpenGraph
from edgetube.calibration.layerwise import CalibrationState, LayerwiseCalibrator
from edgetube.calibration.side_by_side import in_order
from edgetube.errors import ParityError
from edgetube.progress import Progress, silent, track
from edgetube.video import Frames

Array = npt.NDArray[np.float32]

MAX_DROP, MAX_DISAGREEMENT = 0.5, 1.0
"""Default budgets in percentage points: loss of top-1 accuracy with labels, else disagreement with the float graph."""

MIN_LAYER_SHARE = 0.005
"""Linears outside the blocks are quantised from this share of all multiply-accumulates or of all weights."""

MIN_INT8_SHARE = 0.5
"""Least share of the linears' multiply-accumulates in int8; with more fallbacks the export fails."""

RANKING_CLIPS, RANKING_MACS = (2, 8), 0.4e12
"""Clips for the ranking: fewest, most, and between the two as many as the model answers with these
multiply-accumulates. All linears are ranked on the fewest first."""

RANKED_AGAIN, RANKED_MARGIN = 1 / 6, 2
"""Share of the linears, the most sensitive on the fewest clips, that are then ranked on all; and at least so many times
as many as are expected to fall back."""

NEAREST, SPREAD = 32, 16
"""Clips that are judged first: the nearest to a tie, those of the screening at least, then others spread evenly over
the margins."""

SAFE_DEVIATIONS, SAFE_FACTOR = 8.0, 2.0
"""A margin is safe if it is larger than so many standard deviations of what moves it, and than so many times the
largest movement seen."""

SCREENING_SHARE = 4
"""Among several numbers of linears in float the search tells by 1 / this of the judging clips, those whose answers are
nearest to a tie; the number that it chooses is judged by all."""


@dataclass(frozen=True)
class Verdict:
    """Accuracy of the quantised graph against the float graph, and the budget.

    Attributes:
        clips: how many were answered; with `labelled`, the loss is one of top-1 accuracy, else of agreement.
        top1, top1_float: accuracy, None without labels.
        agreement: share of clips with the same answer.
        sqnr: of the logits of answered clips, dB.
        loss, budget: in points; the default budget is at least one clip. Where clips are left, the loss is what is lost
            of all whatever they give.
        left: clips that were not answered, and might give any answer.
        certain: clips that were not answered because their margins are safe: see `AccuracyBudget.decided`. They count
            as unchanged in all but `sqnr`.
    """

    clips: int
    labelled: bool
    top1: float | None
    top1_float: float | None
    agreement: float
    sqnr: float
    loss: float
    budget: float
    left: int = 0
    certain: int = 0

    @property
    def within_budget(self) -> bool:
        return self.loss <= self.budget + 1e-9

    def __str__(self) -> str:
        what = "points of top-1" if self.labelled else "% of the answers"
        least = "at least " if self.left else ""
        clips = self.clips + self.left + self.certain
        return f"{least}{self.loss:.2f} {what} on {clips} clips, {self.budget:.2f} allowed"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON of a verdict on all clips."""
        return {name: value for name, value in asdict(self).items() if name != "left"}


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

    def first(self, count: int) -> AccuracyBudget:
        """The same on the first `count` clips alone."""
        return replace(self, clips=self.clips.head(count), logits=self.logits[:count])

    @cached_property
    def margins(self) -> Array:
        """By how much the best logit of each clip exceeds the second (N,); infinite for a single class."""
        if self.logits.shape[1] < 2:
            return np.full(len(self.logits), np.inf, np.float32)
        second, first = np.partition(self.logits, -2, axis=1)[:, -2:].T
        return np.asarray(first - second, np.float32)

    @cached_property
    def order(self) -> npt.NDArray[np.intp]:
        """The clips (N,) in the order in which they are judged: the nearest to a tie first, which change most easily.

        What a graph loses so shows after few clips. After the first `nearest` come `SPREAD` of all the others, so that
        the errors of clips with large margins are known, too.
        """
        near = np.argsort(self.margins, kind="stable")
        others = near[self.nearest :]
        spread = others[:: max(1, -(-len(others) // SPREAD))]
        return np.concatenate([near[: self.nearest], spread, others[~np.isin(others, spread)]])

    @property
    def screening(self) -> int:
        """How many of the first clips tell numbers of linears in float apart."""
        return -(-len(self.clips) // SCREENING_SHARE)

    @property
    def nearest(self) -> int:
        """How many clips `order` begins with by their margins alone."""
        return max(NEAREST, self.screening)

    def decided(self, logits: Array) -> bool:
        """Whether other logits (n, classes) for the first n clips of `order` show that no later answer will change.

        An answer changes if the best logit falls behind another one: if their difference moves by the margin at least.
        Every later margin has to be larger than `SAFE_DEVIATIONS` root mean squares of these movements, on the clip
        where they are largest, and than `SAFE_FACTOR` times the largest movement of all. If movements were Gaussian, an
        answer would then change with a probability below 1e-15 for each other class. With a budget that was given, all
        clips are answered.
        """
        count, classes = logits.shape
        if self.max_drop is not None or classes < 2 or count < self.nearest + SPREAD:
            return False
        exact = self.logits[self.order[:count]]
        errors = logits.astype(np.float64) - exact
        moved = errors - np.take_along_axis(errors, exact.argmax(axis=1)[:, None], axis=1)
        deviation = np.sqrt((moved * moved).sum(axis=1).max() / (classes - 1))
        least = self.margins[self.order[count:]].min(initial=np.inf)
        return bool(least > max(SAFE_DEVIATIONS * deviation, SAFE_FACTOR * moved.max()))

    def verdict(self, logits: Array, judged: npt.NDArray[np.intp] | None = None, certain: bool = False) -> Verdict:
        """The verdict on other logits (n, classes) for the clips (n,) `judged`, by default the first n.

        Where clips are left, they can at best agree; with labels they can at best be right where the float graph is
        wrong. So a graph that is not within the budget then will not be whatever it answers to them: judging may stop
        there (a curtailed test) without changing who passes.

        Args:
            certain: the answers to the other clips are those of the float graph.
        """
        judged = np.arange(len(logits)) if judged is None else judged
        labelled, truth, exact = self.labelled, self.clips.labels[judged], self.logits[judged]
        others = np.setdiff1d(np.arange(len(self.clips)), judged)
        sqnr, clips = metrics.sqnr(exact, logits), len(judged)
        if certain:
            logits = np.concatenate([logits, self.logits[others]])
            judged, others = np.concatenate([judged, others]), others[:0]
            truth, exact = self.clips.labels[judged], self.logits[judged]
        agreement = metrics.agreement(exact, logits)
        top1 = metrics.top_k(logits, truth) if labelled else None
        top1_float = metrics.top_k(exact, truth) if labelled else None
        loss = 1 - agreement if top1 is None or top1_float is None else top1_float - top1
        if len(others):
            lost = loss * len(judged)
            if labelled:
                lost -= len(others) * (1 - metrics.top_k(self.logits[others], self.clips.labels[others]))
            loss = max(0.0, lost / len(self.clips))
        unseen = len(judged) - clips
        return Verdict(clips, labelled, top1, top1_float, agreement, sqnr, 100 * loss, self.points, len(others), unseen)


@dataclass(frozen=True)
class Judged:
    """A quantised graph, judged by the first n clips of `AccuracyBudget.order`.

    Attributes:
        logits: (n, classes).
        biases: the corrected ones.
    """

    verdict: Verdict
    logits: Array
    biases: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchResult:
    """The linears to quantise, why the others stay float, the sensitivity ranking, and the verdict on the result."""

    quantised: frozenset[str]
    reasons: Mapping[str, str]
    ranking: Mapping[str, float]
    verdict: Verdict


def compute_logits(
    model: onnx.ModelProto,
    clips: Clips,
    open_graph: OpenGraph,
    stage: str,
    progress: Progress = silent,
    some: npt.NDArray[np.intp] | None = None,
) -> Array:
    """Logits (n, classes) of a graph with batch 1, of all clips or those numbered `some`."""
    call, name = open_graph(model), model.graph.input[0].name
    numbers = range(len(clips)) if some is None else some.tolist()
    answers = in_order(lambda index: call({name: clips.frames[index][None]})[0], numbers)
    return np.concatenate(list(track(answers, stage, len(numbers), progress)))


def judge(
    answer: Callable[[Frames], Array],
    budget: AccuracyBudget,
    stage: str = "judge accuracy",
    progress: Progress = silent,
    most: int | None = None,
    known: Array | None = None,
    least: int = 0,
    together: bool = False,
) -> Judged:
    """Judge answers. It ends with the clip at which the budget is exceeded for certain, or no other answer can change.

    Args:
        answer: clips (1, T, H, W, 3) uint8 -> logits (1, classes).
        most: clips to judge by, all by default.
        known: the logits (n, classes) for the first clips of the budget's order, from a judgement that ended early.
        least: clips that are answered unless the budget is exceeded.
        together: threads may call `answer`, and a few clips more than are judged may be answered.
    """
    order, start = budget.order[:most], 0 if known is None else len(known)
    found = np.empty((len(order), budget.logits.shape[1]), budget.logits.dtype)
    if known is not None:
        found[:start] = known

    def answered(index: int) -> Array:
        row: Array = answer(budget.clips.frames[index][None])[0]
        return row

    left = order[start:].tolist()
    answers = in_order(answered, left) if together else map(answered, left)
    for count in track(range(start, len(order)), stage, len(order) - start, progress):
        if count >= least and budget.decided(found[:count]):
            return Judged(budget.verdict(found[:count], order[:count], certain=True), found[:count])
        found[count] = next(answers)
        verdict = budget.verdict(found[: count + 1], order[: count + 1])
        if not verdict.within_budget:
            return Judged(verdict, found[: count + 1])
    if len(order) < len(budget.clips):
        return Judged(budget.verdict(found, order), found)
    return Judged(budget.verdict(found[np.argsort(order)]), found)


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
    first = _evaluate(calibrator, state, budget, admitted)
    if first.verdict.within_budget:
        return SearchResult(admitted, reasons, {}, first.verdict)
    ranking = rank(calibrator, state, budget, admitted)
    worst = sorted(ranking, key=lambda name: -ranking[name])
    most = _max_fallbacks(worst, work, (1 - MIN_INT8_SHARE) * sum(work[name] for name in admitted))
    tried = {0: first}

    def fits(count: int) -> bool:
        if count not in tried:
            tried[count] = _evaluate(calibrator, state, budget, admitted - frozenset(worst[:count]), budget.screening)
        return tried[count].verdict.within_budget

    low, guess = 1, _guess(budget, [ranking[name] for name in worst])
    while (count := _smallest(low, most, fits, guess)) <= most:
        fallen = frozenset(worst[:count])
        found = _evaluate(calibrator, state, budget, admitted - fallen, known=tried[count])
        if found.verdict.within_budget:
            reasons |= {name: f"fell back: alone it moves the logits by {ranking[name]:.1%}" for name in fallen}
            return SearchResult(admitted - fallen, reasons, ranking, found.verdict)
        tried[count] = found
        low = guess = count + 1
    raise ParityError(
        f"INT8 loses {tried[most].verdict} with the {most} most sensitive of {len(admitted)} linears in floating "
        "point; nothing was written: allow more with --max-drop, give more --calib clips, or use a float target"
    )


def _smallest(low: int, high: int, fits: Callable[[int], bool], guess: int) -> int:
    """The smallest number from `low` to `high` that fits, where all above one that fits do; `high` + 1 if none does.

    The search begins at the guess and goes from there in steps that double, until it has one that fits and one that
    does not; then it halves.
    """
    end, step, above, below = high + 1, 1, False, False
    probe = min(max(guess, low), high)
    while low < end:
        if fits(probe):
            end, above = probe, True
        else:
            low, below = probe + 1, True
        if above and below:
            probe = (low + end) // 2
        else:
            probe = max(end - step, low) if above else min(low - 1 + step, high)
            step *= 2
    return end


def _guess(budget: AccuracyBudget, ranking: Sequence[float]) -> int:
    """About how many of the most sensitive linears have to be in float.

    As if their errors were independent and Gaussian, and all classes had the same: the number at which no more answers
    are expected to change than may.

    Args:
        ranking: relative error of the logits by each linear, in falling order.
    """
    if budget.logits.shape[1] < 2:
        return 1
    scale = float(np.sqrt(np.mean(np.square(budget.logits, dtype=np.float64))))
    noise = scale * np.sqrt(np.cumsum(np.square(np.asarray(ranking, np.float64)[::-1]))[::-1])
    for count in range(1, len(ranking)):
        share = np.mean([0.5 * math.erfc(gap / max(2 * noise[count], 1e-30)) for gap in budget.margins.tolist()])
        if 100 * share <= budget.points:
            return count
    return len(ranking)


def _max_fallbacks(worst: list[str], work: Mapping[str, int], allowance: float) -> int:
    """How many of `worst`, in order, may fall back within an allowance of multiply-accumulates."""
    spent = np.cumsum([work[name] for name in worst])
    return int(np.searchsorted(spent, allowance, side="right"))


def _evaluate(
    calibrator: LayerwiseCalibrator,
    state: CalibrationState,
    budget: AccuracyBudget,
    quantised: frozenset[str],
    most: int | None = None,
    known: Judged | None = None,
) -> Judged:
    """Judge a set of linears; its corrected biases are left in `state`.

    Args:
        most: clips to judge by, all by default.
        known: the same set, judged by the first clips.
    """
    if known is None:
        calibrator.correct_biases(state, quantised)
    else:
        state.biases = dict(known.biases)
    call = calibrator.open(calibrator.fake_quantized(state, quantised))
    logits = None if known is None else known.logits
    found = judge(
        lambda frames: call({calibrator.input: frames})[0],
        budget,
        progress=calibrator.progress,
        most=most,
        known=logits,
        together=True,
    )
    return replace(found, biases=dict(state.biases))


def rank(
    calibrator: LayerwiseCalibrator, state: CalibrationState, budget: AccuracyBudget, names: frozenset[str]
) -> dict[str, float]:
    """Sensitivity of each linear: relative root mean square error of the logits with that one quantised.

    The order of those that hardly matter does not matter either, so it is that on few clips.
    """
    fewest, most = RANKING_CLIPS
    count = max(fewest, min(most, int(RANKING_MACS // sum(graphs.macs(calibrator.model).values()))))
    some = list(range(0, len(budget.clips), max(1, len(budget.clips) // count))[:count])
    few = some[:: max(1, len(some) // fewest)][:fewest]
    state.biases.clear()
    answers: dict[str, list[Array]] = defaultdict(list)

    def answer(names: Collection[str], numbers: Sequence[int], stage: str) -> None:
        clips = [budget.clips.frames[i] for i in numbers]
        found = calibrator.one_by_one(state, frozenset(names), clips)
        for name, logits in track(found, stage, len(names), calibrator.progress):
            answers[name].append(logits)

    def error(name: str) -> float:
        logits = np.concatenate(answers[name])
        return float(10 ** (-metrics.sqnr(budget.logits[numbers[: len(logits)]], logits) / 20))

    numbers = [*few, *(i for i in some if i not in few)]
    answer(names, few, "rank linears")
    ranking = {name: error(name) for name in answers}
    if others := numbers[len(few) :]:
        worst = sorted(ranking, key=lambda name: -ranking[name])
        expected = _guess(budget, [ranking[name] for name in worst])
        again = worst[: max(math.ceil(RANKED_AGAIN * len(names)), RANKED_MARGIN * expected)]
        answer(again, others, "rank the most sensitive")
        ranking |= {name: error(name) for name in again}
    return ranking
