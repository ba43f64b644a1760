"""Reads the files of W&B's offline runs: records in the format of LevelDB's log."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER = 7  # bytes before the first record, counted in the first block
_BLOCK = 32 * 1024
_CHUNK = struct.Struct("<IHB")  # checksum, length, type
_FULL, _FIRST, _MIDDLE, _LAST = range(1, 5)


def records(path: Path) -> Iterator[Any]:
    """The records (`wandb_internal_pb2.Record`) of a file, up to one that is torn."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), _HEADER, b""
    while at + _CHUNK.size <= len(data):
        if _BLOCK - at % _BLOCK < _CHUNK.size:  # padding at the end of a block
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = _CHUNK.unpack_from(data, at)
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
            return
        whole += data[at + _CHUNK.size : at + _CHUNK.size + length]
        at += _CHUNK.size + length
        if kind in (_FULL, _LAST):
            yield Record.FromString(whole)
            whole = b""


def history(path: Path) -> list[dict[str, Any]]:
    """The logged rows of a file."""
    return [
        {
            item.key or ".".join(item.nested_key): json.loads(item.value_json)
            for item in r.history.item
        }
        for r in records(path)
        if r.WhichOneof("record_type") == "history"
    ]
