"""Model configuration: frozen dataclasses, presets, and JSON both ways.

One dataclass per tower. The numbers of `emu_14b()` are those of the release
(`Emu1/models/Emu-14B.json`, t5-base, LLaMA-13B, Stable Diffusion v1.5 with a
cross-attention width of 5120).
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar, Literal

from .errors import UserError, suggest
from .storage import read_json_object, write_text

# Former names of config keys, which old run directories and command lines still use.
RENAMED_KEYS = {"picture_first": "image_first"}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """EVA-CLIP ViT (release: `eva_vit_model.py`)."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1408
    layers: int = 40
    head_width: int = 88
    mlp_width: int = 6144
    clip_width: int = 1024  # of the contrastive head, which Emu itself does not use
    eps: float = 1e-6
    post_norm: bool = False  # normalize the output of attention and MLP, not their input
    final_norm: bool = True  # the final norm and the contrastive head exist

    @property
    def heads(self) -> int:
        return self.width // self.head_width

    @property
    def grid(self) -> int:
        """Number of patches along a side of the image."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Number of patches, plus the class token."""
        return self.grid**2 + 1


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
    """Base of the configurations of connectors, which lead from the visual encoder to the language
    model and back. `models.connectors.CONNECTORS` has the module of each.

    Attributes:
        family: the family whose tokens, prompts and files a model with this connector has.
        towers: its layers, which are towers of a checkpoint: {tower: key of `EmuConfig` with the
            tower's sizes}.
        after_language: the towers that read the language model's states.
        regression_head: whether a head of the language model regresses embeddings.
        autoencodes: whether embeddings are the encoder's own features, so that the image decoder
            paints a lone image without the language model.
        shapes_parameters: whether parameters have shapes that follow from this configuration. If
            not, a warm start may change it, and the size of images.
    """

    family: ClassVar[Literal["emu", "emu2"]]
    towers: ClassVar[dict[str, str]]
    after_language: ClassVar[tuple[str, ...]] = ()
    regression_head: ClassVar[bool] = False
    autoencodes: ClassVar[bool] = True
    shapes_parameters: ClassVar[bool] = True

    def counts(self) -> tuple[int, int]:
        """Returns the numbers of embeddings of a still image and of a video's frame."""
        raise NotImplementedError

    def embedding_width(self, vision: VisionConfig, llama: LlamaConfig) -> int:
        """Returns the width of the space in which embeddings are regressed and painted."""
        return vision.width

    def regression_pairs(self) -> int:
        """Returns the number of positions of an image whose state regresses the next embedding."""
        return self.counts()[0]

    def widths(self) -> tuple[int, ...]:
        """Returns widths of layers that a mesh must split, beside those of the towers around."""
        return ()

    def check(self, vision: VisionConfig) -> None:
        """Checks that the connector fits the visual encoder.

        Raises:
            UserError: it does not.
        """


@dataclasses.dataclass(frozen=True)
class CFormerConfig(ConnectorConfig):
    """Causal Transformer, a T5 decoder (release: `causal_former.py`, `modeling_t5.py`)."""

    family = "emu"
    towers: ClassVar[dict[str, str]] = {"ln_visual": "vision", "cformer": "cformer"}
    regression_head = True
    autoencodes = False

    n_causal: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    head_width: int = 64
    mlp_width: int = 3072
    relative_buckets: int = 32
    relative_max_distance: int = 128
    dropout: float = 0.1
    eps: float = 1e-6
    # An affine-free LayerNorm on the embeddings handed to the language model. Off in
    # the release; keeps a small model that trains from scratch from collapsing.
    normalize: bool = False

    def counts(self) -> tuple[int, int]:
        return self.n_causal, self.n_causal

    def embedding_width(self, vision: VisionConfig, llama: LlamaConfig) -> int:
        return llama.width

    def regression_pairs(self) -> int:
        """Returns N + 1: the space of embeddings is that of the tokens, so `[/IMG]` is a target."""
        return self.n_causal + 1

    def widths(self) -> tuple[int, ...]:
        return (self.width,)


