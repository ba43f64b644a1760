"""What listings and documents name: entries of JSON files, and the pictures and videos beside
them, in folders or in tars."""

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
from emu_jax.data.documents import Damaged, Source, short_hash, utf8
from emu_jax.data.formats import PACKED, check_format, check_twins, unpack
from emu_jax.data.index import Arrays, fingerprint, folder_for, index_files, kept
from emu_jax.data.tars import TarFiles

_VERSION = "entries-1"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # half of a pair, escaped
_CHUNK = 1 << 26  # of a file of lines, while looking for their ends


class Entries:
    """The objects of JSON files, read where they lie: one on each line, or in one list.

    Files that end in .gz or .zip are unpacked once, into the cache.

    Attributes:
        fingerprint: as a source's.
    """

    def __init__(self, paths: Sequence[str], cache: str):
        self.paths, self._cache = list(paths), cache
        check_twins(self.paths)
        self._content = functools.lru_cache(1024)(self._content)  # mapped, of packed files
        found = index_files(_VERSION, self.paths, self._scan, cache)
        self._files, self._offsets, self._sizes = found["file"], found["offset"], found["size"]
        self._numbers = found["number"]
        self.fingerprint = fingerprint(_VERSION, self.paths)

    def __len__(self) -> int:
        return len(self._files)

    def where(self, index: int) -> str:
        return f"{self.paths[self._files[index]]} entry {self._numbers[index]}"

    def folder(self, index: int) -> str:
        """The folder of an entry's file."""
        return storage.parent(self.paths[self._files[index]])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        Raises:
            Damaged: it is not UTF-8, or no JSON object.
        """
        path, size = self.paths[self._files[index]], int(self._sizes[index])
        if size > storage.MOST_ENTRY:
            raise Damaged("file too large", self.where(index), f"an entry of {size:,} bytes")
        start = int(self._offsets[index])
        if path.endswith(PACKED):
            content = self._content(path)[start : start + size].tobytes()
        else:
            content = storage.read(path, start, size)
        return parse_object(content, self.where(index))

    def _scan(self, path: str) -> Arrays:
        if path.endswith(PACKED):
            return _objects_in(np.asarray(self._content(path)).tobytes())
        check_format(path)
        return _objects_in(path)

    def _content(self, path: str) -> UInt8[np.ndarray, "bytes"]:
        name = f"{os.path.basename(path)}-{fingerprint('unpacked-1', [path])}"
        made = kept(folder_for(path, self._cache), name, lambda: unpack(path), eager=0)
        return made["content"]


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """
    Raises:
        Damaged: it is not UTF-8, or no JSON object.
    """
    try:
        value = json.loads(utf8(content, where))
    except (ValueError, RecursionError) as error:
        raise Damaged("malformed JSON", where, error) from None
    if _SURROGATE.search(content):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Damaged("invalid UTF-8", where, "half of a surrogate pair") from None
    if not isinstance(value, dict):
        raise Damaged("malformed JSON", where, "no object")
    return value


def _objects_in(file: str | bytes) -> Arrays:
    """Where the objects lie in a file, given by its path or its content."""
    if isinstance(file, bytes):
        size, read = len(file), lambda start, count: file[start : start + count]
    else:
        size, read = storage.stat(file).size, functools.partial(storage.read, file)
    head = read(0, 4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    spans = list(_elements(read(0, size)) if head.startswith(b"[") else _lines(read, size))
    offsets, sizes = np.array(spans, np.int64).reshape(-1, 2).T
    return {"offset": offsets, "size": sizes, "number": np.arange(len(spans))}


def _lines(read: Callable[[int, int], bytes], size: int) -> Iterator[tuple[int, int]]:
    """(offset, size) of each line that holds something."""
    start, position = 0, 0
    while position < size:
        chunk = read(position, _CHUNK)
        for end in (np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + position).tolist():
            if end > start + 1:  # a lone \r is as good as nothing
                yield start, end - start
            start = end + 1
        position += len(chunk)
    if size > start + 1:
        yield start, size - start


# Strings whole, so that a bracket within one counts for nothing; also one that is cut short.
_MARKS = re.compile(rb'"(?:[^"\\]|\\.)*(?:"|\Z)|[\[\]{}]', re.DOTALL)


def _elements(content: bytes) -> Iterator[tuple[int, int]]:
    """(offset, size) of each object of a list."""
    depth = start = 0
    for mark in _MARKS.finditer(content):
        kind = mark[0]
        if kind in (b"{", b"["):
            depth += 1
            if depth == 2:
                start = mark.start()
        elif kind in (b"}", b"]"):
            depth -= 1
            if depth == 1:
                yield start, mark.end() - start
    if depth > 1:
        yield start, len(content) - start  # cut short: one malformed object


class Media:
    """Pictures and videos by name: in folders, or in tars wherever they lie in them.

    Args:
        paths: folders and tars; without any, names are relative to the listing's own folder.
    """

    def __init__(self, paths: Sequence[str], cache: str):
        self._folders = [p for p in paths if not p.endswith(".tar")]
        tars = [p for p in paths if p.endswith(".tar")]
        self._tars = TarFiles(storage.expand(tars, [".tar"]), cache) if tars else None
        self.fingerprint = short_hash((self._folders, self._tars and self._tars.fingerprint))

    def has(self, name: str, beside: str) -> bool:
        """Whether there is such a file. `beside` is the folder of the listing."""
        return self._find(name, beside) is not None

    def read(
        self, name: object, beside: str, where: str, most: int = storage.MOST_IMAGE
    ) -> bytes:  # fmt: skip
        """
        Args:
            most: bytes that the file may hold.

        Raises:
            Damaged: there is no such file, it is larger, or it is not a regular file.
        """
        if not isinstance(name, str):
            raise Damaged("malformed entry", where, f"{name!r} is no file's name")
        detail = name
        try:
            if (found := self._find(name, beside)) is not None:
                path, start, size = found
                length = storage.stat(path).size if size is None else size
                if length > most:
                    raise Damaged("file too large", where, f"{name}: {length:,} bytes")
                return storage.read(path, start, size)
        except storage.Unreadable as error:
            raise Damaged(error.reason, where, f"{name}: {error.detail}") from None
        except OSError as error:
            detail = f"{name}: {error.strerror}"
        raise Damaged("missing file", where, detail)

    def _find(self, name: str, beside: str) -> tuple[str, int, int | None] | None:
        if not name or ".." in name.split("/"):  # nothing outside the folders that were named
            return None
        if self._tars is not None and (found := self._tars.find(name)) is not None:
            return found
        folders = self._folders or ([] if self._tars else [beside])
        for folder in folders:
            path = storage.join(folder, name.lstrip("/"))
            try:
                if not storage.is_remote(name) and storage.exists(path):
                    return path, 0, None
            except (OSError, ValueError):  # no file can have such a name
                continue
        return None


class Listed(Source):
    """Documents that are the entries of listings, and the media that they name.

    Args:
        setting: what the documents depend on beside the files.
    """

    def __init__(self, entries: Entries, media: Media, setting: object):
        self._entries, self._media = entries, media
        self.fingerprint = short_hash((entries.fingerprint, media.fingerprint, setting))

    def __len__(self) -> int:
        return len(self._entries)

    def where(self, index: int) -> str:
        return self._entries.where(index)
