"""Run directories: their layout, and restoring them onto any mesh.

    DIR/config.json     EmuConfig of the model
    DIR/tokenizer/      the folder that `Tokenizer.load` reads
    DIR/<step>/params   orbax: the parameters, {tower: {...}}
    DIR/<step>/ema      the averaged parameters, if the run averages weights (preferred for use)
    DIR/<step>/...      what training needs to resume: optimizer, data position
    DIR/<step>/checksums.json  of every file but the arrays' data (`emu_jax.integrity`)
    DIR/base.json       the runs that hold the other towers, if `params` has only the trained ones:
                        {tower: run directory}, relative to DIR

In an object store, where nothing can be renamed, a step is complete once it holds COMMIT_MARKER,
which is written last and deleted first. DAMAGED_MARKER sets a step aside.

Saved parameters are nested dicts under the module's own attribute names, which allows reading one
tower without the rest. In memory they are flat (`sharding.AbstractModel`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from emu_jax import integrity
from emu_jax.config import EmuConfig, load_json
from emu_jax.errors import UserError
from emu_jax.models.eva_clip import interpolate_positions
from emu_jax.models.quantized import (
    Quantization,
    is_quantized,
    quantize,
    quantized_matrix,
)
from emu_jax.sharding import AbstractModel, fitted, flatten, nest
from emu_jax.storage import StorePath, files, folders, join, relative, write_text
from emu_jax.tokenizer import Tokenizer

_READ_BYTES = 2**28  # of arrays that are read at once
COMMIT_MARKER = "commit_success.txt"  # orbax's name
DAMAGED_MARKER = "damaged.txt"


def complete_steps(directory: Path) -> list[int]:
    """Returns the steps of a run directory, in no particular order. [] if there is no directory."""
    steps = step_folders(directory)
    if not isinstance(directory, StorePath):
        return steps
    return [step for step in steps if markers(directory / str(step)) == {COMMIT_MARKER}]


def step_folders(directory: Path) -> list[int]:
    """Returns the numbers among a run directory's folders. In a store, some may be incomplete."""
    try:
        return [int(name) for name in folders(directory) if name.isdecimal()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def markers(step: StorePath) -> set[str]:
    """Returns which of COMMIT_MARKER and DAMAGED_MARKER a step holds."""
    try:
        return {path.name for path in step.iterdir()} & {COMMIT_MARKER, DAMAGED_MARKER}
    except FileNotFoundError:  # removed meanwhile
        return set()


def latest_step(directory: Path) -> int:
    """Returns the newest complete step.

    Raises:
        UserError: the directory does not exist or holds no complete step.
    """
    if not directory.is_dir():
        raise UserError(f"no checkpoint at {directory}: the directory does not exist")
    steps = complete_steps(directory)
    if not steps:
        half = [str(step) for step in step_folders(directory)]
        missing = f" ({', '.join(half)}: no {COMMIT_MARKER}, so incomplete)" if half else ""
        raise UserError(
            f"no checkpoint in {directory}{missing}: train into it, or convert one, first"
        )
    return max(steps)


def stored_shapes(path: Path) -> dict[str, Any]:
    """Returns {dotted path: metadata with .shape and .dtype} of the item at `path` (DIR/step/item).

    Raises:
        UserError: the item cannot be read, or a file of it fails its checksum.
    """
    integrity.check_path(path)
    if path.is_dir():
        integrity.check_files(path.parent, [path.name])
    try:
        return flatten(ocp.PyTreeCheckpointHandler().metadata(epath.Path(path.absolute())).tree)
    except Exception as error:  # the libraries raise anything on foreign bytes
        raise UserError(f"cannot read the checkpoint {path}: {integrity.one_line(error)}") from None


def read_arrays(path: Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads flat parameters of the item at `path` into the wanted shapes, dtypes and shardings.

    `wanted` may name a subset of the stored parameters.

    Raises:
        UserError: the item lacks a wanted array or has it in another shape (all are listed), or
            stored data fails its checksum.
    """
    if not wanted:
        return {}
    if problems := _misfits(stored_shapes(path), wanted):
        raise UserError(f"{path} does not fit the configuration: " + "; ".join(problems))
    try:
        return flatten(read_tree(path, nest(wanted), partial=True))
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path} is damaged ({integrity.one_line(error)}): see emu-jax checkpoint verify "
            f"{path.parent.parent}, and use another step or copy"
        ) from None


def read_tree(path: Path, wanted: Any, *, partial: bool = False) -> Any:
    """Reads the arrays of the item at `path` into a tree of shapes, dtypes and shardings.

    Beside the arrays themselves, the host holds only those of one group (`_READ_BYTES`). Does not
    wait for other processes.

    Args:
        partial: `wanted` may lack arrays of the item.

    Raises:
        Exception: the item cannot be read. Orbax and TensorStore raise many kinds.
    """
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=_ARRAYS)
    args = ocp.args.PyTreeRestore(
        item=wanted,
        partial_restore=partial,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
    )
    return handler.restore(epath.Path(path.absolute()), args=args)


class _GroupedArrays(ocp.type_handlers.ArrayHandler):
    """Reads arrays a group at a time. Orbax alone reads all of an item at once, and so holds them
    on the host a second time while they move to their devices."""

    async def deserialize(
        self,
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.type_handlers.RestoreArgs] | None = None,
    ) -> list[jax.Array]:
        arrays: list[jax.Array] = []
        for group in _groups(args or ()):
            part = slice(len(arrays), len(arrays) + group)
            arrays += await super().deserialize(infos[part], args and args[part])
            jax.block_until_ready(arrays)  # only then can the host's copies go
        return arrays


def _groups(args: Sequence[Any]) -> Iterator[int]:
    """Yields how many of the next arrays form a group: as many as take at most `_READ_BYTES` of
    this process's devices, or one larger array."""
    count = total = 0
    for arg in args:
        size = math.prod(arg.global_shape) * np.dtype(arg.dtype).itemsize
        if arg.sharding is not None:
            shard = math.prod(arg.sharding.shard_shape(arg.global_shape))
            size = shard * np.dtype(arg.dtype).itemsize * len(arg.sharding.addressable_devices)
        if count and total + size > _READ_BYTES:
            yield count
            count = total = 0
        count, total = count + 1, total + size
    if count:
        yield count


_ARRAYS = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, _GroupedArrays()), (np.ndarray, ocp.type_handlers.NumpyHandler())
)


