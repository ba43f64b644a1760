"""The autoencoder on digits: the stand-in for Stable Diffusion's.

emu-jax train --config configs/digits_vae.py --workdir runs/digits_vae
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
            name="digits_vae",
            objective="vae",
            model=digits(),
            data=digits_data(batch_size=48),
            optimizer=OptimizerConfig(
                groups=(GroupConfig(lr=2e-3, warmup_steps=20),), weight_decay=0.0
            ),
            steps=200,
            kl_weight=3e-4,
            dtype="float32",
            checkpoint_every=100,
        )
    )
