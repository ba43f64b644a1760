"""Settings of generation, as users give them and as compiled programs take them.

A program is compiled for `StaticSettings`. `DynamicSettings` are its inputs, so they
may change without a new compilation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from emu_jax import diffusion
from emu_jax.config import EmuConfig, TokenIds
from emu_jax.errors import UserError, suggest
from emu_jax.storage import read_json_object

MAX_SEED = 2**32 - 1  # JAX keeps 32 bits of a seed
MIN_BUCKET = 8
MAX_SIDE = 2**16  # pixels; more is a typing error
# Former names of settings, which files and requests may still use.
RENAMED = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "method": "scheduler",
}
# Settings in which the release of a family of models differs from the defaults below
# (`Emu2/emu/emu.py: generate`, `Emu2/emu/diffusion.py`).
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "emu": {},
    "emu2": {
        "max_new_tokens": 10,
        "length_penalty": -1.0,
        "guidance_scale": 3.0,
    },
}


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Settings of text decoding; the defaults are the release's
    (`Emu1/models/modeling_emu.py: generate`).

    Attributes:
        top_k: 0 keeps every token.
        min_length: counts the dummy `<s>`: 1 allows an empty answer.
        length_penalty: a beam's score is divided by length ** length_penalty.
        no_repeat_ngram_size: 0 allows repetition.
        early_stopping: True ends a search when `num_beams` sequences are finished, False when
            a better one is unlikely, "never" when it is impossible.
        seed: of sampling, from 0 to 2**32 - 1. Row i of a batch samples with a key that
            follows from the seed and i.
    """

    max_new_tokens: int = 50
    num_beams: int = 5
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.9
    min_length: int = 1
    repetition_penalty: float = 1.0
    length_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    early_stopping: bool | Literal["never"] = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is invalid.
        """
        check_types(type(self), vars(self))
        wrong = {
            "max_new_tokens": self.max_new_tokens < 1,
            "num_beams": self.num_beams < 1,
            "temperature": self.temperature <= 0,
            "top_k": self.top_k < 0,
            "top_p": not 0 < self.top_p <= 1,
            "repetition_penalty": self.repetition_penalty <= 0,
            "no_repeat_ngram_size": self.no_repeat_ngram_size < 0,
            "min_length": self.min_length > self.max_new_tokens + 1,
        }
        for name in (name for name, is_wrong in wrong.items() if is_wrong):
            hint = f" with max_new_tokens {self.max_new_tokens}" if name == "min_length" else ""
            raise UserError(f"{name} cannot be {getattr(self, name)!r}{hint}")


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """Settings of image generation; the defaults are the release's.

    Attributes:
        guidance_scale: scale of classifier-free guidance; 1 or less turns it off.
        scheduler: pndm (that of Emu1's release), ddim, dpm++ or euler (that of Emu2's).
        height: of an image, in pixels; None: the size that the decoder was trained on.
        width: of an image, in pixels; None: the size that the decoder was trained on.
        original_size: height and width of the imagined original, which SDXL's decoder is
            conditioned on; None: the size that the decoder was trained on.
        crops_coords_top_left: top and left of the crop from it, another condition; None: 0, 0.
        target_size: height and width of the crop, another condition; None: those of the image.
    """

    guidance_scale: float = 7.5
    num_inference_steps: int = 50
    scheduler: str = "pndm"
    height: int | None = None
    width: int | None = None
    original_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is invalid.
        """
        check_types(type(self), vars(self))
        if self.scheduler not in diffusion.METHODS:
            known = suggest(self.scheduler, diffusion.METHODS)
            raise UserError(f"unknown scheduler {self.scheduler!r}{known}")
        if self.num_inference_steps < 1:
            raise UserError(f"num_inference_steps cannot be {self.num_inference_steps}")
        for name in ("height", "width"):
            if not 1 <= (getattr(self, name) or 1) <= MAX_SIDE:
                raise UserError(
                    f"{name} cannot be {getattr(self, name)}: give 1 to {MAX_SIDE} pixels"
                )


