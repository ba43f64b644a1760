"""Conversion: both ways bit for bit, strict about its input, readable by other libraries."""

import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import GOLDEN, relative_error
from flax import nnx
from safetensors.torch import load_file, save_file

from emu_jax import checkpoint, cli, diffusion
from emu_jax.config import (
    CFormerConfig,
    EmuConfig,
    LlamaConfig,
    LoraConfig,
    SchedulerConfig,
    TokenIds,
    UNetConfig,
    VAEConfig,
    VisionConfig,
    emu_14b,
    emu_14b_instruct,
)
from emu_jax.convert import (
    checkpoint_arrays,
    export,
    release_config,
    source,
    tables,
    tensor_files,
)
from emu_jax.convert.checkpoint_arrays import ArrayReader
from emu_jax.convert.convert import convert, replacing, write_run_directory
from emu_jax.convert.export import write_release
from emu_jax.convert.init import init
from emu_jax.convert.tensors import dtype_name, dtype_of
from emu_jax.data.documents import Document, Image, Text, write_documents
from emu_jax.errors import UserError
from emu_jax.generate.api import load
from emu_jax.sharding import make_mesh
from emu_jax.train.config import TrainConfig
from emu_jax.train.config_file import load_config
from emu_jax.train.loop import train

pytestmark = pytest.mark.optimized

TIGHT = 2e-5
SHAPES = GOLDEN.parent / "emu14b_state_dict_shapes.json"
EMU2 = GOLDEN.parent / "emu2_tiny"


def one_device():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """The pretrained golden model, converted through a mesh of 8 devices."""
    path = tmp_path_factory.mktemp("pretrained") / "run"
    convert(GOLDEN, path, mesh=make_mesh(fsdp=4, tensor=2))
    return path


@pytest.fixture(scope="module")
def instruct_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("instruct")
    shutil.copy(GOLDEN / "Emu-instruct.pt", folder)  # alone: nothing beside it to find
    convert(
        folder / "Emu-instruct.pt",
        folder / "run",
        mesh=one_device(),
        model_config=GOLDEN / "Emu.json",
        tokenizer=GOLDEN / "tokenizer",
    )
    return folder / "run"


def load_tensors(path):
    if path.suffix == ".safetensors":
        return load_file(path)
    tensors = torch.load(path, weights_only=True)
    return tensors["module"] if "module" in tensors else tensors


def assert_same_file(ours, theirs):
    """Same keys in the same order, same dtypes, same bits."""
    ours, theirs = load_tensors(ours), load_tensors(theirs)
    assert list(ours) == list(theirs)
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and ours[key].shape == tensor.shape, key
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        assert torch.equal(ours[key].view(bits), tensor.contiguous().view(bits)), key


def assert_same_tree(ours, theirs):
    """Same files with the same bytes."""
    for path in theirs.rglob("*"):
        if path.is_file():
            assert (ours / path.relative_to(theirs)).read_bytes() == path.read_bytes(), path


