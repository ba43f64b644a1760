"""Batches for the four training objectives, in an order that is a pure function of the seed.

Documents of several kinds are shuffled and mixed into one endless order (grain), numbered
0, 1, 2, ... Everything about a document in a batch - which it is, how it is augmented,
what is drawn at random - follows from its number, and packing works on fixed blocks of
numbers. So a position is two integers, the same for any number of processes, and restoring
it continues bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import grain
import numpy as np
from PIL import Image

from emu_jax.config import UserError, suggest
from emu_jax.data import images
from emu_jax.data.documents import DocumentFiles, Picture, Text
from emu_jax.data.packing import PICTURE, Outlines, first_fit, part_tokens, text_ids, truncate
from emu_jax.tokenizer import Tokenizer

Kind = Literal["rows", "captions", "pictures", "contexts"]
Batch = dict[str, np.ndarray]

PAIRS = "pairs"  # the mixture's documents of one picture and its words


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which documents, and how they become batches.

    `root/split` holds the ArrayRecord files: `KIND.array_record`, or `KIND-*.array_record`.
    """

    root: str = "data"
    split: str = "train"
    embedded: str = ""  # "digits": made at `root` when it is not there
    tokenizer: str = ""  # a folder; by default `root/tokenizer`
    instruct: bool = False  # [USER] and [ASSISTANT] are tokens, whatever the folder says
    # Documents are drawn in proportion to these weights, by kind; 0 leaves a kind out.
    mixture: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"pairs": 1.0, "pages": 1.0, "storyboards": 1.0}
    )
    seed: int = 0

    batch_size: int = 128  # rows, of all processes together
    row_tokens: int = 2048  # T
    row_images: int = 16  # I
    n_causal: int = 32  # N, embeddings of a picture
    image_size: int = 224  # of the visual encoder
    target_size: int = 512  # of the autoencoder

    picture_first: float = 0.5  # how often a pair's picture comes before its words
    learn_img: bool = False  # score [IMG] as a text target
    drop_condition: float = 0.1  # how often the decoder's context is dropped

    augment: bool = False
    rotate: float = 15.0  # degrees, either way
    scale: float = 0.15  # a fraction, either way
    shift: float = 0.125  # a fraction of the side, either way

    block_documents: int = 1024  # packed together
    decode_threads: int = 1
    prefetch: int = 4  # batches made ahead, on a thread; 0: each when it is asked for

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that these data are read with."""
        folder = self.tokenizer or Path(self.root) / "tokenizer"
        return Tokenizer.load(folder, instruct=self.instruct or None)


def batch_shapes(cfg: DataConfig, kind: Kind) -> dict[str, tuple[tuple[int, ...], type]]:
    """(shape, dtype) of each array of a global batch.

    rows:     tokens, segment_ids (0 = padding), positions int32 [B,T]; text_loss_mask bool
              [B,T], True where the token is a text target; images uint8 [B,I,h,w,3];
              image_valid, image_scored (a regression target) bool [B,I]; image_slots
              int32 [B,T], which of the I*N embeddings of the row stands at an <image>, -1
              elsewhere.
    captions: images uint8 [B,h,w,3]; tokens int32 [B,T], `<s> words </s>` and padding on
              the right; valid bool [B,T].
    pictures: images uint8 [B,H,W,3], of the autoencoder's size.
    contexts: tokens int32 [B,T], what comes before a picture, up to and with its [IMG],
              padded on the right; length int32 [B]; images, image_valid, image_slots of
              the context's own pictures as in rows; target uint8 [B,H,W,3], the picture.
    """
    B, T, I = cfg.batch_size, cfg.row_tokens, cfg.row_images  # noqa: E741
    h, H = cfg.image_size, cfg.target_size
    int32, uint8 = np.int32, np.uint8
    inputs = {
        "images": ((B, I, h, h, 3), uint8), "image_valid": ((B, I), bool),
        "image_slots": ((B, T), int32),
    }  # fmt: skip
    shapes: dict[str, dict[str, tuple[tuple[int, ...], Any]]] = {
        "rows": {
            "tokens": ((B, T), int32), "segment_ids": ((B, T), int32),
            "positions": ((B, T), int32), "text_loss_mask": ((B, T), bool),
            "image_scored": ((B, I), bool), **inputs,
        },
        "captions": {
            "images": ((B, h, h, 3), uint8), "tokens": ((B, T), int32), "valid": ((B, T), bool),
        },
        "pictures": {"images": ((B, H, H, 3), uint8)},
        "contexts": {
            "tokens": ((B, T), int32), "length": ((B,), int32), **inputs,
            "target": ((B, H, H, 3), uint8),
        },
    }  # fmt: skip
    return shapes[kind]


class Batches(Iterator[Batch]):
    """An endless iterator over batches, made ahead on a thread.

    A process gets its contiguous share of the rows of each global batch; the shares of all
    processes together are the same batch whatever their number.

    Args:
        kind: the objective's batches, see `batch_shapes`. "captions" and "pictures" come
            from the pairs alone; "contexts" from documents with a picture.

    Raises:
        UserError: data is missing or damaged, or a value of `cfg` cannot be.
    """

    def __init__(
        self, cfg: DataConfig, tokenizer: Tokenizer, kind: Kind,
        process_index: int = 0, process_count: int = 1,
    ):  # fmt: skip
        if kind not in get_args(Kind):
            raise UserError(f"unknown kind of batch {kind!r}{suggest(kind, get_args(Kind))}")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process {process_index} of {process_count}")
        if cfg.batch_size < 1 or cfg.batch_size % process_count:
            raise UserError(
                f"batch_size {cfg.batch_size} cannot be shared by {process_count} processes: "
                "make it a multiple"
            )
        share = cfg.batch_size // process_count
        mine = slice(process_index * share, (process_index + 1) * share)
        self._maker = _Maker(cfg, tokenizer, kind, mine)
        self._kind = kind
        self._prefetch = cfg.prefetch
        self._position = (0, 0)
        self._thread: _Prefetch | None = None
        self._totals = dict.fromkeys(_STATISTICS, 0)
        self._documents: list[_Drawn] = []

    def __next__(self) -> Batch:
        if self._thread is None and self._prefetch > 0:
            self._thread = _Prefetch(self._maker, self._position, self._prefetch)
            weakref.finalize(self, self._thread.stop)
        made = self._thread.get() if self._thread else self._maker.make(self._position)
        batch, (self._position, self._documents, statistics) = made
        for name, value in statistics.items():
            self._totals[name] += value
        return batch

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state(self) -> dict[str, Any]:
        """The position after the last batch that was yielded, as JSON types."""
        block, row = self._position
        return {"kind": self._kind, "block": block, "row": row}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `state()` was taken.

        Raises:
            UserError: `state` is of another kind of batches.
        """
        if state.get("kind") != self._kind:
            raise UserError(
                f"the checkpoint's data position is for {state.get('kind')!r} batches, "
                f"this run reads {self._kind!r}: start it in a new workdir"
            )
        self.close()
        self._position = (int(state["block"]), int(state["row"]))

    def documents(self) -> list[tuple[str, int]]:
        """(kind, index in the kind's files) of each document in this process's share of the
        last batch that was yielded; nothing before the first."""
        return [(drawn.source.kind, drawn.index) for drawn in self._documents]

    def statistics(self) -> dict[str, float]:
        """Over the batches yielded so far, of all processes.

        token_fill, image_fill: the share of token and picture slots in use; documents;
        truncated: how many of them were over-long and cut.
        """
        total = self._totals
        return {
            "token_fill": total["tokens"] / max(1, total["token_slots"]),
            "image_fill": total["images"] / max(1, total["image_slots"]),
            "documents": total["documents"],
            "truncated": total["truncated"],
        }

    def close(self) -> None:
        """Stops the thread. The next batch would start it again."""
        if self._thread is not None:
            self._thread.stop()
            self._thread = None


