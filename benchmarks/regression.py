"""Regressing the N embeddings of an image: emu_jax against the release's loop and a KV cache.

The release recomputes the whole row for each of the N embeddings (`generate_image`); `release`
does so with the same language model in torch. `cached` is the obvious alternative, a loop over
transformers' dynamic cache. All three have the same random weights, and a check compares their
embeddings within 1e-4. `floor` is the prompt's FLOPs at this machine's fastest matmul plus, for
each further embedding, one read of the weights at the rate of its fastest copy. The parts take
turns. With `family=emu2` an image has 64 embeddings, and two projections lead out of the language
model and back. `family=both` measures both in the same turns, with one language model. `warm=0`
runs each part once a turn; the check has run all of them before.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from flax import nnx

from emu_jax import bench
from emu_jax.config import EmuConfig, PoolingConfig
from emu_jax.errors import UserError, suggest

floors, language = bench.load_benchmark("floors"), bench.load_benchmark("text_generation")

BOTH = "both"
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
    warm: int = 1,
) -> dict:
    if family not in (*HEADS, BOTH):
        raise UserError(f"no family {family!r}{suggest(family, (*HEADS, BOTH))}")
    torch = language.torch_or_missing(dtype)
    base = language.config(size)
    shared: dict[str, jax.Array] = {}  # the weights of the language model, the same in all families
    families = tuple(HEADS) if family == BOTH else (family,)
    loops = []
    for name in families:
        cfg = config(base, name)
        params = language.random_params(cfg, dtype)
        params |= {path: array for path, array in shared.items() if path in params}
        shared = {path: a for path, a in params.items() if path.startswith("llama.")}
        loops.append(Loops(torch, name, cfg, params, prompt))
    # `count` replaces the returned array by the number that `take_turns` divides by.
    timed = {
        f"{loop.family} {part}": language.count(call, 1)
        for loop in loops
        for part, call in loop.parts.items()
    }
    timed |= {"product": floors.peak(dtype), "copy": floors.fastest_copy()}
    seconds = bench.take_turns(timed, turns, warm=bool(warm))
    common = {"size": size, "prompt": prompt, "dtype": dtype}
    found = {
        loop.family: {"family": loop.family, **common, **loop.figures(seconds)} for loop in loops
    }
    return {BOTH: found} if family == BOTH else found[family]


def config(base: EmuConfig, family: str) -> EmuConfig:
    """Returns the config of a family with the language model of `base`."""
    if family == "emu":
        return base
    patches = (base.vision.image_size // base.vision.patch_size) ** 2
    pooling = PoolingConfig(*2 * (min(PoolingConfig.n_embeddings, patches),))
    llama = dataclasses.replace(base.llama, regression_head=False)
    return dataclasses.replace(base, cformer=None, pooling=pooling, llama=llama)


class Loops:
    """The loops over the embeddings of one family, checked against one another.

    Raises:
        RuntimeError: in float32, their embeddings differ by more than 1e-4.
    """

    def __init__(
        self, torch: Any, family: str, cfg: EmuConfig, params: dict[str, jax.Array], prompt: int
    ) -> None:
        self.family, self.cfg, self.params, self.prompt = family, cfg, params, prompt
        dtype = str(params["llama.norm.scale"].dtype)
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
        self.parts = {
            "ours": ours(cfg, params, ids),
            "release": lambda: release(torch, model, heads, cfg, ids),
            "cached": lambda: cached(torch, model, heads, cfg, ids),
        }
        found = {name: part() for name, part in self.parts.items()}
        self.error = {
            name: float(np.abs(found["ours"] - theirs).max() / np.abs(theirs).max())
            for name, theirs in found.items()
            if name != "ours"
        }
        if dtype == "float32" and max(self.error.values()) > 1e-4:
            raise RuntimeError(f"embeddings differ from torch's by more than 1e-4: {self.error}")

    def figures(self, seconds: dict[str, list[float]]) -> dict[str, Any]:
        """Returns the figures of the family from the seconds of all parts."""
        weights = [
            a
            for path, a in self.params.items()
            if path.startswith("llama.layers.") and a.ndim == 3 or path in HEADS[self.family]
        ]
        flops = 2.0 * self.prompt * sum(math.prod(a.shape) for a in weights)
        read = sum(math.prod(a.shape) * a.dtype.itemsize for a in weights)
        steps = self.cfg.n_embeddings - 1
        floor = [
            flops * product + steps * read * copy
            for product, copy in zip(seconds["product"], seconds["copy"], strict=True)
        ]
        mine = seconds[f"{self.family} ours"]
        figures: dict[str, Any] = {
            "n": self.cfg.n_embeddings,
            "relative_error": self.error,
            "floor_ms": bench.median([1e3 * s for s in floor]),
            "over_floor": bench.ratio(mine, floor),
        }
        for name in self.parts:
            taken = seconds[f"{self.family} {name}"]
            figures[name] = {
                "ms": bench.median([1e3 * s for s in taken]),
                "ours_times_as_fast": bench.ratio(taken, mine),
            }
        return figures


def table(figures: dict) -> str:
    if BOTH in figures:
        return "\n\n".join(map(table, figures[BOTH].values()))
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
    family = "Emu2, " if figures.get("family") == "emu2" else ""
    return bench.markdown_table((f"{family}N = {figures['n']}", "ms", "Speed-up of emu_jax"), rows)


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
