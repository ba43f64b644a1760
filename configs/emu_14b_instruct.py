"""Instruction tuning of the 14B model with LoRA adapters on its attention (paper, Emu-I).

    emu-jax train --config configs/emu_14b_instruct.py --workdir runs/emu_instruct \\
        --config.init_from=runs/emu

DATA holds the JSON files of five sets of dialogues, and their images and videos (docs/data.md).
DATA/heldout holds JSON files of dialogues that are not trained on; the checkpoint with the lowest
loss on them is kept. Only answers are learned. The paper names the sets but not their weights;
here they are proportional to their published sizes. Adapters are the release's: rank 16, alpha 16,
dropout 0.05 on q, k, v and o. Frozen parameters are stored in bfloat16 and not saved: a checkpoint
holds the adapters and their moments. Batch size, steps, learning rate and warm-up follow the
authors' reports; the rest of the optimizer is pretraining's.
"""

from ml_collections import ConfigDict

from emu_jax.config import RematConfig, emu_14b_instruct
from emu_jax.data.pipeline import DataConfig
from emu_jax.data.sources import SourceConfig
from emu_jax.train.config import (
    EvalConfig,
    GroupConfig,
    OptimizerConfig,
    TrainConfig,
    config_dict,
)

WEIGHTS = {
    "sharegpt": 70.0,
    "alpaca": 52.0,
    "llava": 158.0,
    "videochat": 11.0,
    "video_chatgpt": 100.0,
}


def dialogues(name: str, weight: float, folder: str = "DATA") -> SourceConfig:
    return SourceConfig(
        name=name,
        format="dialogues",
        paths=(f"{folder}/{name}.json",),
        media=(f"DATA/{name}",),
        weight=weight,
    )


def get_config() -> ConfigDict:
    return config_dict(
        TrainConfig(
            name="emu_14b_instruct",
            model=emu_14b_instruct(),
            data=DataConfig(
                row_group=8,
                tokenizer="runs/emu/tokenizer",
                instruct=True,
                sources=tuple(dialogues(*item) for item in WEIGHTS.items()),
                batch_size=128,
                row_tokens=2048,
                row_images=8,
            ),
            optimizer=OptimizerConfig(
                groups=(
                    GroupConfig(r"\.lora_[ab]$", lr=1e-5, warmup_steps=500),
                    GroupConfig(".*", lr=0.0),
                )
            ),
            steps=10_000,
            eval=(
                EvalConfig(
                    every=500,
                    sources=tuple(dialogues(*item, "DATA/heldout") for item in WEIGHTS.items()),
                    batches=2,
                ),
            ),
            keep_best={"heldout/loss": "min"},
            save_frozen=False,
            remat=RematConfig.everywhere("full"),
        )
    )
