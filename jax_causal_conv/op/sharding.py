"""How the ops live on a mesh of devices.

jax leaves three things to those who add a primitive. Operands inside `shard_map` must
vary over the same manual axes; on explicit axes the sharding of every result must be
known; and XLA cannot look into a kernel call to divide it among devices. The record of
each op says which dimensions may be divided (`Op.dims`).
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

from .record import Op


def on_mesh(function: Callable, op: Op, spec: Any, operands: Any) -> tuple:
    """`function(operands)` on whatever mesh its arrays are.

    Args:
        function: of the op's operands.
        op: what is computed.
        spec: what is static about the call.
        operands: its arrays.

    Returns:
        The results, each sharded like the operand that has the same dimensions, or
        else like x as far as they have dimensions in common. Parts that are not all of
        x do not share the sharding of its channels.
    """
    operands = varying_alike(operands)
    leaves = jax.tree.leaves(operands)
    meshes = (jax.typeof(leaf).sharding.mesh for leaf in leaves)
    mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
    if mesh is None:
        return function(operands)
    shapes = op.result_shapes(spec, operands)
    dims, results = _names(op, spec, operands)
    axes_of: dict[tuple[str, ...], P] = {}
    for names, leaf in zip(dims, leaves, strict=True):
        axes_of.setdefault(tuple(names), jax.typeof(leaf).sharding.spec)
    of_x = dict(zip(dims[0], jax.typeof(leaves[0]).sharding.spec, strict=True))
    specs = [
        axes_of.get(tuple(names), P(*(of_x.get(name) for name in names)))
        for names in results[: len(shapes)]
    ]
    out_sharding = tuple(NamedSharding(mesh, spec) for spec in specs)
    return jax.sharding.auto_axes(
        function, axes=mesh.explicit_axes, out_sharding=out_sharding
    )(operands)


def result_types(shapes: Sequence[Any], avals: Sequence[Any]) -> list:
    """Types of results: inside `shard_map` they vary as the most varying operand does.

    That is the union of all axes over which operands vary: `on_mesh` has cast them.
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

    # Compiled programs are cached under a hash of their text. That text does not hold
    # the kernels until XLA has divided the call among devices: a hash of all that they
    # depend on, as one more operand which nobody reads, stands in the text for them.
    kernels = repr((sorted(params.items()), *target)).encode()
    stamp = np.array([zlib.crc32(kernels)], np.uint32)

    divided = custom_partitioning(lambda _, *leaves: tuple(function(*leaves)))
    avals = [jax.ShapeDtypeStruct((1,), np.uint32), *ctx.avals_in, *ctx.avals_out]
    rule, factors, sizes = _sharding_rule(operands, results, avals)
    divided.def_partition(
        partition,
        sharding_rule=rule,
        need_replication_factors=tuple(filter(str.islower, factors)),
        **sizes,
    )
    return functools.partial(divided, stamp)


def _sizes(dimensions: Sequence[Sequence[str]], arrays: Sequence[Any]) -> dict:
    """All sizes of each name, ascending."""
    sizes: dict[str, set[int]] = {}
    for names, array in zip(dimensions, arrays, strict=True):
        for name, size in zip(names, array.shape, strict=True):
            sizes.setdefault(name, set()).add(size)
    return {name: sorted(all_sizes) for name, all_sizes in sizes.items()}


def _sharding_rule(operands, results, avals) -> tuple[str, list[str], dict[str, int]]:
    """The rule as Shardy wants it, its factors, and sizes that the rule does not show.

    Where dimensions of one name have several sizes (heads and their groups, say), the
    larger ones are that name times another factor, which cannot be sharded.
    """
    sizes = _sizes([*operands, *results], avals)
    factors: dict[str, None] = {}  # in the order of their first appearance
    needed: dict[str, int] = {}
    sides = []
    for names_of, arrays in (
        (operands, avals[: len(operands)]),
        (results, avals[len(operands) :]),
    ):
        side = []
        for names, array in zip(names_of, arrays, strict=True):
            dims = []
            for name, size in zip(names, array.shape, strict=True):
                least = sizes[name][0]
                factors[name] = None
                if size == least:
                    dims.append(name)
                    continue
                inner = f"in{size // least}{name.lower()}"
                factors[inner] = None
                needed[inner] = size // least
                dims.append(f"({name} {inner})")
            side.append(" ".join(dims))
        sides.append(", ".join(side))
    return " -> ".join(sides), list(factors), needed


def _names(op: Op, spec: Any, operands: Any) -> tuple[list, list]:
    """Names of the dimensions of each array of the operands, and of each result.

    X and Y become D, or other names where x is wider or the output is split, and
    `op.rename` may change more. An array with fewer dimensions than names has the
    first ones.
    """
    columns = spec.columns
    parts, rename = ["Y"], {"X": "D", "Y": "D"}
    if not columns.all_together:
        rename = {"X": "x", "D": "d", "Y": "d"}
        if columns.num_parts > 1:
            parts = [f"y{i}" for i in range(columns.num_parts)]
    if op.rename is not None:
        rename |= op.rename(spec, operands)

    def split(dims: Any) -> list[list[str]]:
        every: list[str] = []
        for names in jax.tree.leaves(dims):
            each = [names.replace("Y", part) for part in parts]
            every += dict.fromkeys(each)  # one, if there is no Y in it
        return [[rename.get(name, name) for name in names.split()] for names in every]

    present = [
        names
        for names, operand in zip(op.dims, operands, strict=True)
        if operand is not None
    ]
    ranks = (len(leaf.shape) for leaf in jax.tree.leaves(operands))
    of_operands = [
        names[:rank] for names, rank in zip(split(present), ranks, strict=True)
    ]
    return of_operands, split(op.result_dims)


def _dimensions(params: dict, avals: Sequence[Any]) -> tuple[list, list]:
    """`_names` of the primitive's operands and results, mapped axes in front."""
    batched = params["batched"]
    ranks = map(sum, zip(*batched, strict=True)) if batched else [0] * len(avals)
    inner = [
        jax.ShapeDtypeStruct(aval.shape[rank:], aval.dtype)
        for aval, rank in zip(avals, ranks, strict=True)
    ]
    args = jax.tree.unflatten(params["tree"], inner)
    operands, results = _names(params["op"], params["spec"], args)
    for depth, axes in reversed(list(enumerate(batched))):
        mapped = f"V{depth}"
        for names, axis in zip(operands, axes, strict=True):
            names[:0] = [mapped] if axis else []
        for names in results:
            names.insert(0, mapped)
    return operands, results


def _axes_of(mesh, dimensions, shapes) -> dict[str, tuple]:
    """The mesh axes over which each dimension is to be divided, evenly."""
    axes: dict[str, tuple] = {}
    sizes = _sizes(dimensions, shapes)
    for names, shape in zip(dimensions, shapes, strict=True):
        spec = [*shape.sharding.spec, *[None] * len(names)][: len(names)]
        for name, over in zip(names, spec, strict=True):
            if over is None or name.islower() or name in axes:
                continue
            mesh_axes = over if isinstance(over, tuple) else (over,)
            free = set(mesh_axes).isdisjoint(itertools.chain(*axes.values()))
            parts = math.prod(mesh.shape[a] for a in mesh_axes)
            if free and all(size % parts == 0 for size in sizes[name]):
                axes[name] = mesh_axes
    return axes
