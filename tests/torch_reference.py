"""The stages of training written once more, as plain PyTorch in float64.

Parameters keep the names and layouts of this package ({dotted path: tensor}), so nothing has to be
converted. The language model reads each document alone, in a row of its own: that packing does not
mix documents is part of what a comparison shows. The U-Net and the autoencoder are diffusers'.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from typing import Any

import diffusers
import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from transformers.models.t5.modeling_t5 import T5Attention

from emu_jax.models.eva_clip import CLIP_MEAN, CLIP_STD

Tensors = dict[str, torch.Tensor]


# --- Optimizer -----------------------------------------------------------------------------------


def decays(path: str) -> bool:
    """Weight decay is for matrices and tables: not for biases, norms and single vectors."""
    return not re.search(r"(bias|\.scale|cls_token|logit_scale)$", path)


def rate(group: Any, step: int, steps: int) -> float:
    """The learning rate of the update that follows `step` finished steps."""
    start = group.delay_steps + group.warmup_steps
    if step < group.delay_steps:
        return 0.0
    if step < start:
        return group.lr * (step - group.delay_steps) / group.warmup_steps
    assert group.decay == "cosine"
    cosine = (1 + math.cos(math.pi * (step - start) / (steps - start))) / 2
    return group.lr * (group.final_fraction + (1 - group.final_fraction) * cosine)


class Loop:
    """A plain training loop: AdamW with parameter groups, clipping, a schedule, an EMA."""

    def __init__(self, cfg: Any, loss: Any, params: dict[str, np.ndarray]):
        self.cfg, self.loss = cfg, loss
        self.params: Tensors = {k: torch.tensor(np.float64(v)) for k, v in params.items()}
        groups: dict[Any, list[str]] = {}
        for path in self.params:
            group = next(g for g in cfg.optimizer.groups if re.search(g.pattern, path))
            groups.setdefault((group, decays(path)), []).append(path)
        groups = {key: paths for key, paths in groups.items() if key[0].lr > 0}
        self.trained = [path for paths in groups.values() for path in paths]
        for path in self.trained:
            self.params[path].requires_grad_()
        o = cfg.optimizer
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [self.params[path] for path in paths],
                    "weight_decay": o.weight_decay if decay else 0.0,
                }
                for (_, decay), paths in groups.items()
            ],
            lr=1.0,
            betas=(o.b1, o.b2),
            eps=o.eps,
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, [lambda n, g=g: rate(g, n, cfg.steps) for g, _ in groups]
        )
        self.ema = {path: self.params[path].detach().clone() for path in self.trained}
        self.steps = 0

    def step(self, batch: dict[str, np.ndarray], drawn: dict[str, np.ndarray]) -> dict[str, float]:
        """One update; `drawn` are the random numbers of the step, by name."""
        tensors = {k: torch.tensor(np.asarray(v)) for k, v in (batch | drawn).items()}
        loss, metrics = self.loss(self.cfg, self.params, tensors)
        self.optimizer.zero_grad()
        loss.backward()
        for path in self.trained:  # AdamW passes over what has no gradient, without its decay
            if self.params[path].grad is None:
                self.params[path].grad = torch.zeros_like(self.params[path])
        squares: dict[str, float] = {}  # of the gradients, by tower
        for path in self.trained if self.cfg.tower_metrics else ():
            tower = path.split(".")[0]
            squares[tower] = squares.get(tower, 0.0) + self.params[path].grad.square().sum().item()
        norm = clip_grad_norm_([self.params[p] for p in self.trained], self.cfg.optimizer.clip_norm)
        self.optimizer.step()
        self.scheduler.step()
        decay = min(self.cfg.ema_decay, (1 + self.steps) / (10 + self.steps))
        for path in self.trained:
            self.ema[path] = decay * self.ema[path] + (1 - decay) * self.params[path].detach()
        self.steps += 1
        norms = {f"grad_norm/{tower}": math.sqrt(total) for tower, total in squares.items()}
        metrics = {"loss": loss, "grad_norm": norm, **metrics}
        return norms | {name: value.item() for name, value in metrics.items()}


# --- Towers --------------------------------------------------------------------------------------


def layer(p: Tensors, prefix: str, n: int) -> Tensors:
    return {k.removeprefix(prefix): v[n] for k, v in p.items() if k.startswith(prefix)}


def split(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def join(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(-3, -2).flatten(-2)


def rms_norm(x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, scale.shape, scale, eps)


def pixels_of(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (CLIP_MEAN, CLIP_STD))
    return (images.double() / 255 - mean) / std


def vision(p: Tensors, cfg: Any, pixels: torch.Tensor) -> torch.Tensor:
    """[B, h, w, 3] to features [B, 1 + patches, D]."""
    size, heads = cfg.patch_size, cfg.width // cfg.head_width
    kernel = p["visual.patch_embed.kernel"].reshape(size, size, 3, -1).permute(3, 2, 0, 1)
    x = F.conv2d(pixels.permute(0, 3, 1, 2), kernel, p["visual.patch_embed.bias"], stride=size)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([p["visual.cls_token"].expand(len(x), 1, -1), x], 1) + p["visual.pos_embed"]
    for n in range(cfg.layers):
        b = layer(p, "visual.blocks.", n)
        y = F.layer_norm(x, (cfg.width,), b["norm1.scale"], b["norm1.bias"], cfg.eps)
        q, k, v = (y @ b["attn.qkv"][:, i] for i in range(3))
        q, v = q + b["attn.q_bias"], v + b["attn.v_bias"]
        y = F.scaled_dot_product_attention(*(split(a, heads) for a in (q, k, v)))
        x = x + join(y) @ b["attn.proj.kernel"] + b["attn.proj.bias"]
        y = F.layer_norm(x, (cfg.width,), b["norm2.scale"], b["norm2.bias"], cfg.eps)
        y = F.gelu(y @ b["mlp.fc1.kernel"] + b["mlp.fc1.bias"])
        x = x + y @ b["mlp.fc2.kernel"] + b["mlp.fc2.bias"]
    return x


def cformer(p: Tensors, cfg: Any, features: torch.Tensor) -> torch.Tensor:
    """Features to N causal embeddings: a T5 decoder without its scale of attention."""
    at = torch.arange(cfg.n_causal)
    buckets = T5Attention._relative_position_bucket(
        at[None] - at[:, None],
        bidirectional=False,
        num_buckets=cfg.relative_buckets,
        max_distance=cfg.relative_max_distance,
    )
    bias = p["cformer.relative_attention_bias"][buckets].permute(2, 0, 1)
    bias = bias.masked_fill(at[None] > at[:, None], -math.inf)

    def attend(b: Tensors, x: torch.Tensor, memory: torch.Tensor, mask: Any) -> torch.Tensor:
        q, k, v = x @ b["q.kernel"], memory @ b["k.kernel"], memory @ b["v.kernel"]
        q, k, v = (split(a, cfg.heads) for a in (q, k, v))
        return join(F.scaled_dot_product_attention(q, k, v, mask, scale=1.0)) @ b["o.kernel"]

    x = p["cformer.causal_tokens"].expand(len(features), -1, -1)
    for n in range(cfg.layers):
        b = layer(p, "cformer.blocks.", n)
        inner, cross = (
            {k.removeprefix(name): v for k, v in b.items() if k.startswith(name)}
            for name in ("self_attention.", "cross_attention.")
        )
        y = rms_norm(x, b["self_norm.scale"], cfg.eps)
        x = x + attend(inner, y, y, bias)
        x = x + attend(cross, rms_norm(x, b["cross_norm.scale"], cfg.eps), features, None)
        y = F.relu(rms_norm(x, b["mlp_norm.scale"], cfg.eps) @ b["wi.kernel"])
        x = x + y @ b["wo.kernel"]
    x = rms_norm(x, p["cformer.final_layer_norm.scale"], cfg.eps)
    x = x @ p["cformer.projection.kernel"] + p["cformer.projection.bias"]
    return F.layer_norm(x, x.shape[-1:], eps=cfg.eps) if cfg.normalize else x


def llama_blocks(p: Tensors, prefix: str, cfg: Any, x: torch.Tensor) -> torch.Tensor:
    """Rows of one document each, from position 0; padding may follow."""
    half = cfg.head_width // 2
    inverse = cfg.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[1])[:, None] * inverse
    rounded = getattr(torch, cfg.rope_dtype)
    cos, sin = (wave.float().to(rounded).double() for wave in (angle.cos(), angle.sin()))

    def turn(a: torch.Tensor) -> torch.Tensor:
        first, second = a[..., :half], a[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def linear(b: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
        y = x @ b[f"{name}.kernel"]
        if f"{name}.lora_a" in b:
            low = x @ b[f"{name}.lora_a"] @ b[f"{name}.lora_b"]
            y = y + cfg.lora.alpha / cfg.lora.rank * low
        return y

    for n in range(cfg.layers):
        b = layer(p, prefix, n)
        y = rms_norm(x, b["input_layernorm.scale"], cfg.eps)
        q, k, v = (split(linear(b, f"self_attn.{c}_proj", y), cfg.heads) for c in "qkv")
        y = join(F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True))
        x = x + linear(b, "self_attn.o_proj", y)
        y = rms_norm(x, b["post_attention_layernorm.scale"], cfg.eps)
        y = F.silu(linear(b, "mlp.gate_proj", y)) * linear(b, "mlp.up_proj", y)
        x = x + linear(b, "mlp.down_proj", y)
    return x


def llama(p: Tensors, cfg: Any, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(llama_blocks(p, "llama.layers.", cfg, x), p["llama.norm.scale"], cfg.eps)


def embeddings_of(p: Tensors, model: Any, images: torch.Tensor) -> torch.Tensor:
    """[B, I, h, w, 3] to [B, I, N, D]."""
    flat = vision(p, model.vision, pixels_of(images.flatten(0, 1)))
    flat = F.layer_norm(
        flat, flat.shape[-1:], p["ln_visual.scale"], p["ln_visual.bias"], model.vision.eps
    )
    return cformer(p, model.cformer, flat).unflatten(0, images.shape[:2])


def inputs_of(
    p: Tensors, tokens: torch.Tensor, embedding_index: torch.Tensor, images: torch.Tensor
):
    """Embedded rows [B, T, D]."""
    x = p["llama.embed_tokens.embedding"][tokens].clone()
    flat = images.flatten(1, 2)
    for row in range(len(tokens)):
        here = embedding_index[row] >= 0
        x[row, here] = flat[row, embedding_index[row, here]]
    return x


# diffusers' name -> ours, where they differ.
RENAMED = (
    (".to_out.0.", ".to_out."),
    (".ff.net.0.proj.", ".ff.proj."),
    (".ff.net.2.", ".ff.out."),
)


@functools.cache
def diffusers_model(cls: Any, config: str) -> Any:
    """Without parameters of its own. One for each configuration: making them is slow."""
    with torch.device("meta"):
        return cls(**json.loads(config))


def call_diffusers(
    cls: Any, config: dict[str, Any], p: Tensors, tower: str, method: str, *inputs: torch.Tensor
) -> Any:
    """A method of a diffusers model, with our parameters of a tower."""
    model = diffusers_model(cls, json.dumps(config))
    state = {}
    for name, parameter in model.named_parameters():
        path = f"{tower}.{name}"
        for old, new in RENAMED:
            path = path.replace(old, new)
        if path not in p:
            stem = path.removesuffix(".weight")
            path = f"{stem}.scale" if f"{stem}.scale" in p else f"{stem}.kernel"
        value = p[path]
        value = value.T if value.ndim == 2 else value
        value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value
        assert value.shape == parameter.shape, (name, value.shape, parameter.shape)
        state[name] = value
    # `functional_call` calls `forward`; the autoencoder has two methods that are of use.
    with torch.nn.utils.stateless._reparametrize_module(model, state, strict=True):
        return getattr(model, method)(*inputs)


def autoencoder(p: Tensors, cfg: Any, method: str, inputs: torch.Tensor) -> Any:
    levels = len(cfg.block_out_channels)
    config = dataclasses.asdict(cfg) | {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    return call_diffusers(diffusers.AutoencoderKL, config, p, "vae", method, inputs)


def signed(images: torch.Tensor) -> torch.Tensor:
    return images.double().permute(0, 3, 1, 2) / 127.5 - 1


# --- Losses --------------------------------------------------------------------------------------


def emu_loss(cfg: Any, p: Tensors, batch: Tensors) -> tuple[torch.Tensor, Tensors]:
    """Cross-entropy of text and l2 regression of visual embeddings, document by document."""
    model, ids = cfg.model, cfg.model.tokens
    images = embeddings_of(p, model, batch["images"])
    x = inputs_of(p, batch["tokens"], batch["embedding_index"], images)
    rows, targets, scored, regressed = [], [], [], []
    for row, segments in enumerate(batch["segment_ids"]):
        for segment in segments.unique():
            if segment == 0:  # padding
                continue
            at = (segments == segment).nonzero()[:, 0]
            tokens = batch["tokens"][row, at]
            assert batch["positions"][row, at].tolist() == list(range(len(at)))
            embedding_index = batch["embedding_index"][row, at]
            image = embedding_index.clamp(min=0) // model.cformer.n_causal
            wanted = batch["image_scored"][row][image]
            # The first embedding follows [IMG], [/IMG] follows the last.
            opens = torch.zeros(len(at), dtype=torch.bool)
            for n in range(len(at) - 1):
                inside = embedding_index[n] >= 0
                before = tokens[n] == ids.img and embedding_index[n + 1] >= 0
                opens[n] = (inside and wanted[n]) or (before and wanted[n + 1])
            rows.append(x[row, at])
            targets.append(tokens)
            scored.append(batch["text_loss_mask"][row, at])
            regressed.append(opens)
    pad = torch.nn.utils.rnn.pad_sequence
    x, tokens = pad(rows, batch_first=True), pad(targets, batch_first=True)
    scored, regressed = pad(scored, batch_first=True), pad(regressed, batch_first=True)
    hidden = llama(p, model.llama, x)

    logits = (hidden @ p["llama.lm_head.kernel"])[:, :-1, : model.llama.vocab_size]
    labels = tokens[:, 1:].long().masked_fill(~scored[:, 1:], -100)
    words = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    found = (hidden @ p["llama.stu_regress_head.kernel"])[:, :-1][regressed[:, :-1]]
    regression = F.mse_loss(found, x[:, 1:][regressed[:, :-1]].detach())

    valid = images[batch["image_valid"]].detach().flatten(1)
    spectrum = torch.linalg.svdvals(valid - valid.mean(0)).square()
    share = spectrum / spectrum.sum()
    return cfg.text_weight * words + cfg.regression_weight * regression, {
        "text_loss": words,
        "regression_loss": regression,
        "embedding_variance": valid.var(0, correction=0).mean(),
        "embedding_rank": torch.special.entr(share).sum().exp(),
    }


def clip_loss(cfg: Any, p: Tensors, batch: Tensors) -> tuple[torch.Tensor, Tensors]:
    """Softmax over captions and over images; equal captions share the target."""
    model = cfg.model
    image = vision(p, model.vision, pixels_of(batch["images"]))[:, 0]
    image = F.layer_norm(
        image, image.shape[-1:], p["visual.norm.scale"], p["visual.norm.bias"], model.vision.eps
    )
    image = image @ p["visual.head.kernel"] + p["visual.head.bias"]
    width = model.vision.clip_width
    tower = dataclasses.replace(
        model.llama, width=width, layers=2, heads=width // 32, rope_dtype="bfloat16"
    )
    x = p["text.embed_tokens.embedding"][batch["tokens"]]
    x = llama_blocks(p, "text.layers.", tower, x)
    last = torch.stack([row[valid][-1] for row, valid in zip(x, batch["valid"], strict=True)])
    text = rms_norm(last, p["text.norm.scale"], tower.eps) @ p["text.projection.kernel"]
    logits = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T * p["logit_scale"].exp()
    equal = (batch["tokens"][:, None] == batch["tokens"][None]).all(-1)
    target = equal.double() / equal.sum(1, keepdim=True)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target.T)) / 2
    best = equal[torch.arange(len(equal)), logits.argmax(1)].double().mean()
    return loss, {"retrieval": best, "temperature": 1 / p["logit_scale"].exp()}


def vae_loss(cfg: Any, p: Tensors, batch: Tensors) -> tuple[torch.Tensor, Tensors]:
    vae, pixels = cfg.model.vae, signed(batch["images"])
    posterior = autoencoder(p, vae, "encode", pixels).latent_dist
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(posterior.mean, posterior.std), normal(0, 1))
    latents = posterior.mean + posterior.std * batch["normal"].double().permute(0, 3, 1, 2)
    error = F.mse_loss(autoencoder(p, vae, "decode", latents).sample, pixels)
    return error + cfg.kl_weight * kl.mean(), {
        "squared_error": error,
        "kl": kl.mean(),
        "psnr": 20 * torch.log10(2 / error.sqrt()),
        "latent_std": latents.std(correction=0),
    }


def condition_of(cfg: Any, p: Tensors, batch: Tensors) -> torch.Tensor:
    """The N embeddings that follow each context, the whole row computed again for each."""
    n, rows = cfg.model.n_embeddings, torch.arange(len(batch["tokens"]))
    images = embeddings_of(p, cfg.model, batch["images"])
    x = F.pad(inputs_of(p, batch["tokens"], batch["embedding_index"], images), (0, 0, 0, n))
    for i in range(n):
        hidden = llama(p, cfg.model.llama, x)[rows, batch["length"] - 1 + i]
        x[rows, batch["length"] + i] = hidden @ p["llama.stu_regress_head.kernel"]
    return torch.stack([x[rows, batch["length"] + i] for i in range(n)], 1)


def decoder_loss(cfg: Any, p: Tensors, batch: Tensors) -> tuple[torch.Tensor, Tensors]:
    """The U-Net names the noise in an image's latents."""
    with torch.no_grad():
        condition = condition_of(cfg, p, batch)
        encoded = autoencoder(p, cfg.model.vae, "encode", signed(batch["target"]))
        latents = encoded.latent_dist.mean * cfg.model.vae.scaling_factor
    noise, times = batch["normal"].double().permute(0, 3, 1, 2), batch["randint"].long()
    scheduler = diffusers.PNDMScheduler.from_config(dataclasses.asdict(cfg.model.scheduler))
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    noisy = scheduler.add_noise(latents, noise, times)
    config = dataclasses.asdict(cfg.model.unet)
    found = call_diffusers(
        diffusers.UNet2DConditionModel, config, p, "unet", "forward", noisy, times, condition
    ).sample
    return F.mse_loss(found, noise), {"condition_std": condition.std(correction=0)}


LOSSES = {"emu": emu_loss, "clip": clip_loss, "vae": vae_loss, "decoder": decoder_loss}
