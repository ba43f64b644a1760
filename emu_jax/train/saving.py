"""Checkpoints of a run under way: saved beside the steps, and the newest that can be read."""

from __future__ import annotations

import ctypes
import gc
import itertools
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from emu_jax import integrity
from emu_jax.checkpoint import complete_steps
from emu_jax.errors import UserError
from emu_jax.filesystem import sync
from emu_jax.train.lock import Lock

# Under these names a step is written, and removed.
WRITING, REMOVING = ".orbax-checkpoint-tmp", ".removing"
MESSAGE_BYTES = 1000  # of a problem that one process tells to all
CHUNK_BYTES = 2**26  # of a chunk of an array, and of a file: who reads a chunk holds all of it


class Checkpoints:
    """The checkpoints in a run directory; all processes call its methods at the same steps.

    A checkpoint is complete when its directory has a bare number as its name: it is written
    under another name and renamed, and renamed before it is removed. After it is complete it is
    read back, and only then are older ones removed.

    While it is entered, no other job can write checkpoints to the directory.
    """

    def __init__(self, workdir: Path, keep: int):
        self.workdir, self.keep = workdir.absolute(), keep
        self._lead = jax.process_index() == 0
        self._lock = Lock(self.workdir / "lock.json")
        self._saving: int | None = None  # the step being written
        # Done once it was written and read back; why this process could not read it, or "".
        self._written: Future[str] | None = None
        self._complete: int | None = None  # the step that was written, as this process knows
        self._unread = ""  # why this process could not read that back
        self._worker = ThreadPoolExecutor(1)
        self._remover = ThreadPoolExecutor(1)
        # Without compression, which hardly shrinks weights, arrays are written from where they
        # are, without a second copy.
        arrays = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add(None, ocp.args.PyTreeSave, arrays)
        registry.add(None, ocp.args.JsonSave, ocp.JsonCheckpointHandler())
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(handler_registry=registry),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
        )
        self._stack = ExitStack()

    def __enter__(self) -> Checkpoints:
        with ExitStack() as stack:
            integrity.check_path(self.workdir)
            self._take_lock()
            stack.callback(self._lock.release)
            stack.enter_context(integrity.quiet_failures())
            self._remove_leftovers()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed = kind is not None
        try:
            self._settle()
            if kind is None or jax.process_count() == 1:
                self._agree()
            elif self._unread:  # the other processes may not be there to be told
                raise self._failure(self._complete, self._unread)
            self._checkpointer.close()
        except UserError as error:
            failed = True
            if kind is None:
                raise
            print(error, file=sys.stderr)  # beside what ended the run
        finally:
            self._worker.shutdown()
            self._remover.shutdown()
            del self._checkpointer  # and what it holds of a failure
            if failed:  # what was still being written then; the next start removes what still is
                self._remove_leftovers()
            self._stack.close()

    def newest(self, before: int = sys.maxsize) -> int | None:
        """The newest complete step before another, as the first process sees it."""
        newest = max((step for step in self._steps() if step < before), default=-1)
        newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
        return None if newest < 0 else newest

    def restore(self, items: Mapping[str, ocp.args.CheckpointArgs]) -> tuple[int, dict[str, Any]]:
        """The newest step that all processes can read, and its items.

        Newer ones that cannot be read are set aside as DIR/<step>.damaged, with a line.

        Raises:
            UserError: none can be read. All are left as they are.
        """
        damaged: dict[int, str] = {}
        while (step := self.newest(before=min(damaged, default=sys.maxsize))) is not None:
            saved, problem = self._read(step, items)
            if not problem:
                self._set_aside(damaged, f"going on from step {step}")
                return step, saved
            damaged[step] = problem
        problems = "; ".join(f"{step}: {problem}" for step, problem in damaged.items())
        raise UserError(
            f"no checkpoint in {self.workdir} can be read ({problems}): "
            "mend one, or start again in another workdir"
        )

    def save(self, step: int, items: Mapping[str, ocp.args.CheckpointArgs]) -> None:
        """Copies the items and begins to write them, once the save before it has ended: at most
        one copy is in memory.

        Raises:
            UserError: this save, or the one before, failed; or another job writes here.
        """
        self.wait()
        self._check_lock()
        self._saving = step
        place = self.workdir / str(step)
        args = ocp.args.Composite(**{name: _for_saving(item) for name, item in items.items()})
        self._attempt(lambda: self._checkpointer.save(place, args))
        self._written = self._worker.submit(self._finish, place)

    def check(self) -> bool:
        """Looks at the save that is under way, and waits for nothing.

        Returns whether this process could not read it back. It is one of several then: all of
        them should soon call `save` or `wait`, which fail on all alike.

        Raises:
            UserError: the save has failed; one process alone may raise where it was not written.
        """
        if self._written is not None and self._written.done():
            self._settle()
            if jax.process_count() == 1:
                self._agree()
        return bool(self._unread)

    def wait(self) -> None:
        """Waits until what was saved is on disk, and was read back by all processes.

        Raises:
            UserError: the last save failed. All processes raise it if one could not read the save
                back.
        """
        self._settle()
        self._agree()

    def _seal(self) -> None:
        """Called by orbax on the lead, on its own thread, before the step gets its name."""
        integrity.seal(self.workdir / f"{self._saving}{WRITING}")

    def _finish(self, place: Path) -> str:
        """Runs on a thread: awaits the end of a save, then reads this process's share of it.
        Returns why that cannot be read, or ""."""
        self._checkpointer.wait_until_finished()
        problem = ""
        if reason := _attempt(lambda: self._read_back(place)):
            problem = f"read back, {reason}"
        _give_back_memory()
        return problem

    def _read_back(self, place: Path) -> None:
        if self._lead:
            sync(self.workdir)
            if problems := integrity.damaged_files(place):
                raise ValueError(problems[0])
        for item in integrity.items_of(place):
            for problem in integrity.unreadable_arrays(
                place / item, jax.process_index(), jax.process_count()
            ):
                raise ValueError(problem)

    def _settle(self) -> None:
        """Awaits this process's part of the save under way.

        Raises:
            UserError: it was not written.
        """
        if self._written is None:
            return
        written = self._written
        try:
            self._attempt(written.result)
        except UserError:
            self._written = None
            raise
        self._unread = written.result()
        self._written, self._saving, self._complete = None, None, self._saving

    def _agree(self) -> None:
        """Removes the oldest steps, once all processes have settled a save.

        Raises:
            UserError: some process could not read the save back, or another job writes here. All
                processes raise it.
        """
        if self._complete is None:
            return
        step, self._complete = self._complete, None
        problem, self._unread = _told_to_all(self._unread), ""
        if problem:
            raise self._failure(step, problem)
        self._check_lock()
        for old in sorted(self._steps())[: -self.keep] if self._lead else ():
            removing = self.workdir / f"{old}{REMOVING}"
            (self.workdir / str(old)).rename(removing)
            self._remover.submit(shutil.rmtree, removing, ignore_errors=True)

    def _steps(self) -> list[int]:
        return complete_steps(self.workdir)

    def _take_lock(self) -> None:
        """Takes the lock of the run directory.

        Raises:
            UserError: another job trains in this directory; all processes say so.
        """
        problem = ""
        if self._lead:
            try:
                self._lock.acquire()
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"cannot write {self._lock.path}: {error.strerror}"
        if problem := _told_to_all(problem):
            raise UserError(problem)

    def _check_lock(self) -> None:
        """Checks that this job still holds the lock.

        Raises:
            UserError: another job has taken the lock over; all processes say so.
        """
        problem = ""
        try:
            self._lock.check()
        except UserError as error:
            problem = str(error)
        if problem := _told_to_all(problem):
            raise UserError(problem)

    def _remove_leftovers(self) -> None:
        """Removes what a process that was killed, or a save that failed, left half done."""
        if self._lock.held:
            for path in self.workdir.iterdir():
                if path.name.endswith((WRITING, REMOVING)):
                    shutil.rmtree(path, ignore_errors=True)

    def _attempt(self, action: Callable[[], Any]) -> None:
        """Runs a part of saving.

        Raises:
            UserError: it failed, and so the save that is under way.
        """
        if reason := _attempt(action):
            step, self._saving = self._saving, None
            raise self._failure(step, reason)

    def _failure(self, step: int | None, reason: str) -> UserError:
        """Cleans up after a failed save; returns the error that tells of it."""
        if self._lock.held and (self.workdir / str(step)).is_dir():
            self._move_aside(step)  # it is complete, but cannot be read
        self._remove_leftovers()
        # Other processes may look before the lead has moved the step aside.
        steps = [number for number in self._steps() if number != step]
        rest = f"start again to go on from step {max(steps)}" if steps else "start again"
        return UserError(
            f"cannot save step {step} in {self.workdir}: {reason}: mend that, then {rest}"
        )

    def _read(
        self, step: int, items: Mapping[str, ocp.args.CheckpointArgs]
    ) -> tuple[dict[str, Any], str]:
        """(the items of a step, "") or ({}, why it cannot be read on some process).

        Orbax's own restore would leave processes that can read theirs waiting for the others,
        so its handlers are asked, which wait for nobody.
        """
        saved: dict[str, Any] = {}
        place, problem = self.workdir / str(step), ""
        try:
            problem = "; ".join(integrity.damaged_files(place, list(items)))
        except FileNotFoundError:
            if self._lead:
                integrity.warn_unverified(place)

        def read() -> None:
            for name, args in items.items():
                saved[name] = _HANDLERS[type(args)]().restore(epath.Path(place / name), args=args)

        if not problem and (problem := _attempt(read)):
            gc.collect()  # what was read beside it, while its errors are silenced
            unread = next(name for name in items if name not in saved)
            problem = f"{unread}: {problem}"
        problems = multihost_utils.process_allgather(np.array(bool(problem)))
        if problems.any():
            return {}, problem or f"process {int(np.argmax(problems))} cannot read its part"
        return saved, ""

    def _set_aside(self, damaged: Mapping[int, str], then: str) -> None:
        if not damaged:
            return
        if self._lead:
            for number, problem in sorted(damaged.items()):
                aside = self._move_aside(number)
                print(
                    f"checkpoint {number} cannot be read ({problem}): kept as {aside}, {then}",
                    file=sys.stderr,
                )
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")

    def _move_aside(self, step: int | None) -> Path:
        """Renames a step to DIR/<step>.damaged, or to a number more."""
        names = (f"{step}.damaged{n or ''}" for n in itertools.count())
        aside = next(p for p in map(self.workdir.joinpath, names) if not p.exists())
        (self.workdir / str(step)).rename(aside)
        return aside


