"""Parses and validates client requests before anything is computed.

A request is JSON. It cannot name a file: images and videos arrive as bytes, and text is only ever
text. Every error is a `Refused` with a 4xx status and a one-line message.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from PIL import Image

from emu_jax.config import EmuConfig
from emu_jax.data.images import open_image
from emu_jax.data.sources.video import FRAMES, open_container
from emu_jax.errors import UserError
from emu_jax.generate.image import image_shape, native_side
from emu_jax.generate.prompt import PromptPart, open_video
from emu_jax.generate.settings import MAX_SIDE, RENAMED, GenerationConfig
from emu_jax.tokenizer import ASSISTANT, BOS, EOS, IMAGE, IMG, IMG_END, PAD, UNK, USER

_IMAGE_FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "GIF",
    "BMP",
)  # of images; Pillow would accept more obscure ones
Ranges = Mapping[str, tuple[float, float]]
T = TypeVar("T")
IMAGE_KEY = "picture"  # JSON key of an image under /api, which other programs use
SPECIAL = (PAD, IMG, IMG_END, IMAGE, USER, ASSISTANT, BOS, EOS, UNK)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits on one request and on all waiting requests together."""

    connections: int = 1000  # beyond this, the longest idle one is closed
    header_seconds: float = 10.0  # from a connection or an answer to the next request's header
    per_client: int = 8  # concurrent requests of an address; none for loopback (proxies)
    body_bytes: int = 32 << 20
    bodies_bytes: int = 128 << 20  # of all arriving bodies; beyond this, the oldest is refused
    body_seconds: float = 30.0  # for a body to arrive
    parts: int = 64
    text_characters: int = 8000  # of all texts together
    images: int = 16  # including video frames
    pixels: int = 25_000_000  # of all images and frames together
    video_seconds: float = 20.0  # to open a video, and again to decode its frames
    new_tokens: int = 256
    new_images: int = 4  # of a continuation
    beams: int = 8
    image_area: float = 2.0  # of a generated image, as a multiple of the model's own size
    image_side: float = 0.25  # of a generated image, at least, as a fraction of the model's own
    image_sizes: int = 16  # of generated images; each compiles programs
    steps: int = 100  # of diffusion sampling
    waiting: int = 64  # requests running or waiting
    seconds: float = 120.0  # from arrival to the end of the answer
    per_minute: int = 0  # requests of a client; 0: no limit
    drain_seconds: float = 3.0  # for running answers, when the server shuts down

    def __post_init__(self) -> None:
        """Checks the limits that a command line may set.

        Raises:
            UserError: one is out of range.
        """
        if self.waiting < 1 or self.seconds <= 0:
            raise UserError("--waiting and --seconds must be positive")
        if self.per_minute < 0 or self.drain_seconds < 0:
            raise UserError("--per-minute and --drain must not be negative")


