"""Scores an instruction-tuned digits model on questions about held-out digits."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from emu_jax.data import digits
from emu_jax.evaluate.demo import Judge
from emu_jax.generate.api import Emu

SEQUENCES = 200  # number of counting sequences


def score(emu: Emu, *, fit: str = "train", split: str = "heldout", seed: int = 0) -> dict[str, Any]:
    """Returns the accuracy on each of the three questions of `digits.QUESTIONS`.

    The first two are asked about every image of the split. The third is asked about counting
    sequences of images. Its answer is correct if the judge, trained on `fit`, recognizes the
    generated image as the next digit.
    """
    named, even, following = digits.QUESTIONS
    pictures, labels = digits.digit_pictures(split)
    shown = [Image.fromarray(p).convert("RGB") for p in pictures]
    names = emu.generate_texts([[p, named] for p in shown])
    parities = emu.generate_texts([[p, even] for p in shown])

    rng = np.random.default_rng(seed)
    by_label = [np.flatnonzero(labels == digit) for digit in range(10)]
    counts = [digits.counting_digits(rng) for _ in range(SEQUENCES)]
    prompts = [[*(shown[rng.choice(by_label[d])] for d in c[:-1]), following] for c in counts]
    answers = emu.completions(prompts, max_images=1, seed=seed)
    drawn = [[p for p in parts if not isinstance(p, str)] for parts in answers]
    some = [i for i, parts in enumerate(drawn) if parts]
    read: dict[int, int] = {}
    if some:
        judge = Judge(fit, emu.picture_size)
        read = dict(zip(some, judge(np.stack([drawn[i][0] for i in some])), strict=True))
    return {
        "named": _mean([digits.parse_digit(n) == d for n, d in zip(names, labels, strict=True)]),
        "even": _mean(
            [p == ("no" if d % 2 else "yes") for p, d in zip(parities, labels, strict=True)]
        ),
        "next": _mean([read.get(i) == c[-1] for i, c in enumerate(counts)]),
    }


def _mean(right: Any) -> float:
    return round(float(np.mean(right)), 4)
