"""Text decoding as the release does it: transformers 4.31 `generate` on `inputs_embeds`.

There a generated sequence starts from a dummy `<s>` that is never read by the model, but
counts: for `min_length`, for the length that a beam's score is divided by, for repetition
penalties and n-grams. `max_new_tokens` does not count it.

A prompt is read once; then one `lax.while_loop` holds processors, choice and the model's next
step, on a KV cache that is updated in place. The beams of a prompt share its keys and values:
only the generated slots are gathered when beams change places.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from emu_jax.config import TokenIds
from emu_jax.errors import UserError
from emu_jax.models.kv_cache import KVCache
from emu_jax.models.llama import Llama

# How often each program was traced: once per bucket of shapes, as the tests hold.
TRACES: Counter[str] = Counter()
MAX_SEED = 2**32 - 1  # JAX keeps 32 bits of a seed


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Settings of text decoding; the defaults are the release's
    (`Emu1/models/modeling_emu.py: generate`).

    Attributes:
        top_k: 0 keeps every token.
        min_length: counts the dummy `<s>`: 1 allows an empty answer.
        length_penalty: a beam's score is divided by length ** length_penalty.
        no_repeat_ngram_size: 0 allows repetition.
        early_stopping: True ends a search when `num_beams` sequences are finished, False when
            a better one is unlikely, "never" when it is impossible.
        seed: of sampling, from 0 to 2**32 - 1. Row i of a batch samples with a key that
            follows from the seed and i.
    """

    max_new_tokens: int = 50
    num_beams: int = 5
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.9
    min_length: int = 1
    repetition_penalty: float = 1.0
    length_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    early_stopping: Any = False
    seed: int = 0

    def check(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is invalid.
        """
        check_types(self)
        wrong = {
            "max_new_tokens": self.max_new_tokens < 1,
            "num_beams": self.num_beams < 1,
            "temperature": self.temperature <= 0,
            "top_k": self.top_k < 0,
            "top_p": not 0 < self.top_p <= 1,
            "repetition_penalty": self.repetition_penalty <= 0,
            "no_repeat_ngram_size": self.no_repeat_ngram_size < 0,
            "early_stopping": self.early_stopping not in (True, False, "never"),
            "min_length": self.min_length > self.max_new_tokens + 1,
        }
        for name in (name for name, is_wrong in wrong.items() if is_wrong):
            hint = f" with max_new_tokens {self.max_new_tokens}" if name == "min_length" else ""
            raise UserError(f"{name} cannot be {getattr(self, name)!r}{hint}")


def check_types(settings: Any) -> None:
    """Checks the fields of a settings dataclass that are annotated `int`, `float` or `str`.

    Raises:
        UserError: a value of another type, not finite, or outside 32 bits.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name == "seed":
            check_seed(value)
        elif field.type == "int" and not (
            isinstance(value, int | np.integer)
            and not isinstance(value, bool)
            and abs(value) < 2**31 - 1
        ):
            raise UserError(f"{field.name} cannot be {_shown(value)}: give a whole number")
        elif field.type == "float" and not (
            isinstance(value, int | float | np.integer | np.floating)
            and not isinstance(value, bool)
            and abs(value) <= float(np.finfo(np.float32).max)
        ):
            raise UserError(f"{field.name} cannot be {_shown(value)}: give a finite number")
        elif field.type == "str" and not isinstance(value, str):
            raise UserError(f"{field.name} cannot be {_shown(value)}: give a string")


def check_seed(seed: Any) -> None:
    """Checks that a seed is one of the 2**32 that JAX tells apart.

    Raises:
        UserError: it is not a whole number from 0 to 2**32 - 1.
    """
    if (
        not isinstance(seed, int | np.integer)
        or isinstance(seed, bool)
        or not 0 <= seed < MAX_SEED + 1
    ):
        raise UserError(f"seed cannot be {_shown(seed)}: give a whole number from 0 to {MAX_SEED}")


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 10**40:
        return f"a number of {value.bit_length()} bits"
    return repr(value)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The part of the settings that a compiled program is made for."""

    slots: int  # generated tokens there is room for
    num_beams: int
    do_sample: bool
    penalise: bool
    ngram: int
    early_stopping: Any
    tokens: TokenIds

    @classmethod
    def of(cls, cfg: TextConfig, tokens: TokenIds, least: int = 8) -> Plan:
        return cls(
            bucket(cfg.max_new_tokens, least),
            cfg.num_beams,
            cfg.do_sample,
            cfg.repetition_penalty != 1.0,
            cfg.no_repeat_ngram_size,
            cfg.early_stopping,
            tokens,
        )


class Rules(NamedTuple):
    """The part that may change without a new compilation."""

    max_length: Int[Array, ""]  # with the dummy <s>
    min_length: Int[Array, ""]
    repetition_penalty: Float[Array, ""]
    length_penalty: Float[Array, ""]
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]

    @classmethod
    def of(cls, cfg: TextConfig) -> Rules:
        i, f = jnp.int32, jnp.float32
        return cls(
            i(cfg.max_new_tokens + 1),
            i(cfg.min_length),
            f(cfg.repetition_penalty),
            f(cfg.length_penalty),
            f(cfg.temperature),
            i(cfg.top_k),
            f(cfg.top_p),
        )


def bucket(n: int, least: int = 8) -> int:
    """The smallest of 8, 12, 16, 24, 32, 48, ... that holds n, so that few shapes are compiled."""
    power = 1 << max(n - 1, 0).bit_length()
    return max(least, power * 3 // 4 if n <= power * 3 // 4 else power)


# --- Processors: scores [R, V] of the next token, from the sequences so far ---------------------


def penalise_repetition(
    scores: Float[Array, "R V"],
    sequences: Int[Array, "R T"],
    length: Int[Array, ""],
    penalty: Float[Array, ""],
) -> Float[Array, "R V"]:
    """Scores of tokens already there move down: a negative one is multiplied by the penalty,
    a positive one divided."""
    rows, written = jnp.arange(scores.shape[0])[:, None], jnp.arange(sequences.shape[1]) < length
    seen = jnp.zeros(scores.shape, bool).at[rows, sequences].max(written[None])
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def forbid_ngrams(
    scores: Float[Array, "R V"], sequences: Int[Array, "R T"], length: Int[Array, ""], n: int
) -> Float[Array, "R V"]:
    """No token may complete an n-gram that is already there."""
    starts = jnp.arange(sequences.shape[1] - n + 1)
    prefix = length - n + 1 + jnp.arange(n - 1)  # of the n-gram that the next token completes
    prefix = jnp.take(sequences, jnp.maximum(prefix, 0), axis=1)  # [R, n - 1]
    windows = jnp.take(sequences, starts[:, None] + jnp.arange(n - 1), axis=1)  # [R, W, n - 1]
    same = jnp.all(windows == prefix[:, None], axis=-1) & (starts + n <= length)
    rows, last = jnp.arange(scores.shape[0])[:, None], sequences[:, n - 1 :]
    return scores.at[rows, last].min(jnp.where(same, -jnp.inf, jnp.inf))


def forbid_short(
    scores: Float[Array, "R V"], length: Int[Array, ""], least: Int[Array, ""], eos: int
) -> Float[Array, "R V"]:
    """No `</s>` while the sequence is shorter than `least`."""
    return scores.at[:, eos].min(jnp.where(length < least, -jnp.inf, jnp.inf))


def allow_only(
    scores: Float[Array, "R V"],
    sequences: Int[Array, "R T"],
    length: Int[Array, ""],
    allowed: Int[Array, "C M"],
) -> Float[Array, "R V"]:
    """Only tokens that continue one of the `allowed` sequences (padded with -1), each of which
    begins behind the dummy `<s>`: a trie's children."""
    width = allowed.shape[1]
    written = jnp.take(sequences, 1 + jnp.arange(width), axis=1, mode="clip")  # [R, M]
    same = written[:, None] == allowed  # [R, C, M]
    along = jnp.all(same | (jnp.arange(width) >= length - 1), axis=-1)  # [R, C]
    following = jnp.take(allowed, length - 1, axis=1, mode="fill", fill_value=-1)  # [C]
    along &= following >= 0
    rows = jnp.arange(scores.shape[0])[:, None]
    mask = jnp.zeros(scores.shape, bool).at[rows, jnp.maximum(following, 0)].max(along)
    return jnp.where(mask, scores, -jnp.inf)


def process(
    scores: Float[Array, "R V"],
    sequences: Int[Array, "R T"],
    length: Int[Array, ""],
    plan: Plan,
    rules: Rules,
    allowed: Int[Array, "C M"] | None,
) -> Float[Array, "R V"]:
    """All processors, in the order of transformers 4.31."""
    if plan.penalise:
        scores = penalise_repetition(scores, sequences, length, rules.repetition_penalty)
    if plan.ngram:
        scores = forbid_ngrams(scores, sequences, length, plan.ngram)
    scores = forbid_short(scores, length, rules.min_length, plan.tokens.eos)
    if allowed is not None:
        scores = allow_only(scores, sequences, length, allowed)
    return scores


def warp(
    scores: Float[Array, "R V"],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
    *,
    keep: int = 1,
) -> Float[Array, "R V"]:
    """Filters logits for sampling: divides by the temperature, keeps the `top_k` best tokens
    (0: all), then the fewest of these whose probabilities reach `top_p`. At least `keep` tokens
    remain."""
    vocab = scores.shape[1]
    order = jnp.argsort(scores / temperature, axis=1)
    ranked = jnp.take_along_axis(scores / temperature, order, axis=1)  # ascending
    k = jnp.where(top_k > 0, jnp.clip(top_k, keep, vocab), vocab)
    ranked = jnp.where(ranked < jnp.take(ranked, vocab - k, axis=1)[:, None], -jnp.inf, ranked)
    cumulative = jnp.cumsum(jax.nn.softmax(ranked, axis=1), axis=1)
    drop = (cumulative <= 1 - top_p) & (jnp.arange(vocab) < vocab - keep) & (top_p < 1)
    ranked = jnp.where(drop, -jnp.inf, ranked)
    return jnp.zeros_like(scores).at[jnp.arange(scores.shape[0])[:, None], order].set(ranked)


# --- Decoding ------------------------------------------------------------------------------------


class Reader(NamedTuple):
    """A language model in the middle of its rows."""

    cache: KVCache
    positions: Int[Array, "R"]  # of the next token
    logits: Float[Array, "R V"]  # for it


def prefill(
    llama: Llama, x: Float[Array, "B T D"], valid: Bool[Array, "B T"], slots: int
) -> tuple[Reader, Float[Array, "B D"]]:
    """Reads left-padded prompts; there is room for `slots` more. Also the last state, [B, D]."""
    # The release counts positions from the first real token; padding has position 1.
    positions = jnp.where(valid, jnp.cumsum(valid, axis=1) - 1, 1)
    cache = llama.empty_cache(x.shape[0], x.shape[1] + slots, x.dtype)
    hidden, cache = llama.extend(x, positions, valid, cache)
    last = hidden[:, -1:]
    logits = llama.logits(last)[:, 0].astype(jnp.float32)
    return Reader(cache, jnp.sum(valid, axis=1), logits), last[:, 0]


def read_token(llama: Llama, reader: Reader, tokens: Int[Array, "R"]) -> Reader:
    """One more token of every row."""
    hidden, cache = _read(llama, reader, tokens[:, None])
    logits = llama.logits(hidden)[:, 0].astype(jnp.float32)
    return Reader(cache, reader.positions + 1, logits)


def read_beams(
    llama: Llama, reader: Reader, tokens: Int[Array, "B K"], ancestors: Bool[Array, "B K S"]
) -> tuple[Reader, Bool[Array, "B K S"]]:
    """One more token of every beam: K slots of a row. `ancestors` are the slots that each beam
    has come by; they come back with its new one. Logits are [B K, V]."""
    slots, beams = jnp.arange(ancestors.shape[2]), jnp.arange(tokens.shape[1])
    ancestors |= slots == reader.cache.used + beams[:, None]
    hidden, cache = _read(llama, reader, tokens, mask=ancestors)
    logits = rearrange(llama.logits(hidden), "b k v -> (b k) v").astype(jnp.float32)
    return Reader(cache, reader.positions + 1, logits), ancestors


def _read(llama: Llama, reader: Reader, tokens: Int[Array, "B T"], **how):
    x = llama.embed_tokens(tokens).astype(reader.cache.dtype)
    positions = jnp.broadcast_to(reader.positions[:, None], tokens.shape)
    return llama.extend(x, positions, jnp.ones(tokens.shape, bool), reader.cache, **how)


def decode(
    llama: Llama,
    x: Float[Array, "B P D"],
    valid: Bool[Array, "B P"],
    plan: Plan,
    rules: Rules,
    keys: Key[Array, "B"],
    allowed: Int[Array, "C M"] | None = None,
) -> Int[Array, "B T"]:
    """Generated ids with the dummy `<s>` in front, padded behind `</s>`.

    Args:
        x: embeddings of left-padded prompts; `valid` is False on the padding.
        keys: one for each row, used by sampling.
        allowed: the only sequences that may come out, padded with -1; each should end in
            `</s>`.
    """
    llama = llama.unstacked_for_decoding()
    reader, _ = prefill(llama, x, valid, plan.num_beams * (plan.slots - 1))
    return (_search if plan.num_beams > 1 else _walk)(llama, reader, plan, rules, keys, allowed)


class Walk(NamedTuple):
    """Greedy decoding or sampling, between two steps. A caller that shows text as it comes
    may run `walk_on` a few tokens at a time."""

    sequences: Int[Array, "B T"]
    length: Int[Array, ""]
    done: Bool[Array, "B"]

    @classmethod
    def start(cls, batch: int, plan: Plan) -> Walk:
        sequences = jnp.full((batch, plan.slots + 1), plan.tokens.pad, jnp.int32)
        return cls(sequences.at[:, 0].set(plan.tokens.bos), jnp.int32(1), jnp.zeros(batch, bool))

    def extend(self, logits: Float[Array, "B V"], plan: Plan, rules: Rules, keys, allowed) -> Walk:
        """Appends the next token of every row that has not ended."""
        scores = process(logits, self.sequences, self.length, plan, rules, allowed)
        if plan.do_sample:
            scores = warp(scores, rules.temperature, rules.top_k, rules.top_p)
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, self.length)
            token = jax.vmap(jax.random.categorical)(keys, scores)
        else:
            token = jnp.argmax(scores, axis=-1)
        token = jnp.where(self.done, plan.tokens.pad, token)
        sequences = self.sequences.at[:, self.length].set(token)
        return Walk(sequences, self.length + 1, self.done | (token == plan.tokens.eos))


