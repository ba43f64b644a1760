"""One thread owns the model; requests stand in line for it."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from emu_jax.config import UserError
from emu_jax.serve.requests import Refused

log = logging.getLogger(__name__)

Answer = Callable[[], Iterator[Any]]  # parts of an answer, as they come


class Ticket:
    """A place in the line, and what comes of it."""

    def __init__(self, seconds: float):
        self.deadline = time.monotonic() + seconds
        self.answer: Answer = lambda: iter(())
        self.gone = threading.Event()  # nobody waits any more
        self._loop = asyncio.get_running_loop()
        self._parts: asyncio.Queue[Any] = asyncio.Queue()

    def put(self, part: Any) -> None:
        """From the worker's thread."""
        self._loop.call_soon_threadsafe(self._parts.put_nowait, part)

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
            self.gone.set()


_END = object()


def _late() -> Refused:
    return Refused(504, "this took too long: ask for less, or later")


class Worker:
    """Answers tickets in their order. At most `waiting` are in hand or in line."""

    def __init__(self, waiting: int, seconds: float):
        self._line: queue.Queue[Ticket | None] = queue.Queue()
        self._waiting, self._seconds, self._in_hand = waiting, seconds, 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="emu-jax-serve", daemon=True)
        self._thread.start()

    def reserve(self) -> Ticket:
        """A place in the line, to `submit` or to `release`.

        Raises:
            Refused: too many wait already.
        """
        with self._lock:
            if self._in_hand >= self._waiting:
                raise Refused(429, f"{self._waiting} requests wait already: try again later")
            self._in_hand += 1
        return Ticket(self._seconds)

    def release(self) -> None:
        """Gives up a place that was not submitted."""
        with self._lock:
            self._in_hand -= 1

    def submit(self, ticket: Ticket, answer: Answer) -> None:
        ticket.answer = answer
        self._line.put(ticket)

    def close(self) -> None:
        self._line.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (ticket := self._line.get()) is not None:
            try:
                self._answer(ticket)
            except RuntimeError as error:  # the server's loop has ended
                log.debug("an answer was not taken: %s", error)
            self.release()

    def _answer(self, ticket: Ticket) -> None:
        end: Any = _END
        try:
            if not ticket.gone.is_set():
                for part in ticket.answer():
                    ticket.put(part)
                    if time.monotonic() > ticket.deadline:
                        end = _late()
                        break
                    if ticket.gone.is_set():
                        break
        except UserError as error:
            end = Refused(400, str(error))
        except Exception:
            log.exception("a request failed")
            end = Refused(500, "the server made a mistake; its log says which")
        ticket.put(end)
