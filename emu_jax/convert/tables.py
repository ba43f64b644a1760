"""One invertible table per tower that maps the release's tensors to our parameters.

A row names a parameter, the tensors that it holds, and the transform between them. Parameters are
named as in `checkpoint` (`visual.blocks.attn.qkv`), tensors as in the state dict of the pretrained
release, or of Emu2's native files. `{}` in a tensor's name runs over the layers that a parameter
stacks along its leading axis. A `KeyStyle` describes how a particular file writes these names.

Transforms are written in einops' notation, ours on the left, the release's on the right:

  i o          input and output width of a matmul        h w i o      a convolution (HWIO)
  d c e        the fused q, k, v of a width d             p q c        rows, columns, channels
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from einops import rearrange

from emu_jax.config import LORA_TARGETS, CFormerConfig, ConnectorConfig, EmuConfig, PoolingConfig
from emu_jax.convert.tensors import Shape
from emu_jax.errors import UserError

# How the keys of Emu2's other layouts begin.
_HUB_TOWERS = ("visual.", "decoder.")
_MULTIMODAL = "multimodal_encoder."
SAFETY_CHECKER = "safety_checker."

# The autoencoder's attention: our name, and the name in diffusers 0.15.
_OLD_VAE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_VAE_ATTENTION = re.compile(
    r"((?:vae:)?(?:en|de)coder\.mid_block\.attentions\.0\.)(to_q|to_k|to_v|to_out\.0)(\..*)"
)
# The decoder's names: a pattern of ours, and its replacement in diffusers.
_DIFFUSERS = {
    r"\.to_out\.": ".to_out.0.",
    r"\.ff\.proj\.": ".ff.net.0.proj.",
    r"\.ff\.out\.": ".ff.net.2.",
    r"\.(kernel|scale)$": ".weight",
}


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of layout and its inverse.

    Attributes:
        pattern: "ours -> release", in einops' notation.
        axes: lengths that do not follow from the pattern.
        rows: the release's number of rows (first axis) where ours is rounded up; zeros fill the
            rest.
    """

    pattern: str
    axes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rows: int | None = None

    def to_release(self, x: np.ndarray) -> np.ndarray:
        """Converts one layer's parameter to the release's tensor."""
        return rearrange(x, self.pattern, **self.axes)[: self.rows]

    def from_release(self, y: np.ndarray, shape: Shape) -> np.ndarray:
        """Converts the release's tensor to one layer's parameter of this `shape`."""
        if self.rows is not None:
            full = rearrange(np.broadcast_to(np.int8(0), shape), self.pattern, **self.axes)
            if missing := len(full) - self.rows:
                y = np.concatenate([y, np.zeros((missing, *y.shape[1:]), y.dtype)])
        ours, release = self.pattern.split(" -> ")
        return rearrange(y, f"{release} -> {ours}", **self.axes)

    def release_shape(self, shape: Shape) -> Shape:
        """Returns the shape of the release's tensor for one layer's parameter of this `shape`."""
        return self.to_release(np.broadcast_to(np.int8(0), shape)).shape


SAME = Transform("... -> ...")
LINEAR = Transform("i o -> o i")
CONV = Transform("h w i o -> o i h w")
QKV = Transform("d c e -> (c e) d", {"c": 3})


@dataclasses.dataclass(frozen=True)
class TableRow:
    """A parameter and its tensors in the release: one, or one per layer when `stacked`."""

    path: str
    keys: tuple[str, ...]
    transform: Transform
    stacked: bool = False

    def layer_shape(self, shape: Shape) -> Shape:
        """Returns the shape of one layer of a parameter of this `shape`."""
        return shape[1:] if self.stacked else shape

    def layer(self, array: np.ndarray, i: int) -> np.ndarray:
        """Returns one layer of a stacked parameter, or (as layer 0) the whole of another."""
        return array[i] if self.stacked else array

    def release_shape(self, shape: Shape) -> Shape:
        """Returns the shape of each of the row's tensors, for a parameter of this `shape`."""
        return self.transform.release_shape(self.layer_shape(shape))


