"""Compiles for NVIDIA GPUs on any machine, and reads what came out.

Two compilers are driven here:
- Triton's, through the real lowering of an op: `compile_kernels` lowers a jitted
  function for CUDA, takes each kernel's PTX out of its custom call, assembles it with
  Triton's own ptxas and reads registers, spills and instructions from the machine code.
- XLA's: `compile_programs` compiles functions of this repository for a described GPU
  (`H100`) in a child process and returns their optimised HLO and memory analysis.
"""

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.support import REPOSITORY

# The device description of an H100 as XLA's topology API wants it (a text proto).
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def expect_no_gpu() -> None:
    """Keeps an installed CUDA plugin from reporting at length that cuDNN is missing.

    To be called before jax starts, on a machine without a GPU.
    """
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def missing_for_kernels() -> str | None:
    """Why kernels cannot be compiled here, or None."""
    for module in ("triton", "jax_triton"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    if not _plugins("plugin"):
        return "no jax-cuda12-plugin or jax-cuda13-plugin is installed"
    return None


def missing_for_programs() -> str | None:
    """Why whole programs cannot be compiled here, or None."""
    if reason := missing_for_kernels():
        return reason
    if not _plugins("pjrt"):
        return "no jax-cuda12-pjrt or jax-cuda13-pjrt is installed"
    return None


def _plugins(kind: str) -> list[str]:
    module = {"plugin": "jax_cuda{}_plugin", "pjrt": "jax_plugins.xla_cuda{}"}[kind]
    names = [module.format(version) for version in (12, 13)]
    return [name for name in names if _is_importable(name)]


def _is_importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # not even its parent
        return False


# --- Triton kernels ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Loop:
    """The instructions between a label and a jump back to it.

    Attributes:
        instructions: SASS, one string each, predicates included.
    """

    instructions: tuple[str, ...]

    def accesses(self, kind: str) -> list[int]:
        """Widths in bytes of the global loads ("LDG") or stores ("STG")."""
        return _access_widths(self.instructions, kind)


@dataclasses.dataclass(frozen=True)
class MachineCode:
    """What ptxas made of one kernel.

    Attributes:
        name: of the kernel function.
        registers: per thread.
        spills: bytes stored to and loaded from local memory by spilling.
        stack: bytes of local memory per thread.
        instructions: all of them, in order.
        loops: every backward jump's body; an outer one contains the inner ones.
        threads: of the whole launch.
        ptx_version: for example "8.0".
    """

    name: str
    registers: int
    spills: int
    stack: int
    instructions: tuple[str, ...] = dataclasses.field(repr=False)
    loops: tuple[Loop, ...] = dataclasses.field(repr=False)
    threads: int
    ptx_version: str

    def accesses(self, kind: str) -> list[int]:
        """Widths in bytes of the global loads ("LDG") or stores ("STG")."""
        return _access_widths(self.instructions, kind)

    def local_accesses(self) -> int:
        """How many instructions touch local memory."""
        return sum(_opcode(i) in ("LDL", "STL") for i in self.instructions)

    def steady_loop(self) -> Loop | None:
        """The loop that filters most: loads, multiplies and stores the most bytes."""
        busy = [
            loop
            for loop in self.loops
            if loop.accesses("LDG")
            and loop.accesses("STG")
            and any(_opcode(i) in ("FFMA", "FFMA2") for i in loop.instructions)
        ]
        # Of nested loops the shortest, which is the inner one.
        return max(
            busy,
            key=lambda loop: (sum(loop.accesses("STG")), -len(loop.instructions)),
            default=None,
        )


def compile_kernels(
    function: Callable, arguments: Any, compute_capability: int, name: str
) -> list[MachineCode]:
    """Compiles kernels of `jax.jit(function)(*arguments)` for a GPU.

    Args:
        name: of the kernel function; others are left out.
        arguments: arrays or `jax.ShapeDtypeStruct`s.
        compute_capability: 80, 90, 100, …
    """
    import jax

    from jax_causal_conv import target_compute_capability
    from jax_causal_conv.kernels.lowered import lowered_kernels

    with target_compute_capability(compute_capability):
        traced = jax.jit(function).trace(*arguments)
        lowered = traced.lower(lowering_platforms=("cuda",))
    return [
        _machine_code(kernel, compute_capability)
        for kernel in lowered_kernels(lowered)
        if kernel.name == name
    ]


def _machine_code(kernel: Any, compute_capability: int) -> MachineCode:
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas

    ptxas = get_ptxas(compute_capability).path
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(kernel.ptx)
        log = _tool(ptxas, "-v", f"--gpu-name={kernel.target}", "-o", cubin, source)
        sass = _tool(knobs.nvidia.nvdisasm.path, "-c", cubin)
    instructions, loops = _parse_sass(sass)
    return MachineCode(
        name=kernel.name,
        registers=_number(r"Used (\d+) registers", log),
        spills=_number(r"(\d+) bytes spill stores", log)
        + _number(r"(\d+) bytes spill loads", log),
        stack=_number(r"(\d+) bytes stack frame", log),
        instructions=instructions,
        loops=loops,
        threads=kernel.grid * kernel.num_warps * 32,
        ptx_version=kernel.ptx_version,
    )


def _tool(*command: Any) -> str:
    run = subprocess.run(
        list(map(str, command)), check=False, capture_output=True, text=True
    )
    if run.returncode:
        raise RuntimeError(f"{command[0]} failed: {run.stderr}")
    return run.stdout + run.stderr


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"ptxas did not say {pattern!r}, but: {text}")
    return int(match.group(1))


