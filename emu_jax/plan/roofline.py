"""Bounds on the time of a compiled module, from its work and the chip's peaks.

There are four resources: matmuls (FLOPs over the peak of their dtype), HBM (bytes over its
bandwidth), the network (collective bytes over the bandwidth of the links that carry them) and the
way to the host's memory (bytes over the bandwidth of PCIe, each way by itself). There are three
bounds:

  overlapped  the time of the busiest resource, with all other work overlapped
  scheduled   one instruction after another, each at its own roofline (matmuls and HBM traffic
              overlap within an instruction). Collectives run one after another, each beside the
              instructions between its start and its end in the compiler's schedule. So do copies
              to the host, and copies from it, beside the collectives
  serial      as scheduled, but no collective and no copy overlapped

No bound includes vector arithmetic, latencies, or matmuls that do not fill the matrix units.
A real step is slower than the overlapped bound, and may be faster or slower than the other two.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from emu_jax.hardware import Chip, Topology
from emu_jax.plan.hlo import Begin, Collective, Cost, Counts, End, HostCopy, Schedule
from emu_jax.sharding import Device


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one run of a module on one device."""

    compute: float
    hbm: float
    ici: float
    dcn: float
    instructions: float  # sum of the rooflines of all instructions, without collectives
    # The part of `ici`, `dcn`, `to_host` and `from_host` that no computation overlaps in the
    # compiler's schedule.
    exposed: float
    to_host: float = 0.0
    from_host: float = 0.0

    @property
    def overlapped(self) -> float:
        return max(self.compute, self.hbm, self.ici, self.dcn, self.to_host, self.from_host)

    @property
    def scheduled(self) -> float:
        return self.instructions + self.exposed

    @property
    def serial(self) -> float:
        return self.instructions + self.ici + self.dcn + self.to_host + self.from_host


