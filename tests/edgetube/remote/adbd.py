"""The device's side of adb, for shells and `push`, in the place of Android's `adbd`: the real client is tested with it.

It speaks the protocol over TCP, without authorisation and encryption, and the shell protocol (version 2) in its
streams, as AOSP's `protocol.txt`, `shell_protocol.h` and `SYNC.TXT` have them. Commands run in this machine's shell,
without a terminal, and files come where they are pushed to.

    python -m tests.edgetube.remote.adbd HOST

serves at an address of this machine, says its port, and ends with its stdin.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

VERSION, MOST = 0x01000001, 1 << 18
"""Of the protocol, without checksums; bytes of a message."""

STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)
"""Kinds of packets in a shell's stream."""


class Adbd:
    """A device at a port of this machine, until it is closed.

    Args:
        features: that it says it has.
    """

    def __init__(self, features: str = "shell_v2,cmd", host: str = "127.0.0.1") -> None:
        self._features = features
        self._server = socket.create_server((host, 0))
        self.port: int = self._server.getsockname()[1]
        self._lines: list[socket.socket] = []
        self.shells: list[subprocess.Popen[bytes]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                line, _ = self._server.accept()
                self._lines.append(line)
                threading.Thread(target=_Line(line, self._features, self.shells).serve, daemon=True).start()

    def unplug(self) -> None:
        """Be gone: no line is left, and none can be made."""
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for line in self._lines:
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
            line.close()


class _Line:
    """A connection of adb's server; its streams are shells."""

    def __init__(self, line: socket.socket, features: str, shells: list[subprocess.Popen[bytes]]) -> None:
        self._line, self._features, self._shells = line, features, shells
        self._lock = threading.Lock()
        self._streams: dict[int, _Stream] = {}

    def serve(self) -> None:
        with suppress(OSError, EOFError):
            while True:
                name, theirs, mine, size, _, _ = struct.unpack("<4s5I", self._read(24))
                self._take(name.decode(), theirs, mine, self._read(size))
        for stream in list(self._streams.values()):
            stream.end()

    def _take(self, name: str, theirs: int, mine: int, data: bytes) -> None:
        if name == "CNXN":
            self.send("CNXN", VERSION, MOST, f"device::ro.product.name=test;features={self._features}\0".encode())
        elif name == "OPEN":
            service, _, script = data.rstrip(b"\0").decode().partition(":")
            mine = len(self._streams) + 1

            def send(name: str, data: bytes = b"") -> None:
                self.send(name, mine, theirs, data)

            if service == "sync":
                send("OKAY")
                self._streams[mine] = _Files(send)
            elif service.startswith("shell,v2"):
                send("OKAY")
                self._streams[mine] = shell = _Shell(script, send)
                self._shells.append(shell.process)
            else:
                self.send("CLSE", 0, theirs)
        elif name == "WRTE":
            self._streams[mine].given.put(data)
        elif name == "OKAY" and mine in self._streams:
            self._streams[mine].written.put(None)
        elif name == "CLSE" and mine in self._streams:
            self._streams[mine].end()

    def send(self, name: str, mine: int, theirs: int, data: bytes = b"") -> None:
        command = int.from_bytes(name.encode(), "little")
        head = struct.pack("<6I", command, mine, theirs, len(data), 0, command ^ 0xFFFFFFFF)
        with self._lock:
            self._line.sendall(head + data)

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            if not (some := self._line.recv(size - len(data))):
                raise EOFError
            data += some
        return data


class _Stream:
    """A stream of a line.

    Attributes:
        given: what came from the other side; None at the end.
        written: an item for each message that arrived there.
    """

    def __init__(self, send: Callable[..., None]) -> None:
        self._send, self._lock = send, threading.Lock()
        self.given: SimpleQueue[bytes | None] = SimpleQueue()
        self.written: SimpleQueue[None] = SimpleQueue()

    def _write(self, data: bytes) -> None:
        """The next is written when the last has arrived."""
        with self._lock:
            self._send("WRTE", data)
            self.written.get()

    def end(self) -> None:
        """The other side is gone."""
        self.given.put(None)
        self.written.put(None)


class _Files(_Stream):
    """What is pushed, by the first version of the sync protocol."""

    def __init__(self, send: Callable[..., None]) -> None:
        super().__init__(send)
        self._rest = b""
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                name, size = struct.unpack("<4sI", self._read(8))
                if name == b"QUIT":
                    self._send("CLSE")
                    return
                asked = self._read(size).decode()
                if name == b"STAT":
                    self._write(struct.pack("<4s3I", b"STAT", *self._about(Path(asked))))
                elif name == b"SEND":
                    self._save(asked)

    @staticmethod
    def _about(path: Path) -> tuple[int, int, int]:
        if not path.exists():
            return 0, 0, 0
        found = path.stat()
        return found.st_mode, found.st_size, int(found.st_mtime)

    def _save(self, asked: str) -> None:
        path, _, mode = asked.rpartition(",")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("wb") as file:
            while True:
                name, size = struct.unpack("<4sI", self._read(8))
                if name == b"DONE":
                    break
                file.write(self._read(size))
        Path(path).chmod(int(mode) & 0o777)
        self._write(struct.pack("<4sI", b"OKAY", 0))

    def _read(self, size: int) -> bytes:
        while len(self._rest) < size:
            if (data := self.given.get()) is None:
                raise EOFError
            self._send("OKAY")
            self._rest += data
        data, self._rest = self._rest[:size], self._rest[size:]
        return data


class _Shell(_Stream):
    """A shell whose stdin, stdout and stderr are packets of a stream."""

    def __init__(self, script: str, send: Callable[..., None]) -> None:
        super().__init__(send)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(["sh", "-c", script], stdin=pipe, stdout=pipe, stderr=pipe)
        threading.Thread(target=self._run, daemon=True).start()
        threading.Thread(target=self._feed, daemon=True).start()

    def _run(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        ends = ((STDOUT, self.process.stdout.fileno()), (STDERR, self.process.stderr.fileno()))
        copies = [threading.Thread(target=self._copy, args=end, daemon=True) for end in ends]
        for copy in copies:
            copy.start()
        for copy in copies:
            copy.join()
        for end in (self.process.stdout, self.process.stderr):
            end.close()
        code = self.process.wait()
        with suppress(OSError):
            self._packet(EXIT, bytes([128 - code if code < 0 else code]))
            self._send("CLSE")

    def _copy(self, kind: int, source: int) -> None:
        with suppress(OSError):
            while data := os.read(source, 1 << 15):
                self._packet(kind, data)

    def _packet(self, kind: int, data: bytes) -> None:
        self._write(struct.pack("<BI", kind, len(data)) + data)

    def _feed(self) -> None:
        """Hand on packets of the other side, of which the last may be cut; the next come when it has taken these."""
        assert self.process.stdin is not None
        rest = b""
        while (data := self.given.get()) is not None:
            rest += data
            while len(rest) >= 5 and len(rest) >= 5 + struct.unpack_from("<BI", rest)[1]:
                kind, size = struct.unpack_from("<BI", rest)
                packet, rest = rest[5 : 5 + size], rest[5 + size :]
                with suppress(OSError, ValueError):
                    if kind == STDIN:
                        self.process.stdin.write(packet)
                        self.process.stdin.flush()
                    elif kind == CLOSE_STDIN:
                        self.process.stdin.close()
            with suppress(OSError):
                self._send("OKAY")
        with suppress(OSError):
            self.process.stdin.close()

    def end(self) -> None:
        """The other side is gone: the program here gets no more, and a hang-up."""
        super().end()
        with suppress(OSError):
            self.process.send_signal(signal.SIGHUP)


if __name__ == "__main__":
    print(Adbd(host=sys.argv[1]).port, flush=True)
    sys.stdin.read()
