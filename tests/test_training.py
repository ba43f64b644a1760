"""Training steps and what a run keeps, against a few lines of numpy.

The module is two linear layers, so that a whole run with `train` takes a second and everything it
should do (accumulation, clipping, AdamW, groups, schedules, averages, skipped steps, checkpoints)
fits on a page. The losses are compared with sums by hand over modules that are a product or two;
with the real ones, they are compared in test_training_oracle.py.
"""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emu_jax import checkpoint, integrity
from emu_jax.config import LORA_TARGETS, LoraConfig, SchedulerConfig, TokenIds, digits, save_json
from emu_jax.data.pipeline import Consumed
from emu_jax.data.unused import Tally
from emu_jax.errors import UserError
from emu_jax.models.cformer import CFormer
from emu_jax.models.connectors import CausalConnector
from emu_jax.models.emu import EmuModel
from emu_jax.models.eva_clip import normalize_images
from emu_jax.models.layers import Embedding
from emu_jax.models.llama import Llama
from emu_jax.sharding import (
    MESH_AXES,
    AbstractModel,
    batch_sharding,
    dotted,
    make_mesh,
    nest,
    row_ways,
    spec,
)
from emu_jax.train import objectives, precompute
from emu_jax.train.checkpoints import Checkpoints
from emu_jax.train.config import OBJECTIVE_TRAITS, GroupConfig, OptimizerConfig, TrainConfig
from emu_jax.train.loop import train
from emu_jax.train.optimizer import make_optimizer, schedule
from emu_jax.train.step import Trainer
from emu_jax.train.telemetry import monitor
from emu_jax.train.telemetry.metrics import read_metrics
from emu_jax.train.warm_start import WarmStart

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

    tallies: ClassVar = {
        "toy": Tally({"documents": 2, "images": 1, "texts": 3}, {"missing image": 4})
    }

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

    def close(self):
        pass

    def state(self):
        return {"step": self.position}

    def restore(self, state):
        self.position = state["step"]

    def documents(self):
        return [("toy", self.position), ("toy", 100 + self.position)]

    def locate(self, source, index):
        return f"{source}.tar, record {index}"

    def damaged(self):
        return []

    def consumed(self):
        done = self.position
        return {"toy": Consumed(100 * done, done, 2 * done, done / 4), "b": Consumed(1, 2, 3, 4.0)}

    def statistics(self):
        done = self.position
        return {
            "token_fill": 0.5,
            "image_fill": 0.25,
            "tokens": 100 * done,
            "images": done,
            "damaged": {"torn": 2, "gone": 1},
        }


class ToyObjective(objectives.Objective):
    """Squared error where the mask holds. It draws, but what it draws changes no parameter."""

    row_lengths = objectives.EmuObjective.row_lengths
    held_out = held_out_metrics = None  # it is never evaluated

    def build(self, rngs):
        return Toy(rngs)

    def prepare_data(self):
        return SimpleNamespace(save=lambda folder: None)

    def batches(self, tokenizer, shares, **how):
        return ToyBatches()

    def targets(self, module, batch):
        return {"squares": jnp.sum(batch["mask"])}

    def loss(self, module, batch, key, targets=None):
        hidden = batch["x"] @ module.visual.kernel[...] + module.visual.bias[...]
        out = hidden @ module.llama.kernel[...] + module.llama.bias[...]
        errors = jnp.mean(jnp.square(out - batch["y"]), axis=-1)
        loss = objectives.masked_mean(errors, batch["mask"], (targets or {}).get("squares"))
        # Nothing, whose gradient is 0 or, where the root is that of 0, not a number.
        root = jnp.sqrt(batch["root"] * jnp.exp(0 * module.llama.bias[0]))
        loss += jnp.sum(root - batch["root"]) + jnp.max(batch["more"])
        noise = jax.random.normal(key)
        return loss, {"noise": noise, "square": jnp.square(noise)}


GROUPS = (
    GroupConfig(r"visual\.bias", lr=0.0),
    GroupConfig(r"^visual", lr=0.05, delay_steps=2, warmup_steps=2, final_fraction=0.2),
    GroupConfig(r".*", lr=0.1, warmup_steps=3),
)
TOY = TrainConfig(
    name="toy",
    objective="emu",
    model=digits(),
    dtype="float32",
    steps=STEPS,
    accumulate=2,
    ema_decay=0.3,
    log_every=1,
    tower_metrics=True,
    spike_threshold=5.0,
    checkpoint_every=1,
    keep_checkpoints=99,
    max_bad_steps=2,
    optimizer=OptimizerConfig(groups=GROUPS, b1=0.8, b2=0.9, weight_decay=0.3, clip_norm=CLIP),
    data=dataclasses.replace(TrainConfig().data, batch_size=ROWS),
)


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
            "llama.kernel": hidden.T @ back,
            "llama.bias": back.sum(0),
            "visual.kernel": b["x"].T @ back @ params["llama.kernel"].T,
        }
        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        row = {"loss": loss, "grad_norm": norm}
        for tower in ("visual", "llama"):
            row[f"grad_norm/{tower}"] = norm_of(grads, tower)
            row[f"update_ratio/{tower}"] = row[f"lr/{tower}"] = 0.0
        rows.append(row)
        before = params
        if done + 1 not in (NO_GRADIENT, NO_LOSS):
            rates = {
                "visual.kernel": 0.05 * visual_rate(good),
                "llama.bias": 0.1 * llama_rate(good),
                "llama.kernel": 0.1 * llama_rate(good),
            }
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
            moved = {path: params[path] - before[path] for path in trained}
            for tower in ("visual", "llama"):
                weights = norm_of({path: params[path] for path in trained}, tower)
                row[f"update_ratio/{tower}"] = norm_of(moved, tower) / weights
                row[f"lr/{tower}"] = rates[f"{tower}.kernel"]
            decay = min(0.3, (1 + done) / (10 + done))
            ema = {path: decay * ema[path] + (1 - decay) * params[path] for path in trained}
        states.append((params, ema, dict(mu), dict(nu), good))
    return states, rows


