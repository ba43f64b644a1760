"""Every format on disk becomes the documents that it describes, part by part."""

import base64
import functools
import io
import json
import math
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from emu_jax.data import Document, Image, Text, lengths, storage
from emu_jax.data.documents import ABSENT, Damaged, write_documents
from emu_jax.data.images import open_image
from emu_jax.data.lengths import TokenLengths, text_ids
from emu_jax.data.packing import IMAGE_PART
from emu_jax.data.sources import FORMATS, SourceConfig, entries, open_source, tars
from emu_jax.data.sources.dialogues import IMAGE_SYSTEM, VIDEO_SYSTEM
from emu_jax.data.sources.index import cached_arrays
from emu_jax.data.sources.pairs import JOINED
from emu_jax.data.sources.video import Video, frame_indices, sample_frames, storyboard_times
from emu_jax.data.unused import Unused
from emu_jax.errors import UserError
from emu_jax.generate.prompt import instruct
from emu_jax.tokenizer import Tokenizer

TINY = Path(__file__).parent / "golden" / "tiny"


def make_image(n: int, form: str = "JPEG", size: tuple[int, int] = (24, 16)) -> bytes:
    """A image of one colour, which `shade` reads back as `n` (a multiple of 10)."""
    file = io.BytesIO()
    PIL.Image.new("RGB", size, (n, 255 - n, 128)).save(file, form, quality=95)
    return file.getvalue()


def shade(content: bytes) -> int:
    """The `n` that `image` or `video` was given."""
    return round(float(np.asarray(open_image(content))[..., 0].mean()) / 10) * 10


def shown(document: Document) -> list[int | str]:
    """Words, and the shades of images."""
    return [p.text if isinstance(p, Text) else shade(p.data) for p in document.parts]


def sketched(document: Document) -> list[str | None]:
    return [p.text if isinstance(p, Text) else None for p in document.parts]


