"""Chooses the documents of each batch: mixes sources into one endless order, and packs them.

The documents of sources that share batches are shuffled and mixed, and numbered 0, 1, 2, ...
A number's document and the parts of it that are kept are functions of the seed and the number.
Planning reads no image.

The numbers are dealt to streams. A stream fills the same few rows of each batch, and is planned
without the others. A process plans the streams that its own rows belong to. Without
`DataConfig.row_group` there is one stream, and every process makes the same plan.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from emu_jax.data import storage
from emu_jax.data.config import PAIRS, DataConfig, Kind
from emu_jax.data.documents import Source
from emu_jax.data.lengths import Lengths, TokenLengths
from emu_jax.data.packing import (
    FRAME_PART,
    IMAGE_PART,
    PartRange,
    pack,
    part_tokens,
    pick,
    truncate,
    window,
)
from emu_jax.data.permutation import mixed, shuffled, splitmix64
from emu_jax.data.sources import SourceConfig, open_source
from emu_jax.data.sources.index import folder_for
from emu_jax.data.unused import Tally
from emu_jax.errors import UserError, suggest
from emu_jax.storage import as_path
from emu_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    import grain

log = logging.getLogger(__name__)

# Purposes of random numbers: a document's content, the frames of its video, the order of a block's
# rows, and substitutes for a document (SUBSTITUTE + attempt).
CONTENT, VIDEO_FRAMES, ROWS, SUBSTITUTE = range(4)
CACHED_BLOCKS = 4  # at least, and two of each stream: batches share blocks
GRAIN_DOCUMENTS = 2**32 - 2  # of a source, at most, that grain shuffles


class Requirements(NamedTuple):
    """Properties of the documents that a kind of batches can use.

    Attributes:
        kind: name of the kind.
        image: whether a document needs an image.
        text: whether a document needs a text that is not empty.
        pairs: whether only sources of image-text pairs are read.
        still: whether the image must be a still image, if frames of videos are distinguished.
    """

    kind: Kind
    image: bool = False
    text: bool = False
    pairs: bool = False
    still: bool = False


class OpenSource(NamedTuple):
    """A source of the mixture.

    Attributes:
        holdout: fraction of the documents that is held out.
        held_out: whether those are read, rather than the others.
    """

    cfg: SourceConfig
    documents: Source
    lengths: Lengths
    holdout: float = 0.0
    held_out: bool = False

    def reads(self, index: int) -> bool:
        """Returns whether a document is on the side of the hold-out that is read."""
        return not self.holdout or is_held_out(index, self.holdout) == self.held_out

    def read_mask(self, indices: Int[np.ndarray, "documents"]) -> Bool[np.ndarray, "documents"]:
        """Returns `reads` of each document."""
        if not self.holdout:
            return np.ones(len(indices), bool)
        return (uniform(indices) < self.holdout) == self.held_out


class SampledDocument(NamedTuple):
    """A document in the endless order of its group."""

    number: int
    source: OpenSource
    index: int  # in the source

    @property
    def lengths(self) -> list[int]:
        return self.source.lengths[self.index]

    @property
    def damage(self) -> str | None:
        """Reason why it could not be read when its tokens were counted, or None."""
        return self.source.lengths.damage(self.index)


class PackedDocument(NamedTuple):
    """A document in a packed row: its numbers of tokens and images, and whether its end is cut
    off."""

    sampled: SampledDocument
    tokens: int
    images: int
    cut: bool


class SampledDocuments(NamedTuple):
    """Consecutive documents of a stream, with what planning knows of them."""

    numbers: Int[np.ndarray, "documents"]
    sources: Int[np.ndarray, "documents"]  # positions in `Group.sources`
    indices: Int[np.ndarray, "documents"]  # in their sources
    tokens: Int[np.ndarray, "documents"]  # of texts
    images: Int[np.ndarray, "documents"]
    image_tokens: Int[np.ndarray, "documents"]
    damage: Int[np.ndarray, "documents"]  # 1 + position in REASONS, or 0
    usable: Bool[np.ndarray, "documents"]

    def at(self, group: Group, n: int) -> SampledDocument:
        source = group.sources[self.sources[n]]
        return SampledDocument(int(self.numbers[n]), source, int(self.indices[n]))


class Block:
    """Consecutive documents of a stream, packed together.

    Args:
        members: positions in `sampled` of the documents of each row, in their order in the row.
        tokens, images, cut: fields of `PackedDocument` for each document of `sampled`.

    Attributes:
        damaged: documents found damaged while counting tokens.
    """

    def __init__(
        self,
        group: Group,
        sampled: SampledDocuments,
        members: list[list[int]],
        tokens: Int[np.ndarray, "documents"],
        images: Int[np.ndarray, "documents"],
        cut: Bool[np.ndarray, "documents"],
    ) -> None:
        self._group, self._sampled, self._members = group, sampled, members
        self._tokens, self._images, self._cut = tokens, images, cut
        self.damaged = [sampled.at(group, n) for n in np.flatnonzero(sampled.damage).tolist()]

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self._members)

    @property
    def rows(self) -> list[list[PackedDocument]]:
        return [self.row(n) for n in range(len(self))]

    def row(self, row: int) -> list[PackedDocument]:
        """Returns the documents of a row, in order."""
        return [
            PackedDocument(
                self._sampled.at(self._group, n),
                int(self._tokens[n]),
                int(self._images[n]),
                bool(self._cut[n]),
            )
            for n in self._members[row]
        ]

    def totals(self, first: int, stop: int) -> Int[np.ndarray, "sources 4"]:
        """Returns tokens, images, documents and truncated documents of some rows, by source."""
        members = np.array([n for row in self._members[first:stop] for n in row], int)
        sources, count = self._sampled.sources[members], len(self._group.sources)
        columns = [self._tokens, self._images, np.ones_like(self._tokens), self._cut]
        totals = np.zeros((count, len(columns)), np.int64)
        np.add.at(totals, sources, np.stack([column[members] for column in columns], axis=1))
        return totals


class Group:
    """Sources whose documents share batches.

    Args:
        cfg: config with the sizes of this group's batches.
        requires: properties of the documents that the batches can use.
        number: number of the group in the mixture.
    """

    def __init__(
        self,
        cfg: DataConfig,
        requires: Requirements,
        sources: list[OpenSource],
        number: int,
        seeds: list[int],
    ) -> None:
        self.cfg, self.requires, self.number, self.sources = cfg, requires, number, sources
        for source in sources:
            check_usable(source, requires)
            self._check_holdout(source)
        self._seeds, self._counts = seeds, [len(source.documents) for source in sources]
        self._weights = [source.cfg.weight for source in sources]
        self.stream_rows = cfg.stream_rows()
        self.streams = cfg.batch_size // self.stream_rows
        # Runs without streams keep the order that grain gives them, where it can.
        self._orders: list[Any] = [
            None if cfg.row_group or count > GRAIN_DOCUMENTS else _shuffled(count, seed)
            for count, seed in zip(self._counts, seeds, strict=True)
        ]
        self.block = functools.lru_cache(max(CACHED_BLOCKS, 2 * self.streams))(self._pack)

    def seed(self, sampled: SampledDocument, purpose: int) -> tuple[int, ...]:
        """Returns the seed of a document's random numbers for a purpose."""
        return self.cfg.seed, sampled.number, self.number, purpose

    def rng(self, sampled: SampledDocument, purpose: int = CONTENT) -> np.random.Generator:
        return np.random.default_rng(self.seed(sampled, purpose))

    def numbers(self, first: int, stop: int, stream: int) -> Int[np.ndarray, "documents"]:
        """Returns the numbers of a stream's documents at `first` up to `stop`.

        Each run of as many numbers as there are streams is dealt out, one to each. The run is
        rotated by a hash: dealt in turn, the documents of a source could all go to one stream.
        """
        at = np.arange(first, stop, dtype=np.int64)
        if self.streams == 1:
            return at
        turn = splitmix64(at.astype(np.uint64) ^ np.uint64(self.cfg.seed << 32))
        rotation = (turn % np.uint64(self.streams)).astype(np.int64)
        return at * self.streams + (stream + rotation) % self.streams

    def sample(self, number: int) -> SampledDocument:
        """Returns the document of a number."""
        (source,), (index,) = self._locate(np.array([number], np.int64))
        return SampledDocument(number, self.sources[source], int(index))

    def _locate(
        self, numbers: Int[np.ndarray, "documents"]
    ) -> tuple[Int[np.ndarray, "documents"], Int[np.ndarray, "documents"]]:
        """Returns the (source, index in it) of each number."""
        sources, keys = mixed(numbers, self._weights)
        indices = np.zeros_like(keys)
        for n, (count, seed) in enumerate(zip(self._counts, self._seeds, strict=True)):
            at = np.flatnonzero(sources == n)
            if not len(at):
                continue
            if (order := self._orders[n]) is not None:
                indices[at] = [order[key] for key in keys[at].tolist()]
            else:
                indices[at] = shuffled(keys[at], count, seed)
        return sources, indices

    def _sample(self, numbers: Int[np.ndarray, "documents"]) -> SampledDocuments:
        """Returns the documents of some numbers, without those that the hold-out leaves out."""
        sources, indices = self._locate(numbers)
        totals = np.zeros((5, len(indices)), np.int64)
        usable, read = np.zeros(len(indices), bool), np.zeros(len(indices), bool)
        for n, source in enumerate(self.sources):
            at = np.flatnonzero(sources == n)
            if not len(at):
                continue
            totals[:, at] = source.lengths.totals_of(indices[at])
            read[at] = source.read_mask(indices[at])
            shown = totals[1, at] - (totals[4, at] if self.requires.still else 0)
            usable[at] = self._usable(source, shown > 0, totals[0, at] > 0)
        tokens, images, damage, videos, frames = totals
        still, frame = (self._tokens(size) for size in (IMAGE_PART, FRAME_PART))
        image_tokens = (images - frames) * still + frames * frame + videos
        fields = (numbers, sources, indices, tokens, images, image_tokens, damage, usable)
        return SampledDocuments(*(field[read] for field in fields))

    def usable(self, sampled: SampledDocument) -> bool:
        """Returns whether this kind of batches can use a document."""
        if not sampled.source.reads(sampled.index):
            return False
        lengths = sampled.lengths
        has_image = any(s == IMAGE_PART if self.requires.still else s < 0 for s in lengths)
        has_text = any(s > 0 for s in lengths)
        return bool(self._usable(sampled.source, np.array([has_image]), np.array([has_text]))[0])

    def _usable(
        self,
        source: OpenSource,
        image: Bool[np.ndarray, "documents"],
        text: Bool[np.ndarray, "documents"],
    ) -> Bool[np.ndarray, "documents"]:
        """Returns which documents of a source this kind of batches can use, by what they have."""
        requires = self.requires
        if requires.image or requires.text:
            return (image | (not requires.image)) & (text | (not requires.text))
        # Text alone has no image to pick.
        return image | (text & (not source.cfg.picked_images))

    def next(
        self, position: int, count: int, stream: int = 0
    ) -> tuple[list[SampledDocument], list[SampledDocument], int]:
        """Returns (the next `count` usable documents of a stream, the damaged ones skipped on the
        way, the position after them)."""
        usable: list[SampledDocument] = []
        damaged: list[SampledDocument] = []
        while len(usable) < count:
            numbers = self.numbers(position, position + count - len(usable), stream)
            sampled = self._sample(numbers)
            for n in range(len(sampled.numbers)):
                if sampled.usable[n]:
                    usable.append(sampled.at(self, n))
                elif sampled.damage[n]:
                    damaged.append(sampled.at(self, n))
            position += len(numbers)
        return usable, damaged, position

    def parts(self, sampled: SampledDocument, image_first: bool) -> list[PartRange]:
        """Returns the non-empty parts; `image_first` decides the order of a pair's parts."""
        parts = [PartRange(n, size) for n, size in enumerate(sampled.lengths) if size]
        if sampled.source.documents.paired:
            parts.sort(key=lambda part: (part.size < 0) != image_first)
        return parts

    def fit(
        self, sampled: SampledDocument, rng: np.random.Generator
    ) -> tuple[list[PartRange], bool]:
        """Returns (the parts that go into a row, whether the end of the document is cut off)."""
        cfg, source = self.cfg, sampled.source.cfg
        parts = whole = self.parts(sampled, rng.random() < cfg.image_first)
        if source.picked_images:
            parts = pick(parts, rng, source.picked_images)
        if source.window_tokens:
            parts = window(
                parts,
                rng,
                tokens=source.window_tokens - 2,
                images=source.window_images,
                n_causal=cfg.n_causal,
                n_frame=cfg.n_frame,
            )
        sizes = truncate(
            [part.size for part in parts],
            tokens=cfg.row_tokens - 2,
            images=cfg.row_images,
            n_causal=cfg.n_causal,
            n_frame=cfg.n_frame,
        )
        fitted = [p._replace(size=s) for p, s in zip(parts, sizes, strict=False)]
        last = whole[-1]
        return fitted, not fitted or fitted[-1].index != last.index or (
            fitted[-1].first + fitted[-1].size != last.first + last.size
        )

    def _fitted(self, sampled: SampledDocument) -> tuple[int, int, bool]:
        """Returns the tokens and images of a document that is cut to fit, and whether its end is
        cut off."""
        parts, cut = self.fit(sampled, self.rng(sampled))
        sizes = [part.size for part in parts]
        tokens = 2 - cut + sum(map(self._tokens, sizes))
        return tokens, sum(size < 0 for size in sizes), cut

    def _tokens(self, size: int) -> int:
        """Returns the tokens that a part of a size takes."""
        return part_tokens(size, self.cfg.n_causal, self.cfg.n_frame)

    def _pack(self, block: int, stream: int = 0) -> Block:
        cfg, size = self.cfg, self.cfg.block_documents
        sampled = self._sample(self.numbers(block * size, (block + 1) * size, stream))
        tokens = 2 + sampled.tokens + sampled.image_tokens
        images, cut = sampled.images.copy(), np.zeros(len(tokens), bool)
        chosen = np.array([bool(s.cfg.window_tokens or s.cfg.picked_images) for s in self.sources])
        over = (tokens > cfg.row_tokens) | (images > cfg.row_images) | chosen[sampled.sources]
        for n in np.flatnonzero(over & sampled.usable).tolist():
            tokens[n], images[n], cut[n] = self._fitted(sampled.at(self, n))
        usable = np.flatnonzero(sampled.usable)
        rows = pack(
            tokens[usable],
            images[usable],
            row_tokens=self.cfg.row_tokens,
            row_images=self.cfg.row_images,
        )
        # Packing puts the longest documents of a block into its first rows.
        seed = (block,) if self.streams == 1 else (block, stream)
        rng = np.random.default_rng((self.cfg.seed, *seed, self.number, ROWS))
        members = [usable[rows[n]].tolist() for n in rng.permutation(len(rows))]
        return Block(self, sampled, members, tokens, images, cut)

    def _check_holdout(self, source: OpenSource) -> None:
        """Checks that a source has a document on the side of the hold-out that is read.

        Raises:
            UserError: it has none.
        """
        indices = range(len(source.documents)) if source.holdout else ()
        if indices and not any(self.usable(SampledDocument(0, source, n)) for n in indices):
            side = "held out" if source.held_out else "left to train on"
            raise UserError(
                f"source {source.cfg.name!r} ({source.cfg.paths[0]}) has no document that is "
                f"{side}: set data.holdout, now {source.holdout}, to another fraction"
            )

    def substitute(self, sampled: SampledDocument, attempt: int) -> SampledDocument:
        """Samples another document of the same source, to replace one that cannot be read."""
        rng = self.rng(sampled, SUBSTITUTE + attempt)
        while True:
            index = int(rng.integers(len(sampled.source.documents)))
            if self.usable(other := sampled._replace(index=index)):
                return other


