"""Adapters, what is frozen, and runs that stand on another run's parameters."""

import dataclasses
import math
import shutil
import sys
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import as_emu2, random_parameters
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from emu_jax import checkpoint
from emu_jax.config import LoraConfig, TokenIds, digits, save_json
from emu_jax.data.latents import LatentBatches, PartWriter, Progress, finish, latent_shapes
from emu_jax.data.pipeline import Batches, DataConfig
from emu_jax.data.sources import SourceConfig
from emu_jax.errors import UserError
from emu_jax.generate.api import load
from emu_jax.generate.settings import ImageSettings
from emu_jax.models import cpu, xla
from emu_jax.models.emu import EmuModel
from emu_jax.models.eva_clip import normalize_images
from emu_jax.models.lora import LoraLinear
from emu_jax.models.quantized import QuantizedMatrix
from emu_jax.sharding import AbstractModel, make_mesh, nest
from emu_jax.storage import StorePath, as_path
from emu_jax.tokenizer import Tokenizer
from emu_jax.train.config import GroupConfig, OptimizerConfig, TrainConfig, digits_data
from emu_jax.train.config_file import load_config
from emu_jax.train.device_memory import shard_bytes
from emu_jax.train.flops import train_flops
from emu_jax.train.loop import train
from emu_jax.train.optimizer import schedule
from emu_jax.train.precompute import precompute
from emu_jax.train.step import Trainer
from emu_jax.train.warm_start import WarmStart

CONFIGS = Path(__file__).parent.parent / "configs"
LORA = LoraConfig(rank=3, alpha=6.0, dropout=0.25)


def one_device():
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


def test_the_decoders_rate_falls_in_steps():
    cfg = load_config(TrainConfig, CONFIGS / "emu_14b_decoder.py", [])
    rate = schedule(cfg.optimizer.groups[0], cfg.steps)
    at = [0, 2500, 5000, 9999, 10_000, 13_999, 14_000, 14_999]
    expected = [0, 5e-5, 1e-4, 1e-4, 5e-5, 5e-5, 1e-5, 1e-5]
    np.testing.assert_allclose([float(np.asarray(rate(step))) for step in at], expected, rtol=1e-6)
    for drops in (((4000, 1e-5),), ((9000, 1e-5), (8000, 1e-6))):
        with pytest.raises(UserError, match="must rise from after step 5000"):
            dataclasses.replace(cfg.optimizer.groups[0], drops=drops)


@pytest.mark.parametrize("name, trained", [("instruct", 26_214_400), ("decoder", 968_146_884)])
def test_what_the_14b_model_keeps_while_it_is_tuned(name, trained):
    """Frozen parameters are bfloat16 and have no optimizer state, which trained ones have in
    float32."""
    cfg = load_config(TrainConfig, CONFIGS / f"emu_14b_{name}.py", [])
    with jax.set_mesh(one_device()):
        state = Trainer(cfg, one_device()).state_shapes
    assert sum(math.prod(a.shape) for a in state.trained.values()) == trained
    assert all(a.dtype == jnp.float32 for a in state.trained.values())
    assert all(a.dtype == jnp.bfloat16 for a in state.frozen.values())
    frozen = sum(math.prod(a.shape) for a in state.frozen.values())
    assert frozen > 13e9
    moments = sum(a.size for a in jax.tree.leaves(state.optimizer) if a.ndim)
    assert moments == 2 * trained
    held = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(state))
    averages = trained if name == "decoder" else 0
    assert held == 2 * frozen + 4 * (3 * trained + averages) + 4 * sum(
        a.ndim == 0 for a in jax.tree.leaves(state)
    )


