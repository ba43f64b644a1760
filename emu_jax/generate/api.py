"""Emu for its users: prompts of text and pictures in, text and pictures out.

    emu = emu_jax.load("runs/demo")
    emu.generate_text([Image.open("a.png"), "what is this?"])
    emu.generate_image(["a dog wearing glasses"])
    emu.complete([first, "one", second, "two"])

A prompt is a list of parts in reading order: texts, pictures (PIL, or uint8 [h, w, 3]), videos
(lists of pictures, or uint8 [F, h, w, 3]), and Paths of files of pictures and videos. Every method
has a form for many prompts, which runs them in batches of few shapes, each compiled once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key, UInt8
from PIL import Image

from emu_jax import checkpoint, diffusion, sharding
from emu_jax.config import TokenIds, load_json
from emu_jax.convert.source import check_heads, is_release, load_release
from emu_jax.errors import UserError, suggest
from emu_jax.generate import image, mixed, text
from emu_jax.generate.image import ImageConfig
from emu_jax.generate.prompt import Batch, Parts, Prompt, as_parts, instruct, pad, pixels_of
from emu_jax.generate.safety import Checker, find_checker
from emu_jax.generate.text import TRACES, Plan, Rules, TextConfig, bucket, check_seed
from emu_jax.models import emu as models
from emu_jax.models.eva_clip import normalize_images
from emu_jax.tokenizer import USER, Tokenizer

log = logging.getLogger(__name__)

T = TypeVar("T")
STOP_ROWS = 5  # calls of the denoiser between two looks at `stop`


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The smallest sizes that programs are compiled for; larger ones are rounded up.

    A caller whose requests vary at random, such as a server, raises them: it then compiles few
    programs, which compute on a little more padding.

    Attributes:
        length: tokens of a prompt.
        images: images of a prompt.
        new_tokens: generated text tokens that there is room for.
    """

    length: int = 16
    images: int = 1
    new_tokens: int = 8


@dataclasses.dataclass(frozen=True)
class GenerationConfig(TextConfig, ImageConfig):
    """Settings of generation; `generation.json` in a run directory may change the defaults.

    Attributes:
        max_images: pictures that a continuation may hold.
        system: the system message of an instruction-tuned model, whose prompts are put into its
            format unless they spell `[USER]` already; None chooses as the release's examples do
            (`prompt.instruct`).
    """

    max_images: int = 4
    system: str | None = None

    def replace(self, **settings: Any) -> GenerationConfig:
        """Returns a copy with other settings.

        Raises:
            UserError: a setting is unknown or its value is invalid.
        """
        known = {f.name for f in dataclasses.fields(self)}
        for name in settings:
            if name not in known:
                raise UserError(f"unknown generation setting {name!r}{suggest(name, known)}")
        changed = dataclasses.replace(self, **settings)
        changed.check()
        return changed

    def check(self) -> None:
        TextConfig.check(self)
        ImageConfig.check(self)
        if self.max_images < 0:
            raise UserError(f"max_images cannot be {self.max_images}")


def load(
    directory: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: jnp.dtype = jnp.float32,
    batch_size: int = 64,
) -> Emu:
    """The model of a run directory: config.json, tokenizer/ and the newest parameters; or of the
    release's own files (a folder, or Emu-instruct.pt), read as `emu-jax convert` reads them.
    On a CPU the language model is in memory twice for a moment (`Llama.unstacked_for_decoding`).

    Args:
        mesh: where it lives (`sharding.make_mesh`); one device without it.
        dtype: bfloat16 keeps and computes everything in it, as the release does.
        batch_size: rows that are computed at once.

    Raises:
        UserError: the directory is no checkpoint, a part of it cannot be read, or it has a safety
            checker, which torch is missing for.
    """
    directory = Path(directory)
    if mesh is None:
        mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    if not (directory / "config.json").is_file() and is_release(directory):
        model, tokenizer = load_release(directory, mesh)
        emu = Emu(model, tokenizer, mesh=mesh, dtype=dtype, batch_size=batch_size)
        emu.safety = find_checker(directory) if emu.paints else None
        return emu
    cfg = checkpoint.load_config(directory)
    check_heads(directory, cfg)
    tokenizer = checkpoint.load_tokenizer(directory)
    defaults = GenerationConfig()
    if (directory / "generation.json").is_file():
        defaults = load_json(GenerationConfig, directory / "generation.json")
        defaults.check()
    towers = set(map(checkpoint.tower_of, checkpoint.run_shapes(directory)))

    def build() -> models.Emu:
        return models.Emu(cfg, painter={"unet", "vae"} <= towers, rngs=nnx.Rngs(0))

    model = checkpoint.load_module(directory, build, mesh, dtype)
    assert isinstance(model, models.Emu)
    emu = Emu(model, tokenizer, defaults=defaults, mesh=mesh, dtype=dtype, batch_size=batch_size)
    emu.safety = find_checker(directory) if emu.paints else None
    return emu


