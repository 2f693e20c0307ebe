"""Launches Triton kernels from JAX, through jax-triton."""

import warnings
from typing import Any

import jax
import jax_triton

from .. import compat
from .entry import entry, leaves, position
from .record import Launch

# The oldest PTX version that knows each compute capability. By itself Triton emits the
# newest one that its own ptxas knows, which an older ptxas or driver that XLA finds may
# reject. For a capability that is not listed here Triton decides, since a version that
# does not know the target would end the process.
_PTX_VERSION = {80: 80, 86: 80, 89: 80, 90: 80, 100: 86, 103: 88, 120: 87, 121: 88}


def call(launch: Launch, *, compute_capability: int) -> tuple[jax.Array, ...]:
    """Runs a launch on a CUDA device of a compute capability, such as 90."""
    inputs, results = list(leaves(launch.inputs)), list(leaves(launch.outputs))
    options: dict[str, Any] = {}
    aliases = {}
    for name in launch.in_place:
        at = position(launch.inputs, name)
        aliases[at] = len(results)
        results.append(jax.ShapeDtypeStruct(inputs[at].shape, inputs[at].dtype))
    if aliases:
        options["input_output_aliases"] = aliases
    if compat.jax_triton_has_backend_options():
        backend: dict[str, Any] = {"enable_fp_fusion": True}
        if (ptx_version := _PTX_VERSION.get(compute_capability)) is not None:
            backend["ptx_version"] = ptx_version
        options.update(out_type=tuple(results), backend_options=backend)
    else:
        options.update(out_shape=tuple(results), enable_fp_fusion=True)
    spare = len(aliases) if compat.jax_triton_passes_updated_twice() else 0
    options.update(
        kernel=entry(launch.kernel, launch.inputs, launch.outputs, spare),
        grid=launch.grid,
        num_warps=launch.warps_on(compute_capability),
        num_stages=launch.num_stages,
        compute_capability=compute_capability,
        C=launch.constants,
    )
    with warnings.catch_warnings():
        # jax-triton deprecates aliases by index in favour of Refs, but these only work
        # under a jit.
        warnings.simplefilter("ignore", DeprecationWarning)
        return jax_triton.triton_call(*inputs, **options)
