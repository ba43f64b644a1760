"""Weight-only quantization: matrices of the language model, the visual encoder and the U-Net.

int8   a scale for each output channel
int4   a scale for each output channel and group of up to 128 inputs, two numbers in a byte; a
       matrix with an odd number of inputs is in int8

Linear layers multiply by `quantized_matmul`. Others read `param[...].astype(dtype)`, which computes
the matrix that they multiply with. A convolution has a scale for each of its taps. The U-Net is in
int8 with either type. Norms, biases, token embeddings, adapters, the connector and the autoencoder
are not quantized.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from types import EllipsisType
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from emu_jax.errors import UserError, suggest
from emu_jax.models.backend import kernels

Quantization = Literal["int8", "int4"]

GROUP = 128  # the most inputs that share a scale in int4
# Parameters that are quantized.
_MATRICES = re.compile(
    r"llama\.(layers\..*_proj|lm_head|stu_regress_head)\.kernel"
    r"|visual\.blocks\.(attn\.qkv|(attn\.proj|mlp\.fc1|mlp\.fc2)\.kernel)"
    r"|unet\.(down_blocks|mid_block|up_blocks)\..*\.kernel"
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix in int8 or int4 that reads like an array of floats.

    Layers may be stacked along leading axes, which `jax.lax.scan` and indexing by layer remove.

    Attributes:
        values: int8 [*L, in, *out], or for int4 two numbers in a byte [*L, in / 2, *out]: the first
            half of the inputs in the low bits.
        scales: [*L, 1, *out], or for int4 [*L, groups, *out].
        axis: the axis of the inputs, counted from the end.
    """

    # Not annotated with shapes, which tests enforce: JAX also makes trees of shardings from these.
    values: jax.Array
    scales: jax.Array
    axis: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.values.shape)
        shape[self.axis] *= 2 if self.values.dtype == jnp.uint8 else 1
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        return self.values.dtype

    def __getitem__(self, key: EllipsisType) -> QuantizedMatrix:
        """Returns this matrix for `...`, the index by which layers read a parameter."""
        if key is not Ellipsis:
            raise TypeError("a quantized matrix has no elements: use .astype(dtype) first")
        return self

    def astype(self, dtype: DTypeLike) -> Float[Array, "*in_and_out"]:
        """Returns the matrix in floats."""
        values = self.values
        if values.dtype == jnp.uint8:
            halves = (values & 15, values >> 4)
            values = jnp.concatenate([h.astype(jnp.int8) - 8 for h in halves], self.axis)
        grouped = _grouped(
            values.astype(self.scales.dtype), self.scales.shape[self.axis], self.axis
        )
        scaled = grouped * jnp.expand_dims(self.scales, self.axis)
        return scaled.reshape(values.shape).astype(dtype)


Parameter = jax.Array | QuantizedMatrix


@jax.custom_vjp
def quantized_matmul(x: Float[Array, "*T D"], matrix: QuantizedMatrix) -> Float[Array, "*T E"]:
    """Returns x @ matrix in the dtype of `x`. The matrix has no gradient.

    The backward pass converts the matrix to floats again. Otherwise a stack of layers would save
    all of its matrices in floats.
    """
    values = kernels().wait_for(x, matrix.values)
    matrix = QuantizedMatrix(values, matrix.scales, matrix.axis)
    return kernels().matmul(x, matrix.astype(x.dtype))


def _matmul_fwd(
    x: Float[Array, "*T D"], matrix: QuantizedMatrix
) -> tuple[Float[Array, "*T E"], QuantizedMatrix]:
    return quantized_matmul(x, matrix), matrix


def _matmul_bwd(
    matrix: QuantizedMatrix, dy: Float[Array, "*T E"]
) -> tuple[Float[Array, "*T D"], None]:
    return kernels().matmul(dy, matrix.astype(dy.dtype).T), None


quantized_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def check_quantization(kind: str | None) -> None:
    """Checks that a kind of quantization is known.

    Raises:
        UserError: it is not.
    """
    known = get_args(Quantization)
    if kind is not None and kind not in known:
        raise UserError(f"unknown quantization {kind!r}{suggest(kind, known)}")


def is_quantized(path: str) -> bool:
    """Returns whether the parameter at `path` is a matrix that is quantized."""
    return _MATRICES.fullmatch(path) is not None


def quantize(path: str, matrix: jax.Array, kind: Quantization) -> QuantizedMatrix:
    """Quantizes the parameter at `path`, to the nearest numbers.

    The U-Net is a small part of a model, and every step of a sampler adds its errors: it is in int8
    where the others are in int4.
    """
    kind = "int8" if path.startswith("unet.") else kind
    return _quantize(matrix, kind, _input_axis(path))


def quantized_matrix(path: str, values: jax.Array, scales: jax.Array) -> QuantizedMatrix:
    """Returns the quantized parameter at `path` from its saved parts."""
    return QuantizedMatrix(values, scales, _input_axis(path))


def _input_axis(path: str) -> int:
    return -3 if path.endswith("qkv") else -2  # qkv is [in, (q, k, v), out]


@functools.partial(jax.jit, static_argnames=("kind", "axis"))
def _quantize(matrix: Float[Array, "..."], kind: Quantization, axis: int) -> QuantizedMatrix:
    if matrix.ndim > -axis:  # a layer at a time, which bounds the memory of float32
        return jax.lax.map(functools.partial(_quantize, kind=kind, axis=axis), matrix)
    x = matrix.astype(jnp.float32)
    width = x.shape[axis]
    if kind == "int4" and width % 2 == 0:
        groups = next(n for n in range(-(-width // GROUP), width + 1) if width % n == 0)
        grouped = _grouped(x, groups, axis)
        # 4 bits hold -8 to 7. The scale maps the group's largest number to -8.
        largest = jnp.take_along_axis(
            grouped, jnp.argmax(jnp.abs(grouped), axis, keepdims=True), axis
        )
        scales = jnp.where(largest == 0, 1, largest / -8)
        numbers = jnp.clip(jnp.round(grouped / scales) + 8, 0, 15).astype(jnp.uint8)
        low, high = jnp.split(numbers.reshape(x.shape), 2, axis)
        return QuantizedMatrix(low | high << 4, jnp.squeeze(scales, axis), axis)
    largest = jnp.max(jnp.abs(x), axis, keepdims=True)
    scales = jnp.where(largest == 0, 1, largest / 127)
    return QuantizedMatrix(jnp.round(x / scales).astype(jnp.int8), scales, axis)


def _grouped(
    x: Float[Array, "*in_and_out"], groups: int, axis: int
) -> Float[Array, "*groups_in_and_out"]:
    """Splits the inputs into groups: [*L, in, *out] to [*L, groups, in / groups, *out]."""
    before, after = x.shape[: x.ndim + axis], x.shape[x.ndim + axis + 1 :]
    return x.reshape(*before, groups, x.shape[axis] // groups, *after)
