"""Which operating point to take: target, clip and number of tokens, by accuracy and latency on a machine.

`edgetube.export.points` exports the points of a grid; all of them are timed in turns, and answer a quarter of the
clips. Those that are certainly not worth more clips leave, the others go on to twice as many. Both happen on this
machine, or at another `Place`. The document of
`edgetube sweep --json` and how to read it: `docs/operating-points.md`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from edgetube import metrics, reduction, tubesets
from edgetube.bench import figures, latency, machine, workers
from edgetube.bench.answer_cache import AnswerCache
from edgetube.bench.model_set import Artifact, Model, ModelSet, ReferenceModel, identity_of, open_reference
from edgetube.bench.parity import Jobs
from edgetube.bundle import Bundle
from edgetube.contract import InputContract
from edgetube.datasets import ClipSet
from edgetube.errors import DeviceError, EdgetubeError, InputError, SpecError
from edgetube.progress import Progress, silent
from edgetube.reduction import Kind
from edgetube.runtimes.base import Backend
from edgetube.spec import ModelSpec, Triple
from edgetube.targets import need
from edgetube.views import SINGLE, Views

if TYPE_CHECKING:
    from edgetube.model.checkpoints import Checkpoint

SCHEMA = 1
PARTS = 4
"""The first round is on one of so many parts of the clips."""

ALL = "all"
"""How a user calls the number of tokens of the trained model."""


# ------------------------------------------------------------------------------------------------------------- the grid


@dataclass(frozen=True)
class Point:
    """An operating point.

    Attributes:
        name: unique in its grid: `onnx-fp32 keep50`, with the clip where there are several.
        target: a name of `edgetube targets`.
        clip: (frames, height, width).
        tubes: as the user stated them; `default` for the trained model's.
        keep_tokens: as the user stated it; `all` for those of the tubes.
        reduce: how tokens leave; None where all stay.
        spec: of the model at this point; None where it cannot exist.
        problem: why it cannot.
        views: of a clip; one answer takes a call of the model for each.
    """

    name: str
    target: str
    clip: Triple
    tubes: str
    keep_tokens: str
    reduce: Kind | None
    spec: ModelSpec | None
    problem: str = ""
    views: Views = SINGLE

    @property
    def tokens(self) -> int | None:
        """Tokens of the tubes behind the last block."""
        return None if self.spec is None else self.spec.left

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of one answer: of all views."""
        return None if self.spec is None else self.spec.macs() * self.views.count


def grid(
    trained: ModelSpec,
    targets: Sequence[str],
    frames: Sequence[int] = (),
    sizes: Sequence[tuple[int, int]] = (),
    keep_tokens: Sequence[str] = (),
    reduce: Sequence[Kind] = ("merge",),
    views: Sequence[Views] = (SINGLE,),
    tubes: Sequence[str] = (),
) -> tuple[Point, ...]:
    """Every combination, with the trained tubes and `tubes`, and of each all tokens and each of `keep_tokens`.

    Points that cannot exist say why.

    Args:
        frames, sizes: of the clips, (height, width); the trained model's if empty.
        keep_tokens: see `edgetube.reduction.parse`; shares and counts are of each clip's own tokens.
        views: of a clip, each a point of its own.
        tubes: see `edgetube.tubesets.parse`.

    Raises:
        InputError: a number of tokens that is none, tubes that the model has not, or two ways to the same number.
    """
    clips = list(product(frames or (trained.frames,), sizes or (trained.clip[1:],)))
    sets = {text: tubesets.parse(text, trained) for text in (tubesets.DEFAULT, *tubes)}
    points: dict[str, Point] = {}
    for (count, size), (named, chosen), asked in product(clips, sets.items(), dict.fromkeys((ALL, *keep_tokens))):
        if named != tubesets.DEFAULT and chosen is None:  # the trained ones by other words
            continue
        clip, spec, problem, own = (count, *size), None, "", "" if chosen is None else f"tubes {named}"
        try:
            spec = trained.with_clip(count, size, chosen)
            own = spec.tubes_label(trained)
        except (SpecError, InputError) as error:
            problem = str(error)
        for kind in (None,) if asked == ALL else dict.fromkeys(reduce):
            at, label, why = spec, "", problem
            if kind is not None:
                at, label, why = _reduced(spec, asked, kind, problem)
            for target, shown in product(dict.fromkeys(targets), dict.fromkeys(views)):
                words = [target, own, label, "x".join(map(str, clip)) if len(clips) > 1 else ""]
                words += [f"{shown} views"] if len(set(views)) > 1 else []
                name = " ".join(filter(None, words))
                found = Point(name, target, clip, named, asked, kind, at, why, shown)
                if (first := points.setdefault(name, found)).spec != at:
                    ways = [f"--tubes {one.tubes} --keep-tokens {one.keep_tokens}" for one in (first, found)]
                    raise InputError(
                        f"{' and '.join(ways)} both leave {found.tokens} tokens, in different ways; sweep them one at "
                        "a time"
                    )
    return tuple(points.values())


