"""Latency. Candidates take turns in one run, so that other load on the machine slows all of them alike.

`interleave` times callables in this process; `measure` times bundles, each in its own process. The document
of `edgetube bench --json` and how to read it: `docs/benchmarking.md`.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np
from typing_extensions import Self

from edgetube import runtimes, wire
from edgetube.bench import conditions, energy, machine, peak
from edgetube.bundle import Bundle
from edgetube.errors import BackendError, EdgetubeError, InputError, MissingPackageError
from edgetube.live import window
from edgetube.precision import Precision
from edgetube.progress import Progress, silent


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one candidate: median and percentiles of `runs` calls, warm-up not counted."""

    p50_ms: float
    p10_ms: float
    p90_ms: float
    runs: int

    def to_json(self) -> dict[str, Any]:
        return {key: round(value, 4) for key, value in asdict(self).items()}


BLOCK = 3
"""Counted calls of one turn. A first call is not counted: the caches are the previous candidate's then, and its
threads may still be waiting for work on the same cores (measured: twice the time, call by call)."""


def interleave(
    candidates: Mapping[str, Callable[[], object]], *, seconds: float = 1.0, minimum: int = 5, warmup: int = 3
) -> dict[str, Timing]:
    """Time callables in turns of `BLOCK` calls, A B C A B C ..., for about `seconds` each, at least `minimum` turns."""
    for call in candidates.values():
        for _ in range(warmup):
            call()
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds * len(candidates)
    while time.perf_counter() < end or len(next(iter(taken.values()))) < minimum * BLOCK:
        for name, call in candidates.items():
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
"""Seconds of one turn of a candidate that has a process; at least `BLOCK` calls."""

TURNS = 6
"""Minimum number of turns: the fewest whose medians give a 95 % interval."""

NOISY = 0.05
"""A row is noisy if half of its median's interval is more than this share of the median."""

HOT = "the machine throttled meanwhile: these are times of a hot machine"
"""The note on times of a machine that throttled, see `edgetube.bench.conditions.throttled`."""

SCHEMA = 1


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        threads: CPU threads of a call, one row for each; None leaves them to the runtime.
        device: as the backends name it; None takes the bundle's own.
        seconds: of counted calls, each candidate.
        warm: seconds that the warm-up may take at most, each candidate.
        starts: how often each candidate is started, for the median of the cold start.
        camera_fps: also run every bundle behind a camera of that rate; None leaves it out.
        camera_size: (height, width) of a camera's frames, for the preprocessing and for `camera_fps`.
        hop: frames between two predictions of `camera_fps`; None takes a quarter of the clip.
        camera_seconds: how long it runs.
        cameras: how many such cameras share each bundle.
        reference: also time the PyTorch model that the bundles were made from.
        start_below: degrees Celsius that the machine has to cool to first; None starts at once.
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
    cameras: int = 1
    reference: bool = False
    start_below: float | None = None

    def __post_init__(self) -> None:
        for count in self.threads:
            runtimes.check_threads(count)
        for name in ("seconds", "warm", "starts", "camera_fps", "camera_seconds", "cameras", "hop", "start_below"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name.replace('_', '-')} is {value}; expected more than 0, and finite")


