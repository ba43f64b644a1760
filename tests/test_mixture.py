"""Mixtures of sources: whose turn it is, what is packed, what happens to damaged documents."""

import collections
import dataclasses
import io
import json
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from test_data import assert_equal, check_embedding_index, grey, take
from test_sources import lines, make_image, tar, video

from emu_jax.config import save_json
from emu_jax.data import Batches, DataConfig, Document, Image, Text
from emu_jax.data import mixture as mixture_module
from emu_jax.data.batches import RowBuilder
from emu_jax.data.documents import Damaged, Source, write_documents
from emu_jax.data.images import load_image, open_image
from emu_jax.data.known_lengths import KnownLengths
from emu_jax.data.mixture import open_groups
from emu_jax.data.packing import IMAGE_PART
from emu_jax.data.sources import SourceConfig
from emu_jax.errors import UserError
from emu_jax.tokenizer import Tokenizer
from emu_jax.train.config import TrainConfig, resume_config

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([" ".join(WORDS)] * 3, 400)


@pytest.fixture
def cfg(tmp_path) -> DataConfig:
    return DataConfig(
        root=str(tmp_path),
        batch_size=4,
        row_tokens=40,
        row_images=4,
        n_causal=2,
        image_size=4,
        target_size=6,
        block_documents=16,
        seed=5,
        prefetch=0,
    )


def records(folder: Path, name: str, documents: list[Document], **changes) -> SourceConfig:
    path = folder / f"{name}.array_record"
    write_documents(path, documents)
    return SourceConfig(name, "records", (str(path),), **changes)


def pairs(count: int) -> list[Document]:
    return [Document((Image(grey(n % 250)), Text(WORDS[n % 10]))) for n in range(count)]


# Whose turn it is


def test_the_papers_batches(cfg, tokenizer, tmp_path):
    """Five sources with batches of their own: 128/128/64/16/16 at an eighth."""
    sizes = {"laion": 16, "coco": 16, "mmc4": 8, "webvid": 2, "storyboards": 2}
    sources = tuple(
        records(tmp_path, name, pairs(250), batch_size=size) for name, size in sizes.items()
    )
    cfg = dataclasses.replace(cfg, sources=sources)
    assert cfg.batch_sizes() == {16, 8, 2}
    turns = []
    with Batches(cfg, tokenizer, "rows") as whole:
        for _ in range(20):
            batch = next(whole)
            (name,) = {name for name, _ in whole.documents()}
            turns.append(name)
            assert len(batch["tokens"]) == sizes[name]
    for start in range(0, 20, 5):
        assert sorted(turns[start : start + 5]) == sorted(sizes)
    halves = [Batches(cfg, tokenizer, "rows", p, 2) for p in range(2)]
    for name in turns:
        for half in halves:
            assert len(next(half)["tokens"]) == sizes[name] // 2
            assert {name} == {n for n, _ in half.documents()}
    for half in halves:
        half.close()
    with pytest.raises(UserError, match="batch_size 2 cannot be divided into 4 equal shares"):
        Batches(cfg, tokenizer, "rows", 0, 4)


def test_steps_and_documents_follow_weights(cfg, tokenizer, tmp_path):
    """A source of its own, and two that share rows."""
    sources = (
        records(tmp_path, "a", pairs(30), weight=3.0),
        records(tmp_path, "own", pairs(30), weight=2.0, batch_size=2, row_tokens=16, row_images=2),
        records(tmp_path, "b", pairs(30), weight=1.0),
        records(tmp_path, "never", pairs(30), weight=0.0),
    )
    cfg = dataclasses.replace(cfg, sources=sources)
    shapes, counts = collections.Counter(), collections.Counter()
    with Batches(cfg, tokenizer, "rows") as batches:
        for _ in range(60):
            shapes[next(batches)["images"].shape[:2]] += 1
            names = [name for name, _ in batches.documents()]
            assert set(names) in ({"own"}, {"a", "b"}, {"a"}, {"b"})
            counts.update(names)
    assert shapes == {(4, 4): 40, (2, 2): 20}
    assert counts["a"] / counts["b"] == pytest.approx(3, abs=0.15)


