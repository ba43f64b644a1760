"""Paths, local and in object stores: atomic writes, listing, retries.

A local path is a `pathlib.Path`. A URL (`gs://bucket/run`, `s3://bucket/run`) is a `StorePath`, a
`pathlib.Path` whose methods send requests to the store. `as_path` makes either from text. All code
takes `Path`, and calls the functions below where the two differ:

    local                                   object store
    a file appears by an atomic rename      an object appears whole, by a single upload
    files are synced to disk                uploaded objects are durable
    folders exist by themselves             folders are the prefixes of objects
    files can be appended to                objects cannot

Every request is retried for `RETRY_SECONDS` if it may succeed later. Otherwise it raises the
OSError that a local file would raise.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fnmatch
import functools
import importlib.util
import io
import itertools
import json
import logging
import os
import posixpath
import random
import secrets
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any, Self, TypeVar

from .errors import UserError

# The extra of emu_jax that each scheme needs, and its file system's package.
SCHEMES = {"gs": ("gcs", "gcsfs"), "s3": ("s3", "s3fs")}
RETRY_SECONDS = 120.0  # how long a request is retried while the store fails or refuses it
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0  # seconds between attempts, doubled each time
IN_FLIGHT = 64  # requests of a process to a store at the same time, of those that read ahead
TRANSFERS = 16  # concurrent uploads or downloads of a folder's files
READ_BYTES = 1 << 22  # read from an object at once
LOG_BYTES = 1 << 22  # of a log's objects; the last one is uploaded by every sync

# etils would import TensorFlow, if it is installed, for the same requests.
os.environ.setdefault("EPATH_USE_TF", "false")

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class StorePath(PosixPath):
    """A path in an object store. `str` and `os.fspath` return its URL.

    Folders are prefixes: one exists as long as an object is in it, and `mkdir` does nothing. What
    no store offers (renaming, appending, permissions) raises OSError.
    """

    def __str__(self) -> str:
        scheme, _, rest = super().__str__().partition(":")
        return f"{scheme}://{rest.lstrip('/')}"

    def __fspath__(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"StorePath({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return StorePath, (str(self),)

    def __truediv__(self, other: str | os.PathLike[str]) -> Self:
        text = os.fspath(other)
        if "://" in text or text.startswith("/"):
            raise ValueError(f"{text} is absolute: use storage.join")
        return super().__truediv__(other)

    def as_posix(self) -> str:
        return str(self)

    def as_uri(self) -> str:
        return str(self)

    def is_absolute(self) -> bool:
        return True

    def absolute(self) -> Self:
        return self

    def expanduser(self) -> Self:
        return self

    def resolve(self, strict: bool = False) -> Self:
        return type(self)(_normalized(str(self)))

    @property
    def parent(self) -> Self:
        return self if len(self.parts) <= 2 else type(self)(*self.parts[:-1])

    def relative_to(self, *other: str | os.PathLike[str]) -> PurePosixPath:  # pyright: ignore[reportIncompatibleMethodOverride]
        root = PurePosixPath(*type(self)(*other).parts)
        return PurePosixPath(*self.parts).relative_to(root)

    def is_relative_to(self, *other: str | os.PathLike[str]) -> bool:
        try:
            self.relative_to(*other)
        except ValueError:
            return False
        return True

    def info(self) -> dict[str, Any]:
        """Returns fsspec's description of the object or folder: size, type and more.

        Raises:
            FileNotFoundError: nothing has this name.
        """
        return _request(self, lambda fs, key: fs.info(key))

    def exists(self, **_: object) -> bool:
        try:
            self.info()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self, **_: object) -> bool:
        try:
            return self.info()["type"] == "directory"
        except FileNotFoundError:
            return False

    def is_file(self, **_: object) -> bool:
        try:
            return self.info()["type"] == "file"
        except FileNotFoundError:
            return False

    def is_symlink(self) -> bool:
        return False

    def stat(self, **_: object) -> os.stat_result:
        info = self.info()
        mode = stat.S_IFDIR if info["type"] == "directory" else stat.S_IFREG
        modified = info.get("mtime") or info.get("LastModified")
        seconds = modified.timestamp() if modified else 0.0
        return os.stat_result((mode, 0, 0, 1, 0, 0, info["size"], seconds, seconds, seconds))

    def iterdir(self) -> Iterator[Self]:
        yield from (self / name for name in self._names())

    def glob(self, pattern: str, **_: object) -> Iterator[Self]:
        """Yields the paths that match. `*` matches within a name; `**` is not supported."""
        head, slash, rest = pattern.partition("/")
        if head == "**":
            raise NotImplementedError("a store is not searched for **: use storage.files")
        if not any(c in head for c in "*?["):
            path = self / head
            if rest:
                yield from path.glob(rest)
            elif path.exists():
                yield path
            return
        try:
            names = self._names()
        except (FileNotFoundError, NotADirectoryError):
            return
        for name, is_dir in names.items():
            if fnmatch.fnmatchcase(name, head):
                if not rest:
                    yield self / name
                elif is_dir:
                    yield from (self / name).glob(rest)

    def rglob(self, pattern: str, **_: object) -> Iterator[Self]:
        raise NotImplementedError("a store is not searched for **: use storage.files")

    def _names(self) -> dict[str, bool]:
        """Lists the folder, in one request per thousand names: {name: whether it is a folder}."""
        key = _key(self)

        def keep(entry: dict[str, Any]) -> bool:  # a folder may be an object of its own name
            return entry["name"].rstrip("/") != key

        entries = _request(self, lambda fs, key: fs.ls(key, detail=True))
        if not any(map(keep, entries)) and any(e["type"] == "file" for e in entries):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self))
        return {
            posixpath.basename(entry["name"].rstrip("/")): entry["type"] == "directory"
            for entry in entries
            if keep(entry)
        }

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        if not exist_ok and self.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self))

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            _request(self, lambda fs, key: fs.rm_file(key), "delete")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rename(self, target: str | os.PathLike[str]) -> Self:
        raise OSError(errno.ENOTSUP, "objects cannot be renamed", str(self))

    replace = rename

    def read_bytes(self) -> bytes:
        return _request(self, lambda fs, key: fs.cat_file(key))

    def read_text(self, encoding: str | None = None, errors: str | None = None, *_: object) -> str:
        content = io.BytesIO(self.read_bytes())
        return io.TextIOWrapper(content, encoding or "utf-8", errors).read()

    def write_bytes(self, data: Any) -> int:
        """Uploads a whole object, which replaces the old one only when it is complete."""
        _request(self, lambda fs, key: fs.pipe_file(key, bytes(data)), "write")
        return len(data)

    def write_text(
        self,
        data: str,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def open(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> Any:
        """Opens an object for reading. It is read in ranges of `READ_BYTES`.

        Raises:
            OSError: the mode is not "r" or "rb". Use `writing`.
        """
        if mode.replace("b", "").replace("t", "") != "r":
            raise OSError(errno.ENOTSUP, f"objects cannot be opened with mode {mode!r}", str(self))
        file = io.BufferedReader(_Object(self), READ_BYTES)
        return file if "b" in mode else io.TextIOWrapper(file, encoding or "utf-8", errors, newline)


class _Object(io.RawIOBase):
    """The bytes of an object, read in ranges."""

    def __init__(self, path: StorePath) -> None:
        self._path, self._size, self._position = path, path.stat().st_size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        start, end = self._position, min(self._position + len(buffer), self._size)
        if start >= end:
            return 0
        content = _request(self._path, lambda fs, key: fs.cat_file(key, start=start, end=end))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


def as_path(path: str | os.PathLike[str]) -> Path:
    """Returns a local path, or the path in an object store that a URL names.

    Raises:
        UserError: the URL's scheme is not supported, or it names no bucket.
    """
    if isinstance(path, StorePath):
        return path
    text = os.fspath(path)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(path)
    if scheme not in SCHEMES:
        hint = ""
        if scheme == "hf":
            hint = f"read it with emu-jax convert {text} DST, write it with emu-jax push, or "
        elif rest.startswith("huggingface.co/"):
            hint = f"write hf://{'/'.join(rest.split('/')[1:3])}, or "
        raise UserError(
            f"{scheme}:// is not supported ({text}): {hint}use a local path, "
            f"{' or '.join(f'{name}://' for name in SCHEMES)}"
        )
    if not rest.strip("/"):
        raise UserError(f"{text} names no bucket: write {scheme}://BUCKET/PATH")
    return StorePath(_normalized(text))


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is in an object store."""
    return "://" in os.fspath(path)


