"""The configuration of a release, from its JSON files and its tensors' shapes."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emu_jax.config import (
    LORA_TARGETS,
    CFormerConfig,
    EmuConfig,
    LlamaConfig,
    LoraConfig,
    SchedulerConfig,
    TokenIds,
    UNetConfig,
    VAEConfig,
    VisionConfig,
    emu_14b,
    from_dict,
)
from emu_jax.convert.tables import Spelling
from emu_jax.convert.tensors import Shape
from emu_jax.errors import UserError
from emu_jax.filesystem import read_json_object

# Tokens that the release adds to LLaMA's vocabulary, without and with [USER] and [ASSISTANT].
ADDED_TOKENS = (4, 6)


def multimodal(
    shapes: Mapping[str, Shape],
    *,
    where: str,
    base_vocab: int,
    model_json: Path | None = None,
    llama_json: Path | None = None,
) -> EmuConfig:
    """Returns the configuration of everything but the image decoder.

    Most sizes follow from the tensors. The others (heads, the epsilons of the norms) come from
    the JSON files or, without them, from the 14B preset where it fits.

    Args:
        shapes: {tensor's name as the file spells it: its shape}.
        where: the file's name in messages.
        base_vocab: size of the tokenizer's vocabulary before Emu's tokens.
        model_json: in the release's own format (`Emu-14B.json`).
        llama_json: a transformers `config.json` of LLaMA.

    Raises:
        UserError: a tensor that sizes depend on is missing or misshapen, the JSON disagrees
            with the tensors, or there is no JSON and the tensors are not the 14B model's.
    """
    spelling = Spelling.of(shapes)

    def shape(key: str, dims: int) -> Shape:
        name = key if key in shapes else spelling.write(key)
        if name not in shapes and spelling.base_layer:
            name = spelling.write(key, ("q_proj", "k_proj", "v_proj", "o_proj"))
        if name not in shapes:
            raise UserError(f"{where} is not an Emu checkpoint: it lacks {name}")
        if len(shapes[name]) != dims or 0 in shapes[name]:
            raise UserError(f"{where}: {name} is {list(shapes[name])}, expected {dims} dimensions")
        return tuple(shapes[name])

    def layers(pattern: str) -> int:
        # The count, not the highest number: after a gap the table lists missing and unexpected.
        return len({m[1] for key in shapes if (m := re.match(pattern, key))})

    preset = emu_14b()
    lm = re.escape(spelling.write("decoder.lm."))
    vocab, width = shape("decoder.lm.model.embed_tokens.weight", 2)
    _, tokens, vision_width = shape("visual.pos_embed", 3)
    patch_size = shape("visual.patch_embed.proj.weight", 4)[2]
    if vocab - base_vocab not in ADDED_TOKENS:
        raise UserError(
            f"{where} has {vocab} tokens, the tokenizer {base_vocab}: the release adds 4, or 6 "
            "for instruction tuning; give this model's own tokenizer with --tokenizer"
        )
    side = math.isqrt(max(tokens - 1, 0))
    if side * side != tokens - 1:
        raise UserError(f"{where}: visual.pos_embed has {tokens} rows, not a square plus one")
    vision = dataclasses.replace(
        preset.vision,
        image_size=side * patch_size,
        patch_size=patch_size,
        width=vision_width,
        layers=layers(r"visual\.blocks\.(\d+)\."),
        mlp_width=shape("visual.blocks.0.mlp.fc1.weight", 2)[0],
        clip_width=shape("visual.head.weight", 2)[0],
    )
    t5 = "cformer.cformer.block.0.layer."
    n_causal, cformer_width = shape("cformer.causal_tokens", 3)[1:]
    buckets, heads = shape(f"{t5}0.SelfAttention.relative_attention_bias.weight", 2)
    cformer = CFormerConfig(
        n_causal=n_causal,
        width=cformer_width,
        heads=heads,
        relative_buckets=buckets,
        layers=layers(r"cformer\.cformer\.block\.(\d+)\."),
        head_width=shape(f"{t5}0.SelfAttention.q.weight", 2)[0] // heads,
        mlp_width=shape(f"{t5}2.DenseReluDense.wi.weight", 2)[0],
    )

    llama = dataclasses.replace(
        preset.llama,
        vocab_size=vocab,
        width=width,
        layers=layers(lm + r"model\.layers\.(\d+)\."),
        mlp_width=shape("decoder.lm.model.layers.0.mlp.gate_proj.weight", 2)[0],
        lora=_lora(shapes, spelling, where),
    )
    rotary = shapes.get(spelling.write("decoder.lm.model.layers.0.self_attn.rotary_emb.inv_freq"))
    rotary = None if rotary is None else tuple(rotary)
    sized = {f: getattr(llama, f) for f in ("width", "layers", "mlp_width")}
    if llama_json is not None:
        llama = _with_llama_json(llama, llama_json)
    elif rotary is not None:
        if len(rotary) != 1 or rotary[0] == 0 or width % (2 * rotary[0]):
            raise UserError(
                f"{where}: rotary_emb.inv_freq is {list(rotary)}, which fits no head of a language "
                f"model of width {width}"
            )
        llama = dataclasses.replace(llama, heads=width // (2 * rotary[0]))
    elif any(getattr(preset.llama, f) != v for f, v in sized.items()):
        raise UserError(
            f"cannot infer the number of attention heads from {where}: add LLaMA's config.json to "
            "the tokenizer folder (--tokenizer)"
        )
    if rotary is not None and rotary != (llama.head_width // 2,):
        raise UserError(
            f"{where} has rotary_emb.inv_freq {list(rotary)}, but {llama_json} says {llama.heads} "
            f"heads for a width of {width}"
        )

    if model_json is not None:
        vision = _with_model_json(vision, cformer, model_json)
    elif any(getattr(preset.vision, f) != getattr(vision, f) for f in ("width", "mlp_width")):
        raise UserError(
            f"{where} is not the 14B model, and the width of the visual encoder's heads cannot be "
            "inferred: give the release's model JSON (Emu.json) with --model-config"
        )
    for name, cut, of in (
        ("visual encoder", vision.head_width, vision.width),
        ("language model", llama.heads, llama.width),
        ("Causal Transformer", heads, shape(f"{t5}0.SelfAttention.q.weight", 2)[0]),
    ):
        if cut < 1 or of % cut:
            raise UserError(f"{where}: the {name}'s width {of} cannot be split into heads by {cut}")
    return EmuConfig(
        vision=vision,
        cformer=cformer,
        llama=llama,
        unet=None,
        vae=None,
        tokens=TokenIds.after(base_vocab),
    )


def _lora(shapes: Mapping[str, Shape], spelling: Spelling, where: str) -> LoraConfig | None:
    """Returns the adapters' sizes, with the release's alpha, which no tensor reveals."""
    if not spelling.peft:
        return None
    ranks: collections.Counter[int] = collections.Counter()
    found = set()
    for key, shape in shapes.items():
        if match := re.search(r"\.(\w+)\.lora_A\.default\.weight$", key):
            if len(shape) != 2 or shape[0] == 0:
                raise UserError(f"{where}: {key} is {list(shape)}, expected [rank, width]")
            found.add(match[1])
            ranks[shape[0]] += 1
    if not found:
        return None  # wrapped by peft, without adapters: the table lists the unexpected tensors
    order = tuple(LORA_TARGETS)
    if unknown := found - set(order):
        raise UserError(f"{where} has LoRA on {', '.join(sorted(unknown))}: only on {order}")
    # The most common rank: the table lists the adapters whose rank differs.
    return LoraConfig(
        rank=ranks.most_common(1)[0][0], targets=tuple(sorted(found, key=order.index))
    )


def _with_model_json(vision: VisionConfig, cformer: CFormerConfig, path: Path) -> VisionConfig:
    """Adds the head width from the release's model JSON. Checks the rest against the tensors."""
    values = read_json_object(path)
    tower = values.get("vision_cfg")
    if not isinstance(tower, dict):
        raise UserError(f"{path} has no vision_cfg: give the release's model JSON (Emu-14B.json)")
    head_width = tower.get("head_width", 64)  # the release's own default
    if isinstance(head_width, bool) or not isinstance(head_width, int) or head_width < 1:
        raise UserError(f"{path}: vision_cfg.head_width must be a number, not {head_width!r}")
    causal = {}
    for name in ("multimodal_cfg", "vladapter_cfg"):
        part = values.get(name) or {}
        if not isinstance(part, dict):
            raise UserError(f"{path}: {name} must be an object, not {part!r}")
        causal[f"{name}.n_causal"] = (part.get("n_causal"), cformer.n_causal)
    told = {
        "vision_cfg.image_size": (tower.get("image_size"), vision.image_size),
        "vision_cfg.patch_size": (tower.get("patch_size"), vision.patch_size),
        "vision_cfg.width": (tower.get("width"), vision.width),
        "vision_cfg.layers": (tower.get("layers"), vision.layers),
        "embed_dim": (values.get("embed_dim"), vision.clip_width),
        **causal,
    }
    if isinstance(ratio := tower.get("mlp_ratio"), int | float) and math.isfinite(ratio):
        told["vision_cfg.mlp_ratio x width"] = (int(vision.width * ratio), vision.mlp_width)
    for name, (said, is_) in told.items():
        if said is not None and said != is_:
            raise UserError(f"{path}: {name} is {said}, but the tensors have {is_}")
    return dataclasses.replace(vision, head_width=head_width)


def _with_llama_json(llama: LlamaConfig, path: Path) -> LlamaConfig:
    """Adds settings from LLaMA's `config.json`, and checks the sizes against the tensors."""
    read = llama_config(path)
    for name in ("width", "layers", "mlp_width"):
        if getattr(read, name) != getattr(llama, name):
            raise UserError(
                f"{path}: the language model's {name} is {getattr(read, name)}, but the tensors "
                f"have {getattr(llama, name)}"
            )
    return dataclasses.replace(read, vocab_size=llama.vocab_size, lora=llama.lora)


# Our name: transformers' name.
LLAMA_JSON = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "rope_theta": "rope_theta",
    "max_positions": "max_position_embeddings",
    "eps": "rms_norm_eps",
}