def _misfits(stored: dict[str, Any], wanted: dict[str, jax.ShapeDtypeStruct]) -> list[str]:
    """Describes each wanted array that is not stored in its shape."""
    for key in wanted:
        if f"{key}.values" in stored:
            return [f"{key} is quantized: use the checkpoint that it was made from"]
    problems = []
    for key, leaf in wanted.items():
        if key not in stored:
            problems.append(f"{key} is missing")
        elif tuple(stored[key].shape) != leaf.shape:
            problems.append(f"{key} is {list(stored[key].shape)}, not {list(leaf.shape)}")
    return problems


def read_params(
    directory: Path, wanted: dict[str, jax.ShapeDtypeStruct], *, averaged: bool = True
) -> dict[str, jax.Array]:
    """Reads the newest parameters of a run directory, including those of its base.

    Args:
        averaged: prefer averaged parameters, where the run keeps them.

    Raises:
        UserError: an array is missing or has another shape, or the base is missing.
    """
    step = directory / str(latest_step(directory))
    params = {}
    if averaged and (step / "ema").is_dir():
        stored = stored_shapes(step / "ema")
        params = read_arrays(step / "ema", {k: v for k, v in wanted.items() if k in stored})
    if base := base_of(directory):
        stored, model = stored_shapes(step / "params"), load_model_config(directory)
        rest = {k: v for k, v in wanted.items() if k not in params and k not in stored}
        for parent in set(base.values()):
            of_parent = {k: v for k, v in rest.items() if base.get(tower_of(k)) == parent}
            params |= read_parent(parent, of_parent, model)
    return params | read_arrays(
        step / "params", {k: v for k, v in wanted.items() if k not in params}
    )


def run_shapes(directory: Path) -> dict[str, Any]:
    """Returns {dotted path: metadata with .shape and .dtype} of a run directory and its base."""
    shapes = {}
    base = base_of(directory)
    for parent in set(base.values()):
        stored_there = run_shapes(parent)
        shapes |= {k: v for k, v in stored_there.items() if base.get(tower_of(k)) == parent}
    return shapes | stored_shapes(directory / str(latest_step(directory)) / "params")


def refuse_quantized(directory: Path, stored: Iterable[str]) -> None:
    """Checks that a run directory's parameters are not quantized.

    Args:
        stored: their paths (`run_shapes`).

    Raises:
        UserError: some are.
    """
    if any(path.endswith(".values") for path in stored):
        raise UserError(f"{directory} is quantized: use the checkpoint that it was made from")


