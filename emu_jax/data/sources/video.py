"""Videos, storyboards and subtitles, decoded to images with times.

Frames are passed on as PPM, raw pixels behind a short header: it is lossless, and reading it
costs one copy.
"""

from __future__ import annotations

import bisect
import collections
import io
import math
import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import PIL.Image
from jaxtyping import Int

from emu_jax.data.documents import Damaged, Unused
from emu_jax.data.images import MOST_PIXELS, ImageError, open_image
from emu_jax.data.sources.cues import read_cues, unroll
from emu_jax.data.storage import RangeFile
from emu_jax.errors import UserError

FRAMES = 8  # frames of a video that the release shows

# File suffixes of videos. How a file is read depends on its content.
VIDEO_SUFFIXES = (
    ".mp4",
    ".m4v",
    ".mov",
    ".qt",
    ".3gp",
    ".3g2",
    ".f4v",
    ".webm",
    ".mkv",
    ".avi",
    ".divx",
    ".ts",
    ".mts",
    ".m2ts",
    ".mpg",
    ".mpeg",
    ".mpe",
    ".m1v",
    ".m2v",
    ".vob",
    ".flv",
    ".wmv",
    ".asf",
    ".ogv",
)
# FFmpeg also reads playlists that name other files; those are refused.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg"
# These store decoding times, which differ from presentation times if frames are reordered.
_DECODING_TIMES = ("avi", "asf")
# Program streams: frames that share one timestamp get other timestamps after a seek.
_SHARED_TIMES = ("mpeg", "mpegvideo")

# MP4 files of these decoders are split into frames by their index alone, not by parsing frames.
_INDEXED_CODECS = ("h264", "hevc", "mpeg4", "vp9", "libdav1d", "av1")
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp")  # the first in a file
_HEAD = 4096  # bytes in which Matroska's first elements are

# A hostile file of a few megabytes may take hours to decode. Long videos of formats without usable
# timestamps, which are decoded from their beginning, take minutes.
SECONDS = 1800.0

CUT_SHORT = "video cut short"
UNDECODABLE_FRAME = "undecodable video frame"

Frame = tuple[float, bytes]  # (seconds, PPM)
Clip = tuple[float, float]  # (start, end) in seconds


def frame_indices(frames: int, segments: int = FRAMES) -> Int[np.ndarray, "segments"]:
    """Returns the indices of `segments` frames, evenly spaced in a video (release:
    `Emu1/utils.py: get_index`).

    Raises:
        UserError: the video has no frames.
    """
    if frames < 1:
        raise UserError("a video needs at least one frame")
    length = (frames - 1) / segments
    return int(length / 2) + np.round(length * np.arange(segments)).astype(int)


def random_indices(frames: int, count: int, rng: np.random.Generator) -> Int[np.ndarray, "count"]:
    """Returns the sorted indices of `count` random frames; repeats some only if there are fewer."""
    return np.sort(rng.choice(frames, count, replace=frames < count))


def open_container(content: bytes | BinaryIO | io.RawIOBase) -> Any:
    """Opens a video file with PyAV; nothing outside `content` is read."""
    import av  # loads FFmpeg

    file = io.BytesIO(content) if isinstance(content, bytes) else content
    return av.open(file, options={"format_whitelist": _CONTAINERS})


class _Overdue(Exception):
    """Raised past a deadline. Not one of FFmpeg's errors, which only cut a video short."""


