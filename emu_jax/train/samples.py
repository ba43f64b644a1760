"""Generation from fixed held-out documents by a model in training.

    captions        the text that follows an image, chosen greedily
    images          the image that follows a text, from fixed seeds
    continuations   the texts and images that follow the first half of a document

A document is split in two: the prompt, and the reference, which the model should generate. If
weights are averaged (`ema_decay`), the average generates, as in `emu_jax.load`.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeAlias, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from emu_jax import checkpoint
from emu_jax.data.config import DataConfig
from emu_jax.data.documents import Document, Source, Text
from emu_jax.data.documents import Image as StoredImage
from emu_jax.data.images import open_image
from emu_jax.data.lengths import image_size
from emu_jax.data.mixture import chosen_sources, is_held_out
from emu_jax.data.packing import FRAME_PART, IMAGE_PART
from emu_jax.data.sources import open_source
from emu_jax.errors import UserError
from emu_jax.generate.api import Emu
from emu_jax.generate.prompt import EMU_CHAT, ChatFormat, chat_format, instruct
from emu_jax.generate.settings import GenerationConfig, MixedSettings
from emu_jax.models.emu import EmuModel
from emu_jax.progress import BRIEF_SECONDS, ProgressBar
from emu_jax.sharding import AbstractModel
from emu_jax.tokenizer import FRAME, IMAGE, USER, VIDEO, Tokenizer
from emu_jax.train.config import EvalConfig, TrainConfig
from emu_jax.train.evaluation import EvalResult, Evaluation, Stop
from emu_jax.train.sheets import MAX_ROWS, SheetPart, SheetRow, contact_sheet
from emu_jax.train.step import Trainer, TrainState

log = logging.getLogger(__name__)

SampleKind = Literal["captions", "images", "continuations"]
SAMPLE_KINDS: tuple[SampleKind, ...] = get_args(SampleKind)

_DocumentPart: TypeAlias = SheetPart | list[Image.Image]  # the latter is a video

DECODER_TOWERS = ("unet", "vae")
_SEED = 0  # of the choice of documents
TRIES = 8  # documents to try for each sample; some are damaged, too long or unsuitable


class TrainedEmu:
    """Turns training states into models that generate, on the mesh of the run.

    Args:
        purpose: what is generated, for error messages.
        paints: whether images are generated.
        batch_size: rows that are computed at once.

    Raises:
        UserError: the run's model lacks a tower that generation needs.
    """

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: Tokenizer,
        *,
        purpose: str,
        paints: bool,
        batch_size: int,
        defaults: GenerationConfig,
    ) -> None:
        cfg = trainer.cfg
        towers = set(map(checkpoint.tower_of, trainer.param_shapes))
        needed = cfg.model.language_towers + (DECODER_TOWERS if paints else ())
        if missing := [tower for tower in needed if tower not in towers]:
            raise UserError(
                f"a run with the objective {cfg.objective!r} cannot generate {purpose}, since its "
                f"model has no {' and no '.join(missing)}: remove this evaluation"
            )
        painter = towers.issuperset(DECODER_TOWERS)
        self._template = AbstractModel(
            lambda: EmuModel(cfg.model, painter=painter, rngs=nnx.Rngs(0)), trainer.mesh
        )
        self._tokenizer, self._mesh, self._dtype = tokenizer, trainer.mesh, jnp.dtype(cfg.dtype)
        self._batch_size, self._defaults = batch_size, defaults

    def __call__(self, state: TrainState) -> Emu:
        """Returns the model at a state, with averaged weights if there are any.

        Parameters that are stored in the compute dtype, as frozen ones are, are not copied. Drop
        the result before the next step, which donates the state.
        """
        params = {**state.trained, **state.frozen, **state.ema}
        module = self._template.module({path: params[path] for path in self._template.shapes})
        assert isinstance(module, EmuModel)
        return Emu(
            module,
            self._tokenizer,
            defaults=self._defaults,
            mesh=self._mesh,
            dtype=self._dtype,
            batch_size=self._batch_size,
        )


class SampleEvaluation(Evaluation):
    """Generates from fixed held-out documents: `captions`, `images` or `continuations`.

    Scores are means over the documents that have them: `exact_match` and `word_f1` of the texts;
    `image_share`, the fraction of references with an image for which the model generates one; and
    `image_similarity`, the cosine similarity of the first generated image to the first reference
    image in the model's own visual features.

    Attributes:
        documents: the same for every mesh, number of processes and restart.
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
        held_out, defaults = config.data(cfg.data), _generation(cfg, config)
        self._batch_size = rows_at_once(cfg, config)
        self._emu = TrainedEmu(
            trainer,
            tokenizer,
            purpose=config.kind,
            paints=config.kind == "images",
            batch_size=self._batch_size,
            defaults=defaults,
        )
        positions, n = cfg.model.llama.context_length, cfg.model.n_embeddings
        self.documents = choose_documents(
            _kind(config),
            held_out,
            tokenizer,
            config.batches * self._batch_size,
            n,
            min(held_out.row_tokens, positions - defaults.max_new_tokens - n - 1),
            system=defaults.system,
            style=chat_format(cfg.model, defaults.chat_format),
        )

    @classmethod
    def check(cls, cfg: TrainConfig, config: EvalConfig) -> None:
        """Checks the settings of generation, beside what every evaluation checks.

        Raises:
            UserError: a setting is invalid, or held-out files do not exist.
        """
        _generation(cfg, config)
        super().check(cfg, config)

    def run(self, state: TrainState, step: int, stop: Stop) -> EvalResult | None:
        """Generates from each document, scores the results and draws a contact sheet."""
        emu, rows = self._emu(state), []
        with ProgressBar(
            f"{self.config.name} at step {step}",
            len(self.documents),
            "document",
            enabled=jax.process_index() == 0,
            min_seconds=BRIEF_SECONDS,
        ) as bar:
            for first in range(0, len(self.documents), self._batch_size):
                batch = self.documents[first : first + self._batch_size]
                generated = self._generate(emu, [list(d.prompt) for d in batch], first)
                rows += [
                    SheetRow(_shown(document.prompt), tuple(parts), _shown(document.reference))
                    for document, parts in zip(batch, generated, strict=True)
                ]
                bar.add(len(batch))
                if stop():
                    return None
        kind = _kind(self.config)
        scores = text_scores(rows) if kind != "images" else {}
        if kind != "captions" and emu.paints:
            scores |= image_scores(emu, rows)
        return EvalResult(scores | {"documents": float(len(rows))}, sheet_of(self, step, rows))

    def _generate(
        self, emu: Emu, prompts: list[list[_DocumentPart]], first: int
    ) -> Sequence[Sequence[SheetPart]]:
        """Returns the continuation of each prompt. `first` is the number of the first."""
        if self.config.kind == "images":
            seeds = [emu.defaults.seed + first + n for n in range(len(prompts))]
            return [[image] for image in emu.generate_image(prompts, seed=seeds)]
        limit: MixedSettings = {"max_images": 0} if self.config.kind == "captions" else {}
        return emu.complete(prompts, **limit)