_STATISTICS: tuple[str, ...] = (
    "tokens", "token_slots", "images", "image_slots", "documents", "truncated",
)  # fmt: skip
_Position = tuple[int, int]  # (block, row in it); other kinds than rows: (0, document)


class _Prefetch:
    """Makes batches on a thread, a few ahead."""

    def __init__(self, maker: _Maker, position: _Position, ahead: int):
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=ahead)
        self._stopped = threading.Event()
        self._failure: BaseException | None = None
        threading.Thread(
            target=self._run, args=(maker, position), daemon=True, name="emu-jax-data"
        ).start()

    def _run(self, maker: _Maker, position: _Position) -> None:
        while not self._stopped.is_set():
            try:
                item = maker.make(position)
                position = item[1].position
            except BaseException as error:  # handed to the thread that asks
                item = error
            while not self._stopped.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return

    def get(self) -> tuple[Batch, _Planned]:
        if self._failure is None:
            item = self._queue.get()
            if not isinstance(item, BaseException):
                return item
            self._failure = item
        raise self._failure

    def stop(self) -> None:
        self._stopped.set()


class _Source(NamedTuple):
    kind: str
    files: DocumentFiles
    outlines: Outlines
    texts: np.ndarray  # text tokens of each document
    pictures: np.ndarray  # pictures of each document


