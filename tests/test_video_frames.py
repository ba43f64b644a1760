"""Frames of videos in training: told from still images where a model does so, and nowhere else."""

import dataclasses
import gzip
import io
import json
import logging

import jax
import msgpack
import numpy as np
import pytest
from conftest import relative_error
from PIL import Image as PILImage
from test_emu2_generate import EMU2, META, TIGHT, base, chat, expected, image  # noqa: F401
from test_samples import gray
from test_sources import tar, video

from emu_jax.data import Batches, DataConfig, Document, Image, Text
from emu_jax.data import batches as building
from emu_jax.data.build.build import BuildConfig, build, embedded
from emu_jax.data.build.clean import CleanConfig
from emu_jax.data.documents import DocumentFiles, write_documents
from emu_jax.data.known_lengths import KnownLengths, lengths_path, save_lengths
from emu_jax.data.lengths import TokenLengths, part_lengths
from emu_jax.data.packing import (
    FRAME_PART,
    IMAGE_PART,
    VIDEO_PART,
    PartRange,
    pick,
    truncate,
    window,
)
from emu_jax.data.simulate import SimulatedLengths, load_distribution, simulate
from emu_jax.data.sources import SourceConfig, entries, open_source
from emu_jax.data.sources import spans as spans_module
from emu_jax.data.sources.dialogues import COMPREHENSIVE_SYSTEM, Dialogue, Medium, Turn, _document
from emu_jax.data.sources.index import Joined, NotIndexed, without_indexing
from emu_jax.data.sources.spans import Spans, compact_spans
from emu_jax.errors import UserError
from emu_jax.models.eva_clip import normalize_images
from emu_jax.tokenizer import Tokenizer
from emu_jax.train.config import TrainConfig
from emu_jax.train.objectives import (
    EmuObjective,
    frames_of,
    hidden_states,
    sequence_losses,
    target_masks,
)
from emu_jax.train.samples import split_document

P, V, F = IMAGE_PART, VIDEO_PART, FRAME_PART


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(EMU2 / "llama_config", instruct=True, family="emu2")


def recorded(number):
    """A recorded image as an encoded image."""
    file = io.BytesIO()
    image(number).save(file, "PNG")
    return file.getvalue()


def images_of(medium, scored):
    """The images of a medium whose name lists recorded images."""
    shown = [recorded(int(number)) for number in medium.name.split()]
    if medium.video:
        return Image.video([(None, data) for data in shown], scored=scored)
    return [Image(data, scored=scored) for data in shown]


def said(inputs):
    """Recorded inputs as texts and media."""
    parts, frames = [], None
    for part in inputs:
        number = part.removeprefix("picture:")
        if part == "[VIDEO]":
            frames = []
        elif part == "[/VIDEO]":
            parts, frames = [*parts, Medium(" ".join(frames), video=True)], None
        elif frames is not None:
            frames.append(number)
        else:
            parts.append(part if part == number else Medium(number))
    return parts


def first_batch(folder, documents, tokenizer, paired=False, **settings):
    """The first batch of documents, one of them in a row; None: those that were written last."""
    path = folder / "x.array_record"
    if documents is not None:
        write_documents(path, documents)
    cfg = DataConfig(
        sources=(SourceConfig("x", "records", (str(path),), paired=paired),),
        image_size=56,
        block_documents=1,
        prefetch=0,
        **{"batch_size": 1, "row_tokens": 512, "row_images": 4} | settings,
    )
    with Batches(cfg, tokenizer, "rows") as batches:
        return next(batches)


def check_states(emu, batch, ids, hidden):
    """A row begins with recorded ids, and the model has the recorded states there."""
    length = len(ids)
    assert batch["tokens"][0, :length].tolist() == ids.tolist()
    pixels = normalize_images(batch["images"], np.float32)
    images = emu.model.encode_images(pixels, frames=frames_of(batch))
    states, _ = hidden_states(emu.model, images, batch)
    assert relative_error(states[:, :length], hidden) < TIGHT


VIDEO_CHATS = [tag for tag, case in META["chat"].items() if "[VIDEO]" in str(case["turns"])]