# --- Round trips -----------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [one_device, lambda: make_mesh(fsdp=2, tensor=4)])
def test_a_release_comes_back_bit_for_bit(run_dir, tmp_path, mesh):
    convert(run_dir, tmp_path / "back", to="emu", mesh=mesh())
    name = "diffusion_pytorch_model.safetensors"
    for file in ("multimodal_encoder/pytorch_model.bin", f"unet/{name}", f"vae/{name}"):
        assert_same_file(tmp_path / "back" / file, GOLDEN / file)
    for folder in ("tokenizer", "scheduler"):
        assert_same_tree(tmp_path / "back" / folder, GOLDEN / folder)
    for file in ("Emu.json", "unet/config.json", "vae/config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (GOLDEN / file).read_bytes()


def test_the_instruct_model_comes_back_bit_for_bit(instruct_dir, tmp_path):
    convert(instruct_dir, tmp_path / "back", to="emu")
    assert_same_file(tmp_path / "back" / "Emu-instruct.pt", GOLDEN / "Emu-instruct.pt")
    assert "module" in torch.load(tmp_path / "back" / "Emu-instruct.pt", weights_only=True)
    convert(instruct_dir, tmp_path / "alone.pt", to="emu")
    assert_same_file(tmp_path / "alone.pt", GOLDEN / "Emu-instruct.pt")
    cfg = checkpoint.load_model_config(instruct_dir)
    assert cfg.llama.lora == LoraConfig(rank=4)
    assert checkpoint.load_tokenizer(instruct_dir).instruct


@pytest.mark.slow
def test_a_release_without_unused_tensors_comes_back_without(tmp_path):
    """Newer transformers do not store the rotary frequencies: all else keeps its place."""
    release = tmp_path / "release"
    shutil.copytree(GOLDEN, release)
    path = release / source.MULTIMODAL
    path.chmod(0o644)
    half = "decoder.lm.model.norm.weight"  # a dtype of its own

    def change(tensors):
        kept = {k: v for k, v in tensors.items() if "inv_freq" not in k}
        del kept["cformer.cformer.embed_tokens.weight"]
        return dict(reversed((kept | {half: kept[half].bfloat16()}).items()))

    rewrite(path, change)
    convert(release, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back", to="emu")
    assert_same_file(tmp_path / "back" / source.MULTIMODAL, path)


def test_what_is_not_exported_is_not_spoken_of(run_dir, tmp_path):
    """A model that lost its painter: its export converts again."""
    run = source.RunSource.open(run_dir, one_device())

    class Blind:
        cfg = dataclasses.replace(run.cfg, unet=None, vae=None)
        tokenizer, layout, unused, read = run.tokenizer, run.layout, run.unused, run.read
        shapes = {p: s for p, s in run.shapes.items() if not p.startswith(("unet.", "vae."))}

    (tmp_path / "back").mkdir()
    write_release(Blind(), tmp_path / "back", tmp_path / "back")
    assert not (tmp_path / "back" / "unet").exists() and not (tmp_path / "back" / "vae").exists()
    convert(tmp_path / "back", tmp_path / "again")
    assert checkpoint.load_model_config(tmp_path / "again").unet is None


def test_of_a_tokenizer_folder_only_the_tokenizer_is_carried(instruct_file, tmp_path):
    folder = instruct_file.parent
    (folder / "tokenizer").rename(tmp_path / "llama")
    for name in ("model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json"):
        (tmp_path / "llama" / name).write_bytes(bytes(100))
    convert(instruct_file, tmp_path / "run", tokenizer=tmp_path / "llama")
    convert(tmp_path / "run", tmp_path / "back", to="emu")
    assert {p.name for p in (tmp_path / "back" / "tokenizer").iterdir()} == {
        p.name for p in (GOLDEN / "tokenizer").iterdir()
    }
    assert_same_tree(tmp_path / "back" / "tokenizer", GOLDEN / "tokenizer")


def test_a_release_converts_to_itself_without_a_run_directory(tmp_path):
    convert(GOLDEN, tmp_path / "copy", to="emu")
    assert_same_file(tmp_path / "copy" / source.MULTIMODAL, GOLDEN / source.MULTIMODAL)


def test_what_lies_beside_the_tensors_is_carried_untouched(tmp_path):
    release = tmp_path / "release"
    shutil.copytree(GOLDEN, release)
    for name in ("safety_checker/model.safetensors", "feature_extractor/preprocessor_config.json"):
        (release / name).parent.mkdir(exist_ok=True)
        (release / name).write_bytes(os.urandom(100))
    convert(release, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back", to="emu")
    for folder in ("safety_checker", "feature_extractor"):
        assert_same_tree(tmp_path / "back" / folder, release / folder)


def rewrite(path, change):
    """Applies `change` to the dict of tensors in a torch file."""
    stored = torch.load(path, weights_only=True)
    wrapped = "module" in stored
    tensors = change(stored["module"] if wrapped else stored)
    torch.save({"module": tensors} if wrapped else tensors, path)


@pytest.fixture
def instruct_file(tmp_path):
    path = tmp_path / "source" / "Emu-instruct.pt"
    path.parent.mkdir()
    for name in ("Emu-instruct.pt", "Emu.json"):
        shutil.copy(GOLDEN / name, path.parent)
    shutil.copytree(GOLDEN / "tokenizer", path.parent / "tokenizer")
    path.chmod(0o644)
    return path


def test_names_of_new_peft_load_and_come_back(instruct_file, instruct_dir, tmp_path):
    def rename(tensors):
        return {
            k.replace("_proj.weight", "_proj.base_layer.weight") if "self_attn" in k else k: v
            for k, v in tensors.items()
        }

    rewrite(instruct_file, rename)
    convert(instruct_file, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back", to="emu")
    assert_same_file(tmp_path / "back" / "Emu-instruct.pt", instruct_file)
    wanted = source.abstract_model(checkpoint.load_model_config(instruct_dir), one_device()).shapes
    old, new = (checkpoint.read_params(d, wanted) for d in (instruct_dir, tmp_path / "run"))
    assert all(np.array_equal(old[p], new[p]) for p in wanted)


def test_newer_names_of_the_autoencoder_load_and_come_back(tmp_path):
    release = tmp_path / "release"
    shutil.copytree(GOLDEN, release)
    path = release / "vae" / "diffusion_pytorch_model.safetensors"
    path.chmod(0o644)
    old = load_file(path)
    new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    tensors = {}
    for key, tensor in old.items():
        for a, b in new.items():
            key = key.replace(f".{a}.", f".{b}.")
        tensors[key] = tensor
    assert tensors.keys() != old.keys()
    save_file(tensors, path)
    convert(release, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back", to="emu")
    back = load_file(tmp_path / "back" / "vae" / path.name)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k], tensors[k]) for k in tensors)


@pytest.mark.slow
def test_bin_files_of_the_decoder_and_mixed_dtypes_come_back(tmp_path):
    release = tmp_path / "release"
    shutil.copytree(GOLDEN, release)
    path = release / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {k: v.half() for k, v in load_file(path).items()}
    torch.save(tensors, path.with_suffix(".bin"))
    path.chmod(0o644)
    path.unlink()
    encoder = release / source.MULTIMODAL
    encoder.chmod(0o644)
    odd = "decoder.lm.model.layers.1.mlp.up_proj.weight"  # one layer unlike the others
    rewrite(encoder, lambda t: {k: v.bfloat16() if k == odd else v for k, v in t.items()})
    convert(release, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back", to="emu")
    assert_same_file(tmp_path / "back" / "unet" / f"{path.stem}.bin", path.with_suffix(".bin"))
    assert_same_file(tmp_path / "back" / source.MULTIMODAL, encoder)


def test_a_sharded_release_comes_back_in_its_shards(tmp_path):
    release = tmp_path / "release"
    shutil.copytree(GOLDEN, release)
    path = release / source.MULTIMODAL
    path.chmod(0o644)
    tensors = torch.load(path, weights_only=True)
    keys = list(tensors)
    parts = {"pytorch_model-1.bin": keys[::2], "pytorch_model-2.bin": keys[1::2]}
    for name, part in parts.items():
        torch.save({k: tensors[k] for k in part}, path.parent / name)
    index = {"weight_map": {k: name for name, part in parts.items() for k in part}}
    (path.parent / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    path.unlink()
    convert(release, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back", to="emu")
    for name in parts:
        assert_same_file(tmp_path / "back" / "multimodal_encoder" / name, path.parent / name)
    back = tmp_path / "back" / "multimodal_encoder" / "pytorch_model.bin.index.json"
    assert json.loads(back.read_text()) == index


def test_trained_weights_are_not_rounded_on_the_way_back(instruct_dir, tmp_path):
    """Tensors that the release had in bfloat16 and training changed come back in float32."""
    run = source.RunSource.open(instruct_dir, one_device())

    class Trained:
        cfg, tokenizer, layout, unused = run.cfg, run.tokenizer, run.layout, run.unused
        shapes = {
            p: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=s.sharding)
            for p, s in run.shapes.items()
        }

        def read(self, path, layer):
            stored = run.read(path, layer).astype(np.float32)
            return stored + np.float32(1e-6 if path.endswith("lora_a") else 0)

    (tmp_path / "back").mkdir()
    write_release(Trained(), tmp_path / "back", tmp_path / "back")
    came = load_tensors(GOLDEN / "Emu-instruct.pt")
    for key, tensor in load_tensors(tmp_path / "back" / "Emu-instruct.pt").items():
        if "lora_A" in key:
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, came[key].float() + 1e-6)
        else:
            assert tensor.dtype == came[key].dtype and torch.equal(tensor, came[key])


@pytest.mark.slow
def test_a_model_that_never_was_a_release_exports_strictly(tmp_path):
    """All keys that the release's strict loading asks for, the unused ones too."""
    model = small(lora=False, rope_dtype="bfloat16")
    write_run(model, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back", to="emu")
    ours = load_tensors(tmp_path / "back" / source.MULTIMODAL)
    theirs = load_tensors(GOLDEN / source.MULTIMODAL)

    def unnumbered(keys):
        return {".".join("#" if p.isdigit() else p for p in key.split(".")) for key in keys}

    assert unnumbered(ours) == unnumbered(theirs)
    assert ours["cformer.cformer.embed_tokens.weight"].shape == (32128, model.cfg.cformer.width)
    config = json.loads((tmp_path / "back" / "tokenizer" / "config.json").read_text())
    assert (config["vocab_size"], config["pad_token_id"]) == (512, 0)  # LLaMA's: no [PAD] yet
    again = tmp_path / "again"
    convert(tmp_path / "back", again)
    assert checkpoint.load_model_config(again) == model.cfg


def edit_config(run, **changes):
    """Changes a run's config.json: `llama__lora__alpha=64.0`."""
    path = run / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        *groups, last = name.split("__")
        node = config
        for group in groups:
            node = node[group]
        node[last] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("alpha", [64.0, 7.0])
def test_another_alpha_goes_back_as_the_same_model(instruct_dir, tmp_path, alpha):
    """The release's code has a fixed alpha: the second matrices take up the rest."""
    run = tmp_path / "run"
    shutil.copytree(instruct_dir, run)
    edit_config(run, llama__lora__alpha=alpha)
    report = convert(run, tmp_path / "back.pt", to="emu")
    assert any("multiplied by" in note for note in report.notes)
    ours, came = load_tensors(tmp_path / "back.pt"), load_tensors(GOLDEN / "Emu-instruct.pt")
    scaled = 0
    for key, tensor in came.items():
        if "lora_B" in key:
            wanted = tensor.float() * np.float32(alpha / 16)
            scaled += int(torch.any(wanted != 0))
            assert torch.equal(ours[key].float(), wanted), key
        else:
            assert torch.equal(ours[key], tensor), key
    assert scaled


def test_a_model_that_the_release_cannot_express_is_refused(run_dir, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    edit_config(run, llama__embed_std=0.7, cformer__dropout=0.0)
    report = convert(run, tmp_path / "back", to="emu")
    assert {n.split(" = ")[0].split()[-1] for n in report.notes} == {
        "llama.embed_std",
        "cformer.dropout",
    }
    kept = (run / "config.json").read_text()
    for changes, lost in [
        (
            {"cformer__normalize": True, "llama__rope_dtype": "float32"},
            "cformer.normalize is True.*llama.rope_dtype is float32",
        ),
        ({"llama__rope_theta": 5e5}, "llama.rope_theta is 500000"),
        ({"vision__eps": 1e-5}, "vision.eps is 1e-05"),
        ({"cformer__relative_max_distance": 64}, "cformer.relative_max_distance is 64"),
        ({"scheduler__prediction_type": "v_prediction"}, "scheduler.prediction_type"),
    ]:
        (run / "config.json").write_text(kept)
        edit_config(run, **changes)
        with pytest.raises(UserError, match=lost):
            convert(run, tmp_path / "none", to="emu")
    with pytest.raises(UserError, match="scheduler.prediction_type is v_prediction"):
        convert(run, tmp_path / "none", to="hf")
    # Every shape fits, but each head would be another slice.
    (run / "config.json").write_text(kept)
    edit_config(run, llama__heads=2)
    for read in (load, lambda run: convert(run, tmp_path / "none", to="emu")):
        with pytest.raises(UserError, match="llama.heads = 2 was edited: the release had 4$"):
            read(run)
    assert not (tmp_path / "none").exists()


# --- The full-size release -------------------------------------------------------------------


@pytest.mark.slow
def test_fine_tuning_a_release_and_the_way_back(run_dir, tmp_path):
    """The steps of docs/conversion.md."""
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    PIL.Image.fromarray(rng.integers(0, 256, (40, 30, 3), np.uint8)).save(file, "PNG")
    document = Document((Image(file.getvalue()), Text("a cat sits on a mat.")))
    write_documents(tmp_path / "data/train/pairs.array_record", [document] * 16)
    cfg = load_config(
        TrainConfig,
        Path(__file__).parent.parent / "configs" / "finetune.py",
        [
            f"init_from={run_dir}",
            f"data.root={tmp_path / 'data'}",
            "data.n_causal=24",
            f"data.tokenizer={run_dir / 'tokenizer'}",
            "data.image_size=56",
            "data.row_tokens=64",
            "data.row_images=2",
            "data.block_documents=16",
            "steps=2",
            "dtype=float32",
        ],
    )
    train(cfg, tmp_path / "mine")
    convert(tmp_path / "mine", tmp_path / "out", to="emu")
    theirs = load_tensors(GOLDEN / "multimodal_encoder" / "pytorch_model.bin")
    ours = load_tensors(tmp_path / "out" / "multimodal_encoder" / "pytorch_model.bin")
    assert list(ours) == list(theirs)
    moved = {key for key in ours if not np.array_equal(ours[key], theirs[key])}
    for part in ("visual.blocks", "ln_visual", "cformer.cformer.block", "decoder.lm.model.layers"):
        assert any(key.startswith(part) for key in moved), part
    # What computes nothing is carried as it was.
    assert not {k for k in moved if "rotary_emb" in k or k.endswith("cformer.embed_tokens.weight")}


@pytest.fixture(scope="module")
def released_shapes():
    return json.loads(SHAPES.read_text())


@pytest.mark.parametrize("vae", ["vae", "vae_diffusers_0_15"])
@pytest.mark.parametrize("model", ["pretrain", "instruct"])
def test_every_tensor_of_the_14b_release_has_its_place(released_shapes, model, vae):
    cfg = emu_14b() if model == "pretrain" else emu_14b_instruct()
    found = dict(released_shapes[model])
    if cfg.unet:
        for tower, name in (("unet", "unet"), ("vae", vae)):
            found |= {f"{tower}:{k}": shape for k, shape in released_shapes[name].items()}
    template = source.abstract_model(cfg, one_device())
    shapes = {p: tuple(s.shape) for p, s in template.shapes.items()}
    rows = tables.model_rows(cfg, shapes)
    style = tables.KeyStyle.of(found)
    unused = tables.match(rows, shapes, cfg, style, found, "the release")
    assert sorted(row.path for row in rows) == sorted(shapes)  # every leaf, once

    # And back: the shapes that our parameters give, under the names of the release.
    targets = cfg.llama.lora.targets if cfg.llama.lora else ()
    back = {
        style.write(key, targets): list(
            row.transform.release_shape(row.layer_shape(shapes[row.path]))
        )
        for row in rows
        for key in row.keys
    }
    assert back == {k: s for k, s in found.items() if k not in unused}
    assert len(back) + len(unused) == sum(
        len(released_shapes[n]) for n in ([model, "unet", vae] if cfg.unet else [model])
    )


@pytest.mark.parametrize("model", ["pretrain", "instruct"])
def test_the_14b_sizes_follow_from_its_tensors(released_shapes, model):
    read = release_config.multimodal(
        {k: tuple(s) for k, s in released_shapes[model].items()}, where="Emu", base_vocab=32000
    )
    preset = emu_14b() if model == "pretrain" else emu_14b_instruct()
    assert read == dataclasses.replace(preset, unet=None, vae=None)


# --- Other libraries -------------------------------------------------------------------------


def small(*, lora, seed=0, rope_dtype="float32"):
    """A model of odd sizes: nothing square where a transposition could hide."""
    cfg = EmuConfig(
        vision=VisionConfig(
            image_size=42,
            patch_size=14,
            width=36,
            layers=2,
            head_width=12,
            mlp_width=50,
            clip_width=10,
        ),
        cformer=CFormerConfig(n_causal=5, width=24, layers=2, heads=3, head_width=10, mlp_width=40),
        llama=LlamaConfig(
            vocab_size=518 if lora else 516,
            width=48,
            layers=3,
            heads=3,
            mlp_width=70,
            rope_dtype=rope_dtype,
            lora=LoraConfig(rank=5, alpha=7.0) if lora else None,
        ),
        tokens=TokenIds.after(512),
        unet=None
        if lora
        else UNetConfig(
            sample_size=6,
            block_out_channels=(24, 40),
            layers_per_block=2,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=48,
            norm_num_groups=4,
        ),
        vae=None
        if lora
        else VAEConfig(
            sample_size=12, block_out_channels=(12, 20), layers_per_block=1, norm_num_groups=4
        ),
    )
    template = source.abstract_model(cfg, one_device())
    rng = np.random.default_rng(seed)
    params = {
        path: jnp.asarray(
            rng.normal(size=s.shape) * (0.3 / math.sqrt(s.shape[-2] if len(s.shape) > 1 else 9))
            + path.endswith("scale"),
            jnp.float32,
        )
        for path, s in template.shapes.items()
    }
    return template.module(params)


def write_run(model, path):
    """A run directory as training leaves it."""
    tokenizer = checkpoint.Tokenizer.load(
        GOLDEN / "tokenizer", instruct=model.cfg.llama.lora is not None
    )
    template = source.abstract_model(model.cfg, one_device())
    params = template.params(model)
    stacked = {row.path for row in source.rows_of(model.cfg, params) if row.stacked}

    class Fresh:
        cfg, shapes, layout, unused = model.cfg, template.shapes, None, {}

        def read(self, path, layer):
            whole = np.asarray(params[path])
            return whole[layer] if path in stacked else whole

    Fresh.tokenizer = tokenizer
    path.mkdir()
    write_run_directory(Fresh(), path)


@pytest.mark.parametrize(
    "transform, ours, theirs",
    [
        # Where the release has the element that stands here; no two sides are equal.
        (tables.LINEAR, (2, 3), lambda i, o: (o, i)),
        (tables.CONV, (2, 3, 4, 5), lambda h, w, i, o: (o, i, h, w)),
        (tables.QKV, (2, 3, 5), lambda d, c, e: (5 * c + e, d)),
        (
            tables.Transform("(p q c) o -> o c p q", {"p": 2, "q": 4, "c": 3}),
            (24, 5),
            lambda x, o: (o, x % 3, x // 12, x // 3 % 4),
        ),
        (tables.SAME, (2, 3), lambda *at: at),
    ],
)
def test_each_change_of_layout_by_hand(transform, ours, theirs):
    x = np.arange(math.prod(ours)).reshape(ours)
    y = transform.to_release(x)
    for at in np.ndindex(*ours):
        assert y[theirs(*at)] == x[at]
    assert transform.release_shape(ours) == y.shape
    np.testing.assert_array_equal(transform.from_release(y, ours), x)


def test_the_layouts_that_the_towers_have():
    """Transforms that depend on the model: the rows of its patches, and of its vocabulary."""
    cfg = EmuConfig()
    rows = {row.path: row.transform for row in [*tables.visual(cfg), *tables.llama(cfg)]}
    side, vocab = cfg.vision.patch_size, cfg.llama.vocab_size
    patch = np.arange(side * side * 3)[:, None]
    found = rows["visual.patch_embed.kernel"].to_release(patch)
    for n, (p, q, c) in enumerate(np.ndindex(side, side, 3)):
        assert found[0, c, p, q] == n
    # Ours is rounded up with zeros, which the release does not have.
    for path, ours in (
        ("llama.embed_tokens.embedding", (vocab + 3, 2)),
        ("llama.lm_head.kernel", (2, vocab + 3)),
    ):
        release = np.arange(1, 2 * vocab + 1).reshape(vocab, 2)
        read = rows[path].from_release(release, ours)
        assert read.shape == ours and np.count_nonzero(read) == 2 * vocab
        np.testing.assert_array_equal(read[:vocab] if ours[1] == 2 else read[:, :vocab].T, release)
        np.testing.assert_array_equal(rows[path].to_release(read), release)


def test_names_in_files_of_other_versions():
    lm = "decoder.lm.model.layers.3.self_attn.q_proj."
    new = tables.KeyStyle(peft=True, base_layer=True)
    wrapped = lm.replace("decoder.lm.", "decoder.lm.base_model.model.")
    assert new.write(lm + "weight", ["q_proj"]) == wrapped + "base_layer.weight"
    assert new.write(lm + "weight", ["v_proj"]) == wrapped + "weight"
    assert new.write(lm + "lora_A.default.weight", ["q_proj"]) == wrapped + "lora_A.default.weight"
    assert tables.KeyStyle(peft=True).write(lm + "weight", ["q_proj"]) == wrapped + "weight"
    assert tables.peft_key(lm + "lora_A.default.weight") == (
        "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"
    )
    old, stem = tables.KeyStyle(old_vae=True), "vae:encoder.mid_block.attentions.0."
    for ours, theirs in (
        ("to_q", "query"),
        ("to_k", "key"),
        ("to_v", "value"),
        ("to_out.0", "proj_attn"),
    ):
        for part in ("weight", "bias"):
            assert old.write(f"{stem}{ours}.{part}") == f"{stem}{theirs}.{part}"
        assert tables.KeyStyle().write(f"{stem}{ours}.weight") == f"{stem}{ours}.weight"
    for style in (new, old, tables.KeyStyle(), tables.KeyStyle(peft=True)):
        keys = [style.write(k, ["q_proj"]) for k in (lm + "weight", stem + "to_out.0.weight")]
        assert tables.KeyStyle.of(keys) == style


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """(the model, its folders for other libraries)."""
    folder = tmp_path_factory.mktemp("pretrained")
    model = small(lora=False)
    write_run(model, folder / "run")
    convert(folder / "run", folder / "hf", to="hf")
    return model, folder / "hf"


def our_logits(model, ids):
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return nnx.jit(lambda m: m.llama.logits(m.llama(m.embed(ids), positions)))(model)


IDS = np.random.default_rng(1).integers(3, 500, (2, 17))


def test_transformers_opens_the_language_model(pretrained):
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    model, folder = pretrained
    theirs, info = LlamaForCausalLM.from_pretrained(folder / "llama", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        logits = theirs(torch.tensor(IDS)).logits
    assert relative_error(our_logits(model, IDS), logits) < TIGHT
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder / "llama"), LlamaForCausalLM)
    ids = model.cfg.tokens
    assert [getattr(theirs.config, f"{name}_token_id") for name in ("bos", "eos", "pad")] == [
        ids.bos,
        ids.eos,
        ids.pad,
    ]


def test_shards_of_the_language_model_open_too(pretrained, tmp_path):
    from transformers import LlamaForCausalLM

    _, folder = pretrained
    shutil.copy(folder / "llama" / "config.json", tmp_path)
    tensors = load_file(folder / "llama" / "model.safetensors")
    contents = {k: (tuple(v.shape), np.dtype(np.float32)) for k, v in tensors.items()}
    shards = tensor_files.split_into_shards(tmp_path, "model", contents, limit=20_000)
    writer = tensor_files.ShardedWriter(shards, tmp_path)
    for key in reversed(contents):
        writer.write(key, tensors[key].numpy())
    writer.close()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    theirs = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(theirs[k], v) for k, v in tensors.items())


def test_diffusers_opens_the_denoiser(pretrained):
    from diffusers import UNet2DConditionModel

    model, folder = pretrained
    theirs, info = UNet2DConditionModel.from_pretrained(
        folder / "unet", output_loading_info=True, low_cpu_mem_usage=False
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    rng = np.random.default_rng(2)
    sample = rng.normal(size=(2, 4, 6, 10)).astype(np.float32)
    cond = rng.normal(size=(2, 5, 48)).astype(np.float32)
    t = np.array([3, 700])
    with torch.no_grad():
        expected = theirs(torch.tensor(sample), torch.tensor(t), torch.tensor(cond)).sample
    ours = nnx.jit(lambda m, *a: m(*a))(model.unet, np.moveaxis(sample, 1, -1), t, cond)
    assert relative_error(np.moveaxis(ours, -1, 1), expected) < TIGHT


def test_diffusers_opens_the_autoencoder(pretrained):
    from diffusers import AutoencoderKL

    model, folder = pretrained
    theirs, info = AutoencoderKL.from_pretrained(
        folder / "vae", output_loading_info=True, low_cpu_mem_usage=False
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    rng = np.random.default_rng(3)
    pixels = rng.uniform(-1, 1, (2, 3, 12, 20)).astype(np.float32)
    with torch.no_grad():
        posterior = theirs.encode(torch.tensor(pixels)).latent_dist
        decoded = theirs.decode(posterior.mean).sample
    mean, logvar = nnx.jit(lambda m, x: m.encode(x))(model.vae, np.moveaxis(pixels, 1, -1))
    ours = nnx.jit(lambda m, z: m.decode(z))(model.vae, mean)
    assert relative_error(np.moveaxis(mean, -1, 1), posterior.mean) < TIGHT
    assert relative_error(np.moveaxis(logvar, -1, 1), posterior.logvar) < TIGHT
    assert relative_error(np.moveaxis(ours, -1, 1), decoded) < TIGHT


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted")
    model = small(lora=True)
    write_run(model, folder / "run")
    return model, folder


# peft asks transformers in words that transformers no longer likes.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_opens_the_adapters(adapted):
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    model, folder = adapted
    convert(folder / "run", folder / "hf", to="hf")
    base = LlamaForCausalLM.from_pretrained(folder / "hf" / "llama")
    theirs = PeftModel.from_pretrained(base, folder / "hf" / "lora")
    assert theirs.peft_config["default"].r == 5
    with torch.no_grad():
        plain = base(torch.tensor(IDS)).logits
        logits = theirs(torch.tensor(IDS)).logits
        theirs.disable_adapter_layers()
        without = theirs(torch.tensor(IDS)).logits
    assert relative_error(our_logits(model, IDS), logits) < TIGHT
    assert relative_error(logits, without) > 1e-3  # the adapters do something
    assert plain.shape == logits.shape


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_come_back_from_peft(adapted, tmp_path):
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    model, folder = adapted
    convert(folder / "run", tmp_path / "hf", to="hf")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "hf" / "llama")
    theirs = PeftModel.from_pretrained(base, tmp_path / "hf" / "lora")
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if "lora_B" in name:
                tensor += 0.01
        logits = theirs(torch.tensor(IDS)).logits
    theirs.save_pretrained(tmp_path / "peft", save_embedding_layers=False)

    convert(tmp_path / "peft", tmp_path / "back", base=folder / "run")
    assert checkpoint.load_model_config(tmp_path / "back") == model.cfg
    _, params = read_all(tmp_path / "back")
    module = source.abstract_model(model.cfg, one_device()).module(params)
    assert relative_error(our_logits(module, IDS), logits) < TIGHT
    assert relative_error(our_logits(model, IDS), logits) > 1e-3

    with pytest.raises(UserError, match="name their model with --base"):
        convert(tmp_path / "peft", tmp_path / "none")
    with pytest.raises(UserError, match="leave out --base"):
        convert(folder / "run", tmp_path / "none", to="hf", base=folder / "run")
    note = tmp_path / "peft" / "adapter_config.json"
    config = json.loads(note.read_text())
    for change, message in [
        ({"use_dora": True}, "use_dora is True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'.*weight_conversion"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"init_lora_weights": 1}, "init_lora_weights is 1"),  # which is not true
        ({"alora_invocation_tokens": [3]}, r"alora_invocation_tokens is \[3\]"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"exclude_modules": ["x"]}, "exclude_modules"),
        ({"key_of_tomorrow": 0.5}, "key_of_tomorrow is 0.5"),
        ({"lora_alpha": float("nan")}, "alpha nan"),
        ({"r": 4.5}, "must have r"),
        ({"target_modules": [["q_proj"]]}, "unknown LoRA target"),
        ({"target_modules": "all-linear"}, "as a list of layers"),
        ({"target_modules": ["q_proj", "lm_head"]}, "unknown LoRA target 'lm_head'"),
        ({"r": 4}, r"lora_A.weight is \[5, 48\], expected \[4, 48\]"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, "unexpected tensors"),
    ]:
        note.write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            convert(tmp_path / "peft", tmp_path / "none", base=folder / "run")
    assert not (tmp_path / "none").exists()
    # Of what peft knows today nothing is unknown here; its defaults are accepted.
    from peft import LoraConfig as PeftConfig

    known = {*source._NEUTRAL, *source._READ, *source._INERT}
    for key, value in PeftConfig(target_modules=["q_proj"]).to_dict().items():
        assert key in known or value in (None, False, {}, []), key
    note.write_text(json.dumps(config | {"use_rslora": True, "init_lora_weights": "gaussian"}))
    lora = source.AdaptedSource.open(
        tmp_path / "peft", source.RunSource.open(folder / "run", one_device()), one_device()
    )
    assert lora.cfg.llama.lora.alpha == pytest.approx(7 * math.sqrt(5))


def test_merged_adapters_open_in_transformers(adapted):
    from transformers import LlamaForCausalLM

    model, folder = adapted
    convert(folder / "run", folder / "merged", to="hf", merge_lora=True)
    assert not (folder / "merged" / "lora").exists()
    theirs = LlamaForCausalLM.from_pretrained(folder / "merged" / "llama")
    with torch.no_grad():
        logits = theirs(torch.tensor(IDS)).logits
    assert relative_error(our_logits(model, IDS), logits) < TIGHT


def test_a_merged_run_directory_has_no_adapters(instruct_dir, tmp_path):
    convert(GOLDEN / "Emu-instruct.pt", tmp_path / "merged", merge_lora=True)
    assert checkpoint.load_model_config(tmp_path / "merged").llama.lora is None
    convert(tmp_path / "merged", tmp_path / "back", to="emu")
    keys = load_tensors(tmp_path / "back" / source.MULTIMODAL).keys()
    assert not any("lora" in k or "base_model" in k for k in keys)
    with pytest.raises(UserError, match="no LoRA"):
        convert(GOLDEN, tmp_path / "none", merge_lora=True)


# --- A fresh Emu ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ancestors(tmp_path_factory):
    """LLaMA in shards, EVA-CLIP for larger images, a Stable Diffusion of another width."""
    from transformers import LlamaConfig as HFLlamaConfig
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("parents")
    torch.manual_seed(0)
    hf = HFLlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=90,
        num_hidden_layers=2,
        num_attention_heads=4,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(hf).save_pretrained(folder / "llama", max_shard_size="100KB")
    assert (folder / "llama" / "model.safetensors.index.json").is_file()
    for file in (GOLDEN / "tokenizer").glob("tokenizer*"):
        shutil.copy(file, folder / "llama")
    golden = load_tensors(GOLDEN / source.MULTIMODAL)
    tower = {k: v for k, v in golden.items() if k.startswith("visual.")}
    tower |= {"logit_scale": torch.ones(()), "text.positional_embedding": torch.ones(3, 4)}
    torch.save(tower, folder / "eva.pt")
    for part in ("vae", "scheduler"):
        shutil.copytree(GOLDEN / part, folder / "sd" / part)
    (folder / "sd" / "safety_checker").mkdir()
    (folder / "sd" / "safety_checker" / "config.json").write_text("{}")
    shutil.copytree(GOLDEN / "unet", folder / "sd" / "unet")
    (folder / "sd" / "unet" / "config.json").chmod(0o644)
    (folder / "sd" / "unet" / "diffusion_pytorch_model.safetensors").chmod(0o644)
    return folder


def fresh(folder, dst, **options):
    return init(
        dst,
        llama=folder / "llama",
        eva_clip=folder / "eva.pt",
        sd=folder / "sd",
        cformer=CFormerConfig(width=24, layers=2, heads=3, head_width=8, mlp_width=40),
        **options,
    )


def read_all(path):
    shapes = source.RunSource.open(path, one_device()).shapes
    return checkpoint.load_model_config(path), checkpoint.read_params(path, shapes)


def test_a_fresh_emu_has_its_parents_weights(ancestors, tmp_path):
    golden = json.loads((GOLDEN / "Emu.json").read_text())
    golden["vision_cfg"]["image_size"] = 84  # 4 x 4 patches become 6 x 6
    golden["multimodal_cfg"]["n_causal"] = 7
    (tmp_path / "Emu.json").write_text(json.dumps(golden))
    report = fresh(ancestors, tmp_path / "run", model_config=tmp_path / "Emu.json")
    cfg, params = read_all(tmp_path / "run")
    assert (cfg.vision.image_size, cfg.n_embeddings, cfg.llama.vocab_size) == (84, 7, 516)

    llama = {}
    for shard in (ancestors / "llama").glob("*.safetensors"):
        llama |= load_file(shard)
    table = llama["model.embed_tokens.weight"].numpy()
    np.testing.assert_array_equal(params["llama.embed_tokens.embedding"][:512], table)
    mean = np.broadcast_to(table.mean(0), (4, 64))
    np.testing.assert_allclose(params["llama.embed_tokens.embedding"][512:], mean, atol=1e-7)
    head = llama["lm_head.weight"].numpy()
    np.testing.assert_allclose(
        params["llama.lm_head.kernel"][:, 512:],
        np.broadcast_to(head.mean(0)[:, None], (64, 4)),
        atol=1e-7,
    )
    up = llama["model.layers.1.mlp.up_proj.weight"].numpy()
    np.testing.assert_array_equal(params["llama.layers.mlp.up_proj.kernel"][1], up.T)

    positions = load_tensors(ancestors / "eva.pt")["visual.pos_embed"]
    grid = positions[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, (6, 6), mode="bicubic", align_corners=False)
    expected = torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 36, -1)], 1)[0]
    assert relative_error(params["visual.pos_embed"], expected) < TIGHT
    assert any("interpolated" in note for note in report.notes)
    assert "cformer.projection.kernel" in report.fresh
    assert not any(p.startswith("unet.") for p in report.fresh)  # of the same width here
    std = float(jnp.std(params["llama.stu_regress_head.kernel"]))
    assert 0.5 < std * 8 < 2  # lecun: 1 / sqrt(64)

    convert(tmp_path / "run", tmp_path / "back", to="emu")
    convert(tmp_path / "back", tmp_path / "again")
    assert checkpoint.load_model_config(tmp_path / "again") == cfg
    for part in ("scheduler", "safety_checker"):
        assert_same_tree(tmp_path / "back" / part, ancestors / "sd" / part)


