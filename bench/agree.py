"""One clip through every runtime: how far the answers of each two differ, and the layer where they depart.

Every bundle of one model, and the PyTorch model where it is here, answers the same clip. Each pair is compared by its
logits and, where both show tensors of the canonical graph, layer by layer. Bundles need no torch for this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from edgetube import metrics
from edgetube.bench import layers, machine, model_set
from edgetube.bench.layers import Curve, Layer
from edgetube.bench.model_set import Artifact, Model, OpenedModels
from edgetube.bench.parity import REFERENCE, Verdict, plain_json
from edgetube.bundle import Bundle
from edgetube.errors import BackendError, CheckpointError, InputError, MissingPackageError
from edgetube.precision import Precision
from edgetube.progress import Progress, silent
from edgetube.roles import roles_of
from edgetube.runtimes.base import Logits
from edgetube.video import Clip, Frames

SCHEMA = 1

TOP = 3
"""Classes that are named of each answer."""

GATE = "max-difference"
"""The option of the gate."""


@dataclass(frozen=True)
class Row:
    """One model and its answer to the clip.

    Attributes:
        name: of the bundle, its path where several have that name, or `REFERENCE`.
        model: the bundle, or the PyTorch model.
        logits: (classes,) float32; None where it gave no answer.
        reason: why it gave none; empty where it did.
        runtime: `Backend.describe`.
    """

    name: str
    model: Model
    logits: Logits | None
    reason: str = ""
    runtime: Mapping[str, Any] | None = None

    @property
    def precision(self) -> Precision:
        return self.model.bundle.precision if isinstance(self.model, Artifact) else Precision.FP32

    def to_json(self, labels: Sequence[str]) -> dict[str, Any]:
        """One object of `rows` of the document, see `docs/agree.md`."""
        bundle = self.model.bundle if isinstance(self.model, Artifact) else None
        return {
            "name": self.name,
            "target": bundle and bundle.target,
            "precision": str(self.precision),
            "backend": bundle.backend if bundle else "torch",
            "path": bundle and str(bundle.path),
            "status": None if self.logits is None else self.model.status,
            "reason": self.reason,
            "runtime": self.runtime,
            "top": self._top(labels),
            "logits": None if self.logits is None else self.logits.tolist(),
        }

    def _top(self, labels: Sequence[str]) -> list[dict[str, Any]]:
        """The most probable classes; none where a logit is not finite."""
        if self.logits is None or not np.isfinite(self.logits).all():
            return []
        scores = metrics.softmax(self.logits)
        order = np.argsort(-self.logits, kind="stable")[:TOP]
        return [{"label": labels[i], "score": float(scores[i]), "logit": float(self.logits[i])} for i in order]


@dataclass(frozen=True)
class Pair:
    """Two answers to the clip.

    Attributes:
        names: of the two rows.
        difference: see `difference`.
        cosine: of the two logit vectors; NaN where one is not finite.
        sqnr_db: of the second one's logits against those of the first, dB.
        same_class: whether the largest logit is of the same class.
        curve: SQNR of the layers that both show, in the order of execution, of the second one against the first.
        expected: sufficient SQNR of the tokens and of the other layers, by the precisions of the two, dB.
        note: why there are no layers.
    """

    names: tuple[str, str]
    difference: float
    cosine: float
    sqnr_db: float
    same_class: bool
    curve: tuple[Layer, ...]
    expected: tuple[float, float]
    note: str = ""

    @property
    def departs(self) -> tuple[str, float] | None:
        """(layer, dB) where the two depart: the first layer whose SQNR is `layers.JUMP` dB lower than expected."""
        layer = layers.first_jump(self.curve, self.expected)
        return None if layer is None else (layer, dict(layers.drops(self.curve, self.expected))[layer])

    def to_json(self) -> dict[str, Any]:
        """One object of `pairs` of the document."""
        return {
            "names": list(self.names),
            "difference": self.difference,
            "cosine": self.cosine,
            "sqnr_db": self.sqnr_db,
            "same_class": self.same_class,
            "departs": None if self.departs is None else dict(zip(("layer", "db"), self.departs, strict=True)),
            "note": self.note,
            "curve": [{"layer": one.layer, "sqnr_db": one.sqnr_db} for one in self.curve],
        }


@dataclass(frozen=True)
class Agreement:
    """All runtimes on one clip.

    Attributes:
        clip: its name and true label, and its start and end in seconds of its video.
        labels: class names, in the order of the logits.
        rows: the reference, then the bundles in the order given.
        pairs: of the rows that answered.
    """

    clip: Mapping[str, Any]
    labels: tuple[str, ...]
    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...]

    def outliers(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(row, layers) of rows that depart from all others, of two or more that show layers; the layers where."""
        shown = [pair for pair in self.pairs if pair.curve]
        for row in self.rows:
            places = [pair.departs for pair in shown if row.name in pair.names]
            if len(places) > 1 and all(places):
                yield row.name, tuple(dict.fromkeys(place[0] for place in places if place))

    def verdicts(self, limit: float | None) -> tuple[Verdict, ...]:
        """A verdict for each pair, if there is a limit of their difference."""
        if limit is None:
            return ()
        return tuple(
            Verdict(
                GATE, " and ".join(pair.names), pair.difference, limit, pair.difference <= limit,
                pair.departs[0] if pair.departs else "",
            )
            for pair in self.pairs
        )  # fmt: skip

    def to_json(self, verdicts: Sequence[Verdict] = ()) -> dict[str, Any]:
        """The document of `edgetube agree --json`."""
        names = [row.name for row in self.rows]
        matrix: list[list[float | None]] = [[None] * len(names) for _ in names]
        for index, row in enumerate(self.rows):
            matrix[index][index] = None if row.logits is None else 0.0
        for pair in self.pairs:
            i, j = map(names.index, pair.names)
            matrix[i][j] = matrix[j][i] = pair.difference
        document: dict[str, Any] = plain_json(
            {
                "schema": SCHEMA,
                "clip": dict(self.clip),
                "labels": list(self.labels),
                "machine": machine.describe(),
                "versions": machine.versions(),
                "rows": [row.to_json(self.labels) for row in self.rows],
                "difference": {"names": names, "matrix": matrix},
                "pairs": [pair.to_json() for pair in self.pairs],
                "outliers": [{"name": name, "layers": list(found)} for name, found in self.outliers()],
                "gates": [asdict(verdict) for verdict in verdicts],
            }
        )
        return document


