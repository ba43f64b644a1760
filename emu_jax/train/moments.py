"""Adam's moments in 8 bits: codes with a scale per block.

Blocks as in Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (ICLR 2022): an outlier
costs precision in its own block alone. Embeddings and small arrays stay in float32, as there.
Optax has no quantized state.

Codes are linear in a root of the value (companding): the square root of the first moment, the
fourth root of the second. Like the paper's dynamic code, this spends the codes on small values, but
it needs no table, whose look-ups are slow on TPUs. Rounding is stochastic: codes are right on
average. In a step the second moment moves by a few percent, often less than the distance between
two codes. Rounded to the nearest one, it would stand still.

A block lies along an axis of its parameter that `fsdp` does not split, so that no block is spread
over devices. Where the blocks lie depends on the parameter alone: a checkpoint can be restored onto
any mesh.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8, UInt32

from emu_jax.sharding import RULES

BLOCK = 128  # values that share a scale, at most; a power of two
LEAST_BLOCK = 16  # with fewer, a quarter of the memory would be scales
TENSOR_WAYS = 8  # of an axis: no block crosses the shards of up to this many ways of `tensor`
LEAST_SIZE = 4096  # of an array whose moments are quantized
MU_LEVELS, NU_LEVELS = 127, 255
MU_ROOT, NU_ROOT = 2, 4
ROUNDING_SEED = 0x8B17


class Quantized(NamedTuple):
    """A moment in 8 bits. `codes` has the shape of the parameter; in `scales`, the axis of the
    blocks has one entry for each."""

    codes: Int8[Array, "..."] | UInt8[Array, "..."]
    scales: Float[Array, "..."]


def block_axis(
    path: str, shape: tuple[int, ...], axes: tuple[str | None, ...] | None = None
) -> int | None:
    """Returns the axis along which the moments of a parameter are quantized, or None if they stay
    in float32.

    Args:
        axes: logical axes of the parameter.
    """
    if len(shape) < 2 or math.prod(shape) < LEAST_SIZE or path.endswith("embedding"):
        return None
    names = axes or (None,) * len(shape)
    # `fsdp` splits the first axis that may be split into pieces smaller than a block.
    split = next((n for n, name in enumerate(names) if name and RULES[name] == "fsdp"), None)
    fits = [n for n, x in enumerate(shape) if n != split and block_size(x) >= LEAST_BLOCK]
    return fits[-1] if fits else None


def block_size(length: int) -> int:
    """Returns the values of a block along an axis: the largest power of two, up to `BLOCK`, that
    divides the pieces of `TENSOR_WAYS`, or else the whole axis."""
    size = math.gcd(length // TENSOR_WAYS, BLOCK) if length % TENSOR_WAYS == 0 else 0
    return size if size >= LEAST_BLOCK else math.gcd(length, BLOCK)


def encode_mu(
    mu: Float[Array, "..."], axis: int, noise: UInt32[Array, "..."] | None = None
) -> Quantized:
    """Quantizes a first moment. Without `noise`, random bits, it rounds to the nearest code."""
    scales = _scales(jnp.abs(mu), axis)
    roots = jnp.sqrt(_relative(jnp.abs(mu), scales, axis)) * MU_LEVELS
    codes = _round(roots, None if noise is None else noise >> 16, MU_LEVELS)
    return Quantized((jnp.sign(mu) * codes).astype(jnp.int8), scales)


def encode_nu(
    nu: Float[Array, "..."], axis: int, noise: UInt32[Array, "..."] | None = None
) -> Quantized:
    """Quantizes a second moment. A positive value never becomes 0, by which the update would be
    divided."""
    scales = _scales(nu, axis)
    roots = jnp.sqrt(jnp.sqrt(_relative(nu, scales, axis))) * NU_LEVELS
    codes = _round(roots, None if noise is None else noise & 0xFFFF, NU_LEVELS)
    return Quantized(jnp.where(nu > 0, jnp.maximum(codes, 1), 0).astype(jnp.uint8), scales)


def dequantize(moment: Quantized) -> Float[Array, "..."]:
    """Returns a moment in float32. The dtype of its codes distinguishes the first moment from the
    second."""
    codes, scales = moment.codes.astype(jnp.float32), moment.scales
    if moment.codes.dtype == jnp.int8:
        values = jnp.sign(codes) * (codes / MU_LEVELS) ** MU_ROOT
    else:
        values = (codes / NU_LEVELS) ** NU_ROOT
    axis = next(n for n in range(codes.ndim) if codes.shape[n] != scales.shape[n])
    return (_blocks(values, axis) * jnp.expand_dims(scales, axis + 1)).reshape(codes.shape)


def rounding_bits(
    count: jax.typing.ArrayLike,
    axes: Mapping[str, int | None],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, UInt32[Array, "..."]]:
    """Returns random bits for each quantized parameter, a function of the number of the step."""
    key = jax.random.fold_in(jax.random.key(ROUNDING_SEED), jnp.asarray(count))
    paths = sorted(path for path, axis in axes.items() if axis is not None)
    keys = jax.random.split(key, len(paths)) if paths else []
    return {
        path: jax.random.bits(k, shapes[path], jnp.uint32)
        for path, k in zip(paths, keys, strict=True)
    }


def _blocks(x: Array, axis: int) -> Array:
    """Splits an axis into (blocks, values of a block)."""
    size = block_size(x.shape[axis])
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def _scales(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Returns the largest value of each block."""
    return jnp.max(_blocks(x, axis), axis + 1)


def _relative(x: Array, scales: Array, axis: int) -> Array:
    """Returns values as fractions of the scale of their block, 0 where all of it is 0."""
    positive = jnp.where(scales > 0, scales, 1)
    return (_blocks(x, axis) / jnp.expand_dims(positive, axis + 1)).reshape(x.shape)


def _round(x: Array, noise: UInt32[Array, "..."] | None, levels: int) -> Array:
    """Rounds to whole codes: to the nearest, or up with the probability of the fraction, given 16
    random bits."""
    offset = 0.5 if noise is None else noise.astype(jnp.float32) / 2**16
    return jnp.minimum(jnp.floor(x + offset), levels)
