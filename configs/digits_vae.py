"""The autoencoder on digits, in place of Stable Diffusion's.

emu-jax train --config configs/digits_vae.py --workdir runs/digits_vae
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
        "digits_vae",
        objective="vae",
        data=digits_data(batch_size=48),
        optimizer=OptimizerConfig(
            groups=(GroupConfig(lr=2e-3, warmup_steps=20),), weight_decay=0.0
        ),
        steps=200,
        eval=(EvalConfig(every=50, batches=1),),
        kl_weight=3e-4,
        checkpoint_every=100,
    )
