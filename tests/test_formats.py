"""Compressed listings are read; what is in another format is named, never taken for damage."""

import gzip
import json
import zipfile

import pytest
from test_sources import lines, make_image, shown, source, tar

from emu_jax.errors import UserError

ENTRIES = [{"q": f"what is {n}?", "a": f"it is {n}"} for n in range(300)]


def zipped(path, files: dict[str, bytes]):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("kind", ["jsonl.gz", "json.gz", "jsonl.zip"])
def test_compressed_listings_are_read_as_the_plain_ones(tmp_path, kind, caplog):
    plain = lines(tmp_path / "plain.jsonl", ENTRIES).read_bytes()
    if kind.startswith("json."):
        plain = json.dumps(ENTRIES, indent=1).encode()
    (tmp_path / "in").mkdir()
    packed = tmp_path / "in" / f"d.{kind}"
    if kind.endswith("gz"):
        packed.write_bytes(gzip.compress(plain))
    else:
        zipped(packed, {"__MACOSX/x": b"", "docs/d.jsonl": plain})
    want = list(map(shown, source("dialogues", tmp_path / "plain.jsonl")))
    read = source("dialogues", tmp_path / "in")
    assert len(want) == 300 and list(map(shown, read)) == want
    assert read.where(7) == f"{packed} entry 7"
    # A bit that flips in the unpacked copy is noticed when it is opened, and it is made again.
    (copy,) = (tmp_path / "in" / ".emu_jax").rglob("content.npy")
    content = bytearray(copy.read_bytes())
    content[-20] ^= 1
    copy.write_bytes(content)
    again = source("dialogues", tmp_path / "in")
    assert again.fingerprint == read.fingerprint
    assert list(map(shown, again)) == want and "content.npy has changed" in caplog.text


def test_images_lie_beside_a_compressed_listing(tmp_path):
    (tmp_path / "a.png").write_bytes(make_image(40, "PNG"))
    entry = json.dumps({"image": "a.png", "q": "what?", "a": "it"}).encode()
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(entry))
    (dialogue,) = source("dialogues", tmp_path / "d.jsonl.gz")
    assert 40 in shown(dialogue)


# Without the time, so that every worker of pytest gives the cases the same names.
GZIP = gzip.compress(b"x" * 99, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", GZIP, "d.jsonl is compressed with gzip.*: gzip -dc .*d.jsonl > "),
        ("d.jsonl.zst", b"\x28\xb5\x2f\xfd...", "compressed with zstd.*: zstd -dc .* > .*d.jsonl$"),
        ("d.jsonl.bz2", b"BZh9...", "compressed with bzip2"),
        ("d.jsonl", b"PK\x03\x04...", "d.jsonl is a zip archive"),
        ("d.jsonl", b"PAR1...PAR1", "is in the Parquet format: give it a name that ends in .par"),
        ("d.parquet", b"PAR1...PAR1", "d.parquet is cut short or not a Parquet file.*download it"),
        ("d.json", "[{}]".encode("utf-16"), "is in UTF-16"),
        (
            "d.json",
            b"version https://git-lfs.github.com/spec/v1\noid",
            "Git LFS pointer.*git lfs pull",
        ),
        ("d.jsonl.gz", GZIP[:-9], "cannot unpack .*: download or unpack it again"),
        ("d.jsonl.gz", b"{}", "cannot unpack .*Not a gzipped file"),
        ("d.jsonl.zip", b"{}", "cannot unpack .*not a zip file"),
    ],
)
def test_other_formats_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"source 'it': .*{message}") as error:
        source("dialogues", tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_folder_without_listings_says_what_it_has(tmp_path):
    for n in range(5):
        (tmp_path / f"{n}.csv").write_bytes(b"a,b")
    with pytest.raises(UserError, match=r"no file that ends in .jsonl.* \(it has 0.csv, 1."):
        source("dialogues", tmp_path)


def test_compressed_tars_are_named(tmp_path):
    whole = tar(tmp_path / "x.tar", {"a.png": make_image(40, "PNG"), "a.txt": b"one"}).read_bytes()
    (tmp_path / "0.tar").write_bytes(gzip.compress(whole))
    with pytest.raises(UserError, match="0.tar is compressed with gzip"):
        source("webdataset", tmp_path / "0.tar")
    (tmp_path / "0.tar").unlink()
    (tmp_path / "x.tar.gz").write_bytes(b"")  # of which x.tar was unpacked
    assert len(source("webdataset", tmp_path)) == 1
    for name in ("y.tar.gz", "z.tgz"):
        (tmp_path / name).write_bytes(gzip.compress(whole))
        with pytest.raises(UserError, match=f"{name} is compressed, which is not read"):
            source("webdataset", tmp_path)
        (tmp_path / name).unlink()


def test_a_listing_is_not_read_twice(tmp_path):
    plain = lines(tmp_path / "d.jsonl", ENTRIES[:1]).read_bytes()
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(plain))
    with pytest.raises(UserError, match="d.jsonl.gz and .*d.jsonl are one listing"):
        source("dialogues", tmp_path)
    zipped(tmp_path / "e.jsonl.zip", {"a.jsonl": plain, "b.jsonl": plain})
    with pytest.raises(UserError, match="e.jsonl.zip holds 2 files"):
        source("dialogues", tmp_path / "e.jsonl.zip")
