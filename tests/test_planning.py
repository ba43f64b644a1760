"""Planning: streams of documents, the order of billions, and what a process plans."""

import dataclasses
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import grain
import numpy as np
import pytest
from test_data import assert_equal, grey
from test_mixture import WORDS, Many, pairs, records
from test_sources import TINY, make_image, shown, source, tar

from emu_jax import cli
from emu_jax.config import save_json
from emu_jax.data import Batches, DataConfig, Document, Image, Text, storage
from emu_jax.data import documents as documents_module
from emu_jax.data import lengths as lengths_module
from emu_jax.data.batches import RowBuilder
from emu_jax.data.build import indexing
from emu_jax.data.build.indexing import index_sources
from emu_jax.data.build.runners import on_beam, on_processes
from emu_jax.data.documents import DocumentFiles, count_records, write_documents
from emu_jax.data.known_lengths import (
    KnownLengths,
    Rejected,
    known_documents,
    lengths_path,
    load_lengths,
    save_lengths,
)
from emu_jax.data.lengths import LengthParts, TokenLengths
from emu_jax.data.mixture import Group, OpenSource, open_groups
from emu_jax.data.packing import IMAGE_PART
from emu_jax.data.permutation import mixed, shuffled
from emu_jax.data.pipeline import merge_states
from emu_jax.data.simulate import Distribution, SimulatedLengths, load_distribution, simulate
from emu_jax.data.simulate import simulations_table as simulation_table
from emu_jax.data.sources import SourceConfig, index, open_source
from emu_jax.data.sources import open as open_module
from emu_jax.data.sources.index import cached_arrays
from emu_jax.data.sources.spans import SAMPLE_BYTES, Spans, compact_spans
from emu_jax.data.unused import Tally
from emu_jax.errors import UserError
from emu_jax.tokenizer import Tokenizer
from emu_jax.train.config import TrainConfig, resume_config


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


@pytest.mark.parametrize("count", [1, 2, 3, 5, 48, 1000, 4099])
def test_each_epoch_is_a_permutation_of_its_own(count):
    drawn = shuffled(np.arange(3 * count), count, seed=7).reshape(3, count)
    assert (np.sort(drawn) == np.arange(count)).all()
    if count >= 48:
        assert len({tuple(order) for order in drawn.tolist()}) == 3
        assert max((order == np.arange(count)).sum() for order in drawn) < 12
        assert (drawn != shuffled(np.arange(3 * count), count, seed=8).reshape(3, count)).any()
    if count >= 1000:  # neighbors are not neighbors any more
        assert (np.abs(np.diff(drawn[0])) < count / 100).mean() < 0.1


def test_a_source_may_have_more_than_two_to_the_32_documents():
    count = 10**10
    first = shuffled(np.arange(count - 5000, count + 5000), count, seed=0)
    assert ((first >= 0) & (first < count)).all() and (first > 2**32).mean() > 0.5
    assert len(np.unique(first[:5000])) == len(np.unique(first[5000:])) == 5000
    assert np.abs(np.histogram(first, 10, (0, count))[0] - 1000).max() < 150


@pytest.mark.parametrize("weights", [[1.0], [3.0, 1.0], [128.0, 64.0, 0.3], [0.7, 0.1, 0.1, 5.0]])
def test_sources_are_interleaved_like_grain(weights):
    each = [
        grain.MapDataset.source(range(10**9)).map(lambda k, n=n: (n, k)).repeat(None)
        for n in range(len(weights))
    ]
    mix = grain.MapDataset.mix(each, weights)
    numbers = np.array([*range(300), *range(10**8, 10**8 + 50)])
    sources, positions = mixed(numbers, weights)
    assert list(zip(sources.tolist(), positions.tolist(), strict=True)) == [
        mix[n] for n in numbers.tolist()
    ]
    assert mixed(np.array([2**62]), weights)[1][0] >= 0  # does not overflow


def varied(count: int) -> list[Document]:
    return [Document((Image(grey(n)), Text(" ".join(WORDS[: n % 7 + 1])))) for n in range(count)]