@dataclasses.dataclass(frozen=True)
class PoolingConfig(ConnectorConfig):
    """Average pooling of the patches (release: `encode_image` of Emu2's `emu.py`)."""

    family = "emu2"
    towers: ClassVar[dict[str, str]] = {"project_up": "pooling", "project_down": "pooling"}
    after_language = ("project_down",)
    shapes_parameters = False

    n_embeddings: int = 64  # of a still image: a square number
    n_frame: int = 64  # of a frame of a video: a square number

    def counts(self) -> tuple[int, int]:
        return self.n_embeddings, self.n_frame

    def check(self, vision: VisionConfig) -> None:
        for name, count in dataclasses.asdict(self).items():
            side = math.isqrt(count)
            if side**2 != count or vision.grid % side:
                raise UserError(
                    f"pooling.{name} = {count} must be the square of a divisor of the "
                    f"{vision.grid} patches along a side of the image"
                )
        if self.n_frame > self.n_embeddings:
            raise UserError(
                f"pooling.n_frame = {self.n_frame} must be at most pooling.n_embeddings = "
                f"{self.n_embeddings}"
            )


# Layers of the language model that may have adapters, and the part of a block each is in.
LORA_TARGETS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on linear layers of the language model (release: r=16, alpha=16)."""

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.05  # of an adapter's input, in training
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            UserError: a setting is out of range, or a target is unknown or repeated.
        """
        for target in self.targets:
            if target not in LORA_TARGETS:
                raise UserError(f"unknown LoRA target {target!r}{suggest(target, LORA_TARGETS)}")
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise UserError(f"LoRA rank {self.rank}, dropout {self.dropout}: at least 1, below 1")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise UserError(f"LoRA targets {list(self.targets)}: name each layer once")
        if not math.isfinite(self.alpha):
            raise UserError(f"LoRA alpha {self.alpha}: expected a finite number")


