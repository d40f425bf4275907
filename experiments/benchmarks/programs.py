"""Compile programs for accelerators that are not here, and read what they would run.

    mesh = h100_mesh()
    program = compile_for(lambda a: jax.lax.fori_loop(0, 9, lambda _, z: a * z, a), abstract(mesh, (64, 512)))
    [loop] = loops(read(program.as_text()))
    len(loop.body), moved_bytes(loop)  # kernels of a round, and the bytes that they read and write

An H100 needs jax's CUDA plugin with NVIDIA's compilers (`constraints-gpu.txt`), a TPU needs libtpu; neither needs the
device. Nothing is run, so the figures are exact, and the same on every machine. No kernel is tuned, which would need a
GPU, and products go to cuBLAS, whose workspace of 32 MiB is then part of the temporaries.
"""

import collections
import contextlib
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# ---- compiling ---------------------------------------------------------------------------------------------

# As the driver describes an H100 with 80 GB.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
UNTUNED = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
# The machine to compile for, with no metadata server to ask and no other host to look for.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def missing(*modules: str) -> list[str]:
    """Those of the modules that are not installed."""
    return [module for module in modules if importlib.util.find_spec(module) is None]


def versions(*distributions: str) -> dict[str, str]:
    """Of those distributions that are installed."""
    found = {}
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def h100_mesh(shape: tuple[int, ...] = (1,), names: tuple[str, ...] = ("data",), hosts: int = 1) -> Mesh:
    """A mesh of H100s in one host or several. JAX's own platform has to be the CPU (`JAX_PLATFORMS=cpu`)."""
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # cuDNN, say, which only running needs
    options: Any = {"target_config": H100, "topology": f"1x{hosts}x{math.prod(shape) // hosts}"}
    return topologies.make_mesh(topologies.get_topology_desc(platform="cuda", **options), shape, names)


def v5e_mesh(shape: tuple[int, ...] = (1,), names: tuple[str, ...] = ("data",)) -> Mesh:
    """A mesh of the first chips of a TPU v5e 2×4, in a process whose environment has TPU_ENVIRONMENT."""
    chips = topologies.get_topology_desc("v5e:2x4", platform="tpu").devices
    return Mesh(np.array(chips[: math.prod(shape)]).reshape(shape), names)


def v5p_mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> Mesh:
    """A mesh of 8, 64 or 256 chips of a TPU v5p, likewise."""
    topology = {8: "2x2x2", 64: "4x4x4", 256: "4x8x8"}[math.prod(shape)]
    return topologies.make_mesh(topologies.get_topology_desc(f"v5p:{topology}", platform="tpu"), shape, names)


def abstract(mesh: Mesh, shape: tuple[int, ...], spec: PartitionSpec = PartitionSpec()) -> jax.ShapeDtypeStruct:  # noqa: B008
    """A float32 argument on the mesh, replicated where nothing else is said."""
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))


def compile_for(f: Callable, *args: jax.ShapeDtypeStruct) -> Any:
    """The compiled program of `f` for the devices of the arguments' mesh."""
    device = next(iter(args[0].sharding.device_set))
    return jax.jit(f).lower(*args).compile({} if device.platform == "tpu" else UNTUNED)


# ---- reading -----------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    name: str
    opcode: str
    shape: str  # of the result, as text
    operands: tuple[str, ...]
    attributes: str  # all that stands after the operands
    is_root: bool


Computation = dict[str, Instruction]


class Module(NamedTuple):
    computations: dict[str, Computation]
    entry: str


class Kernel(NamedTuple):
    """An instruction that is launched by itself, and where its operands and the computation it calls are found."""

    instruction: Instruction
    scope: Computation
    module: Module


class Loop(NamedTuple):
    """A while loop. A round runs `test` and `body`, in which both branches of every conditional are."""

    op_name: str  # where it is in the JAX program
    depth: int  # 1 for an outermost loop
    trips: int | None  # how many rounds, where the compiler knows
    body: list[Kernel]
    test: list[Kernel]
    inner: list["Loop"]


HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\((.*?)\)(?:, (.*))?$")


def read(text: str) -> Module:
    """The computations of a compiled program (`program.as_text()`)."""
    computations, entry, name = {}, "", ""
    for line in text.splitlines():
        line = re.sub(r"/\*.*?\*/", "", line)  # /*index=5*/
        if head := HEAD.match(line):
            name = head[2]
            computations[name] = {}
            entry = name if head[1] else entry
        elif line.startswith("}"):
            name = ""
        elif name and (m := LINE.match(line)):
            operands = tuple(re.findall(r"%([\w.\-]+)", m[5]))
            computations[name][m[2]] = Instruction(m[2], m[4], m[3], operands, m[6] or "", bool(m[1]))
    return Module(computations, entry)


# Nothing is launched for these. The second half of an asynchronous pair only waits.
FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "partition-id", "replica-id"}
CONTAINERS = {"while", "call"}


