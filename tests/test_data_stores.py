"""Data in object stores (emulators on the loopback) is read as local data is, byte for byte."""

import dataclasses
import logging
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import fsspec
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from test_data import assert_equal, take
from test_mixture import WORDS, pairs, tokenizer  # noqa: F401
from test_sources import lines, make_image, tar, video

from emu_jax.config import CFormerConfig, EmuConfig, LlamaConfig, VAEConfig
from emu_jax.data import Batches, DataConfig, file_cache, lengths, storage
from emu_jax.data.documents import Damaged, write_documents
from emu_jax.data.file_cache import FileCache
from emu_jax.data.latents import LatentBatches, PartWriter, Progress, finish, latent_shapes
from emu_jax.data.records import StoreRecords, _sparse
from emu_jax.data.sources import SourceConfig, open_source
from emu_jax.data.sources import index as index_module
from emu_jax.data.sources.index import Checked, cached_arrays
from emu_jax.errors import UserError
from emu_jax.storage import StorePath, as_path, create_text, files


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with a source of each kind."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("data")
    for n in range(2):
        (folder / "r").mkdir(exist_ok=True)
        write_documents(folder / "r" / f"{n}.array_record", pairs(20 + n))
    (folder / "w").mkdir()
    for n in range(2):
        members = {}
        for k in range(5):
            members |= {f"{k}.jpg": make_image(20 * k + 10 * n), f"{k}.txt": WORDS[k].encode()}
        tar(folder / "w" / f"{n}.tar", members)
    (folder / "media" / "deep").mkdir(parents=True)
    for n in range(4):
        name = f"deep/{n}.png" if n % 2 else f"{n}.png"
        (folder / "media" / name).write_bytes(make_image(30 * n, "PNG"))
    (folder / "media" / "v.mp4").write_bytes(video(12))
    names = ["0.png", "deep/1.png", "2.png", "deep/3.png"]
    page = {"images": [*names, None], "texts": [None, None, None, None, "seven"]}
    lines(folder / "pages.jsonl", [page] * 3)
    lines(folder / "videos.jsonl", [{"video": "v.mp4", "text": "two three"}] * 2)

    class StoredLabels(tfds.core.GeneratorBasedBuilder):  # a name that no other test registers
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            label = tfds.features.ClassLabel(names=["cat", "dog"])
            features = {"image": tfds.features.Image(), "label": label}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for n in range(6):
                image = str(folder / "media" / ("deep/1.png" if n % 2 else "2.png"))
                yield n, {"image": image, "label": n % 2}

    builder = StoredLabels(data_dir=folder / "tfds", file_format="array_record")
    builder.download_and_prepare()
    Path(builder.data_dir).rename(folder / "labels")
    return folder


def upload(folder: Path, url: str) -> None:
    fs = fsspec.filesystem(url.partition("://")[0])
    for path in folder.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"{url}/{path.relative_to(folder)}", path.read_bytes())


SOURCES = {
    "records": ("records", "r", {"paired": True}),
    "webdataset": ("webdataset", "w/*.tar", {}),
    "tfds": ("tfds", "labels:train", {}),
    "pages": ("pages", "pages.jsonl", {"media": ("media",)}),
    "videos": ("videos", "videos.jsonl", {"media": ("media",), "frames": 2}),
}


def config(root: str, tmp_path: Path, **changes) -> DataConfig:
    def settings(more: dict[str, Any]) -> dict[str, Any]:
        return {k: _placed(root, v) for k, v in more.items()}

    sources = tuple(
        SourceConfig(name, form, (f"{root}/{path}",), **settings(more))
        for name, (form, path, more) in SOURCES.items()
    )
    return DataConfig(
        sources=sources,
        cache=str(tmp_path / f"cache-{root[:2]}"),
        batch_size=2,
        row_tokens=60,
        row_images=6,
        n_causal=2,
        image_size=4,
        target_size=6,
        block_documents=16,
        prefetch=0,
        **changes,
    )


