"""Ten steps of each stage of the digits against a plain PyTorch loop (tests/torch_reference.py).

Both start from the same weights and read the same batches and the same noise; PyTorch computes in
float64. Everything that a step minimizes or updates is compared: losses, metrics, the norm of the
gradient, parameters and averages.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_reference as reference

from emu_jax.data.pipeline import Batches
from emu_jax.sharding import make_mesh
from emu_jax.tokenizer import Tokenizer
from emu_jax.train.config import TrainConfig
from emu_jax.train.config_file import load_config
from emu_jax.train.step import Trainer

pytestmark = pytest.mark.optimized

torch.set_num_threads(1)
CONFIGS = Path(__file__).parent.parent / "configs"
STEPS = 10
SLOW = ("digits_clip", "digits_vae", "digits_decoder", "digits_instruct")
STAGES = ["digits", *(pytest.param(stage, marks=pytest.mark.slow) for stage in SLOW)]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory, copy_digits):
    return str(copy_digits(tmp_path_factory.mktemp("digits")))


def shrunk(stage: str, root: str) -> TrainConfig:
    """The stage's config at sizes that two cores train in seconds. Delays, warm-ups, the decay and
    the average's memory all end within ten steps; the gradient's norm is clipped at some."""
    cfg = load_config(TrainConfig, CONFIGS / f"{stage}.py", [])
    model = cfg.model
    lora = model.llama.lora and dataclasses.replace(model.llama.lora, dropout=0.0)
    words = model.llama.vocab_size + (2 if cfg.data.instruct else 0)
    model = dataclasses.replace(
        model,
        vision=dataclasses.replace(model.vision, layers=2, width=48, mlp_width=96),
        cformer=dataclasses.replace(model.cformer, width=48, heads=2, mlp_width=96),
        llama=dataclasses.replace(
            model.llama, layers=2, width=64, heads=2, mlp_width=96, vocab_size=words, lora=lora
        ),
        unet=dataclasses.replace(
            model.unet,
            block_out_channels=(16, 32),
            attention_head_dim=2,
            norm_num_groups=8,
            cross_attention_dim=64,
        ),
        vae=dataclasses.replace(
            model.vae, block_out_channels=(8, 16, 16), norm_num_groups=4, scaling_factor=0.7
        ),
    )
    groups = tuple(
        dataclasses.replace(
            group,
            delay_steps=3 if group.delay_steps else 0,
            warmup_steps=3 if group.warmup_steps else 0,
            final_fraction=0.1,
        )
        for group in cfg.optimizer.groups
    )
    return dataclasses.replace(
        cfg,
        model=model,
        steps=STEPS,
        init_from="",
        parents={},
        data=dataclasses.replace(
            cfg.data,
            root=root,
            batch_size=4,
            row_tokens=min(cfg.data.row_tokens, 64),
            row_images=4,
            block_documents=32,
        ),
        ema_decay=0.3 if cfg.ema_decay else 0.0,
        text_weight=0.7,
        optimizer=dataclasses.replace(cfg.optimizer, groups=groups),
    )


class Recording:
    """An objective that also reports the random numbers it drew."""

    def __init__(self, objective):
        self.objective = objective

    def __getattr__(self, name):
        return getattr(self.objective, name)

    def loss(self, *arguments):
        drawn = {}

        def recorded(name, function):
            def draw(*args, **kwargs):
                assert name not in drawn, "two draws of one kind: tell them apart"
                drawn[name] = function(*args, **kwargs)
                return drawn[name]

            return draw

        with pytest.MonkeyPatch.context() as patch:
            for name in ("normal", "randint"):
                patch.setattr(jax.random, name, recorded(name, getattr(jax.random, name)))
            loss, metrics = self.objective.loss(*arguments)
        return loss, metrics | drawn


def initial(shapes) -> dict[str, np.ndarray]:
    """Random parameters, none of which is zero, or one, throughout."""
    rng = np.random.default_rng(0)
    params = {}
    for path, shape in shapes.items():
        value = rng.normal(size=shape.shape)
        if path.endswith((".kernel", ".qkv", ".lora_a", ".lora_b")):
            stacked = ".blocks." in path and path.startswith(("visual", "cformer"))
            fan_in = np.prod(shape.shape[stacked or ".layers." in path : -1])
            fan_in /= 3 if path.endswith(".qkv") else 1
            value /= fan_in**0.5
        elif path.endswith(".scale"):
            value = 1 + 0.1 * value
        elif path == "logit_scale":
            value = np.log(5.0) + 0 * value
        elif path.endswith("bias"):
            value *= 0.1
        if path.endswith(".lora_b"):
            value *= 0.1
        params[path] = np.float32(value)
    return params


def relative(found: float, expected: float) -> float:
    return abs(found - expected) / max(abs(expected), 1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_ten_steps_are_those_of_a_plain_torch_loop(stage, data_root):
    cfg = shrunk(stage, data_root)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    seen: dict[str, list[np.ndarray]] = {"normal": [], "randint": []}
    clipped, worst = 0, dict.fromkeys(("loss", "grad_norm", "params", "ema", "moved"), 0.0)
    with jax.set_mesh(mesh):
        trainer = Trainer(cfg, mesh)
        trainer.objective = Recording(trainer.objective)
        start = initial(trainer.template.shapes)
        state = trainer.init(jax.tree.map(jnp.asarray, start))
        loop = reference.Loop(cfg, reference.LOSSES[cfg.objective], start)
        tokenizer = Tokenizer.load(Path(data_root) / "tokenizer", instruct=cfg.data.instruct)
        with Batches(cfg.data, tokenizer, trainer.objective.batch_kind) as batches:
            for _, batch in zip(range(STEPS), batches, strict=False):
                state, metrics = trainer.step(state, batch)
                drawn = {k: np.asarray(metrics.pop(k)) for k in seen if k in metrics}
                for name, value in drawn.items():
                    seen[name].append(value)
                theirs = loop.step(batch, drawn) | {"bad_steps": 0, "skipped_steps": 0}
                clipped += theirs["grad_norm"] > cfg.optimizer.clip_norm
                assert metrics.keys() == theirs.keys()
                for name, value in metrics.items():
                    error = relative(float(value), theirs[name])
                    if name.startswith("grad_norm/"):  # a part of the whole, rounded like it
                        error = abs(float(value) - theirs[name]) / theirs["grad_norm"]
                    worst[name] = max(worst.get(name, 0.0), error)
                    assert error <= 1e-5, (int(state.step), name, error)
    assert clipped > 0 and int(state.step) == STEPS

    assert state.trained.keys() == set(loop.trained)
    assert state.ema.keys() == (set(loop.trained) if cfg.ema_decay else set())
    for path, value in state.frozen.items():
        np.testing.assert_array_equal(value, start[path], err_msg=path)
    for kind, ours, theirs in (
        ("params", state.trained, loop.params),
        ("ema", state.ema, loop.ema),
    ):
        for path, value in ours.items():
            expected = theirs[path].detach().numpy()
            moved = np.abs(expected - start[path]).max()
            error = np.abs(np.float64(value) - expected).max()
            worst[kind], worst["moved"] = max(worst[kind], error), max(worst["moved"], moved)
            assert error <= 4e-6 + 1e-4 * moved, (path, error, moved)
    figures = ", ".join(f"{name} {value:.1e}" for name, value in worst.items() if value)
    print(f"\n{cfg.name}: largest differences: {figures}")

    # No noise comes twice, and it is distributed as the objective has it.
    if noise := seen["normal"]:
        rows = np.concatenate(noise).reshape(STEPS * cfg.data.batch_size, -1)
        assert len(np.unique(rows, axis=0)) == len(rows)
        assert abs(np.mean(rows)) < 0.05 and abs(np.std(rows) - 1) < 0.05
    if times := seen["randint"]:
        assert 0 <= np.min(times) < 200 and 800 <= np.max(times) < 1000
