"""The models of one comparison: a reference and bundles, which all run on the same clips.

A clip is decoded once and given to every model, because decoding often costs more than inference. The logits depend on
the model and the clip alone, so jobs may run in any process (`edgetube.bench.workers`) and logits may be cached
(`edgetube.bench.answer_cache`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from typing_extensions import Self

from edgetube import metrics, runtimes
from edgetube.bench import machine
from edgetube.bundle import Bundle
from edgetube.contract import InputContract
from edgetube.datasets import Item
from edgetube.errors import CheckpointError, InputError, printable
from edgetube.reduction import Reduction
from edgetube.runtimes.base import Backend, Logits
from edgetube.spec import ModelSpec
from edgetube.targets import Status, need
from edgetube.video import Clip, Frames
from edgetube.views import SINGLE, Views

if TYPE_CHECKING:
    from edgetube.model.checkpoints import Checkpoint

CHUNK, CHUNK_BYTES = 8, 1 << 26
"""Clips that are in memory at a time: at most so many, of at most so many bytes, but one at least.

Models take turns in blocks of this size: the threads of a runtime spin for a while after each call and would take the
cores from the next one."""


class Model(Protocol):
    """A model that can be opened and run on clips.

    Attributes:
        bundle: the artifact, or an artifact that was made from it.
    """

    @property
    def bundle(self) -> Bundle: ...

    @property
    def name(self) -> str:
        """For progress and tables."""

    @property
    def status(self) -> Status:
        """How it is run here."""

    def identity(self) -> Mapping[str, Any]:
        """All that its logits depend on, as plain JSON."""

    def open(self, threads: int | None) -> Backend:
        """Open it with its backend."""


@dataclass(frozen=True)
class Artifact:
    """A bundle's artifact, on its own runtime or, where that is not here, its emulator."""

    bundle: Bundle

    @property
    def name(self) -> str:
        return self.bundle.name

    @property
    def device(self) -> str | None:
        return runtimes.device_of(self.bundle)

    @property
    def status(self) -> Status:
        return "emulated" if self.device == runtimes.EMULATED else "executed"

    def identity(self) -> Mapping[str, Any]:
        files = {name: record.sha256 for name, record in self.bundle.files.items()}
        return {"files": files, "backend": self.bundle.backend, "status": self.status, "build": self.bundle.build}

    def open(self, threads: int | None) -> Backend:
        return runtimes.open_bundle(self.bundle, threads=threads, device=self.device)


@dataclass(frozen=True)
class ReferenceModel:
    """The PyTorch model that a bundle was made from, with all tokens."""

    bundle: Bundle

    @property
    def name(self) -> str:
        return "PyTorch reference"

    @property
    def status(self) -> Status:
        return "executed"

    def identity(self) -> Mapping[str, Any]:
        return identity_of(self.bundle.checkpoint["sha256"], replace(self.bundle.spec, reduction=None))

    def open(self, threads: int | None) -> Backend:
        return open_reference(self.checkpoint().trained, threads)

    def checkpoint(self, bundle: Bundle | None = None) -> Checkpoint:
        """The checkpoint in the form of the bundle, or of another one of it, which may have fewer tokens."""
        bundle = bundle or self.bundle
        checkpoint: Checkpoint = need("edgetube.formats", "export").of_bundle(bundle)
        _must_match(bundle, checkpoint)
        return checkpoint


def identity_of(digest: str, spec: ModelSpec) -> Mapping[str, Any]:
    """All that the reference's logits depend on, as plain JSON; `digest` is that of the weights."""
    return {"checkpoint": digest, "model": spec.to_json()}


def open_reference(checkpoint: Checkpoint, threads: int | None) -> Backend:
    """The reference backend of a checkpoint."""
    opened: Backend = need("edgetube.runtimes.torch", "export").Reference(
        checkpoint.model, checkpoint.contract, threads
    )
    return opened


