"""The entries of listings: objects of JSON files, and rows of Parquet files."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from emu_jax.data import storage
from emu_jax.data.documents import Damaged, short_hash, utf8
from emu_jax.data.sources.formats import PACKED, PARQUET, check_format, check_twins, unpack
from emu_jax.data.sources.index import (
    Arrays,
    cached_arrays,
    cached_flag,
    fingerprint,
    folder_for,
    index_files,
)
from emu_jax.data.sources.parquet import ParquetRows, rows_in

_VERSION = "entries-2"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # half of a pair, escaped
_CHUNK = 1 << 26  # bytes read at once while scanning for line ends
_LONGEST_MATCH = 64
# Exceptions raised by parsing a malformed entry without checking it first.
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, OverflowError)


class Entries:
    """The objects of JSON files, one a line or all in one list, and the rows of Parquet files.
    Both are read in place.

    JSON files that end in .gz or .zip are unpacked once, into the cache.

    Attributes:
        fingerprint: a short hash of the files' names, sizes and times (see `Source`).
    """

    def __init__(self, paths: Sequence[str], cache: str) -> None:
        self.paths, self._cache = list(paths), cache
        check_twins(self.paths)
        self._content = functools.lru_cache(1024)(self._content)  # mapped content of packed files
        self._rows = ParquetRows()
        arrays = index_files(_VERSION, self.paths, self._scan, cache)
        # For a row of a Parquet file: its row group, and its number in the group.
        self._files, self._offsets, self._sizes = arrays["file"], arrays["offset"], arrays["size"]
        self._numbers = arrays["number"]
        self.fingerprint = fingerprint(_VERSION, self.paths)

    def __len__(self) -> int:
        return len(self._files)

    def where(self, index: int) -> str:
        return f"{self.paths[self._files[index]]} entry {self._numbers[index]}"

    def folder(self, index: int) -> str:
        """Returns the folder of the file that holds an entry."""
        return storage.parent(self.paths[self._files[index]])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads an entry.

        Raises:
            Damaged: the entry is too large, not UTF-8, or not a JSON object; or its row group is
                damaged.
        """
        path, size = self.paths[self._files[index]], int(self._sizes[index])
        start = int(self._offsets[index])
        if path.endswith(PARQUET):
            return self._rows.read(path, start, size, self.where(index))
        if size > storage.MOST_ENTRY:
            raise Damaged("file too large", self.where(index), f"an entry of {size:,} bytes")
        if path.endswith(PACKED):
            content = self._content(path)[start : start + size].tobytes()
        else:
            content = storage.read_part(path, start, size)
        return parse_object(content, self.where(index))

    def may_match(self, pattern: re.Pattern[bytes]) -> bool:
        """Returns whether the text of a file matches. The texts are read once, and the result is
        cached. Parquet files are not read: they may match.

        Args:
            pattern: matches at most `_LONGEST_MATCH` bytes.
        """

        def matches(path: str) -> bool:
            if path.endswith(PARQUET):
                return True
            if path.endswith(PACKED):
                return pattern.search(self._content(path).data) is not None
            size, step = storage.stat(path).size, _CHUNK
            return any(
                pattern.search(storage.read_part(path, first, step + _LONGEST_MATCH))
                for first in range(0, size, step)
            )

        name = f"match-{short_hash((pattern.pattern, self.fingerprint))}"
        folder = folder_for(self.paths[0], self._cache)
        return cached_flag(folder, name, lambda: any(map(matches, self.paths)))

    def _scan(self, path: str) -> Arrays:
        if path.endswith(PACKED):
            return _objects_in(np.asarray(self._content(path)).tobytes())
        if path.endswith(PARQUET):
            return rows_in(path)
        check_format(path)
        return _objects_in(path)

    def _content(self, path: str) -> UInt8[np.ndarray, "bytes"]:
        name = f"{os.path.basename(path)}-{fingerprint('unpacked-1', [path])}"
        made = cached_arrays(folder_for(path, self._cache), name, lambda: unpack(path), eager=0)
        return made["content"]


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
        Damaged: the content is not UTF-8, or not a JSON object.
    """
    try:
        value = json.loads(utf8(content, where))
    except (ValueError, RecursionError) as error:
        raise Damaged("malformed JSON", where, error) from None
    if _SURROGATE.search(content):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Damaged("invalid UTF-8", where, "an unpaired surrogate") from None
        except RecursionError as error:
            raise Damaged("malformed JSON", where, error) from None
    if not isinstance(value, dict):
        raise Damaged("malformed JSON", where, "not an object")
    return value


def look_up(values: Any, key: str) -> Any:
    """Returns the value at a dotted key in nested values, or None if there is none.

    A key that itself contains dots is found first. In a list, a number selects an element; any
    other key is looked up in every element. A string between two keys is parsed as JSON.
    """
    if not key:
        return values
    if isinstance(values, str):
        try:
            values = json.loads(values)
        except (ValueError, RecursionError):
            return None
    if isinstance(values, dict):
        if key in values:
            return values[key]
        dots = [n for n, letter in enumerate(key) if letter == "."]
        split = next((n for n in reversed(dots) if key[:n] in values), None)
        return None if split is None else look_up(values[key[:split]], key[split + 1 :])
    if isinstance(values, list):
        number, _, rest = key.partition(".")
        if number.isdecimal():
            return look_up(values[int(number)], rest) if int(number) < len(values) else None
        return [look_up(value, key) for value in values]
    return None


def _objects_in(file: str | bytes) -> Arrays:
    """Finds the objects in a file, given by its path or its content."""
    if isinstance(file, bytes):
        size, read = len(file), lambda start, count: file[start : start + count]
    else:
        size, read = storage.stat(file).size, functools.partial(storage.read_part, file)
    head = read(0, 4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    spans = list(_elements(read(0, size)) if head.startswith(b"[") else _lines(read, size))
    offsets, sizes = np.array(spans, np.int64).reshape(-1, 2).T
    return {"offset": offsets, "size": sizes, "number": np.arange(len(spans))}


def _lines(read: Callable[[int, int], bytes], size: int) -> Iterator[tuple[int, int]]:
    """Yields (offset, size) of each line that is not empty."""
    start, position = 0, 0
    while position < size:
        chunk = read(position, _CHUNK)
        for end in (np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + position).tolist():
            if end > start + 1 or (end == start + 1 and read(start, 1) != b"\r"):
                yield start, end - start
            start = end + 1
        position += len(chunk)
    if size > start and read(start, 2) != b"\r":
        yield start, size - start


# Matches whole strings (also a truncated one), so that brackets inside them do not count.
_MARKS = re.compile(rb'"(?:[^"\\]|\\.)*(?:"|\Z)|[\[\]{}]', re.DOTALL)
_VALUES = re.compile(rb'"(?:[^"\\]|\\.)*(?:"|\Z)|[^\s,"]+', re.DOTALL)


def _elements(content: bytes) -> Iterator[tuple[int, int]]:
    """Yields (offset, size) of each element of a list. An element that is not an object is only
    found to be malformed when it is read."""
    depth = start = 0
    after = content.find(b"[") + 1  # end of the last element
    for mark in _MARKS.finditer(content):
        kind = mark[0]
        if kind in (b"{", b"["):
            depth += 1
            if depth == 2:
                start = mark.start()
                yield from _values(content, after, start)
        elif kind in (b"}", b"]"):
            depth -= 1
            if depth == 1:
                after = mark.end()
                yield start, after - start
            elif depth == 0:
                yield from _values(content, after, mark.start())
    if depth > 1:
        yield start, len(content) - start  # cut short: one malformed object


def _values(content: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yields (offset, size) of the numbers, strings and nulls between objects of a list."""
    for value in _VALUES.finditer(content, start, end):
        yield value.start(), value.end() - value.start()
