"""Pictures (or videos) with words: WebDataset tars as img2dataset and video2dataset write them,
and prepared directories of TensorFlow Datasets."""

from __future__ import annotations

import os
from collections.abc import Collection, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from emu_jax.config import UserError
from emu_jax.data import storage
from emu_jax.data.documents import (
    REASONS,
    Damaged,
    Document,
    Picture,
    Source,
    Text,
    short_hash,
    utf8,
)
from emu_jax.data.index import Arrays, fingerprint, index_files
from emu_jax.data.listings import parse_object
from emu_jax.data.tars import Member, members
from emu_jax.data.video import VIDEO_SUFFIXES, Video, sample_frames

_VERSION = "samples-3"
_ROLES = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "gif", "bmp"), "picture"),
    **{suffix.removeprefix("."): "video" for suffix in VIDEO_SUFFIXES},
    "txt": "text", "json": "json",
}  # fmt: skip
_PICTURE, _VIDEO, _TEXT, _JSON = range(4)
_MOST = (storage.MOST_IMAGE, storage.MOST_VIDEO, storage.MOST_TEXT, storage.MOST_ENTRY)
_CAPTIONS = ("caption", "text", "top_caption")  # keys of a sample's JSON, the first that is there


class Pairs(Source):
    """The samples of WebDataset tars: a picture, or `frames` frames of a video, and its words.

    A sample is the run of members whose names agree up to the first dot: NAME.jpg (.png, .webp,
    ...) or NAME.mp4 (.webm, ...), with the words in NAME.txt or under `caption` in NAME.json.
    """

    paired = True

    def __init__(self, paths: list[str], cache: str, frames: int):
        self.paths = paths
        self._frames = frames
        found = index_files(_VERSION, paths, _samples_in, cache)
        self._files, self._spans, self._damage = found["file"], found["spans"], found["damage"]
        self._numbers = found["number"]
        self.fingerprint = short_hash((fingerprint(_VERSION, paths), frames))

    def __len__(self) -> int:
        return len(self._files)

    def where(self, index: int) -> str:
        return f"{self.paths[self._files[index]]} sample {self._numbers[index]}"

    def read(
        self, index: int, seed: Sequence[int] | None = None,
        wanted: Collection[int] | None = None,
    ) -> Document:  # fmt: skip
        words = self._words(index)
        picture = self._member(index, _PICTURE)
        if picture is not None:
            return Document((Picture(picture), *words))
        content = self._member(index, _VIDEO)
        assert content is not None  # or the sample would be damaged
        video = Video(content, self.where(index))
        shown = sample_frames(video, self._frames, seed)
        parts = (*(Picture(data, time) for time, data in shown), *words)
        return Document(parts, tuple(video.unused))

    def sketch(self, index: int) -> Document:
        words = self._words(index)
        pictures = 1 if self._spans[index, _PICTURE, 1] else self._frames
        return Document((*[Picture(b"")] * pictures, *words))

    def _words(self, index: int) -> tuple[Text, ...]:
        where = self.where(index)
        if damage := int(self._damage[index]):
            raise Damaged(REASONS[damage - 1], where)
        content = self._member(index, _TEXT)
        if content is not None:
            return (Text(utf8(content, where)),)
        content = self._member(index, _JSON)
        values = {} if content is None else parse_object(content, where)
        captions = [v for key in _CAPTIONS if isinstance(v := values.get(key), str)]
        return tuple(map(Text, captions[:1]))

    def _member(self, index: int, role: int) -> bytes | None:
        offset, size = self._spans[index, role].tolist()
        if not size:
            return None
        if size > _MOST[role]:
            raise Damaged("file too large", self.where(index), f"a member of {size:,} bytes")
        content = storage.read(self.paths[self._files[index]], offset, size)
        if len(content) < size:
            raise Damaged("corrupt tar member", self.where(index), "the archive is cut short")
        return content


class _Sample(NamedTuple):
    spans: np.ndarray  # [role, (offset, size)]
    damage: int  # 1 + place in REASONS, or 0

    @property
    def lacks(self) -> bool:
        """Whether it has no picture or video, or no words."""
        media, words = self.spans[[_PICTURE, _VIDEO], 1], self.spans[[_TEXT, _JSON], 1]
        return not (media.any() and words.any())


def _samples_in(path: str) -> Arrays:
    samples = list(_samples(path))
    empty = np.zeros((0, len(_ORDER), 2), np.int64)
    return {
        "spans": np.stack([s.spans for s in samples]) if samples else empty,
        "damage": np.array([s.damage for s in samples], np.int8),
        "number": np.arange(len(samples), dtype=np.int32),
    }


_ORDER = ("picture", "video", "text", "json")


