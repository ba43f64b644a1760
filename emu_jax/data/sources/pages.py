"""Interleaved web pages: MMC4 and OBELICS, in JSON lines or Parquet."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from emu_jax.data import storage
from emu_jax.data.documents import ABSENT, Damaged, Document, Image, Text
from emu_jax.data.sources.entries import MALFORMED, Entries
from emu_jax.data.sources.listings import Listed, Media
from emu_jax.data.unused import Unused


class _PageImage(NamedTuple):
    """An image of a page: the name of its file, or its bytes."""

    image: str | bytes
    similarity: float | None = None

    def as_image(self, content: bytes = b"") -> Image:
        content = content if isinstance(self.image, str) else self.image
        return Image(content, similarity=self.similarity)


_Part = Text | _PageImage


class Pages(Listed):
    """Web pages, one an entry, in either of two layouts.

    MMC4: `text_list`, and `image_info`, whose `image_name` (or `image_base64`) comes before the
    text number `matched_text_index`. An image less similar to that text than `min_similarity` is
    dropped (`matched_sim`, or else the page's `similarity_matrix`).
    OBELICS: `images` and `texts` of equal length; where one has a value, the other is null. An
    image is the name of a file, its URL (see `UrlFiles`), or `{"bytes": ..., "path": ...}`.

    An image that is in none of `media` is left out and counted, because pages name images that
    their crawl could not download. It keeps its part number, so its arrival does not change
    documents that were counted before.
    """

    videos = False

    def __init__(self, entries: Entries, media: Media, min_similarity: float) -> None:
        super().__init__(entries, media, min_similarity)
        self._least = min_similarity

    def read(
        self,
        index: int,
        seed: Sequence[int] | None = None,
        part_indices: Collection[int] | None = None,
    ) -> Document:
        folder, where = self._entries.folder(index), self.where(index)
        source, unused = self._shown(index)
        parts: list[Text | Image] = []
        for number, part in enumerate(source):
            if isinstance(part, Text):
                parts.append(part)
            elif isinstance(part.image, bytes) or (
                part_indices is not None and number not in part_indices
            ):
                parts.append(part.as_image())
            elif part_indices is None and (reason := self._media.lacks(part.image, folder)):
                unused.append(Unused(f"{reason} image", self._named(part.image)))
                parts.append(ABSENT)
            else:
                parts.append(part.as_image(self._media.read(part.image, folder, where)))
        return Document(tuple(parts), tuple(unused))

    def sketch(self, index: int) -> Document:
        folder = self._entries.folder(index)
        source, unused = self._shown(index)
        parts: list[Text | Image] = []
        for part in source:
            if isinstance(part, Text):
                parts.append(part)
                continue
            name = part.image
            reason = isinstance(name, str) and self._media.lacks(name, folder, listed=True)
            if reason:
                unused.append(Unused(f"{reason} image", self._named(str(name))))
            parts.append(ABSENT if reason else part.as_image())
        return Document(tuple(parts), tuple(unused))

    def _named(self, name: str) -> str:
        """Names a missing image, for messages."""
        is_url = storage.is_remote(name) and not self._media.by_url
        return f"{name}, a URL: set url_files to the files of URLs" if is_url else name

    def _shown(self, index: int) -> tuple[list[_Part], list[Unused]]:
        """Returns the parts of a page, whether or not their files exist, and the parts that the
        entry itself excludes."""
        entry = self._entries[index]
        try:
            return _obelics(entry) if "texts" in entry else _mmc4(entry, self._least)
        except MALFORMED as error:
            where = self._entries.where(index)
            raise Damaged("malformed entry", where, repr(error)) from None


def _mmc4(entry: dict[str, Any], least: float) -> tuple[list[_Part], list[Unused]]:
    before: dict[int, list[_Part]] = {}
    unused: list[Unused] = []
    for number, image in enumerate(entry["image_info"]):
        text_index = int(image["matched_text_index"])
        similarity = image.get("matched_sim")
        if similarity is None and "similarity_matrix" in entry:
            similarity = entry["similarity_matrix"][number][text_index]
        similarity = None if similarity is None else float(similarity)
        if similarity is not None and similarity < least:
            unused.append(Unused("image unlike its text", f"similarity {similarity:.3f}"))
            continue
        content = image.get("image_base64")
        source = image["image_name"] if content is None else _decoded(content)
        if not isinstance(source, str | bytes | None):
            raise TypeError(f"image_name {source!r}")
        if not 0 <= text_index < len(entry["text_list"]):
            raise IndexError(f"matched_text_index {text_index}")
        if source is None:  # it could not be crawled
            unused.append(Unused("no image", f"image_info {number}"))
        else:
            before.setdefault(text_index, []).append(_PageImage(source, similarity))
    parts: list[_Part] = []
    for text_index, words in enumerate(entry["text_list"]):
        parts += [*before.get(text_index, ()), _words(words)]
    return parts, unused


def _obelics(entry: dict[str, Any]) -> tuple[list[_Part], list[Unused]]:
    parts: list[_Part] = []
    unused: list[Unused] = []
    pairs = zip(entry["images"], entry["texts"], strict=True)
    for number, (image, words) in enumerate(pairs):
        if isinstance(image, dict):  # an image of the datasets library
            parts.append(_PageImage(image.get("bytes") or str(image["path"])))
        elif image is not None:
            parts.append(_PageImage(str(image)))
        if words is not None:
            parts.append(_words(words))
        elif image is None:
            unused.append(Unused("no image", f"images {number}"))
    return parts, unused


def _words(words: Any) -> Text:
    if not isinstance(words, str):
        raise TypeError(f"{words!r} is not a text")
    return Text(words)


def _decoded(content: str) -> bytes:
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise ValueError(f"image_base64: {error}") from None