class _Drawn(NamedTuple):
    """A document in the endless order."""

    number: int
    source: _Source
    index: int  # in the source


class _Packed(NamedTuple):
    """A document in a row."""

    drawn: _Drawn
    tokens: int
    pictures: int
    cut: bool


class _Planned(NamedTuple):
    """What there is to know of a batch beside its arrays."""

    position: _Position  # of the next batch
    documents: list[_Drawn]  # in this process's share
    statistics: dict[str, int]  # of all shares


class _Part(NamedTuple):
    """A part of a document as it stands in a batch."""

    index: int  # in the document
    size: int  # tokens that are kept, or PICTURE
    keep: Literal["head", "tail"]  # which end of a shortened text


class _Maker:
    """Makes the batch at a position; holds no position itself."""

    def __init__(self, cfg: DataConfig, tokenizer: Tokenizer, kind: Kind, mine: slice):
        _check(cfg)
        self.cfg, self.tokenizer, self.kind, self.mine = cfg, tokenizer, kind, mine
        self.sources = _open_sources(cfg, tokenizer, kind)
        self.order: Any = _order(cfg, kind, self.sources)
        # Batches share blocks, and a packed block is small.
        self.block = functools.lru_cache(4)(self._pack)
        # Captions repeat, and the pictures of a small set do.
        self.encode = functools.lru_cache(1 << 14)(lambda text: text_ids(text, tokenizer))
        self.small_picture = functools.lru_cache(1 << 12)(self._resized)
        self.pool = ThreadPoolExecutor(cfg.decode_threads) if cfg.decode_threads > 1 else None
        self.share = {
            name: ((mine.stop - mine.start, *shape[1:]), dtype)
            for name, (shape, dtype) in batch_shapes(cfg, kind).items()
        }

    def make(self, position: _Position) -> tuple[Batch, _Planned]:
        """This process's share of the batch at a position."""
        make = {
            "rows": self._rows, "captions": self._captions, "pictures": self._pictures,
            "contexts": self._contexts,
        }[self.kind]  # fmt: skip
        batch = {name: np.zeros(shape, dtype) for name, (shape, dtype) in self.share.items()}
        jobs: list[_Job] = []
        planned = make(batch, position, jobs)
        for _ in self.pool.map(self._draw, jobs) if self.pool else map(self._draw, jobs):
            pass
        return batch, planned

    # What a document number stands for

    def rng(self, drawn: _Drawn) -> np.random.Generator:
        return np.random.default_rng((self.cfg.seed, drawn.number))

    def drawn(self, number: int) -> _Drawn:
        source, index = self.order[number]
        return _Drawn(number, self.sources[source], index)

    def _ordered(self, drawn: _Drawn, picture_first: bool) -> list[_Part]:
        """The parts that are not empty; the order of a pair's is the caller's choice."""
        outline = drawn.source.outlines[drawn.index]
        parts = [_Part(n, size, "head") for n, size in enumerate(outline) if size]
        if drawn.source.kind == PAIRS:
            parts.sort(key=lambda part: (part.size == PICTURE) != picture_first)
        return parts

    def _fit(self, drawn: _Drawn, rng: np.random.Generator) -> tuple[list[_Part], bool]:
        """(the parts that fit into a row, whether any was cut)."""
        parts = self._ordered(drawn, rng.random() < self.cfg.picture_first)
        outline = [part.size for part in parts]
        kept = truncate(
            outline, tokens=self.cfg.row_tokens - 2, images=self.cfg.row_images,
            n_causal=self.cfg.n_causal,
        )  # fmt: skip
        return [p._replace(size=s) for p, s in zip(parts, kept, strict=False)], kept != outline

    def _measured(self, number: int) -> _Packed:
        drawn = self.drawn(number)
        n_causal = self.cfg.n_causal
        pictures = int(drawn.source.pictures[drawn.index])
        tokens = 2 + int(drawn.source.texts[drawn.index])
        tokens += pictures * part_tokens(PICTURE, n_causal)
        if tokens <= self.cfg.row_tokens and pictures <= self.cfg.row_images:
            return _Packed(drawn, tokens, pictures, False)
        parts, _ = self._fit(drawn, self.rng(drawn))
        sizes = [part.size for part in parts]
        tokens = 1 + sum(part_tokens(size, n_causal) for size in sizes)
        return _Packed(drawn, tokens, sizes.count(PICTURE), True)

    def _pack(self, block: int) -> list[list[_Packed]]:
        """The rows of a block."""
        size = self.cfg.block_documents
        measured = [self._measured(n) for n in range(block * size, (block + 1) * size)]
        rows = first_fit(
            np.array([m.tokens for m in measured]), np.array([m.pictures for m in measured]),
            row_tokens=self.cfg.row_tokens, row_images=self.cfg.row_images,
        )  # fmt: skip
        return [[measured[n] for n in row] for row in rows]

    # The four kinds of batches

    def _rows(self, batch: Batch, position: _Position, jobs: list[_Job]) -> _Planned:
        block, row = position
        rows: list[list[_Packed]] = []
        while len(rows) < self.cfg.batch_size:
            block_rows = self.block(block)
            taken = block_rows[row : row + self.cfg.batch_size - len(rows)]
            rows += taken
            row += len(taken)
            if row == len(block_rows):
                block, row = block + 1, 0
        for n, documents in enumerate(rows[self.mine]):
            self._fill_row(batch, n, [packed.drawn for packed in documents], jobs)
        packed = [document for documents in rows for document in documents]
        mine = [packed.drawn for documents in rows[self.mine] for packed in documents]
        return _Planned((block, row), mine, {
            "tokens": sum(p.tokens for p in packed),
            "token_slots": self.cfg.batch_size * self.cfg.row_tokens,
            "images": sum(p.pictures for p in packed),
            "image_slots": self.cfg.batch_size * self.cfg.row_images,
            "documents": len(packed),
            "truncated": sum(p.cut for p in packed),
        })  # fmt: skip

    def _fill_row(self, batch: Batch, n: int, documents: list[_Drawn], jobs: list[_Job]) -> None:
        row = _Row(self)
        for drawn in documents:
            rng = self.rng(drawn)
            parts, cut = self._fit(drawn, rng)
            row.open()
            for part, content in self._contents(drawn, parts):
                if isinstance(content, Picture):
                    jobs.append(self._job(batch["images"][n, row.pictures], content, drawn, rng))
                row.add(part, content)
            row.close(ended=not cut)
        used = len(row.tokens)
        batch["tokens"][n] = self.tokenizer.pad_id
        batch["tokens"][n, :used] = row.tokens
        batch["segment_ids"][n, :used] = row.segments
        batch["positions"][n, :used] = row.positions
        batch["text_loss_mask"][n, :used] = row.scored
        batch["image_slots"][n] = -1
        batch["image_slots"][n, :used] = row.slots
        batch["image_valid"][n, : row.pictures] = True
        batch["image_scored"][n, : row.pictures] = row.scored_pictures

    def _captions(self, batch: Batch, position: _Position, jobs: list[_Job]) -> _Planned:
        batch["tokens"][:] = self.tokenizer.pad_id
        room = self.cfg.row_tokens - 2
        documents = self._next_documents(position)
        for n, drawn in enumerate(documents[self.mine]):
            parts = self._ordered(drawn, picture_first=True)
            (_, picture), *rest = self._contents(drawn, parts)
            words = [i for p, c in rest if isinstance(c, Text) for i in self._ids(p, c)]
            # What reads the state at </s> finds it in a shortened caption, too.
            ids = [self.tokenizer.bos, *words[:room], self.tokenizer.eos]
            batch["tokens"][n, : len(ids)] = ids
            batch["valid"][n, : len(ids)] = True
            jobs.append(self._job(batch["images"][n], picture, drawn, self.rng(drawn)))
        texts = [int(drawn.source.texts[drawn.index]) for drawn in documents]
        return _Planned(self._after(position), documents[self.mine], {
            "tokens": sum(min(text, room) + 2 for text in texts),
            "token_slots": len(texts) * self.cfg.row_tokens,
            "images": len(texts),
            "image_slots": len(texts),
            "documents": len(texts),
            "truncated": sum(text > room for text in texts),
        })  # fmt: skip

    def _pictures(self, batch: Batch, position: _Position, jobs: list[_Job]) -> _Planned:
        documents = self._next_documents(position)
        for n, drawn in enumerate(documents[self.mine]):
            parts = self._ordered(drawn, picture_first=True)[:1]
            ((_, picture),) = self._contents(drawn, parts)
            jobs.append(self._job(batch["images"][n], picture, drawn, self.rng(drawn)))
        count = len(documents)
        statistics = {"images": count, "image_slots": count, "documents": count}
        return _Planned(self._after(position), documents[self.mine], statistics)

    def _contexts(self, batch: Batch, position: _Position, jobs: list[_Job]) -> _Planned:
        batch["tokens"][:] = self.tokenizer.pad_id
        batch["image_slots"][:] = -1
        statistics = dict.fromkeys(_STATISTICS, 0)
        documents = self._next_documents(position)
        for n, drawn in enumerate(documents):
            rng = self.rng(drawn)
            dropped = rng.random() < self.cfg.drop_condition
            # The words of a pair come before its picture: there is nothing else to draw from.
            parts = self._ordered(drawn, picture_first=False)
            choices = [k for k, part in enumerate(parts) if part.size == PICTURE]
            chosen = choices[int(rng.random() * len(choices))]
            before = [] if dropped else parts[:chosen]
            kept = truncate(
                [part.size for part in before], tokens=self.cfg.row_tokens - 2,
                images=self.cfg.row_images, n_causal=self.cfg.n_causal, end="head",
            )  # fmt: skip
            context = before[len(before) - len(kept) :]
            context = [
                part._replace(size=size, keep="tail")
                for part, size in zip(context, kept, strict=True)
            ]
            pictures = kept.count(PICTURE)
            length = 2 + sum(part_tokens(size, self.cfg.n_causal) for size in kept)
            statistics["tokens"] += length
            statistics["images"] += pictures
            statistics["truncated"] += kept != [part.size for part in before]
            if not self.mine.start <= n < self.mine.stop:
                continue
            n -= self.mine.start
            row = _Row(self)
            row.open()
            *contents, (_, target) = self._contents(drawn, [*context, parts[chosen]])
            for part, content in contents:
                if isinstance(content, Picture):
                    jobs.append(self._job(batch["images"][n, row.pictures], content, drawn, rng))
                row.add(part, content)
            ids = [*row.tokens, self.tokenizer.img]
            batch["tokens"][n, :length] = ids
            batch["length"][n] = length
            batch["image_slots"][n, : length - 1] = row.slots
            batch["image_valid"][n, :pictures] = True
            jobs.append(self._job(batch["target"][n], target, drawn, rng))
        statistics["documents"] = self.cfg.batch_size
        statistics["token_slots"] = self.cfg.batch_size * self.cfg.row_tokens
        statistics["image_slots"] = self.cfg.batch_size * self.cfg.row_images
        return _Planned(self._after(position), documents[self.mine], statistics)

    def _next_documents(self, position: _Position) -> list[_Drawn]:
        first = position[1]
        return [self.drawn(number) for number in range(first, first + self.cfg.batch_size)]

    def _after(self, position: _Position) -> _Position:
        return position[0], position[1] + self.cfg.batch_size

    # Words and pixels

    def _contents(self, drawn: _Drawn, parts: list[_Part]) -> list[tuple[_Part, Text | Picture]]:
        document = drawn.source.files[drawn.index]
        return [(part, document.parts[part.index]) for part in parts]

    def _ids(self, part: _Part, content: Text | Picture) -> list[int]:
        """Ids of a text, shortened to the size that was planned."""
        assert isinstance(content, Text)
        ids = self.encode(content)
        return ids[: part.size] if part.keep == "head" else ids[-part.size :]

    def _job(
        self, out: np.ndarray, picture: Text | Picture, drawn: _Drawn, rng: np.random.Generator
    ) -> _Job:
        assert isinstance(picture, Picture)
        cfg, draw = self.cfg, None
        if cfg.augment:
            draw = images.draw_affine(rng, rotate=cfg.rotate, scale=cfg.scale, shift=cfg.shift)
        return _Job(out, picture.data, draw, drawn)

    def _draw(self, job: _Job) -> None:
        """Decodes one picture into its place."""
        resized = self.small_picture if len(job.data) < 4096 else self._resized
        try:
            picture = resized(job.data, job.out.shape[0])
        except UserError:
            where = f"in {job.drawn.source.files.where(job.drawn.index)}"
            picture = self._resized(job.data, job.out.shape[0], where)  # the same, with a name
        if job.draw is not None:
            picture = images.affine(picture, *job.draw)
        job.out[:] = images.to_array(picture)

    @staticmethod
    def _resized(data: bytes, size: int, where: str | None = None) -> Image.Image:
        return images.resize(images.open_image(data, where), size)


