"""What a task is: official files in, prompts, official files out.

A task reads items from the official layout. Each item goes through its stages in turn; a stage
spells one prompt and says how the model is to answer it: by writing, by ranking candidates or by
painting. Prompts and settings are those of the release's `Emu1/mm_eval` for the instruction-tuned
model, which the release evaluates; docs/evaluation.md says where the others come from.
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

from emu_jax.config import UserError, suggest
from emu_jax.data.dialogues import IMAGE_SYSTEM
from emu_jax.evaluate.scorers import Scores, frechet
from emu_jax.tokenizer import ASSISTANT, EOS, USER

Mode = Literal["pretrain", "instruct"]

# Decoding in the release's evaluation; what is not named is `TextConfig`'s, the release's own
# defaults (`Emu1/models/modeling_emu.py: generate`).
CAPTION = {"num_beams": 5, "max_new_tokens": 20, "min_length": 8, "length_penalty": -1.0}
ANSWER = {"num_beams": 5, "max_new_tokens": 20, "min_length": 1, "length_penalty": -1.0}


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing that is asked.

    Attributes:
        id: of its own in the task.
        media: the picture or video it is about; None where there is only text.
        question: what is asked, where the prompt does not say it already.
        fields: whatever else the result file and the score need.
    """

    id: str
    media: Path | None = None
    question: str = ""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Example:
    """An item of the training split with its answer, to be shown before a question."""

    media: Path
    answer: str
    question: str = ""


@dataclasses.dataclass(frozen=True)
class Shown:
    """The examples before a question, the most telling last; `pictures` is False where they are
    shown without theirs."""

    examples: tuple[Example, ...] = ()
    pictures: bool = False


Part = str | Path
Said = Mapping[str, Any]  # what earlier stages answered


@dataclasses.dataclass(frozen=True)
class Stage:
    """One prompt and how it is answered.

    Attributes:
        name: under which later stages and the task find the answer.
        prompt: the parts of the prompt, files as Paths.
        settings: of `Emu.generate_texts`, or of `generate_images` where `paints`.
        choices: all that may be written.
        candidates: the texts to be ranked, where nothing is to be written.
    """

    name: str
    prompt: Callable[[Item, Shown, Said], list[Part]]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    choices: tuple[str, ...] | None = None
    candidates: Callable[[Item], Sequence[str]] | None = None
    paints: bool = False


@dataclasses.dataclass(frozen=True)
class Fid:
    """How pictures are compared (`scorers.frechet`).

    Attributes:
        inception: the network, as TorchScript; no FID without it.
        reference: statistics of the real pictures, instead of the data's own.
        resize: what a picture goes through first.
    """

    inception: Path | None = None
    reference: Path | None = None
    resize: frechet.Resize = "network"

    def check(self) -> None:
        """
        Raises:
            UserError: options that mean nothing without a network, or files that are not there.
        """
        if self.inception is None and (self.reference or self.resize != "network"):
            raise UserError("--reference and --resize are of FID: give --inception FILE too")
        for name, path in (("inception", self.inception), ("reference", self.reference)):
            if path is not None and not path.is_file():
                raise UserError(f"--{name} {path}: there is no such file")
        if self.reference is not None:
            frechet.load_statistics(self.reference)  # before thousands of pictures are painted


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a score finds what it needs beside the answers.

    Attributes:
        out: the folder of the result file.
    """

    data: Folder
    split: str
    out: Path
    fid: Fid = Fid()


class Task(abc.ABC):
    """A benchmark.

    Attributes:
        name: as `--task` names it.
        title: as a reader knows it.
        metric: which of the scores the paper reports.
        paper: its figures by column (Emu, Emu*, Emu-I, Emu-I*, n-shot), from the results tables
            of arXiv 2307.05222v2.
        split: which is read unless another is asked for.
        splits: what may be asked for.
        modes: for which models there are prompts.
        source: where the official files come from.
        unscored: why there is no score, where there is none.
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
    modes: ClassVar[tuple[Mode, ...]] = ("pretrain", "instruct")

    @abc.abstractmethod
    def items(self, data: Folder, split: str, seed: int) -> list[Item]:
        """The items of a split, in the order of the official file."""

    def examples(self, data: Folder) -> list[Example]:
        """The training split, from which examples are taken.

        Raises:
            UserError: the task has none.
        """
        raise UserError(f"{self.name} is evaluated without examples: leave out --examples")

    @abc.abstractmethod
    def stages(self, mode: Mode, in_context: bool) -> tuple[Stage, ...]:
        """What is asked in turn; `in_context` if examples are shown with their pictures."""

    @abc.abstractmethod
    def answer(self, item: Item, said: Said) -> Any:
        """What the stages said, as the result file has it; plain JSON."""

    @abc.abstractmethod
    def result(self, items: Sequence[Item], answers: Sequence[Any]) -> Any:
        """The official result file."""

    @abc.abstractmethod
    def score(self, items: Sequence[Item], answers: Sequence[Any], place: Place) -> Scores | None:
        """None where the answers are not public, or a judge is needed that is not here."""

    def shown(self, item: Item, answer: Any) -> tuple[str, str]:
        """What a reader wants to see of an answer: (given, right), the latter "" if unknown."""
        return str(answer), "; ".join(dict.fromkeys(map(str, item.fields.get("answers", ()))))

    def media_of(self, item: Item, answer: Any, out: Path) -> Path | None:
        """The picture to show beside an answer; `out` is the folder of the result file."""
        return item.media


