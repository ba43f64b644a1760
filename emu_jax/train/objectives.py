"""The objective of each stage: a module and its loss on one batch."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Real, UInt8

from emu_jax import diffusion
from emu_jax.config import EmuConfig, TokenIds
from emu_jax.data import digits
from emu_jax.data.batches import ArrayShapes
from emu_jax.data.latents import LatentBatches, latent_shapes
from emu_jax.data.pipeline import Batches, Kind, batch_shapes
from emu_jax.errors import UserError
from emu_jax.models.backend import kernels
from emu_jax.models.clip import CLIP
from emu_jax.models.emu import EmuModel
from emu_jax.models.eva_clip import normalize_images
from emu_jax.models.llama import Llama
from emu_jax.models.unet import UNet
from emu_jax.models.vae import VAE
from emu_jax.sharding import RowShares, context_ways, shard
from emu_jax.storage import as_path
from emu_jax.tokenizer import Tokenizer
from emu_jax.train.config import TrainConfig

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Sums = Mapping[str, Any]  # float64 on the host: numbers, and `TARGET_SUM` [D]

# Statistics of regression targets in `Objective.held_out`: their mean [D], which is of the whole
# batch, and the squared distances to it, summed over the width. `add_statistics` makes sums of
# them that add over batches.
TARGET_MEAN, TARGET_SPREAD = "target_mean", "target_spread"
TARGET_SUM, TARGET_SQUARES = "target_sum", "target_squares"
MAX_EXPONENT = 700.0  # exp of more is not finite
NEVER = -1e30  # logit of a padding row


class UNetOnly(nnx.Module):
    """The denoiser alone, under the name it has in Emu."""

    def __init__(self, cfg: TrainConfig, rngs: nnx.Rngs) -> None:
        assert cfg.model.unet
        self.unet = UNet(cfg.model.unet, remat=cfg.remat.unet, rngs=rngs)


class Objective(ABC):
    """The module, the data and the loss of a stage.

    The loss is a mean over rows, or over targets in rows, unless it compares all rows
    (`train.config.ObjectiveTraits`). It equals the mean of the losses of equal parts of a batch
    that divide by `targets`.

    Attributes:
        batch_kind: the kind of batches that the data pipeline yields.
        row_lengths: settings of the data that are lengths of a row: of its tokens and images.
            Empty if the objective reads no rows.
        reads_targets: whether batches hold images at the autoencoder's size.
        has_all_towers: whether the module has every tower that the run's model needs. If not, the
            other towers stay in the parents' run directories.

    Raises:
        UserError: the config does not fit the objective.
    """

    batch_kind: Kind
    row_lengths: ClassVar[tuple[str, ...]] = ()
    reads_targets = False
    has_all_towers = True

    def __init__(self, cfg: TrainConfig) -> None:
        self.cfg = cfg

    @abstractmethod
    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Returns a new module, its towers under the names they have in Emu."""

    @abstractmethod
    def loss(
        self, module: Any, batch: Batch, key: Key[Array, ""], targets: Metrics | None = None
    ) -> tuple[Float[Array, ""], Metrics]:
        """Returns the scalar loss of a batch, and the metrics to log.

        Args:
            targets: the counts that means divide by, as `targets` returns them. By default those of
                the batch.
        """

    def targets(self, module: Any, batch: Batch) -> Metrics:
        """Returns the number of targets that the loss is a mean over, if not over the rows."""
        return {}

    @abstractmethod
    def held_out(
        self, module: Any, batch: Batch, rows: Bool[Array, "B"], key: Key[Array, ""]
    ) -> Metrics:
        """Returns the sums that `held_out_metrics` divides, [B], a row of the batch each.

        Computes as in training, but without dropout. An entry does not depend on the other rows,
        unless the loss compares them.

        Args:
            rows: True where the row is not padding. The entries of padding rows mean nothing.
            key: of the batch. Rows sample with keys of their own (`row_keys`), so that the noise of
                a row does not depend on the number of rows.
        """

    @abstractmethod
    def held_out_metrics(self, sums: Sums) -> dict[str, float]:
        """Returns the metrics of sums over rows and batches. Leaves out those without targets."""

    def batch_shapes(self) -> ArrayShapes:
        """Returns (shape, dtype) of each array of a global batch."""
        return batch_shapes(self.cfg.data, self.batch_kind)

    def prepare_data(self) -> Tokenizer:
        """Builds the embedded data if the config asks for them, and loads the data's tokenizer.

        Raises:
            UserError: the tokenizer or a size does not fit the model.
        """
        data = self.cfg.data
        if data.embedded == "digits":
            digits.build_digits(data.root)
        elif data.embedded:
            raise UserError(f"unknown data.embedded {data.embedded!r}: use 'digits'")
        tokenizer = self.load_tokenizer()
        if problems := self.mismatches(tokenizer):
            raise UserError(problems[0])
        return tokenizer

    def load_tokenizer(self) -> Tokenizer:
        """Loads the tokenizer of the data."""
        return self.cfg.data.load_tokenizer()

    def mismatches(self, tokenizer: Tokenizer | None) -> list[str]:
        """Returns a line for each way in which the data do not fit the model: the tokenizer, if
        there is one, and sizes."""
        data, model = self.cfg.data, self.cfg.model
        problems = []
        if tokenizer is not None and len(tokenizer) != model.llama.vocab_size:
            problems.append(
                f"the tokenizer in {data.root} has {len(tokenizer)} tokens, the model "
                f"{model.llama.vocab_size}: set model.llama.vocab_size and model.tokens to match"
            )
        elif (t := tokenizer) is not None:
            ids = TokenIds(t.bos, t.eos, t.pad_id, t.img, t.img_end, t.image, t.frame)
            if ids != model.tokens:
                problems.append(
                    f"model.tokens are {model.tokens}, the tokenizer's ids are {ids}: set "
                    "model.tokens to these"
                )
        sizes = [
            ("n_causal", data.n_causal, model.n_embeddings),
            ("image_size", data.image_size, model.vision.image_size),
        ]
        if data.n_frame:  # otherwise frames are still images
            own = model.tokens.frame is not None
            sizes.append(("n_frame", data.n_frame, model.n_frame if own else 0))
        if model.vae is not None and self.reads_targets:
            sizes.append(("target_size", data.target_size, model.vae.sample_size))
        for name, size, needed in sizes:
            if size != needed:
                problems.append(f"data.{name} is {size}, the model needs {needed}: set it to that")
        window = model.llama.sliding_window
        if window and data.row_tokens > window:
            problems.append(
                f"data.row_tokens is {data.row_tokens}, beyond model.llama.sliding_window = "
                f"{window}: set it to at most that, since attention here has no window"
            )
        return problems

    def batches(
        self, tokenizer: Tokenizer, shares: RowShares, resumed: bool = False
    ) -> Batches | LatentBatches:
        """Returns this process's shares of the data. A resumed run keeps its token counts."""
        return Batches(
            self.cfg.data,
            tokenizer,
            self.batch_kind,
            shares.numbers,
            shares.count,
            recount=not resumed and jax.process_count() == 1,
        )

    def trained_model(self, metrics: dict[str, float]) -> EmuConfig:
        """Returns the model config to save with the trained model.

        Args:
            metrics: those of the last step.
        """
        return self.cfg.model


