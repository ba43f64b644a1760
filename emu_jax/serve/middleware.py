"""Middleware: what every request passes before it reaches an endpoint."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import ipaddress
import logging
import re
import time
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emu_jax.serve.metrics import ServerMetrics
from emu_jax.serve.openai import error_json, random_hex

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    # Only the page's own files, and images it made or was sent. No other site may frame it.
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; media-src blob:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
# A request's name in the log; a client may choose it.
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
OPEN_PATHS = ("/", "/page.js", "/page.css", "/api/about", "/api/model", "/health")  # need no key
KEY_STATE = "emu_jax_key"  # where a request's state names the holder of its key
MAX_CLIENTS = 10_000  # whose requests of the last minute are remembered
WRONG_KEYS = 20  # of an address in a minute; beyond, none of its requests is answered


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Names that the server answers to.

    Any other name in a Host header may belong to another site, whose page could reach the server
    through DNS rebinding. An address cannot.

    Attributes:
        names: allowed names, in lower case.
        addresses: whether every IP address is allowed too.
    """

    names: frozenset[str] = frozenset(LOOPBACK)
    addresses: bool = False

    def allow(self, header: str) -> bool:
        """Returns whether a Host header names this server; its port is ignored."""
        name, _, port = header.rpartition(":")
        if not name or not (port.isascii() and port.isdecimal()):
            name = header
        name = name.removeprefix("[").removesuffix("]").lower().removesuffix(".")
        return name in self.names or (self.addresses and _is_address(name))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def error_response(path: str, status: int, message: str) -> JSONResponse:
    """Returns an error in the shape of the API that `path` belongs to."""
    value = error_json(status, message) if path.startswith("/v1/") else {"error": message}
    headers = {429: {"Retry-After": "5"}, 401: {"WWW-Authenticate": "Bearer"}}.get(status, {})
    return JSONResponse(value, status_code=status, headers=headers)


class SecurityHeaders:
    """Adds the security headers to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        await self._app(scope, receive, secured)


class CheckHost:
    """Refuses requests that are addressed to a name other than the server's own."""

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "")
            if not self._hosts.allow(host):
                message = f"Invalid host {host[:100]!r}: start the server with --allow-host NAME"
                app = error_response(scope["path"], 400, message)
        await app(scope, receive, send)


class PerClient:
    """Refuses a client's requests beyond `most` concurrent ones."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most
        self._open: collections.Counter[str] = collections.Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = client_of(scope)
        if not client or scope.get("method") != "POST":
            await self._app(scope, receive, send)
            return
        if self._open[client] >= self._most:
            message = f"{self._most} of your requests are waiting: try again later"
            await error_response(scope["path"], 429, message)(scope, receive, send)
            return
        self._open[client] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open[client] -= 1
            if not self._open[client]:
                del self._open[client]


class Observe:
    """Gives each request an id (`X-Request-ID`), logs it, and counts it.

    Args:
        paths: the routes, which are counted each. All other paths are counted together.
    """

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, paths: Collection[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get("x-request-id", "")
        name = request_id if REQUEST_ID.fullmatch(request_id) else f"req-{random_hex(8)}"
        started, status = time.monotonic(), 500

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                header = (b"x-request-id", name.encode())
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        try:
            await self._app(scope, receive, observed)
        finally:
            seconds = time.monotonic() - started
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.request(path, status, seconds)
            if scope["method"] == "POST":
                log.info("%s POST %s %d in %.3f s", name, path, status, seconds)


class _LastMinute:
    """Counts events of the last minute by client, up to `most` each."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._times: collections.OrderedDict[str, collections.deque[float]]
        self._times = collections.OrderedDict()  # the client of the last event is the last

    def full(self, client: str) -> bool:
        """Returns whether a client had as many events as it may have."""
        times, now = self._times.get(client, collections.deque()), time.monotonic()
        while times and times[0] <= now - 60:
            times.popleft()
        return len(times) >= self._most

    def add(self, client: str) -> None:
        """Counts an event. Forgets the client whose last event is the oldest if there are many."""
        self._times.setdefault(client, collections.deque()).append(time.monotonic())
        self._times.move_to_end(client)
        if len(self._times) > MAX_CLIENTS:
            self._times.popitem(last=False)


class Authenticate:
    """Refuses requests without one of the API keys, if there are any.

    An address that sent `WRONG_KEYS` wrong keys within a minute gets no answer, so that keys cannot
    be guessed. Loopback addresses are exempt: all clients behind a local proxy share them. Behind
    a proxy elsewhere, uvicorn must be told to trust its `X-Forwarded-For`.
    """

    def __init__(self, app: ASGIApp, keys: Collection[str]) -> None:
        self._app = app
        # Looked up by hash: the time that a comparison takes tells nothing about a key.
        self._keys = frozenset(map(_key_hash, keys))
        self._wrong = _LastMinute(WRONG_KEYS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._keys and scope["type"] == "http":
            header = Headers(scope=scope).get("authorization", "")
            scheme, _, key = header.partition(" ")
            hashed, address = _key_hash(key.strip()), client_of(scope)
            if header and address and self._wrong.full(address):
                message = "too many wrong API keys from your address: try again in a minute"
                await error_response(scope["path"], 429, message)(scope, receive, send)
                return
            if scheme.lower() == "bearer" and hashed in self._keys:
                scope.setdefault("state", {})[KEY_STATE] = f"key {hashed[:12]}"
            elif scope["path"] not in OPEN_PATHS:
                if header and address:
                    self._wrong.add(address)
                message = "no valid API key: send one in the header Authorization: Bearer KEY"
                await error_response(scope["path"], 401, message)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _key_hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class RateLimit:
    """Refuses a client's requests beyond `per_minute` in any minute; 0 refuses none."""

    def __init__(self, app: ASGIApp, per_minute: int) -> None:
        self._app, self._per_minute = app, per_minute
        self._admitted = _LastMinute(per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = client_of(scope) if self._per_minute and scope.get("method") == "POST" else ""
        if client:
            if self._admitted.full(client):
                message = f"more than {self._per_minute} requests a minute: try again later"
                await error_response(scope["path"], 429, message)(scope, receive, send)
                return
            self._admitted.add(client)
        await self._app(scope, receive, send)


def client_of(scope: Scope) -> str:
    """Returns who sent a request: the holder of its API key, or else the client's address, or its
    /64 network for IPv6.

    Returns "" for loopback addresses without a key, which all clients behind a local proxy share.
    """
    if key := scope.get("state", {}).get(KEY_STATE):
        return key
    try:
        address = ipaddress.ip_address((scope.get("client") or ("",))[0].partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    if address.is_loopback:
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
