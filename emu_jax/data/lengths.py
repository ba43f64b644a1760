"""Lengths of documents, counted once and cached: tokens of each text, and positions of images.

The lengths of a large source are in up to `_MOST_PARTS` folders of cached arrays, and one more that
lists them. A part is opened when a document in it is first looked up.

    starts     uint32, first size of each document of the part; one more, the end
    sizes      int16, tokens of each text; IMAGE_PART, VIDEO_PART or FRAME_PART; or _LONG, for a
               longer text
    long_at, long_sizes    positions in `sizes` and tokens of the longer texts
    damage     int8, 1 + position in REASONS, or 0
"""

from __future__ import annotations

import abc
import contextvars
import functools
import logging
import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, UInt8, UInt32

from emu_jax.data.documents import (
    ABSENT,
    REASONS,
    Damaged,
    Document,
    Image,
    Source,
    Text,
    check_size,
)
from emu_jax.data.known_lengths import KnownLengths
from emu_jax.data.packing import FRAME_PART, IMAGE_PART, VIDEO_PART
from emu_jax.data.sources.index import (
    EAGER,
    Arrays,
    NotIndexed,
    cached_arrays,
    has_arrays,
    indexing,
    remove_arrays,
    without_indexing,
)
from emu_jax.data.storage import THREADS, read_ahead
from emu_jax.data.unused import EXAMPLES, Tally, Unused
from emu_jax.errors import UserError
from emu_jax.storage import is_remote
from emu_jax.tokenizer import ASSISTANT, USER, Tokenizer

log = logging.getLogger(__name__)

_CHUNK = 1 << 16  # documents of a part, at least
_WINDOW = 512  # documents in a store that are counted while as many are requested
_MOST_PARTS = 256  # a block of documents is looked up in most of them
_LONG = -2  # in place of a size beyond int16
_LONGEST = 2**15 - 1
_VERSION = 3  # of the cached arrays
_EARLIER = 2  # version whose arrays are converted
_FRAMES_VERSION = 4  # of arrays that distinguish frames of videos from still images
_SUMMED = ("tally", "stamp", "totals")  # arrays of a part that are needed for the whole
_AWAITED = ("missing image", "ambiguous image", "missing file")  # may arrive later


def text_ids(text: Text, tokenizer: Tokenizer) -> list[int]:
    """Returns the token ids of a text in a row.

    Raises:
        UserError: the text contains [USER] or [ASSISTANT], which this tokenizer lacks.
    """
    words = text.text.strip()
    if text.special and not tokenizer.instruct and (USER in words or ASSISTANT in words):
        raise UserError(
            f"dialogues need {USER} and {ASSISTANT} as tokens, which this tokenizer does not have: "
            "set data.instruct=True, and the model's vocab_size and tokens to match"
        )
    return tokenizer.encode(words, bos=False) if text.special else tokenizer.encode_plain(words)


def image_size(document: Document, index: int) -> int:
    """Returns IMAGE_PART, VIDEO_PART or FRAME_PART for a part that is an image."""
    part, before = document.parts[index], document.parts[index - 1] if index else None
    assert isinstance(part, Image)
    if not part.frame:
        return IMAGE_PART
    # The first frames of a video may have been left out.
    begun = isinstance(before, Image) and 0 < before.frame < part.frame
    return FRAME_PART if begun else VIDEO_PART


def part_lengths(document: Document, tokenizer: Tokenizer) -> list[int]:
    """Returns the tokens of each text of a document, and `image_size` of each image.

    Raises:
        UserError: see `text_ids`.
    """
    return [
        image_size(document, n) if isinstance(part, Image) else len(text_ids(part, tokenizer))
        for n, part in enumerate(document.parts)
    ]


def check_frames(document: Document, paired: bool, where: str) -> None:
    """Refuses a video that an earlier version stored, as still images with times.

    It is recognized in pairs and dialogues. Elsewhere such images are frames between subtitles.

    Raises:
        UserError: the document has such a video; the message starts with `where`.
    """
    unmarked = any(
        isinstance(p, Image) and p.time is not None and not p.frame for p in document.parts
    )
    if unmarked and (paired or any(isinstance(p, Text) and p.special for p in document.parts)):
        raise UserError(
            f"{where} was built by an earlier version, which did not mark video frames: build it "
            "again into an empty directory, or set data.n_frame=0"
        )


