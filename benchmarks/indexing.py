"""Indexing 100 million documents with one process and with several, and opening them for training.

The documents are pairs, or a mixture of pairs, pages and storyboards like the paper's, with lengths
drawn from the distributions that `data simulate` knows. They are in shards as `emu-jax data build`
writes them, with token counts. One shard of each kind is written; the others are hard links to it.
`emu-jax data index` counts the records of each shard and writes the outlines of all documents; it
opens no document. Training is opened in a process of its own: the index is opened and the first
batch planned. `again` is the time of `data index` when all is cached, as after an interruption at
its end. Seconds are wall-clock times, and medians over turns. The speed-up is the median of those
within each turn.
"""

import functools
import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from emu_jax import bench
from emu_jax.data import Batches, DataConfig
from emu_jax.data.build.indexing import index_sources
from emu_jax.data.build.runners import on_processes
from emu_jax.data.simulate import load_distribution
from emu_jax.host_memory import PeakMemory
from emu_jax.tokenizer import Tokenizer

simulation = bench.load_benchmark("simulation")

CORPORA = {"pairs": {"laion": 1.0}, "mixture": simulation.MIXTURE}
# Documents of a shard of each kind: about half a million texts and images together.
SHARD_DOCUMENTS = {"laion": 1 << 18, "mmc4": 1 << 15, "storyboards": 1 << 12}
ROW_TOKENS, ROW_IMAGES, ROWS, ROW_GROUP = 832, 16, 64, 8


class Times(NamedTuple):
    """Seconds of a run.

    Attributes:
        processor: processor time of this process and its workers together.
    """

    wall: float
    processor: float


def run(documents: int = 100_000_000, processes: int = 2, turns: int = 3, folder: str = "") -> dict:
    """Measures each corpus. Its files are written to a temporary folder in `folder`."""
    return {
        name: measure(weights, documents, processes, turns, folder)
        for name, weights in CORPORA.items()
    }


def measure(
    weights: Mapping[str, float], documents: int, processes: int, turns: int, folder: str
) -> dict:
    with tempfile.TemporaryDirectory(dir=folder or None) as holder:
        cfg, total = write(Path(holder), weights, documents)
        taken: dict[int, list[Times]] = {count: [] for count in sorted({1, processes})}
        for turn in range(turns):
            for count in sorted(taken, reverse=turn % 2 == 1):
                shutil.rmtree(cfg.cache, ignore_errors=True)
                taken[count].append(index(cfg, count))
        again = index(cfg, processes)
        code = f"from emu_jax import bench; bench.load_benchmark('indexing').opening({holder!r})"
        output = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)
        wall = {count: [times.wall for times in each] for count, each in taken.items()}
        seconds = {str(count): statistics.median(each) for count, each in wall.items()}
        processor = {
            str(count): statistics.median(times.processor for times in each)
            for count, each in taken.items()
        }
        return {
            "documents": total,
            "index_s": {count: round(each, 2) for count, each in seconds.items()},
            "processor_s": {count: round(each, 2) for count, each in processor.items()},
            "documents_a_second": {count: round(total / each) for count, each in seconds.items()},
            "speed_up": bench.ratio(wall[1], wall[processes]),
            "again_s": round(again.wall, 2),
            "again_processor_s": round(again.processor, 2),
            **json.loads(output.stdout.splitlines()[-1]),
        }


def write(folder: Path, weights: Mapping[str, float], documents: int) -> tuple[DataConfig, int]:
    """Writes the documents, their token counts and a tokenizer; returns the config that reads them,
    and how many there are."""
    tokenizer = Tokenizer.train([f"{simulation.WORD} " * 9], 300)
    tokenizer.save(folder / "tokenizer")
    sources, total = [], 0
    for name, weight in weights.items():
        each = SHARD_DOCUMENTS[name]
        shards = max(1, round(documents * weight / sum(weights.values()) / each))
        distribution = load_distribution(name)
        sources.append(
            simulation.write(folder, distribution, shards * each, weight, tokenizer, shards)
        )
        total += shards * each
    cfg = DataConfig(
        root=str(folder),
        sources=tuple(sources),
        cache=f"{folder}/cache",
        batch_size=ROWS,
        row_tokens=ROW_TOKENS,
        row_images=ROW_IMAGES,
        row_group=ROW_GROUP,
        prefetch=0,
    )
    (folder / "config").write_bytes(pickle.dumps(cfg))
    return cfg, total


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
    cfg = pickle.loads((Path(folder) / "config").read_bytes())
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
    return bench.markdown_table(
        ("Documents", "Processes", "Index (s)", "Processor time (s)", "Documents a second")
        + ("Speed-up",),
        [
            (
                f"{name}: {each['documents']:,}",
                count,
                each["index_s"][count],
                each["processor_s"][count],
                each["documents_a_second"][count],
                each["speed_up"] if count != "1" else "",
            )
            for name, each in figures.items()
            for count in each["index_s"]
        ],
    ) + "".join(
        f"\n\nOf the {name}, in seconds (and processor time): index again {_both(each, 'again')}, "
        f"opening for training {_both(each, 'open')}, to the first planned batch "
        f"{_both(each, 'first_batch_planned')}. Anonymous memory of opening: "
        f"{each.get('anonymous_mib')} MiB."
        for name, each in figures.items()
    )


def _both(figures: dict, name: str) -> str:
    return f"{figures[f'{name}_s']} ({figures.get(f'{name}_processor_s', '-')})"
