"""What the benchmarks are scored by: captions, answers, rankings, pictures.

Each scorer follows the evaluation that its benchmark's numbers are published with, and returns
a `Scores`. Where it has to depart from that evaluation, `Scores.notes` says how.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Collection, Hashable, Mapping

from emu_jax.config import UserError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a scorer found.

    Attributes:
        values: figures by name, in the units that papers print (percent where there is one).
        notes: the conventions followed, and what was not as the official evaluation has it.
        per_item: the first of the figures item by item, in the same units. None where items
            have no figure of their own.
    """

    values: dict[str, float]
    notes: tuple[str, ...] = ()
    per_item: Mapping[Hashable, float] | None = None


@functools.cache
def warned(note: str) -> str:
    """`note` itself, logged as a warning the first time."""
    log.warning("%s", note)
    return note


def check_keys(expected: Collection[Hashable], given: Collection[Hashable], what: str) -> None:
    """One of `what` for each that is expected, and at least one in all.

    Raises:
        UserError: one is missing or belongs to nothing, or nothing is expected.
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
