"""Pretraining on image-text pairs, pages and storyboards of digits.

    emu-jax train --config configs/digits_clip.py --workdir runs/digits_clip
    emu-jax train --config configs/digits.py --workdir runs/digits

The visual encoder starts from the first run. If it were trained from scratch together with the
rest, its embeddings would collapse: they are the regression targets, and constant targets are the
easiest to predict. So the encoder and the Causal Transformer wait until the language model can
read them, then learn slowly, and embeddings are normalized.
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
        "digits",
        objective="emu",
        data=digits_data(
            batch_size=24,
            image_first=0.3,
            mixture={"pairs": 2.0, "pages": 1.0, "storyboards": 3.0},
        ),
        optimizer=OptimizerConfig(
            groups=(
                GroupConfig(r"^(visual|ln_visual)\.", lr=1e-4, delay_steps=200, warmup_steps=50),
                GroupConfig(r"^cformer\.", lr=2e-4, delay_steps=200, warmup_steps=50),
                GroupConfig(r"^llama\.", lr=3e-3, warmup_steps=50),
            )
        ),
        parents={"visual": "../digits_clip"},
        steps=500,
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
        regression_weight=5.0,
        checkpoint_every=100,
    )
