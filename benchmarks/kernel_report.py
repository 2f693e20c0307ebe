"""What the GPU's machine code looks like, for real models, without a GPU.

    python -m benchmarks.kernel_report [--cc 80 90 100] [--kernel NAME ...]

compiles every kernel through its op for the convs of published models and prints a
table. The compile gate in `tests/` asserts bounds on the same rows.
"""

import argparse
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp

import jax_causal_conv as jcc
from benchmarks.model_shapes import MODELS, ModelShape, by_kernel
from tests import gpu_compiler
from tests.gpu_compiler import MachineCode

COMPUTE_CAPABILITIES = (80, 90, 100)

_TOKENS, _SEQS, _SLOTS, _BATCH = 2048, 64, 128, 64


def _struct(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _filters(model: ModelShape) -> tuple:
    weight = _struct((model.dim, model.width), model.dtype)
    return weight, _struct((model.dim,), model.dtype) if model.bias else None


def packed(model: ModelShape, *, drafts: int = 0) -> tuple[Callable, tuple, int]:
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
        )

    rows = _struct((_SEQS,), "int32")
    arguments = (
        _struct((_TOKENS, model.dim), model.dtype),
        *_filters(model),
        _struct((_SLOTS, model.width - 1 + drafts, model.dim), model.dtype),
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
    model: ModelShape, *, tokens: int = 1, drafts: int = 0, circular: bool = False
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
        )

    rows = _struct((_BATCH,), "int32")
    arguments = (
        _struct((_BATCH, tokens, model.dim), model.dtype),
        _struct((_SLOTS, model.width - 1 + drafts, model.dim), model.dtype),
        *_filters(model),
        rows,
        rows if circular else None,
        rows if drafts and not circular else None,
    )
    return call, arguments, _BATCH * tokens * model.dim


@dataclass(frozen=True)
class KernelCase:
    """One way to call an op that ends in one kernel.

    Attributes:
        build: from a model to (function, arguments, number of outputs).
        loops: is the time spent in a loop over tokens, or in straight-line code?
        max_per_output: bound on thread instructions per output. An H200 can issue about
            31 in the time in which its memory moves a bfloat16 in and one out.
        models: whose convs it is compiled for.
    """

    name: str
    build: Callable[[ModelShape], tuple[Callable, tuple, int]]
    loops: bool
    max_per_output: float
    models: tuple[ModelShape, ...] = tuple(by_kernel())


_ONE_MODEL = tuple(m for m in MODELS if m.name == "Mamba2-2.7B")

# A new kernel needs a line here, and nothing else.
KERNELS = (
    KernelCase("packed", packed, loops=True, max_per_output=24),
    KernelCase("update", update, loops=False, max_per_output=48),
    KernelCase(
        "packed, drafts",
        functools.partial(packed, drafts=4),
        loops=True,
        max_per_output=24,
        models=_ONE_MODEL,
    ),
    KernelCase(
        "update, 4 tokens, drafts",
        functools.partial(update, tokens=4, drafts=4),
        loops=False,
        max_per_output=48,
        models=_ONE_MODEL,
    ),
    KernelCase(
        "update, circular",
        functools.partial(update, drafts=4, circular=True),
        loops=False,
        max_per_output=48,
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
    """Compiles one kernel for one model and GPU."""
    function, arguments, outputs = case.build(model)
    (code,) = gpu_compiler.compile_kernels(function, arguments, compute_capability)
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
    if reason := gpu_compiler.missing_for_kernels():
        parser.error(reason)
    gpu_compiler.expect_no_gpu()
    kernels = [case for case in KERNELS if case.name in arguments.kernel]
    print("| " + " | ".join(HEADER) + " |")
    print("|---" * len(HEADER) + "|")
    for row in rows(arguments.cc, kernels):
        print("| " + " | ".join(cells(row)) + " |", flush=True)


if __name__ == "__main__":
    main()
