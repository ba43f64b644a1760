"""Jobs with several processes: their start, global batches, and values gathered from all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from emu_jax.data.pipeline import merge_states
from emu_jax.errors import UserError
from emu_jax.sharding import RowShares, batch_sharding
from emu_jax.train.telemetry.metrics import DAMAGED_FILE

# How long a failed process waits at the shutdown barrier before the job is killed.
SHUTDOWN_SECONDS = 60
_GATHER_BYTES = 4096  # lengths are rounded up to a multiple, so that few shapes are compiled


def initialize_distributed() -> None:
    """Joins the other processes of the job, if JAX_NUM_PROCESSES names more than one.

    They meet at JAX_COORDINATOR_ADDRESS. TPU pods need JAX_NUM_PROCESSES alone.
    """
    count = int(os.environ.get("JAX_NUM_PROCESSES", "1"))
    if count > 1 and not jax.distributed.is_initialized():
        # JAX would take over SIGTERM, which `train.signals` handles.
        jax.config.update("jax_enable_preemption_service", False)
        index = os.environ.get("JAX_PROCESS_ID")
        jax.distributed.initialize(
            num_processes=count,
            process_id=None if index is None else int(index),
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )


def global_batch(rows: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns the global batch of which each process has its rows."""
    return {
        name: jax.make_array_from_process_local_data(batch_sharding(mesh), values)
        for name, values in rows.items()
    }


def global_state(state: dict[str, Any]) -> dict[str, Any]:
    """Returns the data position of the run. All processes must call it, after the same step.

    Args:
        state: `state()` of this process's batches.
    """
    return merge_states(gather_json(state)) if "consumed_here" in state else state


def check_same_reads(shares: RowShares, digest: int) -> None:
    """Checks that processes that read the same rows skipped the same documents. All processes must
    call it.

    Otherwise devices would compute with different contents of a row, and their copies of the
    parameters drift apart.

    Args:
        digest: of the documents that this process skipped.

    Raises:
        UserError: they did not, on all processes.
    """
    if len(shares.numbers) * jax.process_count() <= shares.count:
        return
    readers: dict[tuple[int, ...], tuple[int, int]] = {}
    for process, (numbers, found) in enumerate(gather_json([shares.numbers, digest])):
        other, expected = readers.setdefault(tuple(numbers), (process, found))
        if found != expected:
            raise UserError(
                f"processes {other} and {process} share rows (mesh.tensor x mesh.context spans "
                "them), but one could not read documents that the other read: compare "
                f"{DAMAGED_FILE.format(other)} and {DAMAGED_FILE.format(process)}, repair what is "
                "missing, and run the same command, which resumes from the last checkpoint"
            )


def gather_json(value: object) -> list[Any]:
    """Returns the value of each process, in their order. All processes must call it.

    Args:
        value: JSON types.
    """
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(content)))).reshape(-1)
    room = -(-int(sizes.max()) // _GATHER_BYTES) * _GATHER_BYTES
    padded = np.pad(content, (0, room - len(content)))
    contents = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), room)
    return [
        json.loads(row[:size].tobytes()) for row, size in zip(contents, sizes.tolist(), strict=True)
    ]
