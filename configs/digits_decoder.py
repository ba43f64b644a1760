"""The U-Net, on the embeddings that the frozen model regresses after a picture's context.

    emu-jax train --config configs/digits_vae.py --workdir runs/digits_vae
    emu-jax train --config configs/digits_decoder.py --workdir runs/digits_decoder

after the two runs of configs/digits.py. One context in ten is dropped to `<s>[IMG]`, the very
context that guidance uses as its unconditional one.
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
            name="digits_decoder",
            objective="decoder",
            model=digits(),
            data=digits_data(
                batch_size=64,
                row_tokens=40,
                row_images=4,
                image_first=0.0,
                mixture={"pairs": 2.0, "pages": 0.5, "storyboards": 1.5},
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
            parents={
                "visual": "../digits",
                "ln_visual": "../digits",
                "cformer": "../digits",
                "llama": "../digits",
                "vae": "../digits_vae",
            },
            steps=600,
            ema_decay=0.99,
            dtype="float32",
            checkpoint_every=200,
        )
    )
