"""Arrays derived from files once and kept beside them, mapped into memory rather than read.

An index of a billion documents is some tens of gigabytes on disk; opening it costs nothing,
and only what is looked up is ever read.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from emu_jax.data import storage
from emu_jax.data.documents import short_hash

log = logging.getLogger(__name__)
Arrays = dict[str, np.ndarray]


def folder_for(path: str, cache: str) -> Path:
    """Where what is derived from a file is kept: `cache`, or else `.emu_jax` beside it; of a
    remote file, the user's own cache."""
    if cache:
        return Path(cache)
    if storage.is_remote(path):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emu_jax"
    return Path(path).parent / ".emu_jax"


def kept(folder: Path, name: str, make: Callable[[], Arrays]) -> Arrays:
    """The arrays `folder/name/*.npy`, made and written first if they are not there whole.

    They appear at once. Where they cannot be written they are made each time.
    """
    target, damaged = folder / name, False
    try:
        if files := sorted(target.glob("*.npy")):
            return {f.stem: _mapped(f) for f in files}
    except (OSError, ValueError) as error:
        log.warning("%s is damaged, making it again: %s", target, error)
        damaged = True
    arrays = make()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=f".{name}."))
        try:
            for key, array in arrays.items():
                np.save(temporary / f"{key}.npy", array)
            os.chmod(temporary, 0o755)  # mkdtemp makes it private
            if damaged:
                shutil.rmtree(target, ignore_errors=True)
            try:
                os.rename(temporary, target)
            except OSError:
                if not any(target.glob("*.npy")):  # else another process was first
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return {key: _mapped(target / f"{key}.npy") for key in arrays}
    except (OSError, ValueError) as error:
        log.warning("cannot keep %s: %s", target, error)
        return arrays


def _mapped(file: Path) -> np.ndarray:
    # As a plain array: a look-up in a `memmap` takes four times as long.
    return np.asarray(np.load(file, mmap_mode="r"))


def fingerprint(kind: str, paths: Sequence[str]) -> str:
    """Follows from the names, sizes and times of files, and from what is made of them."""
    storage.refresh()
    with ThreadPoolExecutor(16) as pool:
        stats = list(pool.map(storage.stat, paths))
    return short_hash(
        (kind, [(os.path.basename(p), *s) for p, s in zip(paths, stats, strict=True)])
    )


def index_files(
    kind: str, paths: Sequence[str], scan: Callable[[str], Arrays], cache: str
) -> Arrays:
    """What `scan` finds in each file, one after the other, with the file's number as `file`.

    Each file's share is kept as soon as it is there, so that an interrupted scan goes on, and
    all of them together, so that a source of many files is opened by looking at one.
    """

    def share(path: str) -> Arrays:
        name = f"{os.path.basename(path)}-{fingerprint(kind, [path])}"
        return kept(folder_for(path, cache), name, lambda: scan(path))

    def together() -> Arrays:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            shares = list(pool.map(share, paths))
        counts = [len(next(iter(s.values()))) for s in shares]
        arrays = {key: np.concatenate([s[key] for s in shares]) for key in shares[0]}
        return {"file": np.repeat(np.arange(len(paths), dtype=np.int32), counts), **arrays}

    if len(paths) == 1:
        arrays = share(paths[0])
        count = len(next(iter(arrays.values())))
        return {"file": np.zeros(count, np.int32), **arrays}
    return kept(folder_for(paths[0], cache), f"{kind}-{fingerprint(kind, paths)}", together)
