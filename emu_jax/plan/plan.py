"""Ahead-of-time compilation for a TPU topology, with predicted memory and step time.

libtpu's compiler runs on any x86 host, so it compiles the same program that a pod would run. The
memory is the compiler's own figure. The time is a roofline of the compiled module (`plan.hlo`,
`plan.roofline`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from emu_jax.config import from_dict, to_dict
from emu_jax.errors import UserError, suggest
from emu_jax.generate import text
from emu_jax.hardware import Topology
from emu_jax.models.kv_cache import KVCache
from emu_jax.models.llama import Llama
from emu_jax.plan import hlo
from emu_jax.plan.roofline import (
    Network,
    Operation,
    busiest,
    exposed_seconds,
    host_seconds,
    slice_seconds,
    times,
)
from emu_jax.sharding import AbstractModel, Device, spec
from emu_jax.train.config import MeshConfig, TrainConfig
from emu_jax.train.device_memory import abstract_batch, memory_by_kind, shard_bytes
from emu_jax.train.flops import train_flops
from emu_jax.train.step import Trainer, check_rows, mesh_for

log = logging.getLogger(__name__)

# Values of `--for`: a training step of the config's objective, a training step of the decoder, or
# decoding one token for each row of a batch.
PROGRAMS = ("train", "decoder", "generate")
# The flags for all TPUs in launch/flags.sh without which the compiler may crash.
SAFE: dict[str, str | bool] = {"xla_tpu_nested_dot_fusion": False, "xla_tpu_dot_dot_fusion": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The memory of a program on a topology. If this is all, the compiler ran out of memory.

    Attributes:
        devices: JAX devices; a chip may be two.
        mesh: {axis: ways}.
        remat: {tower: policy}.
        rows: rows of a global batch.
        accumulate: microbatches of a step.
        model_flops: FLOPs of a step, as `train.flops` counts them.
        hbm_bytes, hbm_limit_bytes: memory of one device: used by the program, and available.
        hbm_by_kind: bytes of one device: parameters, optimizer, batch, activations (kept for the
            backward pass), temporaries, and the cache of a decode step.
        collective_bytes: {mesh axes: {kind of collective: bytes of one step}}.
        compile_seconds: time to compile here.
    """

    program: str
    topology: str
    slices: int
    chips: int
    devices: int
    mesh: dict[str, int]
    remat: dict[str, str]
    rows: int
    rows_per_chip: float
    accumulate: int = 1
    model_flops: float
    hbm_limit_bytes: float
    fits: bool
    hbm_bytes: float
    hbm_by_kind: dict[str, float]
    collective_bytes: dict[str, dict[str, float]]
    compile_seconds: float

    def to_json(self) -> dict[str, Any]:
        """Returns the keys of `emu-jax plan --json`. Bounds that are not known are None."""
        return dict.fromkeys(BOUNDS) | to_dict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Report:
        """Parses the output of `to_json`. Other keys are ignored.

        Raises:
            UserError: a key is missing, or a value has the wrong type.
        """
        cls = CompiledReport if "seconds" in values else Report
        fields = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(cls)}
        if missing := [name for name, needed in fields.items() if needed and name not in values]:
            raise UserError(f"a report has no {missing[0]!r}: compile it again")
        return from_dict(cls, {name: values[name] for name in fields if name in values})


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledReport(Report):
    """The memory and the time of a compiled program.

    Attributes:
        step_seconds_overlap: lower bound on the time of a step, with everything overlapped.
        step_seconds_serial: the bound with nothing overlapped.
        step_seconds_scheduled: the bound in which collectives overlap what the compiler scheduled
            beside them. None in reports of earlier versions.
        mfu_overlap, mfu_serial, mfu_scheduled, tokens_per_second_overlap: at these bounds.
        tokens_per_second: at the serial bound.
        host_bytes: temporaries in host memory.
        device_flops, hbm_traffic_bytes: of one device and step.
        device_int8_flops, device_fp8_flops: of `device_flops`, those of operands in 8 bits.
        seconds: the fields of `roofline.Times`.
        collective_seconds: {mesh axes: {kind of collective: seconds on the network}}.
        exposed_seconds: of these, the seconds that instructions wait in the compiler's schedule.
        busiest: the operations that take most of the serial bound.
        compiler_seconds: the compiler's own estimate, if it gives one.
        not_counted: parts of the program whose cost is unknown.
    """

    step_seconds_overlap: float
    step_seconds_serial: float
    step_seconds_scheduled: float | None = None
    mfu_scheduled: float | None = None
    mfu_overlap: float
    mfu_serial: float
    tokens_per_second: float
    tokens_per_second_overlap: float
    host_bytes: float
    device_flops: float
    device_int8_flops: float = 0.0
    device_fp8_flops: float = 0.0
    hbm_traffic_bytes: float
    seconds: dict[str, float]
    collective_seconds: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    exposed_seconds: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    busiest: tuple[Operation, ...]
    compiler_seconds: float | None
    not_counted: tuple[str, ...]


