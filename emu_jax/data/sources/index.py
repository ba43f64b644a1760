"""Memory-mapped arrays that are derived from files once and cached beside them.

An index of a billion documents takes tens of gigabytes on disk. Opening it is cheap, and only the
values that are looked up are read.

    FOLDER/NAME/KEY.npy        an array
    FOLDER/NAME/KEY.crc        CRC-32 of each block of that file, uint32
    FOLDER/NAME/arrays.json    each array's length in bytes and the CRC-32 of its .crc

A folder is synced to disk before it is renamed to its final name. A file that is missing,
truncated or changed is detected before any of its values is used: arrays of up to `EAGER` bytes
are checked when they are opened, larger ones block by block at the first look-up.

FOLDER may be in an object store. Then one process makes the arrays and uploads them. The other
hosts wait for them. `FOLDER/NAME.claim` says that a process is at work, which keeps changing it.

Each host has a copy of the arrays that it opened. It fetches small arrays whole. Of larger ones it
fetches the blocks that are looked up, and the others in the background. A copy is a sparse file: a
block whose CRC-32 is not the expected one has not been fetched.
"""

from __future__ import annotations

import bisect
import contextvars
import fcntl
import functools
import io
import itertools
import json
import logging
import math
import mmap
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import numpy as np
from jaxtyping import Int, UInt32

from emu_jax.data import storage
from emu_jax.data.documents import short_hash
from emu_jax.data.read_ahead import GAP_BYTES, Span
from emu_jax.data.unused import Tally
from emu_jax.errors import UserError
from emu_jax.storage import StorePath, as_path, create_text, download, remove, sync, upload

log = logging.getLogger(__name__)
Arrays = dict[str, np.ndarray]

EAGER = 1 << 27  # bytes; checking so much takes a moment
MOST_FOLDERS = 256  # of the index of one source
QUICK_FILES = 64  # in a folder, at least, of those that take a moment to scan
RENEW_SECONDS = 30.0  # between changes of a claim
STALE_SECONDS = 300.0  # a claim that does not change for so long is of a process that has ended
POLL_SECONDS = 5.0  # between looks for arrays that another process makes
SWEEP_SECONDS = 3600.0  # a temporary folder without an owner is removed when it is this old
_BLOCK = 1 << 14
_NEAR = GAP_BYTES // _BLOCK  # blocks that take one request with those between them
_FETCH_BYTES = 1 << 22  # that are fetched together in the background
_REST_SECONDS = 60.0  # until then the first batches have what they look up
_LISTING, _VERSION = "arrays.json", 1
_INTEGERS = (int, np.integer)
# Exceptions raised by reading a damaged folder.
_BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError)
_indexing = ContextVar("indexing", default=True)


class NotIndexed(Exception):
    """Raised in `without_indexing` for arrays that are not cached yet."""


@contextmanager
def without_indexing() -> Iterator[None]:
    """Context in which sources open cached arrays and write nothing: `cached_arrays` raises
    `NotIndexed` for arrays that it would have to make. Holds for the calling thread."""
    token = _indexing.set(False)
    try:
        yield
    finally:
        _indexing.reset(token)


def indexing() -> bool:
    """Returns whether derived arrays may be made, written and removed."""
    return _indexing.get()


def folder_for(path: str, cache: str) -> Path:
    """Returns the cache folder for data derived from a file: `cache` if given, otherwise
    `.emu_jax` beside the file, or the user's own cache if the file is remote."""
    if cache:
        return as_path(cache)
    if storage.is_remote(path):
        return storage.user_cache()
    return Path(path).parent / ".emu_jax"


