"""Another machine as this one sees it: one line to it, and edgetube at its other end."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from typing_extensions import Self

from edgetube import __version__, wire
from edgetube.bundle import Bundle, sha256
from edgetube.errors import DeviceError, DeviceWarning, EdgetubeError
from edgetube.progress import Progress, silent
from edgetube.remote import bootstrap, stage, store, transport

PATIENCE_S = 120.0
"""Seconds without a byte of the device, or taken by it, after which the line counts as cut.

A sign comes every few, see `edgetube.wire.BEAT_S`, but none while compiled code there keeps Python from running, or
while Python starts: the limit is far above what either should take. A transport with one of its own notices earlier.
"""

OLDEST = (3, 10)
"""The oldest Python that edgetube runs on."""

NAMES = ("python3", *(f"python3.{minor}" for minor in range(14, OLDEST[1] - 1, -1)))
"""What Python may be called there."""

ABSENT = "edgetube-no-python"
"""Begins a line about a Python there that cannot be used, and is the line behind them."""

LOADER = "import io,json;exec(json.loads(io.FileIO(0,closefd=False).readline()))"
"""Runs the first line of stdin; unbuffered, so that nothing behind it is read."""

NOISE = 1000
"""Most lines that a login may print before edgetube does."""

GRACE_S = 3.0
"""Seconds that the other side has to end when its line is closed."""

SIGNALLED = 128
"""A shell's exit code is this and the number of the signal that ended its program."""

SIGNALS = {
    9: "mostly because its memory was full; close other programs there, or give less at a time",
    11: "a fault in compiled code, mostly that of a vendor's runtime",
}
"""What the signal that ended edgetube there means."""


