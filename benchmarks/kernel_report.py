"""What the GPU's machine code looks like, for real models, without a GPU.

    python -m benchmarks.kernel_report [--cc 80 90 100] [--kernel NAME ...]

compiles every kernel through its op for the convs of published models and prints a
table. The compile gate in `tests/` asserts bounds on the same rows.
"""

import argparse
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

import jax_causal_conv as jcc
from benchmarks import machine_code
from benchmarks.machine_code import MachineCode
from benchmarks.model_shapes import MODELS, ModelShape, by_kernel

COMPUTE_CAPABILITIES = (80, 90, 100)

_TOKENS, _SEQS, _SLOTS, _BATCH, _ROWS = 2048, 64, 128, 64, 2


def _struct(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _filters(model: ModelShape) -> tuple:
    weight = _struct((model.dim, model.width), model.dtype)
    return weight, _struct((model.dim,), model.dtype) if model.bias else None


def _reach(model: ModelShape, options: dict) -> int:
    """Tokens that a filter needs before the first."""
    return (model.width - 1) * options.get("dilation", 1)


def packed(
    model: ModelShape, *, drafts: int = 0, **options: Any
) -> tuple[Callable, tuple, int]:
    """A mixed prefill and decode batch, with room for drafts if asked for."""

    def call(x, weight, bias, states, offsets, slots, seen, metadata, rejected):
        return jcc.causal_conv1d_fn(
            x,
            weight,
            bias,
            states,
            offsets,
            cache_indices=slots,
            has_initial_state=seen,
            num_rejected_tokens=rejected,
            activation=model.activation,
            metadata=metadata,
            implementation="triton",
            **options,
        )

    rows = _struct((_SEQS,), "int32")
    arguments = (
        _struct((_TOKENS, model.dim), model.dtype),
        *_filters(model),
        _struct((_SLOTS, _reach(model, options) + drafts, model.dim), model.dtype),
        _struct((_SEQS + 1,), "int32"),
        rows,
        _struct((_SEQS,), "bool"),
        jax.eval_shape(
            lambda q: jcc.build_metadata(q, _TOKENS), _struct((_SEQS + 1,), "int32")
        ),
        rows if drafts else None,
    )
    return call, arguments, _TOKENS * model.dim


def update(
    model: ModelShape,
    *,
    tokens: int = 1,
    drafts: int = 0,
    circular: bool = False,
    **options: Any,
) -> tuple[Callable, tuple, int]:
    """A decode step of `tokens` tokens a row."""

    def call(x, states, weight, bias, slots, position, rejected):
        return jcc.causal_conv1d_update(
            x,
            states,
            weight,
            bias,
            model.activation,
            cache_seqlens=position,
            conv_state_indices=slots,
            num_rejected_tokens=rejected,
            implementation="triton",
            **options,
        )

    rows = _struct((_BATCH,), "int32")
    arguments = (
        _struct((_BATCH, tokens, model.dim), model.dtype),
        _struct((_SLOTS, _reach(model, options) + drafts, model.dim), model.dtype),
        *_filters(model),
        rows,
        rows if circular else None,
        rows if drafts and not circular else None,
    )
    return call, arguments, _BATCH * tokens * model.dim


def dense(
    model: ModelShape, *, segments: bool = False, **options: Any
) -> tuple[Callable, tuple, int]:
    """Rows of a training batch, perhaps packed with documents."""

    def call(x, weight, bias, ids):
        return jcc.causal_conv1d(
            x,
            weight,
            bias,
            segment_ids=ids,
            activation=model.activation,
            implementation="triton",
            **options,
        )

    arguments = (
        _struct((_ROWS, _TOKENS, model.dim), model.dtype),
        *_filters(model),
        _struct((_ROWS, _TOKENS), "int32") if segments else None,
    )
    return call, arguments, _ROWS * _TOKENS * model.dim


def gradient(
    build: Callable[[ModelShape], tuple[Callable, tuple, int]], model: ModelShape
) -> tuple[Callable, tuple, int]:
    """All gradients of another case's call, for any cotangents of its results."""
    forward, arguments, outputs = build(model)
    results = jax.eval_shape(forward, *arguments)

    def call(arguments, cotangents):
        floats = [_is_float(a) for a in arguments]

        def of_floats(*values):
            rest = iter(values)
            mixed = [
                next(rest) if f else a for f, a in zip(floats, arguments, strict=True)
            ]
            return forward(*mixed)

        primals = [a for f, a in zip(floats, arguments, strict=True) if f]
        return jax.vjp(of_floats, *primals)[1](cotangents)

    return call, (arguments, results), outputs


def _whole(model: ModelShape) -> int:
    """Bytes of the widest access of a thread."""
    return 16


def _four_channels(model: ModelShape) -> int:
    """Bytes of an access by a kernel whose threads have four channels."""
    return 4 * jnp.dtype(model.dtype).itemsize


def _large_groups(model: ModelShape) -> int:
    """Bytes of an access by a forward kernel in a loop.

    Four channels a thread go by large groups of rows, which only filters of four taps
    over 16-bit data have; all others access as much as a thread can.
    """
    return _four_channels(model) if model.width == 4 else _whole(model)


def _is_float(argument) -> bool:
    dtype = getattr(argument, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


@dataclass(frozen=True)
class KernelCase:
    """One way to call an op that runs a certain kernel.

    Attributes:
        name: what the report calls it.
        kernel: name of the kernel function.
        build: from a model to (function, arguments, number of outputs).
        loops: is the time spent in a loop over tokens, or in straight-line code?
        max_per_output: bound on thread instructions per output. An H200 can issue about
            31 in the time in which its memory moves a bfloat16 in and one out.
        goal: the same for bfloat16 on sm_90, if it is tighter.
        max_registers: a thread's, if it may have more than others.
        max_spills: bytes that it may spill, stores and loads together.
        access: from a model to the bytes of the kernel's narrowest access to an input
            or output, where rows align.
        models: whose convs it is compiled for.
    """

    name: str
    kernel: str
    build: Callable[[ModelShape], tuple[Callable, tuple, int]]
    loops: bool
    max_per_output: float
    goal: float = math.inf
    max_registers: int = 0
    max_spills: int = 0
    access: Callable[[ModelShape], int] = _whole
    models: tuple[ModelShape, ...] = tuple(by_kernel())

    def bound(self, model: ModelShape, compute_capability: int) -> float:
        """The most instructions that an output may take."""
        on_hopper = (model.dtype, compute_capability) == ("bfloat16", 90)
        return min(self.max_per_output, self.goal if on_hopper else math.inf)


_ONE_MODEL = tuple(m for m in MODELS if m.name == "Mamba2-2.7B")
_THREE_MODELS = tuple(
    m for m in MODELS if m.name in ("Mamba2-130M", "Mamba2-2.7B", "LFM2-1.2B")
)
_FORWARD = {"loops": True, "max_per_output": 14, "access": _large_groups}
_BACKWARD = {
    "loops": True,
    "max_per_output": 27,
    "goal": 26,
    "access": _four_channels,
}
_DECODE = {"loops": False, "max_per_output": 48}
_packed_drafts = functools.partial(packed, drafts=4)
_update_drafts = functools.partial(update, tokens=4, drafts=4)
_update_circular = functools.partial(update, drafts=4, circular=True)
_dense_segments = functools.partial(dense, segments=True)
# As in Engram (dilation) and Canon layers (residual), both at once.
_OPTIONS = {"dilation": 3, "residual": True}
_DILATED_FORWARD = _FORWARD | {"max_per_output": 18}
_packed_dilated = functools.partial(packed, **_OPTIONS)
_update_dilated = functools.partial(update, **_OPTIONS)
_dense_dilated = functools.partial(dense, **_OPTIONS)

# Long rows, whose loads are issued ahead, take 12.06; 11.3 without, which is slower
# (benchmarks/NOTES.md).
_PACKED_GOAL = 12.1

# A new kernel needs a line here, and nothing else.
KERNELS = (
    KernelCase("packed", "packed_kernel", packed, **_FORWARD, goal=_PACKED_GOAL),
    KernelCase("update", "update_kernel", update, **_DECODE),
    KernelCase("dense", "dense_kernel", dense, **_FORWARD, models=_THREE_MODELS),
    KernelCase(
        "packed gradient",
        "packed_backward_kernel",
        functools.partial(gradient, packed),
        **_BACKWARD,
        models=_THREE_MODELS,
    ),
    KernelCase(
        "dense gradient",
        "rows_backward_kernel",
        functools.partial(gradient, dense),
        **_BACKWARD,
        models=_THREE_MODELS,
    ),
    KernelCase(
        "packed, drafts",
        "packed_kernel",
        _packed_drafts,
        **_FORWARD,
        goal=_PACKED_GOAL,
        models=_ONE_MODEL,
    ),
    KernelCase(
        "update, 4 tokens, drafts",
        "update_kernel",
        _update_drafts,
        **_DECODE,
        models=_ONE_MODEL,
    ),
    KernelCase(
        "update, circular",
        "update_kernel",
        _update_circular,
        **_DECODE,
        models=_ONE_MODEL,
    ),
    KernelCase(
        "dense, segments",
        "dense_kernel",
        _dense_segments,
        loops=True,
        max_per_output=24,
        access=_large_groups,
        models=_ONE_MODEL,
    ),
    KernelCase(
        "packed, dilated",
        "packed_kernel",
        _packed_dilated,
        **_DILATED_FORWARD,
        models=_ONE_MODEL,
    ),
    KernelCase(
        "update, dilated",
        "update_kernel",
        _update_dilated,
        **_DECODE,
        models=_ONE_MODEL,
    ),
    KernelCase(
        "dense, dilated",
        "dense_kernel",
        _dense_dilated,
        **_DILATED_FORWARD,
        models=_ONE_MODEL,
    ),
    KernelCase(
        "packed gradient, dilated",
        "packed_backward_kernel",
        functools.partial(gradient, _packed_dilated),
        **_BACKWARD,
        max_spills=16,  # 8 on sm_100 under Triton 3.9, none on the others
        models=_ONE_MODEL,
    ),
    KernelCase(
        "dense gradient, dilated",
        "rows_backward_kernel",
        functools.partial(gradient, _dense_dilated),
        **_BACKWARD,
        max_registers=255,  # 214 to 250, and no spills
        models=_ONE_MODEL,
    ),
)


@dataclass(frozen=True)
class Row:
    """One kernel, compiled for one model and GPU.

    Attributes:
        per_output: thread instructions per output: of the steady loop, or of the
            whole program for a kernel without one (an upper bound, as no launch takes
            every branch).
        loads: widths in bytes of its global loads, in the steady loop if it has one.
        stores: likewise of its stores.
    """

    kernel: str
    model: ModelShape
    compute_capability: int
    code: MachineCode
    per_output: float
    loads: tuple[int, ...]
    stores: tuple[int, ...]


def compile_row(case: KernelCase, model: ModelShape, compute_capability: int) -> Row:
    """Compiles the kernel of a case for one model and GPU."""
    function, arguments, outputs = case.build(model)
    codes = machine_code.compile_kernels(function, arguments, compute_capability)
    (code,) = [code for code in codes if code.name == case.kernel]
    return measure(case, model, compute_capability, outputs, code)


def measure(
    case: KernelCase,
    model: ModelShape,
    compute_capability: int,
    outputs: int,
    code: MachineCode,
) -> Row:
    """The row of a kernel that a case runs, which makes so many outputs a launch."""
    part = code.steady_loop() if case.loops else code
    if part is None:
        raise ValueError(f"{case.name} has no loop over tokens for {model}")
    stores = part.accesses("STG")
    if case.loops:
        made = sum(stores) / jnp.dtype(model.dtype).itemsize
    else:
        made = outputs / code.threads
    return Row(
        case.name,
        model,
        compute_capability,
        code,
        len(part.instructions) / made,
        tuple(part.accesses("LDG")),
        tuple(stores),
    )


def rows(
    compute_capabilities: Iterable[int] = COMPUTE_CAPABILITIES,
    kernels: Iterable[KernelCase] = KERNELS,
) -> Iterator[Row]:
    """All rows of the report."""
    for case in kernels:
        for model in case.models:
            for capability in compute_capabilities:
                yield compile_row(case, model, capability)


HEADER = (
    "kernel",
    "models",
    "D",
    "W",
    "dtype",
    "sm",
    "PTX",
    "registers",
    "spilled",
    "loads",
    "stores",
    "instr/output",
)


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table, under HEADER."""
    model = row.model
    return (
        row.kernel,
        by_kernel().get(model, model.name),
        str(model.dim),
        str(model.width),
        model.dtype,
        str(row.compute_capability),
        row.code.ptx_version,
        str(row.code.registers),
        str(row.code.spills),
        _widths(row.loads),
        _widths(row.stores),
        f"{row.per_output:.1f}",
    )


def _widths(widths: tuple[int, ...]) -> str:
    """How many accesses of each width: "4x16 B"."""
    return ", ".join(f"{widths.count(w)}x{w} B" for w in sorted(set(widths))[::-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cc", type=int, nargs="+", default=COMPUTE_CAPABILITIES)
    names = [case.name for case in KERNELS]
    parser.add_argument("--kernel", nargs="+", choices=names, default=names)
    arguments = parser.parse_args()
    if reason := machine_code.missing_for_kernels():
        parser.error(reason)
    machine_code.expect_no_gpu()
    kernels = [case for case in KERNELS if case.name in arguments.kernel]
    print("| " + " | ".join(HEADER) + " |")
    print("|---" * len(HEADER) + "|")
    for row in rows(arguments.cc, kernels):
        print("| " + " | ".join(cells(row)) + " |", flush=True)


if __name__ == "__main__":
    main()
