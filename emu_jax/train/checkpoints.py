"""Checkpoints of a running job: saves them asynchronously, and restores the newest readable one."""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from emu_jax import integrity
from emu_jax.checkpoint import (
    COMMIT_MARKER,
    DAMAGED_MARKER,
    complete_steps,
    markers,
    read_tree,
    step_folders,
)
from emu_jax.errors import UserError
from emu_jax.host_memory import release_freed_memory
from emu_jax.sharding import flatten, nest
from emu_jax.storage import StorePath, remove, sync
from emu_jax.train.lock import Lock
from emu_jax.train.step import ModelParams, Trainer, TrainState

# Suffixes of a step that is being written, and of one that is being removed.
WRITING, REMOVING = ".orbax-checkpoint-tmp", ".removing"
MESSAGE_BYTES = 1000  # longest message that one process broadcasts to all
CHUNK_BYTES = 2**26  # of an array's chunks and of files: a reader holds a whole chunk


class Checkpoints:
    """The checkpoints in a run directory. All processes call its methods at the same steps.

    A checkpoint is complete when the name of its directory is a bare number: it is written under
    another name and renamed, and renamed again before it is removed. In an object store, where
    nothing can be renamed, it is complete when it holds a commit marker, which is written last and
    deleted first. A complete checkpoint is read back before older ones are removed.

    As a context manager, it keeps other jobs from writing checkpoints to the directory.

    Orbax's `CheckpointManager` is not used. It neither reads a step back before it removes older
    ones, nor restores an older step if the newest is damaged, nor keeps other jobs away.

    Args:
        keep: number of newest steps that are kept.
        best: returns those of the complete steps that are kept as well.
    """

    def __init__(
        self,
        workdir: Path,
        keep: int,
        best: Callable[[Sequence[int]], Collection[int]] = lambda steps: (),
    ) -> None:
        self.workdir, self.keep, self._best = workdir.absolute(), keep, best
        self._lead = jax.process_index() == 0
        self._lock = Lock(self.workdir / "lock.json")
        self._saving: int | None = None  # the step being written
        # Resolves once the step is written and read back, to this process's read error or "".
        self._written: Future[str] | None = None
        self._complete: int | None = None  # the step that this process has finished writing
        self._unread = ""  # why this process could not read that step back
        self._worker = ThreadPoolExecutor(1)
        self._remover = ThreadPoolExecutor(1)
        # Compression hardly shrinks weights. Without it, arrays are written without another copy.
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
            if problem := _broadcast_problem(_attempt(self._remove_leftovers)):
                raise UserError(problem)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed = kind is not None
        try:
            self._await_written()
            if kind is None or jax.process_count() == 1:
                self._retire_old_steps()
            elif self._unread:  # the other processes may be gone
                raise self._failure(self._complete, self._unread)
            self._checkpointer.close()
        except UserError as error:
            failed = True
            if kind is None:
                raise
            print(error, file=sys.stderr)  # in addition to the error that ended the run
        finally:
            self._worker.shutdown()
            self._remover.shutdown()
            del self._checkpointer  # and the references that it holds to a failure
            if failed:  # the next start removes what is still being written
                with suppress(OSError):
                    self._remove_leftovers()
            self._stack.close()

    def newest(self, before: int = sys.maxsize) -> int | None:
        """Returns the newest complete step below `before`, as the first process sees it."""
        steps = self._steps() if self._lead else ()
        newest = max((step for step in steps if step < before), default=-1)
        newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
        return None if newest < 0 else newest

    def restore(self, items: Mapping[str, ocp.args.CheckpointArgs]) -> tuple[int, dict[str, Any]]:
        """Returns the newest step that all processes can read, and its items.

        Newer, unreadable steps are set aside, each with a line on stderr: renamed to
        DIR/<step>.damaged, or in an object store marked with DIR/<step>/damaged.txt.

        Raises:
            UserError: no step can be read, or the object store fails. All are left as they are.
        """
        damaged: dict[int, str] = {}
        while (step := self.newest(before=min(damaged, default=sys.maxsize))) is not None:
            saved, problem = self._read(step, items)
            if not problem:
                self._set_aside(damaged, f"resuming from step {step}")
                return step, saved
            damaged[step] = problem
        problems = "; ".join(f"{step}: {problem}" for step, problem in damaged.items())
        raise UserError(
            f"no checkpoint in {self.workdir} can be read ({problems}): "
            "repair one of them, or use a new --workdir"
        )

    def save(self, step: int, items: Mapping[str, ocp.args.CheckpointArgs]) -> None:
        """Waits for the previous save, copies the items and starts to write them. At most one copy
        is in memory.

        Raises:
            UserError: this save or the previous one failed, or another job writes here.
        """
        self.wait()
        self._check_lock()
        self._saving = step
        folder = self.workdir / str(step)
        if self._lead and isinstance(folder, StorePath) and DAMAGED_MARKER in markers(folder):
            self._attempt(lambda: _remove_step(folder))
        args = ocp.args.Composite(**{name: _with_checksums(item) for name, item in items.items()})
        self._attempt(lambda: self._checkpointer.save(folder, args))
        self._written = self._worker.submit(self._finish, folder)

    def check(self) -> bool:
        """Checks the save in progress without waiting.

        Returns whether this process, as one of several, could not read it back. All of them should
        then soon call `save` or `wait`, which fail on all processes.

        Raises:
            UserError: the save has failed. A process that failed to write may raise alone.
        """
        if self._written is not None and self._written.done():
            self._await_written()
            if jax.process_count() == 1:
                self._retire_old_steps()
        return bool(self._unread)

    def wait(self) -> None:
        """Waits until the last save is on disk and all processes have read it back.

        Raises:
            UserError: the last save failed. All processes raise it if one could not read the save
                back.
        """
        self._await_written()
        self._retire_old_steps()

    def _seal(self) -> None:
        """Writes the checksums. Orbax calls it on the lead, before it commits the step."""
        suffix = "" if isinstance(self.workdir, StorePath) else WRITING
        integrity.seal(self.workdir / f"{self._saving}{suffix}")

    def _finish(self, folder: Path) -> str:
        """Runs on a thread: awaits the end of a save, then reads this process's share of it back.

        Returns why that cannot be read, or "".
        """
        self._checkpointer.wait_until_finished()
        problem = ""
        if reason := _attempt(lambda: self._read_back(folder)):
            problem = f"read back, {reason}"
        release_freed_memory()
        return problem

    def _read_back(self, folder: Path) -> None:
        if self._lead:
            if not isinstance(self.workdir, StorePath):
                sync(self.workdir)
            if problems := integrity.damaged_files(folder):
                raise ValueError(problems[0])
        for item in integrity.items_of(folder):
            for problem in integrity.unreadable_arrays(
                folder / item, jax.process_index(), jax.process_count()
            ):
                raise ValueError(problem)

    def _await_written(self) -> None:
        """Awaits this process's part of the save in progress.

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

    def _retire_old_steps(self) -> None:
        """Removes the oldest steps, once all processes have written and read back a save.

        Raises:
            UserError: some process could not read the save back, or another job writes here. All
                processes raise it.
        """
        if self._complete is None:
            return
        step, self._complete = self._complete, None
        problem, self._unread = _broadcast_problem(self._unread), ""
        if problem:
            raise self._failure(step, problem)
        self._check_lock()
        for old in self._old_steps() if self._lead else ():
            folder = self.workdir / str(old)
            if isinstance(folder, StorePath):
                self._remover.submit(_remove_step, folder)
                continue
            removing = folder.with_name(f"{old}{REMOVING}")
            folder.rename(removing)
            self._remover.submit(shutil.rmtree, removing, ignore_errors=True)

    def _old_steps(self) -> list[int]:
        """Returns the complete steps that are neither among the newest nor the best."""
        steps = sorted(self._steps())
        if not (old := steps[: -self.keep]):
            return []
        best = self._best(steps)
        return [step for step in old if step not in best]

    def _steps(self) -> list[int]:
        return complete_steps(self.workdir)

    def _take_lock(self) -> None:
        """Takes the lock of the run directory.

        Raises:
            UserError: another job trains in this directory. All processes raise it.
        """
        problem = ""
        if self._lead:
            try:
                self._lock.acquire()
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"failed to write {self._lock.path}: {error.strerror}"
        if problem := _broadcast_problem(problem):
            raise UserError(problem)

    def _check_lock(self) -> None:
        """Checks that this job still holds the lock.

        Raises:
            UserError: another job has taken the lock over. All processes raise it.
        """
        problem = ""
        try:
            self._lock.check()
        except UserError as error:
            problem = str(error)
        if problem := _broadcast_problem(problem):
            raise UserError(problem)

    def _remove_leftovers(self) -> None:
        """Removes half-written and half-removed steps of killed processes and failed saves."""
        if not self._lock.held:
            return
        if isinstance(self.workdir, StorePath):
            for folder in (self.workdir / str(step) for step in step_folders(self.workdir)):
                if not markers(folder):
                    remove(folder)
            return
        for path in self.workdir.iterdir():
            if path.name.endswith((WRITING, REMOVING)):
                shutil.rmtree(path, ignore_errors=True)

    def _attempt(self, action: Callable[[], object]) -> None:
        """Runs a part of saving.

        Raises:
            UserError: it failed, which fails the save in progress.
        """
        if reason := _attempt(action):
            step, self._saving = self._saving, None
            raise self._failure(step, reason)

    def _failure(self, step: int | None, reason: str) -> UserError:
        """Cleans up after a failed save, and returns the error to raise."""
        resumes = "resumes from the newest checkpoint"
        with suppress(OSError):  # the storage, which may be what failed
            if self._lock.held and step is not None and step in self._steps():
                self._move_aside(step, reason)  # complete, but unreadable
            self._remove_leftovers()
            # Other processes may get here before the lead has moved the step aside.
            steps = [number for number in self._steps() if number != step]
            resumes = f"resumes from step {max(steps)}" if steps else "starts from the beginning"
        return UserError(
            f"failed to save step {step} to {self.workdir}: {reason}: fix this and rerun; training "
            f"{resumes}"
        )

    def _read(
        self, step: int, items: Mapping[str, ocp.args.CheckpointArgs]
    ) -> tuple[dict[str, Any], str]:
        """Returns (the items of a step, ""), or ({}, why some process cannot read it).

        Raises:
            UserError: the object store fails; the step may be intact. All processes raise it.
        """
        folder, failure = self.workdir / str(step), ""
        saved, problem = self._read_share(folder, items)
        if problem and isinstance(folder, StorePath):
            failure = _attempt(lambda: (folder / COMMIT_MARKER).read_bytes())
            if not failure:  # it answers again, or did all the time
                saved, problem = self._read_share(folder, items)
        if failure := _broadcast_problem(failure):
            raise UserError(f"cannot read {folder} ({failure}): fix this and rerun")
        problems = multihost_utils.process_allgather(np.array(bool(problem)))
        if problems.any():
            return {}, problem or f"process {int(np.argmax(problems))} cannot read its part"
        return saved, ""

    def _read_share(
        self, folder: Path, items: Mapping[str, ocp.args.CheckpointArgs]
    ) -> tuple[dict[str, Any], str]:
        """Returns (this process's share of the items of a step, why it cannot be read or "").

        Uses orbax's handlers, which do not wait for other processes. With orbax's own restore,
        processes that can read their part would wait forever for one that cannot.
        """
        saved: dict[str, Any] = {}
        problem = ""
        try:
            problem = "; ".join(integrity.damaged_files(folder, list(items)))
        except FileNotFoundError:
            if self._lead:
                integrity.warn_unverified(folder)

        def read() -> None:
            for name, args in items.items():
                if isinstance(args, ocp.args.StandardRestore):
                    saved[name] = read_tree(folder / name, args.item)
                else:
                    handler = ocp.JsonCheckpointHandler()
                    saved[name] = handler.restore(epath.Path(folder / name))

        if not problem and (problem := _attempt(read)):
            unread = next(name for name in items if name not in saved)
            problem = f"{unread}: {problem}"
        return saved, problem

    def _set_aside(self, damaged: Mapping[int, str], then: str) -> None:
        if not damaged:
            return
        if self._lead:
            for number, problem in sorted(damaged.items()):
                aside = self._move_aside(number, problem)
                print(
                    f"checkpoint {number} cannot be read ({problem}): {aside}, {then}",
                    file=sys.stderr,
                )
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")

    def _move_aside(self, step: int, problem: str) -> str:
        """Renames a step to DIR/<step>.damaged, or .damaged1 and so on if that exists.

        In an object store, where this would copy the step, puts a small object into it instead. The
        step is then removed when the same step is saved again.

        Returns:
            What has been done, for a message.
        """
        folder = self.workdir / str(step)
        if isinstance(folder, StorePath):
            (folder / DAMAGED_MARKER).write_text(f"{problem}\n")
            return f"set aside with {folder / DAMAGED_MARKER}, and replaced by the next step {step}"
        names = (f"{step}.damaged{n or ''}" for n in itertools.count())
        aside = next(p for p in map(self.workdir.joinpath, names) if not p.exists())
        folder.rename(aside)
        return f"renamed to {aside}"


def _remove_step(step: StorePath) -> None:
    """Removes a step from an object store. It is incomplete from the first request on."""
    (step / COMMIT_MARKER).unlink(missing_ok=True)
    remove(step)


def _broadcast_problem(problem: str) -> str:
    """Returns on every process the problem of the first process that has one, or ""."""
    if jax.process_count() == 1:
        return problem
    affected = np.ravel(multihost_utils.process_allgather(np.array(bool(problem))))
    if not affected.any():
        return ""
    text = np.zeros(MESSAGE_BYTES, np.uint8)
    encoded = np.frombuffer(problem.encode()[: len(text)], np.uint8)
    text[: len(encoded)] = encoded
    first = jax.process_index() == int(np.argmax(affected))
    text = np.asarray(multihost_utils.broadcast_one_to_all(text, is_source=first))
    return text.tobytes().rstrip(b"\0").decode(errors="replace")


def _with_checksums(args: ocp.args.CheckpointArgs) -> ocp.args.CheckpointArgs:
    """Saves arrays with checksums, in chunks of at most `CHUNK_BYTES`."""
    if not isinstance(args, ocp.args.StandardSave):
        return args
    return ocp.args.PyTreeSave(args.item, ocdbt_target_data_file_size=CHUNK_BYTES)


def _attempt(action: Callable[[], object]) -> str:
    """Runs an action. Returns why it failed, in one line, or ""."""
    try:
        action()
        return ""
    except Exception as error:  # the libraries raise anything on a full disk or foreign bytes
        return integrity.one_line(error)


def save_state(
    checkpoints: Checkpoints,
    step: int,
    state: TrainState,
    position: dict[str, Any],
    *,
    leave_out: Collection[str],
) -> None:
    """Starts an asynchronous, atomic save of the state and the data position.

    Args:
        leave_out: paths of frozen parameters that stay in the parents' run directories.
    """
    frozen = {path: a for path, a in state.frozen.items() if path not in leave_out}
    counts = {"bad": state.bad_steps, "skipped": state.skipped_steps}
    items: dict[str, ocp.args.CheckpointArgs] = {
        "params": ocp.args.StandardSave(nest(state.trained | frozen)),
        "optimizer": ocp.args.StandardSave({"state": state.optimizer} | counts),
        "position": ocp.args.JsonSave(position),
    }
    if state.ema:
        items["ema"] = ocp.args.StandardSave(nest(state.ema))
    checkpoints.save(step, items)


def restore_state(
    checkpoints: Checkpoints, trainer: Trainer, left_out: ModelParams
) -> tuple[int, TrainState, dict[str, Any]]:
    """Restores the newest readable step onto this run's mesh.

    Args:
        left_out: the frozen parameters that the step omits.

    Returns:
        (steps done, the state, the data position).
    """
    shapes = trainer.state_shapes
    frozen = {path: shape for path, shape in shapes.frozen.items() if path not in left_out}
    counts = {"bad": shapes.bad_steps, "skipped": shapes.skipped_steps}
    items: dict[str, ocp.args.CheckpointArgs] = {
        "params": ocp.args.StandardRestore(nest(shapes.trained | frozen)),
        "optimizer": ocp.args.StandardRestore({"state": shapes.optimizer} | counts),
        "position": ocp.args.JsonRestore(),
    }
    if shapes.ema:
        items["ema"] = ocp.args.StandardRestore(nest(shapes.ema))
    step, saved = checkpoints.restore(items)
    params = {**flatten(saved["params"]), **left_out}
    state = TrainState(
        step=jax.device_put(jnp.int32(step), trainer.state_shardings.step),
        trained={path: params[path] for path in trainer.trained},
        frozen={path: params[path] for path in trainer.frozen},
        optimizer=saved["optimizer"]["state"],
        ema=flatten(saved["ema"]) if shapes.ema else {},
        bad_steps=saved["optimizer"]["bad"],
        skipped_steps=saved["optimizer"]["skipped"],
    )
    return step, state, saved["position"]
