"""ArrayRecord files in object stores, read a range for each record."""

from __future__ import annotations

import bisect
import ctypes
import functools
import itertools
import os
import tempfile
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Shaped

from emu_jax.data import storage
from emu_jax.data.file_cache import FileCache
from emu_jax.data.read_ahead import Span

# No read-ahead: records are read in random order. The footer is read in one request.
_OPTIONS = "readahead_buffer_size:0,footer_prefetch_bytes:256k"
_BUFFER = 1 << 15
_TAIL = 1 << 18  # bytes that usually hold the footer
_OPEN_FILES = 256  # whose footers are in memory; each takes two file descriptors
_PAGE = os.sysconf("SC_PAGESIZE")
_PUNCH_HOLE = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE

# Riegeli, the format below ArrayRecord. A file is a sequence of chunks, one for each group of
# records; a header interrupts it at each block boundary. The last block holds the offset of the
# footer, a chunk that lists the offsets of all others.
_RIEGELI_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40
_CODECS = {0: "", ord("b"): "brotli", ord("z"): "zstd", ord("s"): "snappy"}
_OFFSET_FIELD, _COUNT_FIELD = 1, 3  # of a chunk in the footer
_Offsets = Shaped[np.ndarray, "chunks_and_footer"]


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
        file, record = self._locate(index)
        return file[record]

    def spans(self, index: int) -> list[Span]:
        """Returns the byte ranges that reading a record needs."""
        file, record = self._locate(index)
        return file.spans(record)

    def _locate(self, index: int) -> tuple[StoreRecords, int]:
        n = bisect.bisect_right(self._starts, index) - 1
        return self._files[n], self._firsts[n] + index - self._starts[n]

    def __getitems__(self, indices: Sequence[int]) -> list[bytes]:
        with ThreadPoolExecutor(storage.THREADS) as pool:
            return list(pool.map(self.__getitem__, indices))


