"""AdamW with a learning rate per group of parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from emu_jax.errors import UserError
from emu_jax.sharding import dotted
from emu_jax.train.config import EIGHT_BITS, GroupConfig, OptimizerConfig
from emu_jax.train.moments import (
    Quantized,
    block_axis,
    dequantize,
    encode_mu,
    encode_nu,
    rounding_bits,
)

Tree = TypeVar("Tree")  # moments of any structure


def group_of(path: str, cfg: OptimizerConfig) -> GroupConfig:
    """Returns the first group whose pattern matches the dotted path of a parameter.

    Raises:
        UserError: no group matches.
    """
    for group in cfg.groups:
        if re.search(group.pattern, path):
            return group
    raise UserError(f"no optimizer group matches parameter {path}: add a last group '.*'")


def schedule(group: GroupConfig, steps: int) -> optax.Schedule:
    """Returns zero for `delay_steps`, linear warm-up, then `group.decay` to the last step."""
    start = group.delay_steps + group.warmup_steps
    rest = max(1, steps - start)
    if group.decay == "cosine":
        tail = optax.cosine_decay_schedule(group.lr, rest, group.final_fraction)
    elif group.decay == "linear":
        tail = optax.linear_schedule(group.lr, group.lr * group.final_fraction, rest)
    elif group.decay == "constant":
        tail = optax.constant_schedule(group.lr)
    else:
        at, rates = [step for step, _ in group.drops], [rate for _, rate in group.drops]
        tail = optax.join_schedules(
            [optax.constant_schedule(rate) for rate in (group.lr, *rates)],
            [int(step) - start for step in at],
        )
    parts = [optax.constant_schedule(0.0), optax.linear_schedule(0.0, group.lr, group.warmup_steps)]
    return optax.join_schedules([*parts, tail], [group.delay_steps, start])


def make_optimizer(
    cfg: OptimizerConfig,
    steps: int,
    params: Any,
    axes: Mapping[str, tuple[str | None, ...]] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation for `params` (a nested dict of arrays, or of their shapes; a flat
    one for 8-bit moments).

    Its `update` also takes the gradient's `norm`, and whether the step is `finite`. If it is not,
    the state stays the same and the updates are meaningless.

    Args:
        axes: logical axes of the parameters, which decide how 8-bit moments are split into blocks.

    Raises:
        UserError: no group matches a parameter.
    """
    groups = jax.tree_util.tree_map_with_path(lambda p, _: group_of(dotted(p), cfg), params)
    decayed = jax.tree_util.tree_map_with_path(lambda p, x: _decays(dotted(p), x), params)
    blocks = {}
    if cfg.moments_dtype == EIGHT_BITS:
        blocks = {p: block_axis(p, x.shape, (axes or {}).get(p)) for p, x in params.items()}
    return optax.chain(
        _clip(cfg.clip_norm),
        _scale_by_adam(cfg, blocks),
        optax.add_decayed_weights(cfg.weight_decay, decayed),
        _scale_by_groups(groups, {g: schedule(g, steps) for g in cfg.groups}),
    )


