"""The error of every layer of an artifact against the same layer of its reference.

Layers are matched by name: a tensor of the canonical graph has the name of the module that outputs it
(`blocks.3.attn.qkv`), and artifacts keep these names; `edgetube.roles` says which are compared. A few tensors are read
at a time; only sums of squares are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from edgetube import bundle as bundles
from edgetube import metrics
from edgetube.bench import model_set
from edgetube.bench.model_set import Artifact, Model, OpenedModels
from edgetube.bundle import Bundle
from edgetube.datasets import ClipSet
from edgetube.errors import BackendError, InputError
from edgetube.precision import Precision
from edgetube.progress import Progress, silent
from edgetube.roles import TOKENS, GraphRoles, roles_of
from edgetube.runtimes.base import Backend, Tap
from edgetube.spec import ModelSpec
from edgetube.targets import need
from edgetube.video import Frames

if TYPE_CHECKING:
    from edgetube.model.transformer import VideoTransformer

Array = npt.NDArray[np.float32]
View = Callable[[str, Array], Array]
"""(layer, tensor) -> the part or form of the tensor that can be compared between two models."""

TOGETHER, TOGETHER_BYTES = 6, 256 << 20
"""Tensors that are read in one pass; of the outputs of blocks, whose size is known, as many as take that memory."""

VISIBLE, JUMP = 45.0, 8.0
"""An error jumps at a layer whose SQNR is below `VISIBLE` dB and `JUMP` dB below that of every layer before it.

Half precision stays above 60 dB and int8 weights reach about 40 dB, so layers with rounding errors only are not named;
`docs/parity.md` has measurements of correct and broken artifacts."""


@dataclass(frozen=True)
class Layer:
    """Signal to quantisation noise ratio of one layer, dB; infinite where the two are equal."""

    layer: str
    sqnr_db: float


@dataclass(frozen=True)
class Curve:
    """The layers of one artifact in the order of execution.

    Attributes:
        name: of the bundle.
        clips: how many were used.
        curve: empty if the backend cannot return layers.
        note: the reason for an empty curve.
    """

    name: str
    clips: int
    curve: tuple[Layer, ...]
    note: str = ""

    @property
    def first_jump(self) -> str | None:
        """The first layer where the error jumps."""
        return first_jump(self.curve)

    def to_json(self) -> dict[str, Any]:
        """One object of `layers` of the document, see `docs/parity.md`."""
        return {
            "name": self.name,
            "clips": self.clips,
            "note": self.note,
            "first_jump": self.first_jump,
            "curve": [{"layer": found.layer, "sqnr_db": found.sqnr_db} for found in self.curve],
        }


EXPECTED: Mapping[Precision, tuple[float, float]] = {
    Precision.FP32: (80.0, 80.0),
    Precision.FP16: (45.0, 45.0),
    Precision.W8: (45.0, 45.0),
    Precision.W8A8: (38.0, 38.0),
    Precision.W8A16: (38.0, 38.0),
    Precision.W4: (45.0, 33.0),
}
"""Sufficient SQNR of the tokens, and of the blocks, by precision, dB; only drops below it count."""


def drops(curve: Sequence[Layer], expected: Sequence[float] = (VISIBLE, VISIBLE)) -> list[tuple[str, float]]:
    """(layer, dB) by which each layer's SQNR lies below all before it and below `expected`, of tokens and the rest."""
    floor, found = math.inf, []
    for layer in curve:
        floor = min(floor, expected[layer.layer != TOKENS])
        found.append((layer.layer, floor - min(floor, layer.sqnr_db)))
        floor = min(floor, layer.sqnr_db)
    return found


def first_jump(curve: Sequence[Layer], expected: Sequence[float] = (VISIBLE, VISIBLE)) -> str | None:
    """The first layer whose SQNR drops, see `drops`, by more than `JUMP`; None if there is none."""
    return next((layer for layer, drop in drops(curve, expected) if drop > JUMP), None)


def expected_between(first: Precision, second: Precision) -> tuple[float, float]:
    """Sufficient SQNR between two artifacts, of the tokens and of the rest, dB: the energies of their errors add up."""
    tokens, rest = (
        -metrics.decibels(10 ** (-a / 10) + 10 ** (-b / 10), 1.0)
        for a, b in zip(EXPECTED[first], EXPECTED[second], strict=True)
    )
    return tokens, rest


def largest_drop(curve: Curve, precision: Precision) -> tuple[str, float] | None:
    """The largest of `drops` below the `EXPECTED` SQNR of a precision; None without layers."""
    return max(drops(curve.curve, EXPECTED[precision]), key=lambda found: found[1], default=None)


