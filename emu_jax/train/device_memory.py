"""Bytes per device of a step that are known from shapes and shardings, without compiling it."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from emu_jax.sharding import batch_sharding
from emu_jax.train.objectives import Batch, Objective
from emu_jax.train.step import ModelParams, Params, Trainer

AbstractArrays = dict[str, jax.ShapeDtypeStruct]


def abstract_batch(trainer: Trainer, objective: Objective | None = None) -> AbstractArrays:
    """Returns a global batch as abstract arrays, with its rows sharded.

    Args:
        objective: by default the trainer's; another has batches of other sizes.
    """
    where = batch_sharding(trainer.mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
        for name, (shape, dtype) in (objective or trainer.objective).batch_shapes().items()
    }


def shard_bytes(tree: Any) -> float:
    """Returns the bytes of one device's shards of abstract arrays."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )


def memory_by_kind(trainer: Trainer, batch: AbstractArrays) -> dict[str, float]:
    """Returns the bytes per device known without compiling: all but the step's temporaries."""
    state = trainer.state_shapes
    return {
        "parameters": shard_bytes((state.trained, state.frozen, state.ema)),
        "optimizer": shard_bytes(state.optimizer),
        "batch": shard_bytes(batch),
        "activations": kept_bytes(trainer, batch),
    }


def kept_bytes(trainer: Trainer, batch: AbstractArrays) -> float:
    """Returns the bytes per device that the forward pass saves for the backward pass.

    These are the residuals of the VJP except parameters, assumed to be sharded like the tokens and
    the images of the batch.
    """
    state = trainer.state_shapes

    def backward(trained: Params, frozen: ModelParams, batch: Batch) -> Any:
        loss = lambda p: trainer.loss({**p, **frozen}, batch, jnp.int32(0))[0]  # noqa: E731
        return jax.vjp(loss, trained)[1]

    saved = jax.eval_shape(backward, state.trained, state.frozen, batch)
    parameters = {leaf.shape for leaf in jax.tree.leaves((state.trained, state.frozen))}
    ways = trainer.mesh.size // trainer.mesh.shape["tensor"] * trainer.cfg.accumulate
    return sum(
        float(math.prod(leaf.shape)) * leaf.dtype.itemsize / ways
        for leaf in jax.tree.leaves(saved)
        if leaf.shape not in parameters and jnp.issubdtype(leaf.dtype, jnp.number)
    )
