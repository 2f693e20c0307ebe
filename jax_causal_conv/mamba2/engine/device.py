"""The compiled step, and what stays on the device from one to the next."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..model import Mamba2LM
from ..sampling import sample
from .batches import Batch, Features, pack
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
    """A model's parameters and caches, and the compiled functions that use them.

    Attributes:
        state: the caches and the newest tokens.
        executables: the steps that were compiled.
    """

    def __init__(
        self,
        model: Mamba2LM,
        num_slots: int,
        features: Features,
        cache_dtype: Any,
        ssm_dtype: Any,
    ):
        """Allocates the caches; compiles nothing yet."""
        # The parameters are a flat list because every step flattens its arguments: that
        # takes 60 us for an nnx.State of 38 arrays, and 2 us for a list.
        graph, params = nnx.split(model)
        self._params, params_tree = jax.tree.flatten(params)
        self._features = features
        self._jitted = jax.jit(
            functools.partial(_model_step, graph, params_tree),
            static_argnames="max_prefills",
            donate_argnames="state",
        )
        self._load = jax.jit(_load, donate_argnames="state")
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
                pack([], bucket, self._features),
                max_prefills=bucket.prefills,
            ).compile()
        return self.executables[bucket]

    def step(self, executable: jax.stages.Compiled, batch: Batch) -> jax.Array:
        """Hands a step to the device, and does not wait for it.

        The caches are donated: if this is interrupted, they are lost.

        Returns:
            `(M,)`, what will have been drawn.
        """
        with jax.disable_jit(False):  # nothing compiled can run without it
            tokens, self.state = executable(self._params, self.state, batch)
        tokens.copy_to_host_async()
        return tokens

    def save(self, slot: int) -> DeviceState:
        """What is in a slot, on the host."""
        return jax.device_get(_save(self.state, np.int32(slot)))

    def load(self, slot: int, saved: DeviceState) -> None:
        """Puts it into a slot again. The caches are donated, as in `step`."""
        self.state = self._load(self.state, np.int32(slot), saved)

    def reset(self) -> None:
        """New caches instead of those that were lost."""
        self.state = self._state_types  # The old caches make room for the new ones.
        self.state = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), self._state_types
        )


@jax.jit
def _save(state: DeviceState, slot: jax.Array) -> DeviceState:
    return jax.tree.map(lambda a: a[slot], state)


def _load(state: DeviceState, slot: jax.Array, saved: DeviceState) -> DeviceState:
    return jax.tree.map(lambda a, row: a.at[slot].set(row), state, saved)


def _model_step(
    graph, params_tree, params, state: DeviceState, batch: Any, *, max_prefills: int
) -> tuple[jax.Array, DeviceState]:
    """The jitted part: completes the tokens, runs the model, draws the next ones."""
    model = nnx.merge(graph, params_tree.unflatten(params))
    slots, draws = batch.states["cache_indices"], batch.draws
    outside = batch.tokens.shape[0]
    first = jnp.where(batch.decodes, batch.query_start_loc[:-1], outside)
    tokens = batch.tokens.at[first].set(state.newest[slots], mode="drop")
    logits, cache = model.packed(
        tokens,
        state.cache,
        batch.query_start_loc,
        **batch.states,
        **({} if draws.after is None else {"logits_at": draws.after}),
        metadata=batch.metadata,
        max_prefills=max_prefills,
    )
    drawn = sample(
        logits,
        draws.seeds,
        draws.positions,
        draws.temperature,
        draws.top_k,
        draws.top_p,
    )
    outside = state.newest.shape[0]
    newest_of = jnp.where(draws.slots >= 0, draws.slots, outside)
    newest = state.newest.at[newest_of].set(drawn, mode="drop")
    return drawn, DeviceState(cache, newest)
