"""Records of a run: metrics.jsonl, TensorBoard events, and progress.

    DIR/metrics.jsonl       one object a line: stage, step, time (Unix seconds), the metrics
    DIR/evaluations.jsonl   one object a line: stage, evaluation, step, time, seconds, the metrics
    DIR/tensorboard/STAGE/  event files with the same scalars
    DIR/documents-N.jsonl   if `log_documents` is set, one object a line: step, and the documents
                            [kind, index] of process N's share of its batch

Progress goes to stderr.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int

from emu_jax.errors import UserError
from emu_jax.filesystem import write_text
from emu_jax.progress import ProgressBar

METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
DOCUMENTS_FILE = "documents-{}.jsonl"
DAMAGED_FILE = "damaged-{}.jsonl"


class MetricLogger:
    """Records a stage's metrics as it trains.

    When a run resumes, rows that an earlier process logged beyond the checkpoint are dropped, so
    each step of a stage is in the file once.

    Args:
        workdir: the run directory, created if it does not exist.
        stage: the name in the rows and on the progress bar.
        total_steps: the step at which the stage ends.
        enabled: if False, every method does nothing (all processes but one).
        start_step: steps done before this process began. By default, the steps before the first
            logged row.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        stage: str,
        total_steps: int,
        enabled: bool = True,
        start_step: int | None = None,
    ) -> None:
        self.workdir, self.stage, self.total_steps = workdir, stage, total_steps
        self.enabled, self.start_step = enabled, start_step
        self._file: TextIO | None = None  # opened at the first row
        self._progress: ProgressBar | None = None  # as well

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row. Adds `steps_per_second` since the row before.

        Args:
            step: steps done, at least 1; grows from call to call.
            values: metric name to a Python float; one that is not finite is stored as null.
        """
        if not self.enabled:
            return
        wall, now = time.time(), time.monotonic()  # the wall clock may jump
        if self._file is None:
            self._open(step, now)
        row = dict(values)
        if step > self._last[0]:
            row["steps_per_second"] = (step - self._last[0]) / max(now - self._last[1], 1e-9)
        self._last = step, now
        assert self._file is not None
        self._file.write(_line({"stage": self.stage, "step": step, "time": wall} | row))
        self._file.flush()
        self._write_event(step, wall, row)
        losses = {k: v for k, v in row.items() if k == "loss" or k.endswith("_loss")}
        if self._progress is None:
            self._progress = ProgressBar(
                self.stage, self.total_steps, "step", done=step, values=losses
            )
        else:
            self._progress.update(step, losses)

    def close(self) -> None:
        """Ends the progress display and closes the files; may be called twice."""
        if self._file is None:
            return
        if self._progress is not None:
            self._progress.close()
            self._progress = None
        self._events.close()
        self.sync()
        self._file.close()
        self._file = None

    def sync(self) -> None:
        """Flushes the rows to disk, so that they are there before the checkpoint is."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def _open(self, step: int, now: float) -> None:
        self.workdir.mkdir(parents=True, exist_ok=True)
        start = step - 1 if self.start_step is None else self.start_step
        path = self.workdir / METRICS_FILE
        if path.exists():
            _filter_rows(
                path, _is_metrics, lambda row: row["stage"] != self.stage or row["step"] <= start
            )
        self._file = path.open("a")
        self._events = self._open_events(time.time(), start)
        # Rates count from the first row, because compilation dominates the time before it.
        self._last = step, now

    def _open_events(self, now: float, start: int) -> Any:
        # Imported late because it imports torch if that is installed. tensorboardX's own writer is
        # a thread that dies when the disk is full, after which its queue blocks the caller.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        folder = self.workdir / "tensorboard" / self.stage
        folder.mkdir(parents=True, exist_ok=True)
        suffix = f".{time.time_ns()}"  # the default name has a resolution of one second
        events = EventsWriter(str(folder / "events"), suffix)
        if start > 0:  # makes readers drop later steps that an earlier process wrote
            log = SessionLog(status=SessionLog.START)
            events.write_event(Event(wall_time=now, step=start + 1, session_log=log))
        return events

    def _write_event(self, step: int, now: float, row: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()]
        event = Event(wall_time=now, step=step, summary=Summary(value=values))
        self._events.write_event(event)
        self._events.flush()


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
        self._file: TextIO | None = None
        if not enabled:
            return
        if jax.process_index() == 0:
            for path in workdir.glob(name.format("*")):
                _filter_rows(path, _is_documents, lambda row: row["step"] <= start_step)
        multihost_utils.sync_global_devices(f"{name} holds nothing beyond the checkpoint")
        self._file = (workdir / name.format(jax.process_index())).open("a")

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def sync(self) -> None:
        """Flushes the lines to disk, so that they are there before the checkpoint is."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def log(self, step: int, documents: Sequence[tuple]) -> None:
        """Writes one line, unless there are no documents."""
        if self._file is not None and documents:
            self._file.write(_line({"step": step, "documents": documents}))
            self._file.flush()


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
        self._file: TextIO | None = None  # opened at the first row
        if self._lead and self._path.exists():
            later = lambda row: row["stage"] == stage and row["step"] > start_step  # noqa: E731
            if any(map(later, _rows(self._path, _is_evaluation))):
                _filter_rows(self._path, _is_evaluation, lambda row: not later(row))
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
            self._file = self._path.open("a")
        row = {"stage": self._stage, "evaluation": name, "step": step, "time": time.time()}
        self._file.write(_line(row | {"seconds": seconds} | dict(metrics)))
        self._file.flush()

    def sync(self) -> None:
        """Flushes the rows to disk, so that they are there before the checkpoint is."""
        if self._file is not None:
            os.fsync(self._file.fileno())


def read_evaluations(workdir: Path, stage: str = "") -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of a run by evaluation, in the order of their steps. Reads null as NaN.

    Args:
        stage: the only stage to read; by default all.

    Raises:
        UserError: the file is damaged.
    """
    path = workdir / EVALUATIONS_FILE
    evaluations: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(path, _is_evaluation) if path.exists() else ():
        if row["stage"] == (stage or row["stage"]):
            values = {k: math.nan if v is None else v for k, v in row.items()}
            evaluations.setdefault(row["evaluation"], []).append(values)
    for rows in evaluations.values():
        rows.sort(key=lambda row: row["step"])
    return evaluations


