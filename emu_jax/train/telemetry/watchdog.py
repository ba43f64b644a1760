"""Stack traces of all threads when a step takes too long.

`faulthandler.dump_traceback_later` cannot replace the thread: it writes to one file, not to stderr
as well, creates that file before anything hangs, cannot name the step and the time, and has one
timer per process, which pytest uses too.
"""

from __future__ import annotations

import faulthandler
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from emu_jax.storage import open_log


class Watchdog:
    """Writes the stack traces of all threads to a file and to stderr when no step has ended for
    `seconds`, and again after every further `seconds`. The run continues.

    Starts to watch after the first step, which includes compilation.

    Args:
        seconds: 0 disables the watchdog.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        self._step = 0
        self._ended = 0.0  # when that step ended
        self._paused = False
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def step_ended(self, step: int) -> None:
        """Restarts the timer."""
        self._step, self._ended = step, time.monotonic()
        if self._thread is None and self.seconds > 0:
            self._thread = threading.Thread(
                target=self._watch, daemon=True, name="emu-jax-watchdog"
            )
            self._thread.start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Reports nothing during the block, and restarts the timer at its end."""
        self._paused = True
        try:
            yield
        finally:
            self._ended, self._paused = time.monotonic(), False

    def _watch(self) -> None:
        reported = 0.0  # when traces were last written
        while True:
            due = max(self._ended, reported) + self.seconds
            if self._closed.wait(max(0.0, due - time.monotonic())):
                return
            if self._paused:
                reported = time.monotonic()
            elif time.monotonic() - max(self._ended, reported) >= self.seconds:
                reported = time.monotonic()
                self._write(reported - self._ended)

    def _write(self, passed: float) -> None:
        try:
            with tempfile.TemporaryFile("w+") as file:  # faulthandler needs a real file
                faulthandler.dump_traceback(file, all_threads=True)
                file.seek(0)
                text = (
                    f"no step has ended for {passed:.0f} s since step {self._step} "
                    f"({time.strftime('%Y-%m-%d %H:%M:%S')}); where each thread is:\n{file.read()}"
                )
            print(text, file=sys.stderr, flush=True)
            with closing(open_log(self.path)) as log:
                log.write(text)
                log.sync()
        except OSError as error:  # a full disk must not stop the watchdog
            print(f"failed to write {self.path}: {error}", file=sys.stderr)
            faulthandler.dump_traceback(all_threads=True)
