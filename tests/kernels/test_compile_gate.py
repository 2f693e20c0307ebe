"""Every kernel, for the convs of published models and three GPUs, in machine code.

Nothing here needs a GPU: kernels are lowered as jax-triton would launch them, then
assembled and disassembled with Triton's own tools. `python -m benchmarks.kernel_report`
prints what these tests assert.
"""

import dataclasses
import functools
import importlib.metadata

import jax
import jax.numpy as jnp
import pytest

from jax_causal_conv import (
    causal_conv1d,
    causal_conv1d_fn,
    causal_conv1d_update,
    target_compute_capability,
)
from tests.support import gpu_compiler

if reason := gpu_compiler.missing_for_kernels():
    pytest.skip(reason, allow_module_level=True)

from benchmarks import kernel_report
from jax_causal_conv.kernels.lowered import lowered_kernels

# 65,536 registers a multiprocessor leave room for 12 warps of 168. No limit is
# set: most kernels take 128 or fewer under Triton 3.9, and under a limit of 128 some
# would spill instead.
MAX_REGISTERS = 168
CHOOSES_PTX = not importlib.metadata.version("jax-triton").startswith("0.3.")

# Every kernel on sm_90, whose bounds are the tightest, and for Mamba2-2.7B on the other
# GPUs. Models that differ in D alone get the same instructions with other numbers in
# them. So on sm_90 there are, besides, one of float32, one whose D wastes half a block,
# one without a bias and one of width 3. Forward kernels with an option meet one of the
# other GPUs, by turns; gradients, which have no registers to spare, both. The report
# has all models.
MODEL = "Mamba2-2.7B"
DIFFERENT = ("Mamba2-130M", "Zamba2-2.7B", "Qwen3-Next-80B", "LFM2-1.2B")


def gpus_of(number, case, model):
    """The compute capabilities for which a case is compiled."""
    if model.name != MODEL:
        return (90,) if model.name in DIFFERENT else ()
    plain = "," not in case.name or "gradient" in case.name
    return kernel_report.COMPUTE_CAPABILITIES if plain else (90, (80, 100)[number % 2])


CASES = [
    pytest.param(case, model, capability, id=f"{case.name}-{model.name}-{capability}")
    for number, case in enumerate(kernel_report.KERNELS)
    for model in case.models
    for capability in gpus_of(number, case, model)
]


def assert_stays_in_registers(code, max_registers, max_spills):
    assert code.registers <= max_registers
    assert code.spills <= max_spills, (
        f"{code.spills} bytes spilled at {code.registers} registers"
    )
    assert code.stack <= max_spills
    assert code.local_accesses() <= max_spills // 4


@pytest.mark.parametrize("case, model, capability", CASES)
def test_kernel_is_lean_and_its_accesses_are_wide(case, model, capability):
    row = kernel_report.compile_row(case, model, capability)
    max_registers = case.max_registers or MAX_REGISTERS
    assert_stays_in_registers(row.code, max_registers, case.max_spills)
    assert row.per_output <= case.bound(model, capability)
    access = case.access(model)
    assert min(row.stores) >= access, row.stores
    # Flags, slots, segment ids and the filter may be narrower, but no row of x.
    wide = sum(width for width in row.loads if width >= access)
    rows = sum(row.stores) if case.loops else model.width * access
    assert wide >= rows, row.loads


@pytest.mark.parametrize("case", kernel_report.KERNELS[:2], ids=lambda case: case.name)
@pytest.mark.parametrize("dim, width", [(5384, 16), (5380, 8), (5378, 4), (5377, 2)])
def test_stores_are_as_wide_as_the_rows_alignment_allows(case, dim, width):
    """Up to the 8 bytes of a thread in groups of rows, and else to 16."""
    model = dataclasses.replace(case.models[1], dim=dim)
    row = kernel_report.compile_row(case, model, 90)
    assert set(row.stores) == {min(width, case.access(model))}


