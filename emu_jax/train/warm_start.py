"""Warm starts: the parameters that a run takes from other runs, its parents."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import jax

from emu_jax import checkpoint
from emu_jax.config import EmuConfig, save_json
from emu_jax.errors import UserError, suggest
from emu_jax.models.connectors import CONNECTORS
from emu_jax.models.quantized import Parameter, QuantizedMatrix
from emu_jax.storage import StorePath, as_path, files, join, local_copy, write_text, writing
from emu_jax.tokenizer import Tokenizer, added_tokens
from emu_jax.train.config import TrainConfig

_Shapes = dict[str, jax.ShapeDtypeStruct]
Quantizers = Mapping[str, Callable[[jax.Array], QuantizedMatrix]]  # by path


def config_keys() -> dict[str, str]:
    """Returns the key in EmuConfig that configures each tower, of any connector."""
    towers = {"visual": "vision"}
    for connector in CONNECTORS:
        towers |= connector.towers
    return towers | {"llama": "llama", "unet": "unet", "vae": "vae"}


class WarmStart:
    """The parents of a run: which towers they hold, and how to read and record them.

    Args:
        cfg: a config that `resolve` returned, possibly in an earlier process.
        workdir: the run directory. Relative parents are relative to it.

    Raises:
        UserError: a parent is named for a tower that does not exist.
    """

    def __init__(self, cfg: TrainConfig, workdir: Path) -> None:
        for tower in cfg.parents:
            if tower not in (known := config_keys()):
                raise UserError(f"parents.{tower}: no such tower{suggest(tower, known)}")
        self.cfg, self.workdir = cfg, workdir
        self._parents = {tower: join(workdir, parent) for tower, parent in cfg.parents.items()}

    @classmethod
    def resolve(cls, cfg: TrainConfig, workdir: Path) -> WarmStart:
        """Returns the warm start of a new run. Its `cfg` has the model and the towers of
        `init_from`, and the scaling factor that a parent measured for its autoencoder.

        Raises:
            UserError: a parent does not exist, or configures a tower differently.
        """
        if cfg.init_from:
            return cls(_from_run(cfg, workdir), workdir)
        warm_start = cls(cfg, workdir)
        model = cfg.model
        for tower, parent in warm_start._parents.items():
            name = config_keys()[tower]
            theirs, ours = getattr(checkpoint.load_model_config(parent), name), getattr(model, name)
            if name == "vae" and ours and theirs:
                ours = dataclasses.replace(ours, scaling_factor=theirs.scaling_factor)
            if not getattr(ours, "shapes_parameters", True):  # a connector, of any size
                theirs = ours
            if name == "vision":  # positions are interpolated
                theirs = dataclasses.replace(theirs, image_size=ours.image_size)
            if name == "llama":  # padding rows are added or dropped
                theirs = dataclasses.replace(theirs, vocab_multiple=ours.vocab_multiple)
            if theirs != ours:
                raise UserError(
                    f"parent {parent}: its {name} is not configured as this run's: make "
                    f"model.{name} equal to {parent / 'config.json'}"
                )
            model = dataclasses.replace(model, **{name: ours})
        return cls(dataclasses.replace(cfg, model=model), workdir)

    def load(
        self, shapes: _Shapes, quantizers: Quantizers = MappingProxyType({})
    ) -> dict[str, Parameter]:
        """Loads the parameters found in parent runs, preferring EMA weights.

        Those with a quantizer are read one by one, the largest first, so that at most one of them
        is in floats.
        """
        params: dict[str, Parameter] = {}
        for _, parent, wanted in self._wanted(shapes):
            rest = {path: shape for path, shape in wanted.items() if path not in quantizers}
            params |= checkpoint.read_parent(parent, rest, self.cfg.model)
            matrices = (path for path in wanted if path in quantizers)
            for path in sorted(matrices, key=lambda path: -math.prod(wanted[path].shape)):
                read = checkpoint.read_parent(parent, {path: wanted[path]}, self.cfg.model)
                params[path] = jax.block_until_ready(quantizers[path](read.pop(path)))
        return params

    def check_quantized(self, paths: Iterable[str]) -> None:
        """Checks that parents hold the parameters that this run quantizes.

        Raises:
            UserError: a tower has no parent.
        """
        if missing := {checkpoint.tower_of(path) for path in paths} - self._parents.keys():
            raise UserError(
                f"no parent has {min(missing)}, which is to be quantized (quantize="
                f"{self.cfg.quantize}): set init_from to a pretrained model"
            )

    def check(self, shapes: _Shapes) -> list[str]:
        """Returns a line for each parent from which `load` could not read parameters. Reads no
        array."""
        problems = []
        for tower, parent, wanted in self._wanted(shapes):
            try:
                checkpoint.check_parent(parent, wanted, self.cfg.model)
            except UserError as error:
                problems.append(f"parents.{tower}: {error}")
        return problems

    def _wanted(self, shapes: _Shapes) -> Iterator[tuple[str, Path, _Shapes]]:
        """Yields (tower, parent, the tower's parameters) of each parent."""
        for tower, parent in self._parents.items():
            wanted = {k: v for k, v in shapes.items() if checkpoint.tower_of(k) == tower}
            if wanted:
                yield tower, parent, wanted

    def unsaved(self, frozen: _Shapes) -> _Shapes:
        """Returns the frozen parameters that this run does not save, because parents hold them."""
        if self.cfg.save_frozen:
            return {}
        stored = {
            (tower, path)
            for tower, parent in self._parents.items()
            for path, parent_shape in checkpoint.run_shapes(parent).items()
            # Interpolated positions are this run's own.
            if path != checkpoint.POSITIONS
            or path not in frozen
            or tuple(parent_shape.shape) == frozen[path].shape
        }
        return {
            path: s for path, s in frozen.items() if (checkpoint.tower_of(path), path) in stored
        }

    def write_run_files(self, tokenizer: Tokenizer, has_all_towers: bool) -> None:
        """Writes what `load` and a later resume need beside the steps.

        Args:
            has_all_towers: `Objective.has_all_towers`.
        """
        tokenizer.save(self.workdir / "tokenizer")
        save_json(self.cfg.model, self.workdir / "config.json")
        save_json(self.cfg, self.workdir / "train.json")
        self.copy_release_files()
        if not self.cfg.save_frozen or not has_all_towers:
            # The run directories of the towers that this run's steps omit.
            checkpoint.save_base(self.workdir, self._parents)

    def copy_release_files(self) -> None:
        """Copies from the parents the files that converting back to the release needs, and the
        generation settings of the model that is fine-tuned."""
        settings = as_path(self.cfg.init_from) / "generation.json"
        if self.cfg.init_from and settings.is_file():
            if not (self.workdir / settings.name).exists():
                write_text(self.workdir / settings.name, settings.read_text(encoding="utf-8"))
        for parent in self._parents.values():
            source, copy = parent / "release", self.workdir / "release"
            if source.is_dir() and not _is_copied(source, copy):
                with local_copy(source) as folder, writing(copy) as temporary:
                    shutil.copytree(folder, temporary)


def _is_copied(source: Path, copy: Path) -> bool:
    """Returns whether a folder has been copied. A kill may leave half of it in a store."""
    if not isinstance(copy, StorePath):
        return copy.exists()
    names = {path.relative_to(copy) for path in files(copy)}
    return all(path.relative_to(source) in names for path in files(source))


def _from_run(cfg: TrainConfig, workdir: Path) -> TrainConfig:
    """Returns a config with the model and the towers of `cfg.init_from`. An image decoder that has
    another parent is configured as that parent's."""
    parent = as_path(cfg.init_from).absolute()
    model = _extended(checkpoint.load_model_config(parent), cfg)
    for tower in cfg.parents.keys() & {"unet", "vae"}:
        parent_model = checkpoint.load_model_config(join(workdir, cfg.parents[tower]))
        keys = ("unet", "scheduler") if tower == "unet" else (tower,)
        model = dataclasses.replace(model, **{key: getattr(parent_model, key) for key in keys})
    towers = model.towers
    # Otherwise this run's module has no image decoder.
    if not cfg.traits.trains_unet and cfg.save_frozen:
        towers = model.language_towers
    parents = {tower: str(parent) for tower in towers} | cfg.parents
    return dataclasses.replace(cfg, model=model, parents=parents)


def _extended(parent: EmuConfig, cfg: TrainConfig) -> EmuConfig:
    """Returns a parent's model with the adapters of this run, and with the tokens of its data.

    Where a connector's numbers of embeddings shape no parameter (pooling), they are the run's, and
    so is the image size. A run that configures `vocab_multiple` has its own padding rows.

    Raises:
        UserError: the parent has other adapters.
    """
    llama, lora = parent.llama, cfg.model.llama.lora
    multiple = cfg.model.llama.vocab_multiple
    if lora is not None and llama.lora not in (None, lora):
        raise UserError(
            f"{cfg.init_from} has adapters of its own, {llama.lora}: merge them first "
            "(emu-jax convert --merge-lora), or set model.llama.lora to these"
        )
    tokens = parent.tokens.pad + len(added_tokens(parent.family, cfg.data.instruct))
    llama = dataclasses.replace(
        llama,
        lora=lora or llama.lora,
        vocab_size=max(llama.vocab_size, tokens),
        vocab_multiple=llama.vocab_multiple if multiple == 1 else multiple,
    )
    model = dataclasses.replace(parent, llama=llama)
    ours = cfg.model.connector
    if ours.shapes_parameters or type(ours) is not type(parent.connector):
        return model
    vision = dataclasses.replace(parent.vision, image_size=cfg.model.vision.image_size)
    return dataclasses.replace(
        model,
        vision=vision,
        pooling=cfg.model.pooling,
        other_connector=cfg.model.other_connector,
    )
