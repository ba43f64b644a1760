"""The configuration of a source, and the table of supported formats.

A source reads its files in place. The index of its documents (offsets in a tar, lines of a
listing) is built once, without decoding an image, and cached (`index.py`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from emu_jax.data import storage
from emu_jax.data.documents import DocumentFiles, Source, count_records
from emu_jax.data.file_cache import CACHE_BYTES, FileCache
from emu_jax.data.sources.dialogues import Dialogues
from emu_jax.data.sources.entries import Entries
from emu_jax.data.sources.formats import PACKED, PARQUET, check_format
from emu_jax.data.sources.index import Arrays, NotIndexed, index_files
from emu_jax.data.sources.listings import Media, media_paths
from emu_jax.data.sources.pages import Pages
from emu_jax.data.sources.pairs import Pairs, TfdsPairs
from emu_jax.data.sources.urls import UrlFiles
from emu_jax.data.sources.videos import SubtitledVideos, Videos
from emu_jax.errors import UserError, suggest

# Local ArrayRecord files of fewer bytes are opened with their source. Opening a file reads the
# offsets of all its records: 20 bytes of memory each.
_COUNTED_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture: its files, format and weight."""

    name: str = ""  # in messages, metrics and lists of documents; must be unique
    format: str = "records"  # see FORMATS
    paths: tuple[str, ...] = ()  # files or folders, local or gs://; `*` matches within a name
    # Folders or tars with the images and videos that listings name; by default relative to the
    # listing.
    media: tuple[str, ...] = ()
    # Listings that map the URLs of images to the names of files in `media`: `url` with `file`, or
    # with `key` as in img2dataset's metadata. For listings that name images by URL (OBELICS).
    url_files: tuple[str, ...] = ()
    # Fraction of the documents among sources packed together; otherwise see `DataConfig`.
    weight: float = 1.0
    # Batches of its own, instead of rows shared with other sources; 0: as in `DataConfig`.
    batch_size: int = 0
    row_tokens: int = 0
    row_images: int = 0

    paired: bool = False  # records: images with captions, whose order is random
    # Tokens read of a longer document, at a random place; 0: as many as fit in a row, from its
    # beginning.
    window_tokens: int = 0
    window_images: int = 5  # images kept in a window: the first ones
    # Instead of a window: number of random images, each with the text that follows it.
    picked_images: int = 0
    min_similarity: float = 0.32  # pages: of an image to its text, if known
    frames: int = 8  # videos, dialogues, webdataset: frames of each video
    frame_seconds: float = 4.0  # subtitled: seconds between the frames of a video
    # dialogues: the system message of those without one; null: Emu1's for their images or videos.
    system: str | None = None
    # webdataset: key of the caption in a sample's JSON, nested with dots (yt_meta_dict.info.title);
    # by default NAME.txt, or else the keys that img2dataset and LAION use.
    caption_key: str = ""
    # Kinds of parts that the whole source may lack: "images", "texts". For other kinds it is an
    # error if none is left. With "texts", pairs without a caption are images alone.
    allow_missing: tuple[str, ...] = ()


def open_source(cfg: SourceConfig, cache: str = "", cache_bytes: int = CACHE_BYTES) -> Source:
    """Opens the source that `cfg` describes.

    Args:
        cache: folder of its indexes; by default beside its files. Copies of remote files that
            cannot be read in place are there too.
        cache_bytes: most bytes of such copies.

    Raises:
        UserError: the format is unknown, or the files are missing or cannot be read.
    """
    paths = find_files(cfg)
    make, _ = FORMATS[cfg.format]
    try:
        return make(cfg, paths, cache, FileCache.at(cache, cache_bytes))
    except UserError as error:
        raise UserError(f"source {cfg.name!r}: {error}") from None


def find_files(cfg: SourceConfig) -> list[str]:
    """Returns the files of a source, without opening them.

    Raises:
        UserError: the format is unknown, or there is no file.
    """
    if cfg.format not in FORMATS:
        close = suggest(cfg.format, FORMATS)
        raise UserError(f"source {cfg.name!r}: unknown format {cfg.format!r}{close}")
    _, suffixes = FORMATS[cfg.format]
    try:
        return _expand(cfg.paths, suffixes) if suffixes else list(cfg.paths)
    except UserError as error:
        raise UserError(f"source {cfg.name!r}: {error}") from None


