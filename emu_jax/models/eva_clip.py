"""EVA-CLIP's ViT (release: `Emu1/models/eva_vit_model.py`, `Emu2/emu/eva_vit.py`)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key, UInt8

from emu_jax.config import VisionConfig
from emu_jax.models.attention import attention
from emu_jax.models.layers import LayerNorm, Linear, gelu, normal, param, scan, stack
from emu_jax.models.low_precision import low_precision_matmul
from emu_jax.models.remat import CHECKPOINT_QKV, CHECKPOINT_RESIDUAL
from emu_jax.sharding import shard

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

zeros = jax.nn.initializers.zeros


def normalize_images(
    images: UInt8[Array, "*batch h w 3"], dtype: jnp.dtype = jnp.float32
) -> Float[Array, "*batch h w 3"]:
    """Normalizes RGB in 0..255 for the visual encoder; computed in float32."""
    pixels = jnp.asarray(images).astype(jnp.float32) / 255
    return ((pixels - jnp.asarray(CLIP_MEAN)) / jnp.asarray(CLIP_STD)).astype(dtype)


def interpolate_positions(positions: Float[Array, "P D"], grid: int) -> Float[Array, "resized D"]:
    """Resizes position embeddings to a grid of patches, bicubically as in the release
    (`interpolate_pos_embed`). The class token's stays.

    Args:
        grid: patches along a side of the new image.
    """
    side = math.isqrt(len(positions) - 1)
    square = rearrange(positions[1:].astype(jnp.float32), "(y x) d -> y x d", y=side)
    weights = jnp.asarray(bicubic_weights(side, grid), jnp.float32)
    square = jnp.einsum("ay,bx,yxd->abd", weights, weights, square, precision="highest")
    patches = rearrange(square, "y x d -> (y x) d").astype(positions.dtype)
    return jnp.concatenate([positions[:1], patches])


def bicubic_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Returns the weights of torch's bicubic interpolation (a = -0.75, edges repeated)."""
    at = (np.arange(new) + 0.5) * old / new - 0.5
    left = np.floor(at).astype(int)
    weights = np.zeros((new, old))
    for offset in range(-1, 3):
        distance = np.abs(at - (left + offset))
        near = (1.25 * distance - 2.25) * distance**2 + 1
        far = -0.75 * (((distance - 5) * distance + 8) * distance - 4)
        value = np.where(distance <= 1, near, far)
        np.add.at(weights, (np.arange(new), np.clip(left + offset, 0, old - 1)), value)
    return weights


class VisionAttention(nnx.Module):
    """Self-attention. One parameter holds the kernels of q, k and v. Only q and v have a bias."""

    def __init__(self, cfg: VisionConfig, *, backend: str | None, rngs: nnx.Rngs) -> None:
        # [in, (q, k, v), heads x head width]: sharding the heads keeps q, k and v apart.
        self.qkv = param(
            rngs, normal(cfg.width**-0.5), (cfg.width, 3, cfg.width), ("embed", None, "heads")
        )
        self.q_bias = param(rngs, zeros, (cfg.width,), ("heads",))
        self.v_bias = param(rngs, zeros, (cfg.width,), ("heads",))
        self.proj = Linear(cfg.width, cfg.width, ("heads", "embed"), rngs=rngs)
        self.head_width, self.backend = cfg.head_width, backend

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        # Three matmuls: slicing the result of a single one would copy it.
        qkv = self.qkv[...].astype(x.dtype)
        q, k, v = (low_precision_matmul(x, qkv[:, part]) for part in range(3))
        q, v = (a + bias[...].astype(x.dtype) for a, bias in ((q, self.q_bias), (v, self.v_bias)))
        q, k, v = (
            rearrange(checkpoint_name(a, CHECKPOINT_QKV), "b p (h k) -> b p h k", k=self.head_width)
            for a in (q, k, v)
        )
        out = attention(q, k, v, scale=self.head_width**-0.5, backend=self.backend)
        out = self.proj(rearrange(out, "b p h k -> b p (h k)"))
        return checkpoint_name(out, CHECKPOINT_RESIDUAL)


