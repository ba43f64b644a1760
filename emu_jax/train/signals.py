"""What a run is asked from outside while it trains, by signals, and all its processes' consent.

SIGINT and SIGTERM (a preemption notice): save and stop. SIGUSR1: trace the next steps.
"""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

STOP, TRACE = 0, 1  # places in a vote


class Signals:
    """Listens while it is entered. A second SIGINT interrupts at once.

    One process alone may get a signal, and processes are at different steps when it comes. So
    after each step they vote, on the devices and behind that step, and whoever reads the result
    of the same vote reads the same. Nothing waits for it.
    """

    def __init__(self, mesh: Mesh):
        self._asked = np.zeros(2, np.int32)
        self._previous: dict[int, Any] = {}
        if jax.process_count() > 1:
            self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            self._count = jax.jit(
                lambda asked, _: jnp.max(asked, axis=0),
                out_shardings=NamedSharding(mesh, PartitionSpec()),
            )

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def vote(self, after: jax.Array) -> np.ndarray | jax.Array:
        """What some process has been asked: int32 [2], not zero at STOP and at TRACE. It is
        there once `after`, an output of the step, is."""
        asked = self._asked.copy()
        self._asked[TRACE] -= asked[TRACE]  # asked once
        if jax.process_count() == 1:
            return asked
        shape = (self._split.num_devices, len(asked))
        votes = jax.make_array_from_callback(shape, self._split, lambda _: asked[None])
        return self._count(votes, after)

    def _heard(self, number: int, frame: object) -> None:
        if number == signal.SIGUSR1:
            self._asked[TRACE] = 1
        elif not self._asked[STOP]:
            self._asked[STOP] = 1
            print(f"{signal.Signals(number).name}: saving, then stopping", file=sys.stderr)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
