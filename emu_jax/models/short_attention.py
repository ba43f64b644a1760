"""Attention over short rows on TPUs: a Pallas kernel that holds whole rows in VMEM.

The visual encoder's rows have 257 positions and heads 88 wide in Emu1, 1,025 and 112 in Emu2. The
tiles of splash attention, 128 wide, would pad Emu1's to 3.3 times the multiplications and transpose
them to heads first in HBM. Here a program of the grid takes one row in the tower's layout,
[positions, heads x head width], and loops over its heads; of a longer row it takes as many heads as
fill whole vector registers, and loops over parts of the queries too. Scores and weights never leave
the chip, and nothing is transposed or padded. The backward pass recomputes the weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Ref
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

# The most queries or keys per row that the kernel takes.
LONGEST = 1280
# The most queries that a head compares at once: their scores are then a few MiB.
QUERIES = 512
LANES, SUBLANES = 128, 16  # of a vector register of a TPU, in bfloat16
LONG_VMEM = 96 << 20  # bytes for rows of more than QUERIES; the compiler's default is too small

# Names of the kernels in a compiled module.
FORWARD, BACKWARD = "short_attention_fwd", "short_attention_bwd"


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def short_attention(
    q: Float[Array, "B T D"],
    k: Float[Array, "B S D"],
    v: Float[Array, "B S D"],
    heads: int,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T D"]:
    """Returns softmax(scale q k^T) v for each of `heads` equal parts of D, without a mask. The
    softmax is in float32 and the weights in v's dtype, as in `attention.attention`."""
    return _call(_forward, FORWARD, (q, k, v), (q,), heads, scale, interpret)[0]


def _save(
    q: Float[Array, "B T D"],
    k: Float[Array, "B S D"],
    v: Float[Array, "B S D"],
    heads: int,
    scale: float,
    interpret: bool,
) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B _ D"], ...]]:
    return short_attention(q, k, v, heads, scale, interpret), (q, k, v)


def _gradients(
    heads: int,
    scale: float,
    interpret: bool,
    kept: tuple[Float[Array, "B _ D"], ...],
    d_out: Float[Array, "B T D"],
) -> tuple[Float[Array, "B _ D"], ...]:
    return _call(_backward, BACKWARD, (*kept, d_out), kept, heads, scale, interpret)


short_attention.defvjp(_save, _gradients)


def _call(
    kernel: Callable[..., None],
    name: str,
    inputs: tuple[Float[Array, "B _ D"], ...],
    results: tuple[Float[Array, "B _ D"], ...],
    heads: int,
    scale: float,
    interpret: bool,
) -> tuple[Float[Array, "B _ D"], ...]:
    """Runs `kernel` on each row. Its results have the shapes and dtypes of `results`."""
    rows, queries, width = inputs[0].shape
    keys = inputs[1].shape[1]
    products = 2 if kernel is _forward else 5
    together = _heads_together(queries, width // heads, heads)
    lanes = together * (width // heads)
    block = lambda x: pl.BlockSpec(  # noqa: E731
        (1, x.shape[1], lanes), lambda row, part: (row, 0, part)
    )
    return pl.pallas_call(
        functools.partial(kernel, heads=together, scale=scale),
        name=name,
        grid=(rows, heads // together),
        in_specs=[block(x) for x in inputs],
        out_specs=[block(x) for x in results],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=LONG_VMEM if queries > QUERIES else None,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * rows * queries * keys * width,
            transcendentals=rows * heads * queries * keys,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs, *results)),
        ),
        interpret=interpret,
    )(*inputs)


def _heads_together(queries: int, width: int, heads: int) -> int:
    """Returns how many heads one program takes: all of a short row, and of a longer one as few as
    fill whole vector registers."""
    few = LANES // math.gcd(width, LANES)
    return heads if queries <= QUERIES or heads % few else few


def _forward(q: Ref, k: Ref, v: Ref, out: Ref, *, heads: int, scale: float) -> None:
    for lanes in _heads(q, heads):
        keys = (0, slice(None), lanes)
        for queries in _queries(q):
            part = (0, queries, lanes)
            weights = _weights(q[part], k[keys], scale).astype(v.dtype)
            out[part] = _dot(weights, v[keys], 1, 0).astype(out.dtype)


def _backward(
    q: Ref, k: Ref, v: Ref, d_out: Ref, dq: Ref, dk: Ref, dv: Ref, *, heads: int, scale: float
) -> None:
    for lanes in _heads(q, heads):
        keys = (0, slice(None), lanes)
        d_keys, d_values = [], []
        for queries in _queries(q):
            part = (0, queries, lanes)
            weights = _weights(q[part], k[keys], scale)
            d_values.append(_dot(weights.astype(v.dtype), d_out[part], 0, 0))
            d_weights = _dot(d_out[part], v[keys], 1, 1)
            d_scores = weights * (d_weights - jnp.sum(weights * d_weights, axis=1, keepdims=True))
            d_scores = (d_scores * scale).astype(q.dtype)
            dq[part] = _dot(d_scores, k[keys], 1, 0).astype(dq.dtype)
            d_keys.append(_dot(d_scores, q[part], 0, 0))
        dv[keys] = functools.reduce(jnp.add, d_values).astype(dv.dtype)
        dk[keys] = functools.reduce(jnp.add, d_keys).astype(dk.dtype)


def _heads(block: Ref, heads: int) -> list[slice]:
    """Returns the lanes of each head in a block [1, positions, D].

    The list is static: Mosaic can slice lanes at an offset such as 88 only if it is a constant."""
    width = block.shape[-1] // heads
    return [slice(h * width, (h + 1) * width) for h in range(heads)]


def _queries(block: Ref) -> list[slice]:
    """Returns the parts of the queries in a block [1, positions, D] that are compared at once."""
    count = block.shape[1]
    if count <= QUERIES:
        return [slice(None)]
    parts = -(-count // QUERIES)
    size = -(-count // (parts * SUBLANES)) * SUBLANES
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _weights(q: Float[Array, "T K"], k: Float[Array, "S K"], scale: float) -> Float[Array, "T S"]:
    scores = _dot(q, k, 1, 1) * scale
    weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _dot(
    a: Float[Array, "_ _"], b: Float[Array, "_ _"], of_a: int, of_b: int
) -> Float[Array, "_ _"]:
    """Multiplies `a` and `b`, contracting axis `of_a` of `a` with `of_b` of `b`, in float32."""
    return jax.lax.dot_general(
        a, b, (((of_a,), (of_b,)), ((), ())), preferred_element_type=jnp.float32
    )
