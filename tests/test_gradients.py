"""Gradients of all ops against the per-request float64 chain rule in reference.py.

A gradient is a sum of products, accumulated in float32 and rounded once to the dtype
of its primal. So it must lie within one unit in the last place of the float64 result,
plus the error of a float32 sum of that many terms, plus what the float32 error of
`silu'(z)` contributes to each term.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jax_causal_conv
from tests import cases, checks, reference
from tests.cases import FLOATS, DenseShape, PackedShape, UpdateShape
from tests.test_dense import SEGMENTS, named_segments
from tests.test_dense import draw as draw_dense
from tests.test_packed import draw as draw_packed
from tests.test_packed import ints, offsets_of
from tests.test_update import draw as draw_update

f32, i32 = np.float32, np.int32
OPS = {
    PackedShape: ("causal_conv1d_fn", "conv_states"),
    UpdateShape: ("causal_conv1d_update", "conv_state"),
    DenseShape: ("causal_conv1d", "initial_state"),
}
POISON = [np.nan, np.inf]


def names(case):
    """Names of the op, of its state, and of its float arguments."""
    op, state = OPS[type(case.shape)]
    return op, state, ("x", "weight", "bias", state)


def split(case):
    """Float arguments, to be differentiated, and the others."""
    floats = {name: case.arrays[name] for name in names(case)[2]}
    rest = {k: v for k, v in case.arrays.items() if k not in floats and v is not None}
    return floats, rest


def options(case, implementation, final=True):
    static = case.options | {"implementation": implementation}
    if isinstance(case.shape, DenseShape):
        static["return_final_state"] = final
    return static


@functools.cache
def jitted(op, static):
    """(floats, rest, cotangents) -> (results, gradients), compiled."""

    def pull(floats, rest, cotangents):
        def run(floats):
            return getattr(jax_causal_conv, op)(**floats, **rest, **dict(static))

        results, pullback = jax.vjp(run, floats)
        return results, pullback(cotangents)[0]

    return jax.jit(pull)


def pull(case, cotangents, implementation, *, metadata=None):
    """Gradients by name; `cotangents` a pair, or an array without a final state."""
    floats, rest = split(case)
    if isinstance(case.shape, PackedShape):
        if metadata is None and case.shape.block_m is not None:
            metadata = jax_causal_conv.build_metadata(
                rest["query_start_loc"], len(floats["x"]), block_m=case.shape.block_m
            )
        rest["metadata"] = metadata
    static = options(case, implementation, isinstance(cotangents, tuple))
    function = jitted(names(case)[0], tuple(sorted(static.items())))
    return checks.to_host(function(floats, rest, cotangents)[1])


def state_shape(case):
    """Shape and dtype of the returned state."""
    shape, state = case.shape, case.arrays[names(case)[1]]
    if state is not None:
        return state.shape, state.dtype
    x = case.arrays["x"]
    return (len(x), shape.width - 1, shape.channels), x.dtype


def draw_cotangents(case, seed=0):
    rng = np.random.default_rng([seed, 99])
    x, (shape, dtype) = case.arrays["x"], state_shape(case)
    return cases.floats(rng, x.shape, x.dtype), cases.floats(rng, shape, dtype)


def requests_of(case):
    shape, (_, rest) = case.shape, split(case)
    num_slots, state_len = state_shape(case)[0][:2]
    if isinstance(shape, DenseShape):
        return reference.dense_requests(
            shape.num_rows, shape.num_tokens, state_len, **rest
        )
    pad = {"pad_slot_id": case.options.get("pad_slot_id", reference.PAD_SLOT_ID)}
    if isinstance(shape, PackedShape):
        offsets = rest.pop("query_start_loc")
        return reference.packed_requests(
            shape.num_tokens, num_slots, state_len, offsets, **rest, **pad
        )
    return reference.update_requests(
        shape.num_rows,
        shape.num_queries or 1,
        num_slots,
        state_len,
        shape.width,
        **rest,
        **pad,
    )


def expected(case, cotangents):
    """name -> (float64 gradient, allowed float32 error before the last rounding)."""
    if not isinstance(cotangents, tuple):
        size, dtype = state_shape(case)
        cotangents = cotangents, np.zeros(size, dtype)
    floats, _ = split(case)
    _, state_name, order = names(case)
    channels, width = case.shape.channels, case.shape.width
    states = floats[state_name]
    if states is None:
        states = np.zeros(*state_shape(case))
    double = floats["x"].dtype == np.float64
    eps = np.finfo(np.float64 if double else f32).eps
    silu = case.options["activation"] in ("silu", "swish", True)
    tokens = int(np.prod(floats["x"].shape[:-1]))

    def run(measure=None, dstates=cotangents[1]):
        return reference.gradients(
            floats["x"].reshape(tokens, channels),
            floats["weight"],
            floats["bias"],
            states,
            requests_of(case),
            case.options["activation"],
            cotangents[0].reshape(tokens, channels),
            dstates,
            measure=measure,
        )

    def size_of_dz(dy, z, terms):
        return abs(dy * reference.silu_slope(z)) if silu else abs(dy)

    def error_of_dz(dy, z, terms):
        if not silu:
            return np.zeros_like(dy)
        # |silu''| <= 1/2; silu' = s (1 + z (1 - s)) with a relative error of s.
        sigmoid, relative = 1 / (1 + np.exp(-z)), 1e-15 if double else checks.FAST_SILU
        slope_error = (width + 2) * eps * terms / 2
        return abs(dy) * (slope_error + 2 * relative * sigmoid * (1 + abs(z)))

    with np.errstate(all="ignore"):
        exact, sizes = run(), run(size_of_dz)
        errors = run(error_of_dz, np.zeros_like(cotangents[1]))
    terms = (width + 4, tokens + 4, tokens + 4, width + 4)
    result = {}
    for name, value, size, error, count in zip(
        order, exact, sizes, errors, terms, strict=True
    ):
        if floats[name] is not None:
            allowed = count * eps * size + error
            shape = floats[name].shape
            result[name] = value.reshape(shape), allowed.reshape(shape)
    return result


def assert_gradient(got, exact, allowed, name, what):
    rounded = exact.astype(got.dtype).astype(np.float64)
    ulp = checks.unit_in_last_place(rounded, got.dtype)
    limit = np.where(allowed == 0, 0, allowed + ulp + checks.UNDERFLOW)
    error = abs(got.astype(np.float64) - rounded)
    bad = ~(error <= limit)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise AssertionError(
            f"{bad.sum()} of {bad.size} elements of the gradient of {name} are wrong; "
            f"first at {where}: got {got[where]!r}, float64 {exact[where]!r}, allowed "
            f"error {limit[where]!r}; largest error {error[bad].max()!r}\n{what}"
        )


def assert_gradients(got, case, cotangents):
    """Dtypes, shapes and values, and no gradient for what is absent."""
    floats, _ = split(case)
    want = expected(case, cotangents)
    for name, primal in floats.items():
        if primal is None:
            assert got[name] is None, f"gradient of an absent {name}"
            continue
        kind = (got[name].shape, got[name].dtype)
        wanted = (primal.shape, primal.dtype)
        assert kind == wanted, f"gradient of {name}: {kind}, expected {wanted}\n{case}"
        assert_gradient(got[name], *want[name], name, case)


def check(case, implementation, *, final=True, metadata=None, seed=0):
    cotangents = draw_cotangents(case, seed)
    if not final:
        cotangents = cotangents[0]
    got = pull(case, cotangents, implementation, metadata=metadata)
    assert_gradients(got, case, cotangents)
    return got, cotangents


# Few tokens and one block of 16 channels: the interpreter takes its time.
DENSE = DenseShape(num_rows=2, num_tokens=13, channels=6, width=4, state_len=5)
PACKED = PackedShape(
    num_tokens=24, num_seqs=4, num_slots=7, channels=6, width=4, state_len=5
)
MIXED = {  # prefills, a decode, a skipped one, uncovered tokens at head and tail
    "query_start_loc": offsets_of([6, 1, 3, 9], head=2),
    "cache_indices": ints(4, 0, -1, 2),
    "has_initial_state": np.array([True, True, True, False]),
    "num_rejected_tokens": ints(0, 2, 1, 3),
}
ROWS = {"conv_state_indices": ints(4, 0, -1, 2)}


def dense(seed=0, **changes):
    return draw_dense(seed, DENSE, **changes)


def packed(seed=0, *, arrays=None, **changes):
    return draw_packed(seed, PACKED, arrays=MIXED | (arrays or {}), **changes)


def update(seed=0, *, arrays=None, **changes):
    """Four rows, one of them skipped."""
    sizes = {"num_rows": 4, "num_slots": 6, "channels": 6, "num_queries": 2}
    sizes |= {"width": 4, "state_len": 5, "num_rejected_tokens": False}
    case = draw_update(seed, **(sizes | changes))
    return case.replace(**ROWS | (arrays or {}))


def ring(seed=0, positions=(0, 3, -7, 1001), **changes):
    arrays = {"cache_seqlens": ints(*positions)}
    changes = changes | {"cache_seqlens": True, "num_rejected_tokens": False}
    return update(seed, arrays=arrays, **changes)


def one_of_each_op(seed=0, **changes):
    rejected = {"num_rejected_tokens": ints(1, 0, 2, 5)}
    return [
        dense(seed, **changes),
        packed(seed, **changes),
        update(seed, arrays=rejected, **(changes | {"num_rejected_tokens": True})),
        ring(seed, **changes),
    ]


EACH_OP = pytest.mark.parametrize(
    "number", range(4), ids=["dense", "packed", "update", "ring"]
)


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
            array, want = case.arrays[name], expected(case, cotangents)[name][0]
            direction = np.random.default_rng(2).standard_normal(array.shape)
            ends = [
                loss(case.replace(**{name: array + step * direction}))
                for step in (1e-5, -1e-5)
            ]
            slope, product = (ends[0] - ends[1]) / 2e-5, (want * direction).sum()
            error = abs(slope - product)
            assert error < 1e-7 * (1 + abs(product)), (op, name, slope, product)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [None, FLOATS[0]])
@pytest.mark.parametrize("state_len", [None, 3])
@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("segments", [True, False])
def test_every_combination_of_the_dense_op(
    implementation, activation, bias, state_len, final, segments
):
    case = dense(
        3,
        width=2,
        activation=activation,
        bias_dtype=bias,
        state_len=state_len,
        segment_ids=segments,
    )
    check(case, implementation, final=final)


@pytest.mark.parametrize("state_len", [None, 3, 14])
def test_dense_with_runs_and_padding_in_every_place(implementation, state_len):
    check(named_segments(4, state_len=state_len), implementation)


def test_dense_with_random_runs(implementation):
    for seed in range(20 if implementation != "interpret" else 4):
        check(dense(seed, num_tokens=20), implementation, seed=seed)


@pytest.mark.parametrize(
    "width, state_len", [(1, 0), (1, 3), (1, None), (2, 1), (3, 5), (5, 4), (8, 10)]
)
def test_dense_with_other_widths(implementation, width, state_len):
    case = dense(5, width=width, state_len=state_len, num_tokens=9)
    check(case, implementation)


def test_dense_rows_around_the_width_and_the_block(implementation):
    lengths = [1, 3]
    if implementation in ("interpret", "triton"):  # blocks are of 16 or 32 tokens
        lengths += [15, 16, 17, 31, 33, 67]
    for num_tokens in lengths:
        check(dense(6, num_tokens=num_tokens), implementation)


@pytest.mark.parametrize("num_tokens", [128, 301])
def test_long_rows_of_bfloat16(implementation, num_tokens):
    """By larger groups of rows than others."""
    kinds = {"x_dtype": FLOATS[2], "state_dtype": FLOATS[2]}
    sizes = {"num_tokens": num_tokens, "channels": 34, "width": 4, "state_len": 3}
    check(dense(8, **sizes, **kinds, segment_ids=False), implementation)


@pytest.mark.parametrize("channels", [1, 3, 100, 257])
def test_any_number_of_channels(implementation, channels):
    check(dense(7, num_tokens=6, channels=channels), implementation)
    arrays = {"query_start_loc": offsets_of([2, 1, 1, 4])}
    case = packed(7, num_tokens=9, channels=channels, arrays=arrays)
    check(case, implementation)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [None, FLOATS[0]])
def test_packed(implementation, activation, bias):
    check(packed(8, activation=activation, bias_dtype=bias), implementation)


def test_packed_without_optional_indices(implementation):
    absent = dict.fromkeys(
        ("cache_indices", "has_initial_state", "num_rejected_tokens")
    )
    check(packed(9, arrays=absent), implementation)
    partly = {"cache_indices": None, "num_rejected_tokens": None}
    check(packed(9, arrays=partly), implementation)


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
    case = packed(
        10,
        num_tokens=sum(lengths) + 3,
        num_seqs=6,
        width=width,
        state_len=state_len,
        block_m=block_m,
        channels=3,
        arrays=slots,
    )
    check(case, implementation)


def test_packed_with_any_integers(implementation):
    for seed in range(16 if implementation != "interpret" else 4):
        # One shape, thus one compilation; indices of every kind.
        shape = dataclasses.replace(PACKED, num_seqs=5)
        rng = np.random.default_rng([11, seed])
        case = cases.packed_case(shape, rng, malformed=seed % 2 == 1)
        check(case, implementation, seed=seed)


@pytest.mark.parametrize("queries", [None, 1, 2, 7])
@pytest.mark.parametrize("kind", ["linear", "rejected", "circular"])
def test_update(implementation, kind, queries):
    if kind == "linear":
        case = update(12, num_queries=queries)
    elif kind == "rejected":
        rejected = {"num_rejected_tokens": ints(1, 0, 2, 4)}
        case = update(
            12, num_queries=queries, num_rejected_tokens=True, arrays=rejected
        )
    else:
        case = ring(12, num_queries=queries)
    check(case, implementation)


@pytest.mark.parametrize("width, state_len", [(1, 0), (1, 3), (2, 1), (4, 3), (6, 11)])
@pytest.mark.parametrize("kind", ["linear", "circular"])
def test_update_of_other_widths_and_state_lengths(
    implementation, kind, width, state_len
):
    draw = ring if kind == "circular" else update
    check(draw(13, width=width, state_len=state_len), implementation)


def test_packed_width_1_without_a_state(implementation):
    check(packed(14, width=1, state_len=0), implementation)


def test_circular_buffer_at_every_position(implementation):
    for first in range(0, 8, 4 if implementation == "interpret" else 1):
        case = ring(15, positions=range(first, first + 4), num_queries=3)
        check(case, implementation)


@EACH_OP
@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
def test_mixed_precision(implementation, number, x_dtype):
    # bf16 or f16 activations and states with f32 parameters, and the other way round.
    other = FLOATS[0] if x_dtype != FLOATS[0] else FLOATS[2]
    kinds = {"x_dtype": x_dtype, "state_dtype": x_dtype}
    kinds |= {"weight_dtype": other, "bias_dtype": other}
    case = one_of_each_op(16, **kinds)[number]
    got, _ = check(case, implementation)
    assert got["weight"].dtype == other and got["x"].dtype == x_dtype


@EACH_OP
def test_state_of_another_dtype_than_x(implementation, number):
    for x_dtype, state_dtype in (FLOATS[::2], FLOATS[::-2]):
        kinds = {"x_dtype": x_dtype, "state_dtype": state_dtype}
        check(one_of_each_op(17, **kinds)[number], implementation)


def test_weight_gradients_of_many_bf16_tokens_are_summed_in_float32(implementation):
    # 600 terms of one sign: a sum in bf16 would stop growing at 256.
    bf16 = FLOATS[2]
    changes = {"num_rows": 2, "num_tokens": 300, "channels": 2, "activation": None}
    case = dense(18, **changes, x_dtype=bf16, segment_ids=False, state_dtype=bf16)
    case = case.replace(x=np.ones_like(case.arrays["x"]))
    cotangents = np.ones_like(case.arrays["x"])
    got = pull(case, cotangents, implementation)
    assert_gradients(got, case, cotangents)
    np.testing.assert_array_equal(got["bias"], 600)
    np.testing.assert_array_equal(got["weight"][:, -1], 600)


@EACH_OP
def test_cotangent_of_an_unused_slot_passes_bit_for_bit(implementation, number):
    if number == 0:
        ids = np.array([[-1] * 13, [0] * 13], i32)
        case, untouched = dense(19, arrays={"segment_ids": ids}), [0]
    else:
        case, untouched = one_of_each_op(19)[number], [1, 3, 5]
    state = names(case)[1]
    got, (_, dstate) = check(case, implementation)
    checks.assert_same_bits(got[state][untouched], dstate[untouched], case)


def test_overwritten_rejected_and_unused_rows_get_zero(implementation):
    # Sequences of 6, 1 and 9 tokens in slots of 5 rows; the last is without history,
    # slot 0 has two rejected rows and keeps rows 1 and 2.
    got, _ = check(packed(20), implementation)
    dead = np.zeros((7, 5), bool)
    dead[2] = True
    dead[0, 3:] = True  # rejected
    dead[4, :2] = True  # behind the filter, and shifted out
    zero = (got["conv_states"] == 0).all(axis=-1)
    np.testing.assert_array_equal(zero, dead)
    got, _ = check(ring(20), implementation)
    # Slot 4: position 0, Q = 2; the filter reads rows 2, 3, 4, so rows 0 and 1 die.
    # Slot 0: position 3 reads 0, 1, 2 and writes 3, 4. Slot 2: 1001 mod 5 = 1 reads
    # 3, 4, 0 and writes 1, 2.
    dead = np.zeros((6, 5), bool)
    dead[4, :2] = dead[0, 3:] = dead[2, 1:3] = True
    zero = (got["conv_state"] == 0).all(axis=-1)
    np.testing.assert_array_equal(zero, dead)


def test_skipped_and_padded_rows_of_x_get_zero(implementation):
    got, _ = check(packed(21), implementation)
    zero = (got["x"] == 0).all(axis=-1)
    np.testing.assert_array_equal(np.flatnonzero(zero), [0, 1, 9, 10, 11, 21, 22, 23])
    for case in (update(21), ring(21)):
        got, _ = check(case, implementation)
        zero = (got["x"] == 0).all(axis=(-1, -2))
        np.testing.assert_array_equal(np.flatnonzero(zero), [2])
    case = named_segments(21)
    got, _ = check(case, implementation)
    zero = (got["x"] == 0).all(axis=-1)
    np.testing.assert_array_equal(zero, case.arrays["segment_ids"] < 0)


def poisoned(array, where, poison):
    array = array.copy()
    array[where] = poison
    return array


def assert_same_gradients(got, want, what):
    for name, gradient in want.items():
        checks.assert_same_bits(got[name], gradient, f"{name}: {what}")


@pytest.mark.parametrize("poison", POISON)
def test_poison_in_what_a_packed_batch_does_not_see(implementation, poison):
    case = packed(22)
    dout, dstates = draw_cotangents(case)
    want = pull(case, (dout, dstates), implementation)
    unseen = [0, 1, 9, 10, 11, 21, 22, 23]  # skipped or not covered
    states = case.arrays["conv_states"]
    for what, change in {
        "x": {"x": poisoned(case.arrays["x"], unseen, poison)},
        "unused slots": {"conv_states": poisoned(states, [1, 3, 5, 6], poison)},
        "a slot without initial state": {"conv_states": poisoned(states, 2, poison)},
        "rejected rows": {"conv_states": poisoned(states, np.s_[0, 3:], poison)},
    }.items():
        got = pull(case.replace(**change), (dout, dstates), implementation)
        assert_same_gradients(got, want, what)
    got = pull(case, (poisoned(dout, unseen, poison), dstates), implementation)
    assert_same_gradients(got, want, "cotangent of rows that are zero")


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("draw", [update, ring])
def test_poison_in_what_an_update_does_not_see(implementation, draw, poison):
    case = draw(23)
    dout, dstate = draw_cotangents(case)
    want = pull(case, (dout, dstate), implementation)
    for what, change in {
        "skipped row": {"x": poisoned(case.arrays["x"], 2, poison)},
        "unused slots": {
            "conv_state": poisoned(case.arrays["conv_state"], [1, 3, 5], poison)
        },
    }.items():
        got = pull(case.replace(**change), (dout, dstate), implementation)
        assert_same_gradients(got, want, what)
    got = pull(case, (poisoned(dout, 2, poison), dstate), implementation)
    assert_same_gradients(got, want, "cotangent of a skipped row")


@pytest.mark.parametrize("poison", POISON)
def test_poison_in_padding_and_unseen_initial_states(implementation, poison):
    case = named_segments(24)
    dout, dstate = draw_cotangents(case)
    want = pull(case, (dout, dstate), implementation)
    ids = case.arrays["segment_ids"]
    padding = ids < 0
    got = pull(
        case.replace(x=poisoned(case.arrays["x"], padding, poison)),
        (dout, dstate),
        implementation,
    )
    assert_same_gradients(got, want, "padding")
    got = pull(case, (poisoned(dout, padding, poison), dstate), implementation)
    assert_same_gradients(got, want, "cotangent of padding")
    unseen = padding[:, 0]
    state = poisoned(case.arrays["initial_state"], unseen, poison)
    got = pull(case.replace(initial_state=state), (dout, dstate), implementation)
    assert_same_gradients(got, want, "initial state before padding")


@pytest.mark.parametrize("poison", POISON)
def test_poison_in_one_run_stays_in_that_run(implementation, poison):
    # The middle run of row 0, and its cotangent; dweight and dbias see every run.
    ids = np.array([[0] * 4 + [1] * 4 + [2] * 5, [3] * 13], i32)
    case = dense(25, arrays={"segment_ids": ids})
    dout, dstate = draw_cotangents(case)
    want = pull(case, (dout, dstate), implementation)
    dirty = case.replace(x=poisoned(case.arrays["x"], np.s_[0, 4:8], poison))
    dout = poisoned(dout, np.s_[0, 4:8], poison)
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
    want = expected(case, cotangents)
    for wanted in (order[:1], order[1:2] + order[3:]):

        def loss(subset, rest=rest, static=static):
            results = getattr(jax_causal_conv, op)(
                **(floats | subset), **rest, **static
            )
            return sum((r * c).sum() for r, c in zip(results, cotangents, strict=True))

        subset = {name: floats[name] for name in wanted}
        for name, got in checks.to_host(jax.jit(jax.grad(loss))(subset)).items():
            assert_gradient(got, *want[name], name, case)


def test_integers_and_bools_have_no_cotangent(implementation):
    case = packed(28)
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
    case = dense(29, **sizes)
    got, (_, dstate) = check(case, implementation)
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

        @jax.jit
        def run(floats):
            return op(**floats, **rest, **static)

        check_grads(run, (floats,), order=2, modes=["fwd", "rev"], rtol=1e-6, atol=1e-6)


@EACH_OP
@pytest.mark.parametrize("chosen", ["xla", None], ids=str)
def test_float64_gradients(number, chosen):
    kinds = ("x_dtype", "weight_dtype", "bias_dtype", "state_dtype")
    with jax.enable_x64(True):
        double = dict.fromkeys(kinds, np.dtype("float64"))
        check(one_of_each_op(31, **double)[number], chosen)


def test_named_segments_hold_what_the_zero_tests_need():
    ids = np.array(list(SEGMENTS.values()))
    assert (ids[:, 0] < 0).any() and (ids[:, 0] >= 0).any()
