"""Emu2's first stage at 448 pixels, which continues that at 224 for 4,000 steps.

    emu-jax train --config configs/emu2_37b_1b.py --workdir runs/emu2_1b \\
        --config.data.tokenizer=runs/emu2_fresh/tokenizer --config.init_from=runs/emu2_1a

The position embeddings of the 16 x 16 patches are interpolated to 32 x 32, bicubically. The paper
does not say how; this is our reading. Everything else is as in configs/emu2_37b_1a.py, whose
docstring says which facts are the paper's. A schedule of its own, with warm-up over 2% of these
steps, is ours.
"""

from pathlib import Path

from ml_collections import ConfigDict

from emu_jax.train.config_file import read_config

STEPS = 4_000


def get_config() -> ConfigDict:
    return read_config(
        Path(__file__).with_name("emu2_37b_1a.py"),
        [
            "name=emu2_37b_1b",
            "model.vision.image_size=448",
            "data.image_size=448",
            f"steps={STEPS}",
            *(f"optimizer.groups.{group}.warmup_steps={STEPS // 50}" for group in range(3)),
        ],
    )
