"""Random-access reads and atomic writes of files, on a local disk or through fsspec (`gs://`).

Only regular local files are read: reading a pipe would block, and reading a device may never end.

fsspec is used rather than etils because its file systems read a byte range in one request, which
random access to a tar needs. Failed reads are retried, because a store with thousands of readers
refuses a request now and then.
"""

from __future__ import annotations

import asyncio
import collections
import errno
import functools
import glob
import io
import logging
import os
import re
import stat as modes
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from emu_jax import storage
from emu_jax.data.read_ahead import ReadAhead, Span
from emu_jax.errors import UserError
from emu_jax.storage import is_remote as is_remote

log = logging.getLogger(__name__)
T = TypeVar("T")

ATTEMPTS = 5
WAIT = 0.5  # seconds before the second attempt; each later wait is twice as long
THREADS = 16  # requests to a store at the same time
_LISTED = 8  # files of one folder that are looked up in a listing: it may have others
# Bytes that `RangeFile` requests from a store after a seek; doubled while it reads on, up to:
_FIRST_BLOCK, _LAST_BLOCK = 1 << 16, 1 << 22
_PACKED = re.compile(r"\.(gz|zst|bz2|xz|lz4|zip)$")
# NumPy parses headers by `ast`, which Python 3.11 does not let several threads do at once.
NUMPY_HEADERS = threading.Lock()
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


# Size limits of a document's files, in bytes. A larger file counts as damaged: it would fill the
# memory of every thread that reads documents.
MOST_IMAGE = 1 << 30
MOST_VIDEO = 1 << 33
MOST_TEXT = 1 << 26  # captions, subtitles
MOST_ENTRY = 1 << 28  # one entry of a listing, which may embed images


class Unreadable(UserError):
    """Raised for a path that must not be read.

    Attributes:
        reason: "not a regular file" or "file too large", as in `documents.REASONS`.
    """

    def __init__(self, path: str, reason: str, detail: str) -> None:
        super().__init__(f"{path}: {reason} ({detail})")
        self.reason, self.detail = reason, detail


class Stat(NamedTuple):
    """A file's size and modification stamp; equal as long as the file does not change."""

    size: int
    stamp: str  # of the last modification: time, ETag or generation


def resolve(folder: str, name: str) -> str:
    """Joins a folder and a name; returns `name` itself if it is absolute or remote."""
    if is_remote(name) or os.path.isabs(name) or not folder:
        return name
    return f"{folder.rstrip('/')}/{name}"


def parent(path: str) -> str:
    return path.rpartition("/")[0] if is_remote(path) else os.path.dirname(path)


