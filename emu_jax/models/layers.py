"""Layers shared by the towers.

Axis legend, used in shapes all over the package:
  B batch (rows)    T positions of a row, or queries    S keys, or cache slots
  D width           H heads      K width of a head      F hidden width of an MLP
  V vocabulary      L layers     N causal embeddings of one picture
  I pictures        P patches and the class token       h, w, C pixels or latents, channels

Parameters are float32; every layer computes in the dtype of its input, norms and
softmax in float32. Each parameter names its logical axes (`sharding.RULES`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from emu_jax.models.attention import KEPT
from emu_jax.sharding import platform

M = TypeVar("M", bound=nnx.Module)
Axes = tuple[str | None, ...]

lecun = jax.nn.initializers.lecun_normal()


def normal(std: float) -> Callable[..., jax.Array]:
    return jax.nn.initializers.normal(std)


def param(rngs: nnx.Rngs, init: Callable[..., jax.Array], shape: tuple[int, ...], axes: Axes):
    """A float32 parameter that knows its logical axes."""
    # What `rngs.params()` does. Its `count[...] += 1` looks for the sharding of a traced number,
    # which takes jax time that grows with the number of parameters: minutes for the 14B model.
    stream = rngs.params
    key = jax.random.fold_in(stream.key[...], stream.count[...])
    stream.count.set_value(stream.count[...] + 1)
    return nnx.Param(init(key, shape, jnp.float32), axes=axes)


def product(
    x: Float[Array, "*T D"], kernel: Float[Array, "D E"], dtype: Any = None
) -> Float[Array, "*T E"]:
    """x @ kernel, in `dtype`: that of `x`, unless given."""
    if platform() == "cpu" and x.dtype == jnp.float32:
        return _product(x, kernel)
    return jnp.matmul(x, kernel, preferred_element_type=dtype or x.dtype)


@jax.custom_vjp
def _product(x, kernel):
    return x @ kernel


def _product_bwd(kept, dy):
    """JAX's rule has the kernel's gradient the other way round, dy^T x, which XLA's CPU compiler
    transposes before and after the product. Where y is much wider than x, x^T is copied: that
    costs little, and the faster of XLA's two products takes no transposed operand."""
    x, kernel = kept
    flat, d_flat = (a.reshape(-1, a.shape[-1]) for a in (x, dy))
    left = flat.T
    if kernel.shape[1] >= 4 * kernel.shape[0]:
        left = jax.lax.optimization_barrier(left)
    return dy @ kernel.T, left @ d_flat


_product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _product_bwd)


