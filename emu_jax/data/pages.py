"""Interleaved pages: MMC4 and OBELICS in their JSON lines."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from emu_jax.data.documents import Damaged, Document, Picture, Text
from emu_jax.data.listings import Entries, Listed, Media


class _Shown(NamedTuple):
    """A picture of a page: its file's name, or its bytes."""

    picture: str | bytes
    similarity: float | None = None

    def as_picture(self, content: bytes = b"") -> Picture:
        content = content if isinstance(self.picture, str) else self.picture
        return Picture(content, similarity=self.similarity)


_Part = Text | _Shown


class Pages(Listed):
    """One page in each entry, of either layout:

    MMC4: `text_list`, and `image_info` whose `image_name` (or `image_base64`) stands before
    the text of number `matched_text_index`. A picture less similar to that text than
    `min_similarity` is dropped (`matched_sim`, or else the page's `similarity_matrix`).
    OBELICS: `images` and `texts` of one length, null where the other has something.

    A picture that is in none of `media` is dropped, too: pages name what their crawl had.
    """

    def __init__(self, entries: Entries, media: Media, min_similarity: float):
        super().__init__(entries, media, min_similarity)
        self._least = min_similarity

    def read(
        self, index: int, seed: Sequence[int] | None = None,
        wanted: Collection[int] | None = None,
    ) -> Document:  # fmt: skip
        folder, where = self._entries.folder(index), self.where(index)
        parts: list[Text | Picture] = []
        for number, part in enumerate(self._parts(index)):
            if isinstance(part, Text):
                parts.append(part)
                continue
            read = isinstance(part.picture, str) and (wanted is None or number in wanted)
            content = self._media.read(part.picture, folder, where) if read else b""
            parts.append(part.as_picture(content))
        return Document(tuple(parts))

    def sketch(self, index: int) -> Document:
        parts = self._parts(index)
        return Document(tuple(p if isinstance(p, Text) else p.as_picture() for p in parts))

    def _parts(self, index: int) -> list[_Part]:
        where, entry = self._entries.where(index), self._entries[index]
        try:
            parts = _obelics(entry) if "texts" in entry else _mmc4(entry, self._least)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise Damaged("malformed entry", where, repr(error)) from None
        folder = self._entries.folder(index)
        return [
            part for part in parts
            if isinstance(part, Text) or isinstance(part.picture, bytes)
            or self._media.has(part.picture, folder)
        ]  # fmt: skip


def _mmc4(entry: dict[str, Any], least: float) -> list[_Part]:
    before: dict[int, list[_Part]] = {}
    for number, picture in enumerate(entry["image_info"]):
        place = int(picture["matched_text_index"])
        similarity = picture.get("matched_sim")
        if similarity is None and "similarity_matrix" in entry:
            similarity = entry["similarity_matrix"][number][place]
        similarity = None if similarity is None else float(similarity)
        if similarity is not None and similarity < least:
            continue
        content = picture.get("image_base64")
        shown = picture["image_name"] if content is None else _decoded(content)
        if not 0 <= place < len(entry["text_list"]):
            raise IndexError(f"matched_text_index {place}")
        if shown is not None:  # null: it could not be crawled
            before.setdefault(place, []).append(_Shown(shown, similarity))
    parts: list[_Part] = []
    for place, words in enumerate(entry["text_list"]):
        parts += [*before.get(place, ()), _words(words)]
    return parts


def _obelics(entry: dict[str, Any]) -> list[_Part]:
    parts: list[_Part] = []
    for picture, words in zip(entry["images"], entry["texts"], strict=True):
        if picture is not None:
            parts.append(_Shown(str(picture)))
        if words is not None:
            parts.append(_words(words))
    return parts


def _words(words: Any) -> Text:
    if not isinstance(words, str):
        raise TypeError(f"{words!r} is no text")
    return Text(words)


def _decoded(content: str) -> bytes:
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise ValueError(f"image_base64: {error}") from None
