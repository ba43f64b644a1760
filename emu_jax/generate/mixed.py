"""Continuation of a mixed sequence, in which the model itself may start an image.

Each step gives every row one element: a text token that it chooses, a visual embedding that it
regresses (after `[IMG]`), or the `[/IMG]` that follows an image's last embedding. Rows in text and
rows in an image therefore share one loop and one KV cache.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from emu_jax.generate.logits import filter_logits
from emu_jax.generate.text import prefill, step_keys
from emu_jax.models.emu import EmuModel
from emu_jax.models.kv_cache import KVCache
from emu_jax.models.llama import Llama


@dataclasses.dataclass(frozen=True)
class StaticMixedSettings:
    """Settings of mixed decoding that a program is compiled for.

    Attributes:
        text_length: most text tokens to generate, `max_new_tokens` rounded up to a bucket.
        may_start_image: whether the model may choose `[IMG]`; False if it has no painter.
    """

    text_length: int
    max_images: int
    do_sample: bool
    may_start_image: bool

    def steps(self, n_embeddings: int) -> int:
        """Returns the largest number of elements of a row."""
        return self.text_length + self.max_images * (n_embeddings + 1)


class DynamicMixedSettings(NamedTuple):
    """Settings of mixed decoding that may change without a new compilation.

    Attributes:
        max_images: images that each row has room for, at most the static limit. None stands for
            that limit.
        do_sample: whether to sample, if the static setting allows it. None stands for that setting.
        any_sampled: whether any row of the batch is sampled. If not, no scores are sorted. None
            means that it is not known.
    """

    max_new_tokens: Int[Array, ""]
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    max_images: Int[Array, "B"] | None = None
    do_sample: Bool[Array, ""] | None = None
    any_sampled: Bool[Array, ""] | None = None


class MixedState(NamedTuple):
    """Output so far and state of the mixed loop between two steps.

    Attributes:
        tokens: in order; `<image>` stands for an embedding, padding follows the end.
        images: embeddings of the images in order of their `[IMG]`.
        offset: the next embedding's index in its image, N for `[/IMG]`, -1 in text.
        count: complete images.
        written: text tokens so far, `[IMG]` and `</s>` included.
        element: embedding of the last element, which the next step reads.
    """

    tokens: Int[Array, "B T"]
    images: Float[Array, "B images N E"]
    step: Int[Array, ""]
    offset: Int[Array, "B"]
    count: Int[Array, "B"]
    written: Int[Array, "B"]
    done: Bool[Array, "B"]
    element: Float[Array, "B D"]
    positions: Int[Array, "B"]
    logits: Float[Array, "B vocab"]
    regressed: Float[Array, "B E"]
    cache: KVCache


def complete(
    emu: EmuModel,
    x: Float[Array, "B prompt D"],
    valid: Bool[Array, "B prompt"],
    starts_image: Bool[Array, "B"],
    static: StaticMixedSettings,
    dynamic: DynamicMixedSettings,
    keys: Key[Array, "B"] | None,
) -> tuple[Int[Array, "B T"], Float[Array, "B images N E"]]:
    """Returns ids and image embeddings that follow left-padded prompts.

    A row ends with `</s>`, after `max_new_tokens` of text (an image that it has started is
    still completed), or where it would start more than `max_images` images.

    Args:
        starts_image: whether the prompt ends in `[IMG]`; an image then comes first.
    """
    state = start(emu, x, valid, starts_image, static, dynamic, keys)
    steps = jnp.int32(static.steps(emu.cfg.n_embeddings))
    state = decode_until(emu, state, steps, static, dynamic, keys)
    return state.tokens, state.images


def start(
    emu: EmuModel,
    x: Float[Array, "B prompt D"],
    valid: Bool[Array, "B prompt"],
    starts_image: Bool[Array, "B"],
    static: StaticMixedSettings,
    dynamic: DynamicMixedSettings,
    keys: Key[Array, "B"] | None,
    free_entries: int | None = None,
) -> MixedState:
    """Returns the state after the first element; see `complete`.

    Args:
        free_entries: entries of the cache after the prompt; by default enough for all elements.
    """
    ids, n = emu.cfg.tokens, emu.cfg.n_embeddings
    steps, (batch, _, width) = static.steps(n), x.shape
    free_entries = steps - 1 if free_entries is None else free_entries
    decoding, last = prefill(emu.llama.unstacked_for_decoding(), x, valid, free_entries)
    state = MixedState(
        tokens=jnp.full((batch, steps), ids.pad),
        images=jnp.zeros((batch, static.max_images, n, emu.cfg.embedding_width), x.dtype),
        step=jnp.int32(0),
        offset=jnp.where(starts_image, 0, -1),
        count=jnp.zeros(batch, jnp.int32),
        written=jnp.zeros(batch, jnp.int32),
        done=starts_image & (static.max_images == 0),
        element=jnp.zeros((batch, width), x.dtype),
        positions=decoding.positions,
        logits=decoding.logits,
        regressed=emu.regress(last),
        cache=decoding.cache,
    )
    return _choose(emu, emu.llama, state, static, dynamic, keys)


def decode_until(
    emu: EmuModel,
    state: MixedState,
    until: Int[Array, ""],
    static: StaticMixedSettings,
    dynamic: DynamicMixedSettings,
    keys: Key[Array, "B"] | None,
) -> MixedState:
    """Decodes until every row has ended or has `until` elements, at most `static.steps`."""
    until = jnp.minimum(until, static.steps(emu.cfg.n_embeddings))
    graphdef, params = nnx.split(emu.llama.unstacked_for_decoding())

    def step(state: MixedState) -> MixedState:
        return decode_step(emu, nnx.merge(graphdef, params), state, static, dynamic, keys)

    def unfinished(state: MixedState) -> Bool[Array, ""]:
        return (state.step < until) & ~jnp.all(state.done)

    return jax.lax.while_loop(unfinished, step, state)


def decode_step(
    emu: EmuModel,
    llama: Llama,
    state: MixedState,
    static: StaticMixedSettings,
    dynamic: DynamicMixedSettings,
    keys: Key[Array, "B"] | None,
) -> MixedState:
    """Reads the last element of every row and appends the next one. `llama` is that of `emu`, or
    its copy for decoding."""
    hidden, cache = llama.extend(
        state.element[:, None],
        state.positions[:, None],
        jnp.ones((len(state.offset), 1), bool),
        state.cache,
    )
    state = state._replace(
        positions=state.positions + 1,
        cache=cache,
        logits=llama.logits(hidden)[:, 0].astype(jnp.float32),
        regressed=emu.regress(hidden)[:, 0],
    )
    return _choose(emu, llama, state, static, dynamic, keys)


def _choose(
    emu: EmuModel,
    llama: Llama,
    state: MixedState,
    static: StaticMixedSettings,
    dynamic: DynamicMixedSettings,
    keys: Key[Array, "B"] | None,
) -> MixedState:
    """Appends the next element of every row that has not ended. `llama` is that of `emu`, or its
    copy for decoding."""
    ids, n = emu.cfg.tokens, emu.cfg.n_embeddings
    # Tokens that are never sampled: only an image, a prompt or padding has them.
    banned = [ids.bos, ids.pad, ids.image, ids.img_end]
    banned += [] if static.may_start_image else [ids.img]
    banned += [] if ids.frame is None else [ids.frame]
    banned = [token for token in banned if token != ids.eos]
    scores = state.logits.at[:, jnp.asarray(banned)].set(-jnp.inf)
    word = jnp.argmax(scores, axis=-1)
    if static.do_sample:
        word = _sample(scores, word, dynamic, step_keys(keys, state.step))
    embeds, ends_image = (state.offset >= 0) & (state.offset < n), state.offset == n
    writes = state.offset < 0
    starts_image = writes & (word == ids.img)
    max_images = static.max_images if dynamic.max_images is None else dynamic.max_images
    over_limit = starts_image & (state.count >= max_images)  # one image too many: the row ends here

    token = jnp.where(embeds, ids.image, jnp.where(ends_image, ids.img_end, word))
    token = jnp.where(state.done | over_limit, ids.pad, token)
    rows = jnp.arange(len(token))
    # Rows outside an image write out of range, which drops the write.
    number = jnp.where(embeds & ~state.done, state.count, static.max_images)
    images = state.images.at[rows, number, jnp.clip(state.offset, 0, n - 1)].set(
        state.regressed, mode="drop"
    )
    written = state.written + writes
    count = state.count + ends_image
    offset = jnp.where(embeds, state.offset + 1, jnp.where(starts_image & ~over_limit, 0, -1))
    out_of_tokens = (offset < 0) & (written >= dynamic.max_new_tokens)
    word_embedding = llama.embed_tokens(token).astype(state.element.dtype)
    visual = emu.to_language(state.regressed)
    return state._replace(
        tokens=state.tokens.at[:, state.step].set(token),
        images=images,
        step=state.step + 1,
        offset=offset,
        count=count,
        written=written,
        done=state.done | over_limit | (writes & (word == ids.eos)) | out_of_tokens,
        element=jnp.where(embeds[:, None], visual, word_embedding),
    )


def _sample(
    scores: Float[Array, "B vocab"],
    greedy: Int[Array, "B"],
    dynamic: DynamicMixedSettings,
    keys: Key[Array, "B"],
) -> Int[Array, "B"]:
    """Returns a sampled token for each row that is sampled, and the greedy one for others."""

    def sample() -> Int[Array, "B"]:
        kept = filter_logits(scores, dynamic.temperature, dynamic.top_k, dynamic.top_p)
        sampled = jax.vmap(jax.random.categorical)(keys, kept)
        if dynamic.do_sample is None:
            return sampled
        return jnp.where(dynamic.do_sample, sampled, greedy)

    if dynamic.any_sampled is None:
        return sample()
    return jax.lax.cond(dynamic.any_sampled, sample, lambda: greedy)
