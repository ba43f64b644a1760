"""Builds a fresh Emu from its parents: LLaMA, EVA-CLIP and Stable Diffusion v1.5 (paper section 3).

Parameters that no parent has start at random: the Causal Transformer, the norm before it, the
regression head, and the denoiser's keys and values where the condition has another width. The
embeddings of new tokens start at the mean of the old ones (release: `modeling_llama.py`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh

from emu_jax import integrity
from emu_jax.config import CFormerConfig, EmuConfig, TokenIds, emu_14b
from emu_jax.convert import release_config, tables, tensor_files
from emu_jax.convert.convert import describe, replacing, report, write_run_directory
from emu_jax.convert.source import FLOATS, Layout, layers, synthetic_dead, template_of
from emu_jax.convert.tables import Spelling
from emu_jax.convert.tensors import Tensor
from emu_jax.errors import UserError
from emu_jax.filesystem import read_json_object
from emu_jax.models.emu import Emu
from emu_jax.models.layers import lecun
from emu_jax.sharding import make_mesh
from emu_jax.tokenizer import Tokenizer


def init(
    dst: Path | str,
    *,
    llama: Path,
    eva_clip: Path,
    sd: Path,
    model_config: Path | None = None,
    tokenizer: Path | None = None,
    cformer: CFormerConfig | None = None,
    seed: int = 0,
    overwrite: bool = False,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Writes a run directory with an Emu that was assembled from its parents and never trained.

    Args:
        llama: a transformers folder, sharded or not, safetensors or .bin.
        eva_clip: a .pt file; only its `visual.*` tensors are read.
        sd: a diffusers folder with `unet/`, `vae/` and `scheduler/`.
        model_config: the release's model JSON; by default that of the 14B model.
        tokenizer: a LLaMA tokenizer folder; by default `llama`.
        cformer: sizes of the Causal Transformer; by default t5-base's.

    Returns:
        The report of `convert`, and `fresh`: the parameters that start at random.

    Raises:
        UserError: a parent is missing, damaged or does not fit. `dst` is left unchanged.
    """
    dst = Path(dst)
    integrity.check_path(dst)
    sources = [Path(p) for p in (llama, eva_clip, sd, model_config, tokenizer) if p]
    with report() as made, replacing(dst, overwrite, sources) as temporary:
        parents = Parents(
            Path(llama),
            Path(eva_clip),
            Path(sd),
            mesh or make_mesh(),
            cformer or CFormerConfig(),
            seed,
            model_config,
            Path(tokenizer or llama),
        )
        write_run_directory(parents, temporary)
        made |= describe(parents)
        made["fresh"] = sorted(parents.fresh)
        made["notes"] = parents.notes
    return made


