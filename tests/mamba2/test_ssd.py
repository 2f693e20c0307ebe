"""The state-space-duality op against the recurrence, on every implementation.

Values alone; how the op composes with transformations is in `test_ssd_transforms`.
"""

import dataclasses

import jax
import numpy as np
import pytest

from jax_causal_conv.mamba2.ssd import ssd, ssd_packed
from tests.support import checks, ssd_cases
from tests.support import ssd_reference as reference
from tests.support.cases import INT_MAX, INT_MIN
from tests.support.draws import WIDE, exhaustive, ints
from tests.support.ssd_cases import (
    BFLOAT16,
    EXTREME_STEPS,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    FLOATS,
    batch,
    call,
    check,
    draw_packed,
    draw_rows,
)

pytestmark = pytest.mark.forward_only
POISONS = (np.nan, np.inf, -np.inf)


def some(implementation, *few):
    """Compiled code sees ten seeds, a slow interpreter the given ones."""
    return few if implementation == "interpret" else range(10)


# Packed batches.


@pytest.mark.parametrize("slots", [5, 9])  # as many as there are sequences, or more
@pytest.mark.parametrize("chunk_size", [5, 64])
def test_mixed_batches(implementation, chunk_size, slots):
    few = (1, 2) if slots > 5 else (3,)
    for seed in some(implementation, *few):
        for malformed in (False, True):
            case = draw_packed(
                seed, malformed=malformed, num_slots=slots, chunk_size=chunk_size
            )
            check(case, implementation)


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("column", range(3))
def test_dtypes_are_mixed_at_will(implementation, row, column):
    # An orthogonal array: any two of x, B, C and the state see each pair of dtypes.
    names = ("x", "B", "C", "state")
    picks = (row, column, (row + column) % 3, (row + 2 * column) % 3)
    kinds = {name: FLOATS[pick] for name, pick in zip(names, picks, strict=True)}
    kinds |= {"dt": FLOATS[column], "A": FLOATS[row], "d": FLOATS[picks[2]]}
    shape = {"bias": FLOATS[picks[3]], "num_slots": 5, "num_tokens": 30, "heads": 2}
    check(draw_packed(row + 3 * column, **kinds, **shape), implementation)
    kinds["state"] = None if row == column else kinds["state"]
    check(draw_rows(row, **kinds, heads=2), implementation)


@pytest.mark.parametrize(
    "sizes",
    [
        {"heads": 3, "groups": 1, "dim": 1, "size": 3, "num_tokens": 13, "num_seqs": 9},
        {"heads": 1, "groups": 1, "dim": 3, "size": 1, "num_tokens": 1, "num_seqs": 3},
        {"heads": 6, "groups": 3, "dim": 20, "size": 40, "num_tokens": 30},
        {"heads": 3, "groups": 3, "dim": 33, "size": 17, "num_tokens": 24},
        {"heads": 17, "groups": 1, "dim": 2, "size": 2, "num_tokens": 9, "num_seqs": 2},
        # A head of Mamba2-2.7B, and one of Falcon-H1.
        {"heads": 2, "groups": 1, "dim": 64, "size": 128, "num_tokens": 100},
        {"heads": 1, "groups": 1, "dim": 128, "size": 256, "num_tokens": 20},
    ],
    ids=lambda sizes: "x".join(map(str, sizes.values())),
)
def test_any_sizes(implementation, sizes):
    for seed in (0, 1):
        check(draw_packed(seed, **sizes), implementation)
    rows = {"num_tokens": 19, "num_rows": 2}
    sizes = {name: sizes[name] for name in ("heads", "groups", "dim", "size")}
    check(draw_rows(0, **sizes, **rows), implementation)


def test_lengths_around_a_chunk(implementation):
    heads = 2
    for lengths in ([63, 1, 64, 65], [129, 1, 127, 128], [16, 15, 17, 1]):
        check(batch(lengths, heads=heads, groups=1, head=3, tail=2), implementation)
    for length in (63, 64, 65):
        rows = {"num_rows": 1, "num_tokens": length}
        check(draw_rows(heads, **rows, heads=heads, groups=1), implementation)


