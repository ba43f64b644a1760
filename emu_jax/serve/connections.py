"""Sockets: where the server listens, and connections that cannot hold it up.

uvicorn bounds the silence between two requests and nothing else. Here a connection is also closed
when it sends no whole header in time, when a request takes longer than any may, and, beyond
`Limits.connections`, when it has been without a request the longest: silent connections never keep
an active client out.
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

from emu_jax.config import UserError
from emu_jax.serve.requests import Limits

GRACE = 30.0  # seconds that an answer may take to be sent, after its last word
SPARE_FILES = 128  # descriptors for everything but connections


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen at every address of `host`; port 0 takes a free one.

    Raises:
        UserError: the port is in use or not allowed, or the host is not this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host} is not an address: {error}") from None
    sockets: list[socket.socket] = []
    failed: OSError | None = None
    for family, address in dict.fromkeys((family, address[:2]) for family, *_, address in found):
        if port == 0 and sockets:
            address = (address[0], sockets[0].getsockname()[1])
        try:
            sockets.append(socket.create_server(address, family=family, backlog=2048))
        except OSError as error:
            # A name may have an address, of IPv6 mostly, that this machine lacks.
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


def room_for_connections(wanted: int) -> int:
    """Returns the number of connections that the limit on open files allows, at most `wanted`.
    Raises the soft limit as far as the hard one permits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + SPARE_FILES:
        most = wanted + SPARE_FILES
        soft = most if hard == resource.RLIM_INFINITY else min(hard, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - SPARE_FILES))


def bounded_connections(limits: Limits, on_shutdown: Callable[[], None]) -> type[H11Protocol]:
    """uvicorn's protocol, for its `http` setting, with `limits` kept.

    Args:
        on_shutdown: called when the server starts to shut down, if it has connections then.
    """

    class Connection(H11Protocol):
        def __init__(self, *args: Any, **settings: Any):
            super().__init__(*args, **settings)
            self.since = self.loop.time()  # when the last request ended
            self._timer: asyncio.TimerHandle | None = None

        @property
        def busy(self) -> bool:
            """Whether a request's header has arrived and its answer is not complete."""
            return self.cycle is not None and not self.cycle.response_complete

        def _set_timer(self, seconds: float) -> None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_later(seconds, self.transport.abort)

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._set_timer(limits.header_seconds)
            # One that was aborted is among them until the loop's next turn.
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
            if self.busy:  # a request that had arrived meanwhile
                self._set_timer(limits.body_seconds + limits.seconds + GRACE)

        def shutdown(self) -> None:
            on_shutdown()
            if self.busy and self.cycle.more_body:
                self.transport.abort()  # half of a request, which nobody waits for
                return
            try:
                super().shutdown()
            except h11.LocalProtocolError:  # after a request that was no HTTP
                self.transport.abort()

    def _one_too_many(connections: list[Connection]) -> Connection:
        """The connection that has been without a request the longest; else the request whose
        body has been arriving the longest; else the newest."""
        silent = [c for c in connections if not c.busy]
        slow = [c for c in connections if c.busy and c.cycle.more_body]
        if silent or slow:
            return min(silent or slow, key=lambda c: c.since)
        return max(connections, key=lambda c: c.since)

    return Connection
