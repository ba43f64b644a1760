"""Tracks in-flight steps: completion times, metrics, throughput, signals.

The devices run a step ahead of the loop: while one step runs, the next is dispatched, and only then
does the loop read the results of the one before. A thread waits for the end of each step, which
gives its completion time whatever the loop is doing.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Real

from emu_jax.data.latents import LatentBatches
from emu_jax.data.pipeline import Batches, Consumed
from emu_jax.hardware import peak_flops
from emu_jax.models.backend import on_cpu
from emu_jax.train.config import TrainConfig
from emu_jax.train.flops import train_flops
from emu_jax.train.signals import STOP, TRACE, Signals
from emu_jax.train.telemetry.files import METRICS_FILE
from emu_jax.train.telemetry.goodput import Goodput, seconds_before
from emu_jax.train.telemetry.metrics import MetricLogger, read_metrics
from emu_jax.train.telemetry.spikes import SpikeDetector
from emu_jax.train.telemetry.tracing import Tracer, parse_steps
from emu_jax.train.telemetry.tracker import Tracker
from emu_jax.train.telemetry.watchdog import Watchdog


class _InFlight(NamedTuple):
    step: int
    at: float  # time.monotonic
    metrics: Mapping[str, Real[Array, ""]]
    vote: Int[np.ndarray, "2"] | Int[Array, "2"]  # Signals.vote
    fill: Mapping[str, Any]  # Batches.statistics
    consumed: Mapping[str, Consumed] | None  # Batches.consumed


class Monitor:
    """Follows a run's steps: logs metrics and rates, watches for hangs, traces on request.

    Args:
        goodput: already entered, so that it covers the run's start.
        signals: already entered. From here on they request a save.
        tracker: of the metrics; closed by the caller.
        done: steps done before this process began.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        workdir: Path,
        mesh: Mesh,
        goodput: Goodput,
        signals: Signals,
        tracker: Tracker,
        done: int,
    ) -> None:
        self.cfg, self.done = cfg, done
        self._step = done  # the last step that has ended
        self.row: dict[str, float] = {}  # the metrics of the last step that has ended
        self.stopping = False  # requested by a signal, on all processes at the same step
        lead = jax.process_index() == 0
        self._goodput = goodput
        if lead and done:
            goodput.add(seconds_before(_rows(workdir, cfg.name), done))
        self._logger = MetricLogger(tracker, stage=cfg.name, total_steps=cfg.steps, enabled=lead)
        self._signals = signals
        signals.listen(mesh)
        self._watchdog = Watchdog(workdir / f"stacks-{jax.process_index()}.txt", cfg.hang_seconds)
        self._tracer = Tracer(workdir / "profile", parse_steps(cfg.profile_steps))
        self._spikes = SpikeDetector(workdir, cfg.spike_threshold)
        self._ends = _Ends()
        self._rates = _Rates(cfg, mesh) if lead else None
        # CPUs compute on the threads that would dispatch ahead, and two concurrent programs with
        # collectives can block each other.
        self._in_flight = 0 if on_cpu() else 1
        self._stack = ExitStack()

    def __enter__(self) -> Monitor:
        with ExitStack() as stack:
            for part in (
                self._logger,
                self._watchdog,
                self._tracer,
                self._spikes,
                self._ends,
            ):
                stack.enter_context(part)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def before_dispatch(self, step: int) -> None:
        """Called before the loop dispatches a step."""
        self._tracer.before(step)
        self._dispatched = time.monotonic()

    def is_logged(self, step: int) -> bool:
        """Returns whether the metrics of a step are logged."""
        return step % self.cfg.log_every == 0 or step in (1, self.cfg.steps)

    def on_dispatch(
        self, step: int, metrics: Mapping[str, Real[Array, ""]], batches: Batches | LatentBatches
    ) -> None:
        """Called after the loop has dispatched a step.

        Args:
            metrics: those of the step, not yet computed.
            batches: its batch was their last.
        """
        self._locate = batches.locate
        self._spikes.remember(step, batches.documents())
        consumed = batches.consumed() if self.is_logged(step) else None
        vote = self._signals.vote(metrics["loss"])
        self._ends.push(
            _InFlight(step, self._dispatched, metrics, vote, batches.statistics(), consumed)
        )

    def drain(self, in_flight: int | None = None) -> None:
        """Waits until at most `in_flight` steps are in flight, and logs those that have ended.

        Args:
            in_flight: by default as many as suit the devices.
        """
        while self._ends.pending > (self._in_flight if in_flight is None else in_flight):
            self._ended(*self._ends.next())

    @contextmanager
    def evaluating(self, after: jax.Array) -> Iterator[Callable[[], bool]]:
        """Counts the block, in which no step is in flight, as evaluation, and keeps the watchdog
        quiet in it.

        Yields a function that returns whether a signal asks all processes to stop.

        Args:
            after: an array that is replicated over the mesh.
        """
        with self._goodput.timed("eval"), self._watchdog.paused():
            yield functools.partial(self._poll, after)

    def _poll(self, after: jax.Array) -> bool:
        vote = jax.device_get(self._signals.vote(after))
        self.stopping |= bool(vote[STOP])
        if vote[TRACE]:
            self._tracer.request(next_step=self._step + 1)
        return self.stopping

    def _ended(
        self, dispatched: _InFlight, row: dict[str, float], vote: Int[np.ndarray, "2"], at: float
    ) -> None:
        self._step = step = dispatched.step
        self.row = row
        self._goodput.step(dispatched.at, at)
        self._watchdog.step_ended(step)
        self._tracer.after(step)
        self.stopping |= bool(vote[STOP])
        if vote[TRACE]:
            self._tracer.request(next_step=step + self._ends.pending + 1)
        self._spikes.check(step, row["loss"], not row["bad_steps"], self._locate)
        if self.is_logged(step):
            fill = {name: dispatched.fill[name] for name in ("token_fill", "image_fill")}
            fill["damaged"] = sum(dispatched.fill["damaged"].values())
            rates = self._rates(step, at, dispatched.fill) if self._rates else {}
            consumed = _consumption(dispatched.consumed or {})
            self._logger.log(step, row | fill | consumed | rates | self._goodput.metrics())


