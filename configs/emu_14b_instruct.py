"""Instruction tuning of the 14B model by low-rank adapters on its attention (paper, Emu-I).

    emu-jax train --config configs/emu_14b_instruct.py --workdir runs/emu_instruct \\
        --config.init_from=runs/emu

DATA holds the JSON files of five sets of dialogues, and the pictures and videos that they name
(docs/data.md); answers alone are scored. The paper names the sets, not how often each is drawn:
here it is in proportion to its published size. The adapters are the release's: rank 16, alpha 16,
dropout 0.05 on q, k, v and o. What is frozen is kept in bfloat16 and is not saved again: a
checkpoint holds the adapters and their moments. The batch size, the number of steps, the rate and
its warmup are as the authors' reports have them; the rest of the optimizer is pretraining's.
"""

from emu_jax.config import RematConfig, emu_14b_instruct
from emu_jax.data.pipeline import DataConfig
from emu_jax.data.sources import SourceConfig
from emu_jax.train.config import GroupConfig, OptimizerConfig, TrainConfig, config_dict


def dialogues(name: str, weight: float) -> SourceConfig:
    return SourceConfig(
        name=name,
        format="dialogues",
        paths=(f"DATA/{name}.json",),
        media=(f"DATA/{name}",),
        weight=weight,
    )


def get_config():
    return config_dict(
        TrainConfig(
            name="emu_14b_instruct",
            model=emu_14b_instruct(),
            data=DataConfig(
                tokenizer="runs/emu/tokenizer",
                instruct=True,
                sources=(
                    dialogues("sharegpt", weight=70.0),
                    dialogues("alpaca", weight=52.0),
                    dialogues("llava", weight=158.0),
                    dialogues("videochat", weight=11.0),
                    dialogues("video_chatgpt", weight=100.0),
                ),
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
            save_frozen=False,
            remat=RematConfig.everywhere("full"),
        )
    )
