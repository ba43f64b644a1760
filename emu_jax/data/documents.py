"""Documents, and ArrayRecord files of them.

A document is one sequence for Emu: texts and images in order. An image-text pair, a web page and
a video with subtitles are all documents; they differ only in content.
"""

from __future__ import annotations

import abc
import bisect
import dataclasses
import hashlib
import itertools
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from emu_jax.data import storage
from emu_jax.data.file_cache import FileCache
from emu_jax.data.known_lengths import (
    KnownLengths,
    Rejected,
    known_documents,
    lengths_path,
    load_lengths,
)
from emu_jax.data.read_ahead import Span
from emu_jax.data.records import StoreRecords
from emu_jax.data.unused import Tally, Unused
from emu_jax.errors import UserError, first_line
from emu_jax.tokenizer import IMAGE

log = logging.getLogger(__name__)

_VERSION = 1  # of the record layout
_FRAMES_VERSION = 2  # of records that mark frames of videos, which earlier readers refuse
_TEXT, _IMAGE = "text", "picture"  # kinds of parts in a record


@dataclasses.dataclass(frozen=True)
class Text:
    """A text. White space at either end is ignored.

    Attributes:
        scored: whether the text is a training target; an answer is, its instruction is not.
        special: whether special tokens such as `[USER]` are parsed in the text. Never set it for
            text of unknown origin, which could spell an `<image>`.
    """

    text: str
    scored: bool = True
    special: bool = False

    def __post_init__(self) -> None:
        if self.special and IMAGE in self.text:
            raise ValueError(f"a text cannot spell {IMAGE}: use an Image part instead")

    def to_list(self) -> list[Any]:
        """Returns the fields as plain values, omitting defaults."""
        flags = (self.scored, self.special)
        return [self.text] if flags == (True, False) else [self.text, *flags]


@dataclasses.dataclass(frozen=True)
class Image:
    """An encoded image (PNG, JPEG, ...).

    Attributes:
        time: time of a video frame, in seconds.
        similarity: similarity to the text beside it, if the data come with such a score.
        scored: whether the image is a training target.
        frame: number of the frame, from 1, in a video that the document shows as a whole; 0: a
            still image. Frames between subtitles are still images.
    """

    data: bytes
    time: float | None = None
    similarity: float | None = None
    scored: bool = True
    frame: int = 0

    @classmethod
    def video(
        cls, frames: Iterable[tuple[float | None, bytes]], *, scored: bool = True
    ) -> list[Image]:
        """Returns the frames of a video that a document shows as a whole."""
        return [
            cls(data, time, scored=scored, frame=number)
            for number, (time, data) in enumerate(frames, 1)
        ]

    def to_list(self) -> list[Any]:
        """Returns the fields as plain values, omitting defaults."""
        if self.frame:
            return [self.data, self.time, self.similarity, self.scored, self.frame]
        if not self.scored:
            return [self.data, self.time, self.similarity, self.scored]
        values = [self.data, self.time]
        return values if self.similarity is None else [*values, self.similarity]