def expand(patterns: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    """Expands paths to files, sorted within each path.

    `*` matches anything in a name. A folder stands for its files that end in one of `suffixes`.

    Raises:
        UserError: a path matches nothing, or its folder has compressed files.
    """
    files = []
    for pattern in patterns:
        paths = matches(pattern, suffixes)
        _check_packed(pattern, paths, tuple(suffixes))
        if not paths:
            others = [] if "*" in pattern else names(pattern)
            beside = f" (it has {', '.join(others[:3])}{', ...' * (len(others) > 3)})" * bool(
                others
            )
            raise UserError(
                f"nothing is at {pattern}: no file that ends in {', '.join(suffixes)}{beside}"
            )
        files += paths
    if not files:
        raise UserError("no paths are given")
    return files


def matches(pattern: str, suffixes: Sequence[str]) -> list[str]:
    """Returns the files that a path matches (see `expand`), and the folders that `*` matches."""
    return _retried(pattern, lambda: _expand(pattern, tuple(suffixes)))


def user_cache() -> Path:
    """Returns the user's own folder for what is derived from remote files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emu_jax"


def is_dir(path: str) -> bool:
    """Returns whether a path is a folder, or a prefix of remote files."""
    if not is_remote(path):
        return os.path.isdir(path)
    fs, inner = _file_system(path)
    return _retried(path, lambda: fs.isdir(inner))


def _expand(pattern: str, suffixes: tuple[str, ...]) -> list[str]:
    if is_remote(pattern):
        fs, inner = _file_system(pattern)
        if fs.isdir(inner):
            files = [p for p in fs.ls(inner, detail=False) if p.endswith(suffixes)]
        elif fs.exists(inner):
            files = [inner]
        else:
            files = (fs.glob(_literal(inner)) or fs.glob(inner)) if "*" in inner else []
        return sorted(fs.unstrip_protocol(name) for name in files)
    if os.path.isdir(pattern):
        return sorted(str(p) for p in Path(pattern).iterdir() if p.name.endswith(suffixes))
    if os.path.exists(pattern):
        return [pattern]
    return sorted(glob.glob(_literal(pattern)) or glob.glob(pattern)) if "*" in pattern else []


def _check_packed(folder: str, files: list[str], suffixes: tuple[str, ...]) -> None:
    """Refuses a folder whose compressed files would be silently skipped.

    Raises:
        UserError: a folder has compressed files of this kind, and no unpacked copy.
    """
    if "*" in folder or folder.endswith(suffixes):  # not a folder: saves a request to the store
        return
    known = {path.rpartition("/")[2] for path in files}
    for name in names(folder):
        plain = _PACKED.sub("", name).replace(".tgz", ".tar")
        if name not in known and plain != name and plain.endswith(suffixes) and plain not in known:
            raise UserError(f"{resolve(folder, name)} is compressed, which is not read: unpack it")


def _literal(pattern: str) -> str:
    """Returns a glob in which only `*` is special, since folders may be called `[v1]`."""
    return re.sub(r"[\[?]", r"[\g<0>]", pattern)


def stat(path: str) -> Stat:
    """Returns the size and modification stamp of a file.

    Raises:
        FileNotFoundError, PermissionError
        Unreadable: it is not a regular file.
        UserError: all attempts failed.
    """
    if not is_remote(path):
        status = _regular(path, os.stat(path))
        return Stat(status.st_size, str(status.st_mtime_ns))
    fs, inner = _file_system(path)
    return _stat_of(path, _retried(path, lambda: fs.info(inner)))


def stats(paths: Sequence[str]) -> list[Stat]:
    """Returns the size and modification stamp of each file.

    Many remote files of one folder are looked up in a listing of it, not with a request each.

    Raises:
        FileNotFoundError, PermissionError
        Unreadable: one is not a regular file.
        UserError: all attempts failed.
    """
    if not any(map(is_remote, paths)):
        return [stat(path) for path in paths]  # threads would take ten times as long
    with ThreadPoolExecutor(THREADS) as pool:
        listings = _listings(paths, pool)

        def look_up(path: str) -> Stat:
            return listings.get(parent(path), {}).get(os.path.basename(path)) or stat(path)

        return list(pool.map(look_up, paths))


def existing(paths: Sequence[str]) -> set[str]:
    """Returns the files that exist.

    Many remote files of one folder are looked up in a listing of it, not with a request each.

    Raises:
        UserError: all attempts failed.
    """
    if not any(map(is_remote, paths)):
        return set(filter(exists, paths))
    with ThreadPoolExecutor(THREADS) as pool:
        listings = _listings(paths, pool)

        def has_file(path: str) -> bool:
            listed = listings.get(parent(path))
            return exists(path) if listed is None else os.path.basename(path) in listed

        there = pool.map(has_file, paths)
        return {path for path, is_there in zip(paths, there, strict=True) if is_there}


def _listings(paths: Sequence[str], pool: ThreadPoolExecutor) -> dict[str, dict[str, Stat]]:
    """Lists the remote folders that hold many of the files: {folder: {name: size and stamp}}."""
    counts = collections.Counter(parent(path) for path in paths if is_remote(path))
    folders = [folder for folder, count in counts.items() if count >= _LISTED]
    return dict(zip(folders, pool.map(listing, folders), strict=True))


def listing(folder: str) -> dict[str, Stat]:
    """Lists the files of a remote folder, without those below it: {name: size and stamp}.

    A store sends a thousand names with one request. Returns {} if there is no such folder.

    Raises:
        UserError: all attempts failed, or the store denies it.
    """
    fs, inner = _file_system(folder)
    try:
        entries = _retried(folder, lambda: fs.ls(inner, detail=True), "list")
    except FileNotFoundError:
        return {}
    files = [info for info in entries if info["type"] == "file" and info["name"] != inner]
    return {os.path.basename(info["name"]): _stat_of(folder, info) for info in files}


class Listings:
    """Listings of remote folders, each made once, when a file in it is first looked up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folders: dict[str, Future[dict[str, Stat]]] = {}

    def stat(self, path: str) -> Stat:
        """Returns the size and modification stamp of a remote file.

        Raises:
            FileNotFoundError
            UserError: its folder cannot be listed.
        """
        folder, _, name = path.rpartition("/")
        with self._lock:
            first = folder not in self._folders
            names = self._folders.setdefault(folder, Future())
        if first:
            try:
                names.set_result(listing(folder))
            except BaseException as error:
                names.set_exception(error)
        try:
            return names.result()[name]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None


def _stat_of(path: str, info: dict[str, Any]) -> Stat:
    if info["type"] == "directory":
        raise Unreadable(path, "not a regular file", _KINDS[modes.S_IFDIR])
    keys = ("etag", "ETag", "generation", "mtime", "updated")
    return Stat(info["size"], "/".join(str(info[key]) for key in keys if key in info))


def exists(path: str) -> bool:
    try:
        stat(path)
    except _FINAL:
        return False
    except Unreadable:
        return True
    return True


def read(path: str, start: int = 0, size: int | None = None) -> bytes:
    """Reads `size` bytes from `start`, or up to the end of the file.

    Returns fewer bytes if the file ends first.

    Raises:
        FileNotFoundError, PermissionError
        Unreadable: it is not a regular file.
        UserError: all attempts failed; the message says why.
    """
    if is_remote(path):
        ahead = None if size is None else _ahead.take(path, start, size)
        return _request(path, start, size) if ahead is None else ahead
    if size is None:  # open it again: it may have been replaced since
        return _retried(path, lambda: _pread(_Open(path), start, None))
    return _retried(path, lambda: _pread(_open(path), start, size))


def read_part(path: str, start: int = 0, size: int | None = None) -> bytes:
    """Reads bytes of a file that holds documents, as `read` does.

    Raises:
        Unreadable: it is not a regular file.
        UserError: it is missing or cannot be read.
    """
    try:
        return read(path, start, size)
    except (FileNotFoundError, PermissionError) as error:
        reason = error.strerror or str(error) or repr(error)
        raise UserError(
            f"{path} cannot be read ({reason}): restore it, or allow reading it"
        ) from None


def _request(path: str, start: int, size: int | None) -> bytes:
    fs, inner = _file_system(path)
    end = None if size is None else start + size
    return _retried(path, lambda: fs.cat_file(inner, start=start or None, end=end))


def _start(span: Span) -> Future[bytes]:
    """Begins to read a range of a remote file. A failed request is not repeated.

    A store's client runs all requests on its event loop: a thread for each of them would cost as
    much processor time as the request.
    """
    fs, inner = _file_system(span.path)
    if not fs.async_impl:
        return _ahead_pool().submit(_request, *span)

    async def answer() -> bytes:
        async with _ahead_slots(fs.loop):
            return await fs._cat_file(inner, start=span.start, end=span.start + span.size)

    return asyncio.run_coroutine_threadsafe(answer(), fs.loop)


@functools.lru_cache(1)
def _ahead_slots(_: asyncio.AbstractEventLoop) -> asyncio.Semaphore:
    return asyncio.Semaphore(storage.IN_FLIGHT)


@functools.cache
def _ahead_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, "emu-jax-read")


