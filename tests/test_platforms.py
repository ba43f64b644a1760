"""What is computed in another way on a CPU gives what other platforms compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error
from flax import nnx

from emu_jax import config
from emu_jax.generate import text
from emu_jax.models import attention, conv, llama
from emu_jax.models.emu import Emu


@pytest.fixture
def elsewhere(monkeypatch):
    """Makes what is traced from then on take the way of a platform that is no CPU."""

    def leave():
        for module in (attention, conv, llama):
            monkeypatch.setattr(module, "platform", lambda: "gpu")

    return leave


def random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(("queries", "keys"), [(9, 5), (1000, 600)])
def test_attention(queries, keys, elsewhere):
    q, k, v = random(0, 2, queries, 3, 8), random(1, 2, keys, 3, 8), random(2, 2, keys, 3, 8)
    here = attention.attention(q, k, v, scale=0.5)
    elsewhere()
    assert relative_error(here, attention.attention(q, k, v, scale=0.5)) < 2e-6


def test_upsampling(elsewhere):
    layer = conv.Upsample(6, rngs=nnx.Rngs(0))
    layer.conv.bias[...] = jnp.arange(6.0)
    x = random(0, 2, 3, 5, 6)
    here = layer(x)
    elsewhere()
    assert relative_error(here, layer(x)) < 2e-6


@pytest.mark.parametrize("beams", [1, 3])
def test_decoding(beams, elsewhere):
    emu = Emu(config.digits(), painter=False, rngs=nnx.Rngs(0))
    ids = jnp.asarray([[7, 8, 9, 10, 11], [0, 0, 20, 21, 22]])
    settings = text.TextConfig(max_new_tokens=6, num_beams=beams)
    plan, rules = text.Plan.of(settings, emu.cfg.tokens), text.Rules.of(settings)

    def run():
        @nnx.jit
        def decode(emu):
            keys = jax.random.split(jax.random.key(0), 2)
            x = emu.llama.embed_tokens(ids)
            out = text.decode(emu.llama, x, ids > 0, plan, rules, keys)
            return out, emu.regress_after(ids[::-1], jnp.asarray([3, 5]))

        return decode(emu)

    written, regressed = run()
    elsewhere()
    others = run()
    np.testing.assert_array_equal(written, others[0])
    assert relative_error(regressed, others[1]) < 2e-5