def is_kernel(instruction: Instruction) -> bool:
    opcode = instruction.opcode
    return opcode not in FREE and opcode not in CONTAINERS and not opcode.endswith("-done")


def launched(module: Module, name: str) -> Iterator[Instruction | Kernel]:
    """The kernels of a computation, those of what it calls and of its branches included, and its while loops."""
    scope = module.computations.get(name, {})
    for instruction in scope.values():
        if instruction.opcode == "while":
            yield instruction
        elif is_kernel(instruction):
            yield Kernel(instruction, scope, module)
        if instruction.opcode in ("call", "conditional"):
            for called in called_computations(instruction):
                yield from launched(module, called)


def called_computations(instruction: Instruction) -> list[str]:
    """The computations that a call, a conditional, a fusion or an asynchronous start runs."""
    one = re.findall(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", instruction.attributes)
    several = re.findall(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    return one + [name.strip().lstrip("%") for names in several for name in names.split(",")]


def loops(module: Module, name: str | None = None, depth: int = 1) -> list[Loop]:
    """The outermost while loops of a program, or of one of its computations, in the order in which they run."""
    found = launched(module, module.entry if name is None else name)
    return [make_loop(module, item, depth) for item in found if isinstance(item, Instruction)]


def make_loop(module: Module, instruction: Instruction, depth: int) -> Loop:
    attribute = lambda pattern: (re.search(pattern, instruction.attributes) or ["", ""])[1]
    body, test = attribute(r"body=%?([\w.\-]+)"), attribute(r"condition=%?([\w.\-]+)")
    trips = attribute(r'"known_trip_count":\{"n":"(\d+)"')
    kernels = lambda name: [item for item in launched(module, name) if isinstance(item, Kernel)]
    return Loop(
        op_name=attribute(r'op_name="([^"]*)"'),
        depth=depth,
        trips=int(trips) if trips else None,
        body=kernels(body),
        test=kernels(test),
        inner=loops(module, body, depth + 1),
    )


def nested(loop: Loop) -> list[Loop]:
    """All loops inside, at any depth."""
    return [deeper for inner in loop.inner for deeper in (inner, *nested(inner))]


def kinds(loop: Loop) -> dict[str, int]:
    """How many kernels of a round are of which kind, the most frequent first."""
    return dict(collections.Counter(kind(kernel.instruction) for kernel in loop.body).most_common())


def kind(instruction: Instruction) -> str:
    pattern = {"fusion": r"kind=(k\w+)", "custom-call": r'custom_call_target="([^"]*)"'}.get(instruction.opcode)
    found = pattern and re.search(pattern, instruction.attributes)
    return f"{instruction.opcode} {found[1]}" if found else instruction.opcode


def op_names(kernel: Kernel) -> list[str]:
    """Where what a kernel computes stands in the JAX program."""
    instructions = fused(kernel).values() if kernel.instruction.opcode == "fusion" else [kernel.instruction]
    return [found[1] for i in instructions if (found := re.search(r'op_name="([^"]*)"', i.attributes))]


def conditionals(loop: Loop) -> int:
    """Branches that the host takes in a round: each waits for a predicate."""
    return sum(kernel.instruction.opcode == "conditional" for kernel in loop.body)


# ---- bytes -------------------------------------------------------------------------------------------------


def size(shape: str) -> int:
    """Bytes of all arrays in a shape.

    >>> size("(f32[4,8]{1,0}, pred[4]{0}, bf16[])")
    134
    """
    return sum(array_sizes(shape))


def array_sizes(shape: str) -> list[int]:
    arrays = re.findall(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", shape)
    elements = [math.prod(int(d) for d in dims.split(",") if d) for _, _, dims in arrays]
    return [math.ceil(n * int(bits or 8) / 8) for n, (_, bits, _) in zip(elements, arrays, strict=True)]


def workspace_bytes(module: Module) -> int:
    """The workspace of cuBLAS in the temporaries: one, which its calls share."""
    calls = [i for computation in module.computations.values() for i in computation.values() if is_cublas(i)]
    return max((sum(array_sizes(call.shape)[1:]) for call in calls), default=0)


def is_cublas(instruction: Instruction) -> bool:
    return instruction.opcode == "custom-call" and "__cublas" in instruction.attributes


def copies(loop: Loop, at_least: int) -> int:
    """Kernels of a round, inner loops included, that only copy or transpose `at_least` bytes."""
    kernels = [kernel for each in (loop, *nested(loop)) for kernel in each.body]
    return sum(is_copy(kernel) and size(kernel.instruction.shape) >= at_least for kernel in kernels)


COPIES = {"copy", "copy-start", "transpose"}


def is_copy(kernel: Kernel) -> bool:
    if kernel.instruction.opcode != "fusion":
        return kernel.instruction.opcode in COPIES
    return {i.opcode for i in fused(kernel).values()} - FREE in ({"copy"}, {"transpose"})


def fused(kernel: Kernel) -> Computation:
    [name] = called_computations(kernel.instruction)
    return kernel.module.computations[name]


def moved_bytes(loop: Loop) -> int:
    """Bytes that the kernels of a round read and write at most.

    Each kernel moves its operands and its result whole, except slices: see `kernel_bytes`. Both branches of a
    conditional count. So do the rounds of an inner loop, of which one counts where `trips` is not known.
    """
    own = sum(kernel_bytes(kernel) for kernel in loop.body + loop.test)
    return own + sum((inner.trips or 1) * moved_bytes(inner) for inner in loop.inner)


SLICES = {"dynamic-slice", "slice", "gather"}


def kernel_bytes(kernel: Kernel) -> int:
    """Bytes that a kernel reads and writes at most: of what it slices the slice, of what it updates the update."""
    instruction, scope, _ = kernel
    operands = [size(scope[name].shape) for name in instruction.operands if name in scope]
    match instruction.opcode:
        case "conditional":
            return 0
        case "fusion":
            return fusion_bytes(fused(kernel))
        case "dynamic-update-slice":
            return 2 * operands[1]
        case opcode if opcode in SLICES:
            return 2 * size(instruction.shape)
        case _ if is_cublas(instruction):
            return sum(operands) + array_sizes(instruction.shape)[0]
        case "copy-start":  # its result names source and target, and a context
            return 2 * sum(operands)
    return sum(operands) + size(instruction.shape)


def fusion_bytes(computation: Computation) -> int:
    """A root that writes a slice into a parameter does so in place: the compiler has put a copy before it if not."""
    [root] = [i for i in computation.values() if i.is_root]
    outputs = [source(computation, name) for name in root.operands] if root.opcode == "tuple" else [root]
    outputs = [source(computation, output.name) if output.opcode == "bitcast" else output for output in outputs]
    in_place = {output.name for output in outputs if updates_parameter(computation, output)}
    written = sum(size(update_shape(computation, o) if o.name in in_place else o.shape) for o in outputs)
    parameters = [i for i in computation.values() if i.opcode == "parameter"]
    return written + sum(bytes_read(computation, parameter, in_place) for parameter in parameters)


def source(computation: Computation, name: str) -> Instruction:
    """The instruction behind any bitcasts."""
    instruction = computation[name]
    return source(computation, instruction.operands[0]) if instruction.opcode == "bitcast" else instruction


def updates_parameter(computation: Computation, output: Instruction) -> bool:
    is_update = output.opcode == "dynamic-update-slice"
    return is_update and source(computation, output.operands[0]).opcode == "parameter"


def update_shape(computation: Computation, update: Instruction) -> str:
    return computation[update.operands[1]].shape


def bytes_read(computation: Computation, value: Instruction, in_place: set[str]) -> int:
    """Of a parameter: its slices where every use is one, nothing where it is updated in place, else all of it."""
    total = 0
    for user in computation.values():
        if value.name not in user.operands:
            continue
        first = user.operands[0] == value.name
        if user.opcode == "bitcast":
            total += bytes_read(computation, user, in_place)
        elif first and user.opcode in SLICES:
            total += size(user.shape)
        elif not (first and user.name in in_place):
            return size(value.shape)
    return min(total, size(value.shape))


# ---- collectives -------------------------------------------------------------------------------------------

COLLECTIVES = ("all-gather", "all-to-all", "all-reduce", "reduce-scatter", "collective-permute", "collective-broadcast")


def collectives(loop: Loop) -> list[tuple[str, int]]:
    """(what, bytes of the result) of each collective of a round: the test's, the body's and, once, inner loops'."""
    kernels = [kernel for each in (loop, *nested(loop)) for kernel in each.test + each.body]
    return [found for kernel in kernels for found in collectives_of(kernel)]


def collectives_of(kernel: Kernel) -> Iterator[tuple[str, int]]:
    """The kernel itself, if it is one, or those that it fuses or starts."""
    for each in collective_kernels(kernel):
        yield each.instruction.opcode.removesuffix("-start"), size(result_shape(each))


def collective_kernels(kernel: Kernel) -> Iterator[Kernel]:
    """Likewise, as kernels."""
    if kernel.instruction.opcode.removesuffix("-start") in COLLECTIVES:
        yield kernel
    elif kernel.instruction.opcode in ("fusion", "async-start"):
        yield from (each for inner in computed(kernel) for each in collective_kernels(inner))


def computed(kernel: Kernel) -> Iterator[Kernel]:
    """The instructions of what a kernel fuses or starts."""
    instruction, _, module = kernel
    for name in called_computations(instruction):
        yield from (Kernel(i, module.computations[name], module) for i in module.computations[name].values())


def result_shape(kernel: Kernel) -> str:
    """The shape of what an asynchronous pair returns: that of its start holds the operand too."""
    name, opcode = kernel.instruction[:2]
    ends = [i for i in kernel.scope.values() if name in i.operands and i.opcode.endswith("-done")]
    return ends[0].shape if opcode.endswith("-start") and ends else kernel.instruction.shape
