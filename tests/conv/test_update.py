"""`causal_conv1d_update` against the per-request reference, on every implementation."""

import jax
import numpy as np
import pytest

from jax_causal_conv import causal_conv1d_fn, causal_conv1d_update
from jax_causal_conv.xla import forward
from tests.support import cases, checks, reference
from tests.support.cases import FLOATS, INT_MAX, INT_MIN
from tests.support.draws import (
    RING_SHAPE,
    UPDATE_SHAPE,
    WIDE,
    draw_update,
    exhaustive,
    half,
    ints,
)

pytestmark = pytest.mark.forward_only


@pytest.mark.parametrize("width", range(1, cases.MAX_WIDTH + 1))
def test_random_rows_of_every_width_and_state_length(implementation, width):
    indices = range(width - 1, cases.GRID, cases.MAX_WIDTH)  # L = W-1 to W+9
    if not exhaustive(implementation):
        indices = [indices[(width + step) % len(indices)] for step in (0, 4, 7)]
    for index in indices:
        rng = np.random.default_rng([3, index])
        shape = cases.update_shape(rng, index, small=not exhaustive(implementation))
        for malformed in (False, False, True, True):
            case = cases.update_case(shape, rng, malformed=malformed)
            checks.check(case, implementation)


@pytest.mark.parametrize(
    "base", [UPDATE_SHAPE, RING_SHAPE], ids=["shifted", "circular"]
)
@pytest.mark.parametrize("channels", cases.CHANNELS)
def test_any_number_of_channels(implementation, base, channels):
    checks.check(draw_update(channels, base, channels=channels), implementation)


@pytest.mark.parametrize(
    "base", [UPDATE_SHAPE, RING_SHAPE], ids=["shifted", "circular"]
)
@pytest.mark.parametrize("num_queries", [None, 1, 2, 3, 4, 5])
def test_any_number_of_tokens_per_row(implementation, base, num_queries):
    case = draw_update(1, base, num_queries=num_queries)
    out, _ = checks.call(case, implementation)
    assert out.shape == case.arrays["x"].shape
    checks.check(case, implementation)


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("column", range(3))
def test_mixed_dtypes_accumulate_in_float32(implementation, row, column):
    picks = (row, column, (row + column) % 3, (row + 2 * column) % 3)
    names = ("x_dtype", "weight_dtype", "bias_dtype", "state_dtype")
    kinds = {name: FLOATS[pick] for name, pick in zip(names, picks, strict=True)}
    base = RING_SHAPE if (row + column) % 2 else UPDATE_SHAPE
    checks.check(draw_update(row + 3 * column, base, **kinds), implementation)


@pytest.mark.parametrize(
    "activation, bias_dtype, indices",
    half(("silu", None), (FLOATS[0], None), (True, False)),
)
@pytest.mark.parametrize("extra", [None, "cache_seqlens", "num_rejected_tokens"])
def test_optional_arguments(implementation, activation, bias_dtype, indices, extra):
    case = draw_update(
        5,
        activation=activation,
        bias_dtype=bias_dtype,
        conv_state_indices=indices,
        cache_seqlens=extra == "cache_seqlens",
        num_rejected_tokens=extra == "num_rejected_tokens",
    )
    checks.check(case, implementation)


def test_activation_defaults_to_none_and_bias_to_zero(implementation):
    case = draw_update(6, bias_dtype=None, activation=None)
    arrays = {k: v for k, v in case.arrays.items() if v is not None}
    out, _ = causal_conv1d_update(**arrays, implementation=implementation)
    exact, _, magnitude = checks.expected(case)
    checks.assert_output(np.asarray(out), exact, magnitude, 4, None, case)


@pytest.mark.parametrize("rejected", [INT_MIN, -1, 0, 1, 5, 6, INT_MAX])
def test_rejected_drafts_are_rolled_back(implementation, rejected):
    arrays = {"num_rejected_tokens": np.full(4, rejected, np.int32)}
    checks.check(draw_update(7, arrays=arrays), implementation)


