"""Host memory: restoring a training run, loading a model, and a run with many steps and saves.

Each part is a process of its own. `restore` restores the state of a run of the ladder model `size`
(parameters and Adam's moments, float32). `load` loads that run in bfloat16. Their peak is of the
whole process's anonymous memory (`RssAnon`, sampled), the interpreter and JAX included. `soak`
trains on the digits for `steps` steps with `saves` saves. Its memory is the least resident memory
(`VmRSS`) between two saves, so that what a save holds for a moment does not count.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from emu_jax import bench
from emu_jax.errors import UserError
from emu_jax.host_memory import PeakMemory, anonymous_bytes, resident_bytes

GIB = 2**30
FIRST_SAVE = 5  # whose memory the last save's is compared with
SAMPLE_SECONDS = 0.02


def run(size: str = "0.4B", steps: int = 5000, saves: int = 40) -> dict:
    if anonymous_bytes() is None:
        raise bench.Missing("the memory of a process is known on Linux only")
    if not FIRST_SAVE < saves <= steps:
        raise UserError(f"memory.saves is {saves}: more than {FIRST_SAVE}, at most memory.steps")
    with tempfile.TemporaryDirectory() as name:
        _in_process("write", size, name)
        figures = {part: _in_process(part, size, name) for part in ("restore", "load")}
    with tempfile.TemporaryDirectory() as name:
        figures["soak"] = _in_process("soak", steps, saves, name)
    return {"size": size} | figures


def table(figures: dict) -> str:
    restore, load, soak = (figures[part] for part in ("restore", "load", "soak"))

    def row(about: str, part: dict, allowed: float) -> tuple:
        size = part["bytes"] / GIB
        return about, size, part["peak_bytes"] / GIB, allowed * size + 1

    head = (f"{figures['size']} model", "Size, GiB", "Peak, GiB", "Bound, GiB")
    rows = [
        row("Restore of a training run: parameters and moments", restore, 1.3),
        row("`load` in bfloat16", load, 1.2),
    ]
    first, last = (soak["resident_bytes"][n - 1] / 2**20 for n in (FIRST_SAVE, soak["saves"]))
    return (
        bench.markdown_table(head, rows)
        + f"\n\nTraining on the digits, {soak['steps']:,} steps with {soak['saves']} saves: "
        f"{first:,.0f} MiB after save {FIRST_SAVE}, {last:,.0f} MiB after save {soak['saves']} "
        f"({last / first - 1:+.1%})."
    )


def _in_process(part: str, *arguments: Any) -> dict:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, part, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    figures = json.loads(done.stdout.splitlines()[-1])
    bench.log.info("memory of %s: %s", part, json.dumps(figures))
    return figures


# --- Parts, each run in its own process -----------------------------------------------------------


def write(size: str, folder: Path) -> dict:
    """Writes a run directory with one step of a training run."""
    from emu_jax.config import save_json
    from emu_jax.tokenizer import Tokenizer
    from emu_jax.train.checkpoints import Checkpoints, save_state

    trainer = _trainer(size)
    Tokenizer.train(["the quick brown fox"] * 2, 300).save(folder / "tokenizer")
    save_json(trainer.cfg.model, folder / "config.json")
    with Checkpoints(folder, 1) as checkpoints:
        save_state(checkpoints, 1, trainer.init({}), {"step": 1}, leave_out=())
        checkpoints.wait()
    return {}


def restore(size: str, folder: Path) -> dict:
    import jax

    from emu_jax.train.checkpoints import Checkpoints, restore_state

    trainer = _trainer(size)
    began = time.perf_counter()
    with PeakMemory() as memory, Checkpoints(folder, 1) as checkpoints:
        _, state, _ = jax.block_until_ready(restore_state(checkpoints, trainer, {}))
    return _figures(state, memory, began)


def load(size: str, folder: Path) -> dict:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import emu_jax

    began = time.perf_counter()
    with PeakMemory() as memory:
        emu = emu_jax.load(folder, dtype=jnp.bfloat16)
        params = jax.block_until_ready(nnx.state(emu.model))
    return _figures(params, memory, began)


def soak(steps: int, saves: int, folder: Path) -> dict:
    """Trains, and returns the resident memory after each save."""
    from emu_jax.checkpoint import complete_steps
    from emu_jax.data.digits import build_digits
    from emu_jax.storage import shipped
    from emu_jax.train.config import TrainConfig
    from emu_jax.train.config_file import load_config
    from emu_jax.train.loop import train

    build_digits(folder / "data")
    cfg = load_config(TrainConfig, shipped("configs") / "digits.py", [])
    model = dataclasses.replace(
        cfg.model,
        vision=dataclasses.replace(cfg.model.vision, patch_size=16, width=24, layers=1),
        cformer=dataclasses.replace(cfg.model.cformer, width=24, layers=1, mlp_width=48),
        llama=dataclasses.replace(cfg.model.llama, width=32, layers=1, mlp_width=48),
    )
    data = dataclasses.replace(
        cfg.data, root=str(folder / "data"), batch_size=1, row_tokens=40, row_images=4
    )
    every = steps // saves
    cfg = dataclasses.replace(
        cfg,
        model=model,
        data=data,
        parents={},
        eval=(),
        keep_best={},
        steps=(saves + 1) * every,
        checkpoint_every=every,
    )
    samples: dict[int, list[int]] = defaultdict(list)
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            newest = max(complete_steps(folder / "run"), default=0)
            samples[newest].append(resident_bytes() or 0)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        train(cfg, folder / "run")
    finally:
        ended.set()
        thread.join()
    return {
        "steps": saves * every,
        "saves": saves,
        "resident_bytes": [min(samples[n * every]) for n in range(1, saves + 1)],
    }


def _trainer(size: str) -> Any:
    import jax

    from emu_jax.config import TokenIds, emu_ladder
    from emu_jax.sharding import make_mesh
    from emu_jax.train.config import pretraining
    from emu_jax.train.step import Trainer

    model = dataclasses.replace(emu_ladder(size), tokens=TokenIds.after(300), unet=None, vae=None)
    return Trainer(pretraining("memory", model), make_mesh(devices=jax.devices()[:1]))


def _figures(tree: Any, memory: PeakMemory, began: float) -> dict:
    import jax

    shards = [s.data.nbytes for a in jax.tree.leaves(tree) for s in a.addressable_shards]
    return {
        "bytes": sum(shards),
        "before_bytes": memory.before,
        "peak_bytes": memory.peak,
        "seconds": round(time.perf_counter() - began, 2),
    }


if __name__ == "__main__":
    part, *words = sys.argv[1:]
    arguments = [int(word) if word.isdigit() else word for word in words[:-1]]
    print(json.dumps(globals()[part](*arguments, Path(words[-1]))))
