"""A server on a free port of this machine, and a client that knows nothing of edgetube."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from edgetube.bench.studies import servers
from edgetube.runtime import Runtime

PATIENCE_S = 30.0
"""Seconds after which a test that waits has failed."""


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Running:
    """A server that listens in a thread."""

    def __init__(self, service: Any, server: Any) -> None:
        self.service, self.server = service, server
        self.port = server._socket.getsockname()[1]
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="edgetube server of a test")

    def _run(self) -> None:
        try:
            self.server.listen()
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.error = error

    def ask(self, path: str, method: str = "GET", body: Any = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            connection.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
            found = connection.getresponse()
            return Answer(found.status, {k.lower(): v for k, v in found.getheaders()}, found.read())
        finally:
            connection.close()


@contextmanager
def running(
    runtime: Runtime, *sources: Any, token: str | None = None, host: str = "127.0.0.1", **options: Any
) -> Iterator[Running]:
    from edgetube.serve.server import Server
    from edgetube.serve.service import Service

    with Service(runtime, sources, **options) as service:
        found = Running(service, Server(service, host, 0, token))
        found.thread.start()
        try:
            until(lambda: found.server.started)
            yield found
        finally:
            found.server.stop()
            found.thread.join(PATIENCE_S)
            assert not found.thread.is_alive()


def until(true: Callable[[], Any]) -> Any:
    """Wait until something is true; returns it."""
    end = time.monotonic() + PATIENCE_S
    while not (found := true()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)
    return found


def jpeg(value: int, size: tuple[int, int] = (48, 32)) -> bytes:
    """A JPEG of one grey, made by Pillow."""
    pytest.importorskip("PIL.Image")
    return servers.jpeg(value, size)


def film(path: Path, count: int = 40, fps: float = 20.0) -> Path:
    """A video of noise that moves."""
    from edgetube import video

    rng = np.random.default_rng(0)
    wide = rng.integers(0, 255, (64, 96 + 2 * count, 3), dtype=np.uint8).repeat(2, 1)
    return video.write(path, (np.ascontiguousarray(wide[:, 2 * i : 2 * i + 96]) for i in range(count)), fps)
