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

from tests.support import checks, ssd_cases, ssd_launches
from tests.support.platforms import HAS_GPU
from tests.support.ssd_cases import BFLOAT16, FLOAT16, FLOAT32, batch, draw_rows

pytest.importorskip("triton")

from jax_causal_conv.kernels import interpreter

pytestmark = pytest.mark.usefixtures("quick_compilation")

if HAS_GPU:
    from jax_causal_conv.kernels import bridge

KERNELS = "triton" if HAS_GPU else "interpret"
CALL = (
    functools.partial(bridge.call, compute_capability=90)
    if HAS_GPU
    else interpreter.call
)
# Over the largest element of a head's state. Tensor cores cut off what a float32 sum
# has no room for, always towards zero; so a chunk is summed up from zero, and not in
# the state, which would lose a little with each.
STATE_ERROR = 1e-6
# The same of outputs, beyond their one rounding. What is rounded to bfloat16 may be the
# product of operands of 16 bits: a 200th of that rounding, at most.
OUTPUT_ERROR = {"float32": 1e-6, "float16": 1e-6, "bfloat16": 1e-5}
ROUNDING_ERROR = 1e-2  # of everything where products may round
DECAYS = (0.0, -1e-6, -1.0, -20.0, -1e3, -1e5)  # dt·A, a head each
SIZES = {"heads": len(DECAYS), "groups": 1, "dim": 4, "size": 8, "d": None}
NARROW = {"bfloat16": BFLOAT16, "float16": FLOAT16, "float32": FLOAT32}
STEPS = (0.5, 1.0, 2.0)


def with_decays(case, steps=STEPS):
    """Steps of about 1, so that `DECAYS` are what heads forget a token."""
    rng, dt = np.random.default_rng(0), case.arrays["dt"]
    steps = rng.choice(steps, dt.shape).astype(dt.dtype)
    return case.replace(A=np.float32(DECAYS), dt=steps)


@functools.cache
def mixed_batch(dtype, **changes):
    kinds = dict.fromkeys(("x", "B", "C"), NARROW[dtype])
    return with_decays(batch([300, 1, 170, 1], **kinds, **SIZES, **changes))


@functools.cache
def rows(dtype, **changes):
    kinds = dict.fromkeys(("x", "B", "C"), NARROW[dtype])
    sizes = {"num_rows": 1, "num_tokens": 400, "segment_ids": False}
    return with_decays(draw_rows(0, **sizes, **kinds, **SIZES, **changes))


CASES = {"packed": mixed_batch, "rows": rows}


def errors(case, result):
    """Of y and the states, over the largest of a head; y beyond its one rounding."""
    exact = ssd_cases.Expected(case)
    y, states = result
    past = abs(y.astype(np.float64) - exact.y)
    past = np.maximum(past - checks.unit_in_last_place(exact.y, y.dtype) / 2, 0)
    off = abs(states.astype(np.float64) - exact.states)
    heads = (*range(exact.y.ndim - 2), -1)
    largest = abs(exact.y).max(heads), abs(exact.states).max((2, 3))
    return past.max(heads) / largest[0], (off.max((2, 3)) / largest[1]).max(0)


def assert_exact(case, result, dtype):
    of_y, of_states = errors(case, result)
    report = f"decays {DECAYS}: y {of_y}, states {of_states}"
    assert (of_states <= STATE_ERROR).all(), report
    assert (of_y <= OUTPUT_ERROR[dtype]).all(), report


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("implementation", ["xla", KERNELS])
def test_states_are_exact_and_outputs_rounded_once(implementation, kind, dtype):
    case = CASES[kind](dtype)
    result = ssd_cases.call(case, implementation)
    assert_exact(case, result, dtype)
    for one, other in zip(result, ssd_cases.call(case, implementation), strict=True):
        checks.assert_same_bits(one, other, "a second run")


@pytest.mark.parametrize("kind", CASES)
def test_stretches_are_as_exact(kind):
    case = CASES[kind]("bfloat16")
    result = ssd_launches.launch(case, CALL, chunk=64, stretch=2)
    assert_exact(case, result, "bfloat16")


@pytest.mark.parametrize("implementation", ["xla", KERNELS])
def test_states_that_only_decay_stay_exact(implementation):
    """Nothing is added to them, so that nothing hides what they have lost.

    XLA, and the step of a single token, round dt·A to float32 before its exponential:
    of `exp(-20)` that costs 20 such roundings.
    """
    case = with_decays(batch([40, 1, 1, 1], seed=3, **SIZES), (0.7, 1.1))
    case = case.replace(x=np.zeros_like(case.arrays["x"]))
    exact = ssd_cases.Expected(case)
    _, states = ssd_cases.call(case, implementation)
    offsets = case.arrays["query_start_loc"]
    for number, slot in enumerate(case.arrays["cache_indices"]):
        begin, end = offsets[number : number + 2]
        total = case.arrays["dt"][begin:end].sum(0) * np.float64(DECAYS)
        for head, want in enumerate(exact.states[slot]):
            relative = STATE_ERROR
            if implementation == "xla" or end - begin == 1:
                relative += abs(total[head]) * np.finfo(np.float32).eps
            error, largest = abs(states[slot, head] - want).max(), abs(want).max()
            assert error <= relative * largest + 1e-37, (
                f"sequence {number}, decay {DECAYS[head]}: {error} of {largest}"
            )


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("kind", CASES)
def test_default_precision_rounds_products_and_no_more(kind, dtype):
    case = CASES[kind](dtype, precision="default")
    result = ssd_cases.call(case, KERNELS)
    for error in errors(case, result):
        assert (error <= ROUNDING_ERROR).all(), error
    if dtype == "bfloat16" or HAS_GPU:  # the interpreter does not round to TF32
        _, of_states = errors(case, result)
        assert of_states.max() > 10 * STATE_ERROR, "nothing was rounded"