def gelu(x: jax.Array) -> jax.Array:
    """The exact one: in float32 by erf, as torch has it, which takes XLA fewer steps than the erfc
    of `jax.nn.gelu`; in less precision 1 + erf would lose small values."""
    if x.dtype != jnp.float32:
        return jax.nn.gelu(x, approximate=False)
    return 0.5 * x * (1 + jax.lax.erf(x * np.float32(np.sqrt(0.5))))


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
    ):
        self.kernel = param(rngs, init, (width_in, width_out), axes)
        zeros = jax.nn.initializers.zeros
        self.bias = param(rngs, zeros, (width_out,), axes[1:]) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = product(x, self.kernel[...].astype(x.dtype))
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
    ):
        init = init or normal(0.02)
        self.embedding = param(rngs, init, (rows, width), ("vocab", "embed"))

    def __call__(self, ids: jax.Array) -> jax.Array:
        return jnp.take(self.embedding[...], ids, axis=0)


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis, in float32."""

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs):
        self.scale = param(rngs, jax.nn.initializers.ones, (width,), (None,))
        self.bias = param(rngs, jax.nn.initializers.zeros, (width,), (None,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = standardize(_squeezed(x), self.eps) * self.scale[...] + self.bias[...]
        return y.astype(x.dtype).reshape(x.shape)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32 (T5's and LLaMA's norm)."""

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs):
        self.scale = param(rngs, jax.nn.initializers.ones, (width,), (None,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = _squeezed(x).astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype).reshape(x.shape)


def _squeezed(x: jax.Array) -> jax.Array:
    """On a CPU a batch of one row [1, T, D] as that row: XLA's compiler there is slow at the sums
    of a norm and of its gradient beside an axis of 1."""
    alone = x.ndim == 3 and x.shape[0] == 1 < x.shape[1]
    return x[0] if alone and platform() == "cpu" else x


def standardize(x: jax.Array, eps: float) -> jax.Array:
    """Zero mean and unit variance over the last axis, float32."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps)


def stack(layers: int, make: Callable[[nnx.Rngs], M], rngs: nnx.Rngs) -> M:
    """`layers` modules as one whose parameters have a leading "layer" axis."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs):
        return make(rngs)

    blocks = build(rngs)
    for _, node in nnx.iter_graph(blocks):
        if isinstance(node, nnx.Param):
            node.set_metadata(axes=("layer", *node.get_metadata()["axes"]))
    return blocks


# What `keep` names, beside `attention.KEPT`: queries, keys and values as attention reads them,
# and what a block adds to the residual stream after attention.
QKV, ADDED = "qkv", "added"


def keep(x: jax.Array, name: str) -> jax.Array:
    """Names a value that some remat policy may keep."""
    return checkpoint_name(x, name)


_policies = jax.checkpoint_policies
# What a layer keeps for its backward pass; all else it computes again. From most memory to least:
#   none     everything
#   dots     the output of every product of activations with a parameter, and of attention
#   minimal  attention, its inputs, and what it adds: the MLP's products are computed again
#   offload  as minimal, in the host's memory
#   full     the layer's input alone
REMAT: dict[str, Any] = {
    "none": _policies.everything_saveable,
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(KEPT)
    ),
    "minimal": _policies.save_only_these_names(KEPT, QKV, ADDED),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[KEPT, QKV, ADDED],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "full": _policies.nothing_saveable,
}


def scan(
    blocks: nnx.Module,
    body: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any = None,
    *,
    remat: str = "none",
) -> tuple[Any, Any]:
    """Runs `carry, y = body(block, carry, x)` over `blocks`: stacked ones as one compiled layer,
    those of a list (`unstack`) one after the other, without `remat`.

    `xs` has a leading layer axis (a KV cache, say), and so have the collected ys.
    `remat` names what a layer keeps for its backward pass (`REMAT`).
    """
    if isinstance(blocks, nnx.List):
        ys = []
        for n, block in enumerate(blocks):
            carry, y = body(block, carry, jax.tree.map(lambda a, n=n: a[n], xs))
            ys.append(y)
        return carry, jax.tree.map(lambda *y: jnp.stack(y), *ys)

    graphdef, params = nnx.split(blocks)

    def step(carry, layer):
        params, x = layer
        return body(nnx.merge(graphdef, params), carry, x)

    if remat != "none":
        step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=False)
    return jax.lax.scan(step, carry, (params, xs))


def unstack(blocks: M, layers: int) -> nnx.List[M]:
    """The modules that `stack` made one, each with its own copy of its parameters."""
    graphdef, params = nnx.split(blocks)
    leaves, structure = jax.tree.flatten(params)
    each = zip(*(_apart(leaf, layers) for leaf in leaves), strict=True)
    modules = [nnx.merge(graphdef, jax.tree.unflatten(structure, layer)) for layer in each]
    for module in modules:
        for _, node in nnx.iter_graph(module):
            if isinstance(node, nnx.Param):
                node.set_metadata(axes=node.get_metadata()["axes"][1:])
    return nnx.List(modules)


@functools.partial(jax.jit, static_argnames=("layers",))
def _apart(stacked: jax.Array, layers: int) -> list[jax.Array]:
    return [stacked[n] for n in range(layers)]