def _placed(root: str, value):
    return tuple(f"{root}/{v}" for v in value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("store", ["gs", pytest.param("s3", marks=pytest.mark.slow)], indirect=True)
def test_batches_are_equal_to_local_ones(store, data, tmp_path, tokenizer):  # noqa: F811
    """Also through a period in which the store answers 503."""
    upload(data, store.folder)
    with Batches(config(str(data), tmp_path), tokenizer, "rows") as batches:
        local, documents = take(batches, 5), batches.documents()
    with Batches(config(store.folder, tmp_path), tokenizer, "rows") as batches:
        remote = take(batches, 3)
        store.refuse(0.5)
        remote += take(batches, 2)
        assert batches.documents() == documents and not batches.damaged()
        assert batches.statistics()["damaged"] == {}
    for a, b in zip(local, remote, strict=True):
        assert_equal(a, b)


def test_listings_take_one_request(gcs, data, monkeypatch):
    """Not one for each image, file of records or tar."""
    monkeypatch.setattr(storage, "_LISTED", 2)
    upload(data, gcs.folder)
    pages = open_source(
        SourceConfig("p", "pages", (f"{gcs.folder}/pages.jsonl",), media=(f"{gcs.folder}/media",))
    )
    gcs.requests.clear()
    for number in range(len(pages)):
        assert not pages.sketch(number).unused
    asked = [name for _, name in gcs.requests if "media" in name]
    assert len(asked) == len(set(asked)) == 2  # media/ and media/deep/
    paths = [f"{gcs.folder}/r/{n}.array_record" for n in range(2)]
    gcs.requests.clear()
    found = storage.stats(paths)
    assert len(gcs.requests) == 1
    gcs.requests.clear()
    assert storage.existing([*paths, f"{gcs.folder}/r/2.array_record"]) == set(paths)
    assert len(gcs.requests) == 1
    # Last: gcsfs asks twice for a file, and the second answer may come late.
    assert found == [storage.stat(path) for path in paths]


def test_a_missing_permission_is_one_clear_line(store, data):
    upload(data, store.folder)
    records = open_source(SourceConfig("it", "records", (f"{store.folder}/r",)))
    tars = open_source(SourceConfig("it", "webdataset", (f"{store.folder}/w",)))
    store.deny(store.folder, "GET")
    began = time.monotonic()
    for read in (
        lambda: records[0],
        lambda: tars[0],
        lambda: open_source(SourceConfig("it", "records", (f"{store.folder}/r",))),
    ):
        with pytest.raises(UserError, match="no permission") as error:
            read()
        assert not isinstance(error.value, Damaged) and "\n" not in str(error.value)
        assert store.folder in str(error.value)
    assert time.monotonic() - began < 5  # not retried


def test_damage_of_remote_records_is_that_of_the_file(gcs, tmp_path):
    path = tmp_path / "a.array_record"
    write_documents(path, pairs(60))
    content = bytearray(path.read_bytes())
    content[2000:2100] = bytes(100)
    fs = fsspec.filesystem("gs")
    fs.pipe_file(f"{gcs.folder}/a.array_record", bytes(content))
    fs.pipe_file(f"{gcs.folder}/cut.array_record", bytes(content[:-50_000]))
    documents = open_source(SourceConfig("it", "records", (f"{gcs.folder}/a.array_record",)))
    damaged = 0
    for number in range(len(documents)):
        try:
            documents[number]
        except Damaged as error:
            assert error.reason == "damaged record"
            damaged += 1
    assert 0 < damaged < 30
    with pytest.raises(UserError, match="cut.array_record is cut short or damaged"):
        open_source(SourceConfig("it", "records", (f"{gcs.folder}/cut.array_record",)))


def test_records_are_read_by_ranges(s3, tmp_path):
    """Whatever their compression, and how many are in a chunk; transposed files are copied."""
    rng = np.random.default_rng(0)
    content = [rng.bytes(int(rng.integers(1, 9000))) + bytes(n) for n in range(40)]
    fs, cache = fsspec.filesystem("s3"), FileCache(tmp_path / "files", 1 << 30)
    for options in ("group_size:1", "group_size:7,brotli", "group_size:64,snappy"):
        writer = ArrayRecordWriter(str(tmp_path / "a"), options)
        for record in content:
            writer.write(record)
        writer.close()
        fs.put_file(str(tmp_path / "a"), f"{s3.folder}/{options}")
        s3.requests.clear()
        records = StoreRecords(
            f"{s3.folder}/{options}", storage.stat(f"{s3.folder}/{options}"), cache
        )
        assert len(records.spans(0)) == 2  # the footer too, until a record was read
        order = rng.permutation(40)
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(records.__getitem__, order)) == [content[n] for n in order]
        # Its size, its end twice, and a request for each record.
        assert len(s3.requests) <= 3 + 40 + 4 and not cache.folder.exists()
        assert all(len(records.spans(n)) == 1 for n in range(40))
        # Nothing but the footer stays in memory.
        footer = records.size - records.footer()[0]
        status = os.fstat(_sparse(records)._handle)
        assert 512 * status.st_blocks < footer + (1 << 14)
    writer = ArrayRecordWriter(str(tmp_path / "a"), "group_size:1,transpose:true")
    writer.write(content[0])
    writer.close()
    fs.put_file(str(tmp_path / "a"), f"{s3.folder}/a")
    copied = StoreRecords(f"{s3.folder}/a", storage.stat(f"{s3.folder}/a"), cache)
    assert copied[0] == content[0]


