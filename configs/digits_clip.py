"""Contrastive training of the visual encoder on digits and their captions, in place of EVA-CLIP.

emu-jax train --config configs/digits_clip.py --workdir runs/digits_clip
"""

from ml_collections import ConfigDict

from emu_jax.train.config import (
    EvalConfig,
    GroupConfig,
    OptimizerConfig,
    digits_config,
    digits_data,
)


def get_config() -> ConfigDict:
    return digits_config(
        "digits_clip",
        objective="clip",
        data=digits_data(batch_size=128, row_tokens=12),
        optimizer=OptimizerConfig(
            groups=(GroupConfig(lr=1e-3, warmup_steps=50),), weight_decay=0.1
        ),
        steps=600,
        eval=(EvalConfig(every=100, batches=1),),
        checkpoint_every=200,
    )