# Keys of a program that does not fit whose values are not known.
BOUNDS = (
    "step_seconds_overlap",
    "step_seconds_serial",
    "step_seconds_scheduled",
    "mfu_overlap",
    "mfu_scheduled",
    "mfu_serial",
    "tokens_per_second",
)


def devices_of(topology: Topology) -> list[Device]:
    """Returns the devices of a topology, for compilation only.

    Raises:
        UserError: libtpu is not installed, or does not know the topology.
    """
    from jax.experimental import topologies

    # By default libtpu asks a metadata server for the TPU type and locks out a second process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    more = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=str(topology), **more
        )
    except Exception as error:  # the plugin may raise any type
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                f"cannot load the TPU compiler ({error}): pip install 'emu_jax[plan]'"
            ) from None
        raise UserError(f"topology {topology}: {error}") from None
    return list(description.devices)


def plan(cfg: TrainConfig, topology: Topology, program: str = "train") -> Report:
    """Compiles one step of `program` for `topology` and reports its memory and time.

    docs/scaling.md describes the keys of the report.

    Raises:
        UserError: the program or topology is unknown, the dtype is not bfloat16, or the batch
            cannot be split over the mesh.
    """
    if program not in PROGRAMS:
        raise UserError(f"--for {program!r} is not known{suggest(program, PROGRAMS)}")
    if cfg.dtype != "bfloat16":
        raise UserError(f"a plan is for dtype=bfloat16, not {cfg.dtype}: TPUs have no other peak")
    if program == "generate" and cfg.mesh.context > 1:
        raise UserError(
            f"mesh.context is {cfg.mesh.context}, but a decode step reads one token of each row: "
            "set it to 1"
        )
    devices = devices_of(topology)
    if program == "generate":
        return _plan_token(cfg, topology, devices)
    if program == "decoder":
        cfg = dataclasses.replace(cfg, objective="decoder")
    mesh = mesh_for(cfg, devices)
    check_rows(cfg.data.batch_size, cfg.accumulate, mesh)
    with jax.set_mesh(mesh):
        trainer = Trainer(cfg, mesh)
        batch = abstract_batch(trainer)
        kinds = memory_by_kind(trainer, batch)
        lowered = trainer.step.lower(trainer.state_shapes, batch)
        return _report(cfg, topology, mesh, lowered, kinds, train_flops(cfg).total, program)


class CompilerCrash(UserError):
    """Raised when the compiler crashes the process that it runs in."""


def compiler_flags(script: Path | None, topology: Topology) -> str:
    """Returns the compiler's flags for a topology: those that `script` prints for its chip and its
    number of slices, as launch/flags.sh does. Without a script, those of LIBTPU_INIT_ARGS.

    Raises:
        UserError: the script fails, or prints none.
    """
    if script is None:
        return os.environ.get("LIBTPU_INIT_ARGS", "")
    command = 'flags=$(bash "$@") && eval "$flags" && printf %s "${LIBTPU_INIT_ARGS:?not set}"'
    called = [str(script), topology.chip_name, str(topology.slices)]
    clean = {name: value for name, value in os.environ.items() if name != "LIBTPU_INIT_ARGS"}
    result = subprocess.run(
        ["bash", "-c", command, "flags", *called], env=clean, capture_output=True, text=True
    )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{' '.join(called)} gives no compiler flags: {reason}")
    return result.stdout


