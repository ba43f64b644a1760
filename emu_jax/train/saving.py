"""Checkpoints of a run under way: saved beside the steps, and the newest that can be read."""

from __future__ import annotations

import itertools
import logging
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from emu_jax.config import UserError

TEMPORARY = "*.orbax-checkpoint-tmp"  # what orbax writes before a checkpoint is complete


class Checkpoints:
    """The checkpoints in a run directory; all processes call its methods at the same steps.

    A checkpoint is complete when its directory has a bare number as its name: it is written
    under another and renamed.
    """

    def __init__(self, workdir: Path, keep: int):
        self.workdir = workdir.absolute()
        self._saving = 0  # the step whose save began last
        self._manager = ocp.CheckpointManager(
            self.workdir,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        )

    def __enter__(self) -> Checkpoints:
        # Orbax logs a failure's traceback from each thread that it passes; here it is one line.
        logging.getLogger("absl").addFilter(_without_traceback)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
            self._manager.close()
        except UserError as error:
            if kind is None:
                raise
            print(error, file=sys.stderr)  # beside what ended the run
        finally:
            logging.getLogger("absl").removeFilter(_without_traceback)

    def newest(self, before: int = sys.maxsize) -> int | None:
        """The newest complete step before another, as the first process sees it."""
        steps = [step for step in self._manager.all_steps() if step < before]
        newest = int(multihost_utils.broadcast_one_to_all(np.int32(max(steps, default=-1))))
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
        """Copies the items and starts to write them; waits for the save before it.

        Raises:
            UserError: this save, or the one before, failed.
        """
        with self._explained():
            self._manager.wait_until_finished()
            self._saving = step
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def check(self) -> None:
        """
        Raises:
            UserError: the save that is under way has failed.
        """
        with self._explained():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Until what was saved is on disk.

        Raises:
            UserError: the last save failed.
        """
        with self._explained():
            self._manager.wait_until_finished()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if jax.process_index() == 0:  # nothing half-written stays
                for path in self.workdir.glob(TEMPORARY):
                    shutil.rmtree(path, ignore_errors=True)
            steps = [s for s in self._manager.all_steps() if s != self._saving]
            rest = f"start again to go on from step {max(steps)}" if steps else "start again"
            raise UserError(
                f"cannot save step {self._saving} in {self.workdir}: {_reason(error)}: "
                f"mend that, then {rest}"
            ) from error

    def _read(
        self, step: int, items: Mapping[str, ocp.args.CheckpointArgs]
    ) -> tuple[dict[str, Any], str]:
        """(the items of a step, "") or ({}, why it cannot be read on some process).

        Orbax's own restore would leave processes that can read theirs waiting for the others,
        so its handlers are asked, which wait for nobody.
        """
        saved, problem = {}, ""
        try:
            for name, args in items.items():
                handler = _HANDLERS[type(args)]()
                saved[name] = handler.restore(
                    epath.Path(self.workdir / str(step) / name), args=args
                )
        except Exception as error:  # whatever foreign bytes make the libraries raise
            problem = _reason(error)
        problems = multihost_utils.process_allgather(np.array(bool(problem)))
        if problems.any():
            return {}, problem or f"process {int(np.argmax(problems))} cannot read its part"
        return saved, ""

    def _set_aside(self, damaged: Mapping[int, str], step: int) -> None:
        if not damaged:
            return
        if jax.process_index() == 0:
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
        self._manager.reload()


_HANDLERS: dict[type, Any] = {
    ocp.args.StandardRestore: ocp.StandardCheckpointHandler,
    ocp.args.JsonRestore: ocp.JsonCheckpointHandler,
}


def _without_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info


def _reason(error: BaseException) -> str:
    """What went wrong, in one line. Storage errors name each layer that they passed; the last
    names the cause."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    text = str(error).splitlines()[0] if str(error) else repr(error)
    found = re.search(r"([^:]+?)\s*\[os_error_code=", text)
    return found[1].strip() if found else text[:300]
