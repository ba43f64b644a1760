"""Arrays derived from files once and kept beside them, mapped into memory rather than read.

An index of a billion documents is some tens of gigabytes on disk; opening it costs nothing,
and only what is looked up is ever read.

    FOLDER/NAME/KEY.npy        an array
    FOLDER/NAME/KEY.crc        CRC-32 of each block of that file, uint32
    FOLDER/NAME/arrays.json    each array's length in bytes and the CRC-32 of its .crc

A folder is synced to the disk before it gets its name. A file that is missing, shorter or changed
is found before one of its values is used: arrays up to `EAGER` bytes are checked when they are
opened, larger ones block by block as they are first looked up.
"""

from __future__ import annotations

import bisect
import json
import logging
import os
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np

from emu_jax.config import UserError
from emu_jax.data import storage
from emu_jax.data.documents import short_hash
from emu_jax.data.unused import Tally

log = logging.getLogger(__name__)
Arrays = dict[str, np.ndarray]

EAGER = 1 << 27  # bytes that are checked in a moment
_BLOCK = 1 << 14
_LISTING, _VERSION = "arrays.json", 1
_INTEGERS = (int, np.integer)
# What reading a damaged folder raises.
_BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError)


def folder_for(path: str, cache: str) -> Path:
    """Where what is derived from a file is kept: `cache`, or else `.emu_jax` beside it; of a
    remote file, the user's own cache."""
    if cache:
        return Path(cache)
    if storage.is_remote(path):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emu_jax"
    return Path(path).parent / ".emu_jax"


def kept(
    folder: Path, name: str, make: Callable[[], Arrays], eager: int | None = None
) -> Arrays:  # fmt: skip
    """The arrays in `folder/name`, made and written first if they are not there whole.

    They appear at once. Where they cannot be written they are made each time. Those of more than
    `eager` bytes (by default `EAGER`) are `Checked`.
    """
    target, eager = folder / name, EAGER if eager is None else eager
    try:
        return _load(target, eager)
    except _Changed:
        pass
    except _BROKEN as error:
        if target.exists():
            _discard(target, error)
    arrays = make()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=f".{name}."))
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
        storage.sync(folder)
        return _load(target, eager)
    except (_Changed, *_BROKEN) as error:
        log.warning("cannot keep %s: %s", target, error)
        return arrays


def _save(arrays: Arrays, folder: Path) -> None:
    sizes = {}
    for key, array in arrays.items():
        file = folder / f"{key}.npy"
        np.save(file, np.ascontiguousarray(array))
        content = np.memmap(file, np.uint8, "r").data
        blocks = range(0, len(content), _BLOCK)
        sums = np.array([zlib.crc32(content[n : n + _BLOCK]) for n in blocks], "<u4")
        (folder / f"{key}.crc").write_bytes(sums.tobytes())
        sizes[key] = [len(content), zlib.crc32(sums.tobytes())]
    listing = {"version": _VERSION, "block": _BLOCK, "arrays": sizes}
    (folder / _LISTING).write_text(json.dumps(listing))
    for file in folder.iterdir():
        storage.sync(file)
    storage.sync(folder)


def _load(folder: Path, eager: int) -> Arrays:
    """
    Raises:
        _Changed, or one of _BROKEN: it is not there, or not as it was written.
    """
    listing = json.loads((folder / _LISTING).read_bytes())
    if (listing["version"], listing["block"]) != (_VERSION, _BLOCK):
        raise ValueError(f"{_LISTING} has changed")
    known: dict[str, tuple[int, int]] = listing["arrays"]
    return {key: _open(folder, key, size, crc, eager) for key, (size, crc) in known.items()}


def _open(folder: Path, key: str, size: int, crc: int, eager: int) -> np.ndarray:
    file = folder / f"{key}.npy"
    sums = (folder / f"{key}.crc").read_bytes()
    if zlib.crc32(sums) != crc:
        raise ValueError(f"{key}.crc has changed")
    if (now := file.stat().st_size) != size:
        raise ValueError(f"{file.name} has {now:,} bytes, not {size:,}")
    checked = Checked(file, np.frombuffer(sums, "<u4"))
    # What is small is better a plain array, which is looked up faster.
    return np.asarray(checked) if size <= eager else cast(np.ndarray, checked)


