"""Documents, and ArrayRecord files of them.

A document is what Emu reads as one sequence: texts and pictures in order. An image-text
pair, a web page and a video with subtitles are all documents; they differ in content only.
"""

from __future__ import annotations

import abc
import bisect
import dataclasses
import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import grain
import msgpack
from array_record.python.array_record_module import ArrayRecordWriter

from emu_jax.config import UserError
from emu_jax.data import storage
from emu_jax.data.unused import Tally, Unused
from emu_jax.tokenizer import IMAGE

VERSION = 1  # of the record layout


@dataclasses.dataclass(frozen=True)
class Text:
    """Words. White space at either end is not part of them.

    Attributes:
        scored: whether they are learned; an instruction is read only, its answer is learned.
        special: whether special tokens may be spelled in them (`[USER]`). Never of words of
            unknown origin, which could spell an `<image>`.
    """

    text: str
    scored: bool = True
    special: bool = False

    def __post_init__(self) -> None:
        if self.special and IMAGE in self.text:
            raise ValueError(f"a text cannot spell {IMAGE}: put the picture itself")

    def to_list(self) -> list[Any]:
        """As plain values; what is as usual is left out."""
        flags = (self.scored, self.special)
        return [self.text] if flags == (True, False) else [self.text, *flags]


@dataclasses.dataclass(frozen=True)
class Picture:
    """An encoded picture (PNG, JPEG, ...).

    Attributes:
        time: of a frame of a video, in seconds.
        similarity: to the words that it goes with, where the data come with such a score.
        scored: whether it is learned, as a text is.
    """

    data: bytes
    time: float | None = None
    similarity: float | None = None
    scored: bool = True

    def to_list(self) -> list[Any]:
        """As plain values; what is as usual is left out."""
        if not self.scored:
            return [self.data, self.time, self.similarity, self.scored]
        values = [self.data, self.time]
        return values if self.similarity is None else [*values, self.similarity]


@dataclasses.dataclass(frozen=True)
class Document:
    """Texts and pictures in reading order.

    Attributes:
        unused: everything that the source had for this document and its reader left out.
            It is counted by reason and is not part of the stored record.
    """

    parts: tuple[Text | Picture, ...]
    unused: tuple[Unused, ...] = dataclasses.field(default=(), compare=False)

    @classmethod
    def from_video(
        cls, frames: Iterable[tuple[float, bytes]], subtitles: Iterable[tuple[float, str]]
    ) -> Document:
        """Frames and subtitles, each with its time in seconds, ordered by time.

        As the release prepares its storyboards (`Emu1/data/yt-sb-1b`): subtitles between two
        frames are joined. At the same moment a frame comes before a subtitle.
        """
        events = [(time, 0, Picture(data, time)) for time, data in frames]
        events += [(time, 1, Text(text)) for time, text in subtitles]
        events.sort(key=lambda event: event[:2])
        parts: list[Text | Picture] = []
        for _, _, part in events:
            last = parts[-1] if parts else None
            if isinstance(part, Text) and isinstance(last, Text):
                parts[-1] = Text(last.text.strip() + " " + part.text.strip())
            else:
                parts.append(part)
        return cls(tuple(parts))

    def to_bytes(self) -> bytes:
        """One record: msgpack, with the version of its layout."""
        parts = [
            ["text" if isinstance(part, Text) else "picture", *part.to_list()]
            for part in self.parts
        ]
        return cast(bytes, msgpack.packb({"version": VERSION, "parts": parts}))

    @classmethod
    def from_bytes(cls, record: bytes, where: str = "a record") -> Document:
        """Reads what `to_bytes` wrote.

        Raises:
            Damaged: it is no document.
            UserError: it is of a later version; the line starts with `where`.
        """
        try:
            values = msgpack.unpackb(record)
            version = values["version"]
            if version == VERSION:
                make = {"text": Text, "picture": Picture}
                return cls(tuple(make[kind](*rest) for kind, *rest in values["parts"]))
        except Exception as error:  # whatever foreign bytes make msgpack raise
            raise Damaged("not a document", where, repr(error)) from None
        raise UserError(
            f"{where} is a document of version {version}, this emu_jax reads {VERSION}: "
            "build the data again"
        )


# Indexes hold places in this list: what is new goes to its end.
REASONS = (
    "damaged record", "not a document", "changed document", "corrupt tar member",
    "incomplete sample", "malformed JSON", "malformed entry", "malformed subtitles",
    "invalid UTF-8", "missing file", "unreadable picture", "picture too large",
    "picture too narrow", "unreadable video", "video without frames", "not a regular file",
    "file too large", "text too large",
)  # fmt: skip