def test_documents_are_requested_ahead(s3, data, tmp_path, tokenizer):  # noqa: F811
    """While a batch is decoded, the records of the next one are on their way."""
    upload(data, s3.folder)
    cfg = config(s3.folder, tmp_path)
    cfg = dataclasses.replace(cfg, sources=cfg.sources[:1], batch_size=1)
    documents = open_source(cfg.sources[0])
    for number in (0, 40):  # opens both files
        documents.read(number)
    s3.requests.clear()
    with Batches(cfg, tokenizer, "rows") as batches:
        # Listings, and the ends of the files. Counting the tokens of 41 documents takes four.
        assert len(s3.requests) < 20
        s3.requests.clear()
        take(batches, 1)
        first, requested = batches.documents(), set(storage._ahead._requests)
        take(batches, 1)
        second = batches.documents()
    spans = {span for _, n in second for span in documents.spans(n)}
    assert spans <= requested and len(spans) == len(second) > 1
    # Records that lie close together take one request.
    assert len(s3.requests) < len(first) + len(second)


def test_precomputed_latents_are_written_and_read_in_a_store(store, tmp_path, tokenizer):  # noqa: F811
    model = EmuConfig(
        cformer=CFormerConfig(n_causal=2),
        llama=LlamaConfig(width=6, heads=1),
        unet=None,
        vae=VAEConfig(
            sample_size=4, block_out_channels=(8, 8), latent_channels=1, norm_num_groups=8
        ),
    )
    condition, latents = latent_shapes(model)
    batches = []
    for folder in (tmp_path / "latents", as_path(f"{store.folder}/latents")):
        for process in range(2):
            writer = PartWriter(folder, 0, process)
            for n in range(process * 4, process * 4 + 4):
                writer.add(np.full(condition, float(n)), np.full(latents, float(n)))
            writer.close()
        assert Progress.of(folder, "run") == Progress("run")
        progress = Progress("run").after(folder, rows=8, processes=2, position=None)
        assert Progress.of(folder, "run") == progress
        empty = np.full(condition, -1.0)
        finish(folder, progress, model=model, unconditional=empty, tokenizer=tokenizer)
        with pytest.raises(UserError, match="holds latents already"):
            Progress.of(folder, "run")
        with LatentBatches(folder, DataConfig(batch_size=4, prefetch=0), model) as read:
            batches.append(take(cast(Any, read), 3))
    for a, b in zip(*batches, strict=True):
        assert_equal(a, b)


def test_the_root_of_the_data_in_a_store(gcs, tmp_path, tokenizer):  # noqa: F811
    batches = []
    for root in (str(tmp_path / "root"), f"{gcs.folder}/root"):
        for name in ("pairs-0", "pairs-1", "pages"):
            write_documents(f"{root}/train/{name}.array_record", pairs(8))
        tokenizer.save(as_path(root) / "tokenizer")
        cfg = DataConfig(
            root=root,
            mixture={"pairs": 1.0, "pages": 1.0},
            batch_size=2,
            row_tokens=40,
            row_images=4,
            n_causal=2,
            image_size=4,
            target_size=6,
            block_documents=8,
            prefetch=0,
        )
        with Batches(cfg, cfg.load_tokenizer(), "rows") as read:
            batches.append(take(read, 3))
    for a, b in zip(*batches, strict=True):
        assert_equal(a, b)