def difference(first: Logits, second: Logits) -> float:
    """Largest |difference| of two logit vectors (classes,) relative to the largest |logit| of both.

    It is 0 where they are equal, at most 2, and infinite where one of them is not finite.
    """
    both = np.stack([first, second]).astype(np.float64)
    if not np.isfinite(both).all():
        return math.inf
    largest = float(np.abs(both).max())
    return float(np.abs(both[0] - both[1]).max()) / largest if largest else 0.0


def measure(
    bundles: Sequence[Bundle],
    clip: Clip,
    *,
    reference: bool | None = None,
    by_layer: bool = True,
    threads: int | None = None,
    artifact: Callable[[Bundle], Artifact] = Artifact,
    progress: Progress = silent,
) -> Agreement:
    """Give one clip to every bundle and to the PyTorch model, and compare each two.

    A model that cannot be opened or run here is a row with the reason.

    Args:
        bundles: of one model.
        clip: for their input.
        reference: whether the PyTorch model takes part; None: where it can be found and torch is installed.
        by_layer: also compare layer by layer.
        threads: CPU threads of one call; None leaves the choice to each runtime.
        artifact: see `edgetube.bench.model_set.of_bundles`.

    Raises:
        InputError: no bundles, or bundles of different models, inputs or labels.
        CheckpointError, MissingPackageError: `reference` is true, and the PyTorch model cannot be opened.
        BackendError: fewer than two models answered: there is nothing to compare.
    """
    if not bundles:
        raise InputError("no bundles to compare")
    model_set.check_same_model(bundles)
    bundles = tuple({bundle.path: bundle for bundle in bundles}.values())
    models = model_set.of_bundles(bundles, None, threads, artifact)
    first = 1 if reference is False else 0
    with OpenedModels(models) as opened:
        rows = {}
        for index, name in list(enumerate(_names(bundles)))[first:]:
            progress("answers", index, len(models.models))
            rows[index] = _ask(opened, index, name, clip.frames, is_required=index == 0 and bool(reference))
        progress("answers", len(models.models), len(models.models))
        answered = [index for index, row in rows.items() if row.logits is not None]
        if len(answered) < 2:
            raise BackendError(_alone(list(rows.values())))
        curves = _curves(opened, {index: rows[index].name for index in answered}, clip.frames, progress, by_layer)
    pairs = tuple(_compare(rows[i], rows[j], curves[i, j]) for i, j in combinations(answered, 2))
    described = {"name": clip.name, "label": clip.label, "start": clip.start, "end": clip.end}
    return Agreement(described, models.labels, tuple(rows.values()), pairs)


