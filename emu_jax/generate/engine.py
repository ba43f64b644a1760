"""Continuous batching: requests of unequal length join and leave a running batch.

Waiting prompts are prefilled together, those of one padded length in batches of a few sizes.

A slot holds the decoding state of one request: a batch of one row (`mixed.MixedState`). The states
of all slots are arrays with a leading slot axis. Their shapes never change, so one program decodes
any mix of requests: `mixed.decode_step`, vectorized over the slots. Images are denoised the same
way, in slots of their own.

A row of a batch is computed by itself, with its own settings and keys. A request's answer therefore
does not depend on the requests beside it, up to the rounding of batches of other sizes.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt8, UInt32
from PIL import Image

from emu_jax import diffusion
from emu_jax.generate import mixed, text
from emu_jax.generate.api import (
    ELEMENTS_PER_STREAM_CHECK,
    STEPS_PER_STOP_CHECK,
    Emu,
    Variables,
    _encode,
    _finish_painting,
    _HashedGraphDef,
    _image_keys,
    _row_keys,
    _seeded_keys,
    _start_painting,
    _StreamProgress,
)
from emu_jax.generate.image import paint_steps
from emu_jax.generate.prompt import Parts, Prompt, PromptBatch, as_parts, pad
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
from emu_jax.sharding import to_host

log = logging.getLogger(__name__)

T = TypeVar("T")
PROMPT_TOKENS = 4096  # default of `Engine`
PREFILL_ROWS = (1, 4, 8)  # sizes of a batch of prompts, or of their images; fewer than the slots
PREFILL_TOKENS = 2048  # of a batch of prompts, padding included; a longer prompt is prefilled alone
PREVIEWS = 5  # of an image, at most: each is decoded to pixels, which takes as long as a step
# Kinds of requests: `stream`, `generate_image`, `search`.
TEXT_REQUEST, IMAGE_REQUEST, SEARCH_REQUEST = "text", "image", "search"
LOST = "the state of the batch was lost when a prompt could not be prefilled into it"


@dataclasses.dataclass(frozen=True)
class Preview:
    """An image that is still being denoised.

    Attributes:
        step: steps of the sampler so far, of `steps` in all.
    """

    image: Image.Image
    step: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Usage:
    """The end of an answer.

    Attributes:
        ended: whether the model ended it, rather than a limit.
    """

    prompt_tokens: int
    completion_tokens: int
    ended: bool


# None: nothing new; call `Engine.step` before asking again.
EnginePart: TypeAlias = str | Image.Image | Preview | Usage | None


class Engine:
    """Answers many requests at once.

    `stream` and `generate_image` return iterators that yield None while they wait. `step` then
    prefills the prompts of those that began, decodes a few tokens of each, and denoises a few steps
    of each image. Nothing here may be called from two threads at a time, except `stream`, which
    prepares a prompt beside them.

    Args:
        emu: the model. Its `shapes` and `batch_size` bound the programs that are compiled.
        slots: requests that are decoded at once.
        image_slots: images that are denoised at once.
        new_tokens: room of a slot for text tokens.
        max_images: room of a slot for images.
        prompt_tokens: room of a slot for a prompt. It bounds the KV cache of a model with a long
            context. A longer prompt is answered alone.
    """

    def __init__(
        self,
        emu: Emu,
        *,
        slots: int = 8,
        image_slots: int = 4,
        new_tokens: int = 256,
        max_images: int = 4,
        prompt_tokens: int = PROMPT_TOKENS,
    ) -> None:
        if slots < 1 or image_slots < 1:
            raise ValueError(f"{slots} slots, {image_slots} image slots: at least 1 of each")
        self.emu, self.cfg, self.tokenizer = emu, emu.cfg, emu.tokenizer
        self.defaults, self.paints = emu.defaults, emu.paints
        self.slots, self.image_slots = slots, image_slots
        static = mixed.StaticMixedSettings(
            bucket(new_tokens), max_images if emu.paints else 0, True, emu.paints
        )
        self._text = _TextSlots(emu, slots, static, prompt_tokens)
        self._images = _ImageSlots(emu, image_slots)
        self._searching = False  # whether a beam search runs

    def step(self) -> None:
        """Prefills waiting prompts, decodes a few elements of every slot, and denoises images.

        A prompt that cannot be prefilled ends its own iterator, and images that cannot be denoised
        end theirs. After an error here, none of the requests in progress can continue: close
        their iterators.
        """
        try:
            with self.emu._on_mesh():
                prefilled = self._text.prefill_waiting()
                # One step after a prefill: other prompts may be waiting, and many answers are only
                # a token or two.
                self._text.decode(1 if prefilled else ELEMENTS_PER_STREAM_CHECK)
                try:
                    self._images.denoise()
                except Exception as error:
                    log.exception("a batch of images failed")
                    self._images.fail(error)
        except BaseException:
            self._text.clear()
            self._images.clear()
            raise

    def warm_up(self) -> list[Callable[[], None]]:
        """Returns functions that compile the programs of requests with default settings. Call them
        in order, before the first request.

        Beam search, prompts too long for a slot, and images without guidance or of another size
        still compile when they are first asked for.
        """
        side = self.cfg.vision.image_size
        image = Image.new("RGB", (side, side))
        answers = [
            self.stream(prompt, max_new_tokens=2, max_images=0) for prompt in ([""], [image, ""])
        ]
        if self.paints:
            painted = [[""], [image]] if self.cfg.autoencodes else [[""]]
            answers += [self.generate_image([prompt], num_inference_steps=1) for prompt in painted]
        shapes, sizes = self._text.prompt_shapes(), self._text.sizes()
        return [
            *(functools.partial(self._finish, answer) for answer in answers),
            *(functools.partial(self._text.compile_images, size) for size in sizes),
            *(functools.partial(self._text.compile, *shape) for shape in shapes),
        ]

    def _finish(self, answer: Generator[EnginePart, None, None]) -> None:
        with contextlib.closing(answer):  # a step that fails must not keep its slot
            for part in answer:
                if part is None:
                    self.step()

    @property
    def cache_bytes(self) -> int:
        """Size of the KV cache of all slots."""
        return self.slots * self._text.cache_bytes

    @property
    def concurrent(self) -> int:
        """Number of requests to have in progress: as many of each kind as its limit."""
        return sum(self.kinds.values())

    @property
    def kinds(self) -> dict[str, int]:
        """Limits on the requests of a kind in progress, so that others find room beside them.

        The prompt of one more image is prefilled while others are denoised. More texts than slots
        may run, so that a prompt is ready for the next free slot.
        """
        texts = self.slots + self.image_slots
        return {TEXT_REQUEST: texts, IMAGE_REQUEST: self.image_slots + 1, SEARCH_REQUEST: 1}

    @property
    def active(self) -> tuple[int, int]:
        """Requests that have a slot, and images that are being denoised or wait for it."""
        return int(self._text.taken.sum()), len(self._images.jobs)

    def stream(
        self,
        prompt: Parts,
        *,
        previews: bool = False,
        stops: Sequence[str] = (),
        **settings: Unpack[MixedSettings],
    ) -> Generator[EnginePart, None, None]:
        """Prepares a prompt. Returns an iterator over the parts of `Emu.stream`, None while it
        waits, and `Usage` at the end.

        Any thread may call this while another one uses the engine, which need not wait until the
        prompt is prepared. The iterator belongs to the thread of the engine.

        Args:
            previews: whether to yield a `Preview` every few steps of an image too. There are none
                if the model has a safety checker, which judges only complete images.
            stops: texts that end the answer. White space at its beginning ends none. The last
                text that is yielded holds the end of the first of them, and maybe more.

        Raises:
            UserError: the prompt or a setting is invalid.
        """
        emu, cfg = self.emu, self.defaults.replace(**settings)
        rows = emu._prompts([prompt], cfg.max_new_tokens, cfg)
        static, room = emu._static_mixed(cfg, rows)
        largest, length = self._text.static, len(rows[0].tokens)
        more = cfg.max_new_tokens + int(room[0]) * (self.cfg.n_embeddings + 1)
        if (
            static.text_length > largest.text_length
            or static.max_images > largest.max_images
            or not self._text.fits(length, more)
        ):
            return self._stream_alone(prompt, length, cfg, settings, stops)
        return self._stream_in_slot(rows[0], int(room[0]), cfg, stops, previews=previews)

    def _stream_in_slot(
        self,
        prompt: Prompt,
        max_images: int,
        cfg: GenerationConfig,
        stops: Sequence[str],
        *,
        previews: bool,
    ) -> Generator[EnginePart, None, None]:
        """Answers a request that has room in a slot (`stream`)."""
        text, ids, length = "", self.cfg.tokens, len(prompt.tokens)
        progress = _StreamProgress(self.tokenizer, ids, last=int(prompt.tokens[-1]))
        slot = yield from self._slot()
        try:
            yield from self._text.join(slot, prompt, cfg, cfg.seed, max_images)
            while True:
                tokens, images, done = self._text.output(slot)
                ended = done or len(tokens) >= self._text.elements
                embeddings = self._text.embeddings(slot) if images else None
                for part in progress.advance(tokens, images=images, ended=ended):
                    if isinstance(part, str):
                        text += part
                        yield part
                        continue
                    assert embeddings is not None
                    _, paint_key = _row_keys(np.zeros(1, int), cfg.seed)
                    key = _image_keys(paint_key, part)
                    yield from self._paint(embeddings[:, part], key, cfg, previews=previews)
                stopped = has_stop(text, stops)
                if ended or stopped:
                    unwritten = (ids.pad, ids.image, ids.img_end)
                    written = [token for token in tokens.tolist() if token not in unwritten]
                    yield Usage(length, len(written), stopped or ids.eos in written)
                    return
                while self._text.length(slot) == len(tokens):
                    yield None
        finally:
            self._text.release(slot)

    def _stream_alone(
        self,
        prompt: Parts,
        length: int,
        cfg: GenerationConfig,
        settings: MixedSettings,
        stops: Sequence[str],
    ) -> Generator[EnginePart, None, None]:
        """Answers a request that has no room in a slot. `length` is that of its prompt.

        Its generated tokens are counted in its text.
        """
        text = ""
        for part in self.emu.stream(prompt, **settings):
            if isinstance(part, str):
                text += part
            yield part
            if has_stop(text, stops):
                break
            yield None  # lets the others have a step
        written = len(self.tokenizer.encode_plain(text))
        yield Usage(length, written, written < cfg.max_new_tokens)

    def search(self, prompt: Parts, **settings: Unpack[TextSettings]) -> Iterator[EnginePart]:
        """Yields the text that `Emu.generate_text` finds by beam search, then `Usage`.

        It computes a few tokens at a time, outside the batch, and yields None before each. One
        search runs at a time; others wait.

        Raises:
            UserError: the prompt or a setting is invalid.
            ValueError: `num_beams` is 1, which `stream` serves.
        """
        emu, cfg = self.emu, self.defaults.replace(**settings)
        if cfg.num_beams < 2:
            raise ValueError("a search needs at least 2 beams: use stream")
        rows = emu._prompts([prompt], cfg.max_new_tokens, cfg)
        shapes, ids = emu._batcher.shapes, self.cfg.tokens
        static = StaticSettings.of(cfg, ids, shapes.new_tokens)
        dynamic = DynamicSettings.of(cfg)
        key, _ = _row_keys(np.zeros(1, int), cfg.seed)
        while self._searching:
            yield None
        self._searching = True
        try:
            ((_, batch),) = emu._batcher.batches(rows, "left", per_row=cfg.num_beams)
            with emu._on_mesh():
                state = _start_search(
                    emu._graphdef, emu._params, *emu._inputs(batch), static, dynamic, key
                )
            while not (to_host(state.beams.done).all() or state.beams.length > cfg.max_new_tokens):
                yield None
                with emu._on_mesh():
                    state = _continue_search(
                        emu._graphdef, emu._params, state, static, dynamic, key
                    )
            tokens = to_host(_best_beam(state.beams, static, dynamic))[0, 1:]
        finally:
            self._searching = False
        yield emu._text(tokens.tolist(), not cfg.grounding)
        written = int(np.sum(tokens != ids.pad))
        yield Usage(len(rows[0].tokens), written, bool(np.any(tokens == ids.eos)))

    def _slot(self) -> Generator[None, None, int]:
        """Takes a free slot, and waits until there is one."""
        while (slot := self._text.take()) is None:
            yield None
        return slot

    def generate_image(
        self,
        prompts: Sequence[Parts],
        *,
        seed: int | None = None,
        negative_prompt: Parts | None = None,
        previews: bool = False,
        **settings: Unpack[ImageSettings],
    ) -> Generator[EnginePart, None, None]:
        """Yields the image of `Emu.generate_image` for one prompt, and None while it waits.

        Raises:
            UserError: the prompt or a setting is invalid, or the model cannot generate images.
        """
        (prompt,) = prompts
        emu, cfg = self.emu, self.defaults.replace(**settings)
        emu._need_painter()
        seed = cfg.seed if seed is None else seed
        check_seed(seed)
        _, paint_key = _row_keys(np.zeros(1, int), seed)
        autoencoded = emu._autoencodes(as_parts(prompt))
        if autoencoded:
            embeddings, _ = emu._conditions([prompt])
        else:
            embeddings = yield from self._regress(prompt)
        yield from self._paint(
            embeddings,
            _image_keys(paint_key, 0),
            cfg,
            previews=previews,
            negative_prompt=negative_prompt,
            autoencoded=autoencoded,
        )

    def _regress(self, prompt: Parts) -> Generator[None, None, Float[Array, "1 N E"]]:
        """Regresses the embeddings of the image that follows a prompt, and returns them [1, N, E].

        It is a continuation without text that starts with the image.
        """
        emu = self.emu
        rows = emu._prompts([prompt], self.cfg.n_embeddings)
        fits = self._text.fits(len(rows[0].tokens), self.cfg.n_embeddings)
        if not fits or not self._text.static.max_images:
            return emu._regress_all([prompt])
        slot = yield from self._slot()
        try:
            # The seed is unused: nothing is sampled. The prompt is prefilled alone, since rounding
            # in a batch of another size can change a pixel by a level.
            yield from self._text.join(slot, rows[0], TextConfig(), 0, 1, text=0, alone=True)
            while not self._text.output(slot)[1]:
                yield None
            return self._text.embeddings(slot)[:, 0]
        finally:
            self._text.release(slot)

    def _paint(
        self,
        embeddings: Float[Array, "1 N E"],
        key: Key[Array, "1"],
        cfg: GenerationConfig,
        *,
        previews: bool,
        negative_prompt: Parts | None = None,
        autoencoded: bool = False,
    ) -> Iterator[EnginePart]:
        emu = self.emu
        shape, sizes, uncond, guidance, table, count = emu._painting(
            cfg, negative_prompt, np.array([autoencoded])
        )
        if uncond is not None and uncond.ndim == 2:
            uncond = uncond[None]
        with emu._on_mesh():
            start = _start_painting(emu._graphdef, emu._params, key, embeddings.dtype, shape)
        inputs = _ImageInputs(start, embeddings, uncond, sizes)
        job = _ImageJob(inputs, guidance, table, count, previews and emu.safety is None)
        self._images.jobs.append(job)
        try:
            while job.pixels is None:
                preview, job.preview = job.preview, None
                yield preview
                if job.error is not None:
                    raise job.error
            pixels = job.pixels if emu.safety is None else emu.safety(job.pixels)
            yield Image.fromarray(pixels[0])
        finally:
            self._images.remove(job)


@dataclasses.dataclass(eq=False)
class _WaitingPrompt:
    """A prompt that waits to be prefilled into its slot.

    Attributes:
        length: its tokens with padding.
        alone: whether no other prompt may be prefilled in its batch.
        error: why it could not be prefilled.
    """

    slot: int
    prompt: Prompt
    length: int
    alone: bool
    prefilled: bool = False
    error: Exception | None = None


class _TextSlots:
    """Requests that are decoded at once, each in a slot of one batch."""

    def __init__(
        self, emu: Emu, slots: int, static: mixed.StaticMixedSettings, prompt_tokens: int
    ) -> None:
        self._emu, self.static, self._shapes = emu, static, emu._batcher.shapes
        self._graphdef, self._params = _without_painter(emu)
        self.elements = static.steps(emu.cfg.n_embeddings)
        context = bucket(emu.cfg.llama.context_length)
        self._cache_capacity = min(context, bucket(prompt_tokens) + self.elements)
        self.taken = np.zeros(slots, bool)
        self.active = np.zeros(slots, bool)  # taken, and not done
        self._sampled = np.zeros(slots, bool)
        self._settings = (  # the fields of `mixed.DynamicMixedSettings`
            np.zeros(slots, np.int32),
            np.ones(slots, np.float32),
            np.zeros(slots, np.int32),
            np.ones(slots, np.float32),
            np.zeros((slots, 1), np.int32),
            self._sampled,
        )
        self._seeds = np.zeros(slots, np.uint32)
        self._waiting: list[_WaitingPrompt] = []  # oldest first
        self._state: mixed.MixedState | None = None
        self._fetched: dict[str, np.ndarray] = {}
        self._zeros: dict[tuple[int, ...], Array] = {}  # by shape

    @property
    def cache_bytes(self) -> int:
        """Size of a slot's KV cache."""
        llama, dtype = self._emu.model.llama, self._emu.dtype
        cache = jax.eval_shape(lambda: llama.empty_cache(1, self._cache_capacity, dtype))
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((cache.k, cache.v)))

    def fits(self, length: int, more: int) -> bool:
        """Returns whether a slot has room for a prompt and `more` elements behind it."""
        return max(self._padded(length), length + more) <= self._cache_capacity

    def _padded(self, length: int) -> int:
        return bucket(length, self._shapes.length)

    def take(self) -> int | None:
        """Takes a free slot; None if there is none."""
        free = np.flatnonzero(~self.taken)
        if not len(free):
            return None
        self.taken[free[0]] = True
        return int(free[0])

    def release(self, slot: int) -> None:
        self.taken[slot] = self.active[slot] = self._sampled[slot] = False
        self._waiting = [each for each in self._waiting if each.slot != slot]

    def clear(self) -> None:
        """Gives up all requests."""
        self.active[:] = False
        self._waiting.clear()
        self._state = None

    def join(
        self,
        slot: int,
        prompt: Prompt,
        cfg: TextConfig,
        seed: int,
        max_images: int,
        *,
        text: int | None = None,
        alone: bool = False,
    ) -> Iterator[None]:
        """Waits until a prompt is prefilled into a slot (`prefill_waiting`).

        Args:
            text: text tokens that may follow; by default `cfg.max_new_tokens`.
            alone: whether no other prompt may be prefilled in its batch.
        """
        text = cfg.max_new_tokens if text is None else text
        values = (text, cfg.temperature, cfg.top_k, cfg.top_p, max_images, cfg.do_sample)
        for array, value in zip(self._settings, values, strict=True):
            array[slot] = value
        self._seeds[slot] = seed
        waiting = _WaitingPrompt(slot, prompt, self._padded(len(prompt.tokens)), alone)
        self._waiting.append(waiting)
        while not waiting.prefilled:
            yield None
            if waiting.error is not None:
                raise waiting.error

    def prefill_waiting(self) -> bool:
        """Prefills waiting prompts into their slots, those of one padded length in batches. Returns
        whether there were any."""
        if not self._waiting:
            return False
        # With another padding the last digits of a prompt's states, and perhaps the answer, would
        # differ from those of the prompt alone.
        groups: dict[tuple[int, bool, bool], list[_WaitingPrompt]] = collections.defaultdict(list)
        for waiting in self._waiting:
            images = waiting.prompt.images
            normalized = len(images) > 0 and images.dtype != np.uint8
            groups[waiting.length, normalized, waiting.alone].append(waiting)
        self._waiting = []
        dispatched: list[tuple[Sequence[_WaitingPrompt], mixed.MixedState | Exception]] = []
        tokens = 0
        for (length, _, alone), group in groups.items():
            for batch, size in batches(group, [1] if alone else self.sizes(length)):
                if tokens and tokens + size * length > PREFILL_TOKENS:
                    self._insert_all(dispatched)
                    tokens = 0
                dispatched.append((batch, self._dispatch(batch, size)))
                tokens += size * length
        self._insert_all(dispatched)
        return True

    def sizes(self, length: int = 1) -> list[int]:
        """Returns the sizes of batches of prompts of a padded length."""
        sizes = [rows for rows in PREFILL_ROWS if rows < len(self.taken)]
        return [1, *(rows for rows in sizes if rows > 1 and rows * length <= PREFILL_TOKENS)]

    def _dispatch(self, batch: Sequence[_WaitingPrompt], size: int) -> mixed.MixedState | Exception:
        """Starts to prefill prompts in a batch of `size` rows. Returns the state of each after its
        first element, and of padding, or the error. The slots keep theirs."""
        prompts = [each.prompt for each in batch]
        try:
            padded = self._batch(prompts, batch[0].length, size)
            slots = _slots_of(batch, size)
            return _prefill_rows(*self._arguments(slots, padded, self._encode(prompts, padded)))
        except Exception as error:
            return error.with_traceback(None)  # which holds arrays of the batch

    def _insert_all(
        self, dispatched: list[tuple[Sequence[_WaitingPrompt], mixed.MixedState | Exception]]
    ) -> None:
        """Puts batches of prompts into their slots, and empties the list."""
        while dispatched:
            self._insert_batch(*dispatched.pop(0))

    def _insert_batch(
        self, batch: Sequence[_WaitingPrompt], rows: mixed.MixedState | Exception
    ) -> None:
        """Puts prompts into their slots. Those that failed together are prefilled one by one."""
        if self._state is None and self.active.any():
            raise RuntimeError(LOST)
        if not isinstance(rows, Exception):
            try:
                jax.block_until_ready(rows)  # a failure must show before slots are donated
            except Exception as error:
                rows = error.with_traceback(None)
        if isinstance(rows, Exception):
            if len(batch) == 1:
                batch[0].error = rows
                return
            log.warning("%d prompts could not be prefilled together: %s", len(batch), rows)
            for each in batch:
                self._insert_batch([each], self._dispatch([each], 1))
            return
        states, self._state = self._state, None  # donated: lost if `_insert` fails
        if states is None:
            states = _empty_slots(rows, len(self.taken), self._cache_capacity)
        slots = _slots_of(batch, len(rows.step))
        self._state = _insert(states, rows, slots, np.int32(len(batch)))
        for each in batch:
            each.prefilled = self.active[each.slot] = True

    def _batch(self, prompts: Sequence[Prompt], length: int, rows: int) -> PromptBatch:
        """Pads prompts to a length, with room for the images of the one that has most."""
        return pad(
            prompts,
            "left",
            rows=rows,
            length=length,
            images=bucket(max(len(p.images) for p in prompts), self._shapes.images),
            fill=self._emu.cfg.tokens.pad,
        )

    def _arguments(
        self, slots: Int[np.ndarray, "B"], batch: PromptBatch, images: Float[Array, "B images N E"]
    ) -> tuple[Any, ...]:
        """Returns the arguments of `_prefill_rows` for the prompts of slots."""
        return (
            self._graphdef,
            self._params,
            images,
            batch.tokens,
            batch.embedding_index,
            batch.valid,
            self.static,
            self._dynamic(slots),
            self._seeds[slots],
        )

    def _dynamic(
        self, slots: Int[np.ndarray, "B"] | slice = slice(None)
    ) -> mixed.DynamicMixedSettings:
        """Returns the settings of slots, by default of all."""
        settings = (*(a[slots] for a in self._settings), self._sampled[slots].any())
        return mixed.DynamicMixedSettings._make(settings)

    def _encode(
        self, prompts: Sequence[Prompt], batch: PromptBatch
    ) -> Float[Array, "B images N E"]:
        """Returns the embeddings of each row's images, and zeros behind them."""
        cfg = self._emu.cfg
        shape = (*batch.image_index.shape, cfg.n_embeddings, cfg.embedding_width)
        rows = np.repeat(np.arange(len(prompts)), [len(p.images) for p in prompts])
        numbers = np.concatenate([np.arange(len(p.images)) for p in prompts])
        if not len(rows):
            return self._no_images(shape)
        images = None
        for group, size in batches(range(len(rows)), self.sizes()):
            index = np.resize(group, size)  # padding repeats images, in their own places
            part = self._encode_images(batch.images[index], batch.frames[index])
            images = _put_images(images, part, rows[index], numbers[index], shape)
        assert images is not None
        return images

    def _no_images(self, shape: tuple[int, int, int, int]) -> Float[Array, "B images N E"]:
        """Returns the embeddings of rows without images. They are never donated."""
        if shape not in self._zeros:
            # An array that no program with the parameters has made would compile others.
            outside = np.array([shape[0]])
            self._zeros[shape] = _put_images(None, self._blank, outside, np.zeros(1, int), shape)
        return self._zeros[shape]

    def _encode_images(
        self, images: np.ndarray, frames: Bool[np.ndarray, "B"]
    ) -> Float[Array, "B N E"]:
        has_frames = self._emu.cfg.tokens.frame is not None
        return _encode(
            self._graphdef, self._params, images, frames if has_frames else None, self._emu.dtype
        )

    @functools.cached_property
    def _blank(self) -> Float[Array, "1 N E"]:
        side = self._emu.cfg.vision.image_size
        return self._encode_images(np.zeros((1, side, side, 3), np.uint8), np.zeros(1, bool))

    def prompt_shapes(self) -> list[tuple[int, int]]:
        """Returns the padded lengths of prompts, each with the sizes of its prefill batches."""
        shapes, length = [], 0
        while (length := self._padded(length + 1)) <= self._cache_capacity:
            shapes += [(length, rows) for rows in self.sizes(length)]
        return shapes

    def compile_images(self, size: int) -> None:
        """Compiles the encoding of the images of prompts in batches of a size."""
        side, cfg = self._emu.cfg.vision.image_size, self._emu.cfg
        with self._emu._on_mesh():
            pixels = np.zeros((size, side, side, 3), np.uint8)
            part, outside = self._encode_images(pixels, np.zeros(size, bool)), np.full(size, 2**30)
            for rows in self.sizes():
                shape = (rows, self._shapes.images, cfg.n_embeddings, cfg.embedding_width)
                images = _put_images(None, part, outside, outside, shape)
                _put_images(images, part, outside, outside, shape)

    def compile(self, length: int, rows: int) -> None:
        """Compiles the prefill of a number of prompts of a padded length into slots.

        Nothing is run: the prefill of a long prompt may take longer than compiling.

        Raises:
            RuntimeError: no prompt has been prefilled yet.
        """
        if self._state is None:
            raise RuntimeError("the slots have no state before the first prompt")
        with self._emu._on_mesh():
            self._compile(self._state, length, rows)

    def _compile(self, state: mixed.MixedState, length: int, rows: int) -> None:
        slots = np.arange(rows, dtype=np.int32)
        prompts = [self._dummy(length, 0)]
        batch = self._batch(prompts, length, rows)
        arguments = self._arguments(slots, batch, self._encode(prompts, batch))
        _prefill_rows.lower(*arguments).compile()
        rows_state = jax.tree.map(_sharded_like, _prefill_rows.eval_shape(*arguments), state)
        _insert.lower(state, rows_state, slots, np.int32(rows)).compile()

    def _dummy(self, length: int, images: int) -> Prompt:
        side, tokens = self._emu.cfg.vision.image_size, np.zeros(length, np.int32)
        pixels = np.zeros((images, side, side, 3), np.uint8)
        return Prompt(tokens, tokens - 1, pixels, np.zeros(images, bool))

    def decode(self, elements: int) -> None:
        """Decodes some elements of every active slot, whose `output` is then known."""
        if not self.active.any():
            return
        if self._state is None:
            raise RuntimeError(LOST)
        self._state = _decode_slots(
            self._graphdef,
            self._params,
            self._state,
            self.active,
            self.static,
            self._dynamic(),
            self._seeds,
            np.int32(elements),
        )
        # Copies what `output` returns before the state is donated to the next program.
        names = ("tokens", "step", "count", "done")
        self._fetched = {name: to_host(getattr(self._state, name)) for name in names}
        self.active &= ~self._fetched["done"][:, 0] & (self._fetched["step"] < self.elements)

    def length(self, slot: int) -> int:
        """Returns how many elements `output` returns."""
        return min(int(self._fetched["step"][slot]), self.elements)

    def output(self, slot: int) -> tuple[Int[np.ndarray, "T"], int, bool]:
        """Returns the tokens so far, the number of complete images, and whether it has ended."""
        tokens = self._fetched["tokens"][slot, 0, : self.length(slot)]
        return tokens, int(self._fetched["count"][slot, 0]), bool(self._fetched["done"][slot, 0])

    def embeddings(self, slot: int) -> Float[Array, "1 images N E"]:
        """Returns the embeddings of a slot's images."""
        assert self._state is not None
        return _take(self._state.images, np.int32(slot))