def plan_in_subprocess(
    cfg: TrainConfig, topology: Topology, program: str = "train", *, flags: str | None = None
) -> Report:
    """Runs `plan` in a subprocess, which isolates this process from crashes of the compiler.

    Args:
        flags: the compiler's (`compiler_flags`); by default those of LIBTPU_INIT_ARGS.

    Raises:
        UserError: `plan` raised it.
        CompilerCrash: the compiler crashed.
    """
    return run_in_subprocess(plan, cfg, topology, program, flags=flags)


def run_in_subprocess(run: Callable[..., Any], *arguments: Any, flags: str | None = None) -> Any:
    """Calls `run(*arguments)` in a subprocess. Returns its result or raises its exception.

    Args:
        flags: value of LIBTPU_INIT_ARGS there; by default that of this process.

    Raises:
        CompilerCrash: the subprocess crashed.
    """
    level = logging.getLogger("emu_jax").getEffectiveLevel()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        1, mp_context=context, initializer=_begin, initargs=(level, flags)
    ) as pool:
        try:
            return pool.submit(run, *arguments).result()
        except BrokenProcessPool:
            raise CompilerCrash(
                "the TPU compiler crashed: try other rows per chip, or another remat policy"
            ) from None


def _begin(level: int, flags: str | None) -> None:
    """Sets up the compiler's flags, logging as the command line does, and makes the process exit
    with its parent.

    Without the parent, the compiler would keep running for minutes and use gigabytes of memory.
    """
    if flags is not None:
        os.environ["LIBTPU_INIT_ARGS"] = flags
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("emu_jax").setLevel(level)


