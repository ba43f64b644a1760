"""Tensor files, read and written one tensor at a time.

Reading maps a file into memory, so that a tensor costs nothing until it is copied; writing puts
each tensor where it belongs in the file as it comes. `.safetensors` needs no torch. `.bin` and
`.pt` are read by torch, weights only: a pickle that holds anything else is refused.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import math
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from emu_jax.config import UserError
from emu_jax.convert.tables import Shape

# safetensors' name, torch's name and storage class.
_DTYPES: dict[np.dtype, tuple[str, str, str]] = {
    np.dtype(np.float64): ("F64", "float64", "DoubleStorage"),
    np.dtype(np.float32): ("F32", "float32", "FloatStorage"),
    np.dtype(np.float16): ("F16", "float16", "HalfStorage"),
    np.dtype(ml_dtypes.bfloat16): ("BF16", "bfloat16", "BFloat16Storage"),
    np.dtype(np.int64): ("I64", "int64", "LongStorage"),
    np.dtype(np.int32): ("I32", "int32", "IntStorage"),
    np.dtype(np.int16): ("I16", "int16", "ShortStorage"),
    np.dtype(np.int8): ("I8", "int8", "CharStorage"),
    np.dtype(np.uint8): ("U8", "uint8", "ByteStorage"),
    np.dtype(np.bool_): ("BOOL", "bool", "BoolStorage"),
}
_SAFETENSORS = {names[0]: dtype for dtype, names in _DTYPES.items()}

# A state dict may lie inside another dict, under one of these names.
_NESTS = ("module", "state_dict", "model")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file. `read` maps it; copy it to keep it."""

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def dtype_name(dtype: np.dtype) -> str:
    """torch's name of a dtype."""
    return _DTYPES[np.dtype(dtype)][1]


def dtype_of(name: str) -> np.dtype:
    """The dtype that torch calls so."""
    return {names[1]: dtype for dtype, names in _DTYPES.items()}[name]


def find(folder: Path, *stems: str) -> Path:
    """The weights file in a folder: `STEM.safetensors`, `STEM.bin` or the index of its shards.

    Raises:
        UserError: there is none.
    """
    names = [
        f"{stem}{ending}"
        for ending in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
        for stem in stems
    ]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} has no weights: expected one of {', '.join(names)}")


