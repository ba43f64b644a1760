"""Requests and answers of the OpenAI-compatible endpoints.

`/v1/chat/completions` takes texts and images, as data URLs, and answers with text, whole or
streamed. `/v1/images/generations` takes a text and answers with an image. Fields that would have no
effect here are refused, except those of `IGNORED`, which change nothing anywhere.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import random
import re
import secrets
import time
from collections.abc import AsyncIterator, Collection, Iterator
from typing import Any

from PIL import Image

from emu_jax.generate.engine import Usage
from emu_jax.serve.requests import (
    IMAGE_KEY,
    ImageSizes,
    Limits,
    Message,
    ParsedRequest,
    Refused,
    Room,
    check_settings,
    json_object,
    parse_json,
    sampling,
)

IGNORED = ("user", "metadata", "store", "service_tier", "quality", "style", "background")
# Fields with one supported value, which is the default.
FIXED: dict[str, tuple[Any, ...]] = {
    "n": (1, None),
    "logprobs": (False, None),
    "frequency_penalty": (0, 0.0, None),
    "presence_penalty": (0, 0.0, None),
    "logit_bias": ({}, None),
    "response_format": ({"type": "text"}, None),
    "tools": ([], None),
}
MAX_STOPS = 4
STOP_CHARACTERS = 100
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")  # width and height of an image
DATA_URL = re.compile(r"data:image/[a-z.+-]+;base64,", re.IGNORECASE)
ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
ERROR_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


@dataclasses.dataclass(frozen=True)
class Completion:
    """Options of a chat completion.

    Attributes:
        stops: texts that end the answer, and are not part of it.
        max_new_tokens: its limit of tokens, which tells an answer that was cut off.
    """

    model: str
    stream: bool
    include_usage: bool
    stops: tuple[str, ...]
    max_new_tokens: int


def parse_completion(
    body: bytes,
    limits: Limits,
    special: Collection[str],
    *,
    model: str,
    max_new_tokens: int,
    instruct: bool,
) -> tuple[ParsedRequest, Completion]:
    """Parses a request to `/v1/chat/completions`.

    Args:
        model: the name of the model that is served.
        max_new_tokens: limit of tokens where the request names none.
        instruct: whether the model takes system messages.

    Raises:
        Refused: the body is malformed, asks for what is not supported, or exceeds the limits.
    """
    known = {"model", "messages", "stream", "stream_options", "max_tokens", "stop", "seed"}
    known |= {"max_completion_tokens", "temperature", "top_p"}
    values = _fields(body, known)
    _check_model(values, model)
    value = values.get("messages")
    if not isinstance(value, list) or not value:
        raise Refused(400, "messages must be a non-empty list")
    room, system, messages = Room(limits, special), None, []
    for number, each in enumerate(value):
        message = json_object(each, f"messages[{number}]", {"role", "content", "name", "refusal"})
        role, parts = message.get("role"), _parts(message.get("content"), room, number)
        if number == 0 and role in ("system", "developer"):
            if not all(isinstance(part, str) for part in parts):
                raise Refused(400, "messages[0]: a system message must be text")
            system = "".join(map(str, parts))
            continue
        expected = ("user", "assistant")[len(messages) % 2]
        if role != expected:
            raise Refused(400, f"messages[{number}].role must be {expected!r}: they take turns")
        messages.append(Message(expected == "user", parts))
    if not messages or not messages[-1].said_by_user:
        raise Refused(400, "the last message must be the user's")
    if system is not None and not instruct:
        raise Refused(400, "messages[0]: a system message needs an instruction-tuned model")

    allowed = {
        "max_tokens": (1, limits.new_tokens),
        "max_completion_tokens": (1, limits.new_tokens),
        "temperature": (0.0, 2.0),
        "top_p": (0.0, 1.0),
        "seed": (0, 2**31 - 1),
    }
    settings = {name: values[name] for name in allowed if values.get(name) is not None}
    settings = check_settings(settings, allowed, "")
    for name in ("max_tokens", "max_completion_tokens"):
        if name in settings:
            settings["max_new_tokens"] = settings.pop(name)
    settings = sampling(settings)
    if settings.get("do_sample"):
        settings.setdefault("seed", secrets.randbits(31))
    stops = _stops(values.get("stop"))
    completion = Completion(
        model,
        _flag(values, "stream"),
        _flag(json_object(values.get("stream_options") or {}, "stream_options"), "include_usage"),
        stops,
        settings.get("max_new_tokens", max_new_tokens),
    )
    return ParsedRequest(messages, settings, system, stops=stops), completion


def parse_generation(
    body: bytes, limits: Limits, special: Collection[str], *, model: str, sizes: ImageSizes
) -> ParsedRequest:
    """Parses a request to `/v1/images/generations`.

    Beside OpenAI's fields it may set `seed`, `guidance_scale` and `num_inference_steps`.

    Args:
        sizes: of the images that are generated.

    Raises:
        Refused: the body is malformed, asks for what is not supported, or exceeds the limits.
    """
    names = ("seed", "guidance_scale", "num_inference_steps")
    values = _fields(body, {"model", "prompt", "size", *names}, format=("b64_json", None))
    _check_model(values, model)
    prompt = values.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise Refused(400, "prompt must be a text")
    allowed = {
        "seed": (0, 2**31 - 1),
        "guidance_scale": (0.0, 30.0),
        "num_inference_steps": (1, limits.steps),
    }
    settings = {name: values[name] for name in names if values.get(name) is not None}
    settings = check_settings(settings, allowed, "")
    settings.setdefault("seed", secrets.randbits(31))
    if (size := values.get("size")) not in (None, "auto"):
        sides = _SIZE.fullmatch(size) if isinstance(size, str) else None
        if sides is None or not all(map(int, sides.groups())):
            raise Refused(400, "size must be WIDTHxHEIGHT in pixels, such as 512x512, or auto")
        settings["width"], settings["height"] = map(int, sides.groups())
    messages = [Message(True, [Room(limits, special).text(prompt)])]
    sizes.check(settings)
    return ParsedRequest(messages, settings)


def _fields(
    body: bytes, known: set[str], format: tuple[Any, ...] = FIXED["response_format"]
) -> dict[str, Any]:
    """Returns a request's fields, without those that change nothing."""
    fixed = FIXED | {"response_format": format}
    values = json_object(parse_json(body), "the request", known | set(fixed) | set(IGNORED))
    for name, supported in fixed.items():
        if name in values and values[name] not in supported:
            raise Refused(400, f"{name} must be {json.dumps(supported[0])}: others have no effect")
    return {name: value for name, value in values.items() if name in known}


