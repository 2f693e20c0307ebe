"""`varlen_conv_states` and `layer_slots`."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal_conv import (
    PAD_SLOT_ID,
    causal_conv1d_fn,
    layer_slots,
    varlen_conv_states,
)
from tests.support import cases, checks, quick, reference
from tests.support.cases import FLOATS, INT_MAX, INT_MIN
from tests.support.draws import WIDE, draw_packed, ints, offsets_of

pytestmark = pytest.mark.usefixtures("quick_compilation")

HISTORY = ("conv_states", "cache_indices", "has_initial_state", "num_rejected_tokens")
JITTED = quick.jit(varlen_conv_states, static_argnums=2)


def history_of(case):
    return {name: case.arrays[name] for name in HISTORY}


def check_states(x, offsets, state_len, function=JITTED, **keywords):
    got = np.asarray(function(x, offsets, state_len, **keywords))
    want = reference.varlen_conv_states(x, offsets, state_len, **keywords)
    integers = {k: v for k, v in keywords.items() if k != "conv_states"}
    checks.assert_same_bits(got, want, f"{offsets} {state_len} {integers}")
    return got


@pytest.mark.parametrize("state_len", [0, 1, 3, 5, 9])
@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
def test_states_after_some_tokens_of_each_sequence(x_dtype, state_len):
    for seed in range(2):
        rng = np.random.default_rng([seed, state_len])
        # Each x meets each dtype of states, with good and with malformed offsets.
        state_dtype = FLOATS[(state_len // 2 + seed) % 3]
        case = draw_packed(
            seed, x_dtype=x_dtype, state_dtype=state_dtype, malformed=seed == 1
        )
        x, offsets = case.arrays["x"], case.arrays["query_start_loc"]
        ends = rng.choice([INT_MIN, -1, 0, 1, 2, 3, 5, 8, INT_MAX], 4).astype(np.int32)
        for keywords in (
            {},
            {"ends": ends},
            history_of(case),
            {"ends": ends, **history_of(case)},
            {**history_of(case), "has_initial_state": None},
            {**history_of(case), "cache_indices": None},
        ):
            check_states(x, offsets, state_len, **keywords)


@pytest.mark.forward_only
def test_without_ends_it_is_the_state_that_the_op_leaves(implementation):
    case = draw_packed(1, arrays={"cache_indices": ints(4, 0, 5, 2)})
    _, states = checks.call(case, implementation)
    got = varlen_conv_states(
        case.arrays["x"], case.arrays["query_start_loc"], 5, **history_of(case)
    )
    lengths = np.diff(case.arrays["query_start_loc"])
    assert (lengths > 0).any()
    for i in np.flatnonzero(lengths):
        slot = case.arrays["cache_indices"][i]
        checks.assert_same_bits(np.asarray(got[i]), states[slot])


@pytest.mark.forward_only
def test_snapshot_continues_the_request_like_the_whole(implementation):
    """The use: prefill once, snapshot after 7 tokens, continue from there."""
    case = draw_packed(2, num_seqs=1, arrays={"query_start_loc": ints(0, 24)})
    x, weight = case.arrays["x"], case.arrays["weight"]
    snapshot = varlen_conv_states(x, ints(0, 24), 5, ends=ints(7))
    out, _ = causal_conv1d_fn(
        x[7:],
        weight,
        None,
        snapshot,
        ints(0, 17),
        has_initial_state=np.ones(1, bool),
        implementation=implementation,
    )
    arguments = (None, np.zeros((1, 5, 16), np.float32), ints(0, 24))
    exact, _ = reference.causal_conv1d_fn(x, weight, *arguments)
    magnitude, _ = reference.causal_conv1d_fn(
        abs(x), abs(weight), *arguments, activation=None
    )
    checks.assert_output(np.asarray(out), exact[7:], magnitude[7:], 4, "silu")


def test_skipped_sequences_give_zeros():
    case = draw_packed(3)
    states = np.full((6, 5, 16), np.nan, np.float32)
    keywords = history_of(case) | {
        "conv_states": states,
        "cache_indices": ints(-1, 6, 2, INT_MIN),
        "has_initial_state": np.ones(4, bool),
    }
    got = check_states(case.arrays["x"], offsets_of([5, 6, 0, 7]), 5, **keywords)
    np.testing.assert_array_equal(got, 0)


def test_wide_indices_are_clamped_not_wrapped():
    case = draw_packed(4)
    keywords = {
        "conv_states": case.arrays["conv_states"],
        "cache_indices": ints(WIDE, 1, -WIDE, 2, dtype=np.int64),
        "has_initial_state": np.ones(4, bool),
        "num_rejected_tokens": ints(0, WIDE, 0, -WIDE, dtype=np.int64),
        "ends": ints(1, WIDE, 1, -WIDE, dtype=np.int64),
    }
    offsets = ints(-WIDE, 4, 8, 12, WIDE, dtype=np.int64)
    check_states(case.arrays["x"], offsets, 5, function=varlen_conv_states, **keywords)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_tokens": 0},
        {"num_seqs": 0},
        {"num_slots": 0},
        {"channels": 0},
        {"width": 1, "state_len": 0},
    ],
    ids=str,
)
def test_sizes_of_zero_give_naturally_shaped_states(sizes):
    case = draw_packed(5, **sizes)
    x, offsets = case.arrays["x"], case.arrays["query_start_loc"]
    for state_len in (0, 4):
        check_states(x, offsets, state_len)
        check_states(x, offsets, state_len, **history_of(case))


def test_nan_that_a_sequence_must_not_see_reaches_no_state():
    case = draw_packed(6)
    nan = np.float32(np.nan)
    x, states = case.arrays["x"].copy(), case.arrays["conv_states"].copy()
    x[:2], x[20:], x[7:10] = nan, nan, nan  # head, tail, tokens after ends[0]
    states[[0, 3, 5]] = nan  # foreign, and one without initial state
    states[1, -2:] = nan  # rejected
    got = check_states(
        x,
        ints(2, 10, 15, 20, 20),
        5,
        conv_states=states,
        cache_indices=ints(3, 1, 4, 2),
        has_initial_state=np.array([False, True, True, True]),
        num_rejected_tokens=ints(0, 2, 0, 0),
        ends=ints(5, 2, 5, 1),
    )
    assert np.isfinite(got).all()


# layer_slots


@pytest.mark.parametrize("pad_slot_id", [-1, 2, 99])
def test_layer_slots_never_turn_padding_into_another_layers_slot(pad_slot_id):
    slots = ints(0, 3, 1, -1, 2, 4, 5, -7, 99, INT_MIN, INT_MAX)
    for layer in range(3):
        want = [
            layer * 4 + s if 0 <= s < 4 and s != pad_slot_id else PAD_SLOT_ID
            for s in slots.tolist()
        ]
        got = layer_slots(slots, layer, 4, pad_slot_id=pad_slot_id)
        assert got.tolist() == want
        assert got.dtype == "int32"


def test_layer_slots_of_any_integer_dtype():
    for dtype, x64 in itertools.product(
        ["int8", "uint8", "uint32", "int64", "uint64"], [False, True]
    ):
        slots = cases.integers([0, 3, *cases.far_values(np.dtype(dtype))], dtype)
        with jax.enable_x64(x64):
            got = layer_slots(slots, 2, 4)
        assert got.tolist() == [8, 11] + [PAD_SLOT_ID] * (len(slots) - 2)


@pytest.mark.forward_only
def test_layers_scan_over_one_big_cache(implementation):
    """A traced layer number, one flattened cache, one skipped sequence."""
    layers, num_slots = 3, 6
    case = draw_packed(7, arrays={"cache_indices": ints(4, -1, 0, 6)})
    a = case.arrays
    rng = np.random.default_rng(7)
    cache = cases.floats(rng, (layers * num_slots, 5, 16), FLOATS[0])
    weights = cases.floats(rng, (layers, 16, 4), FLOATS[0])

    @quick.jit
    def model(x, cache):
        def layer(carry, inputs):
            x, cache = carry
            number, weight = inputs
            out, cache = causal_conv1d_fn(
                x,
                weight,
                None,
                cache,
                a["query_start_loc"],
                cache_indices=layer_slots(a["cache_indices"], number, num_slots),
                has_initial_state=a["has_initial_state"],
                implementation=implementation,
            )
            return (out, cache), out

        (_, cache), outs = jax.lax.scan(
            layer, (x, cache), (jnp.arange(layers), weights)
        )
        return outs, cache

    outs, new_cache = checks.to_host(model(a["x"], cache))
    x = a["x"]
    for number in range(layers):
        part = slice(number * num_slots, (number + 1) * num_slots)
        layer_case = case.replace(
            x=x,
            weight=weights[number],
            bias=None,
            conv_states=cache[part],
            num_rejected_tokens=None,
        )
        exact, states, magnitude = checks.expected(layer_case)
        checks.assert_output(outs[number], exact, magnitude, 4, "silu", number)
        checks.assert_same_bits(new_cache[part], states, number)
        x = outs[number]


@pytest.mark.parametrize("dtype", [np.int32, np.int64, int])
@pytest.mark.parametrize("layer", [-1, 2**30, -(2**31)])
def test_layer_out_of_range_is_padding_whatever_its_dtype(layer, dtype):
    got = layer_slots(np.array([0, 3, -1]), dtype(layer), 4)
    assert got.tolist() == [-1, -1, -1], f"layer {layer} gives {got}"
