"""Messages blame the argument that is wrong, and say what it got and expected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

nnx = pytest.importorskip("flax.nnx")

from jax_causal_conv import (
    causal_conv1d,
    causal_conv1d_fn,
    causal_conv1d_update,
    ssd,
    ssd_packed,
)
from jax_causal_conv.mamba2 import Mamba2Config, Mamba2LM
from jax_causal_conv.nnx import CausalConv1d, Mamba2Mixer

pytestmark = pytest.mark.usefixtures("quick_compilation")

D, W = 6, 4
Q = np.array([0, 3, 5])
WEIGHT, STATES = jnp.ones((D, W)), jnp.zeros((2, W - 1, D))
CONV = CausalConv1d(D, W, rngs=nnx.Rngs(0))
MIXER = Mamba2Mixer(8, d_state=4, headdim=4, rngs=nnx.Rngs(0))
MODEL = Mamba2LM(
    Mamba2Config(vocab_size=9, d_model=8, n_layers=2, d_state=4, headdim=4),
    rngs=nnx.Rngs(0),
)


def ones(*shape):
    return jnp.ones(shape)


# What is called, the error, and what its message must say: argument, got, cure.
CASES = {
    "torch's layout": (
        lambda: causal_conv1d(ones(2, D, 10), WEIGHT),
        ValueError,
        ["x must have D = 6 channels", "(2, 6, 10)", "axis 1", "channels come last"],
    ),
    "vLLM's layout": (
        lambda: causal_conv1d_fn(ones(D, 5), WEIGHT, None, STATES, Q),
        ValueError,
        ["x must have D = 6 channels", "(6, 5)", "axis 0"],
    ),
    "other channels": (
        lambda: causal_conv1d_update(ones(2, 7), STATES, WEIGHT),
        ValueError,
        ["x must have D = 6 channels", "(2, 7)", "weight (D, W) = (6, 4)"],
    ),
    "a transposed filter": (
        lambda: causal_conv1d(ones(2, 9, D), WEIGHT.T),
        ValueError,
        ["weight must have shape (D, W) with D = 6", "(4, 6)", "transposed"],
    ),
    "torch's filter": (
        lambda: causal_conv1d(ones(2, 9, D), WEIGHT[:, None]),
        ValueError,
        ["weight must have shape (D, W)", "(6, 1, 4)"],
    ),
    "a tuple of states": (
        lambda: causal_conv1d_fn(ones(5, D), WEIGHT, None, (STATES, STATES), Q),
        TypeError,
        ["conv_states must be one array", "(S, L, D)", "tuple of 2"],
    ),
    "a traced activation": (
        lambda: jax.jit(causal_conv1d)(ones(1, 5, D), WEIGHT, activation=True),
        ValueError,
        ["activation must be None", "functools.partial", "static_argnames"],
    ),
    "features of a layer": (
        lambda: CONV(ones(2, 9, 5)),
        ValueError,
        ["x must have D = 6 channels", "(2, 9, 5)"],
    ),
    "packed features of a layer": (
        lambda: CONV.packed(ones(5, 7), STATES, Q),
        ValueError,
        ["x must have D = 6 channels", "(5, 7)"],
    ),
    "a mixer's rank": (
        lambda: MIXER(ones(5, 8)),
        ValueError,
        ["u must have shape (B, T, d_model)", "8", "(5, 8)", "`packed`"],
    ),
    "a mixer's features": (
        lambda: MIXER(ones(2, 5, 7)),
        ValueError,
        ["u must have shape (B, T, d_model) with d_model = 8", "(2, 5, 7)"],
    ),
    "a mixer's packed rank": (
        lambda: MIXER.packed(ones(1, 5, 8), MIXER.init_cache(2), Q),
        ValueError,
        ["u must have shape (T, d_model)", "(1, 5, 8)", "calling the mixer"],
    ),
    "a mixer's cache": (
        lambda: MIXER.packed(ones(5, 8), MODEL.init_cache(2), Q),
        TypeError,
        ["cache must be a Mamba2Cache", "tuple"],
    ),
    "drafts before a row": (
        lambda: MIXER(ones(2, 5, 8), initial_state=MIXER.init_cache(2, max_drafts=1)),
        TypeError,
        ["initial_state", "without drafts"],
    ),
    "a model's rank": (
        lambda: MODEL(jnp.zeros(5, jnp.int32)),
        ValueError,
        ["tokens must have shape (B, T)", "(5,)", "`packed`"],
    ),
    "a model's packed rank": (
        lambda: MODEL.packed(jnp.zeros((1, 5), jnp.int32), MODEL.init_cache(2), Q),
        ValueError,
        ["tokens must have shape (T,)", "(1, 5)", "calling the model"],
    ),
    "a model's tokens": (
        lambda: MODEL(ones(2, 5)),
        TypeError,
        ["tokens must be integers", "float32"],
    ),
    "a model's cache": (
        lambda: MODEL.packed(jnp.zeros(5, jnp.int32), MIXER.init_cache(2), Q),
        ValueError,
        ["cache must have one Mamba2Cache for each of 2 layers", "got one"],
    ),
    "caches of another model": (
        lambda: MODEL.packed(jnp.zeros(5, jnp.int32), MODEL.init_cache(2)[:1], Q),
        ValueError,
        ["cache", "2 layers", "got 1"],
    ),
}


@pytest.mark.parametrize(("call", "error", "says"), CASES.values(), ids=CASES)
def test_the_message_names_what_is_wrong(call, error, says):
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert all(part in message for part in says), message


SSM = jnp.zeros((2, 2, 3, 4))
# Each op as a function of its first array.
OPS = {
    "causal_conv1d": (
        lambda x, **how: causal_conv1d(x, WEIGHT, **how),
        ones(1, 5, D),
    ),
    "causal_conv1d_fn": (
        lambda x, **how: causal_conv1d_fn(x, WEIGHT, None, STATES, Q, **how),
        ones(5, D),
    ),
    "causal_conv1d_update": (
        lambda x, **how: causal_conv1d_update(x, STATES, WEIGHT, **how),
        ones(2, D),
    ),
    "ssd": (
        lambda x, **how: ssd(
            x, ones(1, 5, 2), -ones(2), ones(1, 5, 1, 4), ones(1, 5, 1, 4), **how
        ),
        ones(1, 5, 2, 3),
    ),
    "ssd_packed": (
        lambda x, **how: ssd_packed(
            x, ones(5, 2), -ones(2), ones(5, 1, 4), ones(5, 1, 4), None, SSM, Q, **how
        ),
        ones(5, 2, 3),
    ),
}
FORWARD = {
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
    "jvp in jit": lambda f, x: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(x),
    "jvp of jit": lambda f, x: jax.jvp(jax.jit(f), (x,), (x,)),
    "linearize": lambda f, x: jax.linearize(f, x)[1](x),
    "linearize in jit": lambda f, x: jax.jit(lambda x: jax.linearize(f, x)[1](x))(x),
    "jacfwd in jit": lambda f, x: jax.jit(jax.jacfwd(f))(x),
    "jvp of scan in jit": lambda f, x: FORWARD["jvp in jit"](
        lambda x: jax.lax.scan(lambda x, _: (x, f(x)), x, None, length=2)[1], x
    ),
}


def refuses(op, mode, implementation):
    call, x = OPS[op]
    with pytest.raises(TypeError) as raised:
        FORWARD[mode](lambda x: call(x, implementation=implementation), x)
    message = str(raised.value)
    parts = [f"{op}: ", "forward mode", f"got implementation={implementation!r}"]
    assert all(part in message for part in [*parts, 'need implementation="xla"'])


@pytest.mark.parametrize("mode", FORWARD)
def test_forward_mode_names_the_op_and_the_cure(mode):
    refuses("causal_conv1d", mode, None)


@pytest.mark.parametrize("implementation", [None, "interpret", "triton"], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_forward_mode_of_each_op(op, implementation):
    if implementation:
        pytest.importorskip("triton")
    refuses(op, "jvp in jit", implementation)


TWICE = {
    "forward over reverse": jax.hessian,
    "reverse over reverse in jit": lambda f: jax.jit(jax.jacrev(jax.grad(f))),
}


@pytest.mark.parametrize("implementation", [None, "interpret", "triton"], ids=str)
@pytest.mark.parametrize("mode", TWICE)
@pytest.mark.parametrize("op", OPS)
def test_second_derivatives_name_the_op_and_the_cure(op, mode, implementation):
    if implementation:
        pytest.importorskip("triton")
    call, x = OPS[op]

    def total(x):
        out = call(x, implementation=implementation)
        return jax.tree.leaves(out)[0].sum()

    with pytest.raises(NotImplementedError) as raised:
        TWICE[mode](total)(x)
    message = str(raised.value)
    parts = [f"{op}: ", "higher order", f"got implementation={implementation!r}"]
    assert all(part in message for part in [*parts, 'need implementation="xla"'])
