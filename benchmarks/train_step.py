"""A training step of the 0.1B ladder model against the same model in PyTorch, eager and compiled.

Both train the whole model on the same batch. Each row is one document without padding, so
PyTorch's plain causal mask computes the same as our packed rows. The PyTorch model is assembled
from transformers: ViTModel, a T5 decoder (whose cross-attention reads the encoder's width, as in
Emu) and LlamaForCausalLM, with sdpa attention, the same two losses, gradient clipping, and fused
AdamW with the same groups. From the same weights and without dropout both give the same loss
(`loss_difference`). Both use all cores. They take turns with each other and with the fastest
matmul of this machine, the reference for a step.

Settings: `config` (emu_100m, emu_400m, ..., or "digits"), `rows`, `tokens` and `images`
per row, `dtype`, `remat`, `loss_block` (0 keeps all logits, as PyTorch does), `turns`, and
`compiled` (0 skips torch.compile). Without torch, or on a TPU, only our step is measured.
"""

import contextlib
import dataclasses
import gc
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from emu_jax import bench
from emu_jax.config import EmuConfig, RematConfig, digits
from emu_jax.data import DataConfig
from emu_jax.data.batches import batch_shapes
from emu_jax.errors import UserError, suggest
from emu_jax.models.eva_clip import CLIP_MEAN, CLIP_STD
from emu_jax.sharding import batch_sharding
from emu_jax.storage import shipped
from emu_jax.train.config import TrainConfig, pretraining
from emu_jax.train.config_file import load_config
from emu_jax.train.flops import train_flops
from emu_jax.train.optimizer import group_of, schedule
from emu_jax.train.step import Trainer, mesh_for

log = logging.getLogger("emu_jax")
floors = bench.load_benchmark("floors")

WAYS = {"eager": "PyTorch, eager", "compiled": "PyTorch, torch.compile"}


def run(
    config: str = "emu_100m",
    rows: int = 1,
    tokens: int = 1024,
    images: int = 8,
    dtype: str = "float32",
    remat: str = "dots",
    loss_block: int = 0,
    turns: int = 5,
    compiled: int = 1,
) -> dict:
    cfg = settings(config, rows, tokens, images, dtype, remat)
    cfg = dataclasses.replace(cfg, loss_block=loss_block)
    return measure(cfg, turns, ["eager", "compiled"] if compiled else ["eager"])


def settings(
    config: str, rows: int, tokens: int, images: int, dtype: str, remat: str
) -> TrainConfig:
    """Returns a config of configs/ at the size of a benchmark; "digits" is a small model."""
    path = shipped("configs") / f"{config}.py"
    if config == "digits":
        cfg = small()
    elif path.exists():
        cfg = load_config(TrainConfig, path, [])
    else:
        known = ["digits", *(p.stem for p in path.parent.glob("emu_*.py"))]
        raise UserError(f"no config {config!r}{suggest(config, known)}")
    llama = dataclasses.replace(cfg.model.llama, rope_dtype="float32")  # as in transformers
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, llama=llama),
        data=dataclasses.replace(cfg.data, batch_size=rows, row_tokens=tokens, row_images=images),
        dtype=dtype,
        remat=RematConfig.everywhere(remat),
    )
    return cfg


def small() -> TrainConfig:
    """Returns pretraining of the digits' model, with the parts that the ladder's have."""
    model = digits()
    assert model.cformer is not None
    cformer = dataclasses.replace(model.cformer, normalize=False)
    data = DataConfig(n_causal=model.n_embeddings, image_size=model.vision.image_size)
    model = dataclasses.replace(model, cformer=cformer, unet=None, vae=None)
    return pretraining("digits", model, data=data)


