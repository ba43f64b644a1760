"""The benchmarks: files in, prompts, answers, files out, scores, restarts."""

import csv
import dataclasses
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import GOLDEN, UNOPTIMIZED
from eval_data import CAPTIONS, LAYOUTS, draw, write
from flax import nnx
from PIL import Image

from emu_jax import cli, config, integrity
from emu_jax.checkpoint import model_fingerprint
from emu_jax.data.images import load_image
from emu_jax.errors import UserError
from emu_jax.evaluate import fewshot, in_training
from emu_jax.evaluate import run as running
from emu_jax.evaluate.fewshot import FewShot
from emu_jax.evaluate.run import Options, evaluate
from emu_jax.evaluate.scorers import similarity, vqa
from emu_jax.evaluate.scorers.similarity import SimilarityOptions
from emu_jax.evaluate.tasks import TASKS, visdial
from emu_jax.evaluate.tasks.base import (
    Example,
    FidOptions,
    Folder,
    Item,
    clean_caption,
    short_answer,
)
from emu_jax.evaluate.tasks.text_to_image import TextToImage
from emu_jax.generate.api import Emu, load
from emu_jax.models import emu as models
from emu_jax.models.eva_clip import normalize_images
from emu_jax.tokenizer import Tokenizer
from emu_jax.train.config import EvalConfig, TrainConfig

PROMPTS = Path(__file__).parent / "golden" / "eval_prompts.txt"
IMAGE = "[IMG]<image>*32[/IMG]"


def shown(pixels):
    return IMAGE * (len(pixels) if pixels.ndim == 4 else 1)


