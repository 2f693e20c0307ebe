"""The compiled step, and what stays on the device from one to the next."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..model import Mamba2LM
from ..sampling import most_likely, sample
from .batches import Batch, Features, pack
from .buckets import Bucket
from .placement import Placement


class DeviceState(NamedTuple):
    """What stays on the device from step to step.

    Attributes:
        cache: of the model, S slots; along a data axis those of all devices.
        newest: `(S,)` int32, the token that each slot's request drew last; with drafts
            the one after its last guess, which nobody reads.
    """

    cache: Any
    newest: jax.Array


class Kind(NamedTuple):
    """What of a step is fixed when it is compiled.

    Attributes:
        bucket: its shape.
        greedy: whether nothing is left to chance, so that it has no sampler.
    """

    bucket: Bucket
    greedy: bool


class Device:
    """A model's parameters and caches, and the compiled functions that use them.

    Attributes:
        placement: the mesh that all this is on, if any.
        state: the caches and the newest tokens.
        executables: the steps that were compiled.
        has_greedy_steps: whether decode steps without a sampler are compiled apart. A
            CPU does not need them: there `sample` leaves out what no row asks for.
    """

    def __init__(
        self,
        model: Mamba2LM,
        num_slots: int,
        features: Features,
        cache_dtype: Any,
        ssm_dtype: Any,
        mesh: Any,
        data_axis: str | None,
    ):
        """Allocates the caches; compiles nothing yet."""
        # The parameters are a flat list because every step flattens its arguments: that
        # takes 60 us for an nnx.State of 38 arrays, and 2 us for a list.
        graph, params = nnx.split(model)
        leaves, params_tree = jax.tree.flatten(params)
        self.placement = placement = Placement.of(
            leaves, getattr(model, "implementation", None), mesh, data_axis
        )
        self._params = placement.params(leaves)
        self._features = features
        self.executables: dict[Kind, jax.stages.Compiled] = {}
        self.state = DeviceState(
            model.init_cache(
                num_slots,
                dtype=cache_dtype,
                ssm_dtype=ssm_dtype,
                **({"max_drafts": most} if (most := features.max_drafts) else {}),
            ),
            jnp.zeros(num_slots, jnp.int32),
        )
        self._state_types = placement.states(self.state)
        as_before = None
        if placement.mesh is not None:
            as_before = jax.tree.map(lambda a: a.sharding, self._state_types)
            self.reset()
        (platform,) = {device.platform for device in self.state.newest.devices()}
        self.has_greedy_steps = platform != "cpu"

        def step(params, state, words, *, kind):
            like = pack([], kind.bucket, features)

            def on_one(params, state, words):
                batch = placement.read(words, like)
                return _model_step(graph, params_tree, params, state, batch, kind)

            on_each = placement.on_each(on_one, False, True, True, out=(True, True))
            return on_each(params, state, words)

        self._jitted = jax.jit(
            step,
            static_argnames="kind",
            donate_argnames="state",
            out_shardings=(placement.sharding(data_axis), as_before),
        )
        self._save = jax.jit(
            placement.on_each(self._saved, True, False, False, out=False),
            out_shardings=placement.sharding(),
        )
        self._load = jax.jit(
            placement.on_each(self._loaded, True, False, False, False, out=True),
            donate_argnums=0,
            out_shardings=as_before,
        )
        self._share = jax.jit(lambda a: a, out_shardings=placement.sharding())

    def executable(self, bucket: Bucket, greedy: bool) -> jax.stages.Compiled:
        """The step of that shape, compiled on its first use.

        Args:
            bucket: its shape.
            greedy: whether no row of the batch leaves anything to chance.
        """
        apart = self.has_greedy_steps and not bucket.prefills
        kind = Kind(bucket, greedy and apart)
        if kind not in self.executables:
            batches = [pack([], bucket, self._features)] * self.placement.shares
            batch = self.placement.batch(batches)
            with self.placement.context():
                lowered = self._jitted.lower(self._params, self.state, batch, kind=kind)
                self.executables[kind] = lowered.compile()
        return self.executables[kind]

    def step(
        self, executable: jax.stages.Compiled, batches: Sequence[Batch]
    ) -> jax.Array:
        """Hands a step to the device, and does not wait for it.

        The caches are donated: if this is interrupted, they are lost.

        Args:
            executable: for the batches' bucket.
            batches: one for each share of the slots.

        Returns:
            `(shares * M,)`, what will have been drawn.
        """
        batch = self.placement.batch(batches)
        with jax.disable_jit(False):  # nothing compiled can run without it
            tokens, self.state = executable(self._params, self.state, batch)
            if not (tokens.is_fully_addressable or tokens.is_fully_replicated):
                tokens = self._share(tokens)
        tokens.copy_to_host_async()
        return tokens

    def save(self, share: int, slot: int) -> DeviceState:
        """What is in a slot, on the host."""
        with self.placement.context():
            saved = self._save(self.state, np.int32(share), np.int32(slot))
        return jax.tree.map(np.asarray, saved)

    def load(self, share: int, slot: int, saved: DeviceState) -> None:
        """Puts it into a slot again. The caches are donated, as in `step`."""
        saved = jax.tree.map(self.placement.put, saved)
        with self.placement.context():
            self.state = self._load(self.state, np.int32(share), np.int32(slot), saved)

    def reset(self) -> None:
        """New caches instead of those that were lost."""
        self.state = self._state_types  # The old caches make room for the new ones.
        self.state = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), self._state_types
        )

    def _saved(self, state: DeviceState, share: Any, slot: Any) -> DeviceState:
        """The jitted part of `save`; along a data axis all get what one device has."""
        rows = jax.tree.map(lambda a: a[slot], state)
        if (axis := self.placement.axis) is None:
            return rows
        here = jax.lax.axis_index(axis) == share

        def shared(row):  # To add -0 changes no number, not even the other zero.
            return jax.lax.psum(jnp.where(here, row, -jnp.zeros_like(row)), axis)

        return jax.tree.map(shared, rows)

    def _loaded(
        self, state: DeviceState, share: Any, slot: Any, saved: DeviceState
    ) -> DeviceState:
        """The jitted part of `load`."""
        if (axis := self.placement.axis) is not None:
            here = jax.lax.axis_index(axis) == share
            slot = jnp.where(here, slot, state.newest.shape[0])
        return jax.tree.map(
            lambda a, row: a.at[slot].set(row, mode="drop"), state, saved
        )


def _model_step(
    graph, params_tree, params, state: DeviceState, batch: Any, kind: Kind
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
        max_prefills=kind.bucket.prefills,
    )
    if kind.greedy:
        drawn = most_likely(logits)
    else:
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
