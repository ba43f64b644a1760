"""The release's safety checker, which is diffusers' own.

It runs in torch on the CPU, and only if the checkpoint has one: the release's folders
`safety_checker/` and `feature_extractor/`, which `emu-jax convert` copies.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from emu_jax.errors import UserError
from emu_jax.storage import local_copy

log = logging.getLogger(__name__)

Checker = Callable[[UInt8[np.ndarray, "B side side 3"]], UInt8[np.ndarray, "B side side 3"]]


def find_checker(directory: Path) -> Checker | None:
    """Loads the checker of a run directory or a release folder.

    The checker returns images, with those it objects to in black (diffusers:
    `StableDiffusionSafetyChecker`). Returns None, and warns, if the checkpoint has no checker.

    Raises:
        UserError: there is one, but torch or diffusers is missing, or it cannot be read.
    """
    for folder in (directory, directory / "release" / "files"):
        if (folder / "safety_checker" / "config.json").is_file():
            return _load(folder)
    log.warning("%s has no safety checker: generated images are not checked", directory)
    return None


def _load(folder: Path) -> Checker:
    try:
        from diffusers.pipelines.stable_diffusion.safety_checker import (
            StableDiffusionSafetyChecker,
        )
        from transformers import CLIPImageProcessor
    except ImportError as error:
        raise UserError(
            f"{folder / 'safety_checker'} needs torch ({error}): pip install 'emu_jax[torch]'"
        ) from None
    try:
        with local_copy(folder / "safety_checker") as copy:
            model = StableDiffusionSafetyChecker.from_pretrained(copy).eval()
        with local_copy(folder / "feature_extractor") as copy:
            processor = CLIPImageProcessor.from_pretrained(copy)
    except Exception as error:  # a damaged file raises errors of three libraries
        reason = (str(error).strip().split("\n")[0] or type(error).__name__)[:300]
        raise UserError(f"cannot read the safety checker in {folder}: {reason}") from None

    def check(images: UInt8[np.ndarray, "B side side 3"]) -> UInt8[np.ndarray, "B side side 3"]:
        seen = processor(list(images), return_tensors="pt").pixel_values
        # It blackens the images that it is given, so only its verdict is used.
        _, flagged = model(images=[p / 255 for p in images], clip_input=seen)
        if any(flagged):
            log.warning("the safety checker found something in %d images", sum(flagged))
        return np.where(np.asarray(flagged)[:, None, None, None], np.uint8(0), images)

    return check
