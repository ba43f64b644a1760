"""Indexing 100 million documents with one process and with several, and opening them for training.

The documents are short image-text pairs in shards as `emu-jax data build` writes them, with token
counts. One shard of 262,144 documents is written; the others are hard links to it. `emu-jax data
index` counts the records of each shard and writes the outlines of all documents; it opens no
document. Training is opened in a process of its own: the index is opened and the first batch
planned. `again` is the time of `data index` when all is cached, as after an interruption at its
end. Seconds are wall-clock times.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from emu_jax import bench
from emu_jax.data import Batches, DataConfig, Document, Image, Text
from emu_jax.data.build.indexing import index_sources
from emu_jax.data.build.runners import on_processes
from emu_jax.data.documents import write_documents
from emu_jax.data.known_lengths import KnownLengths, lengths_path, save_lengths
from emu_jax.data.lengths import part_lengths
from emu_jax.data.sources import SourceConfig
from emu_jax.host_memory import PeakMemory
from emu_jax.tokenizer import Tokenizer

SHARD_DOCUMENTS = 1 << 18
ROW_TOKENS, ROW_IMAGES, ROWS, ROW_GROUP = 832, 16, 64, 8


def run(documents: int = 100_000_000, processes: int = 2) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        shards = -(-documents // SHARD_DOCUMENTS)
        write(Path(folder), shards)
        taken = {count: index(config(folder, count), count) for count in sorted({1, processes})}
        again = index(config(folder, processes), processes)
        code = f"from emu_jax import bench; bench.load_benchmark('indexing').opening({folder!r})"
        output = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)
        total = shards * SHARD_DOCUMENTS
        return {
            "documents": total,
            "index_s": {str(n): round(times.wall, 1) for n, times in taken.items()},
            "processor_s": {str(n): round(times.processor, 1) for n, times in taken.items()},
            "documents_a_second": {str(n): round(total / t.wall) for n, t in taken.items()},
            "speed_up": round(taken[1].wall / taken[processes].wall, 2),
            "again_s": round(again.wall, 2),
            "again_processor_s": round(again.processor, 2),
            **json.loads(output.stdout.splitlines()[-1]),
        }


class Times(NamedTuple):
    """Seconds of a run.

    Attributes:
        processor: processor time of this process and its workers together.
    """

    wall: float
    processor: float


def write(folder: Path, shards: int) -> None:
    """Writes the shards, their token counts, and a tokenizer."""
    tokenizer = Tokenizer.train(["a pair"], 300)
    tokenizer.save(folder / "tokenizer")
    kinds = [Document((Image(b""), Text("a pair " * (1 + n % 64)))) for n in range(64)]
    first = folder / "0.array_record"
    write_documents(first, (kinds[n % len(kinds)] for n in range(SHARD_DOCUMENTS)))
    sizes = [part_lengths(document, tokenizer) for document in kinds]
    known = KnownLengths(
        np.full(SHARD_DOCUMENTS, 2), np.tile(np.ravel(sizes), SHARD_DOCUMENTS // len(kinds))
    )
    save_lengths(str(first), first.stat().st_size, tokenizer.fingerprint, known)
    for n in range(1, shards):
        shard = folder / f"{n}.array_record"
        os.link(first, shard)
        os.link(lengths_path(str(first)), lengths_path(str(shard)))


def config(folder: str, processes: int) -> DataConfig:
    """Returns the config of training, with the cache that some processes write."""
    return DataConfig(
        root=folder,
        sources=(SourceConfig("pairs", "records", (folder,), paired=True),),
        cache=f"{folder}/cache-{processes}",
        batch_size=ROWS,
        row_tokens=ROW_TOKENS,
        row_images=ROW_IMAGES,
        row_group=ROW_GROUP,
        prefetch=0,
    )


def index(cfg: DataConfig, processes: int) -> Times:
    """Indexes the documents; returns the seconds that it took."""
    tokenizer = cfg.load_tokenizer()
    began, before = time.perf_counter(), os.times()
    runner = functools.partial(on_processes, workers=processes, caller_works=True)
    index_sources(cfg, tokenizer, runner)
    wall, after = time.perf_counter() - began, os.times()
    return Times(wall, sum(after[:4]) - sum(before[:4]))


def opening(folder: str) -> None:
    """Opens the documents for training, and prints its seconds and anonymous memory as JSON."""
    cfg = config(folder, 1)
    tokenizer = cfg.load_tokenizer()
    began, began_processor = time.perf_counter(), time.process_time()
    with PeakMemory() as memory, Batches(cfg, tokenizer, "rows", plan_only=True) as batches:
        opened = time.perf_counter() - began
        opened_processor = time.process_time() - began_processor
        next(batches)
        planned = time.perf_counter() - began
        planned_processor = time.process_time() - began_processor
    figures = {
        "open_s": round(opened, 2),
        "open_processor_s": round(opened_processor, 2),
        "first_batch_planned_s": round(planned, 2),
        "first_batch_planned_processor_s": round(planned_processor, 2),
    }
    if memory.peak is not None and memory.before is not None:
        figures["anonymous_mib"] = round((memory.peak - memory.before) / 2**20, 1)
    print(json.dumps(figures))


def table(figures: dict) -> str:
    counts = list(figures["index_s"])
    return bench.markdown_table(
        ("Processes", "Index (s)", "Processor time (s)", "Documents a second", "Speed-up"),
        [
            (
                count,
                figures["index_s"][count],
                figures["processor_s"][count],
                figures["documents_a_second"][count],
                figures["speed_up"] if count != "1" else "",
            )
            for count in counts
        ],
    ) + (
        f"\n\n{figures['documents']:,} documents. Seconds (and processor time): index again "
        f"{_both(figures, 'again')}, opening for training {_both(figures, 'open')}, to the first "
        f"planned batch {_both(figures, 'first_batch_planned')}. Anonymous memory of opening: "
        f"{figures.get('anonymous_mib')} MiB."
    )


def _both(figures: dict, name: str) -> str:
    return f"{figures[f'{name}_s']} ({figures.get(f'{name}_processor_s', '-')})"
