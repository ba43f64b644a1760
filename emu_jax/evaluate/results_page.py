"""HTML page of a task's results: scores next to the paper's, and sample answers with images."""

from __future__ import annotations

import html
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emu_jax.evaluate.tasks.base import Item, Result, Task
from emu_jax.generate.prompt import open_file
from emu_jax.page import details, html_table, image, tiles, write_page

SAMPLES = 24  # answers on the page
PIXELS = 320  # maximum length of an image's longer side


def write(
    path: Path,
    task: Task,
    result: Result,
    items: Sequence[Item],
    answers: Sequence[Any],
    per_item: Mapping[Hashable, float],
    out: Path,
) -> None:
    """Writes the page atomically.

    Args:
        per_item: the scores of single items; may lack some.
        out: directory of the result file.
    """
    scores = result.scores or {}
    heads = {name: f"{value:.2f}" for name, value in scores.items() if name == task.metric}
    heads |= {"items": f"{result.items:,}"}
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in result.notes)
    sections = [
        tiles(heads),
        f"<section><h2>Beside the paper</h2>{_paper(task, result)}</section>" if task.paper else "",
        f"<section><h2>Scores</h2>{html_table(scores)}</section>" if scores else "",
        f"<section><h2>Notes</h2><ul>{notes}</ul></section>" if notes else "",
        _samples(task, items, answers, per_item, out),
        details("Settings", result.settings),
    ]
    write_page(path, f"{task.title}, {result.column}", sections, _STYLE)


def _paper(task: Task, result: Result) -> str:
    ours = (result.scores or {}).get(task.metric)
    rows = [("this run", result.column, ours)]
    rows += [("paper", column, value) for column, value in task.paper.items()]
    cells = "".join(
        f"<tr{' class=same' if column == result.column else ''}><th scope=row>{who}</th>"
        f"<td>{html.escape(column)}</td><td>{'–' if value is None else f'{value:.2f}'}</td></tr>"
        for who, column, value in rows
    )
    described = ", ".join(filter(None, (task.metric, f"split {result.split}")))
    return (
        f"<p>{html.escape(described)}. The paper's figures are of the released weights and the "
        f"whole data set.</p><table>{cells}</table>"
    )


def _samples(
    task: Task,
    items: Sequence[Item],
    answers: Sequence[Any],
    per_item: Mapping[Hashable, float],
    out: Path,
) -> str:
    some = np.random.default_rng(0).permutation(len(items))[:SAMPLES]
    cards = []
    for i in sorted(some.tolist()):
        item, (given, right) = items[i], task.shown(items[i], answers[i])
        media = task.media_of(item, answers[i], out)
        figure = f" <i>{per_item[item.id]:.1f}</i>" if item.id in per_item else ""
        lines = [
            f"<b>{html.escape(item.question)}</b>" if item.question != given else "",
            f"{html.escape(given) or '(nothing)'}{figure}",
            f"<span>{html.escape(right)}</span>" if right else "",
        ]
        shown = "<br>".join(line for line in lines if line)
        cards.append(
            f'<figure class="card">{_media_image(media)}<figcaption>{shown}</figcaption></figure>'
        )
    return (
        f"<section><h2>Answers</h2><p>{len(cards)} of {len(items):,}, chosen at random: the "
        "model's answer with the item's own score, and beneath it the references.</p>"
        f'<div class="cards">{"".join(cards)}</div></section>'
    )


def _media_image(media: Path | None) -> str:
    """Renders an image, or the middle frame of a video."""
    if media is None:
        return ""
    opened = open_file(media)
    if isinstance(opened, list):
        opened = opened[len(opened) // 2]
    if max(opened.size) > PIXELS:
        opened.thumbnail((PIXELS, PIXELS))
    return image(opened, lossy=True)


_STYLE = """
table { max-width: 28rem; }
tr.same th, tr.same td { font-weight: 700; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: .6rem; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem;
  padding: .5rem; }
.card img { width: 100%; height: auto; border-radius: .25rem; margin-bottom: .35rem; }
.card figcaption { color: var(--ink); overflow-wrap: anywhere; }
.card figcaption span, .card figcaption i { color: var(--soft); }
"""
