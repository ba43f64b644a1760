"""Chooses the documents of each batch: mixes sources into one endless order, and packs them.

The documents of sources that share batches are shuffled and mixed (grain), and numbered
0, 1, 2, ... A number's document, the parts of it that are kept, and its row are functions of the
seed and the number. Planning reads no image, and every process makes the same plan.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from emu_jax.data import storage
from emu_jax.data.config import PAIRS, DataConfig, Kind
from emu_jax.data.documents import Source
from emu_jax.data.lengths import TokenLengths
from emu_jax.data.packing import IMAGE_PART, Part, pack, part_tokens, pick, truncate, window
from emu_jax.data.sources import SourceConfig, open_source
from emu_jax.data.sources.index import folder_for
from emu_jax.data.unused import Tally
from emu_jax.errors import UserError, suggest
from emu_jax.storage import as_path
from emu_jax.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# Purposes of random numbers: a document's content, the frames of its video, the order of a block's
# rows, and substitutes for a document (SUBSTITUTE + attempt).
CONTENT, FRAMES, ROWS, SUBSTITUTE = range(4)


class Requirements(NamedTuple):
    """Properties of the documents that a kind of batches can use.

    Attributes:
        kind: name of the kind.
        image: whether a document needs an image.
        text: whether a document needs a text that is not empty.
        pairs: whether only sources of image-text pairs are read.
    """

    kind: Kind
    image: bool = False
    text: bool = False
    pairs: bool = False


class OpenSource(NamedTuple):
    """A source of the mixture.

    Attributes:
        holdout: share of the documents that is held out.
        held_out: whether those are read, rather than the others.
    """

    cfg: SourceConfig
    documents: Source
    lengths: TokenLengths
    holdout: float = 0.0
    held_out: bool = False

    def reads(self, index: int) -> bool:
        """Returns whether a document is on the side of the hold-out that is read."""
        return not self.holdout or is_held_out(index, self.holdout) == self.held_out


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
    """A document in a packed row: its token and image slots, and whether its end is cut off."""

    sampled: SampledDocument
    tokens: int
    images: int
    cut: bool


class Block(NamedTuple):
    """Documents of consecutive numbers, packed together."""

    rows: list[list[PackedDocument]]
    damaged: list[SampledDocument]


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
        orders = [
            _shuffled(n, len(source.documents), seed)
            for n, (source, seed) in enumerate(zip(sources, seeds, strict=True))
        ]
        weights = [source.cfg.weight for source in sources]
        self._order: Any = grain.MapDataset.mix(orders, weights) if orders[1:] else orders[0]
        # Batches share blocks, and a packed block is small.
        self.block = functools.lru_cache(4)(self._pack)

    def seed(self, sampled: SampledDocument, purpose: int) -> tuple[int, ...]:
        """Returns the seed of a document's random numbers for a purpose."""
        return self.cfg.seed, sampled.number, self.number, purpose

    def rng(self, sampled: SampledDocument, purpose: int = CONTENT) -> np.random.Generator:
        return np.random.default_rng(self.seed(sampled, purpose))

    def sample(self, number: int) -> SampledDocument:
        source, index = self._order[number]
        return SampledDocument(number, self.sources[source], index)

    def usable(self, sampled: SampledDocument) -> bool:
        """Returns whether this kind of batches can use a document."""
        if not sampled.source.reads(sampled.index):
            return False
        lengths, requires = sampled.lengths, self.requires
        image, text = IMAGE_PART in lengths, any(size > 0 for size in lengths)
        if requires.image or requires.text:
            return (image or not requires.image) and (text or not requires.text)
        # Text alone has no image to pick.
        return image or (text and not sampled.source.cfg.picked_images)

    def next(
        self, position: int, count: int
    ) -> tuple[list[SampledDocument], list[SampledDocument], int]:
        """Returns (the next `count` usable documents, the damaged ones skipped on the way, the
        position after them)."""
        usable: list[SampledDocument] = []
        damaged: list[SampledDocument] = []
        while len(usable) < count:
            sampled = self.sample(position)
            if self.usable(sampled):
                usable.append(sampled)
            elif sampled.damage and sampled.source.reads(sampled.index):
                damaged.append(sampled)
            position += 1
        return usable, damaged, position

    def parts(self, sampled: SampledDocument, image_first: bool) -> list[Part]:
        """Returns the non-empty parts; `image_first` decides the order of a pair's parts."""
        parts = [Part(n, size) for n, size in enumerate(sampled.lengths) if size]
        if sampled.source.documents.paired:
            parts.sort(key=lambda part: (part.size == IMAGE_PART) != image_first)
        return parts

    def fit(self, sampled: SampledDocument, rng: np.random.Generator) -> tuple[list[Part], bool]:
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
            )
        sizes = truncate(
            [part.size for part in parts],
            tokens=cfg.row_tokens - 2,
            images=cfg.row_images,
            n_causal=cfg.n_causal,
        )
        fitted = [p._replace(size=s) for p, s in zip(parts, sizes, strict=False)]
        last = whole[-1]
        return fitted, not fitted or fitted[-1].index != last.index or (
            fitted[-1].first + fitted[-1].size != last.first + last.size
        )

    def _measured(self, sampled: SampledDocument) -> PackedDocument:
        cfg, source, lengths = self.cfg, sampled.source.cfg, sampled.lengths
        images = lengths.count(IMAGE_PART)
        tokens = 2 + sum(part_tokens(size, cfg.n_causal) for size in lengths)
        chosen = source.window_tokens or source.picked_images
        if not chosen and tokens <= cfg.row_tokens and images <= cfg.row_images:
            return PackedDocument(sampled, tokens, images, False)
        parts, cut = self.fit(sampled, self.rng(sampled))
        sizes = [part.size for part in parts]
        tokens = 2 - cut + sum(part_tokens(size, cfg.n_causal) for size in sizes)
        return PackedDocument(sampled, tokens, sizes.count(IMAGE_PART), cut)

    def _pack(self, block: int) -> Block:
        size = self.cfg.block_documents
        sampled = [self.sample(n) for n in range(block * size, (block + 1) * size)]
        sampled = [d for d in sampled if d.source.reads(d.index)]
        measured = [self._measured(d) for d in sampled if self.usable(d)]
        rows = pack(
            np.array([m.tokens for m in measured], int),
            np.array([m.images for m in measured], int),
            row_tokens=self.cfg.row_tokens,
            row_images=self.cfg.row_images,
        )
        # Packing puts the longest documents of a block into its first rows.
        rng = np.random.default_rng((self.cfg.seed, block, self.number, ROWS))
        rows = [rows[n] for n in rng.permutation(len(rows))]
        return Block([[measured[n] for n in row] for row in rows], [d for d in sampled if d.damage])

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
                f"{side}: set data.holdout, now {source.holdout}, to another share"
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
    for number, members in enumerate(grouped([source.cfg for source in sources])):
        seeds = [int(np.random.SeedSequence((cfg.seed, n)).generate_state(1)[0]) for n in members]
        sized = sized_config(cfg, sources[members[0]].cfg)
        result.append(Group(sized, requires, [sources[n] for n in members], number, seeds))
    return result


