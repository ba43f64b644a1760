"""Numerics of this device: recorded outputs, packed attention, a training step against the CPU's.

`golden` compares a small model with what the released code computed, in float32: the largest error
in units of its tolerance, which must not exceed 1. `attention` compares the device's fastest
kernel for packed rows, in bfloat16, with the plain one in float32, on outputs and gradients.
`step` compares the loss of a small model before and after one training step with the CPU's, in
float32. A comparison that fails ends the benchmark.
"""

import dataclasses
import logging
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from emu_jax import bench
from emu_jax.convert.convert import convert
from emu_jax.models.attention import attention, choose_backend
from emu_jax.storage import shipped
from emu_jax.verify import verify

log = logging.getLogger("emu_jax")
step = bench.load_benchmark("train_step")

GOLDEN = "tests/golden/tiny"
ATTENTION_LIMIT = 2e-2  # of bfloat16, relative to the largest value
STEP_LIMIT = 1e-4
HEADS, WIDTH = 8, 128


def run(golden: int = 1, tokens: int = 2048) -> dict:
    figures = {"attention": attention_errors(tokens), "step": step_errors()}
    limits = {"attention": ATTENTION_LIMIT, "step": STEP_LIMIT, "golden": 1.0}
    if golden:
        figures["golden"] = golden_errors()
    for name, errors in figures.items():
        worst = max(value for value in errors.values() if isinstance(value, float))
        if not worst <= limits[name]:
            raise RuntimeError(
                f"{name}: an error of {worst:.2e}, more than {limits[name]}: {errors}"
            )
    return figures


def table(figures: dict) -> str:
    a, s, g = figures["attention"], figures["step"], figures.get("golden")
    rows = [
        (f"Packed attention, `{a['backend']}` in bfloat16: outputs", a["output"]),
        (f"Packed attention, `{a['backend']}` in bfloat16: gradients", a["gradient"]),
        ("Loss against the CPU's, float32: before a step", s["before"]),
        ("Loss against the CPU's, float32: after a step", s["after"]),
    ]
    cells = [(about, f"{error:.1e}") for about, error in rows]
    if g:
        about = f"Recorded outputs, float32, {g['checked']} tensors: in units of the tolerance"
        cells.append((about, f"{g['worst']:.2f}"))
    return bench.markdown_table(("Comparison", "Largest relative error"), cells)


def golden_errors() -> dict:
    folder = shipped("benchmarks").parent / GOLDEN
    if not folder.is_dir():
        raise bench.Missing(f"{folder} is missing: run from a clone, or set numerics.golden=0")
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = Path(temporary) / "run"
        convert(folder, checkpoint)
        _, rows = verify(checkpoint, folder)
    if failed := [row.key for row in rows if row.verdict == "FAILED"]:
        raise RuntimeError(f"golden: {len(failed)} tensors differ: {', '.join(failed)}")
    units = [row.error / row.tolerance for row in rows if row.error is not None and row.tolerance]
    return {"checked": len(units), "worst": float(max(units))}


def attention_errors(tokens: int) -> dict:
    """Compares the fastest kernel with the plain one on rows of three documents and padding."""
    backend = choose_backend("auto", jax.default_backend())
    rng = np.random.default_rng(0)
    shape = (2, tokens, HEADS, WIDTH)
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for _ in range(4)]
    ends = np.array([tokens // 4, tokens // 2, tokens - tokens // 8, tokens])
    segments = np.searchsorted(ends, np.arange(tokens), side="right") + 1
    segments[ends[-2] :] = 0  # padding
    segments = np.broadcast_to(segments, shape[:2]).astype(np.int32)

    def both(backend: str, dtype: str) -> list[np.ndarray]:
        q, k, v, weight = (x.astype(dtype) for x in arrays)
        weight = jnp.where(segments[..., None, None] > 0, weight, 0)

        def out(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attention(
                q,
                k,
                v,
                causal=True,
                segment_ids=jnp.asarray(segments),
                scale=WIDTH**-0.5,
                backend=backend,
            )

        loss = lambda *x: jnp.sum((out(*x) * weight).astype(jnp.float32))  # noqa: E731
        with step.floors.precision(dtype):
            values = jax.jit(out)(q, k, v), *jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
        return [np.asarray(value, np.float32)[segments > 0] for value in values]

    pairs = zip(both(backend, "bfloat16"), both("xla", "float32"), strict=True)
    errors = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs]
    return {"backend": backend, "tokens": tokens, "output": errors[0], "gradient": max(errors[1:])}


def step_errors() -> dict:
    cfg = step.settings("digits", 2, 64, 3, "float32", "full")
    cfg = dataclasses.replace(cfg, attention="xla")
    batch = step.documents(cfg)
    losses = {}
    for platform in (None, "cpu"):
        ours = step.Ours(cfg, batch, platform=platform)
        before = ours.loss()
        ours.step()
        losses[platform] = np.array([before, ours.loss()])
    errors = np.abs(losses[None] / losses["cpu"] - 1)
    return {"before": float(errors[0]), "after": float(errors[1])}
