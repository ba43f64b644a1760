"""A model of VLMEvalKit, and the command that evaluates it:

    python -m emu_jax.evaluate.harnesses.vlmevalkit --checkpoint runs/emu --data MMBench_DEV_EN

VLMEvalKit has no plug-ins: its models are the entries of a dict. `register` adds one, and the
command then runs VLMEvalKit's own `run.py`, which gets all further arguments.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emu_jax.errors import UserError
from emu_jax.evaluate.harnesses.model import COMPUTE_DTYPES, ChatTurn, HarnessModel
from emu_jax.generate.cli_io import parse_settings

if TYPE_CHECKING:
    # Optional, and not installed where types are checked.
    Base = object
else:
    from vlmeval.vlm.base import BaseModel as Base

RUNNERS = ("vlmeval.run", "run")  # of the package, and of a clone


class EmuVLM(Base):
    """A model of VLMEvalKit.

    Args:
        checkpoint: as of `emu_jax.load`.
        options: `dtype`, `template`, and settings of `HarnessModel`.

    Raises:
        UserError: the checkpoint cannot be loaded, or an option is unknown or invalid.
    """

    INSTALL_REQ = False
    INTERLEAVE = True
    VIDEO_LLM = True  # videos are files, of which the release's frames are taken

    def __init__(self, checkpoint: str, **options: Any) -> None:
        super().__init__()
        self.harness_model = HarnessModel.load(checkpoint, **options)

    def generate_inner(
        self, message: Sequence[Mapping[str, Any]], dataset: str | None = None
    ) -> str:
        """Answers a question; its pieces may name roles other than the user's."""
        turns = [ChatTurn(piece.get("role", "user"), [_part_of(piece)]) for piece in message]
        return self.harness_model.answer([turns])[0]

    def chat_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """Answers the last turn of a dialogue."""
        turns = [ChatTurn(turn["role"], [*map(_part_of, turn["content"])]) for turn in message]
        return self.harness_model.answer([turns])[0]


def _part_of(piece: Mapping[str, Any]) -> str | Path:
    """Returns the part that a piece of a message stands for: a text, or the path of a file."""
    return piece["value"] if piece["type"] == "text" else Path(piece["value"])


def register(name: str, checkpoint: str, **options: Any) -> None:
    """Makes a checkpoint a model of VLMEvalKit.

    Args:
        name: what `--model` of its `run.py` calls it.
        options: of `EmuVLM`.
    """
    from vlmeval.config import supported_VLM  # pyright: ignore[reportMissingImports]

    supported_VLM[name] = functools.partial(EmuVLM, checkpoint, **options)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs VLMEvalKit's `run.py` with a checkpoint.

    Raises:
        UserError: a setting is invalid, or VLMEvalKit has no `run.py` where it is looked for.
    """
    parser = argparse.ArgumentParser(
        prog="python -m emu_jax.evaluate.harnesses.vlmevalkit",
        description="Evaluates a checkpoint. VLMEvalKit's run.py gets all other arguments.",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, help="a run directory, or hf://ORG/NAME")
    parser.add_argument("--name", default="emu_jax", help="of the model, in the results")
    parser.add_argument("--dtype", choices=sorted(COMPUTE_DTYPES), default="bfloat16")
    parser.add_argument("--template", default="{text}", help="what a question {text} becomes")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of generation"
    )
    args, others = parser.parse_known_args(argv)
    settings = parse_settings("text", args.set)
    register(args.name, args.checkpoint, dtype=args.dtype, template=args.template, **settings)
    sys.argv = ["run.py", "--model", args.name, *others]
    _runner().main()


def _runner() -> Any:
    for name in RUNNERS:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
        else:
            return module
    raise UserError("VLMEvalKit has no run.py (sys.path): start the command in its clone")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