# Decoders that the language model can be, by their name in transformers (`model_type`).
BACKBONES = ("llama", "mistral", "qwen2", "qwen3")


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
    """Rotary frequencies for longer texts: LLaMA-3.1's rule (transformers: `rope_type` "llama3").

    Wavelengths beyond the original context are multiplied by `factor`, and those that fit into it
    many times stay. Between the two, frequencies are interpolated.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            UserError: the factors leave no frequencies to interpolate.
        """
        if self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"rope_scaling.high_freq_factor = {self.high_freq_factor} must be above "
                f"low_freq_factor = {self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """LLaMA (release: `modeling_llama.py`), or a later decoder of its kind."""

    # llama, mistral, qwen2 (q, k and v have biases) or qwen3 (q and k are normalized)
    backbone: str = "llama"
    vocab_size: int = 32004
    vocab_multiple: int = 1  # rows of the tables are rounded up to a multiple of this
    width: int = 5120
    layers: int = 40
    heads: int = 40
    key_value_heads: int = 0  # each is shared by equally many heads; 0: as many as heads
    attention_width: int = 0  # of all heads together; 0: the model's width
    mlp_width: int = 13824
    rope_theta: float = 10000.0
    # Rotary cosines and sines are rounded to this dtype: the release computes with tables that
    # were once made in bfloat16, in float32 too.
    rope_dtype: str = "bfloat16"
    rope_scaling: RopeScalingConfig | None = None
    max_positions: int = 2048
    # Tokens that a token of the original attends to; longer texts are refused. 0: all.
    sliding_window: int = 0
    eps: float = 1e-6
    embed_std: float = 0.02  # of fresh token embeddings
    tied_embeddings: bool = False  # logits are products with the token embeddings
    regression_head: bool = True  # its own head regresses embeddings (`stu_regress_head`)
    lora: LoraConfig | None = None

    @property
    def head_width(self) -> int:
        return (self.attention_width or self.width) // self.heads

    @property
    def kv_heads(self) -> int:
        """Number of heads that keys and values have."""
        return self.key_value_heads or self.heads

    @property
    def context_length(self) -> int:
        """Number of tokens that the model reads at most."""
        return min(self.max_positions, self.sliding_window or self.max_positions)

    @property
    def is_release(self) -> bool:
        """True if the released code, whose decoder is LLaMA-1, can compute the model's layers."""
        same_width = self.attention_width in (0, self.width) and self.kv_heads == self.heads
        later = self.sliding_window or self.rope_scaling or self.tied_embeddings
        return self.backbone == "llama" and same_width and not later

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Denoiser. Field names are those of diffusers' `UNet2DConditionModel`."""

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    # diffusers' name for the NUMBER of heads; a tuple has one for each level
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 5120
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    transformer_layers_per_block: int | tuple[int, ...] = 1  # a tuple: for each level
    use_linear_projection: bool = False  # around the transformer blocks; else 1x1 convolutions
    # "text_time" (SDXL): the mean of the condition and six numbers (the original size, the crop's
    # corner, the target size) are added to the time embedding.
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None  # width of each of the six numbers' features
    # The condition's width plus six times `addition_time_embed_dim`
    projection_class_embeddings_input_dim: int | None = None

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of attention heads at each level, from the largest feature maps down."""
        return self._per_level(self.attention_head_dim)

    @property
    def transformer_layers(self) -> tuple[int, ...]:
        """Number of transformer blocks after a ResNet block at each level."""
        return self._per_level(self.transformer_layers_per_block)

    @property
    def takes_sizes(self) -> bool:
        """True if the denoiser is conditioned on the sizes and the crop of an image."""
        return self.addition_embed_type is not None

    def _per_level(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    def check_levels(self) -> None:
        """Checks that lists have an entry for each level, and that sizes fit each other.

        Raises:
            UserError: they do not.
        """
        levels = len(self.block_out_channels)
        blocks = (self.down_block_types, self.up_block_types)
        if {len(b) for b in blocks} != {levels}:
            raise UserError(
                "unet.block_out_channels, down_block_types and up_block_types must have one "
                "entry for each level"
            )
        for key in ("attention_head_dim", "transformer_layers_per_block"):
            if len(self._per_level(getattr(self, key))) != levels:
                raise UserError(
                    f"unet.{key} = {list(getattr(self, key))} must be one number, or one for each "
                    f"of the {levels} levels"
                )
        for level, (channels, heads) in enumerate(
            zip(self.block_out_channels, self.heads, strict=True)
        ):
            names = (self.down_block_types[level], self.up_block_types[levels - 1 - level])
            middle = level == levels - 1
            if (middle or any("CrossAttn" in name for name in names)) and channels % heads:
                raise UserError(
                    f"unet.block_out_channels = {channels} must be a multiple of "
                    f"unet.attention_head_dim = {heads}"
                )
        if self.addition_embed_type not in (None, "text_time"):
            raise UserError(
                f"unknown unet.addition_embed_type {self.addition_embed_type!r}: use text_time"
            )

    def check_added_conditions(self) -> None:
        """Checks the width of the added conditions.

        Raises:
            UserError: it is not the condition's width plus that of the six numbers.
        """
        if not self.takes_sizes:
            return
        width = self.cross_attention_dim + 6 * (self.addition_time_embed_dim or 0)
        if not self.addition_time_embed_dim or self.projection_class_embeddings_input_dim != width:
            raise UserError(
                "unet.projection_class_embeddings_input_dim = "
                f"{self.projection_class_embeddings_input_dim} must be cross_attention_dim + "
                f"6 addition_time_embed_dim = {width}"
            )


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Autoencoder. Field names are those of diffusers' `AutoencoderKL`."""

    sample_size: int = 512
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    @property
    def downscale(self) -> int:
        """Number of pixels per latent along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Noise schedule. Field names are those of diffusers' `PNDMScheduler`."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    set_alpha_to_one: bool = False
    skip_prk_steps: bool = True
    steps_offset: int = 1
    timestep_spacing: str = "leading"
    sampler: str = "pndm"  # of generation by default: a name in `diffusion.METHODS`


@dataclasses.dataclass(frozen=True)
class RematConfig:
    """Rematerialization policy of each tower's layers: a name in `models.remat.REMAT`."""

    visual: str = "none"
    cformer: str = "none"
    llama: str = "none"
    unet: str = "none"

    @classmethod
    def everywhere(cls, policy: str) -> RematConfig:
        """Returns a config with one policy for all towers."""
        return cls(policy, policy, policy, policy)


