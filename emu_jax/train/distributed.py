"""The start of a job with several processes."""

from __future__ import annotations

import os

import jax

# How long a failed process waits at the shutdown barrier before the job is killed.
SHUTDOWN_SECONDS = 60


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
