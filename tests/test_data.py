"""Documents, preprocessing, packing, and what training reads."""

import collections
import dataclasses
import gc
import io
import json
import os
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from emu_jax.config import CFormerConfig, EmuConfig, LlamaConfig, UNetConfig, VAEConfig
from emu_jax.data import Batches, DataConfig, Document, Image, Text, storage
from emu_jax.data import batches as batches_module
from emu_jax.data import digits as digits_module
from emu_jax.data.batches import BUILDERS
from emu_jax.data.digits import (
    CAPTIONS,
    SPLITS,
    WORDS,
    build_digits,
    caption,
    counting_digits,
    digit_images,
    encode_png,
    parse_digit,
)
from emu_jax.data.documents import REASONS, Damaged, DocumentFiles, write_documents
from emu_jax.data.images import (
    ImageError,
    affine,
    load_image,
    open_image,
    sample_affine,
)
from emu_jax.data.latents import LatentBatches, PartWriter, Progress, finish, latent_shapes
from emu_jax.data.lengths import TokenLengths
from emu_jax.data.mixture import SampledDocument, open_groups
from emu_jax.data.packing import IMAGE_PART, PartRange, pack, part_tokens, pick, truncate, window
from emu_jax.data.pipeline import batch_shapes
from emu_jax.data.sources import SourceConfig
from emu_jax.errors import UserError
from emu_jax.generate.prompt import open_file
from emu_jax.models.eva_clip import normalize_images
from emu_jax.tokenizer import Tokenizer

TINY = Path(__file__).parent / "golden" / "tiny"
KINDS = ("rows", "captions", "images", "contexts", "views")


@pytest.fixture(scope="session")
def root(tmp_path_factory, copy_digits) -> Path:
    return copy_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def tokenizer(root) -> Tokenizer:
    return Tokenizer.load(root / "tokenizer")


@pytest.fixture
def cfg(root) -> DataConfig:
    return DataConfig(
        root=str(root),
        split="validation",
        mixture={"pairs": 2.0, "pages": 1.0, "storyboards": 1.0},
        batch_size=6,
        row_tokens=64,
        row_images=8,
        n_causal=4,
        image_size=16,
        target_size=24,
        augment=True,
        seed=3,
        block_documents=64,
    )


def take(batches: Batches, count: int) -> list[dict[str, np.ndarray]]:
    return [next(batches) for _ in range(count)]


def assert_equal(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def grey(value: int, size: int = 5) -> bytes:
    return encode_png(np.full((size, size), value, np.uint8))


# Documents


def test_document_round_trip(tmp_path):
    documents = [
        Document((Text("ünïcode 🙂"), Image(b"\x00\xff"), Text(""), Image(b"", time=1.25))),
        Document(()),
        Document((Image(b"x", None, 0.32),)),
        Document((Text("[USER]: hi", scored=False, special=True), Text("you", scored=False))),
    ]
    for document in documents:
        assert Document.from_bytes(document.to_bytes()) == document
    path = tmp_path / "a" / "x.array_record"
    assert write_documents(path, iter(documents)) == 4
    files = DocumentFiles([path, path])
    assert list(files) == documents * 2
    assert files.where(5) == f"{path} record 1"
    with pytest.raises(IndexError):
        files[8]
    assert [p.name for p in path.parent.iterdir()] == ["x.array_record"]


def test_document_of_another_version_or_kind():
    import msgpack

    with pytest.raises(
        UserError, match="record 7 is a document of version 3.*reads 1 and 2: build"
    ):
        Document.from_bytes(msgpack.packb({"version": 3, "parts": 0}), "record 7")
    for foreign in (b"", b"\xc1", msgpack.packb([1, 2]), msgpack.packb({"version": 1})):
        with pytest.raises(Damaged, match="record 7: not a document"):
            Document.from_bytes(foreign, "record 7")


def test_interrupted_write_leaves_nothing(tmp_path):
    def documents():
        yield Document((Text("one"),))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_documents(tmp_path / "x.array_record", documents())
    assert list(tmp_path.iterdir()) == []


def test_video_is_ordered_by_time():
    document = Document.from_video(
        [(2.0, b"c"), (0.0, b"a"), (1.0, b"b")],
        [(1.5, "then "), (0.5, "hello"), (1.0, " at once"), (3.0, "end")],
    )
    assert document.parts == (
        Image(b"a", 0.0),
        Text("hello"),
        Image(b"b", 1.0),
        Text("at once then"),
        Image(b"c", 2.0),
        Text("end"),
    )


@pytest.mark.parametrize("left", [0, 100, 0.5, 0.9])
def test_cut_file_is_one_clear_line(tmp_path, left):
    path = tmp_path / "x.array_record"
    rng = np.random.default_rng(0)
    write_documents(path, (Document((Image(rng.bytes(900)),)) for _ in range(500)))
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content)) if left < 1 else left])
    with pytest.raises(UserError) as error:
        list(DocumentFiles([path]))
    assert str(path) in str(error.value) and f"rm {path}" in str(error.value)
    assert "\n" not in str(error.value)


def test_damage_inside_a_file_is_one_clear_line(tmp_path):
    path = tmp_path / "x.array_record"
    rng = np.random.default_rng(0)
    write_documents(path, (Document((Image(rng.bytes(900)),)) for _ in range(500)))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 1000] = bytes(1000)
    path.write_bytes(content)
    files, read, damaged = DocumentFiles([path]), 0, []
    for index in range(500):
        try:
            read += bool(files[index].parts)
        except Damaged as error:
            assert error.where == f"{path} record {index}" and "\n" not in str(error)
            damaged.append(error.reason)
    assert read + len(damaged) == 500 and read > 400
    assert set(damaged) == {"damaged record"}


def test_missing_file_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="none.array_record does not exist: write it first"):
        DocumentFiles([tmp_path / "none.array_record"])


# Images


@pytest.mark.parametrize("path", ["process_img", "pipeline"])
@pytest.mark.parametrize("n", range(4))
def test_preprocessing_golden(golden, n, path):
    want = golden[f"preprocess/{n}/{path}"].transpose(1, 2, 0)
    file = TINY / f"preprocess_{n}.png"
    for source in (file, file.read_bytes(), PIL.Image.open(file)):
        pixels = load_image(source, want.shape[0])
        assert pixels.dtype == np.uint8
        got = np.asarray(normalize_images(jnp.asarray(pixels)))
        assert np.abs(got - want).max() / np.abs(want).max() < 2e-5


def test_normalize_images_in_bfloat16_batches():
    pixels = np.random.default_rng(0).integers(256, size=(2, 3, 5, 7, 3)).astype(np.uint8)
    half = normalize_images(jnp.asarray(pixels), jnp.bfloat16)
    assert half.dtype == jnp.bfloat16 and half.shape == pixels.shape
    exact = normalize_images(jnp.asarray(pixels[1, 2]))
    np.testing.assert_allclose(np.asarray(half[1, 2], np.float32), exact, rtol=2**-8, atol=1e-6)


