"""Compressed listings, which are unpacked, and unsupported formats, which are reported by name
instead of as damage."""

from __future__ import annotations

import gzip
import io
import shlex
import zipfile
import zlib
from pathlib import Path

import numpy as np

from emu_jax.data import storage
from emu_jax.data.sources.index import Arrays
from emu_jax.errors import UserError

PACKED = (".gz", ".zip")  # compressed listings that are unpacked
_MOST_UNPACKED = 1 << 33  # bytes; all of them are in memory at once
PARQUET = ".parquet"
_HEAD = 512  # bytes that identify a format

# (magic bytes, description, file suffix, command that makes a plain file)
_FORMATS: tuple[tuple[bytes, str, str, str], ...] = (
    (b"\x1f\x8b", "compressed with gzip", ".gz", "gzip -dc {path} > {plain}"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", ".zst", "zstd -dc {path} > {plain}"),
    (b"BZh", "compressed with bzip2", ".bz2", "bzip2 -dc {path} > {plain}"),
    (b"\xfd7zXZ\0", "compressed with xz", ".xz", "xz -dc {path} > {plain}"),
    (b"\x04\x22\x4d\x18", "compressed with lz4", ".lz4", "lz4 -dc {path} > {plain}"),
    (b"PK\x03\x04", "a zip archive", ".zip", "unzip {path}"),
    (b"PAR1", "in the Parquet format", PARQUET, ""),
    (b"ARROW1", "in the Arrow format", ".arrow", ""),
    (b"\x89HDF", "in the HDF5 format", ".h5", ""),
    (b"version https://git-lfs", "a Git LFS pointer", "", "git lfs pull --include={path}"),
    (b"\xff\xfe", "in UTF-16", "", "iconv -f UTF-16 -t UTF-8 {path} > {plain}"),
    (b"\xfe\xff", "in UTF-16", "", "iconv -f UTF-16 -t UTF-8 {path} > {plain}"),
)


def check_format(path: str) -> None:
    """Refuses a file that has to be unpacked or converted first.

    Raises:
        UserError: it is in such a format. The message names the format, and the command if known.
    """
    head = storage.read_part(path, 0, _HEAD)
    for start, what, suffix, command in _FORMATS:
        if not head.startswith(start):
            continue
        if suffix == PARQUET:
            raise UserError(f"{path} is {what}: give it a name that ends in {PARQUET}")
        stem = path.removesuffix(suffix) if suffix else path
        plain = stem if stem != path else f"{path}.plain"
        command = command.format(path=shlex.quote(path), plain=shlex.quote(plain))
        fix = f": {command}" if command else " to JSON lines"
        raise UserError(f"{path} is {what}, which is not read: convert it first{fix}")


def unpack(path: str) -> Arrays:
    """Unpacks the only listing in a compressed file; returns its bytes as `content`.

    Raises:
        UserError: the file is damaged, too large, or holds several files.
    """
    packed = io.BytesIO(storage.read_part(path))
    try:
        if path.endswith(".zip"):
            with zipfile.ZipFile(packed) as archive:
                names = [
                    name
                    for name in archive.namelist()
                    if not name.endswith("/") and not name.startswith("__MACOSX/")
                ]
                if len(names) != 1:
                    raise UserError(f"{path} holds {len(names)} files, not one listing: unpack it")
                with archive.open(names[0]) as file:
                    content = file.read(_MOST_UNPACKED + 1)
        else:
            with gzip.GzipFile(fileobj=packed) as file:
                content = file.read(_MOST_UNPACKED + 1)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError) as error:
        raise UserError(f"cannot unpack {path} ({error}): download or unpack it again") from None
    if len(content) > _MOST_UNPACKED:
        raise UserError(f"{path} is too large to be read packed: unpack it first")
    return {"content": np.frombuffer(content, np.uint8)}


def check_twins(paths: list[str]) -> None:
    """Refuses listings that would be read twice.

    Raises:
        UserError: a listing is among `paths` both packed and unpacked.
    """
    plain = set(paths)
    for path in paths:
        if path.endswith(PACKED) and (other := str(Path(path).with_suffix(""))) in plain:
            raise UserError(f"{path} and {other} are one listing: remove or name only one of them")
