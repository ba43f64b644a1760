"""Builds a fresh Emu from its parents: LLaMA, EVA-CLIP and Stable Diffusion v1.5 or SDXL (paper
section 3). Emu2 has the same kinds of parents.

Parameters that no parent has start at random: the connector (the Causal Transformer and the norm
before it, or the projections), the regression head, and those of the denoiser that read the
condition, where it has another width. The embeddings of new tokens start at the mean of the old
ones (release: `modeling_llama.py`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from emu_jax import integrity
from emu_jax.config import (
    CFormerConfig,
    EmuConfig,
    LlamaConfig,
    PoolingConfig,
    TokenIds,
    UNetConfig,
    VisionConfig,
    emu2,
    emu_14b,
    from_dict,
)
from emu_jax.convert import release_config, tensor_files
from emu_jax.convert.convert import (
    ConversionReport,
    check_one_process,
    measured,
    replacing,
    report,
    write_run_directory,
)
from emu_jax.convert.source import (
    DECODER,
    FLOATS,
    ReleaseLayout,
    abstract_model,
    common_dtype,
    default_unused,
    layers,
    rows_of,
)
from emu_jax.convert.tables import KeyStyle, TableRow
from emu_jax.convert.tensors import Shape, Tensor
from emu_jax.errors import UserError
from emu_jax.hub import (
    HubSource,
    download_snapshot,
    is_hub,
    naming_addresses,
    record_sources,
)
from emu_jax.models.emu import EmuModel
from emu_jax.models.eva_clip import bicubic_weights
from emu_jax.models.layers import lecun
from emu_jax.sharding import AbstractModel, make_mesh
from emu_jax.storage import as_path, read_json_object
from emu_jax.tokenizer import Family, Tokenizer

_Config = TypeVar("_Config", VisionConfig, PoolingConfig)

_VOCABULARY = ("decoder.lm.model.embed_tokens.weight", "decoder.lm.lm_head.weight")
# Parameters that no parent has.
_FRESH = ("cformer.", "ln_visual.", "project_up.", "project_down.", "llama.stu_regress_head.")
# Tensors of EVA-CLIP after its blocks, which Emu2 leaves out.
_CONTRASTIVE = ("visual.norm.", "visual.head.")
# Tensors of the denoiser that read the condition.
_READS_CONDITION = re.compile(r"^unet:.*(\.attn2\.to_[kv]|add_embedding\.linear_1)\.weight$")
# Tensors of the parents that are buffers, not parameters.
_BUFFERS = ("rotary_emb.inv_freq", ".position_ids", ".rope.freqs_cos")
# Folders of Stable Diffusion that a release only carries along.
_CARRIED = ("scheduler", "safety_checker", "feature_extractor")


@dataclasses.dataclass(kw_only=True)
class InitReport(ConversionReport):
    """The report on a fresh model.

    Attributes:
        fresh: the parameters that start at random.
    """

    fresh: list[str]


def init(
    dst: Path | str,
    *,
    llama: Path | str,
    eva_clip: Path | str,
    sd: Path | str,
    family: Family = "emu",
    model_config: Path | None = None,
    tokenizer: Path | None = None,
    cformer: CFormerConfig | None = None,
    seed: int = 0,
    overwrite: bool = False,
    mesh: Mesh | None = None,
) -> InitReport:
    """Writes a run directory with an Emu that was assembled from its parents and never trained.

    A parent may be on the Hub: `hf://ORG/NAME[@REV][/SUB]`. `sources.json` records its commit.

    Args:
        llama: a transformers folder, sharded or not, safetensors or .bin.
        eva_clip: a .pt file; only its `visual.*` tensors are read.
        sd: a diffusers folder with `unet/`, `vae/` and `scheduler/`: Stable Diffusion v1.5 or SDXL.
        family: whether to build an Emu1 or an Emu2.
        model_config: the release's model JSON; by default that of the 14B model, or of Emu2.
        tokenizer: a LLaMA tokenizer folder; by default `llama`.
        cformer: sizes of Emu1's Causal Transformer; by default t5-base's.

    Raises:
        UserError: a parent is missing, damaged or does not fit, or the job has several processes.
            `dst` is left unchanged.
    """
    check_one_process()
    dst = as_path(dst)
    integrity.check_path(dst)
    origins: dict[str, HubSource] = {}
    if is_hub(llama):
        llama, origins["llama"] = download_snapshot(str(llama))
    if is_hub(eva_clip):
        eva_clip, origins["eva_clip"] = download_snapshot(str(eva_clip))
    if is_hub(sd):
        sd, origins["sd"] = download_snapshot(str(sd), folders=(*DECODER, *_CARRIED))
    parents = {"llama": llama, "eva_clip": eva_clip, "sd": sd}
    copies = {Path(parents[role]): source for role, source in origins.items()}
    sources = [Path(p) for p in (llama, eva_clip, sd, model_config, tokenizer) if p]
    with (
        naming_addresses(copies),
        measured() as usage,
        replacing(dst, overwrite, sources) as temporary,
    ):
        source = FreshSource.open(
            Path(llama),
            Path(eva_clip),
            Path(sd),
            mesh or make_mesh(),
            family=family,
            cformer=cformer or CFormerConfig(),
            seed=seed,
            model_config=model_config,
            tokenizer=Path(tokenizer or llama),
        )
        write_run_directory(source, temporary)
        record_sources(temporary, origins)
    conversion = report(source, source.notes, usage)
    return InitReport(**vars(conversion), fresh=sorted(source.fresh))


@dataclasses.dataclass
class FreshSource:
    """A fresh Emu whose parameters come from its parents, or start at random.

    Attributes:
        notes: what was resized or re-initialized.
        fresh: the parameters that start at random.
        emu_key: the random key of the whole model's initialization.
        painter_key: the random key of the denoiser's parameters.
        abstract: the model without its arrays.
        rows: the row of each parameter.
        tensors: the parents' tensors by their key in the tables, as `style` writes it.
        style: how the parents' files write the keys.
        initialized: random parameters of which some layers were not read yet.
    """

    cfg: EmuConfig
    tokenizer: Tokenizer
    shapes: dict[str, jax.ShapeDtypeStruct]
    layout: ReleaseLayout
    unused: dict[str, Tensor]
    notes: list[str]
    fresh: set[str]
    emu_key: Key[Array, ""]
    painter_key: Key[Array, ""]
    abstract: AbstractModel
    rows: dict[str, TableRow]
    tensors: dict[str, Tensor]
    style: KeyStyle
    initialized: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(
        cls,
        llama: Path,
        eva_clip: Path,
        sd: Path,
        mesh: Mesh,
        *,
        family: Family,
        cformer: CFormerConfig,
        seed: int,
        model_config: Path | None,
        tokenizer: Path,
    ) -> FreshSource:
        """Opens the parents, and checks that they fit together. See `init` for the arguments.

        Raises:
            UserError: a parent is missing, damaged or does not fit.
        """
        for path, kind in ((llama, "--llama"), (sd, "--sd")):
            if not path.is_dir():
                raise UserError(f"{kind} {path} is not a directory")
        words = Tokenizer.load(tokenizer, instruct=False, family=family)
        # As in training, whose steps take the second key.
        init_key, _ = jax.random.split(jax.random.key(seed))
        emu_key, painter_key = jax.random.split(init_key)
        tensors = _parent_tensors(llama, eva_clip, sd)
        parent_shapes = {key: tensor.shape for key, tensor in tensors.items()}
        if family == "emu2":
            cfg = _emu2_config(parent_shapes, llama, sd, words, model_config)
            tensors = {k: t for k, t in tensors.items() if not k.startswith(_CONTRASTIVE)}
        else:
            cfg = _config(parent_shapes, llama, sd, words, cformer, model_config)
        if cfg.llama.tied_embeddings:  # some files repeat the table
            tensors.pop("decoder.lm.lm_head.weight", None)
        abstract = abstract_model(cfg, mesh)
        rows = {row.path: row for row in rows_of(cfg, abstract.shapes)}
        style = KeyStyle.of(tensors)
        parent_vocab = _language(llama, words).vocab_size
        fresh, notes = _match_parents(rows, abstract.shapes, style, tensors, cfg, parent_vocab)
        names = style.names(rows.values(), cfg)
        return cls(
            cfg=cfg,
            tokenizer=words,
            shapes={
                p: s
                if p in fresh
                else jax.ShapeDtypeStruct(
                    s.shape,
                    common_dtype(tensors[names[key]] for key in rows[p].keys),
                    sharding=s.sharding,
                )
                for p, s in abstract.shapes.items()
            },
            # Tensors go to their default files.
            layout=ReleaseLayout(
                KeyStyle(), {}, {}, {n: sd / n for n in _CARRIED if (sd / n).is_dir()}
            ),
            unused=default_unused(cfg) if cfg.llama.is_release else {},
            notes=notes,
            fresh=fresh,
            emu_key=emu_key,
            painter_key=painter_key,
            abstract=abstract,
            rows=rows,
            tensors=tensors,
            style=style,
        )

    def read(self, path: str, layer: int) -> np.ndarray:
        row = self.rows[path]
        if path in self.fresh:
            if path not in self.initialized:
                self.initialized |= self._initialize(path)
            # Its other layers are read next.
            last = layer + 1 == len(layers(row))
            whole = self.initialized.pop(path) if last else self.initialized[path]
            return np.asarray(whole[layer] if row.stacked else whole)
        shape = row.layer_shape(self.shapes[path].shape)
        key = row.keys[layer]
        value = self.tensors[self.style.write(key)].read()
        if key in _VOCABULARY:
            value = value[: self.tokenizer.base_size]
        value = _resized(key, value, row.transform.release_shape(shape))
        return row.transform.from_release(value, shape)

    def _initialize(self, path: str) -> dict[str, jax.Array]:
        """Initializes a parameter, and all others made with it, as the module does."""
        if path.startswith("unet."):  # alone: initializing the whole denoiser would be a waste
            shape = self.shapes[path]
            key = jax.random.fold_in(self.painter_key, sorted(self.fresh).index(path))
            initialize = jax.jit(
                lambda key: lecun(key, shape.shape, jnp.float32), out_shardings=shape.sharding
            )
            return {path: initialize(key)}
        shardings = {
            p: s.sharding
            for p, s in self.shapes.items()
            if p in self.fresh and not p.startswith("unet.")
        }

        def make() -> dict[str, jax.Array]:  # XLA removes the parameters that are not returned
            emu = EmuModel(self.cfg, painter=False, rngs=nnx.Rngs(self.emu_key))
            params = self.abstract.params(emu)
            return {p: params[p] for p in shardings}

        return jax.jit(make, out_shardings=shardings)()


def _parent_tensors(llama: Path, eva_clip: Path, sd: Path) -> dict[str, Tensor]:
    """Opens the parents' tensors, named as in the release."""
    tensors = _read_renamed(eva_clip, "visual.", lambda key: key)
    language = tensor_files.find(llama, "model", "pytorch_model")
    tensors |= _read_renamed(language, "", lambda key: f"decoder.lm.{key}")
    for tower in DECODER:
        weights = tensor_files.find(sd / tower, "diffusion_pytorch_model")
        tensors |= _read_renamed(weights, "", lambda key, tower=tower: f"{tower}:{key}")
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(_BUFFERS)}


