"""`emu-jax verify`: compares a checkpoint with tensors recorded from the released code.

A golden directory holds `expected.npz` and `meta.json`; `tools/record_golden.py` writes one in a
clone of the release. Each tensor gets a row with the relative error max |a - b| / max |b|; ids must
be equal. Everything is computed in float32. A recording is of one family, Emu1 or Emu2.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int, UInt8

from emu_jax import diffusion
from emu_jax.checkpoint import refuse_quantized, run_shapes
from emu_jax.convert.source import is_release
from emu_jax.data.images import load_image
from emu_jax.data.sources.video import frame_indices
from emu_jax.errors import UserError
from emu_jax.generate import api, image
from emu_jax.generate.batching import Shapes
from emu_jax.generate.prompt import Normalized, Prompt, box_image, chat_format, converse, pad
from emu_jax.generate.settings import TextConfig, bucket
from emu_jax.models.connectors import layer_of
from emu_jax.models.emu import EmuModel
from emu_jax.models.eva_clip import normalize_images
from emu_jax.models.layers import LayerNorm

# Tolerances relative to the largest magnitude of a tensor. Feedback through a sampler or through
# regressed embeddings amplifies rounding; so do adapters stored in bfloat16.
TIGHT, FEEDBACK = 2e-5, 1e-4
_FEEDBACK = re.compile(r"gen_image/.*|sample/.*|unet/cond|instruct/logits")
_SIGMAS = 1e-6  # tolerance of a sampler's noise levels
# An image, or a video, in a text that Emu2's code reads.
_PLACEHOLDERS = re.compile(r"(\[<IMG_PLH>\]|\[VIDEO\](?:\[<VID_PLH>\])+)")
_STILL, _FRAME = "[<IMG_PLH>]", "[<VID_PLH>]"
# Settings of Emu2's `generate` that are no settings of decoding, and those of another name.
_NOT_DECODING = ("placeholder", "_token_id", "synced_gpus", "skip_special_tokens", "penalty_alpha")
_RENAMED = {"min_len": "min_length"}
# Sizes that hold most recorded prompts and answers of Emu2.
_IMAGES, _NEW_TOKENS = 8, 24


@dataclasses.dataclass(frozen=True)
class TensorVerdict:
    """The verdict on one tensor.

    Attributes:
        error: relative error; None for tensors that must be equal, for inputs and if not
            applicable. Not finite if the checkpoint computes NaN or infinity.
        verdict: ok, FAILED, input (given by the recording, so there is nothing to compare) or
            not applicable.
    """

    key: str
    verdict: str
    error: float | None = None
    tolerance: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class WorstTensor:
    """The tensor with the largest error in units of its tolerance.

    Attributes:
        error: relative error, or None if it is not finite.
    """

    key: str
    error: float | None
    tolerance: float | None


@dataclasses.dataclass(frozen=True)
class Verification:
    """The JSON object that the command prints.

    Attributes:
        family: the model's family, "emu" or "emu2".
        passed: whether some tensors were checked and none failed.
        checked: number of tensors that apply to the checkpoint.
        failed: keys of the tensors that failed.
        worst: the tensor with the largest error; None if no tensor has an error.
        not_applicable: keys of the tensors that do not apply to the checkpoint.
        not_applicable_groups: their number by the first part of their keys.
    """

    family: str
    passed: bool
    checked: int
    failed: list[str]
    worst: WorstTensor | None
    not_applicable: list[str]
    not_applicable_groups: dict[str, int]


class Difference(Exception):
    """Raised when a tensor cannot equal the recorded one; the message says why."""


def verify(checkpoint: Path, golden: Path) -> tuple[str, list[TensorVerdict]]:
    """Compares a checkpoint with a recording.

    Returns:
        The model's family, and a row for every tensor of `golden/expected.npz`.

    Raises:
        UserError: a directory cannot be read, they are for different models, or the checkpoint is
            quantized.
    """
    expected, meta = _open(golden)
    recordings = (name for name, kind in _RECORDINGS.items() if kind.only_here in expected)
    family = next(recordings, "emu")
    emu = _RECORDINGS[family].load(checkpoint, expected)
    if not is_release(checkpoint):
        refuse_quantized(checkpoint, run_shapes(checkpoint))
    if family != emu.cfg.family:
        raise UserError(
            f"{golden} was recorded from a model of the family {family}, {checkpoint} is of "
            f"{emu.cfg.family}: name a recording of its family"
        )
    with jax.default_matmul_precision("highest"):
        recording = _RECORDINGS[family](emu, expected, meta, golden)
        return family, [recording.row(key) for key in expected]


def tensor_error(emu: api.Emu, golden: Path, key: str) -> float:
    """Returns the relative error of a recorded tensor as a loaded model computes it, in whatever
    type its weights are.

    Raises:
        UserError: the recording cannot be read, or the model cannot compute the tensor.
    """
    expected, meta = _open(golden)
    with jax.default_matmul_precision("highest"):
        row = _RECORDINGS[emu.cfg.family](emu, expected, meta, golden).row(key)
    if row.error is None:
        raise UserError(f"{key} has no error ({golden}): {row.verdict} {row.note}")
    return row.error


def _prompt_length(expected: dict[str, np.ndarray]) -> int:
    """Returns the number of positions that hold the longest recorded prompt."""
    return bucket(max((a.shape[-1] for k, a in expected.items() if k.endswith("/ids")), default=1))


def verdict_summary(family: str, rows: list[TensorVerdict]) -> Verification:
    """Summarizes the verdicts."""
    checked = [r for r in rows if r.verdict != "not applicable"]
    errors = [r for r in checked if r.error is not None]
    worst = max(errors, key=_badness, default=None)
    error = (
        worst.error if worst and worst.error is not None and _badness(worst) < math.inf else None
    )
    failed = [r.key for r in rows if r.verdict == "FAILED"]
    not_applicable = [r.key for r in rows if r.verdict == "not applicable"]
    return Verification(
        family=family,
        passed=bool(checked) and not failed,
        checked=len(checked),
        failed=failed,
        worst=worst and WorstTensor(worst.key, error, worst.tolerance),
        not_applicable=not_applicable,
        not_applicable_groups=dict(collections.Counter(k.split("/")[0] for k in not_applicable)),
    )


def _badness(row: TensorVerdict) -> float:
    """Returns the error in units of the tolerance; infinite if it is not finite."""
    error = (row.error or 0.0) / (row.tolerance or 1.0)
    return error if math.isfinite(error) else math.inf


def verdict_table(rows: list[TensorVerdict]) -> str:
    """Formats the rows as text."""
    width = max(len(r.key) for r in rows)
    lines = []
    for r in rows:
        error = "" if r.error is None else f"{r.error:.1e} of {r.tolerance:.0e}"
        lines.append(f"{r.key:{width}}  {error:17}  {r.verdict}{r.note and ': ' + r.note}")
    return "\n".join(lines)


def _open(golden: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    for name in ("expected.npz", "meta.json"):
        if not (golden / name).is_file():
            raise UserError(f"{golden} is not a golden folder: it lacks {name}")
    try:
        with np.load(golden / "expected.npz") as stored:
            expected = {key: stored[key] for key in stored}
        meta = json.loads((golden / "meta.json").read_text())
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read {golden}: {error}") from None
    if not isinstance(meta, dict):
        raise UserError(f"{golden}: meta.json must hold an object, not {type(meta).__name__}")
    return expected, meta


def _relative(ours: np.ndarray, expected: np.ndarray) -> float:
    difference = np.abs(ours.astype(np.float64) - expected).max(initial=0.0)
    return float(difference / max(np.abs(expected).max(initial=0.0), np.finfo(np.float32).tiny))


class _Recording:
    """Recomputes the recorded tensors of Emu1.

    `methods` maps the name of a tensor to a method. Tensors of one computation share its result.
    `only_here` is a tensor that recordings of no other family have.
    """

    only_here: ClassVar[str] = "cformer/out"
    methods: ClassVar[dict[str, Callable[..., Any]]]

    @classmethod
    def load(cls, checkpoint: Path, expected: dict[str, np.ndarray]) -> api.Emu:
        """Loads a checkpoint, ready for the recording's prompts."""
        return api.load(checkpoint)

    def __init__(
        self, emu: api.Emu, expected: dict[str, np.ndarray], meta: dict, golden: Path
    ) -> None:
        self.emu, self.expected, self.meta, self.golden = emu, expected, meta, golden
        self.model, self.cfg, self.tokenizer = emu.model, emu.cfg, emu.tokenizer
        size = self.cfg.vision.image_size
        pixels = expected.get("vit/pixels_nchw", np.zeros((0, 3, size, size), np.float32))
        if pixels.shape[1:] != (3, size, size):
            raise UserError(
                f"{golden} was recorded for images of {list(pixels.shape[1:])}, the checkpoint "
                f"reads {[3, size, size]}: they are of different models"
            )
        self.pixels = np.moveaxis(pixels, 1, -1)

    def row(self, key: str) -> TensorVerdict:
        if reason := self._excluded(key):
            return TensorVerdict(key, "not applicable", note=reason)
        for pattern, compute in self.methods.items():
            if match := re.fullmatch(pattern, key):
                try:
                    return self._judge(key, compute(self, *match.groups()))
                except Difference as difference:
                    return TensorVerdict(key, "FAILED", note=str(difference))
                except (LookupError, TypeError, ValueError, OSError, UserError) as error:
                    # The recording lacks an image, a prompt or a setting.
                    reason = str(error).strip().split("\n")[0]
                    note = f"cannot be computed: {type(error).__name__} {reason}"
                    return TensorVerdict(key, "FAILED", note=note)
        return TensorVerdict(key, "FAILED", note="unknown to this version of emu_jax")

    def _excluded(self, key: str) -> str:
        instruct = key.startswith("instruct/")
        if self.tokenizer.instruct and not instruct:
            return "of the pretrained model"
        if instruct and not self.tokenizer.instruct:
            return "of the instruction-tuned model"
        if key.startswith(("unet/", "vae/", "sample/")) and not self.emu.paints:
            return "this checkpoint has no image decoder"
        return ""

    def _judge(self, key: str, ours: Any) -> TensorVerdict:
        recorded = self.expected[key]
        if ours is None:
            return TensorVerdict(key, "input")
        ours = np.asarray(ours)
        if ours.shape != recorded.shape:
            note = f"shape {list(ours.shape)}, recorded {list(recorded.shape)}"
            return TensorVerdict(key, "FAILED", note=note)
        if not np.issubdtype(recorded.dtype, np.floating):
            same = bool(np.array_equal(ours, recorded))
            return TensorVerdict(key, "ok" if same else "FAILED", note="" if same else "not equal")
        error = _relative(ours, recorded)
        tolerance = FEEDBACK if _FEEDBACK.fullmatch(key) else TIGHT
        return TensorVerdict(key, "ok" if error <= tolerance else "FAILED", error, tolerance)

    # --- Computations ---

    @functools.cached_property
    def features(self) -> tuple[Float[Array, "I P D"], Float[Array, "I P D"]]:
        features = _features(self.model, self.pixels)
        return features, layer_of(self.model, "ln_visual", LayerNorm)(features)

    @functools.cached_property
    def embeddings(self) -> Float[Array, "I N E"]:
        return _embeddings(self.model, self.pixels)

    def prompt_parts(self, text: str, start: int = 0) -> list[Any]:
        """Splits a recorded prompt, with image placeholders written out, into parts."""
        placeholder = self.tokenizer.image_placeholder(self.cfg.n_embeddings)
        first, *rest = text.split(placeholder)
        parts: list[Any] = [first] if first else []
        for i, piece in enumerate(rest):
            parts += [Normalized(self.pixels[start + i]), *([piece] if piece else [])]
        return parts

    @functools.cached_property
    def prompts(self) -> list[list[Any]]:
        prompts, start = [], 0
        for text in self.meta["prompts"]:
            prompts.append(self.prompt_parts(text, start))
            start += sum(not isinstance(p, str) for p in prompts[-1])
        return prompts

    def encoded(self, texts: list[str]) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
        """Returns ids of right-padded texts, and the mask of real tokens."""
        rows = [self.tokenizer.encode(text) for text in texts]
        ids = np.full((len(rows), max(map(len, rows))), self.cfg.tokens.pad, np.int64)
        mask = np.zeros(ids.shape, np.int64)
        for n, row in enumerate(rows):
            ids[n, : len(row)], mask[n, : len(row)] = row, 1
        return ids, mask

    def run(self, ids: Int[np.ndarray, "B T"], mask: Int[np.ndarray, "B T"]) -> dict[str, Array]:
        """Returns embeddings, hidden states, logits and regressions of right-padded rows.

        The images of the rows are the recorded ones, in order.
        """
        flat = np.flatnonzero(ids.reshape(-1) == self.cfg.tokens.image)
        held = len(self.pixels) * self.cfg.n_embeddings
        if len(flat) > held:
            raise Difference(f"{len(flat)} <image> tokens, but {held} embeddings of images")
        embedding_index = np.full(ids.size, -1, np.int32)
        embedding_index[flat] = np.arange(len(flat))
        embedding_index = embedding_index.reshape(ids.shape)
        images = jnp.broadcast_to(self.embeddings, (len(ids), *self.embeddings.shape))
        targets, hidden, logits, predicted, regressed = _language(
            self.model,
            jnp.asarray(ids, jnp.int32),
            images,
            jnp.asarray(embedding_index),
            jnp.asarray(mask, bool),
            jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape),
        )
        return {
            "targets": targets,
            "hidden": hidden,
            "logits": logits,
            "predicted": predicted,
            "regressed": regressed,
        }

    @functools.cached_property
    def trained(self) -> dict[str, Any]:
        ids, mask = self.encoded(self.meta["prompts"])
        out = self.run(ids, mask)
        t = self.cfg.tokens
        scored = ~np.isin(ids[:, 1:], [t.pad, t.img, t.img_end, t.image])
        logp = np.asarray(jax.nn.log_softmax(out["logits"][:, :-1].astype(jnp.float32)))
        picked = np.take_along_axis(logp, ids[:, 1:, None], axis=-1)[..., 0]
        predict = np.asarray(out["regressed"])
        target = np.roll(predict, 1, axis=1)
        return {
            "ids": ids,
            "mask": mask,
            "logits": out["logits"],
            "hidden": out["hidden"],
            "llm_loss": -picked[scored].mean(),
            "regress_pred": np.asarray(out["predicted"])[predict],
            "regress_target": np.asarray(out["targets"])[target],
        }

    def train(self, what: str) -> Any:
        return self.trained[what]

    def token_cases(self) -> Int[np.ndarray, "B T"]:
        self.check_token_cases("tokenizer_cases")
        return self.trained["ids"]

    def check_token_cases(self, name: str) -> None:
        """Checks the ids of recorded texts.

        Raises:
            Difference: they are others.
        """
        for case in self.meta.get(name, ()):
            if self.tokenizer.encode(case["text"]) != case["ids"]:
                raise Difference(f"not equal: the ids of {case['text']!r}")

    def generated(self, tag: str) -> Int[np.ndarray, "B T"]:
        recorded = self.meta["generate"][tag]
        length = {"max_new_tokens": self.meta.get("spec", {}).get("new_tokens")}
        settings = self.meta["generate_defaults"] | length | recorded["kw"]
        return self.answered(f"generate/{tag}/ids", self.prompts, settings, recorded.get("texts"))

    def answered(
        self,
        key: str,
        prompts: Sequence[Sequence[Any]],
        settings: dict[str, Any],
        texts: Sequence[str] | None,
    ) -> Int[np.ndarray, "B T"]:
        """Returns the ids generated with these settings, and checks the texts that equal ids
        read."""
        skip_special = settings.get("skip_special_tokens", True)
        settings = {
            _RENAMED.get(name, name): value
            for name, value in settings.items()
            if value is not None and not name.endswith(_NOT_DECODING)
        }
        known = {f.name for f in dataclasses.fields(TextConfig)}
        if unknown := set(settings) - known:
            raise UserError(f"{self.golden}: unknown generation settings {sorted(unknown)}")
        ids = self.emu.generate_ids(prompts, **settings)
        # The recording is as wide as its longest row, ours as wide as max_new_tokens.
        width = self.expected[key].shape[1]
        if (ids[:, width:] == self.cfg.tokens.pad).all():
            ids = ids[:, :width]
        if texts is not None and np.array_equal(ids, self.expected[key]):
            for row, text in zip(ids, texts, strict=True):
                if (read := self.tokenizer.decode(row, skip_special)) != text:
                    raise Difference(f"the ids are equal, but read {read!r}, recorded {text!r}")
        return ids

    def ranks(self) -> list[list[int]]:
        spec = self.meta["spec"]
        return [self.emu.rank([spec["text"][2], Normalized(self.pixels[0])], spec["candidates"])]

    @functools.cache  # noqa: B019 (one recording lives as long as its verification)
    def regressed(self, tag: str) -> Float[Array, "B N E"]:
        text = self.meta["spec"]["text"]
        pixels = [Normalized(image) for image in self.pixels]
        context = {
            "text_only": lambda: [text[0]],
            "in_context": lambda: [pixels[0], text[1], pixels[1], text[0]],
            "blend": lambda: [pixels[1], pixels[2]],
        }[tag]()
        return self.emu.regress([context, [""]])

    def condition(self, part: str) -> Float[Array, "B N E"]:
        """Returns the recomputed regression that equals the recorded condition of the decoder."""
        theirs = self.expected[f"{part}/cond"]
        for tag in ("text_only", "in_context", "blend"):
            recorded = self.expected.get(f"gen_image/{tag}", np.zeros(0))
            if recorded.shape == theirs.shape and _relative(recorded, theirs) <= FEEDBACK:
                return self.regressed(tag)
        raise Difference("repeats none of the recorded gen_image/*")

    def denoised(self) -> Float[np.ndarray, "B C h w"]:
        sample = np.moveaxis(self.expected["unet/sample"], 1, -1)
        t = np.broadcast_to(self.expected["unet/t"], len(sample))  # shared, or one per row
        cond = self.expected["unet/cond"]
        out = _denoise(self.model.unet, sample, jnp.asarray(t, jnp.int32), cond)
        return np.moveaxis(np.asarray(out), -1, 1)

    def autoencoded(self, what: str) -> Float[np.ndarray, "B C h w"]:
        if what == "decoded":
            out = _decode(self.model.vae, np.moveaxis(self.expected["vae/mean"], 1, -1))
        else:
            mean, logvar = _encode(self.model.vae, np.moveaxis(self.expected["vae/image"], 1, -1))
            out = mean if what == "mean" else logvar
        return np.moveaxis(np.asarray(out), -1, 1)

    def timesteps(self, steps: str, guidance: str) -> Int[np.ndarray, "steps"]:
        return np.asarray(diffusion.sampling_steps(self.cfg.scheduler, int(steps)).t)

    @functools.cache  # noqa: B019
    def latents(self, steps: str, guidance: str) -> Float[Array, "B h w C"]:
        start = jnp.asarray(np.moveaxis(self.expected["sample/init_latents"], 1, -1))
        # Conditional rows before unconditional ones; one pair for all latents, or one per latent.
        rows = jnp.asarray(self.expected["sample/cond"])
        if len(rows) not in (2, 2 * len(start)):
            raise Difference(f"{len(start)} latents, but sample/cond has {len(rows)} rows")
        cond, uncond = (
            jnp.broadcast_to(half, (len(start), *half.shape[1:])) for half in jnp.split(rows, 2)
        )
        guided = float(guidance) > 1
        return _sample(
            self.model,
            start,
            cond,
            uncond if guided else None,
            float(guidance) if guided else 1.0,
            int(steps),
            "pndm",
        )

    def sampled(self, steps: str, guidance: str) -> Float[np.ndarray, "B C h w"]:
        return np.moveaxis(np.asarray(self.latents(steps, guidance)), -1, 1)

    def painted(self, steps: str, guidance: str) -> Float[Array, "B Hh Ww 3"]:
        return _paint(self.model, self.latents(steps, guidance))

    def preprocessed(self, number: str, path: str) -> Float[np.ndarray, "3 side side"]:
        for video in self.meta.get("video_frame_indices", ()) if path == "process_img" else ():
            chosen = frame_indices(video["frames"], video["segments"]).tolist()
            if chosen != video["indices"]:
                raise Difference(f"not equal: frames {chosen} of a video, not {video['indices']}")
        file = self.golden / f"preprocess_{number}.png"
        pixels = normalize_images(jnp.asarray(load_image(file, self.cfg.vision.image_size)))
        return np.moveaxis(np.asarray(pixels), -1, 0)

    @functools.cached_property
    def instructed(self) -> dict[str, Any]:
        ids, mask = self.encoded([self.meta["instruct_prompt"]])
        return {"ids": ids, "logits": self.run(ids, mask)["logits"]}

    def instruct(self, what: str) -> Any:
        return self.instructed[what]

    def given(self, *_: str) -> None:
        """Returns None for a recorded input: there is nothing to compute."""
        return None


