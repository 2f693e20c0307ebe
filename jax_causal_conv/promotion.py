"""jax's promotion of arrays inside this package, whatever its users want of theirs."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def promoting(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """`function`, also where ranks or dtypes are promoted strictly outside of it.

    `jax_numpy_rank_promotion="raise"` and `jax_numpy_dtype_promotion="strict"` are for
    those who look for mistakes in their own code. What jax calls later, when it
    differentiates or lowers, must be wrapped by itself.
    """

    @functools.wraps(function)
    def wrapped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        strict = (
            jax.numpy_rank_promotion.value != "allow"
            or jax.numpy_dtype_promotion.value != "standard"
        )
        if not strict:
            return function(*args, **kwargs)
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return wrapped