def llama_config(path: Path) -> LlamaConfig:
    """Reads a transformers `config.json` of LLaMA.

    Raises:
        UserError: a size is missing, or the file sets a feature that Emu's LLaMA lacks.
    """
    values = read_json_object(path)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_scaling must be an object, not {rope!r}")
    values.setdefault("rope_theta", rope.get("rope_theta", LlamaConfig.rope_theta))
    kinds = [rope.get("rope_type", "default"), rope.get("type", "default")]
    heads = values.get("num_attention_heads")
    for wrong, what in (
        (values.get("model_type", "llama") != "llama", f"model_type {values.get('model_type')}"),
        (values.get("num_key_value_heads") not in (None, heads), "grouped key-value heads"),
        (values.get("attention_bias"), "attention biases"),
        (values.get("mlp_bias"), "MLP biases"),
        (values.get("tie_word_embeddings"), "tied word embeddings"),
        (kinds != ["default"] * 2, f"rope scaling {rope}"),
        (values.get("hidden_act", "silu") != "silu", f"activation {values.get('hidden_act')}"),
        (_odd_heads(values), f"heads of width {values.get('head_dim')}"),
    ):
        if wrong:
            raise UserError(f"{path}: Emu's language model is a LLaMA-1; this one has {what}")
    sizes = {}
    for ours, theirs in LLAMA_JSON.items():
        default = getattr(LlamaConfig, ours)
        value = values.get(theirs, default if isinstance(default, float) else None)
        if theirs == "max_position_embeddings" and value is None:
            value = default
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < 2**53 or type(default)(value) != value:
            raise UserError(f"{path}: {theirs} must be a positive number, not {value!r}")
        sizes[ours] = type(default)(value)
    return LlamaConfig(**sizes)


