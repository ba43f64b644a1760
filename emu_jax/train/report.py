"""DIR/report.html: curves of training and evaluations, held-out figures and contact sheets."""

from __future__ import annotations

import html
import io
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from emu_jax.errors import UserError
from emu_jax.page import details, image_file, number, words, write_page
from emu_jax.train.sheets import list_sheets
from emu_jax.train.telemetry.metrics import read_evaluations, read_metrics, series

Rows = Sequence[Mapping[str, Any]]  # of one stage, in the order of their steps
StageEvaluations = Mapping[str, Rows]  # the rows of each evaluation of a stage
Curve = tuple[Int[np.ndarray, "_"], Float[np.ndarray, "_"]]  # steps and values

REPORT_FILE = "report.html"
# Metrics to plot, ordered by the first pattern that matches their name.
_CURVES = (
    r"^loss$",
    r"loss|perplexity|bits_per",
    r"variance|cosine",
    r"rank|f1|match|similarity",
    r"accuracy|retrieval",
    r"psnr",
)
COUNTS = re.compile(r"targets$|^rows$|^documents$")
MAX_POINTS = 1000  # of a curve; longer ones are thinned out
MARKED_POINTS = 50  # a held-out curve with fewer has a dot at each
EARLIER_SHEETS = 5  # sheets of an evaluation shown below its newest one
EMA = "ema/"  # before the names of metrics of averaged parameters
COLUMNS = ("stage", "evaluation", "step", "time", "seconds")  # of a row, beside its metrics
EMA_NOTE = " (averaged weights)"
# Placeholder colors in the SVG, replaced by the page's own.
_INK, _TRAIN, _HELD_OUT = "#010203", "#040506", "#070809"
_LINES = ("-", "--", ":", "-.")  # of the evaluations in one chart


def refresh_report(workdir: Path, title: str) -> None:
    """Writes the report page. A failure is reported on stderr; training goes on without it."""
    try:
        write_report(workdir, title)
    except (OSError, UserError) as error:
        print(f"no {workdir / REPORT_FILE}: {error}", file=sys.stderr, flush=True)


def write_report(workdir: Path, title: str) -> None:
    """Writes the report page of a run directory atomically.

    Raises:
        UserError: the records of the run are damaged.
    """
    curves = read_metrics(workdir)
    held_out = {stage: read_evaluations(workdir, stage) for stage in curves}
    sections = [
        held_out_tables(held_out),
        training_curves(curves, held_out),
        contact_sheets(workdir),
        details("Configuration", json.loads((workdir / "train.json").read_text())),
    ]
    write_page(workdir / REPORT_FILE, title, sections, STYLE)


def held_out_tables(held_out: Mapping[str, StageEvaluations]) -> str:
    """Formats the newest values of each evaluation, over all sources and for each of them."""
    tables = [
        f"<h3>{html.escape(name)}, step {rows[-1]['step']:,}</h3>{_by_source(rows[-1])}"
        for evaluations in held_out.values()
        for name, rows in evaluations.items()
        if rows
    ]
    return f"<section><h2>Held-out evaluation</h2>{''.join(tables)}</section>" if tables else ""


def _by_source(row: Mapping[str, Any]) -> str:
    """Formats a row of an evaluation as a table: metrics down, sources across."""
    cells: dict[str, dict[str, Any]] = {}
    for name, value in row.items():
        if name in COLUMNS:
            continue
        averaged = name.startswith(EMA)
        *source, metric = name.removeprefix(EMA).split("/")
        cells.setdefault(metric + EMA_NOTE * averaged, {})["/".join(source)] = value
    sources = sorted({source for values in cells.values() for source in values})
    head = "".join(f"<th scope=col>{words(source or 'all')}</th>" for source in sources)
    body = "".join(
        f"<tr><th scope=row>{words(metric)}</th>"
        + "".join(f"<td>{number(values.get(source, ''))}</td>" for source in sources)
        + "</tr>"
        for metric, values in cells.items()
    )
    return f'<table class="sources"><tr><td></td>{head}</tr>{body}</table>'


def contact_sheets(workdir: Path) -> str:
    """Formats the newest contact sheet of each evaluation, with earlier ones folded away."""
    sections = []
    for name, sheets in list_sheets(workdir).items():
        *earlier, newest = sheets
        figures = "".join(_sheet(name, step, path) for step, path in _spread(earlier))
        more = f"<details><summary>Earlier steps</summary>{figures}</details>" if earlier else ""
        sections.append(
            f'<section><h2>{words(name)}</h2><div class="sheets">{_sheet(name, *newest)}{more}'
            "</div></section>"
        )
    return "".join(sections)


def _spread(sheets: Sequence[tuple[int, Path]]) -> list[tuple[int, Path]]:
    """Returns at most `EARLIER_SHEETS` of the sheets, evenly spread, the newest first."""
    count = min(len(sheets), EARLIER_SHEETS)
    chosen = np.linspace(0, len(sheets) - 1, count).round().astype(int)
    return [sheets[n] for n in reversed(chosen.tolist())]


def _sheet(name: str, step: int, path: Path) -> str:
    shown = image_file(path, f"contact sheet of {name} at step {step}")
    return f"<figure>{shown}<figcaption>step {step:,}</figcaption></figure>"


