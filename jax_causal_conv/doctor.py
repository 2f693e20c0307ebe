"""What a bug report needs: versions, devices, and whether the kernels work here.

`python -m jax_causal_conv` prints it. Facts are collected first, then known troubles
are recognised in them, then both are written down; each step is a function of its own.
A machine without a GPU is no trouble: XLA runs there, and the report says what a GPU
would need.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import causal_conv1d_fn, causal_conv1d_update, target_compute_capability
from .arguments import Implementation
from .compat import __version__, jax_triton_wants_newer, jaxlib_takes_plugin
from .kernels.lowered import LoweredKernel, lowered_kernels
from .op.primitive import DEFAULT_COMPUTE_CAPABILITY, visible_compute_capability

_PACKAGES = (
    "jax-causal-conv",
    "jax",
    "jaxlib",
    "jax-triton",
    "triton",
    "jax-cuda12-plugin",
    "jax-cuda12-pjrt",
    "jax-cuda13-plugin",
    "jax-cuda13-pjrt",
    "numpy",
)
_DRIVER = Path("/proc/driver/nvidia/version")
# What a second, correct implementation may differ by on inputs of size one.
_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Assembler:
    """One ptxas: where it is, its release, and its answer to this package's kernels.

    `error` is None if it accepts them, or if there was nothing to try.
    """

    path: str
    release: str
    error: str | None


@dataclasses.dataclass(frozen=True)
class Facts:
    """All that is known about this machine; every error is a text, or None.

    Attributes:
        versions: of each package, None where it is absent.
        devices: of jax, as text.
        backend: jax's default backend, "none" if jax cannot start.
        start_error: why jax cannot start.
        capability: compute capability that the kernels were compiled for.
        has_gpu: does jax see an NVIDIA GPU?
        has_driver: is NVIDIA's driver loaded?
        platforms: the user's JAX_PLATFORMS, "" if unset.
        plugin_error: why jax has no CUDA plugin. Kernels are compiled with it, on a
            machine without a GPU too, so that none is tried without.
        bridge_error: why Triton's kernels cannot be imported, with the plugin there.
        kernels: PTX version of each op's kernel.
        kernel_errors: of each op whose kernel does not compile (or not run, on a GPU).
        chosen: what `implementation=None` becomes on the default backend.
        assemblers: each ptxas that was found.
    """

    versions: dict[str, str | None]
    devices: list[str]
    backend: str
    start_error: str | None
    capability: int
    has_gpu: bool
    has_driver: bool
    platforms: str
    plugin_error: str | None
    bridge_error: str | None
    kernels: dict[str, str]
    kernel_errors: dict[str, str]
    chosen: str
    assemblers: list[Assembler]


def collect() -> Facts:
    """Looks at this process and machine. Compiles (and on a GPU runs) each kernel."""
    has_driver = _DRIVER.exists()
    if not has_driver:
        # Else an installed CUDA plugin reports at length that cuDNN is missing.
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    backend, devices, gpu_capability = "none", [], None
    start_error = _error_of(jax.devices)
    if start_error is None:
        backend = jax.default_backend()
        devices = [f"{d} ({d.device_kind})" for d in jax.devices()]
        gpu_capability = visible_compute_capability()
    capability = gpu_capability or DEFAULT_COMPUTE_CAPABILITY
    versions = {name: _version(name) for name in _PACKAGES}
    plugin_error = _plugin_error(versions, gpu_capability is not None)
    bridge_error = None if plugin_error else _error_of(_import_kernels)
    lowered: dict[str, LoweredKernel] = {}
    errors: dict[str, str] = {}
    if not (start_error or plugin_error or bridge_error):
        lowered, errors = _lower_kernels(capability)
        if gpu_capability is not None:
            errors |= _run_kernels(list(lowered), jax.devices("cuda")[0])
    return Facts(
        versions=versions,
        devices=devices,
        backend=backend,
        start_error=start_error,
        capability=capability,
        has_gpu=gpu_capability is not None,
        has_driver=has_driver,
        platforms=os.environ.get("JAX_PLATFORMS", ""),
        plugin_error=plugin_error,
        bridge_error=bridge_error,
        kernels={op: kernel.ptx_version for op, kernel in lowered.items()},
        kernel_errors=errors,
        chosen="nothing" if start_error else _chosen(backend),
        assemblers=_assemblers(next(iter(lowered.values()), None)),
    )


def _plugin_error(versions: dict[str, str | None], has_gpu: bool) -> str | None:
    """Why jax has no CUDA plugin; None if it has one."""
    plugins = [v for name, v in versions.items() if v and name.endswith("-plugin")]
    jaxlib = versions["jaxlib"]
    if not plugins:
        # A jax that sees a GPU all the same was built with the plugin inside.
        return None if has_gpu else "jax's CUDA plugin is not installed"
    if jaxlib and not any(jaxlib_takes_plugin(jaxlib, plugin) for plugin in plugins):
        return "jax uses no CUDA plugin of another version than jaxlib's"
    return None


def _import_kernels() -> None:
    for module in ("bridge", "launch"):
        importlib.import_module(f"jax_causal_conv.kernels.{module}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if name == "jax-causal-conv":  # run from a source tree
            return f"{__version__} (source)"
        return None


def _error_of(action: Callable[[], Any]) -> str | None:
    """What went wrong in `action`, in one line; None if nothing did.

    Any exception is an answer here: this is the program that reports them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action()
    except Exception as error:
        text = " ".join(str(error).split())
        return f"{type(error).__name__}: {text[:400]}".removesuffix(": ")
    return None


