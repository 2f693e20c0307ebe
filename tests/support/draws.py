"""Random cases of one shape or a changed one, and what tests say about integers."""

import dataclasses
import itertools

import numpy as np

from tests.support import cases
from tests.support.cases import INT_MAX, INT_MIN, DenseShape, PackedShape, UpdateShape

i32 = np.int32
POISON = [np.nan, np.inf, -np.inf]
WIDE = 2**32 + 1  # 1, if it were truncated to 32 bits
PACKED_SHAPE = PackedShape(
    num_tokens=24, num_seqs=4, num_slots=6, channels=16, width=4, state_len=5
)
UPDATE_SHAPE = UpdateShape(
    num_rows=4, num_queries=2, num_slots=6, channels=16, width=4, state_len=5
)
RING_SHAPE = dataclasses.replace(
    UPDATE_SHAPE, cache_seqlens=True, num_rejected_tokens=False
)
DENSE_SHAPE = DenseShape(num_rows=3, num_tokens=19, channels=16, width=4, state_len=5)

# One row each; T = 12, W = 4. Runs of length 1 and < W, ids that return, padding.
SEGMENTS = {
    "one run": [7] * 12,
    "runs of length 1": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    "runs shorter than the filter": [4, 4, 1, 1, 1, 0, 0, 2, 2, 2, 9, 9],
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


def exhaustive(implementation):
    """XLA and a real GPU see all cases; a slow interpreter and None (XLA) a share."""
    return implementation in ("xla", "triton")


def draw_packed(seed=0, base=PACKED_SHAPE, *, malformed=False, arrays=None, **changes):
    shape = dataclasses.replace(base, **changes)
    case = cases.packed_case(shape, np.random.default_rng(seed), malformed=malformed)
    return case.replace(**arrays) if arrays else case


def offsets_of(lengths, head=0):
    return np.cumsum([head, *lengths], dtype=np.int32)


def ints(*values, dtype=np.int32):
    return np.array(values, dtype)


def draw_update(seed=0, base=UPDATE_SHAPE, *, malformed=False, arrays=None, **changes):
    shape = dataclasses.replace(base, **changes)
    case = cases.update_case(shape, np.random.default_rng(seed), malformed=malformed)
    return case.replace(**arrays) if arrays else case


def draw_dense(seed=0, base=DENSE_SHAPE, *, arrays=None, **changes):
    shape = dataclasses.replace(base, **changes)
    case = cases.dense_case(shape, np.random.default_rng(seed))
    return case.replace(**arrays) if arrays else case


def named_segments(seed, **changes):
    ids = np.array(list(SEGMENTS.values()), i32)
    sizes = {"num_rows": ids.shape[0], "num_tokens": ids.shape[1], "channels": 3}
    return draw_dense(seed, **sizes, **changes, arrays={"segment_ids": ids})


def poisoned(array, where, poison=None):
    """A copy with NaN, inf and -inf by turns: no channel sees what another holds."""
    array = array.copy()
    array[where] = np.resize(POISON, array.shape[-1]) if poison is None else poison
    return array


def half(*options):
    """A half of all combinations of pairs: any but one of the options are in each.

    Nothing in the ops depends on as many as all of them at once.
    """
    numbers = itertools.product(range(2), repeat=len(options))
    return [
        tuple(pair[i] for pair, i in zip(options, chosen, strict=True))
        for chosen in numbers
        if sum(chosen) % 2 == 0
    ]