@pytest.mark.parametrize(
    ("most", "malformed"), [(0, False), (0, True), (None, False), (None, True)]
)
def test_more_sequences_than_a_kernel_scans_at_once(implementation, most, malformed):
    sizes = {"num_tokens": 330, "num_seqs": 301, "num_slots": 310, "max_prefills": most}
    sizes |= {"heads": 1, "groups": 1, "dim": 2, "size": 2}
    lengths = (0, 1, 1, 1, 1, 2)
    case = draw_packed(6, **sizes, lengths=lengths, malformed=malformed)
    check(case, implementation)


@pytest.mark.parametrize("options", [*np.eye(4, dtype=bool), [False] * 4])
def test_optional_arguments_may_be_left_out(implementation, options):
    indices, initial, skip, bias = options
    shape = {"cache_indices": indices, "has_initial_state": initial, "heads": 2}
    shape |= {"d": FLOAT32 if skip else None, "bias": FLOAT32 if bias else None}
    check(draw_packed(5, **shape, num_slots=5, num_tokens=24), implementation)


@pytest.mark.parametrize(
    "how",
    [
        {"dt_softplus": True},
        {"bias": FLOAT32, "dt_softplus": True, "dt_limit": (0.02, 0.4)},
        {"bias": BFLOAT16, "dt": BFLOAT16, "x": BFLOAT16, "dt_softplus": True},
        {"dt_limit": (0.05, 0.1)},
        {"d_by_channel": True, "bias": FLOAT16},
    ],
    ids=str,
)
def test_step_sizes_and_skip_connection(implementation, how):
    check(draw_packed(2, **how), implementation)
    check(draw_packed(2, **how, max_prefills=0, lengths=(0, 1, 2)), implementation)
    check(draw_rows(2, **how), implementation)


RAW_STEPS = (
    *(-np.inf, -1e30, -2e4, -200.0, -88.0, -17.0, -1e-3, -0.0, 0.0, 1e-30, 1e-3),
    *(0.5, 17.0, 20.0, 21.0, 88.0, 200.0, 2e4, 1e30, np.inf, np.nan),
)


@pytest.mark.parametrize(
    ("limit", "bias"), [((0.0, np.inf), None), ((0.01, 0.5), FLOAT32)]
)
def test_softplus_of_any_value(implementation, limit, bias):
    """One token a sequence, so that none hides what the next ones do."""
    sizes = {"heads": 1, "groups": 1, "dim": 3, "size": 4, "dt_limit": limit}
    count = len(RAW_STEPS)
    decode = batch([1] * count, **sizes, bias=bias, dt_softplus=True)
    dt = np.repeat(np.float32(RAW_STEPS)[:, None], 1, 1)
    check(decode.replace(dt=dt), implementation)
    case = batch([2] * count, **sizes, bias=bias, dt_softplus=True)
    check(case.replace(dt=np.repeat(dt, 2, 0)), implementation)


@pytest.mark.parametrize("scale", [1, -1e-6, -1e-3])
def test_steps_that_hold_on_and_steps_that_forget(implementation, scale):
    """dt·A from 0 to -1e31, token by token and in chunks."""
    for seed in some(implementation, 0):
        rng = np.random.default_rng(seed)
        sizes = {"heads": 2, "groups": 1, "num_tokens": 150}
        lengths = (1, 64, 70)
        cases = [draw_packed(seed, **sizes, lengths=lengths), draw_rows(seed, **sizes)]
        for case in cases:
            extreme = ssd_cases.with_extreme_steps(case, rng, share=0.4)
            if scale < 0:
                extreme = extreme.replace(A=np.full(2, scale, np.float32))
            check(extreme, implementation)


def test_pad_slot_id_names_a_slot_to_skip(implementation):
    for pad in (8, 0, -5):
        case = batch([1, 5, 1, 3], num_slots=9, pad_slot_id=pad)
        slots = ints(3, pad, 5, 1) if pad >= 0 else ints(-1, pad, 5, 1)
        check(case.replace(cache_indices=slots), implementation)
    check(batch([1, 5, 1, 3], cache_indices=False, pad_slot_id=2), implementation)


