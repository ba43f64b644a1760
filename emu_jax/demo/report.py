"""Self-contained HTML report of a training run (report.html).

Images are inline PNG, curves inline SVG and styles inline CSS. The page has no scripts and fetches
nothing. It follows the reader's light or dark setting.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emu_jax.page import Picture, details, image, table, tiles, words, write_page
from emu_jax.train.telemetry.metrics import series

# Metrics to plot, ordered by the first pattern that matches their name.
CURVES = (r"^loss$", r"loss", r"variance", r"rank", r"accuracy|retrieval", r"psnr")
OPEN_CAPTIONS = 60  # shown by default; the rest are folded


def write_report(
    path: Path,
    *,
    title: str,
    figures: Mapping[str, Any],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    captions: Sequence[tuple[Picture, str, bool]] = (),
    drawings: np.ndarray | Sequence[Sequence[Picture]] = (),
    continuations: Sequence[tuple[Sequence[Picture], Picture, bool, str]] = (),
    config: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
) -> None:
    """Writes the page atomically.

    Args:
        figures: metric name to value; all are listed in the table. Those named `*accuracy` are
            fractions of one and also head the page as percentages.
        curves: stage to its rows, as returned by `train.telemetry.metrics.read_metrics`.
        captions: (image, generated caption, whether it is correct).
        drawings: uint8 [rows, columns, h, w, 3] or [rows, columns, h, w]; row i holds the images
            generated for the i-th prompt.
        continuations: (given frames, generated frame, whether it is correct, caption).
    """
    sections = [
        _figures(figures),
        _captions(captions),
        _drawings(drawings),
        _continuations(continuations),
        _curves(curves),
        details("Configuration", config),
        details("Versions", versions),
    ]
    write_page(path, title, sections, _STYLE)


def _figures(figures: Mapping[str, Any]) -> str:
    shares = {k: f"{100 * v:.1f}%" for k, v in figures.items() if k.endswith("accuracy")}
    return f"{tiles(shares)}<section><h2>Figures</h2>{table(figures)}</section>"


def _captions(captions: Sequence[tuple[Picture, str, bool]]) -> str:
    if not captions:
        return ""
    # Mistakes first: they are the most informative.
    cards = [
        f'<figure class="card {_verdict(right)}">{image(shown_image)}'
        f"<figcaption>{_mark(right)} {html.escape(said)}</figcaption></figure>"
        for shown_image, said, right in sorted(captions, key=lambda c: c[2])
    ]
    shown, rest = "".join(cards[:OPEN_CAPTIONS]), cards[OPEN_CAPTIONS:]
    more = (
        f'<details><summary>{len(rest)} more</summary><div class="cards">{"".join(rest)}</div>'
        "</details>"
        if rest
        else ""
    )
    right = sum(right for _, _, right in captions)
    return (
        "<section><h2>Captions of held-out images</h2>"
        f"<p>{right} of {len(captions)} are right; mistakes come first.</p>"
        f'<div class="cards">{shown}</div>{more}</section>'
    )


def _drawings(drawings: np.ndarray | Sequence[Sequence[Picture]]) -> str:
    if len(drawings) == 0:
        return ""
    columns = len(drawings[0])
    cells = "".join(image(drawing) for row in drawings for drawing in row)
    return (
        "<section><h2>Drawn from words alone</h2>"
        "<p>A row holds several drawings of one thing.</p>"
        f'<div class="sheet" style="--columns:{columns}">{cells}</div></section>'
    )


def _continuations(
    continuations: Sequence[tuple[Sequence[Picture], Picture, bool, str]],
) -> str:
    if not continuations:
        return ""
    cards = "".join(
        f'<figure class="strip {_verdict(right)}"><div>{"".join(map(image, frames))}<i>&rarr;</i>'
        f"<span>{image(drawn)}</span></div>"
        f"<figcaption>{_mark(right)} {html.escape(caption)}</figcaption></figure>"
        for frames, drawn, right, caption in continuations
    )
    right = sum(right for _, _, right, _ in continuations)
    return (
        "<section><h2>Sequences continued</h2>"
        "<p>The model was given the frames left of the arrow and drew the one right of it; "
        f"{right} of the {len(continuations)} shown are right.</p>"
        f'<div class="strips">{cards}</div></section>'
    )


def _curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    stages = []
    for stage, rows in curves.items():
        names = dict.fromkeys(name for row in rows for name in row)
        drawn = sorted(
            (rank, name)
            for name in names
            if (rank := next((i for i, p in enumerate(CURVES) if re.search(p, name)), -1)) >= 0
        )
        charts = "".join(_chart(name, *series(rows, name), rank) for rank, name in drawn)
        if charts:
            stages.append(f'<h3>{html.escape(stage)}</h3><div class="charts">{charts}</div>')
    if not stages:
        return ""
    return (
        "<section><h2>Training</h2><p>Faint: each logged step; strong: a running mean. "
        f"Beneath each chart, its first and last value.</p>{''.join(stages)}</section>"
    )


# Placeholder colors in the SVG, replaced by the page's own.
_INK, _LINE = "#010203", "#040506"


def _chart(name: str, steps: np.ndarray, values: np.ndarray, rank: int) -> str:
    """Plots one metric over steps as inline SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if not len(values):
        return ""
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 8,
        "text.color": _INK,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "ytick.minor.width": 0.4,
        "grid.color": _INK,
        "grid.linewidth": 0.5,
        "grid.alpha": 0.15,
    }
    with rc_context(style):
        figure = Figure(figsize=(3.4, 2.0), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(True)
        window = max(1, len(values) // 40)
        axes.plot(steps, values, color=_LINE, linewidth=0.8, alpha=0.3 if window > 1 else 1)
        if window > 1:
            mean = np.convolve(values, np.ones(window) / window, "valid")
            axes.plot(steps[window - 1 :], mean, color=_LINE, linewidth=1.6)
        if values.min() > 0 and values.max() > 20 * values.min():
            axes.set_yscale("log")
        axes.set_xlabel("step")
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace(_INK, "currentColor").replace(_LINE, f"var(--line-{min(rank, 4)})")
    return (
        f"<figure><h4>{words(name)}</h4>{svg}<figcaption>{values[0]:.3g} &rarr; "
        f"{values[-1]:.3g}</figcaption></figure>"
    )


def _verdict(right: bool) -> str:
    return "right" if right else "wrong"


def _mark(right: bool) -> str:
    sign, word = ("&#10003;", "right") if right else ("&#10007;", "wrong")
    return f'<span class="mark" role="img" aria-label="{word}">{sign}</span>'


_STYLE = """
.mark { font-weight: 700; }
.right .mark { color: var(--right); }
.wrong .mark { color: var(--wrong); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.2rem, 1fr)); gap: .6rem; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem;
  padding: .5rem; }
.card.wrong { border-color: var(--wrong); }
.card img { width: 100%; height: auto; border-radius: .25rem; margin-bottom: .35rem; }
.sheet { display: grid; grid-template-columns: repeat(var(--columns), 1fr); gap: 2px;
  max-width: 44rem; }
.sheet img { width: 100%; height: auto; }
.strips { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: .6rem; }
.strip { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem;
  padding: .6rem; }
.strip > div { display: flex; align-items: center; gap: .3rem; margin-bottom: .4rem; }
.strip img { width: 100%; height: auto; border-radius: .25rem; }
.strip div > img, .strip div > span { flex: 0 1 4rem; min-width: 0; }
.strip i { font-style: normal; color: var(--soft); }
.strip div > span { border-radius: .35rem; outline: 2px solid var(--right); }
.strip.wrong div > span { outline-color: var(--wrong); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr));
  gap: .6rem; }
.charts figure { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem;
  padding: .7rem; }
.charts svg { display: block; width: 100%; height: auto; color: var(--soft); }
.charts svg text { font-family: inherit !important; }
"""
