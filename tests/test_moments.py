"""Adam's moments in 8 bits."""

import dataclasses
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import parameters, small
from test_training import stored

from emu_jax.sharding import make_mesh
from emu_jax.train import moments
from emu_jax.train.config import GroupConfig, OptimizerConfig
from emu_jax.train.device_memory import shard_bytes
from emu_jax.train.loop import train
from emu_jax.train.moments import Quantized, block_axis, block_size
from emu_jax.train.optimizer import make_optimizer
from emu_jax.train.step import Trainer

AXIS = 1  # of the blocks, here


def test_codes_and_scales():
    """Errors are those of the distance between codes, and codes are right on average."""
    rng = np.random.default_rng(0)
    size = (3, 256, 4)
    mu = rng.standard_normal(size) * 10 ** rng.uniform(-4, 0, size)
    mu = mu.astype(np.float32)
    mu[:, :128, 0] = 0
    nu = mu**2
    nu[0, 0, 1] = 1e-30  # far below what a code resolves
    nearest = jax.jit(lambda m, v: (moments.encode_mu(m, AXIS), moments.encode_nu(v, AXIS)))
    for value, root, levels, code in zip(
        (mu, nu), (2, 4), (127, 255), nearest(mu, nu), strict=True
    ):
        assert code.codes.shape == size and code.codes.dtype.itemsize == 1
        assert code.scales.shape == (3, 256 // block_size(256), 4)
        scale = np.repeat(np.asarray(code.scales), block_size(256), AXIS)
        assert (scale >= np.abs(value)).all() and (scale <= np.abs(mu).max() ** (root // 2)).all()
        found = np.asarray(moments.dequantize(code))
        relative = np.where(scale > 0, np.abs(value) / np.where(scale > 0, scale, 1), 0)
        roots, decoded = (
            relative ** (1 / root),
            (np.abs(found) / np.maximum(scale, 1e-38)) ** (1 / root),
        )
        assert np.abs(roots - decoded).max() <= (1 if root == 4 else 0.51) / levels
        assert (
            np.sign(found)[np.abs(roots) > 1 / levels] == np.sign(value)[roots > 1 / levels]
        ).all()
        assert (found[:, :128, 0] == 0).all()
    assert np.asarray(nearest(mu, nu)[1].codes)[0, 0, 1] == 1

    bits = jax.random.bits(jax.random.key(0), (2000, 32), jnp.uint32)
    flat = jnp.linspace(0.01, 1, 32)
    many = jax.vmap(lambda b: (moments.encode_mu(flat, 0, b), moments.encode_nu(flat, 0, b)))
    for found, levels, root in zip(jax.jit(many)(bits), (127, 255), (2, 4), strict=True):
        mean = np.asarray(found.codes, np.float32).mean(0)
        np.testing.assert_allclose(mean, levels * flat ** (1 / root), atol=0.06)


def test_blocks_lie_along_an_axis_that_fsdp_does_not_split():
    axes = {
        ("layer", "embed", "mlp"): 2,
        ("layer", "mlp", "embed"): 1,
        ("embed", "embed"): 1,  # the mesh splits the first
        (None, None): 1,
    }
    for names, axis in axes.items():
        assert block_axis("w", (4096, 256, 512)[-len(names) :], names) == axis
    assert block_axis("llama.embed_tokens.embedding", (512, 512), ("vocab", "embed")) is None
    assert block_axis("scale", (8192,), ("embed",)) is None  # a vector
    assert block_axis("w", (32, 64), (None, None)) is None  # small
    assert block_axis("w", (8192, 12), ("embed", None)) is None  # too narrow
    # The pieces of eight tensor ways hold whole blocks, if they are long enough for that.
    assert [block_size(n) for n in (13824, 5120, 128, 96, 352)] == [64, 128, 16, 32, 32]


def test_eight_bit_adam_is_close_to_adam():
    shapes = {"kernel": (64, 256), "bias": (256,)}
    draw = lambda seed: {n: jax.random.normal(jax.random.key(seed), s) for n, s in shapes.items()}  # noqa: E731
    config = OptimizerConfig((GroupConfig(lr=0.1, decay="constant"),), clip_norm=1e9)
    ends: dict[str, Any] = {}
    state: Any = None
    grads = draw(0)
    for dtype in ("float32", "int8"):
        optimizer = make_optimizer(dataclasses.replace(config, moments_dtype=dtype), 99, draw(0))

        @jax.jit
        def step(params, state, grads, finite, optimizer=optimizer):
            updates, state = optimizer.update(
                grads, state, params, norm=np.float32(1), finite=finite
            )
            return jax.tree.map(jnp.add, params, updates), state

        params, state = draw(0), optimizer.init(draw(0))
        for seed in range(20):
            grads = jax.tree.map(lambda g: g + 0.3, draw(seed))
            params, state = step(params, state, grads, True)
        ends[dtype] = params
    mu, nu = state[1].mu, state[1].nu
    assert isinstance(mu["kernel"], Quantized) and nu["kernel"].codes.dtype == np.uint8
    assert mu["bias"].dtype == nu["bias"].dtype == np.float32
    moved = {dtype: end["kernel"] - draw(0)["kernel"] for dtype, end in ends.items()}
    error = jnp.linalg.norm(moved["int8"] - moved["float32"]) / jnp.linalg.norm(moved["float32"])
    assert 1e-4 < error < 0.02
    np.testing.assert_allclose(ends["int8"]["bias"], ends["float32"]["bias"], atol=1e-6)
    # A step that is not finite changes no bit of the state.
    _, stayed = step(params, state, jax.tree.map(lambda g: g * jnp.nan, grads), False)
    jax.tree.map(np.testing.assert_array_equal, stayed, state)


@pytest.mark.slow
def test_eight_bit_moments_are_sharded_and_resume_bit_for_bit(copy_digits, tmp_path, monkeypatch):
    root = str(copy_digits(tmp_path / "digits"))
    cfg = small("clip", root, steps=4, keep_checkpoints=9, tower_metrics=True)
    optimizer = dataclasses.replace(cfg.optimizer, moments_dtype="int8")
    eight = dataclasses.replace(cfg, optimizer=optimizer)
    sizes = []
    for each in (cfg, eight):
        trainer = Trainer(each, make_mesh(1, 8, 1))
        sizes.append(shard_bytes(trainer.state_shapes.optimizer))
    assert sizes[1] < 0.4 * sizes[0]  # a tenth of this model stays in float32
    quantized = 0
    for path, moment in trainer.state_shapes.optimizer[1].mu.items():
        if not isinstance(moment, Quantized):
            continue
        quantized += 1
        parameter = trainer.template.shapes[path]
        assert moment.codes.sharding == parameter.sharding
        piece, scales = (x.sharding.shard_shape(x.shape) for x in moment)
        axis = next(n for n in range(len(piece)) if piece[n] != scales[n])
        assert piece[axis] == scales[axis] * block_size(parameter.shape[axis]), path
        assert piece[:axis] + piece[axis + 1 :] == scales[:axis] + scales[axis + 1 :], path
    assert quantized > 5

    devices = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    train(eight, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "4")
    train(eight, tmp_path / "again")
    for path, value in parameters(tmp_path / "run").items():
        np.testing.assert_array_equal(parameters(tmp_path / "again")[path], value, err_msg=path)
    states = [stored(tmp_path / name / "4", "optimizer") for name in ("run", "again")]
    assert any(value.dtype == np.uint8 and value.max() == 255 for value in states[0].values())
    jax.tree.map(np.testing.assert_array_equal, *states)
