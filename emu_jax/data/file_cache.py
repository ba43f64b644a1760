"""Local copies of remote files, for readers that need a local file, within a bound of bytes.

    FOLDER/HASH-NAME        a whole file; its modification time is when it was last used
    FOLDER/.HASH-NAME.tmp   a download, of the final size from the start
    FOLDER/*.lock           locks between the processes of a host

The least recently used files are evicted, and downloaded again when they are read again. A process
holds a shared lock on a file while it reads it, and an exclusive one to evict it. Evicted files are
truncated, so that their space is free even if a reader still has them open.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from emu_jax.data import storage
from emu_jax.errors import UserError
from emu_jax.storage import publish, temporary_path

CACHE_BYTES = 32 << 30  # by default: a third of the disk that a TPU host has
RANGE_BYTES = 8 << 20  # downloaded in one request
RANGES = 4  # requests at the same time for one file
WAIT_SECONDS = 600.0  # for other readers to release their files
_DOWNLOAD_LOCKS = 64  # files that a host can download at once; each lock is a file

log = logging.getLogger(__name__)


class _Entry(NamedTuple):
    path: str
    size: int
    used: int  # when it was last used, in nanoseconds


class FileCache:
    """A folder of local copies, shared by all processes of a host.

    Args:
        folder: made at the first download.
        limit: bytes of all copies together.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._fetched: set[str] = set()

    @classmethod
    def at(cls, cache: str, limit: int = CACHE_BYTES) -> FileCache:
        """Returns the cache in the folder `cache`, or in the user's own one if that is remote or
        not given."""
        local = cache if cache and not storage.is_remote(cache) else storage.user_cache()
        return cls(Path(local) / "files", limit)

    @contextlib.contextmanager
    def reading(self, path: str, stat: storage.Stat) -> Iterator[Path]:
        """Yields the local copy of a remote file, which is not evicted before the context ends.

        Args:
            stat: the file's size and stamp. A file that has changed since is another file.

        Raises:
            UserError: it cannot be downloaded, it is larger than `limit`, or the disk is full.
        """
        key = hashlib.sha256(repr((path, *stat)).encode()).hexdigest()[:16]
        target = self.folder / f"{key}-{os.path.basename(path)[-100:]}"
        while (held := _hold(target)) is None:
            try:
                self._fetch(path, stat.size, target)
            except OSError as error:
                why = error.strerror or str(error)
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    why = "the disk is full"
                raise UserError(
                    f"cannot cache {path} ({why}, {self.folder}): free space, lower "
                    "data.cache_bytes, or set data.cache to a folder on another disk"
                ) from None
        try:
            with contextlib.suppress(OSError):  # another user's file
                # The system's own "now" is too coarse to order two uses.
                os.utime(held, ns=(time.time_ns(), time.time_ns()))
            yield target
        finally:
            os.close(held)

    def _fetch(self, path: str, size: int, target: Path) -> None:
        """Downloads a file unless another process has done so."""
        if size > self.limit:
            raise UserError(
                f"{path} has {size:,} bytes, more than all cached files may have "
                f"({self.limit:,}): raise data.cache_bytes"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        number = int(target.name[:8], 16) % _DOWNLOAD_LOCKS
        with _locked(self.folder / f"download-{number}.lock"):
            if target.exists():
                return
            self._warn_once(path, target)
            temporary = temporary_path(target)
            handle = self._reserve(temporary, size)
            try:
                _download(path, size, handle)
                publish(temporary, target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            finally:
                os.close(handle)

    def _warn_once(self, path: str, target: Path) -> None:
        if target.name in self._fetched and "" not in self._fetched:
            log.warning(
                "%s was evicted and is downloaded again: the files in use do not fit into "
                "data.cache_bytes (%d)",
                path,
                self.limit,
            )
            self._fetched.add("")
        self._fetched.add(target.name)

    def _reserve(self, temporary: Path, size: int) -> int:
        """Makes room for a file; returns a locked descriptor of it, already of its final size.

        Raises:
            UserError: other files were in use for `WAIT_SECONDS`.
        """
        end = time.monotonic() + WAIT_SECONDS
        while True:
            with _locked(self.folder / "space.lock"):
                if self._make_room(size):
                    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
                    fcntl.flock(handle, fcntl.LOCK_EX)  # until its download ends
                    os.ftruncate(handle, size)
                    return handle
            if time.monotonic() > end:
                raise UserError(
                    f"{self.folder} is full of files in use ({self.limit:,} bytes): raise "
                    "data.cache_bytes"
                )
            time.sleep(0.1)

    def _make_room(self, size: int) -> bool:
        """Evicts files until `size` more bytes are within the limit; returns whether they are."""
        entries = []
        for found in os.scandir(self.folder):
            if found.name.endswith(".lock"):
                continue
            with contextlib.suppress(FileNotFoundError):
                status = found.stat()
                entries.append(_Entry(found.path, status.st_size, status.st_mtime_ns))
        total = sum(entry.size for entry in entries)

        def is_copy(entry: _Entry) -> bool:
            return not os.path.basename(entry.path).startswith(".")

        # Leftovers of killed processes go first: nobody holds a lock on them.
        for entry in sorted(entries, key=lambda entry: (is_copy(entry), entry.used)):
            if is_copy(entry) and total + size <= self.limit:
                break
            if _evict(entry.path):
                total -= entry.size
        return total + size <= self.limit


def _hold(path: Path) -> int | None:
    """Returns a descriptor with a shared lock on a file, or None if there is no such file."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(handle, fcntl.LOCK_SH)
    if os.fstat(handle).st_nlink:
        return handle
    os.close(handle)  # evicted while we waited
    return None


def _evict(path: str) -> bool:
    """Removes a file unless another process uses it; returns whether it is removed."""
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
        os.ftruncate(handle, 0)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _download(path: str, size: int, handle: int) -> None:
    def copy(start: int) -> None:
        content = storage.read(path, start, min(RANGE_BYTES, size - start))
        if len(content) != min(RANGE_BYTES, size - start):
            raise UserError(f"{path} has changed while it was read: start again")
        while content:
            written = os.pwrite(handle, content, start)
            content, start = content[written:], start + written

    with ThreadPoolExecutor(RANGES) as pool:
        for done in [pool.submit(copy, start) for start in range(0, size, RANGE_BYTES)]:
            done.result()
