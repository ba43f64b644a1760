"""Odd pictures, videos and subtitle files are read as a viewer or player shows them."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from emu_jax.data.images import PictureError, load_image, open_image

# Pictures

CORNERS = np.zeros((32, 48, 3), np.uint8)  # a different color in each quarter
CORNERS[:16, :24], CORNERS[:16, 24:] = (220, 20, 20), (20, 200, 20)
CORNERS[16:, :24], CORNERS[16:, 24:] = (20, 20, 220), (240, 240, 240)

# EXIF orientation -> how the stored picture differs from the upright one.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def encoded(picture: Image.Image | np.ndarray, form: str, **settings) -> bytes:
    file = io.BytesIO()
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    picture.save(file, form, **settings)
    return file.getvalue()


def is_corners(picture: Image.Image, size: tuple[int, int] = (48, 32)) -> bool:
    """Whether the picture is CORNERS, upright, give or take lossy compression."""
    middles = np.asarray(picture.convert("RGB").resize((2, 2), Image.Resampling.BOX)).astype(int)
    want = CORNERS[8::16, 12::24].astype(int)
    return picture.size == size and int(np.abs(middles - want).max()) < 16


def stored(orientation: int, form: str) -> bytes:
    picture, turn = Image.fromarray(CORNERS), STORED[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    picture = picture if turn is None else picture.transpose(turn)
    return encoded(picture, form, exif=exif, **settings.get(form, {}))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "MPO", "AVIF"])
def test_pictures_are_turned_upright(form):
    for orientation in STORED:
        content = stored(orientation, form)
        assert is_corners(open_image(content)), orientation
        opened = open_image(content, at_least=8)  # a JPEG is then decoded at a smaller size
        assert is_corners(opened, (12, 8) if form in ("JPEG", "MPO") else (48, 32))
        # A PIL image is turned as well, once.
        want = load_image(CORNERS_PNG, 8).astype(int)
        for given in (
            Image.open(io.BytesIO(content)),
            Image.open(io.BytesIO(content)).convert("RGB"),
            ImageOps.exif_transpose(Image.open(io.BytesIO(content))),
            open_image(content),
        ):
            assert np.abs(load_image(given, 8).astype(int) - want).max() < 24, orientation


CORNERS_PNG = encoded(CORNERS, "PNG")


def test_orientation_in_xmp_is_followed_and_damaged_exif_ignored():
    turned = Image.fromarray(CORNERS).transpose(Image.Transpose.ROTATE_90)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    assert is_corners(open_image(encoded(turned, "JPEG", xmp=xmp, quality=95, subsampling=0)))
    damaged = encoded(CORNERS, "JPEG", exif=b"Exif\0\0IIjunk", quality=95, subsampling=0)
    assert is_corners(open_image(damaged))


RAMP = np.tile(np.arange(256, dtype=np.uint16), (4, 1))


def pgm(values: np.ndarray) -> bytes:
    height, width = values.shape
    return f"P5 {width} {height} 65535\n".encode() + values.astype(">u2").tobytes()


def tiff(values: np.ndarray, photometric: int = 1, bits: int | None = None) -> bytes:
    """One uncompressed gray strip."""
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    height, width = values.shape
    data = values.tobytes()
    tags = [
        (256, 4, width), (257, 4, height), (258, 3, bits or 8 * values.itemsize), (259, 3, 1),
        (262, 3, photometric), (273, 4, 8), (277, 3, 1), (278, 4, height), (279, 4, len(data)),
        (339, 3, kind),
    ]  # fmt: skip
    fields = b"".join(struct.pack("<HHII", tag, form, 1, value) for tag, form, value in tags)
    at = 8 + len(data)
    return (
        b"II*\0" + struct.pack("<I", at) + data
        + struct.pack("<H", len(tags)) + fields + bytes(4)
    )  # fmt: skip


WIDE = {
    "16-bit PNG": (encoded(RAMP * 257, "PNG"), RAMP),
    "dark 16-bit PNG": (encoded(RAMP, "PNG"), RAMP * 0),
    "16-bit TIFF": (tiff(RAMP * 256), RAMP),
    "big-endian TIFF": (encoded(Image.fromarray((RAMP * 256).astype(">u2")), "TIFF"), RAMP),
    "16-bit TIFF, white is zero": (tiff(RAMP * 256, photometric=0), 255 - RAMP),
    "32-bit TIFF of 16 bits": (tiff((RAMP * 257).astype(np.int32)), RAMP),
    "32-bit TIFF of 8 bits": (tiff(RAMP.astype(np.int32)), RAMP),
    "16-bit PGM": (pgm(RAMP * 257), RAMP),
    "dark 16-bit PGM": (pgm(RAMP), RAMP * 0),
    "float TIFF, 0 to 1": (tiff((RAMP / 255).astype(np.float32)), RAMP),
    "float TIFF, 0 to 255": (tiff(RAMP.astype(np.float32)), RAMP),
    "float TIFF, white is zero": (tiff((RAMP / 255).astype(np.float32), photometric=0), 255 - RAMP),
}


@pytest.mark.parametrize("name", WIDE)
def test_wide_gray_values_are_scaled_to_8_bits(name):
    content, want = WIDE[name]
    np.testing.assert_array_equal(np.asarray(open_image(content)), want)
    given = load_image(Image.open(io.BytesIO(content)), 64)
    np.testing.assert_array_equal(given, load_image(content, 64))


def test_12_bits_of_a_tiff_are_scaled_as_12():
    values = (RAMP[0] * 16).astype(int)
    packed = bytearray()
    for a, b in zip(values[::2], values[1::2], strict=True):
        packed += bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255])
    whole = tiff(np.frombuffer(bytes(packed) * 4, np.uint8).reshape(4, -1), bits=12)
    whole = whole.replace(
        struct.pack("<HHII", 256, 4, 1, 384), struct.pack("<HHII", 256, 4, 1, 256)
    )
    np.testing.assert_array_equal(np.asarray(open_image(whole))[0], RAMP[0])


@pytest.mark.parametrize(
    "values", [RAMP - 1.0, RAMP * 2.0, np.full((2, 2), np.nan), RAMP.astype(np.int32) * 70000]
)
def test_gray_values_of_unknown_range_are_refused(values):
    values = values.astype(np.float32 if values.dtype.kind == "f" else np.int32)
    for content in (tiff(values), Image.fromarray(values)):
        with pytest.raises(PictureError, match="gray values from .* store it with"):
            load_image(content, 8)


def test_colors_of_every_mode():
    """The same colors, whatever mode stores them; transparency is dropped, as in the release."""
    rgb = Image.fromarray(CORNERS)
    clear = np.concatenate([CORNERS, np.full((32, 48, 1), 9, np.uint8)], 2)
    palette = rgb.quantize(4)
    wide = (CORNERS.astype(np.uint16) * 257).astype(">u2")
    forms = {
        "palette": encoded(palette, "PNG"),
        "palette with transparency": encoded(palette, "PNG", transparency=bytes([0, 9, 99, 255])),
        "GIF with a transparent color": encoded(palette, "GIF", transparency=1),
        "RGBA": encoded(clear, "PNG"),
        "RGB with a transparent color": encoded(rgb, "PNG", transparency=(220, 20, 20)),
        "CMYK": encoded(rgb.convert("CMYK"), "JPEG", quality=95),
        "YCbCr TIFF": encoded(rgb.convert("YCbCr"), "TIFF"),
        "16-bit RGB": b"P6 48 32 65535\n" + wide.tobytes(),
    }
    for name, content in forms.items():
        assert is_corners(open_image(content)), name
    gray = np.asarray(rgb.convert("L"))
    both = Image.fromarray(np.stack([gray, gray // 2], 2))
    np.testing.assert_array_equal(
        load_image(encoded(both, "PNG"), 16), load_image(encoded(gray, "PNG"), 16)
    )
    assert both.mode == "LA"
    bits = Image.fromarray(CORNERS[..., 0] > 99)
    assert np.asarray(open_image(encoded(bits, "PNG"))).max() == 255
