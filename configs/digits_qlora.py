"""QLoRA on the digits: the adapters of digits_instruct.py over a base in int8.

    emu-jax demo --workdir runs/demo
    emu-jax train --config configs/digits_qlora.py --workdir runs/digits_qlora
    emu-jax generate --checkpoint runs/digits_qlora --quantize int8 @digit.png "is it even?"

`--config.quantize=int4` keeps the base in int4.
"""

from pathlib import Path

from ml_collections import ConfigDict

from emu_jax.train.config_file import read_config


def get_config() -> ConfigDict:
    base = Path(__file__).with_name("digits_instruct.py")
    return read_config(base, ["name=digits_qlora", "quantize=int8"])