def _plan_token(cfg: TrainConfig, topology: Topology, devices: list[Device]) -> Report:
    """Plans one decode step: the language model reads one token per row.

    Parameters are in the compute dtype, and the KV cache has `row_tokens` entries per row. By
    default heads are sharded, because gathering parameters does not pay off for one token.
    """
    llama = cfg.model.llama
    dtype = jnp.dtype(cfg.dtype)
    if cfg.mesh == MeshConfig():
        ways = math.gcd(llama.kv_heads, len(devices) // topology.slices)
        cfg = dataclasses.replace(cfg, mesh=MeshConfig(fsdp=1, tensor=ways))
    mesh = mesh_for(cfg, devices)
    rows, length = cfg.data.batch_size, cfg.data.row_tokens

    def array(shape: tuple[int, ...], dtype: DTypeLike, *axes: str | None) -> Any:
        where = NamedSharding(mesh, spec(axes, shape, mesh))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    with jax.set_mesh(mesh):
        template = AbstractModel(lambda: Llama(llama, rngs=nnx.Rngs(0)), mesh)
        params = {
            path: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
            for path, leaf in template.shapes.items()
        }
        cache = jax.eval_shape(lambda: KVCache.empty(llama, rows, length, dtype))
        axes = ("layer", "batch", "heads", None, None)
        keys, values = (array(a.shape, dtype, *axes) for a in (cache.k, cache.v))
        valid = array((rows, length), bool, "batch", None)
        cache = KVCache(keys, values, valid, array((), jnp.int32))
        reader = text.DecodeState(
            cache,
            array((rows,), jnp.int32, "batch"),
            array((rows, llama.vocab_size), jnp.float32, "batch", "vocab"),
        )

        def one_token(params: Any, reader: Any, tokens: Any) -> Any:
            module: Any = template.module(params)
            return text.decode_token(module, reader, tokens)

        lowered = jax.jit(one_token, donate_argnums=1).lower(
            params, reader, array((rows,), jnp.int32, "batch")
        )
        products = sum(
            math.prod(leaf.shape)
            for path, leaf in params.items()
            if len(leaf.shape) > 1
            and not path.endswith(("scale", "bias"))
            and (llama.tied_embeddings or not path.startswith("embed_tokens"))
            and "stu_regress_head" not in path
        )
        attended = 2 * llama.layers * length * llama.heads * llama.head_width
        kinds = {
            "parameters": shard_bytes(params),
            "cache": shard_bytes(reader),
            "optimizer": 0.0,
            "batch": 0.0,
            "activations": 0.0,
        }
        flops = 2.0 * rows * (products + attended)
        report = _report(cfg, topology, mesh, lowered, kinds, flops, "generate")
    if not isinstance(report, CompiledReport):
        return report
    # One token per row, not row_tokens.
    return dataclasses.replace(
        report,
        tokens_per_second=report.tokens_per_second / length,
        tokens_per_second_overlap=report.tokens_per_second_overlap / length,
    )


def _report(
    cfg: TrainConfig,
    topology: Topology,
    mesh: Mesh,
    lowered: jax.stages.Lowered,
    kinds: Mapping[str, float],
    model_flops: float,
    program: str,
) -> Report:
    started = time.monotonic()
    chip = topology.chip
    limit = chip.hbm_bytes / chip.devices
    common: dict[str, Any] = {
        "program": program,
        "topology": str(topology),
        "slices": topology.slices,
        "chips": topology.chips,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "remat": to_dict(cfg.remat),
        "rows": cfg.data.batch_size,
        "rows_per_chip": cfg.data.batch_size / topology.chips,
        "accumulate": cfg.accumulate,
        "model_flops": model_flops,
        "hbm_limit_bytes": limit,
    }
    try:
        compiled = lowered.compile(compiler_options=SAFE)
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"\(([\d.]+)([MGT])\) exceeds available HBM", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or needed is None:
            raise
        scale = {"M": 2**20, "G": 2**30, "T": 2**40}
        state = sum(size for kind, size in kinds.items() if kind != "activations")
        temporary = float(needed[1]) * scale[needed[2]]
        rest = max(0.0, temporary - kinds["activations"])
        return Report(
            **common,
            fits=False,
            hbm_bytes=state + temporary,
            hbm_by_kind={**kinds, "temporaries": rest},
            collective_bytes={},
            compile_seconds=time.monotonic() - started,
        )
    memory = compiled.memory_analysis()
    assert memory is not None
    total = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    temporaries = max(0.0, memory.temp_size_in_bytes - kinds["activations"])
    counts = hlo.count(compiled.as_text() or "")
    network = Network.of(topology, list(mesh.devices.flat))
    t = times(counts, network)
    on_network = {
        c: sum(network.seconds(c)) * executions for c, executions in counts.collectives.items()
    }
    sums = {"slices": {"all-reduce": slice_seconds(counts, topology)}} if counts.dcn_bytes else {}
    exposed = exposed_seconds(counts, network)
    copies = {c: host_seconds(c, chip) * executions for c, executions in counts.host_copies.items()}
    unknown = set(counts.unknown)
    if copies and not chip.host_bandwidth:
        unknown.add("the time of traffic with the host's memory")
    for what in sorted(unknown):
        log.warning("not counted: %s", what)
    peak = chip.flops * topology.chips
    tokens = cfg.data.batch_size * cfg.data.row_tokens
    return CompiledReport(
        **common,
        fits=total <= limit,
        hbm_bytes=total,
        hbm_by_kind={**kinds, "temporaries": temporaries},
        host_bytes=memory.host_temp_size_in_bytes,
        device_flops=counts.flops,
        device_int8_flops=counts.int8_flops,
        device_fp8_flops=counts.fp8_flops,
        hbm_traffic_bytes=counts.hbm_bytes,
        seconds=dataclasses.asdict(t),
        busiest=tuple(busiest(counts, topology)),
        step_seconds_overlap=t.overlapped,
        step_seconds_serial=t.serial,
        step_seconds_scheduled=t.scheduled,
        mfu_overlap=model_flops / peak / t.overlapped,
        mfu_serial=model_flops / peak / t.serial,
        mfu_scheduled=model_flops / peak / t.scheduled,
        tokens_per_second=tokens / t.serial,
        tokens_per_second_overlap=tokens / t.overlapped,
        collective_bytes=collective_bytes(counts, mesh),
        collective_seconds=by_axes(on_network, mesh) | sums | by_way(copies),
        exposed_seconds=by_axes(exposed, mesh) | sums | by_way(exposed),
        compiler_seconds=(compiled.cost_analysis() or {}).get("optimal_seconds"),
        not_counted=tuple(sorted(unknown)),
        compile_seconds=time.monotonic() - started,
    )


def collective_bytes(counts: hlo.Counts, mesh: Mesh) -> dict[str, dict[str, float]]:
    """Returns {mesh axes: {kind of collective: bytes of one step}}, with axes joined by `+`.

    The entry `slices` has the bytes that each device sends to be reduced over slices, and `host`
    those that it copies to its host's memory and from there.
    """
    table = by_axes({c: c.bytes * executions for c, executions in counts.collectives.items()}, mesh)
    if counts.dcn_bytes:
        table["slices"] = {"all-reduce": counts.dcn_bytes}
    return table | by_way({c: c.bytes * executions for c, executions in counts.host_copies.items()})


def by_way(values: Mapping[Any, float]) -> dict[str, dict[str, float]]:
    """Returns {"host": {to-host or from-host: sum}} of values of copies, empty without any."""
    table: dict[str, float] = defaultdict(float)
    for copy, value in values.items():
        if isinstance(copy, hlo.HostCopy):
            table[copy.kind] += value
    return {"host": dict(table)} if table else {}


def by_axes(values: Mapping[Any, float], mesh: Mesh) -> dict[str, dict[str, float]]:
    """Returns {mesh axes: {kind of collective: sum}} of values of collectives."""
    coordinates = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), axis=1)
    table: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for collective, value in values.items():
        if isinstance(collective, hlo.HostCopy):
            continue
        one = 2 if collective.kind == "collective-permute" else None  # one pair
        where = coordinates[list(collective.group[:one])]
        axes = [
            name for n, name in enumerate(mesh.axis_names) if len(set(where[:, n].tolist())) > 1
        ]
        table["+".join(axes) or "none"][collective.kind] += value
    return {axes: dict(kinds) for axes, kinds in table.items()}


