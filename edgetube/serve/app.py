"""The addresses of the server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Mapping
from functools import cache, partial
from importlib import resources
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from edgetube import __version__
from edgetube.errors import EdgetubeError, InputError
from edgetube.serve import prometheus, uploads
from edgetube.serve.access import Guard
from edgetube.serve.frames import POLICY_VIOLATION, Frames
from edgetube.serve.limits import Slots
from edgetube.serve.service import Service

EVENTS_S = 0.25
"""Seconds between two events of the page."""

JPEG = "image/jpeg"


def create(service: Service, *, loopback: bool, token: str | None) -> FastAPI:
    """The ASGI app of a service.

    Args:
        loopback, token: see `Guard`.
    """
    app = FastAPI(title="edgetube", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, loopback=loopback, token=token, requests=service.limits.requests)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(EdgetubeError, _product_error)
    app.add_exception_handler(RequestValidationError, _bad_number)
    _pages(app, service)
    _files(app, service)
    _live(app, service)
    return app


class _Watched(StreamingResponse):
    """Server-sent events, for which a slot was taken: it is given back also where nothing was sent."""

    def __init__(self, content: AsyncIterator[str], slots: Slots) -> None:
        super().__init__(content, media_type="text/event-stream")
        self._slots = slots

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._slots.give()


def _error(status: int, text: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": text}, status, headers)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for it"
    return _error(error.status_code, str(error.detail), error.headers)


async def _product_error(_: Request, error: Exception) -> Response:
    kinds = ((uploads.TooLarge, 413), (uploads.TooSlow, 408), (uploads.Ending, 503), (InputError, 400))
    return _error(next((status for kind, status in kinds if isinstance(error, kind)), 500), str(error))


async def _bad_number(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError), "registered for it"
    first = error.errors()[0]
    return _error(400, f"{first['loc'][-1]} is {first.get('input')!r:.60}; expected a whole number")


@cache
def page() -> tuple[str, str]:
    """The page, and its Content-Security-Policy: only its own script and style, and only this server."""
    text = resources.files("edgetube.serve").joinpath("page.html").read_text("utf-8")

    def source(tag: str) -> str:
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {source('script')}; style-src {source('style')}; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _pages(app: FastAPI, service: Service) -> None:
    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        text, policy = page()
        return HTMLResponse(text, headers={"content-security-policy": policy})

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        """Whether the server runs."""
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        made = partial(prometheus.text, service.board, service.cameras, dict(service.counts))
        return Response(await anyio.to_thread.run_sync(made), media_type=prometheus.CONTENT_TYPE)


def _files(app: FastAPI, service: Service) -> None:
    @app.post("/predict")
    async def predict(request: Request) -> Response:
        """The prediction of a video or image file, which is the body of the request."""
        result = "refused"
        try:
            if request.headers.get("content-type", "").startswith("multipart/"):
                return _error(415, "the body is a form; expected the file itself: curl --data-binary @clip.mp4 ...")
            if not service.uploads.take():
                text = f"{service.limits.uploads} files are being classified; send it again later"
                return _error(429, text, {"retry-after": "1"})
            try:
                found = await _classified(request, service)
                result = "done"
                return JSONResponse(found)
            finally:
                service.uploads.give()
        finally:
            service.counts["file", result] += 1


async def _classified(request: Request, service: Service) -> dict[str, Any]:
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > service.limits.upload_bytes:
        raise uploads.TooLarge(
            f"{uploads.NAME} has {stated} bytes; at most {service.limits.upload_bytes} are taken: send a shorter part"
        )
    with uploads.folder() as folder:
        place = folder / "file"
        await uploads.receive(request.stream(), place, service.limits)
        work = partial(uploads.predict, service.runtime, place, service.limits, service.top_k, service.stopping)
        return (await anyio.to_thread.run_sync(work)).to_json()


def _live(app: FastAPI, service: Service) -> None:
    frames = None
    if service.cameras is not None:
        frames = Frames(service.cameras, service.board, service.limits, service.counts)

    async def known(since: dict[int, int] | None = None) -> list[dict[str, Any]]:
        return await anyio.to_thread.run_sync(partial(service.board.to_json, service.cameras, since))

    @app.get("/api/model")
    async def model() -> Response:
        """The model: its name, labels, and the rule of decisions."""
        bundle, rule = service.runtime.bundle, service.board.rule
        return JSONResponse(
            {"name": bundle.name, "target": bundle.target, "labels": list(bundle.labels), "rule": rule.to_json()}
        )

    @app.get("/api/sources")
    async def sources() -> Response:
        """All sources: state, statistics, newest prediction, spans, points of the chart."""
        return JSONResponse(await known())

    @app.get("/api/sources/{number}/picture")
    async def picture(number: int, after: int = -1) -> Response:
        """The newest frame as JPEG; 204 where there is none with a number above `after`."""
        track = service.board.track(number)
        if track is None:
            return _error(404, f"there is no source {number}")
        newest = track.source.newest
        if newest is None or newest.number <= after:
            return Response(status_code=204)
        found = await anyio.to_thread.run_sync(track.picture)
        assert found is not None, "there is a newest frame"
        return Response(found[1], media_type=JPEG, headers={"x-frame": str(found[0])})

    @app.get("/api/events")
    async def events() -> Response:
        """Server-sent events: `sources` has what /api/sources has, with those points of the charts that are new."""
        if not service.watchers.take():
            return _error(429, f"{service.limits.watchers} pages are open already", {"retry-after": "10"})

        async def tell() -> AsyncIterator[str]:
            since: dict[int, int] = {}
            while not service.stopping.is_set():
                found = await known(since)
                since = {one["id"]: one["count"] for one in found}
                yield f"event: sources\ndata: {json.dumps(found, allow_nan=False)}\n\n"
                await asyncio.sleep(EVENTS_S)

        return _Watched(tell(), service.watchers)

    @app.websocket("/ws/frames")
    async def socket(websocket: WebSocket) -> None:
        if frames is None:
            await websocket.accept()
            await websocket.close(POLICY_VIOLATION, "this model takes whole files only: POST /predict")
            return
        await frames.serve(websocket)
