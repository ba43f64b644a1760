"""Videos as documents: with a caption, or as frames and subtitles ordered by time."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from emu_jax.data import storage
from emu_jax.data.documents import Damaged, Document, Image, Text, utf8
from emu_jax.data.sources.cues import EMPTY, UNREADABLE
from emu_jax.data.sources.entries import MALFORMED, Entries
from emu_jax.data.sources.listings import Listed, Media
from emu_jax.data.sources.video import (
    Frame,
    Subtitles,
    Video,
    sample_frames,
    storyboard,
    storyboard_times,
    subtitles,
)
from emu_jax.data.unused import Unused

_JSON = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*[{\]]")  # the beginning of a list of objects
_MOST_FRAMES = 100_000  # of a video with subtitles; a listing that asks for more is wrong


class Videos(Listed):
    """Videos with captions, from entries `{"video": FILE, "text": WORDS}`.

    A document is `frames` frames and the words. Training samples frames at random; otherwise
    they are the frames that the release would show.
    """

    paired = True

    def __init__(self, entries: Entries, media: Media, frames: int) -> None:
        super().__init__(entries, media, frames)
        self._frames = frames

    def read(
        self,
        index: int,
        seed: Sequence[int] | None = None,
        part_indices: Collection[int] | None = None,
    ) -> Document:
        entry, where = self._entries[index], self.where(index)
        words = _words(entry, where)
        folder = self._entries.folder(index)
        video = Video(
            self._media.open(entry.get("video"), folder, where, storage.MOST_VIDEO), where
        )
        frames = sample_frames(video, self._frames, seed)
        return Document((*Image.video(frames), words), tuple(video.unused))

    def sketch(self, index: int) -> Document:
        entry = self._entries[index]
        words = _words(entry, self.where(index))
        self._require(entry.get("video"), index)
        return Document((*Image.video([(None, b"")] * self._frames), words))


def _words(entry: dict[str, Any], where: str) -> Text:
    words = entry.get("text", entry.get("caption"))
    if not isinstance(words, str):
        raise Damaged("malformed entry", where, "no text")
    return Text(words)


class _Board(NamedTuple):
    """An entry's storyboard: its sheets, with the rows and columns of each."""

    sheets: list[str]
    rows: list[int]
    columns: list[int]
    frames: int

    @property
    def tiles(self) -> list[int]:
        return [r * c if min(r, c) > 0 else 0 for r, c in zip(self.rows, self.columns, strict=True)]


def _each(value: Any, count: int) -> list[int]:
    """Returns one number a sheet, from a list or a single number.

    Raises:
        ValueError: the list has another length.
    """
    numbers = [int(n) for n in value] if isinstance(value, list) else [int(value)] * count
    if len(numbers) != count:
        raise ValueError(f"{len(numbers)} numbers for {count} sheets")
    return numbers


def transcript(content: bytes, where: str) -> Subtitles | None:
    """Reads the JSON of youtube-transcript-api, a list of `{"text", "start", "duration"}` with
    times in seconds. Returns None for any other format.

    Raises:
        Damaged: it is not UTF-8, malformed, or no cue has `start` and `text`.
    """
    if not _JSON.match(content):
        return None
    try:
        cues = json.loads(utf8(content, where))
    except (ValueError, RecursionError) as error:
        raise Damaged("malformed subtitles", where, error) from None
    captions, unused = list[tuple[float, str]](), list[Unused]()
    for n, cue in enumerate(cues):
        try:
            start, words = float(cue["start"]), " ".join(cue["text"].split())
            if not math.isfinite(start):
                raise ValueError(start)
        except MALFORMED:
            unused.append(Unused(UNREADABLE, f"cue {n}"))
            continue
        if words:
            captions.append((start, words))
        else:
            unused.append(Unused(EMPTY, f"cue {n}"))
    if cues and all(note.reason == UNREADABLE for note in unused) and not captions:
        raise Damaged("malformed subtitles", where, "no cue has `start` and `text`")
    return Subtitles(sorted(captions, key=lambda cue: cue[0]), unused)


def _bounded(frames: int) -> int:
    if frames > _MOST_FRAMES:
        raise ValueError(f"more than {_MOST_FRAMES} frames")
    return frames


