"""VisDial 1.0: the model ranks 100 candidate answers in each round of a dialogue."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from emu_jax.data.sources.dialogues import IMAGE_SYSTEM
from emu_jax.errors import UserError
from emu_jax.evaluate.scorers import Scores, visdial
from emu_jax.evaluate.tasks.base import (
    Example,
    FewShotExamples,
    Folder,
    Item,
    Mode,
    PreviousAnswers,
    ScoringContext,
    Stage,
    StagePart,
    Task,
    Wording,
    as_examples,
    by_id,
    chat_wording,
    field,
    layout,
    numbered_image,
    read_json,
)
from emu_jax.evaluate.tasks.vqa import described
from emu_jax.tokenizer import ASSISTANT, EOS, USER


class VisDial(Task):
    """VisDial. Result file: `[{"image_id", "round_id", "ranks"}]`.

    Rounds and ranks count from 1. Each candidate has a rank, in the order of the official file.
    """

    name, title, metric = "visdial", "VisDial 1.0", "NDCG"
    paper = {"Emu": 47.4, "Emu*": 47.8, "Emu-I": 43.0, "Emu-I*": 51.1}
    split, splits = "val", ("val", "test")
    source = "visualdialog.org/data"

    def items(self, data: Folder, split: str, seed: int) -> list[Item]:
        path = data.file(f"visdial_1.0_{split}.json")
        year = "" if split == "train" else "2018"
        names = [f"VisualDialog_{split}{year}"] if year else ["train2014", "val2014"]
        folder = data.folder(*names)
        items = []
        with layout(path):
            content = read_json(path)["data"]
            questions, answers = content["questions"], content["answers"]
            for dialog in content["dialogs"]:
                number = dialog["image_id"]
                if year:
                    image = numbered_image(folder, names[0], number)
                else:
                    image = self._train_image(data, number)
                history: list[tuple[str, str]] = []
                for n, row in enumerate(dialog["dialog"], 1):
                    question = questions[row["question"]]
                    right = row.get("gt_index")
                    # In a test dialogue only the last round has options, and it has no answer.
                    if "answer_options" in row:
                        options = [answers[i] for i in row["answer_options"]]
                        fields = {
                            "image_id": number,
                            "round_id": n,
                            "options": options,
                            "right": right,
                            "history": list(history),
                            "answers": [] if right is None else [options[right]],
                        }
                        items.append(Item(f"{number}-{n}", image, question, fields))
                    if "answer" in row:
                        history.append((question, answers[row["answer"]]))
        counts = {len(item.fields["options"]) for item in items}
        if len(counts) > 1:
            raise UserError(f"{path} has rounds of {min(counts)} and of {max(counts)} options")
        return items

    def _train_image(self, data: Folder, number: int | str) -> Path:
        for name in ("train2014", "val2014"):
            path = data.folder(name) / f"COCO_{name}_{int(number):012d}.jpg"
            if path.is_file():
                return path
        raise UserError(f"{data.root} has no image {number} in train2014 or val2014")

    def examples(self, data: Folder) -> list[Example]:
        """Returns the first round of each training dialogue."""
        first = (i for i in self.items(data, "train", 0) if i.fields["round_id"] == 1)
        return as_examples(first)

    def stages(self, mode: Mode, in_context: bool) -> tuple[Stage, ...]:
        spell = {"pretrain": _pretrain, "instruct": _instruct, "chat": _chat}[mode]
        stage = Stage("ranking", spell, candidates=lambda item: item.fields["options"])
        return (stage,) if mode != "pretrain" or in_context else described(stage)

    def answer(self, item: Item, answers: PreviousAnswers) -> list[int]:
        ranks = [0] * len(answers["ranking"])
        for rank, option in enumerate(answers["ranking"], 1):
            ranks[option] = rank
        return ranks

    def result(self, items: Sequence[Item], answers: Sequence[Any]) -> Any:
        return [
            {"image_id": i.fields["image_id"], "round_id": i.fields["round_id"], "ranks": ranks}
            for i, ranks in zip(items, answers, strict=True)
        ]

    def score(
        self, items: Sequence[Item], answers: Sequence[Any], context: ScoringContext
    ) -> Scores | None:
        if any(item.fields["right"] is None for item in items):
            return None
        path = context.data.find(f"visdial_1.0_{context.split}_dense_annotations.json")
        relevance: dict[Hashable, list[float]] = {}
        if path is not None:
            with layout(path):
                relevance = {
                    f"{row['image_id']}-{row['round_id']}": row["gt_relevance"]
                    for row in read_json(path)
                }
        ranks = by_id(items, answers)
        judged = {
            key: row for key, row in relevance.items() if key in ranks
        }  # --limit may drop some
        found = visdial.score(ranks, field(items, "right"), judged or None)
        return dataclasses.replace(found, notes=(NO_DENSE,)) if path is None else found

    def shown(self, item: Item, answer: Any) -> tuple[str, str]:
        best = item.fields["options"][answer.index(1)]
        right = item.fields["right"]
        if right is None:
            return best, ""
        return best, f"{item.fields['options'][right]} (ranked {answer[right]})"


NO_DENSE = "no NDCG, which the paper reports: visdial_1.0_val_dense_annotations.json is not there"


def _instruct(item: Item, shown: FewShotExamples, answers: PreviousAnswers) -> list[StagePart]:
    """Builds the release's prompt, with `</s>` after the image and after each past turn."""
    example = f"{USER}: {{image}}{EOS} {USER}: {{question}}? {ASSISTANT}: {{answer}}.{EOS}"
    if not shown.show_images:
        example = f"{USER}: {{question}}? {ASSISTANT}: {{answer}}.{EOS}"
    query = f"{USER}: {{image}}{EOS}"
    words: dict[str, Any] = {}
    for n, (question, answer) in enumerate(item.fields["history"]):
        query += f" {USER}: {{q{n}}}? {ASSISTANT}: {{a{n}}}.{EOS}"
        words |= {f"q{n}": question, f"a{n}": answer}
    query += f" {USER}: {{question}}? {ASSISTANT}:"
    return Wording(query, example, IMAGE_SYSTEM).spell(item, shown, words)


def _chat(item: Item, shown: FewShotExamples, answers: PreviousAnswers) -> list[StagePart]:
    """Builds a dialogue with Emu2-Chat whose first question follows the image."""
    query, words = f"{USER}: {{image}}", dict[str, Any]()
    for n, (question, answer) in enumerate(item.fields["history"]):
        query += f"{{q{n}}}? {ASSISTANT}: {{a{n}}}{EOS}{USER}: "
        words |= {f"q{n}": question, f"a{n}": answer}
    query += f"{{question}}? {ASSISTANT}:"
    example = f"{USER}: {{image}}{{question}}? {ASSISTANT}: {{answer}}{EOS}"
    return chat_wording(query, example).spell(item, shown, words)


def _pretrain(item: Item, shown: FewShotExamples, answers: PreviousAnswers) -> list[StagePart]:
    """Builds a prompt with the past rounds as answered questions about the image."""
    query = "{image}" if "caption" not in answers else "a picture of {caption}."
    words: dict[str, Any] = dict(answers)
    for n, (question, answer) in enumerate(item.fields["history"]):
        query += f" based on the picture, {{q{n}}}? short answer: {{a{n}}}."
        words |= {f"q{n}": question, f"a{n}": answer}
    query += " based on the picture, {question}? short answer:"
    example = "{image} based on the picture, {question}? short answer: {answer}."
    return Wording(query, example).spell(item, shown, words)
