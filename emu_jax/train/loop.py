"""The training loop: shapes, restore or initialise, step, log, save."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from emu_jax.config import TokenIds, load_json, save_json, to_dict
from emu_jax.data import digits
from emu_jax.errors import UserError, suggest
from emu_jax.models.attention import choose_backend
from emu_jax.models.remat import REMAT
from emu_jax.sharding import AbstractModel, batch_sharding, flatten, make_mesh, nest
from emu_jax.tokenizer import Tokenizer
from emu_jax.train import parents
from emu_jax.train.config import TrainConfig
from emu_jax.train.goodput import Goodput
from emu_jax.train.metrics import DAMAGED_FILE, DOCUMENTS_FILE, StepLog
from emu_jax.train.monitor import Monitor
from emu_jax.train.objectives import Batch, Metrics, get_objective
from emu_jax.train.optimizer import group_of, make_optimizer
from emu_jax.train.saving import Checkpoints
from emu_jax.train.signals import Signals
from emu_jax.train.tracing import parse_steps

Params = dict[str, jax.Array]
DTYPES = ("bfloat16", "float32")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything a step reads and writes. Parameters are flat: {dotted path: array}."""

    step: jax.Array  # steps done, int32
    trained: Params
    frozen: Params
    optimizer: optax.OptState
    ema: Params  # of `trained`; empty unless weights are averaged
    bad_steps: jax.Array  # non-finite steps in a row
    skipped_steps: jax.Array  # non-finite steps so far


