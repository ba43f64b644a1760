"""Text decoding as the release does it: transformers 4.31 `generate` on `inputs_embeds`.

There a generated sequence starts with a dummy `<s>` that the model never reads. It counts for
`min_length`, for the length that a beam's score is divided by, for repetition penalties and for
n-grams. `max_new_tokens` does not count it.

A prompt is read once (prefill). Then one `lax.while_loop` holds the logits processors, the choice
of a token and the next decode step, on a KV cache that is updated in place. The beams of a prompt
share its keys and values: only the generated entries are gathered when beams are reordered.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from emu_jax.generate.logits import apply_logits_processors, filter_logits
from emu_jax.generate.settings import DynamicSettings, StaticSettings
from emu_jax.models.backend import kernels
from emu_jax.models.kv_cache import KVCache
from emu_jax.models.llama import Llama


class DecodeState(NamedTuple):
    """Decoding state: cache, next positions, next-token logits."""

    cache: KVCache
    positions: Int[Array, "rows"]
    logits: Float[Array, "rows vocab"]

    def repeat(self, times: int) -> DecodeState:
        """Repeats each row `times` times."""
        positions, logits = (jnp.repeat(a, times, axis=0) for a in (self.positions, self.logits))
        return DecodeState(self.cache.repeat(times), positions, logits)


def prefill(
    llama: Llama, x: Float[Array, "B T D"], valid: Bool[Array, "B T"], new_tokens: int
) -> tuple[DecodeState, Float[Array, "B D"]]:
    """Reads left-padded prompts into a cache with room for `new_tokens` more tokens.

    Returns the decoding state and the last token's hidden state.
    """
    # The release counts positions from the first real token; padding has position 1.
    positions = jnp.where(valid, jnp.cumsum(valid, axis=1) - 1, 1)
    cache = llama.empty_cache(x.shape[0], x.shape[1] + new_tokens, x.dtype)
    hidden, cache = llama.extend(x, positions, valid, cache)
    last = hidden[:, -1:]
    logits = llama.logits(last)[:, 0].astype(jnp.float32)
    return DecodeState(cache, jnp.sum(valid, axis=1), logits), last[:, 0]


def decode_token(llama: Llama, state: DecodeState, tokens: Int[Array, "B"]) -> DecodeState:
    """Decode step: reads one more token of every row."""
    hidden, cache = _decode_step(llama, state, tokens[:, None])
    logits = llama.logits(hidden)[:, 0].astype(jnp.float32)
    return DecodeState(cache, state.positions + 1, logits)


def decode_beams(
    llama: Llama,
    state: DecodeState,
    tokens: Int[Array, "B beams"],
    ancestors: Bool[Array, "B beams S"],
) -> tuple[DecodeState, Bool[Array, "B beams S"]]:
    """Decode step of beam search: reads one more token of every beam, each into an entry of the
    cache of its own.

    `ancestors` marks the entries that each beam descends from; it is returned with the new ones.
    The logits are [B beams, vocab].
    """
    entries, beams = jnp.arange(ancestors.shape[2]), jnp.arange(tokens.shape[1])
    ancestors |= entries == state.cache.used + beams[:, None]
    hidden, cache = _decode_step(llama, state, tokens, mask=ancestors)
    logits = rearrange(llama.logits(hidden), "b k v -> (b k) v").astype(jnp.float32)
    return DecodeState(cache, state.positions + 1, logits), ancestors


def _decode_step(
    llama: Llama,
    state: DecodeState,
    tokens: Int[Array, "B T"],
    *,
    mask: Bool[Array, "B T S"] | None = None,
) -> tuple[Float[Array, "B T D"], KVCache]:
    x = llama.embed_tokens(tokens).astype(state.cache.dtype)
    positions = jnp.broadcast_to(state.positions[:, None], tokens.shape)
    return llama.extend(x, positions, jnp.ones(tokens.shape, bool), state.cache, mask=mask)


def decode(
    llama: Llama,
    x: Float[Array, "B prompt D"],
    valid: Bool[Array, "B prompt"],
    static: StaticSettings,
    dynamic: DynamicSettings,
    keys: Key[Array, "B"] | None,
    allowed: Int[Array | np.ndarray, "choices choice"] | None = None,
) -> Int[Array, "B T"]:
    """Generates ids with the dummy `<s>` in front, padded behind `</s>`.

    Args:
        x: embeddings of left-padded prompts; `valid` is False on the padding.
        keys: a key for each row, used by sampling.
        allowed: the only sequences that may be generated, padded with -1; each should end in
            `</s>`.
    """
    llama = llama.unstacked_for_decoding()
    decoding, _ = prefill(llama, x, valid, static.num_beams * (static.output_length - 1))
    run = _beam_search if static.num_beams > 1 else _sample
    return run(llama, decoding, static, dynamic, keys, allowed)


def step_keys(keys: Key[Array, "B"] | None, step: Int[Array, ""] | int) -> Key[Array, "B"]:
    """Returns the keys of a decode step, one for each row."""
    if keys is None:
        raise ValueError("sampling needs a key for each row")
    return jax.vmap(jax.random.fold_in, (0, None))(keys, step)


class SampleState(NamedTuple):
    """Greedy decoding or sampling between two steps."""

    sequences: Int[Array, "B T"]
    length: Int[Array, ""]
    done: Bool[Array, "B"]

    @classmethod
    def start(cls, batch: int, static: StaticSettings) -> SampleState:
        """Returns the state before the first token: the dummy `<s>` alone."""
        sequences = jnp.full((batch, static.output_length + 1), static.tokens.pad, jnp.int32)
        return cls(sequences.at[:, 0].set(static.tokens.bos), jnp.int32(1), jnp.zeros(batch, bool))

    def extend(
        self,
        logits: Float[Array, "B vocab"],
        static: StaticSettings,
        dynamic: DynamicSettings,
        keys: Key[Array, "B"] | None,
        allowed: Int[Array | np.ndarray, "choices choice"] | None,
    ) -> SampleState:
        """Appends the next token of every row that has not ended."""
        scores = apply_logits_processors(
            logits, self.sequences, self.length, static, dynamic, allowed
        )
        if static.do_sample:
            scores = filter_logits(scores, dynamic.temperature, dynamic.top_k, dynamic.top_p)
            keys = step_keys(keys, self.length)
            token = jax.vmap(jax.random.categorical)(keys, scores)
        else:
            token = jnp.argmax(scores, axis=-1)
        token = jnp.where(self.done, static.tokens.pad, token)
        sequences = self.sequences.at[:, self.length].set(token)
        return SampleState(sequences, self.length + 1, self.done | (token == static.tokens.eos))


def _decode_until(
    llama: Llama,
    state: SampleState,
    decoding: DecodeState,
    until: Int[Array, ""],
    static: StaticSettings,
    dynamic: DynamicSettings,
    keys: Key[Array, "B"] | None,
    allowed: Int[Array | np.ndarray, "choices choice"] | None,
) -> tuple[SampleState, DecodeState]:
    """Decodes until every row has ended or is `until` long, the dummy `<s>` included."""
    graphdef, params = nnx.split(llama)

    def step(carry: tuple[SampleState, DecodeState]) -> tuple[SampleState, DecodeState]:
        state, decoding = carry
        token = jnp.take(state.sequences, state.length - 1, axis=1)
        decoding = decode_token(nnx.merge(graphdef, params), decoding, token)
        return state.extend(decoding.logits, static, dynamic, keys, allowed), decoding

    def unfinished(carry: tuple[SampleState, DecodeState]) -> Bool[Array, ""]:
        return (carry[0].length < until) & ~jnp.all(carry[0].done)

    return jax.lax.while_loop(unfinished, step, (state, decoding))


def _sample(
    llama: Llama,
    decoding: DecodeState,
    static: StaticSettings,
    dynamic: DynamicSettings,
    keys: Key[Array, "B"] | None,
    allowed: Int[Array | np.ndarray, "choices choice"] | None,
) -> Int[Array, "B T"]:
    state = SampleState.start(decoding.logits.shape[0], static)
    state = state.extend(decoding.logits, static, dynamic, keys, allowed)
    state, _ = _decode_until(
        llama, state, decoding, dynamic.max_length, static, dynamic, keys, allowed
    )
    return state.sequences


class Finished(NamedTuple):
    """The best finished sequences of each row (transformers 4.31: `BeamHypotheses`).

    Attributes:
        order: when each sequence was added, from 1; 0 where there is none.
    """

    scores: Float[Array, "B beams"]
    sequences: Int[Array, "B beams T"]
    lengths: Int[Array, "B beams"]
    order: Int[Array, "B beams"]

    @classmethod
    def empty(cls, batch: int, beams: int, width: int, pad: int) -> Finished:
        """Returns `Finished` before any sequence has ended."""
        zeros = jnp.zeros((batch, beams), jnp.int32)
        sequences = jnp.full((batch, beams, width), pad)
        return cls(zeros.astype(jnp.float32), sequences, zeros, zeros)

    def full(self) -> Bool[Array, "B"]:
        """Returns which rows have as many sequences as beams."""
        return jnp.all(self.order > 0, axis=1)

    def worst(self) -> Float[Array, "B"]:
        """Returns each row's lowest score."""
        return jnp.min(jnp.where(self.order > 0, self.scores, jnp.inf), axis=1)

    def add(
        self,
        accepted: Bool[Array, "B"],
        score: Float[Array, "B"],
        sequence: Int[Array, "B T"],
        length: Int[Array, ""],
    ) -> Finished:
        """Adds each row's `sequence` where it is accepted.

        In a full row it replaces the worst sequence if it is better; of equally bad ones it
        replaces the oldest.
        """
        accepted = accepted & (~self.full() | (score > self.worst()))
        free = self.order == 0
        key = jnp.where(free, -jnp.inf, self.scores)
        lowest = key == jnp.min(key, axis=1, keepdims=True)
        lowest &= ~jnp.any(free, axis=1, keepdims=True) | free
        worst = jnp.argmin(jnp.where(lowest, self.order, jnp.iinfo(jnp.int32).max), axis=1)
        replaces = accepted[:, None] & (jnp.arange(key.shape[1]) == worst[:, None])
        newest = jnp.max(self.order, axis=1, keepdims=True) + 1
        return Finished(
            jnp.where(replaces, score[:, None], self.scores),
            jnp.where(replaces[..., None], sequence[:, None], self.sequences),
            jnp.where(replaces, length, self.lengths),
            jnp.where(replaces, newest, self.order),
        )

    def add_first(
        self,
        count: int,
        eligible: Bool[Array, "B candidates"],
        logp: Float[Array, "B candidates"],
        sequences: Int[Array, "B candidates T"],
        length: Int[Array, ""],
        dynamic: DynamicSettings,
    ) -> Finished:
        """Adds the eligible ones of each row's first `count` candidates, best first."""

        def add(n: Int[Array, ""], finished: Finished) -> Finished:
            score = logp[:, n] / _length_norm(length, dynamic)
            return finished.add(eligible[:, n], score, sequences[:, n], length)

        return jax.lax.fori_loop(0, count, add, self)

    def best(self) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
        """Returns the best sequence of each row and its length; of equals the newest."""
        key = jnp.where(self.order > 0, self.scores, -jnp.inf)
        top = (key == jnp.max(key, axis=1, keepdims=True)) & (self.order > 0)
        best = jnp.argmax(jnp.where(top, self.order, 0), axis=1)
        sequences = jnp.take_along_axis(self.sequences, best[:, None, None], axis=1)[:, 0]
        return sequences, jnp.take_along_axis(self.lengths, best[:, None], axis=1)[:, 0]


