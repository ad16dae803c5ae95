"""Cameras that fail as they are told to: HTTP servers on this machine, for the soak and for tests."""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import av
import numpy as np

Script = Callable[["Connection"], None]
"""Answers one request."""


class Connection:
    """One request, and what is sent as its answer. Sending raises OSError when the other side is gone."""

    def __init__(self, handler: BaseHTTPRequestHandler, stopped: threading.Event) -> None:
        self.path = handler.path
        self.stopped = stopped
        self._handler = handler

    def begin(self, kind: str, length: int | None = None, status: int = 200, **headers: str) -> None:
        self._handler.send_response(status)
        self._handler.send_header("Content-Type", kind)
        if length is not None:
            self._handler.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self._handler.send_header(name.replace("_", "-"), value)
        self._handler.end_headers()

    def send(self, data: bytes) -> None:
        self._handler.wfile.write(data)

    def pause(self, seconds: float) -> None:
        """Wait; raises OSError if the server is stopped."""
        if self.stopped.wait(seconds):
            raise OSError("the server was stopped")


class Server:
    """A server on a port of its own, which can be killed and started again there."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests = 0
        self._port = 0
        self._running: ThreadingHTTPServer | None = None
        self.start()

    def start(self) -> None:
        stopped = threading.Event()
        connections: list[socket.socket] = []
        self._stopped, self._connections = stopped, connections
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.requests += 1
                connections.append(self.connection)
                with suppress(OSError):  # the other side is gone, or the server is
                    owner.script(Connection(self, stopped))
                self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, *_: Any) -> None:
                pass

        self._running = Quiet(("127.0.0.1", self._port), Handler)
        self._port = self._running.server_address[1]
        threading.Thread(target=self._running.serve_forever, args=(0.01,), daemon=True).start()

    def kill(self) -> None:
        """No connection is left, and new ones are refused."""
        if self._running is not None:
            self._stopped.set()
            self._running.shutdown()
            self._running.server_close()
            for connection in self._connections:
                with suppress(OSError):  # it ended by itself
                    connection.shutdown(socket.SHUT_RDWR)
            self._running = None

    def url(self, path: str = "video", user: str = "") -> str:
        return f"http://{user}127.0.0.1:{self._port}/{path}"


@contextmanager
def serving(script: Script) -> Iterator[Server]:
    server = Server(script)
    try:
        yield server
    finally:
        server.kill()


def jpeg(value: int, size: tuple[int, int] = (64, 48)) -> bytes:
    """A picture of one grey."""
    from PIL import Image

    found = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(found, "jpeg", quality=95)
    return found.getvalue()


def part(picture: bytes) -> bytes:
    """A picture as a part of an MJPEG stream."""
    return b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n" % (len(picture), picture)


MJPEG = "multipart/x-mixed-replace; boundary=frame"


def film(
    times: Sequence[float], size: tuple[int, int] = (64, 48), form: str = "mpegts", first: int = 0, gop: int = 1
) -> bytes:
    """H.264 frames at times in seconds, number i of grey 16 + first + i, and from 16 on again after 200 of them; every
    `gop`-th is a key frame."""
    found, tick = io.BytesIO(), Fraction(1, 90000)
    with av.open(found, "w", format=form) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = tick
        stream.options = {"g": str(gop), "tune": "zerolatency", "preset": "ultrafast"}
        for i, second in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 16 + (first + i) % 200, np.uint8))
            frame.pts, frame.time_base = round(second / tick), tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return found.getvalue()


PACKET = 188


def spliced(*parts: bytes) -> bytes:
    """MPEG-TS one after the other, with counters of packets that go on, as a camera sends it whose clock jumps."""
    data = bytearray(b"".join(parts))
    counts: dict[int, int] = {}
    for at in range(0, len(data), PACKET):
        stream = int.from_bytes(data[at + 1 : at + 3], "big") & 0x1FFF
        if data[at + 3] & 0x10:  # it has a payload
            counts[stream] = (counts.get(stream, -1) + 1) % 16
            data[at + 3] = data[at + 3] & 0xF0 | counts[stream]
    return bytes(data)


def starts_frame(packet: bytes) -> bool:
    """Whether a packet of a film begins a picture: of stream 0x100, where FFmpeg puts the first."""
    return bool(packet[1] & 0x40) and int.from_bytes(packet[1:3], "big") & 0x1FFF == 0x100


def cut(data: bytes) -> list[bytes]:
    """MPEG-TS in pieces of one picture each."""
    begins = [at for at in range(PACKET, len(data), PACKET) if starts_frame(data[at : at + PACKET])][1:]
    return [data[a:b] for a, b in pairwise([0, *begins, len(data)])]


def grey(pixels: np.ndarray) -> int:
    """The value of a picture of one grey, as it was encoded."""
    return int(np.median(pixels))
