"""How long does it take? Contestants take turns in one run, so that a busy machine is busy for all of them.

`interleave` does so with callables of this process; `measure` with bundles, each in a process of its own. The document
of `edgetube bench --json` and how to read it: `docs/benchmarking.md`.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np
from typing_extensions import Self

from edgetube import errors, runtimes
from edgetube.bench import energy, machine, peak
from edgetube.bundle import Bundle
from edgetube.errors import BackendError, EdgetubeError, InputError, MissingPackageError
from edgetube.progress import Progress, silent
from edgetube.targets import Precision


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contestant: median and percentiles of `runs` calls, warm-up not counted."""

    p50_ms: float
    p10_ms: float
    p90_ms: float
    runs: int

    def to_json(self) -> dict[str, Any]:
        return {key: round(value, 4) for key, value in asdict(self).items()}


BLOCK = 3
"""Counted calls of one turn. A first call is not counted: the caches are the previous contestant's then, and its
threads may still be waiting for work on the same cores (measured: twice the time, call by call)."""


def interleave(
    contestants: Mapping[str, Callable[[], object]], *, seconds: float = 1.0, minimum: int = 5, warmup: int = 3
) -> dict[str, Timing]:
    """Time callables in turns of `BLOCK` calls, A B C A B C ..., for about `seconds` each, at least `minimum` turns."""
    for call in contestants.values():
        for _ in range(warmup):
            call()
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    end = time.perf_counter() + seconds * len(contestants)
    while time.perf_counter() < end or len(next(iter(taken.values()))) < minimum * BLOCK:
        for name, call in contestants.items():
            call()
            for _ in range(BLOCK):
                start = time.perf_counter()
                call()
                taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: _timing(values) for name, values in taken.items()}


def _timing(values: list[float]) -> Timing:
    p10, p50, p90 = (float(v) for v in np.percentile(values, [10, 50, 90]))
    return Timing(p50, p10, p90, len(values))


# ------------------------------------------------------------------------------------------- in processes of their own

TURN = 0.25
"""Seconds of one turn of a contestant that has a process; at least `BLOCK` calls."""

TURNS = 6
"""At least: the smallest number of blocks whose medians say a 95 % interval."""

NOISY = 0.05
"""Half the interval of a median, relative to it, from which on a row is called noisy."""

