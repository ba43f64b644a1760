"""Files that documents name: only regular files of bounded size are read; writes are whole."""

import json
import os
import socket

import pytest
from test_sources import TINY, lines, make_image, reasons, shown, source, tar, video

from emu_jax.data import Document, Text, storage
from emu_jax.data.documents import MOST_CHARACTERS, write_documents
from emu_jax.data.lengths import TokenLengths
from emu_jax.data.sources import SourceConfig, open_source
from emu_jax.errors import UserError
from emu_jax.tokenizer import Tokenizer


def test_only_regular_files_of_bounded_size_are_read(tmp_path, monkeypatch):
    """Anything else would block, never end, or fill the memory."""
    media = tmp_path / "media"
    media.mkdir()
    (media / "good.png").write_bytes(make_image(40, "PNG"))
    os.mkfifo(media / "pipe.jpg")
    (media / "zero.jpg").symlink_to("/dev/zero")
    (media / "loop.jpg").symlink_to("loop.jpg")
    (media / "folder.jpg").mkdir()
    with open(media / "huge.jpg", "wb") as file:
        file.truncate(storage.MOST_IMAGE + 1)  # a hole: no space is taken
    with open(media / "huge.srt", "wb") as file:
        file.truncate(storage.MOST_TEXT + 1)
    monkeypatch.chdir(media)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.jpg")
    names = ("good.png", "pipe.jpg", "socket.jpg", "zero.jpg", "folder.jpg", "huge.jpg", "loop.jpg")
    asked = [{"image": name, "q": "what?", "a": "it"} for name in names]
    dialogues = source("dialogues", lines(tmp_path / "d.jsonl", asked), media=(str(media),))
    other = "not a regular file"
    assert reasons(dialogues) == {
        1: other,
        2: other,
        3: other,
        4: other,
        5: "file too large",
        6: "missing file",
    }
    boards = [
        {"storyboard": s, "rows": 1, "columns": 1, "frames": 1, "duration": 1, "subtitles": t}
        for s, t in (("good.png", "pipe.jpg"), ("good.png", "huge.srt"))
    ]
    boards = source("subtitled", lines(tmp_path / "b.jsonl", boards), media=(str(media),))
    assert reasons(boards) == {0: other, 1: "file too large"}


@pytest.mark.parametrize("form", ["webdataset", "dialogues"])
def test_a_source_that_is_not_a_regular_file_is_one_clear_line(tmp_path, form):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"source 'it': .*pipe: not a regular file \(a pipe\)"):
        source(form, tmp_path / "pipe")


def test_large_members_and_entries_are_damage(tmp_path, monkeypatch):
    """With limits that a test can reach; the real ones hold for what really comes."""
    tar(
        tmp_path / "0.tar",
        {
            "a.png": make_image(40, "PNG"),
            "a.txt": b"x" * 100,
            "b.png": make_image(40, "PNG"),
            "b.txt": b"x" * 101,
            "c.mp4": video(5),
            "c.txt": b"x",
        },
    )
    monkeypatch.setattr("emu_jax.data.sources.pairs._MOST", (1 << 30, 1000, 100, 100))
    assert reasons(source("webdataset", tmp_path)) == dict.fromkeys((1, 2), "file too large")
    entries = [{"q": "what?", "a": "it"}, {"q": "what?", "a": "its"}]
    monkeypatch.setattr(storage, "MOST_ENTRY", len(json.dumps(entries[0])))
    assert reasons(source("dialogues", lines(tmp_path / "d.jsonl", entries))) == {
        1: "file too large"
    }


def test_a_text_that_no_row_can_hold_is_damage(tmp_path):
    long = "word " * (MOST_CHARACTERS // 5)
    path = tmp_path / "a.array_record"
    write_documents(path, [Document((Text(long), Text(long))), Document((Text("short"),))])
    documents = open_source(SourceConfig("it", "records", (str(path),)))
    lengths = TokenLengths(documents, Tokenizer.load(TINY / "tokenizer"), tmp_path)
    assert [lengths.damage(n) for n in range(2)] == ["text too large", None]


def test_only_an_asterisk_is_special_in_a_path(tmp_path):
    """Folders may be called [v1]; a bracket is a glob's only where nothing has that name."""
    entry = [{"q": "what?", "a": "it"}]
    for folder in ("[v1]", "v", "1?", "a[b"):
        (tmp_path / folder).mkdir()
        lines(tmp_path / folder / "x.jsonl", entry)
    (tmp_path / "12").mkdir()
    for n in range(3):
        lines(tmp_path / f"s{n}.jsonl", entry)
    lines(tmp_path / "[v1]" / "y*.jsonl", entry)

    def found(pattern: str) -> list[str]:
        paths = storage.expand([f"{tmp_path}/{pattern}"], [".jsonl"])
        return [os.path.relpath(path, tmp_path) for path in paths]

    assert found("[v1]/*.jsonl") == ["[v1]/x.jsonl", "[v1]/y*.jsonl"]
    assert found("[v1]/y*.jsonl") == found("[v1]/y*") == ["[v1]/y*.jsonl"]
    assert found("1?/*.jsonl") == ["1?/x.jsonl"]
    assert found("a[b/*") == ["a[b/x.jsonl"]
    assert found("s[01]*.jsonl") == ["s0.jsonl", "s1.jsonl"]
    assert shown(source("dialogues", tmp_path / "[v1]" / "*.jsonl")[0])[-1] == "it"


def test_a_file_is_synced_before_it_has_its_name(tmp_path, monkeypatch):
    """And its folder afterwards; else a power cut leaves it empty, or without a name."""
    target = tmp_path / "a.txt"
    steps = []
    monkeypatch.setattr(
        "emu_jax.storage.sync",
        lambda path: steps.append((os.path.isdir(path), target.exists())),
    )
    with storage.writing_data_file(str(target)) as temporary:
        temporary.write_text("whole")
    assert steps == [(False, False), (True, True)] and target.read_text() == "whole"
