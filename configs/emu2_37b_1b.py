"""Emu2's first stage at 448 pixels, which continues that at 224 for 4,000 steps.

    emu-jax train --config configs/emu2_37b_1b.py --workdir runs/emu2_1b \\
        --config.data.tokenizer=LLAMA_DIR --config.init_from=runs/emu2_1a

The position embeddings of the 16 x 16 patches are interpolated to 32 x 32, bicubically. The paper
does not say how; this is our reading. Everything else is as in configs/emu2_37b_1a.py, whose
docstring says which facts are the paper's. A schedule of its own, with warm-up over 2% of these
steps, is ours.
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

STEPS = 4_000


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
    return dataclasses.replace(release, llama=llama)


def get_config() -> ConfigDict:
    group = lambda pattern, lr: GroupConfig(pattern, lr=lr, warmup_steps=STEPS // 50)  # noqa: E731
    return config_dict(
        TrainConfig(
            name="emu2_37b_1b",
            model=model(),
            data=DataConfig(
                row_group=8,
                family="emu2",
                sources=sources(),
                batch_size=768,
                row_tokens=1536,
                row_images=16,
                n_causal=64,
                image_size=448,
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
