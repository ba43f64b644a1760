"""Samples of a model in training: held-out documents, scores, contact sheets."""

import dataclasses
import shutil

import jax
import numpy as np
import PIL.Image
import pytest
from test_train import MESHES, data_root, small  # noqa: F401
from test_training import TOY, toy  # noqa: F401

from emu_jax.data import digits
from emu_jax.data.config import DataConfig
from emu_jax.data.documents import Document, Image, Text, write_documents
from emu_jax.data.mixture import is_held_out
from emu_jax.errors import UserError
from emu_jax.sharding import make_mesh
from emu_jax.tokenizer import Tokenizer
from emu_jax.train import sheets
from emu_jax.train.config import EvalConfig
from emu_jax.train.evaluation import EvalResult, Evaluation
from emu_jax.train.loop import train
from emu_jax.train.samples import (
    SampleEvaluation,
    choose_documents,
    split_document,
    text_scores,
)
from emu_jax.train.sheets import SheetRow, contact_sheet
from emu_jax.train.step import Trainer

N = 4  # embeddings of an image


def gray(value: int) -> Image:
    return Image(digits.encode_png(np.full((6, 6), value, np.uint8)))


def spelled(parts) -> str:
    """Texts, and images as their gray value."""
    return " ".join(p if isinstance(p, str) else str(p.getpixel((0, 0))[0]) for p in parts)


def split(kind, *parts, paired=False):
    given = [gray(p) if isinstance(p, int) else Text(p) if isinstance(p, str) else p for p in parts]
    found = split_document(kind, Document(tuple(given)), paired=paired)
    return found and (spelled(found.prompt), spelled(found.reference))


