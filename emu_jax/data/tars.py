"""Tar archives read in place: where each member lies, found once by walking the headers."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from emu_jax.data import storage
from emu_jax.data.formats import check_format
from emu_jax.data.index import Arrays, fingerprint, folder_for, index_files, kept

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 16  # read at once while walking
_VERSION = "names-1"  # of what is kept of an archive's names
_KINDS = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    offset: int  # of its content
    size: int
    whole: bool  # False: its header is corrupt (no name then), or the archive ends within it


def members(path: str) -> Iterator[Member]:
    """The files of a tar, in order; with PAX headers and GNU long names.

    At a corrupt header one `Member` that is not whole stands for what cannot be told, and the
    walk goes on at the next header that can be read.
    """
    check_format(path)
    size = storage.stat(path).size
    read = _Reader(path)
    offset, pax, sound = 0, {}, True
    while offset + _BLOCK <= size:
        block = read(offset, _BLOCK)
        if not block.strip(b"\0"):  # the end, or between archives one after the other
            offset, sound = offset + _BLOCK, True
            continue
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            length = int(pax.get("size", header.size))
            if not 0 <= length < 1 << 63:
                raise ValueError(length)
        except (tarfile.HeaderError, ValueError):
            if sound:
                yield Member("", offset, 0, False)
            offset, pax, sound = offset + _BLOCK, {}, False
            continue
        sound = True
        start = offset + _BLOCK
        if header.type == tarfile.XHDTYPE:
            pax |= _pax(read(start, min(length, size - start)))
        elif header.type == tarfile.GNUTYPE_LONGNAME:
            name = read(start, min(length, size - start)).rstrip(b"\0")
            pax["path"] = name.decode("utf-8", "surrogateescape")
        else:
            if header.type in _KINDS:
                yield Member(pax.get("path", header.name), start, length, start + length <= size)
            pax = {}
        offset = start + -(-length // _BLOCK) * _BLOCK
    if 0 < size < _BLOCK or (size % _BLOCK and offset < size):
        yield Member("", offset, 0, False)


def _pax(content: bytes) -> dict[str, str]:
    """`LENGTH KEY=VALUE\\n`, again and again; what is not so ends it."""
    values = {}
    while content:
        length, _, _ = content.partition(b" ")
        if not length.isdigit() or int(length) <= len(length) + 1:
            break
        record = content[len(length) + 1 : int(length) - 1]
        key, _, value = record.decode("utf-8", "surrogateescape").partition("=")
        values[key] = value
        content = content[int(length) :]
    return values


class _Reader:
    """Small reads that follow each other, from larger ones."""

    def __init__(self, path: str):
        self._path, self._start, self._content = path, 0, b""

    def __call__(self, offset: int, size: int) -> bytes:
        first = offset - self._start
        if first < 0 or first + size > len(self._content):
            self._start, first = offset, 0
            self._content = storage.read(self._path, offset, max(size, _CHUNK))
        return self._content[first : first + size]


class TarFiles:
    """Files in archives, found by name; the last part of a name suffices.

    Names are kept as 64-bit hashes in order, so that a hundred million of them are a mapped
    file rather than a dictionary.
    """

    def __init__(self, paths: list[str], cache: str):
        self.paths = paths
        self.fingerprint = fingerprint(_VERSION, paths)
        folder, name = folder_for(paths[0], cache), f"{_VERSION}-{self.fingerprint}-sorted"
        found = kept(folder, name, lambda: _sorted_names(paths, cache))
        self._names, self._files = found["name"], found["file"]
        self._offsets, self._sizes = found["offset"], found["size"]

    def find(self, name: str) -> tuple[str, int, int] | None:
        """(archive, offset, size) of a file; None if there is none."""
        for known in (name, name.rpartition("/")[2]):
            place = int(np.searchsorted(self._names, _hash(known)))
            if place < len(self._names) and self._names[place] == _hash(known):
                file = self.paths[self._files[place]]
                return file, int(self._offsets[place]), int(self._sizes[place])
        return None


def _hash(name: str) -> np.uint64:
    content = name.encode("utf-8", "surrogateescape")
    return np.frombuffer(hashlib.blake2b(content, digest_size=8).digest(), np.uint64)[0]


def _sorted_names(paths: list[str], cache: str) -> Arrays:
    found = index_files(_VERSION, paths, _names_in, cache)
    order = np.argsort(found["name"], kind="stable")
    return {key: array[order] for key, array in found.items()}


def _names_in(path: str) -> Arrays:
    whole = [m for m in members(path) if m.whole]
    entries = [(n, m) for m in whole for n in dict.fromkeys((m.name, m.name.rpartition("/")[2]))]
    return {
        "name": np.array([_hash(n) for n, _ in entries], np.uint64),
        "offset": np.array([m.offset for _, m in entries], np.int64),
        "size": np.array([m.size for _, m in entries], np.int64),
    }
