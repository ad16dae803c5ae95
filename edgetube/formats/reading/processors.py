"""The input contract of a folder of transformers: what the settings of its processor mean.

The settings belong to a class of processors, whose defaults, those of transformers 5, count for what they leave out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgetube.contract import InputContract
from edgetube.errors import CheckpointError, SpecError
from edgetube.formats.reading.files import PROCESSORS, Files
from edgetube.formats.reading.said import Said

FILTERS = {2: "bilinear", 3: "bicubic"}
"""`resample` of a processor, numbers of PIL."""

HALF: Mapping[str, Any] = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
IMAGENET: Mapping[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP: Mapping[str, Any] = {
    "size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "resample": 3,
    "default_to_square": False,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip

VIDEOMAE: Mapping[str, Any] = {
    "size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "resample": 2,
    "default_to_square": False, **HALF,
}  # fmt: skip
VIVIT: Mapping[str, Any] = {
    **VIDEOMAE, "size": {"shortest_edge": 256}, "rescale_factor": 1 / 127.5, "offset": True,
}  # fmt: skip

CLASSES: Mapping[str, Mapping[str, Any]] = {
    "ViTImageProcessor": {"size": {"height": 224, "width": 224}, "resample": 2, **HALF},
    "DeiTImageProcessor": {
        "size": {"height": 256, "width": 256}, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224}, **HALF,
    },
    "BitImageProcessor": CLIP,
    "CLIPImageProcessor": CLIP,
    "DINOv3ViTImageProcessor": {"size": {"height": 224, "width": 224}, "resample": 2, **IMAGENET},
    "SiglipImageProcessor": {
        "size": {"height": 224, "width": 224}, "resample": 3, "default_to_square": False, **HALF,
    },
    "VideoMAEImageProcessor": VIDEOMAE,
    "VideoMAEVideoProcessor": VIDEOMAE,
    "VivitImageProcessor": VIVIT,
    "VivitVideoProcessor": VIVIT,
    "TimesformerVideoProcessor": {**VIDEOMAE, **IMAGENET},
    "VJEPA2VideoProcessor": {
        "size": {"shortest_edge": 292}, "do_center_crop": True, "crop_size": 256, "resample": 2, **IMAGENET,
    },
}  # fmt: skip
"""Class -> its defaults. `default_to_square`: what an integer `size` stands for. Other classes may mean something else
by the same settings."""


def class_of(settings: Mapping[str, Any], usual: str) -> str:
    """The class that settings are for, without what tells its implementation; `usual` where they name none."""
    names = ("image_processor_type", "video_processor_type", "feature_extractor_type")
    name = next((str(settings[name]) for name in names if settings.get(name)), usual)
    return name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")


def contract(files: Files, said: Said, usual: str, frames: int, sampling: Mapping[str, Any]) -> InputContract:
    """The input contract of a folder's processor.

    Pixels u / 255 are normalised by mean (m + o) / (255 r) and std s / (255 r), with the processor's mean m, std s,
    rescale factor r, and o = 1 with `offset`.

    Args:
        said: fields of the contract that replace those of the processor.
        usual: the model's class of processors, one of `CLASSES`, for settings that name none.
        frames: of the clip.
        sampling: fields of the contract, how the model's authors sampled frames; none of them counts where the user
            says another `sampling`.

    Raises:
        CheckpointError: there is no processor and the user does not say the input, or it does what no contract says.
    """
    if said.input.get("sampling", sampling.get("sampling")) != sampling.get("sampling"):
        sampling = {}
    complete = {"mean", "std", "height", "width"} <= said.input.keys()
    if not files.processor and not complete:
        raise CheckpointError(
            f"{files.path} has no {PROCESSORS[1]}, so nothing says how its input was made; add the file (processor."
            'save_pretrained writes it), or say the input with --spec FILE: {"input": {"height": 224, "width": 224, '
            '"mean": [...], "std": [...]}}'
        )
    kind = class_of(files.processor, usual)
    if kind not in CLASSES and not complete:
        raise CheckpointError(
            f"{files.path}: its processor is {kind:.60}, whose settings edgetube does not know; say what it does "
            'with --spec FILE: {"input": {"height": 224, "width": 224, "resize": "short-side", "resize_size": 256, '
            '"filter": "bilinear", "mean": [...], "std": [...]}}'
        )
    known = files.processor and kind in CLASSES
    found = fields(files.path, {**CLASSES[kind], **files.processor}, {**sampling, **said.input}) if known else {}
    try:
        return InputContract(**{"frames": frames, **found, **sampling, **said.input})
    except (SpecError, TypeError) as error:
        raise CheckpointError(f"{files.path}: its processor's settings cannot be met: {error}") from error


def fields(path: Path, p: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the contract, of a processor's settings with the defaults of their class.

    Args:
        said: fields of the contract that replace those of the processor, so it may do there what no contract says.
    """
    found: dict[str, Any] = {"crop": "center-floor"}
    crop = _size(path, "crop_size", p.get("crop_size")) if p.get("do_center_crop") else None
    if p.get("do_pad"):
        raise CheckpointError(f"{path}: its processor pads pictures (do_pad); edgetube knows no such input")
    if not said.keys() & {"resize", "resize_size"}:
        found |= _resize(path, p)
    if p.get("do_resize", True) and "filter" not in said:
        filter_ = FILTERS.get(p.get("resample", 2))
        if filter_ is None:
            raise CheckpointError(
                f"{path}: its processor resizes with resample {p.get('resample')}; edgetube knows 2, 3"
            )
        found["filter"] = filter_
    if crop is None and found.get("resize") == "stretch":
        crop = found["resize_size"]
    if crop is None and not {"height", "width"} <= said.keys():
        raise CheckpointError(
            f"{path}: its processor does not crop, so pictures keep their shapes; an export has one: say it with "
            '--spec FILE: {"input": {"height": 224, "width": 224}}'
        )
    if crop is not None:
        found |= {"height": crop[0], "width": crop[1]}
    factor = p.get("rescale_factor", 1 / 255) if p.get("do_rescale", True) else 1.0
    offset = 1.0 if p.get("offset") and p.get("do_rescale", True) else 0.0
    normalise = p.get("do_normalize", True)
    mean, std = (
        _colours(path, p, name, normalise, neutral) for name, neutral in (("image_mean", 0.0), ("image_std", 1.0))
    )
    found["mean"] = tuple((m + offset) / (255 * factor) for m in mean)
    found["std"] = tuple(s / (255 * factor) for s in std)
    return found


