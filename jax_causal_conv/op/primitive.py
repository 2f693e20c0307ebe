"""Chooses the implementation of an op, at lowering where the caller does not say.

An op is a function `op(*arrays_or_None, **static) -> tuple of arrays` in XLA, with a
twin of the same name in `kernels/launch.py`. Everything here is the same for all ops.
"""

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from . import checks, sharding, xla, xla_backward

OPS: dict[str, Callable] = {
    "packed": xla.packed,
    "update": xla.update,
    "dense": xla.dense,
    "packed_backward": xla_backward.packed_backward,
    "rows_backward": xla_backward.rows_backward,
}

DEFAULT_COMPUTE_CAPABILITY = 90
# A context of jax's own kind is part of the cache key of tracing and lowering.
_target = jax.make_user_context(default_value=None)


@contextmanager
def target_compute_capability(compute_capability: int) -> Iterator[None]:
    """Compiles the kernels for a GPU other than the visible one.

    Wins over the visible GPU, which wins over 90 (Hopper) where there is none: in an
    export, ahead-of-time compilation, or a test on a CPU host. One jitted function
    lowered under two values holds two kernels. Machine code in an export or an
    ahead-of-time executable is for this capability only.

    Args:
        compute_capability: ten times the CUDA version number: 80, 90, 100, …

    Raises:
        TypeError: not a static int.
        ValueError: below 80, for which no kernel is made.

    Example:
        >>> with target_compute_capability(80):
        ...     lowered = jax.jit(step).trace(x).lower(lowering_platforms=("cuda",))
    """
    value = checks.static_int("compute_capability", compute_capability, minimum=80)
    with _target(value):
        yield


def visible_compute_capability() -> int | None:
    """That of the first GPU; None where there is none."""
    try:
        major, minor = jax.devices("cuda")[0].compute_capability.split(".")
    except RuntimeError:
        return None
    return int(major) * 10 + int(minor)


def _compute_capability() -> int:
    return _target.value or visible_compute_capability() or DEFAULT_COMPUTE_CAPABILITY


def run(op: str, implementation: str | None, *args: Any, **static: Any) -> Any:
    """Runs `op` on checked arguments (arrays, pytrees of arrays, or None)."""
    options = tuple(sorted(static.items()))
    if implementation in ("xla", "interpret"):
        out = _jitted(op, implementation, options)(*args)
        return sharding.varying_alike((args, out))[1]  # a callback forgets it
    leaves, tree = jax.tree.flatten(args)
    out = causal_conv_p.bind(
        *leaves,
        op=op,
        tree=tree,
        options=options,
        required=implementation == "triton",
        batched=(),
    )
    return tuple(out)


@functools.cache
def _jitted(op, implementation, options):
    """The op as a function of arrays, compiled once where it is called eagerly."""
    if implementation == "xla":
        function = OPS[op]
    else:
        from .kernels import interpreter, launch

        function = functools.partial(getattr(launch, op), interpreter.call)
    return jax.jit(functools.partial(function, **dict(options)), inline=True)


# Params of the primitive: `op` with its static `options`; `tree`, which arguments the
# operands are; `required`, whether Triton must run it; `batched`, outermost vmap
# first, which operands have that vmap's axis (in front).
causal_conv_p = Primitive("causal_conv")
causal_conv_p.multiple_results = True
sharding.needs_devices(causal_conv_p)


@causal_conv_p.def_impl
def _impl(*leaves, **params):
    return _jitted_bind(tuple(sorted(params.items())))(*leaves)


@functools.cache
def _jitted_bind(params):
    return jax.jit(functools.partial(causal_conv_p.bind, **dict(params)))


def _function(params, function, over_axis) -> Callable:
    """`function` of the op's arguments as one of the primitive's operands."""

    def of_leaves(*leaves):
        args = jax.tree.unflatten(params["tree"], leaves)
        return tuple(function(*args, **dict(params["options"])))

    for axes in reversed(params["batched"]):
        of_leaves = over_axis(of_leaves, axes)
    return of_leaves


def _vmapped(function, axes):
    return jax.vmap(function, in_axes=tuple(0 if axis else None for axis in axes))


