"""Checksums of checkpoint steps, written on save and verified on every read.

    DIR/<step>/ITEM/...        arrays: zarr3 chunks in an OCDBT database. Each chunk carries a
                               crc32c, computed by the host that writes it and verified by the
                               reader. OCDBT does so for its own nodes and manifests.
    DIR/<step>/checksums.json  SHA-256 of every other file: shapes, data position, manifests

Together they cover every byte that a value depends on. A host verifies only the chunks it reads,
which is its own share of the arrays.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import inspect
import json
import logging
import math
import os
import re
import traceback
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, TypeVar

import jax
import numpy as np
import tensorstore as ts

from emu_jax.errors import UserError
from emu_jax.storage import as_path, files, is_remote, kvstore, sync, write_text

CHECKSUMS = "checksums.json"
GLOB_CHARACTERS = "*?[]\\"
# Orbax writes these after the checksums; nothing reads them.
UNCOVERED = (CHECKSUMS, "_CHECKPOINT_METADATA", "commit_success.txt")
# Bytes that `unreadable_arrays` reads concurrently. It reads a larger chunk alone.
_BYTES_AHEAD = 1 << 26
_CONTEXT = {
    "cache_pool#ocdbt": {"total_bytes_limit": 100_000_000},  # nodes of the database, not chunks
    "file_io_concurrency": {"limit": 4},
}

_STORAGE = {"orbax", "tensorstore"}  # folders of the libraries

_T = TypeVar("_T")

_log = logging.getLogger(__name__)


def _metadata(
    global_shape: Sequence[int], chunk_shape: Sequence[int], use_compression: bool
) -> dict[str, Any]:
    """Returns zarr3 metadata for an array whose chunks end with a crc32c."""
    zstd = [{"name": "zstd", "configuration": {"level": 1}}] if use_compression else []
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, *zstd, {"name": "crc32c"}]
    grid = {"name": "regular", "configuration": {"chunk_shape": chunk_shape}}
    return {"shape": global_shape, "chunk_grid": grid, "codecs": codecs}


def _choose_codecs() -> None:
    """Patches orbax to write `_metadata`: it has no setting for the codecs, but reads any.

    Raises:
        UserError: this version of orbax cannot be patched; its checkpoints would lack checksums.
    """
    try:
        from orbax.checkpoint._src.serialization import tensorstore_utils

        parameters = inspect.signature(tensorstore_utils._build_zarr3_metadata).parameters
    except (ImportError, AttributeError):
        parameters = {}
    if list(parameters) != list(inspect.signature(_metadata).parameters):
        version = importlib.metadata.version("orbax-checkpoint")
        raise UserError(
            f"orbax-checkpoint {version} would write checkpoints without checksums: "
            "pip install orbax-checkpoint==0.12.8"
        )
    tensorstore_utils._build_zarr3_metadata = _metadata  # pyright: ignore[reportPossiblyUnboundVariable]


_choose_codecs()


def _reach_s3() -> None:
    """Patches orbax to treat `s3://` as `gs://`: tensorstore's driver, a commit marker, no renames.

    Orbax itself writes arrays to `gs://` and local paths alone.
    """
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    kvstore_for_gcs, normalize = gcs_utils.get_kvstore_for_gcs, tensorstore_utils._normalize_path

    def kvstore_for(path: str) -> dict[str, Any]:
        if not path.startswith("s3://"):
            return kvstore_for_gcs(path)
        spec = kvstore(as_path(path))
        return spec | {"path": spec["path"].rstrip("/")}  # it may be a file

    gcs_utils.is_gcs_path = lambda path: is_remote(path.as_posix())
    gcs_utils.get_kvstore_for_gcs = kvstore_for
    tensorstore_utils._use_gcs_driver = is_remote
    tensorstore_utils._normalize_path = lambda path: normalize(path).replace("s3:/", "s3://")


_reach_s3()


def _finish_started() -> None:
    """Patches orbax to finish the reads and writes that it started beside one that failed.

    Otherwise it closes their event loop first, and each of them prints a traceback when it ends.
    """
    from orbax.checkpoint._src import asyncio_utils

    run_sync = asyncio_utils.run_sync

    async def finish(coroutine: Coroutine[Any, Any, _T]) -> _T:
        try:
            return await coroutine
        except Exception:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*others, return_exceptions=True)
            raise

    asyncio_utils.run_sync = lambda coro: run_sync(finish(coro))


_finish_started()


def check_path(directory: Path) -> None:
    """Checks that a path holds no glob characters.

    Orbax treats such a path as a pattern, and would read or write other files.

    Raises:
        UserError: the path contains a glob character.
    """
    if found := [c for c in GLOB_CHARACTERS if c in str(directory.absolute())]:
        raise UserError(
            f"the path contains {' '.join(found)} ({directory.absolute()}): checkpoints cannot be "
            "stored there; rename the directory"
        )


def seal(step: Path) -> None:
    """Writes the checksums of an otherwise complete step and syncs its local files to disk.

    One process does this for the files of all processes, several at a time.
    """
    local = not is_remote(step)
    paths = sorted(path for path in files(step) if _is_covered(path.relative_to(step)))
    folders = [folder for folder, _, _ in os.walk(step)] if local else []

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            if local:
                os.fsync(file.fileno())
            return hashlib.sha256(file.read()).hexdigest()

    with ThreadPoolExecutor(16) as workers:
        digests = workers.map(digest, paths)
        sums = {str(p.relative_to(step)): s for p, s in zip(paths, digests, strict=True)}
        list(workers.map(sync, folders))
    write_text(step / CHECKSUMS, json.dumps({"sha256": sums}, indent=1) + "\n")


def _is_covered(path: PurePath) -> bool:
    """Returns whether checksums.json covers a file. Tensorstore verifies those in `d` folders."""
    return "d" not in path.parts[:-1] and path.name not in UNCOVERED


def damaged_files(step: Path, items: Sequence[str] = ()) -> list[str]:
    """Returns a line for each damaged file of a step, without reading the data of its arrays.

    Each calling process checks the files shared by all, and its share of the per-process files.

    Args:
        items: the items to check; by default the whole step.

    Raises:
        FileNotFoundError: the step has no checksums because an older version wrote it.
    """
    try:
        sums = json.loads((step / CHECKSUMS).read_text())["sha256"].items()
    except FileNotFoundError:
        if any(_has_checksums(item) for item in step.iterdir() if item.is_dir()):
            return [f"{step / CHECKSUMS} is missing"]
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{step / CHECKSUMS} is damaged ({one_line(error)})"]
    problems = []
    for number, (name, expected) in enumerate(sorted(sums)):
        parts = Path(name).parts
        if items and (len(parts) < 2 or parts[0] not in items):
            continue
        by_process = len(parts) > 2
        if by_process and number % jax.process_count() != jax.process_index():
            continue
        try:
            found = hashlib.sha256((step / name).read_bytes()).hexdigest()
        except OSError as error:
            problems.append(f"{step / name}: {error.strerror}")
            continue
        if found != expected:
            problems.append(f"{step / name} is damaged (checksum mismatch)")
    return problems


def check_files(step: Path, items: Sequence[str]) -> None:
    """Checks the files of some items of a step. Warns if the step has no checksums.

    Raises:
        UserError: a file is damaged.
    """
    try:
        problems = damaged_files(step, items)
    except FileNotFoundError:
        warn_unverified(step)
        return
    if problems:
        raise UserError(
            f"{'; '.join(problems)}: see emu-jax checkpoint verify {step.parent}, and use another "
            "step or copy"
        )


_warned: set[Path] = set()


def warn_unverified(step: Path) -> None:
    """Warns, once for each step, that it cannot be verified."""
    if step not in _warned:
        _warned.add(step)
        _log.warning("%s has no checksums (an older version wrote it): read unverified", step)


def _database(item: Path, context: ts.Context) -> Any:
    spec = {"driver": "ocdbt", "base": kvstore(item), "cache_pool": "cache_pool#ocdbt"}
    return ts.KvStore.open(spec, context=context).result()


def _array_names(keys: Sequence[bytes]) -> dict[str, str]:
    """Returns {array name: its driver, zarr or zarr3}."""
    drivers = {".zarray": "zarr", "zarr.json": "zarr3"}
    split = [key.decode().rpartition("/") for key in keys]
    return {name: drivers[last] for name, _, last in split if last in drivers}


def _names_by_metadata(item: Path) -> dict[str, str]:
    """Returns {array name: its driver} from orbax's metadata, which has one entry per array.

    Listing the database takes longer: it has a key for each chunk, and more hosts write more.

    Raises:
        OSError, ValueError, LookupError, TypeError or AttributeError: the metadata is missing or
            damaged.
    """
    metadata = json.loads((item / "_METADATA").read_bytes())
    driver = "zarr3" if metadata["use_zarr3"] else "zarr"
    return {
        ".".join(str(key["key"]) for key in leaf["key_metadata"]): driver
        for leaf in metadata["tree_metadata"].values()
        if not leaf["value_metadata"]["skip_deserialize"]
    }


def _has_checksums(item: Path) -> bool:
    """Returns whether an item's arrays carry checksums."""
    try:
        database = _database(item, ts.Context(_CONTEXT))
        names = _array_names(database.list().result())
        name = next(name for name, driver in names.items() if driver == "zarr3")
        codecs = json.loads(database.read(f"{name}/zarr.json").result().value)["codecs"]
    except Exception:  # no arrays, or damaged ones: reading them reports the damage
        return False
    return "crc32c" in json.dumps(codecs)


