"""A camera that fails as it is told to: an RTSP server on this machine, with H.264 over the same TCP connection."""

from __future__ import annotations

import base64
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from typing import BinaryIO

import av
import numpy as np

TICKS = 90_000
SDP = """v=0\r
o=- 0 0 IN IP4 127.0.0.1\r
s=camera\r
c=IN IP4 0.0.0.0\r
t=0 0\r
m=video 0 RTP/AVP 96\r
a=rtpmap:96 H264/90000\r
a=fmtp:96 packetization-mode=1\r
a=control:track0\r
"""


def pictures(count: int, size: tuple[int, int] = (64, 48)) -> list[list[bytes]]:
    """The NAL units of key frames of one grey each: 16, 17, ..."""
    codec = av.CodecContext.create("libx264", "w")
    codec.width, codec.height, codec.pix_fmt = *size, "yuv420p"
    codec.time_base = Fraction(1, 25)
    codec.options = {"g": "1", "tune": "zerolatency", "preset": "ultrafast"}
    found = []
    for i in range(count):
        frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 16 + i, np.uint8))
        frame.pts, frame.time_base = i, codec.time_base
        data = b"".join(bytes(packet) for packet in codec.encode(frame))
        found.append([unit for unit in data.replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1") if unit])
    return found


class Camera:
    """Sends 25 frames of camera time a second after each PLAY.

    Args:
        user: "name:password" that it asks for.
        jump: (number of a frame, seconds by which its clock jumps there).
        interval_s: seconds between two frames; less than 0.04 is faster than it was filmed.
    """

    def __init__(
        self, user: str | None = None, jump: tuple[int, float] | None = None, interval_s: float = 0.01
    ) -> None:
        self.user, self.jump, self.interval_s = user, jump, interval_s
        self.requests = self._port = 0
        self._pictures = pictures(100)
        self.start()

    def start(self) -> None:
        self._stopped = threading.Event()
        self._connections: list[socket.socket] = []
        self._listening = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def kill(self) -> None:
        self._stopped.set()
        for open_socket in (self._listening, *self._connections):
            with suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)
            open_socket.close()

    def url(self, user: str = "") -> str:
        return f"rtsp://{user}127.0.0.1:{self._port}/live"

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                self._connections.append(connection)
                threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        with suppress(OSError, ValueError), connection.makefile("rb") as said:
            while request := said.readline().decode():
                self._answer(connection, request.split()[0], self._headers(said))

    def _headers(self, said: BinaryIO) -> dict[str, str]:
        found = {}
        while line := said.readline().decode().strip():
            name, _, value = line.partition(": ")
            found[name.lower()] = value
        return found

    def _answer(self, connection: socket.socket, method: str, headers: dict[str, str]) -> None:
        self.requests += 1
        status, more, body = "200 OK", "Session: 1\r\n", ""
        wanted = "Basic " + base64.b64encode((self.user or "").encode()).decode()
        if self.user and method != "OPTIONS" and headers.get("authorization") != wanted:
            status, more, method = "401 Unauthorized", 'WWW-Authenticate: Basic realm="camera"\r\n', ""
        if method == "DESCRIBE":
            body, more = SDP, f"Content-Type: application/sdp\r\nContent-Length: {len(SDP)}\r\n"
        elif method == "SETUP":
            more += "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n"
        connection.sendall(f"RTSP/1.0 {status}\r\nCSeq: {headers['cseq']}\r\n{more}\r\n{body}".encode())
        if method == "PLAY":
            threading.Thread(target=self._play, args=(connection,), daemon=True).start()

    def _play(self, connection: socket.socket) -> None:
        stamp, number = 1_000_000, 0
        with suppress(OSError):
            for i in range(100_000):
                if self.jump is not None and i == self.jump[0]:
                    stamp += round(self.jump[1] * TICKS)
                units = self._pictures[i % len(self._pictures)]
                for unit in units:
                    last = 0x80 * (unit is units[-1])
                    packet = struct.pack(">BBHII", 0x80, 96 | last, number % 2**16, stamp % 2**32, 7) + unit
                    connection.sendall(struct.pack(">BBH", ord("$"), 0, len(packet)) + packet)
                    number += 1
                stamp += TICKS // 25
                if self._stopped.wait(self.interval_s):
                    return


@contextmanager
def filming(
    user: str | None = None, jump: tuple[int, float] | None = None, interval_s: float = 0.01
) -> Iterator[Camera]:
    camera = Camera(user, jump, interval_s)
    try:
        yield camera
    finally:
        camera.kill()
