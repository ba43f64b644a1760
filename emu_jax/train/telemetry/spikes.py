"""Loss spikes, with the documents of their steps.

DIR/spikes-N.jsonl  one object a line: step, loss, median and limit of the loss, the documents
                    [source, index] of process N's share of the batch, and where they are
"""

from __future__ import annotations

import collections
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from emu_jax.errors import UserError
from emu_jax.train.telemetry.rows import Row, RowFile, filter_rows, is_step, read_rows

SPIKES_FILE = "spikes-{}.jsonl"
_WINDOW = 100  # finite losses that a step is compared with
_LEAST = 20  # of them, before a loss can be a spike
_REMEMBERED = 16  # steps whose documents are remembered; few are in flight
_MAD_TO_DEVIATION = 1.4826  # of a normal distribution
_LEAST_DEVIATION = 0.01  # of the median: losses that barely vary make no spikes


class SpikeDetector:
    """Records the documents of steps whose loss is far above that of recent steps, or not finite.

    Every process sees the same losses and comes to the same conclusion. It records its own share
    of the documents, in a file that exists only if there was a spike.

    Args:
        threshold: how many deviations above the median a spike is. The deviation is estimated by
            the median distance from the median, which spikes do not move. 0 disables the detector.
    """

    def __init__(self, workdir: Path, threshold: float) -> None:
        self.threshold = threshold
        self._path = workdir / SPIKES_FILE.format(jax.process_index())
        self._losses: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._documents: dict[int, Sequence[tuple[str, int]]] = {}
        self._file: RowFile | None = None  # opened at the first spike
        self._recorded = set[int]()  # steps in the file

    def __enter__(self) -> SpikeDetector:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def remember(self, step: int, documents: Sequence[tuple[str, int]]) -> None:
        """Keeps the documents of a step until its loss is known."""
        if self.threshold > 0:
            self._documents[step] = documents
            self._documents.pop(step - _REMEMBERED, None)

    def check(
        self, step: int, loss: float, finite: bool, locate: Callable[[str, int], str]
    ) -> None:
        """Compares a step's loss with those before, and records a spike.

        Args:
            finite: whether the loss and the gradient were.
            locate: returns where a document of a source is.
        """
        if self.threshold == 0:
            return
        median, limit = self._limit()
        if not finite or loss > limit:
            self._record(step, loss, median, limit, locate)
        if math.isfinite(loss):
            self._losses.append(loss)

    def _limit(self) -> tuple[float, float]:
        """Returns the median of recent losses, and the largest loss that is no spike."""
        if len(self._losses) < _LEAST:
            return math.nan, math.inf
        losses = np.asarray(self._losses)
        median = float(np.median(losses))
        deviation = _MAD_TO_DEVIATION * float(np.median(np.abs(losses - median)))
        return median, median + self.threshold * max(deviation, _LEAST_DEVIATION * abs(median))

    def _record(
        self,
        step: int,
        loss: float,
        median: float,
        limit: float,
        locate: Callable[[str, int], str],
    ) -> None:
        documents = self._documents.get(step, ())
        row = {"step": step, "loss": loss, "median": median, "limit": limit}
        where = [locate(source, index) for source, index in documents]
        try:
            if self._file is None:
                if self._path.exists():
                    filter_rows(self._path, _is_spike, lambda _: True)  # drops a torn last line
                    self._recorded = {row["step"] for row in read_rows(self._path, _is_spike)}
                self._file = RowFile(self._path)
            if step not in self._recorded:  # a resumed run repeats steps
                self._file.append(row | {"documents": documents, "where": where})
        except (OSError, UserError) as error:  # a record must not end the run
            print(f"failed to record a loss spike: {error}", file=sys.stderr)
        if jax.process_index() == 0:
            usual = "" if math.isnan(median) else f", where {median:.4g} is usual"
            print(
                f"loss spike at step {step}: {loss:.4g}{usual}; its documents are in {self._path}",
                file=sys.stderr,
                flush=True,
            )


def _is_spike(row: Row) -> bool:
    return is_step(row.get("step")) and isinstance(row.get("documents"), list)
