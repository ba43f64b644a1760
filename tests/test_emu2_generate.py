"""Emu2's prompts, generation and losses against what the released code computed
(tests/golden/README_emu2.md)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, relative_error
from flax import nnx
from PIL import Image

from emu_jax.checkpoint import interpolate_positions
from emu_jax.config import EmuConfig, LlamaConfig, PoolingConfig, TokenIds, VisionConfig
from emu_jax.convert import tables, tensor_files
from emu_jax.convert.init import resize_positions
from emu_jax.errors import UserError
from emu_jax.generate import mixed
from emu_jax.generate.api import Emu
from emu_jax.generate.prompt import (
    EMU2_CHAT,
    EMU_CHAT,
    Prompt,
    box_image,
    chat_format,
    converse,
    grounded,
    pad,
)
from emu_jax.models.emu import EmuModel
from emu_jax.sharding import AbstractModel, make_mesh
from emu_jax.tokenizer import Tokenizer
from emu_jax.train.objectives import sequence_losses

EMU2 = GOLDEN.parent / "emu2_tiny"
META = json.loads((EMU2 / "meta.json").read_text())
TIGHT, FEEDBACK = 2e-5, 1e-4
BASE = META["special"]["[PAD]"]


@pytest.fixture(scope="module")
def expected():
    return np.load(EMU2 / "expected.npz")


def config(n_embeddings: int, vocab_size: int) -> EmuConfig:
    return EmuConfig(
        vision=VisionConfig(56, 7, 48, 3, 12, 411, post_norm=True, final_norm=False),
        cformer=None,
        pooling=PoolingConfig(n_embeddings, 4),
        llama=LlamaConfig(
            vocab_size=vocab_size,
            width=64,
            layers=3,
            heads=4,
            mlp_width=176,
            rope_dtype="float32",
            regression_head=False,
        ),
        tokens=TokenIds.after(BASE, frame=True),
        unet=None,
        vae=None,
    )


def load(cfg: EmuConfig, *files: str) -> Emu:
    tensors = {}
    for file in files:
        (stored,) = tensor_files.open_tensors(EMU2 / file)[0].values()
        tensors |= {key.removeprefix("model."): tensor for key, tensor in stored.items()}
    template = AbstractModel(lambda: EmuModel(cfg, rngs=nnx.Rngs(0)), make_mesh(data=8))
    shapes = {path: leaf.shape for path, leaf in template.shapes.items()}
    params = {}
    for row in tables.model_rows(cfg, shapes):
        shape = row.layer_shape(shapes[row.path])
        released = [tensors[key].read().astype(np.float32) for key in row.keys]
        arrays = [row.transform.from_release(array, shape) for array in released]
        params[row.path] = jnp.asarray(np.stack(arrays) if row.stacked else arrays[0])
    instruct = cfg.llama.vocab_size == META["vocab_chat"]
    tokenizer = Tokenizer.load(EMU2 / "llama_config", instruct=instruct, family="emu2")
    return Emu(template.module(params), tokenizer, batch_size=16)


@pytest.fixture(scope="module")
def base():
    return load(config(16, META["vocab"]), "Emu2_pytorch_model.bf16.bin")


@pytest.fixture(scope="module")
def chat():
    shards = [f"Emu2-Chat/pytorch_model-0000{n}-of-00003.bin" for n in (1, 2, 3)]
    return load(config(64, META["vocab_chat"]), *shards)


def image(number):
    return Image.open(EMU2 / f"preprocess_{number}.png").convert("RGB")


def parts_of(inputs):
    """The recorded inputs as parts; images between [VIDEO] and [/VIDEO] are the frames of one."""
    parts, video = [], None
    for part in inputs:
        part = image(part.removeprefix("picture:")) if part.startswith("picture:") else part
        if part == "[VIDEO]":
            video = []
        elif part == "[/VIDEO]":
            parts, video = [*parts, video], None
        elif video is not None:
            video.append(part)
        else:
            parts.append(part)
    return parts


def filled(text, numbers):
    """A recorded text as parts, with images in place of its placeholders."""
    first, *rest = text.split("[<IMG_PLH>]")
    parts = [first] if first else []
    for number, piece in zip(numbers, rest, strict=True):
        parts += [image(number), *([piece] if piece else [])]
    return parts or [""]


def dialogue(tag):
    case = META["chat"][tag]
    turns = [parts_of(turn) for turn in case["turns"]]
    return converse(turns, style=EMU2_CHAT, grounding=case.get("is_grounding", False))


@pytest.mark.parametrize("tag", META["chat"])
def test_chat_prompts(chat, expected, tag):
    prompt = Prompt.of(dialogue(tag), chat.tokenizer, chat.cfg)
    assert prompt.tokens.tolist() == expected[f"chat/{tag}/ids"][0].tolist()


@pytest.mark.parametrize("tag", META["chat_hub"])
def test_prompts_of_the_hub(chat, expected, tag):
    case, style = META["chat_hub"][tag], chat_format(chat.cfg, "hub")
    spelled = converse([filled(case["content"], [0])], case["system_msg"] or None, style=style)
    prompt = Prompt.of(spelled, chat.tokenizer, chat.cfg)
    assert prompt.tokens.tolist() == expected[f"chat_hub/{tag}/ids"][0].tolist()


def test_frames_have_tokens_and_embeddings_of_their_own(base, expected):
    parts = parts_of(META["video"]["video_still"]["inputs"])
    prompt = Prompt.of(parts, base.tokenizer, base.cfg)
    assert prompt.tokens.tolist() == expected["video_still/ids"][0].tolist()
    assert prompt.frames.tolist() == [False, True, True]
    index = prompt.embedding_index[prompt.embedding_index >= 0]
    assert index.tolist() == [*range(16), *range(16, 20), *range(32, 36)]
    with pytest.raises(UserError, match="gIMG"):
        Prompt.of(["a [gIMG]"], base.tokenizer, base.cfg)


def test_boxes(expected):
    for box, pixels in zip(META["boxes"], expected["box/pictures"], strict=True):
        ours = box_image(tuple(box))
        assert np.array_equal(ours, np.repeat(pixels[..., None], 3, axis=2)), box
    for box in [(5, 5, 5, 9), (448, 0, 460, 9), (9, 9, 3, 20)]:
        with pytest.raises(UserError, match="box"):
            box_image(box)


def test_chat_formats(base):
    with pytest.raises(UserError, match="chat_format 'hubb'"):
        chat_format(base.cfg, "hubb")
    with pytest.raises(UserError, match="leave grounding out"):
        converse(["where?"], style=EMU_CHAT, grounding=True)
    with pytest.raises(UserError, match="instruction-tuned"):
        base.generate_text("where?", grounding=True)


@pytest.mark.parametrize("tag", ["release", "beam5_lp2", "beam5_lp-1_min6"])
def test_text_of_two_documents(base, expected, tag):
    ids, settings = expected[f"generate/{tag}/ids"], META["generate"][tag]["kw"]
    settings = {"min_length" if k == "min_len" else k: v for k, v in settings.items()}
    prompts = [filled(META["documents"][0], [0, 1]), filled(META["documents"][1], [2])]
    ours = base.generate_ids(prompts, **settings)  # the defaults are the release's
    assert ours[:, : ids.shape[1]].tolist() == ids.tolist()
    assert (ours[:, ids.shape[1] :] == base.cfg.tokens.pad).all()


def test_text_after_a_video(base, expected):
    prompt = parts_of(META["video"]["video_still"]["inputs"])
    ids = base.generate_ids(prompt)
    assert ids.tolist() == expected["video_still/release/ids"][0].tolist()


@pytest.mark.parametrize("tag", ["mixed", "grounding"])
def test_answers(chat, expected, tag):
    ids = expected[f"chat/{tag}/beam5_lp2/ids"][0]
    ours = chat.generate_ids(dialogue(tag), max_new_tokens=20, length_penalty=2.0)
    assert ours[: len(ids)].tolist() == ids.tolist()


def test_a_grounded_answer_keeps_its_tokens(chat):
    question = [image(0), "This is an image where two pandas sleep:"]
    text = chat.generate_text(question, grounding=True)
    recorded = META["chat"]["grounding"]["out"]["release"]["text"]
    assert text.split() == recorded.removeprefix("<s>").removesuffix("</s>").split()
    assert "<patch_index_0245>" in text


def test_embedding_regression(base, expected):
    cases = META["gen_image"]
    for tag in ("unequal", "grounded"):
        recorded, numbers = expected[f"gen_image/{tag}"], iter(cases[tag]["pictures"])
        prompts = [
            filled(text, [next(numbers) for _ in range(text.count("[<IMG_PLH>]"))])
            for text in cases[tag]["text"]
        ]
        assert relative_error(base.regress(prompts), recorded) < FEEDBACK, tag
    spelled = grounded("a cat", [("cat", (9, 9, 99, 99), image(0)), ("mat", None, None)])
    assert [part for part in spelled if isinstance(part, str)] == [
        "<grounding>a cat",
        "<phrase>cat</phrase>",
        "<object>",
        "</object>",
        "<phrase>mat</phrase>",
    ]


def test_a_mixed_continuation_regresses_the_same_image(base):
    prompt = [image(0), "a cat sits on a mat."]
    tokens = Prompt.of(prompt, base.tokenizer, base.cfg, append_img=True)
    static = mixed.StaticMixedSettings(
        text_length=8, max_images=1, do_sample=False, may_start_image=True
    )
    batch = pad([tokens], "left", rows=1, length=64, images=1, fill=base.cfg.tokens.pad)
    inputs = base._inputs(batch)
    dynamic = mixed.DynamicMixedSettings(*map(jnp.float32, (8, 1, 0, 1)))

    def run(emu, images, ids, index, valid):
        x = emu.embed(ids, images, index)
        return mixed.complete(emu, x, valid, jnp.array([True]), static, dynamic, None)

    ids, images = nnx.jit(run)(base.model, *inputs)
    assert images.shape == (1, 1, 16, 48)
    assert relative_error(images[0, 0], base.regress(prompt)) < TIGHT
    t = base.cfg.tokens
    assert np.asarray(ids)[0, :17].tolist() == [t.image] * 16 + [t.img_end]
    assert not np.isin(np.asarray(ids)[0, 17:], [t.image, t.frame]).any()


def test_the_losses(base, expected):
    ids, mask = expected["train/ids"], expected["train/mask"]
    t, n = base.cfg.tokens, base.cfg.n_embeddings
    pixels = expected["vit/pixels_nchw"].transpose(0, 2, 3, 1)
    images = np.zeros((2, 2, *pixels.shape[1:]), np.float32)
    images[0], images[1, 0] = pixels[:2], pixels[2]
    here = ids == t.image
    batch = {
        "tokens": ids.astype(np.int32),
        "segment_ids": mask.astype(np.int32),
        "positions": np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape),
        "embedding_index": np.where(here, np.cumsum(here, axis=1) - 1, -1).astype(np.int32),
        "image_scored": np.array([[True, True], [True, False]]),
        "text_loss_mask": np.isin(ids, [t.pad, t.bos, t.image, t.img, t.img_end], invert=True),
    }

    def losses(emu, pixels, scored):
        embeddings = emu.encode_images(pixels)
        own = batch | {"image_scored": scored}
        return sequence_losses(emu, embeddings, own, loss_block=0)

    run = nnx.jit(losses)
    words, regression = run(base.model, images, batch["image_scored"])
    assert relative_error(words, expected["train/llm_loss"]) < TIGHT
    assert relative_error(regression, expected["train/regress_loss"]) < TIGHT
    # The last image of each document alone.
    _, last = run(base.model, images, np.array([[False, True], [True, False]]))
    errors = np.square(expected["train/regress_pred"] - expected["train/regress_target"])
    assert relative_error(last, errors[n:].mean()) < TIGHT

    # The targets pass no gradient: an embedding that nothing follows gets none.
    graphdef, params = nnx.split(base.model)
    embeddings = nnx.merge(graphdef, params).encode_images(jnp.asarray(images))

    @jax.jit
    @jax.grad
    def gradient(embeddings):
        model = nnx.merge(graphdef, params)
        return sequence_losses(model, embeddings, batch, loss_block=0)[1]

    found = np.abs(np.asarray(gradient(embeddings))).max(axis=-1)
    assert found[1, 0, -1] == 0.0 and (found[0, 0] > 0).all()


def test_positions_are_interpolated():
    """In training as from a parent's file, which `test_convert.py` compares with torch."""
    positions = np.random.default_rng(0).normal(size=(1 + 4 * 4, 3)).astype(np.float32)
    for side in (2, 4, 8):
        ours = interpolate_positions(jnp.asarray(positions), side)
        theirs = resize_positions(positions[None], 1 + side**2)[0]
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert np.array_equal(interpolate_positions(jnp.asarray(positions), 4), positions)
