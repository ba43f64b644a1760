"""Layers where parity with the release does not look: dropout, adapters, targets."""

import dataclasses
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import TypeCheckError

from emu_jax.config import CFormerConfig, LoraConfig, TokenIds
from emu_jax.models.attention import attention
from emu_jax.models.cformer import CFormer, Dropout
from emu_jax.models.emu import EmuModel
from emu_jax.models.lora import LoraLinear, adapted, merge
from emu_jax.models.xla import segment_mask


def test_dropout_by_hand():
    x = jnp.arange(1.0, 401.0).reshape(20, 20)
    key = jax.random.key(3)
    dropout = Dropout(0.25, key)
    one, two = np.asarray(dropout(x)), np.asarray(dropout(x))
    for n, found in enumerate((one, two), 1):
        kept = np.asarray(jax.random.bernoulli(jax.random.fold_in(key, n), 0.75, x.shape))
        # What is kept makes up for what is not.
        np.testing.assert_allclose(found, np.where(kept, x / 0.75, 0), rtol=1e-6)
        assert 0.65 < kept.mean() < 0.85
    assert (one != two).any()
    for off in (Dropout(0.25, None), Dropout(0.0, key)):
        np.testing.assert_array_equal(off(x), x)


def test_embeddings_are_normalized_where_the_config_asks_for_it():
    cfg = CFormerConfig(n_causal=3, width=8, layers=1, heads=2, head_width=4, mlp_width=8)
    made = {
        normalize: CFormer(dataclasses.replace(cfg, normalize=normalize), 6, 40, rngs=nnx.Rngs(0))
        for normalize in (False, True)
    }
    features = jax.random.normal(jax.random.key(1), (2, 5, 6))
    plain, found = (np.asarray(nnx.jit(CFormer.__call__)(m, features)) for m in made.values())
    center = plain - plain.mean(-1, keepdims=True)
    expected = center / np.sqrt((center**2).mean(-1, keepdims=True) + cfg.eps)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(plain - expected).max() > 0.1


def test_adapters_by_hand():
    """alpha is not the rank; of an input the adapter drops its own entries, the layer none."""
    lora = LoraConfig(rank=2, alpha=3.0, dropout=0.4)
    layer = LoraLinear(6, 5, ("embed", "heads"), path="mlp.up_proj", lora=lora, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    layer.lora_b[...] = jnp.asarray(rng.normal(size=(2, 5)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(3, 4, 6)), jnp.float32)
    kernel, a, b = (np.asarray(p[...]) for p in (layer.kernel, layer.lora_a, layer.lora_b))
    expected = x @ kernel + 3.0 / 2 * (np.asarray(x) @ a @ b)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)
    merged = merge(layer.kernel[...], layer.lora_a[...], layer.lora_b[...], lora)
    np.testing.assert_allclose(x @ merged, expected, rtol=1e-5, atol=1e-6)

    key = jax.random.key(1)
    # CRC-32 of the names, from `printf mlp.up_proj | gzip -c | tail -c8 | od -An -N4 -tu4`.
    for layer.path, name_hash in (("mlp.up_proj", 1530557511), ("self_attn.q_proj", 3176923733)):
        own = jax.random.fold_in(key, name_hash)
        low = np.where(jax.random.bernoulli(own, 0.6, x.shape), np.asarray(x) / 0.6, 0)
        found = adapted(layer, x, key)
        np.testing.assert_allclose(found, x @ kernel + 1.5 * (low @ a @ b), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(adapted(layer, x, None), layer(x))


def test_regression_targets_by_hand():
    """The states at [IMG] and <image> regress what follows: N + 1 for each image that is scored,
    none from one document to the next or round the end of a row."""
    ids = TokenIds(pad=7, img=8, img_end=9, image=10)
    emu = types.SimpleNamespace(
        cfg=types.SimpleNamespace(tokens=ids, n_embeddings=2, regression_pairs=3)
    )
    image = [8, 10, 10, 9]
    rows = [
        # tokens, documents, which state regresses
        ([1, *image, 3, *image, 2, 7], [1] * 11 + [0], [0, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0]),
        # An image that was cut off by the next document's, and one at the row's end.
        (
            [1, 8, 10, 10, 9, 3, 4, 5, 6, 8, 10, 10],
            [1] * 3 + [2] * 9,
            [0, 1, 0, 1, 0, 0, 0, 0, 0, 1, 1, 0],
        ),
        # The row ends in [IMG], and begins in the middle of an image.
        ([10, 9, 2, 1, 5, 3, 3, 3, 3, 3, 3, 8], [1] * 12, [1] + [0] * 11),
    ]
    tokens, segments, expected = (np.array(x) for x in zip(*rows, strict=True))
    found = EmuModel.regression_mask(emu, jnp.asarray(tokens), jnp.asarray(segments))
    assert found.astype(int).tolist() == expected.tolist()

    here = tokens[0] == ids.image
    embedding_index = jnp.asarray(np.where(here, np.cumsum(here) - 1, -1)[None])
    for scored in ([True, True, False], [False, True, False], [True, False, True]):
        found = EmuModel.regression_mask(
            emu,
            jnp.asarray(tokens[:1]),
            jnp.asarray(segments[:1]),
            embedding_index,
            jnp.asarray([scored]),
        )
        want = expected[0] * np.repeat([0, *scored[:2], 0], [1, 5, 5, 1])
        assert found.astype(int).tolist() == [want.tolist()]


def test_a_query_that_sees_nothing_has_no_gradient():
    """It gets the mean of the values, which moves no query and no key."""
    length = 5
    q, k, v = (
        jax.random.normal(key, (1, length, 1, 4)) for key in jax.random.split(jax.random.key(0), 3)
    )
    mask = jnp.ones((1, 1, length, length), bool).at[:, :, 2].set(False)

    def second(q, k, v):
        return attention(q, k, v, mask=mask, scale=0.5)[:, 2]

    np.testing.assert_allclose(second(q, k, v)[0, 0], v.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
    d_q, d_k = jax.grad(lambda q, k: second(q, k, v).sum(), (0, 1))(q, k)
    assert not np.any(d_q) and not np.any(d_k)


@pytest.mark.skipif(
    os.environ.get("EMU_JAX_CHECK_SHAPES") == "0", reason="shapes are left unchecked"
)
def test_shapes_and_dtypes_are_checked():
    segment_mask(np.zeros((2, 3), np.int32))
    for wrong in (np.zeros((2, 3, 1), np.int32), np.zeros((2, 3), np.float32)):
        with pytest.raises(TypeCheckError, match="segment_mask"):
            segment_mask(wrong)