def _reduced(spec: ModelSpec | None, asked: str, kind: Kind, problem: str) -> tuple[ModelSpec | None, str, str]:
    """The model with fewer tokens, its label, and why there is none."""
    named = f"{reduction.LABELS[kind]}{asked}"
    reduction.counts(asked, spec.tokens if spec else 1)
    if spec is None:
        return None, named, problem
    try:
        found = reduction.parse(asked, kind, spec.tokens, spec.depth)
        return replace(spec, reduction=found), found.label, ""
    except (SpecError, InputError) as error:
        return None, named, str(error)


# ----------------------------------------------------------------------------------------------------------- the search


@dataclass(frozen=True)
class Rule:
    """What is looked for: one of the two limits, or neither, which asks for the Pareto front alone.

    Attributes:
        budget_ms: the most accurate point whose median call takes so long at most.
        min_accuracy: the fastest point with so much accuracy at least, a share.
    """

    budget_ms: float | None = None
    min_accuracy: float | None = None

    def __post_init__(self) -> None:
        if self.budget_ms is not None and self.min_accuracy is not None:
            raise InputError("a budget and a smallest accuracy were given; the rule takes one of the two")
        if self.budget_ms is not None and not 0 < self.budget_ms < math.inf:
            raise InputError(f"budget-ms is {self.budget_ms}; expected more than 0, and finite")
        if self.min_accuracy is not None and not 0 <= self.min_accuracy <= 1:
            raise InputError(f"the smallest accuracy is {self.min_accuracy}; expected a share, 0 to 1")

    @property
    def limited(self) -> bool:
        """Whether one point is looked for."""
        return self.budget_ms is not None or self.min_accuracy is not None

    def allows(self, one: Standing) -> bool:
        """Whether a point may win."""
        if self.min_accuracy is not None:
            return one.accuracy >= self.min_accuracy
        return self.budget_ms is None or one.p50_ms <= self.budget_ms

    def __str__(self) -> str:
        if self.budget_ms is not None:
            return f"the most accurate point within {self.budget_ms:g} ms"
        if self.min_accuracy is not None:
            return f"the fastest point with at least {self.min_accuracy:.2%}"
        return "the Pareto front"


@dataclass(frozen=True)
class Standing:
    """What is known of a point during the search.

    Attributes:
        p50_ms: median of an answer; `low_ms` and `high_ms` are the ends of its 95 % interval.
        right: clips that it answered rightly, of `clips`.
    """

    name: str
    p50_ms: float
    low_ms: float
    high_ms: float
    right: int = 0
    clips: int = 0

    @property
    def accuracy(self) -> float:
        """Share of right answers; 0 before the first clip."""
        return self.right / self.clips if self.clips else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return metrics.wilson(self.accuracy, self.clips)


def rounds(clips: int) -> list[int]:
    """How many clips are answered after each round: a quarter, then twice as many, up to all."""
    sizes = [math.ceil(clips / PARTS)]
    while sizes[-1] < clips:
        sizes.append(min(clips, 2 * sizes[-1]))
    return sizes


def too_slow(one: Standing, rule: Rule) -> str:
    """Why a point leaves before the first clip; empty if it does not."""
    if rule.budget_ms is None or one.low_ms <= rule.budget_ms:
        return ""
    return f"over the budget: {one.p50_ms:.4g} ms, {rule.budget_ms:g} ms are allowed"


def hopeless(one: Standing, others: Iterable[Standing], rule: Rule) -> str:
    """Why a point leaves after a round; empty if it goes on.

    Both intervals have to be apart from those of the point that it leaves for.
    """
    high = one.interval[1]
    if rule.min_accuracy is not None and high < rule.min_accuracy:
        return f"at most {high:.1%} after {one.clips} clips; {rule.min_accuracy:.1%} are asked for"
    better = [other for other in others if other.high_ms <= one.low_ms and other.interval[0] > high]
    if not better:
        return ""
    best = max(better, key=lambda other: (other.accuracy, -other.p50_ms))
    return (
        f"at most {high:.1%} after {one.clips} clips in {one.p50_ms:.4g} ms; {best.name} has at least "
        f"{best.interval[0]:.1%} in {best.p50_ms:.4g} ms"
    )