def norm_of(arrays: dict[str, np.ndarray], tower: str) -> float:
    return np.sqrt(sum(np.sum(a**2) for path, a in arrays.items() if path.startswith(tower)))


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
    monkeypatch.setitem(objectives.OBJECTIVES, "emu", ToyObjective)


def stored(step: Path, item: str) -> dict[str, np.ndarray]:
    """{dotted path: array} of an item of a checkpoint, as it is on disk."""
    handler, place = ocp.PyTreeCheckpointHandler(), epath.Path(step / item)
    arrays = ocp.RestoreArgs(restore_type=np.ndarray)
    how = jax.tree.map(lambda _: arrays, handler.metadata(place).tree)
    tree = handler.restore(place, args=ocp.args.PyTreeRestore(restore_args=how))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {dotted(path): np.asarray(leaf) for path, leaf in leaves}


def test_a_run_is_a_page_of_numpy(toy, tmp_path, capsys):
    run, parts = tmp_path / "run", tmp_path / "parts"
    last = train(TOY, run)
    said = capsys.readouterr().err.splitlines()
    assert said.count("source toy: 2 documents, 3 texts, 1 images; unused: 4 missing image") == 1
    rows = read_metrics(run)["toy"]
    with jax.set_mesh(make_mesh(1, 1, 1)):
        start = jax.tree.map(np.asarray, Trainer(TOY, make_mesh(1, 1, 1)).template.init())
    states, expected = reference(start)

    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, wanted in zip(rows, expected, strict=True):
        finite = row["step"] != NO_LOSS
        assert not finite or row["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        finite = row["step"] != NO_GRADIENT
        for name in wanted.keys() - {"loss"} if finite else ():
            assert row[name] == pytest.approx(wanted[name], rel=2e-5, abs=1e-9), name
        assert row["lr/llama"] == pytest.approx(wanted["lr/llama"], rel=1e-6)
    assert np.isnan(rows[NO_GRADIENT - 1]["grad_norm"]) and np.isnan(rows[NO_LOSS - 1]["loss"])
    assert [row["bad_steps"] for row in rows] == [0, 0, 1, 0, 0, 1, 0, 0, 0]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert {norm > CLIP for norm in (row["grad_norm"] for row in expected)} == {False, True}
    assert last.metrics["loss"] == rows[-1]["loss"] and last.step == STEPS
    filled = {"token_fill": 0.5, "image_fill": 0.25, "damaged": 3}
    for row in rows:
        read = {"consumed_tokens": 100 * row["step"] + 1, "consumed_images": row["step"] + 2}
        by_source = {"consumed_tokens/toy": 100 * row["step"], "consumed_images/b": 2}
        epochs = {"epochs/toy": row["step"] / 4, "epochs/b": 4.0}
        assert row | filled | read | by_source | epochs == row
    # Steps that are not finite are recorded with their documents.
    spikes = [json.loads(line) for line in (run / "spikes-0.jsonl").read_text().splitlines()]
    assert [row["step"] for row in spikes] == [NO_GRADIENT, NO_LOSS]
    assert spikes[0]["documents"] == [["toy", NO_GRADIENT], ["toy", 100 + NO_GRADIENT]]
    assert spikes[0]["where"][1] == f"toy.tar, record {100 + NO_GRADIENT}"
    assert spikes[1]["loss"] is None and sum("loss spike at step 6" in line for line in said) == 1

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

    # No two steps draw the same, nor do the parts of a step, over which metrics are means.
    assert len({row["noise"] for row in rows}) == STEPS
    assert all(row["square"] > row["noise"] ** 2 + 1e-6 for row in rows)
    # Resumed after its fourth step, the run ends as it did: data, noise, moments, averages.
    shutil.copytree(run, parts)
    for number in range(5, STEPS + 1):
        shutil.rmtree(parts / str(number))
    train(dataclasses.replace(TOY, log_every=4, checkpoint_every=2, keep_checkpoints=2), parts)
    again = read_metrics(parts)["toy"]
    assert [row["step"] for row in again] == [1, 2, 3, 4, 8, 9]
    assert sorted(path.name for path in parts.iterdir() if path.name.isdigit()) == ["8", "9"]
    for row in again:
        before = rows[row["step"] - 1]
        for name in (
            "loss",
            "grad_norm",
            "noise",
            "bad_steps",
            "skipped_steps",
            "update_ratio/llama",
            "lr/visual",
        ):
            np.testing.assert_array_equal(row[name], before[name], err_msg=name)
    for item in ("params", "ema", "optimizer"):
        for path, value in stored(run / "9", item).items():
            np.testing.assert_array_equal(stored(parts / "9", item)[path], value, err_msg=path)

    # A run that starts from one of its towers takes the averages; its own first step is at rest.
    cfg = dataclasses.replace(TOY, seed=1, steps=1, parents={"llama": "../run"})
    train(cfg, tmp_path / "child")
    child, average = stored(tmp_path / "child" / "1", "params"), stored(run / "9", "ema")
    for path, value in child.items():
        inherited = path in average and path.startswith("llama.")
        assert np.array_equal(value, average.get(path)) == inherited, path


def test_traits_are_those_of_the_objectives():
    kinds = objectives.OBJECTIVES
    assert kinds.keys() == OBJECTIVE_TRAITS.keys()
    for name, traits in OBJECTIVE_TRAITS.items():
        assert bool(traits.matmul_towers) == bool(kinds[name].row_lengths), name
        assert traits.trains_unet == issubclass(kinds[name], objectives.DecoderObjective), name


def test_a_data_position_of_another_step_is_refused(toy, tmp_path):
    cfg = dataclasses.replace(TOY, steps=2, checkpoint_every=2)
    train(cfg, tmp_path)
    for position in ({"step": 1}, {"batch": 3}):
        (tmp_path / "2" / "position" / "metadata").write_text(json.dumps(position))
        integrity.seal(tmp_path / "2")
        (found,) = position.values()
        message = f"{tmp_path / '2'} holds the data position after {found} batches, not after 2"
        with pytest.raises(UserError, match=message):
            train(dataclasses.replace(cfg, steps=3), tmp_path)
    assert (tmp_path / "2").is_dir() and not (tmp_path / "3").exists()


def test_a_loss_that_stays_infinite_ends_the_run(toy, tmp_path, monkeypatch):
    made = ToyBatches.make
    infinite = {"more": np.full(ROWS, np.inf, np.float32)}
    monkeypatch.setattr(
        ToyBatches, "make", staticmethod(lambda n: made(n) | (infinite if n >= 5 else {}))
    )
    with pytest.raises(UserError, match=r"not finite for 2 steps up to step 7: .* from step 5$"):
        train(dataclasses.replace(TOY, checkpoint_every=5), tmp_path)


def test_a_process_that_cannot_read_a_save_back_asks_all_to_save(toy, tmp_path, monkeypatch):
    """All raise its error when they save."""
    monkeypatch.setattr(Checkpoints, "check", lambda self: True)
    with pytest.raises(KeyboardInterrupt):
        train(dataclasses.replace(TOY, steps=12, checkpoint_every=100), tmp_path)
    (step,) = checkpoint.complete_steps(tmp_path)
    assert 1 < step < 12


def test_frozen_parameters_cost_no_gradient(monkeypatch):
    """Two products forward; backward one for each kernel that is trained, one through the second
    layer when the first is trained."""
    monkeypatch.setitem(objectives.OBJECTIVES, "emu", ToyObjective)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])

    def products(pattern: str) -> int:
        groups = (GroupConfig(pattern, lr=0.0), GroupConfig(".*", lr=0.1))
        cfg = dataclasses.replace(TOY, accumulate=1, optimizer=OptimizerConfig(groups=groups))
        with jax.set_mesh(mesh):
            trainer = Trainer(cfg, mesh)
            state = trainer.state_shapes
            assert state.ema.keys() == state.optimizer[1].mu.keys() == state.trained.keys()
            assert len(state.trained) + len(state.frozen) == len({**state.trained, **state.frozen})
            step = jax.make_jaxpr(trainer.update)(state, ToyBatches.make(0))
        return str(step).count("dot_general[")

    assert products("^no such") == 2 + 3
    assert products("^llama") == 2 + 2
    assert products("^visual") == 2 + 1


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_rates_at_every_step(decay):
    group = GroupConfig(lr=0.4, delay_steps=3, warmup_steps=4, decay=decay, final_fraction=0.25)
    rate = schedule(group, 19)
    for step in range(23):
        expected = 0.4 * np.clip((step - 3) / 4, 0, 1)
        if step >= 7 and decay == "cosine":
            expected = 0.1 + 0.3 * (1 + np.cos(np.pi * min(step - 7, 12) / 12)) / 2
        if step >= 7 and decay == "linear":
            expected = 0.4 - 0.3 * min(step - 7, 12) / 12
        assert float(rate(step)) == pytest.approx(expected, abs=1e-7), step
    assert float(schedule(dataclasses.replace(group, delay_steps=0), 19)(0)) == 0