def test_adapters_drop_what_they_read():
    path = "self_attn.v_proj"
    layer = LoraLinear(40, 24, ("embed", "heads"), path=path, lora=LORA, rngs=nnx.Rngs(0))
    layer.lora_b.set_value(jax.random.normal(jax.random.key(1), (3, 24)))
    x = jax.random.normal(jax.random.key(2), (5, 7, 40))
    key = jax.random.key(3)
    # The CRC-32 of the layer's name is folded into the key of its block.
    own = jax.random.fold_in(key, 2690200301)
    kept = jax.random.bernoulli(own, 0.75, x.shape)
    assert 0.7 < kept.mean() < 0.8
    base = x @ layer.kernel[...]
    low = jnp.where(kept, x / 0.75, 0) @ layer.lora_a[...] @ layer.lora_b[...]
    np.testing.assert_allclose(layer(x, dropout_key=key), base + 2.0 * low, atol=1e-4)
    low = x @ layer.lora_a[...] @ layer.lora_b[...]
    np.testing.assert_allclose(layer(x), base + 2.0 * low, atol=1e-4)


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"targets": ("q_prj",)}, "unknown LoRA target 'q_prj'; did you mean 'q_proj'?"),
        ({"rank": 0}, "LoRA rank 0"),
        ({"dropout": 1.0}, "dropout 1.0"),
    ],
)
def test_lora_settings_that_mean_nothing(settings, line):
    with pytest.raises(UserError, match=line):
        LoraConfig(**settings)


# --- Runs ----------------------------------------------------------------------------------------


def small_model(lora=None):
    model = digits()
    assert model.unet and model.cformer
    return dataclasses.replace(
        model,
        unet=dataclasses.replace(
            model.unet,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        vision=dataclasses.replace(model.vision, layers=1),
        cformer=dataclasses.replace(model.cformer, layers=1),
        llama=dataclasses.replace(model.llama, layers=2, vocab_multiple=1, lora=lora),
    )


def random_run(folder, copy_digits, model):
    """A pretrained run at random, with the digits beside it: (run directory, data)."""
    copy_digits(folder / "data")
    template = AbstractModel(lambda: EmuModel(model, rngs=nnx.Rngs(5)), one_device())
    params = nest(random_parameters(template))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / "run" / "0" / "params").absolute(), params)
    save_json(model, folder / "run" / "config.json")
    words = Tokenizer.load(folder / "data" / "tokenizer", family=model.family)
    words.save(folder / "run" / "tokenizer")
    return folder / "run", folder / "data"


@pytest.fixture(scope="module")
def parent(tmp_path_factory, copy_digits):
    return random_run(tmp_path_factory.mktemp("parent"), copy_digits, small_model())


def tuning(parent, steps=2, **changes) -> TrainConfig:
    run, data = parent
    groups = (GroupConfig(r"\.lora_[ab]$", lr=1e-2), GroupConfig(".*", lr=0.0))
    return TrainConfig(
        **{
            "model": small_model(LORA),
            "init_from": str(run),
            "save_frozen": False,
            "steps": steps,
            "checkpoint_every": 1,
            "log_every": 1,
            "optimizer": OptimizerConfig(groups=groups),
            "data": digits_data(
                root=str(data),
                instruct=True,
                mixture={"instructions": 1.0},
                batch_size=2,
                row_tokens=64,
                block_documents=16,
            ),
            **changes,
        }
    )