@pytest.mark.slow
def test_another_width_of_condition_is_reinitialised_and_said_so(ancestors, tmp_path):
    folder = tmp_path / "parents"
    shutil.copytree(ancestors, folder)
    path = folder / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    odd = [k for k in tensors if k.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
    save_file({k: v[:, :40].contiguous() if k in odd else v for k, v in tensors.items()}, path)
    config = json.loads((folder / "sd" / "unet" / "config.json").read_text())
    config["cross_attention_dim"] = 40
    (folder / "sd" / "unet" / "config.json").write_text(json.dumps(config))
    report = fresh(folder, tmp_path / "run", model_config=GOLDEN / "Emu.json")
    cfg, params = read_all(tmp_path / "run")
    assert cfg.unet.cross_attention_dim == 64
    again = [p for p in report.fresh if p.startswith("unet.")]
    assert len(again) == len(odd) > 0
    assert sum("re-initialised" in note for note in report.notes) == len(odd)
    values = [np.asarray(params[p]) for p in again]
    assert all(0.03 < v.std() < 0.3 for v in values)
    assert len({v.ravel()[0] for v in values}) == len(values)  # each with its own draw


# torch's arrays in numpy, inside diffusers.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.slow
def test_sdxl_is_a_parent_and_returns_to_diffusers(ancestors, tmp_path):
    """Only what reads the condition is re-initialized, since it is wider here: 64, not 48."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel

    folder, sdxl = tmp_path / "parents", EMU2 / "Emu2-Gen"
    folder.mkdir()
    for name in ("llama", "eva.pt"):
        (folder / name).symlink_to(ancestors / name)
    (folder / "sd").symlink_to(sdxl)
    report = fresh(folder, tmp_path / "run", model_config=GOLDEN / "Emu.json")
    cfg, params = read_all(tmp_path / "run")
    assert cfg.unet.projection_class_embeddings_input_dim == 64 + 6 * 16
    again = {p.removesuffix(".kernel") for p in report.fresh if p.startswith("unet.")}
    ends = {"attn2.to_k", "attn2.to_v", "add_embedding.linear_1"}
    assert {".".join(p.split(".")[-2:]) for p in again} == ends
    assert sum("re-initialised" in note for note in report.notes) == len(again)
    (stored,) = tensor_files.open_tensors(
        sdxl / "unet" / "diffusion_pytorch_model.bf16.safetensors"
    )[0].values()
    for key in ("add_embedding.linear_2", "mid_block.attentions.0.proj_in"):
        theirs = stored[f"{key}.weight"].read().astype(np.float32)
        np.testing.assert_array_equal(params[f"unet.{key}.kernel"].astype(np.float32), theirs.T)

    convert(tmp_path / "run", tmp_path / "back", to="emu")
    convert(tmp_path / "back", tmp_path / "again")
    assert checkpoint.load_model_config(tmp_path / "again") == cfg
    assert_same_tree(tmp_path / "back" / "scheduler", sdxl / "scheduler")
    shutil.rmtree(tmp_path / "run" / "release")  # nothing is carried along any more
    convert(tmp_path / "run", tmp_path / "hf", to="hf")
    assert release_config.decoder(tmp_path / "hf") == (cfg.unet, cfg.vae, cfg.scheduler)
    for kind, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")):
        _, info = kind.from_pretrained(tmp_path / "hf" / part, output_loading_info=True)
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = EulerDiscreteScheduler.from_pretrained(tmp_path / "hf" / "scheduler")
    theirs.set_timesteps(50)
    table = diffusion.sampling_steps(cfg.scheduler, 50, cfg.scheduler.sampler)
    np.testing.assert_array_equal(table.t, theirs.timesteps)


@pytest.mark.slow
def test_a_fresh_emu2_has_its_parents_weights(ancestors, tmp_path):
    (tmp_path / "parents").mkdir()
    for name, target in (
        ("llama", ancestors / "llama"),
        ("eva.pt", ancestors / "eva.pt"),
        ("sd", EMU2 / "Emu2-Gen"),
    ):
        (tmp_path / "parents" / name).symlink_to(target)
    sizes = {"image_size": 84, "head_width": 12, "n_query": 36, "v_query": 4, "postnorm": True}
    (tmp_path / "Emu2.json").write_text(json.dumps({"vision_cfg": sizes}))
    options = {"family": "emu2", "model_config": tmp_path / "Emu2.json"}
    report = fresh(tmp_path / "parents", tmp_path / "run", **options)
    cfg, params = read_all(tmp_path / "run")
    assert (cfg.vision.image_size, cfg.pooling.n_embeddings, cfg.pooling.n_frame) == (84, 36, 4)
    assert cfg.llama.vocab_size == 512 + 272 and cfg.family == "emu2"
    # The decoder's condition is as wide as the encoder in both.
    again = {"project_up.kernel", "project_down.kernel"}
    assert set(report.fresh) == again
    assert params["visual.pos_embed"].shape == (37, 48)
    theirs = load_tensors(ancestors / "eva.pt")["visual.blocks.1.mlp.fc1.weight"].numpy()
    np.testing.assert_array_equal(params["visual.blocks.mlp.fc1.kernel"][1], theirs.T)
    with pytest.raises(UserError, match="has no vision_cfg"):
        (tmp_path / "Emu2.json").write_text("{}")
        fresh(tmp_path / "parents", tmp_path / "none", **options)


def test_a_parent_that_does_not_fit_is_refused(ancestors, tmp_path):
    folder = tmp_path / "parents"
    shutil.copytree(ancestors, folder)
    tower = load_tensors(folder / "eva.pt")
    tower["visual.odd"] = torch.ones(2)
    tower["visual.norm.weight"] = torch.ones(7)
    del tower["visual.blocks.1.norm1.bias"]
    torch.save(tower, folder / "eva.pt")
    with pytest.raises(UserError) as error:
        fresh(folder, tmp_path / "run", model_config=GOLDEN / "Emu.json")
    for part in (
        "visual.odd is unexpected",
        "visual.norm.weight is [7], expected [48]",
        "visual.blocks.1.norm1.bias is missing",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "run").exists()


# --- Bad input -----------------------------------------------------------------------------


class Payload:
    """A malicious pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


WEIGHT = "decoder.lm.model.layers.1.mlp.up_proj.weight"


def edit_bin(change):
    return lambda folder: rewrite(folder / source.MULTIMODAL, change)


def edit_decoder(part, change):
    def edit(folder):
        path = folder / part / "diffusion_pytorch_model.safetensors"
        save_file(change(load_file(path)), path)

    return edit


def without(key):
    return lambda t: {k: v for k, v in t.items() if k != key}


def execute(folder):
    with (folder / source.MULTIMODAL).open("wb") as f:
        pickle.dump({WEIGHT: Payload(folder / "executed")}, f)


def execute_in_zip(folder):
    torch.save({WEIGHT: Payload(folder / "executed")}, folder / source.MULTIMODAL)


DAMAGE = {
    "truncated bin": (lambda f: cut(f / source.MULTIMODAL, 0.7), "truncated"),
    "nearly empty bin": (lambda f: cut(f / source.MULTIMODAL, 0.0001), "truncated"),
    "empty bin": (lambda f: cut(f / source.MULTIMODAL, 0), "damaged"),
    "truncated safetensors": (
        lambda f: cut(f / "unet" / "diffusion_pytorch_model.safetensors", 0.6),
        "truncated",
    ),
    "truncated header": (
        lambda f: cut(f / "vae" / "diffusion_pytorch_model.safetensors", 0.001),
        "truncated",
    ),
    "no safetensors": (
        lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"{" * 99),
        "diffusion_pytorch_model.safetensors",
    ),
    "no weights": (lambda f: (f / source.MULTIMODAL).unlink(), "has no weights"),
    "no vae": (lambda f: shutil.rmtree(f / "vae"), "vae"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "--tokenizer"),
    "pickle": (execute, "refused"),
    "pickle in a zip": (execute_in_zip, "refused"),
    "missing": (edit_bin(without(WEIGHT)), f"1 missing: {WEIGHT}"),
    "missing in vae": (
        edit_decoder("vae", without("quant_conv.bias")),
        "1 missing: vae:quant_conv.bias",
    ),
    "unexpected": (
        edit_bin(lambda t: t | {"extra.weight": torch.ones(2)}),
        "1 unexpected: extra.weight",
    ),
    "transposed": (
        edit_bin(lambda t: t | {WEIGHT: t[WEIGHT].T.contiguous()}),
        f"1 misshapen: {WEIGHT} is [64, 176], expected [176, 64]",
    ),
    "transposed conv": (
        edit_decoder(
            "unet",
            lambda t: t | {"conv_out.weight": t["conv_out.weight"].transpose(0, 1).contiguous()},
        ),
        "unet:conv_out.weight is [32, 4, 3, 3], expected [4, 32, 3, 3]",
    ),
    "integers": (edit_bin(lambda t: t | {WEIGHT: t[WEIGHT].to(torch.int64)}), f"{WEIGHT} is int64"),
    "doubles": (edit_bin(lambda t: t | {WEIGHT: t[WEIGHT].double()}), f"{WEIGHT} is float64"),
    "complex": (edit_bin(lambda t: t | {WEIGHT: t[WEIGHT].to(torch.complex64)}), "complex64"),
    "no tensor": (edit_bin(lambda t: t | {WEIGHT: 3}), f"{WEIGHT} is an int, expected a tensor"),
    "a list": (lambda f: torch.save([1, 2], f / source.MULTIMODAL), "expected a state dict"),
    "no layers": (
        edit_bin(lambda t: {k: v for k, v in t.items() if ".layers." not in k}),
        "not an Emu checkpoint",
    ),
    "other tokenizer": (
        edit_bin(
            lambda t: (
                t
                | {
                    k: torch.ones(600, 64)
                    for k in ("decoder.lm.model.embed_tokens.weight", "decoder.lm.lm_head.weight")
                }
            )
        ),
        "600 tokens",
    ),
    "wrong json": (
        lambda f: (f / "Emu.json").write_text('{"vision_cfg": {"width": 99}}'),
        "vision_cfg.width is 99, but the tensors have 48",
    ),
    "broken json": (lambda f: (f / "unet" / "config.json").write_text("{"), "cannot read"),
    "unknown feature": (
        lambda f: (f / "unet" / "config.json").write_text('{"dual_cross_attention": true}'),
        "dual_cross_attention",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_input_is_refused_and_the_destination_untouched(damage, tmp_path, capsys):
    release, dst = tmp_path / "release", tmp_path / "out" / "run"
    shutil.copytree(GOLDEN, release)
    for path in [release, *release.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    harm, message = DAMAGE[damage]
    harm(release)
    dst.mkdir(parents=True)
    (dst / "precious").write_text("data")
    status = cli.main(["convert", str(release), str(dst), "--overwrite"])
    err = capsys.readouterr().err
    assert status == 2
    assert err.startswith("emu-jax: error: ") and err.count("\n") == 1
    assert message in err
    assert [p.name for p in dst.parent.iterdir()] == ["run"]  # nothing left beside it either
    assert (dst / "precious").read_text() == "data"
    assert not (release / "executed").exists()


def test_missing_shards_are_named(ancestors, tmp_path):
    folder = tmp_path / "parents"
    shutil.copytree(ancestors, folder)
    shard = sorted((folder / "llama").glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"missing: {shard.name}"):
        fresh(folder, tmp_path / "run", model_config=GOLDEN / "Emu.json")


@pytest.mark.slow
def test_random_damage_never_shows_a_traceback(tmp_path, capsys):
    """Bytes flipped anywhere: one line and exit 2, or (in a tensor's data) a conversion."""
    rng = np.random.default_rng(0)
    release = tmp_path / "release"
    shutil.copytree(GOLDEN, release)
    for number in range(12):
        name = [source.MULTIMODAL, "vae/diffusion_pytorch_model.safetensors"][number % 2]
        path = release / name
        path.chmod(0o644)
        data = bytearray((GOLDEN / name).read_bytes())
        # Headers, where structure is, half of the time.
        region = 3000 if number % 4 < 2 else len(data)
        for at in rng.integers(0, region, 20):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        status = cli.main(["convert", str(release), str(tmp_path / "run"), "--overwrite"])
        err = capsys.readouterr().err
        assert status in (0, 2), err
        assert "Traceback" not in err
        path.write_bytes((GOLDEN / name).read_bytes())


def test_a_damaged_pickle_is_refused_whatever_it_leads_to(tmp_path):
    path = tmp_path / "tiny.bin"
    tensors = {f"layer.{i}.weight": torch.ones(2, 3, dtype=torch.bfloat16) for i in range(3)}
    torch.save({"module": tensors}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (name,) = [name for name in records if name.endswith("data.pkl")]
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(250):
        data = bytearray(records[name])
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] = rng.integers(256)
        with zipfile.ZipFile(path, "w") as archive:
            for record, content in records.items():
                archive.writestr(record, bytes(data) if record == name else content)
        try:
            opened, _ = tensor_files.open_tensors(path)
            for tensor in opened[path.name].values():
                tensor.read()
        except UserError as error:
            refused += 1
            assert "tiny.bin" in str(error)
    assert refused > 100


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_failed_swap_puts_the_old_destination_back(kind, tmp_path, monkeypatch):
    old, dst = tmp_path / "old", tmp_path / "dst"
    old.mkdir()
    (old / "precious").write_text("data")
    if kind == "link":
        dst.symlink_to(old)
    else:
        old.rename(dst)
    rename = Path.rename

    def fail(self, target):
        if (self / "new").exists():
            raise OSError(errno.ENOSPC, "no space", str(self))
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(UserError, match=f"cannot write {dst}: No space"):
            with replacing(dst, True) as temporary:
                (temporary / "new").write_text("")
    assert (dst / "precious").read_text() == "data"
    assert not list(tmp_path.glob(".*"))
    with replacing(dst, True) as temporary:
        (temporary / "new").write_text("")
    assert [p.name for p in dst.iterdir()] == ["new"] and dst.is_symlink() == (kind == "link")


def test_what_replaces_a_destination_is_on_the_disk_first(tmp_path, monkeypatch):
    dst, synced, rename = tmp_path / "dst", set(), Path.rename
    wanted = {"new", "deep", "dst"}

    def checked(self, target):
        assert wanted <= synced
        return rename(self, target)

    dst.mkdir()
    monkeypatch.setattr("emu_jax.storage.sync", lambda path: synced.add(Path(path).name))
    monkeypatch.setattr(Path, "rename", checked)
    with replacing(dst, True) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "new").write_text("")
    assert (dst / "deep" / "new").is_file()
    wanted = {"a.pt"}
    with replacing(tmp_path / "a.pt", False) as temporary:
        temporary.write_text("")
    assert (tmp_path / "a.pt").is_file()


def test_a_source_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot access .*nowhere"):
        with replacing(tmp_path / "dst", False):
            (tmp_path / "nowhere").read_bytes()
    assert not list(tmp_path.iterdir())


def diffusers_json(tmp_path, kind, **values):
    (tmp_path / "config.json").write_text(json.dumps(values))
    return release_config.diffusers_config(kind, tmp_path / "config.json")


def test_what_a_diffusers_configuration_leaves_out_has_diffusers_defaults(tmp_path):
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel

    with torch.device("meta"):
        models = UNet2DConditionModel(), AutoencoderKL(), PNDMScheduler()
    for kind, theirs in zip((UNetConfig, VAEConfig, SchedulerConfig), models, strict=True):
        ours = dataclasses.asdict(diffusers_json(tmp_path, kind))
        for name, value in ours.items():
            # diffusers leaves the first open, and names the second by a class.
            if (kind, name) not in ((UNetConfig, "sample_size"), (SchedulerConfig, "sampler")):
                assert value == theirs.config[name], name
    ours = diffusers_json(tmp_path, UNetConfig, attention_head_dim=[8, 8], layers_per_block=[1, 1])
    assert (ours.attention_head_dim, ours.layers_per_block) == (8, 1)


@pytest.mark.parametrize(
    "values",
    [
        {"downsample_padding": 0},
        {"mid_block_scale_factor": 0},
        {"dropout": True},
        {"num_attention_heads": 1},
        {"layers_per_block": [1, 2]},
        {"norm_num_groups": 0},
        {"norm_num_groups": 7},
        {"norm_num_groups": None},
        {"block_out_channels": []},
        {"attention_head_dim": "8"},
        {"attention_head_dim": [8, 8, 7, 8]},
        {"transformer_layers_per_block": [1, 2]},
        {"addition_embed_type": "image"},
        {"unknown_of_tomorrow": 1},
    ],
    ids=str,
)
def test_a_denoiser_that_ours_is_not_is_refused(tmp_path, values):
    with pytest.raises(UserError, match=next(iter(values))):
        diffusers_json(tmp_path, UNetConfig, **values)


ADAPTER = "decoder.lm.base_model.model.model.layers.{}.self_attn.{}.lora_A.default.weight"
ROTARY = "decoder.lm.base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq"
EMBEDDING = "decoder.lm.base_model.model.model.layers.{}.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        ({ADAPTER.format(0, "q_proj"): (0, 64)}, "q_proj.lora_A.*0, 64"),
        ({ADAPTER.format(0, "q_proj"): ()}, "q_proj.lora_A"),
        ({ROTARY: (0,)}, "inv_freq"),
        ({ROTARY: ()}, "inv_freq"),
        ({ROTARY: (10**6,)}, "inv_freq"),
    ],
)
def test_odd_sizes_are_one_line(instruct_shapes, change, message):
    with pytest.raises(UserError, match=message):
        release_config.multimodal(
            instruct_shapes | change, where="it", base_vocab=512, model_json=GOLDEN / "Emu.json"
        )


