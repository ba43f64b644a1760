"""The demo: trains a small Emu on handwritten digits from scratch and evaluates it."""

from __future__ import annotations

import base64
import dataclasses
import json
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from sklearn.svm import SVC

from emu_jax.config import save_json
from emu_jax.data import digits
from emu_jax.data.documents import DocumentFiles, Text
from emu_jax.data.images import open_image, resize
from emu_jax.demo.report import write_demo_report
from emu_jax.errors import UserError
from emu_jax.generate.api import Emu, load
from emu_jax.generate.settings import GenerationConfig
from emu_jax.storage import shipped, write_text
from emu_jax.train.config import TrainConfig
from emu_jax.train.config_file import load_config
from emu_jax.train.loop import train
from emu_jax.train.telemetry.metrics import read_evaluations, read_metrics

# By family, in training order. The last stage uses the demo's directory as its run directory.
STAGES = {
    "emu": ("digits_clip", "digits_vae", "digits", "digits_decoder"),
    "emu2": ("digits2_1a", "digits2_1b", "digits_vae", "digits2", "digits2_painter"),
}
MAIN_STAGE = {"emu": "digits", "emu2": "digits2"}  # trains the language model on all documents
DRAWINGS = 20  # of each digit
SEQUENCES = 200  # counting sequences to continue
SHOWN = 12  # sequences shown in the report
SHOWN_AUTOENCODED = 40  # images shown with their reconstructions
# Chosen with --validation.
GENERATION = {
    "emu": GenerationConfig(
        guidance_scale=6.0,
        num_inference_steps=20,
        scheduler="ddim",
        max_new_tokens=8,
        num_beams=1,
        system="",
    ),
    "emu2": GenerationConfig(
        guidance_scale=6.0,
        num_inference_steps=20,
        scheduler="euler",
        max_new_tokens=8,
        num_beams=1,
        system="",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoReport:
    """The result of a demo: the content of `metrics.json`.

    Attributes:
        caption_accuracy: share of images whose caption names their digit.
        drawn_accuracy: share of generated images in which the judge recognizes the digit.
        autoencoded_accuracy: the same of images painted from features; None if the decoder does
            not autoencode.
        continuation_accuracy: share of sequences that continue with an image of the next digit.
        judge_accuracy: of the judge, on real images.
        scored_on: the split.
        text_loss_first_last, regression_loss_first_last, embedding_variance_first_last,
            embedding_rank_first_last: values at the first and the last logged step.
        seconds: time of all calls that worked on the demo.
        report: path of report.html.
    """

    caption_accuracy: float
    drawn_accuracy: float
    autoencoded_accuracy: float | None
    continuation_accuracy: float
    judge_accuracy: float
    seed: int
    scored_on: str
    text_loss_first_last: list[float]
    regression_loss_first_last: list[float]
    embedding_variance_first_last: list[float]
    embedding_rank_first_last: list[float]
    seconds: float
    report: str

    def to_json(self) -> dict[str, Any]:
        """Returns the keys of `metrics.json`. Leaves out what is None."""
        return {name: value for name, value in vars(self).items() if value is not None}


def run_demo(
    workdir: Path, seed: int = 0, validation: bool = False, family: str = "emu"
) -> DemoReport:
    """Trains the stages of a family and scores the result. Resumes an earlier call's work.

    Writes `report.html` and `metrics.json` into `workdir`, which is then a run directory for
    `emu_jax.load`.

    Args:
        validation: train on a part of the training split and score on the rest of it, as was done
            to choose all settings here. By default, train on the whole training split and score
            on the held-out digits.
        family: "emu" or "emu2".

    Raises:
        UserError: `workdir` holds a demo with another seed, split or family.
    """
    fit, scored = ("fit", "validation") if validation else ("train", "heldout")
    *parents, last = STAGES[family]
    directories = {name: workdir / "parents" / name for name in parents} | {last: workdir}
    settings = {"seed": seed, "fit": fit} | ({} if family == "emu" else {"family": family})
    with _Clock(workdir, settings) as clock:
        for name, directory in directories.items():
            train(_stage(name, workdir, fit, seed, last=name == last), directory)
            clock.save()
        save_json(GENERATION[family], workdir / "generation.json")
        examples = _examples(workdir / "data", scored)
        write_text(workdir / "examples.json", json.dumps(examples, indent=1))

        emu = load(workdir, batch_size=100)
        judge = Judge(fit, emu.image_size)
        captions, caption_accuracy = _caption(emu, scored)
        drawings, drawn_accuracy = _draw(emu, judge, seed)
        autoencodings, autoencoded_accuracy = [], None
        if emu.cfg.autoencodes:
            autoencodings, autoencoded_accuracy = _autoencode(emu, judge, scored, seed)
        continuations, continuation_accuracy = _continue(emu, judge, workdir / "data", scored)
        report = DemoReport(
            caption_accuracy=caption_accuracy,
            drawn_accuracy=drawn_accuracy,
            autoencoded_accuracy=autoencoded_accuracy,
            continuation_accuracy=continuation_accuracy,
            judge_accuracy=judge.accuracy(scored),
            seed=seed,
            scored_on=scored,
            **_training_figures(directories[MAIN_STAGE[family]], MAIN_STAGE[family]),
            seconds=round(clock.seconds(), 1),
            report=str(workdir / "report.html"),
        )
        write_demo_report(
            workdir / "report.html",
            title=f"{family.capitalize()} on handwritten digits",
            figures={k: v for k, v in report.to_json().items() if k != "report"},
            curves={name: read_metrics(path)[name] for name, path in directories.items()},
            held_out={name: read_evaluations(path, name) for name, path in directories.items()},
            captions=captions,
            drawings=drawings,
            autoencodings=autoencodings,
            continuations=continuations,
            config={n: json.loads((d / "train.json").read_text()) for n, d in directories.items()},
            versions=_versions(),
        )
        _write_json(workdir / "metrics.json", report.to_json())
    return report


class _Clock:
    """Total time of a demo in seconds, over all calls that worked on it.

    The time that a killed call spent on its last stage is lost.

    Raises:
        UserError: `workdir` holds a demo with other settings.
    """

    def __init__(self, workdir: Path, settings: dict[str, Any]) -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        self.path, self.settings, self.spent = workdir / "demo.json", settings, 0.0
        if self.path.is_file():
            try:
                stored = json.loads(self.path.read_text())
                self.spent = float(stored.pop("seconds"))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{self.path} is damaged ({error}): remove {workdir}") from None
            if stored != settings:
                raise UserError(
                    f"{workdir} holds a demo with {stored}, not {settings}: "
                    "give another --workdir, or remove it"
                )

    def __enter__(self) -> _Clock:
        self.started = time.monotonic()
        _write_json(self.path, self.settings | {"seconds": self.spent})
        return self

    def __exit__(self, *_: object) -> None:
        self.save()

    def save(self) -> None:
        _write_json(self.path, self.settings | {"seconds": self.seconds()})

    def seconds(self) -> float:
        return self.spent + time.monotonic() - self.started


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=1) + "\n")