@dataclasses.dataclass
class _ImageInputs:
    """State and conditions of an image, in a batch of one; or of all slots, with a leading axis."""

    state: diffusion.SamplerState
    cond: Float[Array, "*slots 1 N E"]
    uncond: Float[Array, "*slots 1 N E"] | None
    sizes: Float[Array | np.ndarray, "*slots 6"] | None


jax.tree_util.register_dataclass(_ImageInputs)


@dataclasses.dataclass(eq=False)
class _ImageJob:
    """An image that is to be denoised.

    Attributes:
        step: rows of `table` that have been run, of `count` in all.
        error: why it could not be denoised.
    """

    inputs: _ImageInputs
    guidance: np.float32
    table: diffusion.Steps
    count: int
    previews: bool
    step: int = 0
    preview: Preview | None = None
    pixels: UInt8[np.ndarray, "1 height width 3"] | None = None
    error: Exception | None = None

    @property
    def shapes(self) -> Any:
        """Jobs with equal shapes are denoised in one batch."""
        return jax.tree.structure(self.inputs), *(a.shape for a in jax.tree.leaves(self.inputs))


class _ImageSlots:
    """Images that are denoised at once, each in a slot of one batch."""

    def __init__(self, emu: Emu, slots: int) -> None:
        self._emu = emu
        self.jobs: list[_ImageJob] = []  # oldest first
        self._slots: list[_ImageJob | None] = [None] * slots
        self._inputs: _ImageInputs | None = None
        self._shapes: Any = None

    def clear(self) -> None:
        """Gives up all images."""
        self.jobs.clear()
        self._slots, self._inputs = [None] * len(self._slots), None

    def remove(self, job: _ImageJob) -> None:
        """Gives up an image, unless it is complete."""
        if job in self.jobs:
            self.jobs.remove(job)
        self._slots = [None if other is job else other for other in self._slots]

    def fail(self, error: Exception) -> None:
        """Ends the images of the batch with an error. Those that wait keep their turn."""
        for job in self._slots:
            if job is not None:
                job.error = error.with_traceback(None)  # which holds arrays of the batch
                self.remove(job)
        self._inputs = None

    def _fill(self) -> None:
        """Moves waiting images into free slots.

        A batch begins with the oldest image and all others of its shape. Later ones join it unless
        one of another shape waits, whose turn it is once all slots are free.
        """
        waiting = [job for job in self.jobs if job not in self._slots]
        begins = not any(self._slots)
        if begins and waiting and waiting[0].shapes != self._shapes:
            self._inputs, self._shapes = None, waiting[0].shapes
        for job in waiting:
            if None not in self._slots:
                return
            if job.shapes != self._shapes:
                if begins:
                    continue
                return
            slot = self._slots.index(None)
            self._slots[slot] = job
            row = jax.tree.map(lambda a: a[None], job.inputs)
            if self._inputs is None:
                zeros = functools.partial(_zeros, slots=len(self._slots))
                self._inputs = jax.tree.map(zeros, row)
            self._inputs = _insert(self._inputs, row, np.array([slot], np.int32), np.int32(1))

    def denoise(self) -> None:
        """Runs a few steps of the sampler for every slot, and finishes complete images."""
        self._fill()
        if self._inputs is None or not any(self._slots):
            return
        emu, count = self._emu, STEPS_PER_STOP_CHECK
        first = next(job for job in self._slots if job is not None)
        columns = []
        for job in self._slots:
            start = 0 if job is None else job.step
            columns.append([column[start : start + count] for column in (job or first).table])
        # Rows behind the end of a table are padding, and are not run.
        steps = diffusion.Steps(
            *(
                np.stack([_padded(column, count) for column in column_of_slots])
                for column_of_slots in zip(*columns, strict=True)
            )
        )
        left = np.array([0 if job is None else job.count - job.step for job in self._slots])
        guidance = np.array([(job or first).guidance for job in self._slots], np.float32)
        inputs = self._inputs
        state = _denoise_slots(
            emu._graphdef,
            emu._params,
            inputs.state,
            inputs.cond,
            inputs.uncond,
            inputs.sizes,
            steps,
            left.astype(np.int32),
            guidance,
        )
        self._inputs = dataclasses.replace(inputs, state=state)
        for slot, job in enumerate(self._slots):
            if job is None:
                continue
            before, job.step = job.step, min(job.step + count, job.count)
            complete = job.step == job.count
            parts = PREVIEWS + 1  # that the previews divide the steps into
            due = parts * job.step // job.count > parts * before // job.count
            if complete or (job.previews and due):
                latents = _take(state, np.int32(slot))
                pixels = _finish_painting(
                    emu._graphdef, emu._params, latents, job.inputs.cond.dtype
                )
                if complete:
                    job.pixels = to_host(pixels)
                    self.remove(job)
                else:
                    image = Image.fromarray(to_host(pixels)[0])
                    job.preview = Preview(image, job.step, job.count)


