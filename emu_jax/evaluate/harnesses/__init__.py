"""Plug-ins of evaluation harnesses, which alone import those.

model.py        a checkpoint as a harness asks it: dialogues in, texts out
lmms_eval.py    models of lmms-eval
vlmevalkit.py   a model of VLMEvalKit, and the command that evaluates it
"""

from __future__ import annotations

from typing import Any


def lmms_eval_manifest() -> Any:
    """Returns the `ModelManifest` of the model `emu_jax` of lmms-eval.

    lmms-eval calls this by an entry point whenever it starts, so JAX is not imported here.
    """
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    module = f"{__name__}.lmms_eval"
    return ModelManifest(
        "emu_jax",
        simple_class_path=f"{module}.EmuSimple",
        chat_class_path=f"{module}.EmuChat",
    )
