"""Files of JSON lines, an object each, that a resumed run continues."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from emu_jax.errors import UserError
from emu_jax.storage import log_parts, open_log, read_log, write_text

Row = dict[str, Any]


class RowFile:
    """Appends rows to a file. Each row is written at once; to an object store, by `sync`."""

    def __init__(self, path: Path) -> None:
        self._file = open_log(path)

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one row, with null for floats that are not finite."""
        self._file.write(_line(row))

    def sync(self) -> None:
        """Makes the rows durable, so that they are there before the checkpoint is."""
        self._file.sync()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def is_step(value: object) -> bool:
    """Returns whether a value is a number of steps."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def filter_rows(path: Path, valid: Callable[[Row], bool], keep: Callable[[Row], bool]) -> None:
    """Rewrites a file with only the rows for which `keep` holds.

    Raises:
        UserError: a line is not JSON, or is not a row of this file.
    """
    for part in log_parts(path):  # one by one, so that a kill does no harm
        rows = [row for row in _rows(part, part.read_bytes(), valid) if keep(row)]
        write_text(part, "".join(map(_line, rows)))


def read_rows(path: Path, valid: Callable[[Row], bool]) -> list[Row]:
    """Reads the rows of a file.

    Raises:
        UserError: a line is not JSON, or is not a row of this file.
    """
    return _rows(path, read_log(path), valid)


def _rows(path: Path, content: bytes, valid: Callable[[Row], bool]) -> list[Row]:
    lines = content.splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number < len(lines):
                raise UserError(
                    f"{path}, line {number}: not JSON: fix or delete the line"
                ) from None
            break  # an incomplete last line: the process was killed while writing it
        if not isinstance(row, dict) or not valid(row):
            raise UserError(
                f"{path}, line {number}: not a row of this file: fix or delete the line"
            )
        rows.append(row)
    return rows


def _line(row: Mapping[str, Any]) -> str:
    """Returns one JSON line, with null for NaN and infinity, which JSON lacks."""
    return json.dumps(_finite(dict(row))) + "\n"


def _finite(value: Any) -> Any:
    """Returns a JSON value with None for floats that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
