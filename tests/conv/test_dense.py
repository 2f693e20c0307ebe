"""`causal_conv1d` against the per-run reference, on every implementation."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_causal_conv import causal_conv1d, causal_conv1d_fn
from tests.support import cases, checks, reference
from tests.support.cases import FLOATS
from tests.support.draws import (
    SEGMENTS,
    draw_dense,
    half,
    named_segments,
    poisoned,
)
from tests.support.errors import FLOAT8, NO_FLOATS, NO_INTEGERS, array, raises, shape_id

pytestmark = pytest.mark.forward_only

f32, i32 = np.float32, np.int32


@pytest.mark.parametrize("width", range(1, cases.MAX_WIDTH + 1))
def test_every_width_and_state_length(implementation, width):
    extras = {0, 1 + width, cases.MAX_EXTRA}
    if implementation == "triton":
        extras = range(cases.MAX_EXTRA + 1)
    for extra in sorted(extras):
        sizes = {"width": width, "state_len": width - 1 + extra}
        case = draw_dense([width, extra], num_rows=2, channels=5, **sizes)
        checks.check(case, implementation)


@pytest.mark.parametrize("width", [1, 2, 4, 7, 40])
def test_rows_around_the_width_and_the_block(implementation, width):
    lengths = {1, width - 1, width, 15, 16, 17, 31, 32, 33, 65, 79, 80, 81}
    if implementation != "triton":  # blocks are of 16 or 32, or of W-1 tokens
        few = {1: {33}, 2: {15, 16, 17, 65}, 4: {3, 31, 32, 33}, 7: {6, 33}}
        lengths = few.get(width, {39, 41})
    for length in sorted(lengths - {0}):
        changes = {"num_tokens": length, "width": width, "state_len": width + 1}
        checks.check(
            draw_dense([1, width, length], num_rows=2, **changes), implementation
        )


@pytest.mark.parametrize("channels", [1, 3, 100, 257])
def test_any_number_of_channels(implementation, channels):
    checks.check(draw_dense(channels, num_tokens=9, channels=channels), implementation)


@pytest.mark.parametrize(
    "activation, bias, state_len, segments",
    half(("silu", None), (FLOATS[0], None), (5, None), (True, False)),
)
def test_optional_arguments(implementation, activation, bias, state_len, segments):
    case = draw_dense(
        5,
        activation=activation,
        bias_dtype=bias,
        state_len=state_len,
        segment_ids=segments,
    )
    checks.check(case, implementation)
    if activation and bias:
        checks.check(case, implementation, final=False)


@pytest.mark.parametrize(
    "spelling, meaning", [(True, "silu"), ("swish", "silu"), (False, None)]
)
def test_spellings_of_one_activation_agree(implementation, spelling, meaning):
    case = draw_dense(6)
    results = [
        checks.call(
            dataclasses.replace(case, options={"activation": a}), implementation
        )
        for a in (spelling, meaning)
    ]
    checks.assert_same_bits(results[0][0], results[1][0])


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("column", range(3))
def test_mixed_dtypes_accumulate_in_float32(implementation, row, column):
    # An orthogonal array: any two of x, weight, bias, state see each pair of dtypes.
    picks = (row, column, (row + column) % 3, (row + 2 * column) % 3)
    names = ("x_dtype", "weight_dtype", "bias_dtype", "state_dtype")
    kinds = {name: FLOATS[pick] for name, pick in zip(names, picks, strict=True)}
    checks.check(draw_dense(row + 3 * column, **kinds), implementation)


@pytest.mark.parametrize("state_len", [None, 3, 11])
def test_runs_and_padding_in_every_place(implementation, state_len):
    case = named_segments(7, state_len=state_len)
    out, final = checks.call(case, implementation)
    exact, want, magnitude = checks.expected(case)
    for b, name in enumerate(SEGMENTS):
        checks.assert_output(out[b], exact[b], magnitude[b], 4, "silu", name)
        checks.assert_same_bits(final[b], want[b], name)


def test_random_runs(implementation):
    for seed in range(6 if implementation == "interpret" else 40):
        checks.check(draw_dense([8, seed], num_tokens=40, state_len=6), implementation)


def test_runs_that_cross_blocks(implementation):
    ids = np.zeros((4, 70), i32)
    ids[1, 31:] = 1  # blocks are of 32 tokens
    ids[2, 33:66] = -1
    ids[3, 1:] = 1
    case = draw_dense(9, num_rows=4, num_tokens=70, arrays={"segment_ids": ids})
    checks.check(case, implementation)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int64"])
def test_segment_ids_of_any_integer_dtype(implementation, dtype):
    info = np.iinfo(dtype)
    ids = np.array([[0, 0, info.max, info.max, 3, 3, 3], [1] * 7], dtype)
    ids[1, :2] = info.min  # padding, or the id 0 if unsigned
    case = draw_dense(10, num_rows=2, num_tokens=7, arrays={"segment_ids": ids})
    # Eager: jit would narrow 64-bit integers before the package sees them.
    out, final = checks.to_host(
        causal_conv1d(
            **case.arrays,
            **case.options,
            return_final_state=True,
            implementation=implementation,
        )
    )
    exact, want, magnitude = checks.expected(case)
    checks.assert_output(out, exact, magnitude, 4, "silu", case)
    checks.assert_same_bits(final, want, case)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_final_state_keeps_the_bits_of_what_it_copies(implementation, dtype):
    # NaN payloads, infinities, subnormals and -0 of x and of the initial state.
    rng = np.random.default_rng(11)
    case = named_segments(11, x_dtype=dtype, state_dtype=dtype, state_len=14)
    noise = {
        name: cases.random_patterns(rng, case.arrays[name].shape, dtype)
        for name in ("x", "initial_state")
    }
    case = case.replace(**noise)
    _, want = reference.causal_conv1d(**case.arrays)
    _, final = checks.call(case, implementation)
    checks.assert_same_bits(final, want, "T = 12, L = 14")


@pytest.mark.parametrize("state_len", [None, 4])
def test_row_of_nothing_but_padding_returns_its_initial_state(
    implementation, state_len
):
    ids = np.full((3, 19), -1, i32)
    ids[1] = 4
    case = draw_dense(12, state_len=state_len, arrays={"segment_ids": ids})
    out, final = checks.call(case, implementation)
    for b in (0, 2):
        want = np.zeros((3, 16), f32)
        if state_len is not None:
            want = case.arrays["initial_state"][b]
        checks.assert_same_bits(final[b], want, f"row {b}")
        checks.assert_same_bits(out[b], np.zeros((19, 16), f32), f"row {b}")


def unseen_by_the_filter(ids):
    """Padding, and runs other than the last one (final states show that one)."""
    keep = np.zeros(ids.shape, bool)
    for row, mask in zip(ids, keep, strict=True):
        for first, end in reference.runs_of(row)[-1:]:
            mask[first:end] = True
    return ~keep


def test_nan_in_padding_and_in_foreign_runs_reaches_nothing(implementation):
    case = named_segments(13)
    ids, clean = case.arrays["segment_ids"], checks.call(case, implementation)
    padding = ids < 0
    x = poisoned(case.arrays["x"], padding)
    dirty = checks.call(case.replace(x=x), implementation)
    checks.assert_same_bits(dirty[0], clean[0], "padding")
    checks.assert_same_bits(dirty[1], clean[1], "padding")
    foreign = unseen_by_the_filter(ids)
    x = poisoned(x, foreign)
    dirty = checks.call(case.replace(x=x), implementation)
    checks.assert_same_bits(dirty[0][~foreign], clean[0][~foreign], "foreign runs")
    # The last run starts behind position 0 wherever there is a foreign one.
    checks.assert_same_bits(dirty[1], clean[1], "foreign runs")
    assert (dirty[0][padding] == 0).all(), dirty[0][padding]


def test_nan_in_an_initial_state_reaches_only_the_run_at_position_0(implementation):
    case = named_segments(14)
    ids = case.arrays["segment_ids"]
    clean, final = checks.call(case, implementation)
    state = poisoned(case.arrays["initial_state"], ...)
    dirty, dirty_final = checks.call(case.replace(initial_state=state), implementation)
    for b, name in enumerate(SEGMENTS):
        runs = reference.runs_of(ids[b])
        first = runs[0][1] if runs and runs[0][0] == 0 else 0
        seen = min(first, 3)  # the first W-1 tokens of that run
        checks.assert_same_bits(dirty[b, seen:], clean[b, seen:], name)
        # The first two of three channels hold NaN and inf; silu(-inf) is finite.
        assert not np.isfinite(dirty[b, :seen, :2]).any(), name
        if runs and runs[-1][0] > 0:
            checks.assert_same_bits(dirty_final[b], final[b], name)


def test_nan_in_rows_of_the_state_behind_the_filter_reaches_no_output(implementation):
    case = draw_dense(15, state_len=9, segment_ids=False)
    clean, _ = checks.call(case, implementation)
    state = poisoned(case.arrays["initial_state"], np.s_[:, :6])  # L = 9, W-1 = 3
    dirty, _ = checks.call(case.replace(initial_state=state), implementation)
    checks.assert_same_bits(dirty, clean)


def test_rows_do_not_see_each_other(implementation):
    case = draw_dense(16, segment_ids=False)
    clean = checks.call(case, implementation)
    x, state = case.arrays["x"].copy(), case.arrays["initial_state"].copy()
    x[1], state[1] = np.nan, np.nan
    dirty = checks.call(case.replace(x=x, initial_state=state), implementation)
    for got, want in zip(dirty, clean, strict=True):
        checks.assert_same_bits(got[[0, 2]], want[[0, 2]])


def test_tokens_do_not_see_later_tokens(implementation):
    case = draw_dense(17, segment_ids=False)
    clean, _ = checks.call(case, implementation)
    x = case.arrays["x"].copy()
    x[:, 7:] = np.nan
    dirty, _ = checks.call(case.replace(x=x), implementation)
    checks.assert_same_bits(dirty[:, :7], clean[:, :7])


@pytest.mark.parametrize("dtype", [FLOATS[0], FLOATS[2]], ids=str)
def test_equals_the_packed_op(implementation, dtype):
    case = draw_dense(18, x_dtype=dtype, state_dtype=dtype)
    x, state = case.arrays["x"], case.arrays["initial_state"]
    weight, bias = case.arrays["weight"], case.arrays["bias"]
    out, final = checks.call(case, implementation)
    exact, _, magnitude = checks.expected(case)
    for b in range(len(x)):
        runs = reference.runs_of(case.arrays["segment_ids"][b])
        # Offsets cannot skip padding: sequences of slot -1 cover it.
        ends = [0, *sorted({edge for run in runs for edge in run} | {19})]
        ends = ends[1:] if ends[1] == 0 else ends
        firsts = [first for first, _ in runs]
        slots = [firsts.index(f) if f in firsts else -1 for f in ends[:-1]]
        states = np.zeros((19, 5, 16), dtype)
        states[0] = state[b]
        packed, states = checks.to_host(
            checks.jitted(causal_conv1d_fn)(
                x[b],
                weight,
                bias,
                states,
                np.array(ends, i32),
                cache_indices=np.array(slots, i32),
                has_initial_state=np.array(ends[:-1]) == 0,
                implementation=implementation,
            )
        )
        checks.assert_output(packed, exact[b], magnitude[b], 4, "silu", (ends, slots))
        checks.assert_output(out[b], exact[b], magnitude[b], 4, "silu", (ends, slots))
        want = states[len(runs) - 1] if runs else state[b]
        checks.assert_same_bits(final[b], want, (ends, slots))


@pytest.mark.parametrize("state_len", [3, 10])
@pytest.mark.parametrize("chunk", [2, 6])
def test_chunk_by_chunk_equals_one_go(implementation, state_len, chunk):
    case = draw_dense(
        19,
        num_tokens=12,
        state_len=state_len,
        segment_ids=False,
        x_dtype=FLOATS[2],
        state_dtype=FLOATS[2],
    )
    exact, final, magnitude = checks.expected(case)
    outs, state = [], case.arrays["initial_state"]
    for first in range(0, 12, chunk):
        x = case.arrays["x"][:, first : first + chunk]
        out, state = checks.call(case.replace(x=x, initial_state=state), implementation)
        outs.append(out)
    checks.assert_output(np.concatenate(outs, 1), exact, magnitude, 4, "silu", case)
    checks.assert_same_bits(state, final, case)


def test_chunk_by_chunk_of_a_run_that_goes_on(implementation):
    # The state of a chunk belongs to its last run; the caller passes it on where the
    # next chunk goes on with that run.
    ids = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1, 2], [3] * 7 + [-1] * 3], i32)
    case = draw_dense(20, num_rows=2, num_tokens=10, arrays={"segment_ids": ids})
    exact, final, magnitude = checks.expected(case)
    outs, state = [], case.arrays["initial_state"]
    for first in (0, 5):
        chunk = {"x": case.arrays["x"][:, first : first + 5], "initial_state": state}
        chunk["segment_ids"] = ids[:, first : first + 5]
        out, state = checks.call(case.replace(**chunk), implementation)
        outs.append(out)
    checks.assert_output(np.concatenate(outs, 1), exact, magnitude, 4, "silu", case)
    checks.assert_same_bits(state, final, case)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_rows": 0},
        {"num_tokens": 0},
        {"channels": 0},
        {"num_rows": 0, "num_tokens": 0, "channels": 0},
        {"width": 1, "state_len": 0},
        {"width": 1, "state_len": None},
        {"num_tokens": 0, "state_len": None},
        {"num_tokens": 0, "segment_ids": False, "bias_dtype": None},
    ],
    ids=str,
)
def test_sizes_of_zero(implementation, sizes):
    checks.check(draw_dense(21, **sizes), implementation)
    checks.check(draw_dense(21, **sizes), implementation, final=False)


def test_dtype_and_shape_of_the_final_state(implementation):
    narrow, wide = FLOATS[2], FLOATS[0]
    for state_len, state_dtype, shape, dtype in (
        (None, wide, (3, 3, 16), narrow),  # L = W-1, dtype of x
        (7, wide, (3, 7, 16), wide),  # those of the initial state
    ):
        case = draw_dense(
            22, state_len=state_len, x_dtype=narrow, state_dtype=state_dtype
        )
        out, final = checks.call(case, implementation)
        got = (out.dtype, final.shape, final.dtype)
        assert got == (narrow, shape, dtype), f"{got}, L = {state_len}"


def test_float64_is_summed_in_float64():
    with jax.enable_x64(True):
        names = ("x_dtype", "weight_dtype", "bias_dtype", "state_dtype")
        double = dict.fromkeys(names, np.dtype("float64"))
        for implementation in ("xla", None):
            checks.check(draw_dense(23, **double), implementation)
            checks.check(
                draw_dense(24, **double | {"state_dtype": FLOATS[2]}), implementation
            )


# Sizes that differ from each other: B=3, T=24, D=16, W=4, L=5.
DENSE = {
    "x": array(3, 24, 16),
    "weight": array(16, 4),
    "bias": array(16),
    "initial_state": array(3, 5, 16),
    "segment_ids": array(3, 24, dtype=i32),
}
SHAPES = [
    ("x", array(24, 16), ["(B, T, D)", "(24, 16)"]),
    ("x", array(1, 3, 24, 16), ["(B, T, D)", "(1, 3, 24, 16)"]),
    ("weight", array(16), ["(D, W)", "(16,)"]),
    ("weight", array(4, 16), ["(D, W)", "16", "(4, 16)"]),
    ("weight", array(16, 1, 4), ["(D, W)", "(16, 1, 4)"]),
    ("weight", array(16, 0), ["(D, W)", "(16, 0)"]),
    ("bias", array(15), ["(D,)", "16", "(15,)"]),
    ("bias", array(16, 1), ["(D,)", "16", "(16, 1)"]),
    ("bias", array(), ["(D,)", "16", "()"]),
    ("initial_state", array(5, 16), ["(B, L, D)", "(5, 16)"]),
    ("initial_state", array(2, 5, 16), ["(B, L, D)", "3", "(2, 5, 16)"]),
    ("initial_state", array(3, 16, 5), ["(B, L, D)", "16", "(3, 16, 5)"]),
    ("initial_state", array(3, 2, 16), ["(W-1) * dilation", "3", "(3, 2, 16)"]),
    ("segment_ids", array(24, dtype=i32), ["(B, T)", "(24,)"]),
    ("segment_ids", array(24, 3, dtype=i32), ["(B, T)", "3, 24", "(24, 3)"]),
    ("segment_ids", array(3, 24, 1, dtype=i32), ["(B, T)", "(3, 24, 1)"]),
]
OPTIONS = [
    ("activation", "elu", ValueError, ["silu", "'elu'"]),
    ("dilation", 0, ValueError, ["at least 1", "0"]),
    ("dilation", "2", TypeError, ["static int", "'2'"]),
    ("dilation", 2, ValueError, ["(W-1) * dilation = 6"]),
    ("residual", None, TypeError, ["True or False", "None"]),
    ("activation", 1.5, ValueError, ["silu", "1.5"]),
    ("return_final_state", 1, TypeError, ["True or False", "1"]),
    ("return_final_state", None, TypeError, ["True or False", "None"]),
    ("return_final_state", "yes", TypeError, ["True or False", "'yes'"]),
    ("implementation", "cuda", ValueError, ["'cuda'", "interpret"]),
    ("x", None, TypeError, ["(B, T, D)", "None"]),
    ("weight", None, TypeError, ["(D, W)", "None"]),
]


def test_unchanged_arguments_of_the_table_are_fine():
    out = jax.eval_shape(lambda kw: causal_conv1d(**kw), DENSE)
    assert out.shape == (3, 24, 16)


@pytest.mark.parametrize("name, value, fragments", SHAPES, ids=shape_id)
def test_wrong_shape(name, value, fragments):
    raises(causal_conv1d, DENSE, {name: value}, ValueError, [name, *fragments])


WRONG_DTYPES = [
    (name, value.astype(dtype))
    for name, value in DENSE.items()
    for dtype in (NO_INTEGERS if name == "segment_ids" else [*NO_FLOATS])
]


@pytest.mark.parametrize(
    "name, value", WRONG_DTYPES, ids=lambda v: v if isinstance(v, str) else str(v.dtype)
)
def test_wrong_dtype(name, value):
    fragments = [name, str(value.dtype)]
    raises(causal_conv1d, DENSE, {name: value}, TypeError, fragments)


@pytest.mark.parametrize("name, value, error, fragments", OPTIONS)
def test_wrong_option(name, value, error, fragments):
    raises(causal_conv1d, DENSE, {name: value}, error, [name, *fragments])


@pytest.mark.parametrize("option", ["activation", "return_final_state"])
def test_traced_option(option):
    def traced(flag):
        return causal_conv1d(**DENSE, **{option: flag})

    with pytest.raises((TypeError, ValueError), match=option):
        jax.eval_shape(traced, jax.ShapeDtypeStruct((), bool))


@pytest.mark.parametrize("kernels", ["triton", "interpret"])
def test_float64_with_kernels_raises(kernels):
    with jax.enable_x64(True):
        x = array(3, 24, 16, dtype=np.float64)
        change = {"x": x, "implementation": kernels}
        raises(causal_conv1d, DENSE, change, TypeError, ["x", "float64", kernels])


def test_float8_state_raises_though_x_is_narrow():
    change = {"x": array(3, 24, 16, dtype=ml_dtypes.bfloat16)}
    change["initial_state"] = array(3, 5, 16, dtype=FLOAT8)
    raises(causal_conv1d, DENSE, change, TypeError, ["initial_state", "float8"])


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="Triton runs here")
def test_forced_triton_raises_where_it_cannot_run():
    with pytest.raises(ValueError, match="triton"):
        jax.block_until_ready(
            causal_conv1d(**jax.tree.map(jnp.asarray, DENSE), implementation="triton")
        )


@pytest.mark.parametrize("dtype", [np.int64, np.uint32, np.uint64])
def test_large_segment_ids_stay_apart(dtype):
    ids = np.array([[2**31] * 3 + [2**31 + 5] * 3], dtype)
    x, weight = np.ones((1, 6, 2), np.float32), np.ones((2, 2), np.float32)
    out = causal_conv1d(x, weight, segment_ids=ids)
    want = causal_conv1d(x, weight, segment_ids=[[0] * 3 + [1] * 3])
    np.testing.assert_array_equal(out, want)


def test_negative_ids_of_a_wide_dtype_are_padding():
    ids = np.array([[-(2**40), -(2**40), 7, 7]])
    x, weight = np.ones((1, 4, 2), np.float32), np.ones((2, 2), np.float32)
    out = causal_conv1d(x, weight, segment_ids=ids)
    assert out[0, :, 0].tolist() == [0, 0, 1, 2]
