"""Matrices in int8 and int4: their arithmetic, models that hold them, and their memory."""

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, relative_error
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from emu_jax import cli
from emu_jax.config import emu_14b
from emu_jax.convert.convert import convert
from emu_jax.errors import UserError
from emu_jax.generate.api import load
from emu_jax.models.emu import EmuModel
from emu_jax.models.quantized import (
    Parameter,
    Quantization,
    QuantizedMatrix,
    is_quantized,
    quantize,
    quantized_matmul,
)
from emu_jax.publish import push
from emu_jax.sharding import AbstractModel, fitted, make_mesh
from emu_jax.verify import verify

KERNEL = "llama.layers.mlp.up_proj.kernel"
QKV = "visual.blocks.attn.qkv"
CONV = "unet.up_blocks.0.resnets.1.conv1.kernel"


def one_device():
    return make_mesh(devices=jax.devices()[:1])


@pytest.mark.parametrize(
    "path, shape, axis",
    [(KERNEL, (2, 384, 5), 1), (QKV, (6, 3, 10), 0), (CONV, (3, 3, 10, 4), 2)],
)
def test_numbers_are_rounded_to_the_nearest(path, shape, axis):
    """Within half a step of the original; exactly it, where the format can hold it."""
    matrix = jax.random.normal(jax.random.key(0), shape)
    kinds: dict[Quantization, int] = {"int8": 127, "int4": 127 if path == CONV else 8}
    for kind, steps in kinds.items():
        stored = quantize(path, matrix, kind)
        assert stored.shape == matrix.shape
        groups = stored.scales.shape[axis]
        assert groups == (3 if (kind, path) == ("int4", KERNEL) else 1)
        values = stored.astype(jnp.float32)
        split = (*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])
        error, size = (np.abs(x).reshape(split) for x in (values - matrix, matrix))
        largest = size.max(axis + 1, keepdims=True)
        # In int4 a group's largest number has one sign only: the other side ends a step before.
        room = largest / steps * np.where(size < largest * 0.93, 0.5, 1.01 if steps == 8 else 0.5)
        assert (error <= room + 1e-6).all()
        again = quantize(path, values, kind)
        np.testing.assert_allclose(again.astype(jnp.float32), values, rtol=1e-6, atol=1e-7)
    zeros = quantize(path, jnp.zeros(shape), "int4").astype(jnp.bfloat16)
    assert zeros.dtype == jnp.bfloat16 and not zeros.any()


