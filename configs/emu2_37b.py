"""Emu2's second stage: text and embeddings of images, with the visual encoder frozen.

    emu-jax plan --config configs/emu2_37b.py --topology v5p:4x4x8
    emu-jax train --config configs/emu2_37b.py --workdir runs/emu2 \\
        --config.data.tokenizer=runs/emu2_fresh/tokenizer --config.init_from=runs/emu2_1b

It follows configs/emu2_37b_1b.py. configs/emu2_37b_1a.py makes runs/emu2_fresh.

From the paper: the encoder is frozen, projections and language model are trained; cross-entropy and
regression; the data; 20,350 steps; a peak learning rate of 1e-5, warm-up over a tenth of the steps,
cosine decay; AdamW's betas and epsilon, clipping at 5; 8 frames a video, MMC4 in windows of 1,024
tokens with 8 images.

From the release: a video is `[VIDEO]`, then 64 `[gIMG]` for each frame.

Ours: the regression targets are the encoder's pooled features, 64 for a still image and none for a
video frame; frames between subtitles (YT-Storyboard-1B) are still images; both losses weigh 1;
weight decay is Emu1's 0.05. The paper's step has 12,800 pairs, 6,400 videos, 3,200 pages and 800
rows of text. 4,096 rows of 2,048 tokens and 18 images hold about as much. YT-Storyboard-1B's share
of the videos, and GRIT's and CapsFusion-grounded's, are not given.

The frozen encoder is kept in bfloat16, has no gradient, no optimizer state and no recomputation,
and is not saved: it stays in the run that this one starts from.
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

STEPS = 20_350


def sources(folder: str = "data") -> tuple[SourceConfig, ...]:
    return (
        SourceConfig("laion_2b", "webdataset", (f"{folder}/laion-2b/*.tar",), weight=6400),
        SourceConfig("capsfusion", "webdataset", (f"{folder}/capsfusion/*.tar",), weight=6400),
        SourceConfig(
            "webvid", "videos", (f"{folder}/webvid.jsonl",), media=("data/webvid",), weight=3200
        ),
        SourceConfig(
            "yt_sb_1b",
            "subtitled",
            (f"{folder}/yt-sb-1b/*.jsonl",),
            weight=3200,
            window_tokens=1024,
            window_images=8,
        ),
        SourceConfig(
            "mmc4",
            "pages",
            (f"{folder}/mmc4/*.jsonl",),
            media=("data/mmc4/images",),
            weight=3200,
            window_tokens=1024,
            window_images=8,
        ),
        SourceConfig("pile", "records", (f"{folder}/pile/*.array_record",), weight=800),
    )


def model() -> EmuConfig:
    release = emu2()
    # Padding rows let the vocabulary be sharded; they are trimmed on export.
    llama = dataclasses.replace(release.llama, vocab_multiple=128)
    return dataclasses.replace(release, llama=llama)


def get_config() -> ConfigDict:
    return config_dict(
        TrainConfig(
            name="emu2_37b",
            model=model(),
            data=DataConfig(
                row_group=8,
                family="emu2",
                sources=sources(),
                batch_size=4096,
                row_tokens=2048,
                row_images=18,
                n_causal=64,
                n_frame=64,
                image_size=448,
            ),
            optimizer=OptimizerConfig(
                groups=(
                    GroupConfig(r"^visual\.", lr=0.0),
                    GroupConfig(".*", lr=1e-5, warmup_steps=STEPS // 10),
                ),
                b2=0.95,
                clip_norm=5.0,
            ),
            steps=STEPS,
            eval=(
                EvalConfig(every=500, sources=sources("data/heldout"), batches=1, batch_size=256),
            ),
            accumulate=8,
            save_frozen=False,
            remat=RematConfig(llama="full"),
            spike_threshold=SPIKE_THRESHOLD,
            # The best settings of docs/scaling.md, with the flags of launch/flags.sh.
            tuned={
                "v5p": ("mesh.max_fsdp=64",),
                "v6e": ("accumulate=4",),
                "tpu7x": ("accumulate=1", "mesh.max_fsdp=128"),
            },
        )
    )
