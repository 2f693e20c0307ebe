"""Kernels touch nothing outside their arrays, whatever integers they are given.

`tests.support.guard` runs them on arrays that lie against forbidden pages, in a child
process. The same values go through XLA, and both must give what the contract specifies.
"""

import multiprocessing
import sys

import numpy as np
import pytest

pytest.importorskip("triton")
if not sys.platform.startswith("linux"):
    pytest.skip("the harness calls Linux's mmap", allow_module_level=True)

from jax_causal_conv import ConvMetadata
from jax_causal_conv.op.ops import PACKED_BACKWARD
from jax_causal_conv.operands import ConvSpec, PackedBackwardOperands
from tests.support import cases, checks, fuzz, guard
from tests.support.cases import INT_MAX, INT_MIN, PackedShape

SEEDS = 60  # of 15 shapes


@pytest.mark.parametrize("name", [name for name in guard.PLANTED if name != "correct"])
def test_harness_catches_a_planted_bug(name):
    outcome = guard.run_child(["--planted", name])
    assert outcome.error == "killed by SIGSEGV", str(outcome)
    assert outcome.last.split()[0] == name
    assert f"_{name}" in outcome.output  # the stack names the kernel


def test_harness_accepts_a_correct_kernel():
    outcome = guard.run_child(["--planted", "correct"])
    assert outcome.error is None, str(outcome)


def test_crash_report_says_how_to_replay_the_case():
    outcome = guard.Outcome("123 end", "killed by SIGSEGV", "")
    assert "python -m tests.support.guard --seed 123" in str(outcome)


def test_guarded_arrays_touch_a_forbidden_page():
    array = np.arange(10, dtype=np.float32)
    with guard.Arena() as arena:
        first = arena.place(array, "start", writable=True)
        last = arena.place(array, "end", writable=False)
        assert first.ctypes.data % guard.mmap.PAGESIZE == 0
        assert (last.ctypes.data + last.nbytes) % guard.mmap.PAGESIZE == 0
        np.testing.assert_array_equal(first, last)


def test_any_integers_stay_within_the_arrays():
    """Random cases full of far offsets, slots, rollbacks, positions and metadata.

    Dense and backward passes are among them.
    """
    outcome = guard.run_child(["--seed", "0", "--cases", str(SEEDS)])
    assert outcome.error is None, str(outcome)
    assert outcome.last == f"{SEEDS - 1} start"


def test_adversarial_cases_are_what_they_claim():
    """The sweep meets extreme integers of every kind, and metadata of other batches."""
    seen = dict.fromkeys(
        ["query_start_loc", "cache_indices", "num_rejected_tokens", "cache_seqlens"], 0
    )
    foreign = own = 0
    for seed in range(SEEDS):
        case, _, is_own = guard.adversarial_case(seed)
        own, foreign = own + is_own, foreign + (not is_own)
        for name in seen:
            array = case.arrays.get(name)
            if array is not None and array.dtype.itemsize >= 4 and len(array):
                extremes = {INT_MIN, INT_MAX, 2**64 - 1, 2**63 - 1, 2**31 + 3}
                seen[name] += bool(extremes & set(map(int, array)))
    assert min(seen.values()) > 0, seen
    assert foreign > 10 and own > 10


SHAPE = PackedShape(
    num_tokens=24, num_seqs=3, num_slots=5, channels=3, width=4, state_len=5, block_m=8
)


def packed_case(**arrays):
    case = cases.packed_case(SHAPE, np.random.default_rng(0))
    arrays = {
        name: np.array(value, np.int32) if isinstance(value, list) else value
        for name, value in arrays.items()
    }
    return case.replace(**arrays)


def run_chunks_of_empty_sequences():
    """Foreign metadata names sequences whose end lies before their start."""
    for last in (INT_MIN, INT_MIN + 1, -1, 0, INT_MAX):
        case = packed_case(
            query_start_loc=[0, 10, last, last],
            cache_indices=[1, 3, 0],
            has_initial_state=np.ones(3, bool),
            num_rejected_tokens=[0, 0, 0],
        )
        for chunk in (0, 1, INT_MAX, INT_MIN):
            seq, offset = np.full((2, 24 // 8 + 3 + 1), [[1], [chunk]], np.int32)
            metadata = ConvMetadata(seq, offset, 8)
            with guard.Arena() as arena:
                call = guard.guarded_caller(arena, "end")
                _, states = guard.call_now(case, call, metadata=metadata)
            fuzz.compare_unnamed_slots(case, states, f"chunk {chunk}")
            x = np.ones((24, 3), np.float32)
            history, live = np.ones((3, 3, 3), np.float32), np.ones(3, bool)
            offsets = case.arrays["query_start_loc"]
            operands = PackedBackwardOperands(
                x,
                np.ones((3, 4), np.float32),
                None,
                history,
                (x,),
                None,
                offsets,
                live,
                metadata,
            )
            guard.InnerCase(PACKED_BACKWARD, ConvSpec("silu"), operands).launch(call)


def test_chunk_of_an_empty_sequence_is_a_no_op():
    """The length was once `q[i+1] - q[i]` of a start made sane and an end that was not.

    INT_MIN minus a positive start wraps to a huge length: with foreign metadata the
    program read and wrote far away.
    """
    child = multiprocessing.get_context("spawn").Process(
        target=run_chunks_of_empty_sequences
    )
    child.start()
    child.join()
    assert child.exitcode == 0, f"exit status {child.exitcode} (negative: a signal)"


def test_xla_and_kernels_agree_where_offsets_are_extreme():
    for offsets in ([INT_MIN, INT_MAX, INT_MIN, 3], [INT_MAX, 0, 5, INT_MIN]):
        case = packed_case(query_start_loc=offsets)
        expected = fuzz.Expected(case)
        fuzz.compare(case, checks.call(case, "xla"), expected, "xla")
        got = guard.call_now(case, guard.caller())
        fuzz.compare(case, got, expected, "interpret")