def open_sources(
    cfg: DataConfig, tokenizer: Tokenizer, requires: Requirements, recount: bool = True
) -> list[OpenSource]:
    """Opens the sources of the mixture that this kind of batches reads.

    Args:
        recount: count the tokens of a source again if files that were missing may have arrived.

    Raises:
        UserError: a source cannot be opened.
    """
    sources = [
        _open(source, cfg, tokenizer, recount) for source in chosen_sources(cfg, requires.pairs)
    ]
    if requires.pairs:
        for source in sources:
            if not source.documents.paired:
                log.warning(
                    "source %r has no pairs: %r batches leave it out",
                    source.cfg.name,
                    requires.kind,
                )
        sources = [source for source in sources if source.documents.paired]
        if not sources:
            raise UserError(f"no source has pairs, which {requires.kind!r} batches are made of")
    return sources


def open_groups(
    cfg: DataConfig, tokenizer: Tokenizer, requires: Requirements, recount: bool = True
) -> list[Group]:
    """Opens the groups of the mixture that this kind of batches reads; see `open_sources`.

    Raises:
        UserError: a source cannot be opened, or has no usable document.
    """
    return make_groups(cfg, requires, open_sources(cfg, tokenizer, requires, recount))


def make_groups(cfg: DataConfig, requires: Requirements, sources: list[OpenSource]) -> list[Group]:
    """Returns the groups of the mixture of these sources.

    Raises:
        UserError: a source has no usable document.
    """
    result = []
    for number, members in enumerate(source_groups([source.cfg for source in sources])):
        seeds = [int(np.random.SeedSequence((cfg.seed, n)).generate_state(1)[0]) for n in members]
        sized = sized_config(cfg, sources[members[0]].cfg)
        result.append(Group(sized, requires, [sources[n] for n in members], number, seeds))
    return result


