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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from emu_jax import checkpoint
from emu_jax.config import LORA_TARGETS, EmuConfig, LoraConfig
from emu_jax.convert import release_config, tables, tensor_files
from emu_jax.convert.checkpoint_arrays import Arrays
from emu_jax.convert.tables import Row, Spelling, peft_key
from emu_jax.convert.tensors import Tensor, copy_into, dtype_name, dtype_of
from emu_jax.errors import UserError, suggest
from emu_jax.filesystem import read_json_object
from emu_jax.models.emu import Emu
from emu_jax.models.llama import rotary_frequencies
from emu_jax.models.lora import merge
from emu_jax.sharding import Template
from emu_jax.tokenizer import Tokenizer

MULTIMODAL = "multimodal_encoder/pytorch_model.bin"
INSTRUCT = "Emu-instruct.pt"
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
_TOKENIZER_FILE = re.compile(r"config\.json|(added|special)?_?token[\w]*\.(json|model)")
RELEASE_ALPHA = LoraConfig.alpha
T5_VOCABULARY = 32128  # rows of the embedding table that the Causal Transformer never uses
FLOATS = tuple(map(np.dtype, (np.float32, np.float16, jnp.bfloat16)))


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layout of a model in the release's own files, from which they can be restored.

    Attributes:
        tensors: {file: {key as it is spelled there, prefixed `unet:` or `vae:`: dtype}}.
        nests: {file: the name under which it nests its state dict}.
        carried: other files and folders: {name: its present path}.
    """

    spelling: Spelling
    tensors: dict[str, dict[str, np.dtype]]
    nests: dict[str, str | None] = dataclasses.field(default_factory=dict)
    carried: dict[str, Path] = dataclasses.field(default_factory=dict)

    @property
    def keys(self) -> set[str]:
        return {key for keys in self.tensors.values() for key in keys}

    def only(self, wanted: Callable[[str], bool]) -> Layout:
        """Returns a copy with only the wanted tensors.

        Files about the others are dropped too: the index of shards that are no longer complete,
        and the configuration of a tower that is gone.
        """
        tensors = {
            name: {key: dtype for key, dtype in keys.items() if wanted(key)}
            for name, keys in self.tensors.items()
        }
        tensors = {name: keys for name, keys in tensors.items() if keys}

        def within(folder: str, files: Mapping[str, Mapping[str, Any]]) -> set[str]:
            return {key for name, keys in files.items() if name.startswith(folder) for key in keys}

        def fits(name: str) -> bool:
            folder = name.rpartition("/")[0] + "/"
            if tensor_files.is_index(name):
                folder = folder.lstrip("/")
                return within(folder, tensors) == within(folder, self.tensors)
            return folder not in ("unet/", "vae/") or bool(within(folder, tensors))

        carried = {name: path for name, path in self.carried.items() if fits(name)}
        return dataclasses.replace(self, tensors=tensors, carried=carried)

    def save(self, path: Path) -> None:
        values = {
            "spelling": dataclasses.asdict(self.spelling),
            "nests": self.nests,
            "carried": sorted(self.carried),
            "tensors": {
                name: {key: dtype_name(dtype) for key, dtype in keys.items()}
                for name, keys in self.tensors.items()
            },
        }
        path.write_text(json.dumps(values, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path, folder: Path) -> Layout:
        """Loads what `save` wrote. The carried files are in `folder`."""
        values = read_json_object(path)
        tensors = {
            name: {key: dtype_of(dtype) for key, dtype in keys.items()}
            for name, keys in values["tensors"].items()
        }
        carried = {name: folder / name for name in values["carried"]}
        return cls(Spelling(**values["spelling"]), tensors, values["nests"], carried)


class Source(Protocol):
    """A model that can be read layer by layer.

    Attributes:
        shapes: every parameter's shape, stored dtype and sharding.
        layout: the release's layout, or None if the model did not come from a release.
        dead: tensors of the release that belong to no parameter.
    """

    cfg: EmuConfig
    tokenizer: Tokenizer
    shapes: dict[str, jax.ShapeDtypeStruct]
    dead: dict[str, Tensor]

    @property
    def layout(self) -> Layout | None: ...

    def read(self, path: str, layer: int) -> np.ndarray:
        """Reads one layer of a stacked parameter, or (as layer 0) the whole of another.

        The result may be a view of a mapped file, and its dtype may differ from the one in
        `shapes`.
        """
        ...


def layers(row: Row) -> range:
    """Returns the layer numbers that `Source.read` accepts for a parameter."""
    return range(len(row.keys) if row.stacked else 1)


def rows_of(cfg: EmuConfig, shapes: Mapping[str, Any]) -> list[Row]:
    """Returns the table of a model with these parameter shapes."""
    return tables.table(cfg, {path: tuple(s.shape) for path, s in shapes.items()})


@functools.cache
def template_of(cfg: EmuConfig, mesh: Mesh) -> Template:
    """Returns the model that `cfg` describes, without its arrays."""
    return Template(lambda: Emu(cfg, rngs=nnx.Rngs(0)), mesh)


def open_source(
    path: Path,
    mesh: Mesh,
    *,
    model_config: Path | None = None,
    tokenizer: Path | None = None,
    base: Path | None = None,
    scratch: Path | None = None,
) -> Source:
    """Opens the source at `path`, recognizing its kind.

    Args:
        base: the model that a peft folder's adapters belong to.
        scratch: a directory for temporary files; by default the system's.

    Raises:
        UserError: the source is of no known kind, or a part of it is missing or wrong.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if (path / "adapter_config.json").is_file():
        if base is None:
            raise UserError(f"{path} holds only adapters: name their model with --base")
        beneath = open_source(
            base, mesh, model_config=model_config, tokenizer=tokenizer, scratch=scratch
        )
        return Adapted(path, beneath, mesh)
    if base is not None:
        raise UserError(
            f"{path} is not a peft folder (it has no adapter_config.json): leave out --base"
        )
    if path.is_file():
        if path.suffix not in (".pt", ".bin", ".pth", ".safetensors"):
            raise UserError(f"{path}: expected a .pt file, a release folder or a run directory")
        return Release(path, mesh, model_config, tokenizer)
    if (path / "multimodal_encoder").is_dir():
        return Release(path, mesh, model_config, tokenizer)
    if (path / "config.json").is_file() and checkpoint.complete_steps(path):
        if model_config or tokenizer:
            raise UserError(f"{path} has its own configuration and tokenizer: give no others")
        return Run(path, mesh, scratch)
    if (path / INSTRUCT).is_file():
        return Release(path / INSTRUCT, mesh, model_config, tokenizer)
    raise UserError(
        f"{path} is neither a release (it has no multimodal_encoder/ and no {INSTRUCT}) nor a run "
        "directory (no config.json beside numbered steps)"
    )


