"""Saving and restoring a model: emu_jax's checkpoints against torch.save and torch.load.

The parameters are those of one model (`size`: a ladder model, or "digits"). `blocks` is how long
training waits for a save, which continues in the background; `save` is the time until it is
complete. `floor` writes and reads the same bytes with numpy, in one file on the same disk. Files
are in the page cache when they are read. Restored parameters are compared with the saved ones.
The parts take turns.
"""

import itertools
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from emu_jax import bench
from emu_jax.sharding import nest
from emu_jax.train.checkpoints import Checkpoints

language = bench.load_benchmark("text_generation")


def run(size: str = "0.1B", turns: int = 5) -> dict:
    torch = language.torch_or_missing()
    params = language.random_params(language.config(size))
    flat = np.concatenate([np.asarray(a).ravel() for a in params.values()])
    device = language.floors.torch_device(torch)
    theirs = {path: torch.from_numpy(np.array(a)).to(device) for path, a in params.items()}
    tree = nest(params)
    wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
    blocked: list[float] = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, steps = Path(name), itertools.count()
        workdir = folder / "run"
        workdir.mkdir()
        saves = stack.enter_context(Checkpoints(workdir, keep=1))

        def save() -> None:
            began = time.perf_counter()
            saves.save(next(steps), {"params": ocp.args.StandardSave(tree)})
            blocked.append(time.perf_counter() - began)
            saves.wait()

        def restore() -> None:
            jax.block_until_ready(saves.restore({"params": ocp.args.StandardRestore(wanted)}))

        parts: dict[str, Callable[[], Any]] = {
            "save": save,
            "restore": restore,
            "torch_save": lambda: torch.save(theirs, folder / "torch.pt"),
            "torch_load": lambda: torch.load(folder / "torch.pt"),
            "floor_write": lambda: flat.tofile(folder / "floor"),
            "floor_read": lambda: np.fromfile(folder / "floor", np.float32),
        }
        for name in ("save", "torch_save", "floor_write"):  # so that there are files to read
            parts[name]()
        blocked.clear()
        timed = {name: language.count(part, 1) for name, part in parts.items()}
        seconds = bench.take_turns(timed, turns)
        _, saved = saves.restore({"params": ocp.args.StandardRestore(wanted)})
        jax.tree.map(np.testing.assert_array_equal, saved["params"], tree)
    seconds["blocks"] = blocked[1::2]  # each turn saves twice; the second time counts
    return {
        "size": size,
        "bytes": flat.nbytes,
        **{f"{name}_s": bench.median(taken) for name, taken in seconds.items()},
        "blocks_over_torch_save": bench.ratio(seconds["torch_save"], seconds["blocks"]),
        "save_over_torch_save": bench.ratio(seconds["torch_save"], seconds["save"]),
        "restore_over_torch_load": bench.ratio(seconds["torch_load"], seconds["restore"]),
        "save_over_floor": bench.ratio(seconds["save"], seconds["floor_write"]),
        "restore_over_floor": bench.ratio(seconds["restore"], seconds["floor_read"]),
    }


def table(figures: dict) -> str:
    def row(about: str, ours: str, other: str, floor: str) -> tuple:
        return (
            about,
            figures[f"{ours}_s"],
            figures[f"torch_{other}_s"],
            figures[f"{ours}_over_torch_{other}"],
            figures[f"floor_{floor}_s"],
        )

    head = (
        f"{figures['bytes'] / 1e6:,.0f} MB, seconds",
        "emu_jax",
        "torch",
        "Speed-up over torch",
        "Floor",
    )
    rows = [
        row("Save: training waits", "blocks", "save", "write"),
        row("Save: until it is complete", "save", "save", "write"),
        row("Restore", "restore", "load", "read"),
    ]
    return bench.markdown_table(head, rows)