def _check_model(values: dict[str, Any], model: str) -> None:
    value = values.get("model", model)
    if value != model:
        raise Refused(404, f"there is no model {str(value)[:100]!r}: this server has {model!r}")


def _parts(content: Any, room: Room, number: int) -> list[Any]:
    where = f"messages[{number}].content"
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise Refused(400, f"{where} must be a text or a list of texts and images")
    parts = []
    for part in content:
        part = json_object(part, where, {"type", "text", "image_url"})
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(room.part({"text": part["text"]}))
        elif kind == "image_url":
            image = json_object(part.get("image_url"), f"{where}: image_url", {"url", "detail"})
            url = image.get("url")
            if not isinstance(url, str) or not (start := DATA_URL.match(url)):
                message = "give a data URL (data:image/png;base64,...): no other URL is fetched"
                raise Refused(400, f"{where}: image_url: {message}")
            parts.append(room.part({IMAGE_KEY: url[start.end() :]}))
        else:
            raise Refused(400, f"{where}: a part is of the type text or image_url")
    return parts


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(s, str) and 0 < len(s) <= STOP_CHARACTERS for s in stops)
    ):
        limits = f"{MAX_STOPS} texts of 1 to {STOP_CHARACTERS} characters"
        raise Refused(400, f"stop must be a text or a list of at most {limits}")
    return tuple(stops)


def _flag(values: dict[str, Any], name: str) -> bool:
    value = values.get(name)
    if value not in (None, True, False):
        raise Refused(400, f"{name} must be true or false")
    return bool(value)