def test_grey_equals_its_rgb():
    pixels = np.random.default_rng(0).integers(256, size=(9, 13)).astype(np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).convert("RGB").save(file, "PNG")
    np.testing.assert_array_equal(
        load_image(encode_png(pixels), 32), load_image(file.getvalue(), 32)
    )


def test_unreadable_image_is_one_clear_line(tmp_path):
    missing, text, cut = (tmp_path / name for name in ("missing.png", "text.png", "cut.png"))
    text.write_text("no image")
    content = (TINY / "preprocess_0.png").read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    for path in (missing, text, cut):
        with pytest.raises(UserError) as error:
            open_image(path)
        assert str(error.value).startswith(f"cannot read the image {path}: ")
    with pytest.raises(UserError, match="cannot read the image in x record 3: "):
        load_image(content[:50], 8, "in x record 3")


def test_only_regular_files_are_opened_as_images_or_videos(tmp_path, monkeypatch):
    """A pipe would be waited for without end, by `generate` and `eval`."""
    monkeypatch.setattr(storage, "MOST_IMAGE", 99)
    monkeypatch.setattr(storage, "MOST_VIDEO", 99)
    for suffix, kind in (("png", "image"), ("mp4", "video")):
        pipe, large = tmp_path / f"pipe.{suffix}", tmp_path / f"large.{suffix}"
        os.mkfifo(pipe)
        large.write_bytes(bytes(100))
        for path, why in (
            (pipe, "not a regular file (a pipe)"),
            (tmp_path, "not a regular file (a directory)"),
            (large, "file too large (100 bytes, at most 99)"),
        ):
            shown = kind if path != tmp_path else "image"
            with pytest.raises(UserError) as error:
                open_file(path)
            assert str(error.value) == f"cannot read the {shown} {path}: {why}"
    with pytest.raises(ImageError) as error:
        open_image(tmp_path / "pipe.png")
    assert error.value.reason in REASONS


def test_images_of_impossible_sizes_are_refused(monkeypatch):
    monkeypatch.setattr("emu_jax.data.images.MOST_PIXELS", 600)

    def reason(width: int, height: int) -> str | None:
        try:
            assert open_image(encode_png(np.zeros((height, width), np.uint8))).size == (
                width,
                height,
            )
        except ImageError as error:
            return error.reason
        return None

    assert reason(30, 20) is reason(100, 1) is reason(2, 200) is None
    assert reason(31, 20) == "image too large"
    assert reason(101, 1) == reason(2, 201) == "image too narrow"


def test_affine_moves_as_told():
    pixels = np.zeros((40, 40), np.uint8)
    pixels[10:14, 20:24] = 255  # its middle is 8 above the image's, and 2 to the right
    image = PIL.Image.fromarray(pixels)

    def middle(*draw: float) -> tuple[float, float]:
        moved = np.asarray(affine(image, *draw), float)
        y, x = np.mgrid[:40, :40] + 0.5
        return (moved * x).sum() / moved.sum() - 20, (moved * y).sum() / moved.sum() - 20

    np.testing.assert_array_equal(affine(image, 0, 1, 0, 0), image)
    np.testing.assert_allclose(middle(0, 1, 0, 0), (2, -8), atol=0.01)
    np.testing.assert_allclose(middle(0, 1, 0.1, 0.25), (6, 2), atol=0.01)
    np.testing.assert_allclose(middle(0, 1.5, 0, 0), (3, -12), atol=0.1)
    np.testing.assert_allclose(middle(90, 1, 0, 0), (8, 2), atol=0.1)  # clockwise
    np.testing.assert_allclose(middle(90, 1, 0.1, 0), (12, 2), atol=0.1)


def test_drawn_affine_stays_in_range():
    rng = np.random.default_rng(0)
    drawn = np.array([sample_affine(rng, rotate=15, scale=0.15, shift=0.1) for _ in range(500)])
    low, high = drawn.min(axis=0), drawn.max(axis=0)
    assert (low >= (-15, 0.85, -0.1, -0.1)).all() and (high <= (15, 1.15, 0.1, 0.1)).all()
    assert (low < (-14, 0.86, -0.09, -0.09)).all() and (high > (14, 1.14, 0.09, 0.09)).all()


# The digits


def test_splits():
    splits = {split: digit_images(split) for split in SPLITS}
    sizes = {split: len(images) for split, (images, _) in splits.items()}
    assert sizes == {"train": 1437, "heldout": 360, "fit": 1300, "validation": 137}
    images, labels = splits["train"]
    assert images.dtype == np.uint8 and images.shape[1:] == (8, 8) and images.max() == 255
    for n in (0, 1):
        together = np.concatenate([splits["fit"][n], splits["validation"][n]])
        np.testing.assert_array_equal(together, splits["train"][n])

    from sklearn.datasets import load_digits

    order = np.random.default_rng(0).permutation(1797)
    np.testing.assert_array_equal(labels, load_digits().target[order[:1437]])
    np.testing.assert_array_equal(splits["heldout"][1], load_digits().target[order[1437:]])
    with pytest.raises(UserError, match="unknown split 'helduot'; did you mean 'heldout'"):
        digit_images("helduot")


def test_files_hold_only_the_images_of_their_split(root):
    def contents(split: str) -> set[bytes]:
        kinds = ("pairs", "pages", "storyboards")
        files = DocumentFiles([root / split / f"{kind}.array_record" for kind in kinds])
        return {p.data for d in files for p in d.parts if isinstance(p, Image)}

    held, fit, validation = map(contents, ("heldout", "fit", "validation"))
    assert len(held) == 360 and len(fit) == 1300 and len(validation) == 137
    assert not held & (fit | validation) and not fit & validation
    assert contents("train") == fit | validation
    images, _ = digit_images("heldout")
    decoded = {np.asarray(open_image(data)).tobytes() for data in held}
    assert decoded == {image.tobytes() for image in images}


def test_words_tell_the_truth(root):
    images, labels = digit_images("heldout")
    label = {encode_png(i): d for i, d in zip(images, labels.tolist(), strict=True)}
    for document in DocumentFiles([root / "heldout" / "pairs.array_record"]):
        image, text = document.parts
        assert parse_digit(text.text) == label[image.data]
    for document in DocumentFiles([root / "heldout" / "pages.array_record"]):
        assert 2 <= len(document.parts) // 2 <= 4
        for one, two in zip(document.parts[::2], document.parts[1::2], strict=True):
            image, text = (one, two) if isinstance(one, Image) else (two, one)
            assert parse_digit(text.text) == label[image.data]
    steps = set()
    for document in DocumentFiles([root / "heldout" / "storyboards.array_record"]):
        frames, subtitles = document.parts[::2], document.parts[1::2]
        shown = [label[frame.data] for frame in frames]
        assert [parse_digit(s.text) for s in subtitles] == shown
        assert [frame.time for frame in frames] == [0.0, 1.0, 2.0, 3.0]
        (step,) = set(np.diff(shown).tolist())
        steps.add(step)
    assert steps == {1, -1, 2, -2}


