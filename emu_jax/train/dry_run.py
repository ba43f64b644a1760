"""Dry runs: the figures of a run before it starts, and everything that would stop it.

Nothing is compiled or written, no step is taken, and no data are read beyond headers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from emu_jax import checkpoint, integrity
from emu_jax.config import load_json, to_dict
from emu_jax.data import digits
from emu_jax.data.batches import BUILDERS
from emu_jax.data.latents import LatentBatches
from emu_jax.data.mixture import chosen_sources
from emu_jax.data.preview import GroupPreview, SourcePreview, preview
from emu_jax.data.sources.open import missing_files
from emu_jax.errors import UserError
from emu_jax.hardware import chip_of
from emu_jax.sharding import make_mesh
from emu_jax.storage import as_path, is_remote
from emu_jax.tokenizer import Tokenizer
from emu_jax.train.config import MAY_CHANGE, TrainConfig, resume_config, resume_conflicts
from emu_jax.train.device_memory import abstract_batch, memory_by_kind, shard_bytes
from emu_jax.train.evaluation import Evaluation, check_evaluations
from emu_jax.train.flops import train_flops
from emu_jax.train.lock import Lock
from emu_jax.train.loop import EVALUATIONS
from emu_jax.train.objectives import Objective, get_objective
from emu_jax.train.step import Trainer, check_rows, mesh_for, mesh_reasons
from emu_jax.train.telemetry.trackers import check_tracker
from emu_jax.train.warm_start import WarmStart

UNKNOWN = "unknown until indexed"
NOT_ESTIMATED = (
    "temporaries of a step (gathered parameters, buffers of collectives, workspace), the compiled "
    "program and fragmentation"
)


@dataclasses.dataclass(frozen=True)
class TowerParameters:
    """Numbers of parameters of a tower."""

    trained: int
    frozen: int


@dataclasses.dataclass(frozen=True)
class BatchSize:
    """The batches of a group of sources, which `step_share` of the steps read.

    Attributes:
        tokens, images: those of a global batch, padding included.
    """

    step_share: float
    rows: int
    tokens: int
    images: int
    sources: tuple[SourcePreview, ...]


@dataclasses.dataclass(frozen=True)
class Start:
    """The start of a run.

    Attributes:
        step: the step that it resumes from; None for a new run.
        may_change: config keys that may differ from the run that is resumed.
        parents: {tower: run directory} of the towers that are read from other runs.
    """

    step: int | None
    may_change: tuple[str, ...]
    init_from: str
    parents: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Saving:
    """The destination of checkpoints, and their size.

    Attributes:
        bytes: size of a checkpoint; None if the parameters are not known.
        free_bytes: free space of the file system, if it is known.
        left_out: towers with parameters that stay in the parents' run directories.
    """

    workdir: str
    every: int
    keep: int
    bytes: int | None
    free_bytes: int | None
    left_out: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class DryRun:
    """The report of `emu-jax train --dry-run`. Its fields are the keys of `--json`.

    Attributes:
        passed: whether nothing is known that would stop the run.
        problems: a line for each thing that would.
        notes: lines about what could not be checked.
        config: the config that the run would use.
        changed: {key: [value in the file, value that the run would use]}, from overrides, settings
            tuned for the chip, checkpoints and other runs.
        parameters: numbers of parameters by tower; None if the model cannot be built.
        batches: one entry for each group of sources that share batches.
        tokens_per_step, images_per_step: those of a global batch, padding included; a mean over
            the groups.
        model_flops: FLOPs of a step, as `train.flops` counts them, a mean over the groups.
        devices: number of devices; `device_kind` names them.
        mesh: {axis: ways}; None if the config does not fit the devices. `mesh_reasons` says why.
        device_bytes: estimated bytes per device by kind, of the group with the largest batches.
        start, saving: where the run starts, and where its checkpoints go.
    """

    passed: bool
    problems: list[str]
    notes: list[str]
    name: str
    objective: str
    steps: int
    config: dict[str, Any]
    changed: dict[str, list[Any]]
    parameters: dict[str, TowerParameters] | None
    batches: list[BatchSize]
    tokens_per_step: float
    images_per_step: float
    model_flops: float | None
    devices: int
    device_kind: str
    mesh: dict[str, int] | None
    mesh_reasons: str
    device_bytes: dict[str, float] | None
    start: Start
    saving: Saving


class _Problems(list[str]):
    """Lines, each once."""

    def add(self, *lines: str) -> None:
        self += [line for line in dict.fromkeys(lines) if line not in self]

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Turns an error of the user, or of a file, into a line."""
        try:
            yield
        except UserError as error:
            self.add(str(error))
        except OSError as error:
            self.add(f"{error.filename}: {error.strerror}")


