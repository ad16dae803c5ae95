"""The novelty gate against a loop over the tubes' positions, and on clips that a camera on a tripod would give."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from edgetube import voxels
from edgetube.errors import InputError
from edgetube.live.novelty import BUDGET, THRESHOLD, VOXELS, NoveltyGate
from edgetube.spec import ModelSpec, TubeSpec, named

HEAD: dict[str, Any] = {"width": 24, "depth": 1, "heads": 2, "classifiers": (("moves", 3),)}
SPEC = ModelSpec(
    tubes=(TubeSpec((4, 8, 8), (8, 16, 16), (1, 3, 2), (2, 1, 1)), TubeSpec((1, 4, 4), (16, 12, 12))),
    frames=16, size=(48, 64), **HEAD,
)  # fmt: skip
PER_FRAME = ModelSpec(tubes=(TubeSpec((1, 8, 8), (1, 16, 16)),), frames=4, size=(32, 32), per_frame=True, **HEAD)


def clip_of(spec: ModelSpec, value: int = 100) -> np.ndarray:
    return np.full((*spec.clip, 3), value, np.uint8)


def gate_on(frames: np.ndarray, spec: ModelSpec = SPEC, skip_still: float | bool = True) -> NoveltyGate:
    gate = NoveltyGate(spec, skip_still)
    gate.answered(frames, 0.0)
    return gate


@pytest.mark.parametrize("spec", [SPEC, PER_FRAME], ids=["tubes", "frames"])
def test_the_change_is_the_largest_mean_difference_of_a_position(spec: ModelSpec, rng: np.random.Generator) -> None:
    """In a loop: where a position is all read (no more than 64 voxels) its mean over one colour a voxel, else about."""
    before, after = (rng.integers(0, 256, (*spec.clip, 3), np.uint8) for _ in range(2))
    gate = gate_on(before, spec)
    means = []
    for index in spec.active:
        for (t0, t1), (h0, h1), (w0, w1) in voxels.boxes(voxels.placed(spec, index), spec.clip):
            box = np.abs(after[t0:t1, h0:h1, w0:w1].astype(int) - before[t0:t1, h0:h1, w0:w1])
            if math.prod(box.shape[:3]) <= VOXELS:
                flat = box.reshape(-1, 3)
                means.append(np.mean([flat[i, i % 3] for i in range(len(flat))]))
    assert gate.change(after) >= max(means)
    assert gate.change(after) < 255
    small = ModelSpec(tubes=(TubeSpec((1, 4, 4), (16, 12, 12)),), frames=16, size=(48, 64), **HEAD)
    alone = gate_on(before, small) if spec is SPEC else gate
    assert alone.change(after) == pytest.approx(max(means))


def test_every_position_is_seen_and_nothing_else_is(rng: np.random.Generator) -> None:
    read = voxels.mask(SPEC.tubes, SPEC.clip)
    before = clip_of(SPEC)
    gate = gate_on(before)
    outside = before.copy()
    outside[~read] = rng.integers(0, 256, (int((~read).sum()), 3), np.uint8)
    assert gate.change(outside) == 0
    assert not gate.changed(outside, 1.0)
    for index in SPEC.active:
        for (t0, t1), (h0, h1), (w0, w1) in voxels.boxes(SPEC.tubes[index], SPEC.clip):
            moved = before.copy()
            moved[t0:t1, h0:h1, w0:w1] += 50
            assert gate.change(moved) == 50
            assert gate.changed(moved, 1.0)


@pytest.mark.parametrize(
    "spec", [named("tubevit-s"), named("tubevit-b-s2d"), PER_FRAME, named("tubevit-s", frames=1)], ids=str
)
def test_how_much_is_compared(spec: ModelSpec) -> None:
    gate = NoveltyGate(spec)
    positions = sum(len(voxels.boxes(voxels.placed(spec, i), spec.clip)) for i in spec.active)
    assert 8 * positions <= gate.compared <= max(BUDGET, 8 * positions)
    assert gate.compared <= VOXELS * positions


def test_all_colours_count() -> None:
    before = clip_of(SPEC)
    for channel in range(3):
        after = before.copy()
        after[..., channel] += 60
        assert gate_on(before).change(after) == pytest.approx(20, rel=0.15)


def test_black_to_white_is_not_small() -> None:
    """The difference of two uint8 numbers does not wrap around."""
    assert gate_on(clip_of(SPEC, 0)).change(clip_of(SPEC, 255)) == 255
    assert gate_on(clip_of(SPEC, 255)).change(clip_of(SPEC, 0)) == 255


def test_noise_of_a_sensor_is_no_change_and_a_small_mover_is_one(rng: np.random.Generator) -> None:
    spec = named("tubevit-s")
    scene = np.repeat(rng.integers(40, 200, (1, 28, 28, 3)), spec.frames, axis=0).repeat(8, axis=1).repeat(8, axis=2)

    def filmed(picture: np.ndarray) -> np.ndarray:
        return np.clip(picture + rng.normal(0, 1.5, picture.shape) + 0.5, 0, 255).astype(np.uint8)

    gate = gate_on(filmed(scene), spec)
    assert not gate.changed(filmed(scene), 1.0)
    mover = scene.copy()
    for t in range(spec.frames):
        mover[t, 100:112, 40 + 2 * t : 52 + 2 * t] = 220  # 0.3 % of the picture
    assert gate.changed(filmed(mover), 1.0)


def test_a_slow_change_adds_up() -> None:
    gate, answers = gate_on(clip_of(SPEC, 100)), 0
    for step in range(1, 21):
        frames = clip_of(SPEC, 100 + step)
        if gate.changed(frames, 0.1 * step):
            answers += 1
            gate.answered(frames, 0.1 * step)
    assert answers == 20 // THRESHOLD


def test_a_threshold_of_ones_own() -> None:
    before, after = clip_of(SPEC, 100), clip_of(SPEC, 110)
    assert gate_on(before, skip_still=10.0).changed(after, 1.0)
    assert not gate_on(before, skip_still=10.5).changed(after, 1.0)


def test_time_bounds_the_risk() -> None:
    frames = clip_of(SPEC)
    gate = NoveltyGate(SPEC, refresh_after=2.0)
    assert gate.changed(frames, 7.0), "nothing was answered yet"
    assert gate.changed(frames, 7.5), "nor was this"
    assert gate.change(frames) == math.inf
    gate.answered(frames, 7.5)
    assert [gate.changed(frames, at) for at in (7.5, 8.0, 9.4, 9.5, 30.0, 7.4)] == [
        False, False, False, True, True, True,
    ]  # fmt: skip
    gate.answered(frames, 9.5)
    assert not gate.changed(frames, 9.6)
    gate.reset()
    assert gate.changed(frames, 9.7)


def test_a_buffer_that_is_filled_again_is_read_again() -> None:
    frames = clip_of(SPEC)
    gate = gate_on(frames)
    assert not gate.changed(frames, 1.0)
    frames[:] = 200
    assert gate.changed(frames, 1.1)


def test_frames_that_are_a_view_are_read_in_their_order(rng: np.random.Generator) -> None:
    plain = rng.integers(0, 256, (*SPEC.clip, 3), np.uint8)
    view = np.ascontiguousarray(plain[::-1])[::-1]
    assert gate_on(plain).change(view) == 0


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, 256, "4", False])
def test_a_threshold_that_is_none(value: Any) -> None:
    with pytest.raises(InputError, match="skip_still"):
        NoveltyGate(SPEC, value)


@pytest.mark.parametrize("value", [0, -1, math.nan, True])
def test_a_time_that_is_none(value: Any) -> None:
    with pytest.raises(InputError, match="refresh_after"):
        NoveltyGate(SPEC, refresh_after=value)


def test_other_frames_are_refused() -> None:
    gate = NoveltyGate(SPEC)
    with pytest.raises(InputError, match=r"frames \(1, 48, 64, 3\) uint8; expected \(16, 48, 64, 3\)"):
        gate.changed(clip_of(SPEC)[:1], 0.0)
    with pytest.raises(InputError, match="float32; expected"):
        gate.answered(clip_of(SPEC).astype(np.float32), 0.0)
