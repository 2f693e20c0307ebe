"""Activations by name, and what a cotangent becomes on its way back through each."""

import jax


def _identity(z):
    return z


def _through_identity(dy, z):
    del z
    return dy


def _through_silu(dy, z):
    sigmoid = jax.nn.sigmoid(z)
    return dy * sigmoid * (1 + z * (1 - sigmoid))


ACTIVATIONS = {None: _identity, "silu": jax.nn.silu}
PULLBACKS = {None: _through_identity, "silu": _through_silu}
"""`PULLBACKS[name](dy, z)` is `dy · activation'(z)`."""
