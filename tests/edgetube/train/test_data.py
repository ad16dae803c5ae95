"""Batches of clips."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from edgetube import datasets
from edgetube.contract import InputContract
from edgetube.datasets import ClipSet, Item
from edgetube.errors import InputError
from edgetube.train import data
from edgetube.train.data import Clips
from edgetube.video import Clip

CONTRACT = InputContract(2, 4, 4)


def items(count: int, broken: tuple[int, ...] = ()) -> tuple[Item, ...]:
    """Clips whose pixels are their number, of the classes `x` and `y` in turns."""

    def read(index: int) -> Clip:
        if index in broken:
            raise InputError(f"{index} is broken")
        return Clip(str(index), np.full(CONTRACT.shape, index, np.uint8), "xy"[index % 2])

    return tuple(Item(str(i), "xy"[i % 2], lambda _, i=i: read(i)) for i in range(count))  # type: ignore[misc]


def test_an_epoch_has_every_clip_once_and_another_order_than_the_next() -> None:
    first, second = (data.order_of(10, 0, epoch) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first == data.order_of(10, 0, 0) != data.order_of(10, 1, 0)
    places = [place for step in range(3) for place in data.places_of(step, 4, 10)]
    assert places == [*range(10), 0, 1]
    assert [list(data.share_of(range(6), rank, 2)) for rank in (0, 1)] == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize(("batch", "count"), [(4, 12), (5, 12), (8, 12), (7, 3), (1, 4), (12, 12)])
def test_every_image_comes_once_in_each_pass(batch: int, count: int) -> None:
    seen = []
    for step in range(3 * count):
        order, places = data.passes_of(step * batch, batch, count, 0)
        seen += [order[place] for place in places]
    passes = [seen[i : i + count] for i in range(0, len(seen), count)]
    assert len(passes) == 3 * batch
    assert all(sorted(one) == list(range(count)) for one in passes)
    assert len(set(map(tuple, passes))) > 1


def test_batches_have_clips_labels_and_names() -> None:
    clips = Clips(items(4), CONTRACT, ("x", "y"))
    frames, labels, names = clips.batch([3, 0, 2, 1], [0, 1])
    assert frames.shape == (2, 2, 4, 4, 3)
    assert frames[:, 0, 0, 0, 0].tolist() == [3, 0]
    assert (labels.tolist(), names) == ([1, 0], ["3", "0"])


def test_a_broken_clip_gives_way_to_the_next_of_the_order() -> None:
    clips = Clips(items(10, broken=(2, 5)), CONTRACT, ("x", "y"), limit=0.2)
    assert clips.batch([2, 5, 7, 1], [0, 3])[2] == ["7", "1"]
    assert clips.unread == {"2": "2 is broken", "5": "5 is broken"}
    clips = Clips(items(10, broken=(2, 5)), CONTRACT, ("x", "y"), limit=0.1)
    with pytest.raises(InputError, match="2 of 10 clips cannot be read, more than 10%; the first is 2 is broken"):
        clips.batch([2, 5, 7, 1], [0])


def test_clips_are_read_once_as_long_as_there_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    one = items(1)[0]
    counted = Item(one.name, one.label, lambda contract: reads.append(1) or one.read(contract))
    clips = Clips([counted], CONTRACT, ("x", "y"))
    assert clips.read(0) is clips.read(0)
    assert len(reads) == 1
    monkeypatch.setattr(data, "CACHE", 0)
    clips = Clips([counted], CONTRACT, ("x", "y"))
    clips.read(0), clips.read(0)
    assert len(reads) == 3


def test_a_split_takes_a_share_of_each_class_and_depends_on_names_alone() -> None:
    whole = ClipSet("set", items(40))
    train, held = data.split(whole, 0.2, 0)
    assert sorted(item.label or "" for item in held.items) == ["x"] * 4 + ["y"] * 4
    assert {item.name for item in train.items} == {str(i) for i in range(40)} - {item.name for item in held.items}
    again = data.split(ClipSet("set", whole.items[::-1]), 0.2, 0)[1]
    assert {item.name for item in again.items} == {item.name for item in held.items}


def test_each_class_that_can_has_clips_on_both_sides() -> None:
    counts = {"often": 40, "rare": 4, "pair": 2, "once": 1, "seldom": 3}
    labels = [label for label, count in counts.items() for _ in range(count)]
    whole = ClipSet("set", tuple(replace(item, label=label) for item, label in zip(items(50), labels, strict=True)))
    train, held = data.split(whole, 0.1, 0)
    assert Counter(item.label for item in held.items) == {"often": 4, "rare": 1, "pair": 1, "seldom": 1}
    assert Counter(item.label for item in train.items) == {"often": 36, "rare": 3, "pair": 1, "seldom": 2, "once": 1}
    assert Counter(item.label for item in data.split(whole, 0.99, 0)[0].items) == dict.fromkeys(counts, 1)
    with pytest.raises(InputError, match="set has 2 clips, one of each class, and none can be held out; give --val"):
        data.split(ClipSet("set", items(2)), 0.5, 0)


def test_the_built_in_clips_of_training_and_judging_share_no_photograph() -> None:
    train, held = datasets.built_in_calibration(90, ("a",)), datasets.built_in(108, ("a",))
    photographs = [{item.name.split("/")[1] for item in one.items} for one in (train, held)]
    assert photographs[0] & photographs[1] == set()
    assert min(map(len, photographs)) > 1
