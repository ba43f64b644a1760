"""What `emu-jax data build` keeps of a document, and how its pictures are stored.

Functions of one document alone: any runner may call them, anywhere and in any order.
"""

from __future__ import annotations

import dataclasses
import io
from typing import NamedTuple

from PIL import Image

from emu_jax.config import UserError, suggest
from emu_jax.data.documents import Document, Picture, Text
from emu_jax.data.images import PictureError, is_animated, open_image
from emu_jax.data.unused import Unused

ENCODINGS = ("jpeg", "webp", "png")


@dataclasses.dataclass(frozen=True)
class CleanConfig:
    """The filters and the encoding. A length, side or aspect of 0 is no limit."""

    min_text: int = 0  # characters of all texts of a document together
    max_text: int = 0
    min_side: int = 0  # pixels of a picture's short side
    max_aspect: float = 0.0  # of its long side over its short one
    min_similarity: float = 0.32  # to its words, where the data come with a score
    max_side: int = 512  # pixels of the long side; larger pictures are made smaller
    encoding: str = "jpeg"  # of those, and of what is in another format than ENCODINGS
    quality: int = 92  # of jpeg and webp

    def check(self) -> None:
        """
        Raises:
            UserError: a value cannot be.
        """
        if self.encoding not in ENCODINGS:
            close = suggest(self.encoding, ENCODINGS)
            raise UserError(f"unknown encoding {self.encoding!r}{close}")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality must be in 1 .. 100, not {self.quality}")


class Unfit(Exception):
    """A picture that does not pass: `reason` is a few words of a fixed set, to count by."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Dropped(NamedTuple):
    """A picture that was taken out of its document."""

    part: int  # of the document
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Cleaned:
    """What became of a document."""

    document: Document | None  # None: rejected
    reason: str = ""  # why it was rejected, of a fixed set
    detail: str = ""
    pictures: int = 0  # that it came with
    encoded: int = 0  # of those it keeps, the ones that are not as they came
    dropped: tuple[Dropped, ...] = ()
    unused: tuple[Unused, ...] = ()  # what its reader left out


def clean(document: Document, cfg: CleanConfig) -> Cleaned:
    """Filters a document and stores its pictures anew.

    A picture that does not pass is taken out of its document; a document that so loses its
    last picture is rejected, and so is one whose words do not pass. Of an animation the first frame
    is read, and the others are counted.
    """
    animations = tuple(
        Unused("frames of an animation", f"part {number}")
        for number, part in enumerate(document.parts)
        if isinstance(part, Picture) and is_animated(part.data)
    )
    return dataclasses.replace(_filter(document, cfg), unused=document.unused + animations)


def _filter(document: Document, cfg: CleanConfig) -> Cleaned:
    count = sum(isinstance(part, Picture) for part in document.parts)
    length = sum(len(part.text.strip()) for part in document.parts if isinstance(part, Text))
    if not count and not length:
        return Cleaned(None, "empty")
    if length < cfg.min_text:
        return Cleaned(None, "text too short", f"{length} characters", count)
    if 0 < cfg.max_text < length:
        return Cleaned(None, "text too long", f"{length} characters", count)
    parts: list[Text | Picture] = []
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
    return Cleaned(Document(tuple(parts)), pictures=count, encoded=encoded, dropped=tuple(dropped))


def store(picture: Picture, cfg: CleanConfig) -> Picture:
    """The picture as it is stored.

    One that is small enough and in one of ENCODINGS keeps its bytes: to encode it once more
    would only cost quality.

    Raises:
        Unfit: it does not pass.
    """
    if picture.similarity is not None and picture.similarity < cfg.min_similarity:
        raise Unfit("unlike its words", f"{picture.similarity:.3f}")
    try:
        pixels = open_image(picture.data)
    except PictureError as error:
        raise Unfit(error.reason, str(error)) from None
    short, long = sorted(pixels.size)
    size = "x".join(map(str, pixels.size))
    if short < cfg.min_side:
        raise Unfit("picture too small", size)
    if 0 < cfg.max_aspect * short < long:
        raise Unfit("picture too narrow", size)
    if 0 < cfg.max_side < long:
        scale = cfg.max_side / long
        width, height = (max(1, round(side * scale)) for side in pixels.size)
        pixels = pixels.resize((width, height), Image.Resampling.BICUBIC)
    elif _format(picture.data) in ENCODINGS:
        return picture
    file = io.BytesIO()
    pixels.save(file, cfg.encoding, quality=cfg.quality)
    return dataclasses.replace(picture, data=file.getvalue())


def _format(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as picture:
        return (picture.format or "").lower()
