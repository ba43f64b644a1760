"""Tracks in-flight steps: completion times, metrics, throughput, signals.

The devices run a step ahead of the loop: while one step runs, the next is dispatched, and only then
does the loop read the results of the one before. A thread waits for the end of each step, which
gives its completion time whatever the loop is doing.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from emu_jax.hardware import peak_flops
from emu_jax.models.backend import on_cpu
from emu_jax.train.config import TrainConfig
from emu_jax.train.flops import train_flops
from emu_jax.train.goodput import Goodput, seconds_before
from emu_jax.train.metrics import METRICS_FILE, MetricLogger, read_metrics
from emu_jax.train.signals import STOP, TRACE, Signals
from emu_jax.train.tracing import Tracer, parse_steps
from emu_jax.train.watchdog import Watchdog


class _Launched(NamedTuple):
    step: int
    at: float  # time.monotonic
    metrics: Mapping[str, jax.Array]
    vote: np.ndarray | jax.Array  # Signals.vote
    fill: Mapping[str, Any]  # Batches.statistics


class Monitor:
    """Follows a run's steps: logs metrics and rates, watches for hangs, traces on request.

    Args:
        goodput: already entered, so that it has seen the run's start.
        signals: already entered; from here on they ask the run to save.
        done: steps done before this process began.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        workdir: Path,
        mesh: Mesh,
        goodput: Goodput,
        signals: Signals,
        done: int,
    ):
        self.cfg, self.done = cfg, done
        self.row: dict[str, float] = {}  # the metrics of the last step that has ended
        self.stopping = False  # all processes agree to
        lead = jax.process_index() == 0
        self._goodput = goodput
        if lead and done:
            goodput.add(seconds_before(_rows(workdir, cfg.name), done))
        self._logger = MetricLogger(
            workdir, stage=cfg.name, total_steps=cfg.steps, enabled=lead, start_step=done
        )
        self._signals = signals
        signals.listen(mesh)
        self._watchdog = Watchdog(workdir / f"stacks-{jax.process_index()}.txt", cfg.hang_seconds)
        self._tracer = Tracer(workdir / "profile", parse_steps(cfg.profile_steps))
        self._ends = _Ends()
        self._rates = _Rates(cfg, mesh) if lead else None
        # Processors compute on the threads that would run ahead, and a second program with
        # collectives beside the first can block both.
        self._ahead = 0 if on_cpu() else 1
        self._stack = ExitStack()

    def __enter__(self) -> Monitor:
        with ExitStack() as stack:
            for part in (
                self._logger,
                self._watchdog,
                self._tracer,
                self._ends,
            ):
                stack.enter_context(part)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def launching(self, step: int) -> None:
        """The loop is about to launch a step."""
        self._tracer.before(step)
        self._launching = time.monotonic()

    def launched(
        self, step: int, metrics: Mapping[str, jax.Array], fill: Mapping[str, Any]
    ) -> None:
        """The loop has launched a step, whose metrics are under way.

        Args:
            fill: `Batches.statistics` up to its batch.
        """
        vote = self._signals.vote(metrics["loss"])
        self._ends.await_end(_Launched(step, self._launching, metrics, vote, fill))

    def settle(self, ahead: int | None = None) -> None:
        """Waits for launched steps, but for the last `ahead` ones (by default as many as suit
        the devices), and deals with what they brought."""
        while self._ends.pending > (self._ahead if ahead is None else ahead):
            self._ended(*self._ends.next())

    def sync(self) -> None:
        """Puts what was logged on disk."""
        self._logger.sync()

    def _ended(self, launched: _Launched, row: dict[str, float], vote: np.ndarray, at: float):
        step = launched.step
        self.row = row
        self._goodput.step(launched.at, at)
        self._watchdog.step_ended(step)
        self._tracer.after(step)
        self.stopping |= bool(vote[STOP])
        if vote[TRACE]:
            self._tracer.request(next_step=step + self._ends.pending + 1)
        if step % self.cfg.log_every == 0 or step in (1, self.cfg.steps):
            fill = {name: launched.fill[name] for name in ("token_fill", "image_fill")}
            fill["damaged"] = sum(launched.fill["damaged"].values())
            rates = self._rates(step, at, launched.fill) if self._rates else {}
            self._logger.log(step, row | fill | rates | self._goodput.metrics())


class _Ends:
    """Awaits the ends of steps on a thread, in order."""

    def __init__(self):
        self.pending = 0
        self._launched: queue.Queue[_Launched | None] = queue.Queue()
        self._ended: queue.Queue[Any] = queue.Queue()

    def __enter__(self) -> _Ends:
        threading.Thread(target=self._wait, daemon=True, name="emu-jax-steps").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._launched.put(None)

    def await_end(self, launched: _Launched) -> None:
        self.pending += 1
        self._launched.put(launched)

    def next(self) -> tuple[_Launched, dict[str, float], np.ndarray, float]:
        """(the oldest step that is pending, its metrics, its vote, when it ended).

        Raises:
            Exception: what the step raised on the devices.
        """
        self.pending -= 1
        ended = self._ended.get()
        if isinstance(ended, BaseException):
            raise ended
        return ended

    def _wait(self) -> None:
        while (launched := self._launched.get()) is not None:
            try:
                metrics, vote = jax.device_get((launched.metrics, launched.vote))
                row = {name: float(value) for name, value in metrics.items()}
                self._ended.put((launched, row, vote, time.monotonic()))
            except BaseException as error:  # handed to the thread that asks
                self._ended.put(error)


class _Rates:
    """Throughput since the previous row. Tokens and images do not count padding. Model FLOPs
    follow the convention of `train.flops` and count padding, since all batches have one shape.
    MFU is left out where the chip's peak is unknown."""

    def __init__(self, cfg: TrainConfig, mesh: Mesh):
        self._last: tuple[int, float, dict[str, float]] | None = None
        alike = not any(s.batch_size or s.row_tokens or s.row_images for s in cfg.data.sources)
        self._flops = train_flops(cfg).total / mesh.size if alike else None
        self._peak = peak_flops(mesh.devices.flat[0].device_kind, cfg.dtype)

    def __call__(self, step: int, at: float, fill: Mapping[str, Any]) -> dict[str, float]:
        totals = {name: fill[name] for name in ("tokens", "images")}
        last, self._last = self._last, (step, at, totals)
        if last is None:
            return {}
        seconds = max(at - last[1], 1e-9)
        rates = {
            f"{name}_per_second": (total - last[2][name]) / seconds
            for name, total in totals.items()
        }
        if self._flops is not None:
            rate = self._flops * (step - last[0]) / seconds
            rates["model_flops_per_second_per_device"] = rate
            if self._peak is not None:
                rates["mfu"] = rate / self._peak
        return rates


def _rows(workdir: Path, stage: str) -> list[dict[str, Any]]:
    """Returns the rows that earlier processes logged for this stage."""
    if not (workdir / METRICS_FILE).exists():
        return []
    return read_metrics(workdir).get(stage, [])
