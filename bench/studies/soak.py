"""How live streams hold out: many frames on a clock that runs through a week, real answers for long, and faults.

    python bench/studies/soak.py [--bundle out/demo.onnx-fp32] [--frames 100000] [--answers 5000]
                                 [--decoded 20000] [--faults all|none|NAME,...] [--json bench/results/soak.json]

* *endurance*: a pushed source, a window and a stream, with a model that answers at once. The clock is scripted: frames
  come at 30 a second in recordings that are spread over a week. Every frame has to be accounted for; memory, threads
  and files are looked at ten times.
* *decoded*: H.264 of 320x240 from a server, faster than it was filmed, with the same model and the same looks. The film
  begins again every 40 s, so its clock jumps back.
* *answers*: the built-in model answers one window after the other, with the same looks, and how long each call takes.
* *threads*: eight threads call one runtime; each answer is compared with that of one thread alone.
* *faults*: see `soak_faults.py`. The faults of RTSP need GStreamer, see `rtsp_server.py`; without it they are not run.

Times want a quiet machine. What a camera's frames cost, and what two streams gain from two cores, is measured by
`live.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

import edgetube
from edgetube.bench.camera import enlarge
from edgetube.bench.machine import describe
from edgetube.bench.studies import live, soak_faults
from edgetube.bench.studies.servers import Connection, cut, film, serving
from edgetube.bench.studies.soak_faults import FAULTS, Row
from edgetube.contract import InputContract
from edgetube.errors import EdgetubeError, InputError
from edgetube.files import atomic_write
from edgetube.live import source as live_source
from edgetube.live.scheduler import Scheduler
from edgetube.live.source import FrameSource
from edgetube.live.stream import Stream

WEEK_S = 7 * 86_400.0
FPS = 30.0
RECORDINGS = 100
"""Between two of them the camera shows nothing."""

LOOKS = 10
"""At memory, threads and files; the first when a tenth is done."""

GROWTH_PERCENT = 2.0
"""By which memory may grow from the first look on."""

SIZE = (240, 320)
"""Height and width of the frames of the endurance test."""

WARM_UP = 10_000
"""Frames of a server before the first look: FFmpeg's demultiplexer takes some MB in the first 8000 or so of each
connection, also without a decoder behind it."""

THREADS, CLIPS = 8, 64


class Clock:
    """Takes the place of the module `time` in a source: it says what it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Instant:
    """A model that answers at once: the mean grey of each frame of a clip."""

    batch = parallel_calls = 1
    contract = InputContract(16, 64, 64, fps=15.0)
    labels = tuple(f"frame {i}" for i in range(16))

    def __call__(self, clips: npt.ArrayLike) -> npt.NDArray[np.float32]:
        return np.asarray(clips)[:, :, 0, 0, 0].astype(np.float32)

    def stream(self, source: FrameSource) -> Stream:
        return Stream(Scheduler(self), source, owned=False)


@dataclass
class Looks:
    """Memory, threads and open files of this process, from time to time.

    Attributes:
        rss_mb: resident set size.
    """

    rss_mb: list[float] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def look(self) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        threads, files = soak_faults.kept_open()
        self.rss_mb.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
        self.threads.append(threads)
        self.files.append(files)

    def summary(self) -> dict[str, Any]:
        """The looks, and by how much memory grew, in per cent of the first."""
        return {**asdict(self), "growth_percent": 100 * (max(self.rss_mb) / self.rss_mb[0] - 1)}