class _Job(NamedTuple):
    """One picture to decode."""

    out: np.ndarray  # [size, size, 3], a view into the batch
    data: bytes
    draw: tuple[float, float, float, float] | None  # of the augmentation
    drawn: _Drawn


class _Row:
    """The arrays of one row, grown document by document, part by part."""

    def __init__(self, maker: _Maker):
        self._ids, self._tokenizer = maker._ids, maker.tokenizer
        self._n_causal = maker.cfg.n_causal
        self._learn_img = maker.cfg.learn_img
        self.tokens: list[int] = []
        self.segments: list[int] = []
        self.positions: list[int] = []
        self.scored: list[bool] = []
        self.slots: list[int] = []
        self.pictures = 0
        self.scored_pictures: list[bool] = []
        self._segment = 0

    def open(self) -> None:
        """Begins a document."""
        self._segment += 1
        self._start = len(self.tokens)
        self._extend([self._tokenizer.bos], [False])

    def add(self, part: _Part, content: Text | Picture) -> None:
        if isinstance(content, Text):
            ids = self._ids(part, content)
            unscored = (self._tokenizer.img, self._tokenizer.img_end, self._tokenizer.pad_id)
            self._extend(ids, [content.scored and i not in unscored for i in ids])
            return
        n, t = self._n_causal, self._tokenizer
        first = self.pictures * n
        self.pictures += 1
        self.scored_pictures.append(content.scored)
        self._extend(
            [t.img, *[t.image] * n, t.img_end],
            [self._learn_img and content.scored, *[False] * (n + 1)],
            [-1, *range(first, first + n), -1],
        )

    def close(self, ended: bool) -> None:
        """Ends a document; one that was cut has no </s> to learn."""
        if ended:
            self._extend([self._tokenizer.eos], [True])

    def _extend(self, ids: list[int], scored: list[bool], slots: list[int] | None = None) -> None:
        position = len(self.tokens) - self._start
        self.tokens += ids
        self.segments += [self._segment] * len(ids)
        self.positions += range(position, position + len(ids))
        self.scored += scored
        self.slots += slots or [-1] * len(ids)


