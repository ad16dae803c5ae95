"""What a training needs of the user: a model, clips with labels, and where they go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgetube import datasets, demo
from edgetube.contract import InputContract
from edgetube.datasets import ClipSet
from edgetube.errors import InputError
from edgetube.model.checkpoints import Checkpoint
from edgetube.train import data, heads
from edgetube.train.data import Clips
from edgetube.train.loop import Task, Training
from edgetube.train.recipe import Recipe
from edgetube.train.state import BEST, LOG

BUILT_IN = "demo"
"""Name of the built-in clips: trained on over the photographs of calibration, judged over those of evaluation."""

BUILT_IN_CLIPS, BUILT_IN_HELD_OUT = 1008, 216


@dataclass(frozen=True)
class Sources:
    """Where clips and images come from.

    Attributes:
        clips: what `edgetube.datasets.load` takes, or `BUILT_IN`.
        held_out: the same for the clips that are judged by; None holds out a share of the clips.
        images: the same for images; None trains on clips alone.
        head, image_head: names of the classifiers, see `heads.with_head`.
        count, judged: of the built-in clips that are trained on, and judged by.
        share: of each class of the clips, that is held out where `held_out` is None.
        unreadable: largest share of a set that may be unreadable.

    Raises:
        InputError: a share is out of bounds.
    """

    clips: str
    held_out: str | None = None
    images: str | None = None
    head: str | None = None
    image_head: str | None = None
    share: float = 0.1
    count: int = BUILT_IN_CLIPS
    judged: int = BUILT_IN_HELD_OUT
    unreadable: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise InputError(f"--val-share is {self.share:g}; expected a share between 0 and 1, like 0.1")
        if not 0 <= self.unreadable <= 1:
            raise InputError(f"--max-unreadable is {self.unreadable:g}; expected a share of 0 to 1, like 0.1")


def task(checkpoint: Checkpoint, sources: Sources, seed: int) -> tuple[Task, tuple[str, ...]]:
    """The task, and notes about its clips.

    Raises:
        InputError: clips without labels, of one class, or with labels that the classifier or the training lack.
    """
    contract = checkpoint.contract
    clips = _loaded(sources.clips, contract, datasets.built_in_calibration, sources.count)
    labels = heads.labels_of(clips)
    notes = list(clips.notes)
    if sources.held_out is None and sources.clips != BUILT_IN:
        clips, held = data.split(clips, sources.share, seed)
    else:
        held = _loaded(sources.held_out or BUILT_IN, contract, datasets.built_in, sources.judged)
        notes += held.notes
    made, head = heads.with_head(checkpoint, labels, sources.head, "video")
    known = heads.labels_by_head(made)[head]
    if bare := [item.name for item in held.items if item.label is None]:
        raise InputError(f"{len(bare)} clips of {held.name} have no label, {bare[0]!r} first; they cannot judge")
    held.check_labels(known)
    image_head, images = "", None
    if sources.images is not None:
        still = contract.with_clip(frames=1)
        if not made.spec.accepts_images:
            raise InputError(f"{checkpoint.name} has no 2-D tube and takes no images; leave out --images")
        pictures = datasets.load(sources.images, still)
        notes += pictures.notes
        found = heads.labels_of(pictures)
        made, image_head = heads.with_head(made, found, sources.image_head, "image", taken=head)
        names = heads.labels_by_head(made)
        images = Clips(pictures.items, still, names[image_head], sources.unreadable)
        made = made if head == made.spec.classifiers[0][0] else _first(made, head)
    first, second = (Clips(one.items, contract, known, sources.unreadable) for one in (clips, held))
    return Task(made, head, first, second, image_head, images), tuple(notes)


def _first(checkpoint: Checkpoint, head: str) -> Checkpoint:
    """The same model with the classifier `head` as the first, whose labels are those of the checkpoint."""
    labels = heads.labels_by_head(checkpoint)
    spec = checkpoint.spec
    ordered = sorted(spec.classifiers, key=lambda pair: pair[0] != head)
    others = {name: its for name, its in labels.items() if name != head}
    return replace(
        checkpoint.at_spec(replace(spec, classifiers=tuple(ordered))), labels=labels[head], other_labels=others
    )


def _loaded(
    source: str, contract: InputContract, built_in: Callable[[int, tuple[str, ...]], ClipSet], count: int
) -> ClipSet:
    return built_in(count, demo.LABELS) if source == BUILT_IN else datasets.load(source, contract)


def document(training: Training, folder: Path) -> dict[str, Any]:
    """The document of `edgetube finetune`, also written to `LOG` in the folder."""
    found, start = training.task, training.task.start
    unread = {name: why for one in training.unread.values() for name, why in one.items()}
    return {
        "folder": str(folder),
        "model": start.name,
        "head": found.head,
        "labels": list(found.clips.labels),
        "clips": len(found.clips),
        "held_out": len(found.held_out),
        "images": 0 if found.images is None else len(found.images),
        "parameters": sum(p.numel() for p in training.parameters.values()),
        "recipe": training.options.to_json(),
        "processes": training.ranks.count,
        "device": training.ranks.device.type,
        "rows": training.state.rows,
        "best": {"top1": training.state.best[0], "epoch": training.state.best[1], "file": str(folder / BEST)},
        "unread": unread,
        "log": str(folder / LOG),
    }


def recipe_of(given: dict[str, Any]) -> Recipe:
    """A recipe of the options that were given; the others keep their defaults."""
    return Recipe(**{name: value for name, value in given.items() if value is not None})