@dataclasses.dataclass(frozen=True)
class MatmulDtypeConfig:
    """Dtype of the matmuls in each tower's layers, forward and backward: "int8", "fp8", or "" for
    the compute dtype (`models.low_precision`)."""

    visual: str = ""
    llama: str = ""


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """Ids of the special tokens that the model itself uses.

    `bos` and `eos` are in the base vocabulary. The release appends the others to it, in this order.
    """

    bos: int = 1
    eos: int = 2
    pad: int = 32000
    img: int = 32001  # starts an image
    img_end: int = 32002
    image: int = 32003  # stands for one visual embedding
    frame: int | None = None  # stands for one embedding of a video frame; None: `image` does

    @classmethod
    def after(cls, base: int, *, frame: bool = False, bos: int = 1, eos: int = 2) -> TokenIds:
        """Returns the ids for a base vocabulary of `base` tokens.

        Args:
            frame: whether frames of videos have a token of their own.
            bos, eos: ids in the base vocabulary.
        """
        return cls(
            bos=bos,
            eos=eos,
            pad=base,
            img=base + 1,
            img_end=base + 2,
            image=base + 3,
            frame=base + 4 if frame else None,
        )


@dataclasses.dataclass(frozen=True)
class EmuConfig:
    """The whole model.

    One connector leads from the visual encoder to the language model: the Causal Transformer
    (Emu1), pooling (Emu2) or another. `unet` and `vae` may be absent: the instruct model has no
    image decoder.
    """

    vision: VisionConfig = VisionConfig()
    cformer: CFormerConfig | None = CFormerConfig()
    pooling: PoolingConfig | None = None
    llama: LlamaConfig = LlamaConfig()
    tokens: TokenIds = TokenIds()
    unet: UNetConfig | None = UNetConfig()
    vae: VAEConfig | None = VAEConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    # A connector of another family. Its class has a field `kind`, which names it in JSON.
    other_connector: ConnectorConfig | None = None

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            UserError: a number is out of range, or sizes do not fit each other.
        """
        _check_numbers(self, "")
        self._check_connector()
        llama, vision = self.llama, self.vision
        width = llama.attention_width or llama.width
        even = 2 * llama.heads  # a head rotates pairs of its entries
        rules = [
            ("vision.width", vision.width, "vision.head_width", vision.head_width),
            ("vision.image_size", vision.image_size, "vision.patch_size", vision.patch_size),
            (
                "llama.attention_width" if llama.attention_width else "llama.width",
                width,
                "twice llama.heads",
                even,
            ),
            ("llama.heads", llama.heads, "llama.key_value_heads", llama.kv_heads),
        ]
        for name, decoder in (("unet", self.unet), ("vae", self.vae)):
            if decoder:
                by = f"{name}.norm_num_groups", decoder.norm_num_groups
                channels = decoder.block_out_channels
                rules += [(f"{name}.block_out_channels", width, *by) for width in channels]
        for name, value, key, by in rules:
            if value % by:
                raise UserError(f"{name} = {value} must be a multiple of {key} = {by}")
        if self.unet:
            self.unet.check_levels()
            self.unet.check_added_conditions()
        for key, known in (("rope_dtype", ROPE_DTYPES), ("backbone", BACKBONES)):
            if (value := getattr(llama, key)) not in known:
                raise UserError(f"unknown llama.{key} {value!r}{suggest(value, known)}")

    def _check_connector(self) -> None:
        """Checks that there is one connector, which fits the towers that it joins."""
        if len(self._connectors()) != 1:
            raise UserError(
                "the model needs one connector: set model.cformer or model.pooling, and the other "
                "to null"
            )
        if self.llama.regression_head != self.connector.regression_head:
            raise UserError(
                f"llama.regression_head = {self.llama.regression_head} does not fit the connector: "
                "use true with model.cformer, false with model.pooling"
            )
        self.connector.check(self.vision)

    def _connectors(self) -> list[ConnectorConfig]:
        connectors = (self.cformer, self.pooling, self.other_connector)
        return [connector for connector in connectors if connector is not None]

    @property
    def connector(self) -> ConnectorConfig:
        """The configuration of the connector."""
        return self._connectors()[0]

    @property
    def family(self) -> Literal["emu", "emu2"]:
        """Name of the model's family in reports: "emu" or "emu2"."""
        return self.connector.family

    @property
    def language_towers(self) -> tuple[str, ...]:
        """Names of the parameters' groups without the image decoder's."""
        return ("visual", *self.connector.towers, "llama")

    @property
    def towers(self) -> tuple[str, ...]:
        """Names of all groups of parameters: the attributes of `EmuModel`."""
        decoder = {"unet": self.unet, "vae": self.vae}
        return (*self.language_towers, *(tower for tower, part in decoder.items() if part))

    @property
    def n_embeddings(self) -> int:
        """Number of embeddings of a still image."""
        return self.connector.counts()[0]

    @property
    def n_frame(self) -> int:
        """Number of embeddings of a video's frame."""
        return self.connector.counts()[1]

    @property
    def embedding_width(self) -> int:
        """Width of the space in which embeddings are regressed and painted."""
        return self.connector.embedding_width(self.vision, self.llama)

    @property
    def autoencodes(self) -> bool:
        """True if the decoder paints the encoder's features, so that a lone image needs no
        language model."""
        return self.connector.autoencodes

    @property
    def regression_pairs(self) -> int:
        """Number of positions of an image whose state regresses the next embedding."""
        return self.connector.regression_pairs()

    def check_tokens(self) -> None:
        """Checks that the special tokens have different ids, all below the vocabulary size. Only
        `bos` and `eos` may be the same, as in Qwen2.5.

        Raises:
            UserError: two tokens share an id, or an id is too large.
        """
        ids = {k: v for k, v in dataclasses.asdict(self.tokens).items() if v is not None}
        shared = self.tokens.bos == self.tokens.eos
        if len(set(ids.values())) + shared < len(ids) or max(ids.values()) >= self.llama.vocab_size:
            raise UserError(
                f"tokens {ids} must be different ids below llama.vocab_size = "
                f"{self.llama.vocab_size}"
            )


