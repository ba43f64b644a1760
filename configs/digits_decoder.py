"""The U-Net, conditioned on the embeddings that the frozen model regresses after a context.

    emu-jax train --config configs/digits_vae.py --workdir runs/digits_vae
    emu-jax train --config configs/digits_decoder.py --workdir runs/digits_decoder

Run it after the two commands of configs/digits.py. One context in ten is dropped to `<s>[IMG]`,
which is also the unconditional context of guidance.
"""

from ml_collections import ConfigDict

from emu_jax.train.config import (
    EvalConfig,
    GroupConfig,
    OptimizerConfig,
    digits_config,
    digits_data,
)

GENERATION = {
    "guidance_scale": 6.0,
    "num_inference_steps": 20,
    "scheduler": "ddim",
    "max_new_tokens": 8,
}


def get_config() -> ConfigDict:
    return digits_config(
        "digits_decoder",
        objective="decoder",
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
        eval=(
            EvalConfig(every=100, batches=1),
            *(
                EvalConfig(
                    kind, kind=kind, every=300, batches=1, batch_size=12, generation=GENERATION
                )
                for kind in ("images", "continuations")
            ),
        ),
        ema_decay=0.99,
        checkpoint_every=200,
    )