def source_groups(sources: list[SourceConfig]) -> list[list[int]]:
    """Returns the numbers of the sources in each group: those without sizes of their own share
    one."""
    groups: dict[int | None, list[int]] = {}
    for n, source in enumerate(sources):
        own_sizes = (source.batch_size, source.row_tokens, source.row_images)
        groups.setdefault(n if any(own_sizes) else None, []).append(n)
    return list(groups.values())


def sized_config(cfg: DataConfig, source: SourceConfig) -> DataConfig:
    """Returns the config with the sizes of the batches that a source is in."""
    return dataclasses.replace(
        cfg,
        batch_size=source.batch_size or cfg.batch_size,
        row_tokens=source.row_tokens or cfg.row_tokens,
        row_images=source.row_images or cfg.row_images,
    )


def group_order(groups: list[Group]) -> Any:
    """Returns an endless sequence: step -> number of the group it samples from, in proportion to
    the groups' weights."""
    if len(groups) == 1:
        return _Always()
    import grain  # late: it imports JAX, which a process that counts tokens does not need

    each = [
        grain.MapDataset.source(range(1)).map(lambda _, n=n: n).repeat(None)
        for n in range(len(groups))
    ]
    weights = [sum(source.cfg.weight for source in group.sources) for group in groups]
    return grain.MapDataset.mix(each, weights)