class Process:
    """A candidate in a fresh process, see `edgetube.bench.worker`; a context manager.

    Args:
        name: for messages.
        opener: `module:function` of a function(stage_timer, **given) -> `edgetube.bench.worker.Benchmarkable`.
        given: its arguments, JSON.
        threads: for libraries that take them from the environment.
        limit: seconds after which the process is ended, whatever it does; None for no limit.

    Attributes:
        stages: milliseconds of the cold start by stage: start (of the interpreter), import, load, first (inference).
        about: what the candidate says it is, see `Benchmarkable.about`.

    Raises:
        InputError, BundleError, BackendError, MissingPackageError: what the candidate raised when it opened.
    """

    def __init__(
        self,
        name: str,
        opener: str,
        given: Mapping[str, Any],
        threads: int | None = None,
        limit: float | None = None,
    ) -> None:
        self.name, self._limit = name, limit
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `close`
        order = {"opener": opener, "given": dict(given), "spawned": time.monotonic()}
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from edgetube.bench.worker import main; main()", json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            env=os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)}),
        )
        self._expired = threading.Event()
        self._alarm = threading.Timer(limit or 0, self._expire)
        self._alarm.daemon = True
        try:
            if limit is not None:
                self._alarm.start()
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._asker = wire.Asker(
                wire.Reader(self._process.stdout), wire.Writer(self._process.stdin), self._why_ended
            )
            opened = self._asker.answer().result
        except BaseException:
            self.close()
            raise
        self.stages: dict[str, float] = opened["stages"]
        self.about: dict[str, Any] = opened["about"]

    def ask(self, do: str, **request: Any) -> Any:
        """Send one of `edgetube.bench.worker.ORDERS`; returns its result.

        Raises:
            BackendError: the process died, or its time was up.
        """
        return self._asker.ask(do, **request)

    def _expire(self) -> None:
        self._expired.set()
        self._process.kill()

    def _why_ended(self) -> EdgetubeError:
        code = self._process.wait()
        if self._words.closed:
            return BackendError(f"{self.name}: its process was closed")
        if self._expired.is_set():
            return BackendError(f"{self.name}: not done after {self._limit:.0f} s, and ended")
        self._words.seek(0)
        last = self._words.read().decode("utf-8", "replace").strip().splitlines() or ["it said nothing"]
        return BackendError(f"{self.name}: its process ended with exit code {code}: {last[-1]}")

    def close(self) -> None:
        """End the process."""
        self._alarm.cancel()
        self._process.kill()
        self._process.communicate()
        self._words.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Candidate:
    """One entry of a benchmark: a name, and how `Process` opens it.

    Attributes:
        threads: stated in the row, and set in the environment of the process.
        batch: clips of one call.
        facts: further columns of the row.
        macs: multiply-accumulates of one clip, to compare with the peak of `precision`.
        untimed: why it is not timed on this machine; empty where it is.
        limit: see `Process`.
    """

    name: str
    opener: str
    given: Mapping[str, Any]
    threads: int | None = None
    batch: int = 1
    facts: Mapping[str, Any] = field(default_factory=dict)
    macs: int | None = None
    precision: Precision = Precision.FP32
    untimed: str = ""
    limit: float | None = None

    def start(self) -> Process:
        """Open it in a fresh process."""
        return Process(self.name, self.opener, self.given, self.threads, self.limit)


SIMULATED = "its processor is simulated on this machine, so times would say nothing about a device"
"""Why a bundle is not timed, see `runtimes.simulated`."""

OWN_THREADS = "its runtime chooses its threads itself: it is timed without --threads"
"""Why a bundle has no row with a number of threads, see `runtimes.takes_threads`."""


