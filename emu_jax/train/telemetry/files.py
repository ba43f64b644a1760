"""Trackers that write files in the run directory.

DIR/metrics.jsonl       one object a line: stage, step, time (Unix seconds), the metrics
DIR/tensorboard/STAGE/  event files: the metrics, those of evaluations, tables, images
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from emu_jax import markdown
from emu_jax.storage import LOG_BYTES, Mirror, is_remote
from emu_jax.train.telemetry.rows import Row, RowFile, filter_rows, is_step
from emu_jax.train.telemetry.tracker import Cell, Tracker

METRICS_FILE = "metrics.jsonl"


class JsonlTracker(Tracker):
    """Appends the metrics of training to metrics.jsonl in the run directory.

    Rows that an earlier process logged beyond the checkpoint are dropped before the first row is
    written, so each step of a stage is in the file once. Results of evaluations have a file of
    their own (`metrics.EvaluationLog`).
    """

    def __init__(self, workdir: Path, stage: str, start_step: int | None = None) -> None:
        self.workdir, self.stage, self.start_step = workdir, stage, start_step
        self._file: RowFile | None = None  # opened at the first row

    def metrics(self, step: int, values: Mapping[str, float], evaluation: str = "") -> None:
        """Appends a row of training. A value that is not finite is stored as null."""
        if evaluation:
            return
        if self._file is None:
            self._file = self._open(step)
        row = {"stage": self.stage, "step": step, "time": time.time()}
        self._file.append(row | dict(values))

    def sync(self) -> None:
        """Flushes the rows to disk."""
        if self._file is not None:
            self._file.sync()

    def close(self, failed: bool = False) -> None:
        """Flushes and closes the file."""
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None

    def _open(self, step: int) -> RowFile:
        self.workdir.mkdir(parents=True, exist_ok=True)
        start = step - 1 if self.start_step is None else self.start_step
        path = self.workdir / METRICS_FILE
        if path.exists():
            filter_rows(
                path, is_metrics, lambda row: row["stage"] != self.stage or row["step"] <= start
            )
        return RowFile(path)


def is_metrics(row: Row) -> bool:
    """Returns whether a row has the fields of metrics.jsonl, with their types."""
    numbers = (v for k, v in row.items() if k != "stage" and v is not None)
    return (
        isinstance(row.get("stage"), str)
        and is_step(row.get("step"))
        and all(isinstance(v, int | float) for v in numbers)
    )


class TensorBoardTracker(Tracker):
    """Writes event files for TensorBoard in DIR/tensorboard/STAGE.

    To an object store, `sync` uploads the last file and begins another once it holds `LOG_BYTES`.
    """

    def __init__(self, workdir: Path, stage: str, start_step: int | None = None) -> None:
        self.folder, self.start_step = workdir / "tensorboard" / stage, start_step
        self._mirror = Mirror(self.folder)
        self._events: Any = None  # opened at the first record

    def metrics(self, step: int, values: Mapping[str, float], evaluation: str = "") -> None:
        """Writes an event of scalars."""
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        prefix = f"{evaluation}/" if evaluation else ""
        self._write(
            step, [Summary.Value(tag=prefix + k, simple_value=v) for k, v in values.items()]
        )

    def images(self, step: int, name: str, image: Image.Image, caption: str = "") -> None:
        """Writes an image as PNG; its caption is the tag's description."""
        from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata  # pyright: ignore[reportAttributeAccessIssue]

        file = io.BytesIO()
        image.convert("RGB").save(file, "PNG")
        png = Summary.Image(
            height=image.height,
            width=image.width,
            colorspace=3,
            encoded_image_string=file.getvalue(),
        )
        metadata = SummaryMetadata(summary_description=caption)
        self._write(step, [Summary.Value(tag=name, image=png, metadata=metadata)])

    def table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]
    ) -> None:
        """Writes a table in Markdown, which TensorBoard's text plugin shows."""
        from tensorboardX.summary import text

        cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
        self._write(step, text(name, markdown.table(columns, cells)).value)

    def sync(self) -> None:
        """Uploads the events to an object store."""
        if self._events is None or not is_remote(self.folder):
            return
        self._mirror.sync()
        newest = max(self._mirror.local.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        if newest.stat().st_size >= LOG_BYTES:
            self._events.close()
            self._events = self._writer()

    def close(self, failed: bool = False) -> None:
        """Closes the event file."""
        if self._events is not None:
            self._events.close()
            self._events = None
            self._mirror.sync()

    def _write(self, step: int, values: Sequence[Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        if self._events is None:
            self._events = self._open(step)
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        self._events.write_event(event)
        self._events.flush()

    def _open(self, step: int) -> Any:
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        start = step - 1 if self.start_step is None else self.start_step
        events = self._writer()
        if start > 0:  # makes readers drop later steps that an earlier process wrote
            log = SessionLog(status=SessionLog.START)
            events.write_event(Event(wall_time=time.time(), step=start + 1, session_log=log))
        return events

    def _writer(self) -> Any:
        # Imported late because it imports torch if that is installed. tensorboardX's own writer is
        # a thread that dies when the disk is full, after which its queue blocks the caller.
        from tensorboardX.event_file_writer import EventsWriter

        self._mirror.local.mkdir(parents=True, exist_ok=True)
        suffix = f".{time.time_ns()}"  # the default name has a resolution of one second
        return EventsWriter(str(self._mirror.local / "events"), suffix)
