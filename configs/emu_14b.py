"""Pretraining of the 14B model with the paper's hyperparameters; all parameters are trained.

    emu-jax plan --config configs/emu_14b.py --topology v5p:4x4x8
    emu-jax train --config configs/emu_14b.py --workdir runs/emu_14b \\
        --config.data.tokenizer=LLAMA_DIR

A step has 1,024 rows of 2,048 tokens and 16 images. Sources share rows in proportion to the paper's
batches of 128, 128, 64, 16 and 16; the paper does not say whether these are per step or per GPU.
docs/data.md describes their files, and how a source gets batches of its own. data/heldout/ holds
files in the same layout that are not trained on (without any: --config.eval="()").
"""

import dataclasses

from ml_collections import ConfigDict

from emu_jax.config import emu_14b
from emu_jax.data.config import SourceConfig
from emu_jax.train.config import EvalConfig, config_dict, pretraining

SOURCES = (
    SourceConfig("laion_2b", "webdataset", ("data/laion-2b/*.tar",), weight=128),
    SourceConfig("laion_coco", "webdataset", ("data/laion-coco/*.tar",), weight=128),
    # Half of the pages as windows of 1,024 tokens with their first five images, half as five
    # random images with their sentences.
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


def held_out(source: SourceConfig) -> SourceConfig:
    """Returns a source of the documents in data/heldout/."""
    paths, media = (
        tuple(path.replace("data/", "data/heldout/", 1) for path in paths)
        for paths in (source.paths, source.media)
    )
    return dataclasses.replace(source, paths=paths, media=media)


def get_config() -> ConfigDict:
    release = emu_14b()
    # Padding rows let the vocabulary be sharded; they are trimmed on export.
    llama = dataclasses.replace(release.llama, vocab_multiple=128)
    cfg = pretraining("emu_14b", dataclasses.replace(release, llama=llama))
    return config_dict(
        dataclasses.replace(
            cfg,
            data=dataclasses.replace(cfg.data, sources=SOURCES),
            eval=(
                EvalConfig(
                    every=500, sources=tuple(map(held_out, SOURCES)), batches=1, batch_size=256
                ),
            ),
            # The best settings of docs/scaling.md for 1,024 rows.
            tuned={
                "v5p": ("remat.llama=dots", "mesh.max_fsdp=64"),
                "v5e": ("mesh.max_fsdp=64",),
                "v6e": ("remat.llama=minimal",),
            },
        )
    )
