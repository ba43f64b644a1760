"""Diffusion: the noise schedule, and samplers with classifier-free guidance.

A sampler is a table with one row for each call of the denoiser (`Steps`). PNDM, DDIM,
DPM-Solver++ and Euler all move to a weighted sum of the current latents, the initial latents, and
the last outputs of the denoiser. One loop, compiled once, runs them all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import ArrayLike

from emu_jax.config import SchedulerConfig
from emu_jax.errors import UserError, suggest
from emu_jax.models.backend import kernels

# Latents, timesteps and condition to the predicted noise or velocity.
Denoiser: TypeAlias = Callable[
    [Float[Array, "B h w C"], Int[Array, "B"], Float[Array, "B N D"]], Float[Array, "B h w C"]
]


@functools.cache
def alphas_cumprod(cfg: SchedulerConfig) -> Float[np.ndarray, "timesteps"]:
    """Returns the fraction of signal variance left at each training timestep, float64, read-only.

    Raises:
        UserError: `beta_schedule` is unknown.
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
    """Returns sqrt(a) latents + sqrt(1 - a) noise, the forward process at `timesteps`."""
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
    """A sampler as numbers: a row for each call of the denoiser.

    With x the latents, x0 the initial latents, and e the denoiser's output at (x, t):
      m = convert[0] x + convert[1] e
      x <- carry[0] x + carry[1] x0 + weights . (m, and the last three m kept, newest first)
    """

    t: Int[np.ndarray, "steps"]
    convert: Float[np.ndarray, "steps 2"]
    carry: Float[np.ndarray, "steps 2"]
    weights: Float[np.ndarray, "steps 4"]
    keep: Bool[np.ndarray, "steps"]  # whether later rows see this m


def sampling_steps(cfg: SchedulerConfig, steps: int, method: str = "pndm") -> Steps:
    """Returns the table of `method` (a name in `METHODS`) for `steps` steps.

    Raises:
        UserError: the method, spacing or schedule is unknown, the number of steps does not fit
            the schedule, or the schedule does not fit the method.
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
    """Returns `sampling_steps` padded to the longest table of `cfg`, and its number of rows.

    The number of rows excludes padding. Tables of all methods and numbers of steps have one shape,
    and share one compiled program.
    """
    table = sampling_steps(cfg, steps, method)
    count = len(table.t)
    more = cfg.num_train_timesteps + 1 - count  # PNDM has one row more than steps
    return Steps(*(np.pad(a, [(0, more)] + [(0, 0)] * (a.ndim - 1)) for a in table)), count


class SamplerState(NamedTuple):
    """State of sampling between two calls of the denoiser, in float32."""

    latents: Float[Array, "B h w C"]
    initial: Float[Array, "B h w C"]
    past: Float[Array, "3 B h w C"]  # the last three m, newest first


def initial_state(latents: Float[Array, "B h w C"]) -> SamplerState:
    """Returns the state before the first step."""
    latents = latents.astype(jnp.float32)
    return SamplerState(latents, latents, jnp.zeros((3, *latents.shape), jnp.float32))


def sample(
    denoise: Denoiser,
    latents: Float[Array, "B h w C"],
    cond: Float[Array, "B N D"],
    uncond: Float[Array, "B N D"] | None = None,
    *,
    cfg: SchedulerConfig,
    steps: int = 50,
    guidance: float | Float[Array, ""] = 7.5,
    method: str = "pndm",
) -> Float[Array, "B h w C"]:
    """Denoises Gaussian latents. Divide the result by the VAE's scaling factor for `VAE.decode`.

    This is a pure function: a caller can jit the whole loop. `denoise` gets latents in the dtype of
    `latents`; sums are taken in float32. See `advance` for the arguments.
    """
    table = sampling_steps(cfg, steps, method)
    state = advance(
        denoise,
        initial_state(latents),
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
    denoise: Denoiser,
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
    """Runs rows `first` to `last` (exclusive) of a sampler's table.

    `denoise(latents, timesteps [B'], cond)` is called once per row of the table, on a batch of
    B' = 2 B, conditional half first (on a CPU, once for each half). Classifier-free guidance
    combines its outputs as uncond + guidance (cond - uncond). Without `uncond`, or if `guidance`
    is a Python number of at most 1, only the conditional half runs, as in the release. New values
    of a traced guidance, table or bound need no new compilation.

    Args:
        dtype: dtype of the latents that `denoise` gets; by default that of `cond`.
    """
    if not isinstance(guidance, jax.Array) and guidance <= 1.0:
        uncond = None
    dtype = cond.dtype if dtype is None else dtype

    def call(
        x: Float[Array, "B h w C"], t: Int[Array, ""], cond: Float[Array, "B N D"]
    ) -> Float[Array, "B h w C"]:
        return denoise(x, jnp.broadcast_to(t, x.shape[:1]), cond).astype(jnp.float32)

    guided = None if uncond is None else kernels().guided_denoiser(call, cond, uncond)
    table = jax.tree.map(jnp.asarray, table)

    def predict(x: Float[Array, "B h w C"], t: Int[Array, ""]) -> Float[Array, "B h w C"]:
        x = x.astype(dtype)
        if guided is None:
            return call(x, t, cond)
        out, unconditional = guided(x, t)
        return unconditional + guidance * (out - unconditional)

    def step(i: Int[Array, ""], state: SamplerState) -> SamplerState:
        x, row = state.latents, jax.tree.map(lambda column: column[i], table)
        m = row.convert[0] * x + row.convert[1] * predict(x, row.t)
        recent = jnp.concatenate([m[None], state.past])
        weights = row.weights[:, None, None, None, None]
        x = row.carry[0] * x + row.carry[1] * state.initial + jnp.sum(weights * recent, 0)
        return SamplerState(x, state.initial, jnp.where(row.keep, recent[:-1], state.past))

    return jax.lax.fori_loop(first, last, step, state)


def _pndm(cfg: SchedulerConfig, steps: int) -> Steps:
    """PNDM without Runge-Kutta steps, also called PLMS (arXiv 2202.09778, formulas 9, 12 and 13;
    diffusers 0.21, `PNDMScheduler`). It visits the second timestep twice: steps + 1 rows."""
    if not cfg.skip_prk_steps:
        raise UserError("the sampler 'pndm' needs scheduler.skip_prk_steps = true")
    t = _timesteps(cfg, steps)
    t = np.concatenate([t[:2], t[1:2], t[2:]])
    stride = cfg.num_train_timesteps // steps
    # The first step is taken twice, the second time with the mean slope of both ends.
    start, repeated = t.copy(), np.arange(len(t)) == 1
    start[repeated] += stride
    a, a_next = _alphas(cfg, start, start - stride)

    # Adams-Bashforth of the highest order, up to 4, that the slopes so far allow.
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
    return _deterministic(cfg, t, *_alphas(cfg, t, t - cfg.num_train_timesteps // steps))


def _euler(cfg: SchedulerConfig, steps: int) -> Steps:
    """Euler's method (arXiv 2206.00364, algorithm 2 without churn; diffusers 0.24,
    `EulerDiscreteScheduler`).

    Its latents are x / sqrt(a), so its step is DDIM's from one timestep to the next. The last step
    removes all noise, whatever `set_alpha_to_one` is.
    """
    if cfg.timestep_spacing != "leading":  # with others diffusers starts from other noise
        raise UserError("the sampler 'euler' needs scheduler.timestep_spacing = leading")
    t = _timesteps(cfg, steps)
    alphas = alphas_cumprod(cfg)
    return _deterministic(cfg, t, alphas[t], np.append(alphas[t[1:]], 1.0))


def _deterministic(
    cfg: SchedulerConfig,
    t: Int[np.ndarray, "steps"],
    a: Float[np.ndarray, "steps"],
    a_next: Float[np.ndarray, "steps"],
) -> Steps:
    """Returns DDIM's table with eta = 0, given the signal variances before and after each step."""
    along = (a_next / a) ** 0.5
    across = (1 - a_next) ** 0.5 - (a_next * (1 - a) / a) ** 0.5
    noise = _noise_conversion(cfg, a)
    return _table(t, convert=noise, carry=_first(along), weights=_first(across, 4))