def _names(bundles: Sequence[Bundle]) -> list[str]:
    """Names of the reference and the bundles; paths where several bundles have one name."""
    names = [bundle.name for bundle in bundles]
    unique = (bundle.name if names.count(bundle.name) == 1 else str(bundle.path) for bundle in bundles)
    return [REFERENCE, *unique]


def _ask(opened: OpenedModels, index: int, name: str, frames: Frames, is_required: bool) -> Row:
    """The answer of one model, or why it gives none."""
    model = opened.model_set.models[index]
    try:
        backend = opened.backend(index)
        return Row(name, model, backend(frames[None])[0], runtime=backend.describe())
    except (BackendError, CheckpointError, MissingPackageError) as error:
        if is_required:
            raise
        return Row(name, model, None, str(error))


def _alone(rows: Sequence[Row]) -> str:
    """The error for a clip that fewer than two models answered."""
    reasons = "; ".join(f"{row.name}: {row.reason}" for row in rows if row.logits is None)
    count = sum(row.logits is not None for row in rows)
    remedy = f"; {reasons}" if reasons else "; give two bundles, or --checkpoint"
    return f"{count} of {len(rows)} models answered here, and two are needed to compare{remedy}"


def _compare(first: Row, second: Row, curve: Curve) -> Pair:
    """Two rows that answered."""
    one, other = np.asarray(first.logits), np.asarray(second.logits)
    finite = bool(np.isfinite(one).all() and np.isfinite(other).all())
    return Pair(
        names=(first.name, second.name),
        difference=difference(one, other),
        cosine=metrics.cosine(one[None], other[None]) if finite else math.nan,
        sqnr_db=metrics.sqnr(one, other),
        same_class=finite and bool(one.argmax() == other.argmax()),
        curve=curve.curve,
        expected=layers.expected_between(first.precision, second.precision),
        note=curve.note,
    )


def _curves(
    opened: OpenedModels, names: Mapping[int, str], frames: Frames, progress: Progress, by_layer: bool
) -> dict[tuple[int, int], Curve]:
    """The layers of each two models, by their indices; empty curves where they are not asked for.

    A few layers are read at a time, of one model after the other: so the weights of one model are in memory twice.

    Args:
        names: of the models, by their indices.
    """
    models = opened.model_set.models
    spec, pairs = models[0].bundle.spec, list(combinations(names, 2))
    wanted = roles_of(spec).layers if by_layer else ()
    shown = {index: opened.backend(index).layers(wanted) for index in names}
    mute = {index: f"{names[index]} shows no inner tensors" for index in names if not shown[index]}
    stated = {index: layers.stated_by(models[index]) for index in names if shown[index]}
    plans = {pair: _comparable(models, shown, pair) for pair in pairs}
    found: dict[tuple[int, int], list[Layer]] = {pair: [] for pair in pairs}
    read = {index: {name for pair, (known, _) in plans.items() if index in pair for name in known} for index in names}
    union = [name for name in wanted if any(name in some for some in read.values())]
    done = 0
    for some in layers.passes(union, spec):
        progress("layers", done, len(union))
        seen: dict[int, dict[str, layers.Array]] = {}
        for index in names:
            asked = [name for name in some if name in read[index]]
            if not asked or index in mute:
                continue
            backend = opened.backend(index)
            try:
                values = layers.read(backend.tap(asked), backend.batch, frames)
            except BackendError as error:
                mute[index] = f"{names[index]} shows no inner tensors: {error}"
                continue
            seen[index] = {name: stated[index](name, values[name]) for name in asked}
        for pair, (known, view) in plans.items():
            for name in (name for name in some if name in known and not mute.keys() & set(pair)):
                one, other = (view(name, seen[index][name]) for index in pair)
                found[pair].append(Layer(name, metrics.decibels(*layers.energies(one, other))))
        done += len(some)
        progress("layers", done, len(union))
    curves = {}
    for pair, curve in found.items():
        silent_ones = [mute[index] for index in pair if index in mute]
        note = "; ".join(silent_ones) or ("" if curve else "the two show no tensor of the same name")
        curves[pair] = Curve(names[pair[1]], 1, () if silent_ones else tuple(curve), note if by_layer else NOT_ASKED)
    return curves


NOT_ASKED = "layers were not compared"


def _comparable(
    models: Sequence[Model], shown: Mapping[int, Sequence[str]], pair: tuple[int, int]
) -> tuple[tuple[str, ...], layers.View]:
    """The layers that a pair shows and that can be compared, and what of each."""
    first, second = pair
    both = [name for name in shown[first] if name in shown[second]]
    one = models[first]
    return layers.comparable(both, models[second].bundle, one.bundle if isinstance(one, Artifact) else None)
