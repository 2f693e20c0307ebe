"""Runs a Triton kernel in Triton's interpreter on NumPy arrays, in this process.

Triton decides once per process, by an environment variable, whether `@triton.jit`
compiles or interprets. Here both live side by side: a copy of the kernel is
interpreted, its callees with it, and the kernel itself stays compilable.
"""

import dataclasses
import functools
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import triton.language as tl
from triton import JITFunction
from triton._utils import validate_block_shape
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import (
    GridExecutor,
    InterpretedFunction,
    InterpreterBuilder,
    TensorHandle,
    interpreter_builder,
    interpreter_semantic,
)

from .entry import arrays, entry, leaves, replaced
from .record import Launch

_stock_patch_tensor = triton_interpreter._patch_lang_tensor

# The interpreter replaces parts of triton.language while it runs, so that only one
# kernel can be interpreted at a time.
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


# Triton's front end is written for a compiler, which sees each operation once. Here it
# would work out types, shapes and conversions at every step of every program, and take
# most of the time. What follows gives the same in less.


@functools.cache
def _shape(sizes: tuple[int, ...]) -> tuple[Any, int, Any, Any]:
    """Sizes and their product, as a type has them and as a tensor has them."""
    numel = validate_block_shape(sizes)
    constants = tl.tuple([tl.constexpr(size) for size in sizes])
    return tl.tuple(sizes), numel, constants, tl.constexpr(numel)


def _sizes(dtype: tl.dtype) -> tuple[int, ...]:
    return tuple(dtype.shape.values) if dtype.is_block() else ()


def _init_block_type(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
    sizes = tuple([getattr(size, "value", size) for size in shape])
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    self.element_ty = element_ty
    self.shape, self.numel, *_ = _shape(sizes)
    self.name = f"<{sizes}, {element_ty}>"


def _init_tensor(self: tl.tensor, handle: TensorHandle, type: tl.dtype) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    *_, self.shape, self.numel = _shape(_sizes(type))


_stock_np_dtype = triton_interpreter._get_np_dtype
_np_dtypes: dict[str, np.dtype] = {}


def _np_dtype(dtype: tl.dtype) -> np.dtype:
    name = dtype.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _stock_np_dtype(dtype)
    return _np_dtypes[name]


def _broadcast(lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Both in one shape, by NumPy's rules, which are Triton's."""
    if lhs.shape is rhs.shape:
        return lhs, rhs
    shape = np.broadcast_shapes(_sizes(lhs.type), _sizes(rhs.type))
    return _broadcast_to(lhs, shape), _broadcast_to(rhs, shape)


def _broadcast_to(value: tl.tensor, shape: tuple[int, ...]) -> tl.tensor:
    sizes = _sizes(value.type)
    if sizes == shape:
        return value
    data = np.broadcast_to(value.handle.data.reshape(sizes), shape)
    block = tl.block_type(value.dtype, shape)
    return tl.tensor(TensorHandle(data, value.dtype), block)


_stock_operands = interpreter_semantic.binary_op_type_checking_impl


def _operands(lhs: Any, rhs: Any, *how: Any, **rest: Any) -> tuple[Any, Any]:
    """What an operation takes: of one type, and of one shape.

    Two tensors of float32 or int32, or one and a number, promote to what they are.
    """
    if type(lhs) is tl.tensor and lhs.dtype in (tl.float32, tl.int32):
        if type(rhs) is tl.tensor and rhs.dtype is lhs.dtype:
            return _broadcast(lhs, rhs)
        wholes = type(rhs) is int and lhs.dtype is tl.int32 and abs(rhs) < 2**31
        if wholes or (type(rhs) is float and lhs.dtype is tl.float32):
            return _broadcast(lhs, interpreter_semantic.scalar_constant(rhs, lhs.dtype))
    return _stock_operands(lhs, rhs, *how, **rest)


_ABSENT = object()


@contextmanager
def _mended() -> Iterator[None]:
    """The interpreter without the defects that the kernels meet, and faster."""
    options = interpreter_builder.options
    # Where it does not debug it drops what it found out about integers that overflow,
    # which takes a third of its time.
    options = dataclasses.replace(options, sanitize_overflow=options.debug)
    parts = [
        (interpreter_builder, "options", options),
        (interpreter_builder, "cast_impl", _cast),
        (triton_interpreter, "_patch_lang_tensor", _patch_tensor),
        (triton_interpreter, "_get_np_dtype", _np_dtype),
        (tl.block_type, "__init__", _init_block_type),
        (tl.tensor, "__init__", _init_tensor),
        (interpreter_semantic, "broadcast_impl_value", _broadcast),
        (interpreter_semantic, "binary_op_type_checking_impl", _operands),
    ]
    stock = [vars(owner).get(name, _ABSENT) for owner, name, _ in parts]
    for owner, name, part in parts:
        setattr(owner, name, part)
    try:
        yield
    finally:
        for (owner, name, _), part in zip(parts, stock, strict=True):
            if part is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, part)


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


def run(launch: Launch, inputs: NamedTuple, outputs: NamedTuple) -> None:
    """Runs a launch now, on NumPy buffers.

    Args:
        launch: says what runs; its own inputs and outputs are not looked at.
        inputs, outputs: records like those of the launch, with NumPy arrays, which the
            programs write to.
    """
    kernel = entry(launch.kernel, inputs, outputs, spare=0)
    fn = _interpreted(kernel)
    constants = dataclasses.replace(launch.constants, FAST=False)
    operands = [
        _Pointer(leaf) if isinstance(leaf, np.ndarray) else leaf
        for leaf in (*leaves(inputs), *leaves(outputs))
    ]
    with _LOCK, _mended(), np.errstate(all="ignore"):
        executor = _InPlaceExecutor(fn, kernel.arg_names, (launch.grid,))
        executor(*operands, C=constants)


def call(launch: Launch) -> tuple[jax.Array, ...]:
    """Runs a launch through the interpreter and a host callback.

    Outputs are filled with NaN first, so that a row which no program writes shows.
    """
    # The kernel's source is parsed here, in the caller's thread: in the thread of a
    # device, where the callback runs, Python 3.11 may fail to parse it.
    _interpreted(entry(launch.kernel, launch.inputs, launch.outputs, spare=0))
    results = list(leaves(launch.outputs))
    first_updated = len(results)
    for name in launch.in_place:
        updated = getattr(launch.inputs, name)
        results.append(jax.ShapeDtypeStruct(updated.shape, updated.dtype))

    def host(*operands):
        inputs = replaced(launch.inputs, map(np.ascontiguousarray, operands))
        fresh = [np.full(out.shape, np.nan, out.dtype) for out in results]
        outputs = replaced(launch.outputs, fresh)
        updated = dict(zip(launch.in_place, fresh[first_updated:], strict=True))
        for name, buffer in updated.items():
            buffer[...] = getattr(inputs, name)
        inputs = inputs._replace(**updated)
        run(launch, inputs, outputs)
        return tuple(fresh)

    operands = arrays(launch.inputs)
    return jax.pure_callback(host, tuple(results), *operands, vmap_method="sequential")
