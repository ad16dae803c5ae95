"""The clips of a calibration: preprocessed once, kept on disk, hashed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgetube import ahead
from edgetube.arrays import DiskArray, RowArray
from edgetube.calibration import store
from edgetube.contract import InputContract
from edgetube.datasets import ClipSet, Item
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

    def head(self, count: int) -> Clips:
        """The first `count` clips, or all, with their frames in memory."""
        return replace(self, frames=self.first(count), labels=self.labels[:count], names=self.names[:count])


def collect(
    source: ClipSet,
    contract: InputContract,
    labels: tuple[str, ...],
    workspace: Path,
    *,
    workers: int = 1,
    keep: bool = False,
    stage: str = "read clips",
    progress: Progress = silent,
) -> Clips:
    """Read every clip of a set; a few unreadable ones are left out.

    Args:
        labels: class names of the model.
        workspace: folder for the frames, which take T * H * W * 3 bytes a clip.
        workers: processes that may read clips, see `edgetube.ahead`.
        keep: take the frames from the cache folder, or keep them there for the next time; see
            `edgetube.calibration.store`.

    Raises:
        InputError: no clips, a label that the model does not know, clips without any content, or more than
            `MAX_UNREADABLE_SHARE` of them cannot be read.
        BackendError: a process that read clips was killed.
    """
    items = sorted(source.check_labels(labels).items, key=lambda item: item.name)
    if not items:
        raise InputError("there are no clips to calibrate on; INT8 needs real ones: give --calib a folder of videos")
    if len({item.name for item in items}) < len(items):
        raise InputError(f"{source.name} names a clip twice; names must be unique")
    key = store.key(str(source.source or source.name), items, contract) if keep else ""
    found = _kept(key, contract) if key else None
    seen, frames = found or _read(source.name, items, contract, workspace, key, workers, stage, progress)
    truth = np.array([-1 if label is None else labels.index(label) for label in seen.labels])
    names = tuple(seen.names)
    notes = (*source.notes, *_notes(source.name, names, seen.flat))
    return Clips(source.name, frames, truth, names, seen.sha256, notes, seen.unread)


class _Seen:
    """What is known of the clips so far.

    Attributes:
        flat: names of those that are one flat colour.
        unread: the others' reasons, by name.
    """

    def __init__(self, contract: InputContract) -> None:
        self._digest = hashlib.sha256(json.dumps(contract.to_json(), sort_keys=True).encode())
        self.names: list[str] = []
        self.labels: list[str | None] = []
        self.flat: list[str] = []
        self.unread: dict[str, str] = {}

    def add(self, name: str, label: str | None, frames: Frames) -> None:
        self.names.append(name)
        self.labels.append(label)
        self._digest.update(f"{name}:{label}".encode("utf-8", "surrogatepass"))
        self._digest.update(np.ascontiguousarray(frames).data)
        if int(frames.min()) == int(frames.max()):
            self.flat.append(name)

    @property
    def sha256(self) -> str:
        """Of pixels, names, labels and contract."""
        return self._digest.hexdigest()


def _kept(key: str, contract: InputContract) -> tuple[_Seen, RowArray] | None:
    """The clips of an earlier export; None if they are not there. A damaged entry is dropped."""
    if (found := store.find(key)) is None:
        return None
    frames, record = found
    seen = _Seen(contract)
    for name, label, clip in zip(record.names, record.labels, frames, strict=True):
        seen.add(name, label, clip)
    if seen.sha256 != record.sha256:
        store.drop(key)
        return None
    return seen, frames


def _read(
    name: str,
    items: Sequence[Item],
    contract: InputContract,
    workspace: Path,
    key: str,
    workers: int,
    stage: str,
    progress: Progress,
) -> tuple[_Seen, RowArray]:
    """Read the clips, and keep them under `key`, unless that is empty or some cannot be read."""
    shape = (len(items), *contract.shape)
    draft = store.draft(key, shape)
    frames = draft.frames if draft else DiskArray(workspace, shape, np.uint8)
    seen = _Seen(contract)
    try:
        with closing(ahead.read(items, contract, workers)) as clips:
            for item, clip in track(clips, stage, len(items), progress):
                if isinstance(clip, InputError):
                    seen.unread[item.name] = str(clip)
                    continue
                frames[len(seen.names)] = clip.frames
                seen.add(item.name, clip.label, clip.frames)
        if draft and not seen.unread:
            draft.publish(store.Record(shape, tuple(seen.names), tuple(seen.labels), seen.sha256))
    finally:
        if draft:
            draft.discard()
    if len(seen.unread) > MAX_UNREADABLE_SHARE * len(items):
        raise InputError(
            f"{len(seen.unread)} of {len(items)} clips of {name} cannot be read, more than "
            f"{MAX_UNREADABLE_SHARE:.0%}; the first: {next(iter(seen.unread.values()))}"
        )
    frames.shorten(len(seen.names))
    return seen, frames


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