@pytest.mark.parametrize("most", [0, 1, 2, 9])
def test_surplus_prefills_are_skipped(implementation, most):
    sizes = {"max_prefills": most, "heads": 2, "num_tokens": 30}
    for seed in some(implementation, 1):
        case = draw_packed(seed, **sizes, num_seqs=7, lengths=(0, 1, 2, 3, 5))
        check(case, implementation)
    case = batch([3, 1, 2, 17, 1, 6], max_prefills=most)
    check(case, implementation)
    # Those that are skipped for their slot do not count.
    check(case.replace(cache_indices=ints(-1, 0, 99, 3, 2, 5)), implementation)


@pytest.mark.parametrize("lengths", [[5, 5, 5], [15]])
def test_chunks_suffice_for_the_most_of_them(implementation, lengths):
    """Lengths that need all the chunks of 4 that 15 tokens get."""
    case = batch(lengths, chunk_size=4, max_prefills=len(lengths))
    check(case, implementation)


@pytest.mark.parametrize(
    "offsets",
    [
        [INT_MIN, INT_MAX, INT_MIN, 3],
        [INT_MAX, 0, 5, INT_MIN],
        [-7, 11, 3, 40],
        [0, 0, 0, 0],
        [24, 24, 24, 24],
        [9, 8, 7, 6],
    ],
)
@pytest.mark.parametrize("most", [None, 0])
def test_malformed_offsets(implementation, offsets, most):
    case = draw_packed(1, num_tokens=24, num_seqs=3, max_prefills=most, heads=2)
    case = case.replace(query_start_loc=ints(*offsets), cache_indices=ints(5, 0, 2))
    check(case, implementation)


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "uint16", "uint32", "int64", "uint64"]
)
def test_any_integer_dtype(implementation, dtype):
    """Wide values are clamped before they are narrowed: eagerly, and in 64-bit mode."""
    index = np.dtype(dtype)
    sizes = {"index": index, "heads": 2, "num_tokens": 24, "max_prefills": 2}
    case = draw_packed(3, malformed=True, **sizes)
    slots = case.arrays["cache_indices"].copy()
    slots[0] = min(WIDE, np.iinfo(index).max)
    case = case.replace(cache_indices=slots)
    check(case, implementation)
    if index.itemsize == 8:
        with jax.enable_x64(True):
            check(case, implementation)


def test_segment_ids_of_any_integer_dtype(implementation):
    case = draw_rows(0, num_tokens=9, heads=2)
    hashes = np.array([[7, 7, 2**32 + 7, 2**32 + 7, -1, 2**40, 2**40, 7, 0]] * 2)
    check(case.replace(segment_ids=hashes), implementation)
    check(case.replace(segment_ids=hashes.clip(-1, 3).astype(np.int8)), implementation)


def test_wide_parameters_are_narrowed(implementation):
    with jax.enable_x64(True):
        kinds = dict.fromkeys(("dt", "A", "d", "bias"), FLOAT64)
        if implementation in (None, "xla"):
            check(draw_packed(1, **kinds), implementation)
            everything = dict.fromkeys(("x", "B", "C", "state"), FLOAT64)
            check(draw_packed(1, **kinds, **everything), implementation)
            kinds |= everything | {"state": None}
            case = draw_rows(1, **kinds)
            check(case, implementation)
            assert call(case, implementation)[1].dtype == np.float64


# Rows.


@pytest.mark.parametrize("state", [FLOAT32, BFLOAT16, None])
@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_rows(implementation, chunk_size, state):
    for seed in some(implementation, *([0] if chunk_size == 5 else [])):
        for segments in (True, False):
            case = draw_rows(
                seed, chunk_size=chunk_size, state=state, segment_ids=segments
            )
            check(case, implementation)


@pytest.mark.parametrize("segments", [True, False])
def test_rows_of_several_chunks(implementation, segments):
    sizes = {"heads": 2, "groups": 1, "num_tokens": 140, "chunk_size": 16}
    for seed in some(implementation, 3):
        check(draw_rows(seed, **sizes, segment_ids=segments), implementation)


def test_final_state_only_if_asked_for(implementation):
    for state in (None, FLOAT16):
        check(draw_rows(1, state=state), implementation, final=False)


