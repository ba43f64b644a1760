"""Emu2's second stage on digits: text and embeddings of images, with the visual encoder frozen.

    emu-jax train --config configs/digits2_1a.py --workdir runs/digits2_1a
    emu-jax train --config configs/digits2_1b.py --workdir runs/digits2_1b
    emu-jax train --config configs/digits2.py --workdir runs/digits2

From the paper: the frozen encoder, trained projections and language model, cross-entropy and
regression, AdamW's betas and epsilon, clipping at 5, cosine decay.

Ours: the targets of the regression, which are the frozen encoder's pooled features, so that they
cannot collapse. Their variance is far above one, so the regression has a weight below one. Ours are
also the documents and their proportion, an image that stands before its text in three pairs of ten,
the sizes, 800 steps with 50 of warm-up, and the learning rate. `[IMG]` is a text target
(`data.learn_img`), so that the model opens images by itself.
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
        "digits2",
        model=digits2(),
        data=digits_data(
            family="emu2",
            batch_size=24,
            image_first=0.3,
            mixture={"pairs": 2.0, "pages": 1.0, "storyboards": 3.0},
        ),
        optimizer=OptimizerConfig(
            groups=(
                GroupConfig(r"^visual\.", lr=0.0),
                GroupConfig(".*", lr=2e-3, warmup_steps=50),
            ),
            b2=0.95,
            clip_norm=5.0,
        ),
        parents=dict.fromkeys(("visual", "project_up", "project_down", "llama"), "../digits2_1b"),
        steps=800,
        eval=(
            EvalConfig(every=50, batches=1),
            EvalConfig(
                "captions",
                kind="captions",
                every=250,
                batches=1,
                batch_size=12,
                generation={"max_new_tokens": 8},
            ),
        ),
        regression_weight=0.5,
        checkpoint_every=100,
    )
