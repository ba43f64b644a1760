"""Instruction tuning on the digits: LoRA adapters that answer three questions.

    emu-jax demo --workdir runs/demo
    emu-jax train --config configs/digits_instruct.py --workdir runs/digits_instruct

The questions are "what digit is this?" and "is it even?" of one image, and "what comes next? draw
it" of three images that count. Only the adapters on the language model's attention are trained
and saved.
"""

import dataclasses

from ml_collections import ConfigDict

from emu_jax.config import LoraConfig, digits
from emu_jax.train.config import (
    EvalConfig,
    GroupConfig,
    OptimizerConfig,
    digits_config,
    digits_data,
)


def get_config() -> ConfigDict:
    base = digits()
    lora = LoraConfig(rank=8, alpha=16.0, dropout=0.05)
    return digits_config(
        "digits_instruct",
        model=dataclasses.replace(base, llama=dataclasses.replace(base.llama, lora=lora)),
        init_from="runs/demo",
        data=digits_data(
            instruct=True, mixture={"instructions": 1.0}, batch_size=16, row_tokens=128
        ),
        optimizer=OptimizerConfig(
            groups=(
                GroupConfig(r"\.lora_[ab]$", lr=4e-3, warmup_steps=30),
                GroupConfig(".*", lr=0.0),
            ),
            weight_decay=0.0,
        ),
        steps=800,
        eval=(
            EvalConfig(every=100, batches=1),
            EvalConfig(
                "captions",
                kind="captions",
                every=200,
                batches=1,
                batch_size=12,
                generation={"max_new_tokens": 8},
            ),
        ),
        regression_weight=5.0,
        save_frozen=False,
        checkpoint_every=100,
    )
