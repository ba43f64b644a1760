"""Held-out evaluations: their numbers by hand, on any mesh; when they run, and what is kept."""

import dataclasses
import os
import shutil
import signal
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import data_root, one_device, parameters, small  # noqa: F401  (fixtures)
from test_training import TOY, toy  # noqa: F401  (fixture)

from emu_jax import checkpoint
from emu_jax.config import LoraConfig
from emu_jax.data.batches import RowBuilder
from emu_jax.data.mixture import open_groups
from emu_jax.data.pipeline import Batches, DataConfig
from emu_jax.data.sources import SourceConfig
from emu_jax.errors import UserError
from emu_jax.models.eva_clip import normalize_images
from emu_jax.sharding import make_mesh
from emu_jax.tokenizer import Tokenizer
from emu_jax.train.config import EvalConfig, TrainConfig, digits_data
from emu_jax.train.evaluation import EvalResult, Evaluation, held_out_table
from emu_jax.train.held_out import LossEvaluation
from emu_jax.train.loop import train
from emu_jax.train.objectives import hidden_states, target_masks
from emu_jax.train.step import Trainer
from emu_jax.train.telemetry.metrics import read_evaluations, read_metrics

EVAL = EvalConfig(every=2, batches=2, batch_size=6)  # 6 rows are no multiple of 4 or 8 devices


def never() -> bool:
    return False


def digits_run(objective: str, root: str, **changes) -> TrainConfig:
    """A small stage on the digits, whose held-out split is evaluated."""
    cfg = small(objective, root, eval=(EVAL,), **changes)
    vision = dataclasses.replace(cfg.model.vision, layers=1)
    llama = dataclasses.replace(cfg.model.llama, layers=1)
    return dataclasses.replace(
        cfg, model=dataclasses.replace(cfg.model, vision=vision, llama=llama)
    )


def with_dropout(cfg: TrainConfig, rate: float) -> TrainConfig:
    model, lora = cfg.model, LoraConfig(rank=2, dropout=rate)
    cformer = dataclasses.replace(model.cformer, dropout=rate)
    llama = dataclasses.replace(model.llama, lora=lora)
    return dataclasses.replace(cfg, model=dataclasses.replace(model, cformer=cformer, llama=llama))


def evaluate(cfg: TrainConfig, mesh, tmp_path: Path, params=None):
    """(metrics of two runs of the evaluation, the parameters)."""
    tokenizer = Tokenizer.load(Path(cfg.data.root) / "tokenizer")
    with jax.set_mesh(mesh):
        trainer = Trainer(cfg, mesh)
        shardings = trainer.template.shardings
        params = trainer.template.init() if params is None else jax.device_put(params, shardings)
        state = trainer.init(params)
        params = jax.tree.map(np.asarray, params)
        evaluation = LossEvaluation(cfg, cfg.eval[0], trainer, tokenizer, tmp_path)
        runs = [evaluation.run(state, step, never) for step in (1, 2)]
        evaluation.close()
    assert all(run is not None for run in runs)
    return [run.metrics for run in runs if run], params


def assert_close(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-9), name


ALL = {
    "emu": {
        "loss",
        "text_loss",
        "perplexity",
        "bits_per_byte",
        "text_targets",
        "regression_loss",
        "cosine_similarity",
        "explained_variance",
        "regression_targets",
    },
    "text": {"loss", "text_loss", "perplexity", "bits_per_byte", "text_targets"},
    "clip": {"loss", "retrieval", "rows"},
    "vae": {"loss", "squared_error", "psnr", "kl", "rows"},
    "decoder": {"loss", "rows"},
}
KINDS = ("pairs", "pages", "storyboards")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ALL)
def test_held_out_losses_are_the_same_on_every_mesh(objective, data_root, tmp_path):  # noqa: F811
    """Losses of every source and over all; padding rows, seeds and repetition change nothing."""
    cfg = digits_run(objective, data_root, ema_decay=0.5)
    pairs_alone = objective not in ("emu", "text")
    if pairs_alone:
        data = dataclasses.replace(cfg.data, mixture={"pairs": 1.0})
        cfg = dataclasses.replace(cfg, data=data)
    one = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    (first, again), params = evaluate(cfg, one, tmp_path)
    assert first == again
    sources = ["", *(f"{kind}/" for kind in (KINDS[:1] if pairs_alone else KINDS))]
    names = {f"{source}{metric}" for source in sources for metric in ALL[objective]}
    assert first.keys() == names | {f"ema/{name}" for name in names}
    assert first["ema/loss"] == pytest.approx(first["loss"], rel=1e-6)  # before any step
    if "rows" in ALL[objective]:
        assert first["rows"] == EVAL.batches * EVAL.batch_size * (len(sources) - 1)
    data = dataclasses.replace(cfg.data, seed=5, augment=True, prefetch=1)
    other = dataclasses.replace(cfg, seed=5, data=data, ema_decay=0.0)
    found, _ = evaluate(other, make_mesh(2, 2, 2), tmp_path, params)
    assert_close(found[0], {name: value for name, value in first.items() if "ema/" not in name})


