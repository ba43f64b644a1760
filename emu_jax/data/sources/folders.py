"""Look-up of files by name in subfolders: downloaders write one subfolder a shard."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from emu_jax.data.documents import short_hash
from emu_jax.data.sources.index import Arrays, cached_arrays, folder_for
from emu_jax.data.sources.tars import Reason, hashed, indices_of, suffixes

_VERSION = "folders-1"


class MediaFolder(NamedTuple):
    """A local folder found by `walk`."""

    path: str
    changed: int  # modification time in nanoseconds: when a name was last added or removed


def walk(folders: Sequence[str]) -> Iterator[MediaFolder]:
    """Yields local folders and all folders below them except hidden ones, in a fixed order."""
    seen: set[tuple[int, int]] = set()
    waiting = list(reversed(folders))
    while waiting:
        path = waiting.pop()
        try:
            status = os.stat(path)
            with os.scandir(path) as entries:
                below = sorted(entry.path for entry in entries if _is_folder(entry))
        except OSError:  # deleted, or not readable: its files count as missing
            continue
        if (status.st_dev, status.st_ino) in seen:  # a cycle of links
            continue
        seen.add((status.st_dev, status.st_ino))
        yield MediaFolder(path, status.st_mtime_ns)
        waiting += reversed(below)


def _is_folder(entry: os.DirEntry) -> bool:
    return not entry.name.startswith(".") and entry.is_dir()


def stamp(folders: Sequence[str]) -> str:
    """Returns a hash of local folders and all below them; it changes when a file arrives."""
    return short_hash([(folder.path, folder.changed) for folder in walk(sorted(folders))])


class SubFolders:
    """Look-up of files below local folders.

    A path is compared up to two folders above the given ones. File names are listed at the first
    look-up, and cached as sorted hashes until a folder changes.

    Args:
        only_below: folders whose subfolders are searched, but not the folders themselves.
        others: folders that are searched with their subfolders.
    """

    def __init__(self, only_below: Sequence[str], others: Sequence[str], cache: str) -> None:
        self._only_below, self._cache = set(only_below), cache
        self._roots = [*others, *only_below]
        self._lock = threading.Lock()
        self._arrays: Arrays | None = None
        self._folders: list[str] = []

    def find(self, name: str) -> str | Reason:
        """Returns the path of the file whose path ends in `/name`, or why there is none."""
        arrays = self._open()
        if not self._folders:
            return "missing"
        hits = indices_of(arrays["name"], hashed(name))
        if len(hits) != 1:
            return "ambiguous" if hits else "missing"
        return os.path.join(self._folders[arrays["folder"][hits[0]]], os.path.basename(name))

    def _open(self) -> Arrays:
        with self._lock:
            if self._arrays is None:
                folders = [f for f in walk(self._roots) if f.path not in self._only_below]
                self._folders = [folder.path for folder in folders]
                key = short_hash([(folder.path, folder.changed) for folder in folders])
                where = folder_for(self._roots[0].rstrip("/"), self._cache)
                self._arrays = (
                    cached_arrays(where, f"{_VERSION}-{key}", self._list) if folders else {}
                )
            return self._arrays

    def _list(self) -> Arrays:
        names, numbers = [], []
        roots = {root.rstrip("/") for root in self._roots}  # a set: there may be one a shard
        for number, folder in enumerate(self._folders):
            root = folder.rstrip("/")
            depth = 2
            while root not in roots:
                root, depth = os.path.dirname(root).rstrip("/"), depth + 1
            above = "/".join(folder.rstrip("/").split("/")[-depth:])
            with os.scandir(folder) as entries:
                hashes = [
                    hashed(below)
                    for entry in entries
                    if not entry.is_dir()
                    for below in suffixes(f"{above}/{entry.name}")
                ]
            names.append(np.array(hashes, np.uint64))
            numbers.append(np.full(len(hashes), number, np.int32))
        name, folder = np.concatenate(names), np.concatenate(numbers)
        order = np.argsort(name, kind="stable")
        return {"name": name[order], "folder": folder[order]}