class _Deadline:
    """A limit on the time that one step may take."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._end = seconds, time.monotonic() + seconds

    def check(self) -> None:
        """Checks the time.

        Raises:
            _Overdue: the time is up.
        """
        if time.monotonic() > self._end:
            raise _Overdue(f"not decoded within {self.seconds:g} s")


class Video:
    """Random access to the frames of a video.

    Frames are as a player shows them: rotated or mirrored by the display matrix, without those
    that an edit list hides. The pixel aspect ratio is ignored, as in the release, which squashes
    each frame to a square anyway.

    Of an MP4 or QuickTime file in a `RangeFile`, only the index is read to find the frames, and
    then the frames from the key frame before each that is asked for. Other files are read to their
    end once.

    Args:
        content: the file; it is not used by others at the same time.
        seconds: time limit of opening the video, and of each call of `frames`. It is checked
            between packets.

    Attributes:
        times: seconds from the first frame to each frame, ascending. Found without decoding.
        unused: frames that the file should have but that cannot be decoded; `frames` adds to it.

    Raises:
        Damaged: the video cannot be read in time, or has no frames.
    """

    def __init__(self, content: bytes | RangeFile, where: str, seconds: float = SECONDS) -> None:
        file = io.BytesIO(content) if isinstance(content, bytes) else content
        self._file, self._where, self._seconds = cast(BinaryIO, file), where, seconds
        self.unused: list[Unused] = []
        try:
            skimmed = _Skimmed(self._file)
            with open_container(skimmed if skimmed.spans else self._file) as container:
                stream = container.streams.best("video")
                if stream is None:
                    raise Damaged("unreadable video", where, "it has no video stream")
                indexed = stream.codec_context.name in _INDEXED_CODECS
                skimmed.skims = indexed and bool(skimmed.spans)
                packets, whole = _packets(container, stream, _Deadline(seconds))
                if skimmed.skims:  # the parser takes zeros for other frames
                    keys = {entry.timestamp for entry in stream.index_entries if entry.is_keyframe}
                    packets = [p._replace(is_keyframe=p.dts in keys) for p in packets]
                base, duration = stream.time_base, (container.duration or 0) / 1e6
                rate = stream.average_rate or stream.guessed_rate or 25
                form = container.format.name
                reordered = stream.codec_context.has_b_frames
        except UserError:  # of the store
            raise
        except EOFError:  # the file ends before the first frame
            raise Damaged("video without frames", where) from None
        except _Overdue as error:
            raise Damaged("slow video", where, error) from None
        except Exception as error:  # FFmpeg's errors are of many types
            raise Damaged("unreadable video", where, _why(error)) from None
        first = next((n for n, packet in enumerate(packets) if packet.is_keyframe), 0)
        self.unused += [Unused(UNDECODABLE_FRAME, "before the first key frame")] * first
        displayed = [packet for packet in packets[first:] if not packet.is_discard]
        if not displayed:
            raise Damaged("video without frames", where)
        given = {packet.pts for packet in displayed}
        known = None not in given and len(given) == len(displayed)
        # Whether frames are found by counting them, not by their timestamps.
        counted = form in _SHARED_TIMES or (reordered and form in _DECODING_TIMES)
        self._seekable = known and not counted
        self._pts = sorted(pts for pts in given if pts is not None) if known else []
        keys = (packet.pts for packet in packets if packet.is_keyframe)
        self._keys = sorted(pts for pts in keys if pts is not None) if self._seekable else []
        if known and form != "mpegvideo":  # which has only timestamps that FFmpeg makes up
            self.times = [float((pts - self._pts[0]) * base) for pts in self._pts]
        else:
            self.times = [float(n / rate) for n in range(len(displayed))]
        missing = duration - self.times[-1]
        if not whole or _cut_short(self._file) or missing > max(1.0, 0.1 * duration):
            self.unused.append(Unused(CUT_SHORT, f"{len(displayed)} frames, {self.times[-1]:g} s"))

    def frames(self, indices: Sequence[int]) -> list[Frame]:
        """Decodes the frames with the given numbers, which ascend.

        A frame that cannot be decoded is replaced by the frame that a player shows at its time,
        and added to `unused`.

        Raises:
            Damaged: none of the frames can be decoded, or not in time.
        """
        distinct = sorted(set(indices))
        deadline = _Deadline(self._seconds)
        try:
            decoded = dict(self._by_seeking(distinct, deadline)) if self._seekable else {}
            if missing := [index for index in distinct if index not in decoded]:
                decoded |= self._in_order(missing, deadline)
        except _Overdue as error:
            raise Damaged("slow video", self._where, error) from None
        except UserError:  # of the store
            raise
        except Exception as error:
            raise Damaged("unreadable video", self._where, _why(error)) from None
        if not decoded:
            raise Damaged("unreadable video", self._where, "no frame can be decoded")
        return [(self.times[index], decoded[index]) for index in indices]

    def _by_seeking(self, indices: list[int], deadline: _Deadline) -> Iterator[tuple[int, bytes]]:
        """Decodes frames in order, and seeks to a key frame if one lies between two of them.
        Frames that no other frame refers to are decoded only if they are asked for.

        Stops early if the decoded frames do not match the timestamps of their packets.
        """
        with self._open() as container:
            wanted = {self._pts[index] for index in indices}
            frames, reached = _decoded(container, deadline, wanted), self._pts[0] - 1
            for index in indices:
                pts = self._pts[index]
                keys_before = bisect.bisect_right(self._keys, pts)
                key = self._keys[keys_before - 1] if keys_before else reached
                if key > reached + 1:
                    container.seek(key, stream=container.streams.best("video"), backward=True)
                    frames = _decoded(container, deadline, wanted)
                else:
                    key = None
                for frame in frames:
                    if key is not None:  # frames before it lack their reference frames
                        if frame.pts is None or frame.pts > key:
                            return
                        if frame.pts < key:
                            continue
                        key = None
                    if frame.pts is None or frame.pts <= reached:
                        return
                    reached = frame.pts
                    if reached == pts:
                        yield index, ppm(_as_shown(frame))
                    if reached >= pts:
                        break

    def _in_order(self, indices: list[int], deadline: _Deadline) -> dict[int, bytes]:
        """Decodes everything up to the last of the frames."""
        decoded: dict[int, bytes] = {}
        left, last = collections.deque(indices), None

        def instead(frame: Any) -> None:
            index = left.popleft()
            decoded[index] = ppm(_as_shown(frame))
            self.unused.append(Unused(UNDECODABLE_FRAME, f"at {self.times[index]:g} s"))

        with self._open() as container:
            for number, frame in enumerate(_decoded(container, deadline)):
                position = frame.pts if self._seekable else number
                while left and position is not None and position > self._place(left[0]):
                    instead(frame if last is None else last)
                if left and position == self._place(left[0]):
                    decoded[left.popleft()] = ppm(_as_shown(frame))
                if not left:
                    break
                last = frame
            while left and last is not None:
                instead(last)
        return decoded

    def _open(self) -> Any:
        self._file.seek(0)
        container = open_container(self._file)
        codec = container.streams.best("video").codec_context
        codec.thread_count = 1  # several videos are decoded in parallel
        codec.options = {"max_pixels": str(MOST_PIXELS)}
        return container

    def _place(self, index: int) -> int:
        return self._pts[index] if self._seekable else index


class _Packet(NamedTuple):
    """A packet without its content, which for a long video fills the memory."""

    pts: int | None
    dts: int | None
    is_keyframe: bool
    is_discard: bool
    is_corrupt: bool


def _packets(container: Any, stream: Any, deadline: _Deadline) -> tuple[list[_Packet], bool]:
    """Returns a stream's packets, and whether the file could be read to its end."""
    packets: list[_Packet] = []
    whole = True
    try:
        for packet in container.demux(stream):
            deadline.check()
            if packet.size:  # PyAV ends the stream with an empty packet
                flags = packet.is_keyframe, packet.is_discard, packet.is_corrupt
                packets.append(_Packet(packet.pts, packet.dts, *flags))
    except (_Overdue, UserError):
        raise
    except Exception:
        if not packets:
            raise
        whole = False
    while len(packets) > 1 and packets[-1].is_corrupt:  # the file ends within it
        packets.pop()
        whole = False
    return packets, whole