def curves(
    compared: Sequence[Bundle],
    source: ClipSet,
    *,
    reference: Bundle | None = None,
    threads: int | None = None,
    artifact: Callable[[Bundle], Artifact] = Artifact,
    progress: Progress = silent,
) -> tuple[Curve, ...]:
    """The layers of bundles against those of their reference, on all clips of `source`: a few are enough.

    Args:
        reference: a bundle to compare with; None takes the PyTorch model.
        artifact: see `edgetube.bench.model_set.of_bundles`.

    Raises:
        InputError: no clips, or bundles that do not belong together.
        BackendError: the reference bundle's backend cannot return layers, or a runtime fails.
    """
    models = model_set.of_bundles(compared, reference, threads, artifact)
    clips = [clip.frames for clip in source.clips(models.contract)]
    if not clips:
        raise InputError("no clips to look at layers on: the data set is empty")
    with OpenedModels(models) as opened:
        return tuple(of_opened(opened, clips, roles_of(models.models[0].bundle.spec).layers, progress))


def of_opened(
    opened: OpenedModels, clips: Sequence[Frames], wanted: Sequence[str], progress: Progress = silent
) -> Iterator[Curve]:
    """The curves of the bundles of an open model set, in its order; see `curves`.

    Args:
        clips: (T, H, W, 3) uint8 each.
        wanted: of `GraphRoles.layers`.

    Raises:
        BackendError: the reference bundle's backend cannot return layers, or a runtime fails.
    """
    first, *rest = opened.model_set.models
    reference = first.bundle if isinstance(first, Artifact) else None
    if not (seen := opened.backend(0).layers(wanted)):
        raise BackendError(f"the runtime of {first.name} shows no layers; leave out --reference")
    stated = stated_by(first)
    for index, artifact in enumerate(rest, start=1):
        truth = opened.reference_of(index)
        yield curve(truth, opened.backend(index), artifact.bundle, clips, seen, stated, reference, progress)


def stated_by(model: Model) -> View:
    """Turns a model's tensors into those of an artifact: the reference's `as_exported`, an artifact's as they are.

    Raises:
        CheckpointError: the reference's checkpoint cannot be read.
    """
    if isinstance(model, Artifact):
        return _plain
    trained: VideoTransformer = need("edgetube.formats", "export").of_bundle(model.bundle).model
    return as_exported(trained, model.bundle.spec)


def curve(
    truth: Backend,
    backend: Backend,
    bundle: Bundle,
    clips: Sequence[Frames],
    wanted: Sequence[str],
    stated: View,
    reference: Bundle | None = None,
    progress: Progress = silent,
) -> Curve:
    """The layers of one opened artifact.

    Args:
        truth: the reference, which can return the layers `wanted`.
        stated: turns the reference's tensors into those of an artifact, see `as_exported`.
        reference: the bundle that `truth` runs, if it runs one.
    """
    known = backend.layers(wanted)
    shown, view = comparable(known, bundle, reference)
    decisions = roles_of(bundle.spec).decisions if isinstance(truth, Follower) else ()
    measured = _measure(
        truth, backend, passes(shown, bundle.spec), clips, stated, view, bundle.name, decisions, progress
    )
    others = "the tokens are of other tubes than the reference's"
    note = "" if shown else others if known else "this bundle's runtime shows no inner tensors"
    return Curve(bundle.name, len(clips), tuple(measured), note)


def comparable(shown: Sequence[str], bundle: Bundle, other: Bundle | None = None) -> tuple[tuple[str, ...], View]:
    """Which of the layers that two models show can be compared, and what of each.

    Args:
        bundle: of one of them.
        other: of the other one; None if it is the trained model.
    """
    if other is not None:
        shown = _with_all_tokens(shown, bundle.spec, other.spec)
    if not _is_equalised(bundle, other):
        return tuple(shown), _plain
    roles = roles_of(bundle.spec)
    return _unscaled(shown, roles), _without_values(roles)


def read(tap: Tap, batch: int, clip: Frames) -> dict[str, Array]:
    """The inner tensors of a clip (T, H, W, 3) uint8, as a tap of `batch` clips gives them.

    Of each tensor the rows of that clip are returned: one, or one for each frame.
    """
    return {name: _first_clip(value, batch) for name, value in tap(np.repeat(clip[None], batch, axis=0)).items()}


