"""State is a value: donation, jit, scan, export, and the choice of implementation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.programs import cache_copies
from jax_causal_conv import (
    build_metadata,
    causal_conv1d_fn,
    causal_conv1d_update,
    target_compute_capability,
)
from tests.support import checks
from tests.support.draws import draw_packed, draw_update, ints
from tests.support.platforms import KERNEL_CALLS, ON_CPU, exported, needs_triton

pytestmark = pytest.mark.forward_only

WIDTH = 4


def packed(arrays, metadata=None, implementation=None):
    return causal_conv1d_fn(**arrays, metadata=metadata, implementation=implementation)


def update(arrays, implementation=None):
    return causal_conv1d_update(
        **arrays, activation="silu", implementation=implementation
    )


def check_result(case, result):
    out, states = checks.to_host(result)
    exact, want_states, magnitude = checks.expected(case)
    checks.assert_output(out, exact, magnitude, 4, "silu", case)
    checks.assert_same_bits(states, want_states, case)


def test_input_state_is_intact_without_donation(implementation):
    for case, op, name in (
        (draw_packed(1), packed, "conv_states"),
        (draw_update(1), update, "conv_state"),
        (draw_update(2, cache_seqlens=True, num_rejected_tokens=False), update, None),
    ):
        state = jnp.asarray(case.arrays[name or "conv_state"])
        arrays = case.arrays | {name or "conv_state": state}
        for call in (op, jax.jit(op, static_argnames="implementation")):
            _, new = call(arrays, implementation=implementation)
            before = case.arrays[name or "conv_state"]
            assert not np.array_equal(new, before), "the case changes no state"
            checks.assert_same_bits(np.asarray(state), before)


def test_donated_state_is_consumed_and_the_result_is_right(implementation):
    for case, op, name in (
        (draw_packed(3), packed, "conv_states"),
        (draw_update(3), update, "conv_state"),
        (draw_update(4, cache_seqlens=True, num_rejected_tokens=False), update, None),
    ):
        name = name or "conv_state"  # noqa: PLW2901 - the default for this op

        def step(state, arrays, op=op, name=name):
            return op(arrays | {name: state}, implementation=implementation)

        state = jnp.array(case.arrays[name])
        rest = {k: v for k, v in case.arrays.items() if k != name}
        result = jax.jit(step, donate_argnums=0)(state, rest)
        assert state.is_deleted()
        check_result(case, result)


OLD_XLA = jax.__version_info__ < (0, 11)
DECODES, MIXED = [1] * 5, [1, 9, 0, 4]
PROGRAMS = [
    *((packed, lengths) for lengths in ([1], [9], [1, 1], DECODES, MIXED)),
    *((op, [2] * rows) for op in ("update", "ring") for rows in (1, 2, 5)),
]


@pytest.mark.skipif(not ON_CPU, reason="reads the program that XLA made for a CPU")
@pytest.mark.parametrize(
    "op, lengths, dtype, drafts",
    [  # any two of program, dtype and drafts: each step is compiled as users have it
        (*program, dtype, 4 * ((i + j) % 2))
        for i, program in enumerate(PROGRAMS)
        for j, dtype in enumerate(("float32", "float16", "bfloat16"))
    ],
)
def test_donated_cache_is_neither_copied_nor_converted(op, lengths, dtype, drafts):
    if OLD_XLA and (dtype == "bfloat16" or op == "ring"):
        pytest.skip("before jax 0.11, XLA:CPU copies it")
    num_seqs, tokens, dim = len(lengths), sum(lengths), 24
    shape = (64, WIDTH - 1 + drafts, dim)
    x, weight = jnp.ones((tokens, dim), dtype), jnp.ones((dim, WIDTH), dtype)
    slots = jnp.arange(num_seqs)[::-1]
    rejected = jnp.ones(num_seqs, jnp.int32) if drafts else None

    def step(states, x, weight, slots, rejected):
        if op is packed:
            return causal_conv1d_fn(
                x,
                weight,
                None,
                states,
                jnp.array([0, *np.cumsum(lengths)]),
                cache_indices=slots,
                has_initial_state=slots >= 0,
                num_rejected_tokens=rejected,
            )
        ring = op == "ring"
        return causal_conv1d_update(
            x.reshape(num_seqs, 2, dim),
            states,
            weight,
            conv_state_indices=slots,
            cache_seqlens=slots if ring else None,
            num_rejected_tokens=None if ring else rejected,
        )

    jitted = jax.jit(step, donate_argnums=0)
    states = jnp.ones(shape, dtype)
    compiled = jitted.lower(states, x, weight, slots, rejected).compile()
    hlo = compiled.as_text()
    assert compiled.memory_analysis().alias_size_in_bytes == states.nbytes
    assert cache_copies(hlo, shape) == 0, hlo


@pytest.mark.skipif(OLD_XLA, reason="before jax 0.11, XLA:CPU copies it")
@pytest.mark.skipif(not ON_CPU, reason="reads the program that XLA made for a CPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_slots_that_nobody_numbered_are_updated_in_place(dtype):
    states, x = jnp.ones((64, WIDTH - 1, 256), dtype), jnp.ones((64, 256), dtype)
    jitted = jax.jit(causal_conv1d_update, donate_argnums=1)
    compiled = jitted.lower(x, states, jnp.ones((256, WIDTH), dtype)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == states.nbytes
    assert memory.temp_size_in_bytes < states.nbytes / 2


@pytest.mark.skipif(OLD_XLA, reason="before jax 0.11 no loop updates bfloat16")
@pytest.mark.skipif(not ON_CPU, reason="the loop is that for a CPU")
def test_slots_of_bfloat16_are_copied_as_bits():
    # XLA:CPU copies bfloat16 one number at a time.
    states, x = jnp.ones((64, WIDTH - 1, 24), "bfloat16"), jnp.ones((5, 24), "bfloat16")
    slots, weight = jnp.arange(5), jnp.ones((24, WIDTH), "bfloat16")

    def step(states, x, weight, slots):
        return causal_conv1d_update(x, states, weight, conv_state_indices=slots)

    hlo = jax.jit(step, donate_argnums=0).lower(states, x, weight, slots)
    hlo = hlo.compile().as_text()
    made = set(re.findall(rf"= (\w+)\[1,{WIDTH - 1},24\]\S* fusion\(", hlo))
    assert made == {"u16"}, hlo


def test_state_carried_through_scan(implementation):
    case = draw_update(5, num_queries=None, num_rejected_tokens=False)
    xs = np.random.default_rng(5).standard_normal((6, 4, 16)).astype(np.float32)

    @jax.jit
    def decode(state, xs):
        def step(state, x):
            out, state = update(
                case.arrays | {"x": x, "conv_state": state},
                implementation=implementation,
            )
            return state, out

        return jax.lax.scan(step, state, xs)

    state, outs = checks.to_host(decode(case.arrays["conv_state"], xs))
    for x, out in zip(xs, outs, strict=True):
        case = case.replace(x=x)
        exact, want_state, magnitude = checks.expected(case)
        checks.assert_output(out, exact, magnitude, 4, "silu")
        case = case.replace(conv_state=want_state)
    checks.assert_same_bits(state, case.arrays["conv_state"])


def test_op_under_cond_and_remat(implementation):
    case = draw_packed(6)

    @jax.jit
    def step(flag, arrays):
        def run(arrays):
            return packed(arrays, implementation=implementation)

        def skip(arrays):
            return jnp.zeros_like(arrays["x"]), jnp.asarray(arrays["conv_states"])

        return jax.lax.cond(flag, jax.checkpoint(run), skip, arrays)

    check_result(case, step(True, case.arrays))
    out, states = checks.to_host(step(False, case.arrays))
    np.testing.assert_array_equal(out, 0)
    checks.assert_same_bits(states, case.arrays["conv_states"])


def test_same_call_twice_gives_the_same_bits(implementation):
    case = draw_packed(7)
    first, second = (checks.call(case, implementation) for _ in range(2))
    checks.assert_same_bits(first[0], second[0])
    checks.assert_same_bits(first[1], second[1])


def test_eager_call_equals_the_jitted_one(implementation):
    for case, op in ((draw_packed(8), packed), (draw_update(8), update)):
        check_result(case, op(case.arrays, implementation=implementation))
        jitted = jax.jit(op, static_argnames="implementation")
        check_result(case, jitted(case.arrays, implementation=implementation))


def test_result_is_a_pair_in_eager_mode_and_under_jit(implementation):
    for case, op in ((draw_packed(21), packed), (draw_update(21), update)):
        for call in (op, jax.jit(op, static_argnames="implementation")):
            result = call(case.arrays, implementation=implementation)
            assert type(result) is tuple, type(result)
            assert len(result) == 2


def test_result_types_match_the_arguments(implementation):
    case = draw_packed(
        9, x_dtype=jnp.dtype("bfloat16"), state_dtype=np.dtype("float16")
    )
    out, states = packed(case.arrays, implementation=implementation)
    assert (out.shape, out.dtype) == ((24, 16), jnp.bfloat16)
    assert (states.shape, states.dtype) == ((6, 5, 16), jnp.float16)
    abstract = jax.eval_shape(
        lambda arrays: packed(arrays, implementation=implementation), case.arrays
    )
    assert (abstract[0].shape, abstract[0].dtype) == (out.shape, out.dtype)
    assert (abstract[1].shape, abstract[1].dtype) == (states.shape, states.dtype)


@pytest.mark.skipif(not ON_CPU, reason="a GPU may differ in the last bit from XLA:CPU")
def test_none_is_xla_on_a_cpu():
    case = draw_packed(10)
    chosen, forced = (checks.call(case, which) for which in (None, "xla"))
    checks.assert_same_bits(chosen[0], forced[0])
    checks.assert_same_bits(chosen[1], forced[1])


@pytest.mark.skipif(not ON_CPU, reason="there is a GPU: Triton can run")
def test_triton_raises_where_it_cannot_run():
    for case, op in ((draw_packed(11), packed), (draw_update(11), update)):
        traced = jax.jit(op, static_argnames="implementation").trace(
            case.arrays, implementation="triton"
        )
        with pytest.raises(Exception, match=r"triton.*CUDA"):
            traced.lower()


def test_export_for_cpu_and_cuda_serialises_and_runs_here():
    pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
    for case, op in (
        (draw_packed(12), packed),
        (draw_update(12), update),
        (draw_update(13, cache_seqlens=True, num_rejected_tokens=False), update),
    ):
        saved = exported(op, case.arrays)
        assert saved.platforms == ("cpu", "cuda")
        restored = jax.export.deserialize(saved.serialize())
        check_result(case, restored.call(case.arrays))


def test_export_with_metadata_as_an_argument():
    pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
    offsets, slots = ints(0, 3, 9, 10, 24), ints(5, 4, 0, 2)
    case = draw_packed(14, arrays={"query_start_loc": offsets, "cache_indices": slots})
    metadata = build_metadata(case.arrays["query_start_loc"], 24, block_m=8)
    saved = exported(packed, case.arrays, metadata).serialize()
    restored = jax.export.deserialize(saved)
    check_result(case, restored.call(case.arrays, metadata))
    other = case.replace(query_start_loc=ints(5, 5, 7, 20, 23))
    metadata = build_metadata(other.arrays["query_start_loc"], 24, block_m=8)
    check_result(other, restored.call(other.arrays, metadata))


@needs_triton
def test_function_traced_on_a_cpu_host_carries_the_kernel_for_a_gpu():
    for case, op in ((draw_packed(15), packed), (draw_update(15), update)):
        for_gpu = exported(op, case.arrays, platforms=("cuda",))
        for_cpu = exported(op, case.arrays, platforms=("cpu",))
        assert KERNEL_CALLS[0] in for_gpu.mlir_module()
        assert KERNEL_CALLS[0] not in for_cpu.mlir_module()
        forced = exported(
            lambda arrays, op=op: op(arrays, implementation="xla"),
            case.arrays,
            platforms=("cuda",),
        )
        assert KERNEL_CALLS[0] not in forced.mlir_module()


@needs_triton
def test_empty_call_launches_no_kernel():
    for case, op in (
        (draw_packed(16, num_tokens=0), packed),
        (draw_packed(16, channels=0), packed),
        (draw_update(16, num_rows=0), update),
        (draw_update(16, num_queries=0), update),
    ):
        module = exported(op, case.arrays, platforms=("cuda",)).mlir_module()
        assert KERNEL_CALLS[0] not in module


def lowered_for(capability, jitted, arrays):
    with target_compute_capability(capability):
        lowered = jitted.trace(arrays).lower(lowering_platforms=("cuda",))
    return lowered.as_text()


@needs_triton
def test_one_jitted_function_lowers_to_one_kernel_per_compute_capability():
    case, jitted = draw_packed(17), jax.jit(packed)
    hopper = lowered_for(90, jitted, case.arrays)
    ampere = lowered_for(80, jitted, case.arrays)
    assert hopper != ampere
    assert lowered_for(90, jitted, case.arrays) == hopper


@pytest.mark.skipif(not ON_CPU, reason="a visible GPU decides instead")
@needs_triton
def test_default_target_is_9_0_and_an_inner_one_wins():
    case, jitted = draw_packed(18), jax.jit(packed)
    default = jitted.trace(case.arrays).lower(lowering_platforms=("cuda",)).as_text()
    with target_compute_capability(80):
        assert lowered_for(90, jitted, case.arrays) == default
        inside = jitted.trace(case.arrays).lower(lowering_platforms=("cuda",))
        assert inside.as_text() != default
    again = jitted.trace(case.arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert again == default


def test_target_does_not_matter_to_a_call_here(implementation):
    if implementation == "triton":
        capability = int(float(jax.devices()[0].compute_capability) * 10)
    else:
        capability = 80
    case = draw_packed(19)
    with target_compute_capability(capability):
        checks.check(case, implementation)


def test_eager_calls_of_one_shape_compile_once(implementation, caplog):
    """Notebooks call ops outside jit; a compilation per call would be a defect."""
    for case, op in (
        (draw_packed(20, channels=7), packed),
        (draw_update(20, channels=7), update),
    ):
        arrays = {k: v for k, v in case.arrays.items() if v is not None}
        arrays = jax.tree.map(jnp.asarray, arrays)
        counts = []
        for _ in range(2):
            caplog.clear()
            with jax.log_compiles():
                jax.block_until_ready(op(arrays, implementation=implementation))
            counts.append(sum("Finished XLA compilation" in m for m in caplog.messages))
        assert counts[0] > 0, "the log of compilations was not seen"
        assert counts[1] == 0, f"{counts[1]} compilations in the second call"
