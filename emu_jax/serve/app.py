"""The server: routes, and the way from a request to the model and back.

An answer is a stream of JSON lines: `{"text": ...}` and `{"picture": "data:image/png;..."}` as
they come, `{"done": true}` at the end, or `{"error": ...}`.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from emu_jax.generate.api import Emu, load
from emu_jax.generate.prompt import converse
from emu_jax.serve.requests import Asked, Limits, Refused, as_parts, parse_chat, parse_draw
from emu_jax.serve.worker import Ticket, Worker

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")  # the last as a request spells it
_PAGE = Path(__file__).parent / "page"
_HEADERS = {
    # The page's own files alone, and pictures that it made or was sent.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; media-src blob:",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def make_app(emu: Emu, limits: Limits, hosts: tuple[str, ...] = LOOPBACK) -> Starlette:
    """The application; requests must be addressed to one of `hosts` (`*`: any), so that no
    page of another site can reach a server on this machine by a name of its own."""
    worker = Worker(limits.waiting, limits.seconds)

    def answering(parse: Callable[[bytes, Limits], Asked], answer: Callable[[Emu, Asked], Any]):
        async def endpoint(request: Request) -> Response:
            body = await _body(request, limits)
            ticket = worker.reserve()  # before anything is decoded
            try:
                asked = await run_in_threadpool(parse, body, limits)
            except BaseException:
                worker.release()
                raise
            worker.submit(ticket, lambda: answer(emu, asked))
            # The first part decides the status.
            parts = ticket.parts()
            first = [part async for part in _take_one(parts)]
            return StreamingResponse(
                _lines(first, parts, ticket), media_type="application/x-ndjson", headers=_HEADERS
            )

        return endpoint

    def page(name: str):
        async def endpoint(request: Request) -> Response:
            return FileResponse(_PAGE / name, headers=_HEADERS)

        return endpoint

    async def about(request: Request) -> Response:
        return JSONResponse(
            {"paints": emu.paints, "instruct": emu.tokenizer.instruct}, headers=_HEADERS
        )

    return Starlette(
        routes=[
            Route("/", page("index.html")),
            Route("/page.js", page("page.js")),
            Route("/page.css", page("page.css")),
            Route("/api/about", about),
            Route("/api/chat", answering(parse_chat, chat), methods=["POST"]),
            Route("/api/draw", answering(parse_draw, draw), methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers={Refused: _refuse, HTTPException: _refuse_http},
    )


def chat(emu: Emu, asked: Asked) -> Iterator[str | Image.Image]:
    """What the model says next; one that was tuned to answer may draw, too."""
    if emu.tokenizer.instruct:
        turns = [message.parts for message in asked.messages]
        prompt = converse(turns, emu.defaults.system)
        return emu.stream(prompt, max_images=1, **asked.settings)
    return emu.stream(as_parts(asked.messages), max_images=0, **asked.settings)


def draw(emu: Emu, asked: Asked) -> Iterator[Image.Image]:
    """One picture of the parts."""
    yield emu.generate_image(as_parts(asked.messages), **asked.settings)


def serve(checkpoint: Path, host: str, port: int, limits: Limits) -> None:
    """Serves until it is interrupted."""
    emu = load(checkpoint)
    hosts = LOOPBACK if host in LOOPBACK else ("*",)
    if hosts == ("*",):
        log.warning("whoever reaches %s may use this server: it asks nobody who they are", host)
    address = f"[{host}]" if ":" in host else host
    log.info("emu-jax serves %s at http://%s:%d", checkpoint, address, port)
    uvicorn.run(
        make_app(emu, limits, hosts), host=host, port=port, log_level="warning",
        limit_concurrency=8 * limits.waiting, timeout_keep_alive=5, server_header=False,
    )  # fmt: skip


async def _body(request: Request, limits: Limits) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "the body must be application/json")
    stated = request.headers.get("content-length", "0")
    if stated.isdigit() and int(stated) > limits.body_bytes:
        raise Refused(413, f"the request is larger than {limits.body_bytes} bytes")
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise Refused(413, f"the request is larger than {limits.body_bytes} bytes")
    except TimeoutError:
        raise Refused(408, "the body did not arrive in time") from None
    return bytes(body)


async def _take_one(parts: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for part in parts:
        yield part
        return


async def _lines(first: list[Any], parts: AsyncIterator[Any], ticket: Ticket) -> AsyncIterator[str]:
    try:
        for part in first:
            yield _line(part)
        async for part in parts:
            yield _line(part)
        yield json.dumps({"done": True}) + "\n"
    except Refused as error:
        yield json.dumps({"error": str(error)}) + "\n"
    finally:
        ticket.gone.set()


def _line(part: str | Image.Image) -> str:
    if isinstance(part, str):
        return json.dumps({"text": part}) + "\n"
    file = io.BytesIO()
    part.save(file, "PNG")
    content = base64.b64encode(file.getvalue()).decode()
    return json.dumps({"picture": f"data:image/png;base64,{content}"}) + "\n"


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = _HEADERS | ({"Retry-After": "5"} if error.status == 429 else {})
    return JSONResponse({"error": str(error)}, status_code=error.status, headers=headers)


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=_HEADERS)