@functools.cache
def video(frames: int, form: str = "mp4", rate: int = 10) -> bytes:
    """A video whose frame k has the shade 10 * k, with a key frame every five."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream({"mp4": "libx264", "webm": "libvpx"}[form], rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 48, 32, "yuv420p", 5
        container.start_encoding()
        for k in range(frames):
            pixels = np.full((32, 48, 3), 10 * k, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def tar(path: Path, files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def add(archive: tarfile.TarFile, files: list[tuple[str, bytes]]) -> None:
    """Adds members; unlike `tar`, several may have one name."""
    for name, content in files:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))


def lines(path: Path, entries: list) -> Path:
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))
    return path


def source(form: str, *paths: Path, **changes):
    return open_source(SourceConfig("it", form, tuple(map(str, paths)), **changes))


def reasons(source) -> dict[int, str]:
    """The documents that cannot be read, and why."""
    found = {}
    for index in range(len(source)):
        try:
            source[index]
        except Damaged as error:
            assert error.where.startswith(source.where(index)) and "\n" not in str(error)
            found[index] = error.reason
    return found


def agrees(source) -> bool:
    """Checks that counting agrees with reading, and that a chosen part is as in the whole."""
    for index in range(len(source)):
        whole = source.read(index)
        assert [part for part in whole.parts if part is not ABSENT] == list(source[index].parts)
        sketch = source.sketch(index)
        assert sketched(sketch) == sketched(whole)
        assert whole.unused[: len(sketch.unused)] == sketch.unused
        for number, part in enumerate(whole.parts):
            assert part is ABSENT or source.read(index, part_indices=[number]).parts[number] == part
    return len(source) > 0


# Pairs


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_webdataset_pairs(tmp_path, form):
    folder = "a/" * 40 + "ü" * 20 if form != tarfile.USTAR_FORMAT else "shard"  # a long name
    tar(
        tmp_path / "0.tar",
        {
            f"{folder}/0001.jpg": make_image(30),
            f"{folder}/0001.txt": "first ünïcode 🙂".encode(),
            f"{folder}/0001.json": json.dumps({"caption": "not this"}).encode(),
            "0002.seg.json": b"{}",  # of the same sample, but not read
            "0002.json": json.dumps({"caption": "second", "url": "x"}).encode(),
            "0002.webp": make_image(60, "WEBP"),
            "0003.PNG": make_image(90, "PNG"),
            "README": b"",
            "._0003.jpg": b"",
        },
        form,
    )
    tar(tmp_path / "1.tar", {"x.jpeg": make_image(120), "x.txt": b"third"}, form)
    assert reasons(source("webdataset", tmp_path)) == {2: "incomplete sample"}
    pairs = source("webdataset", tmp_path, allow_missing=("texts",))
    assert pairs.paired
    assert pairs.unused().unused == {"other member": 3}
    assert pairs[2].unused == (Unused("no caption"),)
    assert list(map(shown, pairs)) == [
        [30, "first ünïcode 🙂"],
        [60, "second"],
        [90],
        [120, "third"],
    ]
    assert pairs[3].parts[0].data == make_image(120)  # as they are in the tar
    assert pairs.where(3) == f"{tmp_path / '1.tar'} sample 0"
    assert agrees(pairs)


def test_webdataset_videos(tmp_path):
    tar(
        tmp_path / "0.tar",
        {
            "a.mp4": video(20),
            "a.txt": b"words",
            "b.webm": video(20, "webm"),
            "b.json": b"{}",
        },
    )
    clips = source("webdataset", tmp_path / "0.tar", allow_missing=("texts",))
    want = (10 * frame_indices(20)).tolist()
    assert list(map(shown, clips)) == [[*want, "words"], want]
    assert agrees(clips)
    drawn = [shown(clips.read(0, (seed,)))[:-1] for seed in range(20)]
    assert all(d == sorted(set(d)) and len(d) == 8 for d in drawn)
    assert len(set(map(tuple, drawn))) == 20
    assert {shade for d in drawn for shade in d} == set(range(0, 200, 10))
    assert shown(clips.read(0, (3,)))[:-1] == drawn[3]


def test_captions_wherever_they_are(tmp_path):
    """Under the keys that img2dataset and LAION use, in a list, beside an empty text; otherwise
    the sample is counted."""
    captions: list[tuple[dict, str | None]] = [
        ({"txt": b"\xef\xbb\xbfa bom"}, "a bom"),
        ({"caption": b"NAME.caption", "txt": b"", "text": b"not this"}, "NAME.caption"),
        ({"txt": b"", "json": b'{"caption": null, "text": "other key"}'}, "other key"),
        ({"json": b'{"TEXT": "laion"}'}, "laion"),
        ({"json": b'{"top_caption": "coco", "caption": "  "}'}, "coco"),
        ({"json": b'{"caption": ["", "first", 3, "second"]}'}, "first"),
        ({"json": b'\xef\xbb\xbf{"caption": "a bom"}'}, "a bom"),
        ({"json": b'{"caption": []}'}, None),
        ({"json": b'{"caption": {"en": "x"}, "alt": "y"}'}, None),
        ({}, None),
    ]
    files = {}
    for n, (members, _) in enumerate(captions):
        files |= {f"{n}.jpg": make_image(10)} | {f"{n}.{ext}": c for ext, c in members.items()}
    pairs = source("webdataset", tar(tmp_path / "0.tar", files))
    lost = {n: "incomplete sample" for n, (_, words) in enumerate(captions) if words is None}
    assert reasons(pairs) == lost
    for n, (_, words) in enumerate(captions):
        assert words is None or shown(pairs[n]) == [10, words]
    assert pairs[5].unused == (Unused("other caption", "second"),)
    assert pairs.unused().unused == {"duplicate member": 2}  # beside 1.caption
    alt = source("webdataset", tmp_path / "0.tar", caption_key="alt")
    assert shown(alt[8]) == [10, "y"] and len(reasons(alt)) == 9


def test_keys_of_samples(tmp_path):
    """A key ends at the first dot, or else at the last; members of a sample may lie apart, or two
    samples share a key."""
    files: list[tuple[str, bytes]] = []
    for n, key in enumerate(["2024.01.03", "2024.01.04", "score_0.5_x", "a/photo.v1", "cat"]):
        files += [(f"{key}.jpg", make_image(10 * n)), (f"{key}.txt", key.encode())]
    files += [("cat.mask.png", b""), ("cat.v2.jpg", make_image(50)), ("cat.v2.txt", b"cat.v2")]
    files += [(f"apart{n}.jpg", make_image(60 + 10 * n)) for n in range(3)]
    files += [(f"apart{n}.txt", b"apart%d" % n) for n in (1, 0)]
    files += [("late.jpg", make_image(10)), ("late.jpg", make_image(100)), ("late.txt", b"last")]
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        add(archive, files)
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "cat.jpg"
        archive.addfile(link)
    pairs = source("webdataset", tmp_path / "0.tar")
    assert reasons(pairs) == {8: "incomplete sample", 10: "incomplete sample"}
    assert [shown(pairs[n]) for n in range(10) if n != 8] == [
        [0, "2024.01.03"],
        [10, "2024.01.04"],
        [20, "score_0.5_x"],
        [30, "a/photo.v1"],
        [40, "cat"],
        [50, "cat.v2"],
        [60, "apart0"],
        [70, "apart1"],
        [100, "last"],
    ]
    assert pairs.unused().unused == {"other member": 1, "duplicate member": 1, JOINED: 2}
    assert len(pairs) == 11


def test_members_of_two_samples_of_one_name_are_not_joined(tmp_path):
    """Tars one after the other may number their samples alike: an image here and a text there are
    no pair."""
    one = [("a.jpg", make_image(10)), ("a.txt", b"one"), ("b.jpg", make_image(20))]
    two = [("b.txt", b"two"), ("a.jpg", make_image(30)), ("a.txt", b"three"), ("c.txt", b"four")]
    for name, files in (("0", one), ("1", two)):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            add(archive, files)
    both = (tmp_path / "0.tar").read_bytes() + (tmp_path / "1.tar").read_bytes()
    (tmp_path / "cat.tar").write_bytes(both)
    lost = "incomplete sample"
    pairs = source("webdataset", tmp_path / "cat.tar")
    assert reasons(pairs) == {1: lost, 2: lost, 4: lost} and not pairs.unused().unused
    assert [shown(pairs[n]) for n in (0, 3)] == [[10, "one"], [30, "three"]]
    # As `tar --concatenate` writes them, without a mark between: `a` comes twice, whole.
    files = [*one, ("c.jpg", make_image(40)), *two]
    with tarfile.open(tmp_path / "merged.tar", "w") as archive:
        add(archive, files)
    pairs = source("webdataset", tmp_path / "merged.tar")
    assert reasons(pairs) == dict.fromkeys((1, 2, 3, 5), lost) and not pairs.unused().unused
    assert [shown(pairs[n]) for n in (0, 4)] == [[10, "one"], [30, "three"]]
    with tarfile.open(tmp_path / "twins.tar", "w") as archive:
        add(archive, [*one[:2], *one[:2]])
    assert list(map(shown, source("webdataset", tmp_path / "twins.tar"))) == [[10, "one"]] * 2


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_the_releases_storyboards(tmp_path, form):
    """KEY.n.txt stands before KEY.n.png, and the last text after all
    (`Emu1/data/yt-sb-1b/video_webdataset_maker_YT1b_sb.py`; members in the order of names)."""
    files = {}
    for key, frames in (("ü" * 60 if form == tarfile.PAX_FORMAT else "one", 12), ("two", 1)):
        board = {f"{key}.final_meta.json": b"{}", f"{key}.{frames}.txt": b"end"}
        for n in range(frames):
            board |= {
                f"{key}.{n}.txt": b"%d" % n * (n > 0),
                f"{key}.{n}.png": make_image(10 * n, "PNG"),
            }
        if frames == 12:
            del board[f"{key}.3.png"]
        files |= dict(sorted(board.items()))
    boards = source("webdataset", tar(tmp_path / "0.tar", files, form))
    want = [0, *(part for n in range(1, 12) for part in (str(n), 10 * n)), "end"]
    want.remove(30)
    assert list(map(shown, boards)) == [want, [0, "end"]]
    assert not boards.paired and agrees(boards) and not boards.unused().unused
    assert [u.reason for u in boards[0].unused] == ["missing image"]
    # A stray or corrupt member is no pair.
    path = tar(tmp_path / "0.tar", {"README.txt": b"boards", "x.txt": b"", **files}, form)
    content = bytearray(path.read_bytes())
    content[1024:1536] = b"x" * 512  # the header of x.txt
    path.write_bytes(content)
    boards = source("webdataset", path)
    assert not boards.paired and reasons(boards) == {0: "corrupt tar member"}
    assert [shown(boards[n]) for n in (1, 2)] == [want, [0, "end"]]
    # A tar that is cut short loses its last one, which is not read as pairs.
    *_, last = tars.members(str(path))
    path.write_bytes(content[: last.offset - 512])
    assert last.name == "two.final_meta.json"
    boards = source("webdataset", path)
    assert reasons(boards) == {0: "corrupt tar member", 2: "incomplete sample"}
    path.write_bytes(content)
    tar(tmp_path / "1.tar", {"a.jpg": make_image(10), "a.txt": b"a"})
    with pytest.raises(UserError, match="1 samples are pairs and 2 are storyboards"):
        source("webdataset", tmp_path)


def test_tar_offsets_are_those_of_tarfile(tmp_path):
    rng = np.random.default_rng(0)
    files = {f"{'d' * int(n)}/{n}.bin": rng.bytes(int(n) * 7) for n in rng.permutation(160)}
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = tar(tmp_path / f"{form}.tar", files, form)
        with tarfile.open(path) as archive:
            want = [tars.Member(m.name, m.offset_data, m.size, True) for m in archive]
        assert list(tars.members(str(path))) == want
    assert list(tars.members(str(tar(tmp_path / "none.tar", {})))) == []


@pytest.mark.parametrize("size", ["many", "-1024", str(1 << 70)])
def test_a_false_size_is_a_corrupt_header(tmp_path, size):
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("a.txt", "b.txt"):
            info = tarfile.TarInfo(name)
            info.pax_headers = {"size": size} if name == "a.txt" else {}
            archive.addfile(info)
    found = list(tars.members(str(tmp_path / "0.tar")))
    assert [(m.name, m.whole) for m in found] == [("", False), ("b.txt", True)]


def test_damaged_tars(tmp_path):
    samples = {
        f"{n}.{s}": make_image(10 * n) if s == "jpg" else b"word %d" % n
        for n in range(8)
        for s in ("jpg", "txt")
    }
    samples["3.txt"] = b"\xff\xfe"
    del samples["6.jpg"]
    path = tar(tmp_path / "0.tar", samples)
    at = {m.name: m.offset for m in tars.members(str(path))}
    content = bytearray(path.read_bytes())
    content[at["4.txt"] - 512 + 148] ^= 1  # in the checksum of its header
    path.write_bytes(content[: at["7.txt"] + 3])
    damaged = source("webdataset", path)
    assert reasons(damaged) == {
        3: "invalid UTF-8",
        4: "corrupt tar member",
        6: "incomplete sample",
        7: "corrupt tar member",
    }
    for index in (0, 1, 2, 5):
        assert shown(damaged[index]) == [10 * index, f"word {index}"]

    content[at["5.jpg"] - 512 : at["5.jpg"]] = b"x" * 512
    path.write_bytes(content)
    again = source("webdataset", path)  # the index follows the file
    assert reasons(again) == {
        3: "invalid UTF-8",
        4: "corrupt tar member",
        5: "incomplete sample",
        6: "incomplete sample",
    }
    assert shown(again[7]) == [70, "word 7"]


@pytest.mark.parametrize(
    "lost, want",
    [  # each damage takes one sample with it, whichever of its members it hits
        (["a.jpg"], {0: "corrupt tar member"}),
        (["a.txt"], {0: "corrupt tar member"}),
        (["b.jpg"], {1: "corrupt tar member"}),
        (["b.txt"], {1: "corrupt tar member"}),
        (["b.json"], {2: "corrupt tar member"}),  # b has image and words without it
        (["b.jpg", "b.txt", "b.json"], {1: "corrupt tar member"}),
        (["c.jpg"], {2: "corrupt tar member"}),
        (["c.txt"], {2: "corrupt tar member"}),
        (["a.jpg", "b.jpg", "c.jpg"], dict.fromkeys(range(3), "corrupt tar member")),
    ],
)
def test_corrupt_headers(tmp_path, lost, want):
    files = {
        "a.jpg": make_image(10),
        "a.txt": b"one",
        "b.jpg": make_image(20),
        "b.txt": b"two",
        "b.json": b"{}",
        "c.jpg": make_image(30),
        "c.txt": b"three",
    }
    path = tar(tmp_path / "0.tar", files)
    content = bytearray(path.read_bytes())
    for member in tars.members(str(path)):
        if member.name in lost:
            content[member.offset - 512 : member.offset] = b"x" * 512
    path.write_bytes(content)
    pairs = source("webdataset", path)
    assert reasons(pairs) == want
    sound = [shown(pairs[n]) for n in range(len(pairs)) if n not in want]
    whole = [[10, "one"], [20, "two"], [30, "three"]]
    hit = {name[0] for name in lost} - ({"b"} if lost == ["b.json"] else set())
    assert sound == [pair for key, pair in zip("abc", whole, strict=True) if key not in hit]


def test_tfds_directory(tmp_path):
    import tensorflow_datasets as tfds

    for n in range(3):
        (tmp_path / f"{n}.jpg").write_bytes(make_image(50 * n))

    def info(builder, features: dict):
        return tfds.core.DatasetInfo(builder=builder, features=tfds.features.FeaturesDict(features))

    class Captions(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Sequence({"text": tfds.features.Text()})
            features = {"image": tfds.features.Image(), "captions": text}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for n in range(3):
                said = [{"text": f"ünï {n}"}, {"text": "another"}]
                yield n, {"image": str(tmp_path / f"{n}.jpg"), "captions": said}

    class Labels(Captions):
        def _info(self):
            label = tfds.features.ClassLabel(names=["cat", "dog", "cow"])
            features = {"label": label, "image": tfds.features.Image()}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _generate_examples(self):
            for n in range(3):
                yield n, {"image": str(tmp_path / f"{n}.jpg"), "label": n if n < 2 else -1}

    for builder, words in (
        (Captions, ["ünï 0", "ünï 1", "ünï 2"]),
        (Labels, ["cat", "dog", None]),
    ):
        made = builder(data_dir=tmp_path / "tfds", file_format="array_record")
        made.download_and_prepare()
        pairs = open_source(SourceConfig("it", "tfds", (f"{made.data_dir}:train",)))
        assert sorted(map(shown, pairs)) == [
            [50 * n, word] if word else [50 * n] for n, word in enumerate(words)
        ]
        assert agrees(pairs) and pairs.paired
        reason = {3: "other caption", 2: "no caption"}[sum(word is not None for word in words)]
        counted = [unused.reason for document in pairs for unused in document.unused]
        assert counted == [reason] * (3 if reason == "other caption" else 1)
    with pytest.raises(UserError, match="write DIRECTORY:SPLIT"):
        source("tfds", Path("nosplit"))
    with pytest.raises(UserError, match="cannot read .*nothing"):
        source("tfds", Path(f"{tmp_path}/nothing:train"))


def test_records(tmp_path):
    documents = [Document((Image(make_image(20), similarity=0.5), Text("a"))), Document(())]
    write_documents(tmp_path / "b.array_record", documents)
    write_documents(tmp_path / "a.array_record", documents[1:])
    assert list(source("records", tmp_path)) == [documents[1], *documents]
    assert list(source("records", tmp_path / "b*")) == documents
    assert not source("records", tmp_path).paired
    assert source("records", tmp_path, paired=True).paired


# Pages


def test_mmc4_pages(tmp_path):
    (tmp_path / "images").mkdir()
    for n in (1, 2, 3):
        (tmp_path / "images" / f"{n}.png").write_bytes(make_image(10 * n, "PNG"))

    def info(name, place, similarity=None, **more):
        return (
            {"image_name": name, "matched_text_index": place}
            | more
            | ({} if similarity is None else {"matched_sim": similarity})
        )

    inline = base64.b64encode(make_image(70)).decode()
    pages = [
        {
            "text_list": ["one", "two", "three"],
            "image_info": [
                info("2.png", 2, 0.5),
                info("1.png", 0, 0.32),
                info("3.png", 1, 0.31),
                info("absent.png", 1, 0.9),
                info(None, 1, 0.9),
                info("../images/3.png", 1, 0.9),
                info("x", 2, 0.4, image_base64=inline),
            ],
        },
        {
            "text_list": ["one", "two"],
            "similarity_matrix": [[0.1, 0.4], [0.2, 0.9]],
            "image_info": [info("1.png", 0), info("2.png", 1)],
        },
    ]
    listing = lines(tmp_path / "pages.jsonl", pages)
    mmc4 = source("pages", listing, media=(str(tmp_path / "images"),))
    assert list(map(shown, mmc4)) == [
        [10, "one", "two", 20, 70, "three"],
        ["one", 20, "two"],
    ]
    assert [p.similarity for p in mmc4[0].parts if isinstance(p, Image)] == [0.32, 0.5, 0.4]
    assert agrees(mmc4) and not mmc4.paired
    assert mmc4[0].unused == (
        Unused("image unlike its text", "similarity 0.310"),
        Unused("no image", "image_info 4"),
        Unused("missing image", "absent.png"),
        Unused("missing image", "../images/3.png"),
    )
    some = source("pages", listing, media=(str(tmp_path / "images"),), min_similarity=0.45)
    assert list(map(shown, some)) == [["one", "two", 20, "three"], ["one", 20, "two"]]
    assert some.fingerprint != mmc4.fingerprint
    assert mmc4.read(0, part_indices=[5]).parts[0].data == b""  # not asked for, not read

    for n in (1, 2):  # the same images in tars, whose paths end in their names
        tar(tmp_path / f"{n}.tar", {f"deep/{n}.png": make_image(10 * n, "PNG")})
    shutil.rmtree(tmp_path / "images")
    packed = source("pages", listing, media=(f"{tmp_path}/*.tar",))
    assert list(map(shown, packed)) == list(map(shown, [packed[0], packed[1]]))
    assert shown(packed[0]) == [10, "one", "two", 20, 70, "three"]


def test_obelics_pages(tmp_path):
    (tmp_path / "a.jpg").write_bytes(make_image(40))
    page = {"images": [None, "a.jpg", None], "texts": ["ünï", None, "end"], "metadata": "[]"}
    listing = tmp_path / "pages.json"
    listing.write_text(json.dumps([page, page | {"images": [None]}], indent=1))
    pages = source("pages", listing)
    assert shown(pages[0]) == ["ünï", 40, "end"]
    assert reasons(pages) == {1: "malformed entry"}


def image_page(*names: str) -> dict:
    return {"images": [*names, None], "texts": [*[None] * len(names), "words"]}


def test_images_in_sub_folders(tmp_path):
    """MMC4's downloader writes a folder for each shard. A name may also begin with the end of the
    media folder. A name that fits several files is left out, rather than answered at random."""
    names = {
        "images/0/red.jpg": 10,
        "images/1/blue.jpg": 20,
        "images/0/twice.jpg": 30,
        "images/1/twice.jpg": 40,
        "images/1/a/deep.jpg": 50,
        "images/.hidden/x.jpg": 60,
        "images/top.jpg": 70,
    }
    for name, color in names.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(make_image(color))
    asked = (
        "red.jpg",
        "./blue.jpg",
        "twice.jpg",
        "1/twice.jpg",
        "deep.jpg",
        "x.jpg",
        "images/0/red.jpg",
        "images/top.jpg",
        "2/red.jpg",
        "a/../top.jpg",
    )
    listing = lines(tmp_path / "pages.jsonl", [image_page(*asked)])
    want = [10, 20, 40, 50, 10, 70, "words"]
    for folder in ("images", "images/", "images/*"):
        pages = source("pages", listing, media=(f"{tmp_path}/{folder}",))
        assert shown(pages[0]) == want and agrees(pages)
        assert pages[0].unused == (
            Unused("ambiguous image", "twice.jpg"),
            Unused("missing image", "x.jpg"),
            Unused("missing image", "2/red.jpg"),
            Unused("missing image", "a/../top.jpg"),
        )
    (tmp_path / "images/top.jpg").unlink()  # or else images/* stands for images, too
    pages = source("pages", listing, media=(f"{tmp_path}/images/*",))
    assert shown(pages[0]) == [*want[:-2], "words"]


@pytest.mark.parametrize(
    "media, message",
    [
        ("nowhere", "media .*nowhere is not there"),
        ("nowhere/*", r"media .*nowhere/\* is not there"),
        ("pages.jsonl", "is neither a folder nor a .tar"),
    ],
)
def test_media_that_are_not_there(tmp_path, media, message):
    listing = lines(tmp_path / "pages.jsonl", [image_page("a.jpg")])
    with pytest.raises(UserError, match=message):
        source("pages", listing, media=(f"{tmp_path}/{media}",))


@pytest.mark.parametrize("prefix", ["", "./", "top/", "top/./more/"])
def test_names_in_media_tars(tmp_path, prefix):
    """A path ends in the whole name, or the name in the whole path; never is another folder's
    file of the same base name taken."""
    deep = "1/2/3/4/5/6/7/8/9/deep.jpg"
    files = {"a/1.jpg": 10, "b/1.jpg": 20, "b/2.jpg": 30, "c/2.jpg": 40, "d/3.jpg": 50, deep: 80}
    packed = tar(tmp_path / "0.tar", {prefix + name: make_image(n) for name, n in files.items()})
    again = tar(tmp_path / "1.tar", {prefix + "a/1.jpg": make_image(10), "4.jpg": make_image(60)})
    with tarfile.open(packed, "a") as archive:  # a later member replaces an earlier one
        info = tarfile.TarInfo(f"{prefix}d/3.jpg")
        info.size = len(content := make_image(70, size=(30, 30)))
        archive.addfile(info, io.BytesIO(content))
    asked = (
        "a/1.jpg",
        "b/1.jpg",
        "c/1.jpg",
        "1.jpg",
        "./c/2.jpg",
        "e/3.jpg",
        "d/3.jpg",
        "3.jpg",
        "far/away/4.jpg",
        f"x/{prefix}a/1.jpg",
        f"{prefix}{deep}",
    )
    listing = lines(tmp_path / "pages.jsonl", [image_page(*asked)])
    pages = source("pages", listing, media=(str(packed), str(again)))
    assert shown(pages[0]) == [10, 20, 40, 70, 70, 60, 10, 80, "words"]
    assert [(u.reason, u.detail) for u in pages[0].unused] == [
        ("missing image", "c/1.jpg"),
        ("ambiguous image", "1.jpg"),
        ("missing image", "e/3.jpg"),
    ]
    assert pages.unused().unused == {"duplicate member": 1}


def test_images_that_arrive_later(tmp_path):
    """Counts stay valid while a crawl continues: images that arrive are used once the
    source is counted again, which a resumed run does not do."""
    tokenizer = Tokenizer.load(TINY / "tokenizer")
    (tmp_path / "images").mkdir()
    listing = lines(tmp_path / "pages.jsonl", [image_page("0.jpg", "1.jpg"), image_page()])

    def count(**how) -> TokenLengths:
        pages = source("pages", listing, media=(f"{tmp_path}/images",))
        return TokenLengths(pages, tokenizer, tmp_path / "cache", **how)

    (tmp_path / "images/1.jpg").write_bytes(make_image(20))
    words = len(text_ids(Text("words"), tokenizer))
    before = count()
    assert [before[0], before[1]] == [[0, IMAGE_PART, words], [words]]
    assert before.tally.unused == {"missing image": 1}
    assert before.tally.examples == {"missing image": [f"{listing} entry 0: 0.jpg"]}
    (tmp_path / "images/0.jpg").write_bytes(make_image(10))
    pages = source("pages", listing, media=(f"{tmp_path}/images",))
    document = pages.read(0, part_indices=[1, 2])  # numbers stay
    assert shade(document.parts[1].data) == 20
    assert count(recount=False)[0] == before[0]
    after = count()
    assert after[0] == [IMAGE_PART, IMAGE_PART, words] and after.tally.unused == {}
    # Nothing was missing: what changes in the folder does not matter, a lost image is damage.
    (tmp_path / "images/0.jpg").unlink()
    assert count()[0] == after[0]
    with pytest.raises(Damaged, match="missing file"):
        pages.read(0, part_indices=[0])


def test_a_crawl_that_goes_on_is_counted_once_at_a_start(tmp_path, monkeypatch):
    """Files that arrive while tokens are counted wait for the next run."""
    listing = lines(tmp_path / "pages.jsonl", [image_page("0.jpg")])
    pages, tokenizer = source("pages", listing), Tokenizer.load(TINY / "tokenizer")
    stamps, counted, count = iter(range(99)), [], lengths._count
    monkeypatch.setattr(pages, "stamp", lambda: str(next(stamps)))
    monkeypatch.setattr(lengths, "_count", lambda *how: counted.append(1) or count(*how))
    for starts in (1, 2):
        TokenLengths(pages, tokenizer, tmp_path / "cache")
        assert len(counted) == starts


def test_damaged_listings(tmp_path):
    good = {"images": [None], "texts": ["fine"]}
    listing = tmp_path / "pages.jsonl"
    listing.write_bytes(
        b"\n".join(
            [
                json.dumps(good).encode(),
                b"",
                b'{"images": [',
                b"[1]",
                b'{"texts": ["\xff"]}',
                b"{}",
                json.dumps({"text_list": ["a"], "image_info": [{"image_name": "x"}]}).encode(),
                json.dumps({"text_list": [3], "image_info": []}).encode(),
                json.dumps(good).encode() + b"\r",
                json.dumps({"images": [None], "texts": ["\ud83d"]}).encode(),
                json.dumps(
                    {"images": ["a\0b", "x" * 999, None], "texts": [None, None, "fine"]}
                ).encode(),
                b"1",
                b"\r",
                b"{",
                b'{"text_list": ["a"], "image_info": [{"image_name": "x", '
                b'"matched_text_index": Infinity}]}',
                b'{"text_list": ["a"], "image_info": [{"image_name": 7, "matched_text_index": 0}]}',
            ]
        )
    )
    pages = source("pages", listing)
    assert reasons(pages) == {
        1: "malformed JSON",
        2: "malformed JSON",
        3: "invalid UTF-8",
        4: "malformed entry",
        5: "malformed entry",
        6: "malformed entry",
        8: "invalid UTF-8",
        10: "malformed JSON",
        11: "malformed JSON",
        12: "malformed entry",
        13: "malformed entry",
    }
    assert [shown(pages[n]) for n in (0, 7, 9)] == [["fine"]] * 3
    assert pages.where(7) == f"{listing} entry 7"


@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
def test_entries_are_found_wherever_chunks_end(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(entries, "_CHUNK", chunk)
    values = [{"n": n, "text": 'a "quoted] \\ [ {' * (n % 5)} for n in range(40)]
    lines(tmp_path / "a.jsonl", values)
    (tmp_path / "b.json").write_text("\ufeff " + json.dumps(values, indent=2))
    (tmp_path / "c.json").write_text(json.dumps(values)[:-100])
    whole = entries.Entries([str(tmp_path / n) for n in ("a.jsonl", "b.json")], "")
    assert [whole[n] for n in range(len(whole))] == values + values
    cut = entries.Entries([str(tmp_path / "c.json")], "")
    assert [cut[n] for n in range(len(cut) - 1)] == values[: len(cut) - 1] and len(cut) > 30
    with pytest.raises(Damaged, match="malformed JSON"):
        cut[len(cut) - 1]


# Videos


@pytest.mark.parametrize("form", ["mp4", "webm"])
def test_video_frames_at_random_equal_those_in_order(form):
    clip = Video(video(25, form), "it")
    np.testing.assert_allclose(clip.times, np.arange(25) / 10, atol=1e-3)
    every = clip.frames(range(25))
    assert [shade(data) for _, data in every] == [10 * k for k in range(25)]
    for indices in ([0, 4, 5, 6, 24], [24], [3, 3, 3], [1, 19]):
        assert clip.frames(indices) == [every[k] for k in indices]


def test_frames_of_a_clip():
    film = Video(video(25), "it")
    assert film.times[10:12] == [1.0, 1.1]

    def shades(*clip: float, seed=None) -> list[int]:
        return [shade(data) for _, data in sample_frames(film, 4, seed, clip)]

    assert shades(1.0, 1.4) == [100, 110, 120, 120]  # the release's choice among four frames
    assert shades(0.0, math.inf) == [shade(d) for _, d in sample_frames(film, 4, None)]
    assert shades(2.0, 9.0) == [200, 210, 220, 230]
    assert shades(0.52, 0.55) == [50] * 4  # no frame begins in it: the one on screen
    assert set(shades(1.0, 1.4, seed=(0,))) == {100, 110, 120, 130}
    with pytest.raises(Damaged, match="video without frames.*none in 3.0 .. 4.0 s"):
        shades(3.0, 4.0)


def test_captioned_videos(tmp_path):
    (tmp_path / "clips").mkdir()
    for name, content in (
        ("a.mp4", video(25)),
        ("b.webm", video(5, "webm")),
        ("cut.mp4", video(25)[:900]),
        ("none.mp4", b""),
    ):
        (tmp_path / "clips" / name).write_bytes(content)
    (tmp_path / "clips" / "empty.webm").write_bytes(video(0, "webm"))
    listing = lines(
        tmp_path / "videos.jsonl",
        [
            {"video": "a.mp4", "text": "long"},
            {"video": "b.webm", "caption": "short"},
            {"video": "cut.mp4", "text": "x"},
            {"video": "none.mp4", "text": "x"},
            {"video": "absent.mp4", "text": "x"},
            {"video": "a.mp4"},
            {"text": "x"},
            {"video": "empty.webm", "text": "x"},
        ],
    )
    videos = source("videos", listing, media=(str(tmp_path / "clips"),), frames=4)
    assert shown(videos[0]) == [*(10 * frame_indices(25, 4)).tolist(), "long"]
    assert shown(videos[1]) == [*(10 * frame_indices(5, 4)).tolist(), "short"]
    few = source("videos", listing, media=(str(tmp_path / "clips"),), frames=7)
    assert set(shown(few.read(1, (0,)))[:-1]) <= {0, 10, 20, 30, 40}  # fewer frames than asked for
    assert len(few.read(1, (0,)).parts) == 8
    assert sketched(videos.sketch(2)) == [None] * 4 + ["x"]  # counting opens no video
    with pytest.raises(Damaged, match="missing file"):  # but asks whether it is there
        videos.sketch(4)
    assert reasons(videos) == {
        2: "unreadable video",
        3: "unreadable video",
        4: "missing file",
        5: "malformed entry",
        6: "malformed entry",
        7: "video without frames",
    }


SRT = """1
00:00:00,500 --> 00:00:01,000
<i>hello</i> there &amp; here

