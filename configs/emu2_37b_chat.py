"""Instruction tuning of Emu2 on dialogues: Emu2-Chat. All parameters but the encoder's are trained.

    emu-jax train --config configs/emu2_37b_chat.py --workdir runs/emu2_chat \\
        --config.init_from=runs/emu2

runs/emu2 is the run of configs/emu2_37b.py, or a converted Emu2. DATA holds JSON files of
dialogues, and their images and videos (docs/data.md); DATA/heldout holds those that are not trained
on.

From the paper: batches of 768 dialogues, 8,000 steps, a peak learning rate of 1e-5, 100 steps of
warm-up, cosine decay to 0, AdamW's betas and epsilon, clipping at 5, 2,048 tokens, and
cross-entropy on the answers alone. From the release: the format, both system messages, 256
embeddings of a still image, and 8 frames a video with 64 embeddings each.

Ours: the encoder stays frozen (the paper does not say), weight decay is Emu1's 0.05, and rows hold
several dialogues: 384 rows of 2,048 tokens and 8 images. The sets' weights are ours too.
"""

import dataclasses

from ml_collections import ConfigDict

from emu_jax.config import EmuConfig, RematConfig, emu2_chat
from emu_jax.data.config import DataConfig
from emu_jax.data.sources import SourceConfig
from emu_jax.data.sources.dialogues import COMPREHENSIVE_SYSTEM, CONCISE_SYSTEM
from emu_jax.train.config import (
    EvalConfig,
    GroupConfig,
    OptimizerConfig,
    TrainConfig,
    config_dict,
)

# The weight and the system message of each set: open questions, and those with a short answer.
DIALOGUES = {
    "sharegpt": (70.0, COMPREHENSIVE_SYSTEM),
    "llava": (158.0, COMPREHENSIVE_SYSTEM),
    "vqa": (158.0, CONCISE_SYSTEM),
    "videochat": (11.0, COMPREHENSIVE_SYSTEM),
    "video_chatgpt": (100.0, COMPREHENSIVE_SYSTEM),
}


def dialogues(folder: str = "DATA") -> tuple[SourceConfig, ...]:
    return tuple(
        SourceConfig(
            name,
            "dialogues",
            (f"{folder}/{name}.json",),
            media=(f"DATA/{name}",),
            weight=weight,
            system=system,
        )
        for name, (weight, system) in DIALOGUES.items()
    )


def model() -> EmuConfig:
    release = emu2_chat()
    # Padding rows let the vocabulary be sharded; they are trimmed on export.
    llama = dataclasses.replace(release.llama, vocab_multiple=128)
    return dataclasses.replace(release, llama=llama)


def get_config() -> ConfigDict:
    return config_dict(
        TrainConfig(
            name="emu2_37b_chat",
            model=model(),
            data=DataConfig(
                row_group=8,
                tokenizer="runs/emu2/tokenizer",
                family="emu2",
                instruct=True,
                sources=dialogues(),
                batch_size=384,
                row_tokens=2048,
                row_images=8,
                n_causal=256,
                n_frame=64,
                image_size=448,
            ),
            optimizer=OptimizerConfig(
                groups=(
                    GroupConfig(r"^visual\.", lr=0.0),
                    GroupConfig(".*", lr=1e-5, warmup_steps=100),
                ),
                clip_norm=5.0,
            ),
            steps=8_000,
            regression_weight=0.0,
            eval=(EvalConfig(every=500, sources=dialogues("DATA/heldout"), batches=2),),
            keep_best={"heldout/loss": "min"},
            save_frozen=False,
            remat=RematConfig(llama="full"),
        )
    )