def _stage(name: str, workdir: Path, split: str, seed: int, *, last: bool) -> TrainConfig:
    """Loads the config of a stage and sets the seed, the data split and the paths."""
    cfg = load_config(TrainConfig, shipped("configs") / f"{name}.py", [])
    data = dataclasses.replace(cfg.data, root=str(workdir / "data"), split=split, seed=seed)
    parents = cfg.parents
    if last:  # its directory is one level above its parents'
        parents = {tower: f"parents/{Path(path).name}" for tower, path in parents.items()}
    return dataclasses.replace(cfg, seed=seed, data=data, parents=parents)


class Judge:
    """Recognizes the digit in an image, by a support vector machine on 8x8 pixels.

    It is trained on the training split only, and never on generated images.
    """

    def __init__(self, split: str, size: int) -> None:
        self.size = size
        images, labels = digits.digit_images(split)
        self.machine = SVC(C=10).fit(self._features(self._shown(images)), labels)

    def __call__(self, images: UInt8[np.ndarray, "B Hh Ww 3"]) -> Int[np.ndarray, "B"]:
        return self.machine.predict(self._features(images))

    def accuracy(self, split: str) -> float:
        images, labels = digits.digit_images(split)
        return _mean(self(self._shown(images)) == labels)

    def _shown(self, images: UInt8[np.ndarray, "B 8 8"]) -> UInt8[np.ndarray, "B Hh Ww 3"]:
        """Resizes digits to the size of generated images."""
        return np.stack([np.asarray(resize(_rgb(p), self.size)) for p in images])

    @staticmethod
    def _features(images: UInt8[np.ndarray, "B Hh Ww 3"]) -> Float[np.ndarray, "B 64"]:
        grey = [Image.fromarray(p).convert("L") for p in images]
        small = [np.asarray(p.resize((8, 8), Image.Resampling.BOX)) for p in grey]
        return np.stack(small).reshape(len(images), -1) / 255


def _caption(emu: Emu, split: str) -> tuple[list[tuple[Image.Image, str, bool]], float]:
    """Captions each image of the split.

    Returns (image, caption, correct) for each, and the accuracy.
    """
    images, labels = digits.digit_images(split)
    inputs = [_rgb(p) for p in images]
    captions = [" ".join(map(str, c)) for c in emu.complete([[p] for p in inputs], max_images=0)]
    right = [digits.parse_digit(s) == label for s, label in zip(captions, labels, strict=True)]
    return list(zip(inputs, captions, right, strict=True)), _mean(right)


