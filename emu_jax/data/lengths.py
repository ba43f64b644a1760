"""Lengths of documents, counted once and cached: tokens of each text, and positions of images."""

from __future__ import annotations

import functools
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from emu_jax.data.documents import (
    ABSENT,
    REASONS,
    Damaged,
    Image,
    Source,
    Text,
    check_size,
)
from emu_jax.data.packing import IMAGE_PART
from emu_jax.data.sources.index import Arrays, cached_arrays, indexing, remove_arrays
from emu_jax.data.unused import Tally, Unused
from emu_jax.errors import UserError
from emu_jax.storage import is_remote
from emu_jax.tokenizer import ASSISTANT, USER, Tokenizer

log = logging.getLogger(__name__)

_CHUNK = 1 << 16  # documents counted together
_VERSION = 2  # of the cached arrays
_AWAITED = ("missing image", "ambiguous image", "missing file")  # may arrive later


def text_ids(text: Text, tokenizer: Tokenizer) -> list[int]:
    """Returns the token ids of a text in a row.

    Raises:
        UserError: the text contains [USER] or [ASSISTANT], which this tokenizer lacks.
    """
    words = text.text.strip()
    if text.special and not tokenizer.instruct and (USER in words or ASSISTANT in words):
        raise UserError(
            f"dialogues need {USER} and {ASSISTANT} as tokens, which this tokenizer does not have: "
            "set data.instruct=True, and the model's vocab_size and tokens to match"
        )
    return tokenizer.encode(words, bos=False) if text.special else tokenizer.encode_plain(words)


class TokenLengths:
    """The lengths of a source's documents: for each part, its number of tokens or IMAGE_PART.

    Counting reads the words of each document, and opens no image. The result is cached as mapped
    arrays, keyed by the source and the tokenizer. It is written a chunk at a time, so an
    interrupted count can be resumed. A document that cannot be read has no parts.

    Args:
        recount: count again if files were missing and some have arrived since; otherwise warn.

    Attributes:
        tally: counts of used and unused parts of the source, as far as they are known without
            opening an image.
    """

    def __init__(
        self, source: Source, tokenizer: Tokenizer, folder: Path, recount: bool = True
    ) -> None:
        name = f"outlines-{_VERSION}-{source.fingerprint}-{tokenizer.fingerprint}"
        chunks = {
            f"{name}-{start}": range(start, min(start + _CHUNK, len(source)))
            for start in range(0, len(source), _CHUNK)
        }

        begun: UInt8[np.ndarray, "bytes"] | None = None  # the stamp when counting began

        def count() -> Arrays:
            nonlocal begun
            log.info("counting the tokens of %d documents for %s", len(source), folder / name)
            # Taken before counting: a file that arrives meanwhile may be too late for its document.
            begun = stamp = _stamp(source)
            if len(chunks) < 2:
                return _with_starts(_count(source, tokenizer, range(len(source)), stamp))
            shares = [
                cached_arrays(
                    folder, part, functools.partial(_count, source, tokenizer, indices, stamp)
                )
                for part, indices in chunks.items()
            ]
            tally = Tally.add([share["tally"] for share in shares])
            arrays = {key: np.concatenate([s[key] for s in shares]) for key in shares[0]}
            stamps = {share["stamp"].tobytes() for share in shares}
            one = stamp if len(stamps) == 1 else np.zeros(1, np.uint8)  # no stamp
            return _with_starts(arrays | {"tally": tally, "stamp": one})

        arrays = cached_arrays(folder, name, count)
        missing = [r for r in Tally.from_array(arrays["tally"]).unused if r in _AWAITED]
        # Files that arrived while counting wait for the next run: a crawl may never pause.
        if (
            missing
            and arrays["stamp"].tobytes() != (_stamp(source) if begun is None else begun).tobytes()
        ):
            if recount:
                log.warning("%s: files arrived since it was counted; counting again", folder / name)
                remove_arrays(folder, name)
                arrays = cached_arrays(folder, name, count)
            else:
                log.warning(
                    "files arrived since %s was counted, and are not used: start a new run, or "
                    "remove it to count again",
                    folder / name,
                )
        # In a store they are removed by the process that counted, not by all.
        done = len(chunks) > 1 and (begun is not None or not is_remote(folder)) and indexing()
        for part in chunks if done else ():
            remove_arrays(folder, part)
        self._sizes, self._starts = arrays["sizes"], arrays["starts"]
        self._damage, self._totals = arrays["damage"], arrays["totals"]
        self.tally = Tally.from_array(arrays["tally"])
        self.tally.merge(source.unused())

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> list[int]:
        return self._sizes[self._starts[index] : self._starts[index + 1]].tolist()

    def damage(self, index: int) -> str | None:
        """Returns why a document could not be read, or None if it could."""
        code = int(self._damage[index])
        return REASONS[code - 1] if code else None

    def totals(self) -> dict[str, int]:
        """Returns totals over all documents (see `_TOTALS`): documents, text tokens, images; how
        many documents have text, an image, or both; how many are damaged."""
        return dict(zip(_TOTALS, self._totals.tolist(), strict=True))


