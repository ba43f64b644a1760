"""Reads and writes tensor files one tensor at a time.

Reading maps a file read-only: a tensor takes no memory until it is copied. Writing puts each
tensor in its place in the file, a block at a time. Neither needs torch: `.bin` and `.pt` files are
parsed by an unpickler that can only describe tensors and never runs code that a file names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import mmap
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from emu_jax.convert.tables import Shape
from emu_jax.errors import UserError
from emu_jax.filesystem import read_json_object, refuse_stand_in

# The name in safetensors, the name in torch, and torch's storage class.
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
_TORCH = {names[1]: dtype for dtype, names in _DTYPES.items()}
# torch's storage classes and the names of their dtypes. None: the tensor names its dtype.
_STORAGES: dict[str, str | None] = {names[2]: names[1] for names in _DTYPES.values()} | {
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "UntypedStorage": None,
}

# A state dict may lie inside another dict, under one of these names.
_NESTS = ("module", "state_dict", "model")
# File names of half-precision weights contain one of these. A folder may hold no others.
_VARIANTS = ("fp16", "bf16")
_INDEX = re.compile(r"\.index(\.\w+)?\.json$")
_BLOCK = 2**25  # bytes per write
_MAGIC = 0x1950A86A20F9469CFC6C  # the first value in torch's format before 1.6


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file. `read` returns a view of the mapped file; copy it to keep it."""

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def dtype_name(dtype: np.dtype) -> str:
    """Returns torch's name of a dtype."""
    return _DTYPES[np.dtype(dtype)][1]


def dtype_of(name: str) -> np.dtype:
    """Returns the dtype with this name in torch."""
    return _TORCH[name]


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
    tensors, nest = _open_torch(path)
    return {path.name: tensors}, nest


