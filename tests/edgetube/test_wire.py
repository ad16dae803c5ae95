"""Orders and results over a pair of pipes, against a process that serves them."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from edgetube import wire
from edgetube.errors import BackendError, EdgetubeError, InputError

SERVER = """
import os, sys, time
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

server = wire.Server(wire.Inbox(patience=float(sys.argv[1]) or None), wire.private_stdout())
server.serve({
    "double": double, "count": count, "refuse": refuse, "refuse_specially": refuse_specially, "full": full,
    "die": lambda: os._exit(7), "print": lambda: os.write(server._write.fileno(), b"Welcome\\n"),
})
"""


class Served:
    """A process that serves, and who asks it."""

    def __init__(self, patience: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(patience)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.asker = wire.Asker(self.process.stdout, self.process.stdin, self.why)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()

    def why(self) -> EdgetubeError:
        return BackendError(f"ended with {self.process.wait()}")


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served(0)
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
        served.asker.beat()
    assert served.asker.ask("count", to=1) == 1


def test_it_ends_with_its_parent(served: Served) -> None:
    assert served.process.stdin is not None
    served.process.stdin.close()
    assert served.process.wait(10) == 0


@pytest.mark.slow
def test_it_ends_without_a_sign_and_lives_with_one() -> None:
    patience = 5.0
    made = Served(patience)
    try:
        end = time.monotonic() + 1.5 * patience
        while time.monotonic() < end:
            made.asker.beat()
            time.sleep(0.25)
        assert made.process.poll() is None
        assert made.process.wait(60) == 0
    finally:
        made.end()


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
    stream = io.BytesIO()
    wire.send(stream, {"do": "put"}, (b"\n\n", b"x"))
    wire.send(stream, {"do": "end"})
    stream.seek(0)
    assert wire.parse(stream.readline(), stream.read) == ({"do": "put"}, (b"\n\n", b"x"))
    assert wire.parse(stream.readline(), stream.read) == ({"do": "end"}, ())
