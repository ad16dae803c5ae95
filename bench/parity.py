"""Compare artifacts with the trained model, clip by clip; only a few metrics are kept of each clip."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetube import datasets
from edgetube.bench import compare as comparing
from edgetube.bench import layers, machine, model_set, workers
from edgetube.bench import probe as probing
from edgetube.bench.answer_cache import AnswerCache, clip_key
from edgetube.bench.compare import ClassRow, ClipMetrics, Parity, Quarter, WorstClip
from edgetube.bench.following import REGRET
from edgetube.bench.model_set import Artifact, Job, JobResult, ModelSet, OpenedModels
from edgetube.bench.probe import Probe
from edgetube.bench.remembering import Answering
from edgetube.bundle import Bundle
from edgetube.contract import InputContract
from edgetube.datasets import ClipSet
from edgetube.errors import InputError, ParityError
from edgetube.precision import Precision
from edgetube.progress import Progress, silent, track
from edgetube.runtimes.base import Logits
from edgetube.targets import Status
from edgetube.video import Clip, Frames
from edgetube.views import SINGLE, Views

__all__ = [
    "COSINE",
    "REGRET",
    "Answers",
    "Comparison",
    "Gates",
    "Measured",
    "MetricsAccumulator",
    "Parity",
    "Probe",
    "Verdict",
    "answer",
    "compare",
    "measure",
    "reopen",
    "strip",
]

SCHEMA = 1
REFERENCE = "reference"
"""What the reference is called in the matrix of agreement."""

WORST = 8
"""Default number of worst clips to name."""


@dataclass(frozen=True)
class Answers:
    """The logits of one model on a set of clips.

    Attributes:
        logits: (N, classes) float32, in the order of the clips.
        labels: (N,) index of the true class, -1 where it is unknown.
        names: of the clips.
        status: how the model was run.
    """

    logits: Logits
    labels: npt.NDArray[np.int64]
    names: tuple[str, ...]
    status: Status


def answer(
    backend: Answering,
    clips: Iterable[Clip],
    labels: tuple[str, ...],
    *,
    stage: str = "answer",
    total: int = 0,
    progress: Progress = silent,
) -> Answers:
    """Run one model on every clip; frames are freed after each clip.

    Raises:
        InputError: no clips, or a clip with a label that the model does not have.
    """
    logits: list[Logits] = []
    truth: list[int] = []
    names: list[str] = []
    for clip in track(clips, stage, total, progress):
        logits.append(backend(clip.frames[None]))
        truth.append(_index(clip.name, clip.label, labels))
        names.append(clip.name)
    if not logits:
        raise InputError(NO_CLIPS)
    return Answers(np.concatenate(logits), np.array(truth, np.int64), tuple(names), backend.status)


def compare(reference: Answers, answers: Answers) -> Parity:
    """Measure `answers` against the reference's answers to the same clips.

    Raises:
        InputError: the two are not about the same clips.
        ParityError: a logit is not finite.
    """
    if reference.names != answers.names:
        raise InputError("the two sets of answers are not about the same clips in the same order")
    found = comparing.clip_metrics(reference.logits, answers.logits, reference.labels)
    return comparing.summarise(found, reference.logits.shape[1], answers.status)


# ------------------------------------------------------------------------------------------------------------- measured


@dataclass(frozen=True)
class Measured:
    """One bundle against the reference, in total and in detail."""

    bundle: Bundle
    parity: Parity
    flips: tuple[Quarter, ...]
    classes: tuple[ClassRow, ...]
    worst: tuple[WorstClip, ...]
    probe: Probe = field(default_factory=Probe)

    def to_json(self) -> dict[str, Any]:
        bundle = self.bundle
        return {
            "name": bundle.name,
            "target": bundle.target,
            "precision": str(bundle.precision),
            "backend": bundle.backend,
            "path": str(bundle.path),
            "sha256": bundle.sha256,
            "bytes": bundle.artifact_bytes,
            **self.parity.to_json(),
            "relative_error": self.parity.relative_error,
            "order_agreement": self.probe.order_agreement,
            "regret": self.probe.regret,
            "layer_jump": None if self.probe.jump is None else dict(zip(("layer", "db"), self.probe.jump, strict=True)),
            "flips": [asdict(quarter) for quarter in self.flips],
            "classes": [asdict(row) for row in self.classes],
            "worst": [clip.to_json() for clip in self.worst],
        }


@dataclass(frozen=True)
class Comparison:
    """Bundles against a reference on a set of clips; `docs/parity.md` explains its JSON.

    Attributes:
        reference, data: as the document has them.
        measured: one a bundle, in the order given.
        agreement: (1 + bundles, 1 + bundles) share of clips with the same top-1 class; the reference is first.
    """

    reference: Mapping[str, Any]
    data: Mapping[str, Any]
    measured: tuple[Measured, ...]
    agreement: npt.NDArray[np.float64]

    def to_json(
        self,
        verdicts: Sequence[Verdict] = (),
        layers: Sequence[Mapping[str, Any]] = (),
        video: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The document of `edgetube parity --json`."""
        document = {
            "schema": SCHEMA,
            "reference": dict(self.reference),
            "data": dict(self.data),
            "machine": machine.describe(),
            "versions": machine.versions(),
            "bundles": [one.to_json() for one in self.measured],
            "agreement": {
                "names": [REFERENCE, *(one.bundle.name for one in self.measured)],
                "matrix": self.agreement.tolist(),
            },
            "gates": [asdict(verdict) for verdict in verdicts],
            "layers": list(layers),
            "video": video,
        }
        plain: dict[str, Any] = plain_json(document)
        return plain


