"""Pretraining of the whole 14B model with the paper's hyperparameters.

emu-jax plan --config configs/emu_14b.py --topology v5p:4x4x8
emu-jax train --config configs/emu_14b.py --workdir gs://BUCKET/emu_14b
"""

import dataclasses

from emu_jax.config import emu_14b
from emu_jax.train.config import config_dict, pretraining


def get_config():
    release = emu_14b()
    # Rows that only round the vocabulary up are split over chips, and trimmed on export.
    llama = dataclasses.replace(release.llama, vocab_multiple=128)
    return config_dict(
        pretraining(
            "emu_14b",
            dataclasses.replace(release, llama=llama),
        )
    )
