"""Held-out losses: the objective's losses on fixed batches of documents, by source."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int, UInt32

from emu_jax.data.latents import LatentBatches
from emu_jax.data.pipeline import Batches, batches_of_each_source
from emu_jax.errors import UserError
from emu_jax.progress import BRIEF_SECONDS, ProgressBar
from emu_jax.sharding import RowShares, row_shares
from emu_jax.storage import as_path
from emu_jax.tokenizer import Tokenizer
from emu_jax.train.config import EvalConfig, TrainConfig
from emu_jax.train.distributed import global_batch
from emu_jax.train.evaluation import EMA, EvalResult, Evaluation, Stop
from emu_jax.train.objectives import Batch, Metrics, add_statistics
from emu_jax.train.step import COMPILE_SECONDS, ModelParams, Trainer, TrainState, check_rows

_SEED = 0x6576616C  # of noise and times, the same in all runs

_RunningSums = dict[str, Any]  # see `objectives.add_statistics`


class LossEvaluation(Evaluation):
    """The held-out losses of each source, and over all sources together.

    Each run reads the same batches: the first `config.batches` of each source. A batch is padded to
    a multiple of the rows that the mesh splits, and padding counts nothing. Rows of a batch are
    summed on the host in float64.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        config: EvalConfig,
        trainer: Trainer,
        tokenizer: Tokenizer,
        workdir: Path,
    ) -> None:
        super().__init__(cfg, config, trainer, tokenizer, workdir)
        self._sources = self._open()
        self._starts = {name: batches.state() for name, (batches, _) in self._sources.items()}
        replicated = NamedSharding(trainer.mesh, PartitionSpec())
        self._program = jax.jit(self._statistics, out_shardings=replicated)
        self._compiled: dict[Any, Callable[..., Metrics]] = {}  # by the shapes of a batch

    @classmethod
    def check(cls, cfg: TrainConfig, config: EvalConfig) -> None:
        if cfg.latents:
            _open_latents(cfg, config, RowShares((0,), 1, True)).close()
        else:
            super().check(cfg, config)

    def run(self, state: TrainState, step: int, stop: Stop) -> EvalResult | None:
        weights = {"": state.trained | state.frozen}
        if state.ema:
            weights[EMA] = state.ema | state.frozen
        sums = {prefix: {name: _RunningSums() for name in self._sources} for prefix in weights}
        with ProgressBar(
            f"{self.config.name} at step {step}",
            self.config.batches * sum(rows for _, rows in self._sources.values()),
            "row",
            enabled=jax.process_index() == 0,
            min_seconds=BRIEF_SECONDS,
        ) as bar:
            for name, (_, rows) in self._sources.items():
                for number, batch in enumerate(self._read(name)):
                    noise = np.uint32(zlib.crc32(f"{name}/{number}".encode()))
                    for prefix, params in weights.items():
                        program = self._compile(params, batch, rows)
                        statistics = jax.device_get(program(params, batch, np.int32(rows), noise))
                        add_statistics(sums[prefix][name], statistics, rows)
                    bar.add(rows)
                    if stop():
                        return None
        return EvalResult(self._metrics(sums))

    def close(self) -> None:
        for batches, _ in self._sources.values():
            batches.close()

    def _open(self) -> dict[str, tuple[Batches | LatentBatches, int]]:
        """Returns the batches of each source, and their rows without padding.

        Raises:
            UserError: data cannot be read.
        """
        cfg, config, shares = self.cfg, self.config, row_shares(self.trainer.mesh)
        if cfg.accumulate > 1 and not config.batch_size:  # a whole batch may not fit
            part = cfg.data.batch_size // cfg.accumulate
            config = dataclasses.replace(config, batch_size=part)
        if cfg.latents:
            latents = _open_latents(cfg, config, shares)
            rows = config.batch_size or cfg.data.batch_size
            check_rows(rows, 1, self.trainer.mesh)
            return {"latents": (latents, rows)}
        data = config.data(cfg.data)
        kind = self.trainer.objective.batch_kind
        opened = batches_of_each_source(
            data,
            self.tokenizer,
            kind,
            shares.numbers,
            shares.count,
            recount=jax.process_count() == 1,
            pad_to=shares.count,
        )
        own = {source.name: source.batch_size for source in data.sources}
        return {
            name: (batches, own.get(name) or data.batch_size) for name, batches in opened.items()
        }

    def _read(self, source: str) -> Iterator[Batch]:
        """Yields the batches of a source as global arrays, and reads one ahead on a thread."""
        batches = self._sources[source][0]
        batches.restore(self._starts[source])
        with ThreadPoolExecutor(1, "emu-jax-held-out") as pool:
            ahead = pool.submit(self._next, batches)
            for number in range(self.config.batches):
                local = ahead.result()
                if number + 1 < self.config.batches:
                    ahead = pool.submit(self._next, batches)
                yield global_batch(local, self.trainer.mesh)

    def _next(self, batches: Batches | LatentBatches) -> dict[str, np.ndarray]:
        batch = next(batches)
        if self.trainer.objective.batch_kind == "rows":
            batch["text_bytes"] = self.tokenizer.text_bytes(batch["tokens"])
        return batch

    def _statistics(
        self, params: ModelParams, batch: Batch, rows: Int[Array, ""], noise: UInt32[Array, ""]
    ) -> Metrics:
        """Returns `Objective.held_out` of a batch, whose first `rows` rows are not padding."""
        module = self.trainer.template.module(params)
        key = jax.random.fold_in(jax.random.key(_SEED), noise)
        padded = len(next(iter(batch.values())))
        return self.trainer.objective.held_out(module, batch, jnp.arange(padded) < rows, key)

    def _compile(self, params: ModelParams, batch: Batch, rows: int) -> Callable[..., Metrics]:
        """Returns the program for a batch, which all processes compile before any runs it."""
        shapes = tuple((name, array.shape) for name, array in batch.items())
        if shapes not in self._compiled:
            args = params, batch, np.int32(rows), np.uint32(0)
            self._compiled[shapes] = self._program.lower(*args).compile()
            barrier = ocp.multihost.get_barrier_sync_fn()
            key = f"compiled evaluation {self.config.name} {len(self._compiled)}"
            barrier(key=key, timeout_ms=1000 * COMPILE_SECONDS)
        return self._compiled[shapes]

    def _metrics(self, sums: Mapping[str, Mapping[str, _RunningSums]]) -> dict[str, float]:
        """Returns the metrics of {prefix: {source: sums}}."""
        metrics: dict[str, float] = {}
        for prefix, of_sources in sums.items():
            total = _RunningSums()
            for source in of_sources.values():
                for name, value in source.items():
                    total[name] = total.get(name, 0.0) + value
            for label, values in {"": total, **of_sources}.items():
                path = f"{prefix}{label}/" if label else prefix
                found = self.trainer.objective.held_out_metrics(values)
                metrics |= {f"{path}{name}": value for name, value in found.items()}
        return metrics


def _open_latents(cfg: TrainConfig, config: EvalConfig, shares: RowShares) -> LatentBatches:
    """Opens the conditions and latents of held-out documents.

    Raises:
        UserError: they are missing, or belong to another model.
    """
    if not config.root:
        raise UserError(
            "no held-out latents: set its root to a folder that `emu-jax precompute` wrote from "
            "documents that are not trained on, or train without it (--config.eval='()')"
        )
    data = dataclasses.replace(
        cfg.data,
        batch_size=config.batch_size or cfg.data.batch_size,
        seed=0,
        drop_condition=0.0,
        prefetch=0,
    )
    return LatentBatches(as_path(config.root), data, cfg.model, shares.numbers, shares.count)