def _config(
    parent_shapes: dict[str, Shape],
    llama: Path,
    sd: Path,
    words: Tokenizer,
    cformer: CFormerConfig,
    model_config: Path | None,
) -> EmuConfig:
    """Returns the configuration: the parents' sizes, with a chosen image size and n_causal.

    Args:
        parent_shapes: the shapes of the parents' tensors.
    """
    language = _language(llama, words)
    preset = emu_14b().vision
    chosen: dict[str, Any] = {"image_size": preset.image_size}
    if model_config is not None:
        stated_sizes, causal = _chosen_sizes(model_config)
        chosen |= stated_sizes
        cformer = dataclasses.replace(cformer, n_causal=causal or cformer.n_causal)
    vision = _vision(parent_shapes, dataclasses.replace(preset, **chosen))
    unet, vae, scheduler = release_config.decoder(sd)
    return EmuConfig(
        vision=vision,
        cformer=cformer,
        tokens=TokenIds.after(words.base_size, bos=words.bos, eos=words.eos),
        vae=vae,
        llama=dataclasses.replace(language, vocab_size=len(words)),
        unet=_conditioned(unet, language.width),
        scheduler=scheduler,
    )


def _emu2_config(
    parent_shapes: dict[str, Shape],
    llama: Path,
    sd: Path,
    words: Tokenizer,
    model_config: Path | None,
) -> EmuConfig:
    """Returns the configuration of an Emu2; see `_config`."""
    language, preset = _language(llama, words), emu2()
    assert preset.pooling is not None
    vision, pooling = preset.vision, preset.pooling
    if model_config is not None:
        chosen = release_config.emu2_vision_json(model_config)
        if chosen is None:
            raise UserError(f"{model_config} has no vision_cfg: give Emu2's model JSON")
        vision = _with(vision, chosen, {"image_size": "image_size", "head_width": "head_width"})
        pooling = _with(pooling, chosen, {"n_embeddings": "n_query", "n_frame": "v_query"})
    vision = _vision(parent_shapes, vision)
    unet, vae, scheduler = release_config.decoder(sd)
    return dataclasses.replace(
        preset,
        vision=vision,
        pooling=pooling,
        llama=dataclasses.replace(
            language,
            vocab_size=len(words),
            rope_dtype=preset.llama.rope_dtype,
            regression_head=False,
        ),
        tokens=TokenIds.after(words.base_size, frame=True, bos=words.bos, eos=words.eos),
        unet=_conditioned(unet, vision.width),
        vae=vae,
        scheduler=scheduler,
    )


