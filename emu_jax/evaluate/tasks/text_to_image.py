"""Text to image on GenEval, DPG-Bench and WISE, whose own programs score the images.

Each task generates the images of its prompts and writes them, beside the result file, into a folder
`STEM/` in the layout that the official scorer reads. CLIP-T is computed here if `--clip` is given.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from emu_jax.errors import UserError
from emu_jax.evaluate.scorers import Scores
from emu_jax.evaluate.scorers.similarity import clip_t
from emu_jax.evaluate.tasks.base import (
    Folder,
    Item,
    Mode,
    PreviousAnswers,
    ScoringContext,
    Stage,
    Task,
    layout,
    read_json,
)
from emu_jax.evaluate.tasks.drawing import PAINT
from emu_jax.storage import write_text, writing

IMAGES_PER_PROMPT = 4  # of GenEval and DPG-Bench
WISE_FILES = (
    "cultural_common_sense.json",
    "spatio-temporal_reasoning.json",
    "natural_science.json",
)


class TextToImage(Task):
    """A benchmark of prompts, each with `copies` images.

    Result file: `[{"id", "prompt", "file"}]`.

    Attributes:
        copies: images generated for each prompt, with different seeds.
        scorer: the official program that scores the folder, for the note in the results.
    """

    metric, paper = "", {}
    split, splits = "test", ("test",)
    modes = ("pretrain",)
    copies: ClassVar[int] = 1
    scorer: ClassVar[str] = ""

    def prompts(self, data: Folder) -> Iterable[tuple[str, str, dict[str, Any]]]:
        """Yields (id, prompt, other fields) in the official order."""
        raise NotImplementedError

    def write_image(self, folder: Path, item: Item, images: Sequence[Path]) -> None:
        """Writes the images of a prompt into `folder` as the official scorer reads them."""
        raise NotImplementedError

    @property
    def unscored(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"the folder beside this file is scored by {self.scorer} (docs/evaluation.md)"

    def items(self, data: Folder, split: str, seed: int) -> list[Item]:
        return [
            Item(
                f"{name}-{copy}",
                None,
                prompt,
                fields={**fields, "prompt_id": name, "seed": number * self.copies + copy},
            )
            for number, (name, prompt, fields) in enumerate(self.prompts(data))
            for copy in range(self.copies)
        ]

    def stages(self, mode: Mode, in_context: bool) -> tuple[Stage, ...]:
        return (Stage("drawn", lambda item, _, answers: [item.question], PAINT, paints=True),)

    def answer(self, item: Item, answers: PreviousAnswers) -> str:
        return answers["drawn"]

    def result(self, items: Sequence[Item], answers: Sequence[Any]) -> Any:
        return [
            {"id": item.id, "prompt": item.question, "file": file}
            for item, file in zip(items, answers, strict=True)
        ]

    def shown(self, item: Item, answer: Any) -> tuple[str, str]:
        return item.question, ""

    def media_of(self, item: Item, answer: Any, out: Path) -> Path | None:
        return out / answer

    def export(self, items: Sequence[Item], answers: Sequence[Any], out: Path) -> None:
        """Writes the folder that the official scorer reads. Prompts without all their images, which
        `--limit` may leave at the end, are left out."""
        groups: dict[str, list[tuple[Item, Path]]] = {}
        for item, file in zip(items, answers, strict=True):
            groups.setdefault(item.fields["prompt_id"], []).append((item, out.parent / file))
        for group in groups.values():
            if len(group) == self.copies:
                self.write_image(out.with_suffix(""), group[0][0], [path for _, path in group])

    def score(
        self, items: Sequence[Item], answers: Sequence[Any], context: ScoringContext
    ) -> Scores | None:
        if context.similarity.clip is None:
            return None
        files = [context.out / file for file in answers]
        scores = clip_t(context.similarity.clip, files, [item.question for item in items])
        return Scores(scores.values, (*scores.notes, self.unscored))


class GenEval(TextToImage):
    """Ghosh et al., arXiv:2310.11513: objects, counts, colors and positions.

    Folder: `00000/metadata.jsonl`, `00000/samples/0000.png`, ..., for `evaluate_images.py`.
    """

    name, title = "geneval", "GenEval"
    source = "github.com/djghosh13/geneval (prompts/evaluation_metadata.jsonl)"
    copies, scorer = IMAGES_PER_PROMPT, "GenEval's evaluate_images.py"

    def prompts(self, data: Folder) -> Iterable[tuple[str, str, dict[str, Any]]]:
        path = data.file("evaluation_metadata.jsonl")
        with layout(path):
            for number, line in enumerate(path.read_text().splitlines()):
                metadata = json.loads(line)
                yield f"{number:05}", metadata["prompt"], {"metadata": metadata}

    def write_image(self, folder: Path, item: Item, images: Sequence[Path]) -> None:
        folder = folder / item.fields["prompt_id"]
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        write_text(folder / "metadata.jsonl", json.dumps(item.fields["metadata"]) + "\n")
        for number, path in enumerate(images):
            _copy(path, folder / "samples" / f"{number:04}.png")


class DPGBench(TextToImage):
    """Hu et al., arXiv:2403.05135: long prompts, scored by questions about the image.

    Folder: `NAME.png` for the prompt `NAME.txt`, a grid of 2x2 images, for `compute_dpg_bench.py`.
    """

    name, title = "dpgbench", "DPG-Bench"
    source = "github.com/TencentQQGYLab/ELLA (dpg_bench/prompts)"
    copies, scorer = IMAGES_PER_PROMPT, "ELLA's compute_dpg_bench.py, with --pic-num 4"

    def prompts(self, data: Folder) -> Iterable[tuple[str, str, dict[str, Any]]]:
        for path in sorted(data.folder("prompts").glob("*.txt")):
            yield path.stem, path.read_text().strip(), {}

    def write_image(self, folder: Path, item: Item, images: Sequence[Path]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tiles = [Image.open(path).convert("RGB") for path in images]
        width, height = tiles[0].size
        grid = Image.new("RGB", (2 * width, 2 * height))
        for number, tile in enumerate(tiles):
            grid.paste(tile, (number % 2 * width, number // 2 * height))
        with writing(folder / f"{item.fields['prompt_id']}.png") as temporary:
            grid.save(temporary, format="png")


class WISE(TextToImage):
    """Niu et al., arXiv:2503.07265: prompts that need knowledge of the world, scored by GPT-4o.

    Folder: `PROMPT_ID.png`, for `gpt_eval.py`.
    """

    name, title = "wise", "WISE"
    source = "github.com/PKU-YuanGroup/WISE (data/)"
    scorer = "WISE's gpt_eval.py"

    def prompts(self, data: Folder) -> Iterable[tuple[str, str, dict[str, Any]]]:
        present = [path for name in WISE_FILES if (path := data.find(name)) is not None]
        if not present:
            raise UserError(f"{data.root} has none of {', '.join(WISE_FILES)}: see {self.source}")
        for path in present:
            with layout(path):
                for row in read_json(path):
                    yield str(row["prompt_id"]), row["Prompt"], {}

    def write_image(self, folder: Path, item: Item, images: Sequence[Path]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _copy(images[0], folder / f"{item.fields['prompt_id']}.png")


def _copy(source: Path, target: Path) -> None:
    """Copies a file; the target appears complete or not at all."""
    with writing(target) as temporary:
        temporary.write_bytes(source.read_bytes())
