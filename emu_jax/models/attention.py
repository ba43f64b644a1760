"""The one attention entry point, and its backends.

  xla     any device and the reference: materialises the scores, of long causal rows in blocks.
  splash  TPU: Pallas' blockwise kernel; masked blocks are skipped, scores stay on the chip. Short
          rows without a mask, a picture's, are held whole by a kernel of our own
          (`short_attention`).
  cudnn   GPU: cuDNN's fused kernel.

A backend is chosen by name when a model is built (`choose_backend`); one that cannot serve a
call is an error, never a silent slow path.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from emu_jax.errors import UserError, suggest
from emu_jax.models.short_attention import LONGEST, short_attention
from emu_jax.sharding import platform, shard, spec

log = logging.getLogger(__name__)

BACKENDS = ("xla", "splash", "cudnn")
# What the kernels keep for their backward pass, under one name for `layers.REMAT`.
KEPT = "attention"
# The scope of what a backward pass computes a second time, for who counts products.
AGAIN = "again"


def choose_backend(name: str, platform: str) -> str:
    """The backend that `name` stands for on a JAX platform (`cpu`, `gpu`, `tpu`); "auto" is the
    platform's fastest.

    Raises:
        UserError: no such backend, or it does not run there.
    """
    fastest = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(platform, "xla")
    known = ("auto", *BACKENDS)
    if name not in known:
        raise UserError(f"attention {name!r} is not known{suggest(name, known)}")
    chosen = fastest if name == "auto" else name
    if chosen not in (fastest, "xla"):
        raise UserError(f"attention {name!r} does not run on {platform}: use {fastest} or xla")
    if chosen != fastest:
        log.warning("attention xla on %s, by request: slower than %s", platform, fastest)
    else:
        where = {
            "splash": ", the visual encoder's in one kernel a row, the causal transformer's xla",
            "cudnn": ", pictures' xla",
        }
        log.info("attention: %s%s", chosen, where.get(chosen, ""))
    return chosen


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S H K"] | Float[Array, "B H K S"],
    v: Float[Array, "B S H K"] | Float[Array, "B H S K"],
    *,
    causal: bool = False,
    segment_ids: Int[Array, "B T"] | None = None,
    mask: Bool[Array, "B 1 T S"] | Bool[Array, "1 1 T S"] | None = None,
    bias: Float[Array, "1 H T S"] | None = None,
    scale: float,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
    cached: bool = False,
    backend: str = "xla",
) -> Float[Array, "B T H K"]:
    """softmax(scale q k^T + bias, masked) v, the softmax in float32.

    Masks add up: `causal` (as many keys as queries), equality of `segment_ids` (of queries and
    keys alike), and `mask`, True where a query may look. A query whose keys are all masked gets
    the mean of the values, never NaN. `dropout` is applied to the weights (T5 does; LLaMA and
    ViT have none). `cached` keys [B, H, K, S] and values [B, H, S, K] lie as a cache has them.

    Raises:
        UserError: `backend` cannot serve these shapes, dtypes or masks.
    """
    if backend != "xla":
        for name, value in (("mask", mask), ("bias", bias), ("dropout", dropout)):
            if value is not None:
                raise UserError(f"{backend} attention takes no {name}: use attention=xla")
        assert not cached, "only XLA's attention reads a cache"
        fused = {"splash": splash, "cudnn": cudnn}[backend]
        unmasked = not causal and segment_ids is None
        if backend == "splash" and unmasked and max(q.shape[1], k.shape[1]) <= LONGEST:
            return short(q, k, v, scale=scale)
        return fused(q, k, v, causal=causal, segment_ids=segment_ids, scale=scale)
    plain = bias is None and dropout is None and not cached
    if plain and causal and mask is None and q.shape[1] > XLA_BLOCK:
        return _causal_blocks(*_scaled(q, scale), k, v, segment_ids)
    for more in (causal_mask(q.shape[1]) if causal else None, segment_mask(segment_ids)):
        mask = more if mask is None else mask if more is None else mask & more
    if plain and platform() == "cpu":
        if mask is None and q.shape[1] * k.shape[1] >= CPU_SCORES:
            return checkpoint_name(_large_on_cpu(q, k, v, scale), KEPT)
        q, scale = _scaled(q, scale)
        # A batch that is split over devices is not cut: its parts would have to move.
        mesh = jax.sharding.get_abstract_mesh()
        if mask is not None or (not mesh.empty and mesh.size > 1):
            return _recomputed(q, k, v, mask, scale)
        parts = (jnp.array_split(x, min(len(x), CPU_PARTS)) for x in (q, k, v))
        return jnp.concatenate(
            [_recomputed(*part, None, scale) for part in zip(*parts, strict=True)]
        )
    return checkpoint_name(_weighted(q, k, v, mask, bias, scale, dropout, cached), KEPT)


# Parts of a batch whose attention is computed side by side: XLA's CPU compiler gives a product of
# many small matrices one thread.
CPU_PARTS = 4


def _weighted(
    q, k, v, mask, bias=None, scale=1.0, dropout=None, cached=False
) -> Float[Array, "B T H K"]:
    """All scores at once."""
    keys, values = ("bhks", "bhsk") if cached else ("bshk", "bshk")
    scores = jnp.einsum(f"bthk,{keys}->bhts", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    if dropout is not None:
        weights = dropout(weights)
    # As "-> bthk" XLA's CPU compiler would make it a product with the values transposed.
    return jnp.einsum(f"bhts,{values}->bhtk", weights, v).swapaxes(1, 2)


# Scores of one row and head from which heads are computed one after the other: 2 MiB, a cache.
CPU_SCORES = 512 * 1024


def _large_on_cpu(q, k, v, scale: float) -> Float[Array, "B T H K"]:
    """No mask. The scores of one head stay in a processor's cache, where their sum is one more
    column of the product."""

    def head(x):
        scores = jnp.matmul(x[0] * scale, x[1].T, preferred_element_type=jnp.float32)
        most = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - most).astype(v.dtype)
        values = jnp.concatenate([x[2], jnp.ones_like(x[2][:, :1])], axis=1)
        out = jnp.matmul(weights, values, preferred_element_type=jnp.float32)
        return (out[:, :-1] / out[:, -1:]).astype(v.dtype)

    out = jax.lax.map(head, tuple(rearrange(x, "b t h k -> (b h) t k") for x in (q, k, v)))
    return rearrange(out, "(b h) t k -> b t h k", b=len(q))


def _scaled(q: Float[Array, "B T H K"], scale: float) -> tuple[Float[Array, "B T H K"], float]:
    """Queries and what their scores are still to be multiplied by: float32 ones take it at once,
    others would be rounded."""
    return (q * scale, 1.0) if q.dtype == jnp.float32 else (q, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _recomputed(q, k, v, mask, scale: float) -> Float[Array, "B T H K"]:
    """Attention with a FlashAttention-style backward pass: normalizes the output instead of the
    weights, saves it with the row maxima and sums, and recomputes the weights from these."""
    return _recomputed_fwd(q, k, v, mask, scale)[0]


def _heads_first(*arrays: jax.Array) -> list[Float[Array, "B H T K"]]:
    return [x.swapaxes(1, 2) for x in arrays]


def _scores(q, k, mask=None, scale=1.0) -> Float[Array, "B H T S"]:
    scores = jnp.einsum("bhtk,bhsk->bhts", q, k, preferred_element_type=jnp.float32) * scale
    return scores if mask is None else jnp.where(mask, scores, jnp.finfo(jnp.float32).min)


def _recomputed_fwd(q, k, v, mask, scale):
    kept = q, k, v, mask
    q, k, v = _heads_first(q, k, v)
    scores = _scores(q, k, mask, scale)
    most = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - most)
    out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = out / total
    found = out.astype(v.dtype).swapaxes(1, 2), most, total
    found = tuple(checkpoint_name(x, KEPT) for x in found)
    return found[0], (*kept, *found)


def _recomputed_bwd(scale, kept, d_out):
    q, k, v, mask, out, most, total = kept
    q, k, v, out, d_out = _heads_first(q, k, v, out, d_out)
    with jax.named_scope(AGAIN):
        scores = _scores(q, k, mask, scale)
    weights = jnp.exp(scores - most) / total
    both = d_out.astype(jnp.float32) * out.astype(jnp.float32)
    d_scores = weights * (_scores(d_out, v) - jnp.sum(both, axis=-1, keepdims=True)) * scale
    if mask is not None:  # of a query whose keys are all masked, weights are none of 0
        d_scores = jnp.where(mask, d_scores, 0)
    d_scores = d_scores.astype(v.dtype)
    d_q = jnp.matmul(d_scores, k)
    d_k = jnp.einsum("bhts,bhtk->bhsk", d_scores, q)
    d_v = jnp.einsum("bhts,bhtk->bhsk", weights.astype(v.dtype), d_out)
    return *_heads_first(d_q, d_k, d_v), None


_recomputed.defvjp(_recomputed_fwd, _recomputed_bwd)


# Queries whose scores exist at once, where rows are longer: half of them are then never computed,
# and they stay in a processor's cache.
XLA_BLOCK = 256


def _causal_blocks(q, scale: float, k, v, segment_ids) -> Float[Array, "B T H K"]:
    """Each block of queries with the keys up to its end."""
    out = []
    for start in range(0, q.shape[1], XLA_BLOCK):
        end = min(start + XLA_BLOCK, q.shape[1])
        mask = (jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :])[None, None]
        if segment_ids is not None:
            mask &= (segment_ids[:, start:end, None] == segment_ids[:, None, :end])[:, None]
        out.append(_recomputed(q[:, start:end], k[:, :end], v[:, :end], mask, scale))
    return jnp.concatenate(out, axis=1)


def causal_mask(length: int) -> Bool[Array, "1 1 T T"]:
    return jnp.tril(jnp.ones((length, length), bool))[None, None]


def segment_mask(segments: Int[Array, "B T"] | None) -> Bool[Array, "B 1 T T"] | None:
    """True where query and key belong to the same document of a packed row."""
    return None if segments is None else (segments[:, :, None] == segments[:, None, :])[:, None]


def splash(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H K"],
    *,
    causal: bool,
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T H K"]:
    """Pallas splash attention, each device on its own rows and heads.

    Raises:
        UserError: the kernel's tiles do not fit the shapes.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    length, heads, width = q.shape[1:]
    if k.shape[1] != length or length % LANES or width % LANES:
        raise UserError(
            f"splash attention needs as many keys as queries, and rows and heads in multiples of "
            f"{LANES}: {length} queries, {k.shape[1]} keys, head width {width}; use attention=xla"
        )
    block = next(size for size in SPLASH_BLOCKS if length % size == 0)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=min(block, SPLASH_COMPUTE),
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=min(block, SPLASH_COMPUTE),
        use_fused_bwd_kernel=True,
    )
    one = (kernels.CausalMask if causal else kernels.FullMask)((length, length))

    def local(q, k, v, segments):
        kernel = kernels.make_splash_mha(
            mask=kernels.MultiHeadMask([one] * q.shape[1]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=KEPT,
            interpret=interpret,
        )
        ids = None if segments is None else kernels.SegmentIds(segments, segments)
        return jax.vmap(kernel)(q, k, v, ids)

    # The kernel's layout is heads first, and it does not scale.
    q, k, v = ((x.swapaxes(1, 2)) for x in (q * scale, k, v))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        out: Any = local(q, k, v, segment_ids)
    else:
        split = spec(("batch", "heads", None, None), q.shape, mesh)
        rows = None if segment_ids is None else P(split[0], None)
        out: Any = jax.shard_map(
            local, in_specs=(split, split, split, rows), out_specs=split, check_vma=False
        )(q, k, v, segment_ids)
    return jnp.swapaxes(out, 1, 2)


def short(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H K"],
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T H K"]:
    """`short_attention`, each device on its own rows and heads."""

    def local(q, k, v):
        flat = (rearrange(x, "b t h k -> b t (h k)") for x in (q, k, v))
        out = checkpoint_name(short_attention(*flat, q.shape[2], scale, interpret), KEPT)
        return rearrange(out, "b t (h k) -> b t h k", h=q.shape[2])

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(q, k, v)
    split = spec(("batch", None, "heads", None), q.shape, mesh)
    run: Any = jax.shard_map(local, in_specs=(split,) * 3, out_specs=split, check_vma=False)
    return run(q, k, v)


LANES = 128  # of a TPU's vector registers
# Queries and keys of one step of the kernel; the largest that divides a row is used.
SPLASH_BLOCKS = (1024, 512, 256, 128)
SPLASH_COMPUTE = 512  # keys that are multiplied at once


def cudnn(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H K"],
    *,
    causal: bool,
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
) -> Float[Array, "B T H K"]:
    """cuDNN's fused attention.

    Raises:
        UserError: it has no kernel for the dtype or the head's width.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.shape[-1] % 8 or q.shape[-1] > 128:
        raise UserError(
            f"cuDNN attention needs bfloat16 and a head width of up to 128 in eights, not "
            f"{q.dtype} and {q.shape[-1]}: use dtype=bfloat16 or attention=xla"
        )
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=segment_mask(segment_ids),
        is_causal=causal,
        scale=scale,
        implementation="cudnn",
    )
    return checkpoint_name(shard(out, "batch", None, "heads", None), KEPT)
