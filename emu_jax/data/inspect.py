"""`emu-jax data inspect`: a page of what training reads, taken from the batches themselves."""

from __future__ import annotations

import collections
import dataclasses
import html
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from emu_jax.config import UserError, to_dict
from emu_jax.data.pipeline import Batch, Batches, DataConfig, Kind
from emu_jax.page import details, image, table, tiles, write_page
from emu_jax.tokenizer import Tokenizer

SURVEY = 64  # rows of a batch of which one is read and all are counted
LOSSY_FROM = 64  # pixels: smaller pictures are shown exactly
BINS = 24
LISTED = 50  # damaged documents


class Row(NamedTuple):
    """One example of a batch, without its padding."""

    tokens: list[int]
    segments: list[int]  # of each token: its document, from 1
    scored: list[bool]  # of each token: a text target
    slots: list[int]  # of each token: the embedding that stands there, or -1
    pictures: list[np.ndarray]
    regressed: list[bool]  # of each picture: its embeddings are targets
    target: np.ndarray | None  # the picture that is to be drawn
    room: int  # for tokens, with the padding


def inspect(
    path: Path, cfg: DataConfig, tokenizer: Tokenizer, kind: Kind, *,
    rows: int = 6, documents: int = 1000,
) -> dict[str, Any]:  # fmt: skip
    """Writes the page and returns its figures.

    Args:
        rows: how many are shown.
        documents: how many are read, at least, to measure; packing is judged by more.

    Raises:
        UserError: as `Batches`; or there would be nothing to see.
    """
    if rows < 1 or documents < 1:
        raise UserError("show at least one row, and read at least one document")
    # One row at a time, on this thread alone: its time is one core's.
    alone = dataclasses.replace(cfg, batch_size=1, prefetch=0, decode_threads=1)
    shown: list[tuple[Row, list[tuple[str, int]]]] = []
    lengths: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
    seconds, read = 0.0, collections.Counter()
    with Batches(alone, tokenizer, kind) as batches:
        while read["documents"] < documents or len(shown) < rows:
            began = time.process_time()
            batch = next(batches)
            seconds += time.process_time() - began
            row, names = _row(batch, kind, cfg), batches.documents()
            if len(shown) < rows:
                shown.append((row, names))
            for (name, _), length in zip(names, _lengths(row, cfg.n_causal), strict=True):
                lengths[name].append(length)
            pictures = len(row.pictures) + (row.target is not None)
            read.update(rows=1, documents=len(names), pictures=pictures, tokens=len(row.tokens))
    figures = {
        "kind": kind,
        **_survey(cfg, tokenizer, kind, documents),
        **{f"{what}_per_second_per_core": count / seconds for what, count in read.items()},
    }
    write_page(
        path,
        f"What training reads: {kind}",
        [
            _summary(figures),
            _rows(shown, tokenizer, cfg),
            _histograms(lengths),
            f"<section><h2>Figures</h2>{table(figures)}</section>",
            details("Configuration", to_dict(cfg)),
        ],
        _STYLE,
    )
    return figures | {"page": str(path)}


def _survey(cfg: DataConfig, tokenizer: Tokenizer, kind: Kind, documents: int) -> dict[str, Any]:
    """How full rows are, over many: as one of many processes, which reads its own share and
    counts everyone's. Whole blocks are packed, so that their last rows count, too."""
    many = dataclasses.replace(cfg, batch_size=SURVEY, prefetch=0)
    least = max(documents, 8 * cfg.block_documents)
    with Batches(many, tokenizer, kind, process_count=SURVEY) as batches:
        while batches.statistics()["documents"] < least:
            next(batches)
        return batches.statistics()


# Batches


def _row(batch: Batch, kind: Kind, cfg: DataConfig) -> Row:
    """The first example of a batch."""
    one = {name: values[0] for name, values in batch.items()}
    if kind == "pictures":
        return Row([], [], [], [], [one["images"]], [False], None, 0)
    if kind == "captions":
        used = int(one["valid"].sum())
        plain = [1] * used, [True] * used, [-1] * used
        return Row(
            one["tokens"][:used].tolist(), *plain, [one["images"]], [False], None, cfg.row_tokens
        )
    pictures = list(one["images"][one["image_valid"]])
    if kind == "contexts":
        used = int(one["length"])
        segments, scored = [1] * used, [False] * used
        regressed, target = [False] * len(pictures), one["target"]
    else:
        used = int((one["segment_ids"] > 0).sum())
        segments = one["segment_ids"][:used].tolist()
        scored = one["text_loss_mask"][:used].tolist()
        regressed, target = one["image_scored"][: len(pictures)].tolist(), None
    tokens, slots = one["tokens"][:used].tolist(), one["image_slots"][:used].tolist()
    return Row(tokens, segments, scored, slots, pictures, regressed, target, len(one["tokens"]))