class Emu:
    """A model with its tokenizer, ready to generate.

    Methods take their settings (fields of `GenerationConfig`) by name and fall back on
    `defaults`. Row i of many prompts samples from `fold_in(key(seed), i)`, split into a key of
    its text and one of its images: the result does not depend on what it is batched with.

    Attributes:
        cfg: the model's configuration.
        tokenizer: its tokenizer.
        defaults: settings that a call does not name.
        safety: looks at pictures after they are painted (`generate.safety`), if it is not None.
        shapes: the smallest sizes that programs are compiled for.
    """

    def __init__(
        self,
        model: models.Emu,
        tokenizer: Tokenizer,
        *,
        defaults: GenerationConfig | None = None,
        mesh: Mesh | None = None,
        dtype: jnp.dtype = jnp.float32,
        batch_size: int = 64,
    ):
        self.cfg, self.tokenizer, self.mesh = model.cfg, tokenizer, mesh
        self.defaults = defaults or GenerationConfig()
        self.dtype, self.batch_size = jnp.dtype(dtype), batch_size
        self.paints = model.unet is not None and model.vae is not None
        graphdef, params = nnx.split(model)
        # Variables of its own, be it over the same arrays: what is done to the caller's model
        # afterwards does not reach this one, nor the other way round.
        model = nnx.merge(graphdef, jax.tree.map(lambda a: a.astype(self.dtype), params))
        with self._on_mesh():
            model.llama = model.llama.unstacked_for_decoding()
        self._graphdef, self._params = nnx.split(model)
        self._unconditional: Float[Array, "N D"] | None = None
        self.safety: Checker | None = None
        self.shapes = Shapes()

    @property
    def model(self) -> models.Emu:
        """The module itself. On a CPU its language model's layers are a list, not one stack
        (`Llama.unstacked_for_decoding`)."""
        return nnx.merge(self._graphdef, self._params)

    # --- Text ---

    def generate_text(
        self, prompt: Parts, *, choices: Sequence[str] | None = None, **settings: Any
    ) -> str:
        """The text that follows a prompt.

        Args:
            choices: the only answers that may come out (the release's yes/no trie).
            settings: fields of `TextConfig`, and `system`.

        Raises:
            UserError: a part or a setting that makes no sense, or a prompt that leaves no room for
                `max_new_tokens` in the model's positions.
        """
        return self.generate_texts([prompt], choices=choices, **settings)[0]

    def generate_texts(
        self, prompts: Sequence[Parts], *, choices: Sequence[str] | None = None, **settings: Any
    ) -> list[str]:
        """The texts that follow many prompts; see `generate_text`."""
        ids = self.generate_ids(prompts, choices=choices, **settings)
        return [self.tokenizer.decode(row).strip() for row in ids]

    def generate_ids(
        self, prompts: Sequence[Parts], *, choices: Sequence[str] | None = None, **settings: Any
    ) -> np.ndarray:
        """Token ids [B, max_new_tokens + 1]: the dummy `<s>` of transformers 4.31 first, padded
        behind `</s>`; see `generate_text`."""
        cfg = self.defaults.replace(**settings)
        allowed = None
        if choices is not None:
            if not choices:
                raise UserError("choices must name at least one answer")
            ids = [(*self.tokenizer.encode(c, bos=False), self.cfg.tokens.eos) for c in choices]
            allowed = text.choices_table(tuple(ids))
        rows = self._prompts(prompts, cfg.max_new_tokens, system=cfg.system)
        plan, rules = Plan.of(cfg, self.cfg.tokens, self.shapes.new_tokens), Rules.of(cfg)
        result = np.full((len(rows), cfg.max_new_tokens + 1), self.cfg.tokens.pad, np.int32)
        for which, batch in self._batches(rows, "left", per_row=cfg.num_beams):
            with self._on_mesh():
                out = _decode(
                    self._graphdef,
                    self._params,
                    *self._device(batch),
                    plan,
                    rules,
                    _row_keys(_fill(which, len(batch.tokens)), cfg.seed)[0],
                    allowed,
                )
            result[which] = np.asarray(out)[: len(which), : result.shape[1]]
        return result

    # --- Ranking ---

    def rank(self, prompt: Parts, candidates: Sequence[str], *, segments: int = 1) -> list[int]:
        """Indices of the candidates, the likeliest continuation of the prompt first.

        Args:
            segments: as the release's `predict`: candidates of one segment share the length
                that their loss is divided by (`text.mean_losses`).
        """
        return self.ranks([prompt], [candidates], segments=segments)[0]

    def ranks(
        self, prompts: Sequence[Parts], candidates: Sequence[Sequence[str]], *, segments: int = 1
    ) -> list[list[int]]:
        """`rank` for many prompts, each with its own candidates."""
        prompts = _listed(prompts)
        if len(prompts) != len(candidates) or not all(candidates):
            raise UserError("each prompt needs its list of candidates")
        if not candidates:
            return []
        most = max(map(len, candidates))
        if not 1 <= segments <= min(map(len, candidates)):
            raise UserError(f"segments cannot be {segments}: at most one for each candidate")
        ids = [[self.tokenizer.encode(c, bos=False) for c in row] for row in candidates]
        lengths = [max(map(len, row)) for row in ids]
        rows = self._prompts(prompts, lengths, system=self.defaults.system)
        longest = bucket(max(lengths))
        ranked: list[list[int]] = [[] for _ in rows]
        for which, batch in self._batches(rows, "left", per_row=most):
            table = np.full((len(batch.tokens), bucket(most, 1), longest), -1, np.int32)
            for n, i in enumerate(which):
                for c, candidate in enumerate(ids[i]):
                    table[n, c, : len(candidate)] = candidate
            with self._on_mesh():
                sums = _losses(self._graphdef, self._params, *self._device(batch), table)
            for i, row in zip(which, np.asarray(sums), strict=False):
                lengths, prompt = [len(c) for c in ids[i]], len(rows[i].tokens)
                means = text.mean_losses(row[: len(lengths)], lengths, prompt, segments)
                ranked[i] = np.argsort(means, kind="stable").tolist()
        return ranked

    # --- Pictures ---

    def visual_features(
        self, pictures: Sequence[Image.Image | UInt8[np.ndarray, "h w 3"]]
    ) -> Float[np.ndarray, "B W"]:
        """The visual encoder's output of each picture, averaged over its patches and the class
        token: what like pictures are found by."""
        size = self.cfg.vision.image_size
        pixels = [pixels_of(picture, size) for picture in pictures]
        out = np.zeros((len(pixels), self.cfg.vision.width), np.float32)
        for which, rows in self._chunks(np.arange(len(pixels))):
            batch = np.stack([pixels[i] for i in _fill(which, rows)])
            with self._on_mesh():
                found = _features(self._graphdef, self._params, batch, self.dtype)
            out[which] = np.asarray(found)[: len(which)]
        return out

    def generate_image(
        self,
        prompt: Parts,
        *,
        negative: Parts | None = None,
        stop: Callable[[], bool] | None = None,
        **settings: Any,
    ) -> Image.Image:
        """A picture of a prompt: of words, of pictures blended, of both in context.

        Args:
            negative: what guidance leads away from; the empty prompt, as in the release.
            stop: asked every few calls of the denoiser whether to give up.
            settings: fields of `ImageConfig`, and `seed`.

        Raises:
            UserError: a part or a setting that makes no sense, or a model that cannot paint.
            image.Stopped: `stop` returned true.
        """
        seeds = [settings.pop("seed", self.defaults.seed)]
        pictures = self.generate_images(
            [prompt], negative=negative, seeds=seeds, stop=stop, **settings
        )
        return Image.fromarray(pictures[0])

    def generate_images(
        self,
        prompts: Sequence[Parts],
        *,
        negative: Parts | None = None,
        seeds: Sequence[int] | int | None = None,
        stop: Callable[[], bool] | None = None,
        **settings: Any,
    ) -> UInt8[np.ndarray, "B H W 3"]:
        """Pictures of many prompts; see `generate_image`.

        Args:
            seeds: one for each picture; or a number, from which each picture's own follows.
        """
        self._need_painter()
        cfg = self.defaults.replace(**settings)
        prompts = _listed(prompts)
        keys = self._painting_keys(seeds, len(prompts), cfg)
        return self._paint(self.regress(prompts), keys, cfg, negative, stop)

    def regress(self, prompts: Sequence[Parts]) -> Float[Array, "B N D"]:
        """The embeddings of the picture that follows each prompt (release: `generate_image`)."""
        rows = self._prompts(prompts, self.cfg.cformer.n_causal, opens=True)
        found: list[Any] = [None] * len(rows)
        for which, batch in self._batches(rows, "right"):
            with self._on_mesh():
                out = _regress(self._graphdef, self._params, *self._device(batch))
            for n, i in enumerate(which):
                found[i] = out[n]
        n, width = self.cfg.cformer.n_causal, self.cfg.llama.width
        return jnp.stack(found) if found else jnp.zeros((0, n, width), self.dtype)

    def paint(
        self,
        embeddings: Float[Array, "B N D"],
        *,
        negative: Parts | None = None,
        seeds: Sequence[int] | int | None = None,
        **settings: Any,
    ) -> UInt8[np.ndarray, "B H W 3"]:
        """Pictures of embeddings; see `generate_images`."""
        cfg = self.defaults.replace(**settings)
        keys = self._painting_keys(seeds, len(embeddings), cfg)
        return self._paint(embeddings, keys, cfg, negative)

    def _painting_keys(
        self, seeds: Sequence[int] | int | None, count: int, cfg: GenerationConfig
    ) -> Key[Array, "B"]:
        seeds = cfg.seed if seeds is None else seeds
        if isinstance(seeds, int | float | str | np.number):
            check_seed(seeds)
            rows, seeds = np.arange(count), int(seeds)
            return _image_keys(_row_keys(rows, seeds)[1], 0)
        if len(seeds) != count:
            raise UserError(f"{len(seeds)} seeds for {count} pictures: give one for each")
        for seed in seeds:
            check_seed(seed)
        # Each image is the one that its seed gives alone.
        return _image_keys(_row_keys(np.zeros(count, int), seeds)[1], 0)

    def _paint(
        self,
        embeddings,
        keys,
        cfg: GenerationConfig,
        negative: Parts | None = None,
        stop: Callable[[], bool] | None = None,
    ):
        self._need_painter()
        assert self.cfg.unet and self.cfg.vae
        uncond, guidance = None, 1.0
        if cfg.guidance > 1:
            uncond, guidance = self._uncond(negative), jnp.float32(cfg.guidance)
        table, count = diffusion.padded_steps(self.cfg.scheduler, cfg.steps, cfg.method)
        out = np.zeros((len(embeddings), self.picture_size, self.picture_size, 3), np.uint8)
        for which, rows in self._chunks(np.arange(len(embeddings))):
            full = _fill(which, rows)
            with self._on_mesh():
                cond = embeddings[full]
                state = _start_painting(self._graphdef, self._params, keys[full], cond.dtype)
                for first in range(0, count, count if stop is None else STOP_ROWS):
                    if stop is not None and stop():
                        raise image.Stopped
                    last = count if stop is None else min(first + STOP_ROWS, count)
                    state = _paint_steps(
                        self._graphdef,
                        self._params,
                        state,
                        cond,
                        uncond,
                        guidance,
                        table,
                        np.int32(first),
                        np.int32(last),
                    )
                    if stop is not None:
                        jax.block_until_ready(state)
                painted = _finish_painting(self._graphdef, self._params, state, cond.dtype)
            out[which] = np.asarray(painted)[: len(which)]
        return out if self.safety is None or not len(out) else self.safety(out)

    def _uncond(self, negative: Parts | None) -> Float[Array, "N D"]:
        if negative is not None:
            return self.regress([negative])[0]
        if self._unconditional is None:
            # What the model itself would draw after nothing: <s>[IMG], not zeros.
            self._unconditional = self.regress([""])[0]
        return self._unconditional

    @property
    def picture_size(self) -> int:
        """Pixels along a side of what it paints."""
        self._need_painter()
        assert self.cfg.unet and self.cfg.vae
        return self.cfg.unet.sample_size * self.cfg.vae.downscale

    def _need_painter(self) -> None:
        if not self.paints:
            raise UserError(
                "this checkpoint has no visual decoder (unet, vae): it writes text, but to paint "
                "take the pretrained model with its decoder"
            )

    # --- Both ---

    def stream(self, prompt: Parts, **settings: Any) -> Iterator[str | Image.Image]:
        """Streams the output of `complete`: text a few tokens at a time, images whole.

        The texts between two images, joined, are those of `complete`, up to white space at
        their ends.
        """
        cfg = self.defaults.replace(**settings)
        rows = self._prompts([prompt], cfg.max_new_tokens, system=cfg.system)
        plan, rules, room = self._mixed(cfg, rows)
        ((which, batch),) = self._batches(rows, "left")
        rules = rules._replace(max_images=room[_fill(which, len(batch.tokens))])
        text_keys, image_keys = _row_keys(np.zeros(len(batch.tokens), int), cfg.seed)
        with self._on_mesh():
            state = _open_mixed(
                self._graphdef, self._params, *self._device(batch), plan, rules, text_keys
            )
        shown = _Shown(self.tokenizer, self.cfg.tokens, opened=rows[0].tokens[-1])
        while True:
            # Read before the state is given away.
            tokens, drawn, done = (
                np.asarray(a) for a in (state.tokens[0], state.count[0], state.done[0])
            )
            done = done or state.step >= plan.steps(self.cfg.cformer.n_causal)
            for part in shown.more(
                tokens[: int(state.step)], pictures=int(drawn), ended=bool(done)
            ):
                if isinstance(part, str):
                    yield part
                    continue
                keys = _image_keys(image_keys[:1], part)
                yield Image.fromarray(self._paint(state.images[:1, part], keys, cfg)[0])
            if done:
                return
            with self._on_mesh():
                state = _go_on_mixed(self._graphdef, self._params, state, plan, rules, text_keys)

    def complete(self, prompt: Parts, **settings: Any) -> list[str | Image.Image]:
        """Continues a prompt with text and images, as the model decides.

        Args:
            settings: fields of `GenerationConfig`; text is decoded greedily unless `do_sample`.
        """
        parts = self.completions([prompt], **settings)[0]
        return [p if isinstance(p, str) else Image.fromarray(p) for p in parts]

    def completions(
        self, prompts: Sequence[Parts], **settings: Any
    ) -> list[list[str | UInt8[np.ndarray, "H W 3"]]]:
        """Continues each of many prompts, with images as arrays. See `complete`.

        A continuation ends at `</s>`, after `max_new_tokens` of text, or where it would start
        more than `max_images` images or an image that no longer fits after its prompt.
        """
        cfg = self.defaults.replace(**settings)
        rows = self._prompts(prompts, cfg.max_new_tokens, system=cfg.system)
        plan, rules, room = self._mixed(cfg, rows)
        results: list[list[Any]] = [[] for _ in rows]
        drawn, keys = [], []  # embeddings and keys of all pictures
        for which, batch in self._batches(rows, "left"):
            full = _fill(which, len(batch.tokens))
            rules = rules._replace(max_images=room[full])
            text_keys, image_keys = _row_keys(full, cfg.seed)
            with self._on_mesh():
                tokens, images = _complete(
                    self._graphdef, self._params, *self._device(batch), plan, rules, text_keys
                )
            for n, i in enumerate(which):
                results[i] = self._split(np.asarray(tokens[n]), rows[i].tokens[-1])
                for k in range(sum(p is None for p in results[i])):
                    drawn.append(images[n, k])
                    keys.append(_image_keys(image_keys[n : n + 1], k)[0])
        if drawn:
            # Parts are filled in the order of the batches, which is that of `drawn`.
            painted = iter(self._paint(jnp.stack(drawn), jnp.stack(keys), cfg))
            for which, _ in self._chunks(_by_length(rows)):
                for i in which:
                    results[i] = [next(painted) if p is None else p for p in results[i]]
        return results

    def _mixed(
        self, cfg: GenerationConfig, rows: Sequence[Prompt]
    ) -> tuple[mixed.MixedPlan, mixed.MixedRules, Int[np.ndarray, "B"]]:
        """The plan, its rules, and the number of images that each row has room for."""
        for name in ("repetition_penalty", "no_repeat_ngram_size"):
            if getattr(cfg, name) != getattr(TextConfig, name):
                raise UserError(f"{name} has no effect on mixed sequences: leave it out")
        most, opening = cfg.max_images if self.paints else 0, self.cfg.tokens.img
        positions, size = self.cfg.llama.max_positions, self.cfg.cformer.n_causal + 1
        free = [positions - len(row.tokens) - cfg.max_new_tokens for row in rows]
        room = np.minimum(np.array(free, np.int32) // size, most).astype(np.int32)
        for number, row in enumerate(rows):
            if row.tokens[-1] == opening and not room[number]:
                self._need_painter()
                fix = "shorten it" if most else "raise max_images"
                raise UserError(
                    f"{_of(number, rows)} ends in [IMG], which opens an image, but there is no "
                    f"room for one (max_images {most}, {positions} positions in all): {fix}"
                )
        if short := int(np.sum(room < most)):
            log.warning(
                "%d of %d prompts leave room for fewer than %d images (%d at least): the model "
                "has %d positions for prompt, text and images together",
                short,
                len(rows),
                most,
                room.min(),
                positions,
            )
        plan = mixed.MixedPlan(
            bucket(cfg.max_new_tokens, self.shapes.new_tokens), most, cfg.do_sample, self.paints
        )
        rules = mixed.MixedRules(
            jnp.int32(cfg.max_new_tokens),
            jnp.float32(cfg.temperature),
            jnp.int32(cfg.top_k),
            jnp.float32(cfg.top_p),
        )
        return plan, rules, room

    def _split(self, tokens: np.ndarray, last: int) -> list[str | None]:
        """Generated tokens as texts, with None where a picture stands."""
        ids, parts, words = self.cfg.tokens, [], []
        pictures: list[int] = [ids.img] if last == ids.img else []
        for token in [*pictures, *tokens.tolist()]:
            if token == ids.img:
                parts += [self.tokenizer.decode(words).strip(), None]
                words = []
            elif token not in (ids.image, ids.img_end, ids.pad, ids.eos):
                words.append(token)
        parts.append(self.tokenizer.decode(words).strip())
        return [p for p in parts if p != ""]

    # --- Batches ---

    def _prompts(
        self,
        prompts: Sequence[Parts],
        new: int | Sequence[int],
        *,
        system: str | None = None,
        opens: bool = False,
    ) -> list[Prompt]:
        """Tokenizes prompts that `new` more tokens follow, a number for all or one for each.

        Raises:
            UserError: a prompt makes no sense, or it and what follows do not fit together into
                the model's positions.
        """
        prompts = _listed(prompts)
        positions, rows = self.cfg.llama.max_positions, []
        for number, parts in enumerate(prompts):
            try:
                row = self._prompt(parts, system=system, opens=opens)
            except UserError as error:
                if len(prompts) == 1:
                    raise
                raise UserError(f"prompt {number + 1} of {len(prompts)}: {error}") from None
            more = new if isinstance(new, int | np.integer) else new[number]
            if (length := len(row.tokens)) + more > positions:
                fewer = f", or ask for at most {positions - length}" if positions > length else ""
                raise UserError(
                    f"{_of(number, prompts)} has {length} tokens and {more} are to follow, but the "
                    f"model has {positions} positions: shorten it{'' if opens else fewer}"
                )
            rows.append(row)
        return rows

    def _prompt(self, parts: Parts, *, system: str | None = None, opens: bool = False) -> Prompt:
        parts = as_parts(parts)
        spelled = any(isinstance(p, str) and USER in p for p in parts)
        if self.tokenizer.user is not None and not spelled and not opens:
            parts = instruct(parts, system)
        elif system:
            raise UserError("a system message needs an instruction-tuned model and a plain prompt")
        return Prompt.of(parts, self.tokenizer, self.cfg, opens=opens)

    def _chunks(self, which: np.ndarray, per_row: int = 1) -> Iterator[tuple[np.ndarray, int]]:
        """(indices, rows to compute): the same rows for all chunks, the last one included."""
        size = max(1, self.batch_size // per_row)
        rows = size if len(which) > size else min(size, bucket(len(which), 1))
        for start in range(0, len(which), size):
            yield which[start : start + size], rows

    def _batches(
        self, prompts: Sequence[Prompt], side: Literal["left", "right"], *, per_row: int = 1
    ) -> Iterator[tuple[np.ndarray, Batch]]:
        """Prompts of similar lengths together: (which prompts, the padded batch)."""
        for which, rows in self._chunks(_by_length(prompts), per_row):
            part = [prompts[i] for i in which]
            length = bucket(max(len(p.tokens) for p in part), self.shapes.length)
            pictures = bucket(max(len(p.pictures) for p in part), self.shapes.images)
            yield (
                which,
                pad(
                    part,
                    side,
                    rows=rows,
                    length=length,
                    pictures=pictures,
                    fill=self.cfg.tokens.pad,
                ),
            )

    def _device(self, batch: Batch) -> tuple[Any, ...]:
        """A batch as the programs take it: (images [B, I, N, D], tokens, slots, valid)."""
        n, width = self.cfg.cformer.n_causal, self.cfg.llama.width
        found = []
        for which, rows in self._chunks(np.arange(len(batch.pictures))):
            full = _fill(which, rows)
            with self._on_mesh():
                found.append(
                    _encode(self._graphdef, self._params, batch.pictures[full], self.dtype)
                )
        flat = jnp.concatenate(found) if found else jnp.zeros((1, n, width), self.dtype)
        images = jnp.take(flat, batch.which, axis=0)
        return images, batch.tokens, batch.slots, batch.valid

    def _on_mesh(self):
        return jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()


def _listed(prompts: Any) -> list[Parts]:
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        kind = "one text" if isinstance(prompts, str) else type(prompts).__name__
        raise UserError(f"prompts must be a list of prompts, not {kind}: put it into a list")
    return list(prompts)


def _of(number: int, rows: Sequence[Any]) -> str:
    return "the prompt" if len(rows) == 1 else f"prompt {number + 1} of {len(rows)}"


def _row_keys(rows: ArrayLike, seeds: ArrayLike) -> tuple[Key[Array, "B"], Key[Array, "B"]]:
    """Returns the keys of each row's text and of its images.

    A row's keys follow from its number and its seed alone, whatever it is batched with. Text
    folds in the step, images fold in their number (`_image_keys`).

    Args:
        rows: the number of each row, [B].
        seeds: one for all rows, or one for each.
    """

    def keys(row: Array, seed: Array) -> tuple[Array, Array]:
        text_key, image_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), row))
        return text_key, image_key

    rows, seeds = np.broadcast_arrays(rows, np.asarray(seeds, np.uint32))
    return jax.vmap(keys)(rows, seeds)


