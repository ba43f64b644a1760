"""One GPU: its numerics, its peaks, and the speed of training and generation beside PyTorch's.

`benchmarks/gpu.sh` runs it with the compiler flags for GPUs. Each part is another benchmark, in a
process of its own, and is stopped when it has used its share of the time that is left. A part that
fails is recorded with its cause, and the next part runs. The figures are written after each part.

`seconds` is the limit of all parts together. `smoke=1` runs each part at a toy size, on any device.
"""

import dataclasses
import logging
import os
import time
from collections.abc import Iterator

import jax

from emu_jax import bench
from emu_jax.errors import UserError

log = logging.getLogger("emu_jax")

# The ladder model to train and to generate with, which must fit as ours and as PyTorch's: {bytes
# that JAX may use of the device, three quarters of its memory: model}.
MODELS = {50e9: ("emu_1b5", "1.5B"), 0.0: ("emu_400m", "0.4B")}
# The size of the fastest matmul, and the seconds that one part of the floors takes.
FLOORS = {"EMU_JAX_FLOORS_SIDE": "8192", "EMU_JAX_FLOORS_SECONDS": "0.2"}
SMOKE_FLOORS = {"EMU_JAX_FLOORS_SIDE": "64", "EMU_JAX_FLOORS_SECONDS": "0.001"}
PRELOAD = (
    "emu_jax.train.step",
    "emu_jax.convert.export",
    "diffusers.models.unets.unet_2d_condition",
    "transformers.models.llama.modeling_llama",
    "transformers.models.t5.modeling_t5",
    "transformers.models.vit.modeling_vit",
)


@dataclasses.dataclass(frozen=True)
class Part:
    """A benchmark with settings, and with others at toy sizes. `share` is its part of the time,
    relative to the other parts."""

    title: str
    benchmark: str
    share: float
    settings: str
    smoke: str


PARTS = (
    Part("Numerics", "numerics", 80, "", "tokens=128 golden=0"),
    Part("Peaks", "floors", 30, "", ""),
    Part(
        "Training step",
        "train_step",
        160,
        "config={config} dtype=bfloat16 rows=4 tokens=2048 images=16 turns=3",
        "config=digits rows=1 tokens=64 images=2 turns=1 compiled=0 remat=none",
    ),
    Part(
        "Text, one row",
        "text_generation",
        60,
        "size={size} dtype=bfloat16 turns=3",
        "size=digits prompt=12 tokens=8 turns=1",
    ),
    Part(
        "Text, 16 rows",
        "text_generation",
        50,
        "size={size} dtype=bfloat16 turns=3 rows=16",
        "size=digits prompt=12 tokens=8 turns=1 rows=2",
    ),
    Part(
        "Visual embeddings",
        "regression",
        60,
        "size={size} dtype=bfloat16 turns=3 family=both",
        "size=digits prompt=12 turns=1 family=both",
    ),
    Part(
        "Diffusion sampling, one image",
        "sampling",
        45,
        "size=860M dtype=bfloat16 turns=3",
        "size=tiny steps=4 turns=1",
    ),
    Part(
        "Diffusion sampling, 16 images",
        "sampling",
        45,
        "size=860M dtype=bfloat16 turns=3 rows=16 steps=10",
        "size=tiny steps=4 turns=1 rows=2",
    ),
    Part(
        "Encoding images",
        "encoding",
        25,
        "size={size} dtype=bfloat16 images=64",
        "size=digits images=4 turns=1",
    ),
)


def run(smoke: int = 0, seconds: float = 540.0) -> Iterator[dict]:
    began = time.monotonic()
    config, size = "digits", "digits"
    if not smoke:
        if jax.default_backend() != "gpu":
            raise bench.Missing("no GPU is attached: use benchmarks/gpu.sh --smoke to try it")
        room = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
        config, size = next(model for least, model in MODELS.items() if room >= least)
    os.environ.update(SMOKE_FLOORS if smoke else FLOORS)
    parts: dict[str, dict] = {}
    for number, part in enumerate(PARTS):
        left = seconds - (time.monotonic() - began)
        limit = left * part.share / sum(later.share for later in PARTS[number:])
        words = (part.smoke if smoke else part.settings).format(config=config, size=size).split()
        started = time.monotonic()
        result: dict = {"benchmark": part.benchmark, "settings": words}
        try:
            result["figures"] = bench.run_benchmark_in_subprocess(
                part.benchmark,
                [f"{part.benchmark}.{word}" for word in words],
                limit,
                preload=PRELOAD,
            )
        except RuntimeError as error:
            result["failed"] = str(error)
        result["seconds"] = round(time.monotonic() - started, 1)
        parts[part.title] = result
        log.info("%s: %s (%.0f s)", part.title, result.get("failed", "done"), result["seconds"])
        yield {"smoke": smoke, "parts": dict(parts)}
    if failed := [title for title, result in parts.items() if "failed" in result]:
        raise UserError(f"not measured (bench gpu): {', '.join(failed)}: see the errors above")


def table(figures: dict) -> str:
    sections = []
    for title, result in figures["parts"].items():
        settings = " ".join([result["benchmark"], *result["settings"]])
        lines = [f"{title} (`{settings}`, {result['seconds']:.0f} s):", ""]
        if "failed" in result:
            lines.append(f"{bench.NOT_MEASURED} {result['failed']}")
        else:
            lines.append(bench.load_benchmark(result["benchmark"]).table(result["figures"]))
        sections.append("\n".join(lines))
    return "\n\n".join(sections)