# Copies of remote files


@pytest.fixture
def megabytes(s3) -> list[str]:
    """Three remote files of a megabyte."""
    fs = fsspec.filesystem("s3")
    for n in range(3):
        fs.pipe_file(f"{s3.folder}/{n}", bytes([n]) * (1 << 20))
    return [f"{s3.folder}/{n}" for n in range(3)]


def copies(cache: FileCache) -> list[str]:
    return sorted(p.name[17:] for p in cache.folder.iterdir() if p.suffix != ".lock")


def use(cache: FileCache, path: str) -> bytes:
    with cache.reading(path, storage.stat(path)) as copy:
        return copy.read_bytes()


def test_the_least_recently_used_copy_is_evicted(s3, megabytes, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(file_cache, "RANGE_BYTES", 1 << 18)
    cache = FileCache(tmp_path / "files", 2 << 20)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / ".0123-left.tmp").write_bytes(bytes(1 << 20))  # of a killed process
    assert use(cache, megabytes[0]) == bytes(1 << 20)
    assert use(cache, megabytes[1]) == b"\1" * (1 << 20)
    use(cache, megabytes[0])
    downloads = len(s3.requests)
    assert use(cache, megabytes[2]) == b"\2" * (1 << 20)
    assert copies(cache) == ["0", "2"]
    assert len(s3.requests) - downloads == 1 + 4  # its size, and its four ranges
    with caplog.at_level(logging.WARNING):
        assert use(cache, megabytes[1]) == b"\1" * (1 << 20)
    assert "evicted and is downloaded again" in caplog.text
    assert copies(cache) == ["1", "2"]
    with pytest.raises(UserError, match="1,048,576 bytes, more than .*raise data.cache_bytes"):
        use(FileCache(tmp_path / "small", 1 << 19), megabytes[0])


def test_a_copy_in_use_is_not_evicted(s3, megabytes, tmp_path, monkeypatch):
    monkeypatch.setattr(file_cache, "WAIT_SECONDS", 0.2)
    cache = FileCache(tmp_path / "files", 1 << 20)
    stat = storage.stat(megabytes[0])
    with cache.reading(megabytes[0], stat) as copy:
        with pytest.raises(UserError, match="full of files in use.*raise data.cache_bytes"):
            use(cache, megabytes[1])
        assert copy.read_bytes() == bytes(1 << 20)
    reader = open(copy, "rb")  # still open, but not in use
    assert use(cache, megabytes[1]) == b"\1" * (1 << 20)
    assert os.fstat(reader.fileno()).st_size == 0  # its space is free
    reader.close()


