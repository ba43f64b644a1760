"""The kernels for CPUs and TPUs compute what the plain ones do."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import relative_error
from flax import nnx
from helpers import kernels_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from emu_jax import config
from emu_jax.generate import api, text
from emu_jax.generate.settings import DynamicSettings, StaticSettings, TextConfig
from emu_jax.models import backend, conv, cpu, layers, llama, tpu, xla
from emu_jax.models.attention import attention
from emu_jax.models.emu import EmuModel
from emu_jax.models.remat import REMAT
from emu_jax.sharding import make_mesh
from emu_jax.tokenizer import Tokenizer


def public_functions(module) -> dict[str, inspect.Signature]:
    return {
        name: inspect.signature(function)
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and function.__module__ == module.__name__
        and name[0] != "_"
    }


def test_kernels_for_cpus_have_the_entry_points_of_the_plain_ones():
    plain = public_functions(xla)
    ours = public_functions(cpu)
    ours.pop("run_layers")  # of layers that nothing else unstacks
    for name, signature in ours.items():
        parameters = dict(plain[name].parameters)
        if name == "cross_entropy":
            parameters.pop("matmul")
        assert dict(signature.parameters) == parameters, name
    assert backend.kernels() is cpu
    with kernels_of("xla"):
        assert backend.kernels() is xla
    with kernels_of("cpu"):
        assert backend.kernels() is cpu
    assert public_functions(tpu) == {}  # but for those with a gradient of their own
    assert tpu.gelu is xla.gelu
    mesh = jax.sharding.AbstractMesh(
        (1,),
        ("data",),
        abstract_device=jax.sharding.AbstractDevice("TPU v5p", None, platform="tpu"),
    )
    with jax.sharding.use_abstract_mesh(mesh):
        assert backend.kernels() is tpu and not backend.on_cpu()


def random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(("queries", "keys"), [(9, 5), (1000, 600)])
def test_attention(queries, keys):
    q, k, v = random(0, 2, queries, 3, 8), random(1, 2, keys, 3, 8), random(2, 2, keys, 3, 8)
    ours, plain = (attention(q, k, v, scale=0.5, backend=name) for name in ("cpu", "xla"))
    assert relative_error(ours, plain) < 2e-6


def both(run: Callable[[], Any]) -> tuple[Any, Any]:
    """The results of `run` with the kernels for CPUs and with the plain ones."""
    with kernels_of("cpu"):
        ours = run()
    with kernels_of("xla"):
        return ours, run()


def gradients(function, *inputs):
    """Returns the gradients of a weighted sum of the outputs for all inputs, and the outputs."""
    out, back = jax.vjp(function, *inputs)
    return out, *back(random(9, *out.shape).astype(out.dtype))


@pytest.mark.parametrize("masked", ["no", "for all rows", "a row's own, one query wholly"])
def test_attentions_gradients(masked):
    q, k, v = (random(n, 2, length, 3, 8) for n, length in enumerate((6, 5, 5)))
    mask = None if masked == "no" else jnp.tri(6, 5, dtype=bool)[None, None]
    if masked.startswith("a row"):
        mask = jnp.repeat(mask, 2, axis=0).at[0, 0, 2].set(False)
    ours, plain = (
        gradients(lambda *x, name=name: attention(*x, mask=mask, scale=0.3, backend=name), q, k, v)
        for name in ("cpu", "xla")
    )
    for a, b in zip(ours, plain, strict=True):
        assert relative_error(a, b) < 2e-6


@pytest.mark.parametrize("width", [7, 50])
def test_products(width):
    """And a product that has another type than its operands."""
    x, kernel = random(0, 2, 3, 5), random(1, 5, width)
    half = cpu.matmul(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), jnp.float32)
    assert half.dtype == jnp.float32
    ours, plain = (gradients(module.matmul, x, kernel) for module in (cpu, xla))
    for a, b in zip(ours, plain, strict=True):
        assert relative_error(a, b) < 2e-6


def test_gelu():
    x = jnp.linspace(-6, 6, 101)
    for a, b in zip(
        gradients(layers.gelu, x),
        gradients(lambda x: jax.nn.gelu(x, approximate=False), x),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-6
    half = layers.gelu(x.astype(jnp.bfloat16))
    assert relative_error(half, layers.gelu(x)) < 1e-2


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("bfloat16", 5e-3)])
def test_rotation_by_a_product(dtype, limit):
    x = random(0, 2, 3, 2, 8).astype(dtype)
    positions = jnp.array([[0, 1, 70], [5, 1999, 2]])
    results = []
    for name in ("tpu", "xla"):
        with kernels_of(name):
            results.append(gradients(lambda x: llama.rotary(x, positions, 10000.0), x))
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, plain) < limit


def test_rotation_saves_no_partners():
    """Policy `dots` saves the output of the projection alone."""
    kernel = random(1, 8, 16)

    @functools.partial(jax.checkpoint, policy=REMAT["dots"])
    def layer(x):
        rotated = llama.rotary((x @ kernel).reshape(2, 3, 2, 8), jnp.ones((2, 3), int), 10000.0)
        return jnp.sum(rotated**2)

    with kernels_of("tpu"):
        _, back = jax.vjp(layer, random(0, 2, 3, 8))
    saved = [leaf.shape for leaf in jax.tree.leaves(back)]
    assert sum(math.prod(shape) == 2 * 3 * 16 for shape in saved) == 1


def test_exchanges_of_devices_have_an_order_on_cpus_alone():
    unknown, array = jnp.full((1, 2, 3), jnp.nan), random(0, 1, 2, 5)
    ours, plain = (module.order_exchanges(unknown, array) for module in (cpu, xla))
    assert jnp.isnan(ours).all() and plain is array
    np.testing.assert_array_equal(cpu.order_exchanges(array, array), array)


@pytest.mark.parametrize("norm", ["LayerNorm", "RMSNorm"])
def test_norms_of_a_single_row(norm):
    layer = getattr(layers, norm)(8, eps=1e-6, rngs=nnx.Rngs(0))
    layer.scale[...] = random(2, 8)
    graphdef, params = nnx.split(layer)
    apply = lambda x, params: nnx.merge(graphdef, params)(x)  # noqa: E731
    ours, plain = both(lambda: gradients(apply, random(0, 1, 5, 8), params))
    assert ours[0].shape == (1, 5, 8)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert relative_error(a, b) < 2e-6


@pytest.mark.parametrize("block", [0, 3])
def test_cross_entropy(block):
    """With columns that only round the vocabulary up, larger than all others."""
    hidden, kernel = random(0, 2, 6, 5), random(1, 5, 16).at[:, 11:].mul(50)
    targets = jax.random.randint(jax.random.key(2), (2, 6), 0, 11).at[0, 0].set(10)
    ours, plain = (
        gradients(
            lambda *x, module=module: module.cross_entropy(*x, targets, vocab=11, block=block),
            hidden,
            kernel,
        )
        for module in (cpu, xla)
    )
    wanted = optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel[:, :11], targets)
    assert relative_error(ours[0], wanted) < 2e-6
    for a, b in zip(ours, plain, strict=True):
        assert relative_error(a, b) < 2e-6


@pytest.mark.parametrize(("dtype", "within"), [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
def test_upsampling(dtype, within):
    layer = conv.Upsample(6, rngs=nnx.Rngs(0))
    layer.conv.bias[...] = jnp.arange(6.0)
    x = random(0, 2, 3, 5, 6).astype(dtype)
    for a, b in zip(*both(lambda: gradients(layer, x)), strict=True):
        assert relative_error(a, b) < within


@pytest.mark.slow
def test_candidates_behind_caches_apart():
    """A cache of its own for each layer is repeated for candidates as a common one is."""
    emu = EmuModel(config.digits(), painter=False, rngs=nnx.Rngs(0))
    x = emu.llama.embed_tokens(jnp.asarray([[7, 8, 9], [0, 20, 21]]))
    valid = jnp.asarray([[1, 1, 1], [0, 1, 1]], bool)
    candidates = jnp.asarray([[[5, 6, 7], [8, 9, -1]], [[10, 11, 12], [13, -1, -1]]])
    losses = [
        text.candidate_losses(llama, x, valid, candidates)
        for llama in (emu.llama, emu.llama.unstacked_for_decoding())
    ]
    assert relative_error(*losses) < 2e-6


@pytest.mark.parametrize(("dtype", "within"), [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_layers_apart_compute_what_a_stack_does(dtype, within):
    """Also adapters that drop; and parameters keep their axes, but for the layers'."""
    lora = config.LoraConfig(rank=2, alpha=4.0, dropout=0.5, targets=("q_proj", "down_proj"))
    cfg = dataclasses.replace(config.digits().llama, lora=lora)
    stacked = llama.Llama(cfg, rngs=nnx.Rngs(0))
    adapter = stacked.layers.self_attn.q_proj.lora_b
    adapter[...] = random(1, *adapter.shape)
    graphdef, params = nnx.split(stacked)
    stacked = nnx.merge(graphdef, jax.tree.map(lambda a: a.astype(dtype), params))
    apart = stacked.unstacked_for_decoding()
    assert len(apart.layers) == cfg.layers and apart.unstacked_for_decoding() is apart
    axes = [m.mlp.up_proj.kernel.get_metadata()["axes"] for m in (stacked.layers, apart.layers[0])]
    assert axes == [("layer", "embed", "mlp"), ("embed", "mlp")]
    x = random(2, 2, 5, cfg.width).astype(dtype)
    positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
    for key in (None, jax.random.key(3)):
        ours, theirs = (model(x, positions, dropout_key=key) for model in (apart, stacked))
        assert relative_error(ours, theirs) < within


