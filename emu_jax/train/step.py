"""The training step: its state, the loss, gradients and the update."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from emu_jax.checkpoint import tower_of
from emu_jax.errors import UserError
from emu_jax.models.attention import choose_backend
from emu_jax.models.quantized import (
    Parameter,
    Quantization,
    QuantizedMatrix,
    is_quantized,
    quantize,
)
from emu_jax.sharding import (
    AbstractModel,
    Device,
    batch_sharding,
    choose_mesh,
    context_ways,
    fitted,
    make_mesh,
    row_shares,
    row_ways,
    slice_count,
)
from emu_jax.train.config import TrainConfig
from emu_jax.train.objectives import Batch, Metrics, get_objective, objective_class
from emu_jax.train.optimizer import group_of, last_update, make_optimizer

Params = dict[str, jax.Array]
ModelParams = Mapping[str, Parameter]  # of trained and frozen parameters together
COMPILE_SECONDS = 3600  # how long processes wait for each other to compile


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything a step reads and writes. Parameters are flat: {dotted path: array}."""

    step: jax.Array  # steps done, int32
    trained: Params
    frozen: dict[str, Parameter]
    optimizer: optax.OptState
    ema: Params  # of `trained`; empty unless weights are averaged
    bad_steps: jax.Array  # consecutive non-finite steps
    skipped_steps: jax.Array  # non-finite steps so far


