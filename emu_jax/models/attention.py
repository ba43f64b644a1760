"""The one attention entry point."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H K"],
    *,
    mask: Bool[Array, "B 1 T S"] | Bool[Array, "1 1 T S"] | None = None,
    bias: Float[Array, "1 H T S"] | None = None,
    scale: float,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
) -> Float[Array, "B T H K"]:
    """softmax(scale q k^T + bias, masked) v, the softmax in float32.

    `dropout` is applied to the weights (T5 does; LLaMA and ViT have none).

    A query whose keys are all masked gets the mean of the values, never NaN.
    """
    scores = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    if dropout is not None:
        weights = dropout(weights)
    return jnp.einsum("bhts,bshk->bthk", weights, v)


def causal_mask(length: int) -> Bool[Array, "1 1 T T"]:
    return jnp.tril(jnp.ones((length, length), bool))[None, None]


def segment_mask(queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Bool[Array, "B 1 T S"]:
    """True where query and key belong to the same document of a packed row."""
    return (queries[:, :, None] == keys[:, None, :])[:, None]
