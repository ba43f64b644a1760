"""Diffusion: the noise schedule, and samplers with classifier-free guidance.

A sampler is a table with one row for each call of the denoiser (`Steps`): each of PNDM, DDIM
and DPM-Solver++ moves to a weighted sum of the latents it stands on, those it began with, and
what the denoiser said last. So one loop, compiled once, runs them all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from emu_jax.config import SchedulerConfig
from emu_jax.errors import UserError, suggest
from emu_jax.models.backend import kernels


@functools.cache
def alphas_cumprod(cfg: SchedulerConfig) -> Float[np.ndarray, "S"]:
    """The share of signal variance left at each training timestep, float64, read-only.

    Raises:
        UserError: an unknown `beta_schedule`.
    """
    start, end, steps = cfg.beta_start, cfg.beta_end, cfg.num_train_timesteps
    if cfg.beta_schedule == "linear":
        betas = np.linspace(start, end, steps)
    elif cfg.beta_schedule == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, steps) ** 2
    else:
        raise _unknown("scheduler.beta_schedule", cfg.beta_schedule, ["linear", "scaled_linear"])
    alphas = np.cumprod(1.0 - betas)
    alphas.flags.writeable = False
    return alphas


def add_noise(
    cfg: SchedulerConfig,
    latents: Float[Array, "B h w C"],
    noise: Float[Array, "B h w C"],
    timesteps: Int[Array, "B"],
) -> Float[Array, "B h w C"]:
    """The latents at `timesteps` of the forward process: sqrt(a) latents + sqrt(1 - a) noise."""
    signal, spread = _signal_and_spread(cfg, timesteps, latents.dtype)
    return signal * latents + spread * noise


def denoiser_target(
    cfg: SchedulerConfig,
    latents: Float[Array, "B h w C"],
    noise: Float[Array, "B h w C"],
    timesteps: Int[Array, "B"],
) -> Float[Array, "B h w C"]:
    """Returns the denoiser's training target: the noise, or the velocity sqrt(a) noise -
    sqrt(1 - a) latents, according to `cfg.prediction_type`."""
    if _predicts_velocity(cfg):
        signal, spread = _signal_and_spread(cfg, timesteps, latents.dtype)
        return signal * noise - spread * latents
    return noise


def _signal_and_spread(
    cfg: SchedulerConfig, timesteps: Int[Array, "B"], dtype: DTypeLike
) -> tuple[Float[Array, "B 1 1 1"], Float[Array, "B 1 1 1"]]:
    alphas = alphas_cumprod(cfg)
    tables = jnp.asarray(alphas**0.5, dtype), jnp.asarray((1 - alphas) ** 0.5, dtype)
    signal, spread = (table[timesteps][:, None, None, None] for table in tables)
    return signal, spread


class Steps(NamedTuple):
    """A sampler as numbers; S rows, one for each call of the denoiser.

    With x the latents, x0 those that sampling began with and e what the denoiser says at (x, t):
      m = convert[0] x + convert[1] e
      x <- carry[0] x + carry[1] x0 + weights . (m, and the last three m kept, newest first)
    """

    t: Int[np.ndarray, "S"]
    convert: Float[np.ndarray, "S 2"]
    carry: Float[np.ndarray, "S 2"]
    weights: Float[np.ndarray, "S 4"]
    keep: Bool[np.ndarray, "S"]  # whether later rows see this m


def sampling_steps(cfg: SchedulerConfig, steps: int, method: str = "pndm") -> Steps:
    """The table of `method` ("pndm", "ddim" or "dpm++") for `steps` steps.

    Raises:
        UserError: an unknown method, spacing or schedule, or a number of steps that does not
            fit the schedule.
    """
    if method not in METHODS:
        raise _unknown("sampler", method, METHODS)
    if not 1 <= steps <= cfg.num_train_timesteps:
        raise UserError(
            f"{steps} sampling steps: give a number from 1 to {cfg.num_train_timesteps}, the "
            "timesteps of training"
        )
    return METHODS[method](cfg, steps)


def padded_steps(cfg: SchedulerConfig, steps: int, method: str) -> tuple[Steps, int]:
    """Returns `sampling_steps` padded to the longest table of `cfg`, and the number of its rows.

    All numbers of steps and all methods then have one shape, and share one compiled program.
    """
    table = sampling_steps(cfg, steps, method)
    count = len(table.t)
    more = cfg.num_train_timesteps + 1 - count  # PNDM has one row more than steps
    return Steps(*(np.pad(a, [(0, more)] + [(0, 0)] * (a.ndim - 1)) for a in table)), count


class SamplerState(NamedTuple):
    """Sampling between two calls of the denoiser, in float32."""

    latents: Float[Array, "B h w C"]
    initial: Float[Array, "B h w C"]
    past: Float[Array, "3 B h w C"]  # the last three m, newest first


def start(latents: Float[Array, "B h w C"]) -> SamplerState:
    """The state before the first step."""
    latents = latents.astype(jnp.float32)
    return SamplerState(latents, latents, jnp.zeros((3, *latents.shape), jnp.float32))


def sample(
    denoise: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    latents: Float[Array, "B h w C"],
    cond: Float[Array, "B N D"],
    uncond: Float[Array, "B N D"] | None = None,
    *,
    cfg: SchedulerConfig,
    steps: int = 50,
    guidance: float | Float[Array, ""] = 7.5,
    method: str = "pndm",
) -> Float[Array, "B h w C"]:
    """Latents (scaled, for `VAE.decode`: divide by its scaling factor) from Gaussian ones.

    Pure, so that a caller's jit holds the whole loop; see `advance`. The latents' dtype is what
    `denoise` sees; sums are taken in float32.
    """
    table = sampling_steps(cfg, steps, method)
    state = advance(
        denoise,
        start(latents),
        cond,
        uncond,
        table=table,
        first=0,
        last=len(table.t),
        guidance=guidance,
        dtype=latents.dtype,
    )
    return state.latents.astype(latents.dtype)


def advance(
    denoise: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    state: SamplerState,
    cond: Float[Array, "B N D"],
    uncond: Float[Array, "B N D"] | None = None,
    *,
    table: Steps,
    first: int | Int[Array, ""],
    last: int | Int[Array, ""],
    guidance: float | Float[Array, ""] = 7.5,
    dtype: jnp.dtype | None = None,
) -> SamplerState:
    """Takes rows `first` to `last` (exclusive) of a sampler's table.

    `denoise(latents, timesteps [B'], cond)` is the denoiser, called once a row on B' = 2 B rows,
    conditional ones first (on a CPU once for either half); its answers are moved apart by
    `guidance`: uncond + guidance (cond - uncond). Without `uncond`, or with a Python number of 1
    or less as guidance, it is called on the B conditional rows alone, as the release does. Traced
    guidance, table and bounds need no new compilation for other values.

    Args:
        dtype: of the latents that `denoise` sees; that of `cond` by default.
    """
    if not isinstance(guidance, jax.Array) and guidance <= 1.0:
        uncond = None
    dtype = cond.dtype if dtype is None else dtype

    def call(x: jax.Array, t: jax.Array, cond: jax.Array) -> jax.Array:
        return denoise(x, jnp.broadcast_to(t, x.shape[:1]), cond).astype(jnp.float32)

    guided = None if uncond is None else kernels().guided_denoiser(call, cond, uncond)
    table = jax.tree.map(jnp.asarray, table)

    def predict(x: jax.Array, t: jax.Array) -> jax.Array:
        x = x.astype(dtype)
        if guided is None:
            return call(x, t, cond)
        out, unconditional = guided(x, t)
        return unconditional + guidance * (out - unconditional)

    def step(i: jax.Array, state: SamplerState) -> SamplerState:
        x, row = state.latents, jax.tree.map(lambda column: column[i], table)
        m = row.convert[0] * x + row.convert[1] * predict(x, row.t)
        recent = jnp.concatenate([m[None], state.past])
        weights = row.weights[:, None, None, None, None]
        x = row.carry[0] * x + row.carry[1] * state.initial + jnp.sum(weights * recent, 0)
        return SamplerState(x, state.initial, jnp.where(row.keep, recent[:-1], state.past))

    return jax.lax.fori_loop(first, last, step, state)


def _pndm(cfg: SchedulerConfig, steps: int) -> Steps:
    """PNDM without Runge-Kutta steps, that is PLMS (arXiv 2202.09778, formulas 9, 12 and 13;
    diffusers 0.21, `PNDMScheduler`). Visits its second timestep twice: steps + 1 rows."""
    if not cfg.skip_prk_steps:
        raise UserError("the sampler 'pndm' needs scheduler.skip_prk_steps = true")
    t = _timesteps(cfg, steps)
    t = np.concatenate([t[:2], t[1:2], t[2:]])
    stride = cfg.num_train_timesteps // steps
    # The first step is taken twice, the second time with the mean slope of both ends.
    start, repeated = t.copy(), np.arange(len(t)) == 1
    start[repeated] += stride
    a, a_next = _alphas(cfg, start, start - stride)

    # Adams-Bashforth of as high an order as there are slopes.
    orders = np.array([[24, 0, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]]) / 24
    seen = np.maximum(np.arange(len(t)) - 1, 0)
    slope = orders[np.minimum(seen, 3)]
    slope[repeated] = [0.5, 0.5, 0, 0]

    along = (a_next / a) ** 0.5
    across = (a - a_next) / (a * (1 - a_next) ** 0.5 + (a * (1 - a) * a_next) ** 0.5)
    if _predicts_velocity(cfg):
        along = along + across * (1 - a) ** 0.5
        across = across * a**0.5
    return _table(
        t,
        convert=np.tile([0.0, 1.0], (len(t), 1)),
        carry=along[:, None] * np.stack([~repeated, repeated], 1),
        weights=across[:, None] * slope,
        keep=~repeated,
    )


def _ddim(cfg: SchedulerConfig, steps: int) -> Steps:
    """DDIM with eta = 0 (arXiv 2010.02502, formula 12; diffusers 0.21, `DDIMScheduler`)."""
    t = _timesteps(cfg, steps)
    a, a_next = _alphas(cfg, t, t - cfg.num_train_timesteps // steps)
    along = (a_next / a) ** 0.5
    across = (1 - a_next) ** 0.5 - (a_next * (1 - a) / a) ** 0.5
    noise = _noise_conversion(cfg, a)
    return _table(t, convert=noise, carry=_first(along), weights=_first(across, 4))


def _dpm(cfg: SchedulerConfig, steps: int) -> Steps:
    """DPM-Solver++(2M), midpoint (arXiv 2211.01095, algorithm 2), ending without noise by a
    first-order step (diffusers, `DPMSolverMultistepScheduler` as it is by default)."""
    t = _timesteps(cfg, steps, ends=True)
    a = alphas_cumprod(cfg)[t]
    signal, spread = np.append(a**0.5, 1.0), np.append((1 - a) ** 0.5, 0.0)
    ratio = spread / signal  # log ratio is -lambda of the paper

    along = spread[1:] / spread[:-1]
    across = signal[1:] * (1 - ratio[1:] / ratio[:-1])
    ahead = np.log(ratio[:-1] / np.append(ratio[1:-1], np.nan))  # h, unused at the end
    extrapolate = np.zeros(len(t))  # weight of the change of m, 1 / (2 r)
    extrapolate[1:-1] = ahead[1:-1] / ahead[:-2] / 2
    weights = np.zeros((len(t), 4))
    weights[:, 0] = across * (1 + extrapolate)
    weights[:, 1] = -across * extrapolate
    return _table(t, convert=_latents_conversion(cfg, a), carry=_first(along), weights=weights)


METHODS: dict[str, Callable[[SchedulerConfig, int], Steps]] = {
    "pndm": _pndm,
    "ddim": _ddim,
    "dpm++": _dpm,
}


def _table(
    t: np.ndarray,
    *,
    convert: Any,
    carry: Any,
    weights: Any,
    keep: np.ndarray | None = None,
) -> Steps:
    """`Steps` in the device's dtypes; every m is kept unless `keep` says otherwise."""
    keep = np.ones(len(t), bool) if keep is None else keep
    convert, carry, weights = (np.asarray(x, np.float32) for x in (convert, carry, weights))
    return Steps(t.astype(np.int32), convert, carry, weights, keep)


