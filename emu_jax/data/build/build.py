"""`emu-jax data build`: converts any source to ArrayRecord shards for training.

    DST/build.json                         the config and the source of the build
    DST/NAME-00003-of-00008.array_record   the documents kept of one range of the source
    DST/NAME-00003-of-00008.json           its counts, and the parts left out; written after it
    DST/NAME-00003-of-00008.lengths.npz    with `tokenizer`: token counts (`known_lengths.py`)
    DST/NAME-00003-of-00008.keys.npy       with `clean.duplicate_key`: a hash for each document, and
    DST/NAME-00003-of-00008.repeats.npy    whether an earlier document has it
    DST/rejected.jsonl                     all parts that were left out, one a line
    DST/manifest.json                      total counts; written once every shard is complete

A shard is a function of the source and the config alone. Any number of workers, in any order,
killed and restarted, write the same bytes. A shard is not built again if its counts exist and its
size matches them.
"""

from __future__ import annotations

import collections
import dataclasses
import fcntl
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL

from emu_jax.config import to_dict
from emu_jax.data import storage
from emu_jax.data.build import runners
from emu_jax.data.build.clean import CleanConfig, Cleaned, Unfit, check_metadata, clean
from emu_jax.data.config import DataConfig
from emu_jax.data.documents import (
    Damaged,
    Document,
    DocumentFiles,
    Image,
    Source,
    Text,
    check_size,
    write_documents,
)
from emu_jax.data.known_lengths import KnownLengths, save_lengths
from emu_jax.data.lengths import part_lengths
from emu_jax.data.sources import SourceConfig, open_source
from emu_jax.data.sources.entries import look_up
from emu_jax.data.sources.tars import hashed
from emu_jax.data.unused import Tally, current_reason, current_reasons
from emu_jax.errors import UserError
from emu_jax.progress import ProgressBar
from emu_jax.tokenizer import Tokenizer

log = logging.getLogger(__name__)
A = TypeVar("A")
B = TypeVar("B")

_VERSION = 1  # of the layout of a built folder
_EXAMPLES = 1000  # entries of parts left out that are kept, as examples for an error message


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    """Config of a build. It and the source alone determine the bytes that are written."""

    source: SourceConfig = SourceConfig()
    clean: CleanConfig = CleanConfig()
    shard_documents: int = 4096  # documents of the source for each shard
    # Folder of a tokenizer that counts the tokens of the documents written, so that training need
    # not; instruct and family as in the training's data config.
    tokenizer: str = ""
    instruct: bool = False
    family: str = ""

    def load_tokenizer(self) -> Tokenizer | None:
        """Returns the tokenizer that training will use, or None if tokens are not counted."""
        if not self.tokenizer:
            return None
        names = ("tokenizer", "instruct", "family")
        return DataConfig(**{name: getattr(self, name) for name in names}).load_tokenizer()


@dataclasses.dataclass(frozen=True)
class Shard:
    """A unit of work, for any machine that sees the same paths."""

    cfg: BuildConfig
    fingerprint: str  # of the source
    folder: str
    number: int
    count: int
    documents: range  # of the source
    only_keys: bool = False  # write the keys of the documents instead, to find duplicates

    @property
    def path(self) -> str:
        return self._file("array_record")

    @property
    def entry(self) -> str:
        """Path of the JSON file with the shard's counts."""
        return self._file("json")

    @property
    def keys(self) -> str:
        """Path of the hashes of the documents' keys, uint64; 0 is none."""
        return self._file("keys.npy")

    @property
    def repeats(self) -> str:
        """Path of the flags of documents whose key an earlier one has, bool."""
        return self._file("repeats.npy")

    def _file(self, kind: str) -> str:
        name = f"{self.cfg.source.name}-{self.number:05d}-of-{self.count:05d}.{kind}"
        return storage.resolve(self.folder, name)


@dataclasses.dataclass(frozen=True)
class DocumentCounts:
    """Numbers of documents: read from the source, written, and rejected by reason."""

    read: int
    written: int
    rejected: dict[str, int]


@dataclasses.dataclass(frozen=True)
class ImageCounts:
    """Numbers of images: read from the source, written, encoded anew, and dropped by reason."""

    read: int
    written: int
    encoded: int
    dropped: dict[str, int]


