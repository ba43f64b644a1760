"""Checkpoints of a run under way: saved beside the steps, and the newest that can be read."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from emu_jax.config import UserError

# Under these names a step is written, and removed.
WRITING, REMOVING = ".orbax-checkpoint-tmp", ".removing"


class Checkpoints:
    """The checkpoints in a run directory; all processes call its methods at the same steps.

    A checkpoint is complete when its directory has a bare number as its name: it is written
    under another name and renamed, and renamed before it is removed.
    """

    def __init__(self, workdir: Path, keep: int):
        self.workdir, self.keep = workdir.absolute(), keep
        self._lead = jax.process_index() == 0
        self._saving: int | None = None  # the step being written
        self._remover = ThreadPoolExecutor(1)
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._stack = ExitStack()

    def __enter__(self) -> Checkpoints:
        self._stack.enter_context(_one_line_for_a_failure())
        self._remove_leftovers()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed = kind is not None
        try:
            self.wait()
            self._checkpointer.close()
        except UserError as error:
            failed = True
            if kind is None:
                raise
            print(error, file=sys.stderr)  # beside what ended the run
        finally:
            self._remover.shutdown()
            del self._checkpointer  # and what it holds of a failure
            self._stack.close()
            if failed:  # what was still being written then; the next start removes what still is
                self._remove_leftovers()

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
                self._set_aside(damaged, step)
                return step, saved
            damaged[step] = problem
        problems = "; ".join(f"{step}: {problem}" for step, problem in damaged.items())
        raise UserError(
            f"no checkpoint in {self.workdir} can be read ({problems}): "
            "mend one, or start again in another workdir"
        )

    def save(self, step: int, items: Mapping[str, ocp.args.CheckpointArgs]) -> None:
        """Copies the items and begins to write them, once the save before it has ended.

        Raises:
            UserError: this save, or the one before, failed.
        """
        self.wait()
        self._saving = step
        place, args = self.workdir / str(step), ocp.args.Composite(**items)
        self._attempt(lambda: self._checkpointer.save(place, args))

    def check(self) -> None:
        """Looks at the save that is under way.

        Raises:
            UserError: it has failed.
        """
        self._attempt(self._checkpointer.check_for_errors)
        if self._saving is not None and (self.workdir / str(self._saving)).is_dir():
            self._saved()

    def wait(self) -> None:
        """Until what was saved is on disk.

        Raises:
            UserError: the last save failed.
        """
        self._attempt(self._checkpointer.wait_until_finished)
        self._saved()

    def _saved(self) -> None:
        """What was being written is complete: the oldest go."""
        self._saving = None
        for step in sorted(self._steps())[: -self.keep] if self._lead else ():
            removing = self.workdir / f"{step}{REMOVING}"
            (self.workdir / str(step)).rename(removing)
            self._remover.submit(shutil.rmtree, removing, ignore_errors=True)

    def _steps(self) -> list[int]:
        return [int(p.name) for p in self.workdir.iterdir() if p.name.isdigit()]

    def _remove_leftovers(self) -> None:
        """What a process that was killed, or a save that failed, left half done."""
        if self._lead:
            for ending in (WRITING, REMOVING):
                for path in self.workdir.glob(f"*{ending}"):
                    shutil.rmtree(path, ignore_errors=True)

    def _attempt(self, action: Callable[[], Any]) -> None:
        """
        Raises:
            UserError: it failed, and so the save that is under way.
        """
        if reason := _attempt(action):
            step, self._saving = self._saving, None
            self._remove_leftovers()
            steps = self._steps()
            rest = f"start again to go on from step {max(steps)}" if steps else "start again"
            raise UserError(
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

        def read() -> None:
            for name, args in items.items():
                place = epath.Path(self.workdir / str(step) / name)
                saved[name] = _HANDLERS[type(args)]().restore(place, args=args)

        if problem := _attempt(read):
            gc.collect()  # what was read beside it, while its errors are silenced
            unread = next(name for name in items if name not in saved)
            problem = f"{unread}: {problem}"
        problems = multihost_utils.process_allgather(np.array(bool(problem)))
        if problems.any():
            return {}, problem or f"process {int(np.argmax(problems))} cannot read its part"
        return saved, ""

    def _set_aside(self, damaged: Mapping[int, str], step: int) -> None:
        if not damaged:
            return
        if self._lead:
            for number, problem in sorted(damaged.items()):
                names = (f"{number}.damaged{n or ''}" for n in itertools.count())
                aside = next(p for p in map(self.workdir.joinpath, names) if not p.exists())
                (self.workdir / str(number)).rename(aside)
                print(
                    f"checkpoint {number} cannot be read ({problem}): kept as {aside}, "
                    f"going on from step {step}",
                    file=sys.stderr,
                )
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")


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
        return _reason(error)


def _reason(error: BaseException) -> str:
    """What went wrong, in one line. Errors of storage name all the layers that they passed, and
    somewhere the operating system's own."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    text = str(error).splitlines()[0] if str(error) else repr(error)
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else text[:300]


@contextmanager
def _one_line_for_a_failure() -> Iterator[None]:
    """Silences what else is said of a failure that `_attempt` has put into one line.

    Orbax logs its traceback from each thread that it passes. And it reads and writes arrays side
    by side: when one fails, the errors of the others are nobody's, and Python prints each when it
    finds them. So after a failure the silence stays.
    """
    hook, loggers = sys.unraisablehook, [logging.getLogger(name) for name in ("absl", "asyncio")]
    failed = False

    def without_strays(stray: Any) -> None:
        code = getattr(stray.object, "cr_code", None)
        if "orbax" not in getattr(code, "co_filename", "") and (
            str(stray.exc_value) != "Event loop is closed"
        ):
            hook(stray)

    def without_tracebacks(record: logging.LogRecord) -> bool:
        nonlocal failed
        failed |= bool(record.exc_info)
        return not record.exc_info

    sys.unraisablehook = without_strays
    for logger in loggers:
        logger.addFilter(without_tracebacks)
    try:
        yield
    finally:
        if not failed:  # else its echoes come until the process ends
            for logger in loggers:
                logger.removeFilter(without_tracebacks)
            sys.unraisablehook = hook