SCHEMA = 1


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        threads: CPU threads of a call, one row for each; None leaves them to the runtime.
        device: as the backends name it; None takes the bundle's own.
        seconds: of counted calls, each contestant.
        warm: seconds that the warm-up may take at most, each contestant.
        starts: how often each contestant is started, for the median of the cold start.
        camera_fps: also run every bundle behind a camera of that rate; None leaves it out.
        camera_size: (height, width) of a camera's frames, for the preprocessing and for `camera_fps`.
        hop: frames between two predictions of `camera_fps`; None takes a quarter of the clip.
        camera_seconds: how long it runs.
        reference: also time the PyTorch model that the bundles were made from.
    """

    threads: tuple[int | None, ...] = (None,)
    device: str | None = None
    seconds: float = 5.0
    warm: float = 10.0
    starts: int = 3
    camera_fps: float | None = None
    camera_size: tuple[int, int] = (480, 640)
    hop: int | None = None
    camera_seconds: float = 10.0
    reference: bool = False

    def __post_init__(self) -> None:
        for count in self.threads:
            runtimes.check_threads(count)
        for name in ("seconds", "warm", "starts", "camera_fps", "camera_seconds", "hop"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name.replace('_', '-')} is {value}; expected more than 0, and finite")


class Process:
    """A contestant in a fresh process, see `edgetube.bench.worker`; a context manager.

    Args:
        name: for messages.
        opener: `module:function` of a function(lap, **given) -> `edgetube.bench.worker.Subject`.
        given: its arguments, JSON.
        threads: for libraries that take them from the environment.

    Attributes:
        laps: milliseconds of the cold start by stage: start (of the interpreter), import, load, first (inference).
        about: what the contestant says of itself.

    Raises:
        InputError, BundleError, BackendError, MissingPackageError: what the contestant raised when it opened.
    """

    def __init__(self, name: str, opener: str, given: Mapping[str, Any], threads: int | None = None) -> None:
        self.name = name
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `close`
        order = {"opener": opener, "given": dict(given), "spawned": time.monotonic()}
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from edgetube.bench.worker import main; main()", json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            env=os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)}),
        )
        try:
            opened = self._answer()
            if "error" in opened:
                raise cast("type[EdgetubeError]", getattr(errors, opened["kind"]))(opened["error"])
        except BaseException:
            self.close()
            raise
        self.laps: dict[str, float] = opened["laps"]
        self.about: dict[str, Any] = opened["about"]

    def ask(self, do: str, **request: Any) -> Any:
        """Have something of `edgetube.bench.worker.ORDERS` done; returns its answer.

        Raises:
            BackendError: the process died.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it is dead, and `_answer` says so
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        code = self._process.wait()
        self._words.seek(0)
        last = self._words.read().decode("utf-8", "replace").strip().splitlines() or ["it said nothing"]
        raise BackendError(f"{self.name}: its process ended with exit code {code}: {last[-1]}")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._words.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Contestant:
    """Who takes part: a name, and how `Process` opens it.

    Attributes:
        threads: what the row says, and what `Process` sets in the environment.
        batch: clips of one call.
        facts: what the row holds beside the measurements.
        macs: multiply-accumulates of one clip, to compare with the peak of `precision`.
    """

    name: str
    opener: str
    given: Mapping[str, Any]
    threads: int | None = None
    batch: int = 1
    facts: Mapping[str, Any] = field(default_factory=dict)
    macs: int | None = None
    precision: Precision = "fp32"

    def start(self) -> Process:
        """A process of it."""
        return Process(self.name, self.opener, self.given, self.threads)


def measure(bundles: Sequence[Bundle], options: Options | None = None, progress: Progress = silent) -> dict[str, Any]:
    """The document of `edgetube bench --json` for bundles; `docs/benchmarking.md` explains its keys.

    A bundle whose runtime is not here has a row with its status and the reason, and no timings.

    Raises:
        InputError: no bundles, or an option that a backend does not take.
        BundleError: a bundle that is damaged.
    """
    options = options or Options()
    if not bundles:
        raise InputError("no bundles to time")
    contestants = [c for threads in options.threads for c in _contestants(bundles, threads, options)]
    best = peaks(options.threads)
    rows = race(contestants, options, progress)
    for row in rows:
        _against_peak(row, best)
    return {
        "schema": SCHEMA,
        "machine": machine.describe(),
        "versions": machine.versions(),
        "options": asdict(options),
        "energy": energy.source(),
        "peak": best,
        "bundles": rows,
    }


def peaks(threads: Sequence[int | None]) -> list[dict[str, Any]]:
    """The lines of `edgetube.bench.peak` for each number of threads, in processes of their own."""
    found: list[dict[str, Any]] = []
    for count in dict.fromkeys(threads):
        with Process("peak", peak.OPENER, {"threads": count}, count) as process:
            found += process.about["peak"]
    return found


