"""Measures a model in float32, bfloat16, int8 and int4, and prints a table.

    python tools/quantization.py runs/demo
    python tools/quantization.py runs/demo --size 1.5B --write docs/conversion.md

The columns:

- the loss on held-out digits of the model in `runs/demo` (configs/digits.py)
- the largest difference of logits from those that the released code computed (`--golden`), over
  the largest logit
- the bytes of the parameters of the 14B and the 37B model, counted from their shapes, where what
  is not quantized is in bfloat16
- with `--size`, of a ladder model with random weights: its resident memory, the most memory while
  it decodes, and the tokens per second of greedy decoding. Each type has a process of its own.
  The machine must do nothing else.

What is not quantized, and the computation, are in float32 beside int8 and int4.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emu_jax import bench, checkpoint
from emu_jax.config import EmuConfig, emu2_gen, emu_14b
from emu_jax.generate.api import load
from emu_jax.host_memory import PeakMemory, anonymous_bytes, release_freed_memory
from emu_jax.markdown import replace_region, table
from emu_jax.models.emu import EmuModel
from emu_jax.models.quantized import Parameter, Quantization, is_quantized, quantize
from emu_jax.sharding import AbstractModel, make_mesh
from emu_jax.train.config import EvalConfig, TrainConfig
from emu_jax.train.config_file import load_config
from emu_jax.train.held_out import LossEvaluation
from emu_jax.train.step import Trainer, TrainState
from emu_jax.verify import tensor_error

ROOT = Path(__file__).resolve().parent.parent
QUANTIZATIONS: dict[str, Quantization] = {"int8": "int8", "int4": "int4"}
KINDS = ("float32", "bfloat16", *QUANTIZATIONS)
LOGITS = "train/logits"  # in the recording
HELD_OUT_BATCHES = 4  # of each source
PROMPT = 4  # tokens before those that are timed


def dtype_of(kind: str) -> str:
    """Returns the dtype of the computation and of what is not quantized."""
    return "bfloat16" if kind == "bfloat16" else "float32"


def stored(path: str, array: jax.Array, kind: str) -> Parameter:
    """Returns the parameter at `path` as a model in `kind` holds it."""
    if kind in QUANTIZATIONS and is_quantized(path):
        return quantize(path, array, QUANTIZATIONS[kind])
    return array.astype(dtype_of(kind))


def held_out_loss(run: Path, kind: str, folder: Path) -> float:
    """Returns the loss of a run's model on held-out digits, which are built in `folder`."""
    cfg = load_config(TrainConfig, ROOT / "configs" / "digits.py", [])
    cfg = dataclasses.replace(
        cfg,
        model=checkpoint.load_config(run),
        dtype=dtype_of(kind),
        data=dataclasses.replace(cfg.data, root=str(folder)),
        eval=(),
    )
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        trainer = Trainer(cfg, mesh)
        tokenizer = trainer.objective.prepare_data()
        params = checkpoint.read_params(run, trainer.param_shapes)
        zero = jnp.int32(0)
        state = TrainState(
            step=zero,
            trained={},
            frozen={path: stored(path, array, kind) for path, array in params.items()},
            optimizer=(),
            ema={},
            bad_steps=zero,
            skipped_steps=zero,
        )
        config = EvalConfig(batches=HELD_OUT_BATCHES)
        evaluation = LossEvaluation(cfg, config, trainer, tokenizer, folder)
        result = evaluation.run(state, 0, lambda: False)
        evaluation.close()
    assert result is not None
    return result.metrics["loss"]


def logits_error(golden: Path, kind: str) -> float:
    """Returns the relative error of the recorded logits."""
    emu = load(golden, dtype=jnp.dtype(dtype_of(kind)), quantize=QUANTIZATIONS.get(kind))
    return tensor_error(emu, golden, LOGITS)


