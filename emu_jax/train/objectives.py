"""The objective of each stage: a module and its loss on one batch."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float

from emu_jax import diffusion
from emu_jax.config import EmuConfig
from emu_jax.data.latents import LatentBatches, latent_shapes
from emu_jax.data.pipeline import Batches, Kind, batch_shapes
from emu_jax.errors import UserError, suggest
from emu_jax.models.clip import CLIP
from emu_jax.models.emu import EmuModel
from emu_jax.models.eva_clip import normalize_images
from emu_jax.models.llama import Llama
from emu_jax.models.unet import UNet
from emu_jax.models.vae import VAE
from emu_jax.tokenizer import Tokenizer
from emu_jax.train.config import TrainConfig

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class Painter(nnx.Module):
    """The denoiser alone, under the name it has in Emu."""

    def __init__(self, cfg: TrainConfig, rngs: nnx.Rngs):
        assert cfg.model.unet
        self.unet = UNet(cfg.model.unet, remat=cfg.remat.unet, rngs=rngs)


class Objective(ABC):
    """One stage's module and loss. `batch_kind` names what the data pipeline must yield;
    `accumulates` says that the loss is a mean over rows, or over targets in them, and so the
    mean of the losses of equal parts of a batch, when these divide by `targets`."""

    batch_kind: Kind
    accumulates = True

    @abstractmethod
    def build(self, cfg: TrainConfig, rngs: nnx.Rngs) -> nnx.Module:
        """A fresh module, its towers under the names they have in Emu."""

    @abstractmethod
    def loss(
        self,
        cfg: TrainConfig,
        module: Any,
        batch: Batch,
        key: jax.Array,
        targets: Metrics | None = None,
    ) -> tuple[jax.Array, Metrics]:
        """The scalar loss of one batch, and what to report beside it.

        Args:
            targets: what means are to divide by, as `targets` counts it; by default the batch's.
        """

    def targets(self, module: Any, batch: Batch) -> Metrics:
        """Returns how many targets the loss is a mean over, if not over the rows."""
        return {}

    def batch_shapes(self, cfg: TrainConfig) -> dict[str, tuple[tuple[int, ...], Any]]:
        """(shape, dtype) of each array of a global batch."""
        return batch_shapes(cfg.data, self.batch_kind)

    def batches(
        self, cfg: TrainConfig, tokenizer: Tokenizer, resumed: bool = False
    ) -> Batches | LatentBatches:
        """Returns this process's share of the data. A resumed run keeps what it has counted."""
        index, count = jax.process_index(), jax.process_count()
        return Batches(
            cfg.data,
            tokenizer,
            self.batch_kind,
            process_index=index,
            process_count=count,
            recount=not resumed,
        )

    def finish(self, model: EmuConfig, metrics: dict[str, float]) -> EmuConfig:
        """The configuration that the trained model is saved with."""
        return model


class EmuObjective(Objective):
    """Pretraining: cross-entropy on text and l2 regression of visual embeddings
    (paper section 2.2)."""

    batch_kind = "rows"

    def build(self, cfg: TrainConfig, rngs: nnx.Rngs) -> EmuModel:
        return EmuModel(cfg.model, painter=False, remat=cfg.remat, backend=cfg.attention, rngs=rngs)

    def targets(self, module: EmuModel, batch: Batch) -> Metrics:
        return {name: jnp.sum(mask) for name, mask in target_masks(module, batch).items()}

    def loss(
        self,
        cfg: TrainConfig,
        module: EmuModel,
        batch: Batch,
        key: jax.Array,
        targets: Metrics | None = None,
    ):
        pixels = normalize_images(batch["images"], jnp.dtype(cfg.dtype))
        visual_key, language_key = jax.random.split(key)
        images = module.encode_images(pixels, dropout_key=visual_key)
        words, regression_loss = sequence_losses(
            module,
            images,
            batch,
            loss_block=cfg.loss_block,
            dropout_key=language_key,
            targets=targets,
        )
        variance, rank = spread(images.astype(jnp.float32), batch["image_valid"])
        loss = cfg.text_weight * words + cfg.regression_weight * regression_loss
        return loss, {
            "text_loss": words,
            "regression_loss": regression_loss,
            "embedding_variance": variance,
            "embedding_rank": rank,
        }