def test_weight_decay_spares_biases_norms_and_vectors():
    """By name or by shape, whether layers are stacked or not. And eps as in AdamW."""
    shapes = {
        "visual.cls_token": (8,),
        "visual.pos_embed": (5, 8),
        "visual.blocks.attn.q_bias": (2, 8),
        "visual.blocks.norm1.scale": (2, 8),
        "visual.blocks.norm1.bias": (2, 8),
        "visual.blocks.attn.qkv": (2, 8, 3, 8),
        "cformer.relative_attention_bias": (4, 2),
        "llama.layers.mlp.gate_proj.kernel": (2, 8, 8),
        "llama.embed_tokens.embedding": (9, 8),
        "llama.layers.self_attn.q_proj.lora_a": (2, 8, 3),
        "logit_scale": (),
        "unet.conv_in.kernel": (3, 3, 4, 8),
        "unet.conv_in.bias": (8,),
        "unet.norm.scale": (8,),
    }
    params = {path: np.ones(shape, np.float32) for path, shape in shapes.items()}
    group = GroupConfig(lr=0.5, decay="constant")
    optimizer = make_optimizer(OptimizerConfig((group,), eps=0.5, weight_decay=0.1), 9, params)
    still = jax.tree.map(np.zeros_like, params)

    @jax.jit
    def update(grads, params):
        return optimizer.update(
            grads, optimizer.init(params), params, norm=np.float32(1), finite=np.bool_(True)
        )[0]

    updates = update(still, params)
    decayed = {path for path, update in updates.items() if np.any(update)}
    assert decayed == {
        "visual.pos_embed",
        "visual.blocks.attn.qkv",
        "llama.layers.mlp.gate_proj.kernel",
        "llama.embed_tokens.embedding",
        "llama.layers.self_attn.q_proj.lora_a",
        "unet.conv_in.kernel",
    }
    for path in decayed:
        np.testing.assert_allclose(updates[path], -0.5 * 0.1, rtol=1e-6)
    # `eps` is added to the root of the second moment: 0.5 / (0.5 + 0.5).
    updates = update(jax.tree.map(lambda x: np.full_like(x, 0.5), params), params)
    for path in updates.keys() - decayed:
        np.testing.assert_allclose(updates[path], -0.5 * 0.5, rtol=1e-6)


