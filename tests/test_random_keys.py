"""Every random key has one purpose: no two places of the package draw with the same key."""

import dataclasses
import inspect
import sys
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generate import OPENING, drawer, model, small_config, words  # noqa: F401  (fixtures)

from emu_jax.config import LoraConfig, MatmulDtypeConfig
from emu_jax.data.config import DataConfig
from emu_jax.generate import image
from emu_jax.generate.api import Emu, _image_keys, _seeded_keys
from emu_jax.sharding import make_mesh
from emu_jax.train.config import TrainConfig
from emu_jax.train.objectives import OBJECTIVES
from emu_jax.train.step import Trainer

PACKAGE = str(Path(sys.modules["emu_jax"].__file__).parent)
DRAWS = (
    "bernoulli bits categorical choice exponential gumbel laplace normal orthogonal permutation "
    "randint truncated_normal uniform"
).split()
DERIVATIONS = ["fold_in", "split"]


class Keys:
    """The keys that were drawn with or derived from, by the function of the package that did."""

    def __init__(self):
        self.drawn: dict[tuple[int, ...], set[str]] = defaultdict(set)
        self.derived: dict[tuple[int, ...], set[str]] = defaultdict(set)

    def check(self, *purposes: str) -> None:
        """Checks that each key has one purpose, and that all of `purposes` drew."""
        jax.effects_barrier()
        shared = {key: names for key, names in self.drawn.items() if len(names) > 1}
        assert not shared
        # Initializers and stacks of layers take turns at one counter.
        parents = [names for names in self.derived.values() if len(names) > 1]
        assert all(name.startswith("layers.") for names in parents for name in names), parents
        both = self.drawn.keys() & self.derived.keys()
        assert not [(*self.drawn[key], *self.derived[key]) for key in both]
        drew = set().union(*self.drawn.values())
        for purpose in purposes:
            assert any(purpose in name for name in drew), f"{purpose} not in {drew}"

    def record(self, keys: dict, purpose: str, function):
        home = inspect.unwrap(function).__code__.co_filename

        def recorded(key, *args, **kwargs):
            frame = sys._getframe(1)
            if frame.f_code.co_filename != home:  # not a step of another draw
                while frame and not frame.f_code.co_filename.startswith(PACKAGE):
                    frame = frame.f_back
                if frame:
                    code = frame.f_code
                    name = f"{Path(code.co_filename).stem}.{code.co_qualname}"
                    jax.debug.callback(
                        lambda data: keys[tuple(data.tolist())].add(name), jax.random.key_data(key)
                    )
            return function(key, *args, **kwargs)

        return recorded


@pytest.fixture
def keys(monkeypatch):
    recorder = Keys()
    for names, keys in ((DRAWS, recorder.drawn), (DERIVATIONS, recorder.derived)):
        for name in names:
            function = getattr(jax.random, name)
            recorded = recorder.record(keys, name, function)
            home = sys.modules[inspect.unwrap(function).__module__]
            for module in (jax.random, sys.modules["jax._src.random"], home):
                monkeypatch.setattr(module, name, recorded)
    for program in (_seeded_keys, _image_keys):
        program.clear_cache()  # it records only where it is traced
    return recorder


PURPOSES = {
    "emu": ("Dropout.__call__", "LoraLinear.__call__"),
    "text": ("LoraLinear.__call__",),
    "clip": (),
    "vae": ("VaeObjective.loss",),
    "decoder": ("DecoderObjective.loss",),
    "painter": ("DecoderObjective.loss", "DecoderObjective._noise"),
}


def training(objective, words, **changes):  # noqa: F811
    """A small trainer whose objective draws all it can, and zeros as its state and batch."""
    model = small_config(words)  # noqa: F811
    llama = dataclasses.replace(model.llama, lora=LoraConfig(rank=2, dropout=0.5))
    vision = dataclasses.replace(model.vision, clip_width=64)
    cfg = TrainConfig(
        model=dataclasses.replace(model, llama=llama, vision=vision),
        data=DataConfig(
            batch_size=2, row_tokens=16, row_images=2, n_causal=3, image_size=12, target_size=8
        ),
        objective=objective,
        noise_offset=0.1,
        dtype="float32",
        **changes,
    )
    trainer = Trainer(cfg, make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    state, batch = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        (
            trainer.state_shapes,
            {
                name: jax.ShapeDtypeStruct(*shape)
                for name, shape in trainer.objective.batch_shapes().items()
            },
        ),
    )
    return trainer, state, batch


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_key_of_a_training_run_has_two_purposes(objective, words, keys, monkeypatch):  # noqa: F811
    trainer, state, batch = training(objective, words)
    monkeypatch.setattr(jax, "value_and_grad", lambda f, **_: lambda *args: (f(*args), ()))

    # Without their results, XLA keeps little of these but the keys.
    @jax.jit
    def initialize():
        trainer.template._build()

    @jax.jit
    def step(state, batch):
        trainer.gradients(state, batch)

    initialize()
    for done in range(3):
        step(dataclasses.replace(state, step=jnp.int32(done)), batch)
    keys.check("layers.param", *PURPOSES[objective])


def test_no_key_of_a_backward_pass_in_int8_has_two_purposes(words, keys):  # noqa: F811
    matmul_dtype = MatmulDtypeConfig(visual="int8", llama="int8")
    trainer, state, batch = training("emu", words, matmul_dtype=matmul_dtype)
    jax.jit(trainer.gradients)(state, batch)
    keys.check("low_precision.rounding_noise", *PURPOSES["emu"])
    rounded = [k for k, names in keys.drawn.items() if "low_precision.rounding_noise" in names]
    layers = 7 * trainer.cfg.model.llama.layers + 6 * trainer.cfg.model.vision.layers
    assert len(rounded) == 2 * layers  # a key for the rows and one for the columns of each matmul


def test_no_key_of_a_mixed_generation_has_two_purposes(drawer, keys, monkeypatch):  # noqa: F811
    def paint(emu, embeddings, keys, cfg, *_):
        image.initial_latents(keys, emu.cfg)
        return np.zeros((len(embeddings), 4, 4, 3), np.uint8)

    monkeypatch.setattr(Emu, "_paint", paint)
    settings = dict(do_sample=True, temperature=0.1, max_new_tokens=9, max_images=3, seed=5)
    results = drawer.complete(OPENING, **settings)
    list(drawer.stream(OPENING[0], **settings))
    assert sum(not isinstance(part, str) for parts in results for part in parts) >= 3
    keys.check("mixed._sample", "image.initial_latents")
