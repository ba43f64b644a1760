"""Interleaved web pages: the JSON lines of MMC4 and OBELICS."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from emu_jax.data.documents import ABSENT, Damaged, Document, Picture, Text
from emu_jax.data.listings import MALFORMED, Entries, Listed, Media
from emu_jax.data.unused import Unused


class _Shown(NamedTuple):
    """An image of a page: the name of its file, or its bytes."""

    picture: str | bytes
    similarity: float | None = None

    def as_picture(self, content: bytes = b"") -> Picture:
        content = content if isinstance(self.picture, str) else self.picture
        return Picture(content, similarity=self.similarity)


_Part = Text | _Shown


class Pages(Listed):
    """Web pages, one an entry, in either of two layouts.

    MMC4: `text_list`, and `image_info`, whose `image_name` (or `image_base64`) comes before the
    text number `matched_text_index`. An image less similar to that text than `min_similarity` is
    dropped (`matched_sim`, or else the page's `similarity_matrix`).
    OBELICS: `images` and `texts` of equal length; where one has a value, the other is null.

    An image that is in none of `media` is left out and counted, because pages name images that
    their crawl could not download. It keeps its part number, so its arrival does not change
    documents that were counted before.
    """

    def __init__(self, entries: Entries, media: Media, min_similarity: float):
        super().__init__(entries, media, min_similarity)
        self._least = min_similarity

    def read(
        self,
        index: int,
        seed: Sequence[int] | None = None,
        wanted: Collection[int] | None = None,
    ) -> Document:
        folder, where = self._entries.folder(index), self.where(index)
        shown, unused = self._shown(index)
        parts: list[Text | Picture] = []
        for number, part in enumerate(shown):
            if isinstance(part, Text):
                parts.append(part)
            elif isinstance(part.picture, bytes) or (wanted is not None and number not in wanted):
                parts.append(part.as_picture())
            elif wanted is None and (reason := self._media.lacks(part.picture, folder)):
                unused.append(Unused(f"{reason} image", part.picture))
                parts.append(ABSENT)
            else:
                parts.append(part.as_picture(self._media.read(part.picture, folder, where)))
        return Document(tuple(parts), tuple(unused))

    def sketch(self, index: int) -> Document:
        folder = self._entries.folder(index)
        shown, unused = self._shown(index)
        parts: list[Text | Picture] = []
        for part in shown:
            if isinstance(part, Text):
                parts.append(part)
                continue
            name = part.picture
            reason = isinstance(name, str) and self._media.lacks(name, folder)
            if reason:
                unused.append(Unused(f"{reason} image", str(name)))
            parts.append(ABSENT if reason else part.as_picture())
        return Document(tuple(parts), tuple(unused))

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
    for number, picture in enumerate(entry["image_info"]):
        place = int(picture["matched_text_index"])
        similarity = picture.get("matched_sim")
        if similarity is None and "similarity_matrix" in entry:
            similarity = entry["similarity_matrix"][number][place]
        similarity = None if similarity is None else float(similarity)
        if similarity is not None and similarity < least:
            unused.append(Unused("image unlike its text", f"similarity {similarity:.3f}"))
            continue
        content = picture.get("image_base64")
        shown = picture["image_name"] if content is None else _decoded(content)
        if not isinstance(shown, str | bytes | None):
            raise TypeError(f"image_name {shown!r}")
        if not 0 <= place < len(entry["text_list"]):
            raise IndexError(f"matched_text_index {place}")
        if shown is None:  # it could not be crawled
            unused.append(Unused("no image", f"image_info {number}"))
        else:
            before.setdefault(place, []).append(_Shown(shown, similarity))
    parts: list[_Part] = []
    for place, words in enumerate(entry["text_list"]):
        parts += [*before.get(place, ()), _words(words)]
    return parts, unused


def _obelics(entry: dict[str, Any]) -> tuple[list[_Part], list[Unused]]:
    parts: list[_Part] = []
    unused: list[Unused] = []
    pairs = zip(entry["images"], entry["texts"], strict=True)
    for number, (picture, words) in enumerate(pairs):
        if picture is not None:
            parts.append(_Shown(str(picture)))
        if words is not None:
            parts.append(_words(words))
        elif picture is None:
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