_ahead = ReadAhead(_start)


def read_ahead(spans: Iterable[Span]) -> None:
    """Requests all byte ranges of remote files that a reader will `read` next, in about this
    order (see `ReadAhead.request`)."""
    _ahead.request(spans)


def read_whole(path: str | os.PathLike, most: int) -> bytes:
    """Reads a file of at most `most` bytes.

    Raises:
        OSError: it is missing, or cannot be read.
        Unreadable: it is not a regular file, or it is larger.
        UserError: all attempts failed; the message says why.
    """
    path = os.fspath(path)
    if (size := stat(path).size) > most:
        raise Unreadable(path, "file too large", f"{size:,} bytes, at most {most:,}")
    return read(path)


class RangeFile(io.RawIOBase):
    """A binary file over a byte range of a file, local or remote. It reads what is asked for.

    Reads of a store are buffered in blocks, and retried. Not safe for threads.

    Attributes:
        size: length of the range in bytes.

    Args:
        start, size: the range in bytes; by default up to the end of the file.

    Raises:
        FileNotFoundError, PermissionError
        Unreadable: it is not a regular file.
        UserError (also when read): all attempts failed; the message says why.
    """

    def __init__(self, path: str, start: int = 0, size: int | None = None) -> None:
        super().__init__()
        self.path, self._start, self._position = path, start, 0
        self.size = stat(path).size - start if size is None else size
        # Held open: the file may be replaced while it is read.
        self._local = None if is_remote(path) else _Open(path)
        self._block, self._block_start, self._ahead = b"", 0, _FIRST_BLOCK

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self.size)[whence]
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.size - self._position)
        content = self._read(left if size is None or size < 0 else min(size, left))
        self._position += len(content)
        return content

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def _read(self, size: int) -> bytes:
        if not size:
            return b""
        first = self._start + self._position
        if (local := self._local) is not None:
            return _retried(self.path, lambda: _pread(local, first, size))
        skip = first - self._block_start
        if skip < 0 or skip + size > len(self._block):
            sequential = 0 <= skip <= len(self._block)
            self._ahead = min(2 * self._ahead, _LAST_BLOCK) if sequential else _FIRST_BLOCK
            count = min(max(size, self._ahead), self._start + self.size - first)
            self._block, self._block_start, skip = read(self.path, first, count), first, 0
        return self._block[skip : skip + size]