def has_stop(text: str, stops: Sequence[str]) -> bool:
    """Returns whether an answer contains a stop text. White space before it is no part of it."""
    return any(stop in text.lstrip() for stop in stops)


def _padded(column: Shaped[np.ndarray, "_ *A"], rows: int) -> Shaped[np.ndarray, "{rows} *A"]:
    return np.pad(column, [(0, rows - len(column))] + [(0, 0)] * (column.ndim - 1))


# --- Programs ------------------------------------------------------------------------------------

# Axes of `mixed.DynamicMixedSettings` that stand for rows. `any_sampled` is one for all: a choice
# that differed between rows would compute both sides.
_DYNAMIC_AXES = mixed.DynamicMixedSettings(0, 0, 0, 0, 0, 0, None)  # type: ignore[arg-type]


def _without_painter(emu: Emu) -> tuple[nnx.GraphDef, Variables]:
    """Returns the model without what generates images. A call of a program takes longer the more
    parameters it has."""
    model = emu.model
    model.unet = model.vae = None
    graphdef, params = nnx.split(model)
    return _HashedGraphDef.of(graphdef), [p.get_value() for p in nnx.to_flat_state(params).leaves]


def _text_keys(seeds: UInt32[Array, "B"]) -> Key[Array, "B 1"]:
    """Returns the keys of texts that are each the first row of their request."""
    keys, _ = _seeded_keys(jnp.zeros(seeds.shape, jnp.int32), seeds)
    return keys[:, None]


