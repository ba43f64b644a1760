"""The server: routes, and the path of a request to the model and back.

An answer of `/api/...` is a stream of JSON lines: `{"text": ...}` and
`{"picture": "data:image/png;..."}` as they are generated, then `{"done": true}` or
`{"error": ...}`. A request with `"progress": true` also gets
`{"waiting": ..., "seconds": ..., "warming_up": ...}`, its place in the queue, an estimate of the
wait, and whether the server still compiles its programs, and
`{"preview": "data:...", "step": ..., "steps": ...}` while an image is denoised. Answers of
`/v1/...` are OpenAI's (`openai.py`).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import functools
import io
import ipaddress
import json
import logging
import math
import socket
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Sequence,
)
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax.numpy as jnp
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import (
    FileResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from emu_jax.errors import UserError
from emu_jax.generate.api import Emu, load
from emu_jax.generate.batching import Shapes
from emu_jax.generate.engine import (
    IMAGE_REQUEST,
    SEARCH_REQUEST,
    TEXT_REQUEST,
    Engine,
    EnginePart,
    Preview,
    Usage,
    has_stop,
)
from emu_jax.generate.image import native_side
from emu_jax.generate.prompt import chat_format, converse
from emu_jax.generate.settings import bucket
from emu_jax.models.backend import on_cpu
from emu_jax.progress import track
from emu_jax.serve.connections import bounded_connections, listen, room_for_connections
from emu_jax.serve.metrics import ServerMetrics
from emu_jax.serve.middleware import (
    HEADERS,
    LOOPBACK,
    Authenticate,
    CheckHost,
    Hosts,
    Observe,
    PerClient,
    RateLimit,
    SecurityHeaders,
    client_of,
    error_response,
)
from emu_jax.serve.openai import (
    ChunkWriter,
    Completion,
    completion_json,
    completion_pieces,
    error_json,
    event,
    image_json,
    models_json,
    parse_completion,
    parse_generation,
)
from emu_jax.serve.requests import (
    IMAGE_KEY,
    SPECIAL,
    ImageSizes,
    Limits,
    ParsedRequest,
    Refused,
    joined_parts,
    parse_chat,
    parse_continue,
    parse_draw,
)
from emu_jax.serve.worker import Ticket, Worker
from emu_jax.storage import read_json_object

log = logging.getLogger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]
DECODERS = 2  # requests whose images are decoded at once
STOP_SECONDS = 2  # more than `Limits.drain_seconds`, until the server ends
# Of a step, for requests that are likely to arrive. Only where they are prepared on the processor
# that computes the step: another one would be idle meanwhile.
GATHER_SECONDS = 0.01
PLACE_SECONDS = 0.5  # between two looks at a request's place in the queue
_EXAMPLES = "examples.json"  # of a checkpoint: prompts for the page, a list for each tab
_PAGE = Path(__file__).parent / "page"
_NOTHING = object()
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A request's place in the queue; 0 when it runs.

    Attributes:
        seconds: an estimate of how long it waits; None before a first request had to wait.
        warming_up: whether all requests wait until the server has compiled its programs.
    """

    place: int
    seconds: float | None
    warming_up: bool