@contextmanager
def writing_data_file(path: str) -> Iterator[Path]:
    """Yields a temporary local file that is moved to `path` on success.

    The write is atomic: `path` has the whole file or does not exist, even after a power cut.

    Raises:
        UserError: all attempts to upload it failed; the message says why.
    """
    if not is_remote(path):
        with storage.writing(Path(path), shared=True) as temporary:
            yield temporary
        return
    # `storage.writing` knows only the stores that checkpoints may be in.
    handle, name = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.")
    os.close(handle)
    try:
        yield Path(name)
        fs, inner = _file_system(path)
        _retried(path, lambda: fs.put_file(name, inner), "write")
    finally:
        Path(name).unlink(missing_ok=True)


def names(folder: str) -> list[str]:
    """Lists the names in a folder, sorted; empty if it does not exist."""
    if not is_remote(folder):
        return sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    fs, inner = _file_system(folder)
    paths = _retried(folder, lambda: fs.ls(inner, detail=False) if fs.exists(inner) else [])
    return sorted(os.path.basename(path) for path in paths)


def _pread(file: _Open, start: int, size: int | None) -> bytes:
    if size is None:  # up to the file's current end
        size = max(0, os.fstat(file.handle).st_size - start)
    content = os.pread(file.handle, size, start)
    while len(content) < size and (
        more := os.pread(file.handle, size - len(content), start + len(content))
    ):
        content += more  # one call reads at most 2 GiB
    return content


def _regular(path: str, status: os.stat_result) -> os.stat_result:
    if not modes.S_ISREG(status.st_mode):
        raise Unreadable(path, "not a regular file", _KINDS.get(modes.S_IFMT(status.st_mode), ""))
    return status


_KINDS = {
    modes.S_IFIFO: "a pipe",
    modes.S_IFSOCK: "a socket",
    modes.S_IFCHR: "a device",
    modes.S_IFBLK: "a device",
    modes.S_IFDIR: "a directory",
}


def refresh() -> None:
    """Closes the cached files. The next read opens a file again, which may have been replaced."""
    _open.cache_clear()


class _Open:
    """An open regular file, closed once neither the cache nor a reader holds it."""

    def __init__(self, path: str) -> None:
        _regular(path, os.stat(path))  # before opening it: opening a device may have an effect
        self.handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        _regular(path, os.fstat(self.handle))

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)


@functools.lru_cache(128)
def _open(path: str) -> _Open:
    return _Open(path)


@functools.lru_cache
def _file_system_of(protocol: str) -> Any:
    import fsspec

    if protocol in storage.SCHEMES:
        return storage.file_system(protocol)
    try:
        return fsspec.filesystem(protocol)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"cannot read {protocol}:// ({str(error).splitlines()[0]}): install its fsspec package"
        ) from None


def _file_system(path: str) -> tuple[Any, str]:
    fs = _file_system_of(path.partition("://")[0])
    return fs, fs._strip_protocol(path)


def _retried(path: str, call: Callable[[], T], what: str = "read") -> T:
    """Returns `call()`, retried with growing waits if it fails for a transient reason.

    Raises:
        FileNotFoundError, IsADirectoryError, NotADirectoryError
        PermissionError: of a local file.
        UserError: it failed for good.
    """
    if path.partition("://")[0] in storage.SCHEMES:
        try:
            return storage.retried(path, call, what)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise
        except OSError as error:  # the store's failure, which is not a file's
            raise UserError(f"cannot {what} {path}: {error.strerror}") from None
    attempt = 0
    while True:
        try:
            return call()
        except (*_FINAL, UserError):
            raise
        except Exception as error:  # remote file systems raise what their clients raise
            if attempt == ATTEMPTS - 1:
                raise UserError(
                    f"cannot {what} {path}, tried {ATTEMPTS} times: "
                    f"{str(error).splitlines()[0] if str(error) else repr(error)}"
                ) from error
            log.warning("cannot %s %s, trying again: %s", what, path, error)
            time.sleep(WAIT * 2**attempt)
            attempt += 1