def test_code_is_for_the_gpu_that_is_asked_for():
    case = kernel_report.KERNELS[0]
    function, arguments, _ = case.build(case.models[0])
    jitted = jax.jit(function)
    targets = {}
    for capability in kernel_report.COMPUTE_CAPABILITIES:
        with target_compute_capability(capability):
            lowered = jitted.trace(*arguments).lower(lowering_platforms=("cuda",))
        (kernel,) = lowered_kernels(lowered)
        targets[capability] = kernel.target.rstrip("af")
    assert targets == {80: "sm_80", 90: "sm_90", 100: "sm_100"}


@pytest.mark.skipif(not CHOOSES_PTX, reason="jax-triton 0.3 takes no PTX version")
@pytest.mark.parametrize(
    "capability, version", [(80, "8.0"), (90, "8.0"), (100, "8.6")]
)
def test_ptx_is_old_enough_for_every_assembler_that_knows_the_gpu(capability, version):
    case = kernel_report.KERNELS[1]
    row = kernel_report.compile_row(case, case.models[0], capability)
    assert row.code.ptx_version == version


# jax-triton 0.4.1 registers a rule for dead code elimination that jax 0.12 calls with
# other arguments. The ops are a primitive of their own, whose lowering jax does not
# clean up again, so the rule is never called. If this fails, jax 0.12 needs either a
# newer jax-triton or a rule of our own in kernels/bridge.py.
def test_lowering_never_asks_jax_triton_to_eliminate_dead_code(monkeypatch):
    from jax.interpreters import partial_eval
    from jax_triton import triton_lib

    def refuse(*_):
        raise AssertionError("jax-triton's rule for dead code elimination was called")

    primitive = triton_lib.triton_kernel_call_p
    monkeypatch.setitem(partial_eval.dce_rules, primitive, refuse)
    calls = [case.build(case.models[0])[:2] for case in kernel_report.KERNELS]
    for function, arguments in calls[:2]:  # those that update a state
        calls += [(f(function), arguments) for f in (_only_states, _in_scan)]
    for function, arguments in calls:
        traced = jax.jit(function).trace(*arguments)
        traced.lower(lowering_platforms=("cuda",))


def _only_states(function):
    """The same call, its output unused."""
    return lambda *arguments: function(*arguments)[1]


def _in_scan(function):
    """Three times the same call on a carried state."""

    def run(*arguments):
        at = max(i for i, a in enumerate(arguments) if getattr(a, "ndim", 0) == 3)
        out_and_state = functools.partial(_with_state, function, arguments, at)
        return jax.lax.scan(out_and_state, arguments[at], length=3)

    return run


def _with_state(function, arguments, at, state, _):
    out, state = function(*arguments[:at], state, *arguments[at + 1 :])
    return state, out.sum()


@pytest.mark.parametrize("width", [1, 5, 17])
def test_kernels_of_any_width_compile_forward_and_backward(width):
    x, weight, bias = jnp.ones((2, 9, 64)), jnp.ones((64, width)), jnp.ones(64)
    states = jnp.ones((2, width + 1, 64))
    segment_ids = jnp.zeros((2, 9), jnp.int32)

    def all_ops(x, weight, bias, states):
        packed, new_states = causal_conv1d_fn(
            x[0], weight, bias, states, jnp.array([0, 3, 9])
        )
        if width > 16:  # one of two backward kernels will do: they share the long part
            x, weight, bias, states = map(
                jax.lax.stop_gradient, (x, weight, bias, states)
            )
        dense = causal_conv1d(
            x, weight, bias, initial_state=states, segment_ids=segment_ids
        )
        row, states = causal_conv1d_update(x, states, weight, bias)
        ring, states = causal_conv1d_update(
            x, states, weight, bias, cache_seqlens=jnp.array([0, 1])
        )
        return sum(y.sum() for y in (dense, packed, new_states, row, ring, states))

    traced = jax.jit(jax.grad(all_ops, (0, 1, 2, 3))).trace(x, weight, bias, states)
    lowered = traced.lower(lowering_platforms=("cuda",))
    names = [kernel.name for kernel in lowered_kernels(lowered)]
    assert names.count("rows_backward_kernel") == (3 if width <= 16 else 0), names
    assert names.count("packed_backward_kernel") == 1, names