class LanguageModel(nnx.Module):
    """The language model alone, under the name it has in Emu."""

    def __init__(self, cfg: TrainConfig, rngs: nnx.Rngs):
        self.llama = Llama(cfg.model.llama, remat=cfg.remat.llama, backend=cfg.attention, rngs=rngs)


class TextObjective(Objective):
    """The language model on the words of rows alone: the parent of an Emu, and what its speed
    is compared with."""

    batch_kind = "rows"

    def build(self, cfg: TrainConfig, rngs: nnx.Rngs) -> LanguageModel:
        return LanguageModel(cfg, rngs)

    def targets(self, module: LanguageModel, batch: Batch) -> Metrics:
        return {"text": jnp.sum(text_mask(batch))}

    def loss(
        self,
        cfg: TrainConfig,
        module: LanguageModel,
        batch: Batch,
        key: jax.Array,
        targets: Metrics | None = None,
    ):
        x = module.llama.embed_tokens(batch["tokens"]).astype(jnp.dtype(cfg.dtype))
        hidden = module.llama(x, batch["positions"], batch["segment_ids"], dropout_key=key)
        words = module.llama.token_losses(hidden, following(batch["tokens"]), block=cfg.loss_block)
        return masked_mean(words, text_mask(batch), (targets or {}).get("text")), {}


def text_mask(batch: Batch) -> Bool[Array, "B T"]:
    """Positions t that predict a text target at t + 1, in their own document. The last of a row
    has no next."""
    segments = batch["segment_ids"]
    scored = following(batch["text_loss_mask"]) & (following(segments) == segments)
    return scored.at[:, -1].set(False)


def following(x: Array) -> Array:
    """Shifts a sequence left: position t holds the entry of t + 1."""
    return jnp.roll(x, -1, axis=1)