class Trimmer:
    """Cuts a streamed text at the first stop text, and drops white space around it.

    Whatever may be the beginning of a stop text, or white space at the end, is held back until more
    text decides.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held, self._started = "", False
        self.stopped = False

    def push(self, text: str) -> str:
        """Returns the text that is now known to belong to the answer."""
        if self.stopped:
            return ""
        self._held += text
        if not self._started:
            self._held = self._held.lstrip()
        ends = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, self._held[: min(ends)]
            return self._release(len(self._held.rstrip()))
        held = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        return self._release(len(self._held[: len(self._held) - held].rstrip()))

    def end(self) -> str:
        """Returns the rest of the text."""
        return "" if self.stopped else self._release(len(self._held.rstrip()))

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        self._started |= bool(released)
        return released


def _overlap(text: str, stop: str) -> int:
    """Returns how many characters at the end of a text begin a stop text."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)


async def completion_pieces(
    parts: AsyncIterator[Any], completion: Completion
) -> AsyncIterator[str | Usage]:
    """Yields the texts of an answer up to a stop text, then its usage."""
    trimmer, usage = Trimmer(completion.stops), Usage(0, 0, True)
    async for part in parts:
        if isinstance(part, str):
            if text := trimmer.push(part):
                yield text
        elif isinstance(part, Usage):
            usage = part
    if text := trimmer.end():
        yield text
    yield dataclasses.replace(usage, ended=usage.ended or trimmer.stopped)


def completion_id() -> str:
    """Returns an identifier of a chat completion."""
    return f"chatcmpl-{random_hex(12)}"


def random_hex(size: int) -> str:
    """Returns random bytes for an identifier, in hexadecimal digits. They can be guessed.

    Those of the operating system cannot, but reading them releases the interpreter, and the thread
    then waits until another one gives it back.
    """
    return random.randbytes(size).hex()


def completion_json(text: str, usage: Usage, completion: Completion) -> dict[str, Any]:
    """Returns a whole chat completion."""
    message = {"role": "assistant", "content": text, "refusal": None}
    reason = _finish_reason(usage, completion)
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    return {
        "id": completion_id(),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": completion.model,
        "choices": [choice],
        "usage": _usage_json(usage),
    }


class ChunkWriter:
    """Writes a streamed chat completion as server-sent events."""

    def __init__(self, completion: Completion) -> None:
        self._completion = completion
        self._common = {
            "id": completion_id(),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": completion.model,
        }

    def start(self) -> str:
        """Returns the first event, which names the role."""
        return self._chunk({"role": "assistant", "content": ""})

    def text(self, text: str) -> str:
        """Returns the event of a text."""
        return self._chunk({"content": text})

    def end(self, usage: Usage) -> Iterator[str]:
        """Yields the last events."""
        yield self._chunk({}, _finish_reason(usage, self._completion))
        if self._completion.include_usage:
            yield event(self._common | {"choices": [], "usage": _usage_json(usage)})
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event(self._common | {"choices": [choice]})


def event(value: dict[str, Any]) -> str:
    """Returns a server-sent event with a JSON value."""
    return f"data: {json.dumps(value)}\n\n"


def image_json(image: Image.Image) -> dict[str, Any]:
    """Returns the answer to a request for an image."""
    file = io.BytesIO()
    image.save(file, "PNG")
    content = base64.b64encode(file.getvalue()).decode()
    return {"created": int(time.time()), "data": [{"b64_json": content}]}


def models_json(model: str, created: int) -> dict[str, Any]:
    """Returns the list of models: the one that is served."""
    entry = {"id": model, "object": "model", "created": created, "owned_by": "emu_jax"}
    return {"object": "list", "data": [entry]}


def error_json(status: int, message: str) -> dict[str, Any]:
    """Returns an error in OpenAI's shape."""
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {"message": message, "type": kind, "param": None, "code": ERROR_CODES.get(status)}
    return {"error": error}


def _finish_reason(usage: Usage, completion: Completion) -> str:
    cut_off = not usage.ended and usage.completion_tokens >= completion.max_new_tokens
    return "length" if cut_off else "stop"


def _usage_json(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
