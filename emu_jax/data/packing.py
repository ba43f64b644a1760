"""Packing of documents into rows of fixed size: truncation, sampling of parts, bin packing.

All functions are pure functions of lengths (and a generator), so every process packs the same
rows without reading an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

# The lengths of a document are one integer for each part: its tokens, or less than 0 for an image.
# Only a model with separate tokens for frames distinguishes them from still images.
IMAGE_PART = -1
VIDEO_PART, FRAME_PART = -3, -4  # the first frame of a video, and each further one

_SKEW = 3  # weight of balance against a fuller row in `_fill`


def part_tokens(size: int, n_causal: int, n_frame: int = 0) -> int:
    """Returns the tokens that a part takes.

    An image is [IMG], n_causal <image>, [/IMG]. A frame is [IMG], n_frame [gIMG], [/IMG], and
    [VIDEO] precedes the first one; if n_frame is 0, a frame is an image.
    """
    if size >= 0:
        return size
    if size == IMAGE_PART or not n_frame:
        return n_causal + 2
    return n_frame + 2 + (size == VIDEO_PART)


class PartRange(NamedTuple):
    """A part of a document, or the range of a text's tokens that is kept."""

    index: int  # in the document
    size: int  # number of tokens that are kept, or less than 0 for an image
    first: int = 0  # first token of a text that is kept

    def end(self, size: int) -> PartRange:
        """Returns the last `size` tokens of a text, or a whole image."""
        if self.size < 0:
            return self
        return PartRange(self.index, size, self.first + self.size - size)


def whole_videos(parts: Sequence[PartRange]) -> list[PartRange]:
    """Drops the frames of videos whose beginning is missing."""
    kept: list[PartRange] = []
    for part in parts:
        if _has_begun(part, kept):
            kept.append(part)
    return kept


def _has_begun(part: PartRange, before: Sequence[PartRange]) -> bool:
    """Returns whether a part is no frame, or the parts before it end with the frame before it."""
    if part.size != FRAME_PART:
        return True
    last = before[-1] if before else None
    return last is not None and last.index == part.index - 1 and last.size <= VIDEO_PART


def window(
    parts: Sequence[PartRange],
    rng: np.random.Generator,
    *,
    tokens: int,
    images: int,
    n_causal: int,
    n_frame: int = 0,
) -> list[PartRange]:
    """Samples a window of `tokens` tokens of a longer document, as the paper does for MMC4.

    The window keeps its first `images` images. Texts are cut at both ends of the window; an image
    that crosses an end is dropped, and so are frames whose video begins before the window.
    """
    total = sum(part_tokens(part.size, n_causal, n_frame) for part in parts)
    begin = int(rng.integers(total - tokens + 1)) if total > tokens else 0
    shown, position = [], 0
    for part in parts:
        start, position = position, position + part_tokens(part.size, n_causal, n_frame)
        low, high = max(start, begin), min(position, begin + tokens)
        if part.size < 0:
            if images and (low, high) == (start, position) and _has_begun(part, shown):
                shown.append(part)
                images -= 1
        elif low < high:
            shown.append(PartRange(part.index, high - low, part.first + low - start))
    return shown


def pick(parts: Sequence[PartRange], rng: np.random.Generator, count: int) -> list[PartRange]:
    """Samples `count` images of a document, as in the paper's second sampling of MMC4.

    Each image keeps the text that follows it or, if none follows, the text before it. A video is
    sampled as a whole, and counts as its frames; it keeps the first of them that `count` allows.
    """
    images = [n for n, part in enumerate(parts) if part.size < 0 and part.size != FRAME_PART]
    indices: set[int] = set()
    left = count
    for n in rng.choice(images, min(count, len(images)), replace=False).tolist():
        end = n + 1
        while end < len(parts) and parts[end].size == FRAME_PART:
            end += 1
        if not left:
            break
        shown = range(n, min(end, n + left))
        left -= len(shown)
        after = [m for m in range(end, len(parts)) if parts[m].size >= 0]
        before = [m for m in range(n) if parts[m].size >= 0]
        indices |= {*shown, *(after[:1] or before[-1:])}
    return [parts[n] for n in sorted(indices)]


