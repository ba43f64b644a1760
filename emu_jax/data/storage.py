"""Files by path, read at random and written whole: on a local disk, or wherever fsspec reaches
(`gs://`). Locally only regular files are read: a pipe would block, a device never ends.

fsspec rather than etils: its file systems read a range of bytes in one request, which is what
random access to a tar asks for. A read that fails is tried again, for a store that answers to
thousands of readers now and then refuses one.
"""

from __future__ import annotations

import functools
import glob
import logging
import os
import re
import stat as modes
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from emu_jax.config import UserError, sync

log = logging.getLogger(__name__)
T = TypeVar("T")

ATTEMPTS = 5
WAIT = 0.5  # seconds before the second attempt; each later wait is twice as long
_PACKED = re.compile(r"\.(gz|zst|bz2|xz|lz4|zip)$")
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


# What a document's files may hold, in bytes. A larger file is counted as damage: it would fill the
# memory of every thread that reads documents.
MOST_IMAGE = 1 << 30
MOST_VIDEO = 1 << 33
MOST_TEXT = 1 << 26  # captions, subtitles
MOST_ENTRY = 1 << 28  # of a listing; it may hold images


class Unreadable(UserError):
    """A path that must not be read.

    Attributes:
        reason: "not a regular file" or "file too large", as in `documents.REASONS`.
    """

    def __init__(self, path: str, reason: str, detail: str):
        super().__init__(f"{path}: {reason} ({detail})")
        self.reason, self.detail = reason, detail


class Stat(NamedTuple):
    """What a file that stays as it is keeps."""

    size: int
    stamp: str  # of its last change


def is_remote(path: str) -> bool:
    return "://" in path


def join(folder: str, name: str) -> str:
    """`name` in `folder`, unless it is a whole path itself."""
    if is_remote(name) or os.path.isabs(name) or not folder:
        return name
    return f"{folder.rstrip('/')}/{name}"


def parent(path: str) -> str:
    return path.rpartition("/")[0] if is_remote(path) else os.path.dirname(path)


