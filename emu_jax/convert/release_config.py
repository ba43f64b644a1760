"""The configuration of a release, from its JSON files and its tensors' shapes."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from emu_jax.config import (
    BACKBONES,
    LORA_TARGETS,
    CFormerConfig,
    EmuConfig,
    LlamaConfig,
    LoraConfig,
    PoolingConfig,
    RopeScalingConfig,
    SchedulerConfig,
    TokenIds,
    UNetConfig,
    VAEConfig,
    VisionConfig,
    emu2,
    emu2_chat,
    emu2_gen,
    emu_14b,
    from_dict,
)
from emu_jax.convert.tables import KeyStyle
from emu_jax.convert.tensors import Shape
from emu_jax.errors import UserError
from emu_jax.storage import read_json_object
from emu_jax.tokenizer import added_tokens

Config = TypeVar("Config", UNetConfig, VAEConfig, SchedulerConfig)

# A tensor that only Emu2 has.
# Settings of Emu2's visual encoder that its released weights leave off, and that emu_jax lacks.
_EMU2_OFF = ("init_value", "rope", "global_average_pool", "naiveswiglu", "subln")

# Tensors of the Causal Transformer's layers (T5) begin so.
_T5_LAYER = "cformer.cformer.block.0.layer."

# Sizes of Emu2's visual encoder that its JSON names as we do.
_VISION_SIZES = ("image_size", "patch_size", "width", "layers")

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
ROPE_JSON = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_positions": "original_max_position_embeddings",
}
MISTRAL_WINDOW = 4096  # transformers' default

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
# diffusers' schedulers, by our name of their sampler.
SCHEDULERS = {
    "pndm": "PNDMScheduler",
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}

# Allowed values of the other keys in these files: none of them changes the network. Keys that are
# not listed may be null or false.
_NEUTRAL_VALUES: dict[type, dict[str, tuple[Any, ...]]] = {
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
        "interpolation_type": ("linear",),
        "timestep_type": ("discrete",),
        "final_sigmas_type": ("zero",),
        "clip_sample_range": (1,),
        "sample_max_value": (1,),
        "dynamic_thresholding_ratio": (0.995,),
    },
}


@dataclasses.dataclass(frozen=True)
class _StoredShapes:
    """The shapes of a release's tensors, found by the names that the tables use.

    Attributes:
        shapes: {tensor's name in the file: its shape}.
        style: how the file writes the names.
        where: the file's name in messages.
    """

    shapes: Mapping[str, Shape]
    style: KeyStyle
    where: str

    def shape(self, key: str, dims: int) -> Shape:
        """Returns a tensor's shape, which must have this many dimensions, none of length 0."""
        name = key if key in self.shapes else self.style.write(key)
        if name not in self.shapes and self.style.base_layer:
            name = self.style.write(key, ("q_proj", "k_proj", "v_proj", "o_proj"))
        if name not in self.shapes:
            raise UserError(f"{self.where} is not an Emu checkpoint: it lacks {name}")
        shape = self.shapes[name]
        if len(shape) != dims or 0 in shape:
            raise UserError(f"{self.where}: {name} is {list(shape)}, expected {dims} dimensions")
        return tuple(shape)


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
    the JSON files or, without them, from the release's preset where it fits.

    Args:
        shapes: {tensor's name in the file: its shape}.
        where: the file's name in messages.
        base_vocab: size of the tokenizer's vocabulary before Emu's tokens.
        model_json: in the release's own format (`Emu-14B.json`; of Emu2, see
            `emu2_vision_json`).
        llama_json: a transformers `config.json` of LLaMA, or Emu2's on the Hub.

    Raises:
        UserError: a tensor that sizes depend on is missing or misshapen, the JSON disagrees
            with the tensors, or there is no JSON and the tensors are not the 14B model's.
    """
    stored = _StoredShapes(shapes, KeyStyle.of(shapes), where)
    names = (name for name in CONNECTOR_READERS if name and stored.style.write(name) in shapes)
    return CONNECTOR_READERS[next(names, "")](stored, base_vocab, model_json, llama_json)


def _emu1(
    stored: _StoredShapes, base_vocab: int, model_json: Path | None, llama_json: Path | None
) -> EmuConfig:
    """Returns the configuration of an Emu1; see `multimodal`."""
    where = stored.where
    llama = _llama_sizes(stored, base_vocab, emu_14b().llama)
    vision = _vision_sizes(stored, emu_14b().vision)
    cformer = _cformer_sizes(stored)
    llama = _with_heads(llama, stored, llama_json, emu_14b().llama)
    preset = emu_14b().vision
    if model_json is not None:
        vision = _with_model_json(vision, cformer, model_json)
    elif (vision.width, vision.mlp_width) != (preset.width, preset.mlp_width):
        raise UserError(
            f"{where} is not the 14B model, and the width of the visual encoder's heads cannot be "
            "inferred: give the release's model JSON (Emu.json) with --model-config"
        )
    cformer_width = stored.shape(f"{_T5_LAYER}0.SelfAttention.q.weight", 2)[0]
    _check_heads(where, vision, llama)
    _check_split(where, "Causal Transformer", cformer.heads, cformer_width)
    return EmuConfig(
        vision=vision,
        cformer=cformer,
        llama=llama,
        unet=None,
        vae=None,
        tokens=TokenIds.after(base_vocab),
    )


def _check_heads(where: str, vision: VisionConfig, llama: LlamaConfig) -> None:
    """Checks that the towers' widths split into heads."""
    _check_split(where, "visual encoder", vision.head_width, vision.width)
    _check_split(where, "language model", llama.heads, llama.width)


def _check_split(where: str, tower: str, parts: int, width: int) -> None:
    if parts < 1 or width % parts:
        raise UserError(
            f"{where}: the {tower}'s width {width} cannot be split into heads by {parts}"
        )


def _emu2(
    stored: _StoredShapes, base_vocab: int, model_json: Path | None, llama_json: Path | None
) -> EmuConfig:
    """Returns the configuration of an Emu2; see `multimodal`."""
    where = stored.where
    chat = stored.shape("decoder.lm.model.embed_tokens.weight", 2)[0] - base_vocab == len(
        added_tokens("emu2", True)
    )
    preset = emu2_chat() if chat else emu2()
    assert preset.pooling is not None
    llama = _llama_sizes(stored, base_vocab, preset.llama)
    llama = _with_heads(llama, stored, llama_json, preset.llama)
    vision, pooling = _vision_sizes(stored, preset.vision), preset.pooling
    if model_json is not None:
        vision, pooling = _with_emu2_json(vision, pooling, model_json, chat=chat)
    elif vision != preset.vision:
        raise UserError(
            f"{where} is not the released Emu2, and the width of the visual encoder's heads cannot "
            "be inferred: give a JSON with its vision_cfg (or vision_config) with --model-config"
        )
    _check_heads(where, vision, llama)
    try:
        return EmuConfig(
            vision=vision,
            cformer=None,
            pooling=pooling,
            llama=llama,
            unet=None,
            vae=None,
            tokens=TokenIds.after(base_vocab, frame=True),
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


# By a tensor that no other family has: the function that infers a model's sizes. Files without any
# of these tensors are Emu1's.
CONNECTOR_READERS: dict[
    str, Callable[[_StoredShapes, int, Path | None, Path | None], EmuConfig]
] = {
    "project_up.weight": _emu2,
    "": _emu1,
}


def emu2_vision_json(path: Path, *, chat: bool = False) -> dict[str, Any] | None:
    """Returns the settings of the visual encoder in a JSON file of Emu2: the Hub's `config.json`
    (`vision_config`), or one with `vision_cfg`, and `chat_vision_cfg` where the chat model's
    differ. Returns None if there are none."""
    values = read_json_object(path)
    names = (["chat_vision_cfg"] if chat else []) + ["vision_cfg", "vision_config"]
    return next((values[n] for n in names if isinstance(values.get(n), dict)), None)


def _with_emu2_json(
    vision: VisionConfig, pooling: PoolingConfig, path: Path, *, chat: bool
) -> tuple[VisionConfig, PoolingConfig]:
    """Completes the preset with the settings that no tensor reveals, and checks the others against
    the tensors."""
    tower = emu2_vision_json(path, chat=chat)
    if tower is None:
        raise UserError(f"{path} has no vision_cfg: give the sizes of Emu2's visual encoder")
    for key in _EMU2_OFF:
        if tower.get(key):
            raise UserError(f"{path}: {key} = {tower[key]!r} is not supported, only false")
    ratio = tower.get("mlp_ratio")
    stated = {key: (tower.get(key), getattr(vision, key)) for key in _VISION_SIZES}
    if isinstance(ratio, int | float) and math.isfinite(ratio):
        stated["mlp_ratio x width"] = (int(vision.width * ratio), vision.mlp_width)
    for name, (value, stored) in stated.items():
        if value is not None and value != stored:
            raise UserError(f"{path}: {name} is {value}, but the tensors have {stored}")
    settings = {
        name: tower[released]
        for name, released in (
            ("head_width", "head_width"),
            ("eps", "layer_norm_eps"),
            ("post_norm", "postnorm"),
        )
        if tower.get(released) is not None
    }
    counts = {
        name: tower[released]
        for name, released in (("n_embeddings", "n_query"), ("n_frame", "v_query"))
        if tower.get(released) is not None
    }
    try:
        return (
            from_dict(VisionConfig, dataclasses.asdict(vision) | settings),
            from_dict(PoolingConfig, dataclasses.asdict(pooling) | counts),
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def count_layers(keys: Iterable[str], pattern: str) -> int:
    """Returns how many layers a stack has. The pattern's group matches a layer's number.

    It does not rely on the highest number: if numbers are missing, the table can then list the
    missing and the unexpected tensors.
    """
    return len({match[1] for key in keys if (match := re.match(pattern, key))})


def _vision_sizes(stored: _StoredShapes, preset: VisionConfig) -> VisionConfig:
    """Returns the visual encoder's sizes, with the head width of the preset."""
    _, tokens, width = stored.shape("visual.pos_embed", 3)
    patch_size = stored.shape("visual.patch_embed.proj.weight", 4)[2]
    side = math.isqrt(max(tokens - 1, 0))
    if side * side != tokens - 1:
        raise UserError(
            f"{stored.where}: visual.pos_embed has {tokens} rows, not a square plus one"
        )
    prefix = re.escape(stored.style.write("visual."))
    vision = dataclasses.replace(
        preset,
        image_size=side * patch_size,
        patch_size=patch_size,
        width=width,
        layers=count_layers(stored.shapes, prefix + r"blocks\.(\d+)\."),
        mlp_width=stored.shape("visual.blocks.0.mlp.fc1.weight", 2)[0],
    )
    if vision.final_norm:
        vision = dataclasses.replace(vision, clip_width=stored.shape("visual.head.weight", 2)[0])
    return vision


def _cformer_sizes(stored: _StoredShapes) -> CFormerConfig:
    """Returns the Causal Transformer's sizes."""
    n_causal, width = stored.shape("cformer.causal_tokens", 3)[1:]
    buckets, heads = stored.shape(f"{_T5_LAYER}0.SelfAttention.relative_attention_bias.weight", 2)
    return CFormerConfig(
        n_causal=n_causal,
        width=width,
        heads=heads,
        relative_buckets=buckets,
        layers=count_layers(stored.shapes, r"cformer\.cformer\.block\.(\d+)\."),
        head_width=stored.shape(f"{_T5_LAYER}0.SelfAttention.q.weight", 2)[0] // heads,
        mlp_width=stored.shape(f"{_T5_LAYER}2.DenseReluDense.wi.weight", 2)[0],
    )


def _llama_sizes(stored: _StoredShapes, base_vocab: int, preset: LlamaConfig) -> LlamaConfig:
    """Returns the language model's sizes, with the number of heads of the preset."""
    vocab, width = stored.shape("decoder.lm.model.embed_tokens.weight", 2)
    family = "emu" if preset.regression_head else "emu2"
    added, chat = (len(added_tokens(family, instruct)) for instruct in (False, True))
    if vocab - base_vocab not in (added, chat):
        raise UserError(
            f"{stored.where} has {vocab} tokens, the tokenizer {base_vocab}: the release adds "
            f"{added}, or {chat} for instruction tuning; give this model's own tokenizer with "
            "--tokenizer"
        )
    prefix = re.escape(stored.style.write("decoder.lm."))
    return dataclasses.replace(
        preset,
        vocab_size=vocab,
        width=width,
        layers=count_layers(stored.shapes, prefix + r"model\.layers\.(\d+)\."),
        mlp_width=stored.shape("decoder.lm.model.layers.0.mlp.gate_proj.weight", 2)[0],
        lora=_lora(stored.shapes, stored.style, stored.where),
    )


def _with_heads(
    llama: LlamaConfig, stored: _StoredShapes, llama_json: Path | None, preset: LlamaConfig
) -> LlamaConfig:
    """Adds the number of heads.

    It comes from LLaMA's config.json, or from the rotary frequencies, or from the preset if all
    other sizes are the preset's.
    """
    where, width = stored.where, llama.width
    rotary = stored.shapes.get(
        stored.style.write("decoder.lm.model.layers.0.self_attn.rotary_emb.inv_freq")
    )
    if llama_json is not None:
        llama = _with_llama_json(llama, llama_json)
    elif rotary is not None:
        if len(rotary) != 1 or rotary[0] == 0 or width % (2 * rotary[0]):
            raise UserError(
                f"{where}: rotary_emb.inv_freq is {list(rotary)}, which fits no head of a language "
                f"model of width {width}"
            )
        llama = dataclasses.replace(llama, heads=width // (2 * rotary[0]))
    elif any(getattr(preset, f) != getattr(llama, f) for f in ("width", "layers", "mlp_width")):
        raise UserError(
            f"cannot infer the number of attention heads from {where}: add LLaMA's config.json to "
            "the tokenizer folder (--tokenizer)"
        )
    if rotary is not None and tuple(rotary) != (llama.head_width // 2,):
        raise UserError(
            f"{where} has rotary_emb.inv_freq {list(rotary)}, but {llama_json} says {llama.heads} "
            f"heads for a width of {width}"
        )
    return llama


def _lora(shapes: Mapping[str, Shape], style: KeyStyle, where: str) -> LoraConfig | None:
    """Returns the adapters' sizes, with the release's alpha, which no tensor reveals."""
    if not style.peft:
        return None
    ranks: collections.Counter[int] = collections.Counter()
    targets = set()
    for key, shape in shapes.items():
        if match := re.search(r"\.(\w+)\.lora_A\.default\.weight$", key):
            if len(shape) != 2 or shape[0] == 0:
                raise UserError(f"{where}: {key} is {list(shape)}, expected [rank, width]")
            targets.add(match[1])
            ranks[shape[0]] += 1
    if not targets:
        return None  # wrapped by peft, without adapters: the table lists the unexpected tensors
    order = tuple(LORA_TARGETS)
    if unknown := targets - set(order):
        raise UserError(f"{where} has LoRA on {', '.join(sorted(unknown))}: only on {order}")
    # The most common rank: the table lists the adapters whose rank differs.
    return LoraConfig(
        rank=ranks.most_common(1)[0][0], targets=tuple(sorted(targets, key=order.index))
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
    stated = {
        "vision_cfg.image_size": (tower.get("image_size"), vision.image_size),
        "vision_cfg.patch_size": (tower.get("patch_size"), vision.patch_size),
        "vision_cfg.width": (tower.get("width"), vision.width),
        "vision_cfg.layers": (tower.get("layers"), vision.layers),
        "embed_dim": (values.get("embed_dim"), vision.clip_width),
        **causal,
    }
    if isinstance(ratio := tower.get("mlp_ratio"), int | float) and math.isfinite(ratio):
        stated["vision_cfg.mlp_ratio x width"] = (int(vision.width * ratio), vision.mlp_width)
    for name, (value, stored) in stated.items():
        if value is not None and value != stored:
            raise UserError(f"{path}: {name} is {value}, but the tensors have {stored}")
    return dataclasses.replace(vision, head_width=head_width)


def _with_llama_json(llama: LlamaConfig, path: Path) -> LlamaConfig:
    """Adds settings from LLaMA's `config.json`, and checks the sizes against the tensors."""
    read = llama_config(path)
    if not read.is_release:
        raise UserError(
            f"{path} is of a later decoder, a released Emu's language model is LLaMA-1: give the "
            "release's own file"
        )
    for name in ("width", "layers", "mlp_width"):
        if getattr(read, name) != getattr(llama, name):
            raise UserError(
                f"{path}: the language model's {name} is {getattr(read, name)}, but the tensors "
                f"have {getattr(llama, name)}"
            )
    return dataclasses.replace(
        read,
        vocab_size=llama.vocab_size,
        lora=llama.lora,
        rope_dtype=llama.rope_dtype,
        regression_head=llama.regression_head,
    )


def llama_config(path: Path) -> LlamaConfig:
    """Reads a transformers `config.json` of LLaMA, Mistral, Qwen2 or Qwen3.

    Rotary tables are rounded to bfloat16 in a LLaMA that the release could have, as there, and
    otherwise computed in float32.

    Raises:
        UserError: a size is missing, or the file sets a feature that Emu's language model lacks.
    """
    values = read_json_object(path)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_scaling must be an object, not {rope!r}")
    values.setdefault("rope_theta", rope.get("rope_theta", LlamaConfig.rope_theta))
    backbone = values.get("model_type", "llama")
    backbone = "llama" if backbone == "Emu" else backbone
    kind = rope.get("rope_type", rope.get("type", "default"))
    for wrong, what in (
        (backbone not in BACKBONES, f"model_type {backbone}"),
        (values.get("attention_bias"), "attention biases"),
        (values.get("mlp_bias"), "MLP biases"),
        (values.get("use_sliding_window"), "a sliding window in some of its layers"),
        (values.get("quantization_config"), "quantized weights"),
        (kind not in ("default", "llama3"), f"rope scaling {kind!r}"),
        (rope.get("partial_rotary_factor", 1) != 1, "heads that are rotated in part"),
        (values.get("hidden_act", "silu") != "silu", f"activation {values.get('hidden_act')}"),
    ):
        if wrong:
            raise UserError(
                f"{path}: unsupported language model with {what}: use a LLaMA, Mistral, Qwen2.5 or "
                "Qwen3 without it"
            )
    sizes = _numbers(values, LLAMA_JSON, LlamaConfig, path)
    head_width = values.get("head_dim") or sizes["width"] // sizes["heads"]
    key_value_heads = values.get("num_key_value_heads") or sizes["heads"]
    window = values.get("sliding_window", MISTRAL_WINDOW) if backbone == "mistral" else 0
    for key, value in (
        ("head_dim", head_width),
        ("num_key_value_heads", key_value_heads),
        ("sliding_window", window or 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise UserError(f"{path}: {key} must be a positive number, not {value!r}")
    scaling = None
    if kind == "llama3":
        scaling = RopeScalingConfig(**_numbers(rope, ROPE_JSON, RopeScalingConfig, path))
    width = sizes["heads"] * head_width
    llama = LlamaConfig(
        **sizes,
        backbone=backbone,
        key_value_heads=0 if key_value_heads == sizes["heads"] else key_value_heads,
        attention_width=0 if width == sizes["width"] else width,
        rope_scaling=scaling,
        sliding_window=window or 0,
        tied_embeddings=bool(values.get("tie_word_embeddings")),
    )
    return llama if llama.is_release else dataclasses.replace(llama, rope_dtype="float32")


def _numbers(
    values: Mapping[str, Any], names: Mapping[str, str], cls: type, path: Path
) -> dict[str, Any]:
    """Returns the numbers of `cls` in a JSON file. Absent ones have the default of `cls` if they
    are not whole, or are the longest text.

    Args:
        names: {our name: name in the JSON}.

    Raises:
        UserError: a number is missing, not positive, or not whole where it must be.
    """
    numbers = {}
    for field, key in names.items():
        default = getattr(cls, field)
        value = values.get(key, default if isinstance(default, float) else None)
        if key == "max_position_embeddings" and value is None:
            value = default
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < 2**53 or type(default)(value) != value:
            raise UserError(f"{path}: {key} must be a positive number, not {value!r}")
        numbers[field] = type(default)(value)
    return numbers


def diffusers_config(cls: type[Config], path: Path) -> Config:
    """Reads a diffusers `config.json` (or `scheduler_config.json`) as our dataclass.

    Absent keys have diffusers' own defaults. Keys without a field must have a value that leaves
    the network as in Stable Diffusion v1.5 or SDXL.

    Raises:
        UserError: the file sets a feature that Emu's decoder lacks.
    """
    values = read_json_object(path)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name != "sampler"}
    settings = dict(_DEFAULTS[cls])
    if values.get("_class_name") == SCHEDULERS["euler"]:
        # Other schedulers are read as PNDM, the release's: a user chooses among them by name.
        settings |= {"sampler": "euler", "timestep_spacing": "linspace"}
    for key, value in values.items():
        if key.startswith("_"):
            continue
        if key in fields:
            if isinstance(value, list) and not fields[key].type.startswith("tuple"):
                # A number for each level, where our field may have one for all levels.
                equal = bool(value) and all(v == value[0] for v in value)
                if not equal and "tuple" not in str(fields[key].type):
                    raise UserError(f"{path}: {key} = {value!r} is not supported, only equal ones")
                value = value[0] if equal else value
            if value is not None or key != "sample_size":
                settings[key] = value
            continue
        allowed = _NEUTRAL_VALUES[cls].get(key, (None, False))
        # bool is an int in Python: do not let True match 1.
        if not all(
            any(v == a and isinstance(v, bool) == isinstance(a, bool) for a in allowed)
            for v in (value if isinstance(value, list) and value else [value])
        ):
            raise UserError(f"{path}: {key} = {value!r} is not supported, only {allowed[0]!r}")
    try:
        cfg = from_dict(cls, settings)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    for name in fields.keys() - {"freq_shift", "steps_offset"}:
        value = getattr(cfg, name)
        numbers = [
            v
            for v in (value if isinstance(value, tuple) else [value])
            if isinstance(v, int | float) and not isinstance(v, bool)
        ]
        if any(not 0 < v < math.inf for v in numbers) or value == ():
            raise UserError(f"{path}: {name} = {value!r} must be positive")
    for width in getattr(cfg, "block_out_channels", ()):
        if width % cfg.norm_num_groups:
            raise UserError(
                f"{path}: norm_num_groups = {cfg.norm_num_groups} does not divide {width} channels"
            )
    if cls is UNetConfig:
        try:
            cfg.check_levels()
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return cfg


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


def with_decoder(cfg: EmuConfig, folder: Path | None) -> EmuConfig:
    """Returns a configuration with the image decoder that a folder's JSON files describe, or
    without a folder with that of the released Emu2-Gen.

    Raises:
        UserError: a file is missing or not supported.
    """
    if folder is None:
        preset = emu2_gen()
        unet, vae, scheduler = preset.unet, preset.vae, preset.scheduler
    else:
        unet, vae, scheduler = decoder(folder)
    return dataclasses.replace(cfg, unet=unet, vae=vae, scheduler=scheduler)