ROPE_DTYPES = ("bfloat16", "float16", "float32")
# Larger sizes are typing errors, and would take more memory or time than there is.
_LARGEST = {
    "layers": 2**12,
    "layers_per_block": 2**6,
    "max_positions": 2**24,
    "original_max_positions": 2**24,
    "sliding_window": 2**24,
    "vocab_size": 2**24,
    "relative_max_distance": 2**24,
}
_MAY_BE_ZERO = {
    "attention_width",
    "key_value_heads",
    "sliding_window",
    "freq_shift",
    "steps_offset",
    "dropout",
    "embed_std",
}


def _check_numbers(config: Any, where: str) -> None:
    """Checks every number of a config, recursively.

    Raises:
        UserError: a size is not positive or implausibly large, or a number is not finite.
    """
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), where + field.name
        if dataclasses.is_dataclass(value):
            _check_numbers(value, name + ".")
            continue
        for number in value if isinstance(value, tuple) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            zero = field.name in _MAY_BE_ZERO or where == "tokens."
            if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
                if name == "llama.lora.alpha" and math.isfinite(number):
                    continue
                what = "zero or more" if zero else "positive"
                raise UserError(f"{name} = {value!r} must be {what}, and finite")
            largest = _LARGEST.get(field.name, 2**20)
            if isinstance(number, int) and number > largest:
                raise UserError(f"{name} = {value!r} must be at most {largest}")
        if value == ():
            raise UserError(f"{name} must not be empty")


def emu_14b() -> EmuConfig:
    """Returns the config of the released pretrained model with its visual decoder."""
    return EmuConfig()


def emu_14b_instruct() -> EmuConfig:
    """Returns the config of the released instruction-tuned model.

    It has two more tokens, LoRA and no visual decoder.
    """
    llama = LlamaConfig(vocab_size=32006, lora=LoraConfig())
    return EmuConfig(llama=llama, unet=None, vae=None)