def _with(part: _Config, values: Mapping[str, Any], names: Mapping[str, str]) -> _Config:
    """Returns a configuration with those of its settings that a JSON names otherwise.

    Args:
        names: {our name: name in the JSON}.
    """
    settings = {ours: values[json_name] for ours, json_name in names.items() if json_name in values}
    return from_dict(type(part), dataclasses.asdict(part) | settings, "vision_cfg: ")


def _language(llama: Path, words: Tokenizer) -> LlamaConfig:
    """Returns the parent's configuration of the language model."""
    language = release_config.llama_config(llama / "config.json")
    # Tables of later models are rounded up.
    if language.vocab_size < words.base_size or (
        language.vocab_size > words.base_size and not words.byte_level
    ):
        raise UserError(
            f"{llama}: the model has {language.vocab_size} tokens, its tokenizer {words.base_size}"
        )
    return language


def _vision(parent_shapes: dict[str, Shape], preset: VisionConfig) -> VisionConfig:
    """Returns the visual encoder's configuration: the parent's sizes, and the preset's others."""
    try:
        width, _, patch, _ = parent_shapes["visual.patch_embed.proj.weight"]
        vision = dataclasses.replace(
            preset,
            patch_size=patch,
            width=width,
            layers=release_config.count_layers(parent_shapes, r"visual\.blocks\.(\d+)\."),
            mlp_width=parent_shapes["visual.blocks.0.mlp.fc1.weight"][0],
        )
        if vision.final_norm:
            clip_width = parent_shapes["visual.head.weight"][0]
            vision = dataclasses.replace(vision, clip_width=clip_width)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise UserError(f"--eva-clip: not an EVA-CLIP vision tower ({error})") from None
    if 0 in (width, patch) or width % vision.head_width or vision.image_size % patch:
        raise UserError(
            f"--eva-clip: width {width} does not split into heads of {vision.head_width}, or "
            f"images of {vision.image_size} into patches of {patch}: give its JSON with "
            "--model-config"
        )
    return vision