def test_counting_covers_everything():
    rng = np.random.default_rng(0)
    seen = {tuple(counting_digits(rng)) for _ in range(2000)}
    assert len(seen) == 7 + 7 + 4 + 4
    assert all(0 <= d <= 9 for s in seen for d in s)
    assert {len(counting_digits(rng, 5)) for _ in range(100)} == {5}


def test_captions_and_parse_digit():
    for digit, word in enumerate(WORDS):
        for template in range(len(CAPTIONS)):
            assert word in caption(digit, template)
            assert parse_digit(caption(digit, template)) == digit
    assert caption(8, 3) == "a picture of an eight"
    assert caption(8, 0) == "a handwritten eight"
    assert parse_digit("This is a Seven.") == 7
    for text in ("", "a cat", "one or two", "seven seven", "seventy", "8"):
        assert parse_digit(text) is None


def test_number_words_are_single_tokens(tokenizer):
    assert len({tuple(tokenizer.encode_plain(word)) for word in WORDS}) == 10
    for word in WORDS:
        (token,) = tokenizer.encode_plain(word)
        assert tokenizer.encode_plain(f"the digit {word}")[-1] == token


def test_build_is_deterministic_idempotent_and_mends(root, tmp_path, monkeypatch):
    monkeypatch.setattr(digits_module, "SPLITS", {k: SPLITS[k] for k in ("train", "validation")})
    build_digits(tmp_path)
    names = ["train/storyboards.array_record", "tokenizer/tokenizer.json"]
    contents = {name: (tmp_path / name).read_bytes() for name in names}
    for name in names:
        assert contents[name] == (root / name).read_bytes()
    stamps = {name: (tmp_path / name).stat().st_mtime_ns for name in names}
    build_digits(tmp_path)
    assert stamps == {name: (tmp_path / name).stat().st_mtime_ns for name in names}

    (tmp_path / names[0]).write_bytes(contents[names[0]][:1000])
    (tmp_path / names[1]).unlink()
    build_digits(tmp_path)
    assert contents == {name: (tmp_path / name).read_bytes() for name in names}
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".") or p.suffix == ".tmp"]


# Packing


def test_pack_by_hand():
    def packed(tokens: list[int], images: list[int]) -> list[list[int]]:
        rows = pack(np.array(tokens, int), np.array(images, int), row_tokens=10, row_images=2)
        return sorted(sorted(row) for row in rows)

    # 2 would fill 0's tokens, but not with two images more.
    assert packed([6, 6, 4, 4, 3, 1], [1, 1, 2, 1, 1, 0]) == [[0, 3], [1, 4, 5], [2]]
    # Two long texts and four images: a row has one of the former, two of the latter.
    assert packed([5, 6, 2, 2, 2, 2], [0, 0, 1, 1, 1, 1]) == [[0, 2, 3], [1, 4, 5]]
    # Alike: by turns, not the longest together.
    assert packed([4, 4, 3, 3, 3, 3], [0] * 6) == [[0, 2, 4], [1, 3, 5]]
    assert packed([], []) == []
    with pytest.raises(ValueError, match="document 1 does not fit"):
        packed([1, 11], [0, 0])


@pytest.mark.parametrize("seed", range(3))
def test_pack_loses_nothing(seed):
    rng = np.random.default_rng(seed)
    tokens, images = rng.integers(2, 40, 300), rng.integers(0, 5, 300)
    rows = pack(tokens, images, row_tokens=50, row_images=6)
    assert sorted(n for row in rows for n in row) == list(range(300))
    for row in rows:
        assert row and tokens[row].sum() <= 50 and images[row].sum() <= 6
    assert len(rows) <= 1.2 * max(tokens.sum() / 50, images.sum() / 6)


P = IMAGE_PART


@pytest.mark.parametrize(
    "outline, tokens, images, end, kept",
    [
        ([5, P, 3], 14, 9, "tail", [5, P, 3]),  # an image takes 4 + 2 tokens
        ([5, P, 3], 13, 9, "tail", [5, P]),
        ([5, P, 3], 10, 9, "tail", [5]),  # never inside an image
        ([5, P, 3], 4, 9, "tail", [4]),  # or no words would be left
        ([P, 9], 10, 9, "tail", [P, 4]),
        ([P, 9], 5, 9, "tail", []),
        ([3, P, 2, P, 2], 90, 1, "tail", [3, P, 2]),
        ([3, P, 2, P, 2], 90, 1, "head", [2, P, 2]),
        ([9, P], 9, 9, "head", [3, P]),
        ([5, 9], 9, 9, "head", [9]),
        ([], 9, 9, "tail", []),
    ],
)
def test_truncate(outline, tokens, images, end, kept):
    got = truncate(outline, tokens=tokens, images=images, n_causal=4, end=end)
    assert got == kept
    assert sum(part_tokens(size, 4) for size in got) <= tokens


def parts_of(outline: list[int]) -> list[PartRange]:
    return [PartRange(n, size) for n, size in enumerate(outline)]


def test_windows_by_hand():
    outline = parts_of([5, P, 3, P, 4, P])  # images take 4 tokens: 5 4 3 4 4 4
    seen = {}
    for seed in range(200):
        rng = np.random.default_rng(seed)
        kept = window(outline, rng, tokens=10, images=1, n_causal=2)
        begin = int(np.random.default_rng(seed).integers(24 - 10 + 1))
        assert seen.setdefault(begin, kept) == kept
    assert sorted(seen) == list(range(15))
    assert seen[0] == [PartRange(0, 5), PartRange(1, P), PartRange(2, 1)]
    assert seen[4] == [
        PartRange(0, 1, 4),
        PartRange(1, P),
        PartRange(2, 3),
    ]  # the second image lies across
    assert seen[6] == [PartRange(2, 3), PartRange(3, P)]  # the first lies across
    assert seen[8] == [PartRange(2, 3), PartRange(3, P), PartRange(4, 2)]
    assert seen[14] == [PartRange(3, P), PartRange(4, 4)] or seen[14] == [
        PartRange(4, 4),
        PartRange(5, P),
    ]
    inside = window(parts_of([30]), np.random.default_rng(1), tokens=10, images=1, n_causal=2)
    assert inside == [PartRange(0, 10, int(np.random.default_rng(1).integers(21)))]
    whole = window(outline, np.random.default_rng(0), tokens=24, images=9, n_causal=2)
    assert whole == outline
    assert len(window(outline, np.random.default_rng(0), tokens=24, images=2, n_causal=2)) == 5


