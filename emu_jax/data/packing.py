"""Documents into rows of fixed size: how long they are, what is cut, where they go.

Everything here is decided from lengths alone and is a pure function of its arguments, so
that every process packs the same rows without reading a single picture.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from emu_jax.data.documents import DocumentFiles, Picture, Text
from emu_jax.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# A document's outline is one integer for each part: its tokens, or PICTURE.
PICTURE = -1


def part_tokens(size: int, n_causal: int) -> int:
    """Tokens that a part takes: a picture is [IMG], n_causal <image>, [/IMG]."""
    return n_causal + 2 if size == PICTURE else size


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


def first_fit(
    tokens: Int[np.ndarray, "documents"], images: Int[np.ndarray, "documents"],
    *, row_tokens: int, row_images: int,
) -> list[list[int]]:  # fmt: skip
    """Each document, in order, goes into the first row with room for its tokens and pictures.

    Returns rows as lists of document numbers.
    """
    rows: list[list[int]] = []
    free_tokens = np.full(len(tokens), row_tokens)
    free_images = np.full(len(tokens), row_images)
    for n, (need_tokens, need_images) in enumerate(zip(tokens, images, strict=True)):
        if need_tokens > row_tokens or need_images > row_images:
            raise ValueError(f"document {n} does not fit in a row: truncate it first")
        # An unopened row always has room, so that argmax finds one.
        row = int(np.argmax((free_tokens >= need_tokens) & (free_images >= need_images)))
        if row == len(rows):
            rows.append([])
        rows[row].append(n)
        free_tokens[row] -= need_tokens
        free_images[row] -= need_images
    return rows


def text_ids(text: Text, tokenizer: Tokenizer) -> list[int]:
    """The ids that a text has in a row."""
    words = text.text.strip()
    return tokenizer.encode(words, bos=False) if text.special else tokenizer.encode_plain(words)


class Outlines:
    """The outline of every document of some files, counted once.

    Counting reads each document, so the result is kept beside its file, under a name that
    holds the tokenizer's fingerprint, and used as long as the file stays as it is.
    """

    def __init__(self, files: DocumentFiles, tokenizer: Tokenizer):
        counts, sizes = [], []
        for n, path in enumerate(files.paths):
            count, size = _outlines_of(path, tokenizer, files, files.range_of(n))
            counts.append(count)
            sizes.append(size)
        self._sizes = np.concatenate(sizes)
        self._starts = np.concatenate([[0], np.cumsum(np.concatenate(counts))])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> list[int]:
        return self._sizes[self._starts[index] : self._starts[index + 1]].tolist()

    def texts(self) -> Int[np.ndarray, "documents"]:
        """Text tokens of every document."""
        return self._sum(np.maximum(self._sizes, 0))

    def pictures(self) -> Int[np.ndarray, "documents"]:
        """Pictures of every document."""
        return self._sum(self._sizes == PICTURE)

    def _sum(self, values: np.ndarray) -> np.ndarray:
        total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return total[self._starts[1:]] - total[self._starts[:-1]]


def _outlines_of(
    path: Path, tokenizer: Tokenizer, files: DocumentFiles, indices: range
) -> tuple[np.ndarray, np.ndarray]:
    """(parts of each document, size of each part) of one file."""
    stat = path.stat()
    stamp = np.array([stat.st_size, stat.st_mtime_ns, len(indices)])
    kept = path.with_name(f"{path.name}.{tokenizer.fingerprint}.npz")
    try:
        with np.load(kept) as saved:
            if np.array_equal(saved["stamp"], stamp):
                return saved["counts"], saved["sizes"]
    except Exception:  # absent, cut short or foreign: count again
        pass
    log.info("counting the tokens of %s", path)
    counts, sizes = [], []
    for index in indices:
        parts = files[index].parts
        counts.append(len(parts))
        for part in parts:
            picture = isinstance(part, Picture)
            sizes.append(PICTURE if picture else len(text_ids(part, tokenizer)))
    result = np.array(counts, np.int32), np.array(sizes, np.int32)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{kept.name}.")
        with os.fdopen(handle, "wb") as f:
            np.savez(f, stamp=stamp, counts=result[0], sizes=result[1])
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, kept)
    except OSError as error:  # a read-only folder costs the counting each time, no more
        log.warning("cannot keep the token counts of %s: %s", path, error)
    return result
