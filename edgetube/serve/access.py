"""Who may ask: checked before anything else sees a request."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from edgetube.errors import InputError
from edgetube.serve.limits import ClientRates

OPEN = "/healthz"
"""Needs no token: it says that the server runs, and nothing else."""

PAGE = "/"
"""The only address that takes the token in its query, because a person types it."""

LEAST_TOKEN = 16
"""Characters of a token."""

HEADERS = {
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
"""Of every response that does not set them itself."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens at `host`, a name or an address."""
    if host.lower() in ("localhost", "localhost."):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return False


def check_token(token: str) -> str:
    """
    Raises:
        InputError: it is too short to be a secret, or cannot stand in a header.
    """
    if len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable() or set(token) & set(' ";,\\'):
        raise InputError(
            f"the token has {len(token)} characters; expected at least {LEAST_TOKEN} of ASCII, without blanks, quotes, "
            "commas, semicolons and backslashes; leave it out to have one made"
        )
    return token


class Guard:
    """Lets a request through to `app`, or answers it: 400, 401, 403 or 429 with a line that says why.

    * On loopback the Host header has to name this machine, because a page on the web can make its own name point here
      (DNS rebinding).
    * A request of a page has to come from this server's own (Origin), WebSockets included. There is no CORS.
    * With a token: a header `Authorization: Bearer TOKEN`, or the cookie that the page sets when it is opened with
      `?token=TOKEN`.
    * So many requests a second of one client.

    Args:
        loopback: whether the server listens on loopback.
        token: None asks for none.
    """

    def __init__(self, app: ASGIApp, *, loopback: bool, token: str | None, requests: float) -> None:
        self._app, self._loopback, self._token = app, loopback, token
        self._rates = ClientRates(requests)
        # Cookies do not know ports: two servers on one machine have two names.
        self._cookie = "edgetube-" + hashlib.sha256((token or "").encode()).hexdigest()[:8]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers: dict[str, str] = {}
        for key, value in scope["headers"]:
            headers[key.decode("latin-1")] = value.decode("latin-1")
        answer = self._app
        if (refused := self._refused(scope, headers)) is not None:
            answer = _refusal(scope, *refused)
        elif (location := self._entering(scope)) is not None:
            answer = Response(status_code=303, headers={"location": location, "set-cookie": self._set_cookie()})
        await answer(scope, receive, _with_headers(send) if scope["type"] == "http" else send)

    def _refused(self, scope: Scope, headers: Mapping[str, str]) -> tuple[int, str] | None:
        client = scope.get("client")
        if not self._rates.allows(client[0] if client else ""):
            return 429, "too many requests a second; ask less often"
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if self._loopback and not is_loopback(name):
            return 400, "the Host header does not name this machine; open the address that the server printed"
        origin = headers.get("origin")
        if origin is not None and _netloc(origin) != host.lower():
            return 403, "the request comes from a page of another server"
        if self._token is not None and scope["path"] != OPEN and not self._knows(scope, headers):
            return 401, "the token is missing or wrong: send Authorization: Bearer TOKEN, or open /?token=TOKEN"
        return None

    def _knows(self, scope: Scope, headers: Mapping[str, str]) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self._is_token(given.strip()):
            return True
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(self._cookie)
        except CookieError:
            cookie = None
        return (cookie is not None and self._is_token(cookie.value)) or self._is_token(_query_token(scope))

    def _is_token(self, given: str) -> bool:
        assert self._token is not None, "only asked where there is one"
        return hmac.compare_digest(given.encode("utf-8", "replace"), self._token.encode())

    def _entering(self, scope: Scope) -> str | None:
        """Where a page that was opened with a token goes on, so that the token is in no history and no link."""
        return PAGE if self._token is not None and _query_token(scope) else None

    def _set_cookie(self) -> str:
        return f"{self._cookie}={self._token}; HttpOnly; SameSite=Strict; Path=/"


def _netloc(origin: str) -> str | None:
    """Host and port of an Origin header; None for one that has none ("null")."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


def _query_token(scope: Scope) -> str:
    if scope["type"] != "http" or scope["path"] != PAGE:
        return ""
    try:
        found = parse_qs(scope.get("query_string", b"").decode("latin-1"), max_num_fields=10)
    except ValueError:
        return ""
    return str(found.get("token", [""])[0])


def _refusal(scope: Scope, status: int, why: str) -> ASGIApp:
    if scope["type"] == "websocket":
        return WebSocketClose(1008, why)  # before it is accepted: a 403
    more = {"www-authenticate": "Bearer"} if status == 401 else {"retry-after": "1"} if status == 429 else None
    return JSONResponse({"error": why}, status, more)


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = list(message.get("headers", ()))
            names = {bytes(key).lower() for key, _ in own}
            added = [(key.encode(), value.encode()) for key, value in HEADERS.items() if key.encode() not in names]
            message = {**message, "headers": [*own, *added]}
        await send(message)

    return sending
