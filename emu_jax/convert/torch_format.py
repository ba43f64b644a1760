"""Reads and writes torch's `.bin` and `.pt` files one tensor at a time, without torch.

An unpickler that can only describe tensors parses them. It never runs code that a file names.
"""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from emu_jax.convert.tensors import (
    DTYPE_NAMES,
    TORCH_DTYPES,
    Contents,
    MappedFile,
    Shape,
    Tensor,
    blocks,
    check_complete,
    check_shape,
)
from emu_jax.errors import UserError

TORCH_SUFFIXES = (".pt", ".bin", ".pth")
# torch's storage classes and the names of their dtypes. None: the tensor names its dtype.
_STORAGES: dict[str, str | None] = {names[2]: names[1] for names in DTYPE_NAMES.values()} | {
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "UntypedStorage": None,
}

# A state dict may lie inside another dict, under one of these names.
_WRAPPER_KEYS = ("module", "state_dict", "model")
_MAGIC = 0x1950A86A20F9469CFC6C  # the first value in torch's format before 1.6


def torch_or_explain(path: Path) -> Any:
    """Imports torch for a file that only torch can open.

    Raises:
        UserError: torch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} is torch's format: install torch (pip install 'emu_jax[torch]')"
        ) from None
    return torch


# --- Reading torch's format ------------------------------------------------------------------


class _Storage(NamedTuple):
    """A run of numbers in a torch file. `offset` is in elements from its record's start."""

    dtype: str | None
    key: str
    length: int
    offset: int = 0


class _Described(NamedTuple):
    """A tensor as its pickle describes it. `offset` and `strides` count elements."""

    storage: _Storage
    dtype: str
    offset: int
    shape: Shape
    strides: tuple[int, ...]


class _Dtype(NamedTuple):
    name: str | None


class _Refused(Exception):
    """A pickle names something that is not a tensor."""


def _describe(
    storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any, dtype: str | None = None
) -> _Described:
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without a storage")
    dtype = dtype or storage.dtype
    if dtype is None:
        raise ValueError("a tensor without a dtype")
    shape, strides = tuple(shape), tuple(strides)
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"a tensor of shape {shape} with strides {strides}")
    return _Described(storage, dtype, offset, shape, strides)


def _describe_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> _Described:
    name = dtype.name if isinstance(dtype, _Dtype) else None
    return _describe(storage, offset, shape, strides, dtype=name)


def _parameter(data: Any, *_: Any) -> Any:
    return data


# The callables that a pickle may name, and what is called instead.
_CALLS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): lambda *pairs: dict(*pairs),
    ("torch._utils", "_rebuild_tensor"): _describe,
    ("torch._utils", "_rebuild_tensor_v2"): _describe,
    ("torch._utils", "_rebuild_tensor_v3"): _describe_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch", "Size"): lambda *sizes: tuple(*sizes),
    ("torch", "device"): lambda *names: ":".join(map(str, names)),
}
# The opcodes that data needs. All others are refused without being executed.
_OPCODES = b"".join(
    getattr(pickle, name)
    for name in (
        "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 "
        "LONG LONG1 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
        "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 TUPLE EMPTY_TUPLE TUPLE1 "
        "TUPLE2 TUPLE3 LIST EMPTY_LIST APPEND APPENDS DICT EMPTY_DICT SETITEM SETITEMS GLOBAL "
        "STACK_GLOBAL REDUCE BUILD PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET BINPERSID"
    ).split()
)


def _build(unpickler: Any) -> None:
    """Drops the attributes of a dict, such as a state dict's `_metadata`."""
    unpickler.stack.pop()
    if not isinstance(unpickler.stack[-1], dict):
        raise _Refused("attributes of an object")


class _Opcodes(dict):
    def __missing__(self, code: int) -> Any:
        raise _Refused(f"opcode {code:#x}")