@pytest.mark.slow
def test_a_run_saves_its_adapters_alone_and_goes_on(parent, tmp_path, monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    train(tuning(parent), tmp_path / "whole")
    train(tuning(parent, steps=1), tmp_path / "parts")
    train(tuning(parent), tmp_path / "parts")

    stored = checkpoint.stored_shapes(tmp_path / "whole" / "2" / "params")
    assert stored and all(path.endswith((".lora_a", ".lora_b")) for path in stored)
    whole, parts = load(tmp_path / "whole"), load(tmp_path / "parts")
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(e.model))) for e in (whole, parts))
    for path, value in ours.items():
        np.testing.assert_array_equal(value[...], theirs[path][...], err_msg=str(path))

    # What is not saved is the parent's; new tokens have the mean of the old ones' rows.
    assert whole.paints
    base = load(parent[0]).model
    table, old = whole.model.llama.embed_tokens.embedding[...], base.llama.embed_tokens.embedding
    np.testing.assert_array_equal(table[:350], old[...])
    np.testing.assert_allclose(table[350:], np.tile(np.mean(old[...], 0), (2, 1)), atol=1e-6)
    assert whole.model.llama.lm_head is not None and base.llama.lm_head is not None
    head, old = whole.model.llama.lm_head.kernel[...], base.llama.lm_head.kernel[...]
    np.testing.assert_allclose(head[:, 351], np.mean(old, axis=1), atol=1e-6)
    assert whole.tokenizer.user == 350 and whole.cfg.llama.lora == LORA
    adapters = [
        a[...]
        for path, a in nnx.to_flat_state(nnx.state(whole.model.llama))
        if path[-2:] == ("o_proj", "lora_b")
    ]
    assert max(np.abs(a).max() for a in adapters) > 0

    (parent[0].parent / "run").rename(tmp_path / "moved")
    try:
        with pytest.raises(UserError, match=r"base\.json names .*run, which is not there"):
            load(tmp_path / "whole")
    finally:
        (tmp_path / "moved").rename(parent[0])


def test_a_quantized_base_stays_in_a_parent():
    with pytest.raises(UserError, match="unknown quantization 'int3'"):
        TrainConfig(quantize="int3")
    with pytest.raises(UserError, match="set save_frozen to False"):
        TrainConfig(quantize="int8")
    cfg = TrainConfig(quantize="int8", save_frozen=False)
    with pytest.raises(UserError, match="no parent has llama.*quantize=int8"):
        WarmStart(cfg, Path()).check_quantized(["llama.lm_head.kernel"])
    trains_all = dataclasses.replace(cfg, model=small_model())
    with pytest.raises(UserError, match="freeze some"):
        Trainer(trains_all, one_device())


@pytest.mark.slow
def test_adapters_are_trained_over_a_quantized_base(parent, tmp_path, monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    cfg = tuning(parent, quantize="int4", dtype="float32")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(cfg, whole)
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "2")
    train(cfg, parts)  # resumes from step 1
    stored = checkpoint.stored_shapes(whole / "2" / "params")
    assert stored and all(path.endswith((".lora_a", ".lora_b")) for path in stored)
    adapters = {
        path: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(one_device(), P()))
        for path, s in stored.items()
    }
    ours, theirs = (
        checkpoint.read_arrays(run / "2" / "params", adapters) for run in (whole, parts)
    )
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)
    with pytest.raises(UserError, match="holds a run with quantize='int4', not ''"):
        train(dataclasses.replace(cfg, quantize="", steps=3), whole)

    # `load` rounds the base, which has two tokens more than its own file, as training did.
    warm_start = WarmStart.resolve(cfg, whole)
    trainer = Trainer(warm_start.cfg, one_device())
    base = warm_start.load(trainer.param_shapes, trainer.quantizers)
    rounded = {path: base[path] for path in trainer.quantizers}
    assert len(rounded) == 7 + 2 + 4
    build = lambda: EmuModel(warm_start.cfg.model, painter=False, rngs=nnx.Rngs(0))  # noqa: E731
    model = checkpoint.load_module(whole, build, one_device(), jnp.float32, "int4")
    loaded = AbstractModel(build, one_device()).params(model)
    for path, expected in rounded.items():
        matrix = loaded[path]
        assert isinstance(matrix, QuantizedMatrix) and isinstance(expected, QuantizedMatrix)
        np.testing.assert_array_equal(matrix.values, expected.values, err_msg=path)
        np.testing.assert_array_equal(matrix.scales, expected.scales, err_msg=path)
    floats = shard_bytes([trainer.param_shapes[path] for path in rounded])
    assert shard_bytes([trainer.state_shapes.frozen[path] for path in rounded]) < 0.2 * floats


