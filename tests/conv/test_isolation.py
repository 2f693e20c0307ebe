"""NaN and inf in what a token must not see reach no output and no state.

What may not be seen is filled with poison; the reference never looks there, so it
stays finite, and so must the package.
"""

import numpy as np
import pytest

from tests.support import checks, reference
from tests.support.cases import FLOATS
from tests.support.draws import (
    RING_SHAPE,
    draw_packed,
    draw_update,
    ints,
    offsets_of,
    poisoned,
)

pytestmark = [
    pytest.mark.forward_only,
    pytest.mark.usefixtures("quick_compilation"),
]

LIVE = {
    "query_start_loc": offsets_of([5, 4, 2, 9], head=2),
    "cache_indices": ints(4, 0, 5, 2),
    "has_initial_state": np.array([True, False, True, True]),
    "num_rejected_tokens": ints(0, 3, 2, 1),
}


def check_finite(case, implementation):
    """Equal to the reference, and nothing that a live slot keeps is poisoned."""
    exact, _, _ = checks.expected(case)
    assert np.isfinite(exact).all(), "the case itself is wrong"
    checks.check(case, implementation)


@pytest.mark.parametrize("width", [1, 4])
def test_skipped_sequences_and_uncovered_tokens(implementation, width):
    slots = LIVE | {"cache_indices": ints(4, -1, 6, 2)}
    case = draw_packed(1, width=width, arrays=slots)
    unseen = [0, 1, *range(7, 13), 22, 23]
    case = case.replace(x=poisoned(case.arrays["x"], unseen))
    check_finite(case, implementation)


def test_unused_slots(implementation):
    case = draw_packed(2, arrays=LIVE)
    states = poisoned(case.arrays["conv_states"], [1, 3])
    check_finite(case.replace(conv_states=states), implementation)


def test_slots_without_initial_state(implementation):
    for fresh in ([False] * 4, None, [True, False, True, False]):
        initial = None if fresh is None else np.array(fresh)
        case = draw_packed(3, arrays=LIVE | {"has_initial_state": initial})
        unseen = [4, 0, 5, 2] if initial is None else LIVE["cache_indices"][~initial]
        states = poisoned(case.arrays["conv_states"], unseen)
        case = case.replace(conv_states=states)
        check_finite(case, implementation)
        _, new_states = checks.call(case, implementation)
        assert np.isfinite(new_states).all()


@pytest.mark.parametrize("state_len", [3, 5, 12])
def test_rejected_rows(implementation, state_len):
    for rejected in (ints(1, 3, 2, 3), ints(3, 0, 12, 1)):
        rollback = LIVE | {
            "has_initial_state": np.ones(4, bool),
            "num_rejected_tokens": rejected,
        }
        case = draw_packed(4, state_len=state_len, arrays=rollback)
        states = case.arrays["conv_states"].copy()
        for slot, r in zip(LIVE["cache_indices"], rejected, strict=True):
            states = poisoned(states, np.s_[slot, max(state_len - r, 0) :])
        case = case.replace(conv_states=states)
        check_finite(case, implementation)
        _, new_states = checks.call(case, implementation)
        assert np.isfinite(new_states).all()


def test_rows_older_than_the_filter(implementation):
    case = draw_packed(5, state_len=11, num_rejected_tokens=False, arrays=LIVE | {})
    case = case.replace(num_rejected_tokens=None)
    states = poisoned(case.arrays["conv_states"], np.s_[:, : 11 - 3])
    check_finite(case.replace(conv_states=states), implementation)


