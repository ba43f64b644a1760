"""`emu-jax eval`: evaluates a checkpoint on a task and writes the official result file.

Items are batched once, in an order that depends only on the task, and whole batches are dealt out
to the models. The content of a batch, and so the answers, therefore depend neither on the number
of processes nor on what an earlier run completed. Each model is spread over the devices of
`hosts_per_model` processes, the first of which appends to the model's own predictions file. Items
in those files are not asked again. At the end the first process of all merges the files, which must
be visible to all processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from emu_jax import sharding
from emu_jax.checkpoint import latest_step, model_fingerprint
from emu_jax.errors import UserError, suggest
from emu_jax.evaluate import results_page
from emu_jax.evaluate.answering import Answerer, choose_mode, prompt_text
from emu_jax.evaluate.fewshot import Examples, FewShot
from emu_jax.evaluate.scorers.similarity import SimilarityOptions
from emu_jax.evaluate.tasks import TASKS
from emu_jax.evaluate.tasks.base import (
    FewShotExamples,
    FidOptions,
    Folder,
    Item,
    Mode,
    Result,
    ScoringContext,
    Task,
    check_split,
)
from emu_jax.generate.api import load
from emu_jax.generate.settings import GenerationConfig
from emu_jax.progress import ProgressBar
from emu_jax.storage import is_remote, log_parts, open_log, read_log, write_text
from emu_jax.train.distributed import initialize_distributed

log = logging.getLogger(__name__)

UPLOAD_SECONDS = 30.0  # between two uploads of the predictions to an object store
_COLUMNS = ("id", "answer", "said", "asked")  # keys of a line of the predictions file
# The paper's names of models, by family for pretrained ones and by mode for others.
_PAPER_NAMES = {"emu": "Emu", "emu2": "Emu2", "instruct": "Emu-I", "chat": "Emu2-Chat"}
SHOTS = 2  # default number of examples, the paper's for `--examples text`


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of an evaluation.

    Attributes:
        split: the split to evaluate; the task's default if empty.
        mode: the kind of prompts; `auto` follows the kind of the checkpoint.
        shots: examples before each question; 2 by default unless `examples` is `none`.
        support: directory of the examples; the evaluated data by default.
        limit: evaluate only the first `limit` items.
        seed: for sampling examples, prompts and images.
        batch_size: items answered in one batch.
        dtype: the compute dtype; the release evaluates in bfloat16.
        quantize: the type of the quantized matrices (`emu_jax.load`); None: none are.
        hosts_per_model: processes whose devices hold a model together. All other processes hold
            more copies of it, which answer other batches.
        fid: settings for comparing generated images with real ones.
        similarity: networks that compare a generated image with its prompt or a real image.
    """

    split: str = ""
    mode: Literal["auto", "pretrain", "instruct", "chat"] = "auto"
    examples: Examples = "none"
    shots: int | None = None
    support: Path | None = None
    limit: int | None = None
    seed: int = 0
    batch_size: int = 16
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    quantize: Literal["int8", "int4"] | None = None
    hosts_per_model: int = 1
    fid: FidOptions = FidOptions()
    similarity: SimilarityOptions = SimilarityOptions()

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: an option is out of range or conflicts with another.
        """
        for name in ("shots", "support"):
            value = getattr(self, name)
            if self.examples == "none" and value:
                raise UserError(f"--{name} {value} needs --examples text, random or rices")
        if self.examples != "none" and self.shots is not None and self.shots < 1:
            raise UserError(f"--shots {self.shots} with --examples {self.examples}: at least 1")
        for name in ("limit", "batch_size", "hosts_per_model"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} cannot be {value}")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"--seed {self.seed}: at least 0, and below 2147483648")


def evaluate(checkpoint: Path, task: str, data: Path, out: Path, options: Options) -> Result:
    """Runs or resumes a task.

    Writes OUT, and next to it files with its stem and the suffixes `.predictions.jsonl`,
    `.scores.json` and `.html`.

    Raises:
        UserError: the task does not take the options, files are missing or damaged, or earlier
            predictions were made with other settings.
    """
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}{suggest(task, TASKS)}")
    if out.suffix != ".json":
        raise UserError(f"--out {out}: the result is a JSON file, name it so")
    initialize_distributed()
    run = CheckpointEvaluation(checkpoint, TASKS[task], Folder(data), out, options)
    run.answer()
    return run.finish()


class CheckpointEvaluation:
    """An evaluation of one checkpoint on one task."""

    def __init__(
        self, checkpoint: Path, task: Task, data: Folder, out: Path, options: Options
    ) -> None:
        self.task, self.data, self.out, self.options = task, data, out, options
        self.checkpoint = checkpoint
        self.split = check_split(task, options.split)
        self.items = task.items(data, self.split, options.seed)[: options.limit]
        if not self.items:
            raise UserError(f"{data.root} has no items of {task.name}, split {self.split}")
        self.shots = (options.shots or SHOTS) if options.examples != "none" else 0
        support = []
        if self.shots:
            support = task.examples(Folder(options.support) if options.support else data)
        self.fewshot = FewShot(options.examples, support, self.shots, options.seed)
        self.in_context = options.examples in ("random", "rices")
        self.process, self.processes = jax.process_index(), jax.process_count()
        if self.processes % options.hosts_per_model:
            raise UserError(
                f"--hosts-per-model {options.hosts_per_model} does not divide the "
                f"{self.processes} processes: choose a number that does"
            )
        self.replicas = self.processes // options.hosts_per_model
        self.replica, member = divmod(self.process, options.hosts_per_model)
        self.leads = member == 0  # the process that writes its model's answers

        devices = jax.local_devices()
        if options.hosts_per_model > 1:
            devices = [
                device
                for device in jax.devices()
                if device.process_index // options.hosts_per_model == self.replica
            ]
        if options.batch_size % len(devices) and self.process == 0:
            log.warning(
                "--batch-size %d is not a multiple of the %d devices of a model: all do the same "
                "work",
                options.batch_size,
                len(devices),
            )
        mesh = sharding.make_mesh(devices=devices)
        # Fit the beams of a whole batch, so that the model does not split it.
        self.emu = load(
            checkpoint,
            mesh=mesh,
            dtype=jnp.dtype(options.dtype),
            batch_size=options.batch_size * 5,
            quantize=options.quantize,
        )
        # The release's defaults, not the checkpoint's.
        self.emu.defaults = GenerationConfig.of(self.emu.cfg)
        self.mode: Mode = choose_mode(options.mode, self.emu.tokenizer, task)
        self.answering = Answerer(
            self.emu,
            task,
            self.mode,
            self.fewshot,
            in_context=self.in_context,
            seed=options.seed,
            images=out.with_suffix(".images"),
            writes=self.leads,
        )
        self.weights = model_fingerprint(checkpoint)
        self.settings = self._settings()
        out.parent.mkdir(parents=True, exist_ok=True)
        self.store = Store(out, self.settings, self.replica)

    def _settings(self) -> dict[str, Any]:
        """Settings that the predictions depend on. A run with other settings cannot resume them."""
        options, digest = self.options, hashlib.sha256()
        for item in self.items:
            more = [item.fields.get(name) for name in ("history", "options")]
            row = (item.id, item.media and item.media.name, item.question, *more)
            digest.update(f"{row}\n".encode())
        for example in self.fewshot.support:
            digest.update(f"{example.media.name}\n{example.question}\n{example.answer}\n".encode())
        stages = {}
        asking = self.task.stages(self.mode, self.in_context)
        answers = dict.fromkeys((stage.name for stage in asking), "")
        example_prompt = FewShotExamples(tuple(self.fewshot.support[:1]), self.in_context)
        for stage in asking:
            digest.update(
                prompt_text(stage.prompt(self.items[0], example_prompt, answers)).encode()
            )  # the wording
            choices = {"choices": stage.choices} if stage.choices else {}
            stages[stage.name] = {**stage.settings, **choices}
        return {
            "task": self.task.name,
            "split": self.split,
            "mode": self.mode,
            "examples": options.examples,
            "shots": self.shots,
            "limit": options.limit,
            "seed": options.seed,
            "batch_size": options.batch_size,
            "dtype": options.dtype,
            **({"quantize": options.quantize} if options.quantize else {}),
            "checkpoint": str(self.checkpoint.resolve()),
            "step": _step(self.checkpoint),
            "weights": self.weights,
            "items": len(self.items),
            "asked": digest.hexdigest()[:12],
            "stages": stages,
        }

    # --- Answering ---

    def answer(self) -> None:
        """Answers all items that have no prediction yet."""
        done = self.store.read()
        barrier("predictions of earlier runs are read")
        order = sorted(range(len(self.items)), key=lambda i: _length(self.items[i]))
        size = self.options.batch_size
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        left = [b for b in batches if any(self.items[i].id not in done for i in b)]
        if done and self.process == 0:
            log.info("%d of %d items were answered before", len(done), len(self.items))
        precision = "highest" if self.options.dtype == "float32" else "default"
        with jax.default_matmul_precision(precision):
            if left:
                self.fewshot.index(
                    self._cache(),
                    self.answering.featurize,
                    self.replica,
                    self.replicas,
                    barrier,
                    writes=self.leads,
                )
            self._answer(left[self.replica :: self.replicas], done)
        barrier("all items are answered")

    def _answer(self, batches: Sequence[Sequence[int]], done: Collection[str]) -> None:
        total = sum(len(b) for b in batches)
        with (
            self.store.appending() if self.leads else _ignoring() as append,
            ProgressBar(self.task.name, total, "item", enabled=self.process == 0) as progress,
        ):
            asked = [[self.items[i] for i in batch] for batch in batches]
            for items, rows in self.answering(asked):
                append([row for row in rows if row["id"] not in done])
                progress.add(len(items))

    def _cache(self) -> Path:
        """Returns the directory that caches the features of the support set."""
        name = f"{self.weights} {self.options.dtype}"
        if self.options.quantize:
            name += f" {self.options.quantize}"
        support = self.options.support or self.data.root
        digest = hashlib.sha256(f"{name} {support.resolve()} {self.task.name}".encode())
        return self.out.parent / f"rices-{digest.hexdigest()[:12]}"

    # --- Results ---

    def finish(self) -> Result:
        """Merges the predictions, writes the results and scores them in the first process.

        The other processes wait for it, even if it fails.

        Raises:
            UserError: the results could not be written.
        """
        scores = self.out.with_suffix(".scores.json")
        if self.process > 0:
            barrier("the results are written")
            if not scores.is_file():
                raise UserError("the first process failed to write the results: see its log")
            return Result(**json.loads(scores.read_text()))
        try:
            scores.unlink(missing_ok=True)  # left by an earlier run
            return self._join_and_write()
        finally:
            barrier("the results are written")

    def _join_and_write(self) -> Result:
        predictions = self.store.read()
        if lost := [item.id for item in self.items if item.id not in predictions]:
            raise UserError(
                f"{len(lost)} of {len(self.items)} items have no prediction, {lost[0]!r} first: "
                f"{self.out.parent} must lie where all {self.processes} processes see it"
            )
        self.store.join([predictions[item.id] for item in self.items])
        answers = [predictions[item.id]["answer"] for item in self.items]
        write_text(self.out, json.dumps(self.task.result(self.items, answers)) + "\n")
        self.task.export(self.items, answers, self.out)
        context = ScoringContext(
            self.data, self.split, self.out.parent, self.options.fid, self.options.similarity
        )
        scores = self.task.score(self.items, answers, context)
        column = column_of(self.mode, self.emu.cfg.family, self.options.examples, self.shots)
        result = Result(
            task=self.task.name,
            split=self.split,
            items=len(self.items),
            scores=dict(scores.values) if scores else None,
            notes=list(scores.notes) if scores else [self.task.unscored],
            metric=self.task.metric,
            column=column,
            paper=dict(self.task.paper),
            settings=self.settings,
            result=str(self.out),
        )
        values = json.dumps(dataclasses.asdict(result), indent=1)
        write_text(self.out.with_suffix(".scores.json"), values + "\n")
        per_item = scores.per_item if scores else None
        results_page.write(
            self.out.with_suffix(".html"),
            self.task,
            result,
            self.items,
            answers,
            per_item or {},
            self.out.parent,
        )
        for note in result.notes:
            log.info("%s: %s", self.task.name, note)
        return result


# --- Predictions ---------------------------------------------------------------------------------


class Store:
    """Predictions files next to the result file.

    Each has a line with the settings, then a JSON object per item.

    The first model's answers are in STEM.predictions.jsonl, those of model k in
    STEM.predictions.k.jsonl.

    Args:
        settings: the settings that the predictions depend on.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], replica: int) -> None:
        self._stem = out.with_suffix(".predictions")
        self._settings = json.loads(json.dumps(settings))
        self._replica = replica

    def path(self, replica: int = 0) -> Path:
        number = f".{replica}" if replica else ""
        return self._stem.with_name(f"{self._stem.name}{number}.jsonl")

    def _files(self) -> list[Path]:
        folder = self._stem.parent
        names = folder.iterdir() if folder.is_dir() else ()  # in a store it may not exist yet
        pattern = re.compile(re.escape(self._stem.name) + r"(\.\d+)?\.jsonl")
        return sorted(path for path in names if pattern.fullmatch(path.name))

    def read(self) -> dict[str, dict[str, Any]]:
        """Reads the files of all processes of this and earlier runs. Returns rows by item id.

        Raises:
            UserError: a file is damaged or was written with other settings.
        """
        rows: dict[str, dict[str, Any]] = {}
        for path in self._files():
            for number, line in enumerate(whole_lines(path), 1):
                try:
                    row = json.loads(line)
                    if number == 1:
                        self._check(path, dict(row["settings"]))
                    else:
                        rows[row["id"]] = {name: row[name] for name in _COLUMNS}
                except (ValueError, LookupError, TypeError):
                    which = "line" if number > 1 else "file"
                    raise UserError(
                        f"{path}, line {number} is damaged: delete the {which}"
                    ) from None
        return rows

    def _check(self, path: Path, stored: Mapping[str, Any]) -> None:
        for name, ours in self._settings.items():
            if stored.get(name) != ours and name == "weights":
                raise UserError(
                    f"{path} holds predictions of another model ({stored.get(name)}, now it is "
                    f"{ours}): delete it, or choose another --out"
                )
            if stored.get(name) != ours:
                raise UserError(
                    f"{path} holds predictions with {name.replace('_', ' ')} {stored.get(name)}, "
                    f"now it is {ours}: delete it, or choose another --out"
                )

    @contextlib.contextmanager
    def appending(self) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
        """Yields a function that appends rows to the model's file.

        It flushes them, so they survive if the process is killed. In an object store, those of the
        last `UPLOAD_SECONDS` may be lost.
        """
        path = self.path(self._replica)
        lines = whole_lines(path) if path.exists() else []
        if not is_remote(path) and path.exists():
            os.truncate(path, sum(map(len, lines)))  # drop a line cut short by a kill
        with contextlib.closing(open_log(path)) as log:
            synced = time.monotonic()

            def append(rows: list[dict[str, Any]]) -> None:
                nonlocal synced
                log.write("".join(json.dumps(row) + "\n" for row in rows))
                if is_remote(path) and time.monotonic() - synced > UPLOAD_SECONDS:
                    log.sync()
                    synced = time.monotonic()

            if not lines:
                append([{"settings": self._settings}])
            yield append

    def join(self, rows: Sequence[dict[str, Any]]) -> None:
        """Replaces all files by one with these rows."""
        lines = [{"settings": self._settings}, *rows]
        write_text(self.path(), "".join(json.dumps(line) + "\n" for line in lines))
        for path in self._files():
            for part in log_parts(path):
                if part != self.path():
                    part.unlink()