def training_curves(curves: Mapping[str, Rows], held_out: Mapping[str, StageEvaluations]) -> str:
    """Formats the charts of each stage. Held-out values stand in the axes of the same metric of
    training.

    Args:
        curves: stage to its rows, as `read_metrics` returns them.
        held_out: stage to its evaluations, as `read_evaluations` returns them.
    """
    stages = []
    for stage, rows in curves.items():
        evaluated: dict[str, dict[str, Curve]] = {}  # metric -> {evaluation: curve}
        for evaluation, results in held_out.get(stage, {}).items():
            for key in _names(results):
                name = key.removeprefix(EMA)
                if "/" not in name:  # over all sources
                    label = evaluation + EMA_NOTE * key.startswith(EMA)
                    evaluated.setdefault(name, {})[label] = series(results, key)
        names = dict.fromkeys([*_names(rows), *evaluated])
        ranks = {name: _rank(name, held_out=name in evaluated) for name in names}
        ranked = sorted((rank, name) for name, rank in ranks.items() if rank is not None)
        charts = "".join(
            _chart(name, series(rows, name), evaluated.get(name, {}), rank) for rank, name in ranked
        )
        if charts:
            stages.append(f'<h3>{html.escape(stage)}</h3><div class="charts">{charts}</div>')
    if not stages:
        return ""
    note = (
        ' <span class="held-out">With dots: held-out values.</span>'
        if any(held_out.values())
        else ""
    )
    return (
        "<section><h2>Training</h2><p>Faint: each logged step; strong: a running mean."
        f"{note} Beneath each chart, first and last values.</p>{''.join(stages)}</section>"
    )


def _names(rows: Rows) -> Iterable[str]:
    return dict.fromkeys(name for row in rows for name in row if name not in COLUMNS)


def _rank(name: str, *, held_out: bool) -> int | None:
    """Returns the place of a metric among the charts. None if it is not plotted: held-out metrics
    are, except for counts; those of training only if a pattern matches."""
    for rank, pattern in enumerate(_CURVES):
        if re.search(pattern, name):
            return rank
    return len(_CURVES) if held_out and not COUNTS.search(name) else None


def _chart(name: str, trained: Curve, held_out: Mapping[str, Curve], rank: int) -> str:
    """Plots one metric over steps as inline SVG. Returns "" if no value is finite."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    trained = _finite(trained)
    held_out = {key: curve for key, given in held_out.items() if len((curve := _finite(given))[1])}
    values = np.concatenate([trained[1], *(curve[1] for curve in held_out.values())])
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
        steps, points = trained
        window = max(1, len(points) // 40)
        thin = slice(None, None, max(1, len(points) // MAX_POINTS))
        alpha = 0.3 if window > 1 else 1
        axes.plot(steps[thin], points[thin], color=_TRAIN, linewidth=0.8, alpha=alpha)
        if window > 1:
            mean = np.convolve(points, np.ones(window) / window, "valid")
            axes.plot(steps[window - 1 :][thin], mean[thin], color=_TRAIN, linewidth=1.6)
        for number, (steps, points) in enumerate(held_out.values()):
            thin = slice(None, None, max(1, len(points) // MAX_POINTS))
            axes.plot(
                steps[thin],
                points[thin],
                color=_HELD_OUT,
                linewidth=1.2,
                linestyle=_LINES[number % len(_LINES)],
                marker="o" if len(points) < MARKED_POINTS else "",
                markersize=3,
            )
        if values.min() > 0 and values.max() > 20 * values.min():
            axes.set_yscale("log")
        axes.set_xlabel("step")
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace(_INK, "currentColor").replace(_TRAIN, f"var(--line-{min(rank, 4)})")
    svg = svg.replace(_HELD_OUT, "var(--held-out)")
    lines = []
    if len(trained[1]):
        lines.append(f"<span>{'training ' if held_out else ''}{_ends(trained)}</span>")
    for key, curve in held_out.items():
        lines.append(f'<span class="held-out">{html.escape(key)} {_ends(curve)}</span>')
    return f"<figure><h4>{words(name)}</h4>{svg}<figcaption>{''.join(lines)}</figcaption></figure>"


def _finite(curve: Curve) -> Curve:
    steps, values = curve
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def _ends(curve: Curve) -> str:
    return f"{curve[1][0]:.3g} &rarr; {curve[1][-1]:.3g}"


STYLE = """
:root { --held-out: #be185d; }
@media (prefers-color-scheme: dark) { :root { --held-out: #f472b6; } }
.held-out { color: var(--held-out); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr));
  gap: .6rem; }
.charts figure { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem;
  padding: .7rem; }
.charts figcaption span { display: block; }
.charts svg { display: block; width: 100%; height: auto; color: var(--soft); }
.charts svg text { font-family: inherit !important; }
table.sources { width: auto; max-width: 100%; }
table.sources th[scope=col] { text-align: right; padding-left: 1.5rem; color: var(--soft); }
.sheets figure { overflow-x: auto; }
.sheets img { image-rendering: auto; max-width: max(100%, 40rem); height: auto;
  border: 1px solid var(--rule); border-radius: .5rem; }
.sheets figure { margin-bottom: .8rem; }
.sheets figcaption { margin-top: .3rem; }
"""