_TOKENS, _DIM, _WIDTH, _SEQS, _SLOTS = 32, 256, 4, 2, 4


def _packed(x, weight, bias, states, offsets, slots, implementation):
    return causal_conv1d_fn(
        x,
        weight,
        bias,
        states,
        offsets,
        cache_indices=slots,
        has_initial_state=jnp.ones(slots.shape, bool),
        implementation=implementation,
    )


def _update(x, weight, bias, states, _offsets, slots, implementation):
    return causal_conv1d_update(
        x[: slots.shape[0]],
        states,
        weight,
        bias,
        "silu",
        conv_state_indices=slots,
        implementation=implementation,
    )


_PROBES: dict[str, Callable] = {
    "causal_conv1d_fn": _packed,
    "causal_conv1d_update": _update,
}


def _inputs() -> list[np.ndarray]:
    """Arguments of the probes: random data, slots in reverse."""
    rng = np.random.default_rng(0)
    shapes = [
        (_TOKENS, _DIM),
        (_DIM, _WIDTH),
        (_DIM,),
        (_SLOTS, _WIDTH - 1, _DIM),
    ]
    arrays = [rng.uniform(-1, 1, shape).astype(np.float32) for shape in shapes]
    offsets = np.array([0, _TOKENS - 1, _TOKENS], np.int32)
    return [*arrays, offsets, np.arange(_SEQS, dtype=np.int32)[::-1].copy()]


def _lower(probe: Callable, implementation: Implementation, platform_name: str) -> Any:
    function = functools.partial(probe, implementation=implementation)
    traced = jax.jit(function).trace(*_inputs())
    return traced.lower(lowering_platforms=(platform_name,))


def _lower_kernels(capability: int) -> tuple[dict[str, LoweredKernel], dict[str, str]]:
    lowered: dict[str, LoweredKernel] = {}
    errors: dict[str, str] = {}

    for op, probe in _PROBES.items():

        def compile_one(op=op, probe=probe):
            with target_compute_capability(capability):
                lowered[op] = lowered_kernels(_lower(probe, "triton", "cuda"))[0]

        if error := _error_of(compile_one):
            errors[op] = error
    return lowered, errors


def _run_kernels(ops: list[str], device: Any) -> dict[str, str]:
    """Runs the kernels on a GPU; errors of those that fail or disagree with XLA."""
    errors = {}
    for op in ops:

        def run_one(op=op):
            probe, arguments = _PROBES[op], _inputs()
            run = jax.jit(probe, static_argnames="implementation")
            with jax.default_device(device):
                results = [
                    jax.tree.map(np.asarray, run(*arguments, implementation=i))
                    for i in ("triton", "xla")
                ]
            pairs = zip(*map(jax.tree.leaves, results), strict=True)
            worst = float(np.max([np.abs(a - b).max() for a, b in pairs]))
            if not worst <= _TOLERANCE:
                raise ArithmeticError(f"kernel and XLA differ by {worst:.3g}")

        if error := _error_of(run_one):
            errors[op] = error
    return errors


def _chosen(backend: str) -> str:
    """Asks the op itself: is there a kernel in what it lowers to?"""
    on = "cuda" if backend == "gpu" else backend
    found: list[LoweredKernel] = []
    error = _error_of(lambda: found.extend(lowered_kernels(_lower(_packed, None, on))))
    if error:
        return f"nothing, lowering fails ({error})"
    return "Triton" if found else "XLA"


