"""Pretraining of the ladder's 7B model with the paper's hyperparameters, for scaling studies.

emu-jax train --config configs/emu_7b.py --workdir runs/emu_7b
emu-jax plan --config configs/emu_7b.py --topology v5e:4x4
"""

from ml_collections import ConfigDict

from emu_jax.config import emu_ladder
from emu_jax.train.config import config_dict, pretraining


def get_config() -> ConfigDict:
    return config_dict(pretraining("emu_7b", emu_ladder("7B")))
