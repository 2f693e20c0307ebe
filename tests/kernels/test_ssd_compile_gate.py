"""The SSD's kernels for a layer of Mamba2-2.7B and three GPUs, in machine code.

Nothing here needs a GPU, see test_compile_gate.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

import jax_causal_conv as jcc
from jax_causal_conv.mamba2 import DraftStates
from tests.support import gpu_compiler

if reason := gpu_compiler.missing_for_kernels():
    pytest.skip(reason, allow_module_level=True)

from benchmarks import machine_code

HEADS, DIM, GROUPS, SIZE, SLOTS = 80, 64, 1, 128, 264

# By kernel: tokens, sequences and most prefills of a batch; the most registers and
# bytes of local memory. A program of chunks holds 64 elements of a state a thread and
# as much again of terms and sums: it takes all registers that there are, and some of
# what its loop only reads is kept outside.
BATCHES = {
    "decode_kernel": (256, 256, 0, 128, 0),
    "prepare_kernel": (2048, 256, 4, 168, 0),
    "prepare_kernel with stretches": (2048, 1, 1, 255, 0),
    "chunks_kernel": (2048, 256, 4, 255, 512),
}
# Ampere's matrix units take operands and sums from registers alone.
AMPERE_STACK = {"prepare_kernel with stretches": 32}


def compiled(name, states, capability):
    kernels = compiled_step(*BATCHES[name][:3], states, capability)
    (code,) = (kernel for kernel in kernels if kernel.name == name.split()[0])
    return code


@functools.cache
def compiled_step(tokens, seqs, prefills, states, capability, drafts=0):
    """The machine code of all kernels of a call."""

    def struct(shape, dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    def step(x, dt, A, B, C, D, bias, states, offsets, slots, known, recent):
        if drafts:
            states = DraftStates(states, *recent)
        return jcc.ssd_packed(
            x,
            dt,
            A,
            B,
            C,
            D,
            states,
            offsets,
            cache_indices=slots,
            has_initial_state=known,
            max_prefills=prefills,
            dt_bias=bias,
            dt_softplus=True,
            implementation="triton",
        )

    of_head = struct((HEADS,), "float32")
    of_group = struct((tokens, GROUPS, SIZE), "bfloat16")
    arguments = (
        struct((tokens, HEADS, DIM), "bfloat16"),
        struct((tokens, HEADS), "bfloat16"),
        of_head,
        of_group,
        of_group,
        of_head,
        of_head,
        struct((SLOTS, HEADS, DIM, SIZE), states),
        struct((seqs + 1,), "int32"),
        struct((seqs,), "int32"),
        struct((seqs,), "bool"),
        (
            struct((SLOTS, drafts, HEADS, DIM), "bfloat16"),
            struct((SLOTS, drafts, HEADS), "float32"),
            struct((SLOTS, drafts, GROUPS, SIZE), "bfloat16"),
        ),
    )
    return list(machine_code.compile_kernels(step, arguments, capability))


BACKWARD = (
    "backward_prepare_kernel",
    "backward_states_kernel",
    "backward_tokens_kernel",
    "backward_pairs_kernel",
    "backward_heads_kernel",
    "backward_finish_kernel",
)


# Bytes of local memory; none on Hopper, where the tiles were chosen.
BACKWARD_STACK = {80: 64, 90: 0, 100: 16}


@functools.cache
def compiled_gradient(capability, rows=8, tokens=2048, heads=HEADS, dim=DIM, size=SIZE):
    """The machine code of all kernels of the gradient of dense rows."""

    def struct(shape, dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    def gradient(operands, dy):
        def outputs(x, dt, A, B, C, D, bias):
            return jcc.ssd(
                *(x, dt, A, B, C, D),
                dt_bias=bias,
                dt_softplus=True,
                implementation="triton",
            )

        return jax.vjp(outputs, *operands)[1](dy)

    of_head = struct((heads,), "float32")
    of_group = struct((rows, tokens, GROUPS, size), "bfloat16")
    x = struct((rows, tokens, heads, dim), "bfloat16")
    dt = struct((rows, tokens, heads), "bfloat16")
    operands = (x, dt, of_head, of_group, of_group, of_head, of_head)
    return list(machine_code.compile_kernels(gradient, (operands, x), capability))


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_gradient_stays_in_registers(capability):
    kernels = {code.name: code for code in compiled_gradient(capability)}
    assert kernels.keys() == set(BACKWARD)
    for name, code in kernels.items():
        assert code.stack <= BACKWARD_STACK[capability], (
            f"{name}: {code.stack} bytes at {code.registers} registers"
        )


def test_gradient_compiles_where_sizes_are_one():
    """A number that is 1 (rows, tokens, tiles, groups) is a constant to the kernels."""
    kernels = compiled_gradient(90, rows=1, tokens=1, heads=1, dim=16, size=16)
    assert [code.name for code in kernels] == list(BACKWARD)


# States are converted as they come and go, by the same instructions on all GPUs.
@pytest.mark.parametrize(
    "states, capability",
    [("float32", 80), ("float32", 90), ("float32", 100), ("bfloat16", 90)],
)
@pytest.mark.parametrize("name", BATCHES)
def test_kernel_stays_in_registers(name, states, capability):
    code = compiled(name, states, capability)
    *_, registers, stack = BATCHES[name]
    if capability == 80:
        stack = AMPERE_STACK.get(name, stack)
    assert code.registers <= registers
    assert code.stack <= stack, f"{code.stack} bytes at {code.registers} registers"


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_drafts_stay_in_registers(capability):
    """Three drafts a sequence: a program holds 64 elements of a state a thread."""
    kernels = compiled_step(512, 128, 0, "float32", capability, drafts=3)
    assert [code.name for code in kernels] == ["decode_kernel", "recent_kernel"]
    for code in kernels:
        assert code.registers <= 168
        assert code.stack == 0, f"{code.stack} bytes at {code.registers} registers"


@pytest.mark.parametrize("states", ["float32", "bfloat16"])
def test_states_are_read_and_written_by_sixteen_bytes(states):
    code = compiled("decode_kernel", states, 90)
    own = 16 * 4 * SIZE  # bytes of a program, of one element a float32 or two bfloat16
    threads = 64 if states == "float32" else 128
    for kind in ("LDG", "STG"):
        wide = [width for width in code.accesses(kind) if width == 16]
        assert 16 * len(wide) * threads >= own, code.accesses(kind)