@dataclasses.dataclass(frozen=True)
class KeyStyle:
    """The style in which a file writes the names of the pretrained release.

    Attributes:
        peft: the language model is wrapped by peft, as in `Emu-instruct.pt`.
        base_layer: an adapted layer's own weight is called `base_layer` (peft 0.7 and later).
        old_vae: the autoencoder's attention is named as in diffusers 0.15.
        hub: the towers' names begin with `model.`, as in Emu2's folders on the Hub.
        one_file: the parts of Emu2-Gen are in one file, each with its prefix.
    """

    peft: bool = False
    base_layer: bool = False
    old_vae: bool = False
    hub: bool = False
    one_file: bool = False

    def write(self, key: str, targets: Iterable[str] = ()) -> str:
        """Returns a tensor's name in such a file. `targets` are the adapted layers' names."""
        if self.peft and key.startswith("decoder.lm."):
            key = key.replace("decoder.lm.", "decoder.lm.base_model.model.", 1)
            layer, name = key.rsplit(".", 1)
            if self.base_layer and "lora_" not in key and layer.split(".")[-1] in set(targets):
                key = f"{layer}.base_layer.{name}"
        if self.old_vae and (match := _VAE_ATTENTION.fullmatch(key)):
            key = f"{match[1]}{_OLD_VAE[match[2]]}{match[3]}"
        if self.hub and key.startswith(_HUB_TOWERS):
            key = f"model.{key}"
        if self.one_file:
            key = key.replace(":", ".", 1) if ":" in key else f"{_MULTIMODAL}{key}"
        return key

    def names(self, rows: Iterable[TableRow], cfg: EmuConfig) -> dict[str, str]:
        """Returns {the rows' keys: their names in such a file}."""
        targets = lora_targets(cfg)
        return {key: self.write(key, targets) for row in rows for key in row.keys}

    @classmethod
    def of(cls, keys: Iterable[str]) -> KeyStyle:
        """Infers a file's style from its keys."""
        keys = list(keys)
        return cls(
            peft=any("decoder.lm.base_model." in k for k in keys),
            base_layer=any(".base_layer." in k for k in keys),
            old_vae=any(".mid_block.attentions.0.proj_attn." in k for k in keys),
            hub=any(k.startswith("model.visual.") for k in keys),
            one_file=any(k.startswith(_MULTIMODAL) for k in keys),
        )


def lora_targets(cfg: EmuConfig) -> tuple[str, ...]:
    """Returns the names of the adapted layers."""
    return cfg.llama.lora.targets if cfg.llama.lora else ()


def peft_key(key: str) -> str:
    """Returns the name of an adapter's tensor in a peft folder."""
    return key.replace("decoder.lm.", "base_model.model.", 1).replace(".default.", ".")


def model_rows(cfg: EmuConfig, shapes: Mapping[str, Shape]) -> list[TableRow]:
    """Returns every row of the model that `cfg` describes, whose parameters have these `shapes`.

    Names of the denoiser's and the autoencoder's tensors are prefixed `unet:` and `vae:`, after
    the files that contain them.

    Raises:
        ValueError: a parameter has no row, or a row names a parameter that the model lacks.
    """
    rows = [*visual(cfg), *CONNECTOR_ROWS[type(cfg.connector)](cfg), *llama(cfg)]
    rows += diffusers("unet", shapes) if cfg.unet else []
    rows += diffusers("vae", shapes) if cfg.vae else []
    paths = {row.path for row in rows}
    shapes = {p: s for p, s in shapes.items() if p.split(".")[0] in cfg.towers}
    if unmatched := paths ^ set(shapes):
        raise ValueError(
            f"parameters in only one of the model and its table: {sorted(unmatched)} "
            "(convert/tables.py): add the missing rows, or remove the stale ones"
        )
    return rows


def visual(cfg: EmuConfig) -> list[TableRow]:
    """EVA-CLIP's ViT (release: `eva_vit_model.py`)."""
    side = cfg.vision.patch_size
    patches = Transform("(p q c) o -> o c p q", {"p": side, "q": side, "c": 3})
    rows = [
        TableRow("visual.cls_token", ("visual.cls_token",), Transform("d -> 1 1 d")),
        TableRow("visual.pos_embed", ("visual.pos_embed",), Transform("p d -> 1 p d")),
        TableRow("visual.patch_embed.kernel", ("visual.patch_embed.proj.weight",), patches),
        TableRow("visual.patch_embed.bias", ("visual.patch_embed.proj.bias",), SAME),
    ]
    if cfg.vision.final_norm:
        rows += [*_norm("visual.norm", bias=True), *_linear("visual.head", bias=True)]
    block = [
        *_norm("norm1", bias=True),
        TableRow("attn.qkv", ("attn.qkv.weight",), QKV),
        TableRow("attn.q_bias", ("attn.q_bias",), SAME),
        TableRow("attn.v_bias", ("attn.v_bias",), SAME),
        *_linear("attn.proj", bias=True),
        *_norm("norm2", bias=True),
        *_linear("mlp.fc1", bias=True),
        *_linear("mlp.fc2", bias=True),
    ]
    return rows + _stack("visual.blocks", "visual.blocks.{}", block, cfg.vision.layers)


