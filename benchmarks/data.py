"""Images per second on one core: the whole pipeline against decode and resize alone.

Generated JPEGs of web size (about 83 KB, short side 512), each with a caption, are planned, read,
decoded, resized to 224 x 224 (bicubic), tokenized, packed and batched, as in training. The
reference, `raw`, only decodes and resizes such files from memory with the same library. `fast` is
`raw` with `fast_decode`, and `full_fast` is the pipeline with it. The parts take many short
turns, so that other load hits all of them alike, and are timed by the processor time of the
process. Planning happens once per block of documents; it is timed separately and its share added
to each image.
"""

import dataclasses
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image

from emu_jax import bench
from emu_jax.data import Batches, DataConfig, Document, Image, Text
from emu_jax.data.batches import RowBuilder
from emu_jax.data.documents import write_documents
from emu_jax.data.images import open_image, resize
from emu_jax.data.mixture import open_groups
from emu_jax.data.sources import SourceConfig
from emu_jax.tokenizer import Tokenizer

ROW_IMAGES = 36  # images of a row, at most
IMAGES = 3 * ROW_IMAGES
DOCUMENTS = 32 * IMAGES  # more than are read, so that no caption repeats
TURNS = 96
SIZE = 224


def run() -> dict:
    rng = np.random.default_rng(0)
    images = [jpeg(rng) for _ in range(IMAGES)]
    captions = [caption(rng) for _ in range(DOCUMENTS)]
    pairs = (
        Document((Image(image), Text(words)))
        for image, words in zip(itertools.cycle(images), captions, strict=False)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.array_record"
        write_documents(path, pairs)
        Tokenizer.train(captions[:IMAGES], 1000).save(Path(folder) / "tokenizer")
        cfg = DataConfig(
            root=folder,
            sources=(SourceConfig("pairs", paths=(str(path),), paired=True),),
            batch_size=1,
            row_tokens=2176,
            row_images=ROW_IMAGES,
            image_size=SIZE,
            prefetch=0,
        )
        tokenizer, fast_cfg = cfg.load_tokenizer(), dataclasses.replace(cfg, fast_decode=True)
        (group,) = open_groups(cfg, tokenizer, RowBuilder.requires)
        blocks = itertools.count()
        # Separate iterators, so that both decode the same images in a turn.
        for_raw, for_fast = itertools.cycle(images), itertools.cycle(images)
        with Batches(cfg, tokenizer, "rows") as full, Batches(fast_cfg, tokenizer, "rows") as fast:
            parts: dict[str, Callable[[], int]] = {
                "full": lambda: int(next(full)["image_valid"].sum()),
                "raw": lambda: decode_alone(list(itertools.islice(for_raw, ROW_IMAGES))),
                "fast": lambda: decode_fast(list(itertools.islice(for_fast, ROW_IMAGES))),
                "full_fast": lambda: int(next(fast)["image_valid"].sum()),
                "plan": lambda: sum(map(len, group.block(next(blocks)).rows)),
            }
            seconds = bench.take_turns(parts, TURNS, clock=time.process_time, warm=False)
    plan = seconds.pop("plan")
    for name in ("full", "full_fast"):
        seconds[name] = [a + b for a, b in zip(seconds[name], plan, strict=True)]
    rates = {name: [1 / second for second in taken] for name, taken in seconds.items()}
    return {
        "image_bytes": round(statistics.mean(map(len, images))),
        **{f"{name}_per_core": bench.median(rate) for name, rate in rates.items()},
        **{
            f"{name}_over_raw": bench.ratio(rate, rates["raw"])
            for name, rate in rates.items()
            if name != "raw"
        },
        "plan_ms": bench.median([1e3 * second for second in plan]),
        "turns": TURNS,
    }


def table(figures: dict) -> str:
    names = {
        "raw": "`raw`: decode and bicubic resize to 224 x 224 only",
        "full": "`full`: plan, read, decode, resize, tokenize, pack, batch",
        "fast": "`fast`: as `raw`, with `fast_decode`",
        "full_fast": "`full_fast`: as `full`, with `fast_decode`",
    }
    return bench.markdown_table(
        ("", "Images per second, one core", "Relative to `raw`"),
        [
            (about, figures[f"{name}_per_core"], figures.get(f"{name}_over_raw", ""))
            for name, about in names.items()
        ],
    )


def decode_alone(contents: list[bytes]) -> int:
    for content in contents:
        image = PIL.Image.open(io.BytesIO(content))
        image.load()
        image.resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC)
    return len(contents)


def decode_fast(contents: list[bytes]) -> int:
    for content in contents:
        resize(open_image(content, at_least=SIZE), SIZE, fast=True)
    return len(contents)


def jpeg(rng: np.random.Generator) -> bytes:
    """Returns an image with the spectrum of a photograph, short side 512, about 83 KB."""
    height, width = (512, 683) if rng.random() < 0.5 else (683, 512)
    waves = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    waves[0, 0] = 1
    noise = rng.standard_normal((2, 4, *waves.shape))
    grey, *colours = (noise[0] + 1j * noise[1]) / waves**1.2
    planes = [np.fft.irfft2(grey + 0.3 * colour, (height, width)) for colour in colours]
    pixels = np.stack([128 + 50 * (plane - plane.mean()) / plane.std() for plane in planes], -1)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=70)
    return file.getvalue()


def caption(rng: np.random.Generator) -> str:
    """Returns eight to twenty-four random words."""
    letters = np.array(list("etaoinshrdlu"))
    return " ".join(
        "".join(rng.choice(letters, rng.integers(2, 8))) for _ in range(rng.integers(8, 25))
    )