def grouped(sources: list[SourceConfig]) -> list[list[int]]:
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
    path = source.paths[0]
    folder = path if not storage.is_remote(path) and Path(path).is_dir() else storage.parent(path)
    lengths = TokenLengths(documents, tokenizer, folder_for(f"{folder}/x", cfg.cache), recount)
    try:
        lengths.tally.check(source.allow_missing)
    except UserError as error:
        raise UserError(f"source {source.name!r} ({path}): {error}") from None
    return OpenSource(source, documents, lengths, cfg.holdout, cfg.held_out)


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
    if requires.text:
        return totals["with_both"] if requires.image else totals["with_text"]
    text_alone = totals["with_text"] - totals["with_both"]
    if requires.image or source.cfg.picked_images:
        return totals["with_image"]
    return totals["with_image"] + text_alone


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
    """Returns whether a document of a source belongs to the share that is held out."""
    return _uniform(index) < holdout


def _uniform(index: int) -> float:
    """Returns a hash of a document's index in [0, 1) (splitmix64)."""
    x = (index + 1) * 0x9E3779B97F4A7C15 % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ x >> shift) * factor % 2**64
    return (x ^ x >> 31) / 2**64


def _shuffled(source: int, count: int, seed: int) -> grain.MapDataset:
    """Returns an endless sequence of (source, index in it), in another order each epoch.

    The permutation is computed index by index, not stored.
    """
    indices = grain.MapDataset.source(range(count)).seed(seed).shuffle()
    return indices.map(lambda index: (source, int(index))).repeat(None)
