"""The autoencoder between pixels and latents (diffusers 0.21, `AutoencoderKL`). Submodule names
are those of diffusers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from emu_jax.config import VAEConfig
from emu_jax.errors import UserError
from emu_jax.models.conv import Attention, Conv, Downsample, GroupNorm, ResnetBlock, Upsample
from emu_jax.sharding import shard

EPS = 1e-6


class AttentionBlock(Attention):
    """Single-head self-attention over all pixels, with a residual."""

    def __init__(self, width: int, groups: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(width, width, heads=1, bias=True, rngs=rngs)
        self.group_norm = GroupNorm(width, groups=groups, eps=EPS, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        y = super().__call__(rearrange(self.group_norm(x), "b h w c -> b (h w) c"))
        return x + y.reshape(x.shape)


class VAEMidBlock(nnx.Module):
    """ResNet block, attention, ResNet block."""

    def __init__(self, width: int, groups: int, *, rngs: nnx.Rngs) -> None:
        self.resnets = nnx.List(
            [ResnetBlock(width, width, groups=groups, eps=EPS, rngs=rngs) for _ in range(2)]
        )
        self.attentions = nnx.List([AttentionBlock(width, groups, rngs=rngs)])

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nnx.Module):
    """ResNet blocks of one resolution, then a downsampler (`down`) or an upsampler (`up`)."""

    def __init__(
        self,
        width_in: int,
        width: int,
        layers: int,
        groups: int,
        *,
        down: bool = False,
        up: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.resnets = nnx.List(
            [
                ResnetBlock(w, width, groups=groups, eps=EPS, rngs=rngs)
                for w in [width_in] + [width] * (layers - 1)
            ]
        )
        self.downsamplers = nnx.List([Downsample(width, one_sided=True, rngs=rngs)] if down else [])
        self.upsamplers = nnx.List([Upsample(width, rngs=rngs)] if up else [])

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B y x E"]:
        for layer in [*self.resnets, *self.downsamplers, *self.upsamplers]:
            x = layer(x)
        return shard(x, "batch", None, None, None)


class Encoder(nnx.Module):
    """Maps pixels to the moments of the latents."""

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs) -> None:
        widths, groups = cfg.block_out_channels, cfg.norm_num_groups
        self.conv_in = Conv(cfg.in_channels, widths[0], rngs=rngs)
        self.down_blocks = nnx.List(
            [
                Level(
                    before, width, cfg.layers_per_block, groups, down=i < len(widths) - 1, rngs=rngs
                )
                for i, (before, width) in enumerate(
                    zip((widths[0], *widths[:-1]), widths, strict=True)
                )
            ]
        )
        self.mid_block = VAEMidBlock(widths[-1], groups, rngs=rngs)
        self.conv_norm_out = GroupNorm(widths[-1], groups=groups, eps=EPS, rngs=rngs)
        self.conv_out = Conv(widths[-1], 2 * cfg.latent_channels, rngs=rngs)

    def __call__(self, x: Float[Array, "B Hh Ww C"]) -> Float[Array, "B h w E"]:
        x = self.conv_in(shard(x, "batch", None, None, None))
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    """Maps latents to pixels. Each resolution has one ResNet block more than in the encoder."""

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs) -> None:
        widths, groups = cfg.block_out_channels[::-1], cfg.norm_num_groups
        self.conv_in = Conv(cfg.latent_channels, widths[0], rngs=rngs)
        self.mid_block = VAEMidBlock(widths[0], groups, rngs=rngs)
        self.up_blocks = nnx.List(
            [
                Level(
                    before,
                    width,
                    cfg.layers_per_block + 1,
                    groups,
                    up=i < len(widths) - 1,
                    rngs=rngs,
                )
                for i, (before, width) in enumerate(
                    zip((widths[0], *widths[:-1]), widths, strict=True)
                )
            ]
        )
        self.conv_norm_out = GroupNorm(widths[-1], groups=groups, eps=EPS, rngs=rngs)
        self.conv_out = Conv(widths[-1], cfg.out_channels, rngs=rngs)

    def __call__(self, z: Float[Array, "B h w C"]) -> Float[Array, "B Hh Ww E"]:
        x = self.mid_block(self.conv_in(shard(z, "batch", None, None, None)))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class VAE(nnx.Module):
    """Maps pixels in [-1, 1] to a Gaussian over latents, and latents back to pixels.

    Latents here are unscaled. The denoiser works on latents multiplied by `cfg.scaling_factor`:
    multiply the output of `encode`, and divide the input of `decode`.
    """

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs) -> None:
        self.encoder = Encoder(cfg, rngs=rngs)
        self.decoder = Decoder(cfg, rngs=rngs)
        self.quant_conv = Conv(2 * cfg.latent_channels, 2 * cfg.latent_channels, size=1, rngs=rngs)
        self.post_quant_conv = Conv(cfg.latent_channels, cfg.latent_channels, size=1, rngs=rngs)
        self.cfg = cfg

    def encode(
        self, x: Float[Array, "B Hh Ww C"]
    ) -> tuple[Float[Array, "B h w E"], Float[Array, "B h w E"]]:
        """Returns mean and log-variance of the latents, with sides `cfg.downscale` times shorter.

        Raises:
            UserError: `cfg.downscale` does not divide a side of `x`.
        """
        height, width = x.shape[1:3]
        if height % self.cfg.downscale or width % self.cfg.downscale:
            raise UserError(
                f"an image of {height}x{width}: each side must be a multiple of "
                f"{self.cfg.downscale}"
            )
        mean, logvar = jnp.split(self.quant_conv(self.encoder(x)), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z: Float[Array, "B h w C"]) -> Float[Array, "B Hh Ww E"]:
        """Returns pixels, roughly in [-1, 1] but not clipped to it."""
        return self.decoder(self.post_quant_conv(z))
