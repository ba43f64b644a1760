"""The fastest matmuls and memory copies of this machine.

Matmuls of several shapes run in XLA and in torch, in each dtype. The fastest is the peak that
other benchmarks are compared with. A copy counts the bytes it reads and the bytes it writes;
XLA's copy is x + 1 in place, which has the same traffic. The parts take turns, and figures are
medians over the turns. `--set floors.side=N` makes it smaller. In all benchmarks,
EMU_JAX_FLOORS_SIDE does, and EMU_JAX_FLOORS_SECONDS sets how long a part runs.
"""

import functools
import logging
import math
import os
import time
import timeit
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emu_jax import bench
from emu_jax.errors import UserError

log = logging.getLogger("emu_jax")

SIDE = int(os.environ.get("EMU_JAX_FLOORS_SIDE", "2048"))  # of a square matmul
COPY_SIDE = min(SIDE, 4096)  # 128 bytes are copied for each unit of its square
TURNS = 5
SECONDS = float(os.environ.get("EMU_JAX_FLOORS_SECONDS", "0.2"))  # of one part in one turn


def run(side: int = SIDE) -> dict:
    if side < 4:
        raise UserError(f"floors.side is {side}: make it at least 4")
    figures: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        parts = products(dtype, shapes(side))
        rates = rate(bench.take_turns(parts, TURNS))
        figures |= {f"{dtype}_{name}_flops": value for name, value in rates.items()}
        figures[f"{dtype}_peak_flops"] = best(rates)
    rates = rate(bench.take_turns(copies(min(side, COPY_SIDE) ** 2 * 128), TURNS))
    figures |= {f"copy_{name}_bytes": value for name, value in rates.items()}
    figures["copy_peak_bytes"] = best(rates)
    return figures


def table(figures: dict) -> str:
    def row(name: str, key: str, unit: str) -> tuple:
        found = {
            who: best({k: v for k, v in figures.items() if k.startswith(f"{key}_{who}")})
            for who in ("xla", "torch", "numpy")
        }
        return (name, *(_giga(value) for value in found.values()), unit)

    return bench.markdown_table(
        ("Best of the shapes", "XLA", "torch", "numpy", ""),
        [
            row("Matmuls, float32", "float32", "GFLOP/s"),
            row("Matmuls, bfloat16", "bfloat16", "GFLOP/s"),
            row("Copies, read and written", "copy", "GB/s"),
        ],
    )


def _giga(value: dict | None) -> dict | None:
    return value and {key: v / 1e9 for key, v in value.items()}