class Said:
    """Stands in for a model: says what it is told to, and notes what it is asked."""

    def __init__(
        self,
        instruct=True,
        says=lambda prompt, choices: "yes.",
        order=(2, 0, 1, 3),
        family="emu",
    ):
        self.tokenizer = type("", (), {"instruct": instruct, "family": family})
        values = {"vision": type("", (), {"image_size": 4}), "family": family}
        self.cfg = type("", (), values | {"scheduler": config.SchedulerConfig()})
        self.says, self.order = says, list(order)
        self.asked, self.batches = [], []

    def _note(self, prompts, settings):
        spelled = [
            "".join(
                p if isinstance(p, str) else IMAGE * (len(p) if p.ndim == 4 else 1) for p in row
            )
            for row in prompts
        ]
        self.asked += zip(spelled, settings, strict=True)
        self.batches.append(len(prompts))
        return spelled

    def generate_text(self, prompts, *, choices=None, seed, **settings):
        settings |= {"choices": choices} if choices else {}
        return [self.says(text, choices) for text in self._note(prompts, [settings] * len(prompts))]

    def rank(self, prompts, candidates, *, segments):
        self._note(prompts, [{"segments": segments, "candidates": row} for row in candidates])
        return [self.order for _ in prompts]

    def generate_image(self, prompts, *, seed, **settings):
        self._note(prompts, [settings] * len(prompts))
        return [Image.fromarray(np.full((8, 8, 3), each, np.uint8)) for each in seed]

    def embed(self, images):
        return np.stack([p.reshape(-1).astype(np.float32) for p in images])


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Runs a task on its small data with a model that says what it is told to."""

    def call(task, emu, name="result", **options):
        data = layout(task, tmp_path)
        monkeypatch.setattr(running, "load", lambda *args, **settings: emu)
        out = tmp_path / f"{name}.json"
        result = evaluate(tmp_path / "none", task, data, out, Options(**options))
        return dataclasses.asdict(result), out

    return call


def layout(task, tmp_path):
    data = tmp_path / "data" / task
    if not data.exists():
        LAYOUTS[task](data)
    return data


def said_of(answers):
    """Says an answer for each question, the first whose key a prompt holds."""

    def says(prompt, choices):
        if choices:
            return "no." if "dogs" in prompt.split("[USER]")[-1] else "yes."
        return next(answer for key, answer in answers.items() if key in prompt)

    return says


PAINT = {"num_inference_steps": 50, "guidance_scale": 5.0, "scheduler": "pndm"}


# --- Scores, worked by hand ------------------------------------------------------------------


def in_turn(texts):
    """Says the texts one after the other."""
    left = iter(texts)
    return lambda prompt, choices: next(left)


def test_captions(ask):
    # Three as the first of two references has them, one like nothing. CIDEr-D of a caption is
    # 10 times the mean likeness to its references: 5, thrice. All captions have five words, so
    # 15 of 20 words, 12 of 16 pairs, 9 of 12 triples and 6 of 8 quadruples are right.
    right = [text for text, _ in CAPTIONS]
    texts = [
        f"{right[0].upper()}. it is old",
        f"{right[1]}.\n",
        "seven odd zebras eat hay",
        right[3],
    ]
    result, out = ask("coco_caption", Said(says=in_turn(texts)))
    assert json.loads(out.read_text()) == [
        {"image_id": n, "caption": text}
        for n, text in enumerate([right[0], right[1], "seven odd zebras eat hay", right[3]])
    ]
    scores = result["scores"]
    assert scores.pop("CIDEr") == pytest.approx(375, abs=1e-3)
    assert set(scores) == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"}
    assert list(scores.values()) == pytest.approx([75] * 5, abs=1e-3)
    assert result["column"] == "Emu-I" and result["paper"]["Emu-I"] == 117.7


def test_nocaps_by_domain(ask):
    texts = [text for text, _ in CAPTIONS]
    result, out = ask(
        "nocaps", Said(says=in_turn([*texts[:3], "seven odd zebras eat hay", *texts[4:]]))
    )
    cider = {k: v for k, v in result["scores"].items() if "CIDEr" in k}
    assert cider == pytest.approx(
        {
            "CIDEr": 2500 / 6,
            "CIDEr_in-domain": 500,
            "CIDEr_near-domain": 250,
            "CIDEr_out-domain": 500,
        },
        abs=1e-3,
    )
    assert json.loads(out.read_text())[5] == {"image_id": 5, "caption": texts[5]}


def test_flickr30k(ask):
    result, _ = ask("flickr30k", Said(says=in_turn([text for text, _ in CAPTIONS])))
    assert result["scores"]["CIDEr"] == pytest.approx(500, abs=1e-3)


# Of ten people two said orange: leaving one of those out 1 of 3 needed is there, else 2 of 3,
# (2 * 1/3 + 8 * 2/3) / 10 = 0.6. The same for yes.
ANSWERS = {"colour": "It is an orange, mostly.", "dogs": "2.", "raining": '"', "": "yes"}


def test_vqav2(ask):
    answers = ANSWERS | {"raining": "Yes\nno"}
    result, out = ask("vqav2", Said(says=said_of(answers)))
    assert json.loads(out.read_text()) == [
        {"question_id": 0, "answer": "orange"},
        {"question_id": 1, "answer": "2"},
        {"question_id": 1002, "answer": "yes"},
    ]
    assert result["scores"]["accuracy"] == pytest.approx((60 + 100 + 60) / 3)
    assert result["scores"]["accuracy/answer/other"] == pytest.approx(220 / 3)


def test_okvqa_compares_stems(ask):
    answers = {"colour": "oranges", "dogs": "3", "raining": "no"}
    result, out = ask("okvqa", Said(says=said_of(answers)))
    assert json.loads(out.read_text())[0] == {"question_id": 0, "answer": "oranges"}
    assert result["scores"]["accuracy"] == pytest.approx((60 + 0 + 100) / 3)
    assert any("stems" in note for note in result["notes"])


def test_vizwiz_asks_first_whether_there_is_an_answer(ask):
    answers = {"colour": "red", "dogs": "2", "raining": "the yes"}
    emu = Said(says=said_of(answers))
    result, out = ask("vizwiz", emu)
    assert [row["answer"] for row in json.loads(out.read_text())] == ["red", "unanswerable", "yes"]
    assert list(json.loads(out.read_text())[0]) == ["image", "answer"]
    assert result["scores"]["accuracy"] == pytest.approx((100 + 100 + 60) / 3)
    known = [settings for text, settings in emu.asked if "is the answer known?" in text]
    assert known == [{"choices": ("yes.", "no.")}] * 3


def test_visdial(ask):
    # The answer comes second in the first rounds and first in the others. Of the round that
    # people judged, 1 and 0 come first, where 1 and 0.5 could.
    result, out = ask("visdial", Said())
    assert json.loads(out.read_text()) == [
        {"image_id": image, "round_id": number, "ranks": [2, 3, 1, 4]}
        for image in (0, 1)
        for number in (1, 2)
    ]
    assert result["scores"] == pytest.approx(
        {
            "NDCG": 100 / (1 + 0.5 / np.log2(3)),
            "MRR": 75,
            "R@1": 50,
            "R@5": 100,
            "R@10": 100,
            "mean rank": 1.5,
        }
    )


def test_visdial_without_dense_annotations_says_so(ask, tmp_path):
    data = tmp_path / "data" / "visdial"
    LAYOUTS["visdial"](data)
    (data / "visdial_1.0_val_dense_annotations.json").unlink()
    result, _ = ask("visdial", Said())
    assert "NDCG" not in result["scores"]
    (note,) = result["notes"]
    assert "NDCG" in note and "visdial_1.0_val_dense_annotations.json" in note


@pytest.mark.parametrize("task", ["msvdqa", "msrvttqa"])
def test_videos(task, ask):
    emu = Said(says=said_of({"runs": "A cat.", "sing": "man", "is it": "dog"}))
    result, out = ask(task, emu)
    assert [row["answer"] for row in json.loads(out.read_text())] == ["cat", "man", "dog"]
    assert result["scores"]["accuracy"] == pytest.approx(200 / 3)
    assert all(text.count(IMAGE) == 8 for text, _ in emu.asked)


def test_nextqa(ask):
    answers = {"run?": "catch the ball", "dogs": "two", "where": "xyzzy"}
    result, out = ask("nextqa", Said(says=said_of(answers)))
    assert json.loads(out.read_text()) == {
        "100": {"0": "catch the ball"},
        "101": {"1": "two"},
        "102": {"2": "xyzzy"},
    }
    (figure,) = [v for k, v in result["scores"].items() if k in ("WUPS", "exact")]
    assert figure == pytest.approx(200 / 3)


@pytest.fixture
def inception(tmp_path):
    """A network with one feature: the mean of an image, from 0 to 255."""
    torch = pytest.importorskip("torch")

    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.to(torch.float64).mean(dim=(1, 2, 3))[:, None]

    path = tmp_path / "mean.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Mean()).save(path)
    return path


def test_coco_fid(ask, inception, tmp_path):
    # Five drawings of the greys 0 to 4: mean 2, variance 2.5. Real images of 10, 12, ... 18:
    # mean 14, variance 10. (14 - 2)^2 + 2.5 + 10 - 2 sqrt(2.5 * 10) = 146.5.
    for n in range(5):
        image = Image.new("RGB", (8, 8), (10 + 2 * n,) * 3)
        image.save(layout("coco_fid", tmp_path) / "val2014" / f"COCO_val2014_{n:012d}.jpg")
    emu = Said(instruct=False)
    result, out = ask("coco_fid", emu)
    assert result["scores"] is None and "--inception" in result["notes"][0]
    rows = json.loads(out.read_text())
    assert {row["file"] for row in rows} == {f"result.images/{50 + n}.png" for n in range(5)}
    assert {row["caption"] for row in rows} == {text for text, _ in emu.asked}
    assert all(settings == PAINT for _, settings in emu.asked)
    greys = [np.asarray(Image.open(tmp_path / row["file"])).max() for row in rows]
    assert greys == [0, 1, 2, 3, 4]
    for _ in range(2):  # the second time with the statistics that the first one left
        result, out = ask("coco_fid", emu, fid=FidOptions(inception))
        assert result["scores"] == {"FID": pytest.approx(146.5)}
        assert result["notes"][0] == "5 images against 5 real ones"
    assert len(emu.asked) == 5 and len(list(tmp_path.glob("fid-*.npz"))) == 1


def test_text_to_image_writes_what_the_official_scorers_read(ask, tmp_path):
    """Image n has the gray value n: four images of each prompt, in order."""

    def gray(path):
        return np.asarray(Image.open(path))[..., 0]

    emu = Said(instruct=False)
    result, out = ask("geneval", emu, name="geneval")
    assert "Beside the paper" not in out.with_suffix(".html").read_text()  # it has no figure
    assert result["scores"] is None and "evaluate_images.py" in result["notes"][0]
    assert [text for text, _ in emu.asked] == ["2 cats"] * 4 + ["3 cats"] * 4
    folder = tmp_path / "geneval"
    for prompt in range(2):
        metadata = json.loads((folder / f"0000{prompt}" / "metadata.jsonl").read_text())
        assert metadata["prompt"] == f"{prompt + 2} cats" and metadata["tag"] == "counting"
        for copy in range(4):
            image = gray(folder / f"0000{prompt}" / "samples" / f"000{copy}.png")
            assert image.shape == (8, 8) and (image == 4 * prompt + copy).all()

    ask("dpgbench", Said(instruct=False), name="dpg")
    (path,) = (tmp_path / "dpg").iterdir()
    grid = gray(path)
    assert path.name == "partiprompts9.png" and grid.shape == (16, 16)
    assert [grid[y, x] for y in (0, 8) for x in (0, 8)] == [0, 1, 2, 3]

    ask("wise", Said(instruct=False), name="wise")
    assert [path.name for path in (tmp_path / "wise").iterdir()] == ["7.png"]

    # With --limit the last prompt may lack images, and no folder is written for it.
    ask("geneval", Said(instruct=False), name="few", limit=6)
    assert [path.name for path in (tmp_path / "few").iterdir()] == ["00000"]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A tiny CLIP and a tiny DINO with random weights, as folders of transformers."""
    torch = pytest.importorskip("torch")
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPTokenizer,
        ViTConfig,
        ViTImageProcessor,
        ViTModel,
    )

    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2}
    image = {"image_size": 8, "patch_size": 4}
    letters = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters[2:])]
    vocabulary = {token: n for n, token in enumerate(tokens)}
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 16}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    clip = CLIPConfig(
        text_config=sizes | heads | text | special,
        vision_config=sizes | heads | image,
        projection_dim=12,
    )
    CLIPModel(clip).save_pretrained(folder / "clip")
    size = {"size": {"height": 8, "width": 8}, "crop_size": {"height": 8, "width": 8}}
    CLIPImageProcessor(**size).save_pretrained(folder / "clip")
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(
        folder / "clip"
    )
    ViTModel(ViTConfig(**sizes, **heads, **image)).save_pretrained(folder / "dino")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / "dino")
    return folder


def test_a_feature_of_zeros_is_like_no_other():
    zeros, ones = np.zeros((1, 3), np.float32), np.ones((1, 3), np.float32)
    both = similarity._cosine(np.concatenate([zeros, ones]), np.concatenate([ones, ones]))
    np.testing.assert_allclose(both, [0, 1], rtol=1e-6)


@pytest.mark.slow
def test_clip_and_dino_scores(networks, ask, tmp_path):
    """An image is like itself; another network, text or image gives another figure."""
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for n, path in enumerate(paths):
        draw(path, n, (8, 8))
    for score in (similarity.clip_i, similarity.dino):
        network = networks / score.__name__.removesuffix("_i")
        (same,) = score(network, paths, paths).values.values()
        (other,) = score(network, paths, paths[1:] + paths[:1]).values.values()
        assert same == pytest.approx(100, abs=1e-3) and other < 99.999
    texts = ["a cat", "two dogs", "red"]
    (figure,) = similarity.clip_t(networks / "clip", paths, texts).values.values()
    (swapped,) = similarity.clip_t(networks / "clip", paths, texts[::-1]).values.values()
    assert -100 < figure < 100 and figure != pytest.approx(swapped, abs=1e-4)
    options = SimilarityOptions(networks / "clip", networks / "dino")
    result, _ = ask("coco_fid", Said(instruct=False), similarity=options)
    assert set(result["scores"]) == {"CLIP-T", "CLIP-I", "DINO"}
    with pytest.raises(UserError, match="CLIP-T needs CLIP"):
        similarity.clip_t(networks / "dino", paths, texts)


