"""Asks a model the items of a task: prompts, images, and one answer for each item."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, UInt8

from emu_jax.data.images import load_image
from emu_jax.errors import UserError
from emu_jax.evaluate.fewshot import FewShot
from emu_jax.evaluate.tasks.base import (
    FewShotExamples,
    Item,
    Mode,
    Stage,
    StagePart,
    Task,
)
from emu_jax.generate.api import Emu
from emu_jax.generate.prompt import open_file
from emu_jax.generate.settings import RENAMED
from emu_jax.storage import writing
from emu_jax.tokenizer import Family, Tokenizer

_READERS = 4  # threads that load images
# Descriptions of checkpoints by the mode in which they are asked.
_KINDS: dict[Mode, str] = {
    "pretrain": "is not instruction-tuned",
    "instruct": "is instruction-tuned",
    "chat": "is an Emu2-Chat",
}
# Of instruction-tuned models, by family.
_TUNED_MODES: dict[Family, Mode] = {"emu": "instruct", "emu2": "chat"}

T = TypeVar("T")


class Answerer:
    """Answers batches of items, loading the images of a batch while the one before is computed.

    Args:
        in_context: whether examples are shown with their images.
        seed: of sampled texts, and, added to an item's own seed, of generated images.
        images: folder of generated images, created when the first is generated.
        writes: whether this process writes them.
    """

    def __init__(
        self,
        emu: Emu,
        task: Task,
        mode: Mode,
        fewshot: FewShot,
        *,
        in_context: bool,
        seed: int,
        images: Path,
        writes: bool = True,
    ) -> None:
        self.emu, self.task, self.fewshot = emu, task, fewshot
        self.mode: Mode = mode
        self.in_context, self.seed = in_context, seed
        self.images, self.writes = images, writes

    def __call__(
        self, batches: Iterable[Sequence[Item]]
    ) -> Iterator[tuple[Sequence[Item], list[dict[str, Any]]]]:
        """Yields each batch with its rows of the predictions file, one per item.

        Raises:
            UserError: an image cannot be read. Files are never skipped.
        """
        with ThreadPoolExecutor(_READERS) as readers:
            opening = (self._open(items, readers) for items in batches)
            for items, few_shot, opened in one_ahead(opening):
                pixels = {path: future.result() for path, future in opened.items()}
                yield items, self._ask(items, few_shot, pixels)

    def _open(
        self, items: Sequence[Item], readers: ThreadPoolExecutor
    ) -> tuple[Sequence[Item], list[FewShotExamples], dict[Path, Future]]:
        """Chooses a batch's examples and starts loading its images in background threads."""
        few_shot = self.fewshot(items, self.featurize)
        paths: dict[Path, None] = {}
        for item, examples in zip(items, few_shot, strict=True):
            if item.media is not None:
                paths[item.media] = None
            if examples.show_images:
                paths |= dict.fromkeys(example.media for example in examples.examples)
        return items, few_shot, {path: readers.submit(self._pixels, path) for path in paths}

    def _pixels(
        self, path: Path
    ) -> UInt8[np.ndarray, "side side 3"] | UInt8[np.ndarray, "frames side side 3"]:
        """Loads an image, or the frames of a video.

        Raises:
            UserError: the file cannot be read. Files are never skipped.
        """
        size = self.emu.cfg.vision.image_size
        media = open_file(path)
        if isinstance(media, list):
            return np.stack([load_image(frame, size) for frame in media])
        return load_image(media, size)

    def featurize(self, paths: Sequence[Path]) -> Float[np.ndarray, "B D"]:
        """Returns visual features of files, averaged over the frames of a video."""
        with ThreadPoolExecutor(_READERS) as readers:
            pixels = [p if p.ndim == 4 else p[None] for p in readers.map(self._pixels, paths)]
        features = self.emu.embed(list(np.concatenate(pixels)))
        ends = np.cumsum([len(p) for p in pixels])
        return np.stack([part.mean(0) for part in np.split(features, ends[:-1])])

    def _ask(
        self,
        items: Sequence[Item],
        few_shot: Sequence[FewShotExamples],
        pixels: Mapping[Path, UInt8[np.ndarray, "..."]],
    ) -> list[dict[str, Any]]:
        """Runs all stages on a batch and returns one row of the predictions file per item."""
        # By item, then by stage.
        answers: list[dict[str, Any]] = [{} for _ in items]
        texts: list[dict[str, str]] = [{} for _ in items]
        for stage in self.task.stages(self.mode, self.in_context):
            parts = [
                stage.prompt(item, examples, previous)
                for item, examples, previous in zip(items, few_shot, answers, strict=True)
            ]
            prompts = [[pixels[p] if isinstance(p, Path) else p for p in row] for row in parts]
            given = self._stage_answers(stage, items, prompts)
            for row, text, prompt, answer in zip(answers, texts, parts, given, strict=True):
                row[stage.name], text[stage.name] = answer, prompt_text(prompt)
        return [
            {"id": item.id, "answer": self.task.answer(item, row), "said": row, "asked": text}
            for item, row, text in zip(items, answers, texts, strict=True)
        ]

    def _stage_answers(
        self, stage: Stage, items: Sequence[Item], prompts: list[list[Any]]
    ) -> Sequence[Any]:
        if stage.candidates is not None:
            options = [stage.candidates(item) for item in items]
            return self.emu.rank(prompts, options, segments=min(map(len, options)))
        if stage.paints:
            return self._paint(stage, items, prompts)
        return self.emu.generate_text(
            prompts, choices=stage.choices, seed=self.seed, **stage.settings
        )

    def _paint(self, stage: Stage, items: Sequence[Item], prompts: list[list[Any]]) -> list[str]:
        """Generates one image per item, each with its own seed, and returns the files' names."""
        self.images.mkdir(parents=True, exist_ok=True)
        seeds = [self.seed + item.fields["seed"] for item in items]
        # The recorded settings keep their former names, so old predictions can still be resumed.
        settings = {RENAMED.get(name, name): value for name, value in stage.settings.items()}
        images = self.emu.generate_image(prompts, seed=seeds, **settings)
        names = []
        for item, image in zip(items, images, strict=True):
            path = self.images / f"{item.id}.png"
            if self.writes:
                with writing(path, shared=True) as temporary:
                    image.save(temporary, format="png")
            names.append(f"{self.images.name}/{path.name}")
        return names


def one_ahead(values: Iterable[T]) -> Iterator[T]:
    """Yields the values, requesting each next one before yielding the current one."""
    waiting: list[T] = []
    for value in values:
        waiting.append(value)
        if len(waiting) == 2:
            yield waiting.pop(0)
    yield from waiting


def choose_mode(requested: str, tokenizer: Tokenizer, task: Task) -> Mode:
    """Returns the kind of prompts for a model, which its tokenizer tells.

    Raises:
        UserError: `requested` does not fit this kind of model, or the task has no prompts for it.
    """
    mode: Mode = _TUNED_MODES[tokenizer.family] if tokenizer.instruct else "pretrain"
    if requested not in ("auto", mode):
        raise UserError(f"--mode {requested}: the checkpoint {_KINDS[mode]}; leave it out")
    if mode not in task.modes:
        kind = "an instruction-tuned" if "instruct" in task.modes else "the pretrained"
        raise UserError(f"{task.name} is a task for {kind} model: choose another checkpoint")
    return mode


def prompt_text(prompt: Sequence[StagePart]) -> str:
    """Formats a prompt for a reader, with file names in place of images."""
    return "".join(p if isinstance(p, str) else f"<{p.name}>" for p in prompt)
