"""Sources of a model's parameters: a release, a run directory, or either with adapters merged.

All are read a few parameters at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from emu_jax import checkpoint
from emu_jax.config import LORA_TARGETS, EmuConfig, LoraConfig
from emu_jax.convert import release_config, tables, tensor_files
from emu_jax.convert.checkpoint_arrays import ArrayReader
from emu_jax.convert.tables import KeyStyle, TableRow, peft_key
from emu_jax.convert.tensors import Tensor, copy_into, dtype_name, dtype_of
from emu_jax.convert.torch_format import TORCH_SUFFIXES
from emu_jax.errors import UserError, suggest
from emu_jax.models.emu import EmuModel
from emu_jax.models.llama import rotary_frequencies
from emu_jax.models.lora import merge
from emu_jax.models.quantized import Quantization, is_quantized, quantize
from emu_jax.progress import BRIEF_SECONDS, ProgressBar
from emu_jax.sharding import AbstractModel
from emu_jax.storage import fetched, is_remote, read_json_object
from emu_jax.tokenizer import Tokenizer, added_tokens

MULTIMODAL = "multimodal_encoder/pytorch_model.bin"
_INSTRUCT = "Emu-instruct.pt"
# Files and folders of a release that hold no tensors. They are copied unchanged.
CARRIED = (
    "Emu.json",
    "model_index.json",
    "tokenizer",
    "scheduler",
    "feature_extractor",
    "safety_checker",
    "unet/config.json",
    "vae/config.json",
)
# Emu2's releases on the Hub have other small files too, which are carried by their suffix.
_CARRIED_SUFFIXES = (".json", ".md", ".model", ".py", ".txt")
# In a Hub folder: the rotary frequencies of the native file that it was written from, if others
# than `default_unused` has.
FREQUENCIES_FILE = "rotary_frequencies.json"
_MODEL_JSON = {"emu": "Emu.json", "emu2": "Emu2.json"}  # sizes that the release keeps in its code
_TOKENIZER_FILE = re.compile(r"config\.json|(added|special)?_?token[\w]*\.(json|model)")
RELEASE_ALPHA = LoraConfig.alpha
UNUSED_FILE = "dead.safetensors"  # in the `release` folder of a run directory
T5_VOCABULARY = 32128  # rows of the embedding table that the Causal Transformer never uses
FLOATS = tuple(map(np.dtype, (np.float32, np.float16, jnp.bfloat16)))
DECODER = ("unet", "vae")  # the towers with folders and key prefixes of their own
# Folders of an image decoder in diffusers' layout.
DECODER_FOLDERS = (*DECODER, "scheduler", "safety_checker", "feature_extractor")

# Keys of peft's LoraConfig. Keys that change the computation must have one of these values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # With other values peft modifies the base weights when it loads the adapters.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
# Keys that are read.
_READ = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")
# Keys that do not change the computation: provenance, and settings of features that are off.
_INERT = (
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "layers_pattern",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "eva_config",
    "loftq_config",
    "corda_config",
    "lora_ga_config",
)


@dataclasses.dataclass(frozen=True)
class ReleaseLayout:
    """The layout of a model in the release's own files, from which they can be restored.

    Attributes:
        tensors: {file: {key in that file, prefixed `unet:` or `vae:`: dtype}}.
        wrapper_keys: {file: the key under which it wraps its state dict}.
        carried: other files and folders: {name: its present path}.
    """

    style: KeyStyle
    tensors: dict[str, dict[str, np.dtype]]
    wrapper_keys: dict[str, str | None] = dataclasses.field(default_factory=dict)
    carried: dict[str, Path] = dataclasses.field(default_factory=dict)

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """Every key with its dtype."""
        return {key: dtype for keys in self.tensors.values() for key, dtype in keys.items()}

    def only(self, predicate: Callable[[str], bool]) -> ReleaseLayout:
        """Returns a copy with only the tensors whose keys pass `predicate`, without the files that
        describe the others.

        These are the index of shards that lose tensors, and the JSON of a decoder tower that
        loses all of them.
        """
        tensors = {
            name: {key: dtype for key, dtype in keys.items() if predicate(key)}
            for name, keys in self.tensors.items()
        }
        tensors = {name: keys for name, keys in tensors.items() if keys}
        carried = dict(self.carried)
        for name in self.carried:
            folder = PurePosixPath(name).parent
            before, after = _keys_under(folder, self.tensors), _keys_under(folder, tensors)
            if tensor_files.is_index(name):
                stale = after != before
            else:
                stale = str(folder) in DECODER and not after
            if stale:
                del carried[name]
        return dataclasses.replace(self, tensors=tensors, carried=carried)

    def save(self, path: Path) -> None:
        values = {  # run directories have these names: "spelling" and "nests" are older words
            "spelling": dataclasses.asdict(self.style),
            "nests": self.wrapper_keys,
            "carried": sorted(self.carried),
            "tensors": {
                name: {key: dtype_name(dtype) for key, dtype in keys.items()}
                for name, keys in self.tensors.items()
            },
        }
        path.write_text(json.dumps(values, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path, folder: Path) -> ReleaseLayout:
        """Loads the output of `save`. The carried files are in `folder`."""
        values = read_json_object(path)
        return cls(
            style=KeyStyle(**values["spelling"]),
            tensors={
                name: {key: dtype_of(dtype) for key, dtype in keys.items()}
                for name, keys in values["tensors"].items()
            },
            wrapper_keys=values["nests"],
            carried={name: folder / name for name in values["carried"]},
        )


def _keys_under(folder: PurePosixPath, tensors: Mapping[str, Mapping[str, np.dtype]]) -> set[str]:
    """Returns the keys of all tensor files in a folder."""
    return {
        key
        for name, keys in tensors.items()
        if PurePosixPath(name).is_relative_to(folder)
        for key in keys
    }


class ModelSource(Protocol):
    """A model whose parameters can be read layer by layer.

    Attributes:
        shapes: every parameter's shape, stored dtype and sharding.
        layout: the release's layout, or None if the model did not come from a release.
        unused: tensors of the release that belong to no parameter, by their name in its files.
    """

    cfg: EmuConfig
    tokenizer: Tokenizer
    shapes: dict[str, jax.ShapeDtypeStruct]
    unused: dict[str, Tensor]

    @property
    def layout(self) -> ReleaseLayout | None: ...

    def read(self, path: str, layer: int) -> np.ndarray:
        """Reads one layer of a stacked parameter, or (as layer 0) the whole of another.

        The result may be a view of a mapped file, and its dtype may differ from the one in
        `shapes`.
        """
        ...


def layers(row: TableRow) -> range:
    """Returns the layer numbers that `ModelSource.read` accepts for a parameter."""
    return range(len(row.keys) if row.stacked else 1)


def each_layer(
    source: ModelSource, rows: Sequence[TableRow], task: str
) -> Iterator[tuple[TableRow, int]]:
    """Yields each row with each of its layers, and shows the progress."""
    sizes = [parameter_bytes(source.shapes[row.path]) for row in rows]
    with ProgressBar(task, sum(sizes), "B", min_seconds=BRIEF_SECONDS) as bar:
        for row, size in zip(rows, sizes, strict=True):
            for layer in layers(row):
                yield row, layer
                bar.add(size // len(layers(row)))


def parameter_bytes(shape: jax.ShapeDtypeStruct) -> int:
    """Returns the size of a parameter."""
    return math.prod(shape.shape) * shape.dtype.itemsize


def rows_of(cfg: EmuConfig, shapes: Mapping[str, Any]) -> list[TableRow]:
    """Returns the table of a model with these parameter shapes."""
    return tables.model_rows(cfg, {path: tuple(s.shape) for path, s in shapes.items()})


@functools.cache
def abstract_model(cfg: EmuConfig, mesh: Mesh) -> AbstractModel:
    """Returns the model that `cfg` describes, without its arrays."""
    return AbstractModel(lambda: EmuModel(cfg, rngs=nnx.Rngs(0)), mesh)


def open_model_source(
    path: Path,
    mesh: Mesh,
    *,
    model_config: Path | None = None,
    tokenizer: Path | None = None,
    base: Path | None = None,
    scratch: Path | None = None,
) -> ModelSource:
    """Opens the source at `path`, recognizing its kind.

    Args:
        path: a run directory in a store is read in place; anything else is downloaded first, to
            the system's directory for temporary files.
        base: the model that a peft folder's adapters belong to.
        scratch: a directory for temporary files; by default the system's.

    Raises:
        UserError: the source is of no known kind, or a part of it is missing or wrong.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if is_remote(path) and not checkpoint.complete_steps(path):
        if path.is_file():
            raise UserError(f"{path} is a file in a store: name its folder, or download it")
        path = fetched(path)
    if (path / "adapter_config.json").is_file():
        if base is None:
            raise UserError(f"{path} holds only adapters: name their model with --base")
        beneath = open_model_source(
            base, mesh, model_config=model_config, tokenizer=tokenizer, scratch=scratch
        )
        return AdaptedSource.open(path, beneath, mesh)
    if base is not None:
        raise UserError(
            f"{path} is not a peft folder (it has no adapter_config.json): leave out --base"
        )
    if path.is_file():
        if path.suffix not in (*TORCH_SUFFIXES, ".safetensors"):
            raise UserError(f"{path}: expected a .pt file, a release folder or a run directory")
        return ReleaseSource.open(path, mesh, model_config, tokenizer)
    if (path / "multimodal_encoder").is_dir() or _is_hub_folder(path):
        return ReleaseSource.open(path, mesh, model_config, tokenizer)
    if (path / "config.json").is_file() and checkpoint.complete_steps(path):
        if model_config or tokenizer:
            raise UserError(f"{path} has its own configuration and tokenizer: give no others")
        return RunSource.open(path, mesh, scratch)
    if (path / _INSTRUCT).is_file():
        return ReleaseSource.open(path / _INSTRUCT, mesh, model_config, tokenizer)
    raise UserError(
        f"{path} is neither a release (it has no multimodal_encoder/ and no {_INSTRUCT}) nor a run "
        "directory (no config.json beside numbered steps)"
    )


