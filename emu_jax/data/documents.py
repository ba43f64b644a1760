"""Documents, and ArrayRecord files of them.

A document is what Emu reads as one sequence: texts and pictures in order. An image-text
pair, a web page and a video with subtitles are all documents; they differ in content only.
"""

from __future__ import annotations

import bisect
import dataclasses
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import grain
import msgpack
from array_record.python.array_record_module import ArrayRecordWriter

from emu_jax.config import UserError
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
    """An encoded picture (PNG, JPEG, ...); a frame of a video knows its time in seconds."""

    data: bytes
    time: float | None = None


@dataclasses.dataclass(frozen=True)
class Document:
    """Texts and pictures in reading order."""

    parts: tuple[Text | Picture, ...]

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
            ["text", *p.to_list()] if isinstance(p, Text) else ["picture", p.data, p.time]
            for p in self.parts
        ]
        return cast(bytes, msgpack.packb({"version": VERSION, "parts": parts}))

    @classmethod
    def from_bytes(cls, record: bytes, where: str = "a record") -> Document:
        """Reads what `to_bytes` wrote.

        Raises:
            UserError: it is no document, or of a later version; the line starts with `where`.
        """
        try:
            values = msgpack.unpackb(record)
            version = values["version"]
            if version == VERSION:
                make = {"text": Text, "picture": Picture}
                return cls(tuple(make[kind](*rest) for kind, *rest in values["parts"]))
        except Exception as error:  # whatever foreign bytes make msgpack raise
            raise UserError(f"{where} is not an emu_jax document: {error!r}") from None
        raise UserError(
            f"{where} is a document of version {version}, this emu_jax reads {VERSION}: "
            "build the data again"
        )


def write_documents(path: str | os.PathLike, documents: Iterable[Document]) -> int:
    """Writes an ArrayRecord file, atomically; returns the number of documents."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        # Groups of one record: random reads would otherwise decompress whole groups.
        writer = ArrayRecordWriter(temporary, "group_size:1")
        count = 0
        for document in documents:
            writer.write(document.to_bytes())
            count += 1
        writer.close()
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return count


class DocumentFiles(Sequence[Document]):
    """The documents of some ArrayRecord files, read at random.

    Raises (also when indexed):
        UserError: a file is missing, cut short or damaged; the line names it and the mend.
    """

    def __init__(self, paths: Sequence[str | os.PathLike]):
        self.paths = [Path(p) for p in paths]
        self._records: list[Any] = []  # of each file
        self._starts = [0]
        for path in self.paths:
            if not path.is_file():
                raise UserError(f"{path} does not exist: write it first (emu_jax.data.documents)")
            try:
                records: Any = grain.sources.ArrayRecordDataSource([str(path)])
                self._starts.append(self._starts[-1] + len(records))
            except Exception as error:
                raise _damaged(path, error) from None
            self._records.append(records)

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
        """A document's place, for messages."""
        file, record = self.locate(index)
        return f"{self.paths[file]} record {record}"

    def __getitem__(self, index: int) -> Document:  # type: ignore[override]
        file, record = self.locate(index)
        try:
            content = self._records[file][record]
        except Exception as error:
            raise _damaged(self.paths[file], error) from None
        return Document.from_bytes(content, self.where(index))

    def __iter__(self) -> Iterator[Document]:
        return (self[i] for i in range(len(self)))


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).split("; at byte")[0].splitlines()[0]
    return UserError(
        f"{path} is cut short or damaged ({reason}): remove it (rm {path}) and build it again"
    )