def walk_on(
    llama: Llama,
    state: Walk,
    reader: Reader,
    until: Int[Array, ""],
    plan: Plan,
    rules: Rules,
    keys,
    allowed,
) -> tuple[Walk, Reader]:
    """Goes on until every row has ended or is `until` long (with the dummy `<s>`)."""
    graphdef, params = nnx.split(llama)

    def step(carry):
        state, reader = carry
        token = jnp.take(state.sequences, state.length - 1, axis=1)
        reader = read_token(nnx.merge(graphdef, params), reader, token)
        return state.extend(reader.logits, plan, rules, keys, allowed), reader

    def go_on(carry):
        return (carry[0].length < until) & ~jnp.all(carry[0].done)

    return jax.lax.while_loop(go_on, step, (state, reader))


def _walk(llama, reader: Reader, plan, rules, keys, allowed) -> Int[Array, "B T"]:
    state = Walk.start(reader.logits.shape[0], plan)
    state = state.extend(reader.logits, plan, rules, keys, allowed)
    return walk_on(llama, state, reader, rules.max_length, plan, rules, keys, allowed)[0].sequences


class Finished(NamedTuple):
    """The best finished sequences of each row, K places (4.31: `BeamHypotheses`)."""

    scores: Float[Array, "B K"]
    sequences: Int[Array, "B K T"]
    lengths: Int[Array, "B K"]
    order: Int[Array, "B K"]  # when each came in, from 1; 0 marks a free place

    @classmethod
    def none(cls, batch: int, beams: int, width: int, pad: int) -> Finished:
        zeros = jnp.zeros((batch, beams), jnp.int32)
        sequences = jnp.full((batch, beams, width), pad)
        return cls(zeros.astype(jnp.float32), sequences, zeros, zeros)

    def full(self) -> Bool[Array, "B"]:
        return jnp.all(self.order > 0, axis=1)

    def worst(self) -> Float[Array, "B"]:
        return jnp.min(jnp.where(self.order > 0, self.scores, jnp.inf), axis=1)

    def add(self, wanted, score, sequence, length) -> Finished:
        """Takes a sequence [B, T] in where `wanted` [B], if there is a free place or it is
        better than the worst, which then goes; of equals the oldest goes."""
        wanted = wanted & (~self.full() | (score > self.worst()))
        free = self.order == 0
        key = jnp.where(free, -jnp.inf, self.scores)
        lowest = key == jnp.min(key, axis=1, keepdims=True)
        lowest &= ~jnp.any(free, axis=1, keepdims=True) | free
        place = jnp.argmin(jnp.where(lowest, self.order, jnp.iinfo(jnp.int32).max), axis=1)
        here = wanted[:, None] & (jnp.arange(key.shape[1]) == place[:, None])
        newest = jnp.max(self.order, axis=1, keepdims=True) + 1
        return Finished(
            jnp.where(here, score[:, None], self.scores),
            jnp.where(here[..., None], sequence[:, None], self.sequences),
            jnp.where(here, length, self.lengths),
            jnp.where(here, newest, self.order),
        )

    def best(self) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
        """The best sequence of each row and its length; of equals the newest."""
        key = jnp.where(self.order > 0, self.scores, -jnp.inf)
        top = (key == jnp.max(key, axis=1, keepdims=True)) & (self.order > 0)
        place = jnp.argmax(jnp.where(top, self.order, 0), axis=1)
        sequences = jnp.take_along_axis(self.sequences, place[:, None, None], axis=1)[:, 0]
        return sequences, jnp.take_along_axis(self.lengths, place[:, None], axis=1)[:, 0]