def is_release(path: Path) -> bool:
    """Returns whether `open_model_source` would treat `path` as the release's own files."""
    if path.is_file() or _is_hub_folder(path):
        return True
    return not (path / "config.json").is_file() and (
        (path / "multimodal_encoder").is_dir() or (path / _INSTRUCT).is_file()
    )


def _is_hub_folder(path: Path) -> bool:
    """Returns whether a folder has Emu2's layout on the Hub: weights beside a `config.json` that
    describes the visual encoder."""
    config = path / "config.json"
    return config.is_file() and release_config.emu2_vision_json(config) is not None


def load_release(
    path: Path,
    mesh: Mesh,
    dtype: jnp.dtype | type = jnp.float32,
    quantization: Quantization | None = None,
) -> tuple[EmuModel, Tokenizer]:
    """Loads a model from the release's own files, without an intermediate run directory.

    Each parameter is read straight into `dtype`, and then quantized.

    Raises:
        UserError: the path is not a release, or a part of it is missing or wrong.
    """
    source = open_model_source(path, mesh)
    params: dict[str, Any] = {}
    for row in rows_of(source.cfg, source.shapes):
        shape = source.shapes[row.path]
        wanted = jax.ShapeDtypeStruct(shape.shape, jnp.dtype(dtype), sharding=shape.sharding)
        value = assemble(row, wanted, functools.partial(source.read, row.path))
        if quantization and is_quantized(row.path):
            value = quantize(row.path, value, quantization)
        params[row.path] = value
    model = abstract_model(source.cfg, mesh).module(params)
    assert isinstance(model, EmuModel)
    return model, source.tokenizer


