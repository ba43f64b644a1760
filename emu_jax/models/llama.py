"""LLaMA with Emu's regression head (release: `modeling_llama.py`; transformers 4.31)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from emu_jax.config import LlamaConfig
from emu_jax.models.attention import attention, causal_mask, segment_mask
from emu_jax.models.layers import Embedding, Linear, RMSNorm, normal, scan, stack
from emu_jax.models.lora import LoraLinear, adapted
from emu_jax.sharding import shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens read so far.

    A token takes the next slot of its row whatever its position; `valid` is False on the
    slots of padding, so that left- and right-padded prompts share one layout.
    """

    k: Float[Array, "L B S H K"]
    v: Float[Array, "L B S H K"]
    valid: Bool[Array, "B S"]
    used: Int[Array, ""]

    @classmethod
    def empty(cls, cfg: LlamaConfig, batch: int, slots: int, dtype=jnp.float32) -> KVCache:
        shape = (cfg.layers, batch, slots, cfg.heads, cfg.head_width)
        zeros = shard(jnp.zeros(shape, dtype), "layer", "batch", None, "heads", None)
        return cls(zeros, zeros, jnp.zeros((batch, slots), bool), jnp.zeros((), jnp.int32))


def rotary_frequencies(head_width: int, theta: float) -> Float[np.ndarray, "K/2"]:
    """1 / theta^(2i / K) (`rotary_emb.inv_freq`), every step rounded as torch rounds it.

    In numpy, when a program is traced: XLA's power differs in the last bits, and rounding the
    tables to bfloat16 can make much of that.
    """
    half = head_width // 2
    exponent = np.arange(half, dtype=np.float32) / np.float32(half)
    power = np.power(float(theta), exponent.astype(np.float64))
    return np.float32(1) / power.astype(np.float32)


def rotary(
    x: Float[Array, "B T H K"], positions: Int[Array, "B T"], theta: float, dtype: str = "float32"
) -> Float[Array, "B T H K"]:
    """Rotary position embedding, the two halves of a head rotated together.

    Cosines and sines are rounded to `dtype` (`LlamaConfig.rope_dtype`).
    """
    frequency = rotary_frequencies(x.shape[-1], theta)
    angle = positions[..., None, None].astype(jnp.float32) * frequency  # [B, T, 1, K/2]
    kept = jnp.finfo(dtype)
    cos, sin = (
        jax.lax.reduce_precision(wave, kept.nexp, kept.nmant)
        for wave in (jnp.cos(angle), jnp.sin(angle))
    )
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _linear(
    cfg: LlamaConfig, name: str, width_in: int, width_out: int, axes: tuple[str, str],
    rngs: nnx.Rngs,
) -> Linear:  # fmt: skip
    """A layer without bias; with an adapter where the configuration asks for one."""
    if cfg.lora and name in cfg.lora.targets:
        return LoraLinear(width_in, width_out, axes, lora=cfg.lora, rngs=rngs)
    return Linear(width_in, width_out, axes, bias=False, rngs=rngs)


class LlamaAttention(nnx.Module):
    """Rotary multi-head attention, no biases, every head with its own keys."""

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
        def linear(name: str, axes: tuple[str, str]) -> Linear:
            return _linear(cfg, name, cfg.width, cfg.width, axes, rngs)

        self.q_proj = linear("q_proj", ("embed", "heads"))
        self.k_proj = linear("k_proj", ("embed", "heads"))
        self.v_proj = linear("v_proj", ("embed", "heads"))
        self.o_proj = linear("o_proj", ("heads", "embed"))
        self.cfg = cfg

    def project(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"],
        dropout_key: jax.Array | None = None,
    ):  # fmt: skip
        """Rotated queries and keys, and values, each [B, T, H, K]."""
        q, k, v = (
            rearrange(
                adapted(proj, x, dropout_key, n), "b t (h k) -> b t h k", k=self.cfg.head_width
            )
            for n, proj in enumerate((self.q_proj, self.k_proj, self.v_proj))
        )
        rope = self.cfg.rope_theta, self.cfg.rope_dtype
        return rotary(q, positions, *rope), rotary(k, positions, *rope), v

    def attend(self, q, k, v, mask, dropout_key=None) -> Float[Array, "B T D"]:
        out = attention(q, k, v, mask=mask, scale=self.cfg.head_width**-0.5)
        return adapted(self.o_proj, rearrange(out, "b t h k -> b t (h k)"), dropout_key, 3)


class LlamaMLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
        width, hidden = cfg.width, cfg.mlp_width
        self.gate_proj = _linear(cfg, "gate_proj", width, hidden, ("embed", "mlp"), rngs)
        self.up_proj = _linear(cfg, "up_proj", width, hidden, ("embed", "mlp"), rngs)
        self.down_proj = _linear(cfg, "down_proj", hidden, width, ("mlp", "embed"), rngs)

    def __call__(
        self, x: Float[Array, "B T D"], dropout_key: jax.Array | None = None
    ) -> Float[Array, "B T D"]:
        gate = adapted(self.gate_proj, x, dropout_key, 4)
        up = adapted(self.up_proj, x, dropout_key, 5)
        return adapted(self.down_proj, jax.nn.silu(gate) * up, dropout_key, 6)


class LlamaBlock(nnx.Module):
    """Pre-norm decoder layer."""

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(cfg.width, eps=cfg.eps, rngs=rngs)
        self.self_attn = LlamaAttention(cfg, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(cfg.width, eps=cfg.eps, rngs=rngs)
        self.mlp = LlamaMLP(cfg, rngs=rngs)

    def finish(self, x, attended, dropout_key=None) -> Float[Array, "B T D"]:
        """The residual sums after attention."""
        x = shard(x + attended, "batch", None, None)
        mlp = self.mlp(self.post_attention_layernorm(x), dropout_key)
        return shard(x + mlp, "batch", None, None)


class Llama(nnx.Module):
    """The multimodal language model over embeddings [B, T, D]."""

    def __init__(self, cfg: LlamaConfig, *, remat: str = "none", rngs: nnx.Rngs):
        self.embed_tokens = Embedding(
            cfg.padded_vocab, cfg.width, init=normal(cfg.embed_std), rngs=rngs
        )
        self.layers = stack(cfg.layers, lambda rngs: LlamaBlock(cfg, rngs=rngs), rngs)
        self.norm = RMSNorm(cfg.width, eps=cfg.eps, rngs=rngs)
        self.lm_head = Linear(
            cfg.width, cfg.padded_vocab, ("embed", "vocab"), bias=False, rngs=rngs
        )
        self.stu_regress_head = Linear(cfg.width, cfg.width, ("embed", None), bias=False, rngs=rngs)
        self.cfg, self.remat = cfg, remat

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm; causal, within a segment when ids are given.
        With a key the adapters drop, as in training."""
        mask = causal_mask(x.shape[1])
        if segment_ids is not None:
            mask = mask & segment_mask(segment_ids, segment_ids)

        keys = None
        if dropout_key is not None and self.cfg.lora and self.cfg.lora.dropout > 0:
            keys = jax.random.split(dropout_key, self.cfg.layers)

        def body(block: LlamaBlock, x, key):
            q, k, v = block.self_attn.project(block.input_layernorm(x), positions, key)
            return block.finish(x, block.self_attn.attend(q, k, v, mask, key), key), None

        x, _ = scan(self.layers, body, shard(x, "batch", None, None), keys, remat=self.remat)
        return self.norm(x)

    def read(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        cache: KVCache,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Hidden states of T more tokens after those in `cache`, and the cache with them.

        `valid` is False on padding, which nothing attends to. The cache must have T free
        slots left; it is updated in place under jit when donated.
        """
        length = x.shape[1]
        slots = jax.lax.dynamic_update_slice(cache.valid, valid, (0, cache.used))
        query = cache.used + jnp.arange(length)
        causal = jnp.arange(slots.shape[1])[None, :] <= query[:, None]  # [T, S]
        mask = (causal[None] & slots[:, None, :])[:, None]

        def body(block: LlamaBlock, carry, layer):
            x, k_all, v_all = carry
            q, k, v = block.self_attn.project(block.input_layernorm(x), positions)
            start = (layer, 0, cache.used, 0, 0)
            k_all = jax.lax.dynamic_update_slice(k_all, k[None].astype(k_all.dtype), start)
            v_all = jax.lax.dynamic_update_slice(v_all, v[None].astype(v_all.dtype), start)
            k, v = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (k_all, v_all))
            return (block.finish(x, block.self_attn.attend(q, k, v, mask)), k_all, v_all), None

        carry, _ = scan(self.layers, body, (x, cache.k, cache.v), jnp.arange(self.cfg.layers))
        x, k, v = carry
        return self.norm(x), KVCache(k, v, slots, cache.used + length)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Next-token logits, without the rows that only round the vocabulary up."""
        return self.lm_head(hidden)[..., : self.cfg.vocab_size]

    def regress(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """The next visual embedding."""
        return self.stu_regress_head(hidden)