def _check(cfg: DataConfig) -> None:
    smallest = cfg.n_causal + 4
    rules: list[tuple[str, bool, str]] = [
        ("seed", 0 <= cfg.seed < 2**32, "be in 0 .. 2**32 - 1"),
        ("row_tokens", cfg.row_tokens >= smallest, f"hold one picture: at least {smallest}"),
        ("row_images", cfg.row_images >= 1, "be at least 1"),
        ("block_documents", cfg.block_documents >= 1, "be at least 1"),
        ("image_size", cfg.image_size >= 1, "be at least 1"),
        ("target_size", cfg.target_size >= 1, "be at least 1"),
        ("picture_first", 0 <= cfg.picture_first <= 1, "be in 0 .. 1"),
        ("drop_condition", 0 <= cfg.drop_condition <= 1, "be in 0 .. 1"),
        ("scale", 0 <= cfg.scale < 1, "be in 0 .. 1"),
        ("prefetch", cfg.prefetch >= 0, "not be negative"),
    ]
    for name, fine, rule in rules:
        if not fine:
            raise UserError(f"config key {name!r} must {rule}, not {getattr(cfg, name)!r}")
    for kind, weight in cfg.mixture.items():
        if weight < 0:
            raise UserError(f"config key 'mixture.{kind}' must not be negative: {weight!r}")


