"""Image-text and video-text pairs: WebDataset tars, as img2dataset and video2dataset write them,
and prepared directories of TensorFlow Datasets."""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import tarfile
import tempfile
from collections.abc import (
    Callable,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from emu_jax.data import storage
from emu_jax.data.documents import (
    REASONS,
    Damaged,
    Document,
    Image,
    Source,
    Text,
    short_hash,
    utf8,
)
from emu_jax.data.file_cache import FileCache
from emu_jax.data.read_ahead import Span
from emu_jax.data.records import RecordSpans
from emu_jax.data.sources.entries import look_up, parse_object
from emu_jax.data.sources.index import (
    Arrays,
    cached_flag,
    fingerprint,
    folder_for,
    index_files,
)
from emu_jax.data.sources.spans import Spans, compact_spans
from emu_jax.data.sources.tars import Member, members, note
from emu_jax.data.sources.video import VIDEO_SUFFIXES, Video, sample_frames
from emu_jax.data.unused import Tally, Unused
from emu_jax.errors import UserError, first_line

_VERSION = "samples-5"  # of what is read from a sample
_INDEX_VERSION = "samples-6"
_TEXTS = ("txt", "caption", "text")  # in this order
_ROLES = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"), "image"),
    **{suffix.removeprefix("."): "video" for suffix in VIDEO_SUFFIXES},
    **dict.fromkeys(_TEXTS, "text"),
    "json": "json",
}
_ORDER = ("image", "video", "text", "json", "board")
_IMAGE, _VIDEO, _TEXT, _JSON, _BOARD = range(len(_ORDER))
_MOST = (storage.MOST_IMAGE, storage.MOST_VIDEO, storage.MOST_TEXT, storage.MOST_ENTRY)
# Caption keys of a sample's JSON (img2dataset's and LAION's); the first that holds words wins.
_CAPTIONS = ("caption", "text", "top_caption", "TEXT")
_BOARD_META = "final_meta.json"
JOINED = "sample joined by name"
_Spans = list[list[int]]  # [role, (offset, size)]
_Key = tuple[int, str]  # (archive, the sample's name in it, "" of a corrupt member)


