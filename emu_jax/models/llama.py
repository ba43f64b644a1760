"""LLaMA with Emu1's regression head (release: `modeling_llama.py`; transformers 4.31).

Later decoders differ from it in details: `LlamaConfig.backbone`.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from emu_jax.config import LlamaConfig, RopeScalingConfig
from emu_jax.models.attention import attention
from emu_jax.models.backend import kernels
from emu_jax.models.kv_cache import KVCache, Layers
from emu_jax.models.layers import Embedding, Linear, RMSNorm, normal, scan, stack
from emu_jax.models.lora import LoraLinear, adapted
from emu_jax.models.low_precision import split_key
from emu_jax.models.remat import CHECKPOINT_QKV, CHECKPOINT_RESIDUAL
from emu_jax.sharding import context_ways, shard, spec

MaybeCache = TypeVar("MaybeCache", KVCache, None)


def rotary_frequencies(
    head_width: int, theta: float, scaling: RopeScalingConfig | None = None
) -> Float[np.ndarray, "pairs"]:
    """Returns 1 / theta^(2i / K) (`rotary_emb.inv_freq`), with every step rounded as in torch.

    Computed in numpy at trace time: XLA's power differs in the last bits, and rounding the tables
    to bfloat16 can amplify the difference.
    """
    half = head_width // 2
    exponent = np.arange(half, dtype=np.float32) / np.float32(half)
    power = np.power(float(theta), exponent.astype(np.float64))
    frequencies = np.float32(1) / power.astype(np.float32)
    return frequencies if scaling is None else _scaled(frequencies, scaling)


def _scaled(
    frequencies: Float[np.ndarray, "pairs"], scaling: RopeScalingConfig
) -> Float[np.ndarray, "pairs"]:
    """Returns the frequencies of a longer context (transformers:
    `_compute_llama3_parameters`)."""
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    context, factor = np.float32(scaling.original_max_positions), np.float32(scaling.factor)
    turns = context / (np.float32(2 * np.pi) / frequencies)  # of a pair within the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - smooth) * (frequencies / factor) + smooth * frequencies


def rotary(
    x: Float[Array, "B T H K"],
    positions: Int[Array, "B T"],
    theta: float,
    dtype: str = "float32",
    scaling: RopeScalingConfig | None = None,
) -> Float[Array, "B T H K"]:
    """Applies rotary position embedding. Entry i of a head is paired with entry i + K/2.

    Cosines and sines are rounded to `dtype` (`LlamaConfig.rope_dtype`).
    """
    frequency = rotary_frequencies(x.shape[-1], theta, scaling)
    angle = positions[..., None, None].astype(jnp.float32) * frequency  # [B, T, 1, K/2]
    precision = jnp.finfo(dtype)
    cos, sin = (
        jax.lax.reduce_precision(wave, precision.nexp, precision.nmant)
        for wave in (jnp.cos(angle), jnp.sin(angle))
    )
    return kernels().rotate_pairs(x, cos, sin)


def _linear(
    cfg: LlamaConfig,
    path: str,
    width_in: int,
    width_out: int,
    axes: tuple[str, str],
    rngs: nnx.Rngs,
    bias: bool = False,
) -> Linear:
    """Creates the layer at `path` of its block. It has an adapter if the configuration asks for
    one."""
    if cfg.lora and path.rsplit(".", 1)[-1] in cfg.lora.targets:
        return LoraLinear(width_in, width_out, axes, path=path, lora=cfg.lora, bias=bias, rngs=rngs)
    return Linear(width_in, width_out, axes, bias=bias, rngs=rngs)


def shard_tokens(x: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
    """Constrains each device to its own tokens, if a row is split over devices.

    Queries, keys, values and the output of attention need it beside the constraint to whole rows.
    XLA would otherwise split the projections by heads instead, and move more bytes.
    """
    return shard(x, "batch", "sequence", "heads", None) if context_ways() > 1 else x


class LlamaAttention(nnx.Module):
    """Rotary attention, in which heads may share keys and values (grouped-query attention)."""

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        inner, shared = cfg.heads * cfg.head_width, cfg.kv_heads * cfg.head_width
        more = (("embed", "heads"), rngs, cfg.backbone == "qwen2")
        self.q_proj = _linear(cfg, "self_attn.q_proj", cfg.width, inner, *more)
        self.k_proj = _linear(cfg, "self_attn.k_proj", cfg.width, shared, *more)
        self.v_proj = _linear(cfg, "self_attn.v_proj", cfg.width, shared, *more)
        self.q_norm, self.k_norm = (
            RMSNorm(cfg.head_width, eps=cfg.eps, rngs=rngs) if cfg.backbone == "qwen3" else None
            for _ in range(2)
        )
        self.o_proj = _linear(cfg, "self_attn.o_proj", inner, cfg.width, ("heads", "embed"), rngs)
        self.cfg = cfg

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: MaybeCache = None,
        layer: int | Int[Array, ""] = 0,
        mask: Bool[Array, "B 1 T S"] | None = None,
        dropout_key: Key[Array, ""] | None = None,
        backend: str | None = None,
    ) -> tuple[Float[Array, "B T D"], MaybeCache]:
        """Attends within `x`, or to a cache: see `LlamaBlock`."""
        q, k, v = self._project(x, positions, dropout_key)
        scale = self.cfg.head_width**-0.5
        if cache is None:
            out = attention(
                q, k, v, causal=True, segment_ids=segment_ids, scale=scale, backend=backend
            )
            out = shard_tokens(out)
        else:
            cache, k, v = cache.update(layer, k, v)
            out = attention(q, k, v, mask=mask, scale=scale, cached=True)
        out = rearrange(out, "b t h k -> b t (h k)")
        out = checkpoint_name(adapted(self.o_proj, out, dropout_key), CHECKPOINT_RESIDUAL)
        return out, cache

    def _project(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        dropout_key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B T G K"], Float[Array, "B T G K"]]:
        """Returns rotated queries, rotated keys, and values."""
        q, k, v = (
            rearrange(adapted(proj, x, dropout_key), "b t (h k) -> b t h k", k=self.cfg.head_width)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        rope = self.cfg.rope_theta, self.cfg.rope_dtype, self.cfg.rope_scaling
        q, k = rotary(q, positions, *rope), rotary(k, positions, *rope)
        q, k, v = (
            checkpoint_name(
                shard(shard_tokens(a), "batch", None, "attention_heads", None), CHECKPOINT_QKV
            )
            for a in (q, k, v)
        )
        return q, k, v


class LlamaMLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        width, hidden = cfg.width, cfg.mlp_width
        self.gate_proj = _linear(cfg, "mlp.gate_proj", width, hidden, ("embed", "mlp"), rngs)
        self.up_proj = _linear(cfg, "mlp.up_proj", width, hidden, ("embed", "mlp"), rngs)
        self.down_proj = _linear(cfg, "mlp.down_proj", hidden, width, ("mlp", "embed"), rngs)

    def __call__(
        self, x: Float[Array, "B T D"], dropout_key: Key[Array, ""] | None = None
    ) -> Float[Array, "B T D"]:
        gate = shard(adapted(self.gate_proj, x, dropout_key), "batch", "sequence", "mlp")
        up = shard(adapted(self.up_proj, x, dropout_key), "batch", "sequence", "mlp")
        return adapted(self.down_proj, jax.nn.silu(gate) * up, dropout_key)


class LlamaBlock(nnx.Module):
    """Pre-norm decoder layer."""

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.input_layernorm = RMSNorm(cfg.width, eps=cfg.eps, rngs=rngs)
        self.self_attn = LlamaAttention(cfg, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(cfg.width, eps=cfg.eps, rngs=rngs)
        self.mlp = LlamaMLP(cfg, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: MaybeCache = None,
        layer: int | Int[Array, ""] = 0,
        mask: Bool[Array, "B 1 T S"] | None = None,
        dropout_key: Key[Array, ""] | None = None,
        backend: str | None = None,
    ) -> tuple[Float[Array, "B T D"], MaybeCache]:
        """Returns hidden states and the cache.

        Without a cache, attention is causal within `x` and runs on `backend`. With `segment_ids`,
        it stays within a segment. With a cache, the keys and values are written to it as those of
        `layer`, and `mask` is True at the cache entries that a token attends to.
        """
        attended, cache = self.self_attn(
            self.input_layernorm(x),
            positions,
            segment_ids=segment_ids,
            cache=cache,
            layer=layer,
            mask=mask,
            dropout_key=dropout_key,
            backend=backend,
        )
        x = shard(x + attended, "batch", "sequence", None)
        mlp = self.mlp(self.post_attention_layernorm(x), dropout_key)
        return shard(x + mlp, "batch", "sequence", None), cache


class Llama(nnx.Module):
    """The multimodal language model over embeddings [B, T, D]."""

    def __init__(
        self,
        cfg: LlamaConfig,
        *,
        remat: str = "none",
        matmul_dtype: str = "",
        backend: str | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.embed_tokens = Embedding(
            cfg.padded_vocab, cfg.width, init=normal(cfg.embed_std), rngs=rngs
        )
        self.layers = stack(cfg.layers, lambda rngs: LlamaBlock(cfg, rngs=rngs), rngs)
        self.norm = RMSNorm(cfg.width, eps=cfg.eps, rngs=rngs)
        self.lm_head = (
            None
            if cfg.tied_embeddings
            else Linear(cfg.width, cfg.padded_vocab, ("embed", "vocab"), bias=False, rngs=rngs)
        )
        self.stu_regress_head = (
            Linear(cfg.width, cfg.width, ("embed", None), bias=False, rngs=rngs)
            if cfg.regression_head
            else None
        )
        self.cfg, self.remat, self.backend = cfg, remat, backend
        self.matmul_dtype = matmul_dtype

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns hidden states after the final norm.

        Attention is causal. With `segment_ids`, it stays within a segment. With a dropout key, as
        in training, the adapters apply dropout, and gradients in int8 are rounded stochastically.
        """
        dropout_key, rounding_key = split_key(dropout_key, self.matmul_dtype)
        keys = None
        if dropout_key is not None and self.cfg.lora and self.cfg.lora.dropout > 0:
            keys = jax.random.split(dropout_key, self.cfg.layers)

        def body(
            block: LlamaBlock, x: Float[Array, "B T D"], key: Key[Array, ""] | None
        ) -> tuple[Float[Array, "B T D"], None]:
            x, _ = block(
                x, positions, segment_ids=segment_ids, dropout_key=key, backend=self.backend
            )
            return x, None

        with jax.named_scope("llama"):
            x, _ = scan(
                self.layers,
                body,
                shard(x, "batch", "sequence", None),
                keys,
                remat=self.remat,
                matmul_dtype=self.matmul_dtype,
                rounding_key=rounding_key,
            )
            return self.norm(x)

    def unstacked_for_decoding(self) -> Llama:
        """Returns this model in the layout that decodes fastest on this platform, or self if it
        already is (`decoding_layers` of `models/cpu.py`)."""
        layers = kernels().decoding_layers(self.layers, self.cfg.layers)
        if layers is self.layers:
            return self
        llama = nnx.merge(*nnx.split(self))
        llama.layers = layers
        return llama

    def empty_cache(self, batch: int, capacity: int, dtype: jnp.dtype) -> KVCache:
        """Returns a cache with `capacity` free entries per row, in the layout of this model's
        layers."""
        return kernels().empty_cache(self.layers, self.cfg, batch, capacity, dtype)

    def extend(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        cache: KVCache,
        *,
        mask: Bool[Array, "B T S"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Adds T tokens to the cache: a prompt, or one decode step. Returns their hidden states
        and the new cache.

        `valid` is False on padding, which no token attends to. A token attends to all valid
        entries up to its own, or to those of `mask`. The cache must have T free entries left.
        Under jit, a donated cache is updated in place.
        """
        length = x.shape[1]
        cache = cache.mark(valid)
        mask = (cache.causal_mask(length) if mask is None else mask)[:, None]

        def body(
            block: LlamaBlock,
            carry: tuple[Float[Array, "B T D"], Layers, Layers],
            layer: int | Int[Array, ""],
        ) -> tuple[tuple[Float[Array, "B T D"], Layers, Layers], None]:
            x, k, v = carry  # the parts of the cache that layers change
            layers_cache = dataclasses.replace(cache, k=k, v=v)
            x, layers_cache = block(x, positions, cache=layers_cache, layer=layer, mask=mask)
            return (x, layers_cache.k, layers_cache.v), None

        (x, k, v), _ = scan(self.layers, body, (x, cache.k, cache.v), cache.layers)
        return self.norm(x), dataclasses.replace(cache, k=k, v=v).advance(length)

    def logits(self, hidden: Float[Array, "*T D"]) -> Float[Array, "*T V"]:
        """Returns next-token logits, without the padding of the vocabulary."""
        logits = kernels().matmul(hidden, self._head_kernel(hidden.dtype))
        return logits[..., : self.cfg.vocab_size]

    def _head_kernel(self, dtype: jnp.dtype) -> Float[Array, "D V"]:
        """Returns the matrix that leads to the logits."""
        if self.lm_head is None:
            return self.embed_tokens.embedding[...].astype(dtype).T
        return self.lm_head.kernel[...].astype(dtype)

    def token_losses(
        self, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], *, block: int
    ) -> Float[Array, "B T"]:
        """Returns the cross-entropy of each target, in float32.

        Holds the logits of at most `block` positions of a row at a time; the backward pass
        recomputes them. With a block of 0, all logits are computed at once and saved.

        Each device computes its own tokens. The head's `embed` axis is gathered once, and its
        gradient is summed over devices once, not once per block.
        """
        kernel = self._head_kernel(hidden.dtype)
        settings = {"vocab": self.cfg.vocab_size, "block": block}
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return kernels().cross_entropy(hidden, kernel, targets, **settings)
        tokens = P(*spec(("batch", "sequence", None), hidden.shape, mesh)[:2])
        embed_axis, vocab_axis = spec(("embed", "vocab"), kernel.shape, mesh)

        def shard_losses(
            hidden: Float[Array, "B T D"], kernel: Float[Array, "_ _"], targets: Int[Array, "B T"]
        ) -> Float[Array, "B T"]:
            if embed_axis is not None:
                kernel = jax.lax.all_gather(kernel, embed_axis, axis=0, tiled=True)
            return kernels().cross_entropy(hidden, kernel, targets, axis=vocab_axis, **settings)

        return jax.shard_map(
            shard_losses,
            in_specs=(tokens, P(embed_axis, vocab_axis), tokens),
            out_specs=tokens,
            check_vma=False,
        )(hidden, kernel, targets)

    def regress(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Predicts the next visual embedding.

        Raises:
            ValueError: this model has no regression head; `EmuModel.regress` serves all.
        """
        if self.stu_regress_head is None:
            raise ValueError(
                "no regression head (LlamaConfig.regression_head): use EmuModel.regress"
            )
        return self.stu_regress_head(hidden)