2
00:00:01,200 --> 00:00:01,900
{\\an8}second
line

3
00:00:01,400 --> 00:00:03,000
third
"""
VTT = """WEBVTT - a title

NOTE nothing

00:00.500 --> 00:01.000 align:start
rolling

intro
00:01.200 --> 00:02.000
rolling
<c.yellow>on</c>
"""


def test_subtitled_videos(tmp_path):
    (tmp_path / "a.srt").write_text(SRT)
    (tmp_path / "a.mp4").write_bytes(video(25))
    listing = lines(
        tmp_path / "videos.jsonl",
        [
            {"video": "a.mp4", "subtitles": "a.srt"},
            {"video": "a.mp4", "subtitles": "a.srt", "duration": 1.3},
            {"video": "a.mp4", "subtitles": "absent.srt"},
            {"video": "a.mp4", "subtitles": "a.srt", "duration": 1e15},
            {"storyboard": "a", "subtitles": "a.srt", "frames": 10**12, "duration": 9},
        ],
    )
    videos = source("subtitled", listing, frame_seconds=1.0)
    assert shown(videos[0]) == [0, "hello there & here", 100, "second line third", 200]
    assert [p.time for p in videos[0].parts if isinstance(p, Image)] == [0.0, 1.0, 2.0]
    assert shown(videos[1]) == [0, "hello there & here", 100, "second line third"]
    assert reasons(videos) == {2: "missing file", 3: "malformed entry", 4: "malformed entry"}
    for index in (0, 1):
        assert sketched(videos.sketch(index)) == sketched(videos[index])


def test_storyboards(tmp_path):
    (tmp_path / "a.vtt").write_text(VTT)
    for sheet in range(2):
        whole = PIL.Image.new("RGB", (3 * 16, 2 * 12))
        for tile in range(6):
            part = open_image(make_image(10 * (6 * sheet + tile), "PNG", (16, 12)))
            whole.paste(part, (tile % 3 * 16, tile // 3 * 12))
        whole.save(tmp_path / f"{sheet}.png")
    board = {
        "storyboard": ["0.png", "1.png"],
        "rows": 2,
        "columns": 3,
        "frames": 8,
        "duration": 9.0,
        "subtitles": "a.vtt",
    }
    listing = lines(
        tmp_path / "boards.jsonl",
        [
            board,
            board | {"storyboard": "0.png", "frames": 2},
            board | {"frames": 13},
            board | {"rows": 0},
            {"subtitles": "a.vtt", "storyboard": "0.png"},
        ],
    )
    boards = source("subtitled", listing)
    assert shown(boards[0]) == [0, "rolling", 10, "on", 20, 30, 40, 50, 60, 70]
    assert [p.time for p in boards[0].parts if isinstance(p, Image)] == list(range(8))
    assert shown(boards[1]) == [0, "rolling on", 10]  # round(9 / 2) = 4 seconds apart
    assert boards[1].parts[2].time == 4.0
    assert reasons(boards) == dict.fromkeys((2, 3, 4), "malformed entry")
    # A whole number of seconds apart: the nearest, and never none.
    assert storyboard_times(4, 7.0) == [0, 2, 4, 6] and storyboard_times(3, 1.0) == [0, 1, 2]
    part = boards.read(0, part_indices=[9])
    assert [bool(p.data) for p in part.parts if isinstance(p, Image)] == [False] * 7 + [True]
    assert part.parts[9] == boards[0].parts[9]


@pytest.mark.parametrize("columns", [5, 3])  # of the last sheet, the site's or as many as it holds
@pytest.mark.parametrize("size", [(16, 10), (9, 16)])
def test_the_last_sheet_of_a_storyboard(tmp_path, columns, size):
    """Sites cut it off below its last row, and behind the last tile of a single row; a video of
    one sheet has only that."""
    (tmp_path / "a.vtt").write_text(VTT)
    width, height = size

    def sheet(name: str, shades: range, rows: int, columns: int) -> str:
        image = PIL.Image.new("RGB", (columns * width, rows * height))
        for n, color in enumerate(shades):
            part = open_image(make_image(10 * color, "PNG", size))
            image.paste(part, (n % columns * width, n // columns * height))
        image.save(tmp_path / name)
        return name

    full = sheet("0.png", range(10), 2, 5)
    last = sheet("1.png", range(10, 13), 1, columns)
    board = {"rows": 2, "columns": 5, "duration": 13.0, "subtitles": "a.vtt", "frames": 13}
    listing = lines(
        tmp_path / "boards.jsonl",
        [
            board | {"storyboard": [full, last]},
            board | {"storyboard": [full, last], "rows": [2, 1], "columns": [5, columns]},
            board | {"storyboard": last, "frames": 3},
            board | {"storyboard": full, "frames": 7},
            board | {"storyboard": [full, last, last], "frames": 7},
            board | {"storyboard": [full, "absent.png"]},
        ],
    )
    boards = source("subtitled", listing)

    def shades(index: int) -> list[int]:
        parts = [part for part in boards[index].parts if isinstance(part, Image)]
        assert {open_image(part.data).size for part in parts} == {size}
        return [shade(part.data) for part in parts]

    for index in (0, 1):
        assert shades(index) == [10 * n for n in range(13)]
    assert shades(2) == [100, 110, 120]
    assert shades(3) == shades(4) == [10 * n for n in range(7)]
    unused = [unused for unused in boards[4].unused if "sheet" in unused.reason]
    assert unused == [Unused("unused sheet", "1.png")] * 2
    assert reasons(boards) == {5: "missing file"}


def test_transcripts_of_the_release(tmp_path):
    """`Emu1/data/yt-sb-1b/get_transcript.py` saves youtube-transcript-api's JSON."""
    said = [
        {"text": "two\nlines", "start": 2.5, "duration": 1.0},
        {"text": "one", "start": 0.5, "duration": 4.0},
        {"text": " ", "start": 3.0},
        {"start": 10**400, "text": "x"},
        {"text": "x", "start": "soon"},
    ]
    for name, cues in {"a": said, "none": [], "odd": [{"a": 1}], "b": [{"text": "x"}]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(cues), encoding="utf-8")
    (tmp_path / "0.png").write_bytes(make_image(30, "PNG", (20, 10)))
    board = {"storyboard": "0.png", "rows": 1, "columns": 2, "frames": 2, "duration": 4}
    names = ("a", "none", "odd", "b")
    boards = source(
        "subtitled",
        lines(tmp_path / "boards.jsonl", [board | {"subtitles": f"{name}.json"} for name in names]),
    )
    assert shown(boards[0]) == [30, "one", 30, "two lines"]
    assert [u.reason for u in boards[0].unused] == [
        "empty subtitle cue",
        "unreadable subtitle cue",
        "unreadable subtitle cue",
    ]
    assert shown(boards[1]) == [30, 30]
    assert reasons(boards) == dict.fromkeys((2, 3), "malformed subtitles")


