"""`emu-jax data inspect`: an HTML page of the training data, made from the batches themselves."""

from __future__ import annotations

import collections
import dataclasses
import html
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import UInt8

from emu_jax.config import to_dict
from emu_jax.data.batches import BUILDERS, BatchExample
from emu_jax.data.pipeline import Batches, Damage, DataConfig, Kind
from emu_jax.data.unused import Tally
from emu_jax.errors import UserError
from emu_jax.page import details, html_table, image, tiles, write_page
from emu_jax.tokenizer import Tokenizer

T = TypeVar("T")
LOSSY_FROM = 64  # pixels; smaller images are shown losslessly
BINS = 24
_LISTED = 50  # damaged documents that the page lists
_DocumentName = tuple[str, int]  # of a document: its source, and its index there


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectReport:
    """Figures of training data. Those of packing are of whole blocks, which are not decoded.

    Attributes:
        kind: of the batches.
        token_fill, image_fill: fractions of tokens and images that are not padding.
        tokens, images, documents: numbers of those that were packed, without padding.
        truncated: number of documents that were too long and were cut.
        damaged: numbers of documents that could not be read, by reason, of the `read` ones.
        read: number of documents that were read and decoded.
        sources: used and unused parts of each source.
        rows_per_second_per_core, documents_per_second_per_core, images_per_second_per_core,
            tokens_per_second_per_core: rates of reading and decoding on one core.
        page: path of the page.
    """

    kind: Kind
    token_fill: float
    image_fill: float
    tokens: int
    images: int
    documents: int
    truncated: int
    damaged: dict[str, int]
    read: int
    sources: dict[str, Tally]
    rows_per_second_per_core: float
    documents_per_second_per_core: float
    images_per_second_per_core: float
    tokens_per_second_per_core: float
    page: str

    def to_json(self) -> dict[str, Any]:
        """Returns the keys of `emu-jax data inspect --json`."""
        return vars(self) | {"sources": {k: tally.to_dict() for k, tally in self.sources.items()}}


class Sample(NamedTuple):
    """The data read for the page: rows to show, and measurements."""

    rows: list[tuple[BatchExample, list[_DocumentName]]]  # with the documents of each
    lengths: dict[str, list[tuple[int, int]]]  # (tokens, images) of documents, by source
    damaged: list[Damage]
    counts: dict[str, int]
    seconds: float
    tallies: dict[str, Tally]  # by source


def inspect(
    path: Path,
    cfg: DataConfig,
    tokenizer: Tokenizer,
    kind: Kind,
    *,
    rows: int = 6,
    documents: int = 1000,
) -> InspectReport:
    """Writes the page and returns its figures.

    Args:
        rows: number of rows to show.
        documents: minimum number of documents to read and measure; packing is measured on more.

    Raises:
        UserError: `Batches` cannot be opened, or `rows` or `documents` is less than 1.
    """
    if rows < 1 or documents < 1:
        raise UserError("show at least one row, and read at least one document")
    sample = _sample(cfg, tokenizer, kind, rows, documents)
    damaged = dict(collections.Counter(damage.reason for damage in sample.damaged))
    survey: dict[str, Any] = {**_survey(cfg, tokenizer, kind, documents), "damaged": damaged}
    report = InspectReport(
        kind=kind,
        **survey,
        read=sample.counts["documents"],
        sources=sample.tallies,
        rows_per_second_per_core=sample.counts["rows"] / sample.seconds,
        documents_per_second_per_core=sample.counts["documents"] / sample.seconds,
        images_per_second_per_core=sample.counts["images"] / sample.seconds,
        tokens_per_second_per_core=sample.counts["tokens"] / sample.seconds,
        page=str(path),
    )
    shown = {k: v for k, v in report.to_json().items() if k not in ("sources", "page")}
    sections = [
        _summary(report),
        _rows(sample.rows, tokenizer, cfg.n_causal),
        _histograms(sample.lengths),
        _sources(sample.tallies),
        _damage(sample.damaged, sample.counts["documents"]),
        f"<section><h2>Figures</h2>{html_table(shown)}</section>",
        details("Configuration", to_dict(cfg)),
    ]
    write_page(path, f"Training data: {kind}", sections, _STYLE)
    return report


# Batches


def _sample(cfg: DataConfig, tokenizer: Tokenizer, kind: Kind, rows: int, documents: int) -> Sample:
    """Reads one row at a time on this thread alone, to measure the time on one core."""
    alone = dataclasses.replace(
        cfg,
        batch_size=1,
        prefetch=0,
        decode_threads=1,
        max_damaged_rate=1.0,
        sources=tuple(
            dataclasses.replace(source, batch_size=min(1, source.batch_size))
            for source in cfg.sources
        ),
    )
    examples, damaged, seconds = [], [], 0.0
    lengths: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
    counts: dict[str, int] = dict.fromkeys(("rows", "documents", "images", "tokens"), 0)
    with Batches(alone, tokenizer, kind) as batches:
        while counts["documents"] < documents or counts["rows"] < rows:
            began = time.process_time()
            batch = next(batches)
            seconds += time.process_time() - began
            row, names = BUILDERS[kind].example(batch), batches.documents()
            if len(examples) < rows:
                examples.append((row, names))
            for segment, (name, _) in enumerate(names, 1):
                if (length := _length(row, segment, cfg.n_causal)) != (0, 0):
                    lengths[name].append(length)
            damaged += batches.damaged()
            counts["rows"] += 1
            counts["documents"] += len(names)
            counts["images"] += sum(row.used) + (row.target is not None)
            counts["tokens"] += sum(segment > 0 for segment in row.segments)
        tallies = batches.tallies
    return Sample(examples, lengths, damaged, counts, seconds, tallies)


