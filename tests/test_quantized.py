"""Matrices in int8 and int4: their arithmetic, models that hold them, and their memory."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, relative_error
from flax import nnx

from emu_jax import cli
from emu_jax.config import emu_14b
from emu_jax.convert.convert import convert
from emu_jax.errors import UserError
from emu_jax.generate.api import load
from emu_jax.models.emu import EmuModel
from emu_jax.models.quantized import QuantizedMatrix, is_quantized, quantize
from emu_jax.publish import push
from emu_jax.sharding import AbstractModel, make_mesh
from emu_jax.verify import verify

KERNEL = "llama.layers.mlp.up_proj.kernel"
QKV = "visual.blocks.attn.qkv"


def one_device():
    return make_mesh(devices=jax.devices()[:1])


@pytest.mark.parametrize("path, shape", [(KERNEL, (2, 384, 5)), (QKV, (6, 3, 10))])
def test_numbers_are_rounded_to_the_nearest(path, shape):
    """Within half a step of the original; exactly it, where the format can hold it."""
    matrix = jax.random.normal(jax.random.key(0), shape)
    axis = 1 if path == KERNEL else 0
    for kind, steps in (("int8", 127), ("int4", 8)):
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
    assert len(stored) == 7 * layers + 2 + 4
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
        load(quantized_run, quantize="int3")
    for to in ("emu", "hf"):
        with pytest.raises(UserError, match="is quantized: use the checkpoint that it was made"):
            convert(quantized_run, tmp_path / to, to=to)
        with pytest.raises(UserError, match=f"not for --to {to}"):
            convert(GOLDEN, tmp_path / to, to=to, quantize="int8")
    with pytest.raises(UserError, match="is quantized: use the checkpoint that it was made"):
        push(quantized_run, "hf://me/tiny")  # before the Hub is asked
    with pytest.raises(UserError, match="is quantized: use the checkpoint that it was made"):
        verify(quantized_run, GOLDEN)


@pytest.mark.parametrize("kind, documented", [("int8", 14.5e9), ("int4", 8.0e9)])
def test_memory_of_the_14b_model(kind, documented):
    """Counted: all towers but the image decoder, what is not quantized in bfloat16."""
    build = lambda: EmuModel(emu_14b(), painter=False, rngs=nnx.Rngs(0))  # noqa: E731
    total = 0
    for path, shape in AbstractModel(build, one_device()).shapes.items():
        leaf = jax.ShapeDtypeStruct(shape.shape, jnp.bfloat16)
        if is_quantized(path):
            leaf = jax.eval_shape(functools.partial(quantize, path, kind=kind), leaf)
        total += sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(leaf))
    assert total == pytest.approx(documented, rel=0.01)  # docs/conversion.md