_TOTALS = ("documents", "tokens", "images", "with_text", "with_image", "with_both", "damaged")


def _stamp(source: Source) -> UInt8[np.ndarray, "bytes"]:
    return np.frombuffer(f"stamp {source.stamp()}".encode(), np.uint8)


def _count(
    source: Source, tokenizer: Tokenizer, indices: range, stamp: UInt8[np.ndarray, "bytes"]
) -> Arrays:
    """Counts the tokens of some documents."""

    def measure(index: int) -> tuple[list[int], int, tuple[Unused, ...]]:
        try:
            document = source.sketch(index)
            check_size(document, source.where(index))
        except Damaged as error:
            return [], 1 + REASONS.index(error.reason), (Unused(error.reason, error.detail),)
        sizes = [
            IMAGE_PART if isinstance(p, Image) else len(text_ids(p, tokenizer))
            for p in document.parts
        ]
        empty = sizes.count(0) - sum(part is ABSENT for part in document.parts)
        return sizes, 0, document.unused + (Unused("empty text"),) * empty

    tally = Tally()
    counts, damage = np.zeros(len(indices), np.int32), np.zeros(len(indices), np.int8)
    all_sizes: list[int] = []
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for n, (sizes, code, unused) in enumerate(pool.map(measure, indices)):
            counts[n], damage[n] = len(sizes), code
            all_sizes += sizes
            images = sizes.count(IMAGE_PART)
            texts = len(sizes) - images - sizes.count(0)
            if images or texts:
                tally.use(images=images, texts=texts)
            elif not code:
                unused += (Unused("empty document"),)
            for reason, detail in unused:
                if tally.leave(reason):
                    where = source.where(indices[n])
                    tally.example(reason, f"{where}: {detail}" if detail else where)
    return {
        "counts": counts,
        "sizes": np.array(all_sizes, np.int32),
        "damage": damage,
        "tally": tally.to_array(),
        "stamp": stamp,
    }


def _with_starts(arrays: Arrays) -> Arrays:
    counts, sizes, damage = arrays["counts"], arrays["sizes"], arrays["damage"]
    starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def each(values: np.ndarray) -> Int[np.ndarray, "documents"]:
        total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return total[starts[1:]] - total[starts[:-1]]

    texts, images = each(np.maximum(sizes, 0)), each(sizes == IMAGE_PART)
    totals = [
        len(counts),
        texts.sum(),
        images.sum(),
        (texts > 0).sum(),
        (images > 0).sum(),
        ((texts > 0) & (images > 0)).sum(),
        (damage > 0).sum(),
    ]
    return {
        "sizes": sizes,
        "starts": starts,
        "damage": damage,
        "tally": arrays["tally"],
        "stamp": arrays["stamp"],
        "totals": np.array(totals, np.int64),
    }