def last_update(
    params: dict[str, jax.Array],
    state: optax.OptState,
    cfg: OptimizerConfig,
    steps: int,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Computes the update that the optimizer made last, and its learning rates, from its state.

    A step that also returned norms of its updates would have to read all moments again.

    Args:
        params: {dotted path: parameter} after the update, which was of a finite step.
        state: the optimizer's, after the update.

    Returns:
        {dotted path: update} (with rounding errors, and those of bfloat16 or 8-bit moments), and
        {dotted path: learning rate}.
    """
    assert isinstance(state, tuple)
    _, adam, _, scheduled = state  # of the chain in `make_optimizer`
    assert isinstance(adam, optax.ScaleByAdamState)
    assert isinstance(scheduled, optax.ScaleByScheduleState)
    directions = _direction(_decoded(adam.mu), _decoded(adam.nu), adam.count, cfg)
    schedules = {group: schedule(group, steps)(scheduled.count - 1) for group in cfg.groups}
    rates = {path: jnp.asarray(schedules[group_of(path, cfg)]) for path in params}
    updates = {}
    for path, param in params.items():
        # new = old - rate * (direction + decay * old), solved for new - old
        decay = cfg.weight_decay if _decays(path, param) else 0.0
        step = directions[path] + decay * param
        updates[path] = -rates[path] * step / (1 - rates[path] * decay)
    return updates, rates


def _decays(path: str, x: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Returns whether weight decay applies to a parameter, given the array or its shape."""
    # Only matrices decay. Stacked vectors are matrices too, and are recognized by their names.
    return x.ndim > 1 and not re.search(r"(bias|scale)$", path)


def _transformation(init: Any, update: Any) -> optax.GradientTransformationExtraArgs:
    """Returns optax's class. `Any`, because its types lack required extra arguments."""
    return optax.GradientTransformationExtraArgs(init, update)


def _clip(clip_norm: float) -> optax.GradientTransformationExtraArgs:
    """Scales gradients whose norm is above `clip_norm` down to it."""

    def update(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        *,
        norm: Float[Array, ""],
        **_: jax.Array,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        factor = jnp.minimum(1, clip_norm / norm)
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates), state

    return _transformation(optax.init_empty_state, update)


def _scale_by_adam(
    cfg: OptimizerConfig, blocks: Mapping[str, int | None]
) -> optax.GradientTransformationExtraArgs:
    """Returns `optax.scale_by_adam`, except that a non-finite step leaves the moments as they are.

    The updates are computed from the selected moments. If the old moments were selected after the
    updates, XLA's CPU compiler would copy all of them before it updates them in place.

    Args:
        blocks: for 8-bit moments, the axes along which parameters are quantized.
    """
    quantized = cfg.moments_dtype == EIGHT_BITS
    mu_dtype = "float32" if quantized else cfg.moments_dtype
    adam = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=mu_dtype)

    def encoded(mu: Any, nu: Any, noise: Mapping[str, jax.Array]) -> tuple[Any, Any]:
        axes = {path: axis for path, axis in blocks.items() if axis is not None}
        return (
            mu | {p: encode_mu(mu[p], axis, noise.get(p)) for p, axis in axes.items()},
            nu | {p: encode_nu(nu[p], axis, noise.get(p)) for p, axis in axes.items()},
        )

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        state = adam.init(params)
        assert isinstance(state, optax.ScaleByAdamState)
        if quantized:
            # Zeros are encoded as zeros. XLA would encode them as it compiles, slowly.
            shapes = jax.eval_shape(encoded, state.mu, state.nu, {})
            mu, nu = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            state = state._replace(mu=mu, nu=nu)
        return state

    def update(
        updates: optax.Updates,
        state: optax.ScaleByAdamState,
        params: optax.Params | None = None,
        *,
        finite: Bool[Array, ""],
        **_: jax.Array,
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        count = optax.safe_increment(state.count)
        old = _decoded(state.mu), _decoded(state.nu)
        new = (
            optax.tree.update_moment(updates, old[0], cfg.b1, 1),
            optax.tree.update_moment_per_elem_norm(updates, old[1], cfg.b2, 2),
        )
        mu, nu = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        if quantized:
            noise = rounding_bits(count, blocks, {path: x.shape for path, x in mu.items()})
            stored = encoded(mu, nu, noise)
            kept = state.mu, state.nu  # rounding them again would change them
            stored = jax.tree.map(lambda n, o: jnp.where(finite, n, o), stored, kept)
        else:
            stored = optax.tree.cast(mu, mu_dtype), nu
        updates = _direction(mu, nu, count, cfg)
        count = jnp.where(finite, count, state.count)
        return updates, optax.ScaleByAdamState(count, *stored)

    return _transformation(init, update)


def _decoded(moments: optax.Updates) -> Any:
    """Converts quantized moments to float32; others stay as they are."""
    is_quantized = lambda x: isinstance(x, Quantized)  # noqa: E731
    return jax.tree.map(
        lambda x: dequantize(x) if is_quantized(x) else x, moments, is_leaf=is_quantized
    )


def _direction(mu: Tree, nu: Tree, count: jax.typing.ArrayLike, cfg: OptimizerConfig) -> Tree:
    """Returns Adam's updates before weight decay and learning rates."""
    return jax.tree.map(
        lambda m, v: m / (jnp.sqrt(v) + cfg.eps),
        optax.tree.bias_correction(mu, cfg.b1, count),
        optax.tree.bias_correction(nu, cfg.b2, count),
    )


def _scale_by_groups(
    groups: Any, schedules: dict[GroupConfig, optax.Schedule]
) -> optax.GradientTransformationExtraArgs:
    """Multiplies each update by minus the learning rate of its group."""

    def update(
        updates: optax.Updates,
        state: optax.ScaleByScheduleState,
        params: optax.Params | None = None,
        *,
        finite: Bool[Array, ""],
        **_: jax.Array,
    ) -> tuple[optax.Updates, optax.ScaleByScheduleState]:
        rates = {group: rate(state.count) for group, rate in schedules.items()}
        updates = jax.tree.map(lambda u, g: -jnp.asarray(rates[g], u.dtype) * u, updates, groups)
        count = jnp.where(finite, optax.safe_increment(state.count), state.count)
        return updates, optax.ScaleByScheduleState(count)

    init = lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))  # noqa: E731
    return _transformation(init, update)
