"""The last step of reading a checkpoint: weights by the names of the reference model become the model."""

from __future__ import annotations

import re
from pathlib import Path

from edgetube.contract import InputContract
from edgetube.errors import CheckpointError
from edgetube.formats.reading.blocks import Weights
from edgetube.formats.reading.files import Files
from edgetube.formats.reading.said import unnamed
from edgetube.formats.reading.tensors import State
from edgetube.model.checkpoints import Checkpoint
from edgetube.model.transformer import shapes, with_weights
from edgetube.spec import ModelSpec


def checkpoint(
    files: Files,
    state: State,
    spec: ModelSpec,
    weights: Weights,
    contract: InputContract,
    labels: tuple[str, ...],
    notes: tuple[str, ...] = (),
    licence: str = "",
) -> Checkpoint:
    """The checkpoint of a model at its contract's clip.

    Args:
        state: all of whose tensors have been taken or left out.
        spec: at the clip that stored positions are for.
        weights: exactly those of the spec.
        licence: as the settings state it, for folders without a card that does.

    Raises:
        CheckpointError: tensors are left over, or missing for the spec.
        SpecError: the spec has no form at the contract's clip.
    """
    keys = state.finish()
    wanted = shapes(spec)
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if found != wanted:
        differ = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        name = differ[0]
        raise CheckpointError(
            f"{files.path} does not fit its configuration: {name} is {found.get(name)}, expected {wanted.get(name)}"
        )
    notes = notes if files.adapter is None else (*files.adapter.notes, *notes)
    if labels in (unnamed(len(labels)), unnamed(len(labels), "LABEL_")):
        notes = (*notes, "its classes have no names: give them with --labels")
    made = Checkpoint(
        name_of(files.path),
        with_weights(spec, weights),
        contract,
        labels,
        files.digest,
        notes=notes,
        keys=keys,
        licence=files.licence or licence,
    )
    return made.at_spec(spec.with_clip(contract.frames, (contract.height, contract.width)))


def name_of(path: Path) -> str:
    """A short name, of files and folders; that of `run/checkpoint-500` is `run-checkpoint-500`."""
    stem = path.stem if path.is_file() else path.name
    if re.fullmatch(r"checkpoint-\d+", stem) and path.parent.name:
        stem = f"{path.parent.name}-{stem}"
    return re.sub(r"[^\w.-]+", "-", stem).lstrip("-.") or "model"
