"""`causal_conv1d_fn` against the per-request reference, on every implementation."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_causal_conv import build_metadata, causal_conv1d_fn
from tests.support import cases, checks
from tests.support.cases import FLOATS, INT_MAX, INT_MIN
from tests.support.draws import WIDE, draw_packed, exhaustive, half, ints, offsets_of

pytestmark = pytest.mark.forward_only


@pytest.mark.parametrize("width", range(1, cases.MAX_WIDTH + 1))
def test_random_batches_of_every_width_and_state_length(implementation, width):
    indices = range(width - 1, cases.GRID, cases.MAX_WIDTH)  # L = W-1 to W+9
    if not exhaustive(implementation):
        indices = [indices[(width + step) % len(indices)] for step in (0, 4, 7)]
    for index in indices:
        rng = np.random.default_rng([2, index])
        shape = cases.packed_shape(rng, index, small=not exhaustive(implementation))
        for malformed in (False, False, True, True):
            case = cases.packed_case(shape, rng, malformed=malformed)
            checks.check(case, implementation)


@pytest.mark.parametrize("malformed", [False, True])
def test_more_sequences_than_a_kernel_scans_at_once(implementation, malformed):
    # 256 at once, four an access, and the last offsets alone: all three occur.
    batch = {"num_tokens": 400, "num_seqs": 301, "num_slots": 310, "channels": 8}
    checks.check(draw_packed(6, malformed=malformed, **batch), implementation)


@pytest.mark.parametrize("channels", cases.CHANNELS)
def test_any_number_of_channels(implementation, channels):
    checks.check(draw_packed(channels, channels=channels), implementation)


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("column", range(3))
def test_mixed_dtypes_accumulate_in_float32(implementation, row, column):
    # An orthogonal array: any two of x, weight, bias, state see each pair of dtypes
    picks = (row, column, (row + column) % 3, (row + 2 * column) % 3)
    names = ("x_dtype", "weight_dtype", "bias_dtype", "state_dtype")
    kinds = {name: FLOATS[pick] for name, pick in zip(names, picks, strict=True)}
    checks.check(draw_packed(row + 3 * column, **kinds), implementation)


@pytest.mark.parametrize(
    "activation, bias_dtype, indices, initial",
    half(("silu", None), (FLOATS[0], None), (True, False), (True, False)),
)
def test_optional_arguments(implementation, activation, bias_dtype, indices, initial):
    case = draw_packed(
        5,
        activation=activation,
        bias_dtype=bias_dtype,
        cache_indices=indices,
        has_initial_state=initial,
        num_rejected_tokens=initial,
    )
    checks.check(case, implementation)


@pytest.mark.parametrize(
    "spelling, meaning", [(True, "silu"), ("swish", "silu"), (False, None)]
)
def test_spellings_of_one_activation_agree(implementation, spelling, meaning):
    case = draw_packed(6)
    results = [
        checks.call(
            dataclasses.replace(case, options={"activation": a}), implementation
        )
        for a in (spelling, meaning)
    ]
    np.testing.assert_array_equal(results[0][0], results[1][0])


@pytest.mark.parametrize("block_m", [8, 11, 16, None])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_lengths_around_the_width_and_the_block(implementation, width, block_m):
    lengths = cases.interesting_lengths(width, block_m)
    np.random.default_rng([width, block_m or 0]).shuffle(lengths)
    case = draw_packed(
        width,
        num_tokens=sum(lengths) + 3,
        num_seqs=len(lengths),
        num_slots=len(lengths) + 1,
        width=width,
        state_len=width + 1,
        block_m=block_m,
        arrays={
            "query_start_loc": offsets_of(lengths, head=2),
            "cache_indices": np.arange(len(lengths), dtype=np.int32)[::-1] + 1,
        },
    )
    checks.check(case, implementation)


def test_long_sequence_beside_decodes(implementation):
    length = 1000 if exhaustive(implementation) else 150
    lengths = [1, length, 1, 1]
    case = draw_packed(
        7,
        num_tokens=sum(lengths),
        channels=64,
        x_dtype=FLOATS[2],
        state_dtype=FLOATS[2],
        arrays={
            "query_start_loc": offsets_of(lengths),
            "cache_indices": ints(3, 0, 5, 1),
        },
    )
    checks.check(case, implementation)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 39, 40, 41])
def test_state_longer_than_the_block(implementation, length):
    rejected = ints(0, 3, 40, 1)
    case = draw_packed(
        8,
        num_tokens=60,
        state_len=40,
        block_m=8,
        arrays={
            "query_start_loc": offsets_of([length, 1, 2, 5], head=1),
            "cache_indices": ints(4, 2, 0, 1),
            "has_initial_state": np.ones(4, bool),
            "num_rejected_tokens": rejected,
        },
    )
    checks.check(case, implementation)


@pytest.mark.parametrize("width", [1, 4])
def test_more_rejected_rows_than_new_tokens_moves_rows_to_the_right(
    implementation, width
):
    case = draw_packed(
        9,
        width=width,
        state_len=9,
        arrays={
            "query_start_loc": offsets_of([1, 2, 3, 1]),
            "cache_indices": ints(5, 0, 3, 2),
            "has_initial_state": np.ones(4, bool),
            "num_rejected_tokens": ints(2, 5, 9, 4),
        },
    )
    checks.check(case, implementation)


@pytest.mark.parametrize("rejected", [INT_MIN, -1, 6, INT_MAX])
def test_num_rejected_tokens_is_clamped_to_the_state(implementation, rejected):
    case = draw_packed(
        10,
        arrays={
            "has_initial_state": np.ones(4, bool),
            "num_rejected_tokens": np.full(4, rejected, np.int32),
        },
    )
    checks.check(case, implementation)


def test_num_rejected_tokens_is_ignored_without_an_initial_state(implementation):
    case = draw_packed(11, arrays={"has_initial_state": np.zeros(4, bool)})
    with_rollback = checks.call(case, implementation)
    without = checks.call(case.replace(num_rejected_tokens=None), implementation)
    checks.assert_same_bits(with_rollback[0], without[0])
    checks.assert_same_bits(with_rollback[1], without[1])
    checks.check(case, implementation)


@pytest.mark.parametrize("slots", [(-1,) * 4, (6, 7, INT_MAX, INT_MIN)])
def test_batch_of_padding_gives_zeros_and_leaves_every_slot_alone(
    implementation, slots
):
    case = draw_packed(12, arrays={"cache_indices": ints(*slots)})
    out, states = checks.call(case, implementation)
    np.testing.assert_array_equal(out, np.zeros_like(out))
    checks.assert_same_bits(states, case.arrays["conv_states"])


def test_skipped_sequence_leaves_every_slot_alone(implementation):
    case = draw_packed(
        13,
        arrays={
            "query_start_loc": offsets_of([5, 6, 0, 7]),
            "cache_indices": ints(-1, 2, 3, 6),
        },
    )
    out, states = checks.call(case, implementation)
    old = case.arrays["conv_states"]
    untouched = [0, 1, 3, 4, 5]
    checks.assert_same_bits(states[untouched], old[untouched])
    assert not np.array_equal(states[2], old[2])
    np.testing.assert_array_equal(out[:5], 0)
    np.testing.assert_array_equal(out[11:], 0)
    checks.check(case, implementation)


@pytest.mark.parametrize("head, tail", [(0, 9), (9, 0), (20, 17), (37, 0), (0, 37)])
def test_uncovered_head_and_tail_are_exact_zeros(implementation, head, tail):
    middle = 40 - head - tail
    case = draw_packed(
        14,
        num_tokens=40,
        num_seqs=1,
        block_m=8,
        arrays={
            "query_start_loc": offsets_of([middle], head=head),
            "cache_indices": ints(3),
        },
    )
    out, _ = checks.call(case, implementation)
    np.testing.assert_array_equal(out[:head], 0)
    np.testing.assert_array_equal(out[head + middle :], 0)
    checks.check(case, implementation)


def test_slots_in_any_order(implementation):
    rng = np.random.default_rng(15)
    for _ in range(5):
        slots = rng.permutation(6)[:4].astype(np.int32)
        checks.check(draw_packed(15, arrays={"cache_indices": slots}), implementation)


def test_empty_sequence_may_name_the_slot_of_a_live_one(implementation):
    for empty_first in (True, False):
        lengths = [0, 5, 0, 6] if empty_first else [5, 0, 6, 0]
        arrays = {
            "query_start_loc": offsets_of(lengths),
            "cache_indices": ints(2, 2, 4, 4),
            "has_initial_state": np.ones(4, bool),
        }
        checks.check(draw_packed(16, arrays=arrays), implementation)


def test_two_live_sequences_on_one_slot_harm_nobody_else(implementation):
    slots = ints(2, 5, 2, 0)
    lengths = [5, 6, 4, 7]
    arrays = {"query_start_loc": offsets_of(lengths), "cache_indices": slots}
    case = draw_packed(31, block_m=8, arrays=arrays)
    out, states = checks.call(case, implementation)
    exact, want_states, magnitude = checks.expected(case)
    for others in (np.s_[5:11], np.s_[15:]):
        checks.assert_output(
            out[others], exact[others], magnitude[others], 4, "silu", case
        )
    checks.assert_same_bits(states[[0, 1, 3, 4, 5]], want_states[[0, 1, 3, 4, 5]])


@pytest.mark.parametrize(
    "offsets",
    [
        (0, 10, 5, 20, 24),  # decreasing
        (24, 18, 12, 6, 0),
        (-5, 3, 9, 30, 40),  # beyond both ends
        (INT_MIN, INT_MAX, INT_MIN, INT_MAX, 0),
        (INT_MAX, 0, 8, 16, 24),
        (7, 7, 7, 7, 7),
        (0, INT_MIN, 12, INT_MIN, 20),
        (INT_MIN,) * 5,
        (INT_MAX,) * 5,
    ],
    ids=str,
)
def test_any_offsets_mean_their_clipped_running_maximum(implementation, offsets):
    arrays = {
        "query_start_loc": ints(*offsets),
        "cache_indices": ints(3, 1, 5, 0),
    }
    for block_m in (None, 8):
        case = draw_packed(17, block_m=block_m, arrays=arrays)
        checks.check(case, implementation)


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "uint16", "uint32", "int64", "uint64"]
)
def test_any_integer_dtype_of_the_indices(implementation, dtype):
    for malformed in (False, True):
        case = draw_packed(18, index_dtype=np.dtype(dtype), malformed=malformed)
        checks.check(case, implementation)


@pytest.mark.parametrize("closed_over_in_jit", [False, True])
def test_wide_integers_are_clamped_not_wrapped(implementation, closed_over_in_jit):
    case = draw_packed(
        19,
        index_dtype=np.dtype("int64"),
        arrays={
            "query_start_loc": ints(-WIDE, 4, 8, 12, WIDE, dtype=np.int64),
            "cache_indices": ints(2, WIDE, -WIDE, 4, dtype=np.int64),
            "num_rejected_tokens": ints(-WIDE, 0, 0, WIDE, dtype=np.int64),
            "has_initial_state": np.ones(4, bool),
        },
    )
    if not closed_over_in_jit:
        checks.check(case, implementation)
        return
    out, states = jax.jit(
        lambda: causal_conv1d_fn(**case.arrays, implementation=implementation)
    )()
    exact, want_states, magnitude = checks.expected(case)
    checks.assert_output(np.asarray(out), exact, magnitude, 4, "silu", case)
    checks.assert_same_bits(np.asarray(states), want_states, case)


def test_pad_slot_id_wider_than_the_index_dtype_does_not_wrap(implementation):
    slots = ints(44, 3, 1, 2, dtype=np.int8)  # 300 is 44 in eight bits
    case = draw_packed(
        20,
        num_slots=50,
        pad_slot_id=300,
        index_dtype=np.dtype("int8"),
        arrays={"query_start_loc": offsets_of([6] * 4), "cache_indices": slots},
    )
    out, _ = checks.call(case, implementation)
    assert np.abs(out[:6]).min() > 0
    checks.check(case, implementation)


@pytest.mark.parametrize("pad_slot_id", [0, 2, 5, -1, -7, 1000])
def test_pad_slot_id_names_the_slot_to_skip(implementation, pad_slot_id):
    slots = ints(2, 0, 5, 1)
    case = draw_packed(21, pad_slot_id=pad_slot_id, arrays={"cache_indices": slots})
    checks.check(case, implementation)


def test_no_cache_indices_means_exactly_arange(implementation):
    case = draw_packed(22, cache_indices=False, pad_slot_id=2)
    checks.check(case, implementation)
    out, states = checks.call(case, implementation)
    explicit = case.replace(cache_indices=np.arange(4, dtype=np.int32))
    explicit_out, explicit_states = checks.call(explicit, implementation)
    checks.assert_same_bits(out, explicit_out)
    checks.assert_same_bits(states, explicit_states)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_tokens": 0},
        {"num_seqs": 0},
        {"num_slots": 0},
        {"channels": 0},
        {"num_tokens": 0, "num_seqs": 0},
        {"num_seqs": 0, "num_slots": 0},
        {"num_tokens": 0, "num_seqs": 0, "num_slots": 0, "channels": 0},
        {"width": 1, "state_len": 0, "channels": 0},
    ],
    ids=str,
)
def test_sizes_of_zero_give_naturally_shaped_results(implementation, sizes):
    for block_m in (None, 8):
        case = draw_packed(23, block_m=block_m, **sizes)
        checks.check(case, implementation)


def test_width_one_needs_no_state(implementation):
    case = draw_packed(
        24,
        width=1,
        state_len=0,
        arrays={
            "query_start_loc": offsets_of([5, 0, 7, 9], head=2),
            "cache_indices": ints(0, 1, -1, 5),
        },
    )
    out, _ = checks.call(case, implementation)
    assert np.abs(out[2:7]).min() > 0
    np.testing.assert_array_equal(out[7:14], 0)
    checks.check(case, implementation)


def test_old_rows_and_unused_slots_move_bit_for_bit(implementation):
    """Any bit pattern survives: NaN payloads, signalling NaNs, subnormals, -0."""
    for number, dtype in enumerate(FLOATS):
        rng = np.random.default_rng([25, number])
        case = draw_packed(
            25,
            state_len=14,
            x_dtype=dtype,
            state_dtype=dtype,
            arrays={
                "query_start_loc": offsets_of([1, 2, 5, 9]),
                "cache_indices": ints(4, 0, 2, 1),
                "has_initial_state": np.array([True, True, True, False]),
                "num_rejected_tokens": ints(0, 1, 3, 0),
            },
        )
        states = cases.random_patterns(rng, (6, 14, 16), dtype)
        tame = slice(14 - 3 - 3, None)  # what the outputs see: history, rejected rows
        states[[4, 0, 2], tame] = case.arrays["conv_states"][[4, 0, 2], tame]
        checks.check(case.replace(conv_states=states), implementation)


def test_bfloat16_products_are_not_rounded_before_the_sum(implementation):
    # (1 + 2^-7)^2 - (1 + 2^-6) = 2^-14, which is lost if the product is rounded.
    bfloat16 = ml_dtypes.bfloat16
    one = np.ones((1, 1), bfloat16)
    out, _ = causal_conv1d_fn(
        np.array([[1 + 2**-6], [1 + 2**-7]], bfloat16),
        np.array([[-1, 1 + 2**-7]], bfloat16),
        None,
        one[None],
        ints(0, 2),
        activation=None,
        implementation=implementation,
    )
    assert float(out[1, 0]) == 2**-14


def test_silu_of_large_values_stays_finite(implementation):
    values = [-1e4, -1000, -100, -89, -30, -1, 0, 1, 30, 89, 100, 1000, 1e4]
    x = np.array(values, np.float32)[:, None]
    out, _ = causal_conv1d_fn(
        x,
        np.ones((1, 1), np.float32),
        None,
        np.zeros((1, 2, 1), np.float32),
        ints(0, len(x)),
        implementation=implementation,
    )
    exact = x.astype(np.float64)
    with np.errstate(over="ignore"):
        exact = exact / (1 + np.exp(-exact))
    checks.assert_output(np.asarray(out), exact, abs(x), 1, "silu", values)


@pytest.mark.parametrize("block_m", [3, 5, 8, 16, 64, 100])
def test_block_of_the_metadata_does_not_change_the_result(implementation, block_m):
    case = draw_packed(
        26, num_tokens=70, arrays={"query_start_loc": ints(1, 30, 31, 47, 69)}
    )
    q = case.arrays["query_start_loc"]
    host = build_metadata(q, 70, block_m=block_m)
    in_graph = jax.jit(lambda q: build_metadata(q, 70, block_m=block_m))(q)
    for metadata in (host, in_graph):
        checks.check(case, implementation, metadata=metadata)


def test_mixed_batch_inside_one_jit_with_metadata_built_in_graph(implementation):
    @jax.jit
    def step(x, weight, bias, states, q, slots, fresh):
        metadata = build_metadata(q, x.shape[0], block_m=8)
        for _ in range(2):  # two layers share it
            x, states = causal_conv1d_fn(
                x,
                weight,
                bias,
                states,
                q,
                cache_indices=slots,
                has_initial_state=fresh,
                metadata=metadata,
                implementation=implementation,
            )
        return x, states

    names = ("x", "weight", "bias", "conv_states", "query_start_loc")
    names += ("cache_indices", "has_initial_state")
    case = draw_packed(27, num_rejected_tokens=False)
    out, states = checks.to_host(step(*(case.arrays[name] for name in names)))
    first, states_between = checks.call(case, implementation)
    between = case.replace(x=first, conv_states=states_between)
    exact, want_states, magnitude = checks.expected(between)
    checks.assert_output(out, exact, magnitude, 4, "silu", case)
    checks.assert_same_bits(states, want_states, case)


def float64_case(**changes):
    kinds = ("x_dtype", "weight_dtype", "bias_dtype", "state_dtype")
    double = np.dtype("float64")
    return draw_packed(28, **dict.fromkeys(kinds, double) | changes)


@pytest.mark.parametrize("choice", ["xla", None])
@pytest.mark.parametrize("narrow", [None, "weight_dtype", "bias_dtype", "state_dtype"])
def test_float64_input_accumulates_in_float64(choice, narrow):
    case = float64_case(**{narrow: FLOATS[0]} if narrow else {})
    with jax.enable_x64(True):
        checks.check(case, choice)


def test_float64_parameters_are_converted_when_the_input_is_narrower(implementation):
    for x_dtype in FLOATS:
        case = float64_case(x_dtype=x_dtype, state_dtype=x_dtype)
        with jax.enable_x64(True):
            checks.check(case, implementation)


def test_float64_input_has_no_kernel():
    case = float64_case()
    for kernels in ("triton", "interpret"):
        with jax.enable_x64(True), pytest.raises(TypeError, match="float64"):
            checks.call(case, kernels)


def test_64_bit_indices_under_x64(implementation):
    case = draw_packed(29, index_dtype=np.dtype("int64"), malformed=True)
    with jax.enable_x64(True):
        checks.check(case, implementation)


def test_jax_arrays_and_numpy_arrays_give_the_same(implementation):
    case = draw_packed(30)
    on_device = case.replace(
        **{k: v if v is None else jnp.asarray(v) for k, v in case.arrays.items()}
    )
    for one, other in zip(
        checks.call(case, implementation),
        checks.call(on_device, implementation),
        strict=True,
    ):
        checks.assert_same_bits(one, other)