@dataclasses.dataclass
class _TensorFiles:
    """The tensor files of a release, opened one after the other.

    Attributes:
        folder: the release's folder. File names are relative to it.
        by_file: {file: {key, prefixed `unet:` or `vae:`: tensor}}.
        wrapper_keys: {file: the key under which it wraps its state dict}.
        indexes: {file: path} of the indexes of shards.
    """

    folder: Path
    by_file: dict[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    wrapper_keys: dict[str, str | None] = dataclasses.field(default_factory=dict)
    indexes: dict[str, Path] = dataclasses.field(default_factory=dict)

    def open(self, weights: Path, prefix: str = "") -> None:
        """Opens a file, or all shards of an index, with this prefix to their keys."""
        opened, wrapper_key = tensor_files.open_tensors(weights)
        for name, tensors in opened.items():
            name = str((weights.parent / name).relative_to(self.folder))
            self.by_file[name] = {prefix + key: t for key, t in tensors.items()}
            self.wrapper_keys[name] = wrapper_key
        if tensor_files.is_index(weights.name):
            self.indexes[str(weights.relative_to(self.folder))] = weights

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors of all files."""
        return {key: t for tensors in self.by_file.values() for key, t in tensors.items()}


@dataclasses.dataclass(frozen=True)
class ReleaseFiles:
    """The files of a release, by their role.

    Attributes:
        folder: the release's folder.
        weights: the file of the multimodal model's tensors, or the index of their shards.
        tokenizer: the tokenizer's folder.
        model_json: the file with the sizes that no tensor reveals; None if there is none.
        llama_json: the file with LLaMA's sizes; None if there is none.
    """

    folder: Path
    weights: Path
    tokenizer: Path
    model_json: Path | None
    llama_json: Path | None

    @classmethod
    def find(cls, path: Path, model_config: Path | None, tokenizer: Path | None) -> ReleaseFiles:
        """Finds the files of a release in its folder, or beside its only file.

        Args:
            model_config: takes the place of the model JSON.
            tokenizer: takes the place of the tokenizer's folder.

        Raises:
            UserError: a file is missing.
        """
        folder = path if path.is_dir() else path.parent
        multimodal = folder / "multimodal_encoder"
        if not multimodal.is_dir():
            multimodal = folder
        config = multimodal / "config.json"
        described = path.is_dir() and _is_hub_folder(multimodal)
        if tokenizer is None:
            tokenizer = folder / "tokenizer"
            if described and not tokenizer.is_dir():
                tokenizer = multimodal
        if not tokenizer.is_dir():
            raise UserError(f"there is no tokenizer folder {tokenizer}: give one with --tokenizer")
        if model_config is not None and not model_config.is_file():
            raise UserError(f"--model-config {model_config} does not exist")
        beside = [folder / name for name in _MODEL_JSON.values() if (folder / name).is_file()]
        beside += [config] if described else []
        sizes = [tokenizer / "config.json", *([config] if described else [])]
        return cls(
            folder=folder,
            weights=tensor_files.find(multimodal, "pytorch_model", "model")
            if path.is_dir()
            else path,
            tokenizer=tokenizer,
            model_json=model_config or next(iter(beside), None),
            llama_json=next((p for p in sizes if p.is_file()), None),
        )

    def carried(self, path: Path, cfg: EmuConfig) -> dict[str, Path]:
        """Returns {name in the release: present path} of its files other than tensors."""
        folder = self.folder
        carried = {n: folder / n for n in CARRIED if path.is_dir() and (folder / n).exists()}
        if path.is_dir() and _is_hub_folder(self.weights.parent):
            for files in (folder, self.weights.parent):
                carried |= {
                    str(p.relative_to(folder)): p
                    for p in sorted(files.iterdir())
                    if p.is_file() and (p.suffix in _CARRIED_SUFFIXES or p.name == "LICENSE")
                }
        if self.tokenizer == folder / "tokenizer":
            carried["tokenizer"] = self.tokenizer
        elif self.tokenizer != self.weights.parent or path.is_file():
            # That folder may hold LLaMA's weights too.
            carried.pop("tokenizer", None)
            carried |= {
                f"tokenizer/{p.name}": p
                for p in sorted(self.tokenizer.iterdir())
                if p.is_file() and _TOKENIZER_FILE.fullmatch(p.name)
            }
        if self.model_json and self.model_json != self.weights.parent / "config.json":
            carried[_MODEL_JSON[cfg.family]] = self.model_json
        if cfg.unet is not None and path.is_file() and (decoder := self.decoder()):
            carried |= {
                str(p.relative_to(decoder)): p
                for name in DECODER_FOLDERS
                for p in sorted((decoder / name).glob("*.json"))
            }
        return carried

    def decoder(self) -> Path | None:
        """Returns the folder with the JSON files of an image decoder whose weights are in the one
        native file of Emu2-Gen, or None if there are none.

        It is beside the file, the tokenizer or the model JSON (release: `conf/diffusion_config`).
        A folder of another name there counts only if it is the only one with a U-Net: others may
        be other models, with other schedulers.

        Raises:
            UserError: there are several such folders.
        """
        parents = [self.folder, self.tokenizer.parent]
        parents += [self.model_json.parent] if self.model_json else []
        for name in ("unet/config.json", "diffusion_config/unet/config.json"):
            for parent in parents:
                if (parent / name).is_file():
                    return (parent / name).parent.parent
        configs = (config for parent in parents for config in parent.glob("*/unet/config.json"))
        folders = sorted({config.resolve().parent.parent for config in configs})
        if len(folders) > 1:
            raise UserError(
                f"which image decoder is that of {self.weights}? There are "
                f"{', '.join(map(str, folders))}: copy the JSON files of one to "
                f"{self.folder / 'diffusion_config'}"
            )
        return folders[0] if folders else None


@dataclasses.dataclass
class ReleaseSource:
    """A model in the release's own folder, or in one of its .pt files.

    Attributes:
        rows: the row of each parameter.
        tensors: each parameter's tensors, in the order of its row's keys.
    """

    cfg: EmuConfig
    tokenizer: Tokenizer
    shapes: dict[str, jax.ShapeDtypeStruct]
    layout: ReleaseLayout
    unused: dict[str, Tensor]
    rows: dict[str, TableRow]
    tensors: dict[str, list[Tensor]]

    @classmethod
    def open(
        cls,
        path: Path,
        mesh: Mesh,
        model_config: Path | None = None,
        tokenizer: Path | None = None,
    ) -> ReleaseSource:
        """Opens a release, and checks all its names, shapes and dtypes.

        Raises:
            UserError: a part of the release is missing or wrong.
        """
        release = ReleaseFiles.find(path, model_config, tokenizer)
        files = _TensorFiles(release.folder)
        files.open(release.weights)
        base = Tokenizer.load(release.tokenizer, instruct=False)
        cfg = release_config.multimodal(
            {key: t.shape for key, t in files.tensors().items()},
            where=str(release.weights),
            base_vocab=base.base_size,
            model_json=release.model_json,
            llama_json=release.llama_json,
        )
        if KeyStyle.of(files.tensors()).one_file:
            cfg = release_config.with_decoder(cfg, release.decoder())
        elif path.is_dir() and any((path / tower).is_dir() for tower in DECODER):
            cfg = release_config.with_decoder(cfg, path)
            for tower in DECODER:
                weights = tensor_files.find(path / tower, "diffusion_pytorch_model")
                files.open(weights, f"{tower}:")

        abstract = abstract_model(cfg, mesh)
        rows = rows_of(cfg, abstract.shapes)
        stored = files.tensors()
        style = KeyStyle.of(stored)
        unused = tables.match(
            rows,
            {p: tuple(s.shape) for p, s in abstract.shapes.items()},
            cfg,
            style,
            {key: t.shape for key, t in stored.items()},
            str(path),
        )
        _check_floats(path, {key: t for key, t in stored.items() if key not in unused})
        names = style.names(rows, cfg)
        tensors = {row.path: [stored[names[key]] for key in row.keys] for row in rows}
        return cls(
            cfg=cfg,
            tokenizer=Tokenizer.load(
                release.tokenizer,
                instruct=cfg.llama.vocab_size - base.base_size
                == len(added_tokens(cfg.family, instruct=True)),
                family=cfg.family,
                fast=False,
            ),
            shapes={
                p: jax.ShapeDtypeStruct(s.shape, common_dtype(tensors[p]), sharding=s.sharding)
                for p, s in abstract.shapes.items()
            },
            layout=ReleaseLayout(
                style,
                {
                    name: {key: t.dtype for key, t in tensors.items()}
                    for name, tensors in files.by_file.items()
                },
                files.wrapper_keys,
                release.carried(path, cfg) | files.indexes,
            ),
            unused={key: stored[key] for key in unused},
            rows={row.path: row for row in rows},
            tensors=tensors,
        )

    def read(self, path: str, layer: int) -> np.ndarray:
        row = self.rows[path]
        shape = row.layer_shape(self.shapes[path].shape)
        return row.transform.from_release(self.tensors[path][layer].read(), shape)


def _check_floats(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Checks that all tensors have one of the dtypes that parameters may have."""
    wrong = {key: t.dtype for key, t in tensors.items() if t.dtype not in FLOATS}
    if wrong:
        raise UserError(
            f"{path}: {len(wrong)} tensors are not float32, float16 or bfloat16: "
            + ", ".join(f"{key} is {dtype}" for key, dtype in wrong.items())
        )


def common_dtype(tensors: Iterable[Tensor]) -> np.dtype:
    """Returns a dtype that holds all of a parameter's tensors exactly."""
    dtypes = {t.dtype for t in tensors}
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def assemble(
    row: TableRow, shape: jax.ShapeDtypeStruct, layer: Callable[[int], np.ndarray]
) -> jax.Array:
    """Places a parameter on the mesh, from its layers as `ModelSource.read` returns them.

    Beside the parameter itself, at most one shard is in memory at a time.
    """

    def shard(index: Any) -> np.ndarray:  # a slice for each axis
        if not row.stacked:
            part = layer(0)[index]
            out = np.empty(part.shape, shape.dtype)
            copy_into(out, part)
            return out
        size = [len(range(*s.indices(n))) for s, n in zip(index, shape.shape, strict=True)]
        out = np.empty(size, shape.dtype)
        for n, i in enumerate(range(*index[0].indices(shape.shape[0]))):
            copy_into(out[n], layer(i)[index[1:]])
        return out

    return jax.make_array_from_callback(shape.shape, shape.sharding, shard)


@dataclasses.dataclass
class RunSource:
    """A model in a run directory written by `convert`, `init` or training.

    Attributes:
        path: the run directory.
        rows: the row of each parameter.
        items: the saved item (DIR/<step>/params) that holds each parameter.
        arrays: a reader for each item.
        resized: parameters stored in another shape: tables with rows for fewer tokens.
    """

    cfg: EmuConfig
    tokenizer: Tokenizer
    shapes: dict[str, jax.ShapeDtypeStruct]
    layout: ReleaseLayout | None
    unused: dict[str, Tensor]
    path: Path
    rows: dict[str, TableRow]
    items: dict[str, Path]
    arrays: dict[Path, ArrayReader]
    resized: set[str]

    @classmethod
    def open(cls, path: Path, mesh: Mesh, scratch: Path | None = None) -> RunSource:
        """Opens a run directory.

        Args:
            scratch: a directory for temporary files; by default the system's.

        Raises:
            UserError: a part of the directory is missing or wrong, or it is quantized.
        """
        cfg = checkpoint.load_model_config(path)
        tokenizer = checkpoint.load_tokenizer(path)
        stored = checkpoint.run_shapes(path)
        checkpoint.refuse_quantized(path, stored)
        for tower in DECODER:  # pretraining may omit them
            if not any(p.startswith(f"{tower}.") for p in stored):
                cfg = dataclasses.replace(cfg, **{tower: None})
        shapes = {
            p: jax.ShapeDtypeStruct(
                s.shape, stored[p].dtype if p in stored else s.dtype, sharding=s.sharding
            )
            for p, s in abstract_model(cfg, mesh).shapes.items()
        }
        items = parameter_items(path)
        scratch = scratch or Path(tempfile.gettempdir())
        arrays = {item: ArrayReader(item, scratch) for item in set(items.values())}
        layout, unused, release = None, {}, path / "release"
        if (release / "layout.json").is_file():
            release = fetched(release)
            layout = ReleaseLayout.load(release / "layout.json", release / "files")
            unused = _unused_tensors(path)
        check_heads(path, cfg)
        return cls(
            cfg=cfg,
            tokenizer=tokenizer,
            shapes=shapes,
            layout=layout,
            unused=unused,
            path=path,
            rows={row.path: row for row in rows_of(cfg, shapes)},
            items=items,
            arrays=arrays,
            resized={
                p
                for p, s in shapes.items()
                if p not in stored or tuple(stored[p].shape) != tuple(s.shape)
            },
        )

    def read(self, path: str, layer: int) -> np.ndarray:
        row = self.rows[path]
        if path in self.resized:  # `read_params` grows the table, or raises a UserError
            whole = checkpoint.read_params(self.path, {path: self.shapes[path]})[path]
            return row.layer(np.asarray(whole), layer)
        return self.arrays[self.items[path]].read(path, layer if row.stacked else None)


def _unused_tensors(directory: Path) -> dict[str, Tensor]:
    """Opens the release's tensors that belong to no parameter.

    A converted run directory has them, and so does one trained from it. Returns {} for others.
    """
    path = directory / "release" / UNUSED_FILE
    if not path.is_file():
        return {}
    return next(iter(tensor_files.open_tensors(fetched(path))[0].values()))


def check_heads(directory: Path, cfg: EmuConfig) -> None:
    """Checks LLaMA's number of heads against the release's rotary frequencies.

    No parameter's shape reveals the number.

    Raises:
        UserError: the run directory was converted with another number of heads.
    """
    width = cfg.llama.head_width // 2
    for key, tensor in _unused_tensors(directory).items():
        if key.endswith("rotary_emb.inv_freq") and tensor.shape != (width,):
            raise UserError(
                f"{directory / 'config.json'}: llama.heads = {cfg.llama.heads} was edited: the "
                f"release had {cfg.llama.heads * width // tensor.shape[0]}"
            )


def parameter_items(directory: Path) -> dict[str, Path]:
    """Returns {parameter: the saved item (DIR/<step>/params) that holds it} of a run directory.

    Averaged parameters are preferred. Parameters that the steps omit come from the base.
    """
    items = {}
    base = checkpoint.base_of(directory)
    for parent in set(base.values()):
        items |= {
            path: item
            for path, item in parameter_items(parent).items()
            if base.get(checkpoint.tower_of(path)) == parent
        }
    step = directory / str(checkpoint.latest_step(directory))
    for item in (step / "params", step / "ema"):
        if item.is_dir():
            items |= dict.fromkeys(checkpoint.stored_shapes(item), item)
    return items


@dataclasses.dataclass
class MergedSource:
    """A model whose adapters are merged into the kernels, in float32.

    Attributes:
        source: the model with its adapters.
        lora: their settings.
    """

    cfg: EmuConfig
    tokenizer: Tokenizer
    shapes: dict[str, jax.ShapeDtypeStruct]
    layout: ReleaseLayout | None
    unused: dict[str, Tensor]
    source: ModelSource
    lora: LoraConfig

    @classmethod
    def of(cls, source: ModelSource) -> MergedSource:
        """Returns a source that merges another's adapters as it reads.

        Raises:
            UserError: the model has no adapters.
        """
        lora = source.cfg.llama.lora
        if lora is None:
            raise UserError("there are no LoRA parameters to merge")
        shapes = {}
        for path, shape in source.shapes.items():
            if path.endswith((".lora_a", ".lora_b")):
                continue
            if _adapter(path, source.shapes):
                shape = jax.ShapeDtypeStruct(shape.shape, jnp.float32, sharding=shape.sharding)
            shapes[path] = shape
        style = source.layout.style if source.layout else KeyStyle(peft=True)
        wrapped = style.write("decoder.lm.")
        # The language model's tensors get other names, and so go to their default file. Emu2's
        # releases have no adapters, and so keep their names.
        keeps_names = source.cfg.family == "emu2"
        return cls(
            cfg=dataclasses.replace(
                source.cfg, llama=dataclasses.replace(source.cfg.llama, lora=None)
            ),
            tokenizer=source.tokenizer,
            shapes=shapes,
            layout=source.layout
            and dataclasses.replace(
                source.layout.only(lambda key: keeps_names or ":" in key),
                style=dataclasses.replace(style, peft=False, base_layer=False),
            ),
            unused={
                "decoder.lm." + key.removeprefix(wrapped) if key.startswith(wrapped) else key: t
                for key, t in source.unused.items()
            },
            source=source,
            lora=lora,
        )

    def read(self, path: str, layer: int) -> np.ndarray:
        kernel = self.source.read(path, layer)
        if adapter := _adapter(path, self.source.shapes):
            parts = [kernel, *(self.source.read(p, layer) for p in adapter)]
            whole, a, b = (jnp.asarray(part.astype(np.float32)) for part in parts)
            kernel = np.asarray(merge(whole, a, b, self.lora))
        return kernel


def _adapter(path: str, shapes: Mapping[str, Any]) -> list[str]:
    """Returns the paths of a kernel's two adapter matrices, or [] if it has none."""
    stem = path.removesuffix(".kernel")
    pair = [f"{stem}.lora_a", f"{stem}.lora_b"]
    return pair if pair[0] in shapes else []


@dataclasses.dataclass
class RescaledSource:
    """A model whose adapters are rescaled to the alpha hard-coded in the release.

    The ratio is multiplied into their second matrices (`lora_b`), in float32.

    Attributes:
        source: the model with its own alpha.
        factor: its alpha divided by the release's.
    """

    cfg: EmuConfig
    tokenizer: Tokenizer
    shapes: dict[str, jax.ShapeDtypeStruct]
    layout: ReleaseLayout | None
    unused: dict[str, Tensor]
    source: ModelSource
    factor: np.float32

    @classmethod
    def of(cls, source: ModelSource, lora: LoraConfig) -> RescaledSource:
        """Returns a source that rescales another's adapters, with settings `lora`, as it reads."""
        llama = dataclasses.replace(
            source.cfg.llama, lora=dataclasses.replace(lora, alpha=RELEASE_ALPHA)
        )
        return cls(
            cfg=dataclasses.replace(source.cfg, llama=llama),
            tokenizer=source.tokenizer,
            shapes={
                p: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=s.sharding)
                if p.endswith(".lora_b")
                else s
                for p, s in source.shapes.items()
            },
            layout=source.layout,
            unused=source.unused,
            source=source,
            factor=np.float32(lora.alpha / RELEASE_ALPHA),
        )

    def read(self, path: str, layer: int) -> np.ndarray:
        stored = self.source.read(path, layer)
        if not path.endswith(".lora_b"):
            return stored
        return stored.astype(np.float32) * self.factor


