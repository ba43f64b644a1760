"""Subtitle files as cues: SRT, WebVTT, SBV, ASS/SSA, TTML and YouTube's XML.

One lenient parser handles all line-based formats, because real files break the rules in every
way: missing or extra blank lines, missing numbers, other arrows and decimal marks, words beside
the times. Lines that it cannot use are returned as `Unused`.
"""

from __future__ import annotations

import codecs
import html
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from emu_jax.data.documents import Damaged, Unused

REPEATED = "repeated subtitle line"
EMPTY = "empty subtitle cue"
UNREADABLE = "unreadable subtitle cue"
OUTSIDE = "subtitle line outside a cue"
UNDECODABLE = "undecodable subtitle line"
GUESSED = "guessed subtitle encoding"

# Roll-up captions repeat a line when its cue ends, give or take a frame. A cue that also adds a
# line may leave a short gap.
_SAME_MOMENT, _SHORT_GAP = 0.05, 0.25  # seconds


class Cue(NamedTuple):
    """The lines on the screen from `start` to `end`, in seconds."""

    start: float
    end: float
    lines: list[str]


def read_cues(
    content: bytes, where: str, encoding: str | None = None
) -> tuple[list[Cue], list[Unused]]:
    """Reads the cues of a subtitle file, ordered by time, without markup.

    Args:
        encoding: encoding of the text, if known. By default it is given by a byte order mark, is
            UTF-8 or UTF-16, or is guessed; a guess is listed as `GUESSED`.

    Raises:
        Damaged: the encoding is unknown, or there is text but no cue.
    """
    text, unused = _decoded(content, where, encoding)
    if re.match(r"\s*<(?:\?xml|tt\b|tt:|transcript\b|timedtext\b)", text):
        cues = _xml(text, where, unused)
    elif _IS_ASS.search(text):
        cues = _ass(text, unused)
    else:
        cues = _plain(text, unused)
    lost = [note for note in unused if note.reason in (UNREADABLE, OUTSIDE, UNDECODABLE)]
    if not cues and lost:
        detail = f"no HH:MM:SS,mmm --> HH:MM:SS,mmm; {lost[0].detail[:60]!r} ..."
        raise Damaged("malformed subtitles", where, detail)
    for cue in cues:
        if not cue.lines:
            unused.append(Unused(EMPTY, f"at {cue.start:g} s"))
    return sorted((cue for cue in cues if cue.lines), key=lambda cue: cue.start), unused


def unroll(cues: Sequence[Cue], unused: list[Unused]) -> Iterator[tuple[float, str]]:
    """Yields (start, words) of cues ordered by time, with the lines of roll-up captions only once.

    A cue that continues the previous one may begin with its last lines, which are not spoken
    again. They are appended to `unused`.
    """
    before: list[str] = []
    end = float("-inf")
    for cue in cues:
        shared = _overlap(before, cue.lines)
        gap = _SAME_MOMENT if shared == len(cue.lines) else _SHORT_GAP
        shared = shared if cue.start <= end + gap else 0
        unused += [Unused(REPEATED, f"{line!r} at {cue.start:g} s") for line in cue.lines[:shared]]
        if shared < len(cue.lines):
            yield cue.start, " ".join(cue.lines[shared:])
        before, end = cue.lines, cue.end


def _overlap(before: list[str], lines: list[str]) -> int:
    """Returns the largest number of lines that both end `before` and begin `lines`."""
    for count in range(min(len(before), len(lines)), 0, -1):
        if before[-count] == lines[0] and before[-count:] == lines[:count]:
            return count
    return 0


# Encodings

_MARKS = (  # UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LEGACY = (
    "cp1252",
    "cp1251",
    "cp1250",
    "cp1253",
    "cp1254",
    "cp1255",
    "cp1256",
    "cp1257",
    "cp1258",
    "cp874",
    "koi8_r",
    "cp932",
    "euc_jp",
    "gb18030",
    "big5",
    "cp949",
)
_LOST = "\ufffd"  # replaces bytes that could not be decoded


def _decoded(content: bytes, where: str, encoding: str | None) -> tuple[str, list[Unused]]:
    """Decodes a subtitle file, without byte order marks and stray NUL bytes.

    Raises:
        Damaged: the encoding is unknown.
    """
    unused: list[Unused] = []
    text = ""
    marked = next((name for mark, name in _MARKS if content.startswith(mark)), None)
    name = marked or encoding or _wide(content)
    if name is None:
        text = content.decode("utf-8", "replace")
        lost = text.count(_LOST)
        if lost and lost > sum(map(len, re.findall(r"[^\x00-\x7f\ufffd]+", text))):
            name = _guessed(content)
            if name is None:
                raise Damaged("invalid UTF-8", where, "nor another known encoding of subtitles")
            unused.append(Unused(GUESSED, name))
    if name is not None:
        try:
            text = content.decode(name, "replace")
        except (LookupError, ValueError):  # unknown, or not a text codec
            raise Damaged("malformed entry", where, f"unknown encoding {name!r}") from None
    return text.replace("\0", "").replace("\ufeff", ""), unused


