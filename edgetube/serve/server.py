"""Listening, and ending."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from types import FrameType

import uvicorn

from edgetube.errors import EdgetubeError, InputError
from edgetube.serve import access, app
from edgetube.serve.patience import ImpatientProtocol
from edgetube.serve.service import Service

PORT = 8765

WATCH_S = 0.5
"""Seconds between two looks at whether the model was given up."""

GRACE_S = 2
"""Seconds that connections have to end by themselves."""


class Server(uvicorn.Server):
    """A service at an address.

    Attributes:
        token: what clients have to know; None on loopback where none was given.
        url: for people; with the token where there is one.
        is_loopback: whether only this machine reaches it.

    Args:
        host: a name or an address; any but loopback needs a token, and one is made where none is given.
        port: 0 takes a free one.

    Raises:
        InputError: the address cannot be used, or the token is too short.
    """

    def __init__(self, service: Service, host: str, port: int, token: str | None = None) -> None:
        self.service = service
        self.is_loopback = loopback = access.is_loopback(host)
        if token is not None:
            access.check_token(token)
        elif not loopback:
            token = secrets.token_urlsafe(32)
        self.token = token
        self._socket = _listen(host, port)
        shown = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}/" + (f"?token={token}" if token else "")
        self._error: EdgetubeError | None = None
        limits = service.limits
        super().__init__(
            uvicorn.Config(
                app.create(service, loopback=loopback, token=token),
                http=ImpatientProtocol,
                access_log=False,
                log_config=None,
                log_level="critical",
                lifespan="off",
                limit_concurrency=limits.connections,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=GRACE_S,
                timeout_keep_alive=5,
                ws="websockets-sansio",
                ws_max_size=limits.frame_bytes,
                ws_per_message_deflate=False,  # JPEG does not shrink, and a small message could become a large one
            )
        )

    def listen(self) -> None:
        """Answer until a signal comes, `stop` is called, or the model is given up.

        Raises:
            EdgetubeError: the model was given up.
            KeyboardInterrupt: a signal came.
        """
        try:
            self.run(sockets=[self._socket])
        finally:
            self.service.stopping.set()
            self._socket.close()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End it, from any thread."""
        self.service.stopping.set()
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: also streams of events end."""
        self.service.stopping.set()
        super().handle_exit(sig, frame)

    async def main_loop(self) -> None:
        """Until it is told to end; the model is looked at meanwhile."""
        watching = asyncio.create_task(self._watch())
        try:
            await super().main_loop()
        finally:
            watching.cancel()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                self.service.check()
            except EdgetubeError as error:
                self._error = error
                self.stop()
                return


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
        try:
            if os.name == "posix":  # elsewhere it would let two servers share a port
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(where)
            made.listen(128)
        except BaseException:
            made.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(
            f"cannot listen at {host} port {port}: {said}; give another --port, or a --host of this machine"
        ) from error
    return made
