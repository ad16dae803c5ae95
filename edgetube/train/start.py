"""Video models before their training: an image model that gets tubes, new ones or those of a small video model.

"Rethinking Video ViTs" (Piergiovanni, Kuo, Angelova, CVPR 2023), sections 3.1 and 3.6. Whatever tubes are added, an
image is answered as before: by the image model's patches, positions, blocks and readout alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgetube import demo
from edgetube.contract import InputContract
from edgetube.errors import InputError, ParityError, SpecError
from edgetube.model import positions
from edgetube.model.checkpoints import Checkpoint
from edgetube.model.parts import with_tubes
from edgetube.runtimes.torch import Reference
from edgetube.spec import ModelSpec, TubeSpec
from edgetube.train import kernels

EXACT = 1e-5
"""Largest difference of the logits of an image, of the largest logit."""

TINY = 1e-12

PICTURES = 8
"""Built-in pictures that the answers are compared on."""

TIME = 0.1
"""Of anchored positions: the times at first, in root mean squares of the learned grid."""

FRAMES, FPS = 32, 15.0
"""The clip, where nothing says it."""

Initial = Callable[[TubeSpec], tuple[Tensor, Tensor]]
"""The kernel (D / S, C, kt, kh, kw) and the bias (D / S,) of a tube."""


@dataclass(frozen=True)
class Plan:
    """What is added to an image model.

    Attributes:
        tubes: beside its patches, see `kernels.with_patches`.
        frames, fps: the clip; `FRAMES` and `FPS` where None, or those of the small model.
        gates: blocks that get a gate; None is the third of each four.
        inflated: see `kernels.from_patches`.
    """

    tubes: Sequence[TubeSpec] = kernels.SETS["default"]
    frames: int | None = None
    fps: float | None = None
    gates: tuple[int, ...] | None = None
    inflated: bool = False


def from_image(image: Checkpoint, plan: Plan) -> Checkpoint:
    """An image model as one of videos, with the same answers on images.

    Raises:
        InputError: it is a model of videos.
        SpecError: a tube does not fit, or the model cannot have other tubes.
    """
    _check(image)
    patch, bias = image.model.tubes.weight(0), image.model.tubes.biases[0]

    def initial(tube: TubeSpec) -> tuple[Tensor, Tensor]:
        return kernels.from_patches(patch, tube, plan.inflated), bias[: len(bias) // tube.merge]

    return _video(image, plan, initial)


def from_video(small: Checkpoint, large: Checkpoint, plan: Plan) -> Checkpoint:
    """An image model with the tubes of a small video model, which its blocks also add through gates that are shut.

    A linear map takes the small model's patches to those of the large one as well as one can; the tubes pass through
    it.

    Args:
        plan: its tubes are left out for those of `small`.

    Raises:
        InputError: `large` is a model of videos, or `small` one of images.
        SpecError: `small` has no 2-D tube.
    """
    _check(large)
    spec, model = small.spec, small.model
    if all(tube.is_2d for tube in spec.tubes):
        raise InputError(f"{small.name} is a model of images; give a video model, whose tubes were trained")
    flat = next((i for i, tube in enumerate(spec.tubes) if tube.is_2d and tube.merge == 1), None)
    if flat is None:
        raise SpecError(
            f"the tubes of {small.name} are {', '.join(map(str, spec.tubes))}; their transfer goes by its 2-D tube, "
            "and there is none"
        )

    def seen(index: int) -> tuple[Tensor, Tensor]:
        return _renormalised(model.tubes.weight(index), model.tubes.biases[index], small.contract, large.contract)

    patch, patch_bias = seen(flat)
    matrix, explained = kernels.mapping(patch, large.model.tubes.weight(0))
    offset = large.model.tubes.biases[0].detach() - matrix @ patch_bias
    made = [kernels.mapped(tube, *seen(i), matrix) for i, tube in enumerate(spec.tubes) if not tube.is_2d]
    found = {tube: (kernel, bias + offset) for tube, kernel, bias in made}
    frames = spec.frames if plan.frames is None else plan.frames
    fps = small.contract.fps if plan.fps is None else plan.fps
    plan = replace(plan, tubes=tuple(found), frames=frames, fps=fps)
    video = _video(large, plan, found.__getitem__)
    note = f"the filters of {small.name} explain {explained:.0%} of the energy of the patch filters of {large.name}"
    return replace(video, notes=(*video.notes, note))


def image_error(image: Checkpoint, video: Checkpoint) -> float:
    """Largest difference of the logits of built-in pictures, of the largest logit.

    Raises:
        ParityError: it is larger than `EXACT`.
    """
    contract = image.contract
    frames = np.stack([clip.frames for clip in demo.scenes(contract, PICTURES)])
    first, second = (Reference(one.model, contract)(frames) for one in (image, video.with_clip(frames=1)))
    error = float(np.abs(first - second).max() / max(float(np.abs(first).max()), TINY))  # a new classifier is zero
    if not error <= EXACT:
        raise ParityError(f"the video model answers images otherwise than {image.name}: error {error:.1e} > {EXACT:g}")
    return error


def _check(image: Checkpoint) -> None:
    """Check that an image model can have other tubes."""
    spec = image.spec
    if not spec.is_image or spec.per_frame or not all(tube.is_2d for tube in spec.tubes):
        raise InputError(f"{image.name} is a model of videos of {spec.frames} frames; give an image model")
    if spec.rotary is not None:
        raise SpecError(
            f"{image.name} has rotary positions, which turn queries and keys by their place in one grid of patches; "
            "tubes have other places, and no rule is known for them: give a model with learned positions (ViT, DeiT, "
            "DINOv2, SigLIP, CLIP)"
        )
    if len(spec.tubes) > 1 or spec.kernel is not None or spec.reduction is not None:
        raise SpecError(
            f"{image.name} is no plain image transformer; it has the tubes {', '.join(map(str, spec.tubes))}"
        )


def _video(image: Checkpoint, plan: Plan, initial: Initial) -> Checkpoint:
    """The image model with further tubes."""
    old, patch = image.spec, image.spec.tubes[0]
    anchored = old.positions == "stored"
    frames = FRAMES if plan.frames is None else plan.frames
    fps = FPS if plan.fps is None else plan.fps
    gates = tuple(range(2, old.depth, 4)) if plan.gates is None else plan.gates
    tubes = kernels.with_patches(plan.tubes, patch)
    spec = replace(old, tubes=tubes, frames=frames, gates=gates, positions="anchored" if anchored else old.positions)
    new = {index: initial(tube) for index, tube in enumerate(tubes) if not tube.is_2d}
    time = _time(image.model.positions, spec) if anchored else torch.zeros(())
    model = with_tubes(image.model, spec, new, time)
    contract = replace(image.contract, frames=frames, fps=fps, sampling="uniform", stride=None)
    return replace(
        image, model=model, contract=contract, table=None, options={}, keys=(), format="", source="", digest=""
    )


def _time(grid: Tensor, spec: ModelSpec) -> Tensor:
    """The weight of times in anchored positions at first; there may be no other than the first."""
    waves = torch.from_numpy(positions.anchored(spec)[1])
    rms = float(waves.square().mean().sqrt())
    return torch.tensor(TIME * float(grid.square().mean().sqrt()) / rms if rms else 0.0)


def _renormalised(weight: Tensor, bias: Tensor, old: InputContract, new: InputContract) -> tuple[Tensor, Tensor]:
    """Kernel and bias for pixels that are normalised as `new` says, from those for pixels as `old` does."""
    means, stds = (
        torch.tensor([getattr(contract, name) for contract in (old, new)])[:, :, None, None, None]
        for name in ("mean", "std")
    )
    scaled = weight.detach() / stds[0]  # (D, C, kt, kh, kw), C the colours
    return scaled * stds[1], bias.detach() + (scaled * (means[1] - means[0])).sum(dim=(1, 2, 3, 4))


def document(made: Checkpoint, error: float) -> dict[str, Any]:
    """The document of `edgetube init`."""
    spec = made.spec
    return {
        "name": made.name,
        "positions": spec.positions,
        "frames": spec.frames,
        "size": list(spec.size),
        "fps": made.contract.fps,
        "tokens": spec.tokens,
        "tubes": [
            {**spec.tubes[i].to_json(), "tokens": math.prod(grid)}
            for i, grid in zip(spec.active, spec.grids, strict=True)
        ],
        "gates": list(spec.gates),
        "image_error": error,
        "licence": made.licence,
        "notes": list(made.notes),
    }