def _hidden(report: CompiledReport, axes: str, kind: str) -> str:
    """Returns how much of a collective's time is overlapped in the compiler's schedule."""
    total = report.collective_seconds.get(axes, {}).get(kind)
    if not total:
        return ""
    exposed = report.exposed_seconds.get(axes, {}).get(kind, 0.0)
    return f" ({max(0.0, 1 - exposed / total):.0%} overlapped as scheduled)"


def summary(report: Report) -> str:
    """Formats a report as text."""
    gib = lambda size: f"{size / 2**30:.2f}"  # noqa: E731
    mesh = ", ".join(f"{axis} {ways}" for axis, ways in report.mesh.items())
    remat = ", ".join(f"{tower} {policy}" for tower, policy in report.remat.items())
    slices = f", {report.slices} slices" if report.slices > 1 else ""
    lines = [
        f"{report.program} on {report.topology}: {report.chips} chips{slices}",
        f"mesh        {mesh}",
        f"remat       {remat}",
        f"batch       {report.rows} rows, {report.rows_per_chip:g} a chip",
        f"HBM, GiB    {gib(report.hbm_bytes)} of {gib(report.hbm_limit_bytes)}: "
        f"{'fits' if report.fits else 'DOES NOT FIT'}",
    ]
    lines += [f"  {kind:12}{gib(size):>8}" for kind, size in report.hbm_by_kind.items()]
    if isinstance(report, CompiledReport):
        seconds = report.seconds
        scheduled, mfu = report.step_seconds_scheduled, report.mfu_scheduled
        lines += [
            f"model FLOPs {report.model_flops:.4g} a step",
            f"step        {report.step_seconds_overlap:.3f} s (all overlapped) to "
            f"{report.step_seconds_serial:.3f} s (nothing overlapped)"
            + (f"; {scheduled:.3f} s as scheduled" if scheduled is not None else ""),
            f"  products {seconds['compute']:.3f}, HBM {seconds['hbm']:.3f}, ICI "
            f"{seconds['ici']:.3f}, DCN {seconds['dcn']:.3f} s",
            f"MFU         {report.mfu_overlap:.3f} to {report.mfu_serial:.3f}"
            + (f"; {mfu:.3f} as scheduled" if mfu is not None else ""),
            f"tokens/s    {report.tokens_per_second_overlap:,.0f} to "
            f"{report.tokens_per_second:,.0f}",
        ]
        for axes, kinds in report.collective_bytes.items():
            moved = ", ".join(
                f"{kind} {size / 1e9:.2f} GB{_hidden(report, axes, kind)}"
                for kind, size in kinds.items()
            )
            lines.append(f"over {axes:7}{moved}")
        lines.append("busiest     serial, of which products and HBM, s")
        lines += [
            f"  {one.serial:7.3f} {one.compute:7.3f} {one.hbm:7.3f}  {one.source[-90:]}"
            for one in report.busiest
        ]
        lines += [f"not counted: {what}" for what in report.not_counted]
    lines.append(f"compiled in {report.compile_seconds:.0f} s")
    return "\n".join(lines)
