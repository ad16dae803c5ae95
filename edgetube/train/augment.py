"""Changes of clips that their labels allow."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

_SIDES = {"left": "right", "right": "left", "clockwise": "counterclockwise", "counterclockwise": "clockwise"}
"""Words that a mirror exchanges."""

_OTHER = {"cw": "clockwise", "ccw": "counterclockwise", "acw": "counterclockwise", "anticlockwise": "counterclockwise"}
"""Other ways to write them."""

_UNSURE = frozenset("lr")
"""Words that may be sides, or not: letters of a sign language."""

_PLAIN = frozenset(("bright", "upright", "copyright", "outright", "forthright", "playwright", "fright", "cleft"))
"""Words that end like a side and are none."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W_A-Za-z]+")
_AGAINST = re.compile(r"\b(counter|anti) (?=clockwise\b)")
_SIDE = re.compile(r"\b(?:left|right)|(?:left|right)\b|\b(?:counter)?clockwise\b")


def mirrored(labels: Sequence[str]) -> tuple[int, ...]:
    """The label that each becomes in a mirror, by number: of "pan-left" that of "pan-right".

    How words are written does not matter: "TurnLeft", "turn_left", "counter-clockwise", "anticlockwise".

    -1 where that is none of the labels, or cannot be told: such clips are never mirrored.
    """
    words = [_words(label) for label in labels]
    places: dict[str, list[int]] = defaultdict(list)
    for i, own in enumerate(words):
        places[own].append(i)
    found = []
    for i, own in enumerate(words):
        other = " ".join(map(_exchanged, own.split()))
        others = [i] if other == own else places.get(other, [])
        found.append(others[0] if len(others) == 1 and _UNSURE.isdisjoint(own.split()) else -1)
    return tuple(found)


def _words(label: str) -> str:
    """The words of a label in small letters, with one space between them."""
    words = (word.lower() for word in _WORD.findall(label))
    return _AGAINST.sub("counter", " ".join(_OTHER.get(word, word) for word in words))


def _exchanged(word: str) -> str:
    return word if word in _PLAIN else _SIDE.sub(lambda side: _SIDES[side[0]], word)


def augment(
    clips: Tensor, labels: Tensor, mirrors: Sequence[int] | None, jitter: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random changes of uint8 clips (B, T, H, W, C) and their labels (B,); all frames of a clip are changed alike.

    Args:
        mirrors: see `mirrored`; None leaves left where it is.
        jitter: see `edgetube.train.recipe.Recipe`.
        generator: on the CPU; the same number of draws is taken whatever the clips are.
    """
    count = len(clips)
    turn, gain, offset, shift = (torch.rand(count, n, generator=generator) for n in (1, 1, 1, 2))
    changed, found = [], []
    for i in range(count):
        clip, label = clips[i], int(labels[i])
        if mirrors is not None and float(turn[i]) < 0.5 and mirrors[label] >= 0:
            clip, label = clip.flip(2), mirrors[label]
        if jitter:
            most = jitter * clip.shape[1], jitter * clip.shape[2]
            clip = _shifted(clip, [round(float(2 * s - 1) * m) for s, m in zip(shift[i], most, strict=True)])
            scale, add = 1 + jitter * float(2 * gain[i] - 1), 255 * jitter * float(2 * offset[i] - 1)
            clip = (clip.float() * scale + add).round().clamp(0, 255).to(clip.dtype)
        changed.append(clip)
        found.append(label)
    return torch.stack(changed), torch.tensor(found, dtype=labels.dtype)


def _shifted(clip: Tensor, by: Sequence[int]) -> Tensor:
    """A clip (T, H, W, C) moved by pixels down and to the right; its edges are repeated."""
    for axis, step in zip((1, 2), by, strict=True):
        size = clip.shape[axis]
        clip = clip.index_select(axis, (torch.arange(size) - step).clamp(0, size - 1))
    return clip
