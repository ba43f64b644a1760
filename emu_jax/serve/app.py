"""The server: routes, middleware, and streaming the model's answers to clients.

An answer is a stream of JSON lines: `{"text": ...}` and `{"picture": "data:image/png;..."}` as
they are generated, then `{"done": true}` or `{"error": ...}`.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import dataclasses
import io
import ipaddress
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emu_jax.generate.api import Emu, load
from emu_jax.generate.batching import Shapes
from emu_jax.generate.prompt import chat_format, converse
from emu_jax.serve.connections import bounded_connections, listen, room_for_connections
from emu_jax.serve.requests import (
    IMAGE_KEY,
    SPECIAL,
    Asked,
    Limits,
    Refused,
    joined_parts,
    parse_chat,
    parse_draw,
)
from emu_jax.serve.worker import Ticket, Worker
from emu_jax.tokenizer import added_tokens

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
Endpoint = Callable[[Request], Awaitable[Response]]
DECODERS = 2  # requests whose images are decoded at once
STOP_SECONDS = 5  # time after a signal for running answers to finish
_PAGE = Path(__file__).parent / "page"
_HEADERS = {
    # Only the page's own files, and images it made or was sent. No other site may frame it.
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; media-src blob:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
_NOTHING = object()


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


def make_app(emu: Emu, limits: Limits, hosts: Hosts = Hosts()) -> Starlette:  # noqa: B008
    """Builds the application; its `state.worker` is the `Worker` that runs the model.

    Args:
        hosts: the names that it answers to.
    """
    worker = Worker(limits.waiting, limits.seconds)
    bodies, decoders = _Bodies(limits), asyncio.Semaphore(DECODERS)
    special = (*SPECIAL, *added_tokens(emu.tokenizer.family, emu.tokenizer.instruct))

    def answering(
        parse: Callable[[bytes, Limits, Collection[str]], Asked],
        answer: Callable[[Emu, Asked, Callable[[], bool]], Iterator[Any]],
    ) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            body = await bodies.read(request)
            ticket = worker.reserve(_client(request.scope))  # before decoding anything
            try:
                async with decoders:
                    asked = await run_in_threadpool(parse, body, limits, special)
            except BaseException:
                worker.release()
                raise
            del body
            worker.submit(ticket, lambda: answer(emu, asked, ticket.over))
            # The first part decides the status.
            parts = ticket.parts()
            first = await _first(request, parts)
            return StreamingResponse(
                _lines(first, parts, ticket), media_type="application/x-ndjson"
            )

        return endpoint

    def page(name: str) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            return FileResponse(_PAGE / name)

        return endpoint

    async def about(request: Request) -> Response:
        return JSONResponse({"paints": emu.paints, "instruct": emu.tokenizer.instruct})

    app = Starlette(
        routes=[
            Route("/", page("index.html")),
            Route("/page.js", page("page.js")),
            Route("/page.css", page("page.css")),
            Route("/api/about", about),
            Route("/api/chat", answering(parse_chat, chat), methods=["POST"]),
            Route("/api/draw", answering(parse_draw, draw), methods=["POST"]),
        ],
        middleware=[
            Middleware(_Headers),
            Middleware(_CheckHost, hosts=hosts),
            Middleware(_PerClient, most=limits.per_client),
        ],
        exception_handlers={
            Refused: _refuse,
            HTTPException: _refuse_http,
            ClientDisconnect: _ignore,
            Exception: _fail,
        },
    )
    app.state.worker = worker
    return app


def chat(
    emu: Emu, asked: Asked, over: Callable[[], bool] | None = None
) -> Iterator[str | Image.Image]:
    """Streams the model's reply; an instruction-tuned model may also generate one image."""
    if emu.tokenizer.instruct:
        turns = [message.parts for message in asked.messages]
        defaults = emu.defaults
        style = chat_format(emu.cfg, defaults.chat_format)
        prompt = converse(turns, defaults.system, style=style, grounding=defaults.grounding)
        # The prompt spells both already; `stream` refuses them for a spelled prompt.
        return emu.stream(prompt, max_images=1, system=None, grounding=False, **asked.settings)
    return emu.stream(joined_parts(asked.messages), max_images=0, **asked.settings)