def causal_transformer(model: EmuConfig) -> list[TableRow]:
    """The Causal Transformer and the norm before it (release: `causal_former.py`,
    `modeling_t5.py`)."""
    cfg, t5 = model.cformer, "cformer.cformer"
    assert cfg is not None
    bias = f"{t5}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    rows = [
        *_norm("ln_visual", bias=True),
        TableRow("cformer.causal_tokens", ("cformer.causal_tokens",), Transform("n d -> 1 n d")),
        TableRow("cformer.relative_attention_bias", (bias,), SAME),
        *_norm("cformer.final_layer_norm", f"{t5}.final_layer_norm"),
        *_linear("cformer.projection", bias=True),
    ]
    block = [
        *_norm("self_norm", "layer.0.layer_norm"),
        *_linear("self_attention.q", "layer.0.SelfAttention.q"),
        *_linear("self_attention.k", "layer.0.SelfAttention.k"),
        *_linear("self_attention.v", "layer.0.SelfAttention.v"),
        *_linear("self_attention.o", "layer.0.SelfAttention.o"),
        *_norm("cross_norm", "layer.1.layer_norm"),
        *_linear("cross_attention.q", "layer.1.EncDecAttention.q"),
        *_linear("cross_attention.k", "layer.1.EncDecAttention.k"),
        *_linear("cross_attention.v", "layer.1.EncDecAttention.v"),
        *_linear("cross_attention.o", "layer.1.EncDecAttention.o"),
        *_norm("mlp_norm", "layer.2.layer_norm"),
        *_linear("wi", "layer.2.DenseReluDense.wi"),
        *_linear("wo", "layer.2.DenseReluDense.wo"),
    ]
    return rows + _stack("cformer.blocks", f"{t5}.block.{{}}", block, cfg.layers)


def projections(model: EmuConfig) -> list[TableRow]:
    """The projections of Emu2 (release: `emu.py`)."""
    return [*_linear("project_up"), *_linear("project_down")]


# The rows of each connector.
CONNECTOR_ROWS: dict[type[ConnectorConfig], Callable[[EmuConfig], list[TableRow]]] = {
    CFormerConfig: causal_transformer,
    PoolingConfig: projections,
}


def llama(cfg: EmuConfig) -> list[TableRow]:
    """LLaMA, its regression head and its adapters (release: `modeling_llama.py`)."""
    lm, vocab = "decoder.lm", cfg.llama.vocab_size
    table = Transform("v d -> v d", rows=vocab)
    rows = [
        TableRow("llama.embed_tokens.embedding", (f"{lm}.model.embed_tokens.weight",), table),
    ]
    if not cfg.llama.tied_embeddings:
        head = Transform("i v -> v i", rows=vocab)
        rows.append(TableRow("llama.lm_head.kernel", (f"{lm}.lm_head.weight",), head))
    if cfg.llama.regression_head:
        rows += _linear("llama.stu_regress_head", f"{lm}.stu_regress_head")
    rows += _norm("llama.norm", f"{lm}.model.norm")
    biases = cfg.llama.backbone == "qwen2"
    block = [
        *_norm("input_layernorm"),
        *_linear("self_attn.q_proj", bias=biases),
        *_linear("self_attn.k_proj", bias=biases),
        *_linear("self_attn.v_proj", bias=biases),
        *_linear("self_attn.o_proj"),
        *_norm("post_attention_layernorm"),
        *_linear("mlp.gate_proj"),
        *_linear("mlp.up_proj"),
        *_linear("mlp.down_proj"),
    ]
    if cfg.llama.backbone == "qwen3":
        block += [*_norm("self_attn.q_norm"), *_norm("self_attn.k_norm")]
    for target in lora_targets(cfg):
        name = f"{LORA_TARGETS[target]}.{target}"  # such as self_attn.q_proj
        block += [
            TableRow(f"{name}.lora_a", (f"{name}.lora_A.default.weight",), LINEAR),
            TableRow(f"{name}.lora_b", (f"{name}.lora_B.default.weight",), LINEAR),
        ]
    return rows + _stack("llama.layers", f"{lm}.model.layers.{{}}", block, cfg.llama.layers)


