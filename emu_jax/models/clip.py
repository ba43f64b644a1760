"""Contrastive image-text pretraining of the visual encoder, as in EVA-CLIP."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from emu_jax.config import EmuConfig, LlamaConfig
from emu_jax.models.eva_clip import VisionTransformer
from emu_jax.models.layers import Embedding, Linear, RMSNorm, param, scan, stack
from emu_jax.models.llama import LlamaBlock


class TextTower(nnx.Module):
    """A small causal transformer. Its state at the last token represents a caption."""

    def __init__(
        self, vocab: int, width: int, out_width: int, *, layers: int = 2, rngs: nnx.Rngs
    ) -> None:
        cfg = LlamaConfig(
            vocab_size=vocab, width=width, layers=layers, heads=width // 32, mlp_width=2 * width
        )
        self.embed_tokens = Embedding(vocab, width, rngs=rngs)
        self.layers = stack(layers, lambda rngs: LlamaBlock(cfg, rngs=rngs), rngs)
        self.norm = RMSNorm(width, eps=cfg.eps, rngs=rngs)
        self.projection = Linear(width, out_width, ("embed", None), bias=False, rngs=rngs)

    def __call__(
        self, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"], dtype: jnp.dtype = jnp.float32
    ) -> Float[Array, "B E"]:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

        def body(
            block: LlamaBlock, x: Float[Array, "B T D"], _: None
        ) -> tuple[Float[Array, "B T D"], None]:
            x, _ = block(x, positions)
            return x, None

        x, _ = scan(self.layers, body, self.embed_tokens(tokens).astype(dtype))
        last = jnp.sum(valid, axis=1) - 1
        return self.projection(self.norm(x[jnp.arange(x.shape[0]), last]))


class CLIP(nnx.Module):
    """The visual encoder and a text tower, with a learned temperature."""

    def __init__(self, cfg: EmuConfig, *, remat: str = "none", rngs: nnx.Rngs) -> None:
        self.visual = VisionTransformer(cfg.vision, remat=remat, rngs=rngs)
        self.text = TextTower(
            cfg.llama.padded_vocab, cfg.vision.clip_width, cfg.vision.clip_width, rngs=rngs
        )
        self.logit_scale = param(rngs, lambda *_: jnp.log(jnp.float32(1 / 0.07)), (), ())
