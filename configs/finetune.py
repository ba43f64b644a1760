"""Fine-tunes a converted release on your own documents, with the pretraining objective.

    emu-jax convert Emu/pretrain runs/emu --tokenizer Emu1/models/llama_config
    emu-jax train --config configs/finetune.py --workdir runs/mine \\
        --config.init_from=runs/emu --config.data.root=DATA

DATA/train holds ArrayRecord files of documents, KIND.array_record for each kind of the mixture, as
`emu_jax.data.documents.write_documents` writes them. The model is the one in runs/emu.
"""

from ml_collections import ConfigDict

from emu_jax.config import RematConfig
from emu_jax.data.pipeline import DataConfig
from emu_jax.train.config import GroupConfig, OptimizerConfig, TrainConfig, config_dict


def get_config() -> ConfigDict:
    return config_dict(
        TrainConfig(
            name="finetune",
            data=DataConfig(
                tokenizer="runs/emu/tokenizer",
                mixture={"pairs": 1.0, "pages": 0.0, "storyboards": 0.0},
                batch_size=8,
            ),
            optimizer=OptimizerConfig(
                groups=(
                    # A tenth of the paper's peak learning rates of pretraining.
                    GroupConfig(r"^(visual|ln_visual)\.", lr=4e-6, warmup_steps=100),
                    GroupConfig(r"^cformer\.", lr=1e-5, warmup_steps=100),
                    GroupConfig(r"^llama\.", lr=3e-6, warmup_steps=100),
                )
            ),
            remat=RematConfig.everywhere("full"),
            steps=1000,
        )
    )
