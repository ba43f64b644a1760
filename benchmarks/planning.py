"""Planning a step: milliseconds a host and documents a second, for many rows on many hosts.

The first of `hosts` hosts plans its rows of batches of packed rows, of about 16 documents each,
from token counts that are mapped from files, as in training. No document is read. The documents
are image-text pairs of different lengths. `row_group` is 8: a host plans its own rows alone.
Without it (`row_group` 0) every host plans all rows. Times are processor times of one core.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from emu_jax import bench
from emu_jax.data import DataConfig
from emu_jax.data.batches import Positions, RowAssignment, RowBuilder, plan_rows
from emu_jax.data.known_lengths import KnownLengths
from emu_jax.data.lengths import TokenLengths
from emu_jax.data.mixture import OpenSource, make_groups
from emu_jax.data.packing import IMAGE_PART
from emu_jax.data.simulate import SimulatedSource, load_distribution
from emu_jax.data.sources import SourceConfig
from emu_jax.tokenizer import Tokenizer

HOSTS = (1, 16, 256)
ROWS = (1024, 16384)
DOCUMENTS = 1_000_000
ROW_TOKENS, ROW_IMAGES = 832, 16  # 16 pairs of 52 tokens
ROW_GROUP = 8
_ROUND = 64 // ROW_GROUP  # a block fills 64 rows
_TIMED_ROWS = 4096  # of a host, at least


def run() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        source = pairs(Path(folder))
        figures = {}
        for rows in ROWS:
            for hosts in HOSTS:
                figures[f"{rows}_rows_{hosts}_hosts"] = measure(source, rows, hosts, ROW_GROUP)
        figures["1024_rows_16_hosts_all_planned"] = measure(source, 1024, 16, 0)
    return figures


def measure(source: OpenSource, rows: int, hosts: int, row_group: int) -> dict:
    cfg = DataConfig(
        sources=(source.cfg,),
        batch_size=rows,
        row_tokens=ROW_TOKENS,
        row_images=ROW_IMAGES,
        row_group=row_group,
    )
    (group,) = make_groups(cfg, RowBuilder.requires, [source])
    assignment = RowAssignment(group, [range(rows // hosts)])
    positions: Positions = ((0, 0),) * group.streams
    documents, seconds = 0, []
    # All streams pack their first blocks in the first step. A round of `_ROUND` steps uses up one
    # block of each, so that its mean is that of a long run.
    for _ in range(_ROUND * max(1, _TIMED_ROWS // (_ROUND * (rows // hosts)))):
        began = time.process_time()
        planned = plan_rows(assignment, positions)
        seconds.append(time.process_time() - began)
        positions = planned.positions
        documents += len(planned.placements)
    steps = len(seconds)
    return {
        "rows_of_a_host": rows // hosts,
        "ms_a_step": round(1000 * statistics.mean(seconds), 2),
        "first_ms": round(1000 * seconds[0], 2),
        "documents_a_second": round(documents / sum(seconds)),
        "documents_a_row": round(documents / steps / (rows // hosts), 1),
    }


def table(figures: dict) -> str:
    return bench.markdown_table(
        ("Rows, hosts", "Rows of a host", "ms a step", "first step, ms", "Documents a second"),
        [
            (
                name.replace("_", " "),
                each["rows_of_a_host"],
                each["ms_a_step"],
                each["first_ms"],
                each["documents_a_second"],
            )
            for name, each in figures.items()
        ],
    )


def pairs(folder: Path) -> OpenSource:
    """Returns image-text pairs whose token counts are in `folder`."""
    rng = np.random.default_rng(0)
    captions = np.array([sizes[1] for sizes in load_distribution("laion").outlines])
    drawn = rng.choice(captions, DOCUMENTS)
    sizes = np.stack([np.full(DOCUMENTS, IMAGE_PART), drawn], axis=1)
    documents = _Pairs(sizes.reshape(-1))
    tokenizer = Tokenizer.train(["a pair"], 300)
    lengths = TokenLengths(documents, tokenizer, folder)
    return OpenSource(SourceConfig("pairs"), documents, lengths)


class _Pairs(SimulatedSource):
    """Pairs whose captions are known by their number of tokens alone."""

    def __init__(self, sizes: np.ndarray) -> None:
        super().__init__(len(sizes) // 2)
        self._sizes = sizes

    def known_lengths(self, indices: range, tokenizer: str) -> KnownLengths:
        counts = np.full(len(indices), 2)
        return KnownLengths(counts, self._sizes[2 * indices.start : 2 * indices.stop])
