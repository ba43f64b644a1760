"""The visual decoder of the 14B model: Stable Diffusion's U-Net, conditioned on the embeddings that
the frozen model regresses after a caption (paper, visual decoding).

    emu-jax train --config configs/emu_14b_decoder.py --workdir runs/emu_decoder \\
        --config.init_from=runs/emu

DATA holds WebDataset tars of images and captions of at most 150 characters, and DATA/heldout those
that are not trained on. One context in ten is dropped to `<s>[IMG]`, the unconditional context of
guidance. Frozen parameters are stored in bfloat16 and not saved: checkpoints hold the U-Net, its
average and its moments. docs/finetuning.md says how to compute conditions and latents once.
"""

from ml_collections import ConfigDict

from emu_jax.config import RematConfig, emu_14b
from emu_jax.data.pipeline import DataConfig
from emu_jax.data.sources import SourceConfig
from emu_jax.train.config import (
    EvalConfig,
    GroupConfig,
    OptimizerConfig,
    TrainConfig,
    config_dict,
)


def get_config() -> ConfigDict:
    return config_dict(
        TrainConfig(
            name="emu_14b_decoder",
            objective="decoder",
            model=emu_14b(),
            data=DataConfig(
                row_group=8,
                tokenizer="runs/emu/tokenizer",
                sources=(
                    SourceConfig(
                        name="laion_coco",
                        format="webdataset",
                        paths=("DATA/laion-coco/*.tar",),
                        weight=7.0,
                    ),
                    SourceConfig(
                        name="laion_aesthetics",
                        format="webdataset",
                        paths=("DATA/laion-aesthetics/*.tar",),
                        weight=2.0,
                    ),
                ),
                batch_size=1600,  # 50 rows, accumulated 4 times, on 8 GPUs of 4 nodes
                row_tokens=192,
                row_images=1,
                image_first=0.0,
                drop_condition=0.1,
            ),
            optimizer=OptimizerConfig(
                groups=(
                    GroupConfig(
                        r"^unet\.",
                        lr=1e-4,
                        warmup_steps=5000,
                        decay="steps",
                        drops=((10_000, 5e-5), (14_000, 1e-5)),
                    ),
                    GroupConfig(".*", lr=0.0),
                ),
                b2=0.999,
                eps=1e-8,
                weight_decay=1e-2,
            ),
            steps=15_000,
            eval=(
                EvalConfig(
                    every=500,
                    sources=(
                        SourceConfig(
                            name="laion_coco",
                            format="webdataset",
                            paths=("DATA/heldout/laion-coco/*.tar",),
                        ),
                        SourceConfig(
                            name="laion_aesthetics",
                            format="webdataset",
                            paths=("DATA/heldout/laion-aesthetics/*.tar",),
                        ),
                    ),
                    batches=2,
                    batch_size=512,
                ),
            ),
            ema_decay=0.9999,
            save_frozen=False,
            remat=RematConfig.everywhere("full"),
        )
    )
