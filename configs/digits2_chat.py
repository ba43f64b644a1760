"""Instruction tuning of Emu2 on the digits, as Emu2-Chat's: all weights but the encoder's learn the
answers to three questions.

    emu-jax demo --family emu2 --workdir runs/demo-emu2
    emu-jax train --config configs/digits2_chat.py --workdir runs/digits2_chat

The questions are those of configs/digits_instruct.py.

From the paper: a loss on the answer alone, all of the language model trained, AdamW's betas,
clipping at 5, cosine decay to 0. From the release: the format of a turn.

Ours: the frozen encoder, the questions without a system message, the answer to the third, which is
an image, so that the regression is trained too, the sizes, 800 steps with 50 of warm-up, and the
learning rate. In 200 steps the third question is not learned.
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
        "digits2_chat",
        model=digits2(),
        init_from="runs/demo-emu2",
        data=digits_data(
            family="emu2",
            instruct=True,
            mixture={"instructions": 1.0},
            batch_size=16,
            row_tokens=128,
        ),
        optimizer=OptimizerConfig(
            groups=(
                GroupConfig(r"^visual\.", lr=0.0),
                GroupConfig(".*", lr=1e-3, warmup_steps=50),
            ),
            clip_norm=5.0,
        ),
        steps=800,
        eval=(
            EvalConfig(every=100, batches=1),
            EvalConfig(
                "captions",
                kind="captions",
                every=100,
                batches=1,
                batch_size=12,
                generation={"max_new_tokens": 8},
            ),
        ),
        regression_weight=1.0,
        save_frozen=False,
        checkpoint_every=100,
    )