def join(folder: Path, path: str | os.PathLike[str]) -> Path:
    """Returns `path` relative to `folder`, or itself if it is absolute or a URL. Resolves `..`."""
    text = os.fspath(path)
    if not is_remote(text) and not os.path.isabs(text):
        text = f"{folder}/{text}"
    return as_path(_normalized(text))


def relative(path: Path, folder: Path) -> str:
    """Returns how `folder` refers to `path`, for `join`: relative in one store, else absolute."""
    if not is_remote(path) and not is_remote(folder):
        return os.path.relpath(path, folder)
    if path.parts[:2] != folder.parts[:2]:  # scheme and bucket
        return str(path.absolute())
    return posixpath.relpath("/".join(path.parts), "/".join(folder.parts))


def _normalized(text: str) -> str:
    scheme, separator, rest = text.partition("://")
    if not separator:
        return os.path.normpath(text)
    return f"{scheme}://{posixpath.normpath('/' + rest).lstrip('/')}"


def _key(path: StorePath) -> str:
    return "/".join(path.parts[1:])


@functools.cache
def file_system(scheme: str) -> Any:
    """Returns the fsspec file system of a scheme, which caches no listings.

    Raises:
        UserError: its package is not installed, or it finds no credentials.
    """
    import fsspec
    import fsspec.config

    extra, package = SCHEMES[scheme]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{scheme}:// needs {package}: pip install 'emu_jax[{extra}]'")
    # Other writers' objects must be seen. Orbax opens the same file systems through etils.
    for name in (scheme, extra):
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    if scheme == "s3":  # its client has 10 connections by default
        pool = {"max_pool_connections": IN_FLIGHT + TRANSFERS}
        fsspec.config.conf["s3"].setdefault("config_kwargs", pool)
    # It logs a traceback before it raises an error that is reported in one line.
    logging.getLogger(package).setLevel(logging.CRITICAL)
    return fsspec.filesystem(scheme)