def cached_arrays(
    folder: Path,
    name: str,
    make: Callable[[], Arrays],
    eager: int | None = None,
    keys: Collection[str] | None = None,
) -> Arrays:
    """Loads the arrays in `folder/name`; makes and writes them first if missing or damaged.

    The write is atomic. If they cannot be written, it warns and returns the arrays from memory.
    Arrays of more than `eager` bytes (by default `EAGER`) are `Checked`. Other arrays than `keys`
    may be left out, unread.

    Raises:
        NotIndexed: they are missing or damaged, in `without_indexing`.
    """
    origin = None
    if isinstance(folder, StorePath):
        origin, make = folder / name, functools.partial(_fetch_or_make, folder, name, make)
        folder = _local_folder(folder)
        if not indexing() and not (folder / name / _LISTING).is_file():
            if (arrays := _download(origin)) is None:
                raise NotIndexed(str(origin))
            return arrays
        with suppress(OSError):  # not made yet, or the copy cannot be written
            _begin_copy(origin, folder / name)
    target, eager = folder / name, EAGER if eager is None else eager
    try:
        return _load(target, eager, keys, origin)
    except _Changed:
        pass
    except _BROKEN as error:
        if target.exists():
            _discard(target, error)
    if not indexing():
        raise NotIndexed(str(target))
    arrays = make()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        # Not `storage.writing`: a lock on the folder tells `_sweep` that it is in use.
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=_temporary_prefix()))
        locked = _lock(temporary)  # until the process ends, if it is killed
        try:
            _save(arrays, temporary)
            os.chmod(temporary, 0o755)  # mkdtemp makes it private
            try:
                os.rename(temporary, target)
            except OSError:
                if not (target / _LISTING).is_file():  # else another process was first
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if locked is not None:
                os.close(locked)
        sync(folder)
        return _load(target, eager, keys, origin)
    except (_Changed, *_BROKEN) as error:
        log.warning("cannot keep %s: %s", target, error)
        return arrays


def cached_flag(folder: Path, name: str, find: Callable[[], bool]) -> bool:
    """Returns `find()`, which is called once if the cache can be written."""
    try:
        return bool(cached_arrays(folder, name, lambda: {"flag": np.array([find()])})["flag"][0])
    except NotIndexed:
        return find()


def has_arrays(folder: Path, name: str) -> bool:
    """Returns whether `folder/name` holds arrays, or this host's copy of it. Reads none of them."""
    local = isinstance(folder, StorePath) and (_local_folder(folder) / name / _LISTING).is_file()
    return local or (folder / name / _LISTING).is_file()


def remove_arrays(folder: Path, name: str) -> None:
    """Removes the arrays in `folder/name`, so that they are made again."""
    if isinstance(folder, StorePath):
        remove(folder / name)
        folder = _local_folder(folder)
    shutil.rmtree(folder / name, ignore_errors=True)


def _local_folder(store: StorePath) -> Path:
    """Returns the folder of this host's copies of a cache in an object store."""
    return storage.user_cache() / f"store-{short_hash(str(store))}"


def _fetch_or_make(folder: StorePath, name: str, make: Callable[[], Arrays]) -> Arrays:
    """Downloads arrays, or makes and uploads them if no other process does.

    Raises:
        UserError: the store cannot be read.
    """
    target, claim = folder / name, folder / f"{name}.claim"
    text, since = "", time.monotonic()  # of another process's claim, since it has changed
    while (arrays := _download(target)) is None:
        with _claimed(claim) as ours:
            # Another process may have ended between the two requests.
            if ours and (arrays := _download(target)) is None:
                _upload(arrays := make(), target)
        if arrays is not None:
            break
        time.sleep(POLL_SECONDS)
        with suppress(OSError):
            if (now := claim.read_text()) != text:
                text, since = now, time.monotonic()
            elif time.monotonic() - since > STALE_SECONDS:
                log.warning("%s: the process that made %s is gone; making it here", claim, name)
                claim.unlink(missing_ok=True)
    return arrays