@pytest.mark.parametrize("block_m", [8, None])
def test_nan_in_one_sequence_stays_there(implementation, block_m):
    case = draw_packed(6, num_tokens=60, block_m=block_m)
    offsets = offsets_of([17, 3, 25, 9], head=2)
    case = case.replace(query_start_loc=offsets, cache_indices=ints(4, 0, 5, 2))
    clean_out, clean_states = checks.call(case, implementation)
    for i in range(4):
        own = np.s_[offsets[i] : offsets[i + 1]]
        slot = int(ints(4, 0, 5, 2)[i])
        sick = case.replace(
            x=poisoned(case.arrays["x"], own, np.nan),
            conv_states=poisoned(case.arrays["conv_states"], slot, np.nan),
        )
        out, states = checks.call(sick, implementation)
        assert np.isnan(out[own]).all()
        others = np.delete(np.arange(60), own)
        checks.assert_same_bits(out[others], clean_out[others], i)
        rest = np.delete(np.arange(6), slot)
        checks.assert_same_bits(states[rest], clean_states[rest], i)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_nan_in_a_token_reaches_only_the_tokens_whose_filter_covers_it(
    implementation, width
):
    case = draw_packed(
        7,
        width=width,
        state_len=width + 1,
        num_tokens=40,
        num_seqs=1,
        block_m=8,
        arrays={"query_start_loc": ints(1, 39), "cache_indices": ints(3)},
    )
    for sick in (1, 7, 8, 9, 20, 38):
        x = poisoned(case.arrays["x"], sick, np.nan)
        out, _ = checks.call(case.replace(x=x), implementation)
        want = [sick <= token < min(sick + width, 39) for token in range(40)]
        assert np.isnan(out).all(axis=1).tolist() == want
        assert np.isnan(out).any(axis=1).tolist() == want


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_in_one_channel_stays_there(implementation, dtype):
    for channels in (3, 64, 100):
        case = draw_packed(
            8, channels=channels, x_dtype=dtype, state_dtype=dtype, arrays=LIVE
        )
        clean_out, clean_states = checks.call(case, implementation)
        for sick in (0, channels // 2, channels - 1):
            case_sick = case.replace(
                x=poisoned(case.arrays["x"], np.s_[:, sick], np.nan),
                conv_states=poisoned(
                    case.arrays["conv_states"], np.s_[..., sick], np.nan
                ),
            )
            out, states = checks.call(case_sick, implementation)
            rest = np.delete(np.arange(channels), sick)
            checks.assert_same_bits(out[:, rest], clean_out[:, rest], sick)
            checks.assert_same_bits(states[..., rest], clean_states[..., rest], sick)


@pytest.mark.parametrize("circular", [False, True])
def test_skipped_rows_and_unused_slots_of_the_update(implementation, circular):
    slots = {"conv_state_indices": ints(-1, 3, 6, 0)}
    case = draw_update(9, **({"base": RING_SHAPE} if circular else {}), arrays=slots)
    case = case.replace(
        x=poisoned(case.arrays["x"], [0, 2]),
        conv_state=poisoned(case.arrays["conv_state"], [1, 2, 4, 5]),
    )
    check_finite(case, implementation)


def test_rejected_and_older_rows_of_the_update(implementation):
    rejected = ints(1, 4, 0, 12)
    arrays = {"num_rejected_tokens": rejected, "conv_state_indices": ints(4, 3, 1, 0)}
    case = draw_update(10, state_len=12, arrays=arrays)
    state = poisoned(case.arrays["conv_state"], np.s_[:, : 12 - 4 - 3])
    for slot, r in zip(arrays["conv_state_indices"], rejected, strict=True):
        state = poisoned(state, np.s_[slot, 12 - r :])
    check_finite(case.replace(conv_state=state), implementation)


def test_rows_outside_the_filter_of_a_circular_buffer(implementation):
    positions, slots = ints(0, 3, 8, 25), ints(4, 3, 1, 0)
    arrays = {"cache_seqlens": positions, "conv_state_indices": slots}
    case = draw_update(11, RING_SHAPE, state_len=8, num_queries=2, arrays=arrays)
    state = poisoned(case.arrays["conv_state"], ...)
    for slot, position in zip(slots, positions, strict=True):
        history = (position - np.arange(1, 4)) % 8
        state[slot, history] = case.arrays["conv_state"][slot, history]
    check_finite(case.replace(conv_state=state), implementation)


def test_random_batches_with_everything_unseen_poisoned(implementation):
    for seed in range(12):
        case = draw_packed(seed, state_len=9, malformed=seed % 2 == 1)
        case = case.replace(**poison_unseen(case))
        check_finite(case, implementation)


def poison_unseen(case):
    """x and conv_states with poison wherever no live sequence may look."""
    a = case.arrays
    length, width = a["conv_states"].shape[1], a["weight"].shape[1]
    x, states = poisoned(a["x"], ...), poisoned(a["conv_states"], ...)
    q = reference.clean_offsets(a["query_start_loc"], len(x))
    for i, slot in enumerate(a["cache_indices"]):
        if q[i] == q[i + 1] or not reference.is_slot(slot, len(states)):
            continue
        x[q[i] : q[i + 1]] = a["x"][q[i] : q[i + 1]]
        if a["has_initial_state"][i]:
            end = length - min(max(int(a["num_rejected_tokens"][i]), 0), length)
            seen = np.s_[max(end - (width - 1), 0) : end]
            states[slot, seen] = a["conv_states"][slot, seen]
    return {"x": x, "conv_states": states}