def _request(path: StorePath, call: Callable[[Any, str], _T], action: str = "read") -> _T:
    """Returns `call(file system, bucket/key)`, retried (see `retried`)."""
    return retried(
        str(path), lambda: call(file_system(path.parts[0].rstrip(":")), _key(path)), action
    )


def retried(path: str, call: Callable[[], _T], action: str = "read") -> _T:
    """Returns `call()`, a request to a store, retried with growing waits.

    Raises:
        OSError: it failed for good, with the error number and file name of a local failure.
        UserError: the scheme's package is not installed.
    """
    end, wait = time.monotonic() + RETRY_SECONDS, FIRST_WAIT
    while True:
        try:
            return call()
        except UserError:
            raise
        except Exception as error:  # the clients raise errors of many libraries
            if final := _final(error, path, action):
                raise final from None
            reason = " ".join((str(error) or repr(error)).split())[:300]
            if time.monotonic() + wait > end:
                text = f"cannot {action} it, retried for {RETRY_SECONDS:.0f} s ({reason})"
                raise OSError(errno.EIO, text, path) from None
            _log.info("cannot %s %s, retrying: %s", action, path, reason)
        time.sleep(wait * random.uniform(0.5, 1))
        wait = min(2 * wait, LONGEST_WAIT)


def _final(error: Exception, path: str, action: str) -> OSError | None:
    """Returns the OSError to raise for an error that no retry mends, or None."""
    text = str(error)
    code = str(getattr(error, "code", "")) or getattr(error, "errno", None)
    if isinstance(error, FileNotFoundError):
        number, why = errno.ENOENT, os.strerror(errno.ENOENT)
        if action == "write":
            why = f"no such bucket: create {'/'.join(path.split('/')[:3])}"
    elif isinstance(error, FileExistsError) or code == errno.EINVAL:
        number, why = errno.EEXIST, os.strerror(errno.EEXIST)
    elif isinstance(error, IsADirectoryError | NotADirectoryError):
        number, why = error.errno or errno.EISDIR, error.strerror or text
    elif (
        isinstance(error, PermissionError)
        or text.startswith("Forbidden")
        or code in ("401", "403")
        or type(error).__name__ in ("DefaultCredentialsError", "NoCredentialsError")
    ):
        number = errno.EACCES
        why = f"no permission to {action} it: grant this account access to the bucket, or log in"
    elif isinstance(error, TypeError | ValueError | NotImplementedError):
        number, why = errno.EINVAL, " ".join(text.split())[:300]
    else:
        return None
    return OSError(number, why, path)  # of the class that the number stands for


def files(folder: Path) -> list[Path]:
    """Returns all files below a folder, in no particular order. [] if it does not exist."""
    if not isinstance(folder, StorePath):
        return [p for p in folder.rglob("*") if p.is_file()]
    found = _request(folder, lambda fs, key: fs.find(key))
    inside = _key(folder) + "/"
    return [folder / name.removeprefix(inside) for name in found if name.startswith(inside)]


def folders(folder: Path) -> list[str]:
    """Returns the names of the folders in a folder, in no particular order.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
    """
    if isinstance(folder, StorePath):
        return [name for name, is_dir in folder._names().items() if is_dir]
    return [p.name for p in folder.iterdir() if p.is_dir()]