def plain_json(value: Any) -> Any:
    """Plain JSON: numbers that it cannot express are null."""
    if isinstance(value, dict):
        return {key: plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def measure(
    bundles: Sequence[Bundle],
    source: ClipSet,
    *,
    reference: Bundle | None = None,
    threads: int | None = None,
    run: workers.Runner = workers.here,
    answer_cache: AnswerCache | None = None,
    views: Views = SINGLE,
    worst: int = WORST,
    artifact: Callable[[Bundle], Artifact] = Artifact,
    progress: Progress = silent,
) -> Comparison:
    """Run the reference and every bundle on the same clips and compare their logits.

    Each clip is decoded once; a few clips are in memory at a time.

    Args:
        bundles: made from one checkpoint, or at least for the same input and labels as `reference`.
        reference: a bundle to hold them against; None takes the PyTorch model that they were made from.
        threads: CPU threads of one call; None leaves the choice to each runtime.
        run: where the jobs run, see `edgetube.bench.workers`.
        answer_cache: logits are stored there; logits that it already has are not computed again.
        views: of each clip; the metrics are of the mean of the softmax over them. The checks of `edgetube.bench.probe`
            are always on the clip of the contract.
        worst: how many of the worst clips are named.
        artifact: see `edgetube.bench.model_set.of_bundles`.

    Raises:
        InputError: no bundles, bundles that do not belong together, no clips, a label that the model has not, or
            several views of what has one.
        CheckpointError: the checkpoint is no longer the one that the bundles were made from.
        ParityError: a bundle gave a logit that is not finite.
    """
    source.check_views(views)
    models = replace(model_set.of_bundles(bundles, reference, threads, artifact), views=views)
    accumulator = MetricsAccumulator(models)
    jobs = Jobs(models, source, answer_cache)
    done = 0
    progress("compare", 0, source.count)
    for job, result in jobs.run(run):
        accumulator.add(job.positions, [item.name for item in job.items], result)
        done += len(job.items)
        progress("compare", done, source.count)
    comparison = accumulator.comparison(source, worst)
    return replace(comparison, measured=tuple(_probed(models, source, comparison.measured, progress)))


def _probed(models: ModelSet, source: ClipSet, measured: Sequence[Measured], progress: Progress) -> Iterator[Measured]:
    """The same with the results of `edgetube.bench.probe`, which runs on a few of the clips in this process."""
    clips = [clip.frames for clip in source.sample(probing.ORDER_CLIPS).clips(models.contract)]
    with OpenedModels(models) as opened:
        for one, found in zip(measured, probing.probe(opened, clips, progress), strict=True):
            yield replace(one, probe=found)


class Jobs:
    """The clips of a set as jobs; logits that the cache has are not computed again."""

    def __init__(self, models: ModelSet, source: ClipSet, answer_cache: AnswerCache | None) -> None:
        self.model_set, self.source, self.answer_cache = models, source, answer_cache

    def run(self, run: workers.Runner) -> Iterator[tuple[Job, JobResult]]:
        """All jobs with their results, in any order."""
        if self.answer_cache is None:
            yield from run(self.model_set, self._all())
            return
        missing: list[Job] = []
        for job in self._all():
            cached = self._cached(job, self.answer_cache)
            asked = tuple(model for model in job.models if model not in cached.logits)
            if asked:
                missing.append(Job(job.positions, job.items, asked))
            else:
                yield job, cached
        for job, result in run(self.model_set, missing):
            self._keep(job, result, self.answer_cache)
            whole = Job(job.positions, job.items, tuple(range(len(self.model_set.models))))
            rest = self._cached(whole, self.answer_cache)
            yield whole, JobResult(result.labels, {**rest.logits, **result.logits})

    def _all(self) -> Iterator[Job]:
        all_models, size = tuple(range(len(self.model_set.models))), self.model_set.chunk
        for start in range(0, self.source.count, size):
            items = self.source.items[start : start + size]
            yield Job(tuple(range(start, start + len(items))), items, all_models)

    def _cached(self, job: Job, answer_cache: AnswerCache) -> JobResult:
        """What the cache has: the models whose logits it holds for every clip of the job."""
        clips = self._keys(job)
        labels: dict[str, str | None] = {}
        logits: dict[int, Logits] = {}
        for model in job.models:
            found = answer_cache.get(self.model_set.keys[model], clips)
            if all(clip in found for clip in clips):
                logits[model] = np.stack([found[clip][1] for clip in clips])
                labels |= {clip: found[clip][0] for clip in clips}
        return JobResult(tuple(labels.get(clip) for clip in clips), logits)

    def _keys(self, job: Job) -> list[str]:
        """The keys of the clips of a job."""
        return [clip_key(item, self.model_set.contract, self.model_set.views) for item in job.items]

    def _keep(self, job: Job, result: JobResult, answer_cache: AnswerCache) -> None:
        clips = self._keys(job)
        for model, logits in result.logits.items():
            answer_cache.put(self.model_set.keys[model], zip(clips, result.labels, logits, strict=True))


class MetricsAccumulator:
    """Reduces results to metrics as they come in, in any order.

    Args:
        models: that the results are of; the first is the reference.
    """

    def __init__(self, models: ModelSet) -> None:
        self.model_set = models
        self._positions: list[int] = []
        self._names: list[str] = []
        self._parts: list[list[ClipMetrics]] = [[] for _ in models.models[1:]]

    def add(self, positions: Sequence[int], names: Sequence[str], result: JobResult) -> None:
        """Add the results of all models on some clips.

        Raises:
            InputError: a clip has a label that the models do not have.
            ParityError: a logit is not finite; names the model.
        """
        pairs = zip(names, result.labels, strict=True)
        truth = np.array([_index(name, label, self.model_set.labels) for name, label in pairs], np.int64)
        self._positions.extend(positions)
        self._names.extend(names)
        for index, kept in enumerate(self._parts, start=1):
            try:
                kept.append(comparing.clip_metrics(result.logits[0], result.logits[index], truth))
            except ParityError as error:
                raise ParityError(f"{self.model_set.models[index].name}: {error}; they are near {names[0]}") from error

    def clip_metrics(self) -> tuple[ClipMetrics, ...]:
        """The metrics of each bundle, in the order of the clips."""
        if not self._positions:
            raise InputError(NO_CLIPS)
        order = np.argsort(self._positions, kind="stable")
        return tuple(comparing.join(kept, order) for kept in self._parts)

    def comparison(self, source: ClipSet, worst: int) -> Comparison:
        """The result.

        Raises:
            InputError: there were no clips.
        """
        found, labels = self.clip_metrics(), self.model_set.labels
        names = [self._names[i] for i in np.argsort(self._positions, kind="stable")]
        measured = tuple(
            Measured(
                model.bundle,
                comparing.summarise(metrics, len(labels), model.status),
                comparing.quarters(metrics),
                comparing.per_class(metrics, labels),
                comparing.worst(metrics, names, labels, worst),
            )
            for model, metrics in zip(self.model_set.models[1:], found, strict=True)
        )
        known = found[0].label[found[0].label >= 0]
        data = {
            "name": source.name,
            "source": None if source.source is None else str(source.source),
            "clips": len(names),
            "labelled": len(known),
            "classes": len(np.unique(known)),
            "views": asdict(self.model_set.views),
        }
        answers = np.stack([found[0].reference, *(metrics.answer for metrics in found)])
        matrix = (answers[:, None] == answers[None]).mean(axis=2)
        return Comparison(_describe(self.model_set), data, measured, matrix)


def _describe(models: ModelSet) -> dict[str, Any]:
    """The reference, as the document has it."""
    model = models.models[0]
    checkpoint = model.bundle.checkpoint
    artifact = isinstance(model, Artifact)
    return {
        "runtime": model.bundle.backend if artifact else "torch",
        "name": model.bundle.name if artifact else checkpoint["name"],
        "target": model.bundle.target if artifact else None,
        "source": checkpoint["source"],
        "sha256": checkpoint["sha256"],
    }


def strip(source: ClipSet, name: str, contract: InputContract, count: int = 8) -> Frames:
    """Frames (count, H, W, 3) uint8 of one clip, evenly spaced in time: the clip is read again.

    Raises:
        InputError: the set has no such clip.
    """
    frames = source.item(name).read(contract).frames
    picked: Frames = frames[np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)]
    return picked


