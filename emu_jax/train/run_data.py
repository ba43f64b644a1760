"""The data of a run as its loop reads them, with records of their documents."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from emu_jax.data.latents import LatentBatches
from emu_jax.data.pipeline import Batches
from emu_jax.sharding import row_shares
from emu_jax.train.config import TrainConfig
from emu_jax.train.distributed import check_same_reads, global_batch, global_state
from emu_jax.train.objectives import Batch
from emu_jax.train.telemetry.goodput import Goodput
from emu_jax.train.telemetry.metrics import DAMAGED_FILE, DOCUMENTS_FILE, StepLog


class RunData:
    """Reads a run's batches onto its devices, and records the documents of each step.

    Args:
        batches: this process's shares of the data, after `done` batches. Closed on exit.
        goodput: counts the time that the loop waits for data.
        done: steps done before this process began.

    Attributes:
        batches: the last one that they yielded is that of the last step.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        workdir: Path,
        mesh: Mesh,
        batches: Batches | LatentBatches,
        goodput: Goodput,
        done: int,
    ) -> None:
        self.batches = batches
        self._mesh, self._shares, self._goodput = mesh, row_shares(mesh), goodput
        self._digest = 0  # of the documents that this process skipped
        self._documents = StepLog(
            workdir, DOCUMENTS_FILE, enabled=cfg.log_documents, start_step=done
        )
        self._damaged = StepLog(workdir, DAMAGED_FILE, start_step=done)

    def __enter__(self) -> RunData:
        return self

    def __exit__(self, *_: object) -> None:
        self._damaged.close()
        self._documents.close()
        self.batches.close()

    def next(self, step: int) -> Batch:
        """Returns the batch of a step as global arrays, and records its documents."""
        with self._goodput.timed("data"):
            batch = global_batch(next(self.batches), self._mesh)
        if self._shares.is_lead:
            self._documents.log(step, self.batches.documents())
        skipped = self.batches.damaged()
        documents = repr([(damage.source, damage.index) for damage in skipped])
        self._digest = zlib.crc32(documents.encode(), self._digest)
        self._damaged.log(step, skipped)
        return batch

    def sync(self) -> None:
        """Flushes the records to disk, so that they are there before the checkpoint is."""
        self._documents.sync()
        self._damaged.sync()

    def position(self) -> dict[str, Any]:
        """Returns the data position of the run after the last step, as JSON types. All processes
        must call it.

        Raises:
            UserError: processes that share rows read different documents.
        """
        check_same_reads(self._shares, self._digest)
        return global_state(self.batches.state())
