"""Held-out losses during training in bfloat16, int8 and fp8, and with Adam's moments in 8 bits.

Each variant trains for `steps` steps from the same weights on the same batches as the run in
float32, once for each seed. It is evaluated `points` times. Matmuls in int8 and fp8 are those of
both towers, in bfloat16. Bytes are those of the optimizer's state for each parameter.

`config` "digits" is the stage of that name without its parents and delays. Another config, such
as "emu_100m", gives that stage its model, with the vocabulary of the digits. Images and rows are
then smaller than the config's, so that a step takes two cores about two seconds.

With `workdir` the runs are kept there, and the same command resumes them where they were cut off.
"""

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from emu_jax import bench
from emu_jax.config import MatmulDtypeConfig
from emu_jax.errors import UserError, suggest
from emu_jax.storage import shipped, writing
from emu_jax.train.config import EvalConfig, TrainConfig
from emu_jax.train.config_file import load_config
from emu_jax.train.loop import train
from emu_jax.train.step import Trainer, mesh_for
from emu_jax.train.telemetry.metrics import read_evaluations

BASE = "float32"
# Overrides of the run in float32.
VARIANTS: dict[str, dict[str, Any]] = {
    BASE: {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8 matmuls": {"dtype": "bfloat16", "matmul_dtype": MatmulDtypeConfig("int8", "int8")},
    "int8 moments": {"moments_dtype": "int8"},
    "fp8 matmuls": {"dtype": "bfloat16", "matmul_dtype": MatmulDtypeConfig("fp8", "fp8")},
}
# How much higher than in float32 the last held-out loss may be.
LIMITS = {"int8 matmuls": 0.01, "int8 moments": 0.005, "fp8 matmuls": 0.01}
# Of larger models, which train on one row at a time.
ROW_TOKENS, ROW_IMAGES, IMAGE_SIZE = 384, 10, 112
LARGER_LLAMA_LR = 1e-3
# Of each kind of document; `HELD_OUT_ROWS` unless training has more rows in a batch.
HELD_OUT_BATCHES, HELD_OUT_ROWS = 4, 2


def run(
    config: str = "digits", steps: int = 80, seeds: int = 3, points: int = 8, workdir: str = ""
) -> Iterator[dict]:
    if steps < 1 or points < 1 or steps % points:
        raise UserError(
            f"low_precision.steps is {steps} and points {points}: make steps a multiple of points"
        )
    variants: dict[str, dict[str, Any]] = {name: {"heldout_losses": []} for name in VARIANTS}
    with contextlib.ExitStack() as stack:
        root = Path(workdir or stack.enter_context(tempfile.TemporaryDirectory()))
        runs = root / f"{config}-{steps}-{points}"
        for seed in range(seeds):
            for name, changes in VARIANTS.items():
                cfg = settings(config, root / "data", steps, seed, points, **changes)
                folder = runs / f"{name.replace(' ', '_')}-{seed}"
                train(cfg, folder)
                rows = read_evaluations(folder, cfg.name)["heldout"]
                variants[name]["heldout_losses"].append([row["loss"] for row in rows])
                parameters, variants[name]["bytes"] = sizes(cfg)
                yield {
                    "config": config,
                    "steps": [row["step"] for row in rows],
                    "parameters": parameters,
                    "row_tokens": cfg.data.row_tokens,
                    "rows": cfg.data.batch_size,
                    "image_size": cfg.data.image_size,
                    "variants": {n: v for n, v in variants.items() if v["heldout_losses"]},
                }


def settings(
    config: str,
    data: Path,
    steps: int,
    seed: int,
    points: int,
    moments_dtype: str = BASE,
    **changes: Any,
) -> TrainConfig:
    """Returns the config of one run; `changes` override the run in float32."""
    cfg = load_config(TrainConfig, shipped("configs") / "digits.py", [])
    if config != "digits":
        cfg = larger(cfg, config)
    groups = tuple(dataclasses.replace(group, delay_steps=0) for group in cfg.optimizer.groups)
    evaluation = EvalConfig(
        every=steps // points,
        batches=HELD_OUT_BATCHES,
        batch_size=max(cfg.data.batch_size, HELD_OUT_ROWS),
    )
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, root=str(data)),
        optimizer=dataclasses.replace(cfg.optimizer, groups=groups, moments_dtype=moments_dtype),
        parents={},
        steps=steps,
        seed=seed,
        eval=(evaluation,),
        checkpoint_every=evaluation.every,
        keep_checkpoints=1,
        **changes,
    )