def _parse_sass(sass: str) -> tuple[tuple[str, ...], tuple[Loop, ...]]:
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(instructions)
        elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            instructions.append(code.group(1))
    loops = []
    for at, instruction in enumerate(instructions):
        jump = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction)
        # A program ends in an instruction that jumps to itself: not a loop.
        if jump and labels.get(jump.group(1), at) < at:
            loops.append(Loop(tuple(instructions[labels[jump.group(1)] : at + 1])))
    return tuple(instructions), tuple(loops)


def _mnemonic(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def _opcode(instruction: str) -> str:
    return _mnemonic(instruction).split(".")[0]


def _access_widths(instructions: tuple[str, ...], kind: str) -> list[int]:
    """LDG.E.128 is 16 bytes, LDG.E 4, LDG.E.U16 2."""
    widths = []
    for mnemonic in map(_mnemonic, instructions):
        if mnemonic.split(".")[0] == kind:
            bits = re.search(r"\.[US]?(8|16|64|128|256)\b", mnemonic)
            widths.append(int(bits.group(1)) // 8 if bits else 4)
    return widths


# --- whole programs ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to compile whole.

    Attributes:
        function: what is jitted.
        arguments: its arguments, as `jax.ShapeDtypeStruct`s.
        caches: numbers of the arguments that hold conv states.
        layers: how many calls of an op it makes.
        mesh: axis names and sizes of a mesh of GPUs; by default one GPU.
        specs: for each argument a tree of `PartitionSpec`s; () is all replicated.
        explicit: whether the axes of the mesh are explicit or automatic.
    """

    function: Callable
    arguments: tuple
    caches: tuple[int, ...]
    layers: int
    mesh: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"gpu": 1})
    specs: tuple = ()
    explicit: bool = False


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of optimised HLO.

    Attributes:
        computation: the name of the computation it is in.
        opcode: for example "fusion".
        sizes: bytes of each array of its result.
        text: all of it.
    """

    computation: str
    opcode: str
    sizes: tuple[int, ...]
    text: str


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """What XLA made of a program.

    Attributes:
        hlo: optimised HLO, as text, of each of the GPUs.
        cache_bytes: size of each cache (of all the same size) on a GPU.
        num_caches: how many.
        layers: how many calls of an op the program makes.
        alias_bytes: of arguments whose buffers hold results.
        temp_bytes: of scratch memory.
    """

    hlo: str
    cache_bytes: int
    num_caches: int
    layers: int
    alias_bytes: int
    temp_bytes: int

    @functools.cached_property
    def instructions(self) -> list[Instruction]:
        return list(_parse_hlo(self.hlo))

    @functools.cached_property
    def entry(self) -> str:
        """The name of the computation that is the program."""
        match = re.search(r"^ENTRY %?([\w.\-]+)", self.hlo, re.MULTILINE)
        return match.group(1) if match else ""

    def kernels(self) -> list[Instruction]:
        """The Triton kernels."""
        return [i for i in self.instructions if _is_kernel(i)]

    def launches(self) -> list[Instruction]:
        """What runs on the GPU: all but the instructions that only name buffers."""
        inner = set(re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", self.hlo))
        return [
            i
            for i in self.instructions
            if i.opcode not in _NAMES_BUFFERS and i.computation not in inner
        ]

    def collectives(self) -> list[Instruction]:
        """What moves data between GPUs."""
        return [i for i in self.instructions if _is_collective(i)]

    def cache_copies(self) -> list[Instruction]:
        """Instructions, in fusions too, that make an array as large as a cache.

        A kernel that updates a cache in place is none of them, also where XLA has
        fused it with the slices that choose its arguments.
        """
        with_kernel = {f"calls=%{i.computation}," for i in self.kernels()}
        return [
            i
            for i in self.instructions
            if i.opcode not in (*_NAMES_BUFFERS, "while")
            and any(size >= self.cache_bytes for size in i.sizes)
            and not _is_kernel(i)
            and not any(call in i.text for call in with_kernel)
        ]


def _is_kernel(instruction: Instruction) -> bool:
    return (
        instruction.opcode == "custom-call" and "triton_kernel_call" in instruction.text
    )


def _is_collective(instruction: Instruction) -> bool:
    kinds = "all-|collective-|reduce-scatter|ragged-all-|send|recv"
    return re.match(kinds, instruction.opcode) is not None


_NAMES_BUFFERS = (
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "constant",
    "opt-barrier",
)
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}


def _parse_hlo(hlo: str) -> Iterator[Instruction]:
    computation = ""
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = header.group(1)
        elif found := re.match(
            r"\s+(?:REPOSITORY )?%?[\w.\-]+ = (.*?) ([a-z\-]+)\(", line
        ):
            yield Instruction(
                computation, found.group(2), _array_sizes(found.group(1)), line.strip()
            )


def _array_sizes(shape: str) -> tuple[int, ...]:
    """Bytes of each array in a shape such as `(bf16[8,4]{1,0}, s32[])`."""
    sizes = []
    for dtype, dims in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", shape):
        bits = _BITS[dtype] if dtype in _BITS else int(re.sub(r"\D", "", dtype)[:2])
        sizes.append(math.prod(int(d) for d in dims.split(",") if d) * bits // 8)
    return tuple(sizes)


def compile_programs(
    module: str, names: Iterable[str], donate: Iterable[bool] = (True, False)
) -> dict[tuple[str, bool], CompiledProgram]:
    """Compiles `getattr(module, name)()`, each a `Program`, for H100s.

    In one child process, since jax must start without its GPU for that.

    Args:
        module: importable from the root of the repository.
        names: of functions that return a `Program`; "f-a-b" is `f("a", "b")`.
        donate: whether to compile with caches donated, with caches kept, or both.

    Returns:
        For each (name, donated?) the compiled program, its caches donated or not.
    """
    ways = [("keep", "donate")[way] for way in donate]
    command = [sys.executable, "-m", "tests.support.gpu_compiler", module, *names]
    command += [f"--{way}" for way in ways]
    run = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | _child_environment(),
    )
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {run.stderr[-4000:]}")
    results = [json.loads(line) for line in run.stdout.splitlines()]
    return {(name, donate): CompiledProgram(**p) for name, donate, p in results}


def _child_environment() -> dict[str, str]:
    from triton.backends.nvidia.compiler import get_ptxas

    # XLA assembles the kernels itself, with the first ptxas on PATH. Triton's own is
    # put there, so that the test does not depend on a CUDA toolkit.
    tools = str(Path(get_ptxas(90).path).parent)
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "PATH": os.pathsep.join([tools, os.environ.get("PATH", "")]),
    }


def _compile_here(program: Program, donate: bool) -> CompiledProgram:
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    shape = "x".join(map(str, (1, 1, math.prod(program.mesh.values()))))
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name=shape,
        topology=shape,
        target_config=H100,
    )
    devices = np.array(topology.devices).reshape(*program.mesh.values())
    kind = AxisType.Explicit if program.explicit else AxisType.Auto
    mesh = Mesh(devices, tuple(program.mesh), axis_types=(kind,) * len(program.mesh))

    def sharded(array, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    specs = program.specs or jax.tree.map(lambda _: PartitionSpec(), program.arguments)
    arguments = jax.tree.map(sharded, program.arguments, specs)
    donated = program.caches if donate else ()
    jitted = jax.jit(program.function, donate_argnums=donated)
    compiled = jitted.lower(*arguments).compile()
    memory = compiled.memory_analysis()
    caches = jax.tree.leaves([arguments[i] for i in program.caches])
    sizes = {
        math.prod(c.sharding.shard_shape(c.shape)) * c.dtype.itemsize for c in caches
    }
    (cache_bytes,) = sizes or {0}
    return CompiledProgram(
        hlo=compiled.as_text(),
        cache_bytes=cache_bytes,
        num_caches=len(caches),
        layers=program.layers,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compiles programs; prints JSON.")
    parser.add_argument("module")
    parser.add_argument("names", nargs="+")
    parser.add_argument("--donate", action="store_true", help="with caches donated")
    parser.add_argument("--keep", action="store_true", help="with caches kept")
    arguments = parser.parse_args()
    module = importlib.import_module(arguments.module)
    ways = [way for way in (True, False) if (arguments.keep, arguments.donate)[way]]
    for name in arguments.names:
        function, *values = name.split("-")
        program = getattr(module, function)(*values)
        for donate in ways:
            compiled = _compile_here(program, donate)
            print(json.dumps([name, donate, dataclasses.asdict(compiled)]))


if __name__ == "__main__":
    main()
