"""Tar archives read in place, with an index of their members made by walking the headers once."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import UInt64

from emu_jax.data import storage
from emu_jax.data.sources.formats import check_format
from emu_jax.data.sources.index import Arrays, cached_arrays, fingerprint, folder_for, index_files
from emu_jax.data.unused import Tally

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 16  # bytes read at once while walking
_REMOTE_CHUNK = 1 << 22  # the same in a store, where a request takes as long as megabytes
_VERSION = "names-2"  # of the cached index
_FILE_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_SKIPPED_TYPES = (tarfile.DIRTYPE, tarfile.XGLTYPE)


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    offset: int  # of its content
    size: int
    whole: bool  # False: its header is corrupt (then it has no name), or the archive is truncated
    archive: int = 0  # number of the archive in a file of several concatenated ones


def members(path: str, first: int = 0, end: int | None = None) -> Iterator[Member]:
    """Yields the files of a tar in order, with PAX headers and GNU long names. Members without
    content, such as links, are empty.

    A run of corrupt headers gives one `Member` that is not whole; the walk continues at the next
    readable header.

    Args:
        first, end: byte range of the tar that is read; it begins with a header.
    """
    if end is None:
        check_format(path)
    size = storage.stat(path).size if end is None else end
    read = _Reader(path, size)
    offset, pax, sound = first, {}, True
    archive, ended = 0, False
    while offset + _BLOCK <= size:
        block = read(offset, _BLOCK)
        if not block.strip(b"\0"):  # the end, or a gap between concatenated archives
            offset, sound, ended = offset + _BLOCK, True, True
            continue
        archive, ended = archive + ended, False
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            length = int(pax.get("size", header.size))
            if not 0 <= length < 1 << 63:
                raise ValueError(length)
        except (tarfile.HeaderError, ValueError):
            if sound:
                yield Member("", offset, 0, False, archive)
            offset, pax, sound = offset + _BLOCK, {}, False
            continue
        sound = True
        start = offset + _BLOCK
        if header.type == tarfile.XHDTYPE:
            pax |= _pax(read(start, min(length, size - start)))
        elif header.type == tarfile.GNUTYPE_LONGNAME:
            name = read(start, min(length, size - start)).rstrip(b"\0")
            pax["path"] = name.decode("utf-8", "surrogateescape")
        elif header.type != tarfile.GNUTYPE_LONGLINK:
            name = pax.get("path", header.name)
            if header.type in _FILE_TYPES:
                yield Member(name, start, length, start + length <= size, archive)
            elif header.type not in _SKIPPED_TYPES:
                yield Member(name, start, 0, True, archive)
            pax = {}
        offset = start + -(-length // _BLOCK) * _BLOCK
    if 0 < size < _BLOCK or (size % _BLOCK and offset < size):
        yield Member("", offset, 0, False, archive)


def _pax(content: bytes) -> dict[str, str]:
    """Parses PAX records, `LENGTH KEY=VALUE\\n`, up to the first malformed one."""
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
    """Buffers small sequential reads of a file, none of them beyond `end`."""

    def __init__(self, path: str, end: int) -> None:
        self._path, self._end, self._start, self._content = path, end, 0, b""
        self._chunk = _REMOTE_CHUNK if storage.is_remote(path) else _CHUNK

    def __call__(self, offset: int, size: int) -> bytes:
        first = offset - self._start
        if first < 0 or first + size > len(self._content):
            self._start, first = offset, 0
            count = min(max(size, self._chunk), self._end - offset)
            self._content = storage.read_part(self._path, offset, count) if count else b""
        return self._content[first : first + size]


class TarFiles:
    """Look-up of files in archives by name.

    Names are stored as sorted 64-bit hashes, so that a hundred million of them are a mapped file
    rather than a dictionary.

    Attributes:
        tally: counts of members that cannot be found: corrupt ones, and those replaced by a later
            member of the same archive and name.
    """

    def __init__(self, paths: list[str], cache: str) -> None:
        self.paths = paths
        self.fingerprint = fingerprint(_VERSION, paths)
        folder, name = folder_for(paths[0], cache), f"{_VERSION}-{self.fingerprint}-sorted"
        arrays = cached_arrays(
            folder, name, lambda: _sorted(index_files(_VERSION, paths, _names_in, cache))
        )
        self._names, self._files, self._paths = arrays["name"], arrays["file"], arrays["path"]
        self._offsets, self._sizes = arrays["offset"], arrays["size"]
        self.tally = Tally.from_array(arrays["tally"])

    def find(self, name: str) -> tuple[str, int, int] | Reason:
        """Returns (archive, offset, size) of a file, or why there is none.

        Its path is `name`, or else ends in `/name`, or else `name` ends in `/path`. A file of the
        same base name in another folder never matches.
        """
        name = plain(name)
        whole = hashed(name)
        for below in suffixes(name):
            key = hashed(below)
            matches = indices_of(self._names, key)
            # The whole name may be the end of a longer path; its shorter endings must be a path.
            exact = [n for n in matches if self._paths[n] in (whole, key)]
            matches = exact or (matches if below == name else [])
            # The same file may lie in several archives.
            if len({(int(self._paths[n]), int(self._sizes[n])) for n in matches}) > 1:
                return "ambiguous"
            if matches:
                n = matches[0]
                return self.paths[self._files[n]], int(self._offsets[n]), int(self._sizes[n])
        return "missing"


def index_tar(path: str, cache: str) -> None:
    """Caches the names of a tar's members, unless they are cached."""
    index_files(_VERSION, [path], _names_in, cache)


