"""An artifact that is opened on another machine, and answers, and shows its layers, as one that is opened here."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from edgetube import preprocess
from edgetube.bench.model_set import Artifact
from edgetube.bundle import Bundle
from edgetube.errors import DeviceError
from edgetube.remote.device import Device
from edgetube.runtimes.base import Backend, LayerOutputs, Logits, Tap
from edgetube.targets import Status
from edgetube.video import Frames


class RemoteBackend(Backend):
    """One artifact opened on a device. Clips are sent once, whatever number of artifacts answer them."""

    def __init__(self, bundle: Bundle, device: Device, threads: int | None = None) -> None:
        super().__init__(bundle.contract, bundle.batch)
        self._device, self._name = device, bundle.name
        opened = device.ask("open", path=device.send(bundle), threads=threads)
        self._of: int = opened["of"]
        self._about: dict[str, Any] = opened["describe"]
        self.status, self.arithmetic = opened["status"], opened["arithmetic"]
        self._unused: list[int] = []

    def infer(self, clips: Frames) -> Logits:
        try:
            reply = self._device.ask_bytes("call", of=self._of, clips=self._sent(clips))
        except DeviceError as error:  # it may be this artifact that ends edgetube there
            raise DeviceError(f"{error}; it was asked for an answer of {self._name}") from error
        return _array(reply.pieces[0], reply.result)

    def __call__(self, clips: npt.ArrayLike) -> Logits:
        """All clips in one order; the device runs them in batches."""
        frames = preprocess.check(clips, self.contract)
        with self._in_use(), self._lock:
            return self.infer(frames)

    def describe(self) -> dict[str, Any]:
        return {**self._about, "on": self._device.name}

    def layers(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(self._device.ask("layers", of=self._of, names=list(names)))

    def tap(self, names: Sequence[str]) -> Tap:
        self._close_unused()
        return _RemoteTap(self, self._device.ask("tap", of=self._of, names=list(names)))

    def read(self, tap: int, clips: Frames) -> LayerOutputs:
        """The tensors of a tap, by its number."""
        reply = self._device.ask_bytes("read", tap=tap, clips=self._sent(clips))
        return {name: _array(piece, shape) for (name, shape), piece in zip(reply.result, reply.pieces, strict=True)}

    def forget(self, tap: int) -> None:
        """Close a tap before the next one is opened."""
        self._unused.append(tap)

    def release_calls(self) -> None:
        with suppress(DeviceError):  # if the line is broken, all is closed there; this is said of what was asked for
            self._device.ask("only_tap", of=self._of)

    def release(self) -> None:
        self._unused.append(self._of)
        self._close_unused()

    def _close_unused(self) -> None:
        unused, self._unused[:] = list(self._unused), []
        if unused:
            self._device.end(unused)

    def _sent(self, clips: Frames) -> list[str]:
        return self._device.send_clips([np.ascontiguousarray(clip).data.cast("B") for clip in clips])


class _RemoteTap:
    """A tap of a remote artifact; what it holds there is freed when it is."""

    def __init__(self, backend: RemoteBackend, number: int) -> None:
        self._backend, self._number = backend, number
        weakref.finalize(self, backend.forget, number)

    def __call__(self, clips: Frames) -> LayerOutputs:
        return self._backend.read(self._number, clips)


def _array(data: bytes, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = np.frombuffer(data, np.float32).reshape(shape).copy()
    return found


@dataclass(frozen=True)
class RemoteArtifact(Artifact):
    """A bundle's artifact on a device."""

    on: Device

    @property
    def device(self) -> str | None:
        """The device chooses there, as `Artifact` does here."""
        return None

    @property
    def status(self) -> Status:
        return cast(Status, self.on.ask("status", path=self.on.send(self.bundle)))

    def identity(self) -> Mapping[str, Any]:
        on = {key: self.on.facts[key] for key in ("id", "python", "code", "processor", "versions")}
        return {**super().identity(), "on": {"name": self.on.name, **on}}

    def open(self, threads: int | None) -> Backend:
        return RemoteBackend(self.bundle, self.on, threads)
