"""Kernels for XLA's TPU compiler: those of `xla.py`, except for the ones here.

docs/notes/scaling.md has what each saves in the compiled step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from emu_jax.models import xla


def __getattr__(name: str) -> Any:
    return getattr(xla, name)


@jax.custom_vjp
def rotate_pairs(
    x: Float[Array, "B T H K"],
    cos: Float[Array, "B T 1 pairs"],
    sin: Float[Array, "B T 1 pairs"],
) -> Float[Array, "B T H K"]:
    """Rotates entries i and i + K/2 of a head by an angle, in float32.

    A matmul with a permutation brings each entry its partner, without rounding, and the rest is
    fused into it. From slices of half a head this compiler makes arrays in float32 whose tiles are
    half empty. It has a gradient of its own, so that no policy of `remat.py` saves the matmul.
    """
    half = x.shape[-1] // 2
    swap = np.kron([[0, 1], [-1, 0]], np.eye(half))  # x @ swap is (-second half, first half)
    # Without a barrier the projection before writes x in float32.
    x = jax.lax.optimization_barrier(x)
    partners = jnp.einsum(
        "bthk,kj->bthj",
        x,
        jnp.asarray(swap, x.dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    cos, sin = (jnp.concatenate([wave, wave], axis=-1) for wave in (cos, sin))
    return (x.astype(jnp.float32) * cos + partners * sin).astype(x.dtype)


def _rotate_fwd(
    x: Float[Array, "B T H K"],
    cos: Float[Array, "B T 1 pairs"],
    sin: Float[Array, "B T 1 pairs"],
) -> tuple[Float[Array, "B T H K"], tuple[Float[Array, "B T 1 pairs"], ...]]:
    return rotate_pairs(x, cos, sin), (cos, sin)


def _rotate_bwd(
    waves: tuple[Float[Array, "B T 1 pairs"], ...], gradient: Float[Array, "B T H K"]
) -> tuple[Float[Array, "B T H K"], None, None]:
    """Rotates back. Positions have no gradient."""
    cos, sin = waves
    return rotate_pairs(gradient, cos, -sin), None, None


rotate_pairs.defvjp(_rotate_fwd, _rotate_bwd)
