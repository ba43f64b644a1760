"""Determines the platform that a program is traced for, and chooses its kernels.

`cpu.py` and `tpu.py` have kernels for XLA's compilers of these platforms. `xla.py` has the plain
kernels, for all others and as the reference. `attention.py` adds its own kernels for TPUs and GPUs.
"""

from __future__ import annotations

from types import ModuleType

import jax

from emu_jax.models import cpu, tpu, xla


def platform() -> str:
    """Returns the platform that the program being traced will run on: `cpu`, `gpu` or `tpu`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_cpu() -> bool:
    """Returns whether the program being traced will run on CPUs."""
    return platform() == "cpu"


def kernels() -> ModuleType:
    """Returns the module of kernels for the program being traced: `cpu`, `tpu` or `xla`."""
    if on_cpu():
        return cpu
    return tpu if platform() == "tpu" else xla
