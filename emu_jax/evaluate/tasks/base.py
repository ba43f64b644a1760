"""The interface of a task: reads official files, prompts the model, writes official files.

A task reads items from the official layout. Each item passes through the task's stages in order. A
stage builds one prompt and says how the model answers it: by generating text, by ranking candidates
or by generating an image. Prompts and settings for Emu1's instruction-tuned model are those of the
release's `Emu1/mm_eval`. docs/evaluation.md gives the sources of the others.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from emu_jax.data.sources.dialogues import CONCISE_SYSTEM, IMAGE_SYSTEM
from emu_jax.errors import UserError, suggest
from emu_jax.evaluate.scorers import Scores, frechet
from emu_jax.evaluate.scorers.similarity import SimilarityOptions
from emu_jax.tokenizer import ASSISTANT, EOS, USER

# Prompts of a pretrained model, of Emu1's instruction-tuned model, and of Emu2-Chat.
Mode = Literal["pretrain", "instruct", "chat"]

# Decoding settings of the release's evaluation. The rest are `TextConfig`'s defaults, which are the
# release's (`Emu1/models/modeling_emu.py: generate`).
CAPTION = {"num_beams": 5, "max_new_tokens": 20, "min_length": 8, "length_penalty": -1.0}
ANSWER = {"num_beams": 5, "max_new_tokens": 20, "min_length": 1, "length_penalty": -1.0}


@dataclasses.dataclass(frozen=True)
class Item:
    """One example to evaluate.

    Attributes:
        id: unique within the task.
        media: the image or video; None if the item is text only.
        question: the question, if the prompt needs one.
        fields: other values that the result file and the score need.
    """

    id: str
    media: Path | None = None
    question: str = ""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Example:
    """A solved item of the training split, used as an in-context example."""

    media: Path
    answer: str
    question: str = ""


@dataclasses.dataclass(frozen=True)
class FewShotExamples:
    """The in-context examples before a question, the most relevant last.

    Attributes:
        show_images: whether their images are shown.
    """

    examples: tuple[Example, ...] = ()
    show_images: bool = False


StagePart = str | Path
PreviousAnswers = Mapping[str, Any]  # answers of earlier stages, by name


@dataclasses.dataclass(frozen=True)
class Stage:
    """One prompt and the way it is answered.

    Attributes:
        name: key of the answer for later stages and the task.
        prompt: builds the parts of the prompt, files as Paths.
        settings: for `Emu.generate_text`, or for `generate_image` if `paints`.
        choices: the only texts that may be generated.
        candidates: the texts to rank, for a stage that generates nothing.
        paints: whether the stage generates an image.
    """

    name: str
    prompt: Callable[[Item, FewShotExamples, PreviousAnswers], list[StagePart]]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    choices: tuple[str, ...] | None = None
    candidates: Callable[[Item], Sequence[str]] | None = None
    paints: bool = False


@dataclasses.dataclass(frozen=True)
class FidOptions:
    """Settings of the Fréchet inception distance (`scorers.frechet`).

    Attributes:
        inception: the network as TorchScript; without it there is no FID.
        reference: statistics of the real images; by default they are computed from the data.
        resize: the resizing before the network.
    """

    inception: Path | None = None
    reference: Path | None = None
    resize: frechet.Resize = "network"

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            UserError: an option needs `inception`, or a file is missing or damaged.
        """
        if self.inception is None and (self.reference or self.resize != "network"):
            raise UserError("--reference and --resize need --inception FILE")
        for name, path in (("inception", self.inception), ("reference", self.reference)):
            if path is not None and not path.is_file():
                raise UserError(f"--{name} {path}: there is no such file")
        if self.reference is not None:
            frechet.load_statistics(self.reference)  # fails before generating thousands of images


@dataclasses.dataclass(frozen=True)
class ScoringContext:
    """Inputs of a score other than the items and answers.

    Attributes:
        out: directory of the result file.
    """

    data: Folder
    split: str
    out: Path
    fid: FidOptions = FidOptions()
    similarity: SimilarityOptions = SimilarityOptions()


@dataclasses.dataclass(frozen=True)
class Result:
    """The content of `.scores.json`.

    Attributes:
        items: number of items that were answered.
        scores: the scores by name, or None if they cannot be computed here.
        notes: remarks for a reader of the scores.
        metric: name of the score that the paper reports.
        column: the column of the paper's table that the run is comparable to.
        paper: the paper's figures, by column.
        settings: everything that the predictions depend on.
        result: path of the official result file.
    """

    task: str
    split: str
    items: int
    scores: dict[str, float] | None
    notes: list[str]
    metric: str
    column: str
    paper: dict[str, float]
    settings: dict[str, Any]
    result: str