class _Always:
    def __getitem__(self, step: int) -> int:
        return 0


def chosen_sources(
    cfg: DataConfig, pairs: bool, missing: list[str] | None = None
) -> list[SourceConfig]:
    """Returns the sources to open.

    Without `sources` in the config, these are the files in `root/split` that `mixture` names, or
    only the pairs if `pairs`.

    Args:
        missing: a list that gets a line for each kind of `mixture` without files.

    Raises:
        UserError: there is no folder or no positive weight; or, without a list, no file of a kind.
    """
    if cfg.sources:
        return [source for source in cfg.sources if source.weight > 0]
    folder = as_path(cfg.root) / cfg.split
    if not folder.is_dir():
        raise UserError(
            f"{folder} does not exist: write documents there first (emu_jax.data.documents)"
        )
    weights = {PAIRS: 1.0}
    if not pairs:
        weights = {name: weight for name, weight in cfg.mixture.items() if weight > 0}
        if not weights:
            raise UserError("config key 'mixture' has no positive weight: nothing to read")
    names = sorted(p.name for p in folder.glob("*.array_record"))  # a listing, in a store
    chosen = []
    for name, weight in weights.items():
        pattern = re.compile(rf"{re.escape(name)}(-.*)?\.array_record")
        paths = [folder / file for file in names if pattern.fullmatch(file)]
        if not paths:
            known = {file.removesuffix(".array_record") for file in names}
            problem = (
                f"{folder} has no {name}.array_record{suggest(name, known)}: "
                "remove it from the mixture, or build the data again"
            )
            if missing is None:
                raise UserError(problem)
            missing.append(problem)
            continue
        chosen.append(
            SourceConfig(
                name, "records", tuple(map(str, paths)), weight=weight, paired=name == PAIRS
            )
        )
    return chosen


