"""Model FLOPs of a training step: what the mathematics needs, by one convention.

A product of [m, k] and [k, n] is 2 m k n. A parameter that is multiplied with a token costs 2
forward, 2 for the gradient towards its input and 2 for its own: 6 when it is trained. Attention
has no parameters and costs 4 (queries x keys x width) forward, three times that with its
gradients; where it is causal, half of it, since half of it is masked. Padding counts like
any other token or image. Look-ups, norms, softmax and the optimizer are not counted, nor is what is
computed again to save memory.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from emu_jax.config import EmuConfig, RematConfig
from emu_jax.models.connectors import connector_of
from emu_jax.models.remat import RECOMPUTED_SCOPE
from emu_jax.sharding import dotted
from emu_jax.train.config import TrainConfig
from emu_jax.train.objectives import Batch, get_objective, objective_class
from emu_jax.train.optimizer import group_of


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one optimizer step over the global batch, by tower."""

    towers: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.towers.values())


def train_flops(cfg: TrainConfig) -> Flops:
    """Returns the model FLOPs of one step of `cfg`.

    Objectives that read rows are counted tower by tower, the others by tracing their step.
    """
    lengths = objective_class(cfg).row_lengths
    if lengths:
        return emu_flops(cfg, cfg.data.row_images if "row_images" in lengths else 0)
    return Flops({cfg.objective: _traced(cfg)})


def emu_flops(cfg: TrainConfig, row_images: int) -> Flops:
    """Pretraining: parameters times the tokens that they meet, and attention."""
    model, data = cfg.model, cfg.data
    rows, tokens = data.batch_size, data.row_tokens
    images = rows * row_images
    vectors = {path: images * n for path, n in connector_of(model).vectors(model).items()}
    after = model.connector.after_language
    # In the order in which the towers compute.
    met = {
        "visual": images * model.vision.tokens,
        **{path: n for path, n in vectors.items() if "." not in path and path not in after},
        "llama": rows * tokens,
        **{path: n for path, n in vectors.items() if path in after},
    }
    # Parameters that are applied to another number of tokens than the rest of their tower.
    regressed = images * model.regression_pairs
    exceptions = {path: n for path, n in vectors.items() if "." in path} | {
        "llama.stu_regress_head": regressed,
        # Tables are looked up, and the contrastive head is CLIP's own.
        "llama.embed_tokens": met["llama"] if model.llama.tied_embeddings else 0,
        "visual.pos_embed": 0,
        "visual.cls_token": 0,
        "visual.head": 0,
    }
    shapes = _shapes(cfg)
    trained = dict.fromkeys(met, False)
    matrices = {}
    for path, shape in shapes.items():
        tower = path.split(".")[0]
        if tower not in met or not _is_matrix(path, shape):
            continue
        count = next((n for name, n in exceptions.items() if path.startswith(name)), met[tower])
        # The rows that round the vocabulary up are not the model's.
        if path.startswith(("llama.lm_head", "llama.embed_tokens")):
            shape = (model.llama.width, model.llama.vocab_size)
        rate = group_of(path, cfg.optimizer).lr
        trained[tower] |= rate > 0
        matrices[path] = (tower, math.prod(shape) * count, rate > 0)

    # A gradient passes through a tower when something in it or before it is trained.
    passes, before = {}, False
    for tower in met:
        before = passes[tower] = before or trained[tower]
    towers = dict.fromkeys(met, 0.0)
    for tower, products, learns in matrices.values():
        towers[tower] += products * (2 + 2 * passes[tower] + 2 * learns)
    for tower, forward in _attention(model, rows, tokens, images).items():
        towers[tower] += forward * (3 if passes[tower] else 1)
    return Flops(towers)


def _attention(model: EmuConfig, rows: int, tokens: int, images: int) -> dict[str, float]:
    """Forward FLOPs of attention in each tower."""
    vision, llama = model.vision, model.llama
    connector = connector_of(model).attention_flops(model)
    return {
        "visual": 4.0 * images * vision.layers * vision.width * vision.tokens**2,
        **{tower: images * flops for tower, flops in connector.items()},
        "llama": 4.0 * rows * llama.layers * llama.heads * llama.head_width * tokens**2 / 2,
    }


def _is_matrix(path: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a parameter enters a matmul; stacked vectors are told by their names."""
    return len(shape) > 1 and path.rsplit(".", 1)[-1] not in ("bias", "scale", "q_bias", "v_bias")


def _shapes(cfg: TrainConfig) -> dict[str, tuple[int, ...]]:
    build = lambda: get_objective(cfg).build(nnx.Rngs(0))  # noqa: E731
    state = nnx.to_flat_state(nnx.state(nnx.eval_shape(build)))
    return {dotted(path): leaf.shape for path, leaf in state}


def _traced(cfg: TrainConfig) -> float:
    """Returns the FLOPs of the traced gradient of the loss, without recomputation."""
    cfg = dataclasses.replace(cfg, remat=RematConfig(), attention="blockwise")
    objective = get_objective(cfg)
    build = lambda: objective.build(nnx.Rngs(0))  # noqa: E731
    graphdef, state = nnx.split(nnx.eval_shape(build))
    flat = {dotted(path): leaf for path, leaf in nnx.to_flat_state(state)}
    paths = dict(zip(flat, nnx.to_flat_state(state), strict=True))
    learns = {path for path in flat if group_of(path, cfg.optimizer).lr > 0}

    def loss(
        trained: dict[str, jax.Array], frozen: dict[str, jax.Array], batch: Batch
    ) -> Float[Array, ""]:
        values = trained | frozen
        leaves = [(paths[p][0], paths[p][1].replace(values[p])) for p in flat]
        module = nnx.merge(graphdef, nnx.from_flat_state(leaves))
        return objective.loss(module, batch, jax.random.key(0))[0]

    arrays = {p: jax.ShapeDtypeStruct(v.shape, v.dtype) for p, v in flat.items()}
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype)
        for name, (shape, dtype) in objective.batch_shapes().items()
    }
    jaxpr = jax.make_jaxpr(jax.grad(loss))(
        {p: v for p, v in arrays.items() if p in learns},
        {p: v for p, v in arrays.items() if p not in learns},
        batch,
    )
    return jaxpr_flops(jaxpr.jaxpr, without=RECOMPUTED_SCOPE)


def jaxpr_flops(jaxpr: Any, without: str | None = None) -> float:
    """FLOPs of the matrix products and convolutions in a jaxpr; loops count each turn. Those in
    scopes of the name `without` do not count."""
    total = 0.0
    for eqn in jaxpr.eqns:
        # A scope that nothing surrounds is named inside of the transforms: transpose(jvp(again)).
        if without in re.split(r"[()/]", str(eqn.source_info.name_stack)):
            continue
        out = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
        if eqn.primitive.name == "dot_general":
            ((contracted, _), _) = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2.0 * out * math.prod(shape[axis] for axis in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            features = eqn.params["dimension_numbers"].rhs_spec[0]
            # The gradient towards the input of a strided one multiplies by the zeros between.
            zeros = math.prod(eqn.params["lhs_dilation"])
            total += 2.0 * out * math.prod(kernel) / kernel[features] / zeros
        turns = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                total += turns * jaxpr_flops(getattr(value, "jaxpr", value), without)
    return total


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")
