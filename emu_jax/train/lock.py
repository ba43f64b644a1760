"""One job at a time in a run directory.

    DIR/lock.json   the job that trains there: host, pid, start time, and a heartbeat

The lock works on every file system that can create and rename files, including mounted buckets, and
in object stores, which create an object only if no other process has. A lock whose owner died on
this host is taken over at once. The only sign of life from an owner on another host is the
heartbeat, so a new job watches it first. It compares the file with its own earlier content, never
with a clock: two hosts' clocks may differ.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from emu_jax.errors import UserError
from emu_jax.storage import create_text, is_remote, publish, temporary_path

BEAT_SECONDS = 10.0
LOCK_STALE_SECONDS = 35.0  # an owner on another host without a heartbeat for this long is dead
SETTLE_SECONDS = 0.5  # reveals another job that takes the lock over at the same moment

_log = logging.getLogger(__name__)


class Lock:
    """The lock of a run directory, which one process holds for all processes of its job."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._token = uuid.uuid4().hex
        self._identity = _identity() | {"token": self._token}
        self._held = False
        self._lost = ""  # the job that has taken it over
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Takes the lock, also from a dead owner, and starts a heartbeat thread.

        Raises:
            UserError: another job holds it.
        """
        while not self._create():
            if dead := self._await_death():
                self._take_over(dead)
                break
        self._held = True
        self._thread = threading.Thread(target=self._beat, daemon=True, name="emu-jax-lock")
        self._thread.start()

    def live_owner(self) -> str:
        """Names the running job of this host that holds the lock, or returns "". A job on another
        host is not known to run until it has written another heartbeat."""
        owner = self._owner()
        return _name(owner) if owner and _is_here(owner) and _is_running(owner) else ""

    def release(self) -> None:
        """Releases the lock, if this process holds it."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        if self._held and self._owner().get("token") == self._token:
            self.path.unlink(missing_ok=True)
        self._held = False

    @property
    def held(self) -> bool:
        """True while this process holds the lock, and no other job has taken it over."""
        if self._held and not self._lost:
            owner = self._owner()
            if owner and owner.get("token") != self._token:
                self._lost = _name(owner)
        return self._held and not self._lost

    def check(self) -> None:
        """Checks that no other job has taken the lock over.

        Raises:
            UserError: another job has taken the lock over, as if this process were dead.
        """
        if not self.held and self._lost:
            raise UserError(
                f"{self._lost} has taken over {self.path.parent}, because this process wrote no "
                f"heartbeat for {LOCK_STALE_SECONDS:.0f} s: this process stops and leaves the "
                "checkpoints to it"
            )

    def _take_over(self, dead: dict[str, Any]) -> None:
        """Replaces the lock of a dead owner.

        Raises:
            UserError: another job was faster.
        """
        if self._replace(dead):
            time.sleep(SETTLE_SECONDS)
        if (owner := self._owner()).get("token") != self._token:
            raise self._refusal(owner)

    def _create(self) -> bool:
        try:
            create_text(self.path, self._content())
        except FileExistsError:  # a retried request may find what the first attempt wrote
            return self._owner().get("token") == self._token
        return True

    def _replace(self, expected: dict[str, Any] | None = None) -> bool:
        """Replaces the file atomically, unless another owner than `expected` has it."""

        def is_expected() -> bool:
            return expected is None or self._owner() in (expected, {})

        if is_remote(self.path):
            if replaced := is_expected():
                self.path.write_text(self._content())
            return replaced
        temporary = temporary_path(self.path, shared=True)
        try:
            create_text(temporary, self._content())
            if replaced := is_expected():
                publish(temporary, self.path)
            return replaced
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _content(self) -> str:
        return json.dumps(self._identity | {"beat": time.time()})

    def _owner(self) -> dict[str, Any]:
        """Returns the contents of the file, or {} if it is missing or half written."""
        try:
            owner = json.loads(self.path.read_text())
            return owner if isinstance(owner, dict) else {}
        except (OSError, ValueError):
            return {}

    def _await_death(self) -> dict[str, Any] | None:
        """Returns the dead owner, or None if the lock has been released.

        Raises:
            UserError: the owner is alive.
        """
        owner = self._owner()
        if _is_here(owner):
            if _is_running(owner):
                raise self._refusal(owner)
            return owner
        _log.warning(
            "%s is locked by %s: waiting up to %.0f s for a heartbeat",
            self.path.parent,
            _name(owner),
            LOCK_STALE_SECONDS,
        )
        end = time.monotonic() + LOCK_STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(min(1.0, LOCK_STALE_SECONDS / 10))
            if not self.path.exists():
                return None
            if (now := self._owner()) and now != owner:
                raise self._refusal(now)
        return owner or {"token": None}

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            try:
                if not self.held:
                    return
                self._replace()
            except OSError:  # a full disk, or storage that is briefly unavailable
                pass

    def _refusal(self, owner: dict[str, Any]) -> UserError:
        return UserError(
            f"{self.path.parent} is in use by {_name(owner)}: stop that job first, or use "
            f"another --workdir (if that job is no longer running, delete {self.path})"
        )


def _identity() -> dict[str, Any]:
    """Identifies this process uniquely among hosts and reboots."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "processes": _pid_namespace(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _is_here(owner: dict[str, Any]) -> bool:
    """Returns whether an owner's process would be visible from this process."""
    mine = _identity()
    return bool(mine["boot"]) and all(
        owner.get(key) == mine[key] for key in ("host", "boot", "processes")
    )


def _is_running(owner: dict[str, Any]) -> bool:
    started = _started(owner.get("pid", 0))
    return bool(started) and started == owner.get("started")


def _started(pid: object) -> str:
    """Returns when a process started, in ticks since the boot, or "" if it does not exist."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] != "Z" else ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _name(owner: dict[str, Any]) -> str:
    if not owner:
        return "another job"
    return f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"
