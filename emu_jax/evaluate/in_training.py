"""Tasks of `emu-jax eval` during training, on the parameters of the training state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from emu_jax.errors import UserError
from emu_jax.evaluate.answering import Answerer, choose_mode
from emu_jax.evaluate.fewshot import FewShot
from emu_jax.evaluate.scorers import Scores
from emu_jax.evaluate.tasks import TASKS
from emu_jax.evaluate.tasks.base import Folder, Item, Mode, ScoringContext, Task, check_split
from emu_jax.generate.prompt import is_video, open_file
from emu_jax.generate.settings import GenerationConfig
from emu_jax.progress import BRIEF_SECONDS, ProgressBar
from emu_jax.storage import as_path
from emu_jax.tokenizer import Tokenizer
from emu_jax.train.config import EvalConfig, TrainConfig
from emu_jax.train.evaluation import EvalResult, Evaluation, Stop
from emu_jax.train.loop import EVALUATIONS
from emu_jax.train.samples import TrainedEmu, rows_at_once, sheet_of
from emu_jax.train.sheets import MAX_ROWS, SheetPart, SheetRow
from emu_jax.train.step import Trainer, TrainState

MAX_BEAMS = 5  # of the tasks; the model then does not split a batch
FRAMES_SHOWN = 4  # of a video, on a contact sheet


class TaskEvaluation(Evaluation):
    """Answers the first `batches * batch_size` items of a task, without examples, and scores them.

    `EvalConfig.root` is the folder in the official layout, and `split` a split of the task.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        config: EvalConfig,
        trainer: Trainer,
        tokenizer: Tokenizer,
        workdir: Path,
    ) -> None:
        super().__init__(cfg, config, trainer, tokenizer, workdir)
        self.task, self._context, self.items = _open(cfg, config)
        self._batch_size = rows_at_once(cfg, config)
        self._mode: Mode = choose_mode("auto", tokenizer, self.task)
        self._check_scorer()
        self._emu = TrainedEmu(
            trainer,
            tokenizer,
            purpose=f"answers to {self.task.name}",
            paints=False,
            batch_size=MAX_BEAMS * self._batch_size,
            defaults=GenerationConfig.of(cfg.model),
        )

    @classmethod
    def check(cls, cfg: TrainConfig, config: EvalConfig) -> None:
        """Checks that the task's files exist and can be scored.

        Raises:
            UserError: they do not, or the task needs more images than training can generate.
        """
        _open(cfg, config)

    def run(self, state: TrainState, step: int, stop: Stop) -> EvalResult | None:
        """Answers the items, scores the answers and shows some beside the correct ones."""
        answering = Answerer(
            self._emu(state),
            self.task,
            self._mode,
            FewShot("none", [], 0, 0),
            in_context=False,
            seed=0,
            images=self._context.out,  # unused, since no stage of the task generates images
        )
        size = self._batch_size
        batches = [self.items[n : n + size] for n in range(0, len(self.items), size)]
        answers: list[Any] = []
        with ProgressBar(
            f"{self.config.name} at step {step}",
            len(self.items),
            "item",
            enabled=jax.process_index() == 0,
            min_seconds=BRIEF_SECONDS,
        ) as bar:
            for items, rows in answering(batches):
                answers += [row["answer"] for row in rows]
                bar.add(len(items))
                if stop():
                    return None
        if jax.process_index() != 0:
            return EvalResult({})
        shown = zip(self.items[:MAX_ROWS], answers, strict=False)
        sheet = sheet_of(self, step, [self._row(item, answer) for item, answer in shown])
        return EvalResult(self._score(answers).values, sheet)

    def _check_scorer(self) -> None:
        """Scores empty answers, so that a scorer that cannot run fails before training.

        Raises:
            UserError: the scorer cannot run, or the answers of this split are not public.
        """
        answers = []
        for item in self.items:
            said: dict[str, Any] = {
                stage.name: list(range(len(stage.candidates(item)))) if stage.candidates else ""
                for stage in self.task.stages(self._mode, False)
            }
            answers.append(self.task.answer(item, said))
        self._score(answers)

    def _score(self, answers: Sequence[Any]) -> Scores:
        scores = self.task.score(self.items, answers, self._context)
        if scores is None:
            raise UserError(f"{self.task.name}, split {self._context.split}: {self.task.unscored}")
        return scores

    def _row(self, item: Item, answer: Any) -> SheetRow:
        media: Any = [] if item.media is None else open_file(item.media)
        prompt: list[SheetPart] = [*media[:FRAMES_SHOWN]] if is_video(media) else [media]
        given, correct = self.task.shown(item, answer)
        return SheetRow([*prompt, *filter(None, [item.question])], [given], [correct])


def _open(cfg: TrainConfig, config: EvalConfig) -> tuple[Task, ScoringContext, list[Item]]:
    """Returns the task of an evaluation, what it is scored with, and its items.

    Raises:
        UserError: files are missing or damaged, or the task generates images.
    """
    task = TASKS[config.kind]
    if any(stage.paints for mode in task.modes for stage in task.stages(mode, False)):
        raise UserError(
            f"{task.name} compares thousands of images, too many to generate during training: use "
            "the kind 'images' here, and emu-jax eval on a checkpoint"
        )
    if not config.root:
        raise UserError(f"no data: set root to the folder of {task.name} (docs/evaluation.md)")
    folder, split = Folder(as_path(config.root)), check_split(task, config.split)
    count = config.batches * rows_at_once(cfg, config)
    items = task.items(folder, split, 0)[:count]
    if not items:
        raise UserError(f"{config.root} has no items of {task.name}, split {split}")
    return task, ScoringContext(folder, split, folder.root), items


# The kinds of evaluations that `EvalConfig.kind` may name.
EVALUATION_KINDS: dict[str, type[Evaluation]] = EVALUATIONS | dict.fromkeys(TASKS, TaskEvaluation)