class BeamState(NamedTuple):
    """Beam search between two steps (transformers 4.31: `beam_search`, `beam_sample`,
    `BeamSearchScorer`).

    Attributes:
        parents: the beam of the previous step that each beam continues.
    """

    sequences: Int[Array, "B beams T"]
    scores: Float[Array, "B beams"]
    parents: Int[Array, "B beams"]
    length: Int[Array, ""]
    done: Bool[Array, "B"]
    finished: Finished

    @classmethod
    def start(cls, batch: int, static: StaticSettings) -> BeamState:
        """Returns the state before the first token: the dummy `<s>` alone."""
        beams, width = static.num_beams, static.output_length + 1
        sequences = jnp.full((batch, beams, width), static.tokens.pad, jnp.int32)
        # Mask all beams but the first; otherwise they would all pick the same token. Sampled
        # beams pick different tokens anyway.
        scores = jnp.zeros((batch, beams)).at[:, 1:].set(0.0 if static.do_sample else -1e9)
        return cls(
            sequences.at[:, :, 0].set(static.tokens.bos),
            scores,
            jnp.broadcast_to(jnp.arange(beams), (batch, beams)),
            jnp.int32(1),
            jnp.zeros(batch, bool),
            Finished.empty(batch, beams, width, static.tokens.pad),
        )

    def extend(
        self,
        logits: Float[Array, "rows vocab"],
        static: StaticSettings,
        dynamic: DynamicSettings,
        keys: Key[Array, "B"] | None,
        allowed: Int[Array | np.ndarray, "choices choice"] | None,
    ) -> BeamState:
        """Finds the best 2 * beams continuations of each row's beams.

        Those that end go to `finished`; the best others are the new beams. The logits of a row's
        beams follow one another.
        """
        batch, beams = self.scores.shape
        scores = jax.nn.log_softmax(logits, axis=-1)
        flat = rearrange(self.sequences, "b k t -> (b k) t")
        scores = apply_logits_processors(scores, flat, self.length, static, dynamic, allowed)
        scores = scores + self.scores.reshape(-1, 1)
        vocab = scores.shape[1]
        if static.do_sample:
            scores = filter_logits(
                scores, dynamic.temperature, dynamic.top_k, dynamic.top_p, min_tokens=2
            )
            scores = scores.reshape(batch, beams * vocab)
            keys = step_keys(keys, self.length)
            noise = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:]))(keys)
            # The largest of scores with Gumbel noise are samples without replacement.
            _, sampled = jax.lax.top_k(scores + noise, 2 * beams)
            best, order = jax.lax.top_k(jnp.take_along_axis(scores, sampled, axis=1), 2 * beams)
            index = jnp.take_along_axis(sampled, order, axis=1)
        else:
            best, index = kernels().top_k(scores.reshape(batch, beams * vocab), 2 * beams)
        parents, tokens = index // vocab, index % vocab  # [B, 2 beams]
        ends = tokens == static.tokens.eos
        sequences = jnp.take_along_axis(self.sequences, parents[..., None], axis=1)

        # An end that is not among the best `beams` does not count.
        ends_row = ends & ~self.done[:, None]
        finished = self.finished.add_first(beams, ends_row, best, sequences, self.length, dynamic)
        if static.early_stopping is True:
            enough = jnp.ones(batch, bool)
        else:
            reach = self.length
            if static.early_stopping == "never":
                reach = jnp.where(dynamic.length_penalty > 0, dynamic.max_length, reach)
            enough = finished.worst() >= best[:, 0] / _length_norm(reach, dynamic)

        survivors = jnp.argsort(ends, axis=1, stable=True)[:, :beams]  # at most `beams` of them end
        tokens = jnp.take_along_axis(tokens, survivors, axis=1)
        sequences = jnp.take_along_axis(sequences, survivors[..., None], axis=1)
        return BeamState(
            sequences.at[:, :, self.length].set(tokens),
            jnp.take_along_axis(best, survivors, axis=1),
            jnp.take_along_axis(parents, survivors, axis=1),
            self.length + 1,
            self.done | (finished.full() & enough),
            finished,
        )

    def best(self, static: StaticSettings, dynamic: DynamicSettings) -> Int[Array, "B T"]:
        """Returns the best sequence of each row, open beams included if the search was cut off."""
        open_beams = jnp.broadcast_to(~self.done[:, None], self.scores.shape)
        finished = self.finished.add_first(
            static.num_beams, open_beams, self.scores, self.sequences, self.length, dynamic
        )
        sequences, lengths = finished.best()
        at, lengths = jnp.arange(sequences.shape[1]), lengths[:, None]
        # A sequence that has ended is shorter than max_length: there is room for its </s>.
        ended = (at == lengths) & (lengths < dynamic.max_length)
        tail = jnp.where(ended, static.tokens.eos, static.tokens.pad)
        return jnp.where(at < lengths, sequences, tail)


