"""The plain kernels: the reference that every other backend is tested against.

They run on any device. `cpu.py` and `tpu.py` have the same entry points. `backend.kernels` chooses
among them.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Real, Shaped

from emu_jax.config import LlamaConfig
from emu_jax.models.kv_cache import KVCache
from emu_jax.models.remat import CHECKPOINT_ATTENTION

# --- Matmul, norms, convolutions, GELU, rotation --------------------------------------------------


def matmul(
    x: Float[Array, "*T D"], kernel: Float[Array, "D E"], dtype: DTypeLike | None = None
) -> Float[Array, "*T E"]:
    """Returns x @ kernel in `dtype`, by default the dtype of `x`."""
    return jnp.matmul(x, kernel, preferred_element_type=dtype or x.dtype)


def low_precision_dot(
    x: Shaped[Array, "..."],
    y: Shaped[Array, "..."],
    axes: tuple[tuple[int, ...], tuple[int, ...]],
    dtype: DTypeLike | None = None,
) -> Real[Array, "..."]:
    """Returns the sums of products of two arrays in int8 or fp8 over axes of each.

    They are in `dtype`, by default in int32 or float32.
    """
    dtype = dtype or (jnp.int32 if x.dtype == jnp.int8 else jnp.float32)
    return jax.lax.dot_general(x, y, (axes, ((), ())), preferred_element_type=dtype)


def standardize(x: Float[Array, "*T D"], eps: float) -> Float[Array, "*T D"]:
    """Shifts and scales the last axis to zero mean and unit variance, in float32."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps)


def layer_norm(
    x: Float[Array, "*T D"], scale: Float[Array, "D"], bias: Float[Array, "D"], eps: float
) -> Float[Array, "*T D"]:
    """LayerNorm over the last axis, computed in float32."""
    return (standardize(x, eps) * scale + bias).astype(x.dtype)


def rms_norm(x: Float[Array, "*T D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*T D"]:
    """Returns x / rms(x) * scale over the last axis, computed in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype)


def convolution(
    x: Float[Array, "B Hh Ww C"],
    kernel: Float[Array, "p q C E"],
    stride: int = 1,
    padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1)),
) -> Float[Array, "B Yy Xx E"]:
    """Applies a 2D convolution without bias; `padding` is ((top, bottom), (left, right))."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def upsampled_convolution(
    x: Float[Array, "B Hh Ww C"],
    weights: Callable[[DTypeLike], tuple[Float[Array, "3 3 C E"], Float[Array, "E"]]],
) -> Float[Array, "B 2*Hh 2*Ww E"]:
    """Applies a 3 x 3 convolution to `x` with both sides doubled by repeating pixels.

    `weights` returns the kernel and the bias in a given dtype.
    """
    x = repeat(x, "b h w c -> b (h p) (w q) c", p=2, q=2)
    kernel, bias = weights(x.dtype)
    return convolution(x, kernel) + bias