def make_app(
    emu: Emu | Engine,
    limits: Limits,
    hosts: Hosts = Hosts(),  # noqa: B008
    *,
    keys: Collection[str] = (),
    name: str = "emu",
    examples: dict[str, Any] | None = None,
    warm_up: bool = False,
) -> Starlette:
    """Builds the application; its `state.worker` is the `Worker` that runs the model.

    Args:
        emu: the model, which answers one request at a time, or an engine, which answers many.
        hosts: the names that it answers to.
        keys: API keys; with none, everyone may use the model.
        name: the model's name.
        examples: prompts for the page, by tab.
        warm_up: whether an engine compiles its programs before the first request.
    """
    if isinstance(emu, Engine):
        steps = None
        if warm_up:
            programs = emu.warm_up()
            steps = track(programs, len(programs), "compiling", "program")
        places = limits.waiting, limits.seconds, emu.concurrent
        gather = GATHER_SECONDS if on_cpu() else 0.0
        worker = Worker(*places, emu.step, emu.kinds, warm_up=steps, gather_seconds=gather)
    else:
        worker = Worker(limits.waiting, limits.seconds)
    bodies, decoders = _Bodies(limits), asyncio.Semaphore(DECODERS)
    special = (*SPECIAL, *emu.tokenizer.spelled)
    metrics, created = ServerMetrics(), int(time.time())
    sizes = ImageSizes(emu.cfg, emu.defaults, limits) if emu.paints else None

    async def submit(
        request: Request,
        parse: Callable[[bytes], tuple[ParsedRequest, Any]],
        answer: Callable[[Emu | Engine, ParsedRequest, Callable[[], bool]], Iterable[Any]],
    ) -> tuple[ParsedRequest, Any, Ticket]:
        body = await bodies.read(request)
        ticket = worker.reserve(client_of(request.scope))  # before decoding anything

        def prepare(body: bytes) -> tuple[ParsedRequest, Any, Iterable[Any]]:
            parsed, options = parse(body)
            try:
                # Here and not in the worker's thread, where the batch would wait for it.
                parts = answer(emu, parsed, ticket.over)
            except UserError as error:
                raise Refused(400, str(error)) from None
            if sizes is not None:
                parts = sizes.counted(parts, parsed.settings)
            return parsed, options, _counted(parts, metrics)

        try:
            async with decoders:
                parsed, options, parts = await run_in_threadpool(prepare, body)
        except BaseException:
            worker.release()
            raise
        del body
        search = parsed.settings.get("num_beams", 1) > 1
        kind = SEARCH_REQUEST if search else IMAGE_REQUEST if answer is draw else TEXT_REQUEST
        worker.submit(ticket, lambda: parts, kind)
        return parsed, options, ticket

    def answering(
        parse: Callable[[bytes, Limits, Collection[str]], ParsedRequest],
        answer: Callable[[Emu | Engine, ParsedRequest, Callable[[], bool]], Iterable[Any]],
    ) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            parsed, _, ticket = await submit(
                request, lambda body: (parse(body, limits, special), None), answer
            )
            parts = ticket.parts()
            if parsed.progress:
                lines = _lines([], _with_place(parts, ticket, worker), ticket)
            else:
                # The first part decides the status.
                lines = _lines(await _first(request, parts), parts, ticket)
            return _Stream(lines, "application/x-ndjson", ticket)

        return endpoint

    async def completions(request: Request) -> Response:
        _, completion, ticket = await submit(
            request,
            lambda body: parse_completion(
                body,
                limits,
                special,
                model=name,
                max_new_tokens=emu.defaults.max_new_tokens,
                instruct=emu.tokenizer.instruct,
            ),
            functools.partial(chat, max_images=0),
        )
        parts = ticket.parts()
        if completion.stream:
            first = await _first(request, parts)
            pieces = completion_pieces(_chained(first, parts), completion)
            events = _events(pieces, completion, ticket)
            return _Stream(events, "text/event-stream", ticket)
        try:
            text, usage = await _connected(request, _whole(completion_pieces(parts, completion)))
        finally:
            ticket.leave()
        return JSONResponse(completion_json(text, usage, completion))

    async def generations(request: Request) -> Response:
        painted = sizes  # narrowed to one type in the closure below
        if painted is None or not emu.paints:
            raise Refused(400, "this model has no decoder: it cannot generate images")
        _, _, ticket = await submit(
            request,
            lambda body: (
                parse_generation(body, limits, special, model=name, sizes=painted),
                None,
            ),
            draw,
        )
        try:
            (image,) = await _first(request, ticket.parts())
        finally:
            ticket.leave()
        return JSONResponse(await run_in_threadpool(image_json, image))

    def page(file: str) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            return FileResponse(_PAGE / file)

        return endpoint

    async def about(request: Request) -> Response:
        return JSONResponse({"paints": emu.paints, "instruct": emu.tokenizer.instruct})

    async def model(request: Request) -> Response:
        return JSONResponse(_model_json(emu, limits, name, bool(keys), examples or {}, sizes))

    async def models(request: Request) -> Response:
        return JSONResponse(models_json(name, created))

    async def health(request: Request) -> Response:
        status = worker.status
        return JSONResponse({"status": status}, status_code=200 if status == "ok" else 503)

    async def prometheus(request: Request) -> Response:
        gauges = {"requests_running": worker.running, "requests_waiting": worker.queued}
        if isinstance(emu, Engine):
            slots, images = emu.active
            gauges |= {"slots": emu.slots, "slots_decoding": slots, "images_denoising": images}
        return PlainTextResponse(metrics.text(gauges), media_type="text/plain; version=0.0.4")

    routes = [
        Route("/", page("index.html")),
        Route("/page.js", page("page.js")),
        Route("/page.css", page("page.css")),
        Route("/api/about", about),
        Route("/api/model", model),
        Route("/api/chat", answering(parse_chat, chat), methods=["POST"]),
        Route(
            "/api/draw",
            answering(functools.partial(parse_draw, sizes=sizes), draw),
            methods=["POST"],
        ),
        Route(
            "/api/continue",
            answering(functools.partial(parse_continue, sizes=sizes), continue_),
            methods=["POST"],
        ),
        Route("/v1/models", models),
        Route("/v1/chat/completions", completions, methods=["POST"]),
        Route("/v1/images/generations", generations, methods=["POST"]),
        Route("/health", health),
        Route("/metrics", prometheus),
    ]
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(SecurityHeaders),
            Middleware(Observe, metrics=metrics, paths={route.path for route in routes}),
            Middleware(CheckHost, hosts=hosts),
            Middleware(Authenticate, keys=keys),
            Middleware(RateLimit, per_minute=limits.per_minute),
            Middleware(PerClient, most=limits.per_client),
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
    emu: Emu | Engine,
    parsed: ParsedRequest,
    over: Callable[[], bool] | None = None,
    *,
    max_images: int = 1,
) -> Iterable[EnginePart]:
    """Streams the model's reply; an instruction-tuned model may also generate images."""
    prompt: list[Any] = joined_parts(parsed.messages)
    more: dict[str, Any] = _previews(emu, parsed)
    if emu.tokenizer.instruct:
        # The prompt spells both already; `stream` refuses them for a spelled prompt.
        prompt, more = _dialogue(emu, parsed), more | {"system": None, "grounding": False}
    else:
        max_images = 0
    stops = parsed.stops
    if stops and isinstance(emu, Engine):
        more["stops"], stops = stops, ()
    if parsed.settings.get("num_beams", 1) > 1:
        return _searched(emu, prompt, more, parsed)
    parts = emu.stream(prompt, max_images=max_images, **parsed.settings, **more)
    return _until_stop(parts, stops) if stops else parts