def _resize(path: Path, p: Mapping[str, Any]) -> dict[str, Any]:
    """How pictures are resized before the crop."""
    if not p.get("do_resize", True):
        raise CheckpointError(
            f"{path}: its processor does not resize (do_resize), so nothing says the size before the crop; say it with "
            '--spec FILE: {"input": {"resize_size": 256}}'
        )
    size = p.get("size")
    side = size.get("shortest_edge") if isinstance(size, dict) else None
    if isinstance(size, int) and not p.get("default_to_square", True):
        side = size  # as old files say it
    if side is None:
        return {"resize": "stretch", "resize_size": _size(path, "size", size)}
    if isinstance(size, dict) and size.get("longest_edge") is not None:
        raise CheckpointError(
            f"{path}: its processor says size {size!r:.60}; edgetube knows no limit of the long side: say what it "
            'does with --spec FILE: {"input": {"resize_size": 256}}'
        )
    return {"resize": "short-side", "resize_size": side}


def _size(path: Path, name: str, value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if isinstance(value, list) and len(value) == 2:
        return value[0], value[1]
    if isinstance(value, dict) and {"height", "width"} <= value.keys():
        return value["height"], value["width"]
    if isinstance(value, dict) and isinstance(side := value.get("shortest_edge"), int):
        return side, side
    raise CheckpointError(f"{path}: its processor says {name} {value!r:.60}; expected height and width")


def _colours(path: Path, p: Mapping[str, Any], name: str, normalise: bool, neutral: float) -> Sequence[float]:
    value = p.get(name) if normalise else neutral
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [float(value)] * 3
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise CheckpointError(f"{path}: its processor says {name} {value!r:.60}; expected three numbers")
    return value
