"""What a compiled training step computes, moves and sends on each device, and the least time that this takes.

The text of a program says what runs, and how often except for the loops of a solver, whose rounds are given. A kernel
takes as long as its products at the peak of their precision, or its bytes at the bandwidth of memory, whichever is
longer. A collective takes as long as a ring at the bandwidth of the slowest link that it crosses, and nothing hides it.

    items = cost(program.as_text(), H100, forward=30, backward=35)
    sum(item.seconds for item in items)
"""

import itertools
import json
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks import kernels, programs
from experiments.benchmarks.programs import Instruction, Kernel, Module
from experiments.training.utilization import PEAKS


class Machine(NamedTuple):
    """Published figures of a device, per second and in each direction; `latency` of a hop is assumed."""

    name: str
    source: str
    memory: float  # bytes
    memory_bandwidth: float
    peak: dict[str, float]  # of dense products, in operations
    link: float  # bytes a device sends to others of its host, or along one axis of a torus
    network: float  # to other hosts
    host: int  # devices
    latency: float = 5e-6  # seconds


# float32 products at the default precision are TF32 on an H100 and one pass of bfloat16 on a TPU.
H100 = Machine(
    "H100",
    "NVIDIA H100 datasheet, SXM: 3.35 TB/s of HBM3; dense TF32 494.7, bfloat16 989.4, float32 66.9 TFLOP/s; NVLink "
    "900 GB/s in both directions together; one ConnectX-7 of 400 Gb/s a GPU, as in a DGX H100",
    memory=80e9,
    memory_bandwidth=3.35e12,
    peak=dict(zip(("bf16", "f32"), PEAKS["NVIDIA H100"], strict=True)) | {"highest": 66.9e12},
    link=450e9,
    network=50e9,
    host=8,
)
V5P = Machine(
    "TPU v5p",
    "Google Cloud documentation, TPU v5p: 95 GB and 2,765 GB/s of HBM; 459 TFLOP/s in bfloat16; 4,800 Gb/s between "
    "chips, of which a ring has one of three axes; float32 at the highest precision is six passes",
    memory=95e9,
    memory_bandwidth=2.765e12,
    peak=dict(zip(("bf16", "f32"), PEAKS["TPU v5"], strict=True)) | {"highest": 459e12 / 6},
    link=200e9,
    network=200e9,
    host=10**9,
)


class Item(NamedTuple):
    """One kernel of a step, or one collective, on each device."""

    place: str  # "f": in an evaluation of f; "solver": elsewhere in a solver's round; "step": outside of the solves
    way: str  # "forward" or "backward" solve, or ""
    times: int  # how often a step runs it
    flops: float  # each time, of products alone
    moved: float  # bytes that it reads and writes
    what: str  # the collective; "": a kernel
    sent: float  # bytes of its result
    group: int  # devices
    seconds: float  # each time


class Around(NamedTuple):
    """Where the walk through a program is."""

    way: str = ""
    times: int = 1


class Walk(NamedTuple):
    module: Module
    machine: Machine
    rounds: dict[str, int]  # of the forward and of the backward solve
    devices: int

    def computation(self, name: str, around: Around) -> Iterator[Item]:
        scope = self.module.computations.get(name, {})
        for instruction in scope.values():
            if instruction.opcode == "while":
                yield from self.loop(instruction, around)
            elif instruction.opcode == "call":
                [called] = programs.called_computations(instruction)
                yield from self.computation(called, around)
            elif instruction.opcode == "conditional":
                branches = map(list, (self.computation(c, around) for c in programs.called_computations(instruction)))
                yield from max(branches, key=lambda items: sum(item.seconds * item.times for item in items))
            elif programs.is_kernel(instruction):
                yield from self.kernel(Kernel(instruction, scope, self.module), around)

    def loop(self, instruction: Instruction, around: Around) -> Iterator[Item]:
        loop, rounds = programs.make_loop(self.module, instruction, 1), 1
        solves = [each for each in (loop, *programs.nested(loop)) if kernels.calls_f(each)]
        if solves and not around.way:
            around = around._replace(way="backward" if "backward_solve" in loop.op_name else "forward")
        if loop in solves:
            rounds = self.rounds[around.way]
        elif loop.trips is not None and not solves:
            rounds = loop.trips
        around = around._replace(times=around.times * rounds)
        for part in ("condition", "body"):
            [name] = re.findall(rf"{part}=%?([\w.\-]+)", instruction.attributes)
            yield from self.computation(name, around)

    def kernel(self, kernel: Kernel, around: Around) -> Iterator[Item]:
        in_f = around.way and any("/f/" in text for text in op_names(kernel))
        at: Any = dict(place="f" if in_f else "solver" if around.way else "step", way=around.way, times=around.times)
        sending = list(programs.collective_kernels(kernel))
        for each in sending:
            what, sent = each.instruction.opcode.removesuffix("-start"), programs.size(programs.result_shape(each))
            group = members(each.instruction.attributes, self.devices)
            seconds = collective_seconds(self.machine, what, sent, group)
            yield Item(**at, flops=0, moved=0, what=what, sent=sent, group=len(group), seconds=seconds)
        if not sending:
            products = list(products_of(kernel))
            flops, moved = sum(flops for flops, _ in products), programs.kernel_bytes(kernel)
            busy = sum(flops / self.machine.peak[precision] for flops, precision in products)
            seconds = max(busy, moved / self.machine.memory_bandwidth)
            yield Item(**at, flops=flops, moved=moved, what="", sent=0, group=1, seconds=seconds)