def is_release(path: Path) -> bool:
    """Returns whether `open_source` would treat `path` as the release's own files."""
    return path.is_file() or (path / "multimodal_encoder").is_dir() or (path / INSTRUCT).is_file()


def load_release(path: Path, mesh: Mesh) -> tuple[Emu, Tokenizer]:
    """Loads a model in float32 from the release's own files, without an intermediate run directory.

    Raises:
        UserError: the path is not a release, or a part of it is missing or wrong.
    """
    found = open_source(path, mesh)
    params = {}
    for row in rows_of(found.cfg, found.shapes):
        shape = found.shapes[row.path]
        wanted = jax.ShapeDtypeStruct(shape.shape, jnp.float32, sharding=shape.sharding)
        params[row.path] = assemble(row, wanted, functools.partial(found.read, row.path))
    model = template_of(found.cfg, mesh).module(params)
    assert isinstance(model, Emu)
    return model, found.tokenizer


class Release:
    """A source that reads the release's folder, or one of its .pt files."""

    def __init__(self, path: Path, mesh: Mesh, model_config: Path | None, tokenizer: Path | None):
        folder = path if path.is_dir() else path.parent
        tokenizer = tokenizer or folder / "tokenizer"
        if not tokenizer.is_dir():
            raise UserError(f"there is no tokenizer folder {tokenizer}: give one with --tokenizer")
        if model_config is not None and not model_config.is_file():
            raise UserError(f"--model-config {model_config} does not exist")
        if model_config is None and (folder / "Emu.json").is_file():
            model_config = folder / "Emu.json"

        carried = {n: folder / n for n in CARRIED if path.is_dir() and (folder / n).exists()}
        if tokenizer != folder / "tokenizer":  # that folder may hold LLaMA's weights too
            carried.pop("tokenizer", None)
            carried |= {
                f"tokenizer/{p.name}": p
                for p in sorted(tokenizer.iterdir())
                if p.is_file() and _TOKENIZER_FILE.fullmatch(p.name)
            }
        elif tokenizer.is_dir():
            carried["tokenizer"] = tokenizer
        if model_config:
            carried["Emu.json"] = model_config

        stored: dict[str, dict[str, Tensor]] = {}  # by file
        nests: dict[str, str | None] = {}

        def open_part(weights: Path, prefix: str = "") -> dict[str, Tensor]:
            opened, nest = tensor_files.open_tensors(weights)
            for name, tensors in opened.items():
                name = str((weights.parent / name).relative_to(folder))
                stored[name] = {prefix + key: t for key, t in tensors.items()}
                nests[name] = nest
            if tensor_files.is_index(weights.name):
                carried[str(weights.relative_to(folder))] = weights
            return {prefix + key: t for tensors in opened.values() for key, t in tensors.items()}

        weights = path
        if path.is_dir():
            weights = tensor_files.find(path / "multimodal_encoder", "pytorch_model", "model")
        found = open_part(weights)

        llama_json = tokenizer / "config.json"
        base = Tokenizer.load(tokenizer, instruct=False)
        cfg = release_config.multimodal(
            {key: t.shape for key, t in found.items()},
            where=str(weights),
            base_vocab=base.base_size,
            model_json=model_config,
            llama_json=llama_json if llama_json.is_file() else None,
        )
        decoder = path.is_dir() and any((path / part).is_dir() for part in ("unet", "vae"))
        if decoder:
            unet, vae, scheduler = release_config.decoder(path)
            cfg = dataclasses.replace(cfg, unet=unet, vae=vae, scheduler=scheduler)
            for part in ("unet", "vae"):
                weights = tensor_files.find(path / part, "diffusion_pytorch_model")
                found |= open_part(weights, f"{part}:")

        self.cfg = cfg
        self.tokenizer = Tokenizer.load(
            tokenizer,
            instruct=cfg.llama.vocab_size - base.base_size == release_config.ADDED_TOKENS[1],
        )
        template = template_of(cfg, mesh)
        shapes = {p: tuple(s.shape) for p, s in template.shapes.items()}
        self._rows = {row.path: row for row in tables.table(cfg, shapes)}
        spelling = Spelling.of(found)
        dead = tables.match(
            self._rows.values(),
            shapes,
            cfg,
            spelling,
            {k: t.shape for k, t in found.items()},
            str(path),
        )
        wrong = {k: t.dtype for k, t in found.items() if t.dtype not in FLOATS and k not in dead}
        if wrong:
            raise UserError(
                f"{path}: {len(wrong)} tensors are not float32, float16 or bfloat16: "
                + ", ".join(f"{key} is {dtype}" for key, dtype in wrong.items())
            )
        self.dead = {key: found[key] for key in dead}
        targets = cfg.llama.lora.targets if cfg.llama.lora else ()
        self._tensors = {
            row.path: [found[spelling.write(key, targets)] for key in row.keys]
            for row in self._rows.values()
        }
        self.shapes = {
            p: jax.ShapeDtypeStruct(s.shape, self._dtype(p), sharding=s.sharding)
            for p, s in template.shapes.items()
        }
        tensors = {name: {k: t.dtype for k, t in held.items()} for name, held in stored.items()}
        self.layout = Layout(spelling, tensors, nests, carried)

    def _dtype(self, path: str) -> np.dtype:
        """Returns a dtype that holds all layers of a parameter exactly."""
        dtypes = {t.dtype for t in self._tensors[path]}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def read(self, path: str, layer: int) -> np.ndarray:
        row = self._rows[path]
        inner = row.layer_shape(self.shapes[path].shape)
        return row.transform.from_release(self._tensors[path][layer].read(), inner)


