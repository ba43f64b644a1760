"""Batches of few shapes, so that few programs are compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int

from emu_jax.generate.prompt import Prompt, PromptBatch, pad
from emu_jax.generate.settings import bucket


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The smallest sizes that programs are compiled for; larger ones are rounded up.

    A caller whose requests vary at random, such as a server, raises them. It then compiles fewer
    programs, which compute on a little more padding.

    Attributes:
        length: tokens of a prompt.
        images: images of a prompt.
        new_tokens: room for generated text tokens.
    """

    length: int = 16
    images: int = 1
    new_tokens: int = 8


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Rows that are computed at once.

    Attributes:
        index: which rows they are.
        filled: the same, repeating the last one up to the batch's number of rows.
    """

    index: Int[np.ndarray, "rows"]
    filled: Int[np.ndarray, "filled"]


class Batcher:
    """Cuts any number of rows into batches of few shapes.

    Args:
        size: rows that are computed at once.
        pad_id: token id of padding.
    """

    def __init__(self, size: int, shapes: Shapes, pad_id: int) -> None:
        self.size, self.shapes, self._pad_id = size, shapes, pad_id

    def chunks(self, index: Int[np.ndarray, "rows"] | int, *, per_row: int = 1) -> Iterator[Chunk]:
        """Yields chunks that all compute the same number of rows, the last one included.

        Args:
            index: the rows, or their number.
            per_row: how many sequences a row stands for, such as its beams.
        """
        index = np.arange(index) if isinstance(index, int) else index
        size = max(1, self.size // per_row)
        rows = size if len(index) > size else min(size, bucket(len(index), 1))
        for start in range(0, len(index), size):
            part = index[start : start + size]
            yield Chunk(part, part[np.minimum(np.arange(rows), len(part) - 1)])

    def batches(
        self, prompts: Sequence[Prompt], side: Literal["left", "right"], *, per_row: int = 1
    ) -> Iterator[tuple[Chunk, PromptBatch]]:
        """Yields batches of prompts of similar lengths, padded on `side`."""
        for chunk in self.chunks(by_length(prompts), per_row=per_row):
            part = [prompts[i] for i in chunk.index]
            length = bucket(max(len(p.tokens) for p in part), self.shapes.length)
            images = bucket(max(len(p.images) for p in part), self.shapes.images)
            rows = len(chunk.filled)
            yield (
                chunk,
                pad(part, side, rows=rows, length=length, images=images, fill=self._pad_id),
            )


def by_length(prompts: Sequence[Prompt]) -> Int[np.ndarray, "prompts"]:
    """Returns the order of prompts from the shortest to the longest."""
    return np.argsort([len(p.tokens) for p in prompts], kind="stable")