def _conditioned(unet: UNetConfig, width: int) -> UNetConfig:
    """Returns the configuration of a denoiser for conditions of another width."""
    unet = dataclasses.replace(unet, cross_attention_dim=width)
    if not unet.takes_sizes:
        return unet
    width += 6 * (unet.addition_time_embed_dim or 0)
    return dataclasses.replace(unet, projection_class_embeddings_input_dim=width)


def _chosen_sizes(model_config: Path) -> tuple[dict[str, int], int | None]:
    """Reads the sizes that no parent has from the release's model JSON.

    Returns:
        The image size and the head width, if they are given, and n_causal (None: not given).
    """
    values = read_json_object(model_config)
    tower, language = (values.get(key) or {} for key in ("vision_cfg", "multimodal_cfg"))
    if not isinstance(tower, dict) or not isinstance(language, dict):
        raise UserError(
            f"{model_config} is not a model JSON of the release: vision_cfg and "
            "multimodal_cfg must be objects"
        )
    chosen = {key: tower[key] for key in ("image_size", "head_width") if key in tower}
    for value in (*chosen.values(), *([language["n_causal"]] if "n_causal" in language else ())):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{model_config}: a size is {value!r}, not a positive number")
    return chosen, language.get("n_causal")


def _match_parents(
    rows: dict[str, TableRow],
    shapes: dict[str, jax.ShapeDtypeStruct],
    style: KeyStyle,
    tensors: dict[str, Tensor],
    cfg: EmuConfig,
    parent_vocab: int,
) -> tuple[set[str], list[str]]:
    """Checks that all parameters have tensors, or start at random.

    Args:
        shapes: the parameters' shapes.
        tensors: the parents' tensors.
        parent_vocab: the number of rows that the parents' tables have.

    Returns:
        The parameters that start at random, and notes on what is resized or re-initialized.

    Raises:
        UserError: tensors are missing, unexpected or misshapen. The message lists all of them.
    """
    fresh = {p for p in shapes if p.startswith(_FRESH)}
    notes = []
    stored = {key: tensor.shape for key, tensor in tensors.items()}
    expected: dict[str, Shape] = {}
    for row in rows.values():
        if row.path in fresh:
            continue
        released = row.release_shape(shapes[row.path].shape)
        for key in row.keys:
            key, shape = style.write(key), released
            got = stored.get(key)
            if key in _VOCABULARY:
                shape = (parent_vocab, shape[1])
            if key == "visual.pos_embed" and got and len(got) == 3 and got != shape:
                if not _side_of_square(got[1] - 1):
                    raise UserError(f"--eva-clip: visual.pos_embed has {got[1]} rows")
                notes.append(f"visual.pos_embed: interpolated from {got[1]} to {shape[1]}")
                shape = (1, got[1], cfg.vision.width)
            if _READS_CONDITION.search(key) and got and got != shape:
                if len(got) == 2 and got[0] == shape[0]:
                    notes.append(
                        f"{key}: condition of width {got[1]}, now {shape[1]}: re-initialised"
                    )
                    fresh.add(row.path)
                    shape = got
            expected[key] = shape
    problems = [
        *(f"{key} is missing" for key in expected if key not in stored),
        *(f"{key} is unexpected" for key in stored if key not in expected),
        *(
            f"{key} is {list(stored[key])}, expected {list(shape)}"
            for key, shape in expected.items()
            if key in stored and tuple(stored[key]) != shape
        ),
        *(
            f"{key} is {tensor.dtype}"
            for key, tensor in tensors.items()
            if key in expected and tensor.dtype not in FLOATS
        ),
    ]
    if problems:
        raise UserError("the parents do not fit: " + "; ".join(problems))
    return fresh, notes


