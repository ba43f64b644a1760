"""The entry point of attention, and its backends.

  xla        any device: the plain reference (`xla.py`).
  blockwise  any device: causal rows in blocks of queries, with less memory (`blockwise.py`).
  cpu        CPUs: kernels for XLA's CPU compiler (`cpu.py`).
  splash     TPU: Pallas' blockwise kernel, which skips masked blocks and keeps scores on the chip.
             Short rows without a mask, such as an image's, use a kernel of our own that holds whole
             rows (`short_attention`).
  cudnn      GPU: cuDNN's fused kernel.

Training chooses a backend by name (`choose_backend`); other calls use `backend.kernels`. A backend
that cannot serve a call raises an error; there is no silent slow path.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from emu_jax.errors import UserError, suggest
from emu_jax.models import blockwise, cpu, xla
from emu_jax.models.backend import kernels
from emu_jax.models.remat import CHECKPOINT_ATTENTION
from emu_jax.models.short_attention import LANES, LONGEST, short_attention
from emu_jax.models.xla import segment_mask
from emu_jax.sharding import shard, spec

log = logging.getLogger(__name__)

EVERYWHERE = ("blockwise", "xla")  # backends for any platform
BACKENDS = (*EVERYWHERE, "cpu", "splash", "cudnn")
MODULES = {"blockwise": blockwise, "xla": xla, "cpu": cpu}
FASTEST = {"cpu": "cpu", "tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}  # by platform

# Queries and keys per step of the splash kernel. The largest size that divides a row is used.
SPLASH_BLOCKS = (1024, 512, 256, 128)
SPLASH_COMPUTE = 512  # keys per matmul


def choose_backend(name: str, platform: str) -> str:
    """Returns the backend that `name` selects on a JAX platform (`cpu`, `gpu`, `tpu`). "auto"
    selects the platform's fastest.

    Raises:
        UserError: the backend is unknown, or does not run on the platform.
    """
    fastest = FASTEST.get(platform, "blockwise")
    known = ("auto", *BACKENDS)
    if name not in known:
        raise UserError(f"attention {name!r} is not known{suggest(name, known)}")
    chosen = fastest if name == "auto" else name
    if chosen not in (fastest, *EVERYWHERE):
        raise UserError(
            f"attention {name!r} does not run on {platform}: use {fastest}, blockwise or xla"
        )
    if chosen != fastest:
        log.warning("attention %s on %s, by request: slower than %s", chosen, platform, fastest)
    else:
        where = {
            "splash": ", the visual encoder's in one kernel a row, the causal transformer's xla",
            "cudnn": ", images' xla",
        }
        log.info("attention: %s%s", chosen, where.get(chosen, ""))
    return chosen


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"] | Float[Array, "B G K S"],
    v: Float[Array, "B S G K"] | Float[Array, "B G S K"],
    *,
    causal: bool = False,
    segment_ids: Int[Array, "B T"] | None = None,
    mask: Bool[Array, "#B 1 T S"] | None = None,
    bias: Float[Array, "1 H T S"] | None = None,
    scale: float,
    dropout: Callable[[Float[Array, "B H T S"]], Float[Array, "B H T S"]] | None = None,
    cached: bool = False,
    backend: str | None = None,
) -> Float[Array, "B T H K"]:
    """Returns softmax(scale q k^T + bias, masked) v, with the softmax in float32.

    Three masks combine: `causal` (as many keys as queries), equality of `segment_ids` (shared by
    queries and keys), and `mask`, True where a query may attend. A query whose keys are all masked
    gets the mean of the values, never NaN. Keys and values may have fewer heads than queries, each
    shared by equally many consecutive ones. `dropout` is applied to the weights (T5 has dropout
    there; LLaMA and ViT have none). With `cached`, keys are [B, G, K, S] and values [B, G, S, K],
    the layout of a KV cache.

    Without a `backend`, the platform decides between `cpu` and `xla` (`backend.kernels`). These and
    `blockwise` serve every call.

    Raises:
        UserError: `backend` cannot serve these shapes, dtypes or masks.
        ValueError: a fused backend is called with a cache.
    """
    if backend is None or backend in MODULES:
        module = kernels() if backend is None else MODULES[backend]
        return module.attention(
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
    for name, value in (("mask", mask), ("bias", bias), ("dropout", dropout)):
        if value is not None:
            raise UserError(f"{backend} attention takes no {name}: use attention=blockwise")
    if cached:
        raise ValueError(f"{backend} attention cannot read a cache: use the backend xla or cpu")
    unmasked = not causal and segment_ids is None
    if backend == "splash" and unmasked and max(q.shape[1], k.shape[1]) <= LONGEST:
        return short(q, k, v, scale=scale)
    fused = {"splash": splash, "cudnn": cudnn}[backend]
    return fused(q, k, v, causal=causal, segment_ids=segment_ids, scale=scale)


def share_heads(
    q: Float[Array, "B T H K"], k: Float[Array, "B S G K"], v: Float[Array, "B S G K"]
) -> tuple[Float[Array, "B S _ K"], Float[Array, "B S _ K"]]:
    """Returns keys and values that are split over devices like the queries, as fused kernels need
    them. Their heads are repeated if there are too few to give each device its own."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = ("batch", None, "attention_heads", None)
    if mesh.empty or spec(axes, k.shape, mesh) == spec(axes, q.shape, mesh):
        return k, v
    k, v = (shard(jnp.repeat(x, q.shape[2] // x.shape[2], axis=2), *axes) for x in (k, v))
    return k, v


def splash(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    *,
    causal: bool,
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T H K"]:
    """Pallas splash attention. Each device computes its own rows and heads.

    Raises:
        UserError: the kernel's tiles do not fit the shapes.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    length, heads, width = q.shape[1:]
    if k.shape[1] != length or length % LANES or width % LANES:
        raise UserError(
            "splash attention needs as many keys as queries, and rows and heads in multiples of "
            f"{LANES}: {length} queries, {k.shape[1]} keys, head width {width}; use "
            "attention=blockwise"
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
    head_mask = (kernels.CausalMask if causal else kernels.FullMask)((length, length))

    def run_shard(
        q: Float[Array, "B H T K"],
        k: Float[Array, "B G T K"],
        v: Float[Array, "B G T K"],
        segments: Int[Array, "B T"] | None,
    ) -> Float[Array, "B H T K"]:
        kernel = kernels.make_splash_mha(
            mask=kernels.MultiHeadMask([head_mask] * q.shape[1]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=CHECKPOINT_ATTENTION,
            interpret=interpret,
        )
        ids = None if segments is None else kernels.SegmentIds(segments, segments)
        out = jax.vmap(kernel)(q, k, v, ids)
        assert isinstance(out, jax.Array)  # without residuals
        return out

    k, v = share_heads(q, k, v)
    # The kernel takes heads first, and does not scale the scores.
    q, k, v = ((x.swapaxes(1, 2)) for x in (q * scale, k, v))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        out = run_shard(q, k, v, segment_ids)
    else:
        q_spec = spec(("batch", "attention_heads", None, None), q.shape, mesh)
        segment_spec = None if segment_ids is None else P(q_spec[0], None)
        out = jax.shard_map(
            run_shard,
            in_specs=(q_spec, q_spec, q_spec, segment_spec),
            out_specs=q_spec,
            check_vma=False,
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
    """`short_attention`. Each device computes its own images and heads."""

    def run_shard(
        q: Float[Array, "B T H K"], k: Float[Array, "B S H K"], v: Float[Array, "B S H K"]
    ) -> Float[Array, "B T H K"]:
        flat = (rearrange(x, "b t h k -> b t (h k)") for x in (q, k, v))
        out = checkpoint_name(
            short_attention(*flat, q.shape[2], scale, interpret), CHECKPOINT_ATTENTION
        )
        return rearrange(out, "b t (h k) -> b t h k", h=q.shape[2])

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run_shard(q, k, v)
    qkv_spec = spec(("image", None, "heads", None), q.shape, mesh)
    run_sharded = jax.shard_map(
        run_shard, in_specs=(qkv_spec,) * 3, out_specs=qkv_spec, check_vma=False
    )
    return run_sharded(q, k, v)


def cudnn(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    *,
    causal: bool,
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
) -> Float[Array, "B T H K"]:
    """cuDNN's fused attention.

    Raises:
        UserError: cuDNN has no kernel for the dtype or the head width.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.shape[-1] % 8 or q.shape[-1] > 128:
        raise UserError(
            f"cuDNN attention needs bfloat16 and a head width of up to 128 in eights, not "
            f"{q.dtype} and {q.shape[-1]}: use dtype=bfloat16 or attention=blockwise"
        )
    k, v = share_heads(q, k, v)
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=segment_mask(segment_ids),
        is_causal=causal,
        scale=scale,
        implementation="cudnn",
    )
    out = shard(out, "batch", None, "attention_heads", None)
    return checkpoint_name(out, CHECKPOINT_ATTENTION)