def draw(emu: Emu, asked: Asked, over: Callable[[], bool] | None = None) -> Iterator[Image.Image]:
    """Generates one image from the parts; stops early once `over` returns True."""
    yield from emu.generate_image([joined_parts(asked.messages)], stop=over, **asked.settings)


def serve(
    checkpoint: Path, host: str, port: int, limits: Limits, names: Sequence[str] = ()
) -> None:
    """Loads the checkpoint and serves it until interrupted.

    Args:
        names: names that clients use for this server (`allowed_hosts`).

    Raises:
        UserError: the server cannot listen on the address, or the checkpoint cannot be loaded.
    """
    limits = dataclasses.replace(limits, connections=room_for_connections(limits.connections))
    with contextlib.ExitStack() as stack:
        sockets = listen(host, port)  # before loading, which takes minutes
        for opened in sockets:
            stack.callback(opened.close)
        # Batch size 1 and a few fixed shapes: any mix of requests compiles only a few programs.
        shapes = Shapes(length=64, images=limits.images, new_tokens=limits.new_tokens)
        emu = load(checkpoint, batch_size=1, shapes=shapes)
        hosts = allowed_hosts(host, sockets, names)
        if hosts.addresses:
            log.warning("there is no authentication: anyone who can reach %s can use it", host)
        address = f"[{host}]" if ":" in host else host
        port = sockets[0].getsockname()[1]
        log.info("emu-jax serves %s at http://%s:%d", checkpoint, address, port)
        app = make_app(emu, limits, hosts)
        try:
            make_server(app, limits).run(sockets)
        finally:
            app.state.worker.stop()
            app.state.worker.close(timeout=STOP_SECONDS)


def allowed_hosts(host: str, sockets: Sequence[socket.socket], names: Sequence[str] = ()) -> Hosts:
    """Returns the names that a server listening on `sockets` answers to.

    These are the loopback names, `host` and `names`. A server that other machines can reach also
    answers to every IP address and, unless `names` are given, to this machine's own names.
    """
    addresses = [opened.getsockname()[0].partition("%")[0] for opened in sockets]
    reachable = not all(ipaddress.ip_address(address).is_loopback for address in addresses)
    allowed = [*LOOPBACK, host, *addresses, *names]
    if reachable and not names:
        machine = socket.gethostname()
        allowed += [machine, f"{machine}.local", socket.getfqdn()]
    return Hosts(frozenset(name.lower().removesuffix(".") for name in allowed), reachable)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def make_server(app: Starlette, limits: Limits) -> uvicorn.Server:
    """Returns a uvicorn server for `app` that bounds connections, times and shutdown."""
    config = uvicorn.Config(
        app,
        http=bounded_connections(limits, app.state.worker.stop),
        ws="none",
        log_level="warning",
        timeout_keep_alive=5,
        timeout_graceful_shutdown=STOP_SECONDS,
        server_header=False,
    )
    return uvicorn.Server(config)