def _decoded(
    container: Any, deadline: _Deadline, wanted: Collection[int] | None = None
) -> Iterator[Any]:
    """Yields the frames that can be decoded from the container's current position on.

    Args:
        wanted: timestamps of frames; others may be missing if no frame refers to them.
    """
    import av.error

    stream = container.streams.best("video")
    packets = container.demux(stream)
    while True:
        deadline.check()
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.error.FFmpegError:  # cut short: flush the frames that the decoder still holds
            packet = None
        if wanted is not None and packet is not None:
            needed = packet.is_keyframe or packet.pts in wanted or not packet.size
            stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
        try:
            yield from stream.codec_context.decode(packet)
        except av.error.FFmpegError:
            pass
        if packet is None:
            return


# (a, b, c, d) of a display matrix, which maps (x, y) to (a x + c y, b x + d y).
_TURNS = {
    (-1, 0, 0, 1): PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    (-1, 0, 0, -1): PIL.Image.Transpose.ROTATE_180,
    (1, 0, 0, -1): PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): PIL.Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): PIL.Image.Transpose.ROTATE_270,
    (0, -1, -1, 0): PIL.Image.Transpose.TRANSVERSE,
    (0, -1, 1, 0): PIL.Image.Transpose.ROTATE_90,
}


def _as_shown(frame: Any) -> PIL.Image.Image:
    """Rotates a frame by multiples of 90 degrees and mirrors it, as its display matrix says."""
    image = frame.to_image()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    values = np.frombuffer(bytes(matrix), np.int32)[[0, 1, 3, 4]]
    signs = np.sign(np.where(2 * np.abs(values) > np.abs(values).max(), values, 0))
    turn = _TURNS.get(tuple(signs.tolist()))
    return image if turn is None else image.transpose(turn)


