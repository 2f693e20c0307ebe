"""How the ops live on a mesh of devices.

Three things that jax leaves to whoever brings a primitive of his own: operands inside
`shard_map` must vary over the same manual axes; explicit axes want to know the sharding
of every result; and XLA cannot look into a kernel call to divide it among devices.
What is local and what is not is one table, DIMENSIONS.
"""

import functools
import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from .checks import PAD_SLOT_ID
from .columns import ALL, Columns

# The dimensions of every operand and result, in the order of the op's arguments. Those
# in capitals may be sharded: each device then runs the op on its share. (Batch rows own
# their slots only if `update` was given no slot numbers: see `_dimensions`. X are the
# columns of x and Y those of the output, which are the channels D as well, unless x is
# wider or the output is split: then none of the three can be sharded.)
DIMENSIONS = {
    "packed": (
        ("t X", "D w", "D", "s l D", "q", "n", "n", "n", ("p", "p")),
        ("t Y", "s l D"),
    ),
    "update": (("B q X", "D w", "D", "S l D", "B", "B", "B"), ("B q Y", "S l D")),
    "dense": (("B t X", "D w", "D", "B l D", "B t"), ("B t Y", "B m D")),
    "packed_backward": (
        ("t X", "D w", "D", "n k D", "t Y", "n l D", "q", "n", ("p", "p")),
        ("t D", "D w", "D", "n k D"),
    ),
    "rows_backward": (
        ("B t X", "D w", "D", "B k D", "B t Y", "B l D", "B", "B t"),
        ("B t D", "D w", "D", "B k D"),
    ),
}


def on_mesh(
    function: Callable, columns: Columns, with_states: bool, *args: Any
) -> tuple:
    """`function(*args)` on whatever mesh its arguments are.

    Args:
        function: of x, weight, bias, states (or None) and index arrays (or None).
        columns: those of x, and the parts of the output.
        with_states: whether the last result is like the states.
        args: its arguments.

    Returns:
        The results: the parts of the output sharded like x, states like the states.
        Parts that are not all of x do not share the sharding of its channels.
    """
    args = varying_alike(args)
    leaves = jax.tree.leaves(args)
    meshes = (jax.typeof(leaf).sharding.mesh for leaf in leaves)
    mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
    if mesh is None:
        return function(*args)
    spec = jax.typeof(args[0]).sharding.spec
    if not columns.all_together:
        spec = P(*spec[:-1], None)
    like_states = P(spec[0], None, spec[-1])
    if args[3] is not None:
        like_states = jax.typeof(args[3]).sharding.spec
    specs = [spec] * columns.num_parts + [like_states] * with_states
    out_sharding = tuple(NamedSharding(mesh, spec) for spec in specs)
    return jax.sharding.auto_axes(
        function, axes=mesh.explicit_axes, out_sharding=out_sharding
    )(*args)


def result_types(shapes: Sequence[Any], avals: Sequence[Any]) -> list:
    """Types of results: inside `shard_map` they vary as the most varying operand does.

    x is one that varies over the union of all axes; see `on_mesh`.
    """
    most = max(avals, key=lambda aval: len(aval.manual_axis_type.varying))
    return [
        jax.core.ShapedArray(
            s.shape,
            s.dtype,
            sharding=NamedSharding(most.sharding.mesh, P(*[None] * len(s.shape))),
            manual_axis_type=most.manual_axis_type,
        )
        for s in shapes
    ]


def varying_alike(arrays):
    """Casts a tree of arrays in `shard_map` to vary over the union of their axes.

    Cotangents must vary like their primals; outside of the differentiation rules the
    cast's own transpose is the sum over devices that a replicated operand needs.
    """

    def varying(leaf):
        return jax.typeof(leaf).manual_axis_type.varying

    axes = frozenset().union(*map(varying, jax.tree.leaves(arrays)))

    def cast(leaf):
        missing = axes - varying(leaf)
        if not missing:
            return leaf
        return jax.lax.pcast(leaf, tuple(sorted(missing)), to="varying")

    return jax.tree.map(cast, arrays)


def needs_devices(primitive: Any) -> None:
    """Has jax tell the primitive's lowering, and so `partitioned`, the devices."""
    prim_requires_devices_during_lowering.add(primitive)