# --- Objectives by hand --------------------------------------------------------------------------

RNG = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


@pytest.fixture
def drawn(monkeypatch):
    """The random numbers that are drawn, in order, in compiled functions too."""
    values: list[np.ndarray] = []

    def recorded(function):
        def draw(*args, **kwargs):
            value = function(*args, **kwargs)
            jax.debug.callback(lambda x: values.append(np.array(x)), value, ordered=True)
            return value

        return draw

    for name in ("normal", "randint", "bernoulli"):
        monkeypatch.setattr(jax.random, name, recorded(getattr(jax.random, name)))
    return values


def close(ours, theirs) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)


def a_row():
    """Two documents with an image each, of which the second is not scored, and padding; (batch,
    positions whose next token is scored, positions that regress what follows)."""
    t = digits().tokens
    tokens = [t.bos, 7, t.img, *[t.image] * 4, t.img_end, 8, t.eos]
    tokens += [t.bos, t.img, *[t.image] * 4, t.img_end, 9, 0, 0]
    embedding_index = [-1] * 3 + [0, 1, 2, 3] + [-1] * 5 + [4, 5, 6, 7] + [-1] * 4
    scored = [0, 1, 1, 0, 0, 0, 0, 0, 1, 1] + [1, 0, 0, 0, 0, 0, 0, 1, 0, 0]
    batch = {
        "tokens": tokens,
        "embedding_index": embedding_index,
        "segment_ids": [1] * 10 + [2] * 8 + [0] * 2,
        "positions": [*range(10), *range(8), 0, 0],
    }
    batch = {name: np.int32([values]) for name, values in batch.items()}
    batch |= {
        "text_loss_mask": np.bool_([scored]),
        "image_scored": np.bool_([[True, False]]),
        "image_valid": np.bool_([[True, True]]),
        "images": np.zeros((1, 2, 32, 32, 3), np.uint8),
    }
    return batch, [0, 1, 7, 8, 16], [2, 3, 4, 5, 6]


def language(table, weights, heads):
    """A module whose language model is a product. It keeps the keys that it is given."""
    keys = {}

    def llama(x, positions, segments, *, dropout_key):
        keys["llama"] = dropout_key
        return x @ weights

    def embed(tokens, images, embedding_index):
        x, flat = table[tokens], images.reshape(len(tokens), -1, images.shape[-1])
        return jnp.where(
            embedding_index[..., None] < 0, x, flat[:, np.maximum(embedding_index[0], 0)]
        )

    def token_losses(hidden, targets, *, block):
        logits = jax.nn.log_softmax(hidden @ heads[0])
        return -jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]

    def encode_images(pixels, *, frames, dropout_key):
        keys["visual"] = dropout_key
        return jnp.reshape(table[:8], (1, 2, 4, -1)) + jnp.mean(pixels)

    llama.token_losses, llama.regress = token_losses, lambda hidden: hidden @ heads[1]
    llama.embed_tokens = lambda tokens: table[tokens]
    module = SimpleNamespace(
        llama=llama, embed=embed, encode_images=encode_images, cfg=digits(), keys=keys
    )
    module.connector = CausalConnector
    for method in (EmuModel.regress, EmuModel.regression_mask, EmuModel.regression_targets):
        setattr(module, method.__name__, partial(method, module))
    return module


