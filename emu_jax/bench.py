"""`emu-jax bench`: runs what stands in benchmarks/.

A benchmark is a Python file there: its docstring says what is measured and how, and its
`run() -> dict` measures it and returns figures of plain JSON types. Its progress goes to the
`emu_jax` logger.
"""

from __future__ import annotations

import ast
import os
import platform
import runpy
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from emu_jax.config import UserError, shipped, suggest


def benchmarks() -> dict[str, Path]:
    """Name to file, in the order of their names.

    Raises:
        UserError: the folder is missing.
    """
    return {p.stem: p for p in sorted(shipped("benchmarks").glob("*.py"))}


def about(path: Path) -> str:
    """The first line of a benchmark's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def run(names: Sequence[str] = ()) -> dict[str, Any]:
    """Runs the named benchmarks, or all: each one's figures by its name, and the machine's.

    Raises:
        UserError: there is no such benchmark.
    """
    known = benchmarks()
    for name in names:
        if name not in known:
            raise UserError(f"no benchmark {name!r}{suggest(name, known)}")
    figures = {name: runpy.run_path(str(known[name]))["run"]() for name in names or known}
    return figures | {"machine": _machine()}


def table(figures: dict[str, Any]) -> str:
    """What `run` returned, a figure a line."""
    rows = list(_rows(figures))
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _rows(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _rows(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", f"{value:.4g}" if isinstance(value, float) else str(value)


def _machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "numpy", "pillow")},
    }