class Pairs(Source):
    """The samples of WebDataset tars: an image, or `frames` frames of a video, with its words.

    A sample is NAME.jpg (.png, .webp, ...) or NAME.mp4 (.webm, ...), with its words in NAME.txt
    (.caption) or in NAME.json. As in WebDataset, NAME ends at the first dot; it ends at the last
    dot only if a known suffix follows that one alone (see `_keys`).

    The release's YT-Storyboard-1B tars are read as well. A document is then NAME.0.txt,
    NAME.0.png, NAME.1.txt, ..., in that order; NAME.final_meta.json marks it as a storyboard.

    Members of a sample that are not adjacent are joined by name and counted as `JOINED`. They are
    not joined across the archives of a concatenated tar, nor in an archive that holds two
    complete samples of one name.

    Args:
        caption_key: key of the JSON to read instead of the text file and the usual keys; dots
            separate nested keys.
        wordless: keep samples without words.

    Raises:
        UserError: some samples are pairs and some are storyboards.
    """

    def __init__(
        self,
        paths: list[str],
        cache: str,
        frames: int,
        caption_key: str = "",
        wordless: bool = False,
    ) -> None:
        self.paths, self._cache = paths, cache
        self._frames, self._caption_key, self._wordless = frames, caption_key, wordless
        arrays = index_files(_INDEX_VERSION, paths, _samples_in, cache)
        self._files, self._spans = arrays["file"], Spans(arrays, len(_ORDER))
        self._tally = Tally.from_array(arrays["tally"])
        boards, pairs = self._tally.used.pop("boards", 0), self._tally.used.pop("pairs", 0)
        if boards and pairs:
            raise UserError(
                f"{pairs} samples are pairs and {boards} are storyboards ({paths[0]}): give their "
                "tars as two sources"
            )
        self._stills = self._tally.used.pop("stills", 0)
        self.paired = not boards
        self.remote = any(map(storage.is_remote, paths))
        setting = (frames, caption_key, wordless)
        self.fingerprint = short_hash((fingerprint(_VERSION, paths), setting))

    def __len__(self) -> int:
        return len(self._files)

    @functools.cached_property
    def videos(self) -> bool:  # type: ignore[override]
        # Indexes of earlier versions do not count the samples that show no video. They are scanned
        # once.
        return self._stills < len(self) and cached_flag(
            folder_for(self.paths[0], self._cache),
            f"videos-{self.fingerprint}",
            lambda: self._spans.any_with(_VIDEO, (_IMAGE, _BOARD)),
        )

    def where(self, index: int) -> str:
        file = int(self._files[index])
        return f"{self.paths[file]} sample {index - self._files.searchsorted(file)}"

    def unused(self) -> Tally:
        return self._tally

    def read(
        self,
        index: int,
        seed: Sequence[int] | None = None,
        part_indices: Collection[int] | None = None,
    ) -> Document:
        spans = self._spans[index].tolist()
        if spans[_BOARD][1]:
            return self._board(index, spans, part_indices)
        where = self.where(index)
        words, unused = self._words(index, spans, where)
        image = self._member(index, spans, _IMAGE, where)
        if image is not None:
            return Document((Image(image), *words), unused)
        offset, size = spans[_VIDEO]
        if size > _MOST[_VIDEO]:
            raise Damaged("file too large", where, f"a member of {size:,} bytes")
        video = Video(storage.RangeFile(self.paths[self._files[index]], offset, size), where)
        shown = sample_frames(video, self._frames, seed)
        return Document((*Image.video(shown), *words), (*unused, *video.unused))

    def sketch(self, index: int) -> Document:
        spans = self._spans[index].tolist()
        if spans[_BOARD][1]:
            return self._board(index, spans, ())
        words, unused = self._words(index, spans, self.where(index))
        still = spans[_IMAGE][1]
        images = [Image(b"")] if still else Image.video([(None, b"")] * self._frames)
        return Document((*images, *words), unused)

    def spans(self, index: int) -> list[Span]:
        return self._remote_spans(index, (_IMAGE,))

    def sketch_spans(self, index: int) -> list[Span]:
        return self._remote_spans(index, ())

    def _remote_spans(self, index: int, roles: tuple[int, ...]) -> list[Span]:
        """Returns the ranges of the words of a sample, and of its members of some roles."""
        path, sizes = self.paths[self._files[index]], self._spans[index].tolist()
        if not storage.is_remote(path) or self._spans.damage(index) or sizes[_BOARD][1]:
            return []
        # The words that `_captions` reads first.
        words = _TEXT if sizes[_TEXT][1] and not self._caption_key else _JSON
        return [Span(path, *sizes[role]) for role in (words, *roles) if sizes[role][1]]

    def metadata(self, index: int) -> dict[str, Any]:
        where = self.where(index)
        content = self._member(index, self._spans[index].tolist(), _JSON, where)
        return {} if content is None else parse_object(content, where)

    def _words(
        self, index: int, spans: _Spans, where: str
    ) -> tuple[tuple[Text, ...], tuple[Unused, ...]]:
        if damage := self._spans.damage(index):
            raise Damaged(REASONS[damage - 1], where)
        unused: list[Unused] = []
        if spans[_IMAGE][1] and spans[_VIDEO][1]:
            unused.append(Unused("other member", "a video beside the image"))
        for caption in self._captions(index, spans, where):
            words = [caption] if isinstance(caption, str) else caption
            words = [w for w in words if w.strip()]
            if words:
                unused += [Unused("other caption", word) for word in words[1:]]
                return (Text(words[0]),), tuple(unused)
        if not self._wordless:
            raise Damaged("incomplete sample", where, "no caption")
        return (), (*unused, Unused("no caption"))

    def _captions(self, index: int, spans: _Spans, where: str) -> Iterator[str | list[str]]:
        """Yields the captions in order of preference; alternatives come as one list."""
        content = None if self._caption_key else self._member(index, spans, _TEXT, where)
        if content is not None:
            yield utf8(content, where)
        content = self._member(index, spans, _JSON, where)
        values = {} if content is None else parse_object(content, where)
        for key in (self._caption_key,) if self._caption_key else _CAPTIONS:
            value = look_up(values, key)
            if isinstance(value, str):
                yield value
            elif isinstance(value, list):
                yield [word for word in value if isinstance(word, str)]

    def _board(self, index: int, spans: _Spans, part_indices: Collection[int] | None) -> Document:
        """Reads a storyboard; images that are not in `part_indices` stay empty."""
        path, where = self.paths[self._files[index]], self.where(index)
        if damage := self._spans.damage(index):
            raise Damaged(REASONS[damage - 1], where)
        first, size = spans[_BOARD]
        role_members: dict[tuple[int, str], Member] = {}
        key = None
        for member in members(path, first, first + size):
            if not member.name:  # a corrupt header before the storyboard
                continue
            stem, ext = _split(member.name)
            key = key or stem
            number, _, suffix = ext.partition(".")
            if stem == key and number.isdecimal() and suffix in _ROLES:
                role_members[int(number), _ROLES[suffix]] = member
        parts: list[Text | Image] = []
        unused: list[Unused] = []
        last = max((number for number, _ in role_members), default=-1)
        for number in range(last + 1):
            words, image = role_members.get((number, "text")), role_members.get((number, "image"))
            if words and (said := utf8(_content(path, words, where), where)).strip():
                parts.append(Text(said))
            if image:
                read = part_indices is None or len(parts) in part_indices
                parts.append(Image(_content(path, image, where) if read else b""))
            elif number < last:
                unused.append(Unused("missing image", f"{key}.{number}"))
        return Document(tuple(parts), tuple(unused))

    def _member(self, index: int, spans: _Spans, role: int, where: str) -> bytes | None:
        offset, size = spans[role]
        if not size:
            return None
        member = Member("", offset, size, True)
        return _content(self.paths[self._files[index]], member, where, _MOST[role])