def sheet_of(evaluation: Evaluation, step: int, rows: Sequence[SheetRow]) -> Image.Image | None:
    """Returns the contact sheet of an evaluation, on the first process alone."""
    if jax.process_index() != 0:
        return None
    return contact_sheet(f"{evaluation.config.name}, step {step:,}", rows[:MAX_ROWS])


def rows_at_once(cfg: TrainConfig, config: EvalConfig) -> int:
    """Returns the batch size of an evaluation: by default, that training computes at once."""
    return config.batch_size or cfg.data.batch_size // cfg.accumulate


def _kind(config: EvalConfig) -> SampleKind:
    return next(kind for kind in SAMPLE_KINDS if kind == config.kind)


def _generation(cfg: TrainConfig, config: EvalConfig) -> GenerationConfig:
    """Returns the settings of an evaluation: greedy unless it says otherwise.

    Raises:
        UserError: a setting is unknown or invalid.
    """
    defaults = dataclasses.replace(GenerationConfig.of(cfg.model), num_beams=1)
    return defaults.replace(**config.generation)


def text_scores(rows: Sequence[SheetRow]) -> dict[str, float]:
    """Returns the fraction of texts with exactly the words of their reference, and the mean F1 of
    words as SQuAD computes it. Case and punctuation do not count."""
    pairs = [(_words(row.generated), _words(row.reference)) for row in rows]
    pairs = [(ours, reference) for ours, reference in pairs if reference]
    if not pairs:
        return {}
    return {
        "exact_match": float(np.mean([ours == reference for ours, reference in pairs])),
        "word_f1": float(np.mean([_f1(ours, reference) for ours, reference in pairs])),
    }