_Recording.methods = {
    r"vit/pixels_nchw|unet/(?:sample|t)|vae/image|sample/init_latents": _Recording.given,
    r"vit/features": lambda r: r.features[0],
    r"vit/ln_visual": lambda r: r.features[1],
    r"cformer/out": lambda r: r.embeddings,
    r"train/(ids|mask|logits|hidden|llm_loss|regress_pred|regress_target)": _Recording.train,
    r"tokenizer/cases_ids": _Recording.token_cases,
    r"generate/(.+)/ids": _Recording.generated,
    r"predict/ranks": _Recording.ranks,
    r"gen_image/(text_only|in_context|blend)": _Recording.regressed,
    r"(unet|sample)/cond": _Recording.condition,
    r"unet/out": _Recording.denoised,
    r"vae/(mean|logvar|decoded)": _Recording.autoencoded,
    r"sample/(\d+)_([\d.]+)/timesteps": _Recording.timesteps,
    r"sample/(\d+)_([\d.]+)/latents": _Recording.sampled,
    r"sample/(\d+)_([\d.]+)/image": _Recording.painted,
    r"preprocess/(\d+)/(process_img|pipeline)": _Recording.preprocessed,
    r"instruct/(ids|logits)": _Recording.instruct,
}


class _Emu2Recording(_Recording):
    """Recomputes the recorded tensors of Emu2, of the base model or of Emu2-Chat."""

    only_here = "encode/n_query"

    @classmethod
    def load(cls, checkpoint: Path, expected: dict[str, np.ndarray]) -> api.Emu:
        """Loads a checkpoint. The many prompts are computed one by one and at one size, because
        compiling a program takes longer than running it."""
        shapes = Shapes(_prompt_length(expected), _IMAGES, _NEW_TOKENS)
        return api.load(checkpoint, batch_size=1, shapes=shapes)

    @functools.cached_property
    def length(self) -> int:
        """Number of positions that hold every recorded prompt."""
        return _prompt_length(self.expected)

    def _excluded(self, key: str) -> str:
        group = key.split("/")[0]
        if group not in ("preprocess", "box"):
            of_chat = group in ("chat", "chat_hub")
            if self.tokenizer.instruct and not of_chat:
                return "of the base model"
            if of_chat and not self.tokenizer.instruct:
                return "of Emu2-Chat"
        if group in ("unet", "vae", "sample") and not self.emu.paints:
            return "this checkpoint has no image decoder"
        return ""

    def _judge(self, key: str, ours: Any) -> TensorVerdict:
        if key.endswith("/image_uint8") and ours is not None:
            away = int(np.abs(np.asarray(ours, int) - self.expected[key]).max(initial=0))
            note = "" if away <= 1 else f"bytes differ by {away}"
            return TensorVerdict(key, "FAILED" if note else "ok", note=note)
        verdict = super()._judge(key, ours)
        if not key.endswith("/sigmas") or verdict.error is None:
            return verdict
        passed = "ok" if verdict.error <= _SIGMAS else "FAILED"
        return dataclasses.replace(verdict, verdict=passed, tolerance=_SIGMAS)

    @functools.cache  # noqa: B019 (one recording lives as long as its verification)
    def recorded_image(self, number: int) -> Normalized:
        recorded = self.expected.get(f"preprocess/{number}/pipeline")
        if recorded is not None:
            return Normalized(np.moveaxis(recorded, 0, -1))
        return Normalized(np.moveaxis(self.preprocessed(str(number)), 0, -1))

    def preprocessed(self, number: str, path: str = "pipeline") -> Float[np.ndarray, "3 side side"]:
        file = self.golden / f"preprocess_{number}.png"
        pixels = normalize_images(jnp.asarray(load_image(file, self.cfg.vision.image_size)))
        return np.moveaxis(np.asarray(pixels), -1, 0)

    def parts(self, text: str, numbers: Sequence[int]) -> list[Any]:
        """Splits a text with the release's placeholders into parts, a video into one part."""
        parts, left = [], list(numbers)
        for piece in _PLACEHOLDERS.split(text):
            if piece == _STILL:
                parts.append(self.recorded_image(left.pop(0)))
            elif _PLACEHOLDERS.fullmatch(piece):
                parts.append([self.recorded_image(left.pop(0)) for _ in range(piece.count(_FRAME))])
            elif piece:
                parts.append(piece)
        if left:
            raise Difference(f"{len(left)} images more than placeholders")
        return parts

    @staticmethod
    def image_numbers(inputs: Any) -> list[int]:
        """Returns the numbers of the images in nested recorded inputs, in order."""
        if isinstance(inputs, str):
            # The recordings' word for an image is "picture".
            return [int(inputs.removeprefix("picture:"))] if inputs.startswith("picture:") else []
        return [number for part in inputs for number in _Emu2Recording.image_numbers(part)]

    def read(
        self, prompts: Sequence[Sequence[Any]], side: Literal["left", "right"] = "right"
    ) -> dict[str, Any]:
        """Runs the language model over padded prompts. States and logits of padding are zero."""
        rows = [Prompt.of(parts, self.tokenizer, self.cfg) for parts in prompts]
        longest = max(len(row.tokens) for row in rows)
        length = bucket(longest, self.length)
        batch = pad(
            rows,
            side,
            rows=len(rows),
            length=length,
            images=bucket(max(len(row.images) for row in rows), _IMAGES),
            fill=self.cfg.tokens.pad,
        )
        images = np.zeros((1, self.cfg.n_embeddings, self.cfg.embedding_width), np.float32)
        if len(batch.images):
            images = self.embed(batch.images, batch.frames)
        targets, hidden, logits, predicted, regressed = map(
            np.asarray,
            _language(
                self.model,
                batch.tokens,
                images[batch.image_index],
                batch.embedding_index,
                batch.valid,
                np.maximum(np.cumsum(batch.valid, axis=1) - 1, 0),
            ),
        )
        # The recording is as wide as its longest row.
        recorded = slice(longest) if side == "right" else slice(length - longest, None)
        valid = batch.valid[:, recorded]
        return {
            "ids": batch.tokens[:, recorded],
            "mask": valid.astype(np.int64),
            "hidden": hidden[:, recorded] * valid[..., None],
            "logits": logits[:, recorded] * valid[..., None],
            "targets": targets[:, recorded],
            "predicted": predicted[:, recorded],
            "regressed": regressed[:, recorded],
        }

    def embed(
        self, pixels: Float[np.ndarray, "I side side 3"], frames: Bool[np.ndarray, "I"]
    ) -> Float[np.ndarray, "I N E"]:
        """Returns the embeddings of images, which one program computes one by one. Zeros follow
        those of a frame."""
        rows = zip(pixels[:, None], frames[:, None], strict=True)
        return np.concatenate([_mixed_embeddings(self.model, *row) for row in rows])

    @functools.cached_property
    def prompts(self) -> list[list[Any]]:
        prompts, start = [], 0
        for text in self.meta["documents"]:
            count = text.count(_STILL)
            prompts.append(self.parts(text, range(start, start + count)))
            start += count
        return prompts

    @functools.cached_property
    def trained(self) -> dict[str, Any]:
        self.check_token_cases("tokenizer_cases")
        out, t = self.read(self.prompts), self.cfg.tokens
        ids = out["ids"]
        scored = ~np.isin(ids[:, 1:], [t.pad, t.img, t.img_end, t.image])
        logits = out["logits"][:, :-1]
        picked = np.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
        picked = picked - np.logaddexp.reduce(logits, axis=-1)
        predicted = out["predicted"][out["regressed"]]
        target = out["targets"][np.roll(out["regressed"], 1, axis=1)]
        return out | {
            "llm_loss": -picked[scored].mean(),
            "llm_targets": scored.sum(),
            "regress_pred": predicted,
            "regress_target": target,
            "regress_loss": np.square(predicted - target).mean(),
        }

    @functools.cached_property
    def padded_left(self) -> dict[str, Any]:
        return self.read(self.prompts, "left")

    def left(self, what: str) -> Any:
        return self.padded_left[what]

    def encoded_images(
        self, chat: str | None, kind: str, up: str | None
    ) -> Float[Array | np.ndarray, "I N _"]:
        pixels = self.recorded_image(0).pixels[None] if chat else self.pixels
        out = self.embed(pixels, np.full(len(pixels), kind == "v"))
        out = out[:, : self.cfg.n_frame] if kind == "v" else out
        return self.model.to_language(jnp.asarray(out)) if up else out

    def null(self) -> Float[np.ndarray, "1 N E"]:
        size = self.cfg.vision.image_size
        return self.embed(np.zeros((1, size, size, 3), np.float32), np.zeros(1, bool))

    @functools.cache  # noqa: B019
    def video_prompt(self, tag: str) -> list[Any]:
        recorded = self.meta["video"][tag]
        return self.parts(recorded["text"], self.image_numbers(recorded["inputs"]))

    @functools.cache  # noqa: B019
    def video_read(self, tag: str) -> dict[str, Any]:
        return self.read([self.video_prompt(tag)])

    def video(self, tag: str, what: str) -> Any:
        return self.video_read(tag)[what]

    def video_answer(self, tag: str, kind: str) -> Int[np.ndarray, "1 T"]:
        return self.answer(
            f"{tag}/{kind}/ids", self.video_prompt(tag), self.meta["video"][tag], kind
        )

    def answer(
        self, key: str, parts: list[Any], recorded: dict, kind: str
    ) -> Int[np.ndarray, "1 T"]:
        """Returns the ids of one recorded answer to a prompt."""
        answer = recorded["out"][kind]
        settings = self.meta["generate_defaults"] | answer["kw"]
        return self.answered(key, [parts], settings, [answer["text"]])

    @functools.cache  # noqa: B019
    def chat_prompt(self, tag: str) -> list[Any]:
        """Returns a recorded conversation in the format of the release's text."""
        self.check_token_cases("tokenizer_cases_chat")
        recorded = self.meta["chat"][tag]
        turns = []
        for turn in recorded["turns"]:
            numbers, parts = iter(self.image_numbers(turn)), []
            video: list[Any] | None = None
            for part in turn:
                shown = self.recorded_image(next(numbers)) if part.startswith("picture:") else part
                if part in ("[VIDEO]", "[/VIDEO]"):
                    video = [] if part == "[VIDEO]" else None
                    parts += [video] if video is not None else []
                elif video is not None:
                    video.append(shown)
                else:
                    parts.append(shown)
            turns.append(parts)
        style = chat_format(self.cfg, "native")
        return converse(turns, style=style, grounding=recorded.get("is_grounding", False))

    @functools.cache  # noqa: B019
    def chat_read(self, tag: str) -> dict[str, Any]:
        out = self.read([self.chat_prompt(tag)])
        return out | {"last_logits": out["logits"][:, -1]}

    def chat(self, tag: str, what: str) -> Any:
        return self.chat_read(tag)[what]

    def chat_answer(self, tag: str, kind: str) -> Int[np.ndarray, "1 T"]:
        parts = self.chat_prompt(tag)
        return self.answer(f"chat/{tag}/{kind}/ids", parts, self.meta["chat"][tag], kind)

    def hub_chat(self, tag: str) -> Int[np.ndarray, "1 T"]:
        recorded = self.meta["chat_hub"][tag]
        count = recorded["content"].count(_STILL)
        parts = converse(
            [self.parts(recorded["content"], [0] * count)],
            recorded["system_msg"],
            style=chat_format(self.cfg, "hub"),
        )
        return Prompt.of(parts, self.tokenizer, self.cfg).tokens[None]

    @functools.cache  # noqa: B019
    def regressed(self, tag: str) -> Float[Array, "B N E"]:
        recorded = self.meta["gen_image"][tag]
        prompts, left = [], list(recorded["pictures"])
        for text in recorded["text"]:
            count = text.count(_STILL)
            prompts.append(self.parts(text, left[:count]) or [""])
            left = left[count:]
        return self.emu.regress(prompts)

    def condition(self, part: str) -> Float[Array, "B N E"]:
        """Returns the recomputed regression that equals the recorded condition of the decoder."""
        recorded = self.expected[f"{part}/cond"]
        for tag in self.meta["gen_image"]:
            repeated = self.expected.get(f"gen_image/{tag}", np.zeros(0))
            if repeated.shape == recorded.shape and _relative(repeated, recorded) <= FEEDBACK:
                return self.regressed(tag)
        raise Difference("repeats none of the recorded gen_image/*")

    def denoised(self) -> Float[np.ndarray, "B C h w"]:
        recorded = {name: self.expected[f"unet/{name}"] for name in ("t", "cond", "text_embeds")}
        out = _denoise(
            self.model.unet,
            np.moveaxis(self.expected["unet/sample"], 1, -1),
            jnp.asarray(recorded["t"], jnp.int32),
            recorded["cond"],
            jnp.asarray(self.expected["unet/time_ids"], jnp.float32),
            recorded["text_embeds"],
        )
        return np.moveaxis(np.asarray(out), -1, 1)

    @functools.cache  # noqa: B019
    def sample_condition(self, tag: str) -> Float[np.ndarray, "B N E"]:
        """Returns the conditional rows before the unconditional ones of a recorded image."""
        recorded = self.meta["sampling"][tag]
        parts = [
            self.recorded_image(*self.image_numbers(part)) if self.image_numbers(part) else part
            for part in recorded["inputs"]
        ]
        guided = recorded["guidance_scale"] > 1
        if len(parts) == 1 and not isinstance(parts[0], str):  # autoencoding
            cond = self.embed(parts[0].pixels[None], np.zeros(1, bool))
            return np.concatenate([cond, self.null()]) if guided else cond
        return np.asarray(self.emu.regress([parts, [""]][: 1 + guided]))

    def pooled(self, tag: str) -> Float[np.ndarray, "B E"]:
        return self.sample_condition(tag).mean(axis=1)

    def sizes(self, tag: str) -> Float[np.ndarray, "6"]:
        recorded = self.meta["sampling"][tag]
        sizes = image.size_condition(
            self.cfg,
            (recorded["height"], recorded["width"]),
            original_size=tuple(recorded.get("original_size", (1024, 1024))),
            crops_coords_top_left=tuple(recorded.get("crop_info", (0, 0))),
        )
        assert sizes is not None
        return sizes

    def time_ids(self, tag: str) -> Int[np.ndarray, "B 6"]:
        rows = len(self.expected[f"sample/{tag}/time_ids"])
        return np.broadcast_to(self.sizes(tag), (rows, 6)).astype(np.int64)

    def sample_timesteps(self, tag: str) -> Int[np.ndarray, "steps"]:
        steps = self.meta["sampling"][tag]["num_inference_steps"]
        return np.asarray(diffusion.sampling_steps(self.cfg.scheduler, steps, "euler").t)

    def sigmas(self, tag: str) -> Float[np.ndarray, "_"]:
        alphas = diffusion.alphas_cumprod(self.cfg.scheduler)[self.sample_timesteps(tag)]
        return np.append(((1 - alphas) / alphas) ** 0.5, 0.0)

    def noise_scale(self, tag: str) -> np.floating:
        return np.sqrt(np.square(self.sigmas(tag)[0]) + 1)

    @functools.cache  # noqa: B019
    def sample_latents(self, tag: str) -> Float[Array, "B h w C"]:
        recorded = self.meta["sampling"][tag]
        start = jnp.asarray(np.moveaxis(self.expected[f"sample/{tag}/init_latents"], 1, -1))
        rows = self.sample_condition(tag)
        return _sample(
            self.model,
            start,
            rows[:1],
            rows[1:] if len(rows) > 1 else None,
            recorded["guidance_scale"],
            recorded["num_inference_steps"],
            "euler",
            jnp.asarray(self.sizes(tag)),
        )

    def sample_result(self, tag: str, what: str) -> Any:
        latents = self.sample_latents(tag)
        if what == "latents":
            return np.moveaxis(np.asarray(latents), -1, 1)
        pixels = np.asarray(_paint(self.model, latents))
        return np.round(pixels * 255).astype(np.uint8) if what == "image_uint8" else pixels

    def boxes(self) -> UInt8[np.ndarray, "B side side"]:
        return np.stack([box_image(tuple(box))[..., 0] for box in self.meta["boxes"]])


