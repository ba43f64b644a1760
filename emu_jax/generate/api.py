"""The public API: load a model, then generate text and images from mixed prompts.

    emu = emu_jax.load("runs/demo")
    emu.generate_text([Image.open("a.png"), "what is this?"])
    emu.generate_image("a dog wearing glasses")
    emu.complete([first, "one", second, "two"])

A prompt is a list of parts in reading order, or a single part: texts, images (PIL, or uint8
[h, w, 3]), videos (lists of images, or uint8 [F, h, w, 3]), and Paths of image and video files.

Every method but `stream` also takes many prompts, as a list of lists of parts, and then returns a
list. They run in batches of few shapes, each compiled once. A list that holds nothing but lists is
always many prompts: pass a video alone as an array or a Path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key, UInt8, UInt32
from PIL import Image

from emu_jax import checkpoint, diffusion, sharding
from emu_jax.config import TokenIds
from emu_jax.convert.source import check_heads, is_release, load_release
from emu_jax.errors import UserError
from emu_jax.generate import mixed, text
from emu_jax.generate.batching import Batcher, Shapes
from emu_jax.generate.image import (
    Stopped,
    finish_painting,
    image_shape,
    native_side,
    paint_steps,
    size_condition,
    start_painting,
)
from emu_jax.generate.prompt import (
    MIXED,
    Parts,
    Prompt,
    PromptBatch,
    PromptImage,
    PromptPart,
    Prompts,
    as_parts,
    as_prompts,
    chat_format,
    instruct,
    is_video,
    preprocess_image,
)
from emu_jax.generate.safety import Checker, find_checker
from emu_jax.generate.settings import (
    DynamicSettings,
    GenerationConfig,
    ImageSettings,
    MixedSettings,
    StaticSettings,
    TextConfig,
    TextSettings,
    bucket,
    check_seed,
)
from emu_jax.hub import downloaded
from emu_jax.models.emu import EmuModel
from emu_jax.models.eva_clip import normalize_images
from emu_jax.models.quantized import Quantization, QuantizedMatrix, check_quantization
from emu_jax.sharding import to_host
from emu_jax.tokenizer import USER, Tokenizer

log = logging.getLogger(__name__)

# The values of a model's variables, in the order of its graphdef: arrays and `QuantizedMatrix`.
Variables: TypeAlias = list[Any]

STEPS_PER_STOP_CHECK = 5  # calls of the denoiser between two calls of `stop`
ELEMENTS_PER_STREAM_CHECK = 4  # elements that are decoded before a stream yields them


def load(
    directory: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: jnp.dtype | type = jnp.float32,
    batch_size: int = 64,
    shapes: Shapes | None = None,
    quantize: Quantization | None = None,
) -> Emu:
    """Loads a run directory (local, gs:// or s3://), or the release's own files (a local folder, or
    Emu-instruct.pt). Either may be on the Hugging Face Hub: `hf://ORG/NAME[@REV][/SUB]`.

    A run directory has config.json, tokenizer/ and parameters, of which the newest are loaded. The
    release's files are read as `emu-jax convert` reads them. Each parameter is read straight into
    `dtype`, and no second copy is made.

    Args:
        mesh: devices to load it onto (`make_mesh`); a single device by default. If it spans several
            processes, all of them make the same calls with the same arguments.
        dtype: bfloat16 stores and computes everything in it, as the release does.
        batch_size: rows that are computed at once.
        shapes: the smallest sizes that programs are compiled for.
        quantize: "int8" or "int4" keeps the matrices of the language model and the visual encoder
            in it, and those of the U-Net in int8 (`models.quantized`); the computation stays in
            `dtype`.

    Raises:
        UserError: the directory is not a checkpoint, a part of it cannot be read or downloaded, or
            it has a safety checker and torch is missing.
    """
    check_quantization(quantize)
    if mesh is None:
        mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    with downloaded(directory) as path:
        if is_release(path):
            model, tokenizer = load_release(path, mesh, dtype, quantize)
            defaults = GenerationConfig.of(model.cfg)
        else:
            cfg = checkpoint.load_model_config(path)
            check_heads(path, cfg)
            tokenizer = checkpoint.load_tokenizer(path)
            defaults = GenerationConfig.of(cfg)
            if (path / "generation.json").is_file():
                defaults = GenerationConfig.load(path / "generation.json", defaults)
            towers = set(map(checkpoint.tower_of, checkpoint.run_shapes(path)))

            def build() -> EmuModel:
                return EmuModel(cfg, painter={"unet", "vae"} <= towers, rngs=nnx.Rngs(0))

            model = checkpoint.load_module(path, build, mesh, jnp.dtype(dtype), quantize)
            assert isinstance(model, EmuModel)
        return Emu(
            model,
            tokenizer,
            defaults=defaults,
            safety=find_checker(path) if _paints(model) else None,
            mesh=mesh,
            dtype=dtype,
            batch_size=batch_size,
            shapes=shapes,
        )


class Emu:
    """A model with its tokenizer, ready to generate.

    Methods take their settings (fields of `GenerationConfig`) by name and fall back on
    `defaults`. Row i of many prompts samples from `fold_in(key(seed), i)`, split into a key of
    its text and one of its images: the result does not depend on what it is batched with.

    Attributes:
        cfg: the model's configuration.
        tokenizer: its tokenizer.
        defaults: settings that a call does not name; by default those of the model's release.
        safety: checks images after they are painted (`generate.safety`), if it is not None.
        paints: whether the model can generate images.
    """

    def __init__(
        self,
        model: EmuModel,
        tokenizer: Tokenizer,
        *,
        defaults: GenerationConfig | None = None,
        safety: Checker | None = None,
        mesh: Mesh | None = None,
        dtype: jnp.dtype | type = jnp.float32,
        batch_size: int = 64,
        shapes: Shapes | None = None,
    ) -> None:
        self.cfg, self.tokenizer, self.mesh = model.cfg, tokenizer, mesh
        self.defaults, self.safety = defaults or GenerationConfig.of(model.cfg), safety
        self.dtype, self.paints = jnp.dtype(dtype), _paints(model)
        self._batcher = Batcher(batch_size, shapes or Shapes(), model.cfg.tokens.pad)
        graphdef, params = nnx.split(model)

        # Own variables, even over the same arrays: later changes to the caller's model do not
        # reach this one, nor the other way round.
        def cast(a: jax.Array | QuantizedMatrix) -> jax.Array | QuantizedMatrix:
            return a if isinstance(a, QuantizedMatrix) else a.astype(self.dtype)

        params = jax.tree.map(cast, params, is_leaf=lambda a: isinstance(a, QuantizedMatrix))
        model = nnx.merge(graphdef, params)
        with self._on_mesh():
            model.llama = model.llama.unstacked_for_decoding()
        graphdef, params = nnx.split(model)
        self._graphdef = _HashedGraphDef.of(graphdef)
        # Each call of a program flattens its arguments: a list in C++, an `nnx.State` in Python.
        self._params = [each.get_value() for each in nnx.to_flat_state(params).leaves]

    @property
    def model(self) -> EmuModel:
        """The module itself. On a CPU its language model's layers are a list, not one stack
        (`Llama.unstacked_for_decoding`)."""
        return nnx.merge(self._graphdef, self._params)

    @property
    def image_size(self) -> int:
        """Side of generated images, in pixels, if a call names no other."""
        self._need_painter()
        return native_side(self.cfg)

    # --- Text ---

    @overload  # a list is many prompts; pyright cannot tell it from the parts of one
    def generate_text(  # pyright: ignore[reportOverlappingOverload]
        self,
        prompt: Prompts,
        *,
        choices: Sequence[str] | None = None,
        **settings: Unpack[TextSettings],
    ) -> list[str]: ...
    @overload
    def generate_text(
        self,
        prompt: Parts,
        *,
        choices: Sequence[str] | None = None,
        **settings: Unpack[TextSettings],
    ) -> str: ...
    def generate_text(
        self,
        prompt: Parts | Prompts,
        *,
        choices: Sequence[str] | None = None,
        **settings: Unpack[TextSettings],
    ) -> str | list[str]:
        """Generates the text that follows a prompt, or each of many prompts.

        Args:
            choices: the only possible answers (the release's yes/no trie).

        Raises:
            UserError: a part or a setting is invalid, or the prompt leaves no room for
                `max_new_tokens` in the model's positions.
        """
        prompts, single = as_prompts(prompt)
        ids = self._generate_ids(prompts, choices, settings)
        plain = not self.defaults.replace(**settings).grounding
        texts = [self._text(row.tolist(), plain) for row in ids]
        return texts[0] if single else texts

    def _text(self, ids: Sequence[int], plain: bool = True) -> str:
        """Decodes a generated text. If it is not `plain`, the special tokens that say where things
        are remain."""
        t = self.cfg.tokens
        ids = [i for i in ids if i not in (t.bos, t.eos, t.pad)]
        return self.tokenizer.decode(ids, skip_special_tokens=plain).strip()

    @overload  # as of `generate_text`
    def generate_ids(  # pyright: ignore[reportOverlappingOverload]
        self,
        prompt: Prompts,
        *,
        choices: Sequence[str] | None = None,
        **settings: Unpack[TextSettings],
    ) -> Int[np.ndarray, "B T"]: ...
    @overload
    def generate_ids(
        self,
        prompt: Parts,
        *,
        choices: Sequence[str] | None = None,
        **settings: Unpack[TextSettings],
    ) -> Int[np.ndarray, "T"]: ...
    def generate_ids(
        self,
        prompt: Parts | Prompts,
        *,
        choices: Sequence[str] | None = None,
        **settings: Unpack[TextSettings],
    ) -> Int[np.ndarray, "T"] | Int[np.ndarray, "B T"]:
        """Generates token ids instead of text; see `generate_text`.

        Returns [max_new_tokens + 1], or [B, max_new_tokens + 1] for many prompts: the dummy `<s>`
        of transformers 4.31 first, padded behind `</s>`.
        """
        prompts, single = as_prompts(prompt)
        ids = self._generate_ids(prompts, choices, settings)
        return ids[0] if single else ids

    def _generate_ids(
        self, prompts: Sequence[Parts], choices: Sequence[str] | None, settings: TextSettings
    ) -> Int[np.ndarray, "B T"]:
        cfg = self.defaults.replace(**settings)
        allowed = None
        if choices is not None:
            if not choices:
                raise UserError("choices must name at least one answer")
            ids = [(*self.tokenizer.encode(c, bos=False), self.cfg.tokens.eos) for c in choices]
            allowed = text.choices_table(tuple(ids))
        rows = self._prompts(prompts, cfg.max_new_tokens, cfg)
        length = self._batcher.shapes.new_tokens
        static, dynamic = StaticSettings.of(cfg, self.cfg.tokens, length), DynamicSettings.of(cfg)
        result = np.full((len(rows), cfg.max_new_tokens + 1), self.cfg.tokens.pad, np.int32)
        for chunk, batch in self._batcher.batches(rows, "left", per_row=cfg.num_beams):
            text_keys, _ = _row_keys(chunk.filled, cfg.seed)
            with self._on_mesh():
                out = _decode(
                    self._graphdef,
                    self._params,
                    *self._inputs(batch),
                    static,
                    dynamic,
                    text_keys,
                    allowed,
                )
            result[chunk.index] = to_host(out)[: len(chunk.index), : result.shape[1]]
        return result

    # --- Ranking ---

    @overload
    def rank(
        self, prompt: Prompts, candidates: Sequence[Sequence[str]], *, segments: int = 1
    ) -> list[list[int]]: ...
    @overload
    def rank(self, prompt: Parts, candidates: Sequence[str], *, segments: int = 1) -> list[int]: ...
    def rank(
        self, prompt: Parts | Prompts, candidates: Sequence[Any], *, segments: int = 1
    ) -> list[int] | list[list[int]]:
        """Ranks candidate continuations of a prompt, and returns their indices, likeliest first.

        Args:
            candidates: the continuations; for many prompts, a list for each.
            segments: as in the release's `predict`: candidates of one segment share the length
                that their loss is divided by (`text.mean_losses`).

        Raises:
            UserError: a part is invalid, or a prompt has no candidates.
        """
        prompts, single = as_prompts(prompt)
        ranked = self._rank(prompts, [candidates] if single else candidates, segments)
        return ranked[0] if single else ranked

    def _rank(
        self, prompts: Sequence[Parts], candidates: Sequence[Sequence[str]], segments: int
    ) -> list[list[int]]:
        fewest = min(map(len, candidates), default=0)
        if fewest and not 1 <= segments <= fewest:
            raise UserError(f"segments cannot be {segments}: at most one for each candidate")
        ranked = []
        for sums, lengths, prompt in self._candidate_losses(prompts, candidates):
            means = text.mean_losses(sums, lengths, prompt, segments)
            ranked.append(np.argsort(means, kind="stable").tolist())
        return ranked

    @overload
    def log_likelihoods(
        self, prompt: Prompts, candidates: Sequence[Sequence[str]]
    ) -> list[list[float]]: ...
    @overload
    def log_likelihoods(self, prompt: Parts, candidates: Sequence[str]) -> list[float]: ...
    def log_likelihoods(
        self, prompt: Parts | Prompts, candidates: Sequence[Any]
    ) -> list[float] | list[list[float]]:
        """Returns the log-likelihood of each candidate continuation of a prompt, in nats, summed
        over its tokens.

        Args:
            candidates: the continuations; for many prompts, a list for each.

        Raises:
            UserError: a part is invalid, or a prompt has no candidates.
        """
        prompts, single = as_prompts(prompt)
        scored = self._candidate_losses(prompts, [candidates] if single else candidates)
        sums: list[list[float]] = [(-losses).tolist() for losses, _, _ in scored]
        return sums[0] if single else sums

    def _candidate_losses(
        self, prompts: Sequence[Parts], candidates: Sequence[Sequence[str]]
    ) -> list[tuple[Float[np.ndarray, "candidates"], list[int], int]]:
        """Returns, for each prompt, the summed losses of its candidates, their numbers of tokens,
        and the prompt's."""
        if len(prompts) != len(candidates) or not all(candidates):
            raise UserError("each prompt needs its list of candidates")
        if not candidates:
            return []
        count = max(map(len, candidates))
        ids = [[self.tokenizer.encode(c, bos=False) for c in row] for row in candidates]
        longest = [max(map(len, row)) for row in ids]
        rows = self._prompts(prompts, longest, self.defaults)
        width = bucket(max(longest))
        losses: dict[int, Float[np.ndarray, "candidates"]] = {}
        for chunk, batch in self._batcher.batches(rows, "left", per_row=count):
            table = np.full((len(batch.tokens), bucket(count, 1), width), -1, np.int32)
            for n, i in enumerate(chunk.index):
                for c, candidate in enumerate(ids[i]):
                    table[n, c, : len(candidate)] = candidate
            with self._on_mesh():
                sums = _losses(self._graphdef, self._params, *self._inputs(batch), table)
            for i, row in zip(chunk.index.tolist(), to_host(sums), strict=False):
                losses[i] = row[: len(ids[i])]
        return [(losses[i], [*map(len, ids[i])], len(row.tokens)) for i, row in enumerate(rows)]

    # --- Images ---

    @overload
    def embed(self, image: PromptImage) -> Float[np.ndarray, "width"]: ...
    @overload
    def embed(self, image: Sequence[PromptImage]) -> Float[np.ndarray, "B width"]: ...
    def embed(
        self, image: PromptImage | Sequence[PromptImage]
    ) -> Float[np.ndarray, "width"] | Float[np.ndarray, "B width"]:
        """Returns mean-pooled visual features of an image, or of each of a list of images, for
        nearest-neighbor retrieval."""
        single = not isinstance(image, list | tuple)
        size = self.cfg.vision.image_size
        images = [image] if single else image
        pixels = [preprocess_image(each, size) for each in images]
        out = np.zeros((len(pixels), self.cfg.vision.width), np.float32)
        for chunk in self._batcher.chunks(len(pixels)):
            batch = np.stack([pixels[i] for i in chunk.filled])
            with self._on_mesh():
                features = _features(self._graphdef, self._params, batch, self.dtype)
            out[chunk.index] = to_host(features)[: len(chunk.index)]
        return out[0] if single else out

    @overload  # a list is many prompts; pyright cannot tell it from the parts of one
    def generate_image(  # pyright: ignore[reportOverlappingOverload]
        self,
        prompt: Prompts,
        *,
        negative_prompt: Parts | None = None,
        seed: int | Sequence[int] | None = None,
        stop: Callable[[], bool] | None = None,
        **settings: Unpack[ImageSettings],
    ) -> list[Image.Image]: ...
    @overload
    def generate_image(
        self,
        prompt: Parts,
        *,
        negative_prompt: Parts | None = None,
        seed: int | None = None,
        stop: Callable[[], bool] | None = None,
        **settings: Unpack[ImageSettings],
    ) -> Image.Image: ...
    def generate_image(
        self,
        prompt: Parts | Prompts,
        *,
        negative_prompt: Parts | None = None,
        seed: int | Sequence[int] | None = None,
        stop: Callable[[], bool] | None = None,
        **settings: Unpack[ImageSettings],
    ) -> Image.Image | list[Image.Image]:
        """Generates an image from a prompt, or from each of many prompts.

        Words describe it, images are varied or blended, and both together are read in context. If
        the decoder was trained as an autoencoder (Emu2), a single image without text is painted
        from its own features, without the language model.

        Args:
            negative_prompt: the prompt that guidance leads away from; by default, as in the
                release, the empty prompt, or the null image where an image is painted from its own
                features.
            seed: for many prompts, either a seed for each image, or one from which each image's
                own follows.
            stop: called every few steps of the denoiser; True ends the call with `Stopped`.

        Raises:
            UserError: a part or a setting is invalid, or the model cannot generate images.
            Stopped: `stop` returned True (`generate.image`).
        """
        self._need_painter()
        prompts, single = as_prompts(prompt)
        cfg = self.defaults.replace(**settings)
        keys = self._seeded_image_keys(seed, len(prompts), cfg)
        embeddings, autoencoded = self._conditions(prompts)
        images = self._paint(embeddings, keys, cfg, negative_prompt, stop, autoencoded=autoencoded)
        return Image.fromarray(images[0]) if single else [*map(Image.fromarray, images)]

    @overload  # as of `generate_image`
    def regress(  # pyright: ignore[reportOverlappingOverload]
        self, prompt: Prompts
    ) -> Float[Array, "B N E"]: ...
    @overload
    def regress(self, prompt: Parts) -> Float[Array, "N E"]: ...
    def regress(self, prompt: Parts | Prompts) -> Float[Array, "N E"] | Float[Array, "B N E"]:
        """Returns the embeddings of the image that follows a prompt, or each of many prompts
        (release: `generate_image`)."""
        prompts, single = as_prompts(prompt)
        embeddings = self._regress_all(prompts)
        return embeddings[0] if single else embeddings

    def _conditions(
        self, prompts: Sequence[Parts]
    ) -> tuple[Float[Array, "B N E"], Bool[np.ndarray, "B"]]:
        """Returns the embeddings to paint for each prompt, and whether they are the features of an
        image that is the whole prompt, rather than regressed."""
        autoencoded = np.zeros(len(prompts), bool)
        if not self.cfg.autoencodes:
            return self._regress_all(prompts), autoencoded
        opened, pixels = [], []
        for number, prompt in enumerate(prompts):
            with _naming(number, prompts):
                parts = as_parts(prompt)
                if self._autoencodes(parts):
                    autoencoded[number] = True
                    pixels.append(preprocess_image(parts[0], self.cfg.vision.image_size))
            opened.append(parts)
        if len({image.dtype for image in pixels}) > 1:
            raise UserError(MIXED)
        alone, others = np.flatnonzero(autoencoded), np.flatnonzero(~autoencoded)
        regressed = self._regress_all([opened[i] for i in others])
        images = np.stack(pixels) if pixels else np.zeros((0, 1, 1, 3), np.uint8)
        embeddings = jnp.concatenate([self._encode_all(images)[: len(alone)], regressed])
        return embeddings[np.argsort(np.concatenate([alone, others]))], autoencoded

    def _autoencodes(self, parts: Sequence[PromptPart]) -> bool:
        """Returns whether a prompt is a single image that is painted from its own features."""
        single = len(parts) == 1 and not isinstance(parts[0], str) and not is_video(parts[0])
        return single and self.cfg.autoencodes

    def _regress_all(self, prompts: Sequence[Parts]) -> Float[Array, "B N E"]:
        n, width = self.cfg.n_embeddings, self.cfg.embedding_width
        rows = self._prompts(prompts, n)
        embeddings: dict[int, Array] = {}
        for chunk, batch in self._batcher.batches(rows, "right"):
            with self._on_mesh():
                out = _regress(self._graphdef, self._params, *self._inputs(batch))
            embeddings |= {i: out[n] for n, i in enumerate(chunk.index.tolist())}
        if not embeddings:
            return jnp.zeros((0, n, width), self.dtype)
        return jnp.stack([embeddings[i] for i in range(len(rows))])

    @overload
    def paint(
        self,
        embeddings: Float[Array, "B N E"],
        *,
        negative_prompt: Parts | None = None,
        seed: Sequence[int],
        **settings: Unpack[ImageSettings],
    ) -> list[Image.Image]: ...
    @overload  # type checkers count no axes: `Any` stands for the list of many with one seed
    def paint(
        self,
        embeddings: Float[Array, "N E"] | Float[Array, "B N E"],
        *,
        negative_prompt: Parts | None = None,
        seed: int | None = None,
        **settings: Unpack[ImageSettings],
    ) -> Image.Image | Any: ...
    def paint(
        self,
        embeddings: Float[Array, "N E"] | Float[Array, "B N E"],
        *,
        negative_prompt: Parts | None = None,
        seed: int | Sequence[int] | None = None,
        **settings: Unpack[ImageSettings],
    ) -> Image.Image | list[Image.Image]:
        """Paints the image of embeddings, or of each of many; see `generate_image`."""
        single = embeddings.ndim == 2
        embeddings = embeddings[None] if single else embeddings
        cfg = self.defaults.replace(**settings)
        keys = self._seeded_image_keys(seed, len(embeddings), cfg)
        images = self._paint(embeddings, keys, cfg, negative_prompt)
        return Image.fromarray(images[0]) if single else [*map(Image.fromarray, images)]

    def _seeded_image_keys(
        self, seed: int | Sequence[int] | None, count: int, cfg: GenerationConfig
    ) -> Key[Array, "B"]:
        seed = cfg.seed if seed is None else seed
        if isinstance(seed, int | float | str | np.number):
            check_seed(seed)
            return _image_keys(_row_keys(np.arange(count), int(seed))[1], 0)
        if len(seed) != count:
            raise UserError(f"{len(seed)} seeds for {count} images: give one for each")
        for each in seed:
            check_seed(each)
        # Each image is the one that its seed gives alone.
        return _image_keys(_row_keys(np.zeros(count, int), seed)[1], 0)

    def _paint(
        self,
        embeddings: Float[Array, "B N E"],
        keys: Key[Array, "B"],
        cfg: GenerationConfig,
        negative_prompt: Parts | None = None,
        stop: Callable[[], bool] | None = None,
        autoencoded: Bool[np.ndarray, "B"] | None = None,
    ) -> UInt8[np.ndarray, "B height width 3"]:
        """Paints embeddings. `autoencoded` ones are the features of an image."""
        shape, sizes, uncond, guidance, table, count = self._painting(
            cfg, negative_prompt, autoencoded
        )
        out = np.zeros((len(embeddings), *shape, 3), np.uint8)
        for chunk in self._batcher.chunks(len(embeddings)):
            with self._on_mesh():
                cond, own = embeddings[chunk.filled], keys[chunk.filled]
                state = _start_painting(self._graphdef, self._params, own, cond.dtype, shape)
                for first in range(0, count, count if stop is None else STEPS_PER_STOP_CHECK):
                    if stop is not None and stop():
                        raise Stopped
                    last = count if stop is None else min(first + STEPS_PER_STOP_CHECK, count)
                    state = _paint_steps(
                        self._graphdef,
                        self._params,
                        state,
                        cond,
                        uncond if uncond is None or uncond.ndim == 2 else uncond[chunk.filled],
                        guidance,
                        table,
                        np.int32(first),
                        np.int32(last),
                        sizes,
                    )
                    if stop is not None:
                        jax.block_until_ready(state)
                painted = _finish_painting(self._graphdef, self._params, state, cond.dtype)
            out[chunk.index] = to_host(painted)[: len(chunk.index)]
        return out if self.safety is None or not len(out) else self.safety(out)

    def _painting(
        self,
        cfg: GenerationConfig,
        negative_prompt: Parts | None = None,
        autoencoded: Bool[np.ndarray, "B"] | None = None,
    ) -> Painting:
        """Returns the inputs of painting other than embeddings and keys.

        Args:
            autoencoded: which embeddings are the features of an image; None: none of them.

        Raises:
            UserError: a setting is invalid, or the model cannot generate images.
        """
        self._need_painter()
        shape = image_shape(self.cfg, cfg.height, cfg.width)
        sizes = size_condition(
            self.cfg,
            shape,
            original_size=cfg.original_size,
            crops_coords_top_left=cfg.crops_coords_top_left,
            target_size=cfg.target_size,
        )
        uncond = None
        if cfg.guidance_scale > 1:
            uncond = self._uncond(negative_prompt, autoencoded)
        steps = diffusion.padded_steps(self.cfg.scheduler, cfg.num_inference_steps, cfg.scheduler)
        return Painting(shape, sizes, uncond, np.float32(cfg.guidance_scale), *steps)

    def _uncond(
        self, negative_prompt: Parts | None, autoencoded: Bool[np.ndarray, "B"] | None = None
    ) -> Float[Array, "N E"] | Float[Array, "B N E"]:
        """Returns the condition of guidance's other half: one for all images, or one for each."""
        if negative_prompt is not None:
            return self._conditions([negative_prompt])[0][0]
        if autoencoded is None or not autoencoded.any():
            return self._empty_prompt
        if autoencoded.all():
            return self._null_image
        return jnp.where(autoencoded[:, None, None], self._null_image, self._empty_prompt)

    @functools.cached_property
    def _empty_prompt(self) -> Float[Array, "N E"]:
        """The model's own image of the empty prompt, <s>[IMG], not zeros."""
        return self._regress_all([""])[0]

    @functools.cached_property
    def _null_image(self) -> Float[Array, "N E"]:
        """Features of the image that is zero after normalization."""
        side = self.cfg.vision.image_size
        return self._encode_all(np.zeros((1, side, side, 3), np.float32))[0]

    def _need_painter(self) -> None:
        if not self.paints:
            raise UserError(
                "this checkpoint has no visual decoder (unet, vae): it writes text, but to paint "
                "take the pretrained model with its decoder"
            )

    # --- Text and images ---

    def stream(
        self, prompt: Parts, **settings: Unpack[MixedSettings]
    ) -> Iterator[str | Image.Image]:
        """Streams the output of `complete` for one prompt: text a few tokens at a time, images
        whole.

        The texts between two images, joined, are those of `complete`, up to white space at
        their ends.
        """
        cfg = self.defaults.replace(**settings)
        rows = self._prompts([prompt], cfg.max_new_tokens, cfg)
        static, dynamic, room = self._mixed(cfg, rows)
        ((chunk, batch),) = self._batcher.batches(rows, "left")
        dynamic = dynamic._replace(max_images=room[chunk.filled])
        text_keys, image_keys = _row_keys(np.zeros(len(batch.tokens), int), cfg.seed)
        with self._on_mesh():
            state = _open_mixed(
                self._graphdef, self._params, *self._inputs(batch), static, dynamic, text_keys
            )
        progress = _StreamProgress(self.tokenizer, self.cfg.tokens, last=int(rows[0].tokens[-1]))
        while True:
            # Read before the state is donated.
            tokens, count, done = (
                to_host(a) for a in (state.tokens[0], state.count[0], state.done[0])
            )
            ended = bool(done) or int(state.step) >= static.steps(self.cfg.n_embeddings)
            for part in progress.advance(tokens[: int(state.step)], images=int(count), ended=ended):
                if isinstance(part, str):
                    yield part
                    continue
                keys = _image_keys(image_keys[:1], part)
                yield Image.fromarray(self._paint(state.images[:1, part], keys, cfg)[0])
            if ended:
                return
            with self._on_mesh():
                state = _decode_mixed(
                    self._graphdef, self._params, state, static, dynamic, text_keys
                )

    @overload  # a list is many prompts; pyright cannot tell it from the parts of one
    def complete(  # pyright: ignore[reportOverlappingOverload]
        self, prompt: Prompts, **settings: Unpack[MixedSettings]
    ) -> list[list[str | Image.Image]]: ...
    @overload
    def complete(
        self, prompt: Parts, **settings: Unpack[MixedSettings]
    ) -> list[str | Image.Image]: ...
    def complete(
        self, prompt: Parts | Prompts, **settings: Unpack[MixedSettings]
    ) -> list[str | Image.Image] | list[list[str | Image.Image]]:
        """Continues a prompt, or each of many, with text and images, as the model decides.

        Text is decoded greedily unless `do_sample`. A continuation ends at `</s>`, after
        `max_new_tokens` of text, or where it would start more than `max_images` images or an
        image that no longer fits after its prompt.

        Raises:
            UserError: a part or a setting is invalid, or the prompt leaves no room for
                `max_new_tokens` in the model's positions.
        """
        prompts, single = as_prompts(prompt)
        completed = self._complete_all(prompts, settings)
        return completed[0] if single else completed

    def _complete_all(
        self, prompts: Sequence[Parts], settings: MixedSettings
    ) -> list[list[str | Image.Image]]:
        cfg = self.defaults.replace(**settings)
        rows = self._prompts(prompts, cfg.max_new_tokens, cfg)
        static, dynamic, room = self._mixed(cfg, rows)
        parts: dict[int, list[str | None]] = {}
        embeddings, keys = [], []  # of all images
        for chunk, batch in self._batcher.batches(rows, "left"):
            dynamic = dynamic._replace(max_images=room[chunk.filled])
            text_keys, image_keys = _row_keys(chunk.filled, cfg.seed)
            with self._on_mesh():
                tokens, images = _complete(
                    self._graphdef, self._params, *self._inputs(batch), static, dynamic, text_keys
                )
            tokens = to_host(tokens)
            for n, i in enumerate(chunk.index.tolist()):
                parts[i] = self._split(tokens[n], int(rows[i].tokens[-1]))
                for k in range(parts[i].count(None)):
                    embeddings.append(images[n, k])
                    keys.append(_image_keys(image_keys[n : n + 1], k)[0])
        painted: Iterator[Image.Image] = iter(())
        if embeddings:
            arrays = self._paint(jnp.stack(embeddings), jnp.stack(keys), cfg)
            painted = map(Image.fromarray, arrays)
        # Rows take their images in the order in which they were computed.
        completed = {
            i: [next(painted) if part is None else part for part in row] for i, row in parts.items()
        }
        return [completed[i] for i in range(len(rows))]

    def _mixed(
        self, cfg: GenerationConfig, rows: Sequence[Prompt]
    ) -> tuple[mixed.StaticMixedSettings, mixed.DynamicMixedSettings, Int[np.ndarray, "B"]]:
        """Returns the static and dynamic settings, and how many images each row has room for."""
        static, room = self._static_mixed(cfg, rows)
        dynamic = mixed.DynamicMixedSettings(
            jnp.int32(cfg.max_new_tokens),
            jnp.float32(cfg.temperature),
            jnp.int32(cfg.top_k),
            jnp.float32(cfg.top_p),
        )
        return static, dynamic, room

    def _static_mixed(
        self, cfg: GenerationConfig, rows: Sequence[Prompt]
    ) -> tuple[mixed.StaticMixedSettings, Int[np.ndarray, "B"]]:
        """Returns the static settings, and how many images each row has room for."""
        for name in ("repetition_penalty", "no_repeat_ngram_size"):
            if getattr(cfg, name) != getattr(TextConfig, name):
                raise UserError(f"{name} has no effect on mixed sequences: leave it out")
        max_images = cfg.max_images if self.paints else 0
        static = mixed.StaticMixedSettings(
            bucket(cfg.max_new_tokens, self._batcher.shapes.new_tokens),
            max_images,
            cfg.do_sample,
            self.paints,
        )
        return static, self._room_for_images(rows, cfg.max_new_tokens, max_images)

    def _room_for_images(
        self, rows: Sequence[Prompt], new_tokens: int, max_images: int
    ) -> Int[np.ndarray, "B"]:
        """Returns how many images each row has room for, at most `max_images`.

        Raises:
            UserError: a prompt ends in `[IMG]` but leaves no room for its image.
        """
        positions, size = self.cfg.llama.context_length, self.cfg.n_embeddings + 1
        free = [positions - len(row.tokens) - new_tokens for row in rows]
        room = np.minimum(np.array(free, np.int32) // size, max_images).astype(np.int32)
        for number, row in enumerate(rows):
            if row.tokens[-1] == self.cfg.tokens.img and not room[number]:
                self._need_painter()
                fix = "shorten it" if max_images else "raise max_images"
                raise UserError(
                    f"{_name(number, rows)} ends in [IMG], which starts an image, but there is no "
                    f"room for one (max_images {max_images}, {positions} positions in all): {fix}"
                )
        if short := int(np.sum(room < max_images)):
            log.warning(
                "%d of %d prompts leave room for fewer than %d images (%d at least): the model "
                "has %d positions for prompt, text and images together",
                short,
                len(rows),
                max_images,
                room.min(),
                positions,
            )
        return room

    def _split(self, tokens: Int[np.ndarray, "T"], last: int) -> list[str | None]:
        """Splits generated tokens into texts, with None for each image. `last` is the prompt's
        last token."""
        ids = self.cfg.tokens
        parts: list[str | None] = []
        words: list[int] = []
        started: list[int] = [ids.img] if last == ids.img else []
        for token in [*started, *tokens.tolist()]:
            if token == ids.img:
                parts += [self.tokenizer.decode(words).strip(), None]
                words = []
            elif token not in (ids.image, ids.img_end, ids.pad, ids.eos):
                words.append(token)
        parts.append(self.tokenizer.decode(words).strip())
        return [p for p in parts if p != ""]

    # --- Prompts ---

    def _prompts(
        self,
        prompts: Sequence[Parts],
        new: int | Sequence[int],
        chat: GenerationConfig | None = None,
    ) -> list[Prompt]:
        """Tokenizes prompts that `new` more tokens follow, a number for all or one for each.

        Args:
            chat: how an instruction-tuned model is asked; None for prompts of an image.

        Raises:
            UserError: a prompt is invalid, or it and what follows do not fit together into the
                model's positions.
        """
        positions, rows = self.cfg.llama.context_length, []
        for number, parts in enumerate(prompts):
            with _naming(number, prompts):
                row = self._prompt(parts, chat)
            more = new if isinstance(new, int | np.integer) else new[number]
            if (length := len(row.tokens)) + more > positions:
                fewer = f", or ask for at most {positions - length}" if positions > length else ""
                fix = "shorten it" + ("" if chat is None else fewer)
                raise UserError(
                    f"{_name(number, prompts)} has {length} tokens and {more} are to follow, but "
                    f"the model has {positions} positions: {fix}"
                )
            rows.append(row)
        return rows

    def _prompt(self, parts: Parts, chat: GenerationConfig | None) -> Prompt:
        parts = as_parts(parts)
        spelled = any(isinstance(p, str) and USER in p for p in parts)
        if chat is not None and self.tokenizer.user is not None and not spelled:
            style = chat_format(self.cfg, chat.chat_format)
            parts = instruct(parts, chat.system, style=style, grounding=chat.grounding)
        elif chat is not None and (chat.system or chat.grounding):
            given = "a system message" if chat.system else "grounding"
            raise UserError(f"{given} needs an instruction-tuned model and a plain prompt")
        return Prompt.of(parts, self.tokenizer, self.cfg, append_img=chat is None)

    def _inputs(
        self, batch: PromptBatch
    ) -> tuple[
        Float[Array, "B images N E"],
        Int[np.ndarray, "B T"],
        Int[np.ndarray, "B T"],
        Bool[np.ndarray, "B T"],
    ]:
        """Encodes a batch's images. Returns the inputs of the compiled programs: embeddings,
        tokens, embedding_index, valid."""
        flat = self._encode_all(batch.images, batch.frames if batch.frames.any() else None)
        if not len(flat):  # rows without images index any embeddings
            flat = jnp.zeros((1, *flat.shape[1:]), flat.dtype)
        return (
            jnp.take(flat, batch.image_index, axis=0),
            batch.tokens,
            batch.embedding_index,
            batch.valid,
        )

    def _encode_all(
        self,
        images: UInt8[np.ndarray, "all side side 3"] | Float[np.ndarray, "all side side 3"],
        frames: Bool[np.ndarray, "all"] | None = None,
    ) -> Float[Array, "_ N E"]:
        """Returns the embeddings of preprocessed images, and of padding after them.

        Args:
            frames: which images are frames of a video; None: none of them.
        """
        encoded = []
        for chunk in self._batcher.chunks(len(images)):
            with self._on_mesh():
                part = images[chunk.filled]
                framed = None if frames is None else frames[chunk.filled]
                encoded.append(_encode(self._graphdef, self._params, part, framed, self.dtype))
        shape = (0, self.cfg.n_embeddings, self.cfg.embedding_width)
        return jnp.concatenate(encoded) if encoded else jnp.zeros(shape, self.dtype)

    def _on_mesh(self) -> contextlib.AbstractContextManager[object]:
        return jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()


class Painting(NamedTuple):
    """Settings of painting as the compiled programs take them.

    Attributes:
        shape: height and width of the images, in pixels.
        sizes: sizes that the denoiser is conditioned on, if it takes any.
        uncond: condition of guidance's other half, for all images or for each; None without
            guidance.
        guidance: its scale, unused without `uncond`.
        table: the sampler's steps, of which the first `count` are run.
    """

    shape: tuple[int, int]
    sizes: Float[np.ndarray, "6"] | None
    uncond: Float[Array, "N E"] | Float[Array, "B N E"] | None
    guidance: np.float32
    table: diffusion.Steps
    count: int


class _StreamProgress:
    """Tracks how much of a continuation has been streamed.

    Args:
        last: the prompt's last token; `[IMG]` starts an image.
    """

    def __init__(self, tokenizer: Tokenizer, ids: TokenIds, *, last: int) -> None:
        self._tokenizer, self._ids = tokenizer, ids
        self._words: list[int] = []  # of the current text
        self._text = ""  # the streamed part of it
        self._read = 0
        self._waiting = [0] if last == ids.img else []  # images that are not complete yet
        self._started = len(self._waiting)

    def advance(
        self, tokens: Int[np.ndarray, "T"], *, images: int, ended: bool
    ) -> Iterator[str | int]:
        """Yields new texts and the numbers of new images. `images` of them are complete."""
        ids = self._ids
        for token in tokens[self._read :].tolist():
            self._read += 1
            if token == ids.img:
                yield from self._new_text(whole=True)
                self._words, self._text = [], ""
                self._waiting.append(self._started)
                self._started += 1
            elif token not in (ids.image, ids.img_end, ids.pad, ids.eos):
                # An image comes before the words that follow it.
                yield from self._waiting
                self._waiting = []
                self._words.append(token)
        ready = [n for n in self._waiting if n < images or ended]
        self._waiting = [n for n in self._waiting if n not in ready]
        yield from ready
        yield from self._new_text(whole=ended)

    def _new_text(self, whole: bool) -> Iterator[str]:
        """Yields new words, without the bytes of an unfinished character."""
        text = self._tokenizer.decode(self._words)
        if not whole:
            text = text.rstrip("\ufffd")
        if len(text) > len(self._text):
            yield text[len(self._text) :]
            self._text = text


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _HashedGraphDef(nnx.GraphDef):
    """A graphdef that is hashed once. Without it, each call of a compiled program hashes the whole
    graphdef, which takes longer than a token of a small model."""

    known_hash: int

    @classmethod
    def of(cls, graphdef: nnx.GraphDef) -> _HashedGraphDef:
        return cls(graphdef.nodes, graphdef.attributes, graphdef.num_leaves, hash(graphdef))

    def __hash__(self) -> int:
        return self.known_hash

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, nnx.GraphDef):
            return self is other
        return (self.nodes, self.attributes) == (other.nodes, other.attributes)


def _paints(model: EmuModel) -> bool:
    return model.unet is not None and model.vae is not None


@contextlib.contextmanager
def _naming(number: int, rows: Sequence[object]) -> Iterator[None]:
    """Names one of many prompts in the errors of a block."""
    try:
        yield
    except UserError as error:
        if len(rows) == 1:
            raise
        raise UserError(f"{_name(number, rows)}: {error}") from None


def _name(number: int, rows: Sequence[object]) -> str:
    return "the prompt" if len(rows) == 1 else f"prompt {number + 1} of {len(rows)}"


def _row_keys(
    rows: ArrayLike, seeds: ArrayLike | Sequence[int]
) -> tuple[Key[Array, "B"], Key[Array, "B"]]:
    """Returns the keys of each row's text and of its images.

    A row's keys follow from its number and its seed alone, whatever it is batched with. Text
    folds in the step, images fold in their number (`_image_keys`).

    Args:
        rows: the number of each row, [B].
        seeds: one for all rows, or one for each.
    """
    rows, seeds = np.broadcast_arrays(rows, np.asarray(seeds, np.uint32))
    return _seeded_keys(rows, seeds)


@jax.jit
@jax.vmap
def _seeded_keys(
    row: Int[Array, ""], seed: UInt32[Array, ""]
) -> tuple[Key[Array, ""], Key[Array, ""]]:
    text_key, image_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), row))
    return text_key, image_key