def model_fingerprint(path: Path) -> str:
    """Returns a short hash of the contents that `emu_jax.load(path)` computes with.

    For a run directory these are config.json, tokenizer/, safety_checker/ and the newest step's
    `params` and `ema`, with those of its bases. For a release they are its weights, model
    configurations and tokenizer. Paths, times and optimizer state do not count, so a copy has the
    fingerprint of its original. A path that does not exist has that of an empty directory.

    The checksums that were saved with a step represent its arrays, since chunks get random names at
    each save. `load` verifies these checksums. Of a release, and of a step without checksums, every
    byte is read once, about as fast as `load` reads it.

    Raises:
        UserError: a base of the run directory is missing.
    """
    digest = hashlib.sha256()
    for name, content in _contents(path):
        digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()[:16]


_RELEASE_WEIGHTS = (".bin", ".pt", ".pth", ".safetensors", ".model")
_RELEASE_SETTINGS = {
    "Emu.json",
    "config.json",
    "scheduler_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
}


def _contents(path: Path) -> list[tuple[str, str]]:
    """Returns (name, hash) of each file that `model_fingerprint` includes."""
    if path.is_file():  # a release of one file, with its settings beside it
        beside = [path.parent / "Emu.json", *files(path.parent / "tokenizer")]
        return _hashes(path.parent, [path, *(p for p in beside if p.is_file())])
    if not (path / "config.json").is_file():
        counts = (
            p for p in files(path) if p.suffix in _RELEASE_WEIGHTS or p.name in _RELEASE_SETTINGS
        )
        return _hashes(path, counts)
    own = _hashes(
        path, [path / "config.json", *files(path / "tokenizer"), *files(path / "safety_checker")]
    )
    weights = _weights(path / str(latest_step(path)))
    bases = [
        (f"base {tower} {name}", content)
        for tower, base in sorted(base_of(path).items())
        for name, content in _contents(base)
    ]
    return own + weights + bases


