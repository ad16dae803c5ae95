"""The built-in model and clips: camera motion, so that every command works without data.

Clips are rendered on demand from a few shipped photographs, deterministically, for any number of frames and any size.
The photographs of the evaluation set, those of the calibration set and the training pictures are disjoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from edgetube.contract import InputContract
from edgetube.demo.moves import LABELS, Move
from edgetube.demo.render import VERSION, Photo, generator, render_clip
from edgetube.video import Clip

__all__ = [
    "LABELS",
    "VERSION",
    "WEIGHTS",
    "calibration",
    "clip",
    "clips",
    "evaluation",
    "golden",
    "is_built_in",
    "photo_files",
    "photos",
    "scenes",
    "videos",
]

HERE = Path(__file__).parent
WEIGHTS = HERE / "motion.safetensors"
"""The built-in model: `edgetube.model.checkpoints.load("demo")`."""

EVALUATION = ("astronaut", "rocket", "chelsea", "camera", "hubble", "brick")
CALIBRATION_SET = "calibration"
"""Name of the set whose clips have their grain in common: hundreds are rendered before an export begins."""
CALIBRATION = ("coffee", "gravel", "grass", "retina", "coins")


def is_built_in(source: str | Path) -> bool:
    """Whether a checkpoint's name is that of a model that edgetube has without a file: `demo`, `random:NAME`."""
    return source == "demo" or str(source).startswith("random:")


def evaluation(contract: InputContract, count: int = 504) -> Iterator[Clip]:
    """`count` labelled clips for measuring accuracy; the classes take turns, so any 9 in a row are balanced.

    Frames are (T, H, W, 3) uint8 of the contract's shape. With one frame there is no motion: the label is None.
    The first clips of a longer set are those of a shorter one.
    """
    return clips("evaluation", photos(EVALUATION), contract, count)


def calibration(contract: InputContract, count: int = 128) -> Iterator[Clip]:
    """`count` clips for calibration, like `evaluation` but over other photographs."""
    return clips(CALIBRATION_SET, photos(CALIBRATION), contract, count)


def scenes(contract: InputContract, count: int) -> Iterator[Clip]:
    """`count` clips of the calibration set, each of another photograph and another movement than the one before.

    For what has to be learned from few clips: those that come first in `calibration` all show the same photograph.
    """
    shown = photos(CALIBRATION)
    for index in range(count):
        yield clip(CALIBRATION_SET, shown, index * (len(LABELS) + 1), contract)


def golden(contract: InputContract) -> Clip:
    """The clip that is stored in a bundle with the reference's answer: the second of `evaluation`, which moves."""
    return list(evaluation(contract, 2))[1]


def clips(name: str, photos: Sequence[Photo], contract: InputContract, count: int) -> Iterator[Clip]:
    """`count` labelled clips over `photos`, determined by `name` and the photos' order."""
    for index in range(count):
        yield clip(name, photos, index, contract)


def clip(name: str, photos: Sequence[Photo], index: int, contract: InputContract) -> Clip:
    """Clip number `index` of `clips`, on its own."""
    label, photo = LABELS[index % len(LABELS)], photos[index // len(LABELS) % len(photos)]
    rng = generator(name, index)
    size = contract.height, contract.width
    move, common = Move.draw(label, rng), name == CALIBRATION_SET
    frames = render_clip(photo, move, contract.frames, size, rng, common)
    return Clip(f"{name}/{photo.name}/{index:04d}", frames, None if contract.is_image else label)


def videos() -> dict[str, Path]:
    """label -> a short video of that camera move, shipped for trying things out."""
    return {path.stem: path for path in sorted((HERE / "videos").glob("*.mp4"))}


def photo_files() -> list[Path]:
    """The shipped photographs."""
    return sorted((HERE / "photos").glob("*.jpg"))


@cache
def photos(names: tuple[str, ...]) -> tuple[Photo, ...]:
    """Shipped photographs by name."""
    return tuple(Photo.read(HERE / "photos" / f"{name}.jpg") for name in names)
