"""Signals to a running job, which all of its processes act on at the same step.

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

STOP, TRACE = 0, 1  # places in a vote
# Signals that come this close together are one request: a launcher signals a process and its
# group, a terminal and a script both pass on Ctrl-C.
ONE_REQUEST_SECONDS = 1.0


class Signals:
    """Handles signals while it is entered.

    Until `listen`, there is nothing to save, and SIGINT or SIGTERM raises KeyboardInterrupt at
    once. From then on the first one asks the run to save and stop, and a later SIGINT raises
    KeyboardInterrupt. It is raised once; then, and behind `interruptible`, the run is ending, and
    signals change nothing.

    One process alone may get a signal, and processes are at different steps when it comes. So
    after each step they vote, on the devices and behind that step, and whoever reads the result
    of the same vote reads the same. Nothing waits for it.
    """

    def __init__(self):
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
        """From here on, the run votes after each step, on a mesh."""
        if jax.process_count() > 1:
            self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            self._count = jax.jit(
                lambda asked, _: jnp.max(asked, axis=0),
                out_shardings=NamedSharding(mesh, PartitionSpec()),
            )
        self._listening = True

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Signals may interrupt the block. What comes behind it, ends the run in good order."""
        try:
            yield
        finally:
            self._ending = True

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Nothing interrupts the block; a KeyboardInterrupt that is due comes behind it."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._late:
            self._interrupt()

    def ask_to_stop(self) -> None:
        """Asks the run to save and stop, as the first SIGTERM does."""
        self._asked[STOP], self._stop_asked_at = 1, time.monotonic()

    def vote(self, after: jax.Array) -> np.ndarray | jax.Array:
        """Returns int32 [2], nonzero at STOP and at TRACE where any process got that signal.
        Ready when `after`, an output of the step, is."""
        asked = self._asked.copy()
        self._asked[TRACE] -= asked[TRACE]  # asked once
        if self._split is None:
            return asked
        shape = (self._split.num_devices, len(asked))
        votes = jax.make_array_from_callback(shape, self._split, lambda _: asked[None])
        return self._count(votes, after)

    def _heard(self, number: int, frame: object) -> None:
        if number == signal.SIGUSR1:
            self._asked[TRACE] = 1
        elif self._ending:
            if number == signal.SIGINT:
                _say("already stopping: waiting for what is being saved")
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
    """Writes a line to standard error past `sys.stderr`: the signal may have come while that was
    being written to, and Python refuses to enter it again."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
