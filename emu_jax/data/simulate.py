"""`emu-jax data simulate`: plans the batches of a run on data that does not exist.

Documents are sampled from distributions of lengths, then mixed and packed by the code that training
uses.
A distribution is a JSON file:

    about      description
    format     format of the source, which decides the size of its index
    outlines   lengths of representative documents: for each part its tokens, or -1 for an image,
               -3 for the first frame of a video and -4 for each further one
    window_tokens, window_images, picked_images    of the source, if set (`SourceConfig`)

`emu_jax/data/distributions/` has those that are known by name.
"""

from __future__ import annotations

import dataclasses
import json
import time
import tracemalloc
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from emu_jax import markdown
from emu_jax.data.batches import Positions, RowAssignment, RowBuilder, plan_rows
from emu_jax.data.config import DataConfig
from emu_jax.data.documents import Document, Source
from emu_jax.data.lengths import TOTALS, Lengths
from emu_jax.data.mixture import OpenSource, make_groups
from emu_jax.data.packing import FRAME_PART, IMAGE_PART, VIDEO_PART
from emu_jax.data.permutation import splitmix64
from emu_jax.data.sources import SourceConfig
from emu_jax.data.sources.spans import SAMPLE_BYTES
from emu_jax.data.unused import Tally
from emu_jax.errors import UserError, suggest

_FOLDER = Path(__file__).parent / "distributions"
DOCUMENTS = tuple(10**n for n in range(6, 11))
_STEPS = 100  # planned and timed for each size
_SETTINGS = ("format", "window_tokens", "window_images", "picked_images")
_DOCUMENT_BYTES, _PART_BYTES = 5, 2  # of the cached lengths, see lengths.py
_FILE_BYTES = 4  # number of a sample's file, in the index of a tar
_LISTING_BYTES = 28  # of an entry of a listing


class Distribution(NamedTuple):
    """Lengths of representative documents.

    Attributes:
        settings: keys of the source's `SourceConfig`.
    """

    name: str
    outlines: list[list[int]]
    settings: dict[str, Any]

    def index_bytes(self) -> float:
        """Returns the bytes of the index and the token counts for each document."""
        parts = sum(map(len, self.outlines)) / len(self.outlines)
        tar = self.settings.get("format") == "webdataset"
        index = SAMPLE_BYTES + _FILE_BYTES if tar else _LISTING_BYTES
        return index + _DOCUMENT_BYTES + _PART_BYTES * parts


class SimulatedLengths(Lengths):
    """Lengths of `count` documents: each has an outline by a hash of its index.

    Args:
        frames: distinguish frames of videos from still images.
    """

    def __init__(self, distribution: Distribution, count: int, frames: bool = False) -> None:
        self.frames, self._count = frames, count
        self._outlines = distribution.outlines
        if not frames:
            self._outlines = [[max(size, IMAGE_PART) for size in o] for o in self._outlines]
        sizes = [np.array(outline) for outline in self._outlines]
        self._tokens = np.array([np.maximum(each, 0).sum() for each in sizes])
        self._images = np.array([(each < 0).sum() for each in sizes])
        self._videos = np.array([(each == VIDEO_PART).sum() for each in sizes])
        self._frames = np.array([(each <= VIDEO_PART).sum() for each in sizes])
        self.tally = Tally()
        self.tally.used["documents"] = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> list[int]:
        return self._outlines[int(self._outline(np.array([index]))[0])]

    def totals_of(self, indices: Int[np.ndarray, "documents"]) -> Int[np.ndarray, "5 documents"]:
        outlines = self._outline(indices)
        damage = np.zeros_like(self._tokens)
        totals = np.stack([self._tokens, self._images, damage, self._videos, self._frames])
        return totals[:, outlines]

    def damage(self, index: int) -> str | None:
        return None

    def totals(self) -> dict[str, int]:
        text, image = self._tokens > 0, self._images > 0
        each = (np.ones(len(text)), self._tokens, self._images, text, image, text & image)
        means = [float(np.mean(values)) for values in each]
        return dict(zip(TOTALS, [round(mean * self._count) for mean in means] + [0], strict=True))

    def _outline(self, indices: Int[np.ndarray, "documents"]) -> Int[np.ndarray, "documents"]:
        hashes = splitmix64(indices.astype(np.uint64))
        return (hashes % np.uint64(len(self._outlines))).astype(np.int64)