def _measure(
    truth: Backend,
    backend: Backend,
    passes: Sequence[Sequence[str]],
    clips: Sequence[Frames],
    stated: View,
    view: View,
    name: str,
    decisions: Sequence[str],
    progress: Progress,
) -> Iterator[Layer]:
    """The SQNR of each layer over all clips; `passes` are the layers that are read together.

    Where tokens leave, `truth` follows the artifact's `decisions`, so that the same tokens are compared.
    """
    done, total = 0, sum(map(len, passes))
    progress(f"{name}: layers", 0, total)
    for some in passes:
        taps = truth.tap(some), backend.tap([*some, *decisions])
        sums = dict.fromkeys(some, (0.0, 0.0))
        for clip in clips:
            got = read(taps[1], backend.batch, clip)
            with followed(truth, {decision: got[decision] for decision in decisions}):
                expected = read(taps[0], truth.batch, clip)
            for layer in some:
                signal, noise = energies(view(layer, stated(layer, expected[layer])), view(layer, got[layer]))
                sums[layer] = sums[layer][0] + signal, sums[layer][1] + noise
        del taps  # before the next ones hold the weights once more
        yield from (Layer(layer, metrics.decibels(*sums[layer])) for layer in some)
        done += len(some)
        progress(f"{name}: layers", done, total)


@runtime_checkable
class Follower(Protocol):
    """A reference that can let tokens leave as an artifact decided."""

    def following(self, decisions: Mapping[str, Array]) -> AbstractContextManager[None]:
        """See `edgetube.runtimes.torch.Reference.following`."""


def followed(truth: Backend, decisions: Mapping[str, Array]) -> AbstractContextManager[None]:
    """Context manager: a model follows an artifact's decisions, where there are any."""
    if not decisions:
        return nullcontext()
    assert isinstance(truth, Follower)
    return truth.following(decisions)


def energies(reference: Array, value: Array) -> tuple[float, float]:
    """`metrics.energies` of a layer of two models; graphs keep some axes of length 1."""
    return metrics.energies(reference, value.reshape(reference.shape))


def passes(names: Sequence[str], spec: ModelSpec) -> list[Sequence[str]]:
    """Layers in groups that are read together: each group runs the whole model once a clip."""
    count = TOGETHER
    if set(names) <= set(roles_of(spec).landmarks):
        count = max(count, TOGETHER_BYTES // (4 * spec.sequence * spec.width))
    return [names[start : start + count] for start in range(0, len(names), count)]


def _first_clip(values: Array, batch: int) -> Array:
    """Of a tensor of `batch` clips, the rows of the first one: one, or one for each frame."""
    return values[: len(values) // batch]


def _with_all_tokens(shown: Sequence[str], *specs: ModelSpec) -> Sequence[str]:
    """Layers at which two artifacts have all tokens, and the output: behind these each has chosen its own."""
    if not all(spec.same_tubes(specs[0]) for spec in specs):
        return []  # the tokens differ from the start, so there is no layer to begin at
    whole = [roles_of(spec).whole for spec in specs if spec.reduction is not None]
    return [name for name in shown if all(name in names for names in whole)]


def _is_equalised(*some: Bundle | None) -> bool:
    """Whether calibration may have moved scales between neighbouring layers of an artifact."""
    return any(bundle is not None and bundles.CALIBRATION in bundle.files for bundle in some)


def _unscaled(shown: Sequence[str], roles: GraphRoles) -> tuple[str, ...]:
    """Layers without those that equalisation scales: outputs of LayerNorm that it is folded into, sums of values."""
    scaled = {site.producer for site in roles.fold_sites if site.kind == "norm"}
    scaled |= {attention.context for attention in roles.attention}
    return tuple(name for name in shown if name not in scaled)


def _plain(layer: str, value: Array) -> Array:
    return value


def _without_values(roles: GraphRoles) -> View:
    """Of a projection its queries and keys, which equalisation does not change; of other layers everything."""
    values = {site.producer: site.columns for site in roles.fold_sites if site.columns is not None}

    def view(layer: str, value: Array) -> Array:
        return np.delete(value, slice(*values[layer]), axis=-1) if layer in values else value

    return view


def as_exported(model: VideoTransformer, spec: ModelSpec) -> View:
    """Apply to the trained model's tensors what exported graphs fold into them: positions, and the queries' scale."""
    table = model.position_rows().detach().numpy()
    projections = {attention.projection: attention for attention in roles_of(spec).attention}

    def view(layer: str, value: Array) -> Array:
        if layer == TOKENS:
            return np.asarray(value + table, np.float32)
        if (attention := projections.get(layer)) is None:
            return value
        scale = np.ones(value.shape[-1], np.float32)
        scale[slice(*attention.queries)] = attention.scale
        return value * scale

    return view
