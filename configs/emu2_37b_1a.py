"""Emu2's first stage at 224 pixels: captions of images and videos, with all parameters trained.

    echo '{"vision_cfg": {"image_size": 224}}' > emu2_224.json
    emu-jax init runs/emu2_fresh --family emu2 --model-config emu2_224.json \\
        --llama LLAMA_DIR --eva-clip EVA02_CLIP_E_psz14_plus_s9B.pt --sd SDXL_DIR
    emu-jax train --config configs/emu2_37b_1a.py --workdir runs/emu2_1a \\
        --config.data.tokenizer=runs/emu2_fresh/tokenizer --config.init_from=runs/emu2_fresh

runs/emu2_fresh has the weights of the parents: EVA-02-CLIP-E-plus at 224 pixels, LLaMA-33B, and
SDXL, from which configs/emu2_37b_painter.py starts. The projections are new. Without `init_from`
the whole model starts from random numbers.

From the paper: the data and their proportion (6,144 pairs to 768 videos a step), cross-entropy on
captions alone, 35,200 steps, the peak learning rates, AdamW's betas and epsilon, clipping at 5,
cosine decay, warm-up over 2% of the steps, 8 frames a video, an image on either side of its text.
Ours: rows. 768 rows of 1,536 tokens and 16 images hold as many documents. Also ours are weight
decay (Emu1's 0.05), and 64 embeddings from the 16 x 16 patches.
"""

import dataclasses

from ml_collections import ConfigDict

from emu_jax.config import EmuConfig, RematConfig, emu2
from emu_jax.data.config import DataConfig
from emu_jax.data.sources import SourceConfig
from emu_jax.train.config import (
    SPIKE_THRESHOLD,
    EvalConfig,
    GroupConfig,
    OptimizerConfig,
    TrainConfig,
    config_dict,
)

STEPS = 35_200


def sources(folder: str = "data") -> tuple[SourceConfig, ...]:
    return (
        SourceConfig("laion_2b", "webdataset", (f"{folder}/laion-2b/*.tar",), weight=3072),
        SourceConfig("capsfusion", "webdataset", (f"{folder}/capsfusion/*.tar",), weight=3072),
        SourceConfig(
            "webvid", "videos", (f"{folder}/webvid.jsonl",), media=("data/webvid",), weight=768
        ),
    )


def model() -> EmuConfig:
    release = emu2()
    # Padding rows let the vocabulary be sharded; they are trimmed on export.
    llama = dataclasses.replace(release.llama, vocab_multiple=128)
    vision = dataclasses.replace(release.vision, image_size=224)
    return dataclasses.replace(release, vision=vision, llama=llama)


def get_config() -> ConfigDict:
    group = lambda pattern, lr: GroupConfig(pattern, lr=lr, warmup_steps=STEPS // 50)  # noqa: E731
    return config_dict(
        TrainConfig(
            name="emu2_37b_1a",
            model=model(),
            data=DataConfig(
                row_group=8,
                family="emu2",
                sources=sources(),
                batch_size=768,
                row_tokens=1536,
                row_images=16,
                n_causal=64,
                n_frame=64,
                image_size=224,
            ),
            optimizer=OptimizerConfig(
                groups=(
                    group(r"^visual\.", 5e-5),
                    group(r"^project_(up|down)\.", 1e-4),
                    group(r"^llama\.", 3e-5),
                ),
                b2=0.95,
                clip_norm=5.0,
            ),
            steps=STEPS,
            regression_weight=0.0,
            eval=(
                EvalConfig(every=500, sources=sources("data/heldout"), batches=1, batch_size=256),
            ),
            remat=RematConfig.everywhere("full"),
            spike_threshold=SPIKE_THRESHOLD,
        )
    )