def decoding(parent, **changes) -> TrainConfig:
    run, data = parent
    groups = (GroupConfig(r"^unet\.", lr=1e-3), GroupConfig(".*", lr=0.0))
    return TrainConfig(
        **{
            "objective": "decoder",
            "model": small_model(),
            "init_from": str(run),
            "steps": 2,
            "checkpoint_every": 1,
            "log_every": 1,
            "optimizer": OptimizerConfig(groups=groups),
            "ema_decay": 0.9,
            "save_frozen": False,
            "dtype": "float32",
            "data": digits_data(
                root=str(data),
                mixture={"pairs": 1.0},
                batch_size=4,
                row_tokens=40,
                row_images=1,
                image_first=0.0,
                augment=False,
                drop_condition=0.4,
            ),
            **changes,
        }
    )


def test_a_decoder_may_be_conditioned_on_the_image_itself(parent):
    cfg = decoding(parent)
    data = dataclasses.replace(cfg.data, autoencode=1.0)
    tokens = Tokenizer.load(parent[0] / "tokenizer")
    with Batches(data, tokens, "contexts") as batches:
        seen = [next(batches) for _ in range(4)]
    shown = [(b["images"][n][b["image_valid"][n]], b["target"][n]) for b in seen for n in range(4)]
    assert {len(context) for context, _ in shown} == {0, 1}  # some are dropped
    for context, target in shown:
        assert all(np.array_equal(image, target) for image in context)
    with pytest.raises(UserError, match="autoencode"):
        Batches(dataclasses.replace(data, autoencode=1.5), tokens, "contexts")


@pytest.mark.slow
def test_a_decoder_is_tuned_on_precomputed_latents(parent, tmp_path, monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    cfg = decoding(parent)
    assert precompute(cfg, tmp_path / "latents", rows=10).rows == 12
    with pytest.raises(UserError, match="holds latents already"):
        precompute(cfg, tmp_path / "latents", rows=10)

    # They are what a user of the frozen model gets from the same contexts.
    emu = load(parent[0])
    whole = dataclasses.replace(cfg.data, drop_condition=0.0)
    with Batches(whole, emu.tokenizer, "contexts") as batches:
        contexts = [next(batches) for _ in range(3)]
    words = [
        emu.tokenizer.decode(c["tokens"][n, : c["length"][n] - 1])
        for c in contexts
        for n in range(4)
    ]
    data = dataclasses.replace(cfg.data, batch_size=12)
    made = LatentBatches(tmp_path / "latents", data, emu.cfg)
    seen = [next(made) for _ in range(6)]
    order = [row for _, row in made.documents()]
    assert sorted(order) == list(range(12))
    empty = np.asarray(emu.regress(""))
    conditions = np.asarray(emu.regress([[text] for text in words]))
    dropped = 0
    for row, condition in zip(order, seen[-1]["condition"].astype(np.float32), strict=True):
        drops = np.abs(condition - empty).max() < 0.02
        dropped += drops
        assert drops or np.abs(condition - conditions[row]).max() < 0.02
    assert 0 < dropped < 12
    assert all(len({r.tobytes() for r in batch["latents"]}) > 6 for batch in seen)

    # Two processes share a batch; a position goes on where it was taken.
    state = {"kind": "latents", "batch": 5}
    halves = [LatentBatches(tmp_path / "latents", data, emu.cfg, index, 2) for index in range(2)]
    for half in halves:
        half.restore(state)
    parts = [next(half) for half in halves]
    for name, whole in seen[-1].items():
        np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), whole)
    for batches in (made, *halves):
        batches.close()

    latents = dataclasses.replace(cfg, latents=str(tmp_path / "latents"))
    train(latents, tmp_path / "run")
    train(dataclasses.replace(latents, steps=3), tmp_path / "run")
    stored = checkpoint.stored_shapes(tmp_path / "run" / "3" / "params")
    assert {checkpoint.tower_of(path) for path in stored} == {"unet"}
    tuned = load(tmp_path / "run")
    settings: ImageSettings = {"num_inference_steps": 2, "scheduler": "ddim"}
    assert tuned.generate_image("the digit one", **settings).size == (32, 32)
    assert emu.cfg.vae
    model = dataclasses.replace(emu.cfg, vae=dataclasses.replace(emu.cfg.vae, scaling_factor=3.0))
    with pytest.raises(UserError, match="another model"):
        LatentBatches(tmp_path / "latents", data, model)


