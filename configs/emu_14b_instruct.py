"""Instruction tuning of the 14B model by low-rank adapters on its attention (paper, Emu-I).

    emu-jax train --config configs/emu_14b_instruct.py --workdir runs/emu_instruct \\
        --config.init_from=runs/emu --config.data.root=DATA

DATA/train holds ArrayRecord files of conversations, instructions-*.array_record, whose answers
alone are scored (docs/finetuning.md). The adapters are the release's: rank 16, alpha 16, dropout
0.05 on q, k, v and o. What is frozen is kept in bfloat16 and is not saved again: a checkpoint
holds the adapters and their moments. The batch size, the number of steps, the rate and its warmup
are as the authors' reports have them; the rest of the optimizer is pretraining's.
"""

from emu_jax.config import RematConfig, emu_14b_instruct
from emu_jax.data.pipeline import DataConfig
from emu_jax.train.config import GroupConfig, OptimizerConfig, TrainConfig, config_dict


def get_config():
    return config_dict(
        TrainConfig(
            name="emu_14b_instruct",
            model=emu_14b_instruct(),
            data=DataConfig(
                mixture={"instructions": 1.0},
                instruct=True,
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
