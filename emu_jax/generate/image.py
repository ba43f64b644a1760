"""Painting: N embeddings to a picture (release: `Emu1/models/pipeline.py`)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from emu_jax import diffusion
from emu_jax.config import EmuConfig
from emu_jax.errors import UserError, suggest
from emu_jax.generate.text import check_types
from emu_jax.models.emu import Emu


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """Settings of image generation; the defaults are the release's.

    Attributes:
        guidance: scale of classifier-free guidance; 1 or less turns it off.
        method: pndm (the release's), ddim or dpm++.
    """

    guidance: float = 7.5
    steps: int = 50
    method: str = "pndm"

    def check(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is invalid.
        """
        check_types(self)
        if self.method not in diffusion.METHODS:
            known = suggest(self.method, diffusion.METHODS)
            raise UserError(f"unknown sampling method {self.method!r}{known}")
        if self.steps < 1:
            raise UserError(f"steps cannot be {self.steps}")


def initial_latents(
    keys: Key[Array, "B"], cfg: EmuConfig, dtype: jnp.dtype = jnp.float32
) -> Float[Array, "B h w C"]:
    """Gaussian latents, each from its own key alone: a picture does not depend on its batch."""
    assert cfg.unet is not None
    shape = (cfg.unet.sample_size, cfg.unet.sample_size, cfg.unet.in_channels)
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys).astype(dtype)


def sample_latents(
    emu: Emu,
    latents: Float[Array, "B h w C"],
    cond: Float[Array, "B N D"],
    uncond: Float[Array, "N D"] | None,
    guidance: Float[Array, ""] | float,
    *,
    steps: int,
    method: str,
) -> Float[Array, "B h w C"]:
    """Denoised latents; the loop is one scan. One `uncond` serves all rows."""
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


def decode_latents(emu: Emu, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
    """Pixels in [0, 1]."""
    assert emu.vae is not None
    pixels = emu.vae.decode(latents / emu.vae.cfg.scaling_factor)
    return jnp.clip(pixels.astype(jnp.float32) / 2 + 0.5, 0, 1)


class Stopped(Exception):
    """The caller's `stop` said that nobody waits for the image any more."""


def start_painting(
    keys: Key[Array, "B"], cfg: EmuConfig, dtype: jnp.dtype
) -> diffusion.SampleState:
    """Noise to paint from, each image's from its own key."""
    return diffusion.start(initial_latents(keys, cfg, dtype))


def paint_steps(
    emu: Emu,
    state: diffusion.SampleState,
    cond: Float[Array, "B N D"],
    uncond: Float[Array, "N D"] | None,
    guidance: Float[Array, ""] | float,
    table: diffusion.Steps,
    first: Int[Array, ""],
    last: Int[Array, ""],
) -> diffusion.SampleState:
    """Rows `first` to `last` of the sampler's table. One `uncond` serves all images."""
    assert emu.unet is not None
    if uncond is not None:
        uncond = jnp.broadcast_to(uncond, cond.shape)
    return diffusion.advance(
        emu.unet, state, cond, uncond, table=table, first=first, last=last, guidance=guidance
    )


def finish_painting(
    emu: Emu, state: diffusion.SampleState, dtype: jnp.dtype
) -> UInt8[Array, "B H W 3"]:
    """Pixels of the denoised latents."""
    return jnp.round(decode_latents(emu, state.latents.astype(dtype)) * 255).astype(jnp.uint8)
