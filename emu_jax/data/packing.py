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
    """Documents into few rows, each with its fair share of tokens and of pictures.

    So many rows are opened as all documents together would fill. Then each document, the
    largest first, goes to the row that has most room left of what it needs most, or opens
    another where none has room. First fit would do worse: it heaps long texts in some rows
    and pictures in others, and each then lacks the one while there is room for the other.

    Returns rows as lists of document numbers; which comes first has nothing to do with size.
    """
    if len(over := np.flatnonzero((tokens > row_tokens) | (images > row_images))):
        raise ValueError(f"document {over[0]} does not fit in a row: truncate it first")
    count = max(-(-int(tokens.sum()) // row_tokens), -(-int(images.sum()) // row_images))
    rows: list[list[int]] = [[] for _ in range(count)]
    free_tokens = np.full(len(tokens), row_tokens)
    free_images = np.full(len(tokens), row_images)
    # Shares of a row, without fractions: tokens and images in units of 1 / (T * I).
    need_tokens, need_images = tokens * row_images, images * row_tokens
    for n in np.argsort(-np.maximum(need_tokens, need_images), kind="stable").tolist():
        left_tokens, left_images = free_tokens[: len(rows)], free_images[: len(rows)]
        fits = (left_tokens >= tokens[n]) & (left_images >= images[n])
        room = need_tokens[n] * left_tokens * row_images + need_images[n] * left_images * row_tokens
        row = int(np.argmax(np.where(fits, room, -1))) if fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
        rows[row].append(n)
        free_tokens[row] -= tokens[n]
        free_images[row] -= images[n]
    rows.sort(key=lambda row: row[0])  # by the document that opened it
    return [sorted(row) for row in rows]
