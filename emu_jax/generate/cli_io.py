"""Prompts and answers on the command line and in its batch files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_type_hints

from PIL import Image

from emu_jax.errors import UserError
from emu_jax.generate.api import Emu
from emu_jax.generate.prompt import PromptPart, open_file
from emu_jax.generate.settings import (
    MAX_SEED,
    GenerationConfig,
    ImageSettings,
    MixedSettings,
    TextSettings,
    check_seed,
)
from emu_jax.storage import writing

Output = Literal["text", "image", "auto"]
OUTPUT_SETTINGS = {"text": TextSettings, "image": ImageSettings, "auto": MixedSettings}


def parse_part(part: str) -> PromptPart:
    """Reads a PART: `@FILE` is an image or a video, anything else is text. `@@` starts a text that
    begins with @.

    Raises:
        UserError: the file cannot be read, or a text is not valid Unicode.
    """
    if part.startswith("@@") or not part.startswith("@"):
        try:
            part.encode()
        except UnicodeEncodeError:
            raise UserError(f"the text {part[:40]!a} is not UTF-8: check its encoding") from None
        return part.removeprefix("@")
    return open_file(Path(part[1:]))


def read_batch(path: Path) -> list[list[PromptPart]]:
    """Reads a file of prompts, each line a JSON list of PARTs or a single PART.

    Raises:
        UserError: the file cannot be read or is empty, or a line is malformed.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # U+2028 may stand in a string
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            parts = json.loads(line)
        except (ValueError, RecursionError):
            parts = None
        parts = [parts] if isinstance(parts, str) else parts
        if not isinstance(parts, list) or not parts or not all(isinstance(p, str) for p in parts):
            raise UserError(
                f'{path}, line {number}: not a JSON list of parts such as ["@a.png", "what is it?"]'
            )
        try:
            prompts.append([parse_part(p) for p in parts])
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    if not prompts:
        raise UserError(f"{path} has no prompts: write a JSON list of parts on each line")
    return prompts


def check_seeds(output: Output, seed: int, prompts: int) -> None:
    """Checks the seeds of a batch of prompts.

    Raises:
        UserError: a seed that `answer` would use for one of `prompts` prompts is out of range.
    """
    last = seed + prompts - 1 if output == "image" else seed
    if seed >= 0 and last > MAX_SEED:
        raise UserError(
            f"--seed {seed} is too large for {prompts} prompts, each of which takes the next seed: "
            f"give at most {MAX_SEED - prompts + 1}"
        )
    check_seed(seed)


def parse_settings(output: Output, given: Iterable[str]) -> dict[str, Any]:
    """Parses NAME=VALUE settings of generation. A value is JSON, or else a text.

    Raises:
        UserError: a setting is malformed, unknown, invalid, or has no effect on `output`.
    """
    known = get_type_hints(OUTPUT_SETTINGS[output])
    settings: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: give NAME=VALUE, such as num_beams=1")
        try:
            settings[name] = json.loads(value)
        except (ValueError, RecursionError):
            settings[name] = value
    GenerationConfig().replace(**settings)
    for name in settings:
        if name not in known:
            raise UserError(f"--set {name} has no effect on --output {output}: leave it out")
    return settings


def answer(
    emu: Emu,
    prompts: Sequence[list[PromptPart]],
    output: Output,
    seed: int,
    max_new_tokens: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[list[str | Image.Image]]:
    """Answers each prompt with text, an image, or both as the model decides.

    With output "image", prompt n gets the image that a single prompt gets from `seed + n`.

    Args:
        settings: more settings, which `parse_settings` returned.
    """
    chosen: dict[str, Any] = {"seed": seed}
    if max_new_tokens is not None:
        chosen["max_new_tokens"] = max_new_tokens
    GenerationConfig().replace(**chosen)  # an invalid number is an error with any output
    more: dict[str, Any] = dict(settings or {})
    chosen |= more
    if output == "text":
        return [[text] for text in emu.generate_text(prompts, **chosen)]
    if output == "image":
        seeds = range(seed, seed + len(prompts))
        return [[image] for image in emu.generate_image(prompts, seed=seeds, **more)]
    return emu.complete(prompts, **chosen)


def check_save(path: Path) -> None:
    """Checks that an image can be saved under a name.

    Raises:
        UserError: the suffix is of no image format.
    """
    if path.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"--save {path}: no image format {path.suffix!r}: use .png")
    if not path.parent.is_dir():
        raise UserError(f"--save {path}: there is no directory {path.parent}")


def save(parts: Iterable[str | Image.Image], path: Path, *, numbered: bool) -> list[dict[str, str]]:
    """Saves images and returns a description of each part, `{"text": ...}` or `{"image": file}`.

    A single image is saved as `path`; numbered images are saved as STEM-1, STEM-2, ...
    """
    shown: list[dict[str, str]] = []
    for part in parts:
        if isinstance(part, str):
            shown.append({"text": part})
            continue
        number = 1 + sum("image" in earlier for earlier in shown)
        file = path.with_name(f"{path.stem}-{number}{path.suffix}") if numbered else path
        with writing(file) as temporary:
            part.save(temporary, format=Image.registered_extensions()[file.suffix.lower()])
        shown.append({"image": str(file)})
    return shown


def save_batch(
    answers: Sequence[Iterable[str | Image.Image]], path: Path, *, numbered: bool
) -> list[list[dict[str, str]]]:
    """Saves many answers (`save`), the images of the n-th as STEM-n."""
    return [
        save(parts, path.with_name(f"{path.stem}-{n}{path.suffix}"), numbered=numbered)
        for n, parts in enumerate(answers, start=1)
    ]


def lines(shown: Sequence[object]) -> str:
    """Formats the answers of a batch, one JSON list a line."""
    return "\n".join(json.dumps(parts) for parts in shown)
