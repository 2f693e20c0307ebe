"""Runs a Triton kernel in Triton's interpreter on NumPy arrays, in this process.

Triton decides once per process, by an environment variable, whether `@triton.jit`
compiles or interprets. Here both live side by side: a copy of the kernel is
interpreted, its callees with it, and the kernel itself stays compilable.
"""

import functools
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import ml_dtypes
import numpy as np
import triton.language as tl
from triton import JITFunction
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import (
    GridExecutor,
    InterpretedFunction,
    InterpreterBuilder,
    TensorHandle,
    interpreter_builder,
)

_stock_patch_tensor = triton_interpreter._patch_lang_tensor

# The interpreter replaces parts of triton.language while it runs.
_LOCK = threading.RLock()

_TYPE_NAMES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "float64": "fp64",
    "int32": "i32",
    "bool": "i1",
}

_FLOATS = {
    tl.bfloat16: ml_dtypes.bfloat16,
    tl.float16: np.float16,
    tl.float32: np.float32,
    tl.float64: np.float64,
}


class _Pointer:
    """What the interpreter wants to see of an array: an address and a type."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = _TYPE_NAMES[array.dtype.name]

    def data_ptr(self) -> int:
        return self.array.ctypes.data


class _InPlaceExecutor(GridExecutor):
    """Hands NumPy buffers through instead of copying torch tensors to the host."""

    def _init_args_hst(self, args_dev, kwargs):
        return args_dev, kwargs

    def _restore_args_dev(self, args_dev, args_hst, kwargs, kwargs_hst):
        pass


def _cast(src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
    """A conversion that rounds to bfloat16 as GPUs do; Triton's own truncates."""
    source, target = src.dtype.scalar, dst_type.scalar
    if tl.bfloat16 not in (source, target):
        return InterpreterBuilder.cast_impl(interpreter_builder, src, dst_type)
    data = src.data.view(ml_dtypes.bfloat16) if source == tl.bfloat16 else src.data
    data = data.astype(_FLOATS[target])
    return TensorHandle(data.view(np.uint16) if target == tl.bfloat16 else data, target)


def _patch_tensor(tensor: type, *scope: Any) -> None:
    """Triton's patch, with loop bounds that NumPy >= 2.5 accepts in Triton 3.6 too."""
    _stock_patch_tensor(tensor, *scope)
    setattr(  # noqa: B010 - `type` has no such attribute to a type checker
        tensor, "__index__", lambda self: int(self.handle.data.squeeze())
    )


@contextmanager
def _mended() -> Iterator[None]:
    """The interpreter without the defects that the kernels meet."""
    interpreter_builder.cast_impl = _cast
    triton_interpreter._patch_lang_tensor = _patch_tensor
    try:
        yield
    finally:
        triton_interpreter._patch_lang_tensor = _stock_patch_tensor
        del interpreter_builder.cast_impl


@functools.cache
def _interpreted(kernel: JITFunction) -> Any:
    """A Python function that computes what `kernel` does, callees included."""
    fn = kernel.fn
    callees = {
        name: _interpreted(fn.__globals__[name])
        for name in fn.__code__.co_names
        if isinstance(fn.__globals__.get(name), JITFunction)
    }
    copy = types.FunctionType(
        fn.__code__,
        fn.__globals__ | callees,
        fn.__name__,
        fn.__defaults__,
        fn.__closure__,
    )
    copy.__annotations__ = fn.__annotations__
    rewritten = InterpretedFunction(copy).rewrite()
    rewritten.fn = rewritten  # where Triton looks for a reduction's combine function
    return rewritten


def run(
    kernel: Any, args: Sequence[np.ndarray | int], grid: int, **constants: Any
) -> None:
    """Runs `kernel(*args, **constants)` for `grid` programs, in place.

    Args:
        args: NumPy arrays (passed as pointers) and ints, in the kernel's order;
            parameters behind them that are no constants are None.
    """
    fn = _interpreted(kernel)
    given = {*kernel.arg_names[: len(args)], *constants, "FAST"}
    absent = {name: None for name in kernel.arg_names if name not in given}
    operands = [_Pointer(a) if isinstance(a, np.ndarray) else a for a in args]
    with _LOCK, _mended(), np.errstate(all="ignore"):
        executor = _InPlaceExecutor(fn, kernel.arg_names, (grid,))
        executor(*operands, **absent, **constants, FAST=False)


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
) -> tuple[jax.Array, ...]:
    """`bridge.call` through the interpreter and a host callback.

    Outputs are filled with NaN first, so that a row which no program writes shows.
    """
    del num_warps
    _interpreted(kernel)  # parsed now: Python 3.11 may fail to in a device's thread
    results = list(outputs)
    if in_place is not None:
        updated = arrays[in_place]
        results.append(jax.ShapeDtypeStruct(updated.shape, updated.dtype))

    def host(*operands):
        buffers = [np.ascontiguousarray(a) for a in operands]
        fresh = [np.full(out.shape, np.nan, out.dtype) for out in outputs]
        if in_place is not None:
            buffers[in_place] = buffers[in_place].copy()
            fresh.append(buffers[in_place])
        run(kernel, [*buffers, *scalars, *fresh], grid, **constants)
        return tuple(fresh)

    return jax.pure_callback(host, tuple(results), *arrays, vmap_method="sequential")
