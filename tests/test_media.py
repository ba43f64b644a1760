"""Odd images, videos and subtitle files are read as a viewer or player shows them."""

import functools
import io
import struct
import sys
import tempfile
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
from PIL import ImageOps

from emu_jax.data import storage
from emu_jax.data.build.clean import CleanConfig, clean
from emu_jax.data.documents import Damaged, Document, Image, Text
from emu_jax.data.images import ImageError, is_animated, load_image, open_image
from emu_jax.data.sources import video as video_module
from emu_jax.data.sources.cues import EMPTY, GUESSED, OUTSIDE, REPEATED, UNDECODABLE, UNREADABLE
from emu_jax.data.sources.video import (
    CUT_SHORT,
    UNDECODABLE_FRAME,
    VIDEO_SUFFIXES,
    Video,
    frame_indices,
    sample_frames,
    subtitles,
)
from emu_jax.data.storage import RangeFile
from emu_jax.data.unused import Unused
from emu_jax.errors import UserError
from emu_jax.generate.prompt import open_file, open_video

# Images

CORNERS = np.zeros((32, 48, 3), np.uint8)  # a different color in each quarter
CORNERS[:16, :24], CORNERS[:16, 24:] = (220, 20, 20), (20, 200, 20)
CORNERS[16:, :24], CORNERS[16:, 24:] = (20, 20, 220), (240, 240, 240)

# EXIF orientation -> how the stored image differs from the upright one.
STORED = {
    1: None,
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_90,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_270,
}


def encoded(image: PIL.Image.Image | np.ndarray, form: str, **settings) -> bytes:
    file = io.BytesIO()
    image = PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, form, **settings)
    return file.getvalue()


def is_corners(image: PIL.Image.Image, size: tuple[int, int] = (48, 32)) -> bool:
    """Returns whether the image is CORNERS, upright, give or take lossy compression."""
    middles = np.asarray(image.convert("RGB").resize((2, 2), PIL.Image.Resampling.BOX)).astype(int)
    want = CORNERS[8::16, 12::24].astype(int)
    return image.size == size and int(np.abs(middles - want).max()) < 16


def stored(orientation: int, form: str) -> bytes:
    image, turn = PIL.Image.fromarray(CORNERS), STORED[orientation]
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    settings = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    image = image if turn is None else image.transpose(turn)
    return encoded(image, form, exif=exif, **settings.get(form, {}))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "MPO", "AVIF"])
def test_images_are_turned_upright(form):
    for orientation in STORED:
        content = stored(orientation, form)
        assert is_corners(open_image(content)), orientation
        opened = open_image(content, at_least=8)  # a JPEG is then decoded at a smaller size
        assert is_corners(opened, (12, 8) if form in ("JPEG", "MPO") else (48, 32))
        # A PIL image is turned as well, once.
        want = load_image(CORNERS_PNG, 8).astype(int)
        for given in (
            PIL.Image.open(io.BytesIO(content)),
            PIL.Image.open(io.BytesIO(content)).convert("RGB"),
            ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(content))),
            open_image(content),
        ):
            assert np.abs(load_image(given, 8).astype(int) - want).max() < 24, orientation


CORNERS_PNG = encoded(CORNERS, "PNG")


def test_orientation_wherever_it_stands():
    early = stored(6, "PNG")
    at = early.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(early[at : at + 4])
    late = early[:at] + early[end:-12] + early[at:end] + early[-12:]  # after the pixels
    assert is_corners(open_image(late))
    want = load_image(CORNERS_PNG, 8)
    np.testing.assert_array_equal(load_image(PIL.Image.open(io.BytesIO(late)), 8), want)
    turned = PIL.Image.fromarray(CORNERS).transpose(PIL.Image.Transpose.ROTATE_90)
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
        (256, 4, width),
        (257, 4, height),
        (258, 3, bits or 8 * values.itemsize),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, height),
        (279, 4, len(data)),
        (339, 3, kind),
    ]
    fields = b"".join(struct.pack("<HHII", tag, form, 1, value) for tag, form, value in tags)
    at = 8 + len(data)
    return (
        b"II*\0" + struct.pack("<I", at) + data + struct.pack("<H", len(tags)) + fields + bytes(4)
    )


