"""Profiler traces of chosen steps, while a run goes on."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import jax

from emu_jax.errors import UserError

ON_REQUEST = 3  # steps traced when a running process is asked


def parse_steps(text: str) -> range:
    """ "10:13" is steps 10, 11 and 12; "" none.

    Raises:
        UserError: it is neither.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text)
    steps = range(int(found[1]), int(found[2])) if found else range(0)
    if text and not (steps and steps[0] > 0):
        raise UserError(f'profile_steps {text!r}: write FIRST:END, as in "10:13" for 10, 11, 12')
    return steps


class Tracer:
    """Writes traces for TensorBoard's profile plugin and for xprof, one folder for each
    process: DIR/<first step>/process-<index>.

    Args:
        steps: those to trace without being asked.
    """

    def __init__(self, directory: Path, steps: range):
        self.directory, self.steps = directory, steps
        self._tracing = False

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def request(self, next_step: int) -> None:
        """Traces the next steps, unless some are being traced."""
        if not self._tracing:
            self.steps = range(next_step, next_step + ON_REQUEST)

    def before(self, step: int) -> None:
        """`step` is about to be launched."""
        if not self._tracing and step in self.steps:
            place = self.directory / str(step) / f"process-{jax.process_index()}"
            jax.profiler.start_trace(str(place))
            self._tracing = True
            print(f"tracing steps {step} to {self.steps[-1]} into {place}", file=sys.stderr)

    def after(self, step: int) -> None:
        """`step` has ended."""
        if self._tracing and step >= self.steps[-1]:
            self._stop()

    def _stop(self) -> None:
        if not self._tracing:
            return
        self._tracing = False
        try:
            jax.profiler.stop_trace()
        except Exception as error:  # no room, say: a trace is not worth a run
            reason = str(error).splitlines()[0]
            print(f"the trace could not be written: {reason}", file=sys.stderr)
