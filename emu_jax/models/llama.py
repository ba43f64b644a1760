"""LLaMA with Emu's regression head (release: `modeling_llama.py`; transformers 4.31)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from emu_jax.config import LlamaConfig
from emu_jax.models.attention import attention
from emu_jax.models.backend import kernels
from emu_jax.models.layers import Embedding, Linear, RMSNorm, normal, scan, stack
from emu_jax.models.lora import LoraLinear, adapted
from emu_jax.models.remat import CHECKPOINT_QKV, CHECKPOINT_RESIDUAL
from emu_jax.sharding import shard, spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens read so far.

    A token takes the next slot of its row whatever its position; `valid` is False on the
    slots of padding, so that left- and right-padded prompts share one layout. Keys and values
    lie as attention multiplies by them: nothing is transposed at each token.

    Where a model's layers are apart (`Llama.for_reading`), so are its caches: tuples of L, with
    rows and heads as one axis, which is not split over devices by heads.
    """

    k: Float[Array, "L B H K S"] | tuple[Float[Array, "B*H K S"], ...]
    v: Float[Array, "L B H S K"] | tuple[Float[Array, "B*H S K"], ...]
    valid: Bool[Array, "B S"]
    used: Int[Array, ""]

    @classmethod
    def empty(
        cls, cfg: LlamaConfig, batch: int, slots: int, dtype=jnp.float32, *, apart: bool = False
    ) -> KVCache:
        def zeros(*shape: int):
            if apart:
                return (jnp.zeros((batch * cfg.heads, *shape), dtype),) * cfg.layers
            stacked = jnp.zeros((cfg.layers, batch, cfg.heads, *shape), dtype)
            return shard(stacked, "layer", "batch", "heads", None, None)

        k, v = zeros(cfg.head_width, slots), zeros(slots, cfg.head_width)
        return cls(k, v, jnp.zeros((batch, slots), bool), jnp.zeros((), jnp.int32))

    @property
    def dtype(self) -> jnp.dtype:
        return jax.tree.leaves(self.k)[0].dtype

    def repeat(self, times: int) -> KVCache:
        """With every row `times` times in a row."""
        rows = len(self.valid)

        def one(a: jax.Array) -> jax.Array:
            if a.ndim == 5:
                return jnp.repeat(a, times, axis=1)
            a = jnp.repeat(rearrange(a, "(b h) x y -> b h x y", b=rows), times, axis=0)
            return rearrange(a, "b h x y -> (b h) x y")

        k, v = jax.tree.map(one, (self.k, self.v))
        return KVCache(k, v, jnp.repeat(self.valid, times, axis=0), self.used)


def rotary_frequencies(head_width: int, theta: float) -> Float[np.ndarray, "K/2"]:
    """1 / theta^(2i / K) (`rotary_emb.inv_freq`), every step rounded as torch rounds it.

    In numpy, when a program is traced: XLA's power differs in the last bits, and rounding the
    tables to bfloat16 can make much of that.
    """
    half = head_width // 2
    exponent = np.arange(half, dtype=np.float32) / np.float32(half)
    power = np.power(float(theta), exponent.astype(np.float64))
    return np.float32(1) / power.astype(np.float32)


def rotary(
    x: Float[Array, "B T H K"], positions: Int[Array, "B T"], theta: float, dtype: str = "float32"
) -> Float[Array, "B T H K"]:
    """Rotary position embedding, the two halves of a head rotated together.

    Cosines and sines are rounded to `dtype` (`LlamaConfig.rope_dtype`).
    """
    frequency = rotary_frequencies(x.shape[-1], theta)
    angle = positions[..., None, None].astype(jnp.float32) * frequency  # [B, T, 1, K/2]
    kept = jnp.finfo(dtype)
    cos, sin = (
        jax.lax.reduce_precision(wave, kept.nexp, kept.nmant)
        for wave in (jnp.cos(angle), jnp.sin(angle))
    )
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _linear(
    cfg: LlamaConfig,
    path: str,
    width_in: int,
    width_out: int,
    axes: tuple[str, str],
    rngs: nnx.Rngs,
) -> Linear:
    """A layer without bias, at `path` of its block; with an adapter where the configuration asks
    for one."""
    if cfg.lora and path.rsplit(".", 1)[-1] in cfg.lora.targets:
        return LoraLinear(width_in, width_out, axes, path=path, lora=cfg.lora, rngs=rngs)
    return Linear(width_in, width_out, axes, bias=False, rngs=rngs)