class _Bodies:
    """Reads request bodies. Each is bounded in size and time, and all together in size."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._sizes: dict[asyncio.Timeout, int] = {}  # of arriving bodies, oldest first

    async def read(self, request: Request) -> bytes:
        """Reads a request's body.

        Raises:
            Refused: the content type is not JSON, the body is too large or too slow, or it has
                been arriving the longest when all bodies together are too large.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, "the body must be application/json")
        stated = request.headers.get("content-length", "0")
        if len(stated) > 20 or (stated.isdecimal() and int(stated) > self._limits.body_bytes):
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds) as timeout:
                try:
                    async for chunk in request.stream():
                        body += chunk
                        if len(body) > self._limits.body_bytes:
                            raise self._too_large()
                        self._sizes[timeout] = len(body)
                        self._make_room()
                finally:
                    self._sizes.pop(timeout, None)
        except TimeoutError:
            raise Refused(408, "the body did not arrive in time") from None
        return bytes(body)

    def _make_room(self) -> None:
        while sum(self._sizes.values()) > self._limits.bodies_bytes and len(self._sizes) > 1:
            oldest = next(iter(self._sizes))
            del self._sizes[oldest]
            if not oldest.expired():  # otherwise its request is already ending
                oldest.reschedule(asyncio.get_running_loop().time())

    def _too_large(self) -> Refused:
        return Refused(413, f"the request is larger than {self._limits.body_bytes} bytes")


class _Headers:
    """Adds the security headers to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        await self._app(scope, receive, secured)


class _CheckHost:
    """Refuses requests that are addressed to a name other than the server's own."""

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "")
            if not self._hosts.allow(host):
                message = f"Invalid host {host[:100]!r}: start the server with --allow-host NAME"
                app = JSONResponse({"error": message}, status_code=400)
        await app(scope, receive, send)


class _PerClient:
    """Refuses a client's requests beyond `most` concurrent ones."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most
        self._open: collections.Counter[str] = collections.Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = _client(scope)
        if not client or scope.get("method") != "POST":
            await self._app(scope, receive, send)
            return
        if self._open[client] >= self._most:
            refused = Refused(429, f"{self._most} of your requests are waiting: try again later")
            await (await _refuse(None, refused))(scope, receive, send)
            return
        self._open[client] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open[client] -= 1
            if not self._open[client]:
                del self._open[client]


def _client(scope: Scope) -> str:
    """Returns the client's address, or its /64 network for IPv6.

    Returns "" for loopback addresses, which all clients behind a local proxy share.
    """
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


async def _first(request: Request, parts: AsyncIterator[Any]) -> list[Any]:
    """Waits for the first part of an answer. Returns [] if the answer is empty.

    Raises:
        ClientDisconnect: the client disconnected; its place in the queue is free.
        Refused: the request was refused or failed.
    """
    waiting = asyncio.ensure_future(anext(parts, _NOTHING))  # type: ignore[call-overload]
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ClientDisconnect
        first = waiting.result()
    finally:
        for task in (waiting, leaving):
            task.cancel()
        await asyncio.wait({waiting, leaving})  # frees the place before returning
    return [] if first is _NOTHING else [first]


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _lines(first: list[Any], parts: AsyncIterator[Any], ticket: Ticket) -> AsyncIterator[str]:
    try:
        for part in first:
            yield await _line(part)
        async for part in parts:
            yield await _line(part)
        yield json.dumps({"done": True}) + "\n"
    except Refused as error:
        yield json.dumps({"error": str(error)}) + "\n"
    finally:
        ticket.leave()


async def _line(part: str | Image.Image) -> str:
    if isinstance(part, str):
        return json.dumps({"text": part}) + "\n"
    return await run_in_threadpool(_image_line, part)  # takes a tenth of a second


def _image_line(part: Image.Image) -> str:
    file = io.BytesIO()
    part.save(file, "PNG")
    content = base64.b64encode(file.getvalue()).decode()
    return json.dumps({IMAGE_KEY: f"data:image/png;base64,{content}"}) + "\n"


async def _refuse(request: Request | None, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {"Retry-After": "5"} if error.status == 429 else {}
    return JSONResponse({"error": str(error)}, status_code=error.status, headers=headers)


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code)


async def _ignore(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # the client is gone


async def _fail(request: Request, error: Exception) -> Response:
    # Starlette calls this handler outside the other middleware, and logs the error.
    message = "internal error: see the server log"
    return JSONResponse({"error": message}, status_code=500, headers=_HEADERS)