def truncate(
    lengths: Sequence[int],
    *,
    tokens: int,
    images: int,
    n_causal: int,
    n_frame: int = 0,
    end: str = "tail",
) -> list[int]:
    """Truncates a document that is too long, and returns its new lengths.

    Whole parts are kept up to the first one that does not fit. A text that does not fit is
    shortened only if the document would otherwise have no words. Images are never cut.

    Args:
        lengths: number of tokens of each part, or less than 0 for an image.
        tokens, images: room in the row (without <s> and </s>).
        end: which end is dropped, "tail" or "head".
    """
    fitting: list[int] = []
    for size in lengths if end == "tail" else reversed(lengths):
        need = part_tokens(size, n_causal, n_frame)
        if need > tokens or (size < 0 and images == 0):
            if size >= 0 and tokens > 0 and all(k < 0 for k in fitting):
                fitting.append(tokens)
            break
        fitting.append(size)
        tokens -= need
        images -= size < 0
    return fitting if end == "tail" else fitting[::-1]


def pack(
    tokens: Int[np.ndarray, "documents"],
    images: Int[np.ndarray, "documents"],
    *,
    row_tokens: int,
    row_images: int,
) -> list[list[int]]:
    """Packs documents into few rows; returns lists of document numbers.

    First fit would collect long texts in some rows and images in others, so that each row runs
    out of room for one while room for the other stays empty. Two balanced algorithms are tried, and
    the result with fewer rows is taken: usually `_fill` if documents differ in size, and `_spread`
    if they are similar.

    Raises:
        ValueError: a document does not fit in a row.
    """
    if len(over := np.flatnonzero((tokens > row_tokens) | (images > row_images))):
        raise ValueError(f"document {over[0]} does not fit in a row: truncate it first")
    # Integers in units of 1 / (T * I) of a row: exact, so all processes get the same rows on any
    # processor.
    sizes = np.stack([tokens * row_images, images * row_tokens], axis=1).astype(np.int64)
    return min(
        _fill(sizes, row_tokens * row_images), _spread(sizes, row_tokens * row_images), key=len
    )


def _fill(sizes: Int[np.ndarray, "documents 2"], row: int) -> list[list[int]]:
    """Fills one row at a time.

    The first remaining document opens a row. Then the best of the documents that fit is added,
    until none fits. The best one leaves the least room, with tokens and images in the proportion
    that the remaining documents need.
    """
    rows = []
    left, waiting = np.arange(len(sizes)), np.ones(len(sizes), bool)
    while len(left):
        numbers, tokens, images = left, sizes[left, 0], sizes[left, 1]
        need_tokens, need_images = int(tokens.sum()), int(images.sum())
        need = max(need_tokens, need_images)
        free_tokens = free_images = row
        members: list[int] = []
        chosen = 0
        while True:
            members.append(int(numbers[chosen]))
            free_tokens -= int(tokens[chosen])
            free_images -= int(images[chosen])
            # A document that does not fit now never will: the candidates get fewer.
            fits = (tokens <= free_tokens) & (images <= free_images)
            fits[chosen] = False
            numbers, tokens, images = numbers[fits], tokens[fits], images[fits]
            if not len(numbers):
                break
            after = free_tokens - tokens
            skew = np.abs(after * need_images - (free_images - images) * need_tokens)
            chosen = int(np.argmin(_SKEW * skew + after * need))
        rows.append(members)
        waiting[members] = False
        left = left[waiting[left]]
    return rows


def _spread(sizes: Int[np.ndarray, "documents 2"], row: int) -> list[list[int]]:
    """Fills all rows at once.

    Opens as many rows as all documents together would fill. Each document, the largest first,
    goes to the row with the most room for what the document needs most, or to a new row if none
    has room.
    """
    rows: list[list[int]] = [[] for _ in range(-(-int(sizes.sum(axis=0).max(initial=0)) // row))]
    free = np.full((len(sizes), 2), row)
    for n in np.argsort(-sizes.max(axis=1, initial=0), kind="stable").tolist():
        fits = (free[: len(rows), 0] >= sizes[n, 0]) & (free[: len(rows), 1] >= sizes[n, 1])
        room = np.where(fits, free[: len(rows)] @ sizes[n], -1)
        row_index = int(np.argmax(room)) if fits.any() else len(rows)
        if row_index == len(rows):
            rows.append([])
        rows[row_index].append(n)
        free[row_index] -= sizes[n]
    return rows
