"""Listings: the entries of JSON files, and the images and videos that they name, in folders or
tars."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from emu_jax.data import storage
from emu_jax.data.documents import Damaged, Source, short_hash, utf8
from emu_jax.data.sources.folders import SubFolders, stamp
from emu_jax.data.sources.formats import PACKED, check_format, check_twins, unpack
from emu_jax.data.sources.index import Arrays, cached_arrays, fingerprint, folder_for, index_files
from emu_jax.data.sources.tars import Reason, TarFiles, plain
from emu_jax.data.unused import Tally
from emu_jax.errors import UserError

_VERSION = "entries-2"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # half of a pair, escaped
_CHUNK = 1 << 26  # bytes read at once while scanning for line ends
# Exceptions raised by parsing a malformed entry without checking it first.
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, OverflowError)


class Entries:
    """The objects of JSON files, read in place: one a line, or all in one list.

    Files that end in .gz or .zip are unpacked once, into the cache.

    Attributes:
        fingerprint: a short hash of the files' names, sizes and times (see `Source`).
    """

    def __init__(self, paths: Sequence[str], cache: str) -> None:
        self.paths, self._cache = list(paths), cache
        check_twins(self.paths)
        self._content = functools.lru_cache(1024)(self._content)  # mapped content of packed files
        arrays = index_files(_VERSION, self.paths, self._scan, cache)
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
            Damaged: the entry is too large, not UTF-8, or not a JSON object.
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


def _objects_in(file: str | bytes) -> Arrays:
    """Finds the objects in a file, given by its path or its content."""
    if isinstance(file, bytes):
        size, read = len(file), lambda start, count: file[start : start + count]
    else:
        size, read = storage.stat(file).size, functools.partial(storage.read, file)
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


class Media:
    """Look-up of images and videos by name: in folders and their subfolders, or in tars.

    The path of a file must end in the whole name; in a tar, the name may also end in the whole
    path of the file. Tars are searched first, then the given folders in order, then everything
    below them. If several files in tars or subfolders match, none is taken.

    Args:
        paths: folders and tars; `*` matches anything in a name. Without any, names are relative
            to the folder of the listing.

    Raises:
        UserError: one of the paths does not exist.
    """

    def __init__(self, paths: Sequence[str], cache: str) -> None:
        matches = {path: media_paths(path) for path in paths}
        tars = [m for path in paths for m in matches[path] if m.endswith(".tar")]
        self._tars = TarFiles(tars, cache) if tars else None
        # Given folders are tried for each name, in order; those that `*` matched are only listed.
        listed = [
            folder
            for path in paths
            for folder in matches[path]
            if folder != path and not folder.endswith(".tar") and not storage.is_remote(folder)
        ]
        self._folders = [
            folder
            for path in paths
            for folder in matches[path]
            if folder not in listed and not folder.endswith(".tar")
        ]
        asked = [folder for folder in self._folders if not storage.is_remote(folder)]
        self._local = [*asked, *listed]
        self._below = SubFolders(asked, listed, cache) if self._local else None
        self._listings = storage.Listings()
        given = [path for path in paths if not path.endswith(".tar")]
        self.fingerprint = short_hash((given, self._tars and self._tars.fingerprint))

    @property
    def tally(self) -> Tally:
        """Counts the members of the tars that no document can name."""
        return self._tars.tally if self._tars else Tally()

    def stamp(self, beside: Iterable[str]) -> str:
        """Returns a stamp that changes when a file arrives in a local folder.

        Args:
            beside: folders of the listings.
        """
        folders = self._local or ([] if self._tars or self._folders else beside)
        return stamp([folder or "." for folder in folders if not storage.is_remote(folder)])

    def is_remote(self, beside: str) -> bool:
        """Returns whether each look-up is a request to a remote store."""
        return any(map(storage.is_remote, self._folders or ([] if self._tars else [beside])))

    def has(self, name: str, beside: str) -> bool:
        """Returns whether the file exists. `beside` is the folder of the listing."""
        return self.lacks(name, beside) is None

    def lacks(self, name: str, beside: str, *, listed: bool = False) -> Reason | None:
        """Returns why there is no such file, or None if there is one.

        Args:
            listed: look it up in a listing of its remote folder, which is made once. That is
                cheaper than a request each if most files of the folder are looked up.
        """
        try:
            location = self._find(name, beside, self._listings.stat if listed else storage.stat)
        except storage.Unreadable:  # it exists; reading it will raise
            return None
        return location if isinstance(location, str) else None

    def read(
        self, name: object, beside: str, where: str, max_bytes: int = storage.MOST_IMAGE
    ) -> bytes:
        """Reads a file by name. `beside` is the folder of the listing.

        Args:
            where: location of the entry, for error messages.
            max_bytes: size limit of the file, in bytes.

        Raises:
            Damaged: there is no such file, it is larger, or it is not a regular file.
        """
        if not isinstance(name, str):
            raise Damaged("malformed entry", where, f"{name!r} is not a file name")
        detail = name
        try:
            location = self._find(name, beside)
            if not isinstance(location, str):
                path, start, size = location
                if size > max_bytes:
                    raise Damaged("file too large", where, f"{name}: {size:,} bytes")
                return storage.read(path) if start is None else storage.read(path, start, size)
            if location == "ambiguous":
                detail = f"{name}: several files match"
        except storage.Unreadable as error:
            raise Damaged(error.reason, where, f"{name}: {error.detail}") from None
        except OSError as error:
            detail = f"{name}: {error.strerror}"
        raise Damaged("missing file", where, detail)

    def _find(
        self, name: str, beside: str, remote_stat: Callable[[str], storage.Stat] = storage.stat
    ) -> tuple[str, int | None, int] | Reason:
        """Returns (file, offset, size), or why there is none.

        The offset is None for a plain file, which is opened anew at each read because, unlike an
        archive, it may be replaced.

        Args:
            remote_stat: looks up each candidate path in a remote folder.
        """
        if not name or ".." in name.split("/"):  # never leave the given folders
            return "missing"
        location = self._tars.find(name) if self._tars else "missing"
        if location != "missing":
            return location
        name = plain(name) if not storage.is_remote(name) else ""
        if not name or "\0" in name:
            return "missing"
        for folder in self._folders or ([] if self._tars or self._below else [beside]):
            for path in _paths_in(folder, name):
                stat = remote_stat if storage.is_remote(path) else storage.stat
                try:
                    return path, None, stat(path).size
                except (OSError, ValueError):  # missing, or not a valid file name
                    continue
        below = self._below.find(name) if self._below else "missing"
        if below in ("missing", "ambiguous"):
            return below
        try:
            return below, None, storage.stat(below).size
        except OSError:  # a broken link, or deleted since the folder was listed
            return "missing"


def _paths_in(folder: str, name: str) -> Iterator[str]:
    """Yields candidate paths of a file in a folder: the name may repeat the end of the folder's
    path."""
    yield storage.join(folder, name)
    parts = name.split("/")
    for n in range(len(parts) - 1, 0, -1):
        if f"/{folder.rstrip('/')}".endswith("/" + "/".join(parts[:n])):
            yield storage.join(folder, "/".join(parts[n:]))


def media_paths(path: str) -> list[str]:
    """Returns the folders and tars that a path of `SourceConfig.media` matches.

    Raises:
        UserError: there are none.
    """
    if storage.is_dir(path):
        return [path]
    if storage.is_remote(path) and "*" in path and not path.endswith(".tar"):
        raise UserError(
            f"media {path}: in a store * stands for .tar files alone, for it would list every "
            f"image: name the folder, {storage.parent(path)}, or its tars, *.tar"
        )
    matches = storage.matches(path, [".tar"])
    media = [match for match in matches if match.endswith(".tar") or storage.is_dir(match)]
    if "*" in path:  # matched files stand for their folders
        media += sorted({storage.parent(match) for match in set(matches) - set(media)})
    if not media:
        raise UserError(
            f"media {path} is {'neither a folder nor a .tar' if matches else 'not there'}: "
            "correct the path"
        )
    return media


class Listed(Source):
    """A source whose documents are entries of listings, with the media that they name.

    Args:
        setting: settings that change the documents; part of the fingerprint.
    """

    def __init__(self, entries: Entries, media: Media, setting: object) -> None:
        self._entries, self._media = entries, media
        self.fingerprint = short_hash((_VERSION, entries.fingerprint, media.fingerprint, setting))

    def unused(self) -> Tally:
        return self._media.tally

    def stamp(self) -> str:
        return self._media.stamp({storage.parent(path) for path in self._entries.paths})

    def __len__(self) -> int:
        return len(self._entries)

    def where(self, index: int) -> str:
        return self._entries.where(index)

    def _require(self, name: object, index: int, suffixes: Iterable[str] = ()) -> None:
        """Checks, while tokens are counted, that a file exists. Remote folders are not checked:
        a file that is missing there is found when it is read.

        Args:
            suffixes: file suffixes that the name may omit.

        Raises:
            Damaged: there is no such file.
        """
        where, folder = self.where(index), self._entries.folder(index)
        if not isinstance(name, str):
            raise Damaged("malformed entry", where, f"{name!r} is not a file name")
        if self._media.is_remote(folder) or not (reason := self._media.lacks(name, folder)):
            return
        if not any(self._media.has(name + suffix, folder) for suffix in suffixes):
            raise Damaged(
                "missing file", where, name if reason == "missing" else f"{name}, {reason}"
            )