SEGMENTS = {
    "one run": [7] * 12,
    "runs of one token": range(12),
    "only padding": [-1] * 12,
    "padding of several ids": [-1, -1, -2, -7, -7, -1, INT_MIN, -1, -3, -3, -1, -2],
    "padding at the head": [-1, -1, -5, 0, 0, 0, 0, 0, 0, 1, 1, 1],
    "padding at the tail": [0, 0, 0, 0, 0, 1, 1, 1, 1, -1, -1, -2],
    "padding in the middle": [3, 3, 3, 3, 3, -1, -1, 4, 4, 4, 4, 4],
    "padding of one token": [-1, 2, 2, 2, 2, -1, 5, 5, 5, 5, 5, -1],
    "equal ids around other ids": [1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1],
    "equal ids around padding": [1, 1, 1, -1, 1, 1, 1, 1, -1, -1, 1, 1],
    "ids of both ends of int32": [INT_MAX] * 4 + [INT_MIN] * 4 + [INT_MAX] * 4,
    "one token before padding": [6] + [-1] * 11,
    "one token behind padding": [-1] * 11 + [6],
}


@pytest.mark.parametrize("times", [1, 9])
def test_documents_and_padding(implementation, times):
    """Each id as it is, and as long as it takes for chunks to begin within runs."""
    ids = np.array([list(row) for row in SEGMENTS.values()], np.int32).repeat(times, 1)
    sizes = {"heads": 1, "groups": 1, "dim": 3, "size": 4, "chunk_size": 16}
    case = draw_rows(0, num_rows=ids.shape[0], num_tokens=ids.shape[1], **sizes)
    check(case.replace(segment_ids=ids), implementation)


def test_row_of_padding_returns_its_initial_state(implementation):
    case = draw_rows(3)
    ids = case.arrays["segment_ids"].copy()
    ids[1] = -1
    y, state = call(case.replace(segment_ids=ids), implementation)
    assert (y[1] == 0).all()
    checks.assert_same_bits(state[1], case.arrays["initial_state"][1])


# Isolation: what a token must not see is filled with NaN and infinities.


def poisoned(case, **where):
    """The case with poison in these rows of some arrays."""

    def fill(poison):
        changed = {}
        for name, rows in where.items():
            changed[name] = case.arrays[name].copy()
            changed[name][rows] = poison
        return case.replace(**changed)

    return map(fill, POISONS)


def check_finite(case, implementation):
    exact = ssd_cases.Expected(case)
    assert np.isfinite(exact.y).all(), "the case itself is wrong"
    ssd_cases.compare(case, call(case, implementation), exact, implementation)


LIVE = {"cache_indices": ints(4, 0, 5, 2), "num_slots": 7}


def live_batch(most=None, **arrays):
    case = batch([17, 1, 2, 9], head=2, tail=3, num_slots=7, max_prefills=most)
    seen = np.array([True, False, True, False])
    arrays = {"cache_indices": ints(4, 0, 5, 2), "has_initial_state": seen} | arrays
    return case.replace(**arrays)


@pytest.mark.parametrize("most", [None, 1, 0])
def test_skipped_sequences_and_uncovered_tokens_are_not_seen(implementation, most):
    case = live_batch(most, cache_indices=ints(4, -1, 7, 2))
    unseen = [0, 1, *range(19, 22), 31, 32, 33]
    if most == 1:
        unseen += range(22, 31)
    if most == 0:
        unseen = slice(None)
    tokens = dict.fromkeys(("x", "dt", "B", "C"), unseen)
    for bad in poisoned(case, **tokens):
        check_finite(bad, implementation)


@pytest.mark.parametrize("most", [None, 0])
def test_unused_slots_and_those_without_a_state_are_not_seen(implementation, most):
    for seen in (np.array([True, False, True, False]), None):
        case = live_batch(most, has_initial_state=seen)
        unseen = [0, 1, 2, 3, 6] + ([4, 5] if seen is None else [])
        for bad in poisoned(case, ssm_states=unseen):
            check_finite(bad, implementation)