class ImageSizes:
    """The sizes of images that a server generates.

    Only a decoder that is conditioned on sizes (SDXL's) generates other sizes than its own. Each
    compiles programs, so a server generates at most `Limits.image_sizes` of them.

    Attributes:
        default: height and width, in pixels, where a request names none.
        step: pixels that a height and a width are multiples of; None if there are no other sizes.
    """

    def __init__(self, cfg: EmuConfig, defaults: GenerationConfig, limits: Limits) -> None:
        assert cfg.unet is not None and cfg.vae is not None
        self.default = image_shape(cfg, defaults.height, defaults.width)
        self.step = cfg.vae.downscale if cfg.unet.takes_sizes else None
        self._pixels = int(limits.image_area * self.default[0] * self.default[1])
        self._side = limits.image_side * native_side(cfg)
        self._most, self._generated = limits.image_sizes, frozenset({self.default})

    def check(self, settings: Mapping[str, Any]) -> None:
        """Checks the `height` and `width` of settings.

        Raises:
            Refused: the model or the server does not generate images of this size.
        """
        size = self._size(settings)
        if size in self._generated:
            return
        if self.step is None:
            height, width = self.default
            raise Refused(400, f"size must be {width}x{height}, the size of the model's images")
        if (
            any(side % self.step or not self._side <= side <= MAX_SIDE for side in size)
            or size[0] * size[1] > self._pixels
        ):
            limits = (
                f"multiples of {self.step} pixels from {self._side:g} to {MAX_SIDE}, at most "
                f"{self._pixels} pixels in all"
            )
            raise Refused(400, f"size cannot be {size[1]}x{size[0]}: give {limits}")
        if len(self._generated) >= self._most:
            known = ", ".join(f"{w}x{h}" for h, w in sorted(self._generated))
            raise Refused(400, f"the server generates no more sizes: use one of {known}")

    def counted(self, parts: Iterable[T], settings: Mapping[str, Any]) -> Iterator[T]:
        """Yields the parts of an answer, and counts the size of its settings as generated.

        The size is used up with the first part: a request that only waits, or that is refused when
        its answer starts, uses up none.

        Raises:
            Refused: the server does not generate images of this size (`check`).
        """
        self.check(settings)  # others may have started meanwhile
        for part in parts:
            self._generated |= {self._size(settings)}
            yield part

    def _size(self, settings: Mapping[str, Any]) -> tuple[int, int]:
        height, width = self.default
        return settings.get("height", height), settings.get("width", width)


class Refused(Exception):
    """Raised for a request that the server refuses or cannot complete.

    Attributes:
        status: the HTTP status code.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a chat, by the user or the assistant."""

    said_by_user: bool
    parts: list[PromptPart]


@dataclasses.dataclass(frozen=True)
class ParsedRequest:
    """A parsed request: one message as a prompt, or a chat that ends with the user.

    Attributes:
        system: the system message; None: the model's default.
        progress: whether to tell the place in the queue, and to send previews of images.
        stops: texts that end the answer.
    """

    messages: list[Message]
    settings: dict[str, Any]
    system: str | None = None
    progress: bool = False
    stops: tuple[str, ...] = ()


def parse_chat(body: bytes, limits: Limits, special: Collection[str] = SPECIAL) -> ParsedRequest:
    """Parses a chat request.

    `{"messages": [{"role": "user" | "assistant", "parts": [PART, ...]}, ...],
    "settings": {"max_new_tokens": ..., "seed": ...}, "progress": false}`; a PART is
    `{"text": ...}`, or `{"picture": ...}` or `{"video": ...}` with a file in base64. Other settings
    are `temperature`, `top_p` and `num_beams`.

    Args:
        special: tokens that a text must not spell.

    Raises:
        Refused: the body is malformed or exceeds the limits.
    """
    values = json_object(parse_json(body), "the request", {"messages", "settings", "progress"})
    given = values.get("messages")
    if not isinstance(given, list) or not given:
        raise Refused(400, "messages must be a non-empty list")
    room = Room(limits, special)
    messages = []
    for number, message in enumerate(given):
        message = json_object(message, "a message", {"role", "parts"})
        expected = ("user", "assistant")[number % 2]
        if message.get("role") != expected:
            raise Refused(400, f"messages[{number}].role must be {expected!r}: they take turns")
        messages.append(Message(expected == "user", room.parts(message.get("parts"))))
    if not messages[-1].said_by_user:
        raise Refused(400, "the last message must be the user's")
    settings = sampling(_settings(values, _text_ranges(limits) | {"num_beams": (1, limits.beams)}))
    return ParsedRequest(messages, settings, progress=_progress(values))


def parse_draw(
    body: bytes,
    limits: Limits,
    special: Collection[str] = SPECIAL,
    sizes: ImageSizes | None = None,
) -> ParsedRequest:
    """Parses a request for an image.

    `{"parts": [PART, ...], "settings": {"seed": ..., "guidance_scale": ...,
    "num_inference_steps": ..., "height": ..., "width": ...}}`; a PART is that of `parse_chat`. The
    former names `guidance` and `steps` are accepted too.

    Args:
        special: tokens that a text must not spell.
        sizes: of the images that are generated; None: the model generates none.

    Raises:
        Refused: the body is malformed or exceeds the limits.
    """
    values = json_object(parse_json(body), "the request", {"parts", "settings", "progress"})
    parts = Room(limits, special).parts(values.get("parts"))
    settings = _settings(values, _image_ranges(limits))
    _check_size(settings, sizes)
    return ParsedRequest([Message(True, parts)], settings, progress=_progress(values))


