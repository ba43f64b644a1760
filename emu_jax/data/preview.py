"""The sources of a run before it starts: missing files, numbers of documents, steps per epoch.

Nothing is read but names, headers of files, and indexes that an earlier run has cached. Nothing is
written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from emu_jax.data.batches import BUILDERS
from emu_jax.data.config import DataConfig, Kind
from emu_jax.data.documents import Source
from emu_jax.data.mixture import (
    Group,
    OpenSource,
    Requirements,
    check_usable,
    chosen_sources,
    sized_config,
    source_groups,
    usable_documents,
    with_lengths,
)
from emu_jax.data.sources import SourceConfig, open_source
from emu_jax.data.sources.index import NotIndexed, without_indexing
from emu_jax.data.sources.open import missing_files
from emu_jax.errors import UserError
from emu_jax.tokenizer import Tokenizer

PACKED_BLOCKS = 4  # blocks that are packed to learn how many documents a row holds


@dataclasses.dataclass(frozen=True)
class SourcePreview:
    """A source that is not read yet.

    Attributes:
        share: the fraction of its group's documents that come from it.
        documents: number of documents; None until the source is indexed.
        steps_per_epoch: steps of the run in which it is read once, counting those that sample
            another group; None until the source is indexed and, for packed rows, until the tokens
            of all sources of its group are counted.
    """

    name: str
    format: str
    share: float
    documents: int | None
    steps_per_epoch: float | None


@dataclasses.dataclass(frozen=True)
class GroupPreview:
    """Sources that share batches.

    Attributes:
        cfg: the config with the sizes of these batches.
        step_share: the fraction of the steps that read this group.
    """

    cfg: DataConfig
    step_share: float
    sources: tuple[SourcePreview, ...]


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A source, as far as it can be opened without reading its documents."""

    cfg: SourceConfig
    documents: Source | None = None
    counted: OpenSource | None = None


def preview(
    cfg: DataConfig, kind: Kind, tokenizer: Tokenizer | None
) -> tuple[list[GroupPreview], list[str]]:
    """Returns the groups of sources that batches of a kind read, and a line for each problem.

    Args:
        tokenizer: None if it cannot be loaded; then no source counts as indexed.
    """
    requires, problems = BUILDERS[kind].requires, list[str]()
    with without_indexing():
        try:
            chosen = chosen_sources(cfg, requires.pairs, problems)
        except UserError as error:
            return [], [str(error)]
        opened = [_open(source, cfg, tokenizer, problems) for source in chosen]
        if requires.pairs:
            opened = [s for s in opened if s.documents is None or s.documents.paired]
            if chosen and not opened:
                problems.append(f"no source has pairs, which {kind!r} batches are made of")
        groups = [
            [opened[n] for n in members]
            for members in source_groups([source.cfg for source in opened])
        ]
        total = sum(source.cfg.weight for source in opened)
        return [_group(cfg, requires, members, total, problems) for members in groups], problems


def _open(
    source: SourceConfig, cfg: DataConfig, tokenizer: Tokenizer | None, problems: list[str]
) -> _Opened:
    if missing := missing_files(source):
        problems += missing
        return _Opened(source)
    documents = None
    try:
        documents = open_source(source, cfg.cache, cfg.cache_bytes)
        if tokenizer is not None:
            counted = with_lengths(source, documents, cfg, tokenizer, recount=False)
            return _Opened(source, documents, counted)
    except NotIndexed:
        pass
    except UserError as error:
        problems.append(str(error))
    return _Opened(source, documents)


def _group(
    cfg: DataConfig,
    requires: Requirements,
    members: Sequence[_Opened],
    total_weight: float,
    problems: list[str],
) -> GroupPreview:
    weight = sum(source.cfg.weight for source in members)
    sized, step_share = sized_config(cfg, members[0].cfg), weight / total_weight
    per_step = _documents_per_step(sized, requires, members, problems)
    sources = []
    for source in members:
        share = source.cfg.weight / weight
        documents = None if source.documents is None else len(source.documents)
        steps = None
        if documents is not None and per_step:
            steps = documents / (per_step * share * step_share)
        sources.append(SourcePreview(source.cfg.name, source.cfg.format, share, documents, steps))
    return GroupPreview(sized, step_share, tuple(sources))


def _documents_per_step(
    cfg: DataConfig, requires: Requirements, members: Sequence[_Opened], problems: list[str]
) -> float | None:
    """Returns how many documents a step of a group samples, those that it cannot use among them.

    For packed rows it is an estimate from the first blocks. For other batches, all documents of
    sources that are not indexed count as usable.
    """
    counted = [source.counted for source in members if source.counted is not None]
    unusable = len(problems)
    for source in counted:
        try:
            check_usable(source, requires)
        except UserError as error:
            problems.append(str(error))
    if len(problems) > unusable:
        return None
    if requires.kind == "rows":
        if len(counted) < len(members):
            return None
        group = Group(cfg, requires, counted, 0, [0] * len(counted))
        rows = sum(len(group.block(block)) for block in range(PACKED_BLOCKS))
        return cfg.batch_size * cfg.block_documents * PACKED_BLOCKS / rows if rows else None
    weight = sum(source.cfg.weight for source in members)
    usable = sum(
        source.cfg.weight / weight * _usable_share(source.counted, requires) for source in members
    )
    return cfg.batch_size / usable if usable else None


def _usable_share(source: OpenSource | None, requires: Requirements) -> float:
    if source is None or not len(source.documents):
        return 1.0
    return usable_documents(source, requires) / len(source.documents)
