"""Emu2's first stage on digits of 16 pixels: captions, with all parameters trained from scratch.

    emu-jax train --config configs/digits2_1a.py --workdir runs/digits2_1a

From the paper: cross-entropy on captions alone, all parameters trained, a low resolution first,
AdamW's betas and epsilon, clipping at 5, cosine decay.

Ours: the digits, random weights in place of parents, the sizes, 400 steps with 50 of warm-up, the
learning rates, and an image that stands before its text in nine pairs of ten, not in half of them.
"""

from ml_collections import ConfigDict

from emu_jax.config import digits2
from emu_jax.train.config import (
    EvalConfig,
    GroupConfig,
    OptimizerConfig,
    digits_config,
    digits_data,
)


def get_config() -> ConfigDict:
    return digits_config(
        "digits2_1a",
        model=digits2(image_size=16),
        data=digits_data(
            family="emu2",
            batch_size=24,
            image_size=16,
            image_first=0.9,
            mixture={"pairs": 1.0, "pages": 0.0, "storyboards": 0.0},
        ),
        optimizer=OptimizerConfig(
            groups=(
                GroupConfig(r"^visual\.", lr=1e-3, warmup_steps=50),
                GroupConfig(".*", lr=3e-3, warmup_steps=50),
            ),
            b2=0.95,
            clip_norm=5.0,
        ),
        steps=400,
        regression_weight=0.0,
        eval=(EvalConfig(every=100, batches=1),),
        checkpoint_every=100,
    )
