"""Filters of `emu-jax data build`, and the re-encoding of images.

All functions depend on one document alone, so any runner may call them anywhere, in any order.
"""

from __future__ import annotations

import dataclasses
import io
import math
from typing import Any, NamedTuple

import PIL.Image

from emu_jax.data.documents import Document, Image, Text
from emu_jax.data.images import ImageError, is_animated, open_image
from emu_jax.data.sources.entries import look_up
from emu_jax.data.unused import Unused
from emu_jax.errors import UserError, suggest

ENCODINGS = ("jpeg", "webp", "png")
# Probabilities that LAION's labels of unsafe images stand for.
_NSFW_LABELS = {"UNLIKELY": 0.0, "UNSURE": 0.5, "NSFW": 1.0}
# Keys of (width, height) in metadata; the first pair that exists counts. img2dataset's `width` is
# that of the resized image.
_SIZES = (("original_width", "original_height"), ("width", "height"), ("WIDTH", "HEIGHT"))


@dataclasses.dataclass(frozen=True)
class CleanConfig:
    """Filters and encoding. A length, side or aspect ratio of 0 means no limit."""

    min_text: int = 0  # characters of all texts of a document together
    max_text: int = 0
    min_side: int = 0  # pixels of an image's short side
    max_aspect: float = 0.0  # long side over short side
    min_similarity: float = 0.32  # of an image to its text, if the data come with a score
    max_side: int = 512  # pixels of the long side; larger images are downscaled
    encoding: str = "jpeg"  # of downscaled images, and of formats that are not in ENCODINGS
    quality: int = 92  # of jpeg and webp

    # Filters by metadata: NAME.json of a webdataset sample, or the entry of a listing. Keys may be
    # nested with dots. A document without the value that a filter needs is rejected.
    min_original_side: int = 0  # pixels of the short side of the image before it was resized
    max_original_aspect: float = 0.0
    min_clip_score: float = 0.0  # similarity of image and text by CLIP; 0: no limit
    clip_score_key: str = "similarity"
    max_nsfw: float = 1.0  # probability; LAION's labels UNLIKELY, UNSURE, NSFW are 0, 0.5, 1
    nsfw_key: str = "punsafe"
    max_watermark: float = 1.0  # probability
    watermark_key: str = "pwatermark"
    languages: tuple[str, ...] = ()  # to keep, such as "en"; (): all
    language_key: str = "LANGUAGE"
    # Key of a hash of the image, such as "sha256" or a perceptual one. Of the documents with one
    # value, the first that passes the other filters by metadata is kept.
    duplicate_key: str = ""

    @property
    def reads_metadata(self) -> bool:
        """True if a filter reads the metadata of documents."""
        return bool(
            self.min_original_side
            or self.max_original_aspect
            or self.min_clip_score
            or min(self.max_nsfw, self.max_watermark) < 1
            or self.languages
        )

    def __post_init__(self) -> None:
        """Validates the encoding and its quality.

        Raises:
            UserError: the encoding is unknown, or the quality is out of range.
        """
        if self.encoding not in ENCODINGS:
            close = suggest(self.encoding, ENCODINGS)
            raise UserError(f"unknown encoding {self.encoding!r}{close}")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality must be in 1 .. 100, not {self.quality}")


