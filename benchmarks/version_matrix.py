"""Runs the quick tests and the compile gates on every supported set of versions.

    python -m benchmarks.version_matrix [--dir DIR] [--python PATH ...] [--only TEXT]

builds one virtual environment per set (in DIR, where it is found again, else in a
temporary folder), runs the suites in it and prints a table: the table of tested
versions in README.md is what this prints. A set whose interpreter is absent is
skipped, and the table says so.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class VersionSet:
    """One row of the table."""

    python: str
    jax: str
    jax_triton: str
    triton: str

    @property
    def name(self) -> str:
        """A folder name."""
        return (
            f"py{self.python}-jax{self.jax}-jax_triton{self.jax_triton}"
            f"-triton{self.triton}"
        )

    @property
    def pins(self) -> dict[str, str]:
        """Exact versions, by package."""
        return {
            "jax": self.jax,
            "jaxlib": self.jax,
            "jax-triton": self.jax_triton,
            "triton": self.triton,
            "jax-cuda13-plugin": self.jax,
            "jax-cuda13-pjrt": self.jax,
        }


VERSION_SETS = (
    VersionSet("3.11", "0.10.2", "0.3.1", "3.9.0"),
    VersionSet("3.12", "0.11.2", "0.4.1", "3.9.0"),
    VersionSet("3.12", "0.11.2", "0.3.1", "3.6.0"),
    VersionSet("3.12", "0.12.0.1", "0.4.1", "3.9.0"),
)
# Installed without their dependencies: the plugins would bring all of CUDA, and some
# sets are none that the packages themselves declare.
_ALONE = ("jax-triton", "jax-cuda13-plugin", "jax-cuda13-pjrt")
_TOOLS = ("absl-py", "flatbuffers", "hypothesis", "pytest", "pytest-xdist")

# The columns of the table: what pytest is told for each. The first is a quick
# selection; everything runs in CI, on one set of versions.
SUITES = {
    "semantics": (
        "tests/conv/test_metadata.py",
        "tests/conv/test_packed.py",
        "tests/conv/test_update.py",
        "tests/conv/test_functional.py",
        "-k",
        "metadata or random or skipped or mixed_batch or wrapped or neither_copied",
    ),
    "doctor": ("tests/package/test_doctor.py",),
    "compile gate": ("tests/kernels/test_compile_gate.py",),
    "XLA gate": ("tests/kernels/test_xla_gpu_gate.py",),
}


class Absent(Exception):
    """There is no such interpreter here."""


class Failed(Exception):
    """An environment could not be built."""


def find_python(version: str, candidates: list[str]) -> str:
    """An interpreter of this version that really starts, or raises Absent."""
    for candidate in [*candidates, f"python{version}", sys.executable]:
        path = shutil.which(candidate)
        if path and _version_of(path) == version:
            return path
    raise Absent(f"no python{version} found")


def _version_of(python: str) -> str | None:
    code = "import sys; print('{}.{}'.format(*sys.version_info))"
    try:
        run = subprocess.run([python, "-c", code], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # such as a shim without a target
        return None
    return run.stdout.decode().strip()


def environment(versions: VersionSet, folder: Path, candidates: list[str]) -> Path:
    """The interpreter of a virtual environment with these versions."""
    python = folder / versions.name / "bin" / "python"
    if python.exists() and _installed(python) == versions.pins:
        return python
    base = find_python(versions.python, candidates)
    _build([base, "-m", "venv", "--clear", folder / versions.name])
    pins = [f"{name}=={version}" for name, version in versions.pins.items()]
    alone = [pin for pin in pins if pin.split("==")[0] in _ALONE]
    install = [python, "-m", "pip", "install", "--quiet"]
    _build([*install, *(pin for pin in pins if pin not in alone), *_TOOLS])
    _build([*install, "--no-deps", *alone])
    return python


def _installed(python: Path) -> dict[str, str] | None:
    """Versions of the pinned packages in an environment; None if one is missing."""
    names = list(VERSION_SETS[0].pins)
    code = (
        "import importlib.metadata as m, json; "
        f"print(json.dumps({{n: m.version(n) for n in {names}}}))"
    )
    run = subprocess.run([python, "-c", code], capture_output=True, check=False)
    return json.loads(run.stdout) if run.returncode == 0 else None


def _build(command: list) -> None:
    run = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise Failed(f"{' '.join(map(str, command))}: {run.stderr[-2000:]}")


def run_suite(python: Path, tests: tuple[str, ...], workers: int) -> tuple[bool, str]:
    """(passed, what to print) of pytest with these arguments."""
    command = [python, "-m", "pytest", "-q", "-n", workers, "-p", "no:cacheprovider"]
    began = time.monotonic()
    run = subprocess.run(
        list(map(str, [*command, *tests])),
        cwd=REPOSITORY,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - began
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", run.stdout)
    if run.returncode:
        print(run.stdout[-6000:], run.stderr[-2000:], file=sys.stderr)
    summary = ", ".join(counts[-4:]) or f"exit status {run.returncode}"
    return run.returncode == 0, f"{summary} ({seconds:.0f} s)"


def run_set(
    versions: VersionSet, folder: Path, candidates: list[str], workers: int
) -> tuple[bool, list[str]]:
    """(nothing failed, the cells of the table) of one set of versions."""
    try:
        python = environment(versions, folder, candidates)
    except Absent as reason:
        return True, [f"skipped: {reason}"] + [""] * (len(SUITES) - 1)
    except Failed as reason:
        print(reason, file=sys.stderr)
        return False, ["not installable"] + [""] * (len(SUITES) - 1)
    results = [run_suite(python, tests, workers) for tests in SUITES.values()]
    return all(passed for passed, _ in results), [cell for _, cell in results]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=Path, help="where environments are kept")
    parser.add_argument(
        "--python", nargs="+", default=[], help="interpreters to choose from"
    )
    parser.add_argument("--only", default="", help="run the sets whose name has this")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    everything_passed = True
    header = ["Python", "jax", "jax-triton", "triton", *SUITES]
    print("| " + " | ".join(header) + " |")
    print("|---" * len(header) + "|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.dir or Path(temporary)
        for versions in VERSION_SETS:
            if arguments.only not in versions.name:
                continue
            passed, cells = run_set(
                versions, folder, arguments.python, arguments.workers
            )
            everything_passed &= passed
            sizes = [
                versions.python,
                versions.jax,
                versions.jax_triton,
                versions.triton,
            ]
            print("| " + " | ".join(sizes + cells) + " |", flush=True)
    return 0 if everything_passed else 1


if __name__ == "__main__":
    sys.exit(main())