def expand(patterns: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    """The files that some paths name, sorted within each: `*` stands for anything in a name,
    a folder for its files that end in one of `suffixes`.

    Raises:
        UserError: one of them names nothing.
    """
    found = []
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
        found += paths
    if not found:
        raise UserError("no paths are given")
    return found


def matches(pattern: str, suffixes: Sequence[str]) -> list[str]:
    """The files that a path names, as `expand`; and the folders, where `*` stands for them."""
    return _patiently(pattern, lambda: _expand(pattern, tuple(suffixes)))


def is_dir(path: str) -> bool:
    """Whether a path is a folder, or begins the names of remote files."""
    if not is_remote(path):
        return os.path.isdir(path)
    fs, inner = _file_system(path)
    return _patiently(path, lambda: fs.isdir(inner))


def _expand(pattern: str, suffixes: tuple[str, ...]) -> list[str]:
    if is_remote(pattern):
        fs, inner = _file_system(pattern)
        if fs.isdir(inner):
            found = [p for p in fs.ls(inner, detail=False) if p.endswith(suffixes)]
        elif fs.exists(inner):
            found = [inner]
        else:
            found = (fs.glob(_literal(inner)) or fs.glob(inner)) if "*" in inner else []
        return sorted(fs.unstrip_protocol(name) for name in found)
    if os.path.isdir(pattern):
        return sorted(str(p) for p in Path(pattern).iterdir() if p.name.endswith(suffixes))
    if os.path.exists(pattern):
        return [pattern]
    return sorted(glob.glob(_literal(pattern)) or glob.glob(pattern)) if "*" in pattern else []


def _check_packed(folder: str, found: list[str], suffixes: tuple[str, ...]) -> None:
    """
    Raises:
        UserError: a folder has compressed files of this kind, which would be passed over.
    """
    if "*" in folder or folder.endswith(suffixes):  # no folder: a store is not asked again
        return
    known = {path.rpartition("/")[2] for path in found}
    for name in names(folder):
        plain = _PACKED.sub("", name).replace(".tgz", ".tar")
        if name not in known and plain != name and plain.endswith(suffixes) and plain not in known:
            raise UserError(f"{join(folder, name)} is compressed, which is not read: unpack it")


def _literal(pattern: str) -> str:
    """A glob in which only `*` is special: folders may be called `[v1]`."""
    return re.sub(r"[\[?]", r"[\g<0>]", pattern)


def stat(path: str) -> Stat:
    """
    Raises:
        FileNotFoundError, PermissionError
        Unreadable: it is not a regular file.
        UserError: it could not be asked, however often.
    """
    if not is_remote(path):
        found = _regular(path, os.stat(path))
        return Stat(found.st_size, str(found.st_mtime_ns))
    fs, inner = _file_system(path)
    info = _patiently(path, lambda: fs.info(inner))
    known = [str(info[k]) for k in ("etag", "generation", "mtime", "updated") if k in info]
    return Stat(info["size"], "/".join(known))


def exists(path: str) -> bool:
    try:
        stat(path)
    except _FINAL:
        return False
    except Unreadable:
        return True
    return True


def read(path: str, start: int = 0, size: int | None = None) -> bytes:
    """`size` bytes from `start`; to the end by default, and fewer where the file ends.

    Raises:
        FileNotFoundError, PermissionError
        Unreadable: it is not a regular file.
        UserError: it could not be read, however often; the line says why.
    """
    if is_remote(path):
        fs, inner = _file_system(path)
        end = None if size is None else start + size
        return _patiently(path, lambda: fs.cat_file(inner, start=start or None, end=end))
    if size is None:  # it may have been replaced since it was opened last
        return _patiently(path, lambda: _pread(_Open(path), start, None))
    return _patiently(path, lambda: _pread(_open(path), start, size))


def read_whole(path: str | os.PathLike, most: int) -> bytes:
    """Reads a file of at most `most` bytes.

    Raises:
        OSError: it is missing, or cannot be read.
        Unreadable: it is not a regular file, or it is larger.
        UserError: it could not be read, however often; the line says why.
    """
    path = os.fspath(path)
    if (size := stat(path).size) > most:
        raise Unreadable(path, "file too large", f"{size:,} bytes, at most {most:,}")
    return read(path)


@contextmanager
def writing(path: str) -> Iterator[Path]:
    """A local file to fill, which then appears at `path`: whole, or not at all, even if the
    machine loses power.

    Raises:
        UserError: it could not be sent, however often; the line says why.
    """
    remote = is_remote(path)
    folder = None if remote else os.path.dirname(path)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{os.path.basename(path)}.")
    os.close(handle)
    try:
        yield Path(temporary)
        if remote:
            fs, inner = _file_system(path)
            _patiently(path, lambda: fs.put_file(temporary, inner), "write")
        else:
            os.chmod(temporary, 0o644)  # mkstemp makes it private
            publish(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def publish(temporary: str | os.PathLike, path: str | os.PathLike) -> None:
    """Gives a local file, which is whole, its name, so that this outlives a power cut."""
    sync(temporary)
    os.replace(temporary, path)
    sync(os.path.dirname(path) or ".")


def names(folder: str) -> list[str]:
    """What is in a folder; nothing if there is none."""
    if not is_remote(folder):
        return sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    fs, inner = _file_system(folder)
    found = _patiently(folder, lambda: fs.ls(inner, detail=False) if fs.exists(inner) else [])
    return sorted(os.path.basename(name) for name in found)


def _pread(file: _Open, start: int, size: int | None) -> bytes:
    if size is None:  # no further than it reached when it was opened
        size = max(0, os.fstat(file.handle).st_size - start)
    content = os.pread(file.handle, size, start)
    while len(content) < size and (more := os.pread(file.handle, size - len(content),
                                                    start + len(content))):  # fmt: skip
        content += more  # one call gives at most 2 GiB
    return content


def _regular(path: str, found: os.stat_result) -> os.stat_result:
    if not modes.S_ISREG(found.st_mode):
        raise Unreadable(path, "not a regular file", _KINDS.get(modes.S_IFMT(found.st_mode), ""))
    return found


_KINDS = {
    modes.S_IFIFO: "a pipe", modes.S_IFSOCK: "a socket", modes.S_IFCHR: "a device",
    modes.S_IFBLK: "a device", modes.S_IFDIR: "a directory",
}  # fmt: skip


def refresh() -> None:
    """Forgets which files are open: one that was replaced since is opened anew."""
    _open.cache_clear()


class _Open:
    """An open regular file, closed once neither the cache nor a reader holds it."""

    def __init__(self, path: str):
        _regular(path, os.stat(path))  # opening a device may already do something
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

    try:
        return fsspec.filesystem(protocol)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"cannot read {protocol}:// ({str(error).splitlines()[0]}): for gs:// install "
            "emu_jax[gcs]"
        ) from None


def _file_system(path: str) -> tuple[Any, str]:
    fs = _file_system_of(path.partition("://")[0])
    return fs, fs._strip_protocol(path)


def _patiently(path: str, call: Callable[[], T], what: str = "read") -> T:
    """`call()`, again and again when it fails for a reason that may pass."""
    for attempt in range(ATTEMPTS):
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
    raise AssertionError("unreachable")
