"""From a new process to the first token, with a cold and with a warm compilation cache.

Each turn starts new processes: emu_jax with an empty `JAX_COMPILATION_CACHE_DIR` (`cold`),
emu_jax with the cache of the first (`warm`), and transformers with the same language model. Each
imports, loads the checkpoint from the page cache, generates one token after a short prompt, and
then another of the same shape, which compiles nothing. The difference between the two is
compilation and other one-time work. emu_jax loads all of Emu except the decoder, transformers
only the language model. `size` is a ladder model or "digits".
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from emu_jax import bench
from emu_jax.config import TokenIds, save_json
from emu_jax.convert.convert import convert
from emu_jax.errors import UserError
from emu_jax.sharding import nest
from emu_jax.tokenizer import Tokenizer

language = bench.load_benchmark("text_generation")

WORDS = "the quick brown fox jumps over the lazy dog"

OURS = """
import json, sys, time
began = time.perf_counter()
import emu_jax
imported = time.perf_counter()
emu = emu_jax.load(sys.argv[1])
loaded = time.perf_counter()
write = lambda: emu.generate_ids([sys.argv[2]], max_new_tokens=1, num_beams=1)
write()
first = time.perf_counter()
write()
second = time.perf_counter()
"""

THEIRS = """
import json, sys, time
began = time.perf_counter()
import torch, transformers
imported = time.perf_counter()
model = transformers.LlamaForCausalLM.from_pretrained(sys.argv[1]).eval().to(sys.argv[3])
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
loaded = time.perf_counter()
ids = tokenizer(sys.argv[2], return_tensors="pt")["input_ids"].to(sys.argv[3])
def write():
    with torch.no_grad():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
write()
first = time.perf_counter()
write()
second = time.perf_counter()
"""

REPORT = """
print(json.dumps({
    "import": imported - began, "load": loaded - imported, "first_token": first - loaded,
    "second_token": second - first, "compile": first - loaded - (second - first),
    "until_first_token": first - began,
}))
"""


def run(size: str = "0.1B", turns: int = 5) -> dict:
    torch = language.torch_or_missing()
    if turns < 1:
        raise UserError(f"startup.turns is {turns}: make it at least 1")
    device = language.floors.torch_device(torch)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(size, folder / "run")
        convert(folder / "run", folder / "hf", to="hf")
        seconds: dict[str, list[dict]] = {"cold": [], "warm": [], "transformers": []}
        for turn in range(turns + 1):
            cache = folder / f"cache{turn}"
            done = {
                "cold": measured(OURS, folder / "run", cache),
                "warm": measured(OURS, folder / "run", cache),
                "transformers": measured(THEIRS, folder / "hf" / "llama", cache, device),
            }
            bench.log.info("turn %d of %d: %s", turn, turns, json.dumps(done))
            for who, taken in done.items():
                seconds[who] += [taken] if turn else []  # in turn 0 files are not cached
    figures: dict[str, Any] = {"size": size}
    for who, all_taken in seconds.items():
        columns = {part: [taken[part] for taken in all_taken] for part in all_taken[0]}
        figures[who] = {part: bench.median(column) for part, column in columns.items()}
    cold, warm, theirs = ([one["until_first_token"] for one in seconds[who]] for who in seconds)
    figures["cold_over_transformers"] = bench.ratio(theirs, cold)
    figures["warm_over_transformers"] = bench.ratio(theirs, warm)
    return figures


def table(figures: dict) -> str:
    parts = ("import", "load", "first_token", "second_token", "until_first_token")
    names = {
        "cold": "emu_jax, empty cache",
        "warm": "emu_jax, warm cache",
        "transformers": "transformers",
    }
    rows = [
        (
            about,
            *(figures[who][part] for part in parts),
            figures.get(f"{who}_over_transformers", ""),
        )
        for who, about in names.items()
    ]
    head = (
        "Seconds",
        "import",
        "load",
        "First token",
        "Second",
        "Total",
        "Speed-up over transformers",
    )
    return bench.markdown_table(head, rows)


def measured(program: str, checkpoint: Path, cache: Path, *more: str) -> dict[str, float]:
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [sys.executable, "-c", program + REPORT, str(checkpoint), WORDS, *more]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def write_checkpoint(size: str, folder: Path) -> None:
    """Writes a run directory of a random model without a decoder."""
    tokenizer = Tokenizer.train([WORDS] * 2, 300)
    cfg = language.config(size)
    cfg = dataclasses.replace(
        cfg,
        tokens=TokenIds.after(tokenizer.base_size),
        unet=None,
        vae=None,
        llama=dataclasses.replace(cfg.llama, vocab_size=tokenizer.base_size + 4)
        if size == "digits"
        else cfg.llama,
    )
    tokenizer.save(folder / "tokenizer")
    save_json(cfg, folder / "config.json")
    params = nest(jax.tree.map(np.asarray, language.random_params(cfg)))
    ocp.PyTreeCheckpointer().save((folder / "0" / "params").absolute(), params)