def measure(bundles: Sequence[Bundle], options: Options | None = None, progress: Progress = silent) -> dict[str, Any]:
    """The document of `edgetube bench --json` for bundles; `docs/benchmarking.md` explains its keys.

    A bundle whose runtime is not here, simulates its processor, or refuses the number of threads, has a row with its
    status and the reason, and no timings.

    Raises:
        InputError: no bundles, an option that a backend does not take, or a camera for a model that samples segments.
        BundleError: a bundle that is damaged.
    """
    options = options or Options()
    if not bundles:
        raise InputError("no bundles to time")
    if options.camera_fps is not None:
        for bundle in bundles:
            window.check(bundle.contract)
    candidates = [c for threads in options.threads for c in _candidates(bundles, threads, options)]
    if options.start_below is not None:
        conditions.known_celsius()
    best = peaks(options.threads)
    if options.start_below is not None:
        conditions.wait_below(options.start_below, progress)
    before = conditions.read()
    rows = run_interleaved(candidates, options, progress)
    after = conditions.read()
    for row in rows:
        _against_peak(row, best)
    return {
        "schema": SCHEMA,
        "machine": machine.describe(),
        "versions": machine.versions(),
        "options": asdict(options),
        "conditions": {"before": before, "after": after, "throttled": conditions.throttled(before, after)},
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


def _candidates(bundles: Sequence[Bundle], threads: int | None, options: Options) -> Iterator[Candidate]:
    """The PyTorch model if asked for, then the bundles, all with the same number of threads."""
    first = bundles[0]
    if options.reference:
        facts: dict[str, Any] = {
            "target": None,
            "precision": "fp32",
            "backend": "torch",
            "path": str(first.path),
            "size_mb": None,
            "sha256": None,
            "checkpoint": first.checkpoint.get("sha256"),
        }
        given: dict[str, Any] = {"path": str(first.path), "camera": options.camera_size}
        given["checkpoint"] = dict(first.checkpoint)
        worker = "edgetube.bench.worker:reference"
        yield Candidate("PyTorch", worker, given, threads, first.batch, facts, first.spec.macs())
    for bundle in bundles:
        facts = {key: str(getattr(bundle, key)) for key in ("target", "precision", "backend")}
        facts |= {"path": str(bundle.path), "size_mb": bundle.artifact_bytes / 1e6}
        facts |= {"sha256": bundle.sha256, "checkpoint": bundle.checkpoint.get("sha256")}
        # The status of the proof at export, used if the bundle is not timed here.
        refuses = threads is not None and not runtimes.takes_threads(bundle.backend, options.device)
        untimed = SIMULATED if runtimes.simulated(bundle.backend) else OWN_THREADS if refuses else ""
        facts["status"] = "built" if bundle.status == "executed" and not untimed else bundle.status
        given = {"path": str(bundle.path), "camera": options.camera_size}
        given |= {"threads": threads, "device": options.device}
        worker = "edgetube.bench.worker:bundle"
        macs, precision = bundle.spec.macs(), bundle.precision
        yield Candidate(bundle.name, worker, given, threads, bundle.batch, facts, macs, precision, untimed)


def run_interleaved(
    candidates: Sequence[Candidate], options: Options, progress: Progress = silent
) -> list[dict[str, Any]]:
    """Start and warm up every candidate, then time them in turns; one row each, in the given order."""
    rows: list[dict[str, Any]] = []
    running: dict[int, Process] = {}
    with ExitStack() as stack:
        for index, candidate in enumerate(candidates):
            progress("cold starts", index, len(candidates))
            row = _blank(candidate)
            rows.append(row)
            if candidate.untimed:
                row["reason"] = candidate.untimed
                continue
            try:
                starts = []
                for _ in range(options.starts - 1):
                    with candidate.start() as process:
                        starts.append(process.stages)
                running[index] = process = stack.enter_context(candidate.start())
                starts.append(process.stages)
            except (BackendError, MissingPackageError) as error:
                row["reason"] = str(error)
                continue
            row |= {"status": "executed", "runtime": process.about} | _cold(starts)
            warmth = process.ask("warm", seconds=options.warm)
            row |= {"peak_mb": warmth.pop("peak_mb"), "warmup": warmth}
        progress("cold starts", len(candidates), len(candidates))
        for index, timed in _turns(running, options, progress).items():
            rows[index] |= _statistics(timed, candidates[index].batch)
        for done, (index, process) in enumerate(running.items()):
            if options.camera_fps is not None:
                progress("camera", done, len(running))
                paced = {"fps": options.camera_fps, "seconds": options.camera_seconds, "cameras": options.cameras}
                row, size = rows[index], options.camera_size
                row["camera"] = process.ask("camera", hop=options.hop, size=size, **paced)
        if options.camera_fps is not None:
            progress("camera", len(running), len(running))
    return rows


@dataclass
class _Timed:
    """Times of one candidate: milliseconds of its calls by turn, and of the preprocessing of clips."""

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


def _blank(candidate: Candidate) -> dict[str, Any]:
    """A row with every key and no measurements."""
    row: dict[str, Any] = {"name": candidate.name, "target": None, "status": "built"}
    row |= {"reason": None, **candidate.facts, "threads": candidate.threads, "batch": candidate.batch}
    measured = (
        "p50_ms", "p50_low_ms", "p50_high_ms", "noise", "p10_ms", "p90_ms", "p99_ms", "runs", "turns", "throughput",
        "cold_start_ms", "cold_start", "warmup", "peak_mb", "preprocess_ms", "preprocess_share",
        "energy_mj", "gmacs_per_s", "peak_share", "camera", "runtime",
    )  # fmt: skip
    macs = None if candidate.macs is None else candidate.macs * candidate.batch
    return row | dict.fromkeys(measured) | {"macs": macs}


def _cold(starts: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The cold start with the median total, in total and by stage."""
    middle = sorted(starts, key=lambda stages: sum(stages.values()))[len(starts) // 2]
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
    """Notes under the table, one line each."""
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
    if document.get("conditions", {}).get("throttled"):
        lines.append(f"{HOT}; cool it, or give --start-below")
    if timed and (reason := document["energy"]["reason"]):
        lines.append(f"no energy: {reason}")
    for row in document["bundles"]:
        if reason := row["reason"]:
            lines.append(f"{row['name']} is not timed here ({row['status']}): {reason.removeprefix(row['name'] + ' ')}")
    return lines