def _adapter_config(note: Path) -> LoraConfig:
    """Reads an adapter_config.json.

    Unknown keys must be null, false or empty: a setting of a later peft is refused, not ignored.

    Raises:
        UserError: the file describes something other than plain LoRA on LLaMA's layers.
    """
    values = read_json_object(note)
    for key, value in values.items():
        if key in _READ or key in _INERT:
            continue
        allowed = _NEUTRAL.get(key, (None, False, {}, []))
        if not any(value == a and isinstance(value, type(a)) for a in allowed):
            hint = ""
            if key == "init_lora_weights":
                hint = (
                    ": save it with peft's path_initial_model_for_weight_conversion, as LoRA on "
                    "the original weights"
                )
            raise UserError(f"{note}: {key} is {value!r}; only {allowed[0]!r} is supported{hint}")
    targets = values.get("target_modules")
    rank: Any = values.get("r")
    alpha: Any = values.get("lora_alpha")
    dropout: Any = values.get("lora_dropout", 0.0)
    scaled = values.get("use_rslora") or False
    if (
        type(rank) is not int
        or type(alpha) not in (int, float)
        or type(dropout) not in (int, float)
        or not isinstance(targets, list)
    ):
        raise UserError(
            f"{note} must have r and lora_alpha as numbers, and target_modules as a list of layers"
        )
    if scaled not in (True, False):
        raise UserError(f"{note}: use_rslora is {scaled!r}, expected true or false")
    if scaled and rank > 0:  # peft divides by the square root of the rank, we by the rank
        alpha = alpha * math.sqrt(rank)
    for target in targets:
        if not isinstance(target, str) or target not in LORA_TARGETS:
            raise UserError(
                f"{note}: unknown LoRA target {target!r}{suggest(str(target), LORA_TARGETS)}"
            )
    order = list(LORA_TARGETS)
    try:
        return LoraConfig(
            rank=rank,
            alpha=float(alpha),
            dropout=float(dropout),
            targets=tuple(sorted(targets, key=order.index)),
        )
    except UserError as error:
        raise UserError(f"{note}: {error}") from None