def _told_to_all(problem: str) -> str:
    """Returns the problem of the first process that has one, on every process; "" if none has."""
    if jax.process_count() == 1:
        return problem
    troubled = np.ravel(multihost_utils.process_allgather(np.array(bool(problem))))
    if not troubled.any():
        return ""
    text = np.zeros(MESSAGE_BYTES, np.uint8)
    encoded = np.frombuffer(problem.encode()[: len(text)], np.uint8)
    text[: len(encoded)] = encoded
    first = jax.process_index() == int(np.argmax(troubled))
    text = np.asarray(multihost_utils.broadcast_one_to_all(text, is_source=first))
    return text.tobytes().rstrip(b"\0").decode(errors="replace")


def _give_back_memory() -> None:
    """Returns freed memory to the system. glibc would keep what each thread freed of the copy
    that was saved, several copies after a few saves."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        pass


def _for_saving(args: ocp.args.CheckpointArgs) -> ocp.args.CheckpointArgs:
    """Arrays go to the handler that gives them checksums, in chunks of `CHUNK_BYTES` at most."""
    if not isinstance(args, ocp.args.StandardSave):
        return args
    return ocp.args.PyTreeSave(args.item, ocdbt_target_data_file_size=CHUNK_BYTES)


_HANDLERS: dict[type, Any] = {
    ocp.args.StandardRestore: ocp.StandardCheckpointHandler,
    ocp.args.JsonRestore: ocp.JsonCheckpointHandler,
}


def _attempt(action: Callable[[], Any]) -> str:
    """Runs it, and returns why it failed, in one line, or ""."""
    try:
        action()
        return ""
    except Exception as error:  # whatever a disk or foreign bytes make the libraries raise
        return integrity.one_line(error)
