"""Training on the digits with Adam's moments in float32 and in 8 bits: held-out losses.

The stage `digits` without its parents and delays, for `steps` steps from the same weights on the
same batches. Bytes are those of the optimizer's state for each parameter.
"""

import dataclasses
import math
import tempfile
from pathlib import Path

import jax

from emu_jax import bench
from emu_jax.storage import shipped
from emu_jax.train.config import EvalConfig, TrainConfig
from emu_jax.train.config_file import load_config
from emu_jax.train.loop import train
from emu_jax.train.step import Trainer, mesh_for
from emu_jax.train.telemetry.metrics import read_evaluations

WAYS = ("float32", "int8")  # of `optimizer.moments_dtype`


def run(steps: int = 100, seed: int = 0) -> dict:
    figures: dict = {"steps": steps, "seed": seed}
    with tempfile.TemporaryDirectory() as name:
        for moments in WAYS:
            cfg = settings(Path(name) / "data", steps, seed, moments)
            workdir = Path(name) / moments
            train(cfg, workdir)
            (row,) = read_evaluations(workdir, cfg.name)["heldout"]
            figures[moments] = {"heldout_loss": row["loss"], "bytes": bytes_per_parameter(cfg)}
    return figures


def settings(data: Path, steps: int, seed: int, moments: str) -> TrainConfig:
    cfg = load_config(TrainConfig, shipped("configs") / "digits.py", [])
    groups = tuple(dataclasses.replace(group, delay_steps=0) for group in cfg.optimizer.groups)
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, root=str(data)),
        optimizer=dataclasses.replace(cfg.optimizer, groups=groups, moments_dtype=moments),
        parents={},
        steps=steps,
        seed=seed,
        eval=(EvalConfig(every=steps, batches=4),),
        checkpoint_every=steps,
    )


def bytes_per_parameter(cfg: TrainConfig) -> float:
    state = Trainer(cfg, mesh_for(cfg, jax.devices()[:1])).state_shapes
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state.optimizer))
    return size / sum(math.prod(x.shape) for x in state.trained.values())


def table(figures: dict) -> str:
    base = figures["float32"]["heldout_loss"]
    rows = [
        (
            f"`{way}`",
            f"{figures[way]['heldout_loss']:.4f}",
            f"{figures[way]['heldout_loss'] / base - 1:+.2%}",
            figures[way]["bytes"],
        )
        for way in WAYS
    ]
    head = ("`moments_dtype`", "Held-out loss", "Relative to float32", "Bytes per parameter")
    steps = f"{figures['steps']} steps on the digits, seed {figures['seed']}."
    return bench.markdown_table(head, rows) + f"\n\n{steps}"
