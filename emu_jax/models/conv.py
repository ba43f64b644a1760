"""Convolutional layers shared by the denoiser and the autoencoder (names as in diffusers).

Images are NHWC, convolution kernels HWIO.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce, repeat
from flax import nnx
from jaxtyping import Array, Float

from emu_jax.models import xla
from emu_jax.models.attention import attention
from emu_jax.models.backend import kernels
from emu_jax.models.layers import Linear, lecun, param
from emu_jax.sharding import shard


class Conv(nnx.Module):
    """A 2D convolution; kernel [size, size, in, out].

    `padding` is ((top, bottom), (left, right)). By default the output has the size of the input,
    divided by the stride.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        *,
        size: int = 3,
        stride: int = 1,
        padding: tuple[tuple[int, int], tuple[int, int]] | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.kernel = param(
            rngs, lecun, (size, size, width_in, width_out), (None, None, "conv_in", "conv_out")
        )
        self.bias = param(rngs, jax.nn.initializers.zeros, (width_out,), ("conv_out",))
        self.stride = stride
        self.padding = padding or ((size // 2, size // 2), (size // 2, size // 2))

    def weights(self, dtype: jnp.dtype) -> tuple[Float[Array, "p q C E"], Float[Array, "E"]]:
        """Returns the kernel and the bias in `dtype`."""
        # An explicit FSDP gather: if batch, input and output channels are all split, XLA's
        # partitioner (jax 0.10.2) gets the gradient of a convolution's input wrong.
        kernel = shard(self.kernel[...].astype(dtype), None, None, None, "conv_out")
        return kernel, self.bias[...].astype(dtype)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B y x E"]:
        kernel, bias = self.weights(x.dtype)
        if kernel.shape[:2] == (1, 1):
            y = x @ kernel[0, 0]
        else:
            y = xla.convolution(x, kernel, self.stride, self.padding)
        return y + bias


class GroupNorm(nnx.Module):
    """Normalizes groups of channels over all pixels, in float32."""

    def __init__(self, width: int, *, groups: int, eps: float, rngs: nnx.Rngs) -> None:
        self.scale = param(rngs, jax.nn.initializers.ones, (width,), (None,))
        self.bias = param(rngs, jax.nn.initializers.zeros, (width,), (None,))
        self.groups, self.eps = groups, eps

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        y = x.astype(jnp.float32)
        y = y - self._mean(y)
        scale = jax.lax.rsqrt(self._mean(jnp.square(y)) + self.eps) * self.scale[...]
        return (y * scale + self.bias[...]).astype(x.dtype)

    def _mean(self, y: Float[Array, "B h w C"]) -> Float[Array, "B 1 1 C"]:
        """Returns the mean of each channel's group.

        Reduces pixels first: a group's few channels as minor axis would waste vector lanes.
        """
        mean = reduce(jnp.mean(y, (1, 2)), "b (g c) -> b g", "mean", g=self.groups)
        return repeat(mean, "b g -> b 1 1 (g c)", c=y.shape[-1] // self.groups)


class Attention(nnx.Module):
    """Multi-head attention to `context`, or self-attention without it."""

    def __init__(
        self, width: int, context_width: int, *, heads: int, bias: bool = False, rngs: nnx.Rngs
    ) -> None:
        axes = ("embed", "heads")
        self.to_q = Linear(width, width, axes, bias=bias, rngs=rngs)
        self.to_k = Linear(context_width, width, axes, bias=bias, rngs=rngs)
        self.to_v = Linear(context_width, width, axes, bias=bias, rngs=rngs)
        self.to_out = Linear(width, width, ("heads", "embed"), rngs=rngs)
        self.heads = heads

    def __call__(
        self, x: Float[Array, "B T D"], context: Float[Array, "B S E"] | None = None
    ) -> Float[Array, "B T D"]:
        context = x if context is None else context
        q, k, v = (
            rearrange(a, "b t (h k) -> b t h k", h=self.heads)
            for a in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        out = attention(q, k, v, scale=q.shape[-1] ** -0.5)
        return self.to_out(rearrange(out, "b t h k -> b t (h k)"))


class ResnetBlock(nnx.Module):
    """Two convolutions with group norm, and a shortcut around them. With `time_width`, as in the
    denoiser, a time embedding is added between the convolutions."""

    def __init__(
        self,
        width_in: int,
        width_out: int,
        *,
        groups: int,
        eps: float,
        time_width: int | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.norm1 = GroupNorm(width_in, groups=groups, eps=eps, rngs=rngs)
        self.conv1 = Conv(width_in, width_out, rngs=rngs)
        self.time_emb_proj = (
            Linear(time_width, width_out, ("embed", "conv_out"), rngs=rngs) if time_width else None
        )
        self.norm2 = GroupNorm(width_out, groups=groups, eps=eps, rngs=rngs)
        self.conv2 = Conv(width_out, width_out, rngs=rngs)
        self.conv_shortcut = (
            Conv(width_in, width_out, size=1, rngs=rngs) if width_in != width_out else None
        )

    def __call__(
        self, x: Float[Array, "B h w C"], time: Float[Array, "B D"] | None = None
    ) -> Float[Array, "B h w E"]:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        if self.time_emb_proj is not None and time is not None:
            h = h + self.time_emb_proj(jax.nn.silu(time))[:, None, None]
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nnx.Module):
    """Halves both sides with a strided convolution.

    The denoiser pads every edge; the autoencoder pads bottom and right only (`one_sided`).
    """

    def __init__(self, width: int, *, one_sided: bool = False, rngs: nnx.Rngs) -> None:
        padding = ((0, 1), (0, 1)) if one_sided else None
        self.conv = Conv(width, width, stride=2, padding=padding, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B y x C"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles both sides by repeating pixels, then convolves.

    `size` overrides the output's height and width, to restore a map whose sides were odd.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.conv = Conv(width, width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B h w C"], size: tuple[int, int] | None = None
    ) -> Float[Array, "B y x C"]:
        height, width = x.shape[1:3]
        if size is None or size == (2 * height, 2 * width):
            return kernels().upsampled_convolution(x, self.conv.weights)
        rows, columns = (
            np.arange(new) * old // new for new, old in zip(size, (height, width), strict=True)
        )
        return self.conv(x[:, rows][:, :, columns])