# --- Prompts -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Wording:
    """How a prompt is spelled: the head, examples, and the question, with spaces between.

    `{image}` stands for the picture or the frames of a video, other names for texts.
    """

    query: str
    example: str
    head: str = ""

    def spell(self, item: Item, shown: Shown, said: Said) -> list[Part]:
        """The parts of a prompt, texts joined."""
        parts: list[Part] = [self.head] if self.head else []
        for example in shown.examples:
            text = self.example if shown.pictures else re.sub(r"\{image\} ?", "", self.example)
            words = {"question": example.question, "answer": example.answer}
            parts += [" ", *fill(text, example.media, words)]
        parts += [" ", *fill(self.query, item.media, {**said, "question": item.question})]
        joined: list[Part] = []
        for part in parts:
            if joined and isinstance(part, str) and isinstance(joined[-1], str):
                joined[-1] += part
            else:
                joined.append(part)
        if isinstance(joined[0], str):
            joined[0] = joined[0].lstrip()
        return [part for part in joined if part != ""]


def fill(text: str, media: Path | None, words: Mapping[str, Any]) -> list[Part]:
    """`text` with `{image}` as the file and other `{name}`s as words; braces in those stay."""
    parts: list[Part] = []
    for piece in re.split(r"(\{\w+\})", text):
        if piece == "{image}":
            assert media is not None, text
            parts.append(media)
        elif re.fullmatch(r"\{\w+\}", piece):
            parts.append(str(words[piece[1:-1]]))
        elif piece:
            parts.append(piece)
    return parts


def turn(asked: str, opening: str = "", system: str = IMAGE_SYSTEM) -> Wording:
    """A turn of the instruction-tuned model, whose answer begins with `opening`. Past turns end
    in `.</s>`, as those of the release's VisDial do."""
    query = f"{USER}: {asked} {ASSISTANT}:{' ' * bool(opening)}{opening}"
    return Wording(query=query, example=f"{query} {{answer}}.{EOS}", head=system)


def continuing(query: str) -> Wording:
    """What the pretrained model goes on with. Examples are sentences, as in the release's
    `pretrain_example`."""
    return Wording(query=query, example=f"{query} {{answer}}.")


# --- Answers -------------------------------------------------------------------------------------


def clean_caption(text: str) -> str:
    """The first sentence, in lower case, without its period
    (release: `coco.py: coco_results_processor`)."""
    return text.split("\n")[0].split(". ")[0].removesuffix(".").lower()