def dry_run(
    cfg: TrainConfig,
    workdir: Path,
    file_cfg: TrainConfig | None = None,
    evaluations: Mapping[str, type[Evaluation]] = EVALUATIONS,
) -> DryRun:
    """Returns what `train` would do with these arguments, and what would stop it.

    Args:
        file_cfg: the config of the file alone, with which the resolved config is compared.
    """
    file_cfg = cfg if file_cfg is None else file_cfg
    problems, notes = _Problems(), list[str]()
    _check_workdir(workdir, problems, notes)
    step = _resume_step(workdir, problems, notes)
    warm_start = _warm_start(cfg, workdir, step is not None, problems)
    # Without `init_from`, the model of the run is not known.
    model_known = warm_start is not None or not cfg.init_from
    cfg = cfg if warm_start is None else warm_start.cfg
    if step is not None and step >= cfg.steps:
        notes.append(f"step {step} is saved, and steps is {cfg.steps}: nothing is left to do")

    mesh, reasons = None, ""
    with problems.caught():
        mesh, reasons = mesh_for(cfg), mesh_reasons(cfg)
    rows_split = False
    if mesh is not None:
        before = len(problems)
        for size in sorted(cfg.data.batch_sizes()):
            with problems.caught():
                check_rows(size, cfg.accumulate, mesh)
        rows_split = len(problems) == before

    with problems.caught():
        check_tracker(cfg)
    objective = trainer = None
    with problems.caught():
        objective = get_objective(cfg)
    groups: list[GroupPreview] = []
    if objective is not None:
        groups = _preview_data(objective, model_known, problems, notes)
        _check_evaluations(objective, evaluations, problems)
    flops, batches = None, [_batch_size(cfg, group) for group in groups]
    if objective is not None and model_known:
        # Shapes do not depend on the mesh.
        any_mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1]) if mesh is None else mesh
        with problems.caught(), jax.set_mesh(any_mesh):
            trainer = Trainer(cfg, any_mesh)
            flops = sum(
                group.step_share * train_flops(dataclasses.replace(cfg, data=group.cfg)).total
                for group in groups
            )

    left_out: dict[str, jax.ShapeDtypeStruct] = {}
    if trainer is not None and warm_start is not None:
        with problems.caught():
            warm_start.check_quantized(trainer.quantizers)
        with problems.caught():
            left_out = warm_start.unsaved({p: trainer.param_shapes[p] for p in trainer.frozen})
        problems.add(*warm_start.check(trainer.param_shapes if step is None else left_out))
    device_bytes = None
    if trainer is not None and mesh is not None and rows_split:
        with jax.set_mesh(mesh):
            device_bytes = _device_bytes(trainer, groups)
        _check_device(device_bytes, problems)
    saving = _saving(cfg, workdir, trainer, left_out, problems)
    cfg = cfg if trainer is None else trainer.cfg  # with the attention backend that "auto" selects
    return DryRun(
        passed=not problems,
        problems=list(problems),
        notes=notes,
        name=cfg.name,
        objective=cfg.objective,
        steps=cfg.steps,
        config=to_dict(cfg),
        changed=_changes(file_cfg, cfg),
        parameters=None if trainer is None else _parameters(trainer),
        batches=batches,
        tokens_per_step=sum(batch.step_share * batch.tokens for batch in batches),
        images_per_step=sum(batch.step_share * batch.images for batch in batches),
        model_flops=flops,
        devices=jax.device_count(),
        device_kind=jax.devices()[0].device_kind,
        mesh=None if mesh is None else dict(mesh.shape),
        mesh_reasons=reasons,
        device_bytes=device_bytes,
        start=Start(step, MAY_CHANGE if step is not None else (), cfg.init_from, dict(cfg.parents)),
        saving=saving,
    )