@functools.partial(jax.jit, static_argnames=("shape",), donate_argnames=("images",))
def _put_images(
    images: Float[Array, "B images N E"] | None,
    part: Float[Array, "group N E"],
    rows: Int[Array, "group"],
    numbers: Int[Array, "group"],
    shape: tuple[int, int, int, int],
) -> Float[Array, "B images N E"]:
    """Puts a group of images in their places. Drops those of a row that does not exist.

    Args:
        images: the images so far; None before the first group.
        shape: of all images.
    """
    images = jnp.zeros(shape, part.dtype) if images is None else images
    return images.at[rows, numbers].set(part, mode="drop")


@functools.partial(jax.jit, static_argnames=("graphdef", "static"))
def _prefill_rows(
    graphdef: nnx.GraphDef,
    params: Variables,
    images: Float[Array, "B images N E"],
    tokens: Int[Array, "B T"],
    embedding_index: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    static: mixed.StaticMixedSettings,
    dynamic: mixed.DynamicMixedSettings,
    seeds: UInt32[Array, "B"],
) -> mixed.MixedState:
    """Returns the state of each prompt after its first element, along a leading axis. Its cache
    has room for the padded prompt alone."""
    emu = nnx.merge(graphdef, params)
    length = tokens.shape[1]

    def prefill(
        x: Float[Array, "T D"],
        valid: Bool[Array, "T"],
        starts_image: Bool[Array, ""],
        dynamic: mixed.DynamicMixedSettings,
        keys: Key[Array, "1"],
    ) -> mixed.MixedState:
        emu = nnx.merge(graphdef, params)
        # An entry to spare: annotations cannot tell a cache that is as long as a head is wide.
        state = mixed.start(
            emu, x[None], valid[None], starts_image[None], static, dynamic, keys, free_entries=1
        )
        return state._replace(cache=state.cache.drop(length - jnp.sum(valid)).resized(length))

    x = emu.embed(tokens, images, embedding_index)
    starts_image = tokens[:, -1] == emu.cfg.tokens.img
    prefill_all = jax.vmap(prefill, (0, 0, 0, _DYNAMIC_AXES, 0))
    return prefill_all(x, valid, starts_image, dynamic, _text_keys(seeds))


