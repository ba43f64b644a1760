"""Listening sockets, and limits on connections.

uvicorn bounds only the idle time between two requests. Here a connection is also closed when its
next header does not arrive in time or when a request exceeds its total time. Beyond
`Limits.connections`, the connection that has been idle the longest is closed. Idle connections
therefore never keep an active client out.
"""

from __future__ import annotations

import asyncio
import errno
import resource
import socket
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from emu_jax.errors import UserError
from emu_jax.serve.requests import Limits

GRACE = 30.0  # seconds to send the rest of an answer after it is complete
SPARE_FILES = 128  # file descriptors reserved for everything but connections


def listen(host: str, port: int) -> list[socket.socket]:
    """Opens sockets listening on every address of `host`; port 0 takes a free port.

    Raises:
        UserError: the port is in use or not allowed, or `host` is not an address of this
            machine.
    """
    try:
        resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host} is not an address: {error}") from None
    sockets: list[socket.socket] = []
    failed: OSError | None = None
    for family, address in dict.fromkeys((family, address[:2]) for family, *_, address in resolved):
        if port == 0 and sockets:
            address = (address[0], sockets[0].getsockname()[1])
        try:
            sockets.append(socket.create_server(address, family=family, backlog=2048))
        except OSError as error:
            # A name may resolve to an address (usually IPv6) that this machine lacks.
            lacking = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
            if failed is None or error.errno not in lacking:
                failed = error
            if error.errno not in lacking:
                break
    if failed is not None and (not sockets or failed.errno in (errno.EADDRINUSE, errno.EACCES)):
        for opened in sockets:
            opened.close()
        fix = {
            errno.EADDRINUSE: "is in use: stop the other server, or choose another --port",
            errno.EACCES: "is not allowed: choose a --port of 1024 or more",
            errno.EADDRNOTAVAIL: "is not possible: --host is not an address of this machine",
        }.get(failed.errno or 0, f"is not possible: {failed.strerror}")
        raise UserError(f"listening at {host}, port {port}, {fix}")
    return sockets


def room_for_connections(connections: int) -> int:
    """Returns how many connections the limit on open files allows, at most `connections`.

    Raises the soft limit as far as needed and as the hard limit permits.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < connections + SPARE_FILES:
        files = connections + SPARE_FILES
        soft = files if hard == resource.RLIM_INFINITY else min(hard, files)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return (
        connections
        if soft == resource.RLIM_INFINITY
        else max(1, min(connections, soft - SPARE_FILES))
    )


def bounded_connections(limits: Limits, on_shutdown: Callable[[], None]) -> type[H11Protocol]:
    """Returns a protocol class for uvicorn's `http` setting that enforces `limits`.

    Args:
        on_shutdown: called when the server starts to shut down, if any connection is open.
    """

    class Connection(H11Protocol):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            self.since = self.loop.time()  # when the last request ended
            self._timer: asyncio.TimerHandle | None = None

        @property
        def busy(self) -> bool:
            """True while a request is in progress: header received, answer not complete."""
            return self.cycle is not None and not self.cycle.response_complete

        def _set_timer(self, seconds: float) -> None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_later(seconds, self.transport.abort)

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._set_timer(limits.header_seconds)
            # Aborted connections stay in the set until the event loop's next iteration.
            live: list[Any] = [c for c in self.connections if not c.transport.is_closing()]
            if len(live) > limits.connections:
                _one_too_many(live).transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            was_busy = self.busy
            super().data_received(data)
            if self.busy and not was_busy:
                self._set_timer(limits.body_seconds + limits.seconds + GRACE)

        def on_response_complete(self) -> None:
            self.since = self.loop.time()
            self._set_timer(limits.header_seconds)
            super().on_response_complete()
            if self.busy:  # a pipelined request has already started
                self._set_timer(limits.body_seconds + limits.seconds + GRACE)

        def shutdown(self) -> None:
            on_shutdown()
            if self.busy and self.cycle.more_body:
                self.transport.abort()  # the request is incomplete, so no answer is due
                return
            try:
                super().shutdown()
            except h11.LocalProtocolError:  # the request was not valid HTTP
                self.transport.abort()

    def _one_too_many(connections: list[Connection]) -> Connection:
        """Returns the connection to close.

        It is the one idle the longest, otherwise the one whose body has been arriving the longest,
        otherwise the newest.
        """
        silent = [c for c in connections if not c.busy]
        slow = [c for c in connections if c.busy and c.cycle.more_body]
        if silent or slow:
            return min(silent or slow, key=lambda c: c.since)
        return max(connections, key=lambda c: c.since)

    return Connection
