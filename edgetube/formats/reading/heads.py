"""A linear classifier in a file of its own, for towers that were published without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from edgetube.errors import CheckpointError, InputError
from edgetube.formats.reading import tensors
from edgetube.formats.reading.tensors import State, TensorSource

NAME = "classifier"
"""The linear's name among the tensors of the tower."""

READOUTS = (("prefix.0",), ("prefix.0", "mean"))
"""What a classifier reads, one whose inputs are the width of the tower, and one whose inputs are twice that."""


def with_classifier(base: TensorSource, path: Path) -> TensorSource:
    """The tensors of a tower and `classifier.weight` (classes, F), `classifier.bias` (classes,) of a file.

    Args:
        path: weights of one linear, under any name: `torch.save(head.state_dict(), path)`, or safetensors.

    Raises:
        InputError: there is no such file, or the model has a classifier of its own.
        CheckpointError: the file does not hold one linear.
    """
    if base.has(f"{NAME}.weight"):
        raise InputError(f"--classifier {path} does not apply to this checkpoint: it has a classifier of its own")
    if not path.is_file():
        raise InputError(f"--classifier {path} is no file; give one with the weight and the bias of a linear")
    head = tensors.open_source((path,))
    by_rank = {rank: [name for name, shape in head.shapes.items() if len(shape) == rank] for rank in (1, 2)}
    weights, biases = by_rank[2], by_rank[1]
    if len(weights) != 1 or len(weights) + len(biases) != len(head.shapes) or len(biases) > 1:
        held = ", ".join(f"{name} {shape}" for name, shape in sorted(head.shapes.items())[:5])
        raise CheckpointError(
            f"--classifier {path} holds {held or 'nothing'}; expected one weight (classes, F) and at most one bias"
        )
    taken = {f"{NAME}.weight": weights[0], **{f"{NAME}.bias": name for name in biases}}

    def load(name: str) -> Tensor:
        return head.load(taken[name]) if name in taken else base.load(name)

    shapes = {**base.shapes, **{name: head.shapes[own] for name, own in taken.items()}}
    return replace(base, shapes=shapes, load=load)


def readout(what: Path, state: State, width: int) -> tuple[int, tuple[str, ...], str]:
    """Classes of a tower's classifier, what it reads by the number of its inputs, and a note that says so.

    As many inputs as the tower is wide: the class token behind the last LayerNorm. Twice as many: that, then the mean
    of the patches behind it.

    Raises:
        CheckpointError: there is no classifier, or it has another number of inputs.
    """
    if f"{NAME}.weight" not in state:
        raise CheckpointError(
            f"{what} has no classifier: it is the tower alone; train a linear on labels, and give its weight and bias "
            f"with --{NAME} FILE, or save them as {NAME}.weight and {NAME}.bias beside the tower's tensors"
        )
    shape = state.shape(f"{NAME}.weight")
    known = {width * len(parts): parts for parts in READOUTS}
    if len(shape) != 2 or shape[1] not in known:
        raise CheckpointError(
            f"{what}: {NAME}.weight is {shape}; expected (classes, {width}), of the class token, or "
            f"(classes, {2 * width}), of the class token and the mean of the patches"
        )
    found = known[shape[1]]
    read_by = "the class token" if len(found) == 1 else "the class token and the mean of the patches"
    return shape[0], found, f"its classifier is taken to read {read_by}, by the number of its inputs"
