"""Batches of clips: which ones, in which order, read and kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from edgetube.contract import InputContract
from edgetube.datasets import ClipSet, Item
from edgetube.errors import InputError
from edgetube.train import augment
from edgetube.video import Frames

CACHE = 1 << 30
"""Bytes of clips that are kept in memory, so that they are read once."""


def split(clips: ClipSet, share: float, seed: int) -> tuple[ClipSet, ClipSet]:
    """Clips to train on and to judge by, the second `share` of each class; depends on names and the seed alone.

    Of a class with several clips, at least one is held out and at least one is left; a single clip is trained on.

    Raises:
        InputError: no class has two clips.
    """
    classes: dict[str | None, list[Item]] = defaultdict(list)
    for item in clips.items:
        classes[item.label].append(item)
    names: set[str] = set()
    for items in classes.values():
        count = min(len(items) - 1, max(1, round(share * len(items))))
        names |= {item.name for item in replace(clips, items=tuple(items)).sample(count, seed).items}
    if not names:
        raise InputError(
            f"{clips.name} has {clips.count} clips, one of each class, and none can be held out; give --val DIR"
        )
    rest, held = (tuple(item for item in clips.items if (item.name in names) == judges) for judges in (False, True))
    return replace(clips, items=rest), replace(clips, items=held)


@dataclass
class Clips:
    """The clips of a set as a model takes them, with numbers for labels.

    Attributes:
        items: unread.
        contract: of the input.
        labels: of the classifier.
        limit: share of the clips that may be unreadable.
        unread: name -> why, of those that were met.
    """

    items: Sequence[Item]
    contract: InputContract
    labels: Sequence[str]
    limit: float = 0.1
    unread: dict[str, str] = field(default_factory=dict)
    _kept: dict[int, Frames] = field(default_factory=dict)
    _bytes: int = 0

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def mirrors(self) -> tuple[int, ...]:
        """See `augment.mirrored`."""
        return augment.mirrored(self.labels)

    def read(self, index: int) -> Frames | None:
        """Frames (T, H, W, 3) uint8 of a clip; None if it cannot be read.

        Raises:
            InputError: more than `limit` of the clips cannot be read.
        """
        item = self.items[index]
        if item.name in self.unread:
            return None
        if (kept := self._kept.get(index)) is not None:
            return kept
        try:
            frames = item.read(self.contract).frames
        except InputError as error:
            self.unread[item.name] = str(error)
            if len(self.unread) > self.limit * len(self.items):
                raise InputError(
                    f"{len(self.unread)} of {len(self.items)} clips cannot be read, more than {self.limit:.0%}; the "
                    f"first is {next(iter(self.unread.values()))}"
                ) from error
            return None
        if self._bytes + frames.nbytes <= CACHE:
            self._kept[index], self._bytes = frames, self._bytes + frames.nbytes
        return frames

    def label(self, index: int) -> int:
        return self.labels.index(str(self.items[index].label))

    def batch(self, order: Sequence[int], places: Sequence[int]) -> tuple[Tensor, Tensor, list[str]]:
        """Clips (B, T, H, W, 3) uint8 with labels (B,) and names, those at `places` of `order`.

        One that cannot be read gives way to the next of the order that can.
        """
        frames, labels, names = [], [], []
        for place in places:
            for step in range(len(order)):
                index = int(order[(place + step) % len(order)])
                if (found := self.read(index)) is not None:
                    break
            else:
                raise InputError(f"none of the {len(order)} clips can be read: {next(iter(self.unread.values()))}")
            frames.append(torch.from_numpy(found))
            labels.append(self.label(index))
            names.append(self.items[index].name)
        return torch.stack(frames), torch.tensor(labels), names


@lru_cache(maxsize=4)
def order_of(count: int, seed: int, epoch: int, kind: int = 0) -> Sequence[int]:
    """A random order of `count` clips, another one in each epoch; `kind` is another order beside it."""
    return tuple(np.random.default_rng([seed, epoch, kind]).permutation(count).tolist())


def places_of(step: int, batch: int, count: int) -> list[int]:
    """The places of the clips of step number `step` of an epoch; the last batch is filled from the beginning."""
    return [place % count for place in range(step * batch, (step + 1) * batch)]


def passes_of(start: int, size: int, count: int, seed: int) -> tuple[Sequence[int], list[int]]:
    """The images number `start` to `start + size` - 1, where a pass over all `count` follows another.

    Returns:
        The order of the passes that they lie in, one behind the other, and their places in it.
    """
    first, last = start // count, (start + size - 1) // count
    orders = [order_of(count, seed, number, 1) for number in range(first, last + 1)]
    order = orders[0] if first == last else tuple(chain.from_iterable(orders))
    return order, list(range(start - first * count, start - first * count + size))


def share_of(places: Sequence[int], rank: int, ranks: int) -> Sequence[int]:
    """The part of one of several processes."""
    return places[rank::ranks]
