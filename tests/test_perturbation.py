"""Inputs that a loss depends on: a document's own text and images, and nothing else in its row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emu_jax.config import (
    CFormerConfig,
    EmuConfig,
    LlamaConfig,
    LoraConfig,
    TokenIds,
    UNetConfig,
    VAEConfig,
    VisionConfig,
)
from emu_jax.models import attention as attention_module
from emu_jax.models import blockwise
from emu_jax.train.config import GroupConfig, OptimizerConfig, TrainConfig
from emu_jax.train.objectives import get_objective, sequence_losses
from emu_jax.train.optimizer import group_of

N, SIDE, TOKENS, IMAGES = 2, 8, 128, 3  # TOKENS: splash reads rows in multiples of 128
WORDS = 20
IDS = TokenIds.after(WORDS)
MODEL = EmuConfig(
    tokens=IDS,
    vision=VisionConfig(
        image_size=SIDE, patch_size=4, width=16, layers=1, head_width=8, mlp_width=16, clip_width=64
    ),
    cformer=CFormerConfig(
        n_causal=N, width=16, layers=1, heads=2, head_width=8, mlp_width=16, dropout=0.0
    ),
    llama=LlamaConfig(
        vocab_size=WORDS + 4,
        width=24,
        layers=1,
        heads=1,
        attention_width=128,  # splash reads heads in multiples of 128
        mlp_width=16,
        max_positions=TOKENS,
    ),
    unet=UNetConfig(
        sample_size=2,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=24,
        norm_num_groups=2,
    ),
    vae=VAEConfig(
        sample_size=SIDE, block_out_channels=(4, 4, 4), layers_per_block=1, norm_num_groups=2
    ),
)
SLOW_BACKENDS = ("xla", "blockwise in blocks", "cpu", "cudnn")
BACKENDS = (
    "cpu in blocks",
    "splash",
    *(pytest.param(backend, marks=pytest.mark.slow) for backend in SLOW_BACKENDS),
)


def packed_row() -> dict[str, np.ndarray]:
    """Three documents of words, an image and words, and padding. The second alone is scored."""
    document = [IDS.bos, 7, 9, IDS.img, *[IDS.image] * N, IDS.img_end, 11, 12, IDS.eos]
    length = len(document)
    batch = {
        "tokens": np.full((1, TOKENS), IDS.pad, np.int32),
        "segment_ids": np.zeros((1, TOKENS), np.int32),
        "positions": np.zeros((1, TOKENS), np.int32),
        "embedding_index": np.full((1, TOKENS), -1, np.int32),
        "text_loss_mask": np.zeros((1, TOKENS), bool),
        "image_scored": np.array([[False, True, False]]),
        "image_valid": np.ones((1, IMAGES), bool),
        "images": np.random.default_rng(0).integers(
            0, 256, (1, IMAGES, SIDE, SIDE, 3), dtype=np.uint8
        ),
    }
    for n in range(IMAGES):
        where = slice(n * length, (n + 1) * length)
        batch["tokens"][0, where] = document
        batch["segment_ids"][0, where] = n + 1
        batch["positions"][0, where] = np.arange(length)
        index = batch["embedding_index"][0, where]
        index[4 : 4 + N] = n * N + np.arange(N)
        batch["text_loss_mask"][0, where] = (n == 1) & (index < 0)
    return batch


def perturbed(batch: dict[str, np.ndarray], document: int) -> dict[str, np.ndarray]:
    """Other words in a document (from 1), and another image."""
    tokens, images = batch["tokens"].copy(), batch["images"].copy()
    words = (batch["segment_ids"] == document) & (tokens > IDS.eos) & (tokens < WORDS)
    tokens[words] += 1
    images[:, document - 1] = 255 - images[:, document - 1]
    return batch | {"tokens": tokens, "images": images}


def loss_and_gradients(cfg: TrainConfig, compute=None):
    """The compiled function of a batch, at random parameters: (loss, {path: gradient}).

    Args:
        compute: (objective, module, batch) -> loss; by default the objective's own.
    """
    objective = get_objective(cfg)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: objective.build(nnx.Rngs(0))))
    flat = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    # No parameter is zero, which would hide what is before it.
    rng = np.random.default_rng(1)
    params = {
        path: np.float32(path.endswith("scale") + 0.2 * rng.normal(size=leaf.shape))
        for path, leaf in flat.items()
    }
    trained = {path: params.pop(path) for path in flat if group_of(path, cfg.optimizer).lr > 0}

    @jax.jit
    def run(trained, frozen, batch):
        def loss(trained):
            values = trained | frozen
            leaves = [
                (path, leaf.replace(values[".".join(map(str, path))]))
                for path, leaf in nnx.to_flat_state(state)
            ]
            module = nnx.merge(graphdef, nnx.from_flat_state(leaves))
            if compute is not None:
                return compute(objective, module, batch)
            return objective.loss(module, batch, jax.random.key(0))[0]

        return jax.value_and_grad(loss)(trained)

    return functools.partial(run, *jax.tree.map(jnp.asarray, (trained, params)))


def assert_ignores_neighbors(run, batch) -> None:
    """The loss and all gradients stay when a document before or after the scored one changes."""
    loss, gradients = run(batch)
    for neighbor in (1, 3):
        other_loss, others = run(perturbed(batch, neighbor))
        assert float(other_loss) == pytest.approx(float(loss), rel=1e-6)
        for path, gradient in gradients.items():
            scale = float(np.abs(gradient).max())
            np.testing.assert_allclose(others[path], gradient, atol=1e-6 * scale, err_msg=path)
    own_loss, own = run(perturbed(batch, 2))
    assert abs(float(own_loss) - float(loss)) > 1e-3
    assert moved(own, gradients) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_neighbor_changes_neither_loss_nor_gradients(backend, monkeypatch):
    """Packed rows of the language model. An image's embeddings are its mean color: whole towers
    take long to compile, and see one image at a time."""
    name, _, blocks = backend.partition(" ")
    if blocks:  # the blocks of queries of a long row
        monkeypatch.setattr(blockwise, "CAUSAL_BLOCK", 48)
    # The kernels need a TPU or a GPU: Pallas interprets its own, jax computes cuDNN's.
    interpreted = functools.partial(attention_module.splash, interpret=True)
    monkeypatch.setattr(attention_module, "splash", interpreted)
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *arrays, implementation, **how: plain(*arrays, implementation="xla", **how),
    )
    dtype = "bfloat16" if name == "cudnn" else "float32"

    def compute(objective, module, batch):
        colors = jnp.mean(batch["images"] / 255, axis=(2, 3))  # [1, I, 3]
        images = jnp.tile(colors[:, :, None], (1, 1, N, MODEL.llama.width // 3)).astype(dtype)
        return sum(sequence_losses(module, images, batch, loss_block=0))

    group = GroupConfig("^llama"), GroupConfig(".*", lr=0.0)
    cfg = TrainConfig(
        model=MODEL, attention=name, dtype=dtype, optimizer=OptimizerConfig(groups=group)
    )
    assert_ignores_neighbors(loss_and_gradients(cfg, compute), packed_row())


def moved(a, b) -> float:
    """The largest difference of any gradient, relative to its largest entry."""
    return max(float(np.abs(a[p] - b[p]).max() / (np.abs(b[p]).max() + 1e-30)) for p in b)


def captions() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "images": rng.integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8),
        "tokens": np.int32([[IDS.bos, word, IDS.eos] for word in (4, 5, 6)]),
        "valid": np.ones((3, 3), bool),
    }


def contexts() -> dict[str, np.ndarray]:
    row, rng = packed_row(), np.random.default_rng(0)
    length = 14  # the first document, and [IMG] of the second
    return {
        "tokens": row["tokens"][:, :length],
        "length": np.int32([length]),
        "images": row["images"][:, :2],
        "image_valid": row["image_valid"][:, :2],
        "embedding_index": np.where(row["embedding_index"] < N, row["embedding_index"], -1)[
            :, :length
        ],
        "target": rng.integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8),
    }


ADAPTERS = (GroupConfig(r"\.lora_[ab]$", lr=1e-3), GroupConfig(".*", lr=0.0))
# {name: (objective, batch, arrays of images, optimizer groups)}
CASES = {
    "emu": ("emu", packed_row, ("images",), (GroupConfig(),)),
    "instruct": ("emu", packed_row, ("images",), ADAPTERS),
    "text": ("text", packed_row, (), (GroupConfig(),)),
    "clip": ("clip", captions, ("images",), (GroupConfig(),)),
    "vae": ("vae", lambda: {"images": captions()["images"]}, ("images",), (GroupConfig(),)),
    "decoder": (
        "decoder",
        contexts,
        ("images", "target"),
        (GroupConfig("^unet", lr=1e-3), GroupConfig(".*", lr=0.0)),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_another_image_changes_loss_and_gradients(case):
    """An image is read in the context, as a target, or through frozen towers. The language
    model alone reads none."""
    objective, make_batch, images, groups = CASES[case]
    lora = LoraConfig(rank=2, alpha=4.0, dropout=0.0) if case == "instruct" else None
    model = dataclasses.replace(MODEL, llama=dataclasses.replace(MODEL.llama, lora=lora))
    cfg = TrainConfig(
        objective=objective,
        model=model,
        dtype="float32",
        attention="cpu",
        loss_block=0,
        optimizer=OptimizerConfig(groups=groups),
    )
    run, batch = loss_and_gradients(cfg), make_batch()
    loss, gradients = run(batch)
    if case == "emu":
        assert_ignores_neighbors(run, batch)
    if case == "instruct":
        assert all(path.endswith((".lora_a", ".lora_b")) for path in gradients)
    for name in images:
        other_loss, others = run(batch | {name: 255 - batch[name]})
        assert abs(float(other_loss) - float(loss)) > 1e-4 * abs(float(loss)), name
        assert moved(others, gradients) > 1e-3, name
        changed = [path for path in gradients if np.any(others[path] != gradients[path])]
        assert len(changed) > 0.8 * len(gradients), (name, changed)
    if not images:
        other_loss, others = run(batch | {"images": 255 - batch["images"]})
        assert float(other_loss) == float(loss)
        assert moved(others, gradients) == 0
