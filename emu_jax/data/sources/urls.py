"""Names of downloaded images by URL, for listings that name images by URL, as OBELICS does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from emu_jax.data.sources.entries import Entries
from emu_jax.data.sources.formats import PARQUET
from emu_jax.data.sources.index import Arrays, cached_arrays, fingerprint, folder_for, index_files
from emu_jax.data.sources.parquet import columns_in
from emu_jax.data.sources.tars import hashed, indices_of
from emu_jax.data.unused import Tally
from emu_jax.errors import UserError

UNDOWNLOADED = "URL without a file"
_VERSION = "urls-1"
_NAMES = ("file", "file_name", "path", "key")  # columns with a file's name; the first that exists
_COLUMNS = ("url", "status", *_NAMES)
_SUFFIXES = (".jpg", ".png", ".webp", ".jpeg")  # that img2dataset adds to a key, in this order


class UrlFiles:
    """Look-up of file names by URL.

    A listing, JSON lines or Parquet, has `url` with `file` (or `file_name`, `path`), or with `key`,
    the name without a suffix, as in the metadata that img2dataset writes. If there is a `status`,
    only rows of status "success" count. Of several rows with one URL, the first counts.

    URLs are stored as sorted 64-bit hashes, in a mapped file.

    Attributes:
        tally: counts of rows that name no file.

    Raises:
        UserError: a listing is damaged or lacks these columns.
    """

    def __init__(self, paths: list[str], cache: str) -> None:
        self.fingerprint = fingerprint(_VERSION, paths)
        folder, name = folder_for(paths[0], cache), f"{_VERSION}-{self.fingerprint}-sorted"
        arrays = cached_arrays(
            folder,
            name,
            lambda: _sorted(index_files(_VERSION, paths, lambda p: _files_in(p, cache), cache)),
        )
        self._urls, self._starts, self._sizes = arrays["url"], arrays["start"], arrays["size"]
        self._text = arrays["text"]
        self.tally = Tally.from_array(arrays["tally"])

    def names(self, url: str) -> list[str]:
        """Returns the names that the file of a URL may have, [] if it was not downloaded."""
        matches = indices_of(self._urls, hashed(url))
        if not matches:
            return []
        start, size = int(self._starts[matches[0]]), int(self._sizes[matches[0]])
        name = self._text[start : start + size].tobytes().decode("utf-8", "surrogateescape")
        if "." in name.rpartition("/")[2]:
            return [name]
        return [name + suffix for suffix in _SUFFIXES]


def _files_in(path: str, cache: str) -> Arrays:
    tally = Tally()
    urls, names = list[np.uint64](), list[bytes]()
    for url, name in _pairs_in(path, cache):
        if isinstance(url, str) and isinstance(name, str) and name:
            urls.append(hashed(url))
            names.append(name.encode("utf-8", "surrogateescape"))
        elif tally.leave(UNDOWNLOADED):
            tally.example(UNDOWNLOADED, f"{path}: {url}")
    return {
        "url": np.array(urls, np.uint64),
        "size": np.array([len(name) for name in names], np.int32),
        "text": np.frombuffer(b"".join(names), np.uint8),
        "tally": tally.to_array(),
    }


def _pairs_in(path: str, cache: str) -> Iterator[tuple[Any, Any]]:
    """Yields (URL, name) of each row of a listing; a name is None if it was not downloaded."""
    if path.endswith(PARQUET):
        groups: Iterator[dict[str, list[Any]]] = columns_in(path, _COLUMNS)
    else:
        entries = Entries([path], cache)
        rows = (entries[n] for n in range(len(entries)))
        groups = ({key: [value] for key, value in row.items()} for row in rows)
    for columns in groups:
        key = next((key for key in _NAMES if key in columns), None)
        if key is None or "url" not in columns:
            raise UserError(
                f"{path} has no columns `url` and `file` or `key`: name the files that map URLs to "
                "files in url_files"
            )
        count = len(columns["url"])
        status = columns.get("status", ["success"] * count)
        for url, name, result in zip(columns["url"], columns[key], status, strict=True):
            yield url, name if result == "success" else None


def _sorted(arrays: Arrays) -> Arrays:
    starts = np.cumsum(arrays["size"], dtype=np.int64) - arrays["size"]
    order = np.argsort(arrays["url"], kind="stable")  # so that the first of equal URLs counts
    return {
        "url": arrays["url"][order],
        "start": starts[order],
        "size": arrays["size"][order],
        "text": arrays["text"],
        "tally": arrays["tally"],
    }