class _Skimmed(io.RawIOBase):
    """A file whose frames read as zeros, without reading them, while `skims` is set.

    Attributes:
        spans: (start, end) of the boxes of an MP4 file that hold its frames; [] in other files.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file, self.skims = file, False
        self.spans = [(start + 16, end) for kind, start, end in _boxes(file) if kind == b"mdat"]
        file.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        if not self.skims or size < 0:
            return self._file.read(size)
        position = self._file.tell()
        n = bisect.bisect_right(self.spans, position, key=lambda span: span[1])
        start, end = self.spans[n] if n < len(self.spans) else (position + size, 0)
        if position < start:
            return self._file.read(min(size, start - position))
        length = max(0, min(size, min(end, _size(self._file)) - position))
        self._file.seek(position + length)
        return bytes(length)


def _size(file: BinaryIO) -> int:
    position = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(position)
    return size


def _at(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _boxes(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Yields (kind, start, end) of the outer boxes of an MP4 file; none in files of other kinds.

    The last one may end behind the end of the file.
    """
    start, size = 0, _size(file)
    if _at(file, 4, 4) not in _MP4_BOXES:
        return
    while start + 16 <= size:
        header = _at(file, start, 16)
        length = int.from_bytes(header[:4])
        if length == 1:
            length = int.from_bytes(header[8:])
        end = start + length if length >= 8 else size  # 0: to the end of the file
        yield header[4:8], start, end
        start = end


def _cut_short(file: BinaryIO) -> bool:
    """Returns whether an MP4, RIFF or Matroska file is shorter than its headers say."""
    size, head = _size(file), _at(file, 0, _HEAD + 16)
    if head.startswith(b"RIFF"):
        return int.from_bytes(head[4:8], "little") + 8 > size
    if head.startswith(b"\x1aE\xdf\xa3"):
        segment = head.find(b"\x18S\x80g", 0, _HEAD) + 4
        if segment > 4 and (first := head[segment]):
            width = 9 - first.bit_length()
            length = int.from_bytes(head[segment : segment + width]) - (1 << 7 * width)
            unknown = length == (1 << 7 * width) - 1
            return not unknown and segment + width + length > size
    return any(end > size for _, _, end in _boxes(file))


def sample_frames(
    video: Video, count: int, seed: Sequence[int] | None, clip: Clip | None = None
) -> list[Frame]:
    """Samples `count` frames: at random with a seed, otherwise those that the release shows.

    Args:
        clip: sample only frames whose time is in `start <= time < end`. A clip shorter than a
            frame gives the frame that is on screen at its start.

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


def ppm(image: PIL.Image.Image) -> bytes:
    """Encodes an image as PPM."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "PPM")
    return file.getvalue()


