"""Where an engine's arrays are: on one device, or on those of a mesh.

On a mesh a step is one jitted call for all devices. Along the data axis, if there is
one, each device (or each group of devices that share a model) has slots and a batch of
its own, numbered within the device: nothing crosses that axis. What is divided along
other axes, as by `tensor_parallel`, XLA divides.

Several processes run the same steps, each on its own devices. The host then sees but a
part of an array, unless all devices have the whole of it.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ..mesh import place
from .batches import Batch
from .validation import brief


@dataclass(frozen=True)
class Placement:
    """A mesh with automatic axes, or none.

    Attributes:
        mesh: the mesh; None is a single device.
        axis: its axis along which each device has its own slots; None: all share them.
        divided: whether the model is divided over other axes.
    """

    mesh: Any  # a Mesh or None
    axis: str | None
    divided: bool = False

    @classmethod
    def of(
        cls, params: Sequence[Any], implementation: Any, mesh: Any, axis: str | None
    ) -> "Placement":
        """The given mesh, or that of a model's parameters.

        Raises:
            TypeError, ValueError: as `Engine` says.
        """
        shardings = [getattr(param, "sharding", None) for param in params]
        divided = [s for s in shardings if isinstance(s, NamedSharding)]
        if (mesh is None) != (axis is None):
            raise ValueError(
                "mesh and data_axis must be given together, got "
                f"mesh={brief(mesh)} and data_axis={axis!r}"
            )
        if mesh is None:
            mesh = divided[0].mesh if divided else None
        elif not isinstance(mesh, Mesh):
            raise TypeError(f"mesh must be a jax.sharding.Mesh, got {brief(mesh)}")
        elif axis not in mesh.shape:
            raise ValueError(
                f"data_axis must be one of the mesh's axes {mesh.axis_names}, got "
                f"{axis!r}"
            )
        if mesh is None:
            return cls(None, None)
        for sharding in divided:
            own = sharding.mesh
            if own.axis_names != mesh.axis_names or own.devices.tolist() != (
                mesh.devices.tolist()
            ):
                raise ValueError(
                    f"the model must be on the engine's mesh {mesh.shape} or on a "
                    f"single device, got one on {own.shape}"
                )
            if axis in jax.tree.leaves(tuple(sharding.spec)):
                raise ValueError(
                    f"the model must not be divided over data_axis={axis!r}, got "
                    f"parameters of {sharding.spec}"
                )
        is_divided = any(map(any, (sharding.spec for sharding in divided)))
        on_gpus = mesh.devices.flat[0].platform in ("gpu", "cuda", "rocm")
        if axis and is_divided and on_gpus and implementation != "xla":
            # XLA has no custom partitioning where some axes of a mesh are manual.
            raise ValueError(
                "on GPUs a data_axis and a divided model need implementation='xla', "
                f"got {implementation!r}: give each group of devices an engine instead"
            )
        # Explicit axes would have every intermediate say where it is.
        return cls(Mesh(mesh.devices, mesh.axis_names), axis, is_divided)

    @property
    def shares(self) -> int:
        """How many devices, or groups of them, have slots of their own."""
        return 1 if self.axis is None else self.mesh.shape[self.axis]

    def sharding(self, *spec: Any) -> Any:
        """Of an array with these axes; nothing is said on a single device."""
        return None if self.mesh is None else NamedSharding(self.mesh, P(*spec))

    def params(self, params: Sequence[Any]) -> list:
        """The parameters, divided as they are."""
        if self.mesh is None:
            return list(params)
        return [place(param, self.sharding(*_spec(param))) for param in params]

    def states(self, states: Any) -> Any:
        """Types of the states of all devices, from the states of one: slots first."""

        def type_of(state):
            if self.mesh is None:
                return jax.ShapeDtypeStruct(
                    state.shape, state.dtype, sharding=state.sharding
                )
            slots, *rest = state.shape
            sharding = self.sharding(self.axis, *_spec(state)[1:])
            shape = self.shares * slots, *rest
            return jax.ShapeDtypeStruct(shape, state.dtype, sharding=sharding)

        return jax.tree.map(type_of, states)

    def context(self) -> Any:
        """Where functions are compiled, whatever mesh the caller has set."""
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()

    def on_each(self, function: Callable, *specs: Any, out: Any) -> Callable:
        """The function, called once for each device along the data axis.

        Args:
            function: of as many trees as there are `specs`.
            specs: for each argument whether devices have their own part of it.
            out: the same for the results; a tree's prefix.
        """
        if self.axis is None:
            return function
        own, same = P(self.axis), P()
        # XLA divides what a function does among the devices along the other axes. If
        # there is nothing to divide, all axes are manual, as kernels need it.
        manual = {self.axis} if self.divided else set(self.mesh.axis_names)
        return jax.shard_map(
            function,
            mesh=self.mesh,
            axis_names=manual,
            in_specs=tuple(own if has else same for has in specs),
            out_specs=jax.tree.map(lambda has: own if has else same, out),
            check_vma=False,
        )

    def batch(self, batches: Sequence[Batch]) -> Any:
        """A step's input as `(shares, L)` int32, for a single transfer."""
        return self.put(np.stack([_words(batch) for batch in batches]), self.axis)

    def put(self, array: np.ndarray, *spec: Any) -> Any:
        """What all processes have, on the mesh; a single device gets it when called."""
        if self.mesh is None:
            return array
        return jax.make_array_from_callback(
            array.shape, self.sharding(*spec), array.__getitem__
        )

    def read(self, words: jax.Array, like: Batch) -> Batch:
        """The batch of one device, in the jitted step."""
        tree: Any
        leaves, tree = jax.tree.flatten(like)
        ends = np.cumsum([leaf.size for leaf in leaves])
        parts = jnp.split(words[0], ends[:-1])
        return tree.unflatten(
            jax.lax.bitcast_convert_type(part, leaf.dtype)
            if leaf.dtype.itemsize == 4
            else part.astype(leaf.dtype)
            for part, leaf in zip(parts, leaves, strict=True)
        )


def _words(batch: Batch) -> np.ndarray:
    """The arrays of a batch, all of one dimension, one after another."""
    return np.concatenate(
        [
            leaf.view(np.int32) if leaf.dtype.itemsize == 4 else leaf.astype(np.int32)
            for leaf in jax.tree.leaves(batch)
        ]
    )


def _spec(array: Any) -> tuple:
    """The mesh axes over which each dimension of an array is divided, if any."""
    sharding = getattr(array, "sharding", None)
    spec = tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()
    return (*spec, *[None] * (array.ndim - len(spec)))