class Task(abc.ABC):
    """A benchmark.

    Attributes:
        name: value of `--task`.
        title: name for display.
        metric: the score that the paper reports.
        paper: the paper's figures by column (Emu, Emu*, Emu-I, Emu-I*, n-shot), from the results
            tables of arXiv 2307.05222v2; Emu2 and Emu2-Chat from arXiv 2312.13286v2.
        split: the default split.
        splits: the available splits.
        modes: the kinds of model it has prompts for.
        source: where to get the official files.
        unscored: the note in the results if `score` returns None.
    """

    name: str
    title: str
    metric: str
    paper: Mapping[str, float]
    split: str
    splits: tuple[str, ...]
    source: str
    unscored: str = (
        "not scored here, since the answers of this split are not public: submit the result file "
        "to the benchmark's own server"
    )
    modes: ClassVar[tuple[Mode, ...]] = ("pretrain", "instruct", "chat")

    @abc.abstractmethod
    def items(self, data: Folder, split: str, seed: int) -> list[Item]:
        """Returns the items of a split, in the order of the official file."""

    def examples(self, data: Folder) -> list[Example]:
        """Returns the training split, the source of in-context examples.

        Raises:
            UserError: the task has no training split.
        """
        raise UserError(f"{self.name} is evaluated without examples: leave out --examples")

    @abc.abstractmethod
    def stages(self, mode: Mode, in_context: bool) -> tuple[Stage, ...]:
        """Returns the stages in order. `in_context` means that examples are shown with images."""

    @abc.abstractmethod
    def answer(self, item: Item, answers: PreviousAnswers) -> Any:
        """Turns the answers of all stages into the result file's answer (plain JSON)."""

    @abc.abstractmethod
    def result(self, items: Sequence[Item], answers: Sequence[Any]) -> Any:
        """Returns the content of the official result file."""

    @abc.abstractmethod
    def score(
        self, items: Sequence[Item], answers: Sequence[Any], context: ScoringContext
    ) -> Scores | None:
        """Returns the scores, or None if the answers are not public or need an external judge."""

    def export(self, items: Sequence[Item], answers: Sequence[Any], out: Path) -> None:
        """Writes what an official scorer reads beside the result file `out`. By default nothing."""
        return None

    def shown(self, item: Item, answer: Any) -> tuple[str, str]:
        """Returns (given answer, correct answer) for display; the latter is "" if unknown."""
        return str(answer), "; ".join(dict.fromkeys(map(str, item.fields.get("answers", ()))))

    def media_of(self, item: Item, answer: Any, out: Path) -> Path | None:
        """Returns the image or video to show beside an answer. `out` holds the result file."""
        return item.media


# --- Prompts -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Wording:
    """Template of a prompt: head, examples and question, with `separator` between them.

    `{image}` is replaced by the image or the frames of a video, other names by texts.
    """

    query: str
    example: str
    head: str = ""
    separator: str = " "

    def spell(
        self, item: Item, shown: FewShotExamples, answers: PreviousAnswers
    ) -> list[StagePart]:
        """Returns the parts of the prompt, with adjacent texts joined."""
        parts: list[StagePart] = [self.head] if self.head else []
        for example in shown.examples:
            text = self.example if shown.show_images else re.sub(r"\{image\} ?", "", self.example)
            words = {"question": example.question, "answer": example.answer}
            parts += [self.separator, *fill(text, example.media, words)]
        parts += [
            self.separator,
            *fill(self.query, item.media, {**answers, "question": item.question}),
        ]
        joined: list[StagePart] = []
        for part in parts:
            if joined and isinstance(part, str) and isinstance(joined[-1], str):
                joined[-1] += part
            else:
                joined.append(part)
        if isinstance(joined[0], str):
            joined[0] = joined[0].lstrip()
        return [part for part in joined if part != ""]


def fill(text: str, media: Path | None, words: Mapping[str, Any]) -> list[StagePart]:
    """Replaces `{image}` by the file and other `{name}`s by words. Braces in words stay literal."""
    parts: list[StagePart] = []
    for piece in re.split(r"(\{\w+\})", text):
        if piece == "{image}":
            assert media is not None, text
            parts.append(media)
        elif re.fullmatch(r"\{\w+\}", piece):
            parts.append(str(words[piece[1:-1]]))
        elif piece:
            parts.append(piece)
    return parts


@dataclasses.dataclass(frozen=True)
class TurnWording:
    """Wording of one turn of a dialogue with an instruction-tuned model.

    Attributes:
        asked: template of the user's part.
        opening: begins the answer of Emu1's model.
        system: the system message of Emu1's model.
        chat_system: the system message of Emu2-Chat.
    """

    asked: str
    opening: str = ""
    system: str = IMAGE_SYSTEM
    chat_system: str = CONCISE_SYSTEM

    def wording(self, mode: Mode) -> Wording:
        """Returns the turn in the format of a kind of model.

        Emu1's past turns end in `.</s>`, as in the release's VisDial. Those of Emu2-Chat are as in
        its `chat.py`.
        """
        query = f"{USER}: {self.asked} {ASSISTANT}:"
        if mode == "chat":
            return chat_wording(query, f"{query} {{answer}}{EOS}", self.chat_system)
        query += " " * bool(self.opening) + self.opening
        return Wording(query, f"{query} {{answer}}.{EOS}", self.system)


