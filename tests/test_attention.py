"""Attention's backends agree, and refuse what they cannot serve; the blocked cross-entropy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import relative_error
from flax import nnx

from emu_jax.config import LlamaConfig
from emu_jax.errors import UserError
from emu_jax.models import blockwise
from emu_jax.models.attention import attention, choose_backend, cudnn, short, splash
from emu_jax.models.blockwise import CAUSAL_BLOCK
from emu_jax.models.llama import Llama
from emu_jax.models.xla import causal_mask, plain_attention, segment_mask
from emu_jax.sharding import AbstractModel, make_mesh, shard


def normal(seed: int, count: int, *shape: int) -> list[jax.Array]:
    rng = np.random.default_rng(seed)  # jax.random compiles for each shape
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(count)]


def outputs_and_gradients(run, *arrays: jax.Array, weight: jax.Array) -> list[jax.Array]:
    """The output and the gradients for each array. Compiled as one: each operation alone takes
    longer to compile."""

    def through(arrays, weight):
        out, back = jax.vjp(run, *arrays)
        return out, *back(weight)

    return jax.jit(through)(arrays, weight)


def packed(seed: int, length: int, heads: int, width: int):
    """Queries, keys, values, and rows of documents of uneven length with padding behind."""
    q, k, v = normal(seed, 3, 2, length, heads, width)
    cuts = np.array([[0, 50, 51, 200], [0, 1, 130, 131]])
    ids = (np.arange(length)[None, :, None] >= cuts[:, None, :]).sum(-1)
    ids[:, -7:] = 0
    return q, k, v, jnp.asarray(ids, jnp.int32)


@pytest.mark.parametrize("segmented", [True, False])
def test_splash_equals_xla(segmented):
    """The kernel itself, interpreted on the CPU: outputs and all three gradients."""
    q, k, v, ids = packed(0, 256, 2, 128)
    ids = ids if segmented else None
    (weight,) = normal(9, 1, *q.shape)

    how = {"causal": True, "segment_ids": ids, "scale": 0.1}
    through = partial(outputs_and_gradients, weight=weight)
    ours = through(lambda *x: splash(*x, **how, interpret=True), q, k, v)
    theirs = through(lambda *x: attention(*x, **how), q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < 2e-5


@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 1, 2, 2)])
def test_splash_on_a_mesh_keeps_rows_and_heads_apart(shape):
    q, k, v, ids = packed(1, 128, 4, 128)
    q, k, v, ids = (jnp.concatenate([x, x[::-1]]) for x in (q, k, v, ids))
    how = {"causal": True, "scale": 0.1}
    expected = jax.jit(lambda *x: attention(*x, segment_ids=ids, **how))(q, k, v)
    with jax.set_mesh(make_mesh(*shape)):
        run = jax.jit(lambda *x: splash(*x[:3], segment_ids=x[3], interpret=True, **how))
        assert relative_error(run(q, k, v, ids), expected) < 2e-5


@pytest.mark.parametrize(
    "queries, keys, heads, width",
    [(257, 257, 2, 88), (17, 33, 3, 24), (33, 17, 1, 64), (545, 33, 4, 64)],
)
def test_short_rows_equal_xla(queries, keys, heads, width):
    """The kernel that holds whole rows, interpreted: outputs and all three gradients."""
    q, weight = normal(4, 2, 3, queries, heads, width)
    k, v = normal(5, 2, 3, keys, heads, width)

    scale = width**-0.5
    through = partial(outputs_and_gradients, weight=weight)
    ours = through(lambda *x: short(*x, scale=scale, interpret=True), q, k, v)
    theirs = through(lambda *x: attention(*x, scale=scale), q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < 2e-5


def test_short_rows_in_bfloat16_are_no_further_from_float32_than_xla():
    q, k, v, weight = normal(5, 4, 2, 65, 2, 24)

    def through(run, dtype):
        arrays = (x.astype(dtype) for x in (q, k, v))
        return outputs_and_gradients(
            lambda *x: run(*x, scale=0.2), *arrays, weight=weight.astype(dtype)
        )

    exact = through(attention, jnp.float32)
    kernel = lambda *x, scale: short(*x, scale=scale, interpret=True)  # noqa: E731
    ours, theirs = (through(run, jnp.bfloat16) for run in (kernel, attention))
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        error, reference = (jnp.linalg.norm(x.astype(jnp.float32) - c) for x in (a, b))
        assert 0 < error < 1.1 * reference


def test_short_rows_on_a_mesh_keep_rows_and_heads_apart():
    q, k, v = normal(6, 3, 8, 65, 4, 24)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        run = jax.jit(lambda *x: short(*x, scale=0.2, interpret=True))
        assert relative_error(run(q, k, v), attention(q, k, v, scale=0.2)) < 2e-5


@pytest.mark.parametrize("backend", [pytest.param("xla", marks=pytest.mark.slow), "cpu"])
def test_grouped_heads_equal_repeated_ones(backend):
    """Outputs and gradients of a short and of a long row, and outputs with a cache."""
    q, k, v, ids = packed(7, CAUSAL_BLOCK + 37, 6, 8)
    k, v = k[:, :, :2], v[:, :, :2]
    repeat = lambda x, axis: jnp.repeat(x, 3, axis)  # noqa: E731

    def through(q, k, v, ids, repeat):
        how = {"causal": True, "segment_ids": ids, "scale": 0.3, "backend": backend}
        out, back = jax.vjp(
            lambda *x: attention(x[0], *(repeat(a, 2) for a in x[1:]), **how), q, k, v
        )
        return out, *back(q)

    def both(repeat):
        short = through(*(x[:, :40] for x in (q, k, v, ids)), repeat)
        keys, values = repeat(k.transpose(0, 2, 3, 1), 1), repeat(v.swapaxes(1, 2), 1)
        mask = segment_mask(ids)[:, :, -5:]
        cached = attention(
            q[:, -5:], keys, values, mask=mask, scale=0.3, cached=True, backend=backend
        )
        return *short, *through(q, k, v, ids, repeat), cached

    ours, theirs = (jax.jit(both, static_argnums=0)(r) for r in (lambda x, axis: x, repeat))
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < 2e-6


@pytest.mark.parametrize(
    "key_heads, shape",
    [
        (2, (2, 2, 2)),
        (2, (2, 1, 2, 2)),
        pytest.param(1, (2, 2, 2), marks=pytest.mark.slow),
    ],
)
def test_splash_with_grouped_heads(key_heads, shape):
    """Outputs and gradients on meshes that split the heads of keys like those of queries, into
    fewer parts, and not at all."""
    q, k, v, ids = packed(8, 128, 4, 128)
    q, k, v, ids = (jnp.concatenate([x, x[::-1]]) for x in (q, k, v, ids))
    k, v = k[:, :, :key_heads], v[:, :, :key_heads]

    how = {"causal": True, "segment_ids": ids, "scale": 0.1}
    through = partial(outputs_and_gradients, weight=q)
    theirs = through(lambda *x: attention(*x, **how), q, k, v)
    with jax.set_mesh(make_mesh(*shape)):
        ours = through(lambda *x: splash(*x, **how, interpret=True), q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < 2e-5


def test_masks_add_up():
    q, k, v, ids = packed(2, 16, 1, 8)
    ids = jnp.where(jnp.arange(16) < 5, 1, 2)[None].repeat(2, 0)
    mask = jnp.ones((1, 1, 16, 16), bool).at[..., 3].set(False)
    out = attention(q, k, v, causal=True, segment_ids=ids, mask=mask, scale=1.0)
    # The sixth position is the first of its document: it sees itself alone.
    assert relative_error(out[:, 5], v[:, 5]) < 1e-6
    moved = attention(
        q,
        k.at[:, 3].add(5.0),
        v.at[:, 3].add(5.0),
        causal=True,
        segment_ids=ids,
        mask=mask,
        scale=1.0,
    )
    assert relative_error(moved, out) < 1e-6


@pytest.mark.parametrize("segmented", [True, False])
def test_blocks_of_a_long_row_equal_the_whole(segmented, monkeypatch):
    """Outputs and gradients, where the last block is a short one. The reference has no blocks."""
    q, k, v, ids = packed(4, CAUSAL_BLOCK + 37, 3, 8)
    mask = causal_mask(q.shape[1])
    if segmented:
        mask &= segment_mask(ids)
    how = {"causal": True, "segment_ids": ids if segmented else None}
    (weight,) = normal(9, 1, *q.shape)

    through = partial(outputs_and_gradients, weight=weight)
    ours = through(lambda *x: attention(*x, scale=0.3, **how), q, k, v)
    theirs = through(lambda *x: plain_attention(*x, mask, scale=0.3), q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < 1e-6
    blocks = []
    monkeypatch.setattr(blockwise, "flash_style_attention", lambda q, *_: blocks.append(q) or q)
    for backend, count in (("xla", 0), ("blockwise", 2)):
        jax.eval_shape(lambda *x: attention(*x, scale=0.3, backend=backend, **how), q, k, v)  # noqa: B023
        assert len(blocks) == count


def test_backend_is_chosen_by_name_or_platform():
    assert choose_backend("auto", "tpu") == "splash"
    assert choose_backend("auto", "gpu") == choose_backend("cudnn", "cuda") == "cudnn"
    assert choose_backend("auto", "cpu") == choose_backend("cpu", "cpu") == "cpu"
    assert choose_backend("xla", "cpu") == choose_backend("xla", "tpu") == "xla"
    assert choose_backend("blockwise", "tpu") == "blockwise"
    assert choose_backend("auto", "rocm") == "blockwise"
    with pytest.raises(UserError, match="does not run on tpu: use splash, blockwise or xla"):
        choose_backend("cpu", "tpu")
    with pytest.raises(UserError, match="does not run on cpu"):
        choose_backend("splash", "cpu")
    with pytest.raises(UserError, match="did you mean 'splash'"):
        choose_backend("splsh", "tpu")


def test_a_fast_backend_that_cannot_serve_is_an_error():
    q, k, v, ids = packed(3, 200, 1, 128)
    how = {"causal": True, "segment_ids": ids, "scale": 1.0}
    with pytest.raises(UserError, match="multiples of 128: 200 queries"):
        attention(q, k, v, backend="splash", **how)
    with pytest.raises(UserError, match="takes no bias"):
        attention(q, k, v, backend="splash", bias=jnp.zeros((1, 1, 200, 200)), **how)
    with pytest.raises(UserError, match="not float32"):
        cudnn(q, k, v, **how)
    with pytest.raises(ValueError, match="splash attention cannot read a cache"):
        attention(q, k, v, backend="splash", cached=True, scale=1.0)


@pytest.mark.parametrize("causal, segmented", [(True, True), (False, False)])
def test_cudnn_is_asked_for_what_xla_computes(causal, segmented, monkeypatch):
    """The kernel needs a GPU; what it is given does not. jax's own implementation stands in."""
    q, k, v, ids = (
        x if x.dtype == jnp.int32 else x.astype(jnp.bfloat16) for x in packed(5, 60, 2, 16)
    )
    k, v = k[:, :, :1], v[:, :, :1]  # which both heads share
    theirs, asked = jax.nn.dot_product_attention, []

    def kernel(*arrays, implementation, **how):
        asked.append(implementation)
        return theirs(*arrays, implementation="xla", **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    how = {"causal": causal, "segment_ids": ids if segmented else None, "scale": 0.7}
    run = jax.jit(
        lambda *x, backend: attention(*x, **how, backend=backend), static_argnames="backend"
    )
    ours = run(q, k, v, backend="cudnn")
    assert asked == ["cudnn"]
    assert relative_error(ours, run(q, k, v, backend=None)) < 2e-2


@pytest.mark.parametrize("shape, ways", [((2, 2, 2), (4, 1, 2, 1)), ((2, 1, 2, 2), (2, 1, 4, 1))])
def test_cudnn_gets_queries_keys_and_values_split_alike(shape, ways, monkeypatch):
    """On GPUs jax refuses others. Two heads of keys for four of queries, in parts of each axis."""
    arrays = packed(6, 16, 4, 16)
    q, k, v, ids = (jnp.concatenate([x, x[::-1]]) for x in arrays)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k[:, :, :2], v[:, :, :2]))
    theirs, found = jax.nn.dot_product_attention, []

    def kernel(*arrays, implementation, **how):
        for x in arrays:
            jax.debug.inspect_array_sharding(
                x,
                callback=lambda sharding, shape=x.shape: found.append(
                    tuple(np.array(shape) // sharding.shard_shape(shape))
                ),
            )
        return theirs(*arrays, implementation="xla", **how)

    def run(*arrays):
        sharded = (shard(x, "batch", None, "attention_heads", None) for x in arrays)
        return cudnn(*sharded, segment_ids=ids, **how)

    how = {"causal": True, "scale": 0.7}
    expected = jax.jit(lambda *x: attention(*x, segment_ids=ids, **how))(q, k, v)
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    with jax.set_mesh(make_mesh(*shape)):
        assert relative_error(jax.jit(run)(q, k, v), expected) < 2e-2
    assert found == [ways] * 3


# --- The blocked cross-entropy --------------------------------------------------------------------

SMALL = LlamaConfig(
    vocab_size=61, vocab_multiple=8, width=24, layers=1, heads=2, mlp_width=16, rope_dtype="float32"
)


def naive(llama, hidden, targets):
    logits = llama.logits(hidden).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


@pytest.mark.parametrize(
    "shape, block",
    [
        ((1, 1, 1), 5),
        ((1, 1, 1), 64),
        ((1, 1, 1), 0),
        ((2, 2, 2), 7),
        ((1, 4, 2), 21),
        ((2, 2, 2), 0),
    ],
)
def test_blocked_cross_entropy_equals_the_naive_one(shape, block):
    """Losses and gradients to 1e-6, also where width, columns and rows are split."""
    mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    (hidden,), (weight,) = normal(0, 1, 8, 21, 24), normal(1, 1, 8, 21)
    targets = np.random.default_rng(2).integers(0, 61, (8, 21))
    with jax.set_mesh(mesh):
        template = AbstractModel(lambda: Llama(SMALL, rngs=nnx.Rngs(0)), mesh)
        params = template.init()

        def loss(run):
            def total(params, hidden, targets, weight):
                losses = run(template.module(params), hidden, targets)
                return jnp.sum(weight * losses), losses  # the sum cancels: it is less exact

            gradients = jax.jit(jax.grad(total, (0, 1), has_aux=True))
            (of_params, of_hidden), losses = gradients(params, hidden, targets, weight)
            return losses, of_params["lm_head.kernel"], of_hidden

        ours = loss(lambda *x: x[0].token_losses(*x[1:], block=block))
        theirs = loss(naive)
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < 1e-6


def test_blocked_cross_entropy_needs_a_quarter_of_the_memory():
    """The compiler's figure for the gradient at the 32k vocabulary."""
    cfg = LlamaConfig(vocab_size=32004, width=64, layers=1, heads=1, mlp_width=8)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama(cfg, rngs=nnx.Rngs(0))))
    hidden = jax.ShapeDtypeStruct((1, 2048, 64), jnp.float32)
    targets = jax.ShapeDtypeStruct((1, 2048), jnp.int32)

    def peak(run):
        def total(state, hidden, targets):
            return jnp.mean(run(nnx.merge(graphdef, state), hidden, targets))

        compiled = jax.jit(jax.grad(total, (0, 1))).lower(state, hidden, targets).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    blocked = peak(lambda *x: x[0].token_losses(*x[1:], block=256))
    assert 4 * blocked <= peak(naive)
