"""Precomputed conditions and latents, for training the visual decoder alone.

    DIR/latents-00000-00004.array_record   part 0, written by process 4
    DIR/unconditional.npy                  the condition of a dropped context, [N, D]
    DIR/progress.json                      while in progress: finished parts, and the data position
    DIR/tokenizer/, DIR/latents.json       the tokenizer, and the model's config; written last

Values are bfloat16. If the denoiser is conditioned on the sizes of images, a record ends in these:
six int32. The order is a pure function of the seed. A position is one integer,
independent of the number of processes.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grain
import jax
import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Float, Real

from emu_jax.config import EmuConfig, load_json, save_json
from emu_jax.data import storage
from emu_jax.data.file_cache import FileCache
from emu_jax.data.pipeline import Consumed, Damage, DataConfig, HostBatch, is_count, share_numbers
from emu_jax.data.records import RecordSpans
from emu_jax.data.unused import Tally
from emu_jax.errors import UserError
from emu_jax.storage import is_remote, writing
from emu_jax.tokenizer import Tokenizer

_DTYPE = np.dtype(ml_dtypes.bfloat16)
_SIZES_DTYPE = np.dtype("<i4")
_LISTING, _PROGRESS = "latents.json", "progress.json"


@dataclasses.dataclass(frozen=True)
class _Listing:
    """`latents.json`."""

    model: EmuConfig  # the model that computed them, without its denoiser
    rows: int
    files: tuple[str, ...]


def _part_file(part: int, process: int) -> str:
    return f"latents-{part:05d}-{process:05d}.array_record"


def latent_shapes(model: EmuConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of one condition [N, D] and of one image's latents [h, w, C]."""
    assert model.vae is not None
    side = model.vae.sample_size // model.vae.downscale
    condition = (model.n_embeddings, model.embedding_width)
    return condition, (side, side, model.vae.latent_channels)


@dataclasses.dataclass(frozen=True)
class Progress:
    """`progress.json`: the parts of a folder that all processes have written."""

    run: str  # digest of the settings
    rows: int = 0
    parts: int = 0
    files: tuple[str, ...] = ()
    position: Any = None  # data position after them (`Batches.state`)

    @classmethod
    def of(cls, folder: Path, run: str) -> Progress:
        """Loads the progress of a folder, from which a run resumes; empty for a new folder.

        Raises:
            UserError: the folder is complete, or was started with other settings.
        """
        if (folder / _LISTING).exists():
            raise UserError(f"{folder} holds latents already: name another folder, or remove it")
        if not (folder / _PROGRESS).exists():
            return cls(run)
        progress = load_json(cls, folder / _PROGRESS)
        if progress.run != run:
            raise UserError(
                f"{folder} was started with another config: use that config, or another folder"
            )
        return progress

    def after(self, folder: Path, *, rows: int, processes: int, position: Any) -> Progress:
        """Returns the progress with one more part, which all processes have written.

        Process 0 saves it.
        """
        files = tuple(_part_file(self.parts, process) for process in range(processes))
        done = Progress(self.run, rows, self.parts + 1, self.files + files, position)
        if jax.process_index() == 0:
            save_json(done, folder / _PROGRESS)
        return done


class PartWriter:
    """Writes a process's share of one part. The file appears when it is closed; if an error ends
    the context first, it is discarded."""

    def __init__(self, folder: Path, part: int, process: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = ExitStack()
        temporary = self._file.enter_context(writing(folder / _part_file(part, process)))
        self._writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")

    def add(
        self,
        condition: Float[np.ndarray, "N D"],
        latents: Float[np.ndarray, "h w C"],
        sizes: Real[np.ndarray, "6"] | None = None,
    ) -> None:
        parts = [np.asarray(a, _DTYPE).tobytes() for a in (condition, latents)]
        if sizes is not None:
            parts.append(np.asarray(sizes, _SIZES_DTYPE).tobytes())
        self._writer.write(b"".join(parts))

    def close(self) -> None:
        self._writer.close()
        self._file.close()

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)


def finish(
    folder: Path,
    progress: Progress,
    *,
    model: EmuConfig,
    unconditional: Float[np.ndarray, "N D"],
    tokenizer: Tokenizer,
) -> None:
    """Completes a folder after all parts are written."""
    with writing(folder / "unconditional.npy") as temporary:
        with temporary.open("wb") as file:
            np.save(file, np.asarray(unconditional, np.float32))
    tokenizer.save(folder / "tokenizer")
    listing = _Listing(_without_denoiser(model), progress.rows, progress.files)
    save_json(listing, folder / _LISTING)
    (folder / _PROGRESS).unlink(missing_ok=True)


