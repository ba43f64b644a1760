"""Questions about an image: VQAv2, OK-VQA, VizWiz."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from emu_jax.evaluate.scorers import Scores, vqa
from emu_jax.evaluate.tasks.base import (
    ANSWER,
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
    TurnWording,
    Wording,
    as_examples,
    by_id,
    clean_caption,
    continuing,
    field,
    layout,
    numbered_image,
    read_json,
    references,
    short_answer,
)
from emu_jax.evaluate.tasks.captions import DESCRIBE

ASK = (
    "{image} based on the content of the image and common sense, please provide an accurate answer "
    "consisting of only one word or phrase. "
)
KNOWN = "{question}, is the answer known?"
# Decoding of the caption that replaces the image for the pretrained model.
LONG_CAPTION = {"num_beams": 5, "max_new_tokens": 64, "min_length": 1, "length_penalty": 0.0}


def described(stage: Stage) -> tuple[Stage, ...]:
    """Returns a captioning stage followed by `stage`, which reads `{caption}`."""
    caption = Stage(
        "caption",
        lambda item, _, answers: DESCRIBE.spell(item, FewShotExamples(), answers),
        LONG_CAPTION,
    )

    def prompt(item: Item, shown: FewShotExamples, answers: PreviousAnswers) -> list[StagePart]:
        return stage.prompt(item, shown, {**answers, "caption": clean_caption(answers["caption"])})

    return caption, dataclasses.replace(stage, prompt=prompt)


def from_caption(query: str) -> Wording:
    """Returns a wording that asks the pretrained model to answer from a caption. Examples are
    questions and answers without captions."""
    wording = continuing(f"a picture of {{caption}}. based on the picture, {query} short answer:")
    return Wording(wording.query, IN_CONTEXT.example)


# If examples show their images, the question shows its image too.
IN_CONTEXT = continuing("{image} based on the picture, {question} short answer:")
_INSTRUCT = TurnWording(ASK + "{question}", "the answer is:")
INSTRUCT_KNOWN = TurnWording(ASK + KNOWN)


class QuestionAnswering(Task):
    """A short answer to each question. Result file: `[{key, "answer"}]`."""

    metric = "accuracy"
    key = "question_id"

    def examples(self, data: Folder) -> list[Example]:
        return as_examples(self.items(data, "train", 0))

    def stages(self, mode: Mode, in_context: bool) -> tuple[Stage, ...]:
        if mode != "pretrain":
            return (Stage("answer", _INSTRUCT.wording(mode).spell, ANSWER),)
        if in_context:
            return (Stage("answer", IN_CONTEXT.spell, ANSWER),)
        return described(Stage("answer", from_caption("{question}").spell, ANSWER))

    def answer(self, item: Item, answers: PreviousAnswers) -> Any:
        return short_answer(answers["answer"])

    def result(self, items: Sequence[Item], answers: Sequence[Any]) -> Any:
        return [
            {self.key: item.fields[self.key], "answer": answer}
            for item, answer in zip(items, answers, strict=True)
        ]


class VQA(QuestionAnswering):
    """VQA tasks in the layout of visualqa.org.

    Args:
        questions, annotations: file names, with `{split}` for the split.
        splits: split to (its name in file names, directory of the images).
    """

    split = "val"

    def __init__(
        self,
        name: str,
        title: str,
        questions: str,
        annotations: str,
        splits: Mapping[str, tuple[str, str]],
        paper: Mapping[str, float],
        source: str,
        *,
        stem: bool = False,
    ) -> None:
        self.name, self.title, self.paper, self.source = name, title, paper, source
        self._questions, self._annotations, self._splits = questions, annotations, splits
        self.splits = tuple(split for split in splits if split != "train")
        self._stem = stem

    def items(self, data: Folder, split: str, seed: int) -> list[Item]:
        name, image_folder = self._splits[split]
        path = data.file(self._questions.format(split=name))
        folder = data.folder(image_folder)
        answers = data.find(self._annotations.format(split=name))
        if answers is None and split in ("val", "train"):
            data.file(self._annotations.format(split=name))
        annotations: dict[str, Any] = {}
        if answers is not None:
            with layout(answers):
                annotations = {
                    str(row["question_id"]): row for row in read_json(answers)["annotations"]
                }
        with layout(path):
            rows = read_json(path)["questions"]
            if answers is not None and (
                lost := [r for r in rows if str(r["question_id"]) not in annotations]
            ):
                raise KeyError(f"{lost[0]['question_id']} in {answers}")
            return [
                Item(
                    str(row["question_id"]),
                    numbered_image(folder, f"COCO_{image_folder}", row["image_id"]),
                    row["question"],
                    fields={
                        "question_id": row["question_id"],
                        "answers": _answers(annotations.get(str(row["question_id"]))),
                        "type": annotations.get(str(row["question_id"]), {}).get("answer_type", ""),
                    },
                )
                for row in rows
            ]

    def score(
        self, items: Sequence[Item], answers: Sequence[Any], context: ScoringContext
    ) -> Scores | None:
        right, types = references(items), field(items, "type")
        if right is None:
            return None
        convention = "okvqa" if self._stem else "vqa"
        return vqa.score(right, by_id(items, answers), answer_types=types, convention=convention)


def _answers(row: Any) -> list[str]:
    return [] if row is None else [answer["answer"] for answer in row["answers"]]


class VizWiz(QuestionAnswering):
    """Images and questions from blind people.

    Some questions are unanswerable, so the model is first asked whether it knows the answer.
    """

    name, title, key = "vizwiz", "VizWiz VQA", "image"
    paper = {
        "Emu": 34.2,
        "Emu*": 34.4,
        "Emu-I": 32.2,
        "Emu-I*": 38.3,
        "Emu 4-shot": 41.3,
        "Emu 8-shot": 43.9,
        "Emu2": 40.4,
        "Emu2-Chat": 54.9,
    }
    split, splits = "val", ("val", "test")
    source = "vizwiz.org"

    def stages(self, mode: Mode, in_context: bool) -> tuple[Stage, ...]:
        # No examples, since none asks such a question. The settings are the release's defaults.
        if mode != "pretrain":
            known = (self._known(INSTRUCT_KNOWN.wording(mode)),)
        else:
            known = described(self._known(from_caption(KNOWN)))
        stages = {stage.name: stage for stage in (*known, *super().stages(mode, in_context))}
        return tuple(stages.values())

    @staticmethod
    def _known(wording: Wording) -> Stage:
        return Stage(
            "known",
            lambda item, _, answers: wording.spell(item, FewShotExamples(), answers),
            choices=("yes.", "no."),
        )

    def answer(self, item: Item, answers: PreviousAnswers) -> Any:
        return "unanswerable" if answers["known"] == "no." else super().answer(item, answers)

    def items(self, data: Folder, split: str, seed: int) -> list[Item]:
        path, folder = data.file(f"{split}.json"), data.folder(split)
        with layout(path):
            return [
                Item(
                    row["image"],
                    folder / row["image"],
                    row["question"],
                    fields={
                        "image": row["image"],
                        "answers": [a["answer"] for a in row.get("answers", ())],
                    },
                )
                for row in read_json(path)
            ]

    def score(
        self, items: Sequence[Item], answers: Sequence[Any], context: ScoringContext
    ) -> Scores | None:
        right = references(items)
        if right is None:
            return None
        return vqa.score(right, by_id(items, answers), convention="vizwiz")


VQAV2 = VQA(
    "vqav2",
    "VQAv2",
    "v2_OpenEnded_mscoco_{split}_questions.json",
    "v2_mscoco_{split}_annotations.json",
    {
        "train": ("train2014", "train2014"),
        "val": ("val2014", "val2014"),
        "test-dev": ("test-dev2015", "test2015"),
        "test": ("test2015", "test2015"),
    },
    {
        "Emu": 52.0,
        "Emu*": 52.9,
        "Emu-I": 57.2,
        "Emu-I*": 62.0,
        "Emu2": 33.5,
        "Emu2-Chat": 84.9,
        "Emu 4-shot": 58.4,
        "Emu 8-shot": 59.0,
    },
    "visualqa.org/download.html, images cocodataset.org",
)
OKVQA = VQA(
    "okvqa",
    "OK-VQA",
    "OpenEnded_mscoco_{split}_questions.json",
    "mscoco_{split}_annotations.json",
    {"train": ("train2014", "train2014"), "val": ("val2014", "val2014")},
    {"Emu": 38.2, "Emu*": 42.8, "Emu-I": 43.4, "Emu-I*": 49.2, "Emu2": 26.7, "Emu2-Chat": 64.8},
    "okvqa.allenai.org/download.html, images cocodataset.org",
    stem=True,
)
