"""Connectors: how images enter the language model, and how it generates them.

A connector turns the features of the visual encoder into embeddings, and maps between their space
and that of the language model. `EmuModel` has one, chosen by its configuration. The layers of a
connector are attributes of `EmuModel`: each is a tower of its own in a checkpoint.

A family's connector is a class here, an entry in `CONNECTORS`, and its configuration, a
`ConnectorConfig`, which computes everything that needs no model.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol, TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from emu_jax.config import CFormerConfig, ConnectorConfig, EmuConfig, PoolingConfig, RematConfig
from emu_jax.models.cformer import CFormer
from emu_jax.models.layers import LayerNorm, Linear
from emu_jax.models.low_precision import split_key

if TYPE_CHECKING:
    from emu_jax.models.emu import EmuModel

Layer = TypeVar("Layer", bound=nnx.Module)


class Connector(Protocol):
    """The interface of a connector. Its methods read the layers that `layers` made.

    Axes: N embeddings of an image, E their width, D the language model's width.
    """

    @staticmethod
    def layers(cfg: EmuConfig, remat: RematConfig, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        """Returns the connector's layers by the name of their attribute of `EmuModel`."""
        ...

    @staticmethod
    def encode(
        model: EmuModel,
        pixels: Float[Array, "B h w 3"],
        frames: bool | Bool[Array, "B"],
        dropout_key: Key[Array, ""] | None,
    ) -> Float[Array, "B N E"]:
        """Encodes normalized pixels; see `EmuModel.encode_images`."""
        ...

    @staticmethod
    def to_language(model: EmuModel, embeddings: Float[Array, "*B E"]) -> Float[Array, "*B D"]:
        """Returns embeddings as the language model reads them."""
        ...

    @staticmethod
    def regress(model: EmuModel, hidden: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        """Predicts the embedding that follows a hidden state."""
        ...

    @staticmethod
    def regression_targets(
        x: Float[Array, "B T D"],
        images: Float[Array, "B I N E"],
        embedding_index: Int[Array, "B T"],
    ) -> Float[Array, "B T E"]:
        """Returns targets of the regression; see `EmuModel.regression_targets`."""
        ...

    @staticmethod
    def vectors(cfg: EmuConfig) -> dict[str, int]:
        """Returns how many vectors of an image meet the matrices, to count FLOPs: of each tower
        that has some, and of those parameters in it that meet another number ({path: number})."""
        ...

    @staticmethod
    def attention_flops(cfg: EmuConfig) -> dict[str, float]:
        """Returns the forward FLOPs of attention between the vectors of an image, by tower."""
        ...


def layer_of(model: EmuModel, name: str, kind: type[Layer]) -> Layer:
    """Returns a layer of a model's connector."""
    layer = getattr(model, name)
    assert isinstance(layer, kind)
    return layer


class CausalConnector:
    """Emu1's: the Causal Transformer, whose embeddings the language model reads as they are."""

    @staticmethod
    def layers(cfg: EmuConfig, remat: RematConfig, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        assert cfg.cformer is not None
        return {
            "ln_visual": LayerNorm(cfg.vision.width, eps=cfg.vision.eps, rngs=rngs),
            "cformer": CFormer(
                cfg.cformer, cfg.vision.width, cfg.llama.width, remat=remat.cformer, rngs=rngs
            ),
        }

    @staticmethod
    def encode(
        model: EmuModel,
        pixels: Float[Array, "B h w 3"],
        frames: bool | Bool[Array, "B"],
        dropout_key: Key[Array, ""] | None,
    ) -> Float[Array, "B N E"]:
        """Encodes normalized pixels. A frame of a video has the embeddings of a still image."""
        dropout_key, rounding_key = split_key(dropout_key, model.visual.matmul_dtype)
        with jax.named_scope("visual"):
            norm = layer_of(model, "ln_visual", LayerNorm)
            features = norm(model.visual(pixels, rounding_key=rounding_key))
        with jax.named_scope("cformer"):
            return layer_of(model, "cformer", CFormer)(features, dropout_key=dropout_key)

    @staticmethod
    def to_language(model: EmuModel, embeddings: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
        return embeddings

    @staticmethod
    def regress(model: EmuModel, hidden: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return model.llama.regress(hidden)

    @staticmethod
    def regression_targets(
        x: Float[Array, "B T D"],
        images: Float[Array, "B I N E"],
        embedding_index: Int[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        """Returns `x`: tokens are targets too, since they are in the space of embeddings."""
        return x

    @staticmethod
    def vectors(cfg: EmuConfig) -> dict[str, int]:
        patches = cfg.vision.tokens
        return {
            "cformer": cfg.n_embeddings,
            "cformer.blocks.cross_attention.k": patches,
            "cformer.blocks.cross_attention.v": patches,
            # Tables are looked up.
            "cformer.causal_tokens": 0,
            "cformer.relative_attention_bias": 0,
        }

    @staticmethod
    def attention_flops(cfg: EmuConfig) -> dict[str, float]:
        cformer = cfg.cformer
        assert cformer is not None
        causal = cformer.n_causal**2 / 2
        cross = cformer.n_causal * cfg.vision.tokens
        inner = cformer.heads * cformer.head_width
        return {"cformer": 4.0 * cformer.layers * inner * (causal + cross)}


class PoolingConnector:
    """Emu2's: average pooling of the patches, and a linear projection each way."""

    @staticmethod
    def layers(cfg: EmuConfig, remat: RematConfig, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        narrow, wide = cfg.vision.width, cfg.llama.width
        return {
            "project_up": Linear(narrow, wide, ("embed", None), bias=False, rngs=rngs),
            "project_down": Linear(wide, narrow, ("embed", None), bias=False, rngs=rngs),
        }

    @staticmethod
    def encode(
        model: EmuModel,
        pixels: Float[Array, "B h w 3"],
        frames: bool | Bool[Array, "B"],
        dropout_key: Key[Array, ""] | None,
    ) -> Float[Array, "B N E"]:
        """Encodes normalized pixels without the class token. There is no dropout."""
        _, rounding_key = split_key(dropout_key, model.visual.matmul_dtype)
        with jax.named_scope("visual"):
            features = model.visual(pixels, rounding_key=rounding_key)[:, 1:]
        with jax.named_scope("pooling"):
            n, n_frame = model.cfg.n_embeddings, model.cfg.n_frame
            if isinstance(frames, bool) or n == n_frame:
                return pool(features, n_frame if frames is True else n)
            stills, framed = pool(features, n), pool(features, n_frame)
            framed = jnp.pad(framed, ((0, 0), (0, n - n_frame), (0, 0)))
            return jnp.where(frames[:, None, None], framed, stills)

    @staticmethod
    def to_language(model: EmuModel, embeddings: Float[Array, "*B E"]) -> Float[Array, "*B D"]:
        return layer_of(model, "project_up", Linear)(embeddings)

    @staticmethod
    def regress(model: EmuModel, hidden: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        return layer_of(model, "project_down", Linear)(hidden)

    @staticmethod
    def regression_targets(
        x: Float[Array, "B T D"],
        images: Float[Array, "B I N E"],
        embedding_index: Int[Array, "B T"],
    ) -> Float[Array, "B T E"]:
        """Returns the embeddings of images, whose space holds no tokens."""
        return gather_embeddings(images, embedding_index)

    @staticmethod
    def vectors(cfg: EmuConfig) -> dict[str, int]:
        return {"project_up": cfg.n_embeddings, "project_down": cfg.regression_pairs}

    @staticmethod
    def attention_flops(cfg: EmuConfig) -> dict[str, float]:
        return {}


# The connector that each configuration stands for.
CONNECTORS: dict[type[ConnectorConfig], type[Connector]] = {
    CFormerConfig: CausalConnector,
    PoolingConfig: PoolingConnector,
}


def pool(features: Float[Array, "B P D"], n: int) -> Float[Array, "B N D"]:
    """Averages a square of patches over the cells of a grid of n, in float32."""
    side, cells = math.isqrt(features.shape[1]), math.isqrt(n)
    grid = rearrange(features.astype(jnp.float32), "b (y x) d -> b y x d", y=side)
    cell = side // cells
    pooled = reduce(grid, "b (y s) (x t) d -> b (y x) d", "mean", s=cell, t=cell)
    return pooled.astype(features.dtype)


def gather_embeddings(
    images: Float[Array, "B I N D"], embedding_index: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Returns the embedding at each position of a row, and any other where the index is -1."""
    flat = rearrange(images, "b i n d -> b (i n) d")
    return jnp.take_along_axis(flat, jnp.maximum(embedding_index, 0)[..., None], axis=1)


def connector_of(cfg: EmuConfig) -> type[Connector]:
    """Returns the connector that a model is configured with."""
    return CONNECTORS[type(cfg.connector)]
