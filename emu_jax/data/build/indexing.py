"""`emu-jax data index`: finds the documents of a config's sources and counts their tokens, in
parallel, before a run.

The work is cut into tasks: an index for each file, folders for the indexes of many files or the
numbers of their records, then token counts for each part of a source (`LengthParts`). A task writes
what training would write by itself, to the same cache, so that a run finds it there. A task whose
result is cached takes no time: an interrupted command resumes.

Several machines share the tasks by `--shard`. They meet in the cache: a machine waits for the
files of the others before it counts tokens, because a document's number depends on all files.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

from emu_jax.data.build.runners import Runner
from emu_jax.data.config import DataConfig
from emu_jax.data.documents import Source
from emu_jax.data.lengths import LengthParts
from emu_jax.data.mixture import chosen_sources, lengths_folder, open_lengths
from emu_jax.data.sources import SourceConfig, find_files, open_source
from emu_jax.data.sources.index import NotIndexed, file_groups, without_indexing
from emu_jax.data.sources.listings import media_paths
from emu_jax.data.sources.open import are_counted, index_records
from emu_jax.data.sources.tars import index_tar
from emu_jax.errors import UserError
from emu_jax.progress import ProgressBar
from emu_jax.tokenizer import Tokenizer

_POLL_SECONDS = 5.0  # between looks for the results of other shards
_SCANNED = ("webdataset", "pages", "videos", "subtitled", "dialogues")  # formats with an index


class IndexTask(NamedTuple):
    """The index of a file or of several files, or the token counts of a part of a source.

    Attributes:
        source: the source; of files, with their paths alone.
        data: config with the cache and the tokenizer.
        part: number of the part, or None for files.
        is_media: whether the file is a tar of media, not of documents.
    """

    source: SourceConfig
    data: DataConfig
    part: int | None = None
    is_media: bool = False


class IndexedSource(NamedTuple):
    """A source that training can open without a scan."""

    documents: int
    tokens: int
    images: int


def index_sources(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    make_runner: Callable[
        [Callable[[IndexTask], IndexTask]], AbstractContextManager[Runner[IndexTask]]
    ],
    shard: tuple[int, int] = (0, 1),
) -> dict[str, IndexedSource]:
    """Indexes the sources of a config and counts their tokens.

    Args:
        make_runner: returns a context with a runner of a function on tasks.
        shard: (number of this machine, number of machines) that share the tasks.

    Raises:
        UserError: a source cannot be opened, or the shard is not one of them.
    """
    number, count = shard
    if not 0 <= number < count:
        raise UserError(f"--shard {number}/{count} is out of range: count from 0")
    sources = chosen_sources(cfg, pairs=False)
    _opened_once.cache_clear()  # files may have changed since an earlier call
    try:
        with without_indexing():
            return _totals(sources, cfg, tokenizer)
    except NotIndexed:
        pass
    with make_runner(run_task) as runner:
        for tasks in (
            [task for source in sources for task in _media_tasks(source, cfg)],
            [task for source in sources for task in _file_tasks(source, cfg)],
            [task for source in sources for task in _folder_tasks(source, cfg)],
        ):
            _run("index", "file", tasks, runner, number, count)
        parts = [
            IndexTask(source, cfg, part)
            for source in sources
            for part in range(_parts(source, _opened(source, cfg), cfg, tokenizer).count)
        ]
        _run("count", "part", parts, runner, number, count)
    return _totals(sources, cfg, tokenizer)


def _totals(
    sources: Sequence[SourceConfig], cfg: DataConfig, tokenizer: Tokenizer
) -> dict[str, IndexedSource]:
    """Returns the totals of each source.

    Raises:
        NotIndexed: something is not cached, in `without_indexing`.
    """
    result = {}
    for source in sources:
        if are_counted(source, paths := find_files(source)):
            index_records(paths, cfg.cache)  # without it, opening reads all files
        documents = _opened(source, cfg)
        lengths = open_lengths(source, documents, cfg, tokenizer, recount=False)
        lengths.parts.check()
        totals = lengths.totals()
        result[source.name] = IndexedSource(totals["documents"], totals["tokens"], totals["images"])
    return result


def run_task(task: IndexTask) -> IndexTask:
    """Does the work of a task, unless its result is cached; the whole work of a worker.

    Raises:
        UserError: a file cannot be read.
    """
    source, cfg = task.source, task.data
    if task.is_media:
        index_tar(source.paths[0], cfg.cache)
    elif task.part is None and source.format == "records":
        index_records(source.paths, cfg.cache)
    elif task.part is None:
        open_source(source, cfg.cache, cfg.cache_bytes)
    else:
        documents, tokenizer = _opened(source, cfg), _tokenizer_of(cfg)
        parts = _parts(source, documents, cfg, tokenizer)
        if parts.count > 1:
            parts.open(task.part)
        else:
            open_lengths(source, documents, cfg, tokenizer, recount=False)
    return task


def _run(
    verb: str,
    unit: str,
    tasks: Sequence[IndexTask],
    runner: Runner[IndexTask],
    number: int,
    count: int,
) -> None:
    """Runs this shard's tasks, then waits until the results of all others are cached."""
    mine = tasks[number::count]
    if mine:
        with ProgressBar(verb, len(mine), unit) as progress:
            for _ in runner(mine):
                progress.add(1)
    others = [task for n, task in enumerate(tasks) if n % count != number]
    if not others:
        return
    with ProgressBar(f"{verb}, other shards", len(others), unit) as progress:
        while others:
            left = [task for task in others if not _is_done(task)]
            progress.add(len(others) - len(left))
            if others := left:
                time.sleep(_POLL_SECONDS)