def _image_keys(image_keys: Key[Array, "B"], number: int) -> Key[Array, "B"]:
    """Returns the keys of the initial latents of each row's image `number`."""
    return jax.vmap(jax.random.fold_in, (0, None))(image_keys, number)


def _fill(which: np.ndarray, rows: int) -> np.ndarray:
    """Indices for a batch of `rows`: the last one again where there are fewer."""
    return which[np.minimum(np.arange(rows), len(which) - 1)]


def _by_length(prompts: Sequence[Prompt]) -> np.ndarray:
    return np.argsort([len(p.tokens) for p in prompts], kind="stable")


# --- Programs: compiled once per bucket of shapes; the module's structure is part of the key ------


@functools.partial(jax.jit, static_argnames=("graphdef", "dtype"))
def _encode(graphdef, params, pictures, dtype):
    TRACES["encode"] += 1
    floating = jnp.issubdtype(pictures.dtype, jnp.floating)
    pixels = pictures.astype(dtype) if floating else normalize_images(pictures, dtype)
    return nnx.merge(graphdef, params).encode_images(pixels)


@functools.partial(jax.jit, static_argnames=("graphdef", "dtype"))
def _features(graphdef, params, pictures, dtype):
    TRACES["features"] += 1
    features = nnx.merge(graphdef, params).visual(normalize_images(pictures, dtype))
    return jnp.mean(features.astype(jnp.float32), axis=1)