def test_rows_of_a_block_come_in_any_order(cfg, tokenizer, tmp_path):
    """Packing opens the first row with the first document, or with the longest ones."""
    cfg = dataclasses.replace(cfg, sources=(records(tmp_path, "all", pairs(160)),))
    (group,) = open_groups(cfg, tokenizer, RowBuilder.requires)
    places = []
    for block in range(10):
        rows = [[p.sampled.number for p in row] for row in group.block(block).rows]
        assert sorted(n for row in rows for n in row) == list(range(16 * block, 16 * block + 16))
        assert [len(row) for row in rows] == [4] * 4  # as many as there is room for images
        places += [n for n, row in enumerate(rows) if 16 * block in row]
    assert len(set(places)) > 1


# Epochs and restarts


def test_each_source_has_an_order_of_its_own_in_each_epoch(cfg, tokenizer, tmp_path):
    sources = tuple(records(tmp_path, name, pairs(40)) for name in "ab")
    cfg = dataclasses.replace(cfg, sources=sources)

    def orders(seed: int) -> list[list[int]]:
        (group,) = open_groups(dataclasses.replace(cfg, seed=seed), tokenizer, RowBuilder.requires)
        drawn = [group.sample(n) for n in range(160)]
        each = [[d.index for d in drawn if d.source.cfg.name == name] for name in "ab"]
        return [order[epoch : epoch + 40] for order in each for epoch in (0, 40)]

    found = orders(5) + orders(6)
    assert all(sorted(order) == list(range(40)) for order in found)
    # Each is a shuffle, and none is another: by source, by epoch, by seed.
    assert all(sum(n == m for n, m in enumerate(order)) < 10 for order in found)
    assert len(set(map(tuple, found))) == 8
    assert orders(5) == found[:4]


def test_random_numbers_follow_from_the_number_of_a_document(cfg, tokenizer, tmp_path):
    """By seed, place in the endless order (not in the source), group, and purpose."""
    sources = tuple(records(tmp_path, name, pairs(3), batch_size=2) for name in "ab")
    cfg = dataclasses.replace(cfg, sources=sources)
    groups = open_groups(cfg, tokenizer, RowBuilder.requires)
    one, again = groups[0].sample(1), groups[0].sample(7)._replace(index=groups[0].sample(1).index)
    drawn = [
        groups[0].rng(one).random(),
        groups[0].rng(again).random(),
        groups[1].rng(one).random(),
        groups[0].rng(one, mixture_module.VIDEO_FRAMES).random(),
        open_groups(dataclasses.replace(cfg, seed=6), tokenizer, RowBuilder.requires)[0]
        .rng(one)
        .random(),
    ]
    assert len(set(drawn)) == 5 and groups[0].rng(one).random() == drawn[0]


def read_changing(cfg: DataConfig, tokenizer: Tokenizer, readers: list[int]) -> list:
    """The documents of some steps; between two of them the number of readers changes."""
    groups = {
        count: [Batches(cfg, tokenizer, "rows", p, count) for p in range(count)]
        for count in set(readers)
    }
    state, found = json.dumps(groups[readers[0]][0].state()), []
    for count in readers:
        for share in groups[count]:
            share.restore(json.loads(state))
            next(share)
        (state,) = {json.dumps(share.state()) for share in groups[count]}
        found += [document for share in groups[count] for document in share.documents()]
    return found


def test_an_epoch_is_exact_whatever_the_readers(cfg, tokenizer, tmp_path):
    """For 1, 2 and 4 readers and changes between them: no document is lost, none comes twice."""
    documents = [Document((Image(grey(n)), Text(" ".join(WORDS[: n % 7 + 1])))) for n in range(96)]
    cfg = dataclasses.replace(cfg, sources=(records(tmp_path, "all", documents),))
    steps = 24
    whole = read_changing(cfg, tokenizer, [1] * steps)
    assert len(whole) > 2 * 96
    for epoch in (whole[:96], whole[96:192]):
        assert sorted(epoch) == [("all", n) for n in range(96)]
    assert whole[:96] != whole[96:192]
    for readers in ([2], [4], [1, 2, 4], [4, 2, 1, 1, 4]):
        plan = [readers[n % len(readers)] for n in range(steps)]
        assert read_changing(cfg, tokenizer, plan) == whole


class Many(Source):
    """As many documents as there may be; nothing but a number each."""

    fingerprint = "many"

    def __len__(self) -> int:
        return 3_000_000

    def read(self, index, seed=None, part_indices=None) -> Document:
        return Document((Image(grey(index % 250)), Text(WORDS[index % 10])))

    def known_lengths(self, indices, tokenizer) -> KnownLengths:
        sizes = np.tile(np.array([IMAGE_PART, 1]), len(indices))
        return KnownLengths(np.full(len(indices), 2), sizes)

    def where(self, index) -> str:
        return str(index)


