"""Quantized training: matmuls in int8 or fp8, forward and backward.

A tower whose `matmul_dtype` is set computes the matmuls of its layers here. Its parameters stay in
float32. Everything else in the layers (norms, softmax, attention, adapters) and outside them
(embeddings, logits, losses, regression) stays in the compute dtype. `quantized.py` has another kind
of quantization, that of stored weights.

In y = x @ kernel, x has a scale for each token and kernel one for each output channel: the largest
absolute value divided by the largest number of the dtype. No scale depends on the summed axis, so
they multiply the result.
The backward pass is that of the quantized operands, which pass their gradients to x and kernel
(the straight-through estimator), with dy quantized too:

    dx = (dy * kernel's scales) @ kernel^T, the first operand quantized for each token
    dkernel = x^T @ dy

int8   both operands of y and dx. dkernel is in the compute dtype, as in SwitchBack (Wortsman et
       al. 2023, arXiv:2304.13013): it sums over tokens, whose gradients differ by orders of
       magnitude, more than 8 bits with one scale can represent. Gradients are rounded
       stochastically, so that dx and dkernel are right on average.
fp8    float8_e4m3fn, and float8_e5m2 for gradients, in all three (Micikevicius et al. 2022,
       arXiv:2209.05433). A scale for each output channel serves dkernel: the exponent keeps small
       gradients. The nearest number is taken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from emu_jax.models.backend import kernels
from emu_jax.models.remat import CHECKPOINT_MATMUL

# Dtypes of operands and of gradients, by the values of `TrainConfig.matmul_dtype`.
MATMUL_DTYPES: dict[str, tuple[DTypeLike, DTypeLike]] = {
    "int8": (jnp.int8, jnp.int8),
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2),
}
# The least absolute maximum of a row: a smaller one would make its scale denormal, which
# accelerators flush to 0.
LEAST = 1e-30


class Scaled(NamedTuple):
    """An array in 8 bits, as `values * scales`."""

    values: jax.Array
    scales: jax.Array  # float32, with 1 in place of the axes that share a scale


@dataclasses.dataclass
class _Settings:
    """The dtype of a layer's matmuls and its key. Each matmul uses the next subkey."""

    dtype: str
    key: Key[Array, ""] | None
    calls: int = 0

    def next_key(self) -> Key[Array, ""] | None:
        self.calls += 1
        return None if self.key is None else jax.random.fold_in(self.key, self.calls)


_settings: ContextVar[_Settings | None] = ContextVar("low_precision", default=None)


@contextlib.contextmanager
def use_matmul_dtype(dtype: str, key: Key[Array, ""] | None) -> Iterator[None]:
    """Makes `low_precision_matmul` compute in `dtype`: a key of `MATMUL_DTYPES`, or "" for the
    compute dtype.

    Args:
        key: for the stochastic rounding of gradients; without it they are rounded to the nearest.
    """
    token = _settings.set(_Settings(dtype, key) if dtype else None)
    try:
        yield
    finally:
        _settings.reset(token)


def split_key(
    key: Key[Array, ""] | None, dtype: str
) -> tuple[Key[Array, ""] | None, Key[Array, ""] | None]:
    """Returns a tower's key for its other purposes, and its key for rounding.

    The latter is None, and the former is `key`, if `dtype` rounds nothing stochastically.
    """
    if key is None or dtype != "int8":
        return key, None
    key, rounding_key = jax.random.split(key)
    return key, rounding_key


