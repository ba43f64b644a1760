"""Byte ranges of remote files, requested before they are read.

A read from a store takes as long as decoding several images. The order of documents is known, so
the ranges of the coming ones are requested while others are decoded. Ranges that lie close together
in a file take one request. Ranges wait in memory, within a bound, until they are read. Nothing else
depends on them: a range that is not there, or whose request failed, is read on demand.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import NamedTuple

LIMIT_BYTES = 1 << 28  # of all ranges that were requested and not read yet
REQUEST_BYTES = 1 << 23  # of one request; a larger range is read on demand
# Between two ranges of one request. So many bytes cost a reader and a store less than a request.
GAP_BYTES = 1 << 18


class Span(NamedTuple):
    """A byte range of a file."""

    path: str
    start: int
    size: int


@dataclasses.dataclass(eq=False)
class _Request:
    """A request for the bytes of several ranges."""

    span: Span
    content: Future[bytes]
    turn: int  # number of the call that made it
    left: int  # ranges that will still be read


class ReadAhead:
    """Reads ahead of the consumer. Safe for threads.

    Args:
        start: begins to read a range, and returns the future of its bytes. It bounds the number of
            ranges that are read at the same time.
        limit: bytes that are held in memory.
    """

    def __init__(self, start: Callable[[Span], Future[bytes]], limit: int = LIMIT_BYTES) -> None:
        self._start, self._limit = start, limit
        self._lock = threading.Lock()
        self._requests: dict[Span, _Request] = {}  # by the range that is asked for
        self._reads: dict[Span, int] = {}  # how often each will still be read
        self._bytes = self._turn = 0

    def request(self, spans: Iterable[Span]) -> None:
        """Requests all ranges that a reader will read next, in about this order.

        A range that occurs several times is held until it has been read as often. Ranges that do
        not fit into memory are left out. So that ranges which were never read do not fill it,
        requests of earlier calls but the last make room.
        """
        reads = collections.Counter(span for span in spans if span.size <= REQUEST_BYTES)
        with self._lock:
            self._turn += 1
            for span in reads.keys() & self._requests.keys():
                self._reads[span] = reads[span]
            for span, members in _coalesced(s for s in reads if s not in self._requests):
                self._make_room(span.size)
                if self._bytes + span.size > self._limit:
                    return
                request = _Request(span, self._start(span), self._turn, len(members))
                for member in members:
                    self._requests[member], self._reads[member] = request, reads[member]
                self._bytes += span.size

    def take(self, path: str, start: int, size: int) -> bytes | None:
        """Returns a range that was requested, after waiting for it.

        Returns None if it must be read on demand. It was not requested, it was read as often as
        announced, or its request failed.
        """
        span = Span(path, start, size)
        with self._lock:
            if (request := self._requests.get(span)) is None:
                return None
            self._reads[span] -= 1
            if not self._reads[span]:
                self._forget(span)
        try:
            content = request.content.result()
        except Exception:  # or a client cancelled it
            return None
        first = start - request.span.start
        return content[first : first + size]

    def _forget(self, span: Span) -> None:
        request = self._requests.pop(span)
        del self._reads[span]
        request.left -= 1
        if not request.left:
            self._bytes -= request.span.size

    def _make_room(self, size: int) -> None:
        while self._requests and self._bytes + size > self._limit:
            oldest = next(iter(self._requests))
            if self._requests[oldest].turn >= self._turn - 1:
                return
            self._forget(oldest)


def _coalesced(spans: Iterable[Span]) -> Iterator[tuple[Span, list[Span]]]:
    """Yields (range of a request, the ranges in it), ordered by the first that will be read."""
    order = {span: n for n, span in enumerate(spans)}
    groups: list[list[Span]] = []
    end = 0
    for span in sorted(order):
        group = groups[-1] if groups else []
        last = max(end, span.start + span.size)
        if (
            group
            and group[0].path == span.path
            and span.start - end <= GAP_BYTES
            and last - group[0].start <= REQUEST_BYTES
        ):
            group.append(span)
            end = last
        else:
            groups.append([span])
            end = span.start + span.size
    for group in sorted(groups, key=lambda group: min(order[span] for span in group)):
        start = group[0].start
        yield Span(group[0].path, start, max(s.start + s.size for s in group) - start), group
