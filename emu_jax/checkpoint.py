"""Run directories: what is saved, and the way back onto any mesh.

    DIR/config.json     EmuConfig of the model
    DIR/tokenizer/      what `Tokenizer.load` reads
    DIR/<step>/params   orbax: the parameters, {tower: {...}}
    DIR/<step>/ema      where weights are averaged: the averaged parameters (preferred for use)
    DIR/<step>/...      what training needs to go on: optimizer, position

Saved parameters are nested dicts under the module's own attribute names, so that a tower
can be read without the rest. In memory they are flat (`sharding.Template`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from emu_jax.config import EmuConfig, UserError, load_json
from emu_jax.sharding import Template, flatten, nest
from emu_jax.tokenizer import Tokenizer


def latest_step(directory: Path) -> int:
    """The newest complete step.

    Raises:
        UserError: the directory holds none.
    """
    if not directory.is_dir():
        raise UserError(f"no checkpoint at {directory}: the directory does not exist")
    steps = [int(p.name) for p in directory.iterdir() if p.name.isdigit()]
    if not steps:
        raise UserError(f"no checkpoint in {directory}: train into it, or convert one, first")
    return max(steps)


def stored_shapes(path: Path) -> dict[str, Any]:
    """{dotted path: metadata with .shape and .dtype} of the item at `path` (DIR/step/item).

    Raises:
        UserError: there is no readable item.
    """
    try:
        return flatten(ocp.PyTreeCheckpointHandler().metadata(epath.Path(path.absolute())).tree)
    except (FileNotFoundError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"cannot read the checkpoint {path}: {error}") from None


def read(path: Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads flat parameters of the item at `path` into the wanted shapes, dtypes, shardings.
    `wanted` may name a part of what is stored.

    Raises:
        UserError: the item lacks a wanted array or has it in another shape; all are listed.
    """
    stored = stored_shapes(path)
    problems = []
    for key, leaf in wanted.items():
        if key not in stored:
            problems.append(f"{key} is missing")
        elif tuple(stored[key].shape) != leaf.shape:
            problems.append(f"{key} is {list(stored[key].shape)}, not {list(leaf.shape)}")
    if problems:
        raise UserError(f"{path} does not fit the configuration: " + "; ".join(problems))
    tree = nest(wanted)
    args = ocp.args.PyTreeRestore(
        item=tree, partial_restore=True,
        restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
    )  # fmt: skip
    return flatten(ocp.PyTreeCheckpointer().restore(path.absolute(), args=args))


def read_params(
    directory: Path, wanted: dict[str, jax.ShapeDtypeStruct], *, averaged: bool = True
) -> dict[str, jax.Array]:
    """The newest parameters of a run directory; averaged ones where it keeps them."""
    step = directory / str(latest_step(directory))
    params = {}
    if averaged and (step / "ema").is_dir():
        stored = stored_shapes(step / "ema")
        params = read(step / "ema", {k: v for k, v in wanted.items() if k in stored})
    return params | read(step / "params", {k: v for k, v in wanted.items() if k not in params})


def load_config(directory: Path) -> EmuConfig:
    """The model configuration of a run directory."""
    if not directory.is_dir():
        raise UserError(f"no checkpoint at {directory}: the directory does not exist")
    return load_json(EmuConfig, directory / "config.json")


def load_tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory / "tokenizer")


def load_module(directory: Path, build: Callable[[], nnx.Module], mesh: Mesh) -> nnx.Module:
    """The module that `build()` makes, with the newest parameters of `directory`, sharded."""
    template = Template(build, mesh)
    return template.module(read_params(directory, template.shapes))