class _Unpickler(pickle._Unpickler):
    """Describes the tensors of a pickle of any protocol.

    Derives from the pure-Python unpickler because its opcode table can be restricted.
    """

    dispatch = _Opcodes({code: pickle._Unpickler.dispatch[code] for code in _OPCODES})
    dispatch[pickle.BUILD[0]] = _build

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, str | None] = {}  # the dtype of each

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CALLS:
            return _CALLS[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _Dtype(_STORAGES[name])
        if module == "torch" and re.fullmatch(r"q?u?(int|float|bfloat|complex|bool)[\w]*", name):
            return _Dtype(name)
        raise _Refused(f"{module}.{name}"[:200])

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, device, length, *view = pid
        if kind != "storage" or not isinstance(dtype, _Dtype) or type(length) is not int:
            raise ValueError(f"a storage called {kind!r}")
        if device == "meta":
            raise _Refused("tensors without data (on the meta device)")
        self.storages.setdefault(str(key), dtype.name)
        if not view or view[0] is None:
            return _Storage(dtype.name, str(key), length)
        _, offset, _ = view[0]
        return _Storage(dtype.name, str(key), length, int(offset))


def open_torch(path: Path) -> tuple[dict[str, Tensor], str | None]:
    mapped = MappedFile(path)
    if mapped.size == 0:
        raise UserError(f"{path} is damaged: it is empty")
    try:
        if zipfile.is_zipfile(path):
            stored, extents = _parse_zip(path, mapped)
        elif mapped.map[:2] == b"PK":
            raise UserError(f"{path} is truncated: its zip archive lacks the end")
        else:
            stored, extents = _parse_legacy(path, mapped)
        return _bind(path, mapped, stored, extents)
    except _Refused as error:
        raise UserError(
            f"{path} is refused: its pickle holds more than tensors ({error}): save the state "
            "dict alone"
        ) from None
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises anything: IndexError, AssertionError, ...
        reason = (str(error).strip().split("\n")[0] or type(error).__name__)[:200]
        if isinstance(error, KeyError):
            reason = f"{reason} is unknown"
        raise UserError(f"{path} is refused: it is truncated or damaged ({reason})") from None


# The extent of each storage: {key: (offset in bytes, length in bytes)}.
_Extents = dict[str, tuple[int, int]]


def _parse_zip(path: Path, mapped: MappedFile) -> tuple[Any, _Extents]:
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: record for record in archive.infolist()}
    pickles = [name for name in records if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise UserError(f"{path} is a zip archive but not torch's: it has no data.pkl")
    (root,) = (name.split("/")[0] for name in pickles)
    if f"{root}/constants.pkl" in records:
        raise UserError(f"{path} is a TorchScript program: save its state dict with torch.save")
    extents: _Extents = {}
    for name, record in records.items():
        if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
            raise UserError(
                f"{path} is a compressed archive, which torch never writes: load it with torch and "
                "save it again"
            )
        header = mapped.map[record.header_offset : record.header_offset + 30]
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise ValueError(f"no record at byte {record.header_offset}")
        lengths = struct.unpack("<HH", header[26:])
        start = record.header_offset + 30 + sum(lengths)
        if start + record.file_size > mapped.size:
            raise ValueError(f"{name} extends past the end of the file")
        extents[name] = (start, record.file_size)

    def content(name: str) -> bytes:
        start, length = extents[name]
        return bytes(mapped.map[start : start + length])

    if (order := f"{root}/byteorder") in extents and content(order).strip() != b"little":
        raise UserError(f"{path} was written on a big-endian machine: save it on another")
    stored = _Unpickler(io.BytesIO(content(f"{root}/data.pkl"))).load()
    prefix = f"{root}/data/"
    return stored, {n.removeprefix(prefix): p for n, p in extents.items() if n.startswith(prefix)}


def _parse_legacy(path: Path, mapped: MappedFile) -> tuple[Any, _Extents]:
    """Parses the format before torch 1.6.

    It holds pickles of a magic number, the version, the machine, the object and the storages'
    keys, then the storages, each preceded by its length.
    """
    file = mapped.map
    if bytes(file[257:262]) == b"ustar":
        raise UserError(f"{path} is a tar archive (torch before 0.2): save it with a newer torch")
    assert isinstance(file, mmap.mmap)
    if _Unpickler(file).load() != _MAGIC:
        raise UserError(f"{path} is a pickle, but torch did not write it: save it with torch.save")
    _Unpickler(file).load()
    machine = _Unpickler(file).load()
    if isinstance(machine, dict) and machine.get("little_endian") is False:
        raise UserError(f"{path} was written on a big-endian machine: save it on another")
    unpickler = _Unpickler(file)
    stored = unpickler.load()
    extents: _Extents = {}
    keys = _Unpickler(file).load()
    at = file.tell()
    for key in map(str, keys):
        (length,) = struct.unpack("<q", file[at : at + 8])
        dtype = TORCH_DTYPES.get(str(unpickler.storages.get(key)))
        if dtype is None:
            raise UserError(f"{path}: storage {key} has an unsupported dtype")
        extents[key] = (at + 8, length * dtype.itemsize)
        at += 8 + length * dtype.itemsize
        if length < 0 or at > mapped.size:
            raise ValueError(f"storage {key} extends past the end of the file")
    return stored, extents


def _bind(
    path: Path, mapped: MappedFile, stored: Any, extents: _Extents
) -> tuple[dict[str, Tensor], str | None]:
    """Finds the bytes of the tensors that a pickle describes."""
    wrapper_key = None
    if isinstance(stored, dict):
        wrapper_key = next((n for n in _WRAPPER_KEYS if isinstance(stored.get(n), dict)), None)
        stored = stored[wrapper_key] if wrapper_key else stored
    if not isinstance(stored, dict) or not stored:
        what = "an empty dict" if isinstance(stored, dict) else _kind(stored)
        raise UserError(f"{path} holds {what}, expected a state dict")
    tensors = {}
    for key, value in stored.items():
        if not isinstance(value, _Described):
            raise UserError(f"{path}: {key} is {_kind(value)}, expected a tensor")
        dtype = TORCH_DTYPES.get(value.dtype)
        if dtype is None:
            raise UserError(f"{path}: {key} has the unsupported dtype {value.dtype}")
        if value.storage.key not in extents:
            raise ValueError(f"the data of {key} is missing")
        start, storage_bytes = extents[value.storage.key]
        stored_as = TORCH_DTYPES.get(str(value.storage.dtype))
        first = value.storage.offset * (stored_as.itemsize if stored_as else 1)
        first += value.offset * dtype.itemsize
        reach = 0
        if 0 not in value.shape:
            reach = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.strides, strict=True))
        if first < 0 or first + reach * dtype.itemsize > storage_bytes:
            raise ValueError(f"{key} {list(value.shape)} is larger than its storage")

        def read(
            start: int = start + first,
            dtype: np.dtype = dtype,
            reach: int = reach,
            value: Any = value,
        ) -> np.ndarray:
            if reach in (0, math.prod(value.shape)) and _is_contiguous(value):
                return mapped.array(start, dtype, value.shape)
            flat = mapped.array(start, dtype, (reach,))
            strides = [s * dtype.itemsize for s in value.strides]
            return np.lib.stride_tricks.as_strided(flat, value.shape, strides, writeable=False)

        tensors[str(key)] = Tensor(value.shape, dtype, read)
    return tensors, wrapper_key