class Device:
    """An open line; a context manager. Nothing stays running there when it is closed, or when it breaks.

    Args:
        address: see `transport.parse`.
        backends: that will be used there; their packages are part of an environment that is made there.

    Attributes:
        name: the address, for messages.
        facts: what the machine says of itself, see `edgetube.remote.far.facts`.

    Raises:
        InputError: no such address.
        DeviceError: it cannot be reached, or cannot run edgetube; says why and what to do.
    """

    def __init__(self, address: str, backends: Sequence[str] = (), progress: Progress = silent) -> None:
        self._transport = transport.parse(address)
        self.name = self._transport.name
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `close`
        self._process: subprocess.Popen[bytes] | None = None
        self._closed, self._begun, self._given_up, self._silent = threading.Event(), False, False, False
        self._sent: dict[Path, str] = {}
        try:
            progress(f"connect to {self.name}", 0, 1)
            self._connect()
            progress(f"connect to {self.name}", 1, 1)
            threading.Thread(target=wire.beat_until, args=(self._closed, self._write), daemon=True).start()
            self._start(backends, progress)
            self.facts: dict[str, Any] = self.ask("facts")
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------------------------------------------- orders

    def ask(self, do: str, *pieces: bytes, progress: Progress | None = None, **request: Any) -> Any:
        """The result of an order of `edgetube.remote.stage` or `edgetube.remote.far`.

        Raises:
            EdgetubeError: what it raised there, or a DeviceError if the line broke; begins with the address.
        """
        return self.ask_bytes(do, *pieces, progress=progress, **request).result

    def ask_bytes(self, do: str, *pieces: bytes, progress: Progress | None = None, **request: Any) -> wire.Reply:
        """The same, for a result with bytes."""
        with self._named(EdgetubeError):
            return self._asker.ask_bytes(do, *pieces, progress=progress, **request)

    def end(self, of: Sequence[int]) -> None:
        """Close what has these numbers there; if the line is broken, it is closed already."""
        with suppress(DeviceError):
            self.ask("close", of=list(of))

    def send(self, bundle: Bundle, progress: Progress = silent) -> str:
        """Send a bundle, once a line; returns the path of its folder there."""
        if bundle.path not in self._sent:
            self._sent[bundle.path] = store.send_bundle(self.ask, bundle, progress)
        return self._sent[bundle.path]

    def send_file(self, path: Path, progress: Progress = silent) -> str:
        """Send one file; returns its path there."""
        return store.send_file(self.ask, path, progress)

    def send_clips(self, pieces: Sequence[bytes | memoryview]) -> list[str]:
        """Send the bytes of clips; returns their sha256. They are there at least until others are sent."""
        return store.send_clips(self.ask, pieces)

    # ----------------------------------------------------------------------------------------------------- the line

    def _connect(self) -> None:
        """Start the first program there, and hear what it says of the machine.

        A shell waits for it: an ssh whose program is ended by a signal does not say so, a shell does.
        """
        own = self._transport.python
        names = " ".join(map(shlex.quote, (own,) if own else (*NAMES, *self._transport.pythons)))
        check = f"import sys; sys.exit(sys.version_info < {OLDEST})"
        script = (
            f'for p in {names}; do if "$p" -c "{check}" 2>/dev/null; then "$p" -I -c "{LOADER}"; exit $?; fi; done; '
            f'set -f; for p in {names}; do case "$p" in /*) [ -e "$p" ];; *) command -v "$p" >/dev/null;; esac '
            f'&& echo {ABSENT} "$p": $("$p" -V 2>&1 && "$p" -c "{check}" 2>&1); done; echo {ABSENT}'
        )
        self._process = self._transport.run(script, self._words.fileno())
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        patience = wire.Patience(PATIENCE_S, self._fell_silent)
        self._read = wire.Reader(self._process.stdout, patience)
        self._write = wire.Writer(self._process.stdin, patience)
        self._asker = wire.Asker(self._read, self._write, self._why_ended)
        with suppress(OSError):  # it is dead, and `_hello` says so
            self._write.write(json.dumps(_first_program(self._transport.elsewhere)).encode() + b"\n")
        self._about = self._hello()

    def _hello(self) -> dict[str, Any]:
        """The facts of the first line; lines before it are a login's."""
        pythons = []
        for _ in range(NOISE):
            line = self._read.line().decode("utf-8", "replace")
            word, _, rest = line.strip().partition(" ")
            if word == stage.HELLO:
                self._begun = True
                facts: dict[str, Any] = json.loads(rest)
                if "error" in facts:
                    raise DeviceError(f"{self.name}: {facts['error']}")
                return facts
            if line.startswith('{"error"'):
                raise DeviceError(json.loads(line)["error"])
            if word == ABSENT and rest:
                pythons.append(rest)
            elif word == ABSENT:
                raise DeviceError(f"{self.name}: {_no_python(pythons, self._transport)}")
            if not line:
                raise self._why_ended()
        raise DeviceError(f"{self.name}: its login prints too much; the shell there has to be quiet without a terminal")

    def _start(self, backends: Sequence[str], progress: Progress) -> None:
        """Start edgetube there: the device's own if it is the same, else in an environment that is made for it."""
        with self._named(DeviceError):
            python = self._python(backends, progress)
            progress(f"start edgetube on {self.name}", 0, 1)
            with suppress(OSError, ValueError):  # it is dead, and `_hello` says so
                self._write.send({"do": "start", "python": python})
            there = self._hello()["protocol"]
            if there != stage.PROTOCOL:
                raise DeviceError(
                    f"edgetube there has protocol {there} of --on, here it is {stage.PROTOCOL}; {self._same_there}"
                )
            progress(f"start edgetube on {self.name}", 1, 1)

    def _python(self, backends: Sequence[str], progress: Progress) -> str:
        own = self._about["own"]
        given = self._transport.python
        if given and own is None:
            raise DeviceError(f"{given} has no edgetube; {self._same_there}")
        if given and own["version"] != __version__:
            raise DeviceError(f"{given} has edgetube {own['version']}, here it is {__version__}; {self._same_there}")
        if given or (own is not None and own["code"] == bootstrap.code()):
            executable: str = self._about["executable"]
            return executable
        if self._about["implementation"] != "cpython":
            raise DeviceError(
                f"its Python is {self._about['implementation']}, and packages are collected for CPython: install one "
                "there, or give ?python=PATH of a Python that has edgetube"
            )
        return self._environment(bootstrap.extras_of(backends), progress)

    def _environment(self, extras: Sequence[str], progress: Progress) -> str:
        """The Python of an environment with what can be had of some extras; a warning names the others."""
        extras = sorted({*extras} - bootstrap.left_out(self._about, extras).keys())
        key = bootstrap.environment(self._about, extras)
        python: str | None = self.ask("environment", key=key)
        if python is not None:
            return python
        wheels = bootstrap.collect(self._about, extras, progress)
        if wheels is None:
            for extra, reason in bootstrap.left_out(self._about, extras).items():
                warnings.warn(f"{self.name}: {extra} is left out: {reason}", DeviceWarning, stacklevel=2)
            return self._environment(extras, progress)
        files = {sha256(path): path for path in wheels.values()}
        store.send_files(self.ask, files, f"send packages to {self.name}", progress)
        progress(f"make an environment on {self.name}", 0, 1)
        python = self.ask("environment", key=key, wheels=list(files))
        progress(f"make an environment on {self.name}", 1, 1)
        assert python is not None
        return python

    @property
    def _same_there(self) -> str:
        """What to do if the user's own environment has another edgetube, or none."""
        return (
            f"`make wheel` here makes {bootstrap.WHEEL}: copy it there, and install it with "
            f"{self._transport.python} -m pip install; or leave out ?python= and an environment is made"
        )

    def _fell_silent(self) -> None:
        """Give the line up. What runs there hears nothing from now on either, and ends itself."""
        assert self._process is not None
        self._silent = True
        self._process.kill()

    def _why_ended(self) -> DeviceError:
        """Why the line is closed; in the words of the transport, or the last ones of the program there."""
        code = self._end()
        if self._silent:
            what = "the line was cut" if self._begun else "it does not answer"
            again = "; then run the command again; what was sent is kept there" if self._begun else ""
            return DeviceError(
                f"{self.name}: {what}, nothing came from there for {PATIENCE_S:g} s: {self._transport.silent}{again}"
            )
        if self._given_up:
            return DeviceError(
                f"{self.name}: the line did not end within {GRACE_S:g} s, and was given up: run the command again; "
                "what was sent is kept there"
            )
        self._words.seek(0)
        said = self._words.read().decode("utf-8", "replace")
        if (reason := self._transport.explain(code, said, begun=self._begun)) is not None:
            return DeviceError(f"{self.name}: {reason}")
        last = (said.strip().splitlines() or ["it said nothing"])[-1]
        number = code - SIGNALLED if code > SIGNALLED else -code
        if number in SIGNALS:
            return DeviceError(f"{self.name}: edgetube was ended there by signal {number}, {SIGNALS[number]} ({last})")
        return DeviceError(f"{self.name}: edgetube ended there with exit code {code}: {last}")

    def _end(self) -> int:
        """The exit code of the program here; it is killed if it does not end."""
        assert self._process is not None
        try:
            return self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._give_up()
            return self._process.wait()

    def _give_up(self) -> None:
        assert self._process is not None
        self._given_up = True
        self._process.kill()

    @contextmanager
    def _named(self, kind: type[EdgetubeError]) -> Iterator[None]:
        """A block whose errors of a kind begin with the device's address."""
        try:
            yield
        except kind as error:
            if str(error).startswith(f"{self.name}: "):
                raise
            raise type(error)(f"{self.name}: {error}") from error

    def close(self) -> None:
        """Close the line; what runs there ends."""
        self._closed.set()
        if self._process is not None:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            with suppress(OSError):
                self._process.stdin.close()
            self._end()
            self._process.stdout.close()
        self._words.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