def test_mmvet_gives_the_file_that_is_graded_elsewhere(ask):
    result, out = ask("mmvet", Said(says=lambda *_: "x is -1. Or -5"))
    assert json.loads(out.read_text()) == {"v1_0": "x is -1. Or -5", "v1_1": "x is -1. Or -5"}
    assert result["scores"] is None and "grades" in result["notes"][0]


def test_one_item_without_answers_makes_no_split_secret(ask, tmp_path):
    path = layout("vizwiz", tmp_path) / "Annotations" / "val.json"
    rows = json.loads(path.read_text())
    rows[1]["answers"] = []
    write(path, rows)
    with pytest.raises(UserError, match="question 'VizWiz_val_00000001.jpg' has no answers"):
        ask("vizwiz", Said())


def test_a_split_without_public_answers_has_a_file_and_no_score(ask, tmp_path):
    data = tmp_path / "data" / "vqav2"
    LAYOUTS["vqav2"](data)
    draw(data / "test2015" / "COCO_test2015_000000000007.jpg", 7)
    rows = {"questions": [{"image_id": 7, "question": "Is it red?", "question_id": 70}]}
    write(data / "v2_OpenEnded_mscoco_test-dev2015_questions.json", rows)
    result, out = ask("vqav2", Said(), split="test-dev")
    assert json.loads(out.read_text()) == [{"question_id": 70, "answer": "yes"}]
    assert result["scores"] is None and "submit" in result["notes"][0]


def test_laviss_files_of_coco_give_the_same(ask, tmp_path):
    data = layout("coco_caption", tmp_path)
    images = json.loads((data / "dataset_coco.json").read_text())["images"]
    (data / "dataset_coco.json").unlink()
    rows: dict[str, list] = {"test": [], "train": []}
    for row in images:
        name, said = f"val2014/{row['filename']}", [s["raw"] for s in row["sentences"]]
        if row["split"] == "test":
            rows["test"].append({"image": name, "caption": said})
        else:
            rows["train"] += [{"image": name, "caption": text, "image_id": "0"} for text in said]
    for split, found in rows.items():
        write(data / "annotations" / f"coco_karpathy_{split}.json", found)
    emu = Said(instruct=False, says=in_turn([text for text, _ in CAPTIONS]))
    result, out = ask("coco_caption", emu, examples="text", shots=3)
    assert [row["image_id"] for row in json.loads(out.read_text())] == [0, 1, 2, 3]
    assert result["scores"]["CIDEr"] == pytest.approx(500, abs=1e-3)
    trained = [text for text, _ in (*CAPTIONS[4:], *CAPTIONS[:2])]
    assert sum(f"shows {text}." in emu.asked[0][0] for text in trained) == 3


def as_text(value):
    """The same annotations with every number of an image or question as text."""
    if isinstance(value, dict):
        ids = ("image_id", "question_id", "id", "round_id")
        return {k: str(v) if k in ids and k != "round_id" else as_text(v) for k, v in value.items()}
    return [as_text(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "task, changed",
    [
        ("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json"),
        ("vqav2", "v2_mscoco_val2014_annotations.json"),
        ("visdial", "visdial_1.0_val.json"),
        ("visdial", "visdial_1.0_val_dense_annotations.json"),
        ("nocaps", "nocaps_val_4500_captions.json"),
    ],
)
def test_numbers_of_images_may_be_text(task, changed, ask, tmp_path):
    says = in_turn([text for text, _ in CAPTIONS] * 2) if task == "nocaps" else said_of(ANSWERS)
    first, _ = ask(task, Said(says=says), "first")
    path = layout(task, tmp_path) / changed
    write(path, as_text(json.loads(path.read_text())))
    says = in_turn([text for text, _ in CAPTIONS] * 2) if task == "nocaps" else said_of(ANSWERS)
    second, out = ask(task, Said(says=says), "second")
    assert second["scores"] == first["scores"] and second["items"] == first["items"]


def test_only_the_last_round_of_a_test_dialogue_is_ranked(ask, tmp_path):
    data = layout("visdial", tmp_path)
    draw(data / "VisualDialog_test2018" / f"VisualDialog_test2018_{9:012d}.jpg", 9)
    dialog = [{"question": 0, "answer": 1}, {"question": 1, "answer_options": [0, 1, 2, 3]}]
    content = {
        "questions": ["is it a cat", "is it red"],
        "answers": ["yes", "no", "maybe", "so"],
        "dialogs": [{"image_id": 9, "caption": "a dog", "dialog": dialog}],
    }
    write(data / "visdial_1.0_test.json", {"split": "test", "data": content})
    emu = Said()
    result, out = ask("visdial", emu, split="test")
    assert json.loads(out.read_text()) == [{"image_id": 9, "round_id": 2, "ranks": [2, 3, 1, 4]}]
    assert "is it a cat? [ASSISTANT]: no.</s>" in emu.asked[0][0]
    assert result["scores"] is None and "submit" in result["notes"][0]


def test_a_video_that_is_not_there_is_named(ask, tmp_path):
    (layout("msvdqa", tmp_path) / "video" / "name2.mp4").unlink()
    with pytest.raises(UserError, match="has no video name2"):
        ask("msvdqa", Said())


def test_answers_are_cleaned_as_the_release_does():
    assert clean_caption("A Dog. On\na mat") == "a dog"
    assert clean_caption("A dog.") == "a dog" and clean_caption("") == ""
    assert short_answer('It\'s the red, or "so". ') == "red"
    assert short_answer("it is a an apple.") == "apple" and short_answer(".") == ""
    assert short_answer("1.5 metres. long") == "1.5 metres"


# --- Prompts ---------------------------------------------------------------------------------

SYSTEM = (
    "You will be presented with an image: [IMG]ImageContent[/IMG]. You will be able to see the "
    "image after I provide it to you. Please answer my questions based on the given image."
)
ONE_WORD = (
    "based on the content of the image and common sense, please provide an accurate answer "
    "consisting of only one word or phrase."
)


def settings(new, least, penalty):
    return {"num_beams": 5, "max_new_tokens": new, "min_length": least, "length_penalty": penalty}


@pytest.mark.parametrize(
    "task, prompt, decoding",
    [
        (
            "coco_caption",
            f"{SYSTEM} [USER]: {IMAGE} please provide an accurate and concise description of the "
            "given image. [ASSISTANT]: the image depicts a photo of",
            settings(20, 8, -1.0),
        ),
        (
            "vqav2",
            f"{SYSTEM} [USER]: {IMAGE} {ONE_WORD} Is it {{raining}}? [ASSISTANT]: the answer is:",
            settings(20, 1, -1.0),
        ),
        (
            "vizwiz",
            f"{SYSTEM} [USER]: {IMAGE} {ONE_WORD} Is it {{raining}}?, is the answer known? "
            "[ASSISTANT]:",
            {"choices": ("yes.", "no.")},
        ),
        (
            "mmvet",
            f"{SYSTEM} [USER]: {IMAGE}What is x in the equation? [ASSISTANT]:",
            settings(128, 1, 1.0),
        ),
        (
            "visdial",
            f"{SYSTEM} [USER]: {IMAGE}</s> [USER]: is it a cat? [ASSISTANT]: yes.</s> "
            "[USER]: what colour is it? [ASSISTANT]:",
            {"segments": 4, "candidates": ["no", "brown", "it is red", "yes"]},
        ),
    ],
)
def test_prompts_are_the_releases(task, prompt, decoding, ask):
    emu = Said(says=lambda *_: "yes.")
    ask(task, emu)
    assert prompt in [text for text, _ in emu.asked]
    assert dict(emu.asked)[prompt] == decoding


def test_the_pretrained_model_reads_its_own_caption(ask):
    emu = Said(instruct=False, says=in_turn(["A cat. It sits"] * 3 + ["yes"] * 3))
    ask("vqav2", emu)
    asked = [text for text, _ in emu.asked]
    assert asked[0] == f"{IMAGE} describing the image in detail. the image shows"
    assert "a picture of a cat. based on the picture, Is it {raining}? short answer:" in asked


def test_prompts_are_the_pinned_ones(tmp_path, monkeypatch):
    """The prompt of each task's last item, in all modes, with and without examples."""
    without = ("mmvet", "coco_fid", "flickr30k", "geneval", "dpgbench", "wise")
    sections = []
    for task in TASKS.values():
        data = layout(task.name, tmp_path)
        for mode, examples in itertools.product(task.modes, ("none", "text", "random")):
            if examples != "none" and task.name in without:
                continue
            emu = Said(
                mode != "pretrain",
                says=lambda _, choices: "yes." if choices else "a cat.",
                family="emu2" if mode == "chat" else "emu",
            )
            monkeypatch.setattr(running, "load", lambda *args, emu=emu, **settings: emu)
            out = tmp_path / f"{task.name}-{mode}-{examples}.json"
            support = None
            if task.name == "nocaps" and examples != "none":  # it has none of its own
                support = layout("coco_caption", tmp_path)
            options = Options(examples=examples, support=support)
            running.CheckpointEvaluation(
                tmp_path / "none", task, Folder(data), out, options
            ).answer()
            last = [emu.asked[sum(emu.batches[: n + 1]) - 1] for n in range(len(emu.batches))]
            lines = [f"{json.dumps(decoding)}\n{text}" for text, decoding in last]
            sections.append("\n".join([f"=== {task.name}, {mode}, examples: {examples}", *lines]))
    found = "\n\n".join(sections) + "\n"
    if "EMU_JAX_RECORD" in os.environ:  # to change them on purpose
        PROMPTS.write_text(found)
    assert found == PROMPTS.read_text()


# --- Examples --------------------------------------------------------------------------------


def path_features(paths):
    """Features that a file's name says: its angle in degrees."""
    angles = np.radians([float(path.stem) for path in paths])
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * 7


def here(name):
    pass


ANGLES = [Example(Path(f"{n}.png"), f"at {n}", "where?") for n in (80, 10, 45, 170, 20)]


def test_the_nearest_images_precede_the_nearest_last(tmp_path):
    few = FewShot("rices", ANGLES, 3, seed=0)
    few.index(tmp_path / "cache", path_features, 0, 1, here)
    (shown,) = few([Item("a", Path("16.png"))], path_features)
    assert [e.answer for e in shown.examples] == ["at 45", "at 10", "at 20"] and shown.show_images
    (shown,) = few([Item("a", Path("20.png"))], path_features)  # it is no example for itself
    assert [e.answer for e in shown.examples] == ["at 80", "at 45", "at 10"]


def test_features_are_kept_and_shared_out(tmp_path, monkeypatch):
    monkeypatch.setattr(fewshot, "_CHUNK", 2)
    asked = []

    def features(paths):
        asked.append([path.stem for path in paths])
        return path_features(paths)

    # A second process does its share; there the chunks of the first are missing still.
    with pytest.raises(FileNotFoundError):
        FewShot("rices", ANGLES, 2, 0).index(tmp_path, features, 1, 2, here)
    assert asked == [["45", "170"]]
    (tmp_path / "00000-cut-short.tmp").write_bytes(b"what a killed process leaves")
    for _ in range(2):
        few = FewShot("rices", ANGLES, 2, 0)
        few.index(tmp_path, features, 0, 1, here)
    assert asked[1:] == [["80", "10"], ["20"]]
    (shown,) = few([Item("a", Path("170.5.png"))], path_features)
    assert [e.answer for e in shown.examples] == ["at 80", "at 170"]


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"no array"])
def test_damaged_features_are_named(content, tmp_path):
    few = FewShot("rices", ANGLES, 2, 0)
    few.index(tmp_path, path_features, 0, 1, here)
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"{file.name} is damaged: delete it"):
        few.index(tmp_path, path_features, 0, 1, here)


