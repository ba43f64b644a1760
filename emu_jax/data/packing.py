"""Documents into rows of fixed size: what is kept of each, and where it goes.

Everything here is decided from lengths alone and is a pure function of its arguments, so
that every process packs the same rows without reading a single picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

# A document's outline is one integer for each part: its tokens, or PICTURE.
PICTURE = -1

_SKEW = 3  # what `_fill` gives for balance, against a fuller row


def part_tokens(size: int, n_causal: int) -> int:
    """Tokens that a part takes: a picture is [IMG], n_causal <image>, [/IMG]."""
    return n_causal + 2 if size == PICTURE else size


class Part(NamedTuple):
    """What is kept of a part of a document."""

    index: int  # in the document
    size: int  # tokens that are kept, or PICTURE
    first: int = 0  # of a text's tokens that are kept

    def end(self, size: int) -> Part:
        """The last `size` tokens of a text; a picture is whole."""
        return (
            self if self.size == PICTURE else Part(self.index, size, self.first + self.size - size)
        )


def window(
    parts: Sequence[Part], rng: np.random.Generator, *, tokens: int, images: int, n_causal: int
) -> list[Part]:
    """A random run of `tokens` tokens of a longer document, with its first `images` pictures.

    As the paper samples MMC4. A text is cut where the run begins and ends; of a picture that
    lies across nothing is kept.
    """
    total = sum(part_tokens(part.size, n_causal) for part in parts)
    begin = int(rng.integers(total - tokens + 1)) if total > tokens else 0
    kept, position = [], 0
    for part in parts:
        start, position = position, position + part_tokens(part.size, n_causal)
        low, high = max(start, begin), min(position, begin + tokens)
        if part.size == PICTURE:
            if images and (low, high) == (start, position):
                kept.append(part)
                images -= 1
        elif low < high:
            kept.append(Part(part.index, high - low, part.first + low - start))
    return kept


def pick(parts: Sequence[Part], rng: np.random.Generator, count: int) -> list[Part]:
    """`count` random pictures of a document, each with the text that follows it (or, of the
    last, precedes it): the paper's second way with MMC4."""
    pictures = [n for n, part in enumerate(parts) if part.size == PICTURE]
    chosen = rng.choice(pictures, min(count, len(pictures)), replace=False).tolist()
    kept = set(chosen)
    for n in chosen:
        after = [m for m in range(n + 1, len(parts)) if parts[m].size != PICTURE]
        before = [m for m in range(n) if parts[m].size != PICTURE]
        kept |= set(after[:1] or before[-1:])
    return [parts[n] for n in sorted(kept)]


def truncate(
    outline: Sequence[int], *, tokens: int, images: int, n_causal: int, end: str = "tail"
) -> list[int]:
    """The parts of an over-long document that are kept, as its new outline.

    Whole parts are kept as long as they fit, and the first that does not fit ends the
    document. Only a text that does not fit and would leave the document without words is
    itself shortened; a picture never is.

    Args:
        outline: tokens of each part, or PICTURE.
        tokens, images: the room there is (without <s> and </s>).
        end: which end is dropped, "tail" or "head".
    """
    kept: list[int] = []
    for size in outline if end == "tail" else reversed(outline):
        need = part_tokens(size, n_causal)
        if need > tokens or (size == PICTURE and images == 0):
            if size != PICTURE and tokens > 0 and all(k == PICTURE for k in kept):
                kept.append(tokens)
            break
        kept.append(size)
        tokens -= need
        images -= size == PICTURE
    return kept if end == "tail" else kept[::-1]


def pack(
    tokens: Int[np.ndarray, "documents"], images: Int[np.ndarray, "documents"],
    *, row_tokens: int, row_images: int,
) -> list[list[int]]:  # fmt: skip
    """Documents into few rows, as lists of document numbers.

    First fit would heap long texts in some rows and pictures in others, each of which then lacks
    the one while there is room for the other. Two ways that balance them are tried, and the one
    that needs fewer rows is taken: `_fill` where documents are of many sizes, `_spread` where
    they are alike.
    """
    if len(over := np.flatnonzero((tokens > row_tokens) | (images > row_images))):
        raise ValueError(f"document {over[0]} does not fit in a row: truncate it first")
    # Integers on one scale, 1 / (T * I) of a row: all processes, whatever their processors, get
    # the same rows.
    sizes = np.stack([tokens * row_images, images * row_tokens], axis=1).astype(np.int64)
    return min(
        _fill(sizes, row_tokens * row_images), _spread(sizes, row_tokens * row_images), key=len
    )


def _fill(sizes: Int[np.ndarray, "documents 2"], row: int) -> list[list[int]]:
    """One row after the other. The first document that is left opens it; then each time comes
    the one of those with room that leaves least room, and leaves tokens and pictures in the
    proportion in which all that is left needs them."""
    rows = []
    left = np.arange(len(sizes))
    while len(left):
        size, need = sizes[left], sizes[left].sum(axis=0)
        waiting, free, members = np.ones(len(left), bool), np.full(2, row), []
        chosen = 0
        while True:
            members.append(chosen)
            waiting[chosen] = False
            free = free - size[chosen]
            fits = np.flatnonzero(waiting & (size[:, 0] <= free[0]) & (size[:, 1] <= free[1]))
            if not len(fits):
                break
            after = free - size[fits]
            skew = np.abs(after[:, 0] * need[1] - after[:, 1] * need[0])
            chosen = fits[np.argmin(_SKEW * skew + after[:, 0] * need.max())]
        rows.append(left[members].tolist())
        left = left[waiting]
    return rows


def _spread(sizes: Int[np.ndarray, "documents 2"], row: int) -> list[list[int]]:
    """All rows at once. So many are opened as all documents together would fill; each document,
    the largest first, goes to the row that has most room left of what it needs most, or opens
    another where none has room."""
    rows: list[list[int]] = [[] for _ in range(-(-int(sizes.sum(axis=0).max(initial=0)) // row))]
    free = np.full((len(sizes), 2), row)
    for n in np.argsort(-sizes.max(axis=1, initial=0), kind="stable").tolist():
        fits = (free[: len(rows), 0] >= sizes[n, 0]) & (free[: len(rows), 1] >= sizes[n, 1])
        room = np.where(fits, free[: len(rows)] @ sizes[n], -1)
        place = int(np.argmax(room)) if fits.any() else len(rows)
        if place == len(rows):
            rows.append([])
        rows[place].append(n)
        free[place] -= sizes[n]
    return rows
