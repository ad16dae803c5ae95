"""Faults of cameras, networks, apps and disks, each with the built-in model behind it: what `soak.py` runs.

Every fault is caused here: by a server on this machine that is killed, held up, or sends something else, by an app that
is slow, or by a model that fails. Recovery is measured from the moment at which the cause ends to the first prediction
whose newest frame came after it.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

import edgetube
from edgetube.bench.studies import rtsp_server
from edgetube.bench.studies.rtsp import Camera
from edgetube.bench.studies.servers import MJPEG, Connection, Server, cut, film, jpeg, part, serving, spliced
from edgetube.errors import BackendError, EdgetubeError
from edgetube.live.frame import Account
from edgetube.spec import Prediction

FPS, SECONDS = 25, 30.0
"""Of the films that servers send."""

PATIENCE_S = 15.0
"""Seconds after which a fault was not survived."""

LIMIT_S = 2.0
"""Seconds within which predictions have to come again."""

SIZE = (160, 120)
"""Width and height."""


class NotRun(Exception):
    """Something that this fault needs is not on this machine."""


@dataclass
class Row:
    """What became of one fault.

    Attributes:
        survived: it ended as it should: predictions came again or, where that is right, with one clear error.
        recovery_s: from the end of the cause to the first prediction of frames after it; None where there is none.
        silence_s: the longest time between two predictions, from the first one on.
        captured, used, dropped: the account of all its sources, once they are closed.
        balanced: captured = used + dropped, and nothing waits.
        restarted: what the predictions said, each once.
        errors: what the app was told, each once.
        note: what else was measured.
    """

    name: str
    cause: str
    survived: bool
    recovery_s: float | None = None
    silence_s: float | None = None
    captured: int = 0
    used: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    balanced: bool | None = None
    restarted: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    note: str = ""


Fault: TypeAlias = Callable[[edgetube.Runtime], Row]
FAULTS: dict[str, Fault] = {}
"""By name, in the order in which they run."""


def fault(name: str, cause: str) -> Callable[[Callable[[edgetube.Runtime], Row]], Fault]:
    """Register a fault: a function that returns a row without its name and cause."""

    def register(run: Callable[[edgetube.Runtime], Row]) -> Fault:
        @functools.wraps(run)
        def named(rt: edgetube.Runtime) -> Row:
            try:
                row = run(rt)
            except NotRun as missing:
                row = Row("", "", False, note=f"not run: {missing}")
            row.name, row.cause = name, cause
            return row

        FAULTS[name] = named
        return named

    return register


def totals(accounts: Sequence[Account]) -> dict[str, Any]:
    """The fields of a row that say where the frames of closed sources went."""
    dropped: Counter[str] = Counter()
    for account in accounts:
        dropped.update(account.dropped)
    balanced = all(
        account.waiting == 0
        and account.captured == account.used + sum(account.dropped.values())
        and min(account.used, *account.dropped.values(), 0) == 0
        for account in accounts
    )
    return {
        "captured": sum(account.captured for account in accounts),
        "used": sum(account.used for account in accounts),
        "dropped": {cause: count for cause, count in sorted(dropped.items()) if count},
        "balanced": balanced,
    }


class Watch:
    """The predictions of one source and when they came, taken by a thread of its own.

    Attributes:
        slow_s: seconds that the app takes for each prediction.
    """

    def __init__(self, rt: edgetube.Runtime, source: Any, **options: Any) -> None:
        self.source = edgetube.FrameSource(source, capacity=None, **options)
        self.stream = rt.stream(self.source)
        self.slow_s = 0.0
        self.found: list[tuple[float, Prediction]] = []
        self.errors: list[str] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for prediction in self.stream:
                with self._changed:
                    self.found.append((time.monotonic(), prediction))
                    self._changed.notify_all()
                time.sleep(self.slow_s)
        except EdgetubeError as error:
            self.errors.append(str(error))
        with self._changed:
            self._changed.notify_all()

    def wait(self, count: int) -> None:
        """Wait for so many more predictions."""
        with self._changed:
            wanted = len(self.found) + count
            self._changed.wait_for(lambda: len(self.found) >= wanted or bool(self.errors), PATIENCE_S)

    def after(self, moment: float, anew: bool = False) -> float | None:
        """Seconds from a moment to the first prediction whose newest frame came after it, with `anew` of a window that
        began again; None: there was none."""
        return since(self.found, self._changed, moment, anew)

    def failed(self) -> bool:
        """Wait until the stream has failed; whether it did."""
        self._thread.join(PATIENCE_S)
        return bool(self.errors)

    def row(self, survived: bool, recovery_s: float | None = None, note: str = "") -> Row:
        """Close everything and count."""
        self.stream.close()
        self.source.close()
        self._thread.join(PATIENCE_S)
        return Row(
            "", "", survived, recovery_s, silence(self.found), **totals([self.source.ledger.account()]),
            restarted=reasons(p for _, p in self.found), errors=tuple(dict.fromkeys(self.errors)), note=note,
        )  # fmt: skip

    def recovered(self, moment: float, note: str = "", anew: bool = False) -> Row:
        """The row of a cause that ended at a moment; `anew`: after which windows have to begin again."""
        seconds = self.after(moment, anew)
        self.wait(3)
        return self.row(seconds is not None and not self.errors, seconds, note)


def since(
    found: list[tuple[float, Prediction]], changed: threading.Condition, moment: float, anew: bool = False
) -> float | None:
    """See `Watch.after`."""

    def first() -> float | None:
        later = ((at - moment, p) for at, p in found if (p.captured_at or 0.0) >= moment)
        return next((seconds for seconds, p in later if p.restarted or not anew), None)

    with changed:
        changed.wait_for(lambda: first() is not None, PATIENCE_S)
        return first()


def reasons(predictions: Iterator[Prediction]) -> tuple[str, ...]:
    """Why windows began again, each once, in the order in which they were said."""
    return tuple(dict.fromkeys(p.restarted for p in predictions if p.restarted))


def silence(found: Sequence[tuple[float, Prediction]]) -> float | None:
    """Seconds of the longest time between two predictions."""
    return max((b - a for (a, _), (b, _) in pairwise(found)), default=None)


# -------------------------------------------------------------------------------------------------------------- servers


class Player:
    """A camera that sends MPEG-TS, one picture at a time, when each is due.

    Attributes:
        flowing: while it is cleared the camera goes on, and nothing of it is sent.
        sent: when each picture was sent, of the newest connection.
    """

    def __init__(self, data: bytes, fps: float = FPS, due: Callable[[float], float] = lambda second: second) -> None:
        self._pieces, self._fps, self._due = cut(data), fps, due
        self.flowing = threading.Event()
        self.flowing.set()
        self.sent: list[float] = []

    def __call__(self, connection: Connection) -> None:
        connection.begin("video/mp2t")
        began = time.monotonic()
        self.sent = []
        for i, piece in enumerate(self._pieces):
            connection.pause(max(0.0, began + self._due(i / self._fps) - time.monotonic()))
            if self.flowing.is_set():
                connection.send(piece)
            self.sent.append(time.monotonic())
        connection.pause(PATIENCE_S)

    def moment(self, number: int) -> float:
        """Wait until a picture is sent; when that was."""
        until = time.monotonic() + PATIENCE_S
        while len(self.sent) <= number and time.monotonic() < until:
            time.sleep(0.01)
        return self.sent[number]


def times(seconds: float, begin: float = 100.0, fps: float = FPS) -> list[float]:
    """Of the pictures of a film."""
    return [begin + i / fps for i in range(round(seconds * fps))]


def plain(fps: float = FPS) -> bytes:
    """A film of a camera without faults, with a key frame each second."""
    return film(times(SECONDS, fps=fps), SIZE, gop=round(fps))


class GStreamer:
    """GStreamer's RTSP server in a process of its own, as a camera.

    Raises:
        NotRun: there is none.
    """

    def __init__(self, *login: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._login = login
        self.start()

    def start(self) -> None:
        """Start it, and wait until it listens."""
        python = shutil.which("python3", path="/usr/bin") or sys.executable
        command = [python, rtsp_server.__file__, str(self.port), *self._login]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "ready":
            self.kill()
            raise NotRun(f"{python} has no GStreamer RTSP server, see {Path(rtsp_server.__file__).name}")

    def kill(self) -> None:
        """As kill -9 does."""
        self.process.kill()
        self.process.communicate()

    def url(self, login: str = "") -> str:
        return f"rtsp://{login}127.0.0.1:{self.port}/live"


@contextmanager
def gstreamer(*login: str) -> Iterator[GStreamer]:
    server = GStreamer(*login)
    try:
        yield server
    finally:
        server.kill()


# ------------------------------------------------------------------------------------------------- cameras and networks


@fault("killed", "HTTP server killed, started again after 1 s")
def _killed(rt: edgetube.Runtime) -> Row:
    with serving(Player(plain())) as server:
        watch = Watch(rt, server.url())
        return _kill(watch, server)


@fault("rtsp-killed", "RTSP server (GStreamer) killed with SIGKILL, started again after 1 s")
def _rtsp_killed(rt: edgetube.Runtime) -> Row:
    with gstreamer() as server:
        return _kill(Watch(rt, server.url()), server)


def _kill(watch: Watch, server: Server | GStreamer) -> Row:
    watch.wait(3)
    server.kill()
    time.sleep(1.0)
    server.start()
    return watch.recovered(time.monotonic(), anew=True)


@fault("bursts", "each key frame and the 450 ms after it arrive late and all at once, for 10 s")
def _bursts(rt: edgetube.Runtime) -> Row:
    def due(second: float) -> float:
        return max(second, int(second) + 0.45)

    with serving(Player(plain(), due=due)) as server:
        watch = Watch(rt, server.url())
        watch.wait(1)
        time.sleep(10.0)
        row = watch.row(not watch.errors)
        row.note = f"{len(watch.found)} predictions"
        row.survived = row.survived and not row.restarted
        return row


@fault("stall", "the network brings nothing for 3 s, then goes on with what the camera shows then")
def _stall(rt: edgetube.Runtime) -> Row:
    player = Player(plain())
    with serving(player) as server:
        watch = Watch(rt, server.url())
        watch.wait(3)
        player.flowing.clear()
        time.sleep(3.0)
        state = watch.source.state
        player.flowing.set()
        return watch.recovered(time.monotonic(), f"state meanwhile: {state}")


@fault("rtsp-stall", "RTSP server (GStreamer) stopped for 3 s with SIGSTOP")
def _rtsp_stall(rt: edgetube.Runtime) -> Row:
    import signal

    with gstreamer() as server:
        watch = Watch(rt, server.url())
        watch.wait(3)
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(3.0)
        state = watch.source.state
        server.process.send_signal(signal.SIGCONT)
        return watch.recovered(time.monotonic(), f"state meanwhile: {state}")


@fault("password", "RTSP (GStreamer): the URL has a wrong password; then it is opened with the right one")
def _password(rt: edgetube.Runtime) -> Row:
    with gstreamer("me", "sesame") as server:
        began = time.monotonic()
        refused = Watch(rt, server.url("me:hunter2@"))
        failed = refused.failed()
        told = time.monotonic() - began
        errors = refused.row(failed).errors
        watch, moment = Watch(rt, server.url("me:sesame@")), time.monotonic()
        row = watch.recovered(moment, f"refused after {told:.2f} s; the password is in no message")
        row.survived = row.survived and failed and not any("hunter2" in error for error in errors)
        row.errors = errors
        return row


@fault("size", "160x120 becomes 320x240 in the middle of the stream")
def _size(rt: edgetube.Runtime) -> Row:
    data = spliced(film(times(4.0), SIZE, gop=FPS), film(times(20.0, 104.0), (320, 240), gop=FPS))
    return _at(rt, Player(data), 4.0)


@fault("clock+1h", "the camera's clock jumps ahead by an hour (MPEG-TS)")
def _ahead(rt: edgetube.Runtime) -> Row:
    return _at(rt, Player(_jumps(3600.0)), 4.0)


@fault("clock-1h", "the camera's clock jumps back by an hour (MPEG-TS)")
def _back(rt: edgetube.Runtime) -> Row:
    return _at(rt, Player(_jumps(-3600.0)), 4.0)


def _jumps(seconds: float) -> bytes:
    begin = 5000.0
    return spliced(film(times(4.0, begin), SIZE, gop=FPS), film(times(20.0, begin + 4.0 + seconds), SIZE, gop=FPS))


@fault("clock-wraps", "the clock of 33 bits of MPEG-TS begins again at 0")
def _wraps(rt: edgetube.Runtime) -> Row:
    row = _at(rt, Player(film(times(24.0, 2**33 / 90_000 - 4.0), SIZE, gop=FPS)), 4.0, anew=False)
    row.survived = row.survived and not row.restarted
    return row


def _at(rt: edgetube.Runtime, player: Player, second: float, anew: bool = True) -> Row:
    """A cause that is one picture of the film."""
    with serving(player) as server:
        watch = Watch(rt, server.url())
        return watch.recovered(player.moment(round(second * FPS)), anew=anew)


@fault("rtsp-clock+1h", "the camera's clock jumps ahead by an hour (RTP, the server of this repository)")
def _rtsp_ahead(rt: edgetube.Runtime) -> Row:
    return _rtsp_jump(rt, 3600.0)


@fault("rtsp-clock-1h", "the camera's clock jumps back by an hour (RTP, the server of this repository)")
def _rtsp_back(rt: edgetube.Runtime) -> Row:
    return _rtsp_jump(rt, -3600.0)


def _rtsp_jump(rt: edgetube.Runtime, seconds: float) -> Row:
    camera = Camera(jump=(100, seconds), interval_s=1 / FPS)
    try:
        watch = Watch(rt, camera.url())
        watch.wait(1)
        until = time.monotonic() + PATIENCE_S
        while not (said := [p for _, p in watch.found if p.restarted]) and time.monotonic() < until:
            time.sleep(0.01)
        # The newest frame of a full window came a window after the jump.
        window_s = rt.contract.frames / rt.contract.rate(FPS)
        moment = (said[0].captured_at or 0.0) - window_s if said else time.monotonic()
        row = watch.recovered(moment, "from the first frame after the jump", anew=True)
        row.survived = row.survived and bool(said)
        return row
    finally:
        camera.kill()


@fault("rates", "three cameras of 15, 25 and 30 frames a second on one model, for 8 s")
def _rates(rt: edgetube.Runtime) -> Row:
    rates = (15.0, 25.0, 30.0)
    servers = [Server(Player(plain(fps), fps)) for fps in rates]
    sources = {
        f"{fps:g}": edgetube.FrameSource(s.url(), name=f"{fps:g}") for fps, s in zip(rates, servers, strict=True)
    }
    found: list[tuple[float, Prediction]] = []
    errors: list[str] = []
    try:
        with edgetube.Cameras(
            rt,
            sources,
            on_prediction=lambda p: found.append((time.monotonic(), p)),
            on_error=lambda name, error: errors.append(f"{name}: {error}"),
        ):
            time.sleep(8.0)
    finally:
        for source in sources.values():
            source.close()
        for server in servers:
            server.kill()
    counts = Counter(p.source for _, p in found)
    lowest, highest = min(counts[name] for name in sources), max(counts[name] for name in sources)
    return Row(
        "", "", bool(lowest) and not errors and highest <= 1.2 * lowest + 1,
        **totals([source.ledger.account() for source in sources.values()]),
        restarted=reasons(p for _, p in found), errors=tuple(dict.fromkeys(errors)),
        note="predictions: " + ", ".join(f"{counts[name]} at {name} fps" for name in sources),
    )  # fmt: skip


@fault("truncated", "MJPEG: every second picture is cut in half, for 3 s")
def _truncated(rt: edgetube.Runtime) -> Row:
    cutting = threading.Event()
    pictures = [jpeg(value, SIZE) for value in range(16, 216, 8)]

    def script(connection: Connection) -> None:
        connection.begin(MJPEG)
        for i in range(round(60 * FPS)):
            whole = pictures[i % len(pictures)]
            connection.send(part(whole[: len(whole) // 2] if cutting.is_set() and i % 2 else whole))
            connection.pause(1 / FPS)

    with serving(script) as server:
        watch = Watch(rt, server.url())
        watch.wait(3)
        cutting.set()
        time.sleep(3.0)
        cutting.clear()
        row = watch.recovered(time.monotonic())
        row.survived = row.survived and row.dropped.get("damaged", 0) > 0
        return row


# ------------------------------------------------------------------------------------------------------- app and model


@fault("slow-app", "the app takes three hops for each prediction, for 6 s")
def _slow_app(rt: edgetube.Runtime) -> Row:
    contract = rt.contract
    hop_s = max(1, contract.frames // 4) / contract.rate(FPS)
    with serving(Player(plain())) as server:
        watch = Watch(rt, server.url())
        watch.wait(3)
        watch.slow_s = 3 * hop_s
        time.sleep(6.0)
        slow = [p.age_ms or 0.0 for _, p in watch.found[4:]]
        watch.slow_s = 0.0
        return watch.recovered(time.monotonic(), f"oldest answer {max(slow, default=0.0):.0f} ms")


class Flaky:
    """A runtime that fails a number of times.

    Attributes:
        failures: how often it still fails.
    """

    def __init__(self, rt: edgetube.Runtime) -> None:
        self.contract, self.labels, self.batch, self.parallel_calls = rt.contract, rt.labels, rt.batch, 1
        self.failures = 0
        self.ended = 0.0
        self._rt = rt

    def __call__(self, clips: npt.ArrayLike) -> npt.NDArray[np.float32]:
        if self.failures:
            self.failures -= 1
            self.ended = time.monotonic()
            raise BackendError("the device was lost")
        return self._rt(clips)


@fault("model-fails", "the model's runtime raises in two calls, then works again")
def _model_fails(rt: edgetube.Runtime) -> Row:
    model, changed = Flaky(rt), threading.Condition()
    found: list[tuple[float, Prediction]] = []
    errors: list[str] = []

    def told(prediction: Prediction) -> None:
        with changed:
            found.append((time.monotonic(), prediction))
            changed.notify_all()

    with serving(Player(plain())) as server, edgetube.FrameSource(server.url(), name="gate") as source:
        sources, fail = {"gate": source}, lambda name, error: errors.append(f"{name}: {error}")
        with edgetube.Cameras(model, sources, on_prediction=told, on_error=fail):
            with changed:
                changed.wait_for(lambda: len(found) >= 3, PATIENCE_S)
            model.failures = 2
            until = time.monotonic() + PATIENCE_S
            while model.failures and time.monotonic() < until:
                time.sleep(0.01)
            recovery = since(found, changed, model.ended)
        source.close()
        account = source.ledger.account()
    return Row(
        "", "", recovery is not None and len(errors) == 2, recovery, silence(found), **totals([account]),
        restarted=reasons(p for _, p in found), errors=tuple(dict.fromkeys(errors)), note=f"told {len(errors)} times",
    )  # fmt: skip


FULL = """
mount -t tmpfs -o size=16k none "$1" && cp "$2" "$1/before.mp4" 2>/dev/null
"$3" -m edgetube run "$4" "$5" --save "$1/annotated.mp4" >/dev/null
echo "exit $?" >&2
ls -A "$1" >&2
"""


@fault("disk-full", "edgetube run --save onto a file system that is full (16 KB)")
def _disk_full(rt: edgetube.Runtime) -> Row:
    videos = sorted(Path(edgetube.__file__).parent.glob("demo/videos/*.mp4"))
    unshare = shutil.which("unshare")
    with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile() as kept:
        Path(kept.name).write_bytes(b"kept")
        apart = [unshare or "", "-m"] if os.geteuid() == 0 else [unshare or "", "-rm"]
        if unshare is None or subprocess.run([*apart, "true"], capture_output=True).returncode:
            raise NotRun("a file system of its own needs unshare and the right to use it")
        command = [
            *apart,
            "sh",
            "-c",
            FULL,
            "sh",
            folder,
            kept.name,
            sys.executable,
            str(rt.bundle.path),
            str(videos[0]),
        ]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    lines = ran.stderr.strip().splitlines()
    at = next((i for i, line in enumerate(lines) if line.startswith("exit ")), len(lines))
    said, left = lines[:at], lines[at + 1 :]
    code = lines[at] if at < len(lines) else "no exit code"
    errors = tuple(line.replace(folder, "FULL") for line in said if line.startswith("error"))
    survived = len(errors) == 1 and code not in ("exit 0", "no exit code") and left == ["before.mp4"]
    return Row("", "", survived, errors=errors, note=f"{code}; left behind: {', '.join(left) or 'nothing'}")


@fault("close", "20 streams of a camera, each closed at a random moment of its first 1.5 s by another thread")
def _close(rt: edgetube.Runtime) -> Row:
    draw, accounts, durations, errors = random.Random(0), [], [], []
    with serving(Player(plain())) as server:
        before = None
        for turn in range(21):
            watch = Watch(rt, server.url())
            time.sleep(draw.uniform(0.0, 1.5))
            began = time.monotonic()
            watch.stream.close()
            watch.source.close()
            durations.append(time.monotonic() - began)
            watch.row(True)
            accounts.append(watch.source.ledger.account())
            errors += watch.errors
            if not turn:  # threads of libraries that are started once
                time.sleep(1.0)
                before = kept_open()
    time.sleep(1.0)
    after = kept_open()
    clean = before is not None and after[0] <= before[0] and after[1] <= before[1]
    return Row(
        "", "", clean and not errors, **totals(accounts), errors=tuple(dict.fromkeys(errors)),
        note=f"close took {max(durations):.2f} s at most; threads and files {before} before, {after} after",
    )  # fmt: skip


def kept_open() -> tuple[int, int]:
    """Threads and open files of this process."""
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@fault("fork", "the process forks while a stream runs; the child uses it")
def _fork(rt: edgetube.Runtime) -> Row:
    with serving(Player(plain())) as server:
        watch = Watch(rt, server.url())
        watch.wait(3)
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a fork with threads, which is what is tried here
            child = os.fork()
        if not child:
            os.write(writing, _in_child(watch).encode())
            os._exit(0)
        moment = time.monotonic()
        os.close(writing)
        with os.fdopen(reading) as answer:
            said = answer.read()
        os.waitpid(child, 0)
        row = watch.recovered(moment, "the parent's stream goes on")
        row.survived, row.errors = row.survived and "before the process forked" in said, (said,)
        return row


def _in_child(watch: Watch) -> str:
    try:
        watch.source.read(1.0)
        return "the child read a frame"
    except EdgetubeError as error:
        watch.stream.close()
        return str(error)


@fault("spawn", "a runtime and a source are sent to a process that is spawned, while their stream runs here")
def _spawn(rt: edgetube.Runtime) -> Row:
    context = multiprocessing.get_context("spawn")
    with serving(Player(plain())) as server:
        watch = Watch(rt, server.url())
        watch.wait(3)
        answer: multiprocessing.SimpleQueue[Any] = context.SimpleQueue()
        process = context.Process(target=_spawned, args=(rt, watch.source, answer))
        moment = time.monotonic()
        process.start()
        process.join(4 * PATIENCE_S)
        count = 0 if answer.empty() else answer.get()
        return watch.row(count == 3 and not watch.errors, watch.after(moment), f"{count} predictions of the child")


def _spawned(rt: edgetube.Runtime, source: edgetube.FrameSource, answer: Any) -> None:
    with rt, source, rt.stream(source) as stream:
        answer.put(sum(1 for _, _ in zip(range(3), stream, strict=False)))