def _content(path: str, member: Member, where: str, max_bytes: int = storage.MOST_IMAGE) -> bytes:
    """Reads a member of at most `max_bytes`.

    Raises:
        Damaged: it is too large, or the archive ends within it.
    """
    if member.size > max_bytes:
        raise Damaged("file too large", where, f"a member of {member.size:,} bytes")
    content = storage.read_part(path, member.offset, member.size)
    if len(content) < member.size:
        raise Damaged("corrupt tar member", where, "the archive is cut short")
    return content


class _Part(NamedTuple):
    """A member of a sample. A corrupt member has neither name nor role."""

    member: Member
    begin: int  # offset of its headers
    key: _Key
    role: str


class _Sample(NamedTuple):
    key: _Key
    spans: Int[np.ndarray, "roles 2"]  # (offset, size)
    damage: int  # 1 + index in REASONS, or 0
    replaced: list[str]  # names of members whose role another member fills
    joined: bool = False  # from members that are not adjacent

    @property
    def lacks(self) -> bool:
        """True if the image or video, or the text, is missing."""
        media = self.spans[[_IMAGE, _VIDEO, _BOARD], 1]
        words = self.spans[[_TEXT, _JSON, _BOARD], 1]
        return not (media.any() and words.any())


def _samples_in(path: str) -> Arrays:
    tally = Tally()
    samples = _joined(_grouped(_parts(path, tally)))
    for sample in samples:
        for name in sample.replaced:
            note(tally, "duplicate member", path, name)
        if sample.joined:
            note(tally, JOINED, path, sample.key[1].lstrip("/"))
    boards = sum(bool(sample.spans[_BOARD, 1]) for sample in samples)
    pairs = sum(bool(sample.spans[[_IMAGE, _VIDEO], 1].any()) for sample in samples)
    media = [sample.spans[[_VIDEO, _IMAGE, _BOARD], 1].tolist() for sample in samples]
    stills = sum(not video or image > 0 or board > 0 for video, image, board in media)
    tally.used |= {"boards": boards, "pairs": pairs, "stills": stills}
    empty = np.zeros((0, len(_ORDER), 2), np.int64)
    spans = np.stack([s.spans for s in samples]) if samples else empty
    damage = np.array([s.damage for s in samples], int)
    return compact_spans(spans, damage) | {"tally": tally.to_array()}