def test_documents_are_split_into_prompt_and_reference():
    pair = (1, " a cat ")
    for parts in (pair, pair[::-1]):  # in no inherent order
        assert split("captions", *parts, paired=True) == ("1", "a cat")
        assert split("images", *parts, paired=True) == ("a cat", "1")
    page = ("first", 1, 2, "then", " ", 3, "last")
    assert split("captions", *page) == ("first 1 2", "then")
    assert split("images", *page) == ("first", "1")
    assert split("continuations", *page) == ("first 1 2", "then 3 last")
    assert split("images", 1, "then", 2, 3) == ("1 then", "2")
    # An answer follows its question, whatever stands in it.
    asked = dataclasses.replace(gray(1), scored=False), Text("even?", scored=False)
    assert split("captions", *asked, "no") == ("1 even?", "no")
    assert split("continuations", *asked, "no", 2) == ("1 even?", "no 2")
    assert split("images", *asked, 2, 3) == ("1 even?", "2")
    for kind, *parts in (
        ("captions", "a", "b"),
        ("captions", "a", 1),
        ("captions", *asked, 2),
        ("captions", Text("say a word", scored=False), "no"),
        ("images", 1, "a"),
        ("images", *asked, "no"),
        ("continuations", 1),
        ("continuations", *asked),
        ("continuations",),
    ):
        assert split(kind, *parts) is None, (kind, parts)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Pairs and pages; some cannot be used."""
    root = tmp_path_factory.mktemp("data")
    pairs = [Document((gray(n), Text(f"word {n}"))) for n in range(40)]
    pairs[:4] = [
        Document((gray(0),)),
        Document((Image(b"no image"), Text("word 1"))),
        Document((Text("spells <image> out"), gray(2))),
        Document((gray(3), Text("long " * 500))),  # too long to draw from
    ]
    pages = [Document((gray(n), Text(f"page {n}"), gray(n + 1))) for n in range(100, 104)]
    write_documents(root / "heldout" / "pairs.array_record", pairs)
    write_documents(root / "heldout" / "pages.array_record", pages)
    Tokenizer.train(["word page long"], 300).save(root / "tokenizer")
    return DataConfig(root=str(root), split="heldout", mixture={"pairs": 1.0, "pages": 1.0})


def chosen(kind, cfg, count=5, room=60, tuned=None):
    tokenizer = Tokenizer.load(f"{cfg.root}/tokenizer", instruct=tuned)
    return choose_documents(kind, cfg, tokenizer, count, N, room)


def test_chosen_documents_are_fixed_and_fit(held_out):
    captions = [spelled(d.prompt) for d in chosen("captions", held_out)]
    assert len(set(captions)) == 5
    assert captions == [spelled(d.prompt) for d in chosen("captions", held_out)]
    everything = {spelled(d.prompt) for d in chosen("captions", held_out, count=100)}
    assert everything == {str(n) for n in range(2, 40)}  # the long text is a reference here
    drawn = {spelled(d.prompt) for d in chosen("images", held_out, count=100)}
    assert drawn == {f"word {n}" for n in range(4, 40)}
    pages = {spelled(d.prompt) for d in chosen("continuations", held_out, count=100)}
    assert pages == {str(n) for n in range(100, 104)}
    # Of training data, those that are held out.
    share = dataclasses.replace(held_out, holdout=0.2, held_out=True)
    held = {spelled(d.prompt) for d in chosen("captions", share, count=100)}
    assert held == {str(n) for n in range(2, 40) if is_held_out(n, 0.2)} and 2 < len(held) < 20
    with pytest.raises(UserError, match="no held-out document has a prompt .* within 5 tokens"):
        chosen("captions", held_out, room=5)  # an image takes six, and <s>
    assert len(chosen("captions", held_out, room=7)) == 5
    with pytest.raises(UserError, match="within 7 tokens"):  # a system message comes first
        chosen("captions", held_out, room=7, tuned=True)


def test_texts_are_scored_by_words():
    rows = [
        SheetRow((), ("A cat.",), ("a cat",)),
        SheetRow((), ("a dog", "sits"), ("a cat sits",)),
        SheetRow((), (), ("a cat",)),
        SheetRow((), ("anything",), (PIL.Image.new("RGB", (2, 2)),)),  # nothing to compare with
    ]
    scores = text_scores(rows)
    assert scores == {
        "exact_match": pytest.approx(1 / 3),
        "word_f1": pytest.approx((1 + 2 * 2 / 6 + 0) / 3),
    }
    assert text_scores(rows[3:]) == {}


# --- Models in training --------------------------------------------------------------------------


KINDS = ("continuations", "images", "captions")
SETTINGS = {"max_new_tokens": 6, "num_inference_steps": 2, "scheduler": "ddim"}


def evaluation(kind, trainer, workdir, **changes):
    config = EvalConfig(kind, kind=kind, batches=2, batch_size=2, generation=SETTINGS)
    config = dataclasses.replace(config, **changes)
    SampleEvaluation.check(trainer.cfg, config)
    tokenizer = Tokenizer.load(f"{trainer.cfg.data.root}/tokenizer")
    return SampleEvaluation(trainer.cfg, config, trainer, tokenizer, workdir)


def test_what_cannot_be_generated_is_refused_at_once(data_root, tmp_path):  # noqa: F811
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    cases = (("emu", "images", "unet and no vae"), ("vae", "captions", "visual"))
    for objective, kind, lacks in cases:
        with jax.set_mesh(mesh), pytest.raises(UserError, match=f"generate {kind}.* no {lacks}"):
            evaluation(kind, Trainer(small(objective, data_root), mesh), tmp_path)
    with pytest.raises(UserError, match="unknown generation setting 'guidence_scale'.*guidance"):
        config = EvalConfig("x", kind="images", generation={"guidence_scale": 2.0})
        SampleEvaluation.check(small("decoder", data_root), config)


@pytest.mark.slow
def test_samples_are_the_same_on_every_mesh(data_root, tmp_path):  # noqa: F811
    """They use the averaged weights, and leave the state as it was."""
    cfg = small("decoder", data_root, ema_decay=0.5)
    found, params = [], {}
    for shape, devices in (((1, 1, 1), 1), (MESHES["mixed"], 8)):
        mesh = make_mesh(*shape, devices=jax.devices()[:devices])
        with jax.set_mesh(mesh):
            trainer = Trainer(cfg, mesh)
            state = trainer.init(params and jax.device_put(params, trainer.template.shardings))
            params = jax.tree.map(np.asarray, state.trained | state.frozen)
            for kind in KINDS[: 3 if devices == 1 else 2]:
                samples = evaluation(kind, trainer, tmp_path)
                found.append(samples.run(state, 5, lambda: False))
                assert samples.run(state, 5, lambda: True) is None
            emu = samples._emu(state)
            frozen = state.frozen["visual.pos_embed"]
            if devices == 1:
                ours = emu.model.visual.pos_embed[...]
                assert ours.unsafe_buffer_pointer() == frozen.unsafe_buffer_pointer()
                image, bias = found[1].sheet, "unet.conv_out.bias"
                state.ema[bias] = state.ema[bias] + 1
                brighter = evaluation("images", trainer, tmp_path).run(state, 5, lambda: False)
                assert brighter.sheet != image
            assert not any(a.is_deleted() for a in jax.tree.leaves(state))
    for one, other in zip(found[:2], found[3:], strict=True):
        assert one.metrics == pytest.approx(other.metrics, abs=1e-3)
        assert one.sheet.size == other.sheet.size
        assert np.abs(np.subtract(one.sheet, other.sheet, dtype=int)).max() <= 2
    scores = [set(result.metrics) - {"documents"} for result in found[:3]]
    texts, images = {"exact_match", "word_f1"}, {"image_share", "image_similarity"}
    assert scores[1:] == [images, texts] and texts < scores[0] <= texts | images
    assert found[1].metrics["image_share"] == 1 and found[0].metrics["documents"] == 4


# --- Contact sheets ------------------------------------------------------------------------------


def test_a_sheet_shows_every_part_in_its_column():
    rng = np.random.default_rng(0)
    small = [PIL.Image.fromarray(rng.integers(1, 255, (8, 8, 3), np.uint8)) for _ in range(3)]
    wide = PIL.Image.new("RGB", (600, 200), (200, 30, 30))
    rows = [
        SheetRow([small[0], "one"], [small[1]], [small[2]]),
        SheetRow(["a word " * 60, wide], [], ["b"]),
        SheetRow(["\x00\x07" + "unbroken" * 30], ["b"], ["b"]),
    ]
    sheet = np.asarray(contact_sheet("captions, step 5", rows))
    lefts = []
    for image in small:
        shown = np.repeat(np.repeat(np.asarray(image), 12, 0), 12, 1)
        corners = np.argwhere((sheet == shown[0, 0]).all(-1))
        assert any(np.array_equal(sheet[y : y + 96, x : x + 96], shown) for y, x in corners), (
            "an enlarged image is missing"
        )
        lefts.append(int(corners[:, 1].min()))
    assert lefts == sorted(lefts) and lefts[1] - lefts[0] > 96
    red = np.argwhere((sheet == (200, 30, 30)).all(-1))
    assert np.ptp(red[:, 0]) == 31 and np.ptp(red[:, 1]) == 95  # scaled to fit, not cropped
    # Nothing leaves its column: the margins between columns are blank.
    widest = sheets.CELL_WIDTHS[1]
    assert sheet.shape[1] <= 3 * (widest + 2 * sheets.MARGIN)
    last = sheet[-120 - sheets.MARGIN : -sheets.MARGIN]  # of the unbroken word
    gap = slice(sheets.MARGIN + widest + 4, 3 * sheets.MARGIN + widest - 4)
    assert (last[:, gap] == 255).all() and (last[:, : sheets.MARGIN + widest] < 255).any()
    white = (sheet[sheets.MARGIN * 6 :] == 255).all((0, 2))
    assert white[-sheets.MARGIN // 2 :].all() and white[: sheets.MARGIN // 2].all()


def test_sheets_of_later_steps_are_removed(tmp_path):
    sheet = PIL.Image.new("RGB", (4, 4))
    for step in (100, 20, 3):
        sheets.save_sheet(tmp_path, "captions", step, sheet)
    sheets.save_sheet(tmp_path, "images", 100, sheet)
    sheets.save_sheet(tmp_path, "captions", 20, PIL.Image.new("RGB", (9, 9)))
    (tmp_path / "samples" / "captions" / "notes.png").write_bytes(b"the user's own")
    sheets.remove_later_sheets(tmp_path, 20)
    listed = sheets.list_sheets(tmp_path)
    assert {name: [step for step, _ in files] for name, files in listed.items()} == {
        "captions": [3, 20]
    }
    with PIL.Image.open(listed["captions"][1][1]) as image:
        assert image.size == (9, 9)
    assert (tmp_path / "samples" / "captions" / "notes.png").is_file()


class Drawn(Evaluation):
    """Draws the number of the step, as a brightness."""

    @classmethod
    def check(cls, cfg, config):
        pass

    def run(self, state, step, stop):
        return EvalResult({"step_seen": float(step)}, PIL.Image.new("RGB", (4, 4), (step, 0, 0)))


def test_a_run_keeps_a_sheet_of_each_step_and_a_report(toy, tmp_path):  # noqa: F811
    """Once, also if it resumes from an earlier step."""
    cfg = dataclasses.replace(
        TOY, checkpoint_every=2, eval=(EvalConfig("drawn", every=2, kind="drawn"),), steps=6
    )

    def run(cfg):
        train(cfg, tmp_path, {"drawn": Drawn})
        listed = sheets.list_sheets(tmp_path)["drawn"]
        for step, path in listed:
            with PIL.Image.open(path) as image:
                assert image.getpixel((0, 0)) == (step, 0, 0)
        assert "step 6" in (tmp_path / "report.html").read_text()
        return [step for step, _ in listed]

    assert run(cfg) == [2, 4, 6]
    shutil.rmtree(tmp_path / "6")
    for step in (5, 6, 30):
        sheets.save_sheet(tmp_path, "drawn", step, PIL.Image.new("RGB", (4, 4)))
    assert run(cfg) == [2, 4, 6]
    # TensorBoard has the newest of each step.
    (events,) = (tmp_path / "tensorboard").glob("*")
    assert all(b"drawn/sheet" in path.read_bytes() for path in events.iterdir())
    # Without evaluations there is no report.
    train(dataclasses.replace(cfg, eval=()), tmp_path / "plain")
    assert not (tmp_path / "plain" / "report.html").exists()