def _first(column: np.ndarray, width: int = 2) -> np.ndarray:
    """`column` and zeros beside it."""
    return np.pad(column[:, None], ((0, 0), (0, width - 1)))


def _timesteps(cfg: SchedulerConfig, steps: int, ends: bool = False) -> Int[np.ndarray, "S"]:
    """Training timesteps to visit, from noise to picture (arXiv 2305.08891, table 2).

    With `ends` the spacing counts the clean end as a point too (DPM-Solver).
    """
    train, points = cfg.num_train_timesteps, steps + ends
    if cfg.timestep_spacing == "leading":
        t = np.arange(points) * (train // points) + cfg.steps_offset
    elif cfg.timestep_spacing == "linspace":
        t = np.linspace(0, train - 1, points).round().astype(int)
    elif cfg.timestep_spacing == "trailing":
        t = np.arange(train, 0, -train / steps).round().astype(int)[::-1] - 1
    else:
        raise _unknown(
            "scheduler.timestep_spacing", cfg.timestep_spacing, ["leading", "linspace", "trailing"]
        )
    if t[-1] >= train or points > train:
        raise UserError(
            f"{steps} sampling steps do not fit between {train} timesteps of training with "
            f"steps_offset {cfg.steps_offset}: give fewer"
        )
    return t[::-1][:steps]


def _alphas(
    cfg: SchedulerConfig, t: np.ndarray, t_next: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Signal shares at `t` and at `t_next`, which may lie past the clean end."""
    alphas = alphas_cumprod(cfg)
    clean = 1.0 if cfg.set_alpha_to_one else alphas[0]
    return alphas[t], np.where(t_next >= 0, alphas[t_next], clean)


def _noise_conversion(cfg: SchedulerConfig, a: np.ndarray) -> np.ndarray:
    """Weights on (latents, what the denoiser says) that give the noise."""
    if _predicts_velocity(cfg):
        return np.stack([(1 - a) ** 0.5, a**0.5], 1)
    return np.tile([0.0, 1.0], (len(a), 1))


def _latents_conversion(cfg: SchedulerConfig, a: np.ndarray) -> np.ndarray:
    """Weights on (latents, what the denoiser says) that give the noiseless latents."""
    if _predicts_velocity(cfg):
        return np.stack([a**0.5, -((1 - a) ** 0.5)], 1)
    return np.stack([a**-0.5, -((1 / a - 1) ** 0.5)], 1)


def _predicts_velocity(cfg: SchedulerConfig) -> bool:
    if cfg.prediction_type not in ("epsilon", "v_prediction"):
        raise _unknown(
            "scheduler.prediction_type", cfg.prediction_type, ["epsilon", "v_prediction"]
        )
    return cfg.prediction_type == "v_prediction"


def _unknown(what: str, value: str, known: Iterable[str]) -> UserError:
    return UserError(f"unknown {what} {value!r}{suggest(value, known)}")