def diffusers(tower: str, shapes: Mapping[str, Shape]) -> list[TableRow]:
    """The denoiser or the autoencoder. Submodules are named as in diffusers: only a parameter's
    own name and layout differ."""
    rows = []
    for path, shape in shapes.items():
        if not path.startswith(f"{tower}."):
            continue
        key = path.removeprefix(f"{tower}.")
        for pattern, name in _DIFFUSERS.items():
            key = re.sub(pattern, name, key)
        transform = {4: CONV, 2: LINEAR}.get(len(shape), SAME)
        rows.append(TableRow(path, (f"{tower}:{key}",), transform))
    return rows


def _linear(path: str, key: str | None = None, *, bias: bool = False) -> Iterator[TableRow]:
    yield TableRow(f"{path}.kernel", (f"{key or path}.weight",), LINEAR)
    if bias:
        yield TableRow(f"{path}.bias", (f"{key or path}.bias",), SAME)


def _norm(path: str, key: str | None = None, *, bias: bool = False) -> Iterator[TableRow]:
    yield TableRow(f"{path}.scale", (f"{key or path}.weight",), SAME)
    if bias:
        yield TableRow(f"{path}.bias", (f"{key or path}.bias",), SAME)


def _stack(path: str, key: str, block: list[TableRow], layers: int) -> list[TableRow]:
    """Turns the rows of one layer into stacked rows of all layers."""
    return [
        TableRow(
            f"{path}.{row.path}",
            tuple(f"{key.format(i)}.{row.keys[0]}" for i in range(layers)),
            row.transform,
            stacked=True,
        )
        for row in block
    ]


def unused(cfg: EmuConfig) -> dict[str, tuple[int | None, ...]]:
    """Returns the release's unused tensors with their shapes (None: any length).

    They are carried along because the release loads with `strict=True`.
    """
    tensors: dict[str, tuple[int | None, ...]] = {
        f"decoder.lm.model.layers.{i}.self_attn.rotary_emb.inv_freq": (cfg.llama.head_width // 2,)
        for i in range(cfg.llama.layers)
    }
    if cfg.cformer is not None:
        tensors["cformer.cformer.embed_tokens.weight"] = (None, cfg.cformer.width)
    return tensors


def match(
    rows: Iterable[TableRow],
    shapes: Mapping[str, Shape],
    cfg: EmuConfig,
    style: KeyStyle,
    stored: Mapping[str, Shape],
    where: str,
) -> list[str]:
    """Checks every name and shape before anything is read or transposed.

    Args:
        shapes: the shapes of our parameters.
        stored: {name: shape} of the source's tensors, prefixed `unet:` or `vae:`.
        where: the source's name in the message.

    Returns:
        The unused tensors that the source has.

    Raises:
        UserError: tensors are missing, unexpected or misshapen. The message lists all of them.
    """
    targets = lora_targets(cfg)
    missing, misshapen, expected = [], [], set()
    for row in rows:
        shape = row.release_shape(shapes[row.path])
        for key in row.keys:
            key = style.write(key, targets)
            expected.add(key)
            if key not in stored:
                missing.append(key)
            elif tuple(stored[key]) != shape:
                misshapen.append(f"{key} is {list(stored[key])}, expected {list(shape)}")
    unused_keys = []
    for key, shape in unused(cfg).items():
        key = style.write(key, targets)
        if key not in stored:
            continue
        unused_keys.append(key)
        got = tuple(stored[key])
        wanted = [got[i] if n is None and i < len(got) else n for i, n in enumerate(shape)]
        if list(got) != wanted:
            misshapen.append(f"{key} is {list(got)}, expected {wanted}")
    if style.one_file:
        unused_keys += [key for key in stored if key.startswith(SAFETY_CHECKER)]
    unexpected = sorted(set(stored) - expected - set(unused_keys))
    problems = [
        f"{len(names)} {kind}: " + ", ".join(names)
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshapen", misshapen),
        )
        if names
    ]
    if problems:
        raise UserError(f"{where} does not fit the model: " + "; ".join(problems))
    return unused_keys