@pytest.mark.parametrize("tag", VIDEO_CHATS)
def test_a_dialogue_is_trained_as_the_release_reads_it(chat, expected, tmp_path, tag):  # noqa: F811
    """The ids of its prompt and the states there are those of the released code. Only the answers
    are learned."""
    case = META["chat"][tag]
    asked = [said(turn) for turn in case["turns"]]
    last = [] if case.get("is_grounding") else ["a cat"]
    turns = [Turn(a, b) for a, b in zip(asked[::2], [*asked[1::2], last], strict=True)]
    dialogue = Dialogue(turns, None, None, [])
    document = _document(dialogue, images_of, COMPREHENSIVE_SYSTEM)
    batch = first_batch(tmp_path, [document], chat.tokenizer, n_causal=64, n_frame=4)
    check_states(chat, batch, expected[f"chat/{tag}/ids"][0], expected[f"chat/{tag}/hidden"])
    masks = target_masks(chat.model, batch)
    learned = batch["tokens"][0, 1:][np.asarray(masks["text"])[0, :-1]].tolist()
    answers = [turn.answer for turn in turns]
    ids = [chat.tokenizer.encode_plain(text) for (text,) in answers]
    assert learned == [i for each in ids for i in (*each, chat.tokenizer.eos)]
    assert not np.any(masks["regression"])


def test_only_still_images_are_regressed(base, expected, tmp_path):  # noqa: F811
    case = META["video"]["video_still"]
    parts = []
    for part in said(case["inputs"]):
        parts += images_of(part, True) if isinstance(part, Medium) else [Text(part)]
    document = Document(tuple(parts))
    batch = first_batch(tmp_path, [document], base.tokenizer, n_causal=16, n_frame=4)
    check_states(base, batch, expected["video_still/ids"][0], expected["video_still/hidden"])
    assert batch["image_frames"].tolist() == [[False, True, True, False]]
    assert batch["image_scored"].tolist() == [[True, False, False, False]]
    regressed = np.flatnonzero(np.asarray(target_masks(base.model, batch)["regression"]))
    assert regressed.tolist() == list(range(1, 17))  # behind <s>: [IMG] and all but one <image>
    data = DataConfig(n_causal=16, n_frame=4, image_size=56)
    objective = EmuObjective(TrainConfig(model=base.cfg, data=data, dtype="float32"))
    images = base.model.encode_images(
        normalize_images(batch["images"], np.float32), frames=batch["image_frames"]
    )
    losses = sequence_losses(base.model, images, batch, loss_block=512)
    key, rows = jax.random.key(0), np.ones(1, bool)
    metrics = objective.loss(base.model, batch, key)[1]
    batch["text_bytes"] = np.zeros_like(batch["tokens"])
    sums = objective.held_out(base.model, batch, rows, key)
    for name, loss in zip(("text", "regression"), losses, strict=True):
        np.testing.assert_allclose(metrics[f"{name}_loss"], loss, rtol=1e-6)
        mean = sums[f"{name}_loss"].sum() / sums[f"{name}_targets"].sum()
        np.testing.assert_allclose(mean, loss, rtol=1e-6)
    words = [base.tokenizer.encode_plain(p.text) for p in document.parts if isinstance(p, Text)]
    learned = batch["tokens"][0, batch["text_loss_mask"][0]].tolist()
    assert learned == [*words[0], *words[1], base.tokenizer.eos]


def test_frames_are_still_images_to_other_models(tmp_path, tokenizer):
    """A document with frames gives the batches of one without the mark; with `learn_img` too."""
    plain = (gray(1), Text("a cat"), gray(2), gray(3))
    marked = (*plain[:2], *Image.video([(0.0, part.data) for part in plain[2:]]))
    one, other = (
        first_batch(tmp_path, [Document(parts)], tokenizer, n_causal=4, learn_img=True)
        for parts in (plain, marked)
    )
    assert one.keys() == other.keys() and "image_frames" not in one
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)
    record = Document(plain).to_bytes()
    assert Document.from_bytes(record) == Document(plain)
    assert Document.from_bytes(Document(marked).to_bytes()) == Document(marked)
    versions = [msgpack.unpackb(Document(parts).to_bytes())["version"] for parts in (plain, marked)]
    assert versions == [1, 2]  # earlier versions refuse the second, rather than skip it as damaged
    assert len(Document((gray(1),)).parts[0].to_list()) == 2  # as in earlier versions


