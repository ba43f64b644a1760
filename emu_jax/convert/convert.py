"""Conversion: a release to a run directory, and back to the release's files or to those of
transformers, diffusers and peft.

Parameters are converted a layer at a time, each straight into its place in a file: memory does not
grow with the number of layers. A destination appears complete or not at all, because everything is
written beside it under a temporary name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from emu_jax import integrity
from emu_jax.config import save_json
from emu_jax.convert import export, tensor_files
from emu_jax.convert.checkpoint_arrays import ArrayWriter
from emu_jax.convert.source import (
    RELEASE_ALPHA,
    Merged,
    Rescaled,
    Run,
    Source,
    layers,
    open_source,
    release_layout,
    rows_of,
)
from emu_jax.convert.tables import Row
from emu_jax.convert.tensors import finishing
from emu_jax.errors import UserError
from emu_jax.filesystem import sync, sync_tree
from emu_jax.progress import BRIEF_SECONDS, ProgressBar
from emu_jax.sharding import make_mesh


def convert(
    src: Path | str,
    dst: Path | str,
    *,
    to: Literal["jax", "emu", "hf"] = "jax",
    model_config: Path | None = None,
    tokenizer: Path | None = None,
    base: Path | None = None,
    merge_lora: bool = False,
    overwrite: bool = False,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Converts a model. The kind of `src` is recognized.

    Args:
        src: a release folder, `Emu-instruct.pt`, a run directory, or a peft folder.
        dst: the destination. With `to="emu"` it may be a .pt file, if the model has no image
            decoder.
        to: "jax" for a run directory, "emu" for the release's own files, "hf" for folders that
            transformers, diffusers and peft read.
        model_config: the release's model JSON; by default `Emu.json` beside the weights.
        tokenizer: a LLaMA tokenizer folder; by default `tokenizer/` beside the weights.
        base: the model that a peft folder's adapters belong to.
        merge_lora: multiply the adapters into the kernels, in float32.
        overwrite: replace `dst` once the conversion is complete.
        mesh: the devices to use; by default all of them.

    Returns:
        A report in JSON types: sizes, seconds, the peak of anonymous memory, and `notes` on
        settings that the destination stores differently or not at all.

    Raises:
        UserError: the source is missing, damaged or not an Emu, the destination cannot express
            its model, or `dst` exists. `dst` is left unchanged.
    """
    src, dst = Path(src), Path(dst)
    if to == "jax":
        integrity.check_path(dst)
    sources = [src, *(Path(p) for p in (base, model_config, tokenizer) if p)]
    with report() as made, replacing(dst, overwrite, sources) as temporary:
        mesh = mesh or make_mesh()
        source = open_source(
            src,
            mesh,
            model_config=model_config,
            tokenizer=tokenizer,
            base=base and Path(base),
            scratch=temporary.parent,
        )
        if isinstance(source, Run) and to == "jax" and not merge_lora:
            raise UserError(f"{src} is a run directory already: use --to emu or --to hf")
        if merge_lora:
            source = Merged(source)
        notes = []
        if to == "jax":
            write_run_directory(source, temporary)
        elif to == "emu":
            lora = source.cfg.llama.lora
            if lora is not None and lora.alpha != RELEASE_ALPHA:
                source = Rescaled(source)
                notes.append(
                    f"lora_B was multiplied by {lora.alpha / RELEASE_ALPHA:g}: the release's "
                    f"alpha is {RELEASE_ALPHA:g}, this model's {lora.alpha:g}"
                )
            notes += write_release(source, temporary, dst)
        else:
            notes += export.write_hf(source, temporary, progress)
        made |= describe(source) | {"notes": notes}
    return made


def describe(source: Source) -> dict[str, Any]:
    sizes = {p: math.prod(s.shape) * s.dtype.itemsize for p, s in source.shapes.items()}
    return {
        "parameters": sum(math.prod(s.shape) for s in source.shapes.values()),
        "bytes": sum(sizes.values()),
        "largest_parameter_bytes": max(sizes.values()),
    }


def write_run_directory(source: Source, folder: Path) -> None:
    """Writes a run directory at step 0, in the source's dtypes.

    Its `release/` holds everything needed to restore the release's files.
    """
    if jax.process_count() > 1:
        raise UserError("convert runs on one host; what it writes restores onto any number")
    rows = rows_of(source.cfg, source.shapes)
    writer = ArrayWriter(
        folder / "0" / "params", source.shapes, {row.path for row in rows if row.stacked}
    )
    for row, layer in progress(source, rows, "writing"):
        writer.write(row.path, layer, source.read(row.path, layer))
    writer.close()
    integrity.seal(folder / "0")
    save_json(source.cfg, folder / "config.json")
    source.tokenizer.save(folder / "tokenizer")
    if source.layout is None:
        return
    kept = folder / "release"
    kept.mkdir()
    layout, dead = release_layout(source)
    layout.save(kept / "layout.json")
    writer = tensor_files.create(
        kept / "dead.safetensors", {key: (t.shape, t.dtype) for key, t in dead.items()}
    )
    with finishing(writer):
        for key, tensor in dead.items():
            writer.write(key, tensor.read())
    export.copy(layout.carried, kept / "files")


