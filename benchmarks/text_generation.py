"""Generating text, greedily and with 5 beams: time per token against transformers' generate.

Both have the same random weights of one language model (`size`: a ladder model, or "digits").
Neither may end early, and a check compares their ids. transformers runs as its users run it:
eager, `generate` with its dynamic cache. `floor` is the time to read every weight of a decode
step once, at the rate of this machine's fastest copy. The parts take turns.
"""

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emu_jax import bench
from emu_jax.config import EmuConfig, digits, emu_ladder
from emu_jax.convert import export
from emu_jax.generate import text
from emu_jax.generate.settings import DynamicSettings, StaticSettings, TextConfig
from emu_jax.models.emu import EmuModel
from emu_jax.sharding import AbstractModel, make_mesh

floors = bench.load_benchmark("floors")

BEAMS = {"greedy": 1, "beams": 5}


def run(
    size: str = "0.1B",
    prompt: int = 128,
    tokens: int = 64,
    rows: int = 1,
    turns: int = 5,
    dtype: str = "float32",
) -> dict:
    torch = torch_or_missing(dtype)
    cfg = config(size)
    params = random_params(cfg, dtype)
    theirs = transformers_model(torch, cfg, params, dtype)
    rng = np.random.default_rng(0)
    ids = rng.integers(3, cfg.tokens.pad, (rows, prompt)).astype(np.int32)
    parts: dict[str, Callable[[], Any]] = {"copy": floors.fastest_copy()}
    written = {}
    emu = emu_of(cfg, params)
    for name, beams in BEAMS.items():
        parts[f"{name}_ours"] = ours(emu, cfg, ids, tokens, beams)
        parts[f"{name}_transformers"] = functools.partial(
            transformers_generate, torch, theirs, cfg, ids, tokens, beams
        )
        written[name] = parts[f"{name}_ours"]()[:, 1 : 1 + tokens]
        same = written[name] == parts[f"{name}_transformers"]()
        if dtype == "float32" and not same.all():
            raise RuntimeError(f"{name}: only {same.mean():.1%} of the ids equal transformers'")
    timed = {name: part if name == "copy" else count(part, tokens) for name, part in parts.items()}
    seconds = bench.take_turns(timed, turns)  # per token; per byte copied
    read = sum(
        math.prod(a.shape) * a.dtype.itemsize
        for path, a in params.items()
        if path.startswith("llama.")
        and a.ndim > 1
        and path not in ("llama.embed_tokens.embedding", "llama.stu_regress_head.kernel")
    )
    figures: dict[str, Any] = {
        "size": size,
        "prompt": prompt,
        "tokens": tokens,
        "rows": rows,
        "dtype": dtype,
        "weight_bytes": read,
        "floor_ms": bench.median([1e3 * read * s for s in seconds["copy"]]),
    }
    for name in BEAMS:
        mine, other = seconds[f"{name}_ours"], seconds[f"{name}_transformers"]
        figures[name] = {
            "ms_a_token": bench.median([1e3 * s for s in mine]),
            "transformers_ms_a_token": bench.median([1e3 * s for s in other]),
            "over_transformers": bench.ratio(other, mine),
            "over_floor": bench.ratio(mine, [read * s for s in seconds["copy"]]),
        }
    return figures


def table(figures: dict) -> str:
    rows = [
        (
            about,
            values["ms_a_token"],
            values["transformers_ms_a_token"],
            values["over_transformers"],
            figures["floor_ms"],
            values["over_floor"],
        )
        for about, values in (("Greedy", figures["greedy"]), ("5 beams", figures["beams"]))
    ]
    head = ("", "ms per token", "transformers", "Speed-up", "Floor, ms", "Relative to floor")
    return bench.markdown_table(head, rows)


def torch_or_missing(dtype: str = "float32") -> Any:
    """Returns torch, set to use all cores.

    Raises:
        bench.Missing: torch is not installed, or cannot compute in `dtype` on JAX's platform.
    """
    torch = floors.torch_here(dtype)
    if torch is None and importlib.util.find_spec("torch"):
        raise bench.Missing(f"torch does not compute in {dtype} on this {jax.default_backend()}")
    if torch is None:
        raise bench.Missing("torch is missing: pip install -e '.[torch]'")
    return torch


def config(size: str) -> EmuConfig:
    """Returns the config of a model, with float32 rotary tables as in transformers. The release
    rounds them."""
    cfg = digits() if size == "digits" else emu_ladder(size)
    return dataclasses.replace(cfg, llama=dataclasses.replace(cfg.llama, rope_dtype="float32"))


