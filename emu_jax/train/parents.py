"""Warm starts: the towers that a run takes from other runs, and where they are stored."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import jax

from emu_jax import checkpoint
from emu_jax.config import EmuConfig
from emu_jax.errors import UserError, suggest
from emu_jax.filesystem import write_text, writing
from emu_jax.train.config import TrainConfig

# Where a tower of the module has its configuration.
CONFIG_OF = {
    "visual": "vision",
    "ln_visual": "vision",
    "cformer": "cformer",
    "llama": "llama",
    "unet": "unet",
    "vae": "vae",
}


def parent_of(cfg: TrainConfig, workdir: Path, tower: str) -> Path:
    if tower not in CONFIG_OF:
        raise UserError(f"parents.{tower}: no such tower{suggest(tower, CONFIG_OF)}")
    return Path(os.path.normpath(workdir / cfg.parents[tower]))


def adopt(cfg: TrainConfig, workdir: Path) -> TrainConfig:
    """The run with its parents spelled out: the model of `init_from`, and what parents
    measured (the autoencoder's scaling factor).

    Raises:
        UserError: a parent's tower has another configuration than this run's.
    """
    if cfg.init_from:
        parent = Path(cfg.init_from).absolute()
        model = _extended(checkpoint.load_config(parent), cfg)
        has = {"unet": model.unet is not None, "vae": model.vae is not None}
        towers = [tower for tower in CONFIG_OF if has.get(tower, True)]
        if cfg.objective != "decoder" and cfg.save_frozen:  # the painter is not in this run
            towers = [tower for tower in towers if tower not in has]
        parents = {tower: str(parent) for tower in towers} | cfg.parents
        return dataclasses.replace(cfg, model=model, parents=parents)
    model = cfg.model
    for tower in cfg.parents:
        name = CONFIG_OF.get(tower, tower)
        parent = parent_of(cfg, workdir, tower)
        theirs, ours = getattr(checkpoint.load_config(parent), name), getattr(model, name)
        if name == "vae" and ours and theirs:
            ours = dataclasses.replace(ours, scaling_factor=theirs.scaling_factor)
        if theirs != ours:
            raise UserError(
                f"parent {parent}: its {name} is not configured as this run's: make model.{name} "
                f"equal to {parent / 'config.json'}"
            )
        model = dataclasses.replace(model, **{name: ours})
    return dataclasses.replace(cfg, model=model)


def _extended(parent: EmuConfig, cfg: TrainConfig) -> EmuConfig:
    """A parent's model with the adapters of this run, and with the tokens of its data.

    Raises:
        UserError: the parent has other adapters.
    """
    llama, lora = parent.llama, cfg.model.llama.lora
    if lora is not None and llama.lora not in (None, lora):
        raise UserError(
            f"{cfg.init_from} has adapters of its own, {llama.lora}: merge them first "
            "(emu-jax convert --merge-lora), or set model.llama.lora to these"
        )
    # `[USER]` and `[ASSISTANT]` follow `<image>`.
    tokens = parent.tokens.image + 1 + (2 if cfg.data.instruct else 0)
    llama = dataclasses.replace(
        llama, lora=lora or llama.lora, vocab_size=max(llama.vocab_size, tokens)
    )
    return dataclasses.replace(parent, llama=llama)


def read(
    cfg: TrainConfig, workdir: Path, shapes: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Loads the parameters found in parent runs, preferring EMA weights."""
    params: dict[str, jax.Array] = {}
    for tower in cfg.parents:
        wanted = {k: v for k, v in shapes.items() if checkpoint.tower_of(k) == tower}
        if wanted:
            params |= checkpoint.read_parent(parent_of(cfg, workdir, tower), wanted, cfg.model)
    return params


def inherited(
    cfg: TrainConfig, workdir: Path, frozen: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the frozen parameters that stay in the parents' run directories and that this run
    does not save."""
    if cfg.save_frozen:
        return {}
    stored = {
        (tower, path)
        for tower in cfg.parents
        for path in checkpoint.run_shapes(parent_of(cfg, workdir, tower))
    }
    return {path: s for path, s in frozen.items() if (checkpoint.tower_of(path), path) in stored}


def carry(cfg: TrainConfig, workdir: Path) -> None:
    """Copies into this run the files of a converted parent that converting back needs
    (`convert.source`), and the generation settings of the model that is tuned."""
    settings = Path(cfg.init_from) / "generation.json"
    if cfg.init_from and settings.is_file() and not (workdir / settings.name).exists():
        write_text(workdir / settings.name, settings.read_text(encoding="utf-8"))
    for tower in cfg.parents:
        source, copy = parent_of(cfg, workdir, tower) / "release", workdir / "release"
        if source.is_dir() and not copy.exists():
            with writing(copy) as temporary:
                shutil.copytree(source, temporary)


def note_base(cfg: TrainConfig, workdir: Path) -> None:
    """Notes where the parameters are that this run does not save."""
    if not cfg.save_frozen or cfg.latents:
        checkpoint.save_base(workdir, {t: parent_of(cfg, workdir, t) for t in cfg.parents})
