"""Pretraining of the whole 14B model with the paper's hyperparameters.

    emu-jax plan --config configs/emu_14b.py --topology v5p:4x4x8
    emu-jax train --config configs/emu_14b.py --workdir runs/emu_14b \\
        --config.data.tokenizer=LLAMA_DIR

A step is 1,024 rows of 2,048 tokens and 16 pictures. The sources share rows, in proportion to the
paper's batches of 128, 128, 64, 16 and 16 (whether those are per step or per GPU it does not say);
docs/data.md says what their files hold, and how a source gets batches of its own.
"""

import dataclasses

from emu_jax.config import emu_14b
from emu_jax.data.config import SourceConfig
from emu_jax.train.config import config_dict, pretraining

SOURCES = (
    SourceConfig("laion_2b", "webdataset", ("data/laion-2b/*.tar",), weight=128),
    SourceConfig("laion_coco", "webdataset", ("data/laion-coco/*.tar",), weight=128),
    # Half of the pages as windows of 1,024 tokens with their first five pictures, half as five
    # random pictures with their sentences.
    SourceConfig(
        "mmc4",
        "pages",
        ("data/mmc4/*.jsonl",),
        media=("data/mmc4/images",),
        weight=32,
        window_tokens=1024,
        window_images=5,
    ),
    SourceConfig(
        "mmc4_picked",
        "pages",
        ("data/mmc4/*.jsonl",),
        media=("data/mmc4/images",),
        weight=32,
        picked_images=5,
    ),
    SourceConfig(
        "webvid", "videos", ("data/webvid.jsonl",), media=("data/webvid",), weight=16, frames=8
    ),
    SourceConfig(
        "yt_sb_1b",
        "subtitled",
        ("data/yt-sb-1b/*.jsonl",),
        weight=16,
        window_tokens=1024,
        window_images=16,
    ),
)


def get_config():
    release = emu_14b()
    # Rows that only round the vocabulary up are split over chips, and trimmed on export.
    llama = dataclasses.replace(release.llama, vocab_multiple=128)
    cfg = pretraining("emu_14b", dataclasses.replace(release, llama=llama))
    return config_dict(
        dataclasses.replace(
            cfg,
            data=dataclasses.replace(cfg.data, sources=SOURCES),
            # The best found so far, by plans (docs/scaling.md).
            tuned={
                "v5p": ("remat.llama=dots",),
                "v5e": ("mesh.fsdp=64",),
                "v6e": ("remat.llama=minimal",),
            },
        )
    )