class Damaged(UserError):
    """One document that cannot be read. Training passes over it and counts it.

    Attributes:
        reason: one of `REASONS`, to count by.
        where: its place.
        detail: more about it, or nothing.
    """

    def __init__(self, reason: str, where: str, detail: object = ""):
        assert reason in REASONS, reason
        super().__init__(f"{where}: {reason}" + (f" ({detail})" if detail else ""))
        self.reason, self.where, self.detail = reason, where, str(detail)


# All texts of a document together. A row holds far less, and tokenizing more takes minutes.
MOST_CHARACTERS = 1 << 22


def check_size(document: Document, where: str) -> None:
    """
    Raises:
        Damaged: its texts have more than `MOST_CHARACTERS`.
    """
    length = sum(len(part.text) for part in document.parts if isinstance(part, Text))
    if length > MOST_CHARACTERS:
        raise Damaged("text too large", where, f"{length:,} characters")


def utf8(content: bytes, where: str) -> str:
    """Decodes a text; a byte order mark is not part of it.

    Raises:
        Damaged: it is not UTF-8.
    """
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise Damaged("invalid UTF-8", where, f"byte {error.start}") from None


# Stands for a part that the data lack, so that the others keep their numbers when it arrives. It is
# counted in `Document.unused`.
ABSENT = Text("")


class Source(Sequence[Document]):
    """Documents by index, read at random and from several threads at once.

    Attributes:
        fingerprint: a short hash, of names, sizes and times rather than contents: what was
            derived from a source is good as long as this stays.
        paired: whether a document is pictures and words about them in no order of its own.

    Raises (when indexed):
        Damaged: this document cannot be read; the others can.
    """

    fingerprint: str
    paired: bool = False

    @abc.abstractmethod
    def read(
        self, index: int, seed: Sequence[int] | None = None,
        wanted: Collection[int] | None = None,
    ) -> Document:  # fmt: skip
        """A document.

        Args:
            seed: what decides where something is left to chance (the frames of a video); by
                default it is the release's choice. It changes neither words nor the number of
                parts.
            wanted: numbers of the parts that will be used; other pictures may be empty.
        """

    @abc.abstractmethod
    def where(self, index: int) -> str:
        """A document's place, for messages."""

    def sketch(self, index: int) -> Document:
        """The document with pictures that may be empty: enough to count its tokens."""
        return self.read(index)

    def unused(self) -> Tally:
        """Counts what the files hold that belongs to no document."""
        return Tally()

    def stamp(self) -> str:
        """Follows from which files the documents may name; changes when one arrives. It is not
        part of `fingerprint`: what is there stays good."""
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
    with storage.writing(path) as temporary:
        # Groups of one record: random reads would otherwise decompress whole groups.
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        count = 0
        for document in documents:
            writer.write(document.to_bytes())
            count += 1
        writer.close()
    return count


class DocumentFiles(Source):
    """The documents of some ArrayRecord files.

    Raises:
        UserError: a file is missing or cut short; the line names it and the mend.
    """

    def __init__(self, paths: Sequence[str | os.PathLike], *, paired: bool = False):
        self.paths = [Path(p) for p in paths]
        self.paired = paired
        self._records: list[Any] = []  # of each file
        self._starts = [0]
        for given, path in zip(paths, self.paths, strict=True):
            if "://" in str(given):
                raise UserError(f"{given}: ArrayRecord files are read locally: mount the bucket")
            if not path.is_file():
                raise UserError(f"{path} does not exist: write it first (emu_jax.data.documents)")
            try:
                records: Any = grain.sources.ArrayRecordDataSource([str(path)])
                self._starts.append(self._starts[-1] + len(records))
            except Exception as error:
                raise _damaged(path, error) from None
            self._records.append(records)
        stats = [(path.name, path.stat()) for path in self.paths]
        self.fingerprint = short_hash([(n, s.st_size, s.st_mtime_ns) for n, s in stats])

    def __len__(self) -> int:
        return self._starts[-1]

    def locate(self, index: int) -> tuple[int, int]:
        """(file, record in it) of a document."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = bisect.bisect_right(self._starts, index) - 1
        return file, index - self._starts[file]

    def range_of(self, file: int) -> range:
        """The indices of a file's documents."""
        return range(self._starts[file], self._starts[file + 1])

    def where(self, index: int) -> str:
        file, record = self.locate(index)
        return f"{self.paths[file]} record {record}"

    def read(
        self, index: int, seed: Sequence[int] | None = None,
        wanted: Collection[int] | None = None,
    ) -> Document:  # fmt: skip
        file, record = self.locate(index)
        try:
            content = self._records[file][record]
        except Exception as error:
            raise Damaged("damaged record", self.where(index), _first_line(error)) from None
        return Document.from_bytes(content, self.where(index))


def short_hash(values: object) -> str:
    """Twelve hexadecimal digits that follow from `repr(values)`."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).split("; at byte")[0].splitlines()[0]


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} is cut short or damaged ({_first_line(error)}): remove it (rm {path}) and build "
        "it again"
    )
