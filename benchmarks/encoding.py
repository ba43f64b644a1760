"""Encoding images as embeddings: images per second.

The visual encoder and the connector of a ladder model (`size`), with random weights. `floor` is the
time of its FLOPs at this machine's fastest matmul. The parts take turns.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emu_jax import bench
from emu_jax.train.flops import jaxpr_flops

floors, language = bench.load_benchmark("floors"), bench.load_benchmark("text_generation")


def run(size: str = "0.1B", images: int = 8, turns: int = 5, dtype: str = "float32") -> dict:
    cfg = dataclasses.replace(language.config(size), unet=None, vae=None)
    graphdef, state = nnx.split(language.template(cfg).module(language.random_params(cfg, dtype)))
    side = cfg.vision.image_size
    rng = np.random.default_rng(0)
    pixels = jnp.asarray(rng.standard_normal((images, side, side, 3), np.float32), dtype)

    @jax.jit
    def encode(state: Any, pixels: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state).encode_images(pixels)

    def encoded() -> int:
        with floors.precision(dtype):
            encode(state, pixels).block_until_ready()
        return images

    flops = jaxpr_flops(jax.make_jaxpr(encode)(state, pixels).jaxpr) / images
    seconds = bench.take_turns({"ours": encoded, "product": floors.peak(dtype)}, turns)
    floor = [flops * s for s in seconds["product"]]
    return {
        "size": size,
        "image_size": side,
        "images": images,
        "dtype": dtype,
        "flops": flops,
        "images_a_second": bench.median([1 / s for s in seconds["ours"]]),
        "floor_images_a_second": bench.median([1 / s for s in floor]),
        "over_floor": bench.ratio(seconds["ours"], floor),
    }


def table(figures: dict) -> str:
    f = figures
    head = ("Images at a time", "Images/s", "Floor, images/s", "Time relative to floor")
    row = (f["images"], f["images_a_second"], f["floor_images_a_second"], f["over_floor"])
    sizes = (
        f"The encoder and the Causal Transformer of the {f['size']} model, {f['image_size']} "
        f"pixels, {f['dtype']}: {f['flops'] / 1e9:,.3g} GFLOP an image."
    )
    return bench.markdown_table(head, [row]) + "\n\n" + sizes
