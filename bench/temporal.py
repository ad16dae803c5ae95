"""Parity over a long video with a sliding window: when do the predicted classes change?

In addition to the metrics of each window: how often each model's class changes, how late it follows the reference, and
the health of the stream, because dropped or repeated frames explain some of the changes. If asked for: the spans that
an app would get from the answers, and what a gate that skips still clips would save and cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetube import datasets
from edgetube.bench import model_set, parity
from edgetube.bench.model_set import Artifact, JobResult, OpenedModels
from edgetube.bench.parity import REFERENCE, Comparison, MetricsAccumulator
from edgetube.bench.spans import SpanAgreement, compare
from edgetube.bench.stream_health import Health, Watch
from edgetube.bundle import Bundle
from edgetube.datasets import ClipSet
from edgetube.live.decisions import Decider, DecisionRule, Event, Span
from edgetube.live.novelty import NoveltyGate
from edgetube.live.scheduler import clips
from edgetube.live.source import FrameSource
from edgetube.live.window import Window, step
from edgetube.progress import Progress, silent
from edgetube.runtimes.base import Logits
from edgetube.video import Clip

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Steadiness:
    """How one model's class changes over the windows of a video, compared with the reference's.

    Attributes:
        name: of the bundle.
        agreement: share of windows with the reference's class.
        flip_rate: share of steps from one window to the next at which the class changes.
        onsets: how often it changes.
        missed: changes of the reference to a class that this model does not give while the reference does.
        onset_delay_mean_s, onset_delay_max_s: delay in seconds of its changes behind the reference's, without missed
            ones; negative where it leads. None without a change.
    """

    name: str
    agreement: float
    flip_rate: float
    onsets: int
    missed: int
    onset_delay_mean_s: float | None
    onset_delay_max_s: float | None


def flip_rate(answers: Integers) -> float:
    """Share of steps at which the class (N,) changes."""
    return float((answers[1:] != answers[:-1]).mean()) if len(answers) > 1 else 0.0


def runs(answers: Integers) -> list[tuple[int, int, int]]:
    """(class, first, end) of each stretch of equal answers (N,)."""
    edges = [0, *(np.flatnonzero(answers[1:] != answers[:-1]) + 1).tolist(), len(answers)]
    return [(int(answers[first]), first, end) for first, end in pairwise(edges) if end > first]


def steadiness(name: str, reference: Integers, answers: Integers, times: Floats) -> Steadiness:
    """Compare the classes (N,) of two models on windows whose newest frames come at `times` (N,), seconds."""
    own = runs(answers)
    delays, missed = [], 0
    for label, first, end in runs(reference)[1:]:
        start = next((s for found, s, e in own if found == label and s < end and e > first), None)
        if start is None:
            missed += 1
        else:
            delays.append(float(times[start] - times[first]))
    return Steadiness(
        name,
        agreement=float((reference == answers).mean()),
        flip_rate=flip_rate(answers),
        onsets=len(own) - 1,
        missed=missed,
        onset_delay_mean_s=float(np.mean(delays)) if delays else None,
        onset_delay_max_s=max(delays, default=None),
    )


class Follower:
    """What an app sees of one model: its smoothed classes, and its spans.

    Args:
        rule: None follows the classes alone.
    """

    def __init__(self, rule: DecisionRule | None, labels: Sequence[str]) -> None:
        self._decider = None if rule is None else Decider(rule, labels)
        self._classes: list[int] = []
        self._smoothed: list[int] = []
        self._spans: list[Span] = []

    def push(self, seconds: float, logits: Logits, restarted: bool = False) -> None:
        """Follow the answer (labels,) to the window that ends at `seconds`, and that may have restarted before."""
        self._classes.append(int(logits.argmax()))
        if self._decider is None:
            return
        self._keep(self._decider.push(seconds, logits, restarted))
        smoothed = self._decider.smoothed
        assert smoothed is not None
        self._smoothed.append(int(smoothed.argmax()))

    def finish(self) -> None:
        """The source has ended."""
        if self._decider is not None:
            self._keep(self._decider.flush())

    def _keep(self, events: Sequence[Event]) -> None:
        self._spans += [event.span for event in events if event.kind == "closed"]

    @property
    def classes(self) -> Integers:
        """(N,) of each answer."""
        return np.array(self._classes, np.int64)

    @property
    def smoothed(self) -> Integers:
        """(N,) class of the largest smoothed score after each answer; empty without a rule."""
        return np.array(self._smoothed, np.int64)

    @property
    def spans(self) -> tuple[Span, ...]:
        """Those that have closed, in this order."""
        return tuple(self._spans)


@dataclass(frozen=True)
class Decided:
    """The spans of one model, beside the reference's.

    Attributes:
        name: of the bundle.
        flip_rate: share of steps at which the class of the largest smoothed score changes.
        spans: of the model.
        agreement: with the spans of the reference; None for the reference.
    """

    name: str
    flip_rate: float
    spans: tuple[Span, ...]
    agreement: SpanAgreement | None = None

    def to_json(self) -> dict[str, Any]:
        found = {"name": self.name, "flip_rate": self.flip_rate, "spans": [asdict(span) for span in self.spans]}
        return found if self.agreement is None else found | asdict(self.agreement)


@dataclass(frozen=True)
class Gated:
    """One model behind a gate that repeats the last answer to still clips, beside the same model on every window.

    Attributes:
        name: of the bundle, or "reference".
        flips: share of windows whose class differs.
        missed, onset_delay_mean_s, onset_delay_max_s: as for `Steadiness`, of the gated answers behind all answers.
        spans: the spans from gated answers, compared with those from all answers; None without a rule.
    """

    name: str
    flips: float
    missed: int
    onset_delay_mean_s: float | None
    onset_delay_max_s: float | None
    spans: SpanAgreement | None


@dataclass(frozen=True)
class Skipping:
    """What a gate does on a video.

    Attributes:
        threshold: in grey levels.
        refresh_after: in seconds.
        skipped: share of windows without inference.
        models: the reference, then one a bundle.
    """

    threshold: float
    refresh_after: float
    skipped: float
    models: tuple[Gated, ...]


class Gating:
    """Runs a gate beside models that answer every window, and repeats answers where it would skip."""

    def __init__(self, gate: NoveltyGate, followers: Sequence[Follower]) -> None:
        self.gate, self.followers = gate, followers
        self._held: list[Logits] = []
        self.windows = self.skipped = 0

    def push(self, clip: Clip, seconds: float, logits: Sequence[Logits], restarted: bool = False) -> None:
        """One window, and the answer (labels,) of each model."""
        self.windows += 1
        if restarted:
            self.gate.reset()
        if self.gate.changed(clip.frames, seconds):
            self.gate.answered(clip.frames, seconds)
            self._held = list(logits)
        else:
            self.skipped += 1
        for follower, held in zip(self.followers, self._held, strict=True):
            follower.push(seconds, held, restarted)

    def result(self, names: Sequence[str], every: Sequence[Follower], times: Floats, decided: bool) -> Skipping:
        models = []
        for name, own, gated in zip(names, every, self.followers, strict=True):
            found = steadiness(name, own.classes, gated.classes, times)
            models.append(
                Gated(
                    name, 1 - found.agreement, found.missed, found.onset_delay_mean_s, found.onset_delay_max_s,
                    compare(own.spans, gated.spans) if decided else None,
                )
            )  # fmt: skip
        return Skipping(self.gate.threshold, self.gate.refresh_after, self.skipped / self.windows, tuple(models))


@dataclass(frozen=True)
class Watched:
    """Bundles and their reference over the windows of one video.

    Attributes:
        comparison: of the windows as clips.
        windows: the windows, to be read again.
        hop: frames, of those that the contract's sampling takes, between two of them.
        stream: health of the video.
        reference_flip_rate, reference_onsets: of the reference.
        bundles: one a bundle, in the order given.
        rule: that spans were made with; None without.
        decided: spans of the reference, then one a bundle; empty without a rule.
        still: what a gate would do; None if it was not asked for.
    """

    comparison: Comparison
    windows: ClipSet
    hop: int
    stream: Health
    reference_flip_rate: float
    reference_onsets: int
    bundles: tuple[Steadiness, ...]
    rule: DecisionRule | None = None
    decided: tuple[Decided, ...] = ()
    still: Skipping | None = None

    def to_json(self) -> dict[str, Any]:
        """`video` of the document, see `docs/parity.md`."""
        return {
            "source": self.windows.name,
            "hop": self.hop,
            "windows": self.windows.count,
            "stream": asdict(self.stream),
            "reference": {"flip_rate": self.reference_flip_rate, "onsets": self.reference_onsets},
            "bundles": [asdict(one) for one in self.bundles],
            "decisions": self._decisions(),
            "still": None if self.still is None else asdict(self.still),
        }

    def _decisions(self) -> dict[str, Any] | None:
        if self.rule is None:
            return None
        reference, *others = [one.to_json() for one in self.decided]
        return {"rule": self.rule.to_json(), "reference": reference, "bundles": others}


def watch(
    bundles: Sequence[Bundle],
    source: Path,
    hop: int | None = None,
    *,
    reference: Bundle | None = None,
    threads: int | None = None,
    worst: int = parity.WORST,
    rule: DecisionRule | None = None,
    skip_still: float | bool = False,
    artifact: Callable[[Bundle], Artifact] = Artifact,
    progress: Progress = silent,
) -> Watched:
    """Run the reference and every bundle on a window that slides over a video file.

    Frames are sampled as `Runtime.stream` does it. A few windows are in memory at a time.

    Args:
        hop: frames, of those that the contract's sampling takes, between two windows; None takes a quarter of the
            clip.
        reference, threads, worst, artifact: as for `edgetube.bench.parity.measure`.
        rule: how answers become spans; None compares none.
        skip_still: also run a `NoveltyGate` with this threshold, True its own; every model answers all windows, and
            the gate's answers are compared with them.

    Raises:
        InputError: the video cannot be read, the bundles do not belong together, they sample segments of a whole
            video, or the rule does not fit their labels.
        ParityError: a bundle gave a logit that is not finite.
    """
    models = model_set.of_bundles(bundles, reference, threads, artifact)
    contract = models.contract
    hop = step(hop, contract).frames
    window = Window(contract, hop)
    accumulator, ends, starts = MetricsAccumulator(models), list[float](), list[float]()
    names = [REFERENCE, *(bundle.name for bundle in bundles)]
    every, gated = ([Follower(rule, models.labels) for _ in names] for _ in range(2))
    gating = None if skip_still is False else Gating(NoveltyGate(bundles[0].spec, skip_still), gated)
    frames = Watch()
    with OpenedModels(models) as opened, FrameSource(source) as film:
        found = clips(film, window, came=frames.see)
        while some := list(islice(found, models.chunk)):
            logits = opened.show(some, range(len(models.models)))
            accumulator.add(
                range(len(ends), len(ends) + len(some)), _names(some), JobResult((None,) * len(some), logits)
            )
            starts.extend(clip.start or 0.0 for clip in some)
            for i, clip in enumerate(some):
                ends.append(clip.end or 0.0)
                answers = [logits[model][i] for model in range(len(names))]
                for follower, answer in zip(every, answers, strict=True):
                    follower.push(ends[-1], answer, clip.restarted is not None)
                if gating is not None:
                    gating.push(clip, ends[-1], answers, clip.restarted is not None)
            progress("watch", len(ends), 0)
    for follower in (*every, *gated):
        follower.finish()
    progress("watch", len(ends), len(ends))
    windows = datasets.windows(source, starts)
    metrics = accumulator.clip_metrics()
    return Watched(
        comparison=accumulator.comparison(windows, worst),
        windows=windows,
        hop=hop,
        stream=frames.health(),
        reference_flip_rate=flip_rate(metrics[0].reference),
        reference_onsets=len(runs(metrics[0].reference)) - 1,
        bundles=tuple(
            steadiness(bundle.name, found.reference, found.answer, np.array(ends))
            for bundle, found in zip(bundles, metrics, strict=True)
        ),
        rule=rule,
        decided=() if rule is None else _decided(names, every),
        still=None if gating is None else gating.result(names, every, np.array(ends), rule is not None),
    )


def _decided(names: Sequence[str], followers: Sequence[Follower]) -> tuple[Decided, ...]:
    """The spans of all models, the reference first."""
    reference = followers[0].spans
    return tuple(
        Decided(name, flip_rate(one.smoothed), one.spans, compare(reference, one.spans) if i else None)
        for i, (name, one) in enumerate(zip(names, followers, strict=True))
    )


def _names(clips: Sequence[Clip]) -> list[str]:
    return [clip.name for clip in clips]