WIDE = {
    "16-bit PNG": (encoded(RAMP * 257, "PNG"), RAMP),
    "dark 16-bit PNG": (encoded(RAMP, "PNG"), RAMP * 0),
    "16-bit TIFF": (tiff(RAMP * 256), RAMP),
    "big-endian TIFF": (encoded(PIL.Image.fromarray((RAMP * 256).astype(">u2")), "TIFF"), RAMP),
    "16-bit TIFF, white is zero": (tiff(RAMP * 256, photometric=0), 255 - RAMP),
    "32-bit TIFF of 16 bits": (tiff((RAMP * 257).astype(np.int32)), RAMP),
    "32-bit TIFF of 8 bits": (tiff(RAMP.astype(np.int32)), RAMP),
    "16-bit PGM": (pgm(RAMP * 257), RAMP),
    "dark 16-bit PGM": (pgm(RAMP), RAMP * 0),
    "float TIFF, 0 to 1": (tiff(np.maximum(RAMP / 255 - 0.001, 0).astype(np.float32)), RAMP),
    "float TIFF, 0 to 255": (tiff(RAMP.astype(np.float32)), RAMP),
    "dark float TIFF": (tiff((RAMP / 170).astype(np.float32)), np.round(RAMP / 170)),
    "float TIFF, white is zero": (tiff((RAMP / 255).astype(np.float32), photometric=0), 255 - RAMP),
}


@pytest.mark.parametrize("name", WIDE)
def test_wide_gray_values_are_scaled_to_8_bits(name):
    content, want = WIDE[name]
    np.testing.assert_array_equal(np.asarray(open_image(content)), want)
    given = load_image(PIL.Image.open(io.BytesIO(content)), 64)
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
    for content in (tiff(values), PIL.Image.fromarray(values)):
        with pytest.raises(ImageError, match="gray values from .* store it with"):
            load_image(content, 8)