def measure(cfg: TrainConfig, turns: int, ways: Sequence[str] = tuple(WAYS)) -> dict:
    """Returns the figures of `run` for a config with the objective `emu`.

    Args:
        ways: variants of PyTorch's step to measure, of `WAYS`.
    """
    batch = documents(cfg)
    ours = Ours(cfg, batch)
    parts: dict[str, Callable[[], Any]] = {"ours": ours.step}
    figures: dict[str, Any] = {
        "config": cfg.name,
        "dtype": cfg.dtype,
        "loss_block": cfg.loss_block,
        "rows": cfg.data.batch_size,
        "row_tokens": cfg.data.row_tokens,
        "row_images": cfg.data.row_images,
        "parameters": sum(int(np.prod(s.shape)) for s in ours.trainer.param_shapes.values()),
        "model_flops": train_flops(cfg).total,
    }
    if (torch := floors.torch_here(cfg.dtype)) is None:
        log.info(
            "torch is missing or does not support this device or dtype: measuring emu_jax only"
        )
    else:
        theirs = Theirs(torch, cfg, batch)
        theirs.take(ours.weights(), cfg.model)
        losses = ours.loss(), theirs.loss()
        log.info("from the same weights: losses %.6f and %.6f", *losses)
        figures["loss_difference"] = abs(losses[0] / losses[1] - 1)
        parts |= {name: theirs.steps(compiled=name == "compiled") for name in ways}
    parts["product"] = floors.peak(cfg.dtype)
    seconds = bench.take_turns(parts, turns)
    gc.collect()

    product = seconds.pop("product")
    figures["peak_flops"] = bench.median([1 / s for s in product])
    for name, taken in seconds.items():
        figures |= {
            f"{name}_seconds": bench.median(taken),
            f"{name}_tokens_per_second": bench.median(
                [cfg.data.batch_size * cfg.data.row_tokens / s for s in taken]
            ),
            f"{name}_of_peak": bench.ratio([figures["model_flops"] * p for p in product], taken),
        }
        if name != "ours":
            figures[f"ours_over_{name}"] = bench.ratio(taken, seconds["ours"])
    return figures


def table(figures: dict) -> str:
    names = {"ours": "emu_jax"} | WAYS
    rows = [
        (
            about,
            figures[f"{name}_seconds"],
            figures[f"{name}_tokens_per_second"],
            figures[f"{name}_of_peak"],
            figures.get(f"ours_over_{name}", 1),
        )
        for name, about in names.items()
        if f"{name}_seconds" in figures
    ]
    f = figures
    sizes = (
        f"`{f['config']}`, {f['parameters'] / 1e6:.1f}M parameters, {f['dtype']}: {f['rows']} x "
        f"{f['row_tokens']:,} tokens with {f['row_images']} images per row, "
        f"{f['model_flops'] / 1e12:.2f} TFLOP of the model per step; peak "
        f"{f['peak_flops']['median'] / 1e9:,.0f} GFLOP/s."
    )
    if "loss_difference" in f:
        sizes += f" Losses from the same weights differ by {f['loss_difference']:.0e}."
    head = ("Step", "Seconds", "Tokens/s", "Fraction of peak", "Speed-up of emu_jax")
    return bench.markdown_table(head, rows) + "\n\n" + sizes


def documents(cfg: TrainConfig) -> dict[str, np.ndarray]:
    """Returns a batch whose rows are one document each, images between text, without padding."""
    data, ids = cfg.data, cfg.model.tokens
    rng = np.random.default_rng(0)
    batch = {
        name: np.zeros(shape, dtype) for name, (shape, dtype) in batch_shapes(data, "rows").items()
    }
    batch["images"][:] = rng.integers(0, 256, batch["images"].shape, np.uint8)
    tokens, embedding_index, scored = (
        batch[n] for n in ("tokens", "embedding_index", "text_loss_mask")
    )
    tokens[:] = rng.integers(3, ids.pad, tokens.shape)  # text; images are filled in below
    tokens[:, 0], embedding_index[:], scored[:] = ids.bos, -1, True
    span = data.n_causal + 2  # of one image
    room = (data.row_tokens - 1) // max(1, data.row_images)
    if room <= span:
        raise UserError(f"{data.row_tokens} tokens have no room for {data.row_images} images")
    for image in range(data.row_images):
        first = 1 + image * room
        inside = slice(first + 1, first + span - 1)
        tokens[:, first], tokens[:, inside], tokens[:, first + span - 1] = (
            ids.img,
            ids.image,
            ids.img_end,
        )
        embedding_index[:, inside] = image * data.n_causal + np.arange(data.n_causal)
        scored[:, first : first + span] = False
    batch["segment_ids"][:] = 1
    batch["positions"][:] = np.arange(data.row_tokens)
    batch["image_valid"][:] = batch["image_scored"][:] = True
    return batch