def reopen(document: Mapping[str, Any], labels: tuple[str, ...]) -> ClipSet:
    """The clips that a document of `edgetube parity --json` is about, for `strip`.

    Args:
        labels: of the bundles.

    Raises:
        InputError: they are not where they were.
    """
    data = document["data"]
    if document["video"] is not None:
        named = {clip["name"] for bundle in document["bundles"] for clip in bundle["worst"]}
        return datasets.windows(Path(data["source"]), sorted(float(name.removesuffix("s")) for name in named))
    return datasets.built_in(data["clips"], labels) if data["source"] is None else datasets.load(data["source"])


# ---------------------------------------------------------------------------------------------------------------- gates


@dataclass(frozen=True)
class Verdict:
    """One gate and one bundle.

    Attributes:
        gate: the option's name.
        bundle: its name.
        value, limit: what was measured, and what it was held against.
        where: the layer that `value` is about; empty where it is about the answers.
    """

    gate: str
    bundle: str
    value: float
    limit: float
    passed: bool
    where: str = ""

    def __str__(self) -> str:
        relation = "at least" if self.gate.startswith("min") else "at most"
        what = self.gate.partition("-")[2].replace("-", " ") + (f" at {self.where}" if self.where else "")
        return f"{self.bundle}: {what} is {self.value:.6g}, --{self.gate} asks for {relation} {self.limit:g}"


