"""Gradients of all ops against the per-request float64 chain rule in reference.py.

A gradient is a sum of products, accumulated in float32 and rounded once to the dtype
of its primal. So it must lie within one unit in the last place of the float64 result,
plus the error of a float32 sum of that many terms, plus what the float32 error of
`silu'(z)` contributes to each term.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_causal_conv
from tests.support import cases, checks, quick, reference
from tests.support.cases import FLOATS
from tests.support.derivatives import check_derivatives
from tests.support.draws import (
    SEGMENTS,
    half,
    ints,
    named_segments,
    offsets_of,
    poisoned,
)
from tests.support.gradients import (
    EACH_OP,
    SMALL_PACKED,
    assert_gradient,
    assert_gradients,
    check_gradients,
    draw_cotangents,
    expected_gradients,
    names,
    one_of_each_op,
    options,
    pull,
    small_dense,
    small_packed,
    small_ring,
    small_update,
    split,
)

f32, i32 = np.float32, np.int32


def test_reference_gradients_are_differences_of_the_reference():
    double = np.dtype("float64")
    kinds = ("x_dtype", "weight_dtype", "bias_dtype", "state_dtype")
    for case in one_of_each_op(1, **dict.fromkeys(kinds, double)):
        op, _, order = names(case)
        dout, dstate = cotangents = draw_cotangents(case)
        forward = getattr(reference, op)

        def loss(case, forward=forward, dout=dout, dstate=dstate):
            out, state = forward(**case.arrays, **case.options)
            return (out * dout).sum() + (state * dstate).sum()

        for name in order:
            array, want = (
                case.arrays[name],
                expected_gradients(case, cotangents)[name][0],
            )
            direction = np.random.default_rng(2).standard_normal(array.shape)
            ends = [
                loss(case.replace(**{name: array + step * direction}))
                for step in (1e-5, -1e-5)
            ]
            slope, product = (ends[0] - ends[1]) / 2e-5, (want * direction).sum()
            error = abs(slope - product)
            assert error < 1e-7 * (1 + abs(product)), (op, name, slope, product)


@pytest.mark.parametrize(
    "activation, bias, state_len, final, segments",
    half(("silu", None), (FLOATS[0], None), (3, None), (True, False), (True, False)),
)
def test_combinations_of_options_of_the_dense_op(
    implementation, activation, bias, state_len, final, segments
):
    case = small_dense(
        3,
        width=2,
        activation=activation,
        bias_dtype=bias,
        state_len=state_len,
        segment_ids=segments,
    )
    check_gradients(case, implementation, final=final)


@pytest.mark.parametrize("state_len", [None, 3, 14])
def test_dense_with_runs_and_padding_in_every_place(implementation, state_len):
    check_gradients(named_segments(4, state_len=state_len), implementation)


def test_dense_with_random_runs(implementation):
    for seed in range(20 if implementation != "interpret" else 4):
        check_gradients(small_dense(seed, num_tokens=20), implementation, seed=seed)


@pytest.mark.parametrize(
    "width, state_len", [(1, 0), (1, 3), (1, None), (2, 1), (3, 5), (5, 4), (8, 10)]
)
def test_dense_with_other_widths(implementation, width, state_len):
    case = small_dense(5, width=width, state_len=state_len, num_tokens=9)
    check_gradients(case, implementation)


def test_dense_rows_around_the_width_and_the_block(implementation):
    lengths = [1, 3]
    if implementation in ("interpret", "triton"):  # blocks are of 16 or 32 tokens
        lengths += [15, 16, 17, 31, 33, 67]
    for num_tokens in lengths:
        check_gradients(small_dense(6, num_tokens=num_tokens), implementation)


@pytest.mark.parametrize("num_tokens", [128, 301])
def test_long_rows_of_bfloat16(implementation, num_tokens):
    """By larger groups of rows than others."""
    kinds = {"x_dtype": FLOATS[2], "state_dtype": FLOATS[2]}
    sizes = {"num_tokens": num_tokens, "channels": 34, "width": 4, "state_len": 3}
    check_gradients(small_dense(8, **sizes, **kinds, segment_ids=False), implementation)


@pytest.mark.parametrize("channels", [1, 3, 100, 257])
def test_any_number_of_channels(implementation, channels):
    check_gradients(small_dense(7, num_tokens=6, channels=channels), implementation)
    arrays = {"query_start_loc": offsets_of([2, 1, 1, 4])}
    case = small_packed(7, num_tokens=9, channels=channels, arrays=arrays)
    check_gradients(case, implementation)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [None, FLOATS[0]])
def test_packed(implementation, activation, bias):
    check_gradients(
        small_packed(8, activation=activation, bias_dtype=bias), implementation
    )


def test_packed_without_optional_indices(implementation):
    absent = dict.fromkeys(
        ("cache_indices", "has_initial_state", "num_rejected_tokens")
    )
    check_gradients(small_packed(9, arrays=absent), implementation)
    partly = {"cache_indices": None, "num_rejected_tokens": None}
    check_gradients(small_packed(9, arrays=partly), implementation)


@pytest.mark.parametrize(
    "width, state_len, block_m",
    [(1, 2, 8), (2, 1, 11), (4, 9, 8), (4, 3, 11), (8, 7, 8)],
)
def test_packed_lengths_around_the_block(implementation, width, state_len, block_m):
    lengths = [block_m - 1, block_m, block_m + 1, 1, 0, 2 * block_m + 1]
    slots = {"cache_indices": ints(5, 0, 3, 6, 6, 1)}
    slots["query_start_loc"] = offsets_of(lengths, head=1)
    slots["has_initial_state"] = np.array([True, False, True, True, True, True])
    slots["num_rejected_tokens"] = ints(0, 1, 1, 0, 2, 3)
    case = small_packed(
        10,
        num_tokens=sum(lengths) + 3,
        num_seqs=6,
        width=width,
        state_len=state_len,
        block_m=block_m,
        channels=3,
        arrays=slots,
    )
    check_gradients(case, implementation)


def test_packed_with_any_integers(implementation):
    for seed in range(16 if implementation != "interpret" else 4):
        # One shape, thus one compilation; indices of every kind.
        shape = dataclasses.replace(SMALL_PACKED, num_seqs=5)
        rng = np.random.default_rng([11, seed])
        case = cases.packed_case(shape, rng, malformed=seed % 2 == 1)
        check_gradients(case, implementation, seed=seed)


@pytest.mark.parametrize("queries", [None, 1, 2, 7])
@pytest.mark.parametrize("kind", ["linear", "rejected", "circular"])
def test_update(implementation, kind, queries):
    if kind == "linear":
        case = small_update(12, num_queries=queries)
    elif kind == "rejected":
        rejected = {"num_rejected_tokens": ints(1, 0, 2, 4)}
        case = small_update(
            12, num_queries=queries, num_rejected_tokens=True, arrays=rejected
        )
    else:
        case = small_ring(12, num_queries=queries)
    check_gradients(case, implementation)


@pytest.mark.parametrize("width, state_len", [(1, 0), (1, 3), (2, 1), (4, 3), (6, 11)])
@pytest.mark.parametrize("kind", ["linear", "circular"])
def test_update_of_other_widths_and_state_lengths(
    implementation, kind, width, state_len
):
    draw = small_ring if kind == "circular" else small_update
    check_gradients(draw(13, width=width, state_len=state_len), implementation)


def test_packed_width_1_without_a_state(implementation):
    check_gradients(small_packed(14, width=1, state_len=0), implementation)


def test_circular_buffer_at_every_position(implementation):
    for first in range(0, 8, 4 if implementation == "interpret" else 1):
        case = small_ring(15, positions=range(first, first + 4), num_queries=3)
        check_gradients(case, implementation)


@EACH_OP
@pytest.mark.parametrize(
    "x_dtype, state_dtype, other",
    [  # of x, of the states, and of the parameters
        (FLOATS[0], FLOATS[2], FLOATS[2]),
        (FLOATS[1], FLOATS[1], FLOATS[0]),
        (FLOATS[2], FLOATS[2], FLOATS[0]),
        (FLOATS[2], FLOATS[0], FLOATS[0]),
    ],
    ids=str,
)
def test_mixed_precision(implementation, number, x_dtype, state_dtype, other):
    kinds = {"x_dtype": x_dtype, "state_dtype": state_dtype}
    kinds |= {"weight_dtype": other, "bias_dtype": other}
    case = one_of_each_op(16, **kinds)[number]
    got, _ = check_gradients(case, implementation)
    assert got["weight"].dtype == other and got["x"].dtype == x_dtype


def test_weight_gradients_of_many_bf16_tokens_are_summed_in_float32(implementation):
    # 600 terms of one sign: a sum in bf16 would stop growing at 256.
    bf16 = FLOATS[2]
    changes = {"num_rows": 2, "num_tokens": 300, "channels": 2, "activation": None}
    case = small_dense(18, **changes, x_dtype=bf16, segment_ids=False, state_dtype=bf16)
    case = case.replace(x=np.ones_like(case.arrays["x"]))
    cotangents = np.ones_like(case.arrays["x"])
    got = pull(case, cotangents, implementation)
    assert_gradients(got, case, cotangents)
    np.testing.assert_array_equal(got["bias"], 600)
    np.testing.assert_array_equal(got["weight"][:, -1], 600)


def test_bf16_state_gradients_are_summed_in_float32(implementation):
    # Nine terms, the largest in the middle: a sum in bf16, whose steps are 4 there,
    # would lose all small ones behind it, from whichever side it comes.
    bf16 = FLOATS[2]
    changes = {"num_rows": 1, "num_tokens": 20, "channels": 2, "activation": None}
    changes |= {"width": 10, "state_len": 9, "segment_ids": False}
    case = small_dense(18, **changes, x_dtype=bf16, state_dtype=bf16)
    weight = np.full_like(case.arrays["weight"], 1.9)
    weight[:, 4] = 512
    case = case.replace(weight=weight)
    cotangents = np.ones_like(case.arrays["x"])
    got = pull(case, cotangents, implementation)
    assert_gradients(got, case, cotangents)
    np.testing.assert_array_equal(got["initial_state"][:, -1], 528)  # of 527.2


@EACH_OP
def test_cotangent_of_an_unused_slot_passes_bit_for_bit(implementation, number):
    if number == 0:
        ids = np.array([[-1] * 13, [0] * 13], i32)
        case, untouched = small_dense(19, arrays={"segment_ids": ids}), [0]
    else:
        case, untouched = one_of_each_op(19)[number], [1, 3, 5]
    state = names(case)[1]
    got, (_, dstate) = check_gradients(case, implementation)
    checks.assert_same_bits(got[state][untouched], dstate[untouched], case)


def test_overwritten_rejected_and_unused_rows_get_zero(implementation):
    # Sequences of 6, 1 and 9 tokens in slots of 5 rows; the last is without history,
    # slot 0 has two rejected rows and keeps rows 1 and 2.
    got, _ = check_gradients(small_packed(20), implementation)
    dead = np.zeros((7, 5), bool)
    dead[2] = True
    dead[0, 3:] = True  # rejected
    dead[4, :2] = True  # behind the filter, and shifted out
    zero = (got["conv_states"] == 0).all(axis=-1)
    np.testing.assert_array_equal(zero, dead)
    got, _ = check_gradients(small_ring(20), implementation)
    # Slot 4: position 0, Q = 2; the filter reads rows 2, 3, 4, so rows 0 and 1 die.
    # Slot 0: position 3 reads 0, 1, 2 and writes 3, 4. Slot 2: 1001 mod 5 = 1 reads
    # 3, 4, 0 and writes 1, 2.
    dead = np.zeros((6, 5), bool)
    dead[4, :2] = dead[0, 3:] = dead[2, 1:3] = True
    zero = (got["conv_state"] == 0).all(axis=-1)
    np.testing.assert_array_equal(zero, dead)


def test_skipped_and_padded_rows_of_x_get_zero(implementation):
    got, _ = check_gradients(small_packed(21), implementation)
    zero = (got["x"] == 0).all(axis=-1)
    np.testing.assert_array_equal(np.flatnonzero(zero), [0, 1, 9, 10, 11, 21, 22, 23])
    for case in (small_update(21), small_ring(21)):
        got, _ = check_gradients(case, implementation)
        zero = (got["x"] == 0).all(axis=(-1, -2))
        np.testing.assert_array_equal(np.flatnonzero(zero), [2])
    case = named_segments(21)
    got, _ = check_gradients(case, implementation)
    zero = (got["x"] == 0).all(axis=-1)
    np.testing.assert_array_equal(zero, case.arrays["segment_ids"] < 0)


def assert_same_gradients(got, want, what):
    for name, gradient in want.items():
        checks.assert_same_bits(got[name], gradient, f"{name}: {what}")


def test_poison_in_what_a_packed_batch_does_not_see(implementation):
    case = small_packed(22)
    dout, dstates = draw_cotangents(case)
    want = pull(case, (dout, dstates), implementation)
    unseen = [0, 1, 9, 10, 11, 21, 22, 23]  # skipped or not covered
    states = case.arrays["conv_states"]
    for what, change in {
        "x": {"x": poisoned(case.arrays["x"], unseen)},
        "unused slots": {"conv_states": poisoned(states, [1, 3, 5, 6])},
        "a slot without initial state": {"conv_states": poisoned(states, 2)},
        "rejected rows": {"conv_states": poisoned(states, np.s_[0, 3:])},
    }.items():
        got = pull(case.replace(**change), (dout, dstates), implementation)
        assert_same_gradients(got, want, what)
    got = pull(case, (poisoned(dout, unseen), dstates), implementation)
    assert_same_gradients(got, want, "cotangent of rows that are zero")


@pytest.mark.parametrize("draw", [small_update, small_ring])
def test_poison_in_what_an_update_does_not_see(implementation, draw):
    case = draw(23)
    dout, dstate = draw_cotangents(case)
    want = pull(case, (dout, dstate), implementation)
    for what, change in {
        "skipped row": {"x": poisoned(case.arrays["x"], 2)},
        "unused slots": {"conv_state": poisoned(case.arrays["conv_state"], [1, 3, 5])},
    }.items():
        got = pull(case.replace(**change), (dout, dstate), implementation)
        assert_same_gradients(got, want, what)
    got = pull(case, (poisoned(dout, 2), dstate), implementation)
    assert_same_gradients(got, want, "cotangent of a skipped row")


def test_poison_in_padding_and_unseen_initial_states(implementation):
    case = named_segments(24)
    dout, dstate = draw_cotangents(case)
    want = pull(case, (dout, dstate), implementation)
    ids = case.arrays["segment_ids"]
    padding = ids < 0
    got = pull(
        case.replace(x=poisoned(case.arrays["x"], padding)),
        (dout, dstate),
        implementation,
    )
    assert_same_gradients(got, want, "padding")
    got = pull(case, (poisoned(dout, padding), dstate), implementation)
    assert_same_gradients(got, want, "cotangent of padding")
    unseen = padding[:, 0]
    state = poisoned(case.arrays["initial_state"], unseen)
    got = pull(case.replace(initial_state=state), (dout, dstate), implementation)
    assert_same_gradients(got, want, "initial state before padding")


def test_poison_in_one_run_stays_in_that_run(implementation):
    # The middle run of row 0, and its cotangent; dweight and dbias see every run.
    ids = np.array([[0] * 4 + [1] * 4 + [2] * 5, [3] * 13], i32)
    case = small_dense(25, arrays={"segment_ids": ids})
    dout, dstate = draw_cotangents(case)
    want = pull(case, (dout, dstate), implementation)
    dirty = case.replace(x=poisoned(case.arrays["x"], np.s_[0, 4:8]))
    dout = poisoned(dout, np.s_[0, 4:8])
    got = pull(dirty, (dout, dstate), implementation)
    clean = np.ones((2, 13), bool)
    clean[0, 4:8] = False
    checks.assert_same_bits(got["x"][clean], want["x"][clean], "dx of other runs")
    checks.assert_same_bits(got["initial_state"], want["initial_state"])


@EACH_OP
def test_gradients_are_bit_identical_from_run_to_run(implementation, number):
    case = one_of_each_op(26, channels=6)[number]
    cotangents = draw_cotangents(case)
    first = pull(case, cotangents, implementation)
    for repeat in range(3):
        again = pull(case, cotangents, implementation)
        assert_same_gradients(again, first, f"run {repeat}")


@EACH_OP
def test_gradient_of_any_subset_of_arguments(implementation, number):
    case = one_of_each_op(27)[number]
    op, _, order = names(case)
    cotangents = draw_cotangents(case)
    floats, rest = split(case)
    static = options(case, implementation)
    want = expected_gradients(case, cotangents)
    for wanted in (order[:1], order[1:2] + order[3:]):

        def loss(subset, rest=rest, static=static):
            results = getattr(jax_causal_conv, op)(
                **(floats | subset), **rest, **static
            )
            return sum((r * c).sum() for r, c in zip(results, cotangents, strict=True))

        subset = {name: floats[name] for name in wanted}
        for name, got in checks.to_host(quick.jit(jax.grad(loss))(subset)).items():
            assert_gradient(got, *want[name], name, case)


def test_integers_and_bools_have_no_cotangent(implementation):
    case = small_packed(28)
    floats, rest = split(case)
    static = options(case, implementation)

    def run(rest):
        return jax_causal_conv.causal_conv1d_fn(**floats, **rest, **static)

    results, pullback = jax.vjp(run, jax.tree.map(jnp.asarray, rest))
    (gradients,) = pullback(jax.tree.map(jnp.ones_like, results))
    for name, gradient in gradients.items():
        assert gradient.dtype == jax.dtypes.float0, (name, gradient.dtype)


@pytest.mark.parametrize("sizes", [{"num_rows": 0}, {"num_tokens": 0}, {"channels": 0}])
def test_sizes_of_zero(implementation, sizes):
    case = small_dense(29, **sizes)
    got, (_, dstate) = check_gradients(case, implementation)
    if "num_tokens" in sizes:  # the final state is the initial one
        checks.assert_same_bits(got["initial_state"], dstate)


@EACH_OP
def test_finite_differences_in_float64_on_xla(number):
    kinds = ("x_dtype", "weight_dtype", "bias_dtype", "state_dtype")
    double = dict.fromkeys(kinds, np.dtype("float64"))
    with jax.enable_x64(True):
        case = one_of_each_op(30, **double, channels=2, activation="silu")[number]
        floats, rest = split(case)
        static = options(case, "xla")
        op = getattr(jax_causal_conv, names(case)[0])

        check_derivatives(lambda floats: op(**floats, **rest, **static), floats)


@EACH_OP
@pytest.mark.parametrize("chosen", ["xla", None], ids=str)
def test_float64_gradients(number, chosen):
    kinds = ("x_dtype", "weight_dtype", "bias_dtype", "state_dtype")
    with jax.enable_x64(True):
        double = dict.fromkeys(kinds, np.dtype("float64"))
        check_gradients(one_of_each_op(31, **double)[number], chosen)


def test_named_segments_hold_what_the_zero_tests_need():
    ids = np.array(list(SEGMENTS.values()))
    assert (ids[:, 0] < 0).any() and (ids[:, 0] >= 0).any()


MOVED = {  # a fork of slot 4, a snapshot of what is overwritten, and one in between
    "query_start_loc": offsets_of([6, 1, 3, 9], head=2),
    "cache_indices": ints(4, 4, -1, 2),
    "num_rejected_tokens": ints(0, 2, 1, 1),
    "has_initial_state": np.array([True, True, True, True]),
    "write_indices": ints(0, 1, 3, -1),
    "snapshot_indices": ints(5, 6, 3, 2),
    "snapshot_ends": ints(2, 0, 1, 20),
}


@pytest.mark.parametrize("writes, snapshots", [(True, False), (False, True), (True, 1)])
def test_states_that_move(implementation, writes, snapshots):
    arrays = dict(MOVED)
    if not writes:
        arrays |= {"cache_indices": ints(4, 0, -1, 2), "write_indices": None}
        arrays["snapshot_indices"] = ints(5, 6, 3, 1)
    if not snapshots:
        arrays |= {"snapshot_indices": None, "snapshot_ends": None}
    for dtype in (FLOATS[0], FLOATS[2]):
        case = small_packed(7, arrays=arrays, x_dtype=dtype)
        check_gradients(case, implementation)


@pytest.mark.parametrize("small", [small_update, small_ring])
def test_update_of_states_that_move(implementation, small):
    case = small(8).replace(
        conv_state_indices=ints(4, 4, 1, 2),
        conv_state_write_indices=ints(0, 3, 1, 9),
    )
    check_gradients(case, implementation)