# Dialogues


def test_dialogues_of_every_layout(tmp_path):
    (tmp_path / "a.png").write_bytes(make_image(40, "PNG"))
    (tmp_path / "b.png").write_bytes(make_image(80, "PNG"))
    (tmp_path / "v.mp4").write_bytes(video(20))

    def says(who: str, value: str) -> dict:
        return {"from": who, "value": value}

    (tmp_path / "data.json").write_text(
        json.dumps(
            [
                {"instruction": "Add them.", "input": "1 2", "output": "3"},
                {"instruction": "Say [USER] hi <b>", "input": "", "output": "hi"},
                {
                    "conversations": [
                        says("system", "Be brief."),
                        says("gpt", "to nothing"),
                        says("human", "one"),
                        says("user", "and"),
                        says("gpt", "two"),
                        says("human", "three"),
                        says("gpt", "four"),
                        says("human", "unanswered"),
                    ]
                },
                {
                    "image": "a.png",
                    "conversations": [
                        says("human", "<image>\nwhat is it?"),
                        says("gpt", "red"),
                    ],
                },
                {
                    "image": ["a.png", "b.png"],
                    "conversations": [
                        says("human", "first <image> and <image> differ?"),
                        says("gpt", "yes"),
                    ],
                },
                {
                    "video": "v.mp4",
                    "QA": [
                        {"i": "Watch.", "q": "what?", "a": "shades"},
                        {"q": "again?", "a": "shades"},
                    ],
                },
                {"image": "b.png", "q": "what?", "a": "red"},
                {"conversations": [says("alien", "x")]},
                {"instruction": "x", "output": " "},
                {
                    "image": "a.png",
                    "conversations": [says("human", "<image><image>"), says("gpt", "y")],
                },
                {"image": "absent.png", "q": "what?", "a": "red"},
                {"conversations": []},
            ]
        )
    )
    dialogues = source("dialogues", tmp_path / "data.json", frames=2)
    user, assistant = "[USER]:", "[ASSISTANT]:"
    assert [shown(dialogues[n]) for n in range(7)] == [
        [user, "Add them.\n1 2", assistant, "3"],
        [user, "Say [USER] hi <b>", assistant, "hi"],
        ["Be brief.", user, "one\nand", assistant, "two", "</s>", user, "three", assistant, "four"],
        [f"{IMAGE_SYSTEM} {user}", 40, "what is it?", assistant, "red"],
        [f"{IMAGE_SYSTEM} {user}", "first", 40, "and", 80, "differ?", assistant, "yes"],
        [
            f"{VIDEO_SYSTEM} {user}",
            40,
            140,
            "Watch. what?",
            assistant,
            "shades",
            "</s>",
            user,
            "again?",
            assistant,
            "shades",
        ],
        [f"{IMAGE_SYSTEM} {user}", 80, "what?", assistant, "red"],
    ]
    assert reasons(dialogues) == dict.fromkeys((7, 8, 9, 11), "malformed entry") | {
        10: "missing file"
    }
    for n in range(7):
        assert sketched(dialogues.sketch(n)) == sketched(dialogues[n])
        texts = [p for p in dialogues[n].parts if isinstance(p, Text)]
        assert [t.text for t in texts if t.scored] == [
            ["3"],
            ["hi"],
            ["two", "</s>", "four"],
            ["red"],
            ["yes"],
            ["shades", "</s>", "shades"],
            ["red"],
        ][n]
        assert not any(p.scored for p in dialogues[n].parts if isinstance(p, Image))
        own = {t.text for t in texts if t.special}
        assert own <= {user, assistant, "</s>", f"{IMAGE_SYSTEM} {user}", f"{VIDEO_SYSTEM} {user}"}