def cost(text: str, machine: Machine, *, forward: int, backward: int, devices: int = 1) -> list[Item]:
    """The items of a step whose solves make so many evaluations; of a conditional, the branch that takes longest."""
    module = programs.read(text)
    rounds = {"forward": forward, "backward": backward}
    return list(Walk(module, machine, rounds, devices).computation(module.entry, Around()))


def op_names(kernel: Kernel) -> list[str]:
    return (
        programs.op_names(kernel)
        if kernel.instruction.opcode in ("fusion", "custom-call")
        else [found[1] for found in [re.search(r'op_name="([^"]*)"', kernel.instruction.attributes)] if found]
    )


# ---- products ----------------------------------------------------------------------------------------------


def products_of(kernel: Kernel) -> Iterator[tuple[float, str]]:
    """(operations, precision) of the products that a kernel computes."""
    inner = programs.computed(kernel) if kernel.instruction.opcode == "fusion" else [kernel]
    for instruction, scope, _ in inner:
        contracted = contracted_axes(instruction)
        if contracted is None:
            continue
        left = dims(scope[instruction.operands[0]].shape)
        result = math.prod(dims(instruction.shape))
        highest = re.search(r'operand_precision(?:=\{|":\[")(?i:highest)', instruction.attributes)
        kind = "bf16" if scope[instruction.operands[0]].shape.startswith("bf16") else "f32"
        yield 2.0 * result * math.prod(left[axis] for axis in contracted), "highest" if highest else kind


def contracted_axes(instruction: Instruction) -> list[int] | None:
    """Of the left operand; None where the instruction is no product."""
    if instruction.opcode == "dot":
        [axes] = re.findall(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        return [int(axis) for axis in axes.split(",") if axis]
    if programs.is_cublas(instruction):
        [axes] = re.findall(r'"lhs_contracting_dimensions":(\[[^\]]*\])', instruction.attributes)
        return [int(axis) for axis in json.loads(axes)]
    return None


def dims(shape: str) -> list[int]:
    """Of the first array in a shape.

    >>> dims("(f32[209,175]{1,0}, s8[33554432]{0})")
    [209, 175]
    """
    found = re.search(r"\[([\d,]*)\]", shape)
    return [int(d) for d in found[1].split(",") if d] if found else []


# ---- collectives -------------------------------------------------------------------------------------------


def collective_seconds(machine: Machine, what: str, sent: float, group: list[int]) -> float:
    """A ring over the group's devices; those of a host use all of their network links together."""
    n = len(group)
    if n < 2:
        return 0.0
    in_a_host = [device for device in group if device // machine.host == group[0] // machine.host]
    bandwidth = machine.link
    if len(in_a_host) < n:
        bandwidth = min(bandwidth, len(in_a_host) * machine.network)
    share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1.0}.get(what, (n - 1) / n)
    return share * sent / bandwidth + machine.latency * math.ceil(math.log2(n))


def members(attributes: str, devices: int) -> list[int]:
    """The devices of the first of a collective's groups, which are alike.

    >>> members("replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, a=b", 8), members("replica_groups=[4,2]<=[8]", 8)
    ([0, 1, 2, 3], [0, 1])
    >>> members("replica_groups=[4,2]<=[2,4]T(1,0)", 8), members("replica_groups={{0,2},{1,3}}", 4)
    ([0, 4], [0, 2])
    """
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", attributes):
        return [int(device) for device in found[1].split(",") if device]
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]*)\](?:T\(([\d,]*)\))?", attributes):
        shape = [int(n) for n in found[3].split(",")]
        axes = [int(axis) for axis in found[4].split(",")] if found[4] else None
        return np.arange(math.prod(shape)).reshape(shape).transpose(axes).reshape(int(found[1]), -1)[0].tolist()
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        return along_axes(found[1], found[2])
    return list(range(devices))


def along_axes(mesh: str, axes: str) -> list[int]:
    """The devices that differ from the first along some axes, or along parts of them as in 'data':(2)4."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    below = dict(zip(sizes, np.cumprod([1, *reversed(sizes.values())])[-2::-1].tolist(), strict=True))
    steps = []
    for name, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes):
        size = int(part) if part else sizes[name]
        stride = below[name] * (sizes[name] // (int(before) * size) if part else 1)
        steps.append([stride * i for i in range(size)])
    return sorted(sum(offsets) for offsets in itertools.product(*steps))
