"""Emu2 against what the released code computed, and its files both ways
(tests/golden/README_emu2.md)."""

import dataclasses
import gzip
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, relative_error
from flax import nnx

from emu_jax import cli, config
from emu_jax.config import CFormerConfig, EmuConfig, PoolingConfig
from emu_jax.convert import export, source, tables, tensor_files
from emu_jax.convert.convert import convert
from emu_jax.errors import UserError
from emu_jax.models.connectors import pool
from emu_jax.sharding import make_mesh
from emu_jax.tokenizer import Tokenizer
from emu_jax.verify import verify

EMU2 = GOLDEN.parent / "emu2_tiny"
NATIVE = EMU2 / "Emu2_pytorch_model.bf16.bin"
META = json.loads((EMU2 / "meta.json").read_text())
SETTINGS = {"model_config": EMU2 / "Emu2.json", "tokenizer": EMU2 / "llama_config"}
TIGHT, FEEDBACK = 2e-5, 1e-4


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def stored(path):
    """{file: {key: tensor}} of a file or an index of shards."""
    return tensor_files.open_tensors(path)[0]


def assert_same_tensors(ours, theirs):
    """Same files, keys, dtypes and bits."""
    ours, theirs = stored(ours), stored(theirs)
    assert list(ours) == list(theirs)
    for name, tensors in theirs.items():
        assert list(ours[name]) == list(tensors)
        for key, tensor in tensors.items():
            assert ours[name][key].dtype == tensor.dtype, key
            np.testing.assert_array_equal(
                ours[name][key].read().view(np.uint8), tensor.read().view(np.uint8), err_msg=key
            )


def assert_same_values(ours, theirs):
    """The same tensors bit for bit, in any files and any order."""
    ours, theirs = (
        {key: t for tensors in stored(path).values() for key, t in tensors.items()}
        for path in (ours, theirs)
    )
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        np.testing.assert_array_equal(
            ours[key].read().view(np.uint8), tensor.read().view(np.uint8), err_msg=key
        )


# --- Model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden2():
    return np.load(EMU2 / "expected.npz")


@pytest.fixture(scope="module")
def base():
    """The base model, from its native file alone, in float32."""
    opened = source.ReleaseSource.open(NATIVE, one_device(), **SETTINGS)
    params = {}
    for path, row in opened.rows.items():
        layers = [opened.read(path, layer) for layer in source.layers(row)]
        params[path] = jnp.asarray(np.stack(layers) if row.stacked else layers[0], jnp.float32)
    return source.abstract_model(opened.cfg, one_device()).module(params)


@nnx.jit
def computed(emu, pixels, ids, mask, embedding_index, prompt, prompt_length):
    """Everything the recording has of two documents with three images, and an image to follow."""
    features = emu.visual(pixels)
    stills = emu.encode_images(pixels)
    frames = emu.encode_images(pixels, frames=True)
    both = emu.encode_images(pixels, frames=jnp.asarray([False, True, False]))
    images = jnp.stack([stills, stills])
    x = emu.embed(ids, images, embedding_index)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden = emu.llama(x, positions, jnp.asarray(mask, jnp.int32))
    return {
        "features": features,
        "stills": stills,
        "frames": frames,
        "both": both,
        "up": emu.to_language(stills),
        "hidden": hidden,
        "logits": emu.llama.logits(hidden),
        "predicted": emu.regress(hidden),
        "targets": emu.regression_targets(x, images, embedding_index),
        "mask": emu.regression_mask(ids, mask),
        "drawn": emu.regress_after(prompt, prompt_length),
    }


