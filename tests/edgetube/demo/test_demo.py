from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest

from edgetube import demo
from edgetube.contract import InputContract
from edgetube.video import Clip

SMALL = InputContract(frames=16, height=64, width=64, fps=15.0)


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return list(demo.evaluation(SMALL, 108))


def test_clips_are_what_the_contract_says(clips: list[Clip]) -> None:
    assert {clip.frames.shape for clip in clips} == {SMALL.shape}
    assert {clip.frames.dtype for clip in clips} == {np.dtype(np.uint8)}
    assert len({clip.name for clip in clips}) == len(clips)
    assert min(clip.frames.std() for clip in clips) > 5


def test_clips_are_the_same_every_time(clips: list[Clip]) -> None:
    again = list(demo.evaluation(SMALL, 20))
    assert all(
        a.name == b.name and a.label == b.label and (a.frames == b.frames).all()
        for a, b in zip(clips, again, strict=False)
    )


@pytest.mark.parametrize(("make", "count"), [(demo.evaluation, 108), (demo.calibration, 128)])
def test_classes_are_balanced(make: Callable[..., Any], count: int) -> None:
    tiny = InputContract(frames=2, height=16, width=16)
    for part in (count, count // 2):
        counts = Counter(clip.label for clip in make(tiny, part))
        assert set(counts) == set(demo.LABELS)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_each_photo_meets_each_class(clips: list[Clip]) -> None:
    pairs = Counter((clip.name.split("/")[1], clip.label) for clip in clips)
    assert len(pairs) == len(demo.EVALUATION) * len(demo.LABELS)
    assert set(pairs.values()) == {2}


def test_scenes_are_of_different_photos_and_movements() -> None:
    found = list(demo.scenes(SMALL, 8))
    shown = [clip.name.split("/")[1] for clip in found]
    assert set(shown[:5]) == set(demo.CALIBRATION)
    assert all(a != b for a, b in itertools.pairwise(shown))
    assert len({clip.label for clip in found}) == 8
    every = {clip.name: clip.frames for clip in demo.calibration(SMALL, 71)}
    assert all((clip.frames == every[clip.name]).all() for clip in found)


def test_evaluation_and_calibration_share_no_photo() -> None:
    names = {path.stem for path in demo.photo_files()}
    assert not set(demo.EVALUATION) & set(demo.CALIBRATION)
    assert set(demo.EVALUATION) | set(demo.CALIBRATION) == names
    for a, b in itertools.combinations(demo.photos(tuple(sorted(names))), 2):
        small = [photo.levels[-1][:16, :16].mean(axis=-1) for photo in (a, b)]
        assert abs(np.corrcoef(*(s.ravel() for s in small))[0, 1]) < 0.95, (a.name, b.name)


@pytest.mark.parametrize(("frames", "size"), [(1, (64, 64)), (7, (33, 57)), (32, (112, 112)), (5, (160, 96))])
def test_any_shape(frames: int, size: tuple[int, int]) -> None:
    contract = InputContract(frames, *size)
    for clip in demo.evaluation(contract, 9):
        assert clip.frames.shape == contract.shape
        assert (clip.label is None) == (frames == 1)


def test_another_size_shows_the_same_move() -> None:
    large = next(itertools.islice(demo.evaluation(SMALL.with_clip(size=(128, 128)), 2), 1, 2)).frames
    small = demo.golden(SMALL).frames
    shrunk = large.reshape(16, 64, 2, 64, 2, 3).mean(axis=(2, 4))
    assert np.abs(shrunk - small).mean() < 8
    assert np.abs(shrunk - small[::-1]).mean() > 16


def test_golden_moves() -> None:
    clip = demo.golden(SMALL)
    assert clip.label != "static"
    assert clip.frames.shape == SMALL.shape


def test_labels_are_what_the_frames_show(oracle: ModuleType) -> None:
    """The photographs' cameras are estimated from the frames by a method that knows nothing of the renderer."""
    clips = list(demo.evaluation(InputContract(16, 80, 80), 54))
    seen = [oracle.label(clip.frames) for clip in clips]
    wrong = [(clip.name, clip.label, guess) for clip, guess in zip(clips, seen, strict=True) if clip.label != guess]
    assert len(wrong) <= 0.1 * len(clips), wrong
    for label in demo.LABELS:
        right = [guess == label for clip, guess in zip(clips, seen, strict=True) if clip.label == label]
        assert np.mean(right) >= 0.7, (label, wrong)


def test_what_ships_is_small_and_explained() -> None:
    photos = demo.photo_files()
    assert sum(path.stat().st_size for path in photos) < 4_000_000
    assert sum(path.stat().st_size for path in demo.videos().values()) < 500_000
    assert demo.WEIGHTS.stat().st_size <= 8_000_000
    sources = (demo.HERE / "photos" / "SOURCES.md").read_text()
    assert all(f"| {path.name} |" in sources for path in photos)


def test_videos_decode_and_show_their_label(oracle: ModuleType) -> None:
    videos = demo.videos()
    assert len(videos) >= 3
    for label, path in videos.items():
        with av.open(str(path)) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert frames.shape == (64, 240, 320, 3)
        assert oracle.label(frames[::2, ::2, ::2]) == label