@dataclasses.dataclass(frozen=True)
class Document:
    """Texts and images in reading order.

    Attributes:
        unused: everything in the source that the reader left out of this document. It is counted
            by reason, and is not part of the stored record.
    """

    parts: tuple[Text | Image, ...]
    unused: tuple[Unused, ...] = dataclasses.field(default=(), compare=False)

    @classmethod
    def from_video(
        cls, frames: Iterable[tuple[float, bytes]], subtitles: Iterable[tuple[float, str]]
    ) -> Document:
        """Builds a document of frames and subtitles, ordered by their times in seconds.

        Subtitles between two frames are joined, as in the release's storyboards
        (`Emu1/data/yt-sb-1b`). A frame comes before a subtitle of the same time.
        """
        events = [(time, 0, Image(data, time)) for time, data in frames]
        events += [(time, 1, Text(text)) for time, text in subtitles]
        events.sort(key=lambda event: event[:2])
        parts: list[Text | Image] = []
        for _, _, part in events:
            last = parts[-1] if parts else None
            if isinstance(part, Text) and isinstance(last, Text):
                parts[-1] = Text(last.text.strip() + " " + part.text.strip())
            else:
                parts.append(part)
        return cls(tuple(parts))

    def to_bytes(self) -> bytes:
        """Serializes the document to a record: msgpack, with the version of its layout."""
        parts = [
            [_TEXT if isinstance(part, Text) else _IMAGE, *part.to_list()] for part in self.parts
        ]
        framed = any(isinstance(part, Image) and part.frame for part in self.parts)
        version = _FRAMES_VERSION if framed else _VERSION
        return cast(bytes, msgpack.packb({"version": version, "parts": parts}))

    @classmethod
    def from_bytes(cls, record: bytes, where: str = "a record") -> Document:
        """Parses a record that `to_bytes` wrote.

        Raises:
            Damaged: it is not a document.
            UserError: it has another layout version; the message starts with `where`.
        """
        try:
            values = msgpack.unpackb(record)
            version = values["version"]
            if version in (_VERSION, _FRAMES_VERSION):
                make = {_TEXT: Text, _IMAGE: Image}
                return cls(tuple(make[kind](*rest) for kind, *rest in values["parts"]))
        except Exception as error:  # msgpack may raise anything on foreign bytes
            raise Damaged("not a document", where, repr(error)) from None
        raise UserError(
            f"{where} is a document of version {version}, this emu_jax reads {_VERSION} and "
            f"{_FRAMES_VERSION}: build the data again"
        )


# Stored indexes refer to positions in this tuple: append new reasons at its end.
REASONS = (
    "damaged record",
    "not a document",
    "changed document",
    "corrupt tar member",
    "incomplete sample",
    "malformed JSON",
    "malformed entry",
    "malformed subtitles",
    "invalid UTF-8",
    "missing file",
    "unreadable image",
    "image too large",
    "image too narrow",
    "unreadable video",
    "video without frames",
    "not a regular file",
    "file too large",
    "text too large",
    "slow video",
)


class Damaged(UserError):
    """Raised for one document that cannot be read. Training skips the document and counts it.

    Attributes:
        reason: one of `REASONS`, to count by.
        where: location of the document.
        detail: more about the damage, or "".
    """

    def __init__(self, reason: str, where: str, detail: object = "") -> None:
        assert reason in REASONS, reason
        super().__init__(f"{where}: {reason}" + (f" ({detail})" if detail else ""))
        self.reason, self.where, self.detail = reason, where, str(detail)


# Limit for all texts of a document together. A row holds far fewer, and tokenizing more takes
# minutes.
MOST_CHARACTERS = 1 << 22


def check_size(document: Document, where: str) -> None:
    """Checks the total length of a document's texts.

    Raises:
        Damaged: the texts have more than `MOST_CHARACTERS` characters.
    """
    length = sum(len(part.text) for part in document.parts if isinstance(part, Text))
    if length > MOST_CHARACTERS:
        raise Damaged("text too large", where, f"{length:,} characters")


def utf8(content: bytes, where: str) -> str:
    """Decodes a text, and removes a byte order mark.

    Raises:
        Damaged: it is not UTF-8.
    """
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise Damaged("invalid UTF-8", where, f"byte {error.start}") from None


# Placeholder of a part that is missing: the other parts keep their numbers when it arrives. It is
# counted in `Document.unused`.
ABSENT = Text("")


