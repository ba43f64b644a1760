"""Opens and creates files of tensors: torch's, safetensors, and shards with an index.

Reading maps a file read-only: a tensor takes no memory until it is copied. Writing puts each
tensor in its place in the file, a block at a time.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from emu_jax.convert.tensors import (
    DTYPE_NAMES,
    SAFETENSORS_DTYPES,
    Contents,
    MappedFile,
    Tensor,
    TensorWriter,
    blocks,
    check_complete,
    check_shape,
)
from emu_jax.convert.torch_format import TorchWriter, open_torch
from emu_jax.errors import UserError
from emu_jax.storage import read_json_object, refuse_stand_in

# File names of half-precision weights contain one of these. A folder may hold no others.
_VARIANTS = ("fp16", "bf16")
_INDEX = re.compile(r"\.index(\.\w+)?\.json$")


def is_index(name: str) -> bool:
    """Returns whether a file of this name lists the shards of a model."""
    return bool(_INDEX.search(name))


def find(folder: Path, *stems: str) -> Path:
    """Finds the weights in a folder: `STEM.safetensors`, `STEM.bin` or an index of shards.

    A half-precision variant (`STEM.fp16.safetensors`) is taken only if there is nothing else.

    Raises:
        UserError: the folder has no weights.
    """
    plain = [
        f"{stem}{ending}"
        for ending in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
        for stem in stems
    ]
    variants = [
        f"{stem}{ending.format(variant)}"
        for variant in _VARIANTS
        for ending in (
            ".{}.safetensors",
            ".safetensors.index.{}.json",
            ".{}.bin",
            ".bin.index.{}.json",
        )
        for stem in stems
    ]
    for name in plain + variants:
        if (folder / name).is_file():
            return folder / name
    if not folder.is_dir():
        raise UserError(f"{folder} is not a directory")
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt"))
    others = f" (it has {', '.join(others)})" if others else ""
    raise UserError(f"{folder} has no weights{others}: expected one of {', '.join(plain)}")


def open_tensors(path: Path) -> tuple[dict[str, dict[str, Tensor]], str | None]:
    """Opens the tensors of a file, or of all shards that an index lists.

    Returns:
        {file name: {key: tensor}} in the files' own order, and the name under which the state
        dict was nested, if it was.

    Raises:
        UserError: a file is missing, truncated or damaged, or holds more than tensors.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    if is_index(path.name):
        return _open_shards(path), None
    refuse_stand_in(path)
    if path.suffix == ".safetensors":
        return {path.name: _open_safetensors(path)}, None
    tensors, wrapper_key = open_torch(path)
    return {path.name: tensors}, wrapper_key