class Ours:
    """Our training step, on the first `devices` of a platform (by default JAX's)."""

    def __init__(
        self,
        cfg: TrainConfig,
        batch: dict[str, np.ndarray],
        devices: int = 1,
        platform: str | None = None,
    ):
        mesh = mesh_for(cfg, jax.devices(platform)[:devices])
        self.cfg, self.mesh = cfg, mesh
        sharding = batch_sharding(mesh)
        with self.settings():
            self.trainer = Trainer(cfg, mesh)
            self.state = self.trainer.init({})
            self.batch = {
                name: jax.make_array_from_callback(value.shape, sharding, value.__getitem__)
                for name, value in batch.items()
            }

    def settings(self):
        """Returns a context with the settings of `train.run.Run`."""
        stack = contextlib.ExitStack()
        stack.enter_context(jax.set_mesh(self.mesh))
        stack.enter_context(floors.precision(self.cfg.dtype))
        return stack

    def step(self) -> None:
        with self.settings():
            self.state, metrics = self.trainer.step(self.state, self.batch)
            jax.block_until_ready(metrics)

    def weights(self) -> dict[str, np.ndarray]:
        return {path: np.asarray(value) for path, value in self.state.trained.items()}

    def loss(self) -> float:
        """Returns the loss without dropout."""
        assert self.cfg.model.cformer is not None
        still = dataclasses.replace(self.cfg.model.cformer, dropout=0.0)
        model = dataclasses.replace(self.cfg.model, cformer=still)
        with self.settings():
            trainer = Trainer(dataclasses.replace(self.cfg, model=model), self.mesh)
            return float(jax.jit(trainer.loss)(self.state.trained, self.batch, 0)[0])


class Theirs:
    """The model assembled from transformers' modules, and its training step."""

    def __init__(self, torch: Any, cfg: TrainConfig, batch: dict[str, np.ndarray]):
        device = floors.torch_device(torch)
        self.torch, self.cfg, self.device = torch, cfg, device
        torch.manual_seed(cfg.seed)
        self.model = twin(torch, cfg).to(device)
        self.batch = {
            name: torch.from_numpy(value).to(device)
            for name, value in batch.items()
            if name in ("tokens", "images", "embedding_index", "text_loss_mask")
        }
        groups: dict[tuple[Any, bool], list[Any]] = {}
        for name, value in self.model.named_parameters():
            key = group_of(name.replace("encoder.", "visual."), cfg.optimizer), value.ndim > 1
            groups.setdefault(key, []).append(value)
        o = cfg.optimizer
        self.optimizer = torch.optim.AdamW(
            [
                {"params": values, "weight_decay": o.weight_decay * decays}
                for (_, decays), values in groups.items()
            ],
            lr=1.0,
            betas=(o.b1, o.b2),
            eps=o.eps,
            fused=True,
        )
        rates = [schedule(group, cfg.steps) for group, _ in groups]
        # Computed in advance, so that their step does not call JAX.
        tables = [[float(np.asarray(rate(step))) for step in range(64)] for rate in rates]
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, [lambda step, t=t: t[min(step, 63)] for t in tables]
        )

    def take(self, weights: dict[str, np.ndarray], model: EmuConfig) -> None:
        """Loads our weights."""
        state = {
            name: self.torch.from_numpy(np.array(value))
            for name, value in translated(weights, model).items()
        }
        self.model.load_state_dict(state, strict=True)

    def loss(self) -> float:
        """Returns the loss without dropout."""
        self.model.eval()
        with self.torch.no_grad():
            return float(self.model(**self.batch))

    def steps(self, *, compiled: bool) -> Callable[[], None]:
        torch = self.torch
        model = torch.compile(self.model) if compiled else self.model
        parameters = list(self.model.parameters())
        half = torch.autocast(
            self.device, dtype=torch.bfloat16, enabled=self.cfg.dtype == "bfloat16"
        )

        def step() -> None:
            self.model.train()
            with half:
                loss = model(**self.batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, self.cfg.optimizer.clip_norm)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad(set_to_none=True)
            loss.item()

        return step


