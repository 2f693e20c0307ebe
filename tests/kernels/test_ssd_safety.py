"""The SSD's kernels touch nothing outside their arrays, in no order that matters.

The arguments are those of `test_memory_safety` and `test_races`: arrays flush against
forbidden pages, whole grids in several orders, and every address that programs read or
write. Here a program writes over elements of the cache that it has read itself, without
a barrier: what it writes there is computed from what it has read there, so the write
waits for the read.
"""

import pytest

pytest.importorskip("triton")

from jax_causal_conv.kernels.ssd_recent import recent_kernel
from tests.support import checks, guard, ssd_cases, ssd_launches
from tests.support.draws import ints
from tests.support.races import ORDERS, Recorder, race
from tests.support.ssd_cases import BFLOAT16, FLOAT16, batch, draw_packed, draw_rows

pytestmark = pytest.mark.usefixtures("quick_compilation")

SEEDS = 18  # of 6 shapes
SIZES = {"heads": 2, "groups": 1, "dim": 17, "size": 5}
STRETCHES = {"chunk": 16, "stretch": 1}

MOVES = SIZES | {"write_indices": True, "snapshots": True}
CASES = {  # and changes to its tiles
    "decode step": (batch([1, 1, 1, 1], max_prefills=0, **SIZES), {}),
    "decode step, prompts skipped": (
        batch([1, 40, 1, 3], max_prefills=0, head=20, tail=20, **SIZES),
        {},
    ),
    "mixed batch": (batch([1, 40, 0, 1, 17], head=2, tail=40, **SIZES), {}),
    "stretches": (batch([1, 50, 1, 16, 33], head=2, tail=3, **SIZES), STRETCHES),
    "longer stretches": (batch([100, 1], **SIZES), STRETCHES | {"stretch": 3}),
    "narrow states": (
        batch([1, 40, 2], x=FLOAT16, state=BFLOAT16, **SIZES),
        STRETCHES,
    ),
    "skipped sequences": (
        batch([1, 20, 1, 33, 2], max_prefills=2, **SIZES).replace(
            cache_indices=ints(-1, 7, 0, 3, 1)
        ),
        STRETCHES,
    ),
    "malformed offsets": (
        draw_packed(3, malformed=True, num_tokens=70, **SIZES),
        STRETCHES,
    ),
    "decode step, forks and snapshots": (
        batch([1, 1, 1, 1], max_prefills=0, num_slots=9, **MOVES).replace(
            cache_indices=ints(3, 3, 0, 1),
            write_indices=ints(4, 5, 0, -1),
            snapshot_indices=ints(6, 7, 0, 1),
            snapshot_ends=ints(0, 1, 0, 1),
        ),
        {},
    ),
    "forks and snapshots, stretches": (
        batch([1, 50, 40, 16, 33, 20], num_slots=14, **MOVES).replace(
            cache_indices=ints(3, 3, 3, 0, 1, 2),
            write_indices=ints(4, 5, 6, 0, 7, -1),
            snapshot_indices=ints(8, 9, 10, 11, 1, 2),
            snapshot_ends=ints(1, 17, 16, 0, 5, 20),
        ),
        STRETCHES,
    ),
    "decode step with drafts": (
        batch([1, 4, 1, 3, 9, 2], max_prefills=0, head=1, drafts=3, **SIZES).replace(
            num_rejected_tokens=ints(0, 3, 2, 1, 2, 9)
        ),
        {},
    ),
    "drafts, forks and snapshots, stretches": (
        batch([1, 50, 40, 3, 33, 4], num_slots=14, drafts=2, **MOVES).replace(
            cache_indices=ints(3, 3, 3, 0, 1, 2),
            write_indices=ints(4, 5, 6, 0, 7, -1),
            snapshot_indices=ints(8, 9, 10, 11, 1, 2),
            snapshot_ends=ints(1, 19, 1, 1, 0, 4),
            num_rejected_tokens=ints(1, 0, 0, 2, 1, 0),
        ),
        STRETCHES,
    ),
    "rows": (draw_rows(0, num_tokens=40, segment_ids=False, **SIZES), {"chunk": 16}),
    "documents": (draw_rows(1, num_tokens=50, **SIZES), STRETCHES),
}
EACH = pytest.mark.parametrize("name", CASES)


def test_any_integers_stay_within_the_arrays():
    """Random cases full of far offsets and slots, of prompts cut into stretches too."""
    outcome = guard.run_child(["--ssd", "--seed", "0", "--cases", str(SEEDS)])
    assert outcome.error is None, str(outcome)
    assert outcome.last == f"{SEEDS - 1} start"


def test_adversarial_cases_are_what_they_claim():
    drawn = [guard.ssd_case(seed) for seed in range(SEEDS)]
    assert any(tile.get("stretch") for _, tile in drawn)
    assert any(case.shape.max_prefills == 0 for case, _ in drawn if case.packed)
    assert any(not case.packed for case, _ in drawn)
    drafts = [(case, tile) for case, tile in drawn if case.packed and case.shape.drafts]
    assert any(case.shape.max_prefills == 0 for case, _ in drafts)
    assert any(tile.get("stretch") for _, tile in drafts)
    far = {-(2**31), 2**31 - 1}
    for name in ("query_start_loc", "cache_indices"):
        arrays = [case.arrays.get(name) for case, _ in drawn]
        assert any(far & {*map(int, a)} for a in arrays if a is not None), name


@EACH
def test_order_of_programs_does_not_matter(name):
    """Each order is that of all launches of a call."""
    case, tile = CASES[name]
    expected, first = ssd_cases.Expected(case), None
    for order, programs in ORDERS.items():
        got = ssd_launches.launch(case, guard.caller(programs), **tile)
        if first is None:
            first = got
            ssd_cases.compare(case, got, expected, "interpret")
        for one, other in zip(first, got, strict=True):
            checks.assert_same_bits(other, one, f"{order}: {case}")


@EACH
def test_no_interleaving_of_threads_matters(name):
    case, tile = CASES[name]
    stores = []

    def call(launch):
        recorder = Recorder()
        results = recorder.caller()(launch)
        stores.append(sum(access.is_store for access in recorder.accesses))
        # A program of a stretch reads the weights that it has written. Recent tokens
        # move to other places of their slot.
        moves = launch.kernel is recent_kernel
        hazard = race(recorder.accesses, barriers_needed=moves, rereads=not moves)
        assert hazard is None, f"{launch.kernel}: {hazard}\n{case}"
        return results

    ssd_launches.launch(case, call, **tile)
    decode_step = case.packed and case.shape.max_prefills == 0
    drafts = case.packed and case.shape.drafts > 0
    assert len(stores) == (1 if decode_step else 2) + drafts
    assert any(stores)
    assert stores[-1] or not drafts


@pytest.mark.parametrize("tile", [{}, STRETCHES], ids=["", "stretches"])
def test_two_live_sequences_on_one_slot_disturb_nobody_else(tile):
    case = batch([40, 1, 33, 1, 2], **SIZES)
    case = case.replace(cache_indices=ints(3, 1, 3, 0, 1))
    expected = ssd_cases.Expected(case)
    assert {sequence.slot for sequence in expected.unknown} == {1, 3}
    for turn in (1, -1):
        call = guard.caller(lambda grid, turn=turn: range(grid)[::turn])
        got = ssd_launches.launch(case, call, **tile)
        ssd_cases.compare(case, got, expected, "interpret")