def storyboard(
    sheet: bytes,
    rows: int,
    columns: int,
    frames: Sequence[tuple[int, float]],
    where: str,
    *,
    tiles_used: int | None = None,
    full: bytes | None = None,
) -> list[Frame]:
    """Cuts frames from a storyboard sheet of rows x columns tiles, as video sites make them.

    The last sheet of a video may be cropped below its last row of tiles. If it has only one row,
    it may also be cropped after its last tile.

    Args:
        frames: (number of the tile, seconds) of each frame.
        tiles_used: number of tiles in use; by default all.
        full: a full sheet of the same video, from which the size of a tile is taken.

    Raises:
        Damaged: a sheet cannot be read, or is too small for its frames.
    """
    try:
        image = open_image(sheet)
        if tiles_used is None or tiles_used >= rows * columns:
            width, height = image.width // columns, image.height // rows
        elif full is not None:
            whole = open_image(full)
            width, height = whole.width // columns, whole.height // rows
        else:
            width, height = _tile(image.size, rows, columns, tiles_used)
    except ImageError as error:
        raise Damaged(error.reason, where, "a sheet of the storyboard") from None
    across = image.width // max(1, width)
    if not (width and height and across) or any(
        n >= across * (image.height // height) for n, _ in frames
    ):
        raise Damaged("malformed entry", where, f"a sheet of {image.width} x {image.height}")

    def tile(n: int) -> PIL.Image.Image:
        x, y = n % across * width, n // across * height
        return image.crop((x, y, x + width, y + height))

    return [(time, ppm(tile(n))) for n, time in frames]


_ASPECTS = (16 / 9, 4 / 3, 1.0, 3 / 4, 9 / 16)  # usual aspect ratios of videos


def _tile(size: tuple[int, int], rows: int, columns: int, tiles_used: int) -> tuple[int, int]:
    """Guesses the tile size of a video's only sheet when it is not full: takes the division whose
    tiles are closest to a usual aspect ratio."""
    left = -(-tiles_used // columns)
    cuts = [(rows, columns), (left, columns), *([(1, tiles_used)] if left == 1 else [])]
    whole = [(r, c) for r, c in cuts if not size[0] % c and not size[1] % r] or cuts
    tiles = [(size[0] // c, size[1] // r) for r, c in whole]

    def strange(tile: tuple[int, int]) -> float:
        aspect = math.log(max(1, tile[0]) / max(1, tile[1]))
        return min(abs(aspect - math.log(known)) for known in _ASPECTS)

    return min(tiles, key=strange)


def storyboard_times(frames: int, duration: float) -> list[float]:
    """Returns the times of a storyboard's frames, a whole number of seconds apart (release:
    `Emu1/data/yt-sb-1b`)."""
    apart = max(1, round(duration / frames)) if frames else 0
    return [float(n * apart) for n in range(frames)]


class Subtitles(list[tuple[float, str]]):
    """A list of (start in seconds, words) of each cue, ordered by time.

    Attributes:
        unused: cues and lines of the file that were left out.
    """

    def __init__(
        self, cues: Iterable[tuple[float, str]] = (), unused: Sequence[Unused] = ()
    ) -> None:
        super().__init__(cues)
        self.unused = tuple(unused)


def subtitles(content: bytes, where: str, encoding: str | None = None) -> Subtitles:
    """Reads a subtitle file of any format that `cues` supports, without markup.

    Roll-up captions repeat a line in the next cue, which starts when the last one ends; such a
    line is read once. A line that is repeated after a pause is read again.

    Args:
        encoding: encoding of the text, if known; detected by default.

    Raises:
        Damaged: the encoding is unknown, or there is text but no cue.
    """
    found, unused = read_cues(content, where, encoding)
    said = list(unroll(found, unused))
    return Subtitles(said, unused)