def _looped(function, axes):
    """Vmap by a loop, for functions that have no batching rule."""

    def loop(*leaves):
        def step(mapped):
            mapped = iter(mapped)
            return function(
                *(
                    next(mapped) if axis else leaf
                    for axis, leaf in zip(axes, leaves, strict=True)
                )
            )

        mapped = [leaf for axis, leaf in zip(axes, leaves, strict=True) if axis]
        return jax.lax.map(step, mapped)

    return loop


@causal_conv_p.def_abstract_eval
def _abstract_eval(*leaves, **params):
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    shapes = jax.eval_shape(_function(params, OPS[params["op"]], _vmapped), *shapes)
    return sharding.result_types(shapes, leaves)


def _batch(leaves, dims, **params):
    leaves = [
        leaf if dim is None else jnp.moveaxis(leaf, dim, 0)
        for leaf, dim in zip(leaves, dims, strict=True)
    ]
    axes = tuple(dim is not None for dim in dims)
    size = next(leaf.shape[0] for leaf, axis in zip(leaves, axes, strict=True) if axis)
    if params["op"] == "dense" and not params["batched"]:
        x, *_ = jax.tree.unflatten(params["tree"], leaves)
        x_axis, weight_axis, bias_axis, *_ = jax.tree.unflatten(params["tree"], axes)
        tokens = size * math.prod(x.shape[x_axis : x_axis + 2])
        if not (weight_axis or bias_axis) and 0 < tokens < 2**31:
            return _fold_rows(leaves, axes, size, params)
    params["batched"] = (axes, *params["batched"])
    out = causal_conv_p.bind(*leaves, **params)
    return out, [0] * len(out)


def _fold_rows(leaves, axes, size, params):
    """Dense op under vmap over anything but its filter: more rows of one batch."""

    def fold(leaf, axis):
        if not axis:
            leaf = jnp.broadcast_to(leaf, (size, *leaf.shape))
        return leaf.reshape(-1, *leaf.shape[2:])

    x, weight, bias, *rest = jax.tree.unflatten(params["tree"], leaves)
    x_axis, _, _, *rest_axes = jax.tree.unflatten(params["tree"], axes)
    folded = [
        fold(x, x_axis),
        weight,
        bias,
        *(
            None if leaf is None else fold(leaf, axis)
            for leaf, axis in zip(rest, rest_axes, strict=True)
        ),
    ]
    out = causal_conv_p.bind(*jax.tree.leaves(folded), **params)
    return [o.reshape(size, -1, *o.shape[1:]) for o in out], [0] * len(out)


batching.primitive_batchers[causal_conv_p] = _batch


def _lower(ctx, *leaves, function):
    return mlir.lower_fun(function, multiple_results=True)(ctx, *leaves)


def _lower_to_xla(ctx, *leaves, **params):
    if params["required"]:
        raise ValueError(
            'implementation="triton" needs CUDA, got platform '
            f'{ctx.module_context.platforms}; use None, "xla" or "interpret"'
        )
    return _lower(ctx, *leaves, function=_function(params, OPS[params["op"]], _vmapped))


def _lower_to_triton(ctx, *leaves, **params):
    from . import __version__

    try:
        from .kernels import bridge, launch
    except ImportError as error:
        cure = 'pip install "jax[cuda13]" jax-triton (or jax[cuda12])'
        if params["required"]:
            raise ImportError(
                f'implementation="triton" needs jax-triton: {error}. Try {cure}'
            ) from error
        _warn_once(f"causal conv uses XLA on CUDA: {error}. For the kernels, {cure}")
        return _lower_to_xla(ctx, *leaves, **params)
    shapes = [aval.shape for aval in ctx.avals_in]
    if any(map(jax.export.is_symbolic_dim, itertools.chain(*shapes))):
        raise NotImplementedError(  # grids and tiles are numbers, known by now
            f"the Triton kernels need static sizes, got operands of shapes {shapes}: "
            'export one program per size, or use implementation="xla"'
        )
    capability = _compute_capability()
    call = functools.partial(bridge.call, compute_capability=capability)
    kernel = functools.partial(getattr(launch, params["op"]), call)
    target = (__version__, capability, bridge.VERSIONS)
    function = sharding.partitioned(
        _function(params, kernel, _looped), params, ctx, target
    )
    return _lower(ctx, *leaves, function=function)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


mlir.register_lowering(causal_conv_p, _lower_to_xla)
mlir.register_lowering(causal_conv_p, _lower_to_triton, platform="cuda")