class SimulatedSource(Source):
    """A source whose documents cannot be read."""

    def __init__(self, count: int) -> None:
        self._count, self.fingerprint = count, f"simulated {count}"

    def __len__(self) -> int:
        return self._count

    def read(
        self,
        index: int,
        seed: Sequence[int] | None = None,
        part_indices: Collection[int] | None = None,
    ) -> Document:
        raise ValueError("a simulated document cannot be read")

    def where(self, index: int) -> str:
        return f"simulated document {index}"


class PlanningCost(NamedTuple):
    """Cost of planning the batches of one host.

    Attributes:
        plan_ms: milliseconds a step, on one core.
        documents_per_second: documents of the host's rows that are planned in a second.
        first_plan_seconds: seconds until the first batch is planned, after which its documents are
            read. It does not depend on the size of the data.
        memory_bytes: most bytes that planning allocates on the host, beside mapped files.
    """

    plan_ms: float
    documents_per_second: float
    first_plan_seconds: float
    memory_bytes: int


class Simulation(NamedTuple):
    """Planning of a run on one host.

    Attributes:
        documents: documents of all sources together.
        token_fill, image_fill: fraction of tokens and images that are not padding.
        plan_ms, documents_per_second, first_plan_seconds, memory_bytes: as in `PlanningCost`.
        index_bytes: indexes and token counts of all sources.
    """

    documents: int
    token_fill: float
    image_fill: float
    plan_ms: float
    documents_per_second: float
    first_plan_seconds: float
    memory_bytes: int
    index_bytes: int


def load_distribution(name: str) -> Distribution:
    """Loads a distribution by its name or its file.

    Raises:
        UserError: there is none, or it is damaged.
    """
    shipped = {path.stem: path for path in sorted(_FOLDER.glob("*.json"))}
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise UserError(
            f"no distribution of lengths {name!r}{suggest(name, shipped)}: "
            f"known are {', '.join(shipped)}; or give a JSON file"
        )
    try:
        values = json.loads(path.read_bytes())
        outlines = [[int(size) for size in outline] for outline in values["outlines"]]
        if not outlines or not all(map(_is_outline, outlines)):
            raise ValueError(
                "outlines must be lists of tokens, -1 for an image, -3 for the first frame of a "
                "video, and -4 for each further one, which follows another frame"
            )
        settings = {key: values[key] for key in _SETTINGS if key in values}
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path} is not a distribution of lengths ({error}): see docs/data.md for its keys"
        ) from None
    return Distribution(path.stem, outlines, settings)


def _is_outline(sizes: Sequence[int]) -> bool:
    """Returns whether each size is of a part, and each further frame follows a frame."""
    images = (IMAGE_PART, VIDEO_PART, FRAME_PART)
    return all(size >= 0 or size in images for size in sizes) and all(
        size != FRAME_PART or before in (VIDEO_PART, FRAME_PART)
        for before, size in zip([0, *sizes], sizes, strict=False)
    )


def simulated_sources(
    mixture: Sequence[tuple[Distribution, float]], documents: int, frames: bool = False
) -> list[OpenSource]:
    """Returns sources with `documents` documents together, shared out by weight.

    Args:
        frames: distinguish frames of videos from still images.
    """
    total = sum(weight for _, weight in mixture)
    sources = []
    for distribution, weight in mixture:
        count = max(1, round(documents * weight / total))
        cfg = SourceConfig(distribution.name, weight=weight, **distribution.settings)
        lengths = SimulatedLengths(distribution, count, frames)
        sources.append(OpenSource(cfg, SimulatedSource(count), lengths))
    return sources