class EmuObjective(Objective):
    """Pretraining: cross-entropy on text and l2 regression of visual embeddings
    (paper section 2.2)."""

    batch_kind = "rows"
    row_lengths = ("row_tokens", "row_images")

    def build(self, rngs: nnx.Rngs) -> EmuModel:
        cfg = self.cfg
        return EmuModel(
            cfg.model,
            painter=False,
            remat=cfg.remat,
            matmul_dtype=cfg.matmul_dtype,
            backend=cfg.attention,
            rngs=rngs,
        )

    def targets(self, module: EmuModel, batch: Batch) -> Metrics:
        return {name: jnp.sum(mask) for name, mask in target_masks(module, batch).items()}

    def loss(
        self, module: EmuModel, batch: Batch, key: Key[Array, ""], targets: Metrics | None = None
    ) -> tuple[Float[Array, ""], Metrics]:
        cfg = self.cfg
        pixels = normalize_images(batch["images"], jnp.dtype(cfg.dtype))
        visual_key, language_key = jax.random.split(key)
        images = module.encode_images(pixels, frames=frames_of(batch), dropout_key=visual_key)
        text_loss, regression_loss = sequence_losses(
            module,
            images,
            batch,
            loss_block=cfg.loss_block,
            dropout_key=language_key,
            targets=targets,
        )
        stills = batch["image_valid"] & ~jnp.asarray(frames_of(batch))
        variance, rank = spread(images.astype(jnp.float32), stills)
        loss = cfg.text_weight * text_loss + cfg.regression_weight * regression_loss
        return loss, {
            "text_loss": text_loss,
            "regression_loss": regression_loss,
            "embedding_variance": variance,
            "embedding_rank": rank,
        }

    def held_out(
        self, module: EmuModel, batch: Batch, rows: Bool[Array, "B"], key: Key[Array, ""]
    ) -> Metrics:
        pixels = normalize_images(batch["images"], jnp.dtype(self.cfg.dtype))
        images = module.encode_images(pixels, frames=frames_of(batch))
        hidden, x = hidden_states(module, images, batch)
        masks = {name: mask & rows[:, None] for name, mask in target_masks(module, batch).items()}
        token_losses = module.llama.token_losses(
            hidden, following(batch["tokens"]), block=self.cfg.loss_block
        )
        return text_sums(token_losses, masks["text"], batch) | regression_sums(
            module.regress(hidden).astype(jnp.float32),
            regression_targets(module, hidden, x, images, batch),
            masks["regression"],
        )

    def held_out_metrics(self, sums: Sums) -> dict[str, float]:
        text, regression = text_metrics(sums), regression_metrics(sums)
        loss = self.cfg.text_weight * text.get("text_loss", 0.0)
        loss += self.cfg.regression_weight * regression.get("regression_loss", 0.0)
        return {"loss": loss} | text | regression