def test_held_out_losses_by_hand(data_root, tmp_path):  # noqa: F811
    """Without dropout, from the states of the language model and the text of the documents."""
    cfg = digits_run("emu", data_root, regression_weight=3.0)
    data = dataclasses.replace(cfg.data, mixture={"storyboards": 1.0})
    cfg = with_dropout(dataclasses.replace(cfg, data=data), 0.5)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    tokenizer = Tokenizer.load(Path(data_root) / "tokenizer")
    held_out = dataclasses.replace(data, split="heldout", batch_size=6, augment=False)
    with jax.set_mesh(mesh):
        plain = Trainer(with_dropout(cfg, 0.0), mesh)
        params = plain.template.init()
    rng = np.random.default_rng(0)
    for path, value in params.items():
        if path.endswith("lora_b"):  # starts at zero, where dropout would change nothing
            params[path] = jnp.asarray(rng.normal(size=value.shape) * 0.1, jnp.float32)

    @jax.jit
    def forward(params, batch):
        module = plain.template.module(params)
        images = module.encode_images(normalize_images(batch["images"]))
        hidden, x = hidden_states(module, images, batch)
        masks = target_masks(module, batch)
        return module.llama.logits(hidden), module.llama.regress(hidden), x, masks

    text, size, regressed, wanted = [], 0, [], []
    with jax.set_mesh(mesh), Batches(held_out, tokenizer, "rows") as batches:
        for _ in range(EVAL.batches):
            batch = next(batches)
            logits, predicted, x, masks = jax.device_get(forward(params, batch))
            for row, tokens in enumerate(batch["tokens"]):
                scored = masks["text"][row].nonzero()[0]
                logs = logits[row] - np.log(np.sum(np.exp(logits[row]), axis=-1, keepdims=True))
                text += (-logs[scored, tokens[scored + 1]]).tolist()
                regressed += list(predicted[row][masks["regression"][row]])
                wanted += list(x[row][1:][masks["regression"][row][:-1]])
                special = {tokenizer.bos, tokenizer.eos, tokenizer.img, tokenizer.img_end}
                words: list[list[int]] = [[]]
                for t in scored.tolist():
                    if tokens[t] in special:
                        words.append([])
                    words[-1].append(int(tokens[t + 1]))
                size += sum(len(tokenizer.decode(ids).encode()) for ids in words)
    (found, _), _ = evaluate(cfg, mesh, tmp_path, jax.tree.map(np.asarray, params))
    a, b = np.float64(regressed), np.float64(wanted)
    cosine = np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    expected = {
        "loss": np.mean(text) + 3 * np.mean((a - b) ** 2),
        "text_loss": np.mean(text),
        "perplexity": np.exp(np.mean(text)),
        "bits_per_byte": np.sum(text) / np.log(2) / size,
        "text_targets": len(text),
        "regression_loss": np.mean((a - b) ** 2),
        "cosine_similarity": np.mean(cosine),
        "explained_variance": 1 - np.sum((a - b) ** 2) / np.sum((b - b.mean(0)) ** 2),
        "regression_targets": len(wanted),
    }
    assert len(text) > 50 and len(wanted) > 100
    assert_close(found, expected | {f"storyboards/{k}": v for k, v in expected.items()})


class Scripted(Evaluation):
    """Sends SIGTERM to itself at some steps; measures the distance of the step from 4."""

    ran: ClassVar[list[int]] = []
    signals: ClassVar[set[int]] = set()

    @classmethod
    def check(cls, cfg, config):
        pass

    def run(self, state, step, stop):
        self.ran.append(step)
        assert int(state.step) == step
        if step in self.signals:
            self.signals.remove(step)
            os.kill(os.getpid(), signal.SIGTERM)
        norm = sum(float(jnp.sum(x**2)) for x in state.trained.values())
        return None if stop() else EvalResult({"distance": abs(step - 4), "norm": norm})


SCRIPTED = {"scripted": Scripted}


def steps_of(workdir: Path) -> list[int]:
    return [row["step"] for row in read_evaluations(workdir).get("a", ())]