def read_documents(workdir: Path) -> dict[int, list[tuple[str, int]]]:
    """Returns {step: [(kind, index)]} of the documents that all processes read, unordered.

    Raises:
        UserError: a file is damaged.
    """
    steps: dict[int, list[tuple[str, int]]] = {}
    for path in sorted(workdir.glob(DOCUMENTS_FILE.format("*"))):
        for row in _rows(path, _is_documents):
            steps.setdefault(row["step"], []).extend(map(tuple, row["documents"]))
    return steps


def read_metrics(workdir: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of a run by stage, in the order of their steps. Reads null as NaN.

    Raises:
        UserError: the run has no metrics, or the file is damaged.
    """
    path = workdir / METRICS_FILE
    if not path.exists():
        raise UserError(f"{path} does not exist: train into {workdir} first")
    stages: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(path, _is_metrics):
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


Row = dict[str, Any]


def _is_metrics(row: Row) -> bool:
    numbers = (v for k, v in row.items() if k != "stage" and v is not None)
    return (
        isinstance(row.get("stage"), str)
        and _is_step(row.get("step"))
        and all(isinstance(v, int | float) for v in numbers)
    )


def _is_evaluation(row: Row) -> bool:
    names = ("stage", "evaluation")
    numbers = (v for k, v in row.items() if k not in names and v is not None)
    return (
        all(isinstance(row.get(name), str) for name in names)
        and _is_step(row.get("step"))
        and all(isinstance(v, int | float) for v in numbers)
    )


def _is_documents(row: Row) -> bool:
    documents = row.get("documents")
    return (
        _is_step(row.get("step"))
        and isinstance(documents, list)
        and all(isinstance(d, list) for d in documents)
    )


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _filter_rows(path: Path, valid: Callable[[Row], bool], keep: Callable[[Row], bool]) -> None:
    """Rewrites a file with only the rows for which `keep` holds."""
    rows = [row for row in _rows(path, valid) if keep(row)]
    write_text(path, "".join(map(_line, rows)))


def _line(row: Mapping[str, Any]) -> str:
    """Returns one JSON line, with null for NaN and infinity, which JSON lacks."""
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    return json.dumps(finite) + "\n"


def _rows(path: Path, valid: Callable[[Row], bool]) -> list[Row]:
    """Reads the rows of a file.

    Raises:
        UserError: a line is not JSON, or is not a row of this file.
    """
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number < len(lines):
                raise UserError(
                    f"{path}, line {number}: not JSON: fix or delete the line"
                ) from None
            break  # an incomplete last line: the process was killed while writing it
        if not isinstance(row, dict) or not valid(row):
            raise UserError(
                f"{path}, line {number}: not a row of this file: fix or delete the line"
            )
        rows.append(row)
    return rows