Ask = Callable[[Sequence[str], int, int], Mapping[str, "int | str"]]
"""(names, start, stop) -> right answers of each point to these clips, or why it gave none."""


def search(points: Sequence[Standing], clips: int, rule: Rule, ask: Ask) -> tuple[dict[str, Standing], dict[str, str]]:
    """Successive halving over the clips.

    Args:
        points: that were timed, and have answered nothing.

    Returns:
        What is known of every point in the end, and the reasons of those that left.
    """
    known = {one.name: one for one in points}
    left = {one.name: why for one in points if (why := too_slow(one, rule))}
    start = 0
    for stop in rounds(clips):
        going = [name for name in known if name not in left]
        if not going:
            break
        for name, found in ask(going, start, stop).items():
            if isinstance(found, str):
                left[name] = found
            else:
                known[name] = replace(known[name], right=known[name].right + found, clips=stop)
        standing = [known[name] for name in going if name not in left]
        left |= {one.name: why for one in standing if (why := hopeless(one, standing, rule))}
        start = stop
    return known, left


def beaten(one: Standing, others: Iterable[Standing]) -> Standing | None:
    """The most accurate point that is no slower and no less accurate, and better in one of them; None on the front."""
    better = [
        other
        for other in others
        if other.p50_ms <= one.p50_ms
        and other.accuracy >= one.accuracy
        and (other.p50_ms, other.accuracy) != (one.p50_ms, one.accuracy)
    ]
    return max(better, key=lambda other: (other.accuracy, -other.p50_ms), default=None)


def front(standing: Sequence[Standing]) -> list[Standing]:
    """The Pareto-optimal points, fastest first."""
    return sorted((one for one in standing if beaten(one, standing) is None), key=lambda one: (one.p50_ms, one.name))


def winner(standing: Sequence[Standing], rule: Rule) -> Standing | None:
    """The point that the rule asks for; None where no point keeps it, or the rule is the front alone."""
    allowed = [one for one in standing if rule.allows(one)]
    if rule.min_accuracy is not None:
        return min(allowed, key=lambda one: (one.p50_ms, -one.accuracy, one.name), default=None)
    if rule.budget_ms is not None:
        return min(allowed, key=lambda one: (-one.accuracy, one.p50_ms, one.name), default=None)
    return None


def reasons(standing: Sequence[Standing], rule: Rule) -> dict[str, str]:
    """Why points that answered all clips are not on the front, or may not win; nothing for the others."""
    found = {}
    for one in standing:
        if other := beaten(one, standing):
            found[one.name] = f"{other.name} has {other.accuracy:.1%} in {other.p50_ms:.4g} ms"
        elif not rule.allows(one):
            found[one.name] = "over the budget" if rule.budget_ms is not None else "less accurate than asked for"
    return found


# ---------------------------------------------------------------------------------------------------- the measurements


