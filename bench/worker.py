"""The process of one candidate: it opens the candidate, reports the cold start, then runs the orders of its parent.

The parent is `edgetube.bench.latency.Process`; `edgetube.wire` has their protocol. The output of vendors' libraries
goes to stderr. Only the standard library is imported before the clock of the cold start runs.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetube import wire
from edgetube.errors import EdgetubeError

if TYPE_CHECKING:
    from edgetube.bundle import Bundle
    from edgetube.runtime import Runtime
    from edgetube.video import Frames

StageTimer = Callable[[str], None]
"""Called at the end of each stage of the cold start with its name; "" for work that does not count."""


@dataclass(frozen=True)
class Benchmarkable:
    """An opened candidate: what is timed.

    Attributes:
        call: one inference, of a batch that is ready.
        prepare: the preprocessing of one clip, from a camera's frames to what `call` takes; None leaves it out.
        runtime: for the camera stream; None leaves that out.
        about: versions, device, threads; plain JSON.
    """

    call: Callable[[], object]
    prepare: Callable[[], object] | None = None
    runtime: Runtime | None = None
    about: dict[str, Any] = field(default_factory=dict)


def bundle(
    stage_timer: StageTimer, path: str, threads: int | None, device: str | None, camera: tuple[int, int]
) -> Benchmarkable:
    """Open a bundle as a camera app does; `camera` is the (height, width) of the frames that are preprocessed."""
    from edgetube.runtime import Runtime

    stage_timer("import")
    rt = Runtime(path, threads=threads, device=device)
    stage_timer("load")
    clips, prepare = _inputs(rt.bundle, camera)
    stage_timer("")
    return Benchmarkable(lambda: rt(clips), prepare, rt, rt.describe())


def reference(
    stage_timer: StageTimer, path: str, checkpoint: Mapping[str, str], camera: tuple[int, int]
) -> Benchmarkable:
    """Open the PyTorch model that a bundle was made from, found at `checkpoint`; `OMP_NUM_THREADS` says its threads."""
    from edgetube import bundle as bundles
    from edgetube import formats
    from edgetube.runtimes.torch import Reference

    stage_timer("import")
    found = bundles.load(path)
    trained = formats.of_bundle(replace(found, checkpoint=checkpoint))
    model = Reference(trained.model, trained.contract)
    stage_timer("load")
    clips, prepare = _inputs(found, camera)
    stage_timer("")
    return Benchmarkable(lambda: model(clips), prepare, None, model.describe())


def _inputs(found: Bundle, camera: tuple[int, int]) -> tuple[Frames, Callable[[], object]]:
    """A batch that is ready, and the preprocessing of one clip of a camera's frames."""
    from edgetube import preprocess
    from edgetube.bench.camera import enlarge

    golden = found.golden()[0][0]
    raw = enlarge(golden, camera)
    # A stride leaves most frames of a camera out at no cost; these are the ones that it takes.
    contract = replace(found.contract, sampling="uniform", stride=None)
    return golden[None].repeat(found.batch, axis=0), lambda: preprocess.prepare(raw, contract)


SETTLE = 0.05
"""Uncounted seconds at the start of a turn: caches and cores still belong to the previous candidate."""

LONG = 1.0
"""If a call takes longer than this, in seconds, a turn is one counted call without settling."""

WINDOW, STEADY = 5, 0.05
"""Warm-up ends when the medians of the last `WINDOW` calls and of the `WINDOW` before differ by less than `STEADY`."""


def warm(candidate: Benchmarkable, seconds: float) -> dict[str, Any]:
    """Call until the times are steady, at most for `seconds`; returns the number of calls, and whether they are."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while not (done := steady(taken)) and time.perf_counter() < end:
        taken.append(_timed(candidate.call))
    return {"calls": len(taken), "steady": done, "peak_mb": peak_mb()}


def steady(taken: list[float]) -> bool:
    """Whether the last calls took as long as those before; see `WINDOW`."""
    if len(taken) < 2 * WINDOW:
        return False
    before, last = sorted(taken[-2 * WINDOW : -WINDOW])[WINDOW // 2], sorted(taken[-WINDOW:])[WINDOW // 2]
    return abs(last - before) < STEADY * before


def turn(candidate: Benchmarkable, seconds: float, least: int) -> dict[str, Any]:
    """Milliseconds of at least `least` calls in about `seconds`; `calls` also counts those to settle."""
    end = time.perf_counter() + SETTLE
    if (first := _timed(candidate.call)) > 1e3 * LONG:
        return {"ms": [first], "calls": 1}
    settled = 1
    while time.perf_counter() < end:
        candidate.call()
        settled += 1
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < least or time.perf_counter() < end:
        taken.append(_timed(candidate.call))
    return {"ms": taken, "calls": settled + len(taken)}


def prepare(candidate: Benchmarkable, least: int) -> dict[str, Any]:
    """Milliseconds of `least` preprocessed clips; the first one is not counted."""
    if candidate.prepare is None:
        return {"ms": []}
    candidate.prepare()
    return {"ms": [_timed(candidate.prepare) for _ in range(least)]}


def camera(candidate: Benchmarkable, **paced: Any) -> dict[str, Any] | None:
    """What `edgetube.bench.camera.pace` measures; None for what has no stream."""
    from edgetube.bench import camera as cameras

    return None if candidate.runtime is None else cameras.pace(candidate.runtime, **paced)


ORDERS: dict[str, Callable[..., Any]] = {"warm": warm, "turn": turn, "prepare": prepare, "camera": camera}


def main() -> None:
    """Serve the candidate that the first argument describes, see `Process`, until stdin is closed."""
    began = time.monotonic()
    server = wire.Server(wire.Inbox(), wire.private_stdout())
    order = json.loads(sys.argv[1])
    stages = {"start": (began - order["spawned"]) * 1e3}
    mark = time.perf_counter()

    def stage_timer(stage: str) -> None:
        nonlocal mark
        now = time.perf_counter()
        if stage:
            stages[stage] = stages.get(stage, 0.0) + (now - mark) * 1e3
        mark = time.perf_counter()

    module, _, function = order["opener"].partition(":")
    try:
        candidate: Benchmarkable = getattr(importlib.import_module(module), function)(stage_timer, **order["given"])
        candidate.call()
        stage_timer("first")
    except EdgetubeError as error:
        server.refuse(error)
        return
    server.say(wire.Reply({"stages": stages, "about": candidate.about}))
    server.serve({name: partial(carry_out, candidate) for name, carry_out in ORDERS.items()})


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def peak_mb() -> float | None:
    """Largest resident memory of this process so far, 1e6 bytes; None where it is unknown.

    Not `getrusage` on Linux: its number is inherited from the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(fields["VmHWM"].split()[0]) * 1024 / 1e6
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
