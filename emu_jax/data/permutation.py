"""Permutations and interleavings of billions of documents, computed by number, many at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt64

_ROUNDS = 4
_WEIGHT_UNITS = 100  # of the smallest weight of a mixture, as in grain


def splitmix64(values: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """Hashes integers to 64 bits."""
    x = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ x >> np.uint64(shift)) * np.uint64(factor)
    return x ^ x >> np.uint64(31)


def shuffled(positions: Int[np.ndarray, "n"], count: int, seed: int) -> Int[np.ndarray, "n"]:
    """Returns the indices at some positions of an endless shuffled sequence of 0 .. count - 1.

    Each run of `count` positions, an epoch, is a permutation of its own. It is a Feistel network
    over pairs (a, b) of a grid of at least `count` cells; cells beyond `count` are walked over.

    Args:
        count: at most 2^62.
        seed: seed of the order, at most 32 bits.
    """
    height = math.isqrt(count - 1) + 1
    width = -(-count // height)
    epochs, cells = np.divmod(positions, count)
    keys = splitmix64(epochs.astype(np.uint64) ^ np.uint64(seed << 32))
    result = _permuted(cells.astype(np.uint64), keys, height, width)
    while len(beyond := np.flatnonzero(result >= count)):
        result[beyond] = _permuted(result[beyond], keys[beyond], height, width)
    return result.astype(np.int64)


def _permuted(
    cells: UInt64[np.ndarray, "n"], keys: UInt64[np.ndarray, "n"], height: int, width: int
) -> UInt64[np.ndarray, "n"]:
    rows, columns = np.divmod(cells, np.uint64(width))
    for _ in range(_ROUNDS):
        rows = (rows + splitmix64(columns ^ keys) % np.uint64(height)) % np.uint64(height)
        keys = splitmix64(keys)
        columns = (columns + splitmix64(rows ^ keys) % np.uint64(width)) % np.uint64(width)
        keys = splitmix64(keys)
    return rows * np.uint64(width) + columns


def mixed(
    numbers: Int[np.ndarray, "n"], weights: Sequence[float]
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Interleaves endless sequences in proportion to weights, evenly and without randomness.

    Returns:
        The sequence that each number is taken from, and its position there. They are those of
        `grain.MapDataset.mix`.
    """
    units = [int(weight * (_WEIGHT_UNITS / min(weights))) for weight in weights]
    remaining = sum(units)
    sources = np.zeros_like(numbers)
    positions = np.zeros_like(numbers)
    waiting = np.ones(len(numbers), bool)
    now, after = numbers, numbers + 1
    for n, own in enumerate(units):
        next_now = _scaled(now, remaining - own, remaining)
        next_after = _scaled(after, remaining - own, remaining)
        taken = waiting & (now - next_now != after - next_after)
        sources[taken], positions[taken] = n, (after - next_after)[taken] - 1
        waiting &= ~taken
        remaining -= own
        now, after = next_now, next_after
    return sources, positions


def _scaled(values: Int[np.ndarray, "n"], factor: int, divisor: int) -> Int[np.ndarray, "n"]:
    """Returns values * factor // divisor without overflow."""
    quotients, rests = np.divmod(values, divisor)
    return quotients * factor + rests * factor // divisor
