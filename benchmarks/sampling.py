"""Sampling latents in 50 PNDM steps with guidance: emu_jax against diffusers.

Both have the same U-Net with random weights (56M parameters, 32 x 32 latents, the release's
layout with three resolutions; `size` 860M is the release's shape, "tiny" has one), the same noise
and the same conditions. A check compares their latents within 1e-4. diffusers runs as its users run
it: `UNet2DConditionModel` on both rows of guidance at once, and `PNDMScheduler` without Runge-Kutta
steps, so 50 steps are 51 calls. `channels_last` uses the memory format that torch recommends for
convolutions. `floor` is one call's FLOPs at this machine's fastest matmul. The parts take turns,
and figures are per call.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emu_jax import bench, diffusion
from emu_jax.config import EmuConfig, UNetConfig
from emu_jax.convert import export
from emu_jax.errors import UserError, suggest

floors, language = bench.load_benchmark("floors"), bench.load_benchmark("text_generation")

SIZES = {
    "56M": UNetConfig(
        sample_size=32,
        block_out_channels=(160, 320, 320),
        cross_attention_dim=512,
        down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
    ),
    "860M": UNetConfig(cross_attention_dim=768),
    "tiny": UNetConfig(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32,),
        attention_head_dim=4,
        cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    ),
}
GUIDANCE = 7.5


def run(
    size: str = "56M", steps: int = 50, turns: int = 5, rows: int = 1, dtype: str = "float32"
) -> dict:
    if size not in SIZES:
        raise UserError(f"no size {size!r}{suggest(size, SIZES)}")
    torch = language.torch_or_missing(dtype)
    small = language.config("digits")  # only its denoiser is used
    cfg = dataclasses.replace(small, unet=SIZES[size], vae=None)
    assert cfg.unet is not None
    params = language.random_params(cfg, dtype)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((rows, cfg.unet.sample_size, cfg.unet.sample_size, 4), np.float32)
    cond = rng.standard_normal((2 * rows, 32, cfg.unet.cross_attention_dim), np.float32)

    model = diffusers_model(torch, cfg, params, dtype)
    last = diffusers_model(torch, cfg, params, dtype).to(memory_format=torch.channels_last)
    denoise, sample = ours(cfg, params, noise, cond, steps)
    parts = {
        "ours": sample,
        "diffusers": lambda: theirs(torch, model, cfg, noise, cond, steps),
        "channels_last": lambda: theirs(torch, last, cfg, noise, cond, steps),
    }
    found = parts["ours"](), parts["diffusers"]()
    error = float(np.abs(found[0] - found[1]).max() / np.abs(found[1]).max())
    if dtype == "float32" and error > 1e-4:
        raise RuntimeError(f"latents differ from diffusers' by {error:.1e} of the largest")
    calls = len(diffusion.sampling_steps(cfg.scheduler, steps).t)
    timed = {name: language.count(part, calls) for name, part in parts.items()}
    seconds = bench.take_turns(timed | {"product": floors.peak(dtype)}, turns)
    flops = (denoise.cost_analysis() or {})["flops"]
    figures: dict[str, Any] = {
        "size": size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "latents": cfg.unet.sample_size,
        "rows": rows,
        "dtype": dtype,
        "calls": calls,
        "relative_error": error,
        "flops": flops,
        "floor_ms": bench.median([1e3 * flops * s for s in seconds["product"]]),
        "over_floor": bench.ratio(seconds["ours"], [flops * s for s in seconds["product"]]),
    }
    for name in parts:
        figures[name] = {
            "ms_a_call": bench.median([1e3 * s for s in seconds[name]]),
            "calls_a_second": bench.median([1 / s for s in seconds[name]]),
            "ours_times_as_fast": bench.ratio(seconds[name], seconds["ours"]),
        }
    return figures


def table(figures: dict) -> str:
    names = {
        "ours": "emu_jax",
        "diffusers": "diffusers",
        "channels_last": "diffusers, `channels_last`",
    }
    rows = [
        (
            about,
            figures[name]["ms_a_call"],
            figures[name]["ours_times_as_fast"] if name != "ours" else "",
        )
        for name, about in names.items()
    ]
    rows.append(("Floor", figures["floor_ms"], ""))
    return bench.markdown_table(("", "ms per call", "Speed-up of emu_jax"), rows)


def ours(cfg: EmuConfig, params: dict, noise: np.ndarray, cond: np.ndarray, steps: int):
    """Returns a compiled call of the denoiser, and the sampler."""
    graphdef, state = language.emu_of(cfg, params)
    dtype = params["unet.conv_in.kernel"].dtype
    start = jnp.asarray(noise, dtype)
    guided, unguided = jnp.split(jnp.asarray(cond, dtype), 2)

    @jax.jit
    def sample(state, guidance):
        unet = nnx.merge(graphdef, state).unet
        return diffusion.sample(
            unet, start, guided, unguided, cfg=cfg.scheduler, steps=steps, guidance=guidance
        )

    @jax.jit
    def denoise(state, x, t, cond):
        return nnx.merge(graphdef, state).unet(x, t, cond)

    both = jnp.concatenate([start, start])
    with floors.precision(dtype):
        once = denoise.lower(state, both, jnp.zeros(len(both)), jnp.concatenate([guided, unguided]))

    def latents() -> np.ndarray:
        with floors.precision(dtype):
            return np.asarray(sample(state, jnp.float32(GUIDANCE)), np.float32)

    return once.compile(), latents


def diffusers_model(torch: Any, cfg: EmuConfig, params: dict, dtype: str) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    assert cfg.unet is not None
    values = export.diffusers_json(cfg.unet)
    values.pop("_class_name")
    model = UNet2DConditionModel(**values).eval()
    model.to(floors.torch_device(torch), getattr(torch, dtype))
    model.load_state_dict(language.tensors(torch, cfg, params, "unet", dtype), strict=True)
    return model


def theirs(torch: Any, model: Any, cfg: EmuConfig, noise: np.ndarray, cond: np.ndarray, steps: int):
    from diffusers.schedulers.scheduling_pndm import PNDMScheduler

    values = export.diffusers_json(cfg.scheduler)
    values.pop("_class_name")
    scheduler: Any = PNDMScheduler(**values)
    scheduler.set_timesteps(steps)
    where = (floors.torch_device(torch), model.dtype)
    x = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()).to(*where)
    both = torch.from_numpy(cond).to(*where)
    with torch.no_grad():
        for t in scheduler.timesteps:
            out, unconditional = model(
                torch.cat([x, x]), t, encoder_hidden_states=both
            ).sample.chunk(2)
            out = unconditional + GUIDANCE * (out - unconditional)
            x = scheduler.step(out, t, x).prev_sample
    return x.float().cpu().numpy().transpose(0, 2, 3, 1)
