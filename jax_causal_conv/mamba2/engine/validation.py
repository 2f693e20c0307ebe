"""Reading what a caller gave: integers of any kind, each once, with clear errors."""

from collections.abc import Iterable, Iterator, Mapping, Set, Sized
from typing import Any

import numpy as np

from ..sampling import integer


def brief(value: Any) -> str:
    """The value and its type, for an error."""
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{text} ({type(value).__name__})"


def items_of(
    name: str, value: Any, what: str, refused: tuple = ()
) -> np.ndarray | list[int]:
    """Integers: a one-dimensional array as it is, anything else as a list.

    Args:
        name: of the argument.
        value: what was given.
        what: what it must be, in words.
        refused: types that are not wanted, beside text and what can be read once only.
    """
    if not isinstance(value, np.ndarray):
        refused = (str, bytes, bytearray, Iterator, Mapping, *refused)
        accepted = isinstance(value, Iterable) and isinstance(value, Sized)
        if not accepted or isinstance(value, refused):
            raise TypeError(f"{name} must be {what}, got {brief(value)}")
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ValueError(
                f"{name} must be {what}, got {array.dtype} of shape {array.shape}"
            )
        return array
    items = []
    for item in value:
        try:
            items.append(integer(name, item))
        except TypeError:
            raise ValueError(
                f"{name} must be {what}, got {brief(item)} in it"
            ) from None
    return items


def prompt_of(value: Any) -> np.ndarray:
    """The prompt as an array of any integer dtype, or of Python's large integers."""
    what = "a sequence of at least one integer"
    items = items_of("prompt", value, what, refused=(Set,))
    if len(items) == 0:
        raise ValueError(f"prompt must be {what}, got {brief(value)}")
    return np.asarray(items)


def stops_of(value: Any) -> frozenset[int]:
    """The stop tokens, each once."""
    items = items_of("stop_token_ids", value, "a collection of integers")
    return frozenset(map(int, items))
