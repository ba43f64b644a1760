"""Layers shared by the towers.

Parameters are float32. Layers compute in the dtype of their input; norms and softmax compute in
float32. Each parameter names its logical axes (`sharding.RULES`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from emu_jax.models import cpu, low_precision, quantized
from emu_jax.models.backend import kernels
from emu_jax.models.remat import REMAT

M = TypeVar("M", bound=nnx.Module)
Carry = TypeVar("Carry")
Y = TypeVar("Y")
Axes = tuple[str | None, ...]

lecun = jax.nn.initializers.lecun_normal()


def normal(std: float) -> Callable[..., jax.Array]:
    return jax.nn.initializers.normal(std)


def param(
    rngs: nnx.Rngs, init: Callable[..., jax.Array], shape: tuple[int, ...], axes: Axes
) -> nnx.Param:
    """Creates a float32 parameter that carries its logical axes."""
    # Equivalent to `rngs.params()`, whose `count[...] += 1` looks up the sharding of a traced
    # number. The look-up slows down with the number of parameters: minutes for the 14B model.
    stream = rngs.params
    key = jax.random.fold_in(stream.key[...], stream.count[...])
    stream.count.set_value(stream.count[...] + 1)
    return nnx.Param(init(key, shape, jnp.float32), axes=axes)


def gelu(x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
    """Returns the exact GELU of `x`."""
    return kernels().gelu(x)


class Linear(nnx.Module):
    """y = x @ kernel (+ bias); kernel [in, out]."""

    def __init__(
        self,
        width_in: int,
        width_out: int,
        axes: Axes,
        *,
        bias: bool = True,
        init: Callable[..., jax.Array] = lecun,
        rngs: nnx.Rngs,
    ) -> None:
        self.kernel = param(rngs, init, (width_in, width_out), axes)
        zeros = jax.nn.initializers.zeros
        self.bias = param(rngs, zeros, (width_out,), axes[1:]) if bias else None

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T E"]:
        kernel = self.kernel[...]
        if isinstance(kernel, quantized.QuantizedMatrix):
            y = quantized.quantized_matmul(x, kernel)
        else:
            y = low_precision.low_precision_matmul(x, kernel.astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Embedding(nnx.Module):
    """A table [rows, D], looked up by id."""

    def __init__(
        self,
        rows: int,
        width: int,
        *,
        init: Callable[..., jax.Array] | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        init = init or normal(0.02)
        self.embedding = param(rngs, init, (rows, width), ("vocab", "embed"))

    def __call__(self, ids: Int[Array, "*T"]) -> Float[Array, "*T D"]:
        return jnp.take(self.embedding[...], ids, axis=0)


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis, in float32."""

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs) -> None:
        self.scale = param(rngs, jax.nn.initializers.ones, (width,), (None,))
        self.bias = param(rngs, jax.nn.initializers.zeros, (width,), (None,))
        self.eps = eps

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        return kernels().layer_norm(x, self.scale[...], self.bias[...], self.eps)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32 (T5's and LLaMA's norm)."""

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs) -> None:
        self.scale = param(rngs, jax.nn.initializers.ones, (width,), (None,))
        self.eps = eps

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        return kernels().rms_norm(x, self.scale[...], self.eps)


def stack(layers: int, make: Callable[[nnx.Rngs], M], rngs: nnx.Rngs) -> M:
    """Builds `layers` modules as one whose parameters have a leading "layer" axis."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs: nnx.Rngs) -> M:
        return make(rngs)

    blocks = build(rngs)
    for _, node in nnx.iter_graph(blocks):
        if isinstance(node, nnx.Param):
            node.set_metadata(axes=("layer", *node.get_metadata()["axes"]))
    return blocks


def scan(
    blocks: nnx.Module,
    body: Callable[[Any, Carry, Any], tuple[Carry, Y]],
    carry: Carry,
    xs: Any = None,
    *,
    remat: str = "none",
    matmul_dtype: str = "",
    rounding_key: Key[Array, ""] | None = None,
) -> tuple[Carry, Y]:
    """Runs `carry, y = body(block, carry, x)` over `blocks`.

    Stacked layers are compiled once. Layers unstacked by `cpu.decoding_layers` run one after the
    other, and ignore `remat` and `matmul_dtype`. `xs` and the collected ys have a leading layer
    axis. `remat` names what a layer saves for its backward pass (`remat.REMAT`), and `matmul_dtype`
    the dtype of its matmuls, whose gradients are rounded with `rounding_key` (`low_precision`).
    """
    if isinstance(blocks, nnx.List):
        return cpu.run_layers(blocks, body, carry, xs)

    graphdef, params = nnx.split(blocks)
    layers = len(jax.tree.leaves(params)[0])
    keys = None if rounding_key is None else jax.random.split(rounding_key, layers)

    def step(carry: Carry, layer: tuple[Any, Any, Any]) -> tuple[Carry, Y]:
        params, x, key = layer
        with low_precision.use_matmul_dtype(matmul_dtype, key):
            return body(nnx.merge(graphdef, params), carry, x)

    if remat != "none":
        step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=False)
    return jax.lax.scan(step, carry, (params, xs, keys))