def _is_contiguous(tensor: _Described) -> bool:
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _kind(value: Any) -> str:
    if isinstance(value, _Described):
        return "a tensor"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


# --- Writing ---------------------------------------------------------------------------------


class TorchWriter:
    """Writes torch's zip archive: one record per storage as it arrives, then the pickle.

    `torch.save` would need torch, and all tensors at once: to bound the memory, they would have to
    be mapped from a second copy on disk. This writes an equivalent file tensor by tensor.
    """

    def __init__(self, path: Path, contents: Contents, wrapper_key: str | None = None) -> None:
        self._contents, self._wrapper_key = dict(contents), wrapper_key
        self._numbers = {key: i for i, key in enumerate(contents)}
        self._left = set(contents)
        self._path, self._root = path, path.stem
        self._file = path.open("w+b")
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)

    def write(self, key: str, tensor: np.ndarray) -> None:
        self._left.remove(key)
        shape, dtype = self._contents[key]
        check_shape(key, tensor, shape)
        length = math.prod(shape) * dtype.itemsize
        self._record(f"data/{self._numbers[key]}", length, blocks(tensor, dtype))

    def close(self) -> None:
        try:
            check_complete(self._path, self._left)
        except ValueError:
            self.abort()
            raise
        for name, data in (
            ("data.pkl", self._pickle()),
            ("byteorder", b"little"),
            ("version", b"3\n"),
        ):
            self._record(name, len(data), [memoryview(data)])
        self._zip.close()
        self._file.close()

    def abort(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the disk may be full
            self._zip.close()
        self._file.close()

    def _record(self, name: str, length: int, data: Iterable[memoryview]) -> None:
        info = zipfile.ZipInfo(f"{self._root}/{name}", (1980, 1, 1, 0, 0, 0))
        info.file_size = length
        large = length * 1.05 > zipfile.ZIP64_LIMIT
        # torch maps storages straight from the file: pad the header to align them.
        header = 30 + len(info.filename.encode()) + (20 if large else 0)
        padding = -(self._zip.start_dir + header + 4) % 64
        info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        with self._zip.open(info, "w", force_zip64=large) as f:
            for block in data:
                f.write(block)

    def _pickle(self) -> bytes:
        """Pickles the state dict with protocol 2, as `torch.save` does."""
        out = io.BytesIO()

        def text(value: str) -> None:
            data = value.encode()
            out.write(pickle.BINUNICODE + struct.pack("<I", len(data)) + data)

        def number(value: int) -> None:
            data = value.to_bytes(8, "little", signed=True)
            out.write(pickle.LONG1 + bytes([len(data)]) + data)

        def numbers(values: Iterable[int]) -> None:
            out.write(pickle.MARK)
            for value in values:
                number(value)
            out.write(pickle.TUPLE)

        def call(module: str, name: str) -> None:
            out.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())

        out.write(pickle.PROTO + b"\x02" + pickle.EMPTY_DICT)
        if self._wrapper_key:
            text(self._wrapper_key)
            out.write(pickle.EMPTY_DICT)
        for key, (shape, dtype) in self._contents.items():
            text(key)
            call("torch._utils", "_rebuild_tensor_v2")
            out.write(pickle.MARK + pickle.MARK)
            text("storage")
            call("torch", DTYPE_NAMES[dtype][2])
            text(str(self._numbers[key]))
            text("cpu")
            number(math.prod(shape))
            out.write(pickle.TUPLE + pickle.BINPERSID)
            number(0)
            numbers(shape)
            numbers(math.prod(shape[i + 1 :]) for i in range(len(shape)))
            out.write(pickle.NEWFALSE)
            call("collections", "OrderedDict")
            out.write(pickle.EMPTY_TUPLE + pickle.REDUCE + pickle.TUPLE + pickle.REDUCE)
            out.write(pickle.SETITEM)
        out.write((pickle.SETITEM if self._wrapper_key else b"") + pickle.STOP)
        return out.getvalue()