def parse_continue(
    body: bytes,
    limits: Limits,
    special: Collection[str] = SPECIAL,
    sizes: ImageSizes | None = None,
) -> ParsedRequest:
    """Parses a request to continue a prompt with text and images.

    It is that of `parse_draw`, with the settings of text too, and `max_images`.

    Args:
        special: tokens that a text must not spell.
        sizes: of the images that are generated; None: the model generates none.

    Raises:
        Refused: the body is malformed or exceeds the limits.
    """
    values = json_object(parse_json(body), "the request", {"parts", "settings", "progress"})
    parts = Room(limits, special).parts(values.get("parts"))
    allowed = _text_ranges(limits) | _image_ranges(limits) | {"max_images": (0, limits.new_images)}
    settings = sampling(_settings(values, allowed))
    _check_size(settings, sizes)
    return ParsedRequest([Message(True, parts)], settings, progress=_progress(values))


def _check_size(settings: dict[str, Any], sizes: ImageSizes | None) -> None:
    if sizes is not None:
        sizes.check(settings)


def _text_ranges(limits: Limits) -> dict[str, tuple[float, float]]:
    return {
        "max_new_tokens": (1, limits.new_tokens),
        "seed": (0, 2**31 - 1),
        "temperature": (0.0, 2.0),
        "top_p": (0.0, 1.0),
    }


def _image_ranges(limits: Limits) -> dict[str, tuple[float, float]]:
    allowed: dict[str, tuple[float, float]] = {
        "seed": (0, 2**31 - 1),
        "guidance_scale": (0.0, 30.0),
        "num_inference_steps": (1, limits.steps),
        "height": (1, MAX_SIDE),
        "width": (1, MAX_SIDE),
    }
    return allowed | {old: allowed[new] for old, new in RENAMED.items() if new in allowed}


def _progress(values: dict[str, Any]) -> bool:
    progress = values.get("progress", False)
    if not isinstance(progress, bool):
        raise Refused(400, "progress must be true or false")
    return progress


def parse_json(body: bytes) -> Any:
    """Returns the value of a JSON body.

    Raises:
        Refused: it is not JSON.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {type(error).__name__}") from None


def json_object(value: Any, what: str, known: set[str] | None = None) -> dict[str, Any]:
    """Returns an object of JSON.

    Raises:
        Refused: it is not an object, or has a key that is not in `known`.
    """
    if not isinstance(value, dict):
        raise Refused(400, f"{what} must be a JSON object")
    if known is None:
        return value
    if unknown := sorted(set(value) - known):
        raise Refused(400, f"{what} has an unknown key {unknown[0][:40]!r}; known: {sorted(known)}")
    return value


def _settings(values: dict[str, Any], allowed: Ranges) -> dict[str, Any]:
    settings = json_object(values.get("settings", {}), "settings", set(allowed))
    settings = check_settings(settings, allowed, "settings.")
    return {RENAMED.get(name, name): value for name, value in settings.items()}


def check_settings(settings: dict[str, Any], allowed: Ranges, prefix: str) -> dict[str, Any]:
    """Returns settings that are in their ranges; a float's range has floats as its ends.

    Raises:
        Refused: a setting, whose name follows `prefix`, is not a number in its range.
    """
    for name, value in settings.items():
        lowest, highest = allowed[name]
        kinds = (int, float) if isinstance(lowest, float) else (int,)
        right = isinstance(value, kinds) and not isinstance(value, bool)
        if not right or not lowest <= value <= highest:  # also refuses NaN
            raise Refused(400, f"{prefix}{name} must be from {lowest} to {highest}")
    return settings


def sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns settings in which a temperature or top_p means sampling, and 0 of either, greedy
    decoding."""
    if "temperature" not in settings and "top_p" not in settings:
        return settings
    sampled = settings.get("temperature", 1.0) > 0 and settings.get("top_p", 1.0) > 0
    if not sampled:
        settings = {n: v for n, v in settings.items() if n not in ("temperature", "top_p")}
    return settings | {"do_sample": sampled}