def test_colors_of_every_mode():
    """The same colors, whatever mode stores them; transparency is dropped, as in the release."""
    rgb = PIL.Image.fromarray(CORNERS)
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
    both = PIL.Image.fromarray(np.stack([gray, gray // 2], 2))
    np.testing.assert_array_equal(
        load_image(encoded(both, "PNG"), 16), load_image(encoded(gray, "PNG"), 16)
    )
    assert both.mode == "LA"
    bits = PIL.Image.fromarray(CORNERS[..., 0] > 99)
    assert np.asarray(open_image(encoded(bits, "PNG"))).max() == 255


def test_damage_of_every_format_is_one_line():
    """Readers of rare formats raise errors of other types than those of JPEG and PNG."""
    avif, dds = (bytearray(encoded(CORNERS, form)) for form in ("AVIF", "DDS"))
    avif[-60:] = bytes(60)  # in the pixels
    dds[80:84] = bytes(4)  # how pixels are stored
    for content in (avif, dds):
        with pytest.raises(ImageError, match="cannot read the image .* bytes.: "):
            open_image(bytes(content))
        assert not is_animated(bytes(content))


def test_builds_store_images_upright_and_count_animations():
    whole, smaller = (
        clean(Document((Image(stored(6, "JPEG")), Text("words"))), CleanConfig(max_side=side))
        for side in (48, 24)
    )
    for cleaned, size in ((whole, (48, 32)), (smaller, (24, 16))):
        assert cleaned.document and isinstance(image := cleaned.document.parts[0], Image)
        assert is_corners(open_image(image.data), size) and cleaned.unused == ()
    frames = [PIL.Image.fromarray(np.roll(CORNERS, n, 0)) for n in range(3)]
    for form in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        content = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        assert is_corners(open_image(content)), form
        found = clean(Document((Image(content), Text("words"))), CleanConfig())
        assert found.document and found.unused == (Unused("frames of an animation", "part 0"),)


# Subtitles

GOOD = "9\n00:00:09,000 --> 00:00:10,000\nlast\n"
ONE = "1\n00:00:01,000 --> 00:00:02,000\none\n"


def cue(number: int, words: str, start: str = "", end: str = "") -> str:
    start = start or f"00:00:0{number},000"
    return f"{number}\n{start} --> {end or start}\n{words}\n\n"


# name: (file, words by start, what is not used)
ODD: dict[str, tuple[str, dict[float, str], dict[str, int]]] = {
    "sound": (ONE + "\n" + GOOD, {1: "one", 9: "last"}, {}),
    "no milliseconds": ("1\n00:00:01 --> 00:00:02\none\n\n" + GOOD, {1: "one", 9: "last"}, {}),
    "one digit": ("1\n0:0:1,5 --> 0:0:2,00\none\n\n" + GOOD, {1.5: "one", 9: "last"}, {}),
    "spaces in the times": (
        "1\n00 : 00 : 01, 250 -- > 00:00:02, 000\none\n\n" + GOOD,
        {1.25: "one", 9: "last"},
        {},
    ),
    "no hours": ("01:01.5 --> 01:02.5\none\n", {61.5: "one"}, {}),
    "seconds alone": ("1.5 --> 2.25\none\n", {1.5: "one"}, {}),
    "colon before milliseconds": ("1\n00:00:01:500 --> 00:00:02:000\none\n", {1.5: "one"}, {}),
    "long hours": ("1\n100:00:01,000 --> 100:00:02,000\none\n", {360001: "one"}, {}),
    "before the start": ("1\n-00:00:01,000 --> 00:00:02,000\none\n", {0: "one"}, {}),
    "other arrows": (
        cue(1, "one")
        + cue(2, "two").replace("-->", "->")
        + cue(3, "three").replace("-->", "–>")
        + cue(4, "four").replace("-->", "→")
        + cue(5, "five").replace("-->", "--&gt;"),
        {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"},
        {},
    ),
    "no end": ("1\n00:00:01,000 -->\none\n\n" + GOOD, {1: "one", 9: "last"}, {}),
    "no blank lines": (ONE + "2\n00:00:03,000 --> 00:00:04,000\ntwo\n", {1: "one", 3: "two"}, {}),
    "no numbers, no blank lines": (
        "00:00:01,000 --> 00:00:02,000\n42\n00:00:03,000 --> 00:00:04,000\ntwo\n",
        {1: "42", 3: "two"},
        {},
    ),
    "numbers that are said": (
        cue(1, "3\n2\n1") + cue(2, "42") + cue(3, "done\n\n7") + cue(4, "4"),
        {1: "3 2 1", 2: "42", 3: "done 7", 4: "4"},
        {},
    ),
    "a number said before a number": (
        "1\n00:00:01,000 --> 00:00:02,000\n42\n2\n00:00:03,000 --> 00:00:04,000\n2\n",
        {1: "42", 3: "2"},
        {},
    ),
    "wrong numbers, no blank lines": (
        ONE + "7\n00:00:03,000 --> 00:00:04,000\ntwo\n",
        {1: "one", 3: "two"},
        {},
    ),
    "WebVTT, no blank lines": (
        "WEBVTT\n\n00:01.000 --> 00:02.000\none\n00:03.000 --> 00:04.000\ntwo\n",
        {1: "one", 3: "two"},
        {},
    ),
    "blank lines everywhere": (
        (cue(1, "one\ntwo") + cue(2, "three")).replace("\n", "\r\r\n"),
        {1: "one two", 2: "three"},
        {},
    ),
    "CR": (f"{ONE}\n{GOOD}".replace("\n", "\r"), {1: "one", 9: "last"}, {}),
    "a blank line within": (cue(1, "\none\n\nmore") + GOOD, {1: "one more", 9: "last"}, {}),
    "words beside the times": (
        "1\n0:00:01.000 --> 0:00:02.000 so it: begins\nnow\n",
        {1: "so it: begins now"},
        {},
    ),
    "words beside settings": (
        "WEBVTT\n\n00:01.000 --> 00:02.000 align:start line:0 Bob:hi there\n",
        {1: "Bob:hi there"},
        {},
    ),
    "coordinates": (
        "1\n0:00:01,000 --> 0:00:02,000  X1:63 X2:223 Y1:43 Y2:58\none\n",
        {1: "one"},
        {},
    ),
    "a log of Whisper": (
        "[00:01.000 --> 00:02.000]  one\n[00:02.000 --> 00:03.000]  two\n",
        {1: "one", 2: "two"},
        {},
    ),
    "signs that are no tags": (
        cue(1, "if a < b and c > d, x<y, a <b and c> {so}"),
        {1: "if a < b and c > d, x<y, a <b and c> {so}"},
        {},
    ),
    "tags": (
        cue(1, '<i>one</i> {\\an8}two<br/>{y:i}<font color="red">three</font> &lt;i&gt; &#39;'),
        {1: "one two three <i> '"},
        {},
    ),
    "unordered": (cue(2, "two") + cue(1, "one"), {1: "one", 2: "two"}, {}),
    "no duration, or less": (
        cue(1, "one") + cue(2, "two", end="00:00:01,000"),
        {1: "one", 2: "two"},
        {},
    ),
    "an empty cue": (cue(1, "") + cue(2, "<i></i>") + cue(3, "three"), {3: "three"}, {EMPTY: 2}),
    "misspelled times": (
        cue(1, "one", "00:00:0x,000") + cue(2, "two") + cue(3, "lost", end="00:00:xx"),
        {2: "two", 3: "lost"},
        {UNREADABLE: 1},
    ),
    "words before the first cue": ("A film\nby us\n\n" + ONE, {1: "one"}, {OUTSIDE: 2}),
    "WebVTT": (
        "WEBVTT - a title\nKind: captions\n\nSTYLE\n::cue(b) {}\n\nREGION\nid:fred\n\nNOTE a\nb\n"
        "\nNOTE\n\nan id\n00:01.000 --> 00:02.000 line:0 align: middle\n"
        "<v.loud Bob>hi <00:01.500><c.red>there</c>\n\nNOTE not said\n\nmore\n\n12\n"
        "00:03.000 --> 00:04.000\n- two\n- three\n",
        {1: "hi there more", 3: "- two - three"},
        {},
    ),
    "stray NUL bytes": (
        cue(1, "o\0ne") + "\0" + cue(2, "two\0"),
        {1: "one", 2: "two"},
        {},
    ),
    "a line that begins as one of ASS": (
        cue(1, "Dialogue: a play, in 3 acts") + GOOD,
        {1: "Dialogue: a play, in 3 acts", 9: "last"},
        {},
    ),
    "WebVTT without cues": ("WEBVTT\nKind: captions\n\nNOTE nothing\n", {}, {}),
    "nothing": ("\n", {}, {}),
    "SBV": (
        "0:00:01.000,0:00:02.000\none\ntwo\n\n0:00:03.000,0:00:04.000\nthree\n",
        {1: "one two", 3: "three"},
        {},
    ),
    "ASS": (
        "[Script Info]\nTitle: x\n[V4+ Styles]\nFormat: Name\n[Events]\n"
        "Format: Layer, Start, End, Style, Text\nComment: 0,0:00:00.00,0:00:01.00,D,nothing\n"
        "Dialogue: 0,0:00:03.50,0:00:05.00,D,{\\i1}later{\\i0}, you\\Ntwo\\hthree\n"
        "Dialogue: 0,0:00:01.50,0:00:02.00,D,{\\k20}ka{\\k30}ra {\\p1}m 0 0 l 1 1{\\p0}ok\n"
        "Dialogue: 0,bad,0:00:02.00,D,lost\n",
        {1.5: "kara ok", 3.5: "later, you two three"},
        {UNREADABLE: 1},
    ),
    "TTML": (
        '<?xml version="1.0" encoding="UTF-8"?><tt xmlns="http://www.w3.org/ns/ttml" '
        'xmlns:p="http://www.w3.org/ns/ttml#parameter" p:frameRate="25" p:tickRate="100"><head>'
        '<metadata>not said</metadata></head><body begin="1s"><div>'
        '<p begin="00:00:01.500" end="00:00:02.000">one<br/>two <span>x</span>\n y</p>'
        '<p begin="300t" dur="1s">t</p><p begin="00:00:04:05">f</p><p begin="x">bad</p>'
        '<p t="nan">never</p></div></body></tt>',
        {2.5: "one two x y", 4: "t", 5.2: "f"},
        {UNREADABLE: 2},
    ),
    "YouTube's XML": (
        '<transcript><text start="1.5" dur="2">it&amp;#39;s</text></transcript>',
        {1.5: "it's"},
        {},
    ),
    "YouTube's XML, format 3": (
        '<timedtext><body><p t="1500" d="9">a<s t="3"> b</s></p></body></timedtext>',
        {1.5: "a b"},
        {},
    ),
    # Captions that roll, and lines that are really said twice.
    "said twice": (
        cue(1, "Fire!", end="00:00:02,000") + cue(9, "Fire!"),
        {1: "Fire!", 9: "Fire!"},
        {},
    ),
    "said twice at once": (cue(1, "Fire!\nFire!"), {1: "Fire! Fire!"}, {}),
    "said twice after a short pause": (
        cue(1, "No.", end="00:00:01,850") + cue(2, "No."),
        {1: "No.", 2: "No."},
        {},
    ),
    "still on the screen": (
        cue(1, "Fire!", end="00:00:02,000") + cue(2, "Fire!"),
        {1: "Fire!"},
        {REPEATED: 1},
    ),
    "rolling with gaps": (
        cue(1, "a\nb", end="00:00:01,800")
        + cue(2, "b\nc", end="00:00:02,800")
        + cue(4, "c\nd", end="00:00:04,500"),
        {1: "a b", 2: "c", 4: "c d"},
        {REPEATED: 1},
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_subtitles(name):
    text, said, unused = ODD[name]
    found = subtitles(text.encode(), "it")
    assert dict(found) == said and len(found) == len(said)
    assert Counter(note.reason for note in found.unused) == unused


def test_youtubes_rolling_captions_are_read_once():
    """Each line grows word by word, stays for 10 ms alone, and then moves up for the next."""
    lines = ["we go", "no no", "no no", "and on"]
    text, before = "WEBVTT\nKind: captions\nLanguage: en\n\n", " "
    for n, line in enumerate(lines):
        grown = "<00:00:00.100><c> ".join(line.split()) + "</c>"
        for start, end, shown in (
            (2 * n, 2 * n + 1.99, f"{before}\n{grown}"),
            (2 * n + 1.99, 2 * n + 2, f"{line}\n "),
        ):
            text += (
                f"00:00:{start:06.3f} --> 00:00:{end:06.3f} align:start position:0%\n{shown}\n\n"
            )
        before = line
    found = subtitles(text.encode(), "it")
    assert found == [(0, "we go"), (2, "no no"), (4, "no no"), (6, "and on")]
    assert {note.reason for note in found.unused} == {REPEATED} and len(found.unused) == 7


FRENCH = (
    "Où êtes-vous allé hier soir ?",
    "Je ne sais pas, c'était étrange.",
    "été à la plage",
    "Après le dîner, nous sommes rentrés à la maison.",
    "Elle a été très déçue.",
)
RUSSIAN = ("Где вы были вчера вечером?", "Я не знаю, это было странно.", "После ужина домой.")


@pytest.mark.parametrize(
    ("encoding", "lines", "guessed"),
    [
        *[(e, FRENCH, 0) for e in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be")],
        ("utf-32", RUSSIAN, 0),
        ("utf-16-be", RUSSIAN, 0),
        ("cp1252", FRENCH, 1),
        ("cp1251", RUSSIAN, 1),
        ("koi8-r", RUSSIAN, 1),
    ],
)
def test_encodings_of_subtitles(encoding, lines, guessed):
    content = "".join(cue(n, line) for n, line in enumerate(lines, 1)).encode(encoding)
    found = subtitles(content, "it")
    assert [words for _, words in found] == list(lines)
    assert [note.reason for note in found.unused] == [GUESSED] * guessed  # counted: it may be wrong
    assert subtitles(content, "it", encoding).unused == ()


def test_damaged_subtitles():
    broken = (cue(1, "été, été") + cue(2, "é")).encode()[:-3]  # cut within a letter
    found = subtitles(broken + b"\n\n" + GOOD.encode(), "it")
    assert found == [(1, "été, été"), (9, "last")]
    assert Counter(n.reason for n in found.unused) == {UNDECODABLE: 1, EMPTY: 1}
    for content, message in (
        (b"no times here", "malformed subtitles.*'no times here'"),
        (b"1\n2\n", "malformed"),
        (b"{10}{20}frames", "malformed"),
        (b"00:00:xx --> 00:00:02,000\nlost\n", "malformed"),
        # Japanese or Korean: a guess would be a coin toss.
        (cue(1, "昨日の夜はどこにいましたか\nわかりません").encode("shift_jis"), "invalid UTF-8"),
        (b"<tt><p", "invalid XML"),
        (bytes(range(128, 256)) * 3, "invalid UTF-8"),
        (b"<tt>" * 9999 + b"</tt>" * 9999, "malformed"),
        (b'{"ms": 123456789, "utf8": ">> so"},' * 30_000, "malformed"),  # in one line of 1 MB
    ):
        with pytest.raises(Damaged, match=f"it: .*{message}"):
            subtitles(content, "it")
    for encoding in ("klingon", "\0", "hex", "undefined"):
        with pytest.raises(Damaged, match="it: malformed entry .unknown encoding '"):
            subtitles(ONE.encode(), "it", encoding)


# Videos

SIDES = (48, 32)


@functools.cache
def encode(
    form: str,
    codec: str,
    b_frames: int = 0,
    frames: int = 24,
    options: str = "",
    at: tuple[int, ...] = (),
    image: str = "shades",
) -> bytes:
    """A video with a key frame every six.

    Args:
        at: when each frame is shown, in twelfths of a second.
        image: `shades`: frame k has the shade 10 * k. `noise`: random pixels. `corners`:
            CORNERS, in all frames.
    """
    # FFmpeg reads a file again to move its index to the front.
    file = tempfile.NamedTemporaryFile() if options else io.BytesIO()
    target, flags = (file.name, {"movflags": options}) if options else (file, {})
    with av.open(target, "w", format=form, options=flags) as out:
        settings = {"x264-params": f"bframes={b_frames}:b-adapt=0:scenecut=0"}
        settings = settings if codec == "libx264" else {}
        stream = out.add_stream(codec, rate=25 if codec.endswith("video") else 12, options=settings)
        stream.width, stream.height, stream.pix_fmt = *SIDES, "yuv420p"
        stream.gop_size = stream.codec_context.gop_size = 6
        stream.codec_context.max_b_frames = b_frames
        for k in range(frames):
            pixels = {
                "shades": np.full((*SIDES[::-1], 3), 10 * k % 256, np.uint8),
                "corners": CORNERS,
                "noise": np.random.default_rng(k).integers(0, 256, (*SIDES[::-1], 3), np.uint8),
            }[image]
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            if at:
                frame.pts, frame.time_base = at[k], Fraction(1, 12)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    file.seek(0)
    return file.read()


def played(content: bytes) -> list[tuple[float | None, bytes]]:
    """(time, pixels) of the frames that FFmpeg shows, from the first to the last."""
    with av.open(io.BytesIO(content)) as container:
        return [(f.time, f.to_ndarray(format="rgb24").tobytes()) for f in container.decode(video=0)]


def pixels(frame: bytes) -> bytes:
    return np.asarray(PIL.Image.open(io.BytesIO(frame))).tobytes()


def is_played(content: bytes, path: Path | None = None) -> bool:
    """Returns whether every frame is as FFmpeg shows it, whichever others are asked for with it.

    Args:
        path: a file with the content, to be read in place.
    """
    want = [shown for _, shown in played(content)]
    clip = Video(content if path is None else RangeFile(str(path)), "it")
    assert len(clip.times) == len(want)
    for step, start in ((1, 0), (5, 0), (7, 3), (len(want), len(want) - 1)):
        indices = range(start, len(want), step)
        got = [pixels(frame) for _, frame in clip.frames(indices)]
        assert got == [want[index] for index in indices], (step, start)
    return clip.unused == [] and min(np.diff(clip.times)) > 0


CONTAINERS = [
    ("mp4", "libx264", 2),
    ("mov", "mpeg4", 2),
    ("3gp", "mpeg4", 0),
    ("matroska", "libx264", 2),
    ("webm", "libvpx", 0),
    ("avi", "mpeg4", 0),
    ("avi", "mpeg4", 2),
    ("avi", "libx264", 2),
    ("mpegts", "libx264", 2),
    ("mpegts", "mpeg2video", 2),
    ("mpeg", "mpeg1video", 2),
    ("mpeg1video", "mpeg1video", 2),
    ("flv", "flv", 0),
    ("flv", "libx264", 2),
    ("asf", "wmv2", 0),
    ("asf", "libx264", 2),
    ("ogg", "libvpx", 0),
]


@pytest.mark.parametrize(("form", "codec", "b_frames"), CONTAINERS)
def test_every_container_gives_the_frames_of_a_player(form, codec, b_frames, tmp_path):
    content = encode(form, codec, b_frames)
    assert is_played(content)
    times = Video(content, "it").times
    rate = 25 if codec.endswith("video") else 12
    assert len(times) == 24 and abs(times[5] - 5 / rate) < 2e-3
    # The content decides, not the name.
    (tmp_path / "clip.bin").write_bytes(content)
    assert len(open_file(tmp_path / "clip.bin")) == 8
    assert is_played(content, tmp_path / "clip.bin")
    assert Video(RangeFile(str(tmp_path / "clip.bin")), "it").times == times


def trimmed(content: bytes, start: float) -> bytes:
    """A copy from `start` seconds on, which begins at the key frame before: an edit list hides
    what is between."""
    file = io.BytesIO()
    with av.open(io.BytesIO(content)) as whole, av.open(file, "w", format="mp4") as out:
        stream = whole.streams.video[0]
        copy = out.add_stream_from_template(stream)
        shift = int(start / stream.time_base)
        whole.seek(shift, stream=stream)
        for packet in whole.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                out.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize(("codec", "b_frames"), [("mpeg4", 0), ("libx264", 0), ("libx264", 2)])
def test_frames_before_a_cut_are_not_shown(codec, b_frames):
    content = trimmed(encode("mp4", codec, b_frames), 9 / 12)
    assert is_played(content)
    times = Video(content, "it").times
    assert len(times) == 15 and times[0] == 0
    whole = [shown for _, shown in played(encode("mp4", codec, b_frames))]
    first, last = (pixels(frame) for _, frame in Video(content, "it").frames([0, 14]))
    assert (first, last) == (whole[9], whole[23])


MATRICES = {  # (a, b, c, d) of a track: how what is stored becomes what is shown
    (1, 0, 0, 1): None,
    (0, 1, -1, 0): PIL.Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): PIL.Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): PIL.Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): PIL.Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): PIL.Image.Transpose.TRANSVERSE,
}


@pytest.mark.parametrize("matrix", MATRICES)
def test_videos_are_turned_and_mirrored_as_players_do(matrix):
    content = bytearray(encode("mp4", "mpeg4", frames=2, image="corners"))
    a, b, c, d = (n << 16 for n in matrix)
    at = content.index(b"tkhd") + 44
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    image = PIL.Image.open(io.BytesIO(Video(bytes(content), "it").frames([1])[0][1]))
    turn = MATRICES[matrix]
    want = PIL.Image.fromarray(CORNERS)
    want = want if turn is None else want.transpose(turn)
    assert image.size == want.size
    got = np.asarray(image.resize((2, 2), PIL.Image.Resampling.BOX)).astype(int)
    assert np.abs(got - np.asarray(want.resize((2, 2), PIL.Image.Resampling.BOX))).max() < 40


def test_times_of_frames():
    at = (-3, -2, 0, 1, 5, 6, 17, 18)  # a variable rate, from before zero
    for form in ("mp4", "matroska"):
        clip = Video(encode(form, "libx264", 0, 8, at=tuple(n + 3 for n in at)), "it")
        np.testing.assert_allclose(clip.times, [(n + 3) / 12 for n in at], atol=1e-3)
    shifted = io.BytesIO()
    with av.open(io.BytesIO(encode("mp4", "libx264", 2))) as whole:
        with av.open(shifted, "w", format="mpegts", options={"muxdelay": "0"}) as out:
            copy = out.add_stream_from_template(whole.streams.video[0])
            for packet in whole.demux(video=0):
                if packet.size:
                    packet.pts, packet.dts = packet.pts + 70_000, packet.dts + 70_000
                    packet.stream = copy
                    out.mux(packet)
    assert Video(shifted.getvalue(), "it").times[:2] == pytest.approx([0, 1 / 12], abs=2e-3)
    assert is_played(shifted.getvalue())


def test_what_is_left_of_a_cut_video_is_used():
    for form, codec, options in (
        ("mp4", "libx264", "faststart"),
        ("mp4", "libx264", "frag_keyframe"),
        ("matroska", "libx264", ""),
        ("webm", "libvpx", ""),
        ("avi", "mpeg4", ""),
        ("flv", "flv", ""),
    ):
        content = encode(form, codec, frames=24, options=options, image="noise")
        want = [shown for _, shown in played(content)]
        cut = Video(content[: len(content) * 6 // 10], form)
        assert 4 < len(cut.times) < 20, form
        exact = [pixels(frame) == want[n] for n, (_, frame) in enumerate(cut.frames(range(5)))]
        assert all(exact), form
        assert [note.reason for note in cut.unused] == [CUT_SHORT], form
        assert Video(content, form).unused == []


def test_undecodable_frames_are_counted_and_those_before_shown():
    content = bytearray(encode("avi", "mpeg4"))
    with av.open(io.BytesIO(bytes(content))) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    for number in (12, 13):  # the second from the last key frame but one on
        at, size = packets[number]
        content[at : at + size] = bytes(size)
    clip = Video(bytes(content), "it")
    frames = clip.frames(range(24))
    want = [shown for _, shown in played(encode("avi", "mpeg4"))]
    assert [pixels(frame) for _, frame in frames[:12]] == want[:12]
    assert [pixels(frame) for _, frame in frames[12:14]] == [want[11]] * 2
    assert [pixels(frame) for _, frame in frames[18:]] == want[18:]
    assert {note.reason for note in clip.unused} == {UNDECODABLE_FRAME}
    assert [note.detail for note in clip.unused[:2]] == ["at 1 s", "at 1.08333 s"]


def test_frames_are_read_without_the_rest_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SIDES", (240, 160))
    content = encode("mp4", "libx264", 3, 36, image="noise")
    (tmp_path / "a.mp4").write_bytes(bytes(99) + content + bytes(99))
    count, read = 0, storage._pread

    def counting(file, start, size):
        nonlocal count
        count += size
        return read(file, start, size)

    monkeypatch.setattr(storage, "_pread", counting)
    file = RangeFile(str(tmp_path / "a.mp4"), 99, len(content))
    clip, whole = Video(file, "it"), Video(content, "it")
    assert clip.times == whole.times and clip.unused == whole.unused == []
    assert clip._keys == whole._keys and len(clip._keys) == 6
    assert count < len(content) / 2  # FFmpeg decodes the first frames
    count = 0
    assert clip.frames([21]) == whole.frames([21])
    assert count < len(content)


def test_frames_between_are_not_decoded_unless_others_need_them(monkeypatch):
    clip = Video(encode("mp4", "libx264", 3, image="noise"), "it")
    shown, count = [], 0

    def counting(*args):
        nonlocal count
        for frame in decoded(*args):
            count += 1
            yield frame

    decoded = video_module._decoded
    monkeypatch.setattr(video_module, "_decoded", counting)
    for index in range(24):
        shown += clip.frames([index])
    alone, count = count, 0
    assert shown == clip.frames(range(24)) and count == 24
    assert alone <= 60  # of the 84 frames from a key frame on
    assert clip.unused == []


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "unreadable video"), (b"\0" * 999, "unreadable video"), (None, "no video stream")],
)
def test_files_without_a_video(content, message):
    if content is None:
        file = io.BytesIO()
        with av.open(file, "w", format="mp4") as out:
            stream = out.add_stream("aac", rate=16000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate = 16000
            out.mux(stream.encode(frame))
            out.mux(stream.encode())
        content = file.getvalue()
    with pytest.raises(Damaged, match=message):
        Video(content, "it")


def test_frames_too_large_to_decode_are_refused(monkeypatch):
    monkeypatch.setattr("emu_jax.data.sources.video.MOST_PIXELS", SIDES[0] * SIDES[1] // 2)
    with pytest.raises(Damaged, match="unreadable video .no frame can be decoded"):
        sample_frames(Video(encode("matroska", "libx264", 2), "it"), 8, None)


def test_the_best_of_several_streams_is_the_video():
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as out:
        streams = [out.add_stream("mpeg4", rate=12) for _ in range(2)]
        streams[1].disposition = av.stream.Disposition.default
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = *SIDES, "yuv420p"
        for count, stream in zip((9, 8), streams, strict=True):
            for k in range(count):
                pixels = CORNERS if count == 9 else np.roll(CORNERS, 7 * k, (0, 1))
                out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
            out.mux(stream.encode())
    clip = Video(file.getvalue(), "it")
    assert len(clip.times) == 8 and len(clip.frames(range(8))) == 8


class Ticking:
    """A clock that shows one second more at each look."""

    def __init__(self):
        self.seconds = 0.0

    def monotonic(self) -> float:
        self.seconds += 1
        return self.seconds


@pytest.mark.parametrize("form, codec", [("mp4", "mpeg4"), ("mpeg", "mpeg1video")])
def test_a_video_that_takes_too_long_is_damaged(monkeypatch, form, codec):
    """By seeking or in order; it is not taken for one that was cut short."""
    content = encode(form, codec)
    monkeypatch.setattr("emu_jax.data.sources.video.time", clock := Ticking())
    assert len(Video(content, "it", 1000.0).times) == 24
    opened = clock.seconds
    assert opened > 24  # it looks at the clock for each packet
    with pytest.raises(Damaged, match=r"it: slow video \(not decoded within 10 s\)"):
        Video(content, "it", 10.0)
    video = Video(content, "it", 1000.0)
    assert len(video.frames([2, 20])) == 2
    video._seconds = 1.0
    with pytest.raises(Damaged, match=r"it: slow video \(not decoded within 1 s\)"):
        video.frames([2, 20])
    with pytest.raises(UserError, match="not decoded within 5 s"):
        open_video(content, "it", 5.0)


def test_names_of_videos():
    assert len(set(VIDEO_SUFFIXES)) == len(VIDEO_SUFFIXES)
    assert {".mp4", ".ts", ".flv", ".mpg", ".wmv", ".m4v", ".mpeg", ".3gp", ".ogv", ".mts"} <= set(
        VIDEO_SUFFIXES
    )
    clip = Video(encode("mp4", "libx264", 2), "it")
    shades = [
        round(PIL.Image.open(io.BytesIO(f)).getpixel((9, 9))[0] / 10)
        for _, f in sample_frames(clip, 8, None)
    ]
    assert shades == frame_indices(24).tolist()  # the release's choice
