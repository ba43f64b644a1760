"""The training loop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

from emu_jax.train.config import TrainConfig
from emu_jax.train.evaluation import Evaluation
from emu_jax.train.held_out import LossEvaluation
from emu_jax.train.run import Run
from emu_jax.train.samples import SAMPLE_KINDS, SampleEvaluation

# By `EvalConfig.kind`; `emu-jax train` adds the tasks of `emu-jax eval`.
EVALUATIONS: dict[str, type[Evaluation]] = {
    "loss": LossEvaluation,
    **dict.fromkeys(SAMPLE_KINDS, SampleEvaluation),
}


@dataclasses.dataclass(frozen=True)
class TrainReport:
    """The end of a call of `train`.

    Attributes:
        step: number of steps done, over all calls.
        seconds: time that this call took; 0 if the run was complete before.
        metrics: those of the last step, by name. Empty if the run was complete before.
    """

    step: int
    seconds: float
    metrics: dict[str, float]

    def to_json(self) -> dict[str, float]:
        """Returns the keys of `emu-jax train --json`: the metrics, `step` and `seconds`."""
        return self.metrics | {"step": self.step, "seconds": self.seconds}


def train(
    cfg: TrainConfig, workdir: Path, evaluations: Mapping[str, type[Evaluation]] = EVALUATIONS
) -> TrainReport:
    """Trains to `cfg.steps`, resuming from the newest checkpoint in `workdir`.

    Args:
        evaluations: the kinds of held-out evaluations that `cfg.eval` may name.

    Raises:
        UserError: the config does not fit the devices, `workdir` holds another run, a parent is
            missing or does not fit, the data cannot be read, or the loss stays non-finite.
        KeyboardInterrupt: after SIGINT or SIGTERM, once the state is saved.
    """
    started = time.monotonic()
    with Run(cfg, workdir, evaluations) as run:  # decides what it starts from
        if run.is_complete():
            return TrainReport(step=run.done, seconds=0.0, metrics={})
        state = run.begin()
        cfg, trainer, monitor = run.cfg, run.trainer, run.monitor
        if due := run.pending(run.done):  # a signal came before them
            with monitor.evaluating(state.step) as stop:
                run.held_out.run(due, state, run.done, stop)
            if monitor.stopping:
                raise KeyboardInterrupt
        for step in range(run.done + 1, cfg.steps + 1):
            batch = run.data.next(step)
            trainer.compile(state, batch, step)
            monitor.before_dispatch(step)
            state, metrics = trainer.step(state, batch)
            if cfg.tower_metrics and monitor.is_logged(step):
                metrics |= trainer.tower_metrics(state)
            monitor.on_dispatch(step, metrics, run.data.batches)
            monitor.drain()
            due = run.pending(step)
            saving = step == cfg.steps or step % cfg.checkpoint_every == 0
            if saving or due or monitor.stopping:
                monitor.drain(in_flight=0)
            run.check_divergence(step)
            if due and not monitor.stopping:
                with monitor.evaluating(state.step) as stop:
                    run.held_out.run(due, state, step, stop)
            if saving or monitor.stopping:
                run.save(state, step)
            if run.checkpoints.check():
                run.signals.ask_to_stop()  # all processes, at the same step
            if monitor.stopping and (step < cfg.steps or run.pending(step)):
                run.checkpoints.wait()
                raise KeyboardInterrupt
        run.checkpoints.wait()
    run.report()
    return TrainReport(cfg.steps, time.monotonic() - started, monitor.row)
