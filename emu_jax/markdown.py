"""Markdown that programs write: tables, and the regions of a page that hold them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def row(cells: Sequence[str]) -> str:
    """Formats one row of a table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a table, without a line break at its end."""
    return "\n".join(map(row, [head, ["---"] * len(head), *rows]))


def region_markers(region: str) -> tuple[str, str]:
    """Returns the two comments around a region: `<!-- bench floors -->` and `<!-- /bench -->` for
    the region `bench floors`. Each must be a line of its own."""
    return f"<!-- {region} -->", f"<!-- /{region.split()[0]} -->"


def has_region(page: str, region: str) -> bool:
    """Returns whether a page has both comments of a region."""
    return _pattern(region).search(page) is not None


def replace_region(page: str, region: str, text: str) -> str:
    """Returns the page with `text` between the comments of a region.

    Raises:
        ValueError: the page does not have the region.
    """
    if not has_region(page, region):
        raise ValueError(f"no lines {' and '.join(region_markers(region))}")
    begin, end = region_markers(region)
    return _pattern(region).sub(lambda _: f"{begin}\n{text.rstrip()}\n{end}", page)


def _pattern(region: str) -> re.Pattern[str]:
    begin, end = map(re.escape, region_markers(region))
    return re.compile(f"^{begin}\n(?s:.*?)^{end}$", re.MULTILINE)
