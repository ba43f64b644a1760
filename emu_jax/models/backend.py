"""Determines the platform that a program is traced for, and chooses its kernels.

`cpu.py` has kernels for XLA's CPU compiler. `xla.py` has the plain kernels, for all other platforms
and as the reference. `attention.py` adds its own kernels for TPUs and GPUs.
"""

from __future__ import annotations

from types import ModuleType

import jax

from emu_jax.models import cpu, xla


def platform() -> str:
    """Returns the platform that the program being traced will run on: `cpu`, `gpu` or `tpu`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_cpu() -> bool:
    """Returns whether the program being traced will run on CPUs."""
    return platform() == "cpu"


def kernels() -> ModuleType:
    """Returns the module of kernels for the program being traced: `cpu` or `xla`."""
    return cpu if on_cpu() else xla
