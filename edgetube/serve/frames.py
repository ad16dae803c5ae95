"""Frames that a client sends over a WebSocket: a source like any other, answered to who sent them."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
from starlette.websockets import WebSocket, WebSocketDisconnect

from edgetube.errors import InputError
from edgetube.live.cameras import Cameras
from edgetube.serve import jpeg
from edgetube.serve.board import Board
from edgetube.serve.limits import Limits, Rate, Slots
from edgetube.serve.watched import WatchedSource

WAITING = 32
"""Answers that wait for a client that does not read; the oldest makes room."""

MOST_REFUSED = 100
"""Frames in a row that cannot be used before the connection is closed."""

POLICY_VIOLATION, TOO_BIG, TRY_LATER = 1008, 1009, 1013
"""Codes with which a WebSocket is closed (RFC 6455, section 7.4.1, and the registry of IANA)."""


class Frames:
    """The WebSockets of one server.

    A client sends JPEG frames, one in each binary message; it gets a JSON object for each prediction, with the keys of
    `edgetube run --json`, and `{"error": ...}` for a frame that cannot be used.

    Args:
        counts: of (what, how it ended), for the metrics.
    """

    def __init__(self, cameras: Cameras, board: Board, limits: Limits, counts: Counter[tuple[str, str]]) -> None:
        self._cameras, self._board, self._limits, self._counts = cameras, board, limits, counts
        self._slots = Slots(limits.sockets)
        self._numbers = itertools.count(1)

    async def serve(self, socket: WebSocket) -> None:
        """One connection, to its end."""
        await socket.accept()
        if not self._slots.take():
            await socket.close(TRY_LATER, f"{self._limits.sockets} clients send frames already; come later")
            return
        name = f"client {next(self._numbers)}"
        source = WatchedSource.pushed(name)
        answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue(WAITING)
        loop = asyncio.get_running_loop()

        def offer(told: dict[str, Any]) -> None:
            if answers.full():
                answers.get_nowait()
            answers.put_nowait(told)

        def tell(told: dict[str, Any]) -> None:
            try:
                loop.call_soon_threadsafe(offer, told)
            except RuntimeError:  # the loop is closed: the server ends
                return

        self._board.add(name, source, tell)
        try:
            await anyio.to_thread.run_sync(self._cameras.add, name, source)
            sending = asyncio.create_task(_send(socket, answers))
            try:
                await self._receive(socket, source)
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
        except WebSocketDisconnect:
            pass
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(partial(self._leave, name, source))
            self._slots.give()

    def _leave(self, name: str, source: WatchedSource) -> None:
        source.close()
        if name in self._cameras.names:
            self._cameras.remove(name)
        self._board.remove(name)

    async def _receive(self, socket: WebSocket, source: WatchedSource) -> None:
        rate, refused, told = Rate(self._limits.frames), 0, 0.0
        while refused < MOST_REFUSED:
            with anyio.move_on_after(self._limits.idle_seconds) as idle:
                message = await socket.receive()
            if idle.cancelled_caught:
                await socket.close(POLICY_VIOLATION, f"no frame for {self._limits.idle_seconds:g} s")
                return
            if message["type"] == "websocket.disconnect":
                return
            why, result = await self._take(message.get("bytes"), source, rate)
            self._counts["frame", result] += 1
            if why is None:
                refused = 0
                continue
            refused += 1
            if result == "too large":
                await socket.close(TOO_BIG, why)
                return
            if (now := time.monotonic()) - told >= 1.0 or result != "too many":  # once a second is enough
                told = now
                await socket.send_json({"error": why})
        await socket.close(POLICY_VIOLATION, f"{MOST_REFUSED} frames in a row could not be used")

    async def _take(self, data: bytes | None, source: WatchedSource, rate: Rate) -> tuple[str | None, str]:
        """Why a message is no frame for the source, None where it is one; and the word of that for the metrics."""
        if data is None:
            return "the message is text; expected a JPEG frame in a binary message", "bad"
        if len(data) > self._limits.frame_bytes:
            return f"the frame has more than {self._limits.frame_bytes} bytes", "too large"
        if not rate.allows():
            return f"more than {self._limits.frames:g} frames a second; some are left out", "too many"
        try:
            pixels = await anyio.to_thread.run_sync(jpeg.decode, data, self._limits.frame_pixels)
            source.push(pixels)
        except InputError as error:
            return str(error), "bad"
        return None, "done"


async def _send(socket: WebSocket, answers: asyncio.Queue[dict[str, Any]]) -> None:
    while True:
        await socket.send_json(await answers.get())