class _Ends:
    """Awaits the ends of steps on a thread, in order."""

    def __init__(self) -> None:
        self.pending = 0
        self._dispatched: queue.Queue[_InFlight | None] = queue.Queue()
        self._ended: queue.Queue[Any] = queue.Queue()

    def __enter__(self) -> _Ends:
        threading.Thread(target=self._wait, daemon=True, name="emu-jax-steps").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._dispatched.put(None)

    def push(self, dispatched: _InFlight) -> None:
        self.pending += 1
        self._dispatched.put(dispatched)

    def next(self) -> tuple[_InFlight, dict[str, float], Int[np.ndarray, "2"], float]:
        """Returns (the oldest pending step, its metrics, its vote, when it ended).

        Raises:
            Exception: the error that the step raised on the devices.
        """
        self.pending -= 1
        ended = self._ended.get()
        if isinstance(ended, BaseException):
            raise ended
        return ended

    def _wait(self) -> None:
        while (dispatched := self._dispatched.get()) is not None:
            try:
                metrics, vote = jax.device_get((dispatched.metrics, dispatched.vote))
                row = {name: float(value) for name, value in metrics.items()}
                self._ended.put((dispatched, row, vote, time.monotonic()))
            except BaseException as error:  # raised in the thread that calls `next`
                self._ended.put(error)


class _Rates:
    """Throughput since the previous row. Tokens and images do not count padding. Model FLOPs
    follow the convention of `train.flops` and count padding, since all batches have one shape.
    MFU is left out where the chip's peak is unknown."""

    def __init__(self, cfg: TrainConfig, mesh: Mesh) -> None:
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


def _consumption(consumed: Mapping[str, Consumed]) -> dict[str, float]:
    """Returns the metrics of what a run has read: tokens and images, in all and by source, and
    epochs by source."""
    if not consumed:
        return {}
    total = {
        f"consumed_{name}": float(sum(getattr(source, name) for source in consumed.values()))
        for name in ("tokens", "images")
    }
    for name, source in consumed.items():
        total[f"consumed_tokens/{name}"] = float(source.tokens)
        total[f"consumed_images/{name}"] = float(source.images)
        total[f"epochs/{name}"] = source.epochs
    return total


def _rows(workdir: Path, stage: str) -> list[dict[str, Any]]:
    """Returns the rows that earlier processes logged for this stage."""
    if not (workdir / METRICS_FILE).exists():
        return []
    return read_metrics(workdir).get(stage, [])
