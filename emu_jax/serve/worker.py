"""Worker thread that owns the model, and the queue of requests waiting for it.

An answer is an iterator. It yields the parts of an answer as they are generated, and None while it
waits for a step of the batch that it shares with others (`generate.engine`).
"""

from __future__ import annotations

import asyncio
import collections
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

from emu_jax.errors import UserError
from emu_jax.generate.engine import Preview
from emu_jax.generate.image import Stopped
from emu_jax.serve.requests import Refused

log = logging.getLogger(__name__)

MEAN_WEIGHT = 0.2  # of the newest wait in the mean wait
IDLE_SECONDS = 0.005  # between two rounds of answers that wait for something else than a step

_Answer = Callable[[], Iterable[Any]]


class Ticket:
    """A place in the queue, and the channel for the answer.

    Attributes:
        client: who sent the request; clients take turns.
        kind: the kind of its answer, of which a limited number may run (`Worker`).
        deadline: on the clock of `time.monotonic()`; infinite until `start_clock`.
        queued: when it joined the queue, on the same clock.
        place: its place in the queue then; 0 if it could start at once.
        gone: set once nobody is waiting for the answer.
    """

    def __init__(self, seconds: float, client: str, on_leave: Callable[[Ticket], None]) -> None:
        self.client, self.kind = client, ""
        self.deadline, self._seconds = math.inf, seconds
        self.queued, self.place = 0.0, 0
        self.answer: _Answer = lambda: iter(())
        self.iterator: Iterator[Any] | None = None  # of the answer, once it runs
        self.gone = threading.Event()
        self._on_leave = on_leave
        self._loop = asyncio.get_running_loop()
        self._parts: asyncio.Queue[Any] = asyncio.Queue()

    def start_clock(self) -> None:
        """Starts the time in which to answer."""
        self.deadline = time.monotonic() + self._seconds

    def put(self, part: Any) -> None:
        """Sends a part to the client; safe to call from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._queue, part)
        except RuntimeError as error:  # the server's loop has ended
            log.debug("an answer was not delivered: %s", error)
            self.gone.set()

    def _queue(self, part: Any) -> None:
        # A slow client gets fewer previews. They would take much memory here.
        if not isinstance(part, Preview) or self._parts.empty():
            self._parts.put_nowait(part)

    def leave(self) -> None:
        """Abandons the answer because nobody is waiting for it."""
        self.gone.set()
        self._on_leave(self)

    def over(self) -> bool:
        """Returns whether to stop: nobody is waiting for the answer, or the deadline has passed."""
        return self.gone.is_set() or time.monotonic() > self.deadline

    @property
    def more(self) -> bool:
        """True if the next part, or the end, has already arrived."""
        return not self._parts.empty()

    async def parts(self) -> AsyncIterator[Any]:
        """Yields the parts of the answer.

        Raises:
            Refused: it took too long, or the request failed.
        """
        try:
            while True:
                left = max(0.0, min(self.deadline - time.monotonic(), self._seconds))
                try:
                    if self.more:
                        part = self._parts.get_nowait()
                    else:
                        part = await asyncio.wait_for(self._parts.get(), left)
                except TimeoutError:
                    if self.deadline > time.monotonic():  # the warm-up takes longer
                        continue
                    raise _late() from None
                if part is _END:
                    return
                if isinstance(part, Refused):
                    raise part
                yield part
        finally:
            self.leave()


_END = object()


def _late() -> Refused:
    return Refused(504, "this took too long: ask for less, or try again later")


class Worker:
    """Answers tickets, up to `concurrent` at once. Clients take turns; each one's tickets stay in
    order, unless one of another kind may start earlier.

    At most `waiting` tickets are running or queued. An abandoned ticket leaves the queue at once.

    Args:
        seconds: from the reservation of a place, or the end of the warm-up, to the end of the
            answer.
        step: called when all running answers yielded None.
        kinds: how many answers of a kind run at once. Others of that kind wait in the queue and
            let those behind them pass. A kind that is not listed has no limit.
        warm_up: called one after the other before the first ticket, until the server stops.
        gather_seconds: how long a step may wait, after the last one, for tickets that are likely to
            arrive.
    """

    def __init__(
        self,
        waiting: int,
        seconds: float,
        concurrent: int = 1,
        step: Callable[[], None] | None = None,
        kinds: Mapping[str, int] | None = None,
        warm_up: Iterable[Callable[[], None]] | None = None,
        gather_seconds: float = 0.0,
    ) -> None:
        self._waiting, self._seconds, self._concurrent = waiting, seconds, concurrent
        self._step, self._kinds = step, kinds or {}
        self._warm = warm_up is None
        self._places = 0  # reserved, queued or running
        self._line: list[Ticket] = []
        self._running: list[Ticket] = []
        self._turns: dict[str, int] = {}  # turn in which each queued client was last served
        self._gather_seconds = gather_seconds
        self._others = 0.0  # mean number of other places when one is reserved, lately
        self._joined, self._stepped = 0, 0.0  # tickets started since the last step, and its end
        self._missing = 0.0  # tickets in the queue that `_gather` waits for
        self._closing = self._stopped = False
        self._place_seconds: float | None = None  # of waiting for each place in the queue, lately
        self._changed = threading.Condition()
        self._thread = threading.Thread(
            target=self._run, args=(warm_up or (),), name="emu-jax-serve", daemon=True
        )
        self._thread.start()

    @property
    def running(self) -> int:
        """Tickets that are being answered."""
        return len(self._running)

    @property
    def queued(self) -> int:
        """Tickets that wait for others to be answered."""
        return len(self._line)

    @property
    def status(self) -> Literal["ok", "warming up", "shutting down"]:
        """State of the worker: it answers tickets at once, is warming up, or refuses them."""
        if self._closing or not self._thread.is_alive():
            return "shutting down"
        return "ok" if self._warm else "warming up"

    def place(self, ticket: Ticket) -> int:
        """Returns how many tickets are before this one in the queue, itself included; 0 if it is
        running or done. Clients take turns, so others may still go first."""
        with self._changed:
            return self._line.index(ticket) + 1 if ticket in self._line else 0

    def wait_seconds(self, place: int) -> float | None:
        """Estimates how long the ticket at `place` of the queue waits, from how long the last ones
        that had to wait did. Returns None before the first one."""
        return None if self._place_seconds is None else place * self._place_seconds

    def reserve(self, client: str = "") -> Ticket:
        """Reserves a place in the queue; `submit` or `release` it.

        Raises:
            Refused: the queue is full, or the server is shutting down.
        """
        with self._changed:
            if self._stopped:
                raise _stopping()
            if self._places >= self._waiting:
                raise Refused(429, f"{self._waiting} requests are waiting: try again later")
            self._others += MEAN_WEIGHT * (self._places - self._others)
            self._places += 1
            ticket = Ticket(self._seconds, client, self._leave)
            if self._warm:
                ticket.start_clock()
        return ticket

    def release(self) -> None:
        """Frees a place that was reserved and not submitted."""
        with self._changed:
            self._places -= 1

    def submit(self, ticket: Ticket, answer: _Answer, kind: str = "") -> None:
        """Queues a reserved ticket, or refuses it if the server is shutting down."""
        ticket.answer, ticket.kind = answer, kind
        with self._changed:
            if not self._stopped:
                if self._warm and ticket.deadline == math.inf:  # the warm-up has just ended
                    ticket.start_clock()
                self._line.append(ticket)
                before = [*self._line, *self._running]
                alike = sum(each.kind == kind for each in before)
                ahead = len(before) - self._concurrent, alike - self._kinds.get(kind, alike)
                ticket.queued, ticket.place = time.monotonic(), max(0, *ahead)
                if len(self._line) >= self._missing:
                    self._changed.notify()
                return
            self._places -= 1
        ticket.put(_stopping())

    def stop(self, grace: float = 3.0) -> None:
        """Refuses all queued tickets and gives the running ones `grace` seconds to finish."""
        with self._changed:
            self._stopped = self._closing = True
            refused, self._line = self._line, []
            self._places -= len(refused)
            deadline = time.monotonic() + grace
            for ticket in self._running:
                ticket.deadline = min(ticket.deadline, deadline)
            self._changed.notify()
        for ticket in refused:
            ticket.put(_stopping())

    def close(self, timeout: float | None = None) -> None:
        """Ends the thread once the queue is empty. Waits for it up to `timeout` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)

    def _leave(self, ticket: Ticket) -> None:
        with self._changed:
            if ticket in self._line:
                self._line.remove(ticket)
                self._places -= 1

    def _start(self) -> None:
        """Takes tickets out of the queue while there is room for them, first the one of the client
        served longest ago. If none is running, waits for one, or for the end of the queue."""
        with self._changed:
            if not self._running:
                self._changed.wait_for(lambda: self._line or self._closing)
            while len(self._running) < self._concurrent and (able := self._able()):
                ticket = min(able, key=lambda ticket: self._turns.get(ticket.client, -1))
                turn = max(self._turns.values(), default=-1) + 1
                clients = {ticket.client for ticket in self._line}
                self._turns = {c: n for c, n in self._turns.items() if c in clients}
                self._turns[ticket.client] = turn
                self._line.remove(ticket)
                self._note_wait(ticket)
                self._running.append(ticket)
                self._joined += 1

    def _able(self) -> list[Ticket]:
        """Returns the queued tickets whose kind has not reached its limit of running requests."""
        running = collections.Counter(ticket.kind for ticket in self._running)
        full = {kind for kind, most in self._kinds.items() if running[kind] >= most}
        return [ticket for ticket in self._line if ticket.kind not in full]

    def _gather(self) -> bool:
        """Waits for requests that are likely to arrive soon, so that one step reads the prompts of
        many. Returns whether there are requests to start before the step.

        Half of the requests that lately were in progress beside another one are waited for, if they
        are not in progress already. A client that is alone never waits.
        """
        with self._changed:
            continuing = len(self._running) - self._joined
            missing = (self._others + 1 - continuing) // 2 - self._joined
            left = self._stepped + self._gather_seconds - time.monotonic()
            if left > 0 and len(self._line) < missing and not self._closing:
                self._missing = missing
                self._changed.wait(left)
                self._missing = 0.0
            return len(self._running) < self._concurrent and bool(self._able())

    def _note_wait(self, ticket: Ticket) -> None:
        """Updates the mean wait; a ticket that found room tells nothing about the queue."""
        if ticket.place:
            waited, mean = (time.monotonic() - ticket.queued) / ticket.place, self._place_seconds
            self._place_seconds = waited if mean is None else mean + MEAN_WEIGHT * (waited - mean)

    def _run(self, warm_up: Iterable[Callable[[], None]]) -> None:
        try:
            self._warm_up(warm_up)
        except Exception:  # of the iterator, such as its progress bar
            log.exception("the warm-up ended early: requests compile the rest")
        with self._changed:
            self._warm = True
            for ticket in self._line:  # as if they had just arrived
                ticket.start_clock()
                ticket.queued = time.monotonic()
        while True:
            self._start()
            if not self._running:
                return
            # A list: `any` would stop at the first that has something new.
            if any([self._advance(ticket) for ticket in list(self._running)]):
                continue
            if not self._gather():
                self._step_all()

    def _warm_up(self, steps: Iterable[Callable[[], None]]) -> None:
        for step in steps:
            if self._closing:
                return
            try:
                step()
            except Exception:
                log.exception("a step of the warm-up failed: requests compile what it did not")

    def _advance(self, ticket: Ticket) -> bool:
        """Sends the parts of an answer until it waits for a step or ends. Returns whether there was
        something new."""
        new = False
        while True:
            part, end = self._next(ticket)
            if part is not None:
                ticket.put(part)
            if end is not None:
                self._end(ticket, end)
                return True
            if part is None:
                return new
            new = True

    def _next(self, ticket: Ticket) -> tuple[Any, Any]:
        """Returns the next part of an answer, None if it waits for a step, and how it ends, None
        if it does not."""
        end, part = None, None
        try:
            if ticket.gone.is_set():
                end = _END
            else:
                if ticket.iterator is None:
                    ticket.iterator = iter(ticket.answer())
                part = next(ticket.iterator, _END)
                if part is _END:
                    end = _END
                elif ticket.over():
                    end = _late()
        except Stopped:
            end = _late()
        except Refused as error:
            end = error
        except UserError as error:
            end = Refused(400, str(error))
        except Exception:
            log.exception("a request failed")
            end = _failed()
        return None if part is _END else part, end

    def _step_all(self) -> None:
        try:
            if self._step is not None:
                self._step()
            else:
                time.sleep(IDLE_SECONDS)
        except Exception:
            log.exception("a batch failed")
            for ticket in list(self._running):
                self._end(ticket, _failed())
        self._joined, self._stepped = 0, time.monotonic()

    def _end(self, ticket: Ticket, end: Any) -> None:
        close = getattr(ticket.iterator, "close", None)
        if close is not None:
            try:
                close()
            except Exception:
                log.exception("a request could not be closed")
        with self._changed:
            self._running.remove(ticket)
            self._places -= 1
        ticket.put(end)


def _failed() -> Refused:
    return Refused(500, "internal error: see the server log")


def _stopping() -> Refused:
    return Refused(503, "the server is shutting down")
