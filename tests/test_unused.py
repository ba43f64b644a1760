"""Nothing is left out without a count: used and counted together are what is there."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from emu_jax.data import DataConfig, Document, Image, Text
from emu_jax.data.batches import RowBuilder
from emu_jax.data.documents import REASONS, write_documents
from emu_jax.data.lengths import TokenLengths
from emu_jax.data.mixture import open_groups
from emu_jax.data.pipeline import Batches
from emu_jax.data.sources import FORMATS, SourceConfig, open_source
from emu_jax.data.sources.video import storyboard
from emu_jax.data.unused import EXAMPLES, Tally
from emu_jax.errors import UserError
from emu_jax.tokenizer import Tokenizer

TINY = Path(__file__).parent / "golden" / "tiny"
COUNT = 30  # documents; every third is odd


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(TINY / "tokenizer", instruct=True)


def make_image(n: int = 100) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (12, 8), (n, n, n)).save(file, "PNG")
    return file.getvalue()


def lines(path: Path, entries: list) -> Path:
    path.write_text("".join(e if isinstance(e, str) else json.dumps(e) + "\n" for e in entries))
    return path


Made = tuple[dict, dict[str, int], dict[str, int]]  # settings, what is used, what is not


def make_records(folder: Path) -> Made:
    odd = [
        Document(()),
        Document((Text(" "),)),
        Document((Image(make_image()), Text(""))),
        Document((Text("x" * (1 << 22) + "x"),)),
        Document((Text(""), Text("a"))),
    ]
    sound = Document((Image(make_image()), Text("words")))
    documents = [odd[n // 3 % 5] if n % 3 == 0 else sound for n in range(COUNT)]
    write_documents(folder / "a.array_record", documents)
    return (
        {"paths": (str(folder / "a.array_record"),)},
        {"documents": 24, "images": 22, "texts": 22},
        {"empty document": 4, "empty text": 6, "text too large": 2},
    )


def make_webdataset(folder: Path) -> Made:
    def member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.type = len(content), kind
        archive.addfile(info, io.BytesIO(content))

    with tarfile.open(folder / "a.tar", "w") as archive:
        for n in range(COUNT):
            key, way = f"{n:03}", n // 3 % 10 if n % 3 == 0 else None
            key += ".v1" * (way == 0)
            member(f"{key}.{'jpg' if way != 1 else 'heic'}", make_image() if way != 2 else b"")
            words = {3: b"", 4: b"\xff", 5: b" "}.get(way or -1, b"words")
            if way != 6:
                member(f"{key}.txt", words)
            if way == 7:
                member(f"{key}.json", b'{"caption": ')  # is not read: there is a text
                member(f"{key}.npy", b"array")
            if way == 8:
                member(f"{key}.caption", b"beside a text")
            if way == 9:
                member(f"{key}.png", b"", tarfile.SYMTYPE)
        member("README", b"of no sample")
    return (
        {"paths": (str(folder / "a.tar"),)},
        {"documents": 24, "images": 24, "texts": 24},
        {"incomplete sample": 5, "invalid UTF-8": 1, "other member": 3, "duplicate member": 2},
    )


def make_pages(folder: Path) -> Made:
    (folder / "images" / "0").mkdir(parents=True)
    for name in ("there", "0/below", "0/twice", "1/twice"):
        (folder / "images" / name).parent.mkdir(exist_ok=True)
        (folder / "images" / f"{name}.png").write_bytes(make_image())

    def page(*images: str | None, texts: tuple[str | None, ...] = ("a",), **info) -> dict:
        matched = {"matched_text_index": 0, "matched_sim": 0.5} | info
        return {"text_list": texts, "image_info": [{"image_name": i} | matched for i in images]}

    odd = [
        page("absent.png"),
        page(None, "there.png"),
        page("twice.png"),
        page("there.png", matched_sim=0.1),
        page("there.png", texts=("", "b")),
        page("there.png", texts=(None,)),
        page("there.png", matched_text_index=7),
        "not json\n",
        {"images": ["there.png", None], "texts": [None, None]},
        page("../images/there.png", texts=()),
    ]
    sound = page("there.png", "below.png")
    pages = [odd[n // 3 % 10] if n % 3 == 0 else sound for n in range(COUNT)]
    listing = lines(folder / "pages.jsonl", pages)
    return (
        {"paths": (str(listing),), "media": (str(folder / "images"),)},
        {"documents": 26, "images": 43, "texts": 25},
        {
            "missing image": 1,
            "ambiguous image": 1,
            "no image": 2,
            "image unlike its text": 1,
            "empty text": 1,
            "malformed entry": 3,
            "malformed JSON": 1,
        },
    )


def make_videos(folder: Path) -> Made:
    (folder / "a.mp4").write_bytes(b"not opened while tokens are counted")
    sound = {"video": "a.mp4", "text": "words"}
    odd = [
        {"video": "absent.mp4", "text": "x"},
        {"video": "a.mp4"},
        {"text": "x"},
        {"video": "a.mp4", "text": ["x"]},
        "[1]\n",
        "7\n",
        {"video": "a.mp4", "caption": ""},
        {"video": "a.mp4", "text": None, "caption": "x"},
        {"video": ["a.mp4"], "text": "x"},
        "{\n",
    ]
    entries = [odd[n // 3 % 10] if n % 3 == 0 else sound for n in range(COUNT)]
    return (
        {"paths": (str(lines(folder / "videos.jsonl", entries)),), "frames": 2},
        {"documents": 21, "images": 42, "texts": 20},
        {"missing file": 1, "malformed entry": 5, "malformed JSON": 3, "empty text": 1},
    )


def make_subtitled(folder: Path) -> Made:
    files = {
        "a.srt": "1\n00:00:00,500 --> 00:00:01,000\nfirst\n\n"
        "2\n00:00:02,000 --> 00:00:03,000\nsecond\n",
        "empty.srt": "",
        "none.srt": "words without a time\n",
        "odd.json": '[{"text": "first", "start": 0.5}, {"text": "x"}, {"text": "", "start": 1}]',
    }
    for name, content in files.items():
        (folder / name).write_text(content)
    (folder / "0.png").write_bytes(make_image())
    sound = {
        "storyboard": "0.png",
        "rows": 1,
        "columns": 2,
        "frames": 2,
        "duration": 2,
        "subtitles": "a.srt",
    }
    odd = [
        sound | {"subtitles": "absent.srt"},
        sound | {"subtitles": "none.srt"},
        sound | {"subtitles": "empty.srt"},
        sound | {"storyboard": "absent.png"},
        sound | {"frames": 3},
        sound | {"rows": 0},
        sound | {"subtitles": "odd.json"},
        sound | {"storyboard": ["0.png", "0.png"]},
        sound | {"duration": None},
        "{}\n",
    ]
    entries = [odd[n // 3 % 10] if n % 3 == 0 else sound for n in range(COUNT)]
    return (
        {"paths": (str(lines(folder / "boards.jsonl", entries)),)},
        {"documents": 23, "images": 46, "texts": 43},
        {
            "missing file": 2,
            "malformed subtitles": 1,
            "malformed entry": 4,
            "unused sheet": 1,
            "unreadable subtitle cue": 1,
            "empty subtitle cue": 1,
        },
    )


def make_dialogues(folder: Path) -> Made:
    (folder / "a.png").write_bytes(make_image())

    def talk(*said: tuple[str, object], **more: object) -> dict:
        return {"conversations": [{"from": who, "value": value} for who, value in said]} | more

    asked, told = ("human", "<image> what?"), ("gpt", "words")
    sound = talk(asked, told, image="a.png")
    odd = [
        talk(asked, told, image="absent.png"),
        talk(asked, image="a.png"),
        talk(told, asked, told, image="a.png"),
        talk(asked, ("gpt", ""), ("human", "and?"), told, image="a.png"),
        talk(("human", "words"), told),
        talk(("someone", "words"), told),
        talk(asked, told, image=["a.png", "a.png"]),
        "{\n",
        talk(asked, told, ("human", "and?"), image="a.png"),
        talk(("human", "what?"), told, image="a.png", tools="x"),
    ]
    entries = [odd[n // 3 % 10] if n % 3 == 0 else sound for n in range(COUNT)]
    return (
        {"paths": (str(lines(folder / "talk.jsonl", entries)),)},
        # Before and after what a user says stand [USER] and [ASSISTANT]; the first has no image.
        {"documents": 25, "images": 23, "texts": 100},
        {
            "missing file": 1,
            "malformed entry": 3,
            "malformed JSON": 1,
            "tools": 1,
            "answer without a question": 1,
            "empty message": 1,
            "question without an answer": 2,
            "image of an unused message": 1,
        },
    )


MAKE: dict[str, Callable[[Path], Made]] = {
    "records": make_records,
    "webdataset": make_webdataset,
    "pages": make_pages,
    "videos": make_videos,
    "subtitled": make_subtitled,
    "dialogues": make_dialogues,
}


def test_every_format_is_among_them():
    assert MAKE.keys() | {"tfds"} == FORMATS.keys()


@pytest.mark.parametrize("form", MAKE)
def test_used_and_counted_are_what_is_there(tmp_path, tokenizer, form):
    settings, used, unused = MAKE[form](tmp_path)
    source = open_source(SourceConfig("it", form, **settings))
    tally = TokenLengths(source, tokenizer, tmp_path / "cache").tally
    assert (tally.used, tally.unused) == (used, unused)
    documents = {*REASONS, "empty document"}
    lost = sum(count for reason, count in tally.unused.items() if reason in documents)
    assert tally.used["documents"] + lost == len(source) == COUNT
    for reason, count in tally.unused.items():
        assert len(tally.examples[reason]) == min(count, EXAMPLES)
    again = TokenLengths(source, tokenizer, tmp_path / "cache").tally
    assert again == tally  # from the cache


@pytest.mark.parametrize(
    "entries, lost, kind",
    [
        ([{"images": [f"{n}.jpg", None], "texts": [None, "a"]} for n in range(9)], 9, "images"),
        (
            [{"images": [None], "texts": [None]}] * 3 + [{"images": ["a.png"], "texts": [None]}],
            1,
            None,
        ),
        ([{"images": ["a.png", None], "texts": [None, " "]}] * 4, 4, "texts"),
        ([{"images": ["a.png", None]}] * 5, 5, "documents"),
    ],
)
def test_a_kind_that_vanishes_is_an_error(tmp_path, tokenizer, entries, lost, kind):
    (tmp_path / "a.png").write_bytes(make_image())
    listing = lines(tmp_path / "pages.jsonl", entries)

    def config(*allowed: str) -> DataConfig:
        pages = SourceConfig("crawl", "pages", (str(listing),), allow_missing=allowed)
        return DataConfig(
            sources=(pages,),
            batch_size=1,
            row_tokens=64,
            row_images=2,
            n_causal=4,
            image_size=4,
            prefetch=0,
            block_documents=4,
        )

    if kind is None:
        assert open_groups(config(), tokenizer, RowBuilder.requires)
        return
    match = rf"source 'crawl' \(.*\): none of its {kind} can be used \([a-z ]+: {lost}; .* entry 0"
    with pytest.raises(UserError, match=match) as error:
        open_groups(config(), tokenizer, RowBuilder.requires)
    assert f"entry {EXAMPLES - 1}" in str(error.value) and f"entry {EXAMPLES}" not in str(
        error.value
    )
    if kind == "documents":
        assert "allow_missing" not in str(error.value)
        return
    assert f"allow_missing=('{kind}',)" in str(error.value)
    with Batches(config(kind), tokenizer, "rows") as batches:
        assert batches.tallies["crawl"].unused.popitem()[1] == lost
        next(batches)


def test_documents_that_a_kind_of_batches_cannot_use(tmp_path, tokenizer, caplog):
    documents = [Document((Image(make_image()), Text("a")))] * 3 + [Document((Text("a"),))] * 2
    write_documents(tmp_path / "a.array_record", documents)
    paths = (str(tmp_path / "a.array_record"),)
    sources = (SourceConfig("pairs", paths=paths, paired=True), SourceConfig("pages", paths=paths))
    cfg = DataConfig(sources=sources, batch_size=1, row_tokens=64, n_causal=4, prefetch=0)
    with Batches(cfg, tokenizer, "captions") as batches:
        (counted,) = batches.tallies.values()  # pages are no captions, which is said
    assert counted.used["documents"] == 3
    assert counted.unused == {"document that captions cannot use": 2}
    assert "source 'pages' has no pairs" in caplog.text
    with Batches(cfg, tokenizer, "rows") as batches:
        for counted in batches.tallies.values():
            assert counted.used["documents"] == 5 and not counted.unused


def test_tallies_add_up():
    one, two = Tally(), Tally()
    one.use(images=1, texts=2)
    for n in range(5):
        if two.leave("missing image"):
            two.example("missing image", str(n))
    two.leave("tools", 7)
    total = Tally.from_array(Tally.add([one.to_array(), two.to_array(), two.to_array()]))
    assert total.used == {"documents": 1, "images": 1, "texts": 2}
    assert total.unused == {"missing image": 10, "tools": 14}
    assert total.examples == {"missing image": ["0", "1", "2"]}
    assert total.summary() == ("1 documents, 2 texts, 1 images; unused: 10 missing image, 14 tools")
    former = Tally(unused={"unreadable picture": 2}, examples={"picture too large": ["a"]})
    read = Tally.from_array(former.to_array())  # of an earlier version
    assert (read.unused, read.examples) == ({"unreadable image": 2}, {"image too large": ["a"]})
    with pytest.raises(ValueError, match="unexpected keyword"):
        Tally.from_array(np.frombuffer(b'{"a": 1}', np.uint8))


def test_settings_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match="'sources.0.allow_missing' must name .*'pictures'"):
        DataConfig(sources=(SourceConfig("a", allow_missing=("pictures",)),))


def test_the_first_sheet_tells_how_large_a_tile_is():
    """Whatever shape the video has: here the last sheet is padded."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (80, 16)).save(file, "PNG")
    ((_, frame),) = storyboard(
        file.getvalue(), 2, 2, [(0, 1.0)], "a board", tiles_used=1, full=file.getvalue()
    )
    assert PIL.Image.open(io.BytesIO(frame)).size == (40, 8)
