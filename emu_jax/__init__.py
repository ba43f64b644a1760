"""Emu, generative pretraining in multimodality, in JAX.

    emu = emu_jax.load("runs/demo")
    emu.generate_text([Image.open("a.png"), "what is this?"])

Importing this package imports nothing else; each name is fetched when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emu_jax.config import EmuConfig as EmuConfig
    from emu_jax.generate.api import Emu as Emu
    from emu_jax.generate.api import load as load

__version__ = "0.1.0"

_HOME = {
    "Emu": "emu_jax.generate.api",
    "EmuConfig": "emu_jax.config",
    "load": "emu_jax.generate.api",
}
__all__ = ["Emu", "EmuConfig", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'emu_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