@pytest.mark.slow
def test_a_painter_learns_from_features_alone(tmp_path, copy_digits, monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    model = as_emu2(small_model())
    assert model.unet
    base = model.tokens.pad
    model = dataclasses.replace(
        model,
        unet=dataclasses.replace(model.unet, transformer_layers_per_block=1),
        tokens=TokenIds.after(base, frame=True),
        llama=dataclasses.replace(model.llama, vocab_size=base + 272),
    )
    parent = random_run(tmp_path, copy_digits, model)
    cfg = decoding(parent, objective="painter", model=model, noise_offset=0.1)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, family="emu2"))
    train(dataclasses.replace(cfg, steps=1), tmp_path / "whole")
    shapes = checkpoint.stored_shapes(tmp_path / "whole" / "1" / "params")
    assert {checkpoint.tower_of(path) for path in shapes} == {"unet"}
    whole = load(tmp_path / "whole")

    # Precomputed features are those that autoencoding paints, and the null image's.
    assert precompute(cfg, tmp_path / "latents", rows=8).rows == 8
    with Batches(cfg.data, whole.tokenizer, "views") as batches:
        views = [next(batches) for _ in range(2)]
    images = np.concatenate([view["images"] for view in views])
    pixels = normalize_images(jnp.asarray(images))
    features = np.asarray(whole.model.encode_images(pixels))
    data = dataclasses.replace(cfg.data, batch_size=8)
    with LatentBatches(tmp_path / "latents", data, model) as made:
        batch = next(made)
        order = [row for _, row in made.documents()]
    null = np.asarray(whole.model.encode_images(jnp.zeros_like(pixels[:1])))[0]
    dropped = 0
    for row, condition in zip(order, batch["condition"].astype(np.float32), strict=True):
        drops = np.abs(condition - null).max() < 0.05
        dropped += drops
        assert drops or np.abs(condition - features[row]).max() < 0.05
    assert 0 < dropped < 8
    sizes = np.concatenate([view["sizes"] for view in views])
    np.testing.assert_array_equal(batch["sizes"], sizes[order])


@pytest.mark.slow
@pytest.mark.parametrize("where", ["local", "store"])
def test_a_stopped_precompute_goes_on(parent, tmp_path, monkeypatch, where, request):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(sys.modules[precompute.__module__], "PART_BYTES", 1)  # a batch a part
    cfg, through, stopped = decoding(parent), tmp_path / "through", tmp_path / "stopped"
    if where == "store":
        stopped = as_path(f"{request.getfixturevalue('gcs').folder}/stopped")

    def version(path: Path) -> object:
        return path.info()["generation"] if isinstance(path, StorePath) else path.stat().st_mtime_ns

    assert precompute(cfg, through, rows=12).rows == 12

    close, closed = PartWriter.close, []

    def close_or_stop(self):
        closed.append(self)
        if len(closed) == 2:
            raise KeyboardInterrupt
        close(self)

    with monkeypatch.context() as patch:
        patch.setattr(PartWriter, "close", close_or_stop)
        with pytest.raises(KeyboardInterrupt):
            precompute(cfg, stopped, rows=12)
    with pytest.raises(UserError, match="another config"):
        precompute(dataclasses.replace(cfg, seed=1), stopped, rows=12)
    first = version(next(stopped.glob("latents-00000-*")))
    assert precompute(cfg, stopped, rows=12).rows == 12
    assert version(next(stopped.glob("latents-00000-*"))) == first
    names = [path.name for path in sorted(through.glob("latents-*"))]
    assert len(names) == 3 and not (stopped / "progress.json").exists()
    for name in names:
        assert (stopped / name).read_bytes() == (through / name).read_bytes()