@dataclasses.dataclass
class AdaptedSource:
    """A model with the adapters of a peft folder, which replace any of its own.

    Attributes:
        source: the model without these adapters.
        adapters: {parameter: (its row, its tensors in the peft folder)}.
    """

    cfg: EmuConfig
    tokenizer: Tokenizer
    shapes: dict[str, jax.ShapeDtypeStruct]
    layout: ReleaseLayout | None
    unused: dict[str, Tensor]
    source: ModelSource
    adapters: dict[str, tuple[TableRow, list[Tensor]]]

    @classmethod
    def open(cls, folder: Path, source: ModelSource, mesh: Mesh) -> AdaptedSource:
        """Opens the adapters in a peft folder on top of a model.

        Raises:
            UserError: the folder cannot be read, or its adapters are not plain LoRA on LLaMA.
        """
        lora = _adapter_config(folder / "adapter_config.json")
        cfg = dataclasses.replace(
            source.cfg, llama=dataclasses.replace(source.cfg.llama, lora=lora)
        )
        opened, _ = tensor_files.open_tensors(tensor_files.find(folder, "adapter_model"))
        stored = {key: t for tensors in opened.values() for key, t in tensors.items()}
        abstract = abstract_model(cfg, mesh)
        rows = {row.path: row for row in rows_of(cfg, abstract.shapes)}
        shapes, adapters = {}, {}
        for path, shape in abstract.shapes.items():
            if not path.endswith((".lora_a", ".lora_b")):
                shapes[path] = source.shapes[path]
                continue
            row = rows[path]
            expected_shape = row.release_shape(shape.shape)
            keys = [peft_key(key) for key in row.keys]
            for key in keys:
                if key not in stored or tuple(stored[key].shape) != expected_shape:
                    has = list(stored[key].shape) if key in stored else "missing"
                    raise UserError(f"{folder}: {key} is {has}, expected {list(expected_shape)}")
            shapes[path] = shape
            adapters[path] = row, [stored.pop(key) for key in keys]
        if stored:
            raise UserError(f"{folder} has {len(stored)} unexpected tensors: {next(iter(stored))}")
        # Adapters on other layers change the names of the layers' own weights.
        before = source.cfg.llama.lora
        same_names = before is None or before.targets == lora.targets
        return cls(
            cfg=cfg,
            tokenizer=source.tokenizer,
            shapes=shapes,
            layout=source.layout if same_names else None,
            unused=source.unused if same_names else {},
            source=source,
            adapters=adapters,
        )

    def read(self, path: str, layer: int) -> np.ndarray:
        if path not in self.adapters:
            return self.source.read(path, layer)
        row, tensors = self.adapters[path]
        shape = row.layer_shape(self.shapes[path].shape)
        return row.transform.from_release(tensors[layer].read(), shape)