@pytest.fixture(scope="module")
def instruct_shapes():
    return {k: tuple(t.shape) for k, t in load_tensors(GOLDEN / "Emu-instruct.pt").items()}


def test_one_odd_adapter_or_layer_does_not_rule_the_rest(instruct_shapes):
    change = {ADAPTER.format(0, "v_proj"): (900, 64), EMBEDDING.format("9" * 5000): (3, 3)}
    cfg = release_config.multimodal(
        instruct_shapes | change, where="it", base_vocab=512, model_json=GOLDEN / "Emu.json"
    )
    assert cfg.llama.lora.rank == 4 and cfg.llama.layers == 4  # 3, and the absurd one


def test_an_existing_destination_is_kept_unless_told_otherwise(instruct_file, tmp_path):
    dst = tmp_path / "run"
    convert(instruct_file, dst)
    with pytest.raises(UserError, match="exists"):
        convert(instruct_file, dst)
    convert(instruct_file, dst, overwrite=True)
    assert checkpoint.load_model_config(dst).llama.lora
    for lost in (dst, tmp_path):
        with pytest.raises(UserError, match="run would be lost, since .* replaces it"):
            convert(dst, lost, to="emu", overwrite=True)
    with pytest.raises(UserError, match="run directory already"):
        convert(dst, tmp_path / "other")
    with pytest.raises(UserError, match="does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "other")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a release"):
        convert(tmp_path / "empty", tmp_path / "other")


