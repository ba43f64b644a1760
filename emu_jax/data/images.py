"""Pictures: the release's preprocessing, and augmentation.

The release squashes a picture to a square (bicubic, no crop) and normalises it with CLIP's
mean and deviation (`Emu1/utils.py: process_img`, `Emu1/models/pipeline.py`). Here pictures
stay uint8 until they are on the device, where `normalize_images` does the second half.
"""

from __future__ import annotations

import io
import math
import os
import struct

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from emu_jax.config import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# What is larger is taken for an attack on the decoder's memory, and what is narrower for no
# picture: squashed to a square it shows nothing.
MOST_PIXELS = 89_478_485  # where Pillow begins to warn
MOST_ASPECT = 100.0

# What Pillow raises on files that are missing, cut short or damaged.
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error)


class PictureError(UserError):
    """A picture that cannot be read; `reason` is one of `documents.REASONS`."""

    def __init__(self, line: str, reason: str = "unreadable picture"):
        super().__init__(line)
        self.reason = reason


def normalize_images(
    images: UInt8[Array, "*batch h w 3"], dtype: jnp.dtype = jnp.float32
) -> Float[Array, "*batch h w 3"]:
    """RGB in 0..255 to what the visual encoder reads; computed in float32."""
    pixels = jnp.asarray(images).astype(jnp.float32) / 255
    return ((pixels - jnp.asarray(CLIP_MEAN)) / jnp.asarray(CLIP_STD)).astype(dtype)


def open_image(
    source: str | os.PathLike | bytes, where: str | None = None, *, at_least: int | None = None
) -> Image.Image:
    """A PIL picture in mode RGB, or L when the source is 8-bit grey.

    Args:
        where: what an error names, by default the file.
        at_least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as each side
            keeps so many pixels. Several times as fast, and the pixels differ slightly.

    Raises:
        PictureError: it cannot be read, or is too large or too narrow to be one.
    """
    name = where or (f"({len(source)} bytes)" if isinstance(source, bytes) else str(source))
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file) as picture:
            width, height = picture.size
            if width * height > MOST_PIXELS:
                raise Image.DecompressionBombError(f"{width}x{height} pixels are too many")
            if max(width, height) > MOST_ASPECT * min(width, height):
                raise PictureError(
                    f"cannot read the picture {name}: {width}x{height} is too narrow",
                    "picture too narrow",
                )
            if at_least is not None:
                picture.draft("RGB", (at_least, at_least))
            picture.load()
            # Else Pillow warns of transparency that RGB drops, as the release drops it.
            picture.info.pop("transparency", None)
            # `convert` copies even what is right already.
            return picture if picture.mode in ("L", "RGB") else picture.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(
            f"cannot read the picture {name}: {error}", "picture too large"
        ) from None
    except _UNREADABLE as error:
        reason = str(error)
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "it is in no picture format known here"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise PictureError(f"cannot read the picture {name}: {reason}") from None


def resize(picture: Image.Image, size: int, *, fast: bool = False) -> Image.Image:
    """The release's preprocessing: squashed to size x size, bicubic (bilinear if `fast`)."""
    if picture.mode not in ("L", "RGB"):
        picture = picture.convert("RGB")
    method = Image.Resampling.BILINEAR if fast else Image.Resampling.BICUBIC
    return picture.resize((size, size), method)


def to_array(picture: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels; grey becomes RGB of equal parts."""
    pixels = np.asarray(picture)
    return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels


def load_image(
    source: str | os.PathLike | bytes | Image.Image, size: int, where: str | None = None
) -> UInt8[np.ndarray, "size size 3"]:
    """A file, its bytes or a PIL picture, preprocessed as the release does.

    Raises:
        UserError: the picture cannot be read; the line names it.
    """
    picture = source if isinstance(source, Image.Image) else open_image(source, where)
    return to_array(resize(picture, size))


def draw_affine(
    rng: np.random.Generator, *, rotate: float, scale: float, shift: float
) -> tuple[float, float, float, float]:
    """Draws the arguments of `affine`: (angle, factor, right, down).

    Args:
        rotate: the largest angle, in degrees, either way.
        scale: the largest change of size, as a fraction, either way.
        shift: the largest move along each side, as a fraction of it, either way.
    """
    angle, grow, right, down = rng.uniform(-1, 1, 4).tolist()
    return angle * rotate, 1 + grow * scale, right * shift, down * shift


def affine(
    picture: Image.Image, angle: float, factor: float, right: float, down: float
) -> Image.Image:
    """Turns a picture clockwise and scales it about its middle, then moves it.

    `angle` in degrees, `right` and `down` as fractions of the sides. What comes in from
    outside is black.
    """
    width, height = picture.size
    turn = math.radians(angle)
    cos, sin = math.cos(turn) / factor, math.sin(turn) / factor
    x, y = width * (0.5 + right), height * (0.5 + down)  # where the middle goes
    # PIL asks where in the input each output pixel lies: the inverse map.
    matrix = (
        cos, sin, width / 2 - cos * x - sin * y,
        -sin, cos, height / 2 + sin * x - cos * y,
    )  # fmt: skip
    return picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