class _Changed(UserError):
    """A block of a file is not as it was written; its folder has been removed."""


class Checked:
    """A mapped array, each block of which is checked when a value in it is first looked up.

    Rows are looked up by number or slice. Everything else that an array does is done by the
    array itself, after all of it has been checked.

    Raises (when looked up):
        UserError: the values have changed since they were written. They are removed, so that
            they are made again the next time.
    """

    def __init__(self, file: Path, sums: np.ndarray):
        self._file, self._sums = file, sums
        self._content = np.memmap(file, np.uint8, "r").data
        self._sound, self._left = bytearray(len(sums)), len(sums)
        self._lock = threading.Lock()
        self._check(0, 1)  # the header
        mapped = np.load(file, mmap_mode="r")
        self._first, self.shape, self.dtype = mapped.offset, mapped.shape, mapped.dtype
        # As a plain array: a look-up in a `memmap` takes four times as long.
        self._array, self._width = np.asarray(mapped), mapped.strides[0]

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, key: Any) -> Any:
        if self._left:
            self._check_rows(key[0] if isinstance(key, tuple) else key)
        return self._array[key]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self._check(0, len(self._sums))
        return np.array(self._array, dtype, copy=copy)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(np.asarray(self), name)

    def searchsorted(self, value: Any, side: str = "left", sorter: Any = None) -> Any:
        """Searches as `numpy.ndarray.searchsorted` does; for a single value it reads only the
        values that it compares."""
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

    def _check(self, first: int, last: int) -> None:
        if self._sound.find(0, first, last) < 0:
            return
        with self._lock:
            for n in range(first, min(last, len(self._sums))):
                if self._sound[n]:
                    continue
                if zlib.crc32(self._content[n * _BLOCK : (n + 1) * _BLOCK]) != self._sums[n]:
                    folder, why = self._file.parent, f"{self._file.name} has changed"
                    _discard(folder, why)
                    raise _Changed(
                        f"{folder} was damaged ({why}) and has been removed: run the same "
                        "command again to make it again"
                    )
                self._sound[n] = 1
                self._left -= 1


def _discard(folder: Path, why: object) -> None:
    """Removes a damaged folder, so that it is made again."""
    log.warning("%s is damaged (%s): removing it, to make it again", folder, why)
    try:
        aside = tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.")
        os.rename(folder, f"{aside}/damaged")  # at once, whatever another process does with it
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        log.warning("cannot remove %s: %s", folder, error)


def fingerprint(kind: str, paths: Sequence[str]) -> str:
    """Follows from the names, sizes and times of files, and from what is made of them."""
    storage.refresh()
    with ThreadPoolExecutor(16) as pool:
        stats = list(pool.map(storage.stat, paths))
    return short_hash(
        (kind, [(os.path.basename(p), *s) for p, s in zip(paths, stats, strict=True)])
    )


def index_files(
    kind: str, paths: Sequence[str], scan: Callable[[str], Arrays], cache: str
) -> Arrays:
    """What `scan` finds in each file, one after the other, with the file's number as `file`.

    Each file's share is kept as soon as it is there, so that an interrupted scan goes on, and
    all of them together, so that a source of many files is opened by looking at one. A `tally`
    among the arrays, which comes last, is added up (`Tally.to_array`).
    """

    def share(path: str) -> Arrays:
        name = f"{os.path.basename(path)}-{fingerprint(kind, [path])}"
        return kept(folder_for(path, cache), name, lambda: scan(path))

    def together() -> Arrays:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            shares = list(pool.map(share, paths))
        counts = [len(next(iter(s.values()))) for s in shares]
        arrays = {
            key: Tally.add([s[key] for s in shares]) if key == "tally"
            else np.concatenate([s[key] for s in shares])
            for key in shares[0]
        }  # fmt: skip
        return {"file": np.repeat(np.arange(len(paths), dtype=np.int32), counts), **arrays}

    if len(paths) == 1:
        arrays = share(paths[0])
        count = len(next(iter(arrays.values())))
        return {"file": np.zeros(count, np.int32), **arrays}
    return kept(folder_for(paths[0], cache), f"{kind}-{fingerprint(kind, paths)}", together)