def rate(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Returns rates per second from seconds per unit."""
    return {name: bench.median([1 / s for s in taken]) for name, taken in seconds.items()}


def best(rates: dict[str, dict[str, float]]) -> dict[str, float] | None:
    return max(rates.values(), key=lambda found: found["median"], default=None)


def shapes(side: int = SIDE) -> list[tuple[int, int, int]]:
    """Returns (m, k, n) of matmuls: a square one, and those of a language model's layers and
    head."""
    return [(side, side, side), (2 * side, side // 4, side), (side, side // 4, 8 * side)]


def peak(dtype: str, side: int = SIDE) -> Callable[[], float]:
    """Returns the fastest matmul as a part for `take_turns`, which returns its FLOPs."""
    parts = products(dtype, shapes(side))
    seconds = bench.take_turns(parts, turns=3)
    return parts[min(parts, key=lambda name: sorted(seconds[name])[1])]


def fastest_copy(side: int = COPY_SIDE) -> Callable[[], float]:
    """Returns the fastest copy as a part for `take_turns`, which returns the bytes read and
    written."""
    parts = copies(side * side * 128)
    seconds = bench.take_turns(parts, turns=3)
    return parts[min(parts, key=lambda name: sorted(seconds[name])[1])]


def products(dtype: str, sizes: list[tuple[int, int, int]]) -> dict[str, Callable[[], float]]:
    """Returns matmuls by name; each runs for about `SECONDS` and returns its FLOPs."""
    parts = {}
    for m, k, n in sizes:
        rng = np.random.default_rng(0)
        a, b = (rng.standard_normal(shape, np.float32) for shape in ((m, k), (k, n)))
        for name, once in {"xla": xla_product, "torch": torch_product}.items():
            if part := once(a, b, dtype):
                parts[f"{name}_{m}x{k}x{n}"] = repeated(part, 2.0 * m * k * n)
    return parts


def xla_product(a: np.ndarray, b: np.ndarray, dtype: str) -> Callable[[], Any]:
    left, right = (jnp.asarray(x, dtype) for x in (a, b))
    with precision(dtype):
        product = jax.jit(jnp.matmul).lower(left, right).compile()
    return lambda: product(left, right).block_until_ready()


def precision(dtype: Any) -> Any:
    """Returns a context in which matmuls have the precision of torch's and of training
    (`train.run.Run`). JAX's default computes float32 in fewer bits on GPUs and TPUs."""
    return jax.default_matmul_precision("highest" if jnp.dtype(dtype) == jnp.float32 else "default")


def torch_product(a: np.ndarray, b: np.ndarray, dtype: str) -> Callable[[], Any] | None:
    if (torch := torch_here(dtype)) is None:
        return None
    device = torch_device(torch)
    left, right = (torch.from_numpy(x).to(device, getattr(torch, dtype)) for x in (a, b))
    out = torch.empty(left.shape[0], right.shape[1], dtype=left.dtype, device=device)

    def once():
        torch.mm(left, right, out=out)
        synchronise(torch)

    return once


@functools.cache
def has_bfloat16(torch: Any) -> bool:
    """Tells whether torch has a fast bfloat16 matmul. Without AVX-512 it falls back to a plain
    loop, a hundred times slower than float32: a minute per matmul."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(256, 256, dtype=dtype, device=torch_device(torch))
        product = lambda x=x: (torch.mm(x, x), synchronise(torch))  # noqa: E731
        seconds[dtype] = min(timeit.repeat(product, number=1, repeat=5))
    if not (has := seconds[torch.bfloat16] < 10 * seconds[torch.float32]):
        log.info("torch, bfloat16: left out, a plain loop on this processor")
    return has


def copies(size: int) -> dict[str, Callable[[], float]]:
    """Returns copies by name; each runs for about `SECONDS` and returns the bytes read and
    written."""
    # In place, because the operating system would have to zero fresh memory first.
    state = [jnp.zeros(size // 4, jnp.float32)]
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def xla():
        state[0] = add(state[0])
        state[0].block_until_ready()

    parts = {"xla": xla}
    if (torch := torch_here()) is not None:
        source, target = (torch.zeros(size // 4, device=torch_device(torch)) for _ in range(2))

        def copy():
            target.copy_(source)
            synchronise(torch)

        parts["torch"] = copy
    if jax.default_backend() == "cpu":
        old, new = np.zeros(size // 4, np.float32), np.ones(size // 4, np.float32)
        parts["numpy"] = lambda: np.copyto(new, old)
    return {name: repeated(part, 2.0 * size) for name, part in parts.items()}


def repeated(once: Callable[[], Any], amount: float) -> Callable[[], float]:
    """Returns a part that repeats `once` for about `SECONDS` and returns `amount` times the
    repeats."""
    times = 0

    def part() -> float:
        nonlocal times
        if not times:
            once()
            began = time.perf_counter()
            once()
            times = max(1, math.ceil(SECONDS / (time.perf_counter() - began)))
        for _ in range(times):
            once()
        return amount * times

    return part


def torch_here(dtype: str = "float32") -> Any | None:
    """Returns torch, set to use all cores, or None if it is not installed or cannot compute in
    `dtype` on JAX's platform."""
    try:
        import torch
    except ModuleNotFoundError:
        return None
    if jax.default_backend() not in ("cpu", "gpu"):
        return None
    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        return None
    torch.set_num_threads(bench.cores())
    torch.backends.cudnn.allow_tf32 = False  # full float32, as in matmuls
    module: Any = torch
    return None if dtype == "bfloat16" and not has_bfloat16(module) else module


def torch_device(torch: Any) -> str:
    return "cpu" if jax.default_backend() == "cpu" else "cuda"


def synchronise(torch: Any) -> None:
    if torch_device(torch) == "cuda":
        torch.cuda.synchronize()
