"""Text to image on COCO: pictures of its captions, and their Fréchet distance to real ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emu_jax.evaluate.scorers import Scores
from emu_jax.evaluate.tasks.base import (
    Folder,
    Item,
    Mode,
    Place,
    Said,
    Stage,
    Task,
    layout,
    read_json,
)

PROMPTS = 30_000
PAINT = {"steps": 50, "guidance": 5.0, "method": "pndm"}


class CocoDrawing(Task):
    """30,000 captions of the validation split, drawn with the seed. Result file:
    `[{"image_id", "caption", "file"}]`; pictures lie beside it, in `STEM.images/`."""

    name, title, metric = "coco_fid", "COCO text to image (zero-shot)", "FID"
    paper = {"Emu": 11.66}
    split, splits = "val", ("val",)
    source = "cocodataset.org"
    modes = ("pretrain",)
    unscored = "no FID: give --inception FILE (docs/evaluation.md) and run the command again"

    def items(self, data: Folder, split: str, seed: int) -> list[Item]:
        path, folder = data.file("captions_val2014.json"), data.folder("val2014")
        with layout(path):
            content = read_json(path)
            names = {row["id"]: row["file_name"] for row in content["images"]}
            rows = sorted(content["annotations"], key=lambda row: row["id"])
            order = np.random.default_rng(seed).permutation(len(rows))[:PROMPTS]
            return [
                Item(
                    str(rows[i]["id"]), None, rows[i]["caption"].strip(),
                    fields={
                        "image_id": rows[i]["image_id"], "seed": n,
                        "real": str(folder / names[rows[i]["image_id"]]), "answers": [],
                    },
                )
                for n, i in enumerate(order)
            ]  # fmt: skip

    def stages(self, mode: Mode, in_context: bool) -> tuple[Stage, ...]:
        return (Stage("drawn", lambda item, _, said: [item.question], PAINT, paints=True),)

    def answer(self, item: Item, said: Said) -> str:
        return said["drawn"]

    def result(self, items: Sequence[Item], answers: Sequence[Any]) -> Any:
        return [
            {"image_id": i.fields["image_id"], "caption": i.question, "file": file}
            for i, file in zip(items, answers, strict=True)
        ]

    def shown(self, item: Item, answer: Any) -> tuple[str, str]:
        return item.question, ""

    def media_of(self, item: Item, answer: Any, out: Path) -> Path | None:
        return out / answer

    def score(self, items: Sequence[Item], answers: Sequence[Any], place: Place) -> Scores | None:
        return None