def _open_shards(index: Path) -> dict[str, dict[str, Tensor]]:
    try:
        file_of = {
            str(key): str(name) for key, name in read_json_object(index)["weight_map"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read the index of shards {index}: {error!r}") from None
    names = sorted(set(file_of.values()))
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(f"{index} names shards that are missing: {', '.join(missing)}")
    shards = {}
    for name in names:
        opened, _ = open_tensors(index.parent / name)
        if list(opened) != [Path(name).name]:
            raise UserError(f"{index} names {name}, which is another index, not a shard")
        shards[name] = opened[Path(name).name]
    if absent := [key for key, name in file_of.items() if key not in shards[name]]:
        raise UserError(f"{index} names tensors that its shards lack: {', '.join(sorted(absent))}")
    seen: dict[str, str] = {}
    for name, tensors in shards.items():
        for key in tensors:
            if key in seen:
                raise UserError(f"{index.parent}: {key} is in both {seen[key]} and {name}")
            seen[key] = name
    return shards


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    data_bytes = path.stat().st_size - 8
    try:
        with path.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if length > data_bytes:
                raise UserError(f"{path} is truncated: its header alone is longer than the file")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        entries = []
        for key, value in header.items():
            start, end = map(int, value["data_offsets"])
            entries.append((start, end, key, str(value["dtype"]), tuple(map(int, value["shape"]))))
    except (
        OSError,
        struct.error,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise UserError(f"{path} is not a valid safetensors file: {error!r}") from None
    mapped = MappedFile(path)
    data_bytes -= length
    tensors = {}
    for start, end, key, name, shape in sorted(entries):
        dtype = SAFETENSORS_DTYPES.get(name)
        if dtype is None:
            raise UserError(f"{path}: {key} has the unsupported dtype {name}")
        size = math.prod(shape) * dtype.itemsize
        if end - start != size or start < 0 or min(shape, default=0) < 0:
            raise UserError(f"{path} is damaged: {key} {list(shape)} has {end - start} bytes")
        if end > data_bytes:
            raise UserError(
                f"{path} is truncated: {data_bytes} bytes of data, but {key} ends at {end}"
            )

        def read(
            start: int = 8 + length + start,
            dtype: np.dtype = dtype,
            shape: tuple[int, ...] = shape,
        ) -> np.ndarray:
            return mapped.array(start, dtype, shape)

        tensors[key] = Tensor(shape, dtype, read)
    return tensors


def create(path: Path, contents: Contents, wrapper_key: str | None = None) -> TensorWriter:
    """Creates a file for tensors of these shapes and dtypes, in safetensors or torch's format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        return SafetensorsWriter(path, contents)
    return TorchWriter(path, contents, wrapper_key)


class SafetensorsWriter:
    """Writes the header first, then each tensor in its place."""

    def __init__(self, path: Path, contents: Contents) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key, (shape, dtype) in contents.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[key] = {
                "dtype": DTYPE_NAMES[dtype][0],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._start = 8 + len(encoded)
        self._path, self._header, self._left = path, header, set(contents)
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(encoded)) + encoded)
        self._file.truncate(self._start + end)

    def write(self, key: str, tensor: np.ndarray) -> None:
        self._left.remove(key)
        entry = self._header[key]
        check_shape(key, tensor, tuple(entry["shape"]))
        self._file.seek(self._start + entry["data_offsets"][0])
        for block in blocks(tensor, SAFETENSORS_DTYPES[entry["dtype"]]):
            self._file.write(block)

    def close(self) -> None:
        self._file.close()
        check_complete(self._path, self._left)

    def abort(self) -> None:
        self._file.close()


def split_into_shards(
    folder: Path, stem: str, contents: Contents, limit: int = 5 * 2**30
) -> Mapping[str, Contents]:
    """Splits a folder's tensors into safetensors that transformers, diffusers and peft can read.

    These are one file, or shards of at most `limit` bytes. The index of the shards is written.

    Returns:
        {file name: its contents}.
    """
    groups: list[list[str]] = [[]]
    size = 0
    for key, (shape, dtype) in contents.items():
        length = math.prod(shape) * dtype.itemsize
        if groups[-1] and size + length > limit:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size += length
    if len(groups) == 1:
        return {f"{stem}.safetensors": contents}
    shards = {
        f"{stem}-{i:05}-of-{len(groups):05}.safetensors": {key: contents[key] for key in keys}
        for i, keys in enumerate(groups, 1)
    }
    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in contents.values())
    weight_map = {_bare(key): name for name, keys in shards.items() for key in keys}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return shards


class ShardedWriter:
    """Writes tensors to several files.

    Args:
        contents: the contents of each file, by its path relative to `folder`. A key's prefix up
            to the colon (`unet:`) only tells files apart and is not written.
        wrapper_keys: {file: the key under which it wraps its state dict}.
    """

    def __init__(
        self,
        contents: Mapping[str, Contents],
        folder: Path,
        wrapper_keys: Mapping[str, str | None] | None = None,
    ) -> None:
        wrapper_keys = wrapper_keys or {}
        self._writers = {
            name: create(
                folder / name,
                {_bare(key): declared for key, declared in tensors.items()},
                wrapper_keys.get(name),
            )
            for name, tensors in contents.items()
        }
        self._file_of = {key: name for name, tensors in contents.items() for key in tensors}

    def write(self, key: str, tensor: np.ndarray) -> None:
        self._writers[self._file_of[key]].write(_bare(key), tensor)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def abort(self) -> None:
        for writer in self._writers.values():
            writer.abort()


def _bare(key: str) -> str:
    """Returns a key without the prefix that tells files apart."""
    return key.rsplit(":", 1)[-1]
