"""Batches: one class for each kind, which reads, tokenizes and decodes documents into arrays.

A task for the thread pool is a document, or a few documents of packed rows. A document that cannot
be read does not move the others, so processes with other rows need not know of damage. In a packed
row its tokens become padding. In a batch of single documents it is replaced by a substitute that
is a function of its number.
"""

from __future__ import annotations

import abc
import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import Bool, Int, UInt8

from emu_jax.data import storage
from emu_jax.data.config import DataConfig, HostBatch, Kind
from emu_jax.data.documents import Damaged, Image, Text
from emu_jax.data.images import (
    ImageError,
    affine,
    open_image,
    resize,
    sample_affine,
    square_crop,
    to_array,
)
from emu_jax.data.lengths import check_frames, image_size, text_ids
from emu_jax.data.mixture import VIDEO_FRAMES, Group, PackedDocument, Requirements, SampledDocument
from emu_jax.data.packing import (
    IMAGE_PART,
    VIDEO_PART,
    PartRange,
    part_tokens,
    truncate,
    whole_videos,
)
from emu_jax.data.read_ahead import Span
from emu_jax.errors import UserError
from emu_jax.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# Where a stream's next batch begins: (block, row of the block) for packed rows, (0, document) for
# other kinds.
Position = tuple[int, int]
# The position of each stream of a group; None if another process plans the stream.
Positions = tuple[Position | None, ...]
ArrayShapes = dict[str, tuple[tuple[int, ...], type]]  # {name: (shape, dtype)} of a batch's arrays

STATISTICS: tuple[str, ...] = (
    "tokens",
    "token_capacity",
    "images",
    "image_capacity",
    "documents",
    "truncated",
)
ROW_STATISTICS = ("tokens", "images", "documents", "truncated")  # columns of `Block.totals`
_IMAGES_PER_TASK = 16  # images that one task reads, then decodes
_ATTEMPTS = 20  # consecutive unreadable documents before giving up
_SMALL_IMAGE = 4096  # bytes; smaller images are cached once resized


class Damage(NamedTuple):
    """A document that was skipped because it cannot be read."""

    source: str
    index: int
    reason: str
    where: str


class BuiltBatch(NamedTuple):
    """This process's rows of a batch, with their documents and statistics.

    Statistics are those of `counted_rows`: all rows of the global batch if this process plans all,
    otherwise its own.
    """

    batch: HostBatch
    positions: Positions  # of the next batch
    documents: list[SampledDocument]  # in this process's rows
    statistics: dict[str, int]
    by_source: dict[str, dict[str, int]]  # statistics of the documents of each source
    damaged: list[Damage]  # found by this process
    counted_rows: int
    batch_rows: int  # rows of the global batch

    def estimate(self, value: int) -> int:
        """Returns a statistic of the global batch, in proportion to the rows counted."""
        return value * self.batch_rows // max(1, self.counted_rows)


class BatchExample(NamedTuple):
    """One row of a batch of any kind, for display, with its tokens up to the last one in use."""

    tokens: list[int]
    segments: list[int]  # of each token: its document, from 1; 0 is padding
    scored: list[bool]  # of each token: a text target
    embedding_index: list[int]  # of each token: the index of its embedding, or -1 in text
    images: UInt8[np.ndarray, "I h w 3"]  # some of them empty
    used: list[bool]  # of each image
    regressed: list[bool]  # of each image: its embeddings are targets
    target: UInt8[np.ndarray, "h w 3"] | None = None  # for the decoder to generate
    row_tokens: int = 0  # tokens of the whole row, padding included


