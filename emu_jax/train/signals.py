"""Signals to a running job. All of its processes act on a signal at the same step.

SIGINT and SIGTERM (a preemption notice): save and stop. SIGUSR1: trace the next steps.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped

STOP, TRACE = 0, 1  # indices into a vote
# Signals this close together count as one request: a launcher signals both a process and its group,
# and a terminal and a script both forward Ctrl-C.
ONE_REQUEST_SECONDS = 1.0


class Signals:
    """Context manager that handles signals.

    Before `listen` there is nothing to save, so SIGINT or SIGTERM raises KeyboardInterrupt at once.
    After `listen` the first one requests a save and a stop, and a later SIGINT raises
    KeyboardInterrupt. It is raised once. After that, or after `interruptible`, the run is ending
    and signals have no effect.

    A signal may reach only one process, and processes are at different steps when it arrives.
    After each step an all-reduce of the signal flags is therefore queued behind it, so all
    processes see the same flags at the same step. It is asynchronous.
    """

    def __init__(self) -> None:
        self._asked = np.zeros(2, np.int32)
        self._previous: dict[int, Any] = {}
        self._listening = False
        self._stop_asked_at = 0.0  # time.monotonic
        self._ending = False
        self._held = self._late = False
        self._split: NamedSharding | None = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def listen(self, mesh: Mesh) -> None:
        """Handles signals by a vote after each step from here on, over the devices of `mesh`."""
        if jax.process_count() > 1:
            self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            self._count = jax.jit(
                lambda requests, _: jnp.max(requests, axis=0),
                out_shardings=NamedSharding(mesh, PartitionSpec()),
            )
        self._listening = True

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Lets signals interrupt the block, and nothing after it, where the run ends cleanly."""
        try:
            yield
        finally:
            self._ending = True

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Defers a KeyboardInterrupt to the end of the block."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._late:
            self._interrupt()

    def ask_to_stop(self) -> None:
        """Requests a save and a stop, like the first SIGTERM."""
        self._asked[STOP], self._stop_asked_at = 1, time.monotonic()

    def vote(self, after: Shaped[Array, "..."]) -> Int[np.ndarray, "2"] | Int[Array, "2"]:
        """Returns the votes, nonzero at STOP and at TRACE where any process got that signal.
        Ready when `after`, an output of the step, is."""
        requests = self._asked.copy()
        self._asked[TRACE] -= requests[TRACE]  # one request, one trace
        if self._split is None:
            return requests
        shape = (self._split.num_devices, len(requests))
        votes = jax.make_array_from_callback(shape, self._split, lambda _: requests[None])
        return self._count(votes, after)

    def _heard(self, number: int, frame: object) -> None:
        if number == signal.SIGUSR1:
            self._asked[TRACE] = 1
        elif self._ending:
            if number == signal.SIGINT:
                _say("already stopping: waiting for the save in progress")
        elif not self._listening:
            self._interrupt()
        elif not self._asked[STOP]:
            self.ask_to_stop()
            _say(f"{signal.Signals(number).name}: saving, then stopping (Ctrl-C: stopping at once)")
        elif number == signal.SIGINT and (
            time.monotonic() - self._stop_asked_at >= ONE_REQUEST_SECONDS
        ):
            self._interrupt()

    def _interrupt(self) -> None:
        if self._held:
            self._late = True
            return
        self._ending = True
        raise KeyboardInterrupt


def _say(line: str) -> None:
    """Writes a line to standard error, bypassing `sys.stderr`, which is not reentrant: the signal
    may have interrupted a write to it."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