class SubtitledVideos(Listed):
    """Frames and subtitles ordered by time; subtitles between two frames are joined, as in the
    release's YT-Storyboard-1B.

    An entry has `subtitles`, a file of SRT, WebVTT, SBV, ASS or TTML (whose `encoding` may be
    given), or the JSON of youtube-transcript-api, which the release reads. It also has either
        `video`, which is shown as one frame every `apart` seconds. Its `duration` is optional;
        with it, counting tokens need not open each video. Or
        `storyboard` (a sheet, or a list of sheets), with `rows` and `columns` (one number, or
        one a sheet), `frames`, and `duration` in seconds.
    """

    videos = False  # frames between subtitles

    def __init__(self, entries: Entries, media: Media, apart: float) -> None:
        super().__init__(entries, media, apart)
        self._apart = apart

    def read(
        self,
        index: int,
        seed: Sequence[int] | None = None,
        part_indices: Collection[int] | None = None,
    ) -> Document:
        document = self._timed(index)
        images = [n for n, part in enumerate(document.parts) if isinstance(part, Image)]
        shown = [k for k, n in enumerate(images) if part_indices is None or n in part_indices]
        parts = list(document.parts)
        frames, unused = self._frames(index, shown)
        for k, (_, data) in zip(shown, frames, strict=True):
            part = parts[images[k]]
            assert isinstance(part, Image)
            parts[images[k]] = Image(data, part.time)
        return Document(tuple(parts), (*document.unused, *unused))

    def sketch(self, index: int) -> Document:
        document, entry = self._timed(index), self._entries[index]
        if "storyboard" in entry:
            for name in self._board(index, entry).sheets:
                self._require(name, index)
        else:
            self._require(entry.get("video"), index)
        return document

    def _timed(self, index: int) -> Document:
        """Returns the document with empty images."""
        entry, where = self._entries[index], self.where(index)
        encoding = entry.get("encoding")
        if not isinstance(encoding, str | None):
            raise Damaged("malformed entry", where, f"encoding {encoding!r}")
        content = self._file(index, entry.get("subtitles"), storage.MOST_TEXT)
        captions = transcript(content, where)
        if captions is None:
            captions = subtitles(content, where, encoding)
        document = Document.from_video(
            [(time, b"") for time in self._times(index, entry)], captions
        )
        unused = captions.unused
        if "storyboard" in entry:
            board = self._board(index, entry)
            first = 0
            for name, tiles in zip(board.sheets, board.tiles, strict=True):
                unused += (Unused("unused sheet", name),) * (first >= board.frames)
                first += tiles
        return dataclasses.replace(document, unused=unused)

    def _times(self, index: int, entry: dict[str, Any]) -> list[float]:
        where = self.where(index)
        try:
            if "storyboard" in entry:
                frames = self._board(index, entry).frames
                return storyboard_times(frames, float(entry["duration"]))
            if "duration" in entry:
                last = float(entry["duration"])
            else:
                last = self._video(index, entry).times[-1]
            return [n * self._apart for n in range(_bounded(math.floor(last / self._apart) + 1))]
        except MALFORMED as error:
            raise Damaged("malformed entry", where, repr(error)) from None

    def _frames(self, index: int, numbers: list[int]) -> tuple[list[Frame], list[Unused]]:
        """Returns the frames with these numbers, and those that could not be decoded."""
        entry = self._entries[index]
        times = self._times(index, entry)
        if "storyboard" in entry:
            board = self._board(index, entry)
            return self._tiles(index, board, [(k, times[k]) for k in numbers]), []
        video = self._video(index, entry)
        places = np.searchsorted(video.times, [times[k] for k in numbers])
        return video.frames(np.minimum(places, len(video.times) - 1).tolist()), video.unused

    def _board(self, index: int, entry: dict[str, Any]) -> _Board:
        """Parses the storyboard of an entry.

        Raises:
            Damaged: the entry is malformed, or its sheets hold fewer tiles than it has frames.
        """
        try:
            names = entry["storyboard"]
            names = [names] if isinstance(names, str) else list(names)
            rows, columns = (_each(entry[key], len(names)) for key in ("rows", "columns"))
            board = _Board(names, rows, columns, _bounded(int(entry["frames"])))
            if not names or min(board.tiles) < 1:
                raise ValueError(f"{rows} x {columns} tiles")
            if board.frames > sum(board.tiles):
                raise ValueError(f"{board.frames} frames, {sum(board.tiles)} tiles")
            return board
        except MALFORMED as error:
            raise Damaged("malformed entry", self.where(index), repr(error)) from None

    def _tiles(self, index: int, board: _Board, frames: list[tuple[int, float]]) -> list[Frame]:
        """Cuts frames from their sheets.

        Args:
            frames: (number in the video, seconds) of each frame.
        """
        cut: list[Frame] = []
        first = 0
        for n, (name, tiles) in enumerate(zip(board.sheets, board.tiles, strict=True)):
            on_sheet = [(k - first, time) for k, time in frames if first <= k < first + tiles]
            if on_sheet:
                tiles_used = board.frames - first
                alike = n and (board.rows[0], board.columns[0]) == (board.rows[n], board.columns[n])
                full = self._file(index, board.sheets[0]) if alike and tiles_used < tiles else None
                cut += storyboard(
                    self._file(index, name),
                    board.rows[n],
                    board.columns[n],
                    on_sheet,
                    self.where(index),
                    tiles_used=tiles_used,
                    full=full,
                )
            first += tiles
        return cut

    def _video(self, index: int, entry: dict[str, Any]) -> Video:
        where, folder = self.where(index), self._entries.folder(index)
        return Video(self._media.open(entry.get("video"), folder, where, storage.MOST_VIDEO), where)

    def _file(self, index: int, name: object, most: int = storage.MOST_IMAGE) -> bytes:
        return self._media.read(name, self._entries.folder(index), self.where(index), most)