def _odd_heads(values: dict[str, Any]) -> bool:
    """Returns whether the heads together are not as wide as the model."""
    width, heads, head = (
        values.get(key) for key in ("hidden_size", "num_attention_heads", "head_dim")
    )
    return head is not None and (type(heads) is not int or heads * head != width)


def diffusers_config(cls: type, path: Path) -> Any:
    """Reads a diffusers `config.json` (or `scheduler_config.json`) as our dataclass.

    Absent keys have diffusers' own defaults. Keys without a field must have a value that leaves
    the network as in Stable Diffusion v1.5.

    Raises:
        UserError: the file sets a feature that Emu's decoder lacks.
    """
    values = read_json_object(path)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    kept = dict(_DEFAULTS[cls])
    for key, value in values.items():
        if key.startswith("_"):
            continue
        if key in fields:
            if isinstance(value, list) and not fields[key].type.startswith("tuple"):
                # A number for each level; our field has one for all levels.
                if not value or any(v != value[0] for v in value):
                    raise UserError(f"{path}: {key} = {value!r} is not supported, only equal ones")
                value = value[0]
            if value is not None or key != "sample_size":
                kept[key] = value
            continue
        allowed = _PLAIN[cls].get(key, (None, False))
        # bool is an int in Python: do not let True match 1.
        if not all(
            any(v == a and isinstance(v, bool) == isinstance(a, bool) for a in allowed)
            for v in (value if isinstance(value, list) and value else [value])
        ):
            raise UserError(f"{path}: {key} = {value!r} is not supported, only {allowed[0]!r}")
    try:
        made = from_dict(cls, kept)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    for name in fields.keys() - {"freq_shift", "steps_offset"}:
        value = getattr(made, name)
        numbers = [
            v
            for v in (value if isinstance(value, tuple) else [value])
            if isinstance(v, int | float) and not isinstance(v, bool)
        ]
        if any(not 0 < v < math.inf for v in numbers) or value == ():
            raise UserError(f"{path}: {name} = {value!r} must be positive")
    for width in getattr(made, "block_out_channels", ()):
        for name in ("norm_num_groups", "attention_head_dim"):
            if width % getattr(made, name, 1):
                raise UserError(
                    f"{path}: {name} = {getattr(made, name)} does not divide {width} channels"
                )
    return made