SQNR: Mapping[Precision, float] = {
    Precision.FP32: 60.0,
    Precision.FP16: 40.0,
    Precision.W8: 40.0,
    Precision.W8A8: 35.0,
    Precision.W8A16: 35.0,
    Precision.W4: 28.0,
}
"""Smallest SQNR of the logits by precision, dB; `docs/parity.md` has what sound and broken artifacts reach."""

SQNR_MARGIN = 6.0
"""How far below the SQNR of its own proof an artifact may be on other clips, dB, where that is less than `SQNR`."""

COSINE: Mapping[Precision, float] = dict.fromkeys(Precision, 0.98)
"""Smallest cosine of the logits of a clip, between models with as many tokens."""

ORDER_AGREEMENT = 0.99
"""Smallest `order_agreement`. A wrong order of two frames of the built-in model gives 0.97 at most."""


@dataclass(frozen=True)
class Gates:
    """Limits that each bundle has to keep; None is no limit.

    Attributes:
        min_agreement: smallest share of clips with the same top-1 class.
        min_cosine: smallest cosine between the logits of any clip: a number for all, or one for each precision
            (`COSINE`), which models with fewer tokens have not to keep: single clips may cost them more.
        max_drop: percentage points of top-1 that may be lost.
        max_class_drop: the same for every class.
        max_kl: largest mean KL, nats.
        max_error: largest logit error, relative to the largest |logit| of the reference, which counts as 1 at least.
        max_sure_flips: largest share of flips among the half of the clips where the reference is surer.
        min_sqnr: smallest SQNR of the logits, dB: a number for all, or one for each precision (`SQNR`), which a model
            that is harder to quantise may miss as long as it is within `SQNR_MARGIN` of what its export proved.
        min_order_agreement: how alike reversed and shuffled clips move the two, see `edgetube.bench.probe`.
        max_regret: by how much the tokens that leave may be worse than the reference's choice, a number for all or for
            each precision, see `edgetube.bench.following.REGRET`.
        max_layer_jump: dB by which the tokens or the output of a block may be worse than all before them.
    """

    min_agreement: float | None = None
    min_cosine: float | Mapping[Precision, float] | None = None
    max_drop: float | None = None
    max_class_drop: float | None = None
    max_kl: float | None = None
    max_error: float | None = None
    max_sure_flips: float | None = None
    min_sqnr: float | Mapping[Precision, float] | None = None
    min_order_agreement: float | None = None
    max_layer_jump: float | None = None
    max_regret: float | Mapping[Precision, float] | None = None

    def check_data(self, source: ClipSet) -> None:
        """Check, before any model runs, that the clips have what the gates need.

        Raises:
            InputError: a gate on accuracy, and clips without labels.
        """
        wants = [gate for gate in ("max_drop", "max_class_drop") if getattr(self, gate) is not None]
        if wants and all(item.label is None for item in source.items):
            raise InputError(
                f"--{wants[0].replace('_', '-')} needs labelled clips, those of {source.name} have no labels; use "
                "--min-agreement, or give a folder with one sub-folder a class"
            )

    def judge(self, comparison: Comparison) -> tuple[Verdict, ...]:
        """A verdict for every bundle and every gate that is set, except where there is nothing to hold against it."""
        return tuple(verdict for one in comparison.measured for verdict in self.verdicts(one))

    def verdicts(self, one: Measured) -> Iterator[Verdict]:
        """The verdicts on one bundle."""
        measured = _gated(one)
        for gate in (limit.name for limit in fields(self)):
            limit = getattr(self, gate)
            if isinstance(limit, Mapping):
                limit = _limit(gate, one.bundle, limit)
            if limit is None or (measured[gate] is None and gate in OPTIONAL):
                continue
            found = measured[gate]
            value = math.inf if found is None else found
            passed = value >= limit if gate.startswith("min") else value <= limit
            where = one.probe.jump[0] if gate == "max_layer_jump" and one.probe.jump else ""
            yield Verdict(gate.replace("_", "-"), one.bundle.name, value, limit, passed, where)