def open_tensors(path: Path) -> tuple[dict[str, dict[str, Tensor]], str | None]:
    """The tensors of a file, or of all the shards that an index lists.

    Returns:
        {file name: {key: tensor}} in the files' own order, and the name under which the state
        dict was nested, if it was.

    Raises:
        UserError: a file is missing, truncated or damaged, or holds more than tensors.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist" if not path.exists() else f"{path} is no file")
    if path.name.endswith(".index.json"):
        return _open_shards(path), None
    if path.suffix == ".safetensors":
        return {path.name: _open_safetensors(path)}, None
    tensors, nest = _open_torch(path)
    return {path.name: tensors}, nest


def _open_shards(index: Path) -> dict[str, dict[str, Tensor]]:
    try:
        places = json.loads(index.read_text())["weight_map"]
        names = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read the index of shards {index}: {error!r}") from None
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(f"{index} names shards that are missing: {', '.join(missing)}")
    shards = {name: open_tensors(index.parent / name)[0][name] for name in names}
    if absent := [key for key, name in places.items() if key not in shards[name]]:
        raise UserError(f"{index} names tensors that its shards lack: {', '.join(sorted(absent))}")
    seen: dict[str, str] = {}
    for name, tensors in shards.items():
        for key in tensors:
            if key in seen:
                raise UserError(f"{index.parent}: {key} stands in both {seen[key]} and {name}")
            seen[key] = name
    return shards


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    try:
        with path.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if length > size - 8:
                raise UserError(f"{path} is truncated: its header alone is longer than the file")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        entries = []
        for key, value in header.items():
            start, end = map(int, value["data_offsets"])
            entries.append((start, end, key, str(value["dtype"]), tuple(map(int, value["shape"]))))
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no safetensors file, or damaged: {error!r}") from None
    data = np.memmap(path, np.uint8, "r", offset=8 + length) if size > 8 + length else None
    held = size - 8 - length
    tensors = {}
    for start, end, key, name, shape in sorted(entries):
        dtype = _SAFETENSORS.get(name)
        if dtype is None:
            raise UserError(f"{path}: {key} has dtype {name}, which no Emu tensor has")
        if end - start != math.prod(shape) * dtype.itemsize or start < 0:
            raise UserError(f"{path} is damaged: {key} {list(shape)} has {end - start} bytes")
        if end > held:
            raise UserError(f"{path} is truncated: {held} bytes of data, but {key} ends at {end}")

        def read(start=start, end=end, dtype=dtype, shape=shape):
            part = data[start:end] if data is not None else np.zeros(0, np.uint8)
            return np.asarray(part).view(dtype).reshape(shape)

        tensors[key] = Tensor(shape, dtype, read)
    return tensors


def torch_or_explain(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} is torch's format: install torch (pip install 'emu_jax[torch]')"
        ) from None
    return torch


def _open_torch(path: Path) -> tuple[dict[str, Tensor], str | None]:
    torch = torch_or_explain(path)
    mapped = zipfile.is_zipfile(path)  # the format before torch 1.6 cannot be mapped
    with path.open("rb") as f:
        if f.read(2) == b"PK" and not mapped:
            raise UserError(f"{path} is truncated: its zip archive lacks the end")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how unusual a file is: it is checked below
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped or None)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise UserError(
            f"{path} is refused: it is damaged, or its pickle holds more than tensors ({reason})"
        ) from None
    except Exception as error:  # what a damaged pickle leads to: IndexError, AssertionError, ...
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{path} is truncated or damaged: {reason}") from None
    nest = None
    if isinstance(stored, dict):
        nest = next((n for n in _NESTS if isinstance(stored.get(n), dict)), None)
        stored = stored[nest] if nest else stored
    if not isinstance(stored, dict) or not stored:
        raise UserError(f"{path} holds no state dict but {type(stored).__name__}")
    names = {getattr(torch, names[1]): dtype for dtype, names in _DTYPES.items()}
    tensors = {}
    for key, value in stored.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: {key} is no tensor but {type(value).__name__}")
        if value.dtype not in names or value.layout != torch.strided or value.device.type != "cpu":
            raise UserError(f"{path}: {key} is {value.dtype}, which no Emu tensor is")
        tensors[str(key)] = Tensor(
            tuple(value.shape), names[value.dtype], lambda value=value: _as_numpy(value, torch)
        )
    return tensors, nest


def _as_numpy(tensor: Any, torch: Any) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # which numpy knows only through ml_dtypes
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


class Writer(Protocol):
    """Puts tensors, in any order, into a file whose contents were announced."""

    def write(self, key: str, tensor: np.ndarray) -> None: ...

    def close(self) -> None: ...


Contents = Mapping[str, tuple[Shape, np.dtype]]


def create(path: Path, contents: Contents, nest: str | None = None) -> Writer:
    """A file for tensors of these shapes and dtypes: safetensors, or torch's format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        return SafetensorsWriter(path, contents)
    return TorchWriter(path, contents, nest)


class SafetensorsWriter:
    """The header first; then each tensor at its place."""

    def __init__(self, path: Path, contents: Contents):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key, (shape, dtype) in contents.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[key] = {
                "dtype": _DTYPES[dtype][0], "shape": list(shape), "data_offsets": [start, end],
            }  # fmt: skip
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._start = 8 + len(encoded)
        self._header, self._left = header, set(contents)
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(encoded)) + encoded)
        self._file.truncate(self._start + end)

    def write(self, key: str, tensor: np.ndarray) -> None:
        self._left.remove(key)
        entry = self._header[key]
        _check(key, tensor, tuple(entry["shape"]), _SAFETENSORS[entry["dtype"]])
        self._file.seek(self._start + entry["data_offsets"][0])
        self._file.write(_bytes(tensor))

    def close(self) -> None:
        self._file.close()
        if self._left:
            raise AssertionError(f"{sorted(self._left)} were never written")


