"""The denoiser: the U-Net of Stable Diffusion or SDXL, conditioned on N visual embeddings instead
of a text encoder's states (release: `Emu1/models/pipeline.py`, `Emu2/emu/diffusion.py`; diffusers
0.21 and 0.24, `UNet2DConditionModel`). Submodule names are those of diffusers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Real

from emu_jax.config import UNetConfig
from emu_jax.errors import UserError
from emu_jax.models.conv import Attention, Conv, Downsample, GroupNorm, ResnetBlock, Upsample
from emu_jax.models.layers import LayerNorm, Linear, gelu
from emu_jax.models.remat import REMAT
from emu_jax.sharding import shard


def sinusoidal_features(
    numbers: Real[Array, "*B"], width: int, cfg: UNetConfig
) -> Float[Array, "*B D"]:
    """Returns sines and cosines of numbers such as timesteps, `width` wide, in float32."""
    half = width // 2
    frequency = np.exp(-np.log(10000.0) * np.arange(half) / (half - cfg.freq_shift))
    angle = numbers.astype(jnp.float32)[..., None] * jnp.asarray(frequency, jnp.float32)
    waves = [jnp.sin(angle), jnp.cos(angle)]
    return jnp.concatenate(waves[::-1] if cfg.flip_sin_to_cos else waves, axis=-1)


class TimestepEmbedding(nnx.Module):
    """linear_2(silu(linear_1(features)))."""

    def __init__(self, width_in: int, width: int, *, rngs: nnx.Rngs) -> None:
        self.linear_1 = Linear(width_in, width, ("embed", "mlp"), rngs=rngs)
        self.linear_2 = Linear(width, width, ("mlp", "embed"), rngs=rngs)

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B E"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class FeedForward(nnx.Module):
    """out(value * gelu(gate)), value and gate from one matmul (GEGLU, exact GELU)."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.proj = Linear(width, 8 * width, ("embed", "mlp"), rngs=rngs)
        self.out = Linear(4 * width, width, ("mlp", "embed"), rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return self.out(value * gelu(gate))


class TransformerBlock(nnx.Module):
    """Self-attention among pixels, cross-attention to the condition, and a feed-forward layer."""

    def __init__(self, width: int, heads: int, cfg: UNetConfig, *, rngs: nnx.Rngs) -> None:
        self.norm1 = LayerNorm(width, eps=1e-5, rngs=rngs)
        self.attn1 = Attention(width, width, heads=heads, rngs=rngs)
        self.norm2 = LayerNorm(width, eps=1e-5, rngs=rngs)
        self.attn2 = Attention(width, cfg.cross_attention_dim, heads=heads, rngs=rngs)
        self.norm3 = LayerNorm(width, eps=1e-5, rngs=rngs)
        self.ff = FeedForward(width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], cond: Float[Array, "B N E"]
    ) -> Float[Array, "B T D"]:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), cond)
        return x + self.ff(self.norm3(x))


class Transformer2D(nnx.Module):
    """Transformer blocks over the pixels of a feature map, as many as its `level` has."""

    def __init__(self, width: int, level: int, cfg: UNetConfig, *, rngs: nnx.Rngs) -> None:
        def projection() -> Conv | Linear:
            if cfg.use_linear_projection:
                return Linear(width, width, ("conv_in", "conv_out"), rngs=rngs)
            return Conv(width, width, size=1, rngs=rngs)

        self.norm = GroupNorm(width, groups=cfg.norm_num_groups, eps=1e-6, rngs=rngs)
        self.proj_in = projection()
        self.transformer_blocks = nnx.List(
            [
                TransformerBlock(width, cfg.heads[level], cfg, rngs=rngs)
                for _ in range(cfg.transformer_layers[level])
            ]
        )
        self.proj_out = projection()

    def __call__(
        self, x: Float[Array, "B h w C"], cond: Float[Array, "B N D"]
    ) -> Float[Array, "B h w C"]:
        # A linear projection works on pixels as a 1x1 convolution does.
        y = rearrange(self.proj_in(self.norm(x)), "b h w c -> b (h w) c")
        for block in self.transformer_blocks:
            y = block(y, cond)
        return x + self.proj_out(y.reshape(x.shape))


def resnet(width_in: int, width_out: int, cfg: UNetConfig, rngs: nnx.Rngs) -> ResnetBlock:
    return ResnetBlock(
        width_in,
        width_out,
        groups=cfg.norm_num_groups,
        eps=cfg.norm_eps,
        time_width=4 * cfg.block_out_channels[0],
        rngs=rngs,
    )