def _assemblers(kernel: LoweredKernel | None) -> list[Assembler]:
    """Each ptxas in reach, the one that comes first on PATH first."""
    paths = [shutil.which("ptxas")]
    for package, pattern in (
        ("nvidia", "cu*/bin/ptxas"),
        ("nvidia", "cuda_nvcc/bin/ptxas"),
        ("triton", "backends/nvidia/bin/ptxas*"),
    ):
        paths += [str(p) for p in _files_of(package, pattern)]
    return [_try_assembler(path, kernel) for path in dict.fromkeys(paths) if path]


def _files_of(package: str, pattern: str) -> list[Path]:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # there, but broken
        spec = None
    roots = spec.submodule_search_locations if spec else None
    return sorted(file for root in roots or () for file in Path(root).glob(pattern))


def _try_assembler(path: str, kernel: LoweredKernel | None) -> Assembler:
    version = _run([path, "--version"])
    release = re.search(r"release ([\d.]+)", version.stdout)
    error = assemble(path, kernel) if kernel else None
    return Assembler(path, release.group(1) if release else "unknown", error)


def assemble(ptxas: str, kernel: LoweredKernel) -> str | None:
    """Assembles a kernel and throws the result away; the error, or None."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(kernel.ptx)
        run = _run(
            [ptxas, f"--gpu-name={kernel.target}", "-o", os.devnull, str(source)]
        )
    message = " ".join(run.stderr.replace(str(source), source.name).split())
    return (message[:400] or "failed") if run.returncode else None


def _run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, check=False, capture_output=True, text=True)


@dataclasses.dataclass(frozen=True)
class Trouble:
    """Something wrong, in plain words, and its cure.

    `fatal`: because of it jax cannot start, or the kernels fail on this machine's GPU.
    """

    words: str
    cure: str
    fatal: bool = True


_INSTALL = 'pip install "jax[cuda13]" (or "jax[cuda12]")'
# What an error text means: (pattern, plain words, cure).
_KNOWN_ERRORS = (
    (
        r"jax-triton requires JAX to be installed with GPU support",
        "jax-triton 0.3 refuses to be imported without jax's CUDA plugin.",
        'pip install "jax[cuda13]" jax-triton (or jax[cuda12])',
    ),
    (
        r"No module named '(jax_triton|triton)",
        "jax-triton or triton is not installed, so that the ops use XLA on CUDA too.",
        'pip install "jax[cuda13]" jax-triton (or jax[cuda12]), on Linux',
    ),
    (
        r"dce_rule\(\) takes 2 positional arguments",
        "jax-triton 0.4.1 does not know jax 0.12's dead code elimination.",
        'pip install "jax<0.12", or a newer jax-triton',
    ),
    (
        r"Unsupported \.version",
        "This machine's ptxas is too old for the PTX that Triton wrote.",
        'pip install "jax-triton>=0.4", through which this package asks for older PTX '
        '(Python 3.12 and later), or "triton<3.7" below; or put the ptxas of a newer '
        "CUDA toolkit first on PATH",
    ),
)
_OLD_TRITON = (
    "jax-triton 0.4 needs triton 3.7 or later and fails while lowering without.",
    'pip install "triton>=3.7", or "jax-triton==0.3.1" for an older triton',
)


def diagnose(facts: Facts) -> list[Trouble]:
    """The troubles in these facts, each once.

    None is fatal where jax starts and no GPU is to be expected.
    """
    wants_gpu = not facts.platforms or bool(re.search("cuda|gpu", facts.platforms))
    expects_gpu = facts.has_gpu or (facts.has_driver and wants_gpu)
    can_be_fatal = expects_gpu or facts.start_error is not None
    return [
        dataclasses.replace(trouble, fatal=trouble.fatal and can_be_fatal)
        for trouble in dict.fromkeys(_troubles(facts))
    ]


def _troubles(facts: Facts) -> Iterator[Trouble]:
    because = f" (JAX_PLATFORMS={facts.platforms})" if facts.platforms else ""
    if facts.start_error:
        yield Trouble(
            f"jax cannot start{because}: {facts.start_error}",
            "leave JAX_PLATFORMS unset, and jax takes what is there"
            if facts.platforms
            else 'python -c "import jax; jax.devices()" shows all of the error',
        )
    if not facts.has_gpu and facts.has_driver:
        yield Trouble(
            f"NVIDIA's driver is loaded, but jax sees no GPU{because}.",
            f"{_INSTALL}, and leave JAX_PLATFORMS unset",
        )
    yield from _version_troubles(facts.versions)
    if facts.bridge_error:
        yield _explain(facts.bridge_error, facts.versions)
    for error in facts.kernel_errors.values():
        yield _explain(error, facts.versions)
    first = next(iter(facts.assemblers), None)
    # Without a GPU nothing here asks ptxas.
    needs_ptxas = facts.has_gpu or facts.has_driver
    if needs_ptxas and first is not None and first.error is not None:
        trouble = _explain(first.error, facts.versions)
        # XLA may find another one; if not, running the kernel has shown it.
        yield dataclasses.replace(trouble, fatal=False)


def _version_troubles(versions: dict[str, str | None]) -> Iterator[Trouble]:
    jaxlib = versions.get("jaxlib")
    for name, version in versions.items():
        if not (name.startswith("jax-cuda") and version and jaxlib):
            continue
        if not jaxlib_takes_plugin(jaxlib, version):
            yield Trouble(
                f"{name} {version} is not made for jaxlib {jaxlib}.",
                f'pip install "{name}=={jaxlib}"',
            )


def _explain(error: str, versions: dict[str, str | None]) -> Trouble:
    for pattern, words, cure in _KNOWN_ERRORS:
        if re.search(pattern, error):
            return Trouble(words, cure)
    jax_triton, triton = versions.get("jax-triton"), versions.get("triton")
    if jax_triton and triton and jax_triton_wants_newer(jax_triton, triton):
        return Trouble(*_OLD_TRITON)
    return Trouble(
        f"The kernels fail: {error}",
        'unknown to this program; please report it. implementation="xla" avoids it',
    )


def render(facts: Facts, troubles: list[Trouble]) -> str:
    """The report, as text."""
    found = [f"{name} {v}" for name, v in facts.versions.items() if v]
    absent = [name for name, v in facts.versions.items() if not v]
    where = "this machine's GPU" if facts.has_gpu else "no GPU here"
    lines = [
        f"python {platform.python_version()} on {platform.platform()}",
        *found,
        f"not installed: {', '.join(absent) or 'nothing'}",
        f"devices: {', '.join(facts.devices) or 'none'}",
        f"implementation=None becomes {facts.chosen}, because {_reason(facts)}",
        *_gpu_lines(facts),
        f"kernels for sm_{facts.capability} ({where}):",
        *(f"  {line}" for line in _kernel_lines(facts)),
        "ptxas:",
        *(f"  {line}" for line in _assembler_lines(facts)),
    ]
    if not troubles:
        return "\n".join([*lines, "troubles: none"])
    lines.append("troubles:")
    for trouble in troubles:
        lines += [f"  - {trouble.words}", f"    cure: {trouble.cure}"]
    return "\n".join(lines)


def _reason(facts: Facts) -> str:
    if facts.start_error:
        return f"jax cannot start ({facts.start_error})"
    if facts.backend != "gpu":
        return f"jax's default backend is {facts.backend}"
    if not facts.has_gpu:
        return "kernels are for CUDA only, and jax's GPU is none of NVIDIA's"
    if facts.plugin_error:
        return facts.plugin_error
    if facts.bridge_error:
        return f"jax-triton cannot be imported ({facts.bridge_error})"
    return "jax's default backend is CUDA and jax-triton can be imported"


def _gpu_lines(facts: Facts) -> Iterator[str]:
    """What a machine without a GPU would need to run the kernels."""
    if facts.has_gpu or facts.has_driver:
        return
    needs = "an NVIDIA GPU with its driver"
    if facts.plugin_error:
        needs += f", Linux, and jax's CUDA plugin: {_INSTALL}"
    yield f"Triton's kernels would need {needs}"


def _kernel_lines(facts: Facts) -> Iterator[str]:
    start_error = "jax cannot start" if facts.start_error else None
    if error := start_error or facts.plugin_error or facts.bridge_error:
        yield f"not tried: {error}"
    done = "compiles and agrees with XLA" if facts.has_gpu else "compiles"
    for op in _PROBES:
        if op in facts.kernel_errors:
            yield f"{op}: {facts.kernel_errors[op]}"
        elif op in facts.kernels:
            yield f"{op}: {done}, PTX {facts.kernels[op]}"


def _assembler_lines(facts: Facts) -> Iterator[str]:
    if not facts.assemblers:
        yield "none found"
    for one in facts.assemblers:
        answer = "accepts the kernels" if one.error is None else one.error
        if not facts.kernels:
            answer = "not tried"
        yield f"{one.path} (CUDA {one.release}): {answer}"


def exit_status(troubles: list[Trouble]) -> int:
    """1 if jax cannot start, or the kernels fail on this machine's GPU; else 0."""
    return int(any(trouble.fatal for trouble in troubles))
