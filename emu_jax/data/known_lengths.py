"""Lengths of documents that are stored beside their shard, so that training need not count them.

`emu-jax data build` writes NAME.lengths.npz beside NAME.array_record:

    shard_bytes  size of the shard that the lengths belong to
    shard_tail   SHA-256 of its last TAIL_BYTES, which list the sizes of its records
    tokenizer    fingerprint of the tokenizer that counted
    counts       int32, number of parts of each document
    sizes        int32, tokens of each part; IMAGE_PART for an image, VIDEO_PART or FRAME_PART for
                 a frame of a video
    frames       whether frames are distinguished from still images; missing in files of earlier
                 versions, which did not
"""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from emu_jax.data import storage

SUFFIX = ".lengths.npz"
TAIL_BYTES = 1 << 18  # of a shard: they hold all of its footer, unless it is very large
# Exceptions raised by reading a damaged file. zipfile raises RuntimeError for changed flags.
_BROKEN = (OSError, ValueError, LookupError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


class KnownLengths(NamedTuple):
    """Lengths of consecutive documents that need not be counted, in their order.

    Attributes:
        counts: number of parts of each document.
        sizes: tokens of each part, or less than 0 for an image (`packing`).
        frames: whether frames of videos are distinguished from still images.
    """

    counts: Int[np.ndarray, "documents"]
    sizes: Int[np.ndarray, "parts"]
    frames: bool = True

    def select(self, documents: slice) -> KnownLengths:
        """Returns the lengths of some of the documents, in steps of 1."""
        first, last, _ = documents.indices(len(self.counts))
        if last - first == len(self.counts):
            return self
        starts = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])
        sizes = self.sizes[starts[first] : starts[last]]
        return KnownLengths(self.counts[first:last], sizes, self.frames)


class Rejected(Exception):
    """Raised if stored lengths cannot be used; the message says why."""


def lengths_path(shard: str) -> str:
    """Returns the path of the lengths of a shard's documents."""
    return shard.removesuffix(".array_record") + SUFFIX


def save_lengths(shard: str, shard_bytes: int, tokenizer: str, lengths: KnownLengths) -> None:
    """Writes the lengths of a shard's documents beside it.

    Args:
        shard_bytes: size of the shard, which exists.
        tokenizer: fingerprint of the tokenizer that counted.
    """
    with storage.writing_data_file(lengths_path(shard)) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            shard_bytes=np.int64(shard_bytes),
            shard_tail=np.array(_tail_digest(shard, shard_bytes)),
            tokenizer=np.array(tokenizer),
            counts=lengths.counts.astype(np.int32),
            sizes=lengths.sizes.astype(np.int32),
            frames=np.bool_(lengths.frames),
        )


def load_lengths(shard: str, shard_bytes: int, documents: int, tokenizer: str) -> KnownLengths:
    """Reads the lengths of a shard's documents.

    Args:
        shard_bytes, documents: size of the shard, and how many documents it has.
        tokenizer: fingerprint of the tokenizer that training uses.

    Raises:
        Rejected: they are of another tokenizer or shard, or damaged, or the shard cannot be read.
        UserError: the store does not answer.
    """
    path = lengths_path(shard)
    try:
        with zipfile.ZipFile(io.BytesIO(storage.read(path))) as members:
            arrays = {n.removesuffix(".npy"): _array(members, n) for n in members.namelist()}
        if str(arrays["tokenizer"]) != tokenizer:
            raise Rejected(f"{path} was counted with another tokenizer")
        frames = "frames" in arrays and bool(arrays["frames"])
        lengths = KnownLengths(arrays["counts"], arrays["sizes"], frames)
        found = (int(arrays["shard_bytes"]), len(lengths.counts), lengths.counts.sum())
        # Files of earlier versions lack it.
        tail = str(arrays["shard_tail"]) if "shard_tail" in arrays else None
    except _BROKEN as error:
        raise Rejected(f"{path} is damaged ({error})") from None
    if found != (shard_bytes, documents, len(lengths.sizes)):
        raise Rejected(f"{path} does not fit {shard}")
    try:
        if tail is not None and tail != _tail_digest(shard, shard_bytes):
            raise Rejected(f"{path} was counted for other documents than {shard} has")
    except OSError as error:
        raise Rejected(f"{shard} cannot be read ({error})") from None
    return lengths


def known_documents(shard: str) -> int | None:
    """Returns how many documents a local shard has, by the lengths beside it.

    Returns None if there are none, or they may be of another shard. Does not read the lengths.
    """
    try:
        size = storage.stat(shard).size
        with zipfile.ZipFile(storage.RangeFile(lengths_path(shard))) as members:
            known = {name: _array(members, f"{name}.npy") for name in ("shard_bytes", "shard_tail")}
            with members.open("counts.npy") as file, storage.NUMPY_HEADERS:
                np.lib.format.read_magic(file)
                (count,), _, dtype = np.lib.format.read_array_header_1_0(file)
                # Both were stored apart: a damaged header does not pass.
                whole = file.tell() + count * dtype.itemsize
                fits = members.getinfo("counts.npy").file_size == whole
        same = fits and int(known["shard_bytes"]) == size
        return count if same and str(known["shard_tail"]) == _tail_digest(shard, size) else None
    except Exception:  # NumPy raises many types on a damaged header
        return None


def _array(members: zipfile.ZipFile, name: str) -> np.ndarray:
    """Reads an array. Its CRC-32 is checked before NumPy parses the header."""
    content = io.BytesIO(members.read(name))
    with storage.NUMPY_HEADERS:
        return np.lib.format.read_array(content)


def _tail_digest(shard: str, shard_bytes: int) -> str:
    """Returns the SHA-256 of the end of a shard, as hexadecimal digits."""
    start = max(0, shard_bytes - TAIL_BYTES)
    # Not `storage.read`, which may still hold a file that was replaced.
    tail = storage.RangeFile(shard, start, shard_bytes - start).read()
    return hashlib.sha256(tail).hexdigest()
