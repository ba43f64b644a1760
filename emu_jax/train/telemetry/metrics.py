"""Records of training: its metrics, progress, its documents, and the readers of the files.

    DIR/metrics.jsonl       one object a line: stage, step, time (Unix seconds), the metrics
    DIR/evaluations.jsonl   one object a line: stage, evaluation, step, time, seconds, the metrics
    DIR/documents-N.jsonl   if `log_documents` is set, one object a line: step, and the documents
                            [kind, index] of process N's share of its batch

Progress goes to stderr.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int

from emu_jax.errors import UserError
from emu_jax.progress import ProgressBar
from emu_jax.train.telemetry.files import METRICS_FILE, is_metrics
from emu_jax.train.telemetry.rows import Row, RowFile, filter_rows, is_step, read_rows
from emu_jax.train.telemetry.tracker import Tracker

EVALUATIONS_FILE = "evaluations.jsonl"
DOCUMENTS_FILE = "documents-{}.jsonl"
DAMAGED_FILE = "damaged-{}.jsonl"


class MetricLogger:
    """Records the metrics of training in a tracker, and shows progress.

    Args:
        tracker: closed by its owner.
        stage: the name on the progress bar.
        total_steps: the step at which the stage ends.
        enabled: if False, every method does nothing (all processes but one).
    """

    def __init__(
        self, tracker: Tracker, *, stage: str, total_steps: int, enabled: bool = True
    ) -> None:
        self.tracker, self.stage, self.total_steps = tracker, stage, total_steps
        self.enabled = enabled
        self._last: tuple[int, float] | None = None  # step and time.monotonic of the last row
        self._progress: ProgressBar | None = None  # opened at the first row

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Logs one row. Adds `steps_per_second` since the row before.

        Args:
            step: steps done, at least 1; grows from call to call.
            values: metric name to a Python float.
        """
        if not self.enabled:
            return
        now = time.monotonic()  # the wall clock may jump
        row = dict(values)
        # Rates count from the first row, because compilation dominates the time before it.
        if self._last is not None and step > self._last[0]:
            row["steps_per_second"] = (step - self._last[0]) / max(now - self._last[1], 1e-9)
        self._last = step, now
        self.tracker.metrics(step, row)
        losses = {k: v for k, v in row.items() if k == "loss" or k.endswith("_loss")}
        if self._progress is None:
            self._progress = ProgressBar(
                self.stage, self.total_steps, "step", done=step, values=losses
            )
        else:
            self._progress.update(step, losses)

    def close(self) -> None:
        """Ends the progress display. May be called twice."""
        if self._progress is not None:
            self._progress.close()
            self._progress = None


class StepLog:
    """Records the documents that each step read, or the damaged ones, in a file per process.

    Each step is recorded once, however often the run resumes and on whatever number of processes.
    Tests use the record to show that no document is lost or read twice.

    Args:
        name: pattern of the file names, `DOCUMENTS_FILE` or `DAMAGED_FILE`.
        enabled: if False, every method does nothing.
        start_step: steps done before this process began. Lines of later steps are dropped from the
            files of all processes.
    """

    def __init__(self, workdir: Path, name: str, *, enabled: bool = True, start_step: int) -> None:
        self._file: RowFile | None = None
        if not enabled:
            return
        if jax.process_index() == 0:
            for path in workdir.glob(name.format("*")):
                filter_rows(path, _is_documents, lambda row: row["step"] <= start_step)
        multihost_utils.sync_global_devices(f"{name} holds nothing beyond the checkpoint")
        self._file = RowFile(workdir / name.format(jax.process_index()))

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def sync(self) -> None:
        """Flushes the lines to disk, so that they are there before the checkpoint is."""
        if self._file is not None:
            self._file.sync()

    def log(self, step: int, documents: Sequence[tuple]) -> None:
        """Writes one line, unless there are no documents."""
        if self._file is not None and documents:
            self._file.append({"step": step, "documents": documents})


class EvaluationLog:
    """Records the results of held-out evaluations, one row for each evaluation and step.

    The first process reads and writes the file; all processes construct it and call its methods.

    Args:
        start_step: steps done before this process began. Rows of later steps are dropped.
    """

    def __init__(self, workdir: Path, stage: str, start_step: int) -> None:
        self._path, self._stage = workdir / EVALUATIONS_FILE, stage
        self._lead = jax.process_index() == 0
        self._done = set[tuple[str, int]]()  # (evaluation, step) with a row, on the first process
        self._file: RowFile | None = None  # opened at the first row
        if self._lead and self._path.exists():
            # Also drops a line that a killed process did not finish.
            filter_rows(
                self._path,
                _is_evaluation,
                lambda row: not (row["stage"] == stage and row["step"] > start_step),
            )
            rows = read_evaluations(workdir, stage)
            self._done = {(name, row["step"]) for name in rows for row in rows[name]}

    def __enter__(self) -> EvaluationLog:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def missing(self, names: Sequence[str], step: int) -> list[str]:
        """Returns the evaluations that have no row at a step, the same on every process."""
        missing = np.array([(name, step) not in self._done for name in names], bool)
        if jax.process_count() > 1 and names:
            missing = np.asarray(multihost_utils.broadcast_one_to_all(missing))
        return [name for name, absent in zip(names, missing, strict=True) if absent]

    def log(self, name: str, step: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """Writes the row of an evaluation. A value that is not finite is stored as null."""
        self._done.add((name, step))
        if not self._lead:
            return
        if self._file is None:
            self._file = RowFile(self._path)
        row = {"stage": self._stage, "evaluation": name, "step": step, "time": time.time()}
        self._file.append(row | {"seconds": seconds} | dict(metrics))

    def sync(self) -> None:
        """Flushes the rows to disk, so that they are there before the checkpoint is."""
        if self._file is not None:
            self._file.sync()


def read_evaluations(workdir: Path, stage: str = "") -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of a run by evaluation, in the order of their steps. Reads null as NaN.

    Args:
        stage: the only stage to read; by default all.

    Raises:
        UserError: the file is damaged.
    """
    path = workdir / EVALUATIONS_FILE
    evaluations: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(path, _is_evaluation) if path.exists() else ():
        if row["stage"] == (stage or row["stage"]):
            values = {k: math.nan if v is None else v for k, v in row.items()}
            evaluations.setdefault(row["evaluation"], []).append(values)
    for rows in evaluations.values():
        rows.sort(key=lambda row: row["step"])
    return evaluations


def read_metrics(workdir: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of a run by stage, in the order of their steps. Reads null as NaN.

    Raises:
        UserError: the run has no metrics, or the file is damaged.
    """
    path = workdir / METRICS_FILE
    if not path.exists():
        raise UserError(f"{path} does not exist: train into {workdir} first")
    stages: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(path, is_metrics):
        values = {k: math.nan if v is None else v for k, v in row.items()}
        stages.setdefault(row["stage"], []).append(values)
    return stages


def series(
    rows: Iterable[Mapping[str, Any]], name: str
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Returns one metric's steps and values, from the rows that have it."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.asarray(steps, np.int64), np.asarray(values, np.float64)


def _is_evaluation(row: Row) -> bool:
    names = ("stage", "evaluation")
    numbers = (v for k, v in row.items() if k not in names and v is not None)
    return (
        all(isinstance(row.get(name), str) for name in names)
        and is_step(row.get("step"))
        and all(isinstance(v, int | float) for v in numbers)
    )


def _is_documents(row: Row) -> bool:
    documents = row.get("documents")
    return (
        is_step(row.get("step"))
        and isinstance(documents, list)
        and all(isinstance(d, list) for d in documents)
    )
