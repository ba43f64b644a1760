"""Peak FLOP/s and bandwidths of chips: the table behind MFU figures and `emu-jax plan`.

TPU figures are from Google Cloud's "system architecture" page of each version. The bandwidth to the
host's memory, which those pages do not list, is from "How to Think About TPUs"
(jax-ml.github.io/scaling-book/tpus): 16 GB/s each way on v4, 32 GB/s on v6e, and typically 15 GB/s.
It has no figure for tpu7x. GPU figures are from NVIDIA's data sheets (dense, not sparse).
"""

from __future__ import annotations

import dataclasses
import math
import re

from emu_jax.errors import UserError, suggest

GB = 1e9
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator chip. Bandwidths are bytes per second."""

    flops: float  # peak FLOP/s in bfloat16
    hbm_bytes: float
    hbm_bandwidth: float
    # One interconnect link, in one direction. A chip has two links along each axis of its
    # torus; the published "bidirectional bandwidth per chip" counts both directions of all.
    link_bandwidth: float = 0.0
    torus_axes: int = 0
    dcn_bandwidth: float = 0.0  # to other slices, in one direction
    host_bandwidth: float = 0.0  # to the host's memory over PCIe, in one direction; 0: not known
    devices: int = 1  # JAX devices per chip
    # Peaks of matmuls in 8 bits; 0: no faster than bfloat16, or not published.
    int8_flops: float = 0.0
    fp8_flops: float = 0.0


CHIPS: dict[str, Chip] = {
    # cloud.google.com/tpu/docs/v4: 275 TFLOPs (bf16 or int8), 32 GiB at 1200 GBps; six links of 50
    # GBps.
    "v4": Chip(275e12, 32 * GIB, 1200 * GB, 50 * GB, 3, 6.25 * GB, 16 * GB),
    # .../v5e: 197 TFLOPs (int8 393), 16 GiB at 800 GBps, ICI 400 GBps both ways, DCN 25 Gbps.
    "v5e": Chip(197e12, 16 * GIB, 800 * GB, 50 * GB, 2, 3.125 * GB, 15 * GB, int8_flops=393e12),
    # .../v5p: 459 TFLOPs (int8 918), 95 GiB at 2765 GBps, ICI 1200 GBps both ways, DCN 50 Gbps.
    "v5p": Chip(459e12, 95 * GIB, 2765 * GB, 100 * GB, 3, 6.25 * GB, 15 * GB, int8_flops=918e12),
    # .../v6e: 918 TFLOPs (int8 1836), 32 GiB at 1638 GBps, ICI 800 GBps both ways, DCN 100 Gbps.
    "v6e": Chip(918e12, 32 * GIB, 1638 * GB, 100 * GB, 2, 12.5 * GB, 32 * GB, int8_flops=1836e12),
    # .../tpu7x: 2307 TFLOPs (fp8 4614), 192 GiB at 7380 GBps, ICI 1200 GBps both ways, DCN 100
    # Gbps. Its page lists fp8 on v5p and v6e at the rate of bfloat16.
    "tpu7x": Chip(2307e12, 192 * GIB, 7380 * GB, 100 * GB, 3, 12.5 * GB, 0.0, 2, fp8_flops=4614e12),
    "a100": Chip(312e12, 80 * GB, 2039 * GB, int8_flops=624e12),
    "h100": Chip(989e12, 80 * GB, 3350 * GB, int8_flops=1979e12, fp8_flops=1979e12),
    "h200": Chip(989e12, 141 * GB, 4800 * GB, int8_flops=1979e12, fp8_flops=1979e12),
    "b200": Chip(2250e12, 180 * GB, 7700 * GB, int8_flops=4500e12, fp8_flops=4500e12),
}

# Prefixes of jax.Device.device_kind. The first match counts.
_KINDS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v5": "v5p",
    "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x", "TPU v7x": "tpu7x",
    "NVIDIA A100": "a100", "NVIDIA H100": "h100", "NVIDIA H200": "h200", "NVIDIA B200": "b200",
}  # fmt: skip


def chip_name(device_kind: str) -> str:
    """Returns the key in `CHIPS` for a `jax.Device.device_kind`, or "" if it is unknown."""
    return next((name for prefix, name in _KINDS.items() if device_kind.startswith(prefix)), "")


def chip_of(device_kind: str) -> Chip | None:
    """Returns the specs of the chip that `device_kind` names, or None if it is unknown."""
    return CHIPS.get(chip_name(device_kind))


def peak_flops(device_kind: str, dtype: str = "bfloat16") -> float | None:
    """Returns the peak FLOP/s of one JAX device in matmuls of `dtype`, or None if it is unknown.

    On a TPU, a float32 matmul takes six bfloat16 passes at the "highest" precision, which float32
    training uses. float32 peaks of GPUs are not listed.
    """
    chip = chip_of(device_kind)
    if chip is None:
        return None
    if dtype == "bfloat16":
        return chip.flops / chip.devices
    return chip.flops / chip.devices / 6 if chip.torus_axes else None


@dataclasses.dataclass(frozen=True)
class Topology:
    """TPU slices: the chip and shape of one slice, such as `v5p:4x4x8`, and their number."""

    chip_name: str
    shape: tuple[int, ...]  # chips along each axis of the torus
    slices: int = 1

    @classmethod
    def parse(cls, text: str, slices: int = 1) -> Topology:
        """Parses a topology such as `v5p:4x4x8`.

        Raises:
            UserError: the chip is unknown, the shape does not fit it, or `slices` is below 1.
        """
        name, _, shape = text.partition(":")
        # The compiler describes v4 as two devices per chip, from which jax cannot build a mesh.
        tpus = [key for key, chip in CHIPS.items() if chip.torus_axes and key != "v4"]
        if name not in tpus:
            raise UserError(f"topology {text!r}: no TPU {name!r}{suggest(name, tpus)}")
        sides = shape.split("x")
        axes = CHIPS[name].torus_axes
        if len(sides) != axes or not all(re.fullmatch("[1-9][0-9]{0,5}", side) for side in sides):
            example = "x".join(["4"] * axes)
            raise UserError(
                f"topology {text!r}: {name} is shaped along {axes} axes: {name}:{example}"
            )
        if slices < 1:
            raise UserError(f"--slices {slices}: make it at least 1")
        return cls(name, tuple(map(int, sides)), slices)

    def __str__(self) -> str:
        return f"{self.chip_name}:{'x'.join(map(str, self.shape))}"

    @property
    def chip(self) -> Chip:
        return CHIPS[self.chip_name]

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    def links_per_axis(self) -> list[float]:
        """Returns the links that serve a chip along each axis of its torus, in one direction of
        travel: 2 if the axis closes into a ring, 1 if it is a line, 0 if it is one chip.

        An axis of a 3D torus closes if its length is a multiple of 4 chips (optical switches join
        cubes). An axis of a 2D torus closes if it spans the pod's 16 chips.
        """
        ring = (lambda n: n % 4 == 0) if self.chip.torus_axes == 3 else (lambda n: n == 16)
        return [0.0 if n == 1 else 2.0 if ring(n) else 1.0 for n in self.shape]