class Search(NamedTuple):
    """Beam search between two steps: K beams for each row (4.31: `beam_search`, `beam_sample`,
    `BeamSearchScorer`)."""

    sequences: Int[Array, "B K T"]
    scores: Float[Array, "B K"]
    parents: Int[Array, "B K"]  # which beam of the step before each one continues
    length: Int[Array, ""]
    done: Bool[Array, "B"]
    finished: Finished

    @classmethod
    def start(cls, batch: int, plan: Plan) -> Search:
        beams, width = plan.num_beams, plan.slots + 1
        sequences = jnp.full((batch, beams, width), plan.tokens.pad, jnp.int32)
        # All beams are equal at first: only one of them may speak, lest all choose the same.
        # Beam sampling has no need of it, as its beams draw different tokens.
        scores = jnp.zeros((batch, beams)).at[:, 1:].set(0.0 if plan.do_sample else -1e9)
        return cls(
            sequences.at[:, :, 0].set(plan.tokens.bos),
            scores,
            jnp.broadcast_to(jnp.arange(beams), (batch, beams)),
            jnp.int32(1),
            jnp.zeros(batch, bool),
            Finished.none(batch, beams, width, plan.tokens.pad),
        )

    def extend(
        self, logits: Float[Array, "R V"], plan: Plan, rules: Rules, keys, allowed
    ) -> Search:
        """The best 2 K continuations of a row's beams (R = B K rows of logits): those that end
        go to `finished`, the best K others are the new beams."""
        batch, beams = self.scores.shape
        scores = jax.nn.log_softmax(logits, axis=-1)
        flat = rearrange(self.sequences, "b k t -> (b k) t")
        scores = process(scores, flat, self.length, plan, rules, allowed)
        scores = scores + self.scores.reshape(-1, 1)
        vocab = scores.shape[1]
        if plan.do_sample:
            scores = warp(scores, rules.temperature, rules.top_k, rules.top_p, keep=2)
            scores = scores.reshape(batch, beams * vocab)
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, self.length)
            noise = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:]))(keys)
            # The largest of scores with Gumbel noise are draws without replacement.
            _, drawn = jax.lax.top_k(scores + noise, 2 * beams)
            best, order = jax.lax.top_k(jnp.take_along_axis(scores, drawn, axis=1), 2 * beams)
            index = jnp.take_along_axis(drawn, order, axis=1)
        else:
            best, index = jax.lax.top_k(scores.reshape(batch, beams * vocab), 2 * beams)
            # Or XLA's CPU compiler, mixing what follows into it, sorts the whole vocabulary.
            # One barrier each: XLA aborts on a sharded top_k whose tuple goes into one whole.
            best, index = map(jax.lax.optimization_barrier, (best, index))
        parents, tokens = index // vocab, index % vocab  # [B, 2 K]
        ends = tokens == plan.tokens.eos
        sequences = jnp.take_along_axis(self.sequences, parents[..., None], axis=1)

        def take(k, finished: Finished) -> Finished:
            score = best[:, k] / _norm(self.length, rules)
            return finished.add(ends[:, k] & ~self.done, score, sequences[:, k], self.length)

        # An end that is not among the best K does not count.
        finished = jax.lax.fori_loop(0, beams, take, self.finished)
        if plan.early_stopping is True:
            enough = jnp.ones(batch, bool)
        else:
            reach = self.length
            if plan.early_stopping == "never":
                reach = jnp.where(rules.length_penalty > 0, rules.max_length, reach)
            enough = finished.worst() >= best[:, 0] / _norm(reach, rules)

        on = jnp.argsort(ends, axis=1, stable=True)[:, :beams]  # at most K of the 2 K end
        tokens = jnp.take_along_axis(tokens, on, axis=1)
        sequences = jnp.take_along_axis(sequences, on[..., None], axis=1)
        return Search(
            sequences.at[:, :, self.length].set(tokens),
            jnp.take_along_axis(best, on, axis=1),
            jnp.take_along_axis(parents, on, axis=1),
            self.length + 1,
            self.done | (finished.full() & enough),
            finished,
        )

    def best(self, plan: Plan, rules: Rules) -> Int[Array, "B T"]:
        """The best sequence of each row, open beams included where the search was cut off."""

        def take(k, finished: Finished) -> Finished:
            score = self.scores[:, k] / _norm(self.length, rules)
            return finished.add(~self.done, score, self.sequences[:, k], self.length)

        finished = jax.lax.fori_loop(0, plan.num_beams, take, self.finished)
        sequences, lengths = finished.best()
        at, lengths = jnp.arange(sequences.shape[1]), lengths[:, None]
        # A sequence that has ended is shorter than max_length: there is room for its </s>.
        ended = (at == lengths) & (lengths < rules.max_length)
        tail = jnp.where(ended, plan.tokens.eos, plan.tokens.pad)
        return jnp.where(at < lengths, sequences, tail)


