"""Instructions and answers: ShareGPT, Alpaca, LLaVA and VideoChat in their JSON files.

The release's format is `<system message> [USER]: <instruction> [ASSISTANT]: <answer></s>`
(`Emu1/inference.py`); only answers are learned. In a longer dialogue each answer ends in `</s>`
and `[USER]:` follows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from emu_jax.data.documents import Damaged, Document, Picture, Text
from emu_jax.data.listings import Entries, Listed, Media
from emu_jax.data.video import Video, sample_frames
from emu_jax.tokenizer import ASSISTANT, EOS, USER

# What the instruction-tuned model was told before a turn (`Emu1/inference.py`).
IMAGE_SYSTEM = (
    "You will be presented with an image: [IMG]ImageContent[/IMG]. You will be able to see the "
    "image after I provide it to you. Please answer my questions based on the given image."
)
VIDEO_SYSTEM = (
    "You are a helpful assistant and you will be presented with a video consisting of multiple "
    "chronological images: [IMG]ImageContent[/IMG]. You will be able to see the video after I "
    "provide it to you. Please answer my questions based on the given video."
)


class Turn(NamedTuple):
    """What a user says, and the answer that is to be learned. `Picture(b"")` stands for the
    next of the entry's pictures, or for its video."""

    said: tuple[Text | Picture, ...]
    answer: str


class Dialogue(NamedTuple):
    turns: list[Turn]
    pictures: list[str]  # their files
    video: str | None
    system: str | None = None  # the entry's own message


class Dialogues(Listed):
    """One dialogue in each entry, of any of these layouts:

    ShareGPT, LLaVA: `conversations` of `{"from": "human" | "gpt" | "system", "value": ...}`;
        `image` (one or a list) or `video` stands where a value spells `<image>` or `<video>`,
        or else before the first.
    Alpaca: `instruction`, `input` (may be empty) and `output`.
    VideoChat: `video` (or `image`) and `QA` of `{"i": ..., "q": ..., "a": ...}`; or `q`, `a`.
    """

    def __init__(self, entries: Entries, media: Media, frames: int):
        super().__init__(entries, media, frames)
        self._frames = frames

    def read(
        self, index: int, seed: Sequence[int] | None = None,
        wanted: Collection[int] | None = None,
    ) -> Document:  # fmt: skip
        where, folder = self.where(index), self._entries.folder(index)
        dialogue = self._dialogue(index)
        files = [self._media.read(name, folder, where) for name in dialogue.pictures]
        frames: list[Picture] = []
        if dialogue.video is not None:
            video = Video(self._media.read(dialogue.video, folder, where), where)
            shown = sample_frames(video, self._frames, seed)
            frames = [Picture(data, time, scored=False) for time, data in shown]
        return _document(dialogue, [Picture(content, scored=False) for content in files], frames)

    def sketch(self, index: int) -> Document:
        dialogue, empty = self._dialogue(index), Picture(b"", scored=False)
        frames = [] if dialogue.video is None else [empty] * self._frames
        return _document(dialogue, [empty] * len(dialogue.pictures), frames)

    def _dialogue(self, index: int) -> Dialogue:
        try:
            return _parse(self._entries[index])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Damaged("malformed entry", self.where(index), repr(error)) from None


def _parse(entry: dict[str, Any]) -> Dialogue:
    if "conversations" in entry:
        said = _conversation(entry["conversations"])
    elif "instruction" in entry:
        asked = "\n".join(filter(None, (entry["instruction"], entry.get("input"))))
        said = None, [(asked, entry["output"])]
    elif "QA" in entry:
        each = [(" ".join(filter(None, (t.get("i"), t["q"]))), t["a"]) for t in entry["QA"]]
        said = None, each
    else:
        said = None, [(entry["q"], entry["a"])]
    system, turns = said
    shown = entry.get("image")
    pictures = [] if shown is None else [shown] if isinstance(shown, str) else list(shown)
    video = entry.get("video", entry.get("video_id"))
    waiting = len(pictures) + (video is not None)
    if not turns or not all(isinstance(text, str) for turn in turns for text in turn):
        raise ValueError("no turns of text")
    if not all(answer.strip() for _, answer in turns):
        raise ValueError("an answer is empty")
    parts = [_split(asked) for asked, _ in turns]
    spelled = sum(isinstance(part, Picture) for turn in parts for part in turn)
    if not spelled:
        parts[0] = [*[Picture(b"")] * waiting, *parts[0]]
    elif spelled != waiting:
        raise ValueError(f"{spelled} places for {waiting} pictures")
    made = [Turn(tuple(p), answer) for p, (_, answer) in zip(parts, turns, strict=True)]
    return Dialogue(made, pictures, video, system)


def _conversation(messages: list[dict[str, str]]) -> tuple[str | None, list[tuple[str, str]]]:
    """(system message, turns); what a user says before an answer is joined."""
    system, turns, asked = None, [], []
    for message in messages:
        who, value = message["from"], message["value"]
        if who == "system":
            system = value
        elif who in ("human", "user"):
            asked.append(value)
        elif who in ("gpt", "assistant", "chatgpt", "bing", "bard"):
            if asked:  # an answer to nothing, as shared dialogues may begin, teaches nothing
                turns.append(("\n".join(asked), value))
            asked = []
        else:
            raise ValueError(f"who is {who!r}?")
    return system, turns


def _split(text: str) -> list[Text | Picture]:
    """A user's words, with an empty picture where they spell one."""
    words = text.replace("<video>", "<image>").split("<image>")
    parts: list[Text | Picture] = [Text(words[0].strip(), scored=False)]
    for more in words[1:]:
        parts += [Picture(b""), Text(more.strip(), scored=False)]
    return [part for part in parts if isinstance(part, Picture) or part.text]


def _document(dialogue: Dialogue, pictures: list[Picture], frames: list[Picture]) -> Document:
    """The dialogue in the release's format. Only what this file itself writes may spell
    special tokens."""
    own = dialogue.system
    message = ""
    if own is None:
        message = VIDEO_SYSTEM if frames else IMAGE_SYSTEM if pictures else ""
    queue = [[picture] for picture in pictures] + ([frames] if frames else [])
    parts: list[Text | Picture] = [] if own is None else [Text(own, scored=False)]
    for number, turn in enumerate(dialogue.turns):
        if number:
            parts.append(Text(EOS, special=True))
        parts.append(Text(f"{message} {USER}:".lstrip(), scored=False, special=True))
        message = ""
        for part in turn.said:
            parts += queue.pop(0) if isinstance(part, Picture) else [part]
        parts += [Text(f"{ASSISTANT}:", scored=False, special=True), Text(turn.answer)]
    return Document(tuple(parts))