@pytest.mark.parametrize("spec", [None, P(), P(None, "fsdp"), P(None, None, "fsdp")])
def test_layers_apart_share_the_memory_of_their_stack(spec):
    """On one device and on a mesh; and they stay what they were if the stack is donated."""
    mesh = make_mesh(fsdp=4, devices=jax.devices()[:4])
    stack = random(0, 3, 64, 96)
    if spec is not None:
        stack = jax.device_put(stack, NamedSharding(mesh, spec))
    expected = np.array(stack)
    starts = {s.device: s.data.unsafe_buffer_pointer() for s in stack.addressable_shards}
    layers = cpu._unstacked(stack, 3)
    for n, layer in enumerate(layers):
        for shard in layer.addressable_shards:
            offset = shard.data.unsafe_buffer_pointer() - starts[shard.device]
            assert offset == n * shard.data.nbytes
    jax.block_until_ready(jax.jit(lambda x: x + 1, donate_argnums=0)(stack))
    del stack
    np.testing.assert_array_equal(np.stack(layers), expected)


def test_a_stack_split_between_its_layers_is_copied():
    mesh = make_mesh(fsdp=4, devices=jax.devices()[:4])
    stack = jax.device_put(random(0, 4, 8, 6), NamedSharding(mesh, P("fsdp")))
    np.testing.assert_array_equal(np.stack(cpu._unstacked(stack, 4)), stack)


