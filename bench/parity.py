"""Does an artifact answer like the model that was trained? Clip by clip; nothing is kept but logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetube import metrics, runtimes
from edgetube.bundle import Bundle
from edgetube.errors import InputError, ParityError
from edgetube.model import checkpoints
from edgetube.progress import Progress, silent, track
from edgetube.runtimes.base import Backend
from edgetube.runtimes.torch import Reference
from edgetube.spec import InputContract
from edgetube.targets import Status
from edgetube.video import Clip

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Answers:
    """What one model said about a set of clips.

    Attributes:
        logits: (N, classes) float32, in the order of the clips.
        labels: (N,) index of the true class, -1 where it is unknown.
        names: of the clips.
        status: how the answers were made.
    """

    logits: Logits
    labels: npt.NDArray[np.int64]
    names: tuple[str, ...]
    status: Status


@dataclass(frozen=True)
class Parity:
    """One artifact against its reference, on the same clips.

    Attributes:
        clips: how many; `labelled` of them have a label.
        agreement: share of clips with the same top-1 class; `agreement_low` is the lower end of its 95 % Wilson
            interval.
        top1, top1_reference: accuracy on the labelled clips; None without labels.
        cosine: of the logits, the worst clip.
        kl: mean KL(reference || artifact), nats.
        max_abs_error: of a logit.
        max_abs_logit: of the reference, to read the error against.
        status: `executed` or `emulated`.
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

    @property
    def relative_error(self) -> float:
        """Largest logit error over the largest |logit| of the reference, the latter at least 1."""
        return self.max_abs_error / max(1.0, self.max_abs_logit)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def answer(
    backend: Backend,
    clips: Iterable[Clip],
    labels: tuple[str, ...],
    *,
    stage: str = "answer",
    total: int = 0,
    progress: Progress = silent,
) -> Answers:
    """Ask one model about every clip; frames are dropped as soon as they are answered.

    Raises:
        InputError: no clips, or a clip with a label that the model does not have.
    """
    logits: list[Logits] = []
    truth: list[int] = []
    names: list[str] = []
    for clip in track(clips, stage, total, progress):
        logits.append(backend(clip.frames[None]))
        truth.append(_index(clip, labels))
        names.append(clip.name)
    if not logits:
        raise InputError("no clips to compare on: the data set is empty")
    return Answers(np.concatenate(logits), np.array(truth, np.int64), tuple(names), backend.status)


def compare(reference: Answers, answers: Answers) -> Parity:
    """Measure `answers` against the reference's answers to the same clips.

    Raises:
        InputError: the two are not about the same clips.
        ParityError: a logit is not finite.
    """
    if reference.names != answers.names:
        raise InputError("the two sets of answers are not about the same clips in the same order")
    if not np.isfinite(answers.logits).all():
        bad = int((~np.isfinite(answers.logits)).any(axis=1).sum())
        raise ParityError(f"the artifact gave NaN or infinite logits on {bad} of {len(answers.names)} clips")
    agreement = metrics.agreement(reference.logits, answers.logits)
    known = reference.labels >= 0
    truth = reference.labels[known]

    def top1(of: Answers) -> float | None:
        return metrics.top_k(of.logits[known], truth) if known.any() else None

    return Parity(
        clips=len(answers.names),
        labelled=int(known.sum()),
        agreement=agreement,
        agreement_low=metrics.wilson(agreement, len(answers.names))[0],
        top1=top1(answers),
        top1_reference=top1(reference),
        cosine=metrics.cosine(reference.logits, answers.logits),
        kl=metrics.kl(reference.logits, answers.logits),
        max_abs_error=metrics.max_abs_error(reference.logits, answers.logits),
        max_abs_logit=float(np.abs(reference.logits).max()),
        status=answers.status,
    )


def measure(
    bundles: Sequence[Bundle],
    clips: Callable[[InputContract], Iterable[Clip]],
    *,
    total: int = 0,
    threads: int | None = None,
    progress: Progress = silent,
) -> list[tuple[Bundle, Parity]]:
    """Measure bundles of one checkpoint against its PyTorch reference.

    Args:
        bundles: made from one checkpoint, for one input contract.
        clips: gives the clips for a contract; called once for the reference and once for each bundle, so that no
            clip is kept.

    Raises:
        InputError: no bundles, or bundles of different checkpoints or contracts.
        CheckpointError: the checkpoint is no longer the one that the bundles were made from.
    """
    if not bundles:
        raise InputError("no bundles to compare")
    first = bundles[0]
    for bundle in bundles[1:]:
        if (bundle.checkpoint, bundle.contract) != (first.checkpoint, first.contract):
            raise InputError(f"{bundle.path} and {first.path} come from different checkpoints or inputs; compare apart")
    checkpoint = checkpoints.of_bundle(first)

    def ask(backend: Backend, stage: str) -> Answers:
        source = clips(first.contract)
        return answer(backend, source, first.labels, stage=stage, total=total, progress=progress)

    reference = ask(Reference(checkpoint.model, checkpoint.contract), "PyTorch reference")
    measured = []
    for bundle in bundles:
        device = runtimes.proof_device(bundle.target, bundle.backend)
        with runtimes.open_bundle(bundle, threads=threads, device=device) as backend:
            measured.append((bundle, compare(reference, ask(backend, bundle.name))))
    return measured


def to_json(measured: Sequence[tuple[Bundle, Parity]]) -> dict[str, Any]:
    """The document of `edgetube parity --json`; `docs/parity.md` explains the keys."""
    first = measured[0][0]
    rows = [{"name": b.name, "target": b.target, **p.to_json()} for b, p in measured]
    return {"reference": {"runtime": "torch", **first.checkpoint}, "bundles": rows}


def _index(clip: Clip, labels: tuple[str, ...]) -> int:
    if clip.label is None:
        return -1
    if clip.label not in labels:
        raise InputError(f"{clip.name} is labelled {clip.label!r}; the model knows {', '.join(labels[:12])}")
    return labels.index(clip.label)