FIRST = ("edgetube.errors", "edgetube.wire", "edgetube.remote.stage")
"""The modules of the first program, each after those that it imports."""


def _first_program(elsewhere: str) -> str:
    """The modules as one text that needs no files there.

    Args:
        elsewhere: see `transport.Transport`.
    """
    sources = {name: _source(importlib.import_module(name)) for name in FIRST}
    return (
        "import sys, types\n"
        "for name in ('edgetube', 'edgetube.remote'):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "    sys.modules[name].__path__ = []\n"
        f"for name, source in {sources!r}.items():\n"
        "    module = sys.modules[name] = types.ModuleType(name)\n"
        "    setattr(sys.modules[name.rpartition('.')[0]], name.rpartition('.')[2], module)\n"
        "    exec(compile(source, name, 'exec'), module.__dict__)\n"
        f"sys.modules['edgetube.remote.stage'].main({elsewhere!r})\n"
    )


def _source(module: ModuleType) -> str:
    assert module.__file__ is not None
    return Path(module.__file__).read_text("utf-8")


MOST = 300
"""Most characters of what a program says that are shown."""


def _no_python(found: Sequence[str], reached: transport.Transport) -> str:
    """Why no Python there can be used, and what to do.

    Args:
        found: those that are there, each as `NAME: WHAT IT SAYS`.
    """
    given, wanted = reached.python, f"edgetube needs Python {OLDEST[0]}.{OLDEST[1]} or newer"
    remedy = "give the path of one" if given else reached.install
    problem = f"{given} is no Python" if given else "there is no python3"
    for name, _, said in (text.partition(": ") for text in found):
        version = re.fullmatch(r"Python ((\d+)\.(\d+)\S*)", said)
        if version is None or (int(version[2]), int(version[3])) >= OLDEST:
            return f"{name} is there and does not start ({said[-MOST:] or 'it says nothing'}); {wanted}: {remedy}"
        problem = f"{'' if given else 'its '}{name} is Python {version[1]}"
        if not given:
            remedy = f"install one there (it may be called {NAMES[-1]}), or give ?python=PATH of one that has edgetube"
    return f"{problem}; {wanted}: {remedy}"