def without_times(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ("time", "seconds")} for row in rows]


def test_an_evaluation_that_is_due_runs_exactly_once(toy, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Whatever stops the run; and it changes nothing that is trained or logged."""
    monkeypatch.setattr(Scripted, "ran", [])
    monkeypatch.setattr(Scripted, "signals", {2, 6, 9})
    plain = dataclasses.replace(TOY, checkpoint_every=3)
    train(plain, tmp_path / "plain")
    cfg = dataclasses.replace(plain, eval=(EvalConfig("a", every=2, kind="scripted"),))
    for last in (2, 6, 9):
        with pytest.raises(KeyboardInterrupt):
            train(cfg, tmp_path / "run", SCRIPTED)
        assert checkpoint.latest_step(tmp_path / "run") == last
        assert steps_of(tmp_path / "run") == [s for s in (2, 4, 6, 8) if s < last]
    assert "a, step 9" not in capsys.readouterr().err
    train(cfg, tmp_path / "run", SCRIPTED)
    assert Scripted.ran == [2, 2, 4, 6, 6, 8, 9, 9]
    assert steps_of(tmp_path / "run") == [2, 4, 6, 8, 9]
    assert "\na, step 9  distance" in capsys.readouterr().err
    train(cfg, tmp_path / "run", SCRIPTED)
    assert Scripted.ran == [2, 2, 4, 6, 6, 8, 9, 9]

    # A kill loses what came after the last checkpoint, rows of evaluations among it.
    killed = shutil.copytree(tmp_path / "run", tmp_path / "killed")
    shutil.rmtree(killed / "9")
    with (killed / "evaluations.jsonl").open("a") as file:
        file.write('{"stage": "toy", "evalu')
    train(cfg, killed, SCRIPTED)
    assert Scripted.ran == [2, 2, 4, 6, 6, 8, 9, 9, 8, 9]
    rows = [without_times(read_evaluations(tmp_path / name)["a"]) for name in ("run", "killed")]
    assert rows[0] == rows[1]

    # Evaluations may be added to a run, even to one that has ended.
    more = (*cfg.eval, EvalConfig("b", every=100, kind="scripted"))
    train(dataclasses.replace(cfg, eval=more), killed, SCRIPTED)
    assert [row["step"] for row in read_evaluations(killed)["b"]] == [9]
    assert len(Scripted.ran) == 11

    expected, logged = parameters(tmp_path / "plain"), read_metrics(tmp_path / "plain")["toy"]
    timed = ("time", "_seconds", "_per_second", "_per_second_per_device", "goodput")
    for name in ("run", "killed"):
        found = parameters(tmp_path / name)
        for path, value in expected.items():
            np.testing.assert_array_equal(found[path], value, err_msg=path)
        for row, wanted in zip(read_metrics(tmp_path / name)["toy"], logged, strict=True):
            names = {k for k in wanted if not k.endswith(timed)} - {"compilations"}
            assert names == {k for k in row if not k.endswith(timed)} - {"compilations"}
            np.testing.assert_equal({k: row[k] for k in names}, {k: wanted[k] for k in names})


def test_the_best_checkpoint_is_kept_across_restarts(toy, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Scripted, "signals", {6})
    cfg = dataclasses.replace(
        TOY,
        checkpoint_every=2,
        keep_checkpoints=1,
        eval=(EvalConfig("a", every=1, kind="scripted"),),
        keep_best={"a/distance": "min"},
    )
    with pytest.raises(KeyboardInterrupt):
        train(cfg, tmp_path, SCRIPTED)
    assert sorted(checkpoint.complete_steps(tmp_path)) == [4, 6]
    train(cfg, tmp_path, SCRIPTED)
    assert sorted(checkpoint.complete_steps(tmp_path)) == [4, 9]
    assert held_out_table(cfg, tmp_path).endswith("\nbest a/distance: step 4")
    best = dataclasses.replace(cfg, steps=12, keep_best={"a/distance": "max"})
    train(best, tmp_path, SCRIPTED)
    assert sorted(checkpoint.complete_steps(tmp_path)) == [12]


@pytest.mark.slow
def test_held_out_losses_of_a_run(data_root, tmp_path, one_device, capsys):  # noqa: F811
    """They are logged and shown, their time has a name, and training does not notice."""
    cfg = digits_run("text", data_root, steps=4)
    train(cfg, tmp_path / "with")
    table = held_out_table(cfg, tmp_path / "with")
    assert table in capsys.readouterr().err
    head, *lines = table.splitlines()
    assert head.split() == "heldout, step 4 loss text_loss perplexity bits_per_byte".split() + [
        "text_targets"
    ]
    assert [line.split()[0] for line in lines] == ["all", *sorted(KINDS)]
    rows = read_evaluations(tmp_path / "with")["heldout"]
    assert [row["step"] for row in rows] == [2, 4] and rows[1]["loss"] < rows[0]["loss"]
    assert all(row["loss"] == row["text_loss"] for row in rows)
    logged = read_metrics(tmp_path / "with")["emu"]
    assert logged[1]["eval_seconds"] == 0 < logged[2]["eval_seconds"] < rows[0]["seconds"]
    train(dataclasses.replace(cfg, eval=()), tmp_path / "without")
    expected, found = parameters(tmp_path / "without"), parameters(tmp_path / "with")
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    losses = [row["loss"] for row in read_metrics(tmp_path / "without")["emu"]]
    assert losses == [row["loss"] for row in logged]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"split": "validatoin"}, "evaluation 'heldout': unknown split 'validatoin'; did you mean"),
        ({"root": "here", "split": "later"}, "evaluation 'heldout': here/later does not exist: "),
        ({"split": "train"}, "evaluation 'heldout': its split 'train' is the one that the run"),
        ({"embedded": ""}, "evaluation 'heldout': no held-out data: set its split or sources"),
        ({"kind": "los"}, r"unknown kind 'los' \(evaluation 'heldout'\); did you mean 'loss'"),
        (
            {"sources": (SourceConfig("laion", "webdataset", ("held-out/*.tar",)),)},
            r"evaluation 'heldout': source 'laion': nothing is at held-out/\*\.tar",
        ),
    ],
)
def test_missing_held_out_data_is_an_error_at_the_start(changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr("emu_jax.train.run.Trainer", None)  # nothing is computed
    cfg = small("text", "root")
    data = dataclasses.replace(cfg.data, embedded=changes.get("embedded", "digits"))
    held_out = EvalConfig(**{k: v for k, v in changes.items() if k != "embedded"})
    cfg = dataclasses.replace(cfg, data=data, eval=(held_out,))
    with pytest.raises(UserError, match=message):
        train(cfg, tmp_path)


def test_a_share_of_each_source_can_be_held_out(data_root):  # noqa: F811
    """Training reads the others, in the order that they had."""
    data = digits_data(
        root=data_root,
        split="validation",
        embedded="",
        mixture={"pages": 1.0, "storyboards": 1.0},
        holdout=0.2,
        block_documents=64,
    )
    held_out = EvalConfig(batch_size=6).data(data)
    assert (held_out.held_out, held_out.split) == (True, "validation")
    tokenizer = Tokenizer.load(Path(data_root) / "tokenizer")

    def read(cfg: DataConfig) -> list[tuple[str, int]]:
        (group,) = open_groups(cfg, tokenizer, RowBuilder.requires)
        sampled = [d for d in map(group.sample, range(900)) if group.usable(d)]
        packed = {
            (p.sampled.source.cfg.name, p.sampled.index) for row in group.block(0).rows for p in row
        }
        assert packed <= {(d.source.cfg.name, d.index) for d in sampled}
        assert len(packed) > 40
        return [(d.source.cfg.name, d.index) for d in sampled]

    trained, evaluated = read(data), read(held_out)
    assert not set(trained) & set(evaluated)
    everything = read(dataclasses.replace(data, holdout=0.0))
    assert set(everything) == set(trained) | set(evaluated)
    assert trained == [document for document in everything if document in set(trained)]
    assert len(evaluated) / len(everything) == pytest.approx(0.2, rel=0.2)
    with pytest.raises(UserError, match="has no document that is held out: set data.holdout"):
        read(dataclasses.replace(held_out, holdout=1e-9))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"eval": (EvalConfig(), EvalConfig())}, "two evaluations are called 'heldout'"),
        ({"keep_best": {"heldout/loss": "least"}}, "keep_best.heldout/loss is 'least': use min or"),
        ({"keep_best": {"held/loss": "min"}}, "no evaluation 'held'; did you mean 'heldout'"),
        (
            {"keep_best": {"heldout/loss": "min"}, "checkpoint_every": 300},
            "evaluations every 500 steps and checkpoints every 300 do not meet",
        ),
    ],
)
def test_bad_settings_of_evaluations_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**{"eval": (EvalConfig(),)} | changes)
    for setting in ({"name": "a b"}, {"every": 0}, {"batches": 0}, {"batch_size": -1}):
        with pytest.raises(UserError):
            EvalConfig(**setting)
