"""A user's script, for type checkers to read: `mypy` and `pyright` in `.ci/run`."""

# mypy: warn-unused-ignores
# pyright: reportUnnecessaryTypeIgnoreComment=true

from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_causal_conv import (
    PackedBatch,
    build_metadata,
    causal_conv1d,
    causal_conv1d_fn,
    causal_conv1d_update,
    pack_batch,
    ssd,
    validate_batch,
)
from jax_causal_conv.nnx import CausalConv1d

x, weight, bias = jnp.ones((2, 8, 6)), jnp.ones((6, 4)), np.zeros(6)

out = causal_conv1d(x, weight, bias, activation="silu")
assert_type(out, jax.Array)
out, state = causal_conv1d(x, weight, return_final_state=True, implementation="xla")
assert_type(out, jax.Array)
assert_type(state, jax.Array)
parts = causal_conv1d(x, weight, split=(2, 4))
assert_type(parts, tuple[jax.Array, ...])

batch = pack_batch([[1, 2], [3]], [0, 1], [True, False], num_tokens=4, num_rows=2)
assert_type(batch, PackedBatch)
validate_batch(**batch.arguments(), num_tokens=4, num_slots=2)
states = jnp.zeros((2, 3, 6))
_, states = causal_conv1d_fn(x[0, :4], weight, bias, states, **batch.arguments())
q = np.array([0, 3, 4])
(a, b), states = causal_conv1d_fn(
    x[0], weight, None, states, q, split=(2, 4), metadata=build_metadata(q, 8)
)
assert_type(a, jax.Array)
y, states = causal_conv1d_update(x[:, 0], states, weight, None, "silu")
assert_type(y, jax.Array)

heads = jnp.ones((2, 8, 4, 3))
B = C = jnp.ones((2, 8, 1, 5))
y = ssd(heads, jnp.ones((2, 8, 4)), -jnp.ones(4), B, C)
assert_type(y, jax.Array)
y, final = ssd(heads, jnp.ones((2, 8, 4)), -jnp.ones(4), B, C, return_final_state=True)
assert_type(final, jax.Array)

conv = CausalConv1d(6, 4, activation="silu", rngs=nnx.Rngs(0))
slots = np.array([1, 0])
packed = conv.packed(x[0], states, q, cache_indices=slots)

# What is wrong is found before anything runs.
causal_conv1d(x, weight, activation="leaky")  # type: ignore[call-overload]
causal_conv1d(x, weight, implementation="cuda")  # type: ignore[call-overload]
causal_conv1d_fn(x[0], weight, None, states, q, slots=slots)  # type: ignore[call-overload]
conv.packed(x[0], states, q, indices=slots)  # type: ignore[call-arg]
