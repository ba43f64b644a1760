"""Continuation of a mixed sequence, in which the model itself may open a picture.

Every row takes one element a step: a text token that it chooses, a visual embedding that it
regresses (after `[IMG]`), or the `[/IMG]` behind the last of them. So rows that write and rows
that draw go on side by side in one loop, on one KV cache.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from emu_jax.config import EmuConfig
from emu_jax.generate.text import prefill, warp
from emu_jax.models.emu import Emu
from emu_jax.models.kv_cache import KVCache
from emu_jax.models.llama import Llama


@dataclasses.dataclass(frozen=True)
class MixedPlan:
    """The part of the settings that a compiled program is made for."""

    text_slots: int  # generated text tokens there is room for
    max_images: int
    do_sample: bool
    may_open: bool  # False where nothing can paint: the model then has no [IMG] to choose

    def steps(self, n_causal: int) -> int:
        """The most elements a row can have."""
        return self.text_slots + self.max_images * (n_causal + 1)


class MixedRules(NamedTuple):
    """The part that may change without a new compilation.

    Attributes:
        max_images: images that each row has room for, at most the plan's; None: the plan's.
    """

    max_new_tokens: Int[Array, ""]
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    max_images: Int[Array, "B"] | None = None


class Mixed(NamedTuple):
    """Output so far and state of the mixed loop between two steps.

    Attributes:
        tokens: in order; `<image>` stands for an embedding, padding follows the end.
        images: embeddings of the pictures in order of their `[IMG]`.
        slot: the next embedding's place in its picture, N for `[/IMG]`, -1 in text.
        count: pictures that are complete.
        written: text tokens so far, `[IMG]` and `</s>` among them.
    """

    tokens: Int[Array, "B T"]
    images: Float[Array, "B I N D"]
    step: Int[Array, ""]
    slot: Int[Array, "B"]
    count: Int[Array, "B"]
    written: Int[Array, "B"]
    done: Bool[Array, "B"]
    element: Float[Array, "B D"]
    positions: Int[Array, "B"]
    logits: Float[Array, "B V"]
    regressed: Float[Array, "B D"]
    cache: KVCache


def complete(
    emu: Emu,
    x: Float[Array, "B P D"],
    valid: Bool[Array, "B P"],
    opened: Bool[Array, "B"],
    plan: MixedPlan,
    rules: MixedRules,
    keys: Key[Array, "B"],
) -> tuple[Int[Array, "B T"], Float[Array, "B I N D"]]:
    """Ids and pictures' embeddings that follow left-padded prompts.

    A row ends with `</s>`, after `max_new_tokens` of text (a picture it has opened is still
    regressed), or where it would open one picture more than `max_images`.

    Args:
        opened: whether the prompt ends in `[IMG]`; a picture then comes first.
    """
    state = start(emu, x, valid, opened, plan, rules, keys)
    steps = jnp.int32(plan.steps(emu.cfg.cformer.n_causal))
    state = go_on(emu, state, steps, plan, rules, keys)
    return state.tokens, state.images


def start(
    emu: Emu,
    x: Float[Array, "B P D"],
    valid: Bool[Array, "B P"],
    opened: Bool[Array, "B"],
    plan: MixedPlan,
    rules: MixedRules,
    keys: Key[Array, "B"],
) -> Mixed:
    """The state after the first element; see `complete`."""
    ids, n = emu.cfg.tokens, emu.cfg.cformer.n_causal
    steps, (batch, _, width) = plan.steps(n), x.shape
    reader, last = prefill(emu.llama.unstacked_for_decoding(), x, valid, steps - 1)
    state = Mixed(
        tokens=jnp.full((batch, steps), ids.pad),
        images=jnp.zeros((batch, plan.max_images, n, width), x.dtype),
        step=jnp.int32(0),
        slot=jnp.where(opened, 0, -1),
        count=jnp.zeros(batch, jnp.int32),
        written=jnp.zeros(batch, jnp.int32),
        done=opened & (plan.max_images == 0),
        element=jnp.zeros((batch, width), x.dtype),
        positions=reader.positions,
        logits=reader.logits,
        regressed=emu.llama.regress(last),
        cache=reader.cache,
    )
    return _choose(emu.llama, emu.cfg, state, plan, rules, keys)


def go_on(
    emu: Emu,
    state: Mixed,
    until: Int[Array, ""],
    plan: MixedPlan,
    rules: MixedRules,
    keys: Key[Array, "B"],
) -> Mixed:
    """Goes on until every row has ended or `until` elements are there, at most `plan.steps`."""
    until = jnp.minimum(until, plan.steps(emu.cfg.cformer.n_causal))
    graphdef, params = nnx.split(emu.llama.unstacked_for_decoding())

    def read(state: Mixed) -> Mixed:
        llama = nnx.merge(graphdef, params)
        hidden, cache = llama.extend(
            state.element[:, None],
            state.positions[:, None],
            jnp.ones((len(state.slot), 1), bool),
            state.cache,
        )
        return state._replace(
            positions=state.positions + 1,
            cache=cache,
            logits=llama.logits(hidden)[:, 0].astype(jnp.float32),
            regressed=llama.regress(hidden)[:, 0],
        )

    return jax.lax.while_loop(
        lambda s: (s.step < until) & ~jnp.all(s.done),
        lambda s: _choose(nnx.merge(graphdef, params), emu.cfg, read(s), plan, rules, keys),
        state,
    )


def _choose(
    llama: Llama,
    cfg: EmuConfig,
    state: Mixed,
    plan: MixedPlan,
    rules: MixedRules,
    keys: Key[Array, "B"],
) -> Mixed:
    """The next element of every row that has not ended."""
    ids, n = cfg.tokens, cfg.cformer.n_causal
    # Tokens that only the picture itself, or padding, may put there.
    closed = [ids.bos, ids.pad, ids.image, ids.img_end] + ([] if plan.may_open else [ids.img])
    scores = state.logits.at[:, jnp.asarray(closed)].set(-jnp.inf)
    if plan.do_sample:
        scores = warp(scores, rules.temperature, rules.top_k, rules.top_p)
        fold = jax.vmap(jax.random.fold_in, (0, None))
        word = jax.vmap(jax.random.categorical)(fold(keys, state.step), scores)
    else:
        word = jnp.argmax(scores, axis=-1)
    draws, closes = (state.slot >= 0) & (state.slot < n), state.slot == n
    writes = state.slot < 0
    opens = writes & (word == ids.img)
    most = plan.max_images if rules.max_images is None else rules.max_images
    refused = opens & (state.count >= most)

    token = jnp.where(draws, ids.image, jnp.where(closes, ids.img_end, word))
    token = jnp.where(state.done | refused, ids.pad, token)
    rows = jnp.arange(len(token))
    place = jnp.where(draws & ~state.done, state.count, plan.max_images)  # else out of range
    images = state.images.at[rows, place, jnp.clip(state.slot, 0, n - 1)].set(
        state.regressed, mode="drop"
    )
    written = state.written + writes
    count = state.count + closes
    slot = jnp.where(draws, state.slot + 1, jnp.where(opens & ~refused, 0, -1))
    spent = (slot < 0) & (written >= rules.max_new_tokens)
    word_embedding = llama.embed_tokens(token).astype(state.element.dtype)
    return state._replace(
        tokens=state.tokens.at[:, state.step].set(token),
        images=images,
        step=state.step + 1,
        slot=slot,
        count=count,
        written=written,
        done=state.done | refused | (writes & (word == ids.eos)) | spent,
        element=jnp.where(draws[:, None], state.regressed, word_embedding),
    )