@pytest.mark.parametrize("name", ["a[b]", "a*", "a?", "back\\slash"])
def test_a_run_directory_that_nothing_could_read_is_refused_at_the_start(name, tmp_path, capsys):
    dst, nowhere = str(tmp_path / name), str(tmp_path / "nowhere")
    for command in (
        ["convert", nowhere, dst],
        ["init", dst, "--llama", nowhere, "--eva-clip", nowhere, "--sd", nowhere],
    ):
        assert cli.main(command) == 2
        assert "the path contains " in capsys.readouterr().err
    assert cli.main(["convert", nowhere, dst, "--to", "emu"]) == 2  # no run directory
    assert "nowhere does not exist" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def save_legacy(tensors, path):
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


# How a state dict comes to lie in a file: (name, how it is written).
TORCH_FORMATS = {
    "protocol 2": torch.save,
    "protocol 4": lambda t, path: torch.save(t, path, pickle_protocol=4),
    "protocol 5": lambda t, path: torch.save(t, path, pickle_protocol=5),
    "before torch 1.6": save_legacy,
    "ours": None,
}


@pytest.mark.parametrize("form", TORCH_FORMATS)
def test_torch_files_are_read_as_torch_reads_them(form, tmp_path):
    path = tmp_path / "it.bin"
    whole = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    module = torch.nn.Linear(3, 2).bfloat16()
    tensors = module.state_dict(prefix="linear.")  # an OrderedDict with attributes
    tensors |= {
        "parameter": torch.nn.Parameter(whole[:2].clone()),
        "row": whole[2],
        "column": whole[:, 3],
        "part": whole[1:4, 2:9:3],
        "turned": whole.T,
        "expanded": whole[0, :1].expand(4),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
        "half": whole[1].half(),
    }
    if form == "ours":
        contents = {
            k: (tuple(v.shape), dtype_of(str(v.dtype).removeprefix("torch.")))
            for k, v in tensors.items()
        }
        writer = tensor_files.create(path, contents, wrapper_key="module")
        for key, tensor in tensors.items():
            bits = tensor.detach()
            bits = bits.float() if bits.dtype == torch.bfloat16 else bits
            writer.write(key, bits.numpy())  # cast where it was announced so
        writer.close()
        for mapped in (False, True):
            again = torch.load(path, weights_only=True, mmap=mapped)["module"]
            assert all(torch.equal(again[k], v) for k, v in tensors.items())
    else:
        TORCH_FORMATS[form]({"module": tensors}, path)
    opened, wrapper_key = tensor_files.open_tensors(path)
    assert wrapper_key == "module" and list(opened[path.name]) == list(tensors)
    for key, tensor in opened[path.name].items():
        theirs = tensors[key].detach()
        ours = tensor.read()
        assert ours.shape == tensor.shape == tuple(theirs.shape), key
        assert dtype_name(ours.dtype) == str(theirs.dtype).removeprefix("torch."), key
        assert not ours.flags.writeable or not ours.size
        np.testing.assert_array_equal(ours.astype(np.float64), theirs.double().numpy())