def _must_match(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """That a manifest states the input, labels and model of its checkpoint.

    Raises:
        CheckpointError: it does not; names the first thing that differs, and both values.
    """
    if found := _difference(_statement(bundle), _statement(checkpoint)):
        what, stated, trained = found
        raise CheckpointError(
            f"{bundle.path}: the manifest and its checkpoint differ in {what} is {stated}, the model was trained with "
            f"{trained}; export it again"
        )


def check_same_model(bundles: Sequence[Bundle]) -> None:
    """Check that bundles are of one model: the same input, labels, geometry and weights.

    Raises:
        InputError: they are not; names two of them, the first thing that differs, and both values.
    """
    first, *rest = bundles
    for bundle in rest:
        weights = ({"sha256": one.checkpoint.get("sha256")} for one in (first, bundle))
        pairs = zip((_statement(first), _statement(bundle)), weights, strict=True)
        if found := _difference(*({**stated, "checkpoint": digest} for stated, digest in pairs)):
            what, one, other = found
            raise InputError(
                f"{first.path} and {bundle.path} are not of one model, they differ in {what} is {one} and {other}; "
                "give bundles of one checkpoint and input"
            )


def _statement(of: Bundle | Checkpoint) -> dict[str, dict[str, Any]]:
    """What a bundle or checkpoint states: input, labels and model."""
    return {"input": of.contract.to_json(), "labels": {"labels": list(of.labels)}, "model": _stated(of.spec)}


def _difference(
    first: Mapping[str, Mapping[str, Any]], second: Mapping[str, Mapping[str, Any]]
) -> tuple[str, str, str] | None:
    """The first difference of two statements: where it is, and both values; None where there is none."""
    for what, stated in first.items():
        for key in sorted(stated.keys() | second[what].keys()):
            if (one := stated.get(key)) != (other := second[what].get(key)):
                return f"{what}: {key}", _short(one), _short(other)
    return None


def _stated(spec: ModelSpec) -> dict[str, Any]:
    """Of several classifiers an artifact has the first."""
    return replace(spec, classifiers=spec.classifiers[:1]).to_json()


def _short(value: Any) -> str:
    text = printable(str(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class ModelSet:
    """The models of a comparison; the first is the reference.

    Attributes:
        models: the reference and the bundles.
        contract: the input of all of them.
        labels: class names, in the order of the logits of all of them.
        threads: CPU threads of one call; None leaves the choice to each runtime, see `own_threads`.
        share: the threads that a process should take where `threads` is None: it shares the cores with others.
        views: of each clip; the answer to it is the mean of the softmax over them.
    """

    models: tuple[Model, ...]
    contract: InputContract
    labels: tuple[str, ...]
    threads: int | None = None
    share: int | None = None
    views: Views = SINGLE

    def threads_of(self, model: Model) -> int | None:
        """CPU threads of one call of a model; None for runtimes that choose their own."""
        takes = not isinstance(model, Artifact) or runtimes.takes_threads(model.bundle.backend, model.device)
        return (self.threads or self.share) if takes else None

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """A digest for each model: models with equal digests give equal logits on this machine."""
        here = {"versions": machine.versions(), "processor": machine.processor(), "input": self.contract.to_json()}
        return tuple(_digest({**here, **model.identity()}) for model in self.models)

    @property
    def chunk(self) -> int:
        """Clips per job; each view is as large as a clip."""
        return max(1, min(CHUNK, CHUNK_BYTES // int(np.prod(self.contract.shape))) // self.views.count)


def of_bundles(
    bundles: Sequence[Bundle],
    reference: Bundle | None = None,
    threads: int | None = None,
    artifact: Callable[[Bundle], Artifact] = Artifact,
) -> ModelSet:
    """The model set of some bundles and their reference.

    Args:
        reference: a bundle to hold them against; None takes the PyTorch model that they were made from.
        artifact: the model of a bundle; another than `Artifact` may run it elsewhere.

    Raises:
        InputError: no bundles, bundles of different checkpoints, or of other inputs or labels than the reference.
    """
    runtimes.check_threads(threads)
    if not bundles:
        raise InputError("no bundles to compare")
    first = reference or bundles[0]
    for bundle in bundles:
        if (bundle.contract, bundle.labels) != (first.contract, first.labels):
            raise InputError(
                f"{bundle.path} and {first.path} take different inputs or know other labels; compare apart"
            )
        if reference is None and bundle.checkpoint["sha256"] != first.checkpoint["sha256"]:
            raise InputError(
                f"{bundle.path} and {first.path} come from different checkpoints; compare apart, or with --reference"
            )
        if reference is None and not bundle.spec.same_tubes(first.spec):
            raise InputError(
                f"{bundle.path} and {first.path} have different tubes, so their references differ; compare apart, or "
                "with --reference"
            )
    trained: Model = Artifact(reference) if reference else ReferenceModel(first)
    models: tuple[Model, ...] = (trained, *map(artifact, bundles))
    return ModelSet(models, first.contract, first.labels, threads)


def own_threads(bundles: Sequence[Bundle], threads: int | None) -> list[str]:
    """Notes for the user: the bundles whose runtime chooses its threads itself, where a number was given."""
    artifacts = [Artifact(bundle) for bundle in bundles] if threads else []
    return [
        f"{artifact.name}: its runtime chooses its threads itself; it ran without --threads {threads}"
        for artifact in artifacts
        if not runtimes.takes_threads(artifact.bundle.backend, artifact.device)
    ]


@dataclass(frozen=True)
class Job:
    """Clips, and the models to run on them.

    Attributes:
        positions: of the clips in their set.
        items: the clips, unread.
        models: indices into `ModelSet.models`.
    """

    positions: tuple[int, ...]
    items: tuple[Item, ...]
    models: tuple[int, ...]

    def singles(self) -> Iterator[Job]:
        """The same work as one job a clip."""
        for position, item in zip(self.positions, self.items, strict=True):
            yield Job((position,), (item,), self.models)


@dataclass(frozen=True)
class JobResult:
    """The labels of a job's clips, and the logits of its models.

    Attributes:
        labels: of the clips; None where a clip has none.
        logits: model index -> (n, classes) float32; of several views those of their mean, `metrics.view_mean`.
    """

    labels: tuple[str | None, ...]
    logits: Mapping[int, Logits]


class OpenedModels:
    """A model set in this process: each model is opened on first use, all are closed together."""

    def __init__(self, model_set: ModelSet) -> None:
        self.model_set = model_set
        self._stack = ExitStack()
        self._backends: dict[int, Backend] = {}
        self._reduced: dict[Reduction, Backend] = {}

    def ask(self, job: Job) -> JobResult:
        """Decode the clips of a job, then run each model on all of them, and average over the views of each."""
        count = self.model_set.views.count
        views = [clip for item in job.items for clip in item.clips(self.model_set.contract, self.model_set.views)]
        logits = self.show(views, job.models)
        if count > 1:
            logits = {model: metrics.view_mean(of.reshape(-1, count, of.shape[1])) for model, of in logits.items()}
        return JobResult(tuple(clip.label for clip in views[::count]), logits)

    def show(self, clips: Sequence[Clip], models: Sequence[int]) -> dict[int, Logits]:
        """The logits (n, classes) of each of the models."""
        frames: Frames = np.stack([clip.frames for clip in clips])
        return {model: self.backend(model)(frames) for model in models}

    def backend(self, model: int) -> Backend:
        """The backend of one model; opened on first use."""
        if model not in self._backends:
            asked = self.model_set.models[model]
            opened = asked.open(self.model_set.threads_of(asked))
            self._backends[model] = self._stack.enter_context(opened)
        return self._backends[model]

    def reference_of(self, model: int) -> Backend:
        """What the layers of a model are compared with: the reference, with as many tokens as that model has."""
        first, bundle = self.model_set.models[0], self.model_set.models[model].bundle
        reduction = bundle.spec.reduction
        if reduction is None or not isinstance(first, ReferenceModel):
            return self.backend(0)
        if reduction not in self._reduced:
            opened = open_reference(first.checkpoint(bundle), self.model_set.threads_of(first))
            self._reduced[reduction] = self._stack.enter_context(opened)
        return self._reduced[reduction]

    def close(self) -> None:
        """Release all models."""
        self._backends.clear()
        self._reduced.clear()
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