def test_images_are_picked_with_their_texts():
    outline = parts_of([5, P, 3, P, P, 4, 2, P])
    both = {1: 2, 3: 5, 4: 5, 7: 6}  # the last image has the text before it
    seen = set()
    for seed in range(60):
        kept = [part.index for part in pick(outline, np.random.default_rng(seed), 2)]
        images = [n for n in kept if n in both]
        assert len(images) == 2
        assert kept == sorted({*images, *(both[n] for n in images)})
        seen.add(tuple(images))
    assert len(seen) == 6
    assert pick(outline, np.random.default_rng(0), 9) == outline[1:]
    assert pick(parts_of([3, 4]), np.random.default_rng(0), 2) == []


def test_outlines_are_kept_and_noticed_stale(tmp_path, tokenizer, monkeypatch):
    path, folder = tmp_path / "x.array_record", tmp_path / "kept"

    def count(*paths: Path) -> TokenLengths:
        return TokenLengths(DocumentFiles(paths), tokenizer, folder)

    write_documents(path, [Document((Text(" the digit seven "), Image(b"x"))), Document(())])
    counted = count(path, path)
    assert [counted[n] for n in range(4)] == [[3, P], [], [3, P], []]
    assert counted.totals() == {
        "documents": 4,
        "tokens": 6,
        "images": 2,
        "with_text": 2,
        "with_image": 2,
        "with_both": 2,
        "damaged": 0,
    }
    with monkeypatch.context() as patch:
        patch.setattr(DocumentFiles, "sketch", None)  # nothing is counted again
        assert count(path, path)[2] == [3, P]

    write_documents(path, [Document((Text("seven"),))])
    assert count(path)[0] == [1]
    for kept in folder.rglob("sizes.npy"):
        kept.write_bytes(b"broken")
    assert count(path)[0] == [1]
    assert not [f for f in folder.iterdir() if f.name.startswith(".")]


