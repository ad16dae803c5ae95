"""What the folders of the transformers library have in common: configuration, processor, labels.

The classes' defaults are those of transformers 5; older folders leave out what equals them, so they are needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgetube import strict
from edgetube.contract import InputContract
from edgetube.errors import CheckpointError, FormatError, SpecError
from edgetube.formats.reading.blocks import BlockNames
from edgetube.formats.reading.files import PROCESSORS, Files
from edgetube.formats.reading.said import Said
from edgetube.spec import Activation

FILTERS = {2: "bilinear", 3: "bicubic"}
"""`resample` of a processor, numbers of PIL."""

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_fast": "gelu-tanh",
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "quick_gelu": "quick-gelu",
    "silu": "silu",
    "swish": "silu",
}
"""`hidden_act` -> the activation of the spec."""


class Config:
    """A configuration with the defaults of its class.

    Args:
        files: of the folder.
        defaults: of the class, for what the file leaves out.
    """

    def __init__(self, files: Files, defaults: Mapping[str, Any], values: Mapping[str, Any] | None = None) -> None:
        self.files, self.values = files, {**defaults, **(files.config if values is None else values)}

    def integer(self, name: str, most: int = 1 << 20, least: int = 1) -> int:
        """An integer, positive unless `least` says otherwise.

        Raises:
            CheckpointError: it is something else, or missing.
        """
        return self._checked(name, lambda value: strict.integer(value, name, least, most))

    def number(self, name: str) -> float:
        """A finite number."""
        return self._checked(name, lambda value: strict.number(value, name))

    def pair(self, name: str, count: int = 2) -> tuple[int, ...]:
        """`count` positive integers, or one that stands for all of them."""
        value = self.values.get(name)
        if not isinstance(value, list | tuple):
            return (self.integer(name),) * count
        return self._checked(
            name, lambda _: tuple(strict.integer(v, name, 1, 1 << 20) for v in strict.items(value, name, count, count))
        )

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.values.get(name)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.files.path}: config.json says {name} {value!r:.60}; expected true or false")
        return value

    def choice(self, name: str, known: Mapping[str, Any]) -> Any:
        """One of the values that edgetube knows, translated."""
        value = self.values.get(name)
        if not isinstance(value, str) or value not in known:
            raise CheckpointError(
                f"{self.files.path}: config.json says {name} {value!r:.60}; edgetube knows {', '.join(known)}"
            )
        return known[value]

    def _checked(self, name: str, check: Any) -> Any:
        if self.values.get(name) is None:
            raise CheckpointError(f"{self.files.path}: config.json does not say {name}")
        try:
            return check(self.values[name])
        except FormatError as error:
            raise CheckpointError(f"{self.files.path}: config.json: {error}") from error

    @property
    def architecture(self) -> str:
        """The class that was saved; empty where the file does not say."""
        found = self.values.get("architectures")
        return str(found[0]) if isinstance(found, list) and found else ""

    @property
    def id2label(self) -> Mapping[Any, str] | None:
        """Class names by number (text or integer)."""
        found = self.values.get("id2label")
        return found if isinstance(found, dict) and found else None

    def label_notes(self) -> tuple[str, ...]:
        """A warning where nobody named the classes."""
        found = self.id2label or {}
        unnamed = found and all(name == f"LABEL_{key}" for key, name in found.items())
        return (
            ("its labels are LABEL_0, LABEL_1 ...: nobody named the classes; give names with --labels",)
            if unnamed
            else ()
        )


def contract(
    files: Files, said: Said, defaults: Mapping[str, Any], frames: int, sampling: Mapping[str, Any]
) -> InputContract:
    """The input contract of a folder's processor.

    Pixels u / 255 are normalised by mean (m + o) / (255 r) and std s / (255 r), with the processor's mean m, std s,
    rescale factor r, and o = 1 with `offset`.

    Args:
        said: fields of the contract that replace those of the processor.
        defaults: of the processor's class.
        frames: of the clip.
        sampling: fields of the contract, how the model's authors sampled frames.

    Raises:
        CheckpointError: there is no processor and the user does not say the input, or it does what no contract says.
    """
    if not files.processor and not {"mean", "std", "height", "width"} <= said.input.keys():
        raise CheckpointError(
            f"{files.path} has no {PROCESSORS[1]}, so nothing says how its input was made; add the file (processor."
            'save_pretrained writes it), or say the input with --spec FILE: {"input": {"height": 224, "width": 224, '
            '"mean": [...], "std": [...]}}'
        )
    found = processor_fields(files.path, {**defaults, **files.processor}) if files.processor else {}
    try:
        return InputContract(**{"frames": frames, **found, **sampling, **said.input})
    except (SpecError, TypeError) as error:
        raise CheckpointError(f"{files.path}: its processor's settings cannot be met: {error}") from error


def processor_fields(path: Path, p: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the contract, of a processor's settings; `default_to_square` is that of its class."""
    found: dict[str, Any] = {"crop": "center-floor"}
    crop = _size(path, "crop_size", p.get("crop_size")) if p.get("do_center_crop") else None
    if p.get("do_resize", True):
        size = p.get("size")
        side = size.get("shortest_edge") if isinstance(size, dict) else None
        if isinstance(size, int) and not p.get("default_to_square", True):
            side = size  # as old files say it
        filter_ = FILTERS.get(p.get("resample", 2))
        if filter_ is None:
            raise CheckpointError(
                f"{path}: its processor resizes with resample {p.get('resample')}; edgetube knows 2, 3"
            )
        found["filter"] = filter_
        if side is not None:
            found |= {"resize": "short-side", "resize_size": side}
            crop = crop or (side, side)
        else:
            both = _size(path, "size", size)
            found |= {"resize": "stretch", "resize_size": both}
            crop = crop or both
    if crop is None:
        raise CheckpointError(f"{path}: its processor neither resizes nor crops, so the size of its input is not known")
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
    value = p.get(name) if normalise else [neutral] * 3
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise CheckpointError(f"{path}: its processor says {name} {value!r:.60}; expected three numbers")
    return value


CLASSIC = BlockNames(
    norm1="layernorm_before",
    qkv=("attention.query", "attention.key", "attention.value"),
    proj="attention.o_proj",
    norm2="layernorm_after",
    fc1=("mlp.fc1",),
    fc2="mlp.fc2",
)
"""The block of ViT, DeiT, ViViT and VideoMAE in `one_dialect`."""