def test_rows_hold_what_was_planned(tmp_path, tokenizer):
    """Documents of stills, videos and texts, packed, windowed, picked and cut: a row has as many
    tokens as were planned, and [VIDEO] precedes each video."""
    rng = np.random.default_rng(0)

    def random_document():
        parts = []
        for _ in range(rng.integers(1, 6)):
            kind, count = rng.integers(3), int(rng.integers(1, 5))
            parts += [
                [gray(1)],
                Image.video([(None, gray(2).data)] * count),
                [Text("a cat sits " * count)],
            ][kind]
        return Document(tuple(parts))

    documents = [random_document() for _ in range(120)]
    path = tmp_path / "x.array_record"
    write_documents(path, documents)
    records = SourceConfig("x", "records", (str(path),))
    settings = ({}, {"window_tokens": 30, "window_images": 4}, {"picked_images": 3})
    for more in settings:
        cfg = DataConfig(
            sources=(dataclasses.replace(records, **more),),
            batch_size=8,
            row_tokens=48,
            row_images=6,
            n_causal=6,
            n_frame=2,
            image_size=6,
            block_documents=40,
            prefetch=0,
        )
        videos = 0
        with Batches(cfg, tokenizer, "rows") as batches:
            for _ in range(6):
                batch = next(batches)
                videos += check_rows(batch, tokenizer, cfg)
            assert not batches.statistics()["damaged"] and videos > 9
            assert batches.statistics()["tokens"] == sum_tokens(cfg, tokenizer, 6)


def sum_tokens(cfg, tokenizer, count):
    with Batches(cfg, tokenizer, "rows") as batches:
        return sum(int((next(batches)["segment_ids"] > 0).sum()) for _ in range(count))


def check_rows(batch, tokenizer, cfg):
    """Checks each image of a batch against its tokens; returns the number of videos."""
    for row, tokens in enumerate(batch["tokens"]):
        starts = np.flatnonzero(tokens == tokenizer.img)
        valid = batch["image_valid"][row]
        assert len(starts) == valid.sum()
        frames = batch["image_frames"][row, valid]
        for number, (start, framed) in enumerate(zip(starts.tolist(), frames, strict=True)):
            n, token = (2, tokenizer.frame) if framed else (6, tokenizer.image)
            inside = slice(start + 1, start + 1 + n)
            assert tokens[inside].tolist() == [token] * n
            assert tokens[inside.stop] == tokenizer.img_end
            index = batch["embedding_index"][row, inside]
            assert index.tolist() == [number * cfg.n_causal + k for k in range(n)]
            before = tokens[start - 1]
            if framed and before != tokenizer.video:  # a further frame
                assert before == tokenizer.img_end and frames[number - 1]
    return int((batch["tokens"] == tokenizer.video).sum())


def test_a_video_without_its_beginning_is_dropped():
    outline = [PartRange(n, size) for n, size in enumerate([V, F, F, 3, V, F, P])]
    sizes = {"n_causal": 4, "n_frame": 2}  # 5 4 4 3 5 4 6 tokens
    for seed in range(60):
        rng = np.random.default_rng(seed)
        for kept in (window(outline, rng, tokens=17, images=9, **sizes), pick(outline, rng, 3)):
            seen = {part.index for part in kept}
            for part in kept:
                assert part.size != F or part.index - 1 in seen
    for seed in range(60):  # frames that are dropped take no place of others
        rng = np.random.default_rng(seed)
        kept = window(outline, rng, tokens=22, images=2, **sizes)
        fits = window(outline, np.random.default_rng(seed), tokens=22, images=9, **sizes)
        assert [p for p in kept if p.size < 0] == [p for p in fits if p.size < 0][:2]
        for count in (1, 2, 3, 5, 6, 9):
            kept = pick(outline, rng, count)
            assert sum(part.size < 0 for part in kept) == min(count, 6)
    assert truncate([V, F, 3], tokens=11, images=9, **sizes) == [V, F, 2]
    assert truncate([V, F, 3], tokens=8, images=9, **sizes) == [V]
    assert truncate([P, V], tokens=11, images=9, **sizes) == [P, V]
    assert truncate([P, V], tokens=10, images=9, **sizes) == [P]