def test_a_sequence_sees_no_other(implementation):
    """Bits of all others stay, whatever one sequence holds."""
    case = live_batch()
    want, want_states = call(case, implementation)
    for begin, end, slot in ((2, 19, 4), (19, 20, 0), (22, 31, 2)):
        tokens = dict.fromkeys(("x", "dt", "B", "C"), slice(begin, end))
        for bad in poisoned(case, **tokens, ssm_states=[slot]):
            y, states = call(bad, implementation)
            rest = np.r_[0:begin, end:34]
            others = np.delete(np.arange(7), slot)
            checks.assert_same_bits(y[rest], want[rest])
            checks.assert_same_bits(states[others], want_states[others])
            assert not np.isfinite(y[begin:end]).any()
            assert not np.isfinite(states[slot]).any()


def test_nan_of_a_token_is_seen_from_there_on(implementation):
    case = batch([40, 1, 30], heads=2, groups=1)
    for name in ("x", "dt", "B"):
        array = case.arrays[name].copy()
        array[20] = array[40] = np.nan
        y, states = call(case.replace(**{name: array}), implementation)
        assert np.isnan(y[20:41]).all(), name
        assert np.isfinite(y[41:]).all()
        slots = case.arrays["cache_indices"]
        assert np.isnan(states[slots[:2]]).all()
        assert np.isfinite(np.delete(states, slots[:2], axis=0)).all()


def test_two_sequences_in_one_slot_harm_nobody_else(implementation):
    """None may be; then what becomes of these two is open."""
    case = batch([12, 2, 12, 1, 1, 12], num_slots=9)
    case = case.replace(cache_indices=ints(2, 2, 3, 0, 0, 5))
    check(case, implementation)  # leaves these two out
    want, want_states = call(case, implementation)
    mine = np.r_[0:14, 26:28]
    other = np.delete(np.arange(40), mine)
    for name in ("x", "dt", "B", "C"):
        array = case.arrays[name].copy()
        array[mine] = np.nan
        y, states = call(case.replace(**{name: array}), implementation)
        checks.assert_same_bits(y[other], want[other])
        kept = [1, 3, 4, 5, 6, 7, 8]
        checks.assert_same_bits(states[kept], want_states[kept])


def test_foreign_documents_and_padding_are_not_seen(implementation):
    """Nor is the initial state by anybody, since the row begins with padding."""
    sizes = {"heads": 2, "groups": 1, "chunk_size": 5}
    case = draw_rows(4, num_rows=1, num_tokens=90, **sizes)
    ids = np.repeat([[-1, 2, 0, -1, 5, 6]], [2, 18, 24, 9, 16, 21], 1)
    case = case.replace(segment_ids=ids.astype(np.int32))
    padding, foreign = ids[0] < 0, (ids[0] == 0) | (ids[0] == 6)
    want, _ = call(case, implementation)
    unseen = (slice(None), padding | foreign)
    tokens = dict.fromkeys(("x", "dt", "B", "C"), unseen)
    for bad in poisoned(case, **tokens, initial_state=slice(None)):
        check(bad, implementation)
        y, _ = call(bad, implementation)
        np.testing.assert_allclose(y[:, ~foreign], want[:, ~foreign], 1e-5, 1e-6)
        assert (y[:, padding] == 0).all()
        assert not np.isfinite(y[:, foreign]).any()


def test_nan_in_a_document_is_seen_from_there_on(implementation):
    case = draw_rows(5, heads=6, groups=3, chunk_size=5)
    ids = case.arrays["segment_ids"].copy()
    ids[0] = np.repeat([1, 2], [15, 8])
    case = case.replace(segment_ids=ids)
    want, want_state = call(case, implementation)
    for name, token, heads, end in (
        ("x", (0, 4, 3, 2), [3], 15),
        ("dt", (0, 4, 5), [5], 15),
        ("B", (0, 4, 1), [2, 3], 15),
        ("C", (0, 4, 0), [0, 1], 5),
        ("x", (0, 17, 0), [0], 23),
    ):
        array = case.arrays[name].copy()
        array[token] = np.nan
        got, state = call(case.replace(**{name: array}), implementation)
        bad = np.zeros((2, 23, 6), bool)
        bad[0, token[1] : end, heads] = True
        np.testing.assert_array_equal(np.isnan(got).all(3), bad, name)
        np.testing.assert_allclose(got[~bad], want[~bad], rtol=1e-5, atol=1e-6)
        in_state = np.isnan(state).all((2, 3))
        np.testing.assert_array_equal(in_state, bad[:, -1])
        np.testing.assert_allclose(state[~in_state], want_state[~in_state], 1e-5, 1e-6)


