"""Compares the machine code of the kernels of two commits, without a GPU.

    python -m benchmarks.compare_sass OLD NEW [--cc 80 90 100] [--kernel NAME ...]

compiles every case of `kernel_report` with the package as it is in OLD and in NEW, each
a git revision or the root of a working tree, and prints a line for each kernel: that
the code is the same, or registers, spills and instructions per output before and after.
The exit status is 1 if any of these is worse in NEW, or a kernel is missing or fails.

Each side is compiled by a process of its own, which imports that side's package and
this tree's benchmarks; the cases need nothing of the package but its public ops. The
results are kept in the system's temporary folder, under a hash of what they depend on.
"""

import argparse
import concurrent.futures
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import jax_causal_conv
from benchmarks import kernel_report, machine_code

REPOSITORY = Path(__file__).parents[1]
CACHE = Path(tempfile.gettempdir(), "jax-causal-conv-sass")
_PACKAGE = "jax_causal_conv"
_VERSIONS = ("jax", "jaxlib", "jax-triton", "triton")
# What the results depend on beside the package.
_SOURCES = ("compare_sass.py", "kernel_report.py", "machine_code.py", "model_shapes.py")


@dataclass(frozen=True)
class Code:
    """A kernel's machine code, as far as it is compared.

    Attributes:
        kernel: name of the function.
        registers: per thread.
        spills: bytes stored to and loaded from local memory by spilling.
        stack: bytes of local memory per thread.
        local: how many instructions touch local memory.
        per_output: instructions per output, as `kernel_report` counts them.
        sass: all instructions.
    """

    kernel: str
    registers: int
    spills: int
    stack: int
    local: int
    per_output: float
    sass: tuple[str, ...]

    @property
    def figures(self) -> tuple[float, ...]:
        """What must not grow."""
        return self.registers, self.spills, self.stack, self.local, self.per_output


def same(old: Code, new: Code) -> str:
    """In what sense two kernels are the same; empty if in none.

    Operands of a kernel lie in its constant bank in the order of its parameters, which
    says nothing about its work: their addresses may differ.
    """
    if old.sass == new.sass:
        return "identical"
    if _without_operands(old.sass) == _without_operands(new.sass):
        return "identical but for the order of its operands"
    return ""


def _without_operands(sass: tuple[str, ...]) -> list[str]:
    return [re.sub(r"c\[0x0\]\[[^]]*\]", "c[0x0][…]", line) for line in sass]


# ---- The two sides ---------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """One case, compiled for one model and GPU."""

    case: str
    model: str
    compute_capability: int


def keys(compute_capabilities: list[int], kernels: list[str]) -> list[Key]:
    """All that is to be compiled."""
    return [
        Key(case.name, model.name, capability)
        for case in kernel_report.KERNELS
        if case.name in kernels
        for model in case.models
        for capability in compute_capabilities
    ]


def compile_here(wanted: list[Key]) -> Iterator[tuple[Key, list[Code] | str]]:
    """All kernels of each case, in the order of its program, or what went wrong."""
    cases = {case.name: case for case in kernel_report.KERNELS}
    for key in wanted:
        case = cases[key.case]
        (model,) = [m for m in case.models if m.name == key.model]
        try:
            function, arguments, outputs = case.build(model)
            capability = key.compute_capability
            yield (
                key,
                [
                    _code(kernel_report.measure(case, model, capability, outputs, made))
                    for made in machine_code.compile_kernels(
                        function, arguments, capability
                    )
                ],
            )
        except Exception as error:  # a commit may be broken in any way
            yield key, f"{type(error).__name__}: {str(error)[:300]}"


def _code(row: kernel_report.Row) -> Code:
    code = row.code
    return Code(
        code.name,
        code.registers,
        code.spills,
        code.stack,
        code.local_accesses(),
        row.per_output,
        code.instructions,
    )


def serve() -> None:
    """The process of one side: its keys come by stdin, a line leaves for each."""
    found = Path(jax_causal_conv.__file__).parent
    if found != Path(sys.path[0], _PACKAGE):
        raise SystemExit(f"imported {found} instead of the one in {sys.path[0]}")
    wanted = [Key(**fields) for fields in json.load(sys.stdin)]
    for key, result in compile_here(wanted):
        made = result if isinstance(result, str) else [asdict(code) for code in result]
        print(json.dumps([asdict(key), made]), flush=True)


def compile_side(place: str, wanted: list[Key]) -> dict[Key, list[Code] | str]:
    """Compiles the package of a revision or working tree, where it has not been yet."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        _put_package(place, folder)
        kept = CACHE / f"{_digest(folder / _PACKAGE)}.json"
        lines = kept.read_text().splitlines() if kept.exists() else []
        known = dict(map(_read, lines))
        if missing := [key for key in wanted if key not in known]:
            # Neither side may be given what the other has compiled.
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)]),
                "JAX_PLATFORMS": "cpu",
                "TRITON_CACHE_DIR": str(folder / "triton"),
            }
            serving = "from benchmarks import compare_sass; compare_sass.serve()"
            run = subprocess.run(
                [sys.executable, "-P", "-c", serving],
                input=json.dumps([asdict(key) for key in missing]),
                check=False,
                capture_output=True,
                text=True,
                env=environment,
            )
            made = dict(map(_read, run.stdout.splitlines()))
            if run.returncode:
                known |= dict.fromkeys(missing, f"failed: {run.stderr[-300:]}")
            known |= made
            lines += [
                line
                for line in run.stdout.splitlines()
                if isinstance(_read(line)[1], list)
            ]
            CACHE.mkdir(exist_ok=True)
            written = folder / "results"
            written.write_text("".join(f"{line}\n" for line in lines))
            shutil.move(written, kept)
    return {key: known[key] for key in wanted}


def _read(line: str) -> tuple[Key, list[Code] | str]:
    key, result = json.loads(line)
    if isinstance(result, list):
        result = [Code(**{**code, "sass": tuple(code["sass"])}) for code in result]
    return Key(**key), result


def _put_package(place: str, folder: Path) -> None:
    """Puts the package of a revision or working tree into a folder."""
    if Path(place, _PACKAGE).is_dir():
        shutil.copytree(Path(place, _PACKAGE), folder / _PACKAGE)
        return
    command = ["git", "archive", place, _PACKAGE]
    run = subprocess.run(command, check=False, capture_output=True, cwd=REPOSITORY)
    if run.returncode:
        raise SystemExit(run.stderr.decode().strip())
    with tarfile.open(fileobj=io.BytesIO(run.stdout)) as archive:
        archive.extractall(folder, filter="data")


def _digest(package: Path) -> str:
    """A hash of the package's source, of the cases and of the compilers' versions."""
    digest = hashlib.sha256()
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _VERSIONS]
    digest.update(" ".join([sys.version, *versions]).encode())
    own = [REPOSITORY / "benchmarks" / name for name in _SOURCES]
    for path in sorted(package.rglob("*.py")) + own:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


# ---- The table -------------------------------------------------------------------

HEADER = (
    "case",
    "kernel",
    "model",
    "sm",
    "registers",
    "spilled",
    "stack",
    "local",
    "instr/output",
    "verdict",
)


def compare(key: Key, old: list[Code] | str, new: list[Code] | str) -> list[list[str]]:
    """Lines of the table under HEADER; the verdict "WORSE …" is the bad one."""
    start = [key.case, "", key.model, str(key.compute_capability)]
    if isinstance(new, str) or isinstance(old, str):
        failures = [
            f"{side} {what}"
            for side, what in (("OLD", old), ("NEW", new))
            if isinstance(what, str)
        ]
        return [[*start, "", "", "", "", "", f"WORSE: {'; '.join(failures)}"]]
    lines = []
    for before, after in itertools.zip_longest(old, new):
        if before is None or after is None:
            side, one = ("OLD", before) if before else ("NEW", after)
            start[1] = one.kernel
            lines.append(
                [*start, "", "", "", "", "", f"WORSE: a kernel in {side} alone"]
            )
            continue
        start[1] = after.kernel
        verdict = same(before, after)
        if not verdict:
            grown = [
                name
                for name, a, b in zip(
                    HEADER[4:-1], before.figures, after.figures, strict=True
                )
                if b > a
            ]
            verdict = f"WORSE: {', '.join(grown)}" if grown else "no worse"
        lines.append([*start, *map(_change, before.figures, after.figures), verdict])
    return lines


def _change(old: float, new: float) -> str:
    if old == new:
        return f"{new:.4g}"
    return f"{old:.4g} -> {new:.4g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", help="a git revision, or the root of a working tree")
    parser.add_argument("new", help="likewise")
    capabilities = kernel_report.COMPUTE_CAPABILITIES
    parser.add_argument("--cc", type=int, nargs="+", default=capabilities)
    names = [case.name for case in kernel_report.KERNELS]
    parser.add_argument("--kernel", nargs="+", choices=names, default=names)
    arguments = parser.parse_args()
    if reason := machine_code.missing_for_kernels():
        parser.error(reason)
    machine_code.expect_no_gpu()
    wanted = keys(arguments.cc, arguments.kernel)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        both = arguments.old, arguments.new
        old, new = pool.map(lambda place: compile_side(place, wanted), both)
    lines = [line for key in wanted for line in compare(key, old[key], new[key])]
    print("| " + " | ".join(HEADER) + " |")
    print("|---" * len(HEADER) + "|")
    for line in lines:
        print("| " + " | ".join(line) + " |")
    verdicts: dict[str, int] = {}
    for line in lines:
        verdict = line[-1].split(":")[0]
        verdicts[verdict] = verdicts.get(verdict, 0) + 1
    print("\n" + ", ".join(f"{count} {name}" for name, count in verdicts.items()))
    return int("WORSE" in verdicts)


if __name__ == "__main__":
    sys.exit(main())
