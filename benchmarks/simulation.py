"""`emu-jax data simulate` against the real pipeline, for a mixture of a million documents.

The mixture has pairs, pages and storyboards whose lengths are drawn from the distributions that
`data simulate` knows. The real pipeline reads them from shards as `emu-jax data build` writes them:
`emu-jax data index` stores their token counts, which training then maps. Images are empty, and no
document is read to plan a batch. A shard of each kind is written; the others are hard links to it.
Both plan the rows of the first of 16 hosts. Memory is that of planning, without the token counts,
which are open by then: up to 128 MiB of a source are copied, more are mapped. The index of pairs
and storyboards is measured on one tar of each, and that of pages on one listing. Times are
processor times of one core; the two take turns.
"""

import dataclasses
import functools
import io
import json
import os
import statistics
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from emu_jax import bench
from emu_jax.data import Batches, DataConfig, Document, Image, Text
from emu_jax.data.batches import RowBuilder
from emu_jax.data.build.indexing import index_sources
from emu_jax.data.build.runners import on_processes
from emu_jax.data.documents import write_documents
from emu_jax.data.known_lengths import KnownLengths, lengths_path, save_lengths
from emu_jax.data.lengths import part_lengths
from emu_jax.data.mixture import open_sources
from emu_jax.data.simulate import Distribution, load_distribution, plan_steps, simulate
from emu_jax.data.sources import SourceConfig, open_source
from emu_jax.tokenizer import Tokenizer

MIXTURE = {"laion": 128.0, "mmc4": 64.0, "storyboards": 16.0}
HOSTS, ROWS, ROW_TOKENS, ROW_IMAGES, ROW_GROUP = 16, 1024, 2048, 25, 8
SHARDS = 16  # of each kind
WORD = "a"


def run(documents: int = 1_000_000, steps: int = 32, turns: int = 5) -> dict:
    mixture = [(load_distribution(name), weight) for name, weight in MIXTURE.items()]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer.train([f"{WORD} " * 9], 300)
        tokenizer.save(Path(folder) / "tokenizer")
        total = sum(MIXTURE.values())
        counts = {d.name: round(documents * weight / total) for d, weight in mixture}
        sources = tuple(
            write(Path(folder), distribution, counts[distribution.name], weight, tokenizer)
            for distribution, weight in mixture
        )
        cfg = DataConfig(
            root=folder,
            sources=sources,
            cache=f"{folder}/cache",
            batch_size=ROWS,
            row_tokens=ROW_TOKENS,
            row_images=ROW_IMAGES,
            row_group=ROW_GROUP,
            prefetch=0,
        )
        index_sources(cfg, tokenizer, functools.partial(on_processes, workers=1))
        real: dict[str, list[float]] = {}
        simulated: dict[str, list[float]] = {}
        plan(cfg, tokenizer, 1)  # what is imported, is imported
        for _ in range(turns):
            for figures, measured in (
                (simulated, simulate(cfg, mixture, documents, HOSTS, steps)._asdict()),
                (real, plan(cfg, tokenizer, steps)),
            ):
                for name in NAMES:
                    if name in measured:
                        figures.setdefault(name, []).append(measured[name])
        index = stored(Path(cfg.cache)) + sum(
            counts[d.name] * index_bytes(Path(folder), d) for d, _ in mixture
        )
    real["index_bytes"] = [index]
    return {
        name: {
            "simulated": statistics.median(simulated[name]),
            "real": statistics.median(real[name]),
            "ratio": round(statistics.median(simulated[name]) / statistics.median(real[name]), 3),
        }
        for name in NAMES
    }


NAMES = {
    "token_fill": "Tokens filled",
    "image_fill": "Images filled",
    "plan_ms": "Planning a step (ms)",
    "first_plan_seconds": "First batch planned (s)",
    "memory_bytes": "Memory of planning (bytes)",
    "index_bytes": "Index and token counts (bytes)",
}


def table(figures: dict) -> str:
    return bench.markdown_table(
        ("", "Simulated", "Real", "Ratio"),
        [
            (NAMES[name], each["simulated"], each["real"], each["ratio"])
            for name, each in figures.items()
        ],
    )


