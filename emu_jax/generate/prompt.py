"""Prompts: texts and images in reading order, as token ids and pixels.

The release spells a prompt as one string, each image as `[IMG]<image>*N[/IMG]`, and tokenizes
it whole (`Emu1/inference.py`, `Emu1/models/pipeline.py`). Emu2 spells a frame of a video
`[IMG][gIMG]*N[/IMG]`, and `[VIDEO]` before the first one (`Emu2/emu/chat.py`). Prompts for text are
padded on the left, prompts for images on the right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from emu_jax.config import EmuConfig
from emu_jax.data import storage
from emu_jax.data.images import load_image, open_image
from emu_jax.data.sources.dialogues import (
    COMPREHENSIVE_SYSTEM,
    CONCISE_SYSTEM,
    IMAGE_SYSTEM,
    VIDEO_SYSTEM,
)
from emu_jax.data.sources.video import (
    FRAMES,
    SECONDS,
    VIDEO_SUFFIXES,
    Video,
    sample_frames,
)
from emu_jax.errors import UserError, suggest
from emu_jax.tokenizer import (
    ASSISTANT,
    EOS,
    FRAME,
    GROUNDING,
    IMAGE,
    IMG,
    IMG_END,
    OBJECT,
    OBJECT_END,
    PHRASE,
    PHRASE_END,
    USER,
    VIDEO,
    Tokenizer,
)

Box: TypeAlias = tuple[float, float, float, float]  # left, top, right, bottom

BOX_SIDE = 448  # pixels of a box image's side, in which its coordinates are given
_BOX_REACH = 2  # pixels around the outline that are white too
MIXED = "a batch has both `Normalized` and other images: pass all of them as one kind"


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """The format of dialogues with an instruction-tuned model.

    Attributes:
        user: precedes a question. The system message precedes the first one's.
        assistant: follows a question.
        answer: precedes an answer in the history; `</s>` follows it.
        video_system, image_system, text_system: default system messages of a dialogue with a video,
            with a single image, and with text alone or several images.
        grounding_system: default system message of a grounded answer, which tells where things are.
            None if the model gives none.
    """

    user: str
    assistant: str
    answer: str
    video_system: str
    image_system: str
    text_system: str
    grounding_system: str | None = None

    def default_system(self, parts: Sequence[PromptPart], grounding: bool) -> str:
        """Returns the system message of a dialogue with these parts."""
        if grounding and self.grounding_system is not None:
            return self.grounding_system
        if any(map(is_video, parts)):
            return self.video_system
        images = sum(len(images_of(part)) for part in parts)
        return self.image_system if images == 1 else self.text_system


# `Emu1/inference.py`.
EMU_CHAT = ChatFormat(f" {USER}: ", f" {ASSISTANT}:", "", VIDEO_SYSTEM, IMAGE_SYSTEM, "")
# `Emu2/emu/chat.py`.
EMU2_CHAT = ChatFormat(
    f" {USER}: ",
    f" {ASSISTANT}:",
    " ",
    video_system=COMPREHENSIVE_SYSTEM,
    image_system=COMPREHENSIVE_SYSTEM,
    text_system=COMPREHENSIVE_SYSTEM,
    grounding_system=CONCISE_SYSTEM,
)
# `build_input_ids` of Emu2-Chat's code on the Hugging Face Hub, which has no default message.
EMU2_HUB_CHAT = ChatFormat(f"{USER}: ", f"{ASSISTANT}:", " ", "", "", "", "")
# By family of models and name.
CHAT_FORMATS = {
    "emu": {"native": EMU_CHAT},
    "emu2": {"native": EMU2_CHAT, "hub": EMU2_HUB_CHAT},
}


@dataclasses.dataclass(frozen=True, eq=False)
class Normalized:
    """An image that the release's preprocessing has already resized and normalized.

    Attributes:
        pixels: of any floating dtype; `side` is the model's image size.
    """

    pixels: Float[np.ndarray, "side side 3"]


# An image: PIL, pixels [h, w, 3] in uint8 or in floats from 0 to 1, or `Normalized` pixels.
PromptImage: TypeAlias = Image.Image | np.ndarray | Normalized
# A text; an image; a video: pixels [F, h, w, 3] or a list of images; or the Path of an image or a
# video.
PromptPart: TypeAlias = str | Path | PromptImage | Sequence[PromptImage]
# A prompt: its parts in reading order, or a single part.
Parts: TypeAlias = PromptPart | Sequence[PromptPart]
# `Any`, because a list of one kind of parts is no list of several.
Prompts: TypeAlias = Sequence[list[Any]]


def is_video(part: PromptPart) -> bool:
    """Returns whether a part is a list of frames."""
    return isinstance(part, list | tuple) or (isinstance(part, np.ndarray) and part.ndim == 4)


def images_of(part: PromptPart) -> list[PromptImage]:
    """Returns the images of a part: none of a text, each frame of a video."""
    if isinstance(part, str):
        return []
    images = list(part) if is_video(part) else [part]  # pyright: ignore[reportArgumentType]
    return cast(list[PromptImage], images)


def as_prompts(prompt: Parts | Prompts) -> tuple[list[Parts], bool]:
    """Returns the prompts of an argument that is one prompt or a list of lists of parts, and
    whether it is one."""
    many = isinstance(prompt, list | tuple) and all(isinstance(p, list | tuple) for p in prompt)
    if many:
        return list(cast(Prompts, prompt)), False
    return [cast(Parts, prompt)], True


def as_parts(prompt: Parts) -> list[PromptPart]:
    """Returns a prompt as a list of parts, with files opened. A single part becomes a list."""
    single = isinstance(prompt, str | Path | Image.Image | np.ndarray | Normalized)
    if not single and not isinstance(prompt, Iterable):
        raise UserError(f"a prompt is a list of texts and images, not {type(prompt).__name__}")
    parts = [prompt] if single else list(prompt)
    return [open_file(part) if isinstance(part, Path) else part for part in parts]


def open_file(path: Path) -> Image.Image | list[Image.Image]:
    """Reads an image, or the frames of a video that the release shows to the model.

    The content decides which it is, not the name.

    Raises:
        UserError: the file is neither, or cannot be read.
    """
    readers = [open_image, _video_file]
    if path.suffix.lower() in VIDEO_SUFFIXES:
        readers.reverse()
    try:
        return readers[0](path)
    except UserError as error:
        try:
            return readers[1](path)
        except UserError:
            raise error from None


def _video_file(path: Path) -> list[Image.Image]:
    try:
        content = storage.read_whole(path, storage.MOST_VIDEO)
    except storage.Unreadable as error:
        why = f"{error.reason} ({error.detail})"
        raise UserError(f"cannot read the video {path}: {why}") from None
    except OSError as error:
        raise UserError(f"cannot read the video {path}: {error.strerror}") from None
    return open_video(content, str(path))


def open_video(content: bytes, where: str, seconds: float = SECONDS) -> list[Image.Image]:
    """Returns the frames of a video that the release shows to the model.

    Args:
        seconds: time limit (see `Video`).

    Raises:
        UserError: the video cannot be read, or not in time.
    """
    video = Video(content, where, seconds)
    return [open_image(data) for _, data in sample_frames(video, FRAMES, None)]


def chat_format(cfg: EmuConfig, name: str = "native") -> ChatFormat:
    """Returns a format of a model's dialogues.

    Args:
        name: "native", the format of the release's code, or "hub", that of Emu2-Chat's code on the
            Hugging Face Hub.

    Raises:
        UserError: the model has no format of this name.
    """
    formats = CHAT_FORMATS[cfg.family]
    if name not in formats:
        raise UserError(f"unknown chat_format {name!r} of this model{suggest(name, formats)}")
    return formats[name]


def instruct(
    prompt: Parts,
    system: str | None = None,
    *,
    style: ChatFormat = EMU_CHAT,
    grounding: bool = False,
) -> list[PromptPart]:
    """Puts a user's turn into the format of an instruction-tuned model, such as
    `<system> [USER]: <prompt> [ASSISTANT]:`; see `converse`."""
    return converse([prompt], system, style=style, grounding=grounding)


def converse(
    turns: Sequence[Parts],
    system: str | None = None,
    *,
    style: ChatFormat = EMU_CHAT,
    grounding: bool = False,
) -> list[PromptPart]:
    """Puts a dialogue into the format of an instruction-tuned model.

    User and model take turns. The user has the first and the last turn; each answer ends in `</s>`.

    Args:
        system: the system message; by default that of the release's examples
            (`ChatFormat.default_system`).
        style: the format; `chat_format` returns a model's.
        grounding: asks for an answer that tells where things are, by appending `<grounding>`.

    Raises:
        UserError: `grounding` of a model that has no such answers.
    """
    if grounding and style.grounding_system is None:
        raise UserError("this model does not tell where things are: leave grounding out")
    asked = [as_parts(turn) for turn in turns]
    if system is None:
        spoken = [part for parts in asked[::2] for part in parts]
        system = style.default_system(spoken, grounding)
    spelled: list[PromptPart] = []
    for number, parts in enumerate(asked):
        if number % 2:
            spelled += [style.answer] if style.answer else []
            spelled += [*parts, EOS]
        else:
            spelled += [f"{system}{style.user}".lstrip(), *parts, style.assistant]
            system = ""
    return [*spelled, GROUNDING] if grounding else spelled


def box_image(box: Box) -> UInt8[np.ndarray, "448 448 3"]:
    """Returns the image that tells Emu2 where an object is: a white outline on black.

    Equals OpenCV's `rectangle` of thickness 3, as in the release. The outline may leave the image.

    Args:
        box: left, top, right and bottom in pixels of an image of `BOX_SIDE` pixels a side.

    Raises:
        UserError: the box has no area, or lies outside of the image.
    """
    left, top, right, bottom = box
    if not (left < right and top < bottom and right >= 0 and bottom >= 0):
        raise UserError(f"the box {list(box)} is empty: give left, top, right, bottom")
    if left >= BOX_SIDE or top >= BOX_SIDE:
        raise UserError(f"the box {list(box)} lies outside of the image of {BOX_SIDE} pixels")
    left, top, right, bottom = (int(edge) for edge in box)
    y, x = np.mgrid[:BOX_SIDE, :BOX_SIDE]
    beside = np.maximum(0, np.maximum(left - x, x - right))
    above = np.maximum(0, np.maximum(top - y, y - bottom))
    across = np.minimum(abs(y - top), abs(y - bottom)) + beside
    down = np.minimum(abs(x - left), abs(x - right)) + above
    white = np.minimum(across, down) <= _BOX_REACH
    return np.repeat(np.where(white, 255, 0).astype(np.uint8)[..., None], 3, axis=2)


def grounded(
    text: str, objects: Sequence[tuple[str, Box | None, PromptPart | None]]
) -> list[PromptPart]:
    """Returns the prompt of an image by Emu2 in which objects have places and looks.

    Args:
        text: describes the whole image.
        objects: for each object its name in the text, its box (`box_image`), and an image of it.
            A box or an image may be None, and is left out.

    Raises:
        UserError: a box is invalid.
    """
    parts: list[PromptPart] = [GROUNDING + text]
    for phrase, box, image in objects:
        parts.append(f"{PHRASE}{phrase}{PHRASE_END}")
        if box is not None:
            parts += [OBJECT, box_image(box), OBJECT_END]
        if image is not None:
            parts.append(image)
    return parts


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A tokenized prompt.

    Attributes:
        embedding_index: index among the embeddings of all its images at `<image>`, -1 elsewhere.
            Image i has the indices from i * `cfg.n_embeddings`; a frame may have fewer.
        images: preprocessed images, uint8, or float32 if `Normalized`.
        frames: True at frames of a video that have embeddings of their own number (`n_frame`).
    """

    tokens: Int[np.ndarray, "T"]
    embedding_index: Int[np.ndarray, "T"]
    images: UInt8[np.ndarray, "images side side 3"] | Float[np.ndarray, "images side side 3"]
    frames: Bool[np.ndarray, "images"]

    @classmethod
    def of(
        cls, parts: Parts, tokenizer: Tokenizer, cfg: EmuConfig, *, append_img: bool = False
    ) -> Prompt:
        """Tokenizes and preprocesses a prompt.

        A text may spell special tokens other than `<image>` and `[gIMG]`; none can span two parts.

        Args:
            append_img: whether to append `[IMG]`, which starts an image.

        Raises:
            UserError: a part is neither text nor an image, a video has no frames, a text spells
                a placeholder of an image or is not valid Unicode, or the prompt has more tokens
                than the model has positions.
        """
        texts, images, frames, numbers = [], [], [], []
        has_frames = cfg.tokens.frame is not None
        placeholders = (IMAGE, FRAME) if has_frames else (IMAGE,)
        for part in as_parts(parts):
            if isinstance(part, str):
                if spelled := [token for token in placeholders if token in part]:
                    raise UserError(f"a text must not spell {spelled[0]}: pass the image itself")
                texts.append(part)
                continue
            shown = images_of(part)
            if not shown:
                raise UserError("a video of the prompt has no frames: leave it out")
            framed = has_frames and is_video(part)
            token, n = (FRAME, cfg.n_frame) if framed else (IMAGE, cfg.n_embeddings)
            texts += [VIDEO] if framed else []
            for image in shown:
                if isinstance(image, str):
                    raise UserError(
                        "a list within a prompt is a video, of images and not a text: to pass "
                        "many prompts, make each of them a list"
                    )
                texts.append(IMG + token * n + IMG_END)
                numbers.append(np.arange(n) + len(images) * cfg.n_embeddings)
                images.append(preprocess_image(image, cfg.vision.image_size))
                frames.append(framed)
        tokens = tokenizer.encode_parts([*texts, IMG] if append_img else texts)
        if len(tokens) > cfg.llama.context_length:
            raise UserError(
                f"the prompt has {len(tokens)} tokens, the model reads {cfg.llama.context_length}: "
                "shorten it"
            )
        tokens = np.asarray(tokens, np.int32)
        here = tokens == cfg.tokens.image
        if has_frames:
            here |= tokens == cfg.tokens.frame
        embedding_index = np.full(len(tokens), -1, np.int32)
        embedding_index[here] = np.concatenate([*numbers, np.zeros(0, np.int32)])
        size = cfg.vision.image_size
        if len({image.dtype for image in images}) > 1:
            raise UserError(MIXED)
        pixels = np.stack(images) if images else np.zeros((0, size, size, 3), np.uint8)
        return cls(tokens, embedding_index, pixels, np.array(frames, bool))