def test_settings_that_came_later_do_not_change_the_digest():
    """A folder that an earlier version began is continued."""
    sources = (SourceConfig("images", "webdataset", ("images/*.tar",)),)
    cfg = TrainConfig(objective="decoder", data=DataConfig(sources=sources))
    assert sys.modules[precompute.__module__]._digest(cfg) == "c67bda6911942ec0"
    other = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, row_group=8))
    assert sys.modules[precompute.__module__]._digest(other) != "c67bda6911942ec0"


def test_a_folder_of_latents_is_what_its_listing_says(tmp_path):
    model = small_model()
    condition, latents = (np.zeros(shape, np.float32) for shape in latent_shapes(model))
    # A part that was not finished by all processes is written again, by fewer of them.
    for processes in (3, 2):
        for process in range(processes):
            writer = PartWriter(tmp_path, 0, process)
            writer.add(condition + processes, latents)
            writer.close()
    progress = Progress.of(tmp_path, "run").after(tmp_path, rows=2, processes=2, position={})
    assert Progress.of(tmp_path, "run") == progress
    with pytest.raises(UserError, match="another config"):
        Progress.of(tmp_path, "other")
    with pytest.raises(UserError, match="precompute"):
        LatentBatches(tmp_path, DataConfig(), model)
    finish(
        tmp_path, progress, model=model, unconditional=condition, tokenizer=cast(Any, NoTokenizer())
    )
    with pytest.raises(UserError, match="holds latents already"):
        Progress.of(tmp_path, "run")
    data = DataConfig(batch_size=2, drop_condition=0.0)
    with LatentBatches(tmp_path, data, model) as batches:
        assert (next(batches)["condition"].astype(np.float32) == 2).all()
    part = tmp_path / "latents-00000-00001.array_record"
    whole = {path: path.read_bytes() for path in (part, tmp_path / "unconditional.npy")}
    for path, content in whole.items():
        for left in (b"", content[: len(content) // 2], content[:-1]):
            path.write_bytes(left)
            with pytest.raises(UserError, match="is damaged .*precompute it again"):
                with LatentBatches(tmp_path, data, model) as batches:
                    next(batches)
        path.write_bytes(content)
    flipped = bytearray(whole[part])
    flipped[-len(flipped) // 2] ^= 1
    part.write_bytes(flipped)
    with pytest.raises(UserError, match="is damaged"):
        with LatentBatches(tmp_path, data, model) as batches:
            next(batches)
    part.unlink()
    with pytest.raises(UserError, match="is missing"):
        LatentBatches(tmp_path, data, model)


class NoTokenizer:
    def save(self, folder):
        pass


def test_adapters_that_differ_from_the_parents_are_refused(parent, tmp_path, monkeypatch):
    model = small_model(dataclasses.replace(LORA, rank=4))
    run = tmp_path / "run"
    run.mkdir()
    save_json(model, run / "config.json")
    with pytest.raises(UserError, match="has adapters of its own"):
        WarmStart.resolve(tuning(parent, init_from=str(run)), tmp_path)


def test_the_work_of_a_decoder_on_latents_is_the_denoisers_alone(parent, monkeypatch):
    cfg = decoding(parent)
    whole, denoiser = train_flops(cfg), train_flops(dataclasses.replace(cfg, latents="latents"))
    assert 0 < denoiser.total < whole.total
    # Scores of attention that are computed again for the gradient are no work of the model.
    monkeypatch.setattr(cpu, "attention", xla.attention)
    assert train_flops(dataclasses.replace(cfg, latents="latents")).total == denoiser.total
