"""Emu2's first stage at 32 pixels, which continues that at 16 with its position embeddings
interpolated.

    emu-jax train --config configs/digits2_1a.py --workdir runs/digits2_1a
    emu-jax train --config configs/digits2_1b.py --workdir runs/digits2_1b

From the paper: twice the resolution of the first part, and its other settings. Ours: bicubic
interpolation, the learning rates, and 400 steps with 40 of warm-up. The paper has a ninth of the
steps at the lower resolution; here are as many.
"""

from pathlib import Path

from ml_collections import ConfigDict

from emu_jax.train.config_file import read_config


def get_config() -> ConfigDict:
    config = read_config(
        Path(__file__).with_name("digits2_1a.py"),
        [
            "name=digits2_1b",
            "model.vision.image_size=32",
            "data.image_size=32",
            "steps=400",
            "optimizer.groups.0.lr=2e-3",
            "optimizer.groups.0.warmup_steps=40",
            "optimizer.groups.1.lr=2e-3",
            "optimizer.groups.1.warmup_steps=40",
        ],
    )
    towers = ("visual", "project_up", "project_down", "llama")
    config.parents = ConfigDict(dict.fromkeys(towers, "../digits2_1a"))
    return config
