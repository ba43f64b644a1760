"""Videos as documents: with a caption, or frames and subtitles in the order of time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from emu_jax.data import storage
from emu_jax.data.documents import Damaged, Document, Picture, Text, Unused
from emu_jax.data.listings import Entries, Listed, Media
from emu_jax.data.video import (
    Frame,
    Video,
    sample_frames,
    storyboard,
    storyboard_times,
    subtitles,
)

_MOST_FRAMES = 100_000  # of one video in the order of time; a listing that asks for more is wrong


class Videos(Listed):
    """Entries `{"video": FILE, "text": WORDS}`: `frames` frames of each and its words.

    In training frames are drawn at random; else they are the release's.
    """

    paired = True

    def __init__(self, entries: Entries, media: Media, frames: int):
        super().__init__(entries, media, frames)
        self._frames = frames

    def read(
        self, index: int, seed: Sequence[int] | None = None,
        wanted: Collection[int] | None = None,
    ) -> Document:  # fmt: skip
        entry, where = self._entries[index], self.where(index)
        words = _words(entry, where)
        folder = self._entries.folder(index)
        content = self._media.read(entry.get("video"), folder, where, storage.MOST_VIDEO)
        video = Video(content, where)
        shown = sample_frames(video, self._frames, seed)
        parts = (*(Picture(data, time) for time, data in shown), words)
        return Document(parts, tuple(video.unused))

    def sketch(self, index: int) -> Document:
        words = _words(self._entries[index], self.where(index))
        return Document((*[Picture(b"")] * self._frames, words))


def _words(entry: dict[str, Any], where: str) -> Text:
    words = entry.get("text", entry.get("caption"))
    if not isinstance(words, str):
        raise Damaged("malformed entry", where, "no text")
    return Text(words)


def _bounded(frames: int) -> int:
    if frames > _MOST_FRAMES:
        raise ValueError(f"more than {_MOST_FRAMES} frames")
    return frames


class SubtitledVideos(Listed):
    """Frames and subtitles in the order of time, as the release prepares YT-Storyboard-1B:
    subtitles between two frames are joined.

    Entries have `subtitles` (a file of SRT, WebVTT, SBV, ASS or TTML, whose `encoding` may be
    given), and either `video`, of which a frame is shown every `apart` seconds, with its
    `duration` where opening each to count tokens would be slow; or `storyboard` (a sheet or a
    list of them), `rows`, `columns`, `frames` and `duration` in seconds.
    """

    def __init__(self, entries: Entries, media: Media, apart: float):
        super().__init__(entries, media, apart)
        self._apart = apart

    def read(
        self, index: int, seed: Sequence[int] | None = None,
        wanted: Collection[int] | None = None,
    ) -> Document:  # fmt: skip
        document = self.sketch(index)
        pictures = [n for n, part in enumerate(document.parts) if isinstance(part, Picture)]
        shown = [k for k, n in enumerate(pictures) if wanted is None or n in wanted]
        parts = list(document.parts)
        frames, unused = self._frames(index, shown)
        for k, (_, data) in zip(shown, frames, strict=True):
            part = parts[pictures[k]]
            assert isinstance(part, Picture)
            parts[pictures[k]] = Picture(data, part.time)
        return Document(tuple(parts), (*document.unused, *unused))

    def sketch(self, index: int) -> Document:
        entry, where = self._entries[index], self.where(index)
        encoding = entry.get("encoding")
        if not isinstance(encoding, str | None):
            raise Damaged("malformed entry", where, f"encoding {encoding!r}")
        content = self._file(index, entry.get("subtitles"), storage.MOST_TEXT)
        said = subtitles(content, where, encoding)
        document = Document.from_video([(time, b"") for time in self._times(index, entry)], said)
        return dataclasses.replace(document, unused=said.unused)

    def _times(self, index: int, entry: dict[str, Any]) -> list[float]:
        where = self.where(index)
        try:
            if "storyboard" in entry:
                frames = _bounded(int(entry["frames"]))
                return storyboard_times(frames, float(entry["duration"]))
            if "duration" in entry:
                last = float(entry["duration"])
            else:
                last = self._video(index, entry).times[-1]
            return [n * self._apart for n in range(_bounded(math.floor(last / self._apart) + 1))]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise Damaged("malformed entry", where, repr(error)) from None

    def _frames(self, index: int, shown: list[int]) -> tuple[list[Frame], list[Unused]]:
        """The frames of some numbers, and what could not be decoded."""
        entry, where = self._entries[index], self.where(index)
        times = self._times(index, entry)
        if "storyboard" in entry:
            names = entry["storyboard"]
            names = [names] if isinstance(names, str) else names
            try:
                rows, columns = int(entry["rows"]), int(entry["columns"])
                per_sheet = rows * columns
                if rows < 1 or columns < 1:
                    raise ValueError(f"{rows} x {columns} tiles")
                needed = sorted({k // per_sheet for k in shown})
                sheets = {n: self._file(index, names[n]) for n in needed}
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise Damaged("malformed entry", where, repr(error)) from None
            frames = [
                frame
                for n in needed
                for frame in storyboard(
                    sheets[n], rows, columns,
                    [(k % per_sheet, times[k]) for k in shown if k // per_sheet == n], where,
                )
            ]  # fmt: skip
            return frames, []
        video = self._video(index, entry)
        places = np.searchsorted(video.times, [times[k] for k in shown])
        return video.frames(np.minimum(places, len(video.times) - 1).tolist()), video.unused

    def _video(self, index: int, entry: dict[str, Any]) -> Video:
        content = self._file(index, entry.get("video"), storage.MOST_VIDEO)
        return Video(content, self.where(index))

    def _file(self, index: int, name: object, most: int = storage.MOST_IMAGE) -> bytes:
        return self._media.read(name, self._entries.folder(index), self.where(index), most)
