"""Activations by name, and what a cotangent becomes on its way back through each."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# gelu is z · sigmoid(z · (A + B · z²)): what its form with tanh says, of which nothing
# is lost to 1 + tanh. From |z| = CLIP on that is z or 0.
GELU_A = math.sqrt(8 / math.pi)
GELU_B = 0.044715 * GELU_A
GELU_CLIP = 16.0


class Activation(NamedTuple):
    """An activation.

    Attributes:
        of: the activation of z.
        pull_back: `(dy, z)` to `dy · activation'(z)`.
    """

    of: Callable
    pull_back: Callable


def _through_silu(dy, z):
    sigmoid = jax.nn.sigmoid(z)
    return dy * sigmoid * (1 + z * (1 - sigmoid))


def _gelu(z):
    # Clipped, so that derivatives of XLA's own are no product of 0 and infinity.
    near = jnp.clip(z, -GELU_CLIP, GELU_CLIP)
    return z * jax.nn.sigmoid(near * (GELU_A + GELU_B * near * near))


def _through_gelu(dy, z):
    near = jnp.clip(z, -GELU_CLIP, GELU_CLIP)
    exponent = near * (GELU_A + GELU_B * near * near)
    slope = near * (GELU_A + 3 * GELU_B * near * near) * _sigmoid_slope(exponent)
    return dy * (jax.nn.sigmoid(exponent) + slope)


def _sigmoid_slope(z):
    """The derivative of sigmoid; 1 - sigmoid would lose what is left of large z."""
    e = jnp.exp(-abs(z))
    return e / ((1 + e) * (1 + e))


ACTIVATIONS = {
    None: Activation(lambda z: z, lambda dy, z: dy),
    "silu": Activation(jax.nn.silu, _through_silu),
    "gelu": Activation(_gelu, _through_gelu),
    "relu": Activation(jax.nn.relu, lambda dy, z: jnp.where(z > 0, dy, 0)),
    "sigmoid": Activation(jax.nn.sigmoid, lambda dy, z: dy * _sigmoid_slope(z)),
    "tanh": Activation(jnp.tanh, lambda dy, z: dy * (4 * _sigmoid_slope(2 * z))),
}