def test_the_decoder_learns_still_images_alone(tmp_path, tokenizer):
    """Frames are context. A document without a still image is left out, a source without one
    refused."""
    frames = Image.video([(None, gray(n).data) for n in (10, 20)])
    mixed = Document((*frames, Text("a cat"), gray(30), gray(40)))
    path = tmp_path / "x.array_record"
    cfg = DataConfig(
        sources=(SourceConfig("x", "records", (str(path),)),),
        batch_size=4,
        row_tokens=64,
        row_images=6,
        n_causal=6,
        n_frame=2,
        image_size=6,
        target_size=8,
        prefetch=0,
    )
    write_documents(path, [Document((*frames, Text("alone"))), mixed])
    for autoencode in (0.0, 1.0):
        with Batches(dataclasses.replace(cfg, autoencode=autoencode), tokenizer, "contexts") as b:
            targets = [row for _ in range(4) for row in next(b)["target"]]
            assert {int(np.median(target)) for target in targets} == {30, 40}
    with Batches(dataclasses.replace(cfg, drop_condition=0.0), tokenizer, "contexts") as b:
        assert next(b)["image_frames"][:, :2].all()
    write_documents(path, [Document((*frames, Text("alone")))])
    with pytest.raises(UserError, match="has no document that 'contexts' can use"):
        Batches(cfg, tokenizer, "contexts")
    Batches(dataclasses.replace(cfg, n_frame=0), tokenizer, "contexts").close()