class Source(Sequence[Document]):
    """Documents by index. Safe for random access from several threads.

    Attributes:
        fingerprint: a short hash of file names, sizes and times, not of contents. Anything
            derived from a source is valid as long as its fingerprint does not change.
        paired: whether a document is images with a caption, in no inherent order.
        remote: whether `spans` names byte ranges.
        videos: whether a document may have frames of videos (`Image.frame`).

    Raises (when indexed):
        Damaged: this document cannot be read; the others can.
    """

    fingerprint: str
    paired: bool = False
    remote: bool = False
    videos: bool = True

    @abc.abstractmethod
    def read(
        self,
        index: int,
        seed: Sequence[int] | None = None,
        part_indices: Collection[int] | None = None,
    ) -> Document:
        """Reads a document.

        Args:
            seed: seed of random choices (the frames of a video); None makes the release's choice.
                It changes neither the words nor the number of parts.
            part_indices: indices of the parts that will be used; other images may be empty.

        Raises:
            Damaged: the document cannot be read.
        """

    @abc.abstractmethod
    def where(self, index: int) -> str:
        """Returns the location of a document, for messages."""

    def sketch(self, index: int) -> Document:
        """Reads a document whose images may be empty: enough to count its tokens."""
        return self.read(index)

    def known_lengths(self, indices: range, tokenizer: str) -> KnownLengths | None:
        """Returns the lengths of documents if they are stored with them, or None to count.

        Args:
            tokenizer: fingerprint of the tokenizer.
        """
        return None

    def spans(self, index: int) -> list[Span]:
        """Returns the byte ranges of remote files that `read` needs, as far as they are known."""
        return []

    def sketch_spans(self, index: int) -> list[Span]:
        """Returns the byte ranges of remote files that `sketch` needs, as far as they are known."""
        return self.spans(index)

    def metadata(self, index: int) -> dict[str, Any]:
        """Reads the metadata of a document: scores, sizes, hashes, ... {} if the format has none.

        Raises:
            Damaged: they cannot be read.
        """
        return {}

    def unused(self) -> Tally:
        """Counts the contents of the files that belong to no document."""
        return Tally()

    def stamp(self) -> str:
        """Returns a stamp of the media files that documents may name.

        It changes when a file arrives. It is not part of `fingerprint`, because an arrival does not
        invalidate documents that were read before.
        """
        return ""

    def __getitem__(self, index: int) -> Document:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        document = self.read(index)
        parts = tuple(part for part in document.parts if part is not ABSENT)
        return (
            document
            if len(parts) == len(document.parts)
            else dataclasses.replace(document, parts=parts)
        )

    def __iter__(self) -> Iterator[Document]:
        return (self[i] for i in range(len(self)))