class VisionMLP(nnx.Module):
    """fc2(gelu(fc1(x))) with the exact (erf) GELU."""

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs) -> None:
        self.fc1 = Linear(cfg.width, cfg.mlp_width, ("embed", "mlp"), rngs=rngs)
        self.fc2 = Linear(cfg.mlp_width, cfg.width, ("mlp", "embed"), rngs=rngs)

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        return self.fc2(gelu(self.fc1(x)))


class VisionBlock(nnx.Module):
    """Transformer block. The norms are before attention and MLP, or after them (`post_norm`)."""

    def __init__(self, cfg: VisionConfig, *, backend: str | None, rngs: nnx.Rngs) -> None:
        self.norm1 = LayerNorm(cfg.width, eps=cfg.eps, rngs=rngs)
        self.attn = VisionAttention(cfg, backend=backend, rngs=rngs)
        self.norm2 = LayerNorm(cfg.width, eps=cfg.eps, rngs=rngs)
        self.mlp = VisionMLP(cfg, rngs=rngs)
        self.post_norm = cfg.post_norm

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        if self.post_norm:
            x = shard(x + self.norm1(self.attn(x)), "image", None, None)
            return shard(x + self.norm2(self.mlp(x)), "image", None, None)
        x = shard(x + self.attn(self.norm1(x)), "image", None, None)
        return shard(x + self.mlp(self.norm2(x)), "image", None, None)


class VisionTransformer(nnx.Module):
    """The visual encoder. Emu uses the raw output of its blocks; `norm` and `head` are for CLIP,
    and None without `final_norm`."""

    def __init__(
        self,
        cfg: VisionConfig,
        *,
        remat: str = "none",
        matmul_dtype: str = "",
        backend: str | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.patch_embed = Linear(cfg.patch_size**2 * 3, cfg.width, (None, "embed"), rngs=rngs)
        self.cls_token = param(rngs, normal(0.02), (cfg.width,), (None,))
        self.pos_embed = param(rngs, normal(0.02), (cfg.tokens, cfg.width), (None, "embed"))
        self.blocks = stack(
            cfg.layers, lambda rngs: VisionBlock(cfg, backend=backend, rngs=rngs), rngs
        )
        self.norm = LayerNorm(cfg.width, eps=cfg.eps, rngs=rngs) if cfg.final_norm else None
        self.head = (
            Linear(cfg.width, cfg.clip_width, ("embed", None), rngs=rngs)
            if cfg.final_norm
            else None
        )
        self.patch_size, self.remat, self.matmul_dtype = cfg.patch_size, remat, matmul_dtype

    def __call__(
        self, pixels: Float[Array, "B h w 3"], *, rounding_key: Key[Array, ""] | None = None
    ) -> Float[Array, "B P D"]:
        """Encodes normalized pixels as features without the final norm, the class token first
        (`forward_features` of the release).

        With a rounding key, gradients in int8 are rounded stochastically.
        """
        # A convolution whose stride is its kernel size is a matmul over flattened patches.
        patches = rearrange(
            pixels, "b (y p) (x q) c -> b (y x) (p q c)", p=self.patch_size, q=self.patch_size
        )
        x = self.patch_embed(patches)
        cls = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([cls, x], axis=1) + self.pos_embed[...].astype(x.dtype)
        x = shard(x, "image", None, None)
        x, _ = scan(
            self.blocks,
            lambda block, x, _: (block(x), None),
            x,
            remat=self.remat,
            matmul_dtype=self.matmul_dtype,
            rounding_key=rounding_key,
        )
        return x

    def clip_embedding(self, pixels: Float[Array, "B h w 3"]) -> Float[Array, "B E"]:
        """Returns the contrastive embedding, head(norm(class token)), not scaled to unit length.

        Raises:
            ValueError: the encoder has no contrastive head.
        """
        if self.norm is None or self.head is None:
            raise ValueError("no contrastive head (VisionConfig.final_norm): set it to True")
        return self.head(self.norm(self(pixels)[:, 0]))