def test_the_order_of_earlier_runs(cfg, tokenizer, tmp_path):
    """Recorded before there were streams."""
    sources = (records(tmp_path, "a", varied(50)), records(tmp_path, "b", pairs(20), weight=0.4))
    with Batches(dataclasses.replace(cfg, sources=sources), tokenizer, "rows") as batches:
        for _ in range(7):
            next(batches)
        assert batches.state()["groups"] == [[7, 0]]
        read = " ".join(f"{name}{index}" for name, index in batches.documents())
    assert read == "b3 a49 b12 b19 a4 a18 a3 b11 a9 a41 a38 a8 b16 a40 a47 a29"


@pytest.mark.parametrize("kind", ["rows", "captions"])
def test_streams_are_equal_for_any_number_of_processes(cfg, tokenizer, tmp_path, kind):
    sources = (
        records(tmp_path, "a", varied(90), paired=True),
        records(tmp_path, "b", pairs(30), weight=0.5, paired=True),
        records(tmp_path, "own", pairs(30), weight=0.5, paired=True, batch_size=12),
    )
    cfg = dataclasses.replace(cfg, sources=sources, batch_size=24, row_group=4, holdout=0.1)
    with Batches(cfg, tokenizer, kind) as whole:
        want, documents = [next(whole) for _ in range(6)], whole.documents()
        state, statistics = json.loads(json.dumps(whole.state())), whole.statistics()
    middle: dict[str, Any] = {}
    for count in (2, 4, 6):  # streams are split between two of four processes
        shares = [Batches(cfg, tokenizer, kind, p, count) for p in range(count)]
        for number, batch in enumerate(want):
            parts = [next(share) for share in shares]
            assert_equal({k: np.concatenate([part[k] for part in parts]) for k in batch}, batch)
            if number == 2:
                middle = merge_states([share.state() for share in shares])
        assert [d for share in shares for d in share.documents()] == documents
        states = [share.state() for share in shares]
        assert merge_states(states) == state
        estimate = shares[0].statistics()
        assert estimate["token_fill"] == pytest.approx(statistics["token_fill"], rel=0.3)
        assert estimate["tokens"] == pytest.approx(statistics["tokens"], rel=0.3)
        with pytest.raises(ValueError, match="no process knows"):
            merge_states(states[:1])
        with pytest.raises(UserError, match="data position is of .* streams"):
            shares[-1].restore(states[0])
    # A mesh follows the interconnect: a process's rows are scattered, and others may read the same.
    numbers = ((0, 3, 5), (1, 2, 4), (0, 3, 5))
    scattered = [Batches(cfg, tokenizer, kind, mine, 6) for mine in numbers]
    for batch in want:
        for mine, share in zip(numbers, scattered, strict=True):
            pieces = {k: np.split(v, 6) for k, v in batch.items()}
            assert_equal(
                next(share), {k: np.concatenate([v[n] for n in mine]) for k, v in pieces.items()}
            )
    assert merge_states([share.state() for share in scattered]) == state
    with Batches(cfg, tokenizer, kind, 1, 3) as third:  # resumed by other processes
        third.restore(json.loads(json.dumps(middle)))
        for batch in want[3:]:
            size = len(batch["tokens"]) // 3
            assert_equal(next(third), {k: v[size : 2 * size] for k, v in batch.items()})
    with Batches(dataclasses.replace(cfg, row_group=0), tokenizer, kind) as other:
        with pytest.raises(UserError, match="data position is damaged"):
            other.restore(middle)


def test_a_process_plans_its_own_rows_alone(cfg, tokenizer, tmp_path, monkeypatch):
    streams, pack = [], Group._pack

    def recorded(self: Group, block: int, stream: int = 0):
        streams.append(stream)
        return pack(self, block, stream)

    monkeypatch.setattr(Group, "_pack", recorded)
    sources = (records(tmp_path, "a", varied(90)),)
    cfg = dataclasses.replace(cfg, sources=sources, batch_size=64, row_group=4)
    for process in (0, 3, 7):
        with Batches(cfg, tokenizer, "rows", process, 8) as batches:
            streams.clear()
            next(batches), next(batches)
            assert set(streams) == {2 * process, 2 * process + 1}