class LlamaAttention(nnx.Module):
    """Rotary multi-head attention, no biases, every head with its own keys."""

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
        inner = cfg.heads * cfg.head_width
        into = (cfg.width, inner, ("embed", "heads"), rngs)
        self.q_proj = _linear(cfg, "self_attn.q_proj", *into)
        self.k_proj = _linear(cfg, "self_attn.k_proj", *into)
        self.v_proj = _linear(cfg, "self_attn.v_proj", *into)
        self.o_proj = _linear(cfg, "self_attn.o_proj", inner, cfg.width, ("heads", "embed"), rngs)
        self.cfg = cfg

    def project(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        dropout_key: jax.Array | None = None,
    ):
        """Rotated queries and keys, and values, each [B, T, H, K]."""
        q, k, v = (
            rearrange(adapted(proj, x, dropout_key), "b t (h k) -> b t h k", k=self.cfg.head_width)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        rope = self.cfg.rope_theta, self.cfg.rope_dtype
        q, k = rotary(q, positions, *rope), rotary(k, positions, *rope)
        heads = lambda x: checkpoint_name(shard(x, "batch", None, "heads", None), CHECKPOINT_QKV)  # noqa: E731
        return heads(q), heads(k), heads(v)

    def attend(self, q, k, v, dropout_key=None, **how) -> Float[Array, "B T D"]:
        """`how`: masks and backend, as `attention` takes them."""
        out = attention(q, k, v, scale=self.cfg.head_width**-0.5, **how)
        out = rearrange(out, "b t h k -> b t (h k)")
        return checkpoint_name(adapted(self.o_proj, out, dropout_key), CHECKPOINT_RESIDUAL)


class LlamaMLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
        width, hidden = cfg.width, cfg.mlp_width
        self.gate_proj = _linear(cfg, "mlp.gate_proj", width, hidden, ("embed", "mlp"), rngs)
        self.up_proj = _linear(cfg, "mlp.up_proj", width, hidden, ("embed", "mlp"), rngs)
        self.down_proj = _linear(cfg, "mlp.down_proj", hidden, width, ("mlp", "embed"), rngs)

    def __call__(
        self, x: Float[Array, "B T D"], dropout_key: jax.Array | None = None
    ) -> Float[Array, "B T D"]:
        gate = shard(adapted(self.gate_proj, x, dropout_key), "batch", None, "mlp")
        up = shard(adapted(self.up_proj, x, dropout_key), "batch", None, "mlp")
        return adapted(self.down_proj, jax.nn.silu(gate) * up, dropout_key)


class LlamaBlock(nnx.Module):
    """Pre-norm decoder layer."""

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(cfg.width, eps=cfg.eps, rngs=rngs)
        self.self_attn = LlamaAttention(cfg, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(cfg.width, eps=cfg.eps, rngs=rngs)
        self.mlp = LlamaMLP(cfg, rngs=rngs)

    def finish(self, x, attended, dropout_key=None) -> Float[Array, "B T D"]:
        """The residual sums after attention."""
        x = shard(x + attended, "batch", None, None)
        mlp = self.mlp(self.post_attention_layernorm(x), dropout_key)
        return shard(x + mlp, "batch", None, None)


class Llama(nnx.Module):
    """The multimodal language model over embeddings [B, T, D]."""

    def __init__(
        self, cfg: LlamaConfig, *, remat: str = "none", backend: str | None = None, rngs: nnx.Rngs
    ):
        self.embed_tokens = Embedding(
            cfg.padded_vocab, cfg.width, init=normal(cfg.embed_std), rngs=rngs
        )
        self.layers = stack(cfg.layers, lambda rngs: LlamaBlock(cfg, rngs=rngs), rngs)
        self.norm = RMSNorm(cfg.width, eps=cfg.eps, rngs=rngs)
        self.lm_head = Linear(
            cfg.width, cfg.padded_vocab, ("embed", "vocab"), bias=False, rngs=rngs
        )
        self.stu_regress_head = Linear(cfg.width, cfg.width, ("embed", None), bias=False, rngs=rngs)
        self.cfg, self.remat, self.backend = cfg, remat, backend

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm; causal, within a segment when ids are given.
        With a key the adapters drop, as in training."""
        how = {"causal": True, "segment_ids": segment_ids, "backend": self.backend}

        keys = None
        if dropout_key is not None and self.cfg.lora and self.cfg.lora.dropout > 0:
            keys = jax.random.split(dropout_key, self.cfg.layers)

        def body(block: LlamaBlock, x, key):
            q, k, v = block.self_attn.project(block.input_layernorm(x), positions, key)
            return block.finish(x, block.self_attn.attend(q, k, v, key, **how), key), None

        with jax.named_scope("llama"):
            x, _ = scan(self.layers, body, shard(x, "batch", None, None), keys, remat=self.remat)
            return self.norm(x)

    def for_reading(self) -> Llama:
        """This model as it reads tokens one by one the fastest; itself where it is so already.

        On a CPU its layers are apart: XLA's compiler there copies a layer's parameters out of
        their stack before it multiplies by them, and so all of them for each token. Taking them
        apart copies them once: outside of compiled functions best, else before their loop.
        """
        layers = kernels().decoding_layers(self.layers, self.cfg.layers)
        if layers is self.layers:
            return self
        llama = nnx.merge(*nnx.split(self))
        llama.layers = layers
        return llama

    def empty_cache(self, batch: int, slots: int, dtype: jnp.dtype) -> KVCache:
        apart = isinstance(self.layers, nnx.List)
        return KVCache.empty(self.cfg, batch, slots, dtype, apart=apart)

    def read(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        cache: KVCache,
        *,
        mask: Bool[Array, "B T S"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Hidden states of T more tokens after those in `cache`, and the cache with them.

        `valid` is False on padding, which nothing attends to. A token attends to all valid slots
        up to its own, or to those of `mask`. The cache must have T free slots left; it is updated
        in place under jit when donated.
        """
        length = x.shape[1]
        slots = jax.lax.dynamic_update_slice(cache.valid, valid, (0, cache.used))
        if mask is None:
            query = cache.used + jnp.arange(length)
            causal = jnp.arange(slots.shape[1])[None, :] <= query[:, None]  # [T, S]
            mask = causal[None] & slots[:, None, :]
        how = {"mask": mask[:, None], "cached": True}

        def run(block: LlamaBlock, x, write):
            q, k, v = block.self_attn.project(block.input_layernorm(x), positions)
            k, v = rearrange(k, "b t h k -> b h k t"), rearrange(v, "b t h k -> b h t k")
            k, v = write(k.astype(cache.dtype), v.astype(cache.dtype))
            return block.finish(x, block.self_attn.attend(q, k, v, **how))

        if isinstance(self.layers, nnx.List):
            ks, vs = list(cache.k), list(cache.v)
            for n, block in enumerate(self.layers):

                def write(k, v, n=n):
                    # As a product takes them, so that XLA's CPU compiler, which would else update
                    # one copy to multiply by and another to keep, updates them in place.
                    flat = lambda a: rearrange(a, "b h x y -> (b h) x y")  # noqa: E731
                    ks[n] = jax.lax.dynamic_update_slice(ks[n], flat(k), (0, 0, cache.used))
                    vs[n] = jax.lax.dynamic_update_slice(vs[n], flat(v), (0, cache.used, 0))
                    split = lambda a: rearrange(a, "(b h) x y -> b h x y", b=len(k))  # noqa: E731
                    return split(ks[n]), split(vs[n])

                x = run(block, x, write)
            k, v = tuple(ks), tuple(vs)
        else:

            def body(block: LlamaBlock, carry, layer):
                x, *kv = carry

                def write(k, v):
                    at = (layer, 0, 0, 0, cache.used), (layer, 0, 0, cache.used, 0)
                    for i, new in enumerate((k, v)):
                        kv[i] = jax.lax.dynamic_update_slice(kv[i], new[None], at[i])
                    return (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in kv)

                return (run(block, x, write), *kv), None

            carry = (x, cache.k, cache.v)
            (x, k, v), _ = scan(self.layers, body, carry, jnp.arange(self.cfg.layers))
        return self.norm(x), KVCache(k, v, slots, cache.used + length)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Next-token logits, without the rows that only round the vocabulary up."""
        return self.lm_head(hidden)[..., : self.cfg.vocab_size]

    def token_losses(
        self, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], *, block: int
    ) -> Float[Array, "B T"]:
        """The cross-entropy of each target, float32, where the logits of at most `block`
        positions of a row exist at a time: they are computed again for the gradient. With a
        block of 0 all exist at once, and are kept.

        Each device does so for its own rows, with the whole head gathered once; its gradient
        is summed over devices once, not once a block.
        """
        kernel = self.lm_head.kernel[...].astype(hidden.dtype)
        how = {"vocab": self.cfg.vocab_size, "block": block}
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return kernels().cross_entropy(hidden, kernel, targets, **how)
        rows = spec(("batch", None, None), hidden.shape, mesh)[0]
        width, columns = spec(("embed", "vocab"), kernel.shape, mesh)

        def local(hidden, kernel, targets):
            if width is not None:
                kernel = jax.lax.all_gather(kernel, width, axis=0, tiled=True)
            return kernels().cross_entropy(hidden, kernel, targets, axis=columns, **how)

        return jax.shard_map(
            local,
            in_specs=(P(rows), P(width, columns), P(rows)),
            out_specs=P(rows),
            check_vma=False,
        )(hidden, kernel, targets)

    def regress(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """The next visual embedding."""
        return self.stu_regress_head(hidden)
