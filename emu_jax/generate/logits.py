"""Logits processors and sampling filters, as in transformers 4.31.

Scores are [rows, vocab], of the next token. `sequences` [rows, T] start with the dummy `<s>`, and
their first `length` tokens are written.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from emu_jax.generate.settings import DynamicSettings, StaticSettings


def apply_logits_processors(
    scores: Float[Array, "rows vocab"],
    sequences: Int[Array, "rows T"],
    length: Int[Array, ""],
    static: StaticSettings,
    dynamic: DynamicSettings,
    allowed: Int[Array | np.ndarray, "choices choice"] | None,
) -> Float[Array, "rows vocab"]:
    """Applies all processors in the order of transformers."""
    if static.penalize_repetition:
        scores = penalize_repetition(scores, sequences, length, dynamic.repetition_penalty)
    if static.no_repeat_ngram_size:
        scores = forbid_ngrams(scores, sequences, length, static.no_repeat_ngram_size)
    scores = enforce_min_length(scores, length, dynamic.min_length, static.tokens.eos)
    if allowed is not None:
        scores = allow_only(scores, sequences, length, allowed)
    return scores


def penalize_repetition(
    scores: Float[Array, "rows vocab"],
    sequences: Int[Array, "rows T"],
    length: Int[Array, ""],
    penalty: Float[Array, ""],
) -> Float[Array, "rows vocab"]:
    """Lowers the scores of tokens already written: multiplies negative ones by the penalty and
    divides positive ones by it."""
    rows, written = jnp.arange(scores.shape[0])[:, None], jnp.arange(sequences.shape[1]) < length
    seen = jnp.zeros(scores.shape, bool).at[rows, sequences].max(written[None])
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def forbid_ngrams(
    scores: Float[Array, "rows vocab"],
    sequences: Int[Array, "rows T"],
    length: Int[Array, ""],
    n: int,
) -> Float[Array, "rows vocab"]:
    """Forbids tokens that would complete an n-gram already written."""
    starts = jnp.arange(sequences.shape[1] - n + 1)
    prefix = length - n + 1 + jnp.arange(n - 1)  # of the n-gram that the next token completes
    prefix = jnp.take(sequences, jnp.maximum(prefix, 0), axis=1)  # [rows, n - 1]
    windows = jnp.take(sequences, starts[:, None] + jnp.arange(n - 1), axis=1)
    same = jnp.all(windows == prefix[:, None], axis=-1) & (starts + n <= length)
    rows, last = jnp.arange(scores.shape[0])[:, None], sequences[:, n - 1 :]
    return scores.at[rows, last].min(jnp.where(same, -jnp.inf, jnp.inf))


def enforce_min_length(
    scores: Float[Array, "rows vocab"],
    length: Int[Array, ""],
    min_length: Int[Array, ""],
    eos: int,
) -> Float[Array, "rows vocab"]:
    """Forbids `</s>` while the sequence is shorter than `min_length`."""
    return scores.at[:, eos].min(jnp.where(length < min_length, -jnp.inf, jnp.inf))


def allow_only(
    scores: Float[Array, "rows vocab"],
    sequences: Int[Array, "rows T"],
    length: Int[Array, ""],
    allowed: Int[Array | np.ndarray, "choices choice"],
) -> Float[Array, "rows vocab"]:
    """Allows only tokens that continue one of the `allowed` sequences.

    These are padded with -1 and start behind the dummy `<s>`.
    """
    width = allowed.shape[1]
    written = jnp.take(sequences, 1 + jnp.arange(width), axis=1, mode="clip")
    same = written[:, None] == allowed  # [rows, choices, choice]
    along = jnp.all(same | (jnp.arange(width) >= length - 1), axis=-1)  # [rows, choices]
    following = jnp.take(allowed, length - 1, axis=1, mode="fill", fill_value=-1)  # [choices]
    along &= following >= 0
    rows = jnp.arange(scores.shape[0])[:, None]
    mask = jnp.zeros(scores.shape, bool).at[rows, jnp.maximum(following, 0)].max(along)
    return jnp.where(mask, scores, -jnp.inf)


def filter_logits(
    scores: Float[Array, "rows vocab"],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
    *,
    min_tokens: int = 1,
) -> Float[Array, "rows vocab"]:
    """Filters logits for sampling: temperature, then top-k, then top-p.

    Args:
        top_k: keeps that many of the best tokens; 0 keeps all.
        top_p: keeps the fewest of these whose probabilities reach it.
        min_tokens: at least that many tokens remain.
    """
    vocab = scores.shape[1]
    order = jnp.argsort(scores / temperature, axis=1)
    ranked = jnp.take_along_axis(scores / temperature, order, axis=1)  # ascending
    k = jnp.where(top_k > 0, jnp.clip(top_k, min_tokens, vocab), vocab)
    ranked = jnp.where(ranked < jnp.take(ranked, vocab - k, axis=1)[:, None], -jnp.inf, ranked)
    cumulative = jnp.cumsum(jax.nn.softmax(ranked, axis=1), axis=1)
    drop = (cumulative <= 1 - top_p) & (jnp.arange(vocab) < vocab - min_tokens) & (top_p < 1)
    ranked = jnp.where(drop, -jnp.inf, ranked)
    return jnp.zeros_like(scores).at[jnp.arange(scores.shape[0])[:, None], order].set(ranked)