def test_a_dialogue_is_the_prompt_that_the_model_is_asked_with(tmp_path):
    """A row of training begins with the ids of the prompt, and what is learned follows it."""
    tokenizer = Tokenizer.load(TINY / "tokenizer", instruct=True)
    (tmp_path / "a.png").write_bytes(make_image(40, "PNG"))
    for image, parts in ((None, []), ("a.png", [PIL.Image.new("RGB", (8, 8))])):
        entry = {"q": "what is it?", "a": "it is red"} | ({"image": image} if image else {})
        (tmp_path / "data.json").write_text(json.dumps([entry]))
        ids = [tokenizer.bos]
        for part in source("dialogues", tmp_path / "data.json")[0].parts:
            if isinstance(part, Image):
                ids += tokenizer.encode(tokenizer.image_placeholder(4), bos=False)
            else:
                ids += text_ids(part, tokenizer)
        asked = instruct([*parts, entry["q"]])
        spelled = "".join(
            p if isinstance(p, str) else tokenizer.image_placeholder(4) for p in asked
        )
        assert ids == tokenizer.encode(f"{spelled} {entry['a']}")


# Everywhere


def test_what_another_process_kept_first_is_used(tmp_path):
    def make():
        if not (tmp_path / "it").exists():
            cached_arrays(tmp_path, "it", lambda: {"n": np.array([1])})
        return {"n": np.array([2])}

    assert cached_arrays(tmp_path, "it", make)["n"].tolist() == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["it"]