@functools.partial(jax.jit, static_argnames=("graphdef", "static"), donate_argnames=("state",))
def _decode_slots(
    graphdef: nnx.GraphDef,
    params: Variables,
    state: mixed.MixedState,
    active: Bool[Array, "slots"],
    static: mixed.StaticMixedSettings,
    dynamic: mixed.DynamicMixedSettings,
    seeds: UInt32[Array, "slots"],
    elements: Int[Array, ""],
) -> mixed.MixedState:
    """Decodes some elements of every slot. Slots that have ended are computed and ignored."""
    keys = _text_keys(seeds)

    def decode_step(
        state: mixed.MixedState, dynamic: mixed.DynamicMixedSettings, keys: Key[Array, "1"]
    ) -> mixed.MixedState:
        emu = nnx.merge(graphdef, params)
        return mixed.decode_step(emu, emu.llama, state, static, dynamic, keys)

    def step(carry: tuple[Int[Array, ""], mixed.MixedState]) -> tuple[Any, mixed.MixedState]:
        count, state = carry
        decode_slots = jax.vmap(decode_step, (0, _DYNAMIC_AXES, 0))
        return count + 1, decode_slots(state, dynamic, keys)

    def unfinished(carry: tuple[Int[Array, ""], mixed.MixedState]) -> Bool[Array, ""]:
        count, state = carry
        return (count < elements) & jnp.any(active & ~state.done[:, 0])

    return jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))[1]


