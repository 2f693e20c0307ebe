"""How the mixer and the model live on a mesh of devices.

Two things are needed beside what the ops know of meshes: columns of parameters of which
several shards have a copy, and explicit axes, on which the sharding of every
intermediate would have to be said.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ..nnx_conv import CausalConv1d
from ..promotion import promoting


@dataclass(frozen=True)
class SharedColumns:
    """Columns that stand once for a group of heads, and once in each of its shards.

    A parameter's columns are blocks of equal size, one per shard. `[start, stop)` of
    a block are the shard's copy of its group's.

    Attributes:
        shards: n, how many blocks.
        groups: how many groups; it divides n, and neighbouring shards share one.
        start: where the copies begin in each block.
        stop: where they end.
    """

    shards: int
    groups: int
    start: int
    stop: int

    def equalise(self, param: Any, axis: int) -> None:
        """Overwrites all copies in an `nnx.Param` by the first of their group."""
        if param is not None:
            first = functools.partial(self._map, lambda copies: copies[:, :1])
            param[...] = first(param[...], axis)

    def sum(self, array: jax.Array, axis: int) -> jax.Array:
        """The array with each copy replaced by the sum of all of its group."""
        return self._map(lambda copies: copies.sum(1, keepdims=True), array, axis)

    def _map(self, function: Callable, array: jax.Array, axis: int) -> jax.Array:
        """Replaces copies `(groups, copies, columns, …)` by what a function makes."""
        columns = jnp.moveaxis(array, axis, 0)
        blocks = columns.reshape(self.shards, -1, *columns.shape[1:])
        before, copies, after = jnp.split(blocks, (self.start, self.stop), axis=1)
        groups = copies.reshape(self.groups, -1, *copies.shape[1:])
        groups = jnp.broadcast_to(function(groups), groups.shape)
        blocks = jnp.concatenate((before, groups.reshape(copies.shape), after), axis=1)
        return jnp.moveaxis(blocks.reshape(columns.shape), 0, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def tied(shared: SharedColumns, axis: int, array: jax.Array) -> jax.Array:
    """The array, whose copies are one parameter: each gets the sum of gradients."""
    del shared, axis
    return array


tied.defvjp(
    lambda shared, axis, array: (array, None),
    lambda shared, axis, _, cotangent: (shared.sum(cotangent, axis),),
)


@dataclass(frozen=True)
class TiedPromotion:
    """What an `nnx.Linear` does to input, kernel and bias before it multiplies."""

    shared: SharedColumns

    def __call__(self, arrays: Sequence[Any], **options: Any) -> Any:
        """The three in one dtype, which `options` may name."""
        inputs, kernel, bias = arrays
        kernel = tied(self.shared, 1, kernel)
        bias = None if bias is None else tied(self.shared, 0, bias)
        return promote_dtype((inputs, kernel, bias), **options)


class TiedConv(CausalConv1d):
    """A `CausalConv1d` some of whose channels are copies, as said by `shared`."""

    def __init__(self, *sizes: int, shared: SharedColumns, **options: Any):
        super().__init__(*sizes, **options)
        self.shared = shared
        shared.equalise(self.kernel, 0)
        shared.equalise(self.bias, 0)

    def _operands(self, x: Any) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        x, kernel, bias = super()._operands(x)
        kernel = tied(self.shared, 0, kernel)
        return x, kernel, None if bias is None else tied(self.shared, 0, bias)


def spec_of(array: Any) -> tuple:
    """The mesh axes over which each dimension of an array is explicitly sharded."""
    return tuple(jax.typeof(array).sharding.spec)


@promoting
def on_mesh(function: Callable, module: nnx.Module, arrays: Any, like: Callable) -> Any:
    """`function(module, *arrays)` on whatever mesh its arrays are.

    Explicit axes become automatic inside: XLA divides the work.

    Args:
        function: of the module and the arrays, which changes nothing in the module.
        module: with all its parameters.
        arrays: a tuple of trees.
        like: called without arguments, gives a tree of the specs of the results.
    """
    graph, state = nnx.split(module)
    leaves = jax.tree.leaves((state, arrays))
    meshes = (jax.typeof(leaf).sharding.mesh for leaf in leaves)
    mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
    if mesh is None:
        return function(module, *arrays)

    def of_state(state, arrays):
        return function(nnx.merge(graph, state), *arrays)

    out_sharding = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        like(),
        is_leaf=lambda leaf: isinstance(leaf, P),
    )
    return jax.sharding.auto_axes(
        of_state, axes=mesh.explicit_axes, out_sharding=out_sharding
    )(state, arrays)


def place_like(channels: Any, array: jax.Array, axis: int) -> jax.Array:
    """The array, its `axis` divided among devices as a parameter's first one is."""
    sharding = None
    if not isinstance(channels, jax.core.Tracer):
        sharding = getattr(channels, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not any(sharding.spec[:1]):
        return array
    spec = P(*[None] * axis, sharding.spec[0])
    return place(array, NamedSharding(sharding.mesh, spec))


def place(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """The array, divided so; all processes have it, or each a part of it."""
    if sharding.is_fully_addressable or not array.is_fully_addressable:
        return jax.device_put(array, sharding)
    # jax.device_put would have all processes compare what they have.
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)
