"""The device mesh, the table of logical-axis rules, and the shardings that follow from it.

Every parameter names its logical axes when it is created (`models/layers.py`). `RULES` maps each
name to the mesh axes that it is split over. Mesh axes: `data` (replicas, across slices), `fsdp`
(parameters and batch), `tensor` (heads, hidden units, vocabulary), and, if a run asks for it,
`context` (the tokens of a row).

Context parallelism follows DeepSpeed-Ulysses (Jacobs et al. 2023): outside attention a device has
some tokens of its rows, and inside attention all tokens, with some of the heads. Two all-to-alls
lead from one to the other. Every attention kernel therefore sees whole rows, and causal work is
balanced. docs/scaling.md compares it with ring attention and with gathering keys and values.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emu_jax.errors import UserError, suggest

log = logging.getLogger(__name__)

AnyMesh = Mesh | AbstractMesh


class Device(Protocol):
    """A `jax.Device`, which type checkers cannot see."""

    platform: str
    coords: Sequence[int]  # of a TPU


MESH_AXES = ("data", "fsdp", "tensor")
CONTEXT = "context"  # the axis of a mesh with more than one way along it

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "image": ("data", "fsdp", CONTEXT),  # the images of all rows
    "sequence": CONTEXT,  # the tokens of a row
    "embed": "fsdp",  # a tower's width
    "heads": "tensor",  # heads x head width, or heads alone
    "attention_heads": ("tensor", CONTEXT),  # while attention has whole rows
    "mlp": "tensor",
    "vocab": "tensor",
    "conv_in": "fsdp",
    "conv_out": "tensor",
    "layer": None,  # the scanned axis
}


def make_mesh(
    data: int = 0,
    fsdp: int = 0,
    tensor: int = 0,
    context: int = 1,
    *,
    max_fsdp: int = 0,
    devices: Sequence[Device] | np.ndarray | None = None,
    rows: int | None = None,
    heads: int | None = None,
    widths: Sequence[int] = (),
) -> Mesh:
    """Creates a mesh over `devices`, by default all. `choose_mesh` decides the axes that are 0.

    Neighbors along `tensor`, then `context`, then `fsdp`, are neighbors in the interconnect. Only
    `data` spans slices. The mesh has an axis `context` only if that is more than 1.

    Raises:
        UserError: the axes do not multiply to the number of devices, slices do not divide
            `data`, or `rows` and `heads` cannot be divided among the devices.
    """
    devices = list(np.asarray(jax.devices() if devices is None else devices).flatten())
    slices = slice_count(devices)
    shape, why = choose_mesh(
        len(devices),
        slices,
        data=data,
        fsdp=fsdp,
        tensor=tensor,
        context=context,
        max_fsdp=max_fsdp,
        rows=rows,
        heads=heads,
        widths=widths,
    )
    log.info("mesh: %s", why)
    names = MESH_AXES
    if context > 1:
        shape = (*shape[:2], context, shape[2])
        names = (*MESH_AXES[:2], CONTEXT, MESH_AXES[2])
    if slices > 1:
        within = (shape[0] // slices, *shape[1:])
        between = (slices, *(1 for _ in shape[1:]))
        grid = mesh_utils.create_hybrid_device_mesh(
            within, between, devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def slice_count(devices: Sequence[Device]) -> int:
    """Returns the number of TPU slices that contain the devices; 1 on other platforms."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def choose_mesh(
    devices: int,
    slices: int = 1,
    *,
    data: int = 0,
    fsdp: int = 0,
    tensor: int = 0,
    context: int = 1,
    max_fsdp: int = 0,
    rows: int | None = None,
    heads: int | None = None,
    widths: Sequence[int] = (),
) -> tuple[tuple[int, int, int], str]:
    """Returns the sizes of (`data`, `fsdp`, `tensor`), and the reasons. Their product is the number
    of devices divided by `context`. An axis of 0 is chosen:

    tensor: 1, unless a batch of `rows` is too small to give every device its own rows. It divides
        `heads`. Its traffic grows with the batch, on every layer.
    fsdp: as much of a slice as divides the `widths` of all towers (an indivisible parameter is
        replicated), up to `max_fsdp` unless that is 0. Its traffic is proportional to the
        parameters, whatever the batch.
    data: the rest, and everything between slices. Only gradients cross it, once a step.

    Raises:
        UserError: the axes do not multiply to the number of devices, slices do not divide
            `data`, or `rows` and `heads` cannot be divided among the devices.
    """
    reasons = []
    if devices // slices % context:
        of_slice = " of a slice" if slices > 1 else ""
        raise UserError(
            f"mesh.context is {context}, which does not divide the {devices // slices} devices"
            f"{of_slice}: set it to a divisor"
        )
    devices //= context
    if context > 1:
        reasons.append(f"context={context}")
    if tensor == 0 and data and fsdp:
        tensor = max(1, devices // (data * fsdp))
        reasons.append(f"tensor={tensor}")
    if tensor == 0:
        tensor = next(
            (
                n
                for n in range(1, devices // slices + 1)
                if devices % n == 0
                and (heads is None or heads % n == 0)
                and (rows is None or rows % (devices // n) == 0)
            ),
            0,
        )
        if not tensor:
            groups = f"groups of {context} devices (mesh.context)" if context > 1 else "devices"
            raise UserError(
                f"a batch of {rows} rows cannot be shared by {devices} {groups}, nor their rest by "
                f"{heads} heads: make data.batch_size a multiple of {devices}"
            )
        few = f" ({rows} rows are too few for {devices} devices)" if tensor > 1 else ""
        reasons.append(f"tensor={tensor}{few}")
    if fsdp == 0:
        room = max(1, devices // (data or slices) // tensor)
        fsdp = room if data else math.gcd(room, *widths)
        why = f" (more would not divide widths of {sorted(widths)})" if fsdp < room else ""
        if 0 < max_fsdp < fsdp:
            fsdp = next(n for n in range(max_fsdp, 0, -1) if fsdp % n == 0)
            why = f" (mesh.max_fsdp is {max_fsdp})"
        reasons.append(f"fsdp={fsdp}{why}")
    if data == 0:
        data = max(1, devices // (fsdp * tensor))
        between = f" ({slices} slices)" if slices > 1 else ""
        reasons.append(f"data={data}{between}")
    if data * fsdp * tensor != devices:
        along = f" context={context}" if context > 1 else ""
        raise UserError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor}{along} needs "
            f"{data * fsdp * tensor * context} devices, {devices * context} are here: make data, "
            f"fsdp and tensor multiply to {devices}"
        )
    if data % slices:
        raise UserError(
            f"mesh data={data} over {slices} slices: make it a multiple of {slices}, so that "
            "only replicas are joined by the data-center network"
        )
    return (data, fsdp, tensor), ", ".join(reasons) or "as configured"


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: AnyMesh) -> P:
    """Returns the PartitionSpec of an array with these logical axes.

    A dimension that its mesh axes do not divide is not split. Small models therefore run on any
    mesh. Where `context` is one of several axes, it alone is left out if the others divide it.

    Raises:
        ValueError: `RULES` lacks an axis, or `shape` has a different number of axes.
    """
    return P(*_split(axes, shape, mesh)[0])


def _split(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: AnyMesh
) -> tuple[list[str | tuple[str, ...] | None], list[str]]:
    """Returns the entries of a PartitionSpec, and a description of each dimension that its mesh
    axes do not divide."""
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} logical axes {axes} for a shape {shape}")
    entries: list[str | tuple[str, ...] | None] = []
    used, undivided = set[str](), list[str]()
    for name, size in zip(axes, shape, strict=True):
        if name is not None and name not in RULES:
            raise ValueError(f"unknown logical axis {name!r}{suggest(name, RULES)}")
        rule = RULES[name] if name is not None else None
        names = (rule,) if isinstance(rule, str) else (rule or ())
        names = tuple(n for n in names if n not in used and n in mesh.shape)
        ways = math.prod(mesh.shape[n] for n in names)
        if names[-1:] == (CONTEXT,) and size % ways:  # the other axes may still divide it
            names = names[:-1]
            ways = math.prod(mesh.shape[n] for n in names)
        if ways > 1 and size % ways == 0:
            used.update(names)
            entries.append(names[0] if len(names) == 1 else names)
        else:
            if ways > 1:
                along = " ".join(f"{n}={mesh.shape[n]}" for n in names)
                undivided.append(f"{along} does not divide {name} of {size}")
            entries.append(None)
    return entries, undivided


def context_ways(mesh: AnyMesh | None = None) -> int:
    """Returns over how many devices the tokens of a row are split, by default on the mesh set by
    `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return mesh.shape.get(CONTEXT, 1)


def row_ways(mesh: AnyMesh) -> int:
    """Returns over how many groups of devices the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def fitted(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Returns a sharding that splits only the dimensions of `shape` that its mesh axes divide."""
    entries = []
    for size, entry in zip(shape, (*sharding.spec, *(None,) * len(shape)), strict=False):
        names = (entry,) if isinstance(entry, str) else (entry or ())
        ways = math.prod(sharding.mesh.shape[name] for name in names)
        entries.append(entry if size % ways == 0 else None)
    return NamedSharding(sharding.mesh, P(*entries))


@functools.cache
def _log_undivided(path: str, undivided: str, device_bytes: int) -> None:
    """Logs once how much memory a parameter takes that is replicated along an axis."""
    log.info("%s: %s: replicated (%.3g GiB per device)", path, undivided, device_bytes / 2**30)


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation to the rules, under the mesh set by `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def dotted(path: tuple[object, ...]) -> str:
    """Returns a tree path in the form `visual.blocks.attn.qkv`."""
    return ".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path)


class AbstractModel:
    """A module without its arrays: shapes and shardings of its parameters, and conversions between
    parameters and module.

    Parameters are flat dicts {dotted path: array}, such as `visual.blocks.attn.qkv`.
    """

    def __init__(self, build: Callable[[], nnx.Module], mesh: Mesh) -> None:
        self.graphdef, self._state = nnx.split(nnx.eval_shape(build))
        self._build = build
        self.shapes: dict[str, jax.ShapeDtypeStruct] = {}
        self.axes: dict[str, tuple[str | None, ...]] = {}  # logical axes of each parameter
        for path, variable in nnx.to_flat_state(self._state):
            axes = variable.get_metadata().get("axes") or (None,) * len(variable.shape)
            entries, undivided = _split(axes, variable.shape, mesh)
            where = NamedSharding(mesh, P(*entries))
            shape = jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=where)
            if undivided:
                shard_bytes = math.prod(where.shard_shape(shape.shape)) * shape.dtype.itemsize
                _log_undivided(dotted(path), ", ".join(undivided), shard_bytes)
            self.shapes[dotted(path)] = shape
            self.axes[dotted(path)] = tuple(axes)

    @property
    def shardings(self) -> dict[str, NamedSharding]:
        return {path: shape.sharding for path, shape in self.shapes.items()}

    def init(self, without: Iterable[str] = ()) -> dict[str, jax.Array]:
        """Initializes all parameters but those in `without`, each on the devices that hold it."""
        shardings = {
            path: sharding for path, sharding in self.shardings.items() if path not in without
        }

        def make() -> dict[str, jax.Array]:
            params = self.params(self._build())
            return {path: params[path] for path in shardings}

        return jax.jit(make, out_shardings=shardings)()

    def params(self, module: nnx.Module) -> dict[str, jax.Array]:
        """Returns the flat parameters of a module with this structure."""
        return {dotted(p): v[...] for p, v in nnx.to_flat_state(nnx.state(module))}

    def module(self, params: Mapping[str, Any]) -> nnx.Module:
        """Returns the module with these parameters."""
        state = nnx.to_flat_state(self._state)
        flat = [(p, v.replace(params[dotted(p)])) for p, v in state]
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat))


def to_host(x: jax.Array) -> np.ndarray:
    """Returns a whole array on the host. If other processes hold parts of it, all processes of its
    mesh call this at the same point, and all get it.

    Raises:
        ValueError: other processes hold parts of it, and its sharding has no mesh.
    """
    if x.is_fully_addressable:
        return np.asarray(x)
    if not isinstance(x.sharding, NamedSharding):
        raise ValueError(f"no mesh to gather {x.sharding} over")
    return np.asarray(_gathered(x, NamedSharding(x.sharding.mesh, P())).addressable_data(0))


@functools.partial(jax.jit, static_argnames=("sharding",))
def _gathered(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, sharding)


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """Converts {"a.b": x} to {"a": {"b": x}}, the form that is saved."""
    return unflatten_dict(flat, sep=".")


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """Converts {"a": {"b": x}} to {"a.b": x}; the inverse of `nest`."""
    return dict(flatten_dict(tree, sep="."))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch, which is split over its first axis."""
    return NamedSharding(mesh, P(RULES["batch"]))


class RowShares(NamedTuple):
    """The rows of each batch that a process reads for its devices.

    They need not be neighbors: a mesh follows the interconnect, and a host's devices are a square
    of it.

    Attributes:
        numbers: of equal shares of consecutive rows, in rising order.
        count: number of all shares.
        is_lead: whether no process before this one reads the same rows.
    """

    numbers: tuple[int, ...]
    count: int
    is_lead: bool


def row_shares(mesh: Mesh) -> RowShares:
    """Returns the shares that this process reads on a mesh.

    Raises:
        UserError: some of a process's rows are also another's, and some are not, or processes have
            different numbers of them.
    """
    count = row_ways(mesh)
    found: dict[int, set[int]] = {}
    for number, devices in enumerate(mesh.devices.reshape(count, -1)):  # `data` and `fsdp` lead
        for device in devices:
            found.setdefault(device.process_index, set()).add(number)
    shares = {process: tuple(sorted(numbers)) for process, numbers in found.items()}
    distinct = set(shares.values())
    if len(set(map(len, distinct))) > 1 or sum(map(len, distinct)) != count:
        raise UserError(
            "the mesh divides the rows of a batch unequally among processes, which must hold the "
            "same rows or none in common: change mesh.tensor or mesh.context"
        )
    numbers = shares[jax.process_index()]
    first = min(process for process in shares if shares[process] == numbers)
    return RowShares(numbers, count, jax.process_index() == first)