def image_scores(emu: Emu, rows: Sequence[SheetRow]) -> dict[str, float]:
    """Returns `image_share` and `image_similarity`; see `SampleEvaluation`."""
    pairs = [(_images(row.generated), _images(row.reference)) for row in rows]
    pairs = [(ours, reference) for ours, reference in pairs if reference]
    if not pairs:
        return {}
    image_share = float(np.mean([bool(ours) for ours, _ in pairs]))
    compared = [(ours[0], reference[0]) for ours, reference in pairs if ours]
    if not compared:
        return {"image_share": image_share}
    features = emu.embed([image for pair in compared for image in pair])
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    similarity = np.sum(features[0::2] * features[1::2], axis=-1)
    return {"image_share": image_share, "image_similarity": float(np.mean(similarity))}


def _words(parts: Sequence[SheetPart]) -> list[str]:
    return re.findall(r"\w+", " ".join(p for p in parts if isinstance(p, str)).lower())


def _f1(ours: Sequence[str], reference: Sequence[str]) -> float:
    common = sum((Counter(ours) & Counter(reference)).values())
    return 2 * common / (len(ours) + len(reference))


def _images(parts: Sequence[SheetPart]) -> list[Image.Image]:
    return [part for part in parts if isinstance(part, Image.Image)]


# --- Documents -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class HeldOutDocument:
    """The prompt and the reference of a document."""

    prompt: tuple[_DocumentPart, ...]
    reference: tuple[_DocumentPart, ...]


def choose_documents(
    kind: SampleKind,
    cfg: DataConfig,
    tokenizer: Tokenizer,
    count: int,
    n_causal: int,
    room: int,
    *,
    system: str | None = None,
    style: ChatFormat = EMU_CHAT,
) -> list[HeldOutDocument]:
    """Chooses documents of all sources alike, at random but always the same.

    Captions and images come from sources of pairs if there are any, continuations from the
    other sources.

    Args:
        n_causal: embeddings of an image.
        room: the largest number of tokens of a prompt.
        system: the system message of an instruction-tuned model.
        style: the format of its dialogues.

    Raises:
        UserError: a source cannot be read, or no document fits.
    """
    sources = [open_source(source, cfg.cache) for source in chosen_sources(cfg, pairs=False)]
    wants_pairs = kind != "continuations"
    sources = [source for source in sources if source.paired == wants_pairs] or sources

    def fitting(number: int, source: Source) -> Iterator[HeldOutDocument]:
        rng = np.random.default_rng((_SEED, number))
        tries = min(math.ceil(TRIES * count / (cfg.holdout or 1)), len(source))
        for index in rng.choice(len(source), size=tries, replace=False).tolist():
            if cfg.holdout and not is_held_out(index, cfg.holdout):
                continue
            try:
                document = split_document(
                    kind, source[index], paired=source.paired, videos=cfg.n_frame > 0
                )
                if not document:
                    continue
                prompt = _spelled(document.prompt, tokenizer, system, style)
                if _tokens(prompt, tokenizer, n_causal, cfg.n_frame) <= room:
                    yield document
            except UserError:  # damaged, or a text that no prompt can hold
                continue

    streams = [fitting(number, source) for number, source in enumerate(sources)]
    merged = (d for group in itertools.zip_longest(*streams) for d in group if d is not None)
    chosen = list(itertools.islice(merged, count))
    if not chosen:
        raise UserError(
            f"no held-out document has a prompt and a reference for {kind} within {room} tokens: "
            "choose other data for this evaluation"
        )
    if len(chosen) < count:
        log.warning(
            "%s: %d held-out documents instead of %d; others are damaged, too long, or lack a "
            "prompt or a reference",
            kind,
            len(chosen),
            count,
        )
    return chosen


