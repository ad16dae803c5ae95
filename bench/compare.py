"""Metrics of two models on the same clips, computed from their logits.

Each clip is reduced to a few numbers as soon as both models have answered it, so memory does not grow with the number
of classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetube import metrics
from edgetube.errors import ParityError
from edgetube.runtimes.base import Logits
from edgetube.targets import Status

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

QUARTERS = 4
"""Parts that the clips are put in by the reference's margin, to see whether answers flip where it was sure."""


@dataclass(frozen=True)
class ClipMetrics:
    """The metrics of each of N clips: all that is kept of an artifact's answers.

    Attributes:
        label: (N,) index of the true class, -1 where it is unknown.
        reference, answer: (N,) top-1 class of the reference and of the artifact.
        reference_rank, rank: (N,) place of the label among the logits, 0 the largest; -1 without a label.
        reference_score, score: (N,) softmax of the own top-1 class.
        margin: (N,) largest minus second largest logit of the reference.
        kl: (N,) KL(reference || artifact), nats.
        cosine: (N,) of the two logit vectors.
        error: (N,) largest absolute error of a logit.
        largest: (N,) largest |logit| of the reference.
        signal, noise: (N,) sums over the logits of reference^2 and of (reference - artifact)^2.
    """

    label: Integers
    reference: Integers
    answer: Integers
    reference_rank: Integers
    rank: Integers
    reference_score: Floats
    score: Floats
    margin: Floats
    kl: Floats
    cosine: Floats
    error: Floats
    largest: Floats
    signal: Floats
    noise: Floats

    @property
    def flipped(self) -> npt.NDArray[np.bool_]:
        """(N,) whether the two top-1 classes differ."""
        return np.not_equal(self.reference, self.answer)


def clip_metrics(reference: Logits, logits: Logits, labels: Integers) -> ClipMetrics:
    """Compare two sets of logits (N, classes) on clips with the class indices `labels` (N,), -1 for unknown.

    Raises:
        ParityError: a logit of the artifact is not finite.
    """
    if not (finite := np.isfinite(logits).all(axis=1)).all():
        raise ParityError(f"the artifact gave NaN or infinite logits on {int((~finite).sum())} of {len(logits)} clips")
    known, some = labels >= 0, np.maximum(labels, 0)
    difference = reference.astype(np.float64) - logits
    return ClipMetrics(
        label=labels,
        reference=reference.argmax(axis=1),
        answer=logits.argmax(axis=1),
        reference_rank=np.where(known, metrics.ranks(reference, some), -1),
        rank=np.where(known, metrics.ranks(logits, some), -1),
        reference_score=metrics.softmax(reference).max(axis=1),
        score=metrics.softmax(logits).max(axis=1),
        margin=metrics.margins(reference).astype(np.float64),
        kl=metrics.kl_rows(reference, logits),
        cosine=metrics.cosine_rows(reference, logits),
        error=np.abs(difference).max(axis=1),
        largest=np.abs(reference).max(axis=1).astype(np.float64),
        signal=(reference.astype(np.float64) ** 2).sum(axis=1),
        noise=(difference**2).sum(axis=1),
    )


def join(parts: Sequence[ClipMetrics], order: Integers) -> ClipMetrics:
    """Concatenate the metrics of several parts, then put the clips in `order` (N,)."""
    return ClipMetrics(*(np.concatenate([getattr(part, f.name) for part in parts])[order] for f in fields(ClipMetrics)))