@jax.jit
def _image_keys(image_keys: Key[Array, "B"], number: int) -> Key[Array, "B"]:
    """Returns the keys of the initial latents of each row's image `number`."""
    return jax.vmap(jax.random.fold_in, (0, None))(image_keys, number)


# --- Programs: compiled once per bucket of shapes; the module's structure is part of the key ------


@functools.partial(jax.jit, static_argnames=("graphdef", "dtype"))
def _encode(
    graphdef: nnx.GraphDef,
    params: Variables,
    images: UInt8[Array, "B side side 3"] | Float[Array, "B side side 3"],
    frames: Bool[Array, "B"] | None,
    dtype: jnp.dtype,
) -> Float[Array, "B N E"]:
    floating = jnp.issubdtype(images.dtype, jnp.floating)
    pixels = images.astype(dtype) if floating else normalize_images(images, dtype)
    model = nnx.merge(graphdef, params)
    return model.encode_images(pixels, frames=False if frames is None else frames)


@functools.partial(jax.jit, static_argnames=("graphdef", "dtype"))
def _features(
    graphdef: nnx.GraphDef,
    params: Variables,
    images: UInt8[Array, "B side side 3"],
    dtype: jnp.dtype,
) -> Float[Array, "B width"]:
    features = nnx.merge(graphdef, params).visual(normalize_images(images, dtype))
    return jnp.mean(features.astype(jnp.float32), axis=1)