@functools.partial(jax.jit, static_argnames=("graphdef", "static"))
def _start_search(
    graphdef: nnx.GraphDef,
    params: Variables,
    images: Float[Array, "B images N E"],
    tokens: Int[Array, "B T"],
    embedding_index: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    static: StaticSettings,
    dynamic: DynamicSettings,
    keys: Key[Array, "B"],
) -> text.SearchState:
    """Returns the state of a beam search after its first token."""
    emu = nnx.merge(graphdef, params)
    x = emu.embed(tokens, images, embedding_index)
    new_tokens = static.num_beams * (static.output_length - 1)
    decoding, _ = text.prefill(emu.llama.unstacked_for_decoding(), x, valid, new_tokens)
    return text.start_search(decoding, static, dynamic, keys)


@functools.partial(jax.jit, static_argnames=("graphdef", "static"), donate_argnames=("state",))
def _continue_search(
    graphdef: nnx.GraphDef,
    params: Variables,
    state: text.SearchState,
    static: StaticSettings,
    dynamic: DynamicSettings,
    keys: Key[Array, "B"],
) -> text.SearchState:
    """Searches a few tokens further."""
    llama = nnx.merge(graphdef, params).llama.unstacked_for_decoding()
    length = state.beams.length + ELEMENTS_PER_STREAM_CHECK
    return text.search_until(llama, state, length, static, dynamic, keys)