def gelu(x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
    """Returns the exact GELU of `x`."""
    return jax.nn.gelu(x, approximate=False)


def rotate_pairs(
    x: Float[Array, "B T H K"],
    cos: Float[Array, "B T 1 pairs"],
    sin: Float[Array, "B T 1 pairs"],
) -> Float[Array, "B T H K"]:
    """Rotates entries i and i + K/2 of a head by an angle, in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


# --- Attention -----------------------------------------------------------------------------------


def causal_mask(length: int) -> Bool[Array, "1 1 T T"]:
    """Returns a mask that is True where a key is not after the query."""
    return jnp.tril(jnp.ones((length, length), bool))[None, None]


def segment_mask(segments: Int[Array, "B T"] | None) -> Bool[Array, "B 1 T T"] | None:
    """Returns a mask that is True where query and key are in the same document of a packed row."""
    return None if segments is None else (segments[:, :, None] == segments[:, None, :])[:, None]


def joint_mask(
    length: int,
    causal: bool,
    segment_ids: Int[Array, "B T"] | None,
    mask: Bool[Array, "#B 1 T S"] | None,
) -> Bool[Array, "#B 1 T S"] | None:
    """Combines the masks that `attention` takes into one."""
    for other in (causal_mask(length) if causal else None, segment_mask(segment_ids)):
        mask = other if mask is None else mask if other is None else mask & other
    return mask


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
    """Attention that computes all scores at once."""
    length, key_heads = q.shape[1], k.shape[1 if cached else 2]
    mask = joint_mask(length, causal, segment_ids, mask)
    q, mask = fold_groups(q, mask, key_heads)
    out = plain_attention(q, k, v, mask, bias, scale, dropout, cached)
    return checkpoint_name(unfold_groups(out, length), CHECKPOINT_ATTENTION)


def fold_groups(
    q: Float[Array, "B T H K"], mask: Bool[Array, "#B 1 T S"] | None, key_heads: int
) -> tuple[Float[Array, "B _ G K"], Bool[Array, "#B 1 _ S"] | None]:
    """Returns queries with as many heads as keys, and their mask.

    Heads that share a key become more queries of one head, so that keys and values need not be
    repeated. `unfold_groups` is the inverse.
    """
    group = q.shape[2] // key_heads
    if group == 1:
        return q, mask
    q = rearrange(q, "b t (g r) k -> b (r t) g k", g=key_heads)
    return q, None if mask is None else jnp.tile(mask, (1, 1, group, 1))


def unfold_groups(out: Float[Array, "B _ G K"], length: int) -> Float[Array, "B T H K"]:
    """Returns the heads of `length` queries that `fold_groups` folded."""
    if out.shape[1] == length:
        return out
    return rearrange(out, "b (r t) g k -> b t (g r) k", t=length)


def plain_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S H K"] | Float[Array, "B H K S"],
    v: Float[Array, "B S H K"] | Float[Array, "B H S K"],
    mask: Bool[Array, "#B 1 T S"] | None,
    bias: Float[Array, "1 H T S"] | None = None,
    scale: float = 1.0,
    dropout: Callable[[Float[Array, "B H T S"]], Float[Array, "B H T S"]] | None = None,
    cached: bool = False,
) -> Float[Array, "B T H K"]:
    """The textbook computation: all scores at once, a softmax in float32, a weighted sum."""
    keys, values = ("bhks", "bhsk") if cached else ("bshk", "bshk")
    scores = jnp.einsum(f"bthk,{keys}->bhts", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    if dropout is not None:
        weights = dropout(weights)
    out = jnp.einsum(f"bhts,{values}->bhtk", weights, v)
    return rearrange(out, "b h t k -> b t h k")


# --- Cross-entropy -------------------------------------------------------------------------------


def cross_entropy(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    *,
    vocab: int,
    block: int,
    axis: str | None = None,
    matmul: Callable[..., jax.Array] = matmul,
) -> Float[Array, "B T"]:
    """Returns the cross-entropy of each target under the logits hidden @ kernel, in float32.

    Args:
        vocab: number of columns of the whole kernel that are tokens; the rest are padding.
        block: number of positions whose logits are held at a time; 0 for all (`in_blocks`).
        axis: the mesh axis over which the columns are split.
    """
    first = 0 if axis is None else jax.lax.axis_index(axis) * kernel.shape[1]
    column = first + jnp.arange(kernel.shape[1])

    def losses(hidden: Float[Array, "B t D"], targets: Int[Array, "B t"]) -> Float[Array, "B t"]:
        logits = matmul(hidden, kernel, jnp.float32)
        logits = jnp.where(column < vocab, logits, -jnp.inf)
        row_max = jnp.max(jax.lax.stop_gradient(logits), axis=-1)
        if axis is not None:
            row_max = jax.lax.pmax(row_max, axis)
        row_sum = jnp.sum(jnp.exp(logits - row_max[..., None]), axis=-1)
        target_logit = jnp.sum(jnp.where(column == targets[..., None], logits, 0), axis=-1)
        if axis is not None:
            row_sum, target_logit = jax.lax.psum((row_sum, target_logit), axis)
        return jnp.log(row_sum) + row_max - target_logit

    return in_blocks(losses, hidden, targets, block)


def in_blocks(
    losses: Callable[[Float[Array, "B t D"], Int[Array, "B t"]], Float[Array, "B t"]],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    block: int,
) -> Float[Array, "B T"]:
    """Calls `losses` on at most `block` positions of each row at a time.

    The backward pass recomputes each block. With a block of 0 all positions are computed at once,
    and saved.
    """
    if block == 0:
        return losses(hidden, targets)
    length = hidden.shape[1]
    blocks = next(n for n in range(-(-length // block), length + 1) if length % n == 0)

    def step(
        _: None, part: tuple[Float[Array, "B t D"], Int[Array, "B t"]]
    ) -> tuple[None, Float[Array, "B t"]]:
        return None, jax.checkpoint(losses)(*part)

    hidden, targets = (
        rearrange(x, "b (n t) ... -> n b t ...", n=blocks) for x in (hidden, targets)
    )
    _, out = jax.lax.scan(step, None, (hidden, targets))
    return rearrange(out, "n b t -> b (n t)")


# --- Decoding ------------------------------------------------------------------------------------


def top_k(scores: Float[Array, "B V"], count: int) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """Returns the largest scores of each row in descending order, and their indices."""
    values, indices = jax.lax.top_k(scores, count)
    return values, indices


def decoding_layers(blocks: nnx.Module, layers: int) -> nnx.Module:
    """Returns stacked layers in the layout that decodes fastest: unchanged."""
    return blocks


def empty_cache(
    blocks: nnx.Module, cfg: LlamaConfig, batch: int, capacity: int, dtype: jnp.dtype
) -> KVCache:
    """Returns a cache with `capacity` free entries per row, in the layout of `blocks`."""
    return KVCache.empty(cfg, batch, capacity, dtype)


# --- Layout of a computation ---------------------------------------------------------------------


def wait_for(x: Float[Array, "..."], array: Shaped[Array, "*A"]) -> Shaped[Array, "*A"]:
    """Returns `array`, whose use need not be made to wait for `x`."""
    return array


def order_exchanges(
    first: Float[Array, "B T D"], second: Float[Array, "B T E"]
) -> Float[Array, "B T E"]:
    """Returns `second`. Whether its devices exchange it before `first` is for the compiler."""
    return second


def guided_denoiser(
    denoise: Callable[
        [Float[Array, "B h w C"], Int[Array, ""], Float[Array, "B N D"]], Float[Array, "B h w C"]
    ],
    cond: Float[Array, "B N D"],
    uncond: Float[Array, "B N D"],
) -> Callable[[Float[Array, "B h w C"], Int[Array, ""]], tuple[Float[Array, "B h w C"], ...]]:
    """Returns a function of latents and timestep that computes the conditional and the
    unconditional prediction in one call of `denoise` on twice the batch."""
    both = jnp.concatenate([cond, uncond])

    def predict(
        x: Float[Array, "B h w C"], t: Int[Array, ""]
    ) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
        conditional, unconditional = jnp.split(denoise(jnp.concatenate([x, x]), t, both), 2)
        return conditional, unconditional

    return predict