def _until_stop(parts: Iterable[EnginePart], stops: Sequence[str]) -> Iterator[EnginePart]:
    """Yields the parts of an answer up to the one that completes a stop text."""
    text = ""
    for part in parts:
        yield part
        text += part if isinstance(part, str) else ""
        if has_stop(text, stops):
            return


def _searched(
    emu: Emu | Engine, prompt: list[Any], more: dict[str, Any], parsed: ParsedRequest
) -> Iterator[EnginePart]:
    """Answers with beam search, which does not share the batch of the engine."""
    more = {name: value for name, value in more.items() if name not in ("previews", "stops")}
    if isinstance(emu, Engine):
        yield from emu.search(prompt, **parsed.settings, **more)
    else:
        yield emu.generate_text(prompt, **parsed.settings, **more)


def continue_(
    emu: Emu | Engine, parsed: ParsedRequest, over: Callable[[], bool] | None = None
) -> Iterable[EnginePart]:
    """Streams a continuation with text and images, as the model decides."""
    return emu.stream(joined_parts(parsed.messages), **parsed.settings, **_previews(emu, parsed))


def draw(
    emu: Emu | Engine, parsed: ParsedRequest, over: Callable[[], bool] | None = None
) -> Iterator[EnginePart]:
    """Generates one image from the parts; stops early once `over` returns True."""
    prompt = [joined_parts(parsed.messages)]
    if isinstance(emu, Engine):
        yield from emu.generate_image(prompt, **parsed.settings, **_previews(emu, parsed))
    else:
        yield from emu.generate_image(prompt, stop=over, **parsed.settings)