def write(
    folder: Path,
    distribution: Distribution,
    count: int,
    weight: float,
    tokenizer: Tokenizer,
    shards: int = SHARDS,
) -> SourceConfig:
    """Writes the documents of a source and their token counts."""
    rng = np.random.default_rng(0)
    each = -(-count // shards)
    drawn = rng.integers(len(distribution.outlines), size=each)
    kinds = [
        Document(tuple(Image(b"") if size < 0 else Text(f"{WORD} " * size) for size in outline))
        for outline in distribution.outlines
    ]
    assert [part_lengths(kind, tokenizer) for kind in kinds[:20]] == distribution.outlines[:20]
    paths = [folder / distribution.name / f"{n}.array_record" for n in range(shards)]
    write_documents(paths[0], (kinds[n] for n in drawn.tolist()))
    sizes = [np.array(distribution.outlines[n]) for n in drawn.tolist()]
    known = KnownLengths(np.array(list(map(len, sizes))), np.concatenate(sizes))
    save_lengths(str(paths[0]), paths[0].stat().st_size, tokenizer.fingerprint, known)
    for path in paths[1:]:
        os.link(paths[0], path)
        os.link(lengths_path(str(paths[0])), lengths_path(str(path)))
    settings = {key: value for key, value in distribution.settings.items() if key != "format"}
    name, folders = distribution.name, (f"{folder}/{distribution.name}",)
    return SourceConfig(name, "records", folders, weight=weight, **settings)


def plan(cfg: DataConfig, tokenizer: Tokenizer, steps: int) -> dict[str, float]:
    """Plans the batches of the first host, as `simulate` does."""
    sources = open_sources(cfg, tokenizer, RowBuilder.requires)
    cost, _ = plan_steps(cfg, sources, ROWS // HOSTS, steps)
    rows = dataclasses.replace(cfg, batch_size=ROWS // HOSTS)
    with Batches(rows, tokenizer, "rows", plan_only=True) as batches:
        for _ in range(steps):
            next(batches)
        filled = batches.statistics()
    fill = {name: filled[name] for name in ("token_fill", "image_fill")}
    return fill | cost._asdict()


def stored(folder: Path) -> int:
    """Returns the bytes of the token counts in a cache."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files if path.parent.name.startswith("outlines"))


def index_bytes(folder: Path, distribution: Distribution) -> float:
    """Returns the bytes of the index of one document, in the format of the distribution."""
    path = folder / f"{distribution.name}.x"
    outlines, media = distribution.outlines, folder / f"{distribution.name}-index"
    kind = distribution.settings["format"]
    if kind == "webdataset":
        with tarfile.open(path.with_suffix(".tar"), "w") as file:
            for number, outline in enumerate(outlines):
                for name, content in members(f"{number:06}", outline):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    file.addfile(member, io.BytesIO(content))
        path = path.with_suffix(".tar")
    else:
        page: dict[str, Any] = {"images": [None], "texts": [WORD]}
        path = path.with_suffix(".jsonl")
        path.write_text("".join(json.dumps(page) + "\n" for _ in outlines))
    found = open_source(SourceConfig("x", kind, (str(path),)), str(media))
    assert len(found) == len(outlines)
    arrays = [p for p in media.rglob("*.npy") if p.stem not in ("tally", "wide_row", "wide_span")]
    heads = 128 * len(arrays)
    # A source of several files also has the number of each document's file.
    return (sum(p.stat().st_size for p in arrays) - heads) / len(outlines) + 4


def members(name: str, outline: list[int]) -> list[tuple[str, bytes]]:
    """Returns the members of a pair or a storyboard, as (name, content)."""
    if len(outline) == 2:
        return [(f"{name}.jpg", b"x"), (f"{name}.txt", WORD.encode())]
    found, frame = list[tuple[str, bytes]](), -1
    for size in outline:
        frame += size < 0
        found.append((f"{name}.{frame}.{'png' if size < 0 else 'txt'}", b"x"))
    return [*found, (f"{name}.final_meta.json", b"{}")]