class Parents:
    """A `source.Source` of a fresh Emu's parameters, produced one after the other."""

    def __init__(
        self,
        llama: Path,
        eva_clip: Path,
        sd: Path,
        mesh: Mesh,
        cformer: CFormerConfig,
        seed: int,
        model_config: Path | None,
        tokenizer: Path,
    ):
        for path, kind in ((llama, "--llama"), (sd, "--sd")):
            if not path.is_dir():
                raise UserError(f"{kind} {path} is not a directory")
        self.tokenizer = Tokenizer.load(tokenizer, instruct=False)
        # As in training, whose steps take the second key.
        init_key, _ = jax.random.split(jax.random.key(seed))
        self._emu_key, self._painter_key = jax.random.split(init_key)
        self._drawn: dict[str, jax.Array] = {}
        self.notes: list[str] = []
        self._tensors = {
            **_read(eva_clip, "visual.", lambda key: key),
            **_read(
                tensor_files.find(llama, "model", "pytorch_model"),
                "",
                lambda key: f"decoder.lm.{key}",
            ),
        }
        for tower in ("unet", "vae"):
            weights = tensor_files.find(sd / tower, "diffusion_pytorch_model")
            self._tensors |= _read(weights, "", lambda key, tower=tower: f"{tower}:{key}")
        for key in list(self._tensors):  # buffers, not parameters
            if key.endswith(("rotary_emb.inv_freq", ".position_ids", ".rope.freqs_cos")):
                del self._tensors[key]
        self.cfg = self._sizes(llama, sd, cformer, model_config)
        # Folders that a release only carries along. Tensors go to their default files.
        names = ("scheduler", "safety_checker", "feature_extractor")
        self.layout = Layout(Spelling(), {}, {}, {n: sd / n for n in names if (sd / n).is_dir()})
        self.dead = synthetic_dead(self.cfg)
        template = template_of(self.cfg, mesh)
        shapes = {p: tuple(s.shape) for p, s in template.shapes.items()}
        self._rows = {row.path: row for row in tables.table(self.cfg, shapes)}
        self._spelling = Spelling.of(self._tensors)
        self._template = template
        self.fresh = self._check(shapes)
        self.shapes = {
            p: s
            if p in self.fresh
            else jax.ShapeDtypeStruct(s.shape, self._stored(p), sharding=s.sharding)
            for p, s in template.shapes.items()
        }

    def _sizes(
        self, llama: Path, sd: Path, cformer: CFormerConfig, model_config: Path | None
    ) -> EmuConfig:
        """Returns the configuration: the parents' sizes, with a chosen image size and n_causal."""
        preset = emu_14b()
        shapes = {key: t.shape for key, t in self._tensors.items()}
        language = release_config.llama_config(llama / "config.json")
        base = self.tokenizer.base_size
        if language.vocab_size != base:
            raise UserError(
                f"{llama}: the model has {language.vocab_size} tokens, its tokenizer {base}"
            )
        chosen: dict[str, Any] = {"image_size": preset.vision.image_size}
        if model_config is not None:
            values = read_json_object(model_config)
            tower, language_too = (values.get(k) or {} for k in ("vision_cfg", "multimodal_cfg"))
            if not isinstance(tower, dict) or not isinstance(language_too, dict):
                raise UserError(
                    f"{model_config} is not a model JSON of the release: vision_cfg and "
                    "multimodal_cfg must be objects"
                )
            chosen |= {k: tower[k] for k in ("image_size", "head_width") if k in tower}
            causal = language_too.get("n_causal", cformer.n_causal)
            for value in (*chosen.values(), causal):
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise UserError(f"{model_config}: a size is {value!r}, not a positive number")
            cformer = dataclasses.replace(cformer, n_causal=causal)
        try:
            width, _, patch, _ = shapes["visual.patch_embed.proj.weight"]
            vision = dataclasses.replace(
                preset.vision,
                **chosen,
                patch_size=patch,
                width=width,
                layers=_count(shapes, r"visual\.blocks\.(\d+)\."),
                mlp_width=shapes["visual.blocks.0.mlp.fc1.weight"][0],
                clip_width=shapes["visual.head.weight"][0],
            )
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise UserError(f"--eva-clip: not an EVA-CLIP vision tower ({error})") from None
        if 0 in (width, patch) or width % vision.head_width or vision.image_size % patch:
            raise UserError(
                f"--eva-clip: width {width} does not split into heads of {vision.head_width}, or "
                f"images of {vision.image_size} into patches of {patch}: give its JSON with "
                "--model-config"
            )
        unet, vae, scheduler = release_config.decoder(sd)
        return EmuConfig(
            vision=vision,
            cformer=cformer,
            tokens=TokenIds.after(base),
            vae=vae,
            llama=dataclasses.replace(language, vocab_size=base + release_config.ADDED_TOKENS[0]),
            unet=dataclasses.replace(unet, cross_attention_dim=language.width),
            scheduler=scheduler,
        )

    def _check(self, shapes: dict[str, tuple[int, ...]]) -> set[str]:
        """Returns the parameters that start at random, and checks that all others have tensors.

        Raises:
            UserError: tensors are missing, unexpected or misshapen. The message lists all of them.
        """
        fresh = {p for p in shapes if p.startswith(("cformer.", "ln_visual."))}
        fresh.add("llama.stu_regress_head.kernel")
        found = {key: t.shape for key, t in self._tensors.items()}
        expected: dict[str, tuple[int, ...]] = {}
        for row in self._rows.values():
            released = row.transform.release_shape(row.layer_shape(shapes[row.path]))
            for key in row.keys:
                key, shape = self._spelling.write(key), released
                if row.path in fresh:
                    continue
                if key in _VOCABULARY:
                    shape = (self.tokenizer.base_size, shape[1])
                got = found.get(key)
                if key == "visual.pos_embed" and got and len(got) == 3 and got != shape:
                    if not _square(got[1] - 1):
                        raise UserError(f"--eva-clip: visual.pos_embed has {got[1]} rows")
                    self.notes.append(f"visual.pos_embed: interpolated from {got[1]} to {shape[1]}")
                    shape = (1, got[1], self.cfg.vision.width)
                if re.search(r"\.attn2\.to_[kv]\.weight$", key) and got and got != shape:
                    if len(got) == 2 and got[0] == shape[0]:
                        self.notes.append(
                            f"{key}: condition of width {got[1]}, now {shape[1]}: re-initialised"
                        )
                        fresh.add(row.path)
                        shape = got
                expected[key] = shape
        problems = [
            *(f"{k} is missing" for k in expected if k not in found),
            *(f"{k} is unexpected" for k in found if k not in expected),
            *(
                f"{k} is {list(found[k])}, expected {list(s)}"
                for k, s in expected.items()
                if k in found and tuple(found[k]) != s
            ),
            *(
                f"{k} is {t.dtype}"
                for k, t in self._tensors.items()
                if k in expected and t.dtype not in FLOATS
            ),
        ]
        if problems:
            raise UserError("the parents do not fit: " + "; ".join(problems))
        return fresh

    def _stored(self, path: str) -> np.dtype:
        dtypes = {self._tensors[self._spelling.write(k)].dtype for k in self._rows[path].keys}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def read(self, path: str, layer: int) -> np.ndarray:
        row = self._rows[path]
        if path in self.fresh:
            if path not in self._drawn:
                self._drawn |= self._draw(path)
            # Other layers of it are read next.
            last = layer + 1 == len(layers(row))
            drawn = self._drawn.pop(path) if last else self._drawn[path]
            return np.asarray(drawn[layer] if row.stacked else drawn)
        inner = row.layer_shape(self.shapes[path].shape)
        key = row.keys[layer]
        value = self._tensors[self._spelling.write(key)].read()
        value = self._grow(key, value, row.transform.release_shape(inner))
        return row.transform.from_release(value, inner)

    def _draw(self, path: str) -> dict[str, jax.Array]:
        """Initializes a parameter, and all others made with it, as the module does."""
        if path.startswith("unet."):  # alone: initializing the whole denoiser would be a waste
            shape = self.shapes[path]
            key = jax.random.fold_in(self._painter_key, sorted(self.fresh).index(path))
            draw = jax.jit(
                lambda key: lecun(key, shape.shape, jnp.float32), out_shardings=shape.sharding
            )
            return {path: draw(key)}
        keep = {
            p: s.sharding
            for p, s in self.shapes.items()
            if p in self.fresh and not p.startswith("unet.")
        }

        def make() -> dict[str, jax.Array]:  # XLA removes the parameters that are not returned
            emu = Emu(self.cfg, painter=False, rngs=nnx.Rngs(self._emu_key))
            params = self._template.params(emu)
            return {p: params[p] for p in keep}

        return jax.jit(make, out_shardings=keep)()

    def _grow(self, key: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Returns a parent's tensor resized to the shape that Emu needs."""
        if key in _VOCABULARY:
            mean = value.astype(np.float32).mean(axis=0, keepdims=True).astype(value.dtype)
            return np.concatenate([value, np.repeat(mean, shape[0] - len(value), axis=0)])
        if key == "visual.pos_embed" and value.shape != shape:
            return resize_positions(value, shape[1])
        return value


_VOCABULARY = ("decoder.lm.model.embed_tokens.weight", "decoder.lm.lm_head.weight")


def resize_positions(table: np.ndarray, tokens: int) -> np.ndarray:
    """Resizes position embeddings [1, P, D] to another number of patches, by bicubic interpolation.

    The class token's embedding is kept (release: `interpolate_pos_embed`, without antialiasing).
    """
    old, new = _square(table.shape[1] - 1), _square(tokens - 1)
    grid = rearrange(table[:, 1:].astype(np.float32), "1 (y x) d -> y x d", y=old)
    weights = _cubic(old, new)
    grid = np.einsum("ay,bx,yxd->abd", weights, weights, grid)
    patches = rearrange(grid, "a b d -> 1 (a b) d").astype(table.dtype)
    return np.concatenate([table[:, :1], patches], axis=1)


def _cubic(old: int, new: int) -> np.ndarray:
    """[new, old] weights of torch's bicubic interpolation (a = -0.75, edges repeated)."""
    at = (np.arange(new) + 0.5) * old / new - 0.5
    left = np.floor(at).astype(int)
    weights = np.zeros((new, old))
    for offset in range(-1, 3):
        distance = np.abs(at - (left + offset))
        near = (1.25 * distance - 2.25) * distance**2 + 1
        far = -0.75 * (((distance - 5) * distance + 8) * distance - 4)
        value = np.where(distance <= 1, near, far)
        np.add.at(weights, (np.arange(new), np.clip(left + offset, 0, old - 1)), value)
    return weights


def _square(n: int) -> int:
    """Returns the square root of n, or 0 if n is not a square."""
    side = round(n**0.5)
    return side if side * side == n else 0


def _count(shapes: dict[str, Any], pattern: str) -> int:
    return len({m[1] for key in shapes if (m := re.match(pattern, key))})


def _read(path: Path, prefix: str, name: Callable[[str], str]) -> dict[str, Tensor]:
    """Returns the tensors of a file whose names begin with `prefix`, renamed by `name`."""
    opened, _ = tensor_files.open_tensors(path)
    return {
        name(key): tensor
        for tensors in opened.values()
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }
