"""A model, its sources and what is known about them: what the addresses of the server are about."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from edgetube import address
from edgetube.address import Source
from edgetube.errors import InputError
from edgetube.live.cameras import Cameras
from edgetube.live.decisions import DecisionRule, Event
from edgetube.live.frame import State
from edgetube.live.window import Hop, check
from edgetube.runtime import Runtime
from edgetube.serve.board import Board
from edgetube.serve.limits import Limits, Slots
from edgetube.serve.watched import WatchedSource


class Service:
    """A context manager; the runtime stays open.

    Attributes:
        cameras: None for a model that samples segments of a whole video: it takes files only.
        stopping: set when the server is about to end.
        counts: of (what a client sent, how it ended).

    Args:
        runtime: of the bundle.
        sources: what `edgetube.FrameSource` takes.
        rule: how scores become spans.
        skip_still: repeat a source's last answer while nothing changes.
        on_event, on_state: see `Board`.

    Raises:
        InputError: a source or an option that cannot be used.
    """

    def __init__(
        self,
        runtime: Runtime,
        sources: Sequence[Source] = (),
        *,
        rule: DecisionRule | None = None,
        hop: Hop | None = None,
        top_k: int = 5,
        skip_still: bool = False,
        limits: Limits | None = None,
        on_event: Callable[[str, Event], object] = lambda name, event: None,
        on_state: Callable[[str, State, str], object] = lambda name, state, why: None,
    ) -> None:
        self.runtime, self.top_k, self.limits = runtime, top_k, limits or Limits()
        self.stopping = threading.Event()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.uploads, self.watchers = Slots(self.limits.uploads), Slots(self.limits.watchers)
        self.board = Board(
            DecisionRule() if rule is None else rule, runtime.labels, top_k, on_event=on_event, on_state=on_state
        )
        self._sources: list[WatchedSource] = []
        self.cameras: Cameras | None = None
        try:
            check(runtime.contract)
        except InputError:
            if sources or hop is not None or skip_still:
                raise
            return
        self.cameras = Cameras(
            runtime,
            on_prediction=self.board.answered,
            on_state=self.board.changed,
            on_error=self.board.failed,
            on_end=self.board.ended,
            hop=hop,
            top_k=top_k,
            gate=runtime.gate if skip_still else None,
        )
        try:
            for source in sources:
                self._add(source)
        except BaseException:
            self.close()
            raise

    def _add(self, source: Source) -> None:
        assert self.cameras is not None, "made before"
        parsed = address.parse(source)
        if isinstance(parsed, Path) and not parsed.exists():
            raise InputError(f"there is no file or folder {parsed}")
        shown = parsed.name if isinstance(parsed, Path) else address.shown(parsed)
        taken = self.cameras.names
        name = next(
            name for n in range(len(taken) + 1) if (name := shown if n == 0 else f"{shown} ({n + 1})") not in taken
        )
        made = WatchedSource(source, name=name, fps=self.runtime.contract.fps)
        self._sources.append(made)
        self.board.add(name, made)
        self.cameras.add(name, made)

    def check(self) -> None:
        """
        Raises:
            EdgetubeError: the model was given up.
        """
        if self.cameras is not None:
            self.cameras.wait(0)

    def close(self) -> None:
        """End all sources; twice is fine."""
        self.stopping.set()
        for source in self._sources:
            source.close()
        if self.cameras is not None:
            self.cameras.close()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
