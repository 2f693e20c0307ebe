"""`Op`: all that jax has to be told about an op of ours, in one record."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Op:
    """An op on checked operands.

    Its implementations have one signature, `(spec, operands) -> tuple of arrays`, where
    spec is hashable and static, and operands a NamedTuple with None for what is absent.

    Attributes:
        name: for people, and for keys of caches.
        xla: the implementation in XLA.
        launches: gives the function that makes the kernels' launches; Triton is
            imported when it is called.
        dims: the operands' record, with the names of each array's dimensions. Those
            in capitals may be sharded: each device then runs the op on its share. X
            are the columns of x and Y those of the output, which are the channels D
            as well, unless x is wider or the output is split: then none of the three
            can be sharded.
        result_dims: the names of each result's dimensions; one with Y is a result per
            part of the output.
        result_shapes: `(spec, operands) -> list` of `jax.ShapeDtypeStruct`, from
            anything with a shape and a dtype.
        rename: `(spec, operands) -> dict`, other names for dimensions in this call:
            two that are sharded alike get one name, of which all sizes are then
            multiples of the least. None renames nothing.
        fold: `(spec, operands, axes, size) -> operands or None`, the op under vmap as
            one call: operands with the mapped axis (in front where `axes` is True)
            folded into rows, or None where that cannot be.
    """

    name: str
    xla: Callable[..., tuple]
    launches: Callable[[], Callable]
    dims: Any
    result_dims: tuple[str, ...]
    result_shapes: Callable[..., list]
    rename: Callable[..., dict[str, str]] | None = None
    fold: Callable[..., Any] | None = None

    def __repr__(self) -> str:
        return self.name
