"""Two checks that logits alone do not cover: sensitivity to the order of frames, and the error of each layer.

A robust model may give the same class, and nearly the same logits, on wrong pixels. So two more checks run on a few
clips. The frames of a clip are reversed and shuffled: the artifact's logits must change as the reference's do. The
tokens and the output of every block are compared: the error may grow from layer to layer, but not jump.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgetube import metrics
from edgetube.bench import following, layers
from edgetube.bench.model_set import OpenedModels
from edgetube.bench.remembering import Remembering
from edgetube.progress import Progress, silent
from edgetube.roles import roles_of
from edgetube.runtimes.base import Logits
from edgetube.video import Frames

ORDER_CLIPS, LAYER_CLIPS = 6, 2
"""Clips of the order check, and of the layer check."""

MOVES = 1e-2
"""The reference is insensitive to order if its logits change by less than this share of their energy, 20 dB.

The noise of sound arithmetic, 40 dB and less, would be a good part of smaller changes. A VideoMAE with random weights
changes by 0.14 %, and in bfloat16 its changes are 0.989 alike.
"""

NOISE = 1e-2
"""Most energy of the error on clips as they are, as a share of that of the changes.

If errors are independent, changes are expected to be alike but for this share. Where the error is larger, other gates
judge it.
"""


@dataclass(frozen=True)
class Probe:
    """The results of one artifact.

    Attributes:
        order_agreement: `edgetube.metrics.moves_alike` of the reversed and shuffled clips; None for single images, for
            a reference that is insensitive to order, and where noise hides it.
        regret: see `edgetube.bench.following.REGRET`; None where all tokens stay, or the artifact shows no decisions.
        jump: (layer, dB) of the largest `edgetube.bench.layers.drops`; None where the runtime cannot return layers.
    """

    order_agreement: float | None = None
    jump: tuple[str, float] | None = None
    regret: float | None = None


def reordered(frames: Frames) -> list[Frames]:
    """A clip (T, H, W, 3) reversed, and shuffled by a fixed permutation; empty for an image."""
    if len(frames) < 2:
        return []
    shuffled = np.random.default_rng(0).permutation(len(frames))
    return [np.ascontiguousarray(frames[::-1]), np.ascontiguousarray(frames[shuffled])]


def in_orders(clips: Sequence[Frames]) -> list[Frames]:
    """Each clip with its `reordered` forms behind it; empty for images."""
    shown = [form for clip in clips for form in (clip, *reordered(clip))]
    return shown if len(shown) > len(clips) else []


def order_agreement(reference: Sequence[Logits], answers: Sequence[Logits]) -> float | None:
    """`moves_alike` of logits (classes,), given for each clip and its two `reordered` forms in turn.

    None where it would tell of the model or of noise, not of order: see `MOVES` and `NOISE`.
    """
    first, second = (np.stack(each).reshape(len(each) // 3, 3, -1).astype(np.float64) for each in (reference, answers))
    moved = first[:, 1:] - first[:, :1]
    error = first[:, :1] - second[:, :1]
    if not (moved**2).sum() > MOVES * (first**2).sum() or (error**2).mean() > NOISE * (moved**2).mean():
        return None
    return metrics.moves_alike(moved, second[:, 1:] - second[:, :1])


def probe(opened: OpenedModels, clips: Sequence[Frames], progress: Progress = silent) -> tuple[Probe, ...]:
    """Probe the bundles of an open model set, in its order.

    Args:
        clips: (T, H, W, 3) uint8 each; the first few are used.
    """
    _, *bundles = opened.model_set.models
    shown, known = in_orders(clips[:ORDER_CLIPS]), Remembering(opened.backend(0))
    agreements, regrets = [], []
    for index, model in enumerate(bundles, start=1):
        progress(f"{model.name}: order", 0, 1)
        backend = opened.backend(index)
        paired = following.pair(opened.reference_of(index), backend, model.bundle, (known, backend))
        alike = paired.alike and model.bundle.spec.same_tubes(opened.model_set.models[0].bundle.spec)
        pairs = [*map(paired, shown or clips[:ORDER_CLIPS])] if alike and (shown or model.bundle.spec.reduction) else []
        agreements.append(order_agreement(*zip(*pairs, strict=True)) if shown and pairs else None)
        regrets.append(paired.regret)
        progress(f"{model.name}: order", 1, 1)
    curves = _curves(opened, clips[:LAYER_CLIPS], progress)
    return tuple(
        Probe(agreement, layers.largest_drop(found, model.bundle.precision), regret)
        for model, agreement, found, regret in zip(bundles, agreements, curves, regrets, strict=True)
    )


def _curves(opened: OpenedModels, clips: Sequence[Frames], progress: Progress) -> tuple[layers.Curve, ...]:
    """The landmarks of each bundle; empty curves where the reference cannot return layers."""
    wanted = roles_of(opened.model_set.models[0].bundle.spec).landmarks
    if not opened.backend(0).layers(wanted):
        return tuple(layers.Curve(model.name, 0, ()) for model in opened.model_set.models[1:])
    return tuple(layers.of_opened(opened, clips, wanted, progress))