@contextmanager
def _claimed(claim: StorePath) -> Iterator[bool]:
    """Yields whether this process may make the arrays: no other process has claimed them, or the
    cache cannot be written."""
    token, stop = secrets.token_hex(8), threading.Event()

    def renew() -> None:
        for number in itertools.count():
            if stop.wait(RENEW_SECONDS):
                return
            with suppress(OSError):
                claim.write_text(f"{token} {number}")

    try:
        create_text(claim, token)
    except FileExistsError:
        yield False
        return
    except OSError:
        yield True
        return
    renewing = threading.Thread(target=renew, daemon=True)
    renewing.start()
    try:
        yield True
    finally:
        stop.set()
        renewing.join()
        with suppress(OSError):
            claim.unlink(missing_ok=True)


def _download(target: StorePath) -> Arrays | None:
    """Returns the arrays in a store, or None if they are missing or damaged.

    Raises:
        UserError: the store cannot be read.
    """
    with tempfile.TemporaryDirectory() as holder:
        copy = Path(holder) / target.name
        try:
            (target / _LISTING).read_bytes()  # uploaded last
            download(target, copy)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"cannot read {target}: {error.strerror}") from None
        try:
            return _load(copy, sys.maxsize)  # all of it is checked; the maps outlive their files
        except (_Changed, *_BROKEN) as error:
            if not indexing():
                raise NotIndexed(f"{target} is damaged ({error})") from None
            log.warning("%s is damaged (%s): removing it, to rebuild it", target, error)
            remove(target)
            return None


def _upload(arrays: Arrays, target: StorePath) -> None:
    with tempfile.TemporaryDirectory() as holder:
        copy = Path(holder) / "arrays"
        copy.mkdir()
        _save(arrays, copy)
        listing = (copy / _LISTING).rename(Path(holder) / _LISTING)
        try:
            upload(copy, target)
            upload(listing, target / _LISTING)
        except OSError as error:
            log.warning("cannot keep %s: %s", target, error.strerror)


def _temporary_prefix() -> str:
    return f".making.{short_hash(socket.gethostname())}."


def _lock(folder: Path) -> int | None:
    """Locks a folder; returns the open descriptor, or None if it is locked or cannot be."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@functools.cache  # listing a folder of many arrays takes long: once is enough
def _sweep(folder: Path) -> None:
    """Removes the temporary folders that killed processes of this host left behind.

    A process holds a lock on its own. Younger ones than `SWEEP_SECONDS` are spared, since their
    process may not have locked them yet.
    """
    for left in folder.glob(f"{_temporary_prefix()}*"):
        try:
            young = time.time() - left.stat().st_mtime < SWEEP_SECONDS
        except OSError:  # it has just got its name
            continue
        if not young and (locked := _lock(left)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(locked)


def _save(arrays: Arrays, folder: Path) -> None:
    sizes = {}
    for key, array in arrays.items():
        array = np.ascontiguousarray(array)
        head, data = _header(array), array.reshape(-1).view(np.uint8).data
        first = _BLOCK - len(head)  # bytes of the array in the first block
        blocks = range(first, len(data), _BLOCK)
        each = [
            zlib.crc32(data[:first], zlib.crc32(head)),
            *(zlib.crc32(data[n : n + _BLOCK]) for n in blocks),
        ]
        with (folder / f"{key}.npy").open("wb") as file:
            file.write(head)
            file.write(data)
        sums = np.array(each, "<u4").tobytes()
        (folder / f"{key}.crc").write_bytes(sums)
        sizes[key] = [len(head) + len(data), zlib.crc32(sums)]
    listing = {"version": _VERSION, "block": _BLOCK, "arrays": sizes}
    (folder / _LISTING).write_text(json.dumps(listing))
    for file in folder.iterdir():
        sync(file)
    sync(folder)


def _header(array: np.ndarray) -> bytes:
    """Returns the header of an array's file, as `np.save` writes it."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(array))
    return head.getvalue()


