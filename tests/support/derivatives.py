"""Derivatives of a function in float64 against its own finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.support import quick

STEP = 1e-5
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def normal(rng, tree):
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), tree)


def dot(a, b):
    products = jax.tree.map(lambda x, y: (x * y).sum(), a, b)
    return sum(jax.tree.leaves(products))


def slope(function, at, direction):
    """The central difference of a function along a direction."""

    def moved(step):
        return function(jax.tree.map(lambda x, d: x + step * d, at, direction))

    return (moved(STEP) - moved(-STEP)) / (2 * STEP)


def pushed(function, at, direction):
    return jax.jvp(function, (at,), (direction,))[1]


def pulled(function, at, direction):
    return dot(jax.grad(function)(at), direction)


def check_derivatives(function, at, order=2, seed=0):
    """Forward and reverse mode, and each over each, along random directions.

    All is one program: `jax.test_util.check_grads` compiles every step of its own.

    Args:
        function: from a tree of float64 arrays to another.
        at: such a tree.
        order: 1 for gradients in reverse mode alone, as the kernels have them.
        seed: of the directions, and of the weights that make one number of the results.
    """
    rng = np.random.default_rng(seed)
    weights = normal(rng, jax.eval_shape(function, at))
    u, v = normal(rng, at), normal(rng, at)

    def loss(at):
        return dot(function(at), weights)

    modes = {"reverse": pulled} | ({"forward": pushed} if order == 2 else {})

    @quick.jit
    def measure(at):
        want = {1: slope(loss, at, u)}
        got = {1: {name: mode(loss, at, u) for name, mode in modes.items()}}
        if order == 2:
            want[2] = slope(lambda at: pulled(loss, at, v), at, u)
            got[2] = {}
            for inner, mode in modes.items():
                first = functools.partial(mode, loss, direction=v)
                for outer, second in modes.items():
                    got[2][f"{outer} over {inner}"] = second(first, at, u)
        return want, got

    want, got = measure(at)
    for number, derivatives in got.items():
        for mode, value in derivatives.items():
            np.testing.assert_allclose(value, want[number], **CLOSE, err_msg=mode)