class DownBlock(nnx.Module):
    """ResNet blocks, each followed by attention if `attend`, then a downsampler unless `last`."""

    def __init__(
        self,
        width_in: int,
        width: int,
        level: int,
        cfg: UNetConfig,
        *,
        attend: bool,
        last: bool,
        rngs: nnx.Rngs,
    ) -> None:
        inputs = [width_in] + [width] * (cfg.layers_per_block - 1)
        self.resnets = nnx.List([resnet(w, width, cfg, rngs) for w in inputs])
        self.attentions = nnx.List(
            [Transformer2D(width, level, cfg, rngs=rngs) for _ in inputs if attend]
        )
        self.downsamplers = nnx.List([] if last else [Downsample(width, rngs=rngs)])

    def __call__(
        self,
        x: Float[Array, "B _ _ _"],
        time: Float[Array, "B _"],
        cond: Float[Array, "B N _"],
    ) -> tuple[Float[Array, "B _ _ _"], list[Float[Array, "B _ _ _"]]]:
        """Returns the feature map, and the skip connections for the up blocks."""
        skips = []
        for i, block in enumerate(self.resnets):
            x = block(x, time)
            if self.attentions:
                x = self.attentions[i](x, cond)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips


class UNetMidBlock(nnx.Module):
    """ResNet block, attention, ResNet block."""

    def __init__(self, width: int, cfg: UNetConfig, *, rngs: nnx.Rngs) -> None:
        self.resnets = nnx.List([resnet(width, width, cfg, rngs) for _ in range(2)])
        self.attentions = nnx.List([Transformer2D(width, -1, cfg, rngs=rngs)])

    def __call__(
        self, x: Float[Array, "B h w C"], time: Float[Array, "B _"], cond: Float[Array, "B N _"]
    ) -> Float[Array, "B h w C"]:
        x = self.attentions[0](self.resnets[0](x, time), cond)
        return self.resnets[1](x, time)


class UpBlock(nnx.Module):
    """ResNet blocks that each take a skip connection, followed by attention if `attend`; then an
    upsampler unless `last`."""

    def __init__(
        self,
        width_in: int,
        width: int,
        level: int,
        skips: list[int],
        cfg: UNetConfig,
        *,
        attend: bool,
        last: bool,
        rngs: nnx.Rngs,
    ) -> None:
        inputs = [w + s for w, s in zip([width_in] + [width] * len(skips), skips, strict=False)]
        self.resnets = nnx.List([resnet(w, width, cfg, rngs) for w in inputs])
        self.attentions = nnx.List(
            [Transformer2D(width, level, cfg, rngs=rngs) for _ in inputs if attend]
        )
        self.upsamplers = nnx.List([] if last else [Upsample(width, rngs=rngs)])

    def __call__(
        self,
        x: Float[Array, "B h w _"],
        skips: list[Float[Array, "B _ _ _"]],
        time: Float[Array, "B _"],
        cond: Float[Array, "B N _"],
        *,
        size: tuple[int, int] | None = None,
    ) -> Float[Array, "B _ _ _"]:
        """Returns the feature map. `skips` are in the order in which they are read. `size` is the
        output's height and width, if not twice the input's."""
        for i, (block, skip) in enumerate(zip(self.resnets, skips, strict=True)):
            x = block(jnp.concatenate([x, skip], axis=-1), time)
            if self.attentions:
                x = self.attentions[i](x, cond)
        for upsample in self.upsamplers:
            x = upsample(x, size)
        return x