def _contestants(bundles: Sequence[Bundle], threads: int | None, options: Options) -> Iterator[Contestant]:
    """The PyTorch model if it is wanted, then the bundles, all with one number of threads."""
    first = bundles[0]
    if options.reference:
        facts: dict[str, Any] = {
            "target": None,
            "precision": "fp32",
            "backend": "torch",
            "path": str(first.path),
            "size_mb": None,
        }
        given: dict[str, Any] = {"path": str(first.path), "camera": options.camera_size}
        given["checkpoint"] = first.checkpoint["source"]
        worker = "edgetube.bench.worker:reference"
        yield Contestant("PyTorch", worker, given, threads, first.batch, facts, first.spec.macs())
    for bundle in bundles:
        facts = {key: getattr(bundle, key) for key in ("target", "precision", "backend")}
        facts |= {"path": str(bundle.path), "size_mb": bundle.artifact_bytes / 1e6}
        # What the proof reached where the bundle was made, in case that it cannot be run here.
        facts["status"] = "built" if bundle.status == "executed" else bundle.status
        given = {"path": str(bundle.path), "camera": options.camera_size}
        given |= {"threads": threads, "device": options.device}
        worker = "edgetube.bench.worker:bundle"
        macs, precision = bundle.spec.macs(), bundle.precision
        yield Contestant(bundle.name, worker, given, threads, bundle.batch, facts, macs, precision)


def race(contestants: Sequence[Contestant], options: Options, progress: Progress = silent) -> list[dict[str, Any]]:
    """Start every contestant, warm it up, and time all in turns; one row each, in their order."""
    rows: list[dict[str, Any]] = []
    running: dict[int, Process] = {}
    with ExitStack() as stack:
        for index, contestant in enumerate(contestants):
            progress("cold starts", index, len(contestants))
            row = _blank(contestant)
            rows.append(row)
            try:
                laps = []
                for _ in range(options.starts - 1):
                    with contestant.start() as process:
                        laps.append(process.laps)
                running[index] = process = stack.enter_context(contestant.start())
                laps.append(process.laps)
            except (BackendError, MissingPackageError) as error:
                row["reason"] = str(error)
                continue
            row |= {"status": "executed", "runtime": process.about} | _cold(laps)
            warmth = process.ask("warm", seconds=options.warm)
            row |= {"peak_mb": warmth.pop("peak_mb"), "warmup": warmth}
        progress("cold starts", len(contestants), len(contestants))
        for index, timed in _turns(running, options, progress).items():
            rows[index] |= _statistics(timed, contestants[index].batch)
        for done, (index, process) in enumerate(running.items()):
            if options.camera_fps is not None:
                progress("camera", done, len(running))
                paced = {"fps": options.camera_fps, "seconds": options.camera_seconds}
                row, size = rows[index], options.camera_size
                row["camera"] = process.ask("camera", hop=options.hop, size=size, **paced)
        if options.camera_fps is not None:
            progress("camera", len(running), len(running))
    return rows


@dataclass
class _Timed:
    """What the turns of one contestant gave: milliseconds of calls by turn, and of clips that were preprocessed."""

    blocks: list[list[float]] = field(default_factory=list)
    prepared: list[float] = field(default_factory=list)
    joules: float = 0.0
    calls: int = 0


def _turns(running: Mapping[int, Process], options: Options, progress: Progress) -> dict[int, _Timed]:
    timed = {index: _Timed() for index in running}
    meter = energy.meter()
    total = max(TURNS, math.ceil(options.seconds / TURN))
    end = time.perf_counter() + options.seconds * len(running)
    with meter:
        for turn in range(total if running else 0):
            progress("turns", turn, total)
            if turn >= TURNS and time.perf_counter() > end:
                break
            for index, process in running.items():
                of, before = timed[index], meter.joules()
                block = process.ask("turn", seconds=TURN, least=BLOCK)
                of.joules += meter.joules() - before
                of.blocks.append(block["ms"])
                of.calls += block["calls"]
                of.prepared += process.ask("prepare", least=BLOCK)["ms"]
    progress("turns", total, total)
    return {index: of for index, of in timed.items() if of.blocks}


