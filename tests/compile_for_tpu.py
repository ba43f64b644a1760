"""Compiles one sharded training step for a TPU topology, with the flags of LIBTPU_INIT_ARGS:
`python compile_for_tpu.py v5p:2x2x4 SLICES`. libtpu ends the process at a flag that it does not
know. Run by test_launch.py."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

topology, slices = sys.argv[1], int(sys.argv[2])
description = topologies.get_topology_desc(
    platform="tpu", topology_name=topology, num_slices=slices
)
mesh = Mesh(np.array(description.devices).reshape(slices, -1), ("data", "fsdp"))


def step(weights: jax.Array, x: jax.Array) -> jax.Array:
    """weights [layer, in, out], split over `fsdp`; x [row, in], split over both axes."""

    def loss(weights):
        h, _ = jax.lax.scan(lambda h, w: (jax.nn.gelu(h @ w), None), x, weights)
        return jnp.mean(jnp.square(h.astype(jnp.float32)))

    return weights - jax.grad(loss)(weights)


weights = jax.ShapeDtypeStruct(
    (4, 2048, 2048), jnp.bfloat16, sharding=NamedSharding(mesh, P(None, "fsdp"))
)
x = jax.ShapeDtypeStruct(
    (16 * len(description.devices), 2048),
    jnp.bfloat16,
    sharding=NamedSharding(mesh, P(("data", "fsdp"))),
)
text = jax.jit(step, out_shardings=weights.sharding).lower(weights, x).compile().as_text()
print("all-gather" in text, "reduce-scatter" in text or "all-reduce" in text)