def test_the_multimodal_loss_by_hand():
    batch, words, image_targets = a_row()
    table, weights, heads = normal(350, 6), normal(6, 6), (normal(6, 350), normal(6, 6))
    module = language(table, weights, heads)
    images = normal(1, 2, 4, 6)
    x = table[batch["tokens"][0]]
    x[3:7], x[12:16] = images[0]
    hidden = np.float64(x) @ weights
    text = []
    for t in words:
        logits = hidden[t] @ heads[0]
        text.append(np.log(np.sum(np.exp(logits))) - logits[batch["tokens"][0, t + 1]])
    squares = [np.mean((hidden[t] @ heads[1] - x[t + 1]) ** 2) for t in image_targets]

    @jax.jit
    def losses(images, **kwargs):
        return objectives.sequence_losses(module, images, batch, loss_block=0, **kwargs)

    close(losses(images), (np.mean(text), np.mean(squares)))
    # A part of a batch divides by what a part has on average.
    close(
        losses(images, targets={"text": 10.0, "regression": 4.0}),
        (np.sum(text) / 10, np.sum(squares) / 4),
    )
    counts = objectives.EmuObjective(TOY).targets(module, batch)
    assert {name: int(n) for name, n in counts.items()} == {"text": 5, "regression": 5}
    # The objective of words alone; the images are in them, but are not scored.
    words_alone = objectives.TextObjective(TOY)
    assert words_alone.targets(module, batch) == {"text": 5}
    logits = np.float64(table[batch["tokens"][0]]) @ weights @ heads[0]
    losses_of = [
        np.log(np.sum(np.exp(logits[t]))) - logits[t, batch["tokens"][0, t + 1]] for t in words
    ]
    for targets, expected in ((None, np.mean(losses_of)), ({"text": 10.0}, np.sum(losses_of) / 10)):
        close(words_alone.loss(module, batch, jax.random.key(3), targets)[0], expected)

    # The gradient by hand: nothing comes through the targets.
    def regression(images):
        return losses(images)[1]

    gradient = np.zeros_like(x)
    for t in image_targets:
        error = 2 * (hidden[t] @ heads[1] - x[t + 1]) / 6 / len(image_targets)
        gradient[t] += weights @ heads[1] @ error
    close(jax.jit(jax.grad(regression))(images), [[gradient[3:7], gradient[12:16]]])

    # Weights, and keys for dropout in both towers.
    cfg = dataclasses.replace(TOY, text_weight=0.25, regression_weight=3.0)
    loss, metrics = objectives.EmuObjective(cfg).loss(module, batch, jax.random.key(3))
    close(loss, 0.25 * metrics["text_loss"] + 3 * metrics["regression_loss"])
    assert abs(metrics["text_loss"] - metrics["regression_loss"]) > 0.1
    assert module.keys["visual"] is not None and module.keys["llama"] is not None


def test_a_row_without_targets_has_no_loss():
    batch, _, _ = a_row()
    batch["text_loss_mask"][:], batch["image_scored"][:] = False, False
    module = language(normal(350, 6), normal(6, 6), (normal(6, 350), normal(6, 6)))
    found = objectives.sequence_losses(module, normal(1, 2, 4, 6), batch, loss_block=0)
    assert tuple(map(float, found)) == (0, 0)
    # Nothing follows the last position, though the row be full.
    full = {"segment_ids": np.ones((2, 3)), "text_loss_mask": np.ones((2, 3), bool)}
    np.testing.assert_array_equal(objectives.text_mask(full), [[True, True, False]] * 2)


def test_the_contrastive_loss_by_hand():
    tokens = np.int32([[1, 5, 2], [1, 6, 2], [1, 5, 2], [1, 7, 2]])
    image, text = normal(4, 6), normal(4, 6)
    module = SimpleNamespace(
        visual=SimpleNamespace(clip_embedding=lambda pixels: image),
        text=lambda tokens, valid, dtype: text,
    )
    batch = {"images": np.zeros((4, 32, 32, 3), np.uint8), "tokens": tokens, "valid": tokens > 0}
    cfg = dataclasses.replace(TOY, dtype="float32", accumulate=1)
    for scale in (3.0, 400.0):
        module.logit_scale = np.array(np.log(scale), np.float32)
        loss, metrics = objectives.ClipObjective(cfg).loss(module, batch, jax.random.key(0))
        scale = min(scale, 100.0)
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
        logits = scale * np.float64(a) @ b.T
        share = np.array([[1, 0, 1, 0], [0, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 2]]) / 2
        total = 0.0
        for way in (logits, logits.T):
            total -= np.sum(share * (way - np.log(np.sum(np.exp(way), 1, keepdims=True)))) / 4
        close(loss, total / 2)
        close(metrics["retrieval"], np.mean(share[range(4), logits.argmax(1)] > 0))
        close(metrics["temperature"], 1 / scale)


