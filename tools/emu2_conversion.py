"""Memory of converting an Emu2 with full-size layers: a Hub folder to a run directory, and back.

    python tools/emu2_conversion.py FOLDER --layers 2 --vision-layers 4

The weights are generated in FOLDER, and each copy is deleted once the next one is written. Two
copies need 7 GB of disk at the default sizes, and 24 GB with 8 and 14 layers (6 billion
parameters). Prints one JSON line for each direction.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from emu_jax.config import EmuConfig, emu2
from emu_jax.convert import tensor_files
from emu_jax.convert.export import llama_json
from emu_jax.convert.layouts import complete_emu2
from emu_jax.convert.source import abstract_model, rows_of
from emu_jax.convert.tables import KeyStyle
from emu_jax.sharding import make_mesh
from emu_jax.tokenizer import Tokenizer

BYTES = 2**25  # of the random numbers that all weights repeat


@dataclasses.dataclass
class Described:
    """The parts of a model source that its JSON files follow from."""

    cfg: EmuConfig
    tokenizer: Tokenizer


def write_release(folder: Path, cfg: EmuConfig) -> int:
    """Writes a release of random weights in bfloat16. Returns its number of parameters."""
    shapes = abstract_model(cfg, make_mesh(devices=jax.devices()[:1])).shapes
    style, dtype = KeyStyle(hub=True), np.dtype(ml_dtypes.bfloat16)
    contents = {
        style.write(key): (row.release_shape(shapes[row.path].shape), dtype)
        for row in rows_of(cfg, shapes)
        for key in row.keys
    }
    numbers = np.random.default_rng(0).standard_normal(BYTES // 2, np.float32).astype(dtype)
    folder.mkdir(parents=True)
    shards = tensor_files.split_into_shards(folder, "model", contents)
    writer = tensor_files.ShardedWriter(shards, folder)
    for key, (shape, _) in contents.items():
        writer.write(key, np.resize(numbers, shape))
    writer.close()
    Tokenizer.train(["a few words"], 300).save(folder)
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    unused = range(len(vocabulary), cfg.tokens.pad)
    vocabulary |= {f"unused {number}": number for number in unused}
    file.write_text(json.dumps(values))
    (folder / "emu_tokenizer.json").unlink()
    tokenizer = Tokenizer.load(folder, family="emu2")
    complete_emu2(Described(cfg, tokenizer), folder, hub=True, llama_values=llama_json(cfg))
    return sum(int(np.prod(shape)) for shape, _ in contents.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vision-layers", type=int, default=4)
    args = parser.parse_args()
    base = emu2()
    cfg = dataclasses.replace(
        base,
        vision=dataclasses.replace(base.vision, layers=args.vision_layers),
        llama=dataclasses.replace(base.llama, layers=args.layers),
    )
    print(json.dumps({"parameters": write_release(args.folder / "release", cfg)}), flush=True)
    for src, dst, to in (("release", "run", "jax"), ("run", "back", "emu")):
        command = [sys.executable, "-m", "emu_jax.cli", "convert"]
        command += [str(args.folder / src), str(args.folder / dst), "--to", to, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(done.stdout.splitlines()[-1], flush=True)
        shutil.rmtree(args.folder / src)


if __name__ == "__main__":
    main()
