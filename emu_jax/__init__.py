"""Emu, generative pretraining in multimodality, in JAX.

    emu = emu_jax.load("runs/demo")
    emu.generate_text([PIL.Image.open("a.png"), "what is this?"])

Importing this package imports nothing else; each name is imported when it is first used.

load, Emu              load a checkpoint, then generate text and images
GenerationConfig       settings of generation
make_mesh              the devices that a model is loaded onto
UserError              raised for mistakes that the user can fix
Stopped                raised by `Emu.generate_image` when its caller's `stop` returned True
Document, Text, Image  documents for training data
EmuConfig              the configuration of a model
emu_14b, emu_14b_instruct, emu2, emu2_chat, emu2_gen, emu_ladder, digits  presets of it
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emu_jax.config import EmuConfig as EmuConfig
    from emu_jax.config import digits as digits
    from emu_jax.config import emu2 as emu2
    from emu_jax.config import emu2_chat as emu2_chat
    from emu_jax.config import emu2_gen as emu2_gen
    from emu_jax.config import emu_14b as emu_14b
    from emu_jax.config import emu_14b_instruct as emu_14b_instruct
    from emu_jax.config import emu_ladder as emu_ladder
    from emu_jax.data.documents import Document as Document
    from emu_jax.data.documents import Image as Image
    from emu_jax.data.documents import Text as Text
    from emu_jax.errors import UserError as UserError
    from emu_jax.generate.api import Emu as Emu
    from emu_jax.generate.api import load as load
    from emu_jax.generate.image import Stopped as Stopped
    from emu_jax.generate.settings import GenerationConfig as GenerationConfig
    from emu_jax.sharding import make_mesh as make_mesh

__version__ = "0.1.0"

_MODULES = {
    "Document": "emu_jax.data.documents",
    "Emu": "emu_jax.generate.api",
    "EmuConfig": "emu_jax.config",
    "GenerationConfig": "emu_jax.generate.settings",
    "Image": "emu_jax.data.documents",
    "Stopped": "emu_jax.generate.image",
    "Text": "emu_jax.data.documents",
    "UserError": "emu_jax.errors",
    "digits": "emu_jax.config",
    "emu2": "emu_jax.config",
    "emu2_chat": "emu_jax.config",
    "emu2_gen": "emu_jax.config",
    "emu_14b": "emu_jax.config",
    "emu_14b_instruct": "emu_jax.config",
    "emu_ladder": "emu_jax.config",
    "load": "emu_jax.generate.api",
    "make_mesh": "emu_jax.sharding",
}
__all__ = [
    "Document",
    "Emu",
    "EmuConfig",
    "GenerationConfig",
    "Image",
    "Stopped",
    "Text",
    "UserError",
    "digits",
    "emu2",
    "emu2_chat",
    "emu2_gen",
    "emu_14b",
    "emu_14b_instruct",
    "emu_ladder",
    "load",
    "make_mesh",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'emu_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
