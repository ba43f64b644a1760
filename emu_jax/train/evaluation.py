"""Held-out evaluations during training: the interface, when they run, and their records."""

from __future__ import annotations

import abc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import PIL.Image

from emu_jax.checkpoint import complete_steps
from emu_jax.data.batches import BUILDERS
from emu_jax.data.digits import SPLITS
from emu_jax.data.mixture import chosen_sources
from emu_jax.data.sources import find_files
from emu_jax.errors import UserError, suggest
from emu_jax.tokenizer import Tokenizer
from emu_jax.train.config import EvalConfig, TrainConfig
from emu_jax.train.objectives import objective_class
from emu_jax.train.report import COLUMNS, EMA, refresh_report
from emu_jax.train.sheets import save_sheet
from emu_jax.train.step import Trainer, TrainState
from emu_jax.train.telemetry.metrics import EvaluationLog, read_evaluations
from emu_jax.train.telemetry.tracker import Cell, Tracker

REPORT_SECONDS = 300.0  # between two reports of a run; another is written at its end
MANY = 1e4  # larger numbers, such as counts of targets, are shown in full

# Returns whether a signal asks all processes to stop. All of them call it at the same points.
Stop = Callable[[], bool]


class EvalResult(NamedTuple):
    """The result of an evaluation at one step. It is read on the first process alone.

    Attributes:
        metrics: by name. `SOURCE/METRIC` is of one source, METRIC over all; `ema/` before either
            is of averaged parameters.
        sheet: a contact sheet, if the evaluation draws one.
    """

    metrics: dict[str, float]
    sheet: PIL.Image.Image | None = None


class Evaluation(abc.ABC):
    """An evaluation of a run: opened before training begins, then run at some of its steps.

    All processes construct it and call its methods at the same steps. Its results do not depend on
    the mesh, the number of processes, or the steps at which the run was resumed.

    Args:
        cfg: of the run.
        config: of this evaluation.
        trainer: the run's model and mesh.
        tokenizer: of the run's data.

    Raises:
        UserError: data are missing, or the run cannot be evaluated in this way.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        config: EvalConfig,
        trainer: Trainer,
        tokenizer: Tokenizer,
        workdir: Path,
    ) -> None:
        self.cfg, self.config, self.trainer = cfg, config, trainer
        self.tokenizer, self.workdir = tokenizer, workdir

    @classmethod
    def check(cls, cfg: TrainConfig, config: EvalConfig) -> None:
        """Checks that the run can be evaluated and that held-out files exist, before anything is
        computed.

        Raises:
            UserError: it cannot, or they do not.
        """
        data = config.data(cfg.data)
        if data.embedded and not data.sources and data.root == cfg.data.root:  # is built later
            if data.split not in SPLITS:
                raise UserError(f"unknown split {data.split!r}{suggest(data.split, SPLITS)}")
        else:
            requires = BUILDERS[objective_class(cfg).batch_kind].requires
            for source in chosen_sources(data, requires.pairs):
                find_files(source)

    @abc.abstractmethod
    def run(self, state: TrainState, step: int, stop: Stop) -> EvalResult | None:
        """Evaluates a state without donating it, and without the run's random keys.

        Calls `stop` after each batch, and returns None as soon as it is True.
        """

    def close(self) -> None:  # noqa: B027
        """Frees threads and files."""


class Evaluations:
    """The evaluations of a run.

    An evaluation that is due runs before the checkpoint of its step, and `log` then has a row. One
    that a signal prevented has none, and runs when the run resumes.

    Args:
        kinds: the classes of evaluations, by `EvalConfig.kind`.

    Raises:
        UserError: an evaluation cannot be opened.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        trainer: Trainer,
        tokenizer: Tokenizer,
        workdir: Path,
        log: EvaluationLog,
        tracker: Tracker,
        kinds: Mapping[str, type[Evaluation]],
    ) -> None:
        self._log, self._tracker, self._workdir, self._stage = log, tracker, workdir, cfg.name
        self._lead = jax.process_index() == 0
        self._report_at = time.monotonic() + REPORT_SECONDS
        self._evaluations = {
            config.name: kinds[config.kind](cfg, config, trainer, tokenizer, workdir)
            for config in cfg.eval
        }

    def __enter__(self) -> Evaluations:
        return self

    def __exit__(self, *_: object) -> None:
        for evaluation in self._evaluations.values():
            evaluation.close()

    def run(self, names: Sequence[str], state: TrainState, step: int, stop: Stop) -> None:
        """Runs evaluations, until `stop`. Logs their results, and from time to time writes the
        report."""
        for name in names:
            started = time.monotonic()
            result = self._evaluations[name].run(state, step, stop)
            if result is None:
                return
            seconds = time.monotonic() - started
            # The row comes last: the evaluation is not repeated when the run resumes.
            self._tracker.metrics(step, result.metrics, evaluation=name)
            self._tracker.table(step, f"{name}/table", *_table(result.metrics))
            if result.sheet is not None and self._lead:
                save_sheet(self._workdir, name, step, result.sheet)
                self._tracker.images(step, f"{name}/sheet", result.sheet)
            self._log.log(name, step, seconds, result.metrics)
        if self._lead and time.monotonic() > self._report_at:
            refresh_report(self._workdir, self._stage)
            self._report_at = time.monotonic() + REPORT_SECONDS


