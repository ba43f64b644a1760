"""Scorers of the benchmarks: captions, answers, rankings, images.

Each scorer follows the official evaluation of its benchmark and returns a `Scores`. Any departure
from that evaluation is recorded in `Scores.notes`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Collection, Hashable, Mapping

from emu_jax.errors import UserError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Scores:
    """The result of a scorer.

    Attributes:
        values: figures by name, in the units that papers print (usually percent).
        notes: conventions followed, and departures from the official evaluation.
        per_item: the first figure for each item, in the same units. None if the figure is not
            defined for single items.
    """

    values: dict[str, float]
    notes: tuple[str, ...] = ()
    per_item: Mapping[Hashable, float] | None = None


@functools.cache
def warned(note: str) -> str:
    """Returns `note`, and logs it as a warning the first time."""
    log.warning("%s", note)
    return note


def check_keys(expected: Collection[Hashable], given: Collection[Hashable], what: str) -> None:
    """Checks that every expected key is given, and no other. `what` names the values in errors.

    Raises:
        UserError: a key is missing or unknown, or nothing is expected.
    """
    if not expected:
        raise UserError("there is nothing to score: the references are empty")
    missing = [key for key in expected if key not in given]
    if missing:
        raise UserError(f"{len(missing)} of {len(expected)} {what} missing, {missing[0]!r} first")
    known = set(expected)
    surplus = [key for key in given if key not in known]
    if surplus:
        raise UserError(f"{len(surplus)} {what} of unknown items, {surplus[0]!r} first")