@functools.partial(jax.jit, static_argnames=("graphdef", "plan"))
def _decode(graphdef, params, images, tokens, slots, valid, plan, rules, keys, allowed):
    TRACES["decode"] += 1
    emu = nnx.merge(graphdef, params)
    x = emu.embed(tokens, images, slots)
    return text.decode(emu.llama, x, valid, plan, rules, keys, allowed)


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _losses(graphdef, params, images, tokens, slots, valid, candidates):
    TRACES["losses"] += 1
    emu = nnx.merge(graphdef, params)
    x = emu.embed(tokens, images, slots)
    return text.candidate_losses(emu.llama, x, valid, candidates)


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _regress(graphdef, params, images, tokens, slots, valid):
    TRACES["regress"] += 1
    emu = nnx.merge(graphdef, params)
    return emu.regress_after(tokens, jnp.sum(valid, axis=1), images, slots)


@functools.partial(jax.jit, static_argnames=("graphdef", "dtype"))
def _start_painting(graphdef, params, keys, dtype):
    return image.start_painting(keys, nnx.merge(graphdef, params).cfg, dtype)


@functools.partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("state",))
def _paint_steps(graphdef, params, state, cond, uncond, guidance, table, first, last):
    TRACES["paint"] += 1
    emu = nnx.merge(graphdef, params)
    guidance = guidance if uncond is not None else 1.0
    return image.paint_steps(emu, state, cond, uncond, guidance, table, first, last)