def _length_norm(length: Int[Array, ""], dynamic: DynamicSettings) -> Float[Array, ""]:
    return length.astype(jnp.float32) ** dynamic.length_penalty


class SearchState(NamedTuple):
    """Beam search between two steps.

    Attributes:
        ancestors: the cache entries that each beam descends from.
    """

    beams: BeamState
    decoding: DecodeState
    ancestors: Bool[Array, "B beams S"]


def _beam_search(
    llama: Llama,
    decoding: DecodeState,
    static: StaticSettings,
    dynamic: DynamicSettings,
    keys: Key[Array, "B"] | None,
    allowed: Int[Array | np.ndarray, "choices choice"] | None,
) -> Int[Array, "B T"]:
    state = start_search(decoding, static, dynamic, keys, allowed)
    state = search_until(llama, state, dynamic.max_length, static, dynamic, keys, allowed)
    return state.beams.best(static, dynamic)


def start_search(
    decoding: DecodeState,
    static: StaticSettings,
    dynamic: DynamicSettings,
    keys: Key[Array, "B"] | None = None,
    allowed: Int[Array | np.ndarray, "choices choice"] | None = None,
) -> SearchState:
    """Returns the state of a beam search after its first token; see `decode`."""
    batch, beams = decoding.logits.shape[0], static.num_beams
    ancestors = jnp.repeat(decoding.cache.valid[:, None], beams, axis=1)
    decoding = decoding._replace(logits=jnp.repeat(decoding.logits, beams, axis=0))
    start = BeamState.start(batch, static)
    return SearchState(
        start.extend(decoding.logits, static, dynamic, keys, allowed), decoding, ancestors
    )