@dataclasses.dataclass(frozen=True)
class GenerationConfig(TextConfig, ImageConfig):
    """Settings of generation; `generation.json` in a run directory may change the defaults.

    Attributes:
        max_images: largest number of images in a continuation.
        system: the system message of an instruction-tuned model, whose prompts are put into its
            format unless they spell `[USER]` already. None chooses the message of the release's
            examples (`prompt.instruct`).
        chat_format: the format that prompts of an instruction-tuned model are put into: "native",
            that of the release's code, or "hub" (`prompt.chat_format`).
        grounding: asks an instruction-tuned Emu2 for text that tells where things are, and keeps
            the special tokens that do so in the text of `generate_text`.
    """

    max_images: int = 4
    system: str | None = None
    chat_format: str = "native"
    grounding: bool = False

    @classmethod
    def of(cls, cfg: EmuConfig) -> GenerationConfig:
        """Returns the defaults of a model's release, with the sampler of its scheduler."""
        return cls(scheduler=cfg.scheduler.sampler, **FAMILY_DEFAULTS[cfg.family])

    @classmethod
    def load(cls, path: Path, defaults: GenerationConfig | None = None) -> GenerationConfig:
        """Reads `generation.json`, which may use former names of settings.

        Args:
            defaults: the settings that the file does not name.

        Raises:
            UserError: the file cannot be read, or a setting is unknown or invalid.
        """
        values = {RENAMED.get(name, name): v for name, v in read_json_object(path).items()}
        try:
            return (defaults or cls()).replace(**values)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def replace(self, **settings: Any) -> GenerationConfig:
        """Returns a copy with other settings.

        Raises:
            UserError: a setting is unknown or its value is invalid.
        """
        known = {f.name: f.type for f in dataclasses.fields(self)}
        for name in settings:
            if name in RENAMED:
                raise UserError(f"unknown generation setting {name!r}: it is now {RENAMED[name]!r}")
            if name not in known:
                raise UserError(f"unknown generation setting {name!r}{suggest(name, known)}")
        check_types(type(self), settings)
        values = {
            n: float(v) if known[n] == "float" else tuple(v) if isinstance(v, list) else v
            for n, v in settings.items()
        }
        return dataclasses.replace(self, **values)

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is invalid.
        """
        TextConfig.__post_init__(self)
        ImageConfig.__post_init__(self)
        if self.max_images < 0:
            raise UserError(f"max_images cannot be {self.max_images}")


class TextSettings(TypedDict, total=False):
    """Keyword arguments of text generation: fields of `GenerationConfig`."""

    max_new_tokens: int
    num_beams: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_length: int
    repetition_penalty: float
    length_penalty: float
    no_repeat_ngram_size: int
    early_stopping: bool | Literal["never"]
    seed: int
    system: str | None
    chat_format: str
    grounding: bool


class ImageSettings(TypedDict, total=False):
    """Keyword arguments of image generation: fields of `GenerationConfig`."""

    guidance_scale: float
    num_inference_steps: int
    scheduler: str
    height: int | None
    width: int | None
    original_size: tuple[int, int] | None
    crops_coords_top_left: tuple[int, int] | None
    target_size: tuple[int, int] | None


class MixedSettings(TextSettings, ImageSettings, total=False):
    """Keyword arguments of mixed generation: fields of `GenerationConfig`."""

    max_images: int


def check_types(config: type, values: Mapping[str, object]) -> None:
    """Checks values for the fields of a settings dataclass.

    Raises:
        UserError: a value has another type, is not finite, or needs more than 32 bits.
    """
    for field in dataclasses.fields(config):
        if field.name not in values:
            continue
        value, kind = values[field.name], str(field.type)
        if value is None and kind.endswith("| None"):
            continue
        kind = kind.removesuffix(" | None")
        if field.name == "seed":
            check_seed(value)
        elif kind == "int" and not _is_int(value):
            raise UserError(f"{field.name} cannot be {_shown(value)}: give a whole number")
        elif kind == "float" and not (
            isinstance(value, int | float | np.integer | np.floating)
            and not isinstance(value, bool)
            and abs(value) <= float(np.finfo(np.float32).max)
        ):
            raise UserError(f"{field.name} cannot be {_shown(value)}: give a finite number")
        elif kind == "bool" and value not in (True, False):
            raise UserError(f"{field.name} cannot be {_shown(value)}: give True or False")
        elif kind == "tuple[int, int]" and not (
            isinstance(value, tuple | list)
            and len(value) == 2
            and all(_is_int(v) and 0 <= v <= MAX_SIDE for v in value)
        ):
            raise UserError(
                f"{field.name} cannot be {_shown(value)}: give two numbers of pixels, 0 to "
                f"{MAX_SIDE}"
            )
        elif kind == "str" and not isinstance(value, str):
            raise UserError(f"{field.name} cannot be {_shown(value)}: give a string")
        elif field.name == "early_stopping" and value not in (True, False, "never"):
            raise UserError(f'early_stopping cannot be {value!r}: give True, False or "never"')


def _is_int(value: object) -> bool:
    return (
        isinstance(value, int | np.integer)
        and not isinstance(value, bool)
        and abs(int(value)) < 2**31 - 1
    )


def check_seed(seed: object) -> None:
    """Checks that a seed is one of the 2**32 that JAX tells apart.

    Raises:
        UserError: it is not a whole number from 0 to 2**32 - 1.
    """
    if (
        not isinstance(seed, int | np.integer)
        or isinstance(seed, bool)
        or not 0 <= seed < MAX_SEED + 1
    ):
        raise UserError(f"seed cannot be {_shown(seed)}: give a whole number from 0 to {MAX_SEED}")


def _shown(value: object) -> str:
    if isinstance(value, int) and abs(value) >= 10**40:
        return f"a number of {value.bit_length()} bits"
    return repr(value)


@dataclasses.dataclass(frozen=True)
class StaticSettings:
    """Decode settings that a program is compiled for.

    Attributes:
        output_length: most tokens to generate, `max_new_tokens` rounded up to a bucket.
    """

    output_length: int
    num_beams: int
    do_sample: bool
    penalize_repetition: bool
    no_repeat_ngram_size: int
    early_stopping: bool | Literal["never"]
    tokens: TokenIds

    @classmethod
    def of(cls, cfg: TextConfig, tokens: TokenIds, min_length: int = MIN_BUCKET) -> StaticSettings:
        """Returns the static part of `cfg`, with an output of at least `min_length` tokens."""
        return cls(
            bucket(cfg.max_new_tokens, min_length),
            cfg.num_beams,
            cfg.do_sample,
            cfg.repetition_penalty != 1.0,
            cfg.no_repeat_ngram_size,
            cfg.early_stopping,
            tokens,
        )


class DynamicSettings(NamedTuple):
    """Decode settings that may change without a new compilation.

    Attributes:
        max_length: counts the dummy `<s>`.
    """

    max_length: Int[Array, ""]
    min_length: Int[Array, ""]
    repetition_penalty: Float[Array, ""]
    length_penalty: Float[Array, ""]
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]

    @classmethod
    def of(cls, cfg: TextConfig) -> DynamicSettings:
        """Returns the dynamic part of `cfg`."""
        i, f = jnp.int32, jnp.float32
        return cls(
            i(cfg.max_new_tokens + 1),
            i(cfg.min_length),
            f(cfg.repetition_penalty),
            f(cfg.length_penalty),
            f(cfg.temperature),
            i(cfg.top_k),
            f(cfg.top_p),
        )


def bucket(n: int, smallest: int = MIN_BUCKET) -> int:
    """Returns the smallest of 8, 12, 16, 24, 32, 48, ... that holds n, so that few shapes are
    compiled."""
    power = 1 << max(n - 1, 0).bit_length()
    return max(smallest, power * 3 // 4 if n <= power * 3 // 4 else power)
