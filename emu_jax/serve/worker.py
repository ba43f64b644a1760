"""Worker thread that owns the model, and the queue of requests waiting for it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from emu_jax.errors import UserError
from emu_jax.generate.image import Stopped
from emu_jax.serve.requests import Refused

log = logging.getLogger(__name__)

Answer = Callable[[], Iterator[Any]]  # yields the parts of an answer as they are generated


class Ticket:
    """A place in the queue, and the channel for the answer.

    Attributes:
        client: who sent the request; clients take turns.
        deadline: on the clock of `time.monotonic()`.
        gone: set once nobody is waiting for the answer.
    """

    def __init__(self, seconds: float, client: str, on_leave: Callable[[Ticket], None]) -> None:
        self.client = client
        self.deadline = time.monotonic() + seconds
        self.answer: Answer = lambda: iter(())
        self.gone = threading.Event()
        self._on_leave = on_leave
        self._loop = asyncio.get_running_loop()
        self._parts: asyncio.Queue[Any] = asyncio.Queue()

    def put(self, part: Any) -> None:
        """Sends a part to the client; safe to call from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._parts.put_nowait, part)
        except RuntimeError as error:  # the server's loop has ended
            log.debug("an answer was not delivered: %s", error)
            self.gone.set()

    def leave(self) -> None:
        """Abandons the answer because nobody is waiting for it."""
        self.gone.set()
        self._on_leave(self)

    def over(self) -> bool:
        """Returns whether to stop: nobody is waiting for the answer, or the deadline has passed."""
        return self.gone.is_set() or time.monotonic() > self.deadline

    async def parts(self) -> AsyncIterator[Any]:
        """Yields the parts of the answer.

        Raises:
            Refused: it took too long, or the request failed.
        """
        try:
            while True:
                left = max(0.0, self.deadline - time.monotonic())
                try:
                    part = await asyncio.wait_for(self._parts.get(), left)
                except TimeoutError:
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
    """Answers tickets one at a time. Clients take turns; each one's tickets stay in order.

    At most `waiting` tickets are running or queued. An abandoned ticket leaves the queue at once.
    """

    def __init__(self, waiting: int, seconds: float) -> None:
        self._waiting, self._seconds = waiting, seconds
        self._places = 0  # reserved, queued or running
        self._line: list[Ticket] = []
        self._running: Ticket | None = None
        self._turns: dict[str, int] = {}  # turn in which each queued client was last served
        self._closing = self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="emu-jax-serve", daemon=True)
        self._thread.start()

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
            self._places += 1
        return Ticket(self._seconds, client, self._leave)

    def release(self) -> None:
        """Frees a place that was reserved and not submitted."""
        with self._changed:
            self._places -= 1

    def submit(self, ticket: Ticket, answer: Answer) -> None:
        """Queues a reserved ticket, or refuses it if the server is shutting down."""
        ticket.answer = answer
        with self._changed:
            if not self._stopped:
                self._line.append(ticket)
                self._changed.notify()
                return
            self._places -= 1
        ticket.put(_stopping())

    def stop(self, grace: float = 3.0) -> None:
        """Refuses all queued tickets and gives the running one `grace` seconds to finish."""
        with self._changed:
            self._stopped = self._closing = True
            refused, self._line = self._line, []
            self._places -= len(refused)
            if self._running is not None:
                deadline = time.monotonic() + grace
                self._running.deadline = min(self._running.deadline, deadline)
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

    def _next(self) -> Ticket | None:
        """Waits for the first ticket of the client served longest ago.

        Returns None once the worker is closed and its queue is empty.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._line or self._closing)
            if not self._line:
                return None
            ticket = min(self._line, key=lambda ticket: self._turns.get(ticket.client, -1))
            turn = max(self._turns.values(), default=-1) + 1
            clients = {ticket.client for ticket in self._line}
            self._turns = {c: n for c, n in self._turns.items() if c in clients}
            self._turns[ticket.client] = turn
            self._line.remove(ticket)
            self._running = ticket
            return ticket

    def _run(self) -> None:
        while (ticket := self._next()) is not None:
            self._answer(ticket)
            with self._changed:
                self._running = None
                self._places -= 1

    def _answer(self, ticket: Ticket) -> None:
        end: Any = _END
        try:
            if not ticket.gone.is_set():
                for part in ticket.answer():
                    ticket.put(part)
                    if ticket.over():
                        end = _late()
                        break
        except Stopped:
            end = _late()
        except UserError as error:
            end = Refused(400, str(error))
        except Exception:
            log.exception("a request failed")
            end = Refused(500, "internal error: see the server log")
        ticket.put(end)


def _stopping() -> Refused:
    return Refused(503, "the server is shutting down")