def test_a_restart_is_quick_wherever_it_is(cfg, tokenizer, tmp_path, monkeypatch):
    """Three million documents, in their thousandth epoch."""
    count = len(Many())
    monkeypatch.setattr(mixture_module, "open_source", lambda source, *_: Many())
    sources = (SourceConfig("many", paths=(str(tmp_path / "x"),)),)
    cfg = dataclasses.replace(cfg, sources=sources, block_documents=1024, batch_size=8)
    next(Batches(cfg, tokenizer, "rows"))  # what is imported, is imported
    block = 1000 * count // 1024
    began = time.process_time()
    with Batches(cfg, tokenizer, "rows") as batches:
        batches.restore({"kind": "rows", "step": 10**8, "groups": [[block, 3]]})
        next(batches)
    assert time.process_time() - began < 2
    assert all(0 <= index < count for _, index in batches.documents())


def test_a_run_goes_on_where_its_files_have_moved(tmp_path):
    def run(**changes) -> TrainConfig:
        source = dataclasses.replace(SourceConfig("a", "pages", ("x",), media=("y",)), **changes)
        return TrainConfig(data=DataConfig(sources=(source,)))

    save_json(run(), tmp_path / "train.json")
    moved = run(paths=("gs://x",), media=())
    assert resume_config(moved, tmp_path).data == moved.data
    with pytest.raises(UserError, match="holds a run with data.sources="):
        resume_config(run(weight=2.0), tmp_path)


# What is drawn at random