def _wide(content: bytes) -> str | None:
    """Detects UTF-16 without a byte order mark: every other byte of its times is zero."""
    even, odd = content[0::2].count(0), content[1::2].count(0)
    if 8 * (even + odd) < len(content):
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


def _guessed(content: bytes) -> str | None:
    """Guesses the legacy encoding in which the words look most like a language; None if unsure."""
    from charset_normalizer import from_bytes

    words = b"\n".join(line for line in content.splitlines() if not line.isascii())
    found = from_bytes(words, cp_isolation=list(_LEGACY))
    least = min((match.chaos for match in found), default=0.0)
    close = [match for match in found if match.chaos <= least + 0.05]
    # Code pages may agree on all letters here; then the first in _LEGACY is the most likely.
    close.sort(key=lambda match: (-match.coherence, _LEGACY.index(match.encoding)))
    if not close or (len(close) > 1 and not close[0].coherence):
        return None
    return close[0].encoding


# Lines with times: SRT, WebVTT, SBV

_CLOCK = (
    r"-?(?:(?:\d{1,6}\s*:\s*)?\d{1,3}\s*:\s*\d{1,2}(?:\s?[.,;]\s?\d{1,9}|:\d{3})?"
    r"|\d{1,7}[.,]\d{1,9})"
)
_PARTS = re.compile(
    r"(-?)(?:(?:(\d+)\s*:\s*)?(\d+)\s*:\s*)?(\d{1,2}|\d+(?=[.,]))"
    r"(?:(?:\s?[.,;]\s?|:(?=\d{3}$))(\d+))?"
)
_ARROW = r"(?:(?:[-–—−=]\s?)+(?:>|&gt;)+|[→⟶➔])"
_ARROWS = re.compile(r"[>→⟶➔]|&gt;")  # a cheap test before the full pattern
_STRICT = r"\d{1,6}:\d\d:\d\d[.,]\d{1,3}"
_TIMING = re.compile(
    rf"[\s\[(]*(?:\d+[.)]?\s+)?(?P<start>{_CLOCK})\s*{_ARROW}\s*(?:(?P<end>{_CLOCK})(?![\w:]))?(?P<rest>.*)"
)
# YouTube's SBV. Looser times without an arrow could be words.
_PAIR = re.compile(rf"\s*(?P<start>{_STRICT})\s*[-–,]\s*(?P<end>{_STRICT})(?P<rest>\s*)$")
# A line that matches both has misspelled times. A single pattern for both would take hours on a
# long line.
_ALMOST = (re.compile(r"-\s?-\s?(?:>|&gt;)"), re.compile(r"\d"))
_NUMBER = re.compile(r"[\s#(]*(\d{1,9})[\s.):]*")
_SETTINGS = re.compile(  # of a cue: align:start, X1:40
    r"^(?:\s*(?:line|position|size|align|region|vertical|[XY][12]|[DLTAS]):\s*\S+)*"
)
_BLOCK = re.compile(r"(?:NOTE|STYLE|REGION)(?:\s|$)|WEBVTT")
_TAG = re.compile(
    r"</?(?:(?:i|b|u|s|q|p|a|c|em|strong|strike|del|font|span|div|ruby|rt|rp|big|small|sub|sup|tt)"
    r"(?:\.[^\s<>]*)?(?:\s+[\w:-]+\s*=[^<>]*)?\s*/?|(?:v|lang)(?:[.\s][^<>]*)?)>"
    r"|<\d[\d:.]*>|\{\\[^{}]*\}|\{[yYcCfFsSpPoO]:[^{}]*\}",
    re.IGNORECASE,
)
_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)


class _Line(NamedTuple):
    """A line that is not blank, and whether a blank line comes before it."""

    text: str
    after_blank: bool


class _Segment(NamedTuple):
    """The lines from one timing line to the next.

    `times` is None before the first timing line; `match` is None if its times cannot be parsed.
    """

    times: str | None
    match: re.Match[str] | None
    lines: list[_Line]
    ends_blank: bool


