"""`Tracker`: where the metrics, images and tables of a run go."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Mapping, Sequence

from PIL import Image

from emu_jax.errors import first_line

Cell = str | float | None

_QUEUED = 10_000  # records; beyond, a service that hangs would fill the memory
_SYNC_SECONDS = 10.0  # how long a checkpoint waits for records to reach the service's client
_CLOSE_SECONDS = 60.0  # how long the end of a run waits for the service


class Tracker:
    """A place for the records of one stage.

    Steps count steps done, from 1. They grow from call to call within the metrics of training, and
    within those of one evaluation.
    """

    def metrics(self, step: int, values: Mapping[str, float], evaluation: str = "") -> None:
        """Records metrics.

        Args:
            values: metric name to a Python float.
            evaluation: the evaluation that they are of, or "" for those of training. Trackers
                that have one namespace prefix names with it: `heldout/loss`.
        """
        raise NotImplementedError

    def images(self, step: int, name: str, image: Image.Image, caption: str = "") -> None:
        """Records an image, for example a contact sheet. `name` stays the same over the steps."""

    def table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]
    ) -> None:
        """Records a table. `name` stays the same over the steps."""

    def sync(self) -> None:
        """Makes the records so far durable, before a checkpoint is saved."""

    def close(self, failed: bool = False) -> None:
        """Ends the tracker. May be called twice.

        Args:
            failed: whether the run ends with an exception; it may be resumed.
        """


class Trackers(Tracker):
    """Passes every record on to several trackers. Without any, does nothing."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def metrics(self, step: int, values: Mapping[str, float], evaluation: str = "") -> None:
        """Records metrics in all trackers."""
        for tracker in self._trackers:
            tracker.metrics(step, values, evaluation)

    def images(self, step: int, name: str, image: Image.Image, caption: str = "") -> None:
        """Records an image in all trackers."""
        for tracker in self._trackers:
            tracker.images(step, name, image, caption)

    def table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]
    ) -> None:
        """Records a table in all trackers."""
        for tracker in self._trackers:
            tracker.table(step, name, columns, rows)

    def sync(self) -> None:
        """Makes the records of all trackers durable."""
        for tracker in self._trackers:
            tracker.sync()

    def close(self, failed: bool = False) -> None:
        """Ends all trackers."""
        for tracker in self._trackers:
            tracker.close(failed)


class BackgroundTracker(Tracker):
    """Calls another tracker on a thread. Neither its errors nor its network delay training.

    The first error is reported on stderr. Lost records are counted, and reported at the end.

    Args:
        service: its name in messages.
        connect: opens the tracker. If it fails, all records are lost.

    Attributes:
        lost: number of records that the service did not take.
    """

    def __init__(self, service: str, connect: Callable[[], Tracker]) -> None:
        self.service, self.lost = service, 0
        self._connect, self._connected = connect, True
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(_QUEUED)
        self._warned = False
        self._synced: threading.Event | None = None  # set when the last `sync` is done
        self._thread = threading.Thread(
            target=self._run, daemon=True, name=f"emu-jax-{service.lower()}"
        )
        self._thread.start()

    def metrics(self, step: int, values: Mapping[str, float], evaluation: str = "") -> None:
        """Queues metrics."""
        values = dict(values)
        self._record(lambda tracker: tracker.metrics(step, values, evaluation))

    def images(self, step: int, name: str, image: Image.Image, caption: str = "") -> None:
        """Queues an image."""
        self._record(lambda tracker: tracker.images(step, name, image, caption))

    def table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]
    ) -> None:
        """Queues a table."""
        self._record(lambda tracker: tracker.table(step, name, columns, rows))

    def sync(self) -> None:
        """Waits a bounded time until the service's client has the records so far.

        Does not wait while an earlier call is unanswered, so a service that hangs costs this time
        once.
        """
        if self._synced is not None and not self._synced.is_set():
            return
        self._synced = reached = threading.Event()

        def sync(tracker: Tracker) -> None:
            try:
                tracker.sync()
            finally:
                reached.set()

        if self._thread.is_alive() and self._put(sync):
            reached.wait(_SYNC_SECONDS)

    def close(self, failed: bool = False) -> None:
        """Ends the tracker. Waits a bounded time for the service."""
        if not self._thread.is_alive():
            return
        self._put(lambda tracker: tracker.close(failed))
        self._thread.join(_CLOSE_SECONDS if self._put(None) else 0)
        if self._thread.is_alive():
            self._report(f"records are still in transit after {_CLOSE_SECONDS:.0f} s: left behind")
        elif self.lost:
            self._report(f"{self.lost} records were lost; the run directory has all of them")

    def _record(self, record: Callable[[Tracker], None]) -> None:
        def count_or_record(tracker: Tracker) -> None:
            if self._connected:
                record(tracker)
            else:
                self.lost += 1

        if not self._put(count_or_record):
            self._failed("it takes no more records")

    def _put(self, call: Callable[[Tracker], None] | None) -> bool:
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            return False
        return True

    def _run(self) -> None:
        tracker: Tracker = Trackers(())
        try:
            tracker = self._connect()
        except Exception as error:  # the service's client raises many types
            self._connected = False
            self._failed(first_line(error), lost=0)
        while (call := self._calls.get()) is not None:
            try:
                call(tracker)
            except Exception as error:
                self._failed(first_line(error))

    def _failed(self, reason: str, lost: int = 1) -> None:
        self.lost += lost
        if not self._warned:
            self._warned = True
            self._report(f"{reason}: training continues without it")

    def _report(self, text: str) -> None:
        print(f"{self.service}: {text}", file=sys.stderr, flush=True)