def endure(frames: int) -> dict[str, Any]:
    """Push frames through a source, a window and a stream while the clock runs through a week.

    Returns:
        `account` of the source; `balanced`; `predictions`; `wrong`: those that do not show the frames that they say;
        `restarted`: how often windows began again; the looks.
    """
    clock, looks, model = Clock(), Looks(), Instant()
    pictures = [np.full((*SIZE, 3), value, np.uint8) for value in range(250)]
    recording = max(1, frames // RECORDINGS)
    pause = (WEEK_S - frames / FPS) / (RECORDINGS - 1)
    began = time.monotonic()
    with mock.patch.object(live_source, "time", clock):
        source = FrameSource.pushed("camera", policy="all")
        stream = Stream(Scheduler(model, hop=4, max_age=None, now=clock.monotonic), source, owned=True)

        def push() -> None:
            for i in range(frames):
                clock.now += 1 / FPS + pause * (i > 0 and i % recording == 0)
                source.push(pictures[i % len(pictures)], clock.now)
                if (i + 1) * LOOKS % frames < LOOKS:
                    looks.look()
            until = time.monotonic() + 10.0
            while source.ledger.account().waiting > 1 and time.monotonic() < until:
                time.sleep(0.01)  # the newest frame waits for the one after it
            source.close()

        pushing = threading.Thread(target=push)
        pushing.start()
        predictions = wrong = restarted = 0
        last = 0.0
        for p in stream:
            predictions += 1
            restarted += p.restarted is not None
            wrong += not _ascends(np.array(p.logits, np.float32))
            last = p.end or 0.0
        pushing.join()
        stream.close()
    account = source.ledger.account()
    return {
        "frames": frames,
        "simulated_s": last,
        "wall_s": time.monotonic() - began,
        "account": asdict(account),
        "balanced": account.captured == frames == account.used + sum(account.dropped.values()) and not account.waiting,
        "predictions": predictions,
        "wrong": wrong,
        "restarted": restarted,
        **looks.summary(),
    }


def _ascends(greys: npt.NDArray[np.float32]) -> bool:
    """Whether a clip shows every second frame, as sampling 15 of 30 a second has to."""
    return bool((np.diff(greys) % 250 == 2).all())


def decode(frames: int, warm_up: int = WARM_UP) -> dict[str, Any]:
    """Take frames of a server that sends a film again and again.

    Returns:
        `account`, `balanced`, `predictions`, the looks.
    """
    pieces, looks = cut(film(soak_faults.times(40.0), (320, 240), gop=25)), Looks()

    def script(connection: Connection) -> None:
        connection.begin("video/mp2t")
        for i in range(2 * (warm_up + frames)):
            connection.send(pieces[i % len(pieces)])
            connection.pause(0.001)

    began, predictions = time.monotonic(), 0
    with (
        serving(script) as server,
        FrameSource(server.url(), capacity=4) as source,  # few, so that memory does not say how full its queue is
        Instant().stream(source) as stream,
    ):
        for _ in stream:
            predictions += 1
            captured = source.ledger.account().captured - warm_up
            if captured * LOOKS // frames > len(looks.rss_mb):
                looks.look()
            if captured >= frames:
                break
    return {
        **soak_faults.totals([source.ledger.account()]),
        "wall_s": time.monotonic() - began,
        "predictions": predictions,
        **looks.summary(),
    }


def answers(rt: edgetube.Runtime, count: int) -> dict[str, Any]:
    """Stream frames to the model, every window answered: looks, and percentiles of the time of a call.

    `processor_ms` are those of processor time of the thread that calls, which other work on the machine changes less.
    """
    pictures = enlarge(rt.bundle.golden()[0][0], SIZE)
    times, spent, looks = [], [], Looks()

    def endless() -> Iterator[tuple[float, npt.NDArray[np.uint8]]]:
        for frame in live.frames_of(pictures, FPS):
            yield frame.seconds, frame.pixels

    with rt.stream(endless(), hop=4) as stream:
        began = time.thread_time()
        for i, p in enumerate(stream, 1):
            times.append(p.latency_ms)
            spent.append(1e3 * (time.thread_time() - began))
            if i * LOOKS % count < LOOKS:
                looks.look()
            if i >= count:
                break
            began = time.thread_time()
    return {"answers": count, "latency_ms": _tail(times), "processor_ms": _tail(spent), **looks.summary()}


def _tail(values: Sequence[float]) -> dict[str, float]:
    p50, p99 = (float(v) for v in np.percentile(values[len(values) // 10 :], [50, 99]))
    return {"p50": p50, "p99": p99, "p99_to_p50": p99 / p50}


def together(rt: edgetube.Runtime) -> dict[str, int]:
    """Eight threads on one runtime: answers, and those that differ in any bit from one thread's."""
    contract = rt.contract
    shape = (CLIPS, 1, contract.frames, contract.height, contract.width, 3)
    clips = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    alone = [rt(clip) for clip in clips]
    differ: list[int] = []

    def call(seed: int) -> None:
        for i in np.random.default_rng(seed).permutation(CLIPS):
            differ.append(int(not np.array_equal(rt(clips[i]), alone[i])))

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"threads": THREADS, "answers": len(differ), "differ": sum(differ)}


# ----------------------------------------------------------------------------------------------------------------- main


def chosen(names: str) -> list[str]:
    """Names of faults.

    Raises:
        InputError: one that is none.
    """
    if names in ("all", "none"):
        return list(FAULTS) if names == "all" else []
    found = names.split(",")
    for name in found:
        if name not in FAULTS:
            raise InputError(f"there is no fault {name!r:.60}; expected all, none, or some of {', '.join(FAULTS)}")
    return found


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    columns = ["fault", "cause", "survived", "recovery s", "captured", "used", "dropped", "balanced", "said", "note"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        recovery = "–" if row.recovery_s is None else f"{row.recovery_s:.2f}"
        dropped = ", ".join(f"{cause} {count}" for cause, count in row.dropped.items()) or "–"
        balanced = "–" if row.balanced is None else "yes" if row.balanced else "NO"
        said = "; ".join((*row.restarted, *row.errors)) or "–"
        lines.append(
            f"| {row.name} | {row.cause} | {'yes' if row.survived else 'NO'} | {recovery} | {row.captured} | {row.used}"
            f" | {dropped} | {balanced} | {said} | {row.note or '–'} |"
        )
    return "\n".join(lines)


def passed(row: Row) -> bool:
    """Whether a fault was survived as it should be; one that was not run does not fail."""
    if row.note.startswith("not run"):
        return True
    quick = row.recovery_s is None or row.recovery_s < soak_faults.LIMIT_S
    return row.survived and row.balanced is not False and quick


def complaints(document: dict[str, Any]) -> list[str]:
    """What did not hold out; times are not judged here."""
    found = []
    for name in ("endurance", "decoded", "answers"):
        part = document.get(name, {})
        if not part.get("balanced", True):
            found.append(f"{name}: not every frame is accounted for")
        if part.get("wrong"):
            found.append(f"{name}: {part['wrong']} answers show other frames than they should")
        if part.get("growth_percent", 0.0) > GROWTH_PERCENT:
            found.append(f"{name}: memory grew by {part['growth_percent']:.1f} %")
        for what in ("threads", "files"):
            if len(set(part.get(what, ()))) > 1:
                found.append(f"{name}: {what} changed: {part[what]}")
    if differ := document["threads"]["differ"]:
        found.append(f"threads: {differ} answers differ")
    return found + [f"{row['name']}: not survived" for row in document["faults"] if not passed(Row(**row))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("out/demo.onnx-fp32"))
    parser.add_argument("--frames", type=int, default=100_000, help="of the endurance test; 0 leaves it out")
    parser.add_argument("--decoded", type=int, default=20_000, help="frames of the server; 0 leaves them out")
    parser.add_argument("--answers", type=int, default=5000, help="of the built-in model; 0 leaves them out")
    parser.add_argument("--faults", default="all", help="all, none, or names with commas")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    document: dict[str, Any] = {"machine": describe(), "bundle": args.bundle.name}
    rows: list[Row] = []
    try:
        names = chosen(args.faults)
        if args.frames:
            document["endurance"] = endure(args.frames)
        if args.decoded:
            document["decoded"] = decode(args.decoded)
        with edgetube.Runtime(args.bundle, threads=1) as rt:
            if args.answers:
                document["answers"] = answers(rt, args.answers)
            document["threads"] = together(rt)
            print(json.dumps(document, indent=1), flush=True)
            for name in names:
                rows.append(FAULTS[name](rt))
                print(f"{name}: {'ok' if passed(rows[-1]) else 'FAILED'}", file=sys.stderr, flush=True)
    except EdgetubeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    document["faults"] = [asdict(row) for row in rows]
    if args.json:
        atomic_write(args.json, json.dumps(document, indent=1) + "\n")
    print(table(rows))
    print(document["machine"])
    for complaint in complaints(document):
        print(complaint, file=sys.stderr)
    return 1 if complaints(document) else 0


if __name__ == "__main__":
    sys.exit(main())
