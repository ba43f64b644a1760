"""Runs the demo on an emulated object store, killed at random: `python tools/demo_on_store.py`.

Runs `emu-jax demo` on a local directory, then on `gs://` against an emulator on the loopback, where
the process is killed (SIGKILL) `--kills` times and started again. Compares the figures of both runs
and the bytes of all parameters of all stages. Prints a JSON object. Exits with 1 if they differ.

`--local DIR` names a demo that is complete or to be completed, with the same seed, instead of a
temporary directory. `--steps N` trains each stage for N steps only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOT_COMPARED = ("seconds", "report")  # of metrics.json
MOST_STARTS = 3  # without a kill: more say that the demo cannot go on


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the demo and of the kills")
    parser.add_argument("--local", type=Path, help="a local demo to compare with")
    parser.add_argument("--steps", type=int, default=0, help="of each stage; 0: all")
    parser.add_argument("--run", metavar="WORKDIR", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(args.run, args.seed, args.steps)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        report = compare(args.local or Path(folder) / "demo", args.seed, args.kills, args.steps)
    print(json.dumps(report, indent=1))
    return 0 if report["equal"] else 1


def run(workdir: str, seed: int, steps: int) -> None:
    """Runs the demo in this process; with `steps`, cut short."""
    from emu_jax.demo import demo
    from emu_jax.storage import as_path

    if steps:
        whole = demo._stage

        def short(*args: Any, last: bool) -> Any:
            every = max(1, steps // 3)
            return dataclasses.replace(
                whole(*args, last=last), steps=steps, log_every=every, checkpoint_every=every
            )

        demo._stage, demo.DRAWINGS, demo.SEQUENCES = short, 1, demo.SHOWN
    demo.run_demo(as_path(workdir), seed)


def compare(local: Path, seed: int, kills: int, steps: int) -> dict[str, Any]:
    """Runs both demos and returns the report."""
    sys.path.insert(0, str(ROOT / "tests"))
    from stores import Store

    def start(workdir: str) -> subprocess.Popen:
        settings = [f"--run={workdir}", f"--seed={seed}", f"--steps={steps}"]
        return subprocess.Popen([sys.executable, __file__, *settings], cwd=ROOT)

    began = time.monotonic()
    if start(str(local)).wait():
        raise SystemExit("the local demo failed: see above")
    spent = json.loads((local / "metrics.json").read_text())["seconds"]
    store = Store("gs")
    os.environ |= store.environment
    rng, killed, failures = random.Random(seed), [], 0
    try:
        remote = f"{store.folder}/demo"
        while True:
            process = start(remote)
            try:
                wait = rng.uniform(0.4, 1.2) * spent / (kills + 1) if len(killed) < kills else None
                if not process.wait(wait):
                    break
                failures += 1
                if failures == MOST_STARTS:
                    raise SystemExit("the demo on the store failed: see above")
            except subprocess.TimeoutExpired:
                killed.append(round(wait or 0, 1))
                print(f"kill {len(killed)} after {killed[-1]} s", file=sys.stderr)
            finally:
                process.kill()
                process.wait()
        differences = differing(str(local), remote)
        return {
            "equal": not differences,
            "differences": differences,
            "killed_after_seconds": killed,
            "failures": failures,
            "requests": len(store.requests),
            "local_seconds": spent,
            "seconds": round(time.monotonic() - began, 1),
        }
    finally:
        store.close()


def differing(local: str, remote: str) -> list[str]:
    """Returns the figures and the parameters that differ between two demos."""
    import jax
    import numpy as np

    from emu_jax import checkpoint
    from emu_jax.demo.demo import STAGES
    from emu_jax.storage import as_path

    def read(folder: Path) -> dict[str, bytes]:
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        values = {}
        for item in ("params", "ema"):
            path = folder / str(checkpoint.latest_step(folder)) / item
            if not path.is_dir():
                continue
            shapes = {
                key: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)
                for key, a in checkpoint.stored_shapes(path).items()
            }
            arrays = checkpoint.read_arrays(path, shapes)
            values |= {f"{path.parent.name}/{item}/{k}": _bytes(a) for k, a in arrays.items()}
        return values

    def _bytes(array: jax.Array) -> bytes:
        return np.asarray(array).tobytes()

    found = []
    ours, theirs = as_path(local), as_path(remote)
    figures = [json.loads((run / "metrics.json").read_text()) for run in (ours, theirs)]
    for key in sorted(set(figures[0]) | set(figures[1])):
        if key not in NOT_COMPARED and figures[0].get(key) != figures[1].get(key):
            found.append(f"metrics.json {key}: {figures[0].get(key)}, {figures[1].get(key)}")
    for stage in (*(f"parents/{name}" for name in STAGES["emu"][:-1]), "."):
        one, other = (read(run / stage if stage != "." else run) for run in (ours, theirs))
        found += [
            f"{stage}: {key}"
            for key in sorted(set(one) | set(other))
            if one.get(key) != other.get(key)
        ]
    return found


if __name__ == "__main__":
    sys.exit(main())
