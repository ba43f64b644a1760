"""Held-out losses after training in bfloat16, int8 and fp8, and with Adam's moments in 8 bits.

The stage `digits` without its parents and delays, for `steps` steps from the same weights on the
same batches, once for each seed. Matmuls in int8 and fp8 are those of both towers, in bfloat16.
Bytes are those of the optimizer's state for each parameter.
"""

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from emu_jax import bench
from emu_jax.config import MatmulDtypeConfig
from emu_jax.storage import shipped
from emu_jax.train.config import EvalConfig, OptimizerConfig, TrainConfig
from emu_jax.train.config_file import load_config
from emu_jax.train.loop import train
from emu_jax.train.step import Trainer, mesh_for
from emu_jax.train.telemetry.metrics import read_evaluations

BASE = "float32"
# Overrides of the run in float32.
WAYS = {
    BASE: {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8 matmuls": {"dtype": "bfloat16", "matmul_dtype": MatmulDtypeConfig("int8", "int8")},
    "fp8 matmuls": {"dtype": "bfloat16", "matmul_dtype": MatmulDtypeConfig("fp8", "fp8")},
    "int8 moments": {"moments_dtype": "int8"},
}


def run(steps: int = 80, seeds: int = 1) -> dict:
    ways: dict = {way: {"heldout_losses": []} for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        for seed in range(seeds):
            for number, (way, changes) in enumerate(WAYS.items()):
                cfg = settings(Path(name) / "data", steps, seed, **changes)
                workdir = Path(name) / f"{number}_{seed}"
                train(cfg, workdir)
                (row,) = read_evaluations(workdir, cfg.name)["heldout"]
                ways[way]["heldout_losses"].append(row["loss"])
                ways[way]["bytes"] = bytes_per_parameter(cfg)
    return {"steps": steps, "seeds": seeds, "ways": ways}


def settings(
    data: Path, steps: int, seed: int, moments_dtype: str = BASE, **changes: Any
) -> TrainConfig:
    cfg = load_config(TrainConfig, shipped("configs") / "digits.py", [])
    groups = tuple(dataclasses.replace(group, delay_steps=0) for group in cfg.optimizer.groups)
    optimizer: OptimizerConfig = dataclasses.replace(
        cfg.optimizer, groups=groups, moments_dtype=moments_dtype
    )
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, root=str(data)),
        optimizer=optimizer,
        parents={},
        steps=steps,
        seed=seed,
        eval=(EvalConfig(every=steps, batches=4),),
        checkpoint_every=steps,
        **changes,
    )


def bytes_per_parameter(cfg: TrainConfig) -> float:
    state = Trainer(cfg, mesh_for(cfg, jax.devices()[:1])).state_shapes
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state.optimizer))
    return size / sum(math.prod(x.shape) for x in state.trained.values())


def table(figures: dict) -> str:
    ways = figures["ways"]
    base = np.asarray(ways[BASE]["heldout_losses"])
    rows = []
    for way, values in ways.items():
        losses = np.asarray(values["heldout_losses"])
        relative = losses / base - 1
        rows.append(
            (
                way,
                f"{losses.mean():.4f}",
                f"{relative.mean():+.2%}",
                f"{relative[np.argmax(np.abs(relative))]:+.2%}",
                values["bytes"],
            )
        )
    head = ("", "Held-out loss", f"Relative to {BASE}", "Furthest", "Optimizer bytes per parameter")
    seeds = "one seed" if len(base) == 1 else f"means over {len(base)} seeds"
    return (
        bench.markdown_table(head, rows) + f"\n\n{figures['steps']} steps on the digits, {seeds}."
    )
