"""float32 states are exact to 1e-6, whatever the inputs' dtype and however they decay.

Compared with the recurrence in float64, for sequences of several hundred tokens.

Triton's interpreter multiplies matrices in NumPy's float32: it shows what the kernels
leave out of an operand when they take it apart, and the order of their sums, but not
how tensor cores round. That shows on a GPU alone, where the same tests run compiled, as
"triton".
"""

import functools

import numpy as np
import pytest

from tests.support import checks, ssd_cases
from tests.support.platforms import HAS_GPU
from tests.support.ssd_cases import BFLOAT16, FLOAT16, FLOAT32, batch, draw_rows

pytest.importorskip("triton")

KERNELS = "triton" if HAS_GPU else "interpret"
STATE_ERROR = 1e-6  # over the largest element of a head's state
DECAYS = (0.0, -1e-6, -1.0, -20.0, -1e3, -1e5)  # dt·A, a head each
SIZES = {"heads": len(DECAYS), "groups": 1, "dim": 8, "size": 16, "d": None}
NARROW = {"bfloat16": BFLOAT16, "float16": FLOAT16, "float32": FLOAT32}
STEPS = (0.5, 1.0, 2.0)


def with_decays(case, spread=True):
    """Steps of about 1, so that `DECAYS` are what heads forget a token."""
    rng, dt = np.random.default_rng(0), case.arrays["dt"]
    steps = rng.choice(STEPS, dt.shape) if spread else np.ones(dt.shape)
    return case.replace(A=np.float32(DECAYS), dt=steps.astype(dt.dtype))


@functools.cache
def mixed_batch(dtype, **changes):
    kinds = dict.fromkeys(("x", "B", "C"), NARROW[dtype])
    return with_decays(batch([300, 1, 170, 1, 64], **kinds, **SIZES, **changes))


@functools.cache
def rows(dtype, **changes):
    kinds = dict.fromkeys(("x", "B", "C"), NARROW[dtype])
    sizes = {"num_rows": 1, "num_tokens": 400, "segment_ids": False}
    return with_decays(draw_rows(0, **sizes, **kinds, **SIZES, **changes))


CASES = {"packed": mixed_batch, "rows": rows}


def errors(case, implementation):
    """Of y and the states, over the largest of a head; y beyond its one rounding."""
    exact = ssd_cases.Expected(case)
    y, states = ssd_cases.call(case, implementation)
    past = abs(y.astype(np.float64) - exact.y)
    past = np.maximum(past - checks.unit_in_last_place(exact.y, y.dtype) / 2, 0)
    off = abs(states.astype(np.float64) - exact.states)
    heads = (*range(exact.y.ndim - 2), -1)
    largest = abs(exact.y).max(heads), abs(exact.states).max((2, 3))
    return past.max(heads) / largest[0], (off.max((2, 3)) / largest[1]).max(0)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("implementation", ["xla", KERNELS])
def test_states_are_exact_and_outputs_rounded_once(implementation, kind, dtype):
    of_y, of_states = errors(CASES[kind](dtype), implementation)
    print(of_y, of_states)
    assert (of_states <= STATE_ERROR).all(), dict(zip(DECAYS, of_states, strict=True))
    assert (of_y <= STATE_ERROR).all(), dict(zip(DECAYS, of_y, strict=True))