def test_a_hostile_pickle_runs_nothing_and_reads_no_other_bytes(tmp_path):
    """Whatever the protocol, and where a tensor claims more than its storage has."""
    for protocol in range(6):
        for harm in (Payload(tmp_path / "executed"), getattr, np.float64(3)):
            (tmp_path / "it.bin").write_bytes(pickle.dumps({"a": harm}, protocol))
            with pytest.raises(UserError, match="refused"):
                tensor_files.open_tensors(tmp_path / "it.bin")
    path = tmp_path / "big.bin"
    torch.save({"a": torch.arange(8.0)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (name,) = [name for name in records if name.endswith("data.pkl")]
    assert records[name].count(b"K\x08") == 2  # the storage's length, the tensor's
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(path, "w", compression) as archive:
            for record, content in records.items():
                archive.writestr(record, content.replace(b"K\x08", b"K\x63"))
        expected = "larger than its storage" if compression == zipfile.ZIP_STORED else "compressed"
        with pytest.raises(UserError, match=expected):
            tensor_files.open_tensors(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["it.bin", "it.safetensors", "it.safetensors.index.json"])
@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 27\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>404</html>", "a web page"),
        (b"\x1f\x8b\x08\x00", "compressed with gzip"),
    ],
)
def test_what_stands_in_for_a_file_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        tensor_files.open_tensors(tmp_path / name)


