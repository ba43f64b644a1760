"""Selection and order of in-context examples.

`text`: sampled once for all questions and shown without their images (the paper's `*`).
`random`: sampled for each question.
`rices`: the examples whose images are most similar to the question's image (Yang et al. 2021,
    arXiv:2109.05014), by cosine similarity of the model's visual features. The most similar one
    comes last.
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

from emu_jax.errors import UserError
from emu_jax.evaluate.tasks.base import Example, FewShotExamples, Item
from emu_jax.storage import writing

log = logging.getLogger(__name__)

Examples = Literal["none", "text", "random", "rices"]
_CHUNK = 1024  # images per cached feature file

# Returns features of image or video files.
Featurize = Callable[[Sequence[Path]], Float[np.ndarray, "B D"]]


class FewShot:
    """Chooses the in-context examples of each item.

    Args:
        support: the examples to choose from.
        shots: examples per item.
        seed: for sampling; the choice does not depend on the number of processes.

    Raises:
        UserError: the support set has too few different images.
    """

    def __init__(self, kind: Examples, support: Sequence[Example], shots: int, seed: int) -> None:
        self.kind, self.shots, self.seed = kind, shots, seed
        self.support = list(support)
        of_each: dict[Path, list[Example]] = {}
        for example in self.support:
            of_each.setdefault(example.media, []).append(example)
        self._paths, self._of_each = list(of_each), list(of_each.values())
        # One more, since a question's own image is never an example.
        if kind != "none" and len(self._paths) <= shots:
            raise UserError(
                f"--shots {shots} needs {shots + 1} images with answers to choose from, the "
                f"training split has {len(self._paths)}"
            )
        self._features: Float[np.ndarray, "images D"] | None = None  # unit length
        self._fixed = self._draw(np.random.default_rng(seed), None) if kind == "text" else ()

    def index(
        self,
        folder: Path,
        featurize: Featurize,
        share: int,
        count: int,
        barrier: Callable[[str], None],
        *,
        writes: bool = True,
    ) -> None:
        """Computes the features of the support set, or reads them from `folder`.

        The folder has a file for each `_CHUNK` images.

        Args:
            share, count: compute share `share` of `count` shares of the features.
            barrier: waits for all processes.
            writes: whether this process writes its share. Several may compute one together.

        Raises:
            UserError: a file in `folder` is damaged.
        """
        if self.kind != "rices":
            return
        paths = self._paths
        chunks = [paths[i : i + _CHUNK] for i in range(0, len(paths), _CHUNK)]
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{n:05d}-{_digest(chunk)}.npy" for n, chunk in enumerate(chunks)]
        missing = [n for n in range(share, len(chunks), count) if not files[n].is_file()]
        barrier("missing features are listed")
        for n in missing:
            log.info(
                "RICES: features of images %d to %d of %d",
                n * _CHUNK,
                n * _CHUNK + len(chunks[n]),
                len(paths),
            )
            features = featurize(chunks[n])
            if writes:
                with writing(files[n], shared=True) as temporary, temporary.open("wb") as file:
                    np.save(file, features)
        barrier("features of the support set are written")
        self._features = _unit(np.concatenate([_load(file) for file in files]))

    def __call__(self, items: Sequence[Item], featurize: Featurize) -> list[FewShotExamples]:
        """Returns the examples of each item."""
        if self.kind == "none":
            return [FewShotExamples() for _ in items]
        if self.kind == "text":
            return [FewShotExamples(self._fixed, show_images=False) for _ in items]
        if self.kind == "random":
            chosen = [self._draw(self._rng(item), item.media) for item in items]
        else:
            assert self._features is not None, "index() comes first"
            media = [item.media for item in items if item.media is not None]
            queries = _unit(featurize(media))
            chosen = [
                self._nearest(query, item) for query, item in zip(queries, items, strict=True)
            ]
        return [FewShotExamples(examples, show_images=True) for examples in chosen]

    def _draw(self, rng: np.random.Generator, without: Path | None) -> tuple[Example, ...]:
        """Samples examples of different images, excluding the image `without`."""
        chosen: dict[Path, Example] = {}
        while len(chosen) < self.shots:
            example = self.support[rng.integers(len(self.support))]
            if not _same(example.media, without):
                chosen.setdefault(example.media, example)
        return tuple(chosen.values())

    def _nearest(self, query: Float[np.ndarray, "D"], item: Item) -> tuple[Example, ...]:
        """Samples one example for each of the most similar images, the most similar last."""
        assert self._features is not None
        order = np.argsort(-(self._features @ query), kind="stable")
        near = [i for i in order[: self.shots + 1] if not _same(self._paths[i], item.media)]
        rng = self._rng(item)
        chosen = [self._of_each[i][rng.integers(len(self._of_each[i]))] for i in near[: self.shots]]
        return tuple(reversed(chosen))

    def _rng(self, item: Item) -> np.random.Generator:
        """Returns a generator seeded by the item alone, independent of its batch."""
        return np.random.default_rng((self.seed, zlib.crc32(item.id.encode())))


def _same(path: Path, other: Path | None) -> bool:
    """Returns whether two paths name one image; the support set may overlap the items."""
    return other is not None and path.name == other.name


def _unit(features: Float[np.ndarray, "B D"]) -> Float[np.ndarray, "B D"]:
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(length, 1e-12)


def _load(path: Path) -> Float[np.ndarray, "B D"]:
    try:
        with path.open("rb") as file:
            return np.load(file)
    except (ValueError, EOFError):
        raise UserError(f"{path} is damaged: delete it") from None


def _digest(paths: Sequence[Path]) -> str:
    return hashlib.sha256("\n".join(p.name for p in paths).encode()).hexdigest()[:12]