def _samples(path: str) -> Iterator[_Sample]:
    """The samples of a tar. A member whose header is corrupt has no name: it is taken for one of
    the sample around it, or else of that before or after it which lacks something; where none
    does it stands for a sample of its own."""
    group: list[Member] = []
    key, before, after = None, None, None  # nameless members next to the group
    for member in members(path):
        base, name = os.path.split(member.name)
        stem, _, suffix = name.partition(".")
        if not member.name:
            after = member
            continue
        if suffix.lower() not in _ROLES:
            continue
        if (base, stem) == key:
            group += [after] if after else []
        elif group:
            after = yield from _closed(group, before, after)
            group, before = [], after
        else:
            before = after
        key, after = (base, stem), None
        group.append(member)
    if group:
        after = yield from _closed(group, before, after)
    if after:
        yield _sample([after])


def _closed(
    group: list[Member], before: Member | None, after: Member | None
) -> Generator[_Sample, None, Member | None]:
    """Yields a finished sample; returns the nameless member after it, if it is not its own."""
    lacks = _sample(group).lacks
    if before and not lacks:
        yield _sample([before])
    own = before if before and lacks else after if lacks else None
    yield _sample([*group, own] if own else group)
    return None if own is after else after


def _sample(group: list[Member]) -> _Sample:
    spans = np.zeros((len(_ORDER), 2), np.int64)
    for member in group:
        if member.name:
            role = _ROLES[member.name.rpartition("/")[2].partition(".")[2].lower()]
            spans[_ORDER.index(role)] = member.offset, member.size
    reason = None
    if not all(m.whole for m in group):
        reason = "corrupt tar member"
    elif not spans[[_PICTURE, _VIDEO], 1].any():
        reason = "incomplete sample"
    return _Sample(spans, 0 if reason is None else 1 + REASONS.index(reason))


class TfdsPairs(Source):
    """A prepared directory of TensorFlow Datasets, read without TensorFlow: its first picture
    and its first text, or the name of its label where it has no text.

    Args:
        paths: one `DIRECTORY:SPLIT`, for example `coco/2014/1.1.0:train`; files of ArrayRecord.
    """

    paired = True

    def __init__(self, paths: list[str]):
        import tensorflow_datasets as tfds

        if len(paths) != 1:
            raise UserError(f"tfds reads one DIRECTORY:SPLIT, not {len(paths)}")
        self._directory, _, split = paths[0].rpartition(":")
        if not self._directory:
            raise UserError(f"{paths[0]} names no split: write DIRECTORY:SPLIT")
        try:
            builder: Any = tfds.builder_from_directory(self._directory)
            features = builder.info.features
            picture = _first(features, tfds.features.Image)
            if picture is None:
                raise UserError(f"{self._directory} has no picture among its features")
            self._picture = picture
            self._words, self._names = _first(features, tfds.features.Text), []
            if self._words is None:
                self._words = _first(features, tfds.features.ClassLabel)
                if self._words is not None:
                    self._names = _at(features, self._words).names
            decoders: Any = tfds.decode.SkipDecoding()
            for name in reversed(picture):
                decoders = {name: decoders}
            self._records = builder.as_data_source(split, decoders=decoders)
        except UserError:
            raise
        except Exception as error:  # tfds raises of every kind
            raise UserError(f"cannot read {self._directory}: {_first_line(error)}") from None
        files = sorted(p for p in Path(self._directory).iterdir() if p.is_file())
        stats = [(p.name, *storage.stat(str(p))) for p in files]
        self.fingerprint = short_hash((split, stats))

    def __len__(self) -> int:
        return len(self._records)

    def where(self, index: int) -> str:
        return f"{self._directory} example {index}"

    def read(
        self, index: int, seed: Sequence[int] | None = None,
        wanted: Collection[int] | None = None,
    ) -> Document:  # fmt: skip
        where = self.where(index)
        try:
            example = self._records[index]
            picture = Picture(_one(_at(example, self._picture)))
            words = [] if self._words is None else [_one(_at(example, self._words))]
        except Exception as error:  # tfds raises of every kind
            raise Damaged("damaged record", where, _first_line(error)) from None
        if self._names:
            labels = [int(word) for word in words]  # -1 in a split without labels
            return Document((picture, *(Text(self._names[n]) for n in labels if n >= 0)))
        return Document((picture, *(Text(utf8(word, where)) for word in words)))


_Path = tuple[str, ...]


def _first(features: Any, kind: type, above: _Path = ()) -> _Path | None:
    """The path of the first feature of a kind."""
    if isinstance(features, kind):
        return above
    if hasattr(features, "items"):
        for name, feature in features.items():
            if (found := _first(feature, kind, (*above, name))) is not None:
                return found
    elif hasattr(features, "feature"):  # a sequence
        return _first(features.feature, kind, above)
    return None


def _at(values: Any, path: _Path) -> Any:
    for name in path:
        values = values[name]
    return values


def _one(value: Any) -> Any:
    """A value, or the first of a sequence of them."""
    return value[0] if isinstance(value, list | np.ndarray) else value


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]