def pending(cfg: TrainConfig, log: EvaluationLog, step: int) -> list[str]:
    """Returns the evaluations that are due after a step and have no row."""
    due = [e.name for e in cfg.eval if step and (step % e.every == 0 or step == cfg.steps)]
    return log.missing(due, step)


def check_evaluations(cfg: TrainConfig, kinds: Mapping[str, type[Evaluation]]) -> None:
    """Checks all evaluations of a run, before anything is computed.

    Raises:
        UserError: a kind is unknown, data are missing, or the run cannot be evaluated in this way.
    """
    for config in cfg.eval:
        where = f"evaluation {config.name!r}"
        if config.kind not in kinds:
            close = suggest(config.kind, kinds) or f": use one of {', '.join(kinds)}"
            raise UserError(f"unknown kind {config.kind!r} ({where}){close}")
        try:
            kinds[config.kind].check(cfg, config)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def best_steps(cfg: TrainConfig, workdir: Path, steps: Sequence[int]) -> dict[str, int]:
    """Returns the best of the saved `steps` by each metric of `cfg.keep_best` that one has."""
    rows = read_evaluations(workdir, cfg.name) if cfg.keep_best else {}
    best: dict[str, int] = {}
    for key, direction in cfg.keep_best.items():
        name, _, metric = key.partition("/")
        values = [
            (row[metric] if direction == "max" else -row[metric], row["step"])
            for row in rows.get(name, ())
            if row["step"] in steps and math.isfinite(row.get(metric, math.nan))
        ]
        if values:
            _, best[key] = max(values)
    return best


def held_out_table(cfg: TrainConfig, workdir: Path) -> str:
    """Returns the newest row of each evaluation as text, a line for each source, and the best
    checkpoints. "" if there is no row."""
    blocks = []
    for name, rows in read_evaluations(workdir, cfg.name).items():
        values = {key: value for key, value in rows[-1].items() if key not in COLUMNS}
        (_, *metrics), lines = _table(values)
        table = [[f"{name}, step {rows[-1]['step']}", *metrics]]
        for label, *cells in lines:
            table.append([str(label), *map(_shown, cells)])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        blocks += [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in table
        ]
    best = best_steps(cfg, workdir, complete_steps(workdir))
    blocks += [f"best {metric}: step {step}" for metric, step in best.items()]
    return "\n".join(blocks)


def _shown(cell: Cell) -> str:
    """Returns a number as text, with all digits of a large count."""
    if isinstance(cell, int | float):
        return f"{cell:,.0f}" if abs(cell) >= MANY else f"{cell:.4g}"
    return cell or ""


def _table(values: Mapping[str, float]) -> tuple[list[str], list[list[Cell]]]:
    """Returns the columns and rows of a table with a row for each source, sorted by label."""
    lines: dict[str, dict[str, float]] = {}
    for key, value in values.items():
        source, _, metric = key.rpartition("/")
        lines.setdefault(_label(source), {})[metric] = value
    metrics = list(dict.fromkeys(metric for line in lines.values() for metric in line))
    rows = [[label, *(line.get(m) for m in metrics)] for label, line in sorted(lines.items())]
    return ["source", *metrics], rows


def _label(source: str) -> str:
    """Returns the name of a line of the table, where no source stands for all."""
    if source == EMA.rstrip("/"):
        return f"{EMA}all"
    return source or "all"