def _resized(key: str, value: np.ndarray, shape: Shape) -> np.ndarray:
    """Returns a parent's tensor resized to the shape that Emu needs."""
    if key in _VOCABULARY:
        mean = value.astype(np.float32).mean(axis=0, keepdims=True).astype(value.dtype)
        return np.concatenate([value, np.repeat(mean, shape[0] - len(value), axis=0)])
    if key == "visual.pos_embed" and value.shape != shape:
        return resize_positions(value, shape[1])
    return value


def resize_positions(
    table: Float[np.ndarray, "1 P D"], tokens: int
) -> Float[np.ndarray, "1 {tokens} D"]:
    """Resizes position embeddings to another number of patches, by bicubic interpolation.

    The class token's embedding is kept (release: `interpolate_pos_embed`, without antialiasing).
    """
    old, new = _side_of_square(table.shape[1] - 1), _side_of_square(tokens - 1)
    grid = rearrange(table[:, 1:].astype(np.float32), "1 (y x) d -> y x d", y=old)
    weights = bicubic_weights(old, new)
    grid = np.einsum("ay,bx,yxd->abd", weights, weights, grid)
    patches = rearrange(grid, "a b d -> 1 (a b) d").astype(table.dtype)
    return np.concatenate([table[:, :1], patches], axis=1)


def _side_of_square(n: int) -> int:
    """Returns the square root of n, or 0 if n is not a square."""
    side = round(n**0.5)
    return side if side * side == n else 0


def _read_renamed(path: Path, prefix: str, name: Callable[[str], str]) -> dict[str, Tensor]:
    """Returns the tensors of a file whose names begin with `prefix`, renamed by `name`."""
    opened, _ = tensor_files.open_tensors(path)
    return {
        name(key): tensor
        for tensors in opened.values()
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }
