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

_VERSION = tuple(
    int(part) for part in importlib.metadata.version("jax-triton").split(".")[:2]
)
# The oldest PTX version that knows the target. Triton would emit the newest one of its
# own ptxas, which the (older) ptxas or driver that XLA finds may reject.
_PTX_VERSION = {8: 80, 9: 80, 10: 86, 12: 87}


def call(
    kernel: Any,
    arrays: Sequence[jax.Array],
    scalars: Sequence[int],
    out: jax.ShapeDtypeStruct,
    *,
    in_place: int,
    grid: int,
    num_warps: int,
    constants: Mapping[str, Any],
    compute_capability: int,
) -> tuple[jax.Array, jax.Array]:
    """Launches `kernel(*arrays, *scalars, out, alias, **constants)` on CUDA.

    Args:
        arrays: operands; `arrays[in_place]` is updated in place and returned.
        out: shape and dtype of the fresh output.
        grid: number of programs.
        compute_capability: e.g. 90.

    Returns:
        `(out, arrays[in_place] after the launch)`.
    """
    state = jax.ShapeDtypeStruct(arrays[in_place].shape, arrays[in_place].dtype)
    options: dict[str, Any] = dict(
        kernel=kernel,
        grid=grid,
        num_warps=num_warps,
        num_stages=1,
        compute_capability=compute_capability,
        input_output_aliases={in_place: 1},
        **constants,
        FAST=True,
    )
    if _VERSION < (0, 4):
        # The aliased buffer arrives a second time, as the last pointer.
        return jax_triton.triton_call(
            *arrays, *scalars, out_shape=(out, state), enable_fp_fusion=True, **options
        )
    ptx_version = _PTX_VERSION.get(compute_capability // 10)
    backend = {"enable_fp_fusion": True, "maxnreg": 128}
    if ptx_version is not None:
        backend["ptx_version"] = ptx_version
    with warnings.catch_warnings():
        # Aliases by index are deprecated for Refs, which need a jit around them.
        warnings.simplefilter("ignore", DeprecationWarning)
        return jax_triton.triton_call(
            *arrays,
            *scalars,
            out_type=(out, state),
            state_alias_ptr=0,
            backend_options=backend,
            **options,
        )
