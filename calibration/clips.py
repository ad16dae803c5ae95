"""The clips of a calibration: preprocessed once, kept on disk, hashed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgetube.arrays import DiskArray, RowArray
from edgetube.contract import InputContract
from edgetube.datasets import ClipSet
from edgetube.errors import InputError
from edgetube.progress import Progress, silent, track
from edgetube.video import Frames

MAX_UNREADABLE_SHARE = 0.1
"""Share of the clips that may be unreadable."""

FEW_CLIPS = 16
"""Fewer clips than this may all show one scene: a note warns."""


@dataclass(frozen=True)
class Clips:
    """Clips ready for a graph, in the order of their names.

    Attributes:
        name: of the set that they were drawn from.
        frames: (N, T, H, W, 3) uint8, on disk.
        labels: (N,) index of the true class, -1 where unknown.
        names: of the clips.
        sha256: of pixels, labels and the input contract.
        notes: for the user, one sentence each.
        unread: clips of the set that could not be read and were left out: the reason, by name.
    """

    name: str
    frames: RowArray
    labels: npt.NDArray[np.int64]
    names: tuple[str, ...]
    sha256: str
    notes: tuple[str, ...] = ()
    unread: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def first(self, count: int) -> Frames:
        """The first `count` clips (n, T, H, W, 3), or all, in memory."""
        return np.stack([self.frames[i] for i in range(min(count, len(self)))])


def collect(
    source: ClipSet,
    contract: InputContract,
    labels: tuple[str, ...],
    workspace: Path,
    *,
    stage: str = "read clips",
    progress: Progress = silent,
) -> Clips:
    """Read every clip of a set; a few unreadable ones are left out.

    Args:
        labels: class names of the model.
        workspace: folder for the frames, which take T * H * W * 3 bytes a clip.

    Raises:
        InputError: no clips, a label that the model does not know, clips without any content, or more than
            `MAX_UNREADABLE_SHARE` of them cannot be read.
    """
    items = sorted(source.check_labels(labels).items, key=lambda item: item.name)
    if not items:
        raise InputError("there are no clips to calibrate on; INT8 needs real ones: give --calib a folder of videos")
    if len({item.name for item in items}) < len(items):
        raise InputError(f"{source.name} names a clip twice; names must be unique")
    frames = DiskArray(workspace, (len(items), *contract.shape), np.uint8)
    seen = hashlib.sha256(json.dumps(contract.to_json(), sort_keys=True).encode())
    names: list[str] = []
    flat: list[str] = []
    truth: list[int] = []
    unread: dict[str, str] = {}
    for item in track(items, stage, len(items), progress):
        try:
            clip = item.read(contract)
        except InputError as error:
            unread[item.name] = str(error)
            continue
        frames[len(names)] = clip.frames
        names.append(item.name)
        truth.append(-1 if clip.label is None else labels.index(clip.label))
        seen.update(f"{item.name}:{clip.label}".encode("utf-8", "surrogatepass"))
        seen.update(np.ascontiguousarray(clip.frames).tobytes())
        if int(clip.frames.min()) == int(clip.frames.max()):
            flat.append(item.name)
    if len(unread) > MAX_UNREADABLE_SHARE * len(items):
        raise InputError(
            f"{len(unread)} of {len(items)} clips of {source.name} cannot be read, more than "
            f"{MAX_UNREADABLE_SHARE:.0%}; the first: {next(iter(unread.values()))}"
        )
    frames.shorten(len(names))
    notes = (*source.notes, *_notes(source.name, tuple(names), flat))
    return Clips(source.name, frames, np.array(truth), tuple(names), seen.hexdigest(), notes, unread)


def _notes(source: str, names: tuple[str, ...], flat: list[str]) -> tuple[str, ...]:
    if len(flat) == len(names):
        raise InputError(f"every clip of {source} is one flat colour; nothing can be learned from them: give real ones")
    notes = []
    if flat:
        notes.append(f"{len(flat)} of {len(names)} clips are one flat colour, {flat[0]} among them")
    if len(names) < FEW_CLIPS:
        some = f"one clip, {names[0]}" if len(names) == 1 else f"{len(names)} clips"
        notes.append(f"calibrated on {some}: ranges of other scenes are a guess; give 128 or more, of many scenes")
    return tuple(notes)