def preprocess_image(
    image: PromptPart, size: int
) -> UInt8[np.ndarray, "side side 3"] | Float[np.ndarray, "side side 3"]:
    """Resizes an image as the release does, to [size, size, 3].

    Returns uint8, or float32 if the image is `Normalized`.

    Raises:
        UserError: it is not an image, or its shape, dtype or range is wrong.
    """
    if isinstance(image, Normalized):
        if image.pixels.shape != (size, size, 3):
            raise UserError(
                f"normalized pixels of shape {list(image.pixels.shape)}: this model reads "
                f"[{size}, {size}, 3]"
            )
        return image.pixels.astype(np.float32)
    if isinstance(image, np.ndarray):
        floating = np.issubdtype(image.dtype, np.floating)
        if image.ndim != 3 or image.shape[2] != 3 or not (floating or image.dtype == np.uint8):
            raise UserError(
                "an image must be uint8 [h, w, 3], or floats from 0 to 1, not "
                f"{image.dtype} {list(image.shape)}"
            )
        if not image.size:
            raise UserError(f"an image of shape {list(image.shape)} has no pixels")
        if floating:
            low, high = image.min(), image.max()
            if not (low >= 0 and high <= 1):  # also where one is NaN
                raise UserError(
                    f"an image of floats from {low:g} to {high:g}: scale it to 0..1, pass uint8, "
                    "or wrap pixels that are already normalized in generate.prompt.Normalized"
                )
            image = np.round(image * 255.0).astype(np.uint8)
        if image.shape[:2] == (size, size):
            return image
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise UserError(f"a prompt has texts and images, not {type(image).__name__}")
    return load_image(image, size)


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Padded prompts.

    Attributes:
        images: the preprocessed images of all rows, uint8, or float32 if `Normalized`.
        frames: which of them are frames of videos (`Prompt.frames`).
        image_index: each row's images as indices into `images`; 0 beyond its last one.
    """

    tokens: Int[np.ndarray, "B T"]
    valid: Bool[np.ndarray, "B T"]
    embedding_index: Int[np.ndarray, "B T"]
    images: UInt8[np.ndarray, "all side side 3"] | Float[np.ndarray, "all side side 3"]
    frames: Bool[np.ndarray, "all"]
    image_index: Int[np.ndarray, "B images"]


def pad(
    prompts: Sequence[Prompt],
    side: Literal["left", "right"],
    *,
    rows: int,
    length: int,
    images: int,
    fill: int,
) -> PromptBatch:
    """Pads prompts to [rows, length] with room for `images` images in each row.

    Missing rows repeat the last prompt.
    """
    if len({p.images.dtype for p in prompts if len(p.images)}) > 1:
        raise UserError(MIXED)
    padded = [prompts[min(i, len(prompts) - 1)] for i in range(rows)]
    tokens = np.full((rows, length), fill, np.int32)
    valid = np.zeros((rows, length), bool)
    embedding_index = np.full((rows, length), -1, np.int32)
    image_index = np.zeros((rows, images), np.int32)
    starts = np.cumsum([0] + [len(p.images) for p in prompts])
    for i, prompt in enumerate(padded):
        n = len(prompt.tokens)
        where = slice(length - n, length) if side == "left" else slice(0, n)
        tokens[i, where], valid[i, where], embedding_index[i, where] = (
            prompt.tokens,
            True,
            prompt.embedding_index,
        )
        image_index[i, : len(prompt.images)] = starts[min(i, len(prompts) - 1)] + np.arange(
            len(prompt.images)
        )
    return PromptBatch(
        tokens,
        valid,
        embedding_index,
        _join([p.images for p in prompts]),
        np.concatenate([p.frames for p in prompts]),
        image_index,
    )


def _join(images: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([p for p in images if len(p)] or [images[0]])
