"""Messages blame the argument that is wrong, and say what it got and expected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

nnx = pytest.importorskip("flax.nnx")

from jax_causal_conv import causal_conv1d, causal_conv1d_fn, causal_conv1d_update
from jax_causal_conv.mamba2 import Mamba2Config, Mamba2LM
from jax_causal_conv.nnx import CausalConv1d, Mamba2Mixer

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


def conv_of(weight):
    return causal_conv1d(ones(1, 5, D), weight)


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
    "forward mode": (
        lambda: jax.jvp(
            lambda w: causal_conv1d(ones(1, 5, D), w), (WEIGHT,), (WEIGHT,)
        ),
        TypeError,
        ["forward mode", 'implementation="xla"', "forward-mode"],
    ),
    "a derivative of a derivative": (
        lambda: jax.hessian(lambda weight: conv_of(weight).sum())(WEIGHT),
        NotImplementedError,
        ["higher order", 'implementation="xla"'],
    ),
}


@pytest.mark.parametrize(("call", "error", "says"), CASES.values(), ids=CASES)
def test_the_message_names_what_is_wrong(call, error, says):
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert all(part in message for part in says), message
