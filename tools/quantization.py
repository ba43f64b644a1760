"""Measures a model in float32, bfloat16, int8 and int4, and prints a table.

    python tools/quantization.py runs/demo
    python tools/quantization.py runs/demo --size 1.5B --write docs/conversion.md
    python tools/quantization.py runs/demo --size 1.5B --turns 0    # no speeds, and half the memory

The columns:

- the loss on held-out digits of the model in `runs/demo` (configs/digits.py)
- the largest difference of logits from those that the released code computed (`--golden`), over
  the largest logit
- the bytes of the parameters of the 14B and the 37B model, counted from their shapes, where what
  is not quantized is in bfloat16
- with `--size`, of a ladder model with random weights: its resident memory, the most memory while
  it decodes, the tokens per second of greedy decoding, and its speed over that of float32. Each
  type has a process of its own, which decodes in turns with the one of float32. The ratio of each
  turn therefore holds on a machine with other jobs; the tokens per second do not. `--turns 0`
  leaves the speeds out, and only one model is in memory at a time.

What is not quantized, and the computation, are in float32 beside int8 and int4.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import statistics
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
text_generation = bench.load_benchmark("text_generation")
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
        model=checkpoint.load_model_config(run),
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


def random_parameters(cfg: EmuConfig, kind: str) -> dict[str, Parameter]:
    """Returns random parameters of a model as it holds them in `kind`. Only their speed counts, so
    the same numbers are repeated."""
    block = np.random.default_rng(0).standard_normal(2**20, np.float32)
    params: dict[str, Parameter] = {}
    for path, shape in text_generation.template(cfg).shapes.items():
        values = np.resize(block, shape.shape)
        values *= 1.0 if path.endswith("scale") else shape.shape[-2:][0] ** -0.5
        params[path] = jax.block_until_ready(stored(path, jnp.asarray(values), kind))
        del values
    return params


def measure(size: str, kind: str, tokens: int) -> None:
    """Builds a ladder model with random weights in this process and decodes whenever a line arrives
    on stdin. Prints a JSON object for each of these: `resident` bytes first, then `peak` bytes and
    `seconds`."""
    cfg = text_generation.config(size)
    before = anonymous_bytes() or 0
    emu = text_generation.emu_of(cfg, random_parameters(cfg, kind))
    release_freed_memory()
    resident = (anonymous_bytes() or 0) - before
    ids = np.full((1, PROMPT), 5, np.int32)
    decode = text_generation.ours(emu, cfg, ids, tokens, beams=1)
    decode()  # compiles
    release_freed_memory()
    print(json.dumps({"resident": resident}), flush=True)
    for _ in sys.stdin:
        with PeakMemory() as memory:
            started = time.perf_counter()
            decode()
            seconds = time.perf_counter() - started
        print(json.dumps({"peak": (memory.peak or 0) - before, "seconds": seconds}), flush=True)


class Measured:
    """A model in one type of weights, in a process of its own (`measure`).

    Attributes:
        resident: bytes of the model.
        peak: the most bytes while it decoded.
        seconds: of each decoding.
    """

    def __init__(self, size: str, kind: str, tokens: int) -> None:
        command = [sys.executable, __file__, "--measure", kind, "--size", size]
        self._process = subprocess.Popen(
            [*command, "--tokens", str(tokens)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.resident: float = self._answer()["resident"]
        self.peak, self.seconds = 0.0, list[float]()

    def decode(self) -> None:
        """Decodes once more."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.peak = max(self.peak, answer["peak"])
        self.seconds.append(answer["seconds"])

    def close(self) -> None:
        """Ends the process and frees its memory."""
        self._process.communicate()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with status {self._process.wait()}")
        return json.loads(line)


def decoding_columns(exact: Measured | None, kind: str, args: argparse.Namespace) -> list[str]:
    """Returns the columns of `--size`. `exact` is the model in float32; None without speeds."""
    if exact is not None and kind == "float32":
        model = exact
    else:
        model = Measured(args.size, kind, args.tokens)
    ratios = []
    for turn in range(args.turns + 1):
        if exact is not None:
            exact.decode()
        if model is not exact:
            model.decode()
        if exact is not None and turn:  # the first turn warms caches up
            ratios.append(exact.seconds[-1] / model.seconds[-1])
    if model is not exact:
        model.close()
    columns = [f"{size / 1e9:.2f}" for size in (model.resident, model.peak)]
    if ratios:
        speed = args.tokens / statistics.median(model.seconds[-args.turns :])
        columns += [f"{speed:.2f}", f"{statistics.median(ratios):.2f}"]
    return columns


def report(args: argparse.Namespace) -> str:
    head = ["Weights", "Held-out loss", "Difference of logits", "14B, GB", "37B, GB"]
    rows, exact_loss = [], math.nan
    for kind in KINDS:
        print(f"measuring {kind}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            loss = held_out_loss(args.run, kind, Path(folder))
        exact_loss = loss if kind == "float32" else exact_loss
        row = [
            kind,
            f"{loss:.4f} ({loss / exact_loss - 1:+.2%})",
            f"{logits_error(args.golden, kind):.1e}",
            *(f"{parameter_bytes(cfg, kind) / 1e9:.1f}" for cfg in (emu_14b(), emu2_gen())),
        ]
        rows.append(row)
    if args.size:
        head += [f"{args.size}, GB", "while decoding, GB"]
        head += ["tokens/s", "over float32"] if args.turns else []
        exact = Measured(args.size, "float32", args.tokens) if args.turns else None
        for row in rows:
            print(f"decoding in {row[0]}", file=sys.stderr, flush=True)
            row += decoding_columns(exact, row[0], args)
        if exact is not None:
            exact.close()
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?", default=ROOT / "runs" / "demo")
    parser.add_argument("--golden", type=Path, default=ROOT / "tests" / "golden" / "tiny")
    parser.add_argument("--size", default="", help="a ladder model to measure, such as 1.5B")
    parser.add_argument("--tokens", type=int, default=8, help="that are decoded")
    parser.add_argument("--turns", type=int, default=5, help="of a type and float32; 0: no speeds")
    parser.add_argument("--write", type=Path, help="a page with a region for the table")
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.size, args.measure, args.tokens)
        return
    text = report(args)
    print(text)
    if args.write:
        args.write.write_text(replace_region(args.write.read_text(), "quantization", text))


if __name__ == "__main__":
    main()