def _plain(text: str, unused: list[Unused]) -> list[Cue]:
    vtt = text.lstrip().startswith("WEBVTT")
    segments = list(_segments(text))
    cues: list[Cue] = []
    number: int | None = None
    for index, segment in enumerate(segments):
        lines, following = list(segment.lines), None
        if index + 1 < len(segments) and lines:
            following, lines = _without_number(segment, index, number, vtt)
        number = following
        lines = _without_blocks(lines, index == 0) if vtt else lines
        words = _words((line.text for line in lines), unused)
        if segment.times is None:
            unused += [Unused(OUTSIDE, line) for line in words]
        elif segment.match is None:
            unused.append(Unused(UNREADABLE, " ".join([segment.times, *words])))
        else:
            cues.append(_cue(segment.match, words, unused))
    return cues


def _segments(text: str) -> Iterator[_Segment]:
    times: str | None = None
    match: re.Match[str] | None = None
    lines: list[_Line] = []
    blank = True
    for line in text.splitlines():
        if not line.strip():
            blank = True
            continue
        if _ARROWS.search(line):
            candidate = _TIMING.fullmatch(line)
            timed = candidate is not None or all(pattern.search(line) for pattern in _ALMOST)
        else:
            candidate = _PAIR.fullmatch(line) if line.count(":") > 3 else None
            timed = candidate is not None
        if timed:
            yield _Segment(times, match, lines, blank)
            times, match, lines = line.strip(), candidate, []
        else:
            lines.append(_Line(line, blank))
        blank = False
    yield _Segment(times, match, lines, blank)


def _without_number(
    segment: _Segment, index: int, number: int | None, vtt: bool
) -> tuple[int | None, list[_Line]]:
    """Splits the next cue's number or name from the lines before it.

    Args:
        index: index of the next cue in the file, from 0.
        number: this cue's own number.
    """
    *before, last = segment.lines
    match = _NUMBER.fullmatch(last.text)
    if match is None:  # only WebVTT has names
        named = vtt and last.after_blank and not segment.ends_blank
        return None, before if named else segment.lines
    written = int(match[1])
    expected = written in (index + 1, None if number is None else number + 1)
    alone = last.after_blank and not segment.ends_blank
    numbered = number is not None and bool(before) and not segment.ends_blank
    if segment.times is None or alone or expected or numbered:
        return written, before
    return None, segment.lines


def _without_blocks(lines: list[_Line], header: bool) -> list[_Line]:
    """Drops WebVTT's header, comments, styles and regions, each of which ends at a blank line."""
    rest, inside = [], header
    for number, line in enumerate(lines):
        if line.after_blank and not (header and number == 0):
            inside = _BLOCK.match(line.text) is not None
        if not inside:
            rest.append(line)
    return rest


def _cue(match: re.Match[str], lines: list[str], unused: list[Unused]) -> Cue:
    start, end, rest = max(0.0, _seconds(match["start"])), match["end"], match["rest"]
    if rest and not rest.isspace():
        if end is None:  # drop an end time that cannot be parsed
            rest = re.sub(r"^\S*\d\S*", "", rest)
        lines = _words([_SETTINGS.sub("", rest.lstrip("])"), count=1)], unused) + lines
    return Cue(start, max(start, start if end is None else _seconds(end)), lines)


def _seconds(clock: str) -> float:
    match = _PARTS.fullmatch(clock)
    assert match is not None, clock  # a _CLOCK
    sign, hours, minutes, seconds, fraction = match.groups()
    whole = 3600 * int(hours or 0) + 60 * int(minutes or 0) + int(seconds)
    return float(f"{sign}{whole}.{fraction or 0}")


def _words(lines: Iterator[str] | list[str], unused: list[Unused]) -> list[str]:
    """Strips markup, and drops lines that could not be decoded."""
    words = []
    for line in lines:
        marked = "<" in line or "{" in line
        for piece in _BREAK.split(line) if marked else (line,):
            piece = html.unescape(_TAG.sub("", piece) if marked else piece)
            piece = " ".join(piece.split())
            if _LOST in piece:
                unused.append(Unused(UNDECODABLE, piece))
            elif piece:
                words.append(piece)
    return words


# ASS and SSA

_IS_ASS = re.compile(
    r"^(?:\[(?:Script Info|Events)\]|Dialogue:[^,\n]*,\s*\d+:)", re.MULTILINE | re.IGNORECASE
)
_FIELDS = "Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text"
_OVERRIDE = re.compile(r"(\{[^{}]*\})")


