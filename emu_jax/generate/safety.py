"""The release's safety checker: diffusers' own, on what was painted.

It runs in torch, on the CPU, and only where the checkpoint has one: the release's folder
`safety_checker/` with its `feature_extractor/`, which `emu-jax convert` carries along.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from emu_jax.errors import UserError

log = logging.getLogger(__name__)

Checker = Callable[[UInt8[np.ndarray, "B H W 3"]], UInt8[np.ndarray, "B H W 3"]]


def find_checker(directory: Path) -> Checker | None:
    """The checker of a run directory or a release folder: it gives pictures back, black where it
    found something (diffusers: `StableDiffusionSafetyChecker`). None where there is none, which
    is said.

    Raises:
        UserError: there is one, and torch or diffusers is missing.
    """
    for folder in (directory, directory / "release" / "files"):
        if (folder / "safety_checker" / "config.json").is_file():
            return _load(folder)
    log.warning("%s has no safety checker: pictures are shown as they are painted", directory)
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
        model = StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker").eval()
        processor = CLIPImageProcessor.from_pretrained(folder / "feature_extractor")
    except Exception as error:  # what a damaged file leads to is up to three libraries
        reason = (str(error).strip().split("\n")[0] or type(error).__name__)[:300]
        raise UserError(f"cannot read the safety checker in {folder}: {reason}") from None

    def check(pictures: UInt8[np.ndarray, "B H W 3"]) -> UInt8[np.ndarray, "B H W 3"]:
        seen = processor(list(pictures), return_tensors="pt").pixel_values
        # It blackens what it is given; whether it found something is all that is asked.
        _, found = model(images=[p / 255 for p in pictures], clip_input=seen)
        if any(found):
            log.warning("the safety checker found something in %d pictures", sum(found))
        return np.where(np.asarray(found)[:, None, None, None], np.uint8(0), pictures)

    return check