def _blank(contestant: Contestant) -> dict[str, Any]:
    """A row with every key, nothing measured."""
    row: dict[str, Any] = {"name": contestant.name, "target": None, "status": "built"}
    row |= {"reason": None, **contestant.facts, "threads": contestant.threads, "batch": contestant.batch}
    measured = (
        "p50_ms", "p50_low_ms", "p50_high_ms", "noise", "p10_ms", "p90_ms", "p99_ms", "runs", "turns", "throughput",
        "cold_start_ms", "cold_start", "warmup", "peak_mb", "preprocess_ms", "preprocess_share",
        "energy_mj", "gmacs_per_s", "peak_share", "camera", "runtime",
    )  # fmt: skip
    macs = None if contestant.macs is None else contestant.macs * contestant.batch
    return row | dict.fromkeys(measured) | {"macs": macs}


def _cold(laps: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The start with the median total, whole and by stage."""
    middle = sorted(laps, key=lambda lap: sum(lap.values()))[len(laps) // 2]
    return {"cold_start_ms": sum(middle.values()), "cold_start": {f"{k}_ms": v for k, v in middle.items()}}


def _statistics(timed: _Timed, batch: int) -> dict[str, Any]:
    calls = np.concatenate(timed.blocks)
    p10, p50, p90, p99 = (float(v) for v in np.percentile(calls, [10, 50, 90, 99]))
    low, high = median_interval([float(np.median(block)) for block in timed.blocks])
    prepared = float(np.median(timed.prepared)) * batch if timed.prepared else None
    return {
        "p50_ms": p50,
        "p50_low_ms": low,
        "p50_high_ms": high,
        "noise": (high - low) / 2 / p50,
        "p10_ms": p10,
        "p90_ms": p90,
        "p99_ms": p99,
        "runs": len(calls),
        "turns": len(timed.blocks),
        "throughput": 1e3 * batch * len(calls) / float(calls.sum()),
        "preprocess_ms": prepared,
        "preprocess_share": None if prepared is None else prepared / (prepared + p50),
        "energy_mj": 1e3 * timed.joules / timed.calls / batch if timed.joules else None,
    }


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median that order statistics give, whatever the distribution (Conover, 1999, ch. 3.2).

    Fewer than six values have no such interval; their whole range is given.
    """
    n, ordered = len(values), sorted(values)
    tail, skipped = 0.0, 0
    for k in range(n // 2):
        tail += math.comb(n, k) / 2**n
        if tail > 0.025:
            break
        skipped = k
    return ordered[skipped], ordered[n - 1 - skipped]


def _against_peak(row: dict[str, Any], rates: Sequence[Mapping[str, Any]]) -> None:
    """Add the rate of a row's arithmetic and its share of the peak for its precision and threads."""
    if row["p50_ms"] is None or row["macs"] is None:
        return
    row["gmacs_per_s"] = row["macs"] / row["p50_ms"] / 1e6
    alike = (rate for rate in rates if all(rate[key] == row[key] for key in ("threads", "precision")))
    best = next((rate["gmacs_per_s"] for rate in alike), None)
    row["peak_share"] = None if best is None else row["gmacs_per_s"] / best


def notes(document: Mapping[str, Any]) -> list[str]:
    """What a reader of the table has to know beside its numbers, one line each."""
    lines = []
    timed = [row for row in document["bundles"] if row["p50_ms"] is not None]
    if noisy := [row for row in timed if row["noise"] > NOISY]:
        worst = max(noisy, key=lambda row: cast(float, row["noise"]))
        lines.append(
            f"the machine was not quiet: the median of {worst['name']} is known to ±{worst['noise']:.0%} only; "
            "smaller differences mean nothing"
        )
    if restless := [row["name"] for row in timed if not row["warmup"]["steady"]]:
        lines.append(f"{', '.join(restless)}: calls were not steady after {document['options']['warm']:g} s of warm-up")
    if timed and (reason := document["energy"]["reason"]):
        lines.append(f"no energy: {reason}")
    for row in document["bundles"]:
        if reason := row["reason"]:
            lines.append(f"{row['name']} is not timed here ({row['status']}): {reason.removeprefix(row['name'] + ' ')}")
    return lines
