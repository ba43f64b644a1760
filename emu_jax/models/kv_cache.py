"""The language model's KV cache. `cpu.py` has another layout of it, with separate layers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from emu_jax.config import LlamaConfig
from emu_jax.sharding import shard

# Keys or values of all layers: stacked, or in `cpu.UnstackedKVCache` one array for each.
Layers = Float[Array, "..."] | tuple[Float[Array, "..."], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far, with all layers in one array each.

    A token takes the next entry of its row, whatever its position. `valid` is False on
    padding, which lets left- and right-padded prompts share one layout. Keys and values have the
    layout of attention's matmuls: no decode step transposes them. Between the steps of
    `generate.engine`, all arrays have a leading axis of slots.
    """

    k: Layers  # [L, B, G, K, S]
    v: Layers  # [L, B, G, S, K]
    valid: Bool[Array, "*slots B S"]
    used: Int[Array, "*slots"]

    @classmethod
    def empty(
        cls, cfg: LlamaConfig, batch: int, capacity: int, dtype: jnp.dtype | type = jnp.float32
    ) -> KVCache:
        """Returns a cache with `capacity` free entries per row."""
        k = cls._zeros(cfg, batch, (cfg.head_width, capacity), dtype)
        v = cls._zeros(cfg, batch, (capacity, cfg.head_width), dtype)
        return cls(k, v, jnp.zeros((batch, capacity), bool), jnp.zeros((), jnp.int32))

    @classmethod
    def _zeros(
        cls, cfg: LlamaConfig, batch: int, shape: tuple[int, int], dtype: jnp.dtype | type
    ) -> Layers:
        stacked = jnp.zeros((cfg.layers, batch, cfg.kv_heads, *shape), dtype)
        return shard(stacked, "layer", "batch", "heads", None, None)

    @property
    def dtype(self) -> jnp.dtype:
        return jax.tree.leaves(self.k)[0].dtype

    @property
    def layers(self) -> Int[Array, "L"] | Int[np.ndarray, "L"]:
        """The layer numbers that `update` takes, for `layers.scan`."""
        return jnp.arange(len(self.k))

    def update(
        self,
        layer: int | Int[Array, ""],
        k: Float[Array, "B T G K"],
        v: Float[Array, "B T G K"],
    ) -> tuple[KVCache, Float[Array, "B G K S"], Float[Array, "B G S K"]]:
        """Writes T tokens of a layer into the next free entries.

        The entries stay free until `advance` takes them, after all layers are written.

        Returns:
            The cache, and all keys and values of the layer.
        """
        assert isinstance(self.k, jax.Array) and isinstance(self.v, jax.Array)
        k, v = self._as_multiplied(k, v)
        ks = jax.lax.dynamic_update_slice(self.k, k[None], (layer, 0, 0, 0, self.used))
        vs = jax.lax.dynamic_update_slice(self.v, v[None], (layer, 0, 0, self.used, 0))
        k, v = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (ks, vs))
        return dataclasses.replace(self, k=ks, v=vs), k, v

    def _as_multiplied(
        self, k: Float[Array, "B T G K"], v: Float[Array, "B T G K"]
    ) -> tuple[Float[Array, "B G K T"], Float[Array, "B G T K"]]:
        k, v = rearrange(k, "b t h k -> b h k t"), rearrange(v, "b t h k -> b h t k")
        return k.astype(self.dtype), v.astype(self.dtype)

    def mark(self, valid: Bool[Array, "B T"]) -> KVCache:
        """Records which of the next T entries hold tokens rather than padding."""
        marked = jax.lax.dynamic_update_slice(self.valid, valid, (0, self.used))
        return dataclasses.replace(self, valid=marked)

    def causal_mask(self, length: int) -> Bool[Array, "B T S"]:
        """Returns the mask by which each of the next `length` tokens sees the valid entries up to
        its own."""
        query = self.used + jnp.arange(length)
        causal = jnp.arange(self.valid.shape[1])[None, :] <= query[:, None]  # [T, S]
        return causal[None] & self.valid[:, None, :]

    def advance(self, length: int) -> KVCache:
        """Marks the next `length` entries as used."""
        return dataclasses.replace(self, used=self.used + length)

    def drop(self, count: Int[Array, ""] | int) -> KVCache:
        """Frees the first `count` entries, which must be padding in every row. The others move to
        the front."""
        k, v = (
            jax.tree.map(lambda a, axis=axis: jnp.roll(a, -count, axis), part)
            for part, axis in ((self.k, -1), (self.v, -2))
        )
        valid = jnp.roll(self.valid, -count, -1)
        return dataclasses.replace(self, k=k, v=v, valid=valid, used=self.used - count)

    def resized(self, capacity: int) -> KVCache:
        """Returns a cache with `capacity` entries per row. Entries are added or removed at the end,
        where they must be free."""
        more = capacity - self.valid.shape[-1]

        def resize(a: jax.Array, axis: int) -> jax.Array:
            if more <= 0:
                return jax.lax.slice_in_dim(a, 0, capacity, axis=axis)
            return jnp.pad(a, [(0, more if n == a.ndim + axis else 0) for n in range(a.ndim)])

        k, v = (
            jax.tree.map(lambda a, axis=axis: resize(a, axis), part)
            for part, axis in ((self.k, -1), (self.v, -2))
        )
        return dataclasses.replace(self, k=k, v=v, valid=resize(self.valid, -1))

    def repeat(self, times: int) -> KVCache:
        """Repeats each row `times` times."""
        k, v = jax.tree.map(lambda a: self._repeated(a, times), (self.k, self.v))
        valid = jnp.repeat(self.valid, times, axis=0)
        return dataclasses.replace(self, k=k, v=v, valid=valid)

    def _repeated(self, a: Float[Array, "..."], times: int) -> Float[Array, "..."]:
        return jnp.repeat(a, times, axis=1)