class Lengths(abc.ABC):
    """The lengths of a source's documents: for each part, its number of tokens, or less than 0 for
    an image (`packing`).

    Attributes:
        tally: counts of used and unused parts of the source, as far as they are known without
            opening an image.
        frames: whether frames of videos are distinguished from still images.
    """

    tally: Tally
    frames: bool = False

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> list[int]: ...

    @abc.abstractmethod
    def totals_of(self, indices: Int[np.ndarray, "documents"]) -> Int[np.ndarray, "5 documents"]:
        """Returns, for each document, the tokens of its texts, its images, 1 + the position of its
        damage in REASONS or 0, its videos, and their frames, which are images too."""

    @abc.abstractmethod
    def damage(self, index: int) -> str | None:
        """Returns why a document could not be read, or None if it could."""

    @abc.abstractmethod
    def totals(self) -> dict[str, int]:
        """Returns totals over all documents (see `TOTALS`): documents, text tokens, images; how
        many documents have text, an image, or both; how many are damaged."""


class LengthParts:
    """The parts in which a source's lengths are counted and cached.

    Attributes:
        name: name of the cached arrays of the whole source.
        earlier_name: name of the arrays that these replace.
        frames: whether frames of videos are distinguished from still images.
        count: number of parts. A single part is cached under `name`; several are cached apart, and
            `name` lists them.
    """

    def __init__(
        self, source: Source, tokenizer: Tokenizer, folder: Path, frames: bool = False
    ) -> None:
        self._source, self._tokenizer, self.folder = source, tokenizer, folder
        self.frames = frames and source.videos
        version = _FRAMES_VERSION if self.frames else _VERSION
        counted = f"{source.fingerprint}-{tokenizer.fingerprint}"
        self.name = f"outlines-{version}-{counted}"
        self.earlier_name = f"outlines-{_VERSION if self.frames else _EARLIER}-{counted}"
        self.documents = part_documents(len(source))
        self.count = -(-len(source) // self.documents)

    def stamp(self) -> UInt8[np.ndarray, "bytes"]:
        return np.frombuffer(f"stamp {self._source.stamp()}".encode(), np.uint8)

    def names(self) -> list[str]:
        """Returns the names of all cached arrays, those of the parts last."""
        parts = range(self.count) if self.count > 1 else ()
        return [self.name, *map(self._part_name, parts)]

    def remove(self) -> None:
        """Removes all arrays from the cache."""
        for name in self.names():
            remove_arrays(self.folder, name)
        self.remove_earlier()

    def remove_earlier(self) -> None:
        """Removes the arrays that were converted. Those that do not distinguish frames are still
        used by models that do not either."""
        if not self.frames:
            remove_arrays(self.folder, self.earlier_name)

    def check(self) -> None:
        """Checks that all arrays are in the cache, without reading them.

        Raises:
            NotIndexed: some are missing.
        """
        is_there = functools.partial(has_arrays, self.folder)
        with ThreadPoolExecutor(THREADS) as pool:  # a local look-up takes less than a thread
            look_up = pool.map if is_remote(self.folder) else map
            if not all(look_up(is_there, self.names())):
                raise NotIndexed(str(self.folder / self.name))

    def open(
        self,
        part: int,
        stamp: UInt8[np.ndarray, "bytes"] | None = None,
        keys: Collection[str] | None = None,
    ) -> Arrays:
        """Returns the arrays of one of several parts; counts it first unless it is cached.

        Args:
            keys: the arrays that are needed; by default all.
        """

        def make() -> Arrays:  # a stamp may list many folders
            return self.make(part, self.stamp() if stamp is None else stamp)

        # Small arrays are copied to memory: those of all parts together stay within EAGER.
        return cached_arrays(self.folder, self._part_name(part), make, EAGER // self.count, keys)

    def make(self, part: int, stamp: UInt8[np.ndarray, "bytes"]) -> Arrays:
        """Counts a part."""
        first = part * self.documents
        indices = range(first, min(first + self.documents, len(self._source)))
        known = self._source.known_lengths(indices, self._tokenizer.fingerprint)
        if known is not None and (known.frames or not self.frames):
            return _known(self._source, indices, known, self.frames) | {"stamp": stamp}
        converted = None if self.frames else self._converted(indices)
        return converted or _count(self._source, self._tokenizer, indices, stamp, self.frames)

    def _part_name(self, part: int) -> str:
        return f"{self.name}-{part * self.documents}"

    def _converted(self, indices: range) -> Arrays | None:
        """Returns the arrays of a part from those of an earlier version, or None without any.

        Counts of reasons belong to all documents; they go to the first part. Arrays in a store are
        not converted: each part would download all of them.
        """
        if is_remote(self.folder):
            return None
        try:
            with without_indexing():
                arrays = cached_arrays(self.folder, self.earlier_name, dict)
        except NotIndexed:
            return None
        starts = np.asarray(arrays["starts"][indices.start : indices.stop + 1])
        tally = arrays["tally"] if indices.start == 0 else Tally().to_array()
        return _compact(
            np.diff(starts),
            np.asarray(arrays["sizes"][int(starts[0]) : int(starts[-1])]),
            np.asarray(arrays["damage"][indices.start : indices.stop]),
        ) | {"tally": tally, "stamp": arrays["stamp"]}


class TokenLengths(Lengths):
    """Lengths that are counted once.

    Counting reads the words of each document, and opens no image. The result is cached as mapped
    arrays, keyed by the source and the tokenizer. It is written a part at a time, so an
    interrupted count can be resumed. A document that cannot be read has no parts.

    Args:
        recount: count again if files were missing and some have arrived since; otherwise warn.
        frames: distinguish frames of videos from still images. Such counts have arrays of their
            own, unless the source has no videos.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        folder: Path,
        recount: bool = True,
        frames: bool = False,
    ) -> None:
        self.parts = parts = LengthParts(source, tokenizer, folder, frames)
        self.frames = parts.frames
        self._count, self._opened = len(source), dict[int, _Part]()
        begun: UInt8[np.ndarray, "bytes"] | None = None  # the stamp when counting began

        def count() -> Arrays:
            nonlocal begun
            if parts.frames and has_arrays(folder, parts.earlier_name):
                log.warning(
                    "%s does not mark video frames: counting again",
                    folder / parts.earlier_name,
                )
            log.info("counting the tokens of %d documents for %s", len(source), folder / parts.name)
            # Taken before counting: a file that arrives meanwhile may be too late for its document.
            begun = stamp = parts.stamp()
            if parts.count < 2:
                return parts.make(0, stamp)
            tallies, stamps, totals = [], set[bytes](), np.zeros(len(TOTALS), np.int64)
            for part in range(parts.count):
                arrays = parts.open(part, stamp, _SUMMED)
                tallies.append(arrays["tally"])
                stamps.add(arrays["stamp"].tobytes())
                totals += np.asarray(arrays["totals"])
            return {
                "tally": Tally.add(tallies),
                "stamp": stamp if len(stamps) == 1 else np.zeros(1, np.uint8),  # no stamp
                "totals": totals,
            }

        arrays = cached_arrays(folder, parts.name, count)
        missing = [r for r in Tally.from_array(arrays["tally"]).unused if r in _AWAITED]
        # Files that arrived while counting wait for the next run: a crawl may never pause.
        if (
            missing
            and arrays["stamp"].tobytes() != (parts.stamp() if begun is None else begun).tobytes()
        ):
            if recount:
                log.warning(
                    "%s: files arrived since it was counted; counting again", folder / parts.name
                )
                parts.remove()
                arrays = cached_arrays(folder, parts.name, count)
            else:
                log.warning(
                    "files arrived since %s was counted, and are not used: start a new run, or "
                    "remove it to count again",
                    folder / parts.name,
                )
        if begun is not None and indexing() and not is_remote(folder):
            parts.remove_earlier()
        if parts.count < 2:
            self._opened[0] = _Part(arrays)
        self._totals = arrays["totals"]
        self.tally = Tally.from_array(arrays["tally"])
        self.tally.merge(source.unused())

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> list[int]:
        part, row = self._find(index)
        return part.sizes(row)

    def totals_of(self, indices: Int[np.ndarray, "documents"]) -> Int[np.ndarray, "5 documents"]:
        if self.parts.count < 2:
            return self._open(0).totals_of(indices)
        parts, rows = np.divmod(indices, self.parts.documents)
        order = np.argsort(parts, kind="stable")
        numbers, starts = np.unique(parts[order], return_index=True)
        result = np.zeros((5, len(indices)), np.int64)

        def look_up(part: int, at: Int[np.ndarray, "n"]) -> None:
            result[:, at] = self._open(part).totals_of(rows[at])

        each = list(zip(numbers.tolist(), np.split(order, starts[1:]), strict=True))
        if not is_remote(self.parts.folder):
            for part, at in each:
                look_up(part, at)
            return result
        contexts = [contextvars.copy_context() for _ in each]  # keep `without_indexing`
        with ThreadPoolExecutor(THREADS) as pool:  # each part takes several requests
            list(pool.map(lambda context, task: context.run(look_up, *task), contexts, each))
        return result

    def damage(self, index: int) -> str | None:
        part, row = self._find(index)
        code = int(part.damage[row])
        return REASONS[code - 1] if code else None

    def totals(self) -> dict[str, int]:
        return dict(zip(TOTALS, self._totals.tolist(), strict=True))

    def _find(self, index: int) -> tuple[_Part, int]:
        if not 0 <= index < self._count:
            raise IndexError(index)
        part, row = divmod(index, self.parts.documents)
        return self._open(part), row

    def _open(self, part: int) -> _Part:
        if part not in self._opened:  # threads may open it twice, which does no harm
            self._opened[part] = _Part(self.parts.open(part))
        return self._opened[part]


class _Part:
    """The cached lengths of consecutive documents."""

    def __init__(self, arrays: Arrays) -> None:
        self._starts, self._sizes = arrays["starts"], arrays["sizes"]
        self._long_at = np.asarray(arrays["long_at"])  # few
        self._long_sizes = np.asarray(arrays["long_sizes"])
        self.damage = arrays["damage"]

    def sizes(self, row: int) -> list[int]:
        start, stop = int(self._starts[row]), int(self._starts[row + 1])
        return self._with_long(self._sizes[start:stop], np.arange(start, stop)).tolist()

    def totals_of(self, rows: Int[np.ndarray, "documents"]) -> Int[np.ndarray, "5 documents"]:
        starts = self._starts.take(rows).astype(np.int64)
        counts = self._starts.take(rows + 1) - starts
        owners = np.repeat(np.arange(len(rows)), counts)
        at = np.arange(len(owners)) + (starts - np.cumsum(counts) + counts)[owners]
        sizes = self._with_long(self._sizes.take(at), at)
        tokens = np.bincount(owners, np.maximum(sizes, 0), len(rows)).astype(np.int64)
        images, videos, frames = (
            np.bincount(owners[each], minlength=len(rows))
            for each in (sizes < 0, sizes == VIDEO_PART, sizes <= VIDEO_PART)
        )
        damage = self.damage.take(rows).astype(np.int64)
        return np.stack([tokens, images, damage, videos, frames])

    def _with_long(
        self, sizes: Int[np.ndarray, "parts"], at: Int[np.ndarray, "parts"]
    ) -> Int[np.ndarray, "parts"]:
        """Returns the sizes at some positions, with those of long texts in place."""
        long = np.flatnonzero(sizes == _LONG)
        if not len(long):
            return sizes
        sizes = sizes.astype(np.int32)
        sizes[long] = self._long_sizes[np.searchsorted(self._long_at, at[long])]
        return sizes


def part_documents(count: int) -> int:
    """Returns how many documents of a source are counted and cached together."""
    size = _CHUNK
    while size * _MOST_PARTS < count:
        size *= 2
    return size


TOTALS = ("documents", "tokens", "images", "with_text", "with_image", "with_both", "damaged")


def _count(
    source: Source,
    tokenizer: Tokenizer,
    indices: range,
    stamp: UInt8[np.ndarray, "bytes"],
    frames: bool,
) -> Arrays:
    """Counts the tokens of some documents.

    Raises:
        UserError: see `text_ids` and `check_frames`.
    """

    def measure(index: int) -> tuple[list[int], int, tuple[Unused, ...]]:
        try:
            document = source.sketch(index)
            check_size(document, source.where(index))
        except Damaged as error:
            return [], 1 + REASONS.index(error.reason), (Unused(error.reason, error.detail),)
        if frames:
            check_frames(document, source.paired, source.where(index))
        sizes = part_lengths(document, tokenizer)
        empty = sizes.count(0) - sum(part is ABSENT for part in document.parts)
        return sizes, 0, document.unused + (Unused("empty text"),) * empty

    tally = Tally()
    counts, damage = np.zeros(len(indices), np.int32), np.zeros(len(indices), np.int8)
    all_sizes: list[int] = []
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        measured = (
            result for window in _windows(source, indices) for result in pool.map(measure, window)
        )
        for n, (sizes, code, unused) in enumerate(measured):
            counts[n], damage[n] = len(sizes), code
            all_sizes += sizes
            images = sum(size < 0 for size in sizes)
            texts = len(sizes) - images - sizes.count(0)
            if images or texts:
                tally.use(images=images, texts=texts)
            elif not code:
                unused += (Unused("empty document"),)
            for reason, detail in unused:
                if tally.leave(reason):
                    where = source.where(indices[n])
                    tally.example(reason, f"{where}: {detail}" if detail else where)
    sizes = np.array(all_sizes, np.int32)
    lengths = _compact(counts, sizes if frames else _without_frames(sizes), damage)
    return lengths | {"tally": tally.to_array(), "stamp": stamp}


def _windows(source: Source, indices: range) -> Iterator[range]:
    """Yields documents to sketch, in windows if they are in a store. Requests each window ahead."""
    size = _WINDOW if source.remote else max(1, len(indices))
    for first in range(0, len(indices), size):
        if source.remote:
            coming = indices[first : first + 2 * size]
            read_ahead(span for index in coming for span in source.sketch_spans(index))
        yield indices[first : first + size]


def _without_frames(sizes: Int[np.ndarray, "parts"]) -> Int[np.ndarray, "parts"]:
    """Returns sizes in which frames of videos are still images."""
    return sizes if sizes.min(initial=0) >= IMAGE_PART else np.maximum(sizes, IMAGE_PART)


def _known(source: Source, indices: range, known: KnownLengths, frames: bool) -> Arrays:
    """Returns the arrays of documents that need not be counted, as `_count` would."""
    counts, sizes = known.counts, known.sizes if frames else _without_frames(known.sizes)
    arrays = _compact(counts, sizes, np.zeros(len(counts), np.int8))
    totals = dict(zip(TOTALS, arrays["totals"].tolist(), strict=True))
    tally = Tally()
    used = totals["with_text"] + totals["with_image"] - totals["with_both"]
    empty = np.flatnonzero(sizes == 0).astype(np.uint32)
    texts = len(sizes) - totals["images"] - len(empty)
    tally.used |= {"documents": used, "images": totals["images"], "texts": texts}
    unused = [] if used == len(counts) else np.flatnonzero(~_owned(arrays["starts"], sizes != 0))
    for reason, rows in (
        ("empty text", np.searchsorted(arrays["starts"], empty, "right") - 1),
        ("empty document", np.asarray(unused)),
    ):
        if len(rows):
            tally.leave(reason, len(rows))
        for row in rows[:EXAMPLES].tolist():
            tally.example(reason, source.where(indices[row]))
    return arrays | {"tally": tally.to_array()}


def _compact(
    counts: Int[np.ndarray, "documents"],
    sizes: Int[np.ndarray, "parts"],
    damage: Int[np.ndarray, "documents"],
) -> Arrays:
    """Returns the arrays of a part.

    Args:
        counts: number of sizes of each document.

    Raises:
        ValueError: they are too many for one part.
    """
    if len(sizes) >= 2**32:
        raise ValueError(f"{len(sizes)} parts of {len(counts)} documents")
    starts = np.zeros(len(counts) + 1, np.uint32)
    np.cumsum(counts, dtype=np.uint32, out=starts[1:])
    image = sizes < 0
    with_text, with_image = _owned(starts, sizes > 0), _owned(starts, image)
    totals = [
        len(counts),
        np.maximum(sizes, 0).sum(),
        np.count_nonzero(image),
        np.count_nonzero(with_text),
        np.count_nonzero(with_image),
        np.count_nonzero(with_text & with_image),
        np.count_nonzero(damage),
    ]
    long = np.flatnonzero(sizes > _LONGEST)
    short = sizes.astype(np.int16)
    short[long] = _LONG
    return {
        "starts": starts,
        "sizes": short,
        "long_at": long,
        "long_sizes": sizes[long],
        "damage": damage,
        "totals": np.array(totals, np.int64),
    }


def _owned(
    starts: UInt32[np.ndarray, "documents_and_end"], parts: Bool[np.ndarray, "parts"]
) -> Bool[np.ndarray, "documents"]:
    """Returns which documents own at least one of some parts.

    Args:
        starts: number of the first part of each document.
    """
    # Half the time of `np.logical_or.reduceat`, which also gives documents without parts a value.
    before = np.zeros(len(parts) + 1, np.uint32)
    np.cumsum(parts, dtype=np.uint32, out=before[1:])
    before = before.take(starts)
    return before[1:] != before[:-1]