def test_variants_in_half_precision_are_read_where_there_is_no_other(tmp_path):
    tensors = {"a": torch.ones(2, dtype=torch.float16)}
    save_file(tensors, tmp_path / "model.fp16.safetensors")
    index = {"weight_map": {"a": "model.fp16.safetensors"}}
    text = json.dumps(index).encode()
    (tmp_path / "shards.safetensors.index.fp16.json").write_bytes(b"\xef\xbb\xbf" + text)
    for stem in ("model", "shards"):
        opened, _ = tensor_files.open_tensors(tensor_files.find(tmp_path, stem))
        assert opened["model.fp16.safetensors"]["a"].dtype == np.float16
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    assert tensor_files.find(tmp_path, "model").name == "model.safetensors"
    with pytest.raises(UserError, match="it has model.fp16.safetensors, model.safetensors"):
        tensor_files.find(tmp_path, "other")


def test_arrays_in_layers_open_in_orbax_and_damage_is_seen(run_dir, tmp_path):
    import orbax.checkpoint as ocp

    item = run_dir / "0" / "params"
    path = "llama.layers.mlp.up_proj.kernel"
    stored = ocp.PyTreeCheckpointer().restore(item)["llama"]["layers"]["mlp"]["up_proj"]["kernel"]
    golden = load_tensors(GOLDEN / source.MULTIMODAL)
    for i, layer in enumerate(stored):
        assert np.array_equal(layer, golden[WEIGHT.replace("layers.1", f"layers.{i}")].numpy().T)
    arrays = ArrayReader(item, tmp_path)
    assert arrays._open(path).chunk_layout.read_chunk.shape == (1, *stored.shape[1:])

    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    (large,) = sorted((run / "0" / "params" / "d").iterdir(), key=lambda p: p.stat().st_size)[-1:]
    data = bytearray(large.read_bytes())
    data[len(data) // 2] ^= 4
    large.write_bytes(data)
    with pytest.raises(UserError, match="cannot read .* from the checkpoint"):
        convert(run, tmp_path / "back", to="emu")


def test_chunks_across_layers_are_put_in_order_once(tmp_path, monkeypatch):
    """As training on several devices leaves them."""
    import orbax.checkpoint as ocp

    monkeypatch.setattr(checkpoint_arrays, "_CHUNK", 64)
    values = np.arange(3 * 8 * 5, dtype=np.float32).reshape(3, 8, 5)
    mesh = make_mesh(fsdp=4, tensor=2)
    spec = jax.sharding.PartitionSpec(None, "fsdp", None)
    sharded = jax.device_put(values, jax.sharding.NamedSharding(mesh, spec))
    ocp.PyTreeCheckpointer().save(tmp_path / "item", {"a": {"b": sharded}})
    arrays = ArrayReader(tmp_path / "item", tmp_path)
    assert arrays._open("a.b").chunk_layout.read_chunk.shape[0] == 3
    for i, layer in enumerate(values):
        assert np.array_equal(arrays.read("a.b", i), layer)
    assert isinstance(arrays._last[1], np.memmap)
    assert np.array_equal(arrays.read("a.b", None), values)


# --- Memory ----------------------------------------------------------------------------------


def write_large(folder, *, layers, width, mlp, dtype=torch.bfloat16):
    """A release of random weights without its decoder, written tensor by tensor."""
    heads, vision = width // 64, 64
    cfg = EmuConfig(
        vision=VisionConfig(
            image_size=28, width=vision, layers=2, head_width=16, mlp_width=96, clip_width=8
        ),
        cformer=CFormerConfig(n_causal=4, width=64, layers=2, heads=4, head_width=16, mlp_width=96),
        llama=LlamaConfig(vocab_size=516, width=width, layers=layers, heads=heads, mlp_width=mlp),
        tokens=TokenIds.after(512),
        unet=None,
        vae=None,
    )
    template = source.abstract_model(cfg, one_device())
    shapes = {p: tuple(s.shape) for p, s in template.shapes.items()}
    kind = dtype_of(str(dtype).removeprefix("torch."))
    contents = {
        key: (row.transform.release_shape(row.layer_shape(shapes[row.path])), kind)
        for row in tables.model_rows(cfg, shapes)
        for key in row.keys
    }
    writer = tensor_files.create(folder / source.MULTIMODAL, contents)
    rng = np.random.default_rng(0)
    for key, (shape, _) in contents.items():
        writer.write(key, rng.standard_normal(shape, np.float32).astype(kind))
    writer.close()
    shutil.copytree(GOLDEN / "tokenizer", folder / "tokenizer")
    export.write_json(folder / "tokenizer" / "config.json", export.llama_json(cfg, vocab_size=512))
    export.write_json(folder / "Emu.json", export.model_json(cfg))
    return sum(math.prod(shape) for shape in shapes.values())


def convert_measured(*arguments):
    """`emu-jax convert` in a process of its own: what it prints, as JSON."""
    env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "emu_jax.cli", "convert", *map(str, arguments), "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def rss_anon_limited(monkeypatch):
    """Makes what conversion holds in memory small beside a small model."""
    for name in ("checkpoint_arrays._CHUNK", "checkpoint_arrays._GROUP", "tensors.WRITE_BYTES"):
        monkeypatch.setattr(f"emu_jax.convert.{name}", 2**21)


def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch):
    """One stacked parameter alone is larger than what either direction may take. (The largest
    single tensor has 1 MiB.)"""
    rss_anon_limited(monkeypatch)
    write_large(tmp_path / "release", layers=32, width=512, mlp=1024)
    for src, dst, to in (("release", "run", "jax"), ("run", "back", "emu"), ("run", "hf", "hf")):
        report = convert(tmp_path / src, tmp_path / dst, to=to, mesh=one_device())
        taken = report.peak_rss_anon_bytes - report.rss_anon_bytes_before
        assert taken < 24 * 2**20 < report.largest_parameter_bytes, (to, report)
    assert_same_file(
        tmp_path / "back" / source.MULTIMODAL, tmp_path / "release" / source.MULTIMODAL
    )


