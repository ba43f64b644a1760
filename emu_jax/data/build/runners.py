"""Runners of independent tasks: processes on this machine, or Apache Beam.

A task is a small value that can be pickled. The work on it writes files, and returns the task.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import Any, Generic, Self, TypeVar

from emu_jax.errors import UserError

T = TypeVar("T")
# A runner does the work of tasks in any order, and yields each task when it is done.
Runner = Callable[[Sequence[T]], Iterable[T]]


class Processes(Generic[T]):
    """A runner that uses processes on this machine.

    A process takes a second to start. In a `with` statement they are kept between calls; otherwise
    they end with each call. See `on_processes` for the arguments.
    """

    def __init__(self, work: Callable[[T], T], workers: int, caller_works: bool) -> None:
        self._work, self._workers, self._caller_works = work, workers, caller_works
        self._is_kept = False
        self._pool: ProcessPoolExecutor | None = None
        self._others = set[BaseProcess]()  # processes that were there before the pool

    def __enter__(self) -> Self:
        self._is_kept = True
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._is_kept = False
        self._close(terminate=error is not None)

    def __call__(self, tasks: Sequence[T]) -> Iterator[T]:
        if self._workers <= 1 or len(tasks) <= 1:
            yield from map(self._work, tasks)
            return
        try:
            yield from self._shared(tasks)
        except BrokenProcessPool:
            self._close()
            raise UserError(
                "a worker was killed, perhaps because memory ran out: run the same command again "
                "with fewer --workers; it resumes from the finished shards"
            ) from None
        except BaseException:
            self._close(terminate=True)
            raise
        finally:
            if not self._is_kept:
                self._close()

    def _shared(self, tasks: Sequence[T]) -> Iterator[T]:
        """Yields the results as they come. Workers take the first tasks, the caller the last.

        A worker is handed tasks once it runs. A task that waited for a process to start would hold
        up the end of the call.
        """
        waiting, ended = deque(tasks), SimpleQueue[Future[Any]]()
        pool = self._opened()

        def hand_out(ready: Future[Any]) -> None:
            """Hands the next task to the worker that has started, or done its task."""
            if not ready.cancelled() and not ready.exception():
                try:
                    for task in _popped(waiting.popleft):
                        pool.submit(self._work, task).add_done_callback(hand_out)
                except RuntimeError as error:  # a worker was killed meanwhile
                    (ready := Future[Any]()).set_exception(error)
            ended.put(ready)

        # A caller that works counts as one of them: one task more than processes, so that none
        # waits for its next one.
        count = min(self._workers, len(tasks))
        starts = {pool.submit(_import, self._work) for _ in range(count)}
        for start in starts:
            start.add_done_callback(hand_out)
        left = len(tasks)
        while left:
            if self._caller_works and ended.empty() and (own := _popped(waiting.pop)):
                result = self._work(own[0])
            else:
                result = (future := ended.get()).result()
                if future in starts:
                    continue
            left -= 1
            yield result

    def _opened(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._others = set(multiprocessing.active_children())
            spawn = multiprocessing.get_context("spawn")
            workers = self._workers - self._caller_works
            self._pool = ProcessPoolExecutor(workers, spawn, _start_worker)
        return self._pool

    def _close(self, terminate: bool = False) -> None:
        if self._pool is None:
            return
        if terminate:  # on any error, do not wait for tasks in progress
            for worker in set(multiprocessing.active_children()) - self._others:
                worker.terminate()
        self._pool.shutdown(cancel_futures=True)
        self._pool = None


def on_processes(
    work: Callable[[T], T], workers: int, *, caller_works: bool = False
) -> Processes[T]:
    """Returns a runner that uses processes on this machine.

    Args:
        work: a function that can be pickled.
        workers: how many processes work at a time.
        caller_works: whether the calling process is one of them. It begins at once. If a task
            exhausts memory or crashes, the caller dies too.
    """
    return Processes(work, workers, caller_works)


def _popped(pop: Callable[[], T]) -> list[T]:
    """Returns the task that is next, or [] if another thread took the last one."""
    try:
        return [pop()]
    except IndexError:
        return []


def _import(_: object) -> None:
    """Does nothing. Receiving the function of a worker imports its module."""


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent terminates its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exits when the parent dies: a parent killed by SIGKILL cannot terminate its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def on_beam(work: Callable[[T], T], options: Sequence[str]) -> Runner[T]:
    """Returns a runner that uses Apache Beam (Dataflow, Flink, Spark, ...), configured by Beam's
    own options.

    Raises:
        UserError: Beam is not installed, or (when run) the pipeline failed.
    """
    try:
        import apache_beam as beam  # pyright: ignore[reportMissingImports]
        from apache_beam.options.pipeline_options import (  # pyright: ignore[reportMissingImports]
            PipelineOptions,
        )
    except ImportError:
        raise UserError(
            "Apache Beam is not installed: pip install 'emu_jax[beam]', in an environment of "
            "its own (docs/data.md)"
        ) from None

    def run(tasks: Sequence[T]) -> Sequence[T]:
        try:
            with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
                # Without a reshuffle Beam fuses both steps, and one worker does all the work.
                created = pipeline | beam.Create(tasks) | beam.Reshuffle()
                created | beam.Map(work)  # pyright: ignore[reportUnusedExpression]
        except Exception as error:
            raise UserError(
                f"the Beam pipeline failed: {' '.join(str(error).split())}; the same command "
                "resumes from the finished shards"
            ) from error
        return tasks

    return run