def test_model_computes_what_the_release_does(base, golden2):
    """Encoder, pooling for stills and frames, both projections, the language model, the pairs of
    the regression, and the loop that feeds regressed embeddings back."""
    cfg, ids, mask = base.cfg, golden2["train/ids"], golden2["train/mask"]
    assert (cfg.family, cfg.n_embeddings, cfg.n_frame) == ("emu2", 16, 4)
    assert (cfg.embedding_width, cfg.regression_pairs) == (cfg.vision.width, 16)
    words = Tokenizer.load(SETTINGS["tokenizer"], family="emu2")
    prompt = [words.encode(t + "[IMG]") for t in META["gen_image"]["text_only"]["text"]]
    tokens, real = words.pad(prompt, "right")
    flat = np.flatnonzero(ids.reshape(-1) == cfg.tokens.image)
    embedding_index = np.full(ids.size, -1, np.int32)
    embedding_index[flat] = np.arange(len(flat))
    out = computed(
        base,
        golden2["vit/pixels_nchw"].transpose(0, 2, 3, 1),
        jnp.asarray(ids, jnp.int32),
        jnp.asarray(mask),
        jnp.asarray(embedding_index.reshape(ids.shape)),
        jnp.asarray(tokens),
        jnp.asarray(real.sum(1)),
    )
    real = mask[..., None].astype(bool)
    regressed = np.asarray(out["mask"])
    found = {
        "vit/features": out["features"],
        "encode/n_query": out["stills"],
        "encode/v_query": out["frames"],
        "encode/n_query_up": out["up"],
        "train/hidden": np.where(real, out["hidden"], 0),
        "train/logits": np.where(real, out["logits"], 0),
        "train/regress_pred": np.asarray(out["predicted"])[regressed],
        "train/regress_target": np.asarray(out["targets"])[np.roll(regressed, 1, axis=1)],
    }
    for key, value in found.items():
        assert relative_error(value, golden2[key]) < TIGHT, key
    assert relative_error(out["drawn"], golden2["gen_image/text_only"]) < FEEDBACK
    # With a flag for each image, a frame's embeddings are padded to the number of a still's.
    np.testing.assert_array_equal(out["both"][0], out["stills"][0])
    np.testing.assert_array_equal(out["both"][1, :4], out["frames"][1])
    assert not np.any(out["both"][1, 4:])


def test_pooling_by_hand():
    features = jnp.arange(16, dtype=jnp.bfloat16)[None, :, None] * 16
    np.testing.assert_array_equal(pool(features, 4)[0, :, 0], [40, 72, 168, 200])
    assert pool(features, 16).dtype == jnp.bfloat16
    np.testing.assert_array_equal(pool(features, 16), features)


def test_config_needs_one_connector_that_fits():
    emu2 = config.emu2()
    changes = [
        ({"cformer": CFormerConfig()}, "one connector"),
        ({"pooling": None}, "one connector"),
        ({"pooling": PoolingConfig(n_embeddings=60)}, "n_embeddings = 60 must be the square"),
        ({"pooling": PoolingConfig(n_embeddings=9)}, "divisor of the 32 patches"),
        ({"pooling": PoolingConfig(16, 64)}, "n_frame = 64 must be at most"),
        ({"llama": dataclasses.replace(emu2.llama, regression_head=True)}, "regression_head"),
    ]
    for change, message in changes:
        with pytest.raises(UserError, match=message):
            dataclasses.replace(emu2, **change)
    values = config.to_dict(emu2)
    assert config.from_dict(EmuConfig, values) == emu2
    # A file from before there was a choice.
    old = config.to_dict(EmuConfig())
    del old["pooling"], old["llama"]["regression_head"], old["tokens"]["frame"]
    assert config.from_dict(EmuConfig, old) == EmuConfig()


# --- Names -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released_shapes():
    path = GOLDEN.parent / "emu2_state_dict_shapes.json.gz"
    return json.loads(gzip.decompress(path.read_bytes()))


PARAMETERS = {
    "Emu2": 36_906_513_152,
    "Emu2-Chat": 36_906_513_152 + 26_624,
    "Emu2-Gen": 36_906_513_152 + 2_525_520_644 + 83_653_863,
}