def _expand(paths: Sequence[str], suffixes: tuple[str, ...]) -> list[str]:
    """Expands paths to files. The Parquet files of a folder are read if it has no other listing,
    since they may be its origin.

    Raises:
        UserError: see `storage.expand`.
    """
    if suffixes != _JSON or not paths:
        return storage.expand(paths, suffixes)
    found = []
    for path in paths:
        named = path.endswith((*_JSON, PARQUET)) or storage.matches(path, _JSON)
        found += storage.expand([path], _JSON if named else (*_JSON, PARQUET))
    return found


def missing_files(cfg: SourceConfig) -> list[str]:
    """Returns a line for each path of a source that cannot be read: it is missing, or the first of
    its files is in another format. Reads no more of a file than its first bytes."""
    if cfg.format not in FORMATS:
        close = suggest(cfg.format, FORMATS)
        return [f"source {cfg.name!r}: unknown format {cfg.format!r}{close}"]
    suffixes = FORMATS[cfg.format][1]
    problems = []

    def check(run: Callable[[], object]) -> None:
        try:
            run()
        except (UserError, OSError) as error:
            problems.append(f"source {cfg.name!r}: {error}")

    def check_path(path: str) -> None:
        first = _expand([path], suffixes)[0]
        if not first.endswith((*PACKED, *RECORDS, PARQUET)):
            check_format(first)

    if not cfg.paths:
        problems.append(f"source {cfg.name!r}: no paths are given")
    for path in cfg.paths if suffixes else ():
        check(lambda path=path: check_path(path))
    for path in cfg.media if suffixes == _JSON else ():  # other formats name no media
        check(lambda path=path: media_paths(path))
    for path in cfg.url_files if suffixes == _JSON else ():
        check(lambda path=path: _expand([path], _JSON))
    return problems


def _entries(paths: list[str], cache: str, cfg: SourceConfig) -> tuple[Entries, Media]:
    urls = UrlFiles(_expand(cfg.url_files, _JSON), cache) if cfg.url_files else None
    return Entries(paths, cache), Media(cfg.media, cache, urls)


def are_counted(cfg: SourceConfig, paths: Sequence[str]) -> bool:
    """Returns whether a source's records are counted in a cache, so that files are opened late."""
    return (
        cfg.format == "records"
        and not any(map(storage.is_remote, paths))
        and all(map(os.path.isfile, paths))
        and sum(map(os.path.getsize, paths)) >= _COUNTED_BYTES
    )


def index_records(paths: Sequence[str], cache: str) -> Arrays:
    """Returns the number of records of each ArrayRecord file as `records`, from the cache."""
    return index_files(
        "records-1", paths, lambda path: {"records": np.array([count_records(path)])}, cache, True
    )


def _records(cfg: SourceConfig, paths: list[str], cache: str, copies: FileCache) -> Source:
    counts = None
    if are_counted(cfg, paths):
        with suppress(NotIndexed):
            counts = np.asarray(index_records(paths, cache)["records"]).tolist()
    return DocumentFiles(paths, paired=cfg.paired, cache=copies, counts=counts)


Make = Callable[[SourceConfig, list[str], str, FileCache], Source]
RECORDS = (".array_record",)
_JSON = tuple(name + packed for name in (".jsonl", ".json") for packed in ("", *PACKED))
# {format: (constructor, file suffixes)}
FORMATS: dict[str, tuple[Make, tuple[str, ...]]] = {
    "records": (_records, RECORDS),
    "webdataset": (
        lambda cfg, paths, cache, copies: Pairs(
            paths, cache, cfg.frames, cfg.caption_key, "texts" in cfg.allow_missing
        ),
        (".tar",),
    ),
    "tfds": (lambda cfg, paths, cache, copies: TfdsPairs(paths, copies), ()),
    "pages": (
        lambda cfg, paths, cache, copies: Pages(*_entries(paths, cache, cfg), cfg.min_similarity),
        _JSON,
    ),
    "videos": (
        lambda cfg, paths, cache, copies: Videos(*_entries(paths, cache, cfg), cfg.frames),
        _JSON,
    ),
    "subtitled": (
        lambda cfg, paths, cache, copies: SubtitledVideos(
            *_entries(paths, cache, cfg), cfg.frame_seconds
        ),
        _JSON,
    ),
    "dialogues": (
        lambda cfg, paths, cache, copies: Dialogues(
            *_entries(paths, cache, cfg), cfg.frames, cfg.system
        ),
        _JSON,
    ),
}
