"""Orders and results over a pair of pipes, against a process that serves them."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from edgetube import wire
from edgetube.errors import BackendError, EdgetubeError, InputError

SERVER = """
import ctypes, os, sys, time
from edgetube import wire
from edgetube.errors import InputError

def double(pieces=(), times=2):
    print("a vendor's words")
    return wire.Reply(len(pieces), tuple(piece * times for piece in pieces))

def count(to):
    for n in range(to):
        server.progress("count", n, to)
    return to

def refuse():
    raise InputError("no such thing")

class Special(InputError):
    pass

def refuse_specially():
    raise Special("no such thing, specially")

def full():
    raise OSError(28, "No space left on device", "/there")

patience, wire.BEAT_S = map(float, sys.argv[1:])
server = wire.Server(wire.Inbox(patience=patience or None), wire.private_stdout(), beats=wire.BEAT_S > 0)
server.serve({
    "sleep": lambda seconds: time.sleep(seconds), "hold": lambda seconds: ctypes.PyDLL(None).usleep(int(1e6 * seconds)),
    "double": double, "count": count, "refuse": refuse, "refuse_specially": refuse_specially, "full": full,
    "die": lambda: os._exit(7), "print": lambda: os.write(server._write._pipe.fileno(), b"Welcome\\n"),
})
"""


class Served:
    """A process that serves, and who asks it.

    Args:
        there: seconds of the process's patience; 0 for no limit.
        beat: seconds between two of its signs; 0 for none.
        here: seconds of the asker's patience.
    """

    def __init__(self, there: float = 0, beat: float = 0, here: float | None = None) -> None:
        self.silent = threading.Event()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(there), str(beat)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        patience = None if here is None else wire.Patience(here, self.give_up)
        self.write = wire.Writer(self.process.stdin, patience)
        self.asker = wire.Asker(wire.Reader(self.process.stdout, patience), self.write, self.why)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()

    def give_up(self) -> None:
        self.silent.set()
        self.process.kill()

    def why(self) -> EdgetubeError:
        return BackendError(f"ended with {self.process.wait()}")


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.end()


@pytest.fixture
def beating() -> Iterator[Served]:
    """One that says every tenth of a second that it is there, to an asker who waits 3 s for a sign."""
    made = Served(beat=0.1, here=3.0)
    assert made.asker.ask("count", to=1) == 1
    yield made
    made.end()


def test_a_result_and_its_bytes(served: Served) -> None:
    big = bytes(range(256)) * 20_000
    reply = served.asker.ask_bytes("double", b"ab\n", b"", big, times=3)
    assert reply.result == 3
    assert reply.pieces == (b"ab\nab\nab\n", b"", big * 3)
    assert served.asker.ask("double") == 0


def test_progress_comes_before_the_result(served: Served) -> None:
    seen = []
    assert served.asker.ask("count", progress=lambda *step: seen.append(step), to=3) == 3
    assert seen == [("count", 0, 3), ("count", 1, 3), ("count", 2, 3)]
    assert served.asker.ask("count", to=2) == 2  # nobody listens


def test_an_error_keeps_its_class_and_the_process_goes_on(served: Served) -> None:
    with pytest.raises(InputError, match=r"^no such thing$"):
        served.asker.ask("refuse")
    with pytest.raises(InputError, match=r"^no such thing, specially$"):
        served.asker.ask("refuse_specially")
    with pytest.raises(BackendError, match=r"^/there: No space left on device$"):
        served.asker.ask("full")
    assert served.asker.ask("count", to=1) == 1


def test_a_process_that_dies_says_why(served: Served) -> None:
    with pytest.raises(BackendError, match="ended with 7"):
        served.asker.ask("die")
    with pytest.raises(BackendError, match="ended with 7"):
        served.asker.ask("count", to=1)


def test_an_order_that_was_interrupted_does_not_answer_the_next_one(served: Served) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        served.asker.ask("count", progress=interrupt, to=3)
    for _ in range(2):
        with pytest.raises(BackendError, match="ended with 0"):
            served.asker.ask("count", to=1)


def test_a_line_that_is_closed(served: Served) -> None:
    served.end()
    with pytest.raises(BackendError, match="ended with -9"):
        served.asker.ask("count", to=1)


def test_what_something_prints_into_the_line(served: Served) -> None:
    with pytest.raises(BackendError, match=r"^not a message: b'Welcome\\n'; something there prints into the line$"):
        served.asker.ask("print")


def test_signs_are_no_orders(served: Served) -> None:
    for _ in range(3):
        served.write.beat()
    assert served.asker.ask("count", to=1) == 1


def test_it_ends_with_its_parent(served: Served) -> None:
    assert served.process.stdin is not None
    served.process.stdin.close()
    assert served.process.wait(10) == 0


@pytest.mark.slow
def test_it_ends_without_a_sign_and_lives_with_one() -> None:
    patience = 5.0
    made = Served(there=patience)
    try:
        end = time.monotonic() + 1.5 * patience
        while time.monotonic() < end:
            made.write.beat()
            time.sleep(0.25)
        assert made.process.poll() is None
        assert made.process.wait(60) == 0
    finally:
        made.end()


class TestSilence:
    """A side over whose line nothing has to be said is told from one that is gone."""

    @pytest.mark.slow
    def test_a_long_order_is_none(self, beating: Served) -> None:
        """Twice as long as the asker waits for a sign."""
        assert beating.asker.ask("sleep", seconds=6.0) is None
        assert not beating.silent.is_set()

    def test_what_was_said_while_nobody_asked_is_no_answer(self, beating: Served) -> None:
        time.sleep(0.5)
        assert beating.asker.ask("count", to=1) == 1

    def test_compiled_code_that_keeps_python_from_running_is_none_for_a_while(self, beating: Served) -> None:
        assert beating.asker.ask("hold", seconds=0.5) == 0
        assert not beating.silent.is_set()

    @pytest.mark.slow
    def test_compiled_code_that_keeps_python_from_running_for_longer_is_taken_for_one(self, beating: Served) -> None:
        """What the limit has to be far above of: nobody there can give a sign."""
        began = time.monotonic()
        with pytest.raises(BackendError, match="ended with -9"):
            beating.asker.ask("hold", seconds=60.0)
        assert 3.0 < time.monotonic() - began < 30.0
        assert beating.silent.is_set()

    @pytest.mark.slow
    @pytest.mark.parametrize("size", [1, 10_000_000])
    def test_a_process_that_stops(self, beating: Served, size: int) -> None:
        """It neither answers, nor takes what the pipe has no room for."""
        os.kill(beating.process.pid, signal.SIGSTOP)
        began = time.monotonic()
        for _ in range(2):
            with pytest.raises(BackendError, match="ended with -9"):
                beating.asker.ask("double", b"x" * size)
        assert 3.0 <= time.monotonic() - began < 30.0
        assert beating.silent.is_set()


@pytest.mark.parametrize(
    ("line", "rest", "error"),
    [
        (b'{"do": "x"}', b"", EOFError),
        (b"", b"", EOFError),
        (b'{"bytes": [4]}\n', b"abc", EOFError),
        (b"[]\n", b"", ValueError),
        (b"Welcome\n", b"", ValueError),
    ],
)
def test_what_is_no_message(line: bytes, rest: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        wire.parse(line, io.BytesIO(rest).read)


def test_what_is_sent_is_parsed() -> None:
    read, write = (os.fdopen(end, mode) for end, mode in zip(os.pipe(), ("rb", "wb"), strict=True))
    with read, write:
        writer = wire.Writer(write)
        writer.send({"do": "put"}, (b"\n\n", b"x"))
        writer.send({"do": "end"})
        reader = wire.Reader(read)
        assert wire.parse(reader.line(), reader.exactly) == ({"do": "put"}, (b"\n\n", b"x"))
        assert wire.parse(reader.line(), reader.exactly) == ({"do": "end"}, ())
