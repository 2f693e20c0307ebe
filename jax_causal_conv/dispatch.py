"""Chooses the implementation of an op, at lowering where the caller does not say.

An op is a function of this signature in `xla.py`, with a twin in `kernels/launch.py`:
`op(*arrays_or_None, **static) -> (out, new_state)`, where out is like the first
argument and new_state like the fourth. Everything here is the same for all ops.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from . import checks, xla

OPS: dict[str, Callable] = {"packed": xla.packed, "update": xla.update}

_DEFAULT_COMPUTE_CAPABILITY = 90
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


def _compute_capability() -> int:
    if _target.value is not None:
        return _target.value
    try:
        major, minor = jax.devices("cuda")[0].compute_capability.split(".")
    except RuntimeError:  # no CUDA device is visible
        return _DEFAULT_COMPUTE_CAPABILITY
    return int(major) * 10 + int(minor)


def run(op: str, implementation: str | None, *args: Any, **static: Any) -> Any:
    """Runs `op` on checked arguments (arrays, pytrees of arrays, or None)."""
    options = tuple(sorted(static.items()))
    if implementation in ("xla", "interpret"):
        return _jitted(op, implementation, options)(*args)
    leaves, tree = jax.tree.flatten(args)
    return causal_conv_p.bind(
        *leaves,
        op=op,
        tree=tree,
        static=options,
        required=implementation == "triton",
    )


@functools.cache
def _jitted(op, implementation, options):
    """The op as a function of arrays, compiled once where it is called eagerly."""
    if implementation == "xla":
        function = OPS[op]
    else:
        from .kernels import interpreter, launch

        function = functools.partial(getattr(launch, op), interpreter.call)
    return jax.jit(functools.partial(function, **dict(options)), inline=True)


causal_conv_p = Primitive("causal_conv")
causal_conv_p.multiple_results = True


@causal_conv_p.def_impl
def _impl(*leaves, **params):
    return _jitted_bind(tuple(sorted(params.items())))(*leaves)


@functools.cache
def _jitted_bind(params):
    return jax.jit(functools.partial(causal_conv_p.bind, **dict(params)))


@causal_conv_p.def_abstract_eval
def _abstract_eval(*leaves, tree, **_):
    x, _, _, state, *_ = jax.tree.unflatten(tree, leaves)
    return x, state


def _lower(ctx, *leaves, tree, static, function):
    def flat(*leaves):
        return function(*jax.tree.unflatten(tree, leaves), **dict(static))

    return mlir.lower_fun(flat, multiple_results=True)(ctx, *leaves)


def _lower_to_xla(ctx, *leaves, op, tree, static, required):
    if required:
        raise ValueError(
            'implementation="triton" needs CUDA, got platform '
            f'{ctx.module_context.platforms}; use None, "xla" or "interpret"'
        )
    return _lower(ctx, *leaves, tree=tree, static=static, function=OPS[op])


def _lower_to_triton(ctx, *leaves, op, tree, static, required):
    try:
        from .kernels import bridge, launch
    except ImportError as error:
        cure = 'pip install "jax-causal-conv[cuda13]" (or [cuda12])'
        if required:
            raise ImportError(
                f'implementation="triton" needs jax-triton: {error}. Try {cure}'
            ) from error
        _warn_once(f"causal conv uses XLA on CUDA: {error}. For the kernels, {cure}")
        return _lower(ctx, *leaves, tree=tree, static=static, function=OPS[op])
    call = functools.partial(bridge.call, compute_capability=_compute_capability())
    function = functools.partial(getattr(launch, op), call)
    return _lower(ctx, *leaves, tree=tree, static=static, function=function)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


mlir.register_lowering(causal_conv_p, _lower_to_xla)
mlir.register_lowering(causal_conv_p, _lower_to_triton, platform="cuda")