def test_documents_equal_separate_rows(implementation):
    case = draw_rows(2, num_rows=1, num_tokens=24, chunk_size=5)
    ids = np.repeat([[4, 7, 4, -1]], [7, 7, 7, 3], 1).astype(np.int32)
    got, state = call(case.replace(segment_ids=ids), implementation)
    for begin in (0, 7, 14):
        alone = {
            name: array if array is None or array.ndim < 3 else array[:, begin:][:, :7]
            for name, array in case.arrays.items()
        }
        start = case.arrays["initial_state"] * (begin == 0)
        alone |= {"initial_state": start.astype(np.float32), "segment_ids": None}
        shape = dataclasses.replace(case.shape, num_tokens=7, segment_ids=False)
        y, last = call(ssd_cases.Case(shape, alone), implementation)
        np.testing.assert_allclose(got[:, begin : begin + 7], y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state, last, rtol=1e-4, atol=1e-5)
    assert (got[:, 21:] == 0).all()


def test_any_split_into_steps_gives_the_same(implementation):
    rng = np.random.default_rng(0)
    for _ in range(8 if exhaustive(implementation) else 2):
        whole = batch([30], num_slots=3, has_initial_state=False, seed=rng)
        exact = ssd_cases.Expected(whole)
        states = rng.standard_normal((3, *whole.shape.state_shape)).astype(np.float32)
        shape = dataclasses.replace(
            *(whole.shape,), num_tokens=10, num_seqs=2, has_initial_state=True
        )
        got, begin = [], 0
        while begin < 30:
            end = min(30, begin + int(rng.choice([1, 1, 2, 5, 8])))
            # The same bucket for every step: 10 tokens, a stranger behind.
            rows = np.arange(begin, begin + 10) % 30
            step = {
                name: array if name in ("A", "D") or array is None else array[rows]
                for name, array in whole.arrays.items()
                if name in ("x", "dt", "A", "B", "C", "D", "dt_bias")
            }
            step |= {
                "ssm_states": states,
                "query_start_loc": ints(0, end - begin, 10),
                "cache_indices": ints(2, 0),
                "has_initial_state": np.array([begin > 0, False]),
            }
            y, states = call(ssd_cases.Case(shape, step), implementation)
            got.append(y[: end - begin])
            begin = end
        y, slot = np.concatenate(got), whole.arrays["cache_indices"][0]
        ssd_cases.assert_close(y, exact.y, exact.y_size, "y", 64)
        ssd_cases.assert_close(
            states[2], exact.states[slot], exact.state_size[slot], "state", 64
        )


# Sizes of zero, and errors.


