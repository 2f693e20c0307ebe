"""Calls a Triton kernel from JAX; the only module that knows which jax-triton it is.

Both jax-triton 0.3 and 0.4 are supported. What differs: the name of the output
argument, how an aliased buffer reaches the kernel, and how compiler options do.
"""

import importlib.metadata
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax_triton

VERSIONS = {name: importlib.metadata.version(name) for name in ("jax-triton", "triton")}
"""What compiles the kernels."""

_VERSION = tuple(int(part) for part in VERSIONS["jax-triton"].split(".")[:2])
# The oldest PTX version that knows the target. Triton would emit the newest one of its
# own ptxas, which the (older) ptxas or driver that XLA finds may reject; a version that
# does not know the target would end the process, so others are left to Triton.
_PTX_VERSION = {80: 80, 86: 80, 89: 80, 90: 80, 100: 86, 103: 88, 120: 87, 121: 88}


def call(
    kernel: Any,
    arrays: Sequence[jax.Array],
    scalars: Sequence[int],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: int,
    num_warps: int,
    constants: Mapping[str, Any],
    in_place: int | None = None,
    compute_capability: int,
) -> tuple[jax.Array, ...]:
    """Launches `kernel(*arrays, *scalars, *outputs, [alias], **constants)` on CUDA.

    Pointers behind those, of outputs that there are not, are None.

    Args:
        kernel: a Triton kernel; its parameters have just this order.
        arrays: operands, passed as pointers.
        scalars: ints.
        outputs: shapes and dtypes of the fresh outputs.
        grid: number of programs.
        num_warps: warps a program.
        constants: constexpr arguments.
        in_place: the operand that the kernel updates in place, if any. Such kernels
            have a pointer to spare behind the last output and leave it alone: some
            versions hand the updated buffer over twice.
        compute_capability: e.g. 90.

    Returns:
        The outputs, then the updated operand if there is one.
    """
    results = list(outputs)
    options: dict[str, Any] = dict(constants, FAST=True)
    if in_place is not None:
        updated = arrays[in_place]
        options["input_output_aliases"] = {in_place: len(results)}
        results.append(jax.ShapeDtypeStruct(updated.shape, updated.dtype))
    options.update(
        kernel=kernel,
        grid=grid,
        num_warps=num_warps,
        num_stages=1,
        compute_capability=compute_capability,
    )
    given = len(arrays) + len(scalars) + len(outputs)
    if _VERSION < (0, 4):
        given += in_place is not None
        options.update(out_shape=tuple(results), enable_fp_fusion=True)
    else:
        backend: dict[str, Any] = {"enable_fp_fusion": True}
        if (ptx_version := _PTX_VERSION.get(compute_capability)) is not None:
            backend["ptx_version"] = ptx_version
        options.update(out_type=tuple(results), backend_options=backend)
    for name in kernel.arg_names[given:]:
        options.setdefault(name, None)
    with warnings.catch_warnings():
        # Aliases by index are deprecated for Refs, which need a jit around them.
        warnings.simplefilter("ignore", DeprecationWarning)
        return jax_triton.triton_call(*arrays, *scalars, **options)
