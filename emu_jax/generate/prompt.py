"""Prompts: texts and pictures in reading order, as token ids and pixels.

The release spells a prompt as one string, each picture as `[IMG]<image>*N[/IMG]`, and tokenises
it whole (`Emu1/inference.py`, `Emu1/models/pipeline.py`). Text prompts are padded on the left,
contexts of pictures on the right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from emu_jax.config import EmuConfig
from emu_jax.data import storage
from emu_jax.data.images import load_image, open_image
from emu_jax.data.sources.dialogues import IMAGE_SYSTEM, VIDEO_SYSTEM
from emu_jax.data.sources.video import FRAMES, VIDEO_SUFFIXES, Video, sample_frames
from emu_jax.errors import UserError
from emu_jax.tokenizer import ASSISTANT, EOS, IMAGE, IMG, USER, Tokenizer

# str, a PIL picture, pixels [h, w, 3] in uint8 or in floats from 0 to 1; or a video: [F, h, w, 3]
# or a list of pictures; or the Path of a file of either; or `Normalized` pixels.
Part = Any
Parts = Sequence[Part] | str
_MIXED = "a batch has both `Normalized` and other pictures: pass all of them as one kind"


@dataclasses.dataclass(frozen=True, eq=False)
class Normalized:
    """A picture that the release's preprocessing has already squashed and normalized.

    Attributes:
        pixels: of any floating dtype; the side is the model's image size.
    """

    pixels: Float[np.ndarray, "side side 3"]


def is_video(part: Part) -> bool:
    """Whether a part is a list of frames."""
    return isinstance(part, list | tuple) or (isinstance(part, np.ndarray) and part.ndim == 4)


def pictures_of(part: Part) -> list[Any]:
    """The pictures of a part: none of a text, one of a picture, each frame of a video."""
    if isinstance(part, str):
        return []
    return list(part) if is_video(part) else [part]


def as_parts(prompt: Parts) -> list[Part]:
    """A prompt as its list of parts, files opened; a lone part is a list of one."""
    alone = isinstance(prompt, str | Path | Image.Image | np.ndarray | Normalized)
    if not alone and not isinstance(prompt, Iterable):
        raise UserError(f"a prompt is a list of texts and images, not {type(prompt).__name__}")
    parts = [prompt] if alone else list(prompt)
    return [open_file(part) if isinstance(part, Path) else part for part in parts]


def open_file(path: Path) -> Part:
    """Reads an image, or of a video the frames that the release shows. A file's content
    decides which it is.

    Raises:
        UserError: it is neither, or cannot be read.
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


def open_video(content: bytes, where: str) -> list[Image.Image]:
    """The frames that the release shows of a video file.

    Raises:
        UserError: it cannot be read.
    """
    return [open_image(data) for _, data in sample_frames(Video(content, where), FRAMES, None)]


def instruct(prompt: Parts, system: str | None = None) -> list[Part]:
    """A user's turn in the format of the instruction-tuned model:
    `<system> [USER]: <prompt> [ASSISTANT]:`.

    Without `system` it is chosen as the release's examples do: their message for one picture,
    that for a video, nothing before text alone or several pictures between texts.
    """
    return converse([prompt], system)


def converse(turns: Sequence[Parts], system: str | None = None) -> list[Part]:
    """`instruct` for a dialogue, in which user and model take turns: the user is first, and last.
    An answer ends in `</s>`."""
    asked = [as_parts(turn) for turn in turns]
    if system is None:
        shown = [part for parts in asked[::2] for part in parts]
        pictures = sum(len(pictures_of(part)) for part in shown)
        videos = any(map(is_video, shown))
        system = VIDEO_SYSTEM if videos else IMAGE_SYSTEM if pictures == 1 else ""
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
    """One tokenised prompt.

    Attributes:
        slots: picture * N + slot at the `<image>` positions of its pictures, else -1.
    """

    tokens: Int[np.ndarray, "T"]
    slots: Int[np.ndarray, "T"]
    pictures: np.ndarray  # uint8 [I, h, w, 3], or float32 where normalised

    @classmethod
    def of(
        cls, parts: Parts, tokenizer: Tokenizer, cfg: EmuConfig, *, opens: bool = False
    ) -> Prompt:
        """Spells, tokenises and preprocesses a prompt; with `opens` it ends in `[IMG]`.

        A text may spell special tokens other than `<image>`; none can span two parts.

        Raises:
            UserError: a part that is neither text nor an image, a video without frames, a text
                that spells `<image>` or is not valid Unicode, or more tokens than the model has
                positions for.
        """
        texts, pictures, n = [], [], cfg.cformer.n_causal
        for part in as_parts(parts):
            if isinstance(part, str):
                if IMAGE in part:
                    raise UserError(f"a text must not spell {IMAGE}: pass the picture itself")
                texts.append(part)
                continue
            frames = pictures_of(part)
            if not frames:
                raise UserError("a video of the prompt has no frames: leave it out")
            for picture in frames:
                texts.append(tokenizer.image_placeholder(n))
                pictures.append(pixels_of(picture, cfg.vision.image_size))
        tokens = tokenizer.encode_parts([*texts, IMG] if opens else texts)
        if len(tokens) > cfg.llama.max_positions:
            raise UserError(
                f"the prompt has {len(tokens)} tokens, the model reads {cfg.llama.max_positions}: "
                "shorten it"
            )
        tokens = np.asarray(tokens, np.int32)
        here = tokens == cfg.tokens.image
        slots = np.where(here, np.cumsum(here) - 1, -1).astype(np.int32)
        size = cfg.vision.image_size
        if len({picture.dtype for picture in pictures}) > 1:
            raise UserError(_MIXED)
        pixels = np.stack(pictures) if pictures else np.zeros((0, size, size, 3), np.uint8)
        return cls(tokens, slots, pixels)