def _open(source: SourceConfig, cfg: DataConfig, tokenizer: Tokenizer, recount: bool) -> OpenSource:
    return with_lengths(
        source, open_source(source, cfg.cache, cfg.cache_bytes), cfg, tokenizer, recount
    )


def with_lengths(
    source: SourceConfig, documents: Source, cfg: DataConfig, tokenizer: Tokenizer, recount: bool
) -> OpenSource:
    """Counts the tokens of a source's documents, unless that is cached.

    Raises:
        UserError: the source has lost all its images or all its texts.
    """
    lengths = open_lengths(source, documents, cfg, tokenizer, recount)
    return OpenSource(source, documents, lengths, cfg.holdout, cfg.held_out)


def lengths_folder(source: SourceConfig, cfg: DataConfig) -> Path:
    """Returns the folder in which the token counts of a source are cached."""
    path = source.paths[0]
    folder = path if not storage.is_remote(path) and Path(path).is_dir() else storage.parent(path)
    return folder_for(f"{folder}/x", cfg.cache)


def open_lengths(
    source: SourceConfig, documents: Source, cfg: DataConfig, tokenizer: Tokenizer, recount: bool
) -> TokenLengths:
    """Counts the tokens of a source's documents, unless that is cached.

    Raises:
        UserError: the source has lost all its images or all its texts.
    """
    folder = lengths_folder(source, cfg)
    lengths = TokenLengths(documents, tokenizer, folder, recount, frames=cfg.n_frame > 0)
    try:
        lengths.tally.check(source.allow_missing)
    except UserError as error:
        raise UserError(f"source {source.name!r} ({source.paths[0]}): {error}") from None
    return lengths