def _open_shards(index: Path) -> dict[str, dict[str, Tensor]]:
    try:
        places = {
            str(key): str(name) for key, name in read_json_object(index)["weight_map"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read the index of shards {index}: {error!r}") from None
    names = sorted(set(places.values()))
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(f"{index} names shards that are missing: {', '.join(missing)}")
    shards = {}
    for name in names:
        opened, _ = open_tensors(index.parent / name)
        if list(opened) != [Path(name).name]:
            raise UserError(f"{index} names {name}, which is another index, not a shard")
        shards[name] = opened[Path(name).name]
    if absent := [key for key, name in places.items() if key not in shards[name]]:
        raise UserError(f"{index} names tensors that its shards lack: {', '.join(sorted(absent))}")
    seen: dict[str, str] = {}
    for name, tensors in shards.items():
        for key in tensors:
            if key in seen:
                raise UserError(f"{index.parent}: {key} is in both {seen[key]} and {name}")
            seen[key] = name
    return shards


class _Mapped:
    """A file mapped read-only and shared.

    Linux may refuse a private writable mapping that is larger than memory.
    """

    def __init__(self, path: Path):
        self.size = path.stat().st_size
        with path.open("rb") as f:
            self.map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""

    def array(self, start: int, dtype: np.dtype, shape: Shape) -> np.ndarray:
        """Returns a contiguous tensor, and asks the system to read it ahead.

        A transposed copy touches the pages in an order that defeats automatic read-ahead.
        """
        count = math.prod(shape)
        if not count:
            return np.empty(shape, dtype)
        assert isinstance(self.map, mmap.mmap)
        if hasattr(mmap, "MADV_WILLNEED"):
            page = start - start % mmap.PAGESIZE
            length = min(start + count * dtype.itemsize, self.size) - page
            self.map.madvise(mmap.MADV_WILLNEED, page, length)
        data = np.frombuffer(self.map, np.uint8, count * dtype.itemsize, start)
        return data.view(dtype).reshape(shape)


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    held = path.stat().st_size - 8
    try:
        with path.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if length > held:
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
    mapped = _Mapped(path)
    held -= length
    tensors = {}
    for start, end, key, name, shape in sorted(entries):
        dtype = _SAFETENSORS.get(name)
        if dtype is None:
            raise UserError(f"{path}: {key} has the unsupported dtype {name}")
        size = math.prod(shape) * dtype.itemsize
        if end - start != size or start < 0 or min(shape, default=0) < 0:
            raise UserError(f"{path} is damaged: {key} {list(shape)} has {end - start} bytes")
        if end > held:
            raise UserError(f"{path} is truncated: {held} bytes of data, but {key} ends at {end}")

        def read(start=8 + length + start, dtype=dtype, shape=shape):
            return mapped.array(start, dtype, shape)

        tensors[key] = Tensor(shape, dtype, read)
    return tensors


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

    def __init__(self, file: Any):
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


def _open_torch(path: Path) -> tuple[dict[str, Tensor], str | None]:
    mapped = _Mapped(path)
    if mapped.size == 0:
        raise UserError(f"{path} is damaged: it is empty")
    try:
        if zipfile.is_zipfile(path):
            stored, places = _parse_zip(path, mapped)
        elif mapped.map[:2] == b"PK":
            raise UserError(f"{path} is truncated: its zip archive lacks the end")
        else:
            stored, places = _parse_legacy(path, mapped)
        return _bind(path, mapped, stored, places)
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


# The place of each storage: {key: (offset in bytes, length in bytes)}.
_Places = dict[str, tuple[int, int]]


def _parse_zip(path: Path, mapped: _Mapped) -> tuple[Any, _Places]:
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: record for record in archive.infolist()}
    pickles = [name for name in records if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise UserError(f"{path} is a zip archive but not torch's: it has no data.pkl")
    (root,) = (name.split("/")[0] for name in pickles)
    if f"{root}/constants.pkl" in records:
        raise UserError(f"{path} is a TorchScript program: save its state dict with torch.save")
    places: _Places = {}
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
        places[name] = (start, record.file_size)

    def content(name: str) -> bytes:
        start, length = places[name]
        return bytes(mapped.map[start : start + length])

    if (order := f"{root}/byteorder") in places and content(order).strip() != b"little":
        raise UserError(f"{path} was written on a big-endian machine: save it on another")
    stored = _Unpickler(io.BytesIO(content(f"{root}/data.pkl"))).load()
    prefix = f"{root}/data/"
    return stored, {n.removeprefix(prefix): p for n, p in places.items() if n.startswith(prefix)}


def _parse_legacy(path: Path, mapped: _Mapped) -> tuple[Any, _Places]:
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
    places: _Places = {}
    keys = _Unpickler(file).load()
    at = file.tell()
    for key in map(str, keys):
        (length,) = struct.unpack("<q", file[at : at + 8])
        dtype = _TORCH.get(str(unpickler.storages.get(key)))
        if dtype is None:
            raise UserError(f"{path}: storage {key} has an unsupported dtype")
        places[key] = (at + 8, length * dtype.itemsize)
        at += 8 + length * dtype.itemsize
        if length < 0 or at > mapped.size:
            raise ValueError(f"storage {key} extends past the end of the file")
    return stored, places


def _bind(
    path: Path, mapped: _Mapped, stored: Any, places: _Places
) -> tuple[dict[str, Tensor], str | None]:
    """Finds the bytes of the tensors that a pickle describes."""
    nest = None
    if isinstance(stored, dict):
        nest = next((n for n in _NESTS if isinstance(stored.get(n), dict)), None)
        stored = stored[nest] if nest else stored
    if not isinstance(stored, dict) or not stored:
        what = "an empty dict" if isinstance(stored, dict) else _kind(stored)
        raise UserError(f"{path} holds {what}, expected a state dict")
    tensors = {}
    for key, value in stored.items():
        if not isinstance(value, _Described):
            raise UserError(f"{path}: {key} is {_kind(value)}, expected a tensor")
        dtype = _TORCH.get(value.dtype)
        if dtype is None:
            raise UserError(f"{path}: {key} has the unsupported dtype {value.dtype}")
        if value.storage.key not in places:
            raise ValueError(f"the data of {key} is missing")
        start, held = places[value.storage.key]
        stored_as = _TORCH.get(str(value.storage.dtype))
        first = value.storage.offset * (stored_as.itemsize if stored_as else 1)
        first += value.offset * dtype.itemsize
        reach = 0
        if 0 not in value.shape:
            reach = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.strides, strict=True))
        if first < 0 or first + reach * dtype.itemsize > held:
            raise ValueError(f"{key} {list(value.shape)} is larger than its storage")

        def read(start=start + first, dtype=dtype, reach=reach, value=value):
            if reach in (0, math.prod(value.shape)) and _is_contiguous(value):
                return mapped.array(start, dtype, value.shape)
            flat = mapped.array(start, dtype, (reach,))
            strides = [s * dtype.itemsize for s in value.strides]
            return np.lib.stride_tricks.as_strided(flat, value.shape, strides, writeable=False)

        tensors[str(key)] = Tensor(value.shape, dtype, read)
    return tensors, nest


def _is_contiguous(tensor: _Described) -> bool:
    wanted = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size > 1 and stride != wanted:
            return False
        wanted *= size
    return True


def _kind(value: Any) -> str:
    if isinstance(value, _Described):
        return "a tensor"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


# --- Writing ---------------------------------------------------------------------------------


class Writer(Protocol):
    """Writes tensors, in any order, to a file whose contents were declared when it was created.

    Tensors are cast to the declared dtypes.
    """

    def write(self, key: str, tensor: np.ndarray) -> None: ...

    def close(self) -> None: ...

    def abort(self) -> None:
        """Closes the incomplete file."""
        ...


@contextlib.contextmanager
def finishing(writer: Writer) -> Iterator[None]:
    """Closes a writer on success and aborts it on failure."""
    try:
        yield
    except BaseException:
        writer.abort()
        raise
    writer.close()


Contents = Mapping[str, tuple[Shape, np.dtype]]


