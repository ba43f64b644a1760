"""The whole model, assembled from its towers (release: `modeling_emu.py`, paper section 2; Emu2's
`emu.py`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from emu_jax.config import EmuConfig, MatmulDtypeConfig, RematConfig
from emu_jax.models.connectors import Connector, connector_of, gather_embeddings
from emu_jax.models.eva_clip import VisionTransformer
from emu_jax.models.kv_cache import KVCache
from emu_jax.models.llama import Llama
from emu_jax.models.unet import UNet
from emu_jax.models.vae import VAE
from emu_jax.sharding import shard


class EmuModel(nnx.Module):
    """An autoregressive model over text tokens and visual embeddings, and a diffusion decoder from
    visual embeddings to images.

    `unet` and `vae` are None if the configuration has none, or with `painter=False` (pretraining
    does not need them). With `language=False` there is no `llama`, which autoencoding does not
    need. `backend` selects the attention of the language model over whole rows,
    and, unless it is "cudnn", of the visual encoder. All other attention uses the platform's
    unfused kernels: decoding, the U-Net, the VAE, and the Causal Transformer, whose attention
    weights have dropout. Without a `backend`, all attention does. `matmul_dtype` is for training
    (`low_precision.py`): decoding computes in the compute dtype.

    The configuration chooses the connector between the towers (`connectors.py`).
    """

    llama: Llama

    def __init__(
        self,
        cfg: EmuConfig,
        *,
        painter: bool = True,
        language: bool = True,
        remat: RematConfig | None = None,
        matmul_dtype: MatmulDtypeConfig | None = None,
        backend: str | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        remat = remat or RematConfig()
        matmul_dtype = matmul_dtype or MatmulDtypeConfig()
        self.visual = VisionTransformer(
            cfg.vision,
            remat=remat.visual,
            matmul_dtype=matmul_dtype.visual,
            rngs=rngs,
            backend=None if backend == "cudnn" else backend,
        )
        for name, layer in connector_of(cfg).layers(cfg, remat, rngs).items():
            setattr(self, name, layer)
        if language:
            self.llama = Llama(
                cfg.llama,
                remat=remat.llama,
                matmul_dtype=matmul_dtype.llama,
                backend=backend,
                rngs=rngs,
            )
        self.unet = UNet(cfg.unet, remat=remat.unet, rngs=rngs) if painter and cfg.unet else None
        self.vae = VAE(cfg.vae, rngs=rngs) if painter and cfg.vae else None
        self.cfg = cfg

    @property
    def connector(self) -> type[Connector]:
        """The connector between the visual encoder and the language model."""
        return connector_of(self.cfg)

    def encode_images(
        self,
        pixels: Float[Array, "*B h w 3"],
        *,
        frames: bool | Bool[Array, "*B"] = False,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "*B N E"]:
        """Encodes normalized pixels as the N embeddings of each image, of width
        `cfg.embedding_width`.

        Args:
            frames: whether the images are frames of videos, which have `cfg.n_frame` embeddings.
                With an array, N is `cfg.n_embeddings`, and zeros follow those of a frame.
        """
        batch = pixels.shape[:-3]
        pixels = shard(pixels.reshape(-1, *pixels.shape[-3:]), "image", None, None, None)
        if not isinstance(frames, bool):
            frames = frames.reshape(-1)
        embeddings = self.connector.encode(self, pixels, frames, dropout_key)
        return embeddings.reshape(*batch, *embeddings.shape[1:])

    def to_language(self, embeddings: Float[Array, "*B E"]) -> Float[Array, "*B D"]:
        """Returns the embeddings of images as inputs of the language model."""
        return self.connector.to_language(self, embeddings)

    def regress(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        """Predicts the visual embedding that follows a hidden state, `cfg.embedding_width` wide.

        `to_language` turns it into the next input of the language model.
        """
        return self.connector.regress(self, hidden)

    def embed(
        self,
        tokens: Int[Array, "B T"],
        images: Float[Array, "B I N E"] | None = None,
        embedding_index: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the embeddings of each row: those of an image at its `<image>` positions, those
        of the token table elsewhere.

        `embedding_index` holds image * N + n for embedding n of an image, and -1 in text.
        """
        x = self.llama.embed_tokens(tokens)
        if images is None or embedding_index is None:
            return x
        x = x.astype(images.dtype)
        visual = gather_embeddings(self.to_language(images), embedding_index)
        return jnp.where((embedding_index >= 0)[..., None], visual, x)

    def regression_targets(
        self,
        x: Float[Array, "B T D"],
        images: Float[Array, "B I N E"],
        embedding_index: Int[Array, "B T"],
    ) -> Float[Array, "B T E"]:
        """Returns the embedding at each position, as a target for the state before it.

        `regression_mask` selects the positions of the loss. `x` is the output of `embed`.
        """
        return self.connector.regression_targets(x, images, embedding_index)

    def regression_mask(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        embedding_index: Int[Array, "B T"] | None = None,
        image_scored: Bool[Array, "B I"] | None = None,
    ) -> Bool[Array, "B T"]:
        """Returns the positions t whose state regresses the embedding at t + 1.

        These are `[IMG]` and `<image>` where `<image>` follows in the same document, and where
        `[/IMG]` follows if that is a target (Emu1): `cfg.regression_pairs` per still image.
        With `embedding_index` and `image_scored`, only scored images count.
        """
        ids = self.cfg.tokens
        here = (tokens == ids.img) | (tokens == ids.image)
        after = jnp.roll(tokens, -1, axis=1)
        follows = after == ids.image
        if self.cfg.regression_pairs > self.cfg.n_embeddings:
            follows = follows | (after == ids.img_end)
        same = segment_ids == jnp.roll(segment_ids, -1, axis=1)
        mask = (here & follows & same).at[:, -1].set(False)
        if embedding_index is None or image_scored is None:
            return mask
        index = jnp.maximum(embedding_index, jnp.roll(embedding_index, -1, axis=1))  # at t or t + 1
        image = jnp.maximum(index, 0) // self.cfg.n_embeddings
        return mask & jnp.take_along_axis(image_scored, image, axis=1)

    def regress_image(
        self,
        llama: Llama,
        hidden: Float[Array, "B D"],
        positions: Int[Array, "B"],
        cache: KVCache,
    ) -> tuple[Float[Array, "B N E"], KVCache]:
        """Generates the N embeddings of the next image, one after the other (release:
        `generate_image`, which recomputes the whole row for each).

        `llama` is this model's, or its copy `unstacked_for_decoding`. `hidden` holds the states at
        `[IMG]`, whose positions are `positions`. The cache needs N - 1 free entries. The returned
        cache holds the first N - 1 embeddings.
        """
        first = self.regress(hidden)[:, None]
        graphdef, params = nnx.split(llama)

        def step(
            carry: tuple[Float[Array, "B 1 E"], KVCache], i: Int[Array, ""]
        ) -> tuple[tuple[Float[Array, "B 1 E"], KVCache], Float[Array, "B E"]]:
            previous, cache = carry
            llama = nnx.merge(graphdef, params)
            valid = jnp.ones(previous.shape[:2], bool)
            h, cache = llama.extend(
                self.to_language(previous), (positions + i)[:, None], valid, cache
            )
            following = self.regress(h)
            return (following, cache), following[:, 0]

        n = self.cfg.n_embeddings
        (_, cache), rest = jax.lax.scan(step, (first, cache), jnp.arange(1, n))
        return jnp.concatenate([first, rearrange(rest, "n b d -> b n d")], axis=1), cache

    def regress_after(
        self,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, "B"],
        images: Float[Array, "B I N E"] | None = None,
        embedding_index: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B N E"]:
        """Generates the N embeddings that follow right-padded contexts, each ending in `[IMG]`.

        Right padding and positions from 0 are as in the release's `generate_image`.
        """
        batch, length = tokens.shape
        x = self.embed(tokens, images, embedding_index)
        llama = self.llama.unstacked_for_decoding()
        cache = llama.empty_cache(batch, length + self.cfg.n_embeddings - 1, x.dtype)
        positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
        hidden, cache = llama.extend(x, positions, positions < lengths[:, None], cache)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.regress_image(llama, last, lengths - 1, cache)[0]
