"""The images and videos that listings name, in folders or tars, and the sources made of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from emu_jax.data import storage
from emu_jax.data.documents import Damaged, Source, short_hash
from emu_jax.data.sources.entries import Entries
from emu_jax.data.sources.folders import SubFolders, stamp
from emu_jax.data.sources.tars import Reason, TarFiles, plain
from emu_jax.data.sources.urls import UrlFiles
from emu_jax.data.unused import Tally
from emu_jax.errors import UserError

T = TypeVar("T")
_VERSION = "entries-2"


class Media:
    """Look-up of images and videos by name: in folders and their subfolders, or in tars.

    The path of a file must end in the whole name; in a tar, the name may also end in the whole
    path of the file. Tars are searched first, then the given folders in order, then everything
    below them. If several files in tars or subfolders match, none is taken.

    Args:
        paths: folders and tars; `*` matches anything in a name. Without any, names are relative
            to the folder of the listing.
        urls: names of files by URL; a name that is a URL is looked up there first.

    Raises:
        UserError: one of the paths does not exist.
    """

    def __init__(self, paths: Sequence[str], cache: str, urls: UrlFiles | None = None) -> None:
        self._urls = urls
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
        if urls is not None:
            self.fingerprint = short_hash((self.fingerprint, urls.fingerprint))

    @property
    def by_url(self) -> bool:
        """True if files can be looked up by URL."""
        return self._urls is not None

    @property
    def tally(self) -> Tally:
        """Counts the members of the tars that no document can name, and the URLs without a file."""
        tally = Tally()
        for files in (self._tars, self._urls):
            if files is not None:
                tally.merge(files.tally)
        return tally

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

        def whole(path: str, start: int | None, size: int) -> bytes:
            return storage.read(path) if start is None else storage.read(path, start, size)

        return self._used(whole, name, beside, where, max_bytes)

    def open(self, name: object, beside: str, where: str, max_bytes: int) -> storage.RangeFile:
        """Opens a file by name, to be read in pieces; see `read`."""
        return self._used(
            lambda path, start, size: storage.RangeFile(path, start or 0, size),
            name,
            beside,
            where,
            max_bytes,
        )

    def _used(
        self,
        use: Callable[[str, int | None, int], T],
        name: object,
        beside: str,
        where: str,
        max_bytes: int,
    ) -> T:
        """Returns `use(file, offset, size)` of a name (see `_find`)."""
        if not isinstance(name, str):
            raise Damaged("malformed entry", where, f"{name!r} is not a file name")
        detail = name
        try:
            location = self._find(name, beside)
            if not isinstance(location, str):
                path, start, size = location
                if size > max_bytes:
                    raise Damaged("file too large", where, f"{name}: {size:,} bytes")
                return use(path, start, size)
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
        """Returns (file, offset, size), or why there is none. A URL stands for the file that it
        was downloaded to.

        The offset is None for a plain file, which is reopened at each read because, unlike an
        archive, it may be replaced.

        Args:
            remote_stat: looks up each candidate path in a remote folder.
        """
        if self._urls is not None and storage.is_remote(name):
            for candidate in self._urls.names(name):
                location = self._locate(candidate, beside, remote_stat)
                if location != "missing":
                    return location
            return "missing"
        return self._locate(name, beside, remote_stat)

    def _locate(
        self, name: str, beside: str, remote_stat: Callable[[str], storage.Stat]
    ) -> tuple[str, int | None, int] | Reason:
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
    yield storage.resolve(folder, name)
    parts = name.split("/")
    for n in range(len(parts) - 1, 0, -1):
        if f"/{folder.rstrip('/')}".endswith("/" + "/".join(parts[:n])):
            yield storage.resolve(folder, "/".join(parts[n:]))


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

    def metadata(self, index: int) -> dict[str, Any]:
        return self._entries[index]

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
