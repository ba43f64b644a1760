"""What a training step updates and what a run keeps, against a few lines of numpy.

The module is two linear layers, so that a whole run with `train` takes a second and everything it
should do (accumulation, clipping, AdamW, groups, schedules, averages, skipped steps, checkpoints)
fits on a page. The real objectives are in test_training_oracle.py.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from flax import nnx

from emu_jax import checkpoint, diffusion
from emu_jax.config import LoraConfig, SchedulerConfig, digits, save_json
from emu_jax.models.emu import Emu
from emu_jax.sharding import Template, make_mesh, nest
from emu_jax.train import loop, objectives, parents
from emu_jax.train.config import GroupConfig, OptimizerConfig, TrainConfig
from emu_jax.train.goodput import Goodput
from emu_jax.train.loop import Trainer, train
from emu_jax.train.metrics import read_metrics
from emu_jax.train.monitor import Monitor
from emu_jax.train.optimizer import dotted, schedule

ROWS, STEPS, CLIP = 8, 9, 20.0
NO_GRADIENT, NO_LOSS = 3, 6  # the steps whose gradient, or loss, is not finite


# --- A run ---------------------------------------------------------------------------------------


class Layer(nnx.Module):
    def __init__(self, width_in: int, width_out: int, rngs: nnx.Rngs):
        draw = lambda *shape: nnx.Param(jax.random.normal(rngs.params(), shape))  # noqa: E731
        self.kernel, self.bias = draw(width_in, width_out), draw(width_out)


class Toy(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.visual, self.llama = Layer(4, 5, rngs), Layer(5, 3, rngs)


class ToyBatches:
    """Batches that follow from their position alone."""

    def __init__(self):
        self.position = 0

    @staticmethod
    def make(position: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(position)
        x, y = rng.normal(size=(2, ROWS, 4)).astype(np.float32)
        mask = np.arange(ROWS) % 4 < 1 + (position % 3)  # halves of a batch differ in targets
        root = np.full(ROWS, float(position + 1 != NO_GRADIENT), np.float32)
        more = np.full(ROWS, np.inf if position + 1 == NO_LOSS else 0, np.float32)
        return {"x": x, "y": y[:, :3], "mask": mask, "root": root, "more": more}

    def __next__(self):
        self.position += 1
        return self.make(self.position - 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def state(self):
        return {"position": self.position}

    def restore(self, state):
        self.position = state["position"]

    def documents(self):
        return []

    damaged = documents

    def statistics(self):
        done = self.position
        return {"token_fill": 0.5, "image_fill": 0.25, "tokens": 100 * done, "images": done,
                "damaged": {"torn": 2, "gone": 1}}  # fmt: skip


class ToyObjective(objectives.Objective):
    """Squared error where the mask holds. It draws, but what it draws changes no parameter."""

    def build(self, cfg, rngs):
        return Toy(rngs)

    def batches(self, cfg, tokenizer):
        return ToyBatches()

    def targets(self, module, batch):
        return {"squares": jnp.sum(batch["mask"])}

    def loss(self, cfg, module, batch, key, targets=None):
        hidden = batch["x"] @ module.visual.kernel[...] + module.visual.bias[...]
        out = hidden @ module.llama.kernel[...] + module.llama.bias[...]
        errors = jnp.mean(jnp.square(out - batch["y"]), axis=-1)
        loss = objectives.masked_mean(errors, batch["mask"], (targets or {}).get("squares"))
        # Nothing, whose gradient is 0 or, where the root is that of 0, not a number.
        root = jnp.sqrt(batch["root"] * jnp.exp(0 * module.llama.bias[0]))
        loss += jnp.sum(root - batch["root"]) + jnp.max(batch["more"])
        return loss, {"noise": jax.random.normal(key)}


GROUPS = (
    GroupConfig(r"visual\.bias", lr=0.0),
    GroupConfig(r"^visual", lr=0.05, delay_steps=2, warmup_steps=2, final_fraction=0.2),
    GroupConfig(r".*", lr=0.1, warmup_steps=3),
)
TOY = TrainConfig(
    name="toy", objective="emu", model=digits(), dtype="float32", steps=STEPS, accumulate=2,
    ema_decay=0.3, log_every=1, checkpoint_every=1, keep_checkpoints=99, max_bad_steps=2,
    optimizer=OptimizerConfig(groups=GROUPS, b1=0.8, b2=0.9, weight_decay=0.3, clip_norm=CLIP),
    data=dataclasses.replace(TrainConfig().data, batch_size=ROWS),
)  # fmt: skip


def reference(start: dict[str, np.ndarray]):
    """(state after each step, the rows of its log) of that run, by hand in float64."""
    params = {path: np.float64(value) for path, value in start.items()}
    trained = [path for path in params if path != "visual.bias"]
    mu, nu = ({path: np.zeros_like(params[path]) for path in trained} for _ in range(2))
    ema, good, states, rows = {path: params[path] for path in trained}, 0, [], []
    for done in range(STEPS):
        b = ToyBatches.make(done)
        hidden = b["x"] @ params["visual.kernel"] + params["visual.bias"]
        error = hidden @ params["llama.kernel"] + params["llama.bias"] - b["y"]
        error *= b["mask"][:, None] / b["mask"].sum() / 3
        loss = np.sum(3 * error**2) * b["mask"].sum()
        back = 2 * error
        grads = {
            "llama.kernel": hidden.T @ back, "llama.bias": back.sum(0),
            "visual.kernel": b["x"].T @ back @ params["llama.kernel"].T,
        }  # fmt: skip
        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        rows.append({"loss": loss, "grad_norm": norm})
        if done + 1 not in (NO_GRADIENT, NO_LOSS):
            rates = {
                "visual.kernel": 0.05 * visual_rate(good), "llama.bias": 0.1 * llama_rate(good),
                "llama.kernel": 0.1 * llama_rate(good),
            }  # fmt: skip
            good += 1
            for path, grad in grads.items():
                grad = grad * min(1, CLIP / norm)
                mu[path] = 0.8 * mu[path] + 0.2 * grad
                nu[path] = 0.9 * nu[path] + 0.1 * grad**2
                update = mu[path] / (1 - 0.8**good)
                update /= np.sqrt(nu[path] / (1 - 0.9**good)) + 1e-6
                if path.endswith("kernel"):
                    update += 0.3 * params[path]
                params = params | {path: params[path] - rates[path] * update}
            decay = min(0.3, (1 + done) / (10 + done))
            ema = {path: decay * ema[path] + (1 - decay) * params[path] for path in trained}
        states.append((params, ema, dict(mu), dict(nu), good))
    return states, rows


def visual_rate(step: int) -> float:
    """Two steps at rest, two of warm-up, a cosine from 1 to 0.2 over the other five."""
    return (0, 0, 0, 0.5, 1, 1, 1, 1, 1)[step] * (
        1 if step < 4 else 0.2 + 0.4 * (1 + np.cos(np.pi * (step - 4) / 5))
    )


def llama_rate(step: int) -> float:
    return step / 3 if step < 3 else (1 + np.cos(np.pi * (step - 3) / 6)) / 2


@pytest.fixture
def toy(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setitem(objectives.OBJECTIVES, "emu", ToyObjective())
    tokenizer = SimpleNamespace(save=lambda folder: None)
    monkeypatch.setattr(loop, "prepare_data", lambda cfg: tokenizer)


def stored(step: Path, item: str) -> dict[str, np.ndarray]:
    """{dotted path: array} of an item of a checkpoint, as it is on disk."""
    handler, place = ocp.PyTreeCheckpointHandler(), epath.Path(step / item)
    arrays = ocp.RestoreArgs(restore_type=np.ndarray)
    how = jax.tree.map(lambda _: arrays, handler.metadata(place).tree)
    tree = handler.restore(place, args=ocp.args.PyTreeRestore(restore_args=how))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {dotted(path): np.asarray(leaf) for path, leaf in leaves}


def test_a_run_is_a_page_of_numpy(toy, tmp_path):
    run, parts = tmp_path / "run", tmp_path / "parts"
    last = train(TOY, run)
    rows = read_metrics(run)["toy"]
    with jax.set_mesh(make_mesh(1, 1, 1)):
        start = jax.tree.map(np.asarray, Trainer(TOY, make_mesh(1, 1, 1)).template.init())
    states, expected = reference(start)

    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, wanted in zip(rows, expected, strict=True):
        finite = row["step"] != NO_LOSS
        assert not finite or row["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        finite = row["step"] != NO_GRADIENT
        assert not finite or row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
    assert np.isnan(rows[NO_GRADIENT - 1]["grad_norm"]) and np.isnan(rows[NO_LOSS - 1]["loss"])
    assert [row["bad_steps"] for row in rows] == [0, 0, 1, 0, 0, 1, 0, 0, 0]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert {norm > CLIP for norm in (row["grad_norm"] for row in expected)} == {False, True}
    assert last["loss"] == rows[-1]["loss"] and last["step"] == STEPS

    for number, (params, ema, mu, nu, good) in enumerate(states, start=1):
        step = run / str(number)
        optimizer = stored(step, "optimizer")
        found = {k.rsplit(".", 2)[-1]: v for k, v in optimizer.items() if v.ndim == 0}
        assert found["bad"] == rows[number - 1]["bad_steps"]
        assert found["skipped"] == rows[number - 1]["skipped_steps"]
        assert found["count"] == good
        for item, wanted in (("params", params), ("ema", ema)):
            values = stored(step, item)
            assert values.keys() == wanted.keys()
            for path, value in values.items():
                np.testing.assert_allclose(value, wanted[path], atol=2e-6, err_msg=f"{step} {path}")
        for name, wanted in (("mu", mu), ("nu", nu)):
            for path, value in wanted.items():
                (moment,) = (v for k, v in optimizer.items() if k.endswith(f"{name}.{path}"))
                np.testing.assert_allclose(moment, value, atol=2e-6, err_msg=f"{name} {path}")
    np.testing.assert_array_equal(stored(run / "9", "params")["visual.bias"], start["visual.bias"])

    # No two steps draw the same.
    assert len({row["noise"] for row in rows}) == STEPS
    # Resumed after its fourth step, the run ends as it did: data, noise, moments, averages.
    shutil.copytree(run, parts)
    for number in range(5, STEPS + 1):
        shutil.rmtree(parts / str(number))
    train(TOY, parts)
    again = read_metrics(parts)["toy"]
    for name in ("step", "loss", "grad_norm", "noise", "bad_steps", "skipped_steps"):
        np.testing.assert_array_equal([r[name] for r in again], [r[name] for r in rows])
    for item in ("params", "ema", "optimizer"):
        for path, value in stored(run / "9", item).items():
            np.testing.assert_array_equal(stored(parts / "9", item)[path], value, err_msg=path)