@pytest.mark.parametrize("dtype, precision", [("float32", "highest"), ("bfloat16", "default")])
def test_all_features_are_of_one_precision(dtype, precision, ask):
    class Noting(Said):
        def embed(self, images):
            seen.append(jax.config.jax_default_matmul_precision)  # pyright: ignore
            return super().embed(images)

    seen: list[str] = []
    ask("coco_caption", Noting(says=lambda *_: "a cat"), examples="rices", dtype=dtype)
    assert len(seen) == 2 and set(seen) == {precision}  # of the support set, and of the batch


def test_random_examples_are_not_the_papers_shots(ask):
    result, _ = ask("coco_caption", Said(says=lambda *_: "a cat"), examples="random")
    assert result["column"] == "Emu-I, 2 random examples"


def test_random_examples_are_an_items_own():
    few = FewShot("random", ANGLES, 2, seed=3)
    items = [Item(str(n), Path("10.png")) for n in range(20)]
    together = few(items, path_features)
    assert [few([item], path_features)[0] for item in items] == together
    assert len({shown.examples for shown in together}) > 5
    assert all(e.media.name != "10.png" for shown in together for e in shown.examples)
    assert few(items, path_features) != FewShot("random", ANGLES, 2, 4)(items, path_features)


def test_text_examples_are_the_same_for_all():
    few = FewShot("text", ANGLES, 2, seed=3)
    first, second = few([Item("a", Path("1.png")), Item("b", Path("2.png"))], path_features)
    assert first == second and len(first.examples) == 2 and not first.show_images


def test_training_rows_without_answers_are_no_examples(ask, tmp_path):
    captions = layout("coco_caption", tmp_path) / "dataset_coco.json"
    content = json.loads(captions.read_text())
    content["images"][-1]["sentences"] = []
    write(captions, content)
    assert len(TASKS["coco_caption"].examples(Folder(captions.parent))) == 3
    questions = layout("vizwiz", tmp_path) / "Annotations" / "train.json"
    rows = json.loads(questions.read_text())
    rows[0]["answers"] = []
    write(questions, rows)
    found = TASKS["vizwiz"].examples(Folder(layout("vizwiz", tmp_path)))
    assert [example.answer for example in found] == ["unanswerable", "no"]


def test_too_few_examples_are_an_error(ask):
    with pytest.raises(UserError, match="--shots 4 needs 5 images"):
        ask("coco_caption", Said(), examples="random", shots=4)


# --- Restarts and processes --------------------------------------------------------------------


def echo(prompt, choices):
    """An answer that only the prompt decides."""
    return f"answer {zlib.crc32(prompt.encode())}"


def files(out):
    return {
        name: out.with_suffix(name).read_bytes()
        for name in (".json", ".predictions.jsonl", ".scores.json")
    }


@pytest.fixture
def whole(ask):
    """Files of an uninterrupted run."""
    _, out = ask("vqav2", Said(says=echo), "out", batch_size=1)
    found = files(out)
    for path in out.parent.glob("out*"):
        path.unlink()
    return found


