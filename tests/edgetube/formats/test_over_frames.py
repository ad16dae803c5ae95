"""Image models over videos, end to end: `--pool-frames mean`; and what an export says about a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edgetube
from edgetube import bundle as bundles
from edgetube import demo, formats, preprocess
from edgetube.errors import InputError
from edgetube.formats.reading.files import ReadOptions
from tests.edgetube.formats import test_dinov2, test_vit
from tests.edgetube.formats.families import answers, frames_of, pixels_of, save

MEAN = ReadOptions(pool_frames="mean")


def vit(folder: Path) -> tuple[Any, Path]:
    model, processor = test_vit.vit()
    return model, save(model, folder, processor)


def dinov2(folder: Path) -> tuple[Any, Path]:
    model = test_dinov2.registers()
    return model, save(model, folder, test_dinov2.processor_of(48, 42))


MODELS = [vit, dinov2]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("frames", [None, 1, 3])
def test_logits_are_the_mean_of_those_of_the_frames(make: Any, frames: int | None, tmp_path: Path) -> None:
    model, folder = make(tmp_path / "m")
    found = formats.load(folder, MEAN).with_clip(frames=frames)
    assert found.contract.frames == found.spec.frames == (frames or 8)
    clips = frames_of(found)
    with torch.no_grad():
        each = torch.stack([model(clip).logits for clip in pixels_of(found, clips)])  # (B, T, classes)
    expected = each.mean(dim=1).numpy()
    assert frames == 1 or each.std(dim=1).max() > 0.05
    np.testing.assert_allclose(answers(found, clips), expected, atol=1e-4 * np.abs(expected).max())


def test_frames_are_taken_at_a_constant_rate_which_the_user_may_say(tmp_path: Path) -> None:
    _, folder = vit(tmp_path / "m")
    image, video = formats.load(folder).contract, formats.load(folder, MEAN).contract
    assert (image.sampling, image.fps, image.frames) == ("uniform", None, 1)
    assert (video.sampling, video.fps, video.frames) == ("uniform", 4.0, 8)
    assert (video.filter, video.resize, video.mean) == (image.filter, image.resize, image.mean)
    said = tmp_path / "spec.json"
    said.write_text('{"input": {"fps": 2}}')
    assert formats.load(folder, ReadOptions(pool_frames="mean", spec=str(said))).contract.fps == 2
    said.write_text('{"input": {"sampling": "segments"}}')
    assert formats.load(folder, ReadOptions(pool_frames="mean", spec=str(said))).contract.sampling == "segments"


def test_several_frames_of_an_image_model_need_the_option(tmp_path: Path) -> None:
    _, folder = vit(tmp_path / "m")
    with pytest.raises(InputError, match="m is a model of images; --pool-frames mean answers for 4 frames with the"):
        formats.load(folder).with_clip(frames=4)
    with pytest.raises(InputError, match="is a model of videos of 8 frames; leave out --pool-frames"):
        formats.load(folder, MEAN).over_frames()


@pytest.mark.slow
@pytest.mark.parametrize("make", MODELS)
def test_a_bundle_answers_for_a_video_file(
    make: Any, tmp_path: Path, edgetube_cli: Callable[..., tuple[int, str, str]]
) -> None:
    model, folder = make(tmp_path / "m")
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    command = [
        "export", "--target", "onnx-fp32", "--target", "openvino-fp32", "--checkpoint", folder, "--out",
        tmp_path / "out", "--pool-frames", "mean", "--frames", "4", "--lowering", "gather",
    ]  # fmt: skip
    code, out, err = edgetube_cli(*command, "--json")
    assert code == 0, err
    rows = json.loads(out)
    licence = "its licence, cc-by-nc-4.0, forbids commercial use"
    for row in rows:
        found = bundles.load(row["bundle"])
        assert (row["status"], row["licence"], row["notes"][-1]) == ("executed", "cc-by-nc-4.0", licence)
        assert found.checkpoint["licence"] == "cc-by-nc-4.0"
        assert found.checkpoint["pool_frames"] == "mean"
        assert found.build["notes"] == row["notes"]
        again = formats.of_bundle(found)
        assert (again.spec, again.contract) == (found.spec, found.contract)
        with edgetube.Runtime(row["bundle"]) as rt:
            video = next(iter(demo.videos().values()))
            answer = rt.predict(video)
            noise = frames_of(again, 1)[0]
            logits = np.array(rt.predict(noise).logits)
        with torch.no_grad():
            expected = model(pixels_of(again, preprocess.prepare(noise, again.contract)[None])[0]).logits.mean(dim=0)
        np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4 * float(expected.abs().max()))
        assert answer.end is not None
        assert answer.start is not None
        assert 0.7 < answer.end - answer.start <= 1.3  # 4 frames at 4 per second
    code, out, err = edgetube_cli(*command)
    assert code == 0
    assert err.count(licence) == 1
    code, out, _ = edgetube_cli("inspect", rows[0]["bundle"])
    assert code == 0
    assert licence in " ".join(out.split())