@dataclass(frozen=True)
class Trained(ReferenceModel):
    """The trained model with its own clip and all tokens, whatever the bundle's: the judge of clips without labels."""

    trained: ModelSpec

    def identity(self) -> Mapping[str, Any]:
        return identity_of(self.bundle.checkpoint["sha256"], self.trained)

    def open(self, threads: int | None) -> Backend:
        return open_reference(need("edgetube.formats", "export").trained(self.bundle), threads)


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        threads: CPU threads of a call; None leaves them to the runtime.
        seconds: of timed calls, each point.
    """

    threads: int | None = None
    seconds: float = 2.0


class Place(Protocol):
    """Where points are timed, and answer clips: this machine, or another one."""

    def measure(self, bundles: Sequence[Bundle], options: latency.Options, progress: Progress) -> Mapping[str, Any]:
        """The document of `edgetube.bench.latency.measure`, made there."""

    def artifact(self, bundle: Bundle) -> Artifact:
        """The model of a bundle that answers there; its identity says where."""

    def about(self) -> dict[str, Any] | None:
        """`device` of the document: name, machine and versions; None for this machine."""


class Here:
    """This machine."""

    def measure(self, bundles: Sequence[Bundle], options: latency.Options, progress: Progress) -> Mapping[str, Any]:
        return latency.measure(bundles, options, progress)

    def artifact(self, bundle: Bundle) -> Artifact:
        return Artifact(bundle)

    def about(self) -> None:
        return None


Reach = Callable[[Progress], AbstractContextManager[Place]]
"""Opens a place, when all points are exported."""


@contextmanager
def here(_: Progress) -> Iterator[Place]:
    """Reaches this machine."""
    yield Here()


class Answers:
    """Counts right answers of points; clips are read once for all points of a clip shape.

    Args:
        made: the bundles by their points' names.
        views: of each point; SINGLE where it is not there.
        source: in the order in which clips are asked for.
        checkpoint: the trained model, asked only for clips without labels, about the most views of any point.
        runner: in which processes the clips are answered, see `edgetube.bench.workers`.
        artifact: the model of a bundle, see `Place`.
    """

    def __init__(
        self,
        made: Mapping[str, Bundle],
        source: ClipSet,
        checkpoint: Checkpoint,
        cache: AnswerCache,
        threads: int | None = None,
        progress: Progress = silent,
        views: Mapping[str, Views] | None = None,
        runner: workers.Runner = workers.here,
        artifact: Callable[[Bundle], Artifact] = Artifact,
    ) -> None:
        self.views, self.runner, self.artifact = views or {}, runner, artifact
        self.made, self.source, self.checkpoint, self.cache = made, source, checkpoint, cache
        self.threads, self.progress = threads, progress
        self.labelled = is_labelled(source)
        self._truth: dict[tuple[int, int], npt.NDArray[np.int64]] = {}

    def __call__(self, names: Sequence[str], start: int, stop: int) -> dict[str, int | str]:
        """See `Ask`.

        Raises:
            InputError: a clip that cannot be read.
            DeviceError: the other machine cannot be reached any more, or refuses all points.
        """
        truth = self._right(start, stop)
        groups: dict[tuple[InputContract, Views], list[str]] = {}
        for name in names:
            groups.setdefault((self.made[name].contract, self.views.get(name, SINGLE)), []).append(name)
        found: dict[str, int | str] = {}
        for shown, group in groups.items():
            try:
                found |= self._count(*shown, group, start, stop, truth)
            except (InputError, DeviceError):  # of a clip or a device, not of a point
                raise
            except EdgetubeError:
                for name in group:
                    try:
                        found |= self._count(*shown, [name], start, stop, truth)
                    except DeviceError:
                        raise
                    except EdgetubeError as error:
                        found[name] = str(error)
        return found

    def _count(
        self,
        contract: InputContract,
        views: Views,
        names: Sequence[str],
        start: int,
        stop: int,
        truth: npt.NDArray[np.int64],
    ) -> dict[str, int | str]:
        logits = self._ask(contract, views, [self.artifact(self.made[name]) for name in names], start, stop)
        return {
            name: int((of.argmax(axis=1) == truth).sum())
            if np.isfinite(of).all()
            else f"{name} gave NaN or infinite logits"
            for name, of in zip(names, logits, strict=True)
        }

    def _right(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """(stop - start,) the right class of each clip."""
        if self.labelled:
            known = self.checkpoint.labels
            return np.array([known.index(str(item.label)) for item in self.source.items[start:stop]], np.int64)
        if (start, stop) not in self._truth:
            judge = Trained(next(iter(self.made.values())), self.checkpoint.spec)
            most = max(self.views.values(), key=lambda views: views.count, default=SINGLE)
            (logits,) = self._ask(self.checkpoint.contract, most, [judge], start, stop)
            self._truth[start, stop] = logits.argmax(axis=1)
        return self._truth[start, stop]

    def _ask(
        self, contract: InputContract, views: Views, models: Sequence[Model], start: int, stop: int
    ) -> list[npt.NDArray[np.float32]]:
        """Logits (stop - start, classes) of each model."""
        asked = replace(self.source, items=self.source.items[start:stop])
        models_of = ModelSet(tuple(models), contract, self.checkpoint.labels, self.threads, views=views)
        parts: dict[int, dict[int, Any]] = {index: {} for index in range(len(models))}
        done, stage = 0, f"clips {start + 1} to {stop}, {len(models)} points"
        for job, result in Jobs(models_of, asked, self.cache).run(self.runner):
            for index, logits in result.logits.items():
                parts[index] |= dict(zip(job.positions, logits, strict=True))
            done += len(job.items)
            self.progress(stage, done, stop - start)
        return [np.stack([of[position] for position in sorted(of)]) for of in parts.values()]


def is_labelled(source: ClipSet) -> bool:
    """Whether every clip has a label.

    Raises:
        InputError: no clips, or some with and some without.
    """
    if not source.items:
        raise InputError("no clips to sweep on: the data set is empty")
    known = sum(item.label is not None for item in source.items)
    if 0 < known < source.count:
        raise InputError(
            f"{known} of {source.count} clips of {source.name} have labels; give labels to all, or to none"
        )
    return known > 0


# ------------------------------------------------------------------------------------------------------------ the sweep

Make = Callable[[Sequence[Point]], "Iterable[tuple[Point, Bundle | str]]"]
"""Exports points: each with its bundle, or with why there is none."""


def prepared(source: ClipSet, points: Sequence[Point], checkpoint: Checkpoint) -> ClipSet:
    """The clips in the order in which they are asked for: all classes in every part, if there are enough of them.

    Raises:
        InputError: a label that the model does not know, or several views of what has one.
    """
    for views in {point.views for point in points}:
        source.check_views(views)
    return source.check_labels(checkpoint.labels).sample(source.count)


def run(
    points: Sequence[Point],
    make: Make,
    source: ClipSet,
    checkpoint: Checkpoint,
    rule: Rule,
    cache: AnswerCache,
    options: Options | None = None,
    progress: Progress = silent,
    runner: workers.Runner = workers.here,
    reach: Reach = here,
) -> tuple[dict[str, Any], dict[str, Bundle]]:
    """Export, time and search.

    Args:
        source: see `prepared`.
        runner: in which processes the clips are answered, see `edgetube.bench.workers`; not that of timed calls.
        reach: where the points are timed, and answer; they are exported on this machine. Nothing is reached where no
            point could be exported.

    Returns:
        The document of `edgetube sweep --json`, and the bundles by their points' names.

    Raises:
        InputError: no clips, some with labels and some without, or clips that cannot be read.
        DeviceError: another machine cannot be reached, or not any more; exports and answers are kept until then.
    """
    options = options or Options()
    views = {point.name: point.views for point in points}
    labelled = is_labelled(source)
    left = {point.name: point.problem for point in points if point.problem}
    made: dict[str, Bundle] = {}
    for point, bundle in make([point for point in points if not point.problem]):
        if isinstance(bundle, Bundle):
            made[point.name] = bundle
        else:
            left[point.name] = bundle
    device: dict[str, Any] | None = None
    measured: Mapping[str, Any] = {}
    times: dict[str, dict[str, Any]] = {}
    known: dict[str, Standing] = {}
    if made:
        with reach(progress) as place:
            device, measured = place.about(), _measured(made, options, place, progress)
            times = _times(made, measured, views)
            where = "here" if device is None else f"on {device['name']}"
            left |= {
                name: f"not timed {where}: {row['reason']}" for name, row in times.items() if row["p50_ms"] is None
            }
            start = [
                Standing(name, row["p50_ms"], row["p50_low_ms"], row["p50_high_ms"])
                for name, row in times.items() if row["p50_ms"] is not None
            ]  # fmt: skip
            ask = Answers(made, source, checkpoint, cache, options.threads, progress, views, runner, place.artifact)
            known, gone = search(start, source.count, rule, ask)
        left |= gone
    finished = [one for one in known.values() if one.name not in left]
    best, chosen = front(finished), winner(finished, rule)
    why = {**reasons(finished, rule), **left}
    on_front = [one.name for one in best]
    document = {
        "schema": SCHEMA,
        "rule": {**asdict(rule), "text": str(rule)},
        "checkpoint": checkpoint.record(),
        "data": {
            "name": source.name,
            "source": None if source.source is None else str(source.source),
            "clips": source.count,
            "quality": "top1" if labelled else "agreement",
            "rounds": rounds(source.count),
        },
        "device": device,
        "machine": machine.describe() if device is None else device["machine"],
        "versions": machine.versions() if device is None else device["versions"],
        "conditions": measured.get("conditions"),
        "options": asdict(options),
        "points": [
            _row(point, checkpoint.spec.macs(), made.get(point.name), times.get(point.name), known.get(point.name))
            | {
                "front": point.name in on_front,
                "winner": chosen is not None and point.name == chosen.name,
                "reason": why.get(point.name),
            }
            for point in points
        ],
        "front": on_front,
        "winner": None if chosen is None else chosen.name,
        "result": _result(rule, best, chosen),
        "notes": _notes(times, points, measured),
    }
    return document, made


def _result(rule: Rule, best: Sequence[Standing], chosen: Standing | None) -> str:
    """The result in one sentence."""
    if not rule.limited:
        return f"{rule}: {', '.join(one.name for one in best) or 'no point'}"
    if chosen is None:
        return f"{rule}: no point; the points say why"
    low, high = chosen.interval
    return f"{rule}: {chosen.name}, {chosen.p50_ms:.4g} ms, {chosen.accuracy:.1%} ({low:.1%} to {high:.1%})"


TIMES = ("p50_ms", "p50_low_ms", "p50_high_ms", "p10_ms", "p90_ms")
"""Of the rows of `latency.measure`, what takes as long as there are views."""


def _measured(made: Mapping[str, Bundle], options: Options, place: Place, progress: Progress) -> Mapping[str, Any]:
    """The document of `latency.measure`, each bundle once."""
    asked = latency.Options((options.threads,), seconds=options.seconds, starts=1)
    return place.measure(list(_distinct(made).values()), asked, progress)


def _distinct(made: Mapping[str, Bundle]) -> dict[Path, Bundle]:
    """Points that differ in their views alone share a bundle."""
    return {bundle.path: bundle for bundle in made.values()}


def _times(
    made: Mapping[str, Bundle], measured: Mapping[str, Any], views: Mapping[str, Views]
) -> dict[str, dict[str, Any]]:
    """The rows of `latency.measure` by the points' names, their times for all views."""
    rows = dict(zip(_distinct(made), measured.get("bundles", ()), strict=True))
    return {name: _of_views(rows[bundle.path], views[name].count) for name, bundle in made.items()}