def _norm(length: Int[Array, ""], rules: Rules) -> Float[Array, ""]:
    return length.astype(jnp.float32) ** rules.length_penalty


def _search(llama, reader: Reader, plan, rules, keys, allowed) -> Int[Array, "B T"]:
    batch, beams = reader.logits.shape[0], plan.num_beams
    graphdef, params = nnx.split(llama)

    def step(carry):
        state, reader, ancestors = carry
        ancestors = jnp.take_along_axis(ancestors, state.parents[..., None], axis=1)
        tokens = jnp.take(state.sequences, state.length - 1, axis=2)
        reader, ancestors = read_beams(nnx.merge(graphdef, params), reader, tokens, ancestors)
        return state.extend(reader.logits, plan, rules, keys, allowed), reader, ancestors

    def go_on(carry):
        return (carry[0].length < rules.max_length) & ~jnp.all(carry[0].done)

    ancestors = jnp.repeat(reader.cache.valid[:, None], beams, axis=1)
    reader = reader._replace(logits=jnp.repeat(reader.logits, beams, axis=0))
    state = Search.start(batch, plan).extend(reader.logits, plan, rules, keys, allowed)
    state, *_ = jax.lax.while_loop(go_on, step, (state, reader, ancestors))
    return state.best(plan, rules)


