"""The SSD's kernels for a layer of Mamba2-2.7B and three GPUs, in machine code.

Nothing here needs a GPU, see test_compile_gate.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

import jax_causal_conv as jcc
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


@functools.cache
def compiled(name, states, capability):
    tokens, seqs, prefills, *_ = BATCHES[name]

    def struct(shape, dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    def step(x, dt, A, B, C, D, bias, states, offsets, slots, known):
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
    )
    kernels = machine_code.compile_kernels(step, arguments, capability)
    (code,) = (kernel for kernel in kernels if kernel.name == name.split()[0])
    return code


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("states", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BATCHES)
def test_kernel_stays_in_registers(name, states, capability):
    code = compiled(name, states, capability)
    *_, registers, stack = BATCHES[name]
    assert code.registers <= registers
    assert code.stack <= stack, f"{code.stack} bytes at {code.registers} registers"


@pytest.mark.parametrize("states", ["float32", "bfloat16"])
def test_states_are_read_and_written_by_sixteen_bytes(states):
    code = compiled("decode_kernel", states, 90)
    own = 16 * 4 * SIZE  # bytes of a program, of one element a float32 or two bfloat16
    threads = 64 if states == "float32" else 128
    for kind in ("LDG", "STG"):
        wide = [width for width in code.accesses(kind) if width == 16]
        assert 16 * len(wide) * threads >= own, code.accesses(kind)
