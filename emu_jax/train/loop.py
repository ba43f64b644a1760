"""The training loop: where a run starts, its steps, logs and checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from emu_jax.config import save_json
from emu_jax.data.latents import LatentBatches
from emu_jax.data.pipeline import Batches
from emu_jax.errors import UserError
from emu_jax.sharding import RowShares, batch_sharding, row_shares
from emu_jax.tokenizer import Tokenizer
from emu_jax.train.checkpoints import Checkpoints, restore_state, save_state
from emu_jax.train.config import TrainConfig, resume_config
from emu_jax.train.distributed import (
    check_same_reads,
    global_state,
    initialize_distributed,
)
from emu_jax.train.evaluation import (
    Evaluation,
    Evaluations,
    best_steps,
    check_evaluations,
    held_out_table,
    pending,
)
from emu_jax.train.held_out import LossEvaluation
from emu_jax.train.objectives import Batch, Objective
from emu_jax.train.report import refresh_report
from emu_jax.train.samples import SAMPLE_KINDS, SampleEvaluation
from emu_jax.train.sheets import remove_later_sheets
from emu_jax.train.signals import Signals
from emu_jax.train.step import COMPILE_SECONDS, Trainer, TrainState, check_rows, mesh_for
from emu_jax.train.telemetry.goodput import Goodput
from emu_jax.train.telemetry.metrics import (
    DAMAGED_FILE,
    DOCUMENTS_FILE,
    EvaluationLog,
    StepLog,
)
from emu_jax.train.telemetry.monitor import Monitor
from emu_jax.train.telemetry.trackers import open_trackers
from emu_jax.train.warm_start import WarmStart

# By `EvalConfig.kind`; `emu-jax train` adds the tasks of `emu-jax eval`.
EVALUATIONS: dict[str, type[Evaluation]] = {
    "loss": LossEvaluation,
    **dict.fromkeys(SAMPLE_KINDS, SampleEvaluation),
}


def train(
    cfg: TrainConfig, workdir: Path, evaluations: Mapping[str, type[Evaluation]] = EVALUATIONS
) -> dict[str, Any]:
    """Trains to `cfg.steps`, resuming from the newest checkpoint in `workdir`.

    Args:
        evaluations: the kinds of held-out evaluations that `cfg.eval` may name.

    Returns:
        The last logged metrics, with `step` and `seconds`.

    Raises:
        UserError: the config does not fit the devices, `workdir` holds another run, a parent is
            missing or does not fit, the data cannot be read, or the loss stays non-finite.
        KeyboardInterrupt: after SIGINT or SIGTERM, once the state is saved.
    """
    started = time.monotonic()
    initialize_distributed()
    mesh = mesh_for(cfg)
    for size in sorted(cfg.data.batch_sizes()):
        check_rows(size, cfg.accumulate, mesh)
    workdir.mkdir(parents=True, exist_ok=True)
    lead, shares = jax.process_index() == 0, row_shares(mesh)
    with (
        Signals() as signals,
        Goodput() as goodput,
        jax.set_mesh(mesh),
        # The default precision of accelerators rounds the operands of float32 products.
        jax.default_matmul_precision("highest" if cfg.dtype == "float32" else "default"),
        Checkpoints(
            workdir,
            cfg.keep_checkpoints,
            best=lambda steps, cfg=cfg: best_steps(cfg, workdir, steps).values(),
        ) as checkpoints,
        signals.interruptible(),
    ):
        start, state = _restore(cfg, workdir, mesh, checkpoints, evaluations)
        cfg, trainer, done = start.warm_start.cfg, start.trainer, start.done
        evaluated = EvaluationLog(workdir, cfg.name, done)
        if lead:
            remove_later_sheets(workdir, done)
        if done >= cfg.steps and not pending(cfg, evaluated, done):
            return {"step": done, "seconds": 0.0}
        tokenizer, batches, state = _begin(start, state, shares, workdir)

        with (
            batches,
            evaluated,
            open_trackers(cfg, workdir, done) as trackers,
            Evaluations(
                cfg, trainer, tokenizer, workdir, evaluated, trackers, evaluations
            ) as held_out,
            StepLog(
                workdir, DOCUMENTS_FILE, enabled=cfg.log_documents, start_step=done
            ) as documents,
            StepLog(workdir, DAMAGED_FILE, start_step=done) as damaged,
            Monitor(cfg, workdir, mesh, goodput, signals, trackers, done) as monitor,
        ):
            if due := pending(cfg, evaluated, done):  # a signal came first
                with goodput.timed("eval"), monitor.evaluating():
                    held_out.run(due, state, done, functools.partial(monitor.poll, state.step))
                if monitor.stopping:
                    raise KeyboardInterrupt
            compiled: set[Any] = set()
            digest = 0  # of the documents that this process skipped
            for step in range(done + 1, cfg.steps + 1):
                with goodput.timed("data"):
                    batch = _on_devices(next(batches), mesh)
                if shares.is_lead:
                    documents.log(step, batches.documents())
                skipped = batches.damaged()
                digest = zlib.crc32(repr([(d.source, d.index) for d in skipped]).encode(), digest)
                damaged.log(step, skipped)
                _compile_once(trainer, state, batch, step, compiled)
                monitor.before_dispatch(step)
                state, metrics = trainer.step(state, batch)
                if cfg.tower_metrics and monitor.is_logged(step):
                    metrics |= trainer.tower_metrics(state)
                monitor.on_dispatch(step, metrics, batches)
                monitor.drain()
                due = pending(cfg, evaluated, step)
                saving = step == cfg.steps or step % cfg.checkpoint_every == 0
                if saving or due or monitor.stopping:
                    monitor.drain(in_flight=0)
                if monitor.row.get("bad_steps", 0) >= cfg.max_bad_steps:
                    raise _diverged(cfg, step, checkpoints)
                if due and not monitor.stopping:
                    with goodput.timed("eval"), monitor.evaluating():
                        held_out.run(due, state, step, functools.partial(monitor.poll, state.step))
                saving |= monitor.stopping
                if step == cfg.steps and lead:
                    # Before the last checkpoint, whose presence means that the run is complete.
                    model = trainer.objective.trained_model(monitor.row)
                    save_json(model, workdir / "config.json")
                if saving:
                    for log in (documents, damaged, trackers, evaluated):
                        log.sync()
                    with goodput.timed("checkpoint"), signals.hold():
                        check_same_reads(shares, digest)
                        read = global_state(batches.state())
                        save_state(checkpoints, step, state, read, leave_out=start.unsaved)
                if checkpoints.check():
                    signals.ask_to_stop()  # all processes, at the same step
                if monitor.stopping and (step < cfg.steps or pending(cfg, evaluated, step)):
                    checkpoints.wait()
                    raise KeyboardInterrupt
            checkpoints.wait()
    if lead and (table := held_out_table(cfg, workdir)):
        print(table, file=sys.stderr, flush=True)
        refresh_report(workdir, cfg.name)
    return monitor.row | {"step": cfg.steps, "seconds": time.monotonic() - started}


@dataclasses.dataclass(frozen=True)
class _Start:
    """The point that a run starts from.

    Attributes:
        unsaved: paths of frozen parameters that checkpoints omit.
        done: number of steps done.
        position: the data position after `done` steps, if there is a checkpoint.
    """

    warm_start: WarmStart
    trainer: Trainer
    unsaved: Collection[str]
    done: int = 0
    position: dict[str, Any] | None = None


def _restore(
    cfg: TrainConfig,
    workdir: Path,
    mesh: Mesh,
    checkpoints: Checkpoints,
    evaluations: Mapping[str, type[Evaluation]],
) -> tuple[_Start, TrainState | None]:
    """Decides what a run starts from. Returns it, and the state of the newest checkpoint if there
    is one.

    Raises:
        UserError: the config does not fit the run in `workdir` or the parents.
    """
    # A run starts from, in order of precedence:
    # 1. the newest readable checkpoint in `workdir`, with the config saved beside it. Only
    #    `train.config.MAY_CHANGE` is taken from `cfg`. Frozen parameters that the checkpoint
    #    omits are read from the parents.
    # 2. `parents`: towers of other runs.
    # 3. `init_from`: the model and the other towers of one run or release.
    # 4. the seed, from which all other parameters are initialized.
    resuming = checkpoints.newest() is not None
    if resuming:
        warm_start = WarmStart(resume_config(cfg, workdir), workdir)
    else:
        warm_start = WarmStart.resolve(cfg, workdir)
    check_evaluations(warm_start.cfg, evaluations)
    trainer = Trainer(warm_start.cfg, mesh)
    warm_start.check_quantized(trainer.quantizers)
    unsaved = warm_start.unsaved({path: trainer.param_shapes[path] for path in trainer.frozen})
    if not resuming:
        return _Start(warm_start, trainer, unsaved), None
    left_out = warm_start.load(unsaved, trainer.quantizers)
    done, state, position = restore_state(checkpoints, trainer, left_out)
    return _Start(warm_start, trainer, unsaved, done, position), state


def _begin(
    start: _Start, state: TrainState | None, shares: RowShares, workdir: Path
) -> tuple[Tokenizer, Batches | LatentBatches, TrainState]:
    """Opens the data, loads or initializes a state that was not restored, and writes the files
    beside the steps.

    Raises:
        UserError: the data or a parent cannot be read.
    """
    warm_start, trainer = start.warm_start, start.trainer
    objective = trainer.objective
    tokenizer = objective.prepare_data()
    batches = _open_batches(objective, tokenizer, shares, workdir, start.done, start.position)
    if state is None:
        state = trainer.init(warm_start.load(trainer.param_shapes, trainer.quantizers))
    if jax.process_index() == 0:
        for name, tally in batches.tallies.items():
            print(f"source {name}: {tally.summary()}", file=sys.stderr, flush=True)
        _write_run_files(objective, warm_start.cfg, workdir, tokenizer, warm_start)
    return tokenizer, batches, state


def _on_devices(batch: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
    """Returns the global batch of which each process has its rows."""
    return {
        name: jax.make_array_from_process_local_data(batch_sharding(mesh), rows)
        for name, rows in batch.items()
    }


def _open_batches(
    objective: Objective,
    tokenizer: Tokenizer,
    shares: RowShares,
    workdir: Path,
    done: int,
    position: dict[str, Any] | None,
) -> Batches | LatentBatches:
    """Returns the batches of a run from a data position on, if there is one.

    Raises:
        UserError: the data cannot be read, or the position is not that after `done` steps.
    """
    batches = objective.batches(tokenizer, shares, resumed=position is not None)
    if position is not None:
        read = position.get("step", position.get("batch"))
        if read != done:
            raise UserError(
                f"{workdir / str(done)} holds the data position after {read} batches, not "
                f"after {done}: use another step"
            )
        batches.restore(position)
    return batches


def _write_run_files(
    objective: Objective,
    cfg: TrainConfig,
    workdir: Path,
    tokenizer: Tokenizer,
    warm_start: WarmStart,
) -> None:
    """Writes what `load` and a later resume need beside the steps."""
    tokenizer.save(workdir / "tokenizer")
    save_json(cfg.model, workdir / "config.json")
    save_json(cfg, workdir / "train.json")
    warm_start.copy_release_files()
    if not cfg.save_frozen or not objective.has_all_towers:
        warm_start.write_base_json()


def _compile_once(
    trainer: Trainer, state: TrainState, batch: Batch, step: int, compiled: set[Any]
) -> None:
    """Compiles the step for batches of new shapes, and waits until all processes have compiled it.

    Otherwise the first collective would time out while another process still compiles.
    """
    shapes = tuple((name, rows.shape) for name, rows in batch.items())
    if shapes not in compiled:
        trainer.step.lower(state, batch).compile()
        if trainer.cfg.tower_metrics:
            trainer.tower_metrics.lower(state).compile()
        barrier = ocp.multihost.get_barrier_sync_fn()
        barrier(key=f"compiled step {step}", timeout_ms=1000 * COMPILE_SECONDS)
        compiled.add(shapes)


def _diverged(cfg: TrainConfig, step: int, checkpoints: Checkpoints) -> UserError:
    """Returns the error of a run whose loss stays non-finite."""
    checkpoints.wait()  # the newest checkpoint may be in progress
    return UserError(
        f"the loss was not finite for {cfg.max_bad_steps} steps up to step {step}: lower the "
        "learning rate or check the data, then rerun; training resumes from step "
        f"{checkpoints.newest() or 0}"
    )
