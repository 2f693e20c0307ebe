"""Compiles whole programs for NVIDIA GPUs on any machine, and reads what came out.

`compile_programs` compiles functions of this repository for a described GPU (`H100`) by
XLA, in a child process, and returns their optimised HLO and memory analysis. Single
kernels are compiled by `benchmarks.machine_code`.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from benchmarks.machine_code import is_importable, missing_for_kernels
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


def missing_for_programs() -> str | None:
    """Why whole programs cannot be compiled here, or None."""
    if reason := missing_for_kernels():
        return reason
    plugins = [f"jax_plugins.xla_cuda{version}" for version in (12, 13)]
    if not any(map(is_importable, plugins)):
        return "no jax-cuda12-pjrt or jax-cuda13-pjrt is installed"
    return None


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
        cache_bytes: size of each cache on a GPU; of the largest, if they differ.
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
        elif found := re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z\-]+)\(", line):
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
    return CompiledProgram(
        hlo=compiled.as_text(),
        cache_bytes=max(sizes, default=0),
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
