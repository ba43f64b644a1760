"""A third family: a connector that the test brings is trained, painted from and converted."""

import dataclasses
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import random_parameters
from einops import rearrange
from flax import nnx

from emu_jax import checkpoint
from emu_jax.config import ConnectorConfig, EmuConfig, digits2, from_dict, save_json, to_dict
from emu_jax.convert import release_config
from emu_jax.convert.convert import convert
from emu_jax.convert.tables import CONNECTOR_ROWS, LINEAR, TableRow
from emu_jax.errors import UserError
from emu_jax.generate.api import load
from emu_jax.models.connectors import CONNECTORS, gather_embeddings, layer_of
from emu_jax.models.emu import EmuModel
from emu_jax.models.layers import Linear
from emu_jax.sharding import AbstractModel, make_mesh, nest
from emu_jax.tokenizer import Tokenizer
from emu_jax.train.config import GroupConfig, OptimizerConfig, TrainConfig, digits_data
from emu_jax.train.flops import train_flops
from emu_jax.train.loop import train
from emu_jax.train.warm_start import config_keys

LAYERS = ("resampler", "lift", "lower")


@dataclasses.dataclass(frozen=True)
class ResamplerConfig(ConnectorConfig):
    """Linear mixtures of the patches."""

    family = "emu2"
    towers: ClassVar[dict[str, str]] = dict.fromkeys(LAYERS, "other_connector")
    after_language = ("lower",)

    kind: str = "resampler"
    n: int = 4

    def counts(self):
        return self.n, self.n


class Resampler:
    """The connector of `ResamplerConfig`."""

    @staticmethod
    def layers(cfg, remat, rngs):
        narrow, wide = cfg.vision.width, cfg.llama.width
        sizes = (cfg.vision.grid**2, cfg.n_embeddings), (narrow, wide), (wide, narrow)
        return {
            name: Linear(*size, ("embed", None), bias=False, rngs=rngs)
            for name, size in zip(LAYERS, sizes, strict=True)
        }

    @staticmethod
    def encode(model, pixels, frames, dropout_key):
        patches = rearrange(model.visual(pixels)[:, 1:], "b p d -> b d p")
        return rearrange(layer_of(model, "resampler", Linear)(patches), "b d n -> b n d")

    @staticmethod
    def to_language(model, embeddings):
        return layer_of(model, "lift", Linear)(embeddings)

    @staticmethod
    def regress(model, hidden):
        return layer_of(model, "lower", Linear)(hidden)

    @staticmethod
    def regression_targets(x, images, embedding_index):
        return gather_embeddings(images, embedding_index)

    @staticmethod
    def vectors(cfg):
        return {"resampler": cfg.vision.width, "lift": cfg.n_embeddings, "lower": cfg.n_embeddings}

    @staticmethod
    def attention_flops(cfg):
        return {}


def rows(cfg):
    return [TableRow(f"{name}.kernel", (f"{name}.weight",), LINEAR) for name in LAYERS]


def read_config(stored, *files):
    cfg = release_config._emu2(stored, *files)
    n, _ = stored.shape("resampler.weight", 2)
    return dataclasses.replace(cfg, pooling=None, other_connector=ResamplerConfig(n=n))


def small_model() -> EmuConfig:
    base = digits2(image_size=16)
    assert base.unet and base.vae
    return dataclasses.replace(
        base,
        vision=dataclasses.replace(
            base.vision, patch_size=4, width=24, head_width=12, layers=1, mlp_width=48
        ),
        pooling=None,
        other_connector=ResamplerConfig(),
        llama=dataclasses.replace(base.llama, width=32, layers=1, heads=2, mlp_width=48),
        unet=dataclasses.replace(
            base.unet,
            sample_size=4,
            block_out_channels=(16, 16),
            attention_head_dim=2,
            norm_num_groups=8,
            transformer_layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=24,
            projection_class_embeddings_input_dim=24 + 6 * 16,
        ),
        vae=dataclasses.replace(base.vae, sample_size=8, block_out_channels=(8, 8)),
    )