def _dialogue(emu: Emu | Engine, parsed: ParsedRequest) -> list[Any]:
    defaults, turns = emu.defaults, [message.parts for message in parsed.messages]
    system = defaults.system if parsed.system is None else parsed.system
    style = chat_format(emu.cfg, defaults.chat_format)
    return converse(turns, system, style=style, grounding=defaults.grounding)


def _previews(emu: Emu | Engine, parsed: ParsedRequest) -> dict[str, Any]:
    return {"previews": True} if parsed.progress and isinstance(emu, Engine) else {}


def _counted(parts: Iterable[Any], metrics: ServerMetrics) -> Iterator[Any]:
    """Yields the parts of an answer, and counts its tokens and images."""
    for part in parts:
        if isinstance(part, Usage):
            metrics.add("prompt_tokens", part.prompt_tokens)
            metrics.add("generated_tokens", part.completion_tokens)
        elif isinstance(part, Image.Image):
            metrics.add("generated_images")
        yield part


def _model_json(
    emu: Emu | Engine,
    limits: Limits,
    name: str,
    needs_key: bool,
    examples: dict[str, Any],
    sizes: ImageSizes | None,
) -> dict[str, Any]:
    """Returns what the page tells about the model."""
    settings = (
        "temperature",
        "top_p",
        "num_beams",
        "max_new_tokens",
        "max_images",
        "seed",
        "guidance_scale",
        "num_inference_steps",
    )
    defaults = {setting: getattr(emu.defaults, setting) for setting in settings}
    # A chat is decoded greedily unless a request or the model's defaults say otherwise.
    defaults["num_beams"] = 1
    if not emu.defaults.do_sample:
        defaults |= {"temperature": 0, "top_p": None}
    if sizes is not None and sizes.step is not None:
        defaults["height"], defaults["width"] = sizes.default
    return {
        "name": name,
        "family": emu.cfg.family,
        "paints": emu.paints,
        "instruct": emu.tokenizer.instruct,
        "image_size": native_side(emu.cfg) if emu.paints else None,
        "size_step": sizes.step if sizes is not None else None,
        "positions": emu.cfg.llama.context_length,
        "needs_key": needs_key,
        "defaults": defaults,
        "limits": {
            "max_new_tokens": limits.new_tokens,
            "max_images": limits.new_images,
            "num_beams": limits.beams,
            "num_inference_steps": limits.steps,
        },
        "examples": examples,
    }