class StoreRecords(Sequence[bytes]):
    """The records of an ArrayRecord file in an object store. Safe for threads.

    A record is read with one request for its bytes. A file whose footer is of an unusual format
    (transposed) is copied to the local disk when its first record is read.

    Raises:
        UserError: the store does not let us read the file, or does not answer.
        ValueError: the file, or the record that is read, is damaged.
    """

    def __init__(self, path: str, stat: storage.Stat, cache: FileCache) -> None:
        self.path, self._stat, self._cache = path, stat, cache
        self._lock = threading.Lock()
        self._reader: Any = None
        self._sparse: weakref.ref[_SparseFile] | None = None  # once a record has been read
        self._inode = 0  # of the local copy that `_reader` has open
        start, tail, self._count = self._tail()
        # The offset of each chunk, and of the footer behind them; None if it is unknown.
        self._offsets, self._group = _chunks(tail, start) or (None, 1)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]
        if not 0 <= index < self._count:
            raise IndexError(index)
        try:
            return self._read(index)
        except RuntimeError as error:
            raise ValueError(str(error)) from None

    def spans(self, index: int) -> list[Span]:
        """Returns the byte ranges that reading a record needs, [] if they are unknown."""
        if self._offsets is None:
            return []
        is_open = self._sparse is not None and self._sparse() is not None
        footer = [] if is_open else [self._footer_span(self._offsets)]
        return [*footer, self._chunk_span(self._offsets, index)]

    def _read(self, index: int) -> bytes:
        if self._offsets is not None:
            chunk = self._chunk_span(self._offsets, index)
            file = _sparse(self)
            self._sparse = weakref.ref(file)
            return file.read(index, storage.read(*chunk), chunk.start)
        with self._cache.reading(self.path, self._stat) as copy:
            with self._lock:  # the copy may have been evicted and downloaded again
                if self._inode != (inode := os.stat(copy).st_ino):
                    self._reader, self._inode = _opened(str(copy)), inode
                reader = self._reader
            return reader.read([index])[0]

    def footer(self) -> tuple[int, bytes]:
        """Reads the end of the file, from the footer on: (offset, content)."""
        assert self._offsets is not None
        span = self._footer_span(self._offsets)
        return span.start, storage.read(*span)

    def _footer_span(self, offsets: _Offsets) -> Span:
        start = int(offsets[-1])
        return Span(self.path, start, self._stat.size - start)

    def _chunk_span(self, offsets: _Offsets, index: int) -> Span:
        start, end = offsets[index // self._group :][:2].tolist()
        return Span(self.path, start, end - start)

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return self._stat.size

    def _tail(self) -> tuple[int, bytes, int]:
        """Returns the end of the file, its offset, and the number of records.

        They are counted in a local file that has nothing but its end.
        """
        size, tail = self._stat.size, _TAIL
        with tempfile.NamedTemporaryFile() as file:
            os.ftruncate(file.fileno(), size)
            while True:
                start = max(0, size - tail)
                content = storage.read(self.path, start, size - start)
                os.pwrite(file.fileno(), content, start)
                try:
                    return start, content, _opened(file.name).num_records()
                except ValueError:
                    if start == 0:
                        raise
                tail *= 8


class _SparseFile:
    """A file in memory that has the footer of a remote one, and a record while it is read.

    array_record reads files alone. It also verifies the checksums of a record.
    """

    def __init__(self, records: StoreRecords) -> None:
        self._handle = os.memfd_create("emu-jax-records")
        self._lock = threading.Lock()
        self._footer, footer = records.footer()
        os.ftruncate(self._handle, records.size)
        os.pwrite(self._handle, footer, self._footer)
        self._reader = _opened(f"/proc/self/fd/{self._handle}")

    def read(self, index: int, content: bytes, start: int) -> bytes:
        """Returns a record from the bytes of its chunk, which begins at `start`."""
        with self._lock:
            os.pwrite(self._handle, content, start)
            try:
                return self._reader.read([index])[0]
            finally:
                # Whole pages, which the ends of the record share with others.
                first, last = start // _PAGE, -(-(start + len(content)) // _PAGE)
                pages = min(last, self._footer // _PAGE) - first
                _free(self._handle, first * _PAGE, pages * _PAGE)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)


@functools.lru_cache(_OPEN_FILES)
def _sparse(records: StoreRecords) -> _SparseFile:
    return _SparseFile(records)


def _free(handle: int, start: int, size: int) -> None:
    """Frees the memory of a range of a file in memory."""
    _system().fallocate(handle, _PUNCH_HOLE, ctypes.c_int64(start), ctypes.c_int64(size))


@functools.cache
def _system() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _opened(path: str) -> Any:
    """Opens a local file.

    Raises:
        ValueError: it is damaged.
    """
    reader = ArrayRecordReader(path, _OPTIONS, file_reader_buffer_size=_BUFFER)
    if not reader.ok():
        try:
            reader.read([0])
        except RuntimeError as error:
            raise ValueError(str(error)) from None
    return reader


def _chunks(tail: bytes, start: int) -> tuple[_Offsets, int] | None:
    """Returns the offset of each chunk and of the footer, and the number of records of a chunk.

    None if they are in a format that is not known here, or the system cannot use them.

    Args:
        tail: the end of the file, which array_record could open.
        start: offset of its first byte.
    """
    if not hasattr(os, "memfd_create"):
        return None
    try:
        end = start + len(tail) - _RIEGELI_BLOCK
        postscript = _records(tail, start, end)[0]  # of three equal ones
        footer = int(_varints(postscript)[1])
        _, *chunks = _records(tail, start, footer)
        fields = _varints(b"".join(chunks)).reshape(len(chunks), -1)
        tags, values = fields[:, ::2] >> 3, fields[:, 1::2]
        (offset,), (count,) = (np.flatnonzero(tags[0] == n) for n in (_OFFSET_FIELD, _COUNT_FIELD))
        offsets = np.append(values[:, offset], footer)
        if (tags != tags[0]).any() or (np.diff(offsets.astype(np.int64)) <= 0).any():
            return None
        narrow = footer < 1 << 32
        return offsets.astype(np.uint32 if narrow else np.uint64), int(values[0, count])
    except (ValueError, LookupError, OSError):
        return None


def _records(tail: bytes, start: int, chunk: int) -> list[bytes]:
    """Decodes the records of an untransposed chunk at an offset of the file.

    Raises:
        ValueError, IndexError: it is something else.
    """
    content = _between_headers(tail, start, chunk)
    header, content = content[:_CHUNK_HEADER], content[_CHUNK_HEADER:]
    if header[24:25] != b"r":
        raise ValueError("not a chunk of records")
    content = content[: int.from_bytes(header[8:16], "little")]
    codec, count = _CODECS[content[0]], int.from_bytes(header[25:32], "little")
    length, content = _varint(content[1:])
    sizes = _varints(_decompressed(content[:length], codec)).tolist()
    values = _decompressed(content[length:], codec)
    ends = list(itertools.accumulate(sizes))
    if len(sizes) != count or ends[-1:] != [len(values)]:
        raise ValueError("the sizes of the records do not fit")
    return [values[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _between_headers(tail: bytes, start: int, first: int) -> bytes:
    """Returns the bytes of the file from `first` on, without block headers."""
    blocks = []
    while first < start + len(tail):
        end = first + _RIEGELI_BLOCK - first % _RIEGELI_BLOCK
        skip = 0 if first % _RIEGELI_BLOCK else _BLOCK_HEADER
        blocks.append(tail[first + skip - start : end - start])
        first = end
    return b"".join(blocks)


def _decompressed(content: bytes, codec: str) -> bytes:
    if not codec:
        return content
    import pyarrow

    size, content = _varint(content)
    return pyarrow.decompress(content, size, codec=codec, asbytes=True)


def _varint(content: bytes) -> tuple[int, bytes]:
    """Returns the variable-length integer at the beginning, and the bytes behind it."""
    size = next(n for n in range(1, 11) if content[n - 1] < 128)
    return int(_varints(content[:size])[0]), content[size:]


def _varints(content: bytes) -> Shaped[np.ndarray, "integers"]:
    """Decodes consecutive variable-length integers."""
    values = np.frombuffer(content, np.uint8).astype(np.uint64)
    ends = np.flatnonzero(values < 128) + 1
    starts = np.append(0, ends[:-1])
    shifts = np.arange(len(values)) - np.repeat(starts, ends - starts)
    parts = (values & np.uint64(127)) << (7 * shifts).astype(np.uint64)
    return np.add.reduceat(parts, starts)