def test_the_autoencoders_loss_by_hand(drawn):
    images = RNG.integers(0, 256, (3, 4, 4, 3)).astype(np.uint8)
    weights = normal(3, 2), normal(3, 2), normal(2, 3)
    vae = SimpleNamespace(
        encode=lambda x: (x @ weights[0], x @ weights[1]), decode=lambda z: z @ weights[2]
    )
    vae_objective = objectives.VaeObjective(dataclasses.replace(TOY, kl_weight=0.3))
    batch = {"images": images}
    loss, metrics = vae_objective.loss(SimpleNamespace(vae=vae), batch, jax.random.key(0))
    x = images / 127.5 - 1
    mean, logvar = x @ weights[0], x @ weights[1]
    (noise,) = drawn
    latents = mean + np.exp(logvar / 2) * noise
    error = np.mean((latents @ weights[2] - x) ** 2)
    kl = np.mean(mean**2 + np.exp(logvar) - logvar - 1) / 2
    close(loss, error + 0.3 * kl)
    expected = {
        "squared_error": error,
        "kl": kl,
        "latent_std": np.std(latents),
        "psnr": 20 * np.log10(2 / np.sqrt(error)),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        close(metrics[name], value)
    # Saved with the factor that gives latents of unit variance.
    model = vae_objective.trained_model({"latent_std": 4.0})
    assert model.vae.scaling_factor == 0.25


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_decoders_loss_by_hand(prediction, drawn):
    model = digits()
    scheduler = dataclasses.replace(SchedulerConfig(), prediction_type=prediction)
    vae = dataclasses.replace(model.vae, scaling_factor=0.2)
    model = dataclasses.replace(model, vae=vae, scheduler=scheduler)
    cfg = dataclasses.replace(TOY, model=model)
    decoder = objectives.DecoderObjective(cfg)

    # Conditions and latents of the frozen model teach it nothing.
    target = RNG.integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)
    weights = normal(3, 2)
    batch = {
        "images": np.full((5, 1, 4, 4, 3), 200, np.uint8),
        "tokens": np.int32([[1, 2]] * 5),
        "length": np.int32([2, 1, 2, 1, 2]),
        "embedding_index": np.full((5, 2), -1),
        "target": target,
    }

    def frozen(weights):
        module = SimpleNamespace(
            encode_images=lambda pixels, frames: pixels * jnp.sum(weights),
            regress_after=lambda tokens, length, images, embedding_index: (
                images.reshape(5, 1, -1) + tokens[:, None, :1] + length[:, None, None]
            ),
            vae=SimpleNamespace(encode=lambda x: (x @ weights, x)),
        )
        return decoder.conditions_and_latents(module, batch)

    condition, latents = frozen(weights)
    close(latents, (target / 127.5 - 1) @ weights * 0.2)
    pixels = np.asarray(normalize_images(batch["images"]), np.float64) * np.sum(weights)
    close(condition, pixels.reshape(5, 1, -1) + 1 + batch["length"][:, None, None])
    through = jax.grad(lambda w: sum(jnp.sum(x) for x in frozen(w)))(weights)
    assert not np.any(through)

    seen = {}

    def unet(noisy, times, condition, sizes):
        assert sizes is None
        seen.update(noisy=noisy, times=times, condition=condition)
        return noisy * 0.5

    latents, condition = normal(5, 4, 4, 2), normal(5, 4, 6)
    loss, metrics = objectives.LatentDecoderObjective(cfg).loss(
        SimpleNamespace(unet=unet),
        {"condition": condition, "latents": latents},
        jax.random.key(1),
    )
    times, noise = drawn
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)[np.asarray(times)][:, None, None, None]
    noisy = kept**0.5 * latents + (1 - kept) ** 0.5 * noise
    close(seen["noisy"], noisy)
    np.testing.assert_array_equal(seen["times"], times)
    np.testing.assert_array_equal(seen["condition"], condition)
    wanted = noise
    if prediction == "v_prediction":
        wanted = kept**0.5 * noise - (1 - kept) ** 0.5 * latents
    close(loss, np.mean((0.5 * noisy - wanted) ** 2))
    close(metrics["condition_std"], np.std(condition))


def test_the_painters_loss_by_hand(drawn):
    """Conditions are the encoder's, of nothing where the image is dropped; noise has an offset."""
    model = digits()
    unet = dataclasses.replace(
        model.unet,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=128 + 48,
    )
    model = dataclasses.replace(model, unet=unet)
    cfg = dataclasses.replace(TOY, objective="painter", model=model, noise_offset=0.3)
    painter = objectives.get_objective(cfg)
    assert painter.batch_kind == "views"
    seen = {}

    def unet(noisy, times, condition, sizes):
        seen.update(noisy=noisy, condition=condition, sizes=sizes)
        return noisy * 0.5

    weights = normal(3, 2)
    module = SimpleNamespace(
        encode_images=lambda pixels: 1 + pixels.reshape(len(pixels), 4, -1),
        vae=SimpleNamespace(encode=lambda x: (x @ weights, x)),
        unet=unet,
    )
    batch = {
        "images": RNG.integers(0, 256, (5, 4, 4, 3)).astype(np.uint8),
        "target": RNG.integers(0, 256, (5, 4, 4, 3)).astype(np.uint8),
        "sizes": np.arange(30).reshape(5, 6),
        "dropped": np.array([False, True, False, False, True]),
    }
    loss, _ = painter.loss(module, batch, jax.random.key(1))
    times, offset, noise = drawn
    assert offset.shape == (5, 1, 1, 2)
    noise = noise + 0.3 * offset
    pixels = np.asarray(normalize_images(batch["images"]), np.float64)
    pixels[batch["dropped"]] = 0
    close(seen["condition"], 1 + pixels.reshape(5, 4, -1))
    np.testing.assert_array_equal(seen["sizes"], batch["sizes"])
    latents = (batch["target"] / 127.5 - 1) @ weights
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)[np.asarray(times)][:, None, None, None]
    noisy = kept**0.5 * latents + (1 - kept) ** 0.5 * noise
    close(seen["noisy"], noisy)
    close(loss, np.mean((0.5 * noisy - noise) ** 2))
    close(painter.unconditional(module), np.ones((4, 768)))
    # Of squashed images the sizes are the decoder's own.
    decoder = objectives.DecoderObjective(dataclasses.replace(cfg, objective="decoder"))
    assert decoder.sizes({"target": batch["target"]}).tolist() == [[32, 32, 0, 0, 32, 32]] * 5


