"""Batches for the training objectives, in an order that is a pure function of the seed.

Each step samples from one group of sources (`mixture.py`). A group has an endless order of
documents, dealt to one or more streams, and a position of two integers in each. A document is a
function of its number, and packing works on fixed blocks of a stream. The position of a run is
therefore a few integers a stream, independent of the number of processes, and a restored run
continues bit for bit.
"""

from __future__ import annotations

import collections
import logging
import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from emu_jax.data.batches import (
    BUILDERS,
    STATISTICS,
    BuiltBatch,
    Damage,
    Pool,
    Position,
    Positions,
    batch_shapes,
)
from emu_jax.data.config import DataConfig, HostBatch, Kind
from emu_jax.data.documents import short_hash
from emu_jax.data.mixture import (
    Group,
    OpenSource,
    group_order,
    make_groups,
    open_groups,
    open_sources,
    tally,
)
from emu_jax.errors import UserError, suggest
from emu_jax.tokenizer import Tokenizer

__all__ = ["Batches", "Damage", "DataConfig", "HostBatch", "Kind", "batch_shapes"]

log = logging.getLogger(__name__)

_FORMER_KINDS: dict[str, str] = {"images": "pictures"}  # names in older checkpoints
_CONSUMED = ("tokens", "images", "documents")
_LEAST_SEEN = 1000  # documents, before the fraction of damaged ones is meaningful


class Consumed(NamedTuple):
    """Slots and documents that a run has read from a source, since its first step.

    They count whole batches, whatever the number of processes, and no padding. A process that
    plans only its own rows estimates the others' rows by them, until the run resumes.
    """

    tokens: int
    images: int
    documents: int
    epochs: float  # documents over the documents of the source that can be used


def batches_of_each_source(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    kind: Kind,
    share: int | Sequence[int],
    shares: int,
    *,
    recount: bool,
    pad_to: int,
) -> dict[str, Batches]:
    """Returns batches of each source alone, by name; see `Batches`.

    Raises:
        UserError: as `Batches`.
    """
    return {
        source.cfg.name: Batches(
            cfg, tokenizer, kind, share, shares, opened=[source], pad_to=pad_to
        )
        for source in open_sources(cfg, tokenizer, BUILDERS[kind].requires, recount)
    }