def tally(source: OpenSource, requires: Requirements) -> Tally:
    """Counts the parts of a source that this kind of batches uses, and those that it does not."""
    counted = Tally()
    counted.merge(source.lengths.tally)
    rest = counted.used["documents"] - usable_documents(source, requires)
    if rest:
        counted.used["documents"] -= rest
        counted.leave(f"document that {requires.kind} cannot use", rest)
    return counted


def usable_documents(source: OpenSource, requires: Requirements) -> int:
    """Returns the number of documents that this kind of batches can use."""
    totals = source.lengths.totals()
    if requires.still and source.lengths.frames:
        return _with_still(source.lengths)
    if requires.text:
        return totals["with_both"] if requires.image else totals["with_text"]
    text_alone = totals["with_text"] - totals["with_both"]
    if requires.image or source.cfg.picked_images:
        return totals["with_image"]
    return totals["with_image"] + text_alone


def _with_still(lengths: Lengths) -> int:
    """Returns the number of documents with a still image."""
    count, chunk = 0, 1 << 16
    for first in range(0, len(lengths), chunk):
        _, images, _, _, frames = lengths.totals_of(
            np.arange(first, min(first + chunk, len(lengths)))
        )
        count += int((images > frames).sum())
    return count


def check_usable(source: OpenSource, requires: Requirements) -> None:
    """Checks that a kind of batches can use a source.

    Raises:
        UserError: it can use none of its documents.
    """
    if not usable_documents(source, requires):
        raise UserError(
            f"source {source.cfg.name!r} ({source.cfg.paths[0]}) has no document that "
            f"{requires.kind!r} can use"
        )


def is_held_out(index: int, holdout: float) -> bool:
    """Returns whether a document of a source is held out."""
    return bool(uniform(np.array([index]))[0] < holdout)


def uniform(indices: Int[np.ndarray, "documents"]) -> Float[np.ndarray, "documents"]:
    """Returns a hash of each document's index in [0, 1)."""
    return splitmix64(indices.astype(np.uint64)) / 2**64


def _shuffled(count: int, seed: int) -> grain.MapDataset:
    """Returns an endless sequence of the indices of a source, in another order each epoch.

    The permutation is computed index by index, not stored.
    """
    import grain

    return grain.MapDataset.source(range(count)).seed(seed).shuffle().repeat(None)