def create(path: Path, contents: Contents, nest: str | None = None) -> Writer:
    """Creates a file for tensors of these shapes and dtypes, in safetensors or torch's format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        return SafetensorsWriter(path, contents)
    return TorchWriter(path, contents, nest)


class SafetensorsWriter:
    """Writes the header first, then each tensor in its place."""

    def __init__(self, path: Path, contents: Contents):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key, (shape, dtype) in contents.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[key] = {
                "dtype": _DTYPES[dtype][0],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
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
        _check(key, tensor, tuple(entry["shape"]))
        self._file.seek(self._start + entry["data_offsets"][0])
        for block in blocks(tensor, _SAFETENSORS[entry["dtype"]]):
            self._file.write(block)

    def close(self) -> None:
        self._file.close()
        if self._left:
            raise AssertionError(f"{sorted(self._left)} were never written")

    def abort(self) -> None:
        self._file.close()


class TorchWriter:
    """Writes torch's zip archive: one record per storage as it arrives, then the pickle.

    `torch.save` needs all tensors at once. This writes an equivalent file tensor by tensor.
    """

    def __init__(self, path: Path, contents: Contents, nest: str | None = None):
        self._contents, self._nest = dict(contents), nest
        self._numbers = {key: i for i, key in enumerate(contents)}
        self._left = set(contents)
        self._root = path.stem
        self._file = path.open("w+b")
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)

    def write(self, key: str, tensor: np.ndarray) -> None:
        self._left.remove(key)
        shape, dtype = self._contents[key]
        _check(key, tensor, shape)
        length = math.prod(shape) * dtype.itemsize
        self._record(f"data/{self._numbers[key]}", length, blocks(tensor, dtype))

    def close(self) -> None:
        if self._left:
            self.abort()
            raise AssertionError(f"{sorted(self._left)} were never written")
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
        if self._nest:
            text(self._nest)
            out.write(pickle.EMPTY_DICT)
        for key, (shape, dtype) in self._contents.items():
            text(key)
            call("torch._utils", "_rebuild_tensor_v2")
            out.write(pickle.MARK + pickle.MARK)
            text("storage")
            call("torch", _DTYPES[dtype][2])
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
        out.write((pickle.SETITEM if self._nest else b"") + pickle.STOP)
        return out.getvalue()


def _check(key: str, tensor: np.ndarray, shape: Shape) -> None:
    if tensor.shape != tuple(shape):
        raise AssertionError(f"{key} is {tensor.shape}, announced {shape}")


def blocks(tensor: np.ndarray, dtype: np.dtype) -> Iterator[memoryview]:
    """Yields a tensor's bytes in C order, cast to `dtype`, in blocks of at most about 32 MiB."""
    limit = _BLOCK
    if tensor.ndim == 0:
        tensor = tensor.reshape(1)
    if tensor.flags.c_contiguous and tensor.dtype == dtype:
        data = tensor.reshape(-1).view(np.uint8)
        for start in range(0, len(data), limit):
            yield data[start : start + limit].data
        return
    row = math.prod(tensor.shape[1:]) * dtype.itemsize
    if row > limit and tensor.ndim > 1:
        for part in tensor:
            yield from blocks(part, dtype)
        return
    rows = max(1, limit // max(row, 1))
    for start in range(0, len(tensor), rows):
        part = tensor[start : start + rows]
        out = np.empty(part.shape, dtype)
        copy_into(out, part)
        yield out.reshape(-1).view(np.uint8).data


def copy_into(out: np.ndarray, x: np.ndarray, block: int = 256) -> None:
    """Copies x into out, block by block where x is transposed.

    This is three times faster than numpy's assignment, which misses the cache on every access.
    """
    if out.dtype == x.dtype == ml_dtypes.bfloat16:  # numpy copies integers faster
        out, x = out.view(np.uint16), x.view(np.uint16)
    if x.ndim != 2 or x.strides[0] >= x.strides[1]:
        out[...] = x
        return
    for i in range(0, x.shape[0], block):
        for j in range(0, x.shape[1], block):
            out[i : i + block, j : j + block] = x[i : i + block, j : j + block]


def write_shards(folder: Path, stem: str, contents: Contents, limit: int = 5 * 2**30) -> Shards:
    """Returns a writer for a folder of safetensors that transformers and peft can read.

    The folder holds one file, or shards of at most `limit` bytes with their index.
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
    """A writer for several files.

    Args:
        contents: the contents of each file, by its path relative to `folder`. The prefix `unet:`
            or `vae:` of a key only tells files apart and is not written.
        nests: {file: the name under which it nests its state dict}.
    """

    def __init__(
        self,
        contents: Mapping[str, Contents],
        folder: Path,
        nests: Mapping[str, str | None] | None = None,
    ):
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

    def abort(self) -> None:
        for writer in self._writers.values():
            writer.abort()


def _bare(key: str) -> str:
    return key.rsplit(":", 1)[-1]