def test_more_rejected_rows_than_new_tokens_moves_rows_to_the_right(implementation):
    arrays = {
        "num_rejected_tokens": ints(2, 5, 12, 7),
        "conv_state_indices": ints(4, 0, 3, 1),
    }
    case = draw_update(8, num_queries=1, state_len=12, arrays=arrays)
    checks.check(case, implementation)


@pytest.mark.parametrize("state_len", [3, 4, 7, 12])
@pytest.mark.parametrize("num_queries", [1, 3, 5])
def test_circular_buffer_wherever_it_wraps(implementation, state_len, num_queries):
    """Also with Q + W - 1 > L, where new rows land on rows still to be read."""
    rows = 2 * state_len + 1
    arrays = {
        "conv_state_indices": np.arange(rows, dtype=np.int32)[::-1].copy(),
        "cache_seqlens": np.arange(-1, rows - 1, dtype=np.int32),
    }
    case = draw_update(
        9,
        RING_SHAPE,
        num_rows=rows,
        num_slots=rows,
        num_queries=num_queries,
        state_len=state_len,
        arrays=arrays,
    )
    checks.check(case, implementation)


@pytest.mark.parametrize(
    "positions", [(INT_MIN, INT_MAX, -1, -5), (INT_MAX - 1, INT_MIN + 1, -2, 7)]
)
def test_circular_positions_of_any_size_do_not_overflow(implementation, positions):
    for num_queries in (1, 3, 7):
        case = draw_update(
            10,
            RING_SHAPE,
            num_queries=num_queries,
            arrays={
                "cache_seqlens": ints(*positions),
                "conv_state_indices": ints(5, 0, 1, 3),
            },
        )
        checks.check(case, implementation)


def test_circular_buffer_writes_nothing_but_the_new_rows(implementation):
    for dtype in FLOATS:
        case = draw_update(
            11,
            RING_SHAPE,
            num_queries=2,
            state_len=8,
            x_dtype=dtype,
            state_dtype=dtype,
            arrays={
                "cache_seqlens": ints(0, 3, 6, 15),
                "conv_state_indices": ints(0, 1, 2, 4),
            },
        )
        pattern = cases.random_patterns(np.random.default_rng(11), (6, 8, 16), dtype)
        for slot, position in ((0, 0), (1, 3), (2, 6), (4, 15)):
            history = [(position - back) % 8 for back in (1, 2, 3)]
            pattern[slot, history] = case.arrays["conv_state"][slot, history]
        checks.check(case.replace(conv_state=pattern), implementation)


def test_old_rows_and_unused_slots_move_bit_for_bit(implementation):
    for number, dtype in enumerate(FLOATS):
        case = draw_update(
            12,
            num_queries=2,
            state_len=14,
            x_dtype=dtype,
            state_dtype=dtype,
            arrays={
                "conv_state_indices": ints(4, 0, -1, 1),
                "num_rejected_tokens": ints(0, 1, 0, 3),
            },
        )
        rng = np.random.default_rng([12, number])
        pattern = cases.random_patterns(rng, (6, 14, 16), dtype)
        seen = slice(14 - 3 - 3, None)  # the longest rollback and history
        pattern[[4, 0, 1], seen] = case.arrays["conv_state"][[4, 0, 1], seen]
        checks.check(case.replace(conv_state=pattern), implementation)


@pytest.mark.parametrize(
    "base", [UPDATE_SHAPE, RING_SHAPE], ids=["shifted", "circular"]
)
@pytest.mark.parametrize("slots", [(-1,) * 4, (6, 7, INT_MAX, INT_MIN)])
def test_batch_of_padding_gives_zeros_and_leaves_every_slot_alone(
    implementation, base, slots
):
    case = draw_update(13, base, arrays={"conv_state_indices": ints(*slots)})
    out, states = checks.call(case, implementation)
    np.testing.assert_array_equal(out, np.zeros_like(out))
    checks.assert_same_bits(states, case.arrays["conv_state"])


