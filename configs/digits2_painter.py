"""The image decoder of Emu2 on digits, an autoencoder of the frozen encoder's features.

    emu-jax train --config configs/digits_vae.py --workdir runs/digits_vae
    emu-jax train --config configs/digits2_painter.py --workdir runs/digits2_painter

Run it after the three commands of configs/digits2.py. The language model is not asked, but the run
directory is that of the whole model.

From the paper: the objective, one condition in ten dropped, a noise offset of 0.1, and a weight
decay of 0.01.

Ours: the null image in place of a dropped one, the autoencoder of configs/digits_vae.py, the
untrained U-Net, the sizes, 700 steps, the learning rate with 30 steps of warm-up and cosine decay
(the paper's is linear), a second beta of 0.99 (the paper's is 0.999), and the average of the
weights.
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
        "digits2_painter",
        objective="painter",
        model=digits2(),
        data=digits_data(
            family="emu2",
            batch_size=64,
            mixture={"pairs": 1.0, "pages": 0.0, "storyboards": 0.0},
            augment=False,
        ),
        optimizer=OptimizerConfig(
            groups=(
                GroupConfig(r"^unet\.", lr=2e-3, warmup_steps=30),
                GroupConfig(".*", lr=0.0),
            ),
            b2=0.99,
            weight_decay=0.01,
        ),
        parents=dict.fromkeys(("visual", "project_up", "project_down", "llama"), "../digits2")
        | {"vae": "../digits_vae"},
        steps=700,
        eval=(EvalConfig(every=100, batches=1),),
        noise_offset=0.1,
        ema_decay=0.99,
        checkpoint_every=100,
    )
