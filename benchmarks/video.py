"""Eight frames of a 10-minute 720p video: processor time of one core, and bytes read.

The video is H.264 in MP4, 24 frames a second, with a key frame every two seconds. Ten seconds of a
moving image are encoded, and repeated without encoding again. The frames are sampled at random, as
in training, from a file that is opened anew each time.
"""

import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import PIL.Image

from emu_jax import bench
from emu_jax.data.sources.video import Video, sample_frames
from emu_jax.data.storage import RangeFile

WIDTH, HEIGHT, RATE = 1280, 720, 24
SECONDS, REPEATS = 10, 60
KEY_FRAMES = 2 * RATE  # frames from one key frame to the next
FRAMES = 8
TURNS = 9


class CountedFile(RangeFile):
    """A file that counts the bytes that are read of it."""

    total = 0

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        self.total += len(content)
        return content


def run() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write(path)
        seconds, sizes = [], []
        for turn in range(TURNS):
            began = time.process_time()
            with CountedFile(str(path)) as file:
                frames = sample_frames(Video(file, str(path)), FRAMES, (turn,))
            seconds.append(time.process_time() - began)
            sizes.append(file.total / 2**20)
            assert len(frames) == FRAMES
        return {
            "file_mib": round(path.stat().st_size / 2**20, 1),
            "read_mib": round(statistics.median(sizes), 2),
            "seconds": bench.median(seconds),
            "turns": TURNS,
        }


def table(figures: dict) -> str:
    return bench.markdown_table(
        ("Seconds of one core", "MiB read", "MiB of the file"),
        [(figures["seconds"], figures["read_mib"], figures["file_mib"])],
    )


def write(path: Path) -> None:
    """Writes the video."""
    first = io.BytesIO()
    with av.open(first, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=RATE, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.gop_size = KEY_FRAMES
        for pixels in moving_image(SECONDS * RATE):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode(None))
    with av.open(str(path), "w") as output:
        copied = None
        for turn in range(REPEATS):
            first.seek(0)
            with av.open(first) as source:
                video = source.streams.video[0]
                copied = copied or output.add_stream_from_template(video)
                shift = round(turn * SECONDS / video.time_base)
                for packet in source.demux(video):
                    if packet.dts is not None:
                        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                        packet.stream = copied
                        output.mux(packet)


def moving_image(count: int) -> Iterator[np.ndarray]:
    """Yields frames uint8 [HEIGHT, WIDTH, 3] that move over an image, with noise."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (HEIGHT // 8, (WIDTH + count) // 8, 3), np.uint8)
    size = (WIDTH + count, HEIGHT)
    wide = np.asarray(PIL.Image.fromarray(coarse).resize(size, PIL.Image.Resampling.BICUBIC))
    noise = rng.integers(-6, 7, (HEIGHT, WIDTH, 1), np.int16)
    for n in range(count):
        moved = wide[:, n : n + WIDTH].astype(np.int16) + np.roll(noise, 7 * n, axis=1)
        yield moved.clip(0, 255).astype(np.uint8)