def frames_of(batch: Batch) -> bool | Bool[Array, "B I"]:
    """Returns which images of a batch are frames of videos; False if none can be."""
    return batch.get("image_frames", False)


class LanguageModel(nnx.Module):
    """The language model alone, under the name it has in Emu."""

    def __init__(self, cfg: TrainConfig, rngs: nnx.Rngs) -> None:
        self.llama = Llama(
            cfg.model.llama,
            remat=cfg.remat.llama,
            matmul_dtype=cfg.matmul_dtype.llama,
            backend=cfg.attention,
            rngs=rngs,
        )


class TextObjective(Objective):
    """Cross-entropy on text alone, with the language model alone. Trains the parent of an Emu, and
    is the baseline of its speed."""

    batch_kind = "rows"
    row_lengths = ("row_tokens",)

    def build(self, rngs: nnx.Rngs) -> LanguageModel:
        return LanguageModel(self.cfg, rngs)

    def targets(self, module: LanguageModel, batch: Batch) -> Metrics:
        return {"text": jnp.sum(text_mask(batch))}

    def loss(
        self,
        module: LanguageModel,
        batch: Batch,
        key: Key[Array, ""],
        targets: Metrics | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        token_losses = self._losses(module, batch, key)
        return masked_mean(token_losses, text_mask(batch), (targets or {}).get("text")), {}

    def _losses(
        self, module: LanguageModel, batch: Batch, dropout_key: Key[Array, ""] | None
    ) -> Float[Array, "B T"]:
        cfg = self.cfg
        x = module.llama.embed_tokens(batch["tokens"]).astype(jnp.dtype(cfg.dtype))
        hidden = module.llama(x, batch["positions"], batch["segment_ids"], dropout_key=dropout_key)
        return module.llama.token_losses(hidden, following(batch["tokens"]), block=cfg.loss_block)

    def held_out(
        self, module: LanguageModel, batch: Batch, rows: Bool[Array, "B"], key: Key[Array, ""]
    ) -> Metrics:
        token_losses = self._losses(module, batch, None)
        return text_sums(token_losses, text_mask(batch) & rows[:, None], batch)

    def held_out_metrics(self, sums: Sums) -> dict[str, float]:
        text = text_metrics(sums)
        return {"loss": text.get("text_loss", 0.0)} | text


def text_mask(batch: Batch) -> Bool[Array, "B T"]:
    """Returns the positions t that predict a text target at t + 1 of the same document. The last
    position of a row predicts nothing."""
    segments = batch["segment_ids"]
    scored = following(batch["text_loss_mask"]) & (following(segments) == segments)
    return whole_rows(scored.at[:, -1].set(False))


def following(x: Array) -> Array:
    """Shifts a sequence left: position t holds the entry of t + 1."""
    return whole_rows(jnp.roll(x, -1, axis=1))


def whole_rows(x: Array) -> Array:
    """Constrains integers and masks [B, T] to be whole on each device.

    They are small. If devices had their own tokens alone, shifts would exchange their borders.
    """
    return shard(x, "batch", None) if x.ndim == 2 and context_ways() > 1 else x


def sequence_losses(
    module: EmuModel,
    images: Float[Array, "B I N E"],
    batch: Batch,
    *,
    loss_block: int,
    dropout_key: Key[Array, ""] | None = None,
    targets: Metrics | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns both losses of packed rows, in float32: the mean cross-entropy over text targets, and
    the squared error of regressed embeddings, a mean over targets and width (release:
    `modeling_llama.py`, which prepares the pairs of the second)."""
    masks, targets = target_masks(module, batch), targets or {}
    hidden, x = hidden_states(module, images, batch, dropout_key)

    # No gradient flows into the regression's targets.
    target = jax.lax.stop_gradient(regression_targets(module, hidden, x, images, batch))
    error = jnp.square(module.regress(hidden).astype(jnp.float32) - target)
    errors = jnp.mean(error, axis=-1)
    token_losses = module.llama.token_losses(hidden, following(batch["tokens"]), block=loss_block)
    return (
        masked_mean(token_losses, masks["text"], targets.get("text")),
        masked_mean(errors, masks["regression"], targets.get("regression")),
    )


def hidden_states(
    module: EmuModel,
    images: Float[Array, "B I N E"],
    batch: Batch,
    dropout_key: Key[Array, ""] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """Returns the language model's states of packed rows, and the embeddings that it read."""
    x = module.embed(batch["tokens"], images, batch["embedding_index"])
    hidden = module.llama(x, batch["positions"], batch["segment_ids"], dropout_key=dropout_key)
    return hidden, x


def regression_targets(
    module: EmuModel,
    hidden: Float[Array, "B T D"],
    x: Float[Array, "B T D"],
    images: Float[Array, "B I N E"],
    batch: Batch,
) -> Float[Array, "B T E"]:
    """Returns the embedding that the state at each position regresses, that of the next position,
    in float32. `hidden` and `x` are what `hidden_states` returned."""
    targets = module.regression_targets(x, images, batch["embedding_index"])
    if context_ways() > 1:
        # Devices exchange the targets at the borders of their tokens, and the states in the layers.
        targets = kernels().order_exchanges(hidden, targets)
    return following(targets).astype(jnp.float32)


def target_masks(module: EmuModel, batch: Batch) -> Metrics:
    """Returns the masks of the targets, of text and of regression, [B, T]."""
    regression = module.regression_mask(
        batch["tokens"], batch["segment_ids"], batch["embedding_index"], batch["image_scored"]
    )
    return {"text": text_mask(batch), "regression": whole_rows(regression)}


def masked_mean(
    values: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    count: Real[Array, ""] | float | None = None,
) -> Float[Array, ""]:
    """Returns the mean where `mask` holds, or the sum there over `count`. 0 if it holds nowhere."""
    count = jnp.sum(mask) if count is None else count
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.where(count > 0, count, 1)


def text_sums(losses: Float[Array, "B T"], mask: Bool[Array, "B T"], batch: Batch) -> Metrics:
    """Returns the sums over text targets by row, [B]: of their losses, their bytes, and 1."""
    return {
        "text_loss": jnp.sum(jnp.where(mask, losses, 0), axis=1),
        "text_bytes": jnp.sum(jnp.where(mask, following(batch["text_bytes"]), 0), axis=1),
        "text_targets": jnp.sum(mask, axis=1),
    }


def text_metrics(sums: Sums) -> dict[str, float]:
    """Returns the metrics of sums over text targets. Only special tokens have no bytes."""
    count, loss = sums["text_targets"], sums["text_loss"]
    if not count:
        return {}
    bits = {"bits_per_byte": loss / math.log(2) / sums["text_bytes"]} if sums["text_bytes"] else {}
    return {
        "text_loss": loss / count,
        "perplexity": math.exp(min(loss / count, MAX_EXPONENT)),
        **bits,
        "text_targets": count,
    }


def regression_sums(
    regressed: Float[Array, "B T D"], target: Float[Array, "B T D"], mask: Bool[Array, "B T"]
) -> Metrics:
    """Returns the sums over regression targets by row, [B], and the mean target of the batch."""
    each = jnp.sum(mask)
    mean = jnp.sum(jnp.where(mask[..., None], target, 0), axis=(0, 1)) / jnp.where(
        each > 0, each, 1
    )
    norms = jnp.linalg.norm(regressed, axis=-1) * jnp.linalg.norm(target, axis=-1)
    values = {
        "regression_loss": jnp.mean(jnp.square(regressed - target), axis=-1),
        "cosine_similarity": jnp.sum(regressed * target, axis=-1) / jnp.maximum(norms, 1e-30),
        TARGET_SPREAD: jnp.sum(jnp.square(target - mean), axis=-1),
        "regression_targets": jnp.ones(mask.shape, jnp.int32),
    }
    sums = {name: jnp.sum(jnp.where(mask, v, 0), axis=1) for name, v in values.items()}
    return sums | {TARGET_MEAN: mean}


def add_statistics(total: dict[str, Any], statistics: Mapping[str, np.ndarray], count: int) -> None:
    """Adds the statistics of a batch's first `count` rows to sums over batches, in float64."""
    rows = {
        name: float(np.sum(values[:count], dtype=np.float64))
        for name, values in statistics.items()
        if name != TARGET_MEAN
    }
    if TARGET_MEAN in statistics:
        # Means of batches differ, so sums of squares are taken around zero, in float64.
        targets, mean = rows["regression_targets"], statistics[TARGET_MEAN].astype(np.float64)
        rows[TARGET_SQUARES] = rows.pop(TARGET_SPREAD) + targets * float(mean @ mean)
        total[TARGET_SUM] = total.get(TARGET_SUM, 0.0) + targets * mean
    for name, value in rows.items():
        total[name] = total.get(name, 0.0) + value


def regression_metrics(sums: Sums) -> dict[str, float]:
    """Returns the metrics of sums over regression targets.

    `explained_variance` is 1 - (squared error) / (variance of the targets around their mean), over
    all targets and entries: 1 is perfect, 0 as good as the mean.
    """
    count = sums["regression_targets"]
    if not count:
        return {}
    total = sums[TARGET_SUM]
    variance = sums[TARGET_SQUARES] - float(total @ total) / count
    error = sums["regression_loss"] * len(total)
    explained = {"explained_variance": 1 - error / variance} if variance > 0 else {}
    return {
        "regression_loss": sums["regression_loss"] / count,
        "cosine_similarity": sums["cosine_similarity"] / count,
        **explained,
        "regression_targets": count,
    }


def row_keys(key: Key[Array, ""], rows: int) -> Key[Array, "B"]:
    """Returns a key for each row of a batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def row_normal(keys: Key[Array, "B"], shape: tuple[int, ...]) -> Float[Array, "B *_"]:
    """Returns noise of `shape`, each row from its key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape[1:]))(keys)