def assemble(
    row: Row, shape: jax.ShapeDtypeStruct, layer: Callable[[int], np.ndarray]
) -> jax.Array:
    """Places a parameter on the mesh, from its layers as `Source.read` returns them.

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


class Run:
    """A source that reads a run directory written by `convert`, `init` or training."""

    def __init__(self, path: Path, mesh: Mesh, scratch: Path | None = None):
        self._path = path
        cfg = checkpoint.load_config(path)
        self.tokenizer = checkpoint.load_tokenizer(path)
        stored = checkpoint.run_shapes(path)
        for tower in ("unet", "vae"):  # pretraining may omit them
            if not any(p.startswith(f"{tower}.") for p in stored):
                cfg = dataclasses.replace(cfg, **{tower: None})
        self.cfg = cfg
        template = template_of(cfg, mesh)
        self.shapes = {
            p: jax.ShapeDtypeStruct(
                s.shape, stored[p].dtype if p in stored else s.dtype, sharding=s.sharding
            )
            for p, s in template.shapes.items()
        }
        self._stacked = {row.path: row.stacked for row in rows_of(cfg, template.shapes)}
        # The items that hold the parameters, and the parameters stored in another shape there:
        # tables with rows for fewer tokens.
        self._items = items_of(path)
        scratch = scratch or Path(tempfile.gettempdir())
        self._arrays = {item: Arrays(item, scratch) for item in set(self._items.values())}
        self._odd = {
            p
            for p, s in self.shapes.items()
            if p not in stored or tuple(stored[p].shape) != tuple(s.shape)
        }
        self.layout, self.dead = None, {}
        kept = path / "release"
        if (kept / "layout.json").is_file():
            self.layout = Layout.load(kept / "layout.json", kept / "files")
            self.dead = _dead_tensors(path)
        check_heads(path, cfg)

    def read(self, path: str, layer: int) -> np.ndarray:
        stacked = self._stacked[path]
        if path in self._odd:  # `read_params` grows the table, or raises a UserError
            whole = checkpoint.read_params(self._path, {path: self.shapes[path]})[path]
            return np.asarray(whole)[layer] if stacked else np.asarray(whole)
        return self._arrays[self._items[path]].read(path, layer if stacked else None)


def _dead_tensors(directory: Path) -> dict[str, Tensor]:
    """Opens the release's tensors that belong to no parameter.

    A converted run directory keeps them, and so does one trained from it. Returns {} for others.
    """
    kept = directory / "release" / "dead.safetensors"
    return next(iter(tensor_files.open_tensors(kept)[0].values())) if kept.is_file() else {}


def check_heads(directory: Path, cfg: EmuConfig) -> None:
    """Checks LLaMA's number of heads against the release's rotary frequencies.

    No parameter's shape reveals the number.

    Raises:
        UserError: the run directory was converted with another number of heads.
    """
    width = cfg.llama.head_width // 2
    for key, tensor in _dead_tensors(directory).items():
        if key.endswith("rotary_emb.inv_freq") and tensor.shape != (width,):
            raise UserError(
                f"{directory / 'config.json'}: llama.heads = {cfg.llama.heads} was edited: the "
                f"release had {cfg.llama.heads * width // tensor.shape[0]}"
            )


def items_of(directory: Path) -> dict[str, Path]:
    """Returns {parameter: the saved item (DIR/<step>/params) that holds it} of a run directory.

    Averaged parameters are preferred. Parameters that the steps omit come from the base.
    """
    found = {}
    base = checkpoint.base_of(directory)
    for parent in set(base.values()):
        theirs = items_of(parent)
        found |= {k: v for k, v in theirs.items() if base.get(checkpoint.tower_of(k)) == parent}
    step = directory / str(checkpoint.latest_step(directory))
    for item in (step / "params", step / "ema"):
        if item.is_dir():
            found |= dict.fromkeys(checkpoint.stored_shapes(item), item)
    return found


class Merged:
    """A source whose adapters are merged into the kernels, in float32."""

    def __init__(self, source: Source):
        if source.cfg.llama.lora is None:
            raise UserError("there are no LoRA parameters to merge")
        self._source, self._lora = source, source.cfg.llama.lora
        self.cfg = dataclasses.replace(
            source.cfg, llama=dataclasses.replace(source.cfg.llama, lora=None)
        )
        self.tokenizer, self.dead = source.tokenizer, {}
        spelling = source.layout.spelling if source.layout else Spelling(peft=True)
        prefix = spelling.write("decoder.lm.")
        for key, tensor in source.dead.items():
            if key.startswith(prefix):
                key = "decoder.lm." + key.removeprefix(prefix)
            self.dead[key] = tensor
        self.shapes = {}
        for path, shape in source.shapes.items():
            if path.endswith((".lora_a", ".lora_b")):
                continue
            if self._adapter(path):
                shape = jax.ShapeDtypeStruct(shape.shape, jnp.float32, sharding=shape.sharding)
            self.shapes[path] = shape
        # The language model's tensors get other names, and so go to their default file.
        self.layout = source.layout and dataclasses.replace(
            source.layout.only(lambda key: ":" in key),
            spelling=dataclasses.replace(spelling, peft=False, base_layer=False),
        )

    def _adapter(self, path: str) -> list[str]:
        stem = path.removesuffix(".kernel")
        pair = [f"{stem}.lora_a", f"{stem}.lora_b"]
        return pair if pair[0] in self._source.shapes else []

    def read(self, path: str, layer: int) -> np.ndarray:
        kernel = self._source.read(path, layer)
        if adapter := self._adapter(path):
            parts = [kernel, *(self._source.read(p, layer) for p in adapter)]
            whole, a, b = (jnp.asarray(part.astype(np.float32)) for part in parts)
            kernel = np.asarray(merge(whole, a, b, self._lora))
        return kernel


class Rescaled:
    """A source whose adapters are rescaled to the alpha hard-coded in the release.

    The ratio is multiplied into their second matrices (`lora_b`), in float32.
    """

    def __init__(self, source: Source):
        lora = source.cfg.llama.lora
        assert lora is not None
        self._source, self._factor = source, np.float32(lora.alpha / RELEASE_ALPHA)
        llama = dataclasses.replace(
            source.cfg.llama, lora=dataclasses.replace(lora, alpha=RELEASE_ALPHA)
        )
        self.cfg = dataclasses.replace(source.cfg, llama=llama)
        self.tokenizer, self.layout, self.dead = source.tokenizer, source.layout, source.dead
        self.shapes = {
            p: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=s.sharding)
            if p.endswith(".lora_b")
            else s
            for p, s in source.shapes.items()
        }

    def read(self, path: str, layer: int) -> np.ndarray:
        stored = self._source.read(path, layer)
        if not path.endswith(".lora_b"):
            return stored
        return stored.astype(np.float32) * self._factor


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


class Adapted:
    """A source with the adapters of a peft folder, which replace any of its own.

    Raises:
        UserError: the folder cannot be read, or its adapters are not plain LoRA on LLaMA.
    """

    def __init__(self, folder: Path, base: Source, mesh: Mesh):
        lora = _adapter_config(folder / "adapter_config.json")
        self._base, theirs = base, base.cfg.llama.lora
        llama = dataclasses.replace(base.cfg.llama, lora=lora)
        self.cfg, self.tokenizer = dataclasses.replace(base.cfg, llama=llama), base.tokenizer
        same = theirs is None or theirs.targets == lora.targets
        self.layout, self.dead = (base.layout, base.dead) if same else (None, {})

        opened, _ = tensor_files.open_tensors(tensor_files.find(folder, "adapter_model"))
        found = {key: t for tensors in opened.values() for key, t in tensors.items()}
        template = template_of(self.cfg, mesh)
        self.shapes, self._rows = {}, {}
        rows = {row.path: row for row in rows_of(self.cfg, template.shapes)}
        for path, shape in template.shapes.items():
            if not path.endswith((".lora_a", ".lora_b")):
                self.shapes[path] = base.shapes[path]
                continue
            row = rows[path]
            wanted = row.transform.release_shape(row.layer_shape(shape.shape))
            keys = [peft_key(key) for key in row.keys]
            for key in keys:
                if key not in found or tuple(found[key].shape) != wanted:
                    has = list(found[key].shape) if key in found else "missing"
                    raise UserError(f"{folder}: {key} is {has}, expected {list(wanted)}")
            self.shapes[path] = shape
            self._rows[path] = row, [found.pop(key) for key in keys]
        if found:
            raise UserError(f"{folder} has {len(found)} unexpected tensors: {next(iter(found))}")

    def read(self, path: str, layer: int) -> np.ndarray:
        if path not in self._rows:
            return self._base.read(path, layer)
        row, tensors = self._rows[path]
        inner = row.layer_shape(self.shapes[path].shape)
        return row.transform.from_release(tensors[layer].read(), inner)


def synthetic_dead(cfg: EmuConfig) -> dict[str, Tensor]:
    """Returns unused tensors for a model that has none; the release's `strict=True` requires them.

    They are named as in the pretrained release.
    """
    frequencies = rotary_frequencies(cfg.llama.head_width, cfg.llama.rope_theta)
    made = {}
    for key, shape in tables.dead(cfg).items():
        full = tuple(T5_VOCABULARY if n is None else n for n in shape)
        if key.endswith("inv_freq"):
            value = frequencies
        else:
            value = np.broadcast_to(np.float32(0), full)
        made[key] = Tensor(full, np.dtype(np.float32), lambda value=value: value)
    return made


def release_layout(source: Source) -> tuple[Layout, dict[str, Tensor]]:
    """Returns the layout of a source in the release's files, and the unused tensors they contain.

    The layout is the original one where it is known, and otherwise the release's default.
    """
    cfg, known, dead = source.cfg, source.layout, source.dead
    targets = cfg.llama.lora.targets if cfg.llama.lora else ()
    if known is None:
        known = Layout(Spelling(peft=cfg.llama.lora is not None), {})
        dead = {known.spelling.write(k, targets): t for k, t in synthetic_dead(cfg).items()}
    elif cfg.llama.lora and not known.spelling.peft:  # adapters were added later
        spelling = dataclasses.replace(known.spelling, peft=True)
        dead = {spelling.write(key, targets): t for key, t in dead.items()}
        known = dataclasses.replace(known.only(lambda key: ":" in key), spelling=spelling)
    dtypes = {
        known.spelling.write(key, targets): source.shapes[row.path].dtype
        for row in rows_of(cfg, source.shapes)
        for key in row.keys
    } | {key: tensor.dtype for key, tensor in dead.items()}

    # A run trained without its image decoder has fewer tensors than the release.
    known = known.only(lambda key: key in dtypes)
    tensors = {name: dict(keys) for name, keys in known.tensors.items()}
    held = known.keys
    for key in [key for key in dtypes if key not in held]:
        tower = key.split(":")[0] if ":" in key else None
        name = (
            f"{tower}/diffusion_pytorch_model.safetensors"
            if tower
            else (INSTRUCT if cfg.llama.lora else MULTIMODAL)
        )
        tensors.setdefault(name, {})[key] = dtypes[key]
    nests = {INSTRUCT: "module"} | known.nests
    return dataclasses.replace(known, tensors=tensors, nests=nests), dead