class RowAssignment:
    """The rows of a group's batches that a process plans, builds and counts.

    Args:
        local_rows: this process's rows of a global batch, as ranges in rising order; or None to
            build no rows and only plan.

    Attributes:
        counted_rows: the rows that statistics are counted of: all if there is one stream, which
            every process plans; otherwise each row by the process that builds it.
    """

    def __init__(self, group: Group, local_rows: Sequence[range] | None) -> None:
        self.group = group
        every: Sequence[range] = (range(group.cfg.batch_size),)
        self.local_rows: Sequence[range] = local_rows or ()
        self.counted_rows = every if local_rows is None or group.streams == 1 else local_rows
        self._reporting_rows = every if local_rows is None else local_rows

    def streams(self) -> list[int]:
        """Returns the streams that this process plans."""
        size = self.group.stream_rows
        streams = [range(r.start // size, -(-r.stop // size)) for r in self.counted_rows if r]
        return sorted(set(itertools.chain(*streams)))

    def local(self, rows: range) -> Iterator[tuple[int, int]]:
        """Yields (index here, row) of the rows of a global batch that this process builds."""
        first = 0
        for mine in self.local_rows:
            for row in _overlap(rows, mine):
                yield first + row - mine.start, row
            first += len(mine)

    def counted(self, rows: range) -> Iterator[range]:
        """Yields the ranges of `rows` that statistics are counted of."""
        for counted in self.counted_rows:
            if overlap := _overlap(rows, counted):
                yield overlap

    def stream_rows(self, stream: int) -> range:
        """Returns the rows of a batch that a stream fills."""
        size = self.group.stream_rows
        return range(stream * size, (stream + 1) * size)

    def planned(self, positions: Positions) -> list[tuple[int, Position]]:
        """Returns (stream, position) of the streams that this process plans.

        Raises:
            ValueError: one of these positions is None.
        """
        result = []
        for stream in self.streams():
            position = positions[stream]
            if position is None:
                raise ValueError(f"the position of stream {stream} is unknown")
            result.append((stream, position))
        return result

    def after(self, positions: dict[int, Position]) -> Positions:
        """Returns the positions of all streams; None for those planned by other processes."""
        return tuple(positions.get(stream) for stream in range(self.group.streams))

    def reported(self, damaged: list[SampledDocument], stream: int) -> list[Damage]:
        """Returns the documents of a stream found damaged while counting tokens, on the process
        that builds the stream's first row; nothing on the others."""
        first = self.stream_rows(stream).start
        if not any(first in rows for rows in self._reporting_rows):
            return []
        return [_damage(document, document.damage or "") for document in damaged]


class PlannedRows(NamedTuple):
    """This process's rows of a batch before any document is read.

    Attributes:
        placements: the documents of this process's rows.
        positions: of the next batch.
        totals: ROW_STATISTICS of the counted rows, by source.
        damaged: documents found damaged while counting tokens.
    """

    placements: list[_Placement]
    positions: Positions
    totals: Int[np.ndarray, "sources 4"]
    damaged: list[Damage]


def plan_rows(assignment: RowAssignment, positions: Positions) -> PlannedRows:
    """Plans the batch of packed rows that begins at the positions of its streams, and reads no
    document.

    Raises:
        ValueError: the position of a stream that is planned here is None.
    """
    group = assignment.group
    after: dict[int, Position] = {}
    damaged: list[Damage] = []
    placements: list[_Placement] = []
    totals = np.zeros((len(group.sources), len(ROW_STATISTICS)), np.int64)
    for stream, (block, row) in assignment.planned(positions):
        batch_row, stop = assignment.stream_rows(stream).start, assignment.stream_rows(stream).stop
        while batch_row < stop:
            packed = group.block(block, stream)
            if row == 0:
                damaged += assignment.reported(packed.damaged, stream)
            offset = row - batch_row  # from the batch's rows to the block's
            end = min(stop, len(packed) - offset)
            for counted in assignment.counted(range(batch_row, end)):
                totals += packed.totals(counted.start + offset, counted.stop + offset)
            for n, global_row in assignment.local(range(batch_row, end)):
                placements += _placements(n, packed.row(global_row + offset))
            batch_row, row = end, end + offset
            if row == len(packed):
                block, row = block + 1, 0
        after[stream] = block, row
    return PlannedRows(placements, assignment.after(after), totals, damaged)


class BatchBuilder(abc.ABC):
    """Builds the batch of a group at a given position. Stateless. One subclass for each kind.

    Args:
        local_rows: see `RowAssignment`.

    Attributes:
        assignment: the rows that this process plans and builds.
        requires: properties of the documents that this kind of batches can use.
    """

    requires: ClassVar[Requirements]

    def __init__(
        self, group: Group, tokenizer: Tokenizer, local_rows: Sequence[range] | None, pool: Pool
    ) -> None:
        self.group, self.cfg, self.tokenizer = group, group.cfg, tokenizer
        if self.cfg.n_frame and tokenizer.frame is None:
            raise UserError(
                "data.n_frame needs a token of video frames, which this tokenizer does not have: "
                "set data.n_frame=0, or data.family=emu2"
            )
        self.assignment = RowAssignment(group, local_rows)
        self._pool = pool
        # Captions repeat, and so do the images of a small data set.
        self.encode = functools.lru_cache(1 << 14)(lambda text: text_ids(text, tokenizer))
        self._resized_small = functools.lru_cache(1 << 12)(self._resized)
        self._shapes = {
            name: ((sum(map(len, self.assignment.local_rows)), *shape[1:]), dtype)
            for name, (shape, dtype) in self.shapes(self.cfg).items()
        }

    @staticmethod
    @abc.abstractmethod
    def shapes(cfg: DataConfig) -> ArrayShapes:
        """Returns the arrays of a global batch."""

    @staticmethod
    @abc.abstractmethod
    def example(batch: HostBatch) -> BatchExample:
        """Returns the first row of a batch."""

    @abc.abstractmethod
    def can_end_at(self, position: Position, stream: int) -> bool:
        """Returns whether a batch can end at a position of a stream."""

    @abc.abstractmethod
    def build(self, positions: Positions) -> BuiltBatch:
        """Builds the batch that begins at the positions of its streams.

        Raises:
            ValueError: the position of a stream that is planned here is None.
        """

    def _read_ahead(
        self,
        documents: Iterable[SampledDocument],
        following: Callable[[], Iterable[SampledDocument]],
    ) -> None:
        """Requests the remote documents of this batch, and then those of the next one, so that
        reading overlaps with decoding."""
        if any(source.documents.remote for source in self.group.sources):
            coming = itertools.chain(documents, following())
            spans: Iterable[list[Span]] = map(_spans, coming)
            if storage.is_remote(self.cfg.cache):  # they may have to be fetched first
                with ThreadPoolExecutor(storage.THREADS) as pool:
                    spans = list(pool.map(_spans, coming))
            storage.read_ahead(itertools.chain.from_iterable(spans))

    def _empty(self) -> HostBatch:
        return {name: np.zeros(shape, dtype) for name, (shape, dtype) in self._shapes.items()}

    def _contents(
        self, sampled: SampledDocument, parts: list[PartRange]
    ) -> list[tuple[PartRange, Text | Image]]:
        """Reads the contents of some parts of a document.

        Raises:
            Damaged: the document cannot be read, or has changed since its tokens were counted.
            UserError: see `check_frames`.
        """
        seed, source = self.group.seed(sampled, VIDEO_FRAMES), sampled.source.documents
        document = source.read(sampled.index, seed, [part.index for part in parts])
        if self.cfg.n_frame:
            check_frames(document, source.paired, source.where(sampled.index))
        counted = sampled.lengths

        def size(n: int) -> int:
            part = document.parts[n]
            if isinstance(part, Text):
                return len(self.encode(part))
            return image_size(document, n) if self.cfg.n_frame else IMAGE_PART

        actual = {p.index: size(p.index) for p in parts if p.index < len(document.parts)}
        if len(document.parts) != len(counted) or any(counted[n] != actual[n] for n in actual):
            raise Damaged(
                "changed document",
                source.where(sampled.index),
                "its content has changed since its tokens were counted",
            )
        return [(part, document.parts[part.index]) for part in parts]

    def part_ids(self, part: PartRange, content: Text | Image) -> list[int]:
        """Returns the token ids of a part that is a text."""
        assert isinstance(content, Text)
        return self.encode(content)[part.first : part.first + part.size]

    def _decode_into(
        self,
        out: UInt8[np.ndarray, "h w 3"],
        image: Text | Image,
        rng: np.random.Generator,
    ) -> None:
        """Decodes, resizes and augments one image.

        Raises:
            ImageError: the image cannot be read.
        """
        assert isinstance(image, Image)
        cfg = self.cfg
        resized = self._resized_small if len(image.data) < _SMALL_IMAGE else self._resized
        pixels = resized(image.data, out.shape[0])
        if cfg.augment:
            motion = sample_affine(rng, rotate=cfg.rotate, scale=cfg.scale, shift=cfg.shift)
            pixels = affine(pixels, *motion)
        out[:] = to_array(pixels)

    def _resized(self, data: bytes, size: int) -> PIL.Image.Image:
        fast = self.cfg.fast_decode
        image = open_image(data, at_least=size if fast else None)
        return resize(image, size, fast=fast)


class RowBuilder(BatchBuilder):
    """Packed rows of several documents.

    tokens, segment_ids (0 = padding), positions int32 [B,T]; text_loss_mask bool [B,T], True where
    the token is a text target; images uint8 [B,I,h,w,3]; image_valid, image_scored (a regression
    target) bool [B,I]; embedding_index int32 [B,T], the index among the row's I*N embeddings at an
    <image>, -1 elsewhere. With `n_frame`, also image_frames bool [B,I], the frames of videos, whose
    n_frame embeddings are at [gIMG]; they are no regression targets.
    """

    requires = Requirements("rows")

    @staticmethod
    def shapes(cfg: DataConfig) -> ArrayShapes:
        B, T, I = cfg.batch_size, cfg.row_tokens, cfg.row_images  # noqa: E741
        return {
            "tokens": ((B, T), np.int32),
            "segment_ids": ((B, T), np.int32),
            "positions": ((B, T), np.int32),
            "text_loss_mask": ((B, T), bool),
            "image_scored": ((B, I), bool),
            **_input_shapes(cfg),
        }

    @staticmethod
    def example(batch: HostBatch) -> BatchExample:
        row = {name: values[0] for name, values in batch.items()}
        return _example(
            row,
            segments=row["segment_ids"],
            scored=row["text_loss_mask"],
            regressed=row["image_scored"],
        )

    def can_end_at(self, position: Position, stream: int) -> bool:
        block, row = position
        return row < max(1, len(self.group.block(block, stream)))

    def build(self, positions: Positions) -> BuiltBatch:
        batch = self._empty()
        placements, after, totals, damaged = plan_rows(self.assignment, positions)
        batch["tokens"][:] = self.tokenizer.pad_id
        batch["embedding_index"][:] = -1
        self._read_ahead(
            (placement.packed.sampled for placement in placements),
            lambda: (p.packed.sampled for p in plan_rows(self.assignment, after).placements),
        )
        for unreadable in self._pool(
            lambda task: self._write_documents(batch, task), self._tasks(placements)
        ):
            damaged += unreadable
        by_source = {
            source.cfg.name: dict.fromkeys(STATISTICS, 0)
            | dict(zip(ROW_STATISTICS, values, strict=True))
            for source, values in zip(self.group.sources, totals.tolist(), strict=True)
            if any(values)
        }
        counted_rows = sum(map(len, self.assignment.counted_rows))
        capacity = {
            "token_capacity": counted_rows * self.cfg.row_tokens,
            "image_capacity": counted_rows * self.cfg.row_images,
        }
        sampled = [placement.packed.sampled for placement in placements]
        return BuiltBatch(
            batch,
            after,
            sampled,
            _sum(by_source.values()) | capacity,
            by_source,
            damaged,
            counted_rows,
            self.cfg.batch_size,
        )

    def _tasks(self, placements: list[_Placement]) -> list[list[_Placement]]:
        """Splits documents into tasks of at most `_IMAGES_PER_TASK` images.

        A document with more images is a task of its own. With several threads, tasks get smaller
        towards the end to let all threads finish at about the same time.
        """
        threads = self._pool.threads
        sizes = [max(1, placement.packed.images) for placement in placements]
        left, room = sum(sizes), 0
        tasks: list[list[_Placement]] = []
        for placement, size in zip(placements, sizes, strict=True):
            if size > room:
                tasks.append([])
                room = (
                    _IMAGES_PER_TASK
                    if threads == 1
                    else min(_IMAGES_PER_TASK, left // (2 * threads))
                )
            tasks[-1].append(placement)
            left, room = left - size, room - size
        return tasks

    def _write_documents(self, batch: HostBatch, placements: list[_Placement]) -> list[Damage]:
        """Writes documents to their rows; leaves padding in place of one that cannot be read.

        Runs each step for all documents before the next step. Decoding an image evicts the
        processor's caches, and the other steps take twice as long when they alternate with it.
        """
        damaged: list[Damage] = []
        decoded: list[_EncodedDocument] = []
        for document in [self._read(placement) for placement in placements]:
            if isinstance(document, Damage):
                damaged.append(document)
            elif damage := self._decode(batch, document):
                damaged.append(damage)
            else:
                decoded.append(document)
        for document in decoded:
            self._write(batch, document)
        return damaged

    def _read(self, placement: _Placement) -> _EncodedDocument | Damage:
        sampled = placement.packed.sampled
        rng = self.group.rng(sampled)
        parts, cut = self.group.fit(sampled, rng)
        try:
            contents = self._contents(sampled, parts)
        except Damaged as error:
            return _damage(sampled, error.reason)
        sequence = _Sequence(self, placement.images.start)
        sequence.begin()
        for part, content in contents:
            sequence.add(part, content)
        sequence.end(cut=cut)
        encoded = [content for _, content in contents if isinstance(content, Image)]
        return _EncodedDocument(placement, sequence, encoded, rng)

    def _decode(self, batch: HostBatch, document: _EncodedDocument) -> Damage | None:
        placement = document.placement
        out = batch["images"][placement.row, placement.images]
        try:
            for pixels, image in zip(out, document.encoded, strict=True):
                self._decode_into(pixels, image, document.rng)
        except ImageError as error:
            out[:] = 0
            return _damage(placement.packed.sampled, error.reason)
        document.encoded.clear()  # frees video frames, which are large
        return None

    def _write(self, batch: HostBatch, document: _EncodedDocument) -> None:
        placement, sequence = document.placement, document.sequence
        n, tokens, images = placement.row, placement.tokens, placement.images
        batch["tokens"][n, tokens] = sequence.tokens
        batch["segment_ids"][n, tokens] = placement.segment
        batch["positions"][n, tokens] = np.arange(len(sequence.tokens))
        batch["text_loss_mask"][n, tokens] = sequence.scored
        batch["embedding_index"][n, tokens] = sequence.embedding_index
        batch["image_valid"][n, images] = True
        batch["image_scored"][n, images] = sequence.scored_images
        if self.cfg.n_frame:
            batch["image_frames"][n, images] = sequence.frames


class _SingleBuilder(BatchBuilder):
    """Batches with one document per row."""

    def can_end_at(self, position: Position, stream: int) -> bool:
        return position[0] == 0

    def build(self, positions: Positions) -> BuiltBatch:
        batch = self._empty()
        after: dict[int, Position] = {}
        damaged: list[Damage] = []
        local: list[SampledDocument] = []
        counted: list[SampledDocument] = []
        assignment = self.assignment
        for stream, (_, first) in assignment.planned(positions):
            rows = assignment.stream_rows(stream)
            documents, skipped, stop = self.group.next(first, len(rows), stream)
            after[stream] = 0, stop
            damaged += assignment.reported(skipped, stream)
            local += [documents[row - rows.start] for _, row in assignment.local(rows)]
            for part in assignment.counted(rows):
                counted += documents[part.start - rows.start : part.stop - rows.start]
        self._read_ahead(local, lambda: self._local(assignment.after(after)))
        unreadable = self._pool(
            lambda n: self._fill_or_replace(batch, n, local[n]), range(len(local))
        )
        damaged += [damage for row in unreadable for damage in row]
        by_source = _sum_by_source((document, self._measure(document)) for document in counted)
        return BuiltBatch(
            batch,
            assignment.after(after),
            local,
            _sum(by_source.values()),
            by_source,
            damaged,
            len(counted),
            self.cfg.batch_size,
        )

    def _local(self, positions: Positions) -> Iterator[SampledDocument]:
        """Yields the documents of this process's rows at the positions of the streams."""
        for stream, (_, first) in self.assignment.planned(positions):
            rows = self.assignment.stream_rows(stream)
            documents, _, _ = self.group.next(first, len(rows), stream)
            for _, row in self.assignment.local(rows):
                yield documents[row - rows.start]

    @abc.abstractmethod
    def _fill(self, batch: HostBatch, n: int, sampled: SampledDocument) -> None:
        """Fills row `n` with a document.

        Raises:
            Damaged, ImageError: the document cannot be read.
        """

    @abc.abstractmethod
    def _measure(self, sampled: SampledDocument) -> dict[str, int]:
        """Returns the statistics of a document's row, without reading the document."""

    def _fill_or_replace(self, batch: HostBatch, n: int, sampled: SampledDocument) -> list[Damage]:
        """Fills one row. A document that cannot be read is replaced by substitutes.

        Raises:
            UserError: `_ATTEMPTS` consecutive documents cannot be read.
        """
        damaged, chosen, last = [], sampled, None
        for attempt in range(_ATTEMPTS):
            try:
                self._fill(batch, n, chosen)
                return damaged
            except (Damaged, ImageError) as error:
                damaged.append(_damage(chosen, error.reason))
                last = error
            chosen = self.group.substitute(sampled, attempt)
        raise UserError(
            f"{_ATTEMPTS} consecutive documents of source {sampled.source.cfg.name!r} cannot be "
            f"read; the last: {last}"
        )


class CaptionBuilder(_SingleBuilder):
    """Image-text pairs.

    images uint8 [B,h,w,3]; tokens int32 [B,T], `<s> words </s>`, padded on the right; valid bool
    [B,T].
    """

    requires = Requirements("captions", image=True, text=True, pairs=True)

    @staticmethod
    def shapes(cfg: DataConfig) -> ArrayShapes:
        B, T, h = cfg.batch_size, cfg.row_tokens, cfg.image_size
        return {
            "images": ((B, h, h, 3), np.uint8),
            "tokens": ((B, T), np.int32),
            "valid": ((B, T), bool),
        }

    @staticmethod
    def example(batch: HostBatch) -> BatchExample:
        row = {name: values[0] for name, values in batch.items()}
        return _example(
            row | {"images": row["images"][None], "image_valid": np.array([True])},
            segments=row["valid"].astype(int),
            scored=row["valid"],
            regressed=np.array([False]),
        )

    def _fill(self, batch: HostBatch, n: int, sampled: SampledDocument) -> None:
        parts = self.group.parts(sampled, image_first=True)
        images = [part for part in parts if part.size < 0]
        words = [part for part in parts if part.size >= 0]
        (_, image), *texts = self._contents(sampled, [*images[:1], *words])
        ids = [i for part, content in texts for i in self.part_ids(part, content)]
        # A truncated caption also ends in </s>, whose hidden state is read.
        ids = [self.tokenizer.bos, *ids[: self.cfg.row_tokens - 2], self.tokenizer.eos]
        self._decode_into(batch["images"][n], image, self.group.rng(sampled))
        batch["tokens"][n] = self.tokenizer.pad_id
        batch["tokens"][n, : len(ids)] = ids
        batch["valid"][n] = np.arange(self.cfg.row_tokens) < len(ids)

    def _measure(self, sampled: SampledDocument) -> dict[str, int]:
        text, room = sum(size for size in sampled.lengths if size > 0), self.cfg.row_tokens - 2
        return {
            "images": 1,
            "image_capacity": 1,
            "documents": 1,
            "tokens": min(text, room) + 2,
            "token_capacity": room + 2,
            "truncated": int(text > room),
        }


class ImageBuilder(_SingleBuilder):
    """Images alone, at the autoencoder's size: images uint8 [B,h,w,3]."""

    requires = Requirements("images", image=True, pairs=True)

    @staticmethod
    def shapes(cfg: DataConfig) -> ArrayShapes:
        return {"images": ((cfg.batch_size, cfg.target_size, cfg.target_size, 3), np.uint8)}

    @staticmethod
    def example(batch: HostBatch) -> BatchExample:
        return BatchExample([], [], [], [], batch["images"][:1], [True], [False])

    def _fill(self, batch: HostBatch, n: int, sampled: SampledDocument) -> None:
        parts = self.group.parts(sampled, image_first=True)[:1]
        ((_, image),) = self._contents(sampled, parts)
        self._decode_into(batch["images"][n], image, self.group.rng(sampled))

    def _measure(self, sampled: SampledDocument) -> dict[str, int]:
        return {"images": 1, "image_capacity": 1, "documents": 1}


class ContextBuilder(_SingleBuilder):
    """Images that the decoder learns to generate, each with its context. Frames of videos, which
    the model does not generate, are context alone.

    tokens int32 [B,T], the context before the image, up to and including its [IMG], padded on the
    right; length int32 [B]; images, image_valid, embedding_index of the context's own images as in
    packed rows; target uint8 [B,h,w,3], the image.
    """

    requires = Requirements("contexts", image=True, still=True)

    @staticmethod
    def shapes(cfg: DataConfig) -> ArrayShapes:
        B, T, side = cfg.batch_size, cfg.row_tokens, cfg.target_size
        return {
            "tokens": ((B, T), np.int32),
            "length": ((B,), np.int32),
            **_input_shapes(cfg),
            "target": ((B, side, side, 3), np.uint8),
        }

    @staticmethod
    def example(batch: HostBatch) -> BatchExample:
        row = {name: values[0] for name, values in batch.items()}
        segments = (np.arange(len(row["tokens"])) < row["length"]).astype(int)
        return _example(
            row,
            segments=segments,
            scored=np.zeros_like(segments, bool),
            regressed=np.zeros_like(row["image_valid"]),
        )._replace(target=row["target"])

    def _fill(self, batch: HostBatch, n: int, sampled: SampledDocument) -> None:
        rng = self.group.rng(sampled)
        context, chosen, _ = self._choose(sampled, rng)
        sequence = _Sequence(self, 0)
        sequence.begin()
        *contents, (_, target) = self._contents(sampled, [*context, chosen])
        for part, content in contents:
            if isinstance(content, Image):
                self._decode_into(batch["images"][n, sequence.images], content, rng)
            sequence.add(part, content)
        self._decode_into(batch["target"][n], target, rng)
        ids, used = [*sequence.tokens, self.tokenizer.img], len(sequence.tokens)
        batch["tokens"][n] = self.tokenizer.pad_id
        batch["tokens"][n, : len(ids)] = ids
        batch["length"][n] = len(ids)
        batch["embedding_index"][n] = -1
        batch["embedding_index"][n, :used] = sequence.embedding_index
        batch["images"][n, sequence.images :] = 0  # clears images of a document that failed
        batch["image_valid"][n] = np.arange(self.cfg.row_images) < sequence.images
        if self.cfg.n_frame:
            batch["image_frames"][n] = False
            batch["image_frames"][n, : sequence.images] = sequence.frames

    def _measure(self, sampled: SampledDocument) -> dict[str, int]:
        context, _, truncated = self._choose(sampled, self.group.rng(sampled))
        sizes = [part.size for part in context]
        return {
            "tokens": 2 + sum(map(self._tokens, sizes)),
            "token_capacity": self.cfg.row_tokens,
            "images": sum(size < 0 for size in sizes),
            "image_capacity": self.cfg.row_images,
            "documents": 1,
            "truncated": int(truncated),
        }

    def _choose(
        self, sampled: SampledDocument, rng: np.random.Generator
    ) -> tuple[list[PartRange], PartRange, bool]:
        """Samples an image of a document. Returns (the parts before it that are its context, the
        image, whether the context was truncated)."""
        dropped = rng.random() < self.cfg.drop_condition
        itself = self.cfg.autoencode > 0 and rng.random() < self.cfg.autoencode
        # The words of a pair come first: they are the only possible context.
        parts = self.group.parts(sampled, image_first=False)
        choices = [k for k, part in enumerate(parts) if part.size == IMAGE_PART]
        chosen = choices[int(rng.random() * len(choices))]
        before = [] if dropped else [parts[chosen]] if itself else parts[:chosen]
        sizes = [part.size for part in before]
        kept_sizes = truncate(
            sizes,
            tokens=self.cfg.row_tokens - 2,
            images=self.cfg.row_images,
            n_causal=self.cfg.n_causal,
            n_frame=self.cfg.n_frame,
            end="head",
        )
        last = before[len(before) - len(kept_sizes) :]
        context = [part.end(size) for part, size in zip(last, kept_sizes, strict=True)]
        return whole_videos(context), parts[chosen], kept_sizes != sizes

    def _tokens(self, size: int) -> int:
        return part_tokens(size, self.cfg.n_causal, self.cfg.n_frame)


class ViewBuilder(_SingleBuilder):
    """Images that the decoder learns to paint from their own features: square crops of documents'
    images, each at two sizes.

    images uint8 [B,h,h,3], what the encoder sees; target uint8 [B,Hh,Hh,3], what the autoencoder
    sees; sizes int32 [B,6], in pixels: the original's height and width, the crop's top and left
    once the original's shorter side has H pixels, the target's height and width; dropped bool [B],
    whether the decoder learns to paint the image without its features.
    """

    requires = Requirements("views", image=True)

    @staticmethod
    def shapes(cfg: DataConfig) -> ArrayShapes:
        B, h, side = cfg.batch_size, cfg.image_size, cfg.target_size
        return {
            "images": ((B, h, h, 3), np.uint8),
            "target": ((B, side, side, 3), np.uint8),
            "sizes": ((B, 6), np.int32),
            "dropped": ((B,), bool),
        }

    @staticmethod
    def example(batch: HostBatch) -> BatchExample:
        example = BatchExample([], [], [], [], batch["images"][:1], [True], [False])
        return example._replace(target=batch["target"][0])

    def _fill(self, batch: HostBatch, n: int, sampled: SampledDocument) -> None:
        cfg, rng = self.cfg, self.group.rng(sampled)
        dropped, choice, *at = rng.random(4).tolist()
        parts = self.group.parts(sampled, image_first=True)
        choices = [part for part in parts if part.size < 0]
        ((_, image),) = self._contents(sampled, [choices[int(choice * len(choices))]])
        assert isinstance(image, Image)
        # Not decoded at a reduced size, even if `fast_decode`: its own size is a condition.
        pixels = open_image(image.data)
        box, corner = square_crop(*pixels.size, cfg.target_size, (at[0], at[1]))
        limits = {"rotate": cfg.rotate, "scale": cfg.scale, "shift": cfg.shift}
        motion = sample_affine(rng, **limits) if cfg.augment else None
        for name in ("images", "target"):
            out = batch[name][n]
            view = resize(pixels, len(out), fast=cfg.fast_decode, box=box)
            out[:] = to_array(view if motion is None else affine(view, *motion))
        width, height = pixels.size
        batch["sizes"][n] = (height, width, *corner, cfg.target_size, cfg.target_size)
        batch["dropped"][n] = dropped < cfg.drop_condition

    def _measure(self, sampled: SampledDocument) -> dict[str, int]:
        return {"images": 1, "image_capacity": 1, "documents": 1}


BUILDERS: dict[Kind, type[BatchBuilder]] = {
    builder.requires.kind: builder
    for builder in (RowBuilder, CaptionBuilder, ImageBuilder, ContextBuilder, ViewBuilder)
}


def batch_shapes(cfg: DataConfig, kind: Kind) -> ArrayShapes:
    """Returns (shape, dtype) of each array of a global batch; see the class of the kind."""
    return BUILDERS[kind].shapes(cfg)


def _input_shapes(cfg: DataConfig) -> ArrayShapes:
    """Returns the arrays with the images that a row shows to the model."""
    B, T, I, h = cfg.batch_size, cfg.row_tokens, cfg.row_images, cfg.image_size  # noqa: E741
    shapes: ArrayShapes = {
        "images": ((B, I, h, h, 3), np.uint8),
        "image_valid": ((B, I), bool),
        "embedding_index": ((B, T), np.int32),
    }
    return shapes | ({"image_frames": ((B, I), bool)} if cfg.n_frame else {})


def _example(
    row: HostBatch,
    *,
    segments: Int[np.ndarray, "T"],
    scored: Bool[np.ndarray, "T"],
    regressed: Bool[np.ndarray, "I"],
) -> BatchExample:
    row_tokens = len(row["tokens"])
    embedding_index = row.get("embedding_index", np.full(row_tokens, -1))
    count = int(np.flatnonzero(segments).max(initial=-1)) + 1
    return BatchExample(
        row["tokens"][:count].tolist(),
        segments[:count].tolist(),
        scored[:count].tolist(),
        embedding_index[:count].tolist(),
        row["images"],
        row["image_valid"].tolist(),
        regressed.tolist(),
        row_tokens=row_tokens,
    )


class Pool:
    """Maps a function over items, on several threads if configured; results keep the order."""

    def __init__(self, cfg: DataConfig) -> None:
        self.threads = cfg.decode_threads or os.cpu_count() or 1
        parallel = self.threads > 1
        self._executor = ThreadPoolExecutor(self.threads, "emu-jax-decode") if parallel else None

    def __call__(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        run = self._executor.map if self._executor else map
        return list(run(function, items))


class _Placement(NamedTuple):
    """The place of a document in a batch: row, segment, and slices of tokens and images."""

    packed: PackedDocument
    row: int
    segment: int
    tokens: slice
    images: slice


class _EncodedDocument(NamedTuple):
    """A document of a packed row whose images are not decoded yet."""

    placement: _Placement
    sequence: _Sequence
    encoded: list[Image]
    rng: np.random.Generator


def _overlap(rows: range, others: range) -> range:
    """Returns the rows that two ranges have in common."""
    start = max(rows.start, others.start)
    return range(start, max(start, min(rows.stop, others.stop)))


def _placements(row: int, documents: list[PackedDocument]) -> list[_Placement]:
    placements, token, image = [], 0, 0
    for segment, packed in enumerate(documents, 1):
        tokens = slice(token, token + packed.tokens)
        images = slice(image, image + packed.images)
        placements.append(_Placement(packed, row, segment, tokens, images))
        token, image = tokens.stop, images.stop
    return placements


class _Sequence:
    """The token sequence of one document, grown part by part.

    Args:
        images: number of images before the document in its row.
    """

    def __init__(self, builder: BatchBuilder, images: int) -> None:
        self._part_ids, self._tokenizer = builder.part_ids, builder.tokenizer
        self._n_causal, self._n_frame = builder.cfg.n_causal, builder.cfg.n_frame
        self._learn_img, self._last_image = builder.cfg.learn_img, builder.cfg.last_image
        self.tokens: list[int] = []
        self.scored: list[bool] = []
        self.embedding_index: list[int] = []
        self.images = images  # number of images in the row so far
        self.scored_images: list[bool] = []
        self.frames: list[bool] = []  # of each image: whether it is a frame of a video

    def begin(self) -> None:
        """Begins the document with <s>."""
        self._extend([self._tokenizer.bos], [False])

    def add(self, part: PartRange, content: Text | Image) -> None:
        """Appends a text, or the placeholders of an image."""
        if isinstance(content, Text):
            ids = self._part_ids(part, content)
            unscored = (self._tokenizer.img, self._tokenizer.img_end, self._tokenizer.pad_id)
            self._extend(ids, [content.scored and i not in unscored for i in ids])
            return
        t, n, placeholder = self._tokenizer, self._n_causal, self._tokenizer.image
        first = self.images * n
        scored = content.scored
        if framed := self._n_frame > 0 and part.size != IMAGE_PART:
            assert t.frame is not None and t.video is not None
            n, placeholder = self._n_frame, t.frame
            scored = False  # the model generates no frames
            if part.size == VIDEO_PART:
                self._extend([t.video], [False])
        elif content.frame and t.frame is not None:
            _warn_of_frames()
        self.images += 1
        self.scored_images.append(scored)
        self.frames.append(framed)
        self._extend(
            [t.img, *[placeholder] * n, t.img_end],
            [self._learn_img and scored, *[False] * (n + 1)],
            [-1, *range(first, first + n), -1],
        )

    def end(self, *, cut: bool) -> None:
        """Ends the document; one whose end is cut off gets no </s>."""
        if not cut:
            self._extend([self._tokenizer.eos], [True])
        if self._last_image:
            self.scored_images[:-1] = [False] * len(self.scored_images[:-1])

    def _extend(
        self, ids: list[int], scored: list[bool], embedding_index: list[int] | None = None
    ) -> None:
        self.tokens += ids
        self.scored += scored
        self.embedding_index += embedding_index or [-1] * len(ids)


def _spans(sampled: SampledDocument) -> list[Span]:
    """Returns the byte ranges that reading a document needs."""
    return sampled.source.documents.spans(sampled.index)


@functools.cache
def _warn_of_frames() -> None:
    """Warns once that frames of videos are not marked for a model that distinguishes them."""
    log.warning(
        "frames of videos are read as still images: set data.n_frame to the model's embeddings of "
        "a frame (64 in Emu2's releases)"
    )


def _damage(sampled: SampledDocument, reason: str) -> Damage:
    where = sampled.source.documents.where(sampled.index)
    return Damage(sampled.source.cfg.name, sampled.index, reason, where)


def _sum_by_source(
    counts: Iterable[tuple[SampledDocument, dict[str, int]]],
) -> dict[str, dict[str, int]]:
    """Returns the sums over the documents of each source, by its name."""
    totals: dict[str, dict[str, int]] = {}
    for document, count in counts:
        name = document.source.cfg.name
        total = totals.setdefault(name, dict.fromkeys(STATISTICS, 0))
        for statistic, value in count.items():
            total[statistic] += value
    return totals


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total = dict.fromkeys(STATISTICS, 0)
    for count in counts:
        for name, value in count.items():
            total[name] += value
    return total