def test_a_full_disk_is_one_clear_line(s3, megabytes, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    cache = FileCache(tmp_path / "files", 2 << 20)
    with pytest.raises(UserError, match=r"cannot cache s3://.*\(the disk is full, .*free space"):
        use(cache, megabytes[0])
    assert copies(cache) == []


# Indexes and token counts in a store


def test_one_process_counts_and_all_read(gcs, data, tmp_path, tokenizer, monkeypatch):  # noqa: F811
    """Hosts that share a cache in a store download what the first of them made."""
    monkeypatch.setattr(index_module, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(lengths, "_CHUNK", 16)
    cfg = config(str(data), tmp_path)
    cfg = dataclasses.replace(cfg, sources=cfg.sources[:2], cache=f"{gcs.folder}/cache")
    counts = 0
    count = lengths._count

    def counting(*args):
        nonlocal counts
        counts += 1
        return count(*args)

    monkeypatch.setattr(lengths, "_count", counting)

    def host(number: int):
        with Batches(cfg, tokenizer, "rows") as batches:
            return take(batches, 1)

    with ThreadPoolExecutor(2) as pool:  # at the same time
        batches = list(pool.map(host, range(2)))
    assert counts == 4  # three chunks of records, one of tars
    for eager in (index_module.EAGER, 0):  # other hosts; the last one fetches what it looks up
        shutil.rmtree(tmp_path / "user")
        monkeypatch.setattr(index_module, "EAGER", eager)
        monkeypatch.setattr(lengths, "EAGER", eager)
        batches.append(host(2))
    assert counts == 4
    for others in batches[1:]:
        for a, b in zip(batches[0], others, strict=True):
            assert_equal(a, b)
    left = [path.name for path in files(as_path(f"{gcs.folder}/cache"))]
    assert not [name for name in left if name.endswith(".claim")]


def test_arrays_of_a_store_are_made_again_if_damaged(gcs, monkeypatch, caplog):
    """And if the process that claimed them has ended."""
    monkeypatch.setattr(index_module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(index_module, "STALE_SECONDS", 0.05)
    folder, local = as_path(f"{gcs.folder}/cache"), storage.user_cache()
    create_text(folder / "a.claim", "of a killed process")
    for value in (1, 2):
        made = cached_arrays(folder, "a", lambda v=value: {"x": np.full(3, v)})
        assert made["x"].tolist() == [value] * 3
        shutil.rmtree(local)
        if value == 1:
            assert cached_arrays(folder, "a", dict)["x"].tolist() == [1] * 3
            shutil.rmtree(local)
            (folder / "a" / "x.npy").write_bytes(b"damaged")
    assert "is gone; making it here" in caplog.text and "is damaged" in caplog.text
    gcs.deny(f"{gcs.folder}/cache", "POST")
    monkeypatch.setattr(index_module, "RENEW_SECONDS", 0.01)
    assert cached_arrays(folder, "b", lambda: {"x": np.ones(2)})["x"].tolist() == [1, 1]
    assert "cannot keep" in caplog.text


def test_a_large_index_in_a_store_is_fetched_where_it_is_looked_up(s3, monkeypatch):
    """With its checksums. Its rest comes in the background."""
    completed, later = [], index_module._completed_later
    monkeypatch.setattr(index_module, "_completed_later", completed.append)
    monkeypatch.setattr(index_module, "_REST_SECONDS", 0.0)
    folder = StorePath(f"{s3.folder}/cache")
    local = index_module._local_folder(folder)
    rows = np.random.default_rng(0).integers(1 << 40, size=(100_000, 2))
    arrays = {"rows": rows, "few": np.arange(9)}
    cached_arrays(folder, "it", lambda: arrays, eager=1 << 12)
    shutil.rmtree(local)  # another host

    def opened() -> dict[str, Any]:
        return cast(dict[str, Any], cached_arrays(folder, "it", dict, eager=1 << 12))

    s3.sent = 0
    found = opened()
    assert found["few"].tolist() == list(range(9)) and isinstance(found["rows"], Checked)
    far = np.array([99_999, 7, 50_000])
    np.testing.assert_array_equal(found["rows"].take(far), rows[far])
    np.testing.assert_array_equal(found["rows"][2_000:4_000], rows[2_000:4_000])
    assert 5 << 14 < s3.sent < 9 << 14 < rows.nbytes // 10
    s3.sent = 0
    np.testing.assert_array_equal(opened()["rows"].take(far), rows[far])  # a new process
    assert s3.sent == 0

    # Damaged there: found where it is looked up, and made again.
    content = bytearray((folder / "it" / "rows.npy").read_bytes())
    content[128 + 16 * 50_000] ^= 1
    shutil.rmtree(local)
    (folder / "it" / "rows.npy").write_bytes(content)
    found = opened()["rows"]
    np.testing.assert_array_equal(found.take(far[:2]), rows[far[:2]])
    with pytest.raises(UserError, match=r"rows.npy has changed.*run the same command again"):
        found.take(far)
    assert not (folder / "it" / "arrays.json").exists() and not (local / "it").exists()
    again = cached_arrays(folder, "it", lambda: arrays, eager=1 << 12)
    np.testing.assert_array_equal(again["rows"].take(far), rows[far])

    shutil.rmtree(local)
    opened()
    index_module._incomplete.cache_clear()  # arrays of other tests may be waiting
    later(completed[-1])
    deadline = time.monotonic() + 30
    while completed[-1]._left and time.monotonic() < deadline:
        time.sleep(0.01)
    s3.deny(f"{s3.folder}/cache")
    np.testing.assert_array_equal(opened()["rows"], rows)
