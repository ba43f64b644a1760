"""Computes the decoder's conditions and latents once (config key `latents`).

The frozen model is nearly all of a decoder's training step: 14B parameters read a caption for one
gradient of a U-Net of 1B. Computed ahead, conditions and latents cost this once, however often
an image is seen and however many U-Nets are trained. Training then needs the U-Net alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Real

from emu_jax.config import to_dict
from emu_jax.data.latents import PartWriter, Progress, finish, latent_shapes
from emu_jax.errors import UserError
from emu_jax.progress import ProgressBar
from emu_jax.sharding import batch_sharding, row_shares
from emu_jax.train.config import TrainConfig, without_paths
from emu_jax.train.distributed import global_batch, global_state, initialize_distributed
from emu_jax.train.objectives import Batch, DecoderObjective
from emu_jax.train.step import ModelParams, Trainer, mesh_for
from emu_jax.train.warm_start import WarmStart

log = logging.getLogger(__name__)

# Keys that folders of earlier versions were begun without, with the value that changes nothing.
LATER_KEYS = {
    "quantize": "",
    "data.family": "",
    "data.last_image": False,
    "data.n_frame": 0,
    "data.row_group": 0,
    "model.pooling": None,
    "model.other_connector": None,
    "model.tokens.frame": None,
    "model.vision.post_norm": False,
    "model.vision.final_norm": True,
    "model.llama.regression_head": True,
    "model.llama.backbone": "llama",
    "model.llama.key_value_heads": 0,
    "model.llama.rope_scaling": None,
    "model.llama.sliding_window": 0,
    "model.llama.tied_embeddings": False,
    "model.unet.transformer_layers_per_block": 1,
    "model.unet.use_linear_projection": False,
    "model.unet.addition_embed_type": None,
    "model.unet.addition_time_embed_dim": None,
    "model.unet.projection_class_embeddings_input_dim": None,
    "model.scheduler.sampler": "pndm",
}
LATER_SOURCE_KEYS = {"system": None, "url_files": []}  # of each of `data.sources`
PART_BYTES = 1 << 28  # of one process: the most that is computed again after a kill


@dataclasses.dataclass(frozen=True)
class PrecomputeReport:
    """The latents that `precompute` wrote. All fields have JSON types.

    Attributes:
        rows: number of conditions and latents, over all calls.
        folder: where they are.
    """

    rows: int
    folder: str


def precompute(cfg: TrainConfig, folder: Path, rows: int) -> PrecomputeReport:
    """Writes the conditions and latents of the first `rows` documents (rounded up to whole
    batches) of a decoder's training run into `folder`, part by part. An interrupted call resumes
    after the last part that all processes have written, on any number of processes.

    Contexts are written whole. Training chooses which to drop each time it reads them.

    Raises:
        UserError: `cfg` does not train a decoder from a pretrained model, its data cannot be read,
            or `folder` is complete or was written with another config.
    """
    if cfg.latents or not cfg.traits.trains_unet:
        raise UserError("precompute needs the config of a decoder (objective) without latents")
    if rows < 1:
        raise UserError(f"{rows} rows: give at least 1")
    initialize_distributed()
    mesh = mesh_for(cfg)
    shares = row_shares(mesh)
    if len(shares.numbers) * jax.process_count() > shares.count:
        raise UserError(
            "precompute does not support processes that share rows: make mesh.tensor x "
            "mesh.context divide the devices of a process"
        )
    count, index = jax.process_count(), jax.process_index()
    data = dataclasses.replace(cfg.data, drop_condition=0.0)
    with jax.set_mesh(mesh):
        warm_start = WarmStart.resolve(dataclasses.replace(cfg, data=data), folder)
        cfg = warm_start.cfg
        trainer = Trainer(cfg, mesh)
        objective = trainer.objective
        assert isinstance(objective, DecoderObjective)
        tokenizer = objective.prepare_data()
        loaded = warm_start.load(trainer.param_shapes, trainer.quantizers)
        if missing := [path for path in trainer.frozen if path not in loaded]:
            raise UserError(
                f"no parent has {missing[0].split('.')[0]}: set init_from to a pretrained model"
            )
        params = {path: loaded[path] for path in trainer.frozen}
        # Nothing here uses the U-Net, but the module needs parameters for it.
        zeros = {path: jnp.zeros((), a.dtype) for path, a in trainer.param_shapes.items()}

        def module(params: ModelParams) -> Any:
            return trainer.template.module({**zeros, **params})

        @functools.partial(jax.jit, out_shardings=batch_sharding(mesh))  # see `_local`
        def compute(params: ModelParams, batch: Batch) -> tuple[jax.Array, ...]:
            sizes = objective.sizes(batch)
            arrays = objective.conditions_and_latents(module(params), batch)
            return arrays if sizes is None else (*arrays, sizes)

        @jax.jit
        def unconditional(params: ModelParams) -> Float[Array, "N D"]:
            return objective.unconditional(module(params))

        progress = Progress.of(folder, _digest(cfg))
        row_bytes = 2 * sum(map(math.prod, latent_shapes(cfg.model)))
        part_rows = count * max(1, PART_BYTES // row_bytes)
        with (
            objective.batches(tokenizer, shares, resumed=progress.parts > 0) as batches,
            ProgressBar("latents", rows, "row", done=progress.rows, enabled=index == 0) as bar,
        ):
            if progress.parts:
                batches.restore(progress.position)
            while (done := progress.rows) < rows:
                with PartWriter(folder, progress.parts, index) as writer:
                    while done < min(rows, progress.rows + part_rows):
                        batch = global_batch(next(batches), mesh)
                        for row in zip(*map(_local, compute(params, batch)), strict=True):
                            writer.add(*row)
                        # Rows of all processes together. A source may have a batch size of its own.
                        size = len(batch["target"])
                        done += size
                        bar.add(size)
                    writer.close()
                multihost_utils.sync_global_devices(f"latents, part {progress.parts}")
                progress = progress.after(
                    folder, rows=done, processes=count, position=global_state(batches.state())
                )
        empty = np.asarray(multihost_utils.process_allgather(unconditional(params), tiled=True))
        if index == 0:
            finish(folder, progress, model=cfg.model, unconditional=empty, tokenizer=tokenizer)
        multihost_utils.sync_global_devices("latents are complete")
    return PrecomputeReport(progress.rows, str(folder))


def _digest(cfg: TrainConfig) -> str:
    """Returns a digest of the settings that the latents depend on."""
    settings = to_dict(without_paths(cfg))
    names = ("data", "model", "parents", "init_from", "seed", "dtype", "quantize")
    relevant = {name: settings[name] for name in names}
    del relevant["data"]["cache_bytes"]  # folders were begun before there was such a key
    for key, before in LATER_KEYS.items():
        *path, name = key.split(".")
        group = functools.reduce(lambda group, part: group[part] or {}, path, relevant)
        if name in group and group[name] == before:
            del group[name]
    for source in relevant["data"]["sources"]:
        for name, before in LATER_SOURCE_KEYS.items():
            if source[name] == before:
                del source[name]
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]


def _local(array: Real[Array, "global *shape"]) -> Float[np.ndarray, "local *shape"]:
    """Returns this process's rows, in order."""
    rows = {s.index[0].start or 0: s.data for s in array.addressable_shards}
    return np.concatenate([np.asarray(rows[start].astype(jnp.float32)) for start in sorted(rows)])
