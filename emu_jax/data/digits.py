"""scikit-learn's 1,797 handwritten digits as documents of four kinds.

The label of an image enters a document only as a word. Splits are taken from
`numpy.random.default_rng(0).permutation(1797)`: the first 1,437 images are for training, the
other 360 are held out. Of the training images the first 1,300 are for fitting, and the last 137
for validation.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import re
from collections.abc import Callable, Iterator

import numpy as np
import PIL.Image
from jaxtyping import Int64, UInt8

from emu_jax.data import storage
from emu_jax.data.documents import Document, Image, Text, write_documents
from emu_jax.errors import UserError, suggest
from emu_jax.storage import as_path
from emu_jax.tokenizer import ASSISTANT, USER, Tokenizer

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = (
    "a handwritten {digit}",
    "the digit {digit}",
    "{digit}",
    "a picture of a {digit}",
    "this is a {digit}",
)
_STEPS = (1, -1, 2, -2)  # of the counting sequences
_FRAMES = 4
SPLITS = {
    "train": slice(0, 1437),
    "heldout": slice(1437, 1797),
    "fit": slice(0, 1300),
    "validation": slice(1300, 1437),
}
HELD_OUT = {"train": "heldout", "fit": "validation"}  # the split that fits one to train on
VOCABULARY = 512  # an upper bound; the few words need less

QUESTIONS = ("what digit is this?", "is it even?", "what comes next? draw it")

_VERSION = 2  # of the files `build_digits` writes
_LISTING = "digits.json"  # their sizes; written last
_SEED = 1
_PER_IMAGE = 3  # pages, and storyboards, for each image of a split


def digit_images(
    split: str,
) -> tuple[UInt8[np.ndarray, "images 8 8"], Int64[np.ndarray, "images"]]:
    """Returns (gray images, white on black, 0..255; labels 0..9) of a split."""
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}{suggest(split, SPLITS)}")
    images, labels = _all_digits()
    chosen = np.random.default_rng(0).permutation(len(labels))[SPLITS[split]]
    return images[chosen], labels[chosen]


@functools.cache
def _all_digits() -> tuple[UInt8[np.ndarray, "images 8 8"], Int64[np.ndarray, "images"]]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels.reshape(-1, 8, 8) * (255 / 16))  # they come as 0..16
    return images.astype(np.uint8), labels.astype(np.int64)


def encode_png(pixels: UInt8[np.ndarray, "h w"]) -> bytes:
    """Encodes a gray image as PNG."""
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def caption(digit: int, template: int) -> str:
    """Returns one of the captions of a digit in `pairs`."""
    return _say(CAPTIONS[template], digit)


def parse_digit(text: str) -> int | None:
    """Returns the digit that a text names, or None if it names none or several."""
    named = [w for w in re.findall(r"[a-z]+", text.lower()) if w in WORDS]
    return WORDS.index(named[0]) if len(named) == 1 else None


def counting_digits(rng: np.random.Generator, frames: int = _FRAMES) -> list[int]:
    """Samples a counting sequence of digits within 0..9, by one of `_STEPS`."""
    step = int(rng.choice(_STEPS))
    reach = step * (frames - 1)
    start = int(rng.integers(max(0, -reach), min(9, 9 - reach) + 1))
    return [start + step * n for n in range(frames)]


def _say(template: str, digit: int) -> str:
    text = template.format(digit=WORDS[digit])
    return text.replace("a eight", "an eight")


SampleImage = Callable[[int], Image]  # a random image of a digit


def _pairs(images: list[Image], labels: Int64[np.ndarray, "images"]) -> Iterator[Document]:
    """Yields every image with every caption."""
    for image, label in zip(images, labels.tolist(), strict=True):
        for template in range(len(CAPTIONS)):
            yield Document((image, Text(caption(label, template))))


def _page(rng: np.random.Generator, show: SampleImage) -> Document:
    """Makes a page of two to four digits, with words before or after each image."""
    digits = rng.integers(10, size=rng.integers(2, 5)).tolist()
    style = int(rng.integers(4))
    parts: list[Text | Image] = []
    for n, digit in enumerate(digits):
        image = show(digit)
        if style == 0:
            words = "first a {digit}" if n == 0 else "then a {digit}"
        elif style == 1:
            words = "is a {digit}" if n == len(digits) - 1 else "is a {digit} and"
        elif style == 2:
            words = CAPTIONS[int(rng.integers(len(CAPTIONS)))]
        else:
            words = "{digit}"
        text = Text(_say(words, digit))
        parts += [image, text] if style == 1 else [text, image]
    return Document(tuple(parts))


def _storyboard(rng: np.random.Generator, show: SampleImage) -> Document:
    """Makes a count as a video with subtitles: a frame a second, its word half a second later."""
    digits = counting_digits(rng)
    frames = [(float(n), show(digit).data) for n, digit in enumerate(digits)]
    subtitles = [(n + 0.5, WORDS[digit]) for n, digit in enumerate(digits)]
    return Document.from_video(frames, subtitles)


def _instructions(
    rng: np.random.Generator,
    images: list[Image],
    labels: Int64[np.ndarray, "images"],
    show: SampleImage,
) -> Iterator[Document]:
    """Yields, for each image, the first two questions about it and the third about a count."""
    for image, digit in zip(images, labels.tolist(), strict=True):
        yield _turn([image], QUESTIONS[0], Text(WORDS[digit]))
        yield _turn([image], QUESTIONS[1], Text("no" if digit % 2 else "yes"))
        *count, following = (show(d) for d in counting_digits(rng))
        yield _turn(count, QUESTIONS[2], following)


def _turn(images: list[Image], question: str, answer: Text | Image) -> Document:
    """Makes one turn, formatted like `generate.prompt.instruct` without a system message; the
    answer is scored."""
    opening = Text(f"{USER}:", scored=False, special=True)
    context = [dataclasses.replace(image, scored=False) for image in images]
    closing = Text(f"{question} {ASSISTANT}:", scored=False, special=True)
    return Document((opening, *context, closing, answer))


def _documents(split: str) -> dict[str, list[Document]]:
    """Returns all documents of a split, by kind."""
    pixels, labels = digit_images(split)
    images = [Image(encode_png(values)) for values in pixels]
    rng = np.random.default_rng([_SEED, list(SPLITS).index(split)])
    by_label = [np.flatnonzero(labels == digit) for digit in range(10)]

    def show(digit: int) -> Image:
        return images[int(rng.choice(by_label[digit]))]

    count = _PER_IMAGE * len(images)
    return {
        "pairs": list(_pairs(images, labels)),
        "pages": [_page(rng, show) for _ in range(count)],
        "storyboards": [_storyboard(rng, show) for _ in range(count)],
        "instructions": list(_instructions(rng, images, labels, show)),
    }


def make_tokenizer(*, instruct: bool = False) -> Tokenizer:
    """Returns the tokenizer that `build_digits` writes, without writing anything."""
    return _train_tokenizer(_documents("train"), instruct=instruct)


def _train_tokenizer(kinds: dict[str, list[Document]], *, instruct: bool = False) -> Tokenizer:
    texts = [
        part.text
        for kind, documents in kinds.items()
        if kind != "instructions"  # pretraining's words alone
        for document in documents
        for part in document.parts
        if isinstance(part, Text)
    ]
    return Tokenizer.train(texts, VOCABULARY, instruct=instruct)


def is_built(root: str | os.PathLike) -> bool:
    """Returns whether `build_digits` has finished in a folder."""
    root = as_path(root)
    try:
        sizes = json.loads((root / _LISTING).read_text())
        return sizes.pop("version") == _VERSION and all(
            (root / name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError, KeyError, AttributeError):
        return False  # absent or unfinished


def build_digits(root: str | os.PathLike) -> None:
    """Writes `root/SPLIT/KIND.array_record` for every split and kind, and `root/tokenizer`.

    Does nothing if a previous call has finished; an interrupted build starts over. Writes are
    atomic.
    """
    root = as_path(root)
    if is_built(root):
        return
    names = []
    for split in SPLITS:
        kinds = _documents(split)
        for kind, documents in kinds.items():
            names.append(f"{split}/{kind}.array_record")
            write_documents(root / names[-1], documents)
        if split == "train":
            _train_tokenizer(kinds).save(root / "tokenizer")
    names.append("tokenizer/tokenizer.json")

    values = {"version": _VERSION, **{name: (root / name).stat().st_size for name in names}}
    with storage.writing_data_file(
        str(root / _LISTING)
    ) as temporary:  # last: it marks the build as complete
        temporary.write_text(json.dumps(values, indent=1) + "\n")
