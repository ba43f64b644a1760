"""Attention for compilers without a fused kernel: it never holds all scores of a long causal row,
and saves no weights for its backward pass.

The backend `blockwise` computes with it on any device, and `cpu.py` builds on it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from emu_jax.models import xla
from emu_jax.models.remat import CHECKPOINT_ATTENTION, RECOMPUTED_SCOPE

# Longer causal rows are computed in blocks of this many queries, which skips up to half of the
# scores.
CAUSAL_BLOCK = 256


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"] | Float[Array, "B G K S"],
    v: Float[Array, "B S G K"] | Float[Array, "B G S K"],
    *,
    causal: bool,
    segment_ids: Int[Array, "B T"] | None,
    mask: Bool[Array, "#B 1 T S"] | None,
    bias: Float[Array, "1 H T S"] | None,
    scale: float,
    dropout: Callable[[Float[Array, "B H T S"]], Float[Array, "B H T S"]] | None,
    cached: bool,
) -> Float[Array, "B T H K"]:
    """Computes long causal rows one block of queries at a time, and others by `xla.attention`."""
    if is_long_causal(q, causal, mask, bias, dropout, cached):
        return causal_attention(*scale_queries(q, scale), k, v, segment_ids)
    return xla.attention(
        q,
        k,
        v,
        causal=causal,
        segment_ids=segment_ids,
        mask=mask,
        bias=bias,
        scale=scale,
        dropout=dropout,
        cached=cached,
    )


def is_long_causal(
    q: Float[Array, "B T H K"],
    causal: bool,
    mask: Bool[Array, "#B 1 T S"] | None,
    bias: Float[Array, "1 H T S"] | None,
    dropout: Callable[[Float[Array, "B H T S"]], Float[Array, "B H T S"]] | None,
    cached: bool,
) -> bool:
    """Returns whether `causal_attention` serves a call."""
    plain = mask is None and bias is None and dropout is None and not cached
    return plain and causal and q.shape[1] > CAUSAL_BLOCK


def scale_queries(
    q: Float[Array, "B T H K"], scale: float
) -> tuple[Float[Array, "B T H K"], float]:
    """Returns queries, and the scale that is left to apply to their scores.

    Scales float32 queries here; others would be rounded.
    """
    return (q * scale, 1.0) if q.dtype == jnp.float32 else (q, scale)


def causal_attention(
    q: Float[Array, "B T H K"],
    scale: float,
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B T H K"]:
    """Causal attention in which each block of queries sees the keys up to its end."""
    out = []
    for start in range(0, q.shape[1], CAUSAL_BLOCK):
        end = min(start + CAUSAL_BLOCK, q.shape[1])
        mask = (jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :])[None, None]
        if segment_ids is not None:
            mask &= (segment_ids[:, start:end, None] == segment_ids[:, None, :end])[:, None]
        block, mask = xla.fold_groups(q[:, start:end], mask, k.shape[2])
        part: Any = flash_style_attention(block, k[:, :end], v[:, :end], mask, scale)
        out.append(xla.unfold_groups(part, end - start))
    return jnp.concatenate(out, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def flash_style_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H K"],
    mask: Bool[Array, "#B 1 T S"] | None,
    scale: float,
) -> Float[Array, "B T H K"]:
    """Attention with a FlashAttention-style backward pass.

    Normalizes the output instead of the weights, and saves it with the row maxima and sums; the
    backward pass recomputes the weights from these.
    """
    return _flash_style_fwd(q, k, v, mask, scale)[0]


def _flash_style_fwd(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H K"],
    mask: Bool[Array, "#B 1 T S"] | None,
    scale: float,
) -> tuple[Float[Array, "B T H K"], tuple[Any, ...]]:
    inputs = q, k, v, mask
    q, k, v = _heads_first(q, k, v)
    scores = _scores(q, k, mask, scale)
    row_max = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - row_max)
    out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    row_sum = jnp.sum(weights, axis=-1, keepdims=True)
    out = (out / row_sum).astype(v.dtype).swapaxes(1, 2)
    out, row_max, row_sum = (
        checkpoint_name(x, CHECKPOINT_ATTENTION) for x in (out, row_max, row_sum)
    )
    return out, (*inputs, out, row_max, row_sum)


def _flash_style_bwd(
    scale: float, saved: tuple[Any, ...], d_out: Float[Array, "B T H K"]
) -> tuple[Float[Array, "B T H K"], Float[Array, "B S H K"], Float[Array, "B S H K"], None]:
    q, k, v, mask, out, row_max, row_sum = saved
    q, k, v, out, d_out = _heads_first(q, k, v, out, d_out)
    with jax.named_scope(RECOMPUTED_SCOPE):
        scores = _scores(q, k, mask, scale)
    weights = jnp.exp(scores - row_max) / row_sum
    both = d_out.astype(jnp.float32) * out.astype(jnp.float32)
    d_scores = weights * (_scores(d_out, v) - jnp.sum(both, axis=-1, keepdims=True)) * scale
    if mask is not None:  # fully masked queries have uniform weights, not zeros
        d_scores = jnp.where(mask, d_scores, 0)
    d_scores = d_scores.astype(v.dtype)
    d_q = jnp.matmul(d_scores, k)
    d_k = jnp.einsum("bhts,bhtk->bhsk", d_scores, q)
    d_v = jnp.einsum("bhts,bhtk->bhsk", weights.astype(v.dtype), d_out)
    d_q, d_k, d_v = _heads_first(d_q, d_k, d_v)
    return d_q, d_k, d_v, None


flash_style_attention.defvjp(_flash_style_fwd, _flash_style_bwd)


def _heads_first(*arrays: Float[Array, "B _ _ K"]) -> list[Float[Array, "B _ _ K"]]:
    return [x.swapaxes(1, 2) for x in arrays]


def _scores(
    q: Float[Array, "B H T K"],
    k: Float[Array, "B H S K"],
    mask: Bool[Array, "#B 1 T S"] | None = None,
    scale: float = 1.0,
) -> Float[Array, "B H T S"]:
    scores = jnp.einsum("bhtk,bhsk->bhts", q, k, preferred_element_type=jnp.float32) * scale
    return scores if mask is None else jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