def _check_workdir(workdir: Path, problems: _Problems, notes: list[str]) -> None:
    with problems.caught():
        integrity.check_path(workdir)
    if is_remote(workdir):
        with problems.caught():
            workdir.exists()
        notes.append(f"the permission to write to {workdir} is not checked")
    elif not (existing := _existing(workdir)).is_dir():
        problems.add(f"{existing} is not a directory: give another --workdir")
    elif not os.access(existing, os.W_OK | os.X_OK):
        problems.add(
            f"{existing} is not writable: give another --workdir, or the permission to write there"
        )
    if owner := Lock(workdir / "lock.json").live_owner():
        problems.add(
            f"{workdir} is in use by {owner}: stop that job first, or use another --workdir"
        )


def _existing(path: Path) -> Path:
    """Returns a path, or the nearest directory above it that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def _resume_step(workdir: Path, problems: _Problems, notes: list[str]) -> int | None:
    """Returns the newest step of a run directory whose parameters can be opened, or None."""
    steps, damaged = list[int](), list[str]()
    with problems.caught():
        steps = sorted(checkpoint.complete_steps(workdir), reverse=True)
    for step in steps:
        try:
            checkpoint.stored_shapes(workdir / str(step) / "params")
        except UserError as error:
            damaged.append(f"checkpoint {step} would be set aside: {error}")
        else:
            notes += damaged
            return step
    if steps:
        problems.add(*damaged)
    return steps[0] if steps else None


def _warm_start(
    cfg: TrainConfig, workdir: Path, resuming: bool, problems: _Problems
) -> WarmStart | None:
    """Returns the warm start of a run, without the parents that cannot be used, or None."""
    if resuming:
        with problems.caught():
            problems.add(
                *resume_conflicts(cfg, load_json(TrainConfig, workdir / "train.json"), workdir)
            )
            return WarmStart(resume_config(cfg, workdir), workdir)
        return None
    usable = dict(cfg.parents)
    for tower, parent in cfg.parents.items() if not cfg.init_from else ():
        alone = dataclasses.replace(cfg, parents={tower: parent})
        try:
            WarmStart.resolve(alone, workdir)
        except UserError as error:
            problems.add(f"parents.{tower}: {error}")
            del usable[tower]
    with problems.caught():
        return WarmStart.resolve(dataclasses.replace(cfg, parents=usable), workdir)
    return None


def _preview_data(
    objective: Objective, model_known: bool, problems: _Problems, notes: list[str]
) -> list[GroupPreview]:
    """Returns the groups of sources that a run reads; one without sources if they are unknown."""
    data = objective.cfg.data
    if objective.cfg.latents:
        source = SourcePreview("latents", "latents", 1.0, None, None)
        with problems.caught():
            rows = LatentBatches(as_path(objective.cfg.latents), data, objective.cfg.model).rows
            source = SourcePreview("latents", "latents", 1.0, rows, rows / data.batch_size)
        with problems.caught():
            objective.load_tokenizer()
        return [GroupPreview(data, 1.0, (source,))]

    building = data.embedded == "digits" and not digits.is_built(data.root)
    tokenizer: Tokenizer | None = None
    with problems.caught():
        if building and not data.tokenizer:
            tokenizer = digits.make_tokenizer(instruct=data.instruct)
        else:
            tokenizer = objective.load_tokenizer()
    if model_known:
        problems.add(*objective.mismatches(tokenizer))
    if building:
        notes.append(f"the digits are written to {data.root} when the run starts")
        return [GroupPreview(data, 1.0, ())]
    groups, lines = preview(data, objective.batch_kind, tokenizer)
    problems.add(*lines)
    return groups or [GroupPreview(data, 1.0, ())]


def _check_evaluations(
    objective: Objective, kinds: Mapping[str, type[Evaluation]], problems: _Problems
) -> None:
    """Checks the held-out evaluations, and the files of all their sources."""
    cfg = objective.cfg
    for config in cfg.eval:
        missing = list[str]()
        with contextlib.suppress(UserError):  # `check_evaluations` raises it again
            data = config.data(cfg.data)
            if data.sources or not data.embedded:
                pairs = BUILDERS[objective.batch_kind].requires.pairs
                for source in chosen_sources(data, pairs, missing):
                    missing += missing_files(source)
        problems.add(*(f"evaluation {config.name!r}: {line}" for line in missing))
        if not missing:
            with problems.caught():
                check_evaluations(dataclasses.replace(cfg, eval=(config,), keep_best={}), kinds)


def _batch_size(cfg: TrainConfig, group: GroupPreview) -> BatchSize:
    shapes = {
        name: shape
        for name, (shape, _) in get_objective(dataclasses.replace(cfg, data=group.cfg))
        .batch_shapes()
        .items()
    }
    # An array of images ends in height, width and channels; latents are one image a row.
    images = sum(
        math.prod(shape[:-3])
        for name, shape in shapes.items()
        if name in ("images", "target", "latents")
    )
    return BatchSize(
        step_share=group.step_share,
        rows=group.cfg.batch_size,
        tokens=math.prod(shapes.get("tokens", (0,))),
        images=images,
        sources=group.sources,
    )


def _parameters(trainer: Trainer) -> dict[str, TowerParameters]:
    counts: dict[str, list[int]] = {}
    for kind, paths in enumerate((trainer.trained, trainer.frozen)):
        for path in paths:
            tower = counts.setdefault(checkpoint.tower_of(path), [0, 0])
            tower[kind] += math.prod(trainer.param_shapes[path].shape)
    return {tower: TowerParameters(*numbers) for tower, numbers in counts.items()}


def _device_bytes(trainer: Trainer, groups: list[GroupPreview]) -> dict[str, float]:
    """Estimates the bytes per device of a step, except `NOT_ESTIMATED`."""
    batches = [
        abstract_batch(trainer, get_objective(dataclasses.replace(trainer.cfg, data=group.cfg)))
        for group in groups
    ]
    kinds = memory_by_kind(trainer, max(batches, key=shard_bytes))
    # With accumulation, the sum and a part's gradients exist at once.
    copies = 1 if trainer.cfg.accumulate == 1 else 2
    return kinds | {"gradients": copies * shard_bytes(trainer.state_shapes.trained)}


def _check_device(device_bytes: Mapping[str, float], problems: _Problems) -> None:
    """Refuses a state that alone is larger than the memory of a device of a known kind."""
    chip = chip_of(jax.devices()[0].device_kind)
    if chip is None:
        return
    memory = chip.hbm_bytes / chip.devices
    state = sum(device_bytes[kind] for kind in ("parameters", "optimizer", "gradients", "batch"))
    if state > memory:
        problems.add(
            f"parameters, gradients, optimizer state and batch take {_gib(state)} of the "
            f"{_gib(memory)} of a device: raise mesh.fsdp, or use more devices"
        )


def _saving(
    cfg: TrainConfig,
    workdir: Path,
    trainer: Trainer | None,
    left_out: Mapping[str, jax.ShapeDtypeStruct],
    problems: _Problems,
) -> Saving:
    size = free = None
    if not is_remote(workdir):
        space = os.statvfs(_existing(workdir))
        if space.f_blocks:  # some network file systems report no size
            free = space.f_bavail * space.f_frsize
    if trainer is not None:
        state = trainer.state_shapes
        frozen = [shape for path, shape in state.frozen.items() if path not in left_out]
        arrays = jax.tree.leaves((state.trained, frozen, state.optimizer, state.ema))
        size = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
        if free is not None and size > free:
            problems.add(
                f"a checkpoint takes {_gib(size)}, {workdir} has {_gib(free)} free: give another "
                "--workdir, or free some space"
            )
    towers = tuple(dict.fromkeys(map(checkpoint.tower_of, left_out)))
    return Saving(
        str(workdir.absolute()), cfg.checkpoint_every, cfg.keep_checkpoints, size, free, towers
    )


def _changes(before: TrainConfig, after: TrainConfig) -> dict[str, list[Any]]:
    old, new = _leaves(to_dict(before)), _leaves(to_dict(after))
    keys = [*new, *(key for key in old if key not in new)]
    return {key: [old.get(key), new.get(key)] for key in keys if old.get(key) != new.get(key)}


def _leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Returns {dotted key: value} of the leaves of nested JSON. Lists of numbers and strings are
    leaves."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        return {key: value}
    return {
        name: leaf
        for part, inner in value.items()
        for name, leaf in _leaves(inner, f"{key}.{part}" if key else str(part)).items()
    }


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"


def dry_run_summary(report: DryRun) -> str:
    """Formats a report, without its problems, as text."""
    lines = [f"config of {report.name} (* differs from the file)"]
    for key, value in _leaves(report.config).items():
        change = f"  (file: {report.changed[key][0]!r})" if key in report.changed else ""
        lines.append(f"{'*' if change else ' '} {key} = {value!r}{change}")
    gone = report.changed.keys() - _leaves(report.config).keys()
    lines += [f"* {key} is not set  (file: {report.changed[key][0]!r})" for key in sorted(gone)]

    lines += ["", f"objective    {report.objective}, {report.steps:,} steps"]
    lines += _parameter_lines(report)
    lines.append(
        f"a step       {report.tokens_per_step:,.0f} tokens, {report.images_per_step:,.0f} images "
        "(with padding)"
    )
    if report.model_flops is not None:
        lines.append(f"model FLOPs  {report.model_flops:.4g} a step")
    for batch in report.batches:
        if len(report.batches) > 1:
            lines.append(
                f"batches      {batch.step_share:.1%} of the steps: {batch.rows:,} rows, "
                f"{batch.tokens:,} tokens, {batch.images:,} images"
            )
        lines += [_source_line(source, report.steps) for source in batch.sources]
    lines.append(f"devices      {report.devices} x {report.device_kind}")
    if report.mesh is not None:
        ways = ", ".join(f"{axis} {ways}" for axis, ways in report.mesh.items())
        lines.append(f"mesh         {ways} ({report.mesh_reasons})")
    lines += _memory_lines(report)
    return "\n".join(lines + _start_lines(report) + [f"note         {n}" for n in report.notes])


def _parameter_lines(report: DryRun) -> list[str]:
    if report.parameters is None:
        return ["parameters   unknown"]
    towers = report.parameters.values()
    total = TowerParameters(sum(t.trained for t in towers), sum(t.frozen for t in towers))
    return [
        f"{'parameters' if n == 0 else '':12} {tower:10} {count.trained:>15,} trained "
        f"{count.frozen:>15,} frozen"
        for n, (tower, count) in enumerate([*report.parameters.items(), ("all", total)])
    ]


def _source_line(source: SourcePreview, steps: int) -> str:
    documents = UNKNOWN if source.documents is None else f"{source.documents:,}"
    line = f"source       {source.name}: documents {documents}, share {source.share:.1%}"
    if not source.steps_per_epoch:
        return f"{line}, steps per epoch {UNKNOWN}"
    return (
        f"{line}, about {source.steps_per_epoch:,.0f} steps per epoch "
        f"({steps / source.steps_per_epoch:.2f} epochs)"
    )


def _memory_lines(report: DryRun) -> list[str]:
    if report.device_bytes is None:
        return []
    total = sum(report.device_bytes.values())
    return [
        f"memory       about {_gib(total)} per device, of which",
        *(f"             {kind:12} {_gib(size):>15}" for kind, size in report.device_bytes.items()),
        f"             not included: {NOT_ESTIMATED}; `emu-jax plan` compiles the step for a TPU "
        "and reports all of it",
    ]


def _start_lines(report: DryRun) -> list[str]:
    start, saving = report.start, report.saving
    size = "" if saving.bytes is None else f", {_gib(saving.bytes)} each"
    free = "" if saving.free_bytes is None else f" ({_gib(saving.free_bytes)} free)"
    lines = [
        f"checkpoints  {saving.workdir}{free}: every {saving.every:,} steps, the last "
        f"{saving.keep} are kept{size}"
    ]
    if saving.left_out:
        lines.append(f"             left in their parents: {', '.join(saving.left_out)}")
    if start.step is None:
        lines.append("starts       at step 0")
    else:
        lines += [
            f"resumes      from step {start.step:,}",
            f"may change   {', '.join(start.may_change)}",
        ]
    if start.init_from:
        lines.append(f"init_from    {start.init_from}")
    return lines + [f"parent       {tower}: {run}" for tower, run in start.parents.items()]
