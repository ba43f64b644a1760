"""Painting: from the embeddings of an image to its pixels (release: `Emu1/models/pipeline.py`,
`Emu2/emu/diffusion.py`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Real, UInt8

from emu_jax import diffusion
from emu_jax.config import EmuConfig
from emu_jax.errors import UserError
from emu_jax.models.emu import EmuModel


def native_side(cfg: EmuConfig) -> int:
    """Returns the side of the square images that the decoder was trained on, in pixels."""
    assert cfg.unet is not None and cfg.vae is not None
    return cfg.unet.sample_size * cfg.vae.downscale


def image_shape(
    cfg: EmuConfig, height: int | None = None, width: int | None = None
) -> tuple[int, int]:
    """Returns the height and width of the images to paint, by default the decoder's own.

    Raises:
        UserError: a side is not a positive multiple of the pixels of a latent.
    """
    assert cfg.vae is not None
    default, step = native_side(cfg), cfg.vae.downscale
    shape = (default if height is None else height, default if width is None else width)
    for name, side in zip(("height", "width"), shape, strict=True):
        if side < step or side % step:
            raise UserError(f"{name} cannot be {side}: give a positive multiple of {step} pixels")
    return shape


def size_condition(
    cfg: EmuConfig,
    shape: tuple[int, int],
    *,
    original_size: tuple[int, int] | None = None,
    crops_coords_top_left: tuple[int, int] | None = None,
    target_size: tuple[int, int] | None = None,
) -> Float[np.ndarray, "6"] | None:
    """Returns the sizes that the denoiser is conditioned on, or None if it takes none.

    Args:
        shape: height and width of the image to paint, the default of `target_size`.
        original_size: height and width of the imagined original; by default those of the images
            that the decoder was trained on.
        crops_coords_top_left: top and left of the crop from it; by default the corner.

    Raises:
        UserError: a size is given, but the denoiser takes none.
    """
    assert cfg.unet is not None
    given = {
        "original_size": original_size,
        "crops_coords_top_left": crops_coords_top_left,
        "target_size": target_size,
    }
    if not cfg.unet.takes_sizes:
        for name, value in given.items():
            if value is not None:
                raise UserError(f"{name} has no effect on this model's decoder: leave it out")
        return None
    side = native_side(cfg)
    original_size = original_size or (side, side)
    numbers = (*original_size, *(crops_coords_top_left or (0, 0)), *(target_size or shape))
    return np.array(numbers, np.float32)


def initial_latents(
    keys: Key[Array, "B"],
    cfg: EmuConfig,
    dtype: jnp.dtype = jnp.float32,
    image_shape: tuple[int, int] | None = None,
) -> Float[Array, "B height width channels"]:
    """Samples Gaussian latents, each from its own key, so that an image does not depend on its
    batch.

    Args:
        image_shape: height and width of the images in pixels, by default the decoder's own.
    """
    assert cfg.unet is not None and cfg.vae is not None
    height, width = image_shape or (native_side(cfg),) * 2
    step = cfg.vae.downscale
    shape = (height // step, width // step, cfg.unet.in_channels)
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
    sizes: Real[Array, "6"] | Real[np.ndarray, "6"] | None = None,
) -> Float[Array, "B height width channels"]:
    """Denoises latents in one scan. `uncond` is one condition for all images, or one for each.

    Args:
        sizes: those of all images (`size_condition`).
    """
    if uncond is not None:
        uncond = jnp.broadcast_to(uncond, cond.shape)
    return diffusion.sample(
        denoiser(emu, sizes),
        latents,
        cond,
        uncond,
        cfg=emu.cfg.scheduler,
        steps=steps,
        guidance=guidance,
        method=method,
    )


def denoiser(
    emu: EmuModel, sizes: Real[Array, "6"] | Real[np.ndarray, "6"] | None = None
) -> diffusion.Denoiser:
    """Returns the denoiser as a function of latents, timesteps and condition, given the sizes of
    all images."""
    unet = emu.unet
    assert unet is not None
    if sizes is None:
        return unet
    numbers = jnp.asarray(sizes, jnp.float32)
    return lambda x, t, cond: unet(x, t, cond, jnp.broadcast_to(numbers, (len(x), 6)))


def decode_latents(
    emu: EmuModel, latents: Float[Array, "B height width channels"]
) -> Float[Array, "B image_height image_width 3"]:
    """Decodes latents to pixels in [0, 1]."""
    assert emu.vae is not None
    pixels = emu.vae.decode(latents / emu.vae.cfg.scaling_factor)
    return jnp.clip(pixels.astype(jnp.float32) / 2 + 0.5, 0, 1)


class Stopped(Exception):
    """Raised when the caller's `stop` returned True."""


def start_painting(
    keys: Key[Array, "B"],
    cfg: EmuConfig,
    dtype: jnp.dtype,
    image_shape: tuple[int, int] | None = None,
) -> diffusion.SamplerState:
    """Returns the sampler's state before the first step: noise, each image's from its own key."""
    return diffusion.initial_state(initial_latents(keys, cfg, dtype, image_shape))


def paint_steps(
    emu: EmuModel,
    state: diffusion.SamplerState,
    cond: Float[Array, "B N D"],
    uncond: Float[Array, "N D"] | Float[Array, "B N D"] | None,
    guidance: Float[Array, ""] | float,
    table: diffusion.Steps,
    first: int | Int[Array, ""],
    last: int | Int[Array, ""],
    sizes: Real[Array, "6"] | Real[np.ndarray, "6"] | None = None,
) -> diffusion.SamplerState:
    """Runs the sampler's steps `first` to `last` (exclusive); see `sample_latents`."""
    if uncond is not None:
        uncond = jnp.broadcast_to(uncond, cond.shape)
    return diffusion.advance(
        denoiser(emu, sizes),
        state,
        cond,
        uncond,
        table=table,
        first=first,
        last=last,
        guidance=guidance,
    )


def finish_painting(
    emu: EmuModel, state: diffusion.SamplerState, dtype: jnp.dtype
) -> UInt8[Array, "B height width 3"]:
    """Decodes the denoised latents to pixels."""
    return jnp.round(decode_latents(emu, state.latents.astype(dtype)) * 255).astype(jnp.uint8)
