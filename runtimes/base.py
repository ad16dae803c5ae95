"""The base class of backends: open, run, close. It checks inputs, so that backends need not."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from edgetube import preprocess, strict
from edgetube.bundle import Bundle
from edgetube.contract import InputContract
from edgetube.errors import BackendError
from edgetube.roles import LOGITS
from edgetube.targets import Arithmetic, Status
from edgetube.video import Frames

Logits = npt.NDArray[np.float32]
"""(N, classes), or (classes,) of one clip."""

LayerOutputs = dict[str, npt.NDArray[np.float32]]
"""Inner tensors of an artifact, by their names in the canonical graph."""

Tap = Callable[[Frames], LayerOutputs]

Shape = tuple[int | None, ...]
"""The shape of a tensor; None for a dynamic axis."""


@dataclass(frozen=True)
class Interface:
    """Shapes of an artifact's inputs and outputs, as the artifact states them."""

    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]


@dataclass(frozen=True)
class Served:
    """How a backend of the Triton Inference Server runs an artifact by itself.

    Attributes:
        backend: its name there.
        files: the artifact's files, by the names that it looks for.
    """

    backend: str
    files: Mapping[str, Path]


class Backend(ABC):
    """One opened artifact.

    A subclass opens the artifact in `__init__(bundle, *, threads, device)` and implements `infer`, and `release` or
    `release_calls` where it has something to free. Several threads may call one backend: calls are serialised unless
    the subclass says `thread_safe`. It may be closed meanwhile: calls in progress complete, later ones are refused. It
    cannot be used in a forked process.
    """

    thread_safe: ClassVar[bool] = False
    status: Status = "executed"
    arithmetic: Arithmetic = "float32"
    """What the floating-point part of the artifact is computed in here."""

    def __init__(self, contract: InputContract, batch: int) -> None:
        self.contract = contract
        self.batch = batch
        self._lock = threading.Lock()
        self._state = threading.Condition()
        self._callers: set[int] = set()  # threads
        self._open, self._ending, self._closed, self._released = True, False, False, False
        self._process = os.getpid()

    @abstractmethod
    def infer(self, clips: Frames) -> Logits:
        """Logits (batch, classes) float32 of exactly `batch` contiguous clips (batch, T, H, W, 3) uint8."""

    def interface(self) -> Interface | None:
        """Shapes of the opened artifact; None if it does not state them."""
        return None

    def describe(self) -> dict[str, Any]:
        """Versions, device and threads; plain JSON."""
        return {}

    def layers(self, names: Sequence[str]) -> tuple[str, ...]:
        """The `names`, tensors of the canonical graph (`blocks.3.attn.qkv`), that `tap` can return; none by default."""
        return ()

    def tap(self, names: Sequence[str]) -> Tap:
        """Open the artifact again with some inner tensors as outputs, a few at a time.

        Args:
            names: of `layers`.

        Returns:
            A function: `batch` contiguous clips (batch, T, H, W, 3) uint8 -> float32 tensor by name.

        Raises:
            BackendError: the vendor's runtime cannot return inner tensors, or fails.
        """
        raise BackendError(f"{type(self).__module__.rpartition('.')[2]} shows no inner tensors")

    def release_calls(self) -> None:  # noqa: B027  # a backend may have nothing of the kind
        """Free the resources of `__init__` that `infer` needs and `layers` and `tap` do not. Called once."""

    def release(self) -> None:  # noqa: B027
        """Free the other resources of `__init__`. Called once, after `release_calls`."""

    def __call__(self, clips: npt.ArrayLike) -> Logits:
        """Logits (B, classes) float32 of clips (B, T, H, W, 3) uint8, any strides, any B.

        The artifact's batch is static: B clips run as ceil(B / batch) calls, the last one filled up by repeating
        its last clip.

        Raises:
            InputError: wrong shape or dtype.
            BackendError: the backend is closed or belongs to another process, or the vendor's runtime failed.
        """
        frames = preprocess.check(clips, self.contract)
        outputs = []
        with self._in_use():
            for start in range(0, len(frames), self.batch):
                piece = frames[start : start + self.batch]
                if (short := self.batch - len(piece)) > 0:
                    piece = np.concatenate([piece, piece[-1:].repeat(short, axis=0)])
                outputs.append(self._infer(piece)[: self.batch - short])
        return np.concatenate(outputs)

    def _infer(self, piece: Frames) -> Logits:
        if self.thread_safe:
            return self.infer(piece)
        with self._lock:
            return self.infer(piece)

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Count a call, so that `close` waits for it."""
        # Locks that another thread held at the fork stay locked in the child, and the vendor's threads are not there.
        if os.getpid() != self._process:
            raise BackendError(
                "this runtime was opened before the process forked and cannot be used in the child; open the bundle "
                "there, or start processes with multiprocessing's spawn method"
            )
        caller = threading.get_ident()
        try:
            with self._state:
                if not self._open:
                    raise BackendError("this runtime is closed; open the bundle again")
                self._callers.add(caller)
            yield
        finally:
            with self._state:
                self._callers.discard(caller)
                self._state.notify_all()

    def close(self) -> None:
        """Release the artifact after calls in progress; closing twice is fine."""
        if os.getpid() != self._process:
            return  # it is the parent's
        with self._state:
            self._closed = True
            self._end_calls()

    def only_tap(self) -> None:
        """Refuse calls from now on, as if closed, but not `layers` and `tap`, which open the artifact once more.

        So the weights are not in memory twice. Waits for calls in progress.
        """
        with self._state:
            self._end_calls()

    def _end_calls(self) -> None:
        """Wait for calls in progress and release what is no longer needed; the first thread does it for the others."""
        if self._ending:
            return
        if self._open:
            self._open, self._ending = False, True
            self._state.wait_for(lambda: self._callers <= {threading.get_ident()})
            self._ending = False
            self.release_calls()
        if self._closed and not self._released:
            self._released = True
            self.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FixedOutputs(Backend):
    """A backend whose runtime shows no inner tensors but those that an artifact was made to return.

    `build.shown` of the manifest names them. Only artifacts that are made for a proof, and are not published, have any.
    """

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle.contract, bundle.batch)
        given = strict.items(bundle.build.get("shown", []), "build.shown")
        self.shown = tuple(strict.text(name, "build.shown") for name in given)

    @abstractmethod
    def returned(self, clips: Frames) -> Sequence[npt.NDArray[np.float32]]:
        """The artifact's own output, and behind it the tensors of `shown`, of exactly `batch` clips."""

    def infer(self, clips: Frames) -> Logits:
        return self.returned(clips)[0]

    def layers(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for name in names if name in (LOGITS, *self.shown)) if self.shown else ()

    def tap(self, names: Sequence[str]) -> Tap:
        """The artifact is not opened again, so it has to stay open."""
        if missing := [name for name in names if name not in self.layers(names)]:
            return super().tap(missing)

        def show(clips: Frames) -> LayerOutputs:
            found = dict(zip((LOGITS, *self.shown), self.returned(clips), strict=True))
            return {name: found[name] for name in names}

        return show


def may_saturate(bundle: Bundle) -> bool:
    """Whether an INT8 artifact may overflow on x86 without VNNI, which sums two products in 16 bits.

    `build.integers.saturates` in the manifest is false where it cannot; bundles of older versions lack it.
    """
    return bundle.precision.quantises_activations and integers(bundle).get("saturates") is not False


def integers(bundle: Bundle) -> Mapping[str, Any]:
    """`build.integers` of the manifest; empty where it is missing or of another type."""
    stated = bundle.build.get("integers")
    return stated if isinstance(stated, Mapping) else {}
