"""Goodput: the fraction of a run's time that its devices trained, and what the rest went to."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax

# Every moment of a run belongs to one kind. `lost`: steps that were repeated after a restart.
KINDS = ("step", "data", "checkpoint", "eval", "compile", "other", "lost")
COMPILATION = "/jax/core/compile/backend_compile_duration"
COMPILING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    COMPILATION,
)

_Interval = tuple[float, float]  # (start, end), of `time.monotonic`


class Goodput:
    """Splits a run's time by kind, from what the loop reports.

    Devices work on a step from its dispatch, or from the end of the previous step, to its own end.
    Work that the loop does meanwhile costs nothing. While the devices are idle, the time counts as
    what the loop is doing.
    """

    def __init__(self) -> None:
        self.compilations = 0  # of this process, including cache hits
        self._seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self._until = time.monotonic()  # the time up to here has been split
        self._spans: dict[str, list[_Interval]] = {
            kind: [] for kind in ("data", "checkpoint", "eval", "compile")
        }

    def __enter__(self) -> Goodput:
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._heard)

    def add(self, seconds: Mapping[str, float]) -> None:
        """Adds the time that earlier processes of the run spent."""
        for kind, value in seconds.items():
            self._seconds[kind] += value

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Counts the block as time that the loop waits for data, saves a checkpoint or
        evaluates."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._spans[kind].append((start, time.monotonic()))

    def step(self, dispatched: float, ended: float) -> None:
        """Adds a step that was dispatched and has ended."""
        begin = min(max(self._until, dispatched), ended)
        idle, busy = (self._until, begin), (begin, ended)
        compiling = self._spans["compile"]
        compiled = {span: overlap(compiling, span) for span in (idle, busy)}
        split = {
            "step": ended - begin - compiled[busy],
            "data": overlap(self._spans["data"], idle),
            "checkpoint": overlap(self._spans["checkpoint"], idle),
            # An evaluation compiles within its block.
            "eval": overlap([*self._spans["eval"], *compiling], idle) - compiled[idle],
            "compile": compiled[idle] + compiled[busy],
        }
        split["other"] = max(0.0, ended - self._until - sum(split.values()))
        for kind, seconds in split.items():
            self._seconds[kind] += seconds
        self._until = ended
        for kind, spans in self._spans.items():
            self._spans[kind] = [span for span in spans if span[1] > ended]

    def metrics(self) -> dict[str, float]:
        """Returns the seconds by kind since the run began, the fraction of them that went into
        steps, and the number of compilations."""
        total = sum(self._seconds.values())
        return {
            **{f"{kind}_seconds": seconds for kind, seconds in self._seconds.items()},
            "goodput": self._seconds["step"] / max(total, 1e-9),
            "compilations": float(self.compilations),
        }

    def _heard(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event in COMPILING:
            now = time.monotonic()
            self._spans["compile"].append((now - duration_secs, now))
            self.compilations += event == COMPILATION


def seconds_before(rows: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """Returns the seconds by kind of the processes that logged `rows`.

    The run resumes from `step`, so the time of later steps counts as lost.
    """
    if not rows:
        return {}
    seconds = {kind: float(rows[-1].get(f"{kind}_seconds", 0.0)) for kind in KINDS}
    kept = [float(row.get("step_seconds", 0.0)) for row in rows if row["step"] <= step]
    lost = seconds["step"] - (kept[-1] if kept else 0.0)
    seconds["step"] -= lost
    seconds["lost"] += lost
    return seconds


def overlap(spans: Iterable[_Interval], within: _Interval) -> float:
    """Returns how many seconds of `within` the spans cover."""
    covered, until = 0.0, within[0]
    for start, end in sorted(spans):
        start, end = max(start, until), min(end, within[1])
        if end > start:
            covered += end - start
            until = end
    return covered