def parameter_bytes(cfg: EmuConfig, kind: str) -> int:
    """Returns the bytes of a model's parameters, counted from their shapes."""
    mesh = make_mesh(devices=jax.devices()[:1])
    total = 0
    rest = "float32" if kind == "float32" else "bfloat16"
    for path, shape in AbstractModel(lambda: EmuModel(cfg, rngs=nnx.Rngs(0)), mesh).shapes.items():
        leaf: Any = jax.ShapeDtypeStruct(shape.shape, jnp.dtype(rest))
        if kind in QUANTIZATIONS and is_quantized(path):
            leaf = jax.eval_shape(functools.partial(quantize, path, kind=QUANTIZATIONS[kind]), leaf)
        total += sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(leaf))
    return total


def measure(size: str, kind: str, tokens: int) -> dict[str, float]:
    """Measures a ladder model with random weights in this process.

    Returns:
        resident and peak, in bytes, and tokens per second.
    """
    language = bench.load("text_generation")
    cfg = language.config(size)
    before = anonymous_bytes() or 0
    block = np.random.default_rng(0).standard_normal(
        2**20, np.float32
    )  # repeated: only speed counts
    params: dict[str, Parameter] = {}
    for path, shape in language.template(cfg).shapes.items():
        scale = 1.0 if path.endswith("scale") else shape.shape[-2:][0] ** -0.5
        array = jnp.asarray(np.resize(block, shape.shape) * np.float32(scale))
        params[path] = jax.block_until_ready(stored(path, array, kind))
        del array
    emu = language.emu_of(cfg, params)
    del params
    release_freed_memory()
    resident = (anonymous_bytes() or 0) - before
    ids = np.full((1, PROMPT), 5, np.int32)
    decode = language.ours(emu, cfg, ids, tokens, beams=1)
    decode()  # compiles
    release_freed_memory()
    with PeakMemory() as memory:
        started = time.perf_counter()
        decode()
        seconds = time.perf_counter() - started
    return {
        "resident": resident,
        "peak": (memory.peak or 0) - before,
        "tokens_per_second": tokens / seconds,
    }


def measured(size: str, kind: str, tokens: int) -> dict[str, float]:
    """Returns `measure` of a new process."""
    command = [sys.executable, __file__, "--measure", kind, "--size", size, "--tokens", str(tokens)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(args: argparse.Namespace) -> str:
    head = ["Weights", "Held-out loss", "Difference of logits", "14B, GB", "37B, GB"]
    if args.size:
        head += [f"{args.size}, GB", "while decoding, GB", "tokens/s"]
    rows, exact = [], math.nan
    for kind in KINDS:
        print(f"measuring {kind}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            loss = held_out_loss(args.run, kind, Path(folder))
        exact = loss if kind == "float32" else exact
        row = [
            kind,
            f"{loss:.4f} ({loss / exact - 1:+.2%})",
            f"{logits_error(args.golden, kind):.1e}",
            *(f"{parameter_bytes(cfg, kind) / 1e9:.1f}" for cfg in (emu_14b(), emu2_gen())),
        ]
        if args.size:
            figures = measured(args.size, kind, args.tokens)
            row += [f"{figures[name] / 1e9:.2f}" for name in ("resident", "peak")]
            row.append(f"{figures['tokens_per_second']:.2f}")
        rows.append(row)
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?", default=ROOT / "runs" / "demo")
    parser.add_argument("--golden", type=Path, default=ROOT / "tests" / "golden" / "tiny")
    parser.add_argument("--size", default="", help="a ladder model to measure, such as 1.5B")
    parser.add_argument("--tokens", type=int, default=8, help="that are decoded")
    parser.add_argument("--write", type=Path, help="a page with a region for the table")
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.size, args.measure, args.tokens)))
        return
    text = report(args)
    print(text)
    if args.write:
        args.write.write_text(replace_region(args.write.read_text(), "quantization", text))


if __name__ == "__main__":
    main()