def test_what_is_derived_is_kept_and_follows_the_files(tmp_path, monkeypatch):
    tar(tmp_path / "0.tar", {"a.jpg": make_image(30), "a.txt": b"one"})
    tar(tmp_path / "1.tar", {"b.jpg": make_image(60), "b.txt": b"two"})
    walked = []
    walk = tars.members
    monkeypatch.setattr("emu_jax.data.sources.pairs.members", lambda p: walked.append(p) or walk(p))
    first = source("webdataset", tmp_path)
    again = source("webdataset", tmp_path)
    assert len(walked) == 2 and first.fingerprint == again.fingerprint
    tar(tmp_path / "1.tar", {"c.jpg": make_image(90), "c.txt": b"three", "d.jpg": make_image(90)})
    now = source("webdataset", tmp_path)
    assert [shown(now[n]) for n in range(2)] == [[30, "one"], [90, "three"]] and len(now) == 3
    assert len(walked) == 3  # the other is known
    assert source("webdataset", tmp_path).fingerprint != first.fingerprint
    tar(tmp_path / "new", {"e.jpg": make_image(120), "e.txt": b"other"})
    (tmp_path / "new").replace(tmp_path / "0.tar")
    assert shown(source("webdataset", tmp_path)[0]) == [120, "other"]
    for array in (tmp_path / ".emu_jax").rglob("spans.npy"):
        array.write_bytes(b"broken")
    assert len(source("webdataset", tmp_path)) == 3
    cfg = SourceConfig("it", "webdataset", (str(tmp_path),))
    shutil.rmtree(tmp_path / ".emu_jax")
    assert len(open_source(cfg, cache=str(tmp_path / "cache"))) == 3
    assert not (tmp_path / ".emu_jax").exists()
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name.startswith(".")]


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """A remote store, which fails as often as `failures` says."""
    import fsspec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(storage, "WAIT", 0.001)
    store = fsspec.filesystem("memory")
    store.pipe(
        {
            "/b/0.tar": tar(
                tmp_path / "x.tar",
                {
                    "a.jpg": make_image(30),
                    "a.txt": b"one",
                    "b.jpg": make_image(60),
                    "b.txt": b"two",
                },
            ).read_bytes(),
            "/b/l/pages.jsonl": json.dumps(
                {"images": ["p.png", None], "texts": [None, "words"]}
            ).encode(),
            "/b/l/p.png": make_image(90, "PNG"),
        }
    )
    store.failures = 0
    whole = store.cat_file

    def flaky(*args, **kwargs):
        if store.failures > 0:
            store.failures -= 1
            raise ConnectionError("503: try later")
        return whole(*args, **kwargs)

    monkeypatch.setattr(store, "cat_file", flaky, raising=False)
    monkeypatch.setattr(type(store), "cat_file", staticmethod(flaky))
    yield store
    store.rm("/b", recursive=True)