def larger(digits: TrainConfig, config: str) -> TrainConfig:
    """Returns the stage `digits` with the model of another config.

    Raises:
        UserError: there is no such config.
    """
    path = shipped("configs") / f"{config}.py"
    if not path.exists():
        known = ["digits", *(p.stem for p in path.parent.glob("emu_*.py"))]
        raise UserError(f"no config {config!r}{suggest(config, known)}")
    model = load_config(TrainConfig, path, []).model
    model = dataclasses.replace(
        model,
        tokens=digits.model.tokens,
        llama=dataclasses.replace(model.llama, vocab_size=digits.model.llama.vocab_size),
        vision=dataclasses.replace(model.vision, image_size=IMAGE_SIZE),
    )
    data = dataclasses.replace(
        digits.data,
        batch_size=1,
        row_tokens=ROW_TOKENS,
        row_images=ROW_IMAGES,
        n_causal=model.n_embeddings,
        image_size=IMAGE_SIZE,
    )
    *towers, llama = digits.optimizer.groups
    groups = (*towers, dataclasses.replace(llama, lr=LARGER_LLAMA_LR))
    optimizer = dataclasses.replace(digits.optimizer, groups=groups)
    return dataclasses.replace(digits, model=model, data=data, optimizer=optimizer)


def sizes(cfg: TrainConfig) -> tuple[int, float]:
    """Returns the number of parameters, and the bytes of the optimizer's state for each."""
    state = Trainer(cfg, mesh_for(cfg, jax.devices()[:1])).state_shapes
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state.optimizer))
    parameters = sum(math.prod(x.shape) for x in state.trained.values())
    return parameters, size / parameters


def relative(figures: dict, name: str) -> np.ndarray:
    """Returns losses over those in float32, less 1: [seed, step]."""
    losses = np.asarray(figures["variants"][name]["heldout_losses"])
    base = np.asarray(figures["variants"][BASE]["heldout_losses"])
    return losses / base[: len(losses)] - 1  # a run that was cut off has fewer seeds


def table(figures: dict) -> str:
    rows = []
    for name, values in figures["variants"].items():
        last = relative(figures, name)[:, -1]
        rows.append(
            (
                name,
                f"{np.mean(values['heldout_losses'], axis=0)[-1]:.4f}",
                f"{last.mean():+.2%}",
                f"{last[np.argmax(np.abs(last))]:+.2%}",
                f"{LIMITS[name]:+.1%}" if name in LIMITS else "-",
                values["bytes"],
            )
        )
    head = (
        "",
        "Held-out loss",
        f"Relative to {BASE}",
        "Furthest",
        "Limit",
        "Optimizer bytes per parameter",
    )
    seeds = len(figures["variants"][BASE]["heldout_losses"])
    about = (
        f"`{figures['config']}`, {figures['parameters'] / 1e6:.1f}M parameters, "
        f"{figures['steps'][-1]} steps of {figures['rows']} x {figures['row_tokens']} tokens, "
        f"images of {figures['image_size']} pixels, "
        + ("one seed." if seeds == 1 else f"means over {seeds} seeds.")
    )
    return bench.markdown_table(head, rows) + "\n\n" + about


def plot(figures: dict, path: Path) -> None:
    """Plots held-out losses over steps, and those relative to float32. Lines are means over the
    seeds; bands hold all seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, differences = figure.subplots(1, 2)
    steps = figures["steps"]
    for n, (name, values) in enumerate(figures["variants"].items()):
        style: dict[str, Any] = {"color": f"C{n}", "label": name, "marker": ".", "linewidth": 1}
        percent = 100 * relative(figures, name)
        losses.plot(steps, np.mean(values["heldout_losses"], axis=0), **style)
        differences.plot(steps, percent.mean(0), **style)
        differences.fill_between(steps, percent.min(0), percent.max(0), color=f"C{n}", alpha=0.1)
    for limit in sorted(set(LIMITS.values())):
        differences.axhline(100 * limit, color="grey", linewidth=0.8, linestyle=":")
    losses.set(title="held-out loss", xlabel="steps", yscale="log")
    losses.yaxis.set_major_formatter("{x:g}")
    losses.yaxis.set_minor_formatter("{x:g}")
    differences.set(title=f"relative to {BASE}, %; dotted: limits", xlabel="steps")
    for panel in (losses, differences):
        panel.grid(alpha=0.3, which="both")
    losses.legend(fontsize=8)
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