_Emu2Recording.methods = {
    r"vit/pixels_nchw|unet/(?:sample|t|text_embeds|time_ids)|vae/image|sample/.+/init_latents": (
        _Recording.given
    ),
    r"preprocess/(\d+)/(pipeline)": _Emu2Recording.preprocessed,
    r"vit/features": lambda r: _features(r.model, r.pixels),
    r"encode/null": _Emu2Recording.null,
    r"(chat/)?encode/(n|v)_query(_up)?": _Emu2Recording.encoded_images,
    r"train/(\w+)": _Recording.train,
    r"left/(ids|mask|hidden)": _Emu2Recording.left,
    r"generate/(.+)/ids": _Recording.generated,
    r"(video|video_still)/(ids|hidden)": _Emu2Recording.video,
    r"(video|video_still)/(.+)/ids": _Emu2Recording.video_answer,
    r"gen_image/(.+)": _Emu2Recording.regressed,
    r"chat/(\w+)/(ids|hidden|last_logits)": _Emu2Recording.chat,
    r"chat/(\w+)/(\S+)/ids": _Emu2Recording.chat_answer,
    r"chat_hub/(\w+)/ids": _Emu2Recording.hub_chat,
    r"(unet)/cond": _Emu2Recording.condition,
    r"unet/out": _Emu2Recording.denoised,
    r"vae/(mean|logvar|decoded)": _Recording.autoencoded,
    r"sample/([^/]+)/cond": _Emu2Recording.sample_condition,
    r"sample/([^/]+)/text_embeds": _Emu2Recording.pooled,
    r"sample/([^/]+)/time_ids": _Emu2Recording.time_ids,
    r"sample/([^/]+)/timesteps": _Emu2Recording.sample_timesteps,
    r"sample/([^/]+)/sigmas": _Emu2Recording.sigmas,
    r"sample/([^/]+)/init_noise_sigma": _Emu2Recording.noise_scale,
    r"sample/([^/]+)/(latents|image|image_uint8)": _Emu2Recording.sample_result,
    r"box/pictures": _Emu2Recording.boxes,
}