def unreadable_arrays(
    item: Path, index: int = 0, count: int = 1, progress: Callable[[int], None] | None = None
) -> Iterator[str]:
    """Reads every array of an item (DIR/step/item) and yields a line for each read that fails.

    Reads 64 MiB at a time, or a single chunk if it is larger. Takes twice that memory.

    Args:
        index, count: read share `index` of `count` shares of the chunks.
        progress: called with the size in bytes of each chunk that has been read.
    """
    context = ts.Context(_CONTEXT)
    try:
        if count > 1:
            names = _names_by_metadata(item)
        else:
            names = _array_names(_database(item, context).list().result())
    except Exception as error:
        yield f"{item}: {one_line(error)}"
        return
    if not names:
        yield f"{item} holds no arrays"
        return
    pending: deque[tuple[str, int, Any]] = deque()
    ahead = 0  # pending bytes

    def finish_oldest() -> Iterator[str]:
        nonlocal ahead
        name, size, read = pending.popleft()
        ahead -= size
        try:
            chunk = read.result()
        except Exception as error:
            yield f"{item}: {name}: {one_line(error)}"
        else:
            if progress is not None:
                progress(chunk.nbytes)

    number = 0  # chunks of the arrays before this one
    for name, driver in sorted(names.items()):
        store = {
            "driver": "ocdbt",
            "base": kvstore(item),
            "path": f"{name}/",
            "cache_pool": "cache_pool#ocdbt",
        }
        spec = {
            "driver": driver,
            "kvstore": store,
            "fill_missing_data_reads": False,
            # The cache is as old as this call. Otherwise each read asks for the manifest again.
            "recheck_cached_metadata": False,
            "recheck_cached_data": False,
        }
        try:
            array = ts.open(spec, context=context, open=True, read=True).result()
        except Exception as error:
            yield f"{item}: {name}: {one_line(error)}"
            continue
        chunk = [size or 1 for size in array.chunk_layout.read_chunk.shape or ()]
        grid = [-(-size // step) for size, step in zip(array.shape, chunk, strict=True)]
        chunks = math.prod(grid)
        for position in range((index - number) % count, chunks, count):
            place = np.unravel_index(position, grid)
            start = [int(n) * c for n, c in zip(place, chunk, strict=True)]
            ends = [min(a + c, n) for a, c, n in zip(start, chunk, array.shape, strict=True)]
            part = array[tuple(slice(a, b) for a, b in zip(start, ends, strict=True))]
            size = part.size * part.dtype.numpy_dtype.itemsize
            while pending and ahead + size > _BYTES_AHEAD:
                yield from finish_oldest()
            pending.append((name, size, part.read()))
            ahead += size
        number += chunks
    while pending:
        yield from finish_oldest()


def items_of(step: Path) -> list[str]:
    """Returns the names of a step's items that hold arrays, sorted."""
    return sorted(p.parent.name for p in step.glob("*/_METADATA"))


def one_line(error: BaseException) -> str:
    """Returns one line that says what went wrong.

    A storage error lists all layers that it passed through. If it contains a message or error code
    of the operating system, only that message is returned.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    text = str(error).splitlines()[0] if str(error) else repr(error)
    if "DATA_LOSS" in text and ("Digest mismatch" in text or "CRC-32C" in text):
        return "checksum mismatch"
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else text[:300]


@contextmanager
def quiet_failures() -> Iterator[None]:
    """Drops the tracebacks that orbax logs within this context, one in each thread that a failure
    passes through. The failure itself is raised, and reported in one line.
    """

    def is_news(record: logging.LogRecord) -> bool:
        return not _is_of_storage(record)

    absl = logging.getLogger("absl")
    absl.addFilter(is_news)
    try:
        yield
    finally:
        absl.removeFilter(is_news)


def _is_of_storage(record: logging.LogRecord) -> bool:
    """Returns whether a record has a traceback that orbax or tensorstore logged or passed on."""
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return False
    files, seen = [record.pathname], set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        files += [f.f_code.co_filename for f, _ in traceback.walk_tb(error.__traceback__)]
        error = error.__cause__ or error.__context__
    return any(not _STORAGE.isdisjoint(Path(file).parts) for file in files)