def partitioned(
    function: Callable, params: dict, ctx: Any, target: Sequence[Any]
) -> Callable:
    """`function` of the primitive's operands, divided among devices.

    Each device runs it on its share of the dimensions that may be sharded; XLA
    gathers whatever is sharded otherwise. `ctx` is that of the lowering rule, `target`
    what the kernels depend on beside `params`.
    """
    operands, results = _dimensions(params, ctx.avals_in)
    operands, results = [["stamp"], *operands], results[: len(ctx.avals_out)]

    def partition(mesh, arg_shapes, result_shapes):
        shapes = [*arg_shapes, *jax.tree.leaves(result_shapes)]
        axes = _axes_of(mesh, [*operands, *results], shapes)

        def sharding(dims):
            return NamedSharding(mesh, P(*(axes.get(name) for name in dims)))

        def share(_, *leaves):
            out = function(*leaves)
            # A result without a dimension that is divided is a sum over it.
            over = [set(axes) - set(dims) for dims in results]
            return tuple(
                jax.lax.psum(o, [a for n in sorted(names) for a in axes[n]])
                if names
                else o
                for o, names in zip(out, over, strict=True)
            )

        return mesh, share, *(tuple(map(sharding, d)) for d in (results, operands))

    # Until XLA has divided it the call shows nothing of what it will do, and programs
    # are cached by what they show: an operand that nobody reads says it for them.
    says = repr((sorted(params.items()), *target)).encode()
    stamp = np.array([zlib.crc32(says)], np.uint32)

    divided = custom_partitioning(lambda _, *leaves: tuple(function(*leaves)))
    # In the order of their first appearance, as Shardy wants its factors.
    letters = dict.fromkeys(name for dims in (*operands, *results) for name in dims)
    divided.def_partition(
        partition,
        sharding_rule=" -> ".join(
            ", ".join(map(" ".join, side)) for side in (operands, results)
        ),
        need_replication_factors=tuple(filter(str.islower, letters)),
    )
    return functools.partial(divided, stamp)


def _dimensions(params: dict, avals: Sequence[Any]) -> tuple[list, list]:
    """Names of the dimensions of the primitive's operands and of its results."""
    args = jax.tree.unflatten(params["tree"], avals)
    names_of_args, names_of_results = DIMENSIONS[params["op"]]
    options = dict(params["options"])
    columns = options.get("columns", ALL)
    parts, rename = ["Y"], {"X": "D", "Y": "D"}
    if not columns.all_together:
        rename = {"X": "x", "D": "d", "Y": "d"}
        if columns.num_parts > 1:
            parts = [f"y{i}" for i in range(columns.num_parts)]
    if params["op"] == "update":
        x, _, _, state, _, slots, _ = args
        rank = sum(axes[0] for axes in params["batched"])
        own = slots is None and x.shape[rank] == state.shape[-3]
        own &= options["pad_slot_id"] == PAD_SLOT_ID
        rename |= {"S": "B"} if own else {"S": "s", "B": "b"}

    def split(arrays: Any) -> list[list[str]]:
        every: list[str] = []
        for names in jax.tree.leaves(arrays):
            each = [names.replace("Y", part) for part in parts]
            every += dict.fromkeys(each)  # one, if there is no Y in it
        return [[rename.get(name, name) for name in names.split()] for names in every]

    present = [
        names for names, arg in zip(names_of_args, args, strict=True) if arg is not None
    ]
    operands, results = split(present), split(names_of_results)
    for depth, axes in reversed(list(enumerate(params["batched"]))):
        mapped = f"V{depth}"
        for names, axis in zip(operands, axes, strict=True):
            names[:0] = [mapped] if axis else []
        for names in results:
            names.insert(0, mapped)
    return operands, results


def _axes_of(mesh, dimensions, shapes) -> dict[str, tuple]:
    """The mesh axes over which each dimension is to be divided, evenly."""
    axes: dict[str, tuple] = {}
    for names, shape in zip(dimensions, shapes, strict=True):
        spec = [*shape.sharding.spec, *[None] * len(names)][: len(names)]
        for name, over, size in zip(names, spec, shape.shape, strict=True):
            if over is None or name.islower() or name in axes:
                continue
            mesh_axes = over if isinstance(over, tuple) else (over,)
            free = set(mesh_axes).isdisjoint(itertools.chain(*axes.values()))
            if free and size % math.prod(mesh.shape[a] for a in mesh_axes) == 0:
                axes[name] = mesh_axes
    return axes
