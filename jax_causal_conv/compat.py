"""Every question about versions: what differs between those that are supported.

Names say what a version can do, so that its number is compared here alone.
"""

import functools
import importlib.metadata
import re

import jax

__version__ = "0.2.0"
"""That of this package."""

_JAX = jax.__version_info__

CPU_LOOPS_UPDATE_IN_PLACE = _JAX >= (0, 11)
"""Does XLA:CPU update a cache in a loop in place, after reads of it before the loop?

Before jax 0.11 it copies the cache in that case, so what is needed of the cache must be
read by the loop itself. A bfloat16 cache it copies in any loop, at every trip.
"""

CPU_CONVERTS_IN_EVERY_LOOP = _JAX >= (0, 11)
"""Does XLA:CPU convert a narrow array again in each loop that reads it wide?

From jax 0.11 on it does, unless a barrier keeps the wide array.
"""


@functools.cache
def kernel_compilers() -> dict[str, str]:
    """The versions of what compiles the kernels, which must be installed."""
    return {name: importlib.metadata.version(name) for name in ("jax-triton", "triton")}


def _at_least(version: str, *wanted: int) -> bool:
    numbers = re.findall(r"\d+", version)[: len(wanted)]
    return tuple(map(int, numbers)) >= wanted


def jaxlib_takes_plugin(jaxlib: str, plugin: str) -> bool:
    """Does jaxlib use a CUDA plugin of this version? The release must be its own."""
    release, other = (re.match(r"[\d.]*\d", v) for v in (jaxlib, plugin))
    return bool(release and other and release[0] == other[0])


def jax_triton_passes_updated_twice() -> bool:
    """Does a kernel get an array that it updates in place behind its outputs, too?"""
    return not _at_least(kernel_compilers()["jax-triton"], 0, 4)


def jax_triton_has_backend_options() -> bool:
    """Do compiler options go to jax-triton in a record, and results as `out_type`?"""
    return _at_least(kernel_compilers()["jax-triton"], 0, 4)


def require_jax_triton() -> None:
    """Raises ImportError, saying why, where jax-triton cannot lower a kernel.

    It needs a CUDA plugin of jax's. Without one jax-triton 0.3 cannot be imported, but
    0.4 can, and fails in the middle of a lowering; as it does if Triton is too old.
    """
    importlib.import_module("jax_triton")
    if not hasattr(importlib.import_module("jaxlib.gpu_triton"), "TritonKernel"):
        raise ImportError("jaxlib finds no CUDA plugin of its version")
    versions = kernel_compilers()
    if jax_triton_wants_newer(versions["jax-triton"], versions["triton"]):
        raise ImportError(
            f"jax-triton {versions['jax-triton']} does not work with "
            f"triton {versions['triton']}"
        )


def jax_triton_wants_newer(jax_triton: str, triton: str) -> bool:
    """Does this version of jax-triton fail while lowering, with this one of Triton?"""
    return _at_least(jax_triton, 0, 4) and not _at_least(triton, 3, 7)
