"""Orders to another process and their results, over a pair of pipes: workers of `edgetube bench`, and devices.

A message is a line of JSON. If it carries bytes, its key `bytes` has the length of each piece, and the pieces follow
the line. An order is `{"do": name, ...}`. It is answered by any number of `{"progress": [stage, done, total]}` and then
by `{"result": ...}` or by `{"error": text, "kind": class of edgetube.errors}`. Empty lines only say that the other side
is still there: without them a line whose other end is gone cannot be told from one over which nothing has
to be said, as while an order is carried out.

Only the standard library is imported: a device runs this file before edgetube is there (`edgetube.remote.stage`).
"""

from __future__ import annotations

import io
import json
import os
import select
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import IO, Any, cast

from edgetube import errors
from edgetube.errors import BackendError, EdgetubeError

Message = dict[str, Any]

LINE = 1 << 26
"""Longest line of JSON, in bytes; a longer one is not a message."""

BEAT_S = 5.0
"""Seconds between two signs that a side is still there, see `beat_until`."""


@dataclass(frozen=True)
class Reply:
    """The result of an order, and the bytes that come with it."""

    result: Any = None
    pieces: tuple[bytes, ...] = ()


def parse(line: bytes, read: Callable[[int], bytes]) -> tuple[Message, tuple[bytes, ...]]:
    """The message of a line, and the pieces that follow it.

    Raises:
        EOFError: the stream ends within the message.
        ValueError: the line is not a message.
    """
    if not line.endswith(b"\n"):
        raise EOFError
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("a message is an object")
    pieces = []
    for length in message.pop("bytes", ()):
        pieces.append(read(length))
        if len(pieces[-1]) < length:
            raise EOFError
    return message, tuple(pieces)


# ------------------------------------------------------------------------------------------------------------ two pipes


@dataclass(frozen=True)
class Patience:
    """How long a side that has fallen silent is waited for.

    Attributes:
        seconds: without a byte that comes, or that is taken.
        over: called then, by the thread that waited.
    """

    seconds: float
    over: Callable[[], None]


class Reader:
    """Lines and bytes of a pipe, for one thread at a time.

    Nothing waits in Python's own buffer: a thread that waits with the lock of one keeps Python from exiting.

    Args:
        patience: with the other side; None waits for ever.
    """

    def __init__(self, pipe: IO[bytes], patience: Patience | None = None) -> None:
        self._pipe, self._patience, self._rest = pipe, patience, bytearray()

    def line(self) -> bytes:
        """The next line; without its end if the pipe ends before, nobody is there, or the line is longer than `LINE`.

        Raises:
            OSError, ValueError: the pipe was closed here.
        """
        seen = 0
        while (end := self._rest.find(b"\n", seen)) < 0:
            seen = len(self._rest)
            if seen > LINE or not self._more():
                return self._take(LINE)
        return self._take(end + 1)

    def exactly(self, length: int) -> bytes:
        """So many bytes; fewer if the pipe ends before, or nobody is there."""
        while len(self._rest) < length and self._more():
            pass
        return self._take(length)

    def _take(self, length: int) -> bytes:
        piece = bytes(self._rest[:length])
        del self._rest[:length]
        return piece

    def _more(self) -> bool:
        patience = self._patience
        if patience is not None and not select.select([self._pipe], [], [], patience.seconds)[0]:
            patience.over()
            return False
        found = os.read(self._pipe.fileno(), 1 << 20)
        self._rest += found
        return bool(found)


class Writer:
    """Writes messages to a pipe, each as a whole, from any thread.

    Args:
        pipe: nothing else may be written to it.
        patience: with the other side, which takes nothing; None waits for ever.
    """

    def __init__(self, pipe: IO[bytes], patience: Patience | None = None) -> None:
        self._pipe, self._patience = pipe, patience
        self._writing = threading.RLock()

    def send(self, message: Message, pieces: tuple[bytes, ...] = ()) -> None:
        """Write a message.

        Raises:
            OSError, ValueError: the pipe is closed, or nobody is there.
        """
        head = {**message, "bytes": [len(piece) for piece in pieces]} if pieces else message
        with self._writing:
            self.write(json.dumps(head).encode() + b"\n")
            for piece in pieces:
                self.write(piece)

    def write(self, data: bytes) -> None:
        """Write bytes that are no message; raises what `send` does."""
        with self._writing:
            left = memoryview(data)
            while left:
                left = left[self._some(left) :]

    def _some(self, data: memoryview) -> int:
        """Write some bytes; returns how many. What a pipe that can be written to takes at once is all that is tried."""
        patience = self._patience
        if patience is None:
            return os.write(self._pipe.fileno(), data)
        if not select.select([], [self._pipe], [], patience.seconds)[1]:
            patience.over()
            raise TimeoutError(f"nothing was taken for {patience.seconds:g} s")
        return os.write(self._pipe.fileno(), data[: select.PIPE_BUF])

    def beat(self) -> None:
        """Say that this side is still there, unless a message is being sent, which says the same; raises as `send`."""
        if self._writing.acquire(blocking=False):
            try:
                self.write(b"\n")
            finally:
                self._writing.release()

    def close(self) -> None:
        """Close the pipe."""
        self._pipe.close()


