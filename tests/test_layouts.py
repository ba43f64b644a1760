"""Data sets as they are published: OBELICS, img2dataset, video2dataset, DataComp."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_sources import agrees, lines, make_image, reasons, shown, source, tar, video

from emu_jax.data import storage
from emu_jax.data.documents import Damaged
from emu_jax.data.sources import SourceConfig, entries, parquet
from emu_jax.data.sources.entries import look_up
from emu_jax.data.sources.open import missing_files
from emu_jax.errors import UserError

URLS = [f"https://x.org/{n}.jpg?w=1" for n in range(4)]
PAGES = [
    {
        "images": [URLS[n % 4], None, URLS[(n + 1) % 4]],
        "texts": [None, f"page {n}", None],
        "metadata": json.dumps([{"src": URLS[n % 4]}, None, {"src": "x"}]),
        "general_metadata": json.dumps({"url": f"https://x.org/{n}", "lang": "en"}),
    }
    for n in range(5)
]


def write_parquet(path, rows: list[dict], group: int = 2):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


@pytest.fixture
def obelics(tmp_path):
    """OBELICS with its images as img2dataset downloads them: one URL failed."""
    write_parquet(tmp_path / "train-00000.parquet", PAGES)
    (tmp_path / "images").mkdir()
    tar(
        tmp_path / "images" / "00000.tar",
        {f"00000000{n}.jpg": make_image(10 * n + 20) for n in range(3)},
    )
    rows = [
        {"url": url, "key": f"00000000{n}", "status": "success" if n < 3 else "failed_to_download"}
        for n, url in enumerate(URLS)
    ]
    write_parquet(tmp_path / "images" / "00000.parquet", rows)
    return tmp_path


@pytest.mark.parametrize("urls", ["parquet", "jsonl"])
def test_obelics_as_it_is_published(obelics, urls):
    if urls == "jsonl":
        (obelics / "images" / "00000.parquet").unlink()
        rows = [{"url": url, "file": f"00000000{n}.jpg"} for n, url in enumerate(URLS[:3])]
        lines(obelics / "images" / "00000.jsonl", rows)
    pages = source(
        "pages",
        obelics / "*.parquet",
        media=(str(obelics / "images" / "*.tar"),),
        url_files=(str(obelics / "images"),),
    )
    assert [shown(page) for page in pages] == [
        [20, "page 0", 30],
        [30, "page 1", 40],
        [40, "page 2"],
        ["page 3", 20],
        [20, "page 4", 30],
    ]
    assert [u.detail for u in pages[2].unused] == [URLS[3]]
    assert pages.unused().unused == ({} if urls == "jsonl" else {"URL without a file": 1})
    assert agrees(pages) and pages.where(3).endswith("train-00000.parquet entry 3")


def test_urls_without_a_mapping_are_named(obelics):
    pages = source("pages", obelics)  # the Parquet files of a folder without other listings
    assert shown(pages[0]) == ["page 0"]
    assert "a URL: set url_files" in pages[0].unused[0].detail
    lines(obelics / "pages.jsonl", PAGES[:1])
    assert len(source("pages", obelics)) == 1  # which may be what was converted
    with pytest.raises(UserError, match="no columns `url` and `file`"):
        source("pages", obelics, url_files=(str(obelics / "pages.jsonl"),))
    absent = SourceConfig("it", "pages", (str(obelics),), url_files=(str(obelics / "no"),))
    assert missing_files(absent) == [
        f"source 'it': nothing is at {obelics / 'no'}: no file that ends in .jsonl, .jsonl.gz, "
        ".jsonl.zip, .json, .json.gz, .json.zip, .parquet"
    ]


def test_row_groups_are_read_when_they_are_needed(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", [{"n": n, "no": None} for n in range(9)])
    groups, decode = [], parquet._group
    monkeypatch.setattr(parquet, "_group", lambda *a: groups.append(a[2]) or decode(*a))
    rows = entries.Entries([str(path)], "")
    assert len(rows) == 9 and not groups
    assert rows[5] == {"n": 5} and rows[4] == {"n": 4} and groups == [2]
    monkeypatch.setattr(parquet, "_DECODED", 0)
    assert [rows[n]["n"] for n in (0, 1, 8, 0)] == [0, 1, 8, 0]
    assert groups == [2, 0, 4, 0]  # one group at a time is in memory
    path.unlink()  # a missing file is not a damaged document
    with pytest.raises(UserError, match="a.parquet cannot be read") as error:
        rows[2]
    assert not isinstance(error.value, Damaged)


def test_a_listing_or_tar_that_is_gone_is_no_damage(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n')
    rows = entries.Entries([str(tmp_path / "a.jsonl")], "")
    tar(tmp_path / "a.tar", {"0.jpg": make_image(8), "0.txt": b"words"})
    samples = source("webdataset", tmp_path / "a.tar")
    for path, read in (("a.jsonl", lambda: rows[0]), ("a.tar", lambda: samples[0])):
        (tmp_path / path).unlink()
        storage.refresh()
        with pytest.raises(UserError, match=f"{path} cannot be read .*restore it") as error:
            read()
        assert not isinstance(error.value, Damaged)


def test_a_damaged_row_group_loses_its_rows(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", PAGES)
    at = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[at : at + 40] = bytes(40)
    path.write_bytes(content)
    assert reasons(source("pages", path)) == {2: "damaged record", 3: "damaged record"}


def test_images_inside_a_parquet_file(tmp_path):
    image = {"bytes": make_image(50), "path": None}
    path = write_parquet(tmp_path / "a.parquet", [{"images": [image, None], "texts": [None, "x"]}])
    pages = source("pages", path)
    assert shown(pages[0]) == [50, "x"] and agrees(pages)


def test_img2dataset_video2dataset_and_datacomp(tmp_path):
    meta = {"url": URLS[0], "key": "000000000", "status": "success", "width": 24, "height": 16}
    tar(
        tmp_path / "00000.tar",
        {  # img2dataset
            "000000000.jpg": make_image(20),
            "000000000.txt": b"a cat",
            "000000000.json": json.dumps(meta | {"caption": "a cat", "exif": "{}"}).encode(),
            # DataComp: no text file, and boxes of faces
            "000000001.webp": make_image(40, "WEBP"),
            "000000001.json": json.dumps(
                meta | {"uid": "ab", "caption": "a dog", "face_bboxes": [[0.1, 0.2, 0.3, 0.4]]}
            ).encode(),
        },
    )
    (tmp_path / "00000.parquet").write_bytes(b"")  # img2dataset's, beside the tar
    (tmp_path / "00000_stats.json").write_bytes(b"{}")
    pairs = source("webdataset", tmp_path)
    assert list(map(shown, pairs)) == [[20, "a cat"], [40, "a dog"]]
    youtube = {"info": {"title": "the title", "tags": ["a", "b"]}, "subtitles": {}}
    clip = {"clips": [[0.0, 2.0]], "clip_subtitles": [{"start": "0", "lines": ["hello", "you"]}]}
    files = {  # video2dataset
        "000000_00000.mp4": video(6),
        "000000_00000.m4a": b"",
        "000000_00000.json": json.dumps({"yt_meta_dict": youtube, **clip}).encode(),
    }
    path = tar(tmp_path / "v.tar", files)
    for key, words in (
        ("yt_meta_dict.info.title", "the title"),
        ("yt_meta_dict.info.tags", "a"),
        ("clip_subtitles.0.lines.1", "you"),
    ):
        videos = source("webdataset", path, frames=2, caption_key=key)
        assert shown(videos[0])[2:] == [words]
    assert set(videos.unused().unused) == {"other member"}
    with pytest.raises(Damaged, match="no caption"):
        source("webdataset", path, frames=2, caption_key="yt_meta_dict.title")[0]


def test_look_up():
    values = {
        "a": {"b.c": 1, "b": {"c": 2, "d": [{"e": 3}, {"e": 4}]}},
        "s": '{"x": [5]}',
        "t": "x",
    }
    assert [look_up(values, key) for key in ("a.b.c", "a.b.d.e", "a.b.d.1.e", "s.x.0")] == [
        1,
        [3, 4],
        4,
        5,
    ]
    assert [look_up(values, key) for key in ("b", "a.x", "a.b.d.2.e", "t.x", "s.y")] == [None] * 5