@contextlib.contextmanager
def _ignoring() -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Yields a function that takes rows and writes nothing."""
    yield lambda rows: None


def whole_lines(path: Path) -> list[bytes]:
    """Returns the complete lines of a file, dropping a truncated last one."""
    *lines, _ = read_log(path).split(b"\n")  # the last piece is empty or truncated
    return [line + b"\n" for line in lines]


# --- Details -------------------------------------------------------------------------------------


def barrier(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def column_of(mode: Mode, family: str, examples: Examples, shots: int) -> str:
    """Returns the column of the paper's table that a run is comparable to."""
    name = _PAPER_NAMES[family if mode == "pretrain" else mode]
    if examples == "text":
        return f"{name}*" if shots == SHOTS else f"{name}, {shots} text examples"
    if examples == "random":  # the paper's few-shot columns use RICES
        return f"{name}, {shots} random examples"
    return f"{name} {shots}-shot" if shots else name


def _length(item: Item) -> int:
    """Estimates the length of a prompt, to batch similar lengths together."""
    history = item.fields.get("history", ())
    return len(item.question) + sum(len(text) for pair in history for text in pair)


def _step(checkpoint: Path) -> int | None:
    """Returns the latest step of a run directory, or None for a release's files."""
    return latest_step(checkpoint) if (checkpoint / "config.json").is_file() else None