@functools.partial(jax.jit, static_argnames=("graphdef", "static"))
def _decode(
    graphdef: nnx.GraphDef,
    params: Variables,
    images: Float[Array, "B images N E"],
    tokens: Int[Array, "B T"],
    embedding_index: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    static: StaticSettings,
    dynamic: DynamicSettings,
    keys: Key[Array, "B"],
    allowed: Int[Array, "choices choice"] | None,
) -> Int[Array, "B length"]:
    emu = nnx.merge(graphdef, params)
    x = emu.embed(tokens, images, embedding_index)
    return text.decode(emu.llama, x, valid, static, dynamic, keys, allowed)


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _losses(
    graphdef: nnx.GraphDef,
    params: Variables,
    images: Float[Array, "B images N E"],
    tokens: Int[Array, "B T"],
    embedding_index: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    candidates: Int[Array, "B candidates length"],
) -> Float[Array, "B candidates"]:
    emu = nnx.merge(graphdef, params)
    x = emu.embed(tokens, images, embedding_index)
    return text.candidate_losses(emu.llama, x, valid, candidates)


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _regress(
    graphdef: nnx.GraphDef,
    params: Variables,
    images: Float[Array, "B images N E"],
    tokens: Int[Array, "B T"],
    embedding_index: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
) -> Float[Array, "B N E"]:
    emu = nnx.merge(graphdef, params)
    return emu.regress_after(tokens, jnp.sum(valid, axis=1), images, embedding_index)


