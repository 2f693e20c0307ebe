"""What NVIDIA's assembler makes of Triton kernels, read on any machine.

`compile_kernels` lowers a function for CUDA as jax would, takes each kernel's PTX out
of its custom call, assembles it with Triton's own ptxas, and reads registers, spills
and instructions from the machine code.
"""

import dataclasses
import functools
import importlib
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jax_causal_conv import target_compute_capability


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
    if not any(is_importable(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return "no jax-cuda12-plugin or jax-cuda13-plugin is installed"
    return None


def is_importable(name: str) -> bool:
    """Whether there is such a module, though it be inside a package that is absent."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # not even its parent
        return False


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
    """What ptxas made of one kernel. It is disassembled when it is first read.

    Attributes:
        name: of the kernel function.
        registers: per thread.
        spills: bytes stored to and loaded from local memory by spilling.
        stack: bytes of local memory per thread.
        cubin: the code.
        threads: of the whole launch.
        ptx_version: for example "8.0".
    """

    name: str
    registers: int
    spills: int
    stack: int
    cubin: bytes = dataclasses.field(repr=False)
    threads: int
    ptx_version: str

    @property
    def instructions(self) -> tuple[str, ...]:
        """All of them, in order."""
        return self._sass[0]

    @property
    def loops(self) -> tuple[Loop, ...]:
        """Every backward jump's body; an outer one contains the inner ones."""
        return self._sass[1]

    @functools.cached_property
    def _sass(self) -> tuple[tuple[str, ...], tuple[Loop, ...]]:
        from triton import knobs  # noqa: PLC0415 (Triton is optional)

        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(self.cubin)
            return _parse_sass(_tool(knobs.nvidia.nvdisasm.path, "-c", file.name))

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
    function: Callable, arguments: Any, compute_capability: int
) -> list[MachineCode]:
    """Compiles the kernels of `jax.jit(function)(*arguments)` for a GPU.

    Args:
        function: calls ops of this package.
        arguments: arrays or `jax.ShapeDtypeStruct`s.
        compute_capability: 80, 90, 100, …

    Returns:
        The kernels, in the order of the program.
    """
    with target_compute_capability(compute_capability):
        traced = jax.jit(function).trace(*arguments)
        lowered = traced.lower(lowering_platforms=("cuda",))
    return [
        _machine_code(kernel, compute_capability)
        for kernel in _package_lowered().lowered_kernels(lowered)
    ]


def _package_lowered() -> Any:
    """The package's `lowered`, also of a commit that had it among the ops.

    `compare_sass` compiles older commits of the package with today's benchmarks.
    """
    try:
        return importlib.import_module("jax_causal_conv.kernels.lowered")
    except ModuleNotFoundError:
        return importlib.import_module("jax_causal_conv.lowered")


def _machine_code(kernel: Any, compute_capability: int) -> MachineCode:
    # Triton is optional.
    from triton.backends.nvidia.compiler import get_ptxas  # noqa: PLC0415 (Triton is optional)

    ptxas = get_ptxas(compute_capability).path
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(kernel.ptx)
        log = _tool(ptxas, "-v", f"--gpu-name={kernel.target}", "-o", cubin, source)
        code = cubin.read_bytes()
    return MachineCode(
        name=kernel.name,
        registers=_number(r"Used (\d+) registers", log),
        spills=_number(r"(\d+) bytes spill stores", log)
        + _number(r"(\d+) bytes spill loads", log),
        stack=_number(r"(\d+) bytes stack frame", log),
        cubin=code,
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