def _of_views(row: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {key: value * count if key in TIMES and value is not None else value for key, value in row.items()}


def _row(
    point: Point, macs: int, bundle: Bundle | None, time: Mapping[str, Any] | None, standing: Standing | None
) -> dict[str, Any]:
    """One point of the document, whatever is known of it."""
    answered = standing if standing is not None and standing.clips else None
    low, high = answered.interval if answered else (None, None)
    own, timed = point.macs, (*TIMES, "noise")
    return {
        "name": point.name,
        "target": point.target,
        "precision": None if bundle is None else str(bundle.precision),
        "frames": point.clip[0],
        "size": list(point.clip[1:]),
        "tokens": point.tokens,
        "tubes": point.tubes,
        "keep_tokens": point.keep_tokens,
        "reduce": point.reduce,
        "views": asdict(point.views),
        "macs": own,
        "macs_ratio": None if own is None else own / macs,
        "bundle": None if bundle is None else str(bundle.path),
        "bytes": None if bundle is None else bundle.artifact_bytes,
        **{key: None if time is None else time[key] for key in timed},
        "clips": answered.clips if answered else 0,
        "accuracy": answered.accuracy if answered else None,
        "accuracy_low": low,
        "accuracy_high": high,
    }


def _notes(times: Mapping[str, Mapping[str, Any]], points: Sequence[Point], measured: Mapping[str, Any]) -> list[str]:
    several = max((point.views for point in points), key=lambda views: views.count)
    told = [f"times and MACs are of all views of a clip, {several} at most"] if several.count > 1 else []
    if measured and measured["conditions"]["throttled"]:
        told.append(f"{latency.HOT}; cool it, and run the sweep again")
    noisy = {name: row["noise"] for name, row in times.items() if row["noise"] and row["noise"] > latency.NOISY}
    if not noisy:
        return told
    worst = max(noisy, key=lambda name: float(noisy[name]))
    return [
        *told,
        f"the machine was not quiet: the median of {worst} is known to ±{noisy[worst]:.0%} only; smaller differences "
        "mean nothing",
    ]


def picture(document: Mapping[str, Any]) -> str:
    """Accuracy over latency of the points that have both, as the text of one SVG file; needs matplotlib.

    Raises:
        InputError: no point has both.
    """
    shown = [row | {"short": row["name"]} for row in document["points"] if row["accuracy"] is not None]
    if not shown:
        raise InputError("no point was timed and has answered clips; there is nothing to draw")
    title = "top-1, %" if document["data"]["quality"] == "top1" else "agreement with the trained model, %"
    return figures.operating_points(shown, "accuracy", title)
