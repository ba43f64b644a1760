"""The host memory of a process: measuring anonymous memory, and returning freed memory."""

from __future__ import annotations

import ctypes
import re
import threading
from pathlib import Path
from types import TracebackType

SAMPLE_SECONDS = 0.01


def anonymous_bytes(pid: int | None = None) -> int | None:
    """Returns the bytes of a process's memory that no file backs (`RssAnon`).

    Mapped files are left out: the system can drop their pages at any time.

    Args:
        pid: the process, by default this one.

    Returns:
        None on systems other than Linux, and if there is no such process.
    """
    return _status_bytes("RssAnon", pid)


def resident_bytes(pid: int | None = None) -> int | None:
    """Returns the bytes of all of a process's memory, mapped files included; see
    `anonymous_bytes`."""
    return _status_bytes("VmRSS", pid)


def _status_bytes(field: str, pid: int | None) -> int | None:
    try:
        status = Path(f"/proc/{pid or 'self'}/status").read_text()
    except OSError:
        return None
    match = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


class PeakMemory:
    """Samples this process's anonymous memory on a thread while its context is open.

    Attributes:
        before: bytes when the context was entered (None: unknown).
        peak: the most bytes of all samples (None: unknown).
    """

    def __init__(self) -> None:
        self.before: int | None = None
        self.peak: int | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="emu-jax-memory")

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while self.peak is not None:
            ended = self._done.wait(SAMPLE_SECONDS)
            self.peak = max(self.peak, anonymous_bytes() or 0)
            if ended:
                return


def release_freed_memory() -> None:
    """Returns freed memory to the system.

    glibc keeps the memory that a thread freed in that thread's arena. After large reads or saves on
    several threads, this adds up to several copies.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # the C library is not glibc
        pass