@pytest.mark.parametrize("empty", ["tokens", "seqs", "slots", "heads", "dim", "size"])
def test_sizes_of_zero(implementation, empty):
    name = f"num_{empty}" if empty in ("tokens", "seqs", "slots") else empty
    sizes = {name: 0} | ({"groups": 1} if empty == "heads" else {})
    rows = dict(sizes)
    if empty in ("seqs", "slots"):
        rows = {"num_rows": 0}
    for case in (draw_packed(0, **sizes), draw_rows(0, **rows)):
        if empty == "size":
            check(case, implementation)
            continue
        y, states = call(case, implementation)
        assert (y.shape, y.dtype) == (case.arrays["x"].shape, np.float32)
        assert not y.any()
        checks.assert_same_bits(states, case.arrays[case.state_name])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": np.zeros((40, 4), np.float32)}, ValueError, r"x must have shape \(T, H"),
        ({"x": np.zeros((40, 4, 5), np.int32)}, TypeError, "x must be one of"),
        ({"dt": np.zeros((39, 4), np.float32)}, ValueError, r"dt must .*\(39, 4\)"),
        ({"A": np.zeros(5, np.float32)}, ValueError, r"A must have shape \(H,\) = \(4"),
        ({"A": None}, TypeError, "A must be an array"),
        ({"B": np.zeros((40, 3, 7), np.float32)}, ValueError, "G divides H = 4, got"),
        ({"B": np.zeros((40, 0, 7), np.float32)}, ValueError, "G divides H = 4, got"),
        ({"C": np.zeros((40, 2, 8), np.float32)}, ValueError, r"C must .*\(40, 2, 8\)"),
        ({"D": np.zeros((4, 4), np.float32)}, ValueError, r"D must have .*\(H, P\)"),
        ({"D": np.zeros((5,), np.float32)}, ValueError, r"D must have .*\(H, P\)"),
        ({"ssm_states": np.zeros((9, 4, 7, 5))}, ValueError, r"\(S, H, P, K\) = \(any"),
        (
            {"ssm_states": np.zeros((3, 4, 5, 7)), "cache_indices": None},
            ValueError,
            "N",
        ),
        ({"query_start_loc": np.zeros(8)}, TypeError, "query_start_loc must have an"),
        ({"query_start_loc": np.zeros(0, int)}, ValueError, r"\(N\+1,\), got \(0,\)"),
        ({"cache_indices": np.zeros(6, int)}, ValueError, r"cache_indices .*\(5,\)"),
        ({"has_initial_state": np.zeros(5)}, TypeError, "has_initial_state .* bool"),
        ({"max_prefills": -1}, ValueError, "max_prefills must be at least 0, got -1"),
        ({"max_prefills": 1.5}, TypeError, "max_prefills must be a static int"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"pad_slot_id": None}, TypeError, "pad_slot_id must be a static int"),
        ({"dt_bias": np.zeros(3, np.float32)}, ValueError, r"dt_bias must .*\(3,\)"),
        ({"dt_bias": np.zeros(4, np.int32)}, TypeError, "dt_bias must be one of"),
        ({"dt_softplus": 1}, TypeError, "dt_softplus must be True or False"),
        ({"dt_limit": 0.5}, TypeError, "dt_limit must be a pair"),
        ({"dt_limit": (1, None)}, TypeError, "dt_limit must be a pair of static"),
        ({"dt_limit": (1.0, 0.5)}, ValueError, "dt_limit must have least <= largest"),
        ({"dt_limit": (np.nan, 1.0)}, ValueError, "dt_limit must have least <="),
        ({"precision": "high"}, ValueError, 'precision must be None, "highest" or'),
        ({"implementation": "cuda"}, ValueError, "implementation must be"),
    ],
)
def test_packed_errors_name_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        ssd_packed(**(draw_packed(0).arrays | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"x": np.zeros((2, 23, 4), np.float32)},
            ValueError,
            r"x must .*\(B, T, H, P\)",
        ),
        ({"dt": np.zeros((2, 23), np.float32)}, ValueError, r"dt must .*\(B, T, H\)"),
        (
            {"initial_state": np.zeros((2, 4, 5))},
            ValueError,
            r"\(B, H, P, K\) = \(2, 4",
        ),
        ({"segment_ids": np.zeros((2, 22), int)}, ValueError, "segment_ids must have"),
        ({"chunk_size": True}, TypeError, "chunk_size must be a static int"),
        ({"return_final_state": 1}, TypeError, "return_final_state must be True"),
    ],
)
def test_dense_errors_name_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        ssd(**(draw_rows(0).arrays | changes))


def test_reference_takes_the_step_that_mamba_ssm_takes():
    """By hand: softplus after the bias, limits after softplus, NaN stays."""
    steps = reference.step_sizes(
        np.float32([[0.0, -100.0, np.nan, 50.0]]), np.ones(4), True, (0.01, 9.0)
    )
    np.testing.assert_allclose(steps, [[1.3132616875, 0.01, np.nan, 9.0]], rtol=1e-9)
    x, B, C = np.ones((2, 1, 1)), np.full((2, 1, 1), 2.0), np.full((2, 1, 1), 3.0)
    dt, A, D = np.full((2, 1), 0.5), np.array([-2.0]), np.array([10.0])
    y, state = reference.recurrence(x, dt, A, B, C, D, np.full((1, 1, 1), 4.0))
    first = np.exp(-1) * 4 + 1
    np.testing.assert_allclose(y[:, 0, 0], [3 * first + 10, 3 * state[0, 0, 0] + 10])
    np.testing.assert_allclose(state, [[[np.exp(-1) * first + 1]]])
    assert max(EXTREME_STEPS) == 1e30