def test_an_interrupted_run_goes_on(ask, whole, tmp_path):
    calls = []

    def interrupted(prompt, choices):
        calls.append(prompt)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return echo(prompt, choices)

    with pytest.raises(KeyboardInterrupt):
        ask("vqav2", Said(says=interrupted), "out", batch_size=1)
    predictions = tmp_path / "out.predictions.jsonl"
    assert predictions.read_bytes().count(b"\n") == 3  # the settings and two answers
    assert not (tmp_path / "out.json").exists()
    with predictions.open("ab") as file:
        file.write(b'{"id": "1002", "answer": "cut sh')
    emu = Said(says=echo)
    _, out = ask("vqav2", emu, "out", batch_size=1)
    assert len(emu.asked) == 1 and files(out) == whole
    ask("vqav2", emu, "out", batch_size=1)  # nothing is left to ask
    assert len(emu.asked) == 1 and files(out) == whole


def test_other_settings_are_not_gone_on_with(ask, tmp_path):
    ask("vqav2", Said(says=echo), "out")
    with pytest.raises(UserError, match="predictions with examples none, now it is text: delete"):
        ask("vqav2", Said(says=echo), "out", examples="text")
    with pytest.raises(UserError, match="predictions with mode instruct"):
        ask("vqav2", Said(instruct=False, says=echo), "out")
    question = layout("vqav2", tmp_path) / "v2_OpenEnded_mscoco_val2014_questions.json"
    question.write_text(question.read_text().replace("colour", "color"))
    with pytest.raises(UserError, match="predictions with asked"):
        ask("vqav2", Said(says=echo), "out")


@pytest.mark.parametrize("change", ["checkpoint", "weights", "options", "history", "wording"])
def test_what_else_predictions_depend_on(change, ask, tmp_path, monkeypatch):
    weights = tmp_path / "none" / "Emu.pt"
    weights.parent.mkdir()
    weights.write_bytes(b"one model")
    _, out = ask("visdial", Said(), "out")
    data = layout("visdial", tmp_path)
    path, checkpoint = data / "visdial_1.0_val.json", tmp_path / "none"
    content = json.loads(path.read_text())
    if change == "checkpoint":  # another of the same name
        checkpoint = tmp_path / "elsewhere" / "none"
    elif change == "weights":  # another model at the same path and step
        weights.write_bytes(b"two model")
    elif change == "options":
        content["data"]["dialogs"][0]["dialog"][0]["answer_options"].reverse()
    elif change == "history":
        content["data"]["dialogs"][0]["dialog"][0]["answer"] += 1
    else:
        monkeypatch.setattr(visdial, "IMAGE_SYSTEM", "Look.")
    write(path, content)
    match = {
        "checkpoint": "predictions with checkpoint .*elsewhere",
        "weights": "predictions of another model .*: delete it",
    }.get(change, "with asked")
    with pytest.raises(UserError, match=match):
        evaluate(checkpoint, "visdial", data, out, Options())


def test_a_fingerprint_is_of_what_a_model_computes_with(tmp_path):
    run, base = tmp_path / "run", tmp_path / "base"
    for folder, step in ((run, "12"), (base, "7")):
        for name in (
            "config.json",
            "tokenizer/tokenizer.json",
            f"{step}/params/d/aa",
            f"{step}/ema/d/bb",
            f"{step}/optimizer/d/cc",
            "9/params/d/dd",
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"{folder.name} {name}")
    (run / "9").rename(run / "11")  # an older step, though its name sorts last
    (run / "base.json").write_text('{"vision": "../base"}')
    first = model_fingerprint(run)
    copied = Path(shutil.copytree(run, tmp_path / "elsewhere" / "run"))
    shutil.copytree(base, tmp_path / "elsewhere" / "base")
    assert model_fingerprint(copied) == first
    counts = {
        run / "12/params/d/aa": True,
        run / "12/ema/d/bb": True,
        run / "config.json": True,
        run / "tokenizer/tokenizer.json": True,
        base / "9/params/d/dd": True,
        run / "11/params/d/dd": False,
        run / "12/optimizer/d/cc": False,
        base / "7/params/d/aa": False,
    }
    for path, is_used in counts.items():
        content = path.read_text()
        path.write_text(content.replace(path.name[-1], "x"))  # as long as before
        assert (model_fingerprint(run) != first) == is_used, path
        path.write_text(content)
    assert model_fingerprint(run) == first != model_fingerprint(tmp_path / "nothing")

    # Checksums stand for the arrays: no host reads them again to know which they are.
    manifest, chunk = run / "12/params/manifest", run / "12/params/d/aa"
    manifest.write_text("a")
    integrity.seal(run / "12")
    sealed, content = model_fingerprint(run), chunk.read_text()
    chunk.unlink()
    assert model_fingerprint(run) == sealed
    chunk.write_text(content)
    for change, is_used in ((manifest, True), (run / "12/optimizer/manifest", False)):
        change.write_text("b")
        integrity.seal(run / "12")
        assert (model_fingerprint(run) != sealed) == is_used, change
        manifest.write_text("a")
    (run / "12/checksums.json").write_text("{")
    assert model_fingerprint(run) != model_fingerprint(tmp_path / "nothing")

    release = tmp_path / "release"
    (release / "unet").mkdir(parents=True)
    (release / "unet" / "weights.safetensors").write_text("a")
    first = model_fingerprint(release)
    (release / "results.json").write_text("{}")  # of an evaluation that writes beside it
    assert model_fingerprint(release) == first
    (release / "unet" / "weights.safetensors").write_text("b")
    assert model_fingerprint(release) != first


@pytest.mark.parametrize("change", ["weights", "dtype", "nothing"])
def test_features_are_of_one_model(change, ask, tmp_path):
    weights = tmp_path / "none" / "Emu.pt"
    weights.parent.mkdir()
    weights.write_bytes(b"one model")
    ask("vqav2", Said(), "first", examples="rices")
    if change == "weights":
        weights.write_bytes(b"two model")
    dtype = "float32" if change == "dtype" else "bfloat16"
    ask("vqav2", Said(), "second", examples="rices", dtype=dtype)
    assert len(list(tmp_path.glob("rices-*"))) == (1 if change == "nothing" else 2)


@pytest.mark.parametrize(
    "number, line, message",
    [
        (1, "[]", "line 1 is damaged: delete the file"),
        (1, '{"settings": 3}', "line 1 is damaged: delete the file"),
        (2, '{"idx": 1}', "line 2 is damaged: delete the line"),
        (3, "[]", "line 3 is damaged: delete the line"),
        (3, "{", "line 3 is damaged: delete the line"),
    ],
)
def test_damaged_predictions_are_named(number, line, message, ask, tmp_path):
    ask("vqav2", Said(says=echo), "out")
    path = tmp_path / "out.predictions.jsonl"
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=f"out.predictions.jsonl, {message}"):
        ask("vqav2", Said(says=echo), "out")


def test_processes_share_the_work(ask, whole, tmp_path, monkeypatch):
    data, out = layout("vqav2", tmp_path), tmp_path / "out.json"
    monkeypatch.setattr(running, "barrier", here)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    emus, runs = [], []
    for process in (1, 0):
        emus.append(Said(says=echo))
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        monkeypatch.setattr(running, "load", lambda *args, **settings: emus[-1])
        run = running.CheckpointEvaluation(
            tmp_path / "none", TASKS["vqav2"], Folder(data), out, Options(batch_size=1)
        )
        monkeypatch.setattr(run.store, "read", dict)  # as if both had begun at once
        runs.append(run)
        run.answer()
    assert [len(emu.asked) for emu in emus] == [1, 2]
    assert (tmp_path / "out.predictions.1.jsonl").is_file()
    monkeypatch.delattr(runs[1].store, "read")
    runs[1].finish()
    assert files(out) == whole
    assert not (tmp_path / "out.predictions.1.jsonl").exists()


def test_predictions_that_one_process_cannot_see_are_missed(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "barrier", here)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="1 of 3 items have no prediction, .* where all 2 proc"):
        ask("vqav2", Said(says=echo), "out", batch_size=1)