def _parts(path: str, tally: Tally) -> Iterator[_Part]:
    """Yields the members of a tar that belong to samples, and counts the others."""
    located, end = list[tuple[Member, int]](), 0
    for member in members(path):
        located.append((member, end))
        end = member.offset + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    key_of = _keys(member.name for member, _ in located)
    for member, begin in located:
        key, role = key_of(member.name) if member.name else ("", "")
        if member.name and not role:
            note(tally, "other member", path, member.name)
        else:
            yield _Part(member, begin, (member.archive, key), role)


def _keys(names: Iterable[str]) -> Callable[[str], tuple[str, str]]:
    """Returns a function from a member's name to its sample's key and its role ("" if none).

    WebDataset ends a key at the first dot. If no known suffix follows that dot, the key ends at
    the last one: `2024.01.03.jpg`. But `0002.seg.json` belongs to `0002.jpg`, and is not read.
    """
    short: set[str] = set()  # keys that end at the first dot
    boards: set[str] = set()
    long: dict[str, set[str]] = {}  # roles, by keys that end at the last dot
    for name in names:
        key, ext = _split(name)
        if ext in _ROLES:
            short.add(key)
        elif ext == _BOARD_META:
            boards.add(key)
        elif role := _ROLES.get(ext.rpartition(".")[2]):
            long.setdefault(name.rpartition(".")[0], set()).add(role)

    def key_of(name: str) -> tuple[str, str]:
        key, ext = _split(name)
        number, _, last = ext.rpartition(".")
        role = _ROLES.get(last, "")
        if os.path.basename(name).startswith("."):  # hidden, such as macOS's ._NAME
            return key, ""
        frame = number.isdecimal() and role in ("image", "text")
        if key in boards or (boards and frame):  # the last storyboard's metadata may be cut off
            return key, "board" if frame or ext == _BOARD_META else ""
        if not number:
            return key, role
        own = name.rpartition(".")[0]
        roles = long.get(own, set())
        whole = "text" in roles and not roles.isdisjoint(("image", "video"))
        return (own, role) if whole or key not in short else (key, "")

    return key_of


def _split(name: str) -> tuple[str, str]:
    """Returns (folder and name up to the first dot, the rest in lower case)."""
    folder, base = os.path.split(name)
    stem, _, ext = base.partition(".")
    return f"{folder}/{stem}", ext.lower()


def _grouped(parts: Iterable[_Part]) -> Iterator[_Sample]:
    """Groups the members of a tar into samples.

    A member with a corrupt header has no name. It is assigned to the sample around it, or else to
    the sample before or after it if that one is incomplete. Otherwise it becomes a sample of its
    own.

    Tars that were merged without their end marks read as one archive. If the first ends with K.txt
    alone and the next begins with K.jpg, the two look like any sample of two members: they are
    grouped, and not counted as joined.
    """
    group: list[_Part] = []
    before, after = None, None  # nameless members next to the group
    for part in parts:
        if not part.member.name:
            after = part
            continue
        if group and part.key == group[0].key and not _is_next(group, part):
            group += [after] if after else []
        elif group:
            after = yield from _closed(group, before, after)
            group, before = [], after
        else:
            before = after
        after = None
        group.append(part)
    if group:
        after = yield from _closed(group, before, after)
    if after:
        yield _sample([after])


def _is_next(group: list[_Part], part: _Part) -> bool:
    """Returns whether a part begins another sample of the same key: its name repeats, and the
    sample so far is complete."""
    again = any(part.member.name == other.member.name for other in group)
    return again and part.role != "board" and not _sample(group).lacks


def _closed(
    group: list[_Part], before: _Part | None, after: _Part | None
) -> Generator[_Sample, None, _Part | None]:
    """Yields a finished sample; returns the nameless member after it unless it was assigned."""
    lacks = _sample(group).lacks
    if before and not lacks:
        yield _sample([before])
    own = before if before and lacks else after if lacks else None
    yield _sample([*group, own] if own else group)
    return None if own is after else after