def _open_sources(cfg: DataConfig, tokenizer: Tokenizer, kind: Kind) -> list[_Source]:
    """The sources that this kind of batches reads."""
    folder = Path(cfg.root) / cfg.split
    if not folder.is_dir():
        raise UserError(
            f"{folder} does not exist: write documents there first (emu_jax.data.documents)"
        )
    names = [PAIRS]
    if kind in ("rows", "contexts"):
        names = [name for name, weight in cfg.mixture.items() if weight > 0]
        if not names:
            raise UserError("config key 'mixture' has no positive weight: nothing to read")
    sources = []
    for name in names:
        paths = sorted([
            *folder.glob(f"{name}.array_record"), *folder.glob(f"{name}-*.array_record")
        ])  # fmt: skip
        if not paths:
            known = {p.name.removesuffix(".array_record") for p in folder.glob("*.array_record")}
            raise UserError(
                f"{folder} has no {name}.array_record{suggest(name, known)}: "
                "remove it from the mixture, or build the data again"
            )
        files = DocumentFiles(paths)
        outlines = Outlines(files, tokenizer)
        sources.append(_Source(name, files, outlines, outlines.texts(), outlines.pictures()))
    return sources


def _order(cfg: DataConfig, kind: Kind, sources: list[_Source]) -> grain.MapDataset:
    """Document number -> (source, index in it), endless."""
    orders, weights = [], []
    for n, source in enumerate(sources):
        usable = {
            "rows": (source.texts > 0) | (source.pictures > 0),
            "captions": (source.texts > 0) & (source.pictures > 0),
            "pictures": source.pictures > 0,
            "contexts": source.pictures > 0,
        }[kind]
        indices = np.flatnonzero(usable)
        if not len(indices):
            raise UserError(f"{source.files.paths[0]} has no document that {kind!r} can use")
        seed = int(np.random.SeedSequence((cfg.seed, n)).generate_state(1)[0])
        orders.append(_shuffled(n, indices, seed))
        weights.append(cfg.mixture[source.kind] if len(sources) > 1 else 1.0)
    return grain.MapDataset.mix(orders, weights) if len(orders) > 1 else orders[0]


def _shuffled(source: int, indices: np.ndarray, seed: int) -> grain.MapDataset:
    """Each epoch in another order."""
    pick: Callable[[int], tuple[int, int]] = lambda n: (source, int(indices[n]))  # noqa: E731
    return grain.MapDataset.source(range(len(indices))).seed(seed).shuffle().map(pick).repeat(None)
