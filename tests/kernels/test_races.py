"""No kernel's result depends on the order in which its programs run.

Two arguments. First, the whole grid is run forward, backward and shuffled, on one
state buffer that is read and written in place: the results are equal bit for bit.
That alone treats a program as a single step. So, second, every address that a program
reads or writes is recorded: no program writes what another one touches, none reads an
element that it has written, and, as a program's threads run apart, a barrier lies
between the last read of an element and its write, and between two writes of it. With
that, no interleaving of any two threads can change a result.

What the contract leaves unspecified: two *live* sequences on one slot, for those
sequences and that slot alone (their programs read and write the same rows). The last
tests show that nobody else notices. Metadata of another batch is unspecified as well,
and not looked at here.
"""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("triton")

from jax_causal_conv.op import ops
from tests.support import cases, checks, fuzz, guard
from tests.support.cases import FLOATS, PackedShape, UpdateShape
from tests.support.races import ORDERS, Access, Recorder, race

pytestmark = pytest.mark.usefixtures("quick_compilation")

PACKED = PackedShape(
    num_tokens=40,
    num_seqs=5,
    num_slots=7,
    channels=5,
    width=4,
    state_len=6,
    block_m=4,
    bias_dtype=None,
)
UPDATE = UpdateShape(
    num_rows=5, num_queries=3, num_slots=8, channels=5, width=4, state_len=6
)


def packed(lengths, rejected=0, initial=True, head=2, **changes):
    """A packed case of these lengths, slots in a mixed order."""
    count = len(lengths)
    shape = dataclasses.replace(
        PACKED, num_seqs=count, num_tokens=head + sum(lengths) + 3, **changes
    )
    rng = np.random.default_rng(len(lengths) + sum(lengths))
    case = cases.packed_case(shape, rng)
    return case.replace(
        query_start_loc=np.cumsum([head, *lengths], dtype=np.int32),
        cache_indices=rng.permutation(shape.num_slots)[:count].astype(np.int32),
        has_initial_state=np.full(count, initial),
        num_rejected_tokens=np.resize(rejected, count).astype(np.int32),
    )


def update(seed=0, arrays=None, **changes):
    shape = dataclasses.replace(UPDATE, **changes)
    case = cases.update_case(shape, np.random.default_rng(seed))
    return case.replace(**(arrays or {}))


def slots(*numbers):
    return np.array(numbers, np.int32)


