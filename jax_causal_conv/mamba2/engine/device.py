"""The compiled step, and what stays on the device from one to the next."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ..model import Mamba2LM
from ..sampling import sample
from .batches import Batch, pack
from .buckets import Bucket


class DeviceState(NamedTuple):
    """What stays on the device from step to step.

    Attributes:
        cache: of the model, S slots.
        newest: `(S,)` int32, the token that each slot's request drew last.
    """

    cache: Any
    newest: jax.Array


class Device:
    """A model's parameters and caches, and its compiled steps."""

    def __init__(self, model: Mamba2LM, num_slots: int, cache_dtype: Any, ssm_dtype):
        """Allocates the caches; compiles nothing yet."""
        # The parameters are a flat list because every step flattens its arguments: that
        # takes 60 us for an nnx.State of 38 arrays, and 2 us for a list.
        graph, params = nnx.split(model)
        self._params, params_tree = jax.tree.flatten(params)
        self._jitted = jax.jit(
            functools.partial(_model_step, graph, params_tree),
            static_argnames="max_prefills",
            donate_argnames="state",
        )
        self.executables: dict[Bucket, jax.stages.Compiled] = {}
        self.state = DeviceState(
            model.init_cache(num_slots, dtype=cache_dtype, ssm_dtype=ssm_dtype),
            jnp.zeros(num_slots, jnp.int32),
        )
        self._state_types = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding),
            self.state,
        )

    def executable(self, bucket: Bucket) -> jax.stages.Compiled:
        """The step of that shape, compiled on its first use."""
        if bucket not in self.executables:
            self.executables[bucket] = self._jitted.lower(
                self._params,
                self.state,
                pack([], bucket),
                max_prefills=bucket.prefills,
            ).compile()
        return self.executables[bucket]

    def step(self, executable: jax.stages.Compiled, batch: Batch) -> jax.Array:
        """Hands a step to the device, and does not wait for it.

        The caches are donated: if this is interrupted, they are lost.

        Returns:
            `(N,)`, what the rows will have drawn.
        """
        tokens, self.state = executable(self._params, self.state, batch)
        tokens.copy_to_host_async()
        return tokens

    def reset(self) -> None:
        """New caches instead of those that were lost."""
        self.state = self._state_types  # The old caches make room for the new ones.
        self.state = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), self._state_types
        )


def _model_step(
    graph, params_tree, params, state: DeviceState, batch: Any, *, max_prefills: int
) -> tuple[jax.Array, DeviceState]:
    """The jitted part: completes the tokens, runs the model, draws the next ones."""
    model = nnx.merge(graph, params_tree.unflatten(params))
    outside = batch.tokens.shape[0]
    first = jnp.where(batch.decodes, batch.query_start_loc[:-1], outside)
    tokens = batch.tokens.at[first].set(state.newest[batch.slots], mode="drop")
    logits, cache = model.packed(
        tokens,
        state.cache,
        batch.query_start_loc,
        cache_indices=batch.slots,
        has_initial_state=batch.has_initial_state,
        metadata=batch.metadata,
        max_prefills=max_prefills,
    )
    drawn = sample(
        logits,
        batch.seeds,
        batch.positions,
        batch.temperature,
        batch.top_k,
        batch.top_p,
    )
    outside = state.newest.shape[0]
    slots = jnp.where(batch.draws, batch.slots, outside)
    return drawn, DeviceState(cache, state.newest.at[slots].set(drawn, mode="drop"))
