"""Tensors in files: their dtypes, views of mapped files, and copies in blocks of bounded size."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np

Shape = tuple[int, ...]
Contents = Mapping[str, tuple[Shape, np.dtype]]  # of a file: {key: (shape, dtype)}

# The name in safetensors, the name in torch, and torch's storage class.
DTYPE_NAMES: dict[np.dtype, tuple[str, str, str]] = {
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
SAFETENSORS_DTYPES = {names[0]: dtype for dtype, names in DTYPE_NAMES.items()}
TORCH_DTYPES = {names[1]: dtype for dtype, names in DTYPE_NAMES.items()}
# torch's storage classes and the names of their dtypes. None: the tensor names its dtype.

WRITE_BYTES = 2**25  # bytes per write


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file. `read` returns a view of the mapped file; copy it to keep it."""

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def dtype_name(dtype: np.dtype) -> str:
    """Returns torch's name of a dtype."""
    return DTYPE_NAMES[np.dtype(dtype)][1]


def dtype_of(name: str) -> np.dtype:
    """Returns the dtype with this name in torch. The inverse of `dtype_name`."""
    return TORCH_DTYPES[name]


class MappedFile:
    """A file mapped read-only and shared.

    Linux may refuse a private writable mapping that is larger than memory.
    """

    def __init__(self, path: Path) -> None:
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


class TensorWriter(Protocol):
    """Writes tensors, in any order, to a file whose contents were declared when it was created.

    Tensors are cast to the declared dtypes.
    """

    def write(self, key: str, tensor: np.ndarray) -> None: ...

    def close(self) -> None: ...

    def abort(self) -> None:
        """Closes the incomplete file."""
        ...


@contextlib.contextmanager
def finishing(writer: TensorWriter) -> Iterator[None]:
    """Closes a writer on success and aborts it on failure."""
    try:
        yield
    except BaseException:
        writer.abort()
        raise
    writer.close()


def check_shape(key: str, tensor: np.ndarray, shape: Shape) -> None:
    """Checks a tensor against the shape with which its file was created.

    Raises:
        ValueError: it has another shape.
    """
    if tensor.shape != tuple(shape):
        raise ValueError(f"{key} has shape {tensor.shape}, but the file declares {tuple(shape)}")


def check_complete(path: Path, missing: Iterable[str]) -> None:
    """Checks that everything was written to a file.

    Raises:
        ValueError: something is missing.
    """
    if missing := sorted(missing):
        raise ValueError(
            f"{path} is incomplete: {', '.join(missing)} was declared but not written: write every "
            "tensor before close()"
        )


def blocks(tensor: np.ndarray, dtype: np.dtype) -> Iterator[memoryview]:
    """Yields a tensor's bytes in C order, cast to `dtype`, in blocks of at most about 32 MiB."""
    limit = WRITE_BYTES
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