def test_videos_are_simulated(tmp_path):
    """Planning takes frames for what they are to the model."""
    (tmp_path / "v.json").write_text(json.dumps({"outlines": [[V, F, F, 5], [P, 7]]}))
    distribution = load_distribution(str(tmp_path / "v.json"))
    for frames, sizes in ((True, [V, F, F, 5]), (False, [P, P, P, 5])):
        lengths = SimulatedLengths(distribution, 20, frames)
        rows = [lengths[n] for n in range(20)]
        assert sizes in rows and [P, 7] in rows
        totals = lengths.totals_of(np.arange(20)).T.tolist()
        for row, total in zip(rows, totals, strict=True):
            videos = 3 * (V in row)
            assert total == [row[-1], len(row) - 1, 0, videos // 3, videos]
    cfg = DataConfig(batch_size=8, row_tokens=64, row_images=8, n_causal=16, n_frame=2)
    plain = dataclasses.replace(cfg, n_frame=0)
    both = [simulate(c, [(distribution, 1.0)], 1000, hosts=1, steps=5) for c in (cfg, plain)]
    assert both[0].image_fill > 1.3 * both[1].image_fill  # a frame takes few tokens
    for outline in ([F, 3], [V, 3, F], [P, F], [-2]):
        (tmp_path / "x.json").write_text(json.dumps({"outlines": [outline]}))
        with pytest.raises(UserError, match="x.json is not a distribution of lengths"):
            load_distribution(str(tmp_path / "x.json"))


def test_counts_of_earlier_versions_are_kept(tmp_path, tokenizer, caplog):
    """Models that do not tell frames share the arrays of earlier versions. Others count again,
    and say so; those of a source without videos are used by both."""
    (tmp_path / "v.mp4").write_bytes(video(20))
    (tmp_path / "v.jsonl").write_text(json.dumps({"video": "v.mp4", "text": "a cat sits"}))
    videos = open_source(SourceConfig("v", "videos", (str(tmp_path / "v.jsonl"),), frames=3))
    words = len(tokenizer.encode_plain("a cat sits"))
    folder = tmp_path / "cache"
    plain = TokenLengths(videos, tokenizer, folder)
    assert plain.parts.name.startswith("outlines-3-") and plain[0] == [P, P, P, words]
    assert plain.totals_of(np.array([0])).T.tolist() == [[words, 3, 0, 0, 0]]

    def files():
        return {p: p.read_bytes() for p in sorted(folder.rglob("*-3-*/*")) if p.is_file()}

    before = files()
    assert before
    caplog.set_level(logging.WARNING)
    told = TokenLengths(videos, tokenizer, folder, frames=True)
    assert "does not mark video frames: counting again" in caplog.text
    assert told[0] == [V, F, F, words] and told.totals() == plain.totals()
    assert told.totals_of(np.array([0])).T.tolist() == [[words, 3, 0, 1, 3]]
    caplog.clear()
    assert TokenLengths(videos, tokenizer, folder, frames=True)[0] == told[0]
    assert files() == before and not caplog.text
    stills = Stills()
    for frames in (False, True):
        assert TokenLengths(stills, tokenizer, folder, frames=frames).parts.name.startswith(
            "outlines-3-"
        )
    assert not caplog.text and Stills.read_count == 1


def test_tars_of_images_have_no_videos(tmp_path, monkeypatch):
    """Nor have they if an earlier version indexed them, which did not count them; so their tokens
    are not counted again."""

    def opened(name, files, **settings):
        tar(tmp_path / f"{name}.tar", files)
        return open_source(SourceConfig(name, "webdataset", (str(tmp_path / f"{name}.tar"),)))

    still = {"a.jpg": gray(1).data, "a.txt": b"one"}
    clip = {"b.mp4": video(20), "b.txt": b"two"}
    both = {"c.jpg": gray(1).data, "c.mp4": clip["b.mp4"], "c.txt": b"the image is read"}
    wide = {"d.txt": b"x" * 600, **{f"{n}.cls": bytes(40_000) for n in range(3)}, "d.mp4": b"x"}
    for name, files, videos in (
        ("stills", still | both, False),
        ("clips", still | clip, True),
        ("wide", still | wide, True),
    ):
        source = opened(name, files)
        assert source.videos == videos, name
        del source.videos
        source._stills = 0  # as in an earlier index
        assert source.videos == videos, name
        again = open_source(SourceConfig(name, "webdataset", (str(tmp_path / f"{name}.tar"),)))
        again._stills = 0
        with monkeypatch.context() as patch:
            patch.setattr(Spans, "any_with", None)  # another process has scanned it
            assert again.videos == videos, name
    monkeypatch.setattr(Spans, "any_with", None)  # counted by the index
    source = opened("more", still | both)
    assert not source.videos and source.unused().used["documents"] == 0


def test_dialogues_about_images_have_no_videos(tmp_path, tokenizer, monkeypatch):
    """Their tokens are counted once, for models that tell frames and for those that do not."""
    about_images = {"image": "v.png", "q": "which video? video", "a": "\u00e9"}
    lines = {
        "image": (json.dumps(about_images), False),
        "video": (json.dumps({"video_id": "v", "q": "what?", "a": "it"}), True),
        "part": ('{"messages": [{"role": "user", "content": [{"type": "video"}]}]}', True),
        "escaped": (r'{"vid\u0065o": "v.mp4", "q": "what?", "a": "it"}', True),
    }
    monkeypatch.setattr(entries, "_CHUNK", 16)  # the key lies across two of them

    def dialogues(name):
        return open_source(SourceConfig(name, "dialogues", (str(tmp_path / name),)))

    for name, (line, videos) in lines.items():
        plain, packed = tmp_path / f"{name}.jsonl", tmp_path / f"{name}-2.jsonl.gz"
        plain.write_text("\n" * 12 + line)
        packed.write_bytes(gzip.compress(line.encode()))
        for path in (plain, packed):
            assert dialogues(path.name).videos == videos, path
            with monkeypatch.context() as patch:
                patch.setattr(entries.storage, "read_part", None)
                assert dialogues(path.name).videos == videos  # another process has read it
    plain, told = (
        TokenLengths(dialogues("image.jsonl"), tokenizer, tmp_path / "cache", frames=frames)
        for frames in (False, True)
    )
    assert plain.parts.name == told.parts.name
    (tmp_path / "new.jsonl").write_text(lines["image"][0])
    with without_indexing():
        with pytest.raises(NotIndexed):
            dialogues("new.jsonl")
    new = dialogues("new.jsonl")
    with without_indexing():
        assert not new.videos  # looked up, and not kept


def test_samples_of_many_folders_are_looked_up_together(monkeypatch):
    spans = np.zeros((7, 5, 2), np.int64)
    spans[:, 0, 1] = 9  # images
    whole = Spans(compact_spans(spans, np.zeros(7, int)), 5)
    assert not whole.any_with(1, (0, 4))
    spans[6] = spans[6][[1, 0, 2, 3, 4]]  # a video
    arrays = compact_spans(spans, np.zeros(7, int))
    folders = [{"layout": arrays["layout"][:3]}, {"layout": arrays["layout"][3:]}]
    joined = Joined(folders.__getitem__, "layout", [0, 3, 7])
    for first in range(8):
        for stop in range(8):
            np.testing.assert_array_equal(joined[first:stop], arrays["layout"][first:stop])
    monkeypatch.setattr(spans_module, "_CHUNK", 2)
    assert Spans(arrays | {"layout": joined}, 5).any_with(1, (0, 4))


def test_builds_of_earlier_versions_are_refused(tmp_path, tokenizer):
    """They did not mark frames, and would be complete. Builds of images are resumed."""
    tar(tmp_path / "clips.tar", {"b.mp4": video(20), "b.txt": b"two"})
    tar(tmp_path / "stills.tar", {"a.jpg": gray(1).data, "a.txt": b"one"})
    write_documents(tmp_path / "r.array_record", [Document((gray(1), Text("a cat")))])
    (tmp_path / "i.jpg").write_bytes(gray(1).data)
    (tmp_path / "d.jsonl").write_text(json.dumps({"image": "i.jpg", "q": "what?", "a": "a cat"}))
    for name, format in (
        ("clips.tar", "webdataset"),
        ("stills.tar", "webdataset"),
        ("r.array_record", "records"),
        ("d.jsonl", "dialogues"),
    ):
        source = SourceConfig("x", format, (str(tmp_path / name),))
        cfg, folder = BuildConfig(source, CleanConfig(min_side=1)), tmp_path / f"out {name}"
        build(folder, cfg, embedded(1))
        build(folder, cfg, embedded(1))
        claim = json.loads((folder / "build.json").read_text())
        assert claim.pop("frames", False) == (name == "clips.tar")
        (folder / "build.json").write_text(json.dumps(claim))
        if name == "clips.tar":
            message = "did not mark video frames: build it again into an empty directory"
            with pytest.raises(UserError, match=message):
                build(folder, cfg, embedded(1))
            continue
        build(folder, cfg, embedded(1))
        if name == "d.jsonl":  # the version between marked all builds of dialogues
            (folder / "build.json").write_text(json.dumps(claim | {"frames": True}))
            build(folder, cfg, embedded(1))


class Stills(DocumentFiles):
    """One document, and no videos."""

    videos, fingerprint, remote, read_count = False, "stills", False, 0

    def __init__(self):
        pass

    def __len__(self):
        return 1

    def known_lengths(self, indices, tokenizer):
        return None

    def where(self, index):
        return "here"

    def read(self, index, seed=None, part_indices=None):
        Stills.read_count += 1
        return Document((gray(1), Text("a cat")))


def test_lengths_beside_a_shard_tell_frames(tmp_path, tokenizer):
    documents = [Document((*Image.video([(None, b"1"), (None, b"2")]), Text("a cat"), gray(3)))]
    path = str(tmp_path / "x.array_record")
    write_documents(path, documents)
    sizes = part_lengths(documents[0], tokenizer)
    assert sizes[:2] == [V, F] and sizes[3] == P
    # Frames whose video has lost its first ones, and two videos in a row.
    cut = Document((*Image.video([(None, b"")] * 3)[1:], *Image.video([(None, b"")])))
    assert part_lengths(cut, tokenizer) == [V, F, V]
    known = KnownLengths(np.array([4]), np.array(sizes))
    save_lengths(path, (tmp_path / "x.array_record").stat().st_size, tokenizer.fingerprint, known)
    source = DocumentFiles([path])
    source.sketch = None  # must not be counted
    assert TokenLengths(source, tokenizer, tmp_path, frames=True)[0] == sizes
    assert TokenLengths(source, tokenizer, tmp_path)[0] == [P, P, sizes[2], P]
    stored = lengths_path(path)
    with np.load(stored) as arrays:
        earlier = {name: array for name, array in arrays.items() if name != "frames"}
    earlier["sizes"] = np.maximum(earlier["sizes"], P)
    np.savez(stored, **earlier)  # of a version that did not tell frames
    source = DocumentFiles([path])
    assert TokenLengths(source, tokenizer, tmp_path / "again", frames=True)[0] == sizes
    source.sketch = None
    assert TokenLengths(source, tokenizer, tmp_path / "again")[0] == [P, P, sizes[2], P]


def test_sizes_of_frames_are_checked(base, chat, tmp_path, tokenizer, caplog):  # noqa: F811
    data = DataConfig(n_causal=64, n_frame=16, image_size=56)
    objective = EmuObjective(TrainConfig(model=chat.cfg, data=data))
    problems = " ".join(objective.mismatches(tokenizer))
    assert "data.n_frame is 16, the model needs 4: set it to that" in problems
    with pytest.raises(UserError, match="n_frame' must be in 0 .. n_causal"):
        DataConfig(n_causal=4, n_frame=5)
    emu1 = Tokenizer.load(EMU2 / "llama_config", instruct=True, family="emu")
    document = Document((*Image.video([(None, gray(1).data)]), Text("a cat")))
    with pytest.raises(UserError, match="data.n_frame needs a token of video frames"):
        first_batch(tmp_path, [document], emu1, n_causal=4, n_frame=2)
    building._warn_of_frames.cache_clear()
    first_batch(tmp_path, [document], tokenizer, n_causal=4)
    assert "frames of videos are read as still images: set data.n_frame" in caplog.text


def test_documents_of_earlier_versions_are_refused(tmp_path, tokenizer):
    """Their frames have times alone, as those between subtitles, which are still images."""
    frames = (Image(gray(1).data, 0.0), Image(gray(2).data, 1.0))
    board = Document((*frames, Text("a cat")))
    batch = first_batch(tmp_path, [board], tokenizer, n_causal=4, n_frame=2)
    assert batch["image_valid"].sum() == 2 and not batch["image_frames"].any()
    asked = Text("[USER]:", scored=False, special=True)
    for parts, paired in (((asked, *board.parts), False), (board.parts, True)):
        more = {"n_causal": 4, "paired": paired}
        with pytest.raises(UserError, match="did not mark video frames: build it again"):
            first_batch(tmp_path, [Document(parts)], tokenizer, n_frame=2, **more)
        first_batch(tmp_path, [Document(parts)], tokenizer, **more)
    first_batch(tmp_path, None, tokenizer, n_causal=4, n_frame=2)  # counts them as frames of others
    with pytest.raises(UserError, match="did not mark video frames: build it again"):
        first_batch(tmp_path, None, tokenizer, n_frame=2, **more)
    source = DocumentFiles([tmp_path / "x.array_record"], paired=True)
    with pytest.raises(UserError, match="did not mark video frames: build it again"):
        TokenLengths(source, tokenizer, tmp_path / "counted", frames=True)


def test_samples_show_videos_as_generation_takes_them():
    parts = (*Image.video([(None, gray(n).data) for n in (1, 2)]), gray(3), Text("a cat"))

    def prompt(videos):
        found = split_document("captions", Document(parts), paired=False, videos=videos)
        assert found is not None and found.reference == ("a cat",)
        return found.prompt

    def levels(part):
        many = part if isinstance(part, list) else [part]
        return [each.getpixel((0, 0))[0] for each in many if isinstance(each, PILImage.Image)]

    assert [levels(part) for part in prompt(True)] == [[1, 2], [3]]
    assert all(isinstance(part, PILImage.Image) for part in prompt(False))
    assert [levels(part) for part in prompt(False)] == [[1], [2], [3]]
