"""Determines the platform that a program is traced for, and chooses its kernels.

`cpu.py` has kernels for XLA's CPU compiler. `xla.py` has the plain kernels, for all other platforms
and as the reference. `attention.py` adds its own kernels for TPUs and GPUs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Literal

import jax

from emu_jax.models import cpu, xla

BackendName = Literal["cpu", "xla"]

_requested: ContextVar[BackendName | None] = ContextVar("backend", default=None)


def platform() -> str:
    """Returns the platform that the program being traced will run on: `cpu`, `gpu` or `tpu`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_cpu() -> bool:
    """Returns whether the program being traced will run on CPUs."""
    return platform() == "cpu"


@contextlib.contextmanager
def use(name: BackendName) -> Iterator[None]:
    """Makes programs traced in this context use the kernels of `name` on every platform."""
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def kernels() -> ModuleType:
    """Returns the module of kernels for the program being traced: `cpu` or `xla`."""
    name = _requested.get() or ("cpu" if on_cpu() else "xla")
    return cpu if name == "cpu" else xla