OPTIONAL = ("min_order_agreement", "max_layer_jump", "max_regret")
"""Gates that say nothing where a model does not care for order, a runtime shows no layers, or all tokens stay."""

DEFAULTS = Gates(
    min_agreement=0.99,
    min_cosine=COSINE,
    min_sqnr=SQNR,
    min_order_agreement=ORDER_AGREEMENT,
    max_layer_jump=layers.JUMP,
    max_regret=REGRET,
)
"""The gates of `edgetube parity` by default."""


def _limit(gate: str, bundle: Bundle, limits: Mapping[Precision, float]) -> float | None:
    """What a bundle has to keep on any clips and any machine; None where that is not known."""
    if gate == "min_sqnr":
        return _sqnr_limit(bundle, limits)
    return None if gate == "min_cosine" and bundle.spec.reduction is not None else limits[bundle.precision]


def _sqnr_limit(bundle: Bundle, limits: Mapping[Precision, float]) -> float:
    """The SQNR that a bundle has to reach on any clips and any machine, dB."""
    proven, golden = bundle.parity.get("sqnr"), bundle.parity.get("golden", {})
    limit = min(limits[bundle.precision], float(golden.get("min_sqnr", math.inf)))
    return limit if proven is None else min(limit, float(proven) - SQNR_MARGIN)


def _gated(one: Measured) -> dict[str, float | None]:
    """What each gate looks at; None where there is nothing to look at."""
    return {
        "min_agreement": one.parity.agreement,
        "min_cosine": one.parity.cosine,
        "max_drop": one.parity.drop,
        "max_class_drop": max((row.drop for row in one.classes), default=None),
        "max_kl": one.parity.kl,
        "max_error": one.parity.relative_error,
        "max_sure_flips": one.parity.sure_flips,
        "min_sqnr": one.parity.sqnr,
        "min_order_agreement": one.probe.order_agreement,
        "max_layer_jump": None if one.probe.jump is None else one.probe.jump[1],
        "max_regret": one.probe.regret,
    }


NO_CLIPS = "no clips to compare on: the data set is empty"


def _index(name: str, label: str | None, labels: tuple[str, ...]) -> int:
    if label is None:
        return -1
    if label not in labels:
        raise InputError(f"{name} is labelled {label!r}; the model knows {', '.join(labels[:12])}")
    return labels.index(label)