# The decoder's 1,900 parameters take seconds to trace.
@pytest.mark.parametrize(
    "model", ["Emu2", "Emu2-Chat", pytest.param("Emu2-Gen", marks=pytest.mark.slow)]
)
def test_every_tensor_of_the_release_has_its_place(released_shapes, model):
    presets = {"Emu2": config.emu2, "Emu2-Chat": config.emu2_chat, "Emu2-Gen": config.emu2_gen}
    cfg = presets[model]()
    shapes = {p: s.shape for p, s in source.abstract_model(cfg, one_device()).shapes.items()}
    rows = tables.model_rows(cfg, shapes)
    assert sorted(row.path for row in rows) == sorted(shapes)  # every leaf, once
    sizes = [np.prod(shape, dtype=np.int64) for shape in shapes.values()]
    assert sum(sizes) == PARAMETERS[model]
    for layout in ("native", "hub"):
        parts = {"": f"{model}/{layout}"}
        if (model, layout) == ("Emu2-Gen", "hub"):
            parts = {"": f"{model}/hub/multimodal_encoder"}
            parts |= {f"{part}:": f"{model}/hub/{part}" for part in ("unet", "vae")}
        released = {
            prefix + key: tuple(shape)
            for prefix, listing in parts.items()
            for key, shape in released_shapes[listing].items()
        }
        style = tables.KeyStyle.of(released)
        unused = tables.match(rows, shapes, cfg, style, released, layout)
        checker = len(released_shapes["Emu2-Gen/hub/safety_checker"])
        assert len(unused) == (layout == "native") * (60 + checker * (model == "Emu2-Gen"))
        back = {
            style.write(key): tuple(row.release_shape(shapes[row.path]))
            for row in rows
            for key in row.keys
        }
        assert back == {k: v for k, v in released.items() if k not in unused}


# --- Files -----------------------------------------------------------------------------------


def test_native_file_comes_back_bit_for_bit(tmp_path):
    convert(NATIVE, tmp_path / "run", **SETTINGS)
    convert(tmp_path / "run", tmp_path / "back", to="emu")
    assert_same_tensors(tmp_path / "back" / NATIVE.name, NATIVE)
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        copied = tmp_path / "back" / "tokenizer" / name
        assert copied.read_bytes() == (EMU2 / "llama_config" / name).read_bytes()
    # What was written needs no options, and passes through a Hub folder.
    convert(tmp_path / "back" / NATIVE.name, tmp_path / "hub", to="emu", layout="hub")
    keys = next(iter(stored(tmp_path / "hub" / "model.safetensors").values()))
    assert "model.visual.cls_token" in keys and "project_up.weight" in keys
    assert not any("inv_freq" in key for key in keys)
    convert(tmp_path / "hub", tmp_path / "again.bin", to="emu", layout="native")
    assert_same_values(tmp_path / "again.bin", NATIVE)


def test_hub_folder_comes_back_bit_for_bit(tmp_path):
    chat = EMU2 / "Emu2-Chat"
    convert(chat, tmp_path / "run")
    cfg = config.load_json(EmuConfig, tmp_path / "run" / "config.json")
    assert (cfg.n_embeddings, cfg.n_frame, cfg.llama.vocab_size) == (64, 4, 786)
    assert cfg.llama.rope_dtype == "float32" and cfg.vision.post_norm
    convert(tmp_path / "run", tmp_path / "back", to="emu")
    index = "pytorch_model.bin.index.json"
    assert_same_tensors(tmp_path / "back" / index, chat / index)
    for path in chat.iterdir():
        if path.suffix != ".bin":
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    # Other shards, and one native file, are the same model.
    convert(tmp_path / "run", tmp_path / "chat.pth", to="emu", layout="native")
    words = tmp_path / "words"
    shutil.copytree(EMU2 / "llama_config", words)
    native = source.ReleaseSource.open(
        tmp_path / "chat.pth", one_device(), EMU2 / "Emu2.json", words
    )
    assert native.cfg == cfg and native.tokenizer.instruct
    run = source.RunSource.open(tmp_path / "run", one_device())
    for path, row in run.rows.items():
        for layer in source.layers(row):
            np.testing.assert_array_equal(run.read(path, layer), native.read(path, layer))


