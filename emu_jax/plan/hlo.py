"""FLOPs, HBM bytes and collective bytes of a compiled TPU module, counted from its text.

XLA's own cost analysis counts a loop's body once and ignores Pallas kernels. Here a loop's body
counts once per iteration. A fusion's FLOPs are those of the instructions inside it, and its bytes
are those that it reads from and writes to HBM. The FLOPs of known Pallas kernels come from
`KERNELS`; `Counts.unknown` names the others.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Int

from emu_jax.models import short_attention

# Of the rules here and in `plan.roofline`: raise it when they change what a module counts.
RULES_VERSION = 4

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "token": 0}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class HloArray:
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    space: int = 0  # 0 is HBM; others are on-chip memory or host memory

    @property
    def in_hbm(self) -> bool:
        return self.space == 0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        bits = _BITS.get(self.dtype) or int(re.sub(r"\D.*", "", self.dtype[1:]) or 0)
        return self.elements * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation."""

    name: str
    arrays: tuple[HloArray, ...]
    op: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def attribute(self, name: str) -> str | None:
        """Returns the text after `name=`, up to the next comma outside brackets, or None."""
        match = re.search(rf"(?:^|[ ,]){name}=", self.attributes)
        return _until(self.attributes[match.end() :], ",") if match else None

    @property
    def called(self) -> str | None:
        """Name of the computation that a fusion or a call runs, or None."""
        name = self.attribute("calls") or self.attribute("to_apply")
        return name.lstrip("%") if name else None


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of one device."""

    kind: str  # all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute
    bytes: float  # of the whole array: after a gather, before a reduction, of all in an exchange
    # One group of participating logical devices. For a permutation: the source and target of each
    # pair in turn.
    group: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class HostCopy:
    """One copy between a device's memory and its host's."""

    kind: str  # to-host or from-host
    bytes: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one execution of an instruction, and the number of its executions."""

    flops: float
    hbm_bytes: float
    times: float
    source: str = ""  # the JAX operation that it was compiled from, or else the HLO opcode
    int8_flops: float = 0.0  # of `flops`, those of operands in int8
    fp8_flops: float = 0.0


@dataclasses.dataclass(frozen=True)
class Begin:
    """The point of a schedule where a collective or a copy starts, or `times` of them in turn."""

    channel: str  # unique within a computation, but for those of one asynchronous computation
    collective: Collective | HostCopy
    times: float = 1.0


@dataclasses.dataclass(frozen=True)
class End:
    """The point of a schedule that waits for all collectives and copies of a channel."""

    channel: str


@dataclasses.dataclass(frozen=True)
class Loop:
    """A computation that runs `times` times at one point of a schedule."""

    times: float
    body: Schedule


# A computation in scheduled order.
Schedule = list[Cost | Begin | End | Loop]