def write_documents(path: str | os.PathLike, documents: Iterable[Document]) -> int:
    """Writes an ArrayRecord file, atomically; returns the number of documents."""
    path = os.fspath(path)
    if not storage.is_remote(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    with storage.writing_data_file(path) as temporary:
        # One record per group, since a random read decompresses a whole group.
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        count = 0
        for document in documents:
            writer.write(document.to_bytes())
            count += 1
        writer.close()
    return count


class DocumentFiles(Source):
    """The documents of ArrayRecord files.

    Args:
        cache: local copies of remote files, where they are needed (see `StoreRecords`).
        counts: number of records of each file, if known. Local files are then opened when they
            are first read.

    Raises:
        UserError: a file is missing, damaged or cut short, or a store does not let us read it; the
            message names the file and the fix.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike],
        *,
        paired: bool = False,
        cache: FileCache | None = None,
        counts: Sequence[int] | None = None,
    ) -> None:
        self.paths = [os.fspath(path) for path in paths]
        self.paired = paired
        stats, self._records = _open_records(self.paths, cache or FileCache.at(""), counts)
        self._sizes = [size for size, _ in stats]
        self._counted: set[str] | None = None  # files whose lengths are stored, once looked up
        self.remote = any(isinstance(records, StoreRecords) for records in self._records)
        self._starts = [0, *itertools.accumulate(map(len, self._records))]
        names = [os.path.basename(path) for path in self.paths]
        self.fingerprint = short_hash([(n, *s) for n, s in zip(names, stats, strict=True)])

    def __len__(self) -> int:
        return self._starts[-1]

    def locate(self, index: int) -> tuple[int, int]:
        """Returns (file, record in it) of a document."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = bisect.bisect_right(self._starts, index) - 1
        return file, index - self._starts[file]

    def known_lengths(self, indices: range, tokenizer: str) -> KnownLengths | None:
        """Returns the lengths of documents from the files that `emu-jax data build` wrote beside
        theirs, or None if one of them is missing or was counted with another tokenizer."""
        if not indices:
            return None
        files = range(self.locate(indices.start)[0], self.locate(indices[-1])[0] + 1)
        if self._counted is None:
            stored = storage.existing([lengths_path(path) for path in self.paths])
            self._counted = {path for path in self.paths if lengths_path(path) in stored}
        if not self._counted.issuperset(self.paths[file] for file in files):
            return None

        def load(file: int) -> KnownLengths:
            start, stop = self._starts[file : file + 2]
            lengths = load_lengths(self.paths[file], self._sizes[file], stop - start, tokenizer)
            first = max(indices.start - start, 0)
            return lengths.select(slice(first, min(indices.stop, stop) - start))

        try:
            if storage.is_remote(self.paths[files[0]]):
                with ThreadPoolExecutor(storage.THREADS) as pool:
                    loaded = list(pool.map(load, files))
            else:
                loaded = [load(file) for file in files]
        except Rejected as error:
            log.warning("%s: counting the tokens instead", error)
            self._counted = set()
            return None
        counts, sizes, frames = zip(*loaded, strict=True)
        return KnownLengths(np.concatenate(counts), np.concatenate(sizes), all(frames))

    def spans(self, index: int) -> list[Span]:
        file, record = self.locate(index)
        records = self._records[file]
        return records.spans(record) if isinstance(records, StoreRecords) else []

    def where(self, index: int) -> str:
        file, record = self.locate(index)
        return f"{self.paths[file]} record {record}"

    def read(
        self,
        index: int,
        seed: Sequence[int] | None = None,
        part_indices: Collection[int] | None = None,
    ) -> Document:
        file, record = self.locate(index)
        try:
            content = self._records[file][record]
        except UserError:
            raise
        except Exception as error:
            raise Damaged("damaged record", self.where(index), _record_error(error)) from None
        return Document.from_bytes(content, self.where(index))


def _open_records(
    paths: Sequence[str], cache: FileCache, counts: Sequence[int] | None
) -> tuple[list[tuple[int, int | str]], list[Sequence[bytes]]]:
    """Returns the (size, stamp) and the records of each ArrayRecord file."""

    def opened(path: str, stat: storage.Stat) -> Sequence[bytes]:
        try:
            return StoreRecords(path, stat, cache)
        except UserError:
            raise
        except Exception as error:
            raise _damaged(path, error) from None

    missing = "%s does not exist: write it first (emu_jax.data.documents)"
    if not any(map(storage.is_remote, paths)):
        if absent := [path for path in paths if not os.path.isfile(path)]:
            raise UserError(missing % absent[0])
        records: list[Sequence[bytes]]
        if counts is None:
            records = [_opened(path) for path in paths]
        else:
            records = [_LazyRecords(*file) for file in zip(paths, counts, strict=True)]
        local = [os.stat(path) for path in paths]
        return [(found.st_size, found.st_mtime_ns) for found in local], records
    try:
        stats = storage.stats(paths)
    except FileNotFoundError as error:
        raise UserError(missing % error.filename) from None
    with ThreadPoolExecutor(storage.THREADS) as pool:
        return list(stats), list(pool.map(opened, paths, stats))


def _opened(path: str) -> Sequence[bytes]:
    """Opens a local ArrayRecord file."""
    # Late: it imports much, which a worker that reads no document does not need.
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    try:
        return cast(Sequence[bytes], ArrayRecordDataSource([path]))
    except Exception as error:  # ArrayRecord raises many types
        raise _damaged(path, error) from None


def count_records(path: str) -> int:
    """Returns the number of records of a local ArrayRecord file.

    Opening the file reads the offsets of all its records. The lengths beside it, if there are any,
    tell the number without that.

    Raises:
        UserError: it is missing, damaged or cut short.
    """
    known = known_documents(path)
    return len(DocumentFiles([path])) if known is None else known


class _LazyRecords(Sequence[bytes]):
    """The records of a local file, which is opened when one is first read. Safe for threads."""

    def __init__(self, path: str, count: int) -> None:
        self._path, self._count = path, count
        self._records: Sequence[bytes] | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]
        if self._records is None:  # threads may open it twice, which does no harm
            self._records = _opened(self._path)
        return self._records[index]


def short_hash(values: object) -> str:
    """Returns a hash of `repr(values)` as 12 hexadecimal digits."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]


def _record_error(error: Exception) -> str:
    return first_line(error).split("; at byte")[0]


def _damaged(path: str, error: Exception) -> UserError:
    return UserError(
        f"{path} is cut short or damaged ({_record_error(error)}): remove it (rm {path}) and build "
        "it again"
    )