def search_until(
    llama: Llama,
    state: SearchState,
    length: Int[Array, ""],
    static: StaticSettings,
    dynamic: DynamicSettings,
    keys: Key[Array, "B"] | None = None,
    allowed: Int[Array | np.ndarray, "choices choice"] | None = None,
) -> SearchState:
    """Searches until every row is done, or sequences have `length` tokens with the dummy `<s>`,
    at most `dynamic.max_length`."""
    graphdef, params = nnx.split(llama)
    length = jnp.minimum(length, dynamic.max_length)

    def step(state: SearchState) -> SearchState:
        beams, decoding, ancestors = state
        ancestors = jnp.take_along_axis(ancestors, beams.parents[..., None], axis=1)
        tokens = jnp.take(beams.sequences, beams.length - 1, axis=2)
        decoding, ancestors = decode_beams(nnx.merge(graphdef, params), decoding, tokens, ancestors)
        beams = beams.extend(decoding.logits, static, dynamic, keys, allowed)
        return SearchState(beams, decoding, ancestors)

    def unfinished(state: SearchState) -> Bool[Array, ""]:
        return (state.beams.length < length) & ~jnp.all(state.beams.done)

    return jax.lax.while_loop(unfinished, step, state)


# --- Ranking -------------------------------------------------------------------------------------