def test_every_document_is_dealt_once(cfg, tokenizer, tmp_path):
    """Every stream gets some of every source, though the sources alternate."""
    sources = tuple(records(tmp_path, name, varied(64)) for name in "ab")
    cfg = dataclasses.replace(cfg, sources=sources, batch_size=12, row_group=3)
    (group,) = open_groups(cfg, tokenizer, RowBuilder.requires)
    assert (group.stream_rows, group.streams) == (3, 4)
    assert dataclasses.replace(cfg, batch_size=10).stream_rows() == 2
    dealt = [group.numbers(0, 256, stream) for stream in range(4)]
    assert sorted(np.concatenate(dealt).tolist()) == list(range(4 * 256))
    for numbers in dealt:
        count = sum(group.sample(n).source.cfg.name == "a" for n in numbers.tolist())
        assert 0.35 < count / 256 < 0.65
    read = [p.sampled for block in range(8) for row in group.block(block, 1).rows for p in row]
    assert sorted(d.number for d in read) == sorted(group.numbers(0, 128, 1).tolist())


def test_a_run_keeps_its_order(tmp_path):
    save_json(TrainConfig(), tmp_path / "train.json")
    changed = dataclasses.replace(TrainConfig(), data=DataConfig(row_group=8))
    assert resume_config(changed, tmp_path).data.row_group == 0


# Compact indexes


