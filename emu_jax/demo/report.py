"""Self-contained HTML report of a demo (report.html).

Images are inline PNG, curves inline SVG and styles inline CSS. The page has no scripts and fetches
nothing. It follows the reader's light or dark setting.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from emu_jax.page import ImageLike, details, html_table, image, tiles, write_page
from emu_jax.train.report import STYLE, StageEvaluations, training_curves

OPEN_CAPTIONS = 60  # shown by default; the rest are folded


def write_demo_report(
    path: Path,
    *,
    title: str,
    figures: Mapping[str, Any],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    held_out: Mapping[str, StageEvaluations] | None = None,
    captions: Sequence[tuple[ImageLike, str, bool]] = (),
    drawings: UInt8[np.ndarray, "rows images ..."] | Sequence[Sequence[ImageLike]] = (),
    autoencodings: Sequence[tuple[ImageLike, ImageLike, bool]] = (),
    continuations: Sequence[tuple[Sequence[ImageLike], ImageLike, bool, str]] = (),
    config: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
) -> None:
    """Writes the page atomically.

    Args:
        figures: metric name to value; all are listed in the table. Those named `*accuracy` are
            fractions of one and also head the page as percentages.
        curves: stage to its rows, as returned by `train.telemetry.metrics.read_metrics`.
        held_out: stage to its evaluations, as returned by `read_evaluations` there.
        captions: (image, generated caption, whether it is correct).
        drawings: uint8 [rows, columns, h, w, 3] or [rows, columns, h, w]; row i holds the images
            generated for the i-th prompt.
        autoencodings: (image, its reconstruction from features, whether it is correct).
        continuations: (given frames, generated frame, whether it is correct, caption).
    """
    sections = [
        _figures(figures),
        _captions(captions),
        _drawings(drawings),
        _autoencodings(autoencodings),
        _continuations(continuations),
        training_curves(curves, held_out or {}),
        details("Configuration", config),
        details("Versions", versions),
    ]
    write_page(path, title, sections, STYLE + _STYLE)


def _figures(figures: Mapping[str, Any]) -> str:
    accuracies = {k: f"{100 * v:.1f}%" for k, v in figures.items() if k.endswith("accuracy")}
    judge = (
        "<p>A judge, trained on the training digits alone, recognizes the digit in each generated "
        "image. Its own accuracy is that on held-out digits.</p>"
    )
    about = judge if "judge_accuracy" in figures else ""
    named = {name.replace("_first_last", ", first and last"): v for name, v in figures.items()}
    return f"{tiles(accuracies)}<section><h2>Figures</h2>{about}{html_table(named)}</section>"


def _captions(captions: Sequence[tuple[ImageLike, str, bool]]) -> str:
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


def _drawings(
    drawings: UInt8[np.ndarray, "rows images ..."] | Sequence[Sequence[ImageLike]],
) -> str:
    if len(drawings) == 0:
        return ""
    columns = len(drawings[0])
    cells = "".join(image(drawing) for row in drawings for drawing in row)
    return (
        "<section><h2>Drawn from words alone</h2>"
        "<p>A row holds several drawings of one thing.</p>"
        f'<div class="sheet" style="--columns:{columns}">{cells}</div></section>'
    )


def _autoencodings(autoencodings: Sequence[tuple[ImageLike, ImageLike, bool]]) -> str:
    if not autoencodings:
        return ""
    cards = "".join(
        f'<figure class="card pair {_verdict(right)}">{image(original)}{image(painted)}'
        f"<figcaption>{_mark(right)}</figcaption></figure>"
        for original, painted, right in autoencodings
    )
    return (
        "<section><h2>Autoencoded</h2>"
        "<p>Left a held-out image, right what the decoder paints from its features.</p>"
        f'<div class="cards">{cards}</div></section>'
    )


def _continuations(
    continuations: Sequence[tuple[Sequence[ImageLike], ImageLike, bool, str]],
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
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .3rem; }
.pair figcaption { grid-column: span 2; }
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
"""
