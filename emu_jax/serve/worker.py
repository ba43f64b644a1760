"""One thread owns the model; requests stand in line for it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from emu_jax.config import UserError
from emu_jax.generate.image import Stopped
from emu_jax.serve.requests import Refused

log = logging.getLogger(__name__)

Answer = Callable[[], Iterator[Any]]  # parts of an answer, as they come


class Ticket:
    """A request's place in the queue, and its answer.

    Attributes:
        client: whose it is; clients take turns.
        deadline: of `time.monotonic()`.
        gone: set when nobody waits for the answer any more.
    """

    def __init__(self, seconds: float, client: str, on_leave: Callable[[Ticket], None]):
        self.client = client
        self.deadline = time.monotonic() + seconds
        self.answer: Answer = lambda: iter(())
        self.gone = threading.Event()
        self._on_leave = on_leave
        self._loop = asyncio.get_running_loop()
        self._parts: asyncio.Queue[Any] = asyncio.Queue()

    def put(self, part: Any) -> None:
        """Hands a part over, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._parts.put_nowait, part)
        except RuntimeError as error:  # the server's loop has ended
            log.debug("an answer was not taken: %s", error)
            self.gone.set()

    def leave(self) -> None:
        """Gives the answer up: nobody waits for it any more."""
        self.gone.set()
        self._on_leave(self)

    def over(self) -> bool:
        """Returns whether the answer can be given up: nobody waits for it, or it is too late."""
        return self.gone.is_set() or time.monotonic() > self.deadline

    async def parts(self) -> AsyncIterator[Any]:
        """The answer's parts.

        Raises:
            Refused: it took too long, or was a mistake.
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
    return Refused(504, "this took too long: ask for less, or later")


class Worker:
    """Answers tickets, one client's after another's, each client's in order.

    At most `waiting` are in hand or in line. A ticket that is given up leaves the line at once.
    """

    def __init__(self, waiting: int, seconds: float):
        self._waiting, self._seconds = waiting, seconds
        self._places = 0  # reserved, in line or in hand
        self._line: list[Ticket] = []
        self._running: Ticket | None = None
        self._turns: dict[str, int] = {}  # when each client in line was last served
        self._closing = self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="emu-jax-serve", daemon=True)
        self._thread.start()

    def reserve(self, client: str = "") -> Ticket:
        """A place in the line, to `submit` or to `release`.

        Raises:
            Refused: too many wait already, or the server is shutting down.
        """
        with self._changed:
            if self._stopped:
                raise _stopping()
            if self._places >= self._waiting:
                raise Refused(429, f"{self._waiting} requests wait already: try again later")
            self._places += 1
        return Ticket(self._seconds, client, self._leave)

    def release(self) -> None:
        """Gives up a place that was not submitted."""
        with self._changed:
            self._places -= 1

    def submit(self, ticket: Ticket, answer: Answer) -> None:
        ticket.answer = answer
        with self._changed:
            if not self._stopped:
                self._line.append(ticket)
                self._changed.notify()
                return
            self._places -= 1
        ticket.put(_stopping())

    def stop(self, grace: float = 3.0) -> None:
        """Refuses what is in line; what is in hand has `grace` seconds to end."""
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
        """Ends the thread once the line is empty; waits for that up to `timeout` seconds."""
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
        """The first ticket of the client that was served longest ago; None at the end."""
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
            end = Refused(500, "the server made a mistake; its log says which")
        ticket.put(end)


def _stopping() -> Refused:
    return Refused(503, "the server is shutting down")