def short_answer(text: str) -> str:
    """The words of an answer (release: `mm_eval/datasets/utils.py`)."""
    for end in ("\n", ". ", '"', ", "):
        text = text.split(end)[0]
    text = text.strip().lower().removesuffix(".")
    for opening in ("it is ", "it's ", "a ", "an ", "the "):
        text = text.removeprefix(opening)
    return text


def by_id(items: Sequence[Item], values: Iterable[Any]) -> dict[Hashable, Any]:
    """Values under their items' ids."""
    return {item.id: value for item, value in zip(items, values, strict=True)}


def field(items: Sequence[Item], name: str) -> dict[Hashable, Any]:
    """A field of each item."""
    return {item.id: item.fields[name] for item in items}


def numbered_picture(folder: Path, prefix: str, image_id: int | str) -> Path:
    """The file of a picture that COCO numbers. An `image_id` may be text, if its file is there.

    Raises:
        ValueError: it is text and names no file.
    """
    if not isinstance(image_id, str):
        return folder / f"{prefix}_{image_id:012d}.jpg"
    path = folder / f"{prefix}_{image_id.zfill(12)}.jpg"
    if not (image_id.isdecimal() and path.is_file()):
        raise ValueError(f"image_id is the text {image_id!r}, and {path} does not exist")
    return path


def references(items: Sequence[Item]) -> dict[Hashable, list[str]] | None:
    """What people said of each item; None where that is not public, and no item has any."""
    found = field(items, "answers")
    return found if any(found.values()) else None


def as_examples(items: Iterable[Item]) -> list[Example]:
    """Items with what most people said of them; those of which nobody said anything left out."""
    return [
        Example(item.media, Counter(item.fields["answers"]).most_common(1)[0][0], item.question)
        for item in items
        if item.media is not None and item.fields["answers"]
    ]


# --- Files ---------------------------------------------------------------------------------------


class Folder:
    """A folder in an official layout. What is looked for may also lie in one of the usual folders
    within: `annotations/` for files, `images/` or `videos/` for folders of media."""

    def __init__(self, root: Path):
        if not root.is_dir():
            raise UserError(f"there is no folder {root}")
        self.root = root
        self._folders: dict[tuple[str, ...], Path] = {}

    def file(self, *names: str) -> Path:
        """The first of these that is there.

        Raises:
            UserError: none is.
        """
        found = self.find(*names)
        if found is None:
            raise UserError(
                f"{self.root} has no {' and no '.join(names)}, nor have annotations/ or "
                "Annotations/ in it: see docs/evaluation.md for where it comes from"
            )
        return found

    def find(self, *names: str) -> Path | None:
        """As `file`, None where nothing is."""
        places = [self.root / within / n for n in names for within in _WITHIN]
        return next((p for p in places if p.exists()), None)

    def folder(self, *names: str) -> Path:
        """The first of these folders that is there.

        Raises:
            UserError: none is.
        """
        if names not in self._folders:
            places = [self.root / within / n for n in names for within in ("", "images", "videos")]
            found = next((place for place in places if place.is_dir()), None)
            if found is None:
                raise UserError(
                    f"{self.root} has no folder {' or '.join(names)} of pictures or videos: see "
                    "docs/evaluation.md for where it comes from"
                )
            self._folders[names] = found
        return self._folders[names]


_WITHIN = ("", "annotations", "Annotations")


def read_json(path: Path) -> Any:
    """
    Raises:
        UserError: it is damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged, fetch it again: {error}") from None


@contextlib.contextmanager
def layout(path: Path) -> Iterator[None]:
    """Whatever an annotation file lacks, or has of another kind, is named with the file."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        why = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is not laid out as the official file: {why}") from None


def check_split(task: Task, split: str) -> str:
    """
    Raises:
        UserError: the task has no such split.
    """
    if split and split not in task.splits:
        raise UserError(f"--split {split}: {task.name} has none{suggest(split, task.splits)}")
    return split or task.split
