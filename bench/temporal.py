"""Parity over a long video with a sliding window: when do the predicted classes change?

In addition to the metrics of each window: how often each model's class changes, how late it follows the reference, and
the health of the stream, because dropped or repeated frames explain some of the changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetube import datasets
from edgetube.bench import model_set, parity
from edgetube.bench.model_set import JobResult, OpenedModels
from edgetube.bench.parity import Comparison, MetricsAccumulator
from edgetube.bundle import Bundle
from edgetube.datasets import ClipSet
from edgetube.live.frame import Frame
from edgetube.live.scheduler import clips
from edgetube.live.source import FrameSource
from edgetube.live.window import Window
from edgetube.progress import Progress, silent
from edgetube.video import Clip

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

GAP = 1.5
"""A frame is missing where an interval is longer than this multiple of the median interval."""

STILL, MOVING, AROUND = 0.1, 0.5, 12
"""A frame is a duplicate if it changes by at most `STILL` of the median change of the `AROUND` frames on either side,
which is at least `MOVING` grey levels."""

STEP = 8
"""Stride of the pixels that are compared to see whether a frame changed."""

MOST = 255.0
"""Grey levels by which a frame changes whose size is another."""

ENDS = 4
"""The drift compares the rates of the first and the last of this many parts of the video."""


# --------------------------------------------------------------------------------------------------------------- stream


@dataclass(frozen=True)
class Gap:
    """`frames` frames are missing behind the one at second `at`."""

    at: float
    frames: int


@dataclass(frozen=True)
class Health:
    """Defects of a stream of frames.

    Attributes:
        frames, seconds: how many came, and from the first timestamp to the last.
        fps: frames per second, missing ones left out; 0 for a single frame.
        fps_drift_percent: change of that rate from the first to the last quarter of the frames.
        dropped: frames that are missing, by the gaps between timestamps.
        duplicated: frames that show what the one before them shows, while what is around them moves.
        gaps: where frames are missing.
    """

    frames: int
    seconds: float
    fps: float
    fps_drift_percent: float
    dropped: int
    duplicated: int
    gaps: tuple[Gap, ...]


class Watch:
    """Records the time and the change of each frame."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.changes: list[float] = []
        self._previous: npt.NDArray[np.int16] | None = None

    def see(self, frame: Frame) -> None:
        """The next frame."""
        sample = frame.pixels[::STEP, ::STEP].astype(np.int16)
        if self._previous is not None and self._previous.shape == sample.shape:
            self.changes.append(float(np.abs(sample - self._previous).mean()))
        elif self._previous is not None:
            self.changes.append(MOST)
        self._previous = sample
        self.times.append(frame.seconds)

    def health(self) -> Health:
        """The health of the stream, after all frames have passed."""
        return health(np.array(self.times), np.array(self.changes))


def health(times: Floats, changes: Floats) -> Health:
    """The health of a stream.

    Args:
        times: (N,) seconds of each frame.
        changes: (N - 1,) mean absolute change of each frame from the one before it, in grey levels.
    """
    if len(times) < 2:
        return Health(len(times), 0.0, 0.0, 0.0, 0, 0, ())
    steps = np.diff(times)
    usual = float(np.median(steps))
    missing = np.where(steps > GAP * usual, np.rint(steps / usual).astype(int) - 1, 0)
    whole = steps[missing == 0]
    part = max(1, len(whole) // ENDS)
    drift = 100 * (float(whole[:part].mean()) / float(whole[-part:].mean()) - 1)
    gaps = tuple(Gap(float(times[i]), int(missing[i])) for i in np.flatnonzero(missing))
    return Health(
        frames=len(times),
        seconds=float(times[-1] - times[0]),
        fps=1 / float(whole.mean()),
        fps_drift_percent=drift,
        dropped=int(missing.sum()),
        duplicated=_repeated(changes),
        gaps=gaps,
    )


def _repeated(changes: Floats) -> int:
    """Number of frames that do not change while their neighbours do."""
    around = np.pad(changes, AROUND, mode="reflect" if len(changes) > AROUND else "edge")
    usual = np.median(np.lib.stride_tricks.sliding_window_view(around, 2 * AROUND + 1), axis=1)
    return int(((usual >= MOVING) & (changes <= STILL * usual)).sum())


# -------------------------------------------------------------------------------------------------------------- answers


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
    """

    comparison: Comparison
    windows: ClipSet
    hop: int
    stream: Health
    reference_flip_rate: float
    reference_onsets: int
    bundles: tuple[Steadiness, ...]

    def to_json(self) -> dict[str, Any]:
        """`video` of the document, see `docs/parity.md`."""
        return {
            "source": self.windows.name,
            "hop": self.hop,
            "windows": self.windows.count,
            "stream": asdict(self.stream),
            "reference": {"flip_rate": self.reference_flip_rate, "onsets": self.reference_onsets},
            "bundles": [asdict(one) for one in self.bundles],
        }


def watch(
    bundles: Sequence[Bundle],
    source: Path,
    hop: int | None = None,
    *,
    reference: Bundle | None = None,
    threads: int | None = None,
    worst: int = parity.WORST,
    progress: Progress = silent,
) -> Watched:
    """Run the reference and every bundle on a window that slides over a video file.

    Frames are sampled as `Runtime.stream` does it. A few windows are in memory at a time.

    Args:
        hop: frames, of those that the contract's sampling takes, between two windows; None takes a quarter of the
            clip.
        reference, threads, worst: as for `edgetube.bench.parity.measure`.

    Raises:
        InputError: the video cannot be read, the bundles do not belong together, or they sample segments of a whole
            video.
        ParityError: a bundle gave a logit that is not finite.
    """
    models = model_set.of_bundles(bundles, reference, threads)
    contract = models.contract
    hop = max(1, contract.frames // 4) if hop is None else hop
    window = Window(contract, hop)
    accumulator, ends, starts = MetricsAccumulator(models), list[float](), list[float]()
    frames = Watch()
    with OpenedModels(models) as opened, FrameSource(source) as film:
        found = clips(film, window, came=frames.see)
        while some := list(islice(found, models.chunk)):
            logits = opened.show(some, range(len(models.models)))
            accumulator.add(
                range(len(ends), len(ends) + len(some)), _names(some), JobResult((None,) * len(some), logits)
            )
            starts.extend(clip.start or 0.0 for clip in some)
            ends.extend(clip.end or 0.0 for clip in some)
            progress("watch", len(ends), 0)
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
    )


def _names(clips: Sequence[Clip]) -> list[str]:
    return [clip.name for clip in clips]