def template(cfg: EmuConfig) -> AbstractModel:
    mesh = make_mesh(devices=jax.devices()[:1])
    return AbstractModel(lambda: EmuModel(cfg, rngs=nnx.Rngs(0)), mesh)


def random_params(cfg: EmuConfig, dtype: str = "float32") -> dict[str, jax.Array]:
    """Returns flat random parameters that keep the scale of activations."""
    rng = np.random.default_rng(0)

    def fill(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.endswith(".scale"):
            return np.ones(shape, np.float32)
        fan_in = 2500 if path.endswith("bias") else math.prod(shape[:-1])
        if path.startswith(("llama.layers", "visual.blocks", "cformer.blocks")) and len(shape) > 1:
            fan_in //= shape[0]  # the axis of layers
        if path == "llama.embed_tokens.embedding":
            fan_in = 1
        if path in ("llama.stu_regress_head.kernel", "project_up.kernel"):
            # Keep embeddings large relative to what layers add. Otherwise N steps would amplify
            # rounding so much that torch with a cache and torch without one disagree.
            fan_in /= 100
        return rng.standard_normal(shape, np.float32) / np.float32(max(1, fan_in)) ** 0.5

    shapes = template(cfg).shapes
    return {path: jnp.asarray(fill(path, leaf.shape), dtype) for path, leaf in shapes.items()}


def emu_of(cfg: EmuConfig, params: dict[str, jax.Array]) -> tuple[Any, Any]:
    """Returns the model's structure and its parameters, as `generate.api.Emu` keeps them."""
    emu = template(cfg).module(params)
    emu.llama = emu.llama.unstacked_for_decoding()
    return nnx.split(emu)


def tensors(torch: Any, cfg: EmuConfig, params: dict, folder: str, dtype: str) -> dict:
    """Returns the weights as the state dict of a torch module."""
    kind, device = getattr(torch, dtype), floors.torch_device(torch)
    wide = {path: np.asarray(a, np.float32) for path, a in params.items()}
    found = export.hf_tensors(cfg, wide)[folder]
    return {name: torch.from_numpy(a.copy()).to(device, kind) for name, a in found.items()}


def transformers_model(torch: Any, cfg: EmuConfig, params: dict, dtype: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    values = export.llama_json(cfg)
    for key in ("architectures", "model_type"):
        values.pop(key)
    model = LlamaForCausalLM(LlamaConfig(**values)).eval()
    model.to(floors.torch_device(torch), getattr(torch, dtype))
    model.load_state_dict(tensors(torch, cfg, params, "llama", dtype), strict=True)
    return model


def ours(
    emu: tuple[Any, Any], cfg: EmuConfig, ids: np.ndarray, tokens: int, beams: int
) -> Callable[[], np.ndarray]:
    settings = TextConfig(max_new_tokens=tokens, min_length=tokens + 1, num_beams=beams)
    static, dynamic = (
        StaticSettings.of(settings, cfg.tokens),
        DynamicSettings.of(settings),
    )
    keys = jax.random.split(jax.random.key(0), len(ids))
    graphdef, state = emu

    @jax.jit
    def decode(state, ids):
        llama = nnx.merge(graphdef, state).llama
        x = llama.embed_tokens(ids)
        return text.decode(llama, x, jnp.ones(ids.shape, bool), static, dynamic, keys)

    def write() -> np.ndarray:
        with floors.precision(state.llama.norm.scale[...].dtype):
            return np.asarray(decode(state, ids))

    return write


def transformers_generate(
    torch: Any, model: Any, cfg: EmuConfig, ids: np.ndarray, tokens: int, beams: int
) -> np.ndarray:
    ids_there = torch.from_numpy(ids).long().to(floors.torch_device(torch))
    # All sequences have one length, so the penalty has no effect; greedy search warns about it.
    penalty = {"length_penalty": 0.0} if beams > 1 else {}
    with torch.no_grad():
        out = model.generate(
            ids_there,
            attention_mask=torch.ones_like(ids_there),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            num_beams=beams,
            do_sample=False,
            pad_token_id=cfg.tokens.pad,
            **penalty,
        )
    return out[:, ids.shape[1] :].cpu().numpy()


def count(part: Callable[[], Any], number: int) -> Callable[[], int]:
    """Returns a part for `take_turns` that runs `part` and returns `number`."""

    def counted() -> int:
        part()
        return number

    return counted
