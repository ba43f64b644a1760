"""Progress on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

PLAIN_SECONDS = 10.0  # between plain lines
BRIEF_SECONDS = 1.0  # tasks that take less may go without a plain line

T = TypeVar("T")


class ProgressBar:
    """Shows how much of a task is done, until `close` or the end of the `with` block.

    Plain lines are at least `PLAIN_SECONDS` apart, except for the last one.

    Args:
        name: stands before the bar or the line.
        total: amount of work, or None if unknown.
        unit: what is counted, in the singular. `B` counts bytes; `step` counts numbered steps.
        done: amount of work done before.
        enabled: False shows nothing, as in all processes but one.
        values: figures to show after the amount. If given, a plain line is printed at once.
        min_seconds: tasks that take less print no plain line.
    """

    def __init__(
        self,
        name: str,
        total: int | None,
        unit: str,
        *,
        done: int = 0,
        enabled: bool = True,
        values: Mapping[str, float] | None = None,
        min_seconds: float = 0.0,
    ) -> None:
        self._name, self._total, self._unit, self._enabled = name, total, unit, enabled
        self._start_done = self._done = done
        self._start = self._printed = time.monotonic()
        self._pending = ""  # the latest plain line, if it is not printed yet
        self._min_seconds = min_seconds
        self._bar = None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=done,
                desc=name,
                unit=unit,
                unit_scale=unit == "B",
                dynamic_ncols=True,
                smoothing=0.1,
            )
            self._bar.set_postfix(_formatted(values or {}), refresh=False)
        elif enabled and values is not None:
            self._print(self._line(self._start, values))

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def add(self, count: int = 1) -> None:
        """Counts more work as done."""
        self.update(self._done + count)

    def update(self, done: int, values: Mapping[str, float] | None = None) -> None:
        """Shows the amount of work done so far, and figures such as losses after it."""
        if self._bar is not None:
            self._bar.set_postfix(_formatted(values or {}), refresh=False)
            self._bar.update(done - self._done)
        self._done = done
        if self._bar is not None or not self._enabled:
            return
        now = time.monotonic()
        self._pending = self._line(now, values or {})
        if now - self._printed >= PLAIN_SECONDS:
            self._print(self._pending)
            self._printed, self._pending = now, ""
        elif now - self._start < self._min_seconds:
            self._pending = ""

    def close(self) -> None:
        """Ends the display, with a plain line of the latest update. May be called twice."""
        if self._bar is not None:
            self._bar.close()
        elif self._pending:
            self._print(self._pending)
        self._pending = ""

    def _line(self, now: float, values: Mapping[str, float]) -> str:
        parts = [f"{self._name}: {self._amount()}"]
        parts += [f"{name} {value}" for name, value in _formatted(values).items()]
        if self._done > self._start_done:
            rate = (self._done - self._start_done) / max(now - self._start, 1e-9)
            parts.append(_rate(rate, self._unit))
            if self._total is not None:
                parts.append(f"{_duration((self._total - self._done) / rate)} left")
        return ", ".join(parts)

    def _amount(self) -> str:
        done, total = self._done, self._total
        if self._unit == "step":
            return f"step {done}" + ("" if total is None else f"/{total}")
        if self._unit == "B":
            amount, whole = f"{done / 2**30:.1f}", f" of {(total or 0) / 2**30:.1f}"
            return f"{amount}{'' if total is None else whole} GiB"
        return f"{done:,}{'' if total is None else f' of {total:,}'} {self._unit}s"

    @staticmethod
    def _print(line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def track(items: Iterable[T], total: int | None, name: str, unit: str) -> Iterator[T]:
    """Yields the items and shows how many of them were used."""
    with ProgressBar(name, total, unit, min_seconds=BRIEF_SECONDS) as bar:
        for item in items:
            yield item
            bar.add()


def _formatted(values: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{value:.4g}" for name, value in values.items()}


def _rate(rate: float, unit: str) -> str:
    return f"{rate / 2**20:.1f} MiB/s" if unit == "B" else f"{rate:.2f} {unit}s/s"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