@pytest.mark.parametrize(
    "base", [UPDATE_SHAPE, RING_SHAPE], ids=["shifted", "circular"]
)
def test_skipped_row_leaves_every_slot_alone(implementation, base):
    case = draw_update(14, base, arrays={"conv_state_indices": ints(6, 3, -1, 1)})
    out, states = checks.call(case, implementation)
    np.testing.assert_array_equal(out[[0, 2]], 0)
    untouched = [0, 2, 4, 5]
    checks.assert_same_bits(states[untouched], case.arrays["conv_state"][untouched])
    assert not np.array_equal(states[[1, 3]], case.arrays["conv_state"][[1, 3]])
    checks.check(case, implementation)


@pytest.mark.parametrize("pad_slot_id", [0, 2, -1, -7, 1000])
def test_pad_slot_id_names_the_slot_to_skip(implementation, pad_slot_id):
    slots = ints(2, 0, 5, 1)
    case = draw_update(
        15, pad_slot_id=pad_slot_id, arrays={"conv_state_indices": slots}
    )
    checks.check(case, implementation)


@pytest.fixture
def rows_apart(monkeypatch):
    """Rows without slot numbers as where a mesh may divide them, on any machine."""
    jax.clear_caches()  # of programs that were traced for one CPU device
    monkeypatch.setattr(forward, "_one_cpu", lambda: False)
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    "base", [UPDATE_SHAPE, RING_SHAPE], ids=["shifted", "circular"]
)
def test_rows_and_slots_that_a_mesh_may_divide(rows_apart, base):
    for seed in range(4):
        kinds = {"x_dtype": FLOATS[seed % 3], "state_dtype": FLOATS[(seed + 1) % 3]}
        options = {"conv_state_indices": False, "pad_slot_id": (-1, 2)[seed % 2]}
        sizes = {"num_rows": 5, "num_slots": 5}
        case = draw_update(20 + seed, base, **sizes, **options, **kinds)
        checks.check(case, "xla")


def test_no_indices_means_exactly_arange(implementation):
    for base in (UPDATE_SHAPE, RING_SHAPE):
        case = draw_update(16, base, conv_state_indices=False, pad_slot_id=2)
        checks.check(case, implementation)


@pytest.mark.parametrize(
    "base", [UPDATE_SHAPE, RING_SHAPE], ids=["shifted", "circular"]
)
@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "uint16", "uint32", "int64", "uint64"]
)
def test_any_integer_dtype_of_the_indices(implementation, base, dtype):
    for malformed in (False, True):
        case = draw_update(17, base, index_dtype=np.dtype(dtype), malformed=malformed)
        checks.check(case, implementation)


@pytest.mark.parametrize("closed_over_in_jit", [False, True])
@pytest.mark.parametrize(
    "base", [UPDATE_SHAPE, RING_SHAPE], ids=["shifted", "circular"]
)
def test_wide_integers_are_not_wrapped(implementation, base, closed_over_in_jit):
    wide = {"conv_state_indices": ints(2, WIDE, -WIDE, 4, dtype=np.int64)}
    if base is UPDATE_SHAPE:
        wide["num_rejected_tokens"] = ints(-WIDE, 0, 0, WIDE, dtype=np.int64)
    else:  # positions are reduced mod L, whatever their size
        wide["cache_seqlens"] = ints(WIDE, 0, 0, -WIDE, dtype=np.int64)
    case = draw_update(18, base, index_dtype=np.dtype("int64"), arrays=wide)
    if not closed_over_in_jit:
        checks.check(case, implementation)
        return
    out, states = jax.jit(
        lambda: causal_conv1d_update(
            **case.arrays, activation="silu", implementation=implementation
        )
    )()
    exact, want_states, magnitude = checks.expected(case)
    checks.assert_output(np.asarray(out), exact, magnitude, 4, "silu", case)
    checks.assert_same_bits(np.asarray(states), want_states, case)