def write_release(source: Source, folder: Path, dst: Path) -> list[str]:
    """Writes the release's own files.

    Tensors return to their original dtypes unless that would lose precision: parameters that were
    trained since then stay float32.

    Returns:
        Notes on settings that the release's files do not keep.

    Raises:
        UserError: the release's code would compute another model.
    """
    layout, dead = release_layout(source)
    single = dst.suffix in (".pt", ".bin", ".pth")
    if single:
        if len(layout.tensors) > 1:
            raise UserError(f"{dst}: a model with its image decoder needs a folder, not a file")
        (name,) = layout.tensors
        layout = dataclasses.replace(
            layout,
            tensors={folder.name: layout.tensors[name]},
            carried={},
            nests={folder.name: layout.nests.get(name)},
        )
        folder = folder.parent
    cfg = source.cfg
    targets = cfg.llama.lora.targets if cfg.llama.lora else ()
    rows = {row.path: row for row in rows_of(cfg, source.shapes)}
    came = {key: dtype for keys in layout.tensors.values() for key, dtype in keys.items()}
    shapes: dict[str, tuple[int, ...]] = {key: t.shape for key, t in dead.items()}
    kept: dict[str, np.dtype] = {key: t.dtype for key, t in dead.items()}
    for row in rows.values():
        stored = source.shapes[row.path]
        for key in row.keys:
            key = layout.spelling.write(key, targets)
            shapes[key] = row.transform.release_shape(row.layer_shape(stored.shape))
            # A parameter is stored wider than it came if other layers needed it or it was trained
            # since. Reading it tells which.
            kept[key] = came[key]
    narrowed = [
        row
        for row in rows.values()
        if any(
            came[layout.spelling.write(k, targets)] != source.shapes[row.path].dtype
            for k in row.keys
        )
    ]
    # Values are read ahead because a file declares its dtypes first.
    for row, layer in progress(source, narrowed, "checking dtypes"):
        key = layout.spelling.write(row.keys[layer], targets)
        stored = source.read(row.path, layer)
        parts = (stored[i : i + 256] for i in range(0, len(stored), 256))
        if any(_loses(part, came[key]) for part in parts):
            kept[key] = source.shapes[row.path].dtype
    notes = export.check_release(source, layout, shapes)
    contents = {
        name: {key: (shapes[key], kept[key]) for key in keys}
        for name, keys in layout.tensors.items()
    }
    writer = tensor_files.ShardedWriter(contents, folder, layout.nests)
    with finishing(writer):
        for key, tensor in dead.items():
            writer.write(key, tensor.read())
        for row, layer in progress(source, list(rows.values()), "writing"):
            tensor = row.transform.to_release(source.read(row.path, layer))
            writer.write(layout.spelling.write(row.keys[layer], targets), tensor)
    if not single:
        export.copy(layout.carried, folder)
        export.complete_release(source, folder)
    return notes


def _loses(part: np.ndarray, dtype: np.dtype) -> bool:
    """Returns whether casting to another dtype changes any value."""
    return not np.array_equal(part.astype(dtype).astype(part.dtype), part)


@contextlib.contextmanager
def replacing(dst: Path, overwrite: bool, sources: Iterable[Path] = ()) -> Iterator[Path]:
    """Yields a temporary folder (or file name) beside `dst`, which replaces `dst` on success.

    Args:
        sources: the paths that are read; none of them may be replaced.

    Raises:
        UserError: `dst` exists and may not be overwritten, is or contains a source, or cannot be
            written.
    """
    single = dst.suffix in (".pt", ".bin", ".pth")
    try:
        place = dst.resolve()  # `.` has no name, and a link must not be replaced by a folder
        occupied = place.is_file() or (place.is_dir() and any(place.iterdir()))
        if occupied and not overwrite:
            raise UserError(f"{dst} exists: choose another destination, or use --overwrite")
        for source in sources:
            if source.resolve().is_relative_to(place):
                raise UserError(
                    f"{source} would be lost, since {dst} replaces it: choose another destination"
                )
        place.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}."))
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot write beside {dst}: {reason}") from None
    aside = holder / "replaced"
    try:
        temporary = holder / place.name
        if temporary == aside:
            aside = holder / "replaced.old"
        if not single:
            temporary.mkdir()
        yield temporary
        sync_tree(temporary)  # before what it replaces is removed
        try:
            if place.exists():
                place.rename(aside)
            temporary.rename(place)
            sync(place.parent)
        except BaseException:
            if aside.exists() and not place.exists():
                aside.rename(place)
            raise
    except OSError as error:
        if error.errno is None:
            raise
        culprit = str(error.filename or dst)
        if culprit.startswith(str(holder)):
            culprit = str(dst)
        verb = "write" if culprit == str(dst) else "access"
        raise UserError(f"cannot {verb} {culprit}: {os.strerror(error.errno)}") from error
    finally:
        if place.exists() or not aside.exists():  # otherwise `aside` is the only copy
            shutil.rmtree(holder, ignore_errors=True)


def progress(source: Source, rows: Sequence[Row], what: str) -> Iterator[tuple[Row, int]]:
    """Yields each row with each of its layers, and shows the progress."""
    sizes = [
        math.prod(source.shapes[row.path].shape) * source.shapes[row.path].dtype.itemsize
        for row in rows
    ]
    with ProgressBar(what, sum(sizes), "B", min_seconds=BRIEF_SECONDS) as bar:
        for row, size in zip(rows, sizes, strict=True):
            for layer in layers(row):
                yield row, layer
                bar.add(size // len(layers(row)))


@contextlib.contextmanager
def report() -> Iterator[dict[str, Any]]:
    """Measures the time and the peak anonymous memory of the code inside the context."""
    made: dict[str, Any] = {}
    done, start = threading.Event(), time.monotonic()
    peak = before = anonymous_memory()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            now = anonymous_memory()
            peak = now if peak is None else max(peak, now or 0)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield made
    finally:
        done.set()
        watcher.join()
        made["seconds"] = round(time.monotonic() - start, 3)
        made["peak_rss_anon_bytes"] = peak
        made["rss_anon_bytes_before"] = before


def anonymous_memory() -> int | None:
    """Returns the bytes of this process's memory that no file backs, or None on systems other
    than Linux."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.M)
    return int(found[1]) * 1024 if found else None