def emu2() -> EmuConfig:
    """Returns the config of the released Emu2, which has 36.9B parameters."""
    return EmuConfig(
        vision=VisionConfig(
            image_size=448,
            width=1792,
            layers=64,
            head_width=112,
            mlp_width=15360,
            post_norm=True,
            final_norm=False,
        ),
        cformer=None,
        pooling=PoolingConfig(),
        llama=LlamaConfig(
            vocab_size=32272,
            width=6656,
            layers=60,
            heads=52,
            mlp_width=17920,
            rope_dtype="float32",
            regression_head=False,
        ),
        tokens=TokenIds.after(32000, frame=True),
        unet=None,
        vae=None,
    )


def emu2_chat() -> EmuConfig:
    """Returns the config of the released Emu2-Chat: two more tokens, 256 embeddings of a still."""
    base = emu2()
    return dataclasses.replace(
        base,
        pooling=PoolingConfig(n_embeddings=256, n_frame=64),
        llama=dataclasses.replace(base.llama, vocab_size=32274),
    )


def emu2_gen() -> EmuConfig:
    """Returns the config of the released Emu2-Gen: Emu2 with SDXL's image decoder."""
    base = emu2()
    width = base.embedding_width
    unet = UNetConfig(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=width,
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=width + 6 * 256,
    )
    vae = VAEConfig(sample_size=1024, scaling_factor=0.13025)
    scheduler = SchedulerConfig(sampler="euler")
    return dataclasses.replace(base, unet=unet, vae=vae, scheduler=scheduler)


@dataclasses.dataclass(frozen=True)
class _LadderSize:
    """Sizes of a ladder model. Each tower has (width, layers)."""

    vision: tuple[int, int]
    cformer: tuple[int, int]
    llama: tuple[int, int]
    llama_mlp: int  # width of the language model's MLP


def emu_ladder(size: str) -> EmuConfig:
    """Returns a smaller config of the release's proportions, for scaling studies.

    `size` is "0.1B", "0.4B", "1.5B" or "7B": the approximate number of parameters, without the
    visual decoder. As in the 14B model a head is 128 wide and an image has 32 embeddings, which
    lets the same kernels serve.
    """
    sizes = {
        "0.1B": _LadderSize(vision=(512, 12), cformer=(256, 4), llama=(512, 8), llama_mlp=1408),
        "0.4B": _LadderSize(vision=(768, 12), cformer=(384, 6), llama=(1024, 16), llama_mlp=2816),
        "1.5B": _LadderSize(vision=(1024, 24), cformer=(512, 8), llama=(2048, 20), llama_mlp=5504),
        "7B": _LadderSize(vision=(1408, 40), cformer=(768, 12), llama=(4096, 32), llama_mlp=11008),
    }
    if size not in sizes:
        raise UserError(f"no ladder model {size!r}{suggest(size, sizes)}")
    chosen = sizes[size]
    vision_width, vision_layers = chosen.vision
    cformer_width, cformer_layers = chosen.cformer
    width, layers = chosen.llama
    return EmuConfig(
        vision=VisionConfig(
            width=vision_width,
            layers=vision_layers,
            head_width=88 if vision_width == 1408 else 64,
            mlp_width=6144 if vision_width == 1408 else 4 * vision_width,
        ),
        cformer=CFormerConfig(
            width=cformer_width,
            layers=cformer_layers,
            heads=cformer_width // 64,
            mlp_width=4 * cformer_width,
        ),
        llama=LlamaConfig(
            vocab_multiple=128,
            width=width,
            layers=layers,
            heads=width // 128,
            mlp_width=chosen.llama_mlp,
        ),
        unet=None,
        vae=None,
    )


def digits(base_vocab: int = 346) -> EmuConfig:
    """Returns a config with every part of the architecture that two cores train in minutes."""
    return EmuConfig(
        tokens=TokenIds.after(base_vocab),
        vision=VisionConfig(
            image_size=32,
            patch_size=8,
            width=96,
            layers=4,
            head_width=24,
            mlp_width=384,
            clip_width=64,
        ),
        cformer=CFormerConfig(
            n_causal=4,
            width=96,
            layers=2,
            heads=4,
            head_width=24,
            mlp_width=384,
            dropout=0.0,
            normalize=True,
        ),
        llama=LlamaConfig(
            vocab_size=base_vocab + 4,
            vocab_multiple=8,
            width=128,
            layers=4,
            heads=4,
            mlp_width=352,
            max_positions=256,
            rope_dtype="float32",
            embed_std=0.7,
        ),
        unet=UNetConfig(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(48, 96),
            layers_per_block=1,
            attention_head_dim=4,
            cross_attention_dim=128,
            norm_num_groups=16,
        ),
        vae=VAEConfig(
            sample_size=32,
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            norm_num_groups=8,
            scaling_factor=1.0,
        ),
    )


