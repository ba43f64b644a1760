"""Byte ranges of remote files, requested before they are read.

A read from a store takes as long as decoding several images. Ranges that lie close together in a
file are requested at once; requests run on threads. Ranges wait in memory, within a bound, until
they are read. Nothing else depends on them: a range that is not there is read on demand.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

LIMIT_BYTES = 1 << 28  # of all ranges that were requested and not read yet
REQUEST_BYTES = 1 << 23  # of one request; a larger range is read on demand
GAP_BYTES = 1 << 16  # between two ranges of one request, which take less time than another request


class Span(NamedTuple):
    """A byte range of a file."""

    path: str
    start: int
    size: int


class _Request(NamedTuple):
    """A request for the bytes of several ranges."""

    span: Span
    content: Future[bytes]
    turn: int  # number of the call that made it


class ReadAhead:
    """Reads ahead of the consumer. Safe for threads.

    Args:
        fetch: reads a byte range of a file.
        threads: requests at the same time.
        limit: bytes that are held in memory.
    """

    def __init__(
        self, fetch: Callable[[str, int, int], bytes], threads: int, limit: int = LIMIT_BYTES
    ) -> None:
        self._fetch, self._threads, self._limit = fetch, threads, limit
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._requests: dict[Span, _Request] = {}  # by the range that is asked for
        self._left: dict[Span, int] = {}  # ranges of each request that are not read yet
        self._bytes = self._turn = 0

    def request(self, spans: Iterable[Span]) -> None:
        """Requests ranges that will be read in about this order.

        Those that do not fit into memory are left out. So that ranges which were never read do not
        fill it, requests of earlier calls but the last make room.
        """
        with self._lock:
            self._turn += 1
            new = dict.fromkeys(
                span for span in spans if span not in self._requests and span.size <= REQUEST_BYTES
            )
            for span, members in _coalesced(new):
                self._make_room(span.size)
                if self._bytes + span.size > self._limit:
                    return
                self._pool = self._pool or ThreadPoolExecutor(self._threads, "emu-jax-read")
                request = _Request(span, self._pool.submit(self._fetch, *span), self._turn)
                self._requests |= dict.fromkeys(members, request)
                self._left[span] = len(members)
                self._bytes += span.size

    def take(self, path: str, start: int, size: int) -> bytes | None:
        """Returns a range that was requested, after waiting for it, or None. It is given once.

        Raises:
            Exception: an error of `fetch`.
        """
        with self._lock:
            request = self._requests.get(Span(path, start, size))
            if request is None:
                return None
            self._forget(Span(path, start, size))
        first = start - request.span.start
        return request.content.result()[first : first + size]

    def _forget(self, span: Span) -> None:
        request = self._requests.pop(span)
        self._left[request.span] -= 1
        if not self._left[request.span]:
            del self._left[request.span]
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
