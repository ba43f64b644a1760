"""Compact positions of the members of tar samples: 20 bytes a sample.

A sample is an array [roles, 2] of (offset, size) of its members; a size of 0 means none. Nearly all
samples have their members one after the other, so the offset of the first and the sizes tell the
rest. Other samples are listed as they are.

    block        uint32, offset of the first member in blocks of a tar
    layout       uint32, from its lowest bits on: the role of each member + 1 (3 bits each), the
                 header blocks before the second and the third (5 bits each), the damage (8 bits)
    member_size  uint32 [samples, 3], sizes of the members in the order of their offsets
    wide_row     int64, samples that do not fit; their layout is _WIDE with the damage
    wide_span    int64 [wide samples, roles, 2]
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from emu_jax.data.sources.index import Arrays

SAMPLE_BYTES = 20
_MEMBERS = 3
_BLOCK = tarfile.BLOCKSIZE
_GAP_BITS, _GAPS_AT, _DAMAGE_AT = 5, 9, 19
_WIDE = 1 << 31
_CHUNK = 1 << 20  # samples whose layouts are looked up together


def compact_spans(
    spans: Int[np.ndarray, "samples roles 2"], damage: Int[np.ndarray, "samples"]
) -> Arrays:
    """Returns the arrays that `Spans` reads.

    Args:
        damage: a code from 0 to 255 of each sample.
    """
    count, roles, _ = spans.shape
    offsets, sizes = spans[..., 0], spans[..., 1]
    used = sizes > 0
    order = np.argsort(np.where(used, offsets, np.iinfo(np.int64).max), axis=1, kind="stable")
    order = np.pad(order, ((0, 0), (0, max(0, _MEMBERS - roles))))[:, :_MEMBERS]
    rows = np.arange(count)[:, None]
    in_use = np.arange(_MEMBERS) < used.sum(axis=1)[:, None]
    offset = np.where(in_use, offsets[rows, order], 0)
    size = np.where(in_use, sizes[rows, order], 0)
    ends = -(-(offset + size) // _BLOCK) * _BLOCK
    gaps = np.where(in_use[:, 1:], offset[:, 1:] - ends[:, :-1], 0)
    fits = (
        (used.sum(axis=1) <= _MEMBERS)
        & (size < 2**32).all(axis=1)
        & (offset[:, 0] < 2**32 * _BLOCK)
        & (offset % _BLOCK == 0).all(axis=1)
        & ((gaps >= 0) & (gaps < _BLOCK << _GAP_BITS)).all(axis=1)
    )
    layout = np.where(fits, 0, _WIDE) | damage.astype(np.int64) << _DAMAGE_AT
    for n in range(_MEMBERS):
        layout |= np.where(fits & in_use[:, n], order[:, n] + 1, 0) << 3 * n
    for n in range(_MEMBERS - 1):
        layout |= np.where(fits, gaps[:, n] // _BLOCK, 0) << _GAPS_AT + _GAP_BITS * n
    wide = np.flatnonzero(~fits)
    return {
        "block": np.where(fits, offset[:, 0] // _BLOCK, 0).astype(np.uint32),
        "layout": layout.astype(np.uint32),
        "member_size": np.where(fits[:, None], size, 0).astype(np.uint32),
        "wide_row": wide,
        "wide_span": spans[wide],
    }


class Spans:
    """The spans and damage of samples, from the arrays of `compact_spans`.

    Args:
        roles: number of roles of a member.
    """

    def __init__(self, arrays: Arrays, roles: int) -> None:
        self._roles = roles
        self._blocks, self._layouts = arrays["block"], arrays["layout"]
        self._sizes = arrays["member_size"]
        self._wide_rows = np.asarray(arrays["wide_row"])  # few
        self._wide_spans = arrays["wide_span"]

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> Int[np.ndarray, "roles 2"]:
        layout = int(self._layouts[index])
        if layout & _WIDE:
            return np.asarray(self._wide_spans[int(np.searchsorted(self._wide_rows, index))])
        spans = np.zeros((self._roles, 2), np.int64)
        offset, sizes = int(self._blocks[index]) * _BLOCK, self._sizes[index].tolist()
        for n, size in enumerate(sizes):
            role = layout >> 3 * n & 7
            if not role:
                break
            if n:
                gap_at = _GAPS_AT + _GAP_BITS * (n - 1)
                offset += (layout >> gap_at & (1 << _GAP_BITS) - 1) * _BLOCK
            spans[role - 1] = offset, size
            offset += -(-size // _BLOCK) * _BLOCK
        return spans

    def any_with(self, role: int, without: Sequence[int]) -> bool:
        """Returns whether a sample has a member of a role and none of some other roles."""
        wide = np.asarray(self._wide_spans)[..., 1] > 0
        if (wide[:, role] & ~wide[:, without].any(axis=1)).any():
            return True
        for first in range(0, len(self), _CHUNK):
            layouts = np.asarray(self._layouts[first : first + _CHUNK])
            roles = [(layouts >> 3 * n & 7) * (layouts < _WIDE) for n in range(_MEMBERS)]
            has = np.isin(roles, role + 1).any(axis=0)
            if (has & ~np.isin(roles, np.add(without, 1)).any(axis=0)).any():
                return True
        return False

    def damage(self, index: int) -> int:
        """Returns the code of a sample's damage."""
        return int(self._layouts[index]) >> _DAMAGE_AT & 255