def candidate_losses(
    llama: Llama,
    x: Float[Array, "B prompt D"],
    valid: Bool[Array, "B prompt"],
    candidates: Int[Array, "B candidates T"],
) -> Float[Array, "B candidates"]:
    """Returns the summed cross-entropy of each candidate (padded with -1) after its left-padded
    prompt.

    The prompt is read once for all its candidates.
    """
    batch, count, length = candidates.shape
    state = prefill(llama, x, valid, length - 1)[0].repeat(count)
    tokens = rearrange(candidates, "b c m -> (b c) m")
    logits = state.logits[:, None]
    if length > 1:
        here = llama.embed_tokens(jnp.maximum(tokens[:, :-1], 0)).astype(x.dtype)
        positions = state.positions[:, None] + jnp.arange(length - 1)
        hidden, _ = llama.extend(here, positions, tokens[:, :-1] >= 0, state.cache)
        more = llama.logits(hidden).astype(jnp.float32)
        logits = jnp.concatenate([logits, more], axis=1)
    logp = jax.nn.log_softmax(logits, axis=-1)
    logp = jnp.take_along_axis(logp, jnp.maximum(tokens, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(tokens >= 0, logp, 0), axis=-1).reshape(batch, count)


def mean_losses(
    sums: Float[np.ndarray, "candidates"], lengths: Sequence[int], prompt: int, segments: int = 1
) -> Float[np.ndarray, "candidates"]:
    """Returns the losses that the release ranks candidates by
    (`Emu1/models/prediction_mixin.py`).

    The release takes the mean over prompt and candidate, and counts the positions of prompt and
    padding as 0. Candidates are padded to the longest of their segment. One segment therefore
    ranks by the sums; as many segments as candidates (VisDial) favor long ones.
    """
    count = len(lengths)
    size = count // segments
    means = np.empty(count, np.float64)
    for n in range(segments):
        part = slice(n * size, count if n == segments - 1 else (n + 1) * size)
        if lengths[part]:
            means[part] = np.asarray(sums[part]) / (prompt + max(lengths[part]) - 1)
    return means


@functools.lru_cache(maxsize=64)
def choices_table(choices: tuple[tuple[int, ...], ...]) -> Int[np.ndarray, "choices choice"]:
    """Returns token sequences in the form of the `allowed` argument of `decode`."""
    table = np.full((len(choices), max(map(len, choices))), -1, np.int32)
    for row, choice in zip(table, choices, strict=True):
        row[: len(choice)] = choice
    return table