def test_an_interrupted_count_goes_on(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("emu_jax.data.lengths._CHUNK", 4)
    path = tmp_path / "x.array_record"
    write_documents(path, [Document((Text("seven " * n),)) for n in range(11)])
    files, read = DocumentFiles([path]), []

    def sketch(index: int) -> Document:
        read.append(index)
        if interrupt and index == 9:
            raise RuntimeError("interrupted")
        return files[index]

    monkeypatch.setattr(files, "sketch", sketch)
    interrupt = True
    with pytest.raises(RuntimeError, match="interrupted"):
        TokenLengths(files, tokenizer, tmp_path)
    interrupt = False
    read.clear()
    lengths = TokenLengths(files, tokenizer, tmp_path)
    assert min(read) == 8
    assert [lengths[n] for n in range(11)] == [[n] for n in range(11)]
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 1 + lengths.parts.count
    order = np.array([7, 2, 10, 2, 0])
    assert lengths.totals_of(order).tolist() == [order.tolist(), *[[0] * 5] * 4]
    read.clear()
    assert TokenLengths(files, tokenizer, tmp_path)[9] == [9] and not read


def hand_made(tmp_path: Path, **documents: list[Document]) -> DataConfig:
    for kind, each in documents.items():
        write_documents(tmp_path / "train" / f"{kind}.array_record", each)
    return DataConfig(
        root=str(tmp_path),
        mixture=dict.fromkeys(documents, 1.0),
        batch_size=1,
        row_tokens=24,
        row_images=3,
        n_causal=2,
        image_size=4,
        target_size=6,
        block_documents=1,
    )


def test_a_row_by_hand(tmp_path, tokenizer):
    page = Document((Text("first a three"), Image(grey(10)), Text(" nine "), Image(grey(20))))
    cfg = hand_made(tmp_path, pages=[page])
    cfg = dataclasses.replace(cfg, block_documents=2, row_tokens=33, row_images=4)
    t = tokenizer
    first, a, three = t.encode_plain("first a three")
    (nine,) = t.encode_plain("nine")
    image = [t.img, t.image, t.image, t.img_end]
    one = [t.bos, first, a, three, *image, nine, *image, t.eos]
    scored = [0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    embedding_index = [-1] * 5 + [0, 1] + [-1] * 3 + [2, 3] + [-1] * 2
    n = len(one)
    with Batches(cfg, tokenizer, "rows") as batches:
        batch = next(batches)
        assert batches.statistics() == {
            "token_fill": 2 * n / 33,
            "image_fill": 1.0,
            "tokens": 2 * n,
            "images": 4,
            "documents": 2,
            "truncated": 0,
            "damaged": {},
        }
    assert batch["tokens"].tolist() == [one + one + [t.pad_id] * 5]
    assert batch["segment_ids"].tolist() == [[1] * n + [2] * n + [0] * 5]
    assert batch["positions"].tolist() == [[*range(n), *range(n), 0, 0, 0, 0, 0]]
    assert batch["text_loss_mask"].astype(int).tolist() == [scored + scored + [0] * 5]
    second = [s + 4 if s >= 0 else -1 for s in embedding_index]
    assert batch["embedding_index"].tolist() == [embedding_index + second + [-1] * 5]
    assert batch["image_valid"].tolist() == [[True] * 4]
    np.testing.assert_array_equal(batch["images"][0, :, 0, 0, 0], [10, 20, 10, 20])

    with Batches(dataclasses.replace(cfg, learn_img=True), tokenizer, "rows") as batches:
        learned = next(batches)
    extra = learned["text_loss_mask"] & ~batch["text_loss_mask"]
    np.testing.assert_array_equal(extra, learned["tokens"] == t.img)
    learned["text_loss_mask"] ^= extra
    assert_equal(learned, batch)

    assert batch["image_scored"].tolist() == [[True] * 4]
    with Batches(dataclasses.replace(cfg, last_image=True), tokenizer, "rows") as batches:
        last = next(batches)
    assert last["image_scored"].tolist() == [[False, True] * 2]
    assert_equal(last | {"image_scored": batch["image_scored"]}, batch)


def test_a_cut_document_has_no_end(tmp_path, tokenizer):
    page = Document((Image(grey(10)), Text("seven " * 9), Image(grey(20)), Text("nine")))
    cfg = dataclasses.replace(hand_made(tmp_path, pages=[page]), row_tokens=16)
    with Batches(cfg, tokenizer, "rows") as batches:
        batch = next(batches)
        assert batches.statistics()["truncated"] == 1
    t = tokenizer
    seven = t.encode_plain("seven")
    want = [t.bos, t.img, t.image, t.image, t.img_end, *seven * 9]
    assert batch["tokens"].tolist() == [want + [t.pad_id] * 2]
    assert t.eos not in batch["tokens"]
    assert batch["text_loss_mask"].sum() == 9
    assert batch["image_valid"].tolist() == [[True, False, False]]


def test_text_cannot_spell_special_tokens(tmp_path, tokenizer):
    page = Document((Text("an <image> and [IMG] </s>"), Image(grey(10))))
    cfg = dataclasses.replace(hand_made(tmp_path, pages=[page]), row_tokens=99)
    with Batches(cfg, tokenizer, "rows") as batches:
        tokens = next(batches)["tokens"]
    assert (tokens == tokenizer.image).sum() == 2
    assert (tokens == tokenizer.eos).sum() == 1


@pytest.mark.parametrize("learn_img", [True, False])
def test_only_what_is_scored_is_learned(root, tmp_path, learn_img):
    t = Tokenizer.load(root / "tokenizer", instruct=True)
    asked = Text("see [IMG]it[/IMG] [USER]:", scored=False, special=True)
    question = (asked, Image(grey(10), scored=False), Text("what? [USER]", scored=False))
    own = Text("a [IMG]seven[/IMG]", special=True)
    turn = (Text("[ASSISTANT]:", False, True), Text("see"), Image(grey(20)), own)
    dialogue = Document((*question, *turn, Text("</s>", special=True)))
    cfg = dataclasses.replace(hand_made(tmp_path, pages=[dialogue]), row_tokens=99)
    with Batches(dataclasses.replace(cfg, learn_img=learn_img), t, "rows") as batches:
        batch = next(batches)
    pixels = t.image_placeholder(cfg.n_causal)
    want = [
        *t.encode(f"see [IMG]it[/IMG] [USER]:{pixels}"),
        *t.encode_plain("what? [USER]"),
        *t.encode(f"[ASSISTANT]: see {pixels} a [IMG]seven[/IMG]</s></s>", bos=False),
    ]
    tokens = batch["tokens"][0]
    assert tokens[tokens != t.pad_id].tolist() == want
    assert (tokens == t.user).sum() == 1  # a user's own words spell no token
    # An image that was drawn is opened by the model itself; one that a text spells is not.
    opened = [t.img] if learn_img else []
    scored = [
        *t.encode_plain("see"),
        *opened,
        *t.encode_plain("a"),
        *t.encode_plain("seven"),
        t.eos,
        t.eos,
    ]
    assert tokens[batch["text_loss_mask"][0]].tolist() == scored
    assert batch["image_valid"][0].tolist() == [True, True, False]
    assert batch["image_scored"][0].tolist() == [False, True, False]


def test_documents_that_each_kind_of_batch_can_use(tmp_path, tokenizer):
    words, image = Text("seven"), Image(grey(10))
    documents = [
        Document((words,)),
        Document((image,)),
        Document((image, words)),
        Document((Text(" "),)),
        Document((words, words)),
    ]
    path = tmp_path / "all.array_record"
    write_documents(path, documents)
    source = SourceConfig("all", "records", (str(path),), paired=True)

    def usable(kind: str, **changes) -> list[int]:
        cfg = DataConfig(sources=(dataclasses.replace(source, **changes),), n_causal=2)
        (group,) = open_groups(cfg, tokenizer, BUILDERS[kind].requires)
        return [n for n in range(5) if group.usable(SampledDocument(n, group.sources[0], n))]

    assert usable("rows") == [0, 1, 2, 4]
    assert usable("rows", picked_images=1) == [1, 2]
    assert usable("captions") == [2]
    assert usable("images") == usable("contexts") == usable("views") == [1, 2]


def test_each_epoch_has_every_document_once(tmp_path, tokenizer):
    """The rows of an epoch hold each document once, in another order each time."""
    pages = [Document((Image(grey(n)), Text(WORDS[n % 10]))) for n in range(48)]
    cfg = hand_made(tmp_path, pages=pages)
    cfg = dataclasses.replace(cfg, block_documents=16)
    with Batches(cfg, tokenizer, "rows") as batches:
        seen: list[int] = []
        while len(seen) < 2 * len(pages):
            batch = next(batches)
            shown = batch["images"][batch["image_valid"]][:, 0, 0, 0].tolist()
            words = batch["tokens"][batch["text_loss_mask"] & (batch["tokens"] != tokenizer.eos)]
            assert [parse_digit(tokenizer.decode([w])) for w in words] == [n % 10 for n in shown]
            seen += shown
        assert batches.statistics()["documents"] == 96
    one, two = seen[:48], seen[48:]
    assert sorted(one) == sorted(two) == list(range(48))
    assert one != two and one != sorted(one)


# Batches of the digits


def check_embedding_index(tokens, embedding_index, valid, tokenizer, n_causal):
    """<image> positions gather the embeddings of the row's images, in order."""
    for row, where, real in zip(tokens, embedding_index, valid, strict=True):
        used = where[row == tokenizer.image]
        assert used.tolist() == list(range(real.sum() * n_causal))
        assert (where[row != tokenizer.image] == -1).all()
        assert real.tolist() == sorted(real.tolist(), reverse=True)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_dtypes(cfg, tokenizer, kind):
    with Batches(cfg, tokenizer, kind) as batches:
        batch = next(batches)
    got = {name: (array.shape, array.dtype) for name, array in batch.items()}
    assert got == batch_shapes(cfg, kind)


def test_rows_invariants(cfg, tokenizer):
    t = tokenizer
    unscored = [t.bos, t.pad_id, t.image, t.img, t.img_end]
    with Batches(cfg, tokenizer, "rows") as batches:
        for batch in take(batches, 8):
            tokens, segments = batch["tokens"], batch["segment_ids"]
            real = segments > 0
            np.testing.assert_array_equal(tokens != t.pad_id, real)
            np.testing.assert_array_equal(
                batch["text_loss_mask"], real & ~np.isin(tokens, unscored)
            )
            check_embedding_index(
                tokens, batch["embedding_index"], batch["image_valid"], t, cfg.n_causal
            )
            np.testing.assert_array_equal(batch["positions"] == 0, ~real | (tokens == t.bos))
            for row in range(cfg.batch_size):
                for segment in range(1, segments[row].max() + 1):
                    here = np.flatnonzero(segments[row] == segment)
                    assert (np.diff(here) == 1).all()
                    np.testing.assert_array_equal(
                        batch["positions"][row, here], np.arange(len(here))
                    )
                    ids = tokens[row, here]
                    assert ids[0] == t.bos and ids[-1] == t.eos
                    assert (ids == t.bos).sum() == (ids == t.eos).sum() == 1
            unused = batch["images"][~batch["image_valid"]]
            assert not unused.any()
            assert batch["images"][batch["image_valid"]].reshape(-1, 16 * 16 * 3).any(axis=1).all()
        fill = batches.statistics()
    assert fill["token_fill"] > 0.8 and fill["image_fill"] > 0.7
    assert fill["truncated"] == 0


def test_captions(cfg, tokenizer):
    plain = dataclasses.replace(cfg, augment=False, row_tokens=12)
    images, labels = digit_images("validation")
    pixels = [load_image(encode_png(image), 16).tobytes() for image in images]
    shown = dict(zip(pixels, labels.tolist(), strict=True))
    with Batches(plain, tokenizer, "captions") as batches:
        for batch in take(batches, 5):
            np.testing.assert_array_equal(batch["valid"], batch["tokens"] != tokenizer.pad_id)
            for image, ids, valid in zip(
                batch["images"], batch["tokens"], batch["valid"], strict=True
            ):
                ids = ids[valid]
                assert ids[0] == tokenizer.bos and ids[-1] == tokenizer.eos
                assert valid[: len(ids)].all()
                assert parse_digit(tokenizer.decode(ids)) == shown[image.tobytes()]
    tight = dataclasses.replace(plain, row_tokens=5, n_causal=1)
    with Batches(tight, tokenizer, "captions") as batches:
        for batch in take(batches, 10):
            assert (batch["tokens"][batch["valid"]] == tokenizer.eos).sum() == cfg.batch_size
        assert 0 < batches.statistics()["truncated"] < 60


def test_images(cfg, tokenizer):
    plain = dataclasses.replace(cfg, augment=False)
    known = {load_image(encode_png(i), 24).tobytes() for i in digit_images("validation")[0]}
    with Batches(plain, tokenizer, "images") as batches:
        seen = {image.tobytes() for batch in take(batches, 6) for image in batch["images"]}
    assert seen <= known and len(seen) > 10


def test_contexts(cfg, tokenizer):
    t = tokenizer
    plain = dataclasses.replace(cfg, augment=False)
    images, labels = digit_images("validation")
    pngs = [encode_png(i) for i in images]
    small = {load_image(p, 16).tobytes(): n for n, p in enumerate(pngs)}
    large = {load_image(p, 24).tobytes(): n for n, p in enumerate(pngs)}
    dropped = follows = 0
    lengths = set()
    with Batches(plain, tokenizer, "contexts") as batches:
        for batch in take(batches, 60):
            check_embedding_index(
                batch["tokens"], batch["embedding_index"], batch["image_valid"], t, cfg.n_causal
            )
            for n, length in enumerate(batch["length"].tolist()):
                ids = batch["tokens"][n]
                assert ids[0] == t.bos and ids[length - 1] == t.img
                assert (ids[length:] == t.pad_id).all() and t.pad_id not in ids[:length]
                assert t.eos not in ids
                lengths.add(length)
                target = large[batch["target"][n].tobytes()]
                before = [
                    labels[small[i.tobytes()]] for i in batch["images"][n][batch["image_valid"][n]]
                ]
                text = t.decode(ids).split()
                named = [WORDS.index(w) for w in text if w in WORDS]
                if length == 2:
                    dropped += 1
                elif len(named) == len(before) + 1:  # the words before it name the target
                    assert named[-1] == labels[target]
                    follows += 1
                else:
                    assert named == before
    # 10% dropped, and the targets that open their document.
    assert 0.1 < dropped / 360 < 0.35
    assert follows > 100 and len(lengths) > 8


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_drop_condition_frequency(cfg, tokenizer, share):
    only = dataclasses.replace(
        cfg, mixture={"pairs": 1.0}, drop_condition=share, batch_size=100, augment=False
    )
    with Batches(only, tokenizer, "contexts") as batches:
        lengths = np.concatenate([b["length"] for b in take(batches, 10)])
    dropped = np.mean(lengths == 2)  # a pair's words stand before its image: never by chance
    assert abs(dropped - share) <= 3 * np.sqrt(share * (1 - share) / 1000)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_image_first_frequency(cfg, tokenizer, share):
    only = dataclasses.replace(
        cfg, mixture={"pairs": 1.0}, image_first=share, batch_size=50, augment=False
    )
    with Batches(only, tokenizer, "rows") as batches:
        batch = next(batches)
    follows = batch["tokens"][:, 1:][batch["tokens"][:, :-1] == tokenizer.bos]
    assert len(follows) > 200
    first = np.mean(follows == tokenizer.img)
    assert abs(first - share) <= 3 * np.sqrt(share * (1 - share) / len(follows))


def test_long_contexts_keep_what_is_near(tmp_path, tokenizer):
    page = Document((Text("one"), Image(grey(10)), Text("two"), Image(grey(20)), Text("three")))
    cfg = hand_made(tmp_path, pages=[page])
    cfg = dataclasses.replace(cfg, row_tokens=7, drop_condition=0.0)
    t = tokenizer
    (one,), (two,) = t.encode_plain("one"), t.encode_plain("two")
    seen = {}
    with Batches(cfg, tokenizer, "contexts") as batches:
        for batch in take(batches, 20):
            ids = batch["tokens"][0, : batch["length"][0]].tolist()
            seen[int(batch["target"][0, 0, 0, 0])] = ids
        assert 0 < batches.statistics()["truncated"] < 20
    image = [t.img, t.image, t.image, t.img_end]
    assert seen == {10: [t.bos, one, t.img], 20: [t.bos, *image, two, t.img]}


def test_an_image_may_be_drawn_from_itself(tmp_path, tokenizer):
    """`autoencode` decides how often the context of an image is the image alone."""
    pairs = [Document((Text("seven"), Image(grey(5 * n + 5)))) for n in range(40)]
    cfg = hand_made(tmp_path, pages=pairs)
    cfg = dataclasses.replace(cfg, target_size=4, batch_size=40, drop_condition=0.0)
    t = tokenizer
    words = [t.bos, *t.encode_plain("seven"), t.img]
    image = [t.bos, t.img, t.image, t.image, t.img_end, t.img]
    for share in (0.0, 0.5, 1.0):
        with Batches(dataclasses.replace(cfg, autoencode=share), t, "contexts") as batches:
            batch = next(batches)
        itself = batch["image_valid"][:, 0]
        assert abs(itself.mean() - share) <= 0.25 * (share == 0.5)
        np.testing.assert_array_equal(batch["images"][itself, 0], batch["target"][itself])
        for row, length, same in zip(batch["tokens"], batch["length"], itself, strict=True):
            assert row[:length].tolist() == (image if same else words)


def test_views_are_one_crop_at_two_sizes(tmp_path, tokenizer):
    """The image is 20 pixels wide and 12 high, and its gray rises by 10 a column."""
    columns = np.broadcast_to(np.arange(20, dtype=np.uint8) * 10, (12, 20))
    cfg = hand_made(tmp_path, pages=[Document((Text("seven"), Image(encode_png(columns))))])
    cfg = dataclasses.replace(cfg, batch_size=200, image_size=12, target_size=6)
    with Batches(cfg, tokenizer, "views") as batches:
        batch = next(batches)
    height, width, top, left, *target = batch["sizes"].T
    assert set(height) == {12} and set(width) == {20} and set(top) == {0}
    assert set(left) == set(range(5))  # 10 pixels wide once it is 6 high
    assert all(set(side) == {6} for side in target)
    # A pixel of the scaled image is two of the original's, and so is the crop's place.
    middle = 10 * (2 * left + 5.5)
    for name in ("images", "target"):
        assert np.abs(batch[name].mean((1, 2, 3)) - middle).max() < 1
        assert np.abs(batch[name][:, 0] - batch[name][:, -1].astype(int)).max() == 0
    assert 0.03 < batch["dropped"].mean() < 0.2
    with Batches(dataclasses.replace(cfg, augment=True, shift=0.4), tokenizer, "views") as batches:
        moved = next(batches)
    np.testing.assert_array_equal(moved["sizes"], batch["sizes"])
    halves = moved["images"].astype(int).reshape(200, 6, 2, 6, 2, 3).mean((2, 4))
    assert (
        np.abs(halves - moved["target"]).mean()
        < 12
        < np.abs(moved["target"][1:] - halves[:-1]).mean()
    )


def test_a_long_text_before_a_image_keeps_its_end(tmp_path, tokenizer):
    page = Document((Text("one two three four five six"), Image(grey(10))))
    cfg = hand_made(tmp_path, pages=[page])
    cfg = dataclasses.replace(cfg, row_tokens=6, drop_condition=0.0)
    with Batches(cfg, tokenizer, "contexts") as batches:
        (ids,) = next(batches)["tokens"]
    assert tokenizer.decode(ids) == "three four five six"
    assert ids[-1] == tokenizer.img and ids[0] == tokenizer.bos


# Order, position, processes


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bit_identical(cfg, tokenizer, kind):
    with Batches(cfg, tokenizer, kind) as whole:
        states, batches = [whole.state()], []
        for _ in range(20):
            batches.append(next(whole))
            states.append(json.loads(json.dumps(whole.state())))
        for n in (13, 0, 19):  # also backwards, and whatever was made ahead
            whole.restore(states[n])
            assert whole.state() == states[n]
            assert_equal(next(whole), batches[n])
    for n in (0, 1, 7, 18):
        with Batches(dataclasses.replace(cfg, prefetch=1), tokenizer, kind) as again:
            again.restore(states[n])
            assert_equal(next(again), batches[n])
            assert_equal(next(again), batches[n + 1])
            assert again.state() == states[n + 2]
    assert any((batches[0][k] != batches[1][k]).any() for k in batches[0])


def test_what_was_read_is_counted_by_source_since_the_first_step(cfg, tokenizer):
    with Batches(cfg, tokenizer, "rows") as batches:
        take(batches, 9)
        state, consumed, statistics = batches.state(), batches.consumed(), batches.statistics()
        sources = batches.tallies
        read = collections.Counter(name for name, _ in batches.documents())
        take(batches, 1)
        later = batches.consumed()
    assert consumed.keys() == sources.keys() and len(sources) > 1
    for name in ("tokens", "images", "documents"):
        assert sum(getattr(c, name) for c in consumed.values()) == statistics[name]
    for name, counts in consumed.items():
        assert counts.epochs == counts.documents / sources[name].used["documents"]
        assert counts.documents >= read[name] > 0
    with Batches(cfg, tokenizer, "rows") as again:
        again.restore(json.loads(json.dumps(state)))
        take(again, 1)
        assert again.consumed() == later != consumed
        # Checkpoints of older versions do not say what came before.
        again.restore({k: v for k, v in state.items() if k != "consumed"})
        assert again.consumed() is None and "consumed" not in again.state()
        for damaged in ([], {"other": [1, 2, 3]}, {name: [1, -2, 3]}):
            with pytest.raises(UserError, match="data position is damaged"):
                again.restore(state | {"consumed": damaged})


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_processes_reads_the_same(cfg, tokenizer, kind):
    with Batches(cfg, tokenizer, kind) as one:
        batches = take(one, 15)
        state, statistics, documents = one.state(), one.statistics(), one.documents()
        assert len(set(documents)) > 1
    for count in (2, 3):
        shares = [Batches(cfg, tokenizer, kind, p, count) for p in range(count)]
        for batch in batches:
            parts = [next(share) for share in shares]
            together = {k: np.concatenate([part[k] for part in parts]) for k in batch}
            assert_equal(together, batch)
        for share in shares:
            assert share.state() == state
            assert share.statistics() == statistics
            share.close()
        assert [document for share in shares for document in share.documents()] == documents


@pytest.mark.parametrize("kind", KINDS)
def test_augmentation_and_seed(cfg, tokenizer, kind):
    def first(**changes) -> dict[str, np.ndarray]:
        with Batches(dataclasses.replace(cfg, **changes), tokenizer, kind) as batches:
            return next(batches)

    batch = first()
    assert_equal(first(), batch)
    assert_equal(first(decode_threads=3), batch)
    assert_equal(first(prefetch=0), batch)
    plain = first(augment=False)
    assert_equal(first(augment=True, rotate=0.0, scale=0.0, shift=0.0), plain)
    pixels = [k for k in batch if k in ("images", "target")]
    for name in batch:
        assert (batch[name] != plain[name]).any() == (name in pixels)
    other = first(seed=4)
    assert any((other[k] != batch[k]).any() for k in batch)


@pytest.mark.parametrize("threads", [1, 3])
def test_documents_read_together_are_those_read_alone(tmp_path, tokenizer, monkeypatch, threads):
    pages = [
        Document((Text(WORDS[n % 10]), *[Image(grey(20 * n + k)) for k in range(n % 3)]))
        for n in range(12)
    ]
    pages[4] = Document((Text("four"), Image(b"no image")))
    cfg = hand_made(tmp_path, pages=pages)
    cfg = dataclasses.replace(
        cfg,
        augment=True,
        block_documents=36,
        row_tokens=48,
        row_images=6,
        batch_size=4,
        decode_threads=threads,
    )

    def read() -> tuple[list[dict[str, np.ndarray]], int]:
        with Batches(cfg, tokenizer, "rows") as batches:
            return take(batches, 6), batches.statistics()["damaged"]["unreadable image"]

    together, damaged = read()
    monkeypatch.setattr(batches_module, "_IMAGES_PER_TASK", 1)
    alone, as_many = read()
    assert damaged == as_many > 0
    for one, two in zip(together, alone, strict=True):
        assert_equal(one, two)


def test_augmentation_differs_between_epochs(tmp_path, tokenizer):
    content = encode_png(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    pair = Document((Image(content), Text("seven")))
    cfg = hand_made(tmp_path, pairs=[pair])
    cfg = dataclasses.replace(cfg, augment=True, target_size=16)
    with Batches(cfg, tokenizer, "images") as batches:
        seen = {next(batches)["images"].tobytes() for _ in range(10)}
    assert len(seen) == 10


def test_mixture_follows_its_weights(cfg, tokenizer):
    weighted = dataclasses.replace(
        cfg, mixture={"pairs": 3.0, "storyboards": 1.0, "pages": 0.0}, batch_size=50, augment=False
    )
    with Batches(weighted, tokenizer, "rows") as batches:
        batch = next(batches)
    counts = []
    for row, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
        for segment in range(1, segments.max() + 1):
            counts.append((row[segments == segment] == tokenizer.img).sum())
    counts = np.array(counts)
    assert set(counts) == {1, 4}
    assert abs(np.mean(counts == 1) - 0.75) < 0.1


# Mistakes


def test_errors_are_one_clear_line(cfg, tokenizer, tmp_path):
    def fails(match: str, kind: str = "rows", processes: int = 1, **changes) -> None:
        with pytest.raises(UserError, match=match):
            Batches(dataclasses.replace(cfg, **changes), tokenizer, kind, 0, processes)

    fails("unknown kind of batch 'row'; did you mean 'rows'", kind="row")
    fails("batch_size 6 cannot be divided into 4 equal shares", processes=4)
    fails("row_tokens.*at least 8, not 7", row_tokens=7)
    fails("seed", seed=-1)
    fails("image_first", image_first=1.5)
    fails("mixture.pages.*negative", mixture={"pages": -1.0})
    fails("no positive weight", mixture={"pages": 0.0})
    fails("no page.array_record; did you mean 'pages'", mixture={"page": 1.0})
    fails("does not exist: write documents there first", root=str(tmp_path / "nowhere"))
    fails("does not exist: write documents there first", split="test")
    write_documents(tmp_path / "train" / "pages.array_record", [Document((Text("seven"),))])
    fails(
        "has no document that 'contexts' can use",
        "contexts",
        root=str(tmp_path),
        split="train",
        mixture={"pages": 1.0},
    )
    with Batches(cfg, tokenizer, "rows") as batches:
        with pytest.raises(UserError, match="position is for 'captions' batches"):
            batches.restore({"kind": "captions", "step": 0, "groups": [[0, 0]]})
        with pytest.raises(UserError, match="position is of 2 groups of sources, this run has 1"):
            batches.restore({"kind": "rows", "step": 0, "groups": [[0, 0], [0, 0]]})
        for step, groups in (
            ("1", [[0, 0]]),
            (-1, [[0, 0]]),
            (True, [[0, 0]]),
            (0, None),
            (0, {}),
            (0, [[0]]),
            (0, [0, 0]),
            (0, [[0, "1"]]),
            (0, [[0, 1.5]]),
            (0, [[-1, 0]]),
            (None, [[0, 0]]),
        ):
            with pytest.raises(UserError, match="the checkpoint's data position is damaged"):
                batches.restore({"kind": "rows", "step": step, "groups": groups})
        with pytest.raises(UserError, match="is row 1000 of block 0, where these sources have no"):
            batches.restore({"kind": "rows", "step": 9, "groups": [[0, 1000]]})
        with pytest.raises(UserError, match="position is for None batches"):
            batches.restore({"step": 0, "groups": [[0, 0]]})
    with Batches(cfg, tokenizer, "images") as batches:  # called "images" in older checkpoints
        state = batches.state()
        batches.restore(state | {"kind": "pictures"})
        assert batches.state() == state


def test_latents_come_shuffled_and_some_without_their_condition(tmp_path, tokenizer):
    """Each epoch has every row once, condition and latents of one image together."""
    model = EmuConfig(
        cformer=CFormerConfig(n_causal=2),
        llama=LlamaConfig(width=6, heads=1),
        unet=None,
        vae=VAEConfig(
            sample_size=4, block_out_channels=(8, 8), latent_channels=1, norm_num_groups=8
        ),
    )
    condition, latents = latent_shapes(model)
    for process in range(2):
        writer = PartWriter(tmp_path, 0, process)
        for n in range(process * 20, process * 20 + 20):
            writer.add(np.full(condition, float(n)), np.full(latents, float(n)))
        writer.close()
    progress = Progress("run").after(tmp_path, rows=40, processes=2, position=None)
    nothing = np.full(condition, -1.0)
    finish(tmp_path, progress, model=model, unconditional=nothing, tokenizer=tokenizer)

    def read(count: int, **changes) -> tuple[np.ndarray, np.ndarray]:
        cfg = DataConfig(batch_size=8, seed=3, **changes)
        with LatentBatches(tmp_path, cfg, model) as batches:
            made = [next(batches) for _ in range(count)]
        shown, said = (
            np.concatenate([np.asarray(b[k], np.float32) for b in made]).reshape(8 * count, -1)
            for k in ("latents", "condition")
        )
        assert (shown == shown[:, :1]).all() and (said == said[:, :1]).all()
        return shown[:, 0], said[:, 0]

    sized = UNetConfig(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        cross_attention_dim=6,
        projection_class_embeddings_input_dim=6 + 48,
    )
    needs_sizes = dataclasses.replace(model, unet=sized)
    with pytest.raises(UserError, match="has no sizes of images"):
        next(LatentBatches(tmp_path, DataConfig(prefetch=0), needs_sizes))
    shown, said = read(10, drop_condition=0.0)
    one, two = shown[:40].tolist(), shown[40:].tolist()
    assert sorted(one) == sorted(two) == list(range(40))
    assert one != two and one != sorted(one)
    np.testing.assert_array_equal(said, shown)
    some_shown, some = read(10, drop_condition=0.4)
    np.testing.assert_array_equal(some_shown, shown)
    assert set(some[some != shown]) == {-1} and 0.25 < np.mean(some == -1) < 0.55
    assert (read(2, drop_condition=1.0)[1] == -1).all()


def test_close_ends_the_thread(cfg, tokenizer):
    before = set(threading.enumerate())
    batches = Batches(cfg, tokenizer, "images")
    first = next(batches)
    (thread,) = set(threading.enumerate()) - before
    state = batches.state()
    batches.close()
    thread.join(timeout=10)
    assert not thread.is_alive()
    second = next(batches)  # goes on
    batches.restore(state)
    assert_equal(next(batches), second)
    assert (first["images"] != second["images"]).any()
    batches.close()


def test_a_forgotten_iterator_ends_its_thread(cfg, tokenizer):
    before = set(threading.enumerate())
    batches = Batches(cfg, tokenizer, "images")
    next(batches)
    (thread,) = set(threading.enumerate()) - before
    del batches
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_tokenizer_of_the_data(root, cfg, tokenizer):
    assert cfg.load_tokenizer().fingerprint == tokenizer.fingerprint
    other = dataclasses.replace(cfg, tokenizer=str(TINY / "tokenizer"))
    assert len(other.load_tokenizer()) == 516
