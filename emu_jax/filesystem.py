"""Local files: shipped folders, JSON, atomic writes, syncing to disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError


def shipped(folder: str) -> Path:
    """Returns a top-level folder of the repository (configs, benchmarks), or its copy in the wheel.

    Raises:
        UserError: the folder is missing.
    """
    package = Path(__file__).parent
    checkout = (package.parent / "pyproject.toml").is_file()
    place = (package.parent if checkout else package) / folder
    if not place.is_dir():
        raise UserError(f"{place} is missing: reinstall emu_jax, or run it from a clone")
    return place


def refuse_stand_in(path: Path) -> None:
    """Checks that a file is not a stand-in for the intended one.

    Raises:
        UserError: the file is a Git LFS pointer, a web page, or compressed.
    """
    try:
        with path.open("rb") as f:
            start = f.read(64)
    except OSError:
        return  # the code that reads the file reports it
    for known, what in (
        (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run git lfs pull"),
        (b"<!doctype html", "a web page, not the file itself: download it again"),
        (b"<html", "a web page, not the file itself: download it again"),
        (b"\x1f\x8b", "compressed with gzip: unpack it"),
        (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it"),
        (b"\xfd7zXZ", "compressed with xz: unpack it"),
    ):
        if start.lstrip().lower().startswith(known.lower()):
            raise UserError(f"{path} is {what}")


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object, with or without a byte order mark.

    Raises:
        UserError: the file is missing, is not JSON, or does not hold an object.
    """
    refuse_stand_in(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values


@contextlib.contextmanager
def writing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yields a path for a temporary file or directory, which replaces `path` on success.

    The write is atomic and durable: `path` has the whole new content or is as before, even after
    a power cut.

    Args:
        shared: whether several processes may write `path` at once. Each then has a temporary name
            of its own. Otherwise there is one name, and what a killed process left is overwritten.
    """
    temporary = temporary_path(path, shared=shared)
    _remove(temporary)
    try:
        yield temporary
        publish(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            _remove(temporary)
        raise


def temporary_path(path: Path, *, shared: bool = False) -> Path:
    """Returns the temporary name beside `path` (see `writing`)."""
    token = f".{secrets.token_hex(4)}" if shared else ""
    return path.with_name(f".{path.name}{token}.tmp")


def publish(temporary: Path, path: Path) -> None:
    """Renames a finished file or directory to `path` durably."""
    sync_tree(temporary)
    temporary.rename(path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a whole file atomically and durably."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: str | os.PathLike) -> None:
    """Waits until a local file's content, or a directory's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems cannot sync directories
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_tree(path: Path) -> None:
    """Waits until a local file, or everything in a directory, is on disk."""
    if not path.is_dir():
        sync(path)
    for folder, _, names in os.walk(path):
        for name in names:
            sync(os.path.join(folder, name))
        sync(folder)