def _survey(cfg: DataConfig, tokenizer: Tokenizer, kind: Kind, documents: int) -> dict[str, Any]:
    """Returns statistics of packing over many documents, without decoding them.

    Packs whole blocks, because the last rows of a block are emptier and have to count.
    """
    many = dataclasses.replace(cfg, prefetch=0, max_damaged_rate=1.0)
    least = max(documents, 8 * cfg.block_documents)
    with Batches(many, tokenizer, kind, plan_only=True) as batches:
        while batches.statistics()["documents"] < least:
            next(batches)
        return batches.statistics()


def _length(row: BatchExample, segment: int, n_causal: int) -> tuple[int, int]:
    """Returns (tokens, images) of a document of a row; (0, 0) for a damaged one."""
    if not row.tokens:
        return 0, sum(row.used)
    indices = [
        index
        for index, owner in zip(row.embedding_index, row.segments, strict=True)
        if owner == segment
    ]
    return len(indices), len({index // n_causal for index in indices if index >= 0})


# The page


def _summary(report: InspectReport) -> str:
    figures = {}
    if report.tokens:
        figures["of tokens are not padding"] = f"{100 * report.token_fill:.1f}%"
    figures["of images are not padding"] = f"{100 * report.image_fill:.1f}%"
    figures["images a second on one core"] = f"{report.images_per_second_per_core:,.0f}"
    figures["tokens a second on one core"] = f"{report.tokens_per_second_per_core:,.0f}"
    return tiles(figures)


def _rows(
    rows: Sequence[tuple[BatchExample, list[_DocumentName]]], tokenizer: Tokenizer, n_causal: int
) -> str:
    legend = (
        '<p class="legend">Each document has its own color. Strong words are <b>text targets</b>; '
        "faint ones are not. An image with a frame in the document's color is a "
        "<b>regression target</b>. In the bar of a row, dark is an image and gray is padding; "
        "beneath it, text targets are blue and regression targets are orange.</p>"
    )
    cards = "".join(
        _card(n, row, names, tokenizer, n_causal) for n, (row, names) in enumerate(rows, 1)
    )
    return f"<section><h2>Rows</h2>{legend}{cards}</section>"


def _card(
    number: int,
    row: BatchExample,
    names: Sequence[_DocumentName],
    tokenizer: Tokenizer,
    n_causal: int,
) -> str:
    facts = [f"{len(names)} document{'s' * (len(names) != 1)}"]
    if row.row_tokens:
        facts.append(f"{sum(s > 0 for s in row.segments):,} of {row.row_tokens:,} tokens")
    facts.append(f"{sum(row.used)} image{'s' * (sum(row.used) != 1)}")
    body = ""
    for segment, (name, index) in enumerate(names, 1):
        content = "".join(_content(row, segment, tokenizer, n_causal)) or "damaged: left as padding"
        body += (
            f'<div class="document" style="{_hue(segment)}"><h4>{html.escape(name)} {index}</h4>'
            f"<div>{content}</div></div>"
        )
    return (
        f"<article><h3>Row {number} <span>{', '.join(facts)}</span></h3>{_bar(row, n_causal)}"
        f'<div class="documents">{body}</div></article>'
    )


def _content(row: BatchExample, segment: int, tokenizer: Tokenizer, n_causal: int) -> Iterator[str]:
    """Yields a document's tokens and images in order, as HTML."""
    # Without a placeholder among the tokens, the images come first.
    if max(row.embedding_index, default=-1) < 0:
        yield from (_figure(row.images[n], "", False) for n, used in enumerate(row.used) if used)
    placed = set()
    for n, (token, owner) in enumerate(zip(row.tokens, row.segments, strict=True)):
        if owner != segment:
            continue
        if (index := row.embedding_index[n]) >= 0:
            number = index // n_causal
            if number not in placed:
                placed.add(number)
                count = sum(i >= 0 and i // n_causal == number for i in row.embedding_index)
                label = f"{count} &times; {html.escape(tokenizer.piece(token))}"
                yield _figure(row.images[number], label, row.regressed[number])
            continue
        special = token >= tokenizer.base_size or token in (tokenizer.bos, tokenizer.eos)
        kinds = [name for name, on in (("s", special), ("t", row.scored[n])) if on]
        piece = html.escape(tokenizer.piece(token).replace("\u2581", " "))
        yield f'<i class="{" ".join(kinds)}" title="{n}: {token}">{piece}</i>'
    if row.target is not None:
        yield _figure(row.target, "target", True)


def _figure(pixels: UInt8[np.ndarray, "h w 3"], label: str, framed: bool) -> str:
    content = image(pixels, lossy=max(pixels.shape[:2]) >= LOSSY_FROM)
    return f'<figure class="{"framed" if framed else ""}">{content}{label}</figure>'


def _bar(row: BatchExample, n_causal: int) -> str:
    """Draws a row as a bar: its documents, images, targets and padding."""
    if not row.row_tokens:
        return ""
    learned = [
        "text" if scored else "image" if index >= 0 and row.regressed[index // n_causal] else ""
        for scored, index in zip(row.scored, row.embedding_index, strict=True)
    ]
    parts = [
        (segment, index >= 0)
        for segment, index in zip(row.segments, row.embedding_index, strict=True)
    ]
    rests = row.row_tokens - len(parts)
    rects = [
        f'<rect x="{start}" width="{size}" height="12" style="{_hue(segment)}" '
        f'class="{"padding" if not segment else "dark" if is_image else "light"}"/>'
        for (segment, is_image), start, size in _runs([*parts, *[(0, False)] * rests])
    ]
    rects += [
        f'<rect x="{start}" y="14" width="{size}" height="4" class="{kind}"/>'
        for kind, start, size in _runs(learned)
        if kind
    ]
    return (
        f'<svg class="bar" viewBox="0 0 {row.row_tokens} 18" preserveAspectRatio="none" '
        f'role="img" aria-label="{len(parts)} of {row.row_tokens} tokens in use">'
        f"{''.join(rects)}</svg>"
    )


def _runs(values: Iterable[T]) -> Iterator[tuple[T, int, int]]:
    """Yields (value, start, length) of each run of equal values."""
    start = 0
    for value, run in groupby(values):
        size = sum(1 for _ in run)
        yield value, start, size
        start += size


def _hue(segment: int) -> str:
    """Returns a hue of a document; the golden angle keeps neighbors distinct."""
    return f"--h:{segment * 137.5 % 360:.0f}"


def _damage(damaged: Sequence[Damage], read: int) -> str:
    """Lists the documents that could not be read, by reason."""
    reasons = collections.Counter(damage.reason for damage in damaged)
    listed = "".join(
        f"<li>{html.escape(f'{damage.where}: {damage.reason}')}</li>"
        for damage in damaged[:_LISTED]
    )
    more = f"<p>and {len(damaged) - _LISTED:,} more</p>" if len(damaged) > _LISTED else ""
    return (
        f"<section><h2>Damage</h2><p>{len(damaged):,} of {read:,} documents could not be read.</p>"
        + (f"{html_table(dict(reasons.most_common()))}<ul>{listed}</ul>{more}" if damaged else "")
        + "</section>"
    )


def _sources(tallies: Mapping[str, Tally]) -> str:
    """Lists the used and unused parts of each source, with the first examples."""
    content = ""
    for name, tally in tallies.items():
        examples = "".join(
            f"<li>{html.escape(f'{reason}: {example}')}</li>"
            for reason, found in tally.examples.items()
            for example in found
        )
        content += f"<h3>{html.escape(name)}</h3><p>{html.escape(tally.summary())}</p>" + (
            f"<ul>{examples}</ul>" if examples else ""
        )
    return f"<section><h2>Sources</h2>{content}</section>"


def _histograms(lengths: Mapping[str, Sequence[tuple[int, int]]]) -> str:
    charts = ""
    for name, values in sorted(lengths.items()):
        tokens, images = zip(*values, strict=True)
        charts += (
            f"<h3>{html.escape(name)} <span>{len(values):,} documents</span></h3>"
            f'<div class="histograms">{_histogram("tokens of a document", tokens)}'
            f"{_histogram('images of a document', images)}</div>"
        )
    return f"<section><h2>Lengths</h2><p>Measured in rows, after truncation.</p>{charts}</section>"


def _histogram(title: str, values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    if low == high:
        return f"<figure><h4>{title}</h4><figcaption>each has {low:,}</figcaption></figure>"
    step = max(1, -(-(high - low + 1) // BINS))  # integers per bar
    bars = -(-(high - low + 1) // step)
    counts = np.bincount([(value - low) // step for value in values], minlength=bars)
    content = ""
    for n, count in enumerate(counts):
        first, last = low + n * step, low + (n + 1) * step - 1
        label = f"{first}" if step == 1 else f"{first} to {last}"
        content += (
            f'<i style="height:{100 * count / counts.max():.1f}%" title="{label}: {count:,}"></i>'
        )
    median, percentile_95 = np.percentile(values, (50, 95))
    return (
        f"<figure><h4>{title}</h4><div>{content}</div><p><span>{low:,}</span><span>{high:,}</span></p>"
        f"<figcaption>half have at most {median:,.0f}, 95% at most {percentile_95:,.0f}, "
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
.bar .image { fill: var(--line-2); }
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
ul { font-size: .85rem; color: var(--soft); overflow-wrap: anywhere; }
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