@functools.partial(jax.jit, static_argnames=("graphdef", "dtype", "shape"))
def _start_painting(
    graphdef: nnx.GraphDef,
    params: Variables,
    keys: Key[Array, "B"],
    dtype: jnp.dtype,
    shape: tuple[int, int],
) -> diffusion.SamplerState:
    return start_painting(keys, nnx.merge(graphdef, params).cfg, dtype, shape)


@functools.partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("state",))
def _paint_steps(
    graphdef: nnx.GraphDef,
    params: Variables,
    state: diffusion.SamplerState,
    cond: Float[Array, "B N E"],
    uncond: Float[Array, "N E"] | Float[Array, "B N E"] | None,
    guidance: Float[Array, ""],
    table: diffusion.Steps,
    first: Int[Array, ""],
    last: Int[Array, ""],
    sizes: Float[Array, "6"] | None,
) -> diffusion.SamplerState:
    emu = nnx.merge(graphdef, params)
    return paint_steps(emu, state, cond, uncond, guidance, table, first, last, sizes)


@functools.partial(jax.jit, static_argnames=("graphdef", "dtype"))
def _finish_painting(
    graphdef: nnx.GraphDef, params: Variables, state: diffusion.SamplerState, dtype: jnp.dtype
) -> UInt8[Array, "B height width 3"]:
    return finish_painting(nnx.merge(graphdef, params), state, dtype)


