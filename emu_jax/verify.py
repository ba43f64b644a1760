"""`emu-jax verify`: compares a checkpoint with tensors recorded from the released code.

A golden directory holds `expected.npz` and `meta.json`; `tools/record_golden.py` writes one in a
clone of the release. Each tensor gets a row with the relative error max |a - b| / max |b|; ids must
be equal. Everything is computed in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from emu_jax import diffusion
from emu_jax.data.images import load_image
from emu_jax.data.sources.video import frame_indices
from emu_jax.errors import UserError
from emu_jax.generate import api, image
from emu_jax.generate.prompt import Normalized
from emu_jax.generate.settings import TextConfig
from emu_jax.models.emu import EmuModel
from emu_jax.models.eva_clip import normalize_images

# Tolerances relative to the largest magnitude of a tensor. Feedback through a sampler or through
# regressed embeddings amplifies rounding; so do adapters stored in bfloat16.
TIGHT, FEEDBACK = 2e-5, 1e-4
_FEEDBACK = re.compile(r"gen_image/.*|sample/.*|unet/cond|instruct/logits")


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
        passed: whether some tensors were checked and none failed.
        checked: number of tensors that apply to the checkpoint.
        failed: keys of the tensors that failed.
        worst: the tensor with the largest error; None if no tensor has an error.
        not_applicable: keys of the tensors that do not apply to the checkpoint.
    """

    passed: bool
    checked: int
    failed: list[str]
    worst: WorstTensor | None
    not_applicable: list[str]


class Difference(Exception):
    """Raised when a tensor cannot equal the recorded one; the message says why."""


def verify(checkpoint: Path, golden: Path) -> list[TensorVerdict]:
    """Returns a row for every tensor of `golden/expected.npz`.

    Raises:
        UserError: a directory cannot be read, or they are for different models.
    """
    expected, meta = _open(golden)
    emu = api.load(checkpoint)
    with jax.default_matmul_precision("highest"):
        recording = _Recording(emu, expected, meta, golden)
        return [recording.row(key) for key in expected]


