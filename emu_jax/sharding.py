"""The mesh, ONE table of logical-axis rules, and what follows from it.

Every parameter names its axes where it is made (`models/layers.py`); this table says
which mesh axis each name is split over. Mesh axes: `data` (replicas, across slices),
`fsdp` (parameters and batch), `tensor` (heads, hidden units, vocabulary).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emu_jax.config import UserError

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",  # a tower's width
    "heads": "tensor",  # heads x head width, or heads alone
    "mlp": "tensor",
    "vocab": "tensor",
    "conv_in": "fsdp",
    "conv_out": "tensor",
    "layer": None,  # the scanned axis
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Any | None = None) -> Mesh:
    """A mesh over all devices; one axis may be -1 and takes what the others leave.

    Raises:
        UserError: the axes do not multiply to the number of devices.
    """
    devices = np.asarray(jax.devices() if devices is None else devices)
    shape = [data, fsdp, tensor]
    if shape.count(-1) > 1:
        raise UserError(f"mesh {shape}: at most one axis may be -1")
    if -1 in shape:
        shape[shape.index(-1)] = devices.size // max(1, -math.prod(shape))
    if math.prod(shape) != devices.size:
        raise UserError(
            f"mesh data={shape[0]} fsdp={shape[1]} tensor={shape[2]} needs {math.prod(shape)} "
            f"devices, {devices.size} are here: make the three multiply to {devices.size}"
        )
    return jax.make_mesh(
        tuple(shape), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices.flatten()
    )


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Any) -> P:
    """The PartitionSpec of an array with these logical axes.

    A dimension that its mesh axes do not divide stays whole, so that small models run on
    any mesh. A name that `RULES` lacks is a KeyError.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} logical axes {axes} for a shape {shape}")
    entries, used = [], set()
    for name, size in zip(axes, shape, strict=True):
        rule = RULES[name] if name is not None else None
        names = (rule,) if isinstance(rule, str) else (rule or ())
        names = tuple(n for n in names if n not in used)
        ways = math.prod(mesh.shape[n] for n in names)
        if ways > 1 and size % ways == 0:
            used.update(names)
            entries.append(names[0] if len(names) == 1 else names)
        else:
            entries.append(None)
    return P(*entries)


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation to the rules, under the mesh set by `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


class Template:
    """A module without its arrays: what parameters it has, where they go, and the way back.

    Parameters are flat dicts {dotted path: array}, such as `visual.blocks.attn.qkv`.
    """

    def __init__(self, build: Callable[[], nnx.Module], mesh: Mesh):
        self.graphdef, self._state = nnx.split(nnx.eval_shape(build))
        self._build = build
        self.shapes: dict[str, jax.ShapeDtypeStruct] = {}
        for path, variable in nnx.to_flat_state(self._state):
            axes = variable.get_metadata().get("axes") or (None,) * len(variable.shape)
            where = NamedSharding(mesh, spec(axes, variable.shape, mesh))
            shape = jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=where)
            self.shapes[".".join(map(str, path))] = shape

    @property
    def shardings(self) -> dict[str, NamedSharding]:
        return {path: shape.sharding for path, shape in self.shapes.items()}

    def init(self, without: Iterable[str] = ()) -> dict[str, jax.Array]:
        """Fresh parameters, each made on the devices that hold it, but for those in `without`."""
        places = {path: where for path, where in self.shardings.items() if path not in without}

        def make() -> dict[str, jax.Array]:
            params = self.params(self._build())
            return {path: params[path] for path in places}

        return jax.jit(make, out_shardings=places)()

    def params(self, module: nnx.Module) -> dict[str, jax.Array]:
        """The flat parameters of a module of this kind."""
        return {".".join(map(str, p)): v[...] for p, v in nnx.to_flat_state(nnx.state(module))}

    def module(self, params: dict[str, Any]) -> nnx.Module:
        """The module with these parameters."""
        state = nnx.to_flat_state(self._state)
        flat = [(p, v.replace(params[".".join(map(str, p))])) for p, v in state]
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat))


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": x} as {"a": {"b": x}}, the form that is saved."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *groups, name = path.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = leaf
    return tree


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `nest`."""
    flat: dict[str, Any] = {}
    for name, node in tree.items():
        path = f"{prefix}{name}"
        flat |= flatten(node, path + ".") if isinstance(node, dict) else {path: node}
    return flat


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are split over their first axis."""
    return NamedSharding(mesh, P(RULES["batch"]))