def serve(
    checkpoint: Path,
    host: str,
    port: int,
    limits: Limits,
    names: Sequence[str] = (),
    *,
    slots: int = 8,
    image_slots: int | None = None,
    keys: Collection[str] = (),
    dtype: Literal["bfloat16", "float32"] = "float32",
    quantize: Literal["int8", "int4"] | None = None,
    warm_up: bool = True,
) -> None:
    """Loads the checkpoint and serves it until interrupted.

    Args:
        names: names that clients use for this server (`allowed_hosts`).
        slots: requests that are decoded at once.
        image_slots: images that are denoised at once; by default 1 on a CPU, where a batch of
            images is not faster than one after the other, and 4 elsewhere.
        keys: API keys; with none, everyone who reaches the server may use it.
        dtype, quantize: of the computation, and of the quantized matrices (`emu_jax.load`).
        warm_up: whether requests wait until programs are compiled (`Engine.warm_up`).

    Raises:
        UserError: the server cannot listen on the address, or the checkpoint cannot be loaded.
    """
    limits = dataclasses.replace(limits, connections=room_for_connections(limits.connections))
    with contextlib.ExitStack() as stack:
        sockets = listen(host, port)  # before loading, which takes minutes
        for opened in sockets:
            stack.callback(opened.close)
        # Batch size 1 and a few fixed shapes: any mix of requests compiles only a few programs.
        # On a CPU, the time to read a prompt is proportional to its padded length.
        length = 8 if on_cpu() else 64
        shapes = Shapes(length, bucket(limits.images), limits.new_tokens)
        emu = load(
            checkpoint,
            dtype=jnp.dtype(dtype),
            batch_size=1,
            shapes=shapes,
            quantize=quantize,
        )
        if image_slots is None:
            image_slots = 1 if on_cpu() else 4
        # The model's own defaults may exceed what a request may ask for.
        engine = Engine(
            emu,
            slots=slots,
            image_slots=image_slots,
            new_tokens=max(limits.new_tokens, emu.defaults.max_new_tokens),
            max_images=max(limits.new_images, emu.defaults.max_images),
        )
        gib = engine.cache_bytes / 2**30
        log.info("%d slots have a KV cache of %.2f GiB (--slots)", slots, gib)
        hosts = allowed_hosts(host, sockets, names)
        if hosts.addresses and not keys:
            log.warning("there is no authentication: anyone who can reach %s can use it", host)
        address = f"[{host}]" if ":" in host else host
        port = sockets[0].getsockname()[1]
        log.info("emu-jax serves %s at http://%s:%d", checkpoint, address, port)
        name = checkpoint.absolute().name
        examples = read_examples(checkpoint)
        app = make_app(
            engine, limits, hosts, keys=keys, name=name, examples=examples, warm_up=warm_up
        )
        try:
            make_server(app, limits).run(sockets)
        finally:
            app.state.worker.stop()
            app.state.worker.close(timeout=STOP_SECONDS)


def read_examples(checkpoint: Path) -> dict[str, Any]:
    """Returns the example prompts of a checkpoint: those of `examples.json`, or none."""
    path = checkpoint / _EXAMPLES
    if not path.is_file():
        return {}
    try:
        return read_json_object(path)
    except UserError as error:
        log.warning("the page has no examples: %s", error)
        return {}


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


