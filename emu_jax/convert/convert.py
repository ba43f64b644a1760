"""Conversion: a release to a run directory, and back to the release's files or to those of
transformers, diffusers and peft.

Parameters are converted a layer at a time, and each is written to its place in a file, so memory
does not grow with the number of layers. A destination appears complete or not at all, because
everything is written beside it under a temporary name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from emu_jax import checkpoint, integrity
from emu_jax.config import save_json
from emu_jax.convert import export, tensor_files
from emu_jax.convert.checkpoint_arrays import ArrayWriter
from emu_jax.convert.layouts import LayoutKind
from emu_jax.convert.source import (
    RELEASE_ALPHA,
    UNUSED_FILE,
    MergedSource,
    ModelSource,
    RescaledSource,
    RunSource,
    each_layer,
    open_model_source,
    parameter_bytes,
    release_layout,
    rows_of,
)
from emu_jax.convert.tensors import finishing
from emu_jax.convert.torch_format import TORCH_SUFFIXES
from emu_jax.errors import UserError
from emu_jax.host_memory import PeakMemory
from emu_jax.hub import download_snapshot, is_hub, naming_addresses, record_sources
from emu_jax.models import quantized
from emu_jax.models.quantized import Quantization, check_quantization, is_quantized
from emu_jax.sharding import make_mesh
from emu_jax.storage import StorePath, as_path, remove, sync, sync_tree, upload

Target = Literal["jax", "emu", "hf"]


@dataclasses.dataclass(kw_only=True)
class ResourceUsage:
    """The time and memory of a piece of work, filled in when it ends.

    Attributes:
        peak_rss_anon_bytes: the most anonymous memory during the work (None: unknown).
        rss_anon_bytes_before: the anonymous memory before it (None: unknown).
    """

    seconds: float = 0.0
    peak_rss_anon_bytes: int | None = None
    rss_anon_bytes_before: int | None = None


@dataclasses.dataclass(kw_only=True)
class ConversionReport(ResourceUsage):
    """The size of a converted model and the cost of its conversion. All fields have JSON types.

    Attributes:
        notes: settings that the destination stores differently or not at all.
    """

    parameters: int
    bytes: int
    largest_parameter_bytes: int
    notes: list[str]


def convert(
    src: Path | str,
    dst: Path | str,
    *,
    to: Target = "jax",
    model_config: Path | None = None,
    tokenizer: Path | None = None,
    base: Path | None = None,
    merge_lora: bool = False,
    layout: LayoutKind | None = None,
    fast_tokenizer: bool = False,
    quantize: Quantization | None = None,
    overwrite: bool = False,
    mesh: Mesh | None = None,
) -> ConversionReport:
    """Converts a model. The kind of `src` is recognized.

    Args:
        src: a release folder, one of its native files, a run directory, or a peft folder. A
            repository on the Hub (`hf://ORG/NAME[@REV][/SUB]`) is downloaded into huggingface_hub's
            cache; the run directory records its commit in `sources.json`.
        dst: the destination. With `to="emu"` it may be a file, if the model has no image decoder
            or is an Emu2.
        to: "jax" for a run directory, "emu" for the release's own files, "hf" for folders that
            transformers, diffusers and peft read.
        model_config: the release's model JSON; by default `Emu.json` beside the weights.
        tokenizer: a LLaMA tokenizer folder; by default `tokenizer/` beside the weights.
        base: the model that a peft folder's adapters belong to.
        merge_lora: multiply the adapters into the kernels, in float32.
        layout: the layout of Emu2's files with `to="emu"`: "native" for one file, "hub" for a
            folder as on the Hub; by default the one that came.
        fast_tokenizer: keep white space next to special tokens, as `AutoTokenizer` does on the
            Hub, with `to="jax"`. The release strips it.
        quantize: keep the matrices of the language model and the visual encoder in int8 or int4,
            and those of the U-Net in int8, with `to="jax"`. Such a run directory can be used, but
            not trained or converted.
        overwrite: replace `dst` once the conversion is complete.
        mesh: the devices to use; by default all of them.

    Raises:
        UserError: the source is missing, damaged or not an Emu, the destination cannot express
            its model, `dst` exists, or the job has several processes. `dst` is left unchanged.
    """
    check_one_process()
    check_layout(to, layout)
    check_quantization(quantize)
    if quantize and to != "jax":
        raise UserError(f"--quantize is for run directories, not for --to {to}: leave one out")
    origins = {}
    if is_hub(src):
        src, origins["model"] = download_snapshot(str(src))
    src, dst = as_path(src), as_path(dst)
    copies = {Path(src): source for source in origins.values()}
    if to == "jax":
        integrity.check_path(dst)
    sources = [src, *(as_path(p) for p in (base, model_config, tokenizer) if p)]
    single_file = to == "emu" and export.is_single_file(dst)
    with (
        naming_addresses(copies),
        measured() as usage,
        replacing(dst, overwrite, sources, single_file) as temporary,
    ):
        source = open_model_source(
            src,
            mesh or make_mesh(),
            model_config=model_config,
            tokenizer=tokenizer,
            base=base and as_path(base),
            scratch=temporary.parent,
        )
        if (
            isinstance(source, RunSource)
            and to == "jax"
            and not (merge_lora or origins or quantize)
        ):
            raise UserError(f"{src} is a run directory already: use --to emu or --to hf")
        if merge_lora:
            source = MergedSource.of(source)
        if fast_tokenizer:
            source.tokenizer = source.tokenizer.as_fast()
        if quantize:
            write_run_directory(source, temporary, quantize)
            notes = []
        else:
            notes = write_model(source, temporary, dst, to, layout)
        if to == "jax":
            record_sources(temporary, origins)
    return report(source, notes, usage)


def write_model(
    source: ModelSource, folder: Path, dst: Path, to: Target, layout: LayoutKind | None = None
) -> list[str]:
    """Writes a model in one of the three formats.

    Args:
        folder: where to write: a folder, or a file if `dst` is a single file.
        dst: the destination that `folder` replaces later.
        to, layout: as for `convert`.

    Returns:
        Notes on settings that the destination stores differently or not at all.

    Raises:
        UserError: the destination cannot express the model.
    """
    if to == "jax":
        write_run_directory(source, folder)
        return []
    if to == "hf":
        return export.write_hf(source, folder)
    notes = []
    lora = source.cfg.llama.lora
    if source.cfg.family == "emu" and lora is not None and lora.alpha != RELEASE_ALPHA:
        source = RescaledSource.of(source, lora)
        notes.append(
            f"lora_B was multiplied by {lora.alpha / RELEASE_ALPHA:g}: the release's "
            f"alpha is {RELEASE_ALPHA:g}, this model's {lora.alpha:g}"
        )
    return notes + export.write_release(source, folder, dst, layout)


def check_one_process() -> None:
    """Checks that this is the only process of its job: others would write the same destination.

    Raises:
        UserError: it is not.
    """
    count = max(jax.process_count(), int(os.environ.get("JAX_NUM_PROCESSES", "1")))
    if count > 1:
        raise UserError(
            f"a conversion runs in one process, not {count} (JAX_NUM_PROCESSES): run it on one "
            "host, without that variable; its memory does not grow with the model"
        )


def check_layout(to: Target, layout: LayoutKind | None) -> None:
    """Checks that a layout is given for the release's own files alone.

    Raises:
        UserError: it is not.
    """
    if layout and to != "emu":
        raise UserError(f"--layout {layout} is for --to emu, not --to {to}: leave it out")


def report(source: ModelSource, notes: list[str], usage: ResourceUsage) -> ConversionReport:
    """Returns the report on a model that was written."""
    sizes = [parameter_bytes(shape) for shape in source.shapes.values()]
    return ConversionReport(
        parameters=sum(math.prod(shape.shape) for shape in source.shapes.values()),
        bytes=sum(sizes),
        largest_parameter_bytes=max(sizes),
        notes=notes,
        **dataclasses.asdict(usage),
    )


def write_run_directory(
    source: ModelSource, folder: Path, quantization: Quantization | None = None
) -> None:
    """Writes a run directory at step 0, in the source's dtypes or quantized.

    Its `release/` holds everything needed to restore the release's files, unless it is quantized.
    """
    rows = rows_of(source.cfg, source.shapes)
    shapes: dict[str, Any] = dict(source.shapes)
    if quantization is not None:
        for path in filter(is_quantized, source.shapes):
            matrix = jax.eval_shape(
                functools.partial(quantized.quantize, path, kind=quantization), shapes.pop(path)
            )
            shapes |= {f"{path}.values": matrix.values, f"{path}.scales": matrix.scales}
    stacked = {row.path for row in rows if row.stacked}
    stacked |= {f"{path}.{part}" for path in stacked for part in ("values", "scales")}
    arrays = ArrayWriter(folder / "0" / "params", shapes, stacked & set(shapes))
    for row, layer in each_layer(source, rows, "writing"):
        value = source.read(row.path, layer)
        if row.path in shapes:
            arrays.write(row.path, layer, value)
            continue
        assert quantization is not None
        matrix = quantized.quantize(row.path, jnp.asarray(value), quantization)
        arrays.write(f"{row.path}.values", layer, np.asarray(matrix.values))
        arrays.write(f"{row.path}.scales", layer, np.asarray(matrix.scales))
    arrays.close()
    integrity.seal(folder / "0")
    save_json(source.cfg, folder / "config.json")
    source.tokenizer.save(folder / "tokenizer")
    if source.layout is None or quantization is not None:
        return
    release = folder / "release"
    release.mkdir()
    layout, unused = release_layout(source)
    layout.save(release / "layout.json")
    writer = tensor_files.create(
        release / UNUSED_FILE, {key: (t.shape, t.dtype) for key, t in unused.items()}
    )
    with finishing(writer):
        for key, tensor in unused.items():
            writer.write(key, tensor.read())
    export.copy_files(layout.carried, release / "files")


@contextlib.contextmanager
def replacing(
    dst: Path, overwrite: bool, sources: Iterable[Path] = (), single_file: bool | None = None
) -> Iterator[Path]:
    """Yields a temporary folder (or file name) beside `dst`, which replaces `dst` on success.

    For a destination in a store it is among the system's temporary files, and uploaded at the end.

    Args:
        sources: the paths that are read; none of them may be replaced.
        single_file: whether `dst` is a file; by default its suffix tells.

    Raises:
        UserError: `dst` exists and may not be overwritten, is or contains a source, or cannot be
            written.
    """
    single_file = single_file or dst.suffix in TORCH_SUFFIXES
    if isinstance(dst, StorePath):
        with _replacing_in_store(dst, overwrite, sources, single_file=single_file) as temporary:
            yield temporary
        return
    try:
        target = dst.resolve()  # `.` has no name, and a link must not be replaced by a folder
        occupied = target.is_file() or (target.is_dir() and any(target.iterdir()))
        if occupied and not overwrite:
            raise UserError(f"{dst} exists: choose another destination, or use --overwrite")
        for source in sources:
            if source.resolve().is_relative_to(target):
                raise UserError(
                    f"{source} would be lost, since {dst} replaces it: choose another destination"
                )
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot write beside {dst}: {reason}") from None
    # Not `storage.writing`: a folder that is not empty must be moved aside before it is replaced.
    replaced = staging / "replaced"
    try:
        temporary = staging / target.name
        if temporary == replaced:
            replaced = staging / "replaced.old"
        if not single_file:
            temporary.mkdir()
        yield temporary
        sync_tree(temporary)  # before what it replaces is removed
        try:
            if target.exists():
                target.rename(replaced)
            temporary.rename(target)
            sync(target.parent)
        except BaseException:
            if replaced.exists() and not target.exists():
                replaced.rename(target)
            raise
    except OSError as error:
        if error.errno is None:
            raise
        failed_path = str(error.filename or dst)
        if failed_path.startswith(str(staging)):
            failed_path = str(dst)
        verb = "write" if failed_path == str(dst) else "access"
        raise UserError(f"cannot {verb} {failed_path}: {os.strerror(error.errno)}") from error
    finally:
        if target.exists() or not replaced.exists():  # otherwise `replaced` is the only copy
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _replacing_in_store(
    dst: StorePath, overwrite: bool, sources: Iterable[Path], *, single_file: bool
) -> Iterator[Path]:
    """Does what `replacing` does, for a store. The steps of `dst` are complete at the very end."""
    if not overwrite and dst.exists():
        raise UserError(f"{dst} exists: choose another destination, or use --overwrite")
    for source in sources:
        if source.is_relative_to(dst):
            raise UserError(
                f"{source} would be lost, since {dst} replaces it: choose another destination"
            )
    with tempfile.TemporaryDirectory(prefix="emu-jax-") as staging:
        temporary = Path(staging) / dst.name
        if not single_file:
            temporary.mkdir()
        yield temporary
        try:
            for step in checkpoint.step_folders(dst):
                (dst / str(step) / checkpoint.COMMIT_MARKER).unlink(missing_ok=True)
            remove(dst)
            upload(temporary, dst)
            for step in checkpoint.complete_steps(temporary):
                (dst / str(step) / checkpoint.COMMIT_MARKER).write_text("")
        except OSError as error:
            raise UserError(f"cannot write {dst}: {error.strerror}") from None


@contextlib.contextmanager
def measured() -> Iterator[ResourceUsage]:
    """Measures the time and the peak anonymous memory of the code inside the context."""
    usage, start = ResourceUsage(), time.monotonic()
    memory = PeakMemory()
    try:
        with memory:
            yield usage
    finally:
        usage.seconds = round(time.monotonic() - start, 3)
        usage.rss_anon_bytes_before, usage.peak_rss_anon_bytes = memory.before, memory.peak
