"""Counts of the used and unused parts of a source: every part that is left out is counted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import UInt8

from emu_jax.errors import UserError

_KINDS = ("documents", "images", "texts")  # see `Tally.used`
MAY_LACK = _KINDS[1:]  # values of `SourceConfig.allow_missing`
EXAMPLES = 3  # kept for each reason
_LONGEST = 300  # characters of an example, which may quote the data

_V = TypeVar("_V")

# {reason: kinds of parts that it loses}; `Tally.check` refuses a source that lost a whole kind. A
# reason that is not listed leaves out a whole document (`documents.REASONS`), or nothing that
# training would read.
LOSES: dict[str, tuple[str, ...]] = {
    "unused sheet": ("images",),  # of a storyboard, after its last frame
    "missing image": ("images",),  # named, but in none of the media
    "no image": ("images",),  # null: it could not be downloaded
    "ambiguous image": ("images",),  # several files fit the name
    "image unlike its text": ("images",),  # below `min_similarity`
    "image of an unused message": ("images",),
    "video of an unused message": ("images",),
    "empty text": ("texts",),
    "no caption": ("texts",),
    "empty subtitle cue": ("texts",),
    "unreadable subtitle cue": ("texts",),
    "undecodable subtitle line": ("texts",),
    "unlike its words": ("images",),  # found by `data build`, like the next one
    "image too small": ("images",),
    # Whole documents:
    "unreadable image": ("images",),
    "image too large": ("images",),
    "image too narrow": ("images",),
    "unreadable video": ("images",),
    "video without frames": ("images",),
    "slow video": ("images",),
    "missing file": ("images",),
    "not a regular file": ("images",),
    "file too large": ("images", "texts"),
    "text too large": ("texts",),
    "incomplete sample": ("images", "texts"),
    "malformed subtitles": ("texts",),
}

# Reasons as earlier versions wrote them.
_FORMER_REASONS = {
    former: former.replace("picture", "image")
    for former in (
        "unreadable picture",
        "picture too large",
        "picture too narrow",
        "picture too small",
    )
}


def current_reason(reason: str) -> str:
    """Returns the name of a reason that an earlier version may have written."""
    return _FORMER_REASONS.get(reason, reason)


def current_reasons(values: Mapping[str, _V]) -> dict[str, _V]:
    """Renames the keys of counts or examples that an earlier version may have written."""
    return {current_reason(reason): value for reason, value in values.items()}


class Unused(NamedTuple):
    """Something in the data that its document does not use: a part, cue, frame or member.

    Attributes:
        reason: a fixed phrase to count by, such as "missing image".
        detail: identifies the part, for messages.
    """

    reason: str
    detail: str = ""


@dataclasses.dataclass
class Tally:
    """Counts of the used parts of a source, and of the unused ones by reason.

    Attributes:
        used: number of documents, images, and texts that are not empty.
        unused: number of documents, parts or members left out for each reason.
        examples: the first few examples of each reason.
    """

    used: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(_KINDS, 0))
    unused: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def use(self, *, images: int, texts: int) -> None:
        """Counts a used document with its parts."""
        self.used["documents"] += 1
        self.used["images"] += images
        self.used["texts"] += texts

    def leave(self, reason: str, count: int = 1) -> bool:
        """Counts parts that are left out. Returns whether `example` would keep an example."""
        self.unused[reason] = self.unused.get(reason, 0) + count
        return len(self.examples.get(reason, ())) < EXAMPLES

    def example(self, reason: str, text: str) -> None:
        """Keeps an example for a reason, if there are fewer than `EXAMPLES`."""
        known = self.examples.setdefault(reason, [])
        if len(known) < EXAMPLES:
            known.append(text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ...")

    def merge(self, other: Tally) -> None:
        """Adds the counts of another tally; its examples come last."""
        for kind, count in other.used.items():
            self.used[kind] = self.used.get(kind, 0) + count
        for reason, count in other.unused.items():
            self.leave(reason, count)
            for text in other.examples.get(reason, ()):
                self.example(reason, text)

    def check(self, allowed: Collection[str] = ()) -> None:
        """Refuses a source that has lost all parts of a kind.

        Args:
            allowed: kinds that the source may lack.

        Raises:
            UserError: no document is used, or no image or no text although the source has some.
        """
        for kind in _KINDS:
            lost = {
                reason: count
                for reason, count in self.unused.items()
                if kind == "documents" or kind in LOSES.get(reason, ())
            }
            if self.used[kind] or not lost or kind in allowed:
                continue
            why = ", ".join(f"{reason}: {count:,}" for reason, count in lost.items())
            shown = [text for reason in lost for text in self.examples.get(reason, ())]
            fix = "correct its paths or its data"
            if kind in MAY_LACK:
                fix += f", or set allow_missing=({kind!r},) if this is intended"
            raise UserError(f"none of its {kind} can be used ({why}; {'; '.join(shown)}): {fix}")

    def summary(self) -> str:
        """Formats the tally as one line: used parts, then unused ones by reason."""
        used = ", ".join(f"{self.used[kind]:,} {kind}" for kind in ("documents", "texts", "images"))
        unused = ", ".join(f"{count:,} {reason}" for reason, count in self.unused.items())
        return f"{used}; unused: {unused or 'none'}"

    def to_dict(self) -> dict[str, Any]:
        """Returns `used`, `unused` and `examples` as plain values."""
        return dataclasses.asdict(self)

    def to_array(self) -> UInt8[np.ndarray, "bytes"]:
        """Encodes the tally as JSON bytes, for a cache of arrays."""
        return np.frombuffer(json.dumps(self.to_dict()).encode(), np.uint8)

    @classmethod
    def add(cls, arrays: Iterable[UInt8[np.ndarray, "_"]]) -> UInt8[np.ndarray, "_"]:
        """Merges tallies encoded by `to_array`."""
        total = cls()
        for array in arrays:
            total.merge(cls.from_array(array))
        return total.to_array()

    @classmethod
    def from_array(cls, array: UInt8[np.ndarray, "bytes"]) -> Tally:
        """Decodes a tally encoded by `to_array`.

        Raises:
            ValueError: the array is not an encoded tally.
        """
        try:
            tally = cls(**json.loads(array.tobytes()))
        except TypeError as error:
            raise ValueError(str(error)) from None
        tally.unused = current_reasons(tally.unused)
        tally.examples = current_reasons(tally.examples)
        return tally
