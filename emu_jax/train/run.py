"""A run on one process: where it starts, what it opens, and what it saves."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax

from emu_jax.config import save_json
from emu_jax.data.latents import LatentBatches
from emu_jax.data.pipeline import Batches
from emu_jax.errors import UserError
from emu_jax.sharding import row_shares
from emu_jax.tokenizer import Tokenizer
from emu_jax.train.checkpoints import Checkpoints, restore_state, save_state
from emu_jax.train.config import TrainConfig, resume_config
from emu_jax.train.distributed import initialize_distributed
from emu_jax.train.evaluation import (
    Evaluation,
    Evaluations,
    best_steps,
    check_evaluations,
    held_out_table,
    pending,
)
from emu_jax.train.report import refresh_report
from emu_jax.train.run_data import RunData
from emu_jax.train.sheets import remove_later_sheets
from emu_jax.train.signals import Signals
from emu_jax.train.step import Trainer, TrainState, check_rows, mesh_for
from emu_jax.train.telemetry.goodput import Goodput
from emu_jax.train.telemetry.metrics import EvaluationLog
from emu_jax.train.telemetry.monitor import Monitor
from emu_jax.train.telemetry.trackers import open_trackers
from emu_jax.train.warm_start import WarmStart


class Run:
    """A run on this process. All processes call its methods at the same steps.

    As a context manager it holds the lock of the run directory, handles signals, sets the mesh and
    the precision of matmuls, and has decided what the run starts from. `begin` opens the rest.

    Args:
        cfg: the config that the user gave.
        evaluations: the kinds of held-out evaluations that `cfg.eval` may name.

    Attributes:
        cfg: the config, with the model and the towers of what the run starts from.
        trainer: its model, objective and compiled step.
        done: number of steps done before this process began.
        checkpoints, signals: open from the start.
        data, held_out, monitor: its data, its evaluations, and what follows its steps; after
            `begin`.

    Raises:
        UserError: the config does not fit the devices.
    """

    data: RunData
    held_out: Evaluations
    monitor: Monitor

    def __init__(
        self, cfg: TrainConfig, workdir: Path, evaluations: Mapping[str, type[Evaluation]]
    ) -> None:
        initialize_distributed()
        self._mesh = mesh_for(cfg)
        for size in sorted(cfg.data.batch_sizes()):
            check_rows(size, cfg.accumulate, self._mesh)
        self.cfg, self.workdir, self._kinds = cfg, workdir, evaluations
        self._lead = jax.process_index() == 0
        self._stack = ExitStack()

    def __enter__(self) -> Run:
        cfg = self.cfg
        self.workdir.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            self.signals = stack.enter_context(Signals())
            self._goodput = stack.enter_context(Goodput())
            stack.enter_context(jax.set_mesh(self._mesh))
            # The default precision of accelerators rounds the operands of float32 products.
            precision = "highest" if cfg.dtype == "float32" else "default"
            stack.enter_context(jax.default_matmul_precision(precision))
            self.checkpoints = stack.enter_context(
                Checkpoints(
                    self.workdir,
                    cfg.keep_checkpoints,
                    best=lambda steps: best_steps(cfg, self.workdir, steps).values(),
                )
            )
            stack.enter_context(self.signals.interruptible())
            self._find_start()
            self._evaluated = stack.enter_context(
                EvaluationLog(self.workdir, self.cfg.name, self.done)
            )
            if self._lead:
                remove_later_sheets(self.workdir, self.done)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def _find_start(self) -> None:
        """Decides what the run starts from, and restores the newest checkpoint if there is one.

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
        resuming = self.checkpoints.newest() is not None
        if resuming:
            self._warm_start = WarmStart(resume_config(self.cfg, self.workdir), self.workdir)
        else:
            self._warm_start = WarmStart.resolve(self.cfg, self.workdir)
        self.cfg = self._warm_start.cfg
        check_evaluations(self.cfg, self._kinds)
        self.trainer = trainer = Trainer(self.cfg, self._mesh)
        self._warm_start.check_quantized(trainer.quantizers)
        # Frozen parameters that checkpoints omit, because parents hold them.
        self._unsaved: Collection[str] = self._warm_start.unsaved(
            {path: trainer.param_shapes[path] for path in trainer.frozen}
        )
        self.done = 0
        self._restored: tuple[TrainState, dict[str, Any]] | None = None  # and the data position
        if resuming:
            left_out = self._warm_start.load(self._unsaved, trainer.quantizers)
            self.done, state, position = restore_state(self.checkpoints, trainer, left_out)
            self._restored = state, position

    def is_complete(self) -> bool:
        """Returns whether nothing is left to train or to evaluate."""
        return self.done >= self.cfg.steps and not self.pending(self.done)

    def pending(self, step: int) -> list[str]:
        """Returns the evaluations that are due after a step and have no row."""
        return pending(self.cfg, self._evaluated, step)

    def begin(self) -> TrainState:
        """Opens the data, the evaluations and the records, and writes the files beside the steps.

        Returns the restored state, or else one whose parameters are loaded and initialized here.

        Raises:
            UserError: the data, a parent or an evaluation cannot be opened.
        """
        trainer, warm_start, done = self.trainer, self._warm_start, self.done
        state, position = self._restored or (None, None)
        self._restored = None  # the first step donates the state
        tokenizer = trainer.objective.prepare_data()
        batches = self._open_batches(tokenizer, position)
        if state is None:
            state = trainer.init(warm_start.load(trainer.param_shapes, trainer.quantizers))
        if self._lead:
            for name, tally in batches.tallies.items():
                print(f"source {name}: {tally.summary()}", file=sys.stderr, flush=True)
            warm_start.write_run_files(tokenizer, trainer.objective.has_all_towers)

        cfg, workdir, mesh, goodput = self.cfg, self.workdir, self._mesh, self._goodput
        enter = self._stack.enter_context
        self.data = enter(RunData(cfg, workdir, mesh, batches, goodput, done))
        self._trackers = enter(open_trackers(cfg, workdir, done))
        self.held_out = enter(
            Evaluations(
                cfg, trainer, tokenizer, workdir, self._evaluated, self._trackers, self._kinds
            )
        )
        self.monitor = enter(
            Monitor(cfg, workdir, mesh, goodput, self.signals, self._trackers, done)
        )
        return state

    def _open_batches(
        self, tokenizer: Tokenizer, position: dict[str, Any] | None
    ) -> Batches | LatentBatches:
        """Returns the batches of the run from a data position on, if there is one.

        Raises:
            UserError: the data cannot be read, or the position is not that after `done` steps.
        """
        batches = self.trainer.objective.batches(
            tokenizer, row_shares(self._mesh), resumed=position is not None
        )
        if position is not None:
            read = position.get("step", position.get("batch"))
            if read != self.done:
                raise UserError(
                    f"{self.workdir / str(self.done)} holds the data position after {read} "
                    f"batches, not after {self.done}: use another step"
                )
            batches.restore(position)
        return batches

    def check_divergence(self, step: int) -> None:
        """Checks that the loss has not stayed non-finite up to a step, which has ended.

        Raises:
            UserError: it has, for `cfg.max_bad_steps` steps.
        """
        if self.monitor.row.get("bad_steps", 0) >= self.cfg.max_bad_steps:
            self.checkpoints.wait()  # the newest checkpoint may be in progress
            raise UserError(
                f"the loss was not finite for {self.cfg.max_bad_steps} steps up to step {step}: "
                "lower the learning rate or check the data, then rerun; training resumes from step "
                f"{self.checkpoints.newest() or 0}"
            )

    def save(self, state: TrainState, step: int) -> None:
        """Starts to save a state that no step in flight will change, after the records up to it.

        Raises:
            UserError: processes that share rows read different documents, or this save or the
                previous one failed.
        """
        if step == self.cfg.steps and self._lead:
            # Before the last checkpoint, whose presence means that the run is complete.
            model = self.trainer.objective.trained_model(self.monitor.row)
            save_json(model, self.workdir / "config.json")
        for log in (self.data, self._trackers, self._evaluated):
            log.sync()
        with self._goodput.timed("checkpoint"), self.signals.hold():
            position = self.data.position()
            save_state(self.checkpoints, step, state, position, leave_out=self._unsaved)

    def report(self) -> None:
        """Prints the newest held-out results and writes report.html, after the run has ended."""
        if self._lead and (table := held_out_table(self.cfg, self.workdir)):
            print(table, file=sys.stderr, flush=True)
            refresh_report(self.workdir, self.cfg.name)
