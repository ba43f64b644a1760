"""Images: decoding, the release's preprocessing, and augmentation.

The release squashes an image to a square (bicubic, no crop) and normalizes it with CLIP's mean
and standard deviation (`Emu1/utils.py: process_img`, `Emu1/models/pipeline.py`). Here images stay
uint8 until they are on the device, where `models.eva_clip.normalize_images` normalizes them:
decoding loads no jax.

Every image is decoded by `open_image` or passes through `load_image`. Unlike the release, they
apply the EXIF orientation, and scale 16-bit and floating-point gray values to 8 bits instead of
clipping them. Transparency and color profiles are ignored, as in the release.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zlib

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from emu_jax.data import storage
from emu_jax.errors import UserError

# A larger image counts as an attack on the decoder's memory. A narrower one is unrecognizable once
# squashed to a square.
MOST_PIXELS = 89_478_485  # above this Pillow warns
MOST_ASPECT = 100.0

# Exceptions that Pillow's readers raise on files that are missing, truncated or damaged.
_UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
)


class ImageError(UserError):
    """Raised for an image that cannot be read; `reason` is one of `documents.REASONS`."""

    def __init__(self, line: str, reason: str = "unreadable image") -> None:
        super().__init__(line)
        self.reason = reason


def is_animated(content: bytes) -> bool:
    """Returns whether an encoded image has several frames or pages (only the first is read)."""
    if not content.startswith((b"GIF8", b"RIFF", b"\x89PNG", b"II", b"MM")) and (
        content[4:8] != b"ftyp"
    ):
        return False  # a JPEG is followed by previews and depth maps only
    try:
        with PIL.Image.open(io.BytesIO(content)) as image:
            return bool(getattr(image, "is_animated", False))
    except (*_UNREADABLE, PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        return False


# EXIF orientation -> the transposition that makes the image upright.
_UPRIGHT = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_EXIF = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # keys of `Image.info`
# TIFF tags.
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
_WHITE_IS_ZERO = 0


def open_image(
    source: str | os.PathLike | bytes, where: str | None = None, *, at_least: int | None = None
) -> PIL.Image.Image:
    """Opens an image, upright, in mode RGB, or L if the source is gray.

    Animations and files of several pages give their first frame.

    Args:
        where: name of the image in error messages; by default the file.
        at_least: minimum side in pixels. A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size if
            each side stays at least this long. Several times faster; the pixels differ slightly.

    Raises:
        ImageError: it cannot be read, or is too large or too narrow.
    """
    name = where or (f"({len(source)} bytes)" if isinstance(source, bytes) else str(source))
    try:
        if not isinstance(source, bytes):  # Pillow would block on a pipe
            source = storage.read_whole(source, storage.MOST_IMAGE)
        with PIL.Image.open(io.BytesIO(source)) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise PIL.Image.DecompressionBombError(f"{width}x{height} pixels are too many")
            if max(width, height) > MOST_ASPECT * min(width, height):
                raise ImageError(
                    f"cannot read the image {name}: {width}x{height} is too narrow",
                    "image too narrow",
                )
            if at_least is not None:
                image.draft("RGB", (at_least, at_least))
            image.load()
            return _eight_bits(_upright(image), name)
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise ImageError(f"cannot read the image {name}: {error}", "image too large") from None
    except storage.Unreadable as error:
        raise ImageError(
            f"cannot read the image {name}: {error.reason} ({error.detail})", error.reason
        ) from None
    except _UNREADABLE as error:
        reason = str(error)
        if isinstance(error, PIL.Image.UnidentifiedImageError):
            reason = "unknown image format"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise ImageError(f"cannot read the image {name}: {reason}") from None


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Applies the EXIF orientation to a loaded image. Pillow does so itself for TIFF files."""
    if not any(key in image.info for key in _EXIF):
        return image
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # like viewers, ignore damaged EXIF
        return image
    if turn is None:
        return image
    turned = image.transpose(turn)
    for key in _EXIF:  # otherwise a later reader would rotate the result again
        turned.info.pop(key, None)
    return turned