def make_server(app: Starlette, limits: Limits) -> uvicorn.Server:
    """Returns a uvicorn server for `app` that bounds connections, times and shutdown."""
    config = uvicorn.Config(
        app,
        http=bounded_connections(limits, lambda: app.state.worker.stop(limits.drain_seconds)),
        ws="none",
        log_level="warning",
        timeout_keep_alive=5,
        timeout_graceful_shutdown=math.ceil(limits.drain_seconds + STOP_SECONDS),
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


class _Stream(StreamingResponse):
    """Streams an answer, and abandons it if the client is gone, even before the first part."""

    def __init__(self, content: AsyncIterator[str], media_type: str, ticket: Ticket) -> None:
        super().__init__(content, media_type=media_type)
        self._ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.leave()


async def _connected(request: Request, answer: Awaitable[T]) -> T:
    """Waits for an answer while the client is connected.

    Raises:
        ClientDisconnect: the client disconnected; its place in the queue is free.
        Refused: the request was refused or failed.
    """
    waiting = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ClientDisconnect
        return waiting.result()
    finally:
        for task in (waiting, leaving):
            task.cancel()
        await asyncio.wait({waiting, leaving})  # frees the place before returning


async def _first(request: Request, parts: AsyncIterator[Any]) -> list[Any]:
    """Waits for the first part of an answer (`_connected`). Returns [] if the answer is empty."""
    first = await _connected(request, anext(parts, _NOTHING))  # type: ignore[call-overload]
    return [] if first is _NOTHING else [first]


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole(pieces: AsyncIterator[str | Usage]) -> tuple[str, Usage]:
    """Returns the text of a chat completion and its usage."""
    texts, usage = [], Usage(0, 0, True)
    async for piece in pieces:
        if isinstance(piece, Usage):
            usage = piece
        else:
            texts.append(piece)
    return "".join(texts), usage


async def _chained(first: list[Any], parts: AsyncIterator[Any]) -> AsyncIterator[Any]:
    for part in first:
        yield part
    async for part in parts:
        yield part


async def _events(
    pieces: AsyncIterator[str | Usage], completion: Completion, ticket: Ticket
) -> AsyncIterator[str]:
    """Yields the events of a streamed chat completion. Those that are ready together are one text,
    which is sent at once."""
    writer = ChunkWriter(completion)
    ready = writer.start()
    try:
        async for piece in pieces:
            ready += "".join(writer.end(piece)) if isinstance(piece, Usage) else writer.text(piece)
            if not ticket.more:
                yield ready
                ready = ""
        if ready:
            yield ready
    except Refused as error:
        yield ready + event(error_json(error.status, str(error)))
    finally:
        ticket.leave()


async def _with_place(
    parts: AsyncIterator[Any], ticket: Ticket, worker: Worker
) -> AsyncIterator[Any]:
    """Yields the parts of an answer, and before the first one the place in the queue whenever it
    changes, or the warm-up ends."""
    first = asyncio.ensure_future(anext(parts, _NOTHING))  # type: ignore[call-overload]
    told = Waiting(0, None, False)
    try:
        while not (await asyncio.wait({first}, timeout=PLACE_SECONDS))[0]:
            place, warming_up = worker.place(ticket), worker.status == "warming up"
            if (place, warming_up) != (told.place, told.warming_up):
                told = Waiting(place, worker.wait_seconds(place), warming_up)
                yield told
        if first.result() is _NOTHING:
            return
        yield first.result()
        async for part in parts:
            yield part
    finally:
        first.cancel()
        await asyncio.wait({first})


async def _lines(first: list[Any], parts: AsyncIterator[Any], ticket: Ticket) -> AsyncIterator[str]:
    try:
        async for part in _chained(first, parts):
            if not isinstance(part, Usage):
                yield await _line(part)
        yield json.dumps({"done": True}) + "\n"
    except Refused as error:
        yield json.dumps({"error": str(error)}) + "\n"
    finally:
        ticket.leave()


async def _line(part: str | Image.Image | Preview | Waiting) -> str:
    if isinstance(part, str):
        return json.dumps({"text": part}) + "\n"
    if isinstance(part, Waiting):
        value = {"waiting": part.place, "seconds": part.seconds, "warming_up": part.warming_up}
        return json.dumps(value) + "\n"
    return await run_in_threadpool(_image_line, part)  # takes a tenth of a second


def _image_line(part: Image.Image | Preview) -> str:
    image = part.image if isinstance(part, Preview) else part
    file = io.BytesIO()
    image.save(file, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    if isinstance(part, Preview):
        value = {"preview": source, "step": part.step, "steps": part.steps}
        return json.dumps(value) + "\n"
    return json.dumps({IMAGE_KEY: source}) + "\n"


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error_response(request.scope["path"], error.status, str(error))


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(request.scope["path"], error.status_code, error.detail)


async def _ignore(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # the client is gone


async def _fail(request: Request, error: Exception) -> Response:
    # Starlette calls this handler outside the other middleware, and logs the error.
    response = error_response(request.scope["path"], 500, "internal error: see the server log")
    response.headers.update(HEADERS)
    return response
