"""Self-contained HTML pages.

Images are inline PNG or JPEG, and styles are inline CSS. A page has no scripts and fetches nothing.
It follows the reader's light or dark setting.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from emu_jax.storage import write_text

ImageLike = np.ndarray | Image.Image  # uint8 [h, w, 3] or [h, w], or PIL


def write_page(path: Path, title: str, sections: list[str], style: str = "") -> None:
    """Writes a page of HTML sections atomically. `style` is CSS added to that of all pages."""
    page = _PAGE.format(title=html.escape(title), style=_STYLE + style, body="\n".join(sections))
    write_text(path, page)


def tiles(values: Mapping[str, str]) -> str:
    """Formats {name: figure} as large tiles."""
    shown = "".join(
        f'<div class="tile"><b>{html.escape(value)}</b><span>{words(name)}</span></div>'
        for name, value in values.items()
    )
    return f'<div class="tiles">{shown}</div>'


def html_table(values: Mapping[str, object]) -> str:
    """Formats {name: figure} as a table with one row each."""
    rows = "".join(
        f"<tr><th scope=row>{words(k)}</th><td>{html.escape(number(v))}</td></tr>"
        for k, v in values.items()
    )
    return f"<table>{rows}</table>"


def details(title: str, values: Mapping[str, object] | None) -> str:
    """Formats values as JSON in a collapsed section. Returns "" if there are none."""
    if not values:
        return ""
    text = html.escape(json.dumps(values, indent=2, default=str))
    return f"<details><summary>{title}</summary><pre>{text}</pre></details>"


def image(pixels: ImageLike, *, lossy: bool = False) -> str:
    """Formats an inline image: PNG, or JPEG if `lossy`, for pages with many photographs.

    Raises:
        TypeError: an array is not uint8.
    """
    if not isinstance(pixels, Image.Image):
        pixels = np.asarray(pixels)
        if pixels.dtype != np.uint8:
            raise TypeError(f"an image must be uint8, not {pixels.dtype}")
        pixels = Image.fromarray(pixels)
    buffer = io.BytesIO()
    kind = "jpeg" if lossy else "png"
    pixels.save(buffer, format=kind, optimize=True, quality=88)
    return _embedded(buffer.getvalue(), kind, pixels.size)


def image_file(path: Path, alt: str) -> str:
    """Formats a PNG file as an inline image, without encoding it again.

    Args:
        alt: a description of the image for readers who cannot see it.
    """
    content = path.read_bytes()
    with Image.open(io.BytesIO(content), formats=("PNG",)) as opened:
        return _embedded(content, "png", opened.size, alt)


def _embedded(content: bytes, kind: str, size: tuple[int, int], alt: str = "") -> str:
    data = base64.b64encode(content).decode("ascii")
    width, height = size
    return (
        f'<img alt="{html.escape(alt)}" width={width} height={height} '
        f'src="data:image/{kind};base64,{data}">'
    )


def words(name: str) -> str:
    """Formats an identifier for display, with spaces in place of underscores."""
    return html.escape(name.replace("_", " "))


def number(value: object) -> str:
    """Formats a figure for display."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {number(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(number, value))
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if type(value) is int else str(value)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f7f7f5; --card: #ffffff; --ink: #1d2126; --soft: #666d76; --rule: #e2e3e0;
  --right: #1a7f4b; --wrong: #c6372c;
  --line-0: #2563b8; --line-1: #2563b8; --line-2: #b45309; --line-3: #1a7f4b; --line-4: #7c3aa8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1d2125; --ink: #e6e8ea; --soft: #9aa2ab; --rule: #31373d;
    --right: #4cc38a; --wrong: #ff7d6e;
    --line-0: #6ea8fe; --line-1: #6ea8fe; --line-2: #f0a35e; --line-3: #4cc38a; --line-4: #c39bf0;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1.25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .4rem; }
h3 { font-size: .95rem; margin: 1.25rem 0 .5rem; }
h4 { font-size: .8rem; font-weight: 600; margin: 0; }
p { margin: 0 0 .9rem; color: var(--soft); }
figure { margin: 0; }
img { display: block; image-rendering: pixelated; }
figcaption { font-size: .8rem; line-height: 1.3; color: var(--soft); }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; }
.tile { flex: 1 1 10rem; background: var(--card); border: 1px solid var(--rule);
  border-radius: .5rem; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.7rem; line-height: 1.2;
  font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
table { border-collapse: collapse; width: 100%; max-width: 36rem; }
th, td { text-align: left; font-weight: normal; padding: .3rem 0;
  border-bottom: 1px solid var(--rule); overflow-wrap: anywhere; }
td { text-align: right; padding-left: 1.5rem; font-variant-numeric: tabular-nums; }
details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--soft); margin-bottom: .6rem; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem;
  padding: .8rem; overflow-x: auto; font-size: .8rem; }
"""
