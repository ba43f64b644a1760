"""Regressing the N embeddings of an image: emu_jax against the release's loop and a KV cache.

The release recomputes the whole row for each of the N embeddings (`generate_image`); `release`
does so with the same language model in torch. `cached` is the obvious alternative, a loop over
transformers' dynamic cache. All three have the same random weights, and a check compares their
embeddings within 1e-4. `floor` is the prompt's FLOPs at this machine's fastest matmul plus, for
each further embedding, one read of the weights at the rate of its fastest copy. The parts take
turns. With `family=emu2` an image has 64 embeddings, and two projections lead out of the language
model and back.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from flax import nnx

from emu_jax import bench
from emu_jax.config import EmuConfig, PoolingConfig

floors, language = bench.load("floors"), bench.load("text_generation")


# The products of the weights by which an embedding is regressed from a state and read again.
HEADS = {
    "emu": ("llama.stu_regress_head.kernel",),
    "emu2": ("project_down.kernel", "project_up.kernel"),
}


def run(
    size: str = "0.1B",
    prompt: int = 512,
    turns: int = 5,
    dtype: str = "float32",
    family: str = "emu",
) -> dict:
    torch = language.torch_or_missing(dtype)
    cfg = language.config(size)
    if family == "emu2":
        llama = dataclasses.replace(cfg.llama, regression_head=False)
        cfg = dataclasses.replace(cfg, cformer=None, pooling=PoolingConfig(), llama=llama)
    params = language.random_params(cfg, dtype)
    model = language.transformers_model(torch, cfg, params, dtype)
    heads = [
        torch.from_numpy(np.array(params[path], np.float32)).to(
            floors.torch_device(torch), getattr(torch, dtype)
        )
        for path in HEADS[family]
    ]
    rng = np.random.default_rng(0)
    ids = rng.integers(3, cfg.tokens.pad, (1, prompt)).astype(np.int32)
    ids[:, -1] = cfg.tokens.img
    parts = {
        "ours": ours(cfg, params, ids),
        "release": lambda: release(torch, model, heads, cfg, ids),
        "cached": lambda: cached(torch, model, heads, cfg, ids),
    }
    found = {name: part() for name, part in parts.items()}
    error = {
        name: float(np.abs(found["ours"] - theirs).max() / np.abs(theirs).max())
        for name, theirs in found.items()
        if name != "ours"
    }
    if dtype == "float32" and max(error.values()) > 1e-4:
        raise RuntimeError(f"embeddings differ from torch's by more than 1e-4: {error}")
    # `count` replaces the returned array by the number that `take_turns` divides by.
    timed = {name: language.count(part, 1) for name, part in parts.items()}
    timed |= {"product": floors.peak(dtype), "copy": floors.fastest_copy()}
    seconds = bench.take_turns(timed, turns)
    weights = [
        a
        for path, a in params.items()
        if path.startswith("llama.layers.") and a.ndim == 3 or path in HEADS[family]
    ]
    flops = 2.0 * prompt * sum(math.prod(a.shape) for a in weights)
    read = sum(math.prod(a.shape) * a.dtype.itemsize for a in weights)
    steps = cfg.n_embeddings - 1
    floor = [
        flops * product + steps * read * copy
        for product, copy in zip(seconds["product"], seconds["copy"], strict=True)
    ]
    figures: dict[str, Any] = {
        "family": family,
        "size": size,
        "prompt": prompt,
        "n": cfg.n_embeddings,
        "dtype": dtype,
        "relative_error": error,
        "floor_ms": bench.median([1e3 * s for s in floor]),
        "over_floor": bench.ratio(seconds["ours"], floor),
    }
    for name in parts:
        figures[name] = {
            "ms": bench.median([1e3 * s for s in seconds[name]]),
            "ours_times_as_fast": bench.ratio(seconds[name], seconds["ours"]),
        }
    return figures


def table(figures: dict) -> str:
    names = {
        "ours": "emu_jax",
        "release": "The release's loop: N forward passes, torch",
        "cached": "torch with transformers' cache",
    }
    rows = [
        (about, figures[name]["ms"], figures[name]["ours_times_as_fast"] if name != "ours" else "")
        for name, about in names.items()
    ]
    rows.append(("Floor", figures["floor_ms"], ""))
    return bench.markdown_table((f"N = {figures['n']}", "ms", "Speed-up of emu_jax"), rows)


def ours(cfg: EmuConfig, params: dict, ids: np.ndarray):
    graphdef, state = language.emu_of(cfg, params)
    lengths = np.array([ids.shape[1]])

    @jax.jit
    def regress(state, ids):
        return nnx.merge(graphdef, state).regress_after(ids, lengths)

    def embeddings() -> np.ndarray:
        with floors.precision(params["llama.norm.scale"].dtype):
            return np.asarray(regress(state, ids), np.float32)

    return embeddings


def release(
    torch: Any, model: Any, heads: list[Any], cfg: EmuConfig, ids: np.ndarray
) -> np.ndarray:
    found = []
    with torch.no_grad():
        row = embedded(torch, model, ids)
        for _ in range(cfg.n_embeddings):
            hidden = model.model(inputs_embeds=row, use_cache=False).last_hidden_state
            found.append(hidden[:, -1:] @ heads[0])
            row = torch.cat([row, read_again(found[-1], heads)], 1)
    return torch.cat(found, 1).float().cpu().numpy()


def cached(torch: Any, model: Any, heads: list[Any], cfg: EmuConfig, ids: np.ndarray) -> np.ndarray:
    found, past = [], None
    with torch.no_grad():
        new = embedded(torch, model, ids)
        for _ in range(cfg.n_embeddings):
            out = model.model(inputs_embeds=new, past_key_values=past, use_cache=True)
            past = out.past_key_values
            found.append(out.last_hidden_state[:, -1:] @ heads[0])
            new = read_again(found[-1], heads)
    return torch.cat(found, 1).float().cpu().numpy()


def read_again(embedding: Any, heads: list[Any]) -> Any:
    """Returns what the language model reads of an embedding that it regressed."""
    return embedding @ heads[1] if len(heads) > 1 else embedding


def embedded(torch: Any, model: Any, ids: np.ndarray) -> Any:
    where = floors.torch_device(torch)
    return model.get_input_embeddings()(torch.from_numpy(ids).long().to(where))