@dataclasses.dataclass
class Counts:
    """Totals for one device and one run of the module."""

    flops: float = 0.0
    int8_flops: float = 0.0  # of `flops`, those of operands in int8
    fp8_flops: float = 0.0
    hbm_bytes: float = 0.0
    instructions: list[Cost] = dataclasses.field(default_factory=list)  # in order
    schedule: Schedule = dataclasses.field(default_factory=list)
    collectives: dict[Collective, float] = dataclasses.field(  # number of executions
        default_factory=lambda: defaultdict(float)
    )
    # Sent to the runtime that reduces over slices, after the reduction within the slice.
    dcn_bytes: float = 0.0
    host_copies: dict[HostCopy, float] = dataclasses.field(  # number of executions
        default_factory=lambda: defaultdict(float)
    )
    unknown: set[str] = dataclasses.field(default_factory=set)


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Parses an HLO module. Returns (computations by name, name of the entry computation)."""
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    entry = ""
    for line in text.splitlines():
        if line == "}":  # exactly: kernel metadata may span lines that end in more braces
            current = None
        elif header := _HEADER.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            name, result, op, rest = match.groups()
            inside = _until(rest, ")")
            current[name] = Instruction(
                name,
                tuple(_arrays(result)),
                op,
                tuple(_NAME.findall(inside)),
                inside + ")" + rest[len(inside) + 1 :],
                line.lstrip().startswith("ROOT"),
            )
    return computations, entry


def count(text: str) -> Counts:
    """Counts a compiled module (`jax.stages.Compiled.as_text()`)."""
    computations, entry = parse(text)
    counts = Counts()
    counts.schedule = _InstructionCounter(computations, counts).run(entry, 1.0)
    return counts


class _InstructionCounter:
    def __init__(self, computations: dict[str, Computation], counts: Counts) -> None:
        self.computations, self.counts = computations, counts

    def run(self, name: str, times: float) -> Schedule:
        """Counts a computation that runs `times` times. Returns its schedule.

        A collective lasts from the first instruction that mentions its channel to the last: from
        its `-start` to its `-done`, or over the fusions of matmuls that it overlaps.
        """
        body = self.computations[name]
        schedule: Schedule = []
        last = {
            channel: instruction.name
            for instruction in body.values()
            for channel in self.channels(body, instruction)
        }
        seen: set[str] = set()
        for instruction in body.values():
            if instruction.op == "while":
                trip_count = self.trip_count(instruction)
                loop = self.run(_bare(instruction.attribute("body")), times * trip_count)
                schedule.append(Loop(trip_count, loop))
            elif instruction.op == "conditional":
                branches = instruction.attribute("branch_computations") or ""
                both = [
                    instruction.attribute("true_computation"),
                    instruction.attribute("false_computation"),
                ]
                for branch in _NAME.findall(branches) or [_bare(b) for b in both if b]:
                    schedule += self.run(branch, times)  # an upper bound
            elif instruction.op == "call" and instruction.called:
                schedule += self.run(instruction.called, times)
            else:
                channels = self.channels(body, instruction)
                cost: list[Cost] = []
                begins: list[Begin] = []
                if instruction.op in _ASYNC and instruction.called:
                    for event, executions in _events(self.run(instruction.called, times)):
                        if isinstance(event, Cost):
                            cost.append(_repeated(event, executions))
                        elif isinstance(event, Begin):
                            begin = Begin(channels[0], event.collective, event.times * executions)
                            begins.append(begin)
                else:
                    if counted := self.count_instruction(body, instruction, times, seen):
                        cost = [counted]
                    inside = dict(self.transfers(body, instruction))
                    begins = [Begin(c, inside[c]) for c in inside if c not in seen]
                seen |= {begin.channel for begin in begins}
                ends = [End(c) for c in channels if c in seen and last[c] == instruction.name]
                # Nothing overlaps a collective that is an instruction of its own.
                overlaps = not ends or any(each.flops for each in cost)
                schedule += [*begins, *cost, *ends] if overlaps else [*cost, *begins, *ends]
        return schedule

    def channels(self, body: Computation, instruction: Instruction) -> list[str]:
        """Returns the channels of the collectives and copies that an instruction starts, runs a
        part of, or waits for. An asynchronous computation is one channel."""
        if instruction.op.endswith(("-done", "-update")):
            started = body.get(instruction.operands[0]) if instruction.operands else None
            return self.channels(body, started) if started is not None else []
        if instruction.op in _ASYNC and instruction.called:
            return [instruction.name]
        return list(dict(self.transfers(body, instruction)))

    def trip_count(self, loop: Instruction) -> float:
        """Returns the trip count of a loop, and records it in `Counts.unknown` if it is a guess.

        Assumes a counter that starts at 0, is compared with a constant and grows by a constant
        step. The step is 2 if XLA multiplies pieces as they arrive from both sides of a ring.
        """
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return float(known[1])
        condition = self.computations[_bare(loop.attribute("condition"))]
        body = self.computations[_bare(loop.attribute("body"))]
        bounds = [
            value
            for instruction in condition.values()
            if (value := _constant(instruction)) is not None
        ]
        counters = [
            instruction
            for instruction in condition.values()
            if instruction.op == "get-tuple-element"
        ]
        if len(bounds) == len(counters) == 1:
            place = int(counters[0].attribute("index") or 0)
            root = next(instruction for instruction in body.values() if instruction.root)
            grown = body.get(root.operands[place]) if root.op == "tuple" else None
            if grown is not None and grown.op == "add":
                steps = [_constant(body[name]) for name in grown.operands if name in body]
                if step := max((step or 0 for step in steps), default=0):
                    return math.ceil(bounds[0] / step)
        self.counts.unknown.add(f"the trip count of {loop.name}")
        return float(bounds[0]) if len(bounds) == 1 else 1.0

    def count_instruction(
        self, body: Computation, instruction: Instruction, times: float, seen: set[str]
    ) -> Cost | None:
        """Counts one instruction. Returns its cost, None if it has none but the network's.

        Args:
            seen: channels whose collectives are counted: a gather that overlaps matmuls appears in
                each.
        """
        if instruction.op in _FREE:
            return None
        for channel, transfer in dict(self.transfers(body, instruction)).items():
            if channel in seen:
                continue
            if isinstance(transfer, HostCopy):
                self.counts.host_copies[transfer] += times
            else:
                self.counts.collectives[transfer] += times
        if instruction.op == "send" and "megascale" in instruction.attributes:
            self.counts.dcn_bytes += instruction.arrays[0].bytes * times
        flops = self.flops(body, instruction)
        kind = instruction.op.removesuffix("-start")
        if kind in _COLLECTIVES or kind.startswith(("send", "recv")):
            return None  # takes network time only
        if instruction.op.endswith(("-done", "-update")):
            return None
        moved = self.hbm_bytes(body, instruction)
        int8 = self.flops(body, instruction, _INT8) if flops else 0.0
        fp8 = self.flops(body, instruction, _FP8) if flops else 0.0
        self.counts.flops += flops * times
        self.counts.int8_flops += int8 * times
        self.counts.fp8_flops += fp8 * times
        self.counts.hbm_bytes += moved * times
        if not flops and not moved:
            return None
        source = re.search(r'op_name="([^"]*)"', instruction.attributes)
        name = source[1] if source else instruction.op
        cost = Cost(flops, moved, times, name, int8, fp8)
        self.counts.instructions.append(cost)
        return cost

    # FLOPs

    def flops(
        self, body: Computation, instruction: Instruction, dtypes: frozenset[str] = frozenset()
    ) -> float:
        """Returns the FLOPs of one instruction. With `dtypes`, only those of matmuls whose
        operands both have one of them."""
        if instruction.op in ("dot", "convolution") and dtypes:
            operands = {body[name].arrays[0].dtype for name in instruction.operands[:2]}
            if not operands <= dtypes:
                return 0.0
        if instruction.op == "dot":
            lhs = body[instruction.operands[0]].arrays[0].shape
            contracted = _numbers(instruction.attribute("lhs_contracting_dims") or "")
            return (
                2.0 * instruction.arrays[0].elements * math.prod(lhs[axis] for axis in contracted)
            )
        if instruction.op == "convolution":
            shapes = [body[name].arrays[0].shape for name in instruction.operands[:2]]
            return _convolution(instruction, *shapes)
        if instruction.op == "fusion" and instruction.called:
            inner = self.computations[instruction.called]
            return sum(self.flops(inner, each, dtypes) for each in inner.values())
        if (
            instruction.op == "custom-call"
            and not dtypes
            and 'custom_call_target="tpu_custom_call"' in instruction.attributes
        ):
            for prefix, kernel in KERNELS.items():
                if instruction.name.startswith(prefix):
                    return kernel(
                        instruction, [body[name].arrays[0].shape for name in instruction.operands]
                    )
            self.counts.unknown.add(f"kernel {instruction.name}")
        return 0.0

    # Bytes

    def hbm_bytes(self, body: Computation, instruction: Instruction) -> float:
        """Returns the HBM bytes that one instruction reads and writes."""
        if copy := self.host_copy(body, instruction):
            return copy.bytes
        operands = [body[name].arrays for name in instruction.operands if name in body]
        if instruction.op == "fusion" and instruction.called:
            inner = self.computations[instruction.called]
            bytes_read = sum(self.bytes_read(inner, n, arrays) for n, arrays in enumerate(operands))
            return bytes_read + self.bytes_written(inner, instruction)
        if instruction.op in ("dynamic-slice", "slice", "gather"):
            return 2 * _hbm(instruction.arrays)
        if instruction.op in ("dynamic-update-slice", "scatter"):
            return 2 * sum(map(_hbm, operands[1:]))
        if instruction.op == "slice-start":  # its arrays are (operands, result, context)
            source, result = instruction.arrays[:2]
            return result.bytes * (source.in_hbm + result.in_hbm)
        if instruction.op in ("copy-start", "copy"):
            # The arrays of an asynchronous copy are (destination, source, context).
            return _hbm(instruction.arrays[:1]) + sum(map(_hbm, operands[:1]))
        return _hbm(instruction.arrays) + sum(map(_hbm, operands))

    def bytes_read(self, inner: Computation, number: int, arrays: Sequence[HloArray]) -> float:
        """Returns the bytes that a fusion reads of operand `number`, which it may only slice."""
        whole = _hbm(arrays)
        if not whole:
            return 0.0
        parameter = next(
            instruction
            for instruction in inner.values()
            if instruction.op == "parameter" and instruction.attributes.startswith(f"{number})")
        )
        bytes_sliced = self.bytes_sliced(inner, parameter.name)
        return whole if bytes_sliced is None else min(bytes_sliced, whole)

    def bytes_sliced(self, inner: Computation, name: str) -> float | None:
        """Returns the bytes of all slices taken of `name`, or None if any use reads all of it."""
        total = 0.0
        for instruction in inner.values():
            if name not in instruction.operands:
                continue
            if instruction.op in ("dynamic-slice", "slice", "gather"):
                total += sum(array.bytes for array in instruction.arrays)
            elif instruction.op == "dynamic-update-slice" and instruction.operands[0] == name:
                continue  # in place
            elif self.is_view(instruction) and not instruction.root:
                below = self.bytes_sliced(inner, instruction.name)
                if below is None:
                    return None
                total += below
            elif instruction.op == "fusion" and instruction.called:
                nested = self.computations[instruction.called]
                for number, operand in enumerate(instruction.operands):
                    if operand == name:
                        parameter = next(
                            each
                            for each in nested.values()
                            if each.op == "parameter" and each.attributes.startswith(f"{number})")
                        )
                        below = self.bytes_sliced(nested, parameter.name)
                        if below is None:
                            return None
                        total += below
            else:
                return None
        return total

    def is_view(self, instruction: Instruction) -> bool:
        """Returns whether an instruction inside a fusion passes on all of its operand.

        A fusion stores nothing in between, so a copy there only names another layout. On tpu7x the
        compiler wraps such copies in fusions of their own.
        """
        if instruction.op == "fusion" and instruction.called:
            nested = self.computations[instruction.called].values()
            return all(each.op == "parameter" or self.is_view(each) for each in nested)
        return instruction.op in ("bitcast", "copy", "get-tuple-element")

    def bytes_written(self, inner: Computation, fusion: Instruction) -> float:
        """Returns the bytes that a fusion writes. An in-place update counts without its array."""
        root = next(instruction for instruction in inner.values() if instruction.root)
        results = [inner[name] for name in root.operands] if root.op == "tuple" else [root]
        total = 0.0
        for array, result in zip(fusion.arrays, results, strict=False):
            if not array.in_hbm:
                continue
            while result.op == "bitcast":
                result = inner[result.operands[0]]
            if result.op == "dynamic-update-slice":
                total += inner[result.operands[1]].arrays[0].bytes
            elif result.op == "fusion" and result.called:
                total += min(
                    self.bytes_written(self.computations[result.called], result), array.bytes
                )
            else:
                total += array.bytes
        return total

    # Collectives and copies to and from the host

    def transfers(
        self, body: Computation, instruction: Instruction
    ) -> Iterator[tuple[str, Collective | HostCopy]]:
        """Yields (channel, collective or copy) of an instruction."""
        yield from self.collectives(body, instruction)
        if instruction.op not in _FREE and (copy := self.host_copy(body, instruction)):
            yield f"copy {instruction.name}", copy

    def host_copy(self, body: Computation, instruction: Instruction) -> HostCopy | None:
        """Returns the copy between device and host that an instruction makes or starts, or None.

        A slice is written to an array in host memory, or read from one, without the rest of it.
        """
        if instruction.op.endswith(("-done", "-update")):
            return None
        update = instruction.op.startswith("dynamic-update-slice")
        read = [
            body[name].arrays for name in instruction.operands[update : update + 1] if name in body
        ]
        # The arrays of an asynchronous slice or update are (operands, result, context).
        started = instruction.op.endswith("slice-start")
        first = len(instruction.operands) if started else 0
        written = instruction.arrays[first : first + 1]
        if not (read and read[0] and written):
            return None
        source, target = read[0][0], written[0]
        if (source.space == _HOST) == (target.space == _HOST):
            return None
        size = source.bytes if update else target.bytes
        return HostCopy("to-host" if target.space == _HOST else "from-host", size)

    def collectives(
        self, body: Computation, instruction: Instruction
    ) -> Iterator[tuple[str, Collective]]:
        """Yields (channel, collective) of an instruction, or of the instructions in a fusion."""
        if instruction.op == "fusion" and instruction.called:
            inner = self.computations[instruction.called]
            # XLA compiles a reduce-scatter to an all-reduce of which each device keeps a slice.
            scatter = "all-reduce-scatter" in instruction.called
            for each in inner.values():
                for channel, collective in self.collectives(inner, each):
                    if scatter and collective.kind == "all-reduce":
                        collective = dataclasses.replace(collective, kind="reduce-scatter")
                    yield channel, collective
            return
        kind = instruction.op.removesuffix("-start")
        if kind not in _COLLECTIVES:
            return
        arrays = instruction.arrays
        if kind == "collective-permute":
            ends = tuple(_numbers(instruction.attribute("source_target_pairs") or ""))
            yield instruction.name, Collective(kind, _largest(arrays), ends)
            return
        if kind != instruction.op and kind != "all-reduce":  # (operands, results, contexts)
            operands = len(instruction.operands)
            arrays = arrays[operands : 2 * operands]
        size = sum(array.bytes for array in arrays)
        group = first_group(instruction.attribute("replica_groups") or "", instruction.attributes)
        if kind in ("reduce-scatter", "all-to-all", "ragged-all-to-all"):
            size *= len(group)
        yield (
            f"{kind} {instruction.attribute('channel_id') or instruction.name}",
            Collective(kind, size, group),
        )


def _events(schedule: Schedule) -> Iterator[tuple[Cost | Begin | End, float]]:
    """Yields (event, number of times) of a schedule and of the loops in it."""
    for event in schedule:
        if isinstance(event, Loop):
            for inner, executions in _events(event.body):
                yield inner, event.times * executions
        else:
            yield event, 1.0


def _repeated(cost: Cost, executions: float) -> Cost:
    """Returns the cost of all executions of an instruction, given that of one."""
    return dataclasses.replace(
        cost,
        flops=cost.flops * executions,
        hbm_bytes=cost.hbm_bytes * executions,
        int8_flops=cost.int8_flops * executions,
        fp8_flops=cost.fp8_flops * executions,
    )


_INT8 = frozenset({"s8", "u8"})
_FP8 = frozenset({"f8e4m3fn", "f8e5m2"})
_HOST = 5  # memory space
_ASYNC = ("call-start", "async-start")
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "iota",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "domain",
}
_COLLECTIVES = {
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
}


def _splash(products: int) -> Callable[[Instruction, list[tuple[int, ...]]], float]:
    """Returns the FLOPs of a splash attention kernel, as a function of its operands' shapes.

    The kernel does `products` matmuls of [queries, K] with [keys, K] and skips masked blocks.
    """

    def flops(instruction: Instruction, shapes: list[tuple[int, ...]]) -> float:
        # The queries are [batch, heads, T, K]; XLA drops a batch of 1.
        queries = next((shape for shape in shapes if len(shape) == 4), None)
        queries = queries or max((s for s in shapes if len(s) == 3), key=math.prod)
        batch, heads, length, width = (1, *queries)[-4:]
        # The kernel takes a list of blocks [kv, q]; under a causal mask it visits the lower half.
        mask = next(
            (s for s in shapes if len(s) == 3 and s[0] in (1, heads) and s != queries), None
        )
        blocks = mask[-1] if mask else 1
        visited = (blocks + 1) / (2 * blocks)
        return 2.0 * products * batch * heads * length * length * width * visited

    return flops


def _short(products: int) -> Callable[[Instruction, list[tuple[int, ...]]], float]:
    """Returns the FLOPs of attention over whole rows, as a function of its operands' shapes.

    The kernel does `products` matmuls of [T, heads x K] with [S, heads x K].
    """

    def flops(instruction: Instruction, shapes: list[tuple[int, ...]]) -> float:
        (rows, queries, width), (_, keys, _) = shapes[:2]
        return 2.0 * products * rows * queries * keys * width

    return flops


# FLOPs of Pallas kernels, by prefix of their name.
KERNELS: dict[str, Callable[[Instruction, list[tuple[int, ...]]], float]] = {
    short_attention.FORWARD: _short(2),
    short_attention.BACKWARD: _short(5),
    "splash_mha_fwd": _splash(2),
    "splash_mha_dkv": _splash(5),  # the fused kernel, which also computes dQ
    "splash_mha_dq": _splash(3),
}


def _convolution(instruction: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
    """Returns 2 FLOPs for each multiplication by an actual input element.

    XLA writes batched matmuls as convolutions, in which all other multiplications fall on padding
    or on the gaps of a dilation.
    """
    labels = (instruction.attribute("dim_labels") or "").split(" ")[0]
    left, right, out = re.split(r"_|->", labels)
    result = instruction.arrays[0].shape
    spatial = sorted(label for label in left if label.isdigit())
    window = _window(instruction.attribute("window") or "", len(spatial))
    # The kernel's input features already cover a single feature group.
    total = 2.0 * result[out.index("b")] * result[out.index("f")] * rhs[right.index("i")]
    total /= int(instruction.attribute("batch_group_count") or 1)
    for label, size in zip(spatial, window, strict=True):
        total *= _meetings(
            lhs[left.index(label)], rhs[right.index(label)], result[out.index(label)], **size
        )
    return total


def _window(text: str, axes: int) -> list[dict[str, int]]:
    """Returns stride, low padding and dilations along each spatial axis."""
    fields = dict(part.split("=") for part in text.strip("{}").split() if "=" in part)

    def along(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * axes

    return [
        {"stride": int(stride), "low": int(pad.split("_")[0]), "base": int(base), "kernel": int(k)}
        for stride, pad, base, k in zip(
            along("stride", "1"),
            along("pad", "0_0"),
            along("lhs_dilate", "1"),
            along("rhs_dilate", "1"),
            strict=True,
        )
    ]


def _meetings(
    size: int, taps: int, outputs: int, *, stride: int, low: int, base: int, kernel: int
) -> int:
    """Counts the pairs of an output and a tap that read an input element, along one axis."""
    position = np.arange(outputs)[:, None] * stride + np.arange(taps)[None, :] * kernel - low
    inside = (position >= 0) & (position <= (size - 1) * base) & (position % base == 0)
    return int(np.count_nonzero(inside))


def first_group(text: str, attributes: str = "") -> tuple[int, ...]:
    """Returns the first group of `replica_groups`, in any of the forms that XLA prints.

    These are `{{0,1},{2,3}}`, `[2,64]<=[64,2]T(1,0)` and `mesh['a'=2,'b'=64] ... {'b'}`.

    Raises:
        ValueError: the form is unknown.
    """
    if text.startswith("{{"):
        return tuple(map(int, text[2:].split("}")[0].split(",")))
    if match := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return tuple(_iota(match[2], match[3]).reshape(_numbers(match[1]))[0].tolist())
    if text.startswith("mesh["):
        # `text` ends at the first comma, before the device list and the axes.
        whole = attributes[attributes.index("replica_groups=") + len("replica_groups=") :]
        sizes = re.match(r"mesh\[([^\]]*)\]", whole)
        assert sizes
        axes = re.findall(r"'([^']+)'=(\d+)", sizes[1])
        devices = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", whole)
        chosen = re.search(r"\{('[^}]*)\}", whole)
        assert chosen
        names = re.findall(r"'([^']+)'", chosen[1])
        shape = [int(size) for _, size in axes]
        ids = _iota(devices[1], devices[2]) if devices else np.arange(math.prod(shape))
        grid = ids.reshape(shape)
        index = tuple(slice(None) if name in names else 0 for name, _ in axes)
        return tuple(np.asarray(grid[index]).flatten().tolist())
    raise ValueError(f"replica groups in a form that is not known: {text[:80]!r}")


def _constant(instruction: Instruction) -> int | None:
    """Returns the value of a scalar integer constant, or None."""
    match = re.match(r"(\d+)\)", instruction.attributes) if instruction.op == "constant" else None
    return int(match[1]) if match else None


def _iota(shape: str, permutation: str | None) -> Int[np.ndarray, "n"]:
    sizes = _numbers(shape)
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return (ids.transpose(_numbers(permutation)) if permutation else ids).flatten()


def _arrays(text: str) -> Iterator[HloArray]:
    for dtype, shape, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        yield HloArray(dtype, tuple(_numbers(shape)), int(space[1]) if space else 0)


def _hbm(arrays: Sequence[HloArray]) -> float:
    return sum(array.bytes for array in arrays if array.in_hbm)


def _largest(arrays: Sequence[HloArray]) -> float:
    return max((array.bytes for array in arrays), default=0.0)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _bare(name: str | None) -> str:
    assert name is not None
    return name.lstrip("%")


def _until(text: str, stop: str) -> str:
    """Returns the text before the first `stop`, or closing bracket, outside brackets and quotes."""
    depth, quoted = 0, False
    for n, c in enumerate(text):
        if c == '"' and text[n - 1] != "\\":
            quoted = not quoted
        if quoted:
            continue
        if depth == 0 and c == stop:
            return text[:n]
        depth += c in "([{"
        depth -= c in ")]}"
        if depth < 0:
            return text[:n]
    return text