def default_unused(
    cfg: EmuConfig, dtype: np.dtype | type[np.generic] = np.float32
) -> dict[str, Tensor]:
    """Returns unused tensors for a model that has none; the release's `strict=True` requires them.

    They are named as in the pretrained release.
    """
    frequencies = rotary_frequencies(cfg.llama.head_width, cfg.llama.rope_theta).astype(dtype)
    tensors = {}
    for key, shape in tables.unused(cfg).items():
        full = tuple(T5_VOCABULARY if n is None else n for n in shape)
        value = frequencies
        if not key.endswith("inv_freq"):
            value = np.broadcast_to(np.zeros((), dtype), full)
        tensors[key] = Tensor(full, np.dtype(dtype), lambda value=value: value)
    return tensors


def release_layout(source: ModelSource) -> tuple[ReleaseLayout, dict[str, Tensor]]:
    """Returns the layout of a source in the release's files, and the unused tensors they contain.

    The layout is the original one where it is known, and otherwise the release's default.
    """
    cfg, layout, unused = source.cfg, source.layout, source.unused
    targets = tables.lora_targets(cfg)
    if layout is None:
        layout = ReleaseLayout(KeyStyle(peft=cfg.llama.lora is not None), {})
        unused = {layout.style.write(k, targets): t for k, t in default_unused(cfg).items()}
    elif cfg.llama.lora and not layout.style.peft:  # adapters were added later
        style = dataclasses.replace(layout.style, peft=True)
        unused = {style.write(key, targets): t for key, t in unused.items()}
        layout = dataclasses.replace(layout.only(lambda key: ":" in key), style=style)
    rows = rows_of(cfg, source.shapes)
    names = layout.style.names(rows, cfg)
    dtypes = {names[key]: source.shapes[row.path].dtype for row in rows for key in row.keys}
    dtypes |= {key: tensor.dtype for key, tensor in unused.items()}

    # A run trained without its image decoder has fewer tensors than the release.
    layout = layout.only(lambda key: key in dtypes)
    tensors = {name: dict(keys) for name, keys in layout.tensors.items()}
    placed = layout.dtypes.keys()
    for key in [key for key in dtypes if key not in placed]:
        tensors.setdefault(_default_file(key, cfg), {})[key] = dtypes[key]
    wrapper_keys = {_INSTRUCT: "module"} | layout.wrapper_keys
    return dataclasses.replace(layout, tensors=tensors, wrapper_keys=wrapper_keys), unused


def _default_file(key: str, cfg: EmuConfig) -> str:
    """Returns the file that has a tensor in the release."""
    if ":" in key:
        return f"{key.split(':')[0]}/diffusion_pytorch_model.safetensors"
    return _INSTRUCT if cfg.llama.lora else MULTIMODAL