def test_the_backward_pass_saves_a_matrix_in_its_integers():
    """Beside them only the scales, and nothing in floats of the matrix's size."""
    matrix = quantize(KERNEL, jax.random.normal(jax.random.key(0), (3, 16, 6)), "int8")
    x = jax.random.normal(jax.random.key(1), (2, 16))

    def chain(x: jax.Array, matmul: Callable[[jax.Array, QuantizedMatrix], jax.Array]) -> jax.Array:
        step = lambda x, layer: (jnp.tile(matmul(x, layer), 3)[:, :16], None)  # noqa: E731
        return jax.lax.scan(step, x, matrix)[0]

    dense = lambda x, layer: x @ layer.astype(x.dtype)  # noqa: E731
    saved = jax.eval_shape(
        lambda x: jax.vjp(functools.partial(chain, matmul=quantized_matmul), x)[1], x
    )
    large = [leaf for leaf in jax.tree.leaves(saved) if leaf.size >= matrix.values.size]
    assert [leaf.dtype for leaf in large] == [jnp.int8]
    ours, theirs = (
        jax.jit(jax.grad(lambda x, f=f: jnp.sum(chain(x, f) ** 2)))(x)
        for f in (quantized_matmul, dense)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


def test_a_loop_holds_one_matrix_in_floats():
    """Not those of all layers, converted before the loop or at the start of a step."""
    layers = [
        quantize("llama.lm_head.kernel", jax.random.normal(jax.random.key(n), (256, 256)), kind)
        for n, kind in enumerate(("int8", "int4") * 4)
    ]

    def decode(x: jax.Array, layers: list[QuantizedMatrix]) -> jax.Array:
        step = lambda _, x: functools.reduce(quantized_matmul, layers, x) / 1e9  # noqa: E731
        return jax.lax.fori_loop(0, 3, step, x)

    compiled = jax.jit(decode).lower(jnp.ones((1, 256)), layers).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 256 * 256 * 4


def test_parts_of_a_matrix_are_sharded_where_they_divide():
    where = NamedSharding(make_mesh(2, 2, 2), P(None, "fsdp", "tensor"))
    assert fitted(where, (3, 4, 6)) == where
    assert fitted(where, (3, 1, 6)).spec == P(None, None, "tensor")
    assert fitted(where, (3, 2, 5)).spec == P(None, "fsdp", None)


@pytest.fixture(scope="module")
def quantized_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("int4") / "run"
    command = ["convert", str(GOLDEN), str(path), "--quantize", "int4", "--json"]
    assert cli.main(command) == 0
    return path


def matrices(model):
    return {
        ".".join(map(str, path)): leaf[...]
        for path, leaf in nnx.to_flat_state(nnx.state(model))
        if isinstance(leaf[...], QuantizedMatrix)
    }


@pytest.mark.slow
def test_a_quantized_model_computes_with_its_rounded_matrices(quantized_run):
    """The layers' own computation, from a release that is quantized as it is read and from a run
    directory that was converted, on one device and on several."""
    emu = load(GOLDEN, quantize="int4")
    saved = [load(quantized_run), load(quantized_run, mesh=make_mesh(2, 2, 2))]
    model = emu.model
    stored = matrices(model)
    # 7 of each layer, the two heads, and 4 of each of the encoder's layers.
    layers = emu.cfg.llama.layers
    of_unet = [matrix for path, matrix in stored.items() if path.startswith("unet.")]
    assert len(stored) == 7 * layers + 2 + 4 + len(of_unet)
    assert of_unet and all(matrix.values.dtype == jnp.int8 for matrix in of_unet)
    for other in saved:
        others = matrices(other.model)
        assert others.keys() == stored.keys()
        for path, matrix in stored.items():
            np.testing.assert_array_equal(others[path].values, matrix.values)
            np.testing.assert_allclose(others[path].scales, matrix.scales, rtol=1e-6)

    graphdef, state = nnx.split(model)
    flat = [
        (path, leaf.replace(leaf[...].astype(jnp.float32)))
        for path, leaf in nnx.to_flat_state(state)
    ]
    dense = nnx.merge(graphdef, nnx.from_flat_state(flat))
    x = jax.random.normal(jax.random.key(0), (2, 9, emu.cfg.llama.width))
    pixels = jax.random.normal(jax.random.key(1), (2, *2 * (emu.cfg.vision.image_size,), 3))

    @nnx.jit
    def run(model):
        positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
        hidden = model.llama(x, positions)
        return model.llama.logits(hidden), model.llama.regress(hidden), model.visual(pixels)

    for ours, theirs in zip(run(model), run(dense), strict=True):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.slow
def test_a_quantized_run_directory_is_not_converted_or_quantized_again(quantized_run, tmp_path):
    with pytest.raises(UserError, match="is quantized already"):
        load(quantized_run, quantize="int8")
    with pytest.raises(UserError, match="unknown quantization 'int3'"):
        load(quantized_run, quantize=cast(Any, "int3"))
    for to in ("emu", "hf"):
        with pytest.raises(UserError, match="is quantized: use the checkpoint that it was made"):
            convert(quantized_run, tmp_path / to, to=to)
        with pytest.raises(UserError, match=f"not for --to {to}"):
            convert(GOLDEN, tmp_path / to, to=to, quantize="int8")
    with pytest.raises(UserError, match="is quantized: use the checkpoint that it was made"):
        push(quantized_run, "hf://me/tiny")  # before the Hub is asked
    with pytest.raises(UserError, match="is quantized: use the checkpoint that it was made"):
        verify(quantized_run, GOLDEN)


def test_memory_of_the_14b_model():
    """Counted: all towers, what is not quantized in bfloat16."""
    build = lambda: EmuModel(emu_14b(), rngs=nnx.Rngs(0))  # noqa: E731
    shapes = AbstractModel(build, one_device()).shapes
    leaves = {path: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16) for path, s in shapes.items()}

    def rounded(params: dict[str, jax.Array], kind: Quantization) -> dict[str, Parameter]:
        return {
            path: quantize(path, a, kind) if is_quantized(path) else a for path, a in params.items()
        }

    documented: dict[Quantization, float] = {"int8": 15.6e9, "int4": 9.1e9}  # docs/conversion.md
    for kind, expected in documented.items():
        held = jax.tree.leaves(jax.eval_shape(functools.partial(rounded, kind=kind), leaves))
        total = sum(math.prod(a.shape) * a.dtype.itemsize for a in held)
        assert total == pytest.approx(expected, rel=0.01)
        # As `generate` and `serve` hold it, with the rest in float32.
        rest = sum(math.prod(a.shape) * 2 for path, a in leaves.items() if not is_quantized(path))
        assert total + rest == pytest.approx(expected + 0.77e9, rel=0.01)