def test_where_the_first_process_fails_the_others_say_so(ask, tmp_path, monkeypatch):
    _, out = ask("vqav2", Said(says=echo), "out")
    stale = out.with_suffix(".scores.json")
    assert stale.is_file()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(running, "barrier", here)
    runs = []
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        monkeypatch.setattr(running, "load", lambda *args, **settings: Said(says=echo))
        runs.append(
            running.CheckpointEvaluation(
                tmp_path / "none", TASKS["vqav2"], Folder(layout("vqav2", tmp_path)), out, Options()
            )
        )
    met = []
    monkeypatch.setattr(running, "barrier", lambda name: met.append((name, stale.exists())))

    def fails(*args):
        raise UserError("java failed")

    monkeypatch.setattr(type(TASKS["vqav2"]), "score", fails)
    with pytest.raises(UserError, match="java failed"):
        runs[0].finish()
    assert met == [("the results are written", False)]
    with pytest.raises(UserError, match="the first process failed to write the results"):
        runs[1].finish()


# --- During training ---------------------------------------------------------------------------


def test_a_task_is_scored_during_training(ask, tmp_path, monkeypatch):
    """Its figures are those of `emu-jax eval` on the same items."""
    told = [CAPTIONS[0][0], CAPTIONS[2][1], CAPTIONS[2][0]]
    answers = itertools.cycle(told)
    emu = Said(instruct=False, says=lambda prompt, choices: next(answers))
    result, _ = ask("coco_caption", emu, limit=3, batch_size=2)
    monkeypatch.setattr(in_training, "TrainedEmu", lambda *args, **settings: lambda state: emu)
    data, cfg = layout("coco_caption", tmp_path), TrainConfig()

    def config(**changes):
        chosen = EvalConfig("coco", kind="coco_caption", root=str(data), batches=1, batch_size=3)
        chosen = dataclasses.replace(chosen, **changes)
        in_training.EVALUATION_KINDS[chosen.kind].check(cfg, chosen)
        return chosen

    evaluation = in_training.EVALUATION_KINDS["coco_caption"](
        cfg, config(), None, emu.tokenizer, tmp_path
    )
    asked = len(emu.asked)
    found = evaluation.run(None, 7, lambda: False)
    assert emu.asked[asked:] == emu.asked[:asked]
    assert found.metrics == pytest.approx(result["scores"]) and found.metrics["CIDEr"] > 0
    assert min(found.sheet.size) > 300
    assert evaluation.run(None, 7, lambda: True) is None

    for changes, message in (
        ({"root": ""}, "set root to the folder of coco_caption"),
        ({"root": str(tmp_path / "none")}, "no folder"),
        ({"split": "trial"}, "coco_caption has none"),
        ({"kind": "coco_fid"}, "too many to generate during training"),
    ):
        with pytest.raises(UserError, match=message):
            config(**changes)
    layout("mmvet", tmp_path)
    hidden = config(kind="mmvet", root=str(tmp_path / "data" / "mmvet"))
    with pytest.raises(UserError, match="mmvet"):  # judged elsewhere
        in_training.EVALUATION_KINDS["mmvet"](cfg, hidden, None, Said().tokenizer, tmp_path)


# --- What may go wrong -------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_an_image_that_cannot_be_read_ends_the_run(damage, ask, tmp_path):
    image_path = layout("vqav2", tmp_path) / "val2014" / "COCO_val2014_000000000001.jpg"
    content = image_path.read_bytes()
    image_path.unlink()
    if damage == "cut short":
        image_path.write_bytes(content[:200])
    with pytest.raises(UserError, match="cannot read the image .*COCO_val2014_000000000001.jpg"):
        ask("vqav2", Said(says=echo))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: (d / "v2_mscoco_val2014_annotations.json").unlink(), "has no v2_mscoco_val2014"),
        (lambda d: (d / "v2_mscoco_val2014_annotations.json").write_text("{"), "is damaged"),
        (
            lambda d: write(d / "v2_mscoco_val2014_annotations.json", {"rows": []}),
            "not laid out as the official file: no key 'annotations'",
        ),
        (
            lambda d: write(d / "v2_mscoco_val2014_annotations.json", {"annotations": []}),
            "no key '0 in ",
        ),
        (lambda d: shutil.rmtree(d / "val2014"), "has no folder val2014"),
    ],
)
def test_files_that_are_not_the_official_ones_are_named(change, message, ask, tmp_path):
    change(layout("vqav2", tmp_path))
    with pytest.raises(UserError, match=message):
        ask("vqav2", Said(says=echo))


@pytest.mark.parametrize(
    "task, file, content",
    [
        (
            "vqav2",
            "v2_OpenEnded_mscoco_val2014_questions.json",
            '{"questions": [{"image_id": "7", "question": "why", "question_id": 0}]}',
        ),
        (
            "visdial",
            "visdial_1.0_val.json",
            '{"data": {"questions": [], "answers": [], "dialogs": [{"image_id": "7"}]}}',
        ),
        ("coco_caption", "coco_karpathy_test.json", '[{"image": "a.jpg", "caption": "a cat"}]'),
        ("nextqa", "test.csv", "video,qid,question,answer,type\n1,2,caf\xe9,no,DB\n"),
        ("nextqa", "map_vid_vidorID.json", "[]"),
        ("msvdqa", "youtube_mapping.txt", "caf\xe9 vid1"),
    ],
)
def test_values_of_another_kind_are_named_with_their_file(task, file, content, ask, tmp_path):
    (layout(task, tmp_path) / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=f"{file} is not laid out as the official file"):
        ask(task, Said(says=echo))


@pytest.mark.parametrize(
    "task, options, message",
    [
        ("vqav2", {"shots": 2}, "--shots 2 needs --examples"),
        ("vqav2", {"examples": "text", "shots": 0}, "at least 1"),
        ("vqav2", {"limit": 0}, "--limit cannot be 0"),
        ("vqav2", {"hosts_per_model": 0}, "--hosts-per-model cannot be 0"),
        ("vqav2", {"hosts_per_model": 2}, "--hosts-per-model 2 does not divide the 1 processes"),
        ("vqav2", {"seed": -1}, "^--seed -1: at least 0"),
        ("vqav2", {"support": Path("a")}, "^--support a needs --examples"),
        ("coco_fid", {"fid": {"resize": "clean"}}, "--resize need --inception FILE"),
        ("coco_fid", {"fid": {"reference": Path("a")}}, "--resize need --inception FILE"),
        (
            "coco_fid",
            {"fid": {"inception": Path("typo.pt")}},
            "^--inception typo.pt: there is no such file",
        ),
        ("vqav2", {"split": "tests"}, "--split tests: vqav2 has none; did you mean 'test'"),
        ("vqav2", {"mode": "pretrain"}, "the checkpoint is instruction-tuned"),
        ("vqav2", {"mode": "chat"}, "the checkpoint is instruction-tuned"),
        ("coco_fid", {}, "coco_fid is a task for the pretrained model"),
        ("mmvet", {"examples": "text"}, "mmvet is evaluated without examples"),
        ("nocaps", {"examples": "text"}, "nocaps has no training split and .*: give --support"),
        ("vqav2", {"examples": "text", "support": Path("typo")}, "^there is no folder typo$"),
    ],
)
def test_options_that_mean_nothing(task, options, message, ask):
    with pytest.raises(UserError, match=message):
        if "fid" in options:
            options = options | {"fid": FidOptions(**options["fid"])}
        ask(task, Said(), **options)


