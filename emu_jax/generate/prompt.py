"""Prompts: texts and images in reading order, as token ids and pixels.

The release spells a prompt as one string, each image as `[IMG]<image>*N[/IMG]`, and tokenizes
it whole (`Emu1/inference.py`, `Emu1/models/pipeline.py`). Prompts for text are padded on the left,
prompts for images on the right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from emu_jax.config import EmuConfig
from emu_jax.data import storage
from emu_jax.data.images import load_image, open_image
from emu_jax.data.sources.dialogues import IMAGE_SYSTEM, VIDEO_SYSTEM
from emu_jax.data.sources.video import (
    FRAMES,
    SECONDS,
    VIDEO_SUFFIXES,
    Video,
    sample_frames,
)
from emu_jax.errors import UserError
from emu_jax.tokenizer import ASSISTANT, EOS, IMAGE, IMG, USER, Tokenizer

# A text; an image: PIL, pixels [h, w, 3] in uint8 or in floats from 0 to 1, `Normalized` pixels; a
# video: pixels [F, h, w, 3] or a list of images; or the Path of an image or a video.
Part: TypeAlias = Any
Parts: TypeAlias = Sequence[Part] | str
Prompts: TypeAlias = Sequence[list[Any]]
_MIXED = "a batch has both `Normalized` and other images: pass all of them as one kind"


@dataclasses.dataclass(frozen=True, eq=False)
class Normalized:
    """An image that the release's preprocessing has already resized and normalized.

    Attributes:
        pixels: of any floating dtype; `side` is the model's image size.
    """

    pixels: Float[np.ndarray, "side side 3"]


def is_video(part: Part) -> bool:
    """Returns whether a part is a list of frames."""
    return isinstance(part, list | tuple) or (isinstance(part, np.ndarray) and part.ndim == 4)


def images_of(part: Part) -> list[Any]:
    """Returns the images of a part: none of a text, each frame of a video."""
    if isinstance(part, str):
        return []
    return list(part) if is_video(part) else [part]


def as_prompts(prompt: Any) -> tuple[list[Any], bool]:
    """Returns the prompts of an argument that is one prompt or a list of lists of parts, and
    whether it is one."""
    many = isinstance(prompt, list | tuple) and all(isinstance(p, list | tuple) for p in prompt)
    return (list(prompt), False) if many else ([prompt], True)


def as_parts(prompt: Any) -> list[Part]:
    """Returns a prompt as a list of parts, with files opened. A single part becomes a list."""
    single = isinstance(prompt, str | Path | Image.Image | np.ndarray | Normalized)
    if not single and not isinstance(prompt, Iterable):
        raise UserError(f"a prompt is a list of texts and images, not {type(prompt).__name__}")
    parts = [prompt] if single else list(prompt)
    return [open_file(part) if isinstance(part, Path) else part for part in parts]


def open_file(path: Path) -> Part:
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


def instruct(prompt: Parts, system: str | None = None) -> list[Part]:
    """Puts a user's turn into the format of the instruction-tuned model:
    `<system> [USER]: <prompt> [ASSISTANT]:`.

    Without `system`, the message is that of the release's examples: one for a single image, one
    for a video, and none for text alone or several images.
    """
    return converse([prompt], system)


def converse(turns: Sequence[Parts], system: str | None = None) -> list[Part]:
    """Puts a dialogue into the format of the instruction-tuned model; see `instruct`.

    User and model take turns. The user has the first and the last turn; each answer ends in `</s>`.
    """
    asked = [as_parts(turn) for turn in turns]
    if system is None:
        said = [part for parts in asked[::2] for part in parts]
        count = sum(len(images_of(part)) for part in said)
        videos = any(map(is_video, said))
        system = VIDEO_SYSTEM if videos else IMAGE_SYSTEM if count == 1 else ""
    spelled: list[Part] = []
    for number, parts in enumerate(asked):
        if number % 2:
            spelled += [*parts, EOS]
        else:
            spelled += [f"{system} {USER}: ".lstrip(), *parts, f" {ASSISTANT}:"]
            system = ""
    return spelled


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A tokenized prompt.

    Attributes:
        embedding_index: index among the embeddings of all its images at `<image>`, -1 elsewhere.
        images: preprocessed images, uint8, or float32 if `Normalized`.
    """

    tokens: Int[np.ndarray, "T"]
    embedding_index: Int[np.ndarray, "T"]
    images: UInt8[np.ndarray, "images side side 3"] | Float[np.ndarray, "images side side 3"]

    @classmethod
    def of(
        cls, parts: Parts, tokenizer: Tokenizer, cfg: EmuConfig, *, append_img: bool = False
    ) -> Prompt:
        """Tokenizes and preprocesses a prompt.

        A text may spell special tokens other than `<image>`; none can span two parts.

        Args:
            append_img: whether to append `[IMG]`, which starts an image.

        Raises:
            UserError: a part is neither text nor an image, a video has no frames, a text spells
                `<image>` or is not valid Unicode, or the prompt has more tokens than the model
                has positions.
        """
        texts, images, n = [], [], cfg.n_embeddings
        for part in as_parts(parts):
            if isinstance(part, str):
                if IMAGE in part:
                    raise UserError(f"a text must not spell {IMAGE}: pass the image itself")
                texts.append(part)
                continue
            frames = images_of(part)
            if not frames:
                raise UserError("a video of the prompt has no frames: leave it out")
            for image in frames:
                if isinstance(image, str):
                    raise UserError(
                        "a list within a prompt is a video, of images and not a text: to pass "
                        "many prompts, make each of them a list"
                    )
                texts.append(tokenizer.image_placeholder(n))
                images.append(preprocess_image(image, cfg.vision.image_size))
        tokens = tokenizer.encode_parts([*texts, IMG] if append_img else texts)
        if len(tokens) > cfg.llama.max_positions:
            raise UserError(
                f"the prompt has {len(tokens)} tokens, the model reads {cfg.llama.max_positions}: "
                "shorten it"
            )
        tokens = np.asarray(tokens, np.int32)
        here = tokens == cfg.tokens.image
        embedding_index = np.where(here, np.cumsum(here) - 1, -1).astype(np.int32)
        size = cfg.vision.image_size
        if len({image.dtype for image in images}) > 1:
            raise UserError(_MIXED)
        pixels = np.stack(images) if images else np.zeros((0, size, size, 3), np.uint8)
        return cls(tokens, embedding_index, pixels)


def preprocess_image(
    image: Any, size: int
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
        image_index: each row's images as indices into `images`; 0 beyond its last one.
    """

    tokens: Int[np.ndarray, "B T"]
    valid: Bool[np.ndarray, "B T"]
    embedding_index: Int[np.ndarray, "B T"]
    images: UInt8[np.ndarray, "all side side 3"] | Float[np.ndarray, "all side side 3"]
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
        raise UserError(_MIXED)
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
        tokens, valid, embedding_index, _join([p.images for p in prompts]), image_index
    )


def _join(images: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([p for p in images if len(p)] or [images[0]])