@functools.partial(jax.jit, static_argnames=("static",))
def _best_beam(
    beams: text.BeamState, static: StaticSettings, dynamic: DynamicSettings
) -> Int[Array, "B T"]:
    return beams.best(static, dynamic)


@functools.partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("state",))
def _denoise_slots(
    graphdef: nnx.GraphDef,
    params: Variables,
    state: diffusion.SamplerState,
    cond: Float[Array, "slots 1 N E"],
    uncond: Float[Array, "slots 1 N E"] | None,
    sizes: Float[Array, "slots 6"] | None,
    steps: diffusion.Steps,
    left: Int[Array, "slots"],
    guidance: Float[Array, "slots"],
) -> diffusion.SamplerState:
    """Runs the next steps of every slot's sampler. `left` is how many steps it needs."""

    def denoise(
        state: diffusion.SamplerState,
        cond: Float[Array, "1 N E"],
        uncond: Float[Array, "1 N E"] | None,
        sizes: Float[Array, "6"] | None,
        row: diffusion.Steps,
        guidance: Float[Array, ""],
    ) -> diffusion.SamplerState:
        emu = nnx.merge(graphdef, params)
        table = jax.tree.map(lambda column: column[None], row)
        return paint_steps(emu, state, cond, uncond, guidance, table, 0, 1, sizes)

    def step(i: Int[Array, ""], state: diffusion.SamplerState) -> diffusion.SamplerState:
        row = jax.tree.map(lambda column: column[:, i], steps)
        after = jax.vmap(denoise)(state, cond, uncond, sizes, row, guidance)
        runs = i < left
        return jax.tree.map(
            lambda new, old: jnp.where(runs.reshape(-1, *[1] * (new.ndim - 1)), new, old),
            after,
            state,
        )

    return jax.lax.fori_loop(0, STEPS_PER_STOP_CHECK, step, state)