class LatentBatches(Iterator[HostBatch]):
    """An endless iterator over batches of `condition` bfloat16 [B, N, D], `latents` bfloat16
    [B, h, w, C] and, if the denoiser is conditioned on them, `sizes` int32 [B, 6].

    Each process gets one or several shares of a global batch, as in `pipeline.Batches`.

    Raises:
        UserError: the folder is incomplete or damaged, or was made with another model.
    """

    def __init__(
        self,
        folder: Path,
        cfg: DataConfig,
        model: EmuConfig,
        share: int | Sequence[int] = 0,
        shares: int = 1,
    ) -> None:
        if not (folder / _LISTING).is_file():
            raise UserError(f"{folder} has no {_LISTING}: write it with `emu-jax precompute`")
        listing = load_json(_Listing, folder / _LISTING)
        if listing.model != _without_denoiser(model):
            raise UserError(
                f"{folder} was made with another model than this run's: precompute it again"
            )
        names = {path.name for path in folder.iterdir()}
        if missing := [name for name in listing.files if name not in names]:
            raise UserError(f"{folder / missing[0]} is missing: precompute {folder} again")
        paths = [str(folder / name) for name in listing.files]
        self._folder = folder
        self._condition, self._latents = latent_shapes(model)
        self._takes_sizes = model.unet is not None and model.unet.takes_sizes
        with self._damage():
            self._records = _open_records(paths, FileCache.at(cfg.cache, cfg.cache_bytes))
            if len(self._records) != listing.rows:
                raise ValueError(f"{len(self._records)} rows, not {listing.rows}")
            with (folder / "unconditional.npy").open("rb") as file:
                unconditional = np.load(file).astype(_DTYPE)
            self._unconditional = unconditional.reshape(self._condition)
        self._order: Any = (
            grain.MapDataset.source(range(listing.rows)).seed(cfg.seed).shuffle().repeat(None)
        )
        size = cfg.batch_size // shares
        numbers = share_numbers(share, shares)
        self._rows = [row for n in numbers for row in range(n * size, (n + 1) * size)]
        self._cfg, self._position, self._last = cfg, 0, list[int]()
        self._pool = ThreadPoolExecutor(1, "emu-jax-latents")
        self._ahead: collections.deque[Future[tuple[HostBatch, list[int]]]] = collections.deque()
        self.tallies: dict[str, Tally] = {}  # empty: no source is read

    @property
    def rows(self) -> int:
        """Number of rows in the folder."""
        return len(self._records)

    def __next__(self) -> HostBatch:
        while len(self._ahead) <= self._cfg.prefetch:
            number = self._position + len(self._ahead)
            self._ahead.append(self._pool.submit(self._make, number))
        batch, self._last = self._ahead.popleft().result()
        self._position += 1
        return batch

    def _make(self, number: int) -> tuple[HostBatch, list[int]]:
        first = number * self._cfg.batch_size
        picked = [self._order[first + row] for row in self._rows]
        dropped = [self._drops(first + row) for row in self._rows]
        size, count = int(np.prod(self._condition)), int(np.prod(self._latents))
        conditions, latents, sizes = [], [], []
        with self._damage():
            for record, drop in zip(self._records.__getitems__(picked), dropped, strict=True):
                end = (size + count) * _DTYPE.itemsize
                if self._takes_sizes and len(record) == end:
                    raise UserError(
                        f"{self._folder} has no sizes of images, which the denoiser needs: "
                        "precompute it again"
                    )
                if self._takes_sizes:
                    sizes.append(np.frombuffer(record[end:], _SIZES_DTYPE).reshape(6))
                    record = record[:end]
                values = np.frombuffer(record, _DTYPE)
                kept = values[:size].reshape(self._condition)
                conditions.append(self._unconditional if drop else kept)
                latents.append(values[size:].reshape(self._latents))
        batch = {"condition": np.stack(conditions), "latents": np.stack(latents)}
        return batch | ({"sizes": np.stack(sizes)} if sizes else {}), picked

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """Turns any exception of a damaged file into a `UserError` that names the folder."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # ArrayRecord raises many types
            why = (str(error) or repr(error)).splitlines()[0]
            raise UserError(
                f"{self._folder} is damaged ({why}): remove it and precompute it again"
            ) from None

    def _drops(self, number: int) -> bool:
        rng = np.random.default_rng((self._cfg.seed, number))
        return bool(rng.random() < self._cfg.drop_condition)

    def __enter__(self) -> LatentBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops prefetching."""
        self._pool.shutdown(cancel_futures=True)

    def state(self) -> dict[str, Any]:
        """Returns the position after the last batch that was yielded, as JSON types."""
        return {"kind": "latents", "batch": self._position}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `state()` was taken.

        Raises:
            UserError: `state` is damaged, or belongs to another kind of batches.
        """
        if state.get("kind") != "latents":
            raise UserError(
                f"the checkpoint's data position is for {state.get('kind')!r} batches, this run "
                "reads latents: start it in a new workdir"
            )
        if not is_count(state.get("batch")):
            raise UserError(
                f"the checkpoint's data position is damaged ({state}): use another step"
            )
        self._position = state["batch"]
        self._ahead.clear()

    def documents(self) -> list[tuple[str, int]]:
        """Returns ("latents", row) of each row in this process's share of the last batch."""
        return [("latents", row) for row in self._last]

    def damaged(self) -> list[Damage]:
        """Returns an empty list: damaged documents were skipped when the latents were computed."""
        return []

    def statistics(self) -> dict[str, Any]:
        """Returns statistics of the global batches so far.

        A row counts as one image and no text, because its text is not stored.
        """
        rows = self._position * self._cfg.batch_size
        return {
            "token_fill": 1.0,
            "image_fill": 1.0,
            "tokens": 0,
            "images": rows,
            "documents": rows,
            "truncated": 0,
            "damaged": {},
        }

    def consumed(self) -> dict[str, Consumed]:
        """Returns how much the run has read, up to the last batch that was yielded."""
        rows = self._position * self._cfg.batch_size
        return {"latents": Consumed(0, rows, rows, rows / len(self._records))}

    def locate(self, source: str, index: int) -> str:
        """Returns where a row is."""
        return f"{self._folder}, row {index}"


def _open_records(paths: list[str], cache: FileCache) -> Any:
    """Returns the records of all files, by number."""
    if not any(map(is_remote, paths)):
        return grain.sources.ArrayRecordDataSource(paths)
    spans = [(p, stat, 0, -1) for p, stat in zip(paths, storage.stats(paths), strict=True)]
    return RecordSpans(spans, cache)


def _without_denoiser(model: EmuConfig) -> EmuConfig:
    return dataclasses.replace(model, unet=None)
