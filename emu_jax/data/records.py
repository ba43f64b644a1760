"""ArrayRecord files in object stores: read in place from gs://, else from a local copy."""

from __future__ import annotations

import bisect
import itertools
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader

from emu_jax.data import storage
from emu_jax.data.file_cache import FileCache

# No read-ahead: records are read in random order. The footer is read in one request.
_OPTIONS = "readahead_buffer_size:0,footer_prefetch_bytes:256k"
_BUFFER = 1 << 15
_TAIL = 1 << 18  # bytes that usually hold the footer


class RecordSpans(Sequence[bytes]):
    """Consecutive records of several files in an object store, as one sequence.

    Args:
        spans: (file, its size and stamp, first record, number of records). The number is -1 for
            all records from the first.
    """

    def __init__(
        self, spans: Sequence[tuple[str, storage.Stat, int, int]], cache: FileCache
    ) -> None:
        with ThreadPoolExecutor(storage.THREADS) as pool:
            self._files = list(pool.map(lambda s: StoreRecords(s[0], s[1], cache), spans))
        self._firsts = [first for _, _, first, _ in spans]
        counts = [
            len(file) - first if count < 0 else count
            for file, (_, _, first, count) in zip(self._files, spans, strict=True)
        ]
        self._starts = [0, *itertools.accumulate(counts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        n = bisect.bisect_right(self._starts, index) - 1
        return self._files[n][self._firsts[n] + index - self._starts[n]]

    def __getitems__(self, indices: Sequence[int]) -> list[bytes]:
        with ThreadPoolExecutor(storage.THREADS) as pool:
            return list(pool.map(self.__getitem__, indices))


class StoreRecords(Sequence[bytes]):
    """The records of an ArrayRecord file in an object store. Safe for threads.

    array_record itself reads gs://, a range for each record. Of other stores, a file is copied to
    the local disk when its first record is read.

    Raises:
        UserError: the store does not let us read the file, or does not answer.
        ValueError: the file, or the record that is read, is damaged.
    """

    def __init__(self, path: str, stat: storage.Stat, cache: FileCache) -> None:
        self.path, self._stat, self._cache = path, stat, cache
        self._lock = threading.Lock()
        self._reader: Any = None
        self._inode = 0  # of the local copy that `_reader` has open
        if path.startswith("gs://"):
            self._reader = self._open(path)
            self._count: int = self._reader.num_records()
        else:
            self._count = self._count_records()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]
        if not 0 <= index < self._count:
            raise IndexError(index)
        try:
            return self._read(index)
        except RuntimeError:
            storage.read(self.path, 0, 1)  # raises if it is the store that fails
        try:
            return self._read(index)
        except RuntimeError as error:
            raise ValueError(str(error)) from None

    def _read(self, index: int) -> bytes:
        with self._opened() as reader:
            return reader.read([index])[0]

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        if self.path.startswith("gs://"):
            yield self._reader
            return
        with self._cache.reading(self.path, self._stat) as copy:
            with self._lock:  # the copy may have been evicted and downloaded again
                if self._inode != (inode := os.stat(copy).st_ino):
                    self._reader, self._inode = self._open(str(copy)), inode
                reader = self._reader
            yield reader

    def _open(self, path: str) -> Any:
        reader = ArrayRecordReader(path, _OPTIONS, file_reader_buffer_size=_BUFFER)
        if not reader.ok():
            storage.read(self.path, 0, 1)  # raises if it is the store that fails
            reader = ArrayRecordReader(path, _OPTIONS, file_reader_buffer_size=_BUFFER)
        if not reader.ok():
            try:
                reader.read([0])
            except RuntimeError as error:
                raise ValueError(str(error)) from None
        return reader

    def _count_records(self) -> int:
        """Counts the records by the footer alone, in a local file that has nothing but its end."""
        size, tail = self._stat.size, _TAIL
        with tempfile.NamedTemporaryFile() as file:
            os.ftruncate(file.fileno(), size)
            while True:
                start = max(0, size - tail)
                os.pwrite(file.fileno(), storage.read(self.path, start, size - start), start)
                try:
                    return self._open(file.name).num_records()
                except ValueError:
                    if start == 0:
                        raise
                tail *= 8
