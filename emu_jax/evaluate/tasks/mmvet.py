"""MM-Vet: open questions. GPT-4 grades the answers outside this project."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from emu_jax.data.sources.dialogues import COMPREHENSIVE_SYSTEM
from emu_jax.evaluate.scorers import Scores
from emu_jax.evaluate.tasks.base import (
    Folder,
    Item,
    Mode,
    PreviousAnswers,
    ScoringContext,
    Stage,
    Task,
    TurnWording,
    layout,
    read_json,
)

WRITE = {"num_beams": 5, "max_new_tokens": 128, "min_length": 1, "length_penalty": 1.0}
_INSTRUCT = TurnWording("{image}{question}", chat_system=COMPREHENSIVE_SYSTEM)


class MMVet(Task):
    """MM-Vet. Result file: `{id: answer}`, the format of MM-Vet's online grader."""

    name, title, metric = "mmvet", "MM-Vet", "GPT-4 score"
    paper = {"Emu-I": 36.3, "Emu2-Chat": 48.5}
    split, splits = "test", ("test",)
    source = "github.com/yuweihao/MM-Vet"
    modes = ("instruct", "chat")
    unscored = "not scored here: GPT-4 grades the answers, by MM-Vet's online evaluator"

    def items(self, data: Folder, split: str, seed: int) -> list[Item]:
        path, folder = data.file("mm-vet.json"), data.folder("images")
        with layout(path):
            return [
                Item(
                    name,
                    folder / row["imagename"],
                    row["question"],
                    fields={"answers": [row["answer"]] if "answer" in row else []},
                )
                for name, row in read_json(path).items()
            ]

    def stages(self, mode: Mode, in_context: bool) -> tuple[Stage, ...]:
        return (Stage("answer", _INSTRUCT.wording(mode).spell, WRITE),)

    def answer(self, item: Item, answers: PreviousAnswers) -> str:
        return answers["answer"]

    def result(self, items: Sequence[Item], answers: Sequence[Any]) -> Any:
        return {item.id: answer for item, answer in zip(items, answers, strict=True)}

    def score(
        self, items: Sequence[Item], answers: Sequence[Any], context: ScoringContext
    ) -> Scores | None:
        return None