@dataclass(frozen=True)
class Parity:
    """One artifact against its reference, on the same clips.

    Attributes:
        clips: how many; `labelled` of them have a label.
        agreement: share of clips with the same top-1 class; `agreement_low` and `agreement_high` are the ends of its
            95 % Wilson interval.
        top1, top1_reference: accuracy on the labelled clips; None without labels.
        cosine: of the logits, the worst clip.
        kl: mean KL(reference || artifact), nats.
        max_abs_error: of a logit.
        max_abs_logit: of the reference, to read the error against.
        status: `executed` or `emulated`.
        agreement_high, top5, top5_reference: as above; None for five classes or fewer.
        drop: top1_reference - top1, in percentage points.
        sure_flips: share of clips with another top-1 class, of the half where the reference's margin is larger.
        sqnr: 10 log10(sum reference^2 / sum (reference - artifact)^2) over all logits of all clips, dB; infinite where
            they are equal.
    """

    clips: int
    labelled: int
    agreement: float
    agreement_low: float
    top1: float | None
    top1_reference: float | None
    cosine: float
    kl: float
    max_abs_error: float
    max_abs_logit: float
    status: Status
    agreement_high: float
    top5: float | None
    top5_reference: float | None
    drop: float | None
    sure_flips: float
    sqnr: float

    @property
    def relative_error(self) -> float:
        """Largest logit error over the largest |logit| of the reference, the latter at least 1."""
        return self.max_abs_error / max(1.0, self.max_abs_logit)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: an infinite `sqnr` is None."""
        return asdict(self) | {"sqnr": self.sqnr if np.isfinite(self.sqnr) else None}


def summarise(found: ClipMetrics, classes: int, status: Status) -> Parity:
    """The numbers of all clips together; `classes` is how many logits a clip has."""
    known = found.label >= 0
    agreement = float((~found.flipped).mean())
    low, high = metrics.wilson(agreement, len(found.label))
    sure = np.argsort(found.margin, kind="stable")[len(found.label) // 2 :]

    def top(ranks: Integers, k: int) -> float | None:
        return float((ranks[known] < k).mean()) if known.any() and k < classes else None

    top1, top1_reference = top(found.rank, 1), top(found.reference_rank, 1)
    return Parity(
        clips=len(found.label),
        labelled=int(known.sum()),
        agreement=agreement,
        agreement_low=low,
        agreement_high=high,
        top1=top1,
        top1_reference=top1_reference,
        top5=top(found.rank, 5),
        top5_reference=top(found.reference_rank, 5),
        drop=None if top1 is None or top1_reference is None else 100 * (top1_reference - top1),
        sure_flips=float(found.flipped[sure].mean()),
        cosine=float(found.cosine.min()),
        kl=float(found.kl.mean()),
        max_abs_error=float(found.error.max()),
        max_abs_logit=float(found.largest.max()),
        status=status,
        sqnr=metrics.decibels(float(found.signal.sum()), float(found.noise.sum())),
    )


@dataclass(frozen=True)
class Quarter:
    """Clips whose margin in the reference lies between two logit differences, and how many of them flipped."""

    margin_low: float
    margin_high: float
    clips: int
    flips: int


def quarters(found: ClipMetrics) -> tuple[Quarter, ...]:
    """Flips by the reference's margin, least sure clips first; fewer than `QUARTERS` parts for fewer clips."""
    order = np.argsort(found.margin, kind="stable")
    parts = [part for part in np.array_split(order, QUARTERS) if len(part)]
    return tuple(
        Quarter(*_ends(found.margin[part]), clips=len(part), flips=int(found.flipped[part].sum())) for part in parts
    )


def _ends(values: Floats) -> tuple[float, float]:
    return float(values[0]), float(values[-1])


@dataclass(frozen=True)
class ClassRow:
    """The labelled clips of one class; `drop` in percentage points of top-1."""

    label: str
    clips: int
    top1: float
    top1_reference: float
    agreement: float
    drop: float


def per_class(found: ClipMetrics, labels: Sequence[str]) -> tuple[ClassRow, ...]:
    """The classes that have labelled clips, largest drop first."""
    made = []
    for index in np.unique(found.label[found.label >= 0]):
        own = found.label == index
        top1, reference = float((found.rank[own] == 0).mean()), float((found.reference_rank[own] == 0).mean())
        agreement = float((~found.flipped[own]).mean())
        made.append(ClassRow(labels[index], int(own.sum()), top1, reference, agreement, 100 * (reference - top1)))
    return tuple(sorted(made, key=lambda row: (-row.drop, row.agreement, row.label)))


@dataclass(frozen=True)
class WorstClip:
    """A clip on which an artifact differs from the reference.

    Attributes:
        name: of the clip.
        label: the true class, or None.
        reference, bundle: (class, its softmax) of the two answers.
        flipped: whether the classes differ.
        margin, kl, max_abs_error: see `ClipMetrics`.
    """

    name: str
    label: str | None
    reference: tuple[str, float]
    bundle: tuple[str, float]
    flipped: bool
    margin: float
    kl: float
    max_abs_error: float

    def to_json(self) -> dict[str, Any]:
        pairs = {key: dict(zip(("label", "score"), getattr(self, key), strict=True)) for key in ("reference", "bundle")}
        return asdict(self) | pairs


def worst(found: ClipMetrics, names: Sequence[str], labels: Sequence[str], count: int) -> tuple[WorstClip, ...]:
    """The clips that differ most: flipped ones first, then by KL."""
    order = np.lexsort((np.arange(len(found.kl)), -found.kl, ~found.flipped))[:count]
    return tuple(
        WorstClip(
            name=names[i],
            label=labels[found.label[i]] if found.label[i] >= 0 else None,
            reference=(labels[found.reference[i]], float(found.reference_score[i])),
            bundle=(labels[found.answer[i]], float(found.score[i])),
            flipped=bool(found.flipped[i]),
            margin=float(found.margin[i]),
            kl=float(found.kl[i]),
            max_abs_error=float(found.error[i]),
        )
        for i in order
    )