def _ass(text: str, unused: list[Unused]) -> list[Cue]:
    cues, names, inside = [], _FIELDS.lower().split(", "), True
    for line in text.splitlines():
        if line.startswith("["):
            inside = line.strip().lower() == "[events]"
        kind, _, value = line.partition(":")
        kind = kind.strip().lower()
        if inside and kind == "format":
            names = [name.strip().lower() for name in value.split(",")]
        if kind != "dialogue":
            continue
        fields = dict(zip(names, value.split(",", len(names) - 1), strict=False))
        try:
            start, end = (_clock(fields[key].strip()) for key in ("start", "end"))
            words = _without_overrides(fields["text"])
        except (KeyError, ValueError):
            unused.append(Unused(UNREADABLE, line))
            continue
        lines = re.split(r"\\[Nn]", words.replace("\\h", " "))
        cues.append(Cue(start, max(start, end), _words(lines, unused)))
    return cues


def _without_overrides(text: str) -> str:
    """Removes style overrides, and the vector shapes that some of them draw."""
    words, drawing = [], False
    for piece in _OVERRIDE.split(text):
        if not piece.startswith("{"):
            words.append("" if drawing else piece)
        elif found := re.search(r"\\p(\d)", piece):
            drawing = found[1] != "0"
    return "".join(words)


def _clock(text: str) -> float:
    """Parses a clock time to seconds; negative times become 0.

    Raises:
        ValueError: it is not a time.
    """
    if not re.fullmatch(_CLOCK, text):
        raise ValueError(text)
    return max(0.0, _seconds(text))


# TTML, and what YouTube serves

_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "": 1.0}


def _xml(text: str, where: str, unused: list[Unused]) -> list[Cue]:
    """Reads the cues of TTML or of YouTube's XML.

    Raises:
        Damaged: the text is not XML, or is nested too deeply.
    """
    try:
        root = ET.fromstring(text.strip())
    except (ET.ParseError, ValueError) as error:
        raise Damaged("malformed subtitles", where, f"invalid XML: {error}") from None
    rates = {_local(name): value for name, value in root.attrib.items()}
    try:
        return list(_timed(root, 0.0, rates, unused))
    except RecursionError:
        raise Damaged("malformed subtitles", where, "XML nested too deeply") from None


def _timed(
    element: ET.Element, origin: float, rates: dict[str, str], unused: list[Unused]
) -> Iterator[Cue]:
    """Yields the cues of an element and its descendants; their times are relative to `origin`."""
    name, given = _local(element.tag), element.attrib
    try:
        if "t" in given:  # YouTube's format 3 counts milliseconds
            start, length = float(given["t"]) / 1000, float(given.get("d", 0)) / 1000
            end = start + length
        else:
            begin = given.get("begin", given.get("start"))
            start = origin if begin is None else origin + _offset(begin, rates)
            until, length = given.get("end"), given.get("dur")
            end = start + _offset(length, rates) if length else start
            end = origin + _offset(until, rates) if until else end
            if name in ("p", "text") and begin is None:
                raise ValueError("no begin")
        if not (math.isfinite(start) and math.isfinite(end)):
            raise ValueError(f"from {start} to {end} s")
    except (ValueError, ZeroDivisionError) as error:
        words = " ".join("".join(element.itertext()).split())
        unused.append(Unused(UNREADABLE, f"{words} ({error})"))
        return
    if name in ("p", "text"):
        yield Cue(start, max(start, end), _words("".join(_said(element)).split("\n"), unused))
        return
    for child in element:
        yield from _timed(child, start if name in ("body", "div") else origin, rates, unused)


def _said(element: ET.Element) -> Iterator[str]:
    """Yields the words of an element; only `<br/>` breaks a line."""
    yield " ".join((element.text or "").split("\n"))
    for child in element:
        if _local(child.tag) == "br":
            yield "\n"
        elif _local(child.tag) != "metadata":
            yield from _said(child)
        yield " ".join((child.tail or "").split("\n"))


def _offset(text: str, rates: dict[str, str]) -> float:
    """Parses a TTML time to seconds: a clock, optionally with frames, or a number with a unit.

    Raises:
        ValueError: it is not a time.
    """
    text = text.strip()
    if match := re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(h|ms?|s|f|t|)", text):
        if match[2] == "f":
            return float(match[1]) / float(rates.get("frameRate", 30))
        if match[2] == "t":
            return float(match[1]) / float(rates.get("tickRate", 1))
        return float(match[1]) * _UNITS[match[2]]
    if match := re.fullmatch(r"(\d{1,6}:\d\d:\d\d):(\d{1,3})(?:\.\d+)?", text):
        return _seconds(match[1]) + int(match[2]) / float(rates.get("frameRate", 30))
    return _clock(text)


def _local(name: str) -> str:
    """Returns a name without its namespace."""
    return name.rpartition("}")[2] if isinstance(name, str) else ""