class UNet(nnx.Module):
    """Predicts the noise in latents, or their velocity (`SchedulerConfig.prediction_type`).

    `remat` names what each block saves for its backward pass (`remat.REMAT`).

    Raises:
        UserError: the configuration's lists disagree in length, or name an unknown block.
    """

    def __init__(self, cfg: UNetConfig, *, remat: str = "none", rngs: nnx.Rngs) -> None:
        widths, layers = cfg.block_out_channels, cfg.layers_per_block
        down = _attends(cfg, "down_block_types", "DownBlock2D")
        up = _attends(cfg, "up_block_types", "UpBlock2D")
        cfg.check_levels()
        last = len(widths) - 1

        self.conv_in = Conv(cfg.in_channels, widths[0], rngs=rngs)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0], rngs=rngs)
        self.add_embedding = (
            TimestepEmbedding(
                cfg.projection_class_embeddings_input_dim or 0, 4 * widths[0], rngs=rngs
            )
            if cfg.takes_sizes
            else None
        )

        blocks, width, skips = [], widths[0], [widths[0]]
        for i, wider in enumerate(widths):
            blocks.append(
                DownBlock(width, wider, i, cfg, attend=down[i], last=i == last, rngs=rngs)
            )
            width = wider
            skips += [width] * (layers if i == last else layers + 1)
        self.down_blocks = nnx.List(blocks)

        self.mid_block = UNetMidBlock(width, cfg, rngs=rngs)

        blocks = []
        for i, narrower in enumerate(reversed(widths)):
            read = [skips.pop() for _ in range(layers + 1)]
            blocks.append(
                UpBlock(
                    width, narrower, last - i, read, cfg, attend=up[i], last=i == last, rngs=rngs
                )
            )
            width = narrower
        self.up_blocks = nnx.List(blocks)

        self.conv_norm_out = GroupNorm(
            width, groups=cfg.norm_num_groups, eps=cfg.norm_eps, rngs=rngs
        )
        self.conv_out = Conv(width, cfg.out_channels, rngs=rngs)
        self.cfg, self.remat = cfg, remat

    def __call__(
        self,
        sample: Float[Array, "B h w C"],
        timesteps: Real[Array, "B"],
        cond: Float[Array, "B N D"],
        sizes: Real[Array, "B 6"] | None = None,
        pooled: Float[Array, "B P"] | None = None,
    ) -> Float[Array, "B h w E"]:
        """Runs the denoiser once, in the dtype of `sample`, which may have any height and width.

        Args:
            sizes: original height and width, top and left of the crop, target height and width, in
                pixels; if the denoiser `takes_sizes`, and only then.
            pooled: the condition that is added with the sizes; by default the mean over the N rows
                of `cond`.

        Raises:
            ValueError: `sizes` are missing, or the denoiser takes none.
        """
        x = self.conv_in(shard(sample, "batch", None, None, None))
        cond = cond.astype(x.dtype)
        pooled = jnp.mean(cond, 1) if pooled is None else pooled
        time = self._time(timesteps, sizes, pooled.astype(x.dtype))

        skips = [x]
        for block in self.down_blocks:
            x, more = self._run(block, x, time, cond)
            x = shard(x, "batch", None, None, None)
            skips += more
        x = self._run(self.mid_block, x, time, cond)
        for block in self.up_blocks:
            read = [skips.pop() for _ in block.resnets]
            # Downsampling rounds odd sides up. The next skip connection has the size to restore.
            size = (skips[-1].shape[1], skips[-1].shape[2]) if skips else None
            x = self._run(block, x, read, time, cond, size=size)
            x = shard(x, "batch", None, None, None)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))

    def _time(
        self,
        timesteps: Real[Array, "B"],
        sizes: Real[Array, "B 6"] | None,
        pooled: Float[Array, "B P"],
    ) -> Float[Array, "B E"]:
        """Returns the time embedding, with the added conditions if the denoiser has them."""
        cfg, dtype = self.cfg, pooled.dtype
        if cfg.takes_sizes != (sizes is not None):
            needed = "needs the sizes of images" if cfg.takes_sizes else "takes no sizes"
            raise ValueError(f"the denoiser {needed} (unet.addition_embed_type)")
        features = sinusoidal_features(timesteps, cfg.block_out_channels[0], cfg)
        time = self.time_embedding(features.astype(dtype))
        if self.add_embedding is None or sizes is None:
            return time
        numbers = sinusoidal_features(sizes, cfg.addition_time_embed_dim or 0, cfg)
        numbers = rearrange(numbers, "b n d -> b (n d)").astype(dtype)
        return time + self.add_embedding(jnp.concatenate([pooled, numbers], -1))

    def _run(self, block: Any, *inputs: Any, **static: Any) -> Any:
        if self.remat == "none":
            return block(*inputs, **static)
        graphdef, params = nnx.split(block)
        run = jax.checkpoint(
            lambda params, *inputs: nnx.merge(graphdef, params)(*inputs, **static),
            policy=REMAT[self.remat],
        )
        return run(params, *inputs)


def _attends(cfg: UNetConfig, key: str, plain: str) -> list[bool]:
    """Returns whether each block has attention, from the names of diffusers' block types."""
    kinds = {plain: False, f"CrossAttn{plain}": True}
    types = getattr(cfg, key)
    for name in types:
        if name not in kinds:
            raise UserError(f"unet.{key}: unknown block {name!r}; known: {', '.join(kinds)}")
    if len(types) != len(cfg.block_out_channels):
        raise UserError(
            f"unet.{key} names {len(types)} blocks, unet.block_out_channels "
            f"{len(cfg.block_out_channels)}: give both the same number"
        )
    return [kinds[name] for name in types]