def twin(torch: Any, cfg: TrainConfig) -> Any:
    """Returns an Emu assembled from transformers' modules."""
    import transformers
    from torch import nn
    from torch.nn import functional as F
    from transformers.models.t5.modeling_t5 import T5Stack

    vision, causal, llama, ids = (
        cfg.model.vision,
        cfg.model.cformer,
        cfg.model.llama,
        cfg.model.tokens,
    )
    assert causal is not None

    class Emu(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder: Any = transformers.ViTModel(
                transformers.ViTConfig(
                    hidden_size=vision.width,
                    num_hidden_layers=vision.layers,
                    num_attention_heads=vision.width // vision.head_width,
                    intermediate_size=vision.mlp_width,
                    image_size=vision.image_size,
                    patch_size=vision.patch_size,
                    layer_norm_eps=vision.eps,
                    hidden_dropout_prob=0.0,
                    attention_probs_dropout_prob=0.0,
                ),
                add_pooling_layer=False,
            )
            decoder: Any = T5Stack(
                transformers.T5Config(
                    d_model=causal.width,
                    d_kv=causal.head_width,
                    d_ff=causal.mlp_width,
                    num_layers=causal.layers,
                    num_heads=causal.heads,
                    vocab_size=1,
                    relative_attention_num_buckets=causal.relative_buckets,
                    relative_attention_max_distance=causal.relative_max_distance,
                    dropout_rate=causal.dropout,
                    layer_norm_epsilon=causal.eps,
                    feed_forward_proj="relu",
                    is_decoder=True,
                    is_encoder_decoder=False,
                    use_cache=False,
                    eos_token_id=None,
                    pad_token_id=None,
                )
            )
            decoder.embed_tokens = None
            inner = causal.heads * causal.head_width
            for block in decoder.block:
                cross = block.layer[1].EncDecAttention
                cross.k, cross.v = (nn.Linear(vision.width, inner, bias=False) for _ in range(2))
            self.cformer: Any = nn.Module()
            self.cformer.decoder = decoder
            self.cformer.causal_tokens = nn.Parameter(torch.zeros(causal.n_causal, causal.width))
            self.cformer.projection = nn.Linear(causal.width, llama.width)
            self.llama: Any = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    vocab_size=llama.vocab_size,
                    hidden_size=llama.width,
                    num_hidden_layers=llama.layers,
                    num_attention_heads=llama.heads,
                    intermediate_size=llama.mlp_width,
                    rms_norm_eps=llama.eps,
                    max_position_embeddings=llama.max_positions,
                    use_cache=False,
                )
            )
            self.llama.stu_regress_head = nn.Linear(llama.width, llama.width, bias=False)
            mean, std = (torch.tensor(x).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
            self.register_buffer("mean", mean, persistent=False)
            self.register_buffer("std", std, persistent=False)

        def forward(self, tokens, images, embedding_index, text_loss_mask):
            rows, count = images.shape[:2]
            pixels = images.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
            features = self.encoder((pixels - self.mean) / self.std).last_hidden_state
            queries = self.cformer.causal_tokens.expand(rows * count, -1, -1)
            causal = self.cformer.decoder(inputs_embeds=queries, encoder_hidden_states=features)
            visual = self.cformer.projection(causal.last_hidden_state)
            visual = visual.reshape(rows, -1, visual.shape[-1])

            x = self.llama.model.embed_tokens(tokens)
            where = embedding_index.clamp(min=0).long().unsqueeze(-1).expand(-1, -1, x.shape[-1])
            x = torch.where((embedding_index >= 0).unsqueeze(-1), visual.gather(1, where).to(x), x)
            hidden = self.llama.model(inputs_embeds=x).last_hidden_state

            logits = self.llama.lm_head(hidden[:, :-1]).float()
            labels = tokens[:, 1:].long().masked_fill(~text_loss_mask[:, 1:], -100)
            words = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            regressed = self.llama.stu_regress_head(hidden[:, :-1]).float()
            error = (regressed - x[:, 1:].detach().float()).square().mean(-1)
            mask = (tokens[:, :-1] == ids.img) | (tokens[:, :-1] == ids.image)
            return words + (error * mask).sum() / mask.sum()

    return Emu()


def translated(weights: dict[str, np.ndarray], model: EmuConfig) -> dict[str, np.ndarray]:
    """Returns our parameters with the names and layouts of `twin`."""
    state: dict[str, np.ndarray] = {}
    for path, value in weights.items():
        name = path.replace(".kernel", ".weight").replace(".scale", ".weight")
        name = name.replace("embed_tokens.embedding", "embed_tokens.weight")
        if path.startswith(("visual.norm.", "visual.head.")):
            continue  # used by CLIP only
        if path == "llama.embed_tokens.embedding":
            state["llama.model.embed_tokens.weight"] = value[: model.llama.vocab_size]
        elif path == "llama.lm_head.kernel":
            state["llama.lm_head.weight"] = value.T[: model.llama.vocab_size]
        elif path == "visual.patch_embed.kernel":
            side = model.vision.patch_size
            value = value.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)
            state["encoder.embeddings.patch_embeddings.projection.weight"] = value
        elif path == "cformer.relative_attention_bias":
            first = "cformer.decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            state[first] = value
        elif match := re.match(r"(.*?)\.?(blocks|layers)\.(.*)", name):
            tower, rest = match[1], match[3]
            for layer, one in enumerate(value):
                for part, array in _layer(tower, rest, one).items():
                    state[BLOCKS[tower].format(layer) + part] = array
        else:
            name = re.sub("|".join(map(re.escape, NAMES)), lambda m: NAMES[m[0]], name)
            if name.endswith("cls_token"):
                value = value[None, None]
            elif name.endswith("position_embeddings"):
                value = value[None]
            elif name.endswith("weight") and value.ndim == 2:
                value = value.T
            state[name] = value
    return state