def _sample(group: list[_Part]) -> _Sample:
    spans = np.zeros((len(_ORDER), 2), np.int64)
    chosen: dict[str, _Part] = {}
    replaced: list[str] = []
    boards = [part for part in group if part.role == "board"]
    for part in group:
        if part.role in ("", "board"):
            continue
        other = chosen.get(part.role)
        if other is None or _preferred(part, other):
            chosen[part.role] = part
            replaced += [other.member.name] if other else []
        else:
            replaced.append(part.member.name)
    for role, part in chosen.items():
        spans[_ORDER.index(role)] = part.member.offset, part.member.size
    if boards:
        last = boards[-1].member
        spans[_BOARD] = boards[0].begin, last.offset + last.size - boards[0].begin
    reason = None
    if not all(part.member.whole for part in group):
        reason = "corrupt tar member"
    elif not spans[[_IMAGE, _VIDEO, _BOARD], 1].any():
        reason = "incomplete sample"
    elif boards and not any(_split(part.member.name)[1] == _BOARD_META for part in boards):
        reason = "incomplete sample"
    damage = 0 if reason is None else 1 + REASONS.index(reason)
    return _Sample(group[0].key, spans, damage, replaced)


def _preferred(part: _Part, other: _Part) -> bool:
    """Returns whether a member replaces an earlier one of the same role.

    Text files rank as in `_TEXTS`. Otherwise the last member wins, as when the tar is extracted.
    An empty member never replaces another, and is always replaced by one that is not empty.
    """
    if not part.member.size or not other.member.size:
        return part.member.size > 0

    def rank(part: _Part) -> int:
        return _TEXTS.index(ext) if (ext := _split(part.member.name)[1]) in _TEXTS else 0

    return rank(part) <= rank(other)


def _joined(samples: Iterable[_Sample]) -> list[_Sample]:
    """Joins samples by name if an unsorted archive holds their members apart (for example all
    images, then all words).

    An archive with several complete samples of one name is left as it is: the name does not tell
    which members belong together.
    """
    samples = list(samples)
    whole = collections.Counter(sample.key for sample in samples if not sample.lacks)
    repeats = {archive for (archive, name), count in whole.items() if name and count > 1}
    joined: list[_Sample] = []
    positions: dict[_Key, int] = {}
    corrupt = 1 + REASONS.index("corrupt tar member")
    for sample in samples:
        archive, name = sample.key
        alone = not name or archive in repeats
        position = len(joined) if alone else positions.setdefault(sample.key, len(joined))
        apart = position < len(joined) and corrupt not in (sample.damage, joined[position].damage)
        if apart and (sample.lacks or joined[position].lacks):
            other = joined[position]
            if not (other.spans[:, 1] * sample.spans[:, 1]).any():
                spans, media = other.spans + sample.spans, [_IMAGE, _VIDEO, _BOARD]
                damage = 0 if spans[media, 1].any() else sample.damage
                replaced = other.replaced + sample.replaced
                joined[position] = _Sample(sample.key, spans, damage, replaced, joined=True)
                continue
        joined.append(sample)
    return joined


