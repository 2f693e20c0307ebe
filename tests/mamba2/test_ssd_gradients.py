"""Gradients of the SSD in heads that forget slowly, fast, and at once.

They are compared with those of the recurrence in float64: that of a whole head (A,
dt_bias, D) relative to its value, and an entry of the others relative to the sizes of
the terms that add up to it. Float32 itself takes 4e-6: the last bit of dt·A counts in
the exponential where a head forgets fast.
"""

import functools

import jax
import numpy as np
import pytest

from jax_causal_conv.mamba2.ssd import ssd, ssd_packed
from tests.support import checks, quick
from tests.support import ssd_reference as reference
from tests.support.platforms import HAS_TRITON

RATES = (1e-3, 0.1, 1, 5, 20, 100, 1e4, 1e8)
"""-A of heads whose steps are about 1. From 1e4 on nothing is left of a state."""

MIXED = -1e4
"""A of two heads more, whose steps differ so that dt·|A| is between 1e-3 and 100."""

HEADS, DIM, GROUPS, SIZE = len(RATES) + 2, 3, 5, 4
WHOLE_HEAD = ("A", "D", "dt_bias")
TOKENS = ("x", "dt", "B", "C")
TOLERANCE = 2e-5


def draw(seed, *lead, states):
    """Arguments and cotangents that are positive in the mean.

    So the gradient of a whole head is not a small difference of large terms, which
    rounding of the arguments alone could spoil.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return (1 + rng.standard_normal(shape)).astype(np.float32)

    step = rng.uniform(0.5, 1.5, (*lead, HEADS))
    step[..., -2:] = 10 ** rng.uniform(-3, 2, (*lead, 2)) / -MIXED
    arrays = {
        "x": normal(*lead, HEADS, DIM),
        "dt": np.log(np.expm1(step)).astype(np.float32),
        "A": np.array([*-np.array(RATES), MIXED, MIXED], np.float32),
        "B": normal(*lead, GROUPS, SIZE),
        "C": normal(*lead, GROUPS, SIZE),
        "D": normal(HEADS),
        "dt_bias": normal(HEADS) / 100,
        "state": normal(states, HEADS, DIM, SIZE),
    }
    return arrays, (normal(*lead, HEADS, DIM), normal(states, HEADS, DIM, SIZE))


def expected(arrays, cotangents, requests, sizes=False):
    """The gradients in float64.

    Each request is an index of its tokens, and one each of the state that enters it
    and of the one that leaves it; None where it is zeros, or not returned.
    """
    dy, dstate = cotangents
    total = {name: np.zeros(array.shape) for name, array in arrays.items()}
    none = np.zeros((HEADS, DIM, SIZE))
    for tokens, enters, leaves in requests:
        own = {n: a[tokens] if n in TOKENS else a for n, a in arrays.items()}
        own["state"] = none if enters is None else arrays["state"][enters]
        left = none if leaves is None else dstate[leaves]
        grads = reference.gradients(**own, dy=dy[tokens], dstate=left, sizes=sizes)
        for name, grad in grads.items():
            if name in TOKENS:
                total[name][tokens] = grad
            elif name != "state":
                total[name] += grad
            elif enters is not None:
                total[name][enters] = grad
    return total


def check(op, state, arrays, cotangents, requests):
    """Checks an op, whose states are its argument of the name `state`."""

    @quick.jit
    def pull(arrays, cotangents):
        def outputs(arrays):
            floats = {state if n == "state" else n: a for n, a in arrays.items()}
            return op(**floats, dt_softplus=True)

        return jax.vjp(outputs, arrays)[1](cotangents)[0]

    got = checks.to_host(pull(arrays, cotangents))
    want = expected(arrays, cotangents, requests)
    size = expected(arrays, cotangents, requests, sizes=True)
    for name in want:
        allowed = abs(want[name]) if name in WHOLE_HEAD else size[name]
        error = abs(got[name].astype(np.float64) - want[name])
        fine = error <= TOLERANCE * allowed + checks.UNDERFLOW
        worst = np.unravel_index(
            np.argmax(error / (allowed + checks.UNDERFLOW)), error.shape
        )
        assert fine.all(), (
            f"{name}: {(~fine).sum()} of {fine.size} are wrong; at {worst} got "
            f"{got[name][worst]!r}, expected {want[name][worst]!r}"
        )


@pytest.mark.parametrize(
    ("tokens", "chunk_size", "implementation"),
    [
        (256, 16, None),
        (256, 64, "xla"),
        (256, 256, None),
        (200, 64, None),
        (75, 16, "interpret"),
    ],
)
def test_heads_of_every_rate(tokens, chunk_size, implementation):
    if implementation == "interpret" and not HAS_TRITON:
        pytest.skip("the interpreter is part of Triton, which is not installed")
    arrays, cotangents = draw(tokens, 1, tokens, states=1)
    op = functools.partial(
        ssd,
        chunk_size=chunk_size,
        return_final_state=True,
        implementation=implementation,
    )
    requests = [((0, slice(0, tokens)), 0, 0)]
    check(op, "initial_state", arrays, cotangents, requests)


def test_documents_in_rows():
    arrays, cotangents = draw(0, 2, 100, states=2)
    ids = np.repeat([[3, 5, -1, 5], [-1, 0, 1, 2]], [30, 50, 7, 13], axis=1)
    op = functools.partial(ssd, segment_ids=ids, chunk_size=32, return_final_state=True)
    requests = [
        ((0, slice(0, 30)), 0, None),
        ((0, slice(30, 80)), None, None),
        ((0, slice(87, 100)), None, 0),
        ((1, slice(30, 80)), None, None),
        ((1, slice(80, 87)), None, None),
        ((1, slice(87, 100)), None, 1),
    ]
    check(op, "initial_state", arrays, cotangents, requests)


def test_packed_requests():
    arrays, cotangents = draw(1, 120, states=3)
    op = functools.partial(
        ssd_packed,
        query_start_loc=np.array([0, 50, 51, 120], np.int32),
        cache_indices=np.array([2, 0, 1], np.int32),
        has_initial_state=np.array([True, True, False]),
        chunk_size=16,
    )
    requests = [
        ((slice(0, 50),), 2, 2),
        ((slice(50, 51),), 0, 0),
        ((slice(51, 120),), None, 1),
    ]
    check(op, "ssm_states", arrays, cotangents, requests)


def test_second_order_and_forward_mode():
    """The derivative of the gradient along a direction, in float64."""
    with jax.enable_x64(True):
        arrays, cotangents = draw(2, 1, 12, states=1)
        floats = {n: a.astype(float) for n, a in arrays.items() if n != "state"}
        floats["A"] = floats["A"].clip(-20, None)

        def gradient(floats):
            def loss(floats):
                y = ssd(**floats, dt_softplus=True, chunk_size=5, implementation="xla")
                return (y * cotangents[0]).sum()

            return jax.grad(loss)(floats)

        pushed = quick.jit(lambda f, way: jax.jvp(gradient, (f,), (way,))[1])
        compiled = quick.jit(gradient)
        for name in ("A", "dt", "B"):
            way = jax.tree.map(np.zeros_like, floats)
            way[name] = np.cos(np.arange(floats[name].size)).reshape(way[name].shape)
            ahead, behind = (
                compiled(jax.tree.map(lambda f, w, s=step: f + s * w, floats, way))
                for step in (1e-5, -1e-5)
            )
            for of, got in checks.to_host(pushed(floats, way)).items():
                want = (np.asarray(ahead[of]) - np.asarray(behind[of])) / 2e-5
                scale = abs(want).max() + 1e-3
                assert abs(got - want).max() < 1e-6 * scale, f"{name}, then {of}"
