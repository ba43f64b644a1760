"""Tuning of Emu2 on the generation of digits, as Emu2-Gen's: only the last image of a document is a
target, and the visual encoder is frozen.

    emu-jax demo --family emu2 --workdir runs/demo-emu2
    emu-jax train --config configs/digits2_gen.py --workdir runs/digits2_gen

From the paper: a mean squared error on the last image alone, AdamW's betas, clipping at 1, a peak
learning rate below that of the second stage, cosine decay, and the frozen encoder.

Ours: the documents (captions and then their image, and digits that count), the sizes, the number of
steps and the learning rate. The image decoder of runs/demo-emu2 stays as it is.
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
        "digits2_gen",
        model=digits2(),
        init_from="runs/demo-emu2",
        data=digits_data(
            family="emu2",
            mixture={"pairs": 2.0, "pages": 0.0, "storyboards": 1.0},
            batch_size=16,
            row_tokens=128,
            image_first=0.0,
            last_image=True,
            learn_img=False,
        ),
        optimizer=OptimizerConfig(
            groups=(
                GroupConfig(r"^visual\.", lr=0.0),
                GroupConfig(".*", lr=5e-4, warmup_steps=30),
            ),
            b2=0.95,
        ),
        steps=200,
        text_weight=0.0,
        eval=(EvalConfig(every=50, batches=1),),
        save_frozen=False,
        checkpoint_every=100,
    )