def parameters(run):
    cfg = checkpoint.load_model_config(run)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    shapes = AbstractModel(lambda: EmuModel(cfg, rngs=nnx.Rngs(0)), mesh).shapes
    wanted = {
        k: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=s.sharding)
        for k, s in shapes.items()
    }
    return cfg, checkpoint.read_params(run, wanted)


def test_a_third_family_is_a_connector_and_its_table(tmp_path, monkeypatch, copy_digits):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setitem(CONNECTORS, ResamplerConfig, Resampler)
    monkeypatch.setitem(CONNECTOR_ROWS, ResamplerConfig, rows)
    monkeypatch.setitem(release_config.CONNECTOR_READERS, "resampler.weight", read_config)
    model = small_model()
    assert from_dict(EmuConfig, to_dict(model)) == model
    with pytest.raises(UserError, match="there is no connector 'sampler'"):
        from_dict(EmuConfig, to_dict(model) | {"other_connector": {"kind": "sampler"}})
    assert model.language_towers == ("visual", *LAYERS, "llama") and model.regression_pairs == 4
    assert config_keys()["lift"] == "other_connector"

    # A pretrained model, from random numbers.
    copy_digits(tmp_path / "data")
    mesh = make_mesh(1, 1, 1, devices=devices)
    template = AbstractModel(lambda: EmuModel(model, rngs=nnx.Rngs(0)), mesh)
    with ocp.StandardCheckpointer() as checkpointer:
        folder = (tmp_path / "base" / "0" / "params").absolute()
        checkpointer.save(folder, nest(random_parameters(template)))
    save_json(model, tmp_path / "base" / "config.json")
    words = Tokenizer.load(tmp_path / "data" / "tokenizer", family=model.family)
    words.save(tmp_path / "base" / "tokenizer")

    # One step of training, from it.
    data = digits_data(
        root=str(tmp_path / "data"),
        family="emu2",
        mixture={"pairs": 1.0},
        batch_size=2,
        row_tokens=32,
        row_images=2,
        image_size=16,
        augment=False,
        prefetch=0,
    )
    cfg = TrainConfig(
        model=model,
        init_from=str(tmp_path / "base"),
        data=data,
        optimizer=OptimizerConfig(
            groups=(GroupConfig(r"^visual\.", lr=0.0), GroupConfig(".*", lr=1e-2))
        ),
        steps=1,
        save_frozen=False,
        dtype="float32",
    )
    flops = train_flops(cfg).towers
    # 4 images: 24 features mix 16 patches into 4 embeddings each, which two matrices read.
    assert flops["resampler"] == 6 * (16 * 4) * (4 * 24)
    assert flops["lift"] == flops["lower"] == 6 * (24 * 32) * (4 * 4)
    train(cfg, tmp_path / "run")
    (_, before), (_, after) = parameters(tmp_path / "base"), parameters(tmp_path / "run")
    for name in LAYERS:
        assert np.abs(after[f"{name}.kernel"] - before[f"{name}.kernel"]).max() > 1e-4, name

    # An image, painted from embeddings that the language model regresses.
    emu = load(tmp_path / "run")
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0}
    (image,) = emu.generate_image([["the digit one"]], **settings)
    assert image.size == (8, 8)

    # To files in the layout of its family, and back.
    convert(tmp_path / "run", tmp_path / "files", to="emu")
    convert(tmp_path / "files", tmp_path / "back")
    back_model, back = parameters(tmp_path / "back")
    assert back_model.other_connector == model.other_connector
    assert back.keys() == after.keys()
    for path, value in after.items():
        rows_kept = (slice(None),) * value.ndim
        if path in ("llama.embed_tokens.embedding", "llama.lm_head.kernel"):
            axis = path.startswith("llama.lm_head")
            rows_kept = (*itertools.repeat(slice(None), axis), slice(model.llama.vocab_size))
        np.testing.assert_array_equal(back[path][rows_kept], value[rows_kept], err_msg=path)