def remove(path: Path) -> None:
    """Removes a file, or a folder with all that is in it, if it exists."""
    if not isinstance(path, StorePath):
        _remove(path)
        return
    with contextlib.suppress(FileNotFoundError):
        _request(path, lambda fs, key: fs.rm(key, recursive=True), "delete")


def upload(source: Path, target: StorePath) -> None:
    """Uploads a local file, or the files of a folder. Each object appears whole."""
    if source.is_file():
        _request(target, lambda fs, key: fs.put_file(str(source), key), "write")
        return
    with ThreadPoolExecutor(TRANSFERS) as workers:
        paths = [p for p in sorted(source.rglob("*")) if p.is_file()]
        list(workers.map(lambda p: upload(p, target / p.relative_to(source)), paths))


def download(source: StorePath, target: Path) -> None:
    """Downloads an object, or all objects of a folder, to a local path.

    Raises:
        FileNotFoundError: nothing has this name.
    """
    if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        _request(source, lambda fs, key: fs.get_file(key, str(target)))
        return
    paths = files(source)
    if not paths:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source))
    for path in paths:
        (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)

    def fetch(path: Path) -> None:
        local = str(target / path.relative_to(source))
        _request(StorePath(path), lambda fs, key: fs.get_file(key, local))

    with ThreadPoolExecutor(TRANSFERS) as workers:
        list(workers.map(fetch, paths))


@contextlib.contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """Yields a local path with the content of a file or folder, not to be changed.

    A local path is yielded as it is. Nothing is there if nothing is at `path`.
    """
    if not isinstance(path, StorePath):
        yield path
        return
    with tempfile.TemporaryDirectory() as holder:
        copy = Path(holder) / path.name
        with contextlib.suppress(FileNotFoundError):
            download(path, copy)
        yield copy


@functools.cache
def fetched(path: Path) -> Path:
    """Returns a local path with the content of a file or folder, not to be changed.

    What is in a store is downloaded once, and deleted when the process ends.

    Raises:
        FileNotFoundError: nothing is at `path` in the store.
    """
    if not isinstance(path, StorePath):
        return path
    holder = Path(tempfile.mkdtemp(prefix="emu-jax-"))
    atexit.register(shutil.rmtree, holder, ignore_errors=True)
    download(path, holder / path.name)
    return holder / path.name


