"""Quantized training: matmuls in int8 and fp8, forward and backward."""

import dataclasses
import shutil
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import kernels_of
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_train import (  # noqa: F401
    MESHES,
    data_root,
    loss_and_gradients,
    parameters,
    passes_with_more_threads,
    small,
)

from emu_jax.config import MatmulDtypeConfig, RematConfig
from emu_jax.errors import UserError
from emu_jax.models import low_precision
from emu_jax.models.low_precision import MATMUL_DTYPES, Scaled, rounding_noise, scaled
from emu_jax.sharding import make_mesh
from emu_jax.train.config import TrainConfig
from emu_jax.train.device_memory import abstract_batch
from emu_jax.train.loop import train
from emu_jax.train.step import Trainer

# Of rounding to the nearest number, at most: relative to a value, and in units of the scale.
ERRORS = {
    jnp.int8: (0.0, 1 / 2),
    jnp.float8_e4m3fn: (2**-4, 2**-10),
    jnp.float8_e5m2: (2**-3, 2**-17),
}
ROUND_OFF = 1e-5  # of float32, relative to the sums of absolute values
B, T, D, E = 2, 6, 96, 40
BOTH = MatmulDtypeConfig(visual="int8", llama="int8")


def operands(seed: int = 0) -> list[np.ndarray]:
    """x [B, T, D], kernel [D, E] and dy [B, T, E], with values of very different sizes."""
    rng = np.random.default_rng(seed)
    shapes = (B, T, D), (D, E), (B, T, E)
    return [
        (rng.standard_normal(s) * 10 ** rng.uniform(-3, 0, s)).astype(np.float32) for s in shapes
    ]


def decoded(x: Scaled) -> np.ndarray:
    return np.asarray(x.values, np.float32) * np.asarray(x.scales)


def largest_error(x: np.ndarray, dtype, axes: tuple[int, ...], rounding: float = 1.0):
    """The largest error of each value of `scaled(x, dtype, axes)`."""
    relative, steps = ERRORS[dtype]
    return rounding * (relative * np.abs(x) + steps * np.asarray(scaled(x, dtype, axes).scales))


def product(dtype: str, key=None):
    """Returns (x, kernel, dy) -> (y, dx, dkernel), compiled."""

    @jax.jit
    def run(x, kernel, dy, key=key):
        with low_precision.use_matmul_dtype(dtype, key):
            y, pull = jax.vjp(low_precision.low_precision_matmul, x, kernel)
        return y, *pull(dy)

    return run


