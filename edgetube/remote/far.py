"""edgetube on a device: the orders that it carries out there. What they do is done by the functions that do it here."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgetube import bundle as bundles
from edgetube import health, runtimes
from edgetube.bench import latency, machine
from edgetube.bench.model_set import Artifact
from edgetube.live.stream import Stream
from edgetube.remote import bootstrap, stage
from edgetube.runtime import Runtime
from edgetube.runtimes.base import Backend, Tap
from edgetube.targets import Status
from edgetube.wire import Reply, Server


def main(server: Server) -> None:
    """Say hello, then carry out orders until the line ends, see `edgetube.remote.stage.EDGETUBE`.

    The only argument of the command line is that of `edgetube.remote.stage.main`.
    """
    (elsewhere,) = sys.argv[1:]
    store = stage.Store(stage.folder(elsewhere), elsewhere)
    server.hello(stage.HELLO, {"protocol": stage.PROTOCOL})
    server.serve({**stage.orders(store), **Far(store, server).orders()})


class Far:
    """What is opened on this device for the other side of the line.

    Args:
        store: where files lie that were sent.
        server: takes the progress of an order.
    """

    def __init__(self, store: stage.Store, server: Server) -> None:
        self._store, self._server = store, server
        self._ids = itertools.count()
        self._backends: dict[int, Backend] = {}
        self._taps: dict[int, tuple[Tap, Backend]] = {}
        self._runtimes: dict[int, Runtime] = {}
        self._streams: dict[int, Stream] = {}

    def orders(self) -> dict[str, Any]:
        """The orders by their names."""
        return {
            "facts": lambda: facts(self._store),
            "bench": self.bench,
            "doctor": self.doctor,
            "status": status,
            "open": self.open,
            "call": self.call,
            "layers": self.layers,
            "tap": self.tap,
            "read": self.read,
            "only_tap": lambda of: self._backends[of].only_tap(),
            "close": self.close,
            "runtime": self.runtime,
            "predict": self.predict,
            "stream": self.stream,
            "next": self.next,
        }

    # ------------------------------------------------------------------------------------------------ whole commands

    def bench(self, paths: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
        """The document of `edgetube bench` for bundles that are here."""
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
        }
        found = [bundles.load(path) for path in paths]
        return latency.measure(found, latency.Options(**given), self._server.progress)

    def doctor(self, path: str, device: str | None, key: str | None) -> list[dict[str, Any]]:
        """The checks of `edgetube doctor`."""
        return [asdict(check) for check in health.examine(path, device, Path(key) if key else None)]

    # --------------------------------------------------------------------------------------------- artifacts, opened

    def open(self, path: str, threads: int | None) -> dict[str, Any]:
        """Open a bundle as `edgetube parity` does: with its own runtime or, where that is not here, its emulator."""
        found = bundles.load(path)
        device = runtimes.device_of(found)
        if threads is not None and not runtimes.takes_threads(found.backend, device):
            threads = None
        backend = runtimes.open_bundle(found, threads=threads, device=device)
        self._backends[of := next(self._ids)] = backend
        return {
            "of": of, "status": backend.status, "arithmetic": backend.arithmetic, "describe": backend.describe(),
        }  # fmt: skip

    def call(self, of: int, clips: Sequence[str]) -> Reply:
        """Logits (B, classes) of clips that were sent."""
        backend = self._backends[of]
        logits = backend(self._clips(backend, clips))
        return Reply(list(logits.shape), (logits.tobytes(),))

    def layers(self, of: int, names: Sequence[str]) -> list[str]:
        """Those of the tensors that `tap` can return."""
        return list(self._backends[of].layers(names))

    def tap(self, of: int, names: Sequence[str]) -> int:
        """Open an artifact again with some inner tensors as outputs."""
        self._taps[tap := next(self._ids)] = self._backends[of].tap(names), self._backends[of]
        return tap

    def read(self, tap: int, clips: Sequence[str]) -> Reply:
        """The inner tensors of clips that were sent: [name, shape] of each."""
        found, backend = self._taps[tap]
        values = {name: np.ascontiguousarray(value) for name, value in found(self._clips(backend, clips)).items()}
        return Reply(
            [[name, list(value.shape)] for name, value in values.items()],
            tuple(value.tobytes() for value in values.values()),
        )

    def close(self, of: Sequence[int]) -> None:
        """Close what has these numbers."""
        for number in of:
            self._taps.pop(number, None)
            for opened in (each.pop(number, None) for each in (self._streams, self._backends, self._runtimes)):
                if opened is not None:
                    opened.close()

    def _clips(self, backend: Backend, digests: Sequence[str]) -> np.ndarray:
        clips = [np.frombuffer(self._store.read(digest, clips=True), np.uint8) for digest in digests]
        return np.stack(clips).reshape(len(digests), *backend.contract.shape)

    # ----------------------------------------------------------------------------------------------------- run

    def runtime(self, path: str, threads: int | None, device: str | None) -> int:
        """Open a bundle as `edgetube run` does."""
        self._runtimes[of := next(self._ids)] = Runtime(path, threads=threads, device=device)
        return of

    def predict(self, of: int, source: str, top_k: int) -> dict[str, Any]:
        """Classify one clip of a file that was sent."""
        return self._runtimes[of].predict(source, top_k=top_k).to_json()

    def stream(self, of: int, source: str | int, hop: Any, top_k: int, skip_still: bool) -> int:
        """Slide a window over a file that was sent, or over a camera or a URL as this device sees it."""
        stream = self._runtimes[of].stream(source, hop=hop, top_k=top_k, skip_still=skip_still)
        self._streams[number := next(self._ids)] = stream
        return number

    def next(self, of: int) -> dict[str, Any] | None:
        """The next prediction of a stream; None at its end."""
        found = next(self._streams[of], None)
        return None if found is None else found.to_json()


def status(path: str) -> Status:
    """How a bundle is run on this device."""
    return Artifact(bundles.load(path, verify=False)).status


def facts(store: stage.Store) -> dict[str, Any]:
    """What this machine is, and what of edgetube runs on it.

    Returns:
        machine, processor, versions: see `edgetube.bench.machine`.
        id: of the device, see `edgetube.remote.stage.Store`.
        python: the path of this Python.
        code: a digest of edgetube's modules.
    """
    return {
        "id": store.id,
        "python": sys.executable,
        "code": bootstrap.code(),
        "machine": machine.describe(),
        "processor": machine.processor(),
        "versions": machine.versions(),
    }
