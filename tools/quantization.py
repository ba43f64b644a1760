"""Compares the language model of a run directory in bfloat16, int8 and int4 with float32.

    python tools/quantization.py runs/demo "a photo of the digit seven" "the number three in red"

Prints a table: the bytes of its parameters, and over the given texts the largest difference of
logits as a part of the largest logit, the mean KL divergence, and the mean loss of the tokens.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emu_jax import checkpoint
from emu_jax.models.llama import Llama
from emu_jax.models.quantized import is_quantized, quantize
from emu_jax.sharding import AbstractModel, make_mesh

KINDS = ("float32", "bfloat16", "int8", "int4")


@nnx.jit
def log_probabilities(llama: Llama, tokens: jax.Array) -> jax.Array:
    """Returns log-softmax of the logits, and the logits, [2, B, T, V]."""
    x = llama.embed_tokens(tokens).astype(llama.norm.scale[...].dtype)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits = llama.logits(llama(x, positions)).astype(jnp.float32)
    return jnp.stack([jax.nn.log_softmax(logits), logits])


def convert(path: str, array: jax.Array, kind: str) -> jax.Array:
    """Returns a parameter of the language model as it is stored in `kind`."""
    if kind == "bfloat16":
        return array.astype(jnp.bfloat16)
    return quantize(path, array, kind) if kind in ("int8", "int4") and is_quantized(path) else array


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("texts", nargs="+")
    args = parser.parse_args()
    cfg = checkpoint.load_config(args.run)
    mesh = make_mesh(devices=jax.devices()[:1])
    model = AbstractModel(lambda: Llama(cfg.llama, rngs=nnx.Rngs(0)), mesh)
    wanted = {
        f"llama.{path}": jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=s.sharding)
        for path, s in model.shapes.items()
    }
    params = checkpoint.read_params(args.run, wanted)
    rows = [checkpoint.load_tokenizer(args.run).encode(text) for text in args.texts]
    length = min(map(len, rows))  # longer texts are cut
    tokens = jnp.asarray([row[:length] for row in rows])
    print("| Weights | Bytes | Largest difference | KL divergence | Loss |\n|---|---|---|---|---|")
    reference = np.zeros(0)
    for kind in KINDS:
        stored = {path.removeprefix("llama."): convert(path, a, kind) for path, a in params.items()}
        both = np.asarray(log_probabilities(model.module(stored), tokens), np.float64)
        reference = both if kind == "float32" else reference
        (ours, logits), (exact, exact_logits) = both, reference
        size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(stored))
        distance = np.abs(logits - exact_logits).max() / np.abs(exact_logits).max()
        divergence = (np.exp(exact) * (exact - ours)).sum(-1).mean()
        loss = -np.take_along_axis(ours[:, :-1], np.asarray(tokens)[:, 1:, None], -1).mean()
        print(f"| {kind} | {size:,} | {distance:.1e} | {divergence:.1e} | {loss:.4f} |")


if __name__ == "__main__":
    main()