@pytest.mark.parametrize("dtype", ERRORS)
def test_values_and_scales(dtype):
    x, *_ = operands()
    x[0, 0] = 0
    x[0, 1] *= 1e-34  # of fp8, their scale would be denormal
    found = scaled(x, dtype, (-1,))
    assert found.values.dtype == dtype and found.scales.shape == (B, T, 1)
    assert (np.abs(decoded(found) - x) <= largest_error(x, dtype, (-1,)) * (1 + 1e-6)).all()
    largest = np.abs(np.asarray(found.values, np.float32)).max(-1)
    assert (
        np.delete(largest.flatten(), [0, 1]) == np.asarray(found.values, np.float32).max()
    ).all()
    assert (decoded(found)[0, 0] == 0).all() and np.isfinite(decoded(found)).all()
    over = scaled(x, dtype, (0, 1))
    assert over.scales.shape == (1, 1, D)
    assert (np.abs(decoded(over) - x) <= largest_error(x, dtype, (0, 1)) * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", ["cpu", "xla"])
@pytest.mark.parametrize("dtype", MATMUL_DTYPES)
@pytest.mark.parametrize("stochastic", [False, True])
def test_product_and_gradients_are_close_to_those_of_float32(dtype, name, stochastic):
    """Within the sums of the largest errors of what is rounded."""
    x, kernel, dy = operands()
    key = jax.random.key(0) if stochastic else None
    with kernels_of(name):
        y, dx, dkernel = map(np.asarray, product(dtype, key)(x, kernel, dy))
    values, gradients = MATMUL_DTYPES[dtype]
    x_error, kernel_error = largest_error(x, values, (-1,)), largest_error(kernel, values, (0,))
    x_size, kernel_size = np.abs(x) + x_error, np.abs(kernel) + kernel_error
    flat = lambda a: a.reshape(-1, a.shape[-1])  # noqa: E731

    def check(found, exact, bound, size):
        error = np.abs(found - exact)
        assert found.shape == exact.shape and error.max() > 1e-4 * np.abs(exact).max()
        assert (error <= bound + ROUND_OFF * size).all()

    check(y, x @ kernel, x_size @ kernel_error + x_error @ np.abs(kernel), x_size @ kernel_size)
    rounding = 2.0 if stochastic and dtype == "int8" else 1.0  # up to a whole step
    scales = np.asarray(scaled(kernel, values, (0,)).scales)
    dy_error = largest_error(dy * scales, gradients, (-1,), rounding) / scales
    check(
        dx,
        dy @ kernel.T,
        dy_error @ kernel_size.T + np.abs(dy) @ kernel_error.T,
        (np.abs(dy) + dy_error) @ kernel_size.T,
    )
    dy_error = 0 * dy
    if dtype == "fp8":
        scales = np.asarray(scaled(x, values, (-1,)).scales)
        dy_error = largest_error(dy * scales, gradients, (0, 1)) / scales
    check(
        dkernel,
        flat(x).T @ flat(dy),
        flat(x_size).T @ flat(dy_error) + flat(x_error).T @ flat(np.abs(dy)),
        flat(x_size).T @ flat(np.abs(dy) + dy_error),
    )


def test_products_of_int8_are_exact():
    """The sums are those of integers, on every backend and in bfloat16 too."""
    x, kernel, dy = operands()
    found = {}
    for name in ("cpu", "xla"):
        with kernels_of(name):
            found[name] = product("int8", jax.random.key(1))(x, kernel, dy)
    jax.tree.map(np.testing.assert_array_equal, found["cpu"][:2], found["xla"][:2])
    rows, columns = scaled(x, jnp.int8, (-1,)), scaled(kernel, jnp.int8, (0,))
    sums = np.asarray(rows.values, np.int32) @ np.asarray(columns.values, np.int32)
    expected = sums * np.asarray(rows.scales) * np.asarray(columns.scales)
    np.testing.assert_allclose(found["xla"][0], expected, rtol=1e-6)
    with kernels_of("xla"):
        low = product("int8")(*(jnp.asarray(a, jnp.bfloat16) for a in (x, kernel, dy)))
    assert [a.dtype for a in low] == [jnp.bfloat16] * 3


@pytest.mark.parametrize("name", ["cpu", "xla"])
def test_a_matmul_is_the_same_on_every_mesh(name):
    """Bit for bit, since scales are maxima and sums are of integers. The gradient of the kernel is
    a sum of floats."""
    x, kernel, dy = operands()
    key = jax.random.key(3)
    mesh = make_mesh(1, 2, 4)
    axes = P("fsdp", None, "tensor"), P("tensor", "fsdp"), P("fsdp", None, "tensor")
    with kernels_of(name):
        run = product("int8", key)
        found = run(x, kernel, dy)
        with jax.set_mesh(mesh):
            split = [
                jax.device_put(a, NamedSharding(mesh, s))
                for a, s in zip((x, kernel, dy), axes, strict=True)
            ]
            other = run(*split)
    jax.tree.map(np.testing.assert_array_equal, found[:2], other[:2])
    np.testing.assert_allclose(other[2], found[2], atol=1e-6 * np.abs(found[2]).max())


def test_stochastic_rounding_is_unbiased():
    """Means over keys approach the gradient of the quantized operands; the nearest number does
    not. Sums of errors vary as with independent random numbers."""
    x, kernel, dy = operands()
    keys = jax.random.split(jax.random.key(2), 4000)
    with kernels_of("xla"):
        one = product("int8")
        dxs = jax.lax.map(lambda key: one(x, kernel, dy, key)[1], keys, batch_size=500)
        _, nearest, _ = one(x, kernel, dy)
    dxs = np.asarray(dxs, np.float64)
    expected = dy @ decoded(scaled(kernel, jnp.int8, (0,))).T
    deviation = dxs.std(0) / len(keys) ** 0.5
    assert (np.abs(dxs.mean(0) - expected) < 6 * deviation).all()
    assert (np.abs(nearest - expected) > 6 * deviation).any()

    value = np.full((8, 8), 0.3, np.float32)
    sums = jax.vmap(lambda key: jnp.floor(value + rounding_noise(key, value.shape)).sum())(keys)
    noise = np.asarray(rounding_noise(keys[0], (64, 64)), np.float64)
    assert ((noise > 0) & (noise < 1) & (noise * 2**16 % 1 == 0.5)).all()  # symmetric about 1/2
    independent = value.size * 0.3 * 0.7
    np.testing.assert_allclose(np.mean(sums), value.sum(), atol=5 * (independent / 4000) ** 0.5)
    np.testing.assert_allclose(np.var(sums), independent, rtol=0.15)


@pytest.mark.parametrize("dtype", MATMUL_DTYPES)
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_is_not_finite_stays_so(dtype, bad):
    for place in range(3):
        arrays = operands()
        arrays[place][(0,) * arrays[place].ndim] = bad
        results = product(dtype, jax.random.key(0))(*arrays)
        reached = ([0, 2], [0, 1], [1, 2])[place]  # of y, dx and dkernel
        assert all(not np.isfinite(results[n]).all() for n in reached), place


def traced(cfg: TrainConfig):
    """The gradients of a step, traced with the plain kernels, and the dtypes of what is saved for
    the backward pass by their number of axes."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh), kernels_of("xla"):
        trainer = Trainer(cfg, mesh)
        batch, state = abstract_batch(trainer), trainer.state_shapes
        jaxpr = jax.make_jaxpr(trainer.gradients)(state, batch)
        loss = lambda p, batch: trainer.loss({**p, **state.frozen}, batch, np.int32(0))[0]  # noqa: E731
        saved = jax.eval_shape(
            lambda p, b: jax.vjp(lambda p: loss(p, b), p)[1], state.trained, batch
        )
    return jaxpr.jaxpr, {(x.dtype.name, x.ndim) for x in jax.tree.leaves(saved)}


def matmuls(jaxpr) -> Counter:
    """The number of matmuls by the dtypes of their operands."""
    found = Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found[tuple(v.aval.dtype.name for v in equation.invars)] += 1
        for inner in jaxprs_in_params(equation.params):
            found += matmuls(inner)
    return found


def test_the_matmuls_of_a_towers_layers_are_in_8_bits():
    """And no others: 7 in a layer of the language model, 6 of the encoder, twice with the gradient
    of their input, three times with that of their kernel."""
    cfg = small("emu", "", dtype="bfloat16", remat=RematConfig(llama="dots"))
    towers = lambda dtype, *names: MatmulDtypeConfig(**dict.fromkeys(names, dtype))  # noqa: E731
    both, mixed = ("int8", "int8"), ("float8_e4m3fn", "float8_e5m2")
    plain, _ = traced(cfg)
    plain = matmuls(plain)
    assert not {both, mixed, mixed[::-1]} & plain.keys()
    for names, times in {("llama",): 7, ("visual",): 6, ("llama", "visual"): 13}.items():
        change = {"matmul_dtype": towers("int8", *names)}
        found, saved = traced(dataclasses.replace(cfg, **change))
        found = matmuls(found)
        assert found[both] == 2 * times
        assert found.total() == plain.total()
        assert ("int32", 4) not in saved  # sums of the stacked layers
    found = matmuls(traced(dataclasses.replace(cfg, matmul_dtype=towers("fp8", "llama")))[0])
    assert found["float8_e4m3fn", "float8_e4m3fn"] == 7
    assert found[mixed] + found[mixed[::-1]] == 14


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"matmul_dtype": MatmulDtypeConfig(llama="int4")},
            "unknown matmul_dtype.llama 'int4'; did",
        ),
        (
            {"matmul_dtype": BOTH, "objective": "clip"},
            "matmul_dtype.visual 'int8' is for the objectives emu and text, not clip",
        ),
        (
            {"matmul_dtype": BOTH, "objective": "text"},
            "matmul_dtype.visual 'int8' with the objective 'text', which has no tower 'visual'",
        ),
        (
            {"matmul_dtype": BOTH, "quantize": "int8", "save_frozen": False},
            "with quantize='int8': the matrices are stored in 8 bits or fewer already",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**changes)


@pytest.mark.slow
def test_a_step_in_int8_is_close_to_the_step_and_the_same_on_every_mesh(data_root, request):  # noqa: F811
    """Up to a part of the error of rounding: values whose last bits differ may be rounded to
    another number. With other random numbers, the difference would be larger than that error."""
    if passes_with_more_threads(request):
        return
    cfg = small("emu", data_root)
    one = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    exact, exact_grads, params, _ = loss_and_gradients(cfg, one)
    cfg = dataclasses.replace(cfg, matmul_dtype=BOTH)
    loss, grads, *_ = loss_and_gradients(cfg, one, params)
    assert 1e-6 < abs(loss / exact - 1) < 0.01
    for name in ("mixed", "rows, heads and context"):
        other, other_grads, *_ = loss_and_gradients(cfg, make_mesh(*MESHES[name]), params)
        assert abs(other / loss - 1) < 1e-4, name
        for tower in {path.split(".")[0] for path in grads}:
            paths = [path for path in grads if path.split(".")[0] == tower]
            norm = lambda gs, paths=paths: sum(np.square(gs[p]).sum() for p in paths) ** 0.5  # noqa: E731
            between = norm({p: other_grads[p] - grads[p] for p in paths}) / norm(grads)
            rounded = norm({p: exact_grads[p] - grads[p] for p in paths}) / norm(grads)
            assert rounded < 0.1 and between < rounded / 3, (name, tower, rounded, between)


@pytest.mark.slow
def test_a_run_in_int8_resumes_bit_for_bit(copy_digits, tmp_path, monkeypatch):
    cfg = small("emu", str(copy_digits(tmp_path / "digits")), steps=4, matmul_dtype=BOTH)
    devices = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    train(cfg, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "4")
    train(cfg, tmp_path / "again")
    for path, value in parameters(tmp_path / "run").items():
        np.testing.assert_array_equal(parameters(tmp_path / "again")[path], value, err_msg=path)