class Trainer:
    """A run's objective and optimizer, the shapes and shardings of its state, and the compiled
    step.

    Attributes:
        template: the module without arrays (`AbstractModel`): shapes, shardings, initialization.
        trained, frozen: paths of the parameters.
        param_shapes: shape, dtype and sharding of every parameter, before any is quantized.
        quantizers: {path: the compiled function that quantizes it} of the frozen matrices that
            are kept in int8 or int4.
        state_shapes: a `TrainState` of shapes with shardings.
        step: the jitted (state, batch) -> (state, metrics). It donates the state.
        tower_metrics: the jitted state -> metrics, `update_statistics`.

    Raises:
        UserError: the config does not fit its objective, or a row the mesh, an optimizer group is
            missing, or nothing is to be trained, or to be quantized.
    """

    def __init__(self, cfg: TrainConfig, mesh: Mesh) -> None:
        backend = choose_backend(cfg.attention, mesh.devices.flat[0].platform)
        cfg = dataclasses.replace(cfg, attention=backend)
        self.cfg, self.mesh = cfg, mesh
        self.objective = get_objective(cfg)
        check_context(cfg, mesh)
        self.template = AbstractModel(lambda: self.objective.build(nnx.Rngs(self._keys()[0])), mesh)
        shapes = self.template.shapes
        rates = {path: group_of(path, cfg.optimizer).lr for path in shapes}
        self.trained = [path for path in shapes if rates[path] > 0]
        self.frozen = [path for path in shapes if rates[path] == 0]
        if not self.trained:
            raise UserError("every parameter is frozen: give an optimizer group a positive lr")
        self.optimizer = make_optimizer(
            cfg.optimizer,
            cfg.steps,
            {path: shapes[path] for path in self.trained},
            self.template.axes,
        )
        # Frozen parameters are stored in the compute dtype.
        dtypes = dict.fromkeys(self.frozen, jnp.dtype(cfg.dtype))
        self.param_shapes = {
            path: jax.ShapeDtypeStruct(s.shape, dtypes.get(path, s.dtype), sharding=s.sharding)
            for path, s in shapes.items()
        }
        self._quantization: Quantization | None = cast(Quantization | None, cfg.quantize or None)
        quantized = [path for path in self.frozen if self._quantization and is_quantized(path)]
        if self._quantization and not quantized:
            raise UserError(
                f"quantize is {cfg.quantize!r}, but no matrix that could be quantized is frozen: "
                "freeze some with an optimizer group with lr=0, or leave it out"
            )
        self.state_shapes = self._with_shardings(jax.eval_shape(self._initial_state, shapes))
        self.state_shardings = jax.tree.map(lambda x: x.sharding, self.state_shapes)
        self.quantizers = {
            path: jax.jit(
                functools.partial(self._frozen, path),
                out_shardings=self.state_shardings.frozen[path],
            )
            for path in quantized
        }
        self.step = jax.jit(
            self.update,
            in_shardings=(self.state_shardings, batch_sharding(mesh)),
            out_shardings=(self.state_shardings, NamedSharding(mesh, PartitionSpec())),
            donate_argnums=0,
        )
        self.tower_metrics = jax.jit(
            self.update_statistics, out_shardings=NamedSharding(mesh, PartitionSpec())
        )
        self._compiled = set[Any]()  # shapes of batches

    def init(self, params: ModelParams) -> TrainState:
        """Returns the state before the first step.

        Args:
            params: parameters from other runs. All others are initialized from the seed.
        """
        params = {**self.template.init(without=params), **params}
        return jax.jit(self._initial_state, out_shardings=self.state_shardings)(params)

    def compile(self, state: TrainState, batch: Batch, step: int) -> None:
        """Compiles a step if its batch has new shapes, and waits until all processes have.

        Otherwise the first collective would time out while another process still compiles.
        """
        shapes = tuple((name, rows.shape) for name, rows in batch.items())
        if shapes not in self._compiled:
            self.step.lower(state, batch).compile()
            if self.cfg.tower_metrics:
                self.tower_metrics.lower(state).compile()
            barrier = ocp.multihost.get_barrier_sync_fn()
            barrier(key=f"compiled step {step}", timeout_ms=1000 * COMPILE_SECONDS)
            self._compiled.add(shapes)

    def loss(
        self, params: ModelParams, batch: Batch, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        """Returns the loss and the metrics at `params`, with the random key of a step."""
        _, step_key = self._keys()
        return self._objective_loss(params, batch, jax.random.fold_in(step_key, step))

    def gradients(
        self, state: TrainState, batch: Batch
    ) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
        """Returns ((loss, metrics), the gradients of the trained parameters).

        With accumulation, a batch is split into n microbatches of every n-th row, so each device
        keeps its own rows. Each loss is divided by the average number of targets of a microbatch.
        The mean of the losses is then that of the whole batch, however its targets are spread.
        """
        _, step_key = self._keys()
        key = jax.random.fold_in(step_key, state.step)

        def trained_loss(
            trained: Params, batch: Batch, key: Key[Array, ""], targets: Metrics | None
        ) -> tuple[Float[Array, ""], Metrics]:
            return self._objective_loss(trained | state.frozen, batch, key, targets)

        gradients = jax.value_and_grad(trained_loss, has_aux=True)
        n = self.cfg.accumulate
        if n == 1:
            return gradients(state.trained, batch, key, None)

        module = self.template.module(state.trained | state.frozen)
        targets = {k: count / n for k, count in self.objective.targets(module, batch).items()}
        rows = NamedSharding(self.mesh, PartitionSpec(None, *batch_sharding(self.mesh).spec))
        microbatches = jax.tree.map(
            lambda x: jax.lax.with_sharding_constraint(
                jnp.moveaxis(x.reshape(-1, n, *x.shape[1:]), 1, 0), rows
            ),
            batch,
        )

        def add(total: Any, microbatch: tuple[Batch, Key[Array, ""]]) -> tuple[Any, None]:
            value, grads = gradients(state.trained, *microbatch, targets)
            grads = jax.lax.with_sharding_constraint(grads, self.state_shardings.trained)
            return jax.tree.map(jnp.add, total, (value, grads)), None

        keys = jax.random.split(key, n)
        first = jax.tree.map(lambda x: x[0], (microbatches, keys))
        shapes = jax.eval_shape(lambda: gradients(state.trained, *first, targets))
        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), (microbatches, keys))
        return jax.tree.map(lambda x: x / n, total)

    def update(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Returns the state after a step, and its metrics. `step` is this function, compiled."""
        (loss, metrics), grads = self.gradients(state, batch)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        with jax.named_scope("optimizer"):
            updates, optimizer = self.optimizer.update(
                grads, state.optimizer, state.trained, norm=grad_norm, finite=finite
            )
            trained = optax.apply_updates(state.trained, updates)
        ema = state.ema
        if ema:
            # The average decays faster in early steps, to forget the initial weights.
            decay = jnp.minimum(self.cfg.ema_decay, (1 + state.step) / (10 + state.step))
            ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, trained)
        # Skip the update on a non-finite step. The optimizer has already kept its own state.
        new, old = (trained, ema), (state.trained, state.ema)
        trained, ema = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        bad_steps = jnp.where(finite, 0, state.bad_steps + 1)
        skipped_steps = state.skipped_steps + ~finite
        state = TrainState(
            state.step + 1, trained, state.frozen, optimizer, ema, bad_steps, skipped_steps
        )
        counts = {"bad_steps": bad_steps, "skipped_steps": skipped_steps}
        metrics = {"loss": loss, **metrics, "grad_norm": grad_norm, **counts}
        if self.cfg.tower_metrics:  # the compiler shares these sums with that of `grad_norm`
            norms = {tower: optax.tree.norm(part) for tower, part in by_tower(grads).items()}
            metrics |= {f"grad_norm/{tower}": norm for tower, norm in norms.items()}
        return state, metrics

    def update_statistics(self, state: TrainState) -> Metrics:
        """Returns statistics of the step that led to a state, by tower.

        They are no part of the step because few steps are logged, and each costs a pass over the
        optimizer's state.

        Returns:
            update_ratio/TOWER: the norm of the update over that of the weights; lr/TOWER: the
            largest learning rate of a parameter. Both are 0 after a non-finite step.
        """
        updates, rates = last_update(
            state.trained, state.optimizer, self.cfg.optimizer, self.cfg.steps
        )
        updates, rates, weights = map(by_tower, (updates, rates, state.trained))
        finite = state.bad_steps == 0
        metrics = {}
        for tower, params in weights.items():
            norm = jnp.maximum(optax.tree.norm(params), jnp.finfo(jnp.float32).tiny)
            ratio = optax.tree.norm(updates[tower]) / norm
            metrics[f"update_ratio/{tower}"] = jnp.where(finite, ratio, 0.0)
            rate = jnp.max(jnp.stack(list(rates[tower].values())))
            metrics[f"lr/{tower}"] = jnp.where(finite, rate, 0.0)
        return metrics

    def _keys(self) -> tuple[Key[Array, ""], Key[Array, ""]]:
        """Returns the keys of the initial parameters and of the steps."""
        init_key, step_key = jax.random.split(jax.random.key(self.cfg.seed))
        return init_key, step_key

    def _objective_loss(
        self, params: ModelParams, batch: Batch, key: Key[Array, ""], targets: Metrics | None = None
    ) -> tuple[Float[Array, ""], Metrics]:
        module = self.template.module(params)
        return self.objective.loss(module, batch, key, targets)

    def _frozen(self, path: str, param: Parameter) -> Parameter:
        """Returns a frozen parameter as the state stores it: quantized, or in the compute dtype."""
        if isinstance(param, QuantizedMatrix):
            return param
        param = param.astype(self.cfg.dtype)
        if self._quantization is None or not is_quantized(path):
            return param
        return quantize(path, param, self._quantization)

    def _initial_state(self, params: ModelParams) -> TrainState:
        trained = {path: cast(jax.Array, params[path]) for path in self.trained}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            trained=trained,
            frozen={path: self._frozen(path, params[path]) for path in self.frozen},
            optimizer=self.optimizer.init(trained),
            ema=jax.tree.map(jnp.copy, trained) if self.cfg.ema_decay > 0 else {},
            bad_steps=jnp.zeros((), jnp.int32),
            skipped_steps=jnp.zeros((), jnp.int32),
        )

    def _with_shardings(self, tree: Any) -> Any:
        """Shards optimizer moments and averages like their parameters. Scalars are replicated."""
        replicated = NamedSharding(self.mesh, PartitionSpec())

        def sharded(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
            sharding = replicated
            if keys:  # quantized matrices and moments have parts of other shapes
                sharding = fitted(self.template.shardings[keys[-1]], leaf.shape)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree_util.tree_map_with_path(sharded, tree)


def by_tower(params: Params) -> dict[str, Params]:
    """Splits flat parameters, or values for them, by tower."""
    towers: dict[str, Params] = {}
    for path, value in params.items():
        towers.setdefault(tower_of(path), {})[path] = value
    return towers


def mesh_for(cfg: TrainConfig, devices: Sequence[Device] | None = None) -> Mesh:
    """Returns the mesh of a run over `devices`, by default all."""
    return make_mesh(**_mesh_settings(cfg), devices=devices)


def mesh_reasons(cfg: TrainConfig) -> str:
    """Returns why the mesh of a run over all devices has its shape."""
    devices = jax.devices()
    return choose_mesh(len(devices), slice_count(devices), **_mesh_settings(cfg))[1]


def _mesh_settings(cfg: TrainConfig) -> dict[str, Any]:
    model = cfg.model
    widths = {model.vision.width, model.llama.width, *model.connector.widths()}
    return dataclasses.asdict(cfg.mesh) | {
        "rows": math.gcd(*cfg.data.batch_sizes()),
        "heads": model.llama.kv_heads,
        "widths": sorted(widths),
    }


def check_rows(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Checks that the rows of a batch split equally over devices and processes.

    Raises:
        UserError: they do not.
    """
    ways = row_ways(mesh)
    if batch_size % (ways * accumulate):
        parts = f" in {accumulate} parts" if accumulate > 1 else ""
        raise UserError(
            f"data.batch_size {batch_size} does not split over {ways} devices{parts}: "
            f"make it a multiple of {ways * accumulate}"
        )
    row_shares(mesh)


def check_context(cfg: TrainConfig, mesh: Mesh) -> None:
    """Checks that the devices of `context` can share each row equally: its tokens, its images, and
    in attention its heads.

    Raises:
        UserError: they cannot, or the objective reads no rows of tokens.
    """
    context = context_ways(mesh)
    if context == 1:
        return
    keys = objective_class(cfg).row_lengths
    if not keys:
        raise UserError(
            f"mesh.context is {context}, but the objective {cfg.objective!r} reads no rows of "
            "tokens: set it to 1"
        )
    sizes = [("model.llama.heads", cfg.model.llama.heads, context * mesh.shape["tensor"])]
    sizes += [(f"data.{key}", getattr(cfg.data, key), context) for key in keys]
    for where, sources in (
        ("data", cfg.data.sources),
        *((f"evaluation {e.name!r}", e.sources) for e in cfg.eval),
    ):
        for source in sources:  # 0: as in `data`
            name = f"of source {source.name!r} ({where})"
            sizes += [(f"{key} {name}", getattr(source, key), context) for key in keys]
    for name, size, ways in sizes:
        if size % ways:
            along = "context" if ways == context else "context x tensor"
            raise UserError(
                f"{name} is {size}, which the mesh's {along} = {ways} does not divide: make it a "
                "multiple, or change the mesh"
            )