def test_layouts_that_came_otherwise(tmp_path):
    """Weights without rotary frequencies, in float32, and safetensors with a variant's index."""
    tensors = next(iter(stored(NATIVE).values()))
    plain = {k: t for k, t in tensors.items() if not k.endswith("inv_freq")}
    contents = {k: (t.shape, np.dtype(np.float32)) for k, t in plain.items()}
    writer = tensor_files.create(tmp_path / "emu2.pth", contents)
    for key, tensor in plain.items():
        writer.write(key, tensor.read())
    writer.close()
    opened = source.ReleaseSource.open(tmp_path / "emu2.pth", one_device(), **SETTINGS)
    original = source.ReleaseSource.open(NATIVE, one_device(), **SETTINGS)
    assert opened.cfg == original.cfg and not opened.unused and len(original.unused) == 3
    for path in opened.rows:
        np.testing.assert_array_equal(opened.read(path, 0), original.read(path, 0))
    # A Hub folder has no frequencies, but knows those of the native file: none, or others.
    key = "decoder.lm.model.layers.1.self_attn.rotary_emb.inv_freq"
    own = {key: np.linspace(0, 1, 8, dtype=np.float32)}
    writer = tensor_files.create(
        tmp_path / "own.pth", contents | {k: (t.shape, t.dtype) for k, t in own.items()}
    )
    for name, array in ({k: t.read() for k, t in plain.items()} | own).items():
        writer.write(name, array)
    writer.close()
    for name in ("emu2", "own"):
        file, again = tmp_path / f"{name}.pth", tmp_path / f"{name}_again.pth"
        convert(file, tmp_path / name, to="emu", layout="hub", **SETTINGS)
        convert(tmp_path / name, again, to="emu", layout="native")
        assert_same_values(again, file)

    encoder = EMU2 / "Emu2-Gen" / "multimodal_encoder"
    for index in ("model.safetensors.index.json", "model.safetensors.index.bf16.json"):
        folder = tmp_path / index
        shutil.copytree(encoder, folder)
        (folder / index).rename(folder / "kept")
        for other in folder.glob("*.index*"):
            other.unlink()
        (folder / "kept").rename(folder / index)
        for name in ("tokenizer.model", "added_tokens.json"):
            shutil.copy(EMU2 / "Emu2-Gen" / "tokenizer" / name, folder)
        opened = source.open_model_source(folder, one_device())
        assert opened.cfg == original.cfg
        for path in opened.shapes:
            np.testing.assert_array_equal(opened.read(path, 0), original.read(path, 0))


def test_decoder_of_a_file_is_not_that_of_a_neighbor(tmp_path):
    """`diffusion_config` wins over other models' folders, and of those only one is unambiguous."""
    for folder in ("a/unet", "words", "conf/diffusion_config/unet"):
        (tmp_path / folder).mkdir(parents=True)
    for unet in ("a/unet", "conf/diffusion_config/unet"):
        (tmp_path / unet / "config.json").write_text("{}")

    def decoder(tokenizer):
        file = tmp_path / "gen.safetensors"
        return source.ReleaseFiles(tmp_path, file, tmp_path / tokenizer, None, None).decoder()

    assert decoder("conf/llama_config") == tmp_path / "conf" / "diffusion_config"
    assert decoder("words") == tmp_path / "a"
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert decoder("conf/llama_config") == tmp_path / "conf" / "diffusion_config"
    with pytest.raises(UserError, match="which image decoder .*/a, .*/b: copy .* to .*_config"):
        decoder("words")


def test_language_model_for_transformers(tmp_path):
    convert(EMU2 / "Emu2-Chat", tmp_path / "hf", to="hf")
    tensors = next(iter(stored(tmp_path / "hf" / "llama" / "model.safetensors").values()))
    assert tensors["model.embed_tokens.weight"].shape == (786, 64)
    values = json.loads((tmp_path / "hf" / "llama" / "config.json").read_text())
    assert (values["num_attention_heads"], values["vocab_size"]) == (4, 786)


