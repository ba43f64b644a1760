"""Pretraining of the ladder's 1.5B model with the paper's hyperparameters, for scaling studies.

emu-jax train --config configs/emu_1b5.py --workdir runs/emu_1b5
emu-jax plan --config configs/emu_1b5.py --topology v5e:4x4
"""

from ml_collections import ConfigDict

from emu_jax.config import emu_ladder
from emu_jax.train.config import config_dict, pretraining


def get_config() -> ConfigDict:
    return config_dict(pretraining("emu_1b5", emu_ladder("1.5B")))