def _weights(step: Path) -> list[tuple[str, str]]:
    """Returns `_contents` of a step, from its checksums or else by hashing its files."""
    try:
        stored = json.loads((step / integrity.CHECKSUMS).read_text())["sha256"]
        weights = sorted((n, c) for n, c in stored.items() if n.startswith(("ema/", "params/")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # older, or damaged
        weights = []
    return weights or [
        (f"{item}/{name}", content)
        for item in ("ema", "params")
        for name, content in _hashes(step / item, files(step / item))
    ]


def _hashes(root: Path, paths: Iterable[Path]) -> list[tuple[str, str]]:
    def of(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    paths = sorted(paths)
    with ThreadPoolExecutor(4) as readers:  # hashing and reading release the GIL
        return [
            (p.relative_to(root).as_posix(), content)
            for p, content in zip(paths, readers.map(of, paths), strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class StepReport:
    """The state of one step.

    Attributes:
        path: its directory.
        verified: False if it has no checksums.
        bytes: of its arrays.
        problems: a line for each damaged file and array.
    """

    path: str
    verified: bool
    bytes: int
    problems: list[str]


@dataclasses.dataclass(frozen=True)
class StepsReport:
    """The state of the steps that `verify_steps` read.

    Attributes:
        passed: none of them is damaged.
    """

    passed: bool
    steps: list[StepReport]

    def to_json(self) -> dict[str, Any]:
        """Returns {passed, steps: [{path, verified, bytes, problems}]}."""
        return dataclasses.asdict(self)


def verify_steps(directory: Path, step: int | None = None, *, every: bool = False) -> StepsReport:
    """Reads and verifies every byte of a step of a run directory, and of the bases that it needs.

    Args:
        step: the step to verify; by default the newest.
        every: verify all steps.

    Raises:
        UserError: the run directory does not have the step.
    """
    newest = latest_step(directory)
    steps = sorted(complete_steps(directory))
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps))
        raise UserError(f"{directory} has no step {step}: it has {known}")
    chosen = steps if every else [newest if step is None else step]
    reports = [_verify_step(directory / str(number)) for number in chosen]
    for base in sorted(set(base_of(directory).values())):
        reports += verify_steps(base).steps
    return StepsReport(not any(report.problems for report in reports), reports)


def _verify_step(step: Path) -> StepReport:
    sizes: list[int] = []
    try:
        verified, problems = True, integrity.damaged_files(step)
    except FileNotFoundError:
        verified, problems = False, []
    items = integrity.items_of(step)
    for item in items:
        problems += integrity.unreadable_arrays(step / item, progress=sizes.append)
    if "params" not in items:
        problems.append(f"{step / 'params'} is missing")
    return StepReport(str(step), verified, sum(sizes), problems)


def tower_of(path: str) -> str:
    """Returns the tower that a parameter belongs to."""
    return path.split(".")[0]


def save_base(directory: Path, towers: dict[str, Path]) -> None:
    """Writes base.json: the run directories of the towers that the steps of `directory` omit."""
    bases = {tower: relative(parent, directory) for tower, parent in towers.items()}
    write_text(directory / "base.json", json.dumps(bases, indent=1) + "\n")


def base_of(directory: Path) -> dict[str, Path]:
    """Returns the {tower: run directory} that `save_base` wrote, or {} if there is no base.

    Raises:
        UserError: a base is missing, or the bases form a cycle.
    """
    bases = _read_base(directory)
    for parent in set(bases.values()):
        _check_bases(parent, [directory.resolve()])
    return bases


def _read_base(directory: Path) -> dict[str, Path]:
    note = directory / "base.json"
    if not note.is_file():
        return {}
    try:
        bases = {t: join(directory, p) for t, p in json.loads(note.read_text()).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{note} is damaged ({error}): write {{tower: run directory}}") from None
    for parent in bases.values():
        if not parent.is_dir():
            raise UserError(f"{note} names {parent}, which is not there: correct it in that file")
    return bases


def _check_bases(directory: Path, users: list[Path]) -> None:
    """Checks that the bases form no cycle.

    Raises:
        UserError: a directory, or a base of it, is among the directories based on it.
    """
    resolved = directory.resolve()
    if resolved in users:
        raise UserError(
            f"{users[-1] / 'base.json'} names {resolved}, which is based on it itself: write the "
            "run directory that it was trained from"
        )
    for parent in set(_read_base(directory).values()):
        _check_bases(parent, [*users, resolved])


# Parameters with an axis over the vocabulary, and that axis.
_VOCABULARY = {"llama.embed_tokens.embedding": 0, "llama.lm_head.kernel": 1}
POSITIONS = "visual.pos_embed"  # of the image size


def read_parent(
    directory: Path, wanted: dict[str, jax.ShapeDtypeStruct], model: EmuConfig
) -> dict[str, jax.Array]:
    """Reads parameters of another run for `model`, which may have more adapters and tokens, and
    images of another size.

    Adapters that the other run lacks are left out. A new token gets the mean of the old tokens'
    rows (release: `modeling_llama.py`, where `[USER]` and `[ASSISTANT]` are added), and so does a
    new padding row. Positions of patches are interpolated.
    """
    parent = load_model_config(directory)
    parent_llama = parent.llama
    requested, resized = _asked_of_parent(parent, wanted, model)
    params = read_params(directory, requested)
    if POSITIONS in wanted and (ours := wanted[POSITIONS]).shape != params[POSITIONS].shape:
        resize = functools.partial(interpolate_positions, grid=model.vision.grid)
        params[POSITIONS] = jax.jit(resize, out_shardings=ours.sharding)(params[POSITIONS])
    for path, axis in resized.items():
        ours = wanted[path]

        def resize_table(
            table: Float[Array, "_ _"], axis: int = axis, shape: tuple[int, ...] = ours.shape
        ) -> Float[Array, "_ _"]:
            old = jnp.moveaxis(table, axis, 0)[: parent_llama.vocab_size]
            mean = jnp.mean(old.astype(jnp.float32), axis=0, keepdims=True).astype(old.dtype)
            more = jnp.repeat(mean, shape[axis] - parent_llama.vocab_size, axis=0)
            return jnp.moveaxis(jnp.concatenate([old, more]), 0, axis)

        params[path] = jax.jit(resize_table, out_shardings=ours.sharding)(params[path])
    return params


def check_parent(
    directory: Path, wanted: dict[str, jax.ShapeDtypeStruct], model: EmuConfig
) -> None:
    """Checks that `read_parent` would find the parameters. Reads no array.

    Raises:
        UserError: one is missing or has another shape (all are listed), or a base is missing.
    """
    requested, _ = _asked_of_parent(load_model_config(directory), wanted, model)
    if problems := _misfits(run_shapes(directory), requested):
        raise UserError(f"{directory} does not fit the configuration: " + "; ".join(problems))


def _asked_of_parent(
    parent: EmuConfig, wanted: dict[str, jax.ShapeDtypeStruct], model: EmuConfig
) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, int]]:
    """Returns (the arrays to read from a parent, {path: axis over the vocabulary} of those that
    have more tokens here, or other padding rows)."""
    parent_llama = parent.llama
    if parent_llama.lora is None:
        wanted = {k: v for k, v in wanted.items() if not k.endswith((".lora_a", ".lora_b"))}
    requested, resized = dict(wanted), {}
    surplus = parent_llama.vocab_size - model.llama.vocab_size
    if surplus < 0 or (surplus == 0 and parent_llama.padded_vocab != model.llama.padded_vocab):
        resized = {k: axis for k, axis in _VOCABULARY.items() if k in wanted}
    for path, axis in resized.items():
        ours = wanted[path]
        shape = tuple(
            parent_llama.padded_vocab if n == axis else s for n, s in enumerate(ours.shape)
        )
        whole = NamedSharding(ours.sharding.mesh, PartitionSpec())  # the old size may not divide
        requested[path] = jax.ShapeDtypeStruct(shape, ours.dtype, sharding=whole)
    if POSITIONS in wanted:
        ours = wanted[POSITIONS]
        shape = (parent.vision.tokens, *ours.shape[1:])
        whole = NamedSharding(ours.sharding.mesh, PartitionSpec())
        if shape != ours.shape:
            requested[POSITIONS] = jax.ShapeDtypeStruct(shape, ours.dtype, sharding=whole)
    return requested, resized


def load_model_config(directory: Path) -> EmuConfig:
    """Loads the model configuration of a run directory.

    Raises:
        UserError: the directory or its config.json is missing, or the config is invalid.
    """
    if not directory.is_dir():
        raise UserError(f"no checkpoint at {directory}: the directory does not exist")
    cfg = load_json(EmuConfig, directory / "config.json")
    try:
        cfg.check_tokens()
    except UserError as error:
        raise UserError(f"{directory / 'config.json'}: {error}") from None
    return cfg


def load_tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory / "tokenizer")


def load_module(
    directory: Path,
    build: Callable[[], nnx.Module],
    mesh: Mesh,
    dtype: DTypeLike = jnp.float32,
    quantization: Quantization | None = None,
) -> nnx.Module:
    """Builds a module with the newest parameters of `directory`, sharded over `mesh`.

    Each parameter is read straight into `dtype`: no wider copy is ever in memory. Matrices that are
    quantized are read a group at a time (`_READ_BYTES`).
    """
    template = AbstractModel(build, mesh)
    wanted = {
        path: jax.ShapeDtypeStruct(shape.shape, dtype, sharding=shape.sharding)
        for path, shape in template.shapes.items()
    }
    params: dict[str, Any] = {}
    stored = _stored_quantized(directory, template)
    if quantization is not None and stored:
        raise UserError(f"{directory} is quantized already: leave the quantization out")
    parts = {f"{path}.{part}": s for path, pair in stored.items() for part, s in pair.items()}
    arrays = read_params(directory, parts) if parts else {}
    for path, pair in stored.items():
        params[path] = quantized_matrix(path, *(arrays.pop(f"{path}.{part}") for part in pair))
        del wanted[path]
    if quantization is not None:
        matrices = {path: wanted.pop(path) for path in filter(is_quantized, list(wanted))}
        for group in _shape_groups(matrices):
            read = read_params(directory, group)
            for path in group:
                params[path] = quantize(path, read.pop(path), quantization)
            jax.block_until_ready([params[path] for path in group])  # frees the floats
    return template.module(params | read_params(directory, wanted))


def _shape_groups(
    wanted: dict[str, jax.ShapeDtypeStruct],
) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
    """Splits parameters into groups of at most `_READ_BYTES`, or one larger parameter.

    The largest come first, while there is still room for them beside the quantized ones.
    """
    group: dict[str, jax.ShapeDtypeStruct] = {}
    total = 0
    for path, shape in sorted(wanted.items(), key=lambda item: -math.prod(item[1].shape)):
        size = math.prod(shape.shape) * shape.dtype.itemsize
        if group and total + size > _READ_BYTES:
            yield group
            group, total = {}, 0
        group[path] = shape
        total += size
    if group:
        yield group


def _stored_quantized(
    directory: Path, template: AbstractModel
) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Returns {path: {part: its shape}} of the parameters that a run directory has quantized."""
    stored = stored_shapes(directory / str(latest_step(directory)) / "params")
    parts: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for path in filter(is_quantized, template.shapes):
        if f"{path}.values" not in stored:
            continue
        parts[path] = {}
        for part in ("values", "scales"):
            array = stored[f"{path}.{part}"]
            sharding = fitted(template.shapes[path].sharding, tuple(array.shape))
            parts[path][part] = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    return parts