def test_emu_copies_no_weights_when_it_decodes():
    """The compiled program's temporaries are less than the layers' parameters."""
    words = Tokenizer.train(["one two three"] * 9, 300)
    model = EmuModel(config.digits(), painter=False, rngs=nnx.Rngs(0))
    layers = sum(a.nbytes for a in jax.tree.leaves(nnx.state(model.llama.layers)))
    settings = TextConfig(max_new_tokens=3)
    static, dynamic = (
        StaticSettings.of(settings, model.cfg.tokens),
        DynamicSettings.of(settings),
    )

    def temporaries(emu):
        graphdef, params = nnx.split(emu)

        def decode(params, ids):
            llama = nnx.merge(graphdef, params).llama
            keys = jax.random.split(jax.random.key(0), 1)
            return text.decode(llama, llama.embed_tokens(ids), ids > 0, static, dynamic, keys)

        compiled = jax.jit(decode).lower(params, jnp.asarray([[7, 8]])).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    kept = api.Emu(model, words).model
    assert temporaries(kept) < layers / 2 < layers < temporaries(model)
    # The caller's model stays another one.
    head = np.array(kept.llama.lm_head.kernel[...])
    model.llama.lm_head.kernel[...] = 0 * head
    np.testing.assert_array_equal(kept.llama.lm_head.kernel[...], head)


@pytest.mark.parametrize("beams", [1, 3])
def test_decoding(beams):
    emu = EmuModel(config.digits(), painter=False, rngs=nnx.Rngs(0))
    ids = jnp.asarray([[7, 8, 9, 10, 11], [0, 0, 20, 21, 22]])
    settings = TextConfig(max_new_tokens=6, num_beams=beams)
    static, dynamic = (
        StaticSettings.of(settings, emu.cfg.tokens),
        DynamicSettings.of(settings),
    )

    def run():
        @nnx.jit
        def decode(emu):
            keys = jax.random.split(jax.random.key(0), 2)
            x = emu.llama.embed_tokens(ids)
            out = text.decode(emu.llama, x, ids > 0, static, dynamic, keys)
            return out, emu.regress_after(ids[::-1], jnp.asarray([3, 5]))

        return decode(emu)

    ours, plain = both(run)
    np.testing.assert_array_equal(ours[0], plain[0])
    assert relative_error(ours[1], plain[1]) < 2e-5