def low_precision_matmul(
    x: Float[Array, "*T D"], kernel: Float[Array, "D E"]
) -> Float[Array, "*T E"]:
    """Returns x @ kernel in their dtype, computed in the dtype that `use_matmul_dtype` chose."""
    settings = _settings.get()
    if settings is None:
        return kernels().matmul(x, kernel)
    return _matmul(x, kernel, settings.next_key(), settings.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(
    x: Float[Array, "*T D"], kernel: Float[Array, "D E"], key: Key[Array, ""] | None, dtype: str
) -> Float[Array, "*T E"]:
    return _matmul_fwd(x, kernel, key, dtype)[0]


def _matmul_fwd(
    x: Float[Array, "*T D"], kernel: Float[Array, "D E"], key: Key[Array, ""] | None, dtype: str
) -> tuple[Float[Array, "*T E"], tuple[Scaled, Scaled, Key[Array, ""] | None]]:
    operands, _ = MATMUL_DTYPES[dtype]
    rows, columns = scaled(x, operands, (-1,)), scaled(kernel, operands, (0,))
    y = kernels().low_precision_dot(rows.values, columns.values, ((x.ndim - 1,), (0,)))
    y = (y * rows.scales * columns.scales).astype(x.dtype)
    # Policies that save matmuls save this one, not its sums in 32 bits.
    return checkpoint_name(y, CHECKPOINT_MATMUL), (rows, columns, key)


def _matmul_bwd(
    dtype: str, saved: tuple[Scaled, Scaled, Key[Array, ""] | None], dy: Float[Array, "*T E"]
) -> tuple[Float[Array, "*T D"], Float[Array, "D E"], None]:
    x, kernel, key = saved
    _, gradients = MATMUL_DTYPES[dtype]
    noise = None if key is None else rounding_noise(key, dy.shape)
    rows = scaled(dy * kernel.scales, gradients, (-1,), noise)
    dx = kernels().low_precision_dot(rows.values, kernel.values, ((dy.ndim - 1,), (1,)))
    dx = (dx * rows.scales).astype(dy.dtype)

    tokens = tuple(range(dy.ndim - 1))
    if dtype == "int8":
        wide = (x.values * x.scales).astype(dy.dtype)
        dkernel = jnp.tensordot(wide, dy, (tokens, tokens), preferred_element_type=dy.dtype)
    else:
        columns = scaled(dy * x.scales, gradients, tokens)
        # In the compute dtype, in which devices sum their parts of it.
        dkernel = kernels().low_precision_dot(x.values, columns.values, (tokens, tokens), dy.dtype)
        dkernel = (dkernel * columns.scales.reshape(-1)).astype(dy.dtype)
    return dx, dkernel, None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def scaled(
    x: Float[Array, "*shape"],
    dtype: DTypeLike,
    axes: tuple[int, ...],
    noise: Float[Array, "*shape"] | None = None,
) -> Scaled:
    """Quantizes an array with a scale for all values along `axes`: the largest absolute value
    becomes the largest number of `dtype`.

    Args:
        noise: in (0, 1), for stochastic rounding to int8: a value is rounded up with the
            probability of its fraction. Without it, the nearest number is taken.
    """
    limit = 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    largest = jnp.max(jnp.abs(x), axes, keepdims=True).astype(jnp.float32)
    scales = jnp.maximum(largest, LEAST) / limit
    x = jnp.clip(x.astype(jnp.float32) / scales, -limit, limit)
    if dtype == jnp.int8:
        x = jnp.round(x) if noise is None else jnp.floor(x + noise)
    return Scaled(x.astype(dtype), scales)


def rounding_noise(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "*shape"]:
    """Returns uniform noise in (0, 1), a random number of each row plus one of each column, modulo
    1.

    Any two entries are independent, so sums of rounding errors have the variance that they have
    with a random number for each entry. There are fewer to generate: rows + columns.
    """
    row_key, column_key = jax.random.split(key)
    rows = jax.random.bits(row_key, (*shape[:-1], 1), jnp.uint32)
    columns = jax.random.bits(column_key, shape[-1:], jnp.uint32)
    # 16 bits: more would be rounded when they are added to numbers up to 127.
    # The half centers it: its mean is 1/2.
    return (((rows + columns) >> 16).astype(jnp.float32) + 0.5) / 2**16