class Trainer:
    """One run's compiled pieces: the state's shapes, its start, and the step."""

    def __init__(self, cfg: TrainConfig, mesh: Mesh):
        backend = choose_backend(cfg.attention, mesh.devices.flat[0].platform)
        cfg = dataclasses.replace(cfg, attention=backend)
        self.cfg, self.mesh = cfg, mesh
        self.objective = get_objective(cfg.objective)
        self.template = AbstractModel(
            lambda: self.objective.build(cfg, nnx.Rngs(self._keys()[0])), mesh
        )
        shapes = self.template.shapes
        rates = {path: group_of(path, cfg.optimizer).lr for path in shapes}
        self.trained = [path for path in shapes if rates[path] > 0]
        self.frozen = [path for path in shapes if rates[path] == 0]
        if not self.trained:
            raise UserError("every parameter is frozen: give an optimizer group a positive lr")
        self.optimizer = make_optimizer(
            cfg.optimizer, cfg.steps, {path: shapes[path] for path in self.trained}
        )
        # What is frozen is kept as the computation reads it.
        dtypes = dict.fromkeys(self.frozen, jnp.dtype(cfg.dtype))
        self.param_shapes = {
            path: jax.ShapeDtypeStruct(s.shape, dtypes.get(path, s.dtype), sharding=s.sharding)
            for path, s in shapes.items()
        }
        self.state_shapes = self._with_shardings(jax.eval_shape(self._start, shapes))
        self.state_shardings = jax.tree.map(lambda x: x.sharding, self.state_shapes)
        self.step = jax.jit(
            self._step,
            in_shardings=(self.state_shardings, batch_sharding(mesh)),
            out_shardings=(self.state_shardings, NamedSharding(mesh, PartitionSpec())),
            donate_argnums=0,
        )

    def start(self, parents: Params) -> TrainState:
        """The state before the first step; `parents` replaces what a fresh start would draw."""
        params = self.template.init(without=parents) | parents
        return jax.jit(self._start, out_shardings=self.state_shardings)(params)

    def loss(self, params: Params, batch: Batch, step: jax.Array) -> tuple[jax.Array, Metrics]:
        """The objective at `params`; its randomness follows from the seed and the step."""
        _, step_key = self._keys()
        return self._loss(params, batch, jax.random.fold_in(step_key, step))

    def _keys(self) -> Key[Array, "2"]:
        """Returns the keys of the initial parameters and of the steps."""
        return jax.random.split(jax.random.key(self.cfg.seed))

    def _loss(
        self, params: Params, batch: Batch, key: jax.Array, targets: Metrics | None = None
    ) -> tuple[jax.Array, Metrics]:
        module = self.template.module(params)
        return self.objective.loss(self.cfg, module, batch, key, targets)

    def gradients(
        self, state: TrainState, batch: Batch
    ) -> tuple[tuple[jax.Array, Metrics], Params]:
        """((loss, what to report beside it), the gradient of what is trained).

        A batch that is accumulated is cut into parts of every n-th row, so that each device
        keeps its own. Each part divides by the targets that a part has on average: the mean over
        parts is then what the whole batch gives, whatever targets a part has.
        """
        _, step_key = self._keys()
        key = jax.random.fold_in(step_key, state.step)

        def loss(trained: Params, part: Batch, key: jax.Array, targets: Metrics | None):
            return self._loss(trained | state.frozen, part, key, targets)

        gradients = jax.value_and_grad(loss, has_aux=True)
        n = self.cfg.accumulate
        if n == 1:
            return gradients(state.trained, batch, key, None)

        module = self.template.module(state.trained | state.frozen)
        targets = {k: count / n for k, count in self.objective.targets(module, batch).items()}
        rows = NamedSharding(self.mesh, PartitionSpec(None, *batch_sharding(self.mesh).spec))
        parts = jax.tree.map(
            lambda x: jax.lax.with_sharding_constraint(
                jnp.moveaxis(x.reshape(-1, n, *x.shape[1:]), 1, 0), rows
            ),
            batch,
        )

        def add(total, part):
            value, grads = gradients(state.trained, *part, targets)
            grads = jax.lax.with_sharding_constraint(grads, self.state_shardings.trained)
            return jax.tree.map(jnp.add, total, (value, grads)), None

        keys = jax.random.split(key, n)
        first = jax.tree.map(lambda x: x[0], (parts, keys))
        shapes = jax.eval_shape(lambda: gradients(state.trained, *first, targets))
        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), (parts, keys))
        return jax.tree.map(lambda x: x / n, total)

    def _start(self, params: Params) -> TrainState:
        trained = {path: params[path] for path in self.trained}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            trained=trained,
            frozen={path: params[path].astype(self.cfg.dtype) for path in self.frozen},
            optimizer=self.optimizer.init(trained),
            ema=jax.tree.map(jnp.copy, trained) if self.cfg.ema_decay > 0 else {},
            bad_steps=jnp.zeros((), jnp.int32),
            skipped_steps=jnp.zeros((), jnp.int32),
        )

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
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
            # A short memory at first, so that the initial weights are soon forgotten.
            decay = jnp.minimum(self.cfg.ema_decay, (1 + state.step) / (10 + state.step))
            ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, trained)
        # A non-finite step changes nothing but the counters; the optimizer has seen to its own.
        new, old = (trained, ema), (state.trained, state.ema)
        trained, ema = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        bad_steps = jnp.where(finite, 0, state.bad_steps + 1)
        skipped_steps = state.skipped_steps + ~finite
        state = TrainState(
            state.step + 1, trained, state.frozen, optimizer, ema, bad_steps, skipped_steps
        )
        counts = {"bad_steps": bad_steps, "skipped_steps": skipped_steps}
        metrics = {"loss": loss, **metrics, "grad_norm": grad_norm, **counts}
        return state, metrics

    def _with_shardings(self, tree: Any) -> Any:
        """Optimizer moments and averages are sharded like their parameters, scalars nowhere."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())

        def one(path, leaf):
            keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
            where = self.template.shardings[keys[-1]] if keys else everywhere
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

        return jax.tree_util.tree_map_with_path(one, tree)


def train(cfg: TrainConfig, workdir: Path) -> dict[str, Any]:
    """Trains to `cfg.steps`, going on from the newest checkpoint in `workdir`.

    Returns the last logged metrics, with `step` and `seconds`.

    Raises:
        UserError: a setting means nothing, `workdir` holds another run, a parent is missing or
            does not fit, the data cannot be read, or the loss stays non-finite.
        KeyboardInterrupt: after SIGINT or SIGTERM, once the state is saved.
    """
    started = time.monotonic()
    check(cfg)
    initialize_distributed()
    mesh = mesh_for(cfg)
    sharding = batch_sharding(mesh)
    for size in sorted(cfg.data.batch_sizes()):
        _check_rows(size, cfg.accumulate, sharding)
    workdir.mkdir(parents=True, exist_ok=True)
    lead = jax.process_index() == 0

    with (
        Signals() as signals,
        Goodput() as goodput,
        jax.set_mesh(mesh),
        # Accelerators would round the factors of float32 products.
        jax.default_matmul_precision("highest" if cfg.dtype == "float32" else "default"),
        Checkpoints(workdir, cfg.keep_checkpoints) as checkpoints,
        signals.interruptible(),
    ):
        going_on = checkpoints.newest() is not None
        cfg = _resume(cfg, workdir) if going_on else parents.adopt(cfg, workdir)
        trainer = Trainer(cfg, mesh)
        frozen = {path: trainer.param_shapes[path] for path in trainer.frozen}
        inherited = parents.inherited(cfg, workdir, frozen)
        done, state, position = 0, None, None
        if going_on:
            kept = parents.read(cfg, workdir, inherited)
            done, state, position = _restore(checkpoints, trainer, kept)
        if done >= cfg.steps:
            return {"step": done, "seconds": 0.0}
        tokenizer = prepare_data(cfg)
        batches = trainer.objective.batches(cfg, tokenizer, resumed=position is not None)
        if position is not None:
            read = position.get("step", position.get("batch"))
            if read != done:
                raise UserError(
                    f"{workdir / str(done)} holds the data position after {read} batches, not "
                    f"after {done}: use another step"
                )
            batches.restore(position)
        if state is None:
            state = trainer.start(parents.read(cfg, workdir, trainer.param_shapes))
        if lead:
            for name, tally in batches.tallies.items():
                print(f"source {name}: {tally.summary()}", file=sys.stderr, flush=True)
            tokenizer.save(workdir / "tokenizer")
            save_json(cfg.model, workdir / "config.json")
            save_json(cfg, workdir / "train.json")
            parents.carry(cfg, workdir)
            parents.note_base(cfg, workdir)

        with (
            batches,
            StepLog(
                workdir, DOCUMENTS_FILE, enabled=cfg.log_documents, start_step=done
            ) as documents,
            StepLog(workdir, DAMAGED_FILE, start_step=done) as damaged,
            Monitor(cfg, workdir, mesh, goodput, signals, done) as monitor,
        ):
            compiled: set[Any] = set()
            for step in range(done + 1, cfg.steps + 1):
                with goodput.doing("data"):
                    local = next(batches)
                    batch = {
                        k: jax.make_array_from_process_local_data(sharding, v)
                        for k, v in local.items()
                    }
                documents.log(step, batches.documents())
                damaged.log(step, batches.damaged())
                shapes = tuple((k, v.shape) for k, v in batch.items())
                if shapes not in compiled:
                    _compile(trainer, state, batch, f"step {step}")
                    compiled.add(shapes)
                monitor.launching(step)
                state, metrics = trainer.step(state, batch)
                monitor.launched(step, metrics, batches.statistics())
                monitor.settle()
                saving = step == cfg.steps or step % cfg.checkpoint_every == 0
                if saving or monitor.stopping:
                    monitor.settle(ahead=0)
                if monitor.row.get("bad_steps", 0) >= cfg.max_bad_steps:
                    checkpoints.wait()  # the newest one may be under way
                    raise UserError(
                        f"the loss was not finite for {cfg.max_bad_steps} steps up to step {step}: "
                        "lower the learning rate or look at the data; started again, the run goes "
                        f"on from step {checkpoints.newest() or 0}"
                    )
                if step == cfg.steps and lead:
                    # Before the last checkpoint, whose presence says that all is done.
                    model = trainer.objective.finish(cfg.model, monitor.row)
                    save_json(model, workdir / "config.json")
                if saving or monitor.stopping:
                    for log in (documents, damaged, monitor):
                        log.sync()
                    with goodput.doing("checkpoint"), signals.hold():
                        _save(checkpoints, step, state, batches.state(), leave_out=inherited)
                if checkpoints.check():
                    signals.ask_to_stop()  # all processes, at the same step
                if monitor.stopping and step < cfg.steps:
                    checkpoints.wait()
                    raise KeyboardInterrupt
            checkpoints.wait()
    return monitor.row | {"step": cfg.steps, "seconds": time.monotonic() - started}


def mesh_for(cfg: TrainConfig, devices: Any | None = None) -> Mesh:
    """The mesh of a run over `devices` (by default all)."""
    model = cfg.model
    widths = {model.vision.width, model.cformer.width, model.llama.width}
    return make_mesh(
        **dataclasses.asdict(cfg.mesh),
        devices=devices,
        rows=math.gcd(*cfg.data.batch_sizes()),
        heads=model.llama.heads,
        widths=sorted(widths),
    )


def _compile(trainer: Trainer, state: TrainState, batch: Batch, name: str) -> None:
    """Compiles the step for batches of these shapes, and waits until all processes have: the
    first collective of a program does not wait long for one that still compiles."""
    trainer.step.lower(state, batch).compile()
    ocp.multihost.get_barrier_sync_fn()(key=f"compiled {name}", timeout_ms=3_600_000)


def check(cfg: TrainConfig) -> None:
    """Checks the settings of a run.

    Raises:
        UserError: a setting is invalid.
    """
    for tower, policy in to_dict(cfg.remat).items():
        if policy not in REMAT:
            raise UserError(f"remat.{tower} {policy!r} is not known{suggest(policy, REMAT)}")
    if cfg.dtype not in DTYPES:
        raise UserError(f"dtype {cfg.dtype!r} is not known{suggest(cfg.dtype, DTYPES)}")
    for name in (
        "steps",
        "accumulate",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
        "max_bad_steps",
    ):
        if getattr(cfg, name) < 1:
            raise UserError(f"{name} is {getattr(cfg, name)}: make it at least 1")
    if cfg.loss_block < 0:
        raise UserError(f"loss_block is {cfg.loss_block}: make it at least 0")
    if cfg.accumulate > 1 and not get_objective(cfg.objective).accumulates:
        raise UserError(
            f"the objective {cfg.objective!r} compares all rows of a batch with each other: "
            "set accumulate to 1"
        )
    parse_steps(cfg.profile_steps)
    for group in cfg.optimizer.groups:
        try:
            re.compile(group.pattern)
        except re.error as error:
            raise UserError(f"optimizer pattern {group.pattern!r}: {error}") from None


def _check_rows(batch_size: int, accumulate: int, sharding: NamedSharding) -> None:
    """Checks that each process can hold its own rows of a batch.

    Raises:
        UserError: the rows of a batch cannot be shared out so that each process holds its own.
    """
    ways = sharding.num_devices // sharding.mesh.shape["tensor"]
    if batch_size % (ways * accumulate):
        parts = f" in {accumulate} parts" if accumulate > 1 else ""
        raise UserError(
            f"data.batch_size {batch_size} does not split over {ways} devices{parts}: "
            f"make it a multiple of {ways * accumulate}"
        )
    places = sharding.addressable_devices_indices_map((batch_size,)).values()
    rows = {
        row for where in places for row in range(batch_size)[where[0] if where else slice(None)]
    }
    share = batch_size // jax.process_count()
    if rows != set(range(jax.process_index() * share, (jax.process_index() + 1) * share)):
        raise UserError("the mesh splits rows over processes: make `tensor` fit into one process")


# What may be another when a run goes on.
MAY_CHANGE = (
    "steps",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "max_bad_steps",
    "mesh",
    "remat",
    "log_documents",
    "profile_steps",
    "hang_seconds",
    "attention",
    "loss_block",
    "tuned",
    "parents",
    "init_from",
    "data.root",
    "data.tokenizer",
    "data.decode_threads",
    "data.prefetch",
    "data.cache",
    "data.max_damaged_rate",
    "model.vae.scaling_factor",
)


def _resume(cfg: TrainConfig, workdir: Path) -> TrainConfig:
    """The run that `workdir` holds, with what may change taken from `cfg`.

    Raises:
        UserError: `cfg` is another run.
    """
    saved = load_json(TrainConfig, workdir / "train.json")
    model = saved.model if saved.init_from else cfg.model
    model = dataclasses.replace(model, vae=model.vae and saved.model.vae)
    ours = flatten(to_dict(without_places(dataclasses.replace(cfg, model=model))))
    theirs = flatten(to_dict(without_places(saved)))
    for key in sorted(ours.keys() | theirs.keys()):
        changes = any(key == name or key.startswith(name + ".") for name in MAY_CHANGE)
        if not changes and ours.get(key) != theirs.get(key):
            raise UserError(
                f"{workdir} holds a run with {key}={theirs.get(key)!r}, not {ours.get(key)!r}: "
                "give another --workdir, or that value"
            )
    return dataclasses.replace(cfg, model=saved.model, parents=saved.parents)


def without_places(cfg: TrainConfig) -> TrainConfig:
    """The run, wherever the files of its sources lie."""
    sources = tuple(dataclasses.replace(s, paths=(), media=()) for s in cfg.data.sources)
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, sources=sources))


def prepare_data(cfg: TrainConfig) -> Tokenizer:
    """Makes the embedded data where they are asked for, and gives the data's tokenizer.

    Raises:
        UserError: the tokenizer or a size is not the model's.
    """
    if cfg.latents:
        return Tokenizer.load(Path(cfg.latents) / "tokenizer")
    if cfg.data.embedded == "digits":
        digits.build_digits(cfg.data.root)
    elif cfg.data.embedded:
        raise UserError(f"data.embedded {cfg.data.embedded!r} is not known: digits is")
    tokenizer = cfg.data.load_tokenizer()
    if len(tokenizer) != cfg.model.llama.vocab_size:
        raise UserError(
            f"the tokenizer in {cfg.data.root} has {len(tokenizer)} tokens, the model "
            f"{cfg.model.llama.vocab_size}: set model.llama.vocab_size and model.tokens to match"
        )
    data, model, t = cfg.data, cfg.model, tokenizer
    ids = TokenIds(t.bos, t.eos, t.pad_id, t.img, t.img_end, t.image)
    if ids != model.tokens:
        raise UserError(f"the ids in model.tokens are {model.tokens}, the tokenizer's are {ids}")
    sizes = [
        ("n_causal", data.n_causal, model.cformer.n_causal),
        ("image_size", data.image_size, model.vision.image_size),
    ]
    if model.vae is not None and cfg.objective in ("vae", "decoder"):
        sizes.append(("target_size", data.target_size, model.vae.sample_size))
    for name, ours, theirs in sizes:
        if ours != theirs:
            raise UserError(f"data.{name} is {ours}, the model needs {theirs}: set it to that")
    return tokenizer


def _save(
    checkpoints: Checkpoints,
    step: int,
    state: TrainState,
    position: dict[str, Any],
    *,
    leave_out: Collection[str],
) -> None:
    """Starts an asynchronous, atomic save of the state, but for some frozen parameters, and of
    the data position."""
    frozen = {path: a for path, a in state.frozen.items() if path not in leave_out}
    counts = {"bad": state.bad_steps, "skipped": state.skipped_steps}
    items: dict[str, ocp.args.CheckpointArgs] = {
        "params": ocp.args.StandardSave(nest(state.trained | frozen)),
        "optimizer": ocp.args.StandardSave({"state": state.optimizer} | counts),
        "position": ocp.args.JsonSave(position),
    }
    if state.ema:
        items["ema"] = ocp.args.StandardSave(nest(state.ema))
    checkpoints.save(step, items)


def _restore(
    checkpoints: Checkpoints, trainer: Trainer, inherited: Params
) -> tuple[int, TrainState, dict[str, Any]]:
    """The newest step that can be read: its number, the state on this run's mesh with what it
    leaves out, and its data position."""
    shapes = trainer.state_shapes
    frozen = {path: shape for path, shape in shapes.frozen.items() if path not in inherited}
    counts = {"bad": shapes.bad_steps, "skipped": shapes.skipped_steps}
    items: dict[str, ocp.args.CheckpointArgs] = {
        "params": ocp.args.StandardRestore(nest(shapes.trained | frozen)),
        "optimizer": ocp.args.StandardRestore({"state": shapes.optimizer} | counts),
        "position": ocp.args.JsonRestore(),
    }
    if shapes.ema:
        items["ema"] = ocp.args.StandardRestore(nest(shapes.ema))
    step, saved = checkpoints.restore(items)
    params = flatten(saved["params"]) | inherited
    state = TrainState(
        step=jax.device_put(jnp.int32(step), trainer.state_shardings.step),
        trained={path: params[path] for path in trainer.trained},
        frozen={path: params[path] for path in trainer.frozen},
        optimizer=saved["optimizer"]["state"],
        ema=flatten(saved["ema"]) if shapes.ema else {},
        bad_steps=saved["optimizer"]["bad"],
        skipped_steps=saved["optimizer"]["skipped"],
    )
    return step, state, saved["position"]


def initialize_distributed() -> None:
    """Joins the other processes when JAX_NUM_PROCESSES says that there are some; their meeting
    place is JAX_COORDINATOR_ADDRESS. On TPU pods nothing needs to be set but JAX_NUM_PROCESSES."""
    count = int(os.environ.get("JAX_NUM_PROCESSES", "1"))
    if count > 1 and not jax.distributed.is_initialized():
        # JAX would keep SIGTERM to itself; `train.signals` listens to it.
        jax.config.update("jax_enable_preemption_service", False)
        index = os.environ.get("JAX_PROCESS_ID")
        jax.distributed.initialize(
            num_processes=count,
            process_id=None if index is None else int(index),
            # A process that ends with an error waits so long for the others, which wait for it,
            # before all are ended.
            shutdown_timeout_seconds=60,
        )
