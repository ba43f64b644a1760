"""Rows of Parquet files, decoded a row group at a time."""

from __future__ import annotations

import collections
import functools
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np

from emu_jax.data import storage
from emu_jax.data.documents import Damaged
from emu_jax.data.sources.index import Arrays
from emu_jax.errors import UserError, first_line

_DECODED = 1 << 28  # bytes of decoded row groups that a source holds at most, but at least one
_FOOTERS = 128  # files whose footers a source holds
_Key = tuple[str, int]  # (file, row group)


def rows_in(path: str) -> Arrays:
    """Returns the row group (`offset`) and the row in it (`size`) of each row of a file, as an
    index of a listing. Reads the footer alone.

    Raises:
        UserError: the file is damaged.
    """
    footer = _footer(path)
    counts = [footer.row_group(n).num_rows for n in range(footer.num_row_groups)]
    rows = [np.arange(count) for count in counts]
    return {
        "offset": np.repeat(np.arange(len(counts)), counts),
        "size": np.concatenate(rows) if rows else np.zeros(0, np.int64),
        "number": np.arange(sum(counts)),
    }


def columns_in(path: str, names: Collection[str]) -> Iterator[dict[str, list[Any]]]:
    """Yields some columns of each row group; a column that the file lacks is left out.

    Raises:
        UserError: the file is damaged.
    """
    footer = _footer(path)
    known = [name for name in footer.schema.to_arrow_schema().names if name in names]
    try:
        for number in range(footer.num_row_groups):
            yield _group(path, footer, number, known).to_pydict()
    except (OSError, ValueError) as error:
        raise _broken(path, error) from None


class ParquetRows:
    """Rows of Parquet files. Safe for threads.

    The row groups that were used last stay in memory, decoded, up to `_DECODED` bytes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: collections.OrderedDict[_Key, Future[Any]] = collections.OrderedDict()
        self._footer = functools.lru_cache(_FOOTERS)(_footer)

    def read(self, path: str, group: int, row: int, where: str) -> dict[str, Any]:
        """Reads a row: its columns that are not null.

        Raises:
            Damaged: its row group is damaged.
            UserError: the file cannot be read.
        """
        try:
            table = self._table(path, group)
            (values,) = table.slice(row, 1).to_pylist()
        except UserError:
            raise
        except (FileNotFoundError, PermissionError) as error:
            raise UserError(
                f"{path} cannot be read ({first_line(error)}): restore it, or allow reading it"
            ) from None
        except (OSError, ValueError) as error:  # pyarrow's errors are among them
            raise Damaged("damaged record", where, first_line(error)) from None
        return {name: value for name, value in values.items() if value is not None}

    def _table(self, path: str, group: int) -> Any:
        key = path, group
        with self._lock:
            first = key not in self._groups
            table = self._groups.setdefault(key, Future())
            self._groups.move_to_end(key)
        if first:
            try:
                table.set_result(_group(path, self._footer(path), group))
            except BaseException as error:
                table.set_exception(error)
            self._evict(key if table.exception() else None)
        return table.result()

    def _evict(self, failed: _Key | None) -> None:
        """Drops the groups that were used longest ago. A failed one is read again next time."""
        with self._lock:
            if failed is not None:
                self._groups.pop(failed, None)
            tables = [(key, f.result()) for key, f in self._groups.items() if _is_read(f)]
            total = sum(table.nbytes for _, table in tables)
            for key, table in tables[:-1]:
                if total <= _DECODED:
                    break
                del self._groups[key]
                total -= table.nbytes


def _is_read(table: Future[Any]) -> bool:
    return table.done() and table.exception() is None


def _footer(path: str) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(storage.RangeFile(path))
    except (FileNotFoundError, PermissionError):
        raise
    except (OSError, ValueError) as error:
        raise _broken(path, error) from None


def _group(path: str, footer: Any, number: int, columns: list[str] | None = None) -> Any:
    import pyarrow.parquet

    # A reader of its own for each call, because a reader is not safe for threads.
    with pyarrow.parquet.ParquetFile(
        storage.RangeFile(path), metadata=footer, pre_buffer=True
    ) as file:
        return file.read_row_group(number, columns=columns, use_threads=False)


def _broken(path: str, error: Exception) -> UserError:
    return UserError(
        f"{path} is cut short or not a Parquet file ({first_line(error)}): download it again"
    )
