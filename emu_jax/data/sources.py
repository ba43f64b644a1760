"""Where documents come from: a source for each format that teams keep their data in.

A source reads its files in place. What it needs to find a document (offsets in a tar, lines of
a listing) is found once, without decoding a picture, and kept (`index.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from emu_jax.config import UserError, suggest
from emu_jax.data import storage
from emu_jax.data.dialogues import Dialogues
from emu_jax.data.documents import DocumentFiles, Source
from emu_jax.data.formats import PACKED
from emu_jax.data.listings import Entries, Media
from emu_jax.data.pages import Pages
from emu_jax.data.pairs import Pairs, TfdsPairs
from emu_jax.data.videos import SubtitledVideos, Videos


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture: what is on disk, and how often it is drawn."""

    name: str = ""  # in messages, metrics and lists of documents; no two alike
    format: str = "records"  # see FORMATS
    paths: tuple[str, ...] = ()  # files or folders, local or gs://; `*` is anything in a name
    # Pictures and videos that listings name: folders or tars; else relative to the listing.
    media: tuple[str, ...] = ()
    # Of sources packed together, the share of documents; else see `DataConfig.sources`.
    weight: float = 1.0
    # Batches of its own, instead of rows shared with other sources; 0: as `DataConfig` says.
    batch_size: int = 0
    row_tokens: int = 0
    row_images: int = 0

    paired: bool = False  # records: pictures and their words, in an order that is drawn
    # Of a longer document so many tokens are read, from a random place; 0: as many as fit into
    # a row, from its beginning.
    window_tokens: int = 0
    window_images: int = 5  # the first of them
    # Instead of a window: so many random pictures, each with the text that follows it.
    picked_images: int = 0
    min_similarity: float = 0.32  # pages: of a picture to its text, where it is known
    frames: int = 8  # videos: of each
    frame_seconds: float = 4.0  # subtitled: between the frames of a video
    # webdataset: the key of a sample's JSON that holds its words; by default NAME.txt, or else the
    # keys that img2dataset and LAION use.
    caption_key: str = ""
    # Kinds of parts that the whole source may lack: "images", "texts". Elsewhere it is an error
    # if nothing is left of a kind. With "texts", pairs without a caption are images alone.
    allow_missing: tuple[str, ...] = ()


def open_source(cfg: SourceConfig, cache: str = "") -> Source:
    """The source that `cfg` describes.

    Args:
        cache: a folder for what is derived from its files; by default beside them.

    Raises:
        UserError: an unknown format, or nothing is there.
    """
    if cfg.format not in FORMATS:
        close = suggest(cfg.format, FORMATS)
        raise UserError(f"source {cfg.name!r}: unknown format {cfg.format!r}{close}")
    make, suffixes = FORMATS[cfg.format]
    try:
        paths = storage.expand(cfg.paths, suffixes) if suffixes else list(cfg.paths)
        return make(cfg, paths, cache)
    except UserError as error:
        raise UserError(f"source {cfg.name!r}: {error}") from None


def _entries(paths: list[str], cache: str, cfg: SourceConfig) -> tuple[Entries, Media]:
    return Entries(paths, cache), Media(cfg.media, cache)


Make = Callable[[SourceConfig, list[str], str], Source]
_JSON = tuple(name + packed for name in (".jsonl", ".json") for packed in ("", *PACKED))
# {format: (what opens it, how its files end)}
FORMATS: dict[str, tuple[Make, tuple[str, ...]]] = {
    "records": (
        lambda cfg, paths, cache: DocumentFiles(paths, paired=cfg.paired), (".array_record",),
    ),
    "webdataset": (
        lambda cfg, paths, cache: Pairs(
            paths, cache, cfg.frames, cfg.caption_key, "texts" in cfg.allow_missing
        ), (".tar",),
    ),
    "tfds": (lambda cfg, paths, cache: TfdsPairs(paths), ()),
    "pages": (
        lambda cfg, paths, cache: Pages(*_entries(paths, cache, cfg), cfg.min_similarity), _JSON,
    ),
    "videos": (lambda cfg, paths, cache: Videos(*_entries(paths, cache, cfg), cfg.frames), _JSON),
    "subtitled": (
        lambda cfg, paths, cache: SubtitledVideos(
            *_entries(paths, cache, cfg), cfg.frame_seconds
        ), _JSON,
    ),
    "dialogues": (
        lambda cfg, paths, cache: Dialogues(*_entries(paths, cache, cfg), cfg.frames), _JSON,
    ),
}  # fmt: skip