def hashes(path):
    """The SHA-256 of each tensor of a PyTorch file, by name in the file's order."""
    tensors = torch.load(path, mmap=True, weights_only=True)
    return {
        key: hashlib.sha256(value.contiguous().view(torch.uint8).numpy()).digest()
        for key, value in tensors.items()
    }


def check_memory(folder, **sizes):
    release, run, back = folder / "release", folder / "run", folder / "back"
    parameters = write_large(release, **sizes)
    theirs = hashes(release / source.MULTIMODAL)
    for arguments in ([release, run], [run, back, "--to", "emu"]):
        report, err = convert_measured(*arguments)
        shutil.rmtree(arguments[0])  # three copies of the model might fill the disk
        assert report["parameters"] == parameters
        peak, before = report["peak_rss_anon_bytes"], report["rss_anon_bytes_before"]
        assert 0 < peak < 2**30, (arguments, report)
        # What the conversion itself takes: less than the whole, so that it can fail.
        print(report)
        assert peak - before < 0.6 * 2**30 < report["bytes"], (arguments, report)
    ours = hashes(back / source.MULTIMODAL)
    assert [(key, ours[key]) for key in ours if key in theirs] == list(theirs.items())
    return parameters, err


def test_a_job_of_several_processes_is_refused_at_the_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    assert cli.main(["convert", str(tmp_path / "none"), str(tmp_path / "dst")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a conversion runs in one process, not 2 (JAX_NUM_PROCESSES): " in line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_memory_stays_near_the_largest_parameter(tmp_path):
    """0.7 GB through a budget of less."""
    parameters, _ = check_memory(tmp_path, layers=64, width=896, mlp=896)
    assert parameters > 3e8


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_three_billion_parameters_convert_within_the_bound(tmp_path):
    parameters, err = check_memory(tmp_path, layers=36, width=2560, mlp=7424)
    assert parameters > 3e9
    assert "writing: " in err  # progress, in plain lines off a terminal