def test_every_dropout_draws_for_itself(drawn):
    """Each adapter of each layer, each place in the Causal Transformer; with the rate of each."""
    llama = dataclasses.replace(
        digits().llama,
        vocab_size=8,
        vocab_multiple=1,
        width=8,
        layers=2,
        heads=2,
        mlp_width=8,
        lora=LoraConfig(rank=2, dropout=0.25, targets=tuple(LORA_TARGETS)),
    )
    cformer = dataclasses.replace(
        digits().cformer, width=8, heads=2, head_width=4, mlp_width=8, dropout=0.5
    )
    key, x = jax.random.key(0), normal(16, 32, 8)
    built = (
        lambda: Llama(llama, rngs=nnx.Rngs(0)),
        lambda: CFormer(cformer, 8, 8, rngs=nnx.Rngs(0)),
    )
    positions = np.zeros(x.shape[:2], np.int32)
    more = (positions,), ()
    for build, inputs, masks, keep in zip(built, more, (14, 14), (0.75, 0.5), strict=True):
        template = AbstractModel(build, make_mesh(1, 1, 1, devices=jax.devices()[:1]))
        zeros = {path: jnp.zeros(a.shape) for path, a in template.shapes.items()}
        drawn.clear()
        for given in (None, key):
            assert not drawn
            run = jax.jit(partial(template.module(zeros), x, *inputs))
            jax.block_until_ready(run(dropout_key=given))
            jax.effects_barrier()
        assert len(drawn) == masks
        assert len({mask.tobytes() for mask in drawn}) == masks
        assert all(0.8 * keep < np.mean(mask) < 1.2 * keep for mask in drawn)


def test_spread_is_of_valid_images_and_of_the_first():
    images, valid = normal(6, 20, 2, 3), RNG.random((6, 20)) < 0.7
    assert 64 < valid.sum() < 110
    for most in (64, 110):  # fewer than are valid, and more
        variance, rank = jax.jit(partial(objectives.spread, max_images=most))(images, valid)
        x = np.float64(images[valid].reshape(-1, 6)[:most])
        share = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
        share /= share.sum()
        close(variance, np.mean(np.var(x, axis=0)))
        close(rank, np.exp(-np.sum(share * np.log(share))))


# --- What a run starts from ----------------------------------------------------------------------


def write_run(folder: Path, model, **items: dict[str, np.ndarray]) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        for name, params in items.items():
            checkpointer.save((folder / "3" / name).absolute(), nest(params))
    (folder / "2" / "params").mkdir(parents=True)  # an older step
    save_json(model, folder / "config.json")
    return folder


def test_a_warm_start_takes_averages_and_fills_new_tokens_with_the_mean(tmp_path):
    model = digits()
    vae = dataclasses.replace(model.vae, scaling_factor=0.125)
    theirs = dataclasses.replace(
        model,
        vae=vae,
        llama=dataclasses.replace(model.llama, vocab_size=10, vocab_multiple=8),
        tokens=TokenIds.after(6),
    )
    params = {
        "llama.embed_tokens.embedding": normal(16, 4),
        "llama.lm_head.kernel": normal(4, 16),
        "llama.norm.scale": normal(4),
        "visual.head.kernel": normal(4, 4),
    }
    averages = {path: value + 1 for path, value in params.items() if path != "llama.norm.scale"}
    run = write_run(tmp_path / "run", theirs, params=params, ema=averages)
    ours = dataclasses.replace(
        theirs, llama=dataclasses.replace(theirs.llama, vocab_size=12, lora=LoraConfig(rank=2))
    )
    cfg = dataclasses.replace(TOY, model=ours, parents={"llama": str(run), "visual": str(run)})
    everywhere = make_mesh(8, 1, 1)
    wanted = {path: value.shape for path, value in params.items()}
    wanted |= {"llama.layers.self_attn.q_proj.lora_a": (2, 4, 2), "cformer.wi.kernel": (4, 4)}
    wanted = {
        path: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(everywhere, PartitionSpec())
        )
        for path, shape in wanted.items()
    }
    found = WarmStart(cfg, tmp_path).load(wanted)
    assert found.keys() == params.keys()
    np.testing.assert_array_equal(found["llama.norm.scale"], params["llama.norm.scale"])
    np.testing.assert_array_equal(found["visual.head.kernel"], averages["visual.head.kernel"])
    table = averages["llama.embed_tokens.embedding"]
    mean = np.mean(table[:10], axis=0)
    close(found["llama.embed_tokens.embedding"], [*table[:10], *[mean] * 6])
    head = averages["llama.lm_head.kernel"]
    mean = np.mean(head[:, :10], axis=1, keepdims=True)
    close(found["llama.lm_head.kernel"], np.concatenate([head[:, :10], *[mean] * 6], axis=1))
    # Not where the raw ones are asked for; nor is another tower's run read.
    raw = checkpoint.read_params(
        run, {"visual.head.kernel": wanted["visual.head.kernel"]}, averaged=False
    )
    np.testing.assert_array_equal(raw["visual.head.kernel"], params["visual.head.kernel"])
    one = dataclasses.replace(cfg, parents={"visual": str(run)})
    assert WarmStart(one, tmp_path).load(wanted).keys() == {"visual.head.kernel"}

    # Padding rows are this run's: 2 for a multiple of 4, none for 5, the parent's 6 for 1.
    path = "llama.embed_tokens.embedding"
    for multiple, rows in ((4, 12), (5, 10), (1, 16)):
        llama = dataclasses.replace(theirs.llama, vocab_multiple=multiple)
        other = dataclasses.replace(cfg, model=dataclasses.replace(theirs, llama=llama))
        other = dataclasses.replace(other, parents={}, init_from=str(run))
        start = WarmStart.resolve(other, tmp_path)
        assert start.cfg.model.llama.padded_vocab == rows
        shape = jax.ShapeDtypeStruct((rows, 4), jnp.float32, sharding=wanted[path].sharding)
        padded = start.load({path: shape})[path]
        padding = table[10:] if multiple == 1 else [np.mean(table[:10], axis=0)] * (rows - 10)
        close(padded, [*table[:10], *padding])

    # What a parent measured, and the factor of its autoencoder, is the run's.
    resolved = WarmStart.resolve(
        dataclasses.replace(TOY, model=model, parents={"vae": str(run)}), tmp_path
    )
    assert resolved.cfg.model.vae.scaling_factor == 0.125


