"""A checkpoint behind the interface of a harness: dialogues in, texts out.

A harness knows nothing of Emu's prompts. An instruction-tuned model gets dialogues in its own chat
format. A pretrained model gets the parts of all turns in order, and continues them; a template
turns a question into a text that such a model continues well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from emu_jax import sharding
from emu_jax.errors import UserError
from emu_jax.generate.api import Emu, load
from emu_jax.generate.prompt import PromptPart, chat_format, converse
from emu_jax.generate.settings import GenerationConfig
from emu_jax.tokenizer import IMAGE

COMPUTE_DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
# Settings that a task may name; others, such as an image's aspect ratio, are for other models.
TASK_SETTINGS = (
    "max_new_tokens",
    "num_beams",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "length_penalty",
)
SAMPLING = ("temperature", "top_k", "top_p")
# Room for an answer of an instruction-tuned model if nobody names one; VLMEvalKit's own figure. The
# releases' 10 or 50 tokens end an explanation early. Such a model ends its answers itself.
MAX_NEW_TOKENS = 512


class ChatTurn(NamedTuple):
    """A turn of a dialogue.

    Attributes:
        role: "system", "user" or "assistant".
        parts: texts, images and videos in reading order (`emu_jax.generate.api`).
    """

    role: str
    parts: list[PromptPart]


class HarnessModel:
    """Answers the dialogues of a harness.

    Args:
        template: replaces the last text of a dialogue, such as "{text} short answer:", in which
            "{text}" stands for that text.
        settings: fields of `GenerationConfig`; they override those of a task.

    Raises:
        UserError: a setting is unknown or invalid.
    """

    def __init__(self, emu: Emu, *, template: str = "{text}", **settings: Any) -> None:
        self.defaults = emu.defaults.replace(**settings)
        self.emu, self.template, self.settings = emu, template, settings
        emu.defaults = emu.defaults.replace(system=None, grounding=False)  # prompts spell both

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        dtype: str = "bfloat16",
        batch_size: int = 64,
        template: str = "{text}",
        **settings: Any,
    ) -> HarnessModel:
        """Loads a checkpoint, sharded over this process's devices.

        Args:
            checkpoint: as of `emu_jax.load`.
            dtype: bfloat16, in which the release is evaluated, or float32.
            batch_size: sequences that are computed at once; each beam counts.

        Raises:
            UserError: the checkpoint cannot be loaded, or a setting is unknown or invalid.
        """
        if dtype not in COMPUTE_DTYPES:
            raise UserError(f"unknown dtype {dtype!r}: give one of {', '.join(COMPUTE_DTYPES)}")
        GenerationConfig().replace(**settings)  # refused before the checkpoint is read
        mesh = sharding.make_mesh(devices=jax.local_devices())
        emu = load(checkpoint, mesh=mesh, dtype=COMPUTE_DTYPES[dtype], batch_size=batch_size)
        return cls(emu, template=template, **settings)

    def answer(
        self,
        dialogues: Sequence[Sequence[ChatTurn]],
        settings: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Answers dialogues, each of which ends with the user's turn.

        Args:
            settings: fields of `GenerationConfig` that the task sets (`task_settings`). Those of
                this object override them. Other fields are as in the model's release, except
                `MAX_NEW_TOKENS` for instruction-tuned models.

        Raises:
            UserError: a part or a setting is invalid, or a prompt leaves no room for the answer.
        """
        chosen = {**self._room(), **(settings or {}), **self.settings}
        prompts = [self._prompt(dialogue) for dialogue in dialogues]
        chosen |= {"system": None, "grounding": False}  # prompts spell both
        return self.emu.generate_text(prompts, **chosen)

    def _room(self) -> dict[str, int]:
        """Returns the largest number of tokens of an answer, if the release's does not apply."""
        cfg, released = self.emu.cfg, GenerationConfig.of(self.emu.cfg).max_new_tokens
        if not self.emu.tokenizer.instruct or self.emu.defaults.max_new_tokens != released:
            return {}  # `generation.json` names another
        # A prompt must fit too.
        return {"max_new_tokens": max(released, min(MAX_NEW_TOKENS, cfg.llama.context_length // 2))}

    def losses(
        self, dialogues: Sequence[Sequence[ChatTurn]], candidates: Sequence[Sequence[str]]
    ) -> list[list[tuple[float, bool]]]:
        """Returns, for each candidate answer of each dialogue, its loss in nats, a mean over its
        tokens, and whether greedy decoding begins with it.

        Blanks around a candidate are left out: the tokenizer puts one before each word.
        """
        candidates = [[candidate.strip() for candidate in row] for row in candidates]
        prompts = [self._prompt(dialogue) for dialogue in dialogues]
        encode = self.emu.tokenizer.encode
        ids = [[encode(candidate, bos=False) for candidate in row] for row in candidates]
        greedy = self.emu.generate_ids(
            prompts,
            max_new_tokens=max([1, *(len(tokens) for row in ids for tokens in row)]),
            num_beams=1,
            do_sample=False,
        )[:, 1:]
        sums = self.emu.log_likelihoods(prompts, candidates)
        return [
            [
                (-total / max(1, len(tokens)), said[: len(tokens)].tolist() == list(tokens))
                for total, tokens in zip(row, spelled, strict=True)
            ]
            for row, spelled, said in zip(sums, ids, greedy, strict=True)
        ]

    def _prompt(self, dialogue: Sequence[ChatTurn]) -> list[PromptPart]:
        turns = merged(dialogue)
        if not turns or turns[-1].role != "user":
            raise UserError("a dialogue must end with the user's turn")
        turns[-1] = ChatTurn("user", self._templated(turns[-1].parts))
        if not self.emu.tokenizer.instruct:
            return [part for turn in turns for part in turn.parts]
        system = None
        if turns[0].role == "system":
            texts = [part for part in turns[0].parts if isinstance(part, str)]
            if len(texts) < len(turns.pop(0).parts):
                raise UserError("an image in the system message: put it into the user's turn")
            system = "\n".join(texts)
        expected = [("user", "assistant")[number % 2] for number in range(len(turns))]
        if [turn.role for turn in turns] != expected:
            raise UserError("user and assistant must take turns, after the system message")
        return converse(
            [turn.parts for turn in turns],
            self.defaults.system if system is None else system,
            style=chat_format(self.emu.cfg, self.defaults.chat_format),
            grounding=self.defaults.grounding,
        )

    def _templated(self, parts: list[PromptPart]) -> list[PromptPart]:
        if self.template == "{text}":
            return parts
        for n, part in reversed(list(enumerate(parts))):
            if isinstance(part, str):
                return [*parts[:n], self.template.replace("{text}", part), *parts[n + 1 :]]
        return [*parts, self.template.replace("{text}", "")]


def merged(dialogue: Sequence[ChatTurn]) -> list[ChatTurn]:
    """Joins consecutive turns of one role, and puts images where `<image>` stands in the texts."""
    turns: list[ChatTurn] = []
    for turn in dialogue:
        if turns and turns[-1].role == turn.role:
            turns[-1].parts.extend(turn.parts)
        else:
            turns.append(ChatTurn(turn.role, list(turn.parts)))
    return [ChatTurn(turn.role, interleaved(turn.parts)) for turn in turns]


def interleaved(parts: Sequence[PromptPart]) -> list[PromptPart]:
    """Puts the images of a turn where `<image>` stands in its texts.

    If there are not as many images as marks, the marks are dropped and the order remains.
    """
    images = [part for part in parts if not isinstance(part, str)]
    marks = sum(part.count(IMAGE) for part in parts if isinstance(part, str))
    if not marks:
        return list(parts)
    waiting = iter(images if marks == len(images) else [])
    result: list[PromptPart] = []
    for part in parts:
        if not isinstance(part, str):
            result += [] if marks == len(images) else [part]
            continue
        for number, text in enumerate(part.split(IMAGE)):
            result += [next(waiting)] if number and marks == len(images) else []
            result += [text] if text.strip() else []
    return result


def task_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the decode settings of a task, as fields of `GenerationConfig`.

    Harnesses ask for greedy decoding by a temperature of 0 or by `do_sample: false`. Without
    sampling, the model's own number of beams is used unless the task names one.
    """
    known = {name: given[name] for name in TASK_SETTINGS if given.get(name) is not None}
    temperature = known.get("temperature", 1.0 if known.get("do_sample") else 0)
    if known.setdefault("do_sample", temperature > 0) and temperature > 0:
        known.setdefault("num_beams", 1)
        return known
    known["do_sample"] = False
    return {name: value for name, value in known.items() if name not in SAMPLING}


def until(text: str, stops: str | Sequence[str] | None) -> str:
    """Returns the text before the first of `stops`."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        text = text.partition(stop)[0] if stop else text
    return text.strip()


def group_by_settings(
    settings: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Yields each distinct value of `settings` with the indices that have it."""
    groups: dict[str, list[int]] = {}
    for number, each in enumerate(settings):
        groups.setdefault(json.dumps(each, sort_keys=True), []).append(number)
    for text, numbers in groups.items():
        yield json.loads(text), numbers