@functools.lru_cache(1024)
def _parsed(head: bytes) -> tuple[tuple[int, ...], np.dtype]:
    """Parses the header of an array's file: (shape, type of the values).

    The parts of an index have few different headers, and parsing one takes longer than opening its
    file.

    Raises:
        ValueError: it is something else.
    """
    file = io.BytesIO(head)
    with storage.NUMPY_HEADERS:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return shape, dtype


def _begin_copy(origin: StorePath, target: Path) -> None:
    """Begins a local copy of arrays in a store, unless there is one.

    Raises:
        FileNotFoundError: they are not in the store.
        OSError: the copy cannot be written.
        UserError: the store cannot be read.
    """
    if not (target / _LISTING).is_file():
        listing = storage.read(str(origin / _LISTING))
        target.mkdir(parents=True, exist_ok=True)
        _place(target / _LISTING, listing)


def _begin_array(file: Path, size: int, origin: StorePath) -> None:
    """Begins the local copy of an array: its checksums, and a file of its size without content."""
    sums = file.with_suffix(".crc")
    if not sums.exists():
        _place(sums, storage.read(str(origin / sums.name)))
    with file.open("ab") as copy:  # not renamed: other processes may be filling it
        copy.truncate(size)


def _place(file: Path, content: bytes) -> None:
    """Writes a file of a copy. It need not be durable, since it is checked when it is read."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    temporary.write_bytes(content)
    temporary.replace(file)


def _load(
    folder: Path,
    eager: int,
    keys: Collection[str] | None = None,
    origin: StorePath | None = None,
) -> Arrays:
    """Loads the arrays of a folder.

    Args:
        origin: the folder in a store whose copy it is.

    Raises:
        _Changed, or one of _BROKEN: the folder is missing, or differs from what was written.
    """
    listing = json.loads((folder / _LISTING).read_bytes())
    if (listing["version"], listing["block"]) != (_VERSION, _BLOCK):
        raise ValueError(f"{_LISTING} has changed")
    known: dict[str, tuple[int, int]] = listing["arrays"]
    wanted = [key for key in known if keys is None or key in keys]

    def opened(key: str) -> np.ndarray:
        return _open(folder, key, *known[key], eager, origin)

    if origin is None:
        return {key: opened(key) for key in wanted}
    contexts = [contextvars.copy_context() for _ in wanted]  # keep `without_indexing`
    with ThreadPoolExecutor(storage.THREADS) as pool:  # each takes several requests
        arrays = pool.map(lambda context, key: context.run(opened, key), contexts, wanted)
        return dict(zip(wanted, arrays, strict=True))


def _open(
    folder: Path, key: str, size: int, crc: int, eager: int, origin: StorePath | None = None
) -> np.ndarray:
    file = folder / f"{key}.npy"
    if origin is not None:
        _begin_array(file, size, origin)
    sums = (folder / f"{key}.crc").read_bytes()
    if zlib.crc32(sums) != crc:
        raise ValueError(f"{key}.crc has changed")
    if (now := file.stat().st_size) != size:
        raise ValueError(f"{file.name} has {now:,} bytes, not {size:,}")
    checked = Checked(file, np.frombuffer(sums, "<u4"), origin)
    # Small arrays are plain ones, whose look-ups are faster.
    if size <= eager:
        return np.asarray(checked)
    if origin is not None:
        _completed_later(checked)
    return cast(np.ndarray, checked)


def _completed_later(array: Checked) -> None:
    """Fetches the rest of an array in the background, one array at a time, after a while.

    Training looks up rows in random order. If it waited for each block of a large index, its first
    thousand batches would be slow.
    """
    _incomplete().put((time.monotonic(), weakref.ref(array)))


@functools.cache
def _incomplete() -> SimpleQueue[tuple[float, weakref.ref[Checked]]]:
    """Returns a queue of arrays, and of when each was opened, which a thread completes."""
    queue = SimpleQueue[tuple[float, weakref.ref[Checked]]]()

    def complete() -> None:
        while True:
            opened, reference = queue.get()
            time.sleep(max(0.0, opened + _REST_SECONDS - time.monotonic()))
            try:
                if (array := reference()) is not None:
                    array.complete()
                del array  # or the last one would stay in memory
            except Exception as error:  # the next look-up reports it
                log.debug("%s", error)

    threading.Thread(target=complete, daemon=True, name="emu-jax-index").start()
    return queue


class _Changed(UserError):
    """Raised when a block of a file has changed since it was written; its folder was removed."""


class Checked:
    """A mapped array that checks each block when a value in it is first looked up.

    Rows are looked up by number or slice. Any other operation first checks the whole array, and
    is then delegated to it.

    Args:
        sums: CRC-32 of each block.
        origin: folder of a store that has the array. Blocks that `file` lacks are fetched from
            there.

    Raises (when looked up):
        UserError: the values have changed since they were written. Their folder is removed, and
            rebuilt the next time. Or the store cannot be read.
    """

    def __init__(
        self, file: Path, sums: UInt32[np.ndarray, "blocks"], origin: StorePath | None = None
    ) -> None:
        self._file, self._sums, self._origin = file, sums, origin
        with file.open("rb") as opened:  # a plain map: `np.memmap` takes ten times as long
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        self._content = memoryview(mapped)
        self._sound, self._left = bytearray(len(sums)), len(sums)
        self._lock = threading.Lock()
        self._check(0, 1)
        self._first = 10 + int.from_bytes(mapped[8:10], "little")  # the length of the header
        self._check(0, -(-self._first // _BLOCK))
        self.shape, self.dtype = _parsed(mapped[: self._first])
        flat = np.frombuffer(mapped, np.uint8, offset=self._first)
        self._array = flat.view(self.dtype).reshape(self.shape)
        self._width = self._array.strides[0]

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, key: Any) -> Any:
        if self._left:
            self._check_rows(key[0] if isinstance(key, tuple) else key)
        return self._array[key]

    def take(self, rows: Int[np.ndarray, "n"]) -> np.ndarray:
        """Returns the rows of some numbers, at least 0, and checks no other block."""
        if self._left and len(rows):
            starts = self._first + rows * self._width
            ends = starts + self._width - 1
            blocks = np.concatenate([starts // _BLOCK, ends // _BLOCK])
            unchecked = blocks[np.frombuffer(self._sound, np.uint8)[blocks] == 0]
            self._check_blocks(np.unique(unchecked).tolist())
        return self._array[rows]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self._check(0, len(self._sums))
        return np.array(self._array, dtype, copy=copy)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(np.asarray(self), name)

    def searchsorted(self, value: Any, side: str = "left", sorter: Any = None) -> Any:
        """Searches like `numpy.ndarray.searchsorted`. For a single value it reads only the values
        that it compares."""
        if np.ndim(value) or sorter is not None:
            return np.asarray(self).searchsorted(value, side, sorter)  # pyright: ignore
        search = bisect.bisect_left if side == "left" else bisect.bisect_right
        return search(self, value)

    def _check_rows(self, rows: Any) -> None:
        start, stop = 0, self.shape[0]
        if isinstance(rows, _INTEGERS):
            start = int(rows) if rows >= 0 else int(rows) + stop
            stop = start + 1
        elif isinstance(rows, slice) and rows.step in (None, 1):
            start, stop, _ = rows.indices(stop)
        if 0 <= start < stop:
            first, last = self._first + start * self._width, self._first + stop * self._width
            self._check(first // _BLOCK, -(-last // _BLOCK))

    def complete(self) -> None:
        """Fetches and checks all blocks."""
        step = _FETCH_BYTES // _BLOCK
        for first in range(0, len(self._sums), step):
            self._check(first, first + step)

    def _check(self, first: int, last: int) -> None:
        if self._sound.find(0, first, last) >= 0:
            self._check_blocks(range(first, min(last, len(self._sums))))

    def _check_blocks(self, blocks: Sequence[int]) -> None:
        changed = self._unsound(blocks)
        if changed and self._origin is not None:
            self._fetch(changed, self._origin)
            changed = self._unsound(changed)
        if changed:
            folder, why = self._file.parent, f"{self._file.name} has changed"
            _discard(folder, why)
            if self._origin is not None:
                _download(self._origin)  # removes it if it is damaged there
            raise _Changed(
                f"{folder} was damaged ({why}) and has been removed: run the same command again "
                "to rebuild it"
            )

    def _unsound(self, blocks: Sequence[int]) -> list[int]:
        """Checks blocks; returns those that differ from what was written."""
        changed = []
        with self._lock:
            for n in blocks:
                if self._sound[n]:
                    continue
                if zlib.crc32(self._content[n * _BLOCK : (n + 1) * _BLOCK]) != self._sums[n]:
                    changed.append(n)
                    continue
                self._sound[n] = 1
                self._left -= 1
        return changed

    def _fetch(self, blocks: Sequence[int], origin: StorePath) -> None:
        """Fetches blocks from the store to the file, those that are close together in one request.

        The blocks between them are kept too. Nothing is written that differs from what it should
        be: other blocks may be in use.

        Raises:
            UserError: the store cannot be read, or the copy cannot be written.
        """
        numbers, size = np.array(blocks), len(self._content)
        ranges = np.split(numbers, np.flatnonzero(np.diff(numbers) > _NEAR) + 1)
        spans = []
        for first, last in ((int(r[0]) * _BLOCK, (int(r[-1]) + 1) * _BLOCK) for r in ranges):
            spans.append(Span(str(origin / self._file.name), first, min(last, size) - first))
        if len(spans) > 1:
            storage.read_ahead(spans)
        try:
            with self._file.open("r+b") as copy:
                for span in spans:
                    content = memoryview(storage.read(*span))
                    for at in range(0, len(content), _BLOCK):
                        n, block = (span.start + at) // _BLOCK, content[at : at + _BLOCK]
                        if not self._sound[n] and zlib.crc32(block) == self._sums[n]:
                            copy.seek(span.start + at)
                            copy.write(block)
        except FileNotFoundError:  # removed meanwhile, here or there
            pass
        except OSError as error:
            raise UserError(
                f"cannot copy {origin / self._file.name} to {self._file} ({error.strerror})"
            ) from None


def _discard(folder: Path, why: object) -> None:
    """Removes a damaged folder, so that it is rebuilt.

    Raises:
        NotIndexed: in `without_indexing`.
    """
    if not indexing():
        raise NotIndexed(f"{folder} is damaged ({why})")
    log.warning("%s is damaged (%s): removing it, to rebuild it", folder, why)
    try:
        aside = tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.")
        os.rename(folder, f"{aside}/damaged")  # atomic: another process may be using the folder
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        log.warning("cannot remove %s: %s", folder, error)


def fingerprint(kind: str, paths: Sequence[str]) -> str:
    """Returns a hash of the names, sizes and times of files, and of the kind of derived data."""
    storage.refresh()
    stats = storage.stats(paths)
    return short_hash(
        (kind, [(os.path.basename(p), *s) for p, s in zip(paths, stats, strict=True)])
    )


class Joined:
    """Arrays of several folders, one after the other. A folder is opened when a row in it is first
    looked up.

    Args:
        open_folder: returns the arrays of a folder by its number.
        key: name of the array.
        starts: number of the first row of each folder; one more, the number of all rows.
        bases: what is added to the values of each folder.
    """

    def __init__(
        self,
        open_folder: Callable[[int], Arrays],
        key: str,
        starts: Sequence[int],
        bases: Sequence[int] | None = None,
    ) -> None:
        self._open, self._key, self._starts, self._bases = open_folder, key, starts, bases

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice) and key.step is None:
            return self._slice(*key.indices(len(self))[:2])
        if not isinstance(key, _INTEGERS):
            return np.asarray(self)[key]
        row = int(key) if key >= 0 else int(key) + len(self)
        if not 0 <= row < len(self):
            raise IndexError(key)
        folder = bisect.bisect_right(self._starts, row) - 1
        value = self._open(folder)[self._key][row - self._starts[folder]]
        return value if self._bases is None else value + self._bases[folder]

    def _slice(self, first: int, stop: int) -> np.ndarray:
        """Returns consecutive rows, and opens no other folder than theirs."""
        folder = bisect.bisect_right(self._starts, min(first, len(self) - 1)) - 1
        pieces = []
        while True:
            start = self._starts[folder]
            rows = self._open(folder)[self._key][max(first - start, 0) : max(stop - start, 0)]
            pieces.append(rows if self._bases is None else rows + self._bases[folder])
            folder += 1
            if folder >= len(self._starts) - 1 or self._starts[folder] >= stop:
                return np.concatenate(pieces)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        bases = self._bases or [0] * (len(self._starts) - 1)
        each = [np.asarray(self._open(n)[self._key]) + base for n, base in enumerate(bases)]
        return np.asarray(np.concatenate(each), dtype)

    def searchsorted(self, value: Any, side: str = "left") -> int:
        """Searches like `numpy.ndarray.searchsorted`, and reads only the values it compares."""
        search = bisect.bisect_left if side == "left" else bisect.bisect_right
        return search(self, value)


def index_files(
    kind: str, paths: Sequence[str], scan: Callable[[str], Arrays], cache: str, quick: bool = False
) -> Arrays:
    """Returns the concatenated results of `scan` on each file, with the file's number as `file`.

    The result of each file is cached as soon as it is complete, so that an interrupted scan
    resumes. Small results of up to `MOST_FOLDERS` files are also cached in one folder, so that a
    source is opened by reading that. Results of more than `EAGER` bytes are opened lazily where
    they are (`Joined`). Those of more files are cached in as many folders, which are opened lazily.

    A `tally` among the arrays, which must come last, is summed (`Tally.add`). Arrays whose names
    end in `_row` hold numbers of rows of the first array in rising order, and are renumbered.
    Others with the same first word (`wide_span` beside `wide_row`) have a row for each of them.

    Args:
        quick: whether scanning a file takes a moment, and its result is small. Only folders are
            cached then, of at least `QUICK_FILES` files.
    """
    if len(paths) == 1 and not quick:
        return _numbered(_file_index(kind, paths[0], scan, cache))
    groups = file_groups(paths, quick)
    if not groups:
        return _folder_index(kind, paths, scan, cache, quick=quick)

    @functools.cache
    def opened(group: int) -> Arrays:
        # Small arrays are copied to memory: those of all folders together stay within EAGER.
        return _folder_index(kind, groups[group], scan, cache, EAGER // len(groups), quick)

    def summary() -> Arrays:
        return _summary([opened(group) for group in range(len(groups))])

    name = f"{kind}-{fingerprint(kind, paths)}-folders"
    totals = cached_arrays(folder_for(paths[0], cache), name, summary)
    return _joined(opened, totals, list(range(0, len(paths), len(groups[0]))))


def file_groups(paths: Sequence[str], quick: bool = False) -> list[Sequence[str]]:
    """Returns the files of each folder of an index; [] if one folder holds it.

    Args:
        quick: see `index_files`.
    """
    size = max(-(-len(paths) // MOST_FOLDERS), QUICK_FILES if quick else 1)
    groups = [paths[n : n + size] for n in range(0, len(paths), size)]
    return groups if 1 < len(groups) < len(paths) else []


def _summary(every: Sequence[Arrays]) -> Arrays:
    """Returns what `_joined` needs of the arrays of several folders."""
    keys, counts = list(every[0]), [len(arrays["file"]) for arrays in every]
    result = {"count": np.array(counts, np.int64), "keys": np.array(keys)}
    for key in keys:
        if key == "tally":
            result[key] = Tally.add([arrays[key] for arrays in every])
        elif key.endswith("_row"):
            result[key] = _renumbered([arrays[key] for arrays in every], counts)
    return result


def _joined(
    open_folder: Callable[[int], Arrays], summary: Arrays, first_files: Sequence[int]
) -> Arrays:
    """Returns the arrays of several folders as one, from their `_summary`.

    Args:
        first_files: number of the first file of each folder.
    """
    starts = [0, *itertools.accumulate(summary["count"].tolist())]
    arrays: dict[str, Any] = {}
    for key in summary["keys"].tolist():
        if key in summary:
            arrays[key] = summary[key]
            continue
        bases, firsts = first_files if key == "file" else None, starts
        if (rows := f"{key.rpartition('_')[0]}_row") in summary:  # a row for each of those
            firsts = np.searchsorted(np.asarray(summary[rows]), starts).tolist()
        arrays[key] = Joined(open_folder, key, firsts, bases)
    return arrays


def _numbered(arrays: Arrays) -> Arrays:
    """Adds the file's number to the arrays of a single file."""
    count = len(next(iter(arrays.values())))
    return {"file": np.broadcast_to(np.int32(0), count), **arrays}


