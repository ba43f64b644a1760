"""Fine-tunes a converted Emu2 on your own documents: LoRA adapters on its language model, with the
pretraining objective.

    emu-jax convert hf://BAAI/Emu2-Gen runs/emu2
    emu-jax train --config configs/finetune_emu2.py --workdir runs/mine \\
        --config.init_from=runs/emu2 --config.data.root=DATA

DATA is as in configs/finetune.py. The model is the one in runs/emu2; for Emu2-Chat, which has 256
embeddings of an image, add --config.data.n_causal=256; if DATA has videos, add
--config.data.n_frame=64. `emu-jax convert runs/mine DST --to emu --merge-lora` gives the release's
files.

From the paper: the objective, cross-entropy and regression. From the release: the sizes of images
and their embeddings. Ours: adapters, which Emu2's releases do not have, the frozen rest, and all
settings: batches of 8 rows, 1,000 steps with 100 of warm-up, and a learning rate of 1e-4.
"""

from ml_collections import ConfigDict

from emu_jax.config import EmuConfig, LlamaConfig, LoraConfig, RematConfig
from emu_jax.data.pipeline import DataConfig
from emu_jax.train.config import GroupConfig, OptimizerConfig, TrainConfig, config_dict


def get_config() -> ConfigDict:
    return config_dict(
        TrainConfig(
            name="finetune_emu2",
            model=EmuConfig(llama=LlamaConfig(lora=LoraConfig())),  # init_from decides the rest
            data=DataConfig(
                tokenizer="runs/emu2/tokenizer",
                family="emu2",
                mixture={"pairs": 1.0, "pages": 0.0, "storyboards": 0.0},
                batch_size=8,
                n_causal=64,
                image_size=448,
            ),
            optimizer=OptimizerConfig(
                groups=(
                    GroupConfig(r"\.lora_[ab]$", lr=1e-4, warmup_steps=100),
                    GroupConfig(".*", lr=0.0),
                ),
                weight_decay=0.0,
            ),
            save_frozen=False,
            remat=RematConfig(llama="full"),
            steps=1000,
        )
    )