class Room:
    """Counts what a request contains and refuses whatever exceeds the limits."""

    def __init__(self, limits: Limits, special: Collection[str]) -> None:
        self.limits, self.special = limits, special
        self.count, self.characters, self.images, self.pixels = 0, 0, 0, 0

    def parts(self, given: Any) -> list[PromptPart]:
        if not isinstance(given, list) or not given:
            raise Refused(400, "parts must be a list of texts, images and videos")
        return [self.part(part) for part in given]

    def part(self, given: Any) -> PromptPart:
        self.count += 1
        if self.count > self.limits.parts:
            raise Refused(413, f"more than {self.limits.parts} parts")
        part = json_object(given, "a part", {"text", IMAGE_KEY, "video"})
        if len(part) != 1:
            raise Refused(400, f"a part is one of text, {IMAGE_KEY} and video")
        ((kind, value),) = part.items()
        if not isinstance(value, str):
            raise Refused(400, f"a {kind} must be a string")
        return {"text": self.text, IMAGE_KEY: self.image, "video": self.video}[kind](value)

    def text(self, text: str) -> str:
        self.characters += len(text)
        if self.characters > self.limits.text_characters:
            raise Refused(413, f"more than {self.limits.text_characters} characters of text")
        if spelled := [token for token in self.special if token in text]:
            raise Refused(400, f"a text must not spell {spelled[0]}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Refused(400, "a text has half of a surrogate pair") from None
        return text

    def image(self, value: str) -> Image.Image:
        content = self._file(value, IMAGE_KEY)
        try:
            with Image.open(io.BytesIO(content), formats=_IMAGE_FORMATS) as image:
                self._fits(*image.size)
            return open_image(content)
        except Image.DecompressionBombError:
            raise Refused(413, f"an image of more than {self.limits.pixels} pixels") from None
        except (UserError, OSError, SyntaxError, ValueError):
            raise Refused(
                400, f"an image is damaged, or not one of {', '.join(_IMAGE_FORMATS)}"
            ) from None

    def video(self, value: str) -> list[Image.Image]:
        content = self._file(value, "video")
        size = _video_size(content)
        self._more(FRAMES - 1)
        self._fits(*size, FRAMES)
        try:
            return open_video(content, "video", self.limits.video_seconds)
        except UserError:
            raise Refused(400, "a video cannot be read") from None

    def _file(self, value: str, kind: str) -> bytes:
        self._more(1)
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise Refused(400, f"a {kind} must be base64") from None

    def _more(self, images: int) -> None:
        self.images += images
        if self.images > self.limits.images:
            raise Refused(413, f"more than {self.limits.images} images and frames")

    def _fits(self, width: int, height: int, frames: int = 1) -> None:
        self.pixels += width * height * frames
        if self.pixels > self.limits.pixels:
            size = f"{width}x{height} pixels" + (f" in {frames} frames" if frames > 1 else "")
            raise Refused(413, f"{size}: at most {self.limits.pixels} in all")


def _video_size(content: bytes) -> tuple[int, int]:
    import av.error

    try:
        with open_container(content) as container:
            stream = container.streams.best("video")  # the stream that open_video decodes
            return stream.width, stream.height
    except (av.error.FFmpegError, AttributeError, ValueError):
        raise Refused(400, "a video cannot be read") from None


def joined_parts(messages: Sequence[Message]) -> list[PromptPart]:
    """Concatenates the parts of all messages, the prompt for a model without chat tuning."""
    return [part for message in messages for part in message.parts]