# diffusers' defaults, where they differ from our dataclasses' (those of Stable Diffusion).
_DEFAULTS: dict[type, dict[str, Any]] = {
    UNetConfig: {"cross_attention_dim": 1280},
    VAEConfig: {"sample_size": 32, "block_out_channels": [64], "layers_per_block": 1},
    SchedulerConfig: {
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "skip_prk_steps": False,
        "steps_offset": 0,
    },
}


# Allowed values of the other keys in these files: none of them changes the network. Keys that are
# not listed may be null or false.
_PLAIN: dict[type, dict[str, tuple[Any, ...]]] = {
    UNetConfig: {
        "act_fn": ("silu",),
        "addition_embed_type_num_heads": (64,),
        "attention_type": ("default",),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "downsample_padding": (1,),
        "dropout": (0,),
        "mid_block_scale_factor": (1,),
        "resnet_out_scale_factor": (1,),
        "transformer_layers_per_block": (1,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn", None),
        "resnet_time_scale_shift": ("default",),
        "time_embedding_type": ("positional",),
    },
    VAEConfig: {
        "act_fn": ("silu",),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "force_upcast": (True, False),  # of half-precision inference
        "mid_block_add_attention": (True,),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
    },
    SchedulerConfig: {  # the last three: of clipping, which is off
        "clip_sample": (False,),
        "trained_betas": (None,),
        "clip_sample_range": (1,),
        "sample_max_value": (1,),
        "dynamic_thresholding_ratio": (0.995,),
    },
}


def decoder(folder: Path) -> tuple[UNetConfig, VAEConfig, SchedulerConfig]:
    """Returns the configuration of an image decoder in diffusers' layout.

    Raises:
        UserError: a part is missing or not supported.
    """
    unet = diffusers_config(UNetConfig, folder / "unet" / "config.json")
    vae = diffusers_config(VAEConfig, folder / "vae" / "config.json")
    schedule = folder / "scheduler" / "scheduler_config.json"
    scheduler = diffusers_config(SchedulerConfig, schedule) if schedule.is_file() else None
    return unet, vae, scheduler or SchedulerConfig()
