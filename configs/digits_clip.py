"""The visual encoder, contrastively on digits and their captions: EVA-CLIP's stand-in.

emu-jax train --config configs/digits_clip.py --workdir runs/digits_clip
"""

from emu_jax.config import digits
from emu_jax.train.config import (
    GroupConfig,
    OptimizerConfig,
    TrainConfig,
    config_dict,
    digits_data,
)


def get_config():
    return config_dict(
        TrainConfig(
            name="digits_clip",
            objective="clip",
            model=digits(),
            data=digits_data(batch_size=128, row_tokens=12),
            optimizer=OptimizerConfig(
                groups=(GroupConfig(lr=1e-3, warmup_steps=50),), weight_decay=0.1
            ),
            steps=600,
            dtype="float32",
            checkpoint_every=200,
        )
    )
