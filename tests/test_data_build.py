"""`emu-jax data build`: what is kept, what is listed, and the same bytes whatever happens."""

import dataclasses
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import fsspec
import numpy as np
import PIL.Image
import pytest

from emu_jax import cli
from emu_jax.data import Document, Image, Text, lengths, storage
from emu_jax.data.build import build as build_module
from emu_jax.data.build.build import (
    BuildConfig,
    DocumentCounts,
    beam_runner,
    build,
    embedded,
)
from emu_jax.data.build.clean import (
    CleanConfig,
    Cleaned,
    Unfit,
    check_metadata,
    clean,
    store,
)
from emu_jax.data.documents import Damaged, DocumentFiles, Source, write_documents
from emu_jax.data.sources import SourceConfig, open_source
from emu_jax.errors import UserError
from emu_jax.tokenizer import Tokenizer

CLEAN = CleanConfig(max_side=32, min_side=8, max_aspect=4.0, min_similarity=0.3, max_text=40)


def encode(width: int, height: int, format: str = "JPEG", seed: int = 0, mode="RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).convert(mode).save(file, format)
    return file.getvalue()


def opened(image: Image) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(image.data))


def raw_documents(count: int) -> list[Document]:
    """Pairs of all formats and sizes; about one in six does not pass."""
    sizes = [(20, 17), (60, 45), (31, 32), (7, 20), (33, 12), (40, 9)]
    formats = ["JPEG", "PNG", "WEBP", "GIF", "BMP"]
    contents = [
        encode(*sizes[n % 6], format=formats[n % 5], seed=n) for n in range(min(count, 120))
    ]
    contents[17 % len(contents)] = contents[17 % len(contents)][:-60]
    return [
        Document((Image(contents[n % len(contents)]), Text(f"image number {n}")))
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("raw") / "raw.array_record"
    write_documents(path, raw_documents(90))
    return path


@pytest.fixture
def cfg(raw) -> BuildConfig:
    source = SourceConfig(name="small", format="records", paths=(str(raw),))
    return BuildConfig(source=source, clean=CLEAN, shard_documents=25)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# One document


def test_images_that_are_small_enough_keep_their_bytes():
    for format in ("JPEG", "PNG", "WEBP"):
        image = Image(encode(31, 32, format), time=1.5, similarity=0.4)
        assert store(image, CLEAN) is image
    assert opened(store(Image(encode(31, 32, "GIF")), CLEAN)).format == "JPEG"


def test_images_are_made_smaller_and_encoded():
    image = Image(encode(100, 53), time=1.5, similarity=0.4)
    stored = store(image, CLEAN)
    assert (opened(stored).size, opened(stored).format) == ((32, 17), "JPEG")
    assert stored == dataclasses.replace(image, data=stored.data)
    narrow = store(Image(encode(40, 3000, "PNG")), CleanConfig(encoding="png"))
    assert (opened(narrow).size, opened(narrow).format) == ((7, 512), "PNG")
    webp = store(Image(encode(64, 64, "BMP")), CleanConfig(max_side=16, encoding="webp"))
    assert (opened(webp).size, opened(webp).format) == ((16, 16), "WEBP")
    grey = opened(store(Image(encode(64, 20, "PNG", mode="L")), CLEAN))
    assert (grey.size, grey.mode) == ((32, 10), "L")
    assert store(Image(encode(99, 12)), CleanConfig(max_side=0)).data == encode(99, 12)

    smooth = np.linspace(0, 255, 64)[None, :, None].repeat(48, 0).repeat(3, 2).astype(np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(smooth).save(file, "PNG")
    stored = np.asarray(opened(store(Image(file.getvalue()), CLEAN)), int)
    expected = np.asarray(
        PIL.Image.fromarray(smooth).resize((32, 24), PIL.Image.Resampling.BICUBIC), int
    )
    assert np.abs(stored - expected).max() <= 4
    noise = Image(encode(600, 600))
    coarse, fine = (len(store(noise, CleanConfig(quality=q)).data) for q in (30, 95))
    assert 2 * coarse < fine


@pytest.mark.parametrize(
    "image, reason, detail",
    [
        (Image(encode(7, 20)), "image too small", "7x20"),
        (Image(encode(9, 40)), "image too narrow", "9x40"),
        (Image(encode(31, 32), similarity=0.29), "unlike its words", "0.290"),
        (Image(encode(31, 32)[:-60]), "unreadable image", "truncated"),
        (Image(b"none"), "unreadable image", "unknown image format"),
    ],
)
def test_images_that_do_not_pass(image, reason, detail):
    with pytest.raises(Unfit) as unfit:
        store(image, CLEAN)
    assert unfit.value.reason == reason and detail in unfit.value.detail


def test_a_page_loses_the_images_that_do_not_pass():
    good, small = Image(encode(20, 20)), Image(encode(5, 5))
    page = Document((Text("one"), small, Text("two"), good, small))
    cleaned = clean(page, CLEAN)
    assert cleaned.document == Document((Text("one"), Text("two"), good))
    assert [drop.part for drop in cleaned.dropped] == [1, 4]
    assert (cleaned.images, cleaned.encoded) == (3, 0)
    cleaned = clean(Document((Text("one"), small, small)), CLEAN)
    assert (cleaned.document, cleaned.reason) == (None, "image too small")
    assert len(cleaned.dropped) == 2


def test_words_that_do_not_pass():
    limits = CleanConfig(min_text=3, max_text=6)
    for texts, reason in (
        (("  ab ",), "text too short"),
        (("abc", "defg"), "text too long"),
        (("",), "empty"),
        (("abc", "def"), ""),
        ((" abc ",), ""),
    ):
        document = Document(tuple(map(Text, texts)))
        cleaned = clean(document, limits)
        assert cleaned.reason == reason
        assert cleaned.document == (None if reason else document)
    words = Document((Text("words alone"),))
    assert clean(words, CLEAN) == Cleaned(words)


# A whole source


def test_build(tmp_path, raw, cfg):
    manifest = build(tmp_path / "out", cfg, embedded(1))
    documents = list(DocumentFiles([raw]))
    expected = [clean(document, CLEAN) for document in documents]
    kept = [cleaned.document for cleaned in expected if cleaned.document]
    shards = sorted((tmp_path / "out").glob("small-*.array_record"))
    assert [path.name for path in shards] == [
        f"small-{n:05d}-of-00004.array_record" for n in range(4)
    ]
    assert list(DocumentFiles(shards)) == kept
    assert 50 < len(kept) < 90

    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest.to_json()
    counts, images = manifest.documents, manifest.images
    assert (counts.read, counts.written) == (90, len(kept))
    assert counts.rejected == images.dropped
    assert counts.rejected.keys() == {
        "image too small",
        "image too narrow",
        "unreadable image",
    }
    assert sum(counts.rejected.values()) == 90 - len(kept)
    assert (images.read, images.written) == (90, len(kept))
    assert images.encoded == sum(cleaned.encoded for cleaned in expected) > 20
    assert [shard.bytes for shard in manifest.shards] == [p.stat().st_size for p in shards]

    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    rejected = [n for n, cleaned in enumerate(expected) if cleaned.document is None]
    assert [json.loads(line)["document"] for line in lines] == rejected
    line = json.loads(lines[rejected.index(17)])
    assert (line["where"], line["reason"]) == (f"{raw} record 17", "unreadable image")


def test_the_same_bytes_whatever_happened(tmp_path, cfg, monkeypatch):
    folder = tmp_path / "out"
    build(folder, cfg, embedded(1))
    whole = contents(folder)
    build(tmp_path / "threads", cfg, embedded(1, threads=3))
    assert contents(tmp_path / "threads") == whole

    remote = f"memory://{tmp_path.name}/out"
    build(remote, cfg, embedded(1))
    fs = fsspec.filesystem("memory")
    assert {name: fs.cat(f"{remote}/{name}") for name in storage.names(remote)} == whole

    built = []
    original = build_module.build_shard

    def spy(shard, threads):
        built.append(shard.number)
        return original(shard, threads)

    monkeypatch.setattr(build_module, "build_shard", spy)
    build(folder, cfg, embedded(1))
    assert built == []
    # Cut short, vanished, without its counts, and what killed writers leave.
    path = folder / "small-00001-of-00004.array_record"
    path.write_bytes(path.read_bytes()[:100])
    (folder / "small-00002-of-00004.array_record").unlink()
    (folder / "small-00003-of-00004.json").unlink()
    (folder / "manifest.json").unlink()
    (folder / ".small-00001-of-00004.array_record.abc").write_bytes(b"half")
    (folder / ".manifest.json.abc").write_bytes(b"half")
    build(folder, cfg, embedded(1))
    assert built == [1, 2, 3]
    assert contents(folder) == whole
    # Names in the files of earlier versions.
    path = folder / "small-00000-of-00004.json"
    former = path.read_text().replace('"images": {', '"pictures": {')
    for key in ('"image"', "image too", "unreadable image"):
        former = former.replace(key, key.replace("image", "picture"))
    assert former.count("picture") > 5
    path.write_text(former)
    (folder / "small-00001-of-00004.json").unlink()
    build(folder, cfg, embedded(1))
    assert built == [1, 2, 3, 1]
    assert contents(folder) == whole | {path.name: former.encode()}
    fs.rm(f"{remote}/small-00002-of-00004.array_record")
    build(remote, cfg, embedded(1))
    assert built == [1, 2, 3, 1, 2]


def test_tars_and_pages(tmp_path, capsys):
    """Sources of other formats: their damage and their scores are counted."""
    samples = {
        "a.jpg": encode(40, 30),
        "a.txt": b"a cat",
        "b.jpg": encode(40, 30)[:-80],
        "b.txt": b"cut",
        "c.jpg": encode(40, 30),
        "c.txt": b"\xff\xfe",
        "d.jpg": encode(40, 30),
        "d.json": b'{"caption": "a dog"}',
    }
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, content in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    command = [
        "data",
        "build",
        f"{tmp_path}/*.tar",
        f"{tmp_path}/out",
        "--format",
        "webdataset",
        "--json",
    ]
    assert cli.main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["documents"] == {
        "read": 4,
        "written": 2,
        "rejected": {"invalid UTF-8": 1, "unreadable image": 1},
    }
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["paired"] is True
    built = DocumentFiles([tmp_path / "out" / "pairs-00000-of-00001.array_record"])
    assert [d.parts[1] for d in built] == [Text("a cat"), Text("a dog")]
    assert built[0].parts[0] == Image(samples["a.jpg"])

    (tmp_path / "p.png").write_bytes(encode(9, 9, "PNG"))
    shown = [
        {"image_name": "p.png", "matched_text_index": n, "matched_sim": similarity}
        for n, similarity in enumerate((0.31, 0.33))
    ]
    page = {"text_list": ["one", "two"], "image_info": shown}
    (tmp_path / "pages.jsonl").write_text(json.dumps(page) + "\n{broken\n")
    command = ["data", "build", f"{tmp_path}/pages.jsonl", f"{tmp_path}/pages", "--format", "pages"]
    assert cli.main([*command, "--name", "pages", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["documents"] == {"read": 2, "written": 1, "rejected": {"malformed JSON": 1}}
    assert result["images"]["dropped"] == {"unlike its words": 1}
    built = DocumentFiles([tmp_path / "pages" / "pages-00000-of-00001.array_record"])
    image = Image(encode(9, 9, "PNG"), similarity=0.33)
    assert built[0].parts == (Text("one"), image, Text("two"))


class Failing(Source):
    """Record 3 is damaged; from record 6 on the store fails until `mended`."""

    fingerprint, mended = "f", False

    def __len__(self):
        return 10

    def where(self, index):
        return f"place {index}"

    def read(self, index, seed=None, part_indices=None):
        if index == 3:
            raise Damaged("damaged record", self.where(index), "why")
        if index >= 6 and not self.mended:
            raise UserError("cannot read the store, tried 5 times")
        return Document((Text(f"words {index}"),))


@pytest.fixture
def failing(monkeypatch):
    source = Failing()
    monkeypatch.setattr(build_module, "open_source", lambda cfg: source)
    build_module._source.cache_clear()
    yield source
    build_module._source.cache_clear()


def test_damage_is_listed_and_a_store_that_fails_is_not(tmp_path, failing, capsys):
    cfg = BuildConfig(source=SourceConfig(name="f"), shard_documents=2)
    with pytest.raises(UserError, match="cannot read the store"):
        build(tmp_path, cfg, embedded(1, threads=2))
    assert not (tmp_path / "manifest.json").exists()
    assert len(list(tmp_path.glob("*.array_record"))) == 3
    failing.mended = True
    manifest = build(tmp_path, cfg, embedded(1))
    assert manifest.documents == DocumentCounts(10, written=9, rejected={"damaged record": 1})
    (line,) = (tmp_path / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "document": 3,
        "where": "place 3",
        "reason": "damaged record",
        "detail": "place 3: damaged record (why)",
    }
    assert capsys.readouterr().err.splitlines()[-1].startswith("f: 10 of 10 documents, ")


def test_a_source_that_changed_is_noticed(tmp_path, failing):
    cfg = BuildConfig(source=SourceConfig(name="f"), shard_documents=2)
    failing.mended = True

    def runner(shards):
        build_module._source.cache_clear()
        failing.fingerprint = "g"
        return embedded(1)(shards)

    with pytest.raises(UserError, match="source 'f' is not the same here"):
        build(tmp_path, cfg, runner)


# Filters by metadata

META = {
    "original_width": 640,
    "original_height": 480,
    "similarity": 0.31,
    "punsafe": 0.1,
    "pwatermark": 0.2,
    "LANGUAGE": "en",
    "meta": {"phash": "f0"},
}
FILTERS = CleanConfig(
    min_original_side=100,
    max_original_aspect=3.0,
    min_clip_score=0.28,
    max_nsfw=0.5,
    max_watermark=0.8,
    languages=("en", "de"),
    duplicate_key="meta.phash",
)


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        ({}, "", ""),
        ({"original_height": 99}, "original too small", "640x99"),
        ({"original_width": None, "width": 90, "height": 400}, "original too small", "90x400"),
        ({"original_width": 2000}, "original too narrow", "2000x480"),
        ({"similarity": 0.279}, "CLIP score too low", "0.279"),
        ({"similarity": float("nan")}, "no metadata", "similarity"),
        ({"punsafe": 0.6}, "unsafe", "0.600"),
        ({"punsafe": "UNSURE"}, "", ""),
        ({"punsafe": "NSFW"}, "unsafe", "1.000"),
        ({"punsafe": None}, "no metadata", "punsafe"),
        ({"pwatermark": "0.81"}, "watermark", "0.810"),
        ({"LANGUAGE": "fr"}, "other language", "fr"),
        ({"LANGUAGE": None}, "no metadata", "LANGUAGE"),
    ],
)
def test_metadata_that_do_not_pass(change, reason, detail):
    check_metadata({}, CleanConfig())
    try:
        check_metadata(META | change, FILTERS)
        assert not reason
    except Unfit as error:
        assert (error.reason, error.detail) == (reason, detail)


def test_filters_by_metadata_are_counted(tmp_path):
    """The first duplicate that passes is kept, wherever shards end."""
    hashes = ["a", "a", "b", None, "b", "a", None, "c", "b"]
    rows = [
        {"q": f"what is {n}?", "a": "it", **META, "meta": json.dumps({"phash": key})}
        for n, key in enumerate(hashes)
    ]
    rows[0]["punsafe"] = 0.9
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig("d", "dialogues", (str(tmp_path / "d.jsonl"),))
    cfg = BuildConfig(source, FILTERS, shard_documents=2)
    manifest = build(tmp_path / "out", cfg, embedded(1))
    rejected = {"duplicate": 3, "unsafe": 1}
    assert manifest.documents == DocumentCounts(9, written=5, rejected=rejected)
    rejections = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in rejections]
    assert [line["document"] for line in lines] == [0, 4, 5, 8]
    whole = contents(tmp_path / "out")
    for name in ("d-00001-of-00005.json", "d-00002-of-00005.keys.npy"):
        (tmp_path / "out" / name).unlink()
    build(tmp_path / "out", cfg, embedded(1))
    assert contents(tmp_path / "out") == whole
    # A folder that an earlier version began, without these filters.
    old = BuildConfig(source, shard_documents=9)
    build(tmp_path / "old", old, embedded(1))
    begun = json.loads((tmp_path / "old" / "build.json").read_text())
    del begun["clean"]["duplicate_key"], begun["source"]["url_files"]
    (tmp_path / "old" / "build.json").write_text(json.dumps(begun))
    build(tmp_path / "old", old, embedded(1))
    with pytest.raises(UserError, match="of clean.duplicate_key  rather than x"):
        build(
            tmp_path / "old",
            dataclasses.replace(old, clean=CleanConfig(duplicate_key="x")),
            embedded(1),
        )


# Mistakes


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(shard_documents=0), "at least 1 document, not 0"),
        (dict(clean=dict(encoding="jpg")), "unknown encoding 'jpg'; did you mean 'jpeg'"),
        (dict(clean=dict(quality=0)), "quality must be in 1 .. 100"),
        (dict(source=SourceConfig(name="a/b", paths=("x",))), "'a/b' cannot be one"),
    ],
)
def test_values_that_cannot_be(tmp_path, cfg, raw, change, message):
    if "source" in change:
        change = dict(source=dataclasses.replace(cfg.source, name=change["source"].name))
    with pytest.raises(UserError, match=message):
        if "clean" in change:
            change = dict(clean=CleanConfig(**change["clean"]))
        build(tmp_path / "out", dataclasses.replace(cfg, **change), embedded(1))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else(tmp_path, cfg):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="not empty and holds no build: give an empty folder"):
        build(tmp_path, cfg, embedded(1))
    build(tmp_path / "out", cfg, embedded(1))
    for change, difference in (
        (dict(shard_documents=30), "shard_documents 25 rather than 30"),
        (dict(clean=CleanConfig(max_side=16)), "clean.max_text 40 rather than 0"),
    ):
        other = dataclasses.replace(cfg, **change)
        with pytest.raises(UserError, match=f"another build, of {difference}: give an empty"):
            build(tmp_path / "out", other, embedded(1))
    (tmp_path / "out" / "build.json").write_text("{")
    with pytest.raises(UserError, match="build.json is damaged"):
        build(tmp_path / "out", cfg, embedded(1))