CASES = {
    "mixed batch": packed([1, 7, 0, 9, 4]),
    "decode steps": packed([1, 1, 1, 1, 1], rejected=[0, 1, 2, 0, 3]),
    "more rejected rows than new tokens": packed(
        [1, 2, 3, 1], rejected=[4, 5, 9, 6], state_len=9
    ),
    "chunks with initial state": packed([17, 16, 15], rejected=[0, 2, 0]),
    "chunks without initial state": packed([17, 16, 15], initial=False),
    "long state, short chunks": packed(
        [21, 1, 20, 9], rejected=[0, 18, 3, 1], state_len=20
    ),
    "long state moved in pieces": packed(
        [9, 1], rejected=[3, 250], state_len=300, channels=40
    ),
    "several blocks of channels": packed(
        [35, 2], rejected=[1, 5], width=33, state_len=35, channels=65, block_m=32
    ),
    "state of another dtype": packed(
        [5, 2, 9], x_dtype=FLOATS[0], state_dtype=FLOATS[2]
    ),
    "skipped sequences and padding": packed([4, 6, 5, 3]).replace(
        cache_indices=slots(-1, 3, 7, 0)
    ),
    "malformed offsets": packed([4, 6, 5, 3]).replace(
        query_start_loc=slots(9, 3, 2**31 - 1, -(2**31), 30)
    ),
    "dilation": packed(
        [1, 17, 2, 9],
        rejected=[0, 2],
        dilation=2,
        residual=True,
        state_len=8,
        block_m=8,
    ),
    "dilation, decode": update(dilation=2, state_len=9),
    "dilation, circular": update(
        dilation=2, cache_seqlens=True, num_rejected_tokens=False, state_len=7
    ),
    "decode": update(),
    "decode, more rejected rows than inputs": update(
        arrays={"num_rejected_tokens": slots(4, 5, 6, 0, 9)}
    ),
    "decode, long state": update(state_len=300, channels=40),
    "decode, skipped rows": update(
        arrays={"conv_state_indices": slots(-1, 3, 8, 0, 2**31 - 1)}
    ),
    "decode, several blocks of channels": update(
        width=33, state_len=35, channels=65, num_rows=2, num_queries=1
    ),
    "circular": update(cache_seqlens=True, num_rejected_tokens=False),
    "circular, window and inputs overlap": update(
        cache_seqlens=True, num_rejected_tokens=False, num_queries=5
    ),
    "circular, more inputs than rows": update(
        cache_seqlens=True, num_rejected_tokens=False, num_queries=16
    ),
    "circular, L = W-1": update(
        cache_seqlens=True, num_rejected_tokens=False, state_len=3
    ),
    "forks and snapshots": packed(
        [1, 7, 0, 9, 4], num_slots=12, write_indices=True, snapshots=True
    ).replace(
        cache_indices=slots(3, 3, 1, 0, 2),
        write_indices=slots(4, 5, 3, 0, 6),
        snapshot_indices=slots(7, -1, 0, 8, 2),
        snapshot_ends=slots(0, 3, 1, 9, 1),
        num_rejected_tokens=slots(2, 0, 0, 1, 3),
    ),
    "decode, forks": update(write_indices=True),
    "circular, forks": update(
        cache_seqlens=True, num_rejected_tokens=False, write_indices=True
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_order_of_programs_does_not_matter(name):
    case = CASES[name]
    expected, first = fuzz.Expected(case), None
    for order, programs in ORDERS.items():
        got = guard.call_now(case, guard.caller(programs))
        fuzz.compare(case, got, expected, order)
        first = first or got
        for one, other in zip(first, got, strict=True):
            checks.assert_same_bits(other, one, f"{order}: {case}")


# Dense and backward passes: seeds of `guard.inner_case` that differ in kind and shape.
INNER = [seed * guard.CASES_PER_CONFIGURATION for seed in range(12)]


@pytest.mark.parametrize("seed", INNER)
def test_order_of_programs_does_not_matter_to_inner_ops(seed):
    case, first = guard.inner_case(seed), None
    for order, programs in ORDERS.items():
        got = case.launch(guard.caller(programs))
        first = first or got
        for one, other in zip(first, got, strict=True):
            checks.assert_same_bits(other, one, f"{order}: {case}")


def test_inner_ops_include_every_kind():
    kinds = {guard.inner_case(seed).op for seed in INNER}
    assert kinds == {ops.DENSE, ops.PACKED_BACKWARD, ops.ROWS_BACKWARD}


@pytest.mark.parametrize("seed", INNER)
def test_no_interleaving_of_threads_matters_to_inner_ops(seed):
    case = guard.inner_case(seed)
    recorder = Recorder()
    case.launch(recorder.caller())
    assert any(access.is_store for access in recorder.accesses)
    hazard = race(recorder.accesses)
    assert hazard is None, f"{hazard}\n{case}"


@pytest.mark.parametrize("name", CASES)
def test_no_interleaving_of_threads_matters(name):
    recorder = Recorder()
    guard.call_now(CASES[name], recorder.caller())
    assert any(access.is_store for access in recorder.accesses)
    hazard = race(recorder.accesses)
    assert hazard is None, f"{hazard}\n{CASES[name]}"


def access(program, is_store, addresses, barriers=0):
    return Access(program, is_store, np.array(addresses), barriers)


@pytest.mark.parametrize(
    "what, accesses",
    [
        ("both write", [access(0, True, [1, 2]), access(1, True, [2])]),
        ("twice without", [access(0, True, [1, 1])]),
        ("twice without", [access(0, True, [1]), access(0, True, [1])]),
        ("which program 1 writes", [access(0, False, [1]), access(1, True, [1])]),
        ("which program 0 writes", [access(0, True, [1]), access(1, False, [1])]),
        ("after its write", [access(0, True, [1]), access(0, False, [1], 1)]),
        ("no barrier", [access(0, False, [1]), access(0, True, [1])]),
    ],
)
def test_recorded_hazards_are_recognised(what, accesses):
    assert what in race(accesses)


def test_accesses_without_hazard_are_recognised():
    harmless = [
        access(0, False, [1, 9]),
        access(0, True, [1], 1),
        access(1, False, [9]),
    ]
    assert race(harmless) is None


@pytest.mark.parametrize(
    "case",
    [
        packed([9, 6, 1, 5]).replace(cache_indices=slots(3, 1, 3, 0)),
        update(arrays={"conv_state_indices": slots(3, 1, 3, 0, 2)}),
        update(
            cache_seqlens=True,
            num_rejected_tokens=False,
            arrays={"conv_state_indices": slots(3, 1, 3, 0, 2)},
        ),
    ],
    ids=["packed", "decode", "circular"],
)
def test_two_live_sequences_on_one_slot_disturb_nobody_else(case):
    """The one unspecified case: the rows of sequences 0 and 2, and slot 3."""
    expected = fuzz.Expected(case)
    assert np.flatnonzero(~expected.slots).tolist() == [3]
    assert expected.rows.any() and not expected.rows.all()
    for order, programs in ORDERS.items():
        got = guard.call_now(case, guard.caller(programs))
        fuzz.compare(case, got, expected, order)
    fuzz.compare(case, checks.call(case, "xla"), expected, "xla")