def spread(
    images: Float[Array, "B I N D"], valid: Bool[Array, "B I"], max_images: int = 64
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Measures how much images differ: the mean variance of an embedding's entries over images,
    and the effective rank (exponential of the entropy of the covariance's normalized spectrum;
    Roy and Vetterli 2007) of whole images. A collapsing Causal Transformer drives both down.

    Compares at most the first `max_images` images.
    """
    images = jax.lax.stop_gradient(images)
    first = jnp.argsort(~valid.reshape(-1), stable=True)[:max_images]
    x = images.reshape(-1, images.shape[2] * images.shape[3])[first]
    weight = valid.reshape(-1, 1)[first].astype(jnp.float32)
    count = jnp.maximum(jnp.sum(weight), 1)
    x = (x - jnp.sum(x * weight, 0) / count) * weight
    variance = jnp.sum(jnp.square(x)) / (count * x.shape[1])
    # The Gram matrix has the spectrum of the covariance.
    gram = jnp.matmul(x, x.T, precision="highest")
    spectrum = jnp.clip(jnp.linalg.eigvalsh(gram), 0)
    p = spectrum / jnp.maximum(jnp.sum(spectrum), 1e-30)
    return variance, jnp.exp(-jnp.sum(p * jnp.log(jnp.maximum(p, 1e-30))))


class ClipObjective(Objective):
    """Contrastive pretraining of the visual encoder on images and captions
    (Radford et al. 2021). Images whose captions are equal are positives of each other."""

    batch_kind = "captions"

    def build(self, rngs: nnx.Rngs) -> CLIP:
        return CLIP(self.cfg.model, remat=self.cfg.remat.visual, rngs=rngs)

    def loss(
        self, module: CLIP, batch: Batch, key: Key[Array, ""], targets: Metrics | None = None
    ) -> tuple[Float[Array, ""], Metrics]:
        logits, equal, scale = self._compare(module, batch)
        target = equal / jnp.sum(equal, axis=1, keepdims=True)
        loss = (
            jnp.mean(optax.softmax_cross_entropy(logits, target))
            + jnp.mean(optax.softmax_cross_entropy(logits.T, target))
        ) / 2
        best = jnp.take_along_axis(equal, jnp.argmax(logits, axis=1)[:, None], axis=1)
        return loss, {"retrieval": jnp.mean(best), "temperature": 1 / scale}

    def _compare(
        self, module: CLIP, batch: Batch
    ) -> tuple[Float[Array, "B B"], Bool[Array, "B B"], Float[Array, ""]]:
        """Returns the logits of images (rows) and captions, where captions are equal, and the
        inverse temperature."""
        dtype = jnp.dtype(self.cfg.dtype)
        image = module.visual.clip_embedding(normalize_images(batch["images"], dtype))
        text = module.text(batch["tokens"], batch["valid"], dtype)
        image, text = (x.astype(jnp.float32) for x in (image, text))
        image, text = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (image, text))
        scale = jnp.exp(jnp.minimum(module.logit_scale[...], jnp.log(100.0)))
        logits = scale * image @ text.T
        equal = jnp.all(batch["tokens"][:, None] == batch["tokens"][None, :], axis=-1)
        return logits, equal, scale

    def held_out(
        self, module: CLIP, batch: Batch, rows: Bool[Array, "B"], key: Key[Array, ""]
    ) -> Metrics:
        logits, equal, _ = self._compare(module, batch)
        equal &= rows[:, None] & rows[None, :]
        target = equal / jnp.maximum(jnp.sum(equal, axis=1, keepdims=True), 1)
        # A large finite number, since 0 * -inf is not 0.
        of_image = jnp.where(rows[None, :], logits, NEVER)
        of_text = jnp.where(rows[None, :], logits.T, NEVER)
        loss = optax.softmax_cross_entropy(of_image, target)
        loss += optax.softmax_cross_entropy(of_text, target)
        best = jnp.take_along_axis(equal, jnp.argmax(of_image, axis=1)[:, None], axis=1)
        return {"loss": loss / 2, "retrieval": best[:, 0], "rows": jnp.ones_like(loss)}

    def held_out_metrics(self, sums: Sums) -> dict[str, float]:
        return row_means(sums, "loss", "retrieval")


class Autoencoder(nnx.Module):
    """The autoencoder alone, under the name it has in Emu."""

    def __init__(self, cfg: TrainConfig, rngs: nnx.Rngs) -> None:
        assert cfg.model.vae
        self.vae = VAE(cfg.model.vae, rngs=rngs)


class VaeObjective(Objective):
    """The autoencoder: squared error and a light KL term (Rombach et al. 2022, without the
    adversarial and perceptual terms)."""

    batch_kind = "images"
    reads_targets = True

    def __init__(self, cfg: TrainConfig) -> None:
        super().__init__(cfg)
        if cfg.model.vae is None:
            raise UserError("the vae objective needs model.vae")

    def build(self, rngs: nnx.Rngs) -> Autoencoder:
        return Autoencoder(self.cfg, rngs)

    def loss(
        self, module: Autoencoder, batch: Batch, key: Key[Array, ""], targets: Metrics | None = None
    ) -> tuple[Float[Array, ""], Metrics]:
        cfg = self.cfg
        images = to_signed(batch["images"], cfg)
        painted, mean, logvar, latents = self._reconstruct(
            module, images, lambda shape: jax.random.normal(key, shape)
        )
        error = jnp.mean(jnp.square(painted - images.astype(jnp.float32)))
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

    def _reconstruct(
        self,
        module: Autoencoder,
        images: Float[Array, "B Hh Ww 3"],
        normal: Callable[[tuple[int, ...]], Float[Array, "B h w C"]],
    ) -> tuple[
        Float[Array, "B Hh Ww 3"],
        Float[Array, "B h w C"],
        Float[Array, "B h w C"],
        Float[Array, "B h w C"],
    ]:
        """Returns the reconstructed images, and the mean, log variance and sample of the latents,
        given the function that samples the noise."""
        mean, logvar = module.vae.encode(images)
        noise = normal(mean.shape).astype(mean.dtype)
        latents = mean + jnp.exp(logvar / 2) * noise
        return module.vae.decode(latents).astype(jnp.float32), mean, logvar, latents

    def held_out(
        self, module: Autoencoder, batch: Batch, rows: Bool[Array, "B"], key: Key[Array, ""]
    ) -> Metrics:
        images, keys = to_signed(batch["images"], self.cfg), row_keys(key, len(rows))
        painted, mean, logvar, _ = self._reconstruct(
            module, images, lambda shape: row_normal(keys, shape)
        )
        error = jnp.mean(jnp.square(painted - images.astype(jnp.float32)), axis=(1, 2, 3))
        mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
        divergence = jnp.square(mean) + jnp.exp(logvar) - 1 - logvar
        kl = jnp.mean(divergence, axis=(1, 2, 3))
        return {"squared_error": error, "kl": kl / 2, "rows": jnp.ones_like(error)}

    def held_out_metrics(self, sums: Sums) -> dict[str, float]:
        means = row_means(sums, "squared_error", "kl")
        loss = means["squared_error"] + self.cfg.kl_weight * means["kl"]
        psnr = 10 * math.log10(4 / max(means["squared_error"], 1e-30))
        return {"loss": loss, **means, "psnr": psnr}

    def trained_model(self, metrics: dict[str, float]) -> EmuConfig:
        """Sets the scaling factor that gives latents unit variance, as Stable Diffusion does."""
        model = self.cfg.model
        assert model.vae is not None
        vae = dataclasses.replace(model.vae, scaling_factor=round(1 / metrics["latent_std"], 5))
        return dataclasses.replace(model, vae=vae)


class DecoderObjective(Objective):
    """Denoising of an image's latents by the U-Net, given the embeddings that the frozen model
    regresses after the image's context (paper section 2.3, visual decoding).
    """

    batch_kind = "contexts"
    reads_targets = True

    def __init__(self, cfg: TrainConfig) -> None:
        super().__init__(cfg)
        if cfg.model.unet is None or cfg.model.vae is None:
            raise UserError(f"the {cfg.objective} objective needs model.unet and model.vae")

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return EmuModel(self.cfg.model, remat=self.cfg.remat, rngs=rngs)

    def conditions_and_latents(
        self, module: EmuModel | UNetOnly, batch: Batch
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B h w C"]]:
        """Returns the conditions [B, N, D] and latents [B, h, w, C] of a batch.

        Here the frozen model computes them.
        """
        cfg = self.cfg
        assert not isinstance(module, UNetOnly) and module.vae and cfg.model.vae
        dtype = jnp.dtype(cfg.dtype)
        condition = self._condition(module, batch, dtype)
        mean, _ = module.vae.encode(to_signed(batch["target"], cfg))
        latents = mean * cfg.model.vae.scaling_factor
        return jax.lax.stop_gradient((condition.astype(dtype), latents))

    def _condition(self, module: EmuModel, batch: Batch, dtype: jnp.dtype) -> Float[Array, "B N D"]:
        """Returns the conditions of a batch, here the embeddings regressed after its contexts."""
        pixels = normalize_images(batch["images"], dtype)
        images = module.encode_images(pixels, frames=frames_of(batch))
        return module.regress_after(
            batch["tokens"], batch["length"], images, batch["embedding_index"]
        )

    def unconditional(self, module: EmuModel) -> Float[Array, "N D"]:
        """Returns the condition of a dropped context, `<s>[IMG]`."""
        ids = self.cfg.model.tokens
        return module.regress_after(jnp.asarray([[ids.bos, ids.img]]), jnp.asarray([2]))[0]

    def sizes(self, batch: Batch) -> Real[Array, "B 6"] | None:
        """Returns the sizes that the denoiser is conditioned on, or None if it takes none.

        Images that were squashed to a square count as whole originals of the autoencoder's size.
        """
        model = self.cfg.model
        assert model.unet and model.vae
        if not model.unet.takes_sizes:
            return None
        if "sizes" in batch:
            return batch["sizes"]
        side, rows = model.vae.sample_size, len(jax.tree.leaves(batch)[0])
        return jnp.broadcast_to(jnp.asarray([side, side, 0, 0, side, side]), (rows, 6))

    def loss(
        self,
        module: EmuModel | UNetOnly,
        batch: Batch,
        key: Key[Array, ""],
        targets: Metrics | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        condition, latents = self.conditions_and_latents(module, batch)
        time_key, noise_key = jax.random.split(key)
        schedule = self.cfg.model.scheduler
        times = jax.random.randint(time_key, latents.shape[:1], 0, schedule.num_train_timesteps)
        noise = self._noise(noise_key, latents.shape, jax.random.normal)
        error = self._errors(module, condition, latents, self.sizes(batch), times, noise)
        return jnp.mean(error), {"condition_std": jnp.std(condition.astype(jnp.float32))}

    def _noise(
        self,
        key: Key[Array, ""],
        shape: tuple[int, ...],
        normal: Callable[[Key[Array, ""], tuple[int, ...]], Float[Array, "B *_"]],
    ) -> Float[Array, "B h w C"]:
        """Returns noise for latents of `shape`, given the function that samples it."""
        if not self.cfg.noise_offset:
            return normal(key, shape)
        key, offset_key = jax.random.split(key)
        offset = normal(offset_key, (shape[0], 1, 1, shape[3]))
        return normal(key, shape) + self.cfg.noise_offset * offset

    def _errors(
        self,
        module: EmuModel | UNetOnly,
        condition: Float[Array, "B N D"],
        latents: Float[Array, "B h w C"],
        sizes: Real[Array, "B 6"] | None,
        times: Int[Array, "B"],
        noise: Float[Array, "B h w C"],
    ) -> Float[Array, "B h w C"]:
        """Returns the denoiser's squared errors."""
        schedule, dtype = self.cfg.model.scheduler, jnp.dtype(self.cfg.dtype)
        noise = noise.astype(dtype)
        noisy = diffusion.add_noise(schedule, latents, noise, times)
        target = diffusion.denoiser_target(schedule, latents, noise, times).astype(jnp.float32)
        assert module.unet is not None
        return jnp.square(module.unet(noisy, times, condition, sizes).astype(jnp.float32) - target)

    def held_out(
        self, module: EmuModel | UNetOnly, batch: Batch, rows: Bool[Array, "B"], key: Key[Array, ""]
    ) -> Metrics:
        condition, latents = self.conditions_and_latents(module, batch)
        time_key, noise_key = jax.random.split(key)
        steps = self.cfg.model.scheduler.num_train_timesteps
        times = jax.vmap(lambda key: jax.random.randint(key, (), 0, steps))(
            row_keys(time_key, len(rows))
        )
        noise = self._noise(
            noise_key, latents.shape, lambda key, shape: row_normal(row_keys(key, len(rows)), shape)
        )
        errors = self._errors(module, condition, latents, self.sizes(batch), times, noise)
        error = jnp.mean(errors, axis=(1, 2, 3))
        return {"loss": error, "rows": jnp.ones_like(error)}

    def held_out_metrics(self, sums: Sums) -> dict[str, float]:
        return row_means(sums, "loss")


class PainterObjective(DecoderObjective):
    """Denoising of an image's latents by the U-Net, given the frozen encoder's features of that
    image: the decoder as an autoencoder, without the language model (Emu2, section 2.2.3).

    A dropped image is painted from the features of the null image, zeros after normalization.
    """

    batch_kind = "views"
    has_all_towers = False

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        cfg = self.cfg
        backend = cfg.attention
        return EmuModel(cfg.model, language=False, remat=cfg.remat, backend=backend, rngs=rngs)

    def _condition(self, module: EmuModel, batch: Batch, dtype: jnp.dtype) -> Float[Array, "B N D"]:
        pixels = normalize_images(batch["images"], dtype)
        return module.encode_images(jnp.where(batch["dropped"][:, None, None, None], 0, pixels))

    def unconditional(self, module: EmuModel) -> Float[Array, "N D"]:
        """Returns the condition of a dropped image, the null image's."""
        side = self.cfg.model.vision.image_size
        return module.encode_images(jnp.zeros((1, side, side, 3), jnp.dtype(self.cfg.dtype)))[0]


class LatentDecoderObjective(DecoderObjective):
    """Denoising by the U-Net, on conditions and latents that `precompute` wrote. The module is the
    U-Net alone."""

    has_all_towers = False

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return UNetOnly(self.cfg, rngs)

    def batch_shapes(self) -> ArrayShapes:
        rows = self.cfg.data.batch_size
        model = self.cfg.model
        condition, latents = latent_shapes(model)
        shapes: ArrayShapes = {
            "condition": ((rows, *condition), jnp.bfloat16),
            "latents": ((rows, *latents), jnp.bfloat16),
        }
        if model.unet and model.unet.takes_sizes:
            shapes["sizes"] = ((rows, 6), jnp.int32)
        return shapes

    def prepare_data(self) -> Tokenizer:
        return self.load_tokenizer()

    def load_tokenizer(self) -> Tokenizer:
        return Tokenizer.load(as_path(self.cfg.latents) / "tokenizer")

    def mismatches(self, tokenizer: Tokenizer | None) -> list[str]:
        return []  # the latents fix the sizes, and `LatentBatches` checks them

    def batches(
        self, tokenizer: Tokenizer, shares: RowShares, resumed: bool = False
    ) -> LatentBatches:
        folder = as_path(self.cfg.latents)
        return LatentBatches(folder, self.cfg.data, self.cfg.model, shares.numbers, shares.count)

    def conditions_and_latents(
        self, module: EmuModel | UNetOnly, batch: Batch
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B h w C"]]:
        dtype = jnp.dtype(self.cfg.dtype)
        return batch["condition"].astype(dtype), batch["latents"].astype(dtype)


def row_means(sums: Sums, *names: str) -> dict[str, float]:
    """Returns the means over rows, and the number of rows."""
    return {name: sums[name] / sums["rows"] for name in names} | {"rows": sums["rows"]}


def to_signed(images: UInt8[Array, "B Hh Ww 3"], cfg: TrainConfig) -> Float[Array, "B Hh Ww 3"]:
    """Converts bytes to [-1, 1], the autoencoder's range."""
    return (images.astype(jnp.float32) / 127.5 - 1).astype(jnp.dtype(cfg.dtype))


OBJECTIVES: dict[str, type[Objective]] = {
    "emu": EmuObjective,
    "text": TextObjective,
    "clip": ClipObjective,
    "vae": VaeObjective,
    "decoder": DecoderObjective,
    "painter": PainterObjective,
}


def objective_class(cfg: TrainConfig) -> type[Objective]:
    """Returns the class of a run's objective."""
    return LatentDecoderObjective if cfg.latents else OBJECTIVES[cfg.objective]


def get_objective(cfg: TrainConfig) -> Objective:
    """Returns the objective of a run.

    Raises:
        UserError: the objective is unknown, or does not fit the config.
    """
    return objective_class(cfg)(cfg)