class Batches(Iterator[HostBatch]):
    """An endless iterator over batches, prefetched on a thread.

    The rows of a global batch are divided into `shares` of consecutive rows, as many in each. A
    process gets one or several of them. The global batch does not depend on how many there are.
    With `DataConfig.row_group` a process plans its own rows alone: its `state()` must be merged
    with the others' (`merge_states`), and its statistics estimate the global batch by its own
    rows.

    Args:
        share: the number, or the rising numbers, of this process's shares.
        kind: kind of batches, one for each objective (see `BUILDERS`). "captions" and
            "images" use pairs only, "contexts" and "views" use documents with an image.
        plan_only: make batches without rows, and decode nothing; `statistics` still count whole
            batches.
        recount: count a source again if files that were missing may have arrived. False with
            several processes, which must agree, and to resume a run with the data that it started
            with.
        opened: the sources, if they are open already.
        pad_to: rows of a global batch are padded to a multiple of this. Padding rows hold zeros,
            come last, and appear in no statistics.

    Attributes:
        tallies: counts of used and unused parts of each source, by name.

    Raises:
        UserError: data is missing, a value of `cfg` is out of range, or too many documents are
            damaged.
    """

    def __init__(
        self,
        cfg: DataConfig,
        tokenizer: Tokenizer,
        kind: Kind,
        share: int | Sequence[int] = 0,
        shares: int = 1,
        *,
        plan_only: bool = False,
        recount: bool = True,
        opened: list[OpenSource] | None = None,
        pad_to: int = 1,
    ) -> None:
        if kind not in BUILDERS:
            raise UserError(f"unknown kind of batch {kind!r}{suggest(kind, BUILDERS)}")
        self._shares = share_numbers(share, shares)
        for size in sorted(cfg.batch_sizes()):
            if size < 1 or pad_to % shares and size % shares:
                raise UserError(
                    f"batch_size {size} cannot be divided into {shares} equal shares: make it a "
                    "multiple"
                )
        self._cfg, self._kind = cfg, kind
        requires = BUILDERS[kind].requires
        if opened is None:
            groups = open_groups(cfg, tokenizer, requires, recount)
        else:
            groups = make_groups(cfg, requires, opened)
        mine = None if plan_only else (self._shares, shares)
        self._maker = _Maker(cfg, tokenizer, kind, mine, groups, pad_to)
        self._position = self._maker.start()
        self.tallies = self._maker.tallies
        self._thread: _Prefetch | None = None
        self._last: BuiltBatch | None = None
        self._totals = dict.fromkeys(STATISTICS, 0)
        self._damaged = collections.Counter[str]()
        self._seen = 0  # documents that this process has read
        # {source: [tokens, images, documents]} since the first step; None if unknown.
        self._consumed: dict[str, list[int]] | None = self._not_consumed()
        # The part of it that this process has counted itself since it started or was restored.
        self._counted_here = self._not_consumed()
        self._consumed_before = self._not_consumed()
        self._is_partial = len(self._shares) < shares and not plan_only and self._maker.is_partial

    def __next__(self) -> HostBatch:
        if self._thread is None and self._cfg.prefetch > 0:
            self._thread = _Prefetch(self._maker, self._position, self._cfg.prefetch)
            weakref.finalize(self, self._thread.stop)
        built, position = self._thread.get() if self._thread else self._maker.make(self._position)
        self._last, self._position = built, position
        for name, value in built.statistics.items():
            self._totals[name] += built.estimate(value)
        for source, counts in built.by_source.items():
            for n, name in enumerate(_CONSUMED):
                self._counted_here[source][n] += counts[name]
                if self._consumed is not None:
                    self._consumed[source][n] += built.estimate(counts[name])
        self._damaged.update(damage.reason for damage in built.damaged)
        self._seen += len(built.documents)
        self._check_damaged(built.damaged)
        return built.batch

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state(self) -> dict[str, Any]:
        """Returns the position after the last batch that was yielded, as JSON types.

        If this process plans only some of the streams, it is a part, with `shares` and
        `consumed_here`: pass those of all processes to `merge_states`.
        """
        step, groups = self._position
        dealt = [[stream and list(stream) for stream in streams] for streams in groups]
        state: dict[str, Any] = {
            "kind": self._kind,
            "step": step,
            "groups": dealt if self._cfg.row_group else [streams[0] for streams in dealt],
            "counted": self._counted(),
        }
        if self._is_partial:
            state["shares"] = list(self._shares)
            state["consumed_here"] = _copied(self._counted_here)
        if self._consumed is not None:
            consumed = self._consumed_before if self._is_partial else self._consumed
            state["consumed"] = _copied(consumed)
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `state()` was taken.

        Raises:
            UserError: `state` is damaged, belongs to another kind of batches or to other groups
                of sources, or is not a position in these sources.
        """
        if state.get("kind") not in (self._kind, _FORMER_KINDS.get(self._kind, self._kind)):
            raise UserError(
                f"the checkpoint's data position is for {state.get('kind')!r} batches, "
                f"this run reads {self._kind!r}: start it in a new workdir"
            )
        step: Any = state.get("step")
        groups: Any = state.get("groups")
        consumed: Any = state.get("consumed")  # older checkpoints lack it
        if isinstance(groups, list) and not self._cfg.row_group:
            groups = [[group] for group in groups]
        if not (
            is_count(step)
            and (consumed is None or self._is_consumed(consumed))
            and isinstance(groups, list)
            and all(
                isinstance(streams, list) and all(map(_is_position, streams)) for streams in groups
            )
        ):
            raise UserError(
                f"the checkpoint's data position is damaged ({state}): use another step"
            )
        if len(groups) != len(self._position.groups):
            raise UserError(
                f"the checkpoint's data position is of {len(groups)} groups of sources, this run "
                f"has {len(self._position.groups)}: start it in a new workdir"
            )
        positions = tuple(
            tuple(stream and (stream[0], stream[1]) for stream in streams) for streams in groups
        )
        self._maker.check_streams(positions)
        if state.get("counted", self._counted()) != self._counted():
            log.warning(
                "sources were counted again since the checkpoint was saved, and other parts of "
                "their documents are used: batches are packed differently from here on"
            )
        self.close()
        self._consumed, self._counted_here = consumed, self._not_consumed()
        self._consumed_before = self._not_consumed() | _copied(consumed or {})
        if consumed is not None:
            self._consumed = _copied(self._consumed_before)
        self._position = _Position(step, positions)
        self._maker.check(self._position)

    def _counted(self) -> str:
        """Returns a hash of the counts of used documents and parts of all sources."""
        return short_hash([(name, counted.used) for name, counted in self.tallies.items()])

    def documents(self) -> list[tuple[str, int]]:
        """Returns (source, index in it) of each document in this process's share of the last
        batch that was yielded, including damaged ones; empty before the first batch."""
        sampled = self._last.documents if self._last else []
        return [(document.source.cfg.name, document.index) for document in sampled]

    def damaged(self) -> list[Damage]:
        """Returns the documents that this process skipped while making the last batch."""
        return list(self._last.damaged) if self._last else []

    def statistics(self) -> dict[str, Any]:
        """Returns statistics of the global batches yielded so far.

        token_fill, image_fill: fraction of tokens and images that are not padding; tokens, images:
        how many are not padding; documents: number of documents; truncated: how many of them were
        too long and were cut; damaged: how many this process skipped, by reason.
        """
        total = self._totals
        return {
            "token_fill": total["tokens"] / max(1, total["token_capacity"]),
            "image_fill": total["images"] / max(1, total["image_capacity"]),
            "tokens": total["tokens"],
            "images": total["images"],
            "documents": total["documents"],
            "truncated": total["truncated"],
            "damaged": dict(self._damaged),
        }

    def consumed(self) -> dict[str, Consumed] | None:
        """Returns how much the run has read from each source, up to the last batch yielded.

        It is part of the position. None after a checkpoint whose position lacks it.
        """
        if self._consumed is None:
            return None
        usable = {name: counted.used["documents"] for name, counted in self.tallies.items()}
        return {
            name: Consumed(tokens, images, documents, documents / max(1, usable[name]))
            for name, (tokens, images, documents) in self._consumed.items()
        }

    def locate(self, source: str, index: int) -> str:
        """Returns where a document of a source is: its file, and its place there."""
        return self._maker.sources[source].documents.where(index)

    def close(self) -> None:
        """Stops the prefetch thread. The next call to `next` starts it again."""
        if self._thread is not None:
            self._thread.stop()
            self._thread = None

    def _not_consumed(self) -> dict[str, list[int]]:
        return {name: [0] * len(_CONSUMED) for name in self.tallies}

    def _is_consumed(self, value: object) -> bool:
        """Returns whether a value of a data position counts what was read from the sources."""
        return (
            isinstance(value, dict)
            and value.keys() <= self.tallies.keys()
            and all(
                isinstance(c, list) and len(c) == len(_CONSUMED) and all(map(is_count, c))
                for c in value.values()
            )
        )

    def _check_damaged(self, last: Sequence[Damage]) -> None:
        count, max_rate = self._damaged.total(), self._cfg.max_damaged_rate
        if last and self._seen >= _LEAST_SEEN and count > max_rate * self._seen:
            reasons = ", ".join(f"{n} {reason}" for reason, n in self._damaged.most_common())
            raise UserError(
                f"{count} of {self._seen} documents cannot be read ({reasons}; the last: "
                f"{last[-1].where}): repair the data, or raise data.max_damaged_rate above "
                f"{max_rate}"
            )


def share_numbers(share: int | Sequence[int], shares: int) -> tuple[int, ...]:
    """Returns the numbers of a process's shares of a batch.

    Raises:
        ValueError: they are not rising, or not numbers of shares.
    """
    numbers = (share,) if isinstance(share, int) else tuple(share)
    if not numbers or list(numbers) != sorted(set(numbers) & set(range(shares))):
        raise ValueError(f"share {share} of {shares}")
    return numbers


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the position of a run from the parts of it that its processes know.

    Args:
        states: `Batches.state()` of each process after the same step.

    Raises:
        ValueError: they are of different steps, or no process knows the position of a stream.
    """
    merged = dict(states[0])
    if len({(state["kind"], state["step"]) for state in states}) > 1:
        raise ValueError("the processes are at different steps")
    merged["groups"] = [
        [next((known for known in streams if known), None) for streams in zip(*parts, strict=True)]
        for parts in zip(*(state["groups"] for state in states), strict=True)
    ]
    if any(stream is None for streams in merged["groups"] for stream in streams):
        raise ValueError("no process knows the position of a stream")
    merged.pop("consumed_here")
    merged.pop("shares")
    # Processes whose devices split the same rows read the same documents.
    here = {tuple(state["shares"]): state["consumed_here"] for state in states}.values()
    if "consumed" in merged:
        merged["consumed"] = {
            source: [
                before + sum(consumed[source][n] for consumed in here)
                for n, before in enumerate(counts)
            ]
            for source, counts in merged["consumed"].items()
        }
    return merged


