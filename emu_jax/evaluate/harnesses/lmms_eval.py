"""Models of lmms-eval: `lmms-eval --model emu_jax --model_args checkpoint=runs/emu`.

lmms-eval finds them by the entry point of the installed package (`lmms_eval_manifest`), and imports
this module when a run chooses one. By default it asks in messages, in which texts and images may
alternate. `--force_simple` chooses its older interface, which likelihoods need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from emu_jax.errors import UserError
from emu_jax.evaluate.harnesses.model import (
    ChatTurn,
    HarnessModel,
    group_by_settings,
    task_settings,
    until,
)
from emu_jax.generate.prompt import PromptPart
from emu_jax.progress import ProgressBar

_CHUNK = 256  # requests whose images are in memory at once

T = TypeVar("T")

if TYPE_CHECKING:
    # Optional, and not installed where types are checked.
    Base = object
else:
    from lmms_eval.api.model import lmms as Base


class EmuChat(Base):
    """The model `emu_jax` of lmms-eval, which reads messages.

    Args:
        checkpoint: as of `emu_jax.load`.
        batch_size: sequences that are computed at once; each beam counts. 1, lmms-eval's default,
            leaves the choice to emu_jax.
        max_batch_size: ignored.
        device: ignored; JAX's own devices are used.
        options: `dtype`, `template`, and settings of `HarnessModel`.

    Raises:
        UserError: the checkpoint cannot be loaded, or an option is unknown or invalid.
    """

    is_simple = False

    def __init__(
        self,
        checkpoint: str,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal():
            raise UserError(f"batch_size {batch_size} (lmms-eval): give a number")
        if int(batch_size) != 1:
            options["batch_size"] = int(batch_size)
        self.harness_model = HarnessModel.load(str(checkpoint), **options)
        self.task_dict: Mapping[str, Mapping[str, Any]]  # the documents, set by lmms-eval

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers requests, in batches of those with the same settings."""
        answers = [""] * len(requests)
        settings = [self._given(request.args) for request in requests]
        with ProgressBar("answers", len(requests), "answer") as bar:
            for setting, numbers in group_by_settings(settings):
                for chunk in chunks(numbers):
                    asked = [self._dialogue(requests[n].args) for n in chunk]
                    texts = self.harness_model.answer(asked, task_settings(setting))
                    for number, text in zip(chunk, texts, strict=True):
                        answers[number] = until(text, setting.get("until"))
                    bar.add(len(chunk))
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuses tasks whose questions depend on answers before.

        Raises:
            UserError: always.
        """
        raise UserError("tasks of several rounds (lmms-eval): not supported; choose another task")

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Refuses tasks that compare likelihoods, for which lmms-eval has no messages.

        Raises:
            UserError: always.
        """
        raise UserError("likelihoods (lmms-eval) need its older interface: add --force_simple")

    def _given(self, args: tuple[Any, ...]) -> dict[str, Any]:
        return args[2]

    def _dialogue(self, args: tuple[Any, ...]) -> list[ChatTurn]:
        _, messages, _, doc_id, task, split = args
        return [
            ChatTurn(message["role"], [_part_of(content) for content in message["content"]])
            for message in messages(self.task_dict[task][split][doc_id])
        ]


class EmuSimple(EmuChat):
    """The model of lmms-eval's older interface: the images of a question, then its text."""

    is_simple = True

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Returns the loss of each request's continuation, and whether it is greedy.

        Despite the name, lmms-eval chooses the smallest value (`ConfigurableTask.process_results`),
        and its own models return mean losses. It would turn a bare tuple into a string.
        """
        from lmms_eval.api.instance import GenerationResult  # pyright: ignore[reportMissingImports]

        questions: dict[tuple[Any, ...], list[int]] = {}
        for number, request in enumerate(requests):
            context, _, _, *document = request.args
            questions.setdefault((context, *document), []).append(number)
        results: list[Any] = [None] * len(requests)
        with ProgressBar("questions", len(questions), "question") as bar:
            for chunk in chunks(list(questions.values())):
                first = [requests[numbers[0]].args for numbers in chunk]
                asked = [self._turns(args[0], args[2], args[3:]) for args in first]
                candidates = [[self._continuation(requests[n].args) for n in row] for row in chunk]
                losses = self.harness_model.losses(asked, candidates)
                for numbers, row in zip(chunk, losses, strict=True):
                    for number, loss in zip(numbers, row, strict=True):
                        results[number] = GenerationResult(loss)
                bar.add(len(chunk))
        return results

    def _given(self, args: tuple[Any, ...]) -> dict[str, Any]:
        return args[1]

    def _dialogue(self, args: tuple[Any, ...]) -> list[ChatTurn]:
        return self._turns(args[0], args[2], args[3:])

    def _turns(
        self, context: str, visuals: Callable[[Any], Any], document: tuple[Any, str, str]
    ) -> list[ChatTurn]:
        doc_id, task, split = document
        shown = visuals(self.task_dict[task][split][doc_id]) or []
        media = [media_of(visual) for visual in (shown if isinstance(shown, list) else [shown])]
        return [ChatTurn("user", [*media, context])]

    def _continuation(self, args: tuple[Any, ...]) -> str:
        _, target, _, doc_id, task, split = args
        return target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])


def _part_of(content: Mapping[str, Any]) -> PromptPart:
    """Returns the part that a piece of a message stands for.

    Raises:
        UserError: it is neither text, image nor video.
    """
    if content["type"] == "text":
        return content["text"]
    if content["type"] not in ("image", "video"):
        raise UserError(f"{content['type']} in a message (lmms-eval): Emu reads text and images")
    return media_of(content["url"])


def media_of(visual: Any) -> PromptPart:
    """Returns the part of an image or a video: files become paths, whatever names them."""
    if isinstance(visual, Mapping):
        visual = visual.get("url") or visual.get("path") or visual.get("video")
    return Path(visual) if isinstance(visual, str) else visual


def chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yields the items in pieces of `_CHUNK`."""
    for first in range(0, len(items), _CHUNK):
        yield items[first : first + _CHUNK]
