"""Fills the arrays of a batch: reads, tokenizes and decodes its documents.

A document, or a few documents of packed rows, are one task for a thread pool. A document that
cannot be read does not change where the others lie, so processes need not tell each other about
damage. In a packed row its tokens become padding. In a batch of single documents it is replaced
by a substitute that is a function of its number.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from emu_jax.data.config import Batch, DataConfig, batch_shapes
from emu_jax.data.documents import Damaged, Image, Text
from emu_jax.data.images import ImageError, affine, draw_affine, open_image, resize, to_array
from emu_jax.data.mixture import FRAMES, Drawn, Group, Packed
from emu_jax.data.outlines import text_ids
from emu_jax.data.packing import IMAGE_PART, Part, part_tokens, truncate
from emu_jax.errors import UserError
from emu_jax.tokenizer import Tokenizer

Position = tuple[int, int]  # (block, row in it) for rows; (0, document) for other kinds

STATISTICS: tuple[str, ...] = (
    "tokens",
    "token_slots",
    "images",
    "image_slots",
    "documents",
    "truncated",
)
_TOGETHER = 16  # images that one task reads, then decodes
_ATTEMPTS = 20  # unreadable substitutes in a row before giving up


class Damage(NamedTuple):
    """A document that was skipped because it cannot be read."""

    source: str
    index: int
    reason: str
    where: str


class Made(NamedTuple):
    """This process's share of a batch, with its documents and statistics."""

    batch: Batch
    position: Position  # of the next batch
    documents: list[Drawn]  # in this process's share
    statistics: dict[str, int]  # of the global batch
    damaged: list[Damage]  # found by this process