def _is_done(task: IndexTask) -> bool:
    try:
        with without_indexing():
            run_task(task)
    except NotIndexed:
        return False
    return True


def _media_tasks(source: SourceConfig, cfg: DataConfig) -> list[IndexTask]:
    if source.format not in _SCANNED or source.format == "webdataset":
        return []
    tars = [m for path in source.media for m in media_paths(path) if m.endswith(".tar")]
    each = [dataclasses.replace(source, paths=(tar,)) for tar in tars]
    return [IndexTask(one, cfg, is_media=True) for one in each]


def _file_tasks(source: SourceConfig, cfg: DataConfig) -> list[IndexTask]:
    if source.format == "records":
        return []  # counted by folder
    return [_index_task(source, cfg, (path,)) for path in _indexed_files(source)]


def _folder_tasks(source: SourceConfig, cfg: DataConfig) -> list[IndexTask]:
    """Returns the tasks that merge the indexes of many files into folders, or count their
    records."""
    groups = file_groups(_indexed_files(source), source.format == "records")
    if any(map(file_groups, groups)):  # opening the source merges so many files
        return []
    return [_index_task(source, cfg, tuple(group)) for group in groups]


def _indexed_files(source: SourceConfig) -> list[str]:
    """Returns the files of a source that have an index in the cache."""
    if source.format not in (*_SCANNED, "records"):
        return []
    paths = find_files(source)
    return paths if source.format in _SCANNED or are_counted(source, paths) else []


def _index_task(source: SourceConfig, cfg: DataConfig, paths: tuple[str, ...]) -> IndexTask:
    return IndexTask(dataclasses.replace(source, paths=paths, media=()), cfg)


def _parts(
    source: SourceConfig, documents: Source, cfg: DataConfig, tokenizer: Tokenizer
) -> LengthParts:
    return LengthParts(documents, tokenizer, lengths_folder(source, cfg), cfg.n_frame > 0)


def _opened(source: SourceConfig, cfg: DataConfig) -> Source:
    """Returns the source of a task; a process opens each once."""
    return _opened_once(source, cfg.cache, cfg.cache_bytes)


@functools.lru_cache(8)
def _opened_once(source: SourceConfig, cache: str, cache_bytes: int) -> Source:
    return open_source(source, cache, cache_bytes)


def _tokenizer_of(cfg: DataConfig) -> Tokenizer:
    """Returns the tokenizer of a task; a process loads each once."""
    return _tokenizer(cfg.tokenizer or f"{cfg.root}/tokenizer", cfg.instruct, cfg.family)


@functools.lru_cache(2)
def _tokenizer(folder: str, instruct: bool, family: str) -> Tokenizer:
    return DataConfig(tokenizer=folder, instruct=instruct, family=family).load_tokenizer()