@pytest.mark.parametrize(
    "base", [UPDATE_SHAPE, RING_SHAPE], ids=["shifted", "circular"]
)
@pytest.mark.parametrize(
    "sizes",
    [
        {"num_rows": 0},
        {"num_queries": 0},
        {"num_slots": 0},
        {"channels": 0},
        {"channels": 0, "num_queries": None},
        {"num_rows": 0, "num_slots": 0, "num_queries": 0, "channels": 0},
    ],
    ids=str,
)
def test_sizes_of_zero_give_naturally_shaped_results(implementation, base, sizes):
    checks.check(draw_update(19, base, **sizes), implementation)


@pytest.mark.parametrize(
    "base", [UPDATE_SHAPE, RING_SHAPE], ids=["shifted", "circular"]
)
def test_width_one_needs_no_state(implementation, base):
    case = draw_update(
        20,
        base,
        width=1,
        state_len=0,
        arrays={"conv_state_indices": ints(0, 1, -1, 5)},
    )
    out, _ = checks.call(case, implementation)
    assert np.abs(out[[0, 1, 3]]).min() > 0
    np.testing.assert_array_equal(out[2], 0)
    checks.check(case, implementation)


def test_update_equals_the_packed_op_on_the_same_rows(implementation):
    case = draw_update(21, num_queries=3, state_len=9)
    out, states = checks.call(case, implementation)
    a = case.arrays
    packed_out, packed_states = causal_conv1d_fn(
        a["x"].reshape(12, 16),
        a["weight"],
        a["bias"],
        a["conv_state"],
        np.arange(0, 13, 3, dtype=np.int32),
        cache_indices=a["conv_state_indices"],
        has_initial_state=np.ones(4, bool),
        num_rejected_tokens=a["num_rejected_tokens"],
        implementation=implementation,
    )
    exact, _, magnitude = checks.expected(case)
    packed_out = np.asarray(packed_out).reshape(out.shape)
    checks.assert_output(packed_out, exact, magnitude, 4, "silu", case)
    checks.assert_output(out, exact, magnitude, 4, "silu", case)
    checks.assert_same_bits(np.asarray(packed_states), states)


def test_circular_and_shifted_slots_hold_the_same_history(implementation):
    """Decoding on a ring and on a shifted slot gives the same outputs."""
    rng = np.random.default_rng(22)
    x = cases.floats(rng, (9, 2, 16), FLOATS[0])
    weight = cases.floats(rng, (16, 4), FLOATS[0])
    update = checks.jitted(causal_conv1d_update)
    shifted = ring = np.zeros((2, 5, 16), np.float32)
    exact, _ = reference.causal_conv1d_update(x.swapaxes(0, 1), shifted, weight)
    size, _ = reference.causal_conv1d_update(
        abs(x.swapaxes(0, 1)), shifted, abs(weight)
    )
    for step, token in enumerate(x):
        out, shifted = update(token, shifted, weight, implementation=implementation)
        seqlens = np.full(2, step, np.int32)
        ring_out, ring = update(
            token, ring, weight, cache_seqlens=seqlens, implementation=implementation
        )
        for got in map(np.asarray, (out, ring_out)):
            checks.assert_output(got, exact[:, step], size[:, step], 4, None, step)
    np.testing.assert_array_equal(np.roll(ring, -len(x) % 5, axis=1), shifted)


@pytest.mark.parametrize("choice", ["xla", None])
@pytest.mark.parametrize(
    "base", [UPDATE_SHAPE, RING_SHAPE], ids=["shifted", "circular"]
)
def test_float64_input_accumulates_in_float64(choice, base):
    kinds = ("x_dtype", "weight_dtype", "bias_dtype", "state_dtype")
    case = draw_update(23, base, **{kind: np.dtype("float64") for kind in kinds})
    with jax.enable_x64(True):
        checks.check(case, choice)
    for kernels in ("triton", "interpret"):
        with jax.enable_x64(True), pytest.raises(TypeError, match="float64"):
            checks.call(case, kernels)


def test_float64_parameters_are_converted_when_the_input_is_narrower(implementation):
    double = np.dtype("float64")
    case = draw_update(24, weight_dtype=double, bias_dtype=double)
    with jax.enable_x64(True):
        checks.check(case, implementation)
