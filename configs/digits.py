"""The multimodal model on pairs, pages and storyboards of digits; all parts are trained.

    emu-jax train --config configs/digits_clip.py --workdir runs/digits_clip
    emu-jax train --config configs/digits.py --workdir runs/digits

The encoder comes from the first run. Trained from nothing together with the rest, its
embeddings collapse: the targets of the regression are its own output, and constant ones are
the easiest to predict. Here it and the C-Former hold still until the language model can read
them, then move slowly, and embeddings are normalised.
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
            name="digits",
            objective="emu",
            model=digits(),
            data=digits_data(
                batch_size=24,
                image_first=0.3,
                mixture={"pairs": 2.0, "pages": 1.0, "storyboards": 3.0},
            ),
            optimizer=OptimizerConfig(
                groups=(
                    GroupConfig(
                        r"^(visual|ln_visual)\.", lr=1e-4, delay_steps=200, warmup_steps=50
                    ),
                    GroupConfig(r"^cformer\.", lr=2e-4, delay_steps=200, warmup_steps=50),
                    GroupConfig(r"^llama\.", lr=3e-3, warmup_steps=50),
                )
            ),
            parents={"visual": "../digits_clip"},
            steps=500,
            regression_weight=5.0,
            dtype="float32",
            checkpoint_every=100,
        )
    )
