"""Classifiers for the labels of a set of clips."""

from __future__ import annotations

import re
from dataclasses import replace

from edgetube.datasets import ClipSet
from edgetube.errors import InputError
from edgetube.model.checkpoints import Checkpoint
from edgetube.model.parts import with_classifier

NAME = re.compile(r"\w[\w-]*")


def labels_of(clips: ClipSet) -> tuple[str, ...]:
    """The labels of a set, sorted.

    Raises:
        InputError: clips without a label, or fewer than two labels.
    """
    bare = [item.name for item in clips.items if item.label is None]
    if bare:
        raise InputError(
            f"{len(bare)} of {clips.count} clips of {clips.name} have no label, {bare[0]!r} first; give one sub-folder "
            "a class, or a list with labels"
        )
    found = tuple(sorted({item.label for item in clips.items if item.label is not None}))
    if len(found) < 2:
        raise InputError(f"all {clips.count} clips of {clips.name} are {found[0]!r}; a classifier needs two classes")
    return found


def labels_by_head(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """The labels of each classifier, in their order."""
    first, *others = (name for name, _ in checkpoint.spec.classifiers)
    return {first: checkpoint.labels, **{name: checkpoint.other_labels[name] for name in others}}


def with_head(
    checkpoint: Checkpoint, labels: tuple[str, ...], name: str | None, default: str, taken: str | None = None
) -> tuple[Checkpoint, str]:
    """The model with a classifier that has `labels`: one that knows them all, else a new one, which is the first.

    A new classifier starts from zeros.

    Args:
        default: name of a new one, without `name`.
        taken: a classifier that is none for these labels, unless it is `name`.

    Returns:
        The model, and the classifier's name.

    Raises:
        InputError: the classifier `name` has other labels.
        SpecError: a new one cannot be called `name`.
    """
    known = labels_by_head(checkpoint)
    fitting = [head for head, its in known.items() if set(labels) <= set(its)]
    if name in fitting:
        return checkpoint, name
    free = [head for head in fitting if head != taken]
    if name is None and free:
        return checkpoint, free[0]
    option = "--head" if taken is None else "--image-head"
    name = name or default
    if name in known:
        missing = [label for label in labels if label not in known[name]]
        why = f"does not know {', '.join(map(repr, missing[:5]))}" if missing else "is that of the clips"
        raise InputError(
            f"the classifier {name!r} {why}; it has {len(known[name])} classes: {', '.join(known[name][:8])}: give a "
            f"new one another name with {option}"
        )
    if not NAME.fullmatch(name):
        raise InputError(f"{option} is {name!r}; expected letters, digits, _ and -")
    model = with_classifier(checkpoint.model, name, len(labels))
    return replace(checkpoint, model=model, labels=labels, other_labels=known), name