@dataclasses.dataclass(frozen=True)
class TextCounts:
    """Number of texts that were written."""

    written: int


@dataclasses.dataclass(frozen=True)
class ShardFile:
    """A file of documents: its name, its size and its SHA-256."""

    file: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A complete build: the content of `manifest.json`.

    Attributes:
        version: of the layout of a built folder.
        config: of the build.
        paired: required in a `SourceConfig` of these files.
        unused: numbers of parts that the source's reader left out, by reason.
        bytes: size of all shards.
        shards: the files, in the order of the source.
    """

    version: int
    config: BuildConfig
    paired: bool
    documents: DocumentCounts
    images: ImageCounts
    texts: TextCounts
    unused: dict[str, int]
    bytes: int
    shards: tuple[ShardFile, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the keys of `manifest.json`."""
        return to_dict(self)


ShardRunner = runners.Runner[Shard]


def build(folder: str | os.PathLike, cfg: BuildConfig, runner: ShardRunner) -> Manifest:
    """Builds the missing shards, and writes the manifest.

    Raises:
        UserError: the source or the tokenizer cannot be opened or read, `folder` holds something
            else, or another process is building there.
    """
    folder = os.fspath(folder)
    tokenizer, source = cfg.load_tokenizer(), open_source(cfg.source)
    shards = _split(folder, cfg, source)
    if not storage.is_remote(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _claim(folder, cfg, source, tokenizer)
        missing = [shard for shard in shards if not _is_whole(shard)]
        if len(missing) < len(shards):
            log.info("%d of %d shards are there already", len(shards) - len(missing), len(shards))
        if cfg.clean.duplicate_key and missing:
            _find_repeats(shards, runner)
        left = sum(len(shard.documents) for shard in missing)
        done = len(source) - left
        with ProgressBar(cfg.source.name, len(source), "document", done=done) as progress:
            for shard in runner(missing) if missing else ():
                progress.add(len(shard.documents))
        return _finish(folder, cfg, source, shards)


def build_shard(shard: Shard, threads: int = 1) -> Shard:
    """Builds one shard, or writes its keys; the whole work of a worker, with any runner.

    Raises:
        UserError: the source cannot be read, or has changed since the shards were planned.
    """
    source, cfg = _source(shard.cfg.source, shard.fingerprint), shard.cfg.clean
    tokenizer = _tokenizer(shard.cfg)
    if shard.only_keys:
        keys = _map(functools.partial(_key, source, cfg), shard.documents, threads)
        _write_array(shard.keys, np.array(list(keys), np.uint64))
        return shard
    tally = _Tally()
    lengths: list[list[int]] = []  # of the documents written
    repeats = _read_array(shard.repeats) if cfg.duplicate_key else np.zeros(0, bool)
    repeated = {shard.documents[n] for n in np.flatnonzero(repeats)}

    def documents() -> Iterator[Document]:
        read = functools.partial(_cleaned, source, cfg, repeated)
        for index, cleaned in _map(read, shard.documents, threads):
            tally.add(index, source.where(index), cleaned)
            if cleaned.document is not None:
                if tokenizer is not None:
                    lengths.append(part_lengths(cleaned.document, tokenizer))
                yield cleaned.document

    write_documents(shard.path, documents())
    content = storage.read(shard.path)
    if tokenizer is not None:
        known = KnownLengths(
            np.array(list(map(len, lengths)), np.int32),
            np.array(list(itertools.chain.from_iterable(lengths)), np.int32),
        )
        save_lengths(shard.path, len(content), tokenizer.fingerprint, known)
    file = {
        "file": os.path.basename(shard.path),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    entry = file | {"counts": tally.counts, "left_out": tally.left_out}
    _write(shard.entry, [json.dumps(entry)])
    return shard


# Runners


def embedded(workers: int, threads: int = 1) -> ShardRunner:
    """Returns a runner that uses processes on this machine. The threads of each process overlap
    reading with decoding, for which Pillow and PyAV release the GIL."""
    return runners.on_processes(functools.partial(build_shard, threads=threads), workers)


def beam_runner(options: Sequence[str], threads: int = 1) -> ShardRunner:
    """Returns a runner that uses Apache Beam; see `runners.on_beam`.

    Raises:
        UserError: Beam is not installed, or (when run) the pipeline failed.
    """
    return runners.on_beam(functools.partial(build_shard, threads=threads), options)


# The work and its pieces


def _split(folder: str, cfg: BuildConfig, source: Source) -> list[Shard]:
    if not re.fullmatch(r"\w[\w.-]*", cfg.source.name):
        raise UserError(
            f"the source's name is used in file names, and {cfg.source.name!r} cannot be one: "
            "use letters, digits, '_', '-' and '.'"
        )
    if cfg.shard_documents < 1:
        raise UserError(f"a shard must hold at least 1 document, not {cfg.shard_documents}")
    if not len(source):
        raise UserError(f"source {cfg.source.name!r} has no documents")
    starts = range(0, len(source), cfg.shard_documents)
    return [
        Shard(
            cfg,
            source.fingerprint,
            folder,
            number,
            len(starts),
            range(start, min(start + cfg.shard_documents, len(source))),
        )
        for number, start in enumerate(starts)
    ]


def _claim(folder: str, cfg: BuildConfig, source: Source, tokenizer: Tokenizer | None) -> None:
    """Writes `build.json`, or checks that `folder` was begun with the same build.

    Raises:
        UserError: `folder` holds something else, or its `build.json` is damaged.
    """
    ours = {
        "version": _VERSION,
        "pillow": PIL.__version__,  # decides the bytes of encoded images
        "source_files": source.fingerprint,
        **to_dict(cfg),
    }
    if tokenizer is not None:
        ours["tokenizer_files"] = tokenizer.fingerprint
    # Records say which images are frames, so earlier versions built the same from them.
    if source.videos and not isinstance(source, DocumentFiles):
        ours["frames"] = True
    path = storage.resolve(folder, "build.json")
    fix = "give an empty folder, or remove this one"
    _sweep(folder, cfg.source.name)
    if not storage.exists(path):
        if storage.names(folder):
            raise UserError(f"{folder} is not empty and holds no build: {fix}")
        _write(path, [json.dumps(ours, indent=1)])
        return
    try:
        existing = json.loads(storage.read(path))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove {folder}") from None
    if isinstance(existing, dict):
        existing = _with_defaults(existing, to_dict(BuildConfig()))
        if not source.videos:  # an earlier version did not look whether dialogues have any
            existing.pop("frames", None)
        if {**existing, "frames": True} == ours != existing:
            raise UserError(
                f"{folder} was built by an earlier version, which did not mark video frames: "
                "build it again into an empty directory"
            )
    if existing != ours:
        key, old, new = _difference(existing, ours)
        raise UserError(f"{folder} holds another build, of {key} {old} rather than {new}: {fix}")


def _with_defaults(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Adds the keys that a config did not have yet when an earlier version wrote it."""
    filled = {
        key: _with_defaults(values[key], default)
        if isinstance(default, dict) and isinstance(values.get(key), dict)
        else values.get(key, default)
        for key, default in defaults.items()
    }
    return {**values, **filled}


def _difference(existing: Any, ours: Any, key: str = "") -> tuple[str, Any, Any]:
    """Returns (dotted key, its two values) of the first difference."""
    if isinstance(existing, dict) and isinstance(ours, dict):
        for name in {**ours, **existing}:
            old, new = existing.get(name), ours.get(name)
            if old != new:
                return _difference(old, new, f"{key}.{name}".lstrip("."))
    return key, existing, ours


def _is_whole(shard: Shard) -> bool:
    try:
        entry = json.loads(storage.read(shard.entry))
        return entry["bytes"] == storage.stat(shard.path).size
    except (OSError, ValueError, KeyError):  # missing, or truncated by a crash
        return False


def _finish(folder: str, cfg: BuildConfig, source: Source, shards: Sequence[Shard]) -> Manifest:
    """Sums the counts of the shards, and writes the manifest.

    Raises:
        UserError: the shards hold no document, or lack a kind of part.
    """
    total = _Tally()
    files: list[ShardFile] = []

    def left_out() -> Iterator[str]:
        for shard in shards:
            entry = _read_entry(shard.entry)
            total.merge(entry["counts"])
            total.left_out += entry["left_out"] if len(total.left_out) < _EXAMPLES else []
            files.append(ShardFile(entry["file"], entry["bytes"], entry["sha256"]))
            yield from map(json.dumps, entry["left_out"])

    total.merge({"unused": source.unused().unused})
    rejected = storage.resolve(folder, "rejected.jsonl")
    _write(rejected, left_out())
    try:
        total.check(cfg.source.allow_missing)
    except UserError as error:
        raise UserError(f"source {cfg.source.name!r}: {error}; {rejected} lists them") from None
    manifest = Manifest(
        version=_VERSION,
        config=cfg,
        paired=source.paired,
        documents=DocumentCounts(**total.counts["documents"]),
        images=ImageCounts(**total.counts["images"]),
        texts=TextCounts(**total.counts["texts"]),
        unused=total.counts["unused"],
        bytes=sum(file.bytes for file in files),
        shards=tuple(files),
    )
    _write(storage.resolve(folder, "manifest.json"), [json.dumps(manifest.to_json(), indent=1)])
    _sweep(folder, cfg.source.name)
    return manifest


def _read_entry(path: str) -> dict[str, Any]:
    """Reads what was counted and left out of a shard, also if an earlier version wrote it."""
    entry = json.loads(storage.read(path))
    counts = entry["counts"]
    if "pictures" in counts:
        counts["images"] = counts.pop("pictures")
    for group, key in (("documents", "rejected"), ("images", "dropped")):
        counts[group][key] = current_reasons(counts[group][key])
    for line in entry["left_out"]:
        if "picture" in line:
            line["image"] = line.pop("picture")
        if "reason" in line:
            line["reason"] = current_reason(line["reason"])
    return entry


def _sweep(folder: str, name: str) -> None:
    """Removes temporary files of interrupted writes; remote writes leave none."""
    if storage.is_remote(folder):
        return
    for written in (f"{name}-*", "build.json", "rejected.jsonl", "manifest.json"):
        for path in Path(folder).glob(f".{written}.*"):
            path.unlink(missing_ok=True)


@contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Locks a local folder against other processes; the system releases it if this one dies."""
    if storage.is_remote(folder):
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is building in {folder}: wait for it") from None
        except OSError as error:  # not every network file system supports locks
            log.warning("cannot lock %s (%s): let no other process build there", folder, error)
        yield
    finally:
        os.close(handle)


# Within a shard


@functools.lru_cache(2)
def _tokenizer(cfg: BuildConfig) -> Tokenizer | None:
    return cfg.load_tokenizer()


@functools.lru_cache(4)
def _source(cfg: SourceConfig, fingerprint: str) -> Source:
    source = open_source(cfg)
    if source.fingerprint != fingerprint:
        raise UserError(f"source {cfg.name!r} is not the same here as where the build was started")
    return source


def _cleaned(
    source: Source, cfg: CleanConfig, repeated: Collection[int], index: int
) -> tuple[int, Cleaned]:
    try:
        if cfg.reads_metadata:
            check_metadata(source.metadata(index), cfg)
        if index in repeated:
            raise Unfit("duplicate")
        document = source[index]
        check_size(document, source.where(index))
        return index, clean(document, cfg)
    except Damaged as error:
        return index, Cleaned(None, error.reason, str(error))
    except Unfit as error:
        return index, Cleaned(None, error.reason, error.detail)


def _key(source: Source, cfg: CleanConfig, index: int) -> np.uint64:
    """Returns the hash of a document's key; 0 if it has none or fails a filter by metadata."""
    try:
        metadata = source.metadata(index)
        check_metadata(metadata, cfg)
    except (Damaged, Unfit):
        return np.uint64(0)
    value = look_up(metadata, cfg.duplicate_key)
    return np.uint64(0) if value is None else hashed(str(value))


def _find_repeats(shards: Sequence[Shard], runner: ShardRunner) -> None:
    """Writes which documents of each shard have the key of an earlier document of the source.

    Holds about 32 bytes a document in memory.
    """
    missing = [
        dataclasses.replace(shard, only_keys=True)
        for shard in shards
        if not storage.exists(shard.keys)
    ]
    total = sum(len(shard.documents) for shard in missing)
    with ProgressBar(f"{shards[0].cfg.source.name}: keys", total, "document") as progress:
        for shard in runner(missing) if missing else ():
            progress.add(len(shard.documents))
    with ThreadPoolExecutor(storage.THREADS) as pool:
        keys = np.concatenate(list(pool.map(lambda shard: _read_array(shard.keys), shards)))
        _, firsts = np.unique(keys, return_index=True)
        repeats = keys != 0
        repeats[firsts] = False
        shares = [repeats[shard.documents.start : shard.documents.stop] for shard in shards]
        list(pool.map(lambda shard, share: _write_array(shard.repeats, share), shards, shares))


def _read_array(path: str) -> np.ndarray:
    try:
        content = io.BytesIO(storage.read(path))
        with storage.NUMPY_HEADERS:
            return np.load(content)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it and run the build again") from None


def _write_array(path: str, array: np.ndarray) -> None:
    with storage.writing_data_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def _map(function: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """Maps a function over items on threads, in order, never far ahead of the consumer."""
    if threads <= 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        ahead: collections.deque[Future[B]] = collections.deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class _Tally:
    """Counts kept and rejected documents and images, and lists the parts left out."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, Any]] = {
            "documents": {"read": 0, "written": 0, "rejected": {}},
            "images": {"read": 0, "written": 0, "encoded": 0, "dropped": {}},
            "texts": {"written": 0},
            "unused": {},  # parts that readers left out, by reason
        }
        self.left_out: list[dict[str, Any]] = []

    def add(self, index: int, where: str, cleaned: Cleaned) -> None:
        parts = cleaned.document.parts if cleaned.document else ()
        origin = {"document": index, "where": where}
        if cleaned.document is None:
            reason = {"reason": cleaned.reason, "detail": cleaned.detail}
            self.left_out.append(origin | reason)
        else:
            self.left_out += [
                origin | {"image": drop.part, "reason": drop.reason, "detail": drop.detail}
                for drop in cleaned.dropped
            ]
        self.left_out += [
            origin | {"unused": unused.reason, "detail": unused.detail} for unused in cleaned.unused
        ]
        self.merge(
            {
                "documents": {
                    "read": 1,
                    "written": int(cleaned.document is not None),
                    "rejected": {cleaned.reason: 1} if cleaned.document is None else {},
                },
                "images": {
                    "read": cleaned.images,
                    "written": sum(isinstance(part, Image) for part in parts),
                    "encoded": cleaned.encoded,
                    "dropped": dict(collections.Counter(drop.reason for drop in cleaned.dropped)),
                },
                "texts": {"written": sum(isinstance(part, Text) for part in parts)},
                "unused": dict(collections.Counter(unused.reason for unused in cleaned.unused)),
            }
        )

    def merge(self, counts: dict[str, dict[str, Any]]) -> None:
        for group, values in counts.items():
            for name, value in values.items():
                mine = self.counts[group]
                if isinstance(value, dict):
                    summed = collections.Counter(mine[name]) + collections.Counter(value)
                    mine[name] = dict(sorted(summed.items()))
                else:
                    mine[name] = mine.get(name, 0) + value

    def check(self, allowed: Collection[str]) -> None:
        """Refuses a build that lost a whole kind of part.

        Raises:
            UserError: no document was written, or no part of a kind that is not `allowed` to be
                missing. The message counts the reasons.
        """
        counts = self.counts
        tally = Tally(
            {
                "documents": counts["documents"]["written"],
                "images": counts["images"]["written"],
                "texts": counts["texts"]["written"],
            }
        )
        rejected, dropped = counts["documents"]["rejected"], counts["images"]["dropped"]
        # A document that loses its last image is rejected for the same reason.
        lost = collections.Counter(rejected) | collections.Counter(dropped)
        for reasons in (lost, counts["unused"]):
            for reason, count in reasons.items():
                tally.leave(reason, count)
        for line in self.left_out:
            detail = str(line["detail"])
            at = "" if detail.startswith(line["where"]) else f"{line['where']}: "
            tally.example(line.get("unused") or line["reason"], f"{at}{detail}".rstrip(": "))
        tally.check(allowed)


def _write(path: str, lines: Iterable[str]) -> None:
    with (
        storage.writing_data_file(path) as temporary,
        temporary.open("w", encoding="utf-8") as file,
    ):
        file.writelines(f"{line}\n" for line in lines)