def plan_steps(
    cfg: DataConfig, sources: list[OpenSource], rows: int, steps: int
) -> tuple[PlanningCost, Float[np.ndarray, "4"]]:
    """Plans `steps` batches of the first host, each of `rows` rows.

    Returns the cost, and the mean of each of ROW_STATISTICS over the rows.
    """

    def start() -> tuple[RowAssignment, Positions]:
        (group,) = make_groups(cfg, RowBuilder.requires, sources)
        return RowAssignment(group, [range(rows)]), ((0, 0),) * group.streams

    assignment, positions = start()
    totals = np.zeros(4, np.int64)
    began = time.process_time()
    positions = plan_rows(assignment, positions).positions
    first = time.process_time() - began
    local, began = 0, time.process_time()
    for _ in range(steps):
        planned = plan_rows(assignment, positions)
        positions = planned.positions
        totals += planned.totals.sum(axis=0)
        local += len(planned.placements)
    seconds = time.process_time() - began
    tracemalloc.start()
    try:
        assignment, positions = start()
        for _ in range(max(1, steps // 10)):
            positions = plan_rows(assignment, positions).positions
        memory = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    cost = PlanningCost(1000 * seconds / steps, local / seconds, first, memory)
    return cost, totals / (steps * sum(map(len, assignment.counted_rows)))


def simulate(
    cfg: DataConfig,
    mixture: Sequence[tuple[Distribution, float]],
    documents: int,
    hosts: int,
    steps: int = _STEPS,
) -> Simulation:
    """Plans the batches of the first of several hosts.

    Args:
        cfg: config with the sizes of the batches; its sources are not used.
        documents: number of documents of all sources together.

    Raises:
        UserError: the batch cannot be shared by the hosts.
    """
    if hosts < 1 or cfg.batch_size % hosts:
        raise UserError(
            f"batch_size {cfg.batch_size} cannot be shared by {hosts} hosts: make it a multiple"
        )
    sources = simulated_sources(mixture, documents, cfg.n_frame > 0)
    cfg = dataclasses.replace(cfg, sources=tuple(source.cfg for source in sources))

    cost, totals = plan_steps(cfg, sources, cfg.batch_size // hosts, steps)
    tokens, images, _, _ = totals.tolist()
    return Simulation(
        documents,
        tokens / cfg.row_tokens,
        images / cfg.row_images,
        *cost,
        round(
            sum(
                len(source.documents) * distribution.index_bytes()
                for source, (distribution, _) in zip(sources, mixture, strict=True)
            )
        ),
    )


def simulations_table(results: Sequence[Simulation]) -> str:
    """Formats the figures as a Markdown table."""
    head = (
        "Documents",
        "Tokens filled",
        "Images filled",
        "Planning a step (ms)",
        "First batch planned (s)",
        "Memory of planning (MiB)",
        "Index (GiB)",
    )
    rows = [
        (
            f"{result.documents:,}",
            f"{result.token_fill:.3f}",
            f"{result.image_fill:.3f}",
            f"{result.plan_ms:.1f}",
            f"{result.first_plan_seconds:.2f}",
            f"{result.memory_bytes / 2**20:.1f}",
            f"{result.index_bytes / 2**30:.2f}",
        )
        for result in results
    ]
    return markdown.table(head, rows)


def plot(results: Sequence[Simulation], path: Path) -> None:
    """Draws the cost of planning and the size of the index over the number of documents."""
    from matplotlib.figure import Figure

    figure = Figure((8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    documents = [result.documents for result in results]
    left.semilogx(documents, [result.plan_ms for result in results], "o-", label="a step")
    first = [1000 * result.first_plan_seconds for result in results]
    left.semilogx(documents, first, "s--", label="the first batch")
    left.set(xlabel="documents", ylabel="milliseconds to plan, per host", ylim=(0, None))
    left.legend()
    right.loglog(documents, [result.index_bytes / 2**30 for result in results], "o-", label="index")
    memory = [result.memory_bytes / 2**30 for result in results]
    right.loglog(documents, memory, "s--", label="memory of planning, per host")
    right.set(xlabel="documents", ylabel="GiB")
    right.legend(loc="center right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