def split_document(
    kind: SampleKind, document: Document, *, paired: bool, videos: bool = False
) -> HeldOutDocument | None:
    """Splits a document into a prompt and its reference. Returns None if it does not suit.

    What is scored follows its instruction. Without instructions, a caption follows an image, an
    image follows a text, and continuations follow the first half.

    Args:
        paired: whether the document is images with a caption, in no inherent order.
        videos: whether the frames of a video are a part of their own, rather than still images.

    Raises:
        ImageError: an image cannot be read.
    """
    parts = [p for p in document.parts if isinstance(p, StoredImage) or p.text.strip()]
    if paired and kind != "continuations":
        parts.sort(key=lambda part: isinstance(part, Text) == (kind == "captions"))
    shown = [isinstance(part, StoredImage) for part in parts]
    scored = [part.scored for part in parts]
    wants_image = kind == "images"
    if not all(scored):
        cut = scored.index(True) if any(scored) else 0
    elif kind == "continuations":
        cut = len(parts) // 2
    else:
        turns = (shown[n] == wants_image != shown[n - 1] for n in range(1, len(parts)))
        cut = next((n for n, turn in enumerate(turns, 1) if turn), 0)
    if cut == 0 or (kind == "captions" and not any(shown[:cut])):
        return None
    end = len(parts)
    if kind != "continuations":  # one caption, or one image
        alike = itertools.takewhile(lambda n: shown[n] == wants_image, range(cut, len(parts)))
        end = cut + (1 if wants_image and shown[cut] else sum(1 for _ in alike))
    if cut == end:
        return None
    return HeldOutDocument(*(_opened(half, videos) for half in (parts[:cut], parts[cut:end])))


def _opened(parts: Sequence[Text | StoredImage], videos: bool) -> tuple[_DocumentPart, ...]:
    """Returns texts, and decodes images.

    Raises:
        ImageError: an image cannot be read.
    """
    opened: list[_DocumentPart] = []
    document = Document(tuple(parts))
    for n, part in enumerate(parts):
        if isinstance(part, Text):
            opened.append(part.text.strip())
            continue
        image = open_image(part.data).convert("RGB")
        size = image_size(document, n) if videos else IMAGE_PART
        if size == FRAME_PART and isinstance(video := opened[-1], list):
            video.append(image)
        else:
            opened.append(image if size == IMAGE_PART else [image])
    return tuple(opened)


def _shown(parts: Sequence[_DocumentPart]) -> tuple[SheetPart, ...]:
    """Returns parts with the frames of videos as images."""
    return tuple(shown for part in parts for shown in (part if isinstance(part, list) else [part]))


def _spelled(
    prompt: Sequence[_DocumentPart], tokenizer: Tokenizer, system: str | None, style: ChatFormat
) -> Sequence[_DocumentPart]:
    """Returns a prompt as `Emu` spells it."""
    if tokenizer.instruct and not any(isinstance(p, str) and USER in p for p in prompt):
        return cast(Sequence[_DocumentPart], instruct(prompt, system, style=style))
    return prompt


def _tokens(
    prompt: Sequence[_DocumentPart], tokenizer: Tokenizer, n_causal: int, n_frame: int
) -> int:
    """Returns the number of tokens of a prompt.

    Raises:
        UserError: a text spells a placeholder of an image, or is not valid Unicode.
    """
    placeholders = (IMAGE,) if tokenizer.frame is None else (IMAGE, FRAME)
    for token in placeholders:
        if any(token in part for part in prompt if isinstance(part, str)):
            raise UserError(f"a text must not spell {token}")
    image, frame = tokenizer.image_placeholder(n_causal), tokenizer.frame_placeholder(n_frame)

    def spelled(part: _DocumentPart) -> str:
        if isinstance(part, list):
            return VIDEO + frame * len(part)
        return part if isinstance(part, str) else image

    return len(tokenizer.encode_parts(map(spelled, prompt)))