Reason = Literal["missing", "ambiguous"]
_DEEPEST = 8  # trailing components of a path that are compared
_ALIKE = 64  # most candidates with the same hash that are examined


def plain(name: str) -> str:
    """Returns a file's name without `.` and empty components."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def suffixes(name: str) -> list[str]:
    """Returns the endings of a path of whole components, the longest first."""
    parts = name.split("/")[-_DEEPEST:]
    return ["/".join(parts[n:]) for n in range(len(parts))]


def hashed(name: str) -> np.uint64:
    """Returns the 64-bit hash under which a name is stored."""
    content = name.encode("utf-8", "surrogateescape")
    return np.frombuffer(hashlib.blake2b(content, digest_size=8).digest(), np.uint64)[0]


def indices_of(names: UInt64[np.ndarray, "names"], name: np.uint64) -> list[int]:
    """Returns the indices of a hash in sorted hashes, at most `_ALIKE` of them."""
    first = int(np.searchsorted(names, name))
    return [n for n in range(first, min(first + _ALIKE, len(names))) if names[n] == name]


def _sorted(arrays: Arrays) -> Arrays:
    tally = arrays.pop("tally")
    order = np.argsort(arrays["name"], kind="stable")
    return {key: array[order] for key, array in arrays.items()} | {"tally": tally}


def _names_in(path: str) -> Arrays:
    tally = Tally()
    by_name: dict[str, Member] = {}
    for member in members(path):
        if not member.whole:
            note(tally, "corrupt tar member", path, member.name)
            continue
        name = plain(member.name)
        if by_name.pop(name, None) is not None:
            note(tally, "duplicate member", path, name)
        by_name[name] = member
    entries = [
        (below, name, member) for name, member in by_name.items() for below in suffixes(name)
    ]
    return {
        "name": np.array([hashed(below) for below, _, _ in entries], np.uint64),
        "path": np.array([hashed(name) for _, name, _ in entries], np.uint64),
        "offset": np.array([member.offset for _, _, member in entries], np.int64),
        "size": np.array([member.size for _, _, member in entries], np.int64),
        "tally": tally.to_array(),
    }


def note(tally: Tally, reason: str, path: str, name: str) -> None:
    """Counts a member of an archive that is left out."""
    if tally.leave(reason):
        tally.example(reason, f"{path} member {name!r}" if name else path)