def sequence_losses(
    module: EmuModel,
    images: Float[Array, "B I N D"],
    batch: Batch,
    *,
    loss_block: int,
    dropout_key: jax.Array | None = None,
    targets: Metrics | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Both losses of packed rows, in float32: the mean cross-entropy over text targets, and
    the squared error of regressed embeddings, a mean over targets and width
    (release: `modeling_llama.py`, which prepares the pairs of the second)."""
    masks, targets = target_masks(module, batch), targets or {}
    x = module.embed(batch["tokens"], images, batch["image_slots"])
    hidden = module.llama(x, batch["positions"], batch["segment_ids"], dropout_key=dropout_key)

    # The regression's targets teach nothing themselves.
    target = jax.lax.stop_gradient(following(x)).astype(jnp.float32)
    error = jnp.square(module.llama.regress(hidden).astype(jnp.float32) - target)
    errors = jnp.mean(error, axis=-1)
    words = module.llama.token_losses(hidden, following(batch["tokens"]), block=loss_block)
    return (
        masked_mean(words, masks["text"], targets.get("text")),
        masked_mean(errors, masks["regression"], targets.get("regression")),
    )


def target_masks(module: EmuModel, batch: Batch) -> Metrics:
    """Returns the masks of the targets, of text and of regression, [B, T]."""
    return {
        "text": text_mask(batch),
        "regression": module.regression_mask(
            batch["tokens"], batch["segment_ids"], batch["image_slots"], batch["image_scored"]
        ),
    }


def masked_mean(values: jax.Array, mask: jax.Array, count: jax.Array | None = None) -> jax.Array:
    """The mean where `mask` holds, or the sum there over `count`; 0 where it holds nowhere."""
    count = jnp.sum(mask) if count is None else count
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.where(count > 0, count, 1)


def spread(
    images: Float[Array, "B I N D"], valid: Bool[Array, "B I"], most: int = 64
) -> tuple[jax.Array, jax.Array]:
    """Measures how much images differ: the mean variance of an embedding's entries over images,
    and the effective rank (exponential of the entropy of the covariance's normalized spectrum;
    Roy and Vetterli 2007) of whole images. A collapsing Causal Transformer drives both down.

    Compares the first `most` images at most.
    """
    images = jax.lax.stop_gradient(images)
    first = jnp.argsort(~valid.reshape(-1), stable=True)[:most]
    x = images.reshape(-1, images.shape[2] * images.shape[3])[first]
    weight = valid.reshape(-1, 1)[first].astype(jnp.float32)
    count = jnp.maximum(jnp.sum(weight), 1)
    x = (x - jnp.sum(x * weight, 0) / count) * weight
    variance = jnp.sum(jnp.square(x)) / (count * x.shape[1])
    gram = jnp.matmul(x, x.T, precision="highest")  # has the spectrum of the covariance
    spectrum = jnp.clip(jnp.linalg.eigvalsh(gram), 0)
    p = spectrum / jnp.maximum(jnp.sum(spectrum), 1e-30)
    return variance, jnp.exp(-jnp.sum(p * jnp.log(jnp.maximum(p, 1e-30))))


class ClipObjective(Objective):
    """Contrastive pretraining of the visual encoder on pictures and captions
    (Radford et al. 2021). Pictures whose captions are equal are positives of each other."""

    batch_kind = "captions"
    accumulates = False  # each row is compared with all others

    def build(self, cfg: TrainConfig, rngs: nnx.Rngs) -> CLIP:
        return CLIP(cfg.model, remat=cfg.remat.visual, rngs=rngs)

    def loss(
        self,
        cfg: TrainConfig,
        module: CLIP,
        batch: Batch,
        key: jax.Array,
        targets: Metrics | None = None,
    ):
        dtype = jnp.dtype(cfg.dtype)
        image = module.visual.clip_embedding(normalize_images(batch["images"], dtype))
        text = module.text(batch["tokens"], batch["valid"], dtype)
        image, text = (x.astype(jnp.float32) for x in (image, text))
        image, text = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (image, text))
        scale = jnp.exp(jnp.minimum(module.logit_scale[...], jnp.log(100.0)))
        logits = scale * image @ text.T
        equal = jnp.all(batch["tokens"][:, None] == batch["tokens"][None, :], axis=-1)
        target = equal / jnp.sum(equal, axis=1, keepdims=True)
        loss = (
            jnp.mean(optax.softmax_cross_entropy(logits, target))
            + jnp.mean(optax.softmax_cross_entropy(logits.T, target))
        ) / 2
        best = jnp.take_along_axis(equal, jnp.argmax(logits, axis=1)[:, None], axis=1)
        return loss, {"retrieval": jnp.mean(best), "temperature": 1 / scale}


class Autoencoder(nnx.Module):
    """The autoencoder alone, under the name it has in Emu."""

    def __init__(self, cfg: TrainConfig, rngs: nnx.Rngs):
        if cfg.model.vae is None:
            raise UserError("the vae objective needs model.vae")
        self.vae = VAE(cfg.model.vae, rngs=rngs)


class VaeObjective(Objective):
    """The autoencoder: squared error and a light KL term (Rombach et al. 2022, without the
    adversarial and perceptual terms)."""

    batch_kind = "images"

    def build(self, cfg: TrainConfig, rngs: nnx.Rngs) -> Autoencoder:
        return Autoencoder(cfg, rngs)

    def loss(
        self,
        cfg: TrainConfig,
        module: Autoencoder,
        batch: Batch,
        key: jax.Array,
        targets: Metrics | None = None,
    ):
        pictures = to_signed(batch["images"], cfg)
        mean, logvar = module.vae.encode(pictures)
        noise = jax.random.normal(key, mean.shape).astype(mean.dtype)
        latents = mean + jnp.exp(logvar / 2) * noise
        painted = module.vae.decode(latents).astype(jnp.float32)
        error = jnp.mean(jnp.square(painted - pictures.astype(jnp.float32)))
        mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
        kl = jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar) / 2
        std = jnp.std(latents.astype(jnp.float32))
        # Peak to peak is 2, so psnr = 10 log10(4 / error).
        psnr = 10 * jnp.log10(4 / error)
        return error + cfg.kl_weight * kl, {
            "squared_error": error,
            "psnr": psnr,
            "kl": kl,
            "latent_std": std,
        }

    def finish(self, model: EmuConfig, metrics: dict[str, float]) -> EmuConfig:
        """Diffusion wants latents of unit variance, as Stable Diffusion's 0.18215 gives."""
        assert model.vae is not None
        vae = dataclasses.replace(model.vae, scaling_factor=round(1 / metrics["latent_std"], 5))
        return dataclasses.replace(model, vae=vae)


class DecoderObjective(Objective):
    """The U-Net learns to denoise a picture's latents, given the embeddings that the frozen
    model regresses after the picture's context (paper section 2.3, visual decoding).

    Both are computed in the step; or, with `cfg.latents`, read as `precompute` wrote them, and
    the U-Net is then all there is of the model.
    """

    batch_kind = "contexts"

    def build(self, cfg: TrainConfig, rngs: nnx.Rngs) -> EmuModel | Painter:
        if cfg.model.unet is None or cfg.model.vae is None:
            raise UserError("the decoder objective needs model.unet and model.vae")
        if cfg.latents:
            return Painter(cfg, rngs)
        return EmuModel(cfg.model, remat=cfg.remat, rngs=rngs)

    def batch_shapes(self, cfg: TrainConfig) -> dict[str, tuple[tuple[int, ...], Any]]:
        if not cfg.latents:
            return super().batch_shapes(cfg)
        rows = cfg.data.batch_size
        condition, latents = latent_shapes(cfg.model)
        return {
            "condition": ((rows, *condition), jnp.bfloat16),
            "latents": ((rows, *latents), jnp.bfloat16),
        }

    def batches(
        self, cfg: TrainConfig, tokenizer: Tokenizer, resumed: bool = False
    ) -> Batches | LatentBatches:
        if not cfg.latents:
            return super().batches(cfg, tokenizer, resumed)
        index, count = jax.process_index(), jax.process_count()
        return LatentBatches(Path(cfg.latents), cfg.data, cfg.model, index, count)

    @staticmethod
    def frozen(cfg: TrainConfig, module: EmuModel, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The conditions [B, N, D] and latents [B, h, w, C] of a batch of contexts."""
        assert module.vae and cfg.model.vae
        dtype = jnp.dtype(cfg.dtype)
        images = module.encode_images(normalize_images(batch["images"], dtype))
        condition = module.regress_after(
            batch["tokens"], batch["length"], images, batch["image_slots"]
        )
        mean, _ = module.vae.encode(to_signed(batch["target"], cfg))
        latents = mean * cfg.model.vae.scaling_factor
        return jax.lax.stop_gradient((condition.astype(dtype), latents))

    def loss(
        self,
        cfg: TrainConfig,
        module: EmuModel | Painter,
        batch: Batch,
        key: jax.Array,
        targets: Metrics | None = None,
    ):
        dtype = jnp.dtype(cfg.dtype)
        if isinstance(module, EmuModel):
            condition, latents = self.frozen(cfg, module, batch)
        else:
            condition, latents = (batch[name].astype(dtype) for name in ("condition", "latents"))
        assert module.unet

        time_key, noise_key = jax.random.split(key)
        schedule = cfg.model.scheduler
        times = jax.random.randint(time_key, latents.shape[:1], 0, schedule.num_train_timesteps)
        noise = jax.random.normal(noise_key, latents.shape).astype(dtype)
        noisy = diffusion.add_noise(schedule, latents, noise, times)
        wanted = diffusion.denoiser_target(schedule, latents, noise, times).astype(jnp.float32)
        error = jnp.square(module.unet(noisy, times, condition).astype(jnp.float32) - wanted)
        return jnp.mean(error), {"condition_std": jnp.std(condition.astype(jnp.float32))}


def to_signed(images: jax.Array, cfg: TrainConfig) -> jax.Array:
    """Bytes to [-1, 1], the autoencoder's range."""
    return (images.astype(jnp.float32) / 127.5 - 1).astype(jnp.dtype(cfg.dtype))


OBJECTIVES: dict[str, Objective] = {
    "emu": EmuObjective(),
    "text": TextObjective(),
    "clip": ClipObjective(),
    "vae": VaeObjective(),
    "decoder": DecoderObjective(),
}


def get_objective(name: str) -> Objective:
    if name not in OBJECTIVES:
        raise UserError(f"objective {name!r} is not known{suggest(name, OBJECTIVES)}")
    return OBJECTIVES[name]
