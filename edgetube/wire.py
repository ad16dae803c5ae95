"""Orders to another process and their results, over a pair of pipes: workers of `edgetube bench`, and devices.

A message is a line of JSON. If it carries bytes, its key `bytes` has the length of each piece, and the pieces follow
the line. An order is `{"do": name, ...}`. It is answered by any number of `{"progress": [stage, done, total]}` and then
by `{"result": ...}` or by `{"error": text, "kind": class of edgetube.errors}`. Empty lines only say that the other side
is still there.

Only the standard library is imported: a device runs this file before edgetube is there (`edgetube.remote.stage`).
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import IO, Any, cast

from edgetube import errors
from edgetube.errors import BackendError, EdgetubeError

Message = dict[str, Any]

LINE = 1 << 26
"""Longest line of JSON, in bytes; a longer one is not a message."""


@dataclass(frozen=True)
class Reply:
    """The result of an order, and the bytes that come with it."""

    result: Any = None
    pieces: tuple[bytes, ...] = ()


def send(stream: IO[bytes], message: Message, pieces: tuple[bytes, ...] = ()) -> None:
    """Write a message and flush it."""
    head = {**message, "bytes": [len(piece) for piece in pieces]} if pieces else message
    stream.write(json.dumps(head).encode() + b"\n")
    for piece in pieces:
        stream.write(piece)
    stream.flush()


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


# ---------------------------------------------------------------------------------------------------- who gives orders


class Asker:
    """Gives orders to a process and waits for their results; several threads may ask in turn.

    An order that is interrupted leaves its answer in the line, so the line is closed by the next one.

    Args:
        read, write: its stdout and stdin.
        ended: why it ended, asked when it did.
    """

    def __init__(self, read: IO[bytes], write: IO[bytes], ended: Callable[[], EdgetubeError]) -> None:
        self._read, self._write, self._ended = read, write, ended
        self._asking, self._writing = threading.Lock(), threading.Lock()
        self._lost = False

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
            with suppress(OSError, ValueError), self._writing:  # it is dead, and `answer` says so
                send(self._write, {"do": do, **request}, pieces)
            return self.answer(progress)

    def answer(self, progress: Callable[[str, int, int], None] | None = None) -> Reply:
        """The next result."""
        while True:
            try:
                line = self._read.readline(LINE)
            except (OSError, ValueError):  # it is closed
                raise self._ended() from None
            try:
                message, pieces = parse(line, self._read.read)
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

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """A block in which nothing is asked and no `beat` is sent."""
        with self._asking, self._writing:
            yield

    def beat(self) -> None:
        """Say that this side is still there, unless a message is being sent.

        Raises:
            OSError: the process is gone.
        """
        if self._writing.acquire(blocking=False):
            try:
                self._write.write(b"\n")
                self._write.flush()
            finally:
                self._writing.release()


# ------------------------------------------------------------------------------------------------- who carries them out


class Inbox:
    """Queues the messages of a pipe; ends this process when the pipe is closed, because the parent is gone.

    Args:
        handle: of the pipe.
        patience: seconds without a byte after which the other side counts as gone; None for no limit.
    """

    def __init__(self, handle: int = 0, patience: float | None = None) -> None:
        self._handle, self._patience, self._rest = handle, patience, bytearray()
        self._messages: SimpleQueue[tuple[Message, tuple[bytes, ...]]] = SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def get(self) -> tuple[Message, tuple[bytes, ...]]:
        """The next message and its pieces."""
        return self._messages.get()

    def _listen(self) -> None:
        try:
            while True:
                line = self._line()
                if line != b"\n":
                    self._messages.put(parse(line, self._exactly))
        except (EOFError, OSError, ValueError):
            os._exit(0)

    def _line(self) -> bytes:
        seen = 0
        while (end := self._rest.find(b"\n", seen)) < 0:
            seen = len(self._rest)
            if seen > LINE or not self._more():
                return b""
        line = bytes(self._rest[: end + 1])
        del self._rest[: end + 1]
        return line

    def _exactly(self, length: int) -> bytes:
        while len(self._rest) < length and self._more():
            pass
        piece = bytes(self._rest[:length])
        del self._rest[:length]
        return piece

    def _more(self) -> bool:
        """Read what is there. Unbuffered: a thread that waits with the lock of a buffer keeps Python from exiting."""
        if self._patience is not None and not select.select([self._handle], [], [], self._patience)[0]:
            return False
        found = os.read(self._handle, 1 << 20)
        self._rest += found
        return bool(found)


class Server:
    """Carries out the orders of an inbox.

    Args:
        write: where results go; nothing else may.
    """

    def __init__(self, inbox: Inbox, write: IO[bytes]) -> None:
        self._inbox, self._write = inbox, write
        self._writing = threading.Lock()

    def hello(self, word: str, facts: Message) -> None:
        """Say who serves here, in the first line; `word` tells it from what a login prints."""
        with self._writing:
            self._write.write(f"{word} {json.dumps(facts)}\n".encode())
            self._write.flush()

    def say(self, reply: Reply) -> None:
        """Send a result."""
        self._send({"result": reply.result}, reply.pieces)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Send progress of the order that is being carried out."""
        self._send({"progress": [stage, done, total]})

    def refuse(self, error: EdgetubeError) -> None:
        """Send an error, as the nearest class that `edgetube.errors` has."""
        kind = next(name for base in type(error).__mro__ if hasattr(errors, name := base.__name__))
        self._send({"error": str(error), "kind": kind})

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

    def _send(self, message: Message, pieces: tuple[bytes, ...] = ()) -> None:
        with self._writing:
            send(self._write, message, pieces)


def private_stdout() -> IO[bytes]:
    """The real stdout; from now on all other output goes to stderr."""
    sys.stdout.flush()
    private = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(private, "wb")