def test_remote_files_with_patience(bucket):
    pairs = open_source(SourceConfig("it", "webdataset", ("memory://b/*.tar",)))
    assert list(map(shown, pairs)) == [[30, "one"], [60, "two"]]
    assert len(open_source(SourceConfig("it", "webdataset", ("memory://b",)))) == 2
    pages = open_source(SourceConfig("it", "pages", ("memory://b/l/pages.jsonl",)))
    assert shown(pages[0]) == [90, "words"]
    bucket.failures = storage.ATTEMPTS - 1
    assert shown(pairs[1]) == [60, "two"]
    bucket.failures = storage.ATTEMPTS
    with pytest.raises(
        UserError, match="cannot read memory://.*tried 5 times: 503: try later"
    ) as e:
        pairs[0]
    assert not isinstance(e.value, Damaged)  # the store's failure is not the document's


def test_a_store_is_not_listed(bucket, monkeypatch, tmp_path):
    """Every host opens its sources: one that lists a bucket of images would ask for hours."""
    bucket.pipe({f"/b/m/{n}.png": make_image(10 * n, "PNG") for n in range(3)})
    listing = str(lines(tmp_path / "pages.jsonl", [image_page("2.png", "absent.png")]))
    asked: list[str] = []

    def listed(path, *_, **__):
        raise AssertionError(f"{path} is listed")

    with monkeypatch.context() as patch:
        for name in ("ls", "find", "glob", "walk"):
            patch.setattr(bucket, name, listed)
        pages = open_source(SourceConfig("it", "pages", (listing,), media=("memory://b/m",)))
        info = bucket.info
        patch.setattr(bucket, "info", lambda path, **how: asked.append(path) or info(path, **how))
        assert shade(pages.read(0, part_indices=[0]).parts[0].data) == 20
        assert asked == ["/b/m/2.png"]  # once
        assert shown(pages[0]) == [20, "words"]
        with pytest.raises(UserError, match=r"memory://b/m/\*: in a store \* stands for .tar"):
            open_source(SourceConfig("it", "pages", (listing,), media=("memory://b/m/*",)))
    assert open_source(SourceConfig("it", "pages", (listing,), media=("memory://b/*.tar",)))


def test_errors_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="unknown format 'webdata'; did you mean 'webdataset'"):
        source("webdata", tmp_path)
    with pytest.raises(UserError, match="source 'it': nothing is at .*/none"):
        source("webdataset", tmp_path / "none")
    with pytest.raises(UserError, match="source 'it': nothing is at .*no file that ends in .tar"):
        source("webdataset", tmp_path)
    with pytest.raises(UserError, match="no paths are given"):
        source("webdataset")
    with pytest.raises(UserError, match="cannot read nowhere://"):
        open_source(SourceConfig("it", "webdataset", ("nowhere://x",)))
    assert set(FORMATS) >= {"records", "webdataset", "tfds", "pages", "videos", "subtitled"}
    assert os.listdir(tmp_path) == []