@pytest.mark.parametrize("seed", range(3))
def test_compact_spans_tell_every_member(seed):
    rng = np.random.default_rng(seed)
    spans = np.zeros((400, 5, 2), np.int64)
    at = 0
    for sample in spans:
        roles = rng.permutation(5)[: rng.choice([0, 1, 2, 3, 4], p=[0.1, 0.2, 0.3, 0.35, 0.05])]
        for role in roles:
            at += 512 * int(rng.choice([1, 3, 31, 32, 40], p=[0.8, 0.1, 0.05, 0.03, 0.02]))
            size = int(
                rng.choice([1, 511, 512, 513, 2**32 - 1, 2**32], p=[0.3] * 3 + [0.04, 0.03, 0.03])
            )
            sample[role] = at, size
            at += -(-size // 512) * 512
    spans[7, 0] = 100, 5  # not at a block
    damage = rng.integers(0, 256, 400)
    arrays = compact_spans(spans, damage)
    wide = len(arrays["wide_row"])
    assert 1 <= wide < 120
    read = Spans(arrays, 5)
    assert [read.damage(n) for n in range(400)] == damage.tolist()
    for n, sample in enumerate(spans):
        np.testing.assert_array_equal(read[n], sample)
    assert sum(arrays[key][:1].nbytes for key in ("block", "layout", "member_size")) == SAMPLE_BYTES


def test_wide_samples_of_several_tars_are_told_apart(tmp_path):
    """A sample of four members, and one whose members lie apart, in the second tar of two."""
    image = make_image(9)
    tar(tmp_path / "0.tar", {"a.jpg": image, "a.txt": b"first", "b.jpg": image, "b.txt": b"second"})
    apart = {"c.jpg": image, "d.txt": b"apart", "d.json": b"{}", "c.txt": b"third", "d.jpg": image}
    tar(tmp_path / "1.tar", apart)
    documents = source("webdataset", tmp_path / "*.tar")
    words = [cast(Text, document.parts[1]).text for document in documents]
    assert words == ["first", "second", "third", "apart"]
    assert documents.where(3) == f"{tmp_path}/1.tar sample 1"


def test_the_index_of_many_files_is_in_folders_that_are_opened_lazily(tmp_path, monkeypatch):
    image = make_image(9)
    for n in range(7):
        members = {
            f"{k}.{e}": c for k in range(n % 3 + 1) for e, c in (("jpg", image), ("txt", b"x"))
        }
        tar(
            tmp_path / f"{n}.tar", {"z.txt": b"z", **members, "z.jpg": image} if n == 4 else members
        )
    want = [
        (shown(document), documents.where(n))
        for documents in [source("webdataset", tmp_path)]
        for n, document in enumerate(documents)
    ]
    monkeypatch.setattr(index, "EAGER", 0)  # a large index is not copied: it stays by file
    shutil.rmtree(tmp_path / ".emu_jax")
    documents = source("webdataset", tmp_path)
    assert [(shown(documents[n]), documents.where(n)) for n in range(14)] == want
    stored = [path.parent.name for path in (tmp_path / ".emu_jax").rglob("block.npy")]
    assert len(stored) == 7 and all(name.count(".tar-") for name in stored)
    monkeypatch.setattr(index, "MOST_FOLDERS", 3)
    source("webdataset", tmp_path)
    opened, load = [], index._load
    monkeypatch.setattr(
        index, "_load", lambda folder, *rest: opened.append(folder.name) or load(folder, *rest)
    )
    documents = source("webdataset", tmp_path)
    assert len(opened) < 4 and len(documents) == len(want) == 14
    assert [(shown(documents[n]), documents.where(n)) for n in range(14)] == want


def test_token_counts_are_compact(tmp_path, tokenizer):
    """At most 8 bytes a document and 2 a part; texts longer than int16 are whole."""
    sizes = np.array([[IMAGE_PART, 9]] * 4999 + [[IMAGE_PART, 70_000]]).reshape(-1)

    class Known(Many):
        fingerprint = "known"

        def __len__(self) -> int:
            return 5000

        def known_lengths(self, indices, tokenizer):
            part = sizes[2 * indices.start : 2 * indices.stop]
            return KnownLengths(np.full(len(indices), 2), part)

    lengths = TokenLengths(Known(), tokenizer, tmp_path)
    assert lengths[4999] == [IMAGE_PART, 70_000] and lengths[0] == [IMAGE_PART, 9]
    assert lengths.totals_of(np.array([4999, 3])).tolist() == [[70_000, 9], [1, 1]] + [[0, 0]] * 3
    assert lengths.totals()["tokens"] == 4999 * 9 + 70_000
    assert lengths.tally.used == {"documents": 5000, "images": 5000, "texts": 5000}
    stored = sum(p.stat().st_size for p in tmp_path.rglob("*.npy") if p.stem in ARRAYS)
    assert stored <= 5000 * 8 + 10_000 * 2 + 128 * len(ARRAYS) + 16
    assert SimulatedLengths(Distribution("x", [[9]], {}), 7).totals()["tokens"] == 63


ARRAYS = ("starts", "sizes", "damage", "long_at", "long_sizes")


def test_parts_are_summed_without_their_large_arrays(tmp_path, tokenizer, monkeypatch):
    """Documents without a part, with an empty text, with an image alone, or with a text alone."""
    monkeypatch.setattr(lengths_module, "_CHUNK", 2)
    outlines = [[], [IMAGE_PART, 3], [0], [5, 0, 7], [IMAGE_PART], [], [40_000], []]

    class Known(Many):
        fingerprint = "known"

        def __len__(self) -> int:
            return len(outlines)

        def known_lengths(self, indices, tokenizer):
            chosen = [outlines[n] for n in indices]
            sizes = np.array([size for outline in chosen for size in outline], np.int32)
            return KnownLengths(np.array(list(map(len, chosen)), np.int32), sizes)

    parts = LengthParts(Known(), tokenizer, tmp_path)
    for part in range(4):
        parts.open(part)
    opened, open_array = set(), index._open
    monkeypatch.setattr(
        index, "_open", lambda folder, key, *rest: opened.add(key) or open_array(folder, key, *rest)
    )
    lengths = TokenLengths(Known(), tokenizer, tmp_path)
    assert opened == {"tally", "stamp", "totals"}
    assert [lengths[n] for n in range(8)] == outlines
    assert list(lengths.totals().values()) == [8, 3 + 5 + 7 + 40_000, 2, 3, 2, 1, 0]
    assert lengths.tally.used == {"documents": 4, "images": 2, "texts": 4}
    assert lengths.tally.unused == {"empty document": 4, "empty text": 2}
    assert lengths.tally.examples == {"empty document": ["0", "2", "5"], "empty text": ["2", "3"]}


def test_stored_lengths_belong_to_their_shard(tmp_path, monkeypatch):
    """They are not used for another shard of the same size and number of documents."""
    shard = tmp_path / "a.array_record"
    write_documents(shard, [Document((Text(words),)) for words in ("one two", "three")])
    size, known = shard.stat().st_size, KnownLengths(np.array([1, 1]), np.array([2, 1]))
    save_lengths(str(shard), size, "tokenizer", known)
    monkeypatch.setattr(storage, "names", None)  # the folder may hold a million other files
    read = DocumentFiles([shard]).known_lengths(range(2), "tokenizer")
    assert read is not None and read.sizes.tolist() == [2, 1]
    with monkeypatch.context() as patch:
        patch.setattr(documents_module, "_opened", None)  # which reads all offsets
        assert count_records(str(shard)) == 2
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert known_documents(str(shard)) is None
    with pytest.raises(Rejected, match="counted for other documents than .*a.array_record has"):
        load_lengths(str(shard), size, 2, "tokenizer")
    shard.unlink()
    with pytest.raises(Rejected, match="a.array_record cannot be read"):
        load_lengths(str(shard), size, 2, "tokenizer")
    shard.write_bytes(content)
    with np.load(lengths_path(str(shard))) as arrays:
        earlier = {name: array for name, array in arrays.items() if name != "shard_tail"}
    np.savez(lengths_path(str(shard)), **earlier)  # of a version that did not store it
    assert known_documents(str(shard)) is None
    assert load_lengths(str(shard), size, 2, "tokenizer").counts.tolist() == [1, 1]


def test_counts_of_an_earlier_version_are_converted(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(lengths_module, "_CHUNK", 4)
    arrays = {
        "sizes": np.array([IMAGE_PART, 1, 2, 40_000, IMAGE_PART, 5, 6], np.int32),
        "starts": np.array([0, 2, 2, 3, 4, 5, 7]),
        "damage": np.array([0, 1, 0, 0, 0, 0], np.int8),
        "totals": np.zeros(7, np.int64),
        "tally": Tally({"documents": 5, "images": 2, "texts": 5}).to_array(),
        "stamp": np.frombuffer(b"stamp ", np.uint8),
    }

    class Six(Many):
        fingerprint = "six"

        def __len__(self) -> int:
            return 6

        def known_lengths(self, indices, tokenizer) -> None:
            return None

        def sketch(self, index: int) -> Document:
            raise AssertionError("counted again")

    name = f"outlines-{lengths_module._EARLIER}-six-{tokenizer.fingerprint}"
    cached_arrays(tmp_path, name, lambda: arrays)
    lengths = TokenLengths(Six(), tokenizer, tmp_path)
    assert lengths.parts.count == 2 and not (tmp_path / name).exists()
    want = [[IMAGE_PART, 1], [], [2], [40_000], [IMAGE_PART], [5, 6]]
    assert [lengths[n] for n in range(6)] == want
    assert lengths.damage(1) == "damaged record" and lengths.damage(4) is None
    assert lengths.tally.used["documents"] == 5 and lengths.totals()["damaged"] == 1


# `data index`


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Callable[[str], DataConfig]:
    """Returns configs of two sources in files, by the name of their cache."""
    monkeypatch.setattr(lengths_module, "_CHUNK", 2)
    image = make_image(9)
    for n in range(3):
        names = [f"{n}{k}" for k in range(2)]
        tar(
            tmp_path / f"{n}.tar",
            {f"{k}.{e}": c for k in names for e, c in (("jpg", image), ("txt", b"words"))},
        )
    page = {"images": ["00.jpg", None], "texts": [None, "a page"]}
    (tmp_path / "p.jsonl").write_text(json.dumps(page) + "\n")
    Tokenizer.load(TINY / "tokenizer").save(tmp_path / "tokenizer")
    sources = (
        SourceConfig("pairs", "webdataset", (f"{tmp_path}/*.tar",)),
        SourceConfig("pages", "pages", (f"{tmp_path}/p.jsonl",), media=(f"{tmp_path}/*.tar",)),
    )
    return lambda cache: DataConfig(str(tmp_path), sources=sources, cache=str(tmp_path / cache))


def arrays(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.npy")}


def test_indexing_in_shares_is_what_training_would_do(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "MOST_FOLDERS", 2)
    files = set()

    def run(cache: str, shard: tuple[int, int]) -> dict:
        cfg = sources(cache)

        def runner(work):
            return on_processes(lambda task: files.add(len(task.source.paths)) or work(task), 1)

        return index_sources(cfg, cfg.load_tokenizer(), runner, shard)

    with Batches(sources("trained"), sources("x").load_tokenizer(), "rows", plan_only=True):
        pass
    with ThreadPoolExecutor(2) as pool:  # each waits for the other's files
        monkeypatch.setattr(indexing, "_POLL_SECONDS", 0.05)
        shards = [pool.submit(run, "shared", (n, 2)) for n in range(2)]
        reports = [shard.result() for shard in shards]
    assert files == {1, 2}  # a task merges the indexes of two files
    assert reports[0] == reports[1] == run("alone", (0, 1))
    assert reports[0]["pairs"].documents == 6 and reports[0]["pages"].images == 1
    want, shared = arrays(tmp_path / "trained"), arrays(tmp_path / "shared")
    assert want and want.items() <= shared.items() and arrays(tmp_path / "alone") == shared
    counted: list[str] = []
    monkeypatch.setattr(lengths_module, "_count", counted.append)
    assert run("shared", (1, 2)) == reports[0] and not counted  # nothing is done twice


def test_indexing_on_beam_writes_the_same_bytes(sources, tmp_path):
    pytest.importorskip("apache_beam")
    for cache, runner in (
        ("beam", lambda work: nullcontext(on_beam(work, ["--runner=DirectRunner"]))),
        ("local", lambda work: on_processes(work, 1)),
    ):
        cfg = sources(cache)
        index_sources(cfg, cfg.load_tokenizer(), runner)
    assert arrays(tmp_path / "beam") == arrays(tmp_path / "local") != {}


def test_damaged_lengths_tell_no_count(tmp_path):
    """Whichever bit near the number is flipped: it is right, or it is not given. The array is too
    large for its CRC-32 to be known."""
    shard, count = tmp_path / "a.array_record", 3000
    shard.write_bytes(b"shard")
    known = KnownLengths(np.ones(count, int), np.full(count, 2))
    save_lengths(str(shard), shard.stat().st_size, "tokenizer", known)
    path = Path(lengths_path(str(shard)))
    whole = path.read_bytes()
    at = whole.index(b"'shape': (3000,)")
    found = set()
    for bit in range(8 * (at - 70), 8 * (at + 20)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        found.add(known_documents(str(shard)))
    assert found == {None, count}


def test_many_records_are_counted_once_and_opened_when_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(open_module, "_COUNTED_BYTES", 1)
    monkeypatch.setattr(index, "MOST_FOLDERS", 2)
    monkeypatch.setattr(index, "QUICK_FILES", 2)
    for n in range(3):
        texts = [Document((Text(f"{n} {k}"),)) for k in range(n + 1)]
        write_documents(tmp_path / f"{n}.array_record", texts)
    Tokenizer.load(TINY / "tokenizer").save(tmp_path / "tokenizer")
    source = SourceConfig("it", "records", (str(tmp_path),))
    cfg = DataConfig(str(tmp_path), sources=(source,), family="emu2")
    tokenizer = cfg.load_tokenizer()
    tasks = []

    def index_once() -> dict:
        return index_sources(
            cfg, tokenizer, lambda work: tasks.append(work) or on_processes(work, 1)
        )

    report = index_once()
    assert report["it"].documents == 6 and len(tasks) == 1
    kept = sorted(p.name.rsplit("-", 1)[-1] for p in (tmp_path / ".emu_jax").glob("records-*"))
    assert len(kept) == 3 and kept[-1] == "folders"  # and none for each file
    assert not list((tmp_path / ".emu_jax").glob("[0-2].array_record-*"))
    # A worker counts with the same tokenizer.
    assert indexing._tokenizer_of(cfg).fingerprint == tokenizer.fingerprint
    opened, open_file = [], documents_module._opened
    monkeypatch.setattr(
        documents_module, "_opened", lambda path: opened.append(Path(path).stem) or open_file(path)
    )
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", None)  # would take longer than looking up a file
        assert index_once() == report and len(tasks) == 1 and not opened
        assert storage.existing([f"{tmp_path}/{n}.array_record" for n in (2, 3)]) == {
            f"{tmp_path}/2.array_record"
        }
    documents = open_source(source)
    assert not opened and cast(Text, documents[4].parts[0]).text == "2 1" and opened == ["2"]
    words = [cast(Text, document.parts[0]).text for document in documents]
    assert words == ["0 0", "1 0", "1 1", "2 0", "2 1", "2 2"]
    assert sorted(opened) == ["0", "1", "2"]
    (part,) = (tmp_path / ".emu_jax").glob("outlines-*")
    shutil.rmtree(part)
    assert index_once() == report and len(tasks) == 2  # it is not there: counted again


def test_processes_are_kept_between_the_stages_and_end_with_an_error():
    with pytest.raises(KeyboardInterrupt), on_processes(cast(Any, eval), 2) as runner:
        assert sorted(runner(["1", "2"])) == [1, 2]
        pool = cast(Any, runner._pool)
        assert sorted(runner(["3", "4"])) == [3, 4] and runner._pool is pool is not None
        running = iter(runner(["5", "__import__('time').sleep(30)"]))
        assert next(running) == 5  # tasks stay in progress, as when a traceback holds the iterator
        workers = list(pool._processes.values())
        raise KeyboardInterrupt
    assert runner._pool is None and {w.exitcode for w in workers} == {-signal.SIGTERM}


def test_the_caller_works_beside_the_workers():
    task, caller = "__import__('time').sleep(0.01) or __import__('os').getpid()", os.getpid()
    with on_processes(cast(Any, eval), 2, caller_works=True) as runner:
        assert list(runner([task] * 2)) == [caller] * 2  # none waits for the worker to start
        deadline, found = time.monotonic() + 60, [caller]
        while set(found) == {caller} and time.monotonic() < deadline:
            found = list(runner([task] * 30))
        (worker,) = cast(Any, runner._pool)._processes
    assert len(found) == 30 and set(found) == {caller, worker}
    with (
        pytest.raises(ZeroDivisionError),
        on_processes(cast(Any, eval), 2, caller_works=True) as runner,
    ):
        list(runner(["1", "2", "1 / 0"]))  # the caller's own


def test_a_share_that_is_none(tmp_path):
    with pytest.raises(UserError, match="--shard 2/2 is out of range: count from 0"):
        index_sources(
            DataConfig(), cast(Tokenizer, None), lambda work: on_processes(work, 1), (2, 2)
        )


# `data simulate`


def test_a_simulation_is_like_the_real_pipeline(tmp_path, tokenizer):
    """At a million documents: full rows and the size of the index, within a tenth."""
    distribution, count = load_distribution("laion"), 10**6
    drawn = np.random.default_rng(0).integers(len(distribution.outlines), size=count)
    sizes = np.array(distribution.outlines)[drawn].reshape(-1)

    class Real(Many):
        fingerprint = "real"

        def __len__(self) -> int:
            return count

        def known_lengths(self, indices, tokenizer):
            part = sizes[2 * indices.start : 2 * indices.stop]
            return KnownLengths(np.full(len(indices), 2), part)

    cfg = DataConfig(batch_size=64, row_tokens=512, row_images=10, row_group=8)
    lengths = TokenLengths(Real(), tokenizer, tmp_path)
    opened = OpenSource(SourceConfig("laion"), Real(), lengths)
    with Batches(cfg, tokenizer, "rows", plan_only=True, opened=[opened]) as batches:
        for _ in range(20):
            next(batches)
        real = batches.statistics()
    simulated = simulate(cfg, [(distribution, 1.0)], count, hosts=8, steps=60)
    assert simulated.token_fill == pytest.approx(real["token_fill"], rel=0.1)
    assert simulated.image_fill == pytest.approx(real["image_fill"], rel=0.1)
    stored = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    tar_index = (SAMPLE_BYTES + 4) * count  # of its files
    assert simulated.index_bytes == pytest.approx(stored + tar_index, rel=0.1)
    huge = simulate(cfg, [(distribution, 1.0)], 10**10, hosts=8, steps=5)
    assert huge.index_bytes == pytest.approx(10**4 * simulated.index_bytes, rel=0.01)
    assert huge.memory_bytes < 4 * simulated.memory_bytes
    assert "10,000,000,000" in simulation_table([simulated, huge])


def test_distributions_by_name_and_file(tmp_path):
    for name in ("laion", "mmc4", "storyboards"):
        assert load_distribution(name).name == name
    with pytest.raises(UserError, match="no distribution of lengths 'lion'; did you mean 'laion'"):
        load_distribution("lion")
    (tmp_path / "x.json").write_text('{"outlines": [[-2]]}')
    with pytest.raises(UserError, match="x.json is not a distribution of lengths"):
        load_distribution(str(tmp_path / "x.json"))


def test_a_simulation_of_nothing_is_refused(capsys):
    config = str(Path(__file__).parent.parent / "configs" / "digits.py")
    for arguments, message in (
        (["laion=0.0"], "laion=0.0: write NAME=WEIGHT with a positive weight"),
        (["laion=."], "with a positive weight"),
        (["laion", "--steps", "0"], "must be positive"),
        (["laion", "--documents", "1000", "0"], "must be positive"),
    ):
        command = ["data", "simulate", "--config", config, "--lengths", *arguments]
        assert cli.main(command) == 2, arguments
        assert message in capsys.readouterr().err
