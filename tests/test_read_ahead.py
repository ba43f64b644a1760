"""Remote ranges are requested before they are read: merged, once, and within a bound of memory."""

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor

from emu_jax.data import read_ahead
from emu_jax.data.read_ahead import ReadAhead, Span
from emu_jax.errors import UserError

CONTENT = {"a": os.urandom(1 << 19), "b": os.urandom(1 << 12)}


class Store:
    """Byte ranges of CONTENT, and the requests for them."""

    def __init__(self, threads: int = 1) -> None:
        self.asked: list[Span] = []
        self.open = threading.Event()
        self.open.set()
        self._pool = ThreadPoolExecutor(threads)

    def start(self, span: Span) -> Future[bytes]:
        return self._pool.submit(self._fetch, *span)

    def _fetch(self, path: str, start: int, size: int) -> bytes:
        self.open.wait(10)
        self.asked.append(Span(path, start, size))
        if path not in CONTENT:
            raise UserError(f"{path} is not there")
        return CONTENT[path][start : start + size]


def taken(ahead: ReadAhead, span: Span) -> bool:
    """Returns whether a range was read ahead, and checks its bytes."""
    content = ahead.take(*span)
    assert content in (None, CONTENT[span.path][span.start : span.start + span.size])
    return content is not None


def test_ranges_are_merged_and_given_as_often_as_announced():
    store = Store()
    ahead = ReadAhead(store.start)
    far = 200 + read_ahead.GAP_BYTES
    spans = [Span("a", 100, 50), Span("b", 0, 9), Span("a", 20, 30), Span("a", far, 5)]
    ahead.request([*spans, spans[0]])
    assert all(taken(ahead, span) for span in spans)
    assert store.asked == [Span("a", 20, 130), Span("b", 0, 9), Span("a", far, 5)]
    assert not any(taken(ahead, span) for span in spans[1:])
    # What is left of an announcement is not requested again. It is read as often as the next says.
    ahead.request([spans[0], spans[2]])
    assert taken(ahead, spans[0]) and taken(ahead, spans[2]) and store.asked[3:] == [spans[2]]
    assert not taken(ahead, spans[0]) and not ahead._requests and not ahead._reads
    assert not taken(ahead, Span("a", 20, 10)) and ahead._bytes == 0


def test_memory_is_bounded_and_what_is_never_read_makes_room():
    store = Store(threads=4)
    store.open.clear()  # nothing arrives yet
    ahead = ReadAhead(store.start, limit=1000)
    spans = [Span("a", n * 400_000, 400) for n in range(2)] + [Span("b", 0, 300)]
    ahead.request(spans)
    assert ahead._bytes == 800  # the third does not fit
    ahead.request([])
    store.open.set()
    ahead.request([spans[2]])  # the first has not been read for two calls
    assert not taken(ahead, spans[0]) and taken(ahead, spans[1]) and taken(ahead, spans[2])
    assert ahead._bytes == 0
    ahead.request([Span("none", 0, 4)])
    assert ahead.take("none", 0, 4) is None  # the reader asks again, and learns why it fails
    cancelled = Future[bytes]()
    cancelled.cancel()
    ahead = ReadAhead(lambda span: cancelled)
    ahead.request([spans[0]])
    assert not taken(ahead, spans[0])
