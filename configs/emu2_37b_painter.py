"""Emu2's image decoder: SDXL's U-Net as an autoencoder of the visual encoder's features.

    emu-jax train --config configs/emu2_37b_painter.py --workdir runs/emu2_painter \\
        --config.init_from=runs/emu2 \\
        --config.parents.unet=../emu2_fresh --config.parents.vae=../emu2_fresh

runs/emu2 (configs/emu2_37b.py) has the encoder and the language model, and runs/emu2_fresh
(configs/emu2_37b_1a.py) SDXL's weights. A converted Emu2-Gen has both: leave `parents` out.

DATA holds WebDataset tars of images of at least 512 x 512 pixels, and DATA/heldout those that are
not trained on. The language model is not asked. docs/finetuning.md says how to compute features and
latents once.

From the paper: the data, batches of 2,048, 8,000 steps, a peak learning rate of 1e-4 after 2,500
steps of warm-up with linear decay, AdamW's betas, epsilon and weight decay, clipping at 1, one
condition in ten dropped, a noise offset of 0.1, images of 448 pixels in and 1,024 out, original
size and crop as conditions, and the frozen encoder of the first stage. Its table has 8,000 steps,
of which 2,500 are warm-up; its text has 2,000 steps of warm-up and 6,000 of decay. Here are the
table's. Stage 2 freezes the encoder too, so that of runs/emu2 is the first stage's.

Ours: the warm-up is linear, where the paper's is logarithmic. A dropped condition is that of the
null image, as in autoencoding with guidance; the paper does not say. The average of the weights is
ours too.
"""

from ml_collections import ConfigDict

from emu_jax.config import RematConfig, emu2_gen
from emu_jax.data.config import DataConfig
from emu_jax.data.sources import SourceConfig
from emu_jax.train.config import (
    EvalConfig,
    GroupConfig,
    OptimizerConfig,
    TrainConfig,
    config_dict,
)


def sources(folder: str = "DATA") -> tuple[SourceConfig, ...]:
    return tuple(
        SourceConfig(name, "webdataset", (f"{folder}/{name}/*.tar",))
        for name in ("laion-coco", "laion-aesthetics")
    )


def get_config() -> ConfigDict:
    return config_dict(
        TrainConfig(
            name="emu2_37b_painter",
            objective="painter",
            model=emu2_gen(),
            data=DataConfig(
                row_group=8,
                tokenizer="runs/emu2/tokenizer",
                family="emu2",
                sources=sources(),
                batch_size=2048,
                n_causal=64,
                image_size=448,
                target_size=1024,
                drop_condition=0.1,
            ),
            optimizer=OptimizerConfig(
                groups=(
                    GroupConfig(r"^unet\.", lr=1e-4, warmup_steps=2_500, decay="linear"),
                    GroupConfig(".*", lr=0.0),
                ),
                b2=0.999,
                eps=1e-8,
                weight_decay=1e-2,
            ),
            steps=8_000,
            noise_offset=0.1,
            eval=(EvalConfig(every=500, sources=sources("DATA/heldout"), batches=2),),
            ema_decay=0.9999,
            accumulate=4,
            save_frozen=False,
            remat=RematConfig(unet="full"),
        )
    )
