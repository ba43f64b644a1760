"""Instructions and answers: ShareGPT, Alpaca, LLaVA, OpenAI, VideoChat and Video-ChatGPT, in
their JSON files.

The release's format is `<system message> [USER]: <instruction> [ASSISTANT]: <answer></s>`
(`Emu1/inference.py`); only answers are learned. In a longer dialogue each answer ends in `</s>`
and `[USER]:` follows.
"""

from __future__ import annotations

import base64
import binascii
import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from emu_jax.data import storage
from emu_jax.data.documents import Damaged, Document, Image, Text
from emu_jax.data.sources.entries import MALFORMED, Entries
from emu_jax.data.sources.listings import Listed, Media
from emu_jax.data.sources.video import VIDEO_SUFFIXES, Clip, Video, sample_frames
from emu_jax.data.unused import Unused
from emu_jax.tokenizer import ASSISTANT, EOS, USER

# System messages of the instruction-tuned model (`Emu1/inference.py`).
IMAGE_SYSTEM = (
    "You will be presented with an image: [IMG]ImageContent[/IMG]. You will be able to see the "
    "image after I provide it to you. Please answer my questions based on the given image."
)
VIDEO_SYSTEM = (
    "You are a helpful assistant and you will be presented with a video consisting of multiple "
    "chronological images: [IMG]ImageContent[/IMG]. You will be able to see the video after I "
    "provide it to you. Please answer my questions based on the given video."
)
# Emu2-Chat's system messages for open and for short answers (`Emu2/emu/chat.py`).
COMPREHENSIVE_SYSTEM = (
    "You are a helpful assistant, dedicated to delivering comprehensive and meticulous responses."
)
CONCISE_SYSTEM = "You are a helpful assistant, dedicated to provide concise and efficient answers."

# A key or type of part such as "video" or "video_url", or a letter of it as an escape.
_NAMES_VIDEO = re.compile(rb'"video|\\u00[67]')
_SPEAKERS = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
}


class Medium(NamedTuple):
    """An image or a video of an entry."""

    name: str  # of its file, or an image itself as a data URL
    video: bool = False


Content = list[str | Medium]  # of a message


class Turn(NamedTuple):
    """A question, and the answer, which is the training target."""

    question: Content
    answer: Content


class Dialogue(NamedTuple):
    """A parsed entry."""

    turns: list[Turn]
    system: Content | None  # the entry's own message
    clip: Clip | None  # of its video
    unused: list[Unused]


class Dialogues(Listed):
    """Dialogues, one an entry, in any of these layouts:

    ShareGPT, LLaVA: `conversations` of `{"from": "human" | "gpt" | "system", "value": ...}`.
    OpenAI: `messages` of `{"role": "user" | "assistant" | "system", "content": ...}`. A content
        may be a list of parts: `{"type": "text", "text": ...}`, `{"type": "image_url",
        "image_url": {"url": FILE or data URL}}`, `{"type": "image"}` for the entry's next image.
    Alpaca: `instruction`, `input` (may be empty) and `output`; `history`, if there is one.
    VideoChat: `video` (or `image`) and `QA` of `{"i": ..., "q": ..., "a": ...}`. `start` and
        `end`, in seconds, choose a clip of the video.
    Video-ChatGPT: `q`, `a` and `video_id`, a video's name without its suffix.

    The entry's images and videos (`image`, `images`, `video`, `videos`; one or a list) replace
    `<image>` and `<video>` in its messages. In an answer, an image is a training target. If no
    message has a placeholder, the media go before the first question. In an entry without
    images, `<image>` is plain text, or the placeholder of the video if no message has `<video>`.
    """

    def __init__(
        self, entries: Entries, media: Media, frames: int, system: str | None = None
    ) -> None:
        chosen = () if system is None else (system,)
        super().__init__(entries, media, ("dialogues-2", frames, *chosen))
        self._frames, self._system = frames, system

    @functools.cached_property
    def videos(self) -> bool:  # type: ignore[override]
        return self._entries.may_match(_NAMES_VIDEO)

    def read(
        self,
        index: int,
        seed: Sequence[int] | None = None,
        part_indices: Collection[int] | None = None,
    ) -> Document:
        dialogue = self._dialogue(index)

        def images(medium: Medium, scored: bool) -> list[Image]:
            if not medium.video:
                return [Image(self._image(index, medium.name), scored=scored)]
            video = self._video(index, medium.name)
            frames = sample_frames(video, self._frames, seed, dialogue.clip)
            dialogue.unused.extend(video.unused)
            return Image.video(frames, scored=scored)

        return _document(dialogue, images, self._system)

    def sketch(self, index: int) -> Document:
        def images(medium: Medium, scored: bool) -> list[Image]:
            if medium.video or not medium.name.startswith("data:"):
                self._require(medium.name, index, VIDEO_SUFFIXES if medium.video else ())
            if medium.video:
                return Image.video([(None, b"")] * self._frames, scored=scored)
            return [Image(b"", scored=scored)]

        return _document(self._dialogue(index), images, self._system)

    def _dialogue(self, index: int) -> Dialogue:
        entry, where = self._entries[index], self.where(index)
        try:
            return _parse(entry)
        except (*MALFORMED, RecursionError) as error:  # messages may be nested
            detail = f"no {error}" if isinstance(error, KeyError) else error
            raise Damaged("malformed entry", where, detail) from None

    def _image(self, index: int, name: str) -> bytes:
        where = self.where(index)
        if not name.startswith("data:"):
            return self._media.read(name, self._entries.folder(index), where)
        try:
            return base64.b64decode(name.partition(",")[2], validate=True)
        except (binascii.Error, ValueError) as error:
            raise Damaged("unreadable image", where, f"a data URL: {error}") from None

    def _video(self, index: int, name: str) -> Video:
        where, folder = self.where(index), self._entries.folder(index)
        names = [name, *(name + suffix for suffix in VIDEO_SUFFIXES)]
        known = next((n for n in names if self._media.has(n, folder)), name)
        return Video(self._media.open(known, folder, where, storage.MOST_VIDEO), where)