def test_what_a_parent_carries_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    parent, workdir, synced, rename = tmp_path / "parent", tmp_path / "run", [], Path.rename
    (parent / "release" / "files").mkdir(parents=True)
    (parent / "release" / "files" / "Emu.json").write_text("{}")
    (parent / "generation.json").write_text('{"num_beams": 2}')
    workdir.mkdir()

    def checked(self, target):
        assert ("Emu.json" if self.name == ".release.tmp" else ".generation.json.tmp") in synced
        return rename(self, target)

    monkeypatch.setattr("emu_jax.storage.sync", lambda path: synced.append(Path(path).name))
    monkeypatch.setattr(Path, "rename", checked)
    cfg = dataclasses.replace(TOY, init_from=str(parent), parents={"llama": "../parent"})
    for _ in range(2):
        WarmStart(cfg, workdir).copy_release_files()
        assert (workdir / "release" / "files" / "Emu.json").read_text() == "{}"
        assert (workdir / "generation.json").read_text() == '{"num_beams": 2}'
        assert len(list(workdir.iterdir())) == 2


def test_this_process_s_rows_come_in_order():
    mesh = Mesh(np.reshape(jax.devices()[::-1], (2, 2, 2)), MESH_AXES)
    rows = normal(8, 3)
    placed = jax.device_put(rows, batch_sharding(mesh))
    np.testing.assert_array_equal(precompute._local(placed), rows)


def test_rates_are_since_the_row_before(monkeypatch):
    monkeypatch.setattr(monitor, "peak_flops", lambda kind, dtype: 50.0)
    monkeypatch.setattr(monitor, "train_flops", lambda cfg: SimpleNamespace(total=800.0))
    rates = monitor._Rates(TOY, make_mesh(8, 1, 1))
    fill = {"tokens": 1000, "images": 10}
    assert rates(1, 10.0, fill) == {}
    assert rates(5, 18.0, {"tokens": 1400, "images": 14}) == {
        "tokens_per_second": 50.0,
        "images_per_second": 0.5,
        "model_flops_per_second_per_device": 50.0,
        "mfu": 1.0,
    }
    assert rates(6, 20.0, {"tokens": 1402, "images": 14})["tokens_per_second"] == 1.0


def test_axes_are_split_as_the_table_says():
    mesh = make_mesh(2, 2, 2)
    for axes, shape, expected in (
        (("batch", None), (8, 3), (("data", "fsdp"), None)),
        (("batch", "heads"), (6, 4), (None, "tensor")),  # 6 rows are not for 4 devices
        (("embed", "mlp"), (4, 6), ("fsdp", "tensor")),
        (("vocab", "embed"), (4, 6), ("tensor", "fsdp")),
        (("embed", "heads"), (3, 4), (None, "tensor")),
        (("layer", "embed", None), (2, 4, 4), (None, "fsdp", None)),
        ((None, "conv_in", "conv_out"), (4, 4, 4), (None, "fsdp", "tensor")),
        (("embed", "conv_in"), (4, 4), ("fsdp", None)),  # an axis of the mesh serves once
        (("batch", None, "embed"), (4, 4, 4), (("data", "fsdp"), None, None)),
    ):
        assert spec(axes, shape, mesh) == PartitionSpec(*expected), axes
    assert batch_sharding(mesh).spec == PartitionSpec(("data", "fsdp"))
    assert spec(("image", "sequence", "attention_heads"), (8, 8, 8), mesh) == PartitionSpec(
        ("data", "fsdp"), None, "tensor"
    )
    long = make_mesh(1, 2, 2, 2)
    assert long.axis_names == ("data", "fsdp", "context", "tensor") and row_ways(long) == 2
    for axes, shape, expected in (
        (("batch", "sequence", None), (2, 6, 4), (("data", "fsdp"), "context", None)),
        (("batch", "sequence", None), (2, 7, 4), (("data", "fsdp"), None, None)),
        (
            ("batch", None, "attention_heads"),
            (2, 7, 4),
            (("data", "fsdp"), None, ("tensor", "context")),
        ),
        (("image", None, "heads"), (4, 7, 4), (("data", "fsdp", "context"), None, "tensor")),
        (("image", None, "heads"), (6, 7, 4), (("data", "fsdp"), None, "tensor")),
        (("image", None, "attention_heads"), (3, 7, 6), (None, None, "tensor")),
    ):
        assert spec(axes, shape, long) == PartitionSpec(*expected), axes
    with pytest.raises(ValueError, match="unknown logical axis 'heds'; did you mean 'heads'"):
        spec(("embed", "heds"), (4, 4), mesh)


def test_a_parameter_that_does_not_divide_is_logged_once(caplog):
    """33 rows over two devices: half of the columns of all of them on each, 33 x 2 x 4 bytes."""
    caplog.set_level("INFO", "emu_jax.sharding")
    mesh = make_mesh(2, 2, 2)
    for _ in range(2):
        AbstractModel(lambda: Embedding(33, 4, rngs=nnx.Rngs(0)), mesh)
        AbstractModel(lambda: Embedding(34, 4, rngs=nnx.Rngs(0)), mesh)
    assert [r.message for r in caplog.records if "replicated" in r.message] == [
        f"embedding: tensor=2 does not divide vocab of 33: replicated ({264 / 2**30:.3g} GiB per "
        "device)"
    ]