def pixels_of(picture: Any, size: int) -> np.ndarray:
    """Preprocesses a picture as the release does, to [size, size, 3]: uint8, or float32 where it
    is `Normalized`.

    Raises:
        UserError: it is not a picture, or its shape, dtype or range is wrong.
    """
    if isinstance(picture, Normalized):
        if picture.pixels.shape != (size, size, 3):
            raise UserError(
                f"normalized pixels of shape {list(picture.pixels.shape)}: this model reads "
                f"[{size}, {size}, 3]"
            )
        return picture.pixels.astype(np.float32)
    if isinstance(picture, np.ndarray):
        floating = np.issubdtype(picture.dtype, np.floating)
        if (
            picture.ndim != 3
            or picture.shape[2] != 3
            or not (floating or picture.dtype == np.uint8)
        ):
            raise UserError(
                "a picture must be uint8 [h, w, 3], or floats from 0 to 1, not "
                f"{picture.dtype} {list(picture.shape)}"
            )
        if not picture.size:
            raise UserError(f"a picture of shape {list(picture.shape)} has no pixels")
        if floating:
            low, high = picture.min(), picture.max()
            if not (low >= 0 and high <= 1):  # also where one is NaN
                raise UserError(
                    f"a picture of floats from {low:g} to {high:g}: scale it to 0..1, pass uint8, "
                    "or wrap pixels that are already normalized in generate.prompt.Normalized"
                )
            picture = np.round(picture * 255.0).astype(np.uint8)
        if picture.shape[:2] == (size, size):
            return picture
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        raise UserError(f"a prompt has texts and pictures, not {type(picture).__name__}")
    return load_image(picture, size)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts of one shape. The pictures of all rows stand in one list."""

    tokens: Int[np.ndarray, "B T"]
    valid: Bool[np.ndarray, "B T"]
    slots: Int[np.ndarray, "B T"]
    pictures: np.ndarray  # uint8 [M, h, w, 3], or float32 where normalised
    which: Int[np.ndarray, "B I"]  # a row's pictures in that list; 0 where it has fewer


def pad(
    prompts: Sequence[Prompt],
    side: Literal["left", "right"],
    *,
    rows: int,
    length: int,
    pictures: int,
    fill: int,
) -> Batch:
    """`prompts` as [rows, length] arrays with room for `pictures` a row; missing rows repeat
    the last prompt."""
    if len({p.pictures.dtype for p in prompts if len(p.pictures)}) > 1:
        raise UserError(_MIXED)
    padded = [prompts[min(i, len(prompts) - 1)] for i in range(rows)]
    tokens = np.full((rows, length), fill, np.int32)
    valid = np.zeros((rows, length), bool)
    slots = np.full((rows, length), -1, np.int32)
    which = np.zeros((rows, pictures), np.int32)
    starts = np.cumsum([0] + [len(p.pictures) for p in prompts])
    for i, prompt in enumerate(padded):
        n = len(prompt.tokens)
        where = slice(length - n, length) if side == "left" else slice(0, n)
        tokens[i, where], valid[i, where], slots[i, where] = prompt.tokens, True, prompt.slots
        which[i, : len(prompt.pictures)] = starts[min(i, len(prompts) - 1)] + np.arange(
            len(prompt.pictures)
        )
    return Batch(tokens, valid, slots, _join([p.pictures for p in prompts]), which)


def _join(pictures: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([p for p in pictures if len(p)] or [pictures[0]])