class _Message(NamedTuple):
    speaker: str  # "system", "user" or "assistant"
    content: Content


# Placeholders of the entry's next image or video.
_IMAGE, _VIDEO = Medium("<image>"), Medium("<video>", video=True)


def _parse(entry: dict[str, Any]) -> Dialogue:
    messages = [_Message(_speaker(who), list(_parts(value))) for who, value in _messages(entry)]
    images = [Medium(name) for key in ("image", "images") for name in _names(entry.get(key))]
    videos = [
        Medium(name, video=True) for key in ("video", "videos") for name in _names(entry.get(key))
    ] or [Medium(name, video=True) for name in _names(entry.get("video_id"))]
    messages, unplaced = _placed(messages, images, videos)
    unused = [Unused(key) for key in ("tools", "audio", "audios") if entry.get(key)]
    system, turns = _turns(messages, unused)
    turns[0].question[:0] = unplaced
    return Dialogue(turns, system, _clip(entry, len(videos)), unused)


def _messages(entry: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yields (speaker, value) of each message in order, in any layout."""
    if entry.get("system"):
        yield "system", entry["system"]
    for key in ("conversations", "messages"):
        if key in entry:
            yield from _conversation(entry[key])
            return
    if "instruction" in entry:
        for question, answer in entry.get("history") or ():
            yield from (("user", question), ("assistant", answer))
        given = [text for text in (entry["instruction"], entry.get("input")) if text]
        yield from (("user", "\n".join(given)), ("assistant", entry["output"]))
    elif "QA" in entry:
        for turn in entry["QA"]:
            question = " ".join(text for text in (turn.get("i"), turn["q"]) if text)
            yield from (("user", question), ("assistant", turn["a"]))
    else:
        yield from (("user", entry["q"]), ("assistant", entry["a"]))


def _conversation(messages: list[Any]) -> Iterator[tuple[Any, Any]]:
    for message in messages:
        if isinstance(message, list):
            yield from _conversation(message)
        elif "role" in message:
            yield message["role"], message["content"]
        else:
            yield message["from"], message["value"]


def _speaker(who: object) -> str:
    known = _SPEAKERS.get(who.lower()) if isinstance(who, str) else None
    if known is None:
        raise ValueError(f"unknown speaker {who!r}")
    return known


def _parts(value: Any) -> Iterator[str | Medium]:
    """Yields the texts and media of a message's value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value)
    elif isinstance(value, list):
        for part in value:
            yield from _parts(part)
    elif isinstance(value, dict):
        kind = value["type"]
        if kind == "text":
            yield from _parts(value["text"])
        elif kind in ("image", "image_url", "video", "video_url"):
            video = kind.startswith("video")
            named = value.get(kind, value.get("url", value.get("path")))
            name = named["url"] if isinstance(named, dict) else named
            if name is not None and not isinstance(name, str):
                raise ValueError(f"{name!r} does not name a file")
            yield Medium(name, video) if name else _VIDEO if video else _IMAGE
        else:
            raise ValueError(f"unknown type of part {kind!r}")
    elif value is not None:
        raise ValueError(f"a message holds {value!r}")


def _names(value: Any) -> list[str]:
    names = [name for name in (value if isinstance(value, list) else [value]) if name]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{value!r} does not name files")
    return names


def _placed(
    messages: list[_Message], images: list[Medium], videos: list[Medium]
) -> tuple[list[_Message], list[Medium]]:
    """Returns (messages with the entry's media in place of placeholders, media without one).

    Raises:
        ValueError: the number of placeholders is neither 0 nor the number of media.
    """
    texts = [part for message in messages for part in message.content if isinstance(part, str)]
    tags = {"<image>": _IMAGE} if images else {}
    if videos:
        tags["<video>"] = _VIDEO
        if not images and not any("<video>" in text for text in texts):
            tags["<image>"] = _VIDEO
    pattern = re.compile("|".join(map(re.escape, tags)) or r"(?!)")

    def split(part: str | Medium) -> Iterator[str | Medium]:
        if isinstance(part, Medium):
            yield part
            return
        start = 0
        for tag in pattern.finditer(part):
            yield from (part[start : tag.start()], tags[tag[0]])
            start = tag.end()
        yield part[start:]

    split_messages = [
        _Message(speaker, [piece for part in content for piece in split(part)])
        for speaker, content in messages
    ]
    placeholders = [part for message in split_messages for part in message.content]
    for placeholder, media in ((_IMAGE, images), (_VIDEO, videos)):
        if (count := placeholders.count(placeholder)) not in ({0, len(media)} if media else {0}):
            raise ValueError(f"{count} places for {len(media)} {placeholder.name[1:-1]}s")
    queues = {
        placeholder: iter(media) for placeholder, media in ((_IMAGE, images), (_VIDEO, videos))
    }

    def medium(part: str | Medium) -> str | Medium:
        queue = queues.get(part) if isinstance(part, Medium) else None
        return part if queue is None else next(queue)

    placed = [_Message(speaker, list(map(medium, content))) for speaker, content in split_messages]
    return placed, [left for queue in queues.values() for left in queue]


def _turns(messages: Iterable[_Message], unused: list[Unused]) -> tuple[Content | None, list[Turn]]:
    """Returns (system message, turns). Consecutive messages of one speaker are joined; messages
    that belong to no turn are added to `unused`.

    Raises:
        ValueError: there is no question with an answer.
    """
    system: Content = []
    turns: list[Turn] = []
    questions: list[Content] = []  # since the last answer

    def leave_out(reason: str, content: Content) -> None:
        unused.append(
            Unused(reason, "".join(part for part in content if isinstance(part, str))[:80])
        )
        unused.extend(
            Unused(
                "video of an unused message" if part.video else "image of an unused message",
                part.name[:80],
            )
            for part in content
            if isinstance(part, Medium)
        )

    answered = False  # the last message of a turn is an answer
    for speaker, content in messages:
        empty = not any(isinstance(part, Medium) or part.strip() for part in content)
        if empty:
            leave_out("empty message", [speaker])
        if speaker == "user":
            answered = False
            if not empty:
                questions.append(content)
        elif speaker == "system":
            if turns or questions:
                leave_out("system message after the first turn", [] if empty else content)
            elif not empty:
                system += ["\n", *content] if system else content
        elif empty:
            for question in questions:
                leave_out("question without an answer", question)
            questions = []
        elif questions:
            question = [part for content in questions for part in ("\n", *content)][1:]
            turns.append(Turn(question, content))
            questions, answered = [], True
        elif answered:
            turns[-1].answer.extend(("\n", *content))
        else:
            leave_out("answer without a question", content)
    for question in questions:
        leave_out("question without an answer", question)
    if not turns:
        raise ValueError("no question with an answer")
    return system or None, turns


def _clip(entry: dict[str, Any], videos: int) -> Clip | None:
    start, end = entry.get("start"), entry.get("end")
    if not videos or (start is None and end is None):
        return None
    clip = (0.0 if start is None else float(start), math.inf if end is None else float(end))
    if videos > 1 or not 0 <= clip[0] <= clip[1]:
        raise ValueError(f"start {start!r} and end {end!r} of {videos} videos")
    return clip


def _document(
    dialogue: Dialogue, images: Callable[[Medium, bool], list[Image]], system: str | None
) -> Document:
    """Formats the dialogue as the release does. Special tokens are parsed only in the texts that
    this function adds, never in the data.

    Args:
        system: the message of an entry without its own; by default Emu1's for its media.
    """

    def parts(content: Content, scored: bool) -> list[Text | Image]:
        formatted: list[Text | Image] = []
        text = ""
        for part in [*content, None]:
            if isinstance(part, str):
                text += part
                continue
            if text.strip():
                formatted.append(Text(text.strip(), scored))
            text = ""
            if part is not None:
                formatted += images(part, scored)
        return formatted

    media = [part for turn in dialogue.turns for part in turn.question if isinstance(part, Medium)]
    message = system if system is not None and dialogue.system is None else ""
    if system is None and dialogue.system is None and media:
        message = VIDEO_SYSTEM if any(medium.video for medium in media) else IMAGE_SYSTEM
    document = parts(dialogue.system or [], scored=False)
    for number, turn in enumerate(dialogue.turns):
        if number:
            document.append(Text(EOS, special=True))
        document.append(Text(f"{message} {USER}:".lstrip(), scored=False, special=True))
        message = ""
        document += parts(turn.question, scored=False)
        document += [
            Text(f"{ASSISTANT}:", scored=False, special=True),
            *parts(turn.answer, scored=True),
        ]
    return Document(tuple(document), tuple(dialogue.unused))