def digits2(base_vocab: int = 346, image_size: int = 32) -> EmuConfig:
    """Returns a config with every part of Emu2's architecture that two cores train in minutes.

    Args:
        image_size: of the visual encoder; 16 in the first stage.
    """
    base = digits(base_vocab)
    assert base.unet is not None
    return dataclasses.replace(
        base,
        tokens=TokenIds.after(base_vocab, frame=True),
        vision=VisionConfig(
            image_size=image_size,
            patch_size=8,
            width=96,
            layers=4,
            head_width=24,
            mlp_width=384,
            post_norm=True,
            final_norm=False,
        ),
        cformer=None,
        pooling=PoolingConfig(n_embeddings=4, n_frame=1),
        llama=dataclasses.replace(base.llama, vocab_size=base_vocab + 272, regression_head=False),
        unet=dataclasses.replace(
            base.unet,
            cross_attention_dim=96,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=96 + 6 * 16,
        ),
        scheduler=SchedulerConfig(set_alpha_to_one=True, sampler="euler"),
    )


def to_dict(config: Any) -> dict[str, Any]:
    """Converts a dataclass to plain JSON types (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type, values: dict[str, Any], where: str = "") -> Any:
    """Builds the frozen dataclass `cls` from plain JSON types.

    Raises:
        UserError: a key is unknown or a value has the wrong type. The message names the key.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}
    known: dict[str, Any] = {}
    for key, value in values.items():
        name = current_key(key, fields)
        if name not in fields:
            raise UserError(f"unknown config key {where + key!r}{suggest(key, fields)}")
        if name in known:
            raise UserError(f"config keys {where + name!r} and its former name are both set")
        known[name] = value
    return cls(**{k: _convert(hints[k], v, where + k) for k, v in known.items()})


def current_key(key: str, known: Collection[str]) -> str:
    """Returns the current name of a config key that has been renamed, or else the key."""
    name = RENAMED_KEYS.get(key, key)
    return name if key not in known and name in known else key


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        *others, hint = [a for a in args if a is not type(None)]
        if others and not isinstance(value, list | tuple):  # a number, or one for each level
            (hint,) = others
        return _convert(hint, value, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not isinstance(value, dict):
            raise UserError(f"config key {where!r} must be a group of keys, not {value!r}")
        if hint is ConnectorConfig:
            hint = _connector_class(value, where)
        return from_dict(hint, value, where + ".")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"config key {where!r} must be a list, not {value!r}")
        return tuple(_convert(args[0], v, where) for v in value)
    if origin is dict:
        return {k: _convert(args[1], v, f"{where}.{k}") for k, v in dict(value).items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any or (isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        return value
    raise UserError(f"config key {where!r} must be {hint.__name__}, not {value!r}")


def _connector_class(values: dict[str, Any], where: str) -> type[ConnectorConfig]:
    """Returns the class whose `kind` is that of a connector in JSON."""
    kinds = {getattr(c, "kind", ""): c for c in ConnectorConfig.__subclasses__()}
    kind = values.get("kind")
    if not kind or kind not in kinds:
        raise UserError(f"config key {where + '.kind'!r}: there is no connector {kind!r}")
    return kinds[kind]


def save_json(config: Any, path: Path) -> None:
    """Writes `config` atomically."""
    write_text(path, json.dumps(to_dict(config), indent=1) + "\n")


def load_json(cls: type, path: Path) -> Any:
    """Reads a config that `save_json` wrote.

    Raises:
        UserError: the file is missing, is not JSON, or does not fit `cls`.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: is {path.parent} a checkpoint?")
    values = read_json_object(path)
    try:
        return from_dict(cls, values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
