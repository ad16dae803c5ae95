"""Video models made of image models: of every family that has learned positions, with the same answers on images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetube import demo, formats
from edgetube.errors import InputError, ParityError, SpecError
from edgetube.formats.reading.files import ReadOptions
from edgetube.model import checkpoints
from edgetube.model.checkpoints import Checkpoint
from edgetube.model.transformer import VideoTransformer, with_weights
from edgetube.runtime import Runtime
from edgetube.spec import TubeSpec
from edgetube.train import start
from edgetube.train.start import Plan
from tests.edgetube.formats import (
    test_clip,
    test_dinov2,
    test_dinov2_onnx,
    test_dinov3,
    test_openclip,
    test_siglip,
    test_timm,
    test_torchvision,
    test_vit,
)
from tests.edgetube.formats.families import answers, frames_of, proves, save, shake

TUBES = (TubeSpec((4, 8, 8), (4, 16, 16)), TubeSpec((2, 4, 4), (4, 8, 8), (1, 2, 2)))
PLAN = Plan(TUBES, frames=8, gates=(0, 1))

Made = tuple[Any, ReadOptions]


def text_of(folder: Path, width: int) -> ReadOptions:
    np.save(folder / "text.npy", np.random.default_rng(0).normal(size=(3, width)).astype(np.float32))
    return ReadOptions(text_features=str(folder / "text.npy"))


def transformers_vit(folder: Path) -> Made:
    return save(*reversed_arguments(test_vit.vit(), folder)), ReadOptions()


def reversed_arguments(made: tuple[Any, Any], folder: Path) -> tuple[Any, Path, Any]:
    return made[0], folder / "m", made[1]


def deit(folder: Path) -> Made:
    return save(*reversed_arguments(test_vit.deit(teacher=True), folder)), ReadOptions()


def dinov2(folder: Path) -> Made:
    return save(test_dinov2.plain(), folder / "m", test_dinov2.processor_of(48, 42)), ReadOptions()


def dinov2_registers(folder: Path) -> Made:
    return save(test_dinov2.registers(), folder / "m", test_dinov2.processor_of()), ReadOptions()


def dinov2_onnx(folder: Path) -> Made:
    path = test_dinov2_onnx.written(shake(test_dinov2_onnx.DepthMap()), folder / "depth.onnx", 42)
    torch.save(shake(torch.nn.Linear(48, 4)).state_dict(), folder / "head.pt")
    return path, ReadOptions(classifier=str(folder / "head.pt"), spec=test_dinov2_onnx.spec_file(folder))


def siglip(folder: Path) -> Made:
    return save(test_siglip.classifier(), folder / "m", test_siglip.PROCESSOR), ReadOptions()


def siglip_zero_shot(folder: Path) -> Made:
    return save(test_siglip.whole(), folder / "m", test_siglip.PROCESSOR), text_of(folder, 24)


def clip(folder: Path) -> Made:
    return save(test_clip.classifier(), folder / "m", test_clip.processor_of()), ReadOptions()


def clip_zero_shot(folder: Path) -> Made:
    return save(test_clip.whole(), folder / "m", test_clip.processor_of()), text_of(folder, 12)


def torchvision(folder: Path) -> Made:
    torch.save(test_torchvision.model_of().state_dict(), folder / "m.pth")
    (folder / "spec.json").write_text(test_torchvision.SAID)
    return folder / "m.pth", ReadOptions(spec=str(folder / "spec.json"))


def open_clip(folder: Path) -> Made:
    config = test_openclip.config_of(quick=True)
    return test_openclip.folder_of(test_openclip.model_of(config), config, folder / "m"), text_of(folder, 12)


def timm_of(name: str, **changes: Any) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        made = test_timm.model_of(name, **changes)
        return test_timm.folder_of(made, folder / "m", data_config={"input_size": (3, 32, 32)}), ReadOptions()

    return make


FAMILIES: dict[str, Callable[[Path], Made]] = {
    "vit": transformers_vit,
    "deit": deit,
    "dinov2": dinov2,
    "dinov2 with registers": dinov2_registers,
    "dinov2 in ONNX": dinov2_onnx,
    "siglip": siglip,
    "siglip zero-shot": siglip_zero_shot,
    "clip": clip,
    "clip zero-shot": clip_zero_shot,
    "torchvision": torchvision,
    "open_clip": open_clip,
    "timm vit": timm_of("vit_base_patch16_224"),
    "timm vit of means": timm_of("vit_base_patch16_224", global_pool="avg", class_token=False),
    "timm siglip": timm_of("vit_base_patch16_siglip_224"),
    "timm dinov2": timm_of("vit_giant_patch14_dinov2"),
    "timm deit3": timm_of("deit3_base_patch16_224"),
}


def image_of(family: str, folder: Path) -> Checkpoint:
    source, options = FAMILIES[family](folder)
    return formats.load(source, options)


def opened(video: Checkpoint) -> Checkpoint:
    """The model as training may leave it, but for the patches, positions, blocks and readout of images."""
    with torch.no_grad():
        for name, value in video.model.named_parameters():
            if name == "anchor.time":
                value.fill_(3.0)
            elif name.startswith("tubes.") and name.rsplit(".", 1)[1] != str(len(video.spec.tubes) - 1):
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    return video


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_answered_as_before_and_videos_otherwise(family: str, tmp_path: Path) -> None:
    image = image_of(family, tmp_path)
    video = start.from_image(image, PLAN)
    assert (video.spec.frames, video.spec.positions, video.spec.prefix) == (8, "anchored", image.spec.prefix)
    assert start.image_error(image, video) <= 1e-5
    path = checkpoints.save(opened(video), tmp_path / "video.safetensors")
    read = formats.load(path)
    assert (read.spec, read.contract, read.labels) == (video.spec, video.contract, image.labels)
    pictures = frames_of(image)
    expected = answers(image, pictures)
    np.testing.assert_allclose(
        answers(read.with_clip(frames=1), pictures), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )
    clips = frames_of(read)
    forward, backward = answers(read, clips), answers(read, np.ascontiguousarray(clips[:, ::-1]))
    assert np.abs(forward - backward).max() > 1e-3 * np.abs(forward).max()


def test_rotary_positions_are_refused(tmp_path: Path) -> None:
    folder = test_dinov3.with_head(test_dinov3.tower(), test_dinov3.head(), tmp_path / "m")
    with pytest.raises(SpecError, match=r"has rotary positions, .* give a model with learned positions"):
        start.from_image(formats.load(folder), PLAN)


def test_a_video_at_another_size_takes_the_grid_of_that_size(tmp_path: Path) -> None:
    image = image_of("vit", tmp_path)
    first = start.from_image(image, PLAN).with_clip(size=(48, 40))
    second = start.from_image(image.with_clip(size=(48, 40)), PLAN)
    assert first.model.anchor is not None
    assert second.model.anchor is not None
    with torch.no_grad():
        second.model.anchor.time.copy_(first.model.anchor.time)
    clips = frames_of(first)
    np.testing.assert_array_equal(answers(first, clips), answers(second, clips))
    back = first.with_clip(size=(32, 32))
    assert back.model.anchor is not None
    torch.testing.assert_close(back.model.anchor.grid, image.model.positions, rtol=0, atol=0)


def test_a_grid_without_a_rule_is_of_one_size(tmp_path: Path) -> None:
    video = start.from_image(image_of("torchvision", tmp_path), PLAN)
    assert video.with_clip(frames=12).spec.frames == 12
    with pytest.raises(SpecError, match="cannot run on"):
        video.with_clip(size=(48, 48))


def test_the_licence_stays_with_the_weights(tmp_path: Path) -> None:
    made = replace(start.from_image(image_of("vit", tmp_path), PLAN), licence="cc-by-nc-4.0")
    read = formats.load(checkpoints.save(made, tmp_path / "video.safetensors"))
    assert read.licence == "cc-by-nc-4.0"
    assert any("cc-by-nc-4.0" in note for note in read.notes)
    read = formats.load(checkpoints.save(replace(made, licence="other\t(" + 300 * "x"), tmp_path / "long.safetensors"))
    assert read.licence.startswith("other\\t(xxx")
    assert len(read.licence) == checkpoints.LICENCE


def test_what_cannot_be_a_start(tmp_path: Path) -> None:
    image = image_of("vit", tmp_path)
    video = start.from_image(image, PLAN)
    with pytest.raises(InputError, match="is a model of videos of 8 frames; give an image model"):
        start.from_image(video, PLAN)
    with pytest.raises(SpecError, match=r"does not fit: time is 16, minimum 20"):
        start.from_image(image, Plan(frames=16))
    with pytest.raises(SpecError, match=r"have 1 of one frame, 1x4x4; an image of this model is made of 1x8x8"):
        start.from_image(image, replace(PLAN, tubes=(TubeSpec((1, 4, 4), (4, 8, 8)),)))
    with pytest.raises(SpecError, match=r"gates \[2\] are outside the 2 blocks"):
        start.from_image(image, replace(PLAN, gates=(2,)))
    with torch.no_grad():
        video.model.blocks[0].alpha.fill_(0.5)  # type: ignore[operator]
    with pytest.raises(ParityError, match="answers images otherwise"):
        start.image_error(image, video)


def small_video(folder: Path) -> Checkpoint:
    """A small video model with trained tubes, of another width, patch and normalisation than `vit`."""
    (folder / "small").mkdir()
    made = timm_of("vit_base_patch16_224", embed_dim=16, num_heads=2, patch_size=4, img_size=32)(folder / "small")
    return opened(start.from_image(formats.load(*made), PLAN))


def test_tubes_of_a_small_model_go_behind_shut_gates(tmp_path: Path) -> None:
    large, small = image_of("vit", tmp_path), small_video(tmp_path)
    made = start.from_video(small, large, replace(PLAN, frames=None, gates=None))
    assert made.spec.tubes[:2] == small.spec.tubes[:2]
    assert (made.spec.frames, made.contract.fps, made.spec.gates) == (8, 15.0, ())
    assert made.contract.mean == large.contract.mean
    assert start.image_error(large, made) <= 1e-5
    assert "of the energy of the patch filters" in made.notes[-1]


def test_transferred_tubes_see_what_the_small_model_saw(tmp_path: Path) -> None:
    """Where the large model's patches are a linear map of the small ones', its tubes are the same map of theirs."""
    image = image_of("vit", tmp_path)
    small = opened(start.from_image(image, PLAN))
    matrix = torch.randn(24, 24, generator=torch.Generator().manual_seed(1))
    large = image_of_map(image, matrix)
    made = start.from_video(small, large, PLAN)
    pixels = torch.rand(1, 3, 8, 32, 32)
    half, quarter = torch.tensor([0.4, 0.5, 0.6])[:, None, None, None], torch.tensor(0.25)
    before = small.model.tubes((pixels - 0.5) / 0.5)
    after = made.model.tubes((pixels - half) / quarter)
    flat = small.spec.tokens - 16
    torch.testing.assert_close(after[:, :flat], before[:, :flat] @ matrix.T, rtol=1e-3, atol=1e-3)


def image_of_map(image: Checkpoint, matrix: torch.Tensor) -> Checkpoint:
    """An image model whose patch tokens are `matrix` times those of `image`, of pixels normalised otherwise."""
    contract = replace(image.contract, mean=(0.4, 0.5, 0.6), std=(0.25,) * 3)
    weight, bias = image.model.tubes.weight(0), image.model.tubes.biases[0]
    shift = (torch.tensor(contract.mean) - 0.5)[:, None, None, None] / 0.5
    state = dict(image.model.state_dict())
    state["tubes.weights.0"] = torch.einsum("Dd,dcthw->Dcthw", matrix, weight.detach() * 0.25 / 0.5)
    state["tubes.biases.0"] = matrix @ (bias.detach() + (weight.detach() * shift).sum(dim=(1, 2, 3, 4)))
    return replace(image, model=with_weights(image.spec, state), contract=contract)


def test_a_clip_of_nothing_is_not_the_usual_one(tmp_path: Path) -> None:
    large, small = image_of("vit", tmp_path), small_video(tmp_path)
    for nothing in (replace(PLAN, frames=0), replace(PLAN, fps=0.0)):
        with pytest.raises(SpecError, match=r"(frames|fps) is 0"):
            start.from_image(large, nothing)
        with pytest.raises(SpecError, match=r"(frames|fps) is 0"):
            start.from_video(small, large, nothing)


def test_transfers_that_have_no_rule(tmp_path: Path) -> None:
    image = image_of("vit", tmp_path)
    with pytest.raises(InputError, match="is a model of images; give a video model"):
        start.from_video(image, image, PLAN)
    video = start.from_image(image, PLAN)
    spec = replace(video.spec, tubes=video.spec.tubes[:2], positions="fixed")
    with torch.no_grad():
        bare = replace(video, model=VideoTransformer(spec))
    with pytest.raises(SpecError, match="goes by its 2-D tube, and there is none"):
        start.from_video(bare, image, PLAN)


def test_the_document_counts_the_tokens(tmp_path: Path) -> None:
    document = json.loads(json.dumps(start.document(start.from_image(image_of("vit", tmp_path), PLAN), 0.0)))
    assert [tube["tokens"] for tube in document["tubes"]] == [8, 32, 16]
    assert (document["tokens"], document["gates"], document["fps"]) == (56, [0, 1], 15.0)


@pytest.mark.slow
def test_one_file_becomes_bundles_of_videos_and_of_images(tmp_path: Path) -> None:
    video = opened(start.from_image(image_of("dinov2", tmp_path), PLAN))
    with torch.no_grad():
        video.model.blocks[1].alpha.fill_(0.3)  # type: ignore[operator]
    path = checkpoints.save(video, tmp_path / "video.safetensors")
    bundle = proves(path, tmp_path / "videos", "onnx-fp32", "openvino-fp32")
    assert (bundle.spec.positions, bundle.spec.frames) == ("anchored", 8)
    with Runtime(bundle) as rt:
        assert len(rt.predict(demo.videos()["pan-left"]).logits) == 5
    bundle = proves(path, tmp_path / "images", "onnx-fp32", "openvino-fp32", image=True)
    assert (bundle.spec.frames, bundle.spec.tokens) == (1, 9)
    with Runtime(bundle) as rt:
        assert len(rt.predict(demo.photo_files()[0]).logits) == 5


def test_the_command_writes_a_model_and_says_what_it_is(edgetube_cli: Any, tmp_path: Path) -> None:
    folder, _ = transformers_vit(tmp_path)
    tubes = tmp_path / "tubes.json"
    tubes.write_text(json.dumps([tube.to_json() for tube in TUBES]))
    out = tmp_path / "video.safetensors"
    given = ("init", "--from", folder, "--tubes", tubes, "--frames", 8, "--fps", 10, "--gates", "1", "--out", out)
    code, said, _ = edgetube_cli(*given)
    assert code == 0
    assert "56 tokens of a clip of 8x32x32 at 10 frames a second, anchored positions, gates: 1" in said
    code, said, _ = edgetube_cli(
        "init", "--from-video", out, "--into", folder, "--out", tmp_path / "l.safetensors", "--json"
    )
    document = json.loads(said)
    assert (code, document["out"], document["fps"]) == (0, str(tmp_path / "l.safetensors"), 10.0)
    assert document["image_error"] <= 1e-5
    code, said, _ = edgetube_cli("init", "--from-video", "demo", "--into", folder, "--out", out, "--json")
    assert (code, json.loads(said)["frames"]) == (0, 16)
    edgetube_cli(*given)
    for wrong, message in (
        (("--from", folder, "--into", folder), "give --from IMAGE_MODEL, or --from-video"),
        (("--from-video", out), "give --from IMAGE_MODEL, or --from-video"),
        (("--from-video", out, "--into", folder, "--inflate"), "--tubes and --inflate make new tubes"),
        (("--from", folder, "--gates", "a"), "--gates is 'a'; expected numbers"),
        (("--from", folder, "--gates", "²"), "--gates is '²'; expected numbers"),
        (("--from", folder, "--gates", "1,"), "--gates is '1,'; expected numbers"),
        (("--from", folder, "--size", "²"), "--size is '²'; expected 224"),
        (("--from", folder, "--frames", "8", "--tubes", tubes, "--fps", "0"), "fps is 0"),
        (("--from-video", out, "--into", folder, "--fps", "0"), "fps is 0"),
        (("--from", out, "--frames", "8"), "is a model of videos"),
    ):
        code, _, err = edgetube_cli("init", *wrong, "--out", out)
        assert code == 2
        assert message in err