def _copied(counts: dict[str, list[int]]) -> dict[str, list[int]]:
    return {name: list(values) for name, values in counts.items()}


def _is_position(value: object) -> bool:
    """Returns whether a value of a data position is the position of a stream, or None."""
    return value is None or (
        isinstance(value, list) and len(value) == 2 and all(map(is_count, value))
    )


def is_count(value: object) -> bool:
    """Returns whether a value of a data position is a non-negative integer."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


class _Position(NamedTuple):
    """Position of a run between two batches."""

    step: int
    groups: tuple[Positions, ...]


class _Maker:
    """Makes the batch at a given position. Stateless.

    Args:
        share: (numbers of this process's shares, number of all shares); None makes no rows.
        pad_to: rows are padded to a multiple of this.
    """

    def __init__(
        self,
        cfg: DataConfig,
        tokenizer: Tokenizer,
        kind: Kind,
        share: tuple[Sequence[int], int] | None,
        groups: list[Group],
        pad_to: int,
    ) -> None:
        builder = BUILDERS[kind]
        self.sources = {source.cfg.name: source for group in groups for source in group.sources}
        self.tallies = {
            name: tally(source, builder.requires) for name, source in self.sources.items()
        }
        self._group_order = group_order(groups)
        self._builders, self._rows, pool = [], list[int](), Pool(cfg)
        for group in groups:
            numbers, shares = share or ((), 1)
            size = group.cfg.batch_size
            rows = -(-size // pad_to) * pad_to // shares  # of a share
            mine: list[range] = []  # neighboring shares are one run
            for first, last in _runs(numbers):
                mine.append(range(min(first * rows, size), min((last + 1) * rows, size)))
            self._rows.append(rows * len(numbers))
            self._builders.append(builder(group, tokenizer, mine if share else None, pool))
        self.is_partial = any(group.streams > 1 for group in groups)

    def start(self) -> _Position:
        first: Position = (0, 0)
        return _Position(0, tuple((first,) * b.group.streams for b in self._builders))

    def check_streams(self, groups: tuple[Positions, ...]) -> None:
        """Checks that positions have the streams of this run.

        Raises:
            UserError: they have other streams, or lack the position of one that is planned here.
        """
        for builder, streams in zip(self._builders, groups, strict=True):
            if len(streams) != builder.group.streams or any(
                streams[n] is None for n in builder.assignment.streams()
            ):
                raise UserError(
                    f"the checkpoint's data position is of {sum(map(bool, streams))} streams of "
                    f"rows, this run has {builder.group.streams}: set data.row_group and the "
                    "batch size as they were"
                )

    def check(self, position: _Position) -> None:
        """Validates a position.

        Raises:
            UserError: no batch ends at this position.
        """
        for builder, streams in zip(self._builders, position.groups, strict=True):
            for stream in builder.assignment.streams():
                block, row = streams[stream] or (0, 0)
                if builder.can_end_at((block, row), stream):
                    continue
                raise UserError(
                    f"the checkpoint's data position is row {row} of block {block}, where these "
                    "sources have no such row: use another step, or the sources that it was "
                    "trained on"
                )

    def make(self, position: _Position) -> tuple[BuiltBatch, _Position]:
        """Returns (the batch, the position after it)."""
        group = self._group_order[position.step]
        built = self._builders[group].build(position.groups[group])
        groups = list(position.groups)
        groups[group] = built.positions
        built = built._replace(batch=_padded(built.batch, self._rows[group]))
        return built, _Position(position.step + 1, tuple(groups))


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the first and the last of each run of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        first = runs.pop()[0] if runs and runs[-1][1] == number - 1 else number
        runs.append((first, number))
    return runs


def _padded(batch: HostBatch, rows: int) -> HostBatch:
    """Returns a batch with rows of zeros after its own."""
    return {
        name: np.pad(values, [(0, rows - len(values))] + [(0, 0)] * (values.ndim - 1))
        if len(values) < rows
        else values
        for name, values in batch.items()
    }


class _Prefetch:
    """Makes batches ahead of time on a thread."""

    def __init__(self, maker: _Maker, position: _Position, ahead: int) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=ahead)
        self._stopped = threading.Event()
        self._failure: BaseException | None = None
        threading.Thread(
            target=self._run, args=(maker, position), daemon=True, name="emu-jax-data"
        ).start()

    def _run(self, maker: _Maker, position: _Position) -> None:
        while not self._stopped.is_set():
            try:
                item = maker.make(position)
                position = item[1]
            except BaseException as error:  # raised by `get` in the consumer's thread
                item = error
            while not self._stopped.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return

    def get(self) -> tuple[BuiltBatch, _Position]:
        if self._failure is None:
            item = self._queue.get()
            if not isinstance(item, BaseException):
                return item
            self._failure = item
        raise self._failure

    def stop(self) -> None:
        self._stopped.set()