class TorchWriter:
    """torch's zip archive: a record per storage as it comes, the pickle that names them last.

    `torch.save` wants all tensors at once; this is the same file, tensor by tensor.
    """

    def __init__(self, path: Path, contents: Contents, nest: str | None = None):
        self._torch = torch_or_explain(path)  # now, not after hours of writing
        self._contents, self._nest = dict(contents), nest
        self._numbers = {key: i for i, key in enumerate(contents)}
        self._left = set(contents)
        self._root = path.stem
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)

    def write(self, key: str, tensor: np.ndarray) -> None:
        self._left.remove(key)
        _check(key, tensor, *self._contents[key])
        self._record(f"data/{self._numbers[key]}", _bytes(tensor))

    def close(self) -> None:
        if self._left:
            self._zip.close()
            raise AssertionError(f"{sorted(self._left)} were never written")
        self._record("data.pkl", self._pickle())
        self._record("byteorder", b"little")
        self._record("version", b"3\n")
        self._zip.close()

    def _record(self, name: str, data: bytes | memoryview) -> None:
        info = zipfile.ZipInfo(f"{self._root}/{name}", (1980, 1, 1, 0, 0, 0))
        info.file_size = len(data)
        large = len(data) * 1.05 > zipfile.ZIP64_LIMIT
        # torch maps storages straight from the file: pad the header so that they are aligned.
        header = 30 + len(info.filename.encode()) + (20 if large else 0)
        padding = -(self._zip.start_dir + header + 4) % 64
        info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        with self._zip.open(info, "w", force_zip64=large) as f:
            for start in range(0, len(data), 1 << 24):
                f.write(data[start : start + (1 << 24)])

    def _pickle(self) -> bytes:
        torch, tensors = self._torch, {}
        for key, (shape, dtype) in self._contents.items():
            kind = getattr(torch, _DTYPES[dtype][2])
            storage = _Storage(kind, str(self._numbers[key]), math.prod(shape))
            tensors[key] = _TensorIn(storage, shape, torch._utils._rebuild_tensor_v2)
        buffer = io.BytesIO()
        pickler = _Pickler(buffer, protocol=2)
        pickler.dump({self._nest: tensors} if self._nest else tensors)
        return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class _Storage:
    kind: type
    key: str
    length: int


@dataclasses.dataclass(frozen=True)
class _TensorIn:
    """Pickles as a contiguous torch tensor in a storage of the archive."""

    storage: _Storage
    shape: Shape
    rebuild: Callable[..., Any]

    def __reduce__(self):
        strides = tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        hooks: collections.OrderedDict = collections.OrderedDict()
        return self.rebuild, (self.storage, 0, self.shape, strides, False, hooks)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return ("storage", obj.kind, obj.key, "cpu", obj.length)
        return None


def _check(key: str, tensor: np.ndarray, shape: Shape, dtype: np.dtype) -> None:
    if tensor.shape != tuple(shape) or tensor.dtype != dtype:
        raise AssertionError(f"{key} is {tensor.dtype}{tensor.shape}, announced {dtype}{shape}")


def _bytes(tensor: np.ndarray) -> memoryview:
    if not tensor.flags.c_contiguous:
        view, tensor = tensor, np.empty(tensor.shape, tensor.dtype)
        copy_into(tensor, view)
    return tensor.reshape(-1).view(np.uint8).data


def copy_into(out: np.ndarray, x: np.ndarray, block: int = 256) -> None:
    """out[...] = x, by blocks where x is transposed: three times faster than numpy's own, whose
    every access would miss the cache."""
    if out.dtype == x.dtype == ml_dtypes.bfloat16:  # numpy copies integers faster
        out, x = out.view(np.uint16), x.view(np.uint16)
    if x.ndim != 2 or x.strides[0] >= x.strides[1]:
        out[...] = x
        return
    for i in range(0, x.shape[0], block):
        for j in range(0, x.shape[1], block):
            out[i : i + block, j : j + block] = x[i : i + block, j : j + block]


def write_shards(folder: Path, stem: str, contents: Contents, limit: int = 5 * 2**30) -> Shards:
    """A folder of safetensors as transformers and peft read it: one file, or shards of at most
    `limit` bytes with their index."""
    groups: list[list[str]] = [[]]
    size = 0
    for key, (shape, dtype) in contents.items():
        length = math.prod(shape) * dtype.itemsize
        if groups[-1] and size + length > limit:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size += length
    names = [f"{stem}.safetensors"]
    if len(groups) > 1:
        names = [f"{stem}-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
        total = sum(math.prod(s) * d.itemsize for s, d in contents.values())
        places = {key: name for name, keys in zip(names, groups, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return Shards(
        {n: {k: contents[k] for k in keys} for n, keys in zip(names, groups, strict=True)}, folder
    )


class Shards:
    """Several files written as one.

    Args:
        contents: what each file, relative to `folder`, holds. A key's `unet:` or `vae:`
            tells files apart and is not written.
        nests: under which name a file nests its state dict.
    """

    def __init__(
        self, contents: Mapping[str, Contents], folder: Path,
        nests: Mapping[str, str | None] | None = None,
    ):  # fmt: skip
        nests = nests or {}
        self._writers = {
            name: create(folder / name, {_bare(k): v for k, v in c.items()}, nests.get(name))
            for name, c in contents.items()
        }
        self._places = {key: name for name, c in contents.items() for key in c}

    def write(self, key: str, tensor: np.ndarray) -> None:
        self._writers[self._places[key]].write(_bare(key), tensor)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


def _bare(key: str) -> str:
    return key.rsplit(":", 1)[-1]
