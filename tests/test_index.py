"""Arrays that are kept beside their files: whole, or noticed and made again."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from test_sources import TINY, make_image, shown, source, tar

from emu_jax.data import Document, Text
from emu_jax.data.documents import write_documents
from emu_jax.data.lengths import TokenLengths
from emu_jax.data.sources import SourceConfig, index, open_source
from emu_jax.data.sources.index import Checked, cached_arrays, index_files
from emu_jax.data.sources.spans import Spans, compact_spans
from emu_jax.errors import UserError
from emu_jax.tokenizer import Tokenizer

RNG = np.random.default_rng(0)
ARRAYS = {
    "sizes": RNG.integers(-1, 99, 9_000).astype(np.int32),
    "spans": RNG.integers(0, 1 << 40, (2_500, 4, 2)),
    "none": np.zeros(0, np.int8),
}
FILES = [*(f"{key}.{kind}" for key in ARRAYS for kind in ("npy", "crc")), "arrays.json"]


def make() -> dict[str, np.ndarray]:
    return dict(ARRAYS)


def assert_right(arrays: dict[str, np.ndarray]) -> None:
    assert arrays.keys() == ARRAYS.keys()
    for key, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[key], array)
        assert arrays[key].dtype == array.dtype


def damage(file: Path, rng: np.random.Generator) -> list[bytes | None]:
    """Contents that damage may leave of a file: none, a part, more, or one bit flipped."""
    content = file.read_bytes()
    places = {0, len(content) - 1, *rng.integers(len(content), size=6).tolist()} if content else ()
    flipped = []
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        flipped.append(bytes(changed))
    return [None, b"", content[:-1], content[: len(content) // 2], content + b"\0", *flipped]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("eager", [True, False])
def test_damaged_arrays_are_made_again(tmp_path, monkeypatch, caplog, name, eager):
    """With a warning, whatever has happened to a file; never is a wrong value given."""
    monkeypatch.setattr(index, "sync", lambda path: None)  # slow, and tested below
    if not eager:
        monkeypatch.setattr(index, "EAGER", 0)
    cached_arrays(tmp_path, "it", make)
    file, rng = tmp_path / "it" / name, np.random.default_rng(1)
    whole = file.read_bytes()
    for left in damage(file, rng):
        if left is None:
            file.unlink()
        else:
            file.write_bytes(left)
        same = left == whole
        caplog.clear()
        try:
            arrays = cached_arrays(tmp_path, "it", make)
            assert_right(arrays)
        except UserError as error:  # found in a large array, as it is looked up
            assert not eager and name.endswith(".npy")
            assert "run the same command again" in str(error)
            arrays = cached_arrays(tmp_path, "it", make)
            assert_right(arrays)
        assert same or "is damaged" in caplog.text
        assert all(isinstance(array, np.ndarray) == eager for array in arrays.values())
        assert file.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["it"]  # nothing is left behind


def test_a_large_array_is_checked_where_it_is_looked_up(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "EAGER", 0)
    rows = np.arange(50_000).reshape(-1, 2)
    arrays = cached_arrays(tmp_path, "it", lambda: {"rows": rows})
    file = tmp_path / "it" / "rows.npy"
    content = bytearray(file.read_bytes())
    content[128 + 16 * 10_000] ^= 1  # of row 10,000
    file.write_bytes(content)  # in place: mapped files see it
    lazy = arrays["rows"]
    assert isinstance(lazy, Checked) and (lazy.shape, len(lazy)) == (rows.shape, len(rows))
    for key in (0, -1, np.int64(24_999), (3, 1), slice(5, 9), slice(20_000, None), (-2, slice(1))):
        np.testing.assert_array_equal(lazy[key], rows[key])
    with pytest.raises(IndexError):
        lazy[len(rows)]
    for broken in (
        lambda: lazy[10_000],
        lambda: lazy[9_000:11_000],
        lambda: np.asarray(lazy),
        lambda: lazy[::2],
        lambda: lazy[[0, 1]],
        lambda: lazy.tolist(),
    ):
        with pytest.raises(UserError, match="rows.npy has changed.*run the same command again"):
            broken()
    assert not (tmp_path / "it").exists()
    again = cached_arrays(tmp_path, "it", lambda: {"rows": rows})["rows"]
    np.testing.assert_array_equal(again[10_000], rows[10_000])
    names = cached_arrays(
        tmp_path, "names", lambda: {"names": np.sort(RNG.integers(1 << 60, size=9_999))}
    )
    plain = np.array(names["names"])
    for value in (plain[77], plain[77] + 1, 0, plain[-1] + 1):
        for side in ("left", "right"):
            found = np.searchsorted(names["names"], value, side)
            assert found == np.searchsorted(plain, value, side)


def test_arrays_without_checksums_are_made_again(tmp_path, caplog):
    """As earlier versions kept them; and an empty folder, as a power cut may leave it."""
    for files in (["sizes.npy"], []):
        folder = tmp_path / f"it{len(files)}"
        folder.mkdir()
        for name in files:
            np.save(folder / name, np.zeros(3))
        caplog.clear()
        assert_right(cached_arrays(tmp_path, folder.name, make))
        assert "is damaged" in caplog.text and (folder / "arrays.json").is_file()


def test_where_nothing_can_be_kept_the_arrays_are_made(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert_right(cached_arrays(tmp_path / "file", "it", make))
    assert "cannot keep" in caplog.text and "is damaged" not in caplog.text


def test_a_folder_is_synced_before_it_has_its_name(tmp_path, monkeypatch):
    """Or a power cut leaves empty files under it."""
    synced, rename = [], index.os.rename

    def renamed(old, new):
        files = {str(p) for p in Path(old).iterdir()}
        assert len(files) == len(FILES) and {*files, str(old)} <= set(synced)
        synced.append("renamed")
        rename(old, new)

    monkeypatch.setattr(index.os, "rename", renamed)
    monkeypatch.setattr(index, "sync", lambda path: synced.append(str(path)))
    cached_arrays(tmp_path, "it", make)
    assert synced[-2:] == ["renamed", str(tmp_path)]


def test_sources_and_outlines_read_large_arrays_alike(tmp_path, monkeypatch):
    """Every index is looked up in ways that check what they read."""
    tar(
        tmp_path / "0.tar",
        {
            f"{n}.{kind}": content
            for n in range(3)
            for kind, content in (
                ("png", make_image(10 * n, "PNG")),
                ("txt", f"words {n}".encode()),
            )
        },
    )
    entries = [{"images": ["1.png", None], "texts": [None, "a page"]}]
    (tmp_path / "p.jsonl").write_text(json.dumps(entries[0]) + "\n")
    texts = [Document((Text("word " * n),)) for n in range(1, 9)]
    write_documents(tmp_path / "t.array_record", texts)
    tokenizer = Tokenizer.load(TINY / "tokenizer")
    monkeypatch.setattr(index, "_BLOCK", 128)

    def read() -> list:
        media = (str(tmp_path / "*.tar"),)
        pairs = source("webdataset", tmp_path / "0.tar")
        pages = source("pages", tmp_path / "p.jsonl", media=media)
        records = open_source(SourceConfig("it", "records", (f"{tmp_path}/t.array_record",)))
        lengths = TokenLengths(records, tokenizer, tmp_path / "cache")
        return [
            *map(shown, pairs),
            *map(shown, pages),
            lengths.totals(),
            lengths.damage(1),
            *(lengths[n] for n in range(len(lengths))),
        ]

    want = read()
    assert want[3] == [10, "a page"] and want[4]["documents"] == 8
    monkeypatch.setattr(index, "EAGER", 0)
    assert read() == want
    (sizes,) = (tmp_path / "cache").rglob("sizes.npy")
    content = bytearray(sizes.read_bytes())
    content[-1] ^= 1
    sizes.write_bytes(content)
    with pytest.raises(UserError, match="sizes.npy has changed"):
        read()
    assert read() == want


@pytest.mark.parametrize("folders", [2, 256])
def test_spans_that_do_not_fit_are_found_in_every_file(tmp_path, monkeypatch, folders):
    """Arrays of wide samples have fewer rows than the files have samples."""
    monkeypatch.setattr(index, "EAGER", 0)  # opened by file
    monkeypatch.setattr(index, "MOST_FOLDERS", folders)
    samples = np.zeros((3, 5, 2, 2), np.int64)
    samples[..., 0, 0] = 1024 * np.arange(15).reshape(3, 5)
    samples[..., 1, 0] = samples[..., 0, 0] + 512
    samples[..., 1] = 100
    samples[:, 1::2, :, 0] += 1  # not where a tar has its members
    paths = [str(tmp_path / f"{n}") for n in range(3)]
    for path in paths:
        Path(path).touch()

    def scan(path: str) -> dict[str, np.ndarray]:
        return compact_spans(samples[int(Path(path).name)], np.zeros(5, np.int64))

    arrays = index_files("spans", paths, scan, str(tmp_path / "cache"))
    spans = Spans(arrays, 2)
    assert np.asarray(arrays["wide_row"]).tolist() == [1, 3, 6, 8, 11, 13]
    for row, expected in enumerate(samples.reshape(15, 2, 2)):
        np.testing.assert_array_equal(spans[row], expected)


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_makes_is_not(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from emu_jax.data.sources import index\n"
        "index._save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "index.cached_arrays(Path(sys.argv[1]), 'it', dict)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert ended.returncode == -signal.SIGKILL
    (dead,) = tmp_path.iterdir()
    cached_arrays(tmp_path, "first", make)
    assert dead.is_dir()  # it is young

    living = Path(tempfile.mkdtemp(dir=tmp_path, prefix=index._temporary_prefix()))
    elsewhere = Path(tempfile.mkdtemp(dir=tmp_path, prefix=".making.other."))
    locked = index._lock(living)
    for folder in (dead, living, elsewhere):
        os.utime(folder, (0, 0))
    index._sweep.cache_clear()  # the next process
    cached_arrays(tmp_path, "second", make)
    os.close(locked)
    assert not dead.exists() and living.is_dir() and elsewhere.is_dir()