def _lengths(row: Row, n_causal: int) -> list[tuple[int, int]]:
    """(tokens, pictures) of each document of a row."""
    if not row.tokens:
        return [(0, len(row.pictures))]
    tokens = collections.Counter(row.segments)
    embeddings = collections.Counter(
        segment for segment, slot in zip(row.segments, row.slots, strict=True) if slot >= 0
    )
    return [(tokens[segment], embeddings[segment] // n_causal) for segment in sorted(tokens)]


# The page


def _summary(figures: Mapping[str, Any]) -> str:
    def rate(what: str) -> str:
        return f"{figures[f'{what}_per_second_per_core']:,.0f}"

    shown = {}
    if figures["kind"] != "pictures":
        shown["of token slots in use"] = f"{100 * figures['token_fill']:.1f}%"
    shown["of picture slots in use"] = f"{100 * figures['image_fill']:.1f}%"
    shown["pictures a second on one core"] = rate("pictures")
    shown["tokens a second on one core"] = rate("tokens")
    return tiles(shown)


def _rows(
    shown: Sequence[tuple[Row, list[tuple[str, int]]]], tokenizer: Tokenizer, cfg: DataConfig
) -> str:
    legend = (
        '<p class="legend">Colours tell documents apart. Strong words are <b>text targets</b>, '
        "faint ones are only read. A picture with a frame in the document's colour is a "
        "<b>regression target</b>. In the bar of a row, dark is a picture and grey is "
        "padding; beneath it, text targets are blue, regression targets orange.</p>"
    )
    cards = "".join(_card(n, row, names, tokenizer, cfg) for n, (row, names) in enumerate(shown, 1))
    return f"<section><h2>Rows</h2>{legend}{cards}</section>"


def _card(
    number: int, row: Row, names: Sequence[tuple[str, int]], tokenizer: Tokenizer, cfg: DataConfig
) -> str:
    facts = [f"{len(names)} document{'s' * (len(names) != 1)}"]
    if row.room:
        facts.append(f"{len(row.tokens):,} of {row.room:,} tokens")
    facts.append(f"{len(row.pictures)} picture{'s' * (len(row.pictures) != 1)}")
    numbers = sorted(set(row.segments)) or [1]
    body = "".join(
        f'<div class="document" style="{_hue(segment)}"><h4>{html.escape(name)} {index}</h4>'
        f"<div>{''.join(_content(row, segment, tokenizer, cfg))}</div></div>"
        for segment, (name, index) in zip(numbers, names, strict=True)
    )
    return (
        f"<article><h3>Row {number} <span>{', '.join(facts)}</span></h3>{_bar(row, cfg)}"
        f'<div class="documents">{body}</div></article>'
    )


def _content(row: Row, segment: int, tokenizer: Tokenizer, cfg: DataConfig) -> Iterator[str]:
    """A document's tokens and pictures, in their order."""
    placed = set()
    if not any(slot >= 0 for slot in row.slots):  # pictures that no token stands for
        yield from (_picture(picture, "", False) for picture in row.pictures)
    for n, (token, owner) in enumerate(zip(row.tokens, row.segments, strict=True)):
        if owner != segment:
            continue
        if (slot := row.slots[n]) >= 0:
            picture = slot // cfg.n_causal
            if picture not in placed:
                placed.add(picture)
                label = f"{cfg.n_causal} &times; &lt;image&gt;"
                yield _picture(row.pictures[picture], label, row.regressed[picture])
            continue
        special = token >= tokenizer.base_size or token in (tokenizer.bos, tokenizer.eos)
        kinds = [name for name, on in (("s", special), ("t", row.scored[n])) if on]
        piece = html.escape(tokenizer.piece(token).replace("\u2581", " "))
        yield f'<i class="{" ".join(kinds)}" title="{n}: {token}">{piece}</i>'
    if row.target is not None:
        yield _picture(row.target, "to be drawn", True)


def _picture(picture: np.ndarray, label: str, framed: bool) -> str:
    shown = image(picture, lossy=max(picture.shape[:2]) >= LOSSY_FROM)
    return f'<figure class="{"framed" if framed else ""}">{shown}{label}</figure>'


def _bar(row: Row, cfg: DataConfig) -> str:
    """A row at a glance: which documents and pictures, what is learned, how much is padding."""
    if not row.room:
        return ""
    pictures = [slot >= 0 for slot in row.slots]
    learned = [
        "text" if scored else "picture" if slot >= 0 and row.regressed[slot // cfg.n_causal] else ""
        for scored, slot in zip(row.scored, row.slots, strict=True)
    ]  # fmt: skip
    spans = [
        f'<rect x="{start}" width="{size}" height="12" style="{_hue(segment)}" '
        f'class="{"dark" if picture else "light"}"/>'
        for (segment, picture), start, size in _runs(zip(row.segments, pictures, strict=True))
    ]
    spans += [
        f'<rect x="{start}" y="14" width="{size}" height="4" class="{kind}"/>'
        for kind, start, size in _runs(learned) if kind
    ]  # fmt: skip
    used = len(row.tokens)
    return (
        f'<svg class="bar" viewBox="0 0 {row.room} 18" preserveAspectRatio="none" role="img" '
        f'aria-label="{used} of {row.room} tokens in use">{"".join(spans)}'
        f'<rect x="{used}" width="{row.room - used}" height="12" class="padding"/></svg>'
    )


def _runs(values: Any) -> Iterator[tuple[Any, int, int]]:
    """(value, start, length) of each run of equal values."""
    start = 0
    for value, run in groupby(values):
        size = sum(1 for _ in run)
        yield value, start, size
        start += size


def _hue(segment: int) -> str:
    """Neighbours differ: by the golden angle."""
    return f"--h:{segment * 137.5 % 360:.0f}"


def _histograms(lengths: Mapping[str, Sequence[tuple[int, int]]]) -> str:
    charts = ""
    for name, values in sorted(lengths.items()):
        tokens, pictures = zip(*values, strict=True)
        charts += (
            f"<h3>{html.escape(name)} <span>{len(values):,} documents</span></h3>"
            f'<div class="histograms">{_histogram("tokens of a document", tokens)}'
            f"{_histogram('pictures of a document', pictures)}</div>"
        )
    return f"<section><h2>Lengths</h2><p>As they stand in rows, after cuts.</p>{charts}</section>"


def _histogram(title: str, values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    step = max(1, -(-(high - low + 1) // BINS))  # whole numbers to a bar
    bars = -(-(high - low + 1) // step)
    counts = np.bincount([(value - low) // step for value in values], minlength=bars)
    shown = ""
    for n, count in enumerate(counts):
        first, last = low + n * step, low + (n + 1) * step - 1
        label = f"{first}" if step == 1 else f"{first} to {last}"
        shown += (
            f'<i style="height:{100 * count / counts.max():.1f}%" title="{label}: {count:,}"></i>'
        )
    median, most = np.percentile(values, (50, 95))
    return (
        f"<figure><h4>{title}</h4><div>{shown}</div><p><span>{low:,}</span><span>{high:,}</span></p>"
        f"<figcaption>half have at most {median:,.0f}, 95% at most {most:,.0f}, "
        f"on average {np.mean(values):,.1f}</figcaption></figure>"
    )


_STYLE = """
h3 span { font-weight: normal; color: var(--soft); margin-left: .5rem; }
.legend { max-width: 46rem; }
.legend b { color: var(--ink); }
article { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem;
  padding: .9rem 1rem; margin-bottom: 1rem; }
article h3 { margin-top: 0; }
.bar { display: block; width: 100%; height: 1.5rem; border-radius: .2rem; margin-bottom: .8rem; }
.bar .light { fill: hsl(var(--h) 60% 72%); }
.bar .dark { fill: hsl(var(--h) 55% 48%); }
.bar .text { fill: var(--line-0); }
.bar .picture { fill: var(--line-2); }
.bar .padding { fill: var(--rule); }
.documents { columns: 2 26rem; column-gap: .6rem; }
.document { break-inside: avoid; margin-bottom: .6rem;
  border-left: 3px solid hsl(var(--h) 55% 50%); background: hsl(var(--h) 60% 50% / .07);
  border-radius: 0 .35rem .35rem 0; padding: .45rem .7rem; }
.document h4 { color: hsl(var(--h) 45% 40%); margin-bottom: .2rem; }
.document > div { display: flow-root; white-space: pre-wrap; overflow-wrap: anywhere; }
.document i { font-style: normal; color: var(--soft); border-radius: .15rem; }
.document i:hover { background: hsl(var(--h) 60% 50% / .3); }
.document i.t { color: var(--ink); }
.document i.s { font: .72rem ui-monospace, monospace; border: 1px solid var(--rule);
  padding: 0 .2rem; margin: 0 .15rem; background: var(--card); }
.document figure { display: inline-block; vertical-align: middle; margin: .25rem .15rem;
  padding: 3px; border: 2px solid transparent; border-radius: .35rem; text-align: center;
  font-size: .7rem; line-height: 1.3; color: var(--soft); white-space: normal; }
.document figure.framed { border-color: hsl(var(--h) 55% 50%); }
.document img { width: 7rem; height: 7rem; object-fit: contain; border-radius: .2rem; }
.histograms { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr));
  gap: .6rem; }
.histograms figure { background: var(--card); border: 1px solid var(--rule);
  border-radius: .5rem; padding: .7rem; }
.histograms div { display: flex; align-items: flex-end; gap: 2px; height: 6rem; margin-top: .5rem;
  border-bottom: 1px solid var(--rule); }
.histograms i { flex: 1; min-height: 1px; background: var(--line-0); border-radius: 2px 2px 0 0; }
.histograms p { display: flex; justify-content: space-between; margin: .15rem 0 .3rem;
  font-size: .75rem; }
@media (prefers-color-scheme: dark) {
  .bar .light { fill: hsl(var(--h) 40% 42%); }
  .bar .dark { fill: hsl(var(--h) 60% 62%); }
  .document h4 { color: hsl(var(--h) 55% 70%); }
}
"""