def test_a_build_that_loses_all_images_is_an_error(tmp_path):
    """Also where other documents are words alone."""
    broken = Document((Image(encode(31, 32)[:-60]), Text("words")))
    small = Document((Image(encode(7, 7)), Text("words")))
    for reason, document in (("unreadable image", broken), ("image too small", small)):
        path = tmp_path / f"{reason}.array_record"
        write_documents(path, [document, Document((Text("alone"),))])
        source = SourceConfig("it", "records", (str(path),))
        with pytest.raises(UserError, match=f"none of its images can be used .{reason}: 1; "):
            build(tmp_path / reason, BuildConfig(source, CleanConfig(min_side=8)), embedded(1))


def test_a_build_that_writes_nothing_is_an_error(tmp_path, raw, capsys):
    """Whose line counts the reasons; also when it is run again."""
    command = [
        "data",
        "build",
        str(raw),
        str(tmp_path / "out"),
        "--format",
        "records",
        "--workers",
        "1",
        "--set",
        "clean.min_text=1000",
    ]
    for _ in range(2):
        assert cli.main(command) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "source 'pairs': none of its documents can be used (text too short: 90; " in error
        assert f"{raw} record 0: " in error and "rejected.jsonl" in error
        assert not (tmp_path / "out" / "manifest.json").exists()
    assert len((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()) == 90


def test_what_readers_leave_out_is_counted(tmp_path, capsys):
    said = [
        {"from": who, "value": value}
        for who, value in (
            ("gpt", "to nothing"),
            ("human", "one"),
            ("gpt", "two"),
            ("human", "three"),
        )
    ]
    listing = tmp_path / "d.json"
    listing.write_text(json.dumps([{"conversations": said}, {"q": "four", "a": "five"}] * 2))
    command = ["data", "build", str(listing), str(tmp_path / "out"), "--format", "dialogues"]
    assert cli.main([*command, "--workers", "1", "--shard-documents", "3"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["documents"] == {"read": 4, "written": 4, "rejected": {}}
    left = {"answer without a question": 2, "question without an answer": 2}
    assert manifest["unused"] == left
    assert "  2 unused: answer without a question" in capsys.readouterr().out.splitlines()
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert len(lines) == 4 and json.loads(lines[2]) == {
        "document": 2,
        "where": f"{listing} entry 2",
        "unused": "answer without a question",
        "detail": "to nothing",
    }


def test_no_documents_and_two_builds_at_once(tmp_path, cfg):
    empty = tmp_path / "empty.array_record"
    write_documents(empty, [])
    nothing = dataclasses.replace(cfg.source, paths=(str(empty),))
    with pytest.raises(UserError, match="source 'small' has no documents"):
        build(tmp_path / "out", dataclasses.replace(cfg, source=nothing), embedded(1))
    (tmp_path / "out").mkdir()
    handle = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(UserError, match="another process is building in"):
            build(tmp_path / "out", cfg, embedded(1))
    finally:
        os.close(handle)


# The command


def test_command(tmp_path, raw, capsys):
    command = [
        "data",
        "build",
        str(raw),
        str(tmp_path / "out"),
        "--format",
        "records",
        "--name",
        "laion",
        "--set",
        "clean.min_side=8",
        "--set",
        "clean.max_side=32",
        "--workers",
        "1",
    ]
    assert cli.main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["documents"]["read"] == 90
    assert json.loads(Path(result["manifest"]).read_text())["documents"] == result["documents"]
    assert cli.main(command) == 0
    first, *reasons = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path / 'out'}: {result['documents']['written']} of 90 documents")
    assert "  15 documents rejected: image too small" in reasons


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("data",), "unknown verb 'data'; known: bench, "),
        (("data", "buidl"), "unknown verb 'data buidl'; did you mean 'data build'?"),
        (("data", "build", "x", "--format", "records"), "required: DST"),
        (("data", "build", "a", "b", "--format", "recrods"), "unknown format 'recrods'; did you"),
        (("data", "build", "a", "b", "--format", "records", "--set", "clean.min=1"), "'clean.min'"),
        (
            ("data", "build", "a", "b", "--format", "records", "--set", "clean"),
            "write --set clean=VALUE",
        ),
    ],
)
def test_mistakes_in_flags(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# Many processes


def children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_half_way_and_started_again(tmp_path):
    raw, killed = tmp_path / "raw.array_record", tmp_path / "killed"
    write_documents(raw, raw_documents(20_000))
    command = [
        sys.executable,
        "-m",
        "emu_jax.cli",
        "data",
        "build",
        str(raw),
        str(killed),
        "--format",
        "records",
        "--name",
        "small",
        "--shard-documents",
        "1000",
        "--workers",
        "2",
        "--set",
        "clean.max_side=32",
        "--set",
        "clean.min_side=8",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    try:
        wait_for(lambda: len(list(killed.glob("small-*.json"))) >= 10, 300)
        workers = children(process.pid)
        assert len(workers) >= 2
    finally:
        os.kill(process.pid, signal.SIGKILL)  # the parent alone: its workers must notice
        process.communicate()
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), 60)
    done = len(list(killed.glob("small-*.json")))
    assert 10 <= done < 20 and not (killed / "manifest.json").exists()
    times = {path: path.stat().st_mtime_ns for path in killed.glob("small-*.json")}
    again = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert f"{done} of 20 shards are there already" in again.stderr
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())

    source = SourceConfig("small", "records", (str(raw),), min_similarity=-1.0)
    cfg = BuildConfig(source, CleanConfig(max_side=32, min_side=8), shard_documents=1000)
    manifest = build(tmp_path / "whole", cfg, embedded(1, threads=2))
    assert json.loads(again.stdout)["documents"] == manifest.to_json()["documents"]
    assert manifest.documents.read == 20_000
    assert contents(killed) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_worker_that_dies_is_one_clear_line(tmp_path, cfg):
    def runner(shards):
        yielded = embedded(2)(shards)
        yield next(yielded)
        for worker in children(os.getpid()):
            if "spawn_main" in Path(f"/proc/{worker}/cmdline").read_text():
                os.kill(worker, signal.SIGKILL)
        yield from yielded

    many = dataclasses.replace(cfg, shard_documents=1)
    with pytest.raises(UserError, match="a worker was killed.*run the same command again"):
        build(tmp_path / "out", many, runner)
    build(tmp_path / "out", many, embedded(1))
    build(tmp_path / "whole", many, embedded(1))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_token_counts_are_built_for_training(tmp_path, monkeypatch, caplog):
    """They equal those of a scan, and no document is opened for them."""
    monkeypatch.setattr(lengths, "_CHUNK", 8)  # parts begin and end within shards
    words = ["", " one ", "two words", "three"]
    image = Image(encode(8, 8, "PNG"))
    documents = [Document((image, Text(words[n % 4]), Text("x" * n))) for n in range(30)]
    write_documents(tmp_path / "raw.array_record", documents)
    tokenizer = Tokenizer.train(words, 300)
    tokenizer.save(tmp_path / "tokenizer")
    source = SourceConfig("it", "records", (str(tmp_path / "raw.array_record"),))
    cfg = BuildConfig(source, shard_documents=11, tokenizer=str(tmp_path / "tokenizer"))
    build(tmp_path / "out", cfg, embedded(1))
    opened = []
    read = DocumentFiles.read
    monkeypatch.setattr(DocumentFiles, "read", lambda *args: opened.append(1) or read(*args))

    def counted(name: str, by: Tokenizer) -> dict[str, bytes]:
        records = open_source(dataclasses.replace(source, paths=(str(tmp_path / "out"),)))
        lengths.TokenLengths(records, by, tmp_path / name)
        return {p.name: p.read_bytes() for p in sorted((tmp_path / name).rglob("*.npy"))}

    known = counted("known", tokenizer)
    assert not opened and "instead" not in caplog.text
    other = Tokenizer.train(["other words"], 300)
    counted("other", other)
    assert len(opened) == 30 and caplog.text.count("counted with another tokenizer") == 1
    (first, *_, last) = sorted((tmp_path / "out").glob("*.lengths.npz"))
    caplog.clear()
    first.write_bytes(last.read_bytes())  # of a shard with fewer documents
    assert counted("swapped", tokenizer) == known
    assert len(opened) == 60 and caplog.text.count("does not fit") == 1
    last.write_bytes(last.read_bytes()[:-9])
    first.unlink()
    assert counted("cut", tokenizer) == known
    assert len(opened) == 90 and caplog.text.count("is damaged") == 1
    other.save(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="holds another build, of tokenizer_files"):
        build(tmp_path / "out", cfg, embedded(1))


def test_beam_writes_the_same_bytes(tmp_path, cfg):
    pytest.importorskip("apache_beam")
    build(tmp_path / "beam", cfg, beam_runner(["--runner=DirectRunner"]))
    build(tmp_path / "out", cfg, embedded(1))
    assert contents(tmp_path / "beam") == contents(tmp_path / "out")


def test_without_beam(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match="Apache Beam is not installed: pip install"):
        beam_runner([])
