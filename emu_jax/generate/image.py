"""Painting: from the embeddings of an image to its pixels (release: `Emu1/models/pipeline.py`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from emu_jax import diffusion
from emu_jax.config import EmuConfig
from emu_jax.models.emu import EmuModel


def initial_latents(
    keys: Key[Array, "B"], cfg: EmuConfig, dtype: jnp.dtype = jnp.float32
) -> Float[Array, "B height width channels"]:
    """Samples Gaussian latents, each from its own key, so that an image does not depend on its
    batch."""
    assert cfg.unet is not None
    shape = (cfg.unet.sample_size, cfg.unet.sample_size, cfg.unet.in_channels)
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys).astype(dtype)


def sample_latents(
    emu: EmuModel,
    latents: Float[Array, "B height width channels"],
    cond: Float[Array, "B N D"],
    uncond: Float[Array, "N D"] | Float[Array, "B N D"] | None,
    guidance: Float[Array, ""] | float,
    *,
    steps: int,
    method: str,
) -> Float[Array, "B height width channels"]:
    """Denoises latents in one scan. `uncond` is one condition for all images, or one for each."""
    assert emu.unet is not None
    if uncond is not None:
        uncond = jnp.broadcast_to(uncond, cond.shape)
    return diffusion.sample(
        emu.unet,
        latents,
        cond,
        uncond,
        cfg=emu.cfg.scheduler,
        steps=steps,
        guidance=guidance,
        method=method,
    )


def decode_latents(
    emu: EmuModel, latents: Float[Array, "B height width channels"]
) -> Float[Array, "B side side 3"]:
    """Decodes latents to pixels in [0, 1]."""
    assert emu.vae is not None
    pixels = emu.vae.decode(latents / emu.vae.cfg.scaling_factor)
    return jnp.clip(pixels.astype(jnp.float32) / 2 + 0.5, 0, 1)


class Stopped(Exception):
    """Raised when the caller's `stop` returned True."""


def start_painting(
    keys: Key[Array, "B"], cfg: EmuConfig, dtype: jnp.dtype
) -> diffusion.SamplerState:
    """Returns the sampler's state before the first step: noise, each image's from its own key."""
    return diffusion.start(initial_latents(keys, cfg, dtype))


def paint_steps(
    emu: EmuModel,
    state: diffusion.SamplerState,
    cond: Float[Array, "B N D"],
    uncond: Float[Array, "N D"] | None,
    guidance: Float[Array, ""] | float,
    table: diffusion.Steps,
    first: Int[Array, ""],
    last: Int[Array, ""],
) -> diffusion.SamplerState:
    """Runs the sampler's steps `first` to `last` (exclusive). All images share `uncond`."""
    assert emu.unet is not None
    if uncond is not None:
        uncond = jnp.broadcast_to(uncond, cond.shape)
    return diffusion.advance(
        emu.unet, state, cond, uncond, table=table, first=first, last=last, guidance=guidance
    )


def finish_painting(
    emu: EmuModel, state: diffusion.SamplerState, dtype: jnp.dtype
) -> UInt8[Array, "B side side 3"]:
    """Decodes the denoised latents to pixels."""
    return jnp.round(decode_latents(emu, state.latents.astype(dtype)) * 255).astype(jnp.uint8)
