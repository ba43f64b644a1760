"""Videos, storyboards and subtitles: moving pictures as pictures with times.

Frames are handed on as PPM, pixels behind a short header: nothing is lost, and reading it costs
a copy.
"""

from __future__ import annotations

import bisect
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from emu_jax.config import UserError
from emu_jax.data.cues import read_cues, unroll
from emu_jax.data.documents import Damaged, Unused
from emu_jax.data.images import PictureError, open_image

FRAMES = 8  # that the release shows of a video

# FFmpeg also reads lists that name other files: those are no videos here.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"

Frame = tuple[float, bytes]  # (seconds, PPM)
Clip = tuple[float, float]  # (start, end) in seconds


def frame_indices(frames: int, segments: int = FRAMES) -> Int[np.ndarray, "S"]:
    """Which frames stand for a video (release: `Emu1/utils.py: get_index`).

    Raises:
        UserError: the video has no frames.
    """
    if frames < 1:
        raise UserError("a video needs at least one frame")
    length = (frames - 1) / segments
    return int(length / 2) + np.round(length * np.arange(segments)).astype(int)


def random_indices(frames: int, count: int, rng: np.random.Generator) -> Int[np.ndarray, "count"]:
    """`count` frames at random, in order; one twice only where there are fewer."""
    return np.sort(rng.choice(frames, count, replace=frames < count))


def open_container(content: bytes) -> Any:
    """A video's file as PyAV reads it; nothing outside of `content` is opened."""
    import av  # loads FFmpeg

    return av.open(io.BytesIO(content), options={"format_whitelist": _CONTAINERS})


class Video:
    """A video's frames, read at random.

    Attributes:
        times: seconds at which each frame is shown, ascending. Found without decoding.

    Raises:
        Damaged: it cannot be read, or has no frames.
    """

    def __init__(self, content: bytes, where: str):
        self._content, self._where = content, where
        try:
            with self._open() as container:
                stream = container.streams.video[0]
                packets = [p for p in container.demux(stream) if p.pts is not None]
                self._pts = sorted(p.pts for p in packets)
                self._keys = sorted(p.pts for p in packets if p.is_keyframe)
                base = stream.time_base
        except EOFError:  # at the end before the first frame
            raise Damaged("video without frames", where) from None
        except Exception as error:  # FFmpeg's errors, and IndexError where nothing moves
            raise Damaged("unreadable video", where, _why(error)) from None
        if not self._pts:
            raise Damaged("video without frames", where)
        self.times = [float((pts - self._pts[0]) * base) for pts in self._pts]

    def _open(self) -> Any:
        return open_container(self._content)

    def frames(self, indices: Sequence[int]) -> list[Frame]:
        """The frames of ascending numbers.

        Raises:
            Damaged: one of them cannot be decoded.
        """
        wanted = [self._pts[i] for i in indices]
        try:
            with self._open() as container:
                stream = container.streams.video[0]
                stream.codec_context.thread_count = 1  # videos are decoded side by side
                shown = dict(self._decode(container, stream, sorted(set(wanted))))
        except Exception as error:
            raise Damaged("unreadable video", self._where, _why(error)) from None
        if missing := [i for i in indices if self._pts[i] not in shown]:
            raise Damaged("unreadable video", self._where, f"frame {missing[0]}")
        return [(self.times[i], shown[self._pts[i]]) for i in indices]

    def _decode(
        self, container: Any, stream: Any, wanted: list[int]
    ) -> Iterator[tuple[int, bytes]]:
        """Goes through the video, and leaps to a key frame where one lies between."""
        frames, reached = container.decode(stream), self._pts[0] - 1
        for pts in wanted:
            key = max((k for k in self._keys if k <= pts), default=None)
            if key is not None and key > reached + 1:
                container.seek(key, stream=stream, backward=True)
                frames = container.decode(stream)
            for frame in frames:
                reached = frame.pts
                if frame.pts == pts:
                    yield pts, ppm(frame.to_image())
                if frame.pts >= pts:
                    break


def sample_frames(
    video: Video, count: int, seed: Sequence[int] | None, clip: Clip | None = None
) -> list[Frame]:
    """Samples `count` frames: at random with a seed, or else those that the release would show.

    Args:
        clip: sample only frames whose time is in `start <= time < end`. A clip shorter than a
            frame has the frame that is on screen at its start.

    Raises:
        Damaged: the video ends before the clip starts, or a frame cannot be decoded.
    """
    first, last = 0, len(video.times)
    if clip is not None:
        first, last = (bisect.bisect_left(video.times, time) for time in clip)
        if clip[0] > video.times[-1]:
            raise Damaged("video without frames", video._where, f"none in {clip[0]} .. {clip[1]} s")
        if first >= last:
            first = max(0, bisect.bisect_right(video.times, clip[0]) - 1)
            last = first + 1
    if seed is None:
        indices = frame_indices(last - first, count)
    else:
        indices = random_indices(last - first, count, np.random.default_rng(seed))
    return video.frames((first + indices).tolist())


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or repr(error)


def ppm(picture: Image.Image) -> bytes:
    """A picture's pixels as a file."""
    file = io.BytesIO()
    picture.convert("RGB").save(file, "PPM")
    return file.getvalue()


def storyboard(
    sheet: bytes, rows: int, columns: int, frames: Sequence[tuple[int, float]], where: str
) -> list[Frame]:
    """Frames from a sheet of rows x columns tiles, as video sites make them.

    Args:
        frames: (number of the tile, seconds) of each.

    Raises:
        Damaged: the sheet cannot be read.
    """
    try:
        picture = open_image(sheet)
    except PictureError as error:
        raise Damaged(error.reason, where, "a sheet of the storyboard") from None
    width, height = picture.width // columns, picture.height // rows

    def tile(n: int) -> Image.Image:
        x, y = n % columns * width, n // columns * height
        return picture.crop((x, y, x + width, y + height))

    return [(time, ppm(tile(n))) for n, time in frames]


def storyboard_times(frames: int, duration: float) -> list[float]:
    """When each frame is shown: a whole number of seconds apart
    (release: `Emu1/data/yt-sb-1b`)."""
    apart = max(1, round(duration / frames)) if frames else 0
    return [float(n * apart) for n in range(frames)]


class Subtitles(list[tuple[float, str]]):
    """(start in seconds, words) of each cue, in the order of time.

    Attributes:
        unused: cues and lines of the file that are not among them.
    """

    def __init__(self, cues: Iterable[tuple[float, str]] = (), unused: Sequence[Unused] = ()):
        super().__init__(cues)
        self.unused = tuple(unused)


def subtitles(content: bytes, where: str, encoding: str | None = None) -> Subtitles:
    """Reads a subtitle file of any format that `cues` knows, without markup.

    Captions that roll repeat a line in the next cue, at the moment where the last one ends: such
    a line is read once. A line that is said again after a pause is read again.

    Args:
        encoding: of the text, where it is known; by default it is found out.

    Raises:
        Damaged: the encoding is unknown, or there is text but no cue.
    """
    found, unused = read_cues(content, where, encoding)
    said = list(unroll(found, unused))
    return Subtitles(said, unused)
