"""Profiler traces of chosen steps of a running job."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import jax

from emu_jax.errors import UserError
from emu_jax.storage import Mirror

ON_REQUEST = 3  # steps to trace after SIGUSR1


def parse_steps(text: str) -> range:
    """Parses "10:13" as steps 10, 11 and 12, and "" as none.

    Raises:
        UserError: the text is neither.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    steps = range(int(match[1]), int(match[2])) if match else range(0)
    if text and not (steps and steps[0] > 0):
        raise UserError(
            f'invalid profile_steps {text!r}: write FIRST:END, as in "10:13" for steps 10, 11, 12'
        )
    return steps


class Tracer:
    """Writes traces for TensorBoard's profile plugin and xprof, in one folder per process:
    DIR/<first step>/process-<index>.

    Args:
        steps: the steps to trace without a request.
    """

    def __init__(self, directory: Path, steps: range) -> None:
        self.directory, self.steps = directory, steps
        self._mirror = Mirror(directory)  # of the folder of the trace in progress
        self._tracing = False

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def request(self, next_step: int) -> None:
        """Traces the next `ON_REQUEST` steps, unless a trace is in progress."""
        if not self._tracing:
            self.steps = range(next_step, next_step + ON_REQUEST)

    def before(self, step: int) -> None:
        """Starts a trace if `step`, which is about to be dispatched, is the first to trace."""
        if not self._tracing and step in self.steps:
            folder = self.directory / str(step) / f"process-{jax.process_index()}"
            self._mirror = Mirror(folder)
            jax.profiler.start_trace(str(self._mirror.local))
            self._tracing = True
            print(f"tracing steps {step} to {self.steps[-1]} into {folder}", file=sys.stderr)

    def after(self, step: int) -> None:
        """Ends the trace if `step`, which has ended, is the last to trace."""
        if self._tracing and step >= self.steps[-1]:
            self._stop()

    def _stop(self) -> None:
        if not self._tracing:
            return
        self._tracing = False
        try:
            jax.profiler.stop_trace()
            self._mirror.sync()
        except Exception as error:  # a full disk, for example: a trace must not end the run
            reason = str(error).splitlines()[0]
            print(f"failed to write the trace: {reason}", file=sys.stderr)