def _file_index(
    kind: str, path: str, scan: Callable[[str], Arrays], cache: str, eager: int | None = None
) -> Arrays:
    name = f"{os.path.basename(path)}-{fingerprint(kind, [path])}"
    return cached_arrays(folder_for(path, cache), name, lambda: scan(path), eager)


def _folder_index(
    kind: str,
    paths: Sequence[str],
    scan: Callable[[str], Arrays],
    cache: str,
    eager: int | None = None,
    quick: bool = False,
) -> Arrays:
    """Returns the concatenated results of `scan` on files, cached in one folder if they are
    small."""

    @functools.cache
    def opened(file: int) -> Arrays:
        if quick:
            return _numbered(scan(paths[file]))
        limit = (EAGER if eager is None else eager) // len(paths)
        return _numbered(_file_index(kind, paths[file], scan, cache, limit))

    def together() -> Arrays:
        if quick:
            shares = list(map(opened, range(len(paths))))
        else:
            with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
                shares = list(pool.map(opened, range(len(paths))))
        if sum(_nbytes(array) for share in shares for array in share.values()) > EAGER:
            return _summary(shares)  # copying them would take as long as reading them all
        counts = [len(share["file"]) for share in shares]

        def joined(key: str) -> np.ndarray:
            if key == "tally":
                return Tally.add([s[key] for s in shares])
            if key.endswith("_row"):
                return _renumbered([s[key] for s in shares], counts)
            return np.concatenate([s[key] for s in shares])

        files = np.repeat(np.arange(len(paths), dtype=np.int32), counts)
        return {key: files if key == "file" else joined(key) for key in shares[0]}

    name = f"{kind}-{fingerprint(kind, paths)}"
    arrays = cached_arrays(folder_for(paths[0], cache), name, together, eager)
    return _joined(opened, arrays, range(len(paths))) if "keys" in arrays else arrays


def _nbytes(array: np.ndarray) -> int:
    """Returns the size of an array, without reading one that is `Checked`."""
    return math.prod(array.shape) * array.dtype.itemsize


def _renumbered(
    rows: Sequence[Int[np.ndarray, "_"]], counts: Sequence[int]
) -> Int[np.ndarray, "_"]:
    """Returns numbers of rows in several arrays as numbers in their concatenation.

    Args:
        counts: number of rows of each array.
    """
    starts = np.cumsum(counts) - counts
    each = zip(rows, starts.tolist(), strict=True)
    return np.concatenate([np.asarray(numbers) + start for numbers, start in each])