def beat_until(closed: threading.Event, writer: Writer) -> None:
    """Say every `BEAT_S` that this side is still there, until an event or the end of the line."""
    with suppress(OSError, ValueError):
        while not closed.wait(BEAT_S):
            writer.beat()


# ---------------------------------------------------------------------------------------------------- who gives orders


class Asker:
    """Gives orders to a process and waits for their results; several threads may ask in turn.

    An order that is interrupted leaves its answer in the line, so the line is closed by the next one.

    Args:
        read, write: its stdout and stdin.
        ended: why it ended, asked when it did.
    """

    def __init__(self, read: Reader, write: Writer, ended: Callable[[], EdgetubeError]) -> None:
        self._read, self._write, self._ended = read, write, ended
        self._asking, self._lost = threading.Lock(), False

    def ask(
        self, do: str, *pieces: bytes, progress: Callable[[str, int, int], None] | None = None, **request: Any
    ) -> Any:
        """The result of an order, without its bytes; see `ask_bytes`."""
        return self.ask_bytes(do, *pieces, progress=progress, **request).result

    def ask_bytes(
        self, do: str, *pieces: bytes, progress: Callable[[str, int, int], None] | None = None, **request: Any
    ) -> Reply:
        """Give an order; returns its result.

        Raises:
            EdgetubeError: the order failed there, or the process ended.
        """
        with self._asking:
            if self._lost:
                with suppress(OSError):
                    self._write.close()
                raise self._ended()
            self._lost = True
            with suppress(OSError, ValueError):  # it is dead, and `answer` says so
                self._write.send({"do": do, **request}, pieces)
            return self.answer(progress)

    def answer(self, progress: Callable[[str, int, int], None] | None = None) -> Reply:
        """The next result."""
        while True:
            try:
                line = self._read.line()
            except (OSError, ValueError):  # it is closed
                raise self._ended() from None
            if line == b"\n":
                continue
            try:
                message, pieces = parse(line, self._read.exactly)
            except (EOFError, OSError):
                raise self._ended() from None
            except ValueError as error:
                raise BackendError(f"not a message: {line[:200]!r}; something there prints into the line") from error
            if "progress" in message:
                if progress is not None:
                    progress(*message["progress"])
                continue
            self._lost = False
            if "error" in message:
                raise cast("type[EdgetubeError]", getattr(errors, message["kind"]))(message["error"])
            return Reply(message["result"], pieces)


# ------------------------------------------------------------------------------------------------- who carries them out


class Inbox:
    """Queues the messages of a pipe; ends this process when the pipe is closed, because the parent is gone.

    Args:
        handle: of the pipe.
        patience: seconds without a byte after which the other side counts as gone; None for no limit.
    """

    def __init__(self, handle: int = 0, patience: float | None = None) -> None:
        limit = None if patience is None else Patience(patience, partial(os._exit, 0))
        self._reader = Reader(io.FileIO(handle, closefd=False), limit)
        self._messages: SimpleQueue[tuple[Message, tuple[bytes, ...]]] = SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def get(self) -> tuple[Message, tuple[bytes, ...]]:
        """The next message and its pieces."""
        return self._messages.get()

    def _listen(self) -> None:
        try:
            while True:
                line = self._reader.line()
                if line != b"\n":
                    self._messages.put(parse(line, self._reader.exactly))
        except (EOFError, OSError, ValueError):
            os._exit(0)


class Server:
    """Carries out the orders of an inbox.

    Args:
        write: where results go; nothing else may.
        beats: whether the other side is told that this one is still there, also while an order is carried out. By a
            thread: not while an order holds the lock of Python's interpreter.
    """

    def __init__(self, inbox: Inbox, write: IO[bytes], *, beats: bool = False) -> None:
        self._inbox, self._write = inbox, Writer(write)
        if beats:
            threading.Thread(target=beat_until, args=(threading.Event(), self._write), daemon=True).start()

    def hello(self, word: str, facts: Message) -> None:
        """Say who serves here, in the first line; `word` tells it from what a login prints."""
        self._write.write(f"{word} {json.dumps(facts)}\n".encode())

    def say(self, reply: Reply) -> None:
        """Send a result."""
        self._write.send({"result": reply.result}, reply.pieces)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Send progress of the order that is being carried out."""
        self._write.send({"progress": [stage, done, total]})

    def refuse(self, error: EdgetubeError) -> None:
        """Send an error, as the nearest class that `edgetube.errors` has."""
        kind = next(name for base in type(error).__mro__ if hasattr(errors, name := base.__name__))
        self._write.send({"error": str(error), "kind": kind})

    def serve(self, orders: Mapping[str, Callable[..., Any]]) -> None:
        """Carry out orders until the other side is gone, which ends this process.

        An order is called with its keys, and with its bytes as `pieces` if it has any. It returns a `Reply`, or a
        result without bytes.
        """
        while True:
            request, pieces = self._inbox.get()
            order = orders[request.pop("do")]
            try:
                found = order(**request, pieces=pieces) if pieces else order(**request)
            except EdgetubeError as error:
                self.refuse(error)
            except (OSError, MemoryError) as error:
                self.refuse(BackendError(errors.of_system(error)))
            else:
                self.say(found if isinstance(found, Reply) else Reply(found))


def private_stdout() -> IO[bytes]:
    """The real stdout; from now on all other output goes to stderr."""
    sys.stdout.flush()
    private = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(private, "wb")