class Unfit(Exception):
    """Raised for an image or a document that a filter rejects.

    Attributes:
        reason: one of a fixed set, to count by.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Dropped(NamedTuple):
    """An image that was removed from its document."""

    part: int  # of the document
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Cleaned:
    """Result of cleaning a document."""

    document: Document | None  # None: rejected
    reason: str = ""  # why it was rejected, one of a fixed set
    detail: str = ""
    images: int = 0  # number of images before cleaning
    encoded: int = 0  # number of kept images that were encoded again
    dropped: tuple[Dropped, ...] = ()
    unused: tuple[Unused, ...] = ()  # parts that the reader left out


def clean(document: Document, cfg: CleanConfig) -> Cleaned:
    """Filters a document and re-encodes its images.

    An image that fails a filter is removed from its document. A document is rejected if it loses
    its last image this way, or if its text fails a filter. Only the first frame of an animation
    is kept; the animation is counted in `unused`.
    """
    animations = tuple(
        Unused("frames of an animation", f"part {number}")
        for number, part in enumerate(document.parts)
        if isinstance(part, Image) and is_animated(part.data)
    )
    return dataclasses.replace(_filter(document, cfg), unused=document.unused + animations)


def _filter(document: Document, cfg: CleanConfig) -> Cleaned:
    count = sum(isinstance(part, Image) for part in document.parts)
    length = sum(len(part.text.strip()) for part in document.parts if isinstance(part, Text))
    if not count and not length:
        return Cleaned(None, "empty")
    if length < cfg.min_text:
        return Cleaned(None, "text too short", f"{length} characters", count)
    if 0 < cfg.max_text < length:
        return Cleaned(None, "text too long", f"{length} characters", count)
    parts: list[Text | Image] = []
    dropped: list[Dropped] = []
    encoded = 0
    for n, part in enumerate(document.parts):
        try:
            stored = part if isinstance(part, Text) else store(part, cfg)
        except Unfit as error:
            dropped.append(Dropped(n, error.reason, error.detail))
            continue
        parts.append(stored)
        encoded += stored is not part
    if count and len(dropped) == count:
        _, reason, detail = dropped[0]
        return Cleaned(None, reason, detail, count, dropped=tuple(dropped))
    return Cleaned(Document(tuple(parts)), images=count, encoded=encoded, dropped=tuple(dropped))


def check_metadata(metadata: dict[str, Any], cfg: CleanConfig) -> None:
    """Checks a document by its metadata alone.

    Raises:
        Unfit: it fails a filter, or lacks a value that a filter needs.
    """
    if cfg.min_original_side or cfg.max_original_aspect:
        known = [keys for keys in _SIZES if all(metadata.get(key) is not None for key in keys)]
        width, height = (_number(metadata, key) for key in (known or _SIZES)[0])
        short, long = sorted((width, height))
        if short < cfg.min_original_side:
            raise Unfit("original too small", f"{width:g}x{height:g}")
        if 0 < cfg.max_original_aspect * short < long:
            raise Unfit("original too narrow", f"{width:g}x{height:g}")
    if cfg.min_clip_score:
        score = _number(metadata, cfg.clip_score_key)
        if score < cfg.min_clip_score:
            raise Unfit("CLIP score too low", f"{score:.3f}")
    for most, key, reason in (
        (cfg.max_nsfw, cfg.nsfw_key, "unsafe"),
        (cfg.max_watermark, cfg.watermark_key, "watermark"),
    ):
        if most < 1 and (score := _number(metadata, key)) > most:
            raise Unfit(reason, f"{score:.3f}")
    if cfg.languages:
        language = look_up(metadata, cfg.language_key)
        if not isinstance(language, str):
            raise Unfit("no metadata", cfg.language_key)
        if language not in cfg.languages:
            raise Unfit("other language", language)


def _number(metadata: dict[str, Any], key: str) -> float:
    """Returns a number in the metadata.

    Raises:
        Unfit: there is none.
    """
    value = look_up(metadata, key)
    if isinstance(value, str):
        value = _NSFW_LABELS.get(value.strip().upper(), value)
    try:
        number = math.nan if value is None else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise Unfit("no metadata", key)
    return number


def store(image: Image, cfg: CleanConfig) -> Image:
    """Returns the image as it is stored.

    An image that is small enough and in one of ENCODINGS keeps its bytes, because encoding it
    again would only cost quality.

    Raises:
        Unfit: it fails a filter, or cannot be read.
    """
    if image.similarity is not None and image.similarity < cfg.min_similarity:
        raise Unfit("unlike its words", f"{image.similarity:.3f}")
    try:
        pixels = open_image(image.data)
    except ImageError as error:
        raise Unfit(error.reason, str(error)) from None
    short, long = sorted(pixels.size)
    size = "x".join(map(str, pixels.size))
    if short < cfg.min_side:
        raise Unfit("image too small", size)
    if 0 < cfg.max_aspect * short < long:
        raise Unfit("image too narrow", size)
    if 0 < cfg.max_side < long:
        scale = cfg.max_side / long
        width, height = (max(1, round(side * scale)) for side in pixels.size)
        pixels = pixels.resize((width, height), PIL.Image.Resampling.BICUBIC)
    elif _format(image.data) in ENCODINGS:
        return image
    file = io.BytesIO()
    pixels.save(file, cfg.encoding, quality=cfg.quality)
    return dataclasses.replace(image, data=file.getvalue())


def _format(data: bytes) -> str:
    with PIL.Image.open(io.BytesIO(data)) as image:
        return (image.format or "").lower()
