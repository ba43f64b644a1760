"""Low-rank adapters (release: peft 0.4 with r=16, alpha=16, dropout 0.05 on q/k/v/o)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from emu_jax.config import LoraConfig
from emu_jax.models.layers import Axes, Linear, lecun, param


class LoraLinear(Linear):
    """y = x W + (alpha / rank) (x A) B. B starts at zero, so y starts as the base layer's."""

    def __init__(
        self, width_in: int, width_out: int, axes: Axes, *, lora: LoraConfig, rngs: nnx.Rngs
    ):
        super().__init__(width_in, width_out, axes, bias=False, rngs=rngs)
        self.lora_a = param(rngs, lecun, (width_in, lora.rank), (axes[0], None))
        zeros = jax.nn.initializers.zeros
        self.lora_b = param(rngs, zeros, (lora.rank, width_out), (None, axes[1]))
        self.scale, self.dropout = lora.alpha / lora.rank, lora.dropout

    def __call__(
        self, x: Float[Array, "B T D"], *, dropout_key: jax.Array | None = None
    ) -> Float[Array, "B T E"]:
        """With a key, as in training, entries of what the adapter reads are dropped."""
        y, low = super().__call__(x), x
        if dropout_key is not None and self.dropout > 0:
            keep = jax.random.bernoulli(dropout_key, 1 - self.dropout, x.shape)
            low = jnp.where(keep, x / (1 - self.dropout), 0)
        low = low @ self.lora_a[...].astype(x.dtype)
        return y + self.scale * (low @ self.lora_b[...].astype(x.dtype))


def adapted(
    layer: Linear, x: Float[Array, "B T D"], dropout_key: jax.Array | None, place: int
) -> Float[Array, "B T E"]:
    """`layer(x)`; an adapter drops by its own key, the `place`th of its block's."""
    if dropout_key is None or not isinstance(layer, LoraLinear):
        return layer(x)
    return layer(x, dropout_key=jax.random.fold_in(dropout_key, place))


def merge(kernel: jax.Array, a: jax.Array, b: jax.Array, lora: LoraConfig) -> jax.Array:
    """The plain kernel [.., in, out] that computes what base and adapter compute together."""
    low = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return kernel + (lora.alpha / lora.rank) * low