class TfdsPairs(Source):
    """A prepared directory of TensorFlow Datasets, read without TensorFlow.

    An example gives its first image and its first text, or the name of its label if it has no
    text.

    Args:
        paths: one `DIRECTORY:SPLIT`, for example `coco/2014/1.1.0:train`, stored as ArrayRecord.
        cache: local copies of remote files, where they are needed (see `StoreRecords`).

    Raises:
        UserError: the directory cannot be read, or has no image feature.
    """

    paired = True
    videos = False

    def __init__(self, paths: list[str], cache: FileCache) -> None:
        import tensorflow_datasets as tfds

        if len(paths) != 1:
            raise UserError(f"tfds takes one DIRECTORY:SPLIT, not {len(paths)} paths")
        self._directory, _, split = paths[0].rpartition(":")
        if not self._directory:
            raise UserError(f"{paths[0]} has no split: write DIRECTORY:SPLIT")
        files = _files_in(self._directory)
        self.fingerprint = short_hash((split, [(name, *stat) for name, stat in files.items()]))
        try:
            with _metadata(self._directory, files) as folder:
                builder: Any = tfds.builder_from_directory(folder)
                features = builder.info.features
                image = _first(features, tfds.features.Image)
                if image is None:
                    raise UserError(f"{self._directory} has no image among its features")
                self._image = image
                self._words, self._names = _first(features, tfds.features.Text), []
                if self._words is None:
                    self._words = _first(features, tfds.features.ClassLabel)
                    if self._words is not None:
                        self._names = _at(features, self._words).names
                decoders: Any = tfds.decode.SkipDecoding()
                for name in reversed(image):
                    decoders = {name: decoders}
                self._records = builder.as_data_source(split, decoders=decoders)
            if storage.is_remote(self._directory):
                shards = [
                    (os.path.basename(shard.filename), shard.skip, shard.take)
                    for shard in builder.info.splits[split].file_instructions
                ]
                self.remote = True
                self._records.data_source = RecordSpans(
                    [
                        (storage.resolve(self._directory, name), files[name], first, count)
                        for name, first, count in shards
                    ],
                    cache,
                )
        except UserError:
            raise
        except Exception as error:  # tfds raises of every kind
            raise UserError(f"cannot read {self._directory}: {first_line(error)}") from None

    def __len__(self) -> int:
        return len(self._records)

    def spans(self, index: int) -> list[Span]:
        return self._records.data_source.spans(index) if self.remote else []

    def where(self, index: int) -> str:
        return f"{self._directory} example {index}"

    def read(
        self,
        index: int,
        seed: Sequence[int] | None = None,
        part_indices: Collection[int] | None = None,
    ) -> Document:
        where = self.where(index)
        try:
            example = self._records[index]
            images = _listed(_at(example, self._image))
            words = [] if self._words is None else _listed(_at(example, self._words))
        except UserError:
            raise
        except Exception as error:  # tfds raises of every kind
            raise Damaged("damaged record", where, first_line(error)) from None
        if not images:
            raise Damaged("incomplete sample", where, "no image")
        unused = [Unused("other image")] * (len(images) - 1)
        if self._names:  # -1 in a split without labels
            words = [self._names[n].encode() for n in map(int, words) if n >= 0]
        unused += [Unused("other caption")] * (len(words) - 1)
        if not words:
            unused.append(Unused("no caption"))
        parts = (Image(images[0]), *(Text(utf8(word, where)) for word in words[:1]))
        return Document(parts, tuple(unused))


def _files_in(directory: str) -> dict[str, storage.Stat]:
    """Returns the size and stamp of each file in a directory, by name."""
    if storage.is_remote(directory):
        return dict(sorted(storage.listing(directory).items()))
    if not os.path.isdir(directory):
        return {}
    files = sorted(p for p in Path(directory).iterdir() if p.is_file())
    return {p.name: storage.stat(str(p)) for p in files}


@contextlib.contextmanager
def _metadata(directory: str, files: Mapping[str, storage.Stat]) -> Iterator[str]:
    """Yields a local directory that tfds can open: without the records, if `directory` is remote.

    Raises:
        UserError: it is remote and empty, or its metadata cannot be read.
    """
    if not storage.is_remote(directory):
        yield directory
        return
    if not files:
        raise UserError(f"nothing is at {directory}: correct the path")
    with tempfile.TemporaryDirectory() as folder:
        for name in files:
            if ".array_record" not in name:
                Path(folder, name).write_bytes(storage.read(storage.resolve(directory, name)))
        yield folder


_Path = tuple[str, ...]


def _first(features: Any, kind: type, above: _Path = ()) -> _Path | None:
    """Returns the path of the first feature of a kind, or None."""
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


def _listed(value: Any) -> list[Any]:
    """Returns the values of a sequence, or a list of a single value."""
    return list(value) if isinstance(value, list | np.ndarray) else [value]