def test_refusals(tmp_path):
    run = tmp_path / "run"
    alone = shutil.copy(NATIVE, tmp_path)
    with pytest.raises(UserError, match="width of the visual encoder's heads cannot"):
        convert(alone, run, tokenizer=EMU2 / "llama_config")
    with pytest.raises(UserError, match="has 700 tokens, the tokenizer 512.*adds 272, or 274"):
        source.release_config.multimodal(
            {"project_up.weight": (64, 48), "decoder.lm.model.embed_tokens.weight": (700, 64)},
            where="a file",
            base_vocab=512,
        )
    for key, value, message in (
        ("rope", True, "rope = True is not supported"),
        ("layers", 4, "layers is 4, but the tensors have 3"),
        ("n_query", 15, "n_embeddings = 15 must be the square"),
    ):
        values = json.loads((EMU2 / "Emu2.json").read_text())
        values["vision_cfg"][key] = value
        (tmp_path / "Emu2.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=message):
            convert(alone, run, **SETTINGS | {"model_config": tmp_path / "Emu2.json"})
    convert(NATIVE, run, **SETTINGS)
    with pytest.raises(UserError, match="--layout hub is a folder"):
        convert(run, tmp_path / "emu2.bin", to="emu", layout="hub")
    opened = source.RunSource.open(run, one_device())
    lora = dataclasses.replace(opened.cfg.llama, lora=config.LoraConfig(rank=2))
    opened.cfg = dataclasses.replace(opened.cfg, llama=lora)
    with pytest.raises(UserError, match="have no LoRA adapters: add --merge-lora"):
        export.write_release(opened, tmp_path / "out", tmp_path / "out")


def test_a_model_without_a_release_gets_the_layout_of_the_hub(tmp_path):
    """A model trained from scratch exports as a Hub folder that loads as it is."""
    convert(NATIVE, tmp_path / "run", **SETTINGS)
    shutil.rmtree(tmp_path / "run" / "release")
    convert(tmp_path / "run", tmp_path / "hub", to="emu")
    assert {p.name for p in (tmp_path / "hub").iterdir()} >= {
        "config.json",
        "added_tokens.json",
        "model.safetensors",
        "tokenizer.model",
    }
    opened = source.open_model_source(tmp_path / "hub", one_device())
    assert opened.cfg == config.load_json(EmuConfig, tmp_path / "run" / "config.json")
    assert opened.tokenizer.family == "emu2"


# --- Tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
def test_ids_are_those_of_both_tokenizers(chat, tmp_path):
    """The slow tokenizer's by default, the fast one's where it is chosen; saved and inferred."""
    folder = EMU2 / ("Emu2-Chat" if chat else "Emu2-Gen/tokenizer")
    words = Tokenizer.load(folder)  # the family follows from added_tokens.json
    assert (words.family, words.instruct, len(words)) == ("emu2", chat, 786 if chat else 784)
    fast = Tokenizer.load(folder, fast=True)
    special = META["special"] | (META["special_chat"] if chat else {})
    assert {t: i for t, i in special.items() if i >= 512} == words._added
    cases = META["tokenizer_cases_chat" if chat else "tokenizer_cases"]
    texts = [*META["chat"].values(), *META["chat_hub"].values()] if chat else []
    assert sum("fast_ids" in case for case in cases) > 5
    for case in cases:
        assert words.encode(case["text"]) == case["ids"], case["text"]
        assert fast.encode(case["text"]) == case.get("fast_ids", case["ids"]), case["text"]
        assert words.decode(case["ids"]) == case["decoded"]
        assert words.decode(case["ids"], False) == case["decoded_with_special"]
    for case in texts:
        text = case["text"].replace("[<IMG_PLH>]", words.image_placeholder(64))
        text = text.replace("[<VID_PLH>]", words.frame_placeholder(4))
        if "fast_ids" in case:
            assert fast.encode(text) == case["fast_ids"]
            assert words.encode(text) != case["fast_ids"]
    for each in (words, fast, words.as_fast()):
        each.save(tmp_path)
        again = Tokenizer.load(tmp_path)
        assert (again.fast, again.fingerprint) == (each.fast, each.fingerprint)
    assert words.fingerprint != fast.fingerprint == words.as_fast().fingerprint
    assert words.frame == 516 and Tokenizer.load(folder, False, "emu").frame is None


def test_converting_may_choose_the_fast_tokenizer(tmp_path):
    convert(EMU2 / "Emu2-Chat", tmp_path / "run", fast_tokenizer=True)
    assert Tokenizer.load(tmp_path / "run" / "tokenizer").fast


def test_flops_count_what_pooling_needs():
    """The projections meet the embeddings, and there is no Causal Transformer."""
    from emu_jax.train.config import DataConfig, TrainConfig
    from emu_jax.train.flops import train_flops

    model = dataclasses.replace(
        config.digits(),
        vision=dataclasses.replace(config.digits().vision, post_norm=True, final_norm=False),
        cformer=None,
        pooling=PoolingConfig(4, 4),
        llama=dataclasses.replace(config.digits().llama, regression_head=False),
        unet=None,
        vae=None,
    )
    data = DataConfig(batch_size=2, row_tokens=32, row_images=3, n_causal=4, image_size=32)
    flops = train_flops(TrainConfig(model=model, data=data))
    matrix = 96 * 128
    assert flops.towers.keys() == {"visual", "project_up", "llama", "project_down"}
    assert flops.towers["project_up"] == 6 * matrix * 2 * 3 * 4
    assert flops.towers["project_down"] == 6 * matrix * 2 * 3 * 4


# --- Emu2-Gen --------------------------------------------------------------------------------


@pytest.mark.slow
def test_gen_folder_and_its_one_file_come_back_bit_for_bit(tmp_path):
    """Diffusers' folders, and the one file with a prefix for each part, which also has a safety
    checker, come back as they were, and each becomes the other."""
    gen = EMU2 / "Emu2-Gen"
    convert(gen, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back", to="emu")
    for path in gen.rglob("*"):
        ours = tmp_path / "back" / path.relative_to(gen)
        if path.suffix == ".safetensors":
            assert_same_tensors(ours, path)
        elif path.is_file():
            assert ours.read_bytes() == path.read_bytes(), path

    file = tmp_path / "native" / "Emu2-Gen_pytorch_model.bf16.safetensors"
    convert(tmp_path / "run", file.parent, to="emu", layout="native")
    tensors = next(iter(stored(file).values()))
    assert len([key for key in tensors if key.endswith("inv_freq")]) == 3
    plain = {k: (t.shape, t.dtype) for k, t in tensors.items()}
    extra = {"safety_checker.concept_embeds": ((2, 3), np.dtype(np.float32))}
    whole = tmp_path / "whole.safetensors"
    writer = tensor_files.create(whole, plain | extra)
    for key, tensor in tensors.items():
        writer.write(key, tensor.read())
    writer.write("safety_checker.concept_embeds", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.close()
    shutil.copytree(gen / "unet", tmp_path / "diffusion_config" / "unet")
    for part in ("vae", "scheduler"):
        shutil.copytree(gen / part, tmp_path / "diffusion_config" / part)
    convert(whole, tmp_path / "hub", to="emu", layout="hub", **SETTINGS)
    name = "diffusion_pytorch_model"
    for part in ("unet", "vae"):
        ours = tmp_path / "hub" / part / f"{name}.safetensors"
        assert_same_values(ours, gen / part / f"{name}.bf16.safetensors")
    convert(tmp_path / "hub", tmp_path / "again.safetensors", to="emu", layout="native")
    assert_same_values(tmp_path / "again.safetensors", whole)


# --- The command -----------------------------------------------------------------------------

# Recorded answers that differ from others in settings alone, which Emu1's tests cover.
LEFT_OUT = ("generate/", "video_still/", "chat/multi/", "chat/mixed/", "chat/text/")
KEPT = ("generate/release/ids", "generate/beam5_lp-1_min6/ids")


def recording(folder):
    """A smaller recording."""
    with np.load(EMU2 / "expected.npz") as stored:
        arrays = {
            key: stored[key]
            for key in stored
            if key in KEPT or not (key.startswith(LEFT_OUT) and key.endswith("/ids"))
        }
    np.savez(folder / "expected.npz", **arrays)
    for path in (*EMU2.glob("*.png"), EMU2 / "meta.json"):
        shutil.copy(path, folder)
    return arrays


@pytest.mark.slow
@pytest.mark.parametrize("model", ["Emu2-Gen", "Emu2-Chat"])
def test_every_recorded_tensor_is_verified(model, tmp_path, capsys):
    convert(EMU2 / model, tmp_path / "run")
    (tmp_path / "golden").mkdir()
    arrays = recording(tmp_path / "golden")
    folders = ["--checkpoint", str(tmp_path / "run"), "--golden", str(tmp_path / "golden")]
    status = cli.main(["verify", *folders, "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (status, result["passed"], result["failed"], result["family"]) == (0, True, [], "emu2")
    chat = {key for key in arrays if key.startswith(("chat/", "chat_hub/"))}
    every = {key for key in arrays if key.startswith(("preprocess/", "box/"))}
    applicable = chat | every if model == "Emu2-Chat" else arrays.keys() - chat
    assert set(result["not_applicable"]) == arrays.keys() - applicable
    assert result["checked"] == len(applicable)
    assert sum(result["not_applicable_groups"].values()) == len(result["not_applicable"])


def test_a_recording_of_the_other_family_is_refused(tmp_path):
    convert(NATIVE, tmp_path / "run", **SETTINGS)
    with pytest.raises(UserError, match="recorded from a model of the family emu, .* is of emu2"):
        verify(tmp_path / "run", GOLDEN)
