"""ArrayReader of a checkpoint, written and read a layer at a time.

Orbax saves and restores whole arrays, and a stacked parameter of a large model is several GiB.
Here each layer is written as its own chunks, each with a checksum, in orbax's layout (zarr3 in an
OCDBT database). Ordinary orbax readers can open them.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tensorstore as ts

from emu_jax import integrity
from emu_jax.convert.tensors import check_complete, check_shape, copy_into
from emu_jax.errors import UserError
from emu_jax.storage import kvstore

T = TypeVar("T")
_CHUNK = 2**26  # bytes of an array in one file
_GROUP = 2**26  # bytes committed together: they stay in memory until then, and a commit is slow


class ArrayWriter:
    """Writes an item of a checkpoint (DIR/<step>/params) layer by layer.

    Args:
        item: the directory to create.
        arrays: {dotted path: object with .shape and .dtype} of all arrays.
        stacked: the paths of arrays with a leading axis of layers.
    """

    def __init__(self, item: Path, arrays: Mapping[str, Any], stacked: set[str]) -> None:
        self._item, self._arrays, self._stacked = item, arrays, stacked
        self._left = {(p, i) for p in arrays for i in range(self._layers(p))}
        item.mkdir(parents=True)
        context = ts.Context()
        created = ts.Transaction()
        opened = [
            ts.open(self._spec(path), create=True, transaction=created, context=context)
            for path in arrays
        ]
        self._stores = dict(
            zip(arrays, [self._run(future.result) for future in opened], strict=True)
        )
        self._run(created.commit_sync)
        self._stores = {p: store.with_transaction(None) for p, store in self._stores.items()}
        self._group = ts.Transaction()  # chunks that are committed together
        self._writes: list[ts.WriteFutures] = []
        self._size = 0  # bytes in the group
        self._committed: ts.Future[None] | None = None  # the group before it

    def _layers(self, path: str) -> int:
        return self._arrays[path].shape[0] if path in self._stacked else 1

    def _chunk(self, path: str) -> list[int]:
        """Returns the shape of a chunk: one layer, cut along its first axis if it is large."""
        shape = list(self._arrays[path].shape)
        axis = 0
        if path in self._stacked:
            shape[0], axis = 1, 1
        size = math.prod(shape) * np.dtype(self._arrays[path].dtype).itemsize
        if axis < len(shape) and size > _CHUNK:
            shape[axis] = -(-shape[axis] // -(-size // _CHUNK))
        return shape

    def write(self, path: str, layer: int, array: np.ndarray) -> None:
        """Writes one layer of a stacked array, or (as layer 0) the whole of another.

        It is cast to the declared dtype. `array` may be a view of a mapped file.

        Raises:
            UserError: writing failed.
        """
        self._left.remove((path, layer))
        target = self._arrays[path]
        dtype = np.dtype(target.dtype)
        stacked = path in self._stacked
        check_shape(path, array, tuple(target.shape[1:] if stacked else target.shape))
        store = self._stores[path].with_transaction(self._group)
        if stacked:
            store = store[layer]
        rows = self._chunk(path)[1 if stacked else 0] if array.ndim else 0
        for start in range(0, len(array), rows) if array.ndim else [None]:
            index = ... if start is None else slice(start, min(start + rows, len(array)))
            part = array[index]
            out = np.empty(part.shape, dtype)
            copy_into(out, part)
            future = store[index].write(out, can_reference_source_data_indefinitely=True)
            self._writes.append(future)
            self._size += out.nbytes
            if self._size >= _GROUP:
                self._commit()
                store = self._stores[path].with_transaction(self._group)
                if stacked:
                    store = store[layer]

    def _commit(self) -> None:
        """Starts committing the group, after the previous one is on disk. The next one can fill
        meanwhile."""
        for future in self._writes:
            self._run(future.copy.result)
        if self._committed is not None:
            self._run(self._committed.result)
        self._committed = self._group.commit_async()
        self._group, self._writes, self._size = ts.Transaction(), [], 0

    def _spec(self, path: str) -> dict[str, Any]:
        array = self._arrays[path]
        chunk = self._chunk(path)
        return {
            "driver": "zarr3",
            "kvstore": _database(self._item, path)
            | {
                # Data stay in memory until they fill a file of this size.
                "target_data_file_size": _CHUNK,
            },
            "metadata": {
                "shape": list(array.shape),
                "data_type": np.dtype(array.dtype).name,
                "fill_value": 0.0,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
                "codecs": [
                    {"name": "bytes", "configuration": {"endian": "little"}},
                    {"name": "crc32c"},
                ],
            },
            "store_data_equal_to_fill_value": True,  # a missing file is damage, not zeros
        }

    def _run(self, action: Callable[[], T]) -> T:
        """Calls a function of tensorstore.

        Raises:
            UserError: it failed.
        """
        try:
            return action()
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(f"cannot write {self._item}: {integrity.one_line(error)}") from None

    def close(self) -> None:
        """Waits until everything is on disk, then writes orbax's metadata."""
        self._commit()
        if self._committed is not None:
            self._run(self._committed.result)
        check_complete(self._item, (f"{path} (layer {layer})" for path, layer in self._left))
        tree, metadata = {}, []
        for path, array in self._arrays.items():
            keys = path.split(".")
            shape, chunk = list(array.shape), self._chunk(path)
            tree[str(tuple(keys))] = {
                "key_metadata": [{"key": key, "key_type": 2} for key in keys],
                "value_metadata": {
                    "value_type": "np.ndarray",
                    "skip_deserialize": False,
                    "write_shape": shape,
                },
            }
            metadata.append(
                {
                    "array_metadata": {
                        "param_name": path,
                        "write_shape": shape,
                        "chunk_shape": chunk,
                        "ext_metadata": None,
                    }
                }
            )
        description = {
            "tree_metadata": tree,
            "use_ocdbt": True,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        (self._item / "_METADATA").write_text(json.dumps(description))
        (self._item / "array_metadatas").mkdir()
        (self._item / "array_metadatas" / "process_0").write_text(
            json.dumps({"array_metadatas": metadata})
        )


class ArrayReader:
    """The arrays of a checkpoint item that orbax or `ArrayWriter` wrote.

    An array whose chunks span several layers is first reordered into a temporary file, chunk by
    chunk: otherwise each chunk would be decoded again for every layer.

    Args:
        scratch: a directory for temporary files.
    """

    def __init__(self, item: Path, scratch: Path) -> None:
        self._item, self._scratch = item.absolute(), scratch
        try:
            metadata = json.loads((self._item / "_METADATA").read_text())
            self._zarr3 = bool(metadata.get("use_zarr3"))
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"cannot read the checkpoint {item}: {integrity.one_line(error)}"
            ) from None
        self._ocdbt = (self._item / "manifest.ocdbt").is_file()
        self._context = ts.Context()
        self._last: tuple[str, Any] = ("", None)

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """Reads a layer of a stacked array, or all of an array.

        Raises:
            UserError: the array is missing or damaged.
        """
        try:
            if layer is None:
                return self._open(path).read().result()
            if self._last[0] != path:
                self._last = ("", None)  # frees the previous array
                self._last = path, self._by_layers(path)
            stored = self._last[1][layer]
            return stored if isinstance(stored, np.ndarray) else stored.read().result()
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"cannot read {path} from the checkpoint {self._item}: {integrity.one_line(error)}"
            ) from None

    def _open(self, path: str) -> Any:  # a tensorstore of known shape, which its stubs cannot say
        spec = {
            "driver": "zarr3" if self._zarr3 else "zarr",
            "kvstore": _database(self._item, path) if self._ocdbt else kvstore(self._item / path),
            "fill_missing_data_reads": False,
            "recheck_cached_data": False,
        }
        return ts.open(spec, read=True, context=self._context).result()

    def _by_layers(self, path: str) -> Any:
        """Opens a stacked array so that reading a layer touches only its own bytes."""
        store = self._open(path)
        chunk = store.chunk_layout.read_chunk.shape
        if chunk[0] == 1:
            return store
        dtype = store.dtype.numpy_dtype
        if math.prod(store.shape) * dtype.itemsize <= _CHUNK:
            return store.read().result()
        with tempfile.TemporaryFile(dir=self._scratch) as f:
            length = math.prod(store.shape) * dtype.itemsize
            # Allocate now: a full disk is then an error here, not a SIGBUS later.
            os.posix_fallocate(f.fileno(), 0, length)
            ordered = np.memmap(f, np.uint8, "r+", shape=(length,)).view(dtype).reshape(store.shape)
        starts = [range(0, n, c) for n, c in zip(store.shape, chunk, strict=True)]
        for at in itertools.product(*starts):
            index = tuple(
                slice(a, min(a + c, n)) for a, c, n in zip(at, chunk, store.shape, strict=True)
            )
            ordered[index] = store[index].read().result()
        return ordered


def _database(item: Path, path: str) -> dict[str, Any]:
    """Returns the kvstore specification of one array in an item's OCDBT database."""
    return {"driver": "ocdbt", "base": kvstore(item), "path": f"{path}/"}