def _draw(
    emu: Emu, judge: Judge, seed: int
) -> tuple[UInt8[np.ndarray, "10 images Hh Ww 3"], float]:
    """Generates images from words. Returns a 10x10 grid and the judge's accuracy on all."""
    labels = np.repeat(np.arange(10), DRAWINGS)
    generated = emu.generate_image([[digits.caption(int(d), 0)] for d in labels], seed=seed)
    images = np.stack([np.asarray(image) for image in generated])
    grid = images.reshape(10, DRAWINGS, *images.shape[1:])[:, :10]
    return grid, _mean(judge(images) == labels)


def _examples(data: Path, split: str) -> dict[str, Any]:
    """Returns prompts for the page of `emu-jax serve`, a list for each of its tabs."""
    images, _ = digits.digit_images(split)
    story = DocumentFiles([data / split / "storyboards.array_record"])[0].parts[:-2]
    parts = [{"text": p.text} if isinstance(p, Text) else _image_part(p.data) for p in story]
    return {
        "chat": [{"parts": [_image_part(digits.encode_png(images[n]))]} for n in range(3)],
        "draw": [{"parts": [{"text": f"the digit {word}"}]} for word in ("seven", "three")],
        "continue": [{"parts": parts, "settings": {"max_images": 1}}],
    }


def _image_part(content: bytes) -> dict[str, str]:
    return {"picture": base64.b64encode(content).decode(), "type": "image/png"}


def _autoencode(
    emu: Emu, judge: Judge, split: str, seed: int
) -> tuple[list[tuple[Image.Image, Image.Image, bool]], float]:
    """Paints images of the split from their own features.

    Returns (image, painted image, correct) for those to show, and the fraction of all in which the
    judge recognizes the digit.
    """
    images, labels = digits.digit_images(split)
    images, labels = images[: 10 * DRAWINGS], labels[: 10 * DRAWINGS]
    inputs = [_rgb(p) for p in images]
    painted = emu.generate_image([[p] for p in inputs], seed=seed)
    right = judge(np.stack([np.asarray(image) for image in painted])) == labels
    cards = list(zip(inputs, painted, map(bool, right), strict=True))
    return cards[:SHOWN_AUTOENCODED], _mean(right)


def _continue(emu: Emu, judge: Judge, data: Path, split: str) -> tuple[list[Any], float]:
    """Continues counting sequences of the split, given three frames with subtitles.

    A continuation is correct if it is an image of the next digit. Returns the sequences to show
    and the accuracy.
    """
    documents = DocumentFiles([data / split / "storyboards.array_record"])
    prompts, frames, answers = [], [], []
    for document in (documents[i] for i in range(SEQUENCES)):
        parts = [
            p.text if isinstance(p, Text) else open_image(p.data).convert("RGB")
            for p in document.parts
        ]
        *given, _, answer = parts  # drops the last frame; its word is the answer
        prompts.append(given)
        frames.append([p for p in given if isinstance(p, Image.Image)])
        answers.append(digits.parse_digit(str(answer)))
    following = emu.complete(prompts, max_images=1)
    generated = {
        i: np.asarray(p)
        for i, parts in enumerate(following)
        for p in parts
        if not isinstance(p, str)
    }
    read = (
        dict(zip(generated, judge(np.stack(list(generated.values()))), strict=True))
        if generated
        else {}
    )
    right = [read.get(i) == answer for i, answer in enumerate(answers)]
    blank = np.zeros(
        (emu.image_size, emu.image_size, 3), np.uint8
    )  # shown if no image was generated
    cards = [
        (frames[i], generated.get(i, blank), right[i], f"{digits.WORDS[answers[i]]} comes next")
        for i in range(SHOWN)
    ]
    return cards, _mean(right)


def _training_figures(directory: Path, stage: str) -> dict[str, list[float]]:
    """Returns the first and last values of losses and of measures of embedding collapse."""
    rows = read_metrics(directory)[stage]
    names = ("text_loss", "regression_loss", "embedding_variance", "embedding_rank")
    return {f"{n}_first_last": [round(rows[0][n], 4), round(rows[-1][n], 4)] for n in names}


def _rgb(pixels: UInt8[np.ndarray, "h w"]) -> Image.Image:
    return Image.fromarray(pixels).convert("RGB")


def _mean(right: Sequence[bool] | Bool[np.ndarray, "_"]) -> float:
    return round(float(np.mean(right)), 4)


def _versions() -> dict[str, str]:
    names = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scikit-learn")
    return {"python": platform.python_version()} | {name: version(name) for name in names}