@functools.partial(jax.jit, static_argnames=("graphdef", "dtype"))
def _finish_painting(graphdef, params, state, dtype):
    return image.finish_painting(nnx.merge(graphdef, params), state, dtype)


STRIDE = 4  # elements between two looks at a streamed continuation


class _Shown:
    """The part of a continuation that has been shown."""

    def __init__(self, tokenizer: Tokenizer, ids: TokenIds, opened: int):
        self._tokenizer, self._ids = tokenizer, ids
        self._words: list[int] = []  # of the text that is being written
        self._text = ""  # what was shown of it
        self._read = 0
        self._waiting = [0] if opened == ids.img else []  # pictures that were opened
        self._opened = len(self._waiting)

    def more(self, tokens: np.ndarray, *, pictures: int, ended: bool) -> Iterator[str | int]:
        """Texts and numbers of pictures that are new in `tokens`; `pictures` are complete."""
        ids = self._ids
        for token in tokens[self._read :].tolist():
            self._read += 1
            if token == ids.img:
                yield from self._say(whole=True)
                self._words, self._text = [], ""
                self._waiting.append(self._opened)
                self._opened += 1
            elif token not in (ids.image, ids.img_end, ids.pad, ids.eos):
                # A picture stands before the words that follow it.
                yield from self._waiting
                self._waiting = []
                self._words.append(token)
        ready = [n for n in self._waiting if n < pictures or ended]
        self._waiting = [n for n in self._waiting if n not in ready]
        yield from ready
        yield from self._say(whole=ended)

    def _say(self, whole: bool) -> Iterator[str]:
        """New words; not yet the bytes of an unfinished character."""
        text = self._tokenizer.decode(self._words)
        if not whole:
            text = text.rstrip("\ufffd")
        if len(text) > len(self._text):
            yield text[len(self._text) :]
            self._text = text


@functools.partial(jax.jit, static_argnames=("graphdef", "plan"))
def _open_mixed(graphdef, params, images, tokens, slots, valid, plan, rules, keys):
    TRACES["open"] += 1
    emu = nnx.merge(graphdef, params)
    x = emu.embed(tokens, images, slots)
    return mixed.start(emu, x, valid, tokens[:, -1] == emu.cfg.tokens.img, plan, rules, keys)


@functools.partial(jax.jit, static_argnames=("graphdef", "plan"), donate_argnames=("state",))
def _go_on_mixed(graphdef, params, state, plan, rules, keys):
    TRACES["go_on"] += 1
    emu = nnx.merge(graphdef, params)
    return mixed.go_on(emu, state, state.step + STRIDE, plan, rules, keys)


@functools.partial(jax.jit, static_argnames=("graphdef", "plan"))
def _complete(graphdef, params, images, tokens, slots, valid, plan, rules, keys):
    TRACES["complete"] += 1
    emu = nnx.merge(graphdef, params)
    x = emu.embed(tokens, images, slots)
    opened = tokens[:, -1] == emu.cfg.tokens.img
    return mixed.complete(emu, x, valid, opened, plan, rules, keys)