def test_windows_of_pages(cfg, tokenizer, tmp_path):
    page = Document(
        tuple(part for n in range(10) for part in (Image(grey(20 * n)), Text(WORDS[n])))
    )
    cfg = dataclasses.replace(
        cfg,
        batch_size=1,
        block_documents=1,
        sources=(records(tmp_path, "pages", [page], window_tokens=20, window_images=2),),
    )
    seen = set()
    with Batches(cfg, tokenizer, "rows") as batches:
        for batch in take(batches, 60):
            used = batch["segment_ids"][0] > 0
            assert used.sum() <= 20 and batch["image_valid"].sum() <= 2
            check_embedding_index(
                batch["tokens"], batch["embedding_index"], batch["image_valid"], tokenizer, 2
            )
            tokens = batch["tokens"][0][used]
            words = tokenizer.decode(tokens).split()
            shown = (batch["images"][0, batch["image_valid"][0], 0, 0, 0] // 20).tolist()
            numbers = [WORDS.index(word) for word in words]
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
            assert len(numbers) >= 3 and shown[0] in (numbers[0], numbers[0] + 1)
            assert (tokens[-1] == tokenizer.eos) == (9 in numbers)
            seen.add(tuple(numbers))
    assert len(seen) > 4

    picked = dataclasses.replace(cfg.sources[0], window_tokens=0, picked_images=2)
    with Batches(dataclasses.replace(cfg, sources=(picked,)), tokenizer, "rows") as batches:
        for batch in take(batches, 20):
            tokens = batch["tokens"][0][batch["segment_ids"][0] > 0]
            numbers = [WORDS.index(word) for word in tokenizer.decode(tokens).split()]
            shown = batch["images"][0, batch["image_valid"][0], 0, 0, 0] // 20
            assert shown.tolist() == numbers and len(numbers) == 2


def test_frames_are_drawn_anew_each_epoch(cfg, tokenizer, tmp_path):
    (tmp_path / "a.mp4").write_bytes(video(25))
    listing = lines(tmp_path / "videos.jsonl", [{"video": "a.mp4", "text": "seven"}])
    sources = (SourceConfig("clips", "videos", (str(listing),), frames=3),)
    cfg = dataclasses.replace(cfg, batch_size=1, block_documents=1, sources=sources)
    with Batches(cfg, tokenizer, "rows") as batches:
        shown = [b["images"][0, :3, 0, 0, 0].tolist() for b in take(batches, 12)]
    assert len(set(map(tuple, shown))) > 6 and all(s == sorted(s) for s in shown)
    threads = dataclasses.replace(cfg, decode_threads=0, prefetch=2)
    with Batches(threads, tokenizer, "rows") as batches:
        assert [b["images"][0, :3, 0, 0, 0].tolist() for b in take(batches, 12)] == shown


def test_fast_decode_is_close(cfg, tokenizer, tmp_path):
    rng = np.random.default_rng(0)
    smooth = PIL.Image.fromarray(rng.integers(256, size=(6, 8, 3)).astype(np.uint8))
    file = io.BytesIO()
    smooth.resize((640, 480), PIL.Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
    source = records(tmp_path, "p", [Document((Image(file.getvalue()), Text("one")))])
    cfg = dataclasses.replace(cfg, batch_size=1, image_size=56, sources=(source,))
    images = []
    for fast in (False, True):
        with Batches(dataclasses.replace(cfg, fast_decode=fast), tokenizer, "rows") as batches:
            images.append(next(batches)["images"][0, 0].astype(int))
    np.testing.assert_array_equal(images[0], load_image(file.getvalue(), 56))  # as released
    difference = np.abs(images[0] - images[1])
    assert 0 < difference.mean() < 2 and difference.max() < 40
    assert open_image(file.getvalue(), at_least=56).size == (80, 60)


# Damage


def damaged_pairs(count: int) -> tuple[list[Document], dict[int, str]]:
    """Every seventh image cannot be read."""
    cut = make_image(40)[:-300]
    documents, damaged = pairs(count), {}
    for n in range(0, count, 7):
        documents[n] = Document((Image(cut), Text(WORDS[n % 10])))
        damaged[n] = "unreadable image"
    return documents, damaged


def test_a_damaged_document_leaves_padding(cfg, tokenizer, tmp_path):
    """The rest lies where it would lie without damage, for any number of readers."""
    documents, damaged = damaged_pairs(60)
    sound = records(tmp_path / "sound", "all", pairs(60))
    torn = records(tmp_path / "torn", "all", documents)
    cfg = dataclasses.replace(cfg, max_damaged_rate=1.0, batch_size=4)
    with (
        Batches(dataclasses.replace(cfg, sources=(sound,)), tokenizer, "rows") as whole,
        Batches(dataclasses.replace(cfg, sources=(torn,)), tokenizer, "rows") as one,
    ):
        readers = [
            Batches(dataclasses.replace(cfg, sources=(torn,)), tokenizer, "rows", p, 2)
            for p in range(2)
        ]
        found = collections.Counter()
        for _ in range(8):
            want, got = next(whole), next(one)
            shares = [next(reader) for reader in readers]
            assert_equal({k: np.concatenate([s[k] for s in shares]) for k in got}, got)
            assert one.documents() == whole.documents()
            assert sorted(one.damaged()) == sorted(d for r in readers for d in r.damaged())
            assert {d.index for d in one.damaged()} == {
                i for _, i in one.documents() if i in damaged
            }
            found.update(d.reason for d in one.damaged())
            lost = got["segment_ids"] != want["segment_ids"]
            assert lost.any() == bool(one.damaged())
            for name in ("tokens", "positions", "text_loss_mask", "embedding_index"):
                assert (got[name][~lost] == want[name][~lost]).all()
            assert (got["segment_ids"][lost] == 0).all() and not got["text_loss_mask"][lost].any()
            assert (got["tokens"][lost] == tokenizer.pad_id).all()
            assert (got["embedding_index"][lost] == -1).all()
            gone = want["image_valid"] & ~got["image_valid"]
            assert gone.sum() == len(one.damaged()) and not got["images"][gone].any()
            kept = got["image_valid"]
            np.testing.assert_array_equal(got["images"][kept], want["images"][kept])
            assert (got["image_scored"] == kept).all()
        assert one.statistics()["damaged"] == dict(found) and found.total() > 10
        for reader in readers:
            reader.close()


@pytest.mark.parametrize("kind", ["captions", "images", "contexts"])
def test_a_damaged_single_document_has_a_substitute(cfg, tokenizer, tmp_path, kind):
    documents, damaged = damaged_pairs(60)
    source = records(tmp_path, "all", documents, paired=True)
    cfg = dataclasses.replace(cfg, sources=(source,), max_damaged_rate=1.0, drop_condition=0.0)
    with Batches(cfg, tokenizer, kind) as one:
        readers = [Batches(cfg, tokenizer, kind, p, 2) for p in range(2)]
        count = 0
        for _ in range(10):
            got = next(one)
            shares = [next(reader) for reader in readers]
            assert_equal({k: np.concatenate([s[k] for s in shares]) for k in got}, got)
            pixels = got["target" if kind == "contexts" else "images"]
            shown = pixels[:, 0, 0, 0].tolist()
            assert all(n % 7 for n in shown)  # none of the damaged
            count += len(one.damaged())
            if kind == "captions":
                words = [
                    tokenizer.decode(t[v]) for t, v in zip(got["tokens"], got["valid"], strict=True)
                ]
                assert words == [WORDS[n % 10] for n in shown]
        assert count >= 4
        for reader in readers:
            reader.close()


def test_what_was_damaged_when_counted_is_counted_once(cfg, tokenizer, tmp_path):
    samples = {
        f"{n:03}.{s}": make_image(n % 250) if s == "jpg" else WORDS[n % 10].encode()
        for n in range(64)
        for s in ("jpg", "txt")
    }
    for n in range(5, 64, 8):
        samples[f"{n:03}.txt"] = b"\xff\xfe"
    tar(tmp_path / "0.tar", samples)
    source = SourceConfig("tar", "webdataset", (str(tmp_path),))
    cfg = dataclasses.replace(cfg, sources=(source,), max_damaged_rate=1.0)
    for count in (1, 2):
        readers = [Batches(cfg, tokenizer, "rows", p, count) for p in range(count)]
        found: list = []
        seen = collections.Counter()
        for _ in range(7):
            for reader in readers:
                next(reader)
                found += reader.damaged()
                seen.update(index for _, index in reader.documents())
        epoch = found[:8]
        assert {d.index for d in epoch} == set(range(5, 64, 8))
        assert {d.reason for d in epoch} == {"invalid UTF-8"}
        assert all(d.where == f"{tmp_path}/0.tar sample {d.index}" for d in epoch)
        assert set(seen) == set(range(64)) - set(range(5, 64, 8))
        for reader in readers:
            reader.close()


def test_too_much_damage_stops_training(cfg, tokenizer, tmp_path):
    documents, _ = damaged_pairs(70)
    source = records(tmp_path, "all", documents)
    cfg = dataclasses.replace(cfg, sources=(source,), batch_size=16)
    with Batches(dataclasses.replace(cfg, max_damaged_rate=0.2), tokenizer, "rows") as batches:
        take(batches, 40)
        assert sum(batches.statistics()["damaged"].values()) > 200
    with Batches(dataclasses.replace(cfg, max_damaged_rate=0.1), tokenizer, "rows") as batches:
        with pytest.raises(
            UserError,
            match=r"1\d\d of 1\d\d\d documents cannot be read \(1\d\d unreadable image; the "
            r"last: .*all.array_record record \d+\): repair the data, or raise "
            r"data.max_damaged_rate",
        ):
            take(batches, 40)
        assert batches.statistics()["documents"] < 1100  # as soon as a thousand were seen
    alone = [Document((Image(b"no image"), Text("seven")))]
    nothing = records(tmp_path, "nothing", alone, paired=True)
    with Batches(dataclasses.replace(cfg, sources=(nothing,)), tokenizer, "images") as batches:
        for _ in range(2):  # again and again, not only the first time
            with pytest.raises(
                UserError, match="20 consecutive documents of source 'nothing' cannot"
            ):
                next(batches)


def test_a_changed_document_is_damage(cfg, tokenizer, tmp_path, monkeypatch):
    source = records(tmp_path, "all", pairs(16))
    cfg = dataclasses.replace(cfg, sources=(source,), max_damaged_rate=1.0)
    with Batches(cfg, tokenizer, "rows") as batches:
        group = batches._maker._builders[0].group
        other = Document((Image(grey(1)), Text("one two")))
        monkeypatch.setattr(group.sources[0].documents, "read", lambda *_: other)
        next(batches)
        assert {d.reason for d in batches.damaged()} == {"changed document"}


def test_a_failing_store_stops_training(cfg, tokenizer, tmp_path, monkeypatch):
    source = records(tmp_path, "all", pairs(16))
    with Batches(dataclasses.replace(cfg, sources=(source,)), tokenizer, "rows") as batches:
        group = batches._maker._builders[0].group

        def fail(*_):
            raise UserError("cannot read gs://b/x, tried 5 times: 503")

        monkeypatch.setattr(group.sources[0].documents, "read", fail)
        with pytest.raises(UserError, match="tried 5 times") as error:
            next(batches)
        assert not isinstance(error.value, Damaged)


# How full rows are


def paper_like(rng: np.random.Generator) -> dict[str, list[Document]]:
    """Documents of the paper's five sources at a scale of 1/16: an image takes 4 tokens for 34,
    rows have 256 tokens for 2,048. Lengths are drawn as captions and pages have them."""

    def words(mean: float, spread: float, most: int) -> Text:
        count = int(np.clip(rng.lognormal(np.log(mean), spread), 1, most))
        return Text(" ".join(rng.choice(WORDS, count)))

    shot = Image(grey(1, 2))

    def page() -> Document:
        parts: list = []
        for _ in range(int(rng.geometric(1 / 20))):
            parts += [shot] * (rng.random() < 0.1) + [words(3, 0.6, 20)]
        return Document(tuple(parts) or (Text("one"),))

    def board() -> Document:
        shots = int(rng.integers(20, 60))
        return Document(tuple(p for _ in range(shots) for p in (shot, words(2, 0.7, 12))))

    return {
        "laion": [Document((shot, words(2.2, 0.5, 10))) for _ in range(1490)],
        "coco": [Document((shot, words(1.5, 0.3, 5))) for _ in range(1490)],
        "mmc4": [page() for _ in range(745)],
        "webvid": [Document((*[shot] * 8, words(2.2, 0.5, 10))) for _ in range(186)],
        "storyboards": [board() for _ in range(186)],
    }


def test_rows_of_a_mixture_like_the_papers_are_full(cfg, tokenizer, tmp_path):
    """At least 0.95 of the tokens and 0.85 of the images of packed rows are not padding."""
    weights = {"laion": 128.0, "coco": 128.0, "mmc4": 64.0, "webvid": 16.0, "storyboards": 16.0}
    windows = {
        "mmc4": {"window_tokens": 128, "window_images": 5},
        "storyboards": {"window_tokens": 128, "window_images": 16},
    }
    documents = paper_like(np.random.default_rng(0))
    sources = tuple(
        records(tmp_path, name, each, weight=weights[name], **windows.get(name, {}))
        for name, each in documents.items()
    )
    cfg = dataclasses.replace(
        cfg, sources=sources, row_tokens=256, row_images=26, block_documents=1024
    )
    (group,) = open_groups(cfg, tokenizer, RowBuilder.requires)
    rows = [row for block in range(3) for row in group.block(block).rows]
    tokens = sum(p.tokens for row in rows for p in row) / (256 * len(rows))
    images = sum(p.images for row in rows for p in row) / (26 * len(rows))
    print(f"token_fill {tokens:.3f}, image_fill {images:.3f}")
    assert tokens >= 0.95 and images >= 0.85
    names = {name for row in rows for name in {p.sampled.source.cfg.name for p in row}}
    assert names == set(weights)


# Mistakes


def test_errors_are_one_clear_line(cfg, tokenizer, tmp_path):
    good = records(tmp_path, "a", pairs(4))

    def fails(match: str, *sources: SourceConfig, kind: str = "rows", **changes) -> None:
        with pytest.raises(UserError, match=match) as error:
            Batches(dataclasses.replace(cfg, sources=sources, **changes), tokenizer, kind)
        assert "\n" not in str(error.value)

    def changed(**changes) -> SourceConfig:
        return dataclasses.replace(good, **changes)

    fails("'sources.0.name' must not be empty, not ''", changed(name=""))
    fails("'sources.1.weight' must not be negative, not -1", good, changed(weight=-1.0))
    fails("'sources.0.row_tokens' must hold one image: at least 6, not 3", changed(row_tokens=3))
    fails("'sources.0.frames' must be at least 1, not 0", changed(frames=0))
    fails("'max_damaged_rate' must be in 0 .. 1, not 2.0", good, max_damaged_rate=2.0)
    fails("two sources are called 'a'", good, good)
    fails("'sources' has no positive weight", changed(weight=0.0))
    fails("source 'a': nothing is at .*none", changed(paths=(f"{tmp_path}/none",)))
    fails("no source has pairs, which 'captions' batches are made of", good, kind="captions")
    words = records(tmp_path, "words", [Document((Text("one"),))])
    fails("source 'words' .* has no document that 'contexts' can use", words, kind="contexts")
    picked = dataclasses.replace(words, picked_images=1)
    fails("source 'words' .* has no document that 'rows' can use", picked)
