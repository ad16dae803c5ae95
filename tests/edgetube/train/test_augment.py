"""Changes of clips and their labels."""

from __future__ import annotations

import pytest
import torch

from edgetube import demo
from edgetube.train import augment


def test_left_and_right_change_places_in_a_mirror() -> None:
    labels = ("Turn Left", "turning right", "Turn Right", "wave", "roll_cw", "roll_ccw", "copyright")
    assert augment.mirrored(labels) == (2, -1, 0, 3, 5, 4, 6)
    moved = [demo.LABELS[i] for i in augment.mirrored(demo.LABELS)]
    assert moved == ["static", "pan-right", "pan-left", "tilt-up", "tilt-down", "zoom-in", "zoom-out", "roll-ccw",
                     "roll-cw"]  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (("TurnLeft", "TurnRight", "Wave"), (1, 0, 2)),
        (("turnRIGHT", "turnLEFT"), (1, 0)),
        (("turnleft", "turnright", "rightturn"), (1, 0, -1)),
        (("swipe_leftwards", "swipe_rightwards"), (1, 0)),
        (("left-handed", "RightHanded"), (1, 0)),
        (("clockwise", "anticlockwise"), (1, 0)),
        (("Rotate Clockwise", "Rotate Counter-Clockwise"), (1, 0)),
        (("RollCCW", "roll_cw"), (1, 0)),
        (("anti clockwise", "counterclockwise", "clockwise"), (2, 2, -1)),  # of which there are two
        (("from left to right", "from right to left"), (1, 0)),
        (("bright", "standing upright", "RightOn"), (0, 1, -1)),
        (("L", "R", "S", "hand_l"), (-1, -1, 2, -1)),
        (("links", "nach-rechts", "左", "Ü"), (0, 1, 2, 3)),
        (("go", "Go", "go left", "Go-Left"), (0, 1, -1, -1)),
        (("", "--"), (0, 1)),
    ],
)
def test_sides_are_known_however_they_are_written(labels: tuple[str, ...], expected: tuple[int, ...]) -> None:
    assert augment.mirrored(labels) == expected


def clips(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.randint(0, 256, (count, 3, 8, 10, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return made, torch.arange(count) % 3


def test_half_of_the_clips_are_mirrored_with_their_labels() -> None:
    before, labels = clips()
    after, found = augment.augment(before, labels, (1, 0, -1), 0.0, torch.Generator().manual_seed(0))
    turned = [i for i in range(64) if torch.equal(after[i], before[i].flip(2))]
    same = [i for i in range(64) if torch.equal(after[i], before[i])]
    assert sorted(turned + same) == list(range(64))
    assert 10 < len(turned) < 35
    assert all(labels[i] < 2 and found[i] == 1 - labels[i] for i in turned)
    assert all(found[i] == labels[i] for i in same)


def test_frames_of_a_clip_are_changed_alike_and_within_bounds() -> None:
    before, labels = clips(16)
    before = before[:, :1].expand(-1, 3, -1, -1, -1)
    after, found = augment.augment(before, labels, None, 0.2, torch.Generator().manual_seed(0))
    assert torch.equal(after[:, 0], after[:, 2])
    assert torch.equal(found, labels)
    assert not torch.equal(after, before)
    grey = torch.full((8, 2, 8, 8, 3), 100, dtype=torch.uint8)
    changed, _ = augment.augment(grey, torch.zeros(8, dtype=torch.long), None, 0.1, torch.Generator().manual_seed(0))
    assert changed.min() >= 100 - 10 - 26
    assert changed.max() <= 100 + 10 + 26
    assert len(changed.flatten(1).float().mean(1).unique()) == 8


def test_the_same_generator_gives_the_same_clips() -> None:
    before, labels = clips(4)
    first, second = (augment.augment(before, labels, (0, 1, 2), 0.2, torch.Generator().manual_seed(7))[0] for _ in "ab")
    assert torch.equal(first, second)


def test_a_crop_moves_the_picture_and_repeats_its_edge() -> None:
    clip = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 4, 1)
    moved = augment._shifted(clip, (1, -1))
    assert moved[0, :, :, 0].tolist() == [[1, 2, 3, 3], [1, 2, 3, 3], [5, 6, 7, 7]]