_RECORDINGS: dict[str, type[_Recording]] = {"emu": _Recording, "emu2": _Emu2Recording}


# NumPy's arrays, which become JAX's inside, are `Any`.
@nnx.jit
def _features(model: EmuModel, pixels: Any) -> Array:
    return model.visual(pixels)


@nnx.jit
def _embeddings(model: EmuModel, pixels: Any) -> Array:
    return model.encode_images(pixels)


@nnx.jit
def _mixed_embeddings(model: EmuModel, pixels: Any, frames: Any) -> Array:
    return model.encode_images(pixels, frames=frames)


@nnx.jit
def _language(
    model: EmuModel, tokens: Any, images: Any, embedding_index: Any, mask: Any, positions: Any
) -> tuple[Array, Array, Array, Array, Array]:
    x = model.embed(tokens, images, embedding_index)
    # Through the KV cache, so that padding attends to the same positions as in the release.
    batch, length = tokens.shape
    cache = model.llama.empty_cache(batch, length, x.dtype)
    hidden, _ = model.llama.extend(x, positions, mask, cache)
    targets = model.regression_targets(x, images, embedding_index)
    regressed = model.regression_mask(tokens, mask.astype(jnp.int32))
    return targets, hidden, model.llama.logits(hidden), model.regress(hidden), regressed


@nnx.jit
def _denoise(
    unet: Any, sample: Any, timesteps: Any, cond: Any, sizes: Any = None, pooled: Any = None
) -> Array:
    return unet(sample, timesteps, cond, sizes, pooled)


@nnx.jit
def _encode(vae: Any, pixels: Any) -> tuple[Array, Array]:
    return vae.encode(pixels)


@nnx.jit
def _decode(vae: Any, latents: Any) -> Array:
    return vae.decode(latents)


@functools.partial(nnx.jit, static_argnums=(5, 6))
def _sample(
    model: EmuModel,
    latents: Any,
    cond: Any,
    uncond: Any,
    guidance: Any,
    steps: int,
    method: str,
    sizes: Any = None,
) -> Array:
    return image.sample_latents(
        model, latents, cond, uncond, guidance, steps=steps, method=method, sizes=sizes
    )


@nnx.jit
def _paint(model: EmuModel, latents: Any) -> Array:
    return image.decode_latents(model, latents)