def chat_wording(query: str, example: str, system: str = CONCISE_SYSTEM) -> Wording:
    """Returns a wording for Emu2-Chat, whose turns follow each other without a space."""
    return Wording(query, example, f"{system} ", separator="")


def continuing(query: str) -> Wording:
    """Returns a wording that the pretrained model completes. Examples are sentences, as in the
    release's `pretrain_example`."""
    return Wording(query=query, example=f"{query} {{answer}}.")


# --- Answers -------------------------------------------------------------------------------------


def clean_caption(text: str) -> str:
    """Returns the first sentence, in lower case, without its period
    (release: `coco.py: coco_results_processor`)."""
    return text.split("\n")[0].split(". ")[0].removesuffix(".").lower()


def short_answer(text: str) -> str:
    """Returns the bare words of a short answer (release: `mm_eval/datasets/utils.py`)."""
    for end in ("\n", ". ", '"', ", "):
        text = text.split(end)[0]
    text = text.strip().lower().removesuffix(".")
    for opening in ("it is ", "it's ", "a ", "an ", "the "):
        text = text.removeprefix(opening)
    return text


def by_id(items: Sequence[Item], values: Iterable[Any]) -> dict[Hashable, Any]:
    """Maps item ids to values."""
    return {item.id: value for item, value in zip(items, values, strict=True)}


def field(items: Sequence[Item], name: str) -> dict[Hashable, Any]:
    """Maps item ids to one of their fields."""
    return {item.id: item.fields[name] for item in items}


def numbered_image(folder: Path, prefix: str, image_id: int | str) -> Path:
    """Returns the file of a COCO-numbered image. `image_id` may be a string if its file exists.

    Raises:
        ValueError: `image_id` is a string and its file does not exist.
    """
    if not isinstance(image_id, str):
        return folder / f"{prefix}_{image_id:012d}.jpg"
    path = folder / f"{prefix}_{image_id.zfill(12)}.jpg"
    if not (image_id.isdecimal() and path.is_file()):
        raise ValueError(f"image_id is the text {image_id!r}, and {path} does not exist")
    return path


def references(items: Sequence[Item]) -> dict[Hashable, list[str]] | None:
    """Maps item ids to the human answers; returns None if no item has any (not public)."""
    found = field(items, "answers")
    return found if any(found.values()) else None


def as_examples(items: Iterable[Item]) -> list[Example]:
    """Turns items into examples with their most common answer. Skips items without answers."""
    return [
        Example(item.media, Counter(item.fields["answers"]).most_common(1)[0][0], item.question)
        for item in items
        if item.media is not None and item.fields["answers"]
    ]


# --- Files ---------------------------------------------------------------------------------------


class Folder:
    """A directory in an official layout.

    Files may also be in its `annotations/`, and media directories in its `images/` or `videos/`.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"there is no folder {root}")
        self.root = root
        self._folders: dict[tuple[str, ...], Path] = {}

    def file(self, *names: str) -> Path:
        """Returns the first of the named files that exists.

        Raises:
            UserError: none exists.
        """
        path = self.find(*names)
        if path is None:
            raise UserError(
                f"{self.root} has no {' and no '.join(names)}, nor have annotations/ or "
                "Annotations/ in it: see docs/evaluation.md for where it comes from"
            )
        return path

    def find(self, *names: str) -> Path | None:
        """Returns the first of the named files that exists, or None."""
        candidates = [self.root / within / n for n in names for within in _WITHIN]
        return next((p for p in candidates if p.exists()), None)

    def folder(self, *names: str) -> Path:
        """Returns the first of the named directories that exists.

        Raises:
            UserError: none exists.
        """
        if names not in self._folders:
            candidates = [
                self.root / within / n for n in names for within in ("", "images", "videos")
            ]
            match = next((path for path in candidates if path.is_dir()), None)
            if match is None:
                raise UserError(
                    f"{self.root} has no folder {' or '.join(names)} of images or videos: see "
                    "docs/evaluation.md for where it comes from"
                )
            self._folders[names] = match
        return self._folders[names]


_WITHIN = ("", "annotations", "Annotations")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged, fetch it again: {error}") from None


@contextlib.contextmanager
def layout(path: Path) -> Iterator[None]:
    """Context that turns a missing or mistyped value of an annotation file into a UserError."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        why = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is not laid out as the official file: {why}") from None


def check_split(task: Task, split: str) -> str:
    """Returns `split`, or the default split of the task if it is empty.

    Raises:
        UserError: the task has no such split.
    """
    if split and split not in task.splits:
        raise UserError(f"--split {split}: {task.name} has none{suggest(split, task.splits)}")
    return split or task.split
