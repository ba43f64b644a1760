"""Low-rank adapters (release: peft 0.4 with r=16, alpha=16, dropout 0.05 on q/k/v/o)."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from emu_jax.config import LoraConfig
from emu_jax.models.layers import Axes, Linear, lecun, param


class LoraLinear(Linear):
    """y = x W (+ bias) + (alpha / rank) (x A) B. B starts at zero, so y starts as the base layer's.

    `path` names the layer within its block. It is folded into the block's dropout key.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        axes: Axes,
        *,
        path: str,
        lora: LoraConfig,
        bias: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(width_in, width_out, axes, bias=bias, rngs=rngs)
        self.lora_a = param(rngs, lecun, (width_in, lora.rank), (axes[0], None))
        zeros = jax.nn.initializers.zeros
        self.lora_b = param(rngs, zeros, (lora.rank, width_out), (None, axes[1]))
        self.scale, self.dropout = lora.alpha / lora.rank, lora.dropout
        self.path = path

    def __call__(
        self, x: Float[Array, "B T D"], *, dropout_key: Key[Array, ""] | None = None
    ) -> Float[Array, "B T E"]:
        """Applies the layer. With the block's key, as in training, the adapter's input has
        dropout."""
        y, low = super().__call__(x), x
        if dropout_key is not None and self.dropout > 0:
            key = jax.random.fold_in(dropout_key, zlib.crc32(self.path.encode()))
            keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            low = jnp.where(keep, x / (1 - self.dropout), 0)
        low = low @ self.lora_a[...].astype(x.dtype)
        return y + self.scale * (low @ self.lora_b[...].astype(x.dtype))


def adapted(
    layer: Linear, x: Float[Array, "B T D"], dropout_key: Key[Array, ""] | None
) -> Float[Array, "B T E"]:
    """Returns `layer(x)`. If the layer has an adapter, `dropout_key` turns on its dropout."""
    return layer(x, dropout_key=dropout_key) if isinstance(layer, LoraLinear) else layer(x)


def merge(
    kernel: Float[Array, "*L D E"],
    a: Float[Array, "*L D R"],
    b: Float[Array, "*L R E"],
    lora: LoraConfig,
) -> Float[Array, "*L D E"]:
    """Returns the plain kernel [.., in, out] that is equivalent to base and adapter together."""
    low = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return kernel + (lora.alpha / lora.rank) * low
