"""The Causal Transformer (release: `causal_former.py`, `modeling_t5.py`).

N learned queries attend to an image's patches, and become N causal embeddings of the language
model's width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from emu_jax.config import CFormerConfig
from emu_jax.models.attention import attention
from emu_jax.models.layers import Linear, RMSNorm, normal, param, scan, stack
from emu_jax.models.xla import causal_mask, standardize
from emu_jax.sharding import shard


def relative_buckets(length: int, buckets: int, max_distance: int) -> Int[np.ndarray, "N N"]:
    """Returns T5's unidirectional buckets of the distance query - key. The first half of the
    buckets is exact, the rest logarithmic up to `max_distance`."""
    distance = np.maximum(np.arange(length)[:, None] - np.arange(length)[None, :], 0)
    exact = buckets // 2
    far = np.log(np.maximum(distance, 1).astype(np.float32) / exact)
    far = exact + (far / np.log(max_distance / exact) * (buckets - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(far, buckets - 1))


class Dropout:
    """Inverted dropout. A key of None turns it off. Each call uses the next subkey."""

    def __init__(self, rate: float, key: Key[Array, ""] | None) -> None:
        self.rate, self.key, self.calls = rate, key if rate > 0 else None, 0

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        if self.key is None:
            return x
        self.calls += 1
        key = jax.random.fold_in(self.key, self.calls)
        keep = jax.random.bernoulli(key, 1 - self.rate, x.shape)
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)


class T5Attention(nnx.Module):
    """T5 attention, without biases and without the scale 1/sqrt(head width)."""

    def __init__(self, cfg: CFormerConfig, memory_width: int, *, rngs: nnx.Rngs) -> None:
        inner = cfg.heads * cfg.head_width
        # T5 folds the missing 1/sqrt(head width) into q's initial scale.
        q_init = normal((cfg.width * cfg.head_width) ** -0.5)
        self.q = Linear(cfg.width, inner, ("embed", "heads"), bias=False, init=q_init, rngs=rngs)
        self.k = Linear(memory_width, inner, ("embed", "heads"), bias=False, rngs=rngs)
        self.v = Linear(memory_width, inner, ("embed", "heads"), bias=False, rngs=rngs)
        self.o = Linear(inner, cfg.width, ("heads", "embed"), bias=False, rngs=rngs)
        self.head_width = cfg.head_width

    def __call__(
        self,
        x: Float[Array, "B T D"],
        memory: Float[Array, "B S _"],
        *,
        mask: Bool[Array, "1 1 T S"] | None = None,
        bias: Float[Array, "1 H T S"] | None = None,
        dropout: Dropout,
    ) -> Float[Array, "B T D"]:
        q, k, v = (
            rearrange(a, "b t (h k) -> b t h k", k=self.head_width)
            for a in (self.q(x), self.k(memory), self.v(memory))
        )
        out = attention(q, k, v, mask=mask, bias=bias, scale=1.0, dropout=dropout)
        return self.o(rearrange(out, "b t h k -> b t (h k)"))


class CFormerBlock(nnx.Module):
    """Causal self-attention, cross-attention to the patches, and an ungated ReLU MLP."""

    def __init__(self, cfg: CFormerConfig, memory_width: int, *, rngs: nnx.Rngs) -> None:
        self.self_norm = RMSNorm(cfg.width, eps=cfg.eps, rngs=rngs)
        self.self_attention = T5Attention(cfg, cfg.width, rngs=rngs)
        self.cross_norm = RMSNorm(cfg.width, eps=cfg.eps, rngs=rngs)
        self.cross_attention = T5Attention(cfg, memory_width, rngs=rngs)
        self.mlp_norm = RMSNorm(cfg.width, eps=cfg.eps, rngs=rngs)
        self.wi = Linear(cfg.width, cfg.mlp_width, ("embed", "mlp"), bias=False, rngs=rngs)
        self.wo = Linear(cfg.mlp_width, cfg.width, ("mlp", "embed"), bias=False, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        features: Float[Array, "B P E"],
        *,
        mask: Bool[Array, "1 1 N N"],
        bias: Float[Array, "1 H N N"],
        dropout: Dropout,
    ) -> Float[Array, "B N D"]:
        y = self.self_norm(x)
        x = x + dropout(self.self_attention(y, y, mask=mask, bias=bias, dropout=dropout))
        x = x + dropout(self.cross_attention(self.cross_norm(x), features, dropout=dropout))
        y = dropout(jax.nn.relu(self.wi(self.mlp_norm(x))))
        return shard(x + dropout(self.wo(y)), "image", None, None)


class CFormer(nnx.Module):
    """Maps features [B, P, vision width] to causal embeddings [B, N, language width]."""

    def __init__(
        self,
        cfg: CFormerConfig,
        memory_width: int,
        out_width: int,
        *,
        remat: str = "none",
        rngs: nnx.Rngs,
    ) -> None:
        self.causal_tokens = param(rngs, normal(0.02), (cfg.n_causal, cfg.width), (None, "embed"))
        # Block 0 of the release owns this table; every block uses it.
        self.relative_attention_bias = param(
            rngs, normal(cfg.width**-0.5), (cfg.relative_buckets, cfg.heads), (None, "heads")
        )
        self.blocks = stack(
            cfg.layers, lambda rngs: CFormerBlock(cfg, memory_width, rngs=rngs), rngs
        )
        self.final_layer_norm = RMSNorm(cfg.width, eps=cfg.eps, rngs=rngs)
        self.projection = Linear(cfg.width, out_width, ("embed", None), rngs=rngs)
        self.cfg, self.remat = cfg, remat

    def __call__(
        self, features: Float[Array, "B P E"], *, dropout_key: Key[Array, ""] | None = None
    ) -> Float[Array, "B N D"]:
        cfg = self.cfg
        buckets = relative_buckets(cfg.n_causal, cfg.relative_buckets, cfg.relative_max_distance)
        bias = jnp.take(self.relative_attention_bias[...], buckets, axis=0)  # [N, N, H]
        bias = rearrange(bias.astype(jnp.float32), "t s h -> 1 h t s")
        mask = causal_mask(cfg.n_causal)

        blocks_key = outer_key = None
        if dropout_key is not None:
            blocks_key, outer_key = jax.random.split(dropout_key)

        def body(
            block: CFormerBlock, carry: Float[Array, "B N D"], layer: Int[Array, ""]
        ) -> tuple[Float[Array, "B N D"], None]:
            key = None if blocks_key is None else jax.random.fold_in(blocks_key, layer)
            dropout = Dropout(cfg.dropout, key)
            return block(carry, features, mask=mask, bias=bias, dropout=dropout), None

        outer = Dropout(cfg.dropout, outer_key)
        x = self.causal_tokens[...].astype(features.dtype)
        x = outer(jnp.broadcast_to(x, (features.shape[0], *x.shape)))
        x, _ = scan(self.blocks, body, x, jnp.arange(1, cfg.layers + 1) << 16, remat=self.remat)
        x = self.projection(outer(self.final_layer_norm(x)))
        return standardize(x, cfg.eps).astype(x.dtype) if cfg.normalize else x