def _dpm(cfg: SchedulerConfig, steps: int) -> Steps:
    """DPM-Solver++(2M), midpoint (arXiv 2211.01095, algorithm 2; diffusers,
    `DPMSolverMultistepScheduler` with its defaults). The last step is first-order and removes all
    noise."""
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
    "euler": _euler,
}


def _table(
    t: Int[np.ndarray, "steps"],
    *,
    convert: ArrayLike,
    carry: ArrayLike,
    weights: ArrayLike,
    keep: Bool[np.ndarray, "steps"] | None = None,
) -> Steps:
    """Returns `Steps` in the device's dtypes. Every m is kept unless `keep` is given."""
    keep = np.ones(len(t), bool) if keep is None else keep
    a, b, c = (np.asarray(x, np.float32) for x in (convert, carry, weights))
    return Steps(t.astype(np.int32), a, b, c, keep)


def _first(
    column: Float[np.ndarray, "steps"], width: int = 2
) -> Float[np.ndarray, "steps {width}"]:
    """Pads `column` with columns of zeros to `width`."""
    return np.pad(column[:, None], ((0, 0), (0, width - 1)))


def _timesteps(cfg: SchedulerConfig, steps: int, ends: bool = False) -> Int[np.ndarray, "steps"]:
    """Returns the training timesteps to visit, from noise to image (arXiv 2305.08891, table 2).

    With `ends`, the spacing also counts the clean end as a point (DPM-Solver).
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
    cfg: SchedulerConfig, t: Int[np.ndarray, "steps"], t_next: Int[np.ndarray, "steps"]
) -> tuple[Float[np.ndarray, "steps"], Float[np.ndarray, "steps"]]:
    """Returns signal variances at `t` and at `t_next`, which may be past the clean end."""
    alphas = alphas_cumprod(cfg)
    clean = 1.0 if cfg.set_alpha_to_one else alphas[0]
    return alphas[t], np.where(t_next >= 0, alphas[t_next], clean)


def _noise_conversion(
    cfg: SchedulerConfig, a: Float[np.ndarray, "steps"]
) -> Float[np.ndarray, "steps 2"]:
    """Returns weights on (latents, denoiser output) that give the noise."""
    if _predicts_velocity(cfg):
        return np.stack([(1 - a) ** 0.5, a**0.5], 1)
    return np.tile([0.0, 1.0], (len(a), 1))


def _latents_conversion(
    cfg: SchedulerConfig, a: Float[np.ndarray, "steps"]
) -> Float[np.ndarray, "steps 2"]:
    """Returns weights on (latents, denoiser output) that give the noiseless latents."""
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