def create_text(path: Path, text: str) -> None:
    """Writes a new file.

    Raises:
        FileExistsError: the file exists, also if another process creates it at the same time.
    """
    if isinstance(path, StorePath):
        data = text.encode()
        _request(path, lambda fs, key: fs.pipe_file(key, data, mode="create"), "write")
        return
    with path.open("x", encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:  # not half a file
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            raise


class LocalLog:
    """Appends text to a local file. Each text is written at once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()

    def sync(self) -> None:
        """Waits until everything is on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class StoreLog:
    """Appends text to a file in an object store, which is a series of objects.

    The last one is uploaded again by every `sync` until it holds `LOG_BYTES`, then the next one
    begins: PATH, PATH.1, PATH.2, ... A text is never split. `read_log` joins the objects.
    """

    def __init__(self, path: StorePath) -> None:
        parts = log_parts(path)
        self._path, self._number = path, max(0, len(parts) - 1)
        self._text = bytearray(parts[-1].read_bytes() if parts else b"")
        self._is_synced = True

    def write(self, text: str) -> None:
        if len(self._text) >= LOG_BYTES:
            self.sync()
            self._number, self._text = self._number + 1, bytearray()
        self._text += text.encode()
        self._is_synced = False

    def sync(self) -> None:
        """Uploads what has been written since the last call, in at most one request."""
        if not self._is_synced:
            _log_part(self._path, self._number).write_bytes(self._text)
            self._is_synced = True

    def close(self) -> None:
        self.sync()


def open_log(path: Path) -> LocalLog | StoreLog:
    """Opens a text file to append to. `sync` makes what was written durable."""
    return StoreLog(path) if isinstance(path, StorePath) else LocalLog(path)


def log_parts(path: Path) -> list[Path]:
    """Returns the files that together hold what `open_log` appended to `path`, in order.

    Each begins and ends between two texts. [] if nothing has been written.
    """
    if not isinstance(path, StorePath):
        return [path] if path.exists() else []
    try:
        names = path.parent._names()
    except FileNotFoundError:
        return []
    parts = itertools.takewhile(
        lambda part: part.name in names, (_log_part(path, n) for n in itertools.count())
    )
    return list(parts)


def _log_part(path: StorePath, number: int) -> StorePath:
    return path.with_name(f"{path.name}.{number}") if number else path


def read_log(path: Path) -> bytes:
    """Reads all that `open_log` appended to `path`.

    Raises:
        FileNotFoundError: nothing has been written.
    """
    return b"".join(part.read_bytes() for part in log_parts(path) or [path])


class Mirror:
    """A local folder for libraries that write local files, copied to `folder` by `sync`.

    Attributes:
        local: the local folder; `folder` itself if that is local.
    """

    def __init__(self, folder: Path) -> None:
        self.local, self._folder = folder, folder
        self._uploaded: dict[Path, tuple[int, int]] = {}  # size and time of modification
        if isinstance(folder, StorePath):
            self.local = Path(tempfile.mkdtemp(prefix="emu-jax-"))
            weakref.finalize(self, shutil.rmtree, self.local, ignore_errors=True)

    def sync(self) -> None:
        """Uploads the files that have changed since the last call."""
        if not isinstance(self._folder, StorePath):
            return
        for path in files(self.local):
            found = path.stat()
            version = found.st_size, found.st_mtime_ns
            if self._uploaded.get(path) != version:
                upload(path, self._folder / path.relative_to(self.local))
                self._uploaded[path] = version


def kvstore(path: Path) -> dict[str, Any]:
    """Returns the specification of a tensorstore key-value store of the files in a folder."""
    if not isinstance(path, StorePath):
        return {"driver": "file", "path": f"{path.absolute()}/"}
    scheme, bucket, *folder = path.parts
    spec = {"bucket": bucket, "path": "".join(f"{name}/" for name in folder)}
    if scheme == "gs:":
        return {"driver": "gcs"} | spec
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        spec |= {"endpoint": endpoint, "aws_region": region}
    return {"driver": "s3"} | spec


def shipped(folder: str) -> Path:
    """Returns a top-level folder of the repository (configs, benchmarks), or its copy in the wheel.

    Raises:
        UserError: the folder is missing.
    """
    package = Path(__file__).parent
    checkout = (package.parent / "pyproject.toml").is_file()
    path = (package.parent if checkout else package) / folder
    if not path.is_dir():
        raise UserError(f"{path} is missing: reinstall emu_jax, or run it from a clone")
    return path


def refuse_stand_in(path: Path) -> None:
    """Checks that a file is not a stand-in for the intended one.

    Raises:
        UserError: the file is a Git LFS pointer, a web page, or compressed.
    """
    try:
        with path.open("rb") as f:
            start = f.read(64)
    except OSError:
        return  # the code that reads the file reports it
    for known, what in (
        (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run git lfs pull"),
        (b"<!doctype html", "a web page, not the file itself: download it again"),
        (b"<html", "a web page, not the file itself: download it again"),
        (b"\x1f\x8b", "compressed with gzip: unpack it"),
        (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it"),
        (b"\xfd7zXZ", "compressed with xz: unpack it"),
    ):
        if start.lstrip().lower().startswith(known.lower()):
            raise UserError(f"{path} is {what}")


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object, with or without a byte order mark.

    Raises:
        UserError: the file is missing, is not JSON, or does not hold an object.
    """
    refuse_stand_in(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values


@contextlib.contextmanager
def writing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yields a path for a temporary file or directory, which replaces `path` on success.

    The write is atomic and durable: `path` has the whole new content or is as before, even after
    a power cut. For a store the temporary file is local and uploaded at the end; a folder's objects
    then appear one by one.

    Args:
        shared: whether several processes may write `path` at once. Each then has a temporary name
            of its own. Otherwise there is one name, and what a killed process left is overwritten.
    """
    if isinstance(path, StorePath):
        with tempfile.TemporaryDirectory() as holder:
            yield (temporary := Path(holder) / path.name)
            upload(temporary, path)
        return
    temporary = temporary_path(path, shared=shared)
    _remove(temporary)
    try:
        yield temporary
        publish(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            _remove(temporary)
        raise


def temporary_path(path: Path, *, shared: bool = False) -> Path:
    """Returns the temporary name beside `path` (see `writing`)."""
    token = f".{secrets.token_hex(4)}" if shared else ""
    return path.with_name(f".{path.name}{token}.tmp")


def publish(temporary: Path, path: Path) -> None:
    """Renames a finished file or directory to `path` durably."""
    sync_tree(temporary)
    temporary.rename(path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a whole file atomically and durably."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: str | os.PathLike) -> None:
    """Waits until a local file's content, or a directory's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems cannot sync directories
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_tree(path: Path) -> None:
    """Waits until a local file, or everything in a directory, is on disk."""
    if not path.is_dir():
        sync(path)
    for folder, _, names in os.walk(path):
        for name in names:
            sync(os.path.join(folder, name))
        sync(folder)
