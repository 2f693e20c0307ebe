"""The primitive of all ops: how jax traces, maps, and lowers a call of one.

The implementation is chosen at lowering, where the caller does not say.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from .. import checks
from ..compat import __version__, kernel_compilers, require_jax_triton
from ..promotion import promoting
from . import sharding
from .forward_mode import refusal, undifferentiated
from .record import Op

DEFAULT_COMPUTE_CAPABILITY = 90
# jax makes the value of such a context part of the keys of its caches, so that a change
# of the target traces and lowers anew.
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


def run(op: Op, implementation: str | None, spec: Any, operands: Any) -> tuple:
    """Runs `op` on checked operands."""
    if implementation in ("xla", "interpret"):
        out = _jitted(op, implementation, spec)(operands)
        # The interpreter's callback has results that vary over no axis of a mesh.
        return sharding.varying_alike((operands, out))[1]
    leaves, tree = jax.tree.flatten(operands)
    out = causal_conv_p.bind(
        *leaves,
        op=op,
        tree=tree,
        spec=spec,
        required=implementation == "triton",
        batched=(),
    )
    return tuple(out)


@functools.cache
def _jitted(op: Op, implementation: str, spec: Any) -> Callable:
    """The op as a function of its operands, compiled once if it is called eagerly."""
    if implementation == "xla":
        function: Callable = promoting(functools.partial(op.xla, spec))
    else:
        from ..kernels import interpreter

        function = _launched(op, spec, interpreter.call)
        function = undifferentiated(op, implementation, function)
    return jax.jit(function, inline=True)


def _launched(op: Op, spec: Any, call: Callable) -> Callable:
    """The op as a function of its operands, by kernels that `call` launches."""
    from ..kernels import record

    launches = op.launches()
    return promoting(lambda operands: record.run(launches(spec, operands), call))


# The primitive's operands are the leaves of the op's record of operands. Its params:
# `op` and `spec`, what is called; `tree`, how the leaves become a record again;
# `required`, whether the kernels must run it, or XLA may; `batched`, for each vmap
# around the call, the outermost first, which operands have its axis (in front).
causal_conv_p = Primitive("causal_conv")
causal_conv_p.multiple_results = True
sharding.needs_devices(causal_conv_p)


@causal_conv_p.def_impl
def _impl(*leaves, **params):
    # A primitive runs as a compiled program also where jit is disabled: there, what is
    # jitted would be called as it is, which is this function again.
    with jax.disable_jit(False):
        return _jitted_bind(tuple(sorted(params.items())))(*leaves)


@functools.cache
def _jitted_bind(params):
    return jax.jit(functools.partial(causal_conv_p.bind, **dict(params)))


def _function(params, function, over_axis) -> Callable:
    """`function` of the op's record of operands as one of the primitive's operands."""

    def of_leaves(*leaves):
        return tuple(function(jax.tree.unflatten(params["tree"], leaves)))

    for axes in reversed(params["batched"]):
        of_leaves = over_axis(of_leaves, axes)
    return of_leaves


def _in_xla(params) -> Callable:
    function = functools.partial(params["op"].xla, params["spec"])
    return _function(params, promoting(function), _vmapped)


def _vmapped(function, axes):
    return jax.vmap(function, in_axes=tuple(0 if axis else None for axis in axes))


def _looped(function, axes):
    """Vmap by a loop, since jax-triton's primitive has no batching rule."""

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
def _abstract_eval(*leaves, op, tree, spec, batched, **_):
    shapes, sizes = [leaf.shape for leaf in leaves], []
    for axes in batched:
        sizes.append(next(s[0] for s, axis in zip(shapes, axes, strict=True) if axis))
        shapes = [s[axis:] for s, axis in zip(shapes, axes, strict=True)]
    arrays = [
        jax.ShapeDtypeStruct(shape, leaf.dtype)
        for shape, leaf in zip(shapes, leaves, strict=True)
    ]
    results = [
        jax.ShapeDtypeStruct((*sizes, *result.shape), result.dtype)
        for result in op.result_shapes(spec, jax.tree.unflatten(tree, arrays))
    ]
    return sharding.result_types(results, leaves)


def _batch(leaves, dims, **params):
    leaves = [
        leaf if dim is None else jnp.moveaxis(leaf, dim, 0)
        for leaf, dim in zip(leaves, dims, strict=True)
    ]
    axes = tuple(dim is not None for dim in dims)
    size = next(leaf.shape[0] for leaf, axis in zip(leaves, axes, strict=True) if axis)
    op, tree = params["op"], params["tree"]
    if op.fold is not None and not params["batched"]:
        operands, mapped = (jax.tree.unflatten(tree, each) for each in (leaves, axes))
        folded = op.fold(params["spec"], operands, mapped, size)
        if folded is not None:
            out = causal_conv_p.bind(*jax.tree.leaves(folded), **params)
            return [o.reshape(size, -1, *o.shape[1:]) for o in out], [0] * len(out)
    params["batched"] = (axes, *params["batched"])
    out = causal_conv_p.bind(*leaves, **params)
    return out, [0] * len(out)


batching.primitive_batchers[causal_conv_p] = _batch


def _no_jvp(primals, tangents, *, op, required, **_):
    raise NotImplementedError(refusal(op, "triton" if required else None))


ad.primitive_jvps[causal_conv_p] = _no_jvp


def _lower(ctx, *leaves, function):
    module = ctx.module_context
    if len(module.platforms) > 1:
        # jax lowers a jitted function (`jnp.cumsum`, say) once for a whole module, by
        # the rules of the platform that comes first: one that it lowered for CUDA
        # would run on the CPU too, where XLA may not know it. Each of our branches
        # gets its own.
        own = module.replace(cached_primitive_lowerings={})
        ctx = ctx.replace(module_context=own)
    return mlir.lower_fun(function, multiple_results=True)(ctx, *leaves)


def _lower_to_xla(ctx, *leaves, **params):
    if params["required"]:
        raise ValueError(
            'implementation="triton" needs CUDA, got platform '
            f'{ctx.module_context.platforms}; use None, "xla" or "interpret"'
        )
    return _lower(ctx, *leaves, function=_in_xla(params))


def _lower_to_triton(ctx, *leaves, **params):
    try:
        require_jax_triton()
        from ..kernels import bridge
    except ImportError as error:
        cure = 'pip install "jax[cuda13]" jax-triton (or jax[cuda12])'
        if params["required"]:
            raise ImportError(
                f'implementation="triton" needs jax-triton: {error}. Try {cure}'
            ) from error
        _warn_once(f"causal conv uses XLA on CUDA: {error}. For the kernels, {cure}")
        return _lower_to_xla(ctx, *leaves, **params)
    shapes = [aval.shape for aval in ctx.avals_in]
    # Grids and tiles are chosen from sizes, which must be numbers by now.
    if any(map(jax.export.is_symbolic_dim, itertools.chain(*shapes))):
        raise NotImplementedError(
            f"the Triton kernels need static sizes, got operands of shapes {shapes}: "
            'export one program per size, or use implementation="xla"'
        )
    capability = _compute_capability()
    call = functools.partial(bridge.call, compute_capability=capability)
    kernels = _launched(params["op"], params["spec"], call)
    target = (__version__, capability, kernel_compilers())
    function = sharding.partitioned(
        _function(params, kernels, _looped), params, ctx, target
    )
    return _lower(ctx, *leaves, function=function)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


mlir.register_lowering(causal_conv_p, _lower_to_xla)
mlir.register_lowering(causal_conv_p, _lower_to_triton, platform="cuda")
