"""The runtime that an application embeds: opens a bundle and classifies frames."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from edgetube import address, answer, metrics, preprocess, processes, runtimes, video
from edgetube import bundle as bundles
from edgetube.address import Address, Source
from edgetube.bundle import Bundle
from edgetube.contract import InputContract
from edgetube.errors import InputError, ParityError
from edgetube.live.novelty import REFRESH, NoveltyGate
from edgetube.live.schedule import MAX_AGE_S
from edgetube.live.scheduler import Scheduler, open_source
from edgetube.live.source import FrameSource, Policy
from edgetube.live.stream import Stream
from edgetube.live.window import Hop
from edgetube.runtimes.base import Logits
from edgetube.spec import Prediction
from edgetube.video import Clip

GOLDEN_SLACK = 1e-3
"""How far the golden logits of an older bundle may move between two machines, of the largest logit, beside twice the
proven error."""

DIFFERENT = "the device or its driver computes differently: export for this device, or use an fp32 target"


class Runtime:
    """One opened bundle. Thread-safe; a context manager.

    `close` waits for calls of other threads and refuses later ones. Pickled, for a process that multiprocessing spawns,
    it is the bundle's path and the options: the copy opens the bundle again. A forked process has to open its own.

    Args:
        bundle: the bundle's folder, or a loaded `Bundle`.
        threads: CPU threads of one call; None leaves the choice to the vendor's runtime.
        device: as the backend names it ("cpu", "cuda", ...); None takes the bundle's own.
        verify: hash the bundle's files first (about a second per gigabyte).

    Raises:
        BundleError: no bundle, a newer schema, or files that were changed since the export.
        MissingPackageError: the backend's package is not installed.
        BackendError: the vendor's runtime refuses the artifact.

    >>> with Runtime("out/demo.onnx-fp32") as rt:
    ...     rt.predict("clip.mp4").label
    """

    def __init__(
        self,
        bundle: str | Path | Bundle,
        *,
        threads: int | None = None,
        device: str | None = None,
        verify: bool = True,
    ) -> None:
        runtimes.check_threads(threads)
        if isinstance(bundle, Bundle):
            self.bundle = bundle
            if verify:
                bundle.verify()
        else:
            self.bundle = bundles.load(bundle, verify)
        self._backend = runtimes.open_bundle(self.bundle, threads=threads, device=device)
        self._options: dict[str, Any] = {"threads": threads, "device": device, "verify": verify}

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Runtime, **self._options), (self.bundle.path.absolute(),)

    @property
    def contract(self) -> InputContract:
        """The model's input."""
        return self.bundle.contract

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names, in the order of the logits."""
        return self.bundle.labels

    @property
    def batch(self) -> int:
        """Clips of one call of the artifact; it takes other numbers in pieces of that many."""
        return self.bundle.batch

    @property
    def parallel_calls(self) -> int:
        """Calls at once that this runtime gains from: processors / `threads` where the backend takes several calls and
        was given a number of threads, else 1."""
        threads = self._options["threads"]
        return max(1, processes.cores() // threads) if threads and self._backend.thread_safe else 1

    def __call__(self, clips: npt.ArrayLike) -> Logits:
        """Logits (B, classes) float32 of clips (B, T, H, W, 3) uint8 RGB that are already preprocessed.

        Any strides and any B; larger batches than the artifact's run in pieces.

        Raises:
            InputError: another shape or dtype; says what was given and what is expected.
            BackendError: the runtime is closed or failed.
        """
        return self._backend(clips)

    def predict(
        self,
        source: Source | Address | npt.NDArray[np.uint8],
        *,
        top_k: int = 5,
        fps: float | None = None,
        start: float | None = None,
    ) -> Prediction:
        """Classify one clip: of a video file, an image file (image models), or frames in memory.

        Args:
            source: a path, or RGB frames (T, H, W, 3) uint8 of any length and size (an image model also takes
                (H, W, 3)); preprocessing follows the bundle's contract. A stranger's file is the `Address` of
                `edgetube.address.of_file`, which says what it may be.
            top_k: how many classes `scores` holds.
            fps: rate of frames in memory; None says they already have the contract's rate.
            start: second at which the clip starts; None takes the middle of the source. A model that samples
                segments of the whole source takes none.

        Raises:
            InputError: frames, a file or an option that cannot be used; says why.

        Frames of OpenCV are BGR: give `cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)`.
        """
        began = time.perf_counter()
        top_k = preprocess.count_of(top_k, "top_k")
        if fps is not None:
            fps = preprocess.frame_rate(fps)
        clip = self._clip(source, fps, start)
        logits = self(clip.frames[None])[0]
        return answer.prediction(
            logits,
            self.labels,
            top_k,
            start=clip.start,
            end=clip.end,
            latency_ms=(time.perf_counter() - began) * 1e3,
            source=_named(source),
        )

    def stream(
        self,
        source: Source | FrameSource | Iterable[Any],
        *,
        hop: Hop | None = None,
        fps: float | None = None,
        top_k: int = 5,
        policy: Policy | None = None,
        max_age: float | None = MAX_AGE_S,
        skip_still: float | bool = False,
    ) -> Stream:
        """Classify a sliding window over a camera, a URL, a file, or any iterable of frames.

        Args:
            source: as for `edgetube.live.source.FrameSource`: a path, a camera's index, a URL, frames (H, W, 3) uint8,
                or (seconds, frame) pairs; or a `FrameSource`, which stays open.
            hop: frames, of those that the contract's sampling takes, between two predictions; or seconds as text,
                "0.5s"; None takes a quarter of the clip.
            fps: rate of an iterable of bare frames; None says the contract's rate, and with the policy "latest" that
                their time is that of their arrival.
            top_k: how many classes `scores` holds.
            policy: "latest": what is newest is classified, and frames and clips that there is no time for are left out
                and counted; "all": every clip is classified, and the source waits. None: "latest" for cameras and
                URLs, "all" for files and iterables. An iterable that reads a camera wants "latest".
            max_age: seconds; with "latest", clips whose answers would be older are left out
                (`edgetube.live.schedule.Schedule`); None for no limit.
            skip_still: repeat the last answer while what the model reads has not changed
                (`edgetube.live.novelty.NoveltyGate`); a number is the threshold in grey levels, True its default.

        Returns:
            An iterator, for `for` and for `async for`, with `close`. It gives a prediction each time `hop` new frames
            have come, from the first full clip on; a file or an iterable that ends before its first full clip gives
            one, with its last frame repeated. Where frames do not continue those before them (a gap, a clock that
            jumped, a new connection) the window begins again, and `Prediction.restarted` says why.

        Raises:
            InputError: a source, a frame, its time or an option that cannot be used, or a model that samples segments
                of a whole video; says why. Options are checked at the call, frames as they come; the same is refused
                as in `predict`.

        A frame is copied as it comes, so a camera may fill one buffer again and again. OpenCV reads BGR:

        >>> def camera(capture):
        ...     while (read := capture.read())[0]:
        ...         yield time.monotonic(), cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB)
        >>> for p in rt.stream(camera(cv2.VideoCapture(0)), policy="latest"): ...
        """
        gate = None if skip_still is False else partial(self.gate, skip_still)
        scheduler = Scheduler(self, hop=hop, top_k=top_k, max_age=max_age, gate=gate)
        if gate is not None:
            gate()  # what it refuses is refused before the source is opened
        opened, owned = open_source(source, self.contract, fps=fps, policy=policy)
        return Stream(scheduler, opened, owned)

    def gate(self, skip_still: float | bool = True, refresh_after: float = REFRESH) -> NoveltyGate:
        """A gate for one source, which says whether a clip needs inference.

        Raises:
            InputError: a threshold or a time that cannot be used.
        """
        return NoveltyGate(self.bundle.spec, skip_still, refresh_after)

    def check(self) -> float:
        """Run the golden clips on this device; returns the largest logit error against the reference.

        The manifest has the limit of the errors: those of the proof, and what the target's arithmetic may differ by
        between machines (`docs/bundle.md`).

        Raises:
            BundleError: the golden clips belong to another manifest.
            ParityError: the errors are larger than the manifest allows.
        """
        frames, reference = self.bundle.golden()
        logits = np.concatenate([self(clip[None]) for clip in frames])
        error = metrics.max_abs_error(reference, logits)
        stated = self.bundle.parity.get("golden")
        if stated is None:
            self._check_largest(error, float(np.abs(reference).max()))
        elif not (found := metrics.sqnr(reference, logits)) >= (limit := float(stated["min_sqnr"])):
            raise ParityError(
                f"{self.bundle.name}: the golden clips have an SQNR of {found:.1f} dB here, at least {limit:.1f} is "
                f"expected (largest error of a logit {error:.3g}); {DIFFERENT}"
            )
        return error

    def _check_largest(self, error: float, largest: float) -> None:
        """The limit for older bundles: twice the error of the proof, and a thousandth of the largest logit."""
        proven = float(cast(float, self.bundle.parity.get("max_abs_error", 0.0)))
        if not error <= (allowed := 2 * proven + GOLDEN_SLACK * max(1.0, largest)):
            raise ParityError(
                f"{self.bundle.name}: the golden clip's logits are off by {error:.3g} here, {allowed:.3g} is allowed; "
                f"{DIFFERENT}"
            )

    def describe(self) -> dict[str, Any]:
        """Versions, device and threads; plain JSON."""
        return self._backend.describe()

    def close(self) -> None:
        """Release the artifact; closing twice is fine."""
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _clip(self, source: Source | Address | npt.NDArray[np.uint8], fps: float | None, start: float | None) -> Clip:
        if isinstance(source, str) and "://" in source:
            raise InputError(f"predict takes a file or frames; read {address.plain(source)} with stream")
        if isinstance(source, str | Path | Address):
            return video.load(source, self.contract, start)
        if isinstance(source, int) and not isinstance(source, bool):
            raise InputError(f"predict takes a file or frames; read camera {source} with stream({source})")
        return Clip("array", preprocess.prepare(source, self.contract, fps, start))


def _named(source: object) -> str | None:
    if isinstance(source, Address):
        return source.name
    return str(source) if isinstance(source, str | Path) else None
