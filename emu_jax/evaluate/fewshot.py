"""Examples before a question: which ones, and in which order.

`text`: the same for every question, drawn with the seed, without their pictures (the paper's `*`).
`random`: drawn anew for each question.
`rices`: those whose pictures are most like the question's (Yang et al. 2021, arXiv:2109.05014),
    by the cosine of the model's own visual encoder's output; the most similar stands last.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from emu_jax.config import UserError
from emu_jax.data.storage import writing
from emu_jax.evaluate.tasks.base import Example, Item, Shown

log = logging.getLogger(__name__)

Examples = Literal["none", "text", "random", "rices"]
CHUNK = 1024  # pictures whose features lie in one file

# Features [B, W] of files of pictures or videos.
Featurize = Callable[[Sequence[Path]], np.ndarray]


class FewShot:
    """Chooses the examples that are shown before each item.

    Args:
        support: what is chosen from.
        shots: how many.
        seed: of what is drawn; the same for any number of processes.

    Raises:
        UserError: there are fewer examples than are to be shown.
    """

    def __init__(self, kind: Examples, support: Sequence[Example], shots: int, seed: int):
        self.kind, self.shots, self.seed = kind, shots, seed
        self.support = list(support)
        of_each: dict[Path, list[Example]] = {}
        for example in self.support:
            of_each.setdefault(example.media, []).append(example)
        self._paths, self._of_each = list(of_each), list(of_each.values())
        # One more, since a question's own picture is no example.
        if kind != "none" and len(self._paths) <= shots:
            raise UserError(
                f"--shots {shots} needs {shots + 1} pictures with answers to choose from, the "
                f"training split has {len(self._paths)}"
            )
        self._features: np.ndarray | None = None  # [pictures, W], of length 1
        self._fixed = self._draw(np.random.default_rng(seed), None) if kind == "text" else ()

    def index(
        self, folder: Path, featurize: Featurize, process: int, count: int,
        barrier: Callable[[str], None],
    ) -> None:  # fmt: skip
        """Computes the features of the support set, or reads what an earlier run left in
        `folder`, a file for each `CHUNK` pictures; processes share the work.

        Raises:
            UserError: what an earlier run left is damaged.
        """
        if self.kind != "rices":
            return
        paths = self._paths
        chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{n:05d}-{_digest(chunk)}.npy" for n, chunk in enumerate(chunks)]
        for n in range(process, len(chunks), count):
            if not files[n].is_file():
                log.info("RICES: features of pictures %d to %d of %d", n * CHUNK,
                         n * CHUNK + len(chunks[n]), len(paths))  # fmt: skip
                features = featurize(chunks[n])
                with writing(str(files[n])) as temporary, temporary.open("wb") as file:
                    np.save(file, features)
        barrier("features of the support set are written")
        self._features = _unit(np.concatenate([_load(file) for file in files]))

    def __call__(self, items: Sequence[Item], featurize: Featurize) -> list[Shown]:
        """The examples of each item."""
        if self.kind == "none":
            return [Shown() for _ in items]
        if self.kind == "text":
            return [Shown(self._fixed, pictures=False) for _ in items]
        if self.kind == "random":
            chosen = [self._draw(self._rng(item), item.media) for item in items]
        else:
            assert self._features is not None, "index() comes first"
            media = [item.media for item in items if item.media is not None]
            wanted = _unit(featurize(media))
            chosen = [self._nearest(w, item) for w, item in zip(wanted, items, strict=True)]
        return [Shown(examples, pictures=True) for examples in chosen]

    def _draw(self, rng: np.random.Generator, without: Path | None) -> tuple[Example, ...]:
        """Examples of different pictures, none of them `without`."""
        chosen: dict[Path, Example] = {}
        while len(chosen) < self.shots:
            example = self.support[rng.integers(len(self.support))]
            if not _same(example.media, without):
                chosen.setdefault(example.media, example)
        return tuple(chosen.values())

    def _nearest(self, wanted: Float[np.ndarray, "W"], item: Item) -> tuple[Example, ...]:
        """One example of each of the nearest pictures, the nearest last."""
        assert self._features is not None
        order = np.argsort(-(self._features @ wanted), kind="stable")
        near = [i for i in order[: self.shots + 1] if not _same(self._paths[i], item.media)]
        rng = self._rng(item)
        chosen = [self._of_each[i][rng.integers(len(self._of_each[i]))] for i in near[: self.shots]]
        return tuple(reversed(chosen))

    def _rng(self, item: Item) -> np.random.Generator:
        """An item's own, whatever is asked beside it."""
        return np.random.default_rng((self.seed, zlib.crc32(item.id.encode())))


def _same(path: Path, other: Path | None) -> bool:
    """Whether both are the same picture: a support set may overlap with what is evaluated."""
    return other is not None and path.name == other.name


def _unit(features: Float[np.ndarray, "B W"]) -> Float[np.ndarray, "B W"]:
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(length, 1e-12)


def _load(path: Path) -> Float[np.ndarray, "B W"]:
    try:
        return np.load(path)
    except (ValueError, EOFError):
        raise UserError(f"{path} is damaged: delete it") from None


def _digest(paths: Sequence[Path]) -> str:
    return hashlib.sha256("\n".join(p.name for p in paths).encode()).hexdigest()[:12]
