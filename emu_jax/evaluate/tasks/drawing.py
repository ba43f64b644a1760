"""Text to image on COCO, scored by the Fréchet distance to real images."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emu_jax.evaluate.scorers import Scores, frechet, similarity
from emu_jax.evaluate.tasks.base import (
    Folder,
    Item,
    Mode,
    PreviousAnswers,
    ScoringContext,
    Stage,
    Task,
    layout,
    numbered_image,
    read_json,
)

PROMPTS = 30_000
PAINT = {"steps": 50, "guidance": 5.0, "method": "pndm"}


class CocoDrawing(Task):
    """Images generated for 30,000 captions of the validation split, sampled with the seed.

    Result file: `[{"image_id", "caption", "file"}]`. The images are next to it in `STEM.images/`.
    """

    name, title, metric = "coco_fid", "COCO text to image (zero-shot)", "FID"
    paper = {"Emu": 11.66}
    split, splits = "val", ("val",)
    source = "cocodataset.org"
    modes = ("pretrain",)
    unscored = "no FID: give --inception FILE (docs/evaluation.md) and run the command again"

    def items(self, data: Folder, split: str, seed: int) -> list[Item]:
        path = data.file("captions_val2014.json")
        with layout(path):
            rows = sorted(read_json(path)["annotations"], key=lambda row: row["id"])
            order = np.random.default_rng(seed).permutation(len(rows))[:PROMPTS]
            return [
                Item(
                    str(rows[i]["id"]),
                    None,
                    rows[i]["caption"].strip(),
                    fields={"image_id": rows[i]["image_id"], "seed": n},
                )
                for n, i in enumerate(order)
            ]

    def stages(self, mode: Mode, in_context: bool) -> tuple[Stage, ...]:
        return (Stage("drawn", lambda item, _, answers: [item.question], PAINT, paints=True),)

    def answer(self, item: Item, answers: PreviousAnswers) -> str:
        return answers["drawn"]

    def result(self, items: Sequence[Item], answers: Sequence[Any]) -> Any:
        return [
            {"image_id": i.fields["image_id"], "caption": i.question, "file": file}
            for i, file in zip(items, answers, strict=True)
        ]

    def shown(self, item: Item, answer: Any) -> tuple[str, str]:
        return item.question, ""

    def media_of(self, item: Item, answer: Any, out: Path) -> Path | None:
        return out / answer

    def score(
        self, items: Sequence[Item], answers: Sequence[Any], context: ScoringContext
    ) -> Scores | None:
        drawn = [context.out / file for file in answers]
        parts = []
        fid = context.fid
        if fid.inception is not None:
            network = frechet.Inception(fid.inception, fid.resize)
            real = self._reference(context, network)
            generated = frechet.moments(drawn, network, what="generated images").gaussian()
            parts.append(frechet.score(generated, real, (network.note,)))
        parts += self._similarities(items, drawn, context)
        if not parts:
            return None
        values = {name: value for part in parts for name, value in part.values.items()}
        notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
        return Scores(values, notes)

    def _similarities(
        self, items: Sequence[Item], generated: Sequence[Path], context: ScoringContext
    ) -> list[Scores]:
        """Returns the scores of the networks that are given: CLIP-T with the captions, CLIP-I and
        DINO with the real images."""
        clip, dino = context.similarity.clip, context.similarity.dino
        if clip is None and dino is None:
            return []
        folder = context.data.folder("val2014")
        real = [numbered_image(folder, "COCO_val2014", item.fields["image_id"]) for item in items]
        scores = []
        if clip is not None:
            scores.append(similarity.clip_t(clip, generated, [item.question for item in items]))
            scores.append(similarity.clip_i(clip, generated, real))
        if dino is not None:
            scores.append(similarity.dino(dino, generated, real))
        return scores

    def _reference(self, context: ScoringContext, network: frechet.Inception) -> frechet.Gaussian:
        """Returns the given statistics, or computes and caches those of all images of the split."""
        if context.fid.reference is not None:
            return frechet.load_statistics(context.fid.reference)
        path, folder = context.data.file("captions_val2014.json"), context.data.folder("val2014")
        with layout(path):
            files = sorted(folder / row["file_name"] for row in read_json(path)["images"])
        digest = hashlib.sha256("\n".join([network.note, *map(str, files)]).encode())
        cached = context.out / f"fid-{digest.hexdigest()[:12]}.npz"
        if cached.is_file():
            return dataclasses.replace(frechet.load_statistics(cached), count=len(files))
        statistics = frechet.moments(files, network, what="real images").gaussian()
        frechet.save_statistics(statistics, cached)
        return statistics