@functools.partial(jax.jit, static_argnames=("graphdef", "static"))
def _open_mixed(
    graphdef: nnx.GraphDef,
    params: Variables,
    images: Float[Array, "B images N E"],
    tokens: Int[Array, "B T"],
    embedding_index: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    static: mixed.StaticMixedSettings,
    dynamic: mixed.DynamicMixedSettings,
    keys: Key[Array, "B"],
) -> mixed.MixedState:
    emu = nnx.merge(graphdef, params)
    x = emu.embed(tokens, images, embedding_index)
    starts_image = tokens[:, -1] == emu.cfg.tokens.img
    return mixed.start(emu, x, valid, starts_image, static, dynamic, keys)


@functools.partial(jax.jit, static_argnames=("graphdef", "static"), donate_argnames=("state",))
def _decode_mixed(
    graphdef: nnx.GraphDef,
    params: Variables,
    state: mixed.MixedState,
    static: mixed.StaticMixedSettings,
    dynamic: mixed.DynamicMixedSettings,
    keys: Key[Array, "B"],
) -> mixed.MixedState:
    emu = nnx.merge(graphdef, params)
    return mixed.decode_until(
        emu, state, state.step + ELEMENTS_PER_STREAM_CHECK, static, dynamic, keys
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "static"))
def _complete(
    graphdef: nnx.GraphDef,
    params: Variables,
    images: Float[Array, "B images N E"],
    tokens: Int[Array, "B T"],
    embedding_index: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    static: mixed.StaticMixedSettings,
    dynamic: mixed.DynamicMixedSettings,
    keys: Key[Array, "B"],
) -> tuple[Int[Array, "B length"], Float[Array, "B new_images N E"]]:
    emu = nnx.merge(graphdef, params)
    x = emu.embed(tokens, images, embedding_index)
    starts_image = tokens[:, -1] == emu.cfg.tokens.img
    return mixed.complete(emu, x, valid, starts_image, static, dynamic, keys)