# --- Ranking -------------------------------------------------------------------------------------


def candidate_losses(
    llama: Llama,
    x: Float[Array, "B P D"],
    valid: Bool[Array, "B P"],
    candidates: Int[Array, "B C M"],
) -> Float[Array, "B C"]:
    """Summed cross-entropy of each candidate (padded with -1) behind its left-padded prompt.

    The prompt is read once for all its candidates.
    """
    batch, count, length = candidates.shape
    reader = _repeat(prefill(llama, x, valid, length - 1)[0], count)
    tokens = rearrange(candidates, "b c m -> (b c) m")
    logits = reader.logits[:, None]
    if length > 1:
        here = llama.embed_tokens(jnp.maximum(tokens[:, :-1], 0)).astype(x.dtype)
        positions = reader.positions[:, None] + jnp.arange(length - 1)
        hidden, _ = llama.extend(here, positions, tokens[:, :-1] >= 0, reader.cache)
        more = llama.logits(hidden).astype(jnp.float32)
        logits = jnp.concatenate([logits, more], axis=1)
    logp = jax.nn.log_softmax(logits, axis=-1)
    logp = jnp.take_along_axis(logp, jnp.maximum(tokens, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(tokens >= 0, logp, 0), axis=-1).reshape(batch, count)


def _repeat(reader: Reader, times: int) -> Reader:
    """Every row `times` times in a row."""
    positions, logits = (jnp.repeat(a, times, axis=0) for a in (reader.positions, reader.logits))
    return Reader(reader.cache.repeat(times), positions, logits)


def mean_losses(
    sums: Float[np.ndarray, "C"], lengths: Sequence[int], prompt: int, segments: int = 1
) -> Float[np.ndarray, "C"]:
    """The losses that the release ranks candidates by (`Emu1/models/prediction_mixin.py`).

    It takes the mean over prompt and candidate, where the prompt's and the padding's positions
    count as 0; candidates are padded to the longest of their segment. One segment therefore
    ranks by the sums; as many segments as candidates (VisDial) favour long ones.
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
def choices_table(choices: tuple[tuple[int, ...], ...]) -> Int[np.ndarray, "C M"]:
    """Token sequences as `decode`'s `allowed`."""
    table = np.full((len(choices), max(map(len, choices))), -1, np.int32)
    for row, choice in zip(table, choices, strict=True):
        row[: len(choice)] = choice
    return table