def verdict_summary(rows: list[TensorVerdict]) -> Verification:
    """Summarizes the verdicts."""
    checked = [r for r in rows if r.verdict != "not applicable"]
    errors = [r for r in checked if r.error is not None]
    worst = max(errors, key=_badness, default=None)
    error = (
        worst.error if worst and worst.error is not None and _badness(worst) < math.inf else None
    )
    failed = [r.key for r in rows if r.verdict == "FAILED"]
    return Verification(
        passed=bool(checked) and not failed,
        checked=len(checked),
        failed=failed,
        worst=worst and WorstTensor(worst.key, error, worst.tolerance),
        not_applicable=[r.key for r in rows if r.verdict == "not applicable"],
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
            raise UserError(f"{golden} is no golden folder: it lacks {name}")
    try:
        with np.load(golden / "expected.npz") as stored:
            expected = {key: stored[key] for key in stored}
        meta = json.loads((golden / "meta.json").read_text())
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read {golden}: {error}") from None
    if not isinstance(meta, dict):
        raise UserError(f"{golden}: meta.json must hold an object, not {type(meta).__name__}")
    return expected, meta


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    difference = np.abs(ours.astype(np.float64) - theirs).max(initial=0.0)
    return float(difference / max(np.abs(theirs).max(initial=0.0), np.finfo(np.float32).tiny))


class _Recording:
    """Recomputes the recorded tensors.

    `_METHODS` maps the name of a tensor to a method. Tensors of one computation share its result.
    """

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
        for pattern, compute in _METHODS.items():
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
    def features(self) -> tuple[jax.Array, jax.Array]:
        return _features(self.model, self.pixels)

    @functools.cached_property
    def embeddings(self) -> jax.Array:
        return _embeddings(self.model, self.pixels)

    def spelled(self, text: str, start: int = 0) -> list[Any]:
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
            prompts.append(self.spelled(text, start))
            start += sum(not isinstance(p, str) for p in prompts[-1])
        return prompts

    def encoded(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids of right-padded texts, and the mask of real tokens."""
        rows = [self.tokenizer.encode(text) for text in texts]
        ids = np.full((len(rows), max(map(len, rows))), self.cfg.tokens.pad, np.int64)
        mask = np.zeros(ids.shape, np.int64)
        for n, row in enumerate(rows):
            ids[n, : len(row)], mask[n, : len(row)] = row, 1
        return ids, mask

    def run(self, ids: np.ndarray, mask: np.ndarray) -> dict[str, jax.Array]:
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
        x, hidden, logits, predicted = _language(
            self.model,
            jnp.asarray(ids, jnp.int32),
            images,
            jnp.asarray(embedding_index),
            jnp.asarray(mask, bool),
        )
        return {"x": x, "hidden": hidden, "logits": logits, "predicted": predicted}

    @functools.cached_property
    def trained(self) -> dict[str, Any]:
        ids, mask = self.encoded(self.meta["prompts"])
        out = self.run(ids, mask)
        t = self.cfg.tokens
        scored = ~np.isin(ids[:, 1:], [t.pad, t.img, t.img_end, t.image])
        logp = np.asarray(jax.nn.log_softmax(out["logits"][:, :-1].astype(jnp.float32)))
        picked = np.take_along_axis(logp, ids[:, 1:, None], axis=-1)[..., 0]
        predict = np.asarray(self.model.regression_mask(jnp.asarray(ids), jnp.asarray(mask)))
        target = np.roll(predict, 1, axis=1)
        return {
            "ids": ids,
            "mask": mask,
            "logits": out["logits"],
            "hidden": out["hidden"],
            "llm_loss": -picked[scored].mean(),
            "regress_pred": np.asarray(out["predicted"])[predict],
            "regress_target": np.asarray(out["x"])[target],
        }

    def train(self, what: str) -> Any:
        return self.trained[what]

    def token_cases(self) -> np.ndarray:
        for case in self.meta.get("tokenizer_cases", ()):
            if self.tokenizer.encode(case["text"]) != case["ids"]:
                raise Difference(f"not equal: the ids of {case['text']!r}")
        return self.trained["ids"]

    def generated(self, tag: str) -> np.ndarray:
        settings = self.meta["generate_defaults"] | self.meta["generate"][tag]["kw"]
        known = {f.name for f in dataclasses.fields(TextConfig)}
        settings = {k: v for k, v in settings.items() if not k.endswith("_token_id")}
        if unknown := set(settings) - known:
            raise UserError(f"{self.golden}: unknown generation settings {sorted(unknown)}")
        settings["max_new_tokens"] = self.meta["spec"]["new_tokens"]
        ids = self.emu.generate_ids(self.prompts, **settings)
        # The recording is as wide as its longest row, ours as wide as max_new_tokens.
        width = self.expected[f"generate/{tag}/ids"].shape[1]
        if (ids[:, width:] == self.cfg.tokens.pad).all():
            ids = ids[:, :width]
        texts = self.meta["generate"][tag].get("texts")
        if texts is not None and np.array_equal(ids, self.expected[f"generate/{tag}/ids"]):
            for row, text in zip(ids, texts, strict=True):
                if (read := self.tokenizer.decode(row)) != text:
                    raise Difference(f"the ids are equal, but read {read!r}, recorded {text!r}")
        return ids

    def ranks(self) -> list[list[int]]:
        spec = self.meta["spec"]
        return [self.emu.rank([spec["text"][2], Normalized(self.pixels[0])], spec["candidates"])]

    @functools.cache  # noqa: B019 (one recording lives as long as its verification)
    def regressed(self, tag: str) -> jax.Array:
        text = self.meta["spec"]["text"]
        pixels = [Normalized(image) for image in self.pixels]
        context = {
            "text_only": lambda: [text[0]],
            "in_context": lambda: [pixels[0], text[1], pixels[1], text[0]],
            "blend": lambda: [pixels[1], pixels[2]],
        }[tag]()
        return self.emu.regress([context, [""]])

    def condition(self, part: str) -> jax.Array:
        """Returns the recomputed regression that equals the recorded condition of the decoder."""
        theirs = self.expected[f"{part}/cond"]
        for tag in ("text_only", "in_context", "blend"):
            recorded = self.expected.get(f"gen_image/{tag}", np.zeros(0))
            if recorded.shape == theirs.shape and _relative(recorded, theirs) <= FEEDBACK:
                return self.regressed(tag)
        raise Difference("repeats none of the recorded gen_image/*")

    def denoised(self) -> np.ndarray:
        sample = np.moveaxis(self.expected["unet/sample"], 1, -1)
        t = np.broadcast_to(self.expected["unet/t"], len(sample))  # shared, or one per row
        cond = self.expected["unet/cond"]
        out = _denoise(self.model.unet, sample, jnp.asarray(t, jnp.int32), cond)
        return np.moveaxis(np.asarray(out), -1, 1)

    def autoencoded(self, what: str) -> np.ndarray:
        if what == "decoded":
            out = _decode(self.model.vae, np.moveaxis(self.expected["vae/mean"], 1, -1))
        else:
            mean, logvar = _encode(self.model.vae, np.moveaxis(self.expected["vae/image"], 1, -1))
            out = mean if what == "mean" else logvar
        return np.moveaxis(np.asarray(out), -1, 1)

    def timesteps(self, steps: str, guidance: str) -> np.ndarray:
        return np.asarray(diffusion.sampling_steps(self.cfg.scheduler, int(steps)).t)

    @functools.cache  # noqa: B019
    def latents(self, steps: str, guidance: str) -> jax.Array:
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
        )

    def sampled(self, steps: str, guidance: str) -> np.ndarray:
        return np.moveaxis(np.asarray(self.latents(steps, guidance)), -1, 1)

    def painted(self, steps: str, guidance: str) -> jax.Array:
        return image.decode_latents(self.model, self.latents(steps, guidance))

    def preprocessed(self, number: str, path: str) -> np.ndarray:
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


_METHODS: dict[str, Callable[..., Any]] = {
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


# NumPy's arrays, which become JAX's inside, are `Any`.
@nnx.jit
def _features(model: EmuModel, pixels: Any) -> tuple[Array, Array]:
    features = model.visual(pixels)
    return features, model.ln_visual(features)


@nnx.jit
def _embeddings(model: EmuModel, pixels: Any) -> Array:
    return model.encode_images(pixels)


@nnx.jit
def _language(
    model: EmuModel, tokens: Any, images: Any, embedding_index: Any, mask: Any
) -> tuple[Array, Array, Array, Array]:
    x = model.embed(tokens, images, embedding_index)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    # Through the KV cache, so that padding attends to the same positions as in the release.
    batch, length = tokens.shape
    cache = model.llama.empty_cache(batch, length, x.dtype)
    hidden, _ = model.llama.extend(x, positions, mask, cache)
    return x, hidden, model.llama.logits(hidden), model.llama.regress(hidden)


@nnx.jit
def _denoise(unet: Any, sample: Any, timesteps: Any, cond: Any) -> Array:
    return unet(sample, timesteps, cond)


@nnx.jit
def _encode(vae: Any, pixels: Any) -> tuple[Array, Array]:
    return vae.encode(pixels)


@nnx.jit
def _decode(vae: Any, latents: Any) -> Array:
    return vae.decode(latents)


@functools.partial(nnx.jit, static_argnums=(5,))
def _sample(
    model: EmuModel, latents: Any, cond: Any, uncond: Any, guidance: Any, steps: int
) -> Array:
    return image.sample_latents(model, latents, cond, uncond, guidance, steps=steps, method="pndm")