def _eight_bits(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """Converts an image of any mode to RGB, or to L if it is gray of more than 8 bits.

    Raises:
        ImageError: the range of its values is unknown.
    """
    if image.mode in ("L", "RGB"):  # saves the copy that `convert` makes
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return PIL.Image.fromarray(_scaled(image, name))
    if "transparency" in image.info:  # Pillow warns that RGB drops it
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _scaled(image: PIL.Image.Image, name: str) -> UInt8[np.ndarray, "h w"]:
    """Scales wide integers or floats to 8 bits: by the bits that the file declares, or else by
    the narrowest usual range (0..255, 0..65535; floats 0..1, 0..255) that holds them."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16"):
        pixels = values >> (tags.get(_BITS_PER_SAMPLE, (16,))[0] - 8)
    elif image.mode == "I" and (image.format in ("PNG", "PPM") or low >= 0 and 255 < high < 65536):
        pixels = values >> 8
    elif image.mode == "F" and 0 <= low and high <= 1:
        pixels = np.round(values * 255)
    elif 0 <= low and high <= 255:
        pixels = np.round(values)
    else:
        raise ImageError(
            f"cannot read the image {name}: gray values from {low:g} to {high:g}: store it with "
            "8 or 16 bits, or as floats from 0 to 1"
        )
    pixels = pixels.astype(np.uint8)
    return 255 - pixels if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else pixels


def resize(
    image: PIL.Image.Image,
    size: int,
    *,
    fast: bool = False,
    box: tuple[float, float, float, float] | None = None,
) -> PIL.Image.Image:
    """Squashes an image to size x size as the release does: bicubic (bilinear if `fast`).

    Args:
        box: left, top, right and bottom of the part to use; by default the whole image.
    """
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    method = PIL.Image.Resampling.BILINEAR if fast else PIL.Image.Resampling.BICUBIC
    return image.resize((size, size), method, box)


def to_array(image: PIL.Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the pixels as RGB; gray is repeated in the three channels."""
    pixels = np.asarray(image)
    return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels


def square_crop(
    width: int, height: int, side: int, at: tuple[float, float]
) -> tuple[tuple[float, float, float, float], tuple[int, int]]:
    """Returns a square crop of an image that is scaled until its shorter side has `side` pixels.

    Args:
        at: where the crop lies between the top and the bottom, and between left and right, from 0
            to 1 (exclusive).

    Returns:
        The box (left, top, right, bottom) in the image before it is scaled, and the crop's top and
        left in the scaled image.
    """
    short = min(width, height)
    top, left = (
        int(share * (length * side // short - side + 1))
        for share, length in zip(at, (height, width), strict=True)
    )
    edges = (left, top, left + side, top + side)
    x0, y0, x1, y1 = (edge * short / side for edge in edges)
    return (x0, y0, x1, y1), (top, left)


def load_image(
    source: str | os.PathLike | bytes | PIL.Image.Image, size: int, where: str | None = None
) -> UInt8[np.ndarray, "size size 3"]:
    """Reads a file, its bytes or a PIL image, and preprocesses it as the release does. Its EXIF
    orientation is applied.

    Raises:
        UserError: the image cannot be read; the message names it.
    """
    if isinstance(source, PIL.Image.Image):
        source.load()
        image = _eight_bits(_upright(source), where or "(PIL image)")
    else:
        image = open_image(source, where)
    return to_array(resize(image, size))


def sample_affine(
    rng: np.random.Generator, *, rotate: float, scale: float, shift: float
) -> tuple[float, float, float, float]:
    """Samples the arguments of `affine`: (angle, factor, right, down).

    Args:
        rotate: the largest angle, in degrees, either way.
        scale: the largest change of size, as a fraction, either way.
        shift: the largest translation along each side, as a fraction of it, either way.
    """
    angle, grow, right, down = rng.uniform(-1, 1, 4).tolist()
    return angle * rotate, 1 + grow * scale, right * shift, down * shift


def affine(
    image: PIL.Image.Image, angle: float, factor: float, right: float, down: float
) -> PIL.Image.Image:
    """Rotates an image clockwise and scales it about its center, then translates it.

    `angle` is in degrees, `right` and `down` are fractions of the sides. Pixels from outside the
    image are black.
    """
    width, height = image.size
    turn = math.radians(angle)
    cos, sin = math.cos(turn) / factor, math.sin(turn) / factor
    x, y = width * (0.5 + right), height * (0.5 + down)  # where the center goes
    # PIL takes the inverse map, from output to input pixels.
    matrix = (
        cos,
        sin,
        width / 2 - cos * x - sin * y,
        -sin,
        cos,
        height / 2 + sin * x - cos * y,
    )
    return image.transform(
        image.size, PIL.Image.Transform.AFFINE, matrix, PIL.Image.Resampling.BILINEAR
    )
