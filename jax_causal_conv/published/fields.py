"""Values of a config.json: each is of a kind, and what is of none is named."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """What a value may be: in words, as a test, and how it is then written here."""

    expected: str
    accepts: Callable[[Any], bool]
    convert: Callable[[Any], Any] = lambda value: value


class Required:
    """The default of a field that must be there."""


class Field(NamedTuple):
    """A value in a config.

    Attributes:
        names: what it may be called there; the first that is there counts.
        default: its value if it is absent, or `Required`.
        kind: what it may be.
    """

    names: tuple[str, ...]
    default: Any
    kind: Kind


def field(name: str, default: Any, kind: Kind, *older: str) -> Field:
    """A `Field`; names in `older` come before `name`."""
    return Field((*older, name), default, kind)


def _is_number(value: Any) -> bool:
    """A number of JSON; NaN is none."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and not math.isnan(value)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_int(value) and value > 0


def _plain(limit: Any) -> Any:
    """Transformers may write infinity as {"__float__": "Infinity"}."""
    if isinstance(limit, Mapping) and list(limit) == ["__float__"]:
        return {"Infinity": math.inf, "-Infinity": -math.inf}.get(limit["__float__"])
    return limit


def _are_limits(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    low, high = map(_plain, value)
    return _is_number(low) and _is_number(high) and low <= high


SIZE = Kind("a positive integer", _is_size)
SIZE_OR_NULL = Kind("a positive integer or null", lambda v: v is None or _is_size(v))
SIZE_OR_AUTO = Kind(
    "a positive integer or 'auto'",
    lambda v: v == "auto" or _is_size(v),
    lambda v: None if v == "auto" else v,
)
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
POSITIVE = Kind("a positive finite number", lambda v: _is_finite(v) and v > 0)
NOT_NEGATIVE = Kind("a finite number, 0 or more", lambda v: _is_finite(v) and v >= 0)
FACTOR = Kind("a finite number", _is_finite)
LIMITS = Kind(
    "two numbers, the lower one first",
    _are_limits,
    lambda v: tuple(float(_plain(limit)) for limit in v),
)
LEAST = Kind(  # the lower one of two limits
    "a finite number, 0 or more",
    NOT_NEGATIVE.accepts,
    lambda v: (float(v), math.inf),
)
SILU = Kind("'silu' or 'swish'", lambda v: v in ("silu", "swish"))
TOKEN = Kind("an integer or null", lambda v: v is None or _is_int(v))
TOKENS = Kind(
    "an integer, several, or null",
    lambda v: all(map(_is_int, v)) if isinstance(v, list | tuple) else TOKEN.accepts(v),
    lambda v: tuple(v) if isinstance(v, list | tuple) else v,
)


def factors(count: int) -> Kind:
    """So many finite numbers; null is so many ones."""
    return Kind(
        f"{count} finite numbers or null",
        lambda v: (
            v is None
            or (
                isinstance(v, list | tuple)
                and len(v) == count
                and all(map(_is_finite, v))
            )
        ),
        lambda v: (1.0,) * count if v is None else tuple(map(float, v)),
    )


def read(config: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a table of `Field`s finds in a config.

    Args:
        config: of a model, as json reads it.
        table: a `Field` under each name of the result, or the value itself, where a
            family of models has no choice.

    Raises:
        ValueError: it names each value that is missing or of another kind, and what
            was expected.
    """
    values, wrong = {}, []
    for ours, entry in table.items():
        if not isinstance(entry, Field):
            values[ours] = entry
            continue
        there = [name for name in entry.names if name in config]
        name = there[0] if there else entry.names[-1]
        value = config.get(name, entry.default)
        if value is Required:
            wrong.append(f"{name} is missing, expected {entry.kind.expected}")
        elif not entry.kind.accepts(value):
            wrong.append(f"{name} must be {entry.kind.expected}, got {value!r}")
        else:
            values[ours] = entry.kind.convert(value)
    if wrong:
        raise ValueError("; ".join(wrong))
    return values


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: there is something else in it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