BLOCKS = {
    "visual": "encoder.layers.{}.",
    "cformer": "cformer.decoder.block.{}.layer.",
    "llama": "llama.model.layers.{}.",
}
NAMES = {
    "visual.patch_embed.bias": "encoder.embeddings.patch_embeddings.projection.bias",
    "visual.cls_token": "encoder.embeddings.cls_token",
    "visual.pos_embed": "encoder.embeddings.position_embeddings",
    "ln_visual.": "encoder.layernorm.",
    "cformer.final_layer_norm": "cformer.decoder.final_layer_norm",
    "llama.norm": "llama.model.norm",
    # Parts of a layer.
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "attn.proj.": "attention.o_proj.",
    "self_attention.": "0.SelfAttention.",
    "self_norm.": "0.layer_norm.",
    "cross_attention.": "1.EncDecAttention.",
    "cross_norm.": "1.layer_norm.",
    "wi.": "2.DenseReluDense.wi.",
    "wo.": "2.DenseReluDense.wo.",
    "mlp_norm.": "2.layer_norm.",
}


def _layer(tower: str, name: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """Returns one layer's parameter, or the parts of one that we store fused."""
    if name == "attn.qkv":
        return {f"attention.{n}_proj.weight": value[:, i].T for i, n in enumerate("qkv")}
    if name in ("attn.q_bias", "attn.v_bias"):
        biases = {f"attention.{name[5]}_proj.bias": value}
        return biases | ({"attention.k_proj.bias": 0 * value} if name[5] == "q" else {})
    if tower != "llama":
        name = re.sub("|".join(map(re.escape, NAMES)), lambda m: NAMES[m[0]], name)
    return {name: value.T if value.ndim == 2 else value}
