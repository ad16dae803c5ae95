"""Connections that say nothing are closed, so that nobody keeps others out by holding many."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

SILENT_S = 5.0
"""Seconds between two looks at a connection: one that waits for the rest of a request at both is closed."""

_BUSY = object()


class ImpatientProtocol(H11Protocol):
    """HTTP/1.1 whose requests have to come, with all of their headers, within twice `SILENT_S`.

    Bodies have a limit of their own (`Limits.upload_seconds`), and so have WebSockets (`Limits.idle_seconds`).
    """

    _seen: Any = _BUSY

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client came."""
        super().connection_made(transport)
        self.loop.call_later(SILENT_S, self._look)

    def _look(self) -> None:
        if self.transport.is_closing() or self.transport.get_protocol() is not self:  # it ended, or is a WebSocket
            return
        waits = self.cycle is None or self.cycle.response_complete
        seen = self.cycle if waits else _BUSY
        if waits and seen is self._seen:
            self.transport.close()
            return
        self._seen = seen
        self.loop.call_later(SILENT_S, self._look)