def _empty_slots(rows: mixed.MixedState, slots: int, cache_capacity: int) -> mixed.MixedState:
    """Returns slots for states like `rows`, each with a cache of `cache_capacity` entries."""
    wide = jax.eval_shape(lambda: rows._replace(cache=rows.cache.resized(cache_capacity)))
    return jax.tree.map(functools.partial(_zeros, slots=slots), wide)


def _sharded_like(a: jax.ShapeDtypeStruct, like: jax.Array) -> jax.ShapeDtypeStruct:
    """Returns an abstract array with the sharding of `like`."""
    sharding = like.sharding if like.committed else None
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding, weak_type=a.weak_type)


def _zeros(row: jax.Array | jax.ShapeDtypeStruct, slots: int) -> jax.Array:
    return jnp.zeros((slots, *row.shape[1:]), row.dtype)


@functools.partial(jax.jit, donate_argnames=("states",))
def _insert(states: T, rows: T, slots: Int[Array, "B"], count: Int[Array, ""]) -> T:
    """Puts each of the first `count` rows into its slot.

    A slot's cache may have room for more tokens than a row's. What a former request left behind the
    row's tokens stays there: no token sees a cache entry before it is written.
    """

    def insert(i: Int[Array, ""], states: T) -> T:
        def put(all_: jax.Array, row: jax.Array) -> jax.Array:
            start = (slots[i], *[0] * (all_.ndim - 1))
            return jax.lax.dynamic_update_slice(all_, row[i][None], start)

        return jax.tree.map(put, states, rows)

    return jax.lax.fori_loop(0, count, insert, states)


@jax.jit
def _take(states: T, slot: Int[Array, ""]) -> T:
    """Returns the state of a slot."""
    return jax.tree.map(lambda a: a[slot], states)


def _slots_of(batch: Sequence[_WaitingPrompt], size: int) -> Int[np.ndarray, "size"]:
    """Returns the slots of prompts, and any for the padding behind them."""
    return np.resize(np.array([each.slot for each in batch], np.int32), size)


def batches(items: Sequence[T], sizes: Sequence[int]) -> Iterator[tuple[Sequence[T], int]]:
    """Cuts items into batches. Yields the items of each, and its size: the largest of `sizes`, from
    1, of which at least three quarters are filled."""
    start = 0
    while start < len(items):
        left = len(items) - start
        size = max(size for size in sizes if size == 1 or 4 * left >= 3 * size)
        yield items[start : start + size], size
        start += size