@dataclasses.dataclass(frozen=True)
class Network:
    """Torus coordinates and slices of a mesh's logical devices."""

    topology: Topology
    coordinates: Sequence[tuple[int, ...]]
    slices: Sequence[int]

    @classmethod
    def of(cls, topology: Topology, devices: Sequence[Device]) -> Network:
        """Creates the network of a mesh's devices, in the order by which collectives index them."""
        axes = len(topology.shape)
        return cls(
            topology,
            [tuple(device.coords)[:axes] for device in devices],
            [getattr(device, "slice_index", 0) for device in devices],
        )

    def seconds(self, collective: Collective) -> tuple[float, float]:
        """Returns the seconds of one collective (over ICI, over DCN).

        Assumes the ring algorithm, with the data split over all torus axes that the group spans.
        All-to-alls are bound by the links between two halves of the group.
        """
        group, size = collective.group, len(collective.group)
        if size < 2 or not collective.bytes:
            return 0.0, 0.0
        chip, devices = self.topology.chip, self.topology.chip.devices
        if collective.kind == "collective-permute":
            pairs = list(zip(group[::2], group[1::2], strict=True))
            if any(self.slices[a] != self.slices[b] for a, b in pairs):
                return 0.0, collective.bytes / (chip.dcn_bandwidth / devices)
            hops = max(self.hops(a, b) for a, b in pairs)
            return collective.bytes * hops / (chip.link_bandwidth / devices), 0.0
        slices = Counter(self.slices[n] for n in group)
        within = [n for n in group if self.slices[n] == self.slices[group[0]]]
        if collective.kind in ("all-to-all", "ragged-all-to-all"):
            # Each device has an equal part of the array for each device.
            part = collective.bytes / size**2
            away = part * (size - len(within))
            return self.exchange_seconds(within, part), away / (chip.dcn_bandwidth / devices)
        passes = 2.0 if collective.kind == "all-reduce" else 1.0
        ici = dcn = 0.0
        if len(within) > 1:
            fraction = (len(within) - 1) / len(within)
            ici = passes * collective.bytes * fraction / (self.bandwidth(within) / devices)
        if len(slices) > 1:
            # Each device of a slice sends its own part of the array.
            part = collective.bytes / len(within)
            fraction = (len(slices) - 1) / len(slices)
            dcn = passes * part * fraction / (chip.dcn_bandwidth / devices)
        return ici, dcn

    def axes(self, group: Sequence[int]) -> Iterator[tuple[int, list[int], float]]:
        """Yields (torus axis, coordinates along it, links into a chip) of the axes that a group
        spans."""
        for axis, links in enumerate(self.topology.links_per_axis()):
            positions = sorted({self.coordinates[n][axis] for n in group})
            if len(positions) > 1:
                # A group that does not span the whole axis has no ring, only a line.
                yield axis, positions, links if len(positions) == self.topology.shape[axis] else 1.0

    def exchange_seconds(self, group: Sequence[int], part: float) -> float:
        """Returns the seconds in which each device of a group sends `part` bytes to each other.

        Cuts the group in half along each axis: all that one half sends to the other crosses the
        links between them. Assumes that the group has as many devices at each coordinate.
        """
        chip, seconds = self.topology.chip, 0.0
        for axis, positions, links in self.axes(group):
            lower = sum(self.coordinates[n][axis] < positions[len(positions) // 2] for n in group)
            cut = links * len(group) / len(positions)
            crossing = lower * (len(group) - lower) * part
            seconds = max(seconds, crossing / (cut * chip.link_bandwidth / chip.devices))
        return seconds

    def bandwidth(self, group: Sequence[int]) -> float:
        """Returns the bytes per second into a chip of a group, infinite for a single chip."""
        total = sum(links for _, _, links in self.axes(group))
        if not total:  # two devices of one chip
            return math.inf
        return total * self.topology.chip.link_bandwidth

    def hops(self, source: int, target: int) -> int:
        """Returns the number of links between two devices, the shorter way around a ring."""
        total = 0
        for a, b, side, links in zip(
            self.coordinates[source],
            self.coordinates[target],
            self.topology.shape,
            self.topology.links_per_axis(),
            strict=True,
        ):
            distance = abs(a - b)
            total += min(distance, side - distance) if links == 2 else distance
        return max(total, 1)


def times(counts: Counts, network: Network) -> Times:
    """Returns the module's times on one device of the network's topology."""
    chip = network.topology.chip
    ici = dcn = 0.0
    for collective, executions in counts.collectives.items():
        ici_seconds, dcn_seconds = network.seconds(collective)
        ici, dcn = ici + ici_seconds * executions, dcn + dcn_seconds * executions
    copies = {"to-host": 0.0, "from-host": 0.0}
    for copy, executions in counts.host_copies.items():
        copies[copy.kind] += host_seconds(copy, chip) * executions
    sums = slice_seconds(counts, network.topology)
    dcn += sums
    return Times(
        compute=matmul_seconds(counts, chip),
        hbm=hbm_seconds(counts, chip),
        ici=ici,
        dcn=dcn,
        instructions=sum(
            instruction_seconds(cost, chip) * cost.times for cost in counts.instructions
        ),
        exposed=sum(exposed_seconds(counts, network).values()) + sums,
        to_host=copies["to-host"],
        from_host=copies["from-host"],
    )


def host_seconds(copy: HostCopy, chip: Chip) -> float:
    """Returns the seconds of a copy between a device and its host's memory, 0 if the bandwidth is
    not known."""
    return copy.bytes / (chip.host_bandwidth / chip.devices) if chip.host_bandwidth else 0.0


def slice_seconds(counts: Counts, topology: Topology) -> float:
    """Returns the seconds in which the runtime reduces over slices. They are waited for."""
    chip, slices = topology.chip, topology.slices
    sent = 2 * (slices - 1) / slices * counts.dcn_bytes
    return sent / (chip.dcn_bandwidth / chip.devices)


def exposed_seconds(counts: Counts, network: Network) -> dict[Collective | HostCopy, float]:
    """Returns the seconds of each collective or copy during which instructions wait for it or for a
    later one, in the compiler's schedule.

    Collectives share the network: each starts when the one before has ended. Copies to the host
    share one way, and copies from it another. What is under way when a loop starts is held up until
    the loop ends.
    """
    exposed: dict[Collective | HostCopy, float] = defaultdict(float)
    chip = network.topology.chip

    def run(schedule: Schedule, executions: float) -> float:
        """Returns the seconds of one run of a schedule that runs `executions` times."""
        clock = 0.0
        # When each way has ended all that it was given.
        free = {"network": 0.0, "to-host": 0.0, "from-host": 0.0}
        ends: dict[str, tuple[str, float]] = {}  # way and end, by channel
        # With way, start and end, in order.
        sent: list[tuple[Collective | HostCopy, str, float, float]] = []
        for event in schedule:
            if isinstance(event, Cost):
                clock += instruction_seconds(event, chip)
            elif isinstance(event, Begin):
                transfer = event.collective
                if isinstance(transfer, HostCopy):
                    way, seconds = transfer.kind, host_seconds(transfer, chip)
                else:
                    way, seconds = "network", sum(network.seconds(transfer))
                start = max(clock, free[way])
                free[way] = start + seconds * event.times
                ends[event.channel] = way, free[way]
                sent.append((transfer, way, start, free[way]))
            elif isinstance(event, End):
                waited, until = ends.pop(event.channel)
                for transfer, way, start, end in sent:
                    if way == waited:
                        exposed[transfer] += (
                            max(0.0, min(end, until) - max(start, clock)) * executions
                        )
                clock = max(clock, until)
                sent = [each for each in sent if each[3] > clock]
            else:
                seconds = run(event.body, executions * event.times) * event.times
                clock += seconds
                free = {way: end + seconds for way, end in free.items()}
                ends = {channel: (way, end + seconds) for channel, (way, end) in ends.items()}
                sent = [(c, way, start + seconds, end + seconds) for c, way, start, end in sent]
        return clock

    run(counts.schedule, 1.0)
    return dict(exposed)


def instruction_seconds(cost: Cost, chip: Chip) -> float:
    """Returns the roofline of one run of an instruction on one device of a chip."""
    return max(matmul_seconds(cost, chip), hbm_seconds(cost, chip))


def hbm_seconds(work: Counts | Cost, chip: Chip) -> float:
    """Returns the seconds of the HBM traffic of one device of a chip."""
    return work.hbm_bytes / (chip.hbm_bandwidth / chip.devices)


def matmul_seconds(work: Counts | Cost, chip: Chip) -> float:
    """Returns the seconds of the matmuls on one device of a chip, each at the peak of its dtype."""
    wide = work.flops - work.int8_flops - work.fp8_flops
    seconds = wide / chip.flops
    seconds += work.int8_flops / (chip.int8_flops or chip.flops)
    seconds += work.fp8_flops / (chip.fp8_flops or chip.flops)
    return seconds * chip.devices


@dataclasses.dataclass(frozen=True)
class Operation:
    """All instructions that are compiled from one operation of the program: their seconds of the
    serial bound, of matmuls, and of HBM traffic."""

    source: str
    serial: float
    compute: float
    hbm: float


def busiest(counts: Counts, topology: Topology, limit: int = 12) -> list[Operation]:
    """Returns the `limit` operations that take most of the serial bound, the slowest first."""
    chip = topology.chip
    operations: dict[str, Operation] = {}
    for cost in counts.instructions:
        products = matmul_seconds(cost, chip) * cost.times
        moved = hbm_seconds(cost, chip) * cost.times
        before = operations.get(cost.source, Operation(cost.source, 0.0, 0.0, 0.0))
        operations[cost.source] = Operation(
            cost.source,
            before.serial + max(products, moved),
            before.compute + products,
            before.hbm + moved,
        )
    return sorted(operations.values(), key=lambda operation: -operation.serial)[:limit]