class Filler:
    """Makes the batch of a group at a given position. Stateless.

    Args:
        mine: this process's rows of a global batch.
    """

    def __init__(self, group: Group, tokenizer: Tokenizer, mine: slice, pool: Pool):
        self.group, self.cfg, self.tokenizer, self.mine = group, group.cfg, tokenizer, mine
        self._pool = pool
        # Captions repeat, and so do the images of a small data set.
        self._encode = functools.lru_cache(1 << 14)(lambda text: text_ids(text, tokenizer))
        self._resized_small = functools.lru_cache(1 << 12)(self._resized)
        self._share = {
            name: ((mine.stop - mine.start, *shape[1:]), dtype)
            for name, (shape, dtype) in batch_shapes(self.cfg, group.kind).items()
        }

    def reaches(self, block: int, row: int) -> bool:
        """Returns whether `make` can end at a position."""
        if self.group.kind != "rows":
            return block == 0
        return row < max(1, len(self.group.block(block).rows))

    def make(self, position: Position) -> Made:
        batch = {name: np.zeros(shape, dtype) for name, (shape, dtype) in self._share.items()}
        if self.group.kind == "rows":
            return self._rows(batch, position)
        fill, measure = {
            "captions": (self._caption, self._caption_statistics),
            "images": (self._image, self._image_statistics),
            "contexts": (self._context, self._context_statistics),
        }[self.group.kind]
        documents, passed, after = self.group.next(position[1], self.cfg.batch_size)
        mine = documents[self.mine]
        found = self._pool(lambda n: self._filled(fill, batch, n, mine[n]), range(len(mine)))
        damaged = [damage for each in found for damage in each]
        return Made(
            batch, (0, after), mine, _sum(map(measure, documents)), self._counted(passed) + damaged
        )

    def _counted(self, damaged: list[Drawn]) -> list[Damage]:
        """Reports documents found damaged while counting tokens, on the first process only."""
        if self.mine.start:
            return []
        return [_damage(d, d.damage or "") for d in damaged]

    # Packed rows

    def _rows(self, batch: Batch, position: Position) -> Made:
        block, row = position
        rows: list[list[Packed]] = []
        damaged: list[Damage] = []
        while len(rows) < self.cfg.batch_size:
            packed = self.group.block(block)
            if row == 0:
                damaged += self._counted(packed.damaged)
            taken = packed.rows[row : row + self.cfg.batch_size - len(rows)]
            rows += taken
            row += len(taken)
            if row == len(packed.rows):
                block, row = block + 1, 0
        batch["tokens"][:] = self.tokenizer.pad_id
        batch["image_slots"][:] = -1
        places = [
            place for n, documents in enumerate(rows[self.mine]) for place in _places(n, documents)
        ]
        for found in self._pool(
            lambda piece: self._write_documents(batch, piece), self._pieces(places)
        ):
            damaged += found
        sizes = {
            "token_slots": self.cfg.batch_size * self.cfg.row_tokens,
            "image_slots": self.cfg.batch_size * self.cfg.row_images,
        }
        counted = _sum(
            {"tokens": p.tokens, "images": p.images, "documents": 1, "truncated": int(p.cut)}
            for documents in rows
            for p in documents
        )
        mine = [place.packed.drawn for place in places]
        return Made(batch, (block, row), mine, counted | sizes, damaged)

    def _pieces(self, places: list[_Place]) -> list[list[_Place]]:
        """Splits documents into tasks of at most `_TOGETHER` images; a document with more images
        is a task of its own. With several threads tasks get smaller towards the end, so that all
        threads finish at about the same time."""
        threads = self._pool.threads
        sizes = [max(1, place.packed.images) for place in places]
        left, room = sum(sizes), 0
        pieces: list[list[_Place]] = []
        for place, size in zip(places, sizes, strict=True):
            if size > room:
                pieces.append([])
                room = _TOGETHER if threads == 1 else min(_TOGETHER, left // (2 * threads))
            pieces[-1].append(place)
            left, room = left - size, room - size
        return pieces

    def _write_documents(self, batch: Batch, places: list[_Place]) -> list[Damage]:
        """Writes documents to their rows; leaves padding in place of one that cannot be read.

        Runs each step for all documents before the next step. Decoding an image evicts the
        processor's caches, and the other steps take twice as long when they alternate with it.
        """
        damaged: list[Damage] = []
        whole: list[_Read] = []
        for read in [self._read(place) for place in places]:
            if isinstance(read, Damage):
                damaged.append(read)
            elif damage := self._decode(batch, read):
                damaged.append(damage)
            else:
                whole.append(read)
        for read in whole:
            self._write(batch, read)
        return damaged

    def _read(self, place: _Place) -> _Read | Damage:
        drawn = place.packed.drawn
        rng = self.group.rng(drawn)
        parts, cut = self.group.fit(drawn, rng)
        try:
            contents = self._contents(drawn, parts)
        except Damaged as error:
            return _damage(drawn, error.reason)
        row = _Row(self, place.images.start)
        row.open()
        for part, content in contents:
            row.add(part, content)
        row.close(ended=not cut)
        return _Read(place, row, [c for _, c in contents if isinstance(c, Image)], rng)

    def _decode(self, batch: Batch, read: _Read) -> Damage | None:
        place = read.place
        out = batch["images"][place.row, place.images]
        try:
            for pixels, image in zip(out, read.encoded, strict=True):
                self._paint(pixels, image, read.rng)
        except ImageError as error:
            out[:] = 0
            return _damage(place.packed.drawn, error.reason)
        read.encoded.clear()  # frees video frames, which are large
        return None

    def _write(self, batch: Batch, read: _Read) -> None:
        place, row = read.place, read.row
        n, tokens, images = place.row, place.tokens, place.images
        batch["tokens"][n, tokens] = row.tokens
        batch["segment_ids"][n, tokens] = place.segment
        batch["positions"][n, tokens] = np.arange(len(row.tokens))
        batch["text_loss_mask"][n, tokens] = row.scored
        batch["image_slots"][n, tokens] = row.slots
        batch["image_valid"][n, images] = True
        batch["image_scored"][n, images] = row.scored_images

    # Batches of single documents

    def _filled(
        self, fill: Callable[[Batch, int, Drawn], None], batch: Batch, n: int, drawn: Drawn
    ) -> list[Damage]:
        """Fills one row. A document that cannot be read is replaced by substitutes.

        Raises:
            UserError: `_ATTEMPTS` documents in a row cannot be read.
        """
        damaged, chosen = [], drawn
        for attempt in range(_ATTEMPTS):
            try:
                fill(batch, n, chosen)
                return damaged
            except (Damaged, ImageError) as error:
                damaged.append(_damage(chosen, error.reason))
                last = error
            chosen = self.group.substitute(drawn, attempt)
        raise UserError(
            f"{_ATTEMPTS} documents of source {drawn.source.cfg.name!r} in a row cannot be read; "
            f"the last: {last}"
        )

    def _caption(self, batch: Batch, n: int, drawn: Drawn) -> None:
        parts = self.group.parts(drawn, image_first=True)
        images = [part for part in parts if part.size == IMAGE_PART]
        words = [part for part in parts if part.size != IMAGE_PART]
        (_, image), *rest = self._contents(drawn, [*images[:1], *words])
        ids = [i for part, content in rest for i in self._ids(part, content)]
        # A truncated caption also ends in </s>, whose hidden state is read.
        ids = [self.tokenizer.bos, *ids[: self.cfg.row_tokens - 2], self.tokenizer.eos]
        self._paint(batch["images"][n], image, self.group.rng(drawn))
        batch["tokens"][n] = self.tokenizer.pad_id
        batch["tokens"][n, : len(ids)] = ids
        batch["valid"][n] = np.arange(self.cfg.row_tokens) < len(ids)

    def _caption_statistics(self, drawn: Drawn) -> dict[str, int]:
        text, room = sum(size for size in drawn.outline if size > 0), self.cfg.row_tokens - 2
        return self._image_statistics(drawn) | {
            "tokens": min(text, room) + 2,
            "token_slots": room + 2,
            "truncated": int(text > room),
        }

    def _image(self, batch: Batch, n: int, drawn: Drawn) -> None:
        parts = self.group.parts(drawn, image_first=True)[:1]
        ((_, image),) = self._contents(drawn, parts)
        self._paint(batch["images"][n], image, self.group.rng(drawn))

    def _image_statistics(self, drawn: Drawn) -> dict[str, int]:
        return {"images": 1, "image_slots": 1, "documents": 1}

    def _context(self, batch: Batch, n: int, drawn: Drawn) -> None:
        rng = self.group.rng(drawn)
        context, chosen, _ = self._chosen(drawn, rng)
        row = _Row(self, 0)
        row.open()
        *contents, (_, target) = self._contents(drawn, [*context, chosen])
        for part, content in contents:
            if isinstance(content, Image):
                self._paint(batch["images"][n, row.images], content, rng)
            row.add(part, content)
        self._paint(batch["target"][n], target, rng)
        ids, used = [*row.tokens, self.tokenizer.img], len(row.tokens)
        batch["tokens"][n] = self.tokenizer.pad_id
        batch["tokens"][n, : len(ids)] = ids
        batch["length"][n] = len(ids)
        batch["image_slots"][n] = -1
        batch["image_slots"][n, :used] = row.slots
        batch["images"][n, row.images :] = 0  # clears images of a document that failed
        batch["image_valid"][n] = np.arange(self.cfg.row_images) < row.images

    def _context_statistics(self, drawn: Drawn) -> dict[str, int]:
        context, _, truncated = self._chosen(drawn, self.group.rng(drawn))
        sizes = [part.size for part in context]
        return {
            "tokens": 2 + sum(part_tokens(size, self.cfg.n_causal) for size in sizes),
            "token_slots": self.cfg.row_tokens,
            "images": sizes.count(IMAGE_PART),
            "image_slots": self.cfg.row_images,
            "documents": 1,
            "truncated": int(truncated),
        }

    def _chosen(self, drawn: Drawn, rng: np.random.Generator) -> tuple[list[Part], Part, bool]:
        """Samples an image of a document. Returns (the parts before it that are its context, the
        image, whether the context was truncated)."""
        dropped = rng.random() < self.cfg.drop_condition
        itself = self.cfg.autoencode > 0 and rng.random() < self.cfg.autoencode
        # The words of a pair come first: they are the only possible context.
        parts = self.group.parts(drawn, image_first=False)
        choices = [k for k, part in enumerate(parts) if part.size == IMAGE_PART]
        chosen = choices[int(rng.random() * len(choices))]
        before = [] if dropped else [parts[chosen]] if itself else parts[:chosen]
        sizes = [part.size for part in before]
        kept = truncate(
            sizes,
            tokens=self.cfg.row_tokens - 2,
            images=self.cfg.row_images,
            n_causal=self.cfg.n_causal,
            end="head",
        )
        last = before[len(before) - len(kept) :]
        context = [part.end(size) for part, size in zip(last, kept, strict=True)]
        return context, parts[chosen], kept != sizes

    # Words and pixels

    def _contents(self, drawn: Drawn, parts: list[Part]) -> list[tuple[Part, Text | Image]]:
        """Reads the contents of some parts of a document.

        Raises:
            Damaged: the document cannot be read, or has changed since its tokens were counted.
        """
        seed, source = self.group.seed(drawn, FRAMES), drawn.source.documents
        document = source.read(drawn.index, seed, [part.index for part in parts])
        outline = drawn.outline
        found = {
            n: IMAGE_PART if isinstance(p := document.parts[n], Image) else len(self._encode(p))
            for n in (part.index for part in parts if part.index < len(document.parts))
        }
        if len(document.parts) != len(outline) or any(outline[n] != found[n] for n in found):
            where = drawn.source.documents.where(drawn.index)
            raise Damaged(
                "changed document", where, "its content has changed since its tokens were counted"
            )
        return [(part, document.parts[part.index]) for part in parts]

    def _ids(self, part: Part, content: Text | Image) -> list[int]:
        """Returns the token ids of a text that are kept."""
        assert isinstance(content, Text)
        return self._encode(content)[part.first : part.first + part.size]

    def _paint(self, out: np.ndarray, image: Text | Image, rng: np.random.Generator) -> None:
        """Decodes one image into `out`."""
        assert isinstance(image, Image)
        cfg = self.cfg
        resized = self._resized_small if len(image.data) < 4096 else self._resized
        pixels = resized(image.data, out.shape[0])
        if cfg.augment:
            draw = draw_affine(rng, rotate=cfg.rotate, scale=cfg.scale, shift=cfg.shift)
            pixels = affine(pixels, *draw)
        out[:] = to_array(pixels)

    def _resized(self, data: bytes, size: int) -> PIL.Image.Image:
        fast = self.cfg.fast_decode
        image = open_image(data, at_least=size if fast else None)
        return resize(image, size, fast=fast)


class Pool:
    """Maps a function over items, on several threads if configured; results keep the order."""

    def __init__(self, cfg: DataConfig):
        self.threads = cfg.decode_threads or os.cpu_count() or 1
        parallel = self.threads > 1
        self._executor = ThreadPoolExecutor(self.threads, "emu-jax-decode") if parallel else None

    def __call__(self, function: Callable[[Any], Any], things: Iterable[Any]) -> list[Any]:
        run = self._executor.map if self._executor else map
        return list(run(function, things))


class _Place(NamedTuple):
    """The place of a document in a batch: row, segment, and slices of tokens and images."""

    packed: Packed
    row: int
    segment: int
    tokens: slice
    images: slice


class _Read(NamedTuple):
    """A document of a packed row whose images are still encoded."""

    place: _Place
    row: _Row
    encoded: list[Image]
    rng: np.random.Generator


def _places(row: int, documents: list[Packed]) -> list[_Place]:
    places, token, image = [], 0, 0
    for segment, packed in enumerate(documents, 1):
        tokens = slice(token, token + packed.tokens)
        images = slice(image, image + packed.images)
        places.append(_Place(packed, row, segment, tokens, images))
        token, image = tokens.stop, images.stop
    return places


class _Row:
    """The arrays of one document, grown part by part."""

    def __init__(self, filler: Filler, images: int):
        self._ids, self._tokenizer = filler._ids, filler.tokenizer
        self._n_causal = filler.cfg.n_causal
        self._learn_img = filler.cfg.learn_img
        self.tokens: list[int] = []
        self.scored: list[bool] = []
        self.slots: list[int] = []
        self.images = images  # number of images in the row so far
        self.scored_images: list[bool] = []

    def open(self) -> None:
        self._extend([self._tokenizer.bos], [False])

    def add(self, part: Part, content: Text | Image) -> None:
        if isinstance(content, Text):
            ids = self._ids(part, content)
            unscored = (self._tokenizer.img, self._tokenizer.img_end, self._tokenizer.pad_id)
            self._extend(ids, [content.scored and i not in unscored for i in ids])
            return
        n, t = self._n_causal, self._tokenizer
        first = self.images * n
        self.images += 1
        self.scored_images.append(content.scored)
        self._extend(
            [t.img, *[t.image] * n, t.img_end],
            [self._learn_img and content.scored, *[False] * (n + 1)],
            [-1, *range(first, first + n), -1],
        )

    def close(self, ended: bool) -> None:
        """Ends the document; a truncated document gets no </s>."""
        if ended:
            self._extend([self._tokenizer.eos], [True])

    def _extend(self, ids: list[int], scored: list[bool], slots: list[int] | None = None) -> None:
        self.tokens += ids
        self.scored += scored
        self.slots += slots or [-1] * len(ids)


def _damage(drawn: Drawn, reason: str) -> Damage:
    where = drawn.source.documents.where(drawn.index)
    return Damage(drawn.source.cfg.name, drawn.index, reason, where)


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total = dict.fromkeys(STATISTICS, 0)
    for count in counts:
        for name, value in count.items():
            total[name] += value
    return total