def test_the_command(ask, tmp_path, monkeypatch, capsys):
    data = layout("vqav2", tmp_path)
    monkeypatch.setattr(running, "load", lambda *args, **settings: Said(says=lambda *_: "yes"))
    words = ["eval", "--checkpoint", str(tmp_path), "--data", str(data), "--json"]
    out = tmp_path / "new" / "vqa.json"
    assert cli.main([*words, "--task", "vqav2", "--out", str(out), "--limit", "2"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["items"] == 2 and result["scores"]["accuracy"] == 0
    assert json.loads(out.with_suffix(".scores.json").read_text()) == result
    assert cli.main([*words, "--task", "vqa2", "--out", str(out)]) == 2
    assert "unknown task 'vqa2'; did you mean 'vqav2'" in capsys.readouterr().err
    assert cli.main([*words, "--task", "vqav2", "--out", str(tmp_path / "a.txt")]) == 2
    assert "name it so" in capsys.readouterr().err


def test_the_page_shows_scores_beside_the_papers(ask):
    _, out = ask("vqav2", Said(says=said_of(ANSWERS)))
    page = out.with_suffix(".html").read_text()
    assert (
        "<b>53.33</b>" in page and "<tr class=same><th scope=row>paper</th><td>Emu-I</td>" in page
    )
    assert "Beside the paper" in page and "57.20" in page and page.count("data:image/jpeg") == 3
    assert "Is it {raining}?" in page and "no; yes" in page and "orange <i>60.0</i>" in page
    assert "<script" not in page


# --- Real models, real processes ---------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """A random model of few parameters."""
    words = Tokenizer.train(["the image shows red cats. based on the picture, yes no"] * 9, 320)
    base = words.base_size
    cfg = config.EmuConfig(
        tokens=config.TokenIds.after(base),
        vision=config.VisionConfig(
            image_size=8, patch_size=4, width=24, layers=1, head_width=8, mlp_width=40, clip_width=8
        ),
        cformer=config.CFormerConfig(
            n_causal=3, width=16, layers=1, heads=2, head_width=8, mlp_width=24
        ),
        llama=config.LlamaConfig(
            vocab_size=base + 4,
            vocab_multiple=8,
            width=48,
            layers=1,
            heads=3,
            mlp_width=56,
            max_positions=512,
        ),
        unet=None,
        vae=None,
    )
    model = models.EmuModel(cfg, rngs=nnx.Rngs(3))
    head = model.llama.lm_head.kernel
    head[...] = head[...] * 3  # probabilities that are far from equal
    return Emu(model, words, batch_size=20)


def test_answers_are_those_of_the_public_api(small, ask, tmp_path):
    """Each prompt alone, spelled anew from what the predictions say was asked."""
    result, out = ask("coco_caption", small, examples="rices", limit=3, batch_size=4)
    assert result["column"] == "Emu 2-shot"
    lines = out.with_suffix(".predictions.jsonl").read_text().splitlines()[1:]
    for row in map(json.loads, lines):
        parts = re.split("<(COCO.*?)>", row["asked"]["caption"])
        assert len(parts) == 7  # three images between texts
        prompt = [
            tmp_path / "data" / "coco_caption" / "val2014" / part if n % 2 else part
            for n, part in enumerate(parts)
        ]
        assert small.generate_text(prompt, **settings(20, 8, -1.0)) == row["said"]["caption"]


def test_rankings_are_those_of_the_public_api(small, ask, tmp_path):
    _, out = ask("visdial", small, examples="text", limit=1)
    row = json.loads(out.with_suffix(".predictions.jsonl").read_text().splitlines()[1])
    order = small.rank(
        row["asked"]["ranking"], ["yes", "no", "it is red", "i can't tell"], segments=4
    )
    assert row["said"]["ranking"] == order
    assert [row["answer"][i] for i in order] == [1, 2, 3, 4]


def test_features_do_not_depend_on_their_batch(small):
    images = list(np.random.default_rng(0).integers(0, 256, (25, 9, 11, 3), np.uint8))
    together = small.embed(images)
    assert together.shape == (25, 24)
    alone = np.concatenate([small.embed([p]) for p in images[19:22]])
    np.testing.assert_allclose(together[19:22], alone, rtol=1e-5, atol=1e-6)
    ready = np.stack([load_image(Image.fromarray(p), 8) for p in images[:2]])
    pixels = normalize_images(ready)
    wanted = small.model.visual(pixels).mean(1)
    np.testing.assert_allclose(together[:2], wanted, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The golden release's models by kind, as run directories."""
    pytest.importorskip("torch")
    from emu_jax.convert.convert import convert

    folder = tmp_path_factory.mktemp("checkpoints")
    convert(GOLDEN, folder / "pretrain")
    convert(GOLDEN / "Emu-instruct.pt", folder / "instruct", tokenizer=GOLDEN / "tokenizer")
    return {kind: folder / kind for kind in ("pretrain", "instruct")}


def people(answer):
    """One annotator of ten agrees with the model: 1/3 without another one, 0 without that one."""
    return [{"answer": a, "answer_confidence": "yes"} for a in [answer, *"qrstuvwxz"]]


def agree(task, data, rows):
    """Rewrites the annotations of what a model said, so that its score can be worked by hand;
    returns that."""

    def edit(name, change):
        path = data / name
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    words = "qed qid qua"  # that no caption has
    if task in ("coco_caption", "flickr30k"):

        def change(value):
            said = {row["image_id"]: row["caption"] for row in rows}
            for image in value["images"]:
                if image["split"] == "test":
                    number = image.get("cocoid", image["imgid"])
                    image["sentences"] = [{"raw": said[number]}, {"raw": words}]

        edit(f"dataset_{task.removesuffix('_caption')}.json", change)
        return {"ROUGE-L": 100, "BLEU-1": 100, "BLEU-4": 100}
    if task == "nocaps":

        def change(value):
            value["annotations"] = rows + [{"image_id": n, "caption": words} for n in range(6)]

        edit("nocaps_val_4500_captions.json", change)
        return {"ROUGE-L": 100, "BLEU-1": 100, "BLEU-4": 100}
    if task == "vqav2":

        def change(value):
            said = {row["question_id"]: row["answer"] for row in rows}
            for row in value["annotations"]:
                row["answers"] = people(said[row["question_id"]])

        edit("v2_mscoco_val2014_annotations.json", change)
        return {"accuracy": 30}
    if task == "okvqa":
        # Answers that all agree on are compared as they are, with what has been normalised.
        stem = vqa._porter()

        def change(value):
            said = {row["question_id"]: row["answer"] for row in rows}
            for row in value["annotations"]:
                answer = vqa._plain_words(stem(vqa._unpunctuated(said[row["question_id"]])))
                row["answers"] = [{"answer": answer}] * 10
            value["annotations"][0]["answers"] = [{"answer": "xyzzy"}] * 10

        edit("mscoco_val2014_annotations.json", change)
        return {"accuracy": 200 / 3}
    if task == "vizwiz":

        def change(value):
            for row, said in zip(value, rows, strict=True):
                row["answers"] = people(vqa.normalize(said["answer"]))

        edit("Annotations/val.json", change)
        return {"accuracy": 30}
    if task == "visdial":

        def change(value):
            left = iter(rows)
            for dialog in value["data"]["dialogs"]:
                for turn in dialog["dialog"]:
                    turn["gt_index"] = next(left)["ranks"].index(2)  # the second best is right

        edit("visdial_1.0_val.json", change)
        best = next(r for r in rows if (r["image_id"], r["round_id"]) == (0, 2))["ranks"].index(1)
        relevance = [0.0, 0.0, 0.0, 0.0]
        relevance[best] = 1.0
        write(
            data / "visdial_1.0_val_dense_annotations.json",
            [{"image_id": 0, "round_id": 2, "gt_relevance": relevance}],
        )
        return {"MRR": 50, "R@1": 0, "R@5": 100, "mean rank": 2, "NDCG": 100}
    if task == "nextqa":
        lines = [["video", "frame_count", "width", "height", "question", "answer", "qid", "type"]]
        for n, question in enumerate(["why did the boy run", "how many dogs are there"]):
            said = rows[str(100 + n)][str(n)]
            lines.append([100 + n, 12, 32, 32, question, [said, "xyzzy"][n], n, "DC"])
        lines.append([102, 12, 32, 32, "where is this", rows["102"]["2"], 2, "DB"])
        with (data / "test.csv").open("w", newline="") as file:
            csv.writer(file).writerows(lines)
        return {"WUPS" if wordnet() else "exact": 200 / 3}

    def change(value):
        said = {row["question_id"]: row["answer"] for row in rows}
        for row in value[1:]:
            row["answer"] = said[row["id"]]
        value[0]["answer"] = "xyzzy"

    edit("test_qa.json", change)
    return {"accuracy": 200 / 3}


def wordnet():
    from nltk.corpus import wordnet

    try:
        return bool(wordnet.synsets("dog"))
    except LookupError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pretrain", "instruct"])
@pytest.mark.parametrize("task", TASKS)
def test_the_golden_models_score_is_the_one_worked_by_hand(
    task, mode, checkpoints, inception, tmp_path
):
    """The golden models are random; what they say becomes what people said."""
    if mode not in TASKS[task].modes:
        pytest.skip("there are no prompts for it")
    data, out = layout(task, tmp_path), tmp_path / "out.json"
    options = Options(dtype="float32", fid=FidOptions(inception))
    result = dataclasses.asdict(evaluate(checkpoints[mode], task, data, out, options))
    assert result["settings"]["mode"] == mode and out.with_suffix(".html").is_file()
    said = out.read_bytes()
    if task == "mmvet":
        assert set(json.loads(said)) == {"v1_0", "v1_1"}
        return
    if isinstance(TASKS[task], TextToImage):
        assert list((tmp_path / "out").iterdir())
        return
    if task == "coco_fid":
        drawn, real = (
            np.array([np.asarray(Image.open(p)).mean() for p in sorted(folder.iterdir())])
            for folder in (tmp_path / "out.images", data / "val2014")
        )
        spread = drawn.var(ddof=1) + real.var(ddof=1) - 2 * drawn.std(ddof=1) * real.std(ddof=1)
        wanted = (drawn.mean() - real.mean()) ** 2 + spread
        assert result["scores"]["FID"] == pytest.approx(wanted, rel=1e-6)
        return
    wanted = agree(task, data, json.loads(said))
    result = dataclasses.asdict(evaluate(checkpoints[mode], task, data, out, options))
    assert out.read_bytes() == said
    assert {k: result["scores"][k] for k in wanted} == pytest.approx(wanted, abs=1e-3)


@pytest.mark.slow
def test_captions_are_those_of_the_releases_prompt(checkpoints, tmp_path):
    """By the public API, one image at a time."""
    data, out = layout("coco_caption", tmp_path), tmp_path / "out.json"
    evaluate(checkpoints["instruct"], "coco_caption", data, out, Options(dtype="float32"))
    emu = load(checkpoints["instruct"])
    for row in json.loads(out.read_text()):
        image_path = data / "val2014" / f"COCO_val2014_{row['image_id']:012d}.jpg"
        text = emu.generate_text(
            [
                f"{SYSTEM} [USER]: ",
                image_path,
                " please provide an accurate and concise description "
                "of the given image. [ASSISTANT]: the image depicts a photo of",
            ],
            **settings(20, 8, -1.0),
        )
        assert row["caption"] == text.split("\n")[0].split(". ")[0].removesuffix(".").lower()


@pytest.mark.slow
def test_rices_finds_like_images(checkpoints, tmp_path):
    """Test image n has the colours of training image n + 4 in no case, but one copied in
    under another name is its own nearest."""
    data = layout("coco_caption", tmp_path)
    folder = data / "val2014"
    shutil.copy(folder / f"COCO_val2014_{2:012d}.jpg", folder / f"COCO_val2014_{5:012d}.jpg")
    out = tmp_path / "out.json"
    options = Options(dtype="float32", examples="rices", shots=2)
    evaluate(checkpoints["pretrain"], "coco_caption", data, out, options)
    lines = out.with_suffix(".predictions.jsonl").read_text().splitlines()[1:]
    rows = [json.loads(line) for line in lines]
    asked = {row["id"]: row["asked"]["caption"] for row in rows}
    nearest = asked["2"].split("<COCO_val2014_")[2]  # the one before the question's own
    assert nearest.startswith(f"{5:012d}.jpg>") and CAPTIONS[5][0] in nearest
    assert len(list(tmp_path.glob("rices-*/*.npy"))) == 1


class Command:
    """`emu-jax eval` on some processes of some CPU devices each."""

    def __init__(self, count, checkpoint, data, out, *more, devices=2):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_NUM_CPU_DEVICES": str(devices),
            "XLA_FLAGS": UNOPTIMIZED,
        }
        words = ["--checkpoint", checkpoint, "--task", "coco_caption", "--data", data, "--out", out]
        words += ["--batch-size", "2", "--dtype", "float32", *more]
        self.logs = [out.with_name(f"{out.stem}.{n}.log") for n in range(count)]
        self.processes = []
        for n, log in enumerate(self.logs):
            with log.open("w") as file:
                process = subprocess.Popen(
                    [sys.executable, "-m", "emu_jax.cli", "eval", *map(str, words)],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment | {"JAX_PROCESS_ID": str(n)},
                )
            self.processes.append(process)

    def said(self):
        return "\n".join(log.read_text() for log in self.logs)

    def finish(self):
        try:
            for process in self.processes:
                assert process.wait(timeout=500) == 0, self.said()
        finally:
            self.kill()

    def kill(self):
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def job(checkpoints, tmp_path_factory):
    """(checkpoint, data, what one uninterrupted process leaves)."""
    folder = tmp_path_factory.mktemp("job")
    LAYOUTS["coco_caption"](folder / "data", test=12)
    out = folder / "one" / "out.json"
    out.parent.mkdir()
    Command(1, checkpoints["pretrain"], folder / "data", out).finish()
    assert len(json.loads(out.read_text())) == 12
    return checkpoints["pretrain"], folder / "data", files(out)


def results(found):
    """Without the path that `.scores.json` names."""
    scores = json.loads(found[".scores.json"])
    return found | {".scores.json": {k: v for k, v in scores.items() if k != "result"}}


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_killed_and_started_again_it_ends_the_same(count, job, tmp_path):
    checkpoint, data, whole = job
    out = tmp_path / "out.json"
    first = Command(count, checkpoint, data, out)
    try:
        parts = [tmp_path / f"out.predictions{n}.jsonl" for n in ("", ".1")][:count]
        for _ in range(25000):
            if all(p.exists() and p.read_bytes().count(b"\n") >= 3 for p in parts):
                break
            assert all(p.poll() is None for p in first.processes), first.said()
            time.sleep(0.02)
    finally:
        first.kill()
    assert not out.exists(), "it was through before it was killed"
    answered = sum(p.read_bytes().count(b"\n") - 1 for p in parts)
    assert 2 <= answered < 12
    with parts[-1].open("ab") as file:
        file.write(b'{"id": "3", "answ')
    again = Command(3 - count, checkpoint, data, out)  # another number of processes
    again.finish()
    assert "of 12 items were answered before" in again.said()
    assert results(files(out)) == results(whole)
    assert sorted(p.name for p in tmp_path.glob("out.pred*")) == ["out.predictions.jsonl"]


@pytest.mark.slow
def test_two_hosts_hold_one_model_and_answer_as_one_host_does(job, tmp_path):
    """With examples, whose features both compute; the rows of a batch lie on both."""
    checkpoint, data, _ = job
    more = ("--examples", "rices", "--shots", "1", "--limit", "8", "--batch-size", "8")
    shares = []
    for count, *words in ((1,), (2, "--hosts-per-model", "2")):
        out = tmp_path / str(count) / "out.json"
        out.parent.mkdir()
        Command(count, checkpoint, data, out, *more, *words, devices=8 // count).finish()
        shares.append(results(files(out)))
        assert [p.name for p in out.parent.glob("out.pred*")] == ["out.predictions.jsonl"]
    assert shares[0] == shares[1]
